"""finetune.py: the recipes against their definitions, checkpoints of every format, evaluation, exact resumption, bad input."""
import argparse
import collections
import functools
import json
import math
import os
import re
import signal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import call, finish, killed_and_resumed_equals_uninterrupted, launch, log_of, losses, refused, same_state, start, wait_for_lines
from torchvision.transforms import v2

import finetune
import mae
import vit

TINY = ("--patch-size", 8, "--fraction", 0.01, "--batch-size", 24, "--epochs", 3, "--warmup-epochs", 1, "--log-every", 1)
#       82 images, 4 steps an epoch
RANDOM = ("--mixup", 0.8, "--cutmix", 1, "--erasing", 0.25, "--drop-path", 0.2, "--smoothing", 0.1)
toy_shapes = functools.lru_cache(vit.toy_shapes)


@pytest.fixture(autouse=True)
def drawn_once(monkeypatch):
    """The toy images are drawn once for all tests, and of the held-out ones a quarter is enough."""
    monkeypatch.setattr(vit, "toy_shapes", lambda n, size, seed: tuple(
        x.clone() for x in toy_shapes(n // 4 if seed else n, size, seed=seed)))


def weights(folder, name="last.pt"):
    return torch.load(folder / name, weights_only=True)["model"]


# ------------------------------------------------------------------------------------------------ layer-wise decay

@pytest.mark.parametrize("decay", [0.75, 0.85, 1.0])
def test_layer_i_learns_at_decay_to_the_depth_plus_1_minus_i(decay):
    """Every parameter of ViT-Tiny, by name, in exactly one group."""
    model = vit.vit_tiny(num_classes=10, global_pool="avg")
    groups = finetune.layer_decay_groups(model, base_lr=0.4, weight_decay=0.05, decay=decay)
    expected = {"cls_token": 13, "pos_embed": 13, "patch_embed.proj.weight": 13, "patch_embed.proj.bias": 13,
                "fc_norm.weight": 0, "fc_norm.bias": 0, "head.weight": 0, "head.bias": 0}
    for block in range(12):
        for part in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"):
            expected |= {f"blocks.{block}.{part}.{leaf}": 12 - block for leaf in ("weight", "bias")}
    parameters = dict(model.named_parameters())
    assert expected.keys() == parameters.keys()
    assert collections.Counter(name for group in groups for name in group["names"]) == dict.fromkeys(expected, 1)
    for group in groups:
        assert [id(parameters[name]) for name in group["names"]] == [id(p) for p in group["params"]]
        for name in group["names"]:
            assert group["lr_scale"] == pytest.approx(decay ** expected[name], rel=1e-12)
            assert group["lr"] == pytest.approx(0.4 * decay ** expected[name], rel=1e-12)
            undecayed = parameters[name].ndim == 1 or name in ("cls_token", "pos_embed")
            assert group["weight_decay"] == (0 if undecayed else 0.05)


def test_a_run_trains_each_layer_at_its_scale_and_leaves_the_position_alone(tmp_path):
    call(finetune, *TINY, "--max-steps", 3, "--layer-decay", 0.5, "--out", tmp_path)
    groups = torch.load(tmp_path / "last.pt", weights_only=True)["optimizer"]["param_groups"]
    head = next(group for group in groups if "head.weight" in group["names"])
    for group in groups:
        layer = 1 + int(group["names"][0].split(".")[1]) if group["names"][0].startswith("blocks") else 0
        if "head.weight" not in group["names"] and "head.bias" not in group["names"]:
            assert group["lr"] == pytest.approx(head["lr"] * 0.5 ** (7 - layer))
    assert torch.equal(weights(tmp_path)["pos_embed"], vit.sincos_position(96, 4))


# ------------------------------------------------------------------------------------------------ augmentation, targets

def test_mixup_blends_images_and_targets_by_one_beta_distributed_number():
    torch.manual_seed(0)
    (mix,) = finetune.mixers(argparse.Namespace(mixup=0.2, cutmix=0), 6)
    images, labels, shares = torch.eye(6)[:, :, None, None].expand(-1, -1, 2, 2), torch.arange(6), []
    for _ in range(4000):
        mixed, targets = mix(images, labels)
        share = targets[0, 0].item()
        torch.testing.assert_close(mixed[:, :, 0, 0], targets)                 # the same blend on both sides
        torch.testing.assert_close(targets, share * torch.eye(6) + (1 - share) * torch.eye(6).roll(1, 0))
        shares.append(share)
    assert np.mean(shares) == pytest.approx(0.5, abs=0.03)                     # Beta(a, a): mean 1/2, variance 1 / (8 a + 4)
    assert np.var(shares) == pytest.approx(1 / (8 * 0.2 + 4), rel=0.05)


def test_cutmix_pastes_a_box_and_mixes_the_targets_by_its_area():
    torch.manual_seed(0)
    (mix,) = finetune.mixers(argparse.Namespace(mixup=0, cutmix=1.0), 2)
    images, areas = torch.stack([torch.zeros(3, 16, 16), torch.ones(3, 16, 16)]), []
    for _ in range(2000):
        mixed, targets = mix(images, torch.tensor([0, 1]))
        pasted = mixed[0, 0] == 1
        assert targets[0, 1].item() == pytest.approx(pasted.double().mean().item(), abs=1e-6)
        assert pasted.sum() == pasted.any(0).sum() * pasted.any(1).sum()       # a rectangle
        areas.append(pasted.double().mean().item())
    assert 0.2 < np.mean(areas) < 0.5  # half of the image on average, less what falls over the border


def test_erasing_fills_boxes_of_the_published_sizes_with_noise():
    torch.manual_seed(0)
    erased = finetune.erase(torch.full((3000, 3, 40, 40), 9.0), 0.25)
    changed = (erased != 9).any(1)                                             # (n, H, W)
    hit = changed.flatten(1).any(1)
    assert hit.double().mean().item() == pytest.approx(0.25, abs=4 * math.sqrt(0.25 * 0.75 / 3000))
    boxes = changed[hit]
    h, w = boxes.any(2).sum(1), boxes.any(1).sum(1)
    assert torch.equal(boxes.flatten(1).sum(1), h * w)                         # rectangles
    share, ratio = h * w / 1600, h / w
    assert 0.015 < share.min() < 0.03 and 0.3 < share.max() < 0.36
    assert share.mean().item() == pytest.approx((0.02 + 1 / 3) / 2, abs=0.015)
    assert 0.25 < ratio.min() < 0.4 and 2.5 < ratio.max() < 4
    assert ratio.log().mean().item() == pytest.approx(0, abs=0.08)
    noise = erased[(erased != 9)]
    assert noise.mean().item() == pytest.approx(0, abs=0.01) and noise.std().item() == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("strength, bin_", [(9, 27), (10, 30)])
def test_randaugments_strength_is_timms_with_noise_of_a_half(strength, bin_, monkeypatch):
    """Two operations an image, each at its own magnitude: normal around bin 27 or 30 of 31, deviation 1.5 bins, cut at 30."""
    magnitudes, kinds = [], collections.Counter()

    def note(self, image, kind, magnitude, **kw):
        magnitudes.append(self.magnitude)
        kinds[kind] += 1
        return image
    monkeypatch.setattr(v2.RandAugment, "_apply_image_or_video_transform", note)
    torch.manual_seed(0)
    augment = finetune.RandAugment(strength)
    for _ in range(2000):
        augment(torch.zeros(3, 8, 8, dtype=torch.uint8))
    drawn = np.clip(np.round(bin_ + 1.5 * np.random.default_rng(0).standard_normal(100_000)), 0, 30)
    assert len(magnitudes) == 4000
    assert np.mean(magnitudes) == pytest.approx(drawn.mean(), abs=0.1) and np.std(magnitudes) == pytest.approx(drawn.std(), abs=0.1)
    assert len(kinds) == 14 and min(kinds.values()) > 4000 / 14 * 0.75         # all operations, alike


def test_randaugment_changes_images_reproducibly_in_a_run(tmp_path, image_folder):
    """On disk and in memory it is drawn by (seed, visit), so that workers change nothing."""
    settings = ("--data", image_folder, "--arch", "toy", "--img-size", 32, "--patch-size", 8, "--batch-size", 12, "--epochs", 2,
                "--warmup-epochs", 1, "--log-every", 1, "--randaug", 9, *RANDOM)
    for workers in (0, 2):
        call(finetune, *settings, "--workers", workers, "--out", tmp_path / str(workers))
    same_state(tmp_path / "0", tmp_path / "2")
    call(finetune, *settings[:-12], "--randaug", 0, *RANDOM, "--workers", 0, "--out", tmp_path / "plain")
    assert losses(tmp_path / "plain") != losses(tmp_path / "0")


def test_soft_target_cross_entropy_is_the_hand_computed_one(tmp_path, monkeypatch):
    """What a run computes on a mixed batch with smoothing: -sum_c t_c log p_c with t = (1 - s) mix + s / C."""
    seen = []

    def spy(logits, targets, label_smoothing):
        loss = whole(logits, targets, label_smoothing=label_smoothing)
        seen.append((logits.detach().double(), targets.double(), label_smoothing, loss))
        return loss
    whole = F.cross_entropy
    monkeypatch.setattr(F, "cross_entropy", spy)
    call(finetune, *TINY, "--mixup", 1, "--smoothing", 0.1, "--max-steps", 2, "--out", tmp_path)
    for logits, targets, smoothing, loss in seen:
        assert targets.shape == (24, 10) and smoothing == 0.1
        smoothed = 0.9 * targets + 0.01
        log_p = logits - logits.exp().sum(1, keepdim=True).log()
        assert loss.item() == pytest.approx(-(smoothed * log_p).sum(1).mean().item(), rel=1e-5)
    monkeypatch.undo()
    # by hand: p = (1/2, 1/4, 1/4), t = (0.7, 0.3, 0): 0.7 log 2 + 0.3 log 4
    hand = F.cross_entropy(torch.tensor([[2.0, 1.0, 1.0]]).log(), torch.tensor([[0.7, 0.3, 0.0]]))
    assert hand.item() == pytest.approx(0.7 * math.log(2) + 0.3 * math.log(4))


def test_the_first_loss_is_the_logarithm_of_the_number_of_classes(tmp_path):
    call(finetune, *TINY, "--max-steps", 1, "--out", tmp_path)
    assert losses(tmp_path) == [pytest.approx(math.log(10), abs=1e-3)]


# ------------------------------------------------------------------------------------------------ checkpoints

def published(style):
    """A toy network's tensors as the projects publish them: (file contents, the encoder's tensors)."""
    torch.manual_seed(5)
    token = vit.vit_toy(img_size=32, patch_size=8, num_classes=7, global_pool="token").state_dict()
    body = {name: tensor + 0.01 for name, tensor in token.items() if not name.startswith("head")}
    projector = {"head.0.weight": torch.randn(10, 96), "head.1.weight": torch.ones(10), "head.1.bias": torch.zeros(10),
                 "head.1.running_mean": torch.zeros(10), "head.3.weight": torch.randn(8, 10)}
    branch = {name: tensor + 1 for name, tensor in body.items()}
    decoder = {"mask_token": torch.zeros(1, 1, 8), "decoder_embed.weight": torch.randn(8, 96)}
    moco = {f"module.{name}.{key}": tensor for name, part in (("base_encoder", body), ("momentum_encoder", branch))
            for key, tensor in {**part, **projector}.items()}
    return {"MAE": {"model": {**body, **decoder}, "args": argparse.Namespace(lr=1), "epoch": 3},
            "MoCo-v3": {"state_dict": moco, "epoch": 3},
            "MAE-Lite": {"model": {f"module.model.{key}": tensor for key, tensor in {**body, **decoder}.items()}},
            "DeiT": {"model": {**body, "head.weight": torch.randn(7, 96), "head.bias": torch.randn(7)}},
            "timm": {**body, "head.weight": torch.randn(7, 96), "head.bias": torch.randn(7)}}[style], body


STYLES = ["MAE", "MoCo-v3", "MAE-Lite", "DeiT", "timm"]


@pytest.mark.parametrize("style", STYLES)
def test_published_checkpoints_start_a_run(style, tmp_path, capsys):
    """Sizes are read off the file; the head, of another size, is initialised afresh, and that is said."""
    contents, body = published(style)
    torch.save(contents, tmp_path / "file.pth")
    call(finetune, *TINY, "--init", tmp_path / "file.pth", "--max-steps", 1, "--out", tmp_path)  # step 1 has learning rate 0
    for name, tensor in body.items():
        if not name.startswith("norm."):
            assert torch.equal(weights(tmp_path)[name], tensor), name
    out = " ".join(capsys.readouterr().out.split())
    assert "initialised afresh: fc_norm.weight, fc_norm.bias, head.weight, head.bias; unused in the file: norm.weight" in out
    assert torch.load(tmp_path / "last.pt", weights_only=True)["config"]["layer_decay"] == 0.75
    if style in ("DeiT", "timm"):
        assert re.search("unused in the file: norm.weight, norm.bias, head.weight", out)


def test_either_network_of_moco_v3_can_be_taken(tmp_path):
    contents, body = published("MoCo-v3")
    torch.save(contents, tmp_path / "file.pth")
    call(finetune, *TINY, "--init", tmp_path / "file.pth", "--checkpoint-branch", "momentum_encoder", "--max-steps", 1,
         "--out", tmp_path)
    assert torch.equal(weights(tmp_path)["blocks.3.mlp.fc1.weight"], body["blocks.3.mlp.fc1.weight"] + 1)


@pytest.mark.parametrize("style, feature", [("MAE", "mean of the patch tokens, then LayerNorm"),
                                            ("MoCo-v3", "LayerNorm, then class token"), ("DeiT", "LayerNorm, then class token")])
def test_a_linear_probe_says_which_feature_it_reads_and_takes_no_projector(style, feature, tmp_path, capsys):
    contents, body = published(style)
    torch.save(contents, tmp_path / "file.pth")
    call(finetune, *TINY, "--mode", "linear", "--init", tmp_path / "file.pth", "--max-steps", 2, "--out", tmp_path)
    out = " ".join(capsys.readouterr().out.split())
    assert f"feature: {feature}, then BatchNorm over the batch, then a linear classifier" in out
    assert "base lr 0.1 x 24/256 = lr" in out and "M parameters (0.00M trained)" in out
    state = weights(tmp_path)
    assert all(torch.equal(state[name], tensor) for name, tensor in body.items() if name in state)   # frozen
    assert {name for name in state if name.startswith("head")} == {
        "head.0.running_mean", "head.0.running_var", "head.0.num_batches_tracked", "head.1.weight", "head.1.bias"}


def test_own_pretraining_starts_a_run_and_the_position_interpolates(tmp_path):
    call(mae, "--fraction", 0.01, "--batch-size", 16, "--max-steps", 1, "--out", tmp_path / "mae", "--patch-size", 8)
    call(finetune, *TINY, "--init", tmp_path / "mae" / "last.pt", "--img-size", 48, "--max-steps", 1, "--out", tmp_path)
    encoder, state = weights(tmp_path / "mae"), weights(tmp_path)
    assert torch.equal(state["blocks.5.attn.qkv.weight"], encoder["encoder.blocks.5.attn.qkv.weight"])
    expected = vit.resize_position(encoder["encoder.pos_embed"], (6, 6))
    assert state["pos_embed"].shape == (1, 37, 96) and torch.equal(state["pos_embed"], expected)


def test_fig2_kept_blocks_are_the_lower_ones(tmp_path, capsys):
    contents, body = published("MAE")
    torch.save(contents, tmp_path / "file.pth")
    call(finetune, *TINY, "--init", tmp_path / "file.pth", "--keep-blocks", 2, "--max-steps", 1, "--out", tmp_path)
    state = weights(tmp_path)
    for name in ("cls_token", "patch_embed.proj.weight", "blocks.0.mlp.fc2.weight", "blocks.1.norm1.bias"):
        assert torch.equal(state[name], body[name])
    for name in ("blocks.2.mlp.fc2.weight", "blocks.5.norm1.bias"):
        assert not torch.equal(state[name], body[name])
    assert state["blocks.2.norm1.bias"].abs().max() == 0
    assert "initialised afresh: blocks.2.norm1.weight" in " ".join(capsys.readouterr().out.split())


def test_a_classifier_of_the_same_size_keeps_its_head(tmp_path):
    call(finetune, *TINY, "--max-steps", 4, "--out", tmp_path / "a")
    call(finetune, *TINY, "--init", tmp_path / "a" / "last.pt", "--max-steps", 1, "--out", tmp_path / "b")
    assert torch.equal(weights(tmp_path / "a")["head.weight"], weights(tmp_path / "b")["head.weight"])


# ------------------------------------------------------------------------------------------------ evaluation

def test_accuracy_counts_the_best_guess_and_the_best_five():
    best = torch.tensor([[0, 1, 2, 3, 4], [1, 0, 2, 3, 4], [9, 8, 7, 6, 5], [5, 6, 7, 8, 9]])
    assert finetune.accuracy(best, np.array([0, 0, 5, 4])) == {"top1": 25.0, "top5": 75.0}


def test_real_labels_accept_any_of_the_listed_classes_and_leave_out_the_unlabelled():
    best = torch.tensor([[0], [1], [2], [3]])
    assert finetune.accuracy(best, np.array([0, 0, 0, 0]), [[5, 0], [2], [], [3]])["real"] == pytest.approx(200 / 3)


def test_imagenet_real_is_in_the_order_of_the_file_names(tmp_path):
    names = [f"{folder}/ILSVRC2012_val_0000000{i}.JPEG" for folder, i in (("b", 3), ("b", 4), ("a", 1), ("c", 2))]
    (tmp_path / "real.json").write_text(json.dumps([[1], [2], [3], [4]]))
    data = finetune.Data(np.array([os.fsencode(name) for name in names]), None, None, [])
    assert finetune.read_real_labels(tmp_path / "real.json", data) == [[3], [4], [1], [2]]


def test_imagenet_v2s_numeric_folders_are_in_numeric_order(tmp_path, capsys):
    from PIL import Image
    torch.manual_seed(0)
    model = vit.vit_toy(img_size=32, patch_size=8, num_classes=12)
    torch.save({"model": model.state_dict()}, tmp_path / "file.pt")
    for kind in range(12):
        (tmp_path / "v2" / str(kind)).mkdir(parents=True)
        pixels = np.random.default_rng(kind).integers(0, 255, (80, 70, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "v2" / str(kind) / "0.png")
    call(finetune, "--eval-only", "--init", tmp_path / "file.pt", "--data", tmp_path / "v2", "--workers", 0, "--out", tmp_path)
    data = finetune.folder_data(tmp_path / "v2", train=True)
    folders = torch.tensor([int(os.fsdecode(path).split("/")[-2]) for path in data.files])
    assert data.classes == [str(kind) for kind in range(12)] and folders.tolist() != list(range(12))
    images = finetune.centre_crops(data, range(12), argparse.Namespace(img_size=32))
    images = finetune.normalize(images, argparse.Namespace(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225]))
    right = (model.eval()(images).argmax(1) == folders).double().mean().item()
    assert f"top1 {100 * right:.2f}%" in capsys.readouterr().out


def test_a_perfect_network_scores_100_and_its_pictures_are_drawn(tmp_path, monkeypatch, capsys):
    """`--eval-only` on a network that knows the answers: the images of class c are told by their mean."""
    monkeypatch.setattr(finetune, "predict", lambda model, data, *a: torch.stack(
        [(torch.from_numpy(data.labels) + k) % 10 for k in range(5)], dim=1))
    torch.save(vit.vit_toy(img_size=32, patch_size=8, num_classes=10).state_dict(), tmp_path / "file.pt")
    call(finetune, "--eval-only", "--init", tmp_path / "file.pt", "--out", tmp_path)
    assert "top1 100.00%, top5 100.00%, 256 images" in capsys.readouterr().out
    for name in ("classes.png", "predictions.png"):
        assert (tmp_path / name).stat().st_size > 10_000


@pytest.mark.parametrize("world", [1, 3, 5])
def test_ranks_evaluate_every_image_exactly_once(world, monkeypatch):
    """41 images over 3 or 5 ranks: the sum over ranks of what each computes is every image once."""
    pixels = torch.arange(41, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 8, 8)
    data = finetune.Data(None, pixels, np.zeros(41, int), ["a"])
    args = argparse.Namespace(img_size=8, workers=0, mean=[0.0] * 3, std=[1 / 255] * 3)
    seen, parts = [], []
    for rank in range(world):
        def count(images):
            seen.extend(images[:, 0, 0, 0].round().long().tolist())
            return images[:, 0, 0, :1] + 1
        parts.append(finetune.on_every_image(count, data, args, rank, world, torch.device("cpu")))
    torch.testing.assert_close(sum(parts)[:, 0], torch.arange(41) + 1.0)
    assert sorted(seen) == sorted([0] * world + list(range(41)))               # and one blank image each, for the shape


def test_nearest_neighbours_of_separable_features_are_always_right():
    torch.manual_seed(0)
    centres, labels = F.one_hot(torch.arange(7), 32).float() * 10, torch.arange(7).repeat(40)
    known, wanted = centres[labels] + torch.randn(280, 32), centres[labels] + torch.randn(280, 32)
    best = finetune.nearest_neighbours(known, labels, wanted, 7)
    assert best.shape == (280, 5) and torch.equal(best[:, 0], labels)


def test_nearest_neighbours_vote_with_exp_of_similarity_over_temperature():
    """One neighbour of class 0 at similarity 1 against two of class 1 at s: class 1 wins where 2 exp(s / T) > exp(1 / T)."""
    for s, winner in ((1 - 0.04, 1), (1 - 0.06, 0)):                           # T log 2 = 0.0485
        known = torch.tensor([[1, 0], [s, math.sqrt(1 - s * s)], [s, -math.sqrt(1 - s * s)]]) * torch.tensor([[3.0], [1], [7]])
        assert finetune.nearest_neighbours(known, torch.tensor([0, 1, 1]), torch.tensor([[2.0, 0]]), 2)[0, 0] == winner


def test_knn_mode_finds_training_images_among_themselves(tmp_path, monkeypatch, capsys):
    """The held-out images are training images: with one neighbour, each is its own."""
    monkeypatch.setattr(vit, "toy_shapes", lambda n, size, seed: toy_shapes(256, size, seed=0))
    torch.save(vit.vit_toy(img_size=32, patch_size=8).state_dict(), tmp_path / "file.pt")
    call(finetune, "--mode", "knn", "--init", tmp_path / "file.pt", "--out", tmp_path)
    plain = capsys.readouterr().out
    monkeypatch.setattr(finetune, "nearest_neighbours", functools.partial(finetune.nearest_neighbours, neighbours=1))
    call(finetune, "--mode", "knn", "--init", tmp_path / "file.pt", "--out", tmp_path)
    assert "top1 100.00%" in capsys.readouterr().out and "k-NN: toy on toy: top1" in plain


def test_a_linear_probe_of_features_that_say_nothing_is_at_chance(tmp_path, monkeypatch):
    """Images of noise with random labels: 10 classes, 10%, whatever the probe learns of its training images."""
    rng = np.random.default_rng(0)
    monkeypatch.setattr(vit, "toy_shapes", lambda n, size, seed: (torch.from_numpy(
        rng.integers(0, 255, (n // 8, 3, size, size), dtype=np.uint8)), torch.from_numpy(rng.integers(10, size=n // 8))))
    call(finetune, "--mode", "linear", "--epochs", 2, "--patch-size", 8, "--out", tmp_path)
    top1 = log_of(tmp_path)[-1]["top1"]
    assert top1 == pytest.approx(10, abs=4 * 100 * math.sqrt(0.1 * 0.9 / 128))


def test_a_linear_probe_normalises_by_the_batch_and_is_evaluated_again_as_it_was(tmp_path, capsys):
    head = finetune.probe_head(6, 3)
    x = 5 + 3 * torch.randn(400, 6)
    torch.testing.assert_close(head[0](x), (x - x.mean(0)) / (x.var(0, correction=0) + 1e-6).sqrt(), rtol=1e-4, atol=1e-4)
    assert not list(head[0].parameters())
    call(finetune, *TINY, "--mode", "linear", "--out", tmp_path / "a")
    top1 = log_of(tmp_path / "a")[-1]["top1"]
    capsys.readouterr()
    call(finetune, "--eval-only", "--init", tmp_path / "a" / "last.pt", "--out", tmp_path / "b")
    assert f"top1 {top1:.2f}%" in capsys.readouterr().out


def test_throughput_prints_images_per_second_and_parameters(capsys):
    call(finetune, "--throughput", "--batch-size", 4, "--patch-size", 16)
    out = capsys.readouterr().out
    assert re.search(r"toy, 32 px, batch 4, amp off, cpu: [\d,]+ images/s", out) and "0.75M parameters" in out


# ------------------------------------------------------------------------------------------------ runs

def test_a_run_writes_its_log_checkpoints_and_pictures_and_learns(tmp_path, capsys):
    call(finetune, "--fraction", 0.04, "--base-lr", 4e-3, "--epochs", 5, "--warmup-epochs", 1, "--eval-every", 2,
         "--patch-size", 8, "--log-every", 5, "--out", tmp_path)
    log = log_of(tmp_path)
    assert [entry["epoch"] for entry in log if "top1" in entry] == [2, 4, 5]
    assert log[-1].keys() == {"epoch", "step", "loss", "lr", "images_per_s", "data_wait", "top1", "top5"}
    assert log[-1]["loss"] < log[0]["loss"] - 0.02 and log[-1]["top5"] > 50
    for name in ("config.json", "accuracy.png", "classes.png", "predictions.png"):
        assert (tmp_path / name).stat().st_size > 100
    best = torch.load(tmp_path / "best.pt", weights_only=True)
    assert best["top1"] == pytest.approx(max(entry.get("top1", 0) for entry in log), rel=1e-4)
    assert f"best top-1 {best['top1']:.2f}%" in capsys.readouterr().out


def test_recipes_are_the_papers_and_each_value_can_be_overridden(tmp_path):
    expected = {
        "improved": dict(epochs=300, warmup_epochs=5, batch_size=1024, base_lr=1e-3, weight_decay=0.05, layer_decay=0.85,
                         optimizer="adamw", randaug=10, mixup=0.2, cutmix=0, erasing=0, smoothing=0, drop_path=0, pool="avg", min_crop=0.08),
        "original": dict(epochs=300, warmup_epochs=5, batch_size=1024, base_lr=2.5e-4, weight_decay=0.05, layer_decay=1,
                         optimizer="adamw", randaug=9, mixup=0.8, cutmix=1, erasing=0.25, smoothing=0.1, drop_path=0.1, min_crop=0.08),
        "transfer": dict(batch_size=512, base_lr=0.05, weight_decay=0, layer_decay=0.75, optimizer="sgd", clip_grad=1, randaug=0,
                         pool="avg"),
    }
    parser_args = dict(mode="finetune", data="folder", eval_only=False, checkpoint_branch="base_encoder")
    contents, _ = published("MAE")
    torch.save(contents, tmp_path / "mae.pth")
    torch.save(published("MoCo-v3")[0], tmp_path / "moco.pth")

    def preset(recipe, init="mae.pth", kind="photos", **kw):
        return finetune.choose(argparse.Namespace(**{**parser_args, **kw}, recipe=recipe, init=init and tmp_path / init), kind)
    for recipe, values in expected.items():
        assert {name: preset(recipe)[name] for name in values} == values
    assert preset("improved", "moco.pth")["layer_decay"] == 0.75 and preset("improved", None)["layer_decay"] == 1
    cifar = preset("transfer", data="cifar100", kind="small")
    assert (cifar["epochs"], cifar["warmup_epochs"], cifar["base_lr"] * cifar["batch_size"] / 256) == (50, 10, 0.1)
    linear = preset("improved", mode="linear")
    assert [linear[name] for name in ("epochs", "base_lr", "weight_decay", "batch_size", "optimizer")] == [90, 0.75, 0, 1024, "sgd"]
    call(finetune, *TINY, "--recipe", "original", "--cutmix", 0, "--clip-grad", 2, "--pool", "avg", "--max-steps", 1,
         "--out", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["cutmix"], config["mixup"], config["clip_grad"], config["pool"]) == (0, 0.8, 2, "avg")


@pytest.mark.parametrize("mode", ["finetune", "linear"])
def test_two_ranks_give_the_run_of_one(mode, tmp_path):
    """Without mixing and drop path; a probe's BatchNorm sees all ranks. Step 4 is a partial batch."""
    settings = (*TINY, "--mode", mode, "--recipe", "transfer", "--max-steps", 5)
    call(finetune, *settings, "--out", tmp_path / "one")
    finish(launch("finetune", *settings, "--out", tmp_path / "two", ranks=2))
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=1e-5)
    same_state(tmp_path / "one", tmp_path / "two", tolerance=2e-5)


def test_accumulation_gives_the_run_of_the_big_batch(tmp_path):
    for accum in (1, 3):
        call(finetune, *TINY, "--max-steps", 5, "--accum", accum, "--out", tmp_path / str(accum))
    np.testing.assert_allclose(losses(tmp_path / "1"), losses(tmp_path / "3"), rtol=1e-5)
    same_state(tmp_path / "1", tmp_path / "3", tolerance=1e-5)


def test_stopped_and_resumed_equals_uninterrupted_bit_for_bit_with_all_that_is_random(tmp_path):
    """Mixup, cutmix, erasing, drop path; stopped in the middle of an epoch."""
    call(finetune, *TINY, *RANDOM, "--out", tmp_path / "whole")
    for _ in range(3):
        call(finetune, *TINY, *RANDOM, "--out", tmp_path / "pieces", "--resume", "--max-steps", 5)
    same_state(tmp_path / "whole", tmp_path / "pieces")
    assert losses(tmp_path / "whole") == losses(tmp_path / "pieces") and len(losses(tmp_path / "whole")) == 12
    best = weights(tmp_path / "pieces", "best.pt")
    assert all(torch.equal(tensor, best[name]) for name, tensor in weights(tmp_path / "whole", "best.pt").items())


def test_killed_and_resumed_equals_uninterrupted_bit_for_bit(tmp_path, image_folder):
    """SIGKILL at a moment nobody chose, images decoded and augmented by workers."""
    settings = ("--data", image_folder, "--arch", "toy", "--img-size", 32, "--patch-size", 8, "--batch-size", 10, "--epochs", 100,
                "--warmup-epochs", 1, "--log-every", 1, "--workers", 1, "--randaug", 10, "--eval-every", 100, *RANDOM)
    killed_and_resumed_equals_uninterrupted("finetune", settings, tmp_path)


def test_sigterm_writes_a_checkpoint_and_exits_0(tmp_path):
    process = start("finetune.py", *TINY, "--epochs", 1000, "--out", tmp_path)
    wait_for_lines(process, tmp_path, 2)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    steps = torch.load(tmp_path / "last.pt", weights_only=True)["step"]
    assert process.returncode == 0 and f"stopped, --resume continues: step {steps} of 4000" in out
    assert steps == log_of(tmp_path)[-1]["step"]


def test_mixed_precision_trains(tmp_path):
    for amp in ("bf16", "off"):
        call(finetune, *TINY, "--max-steps", 3, "--amp", amp, "--out", tmp_path / amp)
    np.testing.assert_allclose(losses(tmp_path / "bf16"), losses(tmp_path / "off"), rtol=0.03)


# ------------------------------------------------------------------------------------------------ bad input

@pytest.mark.parametrize("arguments, message", [
    (("--data", "nowhere"), "--data nowhere: no such folder"),
    (("--init", "nothing.pt"), "nothing.pt: cannot be opened (No such file or directory)"),
    (("--keep-blocks", 3), "--keep-blocks: needs --init CHECKPOINT"),
    (("--eval-only",), "--eval-only: needs --init CHECKPOINT"),
    (("--num-heads", 5), "--num-heads 5: width 96 is not divisible by 5 heads"),
    (("--layer-decay", 0), "--layer-decay 0.0 must be above 0, at most 1"),
    (("--drop-path", 1), "--drop-path 1.0 must be at least 0, below 1"),
    (("--mode", "linear", "--accum", 2), "--accum: a linear probe's BatchNorm sees the whole batch"),
    (("--epochs", 3), "--warmup-epochs 5 must be less than --epochs 3"),
])
def test_bad_arguments_are_named_in_one_line(arguments, message, tmp_path, capsys):
    assert message in refused(capsys, finetune, "--out", tmp_path, *arguments)


def test_images_without_labels_or_held_out_images_are_refused(tmp_path, small_folder, capsys):
    assert f"--data {small_folder / 'train'}: needs train/ and val/" in refused(
        capsys, finetune, "--data", small_folder / "train", "--out", tmp_path)
    assert f"--data {small_folder / 'train' / 'odd'}: needs train/ and val/" in refused(
        capsys, finetune, "--data", small_folder / "train" / "odd", "--mode", "knn", "--out", tmp_path)


def test_a_checkpoint_of_another_architecture_is_named(tmp_path, capsys):
    torch.save(vit.vit_tiny(img_size=32, patch_size=8, depth=7).state_dict(), tmp_path / "tiny.pt")
    message = refused(capsys, finetune, *TINY, "--arch", "toy", "--init", tmp_path / "tiny.pt", "--out", tmp_path)
    assert "cls_token: (1, 1, 192) in the file, (1, 1, 96) in the model" in message
    message = refused(capsys, finetune, *TINY, "--init", tmp_path / "tiny.pt", "--out", tmp_path)
    assert "blocks.7.norm1.weight: (192,) in the model, none in the file" in message


def test_keep_blocks_13_of_12_is_refused(tmp_path, capsys):
    torch.save(vit.vit_tiny(img_size=32, patch_size=16).state_dict(), tmp_path / "tiny.pt")
    message = refused(capsys, finetune, *TINY, "--init", tmp_path / "tiny.pt", "--keep-blocks", 13, "--out", tmp_path)
    assert message == "error: --keep-blocks 13: this network has 12 blocks"


def test_a_class_count_mismatch_is_named_in_evaluation(tmp_path, capsys):
    torch.save(vit.vit_toy(img_size=32, patch_size=8, num_classes=7).state_dict(), tmp_path / "seven.pt")
    message = refused(capsys, finetune, "--eval-only", "--init", tmp_path / "seven.pt", "--out", tmp_path)
    assert "seven.pt: head.weight is not there or of another size; --eval-only needs a classifier of the 10 classes" in message


def test_a_label_file_of_the_wrong_length_is_named(tmp_path, image_folder, capsys):
    torch.save(vit.vit_toy(img_size=32, patch_size=8, num_classes=3).state_dict(), tmp_path / "three.pt")
    arguments = ("--eval-only", "--init", tmp_path / "three.pt", "--data", image_folder, "--out", tmp_path)
    real = tmp_path / "real.json"
    real.write_text("[[0], [1]]")
    assert "real.json: a list of 2, the held-out images are 18" in refused(capsys, finetune, *arguments, "--real-labels", real)
    assert "needs --data to be a folder of image files" in refused(
        capsys, finetune, "--eval-only", "--init", tmp_path / "three.pt", "--real-labels", real, "--out", tmp_path)
    real.write_text("hello")
    assert "real.json: not a JSON file" in refused(capsys, finetune, *arguments, "--real-labels", real)


def test_a_nan_stops_all_ranks_before_the_update(tmp_path):
    call(finetune, *TINY, "--max-steps", 4, "--out", tmp_path)
    before = (tmp_path / "last.pt").read_bytes()
    finish(launch("finetune", *TINY, "--out", tmp_path, "--resume", ranks=2, break_at_step=6, errors=tmp_path / "errors"), code=2)
    assert (tmp_path / "errors").read_text().count("error: step 7: the loss is nan") == 2
    assert (tmp_path / "last.pt").read_bytes() == before
