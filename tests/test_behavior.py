"""What every training script promises: exact resumption, ranks, accumulation, signals, bad input.

Ranks and kills are tested on all scripts; what the plumbing does alone, on mae.py.
"""
import errno
import importlib
import os
import shutil
import signal
import time

import numpy as np
import pytest
import torch
from conftest import FORKS, SCRIPTS, begin, call, finish, free_port, log_of, refused, run, same_state

import mae
import vit

TINY = ("--fraction", 0.01, "--batch-size", 24, "--epochs", 6, "--log-every", 1)    # 82 images, 20 steps
TOY_NETWORK = ("--arch", "toy", "--img-size", 32, "--patch-size", 8)
EXTRA = {  # what a script needs beside TINY
    "mocov3": ("--mlp-dim", 64, "--dim", 32),
    "dino": ("--hidden-dim", 64, "--out-dim", 32),
    "finetune": ("--warmup-epochs", 1, "--eval-every", 2, "--mixup", 0, "--randaug", 9),
}


def forked(script, arguments, rank, ranks, port, errors):
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)    # a shell's background jobs ignore it
    module = importlib.import_module(script)
    module.RANK, module.WORLD = rank, ranks
    for name in vars(module).copy():        # figures, which take most of a short run, are tested elsewhere
        if name.startswith("draw_") and name != "draw_shapes":
            setattr(module, name, lambda *args, **kw: None)
    module.run(lambda: module.main(arguments))


def launch(script, *arguments, ranks=1, last_rank=(), errors=os.devnull):
    """Starts a script's `main` in processes, as torchrun would; `last_rank`: its further arguments; a file for stderr."""
    port, processes = free_port(), []
    for rank in range(ranks):
        own = [str(argument) for argument in (*arguments, *(last_rank if rank == ranks - 1 else ()))]
        processes.append(FORKS.Process(target=forked, args=(script, own, rank, ranks, port, str(errors))))
    for process in processes:
        process.start()
    return processes


def wait_for(condition, process):
    """Waits until something is true of a running process."""
    deadline = time.monotonic() + 120
    while not condition():
        assert process.exitcode is None if hasattr(process, "exitcode") else process.poll() is None, "ended too early"
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def settings(tmp_path):
    """The arguments of a short toy run of a script."""
    def make(script):
        if script == "detect":
            return "--batch-size", 2, "--max-steps", 4, "--log-every", 1, "--scenes", 40, "--val-scenes", 2
        extra = EXTRA.get(script, ())
        if script == "distill":
            torch.manual_seed(1)
            torch.save(vit.vit_toy(img_size=32, patch_size=4).state_dict(), tmp_path / "teacher.pt")
            extra = "--teacher", tmp_path / "teacher.pt"
        return *TINY, *extra
    return make


@pytest.fixture(autouse=True)
def no_figures(monkeypatch):
    """Runs in this process leave out the figures that other tests look at."""
    monkeypatch.setattr(mae, "draw_reconstructions", lambda *args: None)


# ------------------------------------------------------------ exactness

@pytest.mark.parametrize("script", [name for name in SCRIPTS if name != "detect"])    # detect.py says why
def test_two_ranks_give_the_run_of_one(script, tmp_path, settings):
    shared = (*settings(script), "--max-steps", 4)
    accum = () if script in ("mocov3", "dino") else ("--accum", 3)
    finish(launch(script, *shared, "--out", tmp_path / "one"))
    finish(launch(script, *shared, *accum, "--workers", 2, "--out", tmp_path / "two", ranks=2))
    one, two = ([entry["loss"] for entry in log_of(tmp_path / x) if "loss" in entry] for x in ("one", "two"))
    np.testing.assert_allclose(two, one, rtol=1e-4)
    same_state(tmp_path / "one", tmp_path / "two", tolerance=2e-5)


@pytest.mark.parametrize("script", SCRIPTS)
def test_killed_and_resumed_equals_uninterrupted_bit_for_bit(script, tmp_path, settings):
    """SIGKILL at a random moment, of a run too long to end before; then a few steps more, against one run."""
    shared = (*settings(script), "--epochs", 1000, "--save-minutes", 0)
    process, = launch(script, *shared, "--max-steps", 10 ** 6, "--workers", 2, "--out", tmp_path / "killed")
    wait_for((tmp_path / "killed" / "last.pt").exists, process)
    process.join(np.random.default_rng().uniform(0, 0.3))
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    done = torch.load(tmp_path / "killed" / "last.pt", weights_only=True)["step"]
    resumed = launch(script, *shared, "--out", tmp_path / "killed", "--resume", "--max-steps", 3)
    finish(resumed + launch(script, *shared, "--out", tmp_path / "whole", "--max-steps", done + 3))
    same_state(tmp_path / "whole", tmp_path / "killed")
    whole, killed = ([(entry["step"], entry.get("loss")) for entry in log_of(tmp_path / x)] for x in ("whole", "killed"))
    assert whole == killed and whole[-1][0] == done + 3


def test_resume_in_pieces_equals_one_run(tmp_path, capsys):
    call(mae, *TINY, "--out", tmp_path / "whole")
    for _ in range(5):    # the fifth finds a finished run
        call(mae, *TINY, "--out", tmp_path / "pieces", "--resume", "--max-steps", 5)
    same_state(tmp_path / "whole", tmp_path / "pieces")
    assert len(log_of(tmp_path / "pieces")) == 20 and "done: step 20 of 20" in capsys.readouterr().out


def test_resume_on_two_nodes_without_a_shared_disk_reads_rank_0s_checkpoint(tmp_path):
    call(mae, *TINY, "--max-steps", 5, "--out", tmp_path / "whole")
    call(mae, *TINY, "--max-steps", 3, "--out", tmp_path / "a")
    nodes = launch("mae", *TINY, "--resume", "--max-steps", 2, "--out", tmp_path / "a", ranks=2,
                   last_rank=("--out", tmp_path / "b"))
    finish(nodes)
    same_state(tmp_path / "whole", tmp_path / "a", tolerance=1e-5)
    assert not (tmp_path / "b").exists()


def test_ranks_with_other_images_are_refused(image_folder, tmp_path):
    shutil.copytree(image_folder, tmp_path / "other")
    (tmp_path / "other" / "train" / "bus" / "0.jpg").rename(tmp_path / "other" / "train" / "bus" / "new.jpg")
    ranks = launch("mae", *TOY_NETWORK, "--data", image_folder, "--batch-size", 6, "--epochs", 2, "--warmup-epochs", 0,
                   "--out", tmp_path / "out", ranks=2, last_rank=("--data", tmp_path / "other"), errors=tmp_path / "errors")
    ranks[1].join(60)
    ranks[0].kill()
    assert ranks[1].exitcode == 2 and "rank 1 has other images than rank 0" in (tmp_path / "errors").read_text()


def test_torchrun_trains_two_ranks_in_mae(tmp_path):
    out = run("mae.py", *TINY, "--max-steps", 1, "--out", tmp_path, ranks=2)
    assert "batch: 2 ranks x 12 images x 1 accum = 24" in out and out.count("step 1 of 20") == 1    # one rank prints


def test_mixed_precision_trains_close_to_float32(tmp_path):
    for amp in ("off", "bf16", "fp16"):
        call(mae, *TINY, "--max-steps", 3, "--amp", amp, "--out", tmp_path / amp)
    losses = {amp: [entry["loss"] for entry in log_of(tmp_path / amp)] for amp in ("off", "bf16", "fp16")}
    np.testing.assert_allclose(losses["bf16"], losses["off"], rtol=0.03)
    np.testing.assert_allclose(losses["fp16"], losses["off"], rtol=0.03)


def test_crops_per_image_count_as_images_of_an_epoch(tmp_path):
    call(mae, *TINY, "--epochs", 3, "--crops-per-image", 4, "--out", tmp_path)
    assert log_of(tmp_path)[-1]["step"] == round(3 * 82 / 24)


# ------------------------------------------------------------ a run is never lost

def test_out_that_contains_a_run_is_renamed(tmp_path, capsys):
    for steps in (1, 2, 3):
        call(mae, *TINY, "--max-steps", steps, "--out", tmp_path / "run")
    for name, steps in (("run-1", 1), ("run-2", 2), ("run", 3)):
        assert torch.load(tmp_path / name / "last.pt", weights_only=True)["step"] == steps
    assert "already contains a run: renamed to " in capsys.readouterr().out
    call(mae, *TINY, "--max-steps", 1, "--out", tmp_path / "run", "--init", tmp_path / "run" / "last.pt")
    (tmp_path / "run" / "config.json").unlink()
    call(mae, *TINY, "--max-steps", 1, "--out", tmp_path / "run")
    assert (tmp_path / "run-4" / "last.pt").exists()


def test_full_disk_leaves_the_last_checkpoint(tmp_path, capsys, monkeypatch):
    call(mae, *TINY, "--max-steps", 2, "--out", tmp_path)
    before = (tmp_path / "last.pt").read_bytes()

    def full(state, file):
        file.write(b"half a checkpoint")
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(torch, "save", full)
    message = refused(capsys, mae, *TINY, "--resume", "--out", tmp_path)
    assert "last.pt: cannot be written" in message and "No space left on device" in message
    assert (tmp_path / "last.pt").read_bytes() == before and not (tmp_path / "last.pt.tmp").exists()


@pytest.mark.parametrize("script", [name for name in ("mae", "finetune") if name in SCRIPTS])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_signals_write_a_checkpoint_and_exit_0_however_often_they_come(script, number, tmp_path, settings):
    process, = launch(script, *settings(script), "--epochs", 1000, "--workers", 2, "--out", tmp_path)
    wait_for(lambda: len(log_of(tmp_path)) > 1, process)
    for _ in range(3):
        os.kill(process.pid, number)
    finish([process])
    assert torch.load(tmp_path / "last.pt", weights_only=True)["step"] == log_of(tmp_path)[-1]["step"]


def test_signal_to_the_process_group_spares_the_workers_and_saves(tmp_path):
    """What torchrun, schedulers and Ctrl-C send."""
    process = begin("mae.py", *TINY, "--epochs", 1000, "--workers", 2, "--out", tmp_path, start_new_session=True)
    wait_for(lambda: len(log_of(tmp_path)) > 1, process)
    os.killpg(process.pid, signal.SIGTERM)
    os.killpg(process.pid, signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and "stopped, --resume continues" in out and (tmp_path / "last.pt").exists(), err


def test_nohup_keeps_hangups_ignored(tmp_path, monkeypatch):
    seen, before = [], signal.signal(signal.SIGHUP, signal.SIG_IGN)
    monkeypatch.setattr(mae, "draw_reconstructions", lambda *args: seen.append(signal.getsignal(signal.SIGHUP)))
    call(mae, *TINY, "--max-steps", 1, "--out", tmp_path)
    signal.signal(signal.SIGHUP, before)
    assert seen == [signal.SIG_IGN]


# ------------------------------------------------------------ numbers that are not finite

def test_loss_that_is_not_finite_ends_the_run_before_anything_bad_is_saved(tmp_path, capsys):
    message = refused(capsys, mae, *TINY, "--base-lr", 1e12, "--log-every", 2, "--save-minutes", 0, "--out", tmp_path)
    assert "loss or gradient is not finite, last.pt is unchanged" in message and "error: step " in message
    if (tmp_path / "last.pt").exists():
        state = torch.load(tmp_path / "last.pt", weights_only=True)
        assert all(tensor.isfinite().all() for tensor in state["model"].values())


def test_log_names_the_first_bad_step_of_the_window(tmp_path):
    args = mae.parse(["--amp", "off", "--out", str(tmp_path)], {**mae.SETTINGS, **mae.TRAINING}, out="")
    log = mae.Log(args, 0, 10)
    for loss in (1.0, 1.0, float("nan"), 1.0, float("inf")):
        log.window.append({"loss": torch.tensor(loss), "grad_norm": torch.tensor(1.0)})
    with pytest.raises(mae.UserError, match="step 13: loss or gradient is not finite"):
        log.write(15, set())


def test_log_leaves_out_what_fp16_skips_but_not_a_bad_loss(tmp_path):
    args = mae.parse(["--amp", "fp16", "--out", str(tmp_path)], {**mae.SETTINGS, **mae.TRAINING}, out="")
    log = mae.Log(args, 0, 10)
    for loss, norm in ((1.0, 2.0), (5.0, float("inf")), (3.0, 4.0)):
        log.window.append({"loss": torch.tensor(loss), "grad_norm": torch.tensor(norm)})
    assert log.write(3, set()) is False
    entry, = log_of(tmp_path)
    assert (entry["loss"], entry["grad_norm"]) == (2, 3)
    log.window.append({"loss": torch.tensor(float("nan")), "grad_norm": torch.tensor(1.0)})
    with pytest.raises(mae.UserError, match="step 4"):
        log.write(4, set())


def test_save_refuses_a_weight_that_is_not_finite(tmp_path):
    args = mae.parse(["--out", str(tmp_path)], {**mae.SETTINGS, **mae.TRAINING}, out="")
    (tmp_path / "log.jsonl").write_text("")
    model = torch.nn.Linear(2, 2)
    model.weight.data[0, 0] = float("inf")
    with pytest.raises(mae.UserError, match="step 7: a weight is not finite"):
        mae.save(args, "last.pt", 7, model=model)
    assert not (tmp_path / "last.pt").exists()


def test_nan_on_one_of_two_ranks_stops_both_and_names_the_step(tmp_path):
    script = tmp_path / "nan_on_rank_1.py"
    script.write_text("import sys\nsys.path.insert(0, sys.argv.pop(1))\nimport mae\n"
                      "forward = mae.MaskedAutoencoder.forward\ncalls = []\n"
                      "def broken(self, *args):\n"
                      "    calls.append(1)\n"
                      "    loss, pred, mask = forward(self, *args)\n"
                      "    return loss * (float('nan') if mae.RANK == 1 and len(calls) == 3 else 1), pred, mask\n"
                      "mae.MaskedAutoencoder.forward = broken\nmae.run(mae.main)\n")
    out = run(script, mae.__file__.rsplit(os.sep, 1)[0], *TINY, "--log-every", 5, "--out", tmp_path / "out", ranks=2, code=1)
    assert "error: step 3: loss or gradient is not finite" in out and not (tmp_path / "out" / "last.pt").exists()


# ------------------------------------------------------------ bad input: one line, exit code 2

@pytest.mark.parametrize("arguments, message", [
    (("--data", "nowhere"), "--data nowhere: no such folder, nor one of: toy cifar10"),
    (("--data", "cifar10", "--root", "nowhere"), "--data cifar10: not in --root nowhere; --download fetches it"),
    (("--batch-size", 10, "--accum", 4), "--batch-size 10: must be a multiple of 4, ranks x accum x crops"),
    (("--patch-size", 5), "patch size 5 does not divide image size 32"),
    (("--decoder-heads", 5), "5 heads"),
    (("--warmup-epochs", 12), "--warmup-epochs 12.0 must be less than --epochs 12"),
    (("--mask-ratio", 1), "--mask-ratio 1.0 is not from 0 to 0.99"),
    (("--base-lr", -1), "--base-lr -1.0 is not from 0"),
    (("--weight-decay", -0.1), "--weight-decay -0.1 is not from 0 to 1"),
    (("--clip-grad", -1), "--clip-grad -1.0 is not from"),
    (("--fraction", "nan"), "--fraction nan is not from"),
    (("--min-crop", 2), "--min-crop 2.0 is not from 0 to 1"),
    (("--decoder-dim", 0), "--decoder-dim 0 is not from 4"),
    (("--workers", -1), "--workers -1 is not from 0"),
    (("--epochs", "many"), "--epochs: invalid int value: 'many'"),
    (("--arch", "huge"), "--arch: invalid choice: 'huge'"),
    (("--no-such", 1), "unrecognized arguments: --no-such"),
    (("--init", "nothing.pt"), "nothing.pt"),
])
def test_bad_arguments_are_named_in_one_line(arguments, message, tmp_path, capsys):
    assert message in refused(capsys, mae, "--out", tmp_path / "out", *arguments)


def test_bad_input_from_the_shell_exits_with_2(tmp_path):
    out = run("mae.py", "--data", "nowhere", "--out", tmp_path, code=2)
    assert "error: --data nowhere" in out and "Traceback" not in out


def test_resume_refuses_another_setting_or_file(tmp_path, capsys):
    call(mae, *TINY, "--max-steps", 1, "--out", tmp_path)
    assert "last.pt: seed was 0, now it is 1" in refused(capsys, mae, *TINY, "--seed", 1, "--out", tmp_path, "--resume")
    call(mae, *TINY, "--max-steps", 1, "--out", tmp_path, "--resume", "--accum", 2, "--workers", 1, "--log-every", 3)
    (tmp_path / "last.pt").write_text("hello")
    assert "last.pt: not a checkpoint" in refused(capsys, mae, *TINY, "--out", tmp_path, "--resume")


def test_resume_refuses_images_that_were_added_or_renamed(image_folder, tmp_path, capsys):
    shutil.copytree(image_folder, tmp_path / "data")
    settings = (*TOY_NETWORK, "--data", tmp_path / "data", "--batch-size", 12, "--warmup-epochs", 0, "--workers", 0,
                "--max-steps", 1, "--out", tmp_path / "out")
    call(mae, *settings)
    (tmp_path / "data" / "train" / "bus" / "0.jpg").rename(tmp_path / "data" / "train" / "bus" / "z.jpg")
    assert "images was 36 " in refused(capsys, mae, *settings, "--resume")
    (tmp_path / "data" / "train" / "bus" / "z.jpg").rename(tmp_path / "data" / "train" / "bus" / "0.jpg")
    call(mae, *settings, "--resume")
    shutil.copy(tmp_path / "data" / "train" / "bus" / "0.jpg", tmp_path / "data" / "train" / "bus" / "new.jpg")
    assert "images was 36 " in refused(capsys, mae, *settings, "--resume")


def test_killed_worker_ends_the_run_in_one_line(tmp_path):
    process = begin("mae.py", *TINY, "--epochs", 1000, "--workers", 1, "--out", tmp_path)
    wait_for(lambda: len(log_of(tmp_path)) > 1, process)
    workers = open(f"/proc/{process.pid}/task/{process.pid}/children").read().split()
    for worker in workers:
        os.kill(int(worker), signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert process.returncode == 2 and len(lines) == 1 and "was killed" in lines[0], err
    assert "Traceback" not in err


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_image_is_named_and_no_worker_stays(image_folder, tmp_path, workers):
    shutil.copytree(image_folder, tmp_path / "data")
    broken = tmp_path / "data" / "train" / "boat" / "7.jpg"
    broken.write_bytes(broken.read_bytes()[:500])
    out = run("mae.py", *TOY_NETWORK, "--data", tmp_path / "data", "--out", tmp_path / "out", "--epochs", 1,
              "--batch-size", 12, "--warmup-epochs", 0, "--workers", workers, code=2)
    assert f"error: {broken}: unreadable image (" in out and "Traceback" not in out
