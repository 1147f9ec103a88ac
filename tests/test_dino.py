"""dino.py: head, loss, center and the whole network against published numbers, then the method's claims."""
import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import FORKS, GOLDENS, SIZES, agrees, call, fill, finish, images, log_of, refused
from torch.nn.parallel import DistributedDataParallel

import dino
import vit

GOLDEN = GOLDENS["12_dino"]
TINY = ("--fraction", 0.01, "--batch-size", 8, "--out-dim", 32, "--hidden-dim", 16, "--log-every", 1, "--workers", 0)
PUBLISHED = {"head.0": "head.mlp.0", "head.2": "head.mlp.2", "head.4": "head.mlp.4", "head.5.weight": "head.last_layer.weight_v"}


def published(name):
    """The published name of a parameter of the head; all others have their own."""
    for own, other in PUBLISHED.items():
        name = name.replace(own, other)
    return name


def random(seed, *shape):
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape))


def network(dtype=torch.float64):
    """The golden network: a head 48-64-64-16-32."""
    model = dino.DINO(lambda **pool: vit.VisionTransformer(**SIZES, **pool), 32, 64)
    for encoder in (model.student, model.teacher):
        encoder.head = dino.mlp(48, 64, 64, 16, 32)
    fill(model.student, "", dtype, published)
    fill(model.teacher, "teacher.", dtype, published).requires_grad_(False)
    return model.to(dtype)


def crops(dtype=torch.float64):
    """Global `(4, 2, 3, 32, 32)` and local crops `(4, 3, 3, 16, 16)` of 4 images."""
    x = images(4, 32)
    pair = x, x.flip(3) + 0.1 * random(5, *x.shape)
    return torch.stack(pair, dim=1).to(dtype), random(26, 3, 4, 3, 16, 16).transpose(0, 1).to(dtype)


def outputs():
    """Student, teacher and center of the golden loss: 2 global and 3 local crops of 4 images."""
    return 0.2 * random(22, 20, 32), 0.2 * random(23, 8, 32), 0.1 * random(24, 1, 32)


# ------------------------------------------------------------ the published numbers

def test_published_dino_head_gives_unit_vectors_then_cosines():
    golden, head = GOLDEN["head"], torch.nn.Module()
    head.head = dino.mlp(48, 64, 64, 16, 32)
    fill(head, rename=published)
    x = random(21, 8, 48)
    agrees(F.normalize(head.head[:-1](x), dim=1), golden["bottleneck_after_l2"])
    agrees(head.head(x), golden["output"])
    assert head.head(x).abs().max() <= 1
    (head.head(x) * random(27, 8, 32)).sum().backward()
    norms = {published(name): p.grad.norm() for name, p in head.named_parameters()}
    assert norms.keys() == golden["grad_norms"].keys()    # the weight norm's g is no parameter
    for name, norm in golden["grad_norms"].items():
        agrees(norms[name], norm)


def test_dino_loss_is_the_published_one_and_no_wrong_reading():
    golden, (student, teacher, center) = GOLDEN["loss"], outputs()
    student.requires_grad_(True)
    loss = dino.dino_loss(student, teacher, center, 0.1, 0.04)
    loss.backward()
    agrees(loss, float(golden["loss_full"]), 1e-9)
    agrees(student.grad, golden["grad_student_output"])
    agrees(loss, np.mean(list(golden["pair_losses_teacher_student"].values())))
    for name in ("same_view_pairs", "center_updated_first", "no_center", "student_centered_too"):
        wrong, = [value for key, value in golden.items() if key.startswith("alt_") and key.endswith(name)]
        assert abs(loss.item() - wrong) > 1e-3, name


def test_dino_center_moves_to_the_mean_of_the_teachers_raw_outputs():
    golden, model, (student, teacher, center) = GOLDEN["loss"], network(), outputs()
    model.center.copy_(center)
    model.update_center(teacher)
    agrees(model.center, golden["center_after"])
    wrong = dino.dino_loss(student, teacher, model.center, 0.1, 0.04)    # must come before it
    agrees(wrong, golden["alt_loss_center_updated_first"])


@pytest.mark.parametrize("rule", ["dino_interpolation", "plain_interpolation"])
def test_published_dino_gives_the_loss_and_gradients_of_five_crops(rule, monkeypatch):
    """Its rule for positions of local crops, which samples every N / (n + 0.1), and this project's, N / n."""
    golden, model, (x1, x2) = GOLDEN["multi_crop"], network(), crops()
    if rule == "dino_interpolation":
        def resize(table, grid, plain=vit.resize_position):
            if grid != (2, 2):
                return plain(table, grid)
            patches = table[:, 1:].view(1, 4, 4, -1).permute(0, 3, 1, 2)
            patches = F.interpolate(patches, scale_factor=2.1 / 4, mode="bicubic", recompute_scale_factor=False)
            return torch.cat([table[:, :1], patches.flatten(2).transpose(1, 2)], dim=1)
        monkeypatch.setattr(vit, "resize_position", resize)
    agrees(vit.resize_position(model.student.pos_embed, (2, 2)), golden[rule]["position_of_local_crops"])
    rows = [x.transpose(0, 1).flatten(0, 1) for x in (x1, x2)]
    agrees(torch.cat([model.student(x) for x in rows]), golden[rule]["student_output"], 1e-5)    # elements near zero
    agrees(model.teacher(rows[0]), golden["teacher_output"], 1e-5)
    loss = model(x1, x2)
    loss.backward()
    agrees(loss, float(golden[rule]["loss_full"]))
    agrees(model.center, golden["center_after"], 1e-5)
    norms = {published(name): p.grad.norm() for name, p in model.student.named_parameters() if p.grad is not None}
    agrees(torch.stack(list(norms.values())).norm(), golden[rule]["grad_total_norm"], 1e-5)
    if rule == "dino_interpolation":
        assert norms.keys() == golden["grad_norms_dino_interpolation"].keys()
        for name, norm in golden["grad_norms_dino_interpolation"].items():
            agrees(norms[name], norm, 1e-5)
    assert not any(p.requires_grad for p in model.teacher.parameters())


def test_dino_schedules_are_the_published_cosines():
    golden, rate = GOLDEN["schedules"], dino.learning_rate
    decay, momentum = ([rate(step, 100, 0, *ends) for step in golden["steps"]] for ends in ((0.04, 0.4), (0.996, 1.0)))
    np.testing.assert_allclose(decay, golden["weight_decay_0_04_to_0_4"], rtol=1e-6)
    np.testing.assert_allclose(momentum, golden["momentum_0_996_to_1"], rtol=1e-8)
    lr = golden["lr_5e4_to_1e6_warmup_10_of_100"]
    steps = [step if step >= 10 else step * 10 / 9 for step in lr["steps"]]    # the published warm-up ends a step earlier
    np.testing.assert_allclose([rate(step, 100, 10, 5e-4, 1e-6) for step in steps], lr["lr"], rtol=1e-6)


# ------------------------------------------------------------ the method's claims

def test_dino_loss_of_a_constant_teacher_is_the_entropy_of_the_uniform_distribution():
    center = random(1, 1, 32)
    teacher = (center + 3).expand(4, 32)    # the same for all images
    loss = dino.dino_loss(torch.zeros(10, 32), teacher, center, 0.1, 0.04)
    assert loss.item() == pytest.approx(math.log(32))    # and no student does better
    assert dino.dino_loss(random(2, 10, 32), teacher, center, 0.1, 0.04) > math.log(32)


def test_dino_loss_ignores_the_pair_of_a_crop_with_itself():
    student, teacher, center = outputs()
    gradients = []
    for first in (teacher[:4], teacher[:4].flip(1)):    # what the teacher says of the first crop
        student = student.detach().requires_grad_(True)
        dino.dino_loss(student, torch.cat([first, teacher[4:]]), center, 0.1, 0.04).backward()
        gradients.append(student.grad.split(4))
    changed = [not torch.equal(a, b) for a, b in zip(*gradients, strict=True)]
    assert changed == [False, True, True, True, True]    # moves the student on all crops but this one
    confident = 20 * torch.eye(32)[[0] * 4 + [1] * 4]
    assert dino.dino_loss(confident.roll(4, 0), confident, torch.zeros(1, 32), 0.1, 0.04) < 1e-6
    assert dino.dino_loss(confident, confident, torch.zeros(1, 32), 0.1, 0.04) > 100


def test_dino_loss_stays_in_float32_under_bf16():
    model, (x1, x2) = network(torch.float32), crops(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(x1, x2)
    assert loss.dtype == model.center.dtype == torch.float32
    agrees(loss, GOLDEN["multi_crop"]["plain_interpolation"]["loss"], 0.05)
    agrees(model.center, GOLDEN["multi_crop"]["center_after"], 0.5)


def test_monitors_indicate_a_collapse():
    healthy, constant = network(), network()
    for block in constant.teacher.blocks:    # class tokens that see nothing of the image
        torch.nn.init.zeros_(block.attn.proj.weight)
    for model in (healthy, constant):
        loss = model(*crops())
        assert not any(scalar.requires_grad for scalar in model.monitors.values())
        assert (model.monitors["entropy"] + model.monitors["kl"]).item() == pytest.approx(loss.item())    # Sec. 5.3
    targets = (healthy.teacher(crops()[0].transpose(0, 1).flatten(0, 1)) / 0.04).softmax(dim=1)    # the center was 0
    assert healthy.monitors["entropy"].item() == pytest.approx(-(targets * targets.log()).sum(dim=1).mean().item())
    assert healthy.monitors["token_spread"] > 0.05 and constant.monitors["token_spread"] < 1e-6
    for collapse, entropy in ((0.0, math.log(32)), (100.0, 0.0)):    # uniform; always the same output
        model = network()
        for encoder in (model.student, model.teacher):
            encoder.head = torch.nn.Linear(48, 32).double()
            torch.nn.init.zeros_(encoder.head.weight)
            encoder.head.bias.data = torch.zeros(32).double().index_fill_(0, torch.tensor([3]), collapse)
        model(*crops())
        assert model.monitors["entropy"].item() == pytest.approx(entropy, abs=1e-6)
        assert abs(model.monitors["kl"].item()) < 1e-6


def test_update_teacher_moves_all_parameters_towards_the_student():
    model = network()
    before = {name: p.clone() for name, p in model.teacher.named_parameters()}
    model.update_teacher(0.9)
    for name, student in model.student.named_parameters():
        teacher = model.teacher.get_parameter(name)
        torch.testing.assert_close(teacher, 0.9 * before[name] + 0.1 * student, rtol=1e-12, atol=1e-14)
        assert torch.equal(teacher, student) == (name == "pos_embed")
    fresh = dino.DINO(lambda **pool: vit.VisionTransformer(**SIZES, **pool), 32, 64)
    assert all(map(torch.equal, fresh.teacher.state_dict().values(), fresh.student.state_dict().values()))


def half_a_batch(rank, folder):
    """One of two gloo ranks with 2 of the golden 4 images."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    dino.WORLD = 2
    model = network()
    parallel = DistributedDataParallel(model)
    loss = parallel(*(x[rank::2] for x in crops()))
    loss.backward()
    dist.all_reduce(loss.detach())
    gradients = {name: p.grad for name, p in model.named_parameters()}
    torch.save({"loss": loss.detach() / 2, "gradients": gradients, "center": model.center}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_dino_two_ranks_with_half_the_batch_each_are_one_with_the_whole(tmp_path):
    ranks = [FORKS.Process(target=half_a_batch, args=(rank, str(tmp_path))) for rank in range(2)]
    for process in ranks:
        process.start()
    model = network()
    loss = model(*crops())
    loss.backward()
    finish(ranks)
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert found["loss"].item() == pytest.approx(loss.item(), rel=1e-9)
        torch.testing.assert_close(found["center"], model.center, rtol=1e-9, atol=1e-12)
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                torch.testing.assert_close(found["gradients"][name], parameter.grad, rtol=1e-7, atol=1e-9, msg=name)


# ------------------------------------------------------------ a run

def test_a_run_logs_the_indicators_and_its_teacher_is_what_others_read(tmp_path):
    call(dino, "--out", tmp_path / "run", *TINY, "--max-steps", 3)
    log = log_of(tmp_path / "run")
    assert [entry["step"] for entry in log] == [1, 2, 3] and list(log[0])[-1] == "data_wait"
    assert {"loss", "momentum", "entropy", "kl", "token_spread", "grad_norm"} < log[0].keys()
    assert log[2]["momentum"] > log[1]["momentum"]
    for name in ("curves.png", "attention.png"):
        assert (tmp_path / "run" / name).stat().st_size > 10000
    state = torch.load(tmp_path / "run" / "last.pt", weights_only=True)["model"]
    for branch, given in (("teacher", ()), ("teacher", ("base_encoder",)), ("student", ("student",))):
        encoder, report = vit.from_weights(tmp_path / "run" / "last.pt", None, *given)
        assert not report.missing and encoder.global_pool == "token"
        for key, tensor in encoder.state_dict().items():
            assert torch.equal(tensor, state[f"{branch}.{key}"]), key
    key = "blocks.0.attn.qkv.weight"
    assert not torch.equal(state[f"teacher.{key}"], state[f"student.{key}"])


def test_a_sample_is_two_global_and_some_local_crops_of_one_image():
    data = [(image, 0) for image in vit.toy_shapes(4)[0]]
    flip, small = dino.v2.RandomHorizontalFlip(1.0), dino.v2.Resize(16)
    x1, x2 = dino.make_sample(data, [torch.nn.Identity(), flip, small, small, small], 2)
    assert torch.equal(x1, torch.stack([data[2][0], data[2][0].flip(-1)])) and x2.shape == (3, 3, 16, 16)


def test_clipping_is_the_published_one_of_each_tensor_alone():
    golden, rs = GOLDEN["clip"], np.random.RandomState(25)
    parameters = [torch.nn.Parameter(torch.zeros(shape).double()) for shape in ((8, 6), (12,), (4, 4))]
    for parameter, scale in zip(parameters, (2, 1, 0.25)):
        parameter.grad = torch.from_numpy(scale * rs.standard_normal(parameter.shape))
    norms = [torch.nn.utils.clip_grad_norm_(parameter, 3.0) for parameter in parameters]    # as train() does
    agrees(torch.stack(norms), golden["norms_before"])
    agrees(torch.stack([parameter.grad.norm() for parameter in parameters]), golden["norms_after"])


def test_train_raises_the_decay_clips_each_tensor_and_freezes_the_last_layer_for_an_epoch(tmp_path, monkeypatch):
    decays, frozen, groups, clipped, clip = [], [], [], [], torch.nn.utils.clip_grad_norm_

    class AdamW(torch.optim.AdamW):
        def step(self, *args, **kw):
            groups[:] = [group["params"] for group in self.param_groups]
            decays.append([group["weight_decay"] for group in self.param_groups])
            frozen.append([p.shape for p in groups[0] + groups[1] if p.grad is None])
            return super().step(*args, **kw)
    monkeypatch.setattr(torch.optim, "AdamW", AdamW)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda p, norm: clipped.append((p.shape, norm)) or clip(p, norm))
    for name in ("draw_curves", "draw_attention"):
        monkeypatch.setattr(dino, name, lambda *args: None)
    run = ("--epochs", 2, "--max-steps", 12, "--weight-decay-end", 0.4)    # 10.25 steps are an epoch
    call(dino, "--out", tmp_path / "run", *TINY, *run)
    rising = [dino.learning_rate(step, 20, 0, 0.04, 0.4) for step in range(12)]
    np.testing.assert_allclose(decays, [[decay, 0.0] for decay in rising])
    assert frozen == [[(32, 256)]] * 11 + [[]]
    model = dino.DINO(lambda **kw: vit.vit_toy(img_size=32, patch_size=8, **kw), 32, 16)
    learn = {name: p for name, p in model.student.named_parameters() if p.requires_grad}
    assert clipped == [(p.shape, 3.0) for p in learn.values()] * 12
    for group, key in zip(groups, ("decayed", "not_decayed"), strict=True):
        names = [name for name, p in learn.items() if (p.ndim > 1) == (key == "decayed")]
        assert [p.shape for p in group] == [learn[name].shape for name in names]
        first = {published(name) for name in names if not name.startswith("blocks.") or name.startswith("blocks.0.")}
        assert first == set(GOLDEN["decay_groups"][key]) - {"pos_embed"}    # which is fixed here


def test_init_starts_student_and_teacher_from_the_file(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(dino, "draw_attention", lambda *args: None)
    torch.manual_seed(3)
    torch.save(vit.vit_toy(img_size=32, patch_size=8).state_dict(), tmp_path / "start.pt")
    call(dino, "--out", tmp_path / "run", *TINY, "--max-steps", 1, "--init", tmp_path / "start.pt")
    assert "--init" in capsys.readouterr().out
    old = torch.load(tmp_path / "start.pt", weights_only=True)
    new = torch.load(tmp_path / "run" / "last.pt", weights_only=True)["model"]    # step 0 has learning rate 0
    for prefix in ("student", "teacher"):
        torch.testing.assert_close(new[f"{prefix}.blocks.0.attn.qkv.weight"], old["blocks.0.attn.qkv.weight"])


@pytest.mark.parametrize("arguments, words", [
    (("--accum", 2), ("--accum 2", "center")),
    (("--fraction", 0.01, "--batch-size", 128), ("--batch-size 128", "82 images")),
    (("--img-size", 0), ("--img-size 0 is not from 1",)),
    (("--local-size", 20), ("patch size 8 does not divide", "20 x 20"))])
def test_dino_refuses_batches_that_it_cannot_use(arguments, words, tmp_path, capsys):
    message = refused(capsys, dino, "--out", tmp_path / "run", *arguments)
    assert all(word in message for word in words), message


def test_compile_makes_few_graphs_and_none_for_a_new_center():
    from torch._dynamo.testing import CompileCounter
    counter = CompileCounter()
    model = dino.DINO(lambda **kw: vit.vit_toy(img_size=16, patch_size=8, depth=3, **kw), 32, 16)
    for block in [*model.student.blocks, *model.teacher.blocks]:    # as train() does
        block.compile(backend=counter, dynamic=False)
    for _ in range(4):
        model(torch.randn(4, 2, 3, 16, 16), torch.randn(4, 2, 3, 8, 8)).backward()
        model.update_teacher(0.99)
    assert counter.frame_count <= 6
