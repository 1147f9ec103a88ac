"""Images and the sample stream: what lies in a folder is what is trained on, and sample v follows from (seed, v)."""
import functools
import hashlib
import os
import pickle

import numpy as np
import pytest
import torch
import torchvision
from conftest import GOLDENS, agrees
from PIL import Image
from torchvision.transforms import v2

import mae


def arguments(*argv):
    return mae.parse([str(text) for text in argv], {**mae.SETTINGS, **mae.TRAINING}, out="runs/test")


def stream(args, data):
    transform = v2.Compose([v2.RandomResizedCrop(args.img_size, (args.min_crop, 1)), v2.RandomHorizontalFlip()])
    return mae.Stream(len(data), args.seed, functools.partial(mae.make_sample, data, transform, args))


# ------------------------------------------------------------ arguments

def test_parse_takes_the_preset_by_data_and_typed_arguments_win():
    for argv, preset, size in ((("--data", "toy"), "toy", 32), (("--data", "cifar100"), "small", 32), (("--data", "x"), "photos", 224)):
        assert (arguments(*argv).preset, arguments(*argv).img_size) == (preset, size)
    args = arguments("--data", "x", "--preset", "small", "--epochs", 7, "--no-norm-pix-loss")
    assert (args.arch, args.epochs, args.batch_size, args.norm_pix_loss) == ("tiny", 7, 512, False)


def test_settings_of_photographs_are_the_papers():
    args = arguments("--data", "x")
    recipe = dict(mask_ratio=0.75, epochs=400, warmup_epochs=40, batch_size=4096, base_lr=1.5e-4, weight_decay=0.05, min_crop=0.08)
    assert recipe.items() <= vars(args).items() and mae.DECODERS["tiny"] == (96, 1, 3)


def test_learning_rate_is_the_published_one_step_by_step():
    golden = GOLDENS["7_lr_schedule"]
    rates = [mae.learning_rate(step, 1000, 100, 2.4e-3) for step in golden["steps"]]
    agrees(rates, golden["mae_lite_warmcos"], 1e-6)
    agrees(rates, golden["moco_v3"]["moco_v3_adjust_learning_rate"])
    rates = [mae.learning_rate(step, 1000, 100, 2.4e-3, 1e-6) for step in golden["steps"]]
    agrees(rates, [0.0, *golden["mae_lite_warmcos_end_lr_1e-6"][1:]], 1e-6)


# ------------------------------------------------------------ data sets

def test_open_data_reads_folders_with_their_classes(image_folder):
    data = mae.open_data(arguments("--data", image_folder), train=True)
    image, label = data[12]
    assert (len(data), data.classes, label, data.split) == (36, ["bird", "boat", "bus"], 1, "training")
    assert image.dtype == torch.uint8 and image.shape[0] == 3
    validation = mae.open_data(arguments("--data", image_folder), train=False)
    assert len(validation) == 18 and validation.split == "validation"


def test_open_data_takes_a_folder_without_classes_or_splits(image_folder):
    args = arguments("--data", image_folder / "train" / "bird")
    data = mae.open_data(args, train=True)
    assert len(data) == 12 and set(data.targets) == {0}
    assert mae.open_data(args, train=False).split == "training"


def test_open_data_follows_links_and_refuses_to_count_images_twice(image_folder, tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "bird").symlink_to(image_folder / "train" / "bird")
    assert len(mae.open_data(arguments("--data", tmp_path), train=True)) == 12
    (tmp_path / "train" / "boat").mkdir()
    (tmp_path / "train" / "boat" / "loop").symlink_to(tmp_path / "train")
    with pytest.raises(mae.UserError, match="its images would count twice"):
        mae.open_data(arguments("--data", tmp_path), train=True)


def test_open_data_refuses_a_folder_that_cannot_be_read(image_folder, monkeypatch):
    scandir = os.scandir

    def denied(path):
        if str(path).endswith("boat"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)
    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(mae.UserError, match="Permission denied: '.*boat'"):
        mae.open_data(arguments("--data", image_folder), train=True)


def test_open_data_without_images_names_the_folder(tmp_path):
    (tmp_path / "train" / "empty").mkdir(parents=True)
    with pytest.raises((mae.UserError, OSError), match="empty"):
        mae.open_data(arguments("--data", tmp_path), train=True)


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "RGBA", "CMYK", "LA"])
def test_images_of_every_mode_become_rgb(mode, tmp_path):
    Image.new("RGB", (9, 7), (200, 100, 50)).convert(mode).save(tmp_path / ("a.tif" if mode == "CMYK" else "a.png"))
    image, _ = mae.open_data(arguments("--data", tmp_path), train=True)[0]
    assert image.shape == (3, 7, 9) and image.dtype == torch.uint8
    if mode in ("RGB", "RGBA", "P", "CMYK"):
        assert (image[:, 0, 0].int() - torch.tensor([200, 100, 50])).abs().max() <= 30


def test_images_with_a_transparent_palette_are_read_without_a_warning(tmp_path, recwarn):
    Image.new("P", (8, 8)).save(tmp_path / "a.png", transparency=b"\x00\x80")
    mae.open_data(arguments("--data", tmp_path), train=True)[0]
    assert not recwarn.list


@pytest.mark.parametrize("name, content, reason", [
    ("empty.jpg", b"", "cannot identify image file"), ("text.png", b"hello", "cannot identify image file"),
    (b"caf\xe9.jpg", b"", "unreadable image"), ("deep.png", None, "more than 8 bits")])
def test_images_that_cannot_be_read_are_named(name, content, reason, tmp_path):
    path = os.path.join(os.fsencode(tmp_path), os.fsencode(name))
    if content is None:
        Image.fromarray(np.full((8, 8), 40000, np.uint16)).save(os.fsdecode(path))
    else:
        open(path, "wb").write(content)
    with pytest.raises(mae.UserError, match=reason) as error:
        mae.open_data(arguments("--data", tmp_path), train=True)[0]
    assert os.fsdecode(name) in str(error.value) and "\n" not in str(error.value)


def test_images_with_names_that_are_not_utf8_are_read(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    os.rename(tmp_path / "a.png", os.path.join(os.fsencode(tmp_path), b"caf\xe9.png"))
    assert mae.open_data(arguments("--data", tmp_path), train=True)[0][0].shape == (3, 8, 8)


def test_open_data_reads_cifar_through_torchvision(tmp_path, monkeypatch):
    folder, cifar = tmp_path / "cifar-10-batches-py", torchvision.datasets.CIFAR10
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
    assert len(data) == 10 and data[0][0].shape == (3, 32, 32) and data[0][1] == 1 and len(data.classes) == 10


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
    expected = v2.functional.center_crop(v2.functional.resize(image, 256, v2.InterpolationMode.BICUBIC), 224)
    assert torch.equal(mae.center_crop(image, 224), expected)
    assert mae.center_crop(image[:, :32, :32], 32) .equal(image[:, :32, :32])


# ------------------------------------------------------------ the sample stream

def test_stream_sample_v_depends_on_seed_and_v_alone():
    args = arguments("--fraction", 0.01, "--crops-per-image", 2)
    data = mae.open_data(args, train=True)
    first, second = stream(args, data), stream(args, data)
    in_order = [first[v] for v in range(100)]
    for v in (99, 3, 42):
        torch.rand(v)    # other random numbers drawn meanwhile
        assert all(torch.equal(a, b) for a, b in zip(second[v], in_order[v]))
    views, noise = in_order[0]
    assert not torch.equal(views[0], views[1]) and not torch.equal(noise[0], noise[1])


def test_stream_of_another_seed_has_other_crops_and_masks():
    args = arguments("--fraction", 0.01)
    data = mae.open_data(args, train=True)
    other = arguments("--fraction", 0.01, "--seed", 1)
    assert stream(args, data)[5][1].ne(stream(other, data)[5][1]).all()
    assert not torch.equal(stream(args, data)[5][0], stream(other, data)[5][0])


def test_stream_shows_every_image_once_in_an_epoch_and_in_another_order_in_the_next():
    seen = mae.Stream(50, 0, lambda i: int(i))
    first, second = [seen[v] for v in range(50)], [seen[v] for v in range(50, 100)]
    assert sorted(first) == sorted(second) == list(range(50)) and first != second


@pytest.mark.parametrize("world, accum, workers", [(1, 1, 0), (2, 3, 0), (3, 2, 0), (2, 1, 2)])
def test_ranks_and_accumulation_partition_each_step(world, accum, workers, monkeypatch):
    args = arguments("--batch-size", 12, "--accum", accum, "--workers", workers)
    monkeypatch.setattr(mae, "WORLD", world)
    samples = {}
    for rank in range(world):
        monkeypatch.setattr(mae, "RANK", rank)
        parts = [part.tolist() for part in mae.load(Numbers(), 5, 7, args)]
        assert len(parts) == 2 * accum and {len(part) for part in parts} == {12 // world // accum}
        for step in (0, 1):
            samples.setdefault(5 + step, []).extend(v for part in parts[step * accum:(step + 1) * accum] for v in part)
    for step, numbers in samples.items():
        assert sorted(numbers) == list(range(12 * step, 12 * step + 12))


class Numbers(torch.utils.data.Dataset):
    def __getitem__(self, v):
        return v


def test_workers_are_the_cores_that_this_process_may_use(monkeypatch):
    seen = []
    monkeypatch.setattr(mae, "DataLoader", lambda *args, **kw: seen.append(kw["num_workers"]) or [])
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)))
    for environment, argv in (("1", ["--data", "x"]), ("4", ["--data", "x"]), ("1", []), ("1", ["--workers", 5])):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", environment)
        mae.load(None, 0, 1, arguments(*argv))
    assert seen == [12, 3, 0, 5]    # toy images are in memory: no workers on a CPU
