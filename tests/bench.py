"""Speed and memory, each against the plain way of doing it, in one run.

    python tests/bench.py                                   # all parts, on generated photographs
    python tests/bench.py load end --data DIR               # some parts, on the JPEGs below DIR
    python tests/bench.py mae finetune --batch-size 256 --compile    # on a GPU: bf16
    python tests/bench.py throughput --arch tiny --batch-size 1024   # Table 2's columns

Parts: load (decode, crop, flip, per core), views (samples of MoCo-v3 and DINO, per core), toy (what
loading costs of a toy step), memory (of a loading worker, Linux), mae, finetune, mocov3, distill
(training steps of the network alone), end (a run of mae.py against its network alone), cka (layer
similarity), throughput. Machines are noisy: rounds of the ways alternate, and the ratio is the
median over rounds.
"""
import argparse
import functools
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision import transforms
from torchvision.transforms import v2

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import mae  # noqa: E402
import vit  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


# ------------------------------------------------------------ measuring

def alternate(ways, rounds, clock=time.perf_counter):
    """`{name: function}` in turn, after one warm-up each: `{name: [seconds]}`."""
    def wait():
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
    for way in ways.values():
        way()
    seconds = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            wait()
            began = clock()
            way()
            wait()
            seconds[name].append(clock() - began)
    return seconds


def report(title, count, unit, seconds, memory=()):
    """A row per way: `count` units a second, ratio to the first (median over rounds), memory."""
    print(f"\n{title}\n  {'':36}{unit + '/s':>12}{'ratio':>8}{'peak GB' * bool(memory):>10}")
    plain = next(iter(seconds.values()))
    for i, (name, times) in enumerate(seconds.items()):
        ratio = statistics.median(a / b for a, b in zip(plain, times))
        peak = f"{memory[i]:.2f}" if memory else ""
        speed = count / statistics.median(times)
        print(f"  {name:36}{speed:12.1f}{ratio:8.2f}{peak:>10}", flush=True)


def peak_memory(function):
    """Peak memory in GB of a picklable function, in a process of its own; of a GPU, allocated."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(memory_of, (function,))


def memory_of(function):
    function()
    if DEVICE.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2 ** 30
    status = Path("/proc/self/status")  # Linux
    lines = status.read_text().splitlines() if status.exists() else ["VmHWM: nan"]
    peak = [line for line in lines if line.startswith("VmHWM")][0]
    return float(peak.split()[1]) / 2 ** 20


# ------------------------------------------------------------ training steps of the network alone

def explicit_attention(self, x):
    """Attention as textbooks write it: the scores and their softmax exist in memory."""
    _, _, v = self.heads(x)
    return self.proj((self.scores(x).softmax(-1).to(v.dtype) @ v).transpose(1, 2).flatten(2))


def training_step(make, batch_size, plain=False, compiled=False):
    """A function that trains one step: as the scripts do, or explicit attention, unfused AdamW."""
    torch.manual_seed(0)
    model, loss_of = make(batch_size)
    kernels = {"fused": True}
    if plain:
        kernels = {"foreach": False, "fused": False}
        for module in model.modules():
            if isinstance(module, vit.Attention):
                module.forward = explicit_attention.__get__(module)
    elif compiled:
        model.compile()
    learned = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=1e-4, **kernels)

    def step():
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=DEVICE.type == "cuda"):
            loss = loss_of(model)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return step


def two_steps(make, batch_size, plain, compiled):
    step = training_step(make, batch_size, plain, compiled)
    step()
    step()


def noise_images(batch_size, size=224):
    return torch.randn(batch_size, 3, size, size, device=DEVICE)


def mae_tiny(batch_size, arch="tiny", img_size=224, patch_size=16):
    encoder = vit.ARCHS[arch](img_size=img_size, patch_size=patch_size)
    images = noise_images(batch_size, img_size)

    def loss_of(network):
        loss, _, _ = network(images)
        return loss
    return mae.MaskedAutoencoder(encoder).to(DEVICE), loss_of


def classifier_tiny(batch_size):
    images = noise_images(batch_size)
    targets = torch.rand(batch_size, 1000, device=DEVICE).softmax(1)  # soft, as after mixup

    def loss_of(network):
        return F.cross_entropy(network(images).float(), targets)
    return vit.vit_tiny(num_classes=1000).to(DEVICE), loss_of


def moco_tiny(batch_size):
    import mocov3
    images = noise_images(batch_size)

    def loss_of(network):
        return network(images, images.flip(-1), 0.99)
    return mocov3.MoCoV3(vit.vit_tiny).to(DEVICE), loss_of


def distilled_tiny(batch_size, layers=(11,)):
    import distill
    student = distill.MaskedAutoencoder(vit.vit_tiny(), layers=layers).to(DEVICE)
    teacher = distill.Teacher(vit.vit_base().to(DEVICE), layers)
    images = noise_images(batch_size)

    def loss_of(network):
        noise = torch.rand(batch_size, 196, device=DEVICE)
        loss, _, _, attention_loss = network(images, 0.75, noise, teacher(images, 0.75, noise))
        return loss + attention_loss
    return student, loss_of


def compare(title, ways, args, default):
    """`ways {name: (make, plain)}`, one training step each."""
    batch_size = args.batch_size or (default if DEVICE.type == "cpu" else 256)
    steps = {}
    for name, (make, plain) in ways.items():
        steps[name] = training_step(make, batch_size, plain, args.compile)
    seconds = alternate(steps, args.rounds)
    memory = []
    for make, plain in ways.values():
        twice = functools.partial(two_steps, make, batch_size, plain, args.compile)
        memory.append(peak_memory(twice))
    title = f"{title}, 224 px, batch {batch_size}, network alone"
    report(title, batch_size, "images", seconds, memory)


def part_mae(args):
    ways = {"plain: explicit, unfused": (mae_tiny, True), "here": (mae_tiny, False)}
    compare("MAE, ViT-Tiny", ways, args, 32)


def part_finetune(args):
    ways = {"plain: explicit, unfused": (classifier_tiny, True), "here": (classifier_tiny, False)}
    compare("Fine-tuning, ViT-Tiny", ways, args, 16)


def part_mocov3(args):
    ways = {"plain: explicit, unfused": (moco_tiny, True), "here": (moco_tiny, False)}
    compare("MoCo-v3, ViT-Tiny", ways, args, 8)


def part_distill(args):
    every = functools.partial(distilled_tiny, layers=tuple(range(12)))
    ways = {
        "MAE without a teacher": (mae_tiny, False),
        "ViT-Base teaches the last block": (distilled_tiny, False),
        "ViT-Base teaches all blocks": (every, False)}
    compare("Distillation of ViT-Tiny", ways, args, 16)


# ------------------------------------------------------------ loading

def photographs(args):
    """A folder of JPEGs: --data, or 64 generated ones of 500 x 375 pixels."""
    if args.data:
        return args.data
    rng = np.random.default_rng(0)
    folder = tempfile.mkdtemp()
    for i in range(64):
        coarse = Image.fromarray(rng.integers(0, 255, (47, 63, 3), dtype=np.uint8))
        coarse = coarse.resize((500, 375), Image.BICUBIC)
        fine = np.asarray(coarse).astype(int) + rng.integers(-12, 12, (375, 500, 1))
        Image.fromarray(fine.clip(0, 255).astype(np.uint8)).save(f"{folder}/{i}.jpg", quality=90)
    return folder


def part_load(args):
    """One core: crops of photographs by torchvision's usual pipeline on PIL, and by mae.py."""
    usual = transforms.Compose([
        transforms.RandomResizedCrop(224, interpolation=transforms.InterpolationMode.BICUBIC),
        transforms.RandomHorizontalFlip(), transforms.ToTensor(),
        transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for crops in (1, 4):
        words = ["--data", photographs(args), "--crops-per-image", str(crops)]
        settings = mae.parse(words, mae.settings, mae.PRESETS, out="")
        data = mae.open_data(settings, train=True)
        samples = mae.Samples(data, settings)
        number = min(100, len(data))
        paths = [os.path.join(data.root, os.fsdecode(path)) for path in data.paths[:number]]

        def plain():
            for path in paths:
                for _ in range(crops):
                    usual(Image.open(path).convert("RGB"))

        def here():
            for v in range(number):
                _ = samples[v]
        ways = {"plain: PIL, one decoding a crop": plain, "here": here}
        seconds = alternate(ways, args.rounds, clock=time.process_time)
        report(f"Loading, one core, {crops} a decoded image", crops * number, "crops", seconds)
    torch.set_num_threads(threads)


def part_views(args):
    """One core: samples of mocov3.py and dino.py, and as v2's transforms make them from 8 bits."""
    import dino
    import mocov3
    words = ["--data", photographs(args)]

    def plain_view(samples, crop, blur, *last):
        jitter = v2.RandomApply([samples.jitter], p=0.8)
        gray = v2.RandomGrayscale(0.2)
        return v2.Compose([crop, jitter, gray, blur, *last, v2.RandomHorizontalFlip()])

    def measure(title, module, samples, views):
        number = min(100, len(samples.data))

        def plain():
            for v in range(number):
                image, _ = samples.data[module.shuffled(v, len(samples.data), 0)]
                for view in views:
                    view(image)

        def here():
            for v in range(number):
                _ = samples[v]
        ways = {"plain: v2, blur in two dimensions": plain, "here": here}
        seconds = alternate(ways, args.rounds, clock=time.process_time)
        report(f"{title}, one core, {number} JPEGs", number, "samples", seconds)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    blur = v2.GaussianBlur(23, (0.1, 2.0))
    seldom = v2.RandomApply([blur], p=0.1)
    often = v2.RandomApply([blur], p=0.5)
    solarize = v2.RandomSolarize(threshold=128, p=0.2)

    settings = mocov3.parse(words, mocov3.settings, mocov3.PRESETS, out="")
    samples = mocov3.Samples(mocov3.open_data(settings, train=True), settings)
    first = plain_view(samples, samples.crop, blur)
    second = plain_view(samples, samples.crop, seldom, solarize)
    measure("MoCo-v3: two views of an image", mocov3, samples, [first, second])

    settings = dino.parse(words, dino.settings, dino.PRESETS, out="")
    samples = dino.Samples(dino.open_data(settings, train=True), settings)
    first = plain_view(samples, samples.global_crop, blur)
    second = plain_view(samples, samples.global_crop, seldom, solarize)
    local = plain_view(samples, samples.local_crop, often)
    views = [first, second] + [local] * settings.local_crops
    measure("DINO: ten crops of an image", dino, samples, views)
    torch.set_num_threads(threads)


def part_toy(args):
    settings = mae.parse([], mae.settings, mae.PRESETS, out="")
    samples = mae.Samples(mae.open_data(settings, train=True), settings)
    batches = iter(torch.utils.data.DataLoader(samples, 128, sampler=range(10 ** 9)))
    step = training_step(functools.partial(mae_tiny, arch="toy", img_size=32, patch_size=4), 128)
    ways = {"a training step": step, "loading its images": functools.partial(next, batches)}
    seconds = alternate(ways, 10 * args.rounds)
    report("Toy images, batch 128", 128, "images", seconds)


def part_memory(args):
    """What a worker's private memory grows by in one epoch over 1.28 million images' paths."""
    print("\nPrivate memory of a worker, growth in one epoch over 1,281,167 paths")
    fork = multiprocessing.get_context("fork")
    ways = {"plain: a list of tuples": list_of_paths, "here: an array": array_of_paths}
    for title, make in ways.items():
        paths = make(1_281_167)
        receiver, sender = multiprocessing.Pipe()
        worker = fork.Process(target=look_at_all, args=(paths, sender))
        worker.start()
        print(f"  {title:36}{receiver.recv() / 1e6:12.1f} MB", flush=True)
        worker.join()
        del paths


def list_of_paths(n):
    return [(f"n{i // 1280:08d}/n{i // 1280:08d}_{i:08d}.JPEG", i // 1280) for i in range(n)]


def array_of_paths(n):
    return np.array([os.fsencode(path) for path, _ in list_of_paths(n)])


def look_at_all(paths, sender):
    """An epoch of a worker: its share of sample numbers, one of 8, in shuffled order."""
    mae.permutation(len(paths), 0, 0)  # the order itself, 5 MB, is the same in both ways
    before = private_bytes()
    for v in range(0, len(paths), 8):
        _ = paths[mae.shuffled(v, len(paths), seed=0)]
    sender.send(private_bytes() - before)


def private_bytes():
    text = Path("/proc/self/smaps_rollup").read_text()
    lines = [line for line in text.splitlines() if line.startswith("Private_")]
    return 1024 * sum(int(line.split()[1]) for line in lines)


def part_end(args):
    """Ten steps of mae.py as users start it, from JPEGs, against the network alone."""
    batch_size = args.batch_size or (32 if DEVICE.type == "cpu" else 256)
    step = training_step(mae_tiny, batch_size, compiled=args.compile)
    seconds = alternate({"alone": step}, args.rounds)["alone"]
    alone = batch_size / statistics.median(seconds)
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, ROOT / "mae.py", "--data", photographs(args), "--out", out,
                   "--max-steps", "20", "--batch-size", str(batch_size), "--epochs", "1000"]
        if args.compile:
            command.append("--compile")
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        last = json.loads((Path(out) / "log.jsonl").read_text().splitlines()[-1])
    print(f"\nEnd to end, mae.py, ViT-Tiny, 224 px, batch {batch_size}: "
          f"{last['images_per_s']:.1f} images/s, of which {last['data_wait']:.1%} "
          f"waiting for data; the network alone {alone:.1f} images/s")


# ------------------------------------------------------------ analysis and inference

def part_cka(args):
    """All 13 x 13 layers of two ViT-Tiny, 64 images in mini-batches of 32."""
    import analysis

    def layers():
        return [torch.randn(32, 196, 192) for _ in range(13)]
    batches = [(layers(), layers()) for _ in range(2)]

    def gram(x):
        x = x.flatten(1).double()
        return x @ x.T

    def hsic(K, L):
        n = len(K)
        K = K.clone().fill_diagonal_(0)
        L = L.clone().fill_diagonal_(0)
        sums = K.sum() * L.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (K.sum(0) @ L.sum(0))
        return ((K * L).sum() + sums) / (n * (n - 3))

    def plain():
        for a, b in batches:
            for x in a:
                for y in b:
                    K = gram(x)
                    L = gram(y)
                    hsic(K, L)
                    hsic(K, K)
                    hsic(L, L)

    def here():
        cka = analysis.CKA(13, 13)
        for a, b in batches:
            cka.update(a, b)
        cka.compute()
    seconds = alternate({"plain: a double loop": plain, "here": here}, args.rounds)
    report("CKA of 13 x 13 layers, 64 images", 64, "images", seconds)


def part_throughput(args):
    """Images per second in evaluation and parameters (Table 2)."""
    model = vit.ARCHS[args.arch](num_classes=1000, num_heads=args.num_heads).to(DEVICE).eval()
    if args.compile:
        model.compile()
    batch_size = args.batch_size or (32 if DEVICE.type == "cpu" else 1024)
    images = noise_images(batch_size)

    @torch.inference_mode()
    def forward():
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=args.amp):
            model(images)
    way = f"ViT-{args.arch}, {args.num_heads} heads"
    seconds = alternate({way: forward}, args.rounds)
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    title = f"Throughput, {parameters:.2f}M parameters, 224 px, batch {batch_size}"
    report(title, batch_size, "images", seconds)


PARTS = {name[5:]: part for name, part in list(globals().items()) if name.startswith("part_")}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"of: {' '.join(PARTS)} (default: all)")
    parser.add_argument("--data", help="a folder of JPEGs")
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--arch", choices=vit.ARCHS, default="tiny")
    parser.add_argument("--num-heads", type=int, default=12, help="in throughput; DeiT-Tiny: 3")
    parser.add_argument("--amp", action="store_true", help="bf16 in throughput")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    unknown = set(args.parts) - set(PARTS)
    if unknown:
        parser.error(f"no part {' '.join(sorted(unknown))}")
    device = f"CPU, {torch.get_num_threads()} threads"
    if DEVICE.type == "cuda":
        device = torch.cuda.get_device_name()
    print(f"torch {torch.__version__}, {device}, {os.cpu_count()} cores")
    for name in args.parts or PARTS:
        PARTS[name](args)


if __name__ == "__main__":
    main()
