"""Speed and memory, each against the plain way of doing it, in one run.

    python tests/bench.py                                # all parts, on generated photographs
    python tests/bench.py loader mae --data DIR          # some parts, on the JPEGs under DIR
    python tests/bench.py mae --batch-size 256 --compile # on a GPU: bf16 by default

Parts: loader (decode, crop, flip, normalise), memory (what data in memory costs of a step), mae (the model alone), end (a whole
run of mae.py), distill (what the teacher costs), and what bench_finetune.py, bench_mocov3.py, bench_analysis.py measure. On a shared machine look
at the ratios: here and in distill rounds of the ways alternate, the ratio is the median over rounds; the others run one way after the other.
"""
import argparse
import importlib
import io
import json
import multiprocessing
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import mae  # noqa: E402
import vit  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


# ------------------------------------------------------------------------------------------------ measuring

def alternate(ways, rounds, synchronise=lambda: None, clock=time.perf_counter):
    """`ways {name: function}` in turn, after one warm-up each; the seconds of every round, `{name: [seconds]}`."""
    seconds = {name: [] for name in ways}
    for way in ways.values():
        way()
    for _ in range(rounds):
        for name, way in ways.items():
            synchronise()
            began = clock()
            way()
            synchronise()
            seconds[name].append(clock() - began)
    return seconds


def table(title, count, unit, seconds, **columns):
    """Prints a row per way: `count` units a second, the ratio to the first way (median over rounds), further columns."""
    print(f"\n{title}")
    print(f"  {'':34}{unit + '/s':>12}{'ratio':>8}" + "".join(f"{name:>14}" for name in columns))
    plain = next(iter(seconds.values()))
    for name, times in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(plain, times))
        print(f"  {name:34}{count / statistics.median(times):12.1f}{ratio:8.2f}"
              + "".join(f"{column.get(name, ''):>14}" for column in columns.values()), flush=True)


def peak_memory(function, *arguments):
    """Peak memory in GB of a function that runs in a process of its own: on the GPU what it allocates, else resident memory."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(report_memory, (function, *arguments))


def report_memory(function, *arguments):
    function(*arguments)
    if DEVICE.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2 ** 30
    status = Path("/proc/self/status")
    if status.exists():  # Linux: getrusage would count what the parent held before this process was made
        return int(next(line for line in status.read_text().splitlines() if line.startswith("VmHWM")).split()[1]) / 2 ** 20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** (30 if sys.platform == "darwin" else 20)


def best_matmul(dtype):
    """The highest FLOP/s that a big matrix product reaches here: what MFU is measured against."""
    a = torch.randn(*[8192 if DEVICE.type == "cuda" else 2048] * 2, device=DEVICE, dtype=dtype)
    times = alternate({"": lambda: a @ a}, 10, torch.cuda.synchronize if DEVICE.type == "cuda" else lambda: None)[""]
    return 2 * len(a) ** 3 / min(times)


# ------------------------------------------------------------------------------------------------ the plain way

def explicit_attention(self, x, return_scores=False):
    """Attention as textbooks write it: the scores and their softmax exist in memory."""
    B, N, D = x.shape
    q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, D // self.num_heads).permute(2, 0, 3, 1, 4)
    attention = ((q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5).softmax(-1)
    return self.proj((attention @ v).transpose(1, 2).reshape(B, N, D)), None


def training_step(model, loss_of, plain, compile=False, amp=torch.bfloat16):
    """A function that trains one step: the project's way, or eager with explicit attention and unfused AdamW."""
    if plain:
        for module in model.modules():
            if isinstance(module, vit.Attention):
                module.forward = explicit_attention.__get__(module)
    elif compile:
        model.compile()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, **({"foreach": False, "fused": False} if plain else {"fused": True}))

    def step():
        with torch.autocast(DEVICE.type, amp, enabled=DEVICE.type == "cuda"):
            loss = loss_of(model)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return step


def compare_training(title, make, batch_size, args, rounds):
    """Model only, plain against the project's way: `make() -> (model, loss_of)`, picklable."""
    ways = {"plain: eager, explicit, unfused": training_step(*make(batch_size), plain=True),
            "here" + (", compiled" if args.compile else ""): training_step(*make(batch_size), plain=False, compile=args.compile)}
    model, loss_of = make(batch_size)
    with FlopCounterMode(display=False) as counter:
        loss_of(model).backward()
    peak = best_matmul(torch.bfloat16 if DEVICE.type == "cuda" else torch.float32)
    seconds = alternate(ways, rounds, torch.cuda.synchronize if DEVICE.type == "cuda" else lambda: None)
    mfu = {name: f"{counter.get_total_flops() / statistics.median(times) / peak:.0%}" for name, times in seconds.items()}
    memory = {name: f"{peak_memory(few_steps, make, batch_size, i == 0, args.compile):.2f}" for i, name in enumerate(ways)}
    table(f"{title}, batch {batch_size}, {DEVICE.type}, {'bf16' if DEVICE.type == 'cuda' else 'float32'}; MFU against "
          f"{peak / 1e12:.2f} TFLOP/s of a big matrix product here", batch_size, "images", seconds, MFU=mfu, **{"peak GB": memory})


def few_steps(make, batch_size, plain, compile):
    step = training_step(*make(batch_size), plain=plain, compile=compile and not plain)
    for _ in range(2):
        step()


# ------------------------------------------------------------------------------------------------ the parts

def photographs(args):
    """Paths of the JPEGs under --data, or of 64 generated ones of 500 x 375 pixels."""
    if args.data:
        return sorted(str(path) for path in Path(args.data).rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
    from PIL import Image
    rng, folder = np.random.default_rng(0), Path(tempfile.mkdtemp())
    for i in range(64):
        coarse = Image.fromarray(rng.integers(0, 255, (47, 63, 3), dtype=np.uint8)).resize((500, 375), Image.BICUBIC)
        fine = np.asarray(coarse).astype(int) + rng.integers(-12, 12, (375, 500, 1))
        Image.fromarray(fine.clip(0, 255).astype(np.uint8)).save(folder / f"{i}.jpg", quality=90)
    return sorted(map(str, folder.glob("*.jpg")))


def bench_loader(args):
    """Per core, in processor time: images from disk to normalised 224 px crops."""
    from PIL import Image
    from torchvision import transforms
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    paths = photographs(args)[:100]
    settings = argparse.Namespace(img_size=224, min_crop=0.08, seed=0, workers=0, mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])
    data = mae.Data(np.array([os.fsencode(path) for path in paths]), None, None, [])
    usual = transforms.Compose([
        transforms.RandomResizedCrop(224, interpolation=transforms.InterpolationMode.BICUBIC), transforms.RandomHorizontalFlip(),
        transforms.ToTensor(), transforms.Normalize(settings.mean, settings.std)])

    def batches(crops):  # of 24 crops
        return [range(len(paths))[first:first + 24 // crops] for first in range(0, len(paths), 24 // crops)]

    def pil(crops):
        for some in batches(crops):
            torch.stack([usual(Image.open(paths[i]).convert("RGB")) for i in some for _ in range(crops)])

    def ours(crops, normalise=True):
        plan = [mae.Batch(0, some.start, len(some), range(len(some)), 1.0) for some in batches(crops)]
        if normalise:
            for images in mae.crops_of(data, plan, settings, torch.device("cpu"), crops):
                mae.normalize(images, settings)
        else:  # what a worker does: the GPU makes floats of the bytes and normalises them
            cropper = mae.Crops(data, settings, crops, None)
            for some in batches(crops):
                cropper.__getitems__(some)

    with torch.no_grad():
        for crops, rounds in ((1, args.rounds), (4, max(2, args.rounds // 2))):
            seconds = alternate({"plain: PIL, one decoding a crop": lambda: pil(crops), "here": lambda: ours(crops),
                                 "here, normalised on a GPU": lambda: ours(crops, normalise=False)}, rounds, clock=time.process_time)
            table(f"Loading, one core, {len(paths)} JPEGs, {crops} crops each", crops * len(paths), "crops", seconds)
    torch.set_num_threads(threads)


def toy_mae(batch_size, arch="toy", img_size=32, patch_size=4):
    model = mae.MaskedAutoencoder(vit.ARCHS[arch](img_size=img_size, patch_size=patch_size, global_pool="token")).to(DEVICE)
    images = torch.randn(batch_size, 3, img_size, img_size, device=DEVICE)
    return model, lambda network: network(images)[0]


def tiny_mae(batch_size):
    return toy_mae(batch_size, "tiny", 224, 16)


def bench_memory(args):
    """What cropping and normalising images held in memory costs of a training step."""
    settings = argparse.Namespace(img_size=32, min_crop=0.2, seed=0, workers=0, mean=[0.5] * 3, std=[0.25] * 3)
    data = mae.Data(None, vit.toy_shapes(8192)[0], None, [])
    plan = (mae.batches_of(step, 8192, 128, 1, 0, 1)[0] for step in range(10 ** 6))
    crops = mae.crops_of(data, plan, settings, DEVICE)
    step = training_step(*toy_mae(128), plain=False)
    seconds = alternate({"a step of MAE, toy preset": step, "its crops": lambda: mae.normalize(next(crops), settings)}, 10 * args.rounds,
                        torch.cuda.synchronize if DEVICE.type == "cuda" else lambda: None)
    share = statistics.median(b / a for a, b in zip(*seconds.values()))
    table(f"Data in memory, batch 128: loading takes {share:.1%} of a step", 128, "images", seconds)


def bench_mae(args):
    """MAE-Tiny at 224 px, the model alone."""
    batch_size = args.batch_size or (1024 if DEVICE.type == "cuda" else 32)
    compare_training("MAE, ViT-Tiny, 224 px, model only", tiny_mae, batch_size, args, args.rounds)


def bench_end(args):
    """Ten steps of mae.py as users start it, from JPEGs, against the model alone."""
    paths, batch_size = photographs(args), args.batch_size or (256 if DEVICE.type == "cuda" else 32)
    step = training_step(*tiny_mae(batch_size), plain=False, compile=args.compile)
    model_only = alternate({"": step}, args.rounds, torch.cuda.synchronize if DEVICE.type == "cuda" else lambda: None)[""]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "images").mkdir()
        for i in range(10 * batch_size):  # the same files several times
            os.symlink(os.path.abspath(paths[i % len(paths)]), Path(folder) / "images" / f"{i}.jpg")
        output, sys.stdout = sys.stdout, io.StringIO()
        try:
            mae.main(["--data", f"{folder}/images", "--out", f"{folder}/out", "--batch-size", str(batch_size), "--max-steps", "10",
                      "--log-every", "5", *(["--compile"] if args.compile else [])])
        finally:
            sys.stdout = output
        log = [line for line in (Path(folder) / "out" / "log.jsonl").read_text().splitlines()]
    last = json.loads(log[-1])
    print(f"\nEnd to end, mae.py, ViT-Tiny, 224 px, batch {batch_size}: {last['images_per_s']:.1f} images/s, "
          f"{last['data_wait']:.1%} of the time waiting for data; the model alone {batch_size / statistics.median(model_only):.1f} images/s")


PARTS = {"loader": bench_loader, "memory": bench_memory, "mae": bench_mae, "end": bench_end}
OTHERS = {"finetune": ("batch_size", "compile"), "mocov3": ("data", "batch_size"), "distill": None, "analysis": ()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"of: {' '.join([*PARTS, *OTHERS])} (default: all)")
    parser.add_argument("--data", help="a folder of JPEGs")
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name() if DEVICE.type == 'cuda' else f'CPU, {torch.get_num_threads()} threads'}")
    for name in args.parts or [*PARTS, *OTHERS]:
        if name in PARTS:
            PARTS[name](args)
        elif name == "distill":
            importlib.import_module("bench_distill").run(args)
        elif name in OTHERS:
            options = [part for option in OTHERS[name] if (value := getattr(args, option))
                       for part in (f"--{option.replace('_', '-')}", *([] if value is True else [str(value)]))]
            options += ["--amp", "bf16"] if name == "finetune" and DEVICE.type == "cuda" else []
            print(flush=True)
            subprocess.run([sys.executable, ROOT / "tests" / f"bench_{name}.py", *options], check=True)
        else:
            parser.error(f"no part {name}")


if __name__ == "__main__":
    main()
