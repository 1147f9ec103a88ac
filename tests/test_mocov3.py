"""mocov3.py: the method against published numbers, its views against torchvision's, then its claims."""
import math
import os
import shutil
import signal

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torchvision.transforms.v2.functional as tv
from conftest import FORKS, GOLDENS, SIZES, agrees, call, fill, fill_disk, finish, images, launch, log_of, refused, same_state
from torch.nn.parallel import DistributedDataParallel

import mocov3
import vit

GOLDEN = GOLDENS["5_moco"]
QUICK = ("--fraction", 0.01, "--batch-size", 8, "--knn-images", 32, "--mlp-dim", 32, "--dim", 16)
STEP = mocov3.Batch(step=3, first=0, count=6, rows=range(6), weight=1.0)


def moco(dtype=torch.float64, **kw):
    """The golden network; published MoCo-v3 has the halves of the position table the other way round."""
    model = mocov3.MoCoV3(lambda **pool: vit.VisionTransformer(**SIZES, **pool), dim=32, mlp_dim=64, temperature=0.2, **kw)
    fill(model.base_encoder, "base_encoder.", dtype)
    fill(model.predictor, "predictor.", dtype)
    position = model.base_encoder.pos_embed.data
    model.base_encoder.pos_embed.data = torch.cat(position.chunk(2, dim=2)[::-1], dim=2)
    model.momentum_encoder.to(dtype).load_state_dict(model.base_encoder.state_dict())
    return model


def views(dtype=torch.float64):
    x1 = images(8, 32)
    return x1.to(dtype), (x1.flip(3) + 0.1 * torch.from_numpy(np.random.RandomState(5).standard_normal(x1.shape))).to(dtype)


# ------------------------------------------------------------------------------------------------ the published numbers

@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-6), (torch.float32, 2e-4)])
def test_loss_gradients_and_statistics_are_those_of_the_published_moco_v3(dtype, tolerance):
    golden, model = GOLDEN["A_momentum_equals_base"], moco(dtype)
    loss = model(*views(dtype), 0.99)
    loss.backward()
    agrees(loss, float(golden["loss_full"]), tolerance)
    norms = {name: p.grad.norm() for name, p in model.named_parameters() if p.grad is not None}
    assert norms.keys() == golden["grad_norms"].keys()
    total = torch.stack(list(norms.values())).norm()
    for name, norm in golden["grad_norms"].items():
        assert norms[name].item() == pytest.approx(norm, rel=10 * tolerance, abs=tolerance * total.item() / 100), name
    agrees(total, golden["grad_total_norm"], 10 * tolerance)
    for name, module in (("base", model.base_encoder), ("momentum", model.momentum_encoder), ("predictor", model.predictor)):
        for key, buffer in golden[f"bn_buffers_after_{name}"].items():
            if (name, key) != ("predictor", "1.running_mean"):      # zero, but for rounding
                agrees(module.state_dict()[key], buffer, tolerance)


def test_both_terms_and_what_they_compare_are_the_published_ones():
    golden, model, (x1, x2) = GOLDEN["A_momentum_equals_base"], moco(), views()
    q1, q2, k1, k2 = (f(x) for f in (lambda x: model.predictor(model.base_encoder(x)), model.momentum_encoder) for x in (x1, x2))
    for name, x in (("q1", q1), ("q2", q2), ("k1", k1), ("k2", k2)):
        agrees(x, golden[name], 1e-5)  # elements near zero feel that the published position table is computed in float32
    agrees(mocov3.contrastive_loss(q1, k2, 0.2), golden["term_q1_k2"])
    agrees(mocov3.contrastive_loss(q2, k1, 0.2), golden["term_q2_k1"])
    agrees(mocov3.similarities(q1, k2)[0] / 0.2, golden["logits_q1_k2"], 1e-5)
    agrees(mocov3.similarities(q2, k1)[0] / 0.2, golden["logits_q2_k1"], 1e-5)


def test_alg1_the_momentum_encoder_is_updated_before_the_keys_all_parameters_no_buffers():
    golden, model = GOLDEN["B_base_times_1.1"], moco()
    with torch.no_grad():
        for parameter in model.base_encoder.parameters():
            parameter.mul_(1.1)
    before = {name: p.clone() for name, p in model.momentum_encoder.named_parameters()}
    agrees(model(*views(), 0.99), golden["loss"])
    base = dict(model.base_encoder.named_parameters())
    for name, parameter in model.momentum_encoder.named_parameters():
        torch.testing.assert_close(parameter, 0.99 * before[name] + 0.01 * base[name], rtol=1e-12, atol=1e-14)
        agrees(parameter.norm(), golden["momentum_norm_after_per_param"][name])
    for part in ("base", "momentum"):
        encoder = getattr(model, f"{part}_encoder")
        for key, buffer in golden[f"bn_buffers_{part}_after" if part == "base" else "bn_buffers_momentum_after"].items():
            agrees(encoder.state_dict()[key], buffer)


def test_names_shapes_and_what_is_frozen_are_the_published_ones():
    model = moco()
    assert {name: list(tensor.shape) for name, tensor in model.state_dict().items()} == GOLDEN["state_dict_keys"]
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad and not name.startswith("momentum")]
    assert frozen == GOLDEN["requires_grad_false"]
    assert not any(p.requires_grad for p in model.momentum_encoder.parameters())
    frozen = [name for name, p in moco(stop_grad_conv1=True).named_parameters() if not p.requires_grad and name[0] != "m"]
    assert sorted(frozen) == sorted(GOLDEN["requires_grad_false_with_stop_grad_conv1"])


def test_the_momentum_rises_on_the_published_cosine():
    for step, momentum in zip(GOLDENS["7_lr_schedule"]["moco_v3"]["steps"], GOLDENS["7_lr_schedule"]["moco_v3"]["moco_momentum"]):
        assert mocov3.learning_rate(step, 1000, 0, 0.99, 1.0) == pytest.approx(momentum, abs=1e-9)


# ------------------------------------------------------------------------------------------------ the method's claims

def test_eq1_the_loss_is_least_when_each_query_is_its_own_key():
    k = torch.eye(6)
    own, others = mocov3.contrastive_loss(k, k, 0.2), mocov3.contrastive_loss(k.roll(1, 0), k, 0.2)
    assert own == pytest.approx(0.4 * math.log(1 + 5 * math.exp(-5)), rel=1e-5) and others > own + 1.9
    assert mocov3.contrastive_loss(torch.ones(6, 4), torch.ones(6, 4), 0.2) == pytest.approx(0.4 * math.log(6))  # a collapse
    assert mocov3.contrastive_loss(3 * k, 7 * k, 0.2) == pytest.approx(own.item())                               # length is free


def test_keys_give_no_gradient_and_the_loss_stays_in_float32_under_bf16():
    model = moco(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(*views(torch.float32), 0.99)
    loss.backward()
    assert loss.dtype == torch.float32
    agrees(loss, GOLDEN["A_momentum_equals_base"]["loss"], 0.05)
    assert all(p.grad is None for p in model.momentum_encoder.parameters())


def test_initialisation_is_moco_v3s():
    torch.manual_seed(0)
    encoder = mocov3.MoCoV3(vit.vit_tiny, 16, 32).base_encoder
    qkv, fc1 = encoder.blocks[0].attn.qkv.weight.detach(), encoder.blocks[0].mlp.fc1.weight.detach()
    assert qkv.abs().max() == pytest.approx(math.sqrt(6 / (192 + 192)), rel=1e-3)      # three square matrices, not one
    assert fc1.abs().max() == pytest.approx(math.sqrt(6 / (192 + 768)), rel=1e-3)
    assert encoder.cls_token.abs().max() < 1e-5


def test_monitors_tell_a_collapse():
    assert mocov3.spread(torch.ones(64, 32)) == 0
    torch.manual_seed(0)
    assert mocov3.spread(torch.randn(4096, 32)) == pytest.approx(1, abs=0.02)
    _, watched = moco()(*views(), 0.99, monitors=True)
    assert 0 <= watched.positive <= 1 and 0.5 < watched.spread < 1.2 and 0 < watched.token_spread < 1.2
    flat = moco()
    for block in flat.base_encoder.blocks:                            # class tokens that see nothing of the image
        for layer in (block.attn.proj, block.mlp.fc2):
            torch.nn.init.zeros_(layer.weight)
    _, watched = flat(*views(), 0.99, monitors=True)
    assert watched.token_spread < 1e-6


def part_of_a_batch(rank, folder):
    """One of two gloo ranks with 4 of the golden 8 images."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    model = moco()
    with torch.no_grad():
        for parameter in model.base_encoder.parameters():
            parameter.mul_(1.1)
    network = DistributedDataParallel(model, broadcast_buffers=False)
    x1, x2 = (x[rank::2] for x in views())
    loss, watched = network(x1, x2, 0.99, monitors=True)
    loss.backward()
    mean, positive = mocov3.across_ranks(loss.detach(), watched.positive)
    torch.save({"loss": mean, "positive": positive, "grads": {name: p.grad for name, p in model.named_parameters()},
                "state": model.state_dict()}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_with_half_the_batch_each_are_one_with_the_whole(tmp_path):
    ranks = [FORKS.Process(target=part_of_a_batch, args=(rank, str(tmp_path))) for rank in range(2)]
    for process in ranks:
        process.start()
    model = moco()
    with torch.no_grad():
        for parameter in model.base_encoder.parameters():
            parameter.mul_(1.1)
    loss, watched = model(*views(), 0.99, monitors=True)
    loss.backward()
    finish(ranks)
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert found["loss"] == pytest.approx(loss.item(), rel=1e-6) and found["positive"] == pytest.approx(watched.positive.item())
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                torch.testing.assert_close(found["grads"][name], parameter.grad, rtol=1e-7, atol=1e-9, msg=name)
        for name, tensor in model.state_dict().items():               # the momentum encoder and BatchNorm's statistics
            torch.testing.assert_close(found["state"][name], tensor, rtol=1e-9, atol=1e-11, msg=name)


# ------------------------------------------------------------------------------------------------ the views

def pixels(n=6, size=40):
    torch.manual_seed(1)
    x = torch.rand(n, 3, size, size) * 255
    x[0, :, :10] = x[0, :1, :10]                                      # grey pixels,
    x[1, 0] = x[1, 1]                                                 # ties between channels,
    x[2, :, :5], x[2, :, 5:9] = 0, 255                                # black, white
    return x


def each(operation, x, *parameters):
    """torchvision's functional operation, image by image, on its scale from 0 to 1."""
    return torch.stack([operation(image / 255, *(p[i].item() for p in parameters)) for i, image in enumerate(x)]) * 255


FACTORS = torch.tensor([0.6, 0.8, 1.0, 1.1, 1.25, 1.4])


@pytest.mark.parametrize("name, parameter", [("brightness", FACTORS), ("contrast", FACTORS), ("saturation", FACTORS),
                                             ("hue", torch.tensor([-0.5, -0.1, 0.0, 0.04, 0.1, 0.5]))])
def test_jitter_is_torchvisions_with_one_parameter_per_image(name, parameter):
    x = pixels()
    torch.testing.assert_close(getattr(mocov3, name)(x.clone(), parameter), each(getattr(tv, f"adjust_{name}"), x, parameter),
                               atol=5e-3, rtol=0)


def test_grey_solarise_and_blur_are_torchvisions():
    x, sigma = pixels(), torch.tensor([0.1, 0.3, 0.7, 1.0, 1.6, 2.0])
    torch.testing.assert_close(mocov3.grey(x).expand_as(x), each(lambda y: tv.rgb_to_grayscale(y, 3), x), atol=5e-3, rtol=0)
    torch.testing.assert_close(mocov3.solarise(x), each(lambda y: tv.solarize(y, 128 / 255), x), atol=1e-4, rtol=0)
    torch.testing.assert_close(mocov3.blur(x, sigma, 6), each(lambda y, s: tv.gaussian_blur(y, [13, 13], [s, s]), x, sigma),
                               atol=5e-3, rtol=0)


def test_each_image_gets_its_own_operations_in_its_own_order():
    x = pixels()
    chosen = mocov3.Views(
        jittered=torch.tensor([1, 1, 0, 1, 0, 0]).bool(),
        order=torch.tensor([[3, 1, 0, 2], [2, 0, 3, 1], [0, 1, 2, 3], [3, 1, 0, 2], [0, 1, 2, 3], [0, 1, 2, 3]]),
        factors=torch.stack([FACTORS, FACTORS.flip(0), FACTORS, FACTORS - 1.05], dim=1),
        grey=torch.tensor([0, 1, 0, 0, 0, 1]).bool(),
        blurred=torch.tensor([1, 0, 0, 0, 0, 1]).bool(), sigma=torch.linspace(0.5, 2, 6),
        solarised=torch.tensor([0, 0, 0, 1, 0, 1]).bool())
    result = mocov3.augment(x.clone(), chosen, 6)
    for i, image in enumerate(x / 255):
        for j in chosen.order[i] if chosen.jittered[i] else ():
            image = getattr(tv, f"adjust_{mocov3.JITTER[j].__name__}")(image, chosen.factors[i, j].item())
        image = tv.rgb_to_grayscale(image, 3) if chosen.grey[i] else image
        image = tv.gaussian_blur(image, [13, 13], [chosen.sigma[i].item()] * 2) if chosen.blurred[i] else image
        image = tv.solarize(image, 128 / 255) if chosen.solarised[i] else image
        # a pixel within rounding of the threshold may fall to either side of it
        assert ((result[i] - image * 255).abs() < 0.01).float().mean() > 0.999
    assert torch.equal(result[2], x[2]) and torch.equal(result[4], x[4])


def test_the_two_views_have_moco_v3s_distribution_of_parameters():
    n = 40000
    drawn = mocov3.draw_views(torch.rand(n, 2, 13, generator=torch.Generator().manual_seed(0)))
    first, second = (mocov3.Views(*(part.unflatten(0, (n, 2))[:, i].float() for part in drawn)) for i in (0, 1))
    for one, blurred, solarised in ((first, 1, 0), (second, 0.1, 0.2)):
        for share, expected in ((one.jittered, 0.8), (one.grey, 0.2), (one.blurred, blurred), (one.solarised, solarised)):
            assert share.mean().item() == pytest.approx(expected, abs=0.012 if 0 < expected < 1 else 0)
        for i, (low, high) in enumerate(((0.6, 1.4), (0.6, 1.4), (0.8, 1.2), (-0.1, 0.1))):
            quantiles = one.factors[:, i].quantile(torch.tensor([0, 0.25, 0.5, 0.75, 1]))
            torch.testing.assert_close(quantiles, torch.linspace(low, high, 5), atol=0.02 * (high - low), rtol=0)
        torch.testing.assert_close(one.sigma.quantile(torch.tensor([0, 0.5, 1])), torch.tensor([0.1, 1.05, 2]), atol=0.02, rtol=0)
        orders, counts = one.order.unique(dim=0, return_counts=True)
        assert len(orders) == 24 and (counts / n - 1 / 24).abs().max() < 0.005
    assert abs(np.corrcoef(first.jittered, second.jittered)[0, 1]) < 0.02


def test_views_depend_on_seed_and_step_alone_not_on_who_makes_them():
    class args:
        seed, jitter, grey, blur_sigma, mean, std = 0, [0.4, 0.4, 0.2, 0.1], 0.2, 1.0, [0.5] * 3, [0.25] * 3
    crops = pixels(12, 32)
    whole = mocov3.two_views(crops.clone(), STEP, args)
    for rank in range(2):
        own = crops.view(6, 2, 3, 32, 32)[rank::2].flatten(0, 1).clone()
        part = mocov3.two_views(own, STEP._replace(rows=range(rank, 6, 2)), args)
        for x, y in zip(part, whole):
            torch.testing.assert_close(x, y[rank::2], atol=1e-5, rtol=0)
    again, later = (mocov3.two_views(crops.clone(), STEP._replace(step=step), args)[0] for step in (3, 4))
    assert torch.equal(again, whole[0]) and not torch.allclose(later, whole[0])


# ------------------------------------------------------------------------------------------------ what features are worth

def test_knn_votes_with_the_nearest_and_without_held_out_images_leaves_the_asked_ones_out(monkeypatch):
    class args:
        knn_images, img_size = 40, 4
    labels = np.arange(40) % 5
    data = mocov3.Data(None, torch.zeros(40, 3, 4, 4, dtype=torch.uint8), labels, list("abcde"))
    corner = torch.eye(5) * 5 + 0.1
    monkeypatch.setattr(mocov3, "features_of", lambda encoder, data, index, args, device: corner[torch.from_numpy(labels)[index]])
    found = mocov3.find_neighbours(None, data, data, args, None, k=5)
    assert found.accuracy == 1 and (labels[found.nearest.numpy()] == labels[found.asked][:, None]).all()
    found = mocov3.find_neighbours(None, data, None, args, None, k=5)
    assert found.accuracy == 1 and not set(found.asked) & set(found.nearest.flatten().tolist())
    data.labels = None
    assert mocov3.find_neighbours(None, data, data, args, None, k=5).accuracy is None


# ------------------------------------------------------------------------------------------------ runs

@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of 4 steps, saved after each."""
    folder = tmp_path_factory.mktemp("moco") / "run"
    call(mocov3, "--out", folder, *QUICK, "--max-steps", 4, "--log-every", 1)
    return folder


def test_a_run_leaves_log_monitors_pictures_and_both_encoders(finished):
    untrained, *log = log_of(finished)
    assert untrained["step"] == 0 and untrained["loss"] is None and 0 <= untrained["knn"] <= 1
    assert log[0].keys() == {"epoch", "step", "loss", "lr", "momentum", "positive", "spread", "token_spread", "images_per_s",
                             "data_wait"}
    assert [entry["step"] for entry in log] == [1, 2, 3, 4] and "knn" in log[-1] and "knn" not in log[0]
    for name in ("curves.png", "neighbours.png"):
        assert (finished / name).stat().st_size > 10000
    state = torch.load(finished / "last.pt", weights_only=True)
    assert state["step"] == 4 and state["config"]["method"] == "mocov3"
    base, momentum = (vit.vit_toy(img_size=32, patch_size=8, global_pool="token") for _ in range(2))
    report = vit.load_weights(base, finished / "last.pt")
    assert not report.missing and "head.0.weight" in report.unused
    vit.load_weights(momentum, finished / "last.pt", branch="momentum_encoder")
    for encoder, prefix in ((base, "base_encoder"), (momentum, "momentum_encoder")):
        for name, tensor in encoder.state_dict().items():
            assert torch.equal(tensor, state["model"][f"{prefix}.{name}"])
    assert not torch.equal(base.blocks[0].attn.qkv.weight, momentum.blocks[0].attn.qkv.weight)
    classifier = vit.vit_toy(img_size=32, patch_size=8, num_classes=10)           # what finetune.py makes of it
    missing = vit.load_weights(classifier, finished / "last.pt").missing
    assert missing == ["fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"]


def test_a_stopped_and_resumed_run_gives_the_same_bits(finished, tmp_path):
    call(mocov3, "--out", tmp_path, *QUICK, "--max-steps", 2, "--log-every", 1)
    call(mocov3, "--out", tmp_path, *QUICK, "--max-steps", 2, "--log-every", 1, "--resume")
    same_state(finished, tmp_path)
    assert [entry["loss"] for entry in log_of(tmp_path)] == [entry["loss"] for entry in log_of(finished)]


def test_two_ranks_give_the_run_of_one(finished, tmp_path):
    finish(launch("mocov3", "--out", tmp_path, *QUICK, "--max-steps", 4, "--log-every", 1, ranks=2))
    one, two = log_of(finished), log_of(tmp_path)
    assert len(one) == len(two)
    for a, b in zip(one[1:], two[1:]):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-4) and a["positive"] == pytest.approx(b["positive"], abs=1e-6)
    states = [torch.load(folder / "last.pt", weights_only=True)["model"] for folder in (finished, tmp_path)]
    for name, tensor in states[0].items():
        torch.testing.assert_close(states[1][name], tensor, atol=2e-3, rtol=1e-3, msg=name)


def test_photographs_without_classes_train_and_have_no_knn(image_folder, tmp_path):
    flat = tmp_path / "flat"
    flat.mkdir()
    for i, path in enumerate(sorted((image_folder / "train").rglob("*.jpg"))):
        shutil.copy(path, flat / f"{i}.jpg")
    call(mocov3, "--data", flat, "--out", tmp_path / "run", "--arch", "toy", "--img-size", 32, "--patch-size", 8, "--batch-size",
         12, "--epochs", 1, "--warmup-epochs", 0, "--dim", 16, "--mlp-dim", 32, "--workers", 0, "--stop-grad-conv1")
    log = log_of(tmp_path / "run")
    assert log[-1]["step"] == 3 and math.isfinite(log[-1]["loss"]) and not any("knn" in entry for entry in log)
    assert (tmp_path / "run" / "neighbours.png").stat().st_size > 10000
    model = torch.load(tmp_path / "run" / "last.pt", weights_only=True)["model"]
    projections = [model[f"{part}_encoder.patch_embed.proj.weight"] for part in ("base", "momentum")]
    torch.testing.assert_close(*projections, atol=1e-7, rtol=0)                    # frozen: still the first one's copy


def test_a_run_starts_from_weights_in_both_encoders(finished, tmp_path, capsys):
    call(mocov3, "--out", tmp_path, *QUICK, "--max-steps", 1, "--init", finished / "last.pt")
    assert "--init" in capsys.readouterr().out
    old, new = (torch.load(folder / "last.pt", weights_only=True)["model"] for folder in (finished, tmp_path))
    key = "blocks.0.attn.qkv.weight"                                               # step 0 has learning rate 0
    assert torch.equal(new[f"base_encoder.{key}"], old[f"base_encoder.{key}"])
    torch.testing.assert_close(new[f"momentum_encoder.{key}"], old[f"base_encoder.{key}"], atol=1e-7, rtol=0)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(finished, tmp_path, monkeypatch, capsys):
    shutil.copytree(finished, tmp_path / "run")
    before = (tmp_path / "run" / "last.pt").read_bytes()
    loss = mocov3.contrastive_loss
    monkeypatch.setattr(mocov3, "contrastive_loss", lambda *a: loss(*a) * math.nan)
    message = refused(capsys, mocov3, "--out", tmp_path / "run", *QUICK, "--log-every", 1, "--max-steps", 4, "--resume")
    assert "step 5" in message and "nan" in message and (tmp_path / "run" / "last.pt").read_bytes() == before


def test_compiling_does_not_start_anew_for_every_momentum():
    from torch._dynamo.testing import CompileCounter
    counter = CompileCounter()
    model = mocov3.MoCoV3(lambda **pool: vit.vit_toy(img_size=16, patch_size=8, depth=1, **pool), dim=16, mlp_dim=32)
    model.compile(backend=counter)
    for step in range(12):
        model(torch.randn(4, 3, 16, 16), torch.randn(4, 3, 16, 16), 0.99 + 0.0005 * step)
    assert counter.frame_count <= 2


def test_a_sigterm_saves_what_there_is_and_the_run_goes_on_from_it(finished, tmp_path, monkeypatch, capsys):
    make, made = mocov3.two_views, []

    def signalled(*arguments):
        made.append(make(*arguments))
        if len(made) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return made[-1]
    monkeypatch.setattr(mocov3, "two_views", signalled)
    call(mocov3, "--out", tmp_path, *QUICK, "--log-every", 1)
    assert "stopped, --resume continues: step 2 of" in capsys.readouterr().out
    call(mocov3, "--out", tmp_path, *QUICK, "--log-every", 1, "--max-steps", 2, "--resume")
    same_state(finished, tmp_path)


def test_a_full_disk_leaves_the_last_checkpoint(finished, tmp_path, monkeypatch, capsys):
    shutil.copytree(finished, tmp_path / "run")
    before = (tmp_path / "run" / "last.pt").read_bytes()
    fill_disk(monkeypatch)
    message = refused(capsys, mocov3, "--out", tmp_path / "run", *QUICK, "--max-steps", 1, "--resume")
    assert "last.pt: cannot be written, disk full?" in message and (tmp_path / "run" / "last.pt").read_bytes() == before


@pytest.mark.parametrize("arguments, words", [
    (("--accum", 2), ("--accum", "BatchNorm")),
    (("--fraction", 0.01, "--batch-size", 128), ("--batch-size 128", "82 (the training images)")),
    (("--batch-size", 1), ("--batch-size 1", "from 2")),
    (("--momentum", 1.5), ("--momentum",)),
    (("--temperature", 0), ("--temperature",)),
    (("--blur-sigma", 0), ("--blur-sigma",)),
    (("--knn-every", 0), ("--knn-every", "--knn-images 0")),
    (("--jitter", 0.4, 0.4, 0.2, 0.9), ("--jitter",)),
])
def test_bad_arguments_are_refused_in_one_line_that_says_why(arguments, words, tmp_path, capsys):
    message = refused(capsys, mocov3, "--out", tmp_path / "run", *arguments)
    assert all(word in message for word in words), message
    assert not (tmp_path / "run").exists()
