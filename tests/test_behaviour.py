"""What every training script promises alike: exact resumption, ranks, accumulation, bad input.

Tested on mae.py and, where the training loop has a part in it, on the other pre-training scripts; finetune.py has its own.
"""
import os
import shutil
import signal

import numpy as np
import pytest
import torch
from conftest import ROOT, call, fill_disk, finish, killed_and_resumed_equals_uninterrupted, launch, log_of, losses, refused, same_state, start, wait_for_lines

import mae
import vit

SCRIPTS = ["mae", "distill"]        # mocov3.py takes whole batches only: its ranks and epochs are tested in test_mocov3.py
KILLED = [*SCRIPTS, "mocov3"]
TINY = ("--fraction", 0.01, "--batch-size", 24, "--epochs", 3, "--warmup-epochs", 1, "--log-every", 1)  # 82 images, 4 steps an epoch


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """Runs in this process leave out what other tests look at."""
    for script in SCRIPTS:
        for name in ("draw_reconstructions", "draw_curve", "draw_attention"):
            monkeypatch.setattr(__import__(script), name, lambda *a, **kw: None, raising=False)


# ------------------------------------------------------------------------------------------------ exactness

@pytest.mark.parametrize("script", SCRIPTS)
def test_two_ranks_give_the_run_of_one(script, tmp_path, teacher):
    extra = teacher(script)
    call(__import__(script), *TINY, *extra, "--max-steps", 5, "--out", tmp_path / "one")  # step 4 is a partial batch
    finish(launch(script, *TINY, *extra, "--max-steps", 5, "--out", tmp_path / "two", ranks=2))
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=1e-5)
    same_state(tmp_path / "one", tmp_path / "two", tolerance=1e-5)


@pytest.mark.parametrize("script", SCRIPTS)
def test_accumulation_gives_the_run_of_the_big_batch(script, tmp_path, teacher):
    """Also in the last, partial batch of an epoch."""
    extra = teacher(script)
    call(__import__(script), *TINY, *extra, "--max-steps", 5, "--out", tmp_path / "whole")
    call(__import__(script), *TINY, *extra, "--max-steps", 5, "--out", tmp_path / "parts", "--accum", 3)
    same_state(tmp_path / "whole", tmp_path / "parts", tolerance=1e-5)


@pytest.mark.parametrize("script", KILLED)
def test_killed_and_resumed_equals_uninterrupted_bit_for_bit(script, tmp_path, image_folder, teacher):
    """SIGKILL at a moment nobody chose, images decoded by workers."""
    settings = ("--data", image_folder, "--arch", "toy", "--img-size", 32, "--patch-size", 8, "--batch-size", 10, "--epochs", 100,
                "--warmup-epochs", 1, "--log-every", 1, "--workers", 2, *teacher(script, patch=8),
                *(("--knn-images", 0, "--mlp-dim", 64, "--dim", 32) if script == "mocov3" else ()))
    killed_and_resumed_equals_uninterrupted(script, settings, tmp_path)


@pytest.mark.parametrize("script", SCRIPTS)
def test_stopped_and_resumed_in_the_middle_of_an_epoch_sees_no_image_twice(script, tmp_path, teacher):
    extra = teacher(script)
    call(__import__(script), *TINY, *extra, "--out", tmp_path / "whole")
    for _ in range(5):  # the fifth has nothing left to do
        call(__import__(script), *TINY, *extra, "--out", tmp_path / "pieces", "--resume", "--max-steps", 3)
    same_state(tmp_path / "whole", tmp_path / "pieces")
    assert losses(tmp_path / "whole") == losses(tmp_path / "pieces")


def test_sigterm_writes_a_checkpoint_and_exits_0(tmp_path):
    process = start("mae.py", *TINY, "--epochs", 1000, "--out", tmp_path)
    wait_for_lines(process, tmp_path, 2)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    steps = torch.load(tmp_path / "last.pt", weights_only=True)["step"]
    assert process.returncode == 0 and f"stopped, --resume continues: step {steps} of 4000" in out and steps == log_of(tmp_path)[-1]["step"]


def test_a_signal_to_the_whole_process_group_spares_the_workers_and_saves(tmp_path, image_folder):
    """What torchrun, schedulers and Ctrl-C send."""
    process = start("mae.py", "--data", image_folder, "--arch", "toy", "--img-size", 32, "--patch-size", 8, "--batch-size", 12, "--epochs", 1000,
                    "--warmup-epochs", 1, "--log-every", 1, "--workers", 2, "--out", tmp_path, start_new_session=True)
    wait_for_lines(process, tmp_path, 2)
    os.killpg(process.pid, signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and "stopped, --resume continues" in out and (tmp_path / "last.pt").exists(), err


def test_torchrun_runs_it(tmp_path):
    process = start("mae.py", *TINY, "--max-steps", 1, "--out", tmp_path, ranks=2)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0 and "2 ranks x 12 images x 1 accumulation = 24 images" in out, err
    assert out.count("step 1 of") == 1  # one rank speaks


def test_a_finished_run_is_not_lost_to_a_second_one(tmp_path, capsys):
    call(mae, *TINY, "--max-steps", 1, "--out", tmp_path)
    call(mae, *TINY, "--max-steps", 2, "--out", tmp_path)
    assert torch.load(tmp_path / "previous-last.pt", weights_only=True)["step"] == 1 and "previous-last.pt" in capsys.readouterr().out
    call(mae, *TINY, "--max-steps", 1, "--out", tmp_path, "--init", tmp_path / "last.pt")  # read before it is moved


def test_compiled_and_plain_networks_agree():
    torch.manual_seed(0)
    model = mae.MaskedAutoencoder(vit.VisionTransformer(img_size=16, patch_size=4, embed_dim=24, depth=1, num_heads=2), 12, 1, 3)
    inputs = torch.randn(2, 3, 16, 16), 0.75, torch.rand(2, 16)
    plain = model(*inputs)
    model.compile()  # leaves the names in the state dict alone
    for a, b in zip(plain, model(*inputs)):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_mixed_precision_trains(amp, tmp_path):
    call(mae, *TINY, "--max-steps", 3, "--amp", amp, "--out", tmp_path / amp)
    call(mae, *TINY, "--max-steps", 3, "--out", tmp_path / "off")
    np.testing.assert_allclose(losses(tmp_path / amp), losses(tmp_path / "off"), rtol=0.03)


def test_repeated_crops_count_as_images_seen(tmp_path):
    call(mae, *TINY, "--crops-per-image", 4, "--out", tmp_path)
    assert log_of(tmp_path)[-1]["step"] == 3 * 4  # 82 // 4 = 20 decodes an epoch, 6 in each step of 24 crops


# ------------------------------------------------------------------------------------------------ bad input

@pytest.mark.parametrize("arguments, message", [
    (("--data", "nowhere"), "--data nowhere: no such folder"),
    (("--batch-size", 10, "--accum", 4), "--batch-size 10 is not divisible by 4 (ranks x --accum x --crops-per-image): take 8"),
    (("--patch-size", 5), "--patch-size 5 does not divide --img-size 32"),
    (("--mask-ratio", 1), "--mask-ratio 1.0 must be at least 0, below 1"),
    (("--decoder-heads", 5), "--decoder-dim 96 must be divisible by 4 and by --decoder-heads 5"),
    (("--warmup-epochs", 12), "--warmup-epochs 12.0 must be less than --epochs 12"),
    (("--fraction", 0), "--fraction 0.0 must be above 0, at most 1"),
    (("--accum", 0), "--accum 0 must be at least 1"),
    (("--init", "nothing.pt"), "nothing.pt: cannot be opened (No such file or directory)"),
    (("--reconstruct", "nothing.pt"), "--reconstruct nothing.pt: not a checkpoint"),
])
def test_bad_arguments_are_named_in_one_line(arguments, message, tmp_path, capsys):
    assert message in refused(capsys, mae, "--out", tmp_path, *arguments)


def test_bad_input_leaves_with_exit_code_2_from_the_shell(tmp_path):
    process = start("mae.py", "--data", "nowhere", "--out", tmp_path)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 2 and out == "" and err.startswith("error: --data nowhere") and err.count("\n") == 1


def test_a_folder_without_images_is_named(tmp_path, capsys):
    (tmp_path / "train").mkdir()
    assert f"--data {tmp_path}/train: no images" in refused(capsys, mae, "--data", tmp_path, "--out", tmp_path / "out")


def test_classes_that_differ_between_splits_are_named(image_folder, tmp_path, capsys):
    shutil.copytree(image_folder, tmp_path / "data")
    (tmp_path / "data" / "val" / "bus").rename(tmp_path / "data" / "val" / "zebra")
    assert "other classes than the training images, first bus" in refused(capsys, mae, "--data", tmp_path / "data", "--out", tmp_path)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_truncated_jpeg_is_named(image_folder, tmp_path, workers, capsys):
    shutil.copytree(image_folder, tmp_path / "data")
    broken = tmp_path / "data" / "train" / "boat" / "7.jpg"
    broken.write_bytes(broken.read_bytes()[:500])
    message = refused(capsys, mae, "--data", tmp_path / "data", "--out", tmp_path / "out", "--arch", "toy", "--img-size", 32, "--epochs", 1,
                      "--patch-size", 8, "--batch-size", 12, "--warmup-epochs", 0, "--workers", workers)
    assert message == f"error: {broken}: unreadable image (Image is incomplete or truncated)"


def test_small_images_of_different_sizes_are_named(tmp_path, capsys):
    from PIL import Image
    for side in (16, 20):
        Image.new("RGB", (side, side)).save(tmp_path / f"{side}.png")
    assert "small images must have one size, found (3, 16, 16) and (3, 20, 20)" in refused(capsys, mae, "--data", tmp_path)


def test_another_runs_checkpoint_is_not_resumed(tmp_path, capsys):
    call(mae, *TINY, "--max-steps", 1, "--out", tmp_path)
    assert "was trained with seed = 0, now it is 1" in refused(capsys, mae, *TINY, "--seed", 1, "--out", tmp_path, "--resume")
    state = torch.load(tmp_path / "last.pt", weights_only=True)
    torch.save({**state, "config": {**state["config"], "method": "mocov3"}}, tmp_path / "last.pt")
    assert "was trained with method = mocov3, now it is mae" in refused(capsys, mae, *TINY, "--out", tmp_path, "--resume")
    (tmp_path / "last.pt").write_text("hello")
    assert "last.pt: not a checkpoint to resume from" in refused(capsys, mae, *TINY, "--out", tmp_path, "--resume")


def test_weights_of_another_architecture_are_named(tmp_path, capsys):
    torch.save(vit.vit_tiny(img_size=32, patch_size=4).state_dict(), tmp_path / "tiny.pt")
    message = refused(capsys, mae, *TINY, "--init", tmp_path / "tiny.pt", "--out", tmp_path)
    assert "cls_token: (1, 1, 192) in the file, (1, 1, 96) in the model" in message


def test_reconstructing_with_the_wrong_decoder_is_refused(tmp_path, capsys):
    call(mae, *TINY, "--max-steps", 1, "--out", tmp_path)
    message = refused(capsys, mae, "--reconstruct", tmp_path / "last.pt", "--decoder-depth", 2, "--out", tmp_path)
    assert "does not fit --arch and the decoder's arguments, first at decoder_blocks.1" in message


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, capsys, monkeypatch):
    call(mae, *TINY, "--max-steps", 4, "--out", tmp_path)
    before = (tmp_path / "last.pt").read_bytes()
    fill_disk(monkeypatch)
    message = refused(capsys, mae, *TINY, "--resume", "--out", tmp_path)
    assert "last.pt: cannot be written, disk full? ([Errno 28] No space left on device)" in message
    assert (tmp_path / "last.pt").read_bytes() == before and not (tmp_path / "last.pt.tmp").exists()


def test_a_nan_stops_all_ranks_before_the_update(tmp_path):
    """One rank's image turns to NaN at step 7; the checkpoint of step 4 stays."""
    call(mae, *TINY, "--max-steps", 4, "--out", tmp_path)
    before = (tmp_path / "last.pt").read_bytes()
    finish(launch("mae", *TINY, "--out", tmp_path, "--resume", ranks=2, break_at_step=6, errors=tmp_path / "errors"), code=2)
    errors = (tmp_path / "errors").read_text()
    assert errors.count("error: step 7: the loss is nan") == errors.count("stopped before the update") == 2, errors
    assert (tmp_path / "last.pt").read_bytes() == before


def test_a_gradient_that_is_not_finite_stops_the_run_before_the_update(tmp_path, capsys, monkeypatch):
    call(mae, *TINY, "--max-steps", 4, "--out", tmp_path)
    before = (tmp_path / "last.pt").read_bytes()
    monkeypatch.setattr(mae.nn.utils, "clip_grad_norm_", lambda *a: torch.tensor(float("inf")))
    assert "step 5: the loss is 1" in (line := refused(capsys, mae, *TINY, "--resume", "--out", tmp_path)) and "its gradient inf long" in line
    assert (tmp_path / "last.pt").read_bytes() == before


def test_the_project_depends_on_six_packages():
    lines = [line.split(">")[0] for line in (ROOT / "requirements.txt").read_text().split()]
    assert sorted(lines) == ["matplotlib", "numpy", "pytest", "torch", "torchvision", "tqdm"]
