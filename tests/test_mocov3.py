"""mocov3.py: the method against published numbers, then its claims, then a run."""
import argparse
import copy
import json
import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import (
    FORKS, GOLDENS, SIZES, agrees, call, draw_nothing, fill, finish, images, log_of, refused)
from torch.nn.parallel import DistributedDataParallel

import mocov3
import vit

GOLDEN = GOLDENS["5_moco"]
TINY = ("--fraction", 0.01, "--batch-size", 8, "--mlp-dim", 32, "--dim", 16, "--log-every", 1,
        "--workers", 0)


def golden_encoder(global_pool):
    return vit.VisionTransformer(**SIZES, global_pool=global_pool)


def toy_encoder(global_pool):
    return vit.vit_toy(img_size=32, patch_size=8, global_pool=global_pool)


def moco(dtype=torch.float64, scale=1.0, **kw):
    """The golden network: the momentum encoder, and a base encoder that is `scale` times it."""
    model = mocov3.MoCoV3(golden_encoder, 32, 64, 0.2, **kw)
    fill(model.base_encoder, "base_encoder.", dtype)
    fill(model.predictor, "predictor.", dtype)
    # The published position table has its halves (row, column) the other way round.
    first, second = model.base_encoder.pos_embed.data.chunk(2, dim=2)
    model.base_encoder.pos_embed.data = torch.cat([second, first], dim=2)
    model.momentum_encoder.to(dtype).load_state_dict(model.base_encoder.state_dict())
    for parameter in model.base_encoder.parameters():
        parameter.data.mul_(scale)
    return model


def views(dtype=torch.float64):
    x1 = images(8, 32)
    noise = torch.from_numpy(np.random.RandomState(5).standard_normal(x1.shape))
    x2 = x1.flip(3) + 0.1 * noise
    return x1.to(dtype), x2.to(dtype)


# ------------------------------------------------------------ published numbers

@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-6), (torch.float32, 2e-4)])
def test_alg1_eq1_moco_loss_gradients_batchnorm_are_the_published(dtype, tolerance):
    golden = GOLDEN["A_momentum_equals_base"]
    model = moco(dtype)
    loss = model(*views(dtype), 0.99)
    loss.backward()
    agrees(loss, float(golden["loss_full"]), tolerance)
    norms = {name: p.grad.norm() for name, p in model.named_parameters() if p.grad is not None}
    assert norms.keys() == golden["grad_norms"].keys()  # none of the momentum encoder
    total = torch.stack(list(norms.values())).norm()
    agrees(total, golden["grad_total_norm"], 10 * tolerance)
    for name, norm in golden["grad_norms"].items():
        allowed = tolerance * total.item() / 100
        assert norms[name].item() == pytest.approx(norm, rel=10 * tolerance, abs=allowed), name
    for name in ("base_encoder", "momentum_encoder", "predictor"):
        state = getattr(model, name).state_dict()
        buffers = golden[f"bn_buffers_after_{name.removesuffix('_encoder')}"]
        for key, buffer in buffers.items():
            if (name, key) != ("predictor", "1.running_mean"):  # zero, but for rounding
                agrees(state[key], buffer, tolerance)


def test_eq1_moco_contrastive_loss_compares_what_the_published_compares():
    golden = GOLDEN["A_momentum_equals_base"]
    model = moco()
    x1, x2 = views()
    q1 = model.predictor(model.base_encoder(x1))
    q2 = model.predictor(model.base_encoder(x2))
    k1 = model.momentum_encoder(x1)
    k2 = model.momentum_encoder(x2)
    for name, x in (("q1", q1), ("q2", q2), ("k1", k1), ("k2", k2)):
        agrees(x, golden[name], 1e-5)  # elements near zero: the published table is in float32
    agrees(mocov3.contrastive_loss(q1, k2, 0.2), golden["term_q1_k2"])
    agrees(mocov3.contrastive_loss(q2, k1, 0.2), golden["term_q2_k1"])
    cosines, labels = mocov3.similarities(q1, k2)
    agrees(cosines / 0.2, golden["logits_q1_k2"], 1e-5)
    assert labels.tolist() == list(range(8))


def test_alg1_the_momentum_encoder_is_updated_before_the_keys():
    golden = GOLDEN["B_base_times_1.1"]
    model = moco(scale=1.1)
    before = copy.deepcopy(dict(model.momentum_encoder.named_parameters()))
    agrees(model(*views(), 0.99), golden["loss"])
    base = dict(model.base_encoder.named_parameters())
    for name, parameter in model.momentum_encoder.named_parameters():
        average = 0.99 * before[name] + 0.01 * base[name]
        torch.testing.assert_close(parameter, average, rtol=1e-6, atol=1e-9)
        agrees(parameter.norm(), golden["momentum_norm_after_per_param"][name])


@pytest.mark.parametrize("m", [0.0, 0.5, 1.0])
def test_alg1_the_momentum_is_the_one_that_is_given(m):
    model = moco(scale=1.1)
    before = model.momentum_encoder.cls_token.clone()
    model(*views(), m)
    average = m * before + (1 - m) * model.base_encoder.cls_token
    torch.testing.assert_close(model.momentum_encoder.cls_token, average, rtol=1e-6, atol=1e-9)


def test_alg1_no_buffers_are_averaged_encoders_have_their_own():
    golden = GOLDEN["B_base_times_1.1"]
    model = moco(scale=1.1)
    other = moco(scale=1.1)
    for buffer in other.base_encoder.buffers():  # an average would carry these over
        buffer.fill_(7)
    for network in (model, other):
        network(*views(), 0.99)
        network(*views(), 0.5)
    pairs = zip(model.momentum_encoder.buffers(), other.momentum_encoder.buffers(), strict=True)
    for a, b in pairs:
        assert torch.equal(a, b)
    once = moco(scale=1.1)
    once(*views(), 0.99)
    for key, buffer in golden["bn_buffers_momentum_after"].items():
        agrees(once.momentum_encoder.state_dict()[key], buffer)
    for key, buffer in golden["bn_buffers_base_after"].items():
        agrees(once.base_encoder.state_dict()[key], buffer)


def test_names_shapes_and_frozen_parameters_are_the_published_ones():
    model = moco()
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    assert shapes == GOLDEN["state_dict_keys"]
    assert not any(p.requires_grad for p in model.momentum_encoder.parameters())
    for network, key in ((model, ""), (moco(stop_grad_conv1=True), "_with_stop_grad_conv1")):
        learned = {name for name, p in network.named_parameters() if p.requires_grad}
        frozen = {name for name, p in network.named_parameters() if name[0] != "m"} - learned
        assert sorted(frozen) == sorted(GOLDEN[f"requires_grad_false{key}"])


def test_momentum_schedule_is_the_published_cosine():
    golden = GOLDENS["7_lr_schedule"]["moco_v3"]
    for step, momentum in zip(golden["steps"], golden["moco_momentum"], strict=True):
        assert mocov3.cosine(step, 1000, 0.99, 1.0) == pytest.approx(momentum, abs=1e-9)
        rate = mocov3.learning_rate(step, 1000, 0, 0.99, 1.0)  # is the same without a warm-up
        assert rate == pytest.approx(momentum, abs=1e-9)


# ------------------------------------------------------------ claims

def test_eq1_moco_contrastive_loss_is_least_for_the_own_keys():
    k = torch.eye(6)
    own = mocov3.contrastive_loss(k, k, 0.2)
    others = mocov3.contrastive_loss(k.roll(1, 0), k, 0.2)
    assert own == pytest.approx(0.4 * math.log(1 + 5 * math.exp(-5)), rel=1e-5)
    assert others > own + 1.9
    softer = mocov3.contrastive_loss(k, k, 0.5)
    assert softer == pytest.approx(math.log(1 + 5 * math.exp(-2)), rel=1e-5)
    longer = mocov3.contrastive_loss(3 * k, 7 * k, 0.2)  # length does not count
    assert longer == pytest.approx(own.item())
    collapse = mocov3.contrastive_loss(torch.ones(6, 4), torch.ones(6, 4), 0.2)
    assert collapse == pytest.approx(0.4 * math.log(6))


def test_eq1_moco_loss_stays_in_float32_under_bf16():
    model = moco(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(*views(torch.float32), 0.99)
    assert loss.dtype == torch.float32
    agrees(loss, GOLDEN["A_momentum_equals_base"]["loss"], 0.05)


def test_initialization_is_moco_v3s():
    torch.manual_seed(0)
    encoder = mocov3.MoCoV3(vit.vit_toy, 16, 32).base_encoder
    square = encoder.blocks[0].attn.qkv.weight.abs().max()  # of three square matrices
    assert square.item() == pytest.approx(math.sqrt(6 / (96 + 96)), rel=1e-3)
    wide = encoder.blocks[0].mlp.fc1.weight.abs().max()
    assert wide.item() == pytest.approx(math.sqrt(6 / (96 + 384)), rel=1e-3)
    assert encoder.cls_token.abs().max() < 1e-5


def test_monitors_indicate_a_collapse():
    torch.manual_seed(0)
    assert mocov3.spread(torch.ones(64, 32)) == 0
    assert mocov3.spread(torch.randn(4096, 32)) == pytest.approx(1, abs=0.02)
    healthy = moco()
    collapsed = moco()
    for block in collapsed.base_encoder.blocks:  # class tokens that see nothing of the image
        torch.nn.init.zeros_(block.attn.proj.weight)
    for model in (healthy, collapsed):
        model(*views(), 0.99)
        assert not any(scalar.requires_grad for scalar in model.monitors.values())
    assert healthy.monitors["token_spread"] > 0.05
    assert collapsed.monitors["token_spread"] < 1e-6
    x1, x2 = views()
    tokens, z1, _ = healthy.project(healthy.base_encoder, x1, x2)
    token_spread = mocov3.spread(tokens[:8]).item()
    assert healthy.monitors["token_spread"].item() == pytest.approx(token_spread)
    spread = healthy.monitors["projection_spread"].item()
    assert 0.5 < spread < 1.2 and spread == pytest.approx(mocov3.spread(z1).item())
    logits = torch.tensor(GOLDEN["A_momentum_equals_base"]["logits_q1_k2"])
    accuracy = (logits.argmax(dim=1) == torch.arange(8)).float().mean()
    assert healthy.monitors["contrastive_accuracy"] == accuracy


def half_a_batch(rank, folder):
    """One of two gloo ranks with 4 of the golden 8 images."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    model = moco(scale=1.1)
    x1, x2 = views()
    network = DistributedDataParallel(model)
    loss = network(x1[rank::2], x2[rank::2], 0.99)
    loss.backward()
    dist.all_reduce(loss.detach())
    gradients = {name: p.grad for name, p in model.named_parameters()}
    found = {"loss": loss.detach() / 2, "gradients": gradients, "state": model.state_dict()}
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_eq1_moco_two_ranks_with_half_the_batch_are_one_with_it_all(tmp_path):
    ranks = [FORKS.Process(target=half_a_batch, args=(r, str(tmp_path))) for r in range(2)]
    for process in ranks:
        process.start()
    model = moco(scale=1.1)
    loss = model(*views(), 0.99)
    loss.backward()
    finish(ranks)
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert found["loss"].item() == pytest.approx(loss.item(), rel=1e-6)
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                gradient = found["gradients"][name]
                torch.testing.assert_close(
                    gradient, parameter.grad, rtol=1e-7, atol=1e-9, msg=name)
        for name, tensor in model.state_dict().items():  # momentum encoder, BatchNorm's statistics
            torch.testing.assert_close(
                found["state"][name], tensor, rtol=1e-9, atol=1e-11, msg=name)


# ------------------------------------------------------------ samples

def same(image, *args):
    return image


def samples(*arguments, **kw):
    """Samples of four toy images."""
    data = [(image, 0) for image in vit.toy_shapes(4, **kw)[0]]
    args = mocov3.parse(
        [str(argument) for argument in arguments], mocov3.settings, mocov3.PRESETS, out="runs/x")
    return mocov3.Samples(data, args)


def test_a_sample_is_two_views_of_one_image_and_all_are_seen(monkeypatch):
    """With crop, jitter and blur switched off; solarization, which stays, inverts bright pixels."""
    monkeypatch.setattr(mocov3, "random_blur", same)
    views_of = samples("--gray", 0)
    views_of.crop = views_of.jitter = torch.nn.Identity()
    seen = []
    inverted = 0
    for v in range(200):
        x1, x2 = views_of[v]
        chosen = [i for i, (image, _) in enumerate(views_of.data)
                  if torch.equal(x1, image) or torch.equal(x1, image.flip(-1))]
        seen += chosen
        image, _ = views_of.data[chosen[0]]
        solarized = torch.where(image < 128, image, 255 - image)
        if torch.equal(x2, solarized) or torch.equal(x2, solarized.flip(-1)):
            inverted += 1
        else:
            assert torch.equal(x2, image) or torch.equal(x2, image.flip(-1))
    assert [seen.count(i) for i in range(4)] == [50, 50, 50, 50]
    assert 25 <= inverted <= 58  # a fifth of the second views, 2.5 standard errors


def test_views_are_blurred_solarized_and_gray_as_often_as_in_the_paper(monkeypatch):
    """BYOL, App. B: blur 1.0 and 0.1, solarization 0 and 0.2, gray 0.2, jitter 0.8, flip 0.5."""
    calls = []

    def count_calls(name, module):
        function = getattr(module, name)

        def counted(image, *args, **kw):
            calls.append(name)
            return function(image, *args, **kw)
        monkeypatch.setattr(module, name, counted)
    for name in ("rgb_to_grayscale", "solarize", "horizontal_flip"):
        count_calls(name, mocov3.v2.functional)
    count_calls("random_blur", mocov3)
    views_of = samples("--gray", 0.2)
    count_calls("jitter", views_of)
    for blur, solarize in ((1, 0), (0.1, 0.2)):
        calls.clear()
        torch.manual_seed(0)
        for _ in range(1000):
            views_of.view(views_of.data[0][0], blur, solarize)
        shares = {"random_blur": blur, "solarize": solarize, "rgb_to_grayscale": 0.2,
                  "jitter": 0.8, "horizontal_flip": 0.5}
        for name, expected in shares.items():
            assert calls.count(name) / 1000 == pytest.approx(expected, abs=0.05), name


@pytest.mark.parametrize("seed", range(8))
def test_blur_is_torchvisions_in_two_dimensions_to_a_gray_level(seed):
    rows = torch.arange(64)[:, None] * 4
    edges = 255 * (rows > 128) * torch.ones(64, 64)
    noise = torch.randint(256, (64, 64), generator=torch.Generator().manual_seed(seed))
    image = torch.stack([rows.expand(64, 64), edges, noise]).byte()
    torch.manual_seed(seed)
    blurred = mocov3.random_blur(image / 255, 2.0)
    torch.manual_seed(seed)
    sigma = 0.1 + 1.9 * torch.rand(1).item()
    expected = mocov3.v2.functional.gaussian_blur(image, [23, 23], [sigma, sigma])
    assert (255 * blurred - expected).abs().max() <= 1


def test_a_sample_follows_from_seed_and_number_alone():
    first = samples("--seed", 3)[5]
    torch.rand(7)
    again = samples("--seed", 3)[5]
    other = samples("--seed", 4)[5]
    assert first[0].dtype == torch.uint8 and first[0].shape == (3, 32, 32)
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], other[0])


# ------------------------------------------------------------ a run

@pytest.mark.filterwarnings("error")
def test_curves_that_are_0_are_drawn_without_a_warning(tmp_path):
    """Such as the accuracy of the first steps: `python -W error mocov3.py` goes on."""
    names = ("loss", "contrastive_accuracy", "projection_spread", "token_spread")
    entry = {"epoch": 1.0, **dict.fromkeys(names, 0.0)}
    (tmp_path / "log.jsonl").write_text(json.dumps(entry) + "\n")
    mocov3.draw_curves(argparse.Namespace(out=tmp_path, arch="toy", data="toy"))
    assert (tmp_path / "curves.png").stat().st_size > 5000


def test_a_run_logs_the_indicators_and_saves_both_encoders(tmp_path):
    call(mocov3, "--out", tmp_path / "run", *TINY, "--max-steps", 3, "--stop-grad-conv1")
    log = log_of(tmp_path / "run")
    assert [entry["step"] for entry in log] == [1, 2, 3]
    indicators = {"contrastive_accuracy", "projection_spread", "token_spread"}
    assert {"loss", "momentum", *indicators} < log[0].keys()
    assert log[0]["momentum"] == pytest.approx(0.95) and log[2]["momentum"] > log[1]["momentum"]
    assert (tmp_path / "run" / "curves.png").stat().st_size > 10000
    state = torch.load(tmp_path / "run" / "last.pt", weights_only=True)["model"]
    key = "blocks.0.attn.qkv.weight"
    for branch in ("base_encoder", "momentum_encoder"):
        encoder = toy_encoder("token")
        report = vit.load_weights(encoder, tmp_path / "run" / "last.pt", branch=branch)
        assert not report.missing
        assert torch.equal(encoder.state_dict()[key], state[f"{branch}.{key}"])
    assert not torch.equal(state[f"base_encoder.{key}"], state[f"momentum_encoder.{key}"])
    frozen = "patch_embed.proj.weight"
    base, momentum = state[f"base_encoder.{frozen}"], state[f"momentum_encoder.{frozen}"]
    torch.testing.assert_close(base, momentum)


def test_weight_decay_reaches_all_and_only_the_base_encoder_learns(tmp_path, monkeypatch):
    made = []

    class AdamW(torch.optim.AdamW):
        def __init__(self, parameters, **options):
            super().__init__(parameters, **options)
            made.append(self)
    monkeypatch.setattr(torch.optim, "AdamW", AdamW)
    draw_nothing(mocov3, monkeypatch)
    call(mocov3, "--out", tmp_path / "run", *TINY, "--max-steps", 1)
    group, = made[0].param_groups
    model = mocov3.MoCoV3(toy_encoder, 16, 32)
    learned = [*model.base_encoder.parameters(), *model.predictor.parameters()]
    shapes = [p.shape for p in learned if p.requires_grad]  # the position is fixed
    assert [p.shape for p in group["params"]] == shapes
    assert group["weight_decay"] == 0.1 and group["betas"] == (0.9, 0.999)


def test_init_starts_both_encoders_from_the_file(tmp_path, capsys):
    torch.manual_seed(3)
    torch.save(toy_encoder("token").state_dict(), tmp_path / "start.pt")
    run = ("--out", tmp_path / "run", *TINY, "--max-steps", 1)
    call(mocov3, *run, "--init", tmp_path / "start.pt")
    said = capsys.readouterr().out
    assert f"--init {tmp_path / 'start.pt'}: randomly initialized: " in said
    old = torch.load(tmp_path / "start.pt", weights_only=True)
    new = torch.load(tmp_path / "run" / "last.pt", weights_only=True)["model"]
    key = "blocks.0.attn.qkv.weight"
    for prefix in ("base_encoder", "momentum_encoder"):  # step 0 has learning rate 0
        torch.testing.assert_close(new[f"{prefix}.{key}"], old[key])


@pytest.mark.slow
def test_compile_makes_few_graphs_and_none_for_a_new_momentum():
    from torch._dynamo.testing import CompileCounter
    counter = CompileCounter()

    def encoder_fn(global_pool):
        return vit.vit_toy(img_size=16, patch_size=8, depth=3, global_pool=global_pool)
    model = mocov3.MoCoV3(encoder_fn, 16, 32)
    for block in [*model.base_encoder.blocks, *model.momentum_encoder.blocks]:  # as train() does
        block.compile(backend=counter, dynamic=False)
    for step in range(6):
        x1, x2 = torch.randn(2, 4, 3, 16, 16)
        model(x1, x2, 0.99 + 0.0005 * step).backward()
    assert counter.frame_count <= 4


@pytest.mark.parametrize("arguments, words", [
    (("--accum", 2), ("--accum 2", "BatchNorm")),
    (("--fraction", 0.01, "--batch-size", 128), ("--batch-size 128", "82")),
    (("--patch-size", 0), ("--patch-size", "invalid count value: '0'")),
    (("--batch-size", 1), ("--batch-size 1", "at least 2"))])
def test_mocov3_refuses_batches_that_it_cannot_contrast(arguments, words, tmp_path, capsys):
    message = refused(capsys, mocov3, "--out", tmp_path / "run", *arguments)
    assert all(word in message for word in words), message
    assert not (tmp_path / "run").exists()
