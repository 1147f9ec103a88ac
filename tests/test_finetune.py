"""finetune.py: published numbers, recipes, checkpoints, evaluation, transfer sets, exact resumption."""
import collections
import json
import math

import numpy as np
import pytest
import torch
import torchvision
from conftest import GOLDENS, agrees, call, fill, log_of, refused, run, same_state
from PIL import Image
from torch import nn

import finetune
import vit

TINY = ("--patch-size", 8, "--fraction", 0.01, "--batch-size", 24, "--epochs", 3, "--warmup-epochs", 1, "--log-every", 1)
SHAPES = vit.toy_shapes(1024)    # the synthetic images, drawn once; a few are enough
RANDOM = ("--mixup", 0.8, "--cutmix", 1, "--erasing", 0.5, "--drop-path", 0.2, "--randaug", 9)


@pytest.fixture(autouse=True)
def few_shapes(monkeypatch):
    """82 training images with --fraction 0.01, 64 validation images."""
    def shapes(n, size, seed):
        images = SHAPES[0].repeat(8, 1, 1, 1) if seed == 0 else SHAPES[0][:64]
        labels = SHAPES[1].repeat(8) if seed == 0 else SHAPES[1][:64]
        return nn.functional.interpolate(images, size), labels
    monkeypatch.setattr(vit, "toy_shapes", shapes)


@pytest.fixture
def checkpoint(tmp_path):
    """A pre-trained encoder as this project, MAE and MoCo-v3's users publish it."""
    torch.manual_seed(5)
    model = vit.vit_toy(img_size=32, patch_size=8, global_pool="token")
    for parameter in model.parameters():
        parameter.data += 0.01
    torch.save({"model": {**model.state_dict(), "mask_token": torch.zeros(1, 1, 8)}}, tmp_path / "mae.pt")
    return tmp_path / "mae.pt"


def weights(folder, name="last.pt"):
    return torch.load(folder / name, weights_only=True)["model"]


@pytest.mark.parametrize("decay", [0.75, 1.0])
def test_layer_decay_layer_i_learns_at_decay_to_the_depth_plus_1_minus_i(decay):
    model = vit.vit_tiny(num_classes=10, global_pool="avg" if decay == 1 else "token")
    groups = finetune.layer_decay_groups(model, base_lr=0.4, weight_decay=0.05, decay=decay)
    power = {"cls_token": 13, "pos_embed": 13, "patch_embed": 13, "norm": 0, "fc_norm": 0, "head": 0}
    power |= {f"blocks.{block}": 12 - block for block in range(12)}
    parameters = dict(model.named_parameters())
    assert sorted(name for group in groups for name in group["names"]) == sorted(parameters)
    for group in groups:
        assert [id(parameters[name]) for name in group["names"]] == [id(p) for p in group["params"]]
        for name in group["names"]:
            part = name if name in power else ".".join(name.split(".")[:1 + name.startswith("blocks")])
            assert group["lr_scale"] == pytest.approx(decay ** power[part], rel=1e-12) == group["lr"] / 0.4
            free = parameters[name].ndim == 1 or name in ("cls_token", "pos_embed")
            assert group["weight_decay"] == (0 if free else 0.05)


def test_nearest_neighbors_vote_with_exp_of_similarity_over_temperature():
    """One neighbor of class 0 at similarity 1, two of class 1 at s, which win where 2 exp(s / T) > exp(1 / T)."""
    for s, winner in ((1 - 0.04, 1), (1 - 0.06, 0)):    # T log 2 = 0.0485
        gallery = torch.tensor([[1, 0], [s, math.sqrt(1 - s * s)], [s, -math.sqrt(1 - s * s)]])
        gallery *= torch.tensor([[3.0], [1], [7]])      # lengths do not count
        ranking = finetune.nearest_neighbors(gallery, torch.tensor([0, 1, 1]), torch.tensor([[2.0, 0]]), 2)
        assert ranking.tolist() == [[winner, 1 - winner]]


def test_nearest_neighbors_of_separable_features_are_right_and_only_k_vote():
    torch.manual_seed(0)
    labels = torch.arange(280) % 7
    gallery, queries = torch.eye(7, 32)[labels] * 10 + torch.randn(2, 280, 32)
    ranking = finetune.nearest_neighbors(gallery, labels, queries, 7)
    assert ranking.shape == (280, 5) and torch.equal(ranking[:, 0], labels)
    gallery = torch.tensor([[1, 0.0], [0.9, 0.1], [0.9, 0.1]])
    assert finetune.nearest_neighbors(gallery, torch.tensor([0, 1, 1]), gallery[:1], 2, k=1)[0, 0] == 0


def test_probe_head_is_the_published_batch_norm_and_linear():
    golden, rng = GOLDENS["15_lin_probe"], np.random.RandomState(31)
    features = rng.standard_normal((16, 48)) * (0.5 + rng.random_sample(48)) + rng.standard_normal(48)
    head = fill(finetune.probe_head(48, 10), "head.")
    agrees(head(torch.from_numpy(features)), golden["output_training"])
    agrees(head[0].running_mean, golden["running_mean_after"])
    agrees(head[0].running_var, golden["running_var_after"])
    features = torch.from_numpy(np.random.RandomState(32).standard_normal((16, 48)))
    agrees(head.eval()(features), golden["output_eval_of_features_2"])


@pytest.mark.parametrize("strength", [9, 10])
def test_randaugment_draws_operations_and_strengths_as_published(strength, monkeypatch):
    golden = GOLDENS["14_randaugment"][f"rand-m{strength}-mstd0.5-inc1"]
    drawn, names = [], list(finetune.OPERATIONS)
    for name in names:
        monkeypatch.setitem(finetune.OPERATIONS, name, lambda image, m, s, name=name: drawn.append((name, m, s)) or image)
    torch.manual_seed(0)
    counts = []
    for _ in range(8_000):
        before = len(drawn)
        finetune.RandAugment(strength)(None)
        counts.append(len(drawn) - before)
    np.testing.assert_allclose(np.bincount(counts) / 8_000, golden["share_of_images_with_0_1_2"], atol=5 * 0.0056)
    frequency = collections.Counter(name for name, _, _ in drawn)
    expected = list(golden["frequency"].values())    # in the same order
    np.testing.assert_allclose([frequency[name] / len(drawn) for name in names], expected, atol=5 * 0.0041)
    m, s = (10 * np.array(column) for column in list(zip(*drawn))[1:])
    assert m.mean() == pytest.approx(golden["magnitude"]["mean"], abs=5 * 0.009) and m.max() <= 10
    assert m.std() == pytest.approx(golden["magnitude"]["std"], abs=0.03)
    assert (m == 10).mean() == pytest.approx(golden["magnitude"]["share_at_10"], abs=5 * 0.009)
    assert (s < 0).mean() == pytest.approx(0.5, abs=0.03) and np.array_equal(np.abs(s), m)
    posterized = np.array([4 - int(4 * m) for name, m, _ in drawn if name == "posterize"])
    for bits in "012":
        assert (posterized == int(bits)).mean() == pytest.approx(golden["posterize_bits"][bits], abs=0.08)


def test_randaugment_operations_have_the_published_arguments():
    ramp, white = torch.arange(256, dtype=torch.uint8).expand(3, 1, 256), torch.full((3, 41, 41), 255, dtype=torch.uint8)
    op = finetune.OPERATIONS
    assert op["posterize"](ramp, 1.0, 1.0).max() == 0                               # 0 bits: black
    assert torch.equal(op["posterize"](ramp, 0.9, 0.9), ramp // 128 * 128)          # 1 bit
    assert torch.equal(op["solarize"](ramp, 0.5, 0.5), torch.where(ramp < 128, ramp, 255 - ramp))
    assert torch.equal(op["solarize"](ramp, 1.0, 1.0), 255 - ramp)
    assert torch.equal(op["solarize_add"](ramp, 0.5, 0.5), torch.where(ramp < 128, ramp + 55, ramp))
    assert torch.equal(op["brightness"](ramp, 1.0, -1.0), (ramp * 0.1).to(torch.uint8))
    shifted = op["translate_x"](white, 1.0, 1.0)                                    # by 18.45 pixels
    assert shifted[:, 0, :18].T.unique(dim=0).tolist() == [[124, 116, 104]] and shifted[:, :, 19:].min() == 255
    rows = (op["shear_x"](white, 1.0, 1.0)[0] == 255).sum(dim=1)
    assert rows[0] >= 40 and rows[0] - rows[40] == 12                               # 0.3 pixels a row
    turned = op["rotate"](white, 1.0, 1.0)
    assert turned[0, 0, 0] != 255 and turned[0, 20, 20] == 255
    assert finetune.RandAugment(0)(ramp) is ramp


def test_mix_draws_one_lambda_for_each_128_images_and_mixup_or_cutmix():
    torch.manual_seed(0)
    labels = torch.arange(300)
    images = torch.eye(300)[:, :, None, None].expand(-1, -1, 2, 2)
    mixed, targets = finetune.mix(images, labels, 0.8, 0, 300)
    torch.testing.assert_close(mixed[:, :, 0, 0], targets)    # images and targets blend alike
    own = targets[labels, labels]
    assert [len(part.unique()) for part in own.split(128)] == [1, 1, 1] and len(own.unique()) == 3
    lambdas = torch.stack([finetune.mix(images[:2], labels[:2], 0.2, 0, 300)[1][0, 0] for _ in range(800)])
    assert lambdas.var().item() == pytest.approx(1 / (8 * 0.2 + 4), rel=0.15)    # Beta(a, a)
    black_and_white = torch.tensor([0.0, 1])[:, None, None, None].expand(2, 3, 8, 8)
    mixed = [finetune.mix(black_and_white, labels[:2], 1.0, 1.0, 2)[0][0] for _ in range(200)]
    assert sum(0 < image.median() < 1 for image in mixed) == pytest.approx(100, abs=35)    # or cutmix


@pytest.mark.parametrize("arguments, expected", [
    ("--init x", dict(epochs=300, warmup_epochs=5, batch_size=1024, optimizer="adamw", base_lr=1e-3, min_lr=1e-6, cutmix=0,
                      weight_decay=0.05, layer_decay=0.85, min_crop=0.08, randaug=10, mixup=0.2, erasing=0, smoothing=0,
                      drop_path=0, global_pool="avg", clip_grad=None, img_size=None, arch=None)),
    ("", dict(layer_decay=1, img_size=224, patch_size=16, arch="tiny", base_lr=1e-3)),
    ("--recipe original", dict(epochs=300, warmup_epochs=5, batch_size=1024, base_lr=2.5e-4, min_lr=1e-5, mixup=0.8, cutmix=1,
                               weight_decay=0.05, layer_decay=1, randaug=9, erasing=0.25, smoothing=0.1, drop_path=0.1,
                               global_pool="token", optimizer="adamw", min_crop=0.08)),
    ("--recipe transfer --init x --data cifar100", dict(
        epochs=50, warmup_epochs=10, batch_size=512, base_lr=0.05, min_lr=1e-6, weight_decay=0, layer_decay=0.75,
        clip_grad=1, randaug=0, mixup=0, global_pool="avg", optimizer="nesterov", preset="photos", img_size=None)),
    ("--recipe transfer --data flowers102 --epochs 300", dict(epochs=300, base_lr=0.05, img_size=224)),
    ("--mode linear", dict(epochs=90, warmup_epochs=10, batch_size=1024, optimizer="sgd", base_lr=0.75, min_lr=0,
                           weight_decay=0, randaug=0, mixup=0, global_pool=None)),
    ("--recipe original --cutmix 0 --base-lr 3 --global-pool avg --layer-decay 0.6", dict(
        cutmix=0, base_lr=3, global_pool="avg", mixup=0.8, layer_decay=0.6)),
])
def test_recipes_are_the_published_ones_and_typed_arguments_win(arguments, expected, monkeypatch):
    seen = []
    monkeypatch.setattr(finetune, "train", seen.append)
    finetune.main(["--data", "a_folder", *arguments.split()])
    args = vars(seen[0])
    assert {name: args[name] for name in expected} == expected


def test_init_gives_the_sizes_and_a_small_new_head(checkpoint, tmp_path, capsys):
    call(finetune, *TINY[2:], "--init", checkpoint, "--max-steps", 1, "--out", tmp_path / "run")    # step 1 has lr 0
    before, after = weights(tmp_path, "mae.pt"), weights(tmp_path / "run")
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items() if name in after)
    out = capsys.readouterr().out
    assert "randomly initialized: fc_norm.weight, fc_norm.bias; unused" in out and "head: Linear(in_features=96, out_features=10" in out
    assert after["head.weight"].std().item() == pytest.approx(2e-5, rel=0.1)
    assert log_of(tmp_path / "run")[0]["loss"] == pytest.approx(math.log(10), abs=1e-3)


def test_layer_decay_holds_in_a_run_and_the_position_learns_from_truncated_normal(tmp_path):
    call(finetune, *TINY, "--max-steps", 1, "--out", tmp_path)
    before = weights(tmp_path)
    assert [before[name].std().item() for name in ("pos_embed", "head.weight")] == pytest.approx([0.02, 0.02], rel=0.1)
    call(finetune, *TINY, "--max-steps", 3, "--layer-decay", 0.5, "--out", tmp_path)
    groups = torch.load(tmp_path / "last.pt", weights_only=True)["optimizer"]["param_groups"]
    rates = {name: group["lr"] for group in groups for name in group["names"]}
    assert rates["pos_embed"] == pytest.approx(rates["head.weight"] / 2 ** 7) and rates["pos_embed"] > 0
    assert not torch.equal(weights(tmp_path)["pos_embed"], before["pos_embed"])


def test_fig2_keep_blocks_keeps_the_lower_ones(checkpoint, tmp_path):
    call(finetune, *TINY, "--init", checkpoint, "--keep-blocks", 2, "--max-steps", 1, "--out", tmp_path / "run")
    before, after = weights(tmp_path, "mae.pt"), weights(tmp_path / "run")
    changed = {name[:8] for name in before if name in after and not torch.equal(before[name], after[name])}
    assert changed == {f"blocks.{block}" for block in (2, 3, 4, 5)} and after["blocks.2.norm1.bias"].abs().max() == 0


def test_accuracy_counts_the_best_class_and_the_best_five(monkeypatch, tmp_path):
    rankings = torch.tensor([[0, 1, 2, 3, 4], [1, 0, 2, 3, 4], [9, 8, 7, 6, 5], [5, 6, 7, 8, 9]])
    outputs = torch.zeros(4, 10).scatter(1, rankings, torch.arange(5.0, 0, -1).expand(4, 5))
    monkeypatch.setattr(finetune, "predict", lambda *args: (outputs, torch.tensor([0, 0, 5, 4])))
    args = finetune.argparse.Namespace(mode="finetune", real_labels=None, out=tmp_path)
    data = vit.ToyShapes(train=False)
    data.split = "validation"
    finetune.evaluate(args, nn.Identity(), data, data, "cpu")
    result = json.loads((tmp_path / "eval.json").read_text())
    assert (result["top1"], result["top5"]) == (25, 75)


@pytest.mark.parametrize("world", [1, 3, 5])
def test_predict_counts_each_image_once_over_ranks(world, monkeypatch):
    monkeypatch.setattr(finetune, "WORLD", world)
    monkeypatch.setattr(finetune.dist, "all_reduce", lambda tensor: None)
    data = [(torch.full((3, 8, 8), i, dtype=torch.uint8), i % 3) for i in range(41)]
    args = finetune.argparse.Namespace(data="toy", workers=0, img_size=8, seed=0)
    outputs, labels = 0, 0
    for rank in range(world):
        monkeypatch.setattr(finetune, "RANK", rank)
        own, own_labels = finetune.predict(args, nn.Flatten(), data, "cpu")
        outputs, labels = outputs + own, labels + own_labels
    pixels = (torch.stack([image for image, _ in data]) - finetune.MEAN) / finetune.STD
    torch.testing.assert_close(outputs, pixels.flatten(1))
    assert labels.tolist() == [i % 3 for i in range(41)]


def test_imagenet_real_and_v2_have_the_order_of_names_and_numbers(checkpoint, tmp_path, capsys):
    for label in range(12):
        (tmp_path / "v2" / str(label)).mkdir(parents=True)
        Image.new("RGB", (40, 40), (20 * label, 0, 0)).save(tmp_path / "v2" / str(label) / f"val_{11 - label:02}.png")
    args = finetune.argparse.Namespace(data=str(tmp_path / "v2"), fraction=1.0, long_tail=False)
    data = finetune.open_split(args, train=False)
    assert data.classes == [str(label) for label in range(12)]
    assert all(int(image[0, 0, 0]) == 20 * label for image, label in data)
    model = vit.vit_toy(img_size=32, patch_size=8, num_classes=12)
    torch.nn.init.zeros_(model.head.weight)
    model.head.bias.data = torch.eye(12)[7]    # always class 7
    torch.save(model.state_dict(), tmp_path / "file.pt")
    evaluate = ("--eval-only", "--init", tmp_path / "file.pt", "--data", tmp_path / "v2", "--workers", 0,
                "--real-labels", tmp_path / "real.json")
    for real, expected in (([[i] for i in range(12)], 100 / 12),                        # file 11 - label: file 7 is of class 4
                           ([[7, 3]] * 3 + [[]] * 6 + [[1]] * 3, 50)):                  # images without classes do not count
        (tmp_path / "real.json").write_text(json.dumps(real))
        call(finetune, *evaluate)
        result = json.loads((tmp_path / "eval.json").read_text())
        assert result["top1"] == pytest.approx(100 / 12) and result["real"] == pytest.approx(expected)
    (tmp_path / "real.json").write_text("[[1]]")
    assert "--real-labels: 1 images, --data has 12 files" in refused(capsys, finetune, *evaluate)


@pytest.mark.parametrize("name, kind, count", [
    ("flowers102", "Flowers102", 20), ("pets", "OxfordIIITPet", 10), ("aircraft", "FGVCAircraft", 10)])
def test_transfer_sets_are_torchvisions_with_their_published_splits(name, kind, count, monkeypatch):
    class Fake(list):
        def __init__(self, root, split, transform, download):
            sizes = {"train": 10, "val": 10, "trainval": 10, "test": 30}
            super().__init__((transform(Image.new("RGB", (9, 7))), i % 5) for i in range(sizes[split]))
    monkeypatch.setattr(torchvision.datasets, kind, Fake)
    args = finetune.parse(["--data", name], {**finetune.SETTINGS, **finetune.TRAINING}, "")
    data, validation = finetune.open_split(args, train=True), finetune.open_split(args, train=False)
    assert (len(data), len(validation)) == (count, 30) and data[0][0].shape == (3, 7, 9)
    args.fraction = 0.5
    assert len(finetune.open_split(args, train=True)) == count // 2

    def no_scipy(*args, **kw):
        raise ModuleNotFoundError("No module named 'scipy'")
    monkeypatch.setattr(torchvision.datasets, kind, no_scipy)
    with pytest.raises(finetune.UserError, match="pip install scipy"):
        finetune.open_split(args, train=False)


def test_finetune_runs_from_the_shell_and_evaluates_again(checkpoint, tmp_path):
    out = run("finetune.py", "--init", checkpoint, "--fraction", 0.02, "--epochs", 2, "--warmup-epochs", 1,
              "--out", tmp_path / "run")
    assert "done: step 5 of 5" in out and {"best.pt", "config.json"} <= {path.name for path in (tmp_path / "run").iterdir()}
    before = log_of(tmp_path / "run")
    call(finetune, "--eval-only", "--init", tmp_path / "run" / "best.pt")
    assert log_of(tmp_path / "run") == before    # nothing was renamed
    assert (tmp_path / "run" / "eval.json").exists()


def test_linear_probe_reads_the_normalized_class_token_and_evaluates_again(checkpoint, tmp_path, capsys):
    call(finetune, *TINY[2:], "--mode", "linear", "--init", checkpoint, "--out", tmp_path / "run")
    assert "feature: class token, normalized" in capsys.readouterr().out
    before, after = weights(tmp_path, "mae.pt"), weights(tmp_path / "run")
    assert all(torch.equal(after[name], before[name]) for name in after if not name.startswith("head."))
    call(finetune, "--eval-only", "--init", tmp_path / "run" / "last.pt")
    assert json.loads((tmp_path / "run" / "eval.json").read_text())["top1"] == log_of(tmp_path / "run")[-1]["top1"]


def test_knn_finds_training_images_among_themselves(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(vit, "toy_shapes", lambda n, size, seed: (SHAPES[0][:64], SHAPES[1][:64]))
    nearest = finetune.nearest_neighbors
    monkeypatch.setattr(finetune, "nearest_neighbors", lambda *args: nearest(*args, k=1))
    call(finetune, "--mode", "knn", "--init", checkpoint)
    assert json.loads((tmp_path / "knn.json").read_text())["top1"] == 100
    assert (tmp_path / "neighbors.png").stat().st_size > 1000


def test_resumed_run_equals_the_uninterrupted_one_with_all_that_is_random(tmp_path):
    """Steps 3, 7 and 10 are evaluated; a run that ends at 7 evaluates it once more and logs it once."""
    settings = (*TINY, *RANDOM, "--eval-every", 1)
    call(finetune, *settings, "--out", tmp_path / "whole")
    for steps in (4, 3, 10):
        call(finetune, *settings, "--out", tmp_path / "pieces", "--resume", "--max-steps", steps)
    same_state(tmp_path / "whole", tmp_path / "pieces")
    same_state(tmp_path / "whole", tmp_path / "pieces", name="best.pt")
    timeless = [[{name: value for name, value in entry.items() if name not in ("images_per_s", "data_wait")}
                 for entry in log_of(tmp_path / out)] for out in ("whole", "pieces")]
    assert timeless[0] == timeless[1] and [e["step"] for e in timeless[0] if "top1" in e] == [3, 7, 10]


def test_evaluation_that_was_killed_is_repeated(tmp_path, monkeypatch):
    settings = (*TINY, "--eval-every", 1, "--out", tmp_path / "killed")
    predict = finetune.predict

    def interrupted(*args):
        raise KeyboardInterrupt
    monkeypatch.setattr(finetune, "predict", interrupted)
    with pytest.raises(KeyboardInterrupt):    # after last.pt was written
        call(finetune, *settings)
    monkeypatch.setattr(finetune, "predict", predict)
    call(finetune, *settings, "--resume")
    call(finetune, *settings[:-1], tmp_path / "whole")
    same_state(tmp_path / "killed", tmp_path / "whole", name="best.pt")
    killed, whole = ([e["top1"] for e in log_of(tmp_path / out) if "top1" in e] for out in ("killed", "whole"))
    assert killed == whole


@pytest.mark.parametrize("arguments, message", [
    ("--mode linear --accum 2", "--accum: the probe's BatchNorm sees the whole batch"),
    ("--eval-only", "--eval-only needs --init CHECKPOINT"),
    ("--eval-only --init mae.pt", "no head for the 10 classes"),
    ("--eval-only --mode knn --init mae.pt", "no head for the 10 classes"),
    ("--arch tiny --init mae.pt", "cls_token: (1, 1, 96) in the file, (1, 1, 192) in the model"),
])
def test_bad_arguments_of_finetune_are_named_in_one_line(arguments, message, checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in refused(capsys, finetune, *arguments.split())


def test_class_that_is_not_in_both_splits_is_named(tmp_path, capsys):
    for folder in ("train/a", "train/b", "val/a", "val/c"):
        (tmp_path / folder).mkdir(parents=True)
        Image.new("RGB", (40, 40)).save(tmp_path / folder / "0.png")
    message = refused(capsys, finetune, "--data", tmp_path, "--out", tmp_path / "out")
    assert f"--data {tmp_path}: train/ and val/ need the same folders b c" in message
