"""vit.py: the network against published numbers and its own promises, weights, the toy data."""
import argparse
import hashlib
import math
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import GOLDENS, SIZES, TEACHER, agrees, fill, images

import vit


def small(**kw):
    return fill(vit.VisionTransformer(**{**SIZES, **kw}))


# ------------------------------------------------------------ the network

@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-6), (torch.float32, 1e-4)])
@pytest.mark.parametrize("pool, section", [("avg", "global_pool"), ("token", "cls_token")])
def test_logits_are_those_of_the_published_vit(pool, section, dtype, tolerance):
    model = small(num_classes=10, global_pool=pool).to(dtype)
    agrees(model(images(dtype=dtype)), GOLDENS["1_classifier"][section]["logits"], tolerance)
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert sorted(names) == sorted(GOLDENS["1_classifier"][section]["param_names"])  # timm's


def test_scores_and_states_are_those_of_the_published_vit():
    model = small()
    golden = GOLDENS["2_attention"]
    states = list(model.states(model.embed(images())))
    for state, expected in zip(states, golden["hidden_states"], strict=True):
        agrees(state, expected)
    for i, name in ((0, "scores_first_block"), (2, "scores_last_block")):
        block = model.blocks[i]
        agrees(block.attn.scores(block.norm1(states[i])), golden[name])


def test_encode_is_the_last_of_the_states():
    model = small()
    tokens = model.embed(images())
    *_, last = model.states(tokens)
    assert torch.equal(model.encode(tokens), last)


def test_scores_are_float32_also_under_autocast():
    attention = small().float().blocks[0].attn
    with torch.autocast("cpu", torch.bfloat16):
        assert attention.scores(torch.randn(2, 5, 48)).dtype == torch.float32


def test_only_asked_blocks_compute_scores(monkeypatch):
    calls = []
    scores = vit.Attention.scores

    def counted(self, x):
        calls.append(self)
        return scores(self, x)
    monkeypatch.setattr(vit.Attention, "scores", counted)
    model = small()
    model(images())
    assert calls == []
    vit.attention_maps(model, images(), layers=(2,))
    assert calls == [model.blocks[2].attn]


def test_attention_maps_are_the_softmax_of_scores_and_weight_the_values():
    model = small()
    states = list(model.states(model.embed(images())))
    maps = vit.attention_maps(model, images())
    scores = [block.attn.scores(block.norm1(x)) for block, x in zip(model.blocks, states)]
    torch.testing.assert_close(maps, torch.stack(scores).softmax(-1))
    assert torch.equal(vit.attention_maps(model, images(), layers=(2, 0)), maps[[2, 0]])
    attention = model.blocks[0].attn
    x = model.blocks[0].norm1(states[0])
    values = attention.qkv(x)[..., 96:].view(4, 17, 6, 8)
    mixed = torch.einsum("bhqk,bkhd->bqhd", maps[0], values).reshape(4, 17, 48)
    torch.testing.assert_close(attention(x), attention.proj(mixed))


def test_permuting_patches_with_their_positions_permutes_the_features():
    model = small()
    tokens = model.embed(images())
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    straight = model.encode(tokens)
    permuted = model.encode(tokens[:, order])
    torch.testing.assert_close(permuted[:, 1:], straight[:, 1:][:, order])
    torch.testing.assert_close(permuted[:, 0], straight[:, 0])
    assert not torch.allclose(permuted[:, 1:], straight[:, 1:])


def test_position_table_is_maes_and_is_added_before_patches_are_dropped():
    model = small()
    golden = GOLDENS["1_classifier"]["pos_embed_mae"]["stored_float32"]
    agrees(model.pos_embed, golden)
    there = model.embed(images())[:, [3]]
    here = model.embed(images().roll(8, dims=-1))[:, [0]]  # the same content
    difference = model.pos_embed[:, [4]] - model.pos_embed[:, [1]]
    torch.testing.assert_close(there - here, difference.expand(4, 1, 48))


def test_position_table_is_interpolated_and_trained_when_asked():
    coarse = small().pos_embed
    fine = vit.resize_position(coarse, (8, 8))
    table = fine[:, 1:].view(1, 8, 8, -1).permute(0, 3, 1, 2)
    averaged = F.avg_pool2d(table, 2).flatten(2).transpose(1, 2)
    assert (averaged - coarse[:, 1:]).abs().mean() < 0.05
    assert torch.equal(fine[:, :1], coarse[:, :1])
    # 4 x 4, 6 x 6, 2 x 4 patches
    for pixels in (images(2, 32), images(2, 48), images(2, 32)[:, :, :16]):
        model = small()
        assert not model.pos_embed.requires_grad
        model.pos_embed.requires_grad_(True)
        model(pixels).square().sum().backward()
        assert (model.pos_embed.grad != 0).any(-1).all()


@pytest.mark.parametrize("call, message", [
    (lambda: small(patch_size=5), "patch size 5 does not divide image size 32"),
    (lambda: small(global_pool="max"), "'max'"),
    (lambda: small(num_heads=5), "width 48 is not divisible by 5 heads"),
    (lambda: vit.init_weights(small(), "he"), "'he'"),
    (lambda: small().embed(images()[..., :30]), "patch size 8 does not divide images of 32 x 30"),
])
def test_sizes_that_do_not_divide_and_unknown_names_are_refused(call, message):
    with pytest.raises((vit.InputError, KeyError), match=message):
        call()


def test_stochastic_depth_drops_branches_of_images_and_keeps_the_mean():
    torch.manual_seed(0)
    block = vit.Block(12, 3, drop_path=0.4)
    branch = torch.ones(20000, 2, 12)
    dropped = block.stochastic_depth(branch)
    assert dropped.unique().tolist() == pytest.approx([0, 1 / 0.6])
    assert torch.equal(dropped, dropped[:, :1, :1].expand_as(branch))
    assert abs(dropped.mean() - 1) < 0.03  # 4 standard errors
    assert torch.equal(block.eval().stochastic_depth(branch), branch)
    assert [b.drop_path for b in small(drop_path=0.2).blocks] == pytest.approx([0, 0.1, 0.2])


def test_init_weights_is_xavier_or_truncated_and_vit_tiny_has_12_heads():
    torch.manual_seed(0)
    model = vit.vit_tiny(num_classes=1000)
    assert model.blocks[0].attn.num_heads == 12
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    assert round(millions, 1) == 5.7
    kernels = model.patch_embed.proj.weight.flatten(1)
    matrices = [kernels, model.blocks[3].mlp.fc1.weight, model.head.weight]
    for matrix in matrices:
        largest = math.sqrt(6 / sum(matrix.shape))
        assert matrix.abs().max().item() == pytest.approx(largest, rel=0.01)
    vit.init_weights(model, "truncated")
    for tensor in (*matrices, model.pos_embed, model.cls_token):
        assert tensor.std().item() == pytest.approx(0.02, rel=0.2)
    biases = [p for name, p in model.named_parameters() if name.endswith("bias")]
    assert all(bias.abs().max() == 0 for bias in biases)


# ------------------------------------------------------------ weights

def under(prefix, *parts):
    return {prefix + name: tensor for part in parts for name, tensor in part.items()}


def zeros(*names):
    return {name: torch.zeros(3, 48) for name in names}


ENCODER = small(global_pool="token").float().state_dict()
OTHER = {name: tensor + 1 for name, tensor in ENCODER.items()}
MAE = {**ENCODER, **zeros("mask_token", *(f"decoder_blocks.0.{name}" for name in "abcdefghi"))}
MOCO = {
    **under("base_encoder.", ENCODER, zeros("head.0.weight")),
    **under("momentum_encoder.", OTHER),
    **zeros("predictor.0.weight"),
}
CLASSIFIER = {**ENCODER, **zeros("head.weight", "head.bias")}
DETECTOR = {name: tensor for name, tensor in ENCODER.items() if not name.startswith("norm")}
DETECTOR |= zeros("blocks.0.attn.rel_pos_h")
VITDET = {name: tensor for name, tensor in DETECTOR.items() if name != "cls_token"}
FILES = {  # one encoder as each project's files hold it, and a tensor that stays unused
    "MAE": ({"model": MAE, "args": argparse.Namespace(lr=1)}, "mask_token"),
    "MAE-Lite": ({"model": under("module.model.", MAE), "start_epoch": 400}, "decoder_blocks.0.c"),
    "MAE-Lite, distilled": (
        {"model": under("module.tch_model.", OTHER) | under("module.model.", MAE)},
        "tch_model.cls_token"),
    "MAE-Lite, MoCo-v3": ({"model": under("module.", MOCO)}, "head.0.weight"),
    "MoCo-v3": (
        {"state_dict": under("module.", MOCO), "arch": "vit_small"}, "momentum_encoder.cls_token"),
    "DINO": (
        {"student": under("module.backbone.", OTHER),
         "teacher": under("backbone.", ENCODER) | zeros("head.mlp.0.bias"),
         "optimizer": {"lr": np.float64(1e-3)}},
        "head.mlp.0.bias"),
    "DeiT": ({"model": CLASSIFIER}, "head.weight"),
    "timm": (ENCODER, "norm.weight"),
    "mae.py": (
        {"model": under("encoder.", ENCODER) | zeros("mask_token"), "step": 3,
         "config": {"mask_ratio": 0.75}},
        "mask_token"),
    "mocov3.py": ({"model": MOCO, "step": 3, "config": {}}, "predictor.0.weight"),
    "distill.py": (
        {"model": under("encoder.", ENCODER) | zeros("head_maps.0"), "config": {}}, "head_maps.0"),
    "finetune.py": ({"model": CLASSIFIER, "config": {"num_heads": 6}}, "head.bias"),
    "finetune.py, probe": ({"model": ENCODER | zeros("head.1.weight")}, "head.1.weight"),
    "torch.compile": ({"model": under("module._orig_mod.", ENCODER)}, "norm.weight"),
    "torch.compile, mae.py": ({"model": under("_orig_mod.encoder.", ENCODER)}, "norm.weight"),
    "detect.py": (
        {"model": under("backbone.encoder.", DETECTOR), "config": {}}, "blocks.0.attn.rel_pos_h"),
    "ViTDet": (
        {"model": under("backbone.net.", VITDET) | zeros("backbone.simfp_2.0.bias")},
        "backbone.simfp_2.0.bias"),
}


@pytest.mark.parametrize("kind", FILES)
def test_load_weights_and_from_weights_read_every_kind_of_file(kind, tmp_path, monkeypatch):
    content, unused = FILES[kind]
    path = tmp_path / "file.pth"
    torch.save(content, path)
    load = torch.load
    reads = []

    def counted(*args, **kw):
        reads.append(kw["weights_only"])
        return load(*args, **kw)
    monkeypatch.setattr(torch, "load", counted)
    model = vit.VisionTransformer(**SIZES, num_classes=10)
    report = vit.load_weights(model, path)
    heads = None if kind == "finetune.py" else 6
    made, made_report = vit.from_weights(path, num_heads=heads)
    assert reads == [True, True]  # each file once, running no code from it
    missing = ["fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"]
    if kind == "ViTDet":
        missing = ["cls_token", *missing]
    assert report.missing == missing and unused in report.unused
    assert report == vit.load_weights(model, vit.open_checkpoint(path))
    elsewhere = missing + report.unused + made_report.missing
    for name, tensor in ENCODER.items():
        assert name in elsewhere or torch.equal(model.state_dict()[name], tensor)
        assert name in made_report.missing or torch.equal(made.state_dict()[name], tensor)
    assert made.blocks[0].attn.num_heads == 6 and made.global_pool == "token"
    classes = 3 if kind in ("DeiT", "finetune.py") else 0
    assert getattr(made.head, "out_features", 0) == classes


def test_distilled_deit_loads_without_its_second_token():
    position = ENCODER["pos_embed"]
    state = {
        **ENCODER, **zeros("head_dist.weight"), "head.weight": torch.zeros(3, 48),
        "head.bias": torch.zeros(3), "dist_token": torch.zeros(1, 1, 48),
        "pos_embed": torch.cat([position[:, :1], torch.ones(1, 1, 48), position[:, 1:]], dim=1)}
    model, report = vit.from_weights({"model": state}, num_heads=6)
    assert torch.equal(model.pos_embed, ENCODER["pos_embed"])
    assert report.missing == [] and report.unused == ["head_dist.weight", "dist_token"]


def test_load_weights_takes_the_named_branch_and_reports_what_it_left_out():
    model = vit.VisionTransformer(**SIZES, num_classes=7, global_pool="token")
    ten = small(num_classes=10).float()
    report = vit.load_weights(model, FILES["MoCo-v3"][0], branch="momentum_encoder")
    assert torch.equal(model.cls_token, OTHER["cls_token"])
    assert report.missing == ["head.weight", "head.bias"]
    said = str(vit.load_weights(model, MAE))
    assert said == "randomly initialized: head; unused in the file: mask_token, decoder_blocks"
    nothing = "randomly initialized: nothing; unused in the file: nothing"
    assert str(vit.load_weights(ten, ten.state_dict())) == nothing
    assert vit.load_weights(ten, ten.state_dict()) == ([], [])
    with pytest.raises(vit.InputError, match="several but no 'other'"):
        vit.load_weights(model, FILES["MoCo-v3"][0], branch="other")


def test_from_weights_reads_the_sizes_and_arguments_override_them():
    source = fill(vit.VisionTransformer(**{**TEACHER, "mlp_ratio": 2}, num_classes=5)).float()
    model, report = vit.from_weights(source.state_dict(), num_heads=4)
    assert report == ([], [])
    pixels = images(dtype=torch.float32)
    torch.testing.assert_close(model(pixels), source(pixels))
    model, report = vit.from_weights(
        source.state_dict(), num_classes=0, img_size=64, global_pool="token")
    assert report.missing == ["norm.weight", "norm.bias"]
    assert model.blocks[0].attn.num_heads == 12
    assert report.unused == ["fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"]
    assert torch.equal(model.pos_embed, vit.resize_position(source.pos_embed, (8, 8)))


def but(name, *shape):
    """The encoder's tensors with one of another shape, or without it."""
    state = {**ENCODER, name: torch.zeros(shape)}
    if not shape:
        del state[name]
    return state


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("content, message", [
    (but("blocks.1.attn.proj.bias", 3, 5),
     r"blocks.1.attn.proj.bias: \(3, 5\) in the file, \(48,\) in the model"),
    (but("blocks.2.norm3.bias", 48),
     r"blocks.2.norm3.bias: \(48,\) in the file, none in the model"),
    (but("blocks.2.mlp.fc1.bias"),
     r"blocks.2.mlp.fc1.bias: none in the file, \(192,\) in the model"),
    (but("pos_embed", 1, 18, 48),
     r"pos_embed: \(1, 18, 48\) in the file, \(1, 17, 48\) in the model"),
    (but("pos_embed"), "pos_embed is missing"),
    (but("blocks.0.mlp.fc1.weight"), "blocks.0.mlp.fc1.weight is missing"),
    (but("patch_embed.proj.weight"), "no Vision Transformer"),
    (but("patch_embed.proj.weight", 48), "weight is missing or not 4-D"),
    ({1: torch.zeros(3)}, "no Vision Transformer"),
    ([1.0], "not a PyTorch checkpoint"),
    (b"", "not a PyTorch checkpoint"),
    (b"hello", "not a PyTorch checkpoint"),
    (pickle.dumps(3), "not a PyTorch checkpoint"),
    ("folder", "not a PyTorch checkpoint"),
    ("nothing", "FileNotFoundError"),
])
def test_from_weights_names_the_file_and_what_is_wrong_with_it(content, message, tmp_path):
    path = tmp_path / "file.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content == "folder":
        path.mkdir()
    elif content != "nothing":
        torch.save(content, path)
    with pytest.raises(vit.InputError, match=f"^[^\n]*file.pth: [^\n]*{message}[^\n]*$"):
        vit.from_weights(path, num_heads=6)


# ------------------------------------------------------------ toy data

def test_toy_shapes_are_the_same_scenes_in_every_version_and_size():
    coarse, labels = vit.toy_shapes(512)
    fine, same = vit.toy_shapes(300, 64)
    digest = hashlib.sha256(labels.numpy().tobytes()).hexdigest()
    assert digest[:16] == "e41ace68d852fbe4"
    assert torch.equal(labels[:300], same)
    sums = (coarse, 202085273, 9701441222), (fine, 477473468, 22919104550)
    for pixels, total, weighted in sums:
        flat = pixels.flatten().long()  # on another CPU, one value in a million is off by one
        places = torch.arange(len(flat)) % 97
        assert abs(flat.sum() - total) <= 5
        assert abs((flat * places).sum() - weighted) <= 500
    assert (F.avg_pool2d(fine.float(), 2) - coarse[:300].float()).abs().mean() < 2
    assert torch.equal(coarse[:10], vit.toy_shapes(10)[0])
    assert not torch.equal(coarse[:10], vit.toy_shapes(10, seed=1)[0])


def test_toy_shapes_colors_do_not_tell_the_class():
    pixels, labels = vit.toy_shapes(4000, 8)
    colors = torch.cat([pixels.float().mean((2, 3)), torch.ones(4000, 1)], 1)
    target = F.one_hot(labels).float()
    guess = (colors[:2000] @ torch.linalg.lstsq(colors[2000:], target[2000:]).solution).argmax(1)
    assert (guess == labels[:2000]).float().mean() < 0.2  # chance is 0.1


def test_draw_shapes_masks_are_where_the_brightness_changes():
    uniform = torch.rand(200, 20, generator=torch.Generator().manual_seed(0))
    pixels, masks = vit.draw_shapes(torch.arange(200) % 10, uniform, 32)
    assert masks.dtype == torch.bool
    gray = pixels.float().mean(1)
    inside = (gray * masks).sum((1, 2)) / masks.sum((1, 2))
    outside = (gray * ~masks).sum((1, 2)) / (~masks).sum((1, 2))
    # number 16 says which of the two is darker
    assert torch.equal(inside > outside, uniform[:, 16] <= 0.5)


def test_toy_shapes_data_set_is_like_torchvisions_and_pickles():
    train = vit.ToyShapes(True, img_size=8)
    validation = vit.ToyShapes(False, img_size=8)
    assert len(train) == 8192 and len(validation) == 1024
    assert train.classes == list(vit.TOY_CLASSES)
    image, label = pickle.loads(pickle.dumps(validation))[5]
    expected, labels = vit.toy_shapes(1024, 8, seed=1)
    assert torch.equal(image, expected[5])
    assert label == validation.targets[5] == labels[5] and type(label) is int
    assert torch.equal(train[8191][0], vit.toy_shapes(8192, 8)[0][-1])
