"""mocov3.py: loss, gradients and updates against published numbers, then the method's claims."""
import copy
import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import FORKS, GOLDENS, SIZES, agrees, call, fill, finish, images, log_of, refused
from torch.nn.parallel import DistributedDataParallel

import mocov3
import vit

GOLDEN = GOLDENS["5_moco"]
TINY = ("--fraction", 0.01, "--batch-size", 8, "--mlp-dim", 32, "--dim", 16, "--log-every", 1, "--workers", 0)


def moco(dtype=torch.float64, scale=1.0, **kw):
    """The golden network; published MoCo-v3 has the halves of the position table the other way round."""
    model = mocov3.MoCoV3(lambda **pool: vit.VisionTransformer(**SIZES, **pool), 32, 64, 0.2, **kw)
    fill(model.base_encoder, "base_encoder.", dtype)
    fill(model.predictor, "predictor.", dtype)
    position = model.base_encoder.pos_embed.data
    model.base_encoder.pos_embed.data = torch.cat(position.chunk(2, dim=2)[::-1], dim=2)
    model.momentum_encoder.to(dtype).load_state_dict(model.base_encoder.state_dict())
    for parameter in model.base_encoder.parameters():
        parameter.data.mul_(scale)
    return model


def views(dtype=torch.float64):
    x1 = images(8, 32)
    x2 = x1.flip(3) + 0.1 * torch.from_numpy(np.random.RandomState(5).standard_normal(x1.shape))
    return x1.to(dtype), x2.to(dtype)


# ------------------------------------------------------------ the published numbers

@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-6), (torch.float32, 2e-4)])
def test_alg1_eq1_moco_loss_gradients_and_batchnorm_are_the_published_ones(dtype, tolerance):
    golden, model = GOLDEN["A_momentum_equals_base"], moco(dtype)
    loss = model(*views(dtype), 0.99)
    loss.backward()
    agrees(loss, float(golden["loss_full"]), tolerance)
    norms = {name: p.grad.norm() for name, p in model.named_parameters() if p.grad is not None}
    assert norms.keys() == golden["grad_norms"].keys()    # none of the momentum encoder
    total = torch.stack(list(norms.values())).norm()
    agrees(total, golden["grad_total_norm"], 10 * tolerance)
    for name, norm in golden["grad_norms"].items():
        allowed = tolerance * total.item() / 100
        assert norms[name].item() == pytest.approx(norm, rel=10 * tolerance, abs=allowed), name
    for name in ("base_encoder", "momentum_encoder", "predictor"):
        state = getattr(model, name).state_dict()
        for key, buffer in golden[f"bn_buffers_after_{name.removesuffix('_encoder')}"].items():
            if (name, key) != ("predictor", "1.running_mean"):    # zero, but for rounding
                agrees(state[key], buffer, tolerance)


def test_eq1_moco_contrastive_loss_compares_what_the_published_code_compares():
    golden, model, (x1, x2) = GOLDEN["A_momentum_equals_base"], moco(), views()
    q1, q2 = model.predictor(model.base_encoder(x1)), model.predictor(model.base_encoder(x2))
    k1, k2 = model.momentum_encoder(x1), model.momentum_encoder(x2)
    for name, x in (("q1", q1), ("q2", q2), ("k1", k1), ("k2", k2)):
        agrees(x, golden[name], 1e-5)    # elements near zero: the published position table is in float32
    agrees(mocov3.contrastive_loss(q1, k2, 0.2), golden["term_q1_k2"])
    agrees(mocov3.contrastive_loss(q2, k1, 0.2), golden["term_q2_k1"])
    agrees(mocov3.similarities(q1, k2)[0] / 0.2, golden["logits_q1_k2"], 1e-5)


def test_alg1_the_momentum_encoder_is_updated_before_the_keys():
    golden, model = GOLDEN["B_base_times_1.1"], moco(scale=1.1)
    before = copy.deepcopy(dict(model.momentum_encoder.named_parameters()))
    agrees(model(*views(), 0.99), golden["loss"])
    base = dict(model.base_encoder.named_parameters())
    for name, parameter in model.momentum_encoder.named_parameters():
        torch.testing.assert_close(parameter, 0.99 * before[name] + 0.01 * base[name], rtol=1e-12, atol=1e-14)
        agrees(parameter.norm(), golden["momentum_norm_after_per_param"][name])


def test_alg1_no_buffers_are_averaged_each_encoder_has_its_own_statistics():
    golden, model = GOLDEN["B_base_times_1.1"], moco(scale=1.1)
    other = moco(scale=1.1)
    for buffer in other.base_encoder.buffers():    # an average would carry these over
        buffer.fill_(7)
    for network in (model, other):
        network(*views(), 0.99)
        network(*views(), 0.5)
    for a, b in zip(model.momentum_encoder.buffers(), other.momentum_encoder.buffers(), strict=True):
        assert torch.equal(a, b)
    once = moco(scale=1.1)
    once(*views(), 0.99)
    for key, buffer in golden["bn_buffers_momentum_after"].items():
        agrees(once.momentum_encoder.state_dict()[key], buffer)
    for key, buffer in golden["bn_buffers_base_after"].items():
        agrees(once.base_encoder.state_dict()[key], buffer)


def test_names_shapes_and_frozen_parameters_are_the_published_ones():
    model = moco()
    assert {name: list(tensor.shape) for name, tensor in model.state_dict().items()} == GOLDEN["state_dict_keys"]
    assert not any(p.requires_grad for p in model.momentum_encoder.parameters())
    for network, key in ((model, ""), (moco(stop_grad_conv1=True), "_with_stop_grad_conv1")):
        frozen = [name for name, p in network.named_parameters() if not p.requires_grad and name[0] != "m"]
        assert sorted(frozen) == sorted(GOLDEN[f"requires_grad_false{key}"])


def test_momentum_schedule_is_the_published_cosine():
    golden = GOLDENS["7_lr_schedule"]["moco_v3"]
    for step, momentum in zip(golden["steps"], golden["moco_momentum"], strict=True):
        assert mocov3.learning_rate(step, 1000, 0, 0.99, 1.0) == pytest.approx(momentum, abs=1e-9)


# ------------------------------------------------------------ the method's claims

def test_eq1_moco_contrastive_loss_is_least_when_each_query_is_its_own_key():
    k = torch.eye(6)
    own, others = mocov3.contrastive_loss(k, k, 0.2), mocov3.contrastive_loss(k.roll(1, 0), k, 0.2)
    assert own == pytest.approx(0.4 * math.log(1 + 5 * math.exp(-5)), rel=1e-5) and others > own + 1.9
    assert mocov3.contrastive_loss(3 * k, 7 * k, 0.2) == pytest.approx(own.item())    # length does not count
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
    qkv, fc1 = encoder.blocks[0].attn.qkv.weight, encoder.blocks[0].mlp.fc1.weight
    assert qkv.abs().max().item() == pytest.approx(math.sqrt(6 / (96 + 96)), rel=1e-3)    # three square matrices
    assert fc1.abs().max().item() == pytest.approx(math.sqrt(6 / (96 + 384)), rel=1e-3)
    assert encoder.cls_token.abs().max() < 1e-5


def test_monitors_indicate_a_collapse():
    torch.manual_seed(0)
    assert mocov3.spread(torch.ones(64, 32)) == 0
    assert mocov3.spread(torch.randn(4096, 32)) == pytest.approx(1, abs=0.02)
    healthy, collapsed = moco(), moco()
    for block in collapsed.base_encoder.blocks:    # class tokens that see nothing of the image
        torch.nn.init.zeros_(block.attn.proj.weight)
    for model in (healthy, collapsed):
        model(*views(), 0.99)
        assert not any(scalar.requires_grad for scalar in model.monitors.values())
    assert healthy.monitors["token_spread"] > 0.05 and collapsed.monitors["token_spread"] < 1e-6
    _, z1, _ = healthy.project(healthy.base_encoder, *views())
    assert 0.5 < healthy.monitors["projection_spread"] == mocov3.spread(z1) < 1.2
    logits = torch.tensor(GOLDEN["A_momentum_equals_base"]["logits_q1_k2"])
    accuracy = (logits.argmax(dim=1) == torch.arange(8)).float().mean()
    assert healthy.monitors["contrastive_accuracy"] == accuracy


def half_a_batch(rank, folder):
    """One of two gloo ranks with 4 of the golden 8 images."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    model = moco(scale=1.1)
    x1, x2 = (x[rank::2] for x in views())
    network = DistributedDataParallel(model)
    loss = network(x1, x2, 0.99)
    loss.backward()
    dist.all_reduce(loss.detach())
    gradients = {name: p.grad for name, p in model.named_parameters()}
    torch.save({"loss": loss.detach() / 2, "gradients": gradients, "state": model.state_dict()}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_eq1_moco_two_ranks_with_half_the_batch_each_are_one_with_the_whole(tmp_path):
    ranks = [FORKS.Process(target=half_a_batch, args=(rank, str(tmp_path))) for rank in range(2)]
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
                torch.testing.assert_close(found["gradients"][name], parameter.grad, rtol=1e-7, atol=1e-9, msg=name)
        for name, tensor in model.state_dict().items():    # the momentum encoder, BatchNorm's statistics
            torch.testing.assert_close(found["state"][name], tensor, rtol=1e-9, atol=1e-11, msg=name)


# ------------------------------------------------------------ a run

def test_a_run_logs_the_indicators_and_saves_both_encoders(tmp_path):
    call(mocov3, "--out", tmp_path / "run", *TINY, "--max-steps", 3, "--stop-grad-conv1")
    log = log_of(tmp_path / "run")
    assert [entry["step"] for entry in log] == [1, 2, 3]
    assert {"loss", "momentum", "contrastive_accuracy", "projection_spread", "token_spread"} < log[0].keys()
    assert log[0]["momentum"] == pytest.approx(0.95) and log[2]["momentum"] > log[1]["momentum"]
    assert (tmp_path / "run" / "curves.png").stat().st_size > 10000
    state = torch.load(tmp_path / "run" / "last.pt", weights_only=True)["model"]
    base, momentum = vit.vit_toy(img_size=32, patch_size=8, global_pool="token"), None
    assert not vit.load_weights(base, tmp_path / "run" / "last.pt").missing
    momentum = copy.deepcopy(base)
    vit.load_weights(momentum, tmp_path / "run" / "last.pt", branch="momentum_encoder")
    key = "blocks.0.attn.qkv.weight"
    for encoder, prefix in ((base, "base_encoder"), (momentum, "momentum_encoder")):
        assert torch.equal(encoder.state_dict()[key], state[f"{prefix}.{key}"])
    assert not torch.equal(state[f"base_encoder.{key}"], state[f"momentum_encoder.{key}"])
    frozen = "patch_embed.proj.weight"
    torch.testing.assert_close(state[f"base_encoder.{frozen}"], state[f"momentum_encoder.{frozen}"])


def test_a_sample_is_two_different_views_of_one_image():
    data = [(image, 0) for image in vit.toy_shapes(4)[0]]
    flip = mocov3.v2.RandomHorizontalFlip(1.0)
    x1, x2 = mocov3.make_sample(data, (torch.nn.Identity(), flip), 2)
    assert torch.equal(x1, data[2][0]) and torch.equal(x2, data[2][0].flip(-1))


def test_weight_decay_reaches_all_parameters_and_only_the_base_encoder_learns(tmp_path, monkeypatch):
    groups = []
    adamw = torch.optim.AdamW
    monkeypatch.setattr(torch.optim, "AdamW", lambda parameters, **kw: groups.append((list(parameters), kw)) or adamw(*groups[0][:1], **kw))
    monkeypatch.setattr(mocov3, "draw_curves", lambda args: None)
    call(mocov3, "--out", tmp_path / "run", *TINY, "--max-steps", 1)
    (parameters, options), = groups
    model = mocov3.MoCoV3(lambda **kw: vit.vit_toy(img_size=32, patch_size=8, **kw), 16, 32)
    learn = [p for part in (model.base_encoder, model.predictor) for p in part.parameters() if p.requires_grad]
    assert [p.shape for p in parameters] == [p.shape for p in learn]
    assert options["weight_decay"] == 0.1 and options["betas"] == (0.9, 0.999)


def test_init_starts_both_encoders_from_the_file(tmp_path, capsys):
    torch.manual_seed(3)
    torch.save(vit.vit_toy(img_size=32, patch_size=8).state_dict(), tmp_path / "start.pt")
    call(mocov3, "--out", tmp_path / "run", *TINY, "--max-steps", 1, "--init", tmp_path / "start.pt")
    assert "--init" in capsys.readouterr().out
    old = torch.load(tmp_path / "start.pt", weights_only=True)
    new = torch.load(tmp_path / "run" / "last.pt", weights_only=True)["model"]    # step 0 has learning rate 0
    for prefix in ("base_encoder", "momentum_encoder"):
        torch.testing.assert_close(new[f"{prefix}.blocks.0.attn.qkv.weight"], old["blocks.0.attn.qkv.weight"])


def test_compile_makes_few_graphs_and_none_for_a_new_momentum():
    from torch._dynamo.testing import CompileCounter
    counter = CompileCounter()
    model = mocov3.MoCoV3(lambda **kw: vit.vit_toy(img_size=16, patch_size=8, depth=3, **kw), 16, 32)
    for block in [*model.base_encoder.blocks, *model.momentum_encoder.blocks]:    # as train() does
        block.compile(backend=counter, dynamic=False)
    for step in range(6):
        model(torch.randn(4, 3, 16, 16), torch.randn(4, 3, 16, 16), 0.99 + 0.0005 * step).backward()
    assert counter.frame_count <= 4


@pytest.mark.parametrize("arguments, words", [
    (("--accum", 2), ("--accum 2", "BatchNorm")),
    (("--fraction", 0.01, "--batch-size", 128), ("--batch-size 128", "82 images")),
    (("--patch-size", 0), ("--patch-size 0 is not from 1",)),
    (("--batch-size", 1), ("--batch-size 1", "from 2"))])
def test_mocov3_refuses_batches_that_it_cannot_contrast(arguments, words, tmp_path, capsys):
    message = refused(capsys, mocov3, "--out", tmp_path / "run", *arguments)
    assert all(word in message for word in words), message
    assert not (tmp_path / "run").exists()
