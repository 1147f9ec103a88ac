"""distill.py: attention distillation (Sec. 5) against published numbers, and what sets it apart from mae.py."""
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import GOLDENS, ROOT, SIZES, TEACHER, agrees, call, fill, images, log_of, noise, refused, run, value

import distill
import mae
import vit

GOLDEN = GOLDENS["4_distill"]


def pair(blocks=(2,)):
    """The golden student, with a head map per distilled block, and teacher."""
    student = distill.MaskedAutoencoder(vit.VisionTransformer(**SIZES), 24, 1, 3, blocks=blocks, teacher_heads=4)
    fill(student, rename=lambda name: name.removeprefix("encoder."))
    for head_map in student.head_maps:
        head_map.data = value("attn_adapter", (4, 6, 1, 1)).flatten(1)
    teacher = fill(vit.VisionTransformer(**TEACHER, global_pool="token"), prefix="teacher.")
    return student, distill.Teacher(teacher, list(blocks))


def losses(student, teacher, x=None):
    """loss, pred, mask, attention_loss on the golden images, or on x."""
    x = images() if x is None else x
    return student(x, 0.75, noise(4, 16), teacher(x, 0.75, noise(4, 16)))


def scores():
    """Scores of the golden student and teacher on the visible patches, `(4, 6, 5, 5)` and `(4, 4, 5, 5)`."""
    student, teacher = pair()
    kept, _, _ = distill.random_masking(student.encoder.embed(images()), 0.75, noise(4, 16))
    _, extras = student.encoder.encode(kept, attention=(2,))
    return extras.attention[2], teacher(images(), 0.75, noise(4, 16))[0]


# ------------------------------------------------------------ Eq. 3

def test_eq3_losses_and_gradients_are_the_published_ones():
    student, teacher = pair()
    loss, _, _, attention_loss = losses(student, teacher)
    (loss + attention_loss).backward()
    agrees(loss, GOLDEN["L_mae"])
    agrees(attention_loss, GOLDEN["L_attn"])
    agrees(loss + attention_loss, GOLDEN["total"])
    norms = {name.removeprefix("encoder."): p.grad.norm() for name, p in student.named_parameters() if p.requires_grad}
    norms["attn_adapter.adapter2.weight"] = norms.pop("head_maps.0")
    assert norms.keys() == GOLDEN["grad_norms"].keys()
    for name, norm in GOLDEN["grad_norms"].items():
        agrees(norms[name], norm)
    agrees(torch.stack(list(norms.values())).norm(), GOLDEN["grad_total_norm_student_and_adapter"])


def test_eq3_scores_are_pre_softmax_scaled_and_with_the_class_token():
    student, teacher = scores()
    agrees(student, GOLDEN["student_scores"])
    agrees(teacher, GOLDEN["teacher_scores"])
    head_map = value("attn_adapter", (4, 6, 1, 1))
    agrees(torch.einsum("ts,bsij->btij", head_map.flatten(1), student), GOLDEN["adapted_student_scores"])
    agrees(distill.attention_distillation_loss(student, teacher, head_map), GOLDEN["L_attn"])


def test_eq3_is_none_of_its_wrong_readings():
    student, teacher = scores()
    head_map = value("attn_adapter", (4, 6, 1, 1)).flatten(1)
    mapped = torch.einsum("ts,bsij->btij", head_map, student)
    loss = distill.attention_distillation_loss
    wrong = {
        "softmax_then_adapter": loss(student.softmax(-1), teacher.softmax(-1), head_map),
        "adapter_then_softmax": ((mapped.softmax(-1) - teacher.softmax(-1)) ** 2).mean(),
        "presoftmax_without_scale": loss(student * 8 ** 0.5, teacher * 24 ** 0.5, head_map),
        "presoftmax_without_cls_row_col": loss(student[..., 1:, 1:], teacher[..., 1:, 1:], head_map)}
    for name, number in wrong.items():
        agrees(number, GOLDEN[f"alt_L_attn_{name}"])
        assert abs(number - GOLDEN["L_attn"]) > 0.01


def test_eq3_head_map_is_a_matrix_or_a_1x1_convolution():
    student, teacher = scores()
    convolution = torch.nn.Conv2d(6, 4, 1, bias=False).double()
    expected = ((convolution(student) - teacher) ** 2).mean()
    for head_map in (convolution, convolution.weight, convolution.weight[:, :, 0, 0]):
        loss = distill.attention_distillation_loss(student, teacher, head_map)
        torch.testing.assert_close(loss, expected)


def test_eq3_is_computed_in_float32_under_bf16():
    student, teacher = [x.float() for x in scores()]
    head_map = value("attn_adapter", (4, 6, 1, 1)).float()
    with torch.autocast("cpu", torch.bfloat16):
        loss = distill.attention_distillation_loss(student, teacher, head_map)
    agrees(loss, GOLDEN["L_attn"], 1e-4)
    assert loss.dtype == torch.float32
    low = student.bfloat16()
    losses = [distill.attention_distillation_loss(x, teacher, head_map) for x in (low, low.float())]
    assert torch.equal(*losses)


def test_eq3_the_losses_of_several_blocks_are_summed():
    first, last, both = [losses(*pair(blocks))[3] for blocks in ((0,), (2,), (0, 2))]
    torch.testing.assert_close(both, first + last)


# ------------------------------------------------------------ student and teacher

def test_eq3_teacher_sees_the_visible_patches_only():
    student, teacher = pair()
    _, _, mask, before = losses(student, teacher)
    changed = mae.unpatchify(mae.patchify(images(), 8) + 3 * mask[:, :, None], 8)
    assert torch.equal(losses(student, teacher, changed)[3], before)
    assert teacher(images(), 0.75, noise(4, 16))[0].shape == (4, 4, 5, 5)    # 4 of 16 patches, the class token


def test_eq3_teacher_is_frozen_and_ends_with_its_last_wanted_block():
    student, teacher = pair((1,))
    loss, _, _, attention_loss = losses(student, teacher)
    (loss + attention_loss).backward()
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert not teacher(images(), 0.75, noise(4, 16))[0].requires_grad
    assert len(teacher.encoder.blocks) == 2 and not teacher.encoder.training


def test_without_a_teacher_it_is_mae():
    student, _ = pair()
    plain = mae.MaskedAutoencoder(vit.VisionTransformer(**SIZES), 24, 1, 3).double()
    plain.load_state_dict({name: x for name, x in student.state_dict().items() if "head_maps" not in name})
    *outputs, attention_loss = student(images(), 0.75, noise(4, 16))
    for a, b in zip(outputs, plain(images(), 0.75, noise(4, 16)), strict=True):
        assert torch.equal(a, b)
    assert attention_loss == 0
    assert distill.MaskedAutoencoder(vit.VisionTransformer(**SIZES))(images(dtype=torch.float32))[3] == 0


# ------------------------------------------------------------ the command line

def save_teacher(path, arch="toy", **sizes):
    torch.manual_seed(1)
    torch.save(vit.ARCHS[arch](**{"img_size": 32, "patch_size": 4, **sizes}).state_dict(), path)
    return path


def loaded(path, *arguments):
    """What `load_teacher` makes of arguments: the teacher's blocks and the student's, both from 0."""
    settings = {**distill.SETTINGS, **distill.TRAINING}
    args = distill.parse(["--teacher", str(path), *arguments], settings, "runs/distill")
    teacher, blocks = distill.load_teacher(args, "cpu")
    return teacher.blocks, blocks


def test_distill_blocks_count_from_1_and_match_by_relative_depth(tmp_path):
    same = save_teacher(tmp_path / "same.pt")
    assert loaded(same) == ([5], [5])    # the last
    assert loaded(same, "--distill-blocks", "2,4") == ([1, 3], [1, 3])
    assert loaded(same, "--distill-blocks", "all") == ([0, 1, 2, 3, 4, 5],) * 2
    deeper = save_teacher(tmp_path / "deeper.pt", depth=12)
    assert loaded(deeper, "--distill-blocks", "1,3,6") == ([1, 5, 11], [0, 2, 5])
    shallower = save_teacher(tmp_path / "shallower.pt", depth=2)
    assert loaded(shallower, "--distill-blocks", "1,6") == ([0, 1], [0, 5])


def test_distill_runs_from_the_command_line_and_both_losses_fall(tmp_path):
    teacher = save_teacher(tmp_path / "teacher.pt")
    text = run("distill.py", "--teacher", teacher, "--fraction", 0.02, "--epochs", 12, "--batch-size", 16,
               "--warmup-epochs", 1, "--max-steps", 40, "--base-lr", 0.012, "--workers", 0, "--out", tmp_path / "out")
    log = log_of(tmp_path / "out")
    assert f"teacher {teacher}: a published file" in text and "step 40 of 123" in text
    assert log[-1]["loss"] < 0.95 * log[0]["loss"] and log[-1]["attention_loss"] < 0.8 * log[0]["attention_loss"]
    assert (tmp_path / "out" / "reconstruction.png").stat().st_size > 20000
    report = vit.load_weights(vit.vit_toy(img_size=32, patch_size=4), tmp_path / "out" / "last.pt")
    assert "head_maps.0" in report.unused and not any("teacher" in name for name in report.unused)


@pytest.mark.parametrize("sizes, arguments, message", [
    (dict(patch_size=8), (), "--patch-size and --img-size must be its own, (8, 32)"),
    (dict(), ("--distill-blocks", "7"), "--distill-blocks: last, all, or of 1, 2, 3, 4, 5, 6"),
    (dict(), ("--distill-blocks", "0"), "--distill-blocks"),
    (dict(), ("--data", ROOT, "--teacher", ""), "--teacher FILE is needed"),
    (None, (), "teacher.pt: cannot be opened")])
def test_a_teacher_that_does_not_fit_is_refused(sizes, arguments, message, tmp_path, capsys):
    if sizes is not None:
        save_teacher(tmp_path / "teacher.pt", **sizes)
    arguments = ("--teacher", tmp_path / "teacher.pt", "--fraction", 0.01, "--batch-size", 24, *arguments)
    assert message in refused(capsys, distill, *arguments, "--out", tmp_path / "out")


def test_a_toy_teacher_is_trained_first_and_sigterm_reaches_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command = [sys.executable, str(ROOT / "distill.py"), "--fraction", "0.01", "--batch-size", "24", "--max-steps", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    teacher, deadline = tmp_path / "runs" / "toy-teacher", time.monotonic() + 120
    while not log_of(teacher):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    text, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and "stopped: the teacher is not finished" in text
    assert not (tmp_path / "runs" / "distill").exists()

    checkpoint = torch.load(teacher / "last.pt", weights_only=True)    # as if it had gone on to the end
    assert 0 < checkpoint["step"] < 768
    checkpoint.update(step=768, log='{"epoch": 12.0}\n')
    torch.save(checkpoint, teacher / "last.pt")
    call(distill, *command[2:])
    assert "teacher runs/toy-teacher/last.pt: step 768 on toy" in capsys.readouterr().out
    assert log_of(tmp_path / "runs" / "distill")[0]["step"] == 1


def test_a_toy_teacher_with_other_settings_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    script = tmp_path / "mae.py"    # what mae.py --resume does with a run of other settings
    script.write_text("raise SystemExit(2)")
    monkeypatch.setattr(distill, "__file__", str(tmp_path / "distill.py"))
    assert "mae.py failed" in refused(capsys, distill, "--out", tmp_path / "out")
