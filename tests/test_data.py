"""Data and batches, which stand alike in every script: tested here through mae.py's copy."""
import argparse
import ast
import math
import random

import numpy as np
import pytest
import torch
from conftest import ROOT, function_source
from torchvision.transforms import v2

import mae
import vit

SCRIPTS = [name for name in ("mocov3.py", "distill.py", "finetune.py", "analysis.py") if (ROOT / name).exists()]


def arguments(**kw):
    return argparse.Namespace(**{**dict(data="toy", root="data", download=False, fraction=1.0, long_tail=False, img_size=32,
                                        min_crop=0.08, seed=0, workers=0, mean=[0.5] * 3, std=[0.25] * 3), **kw})


def shared_names():
    """The functions, classes and constants of mae.py under the headings "(the same in every script)", and `run`."""
    text = (ROOT / "mae.py").read_text()
    lines = text.splitlines()
    first = next(i for i, line in enumerate(lines) if "the same in every script" in line)
    last = next(i for i, line in enumerate(lines) if "--- pre-training" in line)
    inside = [node for node in ast.parse(text).body if first < node.lineno <= last]
    return [node.name for node in inside if isinstance(node, (ast.FunctionDef, ast.ClassDef))] + ["run"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_shared_functions_are_the_same_to_the_letter(script):
    text, twins = (ROOT / script).read_text(), 0
    for name in shared_names():
        if f"\ndef {name}(" in text or f"\nclass {name}(" in text:
            assert function_source(script, name) == function_source("mae.py", name), f"{name} differs"
            twins += 1
    assert twins >= 10
    module = __import__(script.removesuffix(".py"))
    assert not hasattr(module, "NAMED") or module.NAMED == mae.NAMED


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_share_only_vit(script):
    own = {"mae", "mocov3", "distill", "finetune", "analysis"}
    imports = {line.split()[1] for line in (ROOT / script).read_text().splitlines() if line.startswith(("import ", "from "))}
    assert "vit" in imports and not imports & own


# ------------------------------------------------------------------------------------------------ folders

def test_folders_give_files_labels_and_classes(image_folder):
    data = mae.open_data(arguments(data=str(image_folder)), train=True)
    assert len(data) == 36 and data.pixels is None and data.classes == ["bird", "boat", "bus"]
    assert np.bincount(data.labels).tolist() == [12, 12, 12]
    assert len(mae.open_data(arguments(data=str(image_folder)), train=False)) == 18


def test_small_images_are_held_in_memory(small_folder):
    data = mae.open_data(arguments(data=str(small_folder)), train=True)
    expected, _ = vit.toy_shapes(36, 32, seed=3)
    assert data.files is None and data.pixels.dtype == torch.uint8
    assert torch.equal(data.pixels, expected[list(range(0, 24, 2)) + list(range(1, 24, 2))])  # sorted by class


def test_a_folder_without_classes_or_splits_will_do(image_folder):
    data = mae.open_data(arguments(data=str(image_folder / "train" / "bird")), train=True)
    assert len(data) == 12 and data.labels is None
    assert mae.open_data(arguments(data=str(image_folder / "train" / "bird")), train=False) is None


def test_numeric_class_folders_sort_as_numbers(tmp_path):
    from PIL import Image
    for kind in ("10", "2", "0"):
        (tmp_path / "val" / kind).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "val" / kind / "a.png")
    assert mae.open_data(arguments(data=str(tmp_path)), train=False).classes == ["0", "2", "10"]


def test_cifar_is_read_by_torchvision(tmp_path, monkeypatch):
    import hashlib
    import pickle
    import torchvision
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    kind = torchvision.datasets.CIFAR10
    for name, count in [(f"data_batch_{i}", 2) for i in range(1, 6)] + [("test_batch", 3)]:
        (folder / name).write_bytes(pickle.dumps({"data": np.full((count, 3072), 7, np.uint8), "labels": [1] * count}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    digest = lambda name: hashlib.md5((folder / name).read_bytes()).hexdigest()  # noqa: E731
    monkeypatch.setattr(kind, "train_list", [[name, digest(name)] for name, _ in kind.train_list])
    monkeypatch.setattr(kind, "test_list", [[name, digest(name)] for name, _ in kind.test_list])
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": digest("batches.meta")})
    data = mae.open_data(arguments(data="cifar10", root=str(tmp_path)), train=True)
    assert data.pixels.shape == (10, 3, 32, 32) and data.labels.tolist() == [1] * 10 and len(data.classes) == 10


def test_fashion_mnist_gets_a_border_and_three_channels(tmp_path):
    """A tiny set in the published file format (IDX), read by torchvision."""
    folder = tmp_path / "FashionMNIST" / "raw"
    folder.mkdir(parents=True)
    for part in ("train", "t10k"):
        (folder / f"{part}-images-idx3-ubyte").write_bytes(np.array([0x803, 4, 28, 28], ">i4").tobytes() + b"\7" * (4 * 28 * 28))
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(np.array([0x801, 4], ">i4").tobytes() + bytes([3, 1, 4, 1]))
    data = mae.open_data(arguments(data="fashionmnist", root=str(tmp_path)), train=True)
    assert data.pixels.shape == (4, 3, 32, 32) and data.labels.tolist() == [3, 1, 4, 1] and len(data.classes) == 10
    assert data.pixels[:, :, 2:30, 2:30].unique() == 7 and data.pixels.sum() == 4 * 3 * 28 * 28 * 7


@pytest.mark.parametrize("name", mae.NAMED)
def test_a_named_set_that_is_not_there_says_how_to_get_it(name, tmp_path):
    with pytest.raises(mae.BadInput, match=f"--data {name}: (not in --root .*(download|put )|.*pip install scipy)"):
        mae.open_data(arguments(data=name, root=str(tmp_path)), train=True)


def test_a_set_whose_labels_need_another_package_names_it(tmp_path, monkeypatch):
    def absent(*arguments, **options):
        raise ModuleNotFoundError("No module named 'scipy'")
    monkeypatch.setattr(mae.torchvision.datasets, "Flowers102", absent)
    with pytest.raises(mae.BadInput, match="--data flowers102: .* pip install scipy"):
        mae.open_data(arguments(data="flowers102", root=str(tmp_path)), train=True)


def test_inat2018_uses_the_challenges_split(tmp_path):
    import json
    folder = tmp_path / "inat2018"
    folder.mkdir()
    (folder / "val2018.json").write_text(json.dumps({
        "images": [{"id": 5, "file_name": "train_val2018/a/5.jpg"}, {"id": 6, "file_name": "train_val2018/b/6.jpg"}],
        "annotations": [{"image_id": 6, "category_id": 1}, {"image_id": 5, "category_id": 0}],
        "categories": [{"id": 0}, {"id": 1}]}))
    data = mae.open_data(arguments(data="inat2018", root=str(tmp_path)), train=False)
    assert data.files[0].decode().endswith("train_val2018/b/6.jpg") and data.labels.tolist() == [1, 0]


def test_fraction_keeps_a_class_balanced_share():
    data = mae.open_data(arguments(fraction=0.1), train=True)
    full = mae.open_data(arguments(), train=True)
    assert np.abs(np.bincount(data.labels) - 0.1 * np.bincount(full.labels)).max() <= 0.5
    again, other = (mae.open_data(arguments(fraction=0.1, seed=seed), train=True) for seed in (0, 1))
    assert torch.equal(again.pixels, data.pixels) and not torch.equal(other.pixels, data.pixels)


def test_long_tail_has_the_shape_of_imagenet_lt():
    """Liu et al., 2019: 115.8k images of 1,000 classes, 1,280 down to 5 a class."""
    data = mae.Data(np.zeros(1280000), None, np.repeat(np.arange(1000), 1280), [])
    sizes = np.bincount(data.labels[mae.subset(data, arguments(long_tail=True))])
    assert sizes.max() == 1280 and sizes.min() == 5 and 110_000 < sizes.sum() < 122_000


# ------------------------------------------------------------------------------------------------ batches

@pytest.mark.parametrize("world, accum", [(1, 1), (2, 1), (2, 3), (3, 2)])
def test_ranks_and_accumulation_cut_a_step_without_changing_it(world, accum):
    for step in range(5):  # 40 visits in batches of 18: 18, 18, 4
        whole = mae.batches_of(step, 40, 18, 1, 0, 1)[0]
        parts = [b for rank in range(world) for b in mae.batches_of(step, 40, 18, accum, rank, world)]
        rows = [row for b in parts if b.weight for row in b.rows]
        assert sorted(rows) == list(whole.rows) and all((b.first, b.count) == (whole.first, whole.count) for b in parts)
        assert sum(b.weight for b in parts) == pytest.approx(world)
        shared = torch.cat([mae.draw(b, 2, 3, seed=1, device="cpu") for b in parts if b.weight])
        assert torch.equal(shared[np.argsort(rows)], mae.draw(whole, 2, 3, seed=1, device="cpu"))


def test_an_epoch_shows_every_image_once_and_the_last_step_takes_the_rest():
    seen = [mae.image_of(b.first + r, 40, 7) for step in range(3) for b in mae.batches_of(step, 40, 18, 1, 0, 1) for r in b.rows]
    assert sorted(seen) == list(range(40))
    then = [mae.image_of(b.first + r, 40, 7) for step in range(3, 6) for b in mae.batches_of(step, 40, 18, 1, 0, 1) for r in b.rows]
    assert sorted(then) == list(range(40)) and then != seen


def test_a_rank_without_images_counts_for_nothing():
    assert [b.weight for b in mae.batches_of(2, 37, 18, 1, 1, 2)] == [0]


@pytest.mark.parametrize("workers", [0, 2])
def test_crops_from_disk_do_not_depend_on_workers_or_cut(image_folder, workers):
    args = arguments(data=str(image_folder), workers=workers, img_size=16)
    data = mae.open_data(args, train=True)
    whole = list(mae.crops_of(data, mae.batches_of(1, 36, 8, 1, 0, 1), arguments(img_size=16), torch.device("cpu"), crops=2))[0]
    assert whole.shape == (16, 3, 16, 16)
    parts = list(mae.crops_of(data, mae.batches_of(1, 36, 8, 2, 0, 1), args, torch.device("cpu"), crops=2))
    assert torch.equal(torch.cat(parts), whole)
    assert not torch.equal(whole[0], whole[1])  # two crops of one image


def test_reading_crops_leaves_the_global_random_state_alone(image_folder):
    data = mae.open_data(arguments(data=str(image_folder)), train=True)
    before = torch.get_rng_state()
    mae.Crops(data, arguments(), 1, None).__getitems__([0])
    assert torch.equal(before, torch.get_rng_state())


class Given:
    """Stands for random.Random: draws what it is told to."""

    def __init__(self, *numbers):
        self.numbers = list(numbers)

    def random(self):
        return self.numbers.pop(0)

    def uniform(self, low, high):
        return low + (high - low) * self.random()

    def randint(self, low, high):
        return low + int((high - low + 1) * self.random())


@pytest.mark.parametrize("flip", [0.2, 0.7])
def test_a_crop_from_disk_is_torchvisions_resized_crop(flip):
    image = torch.randint(0, 256, (3, 60, 80), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    cropper = mae.Crops(None, arguments(img_size=24, min_crop=0.2), 1, None)
    ours = cropper.crop(image, Given(0.5, 0.5, 0.3, 0.9, flip))  # 0.6 of the area, square: 54 x 54, from (2, 24)
    expected = v2.functional.resized_crop(image, 2, 24, 54, 54, [24, 24], v2.InterpolationMode.BICUBIC, antialias=True)
    assert torch.equal(ours, expected.flip(-1) if flip < 0.5 else expected)


@pytest.mark.parametrize("height, width", [(40, 60), (20, 90)])
def test_crops_from_disk_have_random_resized_crops_distribution(height, width):
    """An image whose pixels say where they are: the mean of a crop is its place, the deviation its size."""
    image = torch.stack([torch.arange(width).expand(height, width) * 2, torch.arange(height)[:, None].expand(height, width) * 2,
                         torch.zeros(height, width)]).to(torch.uint8)
    cropper, rng = mae.Crops(None, arguments(img_size=8, min_crop=0.08), 1, None), random.Random(0)
    torch.manual_seed(0)
    usual = v2.Compose([v2.RandomResizedCrop(8, interpolation=v2.InterpolationMode.BICUBIC, antialias=True), v2.RandomHorizontalFlip()])
    ours, theirs = (torch.stack([crop[:2].float() for crop in crops]) for crops in
                    ([cropper.crop(image, rng) for _ in range(3000)], [usual(image) for _ in range(3000)]))
    for measure in (lambda x: x.mean((2, 3)), lambda x: x.std((2, 3)), lambda x: x[:, :1, 0, 0] - x[:, :1, 0, -1]):
        a, b = measure(ours), measure(theirs)
        for moment in (torch.mean, torch.std):
            assert ((moment(a, 0) - moment(b, 0)).abs() < 0.08 * b.std(0)).all()


@pytest.mark.parametrize("size", [16, 32, 45])
def test_batched_crops_are_torchvisions(size):
    pixels, _ = vit.toy_shapes(40, 40, seed=5)
    boxes = mae.crop_boxes(torch.rand(40, 22, generator=torch.Generator().manual_seed(0)), 40, 40, 0.08)
    flip = torch.arange(40) % 2 == 0
    ours = mae.crop_and_resize(pixels, boxes, flip, size)
    for i, (top, left, height, width) in enumerate(boxes.int().tolist()):
        theirs = v2.functional.resized_crop(pixels[i].float(), top, left, height, width, [size, size],
                                            v2.InterpolationMode.BICUBIC, antialias=True).clamp(0, 255)
        torch.testing.assert_close(ours[i], theirs.flip(-1) if flip[i] else theirs, atol=0.01, rtol=0)


@pytest.mark.parametrize("height, width", [(32, 32), (24, 60)])
def test_batched_crops_are_drawn_as_torchvision_draws_them(height, width):
    torch.manual_seed(0)
    ours = mae.crop_boxes(torch.rand(6000, 22), height, width, 0.08)
    theirs = torch.tensor([v2.RandomResizedCrop(8, (0.08, 1)).make_params([torch.zeros(1, height, width)]) [k]
                           for _ in range(6000) for k in ("top", "left", "height", "width")]).view(-1, 4).float()
    assert (ours[:, 0] + ours[:, 2]).max() <= height and (ours[:, 1] + ours[:, 3]).max() <= width and ours.min() >= 0
    for statistic in (lambda x: x.mean(0), lambda x: x.std(0)):
        error = theirs.std(0) / math.sqrt(6000)
        assert ((statistic(ours) - statistic(theirs)).abs() < 5 * error).all()


def test_evaluation_resizes_to_256_crops_224(image_folder):
    data = mae.open_data(arguments(data=str(image_folder)), train=False)
    args = arguments(img_size=28)
    image = mae.image_at(data, 3)
    expected = v2.functional.center_crop(v2.functional.resize(image, 32, v2.InterpolationMode.BICUBIC, antialias=True), 28)
    assert torch.equal(mae.centre_crops(data, [3], args)[0], expected.float())


def test_normalisation_uses_the_given_mean_and_deviation():
    args = arguments(mean=[0.1, 0.2, 0.3], std=[0.5, 0.25, 0.125])
    torch.testing.assert_close(mae.normalize(torch.full((1, 3, 1, 1), 127.5), args).flatten(), torch.tensor([0.8, 1.2, 1.6]))


# ------------------------------------------------------------------------------------------------ schedule, optimizer

def test_the_learning_rate_is_maes_and_moco_v3s_step_by_step():
    from conftest import GOLDENS, agrees
    golden = GOLDENS["7_lr_schedule"]
    assert golden["steps"] == golden["moco_v3"]["steps"]
    agrees([mae.learning_rate(step, 1000, 100, 2.4e-3) for step in golden["steps"]], golden["mae_lite_warmcos"], 1e-6)
    agrees([mae.learning_rate(step, 1000, 100, 2.4e-3, 1e-6) for step in golden["steps"]],
           [0.0, *golden["mae_lite_warmcos_end_lr_1e-6"][1:]], 1e-6)
    agrees([mae.learning_rate(step, 1000, 100, 2.4e-3) for step in golden["steps"]], golden["moco_v3"]["moco_v3_adjust_learning_rate"])


def test_weight_decay_spares_vectors_class_token_and_position():
    model = mae.MaskedAutoencoder(vit.vit_toy(img_size=32, patch_size=4))
    decayed, spared = mae.parameter_groups(model, 0.05)
    names = {id(p): n for n, p in model.named_parameters()}
    assert decayed["weight_decay"] == 0.05 and spared["weight_decay"] == 0
    assert {names[id(p)].split(".")[-1] for p in spared["params"]} == {"weight", "bias", "cls_token"}
    assert all(p.ndim == 1 or "cls_token" in names[id(p)] for p in spared["params"])
    assert len(decayed["params"]) + len(spared["params"]) == sum(p.requires_grad for p in model.parameters())
