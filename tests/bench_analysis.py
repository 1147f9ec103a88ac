"""Benchmark of analysis.py: two ViT-Tiny at 224 px; time and peak memory, against the plain way of comparing all layers.

    python tests/bench_analysis.py                # 1,024 images, as in the table of README.md
    python tests/bench_analysis.py --images 128   # a quick look

Plain: store the features of all 2 x 13 layers of a mini-batch, then, for each pair of layers, form a Gram matrix and two
HSICs anew (as PyTorch-Model-Compare does). Both ways are float64 after the network, see the same mini-batches, and give
the same 26 x 26 CKA values. "CKA part": all but the networks' forward passes. Each row is measured in a process of its own.
"""
import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
BATCH = 32


def networks():
    import vit
    for seed in (0, 1):
        torch.manual_seed(seed)
        yield vit.vit_tiny().eval()


def photographs(folder, images):
    """A folder of JPEGs of 320 x 256 pixels, as an analysis of real images reads and resizes them."""
    from torchvision.io import write_jpeg
    folder.mkdir(parents=True)
    for i in range(images):
        coarse = torch.rand(1, 3, 8, 10, generator=torch.Generator().manual_seed(i)) * 255
        write_jpeg(torch.nn.functional.interpolate(coarse, (256, 320), mode="bicubic").clamp(0, 255).byte()[0],
                   str(folder / f"{i}.jpg"))


def mini_batches(images):
    for i in range(images // BATCH):
        yield torch.randn(BATCH, 3, 224, 224, generator=torch.Generator().manual_seed(i))


def plain_hsic(K, L):
    """Unbiased HSIC of two Gram matrices `(B, B)`, term by term (Song et al., 2012)."""
    n, one = len(K), torch.ones(len(K), 1, dtype=K.dtype)
    K, L = K.clone().fill_diagonal_(0), L.clone().fill_diagonal_(0)
    total = (K @ L).trace() + (one.T @ K @ one) * (one.T @ L @ one) / ((n - 1) * (n - 2)) - 2 / (n - 2) * (one.T @ K @ L @ one)
    return (total / (n * (n - 3))).item()


@torch.inference_mode()
def measure(way, images):
    """One row, in this process: seconds in the CKA part and in all, peak memory, and a few of the CKA values."""
    import analysis
    models = list(networks())
    layers = sum(len(model.blocks) + 1 for model in models)
    cka, hsic = analysis.CKA(layers, layers), torch.zeros(layers, layers, 3, dtype=torch.float64)
    began, forward = time.perf_counter(), 0.0

    def features(batch):
        nonlocal forward
        for model in models:
            scan = analysis.layer_by_layer(model, batch)
            for layer in range(len(model.blocks) + 1):
                since = time.perf_counter()
                x = analysis.cka_features(model, layer, next(scan)[0])
                forward += time.perf_counter() - since
                yield x

    for batch in mini_batches(images):
        if way == "fast":
            cka.update(features(batch))
        else:
            stored = [x.flatten(1).double() for x in features(batch)]
            for i, X in enumerate(stored):
                K = X @ X.T
                hsic[i, :, 1] += plain_hsic(K, K)
                for j, Y in enumerate(stored):
                    L = Y @ Y.T
                    hsic[i, j, 0] += plain_hsic(K, L)
                    hsic[i, j, 2] += plain_hsic(L, L)
    whole = time.perf_counter() - began
    KL, KK, LL = hsic.unbind(-1)
    similarity = cka.compute() if way == "fast" else KL / (KK * LL).sqrt()
    return {"cka": whole - forward, "whole": whole, "gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20,
            "values": similarity[:, 5].tolist()}


def bench_analysis(images=1024):
    """Prints the table; returns its numbers."""
    def row(way):
        done = subprocess.run([sys.executable, __file__, "--images", str(images), "--way", way], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr)
        return json.loads(done.stdout)

    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        for i, model in enumerate(networks()):
            torch.save({"model": model.state_dict()}, Path(folder) / f"model{i}.pt")
        photographs(Path(folder) / "val" / "kind", images)
        began = time.perf_counter()
        subprocess.run([sys.executable, ROOT / "analysis.py", "all", "model0.pt", "model1.pt", "--data", folder,
                        "--images", str(images), "--batch-size", str(BATCH)], cwd=folder, check=True, stdout=subprocess.DEVNULL)
        rows["analysis.py all"] = {"whole": time.perf_counter() - began,  # the only child so far, so the largest
                                   "gb": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2 ** 20}
    rows |= {"analysis.CKA": row("fast"), "plain double loop": row("plain")}
    fast, plain = rows["analysis.CKA"], rows["plain double loop"]
    difference = max(abs(a - b) for a, b in zip(fast["values"], plain["values"]))
    print(f"two ViT-Tiny, 224 px, {images} images, mini-batches of {BATCH}, {torch.get_num_threads()} threads")
    print(f"{'':20}{'CKA part, s':>12}{'in all, s':>12}{'peak, GB':>10}")
    for name, r in rows.items():
        print(f"{name:20}{r.get('cka', float('nan')):12.1f}{r['whole']:12.1f}{r['gb']:10.2f}".replace("nan", "  -"))
    print(f"CKA part {plain['cka'] / fast['cka']:.1f} times as fast; values differ by at most {difference:.0e}")
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--way", choices=("fast", "plain"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    print(json.dumps(measure(args.way, args.images))) if args.way else bench_analysis(args.images)
