"""distill.py: Sec. 5's attention distillation against published numbers, and what sets it apart from mae.py."""
import difflib

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


def scores(blocks=(2,)):
    """Scores of the golden student and teacher on the visible patches, `(4, 6, 5, 5)` and `(4, 4, 5, 5)`."""
    student, teacher = pair(blocks)
    kept, _, _ = distill.random_masking(student.encoder.embed(images()), 0.75, noise(4, 16))
    return student.encoder.encode(kept, attention=blocks)[1].attention[blocks[0]], teacher(images(), 0.75, noise(4, 16))[0]


def test_losses_and_gradients_are_those_of_the_published_code():
    student, teacher = pair()
    loss, _, _, attention = student(images(), 0.75, noise(4, 16), teacher(images(), 0.75, noise(4, 16)))
    (loss + attention).backward()
    agrees(loss, GOLDEN["L_mae"])
    agrees(attention, GOLDEN["L_attn"])
    agrees(loss + attention, GOLDEN["total"])
    norms = {n.removeprefix("encoder.").replace("head_maps.0", "attn_adapter.weight"): p.grad.norm()
             for n, p in student.named_parameters() if p.requires_grad}
    golden = {n.replace("attn_adapter.conv.weight", "attn_adapter.weight"): g for n, g in GOLDEN["grad_norms"].items()}
    for name, norm in norms.items():
        if name in golden:
            agrees(norm, golden[name])
    assert len(norms.keys() - golden.keys()) <= 1  # the map's own name
    agrees(torch.stack(list(norms.values())).norm(), GOLDEN["grad_total_norm_student_and_adapter"])
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())


def test_eq3_scores_are_pre_softmax_scaled_visible_with_the_class_token():
    student, teacher = scores()
    agrees(student, GOLDEN["student_scores"])
    agrees(teacher, GOLDEN["teacher_scores"])
    head_map = value("attn_adapter", (4, 6, 1, 1))
    agrees(torch.einsum("ts,bsij->btij", head_map.flatten(1), student), GOLDEN["adapted_student_scores"])
    agrees(distill.attention_distillation_loss(student, teacher, head_map), GOLDEN["L_attn"])


def test_eq3_is_told_apart_from_its_wrong_readings():
    student, teacher = scores()
    head_map = value("attn_adapter", (4, 6, 1, 1)).flatten(1)
    loss = lambda s, t, m=head_map: distill.attention_distillation_loss(s, t, m)  # noqa: E731
    mapped = torch.einsum("ts,bsij->btij", head_map, student)
    wrong = {"softmax_then_adapter": loss(student.softmax(-1), teacher.softmax(-1)),
             "adapter_then_softmax": ((mapped.softmax(-1) - teacher.softmax(-1)) ** 2).mean(),
             "presoftmax_without_scale": loss(student * 8 ** 0.5, teacher * 24 ** 0.5),
             "presoftmax_without_cls_row_col": loss(student[..., 1:, 1:], teacher[..., 1:, 1:])}
    for name, number in wrong.items():
        agrees(number, GOLDEN[f"alt_L_attn_{name}"])
        assert abs(number - GOLDEN["L_attn"]) > 0.01


def test_eq3_takes_the_map_as_a_matrix_or_as_a_1x1_convolution():
    student, teacher = scores()
    convolution = torch.nn.Conv2d(6, 4, 1, bias=False).double()
    expected = ((convolution(student) - teacher) ** 2).mean()
    torch.testing.assert_close(distill.attention_distillation_loss(student, teacher, convolution), expected)
    torch.testing.assert_close(distill.attention_distillation_loss(student, teacher, convolution.weight[:, :, 0, 0]), expected)


def test_eq3_distillation_ignores_masked_patches():
    student, teacher = pair()
    _, _, mask, before = student(images(), 0.75, noise(4, 16), teacher(images(), 0.75, noise(4, 16)))
    changed = mae.unpatchify(mae.patchify(images(), 8) + 3 * mask[:, :, None], 8)
    _, _, _, after = student(changed, 0.75, noise(4, 16), teacher(changed, 0.75, noise(4, 16)))
    assert torch.equal(before, after)


def test_without_scores_it_is_mae_itself():
    student, _ = pair()
    plain = mae.MaskedAutoencoder(vit.VisionTransformer(**SIZES), 24, 1, 3).double()
    plain.load_state_dict({name: tensor for name, tensor in student.state_dict().items() if "head_maps" not in name})
    loss, pred, mask, attention = student(images(), 0.75, noise(4, 16))
    for a, b in zip((loss, pred, mask), plain(images(), 0.75, noise(4, 16))):
        assert torch.equal(a, b)
    assert attention == 0


def test_only_distilled_blocks_leave_the_fast_path_and_the_teacher_ends_with_the_last(monkeypatch):
    fast, calls = torch.nn.functional.scaled_dot_product_attention, []
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", lambda *a: calls.append(1) or fast(*a))
    student, teacher = pair((1,))
    targets = teacher(images(), 0.75, noise(4, 16))
    assert len(calls) == 1 and len(teacher.encoder.blocks) == 2           # of 3: one fast, one explicit, one never computed
    student(images(), 0.75, noise(4, 16), targets)
    assert len(calls) == 1 + 2 + 1                                        # two of the encoder's blocks, the decoder's


def test_several_blocks_are_averaged():
    each = []
    for blocks in ((0,), (2,), (0, 2)):
        student, teacher = pair(blocks)
        each.append(student(images(), 0.75, noise(4, 16), teacher(images(), 0.75, noise(4, 16)))[3])
    torch.testing.assert_close(each[2], (each[0] + each[1]) / 2)


def test_the_difference_to_mae_stays_a_lesson():
    """diff mae.py distill.py: about 150 lines that say what distillation adds."""
    a, b = ((ROOT / name).read_text().splitlines() for name in ("mae.py", "distill.py"))
    added = [line for line in difflib.unified_diff(a, b, n=0, lineterm="") if line.startswith("+") and not line.startswith("+++")]
    removed = [line for line in difflib.unified_diff(a, b, n=0, lineterm="") if line.startswith("-") and not line.startswith("---")]
    assert len(added) <= 175 and len(removed) <= 50


# ------------------------------------------------------------------------------------------------ runs

def save_teacher(path, patch_size=4, img_size=32, arch="toy", **kw):
    torch.manual_seed(1)
    torch.save(vit.ARCHS[arch](img_size=img_size, patch_size=patch_size, **kw).state_dict(), path)
    return path


TINY = ("--fraction", 0.01, "--batch-size", 24, "--epochs", 2, "--warmup-epochs", 1, "--log-every", 1)


def test_distill_runs_from_the_command_line_and_both_losses_fall(tmp_path):
    teacher = save_teacher(tmp_path / "teacher.pt")
    out = run("distill.py", "--teacher", teacher, "--fraction", 0.05, "--epochs", 30, "--max-steps", 78, "--batch-size", 16, "--base-lr", 0.012,
              "--out", tmp_path / "out")
    log = log_of(tmp_path / "out")
    assert "stopped, --resume continues: step 78 of 780" in out and {"loss", "attention"} < log[0].keys()
    assert log[-1]["loss"] < 0.8 * log[0]["loss"] and log[-1]["attention"] < 0.5 * log[0]["attention"]
    for name in ("loss.png", "attention.png", "reconstruction.png"):
        assert (tmp_path / "out" / name).stat().st_size > 5000
    report = vit.load_weights(vit.vit_toy(img_size=32, patch_size=4), tmp_path / "out" / "last.pt")  # the student, not the teacher
    assert "head_maps.0" in report.unused and not any("teacher" in name for name in report.unused)
    call(distill, "--reconstruct", tmp_path / "out" / "last.pt", "--out", tmp_path / "again")
    assert (tmp_path / "again" / "reconstruction.png").stat().st_size > 5000


def test_without_a_teacher_mae_trains_one_first(tmp_path, monkeypatch, capsys):
    commands = []

    def train(command, **kw):
        commands.append([str(part) for part in command])
        (tmp_path / "teacher").mkdir()
        save_teacher(tmp_path / "teacher" / "last.pt")
        (tmp_path / "teacher" / "log.jsonl").write_text('{"epoch": 12.0}\n')
    monkeypatch.setattr(distill.subprocess, "run", train)
    call(distill, *TINY, "--max-steps", 1, "--out", tmp_path)
    assert commands[0][1:] == [str(ROOT / "mae.py"), "--out", str(tmp_path / "teacher"), "--resume"]
    assert "no --teacher: mae.py trains a small one first" in capsys.readouterr().out


@pytest.mark.parametrize("asked, student, teacher", [
    ((), [6], [5]), (("2", "4"), [2, 4], [1, 3]), (("all",), [1, 2, 3, 4, 5, 6], [0, 1, 2, 3, 4, 5])])
def test_fig7_blocks_count_from_1_and_the_last_is_the_default(asked, student, teacher, tmp_path):
    args = type("", (), dict(arch="toy", img_size=32, patch_size=4, teacher=str(save_teacher(tmp_path / "t.pt")), teacher_arch=None, teacher_heads=None,
                             distill_blocks=list(asked) or None))
    assert distill.load_teacher(args, 0).blocks == teacher and args.distill_blocks == student


def test_networks_of_different_depth_are_matched_by_relative_depth(tmp_path):
    args = type("", (), dict(arch="toy", img_size=32, patch_size=4, teacher=str(save_teacher(tmp_path / "t.pt", depth=12)),
                             teacher_arch=None, teacher_heads=None, distill_blocks=["1", "3", "6"]))
    assert distill.load_teacher(args, 0).blocks == [1, 5, 11]


@pytest.mark.parametrize("options, extra, message", [
    (dict(patch_size=8), (), "patch size 8, images of 32 px, but the student has 4 and 32"),
    (dict(img_size=64), (), "patch size 4, images of 64 px, but the student has 4 and 32"),
    (dict(num_classes=10), (), "is a classifier (it has head.weight)"),
    (dict(), ("--teacher-arch", "small"), "cls_token: (1, 1, 96) in the file, (1, 1, 384) in the model"),
    (dict(), ("--distill-blocks", 7), "--distill-blocks 7: numbers from 1 to 6, or all"),
    (dict(), ("--distill-blocks", "last"), "--distill-blocks last: numbers from 1 to 6, or all"),
    (None, (), "teacher.pt: cannot be opened (No such file or directory)"),
])
def test_a_teacher_that_cannot_teach_is_refused(options, extra, message, tmp_path, capsys):
    if options is not None:
        save_teacher(tmp_path / "teacher.pt", **options)
    assert message in refused(capsys, distill, *TINY, "--teacher", tmp_path / "teacher.pt", *extra, "--out", tmp_path / "out")


def test_other_data_than_toy_needs_a_teacher(small_folder, tmp_path, capsys):
    assert "--teacher: needed for any data but toy" in refused(capsys, distill, "--data", small_folder, "--out", tmp_path)
