"""On a GPU: `TEST_GPU=1 python -m pytest tests/test_gpu.py`. Other tests hide it: skipped there.

Tests whose names begin with `test_values` compare numbers; a simulated device has none.
"""
import importlib
import json
import os

import numpy as np
import pytest
import torch
from conftest import SCRIPTS, call, log_of, run

import vit

GPUS = torch.cuda.device_count() if os.environ.get("TEST_GPU") == "1" else 0
pytestmark = pytest.mark.skipif(GPUS == 0, reason="no GPU")
SMALL = {  # a short toy run of each script
    "detect": ("--batch-size", 2, "--scenes", 40, "--val-scenes", 4),
    "mocov3": ("--mlp-dim", 64, "--dim", 32),
    "dino": ("--hidden-dim", 64, "--out-dim", 32),
}
PRETRAINING = ("mae", "simmim", "distill", "mocov3", "dino")


@pytest.fixture
def train(tmp_path):
    """Runs a script for some steps on toy images: the losses of its log."""
    torch.manual_seed(1)
    torch.save(vit.vit_toy(img_size=32, patch_size=4).state_dict(), tmp_path / "teacher.pt")

    def train_script(script, out, *arguments, steps=4):
        module = importlib.import_module(script)
        words = SMALL.get(script, ())
        if script != "detect":
            words = ("--fraction", 0.05, "--batch-size", 32, "--epochs", 4, "--warmup-epochs", 1,
                     *words)
        if script == "distill":
            words = (*words, "--teacher", tmp_path / "teacher.pt")
        call(module, *words, "--max-steps", steps, "--log-every", 1, "--workers", 1,
             "--out", tmp_path / out, *arguments)
        return [entry["loss"] for entry in log_of(tmp_path / out) if "loss" in entry]
    return train_script


@pytest.mark.parametrize("amp", ["bf16", "off"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_script_trains_saves_and_draws(script, amp, train, tmp_path):
    losses = train(script, "run", "--amp", amp)
    assert len(losses) == 4 and np.isfinite(losses).all()
    assert (tmp_path / "run" / "last.pt").exists()
    assert list((tmp_path / "run").glob("*.png")) or script == "finetune"


@pytest.mark.parametrize("script", SCRIPTS)
def test_script_resumes(script, train, tmp_path):
    train(script, "run", steps=2)
    call(importlib.import_module(script), "--out", tmp_path / "run", "--resume", "--max-steps", 2)
    steps = [entry["step"] for entry in log_of(tmp_path / "run") if "loss" in entry]
    assert steps == [1, 2, 3, 4]


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_step_between_two_lines_of_the_log_waits_for_the_device(script, train, monkeypatch):
    """Five steps in the strictest debug mode: what waits for the device raises. The sixth logs."""
    module = importlib.import_module(script)
    timed = module.Log.timed

    def watched(self, batches):
        for i, batch in enumerate(timed(self, batches)):
            torch.cuda.set_sync_debug_mode("error" if i < 5 else "default")
            yield batch
    monkeypatch.setattr(module.Log, "timed", watched)
    try:
        losses = train(script, "run", "--log-every", 6, steps=6)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(losses) == 1


@pytest.mark.parametrize("mode", ["knn", "linear"])
def test_evaluations_of_finetune_run(mode, train, tmp_path):
    train("mae", "mae")
    losses = train("finetune", "other", "--mode", mode, "--init", tmp_path / "mae" / "last.pt")
    if mode == "knn":
        result = json.loads((tmp_path / "other" / "knn.json").read_text())
        assert 0 < result["top1"] <= result["top5"] <= 100
    else:
        assert len(losses) == 4 and np.isfinite(losses).all()


@pytest.mark.skipif(GPUS < 2, reason="one GPU")
@pytest.mark.parametrize("script", SCRIPTS)
def test_two_gpus_train_together(script, tmp_path):
    torch.save(vit.vit_toy(img_size=32, patch_size=4).state_dict(), tmp_path / "teacher.pt")
    words = SMALL.get(script, ())
    if script != "detect":
        words = ("--fraction", 0.05, "--batch-size", 32, *words)
    if script == "distill":
        words = (*words, "--teacher", tmp_path / "teacher.pt")
    run(f"{script}.py", *words, "--max-steps", 2, "--log-every", 1, "--out", tmp_path / "run",
        ranks=2)
    assert len([entry for entry in log_of(tmp_path / "run") if "loss" in entry]) == 2


# ------------------------------------------------------------ numbers: not on a simulated device

@pytest.mark.parametrize("arguments", [
    ("--amp", "bf16"), ("--amp", "fp16"), ("--amp", "bf16", "--compile")])
@pytest.mark.parametrize("script", PRETRAINING)
def test_values_of_mixed_precision_and_compile_are_close_to_float32(script, arguments, train):
    expected = train(script, "off", "--amp", "off", steps=8)
    np.testing.assert_allclose(train(script, "other", *arguments, steps=8), expected, rtol=0.05)


@pytest.mark.parametrize("script", SCRIPTS)
def test_values_of_a_resumed_run_go_on(script, train, tmp_path):
    whole = train(script, "whole")
    train(script, "parts", steps=2)
    call(importlib.import_module(script), "--out", tmp_path / "parts", "--resume", "--max-steps", 2)
    parts = [entry["loss"] for entry in log_of(tmp_path / "parts") if "loss" in entry]
    np.testing.assert_allclose(parts, whole, rtol=0.01)
