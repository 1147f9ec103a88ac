"""Benchmark of finetune.py: training steps of ViT-Tiny at 224 px, model only; images per second and peak memory.

    python tests/bench_finetune.py                                          # a CPU, float32
    python tests/bench_finetune.py --batch-size 256 --amp bf16 --compile    # a GPU

Plain: the same network with attention written out (scores and their softmax exist as tensors), AdamW parameter by
parameter, nothing compiled. Same weights, images, targets, batch and precision. Each row is measured in a process of its own.
"""
import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]


def measure(way, batch_size, amp, compiled, steps):
    """One row, in this process: images per second (median step), peak memory in GB, the losses of the first three steps."""
    import bench
    import finetune
    import vit
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(0)
    if way == "plain":
        vit.Attention.forward = bench.explicit_attention
    model = vit.vit_tiny(num_classes=1000).to(device)
    if way == "fast" and compiled:
        model.compile()
    groups = finetune.layer_decay_groups(model, 1e-3, 0.05, 0.85)
    kernels = {"fused": True} if way == "fast" else {"foreach": False, "fused": False}
    optimizer = torch.optim.AdamW(groups, **kernels)
    precision = argparse.Namespace(amp=amp)
    images = torch.randn(batch_size, 3, 224, 224, device=device)
    targets = torch.rand(batch_size, 1000, device=device).softmax(1)  # soft, as after mixup
    times, losses = [], []
    for _ in range(3 + steps):  # three to warm up
        began = time.perf_counter()
        with finetune.mixed_precision(precision, device):
            logits = model(images)
        loss = F.cross_entropy(logits.float(), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())  # waits for the device
        times.append(time.perf_counter() - began)
    return {"images_per_s": batch_size / statistics.median(times[3:]), "gb": finetune.memory_gb(device), "losses": losses[:3],
            "device": torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"}


def bench_finetune(batch_size=32, amp="off", compiled=False, steps=5):
    """Prints the table; returns its numbers."""
    def row(way):
        arguments = ["--way", way, "--batch-size", str(batch_size), "--amp", amp, "--steps", str(steps), *["--compile"] * compiled]
        done = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr)
        return json.loads(done.stdout.splitlines()[-1])

    rows = {"finetune.py": row("fast"), "plain": row("plain")}
    fast, plain = rows.values()
    difference = max(abs(a - b) for a, b in zip(fast["losses"], plain["losses"]))
    print(f"fine-tuning ViT-Tiny, 224 px, batch {batch_size}, amp {amp}{', compiled' * compiled}, {fast['device']}")
    print(f"{'':20}{'images/s':>12}{'peak, GB':>12}")
    for name, r in rows.items():
        print(f"{name:20}{r['images_per_s']:12.1f}{r['gb']:12.2f}")
    print(f"{fast['images_per_s'] / plain['images_per_s']:.2f} times as fast; losses of three steps differ by at most {difference:.0e}")
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--amp", choices=("bf16", "fp16", "off"), default="off")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--way", choices=("fast", "plain"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        print(json.dumps(measure(args.way, args.batch_size, args.amp, args.compile, args.steps)))
    else:
        bench_finetune(args.batch_size, args.amp, args.compile, args.steps)
