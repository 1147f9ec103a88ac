"""vit.py: the network against published numbers and its own promises, the loading of weights, the toy data."""
import pytest
import torch
import torch.nn.functional as F
from conftest import GOLDENS, SIZES, TEACHER, agrees, fill, images

import vit

PRECISIONS = [(torch.float64, 1e-6), (torch.float32, 1e-4)]


def small(**kw):
    return vit.VisionTransformer(**{**SIZES, **kw}).double()


# ------------------------------------------------------------------------------------------------ the network

@pytest.mark.parametrize("dtype, tolerance", PRECISIONS)
@pytest.mark.parametrize("pool, section", [("avg", "global_pool"), ("token", "cls_token")])
def test_logits_are_those_of_the_published_vit(pool, section, dtype, tolerance):
    model = fill(vit.VisionTransformer(**SIZES, num_classes=10, global_pool=pool), dtype=dtype)
    agrees(model(images(dtype=dtype)), GOLDENS["1_classifier"][section]["logits"], tolerance)


def test_parameter_names_are_timms():
    golden = GOLDENS["1_classifier"]
    for pool, section in (("avg", "global_pool"), ("token", "cls_token")):
        names = [n for n, p in small(num_classes=10, global_pool=pool).named_parameters() if p.requires_grad]
        assert sorted(names) == sorted(golden[section]["param_names"])


def test_position_table_is_maes():
    agrees(small().pos_embed, GOLDENS["1_classifier"]["pos_embed_mae"]["stored_float32"], 1e-7)
    assert not small().pos_embed.requires_grad


def test_scores_and_hidden_states_are_those_of_the_published_vit():
    model, golden = fill(vit.VisionTransformer(**SIZES)), GOLDENS["2_attention"]
    _, extras = model.encode(model.embed(images()), attention=(0, 2), hidden=True)
    agrees(extras.attention[0], golden["scores_first_block"])
    agrees(extras.attention[2], golden["scores_last_block"])
    assert sorted(extras.attention) == [0, 2] and len(extras.hidden) == SIZES["depth"] + 1
    for hidden, expected in zip(extras.hidden, golden["hidden_states"], strict=True):
        agrees(hidden, expected)


def test_vit_tiny_has_12_heads_and_5_7_million_parameters():
    model = vit.vit_tiny(num_classes=1000)
    assert model.blocks[0].attn.num_heads == 12
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == 5.7


def test_explicit_and_fast_attention_agree():
    model = fill(vit.VisionTransformer(**SIZES))
    tokens = model.embed(images())
    x, _ = model.encode(tokens, attention=range(3))
    torch.testing.assert_close(x, model.encode(tokens), rtol=1e-10, atol=1e-10)


def test_only_the_asked_blocks_leave_the_fast_path(monkeypatch):
    calls = []
    fast = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a: calls.append(1) or fast(*a))
    model = small()
    _, extras = model.encode(model.embed(images()), attention=(1,))
    assert len(calls) == 2 and list(extras.attention) == [1]


def test_attention_maps_are_the_softmax_of_the_scores():
    model = fill(vit.VisionTransformer(**SIZES))
    maps = vit.attention_maps(model, images(), layers=(2, 0))
    _, extras = model.encode(model.embed(images()), attention=(0, 2))
    assert maps.shape == (2, 4, 6, 17, 17)
    torch.testing.assert_close(maps[0], extras.attention[2].softmax(-1))
    torch.testing.assert_close(maps.sum(-1), torch.ones(2, 4, 6, 17).double())


def test_permuting_patches_with_their_positions_permutes_the_features():
    model = fill(vit.VisionTransformer(**SIZES))
    tokens, order = model.embed(images()), torch.randperm(16, generator=torch.Generator().manual_seed(0))
    straight, permuted = model.encode(tokens), model.encode(tokens[:, order])
    torch.testing.assert_close(permuted[:, 1:], straight[:, 1:][:, order])
    torch.testing.assert_close(permuted[:, 0], straight[:, 0])
    assert not torch.allclose(permuted[:, 1:], straight[:, 1:])


def test_position_is_added_before_patches_are_dropped():
    model = fill(vit.VisionTransformer(**SIZES))
    one, other = model.embed(images())[:, [3]], model.embed(images().roll(8, dims=-1))[:, [0]]  # patch 3's content, at place 0
    assert not torch.allclose(model.encode(one), model.encode(other))


def test_other_image_sizes_get_an_interpolated_position():
    model = fill(vit.VisionTransformer(**SIZES))
    assert model(images(2, 48)).shape == (2, 48)
    assert model(images(2, 32)[:, :, :16]).shape == (2, 48)  # 2 x 4 patches
    coarse, fine = model.pos_embed, vit.resize_position(model.pos_embed, (8, 8))
    averaged = F.avg_pool2d(fine[:, 1:].view(1, 8, 8, -1).permute(0, 3, 1, 2), 2).flatten(2).transpose(1, 2)
    assert (averaged - coarse[:, 1:]).abs().mean() < 0.05 and torch.equal(fine[:, :1], coarse[:, :1])


def test_a_patch_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="patch size 5 does not divide image size 32"):
        vit.VisionTransformer(**{**SIZES, "patch_size": 5})
    with pytest.raises(ValueError, match="does not divide images of 32 x 30"):
        small().embed(images()[..., :30])
    with pytest.raises(ValueError, match="blocks are 0 to 2"):
        model = small()
        model.encode(model.embed(images()), attention=(3,))


def test_stochastic_depth_skips_whole_branches_and_keeps_the_expectation():
    torch.manual_seed(0)
    block = vit.Block(12, 3, drop_path=0.4)
    branch = torch.ones(20000, 2, 12)
    dropped = block.stochastic_depth(branch)
    assert dropped[:, 0, 0].unique().tolist() == pytest.approx([0, 1 / 0.6])
    assert torch.equal(dropped[:, 0, 0], dropped[:, 1, 5])
    assert abs(dropped.mean() - 1) < 0.03  # 4 standard errors
    assert block.eval().stochastic_depth(branch) is branch
    assert [b.drop_path for b in small(drop_path=0.2).blocks] == pytest.approx([0, 0.1, 0.2])


def test_the_head_and_both_poolings_see_what_they_should():
    tokens = torch.randn(2, 17, 48, dtype=torch.float64)
    moved = tokens.clone()
    moved[:, 0] += 1
    assert torch.equal(small().pool(tokens), small().pool(moved))  # the mean of the patches ignores the class token
    changed = tokens.clone()
    changed[:, 1:] += 1
    token = small(global_pool="token")
    assert torch.equal(token.pool(tokens), token.pool(changed))


# ------------------------------------------------------------------------------------------------ weights

def published(fmt, model):
    """The model's weights as a published file of that kind holds them."""
    state = model.state_dict()
    body = {k: v for k, v in state.items() if not k.startswith(("head", "fc_norm", "norm"))}
    norm = {"norm.weight": torch.ones(48), "norm.bias": torch.zeros(48)}
    decoder = {"mask_token": torch.zeros(1, 1, 24), "decoder_embed.weight": torch.zeros(24, 48), "decoder_pred.bias": torch.zeros(192)}
    if fmt == "mae":
        return {"model": {**body, **norm, **decoder}}
    if fmt == "mae-lite":
        return {"model": {f"module.model.{k}": v for k, v in {**body, **norm, **decoder}.items()}, "start_epoch": 400}
    if fmt == "moco-v3":
        head = {"head.0.weight": torch.zeros(64, 48), "head.1.weight": torch.ones(64)}
        other = {f"module.momentum_encoder.{k}": v + 1 for k, v in {**body, **norm, **head}.items()}
        base = {f"module.base_encoder.{k}": v for k, v in {**body, **norm, **head}.items()}
        return {"state_dict": {**base, **other, "module.predictor.0.weight": torch.zeros(64, 32)}, "arch": "vit_small", "epoch": 300}
    if fmt == "deit":
        return {"model": {**body, **norm, "head.weight": torch.zeros(1000, 48), "head.bias": torch.zeros(1000)}}
    if fmt == "timm":
        return {**body, **norm}
    return {"model": {**{f"encoder.{k}": v for k, v in {**body, **norm}.items()}, "decoder_norm.bias": torch.zeros(24)}, "step": 3}


@pytest.mark.parametrize("fmt", ["mae", "mae-lite", "moco-v3", "deit", "timm", "own"])
def test_published_files_load_as_they_are(fmt, tmp_path):
    source, model = fill(vit.VisionTransformer(**SIZES)).float(), vit.VisionTransformer(**SIZES, num_classes=10)
    torch.save(published(fmt, source), tmp_path / "file.pth")
    report = vit.load_weights(model, tmp_path / "file.pth")
    assert all(torch.equal(model.state_dict()[k], v) for k, v in source.state_dict().items() if k.startswith(("blocks", "cls", "pos", "patch")))
    assert set(report.missing) == {"fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"}
    assert any("norm.weight" in name for name in report.unused) and "head.weight" in str(report)
    assert report == vit.load_weights(model, published(fmt, source))  # the loaded dictionary does as well


def test_moco_v3_files_have_two_encoders_to_choose_from():
    source, model = small().float(), vit.VisionTransformer(**SIZES)
    vit.load_weights(model, published("moco-v3", source), branch="momentum_encoder")
    assert torch.equal(model.cls_token, source.cls_token + 1)


def test_the_head_loads_when_it_fits_and_is_named_when_it_does_not():
    source = small(num_classes=10).float()
    same, other = vit.VisionTransformer(**SIZES, num_classes=10), vit.VisionTransformer(**SIZES, num_classes=7)
    assert vit.load_weights(same, source.state_dict()) == ([], [])
    report = vit.load_weights(other, source.state_dict())
    assert report.missing == report.unused == ["head.weight", "head.bias"]


def test_loading_interpolates_the_position_to_another_grid():
    source = small().float()
    model = vit.VisionTransformer(**{**SIZES, "img_size": 64})
    vit.load_weights(model, source.state_dict())
    assert torch.equal(model.pos_embed, vit.resize_position(source.pos_embed, (8, 8)))


def test_published_settings_in_a_namespace_load_with_weights_only(tmp_path):
    import argparse
    torch.save({"model": small().state_dict(), "args": argparse.Namespace(lr=1)}, tmp_path / "file.pth")
    assert vit.load_weights(small(), tmp_path / "file.pth").missing == []


@pytest.mark.parametrize("change, message", [
    (lambda s: s.update({"blocks.1.attn.proj.weight": torch.zeros(3, 5)}), r"blocks.1.attn.proj.weight: \(3, 5\).*\(48, 48\)"),
    (lambda s: s.update({"blocks.3.norm1.weight": torch.zeros(48)}), r"blocks.3.norm1.weight: \(48,\) in the file, none in the model"),
    (lambda s: s.pop("blocks.2.mlp.fc1.bias"), r"blocks.2.mlp.fc1.bias: \(192,\) in the model, none in the file"),
    (lambda s: s.update({"pos_embed": torch.zeros(1, 17, 24)}), r"pos_embed: \(1, 17, 24\) in the file, \(1, 17, 48\)"),
    (lambda s: s.pop("patch_embed.proj.weight"), "holds no Vision Transformer"),
])
def test_weights_that_do_not_fit_name_the_tensor_and_both_shapes(change, message):
    state = small().state_dict()
    change(state)
    with pytest.raises(vit.WeightsError, match=message):
        vit.load_weights(small(), state)


def test_what_is_no_checkpoint_is_named(tmp_path):
    (tmp_path / "text.pth").write_text("hello")
    with pytest.raises(vit.WeightsError, match="text.pth: not a PyTorch checkpoint"):
        vit.load_weights(small(), tmp_path / "text.pth")
    with pytest.raises(vit.WeightsError, match="none.pth: cannot be opened"):
        vit.load_weights(small(), tmp_path / "none.pth")


def test_sizes_are_read_off_a_checkpoint():
    source = fill(vit.VisionTransformer(**TEACHER, num_classes=5)).float()
    model, report = vit.from_weights(source.state_dict(), num_heads=4)
    assert report == ([], [])
    torch.testing.assert_close(model(images(dtype=torch.float32)), source(images(dtype=torch.float32)))


# ------------------------------------------------------------------------------------------------ toy data

def test_toy_shapes_are_known_by_their_seed():
    pixels, labels = vit.toy_shapes(300, 32, seed=0)
    fewer, _ = vit.toy_shapes(10, 32, seed=0)
    other, _ = vit.toy_shapes(10, 32, seed=1)
    assert pixels.shape == (300, 3, 32, 32) and pixels.dtype == torch.uint8
    assert torch.equal(pixels[:10], fewer) and not torch.equal(fewer, other)
    assert set(labels.tolist()) == set(range(len(vit.TOY_CLASSES)))


def test_toy_shapes_show_the_same_scene_at_any_size():
    coarse, labels = vit.toy_shapes(20, 32)
    fine, same = vit.toy_shapes(20, 64)
    assert torch.equal(labels, same)
    assert (F.avg_pool2d(fine.float(), 2) - coarse.float()).abs().mean() < 2


def test_toy_colours_do_not_tell_the_class():
    pixels, labels = vit.toy_shapes(4000, 8)
    colours = torch.cat([pixels.float().mean((2, 3)), torch.ones(4000, 1)], 1)
    target = F.one_hot(labels).float()
    guess = (colours[:2000] @ torch.linalg.lstsq(colours[2000:], target[2000:]).solution).argmax(1)
    assert (guess == labels[:2000]).float().mean() < 0.2  # chance is 0.1
