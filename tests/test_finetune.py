"""finetune.py: published numbers, recipes, checkpoints, evaluation, resumption."""
import argparse
import json
import math

import numpy as np
import pytest
import torch
from conftest import GOLDENS, agrees, call, fill, log_of, refused, run, same_state
from PIL import Image
from torch import nn
from torchvision.transforms import v2

import finetune
import vit

SHORT = ("--fraction", 0.01, "--batch-size", 24, "--epochs", 3, "--warmup-epochs", 1,
         "--log-every", 1)  # 82 images, 10 steps
TINY = ("--patch-size", 8, *SHORT)
SHAPES = vit.toy_shapes(1024)  # the synthetic images, drawn once; a few are enough
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
    state = {**model.state_dict(), "mask_token": torch.zeros(1, 1, 8)}
    torch.save({"model": state}, tmp_path / "mae.pt")
    return tmp_path / "mae.pt"


@pytest.fixture
def save_classifier(tmp_path):
    """Saves a classifier that always answers `number`: the path."""
    def save(num_classes, number, **checkpoint):
        model = vit.vit_toy(img_size=32, patch_size=8, num_classes=num_classes)
        nn.init.zeros_(model.head.weight)
        model.head.bias.data = torch.eye(num_classes)[number]
        torch.save({"model": model.state_dict(), **checkpoint}, tmp_path / "classifier.pt")
        return tmp_path / "classifier.pt"
    return save


def make_folder(root, classes, images=2, size=40):
    """`images` PNGs in each class: root."""
    for number, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(images):
            image = Image.new("RGB", (size, size), (20 * number, 10 * i, 0))
            image.save(root / name / f"{name}{i}.png")
    return root


def weights(folder, name="last.pt"):
    return torch.load(folder / name, weights_only=True)["model"]


def result_of(folder, name="eval.json"):
    return json.loads((folder / name).read_text())


def started(monkeypatch, *arguments):
    """The settings, network and optimizer with which a training starts."""
    class Started(Exception):
        pass

    def start(args, data, model, optimizer, scaler):
        raise Started(args, model, optimizer)
    monkeypatch.setattr(finetune, "start", start)
    with pytest.raises(Started) as error:
        call(finetune, *arguments)
    return error.value.args


# ------------------------------------------------------------ the method

@pytest.mark.parametrize("decay", [0.75, 1.0])
def test_layer_decay_layer_i_learns_at_decay_to_the_depth_plus_1_minus_i(decay):
    model = vit.vit_tiny(num_classes=10, global_pool="avg" if decay == 1 else "token")
    groups = finetune.layer_decay_groups(model, base_lr=0.4, weight_decay=0.05, decay=decay)
    power = {"cls_token": 13, "pos_embed": 13, "patch_embed": 13, "norm": 0, "fc_norm": 0,
             "head": 0}
    power |= {f"blocks.{block}": 12 - block for block in range(12)}
    parameters = dict(model.named_parameters())
    names = [name for group in groups for name in group["names"]]
    assert sorted(names) == sorted(parameters)
    for group in groups:
        own = [id(parameters[name]) for name in group["names"]]
        assert own == [id(p) for p in group["params"]]
        for name in group["names"]:
            part = ".".join(name.split(".")[:1 + name.startswith("blocks")])
            scale = pytest.approx(decay ** power[part])
            assert group["lr_scale"] == scale and group["lr"] / 0.4 == scale
            free = parameters[name].ndim == 1 or name in ("cls_token", "pos_embed")
            assert group["weight_decay"] == (0 if free else 0.05)


def test_nearest_neighbors_vote_with_exp_of_similarity_over_temperature():
    """One neighbor of class 0 at similarity 1, two of class 1 at s: 2 exp(s / T) or exp(1 / T)."""
    for s, winner in ((1 - 0.04, 1), (1 - 0.06, 0)):  # T log 2 = 0.0485
        side = math.sqrt(1 - s * s)
        gallery = torch.tensor([[1, 0], [s, side], [s, -side]])
        gallery *= torch.tensor([[3.0], [1], [7]])  # lengths do not count
        labels = torch.tensor([0, 1, 1])
        ranking = finetune.nearest_neighbors(gallery, labels, torch.tensor([[2.0, 0]]), 2)
        assert ranking.tolist() == [[winner, 1 - winner]]
        queries = torch.tensor([[2.0, 0]])
        ranking = finetune.nearest_neighbors(gallery, labels, queries, 2, temperature=0.2)
        assert ranking[0, 0] == 1  # T log 2 = 0.139


def test_nearest_neighbors_of_separable_features_are_right_and_only_k_vote():
    torch.manual_seed(0)
    labels = torch.arange(280) % 7
    gallery, queries = torch.eye(7, 32)[labels] * 10 + torch.randn(2, 280, 32)
    ranking = finetune.nearest_neighbors(gallery, labels, queries, 7)
    assert ranking.shape == (280, 5) and torch.equal(ranking[:, 0], labels)
    gallery = torch.tensor([[1, 0.0], [0.9, 0.1], [0.9, 0.1]])
    ranking = finetune.nearest_neighbors(gallery, torch.tensor([0, 1, 1]), gallery[:1], 2, k=1)
    assert ranking[0, 0] == 0


def test_probe_head_is_the_published_batch_norm_and_linear():
    golden, rng = GOLDENS["15_lin_probe"], np.random.RandomState(31)
    features = rng.standard_normal((16, 48))
    features = features * (0.5 + rng.random_sample(48)) + rng.standard_normal(48)
    head = fill(finetune.new_head(48, 10, probe=True), "head.")
    agrees(head(torch.from_numpy(features)), golden["output_training"])
    agrees(head[0].running_mean, golden["running_mean_after"])
    agrees(head[0].running_var, golden["running_var_after"])
    features = torch.from_numpy(np.random.RandomState(32).standard_normal((16, 48)))
    agrees(head.eval()(features), golden["output_eval_of_features_2"])


def test_new_heads_are_normal_with_the_published_deviation():
    torch.manual_seed(0)
    head = finetune.new_head(192, 500, probe=False)
    probe = finetune.new_head(192, 500, probe=True)[1]
    assert head.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert head.weight.abs().max() < 0.02 * 6
    assert probe.weight.std().item() == pytest.approx(0.01, rel=0.02)
    assert head.bias.abs().max() == probe.bias.abs().max() == 0


def test_mix_draws_one_lambda_for_each_128_images_and_mixup_or_cutmix():
    torch.manual_seed(0)
    labels = torch.arange(300)
    images = torch.eye(300)[:, :, None, None].expand(-1, -1, 2, 2)
    mixed, targets = finetune.mix(images, labels, 0.8, 0, 300)
    torch.testing.assert_close(mixed[:, :, 0, 0], targets)  # images and targets blend alike
    own = targets[labels, labels]
    assert [len(part.unique()) for part in own.split(128)] == [1, 1, 1]
    assert len(own.unique()) == 3
    lambdas = [finetune.mix(images[:2], labels[:2], 0.2, 0, 300)[1][0, 0] for _ in range(800)]
    variance = torch.stack(lambdas).var().item()
    assert variance == pytest.approx(1 / (8 * 0.2 + 4), rel=0.15)  # Beta(a, a)
    black_and_white = torch.tensor([0.0, 1])[:, None, None, None].expand(2, 3, 8, 8)
    mixed = [finetune.mix(black_and_white, labels[:2], 1.0, 1.0, 2)[0][0] for _ in range(200)]
    blended = sum(0 < image.median() < 1 for image in mixed)
    assert blended == pytest.approx(100, abs=35)  # else cutmix


# ------------------------------------------------------------ recipes

@pytest.mark.parametrize("arguments, expected", [
    ("--init x", dict(
        epochs=300, warmup_epochs=5, batch_size=1024, optimizer="adamw", base_lr=1e-3, min_lr=1e-6,
        cutmix=0, weight_decay=0.05, layer_decay=0.85, min_crop=0.08, randaug=10, mixup=0.2,
        erasing=0, smoothing=0, drop_path=0, global_pool="avg", clip_grad=None)),
    ("--recipe original", dict(
        epochs=300, warmup_epochs=5, batch_size=1024, base_lr=1e-3, min_lr=1e-6, mixup=0.8,
        cutmix=1, weight_decay=0.05, layer_decay=0.85, randaug=9, erasing=0.25, smoothing=0.1,
        drop_path=0.1, global_pool="avg", optimizer="adamw", min_crop=0.08)),
    ("--recipe transfer --init x", dict(
        epochs=50, warmup_epochs=10, batch_size=512, base_lr=0.05, min_lr=1e-6, weight_decay=0,
        layer_decay=0.75, clip_grad=1, randaug=0, mixup=0, global_pool="avg", min_crop=0.08,
        optimizer="nesterov", preset="photos")),
    ("--recipe transfer --epochs 300 --warmup-epochs 20", dict(epochs=300, base_lr=0.05)),
    ("--mode linear", dict(
        recipe="linear", epochs=90, warmup_epochs=10, batch_size=1024, optimizer="sgd",
        base_lr=0.75, min_lr=0, weight_decay=0, randaug=0, mixup=0, global_pool=None)),
    ("--recipe original --cutmix 0 --base-lr 3 --global-pool token --layer-decay 0.6", dict(
        cutmix=0, base_lr=3, global_pool="token", mixup=0.8, layer_decay=0.6)),
    ("--epochs 1000", dict(epochs=1000, warmup_epochs=5, base_lr=1e-3)),
])
def test_recipes_are_the_published_ones_and_typed_arguments_win(arguments, expected):
    argv = ["--data", "a_folder", *arguments.split()]
    args = finetune.parse(argv, finetune.settings, finetune.PRESETS, "out", finetune.RECIPES)
    assert {name: vars(args)[name] for name in expected} == expected


def test_transfer_is_one_recipe_whatever_the_size_of_the_images():
    parsed = []
    for data in ("cifar100", "fashionmnist", "a_folder"):
        argv = ["--recipe", "transfer", "--data", data]
        args = finetune.parse(argv, finetune.settings, finetune.PRESETS, "out", finetune.RECIPES)
        parsed.append({**vars(args), "data": None})
    assert parsed[0] == parsed[1] == parsed[2]


def test_help_shows_the_values_of_the_recipe_before_it(capsys):
    with pytest.raises(SystemExit):
        call(finetune, "--recipe", "transfer", "--help")
    out = " ".join(capsys.readouterr().out.split())
    assert "per 256 images (default: 0.05)" in out and "{adamw,sgd,nesterov}" in out


@pytest.mark.parametrize("recipe", ["improved", "original"])
@pytest.mark.parametrize("pretrained", [True, False])
def test_each_tensor_learns_at_the_published_rate(
        recipe, pretrained, image_folder, tmp_path, monkeypatch):
    """The peak in the authors' finetuning_exp.py and finetuning_mae_exp.py, batch 1024."""
    arguments = ["--recipe", recipe, "--data", image_folder, "--out", tmp_path / "run"]
    if pretrained:
        state = vit.vit_tiny(global_pool="token").state_dict()
        torch.save({"model": state}, tmp_path / "mae.pt")
        arguments += ["--init", tmp_path / "mae.pt"]
    _, model, optimizer = started(monkeypatch, *arguments)
    rates = {name: group["lr"] for group in optimizer.param_groups for name in group["names"]}
    table = {
        "head.weight": 4e-3, "fc_norm.weight": 4e-3,
        "blocks.11.attn.qkv.weight": 3.4e-3, "blocks.10.attn.qkv.weight": 2.89e-3,
        "blocks.9.attn.qkv.weight": 2.4565e-3, "blocks.8.attn.qkv.weight": 2.0880e-3,
        "blocks.7.attn.qkv.weight": 1.7748e-3, "blocks.6.attn.qkv.weight": 1.5086e-3,
        "blocks.5.attn.qkv.weight": 1.2823e-3, "blocks.4.attn.qkv.weight": 1.0900e-3,
        "blocks.3.attn.qkv.weight": 0.92646e-3, "blocks.2.attn.qkv.weight": 0.78750e-3,
        "blocks.1.attn.qkv.weight": 0.66937e-3, "blocks.0.attn.qkv.weight": 0.56896e-3,
        "patch_embed.proj.weight": 0.48362e-3, "cls_token": 0.48362e-3, "pos_embed": 0.48362e-3}
    assert {name: rates[name] for name in table} == pytest.approx(table, rel=1e-4)
    for name, rate in rates.items():  # all tensors of a part learn alike
        parts = name.split(".")
        if parts[0] == "blocks":
            assert rate == rates[f"blocks.{parts[1]}.attn.qkv.weight"]
    assert rates.keys() == dict(model.named_parameters()).keys()
    assert all(parameter.requires_grad for parameter in model.parameters())
    decays = {group["weight_decay"] for group in optimizer.param_groups if group["params"]}
    assert decays == {0.0, 0.05} and optimizer.defaults["betas"] == (0.9, 0.999)


@pytest.mark.parametrize("strength, place", [(9, 27), (10, 30)])
def test_randaugment_is_torchvisions_two_operations_each_half_the_time(strength, place):
    args = argparse.Namespace(img_size=32, min_crop=0.08, randaug=strength, erasing=0)
    transforms = finetune.Samples([], args).transform.transforms
    assert [type(transform) for transform in transforms[2:]] == [v2.RandomApply] * 2
    for transform in transforms[2:]:
        operation, = transform.transforms
        assert transform.p == 0.5 and type(operation) is v2.RandAugment
        assert (operation.num_ops, operation.magnitude) == (1, place)
        assert operation.num_magnitude_bins == 31 and operation.fill == [124, 116, 104]
    args.randaug = 0
    assert len(finetune.Samples([], args).transform.transforms) == 2


def test_augmentation_changes_half_of_the_images_twice_as_often_as_once():
    args = argparse.Namespace(img_size=32, min_crop=1, randaug=10, erasing=0)
    augment = v2.Compose(finetune.Samples([], args).transform.transforms[2:])
    image = SHAPES[0][3]
    torch.manual_seed(0)
    same = np.mean([torch.equal(augment(image), image) for _ in range(2000)])
    assert 0.25 < same < 0.4  # (1/2)^2, and the operations that happen to change nothing


def test_erasing_replaces_normalized_pixels_by_normal_noise():
    args = argparse.Namespace(img_size=64, min_crop=1, randaug=0, erasing=1.0, seed=0)
    gray = torch.full((3, 64, 64), 128, dtype=torch.uint8)
    noise = []
    for v in range(50):
        image, label = finetune.Samples([(gray, 7)], args)[v]
        assert label == 7
        erased = (image[0] - image[0].mode().values.mode().values).abs() > 1e-3
        assert 0.01 < erased.float().mean() < 0.35
        noise.append(image[:, erased].flatten())
    noise = torch.cat(noise)
    assert abs(noise.mean()) < 0.02 and noise.std().item() == pytest.approx(1, abs=0.02)


# ------------------------------------------------------------ the network

def test_init_gives_the_sizes_and_a_new_head(checkpoint, tmp_path, capsys):
    call(finetune, *SHORT, "--init", checkpoint, "--max-steps", 1, "--out", tmp_path / "run")
    before, after = weights(tmp_path, "mae.pt"), weights(tmp_path / "run")  # step 1 has lr 0
    kept = [name for name in before if name in after]
    assert len(kept) > 50 and all(torch.equal(after[name], before[name]) for name in kept)
    out = capsys.readouterr().out
    assert "randomly initialized: fc_norm; unused" in out
    assert "head: Linear(in_features=96, out_features=10" in out
    assert after["head.weight"].std().item() == pytest.approx(0.02, rel=0.1)


def test_layer_decay_holds_in_a_run_and_the_position_learns(tmp_path):
    call(finetune, *TINY, "--max-steps", 1, "--out", tmp_path / "a")
    before = weights(tmp_path / "a")
    stds = [before[name].std().item() for name in ("pos_embed", "head.weight")]
    assert stds == pytest.approx([0.02, 0.02], rel=0.1)  # from scratch: truncated normal
    call(finetune, *TINY, "--max-steps", 3, "--layer-decay", 0.5, "--out", tmp_path / "b")
    last = torch.load(tmp_path / "b" / "last.pt", weights_only=True)
    groups = last["optimizer"]["param_groups"]
    rates = {name: group["lr"] for group in groups for name in group["names"]}
    assert rates["pos_embed"] == pytest.approx(rates["head.weight"] / 2 ** 7)
    assert rates["pos_embed"] > 0
    assert not torch.equal(last["model"]["pos_embed"], before["pos_embed"])


def test_fig2_keep_blocks_keeps_the_lower_ones(checkpoint, tmp_path, capsys):
    call(finetune, *SHORT, "--init", checkpoint, "--keep-blocks", 2, "--max-steps", 1,
         "--out", tmp_path / "run")
    before, after = weights(tmp_path, "mae.pt"), weights(tmp_path / "run")
    kept = [name for name in before if name in after]
    changed = {name[:8] for name in kept if not torch.equal(before[name], after[name])}
    assert changed == {f"blocks.{block}" for block in (2, 3, 4, 5)}
    assert after["blocks.2.norm1.bias"].abs().max() == 0
    assert "--keep-blocks: 4 upper blocks randomly initialized" in capsys.readouterr().out


@pytest.mark.parametrize("prefix", ["encoder.", "teacher."])
def test_checkpoints_of_simmim_and_dino_are_fine_tuned(prefix, tmp_path):
    state = vit.vit_toy(img_size=32, patch_size=8, global_pool="token").state_dict()
    state = {prefix + name: tensor for name, tensor in state.items()}
    torch.save({"model": state, "config": {"num_heads": 12}}, tmp_path / "last.pt")
    call(finetune, *SHORT, "--init", tmp_path / "last.pt", "--max-steps", 1,
         "--out", tmp_path / "run")
    after = weights(tmp_path / "run")
    assert torch.equal(after["blocks.5.mlp.fc1.weight"], state[f"{prefix}blocks.5.mlp.fc1.weight"])


def test_supervised_network_of_other_classes_and_3_heads_is_transferred(tmp_path, capsys):
    """ImageNet-21k's folders, say, then fewer classes: the head is new, the rest is not."""
    first = make_folder(tmp_path / "many" / "train", ["a", "b", "c"])
    make_folder(tmp_path / "many" / "val", ["a", "b", "c"])
    few = make_folder(tmp_path / "few" / "train", ["x", "y"]).parent
    make_folder(few / "val", ["x", "y"])
    short = ("--batch-size", 4, "--epochs", 2, "--warmup-epochs", 1, "--workers", 0)
    call(finetune, "--data", first.parent, "--arch", "toy", "--img-size", 32, "--patch-size", 8,
         "--num-heads", 3, *short, "--out", tmp_path / "a")
    for arguments in (("--recipe", "transfer"), ()):
        out = tmp_path / f"b{len(arguments)}"
        call(finetune, "--data", few, *arguments, "--init", tmp_path / "a" / "last.pt", *short,
             "--max-steps", 1, "--out", out)
        before, after = weights(tmp_path / "a"), weights(out)
        kept = [name for name in before if not name.startswith("head.")]
        assert all(torch.equal(before[name], after[name]) for name in kept)
        assert len(after["head.bias"]) == 2 and "3 heads" in capsys.readouterr().out
        assert result_of(out, "config.json")["num_heads"] == 3


# ------------------------------------------------------------ evaluation

def test_accuracy_counts_the_best_class_and_the_best_five():
    rows = [[0, 1, 2, 3, 4], [1, 0, 2, 3, 4], [9, 8, 7, 6, 5], [5, 6, 7, 8, 9]]
    result = finetune.accuracy(torch.tensor(rows), torch.tensor([0, 0, 5, 4]))
    assert result == {"top1": 25, "top5": 75}


@pytest.mark.parametrize("world", [1, 3, 5])
def test_predict_counts_each_image_once_over_ranks(world, monkeypatch):
    class Pixels(nn.Flatten):
        pos_embed = torch.zeros(1)

    class Images(list):
        targets = [i % 3 for i in range(41)]

    def all_reduce(tensor):
        """Each rank's share is summed below."""
    monkeypatch.setattr(finetune, "WORLD", world)
    monkeypatch.setattr(finetune.dist, "all_reduce", all_reduce)
    data = Images((torch.full((3, 8, 8), i, dtype=torch.uint8), i % 3) for i in range(41))
    args = argparse.Namespace(workers=0, img_size=8, min_crop=1, randaug=0, erasing=0)
    outputs = 0
    for rank in range(world):
        monkeypatch.setattr(finetune, "RANK", rank)
        own, labels = finetune.predict(args, Pixels(), data)
        outputs = outputs + own
    pixels = (torch.stack([image for image, _ in data]) - vit.MEAN) / vit.STD
    torch.testing.assert_close(outputs, pixels.flatten(1))
    assert labels.tolist() == [i % 3 for i in range(41)]


@pytest.mark.parametrize("published", [True, False])
def test_imagenet_v2_has_folders_that_are_numbers(published, save_classifier, tmp_path, capsys):
    names = [f"n{number:04}" for number in range(12)]
    config = {} if published else {"config": {"classes": names}}
    evaluate = ("--eval-only", "--init", save_classifier(12, 7, **config), "--workers", 0,
                "--out", tmp_path, "--data")
    call(finetune, *evaluate, make_folder(tmp_path / "all", [str(n) for n in range(12)]))
    assert result_of(tmp_path)["top1"] == pytest.approx(100 / 12)
    assert "validation: 24 images of 12 classes" in capsys.readouterr().out
    call(finetune, *evaluate, make_folder(tmp_path / "one", ["7"]))
    assert result_of(tmp_path)["top1"] == 100


def test_a_part_of_the_classes_is_evaluated_by_name(save_classifier, tmp_path, capsys):
    """ImageNet-A and -R: 200 of 1,000 folders, and the best of these 200 outputs."""
    path = save_classifier(4, 2, config={"classes": ["ant", "bee", "cat", "dog"]})
    data = make_folder(tmp_path / "a", ["dog", "cat"])  # outputs 2, 3: now places 0, 1
    evaluate = ("--eval-only", "--init", path, "--workers", 0, "--out", tmp_path, "--data")
    call(finetune, *evaluate, data)
    assert result_of(tmp_path)["top1"] == 50
    call(finetune, *evaluate, make_folder(tmp_path / "b", ["ant", "dog"]))
    assert result_of(tmp_path)["top1"] == 50  # cat is none of them: ties, the first
    other = make_folder(tmp_path / "c", ["dog", "emu"])
    message = refused(capsys, finetune, *evaluate, other)
    assert message == "--data: 2 classes, --init: 4 with 4 names, not ['emu']"


def test_without_class_names_the_numbers_of_classes_must_agree(save_classifier, tmp_path, capsys):
    data = make_folder(tmp_path / "a", ["ant", "bee", "cat"])
    evaluate = ("--eval-only", "--workers", 0, "--out", tmp_path, "--data", data, "--init")
    call(finetune, *evaluate, save_classifier(3, 1))
    assert result_of(tmp_path)["top1"] == pytest.approx(100 / 3)
    message = refused(capsys, finetune, *evaluate, save_classifier(4, 1))
    assert message.startswith("--data: 3 classes, --init: 4 with 0 names, not ['ant',")


def test_checkpoints_hold_the_names_of_the_classes(tmp_path):
    call(finetune, *TINY, "--max-steps", 1, "--out", tmp_path)
    last = torch.load(tmp_path / "last.pt", weights_only=True)
    assert last["config"]["classes"] == list(vit.TOY_CLASSES)


def test_best_linear_probe_is_evaluated_as_in_its_log(checkpoint, tmp_path, capsys):
    call(finetune, *SHORT, "--mode", "linear", "--init", checkpoint, "--eval-every", 1,
         "--out", tmp_path / "linear")
    logged = [entry for entry in log_of(tmp_path / "linear") if "top1" in entry]
    best = max(logged, key=lambda entry: entry["top1"])
    path = tmp_path / "linear" / "best.pt"
    capsys.readouterr()
    call(finetune, "--eval-only", "--init", path, "--out", tmp_path)
    result = result_of(tmp_path)
    assert (result["top1"], result["top5"]) == (best["top1"], best["top5"])
    said = f"{path}: randomly initialized: nothing; unused in the file: nothing"
    assert len(logged) == 3 and said in capsys.readouterr().out


def test_linear_probe_reads_the_normalized_class_token(checkpoint, tmp_path, capsys):
    call(finetune, *SHORT, "--mode", "linear", "--init", checkpoint, "--out", tmp_path / "run")
    assert "feature: --global-pool token" in capsys.readouterr().out
    before, after = weights(tmp_path, "mae.pt"), weights(tmp_path / "run")
    kept = [name for name in after if not name.startswith("head.")]
    assert all(torch.equal(after[name], before[name]) for name in kept)


def test_knn_finds_training_images_among_themselves(checkpoint, tmp_path, monkeypatch):
    def shapes(n, size, seed):
        return SHAPES[0][:64], SHAPES[1][:64]

    def vote_of_one(*args):
        return nearest(*args, k=1)
    nearest = finetune.nearest_neighbors
    monkeypatch.setattr(vit, "toy_shapes", shapes)
    monkeypatch.setattr(finetune, "nearest_neighbors", vote_of_one)
    call(finetune, "--mode", "knn", "--init", checkpoint, "--out", tmp_path)
    assert result_of(tmp_path, "knn.json")["top1"] == 100


def test_knn_of_an_untrained_network_takes_the_class_token_too(tmp_path, capsys):
    call(finetune, *TINY, "--mode", "knn", "--fraction", 0.01, "--out", tmp_path)
    assert "feature: --global-pool token" in capsys.readouterr().out
    assert result_of(tmp_path, "knn.json")["top1"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [("--mode", "knn"), ("--eval-only",)])
def test_two_ranks_evaluate_as_one(arguments, image_folder, tmp_path):
    call(finetune, "--data", image_folder, "--arch", "toy", "--img-size", 32, "--patch-size", 8,
         "--batch-size", 12, "--epochs", 2, "--warmup-epochs", 1, "--out", tmp_path / "run")
    results = []
    for ranks in (1, 2):
        out = tmp_path / str(ranks)
        run("finetune.py", *arguments, "--init", tmp_path / "run" / "last.pt",
            "--data", image_folder, "--out", out, ranks=ranks)
        written, = out.glob("*.json")
        results.append({name: json.loads(written.read_text())[name] for name in ("top1", "top5")})
    assert results[0] == results[1]


@pytest.mark.slow
def test_two_ranks_train_a_linear_probe(checkpoint, tmp_path):
    """On a CPU each rank has its own BatchNorm: the loss is only near that of one rank."""
    for ranks in (1, 2):
        run("finetune.py", *SHORT, "--mode", "linear", "--init", checkpoint, "--max-steps", 4,
            "--out", tmp_path / str(ranks), ranks=ranks)
    losses = [[entry["loss"] for entry in log_of(tmp_path / ranks)] for ranks in "12"]
    np.testing.assert_allclose(losses[1], losses[0], rtol=0.1)


# ------------------------------------------------------------ data

@pytest.mark.parametrize("folders, message", [
    (("train/a", "train/b", "val/a", "val/c"), "only one: ['b', 'c']"),
    (("train/a", "train/b"), "needs train/ and val/ in it"),
    (("a", "b"), "needs train/ and val/ in it"),
    (("train", "val"), "needs train/CLASS, val/CLASS"),
])
def test_what_is_missing_in_a_folder_is_named(folders, message, tmp_path, capsys):
    for folder in folders:
        (tmp_path / folder).mkdir(parents=True)
        Image.new("RGB", (40, 40)).save(tmp_path / folder / "0.png")
    line = refused(capsys, finetune, "--data", tmp_path, "--out", tmp_path / "out")
    assert line.startswith(f"--data {tmp_path}: ") and message in line


def test_validation_images_are_never_the_training_images(tmp_path, capsys):
    for split in ("train", "val"):
        make_folder(tmp_path / split, ["a", "b"])
        for arguments in ((), ("--mode", "knn"), ("--fraction", 0.5)):
            line = refused(capsys, finetune, "--data", tmp_path / split, *arguments)
            assert line == f"--data {tmp_path / split}: needs train/ and val/ in it"


@pytest.mark.parametrize("arguments, message", [
    ("--mode linear --accum 2", "--accum: not with linear, whose BatchNorm needs the whole batch"),
    ("--eval-only", "no head, nothing to evaluate"),
    ("--eval-only --init mae.pt", "no head, nothing to evaluate"),
    ("--keep-blocks -1", "--keep-blocks: invalid choice: -1"),
    ("--keep-blocks 7 --init mae.pt", "--keep-blocks: up to 6; not with --eval-only"),
    ("--eval-only --keep-blocks 2 --init mae.pt", "--keep-blocks: up to 6; not with --eval-only"),
    ("--global-pool max", "--global-pool: invalid choice: 'max'"),
])
def test_bad_arguments_of_finetune_are_named_in_one_line(
        arguments, message, checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in refused(capsys, finetune, *arguments.split())


# ------------------------------------------------------------ runs

def test_finetune_trains_and_evaluates_again(checkpoint, tmp_path, capsys):
    call(finetune, "--init", checkpoint, "--fraction", 0.02, "--epochs", 2, "--warmup-epochs", 1,
         "--out", tmp_path / "run")
    out = capsys.readouterr().out
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert "step 5 of 5" in out and {"best.pt", "last.pt", "config.json"} <= names
    before = log_of(tmp_path / "run")
    call(finetune, "--eval-only", "--init", tmp_path / "run" / "best.pt", "--out", tmp_path / "run")
    assert log_of(tmp_path / "run") == before
    assert (tmp_path / "run" / "eval.json").exists()


def test_sgd_survives_a_first_step_that_fp16_skips(checkpoint, tmp_path, monkeypatch):
    """A fused SGD would start from uninitialized momentum."""
    class Overflowing(torch.amp.GradScaler):
        def __init__(self, device, enabled):
            super().__init__(device, init_scale=2.0 ** 60, backoff_factor=2.0 ** -50)

    def empty_like(tensor, **kw):
        return torch.full_like(tensor, math.nan, **kw)
    monkeypatch.setattr(torch.amp, "GradScaler", Overflowing)
    monkeypatch.setattr(torch, "empty_like", empty_like)  # what uninitialized memory may hold
    call(finetune, *SHORT, "--recipe", "transfer", "--init", checkpoint, "--amp", "fp16",
         "--optimizer", "sgd", "--max-steps", 4, "--out", tmp_path / "run")
    log = [entry for entry in log_of(tmp_path / "run") if "loss" in entry]
    assert ["grad_norm" in entry for entry in log] == [False, True, True, True]
    after = weights(tmp_path / "run")
    assert all(tensor.isfinite().all() for tensor in after.values())
    assert not torch.equal(after["pos_embed"], weights(tmp_path, "mae.pt")["pos_embed"])


@pytest.mark.slow
def test_resumed_run_equals_the_uninterrupted_one_with_all_that_is_random(tmp_path):
    """Steps 3, 7 and 10 are evaluated, also where a run ends at 7."""
    settings = (*TINY, *RANDOM, "--eval-every", 1)
    call(finetune, *settings, "--out", tmp_path / "whole")
    for steps in (4, 3, 10):
        call(finetune, *settings, "--out", tmp_path / "pieces", "--resume", "--max-steps", steps)
    same_state(tmp_path / "whole", tmp_path / "pieces")
    same_state(tmp_path / "whole", tmp_path / "pieces", name="best.pt")
    logs = []
    for name in ("whole", "pieces"):
        logs.append(log_of(tmp_path / name))
        for entry in logs[-1]:
            entry.pop("images_per_s", None)
            entry.pop("data_wait", None)
    assert logs[0] == logs[1]
    assert [entry["step"] for entry in logs[0] if "top1" in entry] == [3, 7, 10]


@pytest.mark.slow
def test_evaluation_that_was_killed_is_repeated(tmp_path, monkeypatch):
    settings = (*TINY, "--save-minutes", 0, "--out", tmp_path / "killed")  # saves after each step
    predict = finetune.predict

    def interrupted(*args):
        raise KeyboardInterrupt
    monkeypatch.setattr(finetune, "predict", interrupted)
    with pytest.raises(KeyboardInterrupt):
        call(finetune, *settings)
    monkeypatch.setattr(finetune, "predict", predict)
    call(finetune, *settings, "--resume")
    call(finetune, *settings[:-1], tmp_path / "whole")
    same_state(tmp_path / "killed", tmp_path / "whole", name="best.pt")
    results = []
    for name in ("killed", "whole"):
        results.append([entry["top1"] for entry in log_of(tmp_path / name) if "top1" in entry])
    assert results[0] == results[1]


def test_resumed_run_needs_no_init_file(checkpoint, tmp_path, monkeypatch):
    settings = (*SHORT, "--init", checkpoint, "--mode", "linear")
    call(finetune, *settings, "--out", tmp_path / "whole")
    call(finetune, *settings, "--max-steps", 4, "--out", tmp_path / "pieces")
    checkpoint.unlink()
    call(finetune, "--mode", "linear", "--resume", "--out", tmp_path / "pieces")
    same_state(tmp_path / "whole", tmp_path / "pieces")


def test_resume_of_a_probe_takes_its_settings_from_the_default_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    call(finetune, *SHORT, "--mode", "linear", "--max-steps", 4)
    call(finetune, "--mode", "linear", "--resume")
    assert log_of(tmp_path / "runs" / "finetune")[-1]["step"] == 10


@pytest.mark.parametrize("arguments", [("--eval-only",), ("--mode", "knn")])
def test_resume_is_for_training_only(arguments, checkpoint, tmp_path, capsys):
    """Else the run in --out would be evaluated, not the file of --init."""
    call(finetune, *TINY, "--max-steps", 1, "--out", tmp_path / "run")
    line = refused(capsys, finetune, *arguments, "--init", checkpoint, "--resume",
                   "--out", tmp_path / "run")
    assert line == "--resume continues a training run; here give --init"
    assert not list((tmp_path / "run").glob("[ek]*.json"))


def test_resumed_run_says_nothing_of_kept_blocks_or_a_new_head(checkpoint, tmp_path, capsys):
    settings = (*SHORT, "--init", checkpoint, "--keep-blocks", 2, "--out", tmp_path / "run")
    call(finetune, *settings, "--max-steps", 1)
    out = capsys.readouterr().out
    assert "upper blocks randomly initialized" in out and "unused in the file" in out
    call(finetune, *settings, "--max-steps", 1, "--resume")
    out = capsys.readouterr().out
    assert "step 2 of 10" in out and "--keep-blocks 2" in out
    assert "randomly initialized" not in out and "unused in the file" not in out


def test_transfer_runs_with_the_synthetic_shapes(tmp_path, monkeypatch):
    args, _, _ = started(monkeypatch, "--recipe", "transfer", "--img-size", 32, "--patch-size", 8,
                         "--out", tmp_path)
    assert (args.fraction, args.batch_size) == (1.0, 512)


def test_sizes_are_those_of_init_or_typed(checkpoint, tmp_path, capsys):
    """Without --init they are the preset's (toy: 32 px, patch 4)."""
    call(finetune, *SHORT, "--init", checkpoint, "--img-size", 48, "--global-pool", "token",
         "--max-steps", 1, "--out", tmp_path / "run")
    assert "48 px, 12 heads; feature: --global-pool token" in capsys.readouterr().out
    config = result_of(tmp_path / "run", "config.json")
    assert (config["img_size"], config["patch_size"], config["global_pool"]) == (48, 8, "token")
    assert weights(tmp_path / "run")["pos_embed"].shape == (1, 1 + 36, 96)
    call(finetune, *SHORT, "--max-steps", 1, "--out", tmp_path / "scratch")
    assert "32 px, 12 heads; feature: --global-pool avg" in capsys.readouterr().out
    assert weights(tmp_path / "scratch")["pos_embed"].shape == (1, 1 + 64, 96)
