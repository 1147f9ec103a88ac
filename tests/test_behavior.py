"""What every training script promises: exact resumption, ranks, accumulation, errors in one line.

Ranks and kills are tested on all scripts; what the plumbing does alone, on mae.py.
"""
import http.server
import importlib
import json
import os
import shutil
import signal
import sys
import threading
import time

import numpy as np
import pytest
import torch
import torchvision
from conftest import (
    FORKS, ROOT, SCRIPTS, begin, call, draw_nothing, finish, free_port, log_of, refused, run,
    same_state)

import mae
import vit

# 82 images, 20 steps
TINY = ("--fraction", 0.01, "--batch-size", 24, "--epochs", 6, "--log-every", 1)
TOY_NETWORK = ("--arch", "toy", "--img-size", 32, "--patch-size", 8)
EXTRA = {  # what a script needs beside TINY
    "mocov3": ("--mlp-dim", 64, "--dim", 32),
    "dino": ("--hidden-dim", 64, "--out-dim", 32),
    "finetune": ("--warmup-epochs", 1, "--eval-every", 2, "--mixup", 0, "--randaug", 9),
}


def forked(script, arguments, rank, ranks, port, errors):
    """A script's `main` as a rank of torchrun's; invalid input ends it as it ends the script."""
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks),
                      MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    # A shell's background jobs ignore SIGINT.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    module = importlib.import_module(script)
    module.RANK = rank
    module.LOCAL_RANK = rank
    module.WORLD = ranks
    draw_nothing(module, pytest.MonkeyPatch())
    try:
        module.main(arguments)
    except vit.InputError as error:
        print("error:", error, file=sys.stderr)
        sys.exit(2)


def launch(script, *arguments, ranks=1, last_rank=(), errors=os.devnull):
    """Starts a script in processes; `last_rank`: its further arguments; a file for stderr."""
    port = free_port()
    processes = []
    for rank in range(ranks):
        own = [str(argument) for argument in arguments]
        if rank == ranks - 1:
            own += [str(argument) for argument in last_rank]
        process = FORKS.Process(target=forked, args=(script, own, rank, ranks, port, str(errors)))
        process.start()
        processes.append(process)
    return processes


def wait_for(condition, process):
    """Waits until something is true of a running process."""
    deadline = time.monotonic() + 120
    while not condition():
        ended = process.exitcode if hasattr(process, "exitcode") else process.poll()
        assert ended is None, "ended too early"
        assert time.monotonic() < deadline
        time.sleep(0.02)


def children(pid):
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [int(child) for child in file.read().split()]


def hear_ctrl_c():
    """A shell's background jobs, and what they start, ignore SIGINT: a tested script must not."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def is_alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture
def settings(tmp_path):
    """The arguments of a short toy run of a script."""
    def make(script):
        if script == "detect":
            return ("--batch-size", 2, "--max-steps", 4, "--log-every", 1, "--scenes", 40,
                    "--val-scenes", 2)
        extra = EXTRA.get(script, ())
        if script == "distill":
            torch.manual_seed(1)
            torch.save(vit.vit_toy(img_size=32, patch_size=4).state_dict(), tmp_path / "teacher.pt")
            extra = "--teacher", tmp_path / "teacher.pt"
        return *TINY, *extra
    return make


@pytest.fixture(autouse=True)
def no_figures(monkeypatch):
    """Of runs in this process."""
    draw_nothing(mae, monkeypatch)


# ------------------------------------------------------------ exactness

@pytest.mark.slow
# detect.py says why it is left out.
@pytest.mark.parametrize("script", [name for name in SCRIPTS if name != "detect"])
def test_two_ranks_give_the_run_of_one(script, tmp_path, settings):
    shared = (*settings(script), "--max-steps", 4)
    accum = () if script in ("mocov3", "dino") else ("--accum", 3)
    finish(launch(script, *shared, "--out", tmp_path / "one"))
    finish(launch(script, *shared, *accum, "--workers", 2, "--out", tmp_path / "two", ranks=2))
    one = [entry["loss"] for entry in log_of(tmp_path / "one") if "loss" in entry]
    two = [entry["loss"] for entry in log_of(tmp_path / "two") if "loss" in entry]
    np.testing.assert_allclose(two, one, rtol=1e-4)
    same_state(tmp_path / "one", tmp_path / "two", tolerance=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_killed_and_resumed_equals_uninterrupted_bit_for_bit(script, tmp_path, settings):
    """SIGKILL at a random moment, of a run too long to end before; some steps; against one run."""
    shared = (*settings(script), "--epochs", 1000, "--save-minutes", 0)
    process, = launch(script, *shared, "--max-steps", 10 ** 6, "--workers", 2,
                      "--out", tmp_path / "killed")
    wait_for((tmp_path / "killed" / "last.pt").exists, process)
    process.join(np.random.default_rng().uniform(0, 0.3))
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    done = torch.load(tmp_path / "killed" / "last.pt", weights_only=True)["step"]
    resumed = launch(script, "--out", tmp_path / "killed", "--resume", "--max-steps", 3)
    finish(resumed + launch(script, *shared, "--out", tmp_path / "whole", "--max-steps", done + 3))
    same_state(tmp_path / "whole", tmp_path / "killed")
    whole = [(entry["step"], entry.get("loss")) for entry in log_of(tmp_path / "whole")]
    killed = [(entry["step"], entry.get("loss")) for entry in log_of(tmp_path / "killed")]
    assert whole == killed and whole[-1][0] == done + 3


@pytest.mark.slow
def test_resume_in_pieces_equals_one_run(tmp_path, capsys):
    call(mae, *TINY, "--out", tmp_path / "whole")
    # Nothing to resume yet.
    call(mae, *TINY, "--out", tmp_path / "pieces", "--resume", "--max-steps", 5)
    for _ in range(4):  # the last finds a finished run
        call(mae, "--out", tmp_path / "pieces", "--resume", "--max-steps", 5)
    same_state(tmp_path / "whole", tmp_path / "pieces")
    assert len(log_of(tmp_path / "pieces")) == 20 and "step 20 of 20" in capsys.readouterr().out


def test_log_is_cut_back_to_the_checkpoint(tmp_path):
    call(mae, *TINY, "--max-steps", 3, "--out", tmp_path)
    with open(tmp_path / "log.jsonl", "a") as log:  # what a killed run wrote after its checkpoint
        log.write('{"step": 4, "loss": 1.0}\n{"step": 5, "lo')
    call(mae, "--out", tmp_path, "--resume", "--max-steps", 2)
    assert [entry["step"] for entry in log_of(tmp_path)] == [1, 2, 3, 4, 5]


@pytest.mark.slow
def test_ranks_with_other_checkpoints_stop_together(tmp_path):
    """Two nodes without a shared disk, of which one has an older file."""
    for folder, steps in (("a", 3), ("b", 2)):
        call(mae, *TINY, "--max-steps", steps, "--out", tmp_path / folder)
    ranks = launch("mae", *TINY, "--resume", "--out", tmp_path / "a", ranks=2,
                   last_rank=("--out", tmp_path / "b"), errors=tmp_path / "errors")
    finish(ranks, code=2)
    said = (tmp_path / "errors").read_text()
    assert said.count("ranks differ in (step, images): [(3, 82), (2, 82)]") == 2


@pytest.mark.slow
def test_ranks_with_other_images_stop_together(image_folder, tmp_path):
    shutil.copytree(image_folder, tmp_path / "other")
    (tmp_path / "other" / "train" / "bus" / "0.jpg").unlink()
    ranks = launch("mae", *TOY_NETWORK, "--data", image_folder, "--batch-size", 6, "--epochs", 2,
                   "--warmup-epochs", 0, "--out", tmp_path / "out", ranks=2,
                   last_rank=("--data", tmp_path / "other"), errors=tmp_path / "errors")
    finish(ranks, code=2)
    assert "(step, images): [(0, 36), (0, 35)]" in (tmp_path / "errors").read_text()


@pytest.mark.slow
def test_torchrun_trains_two_ranks_and_one_of_them_prints(tmp_path):
    out = run("mae.py", *TINY, "--max-steps", 1, "--out", tmp_path, ranks=2)
    assert "batch 24 = 2 ranks x 1 accum x 12 images" in out and out.count("step 1 of 20") == 1


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_mixed_precision_trains_close_to_float32(script, tmp_path, monkeypatch, settings):
    module = importlib.import_module(script)
    draw_nothing(module, monkeypatch)
    losses = {}
    for amp in ("off", "bf16", "fp16"):
        out = tmp_path / amp
        call(module, *settings(script), "--max-steps", 3, "--amp", amp, "--out", out)
        losses[amp] = [entry["loss"] for entry in log_of(out) if "loss" in entry]
    assert len(losses["off"]) == 3
    np.testing.assert_allclose(losses["bf16"], losses["off"], rtol=0.03)
    np.testing.assert_allclose(losses["fp16"], losses["off"], rtol=0.03)


@pytest.mark.slow
@pytest.mark.parametrize("script", [name for name in SCRIPTS if name != "detect"])
def test_compiled_runs_are_the_same_and_recompile_nothing(script, tmp_path, monkeypatch, settings):
    """Backend: the graphs as they are, run without a compiler; what is compiled is counted."""
    from torch._dynamo.testing import CompileCounter
    torch._dynamo.reset()
    counter = CompileCounter()
    compile_module = torch.nn.Module.compile
    module = importlib.import_module(script)
    draw_nothing(module, monkeypatch)
    write = module.Log.write
    compiled = []

    def compile_with_counter(network, **options):
        compile_module(network, backend=counter, **options)

    def count_and_write(log, step, **entry):
        compiled.append(counter.frame_count)
        write(log, step, **entry)
    shared = (*settings(script), "--max-steps", 6)
    call(module, *shared, "--out", tmp_path / "plain")
    monkeypatch.setattr(torch.nn.Module, "compile", compile_with_counter)
    monkeypatch.setattr(module.Log, "write", count_and_write)
    call(module, *shared, "--compile", "--out", tmp_path / "compiled")
    losses = []
    for name in ("plain", "compiled"):
        losses.append([entry["loss"] for entry in log_of(tmp_path / name) if "loss" in entry])
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)
    assert 0 < compiled[1] == compiled[-1]  # nothing after the second step


def test_crops_per_image_count_as_images_of_an_epoch(tmp_path):
    call(mae, *TINY, "--epochs", 3, "--crops-per-image", 4, "--out", tmp_path)
    assert log_of(tmp_path)[-1]["step"] == round(3 * 82 / 24)


# ------------------------------------------------------------ a run is never lost

def test_a_new_run_never_touches_the_run_in_out(tmp_path, capsys):
    call(mae, *TINY, "--max-steps", 2, "--out", tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    line = refused(capsys, mae, *TINY, "--seed", 1, "--out", tmp_path)
    assert "holds a run: --resume, or another --out" in line and str(tmp_path) in line
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}


@pytest.mark.slow
def test_of_two_runs_that_start_at_once_in_one_folder_one_is_refused(tmp_path):
    """config.json is created exclusively: whoever comes second finds it."""
    runs = [launch("mae", *TINY, "--epochs", 2, "--seed", seed, "--out", tmp_path / "out")[0]
            for seed in (0, 1)]
    for process in runs:
        process.join(120)
    assert sorted(process.exitcode for process in runs) == [0, 2]
    seed = json.loads((tmp_path / "out" / "config.json").read_text())["seed"]
    assert runs[seed].exitcode == 0 and len(log_of(tmp_path / "out")) == 7


@pytest.mark.slow
def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    call(mae, *TINY, "--max-steps", 2, "--out", tmp_path)
    before = (tmp_path / "last.pt").read_bytes()

    def full(state, path):
        path.write_bytes(b"half a checkpoint")
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        call(mae, "--resume", "--out", tmp_path)
    assert (tmp_path / "last.pt").read_bytes() == before


@pytest.mark.slow
@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM)])
def test_signals_end_a_run_and_its_workers_at_once(number, code, tmp_path):
    process = begin("mae.py", *TINY, "--epochs", 1000, "--workers", 2, "--out", tmp_path,
                    preexec_fn=hear_ctrl_c)
    wait_for(lambda: len(log_of(tmp_path)) > 1, process)
    workers = children(process.pid)
    assert len(workers) >= 2
    os.kill(process.pid, number)
    _, err = process.communicate(timeout=20)
    assert process.returncode == code
    if number == signal.SIGINT:
        assert err.strip() == "interrupted: --resume continues"
    wait_until_dead(workers)


@pytest.mark.slow
def test_workers_end_with_a_killed_parent(tmp_path):
    process = begin("mae.py", *TINY, "--epochs", 1000, "--workers", 2, "--out", tmp_path)
    wait_for(lambda: len(log_of(tmp_path)) > 1, process)
    workers = children(process.pid)
    assert len(workers) >= 2
    process.kill()
    process.communicate()
    wait_until_dead(workers)


def wait_until_dead(pids, seconds=20):
    deadline = time.monotonic() + seconds
    while any(is_alive(pid) for pid in pids):
        assert time.monotonic() < deadline, "a worker lives on"
        time.sleep(0.1)


# ------------------------------------------------------------ numbers that are not finite

def log_for(folder, amp, scale=2.0 ** 16):
    args = mae.parse(["--amp", amp, "--out", str(folder)], mae.settings, mae.PRESETS, out="")
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=amp == "fp16")
    scaler.scale(torch.ones(()))  # from now on it has a scale
    return mae.Log(args, scaler)


def test_a_loss_that_is_not_finite_ends_the_run_before_it_is_saved(tmp_path, capsys):
    line = refused(capsys, mae, *TINY, "--base-lr", 1e12, "--log-every", 2, "--save-minutes", 0,
                   "--out", tmp_path)
    assert "not finite" in line and "--clip-grad 1" in line
    if (tmp_path / "last.pt").exists():
        state = torch.load(tmp_path / "last.pt", weights_only=True)
        assert all(tensor.isfinite().all() for tensor in state["model"].values())


@pytest.mark.parametrize("amp, loss, norm, bad", [
    ("off", 1.0, 1.0, False),
    ("off", float("nan"), 1.0, True),
    ("off", 1.0, float("inf"), True),
    ("bf16", 1.0, float("nan"), True),
    ("fp16", float("inf"), 1.0, True),
    ("fp16", 1.0, float("inf"), False)])
def test_log_refuses_what_is_not_finite_but_the_steps_that_fp16_skips(
        amp, loss, norm, bad, tmp_path):
    log = log_for(tmp_path, amp)
    for value in (1.0, loss):
        log.add(loss=torch.tensor(value))
    if bad:
        with pytest.raises(vit.InputError, match="not finite"):
            log.write(2, grad_norm=norm)
        assert log_of(tmp_path) == []
    else:
        log.write(2, grad_norm=norm)
        entry, = log_of(tmp_path)  # valid JSON
        assert entry["loss"] == 1.0 and ("grad_norm" in entry) == np.isfinite(norm)


def test_fp16_whose_gradients_never_fit_ends_the_run(tmp_path):
    log = log_for(tmp_path, "fp16", scale=0.5)
    log.add(loss=torch.tensor(1.0))
    with pytest.raises(vit.InputError, match="--amp bf16"):
        log.write(1, grad_norm=float("inf"))


@pytest.mark.slow
def test_fp16_with_gradients_that_stay_too_large_does_not_end_as_done(
        tmp_path, capsys, monkeypatch):
    forward = mae.MaskedAutoencoder.forward

    def exploding(self, *inputs):
        loss, pred, mask = forward(self, *inputs)
        weights = self.decoder_pred.weight.sum()
        zero = weights - weights.detach()  # but its gradient is 1
        return loss + 1e38 * zero, pred, mask
    monkeypatch.setattr(mae.MaskedAutoencoder, "forward", exploding)
    line = refused(capsys, mae, *TINY, "--epochs", 60, "--log-every", 20, "--amp", "fp16",
                   "--out", tmp_path)
    assert "--amp bf16" in line and not (tmp_path / "last.pt").exists()


def test_save_refuses_a_weight_that_is_not_finite(tmp_path):
    args = mae.parse(["--out", str(tmp_path)], mae.settings, mae.PRESETS, out="")
    (tmp_path / "log.jsonl").write_text("")
    model = torch.nn.Linear(2, 2)
    model.weight.data[0, 0] = float("inf")
    with pytest.raises(vit.InputError, match="step 7: a weight is not finite"):
        mae.save(args, "last.pt", 7, model=model)
    assert not (tmp_path / "last.pt").exists()


NAN_ON_RANK_1 = """
import sys
sys.path.insert(0, sys.argv.pop(1))
import mae

calls = []
forward = mae.MaskedAutoencoder.forward


def broken(self, *inputs):
    calls.append(1)
    loss, pred, mask = forward(self, *inputs)
    if mae.RANK == 1 and len(calls) == 3:
        loss = loss * float("nan")
    return loss, pred, mask


mae.MaskedAutoencoder.forward = broken
mae.main()
"""


@pytest.mark.slow
def test_nan_on_one_of_two_ranks_stops_both(tmp_path):
    script = tmp_path / "nan_on_rank_1.py"
    script.write_text(NAN_ON_RANK_1)
    out = run(script, ROOT, *TINY, "--log-every", 5, "--out", tmp_path / "out", ranks=2, code=1)
    assert "InputError: not finite, or overflow: {'step': 5" in out
    assert not (tmp_path / "out" / "last.pt").exists()


# ------------------------------------------------------------ bad input: one line, exit code 2

@pytest.mark.parametrize("arguments, message", [
    (("--data", "nowhere"), "nowhere: [Errno 2] No such file or directory"),
    (("--data", "cifar10", "--root", "nowhere"), "--data cifar10: Dataset not found"),
    (("--batch-size", 10, "--accum", 4),
     "--batch-size 10: not a multiple of 4, ranks x accum x crops"),
    (("--fraction", 0.001), "--batch-size 128: only 10 images, give less"),
    (("--patch-size", 5), "patch size 5 does not divide image size 32"),
    (("--decoder-heads", 5), "5 heads"),
    (("--warmup-epochs", 12), "--warmup-epochs 12.0 or --seed is out of range"),
    (("--seed", -1), "--seed is out of range"),
    (("--mask-ratio", 1), "--mask-ratio 1.0: keeps 0 of 64"),
    (("--base-lr", -1), "argument --base-lr: invalid amount value: '-1'"),
    (("--weight-decay", "nan"), "argument --weight-decay: invalid amount value: 'nan'"),
    (("--fraction", "nan"), "argument --fraction: invalid share value: 'nan'"),
    (("--min-crop", 2), "argument --min-crop: invalid share value: '2'"),
    (("--decoder-dim", 0), "argument --decoder-dim: invalid count value: '0'"),
    (("--epochs", "many"), "argument --epochs: invalid amount value: 'many'"),
    (("--arch", "huge"), "argument --arch: invalid choice: 'huge'"),
    (("--no-such", 1), "unrecognized arguments: --no-such"),
    (("--init", "nothing.pt"), "nothing.pt"),
])
def test_bad_arguments_are_named_in_one_line(arguments, message, tmp_path, capsys):
    assert message in refused(capsys, mae, "--out", tmp_path / "out", *arguments)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_each_script_runs_from_the_shell_without_a_warning(script, tmp_path, settings):
    """`run` starts `python -W error SCRIPT`."""
    run(f"{script}.py", *settings(script), "--max-steps", 2, "--out", tmp_path / "out")
    assert list((tmp_path / "out").glob("*.png")) or script == "finetune"
    assert (tmp_path / "out" / "last.pt").exists()


@pytest.mark.slow
def test_analysis_runs_from_the_shell_without_a_warning(tmp_path):
    torch.save(vit.vit_toy(img_size=32, patch_size=4).state_dict(), tmp_path / "encoder.pt")
    run("analysis.py", "all", f"toy={tmp_path / 'encoder.pt'}", "--images", 8, "--batch-size", 8,
        "--out", tmp_path / "out")
    assert len(list((tmp_path / "out").glob("*.png"))) == 3


def test_bad_input_from_the_shell_exits_with_2(tmp_path):
    out = run("mae.py", "--data", "nowhere", "--out", tmp_path, code=2)
    assert "error: nowhere: [Errno 2]" in out and "Traceback" not in out


@pytest.mark.slow
def test_a_bug_keeps_its_traceback_and_exits_with_1(tmp_path):
    script = tmp_path / "mae.py"  # a copy with a bug
    text = (ROOT / "mae.py").read_text()
    assert "loss, pred, mask\n" in text
    script.write_text(text.replace("return loss, pred, mask\n", "return loss, pred, mistake\n"))
    shutil.copy(ROOT / "vit.py", tmp_path)
    out = run(script, *TINY, "--out", tmp_path / "out", code=1)
    assert "Traceback" in out and "NameError: name 'mistake' is not defined" in out


def test_help_shows_the_defaults_of_the_preset_that_is_typed(capsys):
    typed = ("--data x", 400), ("", 12), ("--preset small --epochs 7", 400)
    for words, epochs in typed:
        with pytest.raises(SystemExit) as ended:
            call(mae, *words.split(), "--help")
        shown = " ".join(capsys.readouterr().out.split())
        assert ended.value.code == 0 and f"counting crops (default: {epochs})" in shown
    assert "(default: 32)" in shown and "toy, cifar10" in shown


def test_settings_are_printed_as_they_are_typed(tmp_path, capsys):
    call(mae, *TINY, "--max-steps", 1, "--out", tmp_path)
    assert "--batch-size 24 --base-lr 0.006" in capsys.readouterr().out


def test_resume_takes_the_settings_of_the_run_and_names_all_that_differ(tmp_path, capsys):
    call(mae, *TINY, "--max-steps", 1, "--mask-ratio", 0.5, "--out", tmp_path)
    line = refused(capsys, mae, "--seed", 1, "--mask-ratio", 0.25, "--out", tmp_path, "--resume")
    assert "--seed was 0, now 1" in line and "--mask-ratio was 0.5, now 0.25" in line
    call(mae, "--out", tmp_path, "--resume", "--max-steps", 1)
    call(mae, "--out", tmp_path, "--resume", "--max-steps", 1, "--accum", 2, "--workers", 1,
         "--log-every", 3)
    assert [entry["step"] for entry in log_of(tmp_path)] == [1, 2, 3]


def test_resume_of_a_folder_that_was_moved_continues_there(tmp_path, monkeypatch):
    call(mae, *TINY, "--max-steps", 1, "--out", tmp_path / "before")
    (tmp_path / "runs").mkdir()
    (tmp_path / "before").rename(tmp_path / "runs" / "mae")
    monkeypatch.chdir(tmp_path)
    call(mae, "--resume", "--max-steps", 1)  # in runs/mae, the default
    assert [entry["step"] for entry in log_of(tmp_path / "runs" / "mae")] == [1, 2]
    assert not (tmp_path / "before").exists()


def test_resume_refuses_a_file_that_is_no_checkpoint_or_another_scripts(tmp_path, capsys):
    import simmim
    call(mae, *TINY, "--max-steps", 1, "--out", tmp_path)
    line = refused(capsys, simmim, "--out", tmp_path, "--resume")
    assert "--decoder-dim was 96, now None" in line
    (tmp_path / "last.pt").write_text("hello")
    line = refused(capsys, mae, "--out", tmp_path, "--resume")
    assert "last.pt: not a PyTorch checkpoint" in line


def test_resume_refuses_another_number_of_images(image_folder, tmp_path, capsys):
    shutil.copytree(image_folder, tmp_path / "data")
    call(mae, *TOY_NETWORK, "--data", tmp_path / "data", "--batch-size", 12, "--warmup-epochs", 0,
         "--workers", 0, "--max-steps", 1, "--out", tmp_path / "out")
    call(mae, "--resume", "--max-steps", 1, "--out", tmp_path / "out")
    shutil.copy(tmp_path / "data/train/bus/0.jpg", tmp_path / "data/train/bus/new.jpg")
    assert "--images was 36, now 37" in refused(capsys, mae, "--resume", "--out", tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("workers, ranks", [(0, 1), (2, 1), (2, 2)])
def test_a_broken_image_is_named_also_from_workers_and_ranks(
        image_folder, tmp_path, workers, ranks):
    shutil.copytree(image_folder, tmp_path / "data")
    broken = tmp_path / "data" / "train" / "boat" / "7.jpg"
    broken.write_bytes(broken.read_bytes()[:500])
    code = 2 if ranks == 1 else 1  # torchrun itself exits with 1
    out = run("mae.py", *TOY_NETWORK, "--data", tmp_path / "data", "--out", tmp_path / "out",
              "--epochs", 1, "--batch-size", 12, "--warmup-epochs", 0, "--workers", workers,
              ranks=ranks, code=code)
    assert f"error: {broken}: unreadable image (" in out
    assert ranks > 1 or "Traceback" not in out


def test_a_broken_validation_image_ends_a_run_at_its_start(image_folder, tmp_path, capsys):
    shutil.copytree(image_folder, tmp_path / "data")
    (tmp_path / "data" / "val" / "bird" / "0.jpg").write_bytes(b"")
    line = refused(capsys, mae, *TOY_NETWORK, "--data", tmp_path / "data", "--batch-size", 12,
                   "--out", tmp_path / "out")
    assert "val/bird/0.jpg: unreadable image" in line and not (tmp_path / "out").exists()


def test_more_ranks_than_gpus_is_one_line(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(mae, "LOCAL_RANK", 2)
    assert "only 2 GPUs" in refused(capsys, mae, "--out", tmp_path / "out")


def test_ranks_leave_the_process_group_before_python_ends(monkeypatch, tmp_path):
    """Without it gloo's threads abort about every second process that ends."""
    registered = []
    monkeypatch.setattr(mae, "WORLD", 2)
    monkeypatch.setattr(mae.dist, "init_process_group", lambda device_id: None)
    monkeypatch.setattr(mae.atexit, "register", registered.append)
    mae.setup(mae.parse([], mae.settings, mae.PRESETS, out=tmp_path))
    assert registered == [torch.distributed.destroy_process_group]


# ------------------------------------------------------------ downloads

class Drip(http.server.BaseHTTPRequestHandler):
    """A server that begins a large file, then sends slowly or closes the connection."""
    closes = False

    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", str(10 ** 9))
        self.end_headers()
        for _ in range(600):
            self.wfile.write(b"x" * 100)
            self.wfile.flush()
            if self.closes:
                return
            time.sleep(0.1)

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    """The address of a `Drip` on this machine."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Drip) as running:
        running.daemon_threads = True
        running.block_on_close = False
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}/cifar.tar.gz"
        running.shutdown()


def test_a_failed_download_names_the_data_set(server, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Drip, "closes", True)
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", server)
    with pytest.raises(vit.InputError, match="^--data cifar10: .+"):
        call(mae, "--data", "cifar10", "--download", "--root", tmp_path, "--out", tmp_path / "out")


DOWNLOAD = """
import sys
sys.path.insert(0, sys.argv.pop(1))
import torchvision
torchvision.datasets.CIFAR10.url = sys.argv.pop(1)
import runpy
runpy.run_module("mae", run_name="__main__")
"""


@pytest.mark.slow
def test_ctrl_c_during_a_download_ends_it_at_once(server, tmp_path):
    script = tmp_path / "download.py"
    script.write_text(DOWNLOAD)
    root = tmp_path / "root"
    process = begin(script, ROOT, server, "--data", "cifar10", "--download", "--root", root,
                    "--out", tmp_path / "out", preexec_fn=hear_ctrl_c)
    wait_for(lambda: root.exists() and list(root.iterdir()), process)
    os.kill(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=10)
    assert process.returncode == 130 and "interrupted" in err and "Traceback" not in err, err
