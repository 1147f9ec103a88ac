"""mae.py: the method against published numbers, then its claims, then a run."""
import math

import pytest
import torch
from conftest import GOLDENS, SIZES, agrees, call, fill, images, log_of, noise, refused, run

import mae
import vit


def autoencoder(dtype=torch.float64, norm_pix_loss=True, **kw):
    model = mae.MaskedAutoencoder(vit.VisionTransformer(**SIZES, **kw), 24, 1, 3, norm_pix_loss)
    return fill(model, dtype=dtype, rename=lambda name: name.removeprefix("encoder."))


# ------------------------------------------------------------ published numbers

@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-6), (torch.float32, 1e-4)])
@pytest.mark.parametrize("norm_pix", [True, False])
def test_published_mae_gives_this_loss_prediction_and_gradient(norm_pix, dtype, tolerance):
    golden = GOLDENS["3_mae"][f"norm_pix_loss_{norm_pix}"]
    model = autoencoder(dtype, norm_pix)
    loss, pred, mask = model(images(dtype=dtype), 0.75, noise(4, 16, dtype))
    loss.backward()
    assert mask.tolist() == GOLDENS["3_mae"]["mask"]
    agrees(loss, golden["loss"], tolerance)
    agrees(pred, golden["pred"], tolerance)
    learned = {name: p for name, p in model.named_parameters() if p.requires_grad}
    norms = {name.removeprefix("encoder."): p.grad.norm() for name, p in learned.items()}
    assert norms.keys() == golden["grad_norms"].keys()
    for name, norm in golden["grad_norms"].items():
        agrees(norms[name], norm, 10 * tolerance if dtype == torch.float32 else tolerance)
    agrees(torch.stack(list(norms.values())).norm(), golden["grad_total_norm"], tolerance)


def test_published_mae_normalizes_the_latent_by_the_encoders_last_norm():
    model = autoencoder()
    kept, _, _ = mae.random_masking(model.encoder.embed(images()), 0.75, noise(4, 16))
    latent = model.encoder.norm(model.encoder.encode(kept))
    agrees(latent, GOLDENS["3_mae"]["norm_pix_loss_True"]["latent"])


def test_published_mae_has_this_decoder_position_table():
    agrees(autoencoder().decoder_pos_embed, GOLDENS["3_mae"]["decoder_pos_embed_float32"], 1e-7)


def test_patchify_orders_pixels_as_published_and_unpatchify_inverts_it():
    patches = mae.patchify(images(), 8)
    agrees(patches, GOLDENS["3_mae"]["patchified_image"])
    assert torch.equal(mae.unpatchify(patches, 8), images())
    assert torch.equal(patches[0, 1].view(8, 8, 3)[2, 5], images()[0, :, 2, 8 + 5])
    upper = images()[:, :, :16]  # images need not be square
    assert torch.equal(mae.patchify(upper, 8), patches[:, :8])


# ------------------------------------------------------------ claims

def test_random_masking_keeps_the_smallest_noise_and_says_where_it_was():
    tokens, keys = torch.randn(3, 16, 5), torch.rand(3, 16)
    kept, mask, ids_restore = mae.random_masking(tokens, 0.7, keys)
    count = int(16 * (1 - 0.7))
    assert kept.shape == (3, count, 5)
    assert mask.sum(1).tolist() == [16 - count] * 3
    for b in range(3):
        places = (mask[b] == 0).nonzero()[:, 0]
        assert set(places.tolist()) == set(keys[b].argsort()[:count].tolist())
        for place in places:
            assert torch.equal(kept[b, ids_restore[b, place]], tokens[b, place])


def test_random_masking_restores_the_order_of_all_patches():
    tokens = torch.randn(3, 16, 5)
    kept, mask, ids_restore = mae.random_masking(tokens, 0.5)
    padded = torch.cat([kept, torch.zeros(3, 8, 5)], dim=1)
    restored = padded.gather(1, ids_restore[:, :, None].expand(-1, -1, 5))
    assert torch.equal(restored, tokens * (mask == 0)[:, :, None])


def test_random_masking_is_uniform_and_differs_between_images():
    torch.manual_seed(0)
    _, mask, _ = mae.random_masking(torch.zeros(8000, 16, 1), 0.75)
    assert (mask.float().mean(0) - 0.75).abs().max() < 4 * math.sqrt(0.75 * 0.25 / 8000)
    assert len(mask.unique(dim=0)) > 1000


def test_sec3_masked_patches_never_reach_the_encoder():
    model = autoencoder()
    loss, before, mask = model(images(), noise=noise(4, 16))
    other = mae.patchify(images().flip(0), 8)
    changed = mae.unpatchify(mae.patchify(images(), 8) + 3 * mask[:, :, None] * other, 8)
    changed_loss, after, _ = model(changed, noise=noise(4, 16))
    assert torch.equal(before, after) and loss != changed_loss  # only the target changes


def test_sec3_the_encoder_sees_only_visible_tokens_and_the_decoder_all(monkeypatch):
    lengths = []
    forward = vit.Block.forward

    def counted(self, x):
        lengths.append(x.shape[1])
        return forward(self, x)
    monkeypatch.setattr(vit.Block, "forward", counted)
    autoencoder()(images())
    assert lengths == [5, 5, 5, 17]  # three encoder blocks, one decoder block


def test_sec3_the_loss_counts_removed_patches_only():
    model = autoencoder()
    loss, pred, mask = model(images(), noise=noise(4, 16))
    error = ((pred - model.target(images())) ** 2).mean(-1)
    assert loss.item() == pytest.approx(error[mask == 1].mean().item(), rel=1e-6)


def test_norm_pix_targets_have_mean_zero_and_variance_one():
    target = autoencoder().target(images())
    torch.testing.assert_close(target.mean(-1), torch.zeros(4, 16).double(), atol=1e-6, rtol=0)
    torch.testing.assert_close(target.var(-1), torch.ones(4, 16).double(), atol=1e-5, rtol=0)
    var = mae.patchify(images(), 8).var(-1)  # with little contrast, 1e-6 is felt
    dark = autoencoder().target(1e-3 * images()).var(-1)
    torch.testing.assert_close(dark, var / (var + 1), atol=0, rtol=1e-6)
    assert autoencoder().target(torch.ones(1, 3, 32, 32)).abs().max() == 0


def test_sec3_without_masking_there_are_features_and_no_division_by_zero():
    loss, pred, mask = autoencoder()(images(), mask_ratio=0)
    assert loss == 0 and mask.sum() == 0 and pred.isfinite().all()


def test_encoder_that_pools_by_mean_normalizes_every_token_in_mae():
    a, b = autoencoder(global_pool="avg"), autoencoder(global_pool="token")
    assert a.state_dict().keys() == b.state_dict().keys()
    assert "encoder.norm.weight" in a.state_dict()
    losses = [model(images(), noise=noise(4, 16))[0] for model in (a, b)]
    assert torch.equal(*losses)


def test_bf16_keeps_the_loss_in_float32():
    model = autoencoder(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss, pred, _ = model(images(dtype=torch.float32), noise=noise(4, 16))
    assert loss.dtype == torch.float32 and pred.dtype == torch.bfloat16
    agrees(loss, GOLDENS["3_mae"]["norm_pix_loss_True"]["loss"], 0.02)


@pytest.mark.slow
def test_compiled_mae_equals_the_plain_one():
    torch.manual_seed(0)
    encoder = vit.VisionTransformer(img_size=16, patch_size=4, embed_dim=24, depth=1, num_heads=2)
    model = mae.MaskedAutoencoder(encoder, 12, 1, 3)
    inputs = torch.randn(2, 3, 16, 16), 0.75, torch.rand(2, 16)
    plain = model(*inputs)
    model.compile()  # leaves the names in the state dict alone
    for a, b in zip(plain, model(*inputs)):
        torch.testing.assert_close(a, b)


# ------------------------------------------------------------ runs

def test_mae_runs_from_the_command_line_and_learns(tmp_path):
    out = run("mae.py", "--out", tmp_path, "--fraction", 0.0625, "--epochs", 40, "--max-steps", 64,
              "--batch-size", 16, "--base-lr", 0.012, "--decoder-dim", 48)
    log = log_of(tmp_path)
    assert "batch 16 = 1 ranks x 1 accum x 16 images; lr 0.00075 = 0.012 x 16 / 256" in out
    assert f"step 64 of 1280: {tmp_path}" in out and "--decoder-dim 48 --decoder-depth 1" in out
    assert "training: 512 images of 10 classes from toy" in out
    assert log[-1]["loss"] < 0.9 < 1 < log[0]["loss"]  # predicting each patch's mean gives 0.98
    names = ["step", "loss", "epoch", "lr", "grad_norm", "images_per_s", "data_wait"]
    assert list(log[-1]) == names
    for name in ("config.json", "last.pt", "reconstruction.png"):
        assert (tmp_path / name).stat().st_size > 100
    state = torch.load(tmp_path / "last.pt", weights_only=True)
    assert state["step"] == 64 and state["config"]["decoder_dim"] == 48


def test_mae_settings_are_the_papers_and_presets_say_what_differs():
    args = mae.parse(["--data", "x"], mae.settings, mae.PRESETS, out="")
    recipe = dict(arch="tiny", img_size=224, patch_size=16, mask_ratio=0.75, norm_pix_loss=True,
                  decoder_dim=96, decoder_depth=1, decoder_heads=3, min_crop=0.08, epochs=400,
                  warmup_epochs=40, batch_size=4096, base_lr=1.5e-4, weight_decay=0.05)
    assert recipe.items() <= vars(args).items()
    small = mae.parse(["--data", "cifar100"], mae.settings, mae.PRESETS, out="")
    differ = {name for name in recipe if getattr(small, name) != recipe[name]}
    assert differ == {
        "img_size", "patch_size", "min_crop", "warmup_epochs", "batch_size", "base_lr"}


@pytest.mark.parametrize("ratio, kept", [(0.985, "0 of 64"), (0, "64 of 64"), (1, "0 of 64")])
def test_mask_ratios_that_leave_nothing_or_everything_are_refused(ratio, kept, capsys, tmp_path):
    line = refused(capsys, mae, "--mask-ratio", ratio, "--out", tmp_path)
    assert f"--mask-ratio {float(ratio)}: keeps {kept}" in line


def test_mae_weight_decay_spares_one_dimensional_tensors_only(tmp_path, monkeypatch):
    made = []

    class AdamW(torch.optim.AdamW):
        def __init__(self, *args, **kw):
            super().__init__(*args, **kw)
            made.append(self)
    monkeypatch.setattr(torch.optim, "AdamW", AdamW)
    call(mae, "--fraction", 0.01, "--batch-size", 8, "--max-steps", 1, "--out", tmp_path)
    matrices, vectors = made[0].param_groups
    assert matrices["weight_decay"] == 0.05 and vectors["weight_decay"] == 0
    assert {p.ndim for p in vectors["params"]} == {1}
    # Class and mask token decay, as published.
    assert any(p.shape == (1, 1, 96) for p in matrices["params"])


def test_mae_init_starts_from_the_encoder_of_another_run(tmp_path, capsys):
    tiny = ("--fraction", 0.01, "--batch-size", 8, "--max-steps", 1)
    call(mae, *tiny, "--out", tmp_path / "a")
    call(mae, *tiny, "--init", tmp_path / "a" / "last.pt", "--out", tmp_path / "b", "--seed", 1)
    a, b = (torch.load(tmp_path / x / "last.pt", weights_only=True)["model"] for x in "ab")
    name = "encoder.blocks.0.attn.qkv.weight"
    torch.testing.assert_close(a[name], b[name], atol=0, rtol=0)  # step 0 has learning rate 0
    assert not torch.equal(a["decoder_embed.weight"], b["decoder_embed.weight"])
    assert "randomly initialized: nothing" in capsys.readouterr().out
