"""MAE: a Vision Transformer learns by filling in images (He et al., 2022), here ViT-Tiny with a one-block decoder.

Three quarters of the patches are removed. The encoder sees only the rest; a small decoder gets the encoded patches, a mask
token in each empty place, and predicts the pixels that were there. What is kept in the end is the encoder. The recipe is
that of A Closer Look at Self-Supervised Lightweight Vision Transformers (ICML 2023, Sec. 2).

    loss = mean over removed patches of (prediction - target)^2,  target = the patch's pixels, normalised per patch

Run it
    laptop      python mae.py                                            # drawn shapes, no download, about 2 minutes
    small       python mae.py --data cifar100 --download                 # 32 x 32 images: patch 4, held in memory
    one GPU     python mae.py --data DIR --accum 8 --compile             # DIR/train/CLASS/*.jpg, DIR/val/CLASS/*.jpg
    8 GPUs      torchrun --nproc_per_node=8 mae.py --data DIR            # the paper's run: 400 epochs, batch 4096
    two nodes   torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 mae.py --data DIR
    look again  python mae.py --reconstruct runs/mae/last.pt
Results land in --out: config.json, log.jsonl, last.pt, loss.png, reconstruction.png. --resume continues.

Shapes in the comments: B images, L patches, D width, p patch size.
"""
import argparse
import contextlib
import functools
import json
import math
import os
import random
import re
import resource
import signal
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import torch
import torch.distributed as dist
import torchvision
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torchvision.transforms import v2
from tqdm import tqdm

import vit

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (after the choice of a backend that needs no screen)


# ------------------------------------------------------------------------------------------------ the method

def patchify(images, patch_size):
    """`(B, 3, H, W) -> (B, L, p*p*3)`: patches in raster order, pixels inside a patch ordered (p, p, 3)."""
    B, C, H, W = images.shape
    x = images.reshape(B, C, H // patch_size, patch_size, W // patch_size, patch_size)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(B, -1, patch_size * patch_size * C)


def unpatchify(patches, patch_size):
    """`(B, L, p*p*3) -> (B, 3, H, W)` of a square image: the inverse of `patchify`."""
    B, L, _ = patches.shape
    side = math.isqrt(L)
    x = patches.reshape(B, side, side, patch_size, patch_size, -1)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(B, -1, side * patch_size, side * patch_size)


def random_masking(tokens, mask_ratio, noise=None):
    """Keeps the `int(L * (1 - mask_ratio))` tokens with the smallest noise (MAE, Sec. 3).

    tokens `(B, L, D)`, noise `(B, L)` (default: uniform). Returns the kept tokens `(B, n, D)`, the mask `(B, L)`, 1 =
    removed, and `ids_restore (B, L)`: position l of the image is entry `ids_restore[l]` of (kept, then removed).
    """
    B, L, D = tokens.shape
    noise = torch.rand(B, L, device=tokens.device) if noise is None else noise
    keep = int(L * (1 - mask_ratio))
    ids_shuffle = noise.argsort(dim=1)                       # smallest noise first
    ids_restore = ids_shuffle.argsort(dim=1)                 # the inverse permutation
    kept = tokens.gather(1, ids_shuffle[:, :keep, None].expand(-1, -1, D))
    mask = (ids_restore >= keep).to(tokens.dtype)
    return kept, mask, ids_restore


class MaskedAutoencoder(nn.Module):
    """An encoder that sees only what is left of an image, and a decoder that predicts what was removed.

    `encoder` is a `vit.VisionTransformer`; its final LayerNorm here normalises every token, so a mean-pooling one is made
    to pool by class token. Decoder of 1 block, 96 wide, 3 heads: the study's, for a tiny encoder.
    """

    def __init__(self, encoder, decoder_dim=96, decoder_depth=1, decoder_heads=3, norm_pix_loss=True):
        super().__init__()
        if encoder.global_pool == "avg":
            encoder.norm, encoder.fc_norm, encoder.global_pool = encoder.fc_norm, nn.Identity(), "token"
        self.encoder, self.norm_pix_loss = encoder, norm_pix_loss
        pixels = encoder.patch_size ** 2 * encoder.patch_embed.proj.in_channels
        self.decoder_embed = nn.Linear(encoder.embed_dim, decoder_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_dim))
        self.decoder_pos_embed = nn.Parameter(vit.sincos_position(decoder_dim, encoder.grid), requires_grad=False)
        self.decoder_blocks = nn.ModuleList(vit.Block(decoder_dim, decoder_heads) for _ in range(decoder_depth))
        self.decoder_norm = nn.LayerNorm(decoder_dim, eps=1e-6)
        self.decoder_pred = nn.Linear(decoder_dim, pixels)
        nn.init.normal_(self.mask_token, std=0.02)
        for part in (self.decoder_embed, self.decoder_blocks, self.decoder_pred):
            vit.init_weights(part)

    def decode(self, x, ids_restore, grid):
        """Encoded tokens `(B, 1 + n, D)`, class token first, to a prediction for every patch, `(B, L, p*p*3)`."""
        x = self.decoder_embed(x)
        B, L = ids_restore.shape
        mask_tokens = self.mask_token.to(x.dtype).expand(B, L + 1 - x.shape[1], -1)
        patches = torch.cat([x[:, 1:], mask_tokens], dim=1)                            # kept, then removed
        patches = patches.gather(1, ids_restore[:, :, None].expand(-1, -1, x.shape[2]))  # back in raster order
        x = torch.cat([x[:, :1], patches], dim=1) + vit.resize_position(self.decoder_pos_embed, grid)
        for block in self.decoder_blocks:
            x, _ = block(x)
        return self.decoder_pred(self.decoder_norm(x))[:, 1:]

    def target(self, images):
        """What is to be predicted, `(B, L, p*p*3)`: pixels, by default normalised per patch (Sec. 3; variance with n - 1)."""
        target = patchify(images, self.encoder.patch_size)
        if self.norm_pix_loss:
            target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
        return target

    def forward(self, images, mask_ratio=0.75, noise=None):
        """images `(B, 3, H, W)` -> loss (a number), pred `(B, L, p*p*3)`, mask `(B, L)`, 1 = removed and counted."""
        grid = [side // self.encoder.patch_size for side in images.shape[-2:]]
        tokens = self.encoder.embed(images)                                            # (B, L, D)
        kept, mask, ids_restore = random_masking(tokens, mask_ratio, noise)            # (B, n, D)
        latent = self.encoder.norm(self.encoder.encode(kept))                          # (B, 1 + n, D)
        pred = self.decode(latent, ids_restore, grid)
        error = ((pred.to(images.dtype) - self.target(images)) ** 2).mean(dim=-1)      # (B, L), in the images' precision
        loss = (error * mask).sum() / mask.sum().clamp(min=1)                          # nothing removed: loss 0
        return loss, pred, mask


# ------------------------------------------------------------------------------------------------ pictures

@torch.no_grad()
def draw_reconstructions(path, model, images, args, title):
    """Held-out images, what the encoder saw, the output, and the output with the visible patches pasted in, as PNG.

    `images (n, 3, S, S)` normalised. Norm-pix is undone with each patch's own mean and deviation.
    """
    model.eval()
    p = args.patch_size
    noise = torch.rand(len(images), model.encoder.grid ** 2, generator=torch.Generator().manual_seed(0)).to(images.device)
    _, pred, mask = model.forward(images, args.mask_ratio, noise)  # not the compiled call: these are fewer images
    model.train()
    original, pred, mask = patchify(images, p), pred.to(images.dtype), mask[:, :, None]
    if model.norm_pix_loss:
        pred = pred * (original.var(-1, keepdim=True) + 1e-6).sqrt() + original.mean(-1, keepdim=True)
    rows = {"original": original, "masked": original * (1 - mask), "output": pred,
            "output +\nvisible": original * (1 - mask) + pred * mask}
    figure, axes = plt.subplots(len(rows), len(images), figsize=(1.15 * len(images) + 0.6, 4.9), squeeze=False)
    std, mean = (torch.tensor(v, device=images.device).view(3, 1, 1) for v in (args.std, args.mean))
    for axis_row, (name, patches) in zip(axes, rows.items()):
        pixels = (unpatchify(patches, p) * std + mean).clamp(0, 1).permute(0, 2, 3, 1).cpu().numpy()
        for axis, image in zip(axis_row, pixels):
            axis.imshow(image)
            axis.set(xticks=[], yticks=[])
        axis_row[0].set_ylabel(name)
    figure.suptitle(title, fontsize=11)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def draw_curve(folder, title):
    """The loss over the epochs, from log.jsonl, as loss.png."""
    entries = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    figure, axis = plt.subplots(figsize=(7, 3.5))
    axis.plot([entry["epoch"] for entry in entries], [entry["loss"] for entry in entries])
    axis.set(xlabel="epoch", ylabel="loss on removed patches", title=title)
    axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(folder / "loss.png", dpi=100)
    plt.close(figure)


# ------------------------------------------------------------------------------- data (the same in every script)

class BadInput(Exception):
    """Something the user can mend: one line that names it, exit code 2."""


@dataclass
class Data:
    """Images on disk (`files`) or, where they are small, in memory (`pixels (n, 3, H, W)` uint8), with labels `(n,)` or None."""
    files: np.ndarray | None
    pixels: torch.Tensor | None
    labels: np.ndarray | None
    classes: list

    def __len__(self):
        return len(self.files if self.pixels is None else self.pixels)


NAMED = ("cifar10", "cifar100", "fashionmnist", "flowers102", "pets", "aircraft", "cars", "inat2018")


def open_data(args, train):
    """The training or the held-out images of `--data`, as `Data`; None when a folder has no `val/` or `test/`. BadInput."""
    if args.data == "toy":
        pixels, labels = vit.toy_shapes(8192 if train else 1024, args.img_size or 32, seed=0 if train else 1)
        data = Data(None, pixels, labels.numpy(), list(vit.TOY_CLASSES))
    else:
        data = named_data(args, train) if args.data in NAMED else folder_data(Path(args.data), train)
    if data is None or not train or (args.fraction == 1 and not args.long_tail):
        return data
    kept = subset(data, args)
    return replace(data, files=None if data.files is None else data.files[kept],
                   pixels=None if data.pixels is None else data.pixels[torch.from_numpy(kept)],
                   labels=None if data.labels is None else data.labels[kept])


def open_splits(args, rank):
    """The training and the held-out images (None if there are none); where there is a download, rank 0 goes first."""
    if args.download and rank > 0:
        dist.barrier()
    train, held_out = open_data(args, train=True), open_data(args, train=False)
    if args.download and rank == 0 and dist.is_initialized():
        dist.barrier()
    if held_out is not None and (train.labels is None) == (held_out.labels is None) and train.classes != held_out.classes:
        raise BadInput(f"--data {args.data}: the held-out images have other classes than the training images, "
                       f"first {sorted(map(str, set(train.classes) ^ set(held_out.classes)))[0]}")
    return train, held_out


def folder_data(root, train):
    """`root/train/CLASS/*`, `root/val/CLASS/*` (or `test`); for training also a folder without splits or without classes."""
    if not root.is_dir():
        raise BadInput(f"--data {root}: no such folder (nor one of: toy {' '.join(NAMED)})")
    splits = [root / name for name in (("train",) if train else ("val", "test")) if (root / name).is_dir()]
    if not splits and not train:
        return None
    split = splits[0] if splits else root
    paths = sorted(os.path.join(folder, name) for folder, _, names in os.walk(split, followlinks=True) for name in names
                   if name.lower().endswith((".jpg", ".jpeg", ".png", ".webp")))
    if not paths:
        raise BadInput(f"--data {split}: no images (.jpg .jpeg .png .webp) in it")
    kinds = [os.path.relpath(path, split).split(os.sep)[:-1] for path in paths]
    classes = sorted({kind[0] for kind in kinds if kind}, key=lambda kind: (int(kind) if kind.isdigit() else -1, kind))
    index = {kind: i for i, kind in enumerate(classes)}
    labels = np.array([index[kind[0]] for kind in kinds]) if all(kinds) else None
    files = np.array([os.fsencode(path) for path in paths])  # one block of bytes: workers share it without copying
    if max(read_image(paths[0]).shape) > 64:
        return Data(files, None, labels, classes)
    with ThreadPoolExecutor(os.cpu_count()) as pool:         # small images: decoded once, kept
        pixels = list(pool.map(read_image, paths))
    sizes = {tuple(image.shape) for image in pixels}
    if len(sizes) > 1:
        raise BadInput(f"--data {split}: small images must have one size, found {sorted(sizes)[0]} and {sorted(sizes)[1]}")
    return Data(None, torch.stack(pixels), labels, classes)


def named_data(args, train):
    """A torchvision data set of the paper; training takes train + val where the paper's sizes say so."""
    sets, root, options = torchvision.datasets, args.root, {"download": args.download}
    try:
        if args.data in ("cifar10", "cifar100"):
            part = (sets.CIFAR10 if args.data == "cifar10" else sets.CIFAR100)(root, train, **options)
            return Data(None, torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(), np.array(part.targets), part.classes)
        if args.data == "fashionmnist":  # grey, 28 px: a border makes it 32
            part = sets.FashionMNIST(root, train, **options)
            pixels = nn.functional.pad(part.data, (2, 2, 2, 2))[:, None].repeat(1, 3, 1, 1)
            return Data(None, pixels, part.targets.numpy(), part.classes)
        if args.data == "inat2018":  # torchvision's class knows no split: the challenge's own lists do
            folder = Path(root) / "inat2018"
            listing = json.loads((folder / ("train2018.json" if train else "val2018.json")).read_text())
            files = {image["id"]: str(folder / image["file_name"]) for image in listing["images"]}
            pairs = [(files[entry["image_id"]], entry["category_id"]) for entry in listing["annotations"]]
            classes = [str(kind["id"]) for kind in listing["categories"]]
        else:
            parts = {"flowers102": lambda: [sets.Flowers102(root, s, **options) for s in (("train", "val") if train else ("test",))],
                     "pets": lambda: [sets.OxfordIIITPet(root, "trainval" if train else "test", **options)],
                     "aircraft": lambda: [sets.FGVCAircraft(root, "trainval" if train else "test", **options)],
                     "cars": lambda: [sets.StanfordCars(root, "train" if train else "test")]}[args.data]()
            pairs = [(str(path), label) for part in parts for path, label in
                     (part._samples if args.data == "cars" else
                      zip(part._images if args.data == "pets" else part._image_files, part._labels))]
            classes = list(parts[0].classes) if hasattr(parts[0], "classes") else sorted({label for _, label in pairs})
    except (RuntimeError, OSError, ImportError) as error:
        if "scipy" in str(error).lower():
            raise BadInput(f"--data {args.data}: torchvision reads its labels with SciPy: pip install scipy") from None
        by_hand = {"cars": "its server is gone: put stanford_cars/ as torchvision lays it out",
                   "inat2018": "put train2018.json, val2018.json and train_val2018/ (github.com/visipedia/inat_comp) into inat2018/"}
        raise BadInput(f"--data {args.data}: not in --root {root} ({by_hand.get(args.data, '--download fetches it')}): "
                       f"{str(error).splitlines()[0]}") from None
    return Data(np.array([os.fsencode(path) for path, _ in pairs]), None, np.array([label for _, label in pairs]), classes)


def subset(data, args):
    """The sorted indices that `--fraction` (of each class) and `--long-tail` leave, chosen by `--seed`.

    Long tail: class sizes of ImageNet-LT (Liu et al., 2019), a Pareto distribution with power 6, from 1280 down to 5 images.
    """
    labels = np.zeros(len(data), int) if data.labels is None else data.labels
    if args.long_tail and len(np.unique(labels)) < 2:
        raise BadInput("--long-tail: needs images in class folders")
    rng = np.random.default_rng((args.seed, 1))
    kinds = rng.permutation(np.unique(labels))
    kept = []
    for i, kind in enumerate(kinds):
        pareto = [((k + 1) / (len(kinds) + 1)) ** (-1 / 6) - 1 for k in (i, 0)]
        share = args.fraction * (max(5 / 1280, pareto[0] / pareto[1]) if args.long_tail else 1)
        members = rng.permutation(np.flatnonzero(labels == kind))
        kept.append(members[:max(1, round(share * len(members)))])
    return np.sort(np.concatenate(kept))


def read_image(path):
    """Decodes a file to RGB uint8 `(3, H, W)`. BadInput naming a file that cannot be read."""
    try:
        return torchvision.io.decode_image(torchvision.io.read_file(path), torchvision.io.ImageReadMode.RGB)
    except RuntimeError as error:  # "decode_jpeg, file.cpp:171, Image is truncated": the end is for the user
        raise BadInput(f"{path}: unreadable image ({re.split(r'[.]cpp:[0-9]+, ', str(error))[-1].splitlines()[0]})") from None


def image_at(data, i):
    """Image i of a `Data`, uint8 `(3, H, W)`."""
    return read_image(os.fsdecode(data.files[i])) if data.pixels is None else data.pixels[i]


# ------------------------------------------------------------------------- batches (the same in every script)
# A run is a function of (seed, step): "visit" v of the endless stream of images looks at image permutation[v // n][v % n],
# and every random number comes from (seed, step, row) or (seed, visit). So resuming, workers and ranks change nothing.

class Batch(NamedTuple):
    """A rank's micro-batch: the rows `rows` of the `count` visits from `first` on that make up step `step`."""
    step: int
    first: int
    count: int
    rows: range
    weight: float  # of its mean loss, so that ranks and micro-batches add up to the mean over the whole step


def seeded(*numbers):
    """A seed from several numbers, well mixed."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def batches_of(step, visits, batch_size, accum, rank, world):
    """The micro-batches of one step on this rank; an epoch is `visits` visits, its last step takes what is left."""
    epoch, i = divmod(step, math.ceil(visits / batch_size))
    first = epoch * visits + i * batch_size
    count = min(batch_size, (epoch + 1) * visits - first)
    rows, size = range(rank, count, world), math.ceil(batch_size / (world * accum))
    if not rows:  # fewer images than ranks: this one looks at row 0, for nothing
        return [Batch(step, first, count, range(1), 0.0)]
    parts = [rows[k:k + size] for k in range(0, len(rows), size)]
    return [Batch(step, first, count, part, len(part) * world / count) for part in parts]


def draw(batch, *shape, seed, device):
    """Uniform numbers `(len(batch.rows), *shape)`, the same whatever rank and micro-batch a row falls to."""
    generator = torch.Generator(device).manual_seed(seeded(seed, batch.step, *shape))
    numbers = torch.rand((batch.count, *shape), generator=generator, device=device)
    return numbers[batch.rows.start:batch.rows.stop:batch.rows.step]


@functools.lru_cache(maxsize=2)
def permutation(count, seed, epoch):
    return np.random.default_rng((seed, epoch)).permutation(count)


def image_of(visit, count, seed):
    return int(permutation(count, seed, visit // count)[visit % count])


def leave_group(_):
    """Workers outlive a SIGTERM to the whole process group (torchrun, a scheduler, Ctrl-C): the run then ends in order."""
    os.setpgrp()


class Crops(torch.utils.data.Dataset):
    """Visit v gives `crops` random crops of one image, uint8 `(crops, S, S, 3)`, from one decoding; then `augment` each.

    Channels come last, as the decoder leaves them: the device turns a batch round faster than a core its images.
    """

    def __init__(self, data, args, crops, augment):
        self.data, self.args, self.crops, self.augment = data, args, crops, augment

    def __getitems__(self, visits):
        batch = torch.empty(len(visits), self.crops, self.args.img_size, self.args.img_size, 3, dtype=torch.uint8)
        for crops, visit in zip(batch, visits):
            image = image_at(self.data, image_of(visit, len(self.data), self.args.seed))
            rng = random.Random(f"{self.args.seed} {visit}")
            for crop in crops:
                crop.copy_(self.crop(image, rng).permute(1, 2, 0))
        return batch

    def crop(self, image, rng):
        """RandomResizedCrop and flip with torchvision's distribution; plain numbers, for tensors of one cost a tenth of the decoding."""
        H, W = image.shape[1:]
        for _ in range(10):
            area, ratio = H * W * rng.uniform(self.args.min_crop, 1), (4 / 3) ** rng.uniform(-1, 1)
            h, w = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
            if 0 < h <= H and 0 < w <= W:
                top, left = rng.randint(0, H - h), rng.randint(0, W - w)
                break
        else:  # the image is too long: its middle
            h, w = min(H, round(W * 4 / 3)), min(W, round(H * 4 / 3))
            top, left = (H - h) // 2, (W - w) // 2
        crop = image[None, :, top:top + h, left:left + w].contiguous(memory_format=torch.channels_last)
        crop = nn.functional.interpolate(crop, [self.args.img_size] * 2, mode="bicubic", antialias=True)[0]
        crop = crop.flip(-1) if rng.random() < 0.5 else crop
        if self.augment:
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(rng.getrandbits(63))
                crop = self.augment(crop)
        return crop


def crop_boxes(u, height, width, min_crop):
    """RandomResizedCrop's draw for many images at once: uniform numbers `(n, 22)` to boxes `(n, 4)`: top, left, height, width."""
    area = height * width * (min_crop + (1 - min_crop) * u[:, :10])  # ten tries each, the first that fits counts
    ratio = torch.exp(math.log(3 / 4) + math.log(16 / 9) * u[:, 10:20])
    w, h = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()
    fits = (w <= width) & (h <= height) & (w > 0) & (h > 0)
    first = fits.int().argmax(1, keepdim=True)
    whole = torch.tensor([min(height, round(width * 4 / 3)), min(width, round(height * 4 / 3))], device=u.device)
    h, w = (torch.where(fits.any(1), x.gather(1, first)[:, 0], x0) for x, x0 in ((h, whole[0]), (w, whole[1])))
    top, left = (u[:, 20] * (height - h + 1)).floor(), (u[:, 21] * (width - w + 1)).floor()
    centre = ~fits.any(1)
    return torch.stack([torch.where(centre, ((height - h) / 2).floor(), top),
                        torch.where(centre, ((width - w) / 2).floor(), left), h, w], dim=1)


def resize_matrix(start, length, source, size):
    """Antialiased bicubic resampling of pixels `[start, start + length)` as matrices `(n, size, source)`."""
    start, length = start[:, None, None], length[:, None, None]
    pixel = torch.arange(source, device=start.device) + 0.5
    centre = start + (torch.arange(size, device=start.device)[:, None] + 0.5) * length / size
    t = ((pixel - centre) / (length / size).clamp(min=1)).abs()     # the filter widens when shrinking
    cubic = torch.where(t < 1, (1.5 * t - 2.5) * t * t + 1, ((-0.5 * t + 2.5) * t - 4) * t + 2)
    weights = cubic * (t < 2) * (pixel > start) * (pixel < start + length)
    return weights / weights.sum(-1, keepdim=True)


def crop_and_resize(images, boxes, flip, size):
    """Crops, resizes, flips a batch on its device: uint8 `(n, 3, H, W)`, `(n, 4)`, `(n,)` to float `(n, 3, S, S)`, 0 to 255."""
    rows = resize_matrix(boxes[:, 0], boxes[:, 2], images.shape[2], size)
    columns = resize_matrix(boxes[:, 1], boxes[:, 3], images.shape[3], size)
    columns = torch.where(flip[:, None, None], columns.flip(1), columns)
    return (rows[:, None] @ images.float() @ columns.transpose(1, 2)[:, None]).clamp(0, 255)


def crops_of(data, batches, args, device, crops=1, augment=None):
    """Yields, for each of an iterable of `Batch`, its images `(len(rows) * crops, 3, S, S)`, float, 0 to 255, on the device.

    What lies in memory is cropped there, in batches; what lies on disk, or has a per-image `augment`, by worker processes.
    """
    if data.pixels is None or augment:
        visits = ([batch.first + row for row in batch.rows] for batch in batches)
        loader = torch.utils.data.DataLoader(
            Crops(data, args, crops, augment), batch_sampler=visits, num_workers=args.workers,
            collate_fn=torch.utils.data.default_convert,
            pin_memory=device.type == "cuda", prefetch_factor=4 if args.workers else None, worker_init_fn=leave_group)
        for images in loader:
            yield images.to(device, non_blocking=True).flatten(0, 1).permute(0, 3, 1, 2).contiguous().float()
        return
    pixels = data.pixels.to(device)
    for batch in batches:
        index = [image_of(batch.first + row, len(pixels), args.seed) for row in batch.rows]
        u = draw(batch, crops, 23, seed=args.seed, device=device).flatten(0, 1)
        images = pixels[torch.tensor(index, device=device)].repeat_interleave(crops, dim=0)
        boxes = crop_boxes(u[:, :22], *images.shape[2:], args.min_crop)
        yield crop_and_resize(images, boxes, u[:, 22] < 0.5, args.img_size)


def centre_crops(data, index, args):
    """Evaluation's view of some images: resized to 256/224 of the size, bicubic, centre crop; float `(n, 3, S, S)`, 0 to 255."""
    images = []
    for i in index:
        image = image_at(data, i)
        if image.shape[1:] != (args.img_size, args.img_size):
            image = v2.functional.resize(image, round(args.img_size * 256 / 224), v2.InterpolationMode.BICUBIC, antialias=True)
        images.append(v2.functional.center_crop(image, args.img_size))
    return torch.stack(images).float()


def normalize(images, args):
    """Float images, 0 to 255, to mean 0 and deviation 1 as `--mean` and `--std` say; in place, a copy costs more than the sums."""
    mean, std = (255 * torch.tensor(v, device=images.device).view(3, 1, 1) for v in (args.mean, args.std))
    return images.sub_(mean).div_(std)


# ------------------------------------------------------------------------ training (the same in every script)

def setup_distributed():
    """One process, or one per GPU under torchrun: `(rank, ranks, device)`."""
    rank, world, local = (int(os.environ.get(name, default)) for name, default in
                          (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return rank, world, device


def across_ranks(*values):
    """The mean of each number over all ranks, as Python floats."""
    numbers = torch.stack([torch.as_tensor(v, dtype=torch.float32, device=values[0].device) for v in values])
    if dist.is_initialized():
        dist.all_reduce(numbers)
        numbers /= dist.get_world_size()
    return numbers.tolist()


def learning_rate(step, steps, warmup_steps, lr, min_lr=0.0):
    """Linear warm-up from 0, then half a cosine down to `min_lr`, per step."""
    if step < warmup_steps:
        return lr * step / warmup_steps
    return min_lr + (lr - min_lr) * 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / (steps - warmup_steps)))


def parameter_groups(model, weight_decay):
    """Optimizer groups with and without weight decay: none on 1-D tensors, class token, position embedding."""
    groups = {True: [], False: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[parameter.ndim > 1 and not name.endswith(("cls_token", "pos_embed"))].append(parameter)
    return [{"params": groups[True], "weight_decay": weight_decay}, {"params": groups[False], "weight_decay": 0.0}]


def save_checkpoint(path, **state):
    """Writes a checkpoint beside its place, then renames it: at no moment is there half a file. BadInput on a full disk."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        torch.save(state, temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        raise BadInput(f"{path}: cannot be written, disk full? ({str(error).splitlines()[0]}); the last one stays") from None


def load_checkpoint(path, args):
    """The checkpoint that `--resume` continues, or None where there is none yet. BadInput if it is of another run."""
    if not path.exists():
        return None
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        config = checkpoint["config"]
    except Exception as error:  # torch.load fails in many ways on what is not a checkpoint
        raise BadInput(f"{path}: not a checkpoint to resume from ({str(error).splitlines()[0]})") from None
    free = ("out", "resume", "workers", "compile", "log_every", "max_steps", "root", "download")
    for name, value in {"method": args.method, **vars(args)}.items():
        if name not in free and config.get(name) != value:
            raise BadInput(f"{path}: was trained with {name} = {config.get(name)}, now it is {value}; "
                           "--resume continues the same run, --init starts a new one from its weights")
    return checkpoint


class Log:
    """Rank 0's log.jsonl, and the same on the screen: a bar on a terminal, plain lines elsewhere."""

    def __init__(self, folder, step, steps, rank):
        self.path, self.active = folder / "log.jsonl", rank == 0
        self.bar = tqdm(total=steps, initial=step, disable=rank > 0 or not sys.stderr.isatty(), unit="step")
        if self.active:  # drop what was logged after the checkpoint that is resumed
            lines = self.path.read_text().splitlines() if step and self.path.exists() else []
            whole = [line for line in lines if line.endswith("}")]
            self.path.write_text("".join(line + "\n" for line in whole if json.loads(line)["step"] <= step))

    def __call__(self, **entry):
        if not self.active:
            return
        entry = {key: float(f"{value:.6g}") if isinstance(value, float) else value for key, value in entry.items()}
        with self.path.open("a") as file:
            file.write(json.dumps(entry) + "\n")
        self.bar.set_postfix_str(f"loss {entry['loss']}")
        if self.bar.disable:
            print("  ".join(f"{key} {value}" for key, value in entry.items()), flush=True)


def catch_stop():
    """SIGTERM and Ctrl-C fill the returned list instead of ending the process: the loop saves and leaves. The second one ends it."""
    stop, before = [], {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def note(number, _):
        stop.append(number)
        signal.signal(number, before[number])
    for number in before:
        signal.signal(number, note)
    return stop


def memory_gb(device):
    """Peak memory so far: of the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2 ** 30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** (30 if sys.platform == "darwin" else 20)


def shared_arguments(parser):
    """The arguments that all training scripts have."""
    add = parser.add_argument
    add("--data", default="toy", help=f"toy (drawn shapes), a folder with train/ and val/, or one of: {' '.join(NAMED)}")
    add("--root", default="data", help="where the named data sets lie")
    add("--download", action="store_true", help="fetch a named data set into --root first")
    add("--fraction", type=float, default=1.0, help="train on this share of each class")
    add("--long-tail", action="store_true", help="train on class sizes shaped as in ImageNet-LT")
    add("--out", type=Path, help="folder for checkpoint, log and pictures (default: runs/ and the script's name)")
    add("--resume", action="store_true", help="continue the run in --out, exactly")
    add("--arch", choices=vit.ARCHS, help="the Vision Transformer: width 96, 192, 384 or 768")
    add("--img-size", type=int, help="side of the square images, in pixels")
    add("--patch-size", type=int, help="side of a patch, in pixels")
    add("--mean", type=float, nargs=3, default=[0.485, 0.456, 0.406], help="of the images, subtracted (default: ImageNet's)")
    add("--std", type=float, nargs=3, default=[0.229, 0.224, 0.225], help="of the images, divided by (default: ImageNet's)")
    add("--min-crop", type=float, help="smallest crop, as a share of the image's area")
    add("--epochs", type=int, help="times each image is seen")
    add("--warmup-epochs", type=float, help="epochs in which the learning rate rises from 0")
    add("--batch-size", type=int, help="images in one update, over all ranks and accumulation steps")
    add("--accum", type=int, default=1, help="split each update into this many smaller batches, to save memory")
    add("--base-lr", type=float, help="learning rate for 256 images in one update; scales with --batch-size")
    add("--weight-decay", type=float, help="AdamW's, not on 1-D tensors, class token, position")
    add("--clip-grad", type=float, default=math.inf, help="largest norm of the gradient (default: no limit)")
    add("--amp", choices=("bf16", "fp16", "off"), help="mixed precision (default: bf16 where the GPU has it)")
    add("--compile", action="store_true", help="torch.compile: slow first step, faster ones after")
    add("--workers", type=int, help="processes that decode images, per rank (default: what the machine has)")
    add("--seed", type=int, default=0)
    add("--log-every", type=int, default=20, help="steps between lines of the log")
    add("--max-steps", type=int, help="stop after this many steps, the schedule unchanged")


def resolve(args, preset, data, rank, world):
    """Fills what the command line left open from a preset, checks it, sets `args.lr`, prints. BadInput."""
    for name, value in preset.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    cuda = torch.cuda.is_available()
    args.amp = args.amp or ("bf16" if cuda and torch.cuda.get_device_capability()[0] >= 8 else "off")
    args.workers = min(16, os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))) if args.workers is None else args.workers
    for name in ("accum", "epochs", "log_every", "img_size", "patch_size", "crops_per_image", "eval_every", "max_steps"):
        value = getattr(args, name, None)
        if value is not None and value < 1:
            raise BadInput(f"--{name.replace('_', '-')} {value} must be at least 1")
    if args.img_size % args.patch_size:
        raise BadInput(f"--patch-size {args.patch_size} does not divide --img-size {args.img_size}")
    parts = world * args.accum * getattr(args, "crops_per_image", 1)
    if args.batch_size < 1 or args.batch_size % parts:
        raise BadInput(f"--batch-size {args.batch_size} is not divisible by {parts} (ranks x --accum x --crops-per-image): "
                       f"take {max(1, args.batch_size // parts) * parts}")
    if not 0 <= args.warmup_epochs < args.epochs:
        raise BadInput(f"--warmup-epochs {args.warmup_epochs} must be less than --epochs {args.epochs}")
    if not 0 < args.fraction <= 1:
        raise BadInput(f"--fraction {args.fraction} must be above 0, at most 1")
    args.lr = args.base_lr * args.batch_size / 256
    if rank == 0:
        print(textwrap.fill("settings: " + ", ".join(f"{k} {v}" for k, v in vars(args).items()), 120, break_on_hyphens=False))
        print(f"data: {len(data):,} training images{f' of {len(data.classes)} classes' if data.labels is not None else ''}, "
              f"{'in memory' if data.files is None else 'decoded from disk'}")
        print(f"batch: {world} rank{'s' * (world > 1)} x {args.batch_size // world // args.accum} images x {args.accum} accumulation "
              f"= {args.batch_size} images; base lr {args.base_lr:g} x {args.batch_size}/256 = lr {args.lr:g}", flush=True)


def begin_run(args, rank):
    """Makes `--out`, writes config.json, and returns the checkpoint to continue from, or None."""
    checkpoint = load_checkpoint(args.out / "last.pt", args) if args.resume else None
    if dist.is_initialized():
        dist.barrier()  # nobody renames what another still reads
    if rank == 0:
        args.out.mkdir(parents=True, exist_ok=True)
        for name in ("last.pt", "best.pt"):
            if checkpoint is None and (args.out / name).exists():
                os.replace(args.out / name, args.out / f"previous-{name}")
                print(f"{args.out} held a run: its {name} is now previous-{name} (--resume would have continued it)")
        (args.out / "config.json").write_text(json.dumps(settings(args), indent=1) + "\n")
    return checkpoint


def settings(args):
    """The arguments as plain values, for config.json and the checkpoint."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}


# ------------------------------------------------------------------------------------------------ pre-training

COMMON = dict(mask_ratio=0.75, decoder_dim=96, decoder_depth=1, decoder_heads=3, norm_pix_loss=True, weight_decay=0.05,
              crops_per_image=1)
PRESETS = {  # the defaults, chosen by the data: toy shapes, small images, folders of photographs (the paper's)
    "toy": dict(COMMON, arch="toy", img_size=32, patch_size=4, min_crop=0.3, epochs=12, warmup_epochs=1, batch_size=128, base_lr=6e-3),
    "small": dict(COMMON, arch="tiny", img_size=32, patch_size=4, min_crop=0.2, epochs=400, warmup_epochs=20, batch_size=512,
                  base_lr=3e-4),
    "photos": dict(COMMON, arch="tiny", img_size=224, patch_size=16, min_crop=0.08, epochs=400, warmup_epochs=40,
                   batch_size=4096, base_lr=1.5e-4),
}


def build(args):
    """The autoencoder that the arguments describe. BadInput."""
    if args.decoder_dim % 4 or args.decoder_dim % args.decoder_heads:
        raise BadInput(f"--decoder-dim {args.decoder_dim} must be divisible by 4 and by --decoder-heads {args.decoder_heads}")
    encoder = vit.ARCHS[args.arch](img_size=args.img_size, patch_size=args.patch_size, global_pool="token")
    return MaskedAutoencoder(encoder, args.decoder_dim, args.decoder_depth, args.decoder_heads, args.norm_pix_loss)


def train(args):
    rank, world, device = setup_distributed()
    stop = catch_stop()
    data, held_out = open_splits(args, rank)
    resolve(args, PRESETS["toy" if args.data == "toy" else "photos" if data.pixels is None else "small"], data, rank, world)

    # An epoch is len(data) images seen; with R crops of each decoded image that is one R-th as many visits.
    visits, visit_batch = max(1, len(data) // args.crops_per_image), args.batch_size // args.crops_per_image
    steps_per_epoch = math.ceil(visits / visit_batch)
    steps, warmup_steps = args.epochs * steps_per_epoch, int(args.warmup_epochs * steps_per_epoch)

    torch.manual_seed(args.seed)
    model = build(args).to(device)
    if args.init:
        report = vit.load_weights(model.encoder, args.init)
        if rank == 0:
            print(f"--init {args.init}: {report}")
    checkpoint = begin_run(args, rank)
    optimizer = torch.optim.AdamW(parameter_groups(model, args.weight_decay), betas=(0.9, 0.95), fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
    autocast = functools.partial(torch.autocast, device.type, {"fp16": torch.float16}.get(args.amp, torch.bfloat16), args.amp != "off")
    start = 0
    if checkpoint:
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        scaler.load_state_dict(checkpoint["scaler"])
        start = checkpoint["step"]
    if args.compile:
        model.compile(dynamic=False)
    network = DistributedDataParallel(model, [device] if device.type == "cuda" else None) if world > 1 else model

    shown = data if held_out is None else held_out
    shown_images = normalize(centre_crops(shown, range(0, len(shown), math.ceil(len(shown) / 8)), args).to(device), args)
    which = "training" if held_out is None else "held-out"
    log = Log(args.out, start, steps, rank)
    save_every, draw_every = max(steps_per_epoch, steps // 100), math.ceil(steps / 10)
    end = min(steps, start + (args.max_steps or steps))
    plan = (batch for step in range(start, end) for batch in batches_of(step, visits, visit_batch, args.accum, rank, world))
    crops = crops_of(data, plan, args, device, args.crops_per_image)
    began = since = time.perf_counter()
    step, waited, seen, losses = start, 0.0, 0, []

    for step in range(start, end):
        lr = learning_rate(step, steps, warmup_steps, args.lr)
        for group in optimizer.param_groups:
            group["lr"] = lr

        loss = torch.zeros((), device=device)
        parts = batches_of(step, visits, visit_batch, args.accum, rank, world)
        for batch in parts:
            asked = time.perf_counter()
            images = normalize(next(crops), args)                                           # (B, 3, S, S)
            waited += time.perf_counter() - asked
            noise = draw(batch, args.crops_per_image, model.encoder.grid ** 2, seed=args.seed, device=device).flatten(0, 1)
            last = batch is parts[-1]
            with contextlib.nullcontext() if last or world == 1 else network.no_sync():     # ranks talk once a step
                with autocast():
                    part, _, _ = network(images, args.mask_ratio, noise)
                scaler.scale(part * batch.weight).backward()
            loss += part.detach() * batch.weight

        mean_loss, stopping = across_ranks(loss, float(bool(stop)))
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad)
        if not math.isfinite(mean_loss + (0 if scaler.is_enabled() else norm.item())):  # seen by all ranks alike, before the update
            raise BadInput(f"step {step + 1}: the loss is {mean_loss}, its gradient {norm:.3g} long; stopped before the update, "
                           f"{args.out / 'last.pt'} is as it was (try --amp bf16, --clip-grad 1, a lower --base-lr; or a broken image?)")
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

        losses.append(mean_loss)
        seen += parts[0].count * args.crops_per_image
        done, step = step + 1 == end or stopping > 0, step + 1
        saving = done or step % save_every == 0
        log.bar.update()
        if saving or step % args.log_every == 0:
            now = time.perf_counter()
            log(epoch=step / steps_per_epoch, step=step, loss=sum(losses) / len(losses), lr=lr,
                images_per_s=seen / (now - since), data_wait=waited / (now - since))
            since, waited, seen, losses = now, 0.0, 0, []
        if rank == 0 and saving:
            save_checkpoint(args.out / "last.pt", model=model.state_dict(), optimizer=optimizer.state_dict(),
                            scaler=scaler.state_dict(), step=step, config=settings(args))
        if rank == 0 and (done or step % draw_every == 0):
            draw_reconstructions(args.out / "reconstruction.png", model, shown_images, args,
                                 f"MAE {args.arch}, {which} images of {args.data}, step {step} of {steps}")
            draw_curve(args.out, f"MAE {args.arch} on {args.data}")
        if done:
            break
    if rank == 0:
        log.bar.close()
        print(f"{'done' if step == steps else 'stopped, --resume continues'}: step {step} of {steps}, "
              f"{time.perf_counter() - began:.0f} s, {memory_gb(device):.2f} GB; see {args.out}", flush=True)
    if dist.is_initialized():
        dist.destroy_process_group()


def reconstruct(args):
    """Draws a checkpoint's reconstructions of held-out images, without training; this project's or a published MAE file."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # published files keep their settings in one
            checkpoint = torch.load(args.reconstruct, map_location="cpu", weights_only=True)
        state = checkpoint["model"]
    except Exception as error:  # torch.load fails in many ways on what is not a checkpoint
        raise BadInput(f"--reconstruct {args.reconstruct}: not a checkpoint ({str(error).splitlines()[0]})") from None
    unset = {"data": "toy", "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    for name, value in {**PRESETS["photos"], **checkpoint.get("config", {})}.items():
        if getattr(args, name, None) in (None, unset.get(name)):
            setattr(args, name, value)
    model = build(args)
    own = model.state_dict()
    state = {name if name in own else f"encoder.{name}": tensor for name, tensor in state.items()}  # published files are flat
    if own.keys() != state.keys() or any(own[name].shape != state[name].shape for name in own):
        odd = sorted(own.keys() ^ state.keys()) or [name for name in own if own[name].shape != state[name].shape]
        raise BadInput(f"--reconstruct {args.reconstruct}: does not fit --arch and the decoder's arguments, first at {odd[0]}")
    model.load_state_dict(state)
    data = open_data(args, train=False) or open_data(args, train=True)
    args.out.mkdir(parents=True, exist_ok=True)
    images = normalize(centre_crops(data, range(0, len(data), math.ceil(len(data) / 8)), args), args)
    draw_reconstructions(args.out / "reconstruction.png", model, images, args, f"{args.reconstruct} on images of {args.data}")
    print(f"drawn: {args.out / 'reconstruction.png'}")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.set_defaults(method="mae")
    shared_arguments(parser)
    add = parser.add_argument
    add("--mask-ratio", type=float, help="share of the patches that are removed")
    add("--norm-pix-loss", action=argparse.BooleanOptionalAction, default=None, help="normalise the target per patch")
    add("--decoder-dim", type=int, help="the decoder's width")
    add("--decoder-depth", type=int, help="the decoder's blocks")
    add("--decoder-heads", type=int, help="the decoder's attention heads")
    add("--crops-per-image", type=int, help="train on this many crops of each decoded image; an epoch counts crops")
    add("--init", help="start from the encoder weights of this checkpoint")
    add("--reconstruct", metavar="CHECKPOINT", help="only draw a checkpoint's reconstructions")
    args = parser.parse_args(argv)
    args.out = args.out or Path("runs") / args.method
    if args.mask_ratio is not None and not 0 <= args.mask_ratio < 1:
        raise BadInput(f"--mask-ratio {args.mask_ratio} must be at least 0, below 1")
    reconstruct(args) if args.reconstruct else train(args)


def run(main):
    """Runs a script: what the user can mend ends it with one line on stderr and exit code 2."""
    try:
        main()
    except (BadInput, vit.WeightsError, OSError) as error:  # a worker's error arrives with its traceback: the last line says it
        line = str(error).strip().splitlines()[-1].split("BadInput: ")[-1]
        sys.stderr.write(f"error: {line}\n")  # in one piece: several ranks may write
        sys.stderr.flush()
        os._exit(2) if dist.is_initialized() else sys.exit(2)


if __name__ == "__main__":
    run(main)
