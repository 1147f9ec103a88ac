"""simmim.py: the method against published numbers, then its claims, then a run."""
import math

import pytest
import torch
from conftest import GOLDENS, SIZES, agrees, call, draw_nothing, fill, images, log_of, refused

import mae
import simmim
import vit

GOLDEN = GOLDENS["11_simmim"]
MASK = torch.tensor([[float(bit) for bit in "".join(rows)] for rows in GOLDEN["mask"]])  # (4, 16)
NOISE = 1 - MASK  # the masked squares have the smallest
ALL_VISIBLE = 0  # mask ratio


def golden_model(dtype=torch.float64, **kw):
    model = simmim.SimMIM(vit.VisionTransformer(**SIZES, **kw))
    return fill(model, dtype=dtype, rename=published)


def published(name):
    """The published name of a parameter."""
    return name.removeprefix("encoder.").replace("decoder.", "decoder.0.")


# ------------------------------------------------------------ published numbers

@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-6), (torch.float32, 1e-4)])
def test_published_simmim_gives_this_loss_prediction_and_gradient(dtype, tolerance):
    model = golden_model(dtype)
    loss, pred, mask = model(images(dtype=dtype), 0.6, NOISE.to(dtype))
    loss.backward()
    assert torch.equal(mask.float(), MASK)
    agrees(loss, GOLDEN["loss"], tolerance)
    agrees(pred, GOLDEN["prediction_per_token"], tolerance)
    agrees(simmim.unpatchify(pred, 8), GOLDEN["prediction_image"], tolerance)
    learned = {name: p for name, p in model.named_parameters() if p.requires_grad}
    norms = {published(name): p.grad.norm() for name, p in learned.items()}
    assert norms.keys() == GOLDEN["grad_norms"].keys()
    for name, norm in GOLDEN["grad_norms"].items():
        agrees(norms[name], norm, 10 * tolerance if dtype == torch.float32 else tolerance)
    agrees(torch.stack(list(norms.values())).norm(), GOLDEN["grad_total_norm"], tolerance)


def test_published_simmim_adds_position_to_mask_tokens_also():
    model = golden_model()
    seen = {}

    def record_input(block, inputs):
        seen["tokens"] = inputs[0]

    def record_output(norm, inputs, output):
        seen["latent"] = output[:, -16:]
    model.encoder.blocks[0].register_forward_pre_hook(record_input)
    model.encoder.norm.register_forward_hook(record_output)
    model(images(), 0.6, NOISE.double())
    agrees(seen["tokens"], GOLDEN["tokens_into_block_0"])
    agrees(seen["latent"], GOLDEN["encoder_output"])


def test_published_simmim_is_none_of_its_wrong_readings():
    model = golden_model()
    _, pred, _ = model(images(), 0.6, NOISE.double())
    mask = MASK.double()
    error = (pred - simmim.patchify(images(), 8)).abs().mean(-1)
    mae_order = (pred - mae.patchify(images(), 8)).abs().mean(-1)
    position = model.encoder.pos_embed[:, 1:]
    model.mask_token.data = model.mask_token - position  # so that the sum has none
    without_position, _, _ = model(images(), 0.6, NOISE.double())
    wrong = {
        "alt_loss_all_pixels": error.mean(),
        "alt_loss_visible_pixels": error[mask == 0].mean(),
        "alt_loss_not_divided_by_3": 3 * error[mask == 1].mean(),
        "alt_loss_mae_pixel_order": mae_order[mask == 1].mean(),
        "alt_loss_mask_token_without_position": without_position}
    assert wrong.keys() == {name for name in GOLDEN if name.startswith("alt_")}
    for name, number in wrong.items():
        agrees(number, GOLDEN[name])
        assert abs(number - GOLDEN["loss"]) > 0.005


@pytest.mark.parametrize("size, patch_size, mask_unit", [(224, 16, 32), (32, 8, 16)])
def test_published_simmim_masks_this_many_units_and_patches(size, patch_size, mask_unit):
    golden = GOLDEN["mask_generator"][f"{size}_{mask_unit}_{patch_size}_0.6"]
    grid, unit = size // patch_size, mask_unit // patch_size
    assert unit == golden["tokens_per_unit_side"]
    mask = simmim.random_mask(torch.rand(3, grid ** 2), 0.6, unit)
    assert mask.sum(1).tolist() == [golden["masked_tokens"]] * 3
    units = mask.view(3, grid, grid)[:, ::unit, ::unit]
    assert units.sum((1, 2)).tolist() == [golden["masked_units"]] * 3


# ------------------------------------------------------------ claims

@pytest.mark.parametrize("grid, unit, ratio", [
    (8, 2, 0.6), (12, 4, 0.5), (6, 1, 0.3), (9, 3, 0.6), (8, 2, 0)])
def test_sec32_random_mask_covers_the_squares_with_the_smallest_noise(grid, unit, ratio):
    keys = torch.rand(5, grid ** 2)
    mask = simmim.random_mask(keys, ratio, unit).view(5, grid, grid).float()
    first = keys.view(5, grid, grid)[:, ::unit, ::unit].flatten(1)  # patches of the units
    largest = -torch.ones(5)  # of the masked
    if ratio:
        largest = first.sort(dim=1).values[:, math.ceil(first.shape[1] * ratio) - 1]
    for row in range(grid):
        for column in range(grid):
            own = keys.view(5, grid, grid)[:, row // unit * unit, column // unit * unit]
            assert torch.equal(mask[:, row, column], (own <= largest).float())


def test_sec32_random_mask_is_uniform_and_differs_between_images():
    torch.manual_seed(0)
    mask = simmim.random_mask(torch.rand(4000, 64)).float()
    assert (mask.mean(0) - 10 / 16).abs().max() < 4.5 * math.sqrt(0.6 * 0.4 / 4000)
    assert len(mask.unique(dim=0)) > 1000


@pytest.mark.parametrize("unit, masked", [(1, 39), (2, 40), (4, 48)])
def test_sec3_each_image_gets_a_mask_of_60_percent_of_the_squares(unit, masked):
    torch.manual_seed(0)
    model = simmim.SimMIM(vit.vit_toy(img_size=32, patch_size=4, depth=1), mask_unit=unit)
    _, _, mask = model(torch.randn(6, 3, 32, 32), 0.6, torch.rand(6, 64))
    squares = mask.view(6, 8 // unit, unit, 8 // unit, unit)
    assert mask.sum(1).tolist() == [masked] * 6 and len(mask.unique(dim=0)) > 1
    assert torch.equal(squares, squares[:, :, :1, :, :1].expand_as(squares))


def test_sec3_masked_pixels_are_not_seen_and_visible_ones_not_predicted():
    model = golden_model()
    loss, before, mask = model(images(), 0.6, NOISE.double())
    pixels, other = simmim.patchify(images(), 8), 3 * simmim.patchify(images().flip(0), 8)
    changed = simmim.unpatchify(pixels + mask[:, :, None] * other, 8)
    changed_loss, after, _ = model(changed, 0.6, NOISE.double())
    assert torch.equal(before, after) and loss != changed_loss
    error = (before - simmim.patchify(images(), 8)).abs()
    assert loss.item() == pytest.approx(error[mask == 1].mean().item(), rel=1e-6)


def test_sec3_the_encoder_sees_all_tokens(monkeypatch):
    lengths = []
    forward = vit.Block.forward

    def counted(self, x):
        lengths.append(x.shape[1])
        return forward(self, x)
    monkeypatch.setattr(vit.Block, "forward", counted)
    golden_model()(images(), 0.6, NOISE.double())
    assert lengths == [17, 17, 17]


def test_sec3_without_masking_there_are_features_and_no_division_by_zero():
    loss, pred, _ = golden_model()(images(), ALL_VISIBLE, NOISE.double())
    assert loss == 0 and pred.isfinite().all()


def test_encoder_that_pools_by_mean_normalizes_every_token_in_simmim():
    a, b = golden_model(global_pool="avg"), golden_model(global_pool="token")
    assert a.state_dict().keys() == b.state_dict().keys()
    assert "encoder.norm.weight" in a.state_dict()
    losses = [model(images(), 0.6, NOISE.double())[0] for model in (a, b)]
    assert torch.equal(*losses)


def test_bf16_keeps_the_loss_in_float32_in_simmim():
    model = golden_model(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss, pred, _ = model(images(dtype=torch.float32), 0.6, NOISE)
    assert loss.dtype == torch.float32 and pred.dtype == torch.bfloat16
    agrees(loss, GOLDEN["loss"], 0.02)


# ------------------------------------------------------------ runs

def test_simmim_settings_of_photographs_are_the_authors():
    args = simmim.parse(["--data", "x"], simmim.settings, simmim.PRESETS, out="")
    recipe = dict(mask_unit=32, mask_ratio=0.6, min_crop=0.67, epochs=100, warmup_epochs=10,
                  batch_size=2048, base_lr=1e-4 / 2, weight_decay=0.05, clip_grad=5)
    assert recipe.items() <= vars(args).items()


def test_simmim_learns_and_its_encoder_is_found(tmp_path, capsys):
    call(simmim, "--out", tmp_path, "--fraction", 0.03, "--epochs", 40, "--max-steps", 24,
         "--batch-size", 12, "--base-lr", 0.04, "--warmup-epochs", 1, "--workers", 0)
    out = capsys.readouterr().out
    log = log_of(tmp_path)
    for words in ("--clip-grad 5.0", "--mask-unit 8 --mask-ratio 0.6", "step 24 of "):
        assert words in out
    assert log[-1]["loss"] < 0.9 * log[0]["loss"]
    names = ["step", "loss", "epoch", "lr", "grad_norm", "images_per_s", "data_wait"]
    assert list(log[-1]) == names
    assert (tmp_path / "reconstruction.png").stat().st_size > 20000
    # As finetune.py, detect.py and analysis.py do.
    _, report = vit.from_weights(tmp_path / "last.pt")
    assert report.missing == []
    assert report.unused == ["mask_token", "decoder.weight", "decoder.bias"]


def test_simmim_trains_with_the_masks_and_the_optimizer_of_its_settings(tmp_path, monkeypatch):
    masks = []
    made = []
    forward = simmim.SimMIM.forward

    def recorded(self, *inputs):
        outputs = forward(self, *inputs)
        masks.append(outputs[2])
        return outputs

    class AdamW(torch.optim.AdamW):
        def __init__(self, *args, **kw):
            super().__init__(*args, **kw)
            made.append(self)
    draw_nothing(simmim, monkeypatch)
    monkeypatch.setattr(simmim.SimMIM, "forward", recorded)
    monkeypatch.setattr(torch.optim, "AdamW", AdamW)
    call(simmim, "--fraction", 0.01, "--batch-size", 4, "--max-steps", 2, "--mask-unit", 16,
         "--mask-ratio", 0.3, "--out", tmp_path)
    for mask in masks:
        squares = mask.view(4, 2, 4, 2, 4).permute(0, 1, 3, 2, 4).flatten(3)  # (4, 2, 2, 16)
        assert torch.equal(squares.amin(3), squares.amax(3)) and mask.sum(1).tolist() == [32] * 4
    assert not torch.equal(*masks)
    matrices, vectors = made[0].param_groups
    assert matrices["betas"] == (0.9, 0.999)
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.05, 0)


@pytest.mark.parametrize("ratio, kept", [(0, "16 of 16"), (0.99, "0 of 16"), (1, "0 of 16")])
def test_mask_ratios_that_leave_nothing_or_all_squares_are_refused(ratio, kept, capsys, tmp_path):
    assert f"keeps {kept}" in refused(capsys, simmim, "--mask-ratio", ratio, "--out", tmp_path)


@pytest.mark.parametrize("arguments", [
    ("--mask-unit", 6), ("--mask-unit", 12), ("--mask-unit", 2), ("--img-size", 36)])
def test_a_mask_unit_that_does_not_fit_is_refused(arguments, tmp_path, capsys):
    line = refused(capsys, simmim, *arguments, "--out", tmp_path)
    assert "--mask-unit must divide --img-size" in line
