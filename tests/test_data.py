"""Images and samples: what lies in a folder is trained on; seed and v alone decide on sample v."""
import hashlib
import math
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from conftest import GOLDENS, agrees
from PIL import Image
from torchvision.transforms import v2

import mae
import vit


def arguments(*argv):
    return mae.parse([str(text) for text in argv], mae.settings, mae.PRESETS, out="runs/test")


def folder_with(root, *names):
    """A folder with a small image under each of these names."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 7)).save(path, format="PNG")
    return root


# ------------------------------------------------------------ arguments

def test_parse_takes_the_preset_by_data_and_typed_arguments_win():
    presets = ("toy", "toy", 32), ("cifar100", "small", 32), ("x", "photos", 224)
    for data, preset, size in presets:
        args = arguments("--data", data)
        assert (args.preset, args.img_size) == (preset, size)
    args = arguments("--data", "x", "--preset", "small", "--epochs", 7, "--no-norm-pix-loss")
    assert (args.arch, args.epochs, args.batch_size, args.norm_pix_loss) == ("tiny", 7, 512, False)


def test_learning_rate_is_the_published_one_step_by_step():
    golden = GOLDENS["7_lr_schedule"]
    rates = [mae.learning_rate(step, 1000, 100, 2.4e-3) for step in golden["steps"]]
    agrees(rates, golden["mae_lite_warmcos"], 1e-6)
    agrees(rates, golden["moco_v3"]["moco_v3_adjust_learning_rate"])
    rates = [mae.learning_rate(step, 1000, 100, 2.4e-3, 1e-6) for step in golden["steps"]]
    agrees(rates, [0.0, *golden["mae_lite_warmcos_end_lr_1e-6"][1:]], 1e-6)


def test_learning_rate_without_warm_up_begins_at_its_largest():
    rates = [mae.learning_rate(step, 4, 0, 1.0, 0.2) for step in range(5)]
    half = 0.4 * math.sqrt(0.5)
    assert rates == pytest.approx([1, 0.6 + half, 0.6, 0.6 - half, 0.2])


# ------------------------------------------------------------ data sets

def test_open_data_reads_folders_with_their_classes(image_folder):
    data = mae.open_data(arguments("--data", image_folder), train=True)
    image, label = data[12]
    assert (len(data), data.classes, label) == (36, ["bird", "boat", "bus"], 1)
    assert type(label) is int and data.targets[12] == 1
    assert image.dtype == torch.uint8 and image.shape[0] == 3
    assert len(mae.open_data(arguments("--data", image_folder), train=False)) == 18


def test_open_data_takes_a_folder_without_classes_or_splits(image_folder):
    args = arguments("--data", image_folder / "train" / "bird")
    data = mae.open_data(args, train=True)
    assert len(data) == 12 and set(data.targets) == {0} and data.classes == [""]
    assert len(mae.open_data(args, train=False)) == 12  # figures show training images


@pytest.mark.parametrize("name", ["val", "valid", "test"])
def test_val_valid_and_test_serve_for_validation(name, tmp_path):
    root = folder_with(tmp_path, "train/a/1.png", "train/a/2.png", f"{name}/a/3.png")
    assert len(mae.open_data(arguments("--data", root), train=True)) == 2
    assert len(mae.open_data(arguments("--data", root), train=False)) == 1


def test_a_folder_with_val_but_without_train_is_refused(tmp_path):
    root = folder_with(tmp_path, "val/a/3.png")
    with pytest.raises(vit.InputError, match="train: .*No such file"):
        mae.open_data(arguments("--data", root), train=True)


def test_photographs_beside_a_hidden_folder_are_all_trained_on(tmp_path, capsys):
    names = [f"{i}.jpg" for i in range(50)]
    root = folder_with(tmp_path, *names, ".thumbnails/1.jpg", "__MACOSX/1.jpg", "._2.jpg")
    assert len(mae.open_data(arguments("--data", root), train=True)) == 50
    assert "training: 50 images of 1 classes" in capsys.readouterr().out


def test_loose_images_beside_class_folders_are_counted_as_a_class(tmp_path):
    root = folder_with(tmp_path, "train/cat/1.png", "train/dog/deep/2.png", "train/3.png")
    data = mae.open_data(arguments("--data", root), train=True)
    assert data.classes == ["", "cat", "dog"]
    paths = sorted(os.fsdecode(path) for path in data.paths)
    assert paths == ["3.png", "cat/1.png", "dog/deep/2.png"]
    assert [data[i][1] for i in range(3)] == data.targets.tolist()


@pytest.mark.parametrize("suffix", [
    "jpg", "JPEG", "jfif", "jp2", "png", "bmp", "gif", "webp", "tif", "tiff"])
def test_every_usual_kind_of_image_is_read(suffix, tmp_path):
    formats = {"jpg": "JPEG", "jfif": "JPEG", "jp2": "JPEG2000", "tif": "TIFF"}
    image = Image.new("RGB", (9, 7), (200, 100, 50))
    image.save(tmp_path / f"a.{suffix}", format=formats.get(suffix, suffix.upper()))
    pixels, _ = mae.open_data(arguments("--data", tmp_path), train=True)[0]
    assert pixels.shape == (3, 7, 9) and pixels.dtype == torch.uint8


def test_other_files_are_counted_not_silently_skipped(tmp_path, capsys):
    root = folder_with(tmp_path, "a/1.png", "b/2.png")
    for name in ("a/notes.txt", "b/list.csv", "readme.md"):
        (root / name).write_text("hello")
    mae.open_data(arguments("--data", root), train=True)
    said = capsys.readouterr().out
    assert f"training: 2 images of 2 classes from {root}, 3 other files skipped" in said


def test_paths_are_one_array_that_workers_share(tmp_path):
    data = mae.Folder(folder_with(tmp_path, "a/1.png", "b/2.png"))
    assert isinstance(data.paths, np.ndarray) and data.paths.dtype.kind == "S"
    assert isinstance(data.targets, np.ndarray)


def test_open_data_follows_links_and_refuses_to_count_images_twice(image_folder, tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "bird").symlink_to(image_folder / "train" / "bird")
    assert len(mae.open_data(arguments("--data", tmp_path), train=True)) == 12
    (tmp_path / "train" / "boat").mkdir()
    (tmp_path / "train" / "boat" / "loop").symlink_to(tmp_path / "train")
    with pytest.raises(vit.InputError, match="loop: links lead here twice"):
        mae.open_data(arguments("--data", tmp_path), train=True)


def test_open_data_refuses_a_folder_that_cannot_be_read(image_folder, monkeypatch):
    scandir = os.scandir

    def denied(path):
        if str(path).endswith("boat"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)
    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(vit.InputError, match="Permission denied: '.*boat'"):
        mae.open_data(arguments("--data", image_folder), train=True)


def test_open_data_without_images_names_the_folder(tmp_path):
    (tmp_path / "train" / "empty").mkdir(parents=True)
    with pytest.raises(vit.InputError, match="train: no images"):
        mae.open_data(arguments("--data", tmp_path), train=True)


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "RGBA", "CMYK", "LA"])
def test_images_of_every_mode_become_rgb(mode, tmp_path):
    name = "a.tif" if mode == "CMYK" else "a.png"
    Image.new("RGB", (9, 7), (200, 100, 50)).convert(mode).save(tmp_path / name)
    image, _ = mae.open_data(arguments("--data", tmp_path), train=True)[0]
    assert image.shape == (3, 7, 9) and image.dtype == torch.uint8
    if mode in ("RGB", "RGBA", "P", "CMYK"):
        assert (image[:, 0, 0].int() - torch.tensor([200, 100, 50])).abs().max() <= 30


@pytest.mark.parametrize("name, content, reason", [
    ("empty.jpg", b"", "cannot identify image file"),
    ("text.png", b"hello", "cannot identify image file"),
    (b"caf\xe9.jpg", b"", "unreadable image"),
    ("deep.png", None, "more than 8 bits")])
def test_images_that_cannot_be_read_are_named(name, content, reason, tmp_path):
    path = os.path.join(os.fsencode(tmp_path), os.fsencode(name))
    if content is None:
        Image.fromarray(np.full((8, 8), 40000, np.uint16)).save(os.fsdecode(path))
    else:
        Path(os.fsdecode(path)).write_bytes(content)
    with pytest.raises(vit.InputError, match=reason) as error:
        image, _ = mae.open_data(arguments("--data", tmp_path), train=True)[0]
    assert os.fsdecode(name) in str(error.value) and "\n" not in str(error.value)


def test_images_with_names_that_are_not_utf8_are_read(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    os.rename(tmp_path / "a.png", os.path.join(os.fsencode(tmp_path), b"caf\xe9.png"))
    image, _ = mae.open_data(arguments("--data", tmp_path), train=True)[0]
    assert image.shape == (3, 8, 8)


def test_open_data_reads_cifar_through_torchvision(tmp_path, monkeypatch):
    folder = tmp_path / "cifar-10-batches-py"
    cifar = torchvision.datasets.CIFAR10
    folder.mkdir()
    for name, count in [(f"data_batch_{i}", 2) for i in range(1, 6)] + [("test_batch", 3)]:
        content = {"data": np.full((count, 3072), 7, np.uint8), "labels": [1] * count}
        (folder / name).write_bytes(pickle.dumps(content))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))

    def digest(name):
        return hashlib.md5((folder / name).read_bytes()).hexdigest()
    monkeypatch.setattr(cifar, "train_list", [[name, digest(name)] for name, _ in cifar.train_list])
    monkeypatch.setattr(cifar, "test_list", [[name, digest(name)] for name, _ in cifar.test_list])
    monkeypatch.setattr(cifar, "meta", {**cifar.meta, "md5": digest("batches.meta")})
    data = mae.open_data(arguments("--data", "cifar10", "--root", tmp_path), train=True)
    image, label = data[0]
    assert image.shape == (3, 32, 32) and label == 1
    assert len(data) == 10 and len(data.classes) == 10


def test_fraction_keeps_a_class_balanced_share():
    data = mae.open_data(arguments("--fraction", 0.1), train=True)
    whole = np.bincount(mae.open_data(arguments(), train=True).targets)
    assert np.bincount(data.targets).tolist() == [round(0.1 * count) for count in whole]
    assert data[3][1] == data.targets[3] and len(data.classes) == 10


def test_long_tail_has_the_shape_of_imagenet_lt():
    """Liu et al., 2019: 115.8k images of 1,000 classes, 1,280 down to 5 a class."""
    targets = np.repeat(np.arange(1000), 1280)
    sizes = np.bincount(targets[mae.subset(targets, arguments("--long-tail"))])
    assert sizes.max() == 1280 and sizes.min() == 5 and 110_000 < sizes.sum() < 122_000


def test_center_crop_resizes_to_256_crops_224():
    image = torch.arange(300, dtype=torch.uint8).repeat(3, 400, 1)[:, :, :300]
    resized = v2.functional.resize(image, 256, v2.InterpolationMode.BICUBIC)
    assert torch.equal(mae.center_crop(image, 224), v2.functional.center_crop(resized, 224))
    small = image[:, :32, :32]
    assert torch.equal(mae.center_crop(small, 32), small)


# ------------------------------------------------------------ samples

def test_sample_v_depends_on_seed_and_v_alone():
    args = arguments("--fraction", 0.01, "--crops-per-image", 2)
    data = mae.open_data(args, train=True)
    first = mae.Samples(data, args)
    second = mae.Samples(data, args)
    in_order = [first[v] for v in range(100)]
    for v in (99, 3, 42):
        torch.rand(v)  # other random numbers drawn meanwhile
        for a, b in zip(second[v], in_order[v]):
            assert torch.equal(a, b)
    crops, noise = in_order[0]
    assert not torch.equal(crops[0], crops[1]) and not torch.equal(noise[0], noise[1])


def test_samples_of_another_seed_have_other_crops_and_masks():
    args = arguments("--fraction", 0.01)
    data = mae.open_data(args, train=True)
    one = mae.Samples(data, args)[5]
    other = mae.Samples(data, arguments("--fraction", 0.01, "--seed", 1))[5]
    assert one[1].ne(other[1]).all() and not torch.equal(one[0], other[0])


def test_an_epoch_shows_every_image_once_and_the_next_in_another_order():
    first = [mae.shuffled(v, 50, seed=0) for v in range(50)]
    second = [mae.shuffled(v, 50, seed=0) for v in range(50, 100)]
    assert sorted(first) == sorted(second) == list(range(50)) and first != second


def nothing(*args, **kw):
    """In place of what ranks do together."""


def same(model):
    """In place of DistributedDataParallel."""
    return model


@pytest.mark.parametrize("world, accum", [(1, 1), (2, 3), (3, 2), (2, 1)])
def test_ranks_and_micro_batches_partition_each_step(world, accum, monkeypatch, tmp_path):
    """The numbers that DataLoader is given by `train`, for each rank."""
    asked = {}

    class Loader(torch.utils.data.DataLoader):
        def __init__(self, samples, batch_size, sampler, **kw):
            asked[mae.RANK] = (batch_size, list(sampler))
            raise vit.InputError("seen")
    monkeypatch.setattr(mae, "DataLoader", Loader)
    monkeypatch.setattr(mae, "WORLD", world)
    monkeypatch.setattr(mae.dist, "init_process_group", nothing)
    monkeypatch.setattr(mae.dist, "all_gather_object", nothing)
    monkeypatch.setattr(mae.atexit, "register", nothing)
    monkeypatch.setattr(mae.nn.parallel, "DistributedDataParallel", same)
    for rank in range(world):
        monkeypatch.setattr(mae, "RANK", rank)
        monkeypatch.setattr(mae.sys, "stdout", mae.sys.stdout)  # ranks redirect it
        words = ["--fraction", "0.01", "--batch-size", "12", "--accum", str(accum),
                 "--epochs", "2", "--out", str(tmp_path / str(rank))]
        with pytest.raises(vit.InputError, match="seen"):
            mae.main(words)
    for step in range(3):
        numbers = []
        for size, mine in asked.values():
            assert size == 12 // world // accum
            numbers += mine[step * size * accum:(step + 1) * size * accum]
        assert sorted(numbers) == list(range(12 * step, 12 * step + 12))
