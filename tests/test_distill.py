"""distill.py: attention distillation (Sec. 5), and what sets it apart from mae.py."""
import argparse

import pytest
import torch
from conftest import (
    GOLDENS, SIZES, TEACHER, agrees, call, fill, images, log_of, noise, refused, value)

import distill
import mae
import vit

GOLDEN = GOLDENS["4_distill"]


def pair(layers=(2,)):
    """The golden student, with a head map per distilled block, and teacher."""
    student = distill.MaskedAutoencoder(
        vit.VisionTransformer(**SIZES), 24, 1, 3, layers=layers, teacher_heads=4)
    fill(student, rename=lambda name: name.removeprefix("encoder."))
    for head_map in student.head_maps:
        head_map.weight.data = value("attn_adapter", (4, 6, 1, 1)).flatten(1)
    teacher = fill(vit.VisionTransformer(**TEACHER, global_pool="token"), prefix="teacher.")
    return student, distill.Teacher(teacher, list(layers))


def losses(student, teacher, x=None):
    """loss, pred, mask, attention_loss on the golden images, or on x."""
    x = images() if x is None else x
    return student(x, 0.75, noise(4, 16), teacher(x, 0.75, noise(4, 16)))


def scores():
    """Scores on the visible patches: of the student `(4, 6, 5, 5)`, the teacher `(4, 4, 5, 5)`."""
    student, teacher = pair()
    kept, _, _ = distill.random_masking(student.encoder.embed(images()), 0.75, noise(4, 16))
    states = list(student.encoder.states(kept))
    block = student.encoder.blocks[2]
    return block.attn.scores(block.norm1(states[2])), teacher(images(), 0.75, noise(4, 16))[0]


# ------------------------------------------------------------ Eq. 3

def test_eq3_losses_and_gradients_are_the_published_ones():
    student, teacher = pair()
    loss, _, _, attention_loss = losses(student, teacher)
    (loss + attention_loss).backward()
    agrees(loss, GOLDEN["L_mae"])
    agrees(attention_loss, GOLDEN["L_attn"])
    agrees(loss + attention_loss, GOLDEN["total"])
    norms = {name.removeprefix("encoder."): p.grad.norm()
             for name, p in student.named_parameters() if p.requires_grad}
    norms["attn_adapter.adapter2.weight"] = norms.pop("head_maps.0.weight")
    assert norms.keys() == GOLDEN["grad_norms"].keys()
    for name, norm in GOLDEN["grad_norms"].items():
        agrees(norms[name], norm)
    agrees(torch.stack(list(norms.values())).norm(), GOLDEN["grad_total_norm_student_and_adapter"])


def test_eq3_scores_are_pre_softmax_scaled_and_with_the_class_token():
    student, teacher = scores()
    agrees(student, GOLDEN["student_scores"])
    agrees(teacher, GOLDEN["teacher_scores"])
    head_map = value("attn_adapter", (4, 6, 1, 1)).flatten(1)
    mapped = torch.einsum("ts,bsij->btij", head_map, student)
    agrees(mapped, GOLDEN["adapted_student_scores"])
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
        "presoftmax_without_cls_row_col": loss(
            student[..., 1:, 1:], teacher[..., 1:, 1:], head_map)}
    for name, number in wrong.items():
        agrees(number, GOLDEN[f"alt_L_attn_{name}"])
        assert abs(number - GOLDEN["L_attn"]) > 0.01


def test_eq3_head_map_is_a_matrix_or_a_linear_layer():
    student, teacher = scores()
    linear = torch.nn.Linear(6, 4, bias=False).double()
    mapped = linear(student.transpose(1, 3)).transpose(1, 3)
    expected = ((mapped - teacher) ** 2).mean()
    for head_map in (linear, linear.weight):
        loss = distill.attention_distillation_loss(student, teacher, head_map)
        torch.testing.assert_close(loss, expected, atol=0, rtol=1e-6)


def test_head_map_may_be_a_1x1_convolution():
    student, teacher = scores()
    convolution = torch.nn.Conv2d(6, 4, 1, bias=False).double()
    expected = ((convolution(student) - teacher) ** 2).mean()
    for head_map in (convolution, convolution.weight):
        loss = distill.attention_distillation_loss(student, teacher, head_map)
        torch.testing.assert_close(loss, expected)


def test_eq3_is_computed_in_float32_under_bf16():
    student, teacher = [x.float() for x in scores()]
    head_map = value("attn_adapter", (4, 6, 1, 1)).flatten(1).float()
    with torch.autocast("cpu", torch.bfloat16):
        loss = distill.attention_distillation_loss(student, teacher, head_map)
    agrees(loss, GOLDEN["L_attn"], 1e-4)
    assert loss.dtype in (torch.float32, torch.float64)
    low = student.bfloat16()
    losses = [distill.attention_distillation_loss(x, teacher, head_map) for x in (low, low.float())]
    torch.testing.assert_close(*losses, atol=0, rtol=1e-6)


def test_eq3_the_losses_of_several_blocks_are_summed():
    first, last, both = [losses(*pair(layers))[3] for layers in ((0,), (2,), (0, 2))]
    torch.testing.assert_close(both, first + last)


# ------------------------------------------------------------ student and teacher

def test_eq3_teacher_sees_the_visible_patches_only():
    student, teacher = pair()
    _, _, mask, before = losses(student, teacher)
    changed = mae.unpatchify(mae.patchify(images(), 8) + 3 * mask[:, :, None], 8)
    assert torch.equal(losses(student, teacher, changed)[3], before)
    for ratio, tokens in ((0.75, 5), (0.5, 9)):  # of 16 patches; the class token
        shape = teacher(images(), ratio, noise(4, 16))[0].shape
        assert shape == (4, 4, tokens, tokens)


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
    plain.load_state_dict(
        {name: x for name, x in student.state_dict().items() if "head_maps" not in name})
    *outputs, attention_loss = student(images(), 0.75, noise(4, 16))
    for a, b in zip(outputs, plain(images(), 0.75, noise(4, 16)), strict=True):
        assert torch.equal(a, b)
    assert attention_loss == 0
    student = distill.MaskedAutoencoder(vit.VisionTransformer(**SIZES))
    assert student(images(dtype=torch.float32))[3] == 0


# ------------------------------------------------------------ the command line

def save_teacher(path, arch="toy", **sizes):
    torch.manual_seed(1)
    torch.save(vit.ARCHS[arch](**{"img_size": 32, "patch_size": 4, **sizes}).state_dict(), path)
    return path


def loaded(path, *arguments):
    """What `load_teacher` makes of arguments: the teacher's blocks and the student's, from 0."""
    argv = ["--teacher", str(path), *arguments]
    args = distill.parse(argv, distill.settings, distill.PRESETS, out="")
    teacher, heads, layers = distill.load_teacher(args, "cpu")
    assert heads == 12
    return teacher.layers, layers


def test_distill_blocks_count_from_1_and_match_by_relative_depth(tmp_path):
    same = save_teacher(tmp_path / "same.pt")
    assert loaded(same) == ([5], [5])  # the last
    assert loaded(same, "--distill-blocks", "2,4") == ([1, 3], [1, 3])
    assert loaded(same, "--distill-blocks", "all") == ([0, 1, 2, 3, 4, 5],) * 2
    deeper = save_teacher(tmp_path / "deeper.pt", depth=12)
    assert loaded(deeper, "--distill-blocks", "1,3,6") == ([1, 5, 11], [0, 2, 5])
    shallower = save_teacher(tmp_path / "shallower.pt", depth=2)
    assert loaded(shallower, "--distill-blocks", "1,6") == ([0, 1], [0, 5])


def test_distill_learns_and_both_losses_fall(tmp_path, capsys):
    teacher = save_teacher(tmp_path / "teacher.pt")
    call(distill, "--teacher", teacher, "--fraction", 0.02, "--epochs", 12, "--batch-size", 16,
         "--warmup-epochs", 1, "--max-steps", 40, "--base-lr", 0.012, "--workers", 0,
         "--out", tmp_path / "out")
    text = capsys.readouterr().out
    log = log_of(tmp_path / "out")
    assert f"--teacher {teacher}: randomly initialized: nothing" in text
    assert "step 40 of 123" in text
    assert log[-1]["loss"] < 0.95 * log[0]["loss"]
    assert log[-1]["attention_loss"] < 0.8 * log[0]["attention_loss"]
    assert (tmp_path / "out" / "attention.png").stat().st_size > 20000
    student = vit.vit_toy(img_size=32, patch_size=4)
    report = vit.load_weights(student, tmp_path / "out" / "last.pt")
    assert "head_maps.0.weight" in report.unused
    assert not any("teacher" in name for name in report.unused)


def test_distill_resumes_with_the_teacher_of_the_run(tmp_path, capsys):
    tiny = "--fraction", 0.01, "--batch-size", 24, "--max-steps", 1, "--out", tmp_path / "out"
    call(distill, *tiny, "--teacher", save_teacher(tmp_path / "teacher.pt"))
    call(distill, "--resume", *tiny)
    assert "step 2 of 20" in capsys.readouterr().out
    moved = (tmp_path / "teacher.pt").rename(tmp_path / "moved.pt")
    assert "teacher.pt: not a PyTorch checkpoint" in refused(capsys, distill, "--resume", *tiny)
    call(distill, "--resume", *tiny, "--teacher", moved)
    assert "step 3 of 20" in capsys.readouterr().out


def test_attention_weight_scales_the_attention_loss_only(tmp_path):
    teacher = save_teacher(tmp_path / "teacher.pt")
    for weight in (0, 1):
        call(distill, "--teacher", teacher, "--fraction", 0.01, "--batch-size", 24, "--max-steps",
             1, "--attn-weight", weight, "--out", tmp_path / str(weight))
    without, with_teacher = [log_of(tmp_path / weight)[0] for weight in "01"]
    assert without["loss"] == with_teacher["loss"]
    assert without["attention_loss"] == with_teacher["attention_loss"]
    assert without["grad_norm"] < with_teacher["grad_norm"]


@pytest.mark.parametrize("sizes, arguments, message", [
    (dict(patch_size=8), (), "patch_embed.proj.weight: (96, 3, 8, 8) in the file, (96, 3, 4, 4)"),
    (dict(), ("--distill-blocks", "7"), "--distill-blocks 7: last, all, or 1 to 6"),
    (dict(), ("--distill-blocks", "0"), "--distill-blocks 0"),
    (dict(), ("--distill-blocks", "one"), "--distill-blocks one"),
    (dict(), ("--teacher", ""), "--teacher FILE"),
    (dict(num_heads=8), ("--teacher-heads", 5), "width 96 is not divisible by 5 heads"),
    (None, (), "teacher.pt: not a PyTorch checkpoint")])
def test_a_teacher_that_does_not_fit_is_refused(sizes, arguments, message, tmp_path, capsys):
    if sizes is not None:
        save_teacher(tmp_path / "teacher.pt", **sizes)
    arguments = ("--fraction", 0.01, "--batch-size", 24, "--out", tmp_path / "out",
                 "--teacher", tmp_path / "teacher.pt", *arguments)
    assert message in refused(capsys, distill, *arguments)
    assert not (tmp_path / "out").exists()


def test_without_a_teacher_a_new_run_is_refused(tmp_path, capsys):
    for arguments in ((), ("--resume",)):
        message = refused(capsys, distill, *arguments, "--out", tmp_path / "out")
        assert message.startswith("--teacher FILE: give a pre-trained network")


def test_a_teacher_for_images_of_another_size_sees_as_many_patches(tmp_path):
    teacher = save_teacher(tmp_path / "teacher.pt", img_size=16)
    call(distill, "--teacher", teacher, "--fraction", 0.01, "--batch-size", 24, "--max-steps", 1,
         "--out", tmp_path / "out")
    assert log_of(tmp_path / "out")[0]["attention_loss"] > 0


# ------------------------------------------------------------ the figure

def test_figure_shows_the_attention_that_its_rows_name(tmp_path, monkeypatch):
    student, teacher = [network.float() for network in pair((1,))]
    figures = []
    monkeypatch.setattr(distill.Figure, "savefig", lambda figure, path: figures.append(figure))
    examples = torch.randint(256, (3, 3, 32, 32), dtype=torch.uint8)
    args = argparse.Namespace(data="toy", img_size=32, patch_size=8, out=tmp_path)
    distill.draw_attention(args, student, teacher, examples, vit.MEAN, vit.STD)
    axis, = figures[0].axes
    assert axis.get_title().startswith("Distilled MAE on toy")
    names = [label.get_text() for label in axis.get_yticklabels()]
    assert names == ["image", "teacher", "M student", "student"]

    pixels = axis.images[0].get_array()  # cells of 32 pixels, with 2 between them
    assert (pixels[2:34, 36:68] == examples[1].permute(1, 2, 0).numpy()).all()
    inputs = (examples - vit.MEAN) / vit.STD
    block = student.encoder.blocks[1]
    states = list(student.encoder.states(student.encoder.embed(inputs)))
    scores = block.attn.scores(block.norm1(states[1]))
    mapped = torch.einsum("ts,bsij->btij", student.head_maps[0].weight, scores)
    own = teacher(inputs, 0, torch.arange(16.0).expand(3, -1))[0]  # all patches, in their order
    for row, expected in enumerate((own, mapped, scores), 1):
        attention = expected.softmax(dim=-1)[1, :, 0, 1:].mean(dim=0)  # of the second image
        shares = (attention / attention.max()).view(4, 4)
        top = 2 + 34 * row
        shown = torch.from_numpy(pixels[top + 4:top + 32:8, 40:68:8].astype(int))
        for color in range(3):
            assert (shown[:, :, color] - 255 * shares).abs().max() <= 1.01
