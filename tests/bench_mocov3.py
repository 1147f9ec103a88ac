"""Benchmark of mocov3.py: making two views against the usual PIL pipeline; the model's step against the plain way.

    python tests/bench_mocov3.py --data DIR       # photographs, as mocov3.py takes them: both parts
    python tests/bench_mocov3.py                  # the model alone

Views, 224 px, milliseconds per image (both views) on one core. PIL: open once, then per view RandomResizedCrop (bicubic),
ColorJitter, RandomGrayscale, GaussianBlur, solarise, flip, ToTensor, Normalize, as MoCo-v3's loader does. Here: a worker decodes
once and cuts two crops; jitter, grey, blur, solarise, normalisation are batch operations on the training device. Beside a GPU
that first part is all a core has to do; without one it does both.

Model: forward, backward and momentum encoder, of ViT-Tiny on a GPU, of the toy preset on a CPU. Plain: attention with explicit
scores, each view through the encoder by itself, not compiled.
"""
import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import mocov3  # noqa: E402
import vit  # noqa: E402


def seconds(work, repeats=3):
    """The shortest of some runs, after one to warm up."""
    times = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return min(times[1:])


def pil_view(blur, solarise):
    """One of MoCo-v3's two views, as torchvision's PIL transforms."""
    import random
    from PIL import ImageFilter, ImageOps
    from torchvision import transforms as T
    return T.Compose([
        T.RandomResizedCrop(224, (0.08, 1), interpolation=T.InterpolationMode.BICUBIC),
        T.RandomApply([T.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
        T.RandomGrayscale(0.2),
        T.RandomApply([lambda image: image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2)))], p=blur),
        T.RandomApply([ImageOps.solarize], p=solarise),
        T.RandomHorizontalFlip(), T.ToTensor(), T.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])])


def bench_views(folder, images):
    """Rows of (what, milliseconds per image)."""
    from PIL import Image
    data = mocov3.folder_data(folder, train=True)
    if data.files is None:
        raise SystemExit(f"{folder}: images of at most 64 pixels; the benchmark wants photographs")
    data.files = data.files[np.linspace(0, len(data.files) - 1, min(images, len(data.files))).astype(int)]
    count, device = len(data.files), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    args = argparse.Namespace(img_size=224, min_crop=0.08, seed=0, mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225],
                              **{name: mocov3.PRESETS["photos"][name] for name in ("jitter", "grey", "blur_sigma")})
    first, second = pil_view(1.0, 0.0), pil_view(0.1, 0.2)

    def usual():
        for path in data.files:
            image = Image.open(path.decode()).convert("RGB")
            first(image), second(image)

    cropper = mocov3.Crops(data, args, 2, None)

    def load():
        return [cropper.__getitems__(range(first, min(first + 32, count))) for first in range(0, count, 32)]
    loaded = load()

    def views():
        for step, crops in enumerate(loaded):
            batch = mocov3.Batch(step, 0, len(crops), range(len(crops)), 1.0)
            mocov3.two_views(crops.to(device).flatten(0, 1).permute(0, 3, 1, 2).contiguous().float(), batch, args)

    rows = [("PIL, both views", usual), ("here: decode once, two crops", load),
            (f"here: views, on {'the GPU' if device.type == 'cuda' else 'this core'}", views)]
    return [(name, 1000 * seconds(work) / count) for name, work in rows]


class PlainMoCo(mocov3.MoCoV3):
    """The same step as it is usually written: explicit scores, one view at a time."""

    @staticmethod
    def project(encoder, x1, x2):
        tokens = [mocov3.class_tokens(encoder, x) for x in (x1, x2)]
        return torch.cat(tokens), *map(encoder.head, tokens)


def bench_model(batch):
    """Rows of (what, images per second), one step without the optimizer."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    preset = mocov3.PRESETS["photos" if device.type == "cuda" else "toy"]
    sizes = {name: preset[name] for name in ("img_size", "patch_size")}
    x1, x2 = (torch.randn(batch, 3, preset["img_size"], preset["img_size"], device=device) for _ in range(2))
    rows, attention = [], vit.Attention.forward
    for name in ("plain", "here", "here, --compile")[:3 if device.type == "cuda" else 2]:
        torch.manual_seed(0)
        model = (PlainMoCo if name == "plain" else mocov3.MoCoV3)(
            lambda **pool: vit.ARCHS[preset["arch"]](**sizes, **pool), preset["dim"], preset["mlp_dim"]).to(device)
        explicit = lambda self, x, scores=False: (attention(self, x, True)[0], None)  # noqa: E731
        vit.Attention.forward = explicit if name == "plain" else attention
        if "compile" in name:
            model.compile()

        def step():
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                loss = model(x1, x2, 0.99)
            loss.backward()
            model.zero_grad()
        rows.append((name, batch / seconds(step)))
    vit.Attention.forward = attention
    return rows


def bench(args):
    """Both parts, printed; `args.data` (photographs, or None) and `args.batch_size` (or None)."""
    cuda = torch.cuda.is_available()
    if args.data:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        usual, cores, rest = bench_views(Path(args.data), getattr(args, "images", 128))
        torch.set_num_threads(threads)
        for name, ms in (usual, cores, rest):
            print(f"{name:32} {ms:7.2f} ms / image")
        print(f"views per core: {usual[1] / cores[1]:.1f} times PIL beside a GPU" +
              ("" if cuda else f", {usual[1] / (cores[1] + rest[1]):.1f} times where the core does all"))
    rows = bench_model(args.batch_size or (256 if cuda else 64))
    for name, rate in rows:
        print(f"model, {name:25} {rate:7.1f} images / s, {rate / rows[0][1]:.2f} times plain")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="photographs; without them only the model is measured")
    parser.add_argument("--images", type=int, default=128, help="photographs to measure with")
    parser.add_argument("--batch-size", type=int, help="of the model's step (default: 256 on a GPU, 64 on a CPU)")
    args = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name() if torch.cuda.is_available() else 'CPU'}")
    bench(args)


if __name__ == "__main__":
    main()
