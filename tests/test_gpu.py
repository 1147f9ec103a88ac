"""On a GPU: `TEST_GPU=1 python -m pytest tests/test_gpu.py`. Skipped elsewhere; the other tests hide the GPU."""
import os

import numpy as np
import pytest
import torch
from conftest import call, log_of

import mae

pytestmark = pytest.mark.skipif(os.environ.get("TEST_GPU") != "1" or not torch.cuda.is_available(), reason="no GPU")
TINY = ("--fraction", 0.05, "--batch-size", 32, "--epochs", 4, "--log-every", 1)


def losses(folder, *arguments):
    call(mae, *TINY, "--max-steps", 8, "--out", folder, *arguments)
    return [entry["loss"] for entry in log_of(folder)]


@pytest.mark.parametrize("arguments", [("--amp", "bf16"), ("--amp", "fp16"), ("--amp", "bf16", "--compile")])
def test_mixed_precision_and_compile_train_close_to_float32(arguments, tmp_path):
    expected = losses(tmp_path / "off", "--amp", "off")
    np.testing.assert_allclose(losses(tmp_path / "other", *arguments), expected, rtol=0.05)


def test_resumed_on_a_gpu_goes_on_with_the_same_loss(tmp_path):
    whole = losses(tmp_path / "whole")
    call(mae, *TINY, "--max-steps", 4, "--out", tmp_path / "parts")
    call(mae, *TINY, "--max-steps", 4, "--out", tmp_path / "parts", "--resume")
    np.testing.assert_allclose([entry["loss"] for entry in log_of(tmp_path / "parts")], whole, rtol=0.01)


def test_no_step_between_two_lines_of_the_log_waits_for_the_device(tmp_path, monkeypatch):
    """20 steps under the strictest debug mode: any synchronization between two readings of the window raises."""
    write, load = mae.Log.write, mae.load

    def reading(self, *args, **kw):
        torch.cuda.set_sync_debug_mode("default")
        try:
            return write(self, *args, **kw)
        finally:
            torch.cuda.set_sync_debug_mode("error")

    def loaded(*args):
        batches = load(*args)
        torch.cuda.set_sync_debug_mode("error")
        return batches
    monkeypatch.setattr(mae.Log, "write", reading)
    monkeypatch.setattr(mae, "load", loaded)
    monkeypatch.setattr(mae, "draw_reconstructions", lambda *args: None)
    monkeypatch.setattr(mae, "save", lambda *args, **kw: None)
    try:
        call(mae, *TINY, "--max-steps", 20, "--log-every", 20, "--out", tmp_path)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(log_of(tmp_path)) == 1
