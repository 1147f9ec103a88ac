"""detect.py: the backbone against detectron2's numbers, AP against pycocotools', COCO's format,
what people's files look like, short runs."""
import json
import math
import os
import signal
import subprocess
import sys
import time
import warnings

import numpy as np
import pytest
import torch
from conftest import (
    GOLDENS, ROOT, SIZES, agrees, call, fill, images, log_of, refused, run, same_state)
from PIL import Image

import detect
import vit

SHORT = ("--batch-size", 2, "--max-steps", 4, "--log-every", 1, "--scenes", 12, "--val-scenes", 3)
CLASSES = 5


def settings(*arguments):
    return detect.parse_detection([str(argument) for argument in arguments])


# ------------------------------------------------------------ the backbone

def vitdet_name(name):
    """A parameter's name in detectron2."""
    if name.startswith("encoder."):
        return name.removeprefix("encoder.")
    _, level, place, leaf = name.split(".")
    first = (4, 1, 0, 1)[int(level)]  # layers that resize the map
    place = int(place) - first
    if place < 0:
        return f"simfp_{int(level) + 1}.{place + first}.{leaf}"
    return f"simfp_{int(level) + 1}.{first + place // 2}{'.norm' * (place % 2)}.{leaf}"


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("window", [2, 4])
def test_pyramid_maps_are_those_of_vitdet(window, relative):
    encoder = vit.VisionTransformer(**SIZES)
    pyramid = detect.SimplePyramid(encoder, 48, window, 16)
    for block in encoder.blocks[:2]:  # in the golden network only the third attends globally
        block.attn = detect.RelativeAttention(48, 6, window)
    fill(pyramid, rename=vitdet_name)
    for name, table in pyramid.named_parameters():
        if not relative and ".rel_pos_" in name:
            table.data.zero_()  # as at first
    golden = GOLDENS["13_pyramid"][f"window_{window}"][f"rel_pos_{relative}"]
    seen = []
    pyramid.levels[2].register_forward_pre_hook(lambda level, inputs: seen.append(inputs[0]))
    maps = pyramid(images(2, 48))
    agrees(seen[0], golden["last_feat"])
    for k, feature_map in maps.items():
        agrees(feature_map, golden[f"p{k + 1}"])
    assert pyramid.strides == [2, 4, 8, 16, 32]


def test_pyramid_attends_globally_at_the_end_of_each_quarter():
    encoder = vit.vit_tiny()
    pyramid = detect.SimplePyramid(encoder, 640)
    assert len(pyramid.levels) == 4
    assert [block.attn.side for block in encoder.blocks] == [14, 14, 40] * 4
    assert encoder.pos_embed.requires_grad and encoder.pos_embed.shape == (1, 197, 192)
    assert not encoder.cls_token.requires_grad


@pytest.mark.parametrize("H", [6, 7, 3, 2])
def test_windows_are_neighborhoods_that_end_in_zeros(H):
    """Each window alone gives what the map gives there."""
    attention = detect.RelativeAttention(48, 6, side=3)
    torch.nn.init.normal_(attention.rel_pos_h)
    x = torch.randn(2, H, H, 48)
    actual = attention(x.flatten(1, 2)).unflatten(1, (H, H))
    for y in range(0, H, 3):
        for x0 in range(0, H, 3):
            window = x[:, y:y + 3, x0:x0 + 3]
            rows, columns = window.shape[1:3]
            whole = torch.zeros(2, 3, 3, 48)
            whole[:, :rows, :columns] = window
            expected = attention(whole.flatten(1, 2)).unflatten(1, (3, 3))
            torch.testing.assert_close(
                actual[:, y:y + 3, x0:x0 + 3], expected[:, :rows, :columns])


def test_relative_attention_is_unchanged_at_first_and_then_follows_its_formula():
    plain, relative = vit.Attention(48, 6), detect.RelativeAttention(48, 6, side=4)
    relative.load_state_dict(plain.state_dict(), strict=False)
    x = torch.randn(2, 16, 48)
    torch.testing.assert_close(relative(x), plain(x))
    torch.nn.init.normal_(relative.rel_pos_h)
    torch.nn.init.normal_(relative.rel_pos_w)
    q, k, v = plain.heads(x)
    expected = plain.scores(x)
    for i in range(16):
        for j in range(16):
            row = relative.rel_pos_h[i // 4 - j // 4 + 3]
            column = relative.rel_pos_w[i % 4 - j % 4 + 3]
            expected[..., i, j] += q[:, :, i] @ (row + column)
    torch.testing.assert_close(relative.scores(x), expected)
    output = (expected.softmax(-1) @ v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(relative(x), plain.proj(output))


def test_detector_loads_vitdets_names_with_their_relative_positions():
    torch.manual_seed(0)
    source, model = (detect.detector(settings(), 4).backbone.encoder for _ in range(2))
    torch.nn.init.normal_(source.blocks[0].attn.rel_pos_h)
    state = {f"backbone.net.{name}": value for name, value in source.state_dict().items()}
    del state["backbone.net.cls_token"]
    state["backbone.simfp_1.0.weight"] = torch.zeros(1)
    report = vit.load_weights(model, {"model": state})
    assert report.missing == ["cls_token"] and report.unused == ["backbone.simfp_1.0.weight"]
    assert torch.equal(model.blocks[0].attn.rel_pos_h, source.blocks[0].attn.rel_pos_h)


def test_encoders_without_relative_positions_fill_the_detectors():
    """Its tables are zero: nothing is random."""
    encoder = vit.vit_toy(img_size=32, patch_size=4)
    report = vit.load_weights(detect.detector(settings(), 4).backbone.encoder, encoder.state_dict())
    assert report.missing == [] and report.unused == ["fc_norm.weight", "fc_norm.bias"]


def test_detector_keeps_positions_in_float32_under_bfloat16():
    torch.manual_seed(0)
    model = detect.detector(settings(), 4).eval()
    model.roi_heads.score_thresh = 0.0
    seen = {}

    def remember(name):
        def hook(module, inputs, output):
            seen[name] = output
        return hook
    names = ("rpn.anchor_generator", "rpn.head", "roi_heads.box_predictor",
             "roi_heads.mask_predictor")
    for name in names:
        model.get_submodule(name).register_forward_hook(remember(name))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        output, = model([255 * torch.rand(3, 48, 41)])
    logits, deltas = seen["rpn.head"]
    tensors = [*seen["rpn.anchor_generator"], *logits, *deltas, *seen["roi_heads.box_predictor"],
               seen["roi_heads.mask_predictor"], output["boxes"]]
    assert {tensor.dtype for tensor in tensors} == {torch.float32} and len(output["boxes"])
    assert (output["boxes"] != output["boxes"].bfloat16()).any()
    assert output["masks"].shape[1:] == (1, 48, 41)


def test_detector_crops_boxes_at_the_scale_of_the_padded_square():
    """Whatever it sees first."""
    torch.manual_seed(0)
    model = detect.detector(settings(), 4).eval()
    with torch.no_grad():
        model([torch.rand(3, 16, 48)])
    for pool in (model.roi_heads.box_roi_pool, model.roi_heads.mask_roi_pool):
        assert pool.scales == [1 / 2, 1 / 4, 1 / 8]


# ------------------------------------------------------------ average precision

def scenes(seed, count=30):
    """Random sizes, true objects and detections, with crowds, ties, and missing classes.

    Ties are of scores and of overlaps. Per image: (H, W); a list of (box, label, area, crowd); a
    list of (box, label, score). Coordinates are multiples of 1/4, so both implementations compute
    overlaps without rounding.
    """
    rng = np.random.default_rng((seed, 1))
    images, truths, detections = [], [], []
    for _ in range(count):
        H, W = rng.integers(80, 200, 2).tolist()
        true, found = [], []
        for _ in range(rng.integers(0, 8)):
            side = rng.choice([10, 30, 32, 60, 96, 120], 2)
            x1, y1 = (rng.random(2) * [W - 8, H - 8] * 4).astype(int) / 4
            box = [x1, y1, min(x1 + side[0], W), min(y1 + side[1], H)]
            label = rng.integers(CLASSES - 1)
            area = float((box[2] - box[0]) * (box[3] - box[1]) * rng.choice([0.5, 0.75, 1]))
            true.append((box, label, area, rng.random() < 0.15))
            if rng.random() < 0.2:  # the same object twice
                true.append((box, label, area * 0.5, rng.random() < 0.3))
            if rng.random() < 0.2:  # one between two objects: of equal overlaps the last is hit
                pair = [[value + shift for value in (20, 30, 60, 50)] for shift in (-2, 2)]
                true += [(corners, label, 800.0, False) for corners in pair]
                found += [([20, 30, 60, 50], label, 1.0), (pair[0], label, 0.975)]
            for _ in range(rng.integers(0, 4)):
                moved = np.array(box) + rng.integers(-12, 13, 4) / 4 * rng.integers(0, 3)
                moved[:2] = np.maximum(moved[:2], 0)
                moved[2:] = np.maximum(moved[2:], moved[:2] + 1)
                moved = np.minimum(moved, [W - 1, H - 1, W, H])
                wrong = rng.random() < 0.2
                guess = rng.integers(CLASSES) if wrong else label
                found.append((moved.tolist(), guess, rng.integers(1, 21) / 20))
        images.append((H, W))
        truths.append(true)
        detections.append(found)
    return images, truths, detections


def painted(boxes, H, W):
    masks = torch.zeros(len(boxes), H, W, dtype=torch.uint8)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes):
        mask[int(y1):math.ceil(y2), int(x1):math.ceil(x2)] = 1
    return masks


def record(size, true, found):
    """What `compare` makes of lists of (box, label, area, crowd) and (box, label, score)."""
    def column(objects, k, dtype):
        return torch.tensor(np.array([entry[k] for entry in objects]), dtype=dtype)
    truth = {"boxes": column(true, 0, torch.float64).view(-1, 4),
             "labels": column(true, 1, torch.int64) + 1,
             "area": column(true, 2, torch.float64), "crowd": column(true, 3, torch.bool),
             "masks": painted([entry[0] for entry in true], *size)}
    output = {"boxes": column(found, 0, torch.float64).view(-1, 4),
              "labels": column(found, 1, torch.int64) + 1,
              "scores": column(found, 2, torch.float64),
              "masks": painted([entry[0] for entry in found], *size)}
    return detect.compare(output, truth)


@pytest.mark.parametrize("seed", range(6))
def test_average_precision_equals_pycocotools(seed):
    goldens = json.loads((ROOT / "tests" / "detection_goldens.json").read_text())
    golden = goldens["answers"][str(seed)]
    records = [record(*scene) for scene in zip(*scenes(seed))]
    for kind in ("box", "mask"):
        numbers = detect.average_precision(records, CLASSES, kind)
        actual = [numbers.get(name, -100) for name in ("AP", "AP50", "AP75", "APs", "APm", "APl")]
        np.testing.assert_allclose(actual, golden[kind], rtol=0, atol=1e-9)


def test_average_precision_of_a_small_example_by_hand():
    true = [([0, 0, 10, 10], 0, 100.0, False), ([20, 20, 30, 30], 0, 100.0, False)]
    found = [([0, 0, 10, 10], 0, 0.9), ([40, 40, 50, 50], 0, 0.8), ([20, 20, 30, 30], 0, 0.7)]
    numbers = detect.average_precision([record((60, 60), true, found)], 1, "box")
    by_hand = 100 * (51 * 1 + 50 * 2 / 3) / 101  # precision 1 up to recall 0.5, then 2 of 3
    assert list(numbers) == ["AP", "AP50", "AP75", "APs"]
    assert list(numbers.values()) == pytest.approx([by_hand] * 4)


@pytest.mark.parametrize("wrong, expected", [(99, 1), (100, 0)])  # percent: one of 100 is right
def test_only_the_best_100_detections_of_a_class_count(wrong, expected):
    true = [([0, 0, 10, 10], 0, 100.0, False)]
    found = [([0, 0, 10, 10], 0, 0.1)] + wrong * [([40, 40, 50, 50], 0, 0.8)]
    numbers = detect.average_precision([record((60, 60), true, found)], 1, "box")
    assert numbers["AP"] == pytest.approx(expected)


def test_no_detection_and_no_object_are_no_error():
    nothing = record((60, 60), [], [])
    missed = record((60, 60), [([0, 0, 10, 10], 0, 100.0, False)], [])
    assert nothing == {} and detect.average_precision([nothing], 1, "mask") == {}
    assert detect.average_precision([nothing, missed], 1, "mask")["AP"] == 0
    pasted = detect.paste_masks(torch.zeros(0, 1, 28, 28), torch.zeros(0, 4), (7, 9))
    assert pasted.shape == (0, 1, 7, 9)


# ------------------------------------------------------------ data

@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    """COCO's layout: three images a split, ids with gaps; one has a crowd, one no objects."""
    root = tmp_path_factory.mktemp("coco")
    rng = np.random.default_rng(0)
    (root / "annotations").mkdir()
    for split in ("train2017", "val2017"):
        (root / split).mkdir()
        categories = [{"id": 90, "name": "ring"}, {"id": 7, "name": "box"}]
        listing = {"categories": categories, "images": []}
        for number in (30, 4, 11):  # not in order
            name = f"{number}.jpg"
            pixels = rng.integers(0, 255, (40, 60, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / split / name)
            listing["images"].append({"id": number, "file_name": name, "height": 40, "width": 60})
        square = {"segmentation": [[10, 5, 30, 5, 30, 25, 10, 25]], "bbox": [10, 5, 20, 20],
                  "area": 400, "iscrowd": 0}
        runs = {"counts": [100, 40, 2260], "size": [40, 60]}
        crowd = {"segmentation": runs, "bbox": [2, 0, 2, 40], "area": 40, "iscrowd": 1}
        listing["annotations"] = [{"id": 1, "image_id": 4, "category_id": 90, **square},
                                  {"id": 2, "image_id": 11, "category_id": 7, **square},
                                  {"id": 3, "image_id": 11, "category_id": 7, **crowd}]
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(listing))
    return root


def test_coco_keeps_crowds_and_empty_images_for_evaluation_only(coco):
    """Ids of categories have gaps: they are numbered."""
    train, val = [detect.open_scenes(settings("--data", coco), train) for train in (True, False)]
    assert train.classes == ["box", "ring"] and len(train) == 2 and len(val) == 3
    assert [len(train[i][1]["labels"]) for i in range(2)] == [1, 1]
    assert [len(val[i][1]["labels"]) for i in range(3)] == [1, 2, 0]
    image, truth = val[1]
    assert image.shape == (3, 40, 60) and truth["labels"].tolist() == [1, 1]
    assert truth["crowd"].tolist() == [False, True]
    assert truth["boxes"].tolist() == [[10, 5, 30, 25], [2, 0, 4, 40]]
    assert truth["area"].tolist() == [400, 40]
    assert train[0][1]["labels"].tolist() == [2]
    assert val[2][1]["masks"].shape == (0, 40, 60) and val[2][1]["boxes"].shape == (0, 4)


def test_object_mask_fills_polygons_and_unrolls_crowds_column_by_column():
    square = np.zeros((8, 9), int)
    square[2:5, 1:7] = 1
    np.testing.assert_array_equal(detect.object_mask([[1, 2, 7, 2, 7, 5, 1, 5]], 8, 9), square)
    halves = [[1, 2, 3, 2, 3, 5, 1, 5], [3, 2, 7, 2, 7, 5, 3, 5]]
    np.testing.assert_array_equal(detect.object_mask(halves, 8, 9), square)
    crowd = {"counts": [1, 3, 5, 2, 1], "size": [4, 3]}
    columns = [[0, 1, 1, 1], [0, 0, 0, 0], [0, 1, 1, 0]]
    np.testing.assert_array_equal(detect.object_mask(crowd, 4, 3), np.transpose(columns))


def test_samples_have_boxes_around_what_the_crop_leaves():
    masks = torch.zeros(2, 10, 10, dtype=torch.uint8)
    masks[0, 1:4, 2:9] = 1
    masks[1, 8:, 8:] = 1
    truth = {"masks": masks, "labels": torch.tensor([3, 5])}
    samples = detect.Samples([(torch.zeros(3, 10, 10, dtype=torch.uint8), truth)], settings())

    def crop(*both):
        return [x[..., :6, :6] for x in both]
    samples.transform = crop
    image, boxes, labels, left = samples[0]
    assert boxes.tolist() == [[2, 1, 6, 4]] and labels.tolist() == [3]
    assert torch.equal(left[0], masks[0, :6, :6]) and image.shape == (3, 6, 6)


def test_batches_are_few_tensors_whatever_the_number_of_objects():
    samples = detect.Samples(detect.open_scenes(settings(), train=True), settings())
    images, counts, *objects = detect.collate([samples[v] for v in range(3)])
    assert images.shape == (3, 3, 48, 48) and len(objects) == 3
    assert [len(tensor) for tensor in objects] == [sum(counts)] * 3
    _, boxes, labels, masks = samples[1]
    for tensor, expected in zip(objects, (boxes, labels, masks)):
        assert torch.equal(tensor.split(counts)[1], expected)


def test_toy_scenes_are_the_same_each_time_and_masks_do_not_overlap():
    data = detect.open_scenes(settings("--scenes", 20), train=True)
    for i in range(20):
        image, truth = data[i]
        assert torch.equal(image, data[i][0]) and 1 <= len(truth["labels"]) <= 3
        assert truth["masks"].sum(dim=0).max() == 1
        assert set(truth["labels"].tolist()) <= {1, 2, 3, 4}
    other = detect.open_scenes(settings(), train=False)
    assert not torch.equal(other[0][0], data[0][0]) and len(other) == 150


def test_step_decay_is_vitdets():
    steps = (0, 125, 250, 2399, 2400, 2599, 2600)
    actual = [detect.step_decay(step, 2700, 250, 1.0) for step in steps]
    assert actual == pytest.approx([0.001, 0.5005, 1, 1, 0.1, 0.1, 0.01])


# ------------------------------------------------------------ files that people have

SQUARE = [[10, 5, 30, 5, 30, 25, 10, 25]]


def listed(**changes):
    """An annotation of a square; a value of `...` takes the field away."""
    whole = {"id": 7, "image_id": 1, "category_id": 3, "segmentation": SQUARE,
             "bbox": [10, 5, 20, 20], "area": 400, "iscrowd": 0, **changes}
    return {name: value for name, value in whole.items() if value is not ...}


def write_split(root, split, annotations, categories=(("ring", 3), ("box", 9)), image=(),
                pixels=None):
    """A split of one image, 40 high and 60 wide, in COCO's layout; `image` changes its entry."""
    pixels = Image.new("RGB", (60, 40), (90, 0, 0)) if pixels is None else pixels
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    (root / split).mkdir(exist_ok=True)
    pixels.save(root / split / "a.png", exif=pixels.getexif())
    entry = {"id": 1, "file_name": "a.png", "height": 40, "width": 60, **dict(image)}
    listing = {"images": [{name: value for name, value in entry.items() if value is not ...}],
               "categories": [{"id": number, "name": name} for name, number in categories],
               "annotations": annotations}
    path = root / "annotations" / f"instances_{split}.json"
    path.write_text(json.dumps(listing))
    return path


def opened(root, train=True, classes=None):
    return detect.open_scenes(settings("--data", root), train, classes)


def test_classes_are_numbered_by_their_names_in_training(tmp_path):
    write_split(tmp_path, "train2017", [listed()])
    write_split(tmp_path, "val2017", [listed(category_id=9)], [("box", 3), ("ring", 9)])
    train = opened(tmp_path)
    val = opened(tmp_path, False, train.classes)
    assert train.classes == val.classes == ["ring", "box"]
    assert train[0][1]["labels"].tolist() == val[0][1]["labels"].tolist() == [1]
    write_split(tmp_path, "val2017", [listed(category_id=2)], [("box", 2)])  # fewer classes
    assert opened(tmp_path, False, train.classes)[0][1]["labels"].tolist() == [2]
    write_split(tmp_path, "val2017", [listed()], [("boxes", 3)])
    with pytest.raises(vit.InputError, match=r"val2017.json: annotation 7, .*boxes.*'ring', 'box'"):
        opened(tmp_path, False, train.classes)


def test_categories_of_one_name_are_one_class(tmp_path):
    """As in Roboflow's files, whose category 0 is often named like the objects."""
    write_split(tmp_path, "train2017", [listed()], [("ring", 0), ("ring", 3), ("box", 9)])
    data = opened(tmp_path)
    assert data.classes == ["ring", "box"] and data[0][1]["labels"].tolist() == [1]


def turned(orientation):
    """60 wide and 40 high in the file, to be turned for display."""
    image = Image.new("RGB", (60, 40))
    image.paste((255, 255, 255), (0, 0, 30, 40))
    image.getexif()[0x0112] = orientation
    return image


def test_images_are_turned_as_exif_says_where_the_listing_has_that_size(tmp_path):
    upright = {"height": 60, "width": 40}
    write_split(tmp_path, "train2017", [listed()], image=upright, pixels=turned(6))
    image, truth = opened(tmp_path)[0]
    assert image.shape == (3, 60, 40) and truth["masks"].shape == (1, 60, 40)
    assert image[:, :30].min() == 255 and image[:, 30:].max() == 0  # left became the top
    write_split(tmp_path, "train2017", [listed()], pixels=turned(6))
    assert opened(tmp_path)[0][0].shape == (3, 40, 60)
    write_split(tmp_path, "train2017", [listed()], pixels=turned(3))  # upside down: the same size
    assert opened(tmp_path)[0][0][:, :, :30].max() == 0
    write_split(tmp_path, "train2017", [listed()], image=upright)
    with pytest.raises(vit.InputError, match=r"a.png: 40 x 60 .*, \[60, 40\] in the listing"):
        _ = opened(tmp_path)[0]


@pytest.mark.parametrize("size", [{"height": ..., "width": ...}, {"height": -1, "width": -1}])
def test_sizes_that_are_not_listed_are_not_checked(size, tmp_path):
    write_split(tmp_path, "train2017", [listed()], image=size)
    assert opened(tmp_path)[0][1]["masks"].sum() == 400


@pytest.mark.parametrize("outline", [[], None, ..., [[]], [[], []], "", {}])
def test_boxes_without_outlines_are_outlines(outline, tmp_path, capsys):
    for split in ("train2017", "val2017"):
        write_split(tmp_path, split, [listed(segmentation=outline)])
    data = opened(tmp_path)
    assert torch.equal(data[0][1]["masks"][0], torch.from_numpy(detect.object_mask(SQUARE, 40, 60)))
    assert "1 images, 1 objects of 1, 1 only boxes" in capsys.readouterr().out
    out = tmp_path / "run"
    if outline == []:
        call(detect, "--data", tmp_path, "--preset", "toy", "--batch-size", 1, "--max-steps", 1,
             "--out", out)
        assert "mask" not in json.loads((out / "detections.json").read_text())
        assert "mask AP" not in capsys.readouterr().out


def test_16_bit_images_are_refused_by_name(tmp_path):
    write_split(tmp_path, "train2017", [listed()])
    Image.fromarray(np.full((40, 60), 40000, np.uint16)).save(tmp_path / "train2017" / "a.png")
    with pytest.raises(vit.InputError, match="a.png: unreadable image .*more than 8 bits"):
        _ = opened(tmp_path)[0]
    (tmp_path / "train2017" / "a.png").write_bytes(b"not an image")
    with pytest.raises(vit.InputError, match="a.png: unreadable image"):
        _ = opened(tmp_path)[0]


def test_polygons_of_less_than_three_points_are_dropped_as_in_detectron2(tmp_path, capsys):
    line = [2, 2, 7, 2]
    write_split(tmp_path, "train2017", [
        listed(segmentation=[line, *SQUARE]), listed(id=8, segmentation=[line])])
    assert opened(tmp_path)[0][1]["masks"].sum(dim=(1, 2)).tolist() == [400]
    assert "1 objects of 2" in capsys.readouterr().out


RUNS = {"size": [40, 60], "counts": [100, 40, 2260]}
SHAPES = {"not turned": {**RUNS, "size": [60, 40]}, "too short": {**RUNS, "counts": [100, 40]},
          "below zero": {**RUNS, "counts": [100, -40, 2340]}}


@pytest.mark.parametrize("runs", SHAPES.values(), ids=list(SHAPES))
def test_run_lengths_of_another_size_are_refused(runs, tmp_path):
    write_split(tmp_path, "train2017", [listed(segmentation=runs)])
    with pytest.raises(vit.InputError, match="annotation 7, image 1: .*run lengths"):
        opened(tmp_path)


@pytest.mark.parametrize("size", [{}, {"height": -1}, {"height": ..., "width": ...}])
def test_run_lengths_may_outline_objects_that_are_no_crowds(size, tmp_path):
    write_split(tmp_path, "train2017", [listed(segmentation=RUNS)], image=size)
    truth = opened(tmp_path)[0][1]
    assert truth["masks"].sum() == 40 and truth["crowd"].tolist() == [False]


def test_run_lengths_tell_the_size_of_an_image_whose_size_is_not_listed(tmp_path):
    """Turned or not, they fit; other sizes are refused, with both."""
    none = {"height": ..., "width": ...}
    write_split(tmp_path, "train2017", [listed(segmentation=RUNS)], image=none, pixels=turned(6))
    assert opened(tmp_path)[0][0].shape == (3, 40, 60)
    upright = {**RUNS, "size": [60, 40]}
    write_split(tmp_path, "train2017", [listed(segmentation=upright)], image=none, pixels=turned(6))
    assert opened(tmp_path)[0][1]["masks"].shape == (1, 60, 40)
    write_split(tmp_path, "train2017", [listed(segmentation=upright)], image=none)
    with pytest.raises(vit.InputError, match=r"a.png: 40 x 60 .*, \[60, 40\] in the listing"):
        _ = opened(tmp_path)[0]


def test_compressed_run_lengths_are_those_of_pycocotools():
    goldens = json.loads((ROOT / "tests" / "run_length_goldens.json").read_text())["answers"]
    for golden in goldens:
        assert detect.run_lengths(golden["counts"]) == golden["runs"]
    height, width = goldens[0]["size"]
    runs = {"size": [height, width], "counts": detect.run_lengths(goldens[0]["counts"])}
    mask = detect.object_mask(runs, height, width)
    assert mask.shape == (height, width) and mask.sum() == sum(goldens[0]["runs"][1::2])


@pytest.mark.parametrize("area", [..., None])
def test_fields_that_may_be_missing(area, tmp_path):
    write_split(tmp_path, "train2017", [listed(iscrowd=..., area=area)])
    truth = opened(tmp_path)[0][1]
    assert truth["area"].tolist() == [400] and truth["crowd"].tolist() == [False]


BROKEN = {  # what is wrong with annotation 7: what the line says
    "flat": (listed(segmentation=[10, 5, 30, 5, 30, 25]), "annotation 7"),
    "odd": (listed(segmentation=[[10, 5, 30, 5, 30, 25, 9]]), "annotation 7"),
    "text": (listed(segmentation=["10", "5"]), "annotation 7"),
    "words": (listed(segmentation=[list("abcdef")]), '7, image 1: ValueError("could not convert'),
    "nan": (listed(segmentation=[[1, 5, 3, 5, 3, math.nan]]), "1: ValueError('array must not"),
    "no counts": (listed(segmentation={"size": [40, 60]}), "7, image 1: KeyError('counts')"),
    "no bbox": (listed(bbox=...), "annotation 7, image 1: KeyError('bbox')"),
    "null bbox": (listed(bbox=None), "annotation 7"),
    "short bbox": (listed(bbox=[1, 2, 3]), "annotation 7"),
    "negative bbox": (listed(bbox=[1, 2, -3, 4]), "annotation 7, image 1: ValueError('bbox"),
    "nan bbox": (listed(bbox=[1, 2, 3, math.nan]), "annotation 7, image 1: ValueError('bbox"),
    "a word": ("annotation", "instances"),
    "words as area": (listed(area="big"), "annotation 7"),
    "infinite area": (listed(area=math.inf), "annotation 7, image 1: ValueError('bbox"),
    "no category_id": (listed(category_id=...), "annotation 7, image 1: KeyError('category_id')"),
    "no image_id": (listed(image_id=...), "annotation 7, image None: KeyError('image_id')"),
    "another image": (listed(image_id=5), "annotation 7, image 5: KeyError(5)"),
    "another category": (listed(category_id=5), "annotation 7, image 1: KeyError(5)"),
    "a list as category": (listed(category_id=[3]), "annotation 7")}


@pytest.mark.parametrize("annotation, words", BROKEN.values(), ids=list(BROKEN))
def test_broken_annotations_are_named_in_one_line(annotation, words, tmp_path, capsys):
    write_split(tmp_path, "train2017", [annotation])
    line = refused(capsys, detect, "--data", tmp_path)
    assert "instances_train2017.json" in line and words in line


def test_broken_listings_are_named_in_one_line(tmp_path, capsys):
    path = write_split(tmp_path, "train2017", [listed()])
    listing = json.loads(path.read_text())
    texts = {part: json.dumps({name: listing[name] for name in listing if name != part})
             for part in ("images", "annotations", "categories")}
    texts["char"] = path.read_text()[:-9]
    texts["no objects, or only crowds"] = path.read_text().replace('"iscrowd": 0', '"iscrowd": 1')
    texts["no objects"] = json.dumps({**listing, "annotations": []})
    texts["file_name"] = path.read_text().replace("file_name", "name")
    texts["a.gif is not there"] = path.read_text().replace("a.png", "a.gif")
    texts["list"] = "[]"
    texts["another's"] = json.dumps({**listing, "images": 2 * listing["images"]})
    two = [listing["images"][0], {**listing["images"][0], "id": "2"}]
    texts["TypeError"] = json.dumps({**listing, "images": two})
    texts["JSONDecodeError"] = ""
    for words, text in texts.items():
        path.write_text(text)
        line = refused(capsys, detect, "--data", tmp_path)
        assert "instances_train2017.json" in line and words in line


def test_a_listing_in_another_encoding_is_not_printed_whole(tmp_path, capsys):
    path = write_split(tmp_path, "train2017", [listed()] * 50, [("caf\xe9", 3)])
    path.write_text(json.dumps(json.loads(path.read_text()), ensure_ascii=False), "latin-1")
    line = refused(capsys, detect, "--data", tmp_path)
    assert "UnicodeDecodeError" in line and len(line) < 600


def test_a_byte_order_mark_and_folders_in_file_names_do_no_harm(tmp_path):
    path = write_split(tmp_path, "train2017", [listed()])
    text = path.read_text()
    (tmp_path / "train2017" / "b").mkdir()
    Image.new("RGB", (60, 40)).save(tmp_path / "train2017" / "b" / "c.png")
    for name in ("train2017/a.png", "b/c.png", "b\\\\c.png"):
        path.write_text(text.replace("a.png", name), encoding="utf-8-sig")
        assert opened(tmp_path)[0][0].shape == (3, 40, 60)


def test_folders_as_roboflow_writes_them(tmp_path):
    for split, folder in (("train2017", "train"), ("val2017", "valid")):
        path = write_split(tmp_path, split, [listed()])
        (tmp_path / folder).mkdir()
        path.rename(tmp_path / folder / "_annotations.coco.json")
        (tmp_path / split / "a.png").rename(tmp_path / folder / "a.png")
    for train in (True, False):
        assert opened(tmp_path, train)[0][1]["masks"].sum() == 400


def test_thin_images_keep_a_pixel(tmp_path):
    """Scaled to 48 pixels, 1 x 500 would have no height."""
    for split in ("train2017", "val2017"):
        outline = [0, 0, 500, 0, 500, 1, 0, 1]
        write_split(tmp_path, split, [listed(segmentation=[outline], area=500)],
                    image={"height": 1, "width": 500}, pixels=Image.new("RGB", (500, 1)))
    call(detect, "--data", tmp_path, "--preset", "toy", "--batch-size", 1, "--log-every", 1,
         "--min-scale", 0, "--out", tmp_path / "run")
    assert len(log_of(tmp_path / "run")) == 2  # two epochs
    samples = detect.Samples(opened(tmp_path), settings("--min-scale", 0, "--max-scale", 2 / 3))
    assert all(samples[v][0].shape == (3, 48, 48) for v in range(30))


def test_polygons_drawn_in_their_box_are_those_of_the_whole_image():
    rng = np.random.default_rng(0)
    for _ in range(50):
        points = (rng.normal(20, 18, 12) * 100).round() / 100  # some outside of the image
        canvas = Image.new("L", (5 * 40, 5 * 30))
        detect.ImageDraw.Draw(canvas).polygon((5 * points - 0.5).tolist(), fill=1)
        mask = detect.object_mask([points.tolist()], 30, 40)
        np.testing.assert_array_equal(mask, np.array(canvas)[2::5, 2::5])


def test_the_listing_is_one_array_that_workers_share(coco):
    data = opened(coco, train=False)
    assert {type(value) for value in vars(data).values()} == {bytes, np.ndarray, list}
    assert len(data.offsets) == 4 and data.offsets[-1] == len(data.text)
    assert data.classes == ["box", "ring"] and data.kinds == ["box", "mask"]


# ------------------------------------------------------------ the detector is not half a pixel off

def test_mask_targets_and_pasted_masks_fit_to_half_a_pixel():
    """The best that masks of 28 x 28 can do: with torchvision's two functions under 90."""
    scenes = detect.ToyScenes(settings("--img-size", 160), train=True)
    records = []
    for image, truth in [scenes[i] for i in range(10)]:
        boxes = truth["boxes"].float()
        targets = detect.mask_targets(truth["masks"], boxes, torch.arange(len(boxes)), 28)
        pasted = detect.paste_masks(targets[:, None], boxes, (160, 160))
        assert pasted.shape == (len(boxes), 1, 160, 160)
        assert set(targets.unique().tolist()) <= {0, 1}
        output = {"boxes": boxes, "labels": truth["labels"], "scores": torch.ones(len(boxes)),
                  "masks": pasted[:, 0] >= 0.5}
        records.append(detect.compare(output, truth))
    assert detect.average_precision(records, 4, "mask")["AP"] > 95


def test_detector_uses_these_masks():
    torch.manual_seed(0)
    model = detect.detector(settings(), 4).eval()
    model.roi_heads.score_thresh = 0.0
    seen = []
    model.roi_heads.mask_predictor.register_forward_hook(lambda *call: seen.append(call[2]))
    with torch.no_grad():
        output, = model([255 * torch.rand(3, 48, 48)])
    masks = seen[0].sigmoid()[torch.arange(len(output["labels"])), output["labels"]]
    torch.testing.assert_close(
        output["masks"], detect.paste_masks(masks[:, None], output["boxes"], (48, 48)))


def test_pasted_masks_are_sampled_bilinearly_at_pixel_centers():
    masks, boxes = torch.rand(2, 1, 28, 28), torch.tensor([[3.2, 4.1, 20.7, 30.9], [-2, 1, 5, 9]])
    pasted = detect.paste_masks(masks, boxes, (40, 33))
    for mask, actual, (x1, y1, x2, y2) in zip(masks, pasted, boxes):
        y = (torch.arange(40) + 0.5 - y1) / (y2 - y1) * 2 - 1
        x = (torch.arange(33) + 0.5 - x1) / (x2 - x1) * 2 - 1
        grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)
        expected = torch.nn.functional.grid_sample(mask[None], grid[None], align_corners=False)
        torch.testing.assert_close(actual, expected[0])


def test_box_features_are_read_at_the_centers_of_cells():
    """Cell i of stride 4 has its center at 4 (i + 1/2): a map of these numbers gives positions."""
    pool = detect.detector(settings(), 4).roi_heads.box_roi_pool
    maps = {k: stride * (torch.arange(48 // stride) + 0.5).expand(1, 1, 48 // stride, -1)
            for k, stride in enumerate((2, 4, 8))}
    for x1, x2 in ((8.0, 30.0), (11.3, 36.1)):
        features = pool(maps, [torch.tensor([[x1, 9.0, x2, 33.0]])], [(48, 48)])
        expected = x1 + (torch.arange(7) + 0.5) * (x2 - x1) / 7
        torch.testing.assert_close(features[0, 0, 3], expected)


def test_anchors_are_not_rounded():
    model = detect.detector(settings(), 4)
    assert model.backbone.strides == [2, 4, 8, 16]
    anchors = model.rpn.anchor_generator.cell_anchors
    root = 2 ** 0.5
    expected = torch.tensor([[-8 * root, -4 * root, 8 * root, 4 * root], [-8, -8, 8, 8],
                             [-4 * root, -8 * root, 4 * root, 8 * root]])
    torch.testing.assert_close(anchors[0], expected)
    torch.testing.assert_close(anchors[1], 2 * expected)


def test_relative_attention_has_queries_of_a_multiple_of_eight():
    """Fast attention on a GPU refuses 16 + 2 x 14 = 44."""
    q, k, v = detect.RelativeAttention(48, 3, side=14).heads(torch.randn(2, 196, 48))
    assert q.shape == k.shape == (2, 3, 196, 48) and v.shape == (2, 3, 196, 16)


# ------------------------------------------------------------ runs

@pytest.fixture(scope="module")
def toy_run(tmp_path_factory):
    """Four steps without a stop."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("runs") / "toy"
    call(detect, *SHORT, "--out", folder)
    return folder


def test_detect_trains_evaluates_and_draws(toy_run):
    log = log_of(toy_run)
    assert [entry["step"] for entry in log] == [1, 2, 3, 4] and log[0]["lr"] < log[-1]["lr"]
    parts = ("loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg", "loss_mask")
    assert log[0]["loss"] == pytest.approx(sum(log[0][part] for part in parts), rel=1e-4)
    results = json.loads((toy_run / "detections.json").read_text())
    assert results["images"] == 3
    assert list(results["box"]) == list(results["mask"]) == ["AP", "AP50", "AP75", "APs"]
    with Image.open(toy_run / "detections.png") as figure:
        assert figure.height > 400 and len(figure.convert("L").getcolors()) > 50


def test_biases_norms_and_position_are_not_decayed(toy_run):
    checkpoint = torch.load(toy_run / "last.pt", weights_only=True)
    decayed, others = checkpoint["optimizer"]["param_groups"]
    dims = [value.ndim for value in checkpoint["model"].values()]
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.05, 0)
    assert len(decayed["params"]) == sum(ndim in (2, 4) for ndim in dims)
    assert len(others["params"]) == sum(ndim in (1, 3) for ndim in dims)


def test_evaluation_puts_the_images_of_all_ranks_in_order(tmp_path, monkeypatch):
    """They are dealt in turn. Rank 0 of two sees images 0, 2, 4."""
    def gather(ranks, records):
        assert records == [0, 2, 4]
        ranks[:] = [records, [1, 3]]
    seen = []
    monkeypatch.setattr(detect, "WORLD", 2)
    monkeypatch.setattr(detect.dist, "all_gather_object", gather)
    monkeypatch.setattr(detect, "compare", lambda output, truth: truth["number"])
    monkeypatch.setattr(detect, "draw_detections", lambda *call: None)
    monkeypatch.setattr(detect, "average_precision", lambda *call: seen.append(call) or {"AP": 1.0})
    image = torch.zeros(3, 8, 8)
    data = ListOfScenes((image, {"number": i, "masks": image}) for i in range(5))
    detect.evaluate(NoDetections(), data, torch.device("cpu"), tmp_path / "a.json")
    assert seen == [([0, 1, 2, 3, 4], 1, "box")]
    assert json.loads((tmp_path / "a.json").read_text()) == {"images": 5, "box": {"AP": 1.0}}


class ListOfScenes(list):
    classes = ["ring"]
    kinds = ["box"]


class NoDetections(torch.nn.Module):
    def forward(self, images):
        return [{"masks": torch.zeros(0, 1, 8, 8), "scores": torch.zeros(0)}]


def test_masks_without_an_outline_are_drawn_without_a_warning(tmp_path):
    masks = torch.stack([torch.zeros(9, 9), torch.ones(9, 9), torch.eye(9)]).bool()
    image = torch.zeros(3, 9, 9, dtype=torch.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        detect.draw_detections(tmp_path / "a.png", [(image, masks, masks[:0])], "a title")
    assert (tmp_path / "a.png").exists()


@pytest.mark.slow
def test_detect_resumed_equals_uninterrupted(toy_run, tmp_path):
    call(detect, *SHORT, "--max-steps", 2, "--out", tmp_path / "run")
    call(detect, *SHORT, "--max-steps", 2, "--out", tmp_path / "run", "--resume", "--workers", 1)
    same_state(toy_run, tmp_path / "run")
    assert [e["loss"] for e in log_of(toy_run)] == [e["loss"] for e in log_of(tmp_path / "run")]


def test_detect_on_cocos_folder_and_its_checkpoint_evaluated_again(coco, tmp_path, toy_run, capsys):
    out = tmp_path / "run"
    call(detect, "--data", coco, "--preset", "toy", *SHORT, "--max-steps", 2, "--workers", 1,
         "--out", out, "--init", toy_run / "last.pt")
    assert f"--init {toy_run / 'last.pt'}: randomly initialized: nothing" in capsys.readouterr().out
    results = json.loads((out / "detections.json").read_text())
    assert results["images"] == 3 and list(results["box"]) == ["AP", "AP50", "AP75", "APs"]
    call(detect, "--data", coco, "--preset", "toy", "--eval-only", "--init", out / "last.pt")
    assert json.loads((out / "evaluation.json").read_text()) == results
    assert (out / "evaluation.png").exists()


def test_detect_refuses_bad_input_in_one_line(coco, tmp_path, capsys, toy_run):
    assert "instances_train2017.json" in refused(capsys, detect, "--data", tmp_path)
    toy_classes = "--preset", "toy", "--eval-only", "--init", toy_run / "last.pt"
    assert "ring" in refused(capsys, detect, "--data", coco, *toy_classes)
    torch.save(vit.vit_toy(img_size=32, patch_size=4).state_dict(), tmp_path / "vit.pt")
    line = refused(capsys, detect, "--eval-only", "--init", tmp_path / "vit.pt")
    assert "vit.pt: not a detector" in line
    assert "last.pt" in refused(capsys, detect, "--eval-only", "--out", tmp_path)
    line = refused(capsys, detect, "--patch-size", 14, "--img-size", 224)
    assert "--patch-size: invalid choice: 14" in line  # torchvision rounds strides
    assert "--img-size: not a mul" in refused(capsys, detect, "--patch-size", 16, "--img-size", 240)
    path = coco / "annotations" / "instances_train2017.json"
    text = path.read_text()
    try:
        path.write_text(text.replace('"category_id": 90', '"category_id": 91'))
        line = refused(capsys, detect, "--data", coco, "--preset", "toy")
        assert "annotation 1, image 4: KeyError(91)" in line
        path.write_text(text.replace("30.jpg", "31.jpg"))
        assert "31.jpg is not there" in refused(capsys, detect, "--data", coco, "--preset", "toy")
    finally:
        path.write_text(text)


def test_eval_only_uses_the_class_names_of_the_checkpoint(coco, tmp_path, capsys):
    """Swapped ids in the validation file change nothing."""
    words = ("--data", coco, "--preset", "toy", "--batch-size", 2)
    call(detect, *words, "--max-steps", 1, "--out", tmp_path / "run")
    checkpoint = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    assert checkpoint["config"]["classes"] == ["box", "ring"]
    path = coco / "annotations" / "instances_val2017.json"
    text = path.read_text()
    evaluation = tmp_path / "run" / "evaluation.json"
    line = refused(capsys, detect, "--preset", "toy", "--eval-only", "--out", tmp_path / "run")
    assert "--data toy" in line and "['box', 'ring']" in line
    try:
        path.write_text(text.replace(": 90", ": 1"))  # ring comes first now
        call(detect, *words, "--eval-only", "--init", tmp_path / "run" / "last.pt")
    finally:
        path.write_text(text)
    assert evaluation.read_text() == (tmp_path / "run" / "detections.json").read_text()


def test_sizes_that_are_typed_change_the_detector():
    args = settings("--channels", 16, "--features", 24, "--proposals", 7, "--pretrain-size", 16)
    model = detect.detector(args, 4)
    assert model.backbone.out_channels == 16
    assert model.roi_heads.box_predictor.cls_score.in_features == 24
    assert model.rpn.post_nms_top_n() == 7 and model.rpn.pre_nms_top_n() == 14
    assert model.backbone.encoder.pos_embed.shape == (1, 17, 96)
    args = settings("--preset", "photos")
    assert (args.channels, args.features, args.boxes) == (256, 1024, 512)


def test_help_shows_no_option_that_is_refused(capsys):
    with pytest.raises(SystemExit):
        detect.parse_detection(["--help"])
    text = capsys.readouterr().out
    for option in ("--download", "--fraction", "--long-tail", "--root"):
        assert option not in text


@pytest.mark.slow
@pytest.mark.skipif(not os.path.isdir("/proc"), reason="needs /proc")
def test_workers_end_when_their_parent_is_killed(tmp_path):
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "detect.py"), "--workers", "4", "--log-every", "1",
         "--out", str(tmp_path)], stdout=subprocess.PIPE, text=True)
    while "step 2 " not in process.stdout.readline():
        pass
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True)
    workers = children.stdout.split()
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(workers) >= 4
    for _ in range(40):
        alive = [worker for worker in workers if os.path.isdir(f"/proc/{worker}")]
        if not alive:
            return
        time.sleep(0.5)
    pytest.fail(f"{len(alive)} workers live on")


def test_objects_that_are_all_dropped_are_refused_before_training(tmp_path, capsys):
    write_split(tmp_path, "train2017", [listed()])
    write_split(tmp_path, "val2017", [listed(segmentation=[[1, 1, 9, 9]])])
    words = "--preset", "toy", "--batch-size", 1, "--out", tmp_path / "run"
    line = refused(capsys, detect, "--data", tmp_path, *words)
    assert "lists no objects, or only crowds" in line
    assert not (tmp_path / "run").exists()


def test_detect_evaluates_scenes_of_the_checkpoints_size(toy_run, tmp_path):
    """Whatever sizes, heads and micro-batches are typed, those of training are used."""
    checkpoint = torch.load(toy_run / "last.pt", weights_only=True)
    call(detect, *SHORT, "--eval-only", "--init", toy_run / "last.pt", "--img-size", 96,
         "--num-heads", 6, "--accum", 3)
    assert checkpoint["config"]["img_size"] != 96
    evaluation = json.loads((toy_run / "evaluation.json").read_text())
    assert evaluation == json.loads((toy_run / "detections.json").read_text())


@pytest.mark.slow
def test_detect_two_ranks_stay_in_step_and_see_each_validation_image_once(tmp_path):
    script = tmp_path / "spy.py"
    script.write_text(f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import torch, detect
evaluate = detect.evaluate
def spy(model, *rest):
    torch.save(model.state_dict(), f"{tmp_path}/rank{{detect.RANK}}.pt")
    evaluate(model, *rest)
detect.evaluate = spy
detect.main()
""")
    run(script, *SHORT, "--max-steps", 3, "--accum", 1, "--out", tmp_path / "run", ranks=2)
    states = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert json.loads((tmp_path / "run" / "detections.json").read_text())["images"] == 3
    assert log_of(tmp_path / "run")[-1]["step"] == 3
