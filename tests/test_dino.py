"""dino.py: head, loss, center, network against published numbers, then the claims, then a run."""
import inspect
import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import (
    FORKS, GOLDENS, SIZES, agrees, call, draw_nothing, fill, finish, images, log_of, refused)
from torch.nn.parallel import DistributedDataParallel

import dino
import mocov3
import vit

GOLDEN = GOLDENS["12_dino"]
TINY = ("--fraction", 0.01, "--batch-size", 8, "--out-dim", 32, "--hidden-dim", 16,
        "--log-every", 1, "--workers", 0)
PUBLISHED = {"head.0": "head.mlp.0", "head.2": "head.mlp.2", "head.4": "head.mlp.4",
             "head.5.weight": "head.last_layer.weight_v"}


def published(name):
    """The published name of a parameter of the head; all others have their own."""
    for own, other in PUBLISHED.items():
        name = name.replace(own, other)
    return name


def random(seed, *shape):
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape))


def golden_encoder(global_pool):
    return vit.VisionTransformer(**SIZES, global_pool=global_pool)


def toy_encoder(global_pool):
    return vit.vit_toy(img_size=32, patch_size=8, global_pool=global_pool)


def network(dtype=torch.float64):
    """The golden network: a head 48-64-64-16-32."""
    model = dino.DINO(golden_encoder, 32, 64)
    for encoder in (model.student, model.teacher):
        encoder.head = dino.projector(48, 64, 16, 32)
    fill(model.student, "", dtype, published)
    fill(model.teacher, "teacher.", dtype, published).requires_grad_(False)
    return model.to(dtype)


def crops(dtype=torch.float64):
    """Global `(4, 2, 3, 32, 32)` and local crops `(4, 3, 3, 16, 16)` of 4 images."""
    x = images(4, 32)
    pair = x, x.flip(3) + 0.1 * random(5, *x.shape)
    local_crops = random(26, 3, 4, 3, 16, 16).transpose(0, 1)
    return torch.stack(pair, dim=1).to(dtype), local_crops.to(dtype)


def crop_by_crop(x):
    return x.transpose(0, 1).flatten(0, 1)


def outputs():
    """Student, teacher and center of the golden loss: 2 global and 3 local crops of 4 images."""
    return 0.2 * random(22, 20, 32), 0.2 * random(23, 8, 32), 0.1 * random(24, 1, 32)


# ------------------------------------------------------------ published numbers

def test_published_dino_head_gives_unit_vectors_then_cosines():
    golden = GOLDEN["head"]
    head = torch.nn.Module()
    head.head = dino.projector(48, 64, 16, 32)
    fill(head, rename=published)
    x = random(21, 8, 48)
    agrees(F.normalize(head.head[:-1](x), dim=1), golden["bottleneck_after_l2"])
    agrees(head.head(x), golden["output"])
    assert head.head(x).abs().max() <= 1
    (head.head(x) * random(27, 8, 32)).sum().backward()
    norms = {published(name): p.grad.norm() for name, p in head.named_parameters()}
    assert norms.keys() == golden["grad_norms"].keys()  # the weight norm's g is no parameter
    for name, norm in golden["grad_norms"].items():
        agrees(norms[name], norm)


def test_dino_loss_is_the_published_one_and_no_wrong_reading():
    golden = GOLDEN["loss"]
    student, teacher, center = outputs()
    student.requires_grad_(True)
    loss = dino.dino_loss(student, teacher, center, 0.1, 0.04)
    loss.backward()
    agrees(loss, float(golden["loss_full"]))
    agrees(student.grad, golden["grad_student_output"])
    agrees(loss, np.mean(list(golden["pair_losses_teacher_student"].values())))
    for name in ("same_view_pairs", "center_updated_first", "no_center", "student_centered_too"):
        keys = [key for key in golden if key.startswith("alt_") and key.endswith(name)]
        assert len(keys) == 1 and abs(loss.item() - golden[keys[0]]) > 1e-3, name


def test_dino_center_moves_to_the_mean_of_the_teachers_raw_outputs():
    golden = GOLDEN["loss"]
    model = network()
    student, teacher, center = outputs()
    model.center.copy_(center)
    model.update_center(teacher)
    agrees(model.center, golden["center_after"])
    wrong = dino.dino_loss(student, teacher, model.center, 0.1, 0.04)  # must come before it
    agrees(wrong, golden["alt_loss_center_updated_first"])


@pytest.mark.parametrize("rule", ["dino_interpolation", "plain_interpolation"])
def test_published_dino_gives_the_loss_and_gradients_of_five_crops(rule, monkeypatch):
    """Positions of local crops by its rule (samples every N / (n + 0.1)) and by ours (N / n)."""
    golden = GOLDEN["multi_crop"]
    model = network()
    plain = vit.resize_position

    def resize(table, grid):
        if grid != (2, 2):
            return plain(table, grid)
        patches = table[:, 1:].view(1, 4, 4, -1).permute(0, 3, 1, 2)
        patches = F.interpolate(
            patches, scale_factor=2.1 / 4, mode="bicubic", recompute_scale_factor=False)
        return torch.cat([table[:, :1], patches.flatten(2).transpose(1, 2)], dim=1)
    if rule == "dino_interpolation":
        monkeypatch.setattr(vit, "resize_position", resize)
    position = vit.resize_position(model.student.pos_embed, (2, 2))
    agrees(position, golden[rule]["position_of_local_crops"])
    global_crops, local_crops = crops()
    rows = [crop_by_crop(x) for x in (global_crops, local_crops)]
    student = torch.cat([model.student(x) for x in rows])
    agrees(student, golden[rule]["student_output"], 1e-5)  # elements near zero
    agrees(model.teacher(rows[0]), golden["teacher_output"], 1e-5)
    loss = model(global_crops, local_crops)
    loss.backward()
    agrees(loss, float(golden[rule]["loss_full"]))
    agrees(model.center, golden["center_after"], 1e-5)
    learned = {name: p for name, p in model.student.named_parameters() if p.grad is not None}
    norms = {published(name): p.grad.norm() for name, p in learned.items()}
    total = torch.stack(list(norms.values())).norm()
    agrees(total, golden[rule]["grad_total_norm"], 1e-5)
    if rule == "dino_interpolation":
        assert norms.keys() == golden["grad_norms_dino_interpolation"].keys()
        for name, norm in golden["grad_norms_dino_interpolation"].items():
            agrees(norms[name], norm, 1e-5)
    assert not any(p.requires_grad for p in model.teacher.parameters())


def test_dino_schedules_are_the_published_cosines():
    golden = GOLDEN["schedules"]
    decay = [dino.cosine(step, 100, 0.04, 0.4) for step in golden["steps"]]
    np.testing.assert_allclose(decay, golden["weight_decay_0_04_to_0_4"], rtol=1e-6)
    momentum = [dino.cosine(step, 100, 0.996, 1.0) for step in golden["steps"]]
    np.testing.assert_allclose(momentum, golden["momentum_0_996_to_1"], rtol=1e-8)
    lr = golden["lr_5e4_to_1e6_warmup_10_of_100"]
    for step, rate in zip(lr["steps"], lr["lr"], strict=True):
        if step < 10:
            step = step * 10 / 9  # the published warm-up ends a step earlier
        assert dino.learning_rate(step, 100, 10, 5e-4, 1e-6) == pytest.approx(rate, rel=1e-6)


def test_clipping_is_the_published_one_of_each_tensor_alone():
    golden = GOLDEN["clip"]
    rs = np.random.RandomState(25)
    shapes = (8, 6), (12,), (4, 4)
    parameters = [torch.nn.Parameter(torch.zeros(shape).double()) for shape in shapes]
    for parameter, scale in zip(parameters, (2, 1, 0.25)):
        parameter.grad = torch.from_numpy(scale * rs.standard_normal(parameter.shape))
    copies = [torch.nn.Parameter(torch.zeros(shape).double()) for shape in shapes]
    for copy, parameter in zip(copies, parameters):
        copy.grad = parameter.grad.clone()
        torch.nn.utils.clip_grad_norm_(copy, 3.0)
    norms = dino.clip_each(parameters, 3.0)
    agrees(norms, golden["norms_before"])
    clipped = torch.stack([parameter.grad.norm() for parameter in parameters])
    agrees(clipped, golden["norms_after"])
    for copy, parameter in zip(copies, parameters):  # the same bits as PyTorch's own
        assert torch.equal(copy.grad, parameter.grad)


# ------------------------------------------------------------ claims

def test_dino_loss_of_a_constant_teacher_is_the_entropy_of_uniform():
    center = random(1, 1, 32)
    teacher = (center + 3).expand(4, 32)  # the same for all images
    loss = dino.dino_loss(torch.zeros(10, 32).double(), teacher, center, 0.1, 0.04)
    assert loss.item() == pytest.approx(math.log(32))  # and no student does better
    assert dino.dino_loss(random(2, 10, 32), teacher, center, 0.1, 0.04) > math.log(32)


def test_dino_loss_divides_by_the_temperatures_that_are_given():
    student, teacher, center = outputs()
    divided = dino.dino_loss(student / 0.3, (teacher - center) / 0.7, 0 * center, 1.0, 1.0)
    loss = dino.dino_loss(student, teacher, center, 0.3, 0.7)
    assert loss.item() == pytest.approx(divided.item())


def test_dino_loss_ignores_the_pair_of_a_crop_with_itself():
    student, teacher, center = outputs()
    gradients = []
    for first in (teacher[:4], teacher[:4].flip(1)):  # what the teacher says of the first crop
        student = student.detach().requires_grad_(True)
        targets = torch.cat([first, teacher[4:]])
        dino.dino_loss(student, targets, center, 0.1, 0.04).backward()
        gradients.append(student.grad.split(4))
    changed = [not torch.equal(a, b) for a, b in zip(*gradients, strict=True)]
    assert changed == [False, True, True, True, True]  # moves the student on all crops but this
    confident = 20 * torch.eye(32)[[0] * 4 + [1] * 4]
    zero = torch.zeros(1, 32)
    assert dino.dino_loss(confident.roll(4, 0), confident, zero, 0.1, 0.04) < 1e-6
    assert dino.dino_loss(confident, confident, zero, 0.1, 0.04) > 100


def test_dino_loss_stays_in_float32_under_bf16():
    golden = GOLDEN["multi_crop"]
    model = network(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(*crops(torch.float32))
    assert loss.dtype == model.center.dtype == torch.float32
    agrees(loss, golden["plain_interpolation"]["loss"], 0.05)
    agrees(model.center, golden["center_after"], 0.5)


def test_monitors_indicate_a_collapse():
    healthy = network()
    constant = network()
    for block in constant.teacher.blocks:  # class tokens that see nothing of the image
        torch.nn.init.zeros_(block.attn.proj.weight)
    center = 0.1 * random(24, 1, 32)
    for model in (healthy, constant):
        model.center.copy_(center)
        loss = model(*crops())
        assert not any(scalar.requires_grad for scalar in model.monitors.values())
        both = model.monitors["entropy"] + model.monitors["kl"]  # Sec. 5.3
        assert both.item() == pytest.approx(loss.item())
    global_crops, _ = crops()
    targets = (healthy.teacher(crop_by_crop(global_crops)) - center) / 0.04
    targets = targets.softmax(dim=1)
    entropy = -(targets * targets.log()).sum(dim=1).mean()
    assert healthy.monitors["entropy"].item() == pytest.approx(entropy.item())
    assert healthy.monitors["token_spread"] > 0.05
    assert constant.monitors["token_spread"] < 1e-6


@pytest.mark.parametrize("bias, entropy", [(0.0, math.log(32)), (100.0, 0.0)])
def test_monitors_tell_uniform_outputs_and_always_the_same(bias, entropy):
    model = network()
    for encoder in (model.student, model.teacher):
        encoder.head = torch.nn.Linear(48, 32).double()
        torch.nn.init.zeros_(encoder.head.weight)
        torch.nn.init.zeros_(encoder.head.bias)
        encoder.head.bias.data[3] = bias
    model(*crops())
    assert model.monitors["entropy"].item() == pytest.approx(entropy, abs=1e-6)
    assert abs(model.monitors["kl"].item()) < 1e-6


def test_update_teacher_moves_all_parameters_towards_the_student():
    model = network()
    before = {name: p.clone() for name, p in model.teacher.named_parameters()}
    model.update_teacher(0.9)
    for name, student in model.student.named_parameters():
        teacher = model.teacher.get_parameter(name)
        average = 0.9 * before[name] + 0.1 * student
        torch.testing.assert_close(teacher, average, rtol=1e-12, atol=1e-14)
        assert torch.equal(teacher, student) == (name == "pos_embed")
    new = dino.DINO(golden_encoder, 32, 64)
    for name, tensor in new.teacher.state_dict().items():
        assert torch.equal(tensor, new.student.state_dict()[name])


def half_a_batch(rank, folder):
    """One of two gloo ranks with 2 of the golden 4 images."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    model = network()
    global_crops, local_crops = crops()
    parallel = DistributedDataParallel(model)
    loss = parallel(global_crops[rank::2], local_crops[rank::2])
    loss.backward()
    dist.all_reduce(loss.detach())
    gradients = {name: p.grad for name, p in model.named_parameters()}
    found = {"loss": loss.detach() / 2, "gradients": gradients, "center": model.center}
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_dino_two_ranks_with_half_the_batch_are_one_with_it_all(tmp_path):
    ranks = [FORKS.Process(target=half_a_batch, args=(r, str(tmp_path))) for r in range(2)]
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
                gradient = found["gradients"][name]
                torch.testing.assert_close(
                    gradient, parameter.grad, rtol=1e-7, atol=1e-9, msg=name)


# ------------------------------------------------------------ samples

def samples(*arguments):
    """Samples of four toy images."""
    data = [(image, 0) for image in vit.toy_shapes(4)[0]]
    args = dino.parse(
        [str(argument) for argument in arguments], dino.settings, dino.PRESETS, out="runs/x")
    return dino.Samples(data, args)


def test_a_sample_is_two_global_and_some_local_crops_of_one_image():
    """With all changes but the crops switched off; these are whole, and a corner."""
    crops_of = samples("--local-crops", 3)
    changes = []

    def record(image, blur, solarize):
        changes.append((blur, solarize))
        return image
    crops_of.change = record
    crops_of.global_crop = torch.nn.Identity()
    crops_of.local_crop = dino.v2.CenterCrop(16)
    seen = []
    for v in range(4):
        global_crops, local_crops = crops_of[v]
        image = global_crops[0]
        assert torch.equal(global_crops, torch.stack([image, image]))
        assert torch.equal(local_crops, image[:, 8:24, 8:24].expand(3, 3, 16, 16))
        seen += [i for i, (other, _) in enumerate(crops_of.data) if torch.equal(image, other)]
    assert sorted(seen) == [0, 1, 2, 3]
    assert changes == 4 * [(1, 0), (0.1, 0.2), (0.5, 0), (0.5, 0), (0.5, 0)]  # the published ones


def test_changes_of_crops_and_their_blur_are_those_of_mocov3():
    for name in ("random_blur", "cosine", "spread"):
        assert inspect.getsource(getattr(dino, name)) == inspect.getsource(getattr(mocov3, name))
    _, own = inspect.getsource(dino.Samples.change).split("if torch.rand", 1)
    _, other = inspect.getsource(mocov3.Samples.view).split("if torch.rand", 1)
    assert own == other


def test_a_sample_follows_from_seed_and_number_alone():
    first = samples("--seed", 3)[5]
    torch.rand(7)
    again = samples("--seed", 3)[5]
    other = samples("--seed", 4)[5]
    assert first[0].dtype == torch.uint8 and first[0].shape == (2, 3, 32, 32)
    assert first[1].dtype == torch.uint8 and first[1].shape == (2, 3, 16, 16)
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])


# ------------------------------------------------------------ a run

def test_a_run_logs_the_indicators_and_its_teacher_is_what_is_read(tmp_path):
    call(dino, "--out", tmp_path / "run", *TINY, "--max-steps", 3)
    log = log_of(tmp_path / "run")
    assert [entry["step"] for entry in log] == [1, 2, 3] and list(log[0])[-1] == "data_wait"
    assert {"loss", "momentum", "entropy", "kl", "token_spread", "grad_norm"} < log[0].keys()
    assert log[2]["momentum"] > log[1]["momentum"]
    for name in ("curves.png", "attention.png"):
        assert (tmp_path / "run" / name).stat().st_size > 10000
    path = tmp_path / "run" / "last.pt"
    state = torch.load(path, weights_only=True)["model"]
    default, _ = vit.from_weights(path)
    other, _ = vit.from_weights(path, branch="base_encoder")
    student, report = vit.from_weights(path, branch="student")
    assert not report.missing
    for branch, encoder in (("teacher", default), ("teacher", other), ("student", student)):
        assert encoder.global_pool == "token"
        for key, tensor in encoder.state_dict().items():
            assert torch.equal(tensor, state[f"{branch}.{key}"]), key
    key = "blocks.0.attn.qkv.weight"
    assert not torch.equal(state[f"teacher.{key}"], state[f"student.{key}"])


def test_clip_grad_0_clips_nothing(tmp_path, monkeypatch):
    draw_nothing(dino, monkeypatch)
    norms = []
    for largest in (0, 1e6):
        out = tmp_path / str(largest)
        call(dino, "--out", out, *TINY, "--max-steps", 2, "--clip-grad", largest)
        norms.append([(entry["loss"], entry["grad_norm"]) for entry in log_of(out)])
    assert norms[0] == norms[1] and norms[0][0][1] > 0


def test_train_raises_the_decay_clips_and_freezes_the_last_layer(tmp_path, monkeypatch):
    groups = {}
    decays = []
    frozen = []
    clipped = []
    clip_each = dino.clip_each

    class AdamW(torch.optim.AdamW):
        def step(self, *args, **kw):
            decays.append([group["weight_decay"] for group in self.param_groups])
            for group in self.param_groups:
                groups[group["name"]] = [p.shape for p in group["params"]]
            parameters = [p for group in self.param_groups for p in group["params"]]
            frozen.append([p.shape for p in parameters if p.grad is None])
            return super().step(*args, **kw)

    def record(parameters, largest):
        clipped.append(([p.shape for p in parameters], largest))
        return clip_each(parameters, largest)
    monkeypatch.setattr(torch.optim, "AdamW", AdamW)
    monkeypatch.setattr(dino, "clip_each", record)
    draw_nothing(dino, monkeypatch)
    run = ("--epochs", 2, "--max-steps", 12, "--weight-decay-end", 0.4)  # an epoch: 10.25 steps
    call(dino, "--out", tmp_path / "run", *TINY, *run)
    rising = [dino.cosine(step, 20, 0.04, 0.4) for step in range(12)]
    np.testing.assert_allclose(decays, [[decay, 0.0] for decay in rising])
    assert frozen == [[(32, 256)]] * 11 + [[]]
    model = dino.DINO(toy_encoder, 32, 16)
    learned = {name: p for name, p in model.student.named_parameters() if p.requires_grad}
    assert clipped == [([p.shape for p in learned.values()], 3.0)] * 12
    matrices = [name for name, p in learned.items() if p.ndim > 1]
    vectors = [name for name, p in learned.items() if p.ndim == 1]
    assert groups["matrices"] == [learned[name].shape for name in matrices]
    assert groups["vectors"] == [learned[name].shape for name in vectors]
    for names, key in ((matrices, "decayed"), (vectors, "not_decayed")):
        higher = tuple(f"blocks.{i}." for i in range(1, 6))  # the golden has the first block's
        found = {published(name) for name in names if not name.startswith(higher)}
        assert found == set(GOLDEN["decay_groups"][key]) - {"pos_embed"}  # which is fixed here


def test_init_starts_student_and_teacher_from_the_file(tmp_path, capsys, monkeypatch):
    draw_nothing(dino, monkeypatch)
    torch.manual_seed(3)
    torch.save(toy_encoder("token").state_dict(), tmp_path / "start.pt")
    run = ("--out", tmp_path / "run", *TINY, "--max-steps", 1)
    call(dino, *run, "--init", tmp_path / "start.pt")
    said = capsys.readouterr().out
    assert f"--init {tmp_path / 'start.pt'}: randomly initialized: " in said
    old = torch.load(tmp_path / "start.pt", weights_only=True)
    new = torch.load(tmp_path / "run" / "last.pt", weights_only=True)["model"]
    key = "blocks.0.attn.qkv.weight"
    for prefix in ("student", "teacher"):  # step 0 has learning rate 0
        torch.testing.assert_close(new[f"{prefix}.{key}"], old[key])


@pytest.mark.parametrize("arguments, words", [
    (("--accum", 2), ("--accum 2", "center")),
    (("--fraction", 0.01, "--batch-size", 128), ("--batch-size 128", "82")),
    (("--img-size", 0), ("--img-size", "invalid count value: '0'")),
    (("--local-min-crop", 0.7), ("--local-min-crop 0.7", "--min-crop")),
    (("--local-size", 20), ("patch size 8 does not divide", "20 x 20"))])
def test_dino_refuses_batches_that_it_cannot_use(arguments, words, tmp_path, capsys):
    message = refused(capsys, dino, "--out", tmp_path / "run", *arguments)
    assert all(word in message for word in words), message


@pytest.mark.slow
def test_compile_makes_few_graphs_and_none_for_a_new_center():
    from torch._dynamo.testing import CompileCounter
    counter = CompileCounter()

    def encoder_fn(global_pool):
        return vit.vit_toy(img_size=16, patch_size=8, depth=3, global_pool=global_pool)
    model = dino.DINO(encoder_fn, 32, 16)
    for block in [*model.student.blocks, *model.teacher.blocks]:  # as train() does
        block.compile(backend=counter, dynamic=False)
    for _ in range(4):
        model(torch.randn(4, 2, 3, 16, 16), torch.randn(4, 2, 3, 8, 8)).backward()
        model.update_teacher(0.99)
    assert counter.frame_count <= 6
