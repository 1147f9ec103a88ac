"""mae.py: the method against published numbers, then its claims."""
import argparse
import math

import pytest
import torch
from conftest import GOLDENS, SIZES, agrees, call, fill, images, log_of, noise, run

import mae
import vit


def autoencoder(dtype=torch.float64, norm_pix_loss=True, **kw):
    model = mae.MaskedAutoencoder(vit.VisionTransformer(**SIZES, **kw), 24, 1, 3, norm_pix_loss)
    return fill(model, dtype=dtype, rename=lambda name: name.removeprefix("encoder."))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-6), (torch.float32, 1e-4)])
@pytest.mark.parametrize("norm_pix", [True, False])
def test_loss_prediction_and_gradients_are_those_of_the_published_mae(norm_pix, dtype, tolerance):
    golden = GOLDENS["3_mae"][f"norm_pix_loss_{norm_pix}"]
    model = autoencoder(dtype, norm_pix)
    loss, pred, mask = model(images(dtype=dtype), 0.75, noise(4, 16, dtype))
    loss.backward()
    assert mask.tolist() == GOLDENS["3_mae"]["mask"]
    agrees(loss, golden["loss"], tolerance)
    agrees(pred, golden["pred"], tolerance)
    norms = {n.removeprefix("encoder."): p.grad.norm() for n, p in model.named_parameters() if p.requires_grad}
    assert norms.keys() == golden["grad_norms"].keys()
    for name, norm in golden["grad_norms"].items():
        agrees(norms[name], norm, 10 * tolerance if dtype == torch.float32 else tolerance)
    agrees(torch.stack(list(norms.values())).norm(), golden["grad_total_norm"], tolerance)


def test_the_latent_is_normalised_by_the_encoders_last_norm():
    model = autoencoder()
    kept, _, _ = mae.random_masking(model.encoder.embed(images()), 0.75, noise(4, 16))
    agrees(model.encoder.norm(model.encoder.encode(kept)), GOLDENS["3_mae"]["norm_pix_loss_True"]["latent"])


def test_decoder_position_table_is_maes():
    agrees(autoencoder().decoder_pos_embed, GOLDENS["3_mae"]["decoder_pos_embed_float32"], 1e-7)


def test_a_mean_pooling_encoder_normalises_every_token_here():
    a, b = autoencoder(global_pool="avg"), autoencoder(global_pool="token")
    assert a.state_dict().keys() == b.state_dict().keys() and "encoder.norm.weight" in a.state_dict()
    assert torch.equal(a(images(), noise=noise(4, 16))[0], b(images(), noise=noise(4, 16))[0])


def test_patchify_orders_pixels_as_published_and_unpatchify_inverts_it():
    patches = mae.patchify(images(), 8)
    agrees(patches, GOLDENS["3_mae"]["patchified_image"])
    assert torch.equal(mae.unpatchify(patches, 8), images())
    assert torch.equal(patches[0, 1].view(8, 8, 3)[2, 5], images()[0, :, 2, 8 + 5])


# ------------------------------------------------------------------------------------------------ claims

def test_masking_keeps_the_smallest_noise_and_says_where_it_was():
    tokens, keys = torch.randn(3, 16, 5), torch.rand(3, 16)
    kept, mask, ids_restore = mae.random_masking(tokens, 0.7, keys)
    count = int(16 * (1 - 0.7))
    assert kept.shape == (3, count, 5) and mask.sum(1).tolist() == [16 - count] * 3
    for b in range(3):
        assert set((mask[b] == 0).nonzero()[:, 0].tolist()) == set(keys[b].argsort()[:count].tolist())
        for place in (mask[b] == 0).nonzero()[:, 0]:
            assert torch.equal(kept[b, ids_restore[b, place]], tokens[b, place])


def test_masks_are_uniform_over_the_patches():
    torch.manual_seed(0)
    _, mask, _ = mae.random_masking(torch.zeros(8000, 16, 1), 0.75)
    assert (mask.mean(0) - 0.75).abs().max() < 4 * math.sqrt(0.75 * 0.25 / 8000)


def test_sec3_masked_patches_never_reach_the_encoder():
    model = autoencoder()
    _, before, mask = model(images(), noise=noise(4, 16))
    changed = mae.unpatchify(mae.patchify(images(), 8) + 3 * mask[:, :, None] * mae.patchify(images(4, 32).flip(0), 8), 8)
    loss, after, _ = model(changed, noise=noise(4, 16))
    assert torch.equal(before, after)                                          # nothing but the target changes
    assert loss != model(images(), noise=noise(4, 16))[0]


def test_sec3_the_loss_counts_removed_patches_only():
    model = autoencoder()
    loss, pred, mask = model(images(), noise=noise(4, 16))
    error = ((pred - model.target(images())) ** 2).mean(-1)
    assert loss.item() == pytest.approx(error[mask == 1].mean().item(), rel=1e-12)


def test_norm_pix_targets_have_zero_mean_and_unit_variance():
    target = autoencoder().target(images())
    torch.testing.assert_close(target.mean(-1), torch.zeros(4, 16).double(), atol=1e-12, rtol=0)
    torch.testing.assert_close(target.var(-1), torch.ones(4, 16).double(), atol=1e-5, rtol=0)


def test_without_masking_there_are_features_and_no_division_by_zero():
    loss, pred, mask = autoencoder()(images(), mask_ratio=0)
    assert loss == 0 and mask.sum() == 0 and pred.isfinite().all()


def test_other_image_sizes_work():
    loss, pred, _ = autoencoder()(images(2, 48))
    assert pred.shape == (2, 36, 192) and loss.isfinite()


def test_only_the_encoders_visible_tokens_cost(monkeypatch):
    lengths = []
    block = vit.Block.forward
    monkeypatch.setattr(vit.Block, "forward", lambda self, x, *a: lengths.append(x.shape[1]) or block(self, x, *a))
    autoencoder()(images())
    assert lengths == [5, 5, 5, 17]                                            # three encoder blocks, one decoder block


def test_bf16_keeps_the_loss_in_float32():
    model = autoencoder(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss, pred, _ = model(images(dtype=torch.float32), noise=noise(4, 16))
    assert loss.dtype == torch.float32 and pred.dtype == torch.bfloat16
    agrees(loss, GOLDENS["3_mae"]["norm_pix_loss_True"]["loss"], 0.02)


# ------------------------------------------------------------------------------------------------ runs

def test_mae_runs_from_the_command_line_and_learns(tmp_path):
    out = run("mae.py", "--out", tmp_path, "--fraction", 0.0625, "--epochs", 40, "--max-steps", 128, "--batch-size", 16, "--base-lr", 0.012,
              "--decoder-dim", 48)
    log = log_of(tmp_path)
    assert "1 rank x 16 images x 1 accumulation = 16 images; base lr 0.012 x 16/256 = lr 0.00075" in out and "step 128 of 1280" in out
    assert log[-1]["loss"] < 0.85 < 1 < log[0]["loss"]  # predicting each patch's mean gives 0.98
    assert {"epoch", "step", "loss", "lr", "images_per_s", "data_wait"} == log[-1].keys()
    for name in ("config.json", "last.pt", "loss.png", "reconstruction.png"):
        assert (tmp_path / name).stat().st_size > 100
    state = torch.load(tmp_path / "last.pt", weights_only=True)
    assert state["step"] == 128 and state["config"]["decoder_dim"] == 48


def test_a_checkpoint_can_be_looked_at_again_and_started_from(tmp_path, capsys):
    tiny = ("--arch", "toy", "--fraction", 0.01, "--batch-size", 16, "--max-steps", 1)
    call(mae, *tiny, "--out", tmp_path / "a", "--decoder-dim", 48, "--mask-ratio", 0.5)
    call(mae, "--reconstruct", tmp_path / "a" / "last.pt", "--out", tmp_path / "b")   # sizes come from the checkpoint
    assert (tmp_path / "b" / "reconstruction.png").stat().st_size > 10000
    call(mae, *tiny, "--init", tmp_path / "a" / "last.pt", "--out", tmp_path / "c", "--mask-ratio", 0)
    a, c = (torch.load(tmp_path / x / "last.pt", weights_only=True)["model"] for x in "ac")
    assert torch.equal(a["encoder.blocks.0.attn.qkv.weight"], c["encoder.blocks.0.attn.qkv.weight"])  # step 0 has lr 0
    assert "initialised afresh: nothing; unused in the file: " in capsys.readouterr().out.replace("\n", " ")


def test_a_published_mae_file_can_be_looked_at(tmp_path):
    model = mae.MaskedAutoencoder(vit.vit_toy(img_size=32, patch_size=4), 32, 1, 4)
    state = {n.removeprefix("encoder."): t for n, t in model.state_dict().items()}
    torch.save({"model": state, "args": argparse.Namespace(lr=1e-3)}, tmp_path / "mae_visualize.pth")
    call(mae, "--reconstruct", tmp_path / "mae_visualize.pth", "--arch", "toy", "--img-size", 32, "--patch-size", 4,
         "--decoder-dim", 32, "--decoder-heads", 4, "--out", tmp_path)
    assert (tmp_path / "reconstruction.png").stat().st_size > 10000
