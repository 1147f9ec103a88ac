"""detect.py: the backbone against detectron2's numbers, AP against pycocotools', COCO's format, short runs."""
import argparse
import json
import math

import numpy as np
import pytest
import torch
from conftest import GOLDENS, ROOT, SIZES, agrees, call, fill, images, log_of, refused, run, same_state
from PIL import Image

import detect
import vit

SHORT = ("--batch-size", 2, "--max-steps", 4, "--log-every", 1, "--scenes", 12, "--val-scenes", 3)
CLASSES = 5


def settings(*arguments):
    table = {**detect.TRAINING, **detect.SETTINGS}
    return detect.parse([str(argument) for argument in arguments], table, out="unused")


# ------------------------------------------------------------ the backbone

def vitdet_name(name):
    """A parameter's name in detectron2."""
    if name.startswith("encoder."):
        return name.removeprefix("encoder.")
    _, level, place, leaf = name.split(".")
    first = (4, 1, 0, 1)[int(level)]    # layers that resize the map
    place = int(place) - first
    if place < 0:
        return f"simfp_{int(level) + 1}.{place + first}.{leaf}"
    return f"simfp_{int(level) + 1}.{first + place // 2}{'.norm' * (place % 2)}.{leaf}"


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("window", [2, 4])
def test_pyramid_maps_are_those_of_vitdet(window, relative):
    encoder = vit.VisionTransformer(**SIZES)
    pyramid = detect.SimplePyramid(encoder, 48, window, 16)
    pyramid.global_blocks = [2]    # of the golden network's three
    for block in encoder.blocks[:2]:
        block.attn = detect.RelativeAttention(48, 6, window)
    fill(pyramid, rename=vitdet_name)
    for name, table in pyramid.named_parameters():
        if not relative and ".rel_pos_" in name:
            table.data.zero_()    # as at first
    golden = GOLDENS["13_pyramid"][f"window_{window}"][f"rel_pos_{relative}"]
    agrees(pyramid.encode(images(2, 48)), golden["last_feat"])
    for k, feature_map in pyramid(images(2, 48)).items():
        agrees(feature_map, golden[f"p{k + 1}"])
    assert pyramid.strides == [2, 4, 8, 16, 32]


def test_pyramid_attends_globally_at_the_end_of_each_quarter():
    encoder = vit.vit_tiny()
    pyramid = detect.SimplePyramid(encoder, 640)
    assert pyramid.global_blocks == [2, 5, 8, 11]
    assert [block.attn.side for block in encoder.blocks] == [14, 14, 40] * 4
    assert encoder.pos_embed.requires_grad and encoder.pos_embed.shape == (1, 197, 192)
    assert not encoder.cls_token.requires_grad


@pytest.mark.parametrize("H, W", [(6, 6), (5, 7), (3, 3)])
def test_windows_are_neighborhoods_and_come_back(H, W):
    x = torch.randn(2, H, W, 5)
    windows = detect.to_windows(x, 3)
    assert windows.shape == (2 * math.ceil(H / 3) * math.ceil(W / 3), 9, 5)
    assert torch.equal(windows[0].view(3, 3, 5), x[0, :3, :3])
    assert windows.count_nonzero() == x.count_nonzero()    # padded with zeros
    assert torch.equal(detect.from_windows(windows, 3, H, W), x)


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
            rows, columns = i // 4 - j // 4, i % 4 - j % 4
            expected[..., i, j] += q[:, :, i] @ (relative.rel_pos_h[rows + 3] + relative.rel_pos_w[columns + 3])
    torch.testing.assert_close(relative.scores(x), expected)
    torch.testing.assert_close(relative(x), plain.proj((expected.softmax(-1) @ v).transpose(1, 2).flatten(2)))


def test_detector_loads_vitdets_names_with_their_relative_positions():
    torch.manual_seed(0)
    source, model = (detect.detector(settings(), 4).backbone.encoder for _ in range(2))
    torch.nn.init.normal_(source.blocks[0].attn.rel_pos_h)
    state = {f"backbone.net.{name}": value for name, value in source.state_dict().items() if name != "cls_token"}
    report = vit.load_weights(model, {"model": {**state, "backbone.simfp_1.0.weight": torch.zeros(1)}})
    assert report.missing == ["cls_token"] and report.unused == ["backbone.simfp_1.0.weight"]
    assert torch.equal(model.blocks[0].attn.rel_pos_h, source.blocks[0].attn.rel_pos_h)


def test_detector_keeps_positions_in_float32_under_bfloat16():
    torch.manual_seed(0)
    model, seen = detect.detector(settings(), 4).eval(), {}
    model.roi_heads.score_thresh = 0.0
    for name in ("rpn.anchor_generator", "rpn.head", "roi_heads.box_predictor", "roi_heads.mask_predictor"):
        part = model.get_submodule(name)
        part.register_forward_hook(lambda module, inputs, output, name=name: seen.update({name: output}))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        output, = model([255 * torch.rand(3, 48, 41)])
    logits, deltas = seen["rpn.head"]
    tensors = [*seen["rpn.anchor_generator"], *logits, *deltas, *seen["roi_heads.box_predictor"],
               seen["roi_heads.mask_predictor"], output["boxes"]]
    assert {tensor.dtype for tensor in tensors} == {torch.float32} and len(output["boxes"])
    assert (output["boxes"] != output["boxes"].bfloat16()).any() and output["masks"].shape[1:] == (1, 48, 41)


def test_detector_crops_boxes_at_the_scale_of_the_padded_square_whatever_it_sees_first():
    torch.manual_seed(0)
    model = detect.detector(settings(), 4).eval()
    with torch.no_grad():
        model([torch.rand(3, 16, 48)])
    assert model.roi_heads.box_roi_pool.scales == model.roi_heads.mask_roi_pool.scales == [1 / 2, 1 / 4, 1 / 8]


# ------------------------------------------------------------ average precision

def scenes(seed, count=30):
    """Random sizes, true objects and detections, with crowds, ties of scores and of overlaps, and missing classes.

    Per image: (H, W); a list of (box, label, area, crowd); a list of (box, label, score). Coordinates are
    multiples of 1/4, so both implementations compute overlaps without rounding.
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
            if rng.random() < 0.2:    # the same object twice
                true.append((box, label, area * 0.5, rng.random() < 0.3))
            if rng.random() < 0.2:    # one detection between two objects: of equal overlaps the last is hit
                pair = [[value + shift for value in (20, 30, 60, 50)] for shift in (-2, 2)]
                true += [(corners, label, 800.0, False) for corners in pair]
                found += [([20, 30, 60, 50], label, 1.0), (pair[0], label, 0.975)]
            for _ in range(rng.integers(0, 4)):
                moved = np.array(box) + rng.integers(-12, 13, 4) / 4 * rng.integers(0, 3)
                moved[:2], moved[2:] = np.maximum(moved[:2], 0), np.maximum(moved[2:], moved[:2].clip(0) + 1)
                moved = np.minimum(moved, [W - 1, H - 1, W, H])
                wrong = rng.random() < 0.2
                found.append((moved.tolist(), rng.integers(CLASSES) if wrong else label, rng.integers(1, 21) / 20))
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
    truth = {"boxes": column(true, 0, torch.float64).view(-1, 4), "labels": column(true, 1, torch.int64) + 1,
             "area": column(true, 2, torch.float64), "crowd": column(true, 3, torch.bool),
             "masks": painted([entry[0] for entry in true], *size)}
    output = {"boxes": column(found, 0, torch.float64).view(-1, 4), "labels": column(found, 1, torch.int64) + 1,
              "scores": column(found, 2, torch.float64), "masks": painted([entry[0] for entry in found], *size)}
    return detect.compare(output, truth)


@pytest.mark.parametrize("seed", range(6))
def test_average_precision_equals_pycocotools(seed):
    golden = json.loads((ROOT / "tests" / "detection_goldens.json").read_text())["answers"][str(seed)]
    records = [record(*scene) for scene in zip(*scenes(seed))]
    for kind in ("box", "mask"):
        numbers = detect.average_precision(records, CLASSES, kind)
        actual = [numbers.get(name, -100) for name in ("AP", "AP50", "AP75", "APs", "APm", "APl")]
        np.testing.assert_allclose(actual, golden[kind], rtol=0, atol=1e-9)


def test_average_precision_of_a_small_example_by_hand():
    true = [([0, 0, 10, 10], 0, 100.0, False), ([20, 20, 30, 30], 0, 100.0, False)]
    found = [([0, 0, 10, 10], 0, 0.9), ([40, 40, 50, 50], 0, 0.8), ([20, 20, 30, 30], 0, 0.7)]
    numbers = detect.average_precision([record((60, 60), true, found)], 1, "box")
    by_hand = 100 * (51 * 1 + 50 * 2 / 3) / 101    # precision 1 up to recall 0.5, then 2 of 3
    assert numbers == pytest.approx({"AP": by_hand, "AP50": by_hand, "AP75": by_hand, "APs": by_hand})


# ------------------------------------------------------------ data

@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    """COCO's layout: three images a split, ids with gaps; the third one is empty, the second has a crowd."""
    root, rng = tmp_path_factory.mktemp("coco"), np.random.default_rng(0)
    (root / "annotations").mkdir()
    for split in ("train2017", "val2017"):
        (root / split).mkdir()
        listing = {"categories": [{"id": 90, "name": "ring"}, {"id": 7, "name": "box"}], "images": []}
        for number in (30, 4, 11):    # not in order
            Image.fromarray(rng.integers(0, 255, (40, 60, 3), dtype=np.uint8)).save(root / split / f"{number}.jpg")
            listing["images"].append({"id": number, "file_name": f"{number}.jpg", "height": 40, "width": 60})
        square = {"segmentation": [[10, 5, 30, 5, 30, 25, 10, 25]], "bbox": [10, 5, 20, 20], "area": 400, "iscrowd": 0}
        runs = {"counts": [100, 40, 2260], "size": [40, 60]}
        crowd = {"segmentation": runs, "bbox": [2, 0, 2, 40], "area": 40, "iscrowd": 1}
        listing["annotations"] = [{"id": 1, "image_id": 4, "category_id": 90, **square},
                                  {"id": 2, "image_id": 11, "category_id": 7, **square},
                                  {"id": 3, "image_id": 11, "category_id": 7, **crowd}]
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(listing))
    return root


def test_coco_numbers_ids_with_gaps_and_keeps_crowds_and_empty_images_for_evaluation(coco):
    train, val = (detect.open_scenes(argparse.Namespace(data=str(coco)), train) for train in (True, False))
    assert train.classes == ["box", "ring"] and len(train) == 2 and len(val) == 3
    assert [len(data[i][1]["labels"]) for data in (train, val) for i in range(len(data))] == [1, 1, 1, 2, 0]
    image, truth = val[1]
    assert image.shape == (3, 40, 60) and truth["labels"].tolist() == [1, 1]
    assert truth["crowd"].tolist() == [False, True]
    assert truth["boxes"].tolist() == [[10, 5, 30, 25], [2, 0, 4, 40]] and truth["area"].tolist() == [400, 40]
    assert train[0][1]["labels"].tolist() == [2]
    assert val[2][1]["masks"].shape == (0, 40, 60) and val[2][1]["boxes"].shape == (0, 4)


def test_object_mask_fills_polygons_and_unrolls_crowds_column_by_column():
    square = np.zeros((8, 9), int)
    square[2:5, 1:7] = 1
    np.testing.assert_array_equal(detect.object_mask([[1, 2, 7, 2, 7, 5, 1, 5]], 8, 9), square)
    halves = [[1, 2, 3, 2, 3, 5, 1, 5], [3, 2, 7, 2, 7, 5, 3, 5]]
    np.testing.assert_array_equal(detect.object_mask(halves, 8, 9), square)
    crowd = {"counts": [1, 3, 5, 2, 1], "size": [4, 3]}
    np.testing.assert_array_equal(detect.object_mask(crowd, 4, 3), [[0, 0, 0], [1, 0, 1], [1, 0, 1], [1, 0, 0]])


def test_make_sample_cuts_boxes_around_what_the_crop_leaves():
    masks = torch.zeros(2, 10, 10, dtype=torch.uint8)
    masks[0, 1:4, 2:9] = 1
    masks[1, 8:, 8:] = 1
    data = [(torch.zeros(3, 10, 10, dtype=torch.uint8), {"masks": masks, "labels": torch.tensor([3, 5])})]
    image, truth = detect.make_sample(data, lambda *both: [x[..., :6, :6] for x in both], 0)
    assert truth["boxes"].tolist() == [[2, 1, 6, 4]] and truth["labels"].tolist() == [3]
    assert torch.equal(truth["masks"][0], masks[0, :6, :6]) and image.shape == (3, 6, 6)


def test_toy_scenes_are_the_same_each_time_and_masks_do_not_overlap():
    data = detect.open_scenes(settings("--scenes", 20), train=True)
    for i in range(20):
        image, truth = data[i]
        assert torch.equal(image, data[i][0]) and 1 <= len(truth["labels"]) <= 3
        assert truth["masks"].sum(dim=0).max() == 1 and set(truth["labels"].tolist()) <= {1, 2, 3, 4}
    other = detect.open_scenes(settings(), train=False)
    assert not torch.equal(other[0][0], data[0][0]) and len(other) == 150


def test_step_decay_is_vitdets():
    actual = [detect.step_decay(step, 2700, 250, 1.0) for step in (0, 125, 250, 2399, 2400, 2599, 2600)]
    assert actual == pytest.approx([0.001, 0.5005, 1, 1, 0.1, 0.1, 0.01])


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
    assert results["images"] == 3 and list(results["box"]) == list(results["mask"]) == ["AP", "AP50", "AP75", "APs"]
    with Image.open(toy_run / "detections.png") as figure:
        assert figure.height > 400 and len(figure.convert("L").getcolors()) > 50


def test_detect_resumed_equals_uninterrupted(toy_run, tmp_path):
    call(detect, *SHORT, "--max-steps", 2, "--out", tmp_path / "run")
    call(detect, *SHORT, "--max-steps", 2, "--out", tmp_path / "run", "--resume", "--workers", 1)
    same_state(toy_run, tmp_path / "run")
    assert [e["loss"] for e in log_of(toy_run)] == [e["loss"] for e in log_of(tmp_path / "run")]


def test_detect_on_cocos_folder_and_its_checkpoint_evaluated_again(coco, tmp_path, toy_run, capsys):
    out = tmp_path / "run"
    call(detect, "--data", coco, "--preset", "toy", *SHORT, "--max-steps", 2, "--workers", 1, "--out", out,
         "--init", toy_run / "last.pt")
    assert f"--init {toy_run / 'last.pt'}: randomly initialized: nothing" in capsys.readouterr().out
    results = json.loads((out / "detections.json").read_text())
    assert results["images"] == 3 and list(results["box"]) == ["AP", "AP50", "AP75", "APs"]
    call(detect, "--data", coco, "--preset", "toy", "--eval-only", "--init", out / "last.pt")
    assert json.loads((out / "evaluation.json").read_text()) == results and (out / "evaluation.png").exists()


def test_detect_refuses_bad_input_in_one_line(coco, tmp_path, capsys, toy_run):
    assert "instances_train2017.json" in refused(capsys, detect, "--data", tmp_path)
    assert "no detector of 2 classes" in refused(
        capsys, detect, "--data", coco, "--preset", "toy", "--eval-only", "--init", toy_run / "last.pt")
    torch.save(vit.vit_toy(img_size=32, patch_size=4).state_dict(), tmp_path / "vit.pt")
    assert "no detector of 4 classes" in refused(capsys, detect, "--eval-only", "--init", tmp_path / "vit.pt")
    assert "--patch-size 5" in refused(capsys, detect, "--patch-size", 5)
    assert "not a power of 2" in refused(capsys, detect, "--patch-size", 14, "--img-size", 224)    # torchvision rounds strides
    assert "half of --img-size" in refused(capsys, detect, "--patch-size", 16, "--img-size", 240)
    path = coco / "annotations" / "instances_train2017.json"
    text = path.read_text()
    try:
        path.write_text(text.replace('"category_id": 90', '"category_id": 91'))
        assert "category 91" in refused(capsys, detect, "--data", coco, "--preset", "toy")
        path.write_text(text.replace("30.jpg", "31.jpg"))
        assert "31.jpg: not there" in refused(capsys, detect, "--data", coco, "--preset", "toy")
    finally:
        path.write_text(text)
    (tmp_path / "cut.jpg").write_bytes(b"not an image")
    data = detect.Coco(coco, "val2017", train=False)
    data.samples[0] = (str(tmp_path / "cut.jpg"), "[]")
    with pytest.raises(detect.UserError, match="cut.jpg: unreadable image"):
        data[0]


def test_detect_evaluates_scenes_of_the_checkpoints_size(toy_run, tmp_path):
    """Whatever sizes and heads are typed, those of training are used."""
    checkpoint = torch.load(toy_run / "last.pt", weights_only=True)
    call(detect, *SHORT, "--eval-only", "--init", toy_run / "last.pt", "--img-size", 96, "--num-heads", 6)
    assert checkpoint["config"]["img_size"] != 96
    assert json.loads((toy_run / "evaluation.json").read_text()) == json.loads((toy_run / "detections.json").read_text())


def test_detect_two_ranks_stay_in_step_and_see_each_validation_image_once(tmp_path):
    script = tmp_path / "spy.py"
    script.write_text(f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import torch, detect
evaluate = detect.evaluate
def spy(args, model, *rest):
    torch.save(model.state_dict(), f"{tmp_path}/rank{{detect.RANK}}.pt")
    evaluate(args, model, *rest)
detect.evaluate = spy
detect.run(detect.main)
""")
    run(script, *SHORT, "--max-steps", 3, "--accum", 1, "--out", tmp_path / "run", ranks=2)
    states = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert json.loads((tmp_path / "run" / "detections.json").read_text())["images"] == 3
    assert log_of(tmp_path / "run")[-1]["step"] == 3
