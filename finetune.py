"""What is a pre-trained Vision Transformer worth? Fine-tune it, probe it, ask its nearest neighbours, or train without it.

A checkpoint (this project's, MAE, MoCo-v3, MAE-Lite, DeiT, timm) or nothing goes in; top-1 and top-5 accuracy on held-out
images come out. This is how A Closer Look at Self-Supervised Lightweight Vision Transformers (ICML 2023) judges pre-training: Sec. 3
fine-tuning with its improved recipe and DeiT's, Sec. 3.2 transfer, few labels, and only the lower blocks kept (Fig. 2, 4).

    finetune   the whole network and a new linear head; a layer i of the network learns at lr * decay^(depth + 1 - i)
    linear     the network is frozen: BatchNorm without affine, then a linear classifier, on its pooled feature
    knn        nothing is trained: the 20 nearest training images vote

Run it
    laptop      python finetune.py --fraction 0.04 --init runs/mae/last.pt   # 327 labelled shapes; no --init: from scratch
    probes      python finetune.py --mode linear --init runs/mae/last.pt     # or --mode knn
    transfer    python finetune.py --recipe transfer --data cifar100 --download --init mae_tiny.pth
    one GPU     python finetune.py --data DIR --init mae_tiny.pth --compile  # DIR/train/CLASS/*.jpg, DIR/val/CLASS/*.jpg
    8 GPUs      torchrun --nproc_per_node=8 finetune.py --data DIR --init mae_tiny.pth      # the paper's run: 300 epochs
    two nodes   torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 finetune.py --data DIR
    evaluate    python finetune.py --eval-only --init runs/finetune/best.pt  # --data ImageNet-V2's folder, --real-labels FILE
    speed       python finetune.py --throughput --arch tiny --img-size 224 --patch-size 16 --batch-size 256
Results land in --out: config.json, log.jsonl, last.pt, best.pt, accuracy.png, classes.png, predictions.png. --resume continues.

Shapes in the comments: B images, C classes, D width, n images of a data set.
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
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torchvision.transforms import v2
from tqdm import tqdm

import vit

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (after the choice of a backend that needs no screen)


# ------------------------------------------------------------------------------------------------ the method

def layer_decay_groups(model, base_lr, weight_decay, decay):
    """Optimizer groups in which layer i of a VisionTransformer learns at `base_lr * decay^(depth + 1 - i)` (BEiT, MAE).

    Layer 0 is the embedding (patches, class token, position), block k is layer k + 1, norm and head are depth + 1. Every
    parameter is in one group, also a frozen one (harmless: no gradient, no update); no weight decay on 1-D tensors, class
    token, position. Each group has `params`, `names`, `lr_scale`, `lr`, `weight_decay`.
    """
    depth, groups = len(model.blocks), {}
    for name, parameter in model.named_parameters():
        layer = depth + 1
        if name.startswith("blocks."):
            layer = int(name.split(".")[1]) + 1
        elif name.startswith(("cls_token", "pos_embed", "patch_embed.")):
            layer = 0
        decays = parameter.ndim > 1 and name not in ("cls_token", "pos_embed")
        scale = decay ** (depth + 1 - layer)
        group = groups.setdefault((layer, decays), {"params": [], "names": [], "lr_scale": scale, "lr": base_lr * scale,
                                                    "weight_decay": weight_decay if decays else 0.0})
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


class FeatureNorm(nn.BatchNorm1d):
    """BatchNorm of frozen features `(B, D)`, so without gradient; the batch is that of all ranks, also on a CPU."""

    def forward(self, x):
        x = x.float()
        sums = torch.cat([x.sum(0), x.new_tensor([len(x)])])
        if self.training and dist.is_initialized():
            dist.all_reduce(sums)
        if not self.training or sums[-1] < 2:  # one image has no variance
            return F.batch_norm(x, self.running_mean, self.running_var, eps=self.eps)
        if not dist.is_initialized():
            return super().forward(x)
        count, mean = sums[-1], sums[:-1] / sums[-1]
        variance = (x - mean).square().sum(0)
        dist.all_reduce(variance)
        variance /= count
        self.num_batches_tracked += 1
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(variance * count / (count - 1), self.momentum)
        return (x - mean) / (variance + self.eps).sqrt()


def probe_head(dim, num_classes):
    """What a linear probe trains: a linear classifier on features of mean 0 and deviation 1 (MAE, Appendix A.1)."""
    head = nn.Sequential(FeatureNorm(dim, eps=1e-6, affine=False), nn.Linear(dim, num_classes))
    nn.init.trunc_normal_(head[1].weight, std=0.01)
    nn.init.zeros_(head[1].bias)
    return head


def nearest_neighbours(known, labels, features, num_classes, neighbours=20, temperature=0.07):
    """Classes of `features (n, D)`, best first, `(n, min(5, C))`, by a vote of the nearest `known (m, D)` with `labels (m,)`.

    A neighbour at cosine similarity s has exp(s / temperature) votes (Wu et al., 2018).
    """
    known, ranked = F.normalize(known, dim=1), []
    for part in F.normalize(features, dim=1).split(256):
        similarity, index = (part @ known.T).topk(min(neighbours, len(known)))                          # (256, k)
        votes = part.new_zeros(len(part), num_classes).scatter_add(1, labels[index], (similarity / temperature).exp())
        ranked.append(votes.topk(min(5, num_classes)).indices)
    return torch.cat(ranked)


# ------------------------------------------------------------------------------------------------ augmentation

class RandAugment(v2.RandAugment):
    """Two operations drawn at random (Cubuk et al., 2020), each at its own strength, normal around `strength` (0 to 10).

    Strengths are on timm's scale, which torchvision's 31 bins divide in thirds: 10 is bin 30. (timm also leaves out each
    operation half of the time; RandAugment as published, and this, does not.)
    """

    def __init__(self, strength, noise=0.5, fill=None):
        super().__init__(num_ops=1, interpolation=v2.InterpolationMode.BILINEAR, fill=fill)
        self.strength, self.noise = strength, noise

    def forward(self, image):
        for _ in range(2):
            strength = self.strength + self.noise * torch.randn(()).item()
            self.magnitude = min(max(round(3 * strength), 0), self.num_magnitude_bins - 1)
            image = super().forward(image)
        return image


def erase(images, probability):
    """Random erasing (Zhong et al., 2020): in that share of `images (B, 3, H, W)` one box becomes normal noise, per pixel.

    The box has 2% to 1/3 of the area and sides in a ratio of 0.3 to 1 / 0.3.
    """
    B, _, H, W = images.shape
    u = torch.rand(B, 23, device=images.device)
    area = H * W * (0.02 + (1 / 3 - 0.02) * u[:, :10])  # ten tries each, the first that fits counts
    ratio = torch.exp(math.log(0.3) * (1 - 2 * u[:, 10:20]))
    h, w = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()                                 # (B, 10)
    fits = (h < H) & (w < W)
    first = fits.int().argmax(1, keepdim=True)
    h, w = h.gather(1, first), w.gather(1, first)                                                       # (B, 1)
    top, left = (u[:, 20:21] * (H - h + 1)).floor(), (u[:, 21:22] * (W - w + 1)).floor()
    y, x = torch.arange(H, device=images.device), torch.arange(W, device=images.device)
    inside = ((y >= top) & (y < top + h))[:, :, None] & ((x >= left) & (x < left + w))[:, None]         # (B, H, W)
    inside &= (fits.any(1) & (u[:, 22] < probability))[:, None, None]
    return torch.where(inside[:, None], torch.randn_like(images), images)


def mixers(args, num_classes):
    """The batch transforms, `(images, labels) -> (images, soft targets (B, C))`, one of which each batch goes through.

    Mixup blends two images (Zhang et al., 2018), cutmix pastes a box of one into another (Yun et al., 2019); one Beta(alpha,
    alpha) number a batch. Partners are neighbours in a rank's micro-batch: with mixing, N ranks are another run than one.
    """
    return ([v2.MixUp(alpha=args.mixup, num_classes=num_classes)] if args.mixup else []) + \
           ([v2.CutMix(alpha=args.cutmix, num_classes=num_classes)] if args.cutmix else [])


# ------------------------------------------------------------------------------------------------ evaluation

class CentreCrops(torch.utils.data.Dataset):
    """Item k is the centre crops of the images `chunks[k]`, uint8 `(b, 3, S, S)`."""

    def __init__(self, data, args, chunks):
        self.data, self.args, self.chunks = data, args, chunks

    def __len__(self):
        return len(self.chunks)

    def __getitem__(self, k):
        return centre_crops(self.data, self.chunks[k], self.args).to(torch.uint8)


@torch.no_grad()
def on_every_image(function, data, args, rank, world, device):
    """`function(images (b, 3, S, S))` on the centre crop of every image of `data`: `(n, ...)`, on all ranks.

    Rank r computes rows r, r + N, ...; the others leave zeros there, so the sum over ranks holds each image exactly once.
    """
    rows = list(range(rank, len(data), world))
    chunks = [rows[i:i + 256] for i in range(0, len(rows), 256)]
    loader = torch.utils.data.DataLoader(CentreCrops(data, args, chunks), batch_size=None, pin_memory=device.type == "cuda",
                                         num_workers=args.workers if data.pixels is None else 0, worker_init_fn=leave_group)
    outputs = function(torch.zeros(1, 3, args.img_size, args.img_size, device=device))  # its shape and type
    outputs = outputs.new_zeros(len(data), *outputs.shape[1:])
    for chunk, images in zip(chunks, loader):
        outputs[chunk] = function(normalize(images.to(device, non_blocking=True).float(), args))
    if dist.is_initialized():
        dist.all_reduce(outputs)
    return outputs


def predict(model, data, args, rank, world, device):
    """The best classes of every image, best first, `(n, min(5, C))` on the CPU; the model is left in evaluation mode."""
    model.eval()

    def best(images):
        with mixed_precision(args, device):
            logits = model.forward(images)  # not the compiled call: its batches have other sizes
        return logits.float().topk(min(5, logits.shape[1])).indices
    return on_every_image(best, data, args, rank, world, device).cpu()


def mixed_precision(args, device):
    return torch.autocast(device.type, {"fp16": torch.float16}.get(args.amp, torch.bfloat16), args.amp != "off")


def accuracy(best, labels, real=None):
    """Percent of images whose class is the best guess and among the best five, `{"top1", "top5"}`, from `best (n, 5)`.

    `real`: per image the classes that it may be called (ImageNet-ReaL); adds `"real"`, over the images that have any.
    """
    hit = best == torch.as_tensor(labels)[:, None]
    result = {"top1": 100 * hit[:, 0].double().mean().item(), "top5": 100 * hit.any(1).double().mean().item()}
    if real is not None:
        hits = [guess in classes for guess, classes in zip(best[:, 0].tolist(), real) if classes]
        result["real"] = 100 * float(np.mean(hits))
    return result


def read_real_labels(path, data):
    """ImageNet-ReaL's file (Beyer et al., 2020), a list of classes for each image in the order of the file names. BadInput."""
    if path is None:
        return None
    try:
        lists = json.loads(Path(path).read_text())
    except ValueError:
        raise BadInput(f"--real-labels {path}: not a JSON file") from None
    if data.files is None:
        raise BadInput("--real-labels: needs --data to be a folder of image files, as ImageNet's validation images")
    if not isinstance(lists, list) or len(lists) != len(data):
        raise BadInput(f"--real-labels {path}: a list of {len(lists)}, the held-out images are {len(data)}")
    order = np.argsort([os.path.basename(path) for path in data.files], kind="stable")
    return [lists[place] for place in np.argsort(order)]


def report(best, data, args, real, title):
    """Prints the accuracy and draws classes.png and predictions.png; on rank 0."""
    result = accuracy(best, data.labels, real)
    numbers = ", ".join(f"{name} {value:.2f}%" for name, value in result.items())
    labelled = "" if real is None else f" ({sum(map(bool, real)):,} of them with ReaL labels)"
    print(f"{title}: {numbers}, {len(data):,} images{labelled}", flush=True)
    draw_classes(args.out / "classes.png", best, data, f"{title}, top-1 {result['top1']:.1f}%")
    draw_predictions(args.out / "predictions.png", best, data, args, f"{title}, top-1 {result['top1']:.1f}%")


# ------------------------------------------------------------------------------------------------ pictures

def draw_curve(folder, title):
    """Accuracy on held-out images and training loss over the epochs, from log.jsonl, as accuracy.png."""
    entries = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    tested = [entry for entry in entries if "top1" in entry]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.5))
    for name, label in (("top1", "top-1"), ("top5", "top-5")):
        values = [entry[name] for entry in tested]
        left.plot([entry["epoch"] for entry in tested], values, ".-", label=f"{label}, last {values[-1]:.1f}%")
    left.set(xlabel="epoch", ylabel="accuracy on held-out images, %", ylim=(0, 100))
    left.legend(loc="lower right")
    right.plot([entry["epoch"] for entry in entries], [entry["loss"] for entry in entries], color="tab:gray")
    right.set(xlabel="epoch", ylabel="training loss", ylim=(0, None))
    for axis in (left, right):
        axis.grid(alpha=0.3)
    figure.suptitle(title, fontsize=11)
    figure.tight_layout()
    figure.savefig(folder / "accuracy.png", dpi=100)
    plt.close(figure)


def draw_classes(path, best, data, title):
    """Who is taken for whom, in percent of each class; for more than 20 classes the accuracy of each, sorted."""
    C = len(data.classes)
    table = np.zeros((C, C))
    np.add.at(table, (data.labels, best[:, 0].numpy()), 1)
    counts = table.sum(1)
    table = 100 * table / np.maximum(counts, 1)[:, None]
    if C <= 20:
        figure, axis = plt.subplots(figsize=(0.5 * C + 2.5, 0.45 * C + 2.2))
        axis.imshow(table, cmap="Blues", vmin=0, vmax=100)
        for row, column in zip(*np.nonzero(table.round())):
            axis.text(column, row, f"{table[row, column]:.0f}", ha="center", va="center", fontsize=8,
                      color="white" if table[row, column] > 50 else "black")
        axis.set_xticks(range(C), data.classes, rotation=45, ha="right")
        axis.set_yticks(range(C), data.classes)
        axis.set(xlabel="called", ylabel="is", title=f"{title}\nin % of each class")
        axis.title.set_fontsize(11)
    else:
        right, seen = np.diag(table), np.flatnonzero(counts)
        order = seen[np.argsort(right[seen], kind="stable")]
        figure, (whole, worst, good) = plt.subplots(1, 3, figsize=(12, 3.8), width_ratios=(2, 1, 1))
        whole.bar(range(len(order)), right[order], width=1)
        whole.axhline(right[order].mean(), color="black", lw=1, ls="--")
        whole.set(xlabel=f"{len(order):,} classes, sorted; dashed: their mean", ylabel="accuracy, %", ylim=(0, 100),
                  xlim=(-0.5, len(order) - 0.5))
        for axis, part, name in ((worst, order[:10][::-1], "the ten lowest"), (good, order[-10:], "the ten highest")):
            axis.barh([str(data.classes[kind])[:22] for kind in part], right[part])
            axis.set(title=name, xlabel="accuracy, %", xlim=(0, 100))
        figure.suptitle(title, fontsize=11)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def draw_predictions(path, best, data, args, title):
    """Held-out images with what they are taken for, green where right; where wrong, with what they are."""
    index = range(0, len(data), math.ceil(len(data) / 32))
    rows = math.ceil(len(index) / 8)
    figure, axes = plt.subplots(rows, 8, figsize=(11, 1.7 * rows + 0.6), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, i, pixels in zip(axes.flat, index, centre_crops(data, index, args)):
        guess, truth = (str(data.classes[kind])[:16] for kind in (best[i, 0], data.labels[i]))
        axis.imshow(pixels.permute(1, 2, 0).numpy() / 255)
        axis.set_title(guess if guess == truth else f"{guess}\nis {truth}", fontsize=9,
                       color="tab:green" if guess == truth else "tab:red")
    figure.suptitle(title, fontsize=11)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
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


# ------------------------------------------------------------------------------------------------ fine-tuning

PLAIN = dict(min_crop=0.08, randaug=0.0, mixup=0.0, cutmix=0.0, erasing=0.0, smoothing=0.0, drop_path=0.0, clip_grad=math.inf,
             pool="avg", optimizer="adamw", layer_decay=1.0, eval_every=1, num_heads=12)
RECIPES = {  # the study's, for ImageNet; linear serves the frozen modes
    "improved": dict(PLAIN, epochs=300, warmup_epochs=5, batch_size=1024, base_lr=1e-3, weight_decay=0.05, layer_decay=0.85,
                     randaug=10.0, mixup=0.2),
    "original": dict(PLAIN, epochs=300, warmup_epochs=5, batch_size=1024, base_lr=2.5e-4, weight_decay=0.05, pool="token",
                     randaug=9.0, mixup=0.8, cutmix=1.0, erasing=0.25, smoothing=0.1, drop_path=0.1),
    "transfer": dict(PLAIN, epochs=100, warmup_epochs=10, batch_size=512, base_lr=0.05, weight_decay=0.0, layer_decay=0.75,
                     optimizer="sgd", clip_grad=1.0),
    "linear": dict(PLAIN, epochs=90, warmup_epochs=0, batch_size=1024, base_lr=0.75, weight_decay=0.0, optimizer="sgd"),
}
TRANSFER = {  # Appendix: CIFAR-100's numbers are the paper's; the others are ours, longer where images are few
    "cifar100": dict(epochs=50, warmup_epochs=10), "cifar10": dict(epochs=50, warmup_epochs=10),
    "fashionmnist": dict(epochs=50, warmup_epochs=10),
    "flowers102": dict(epochs=300, warmup_epochs=20), "aircraft": dict(epochs=300, warmup_epochs=20),
    "cars": dict(epochs=300, warmup_epochs=20), "pets": dict(epochs=100, warmup_epochs=10),
    "inat2018": dict(epochs=100, warmup_epochs=10),
}
SIZES = {  # chosen by the data: toy shapes, small images, folders of photographs; a checkpoint's own sizes go before
    "toy": dict(arch="toy", img_size=32, patch_size=4),
    "small": dict(arch="tiny", img_size=32, patch_size=4),
    "photos": dict(arch="tiny", img_size=224, patch_size=16),
}
SMALLER = {  # recipes for less than ImageNet
    ("improved", "toy"): dict(epochs=40, warmup_epochs=5, batch_size=64, base_lr=8e-3, layer_decay=0.75, min_crop=0.5,
                              randaug=0.0, mixup=0.0, eval_every=10),
    ("original", "toy"): dict(epochs=40, warmup_epochs=5, batch_size=64, base_lr=2e-3, min_crop=0.5, randaug=0.0,
                              eval_every=10),
    ("transfer", "toy"): dict(epochs=40, warmup_epochs=5, batch_size=64, base_lr=0.2, min_crop=0.5, eval_every=10),
    ("linear", "toy"): dict(epochs=10, batch_size=256, base_lr=0.1, min_crop=0.5),
    ("improved", "small"): dict(epochs=100, batch_size=512, min_crop=0.2),
    ("original", "small"): dict(epochs=100, batch_size=512, min_crop=0.2),
    ("linear", "small"): dict(batch_size=512, base_lr=0.1, min_crop=0.2),
}


def choose(args, kind):
    """The preset for these arguments, data of this kind (toy, small, photos) and the checkpoint `--init`. WeightsError."""
    recipe = args.recipe if args.mode == "finetune" else "linear"
    preset = {**RECIPES[recipe], **SIZES[kind], **SMALLER.get((recipe, kind), {})}
    if recipe == "transfer":
        preset.update(TRANSFER.get(args.data, {}))
    if not args.init:
        return dict(preset, layer_decay=1.0 if recipe == "improved" else preset["layer_decay"])
    state, _ = vit.read_weights(args.init, args.checkpoint_branch)
    width, _, preset["patch_size"], _ = state["patch_embed.proj.weight"].shape
    preset["arch"] = {96: "toy", 192: "tiny", 384: "small", 768: "base"}.get(width, preset["arch"])
    if "pos_embed" in state:
        preset["img_size"] = math.isqrt(state["pos_embed"].shape[1] - 1) * preset["patch_size"]
    preset["num_heads"] = vit.own_heads(args.init)
    contrastive, classifier = "head.0.weight" in state, {"head.weight", "norm.weight"} <= state.keys()
    if contrastive and recipe == "improved":
        preset["layer_decay"] = 0.75
    if args.eval_only:
        args.mode = "linear" if "head.1.weight" in state and not contrastive else "finetune"
        preset["pool"] = "avg" if "fc_norm.weight" in state else "token"
    elif args.mode != "finetune":  # the feature that pre-training worked on
        preset["pool"] = "token" if contrastive or classifier else "avg"
    return preset


def build(args, num_classes, rank):
    """The network that the arguments describe, with the weights of `--init`; says what was loaded. BadInput, WeightsError."""
    try:
        model = vit.ARCHS[args.arch](img_size=args.img_size, patch_size=args.patch_size, num_heads=args.num_heads,
                                     num_classes=num_classes if args.mode == "finetune" else 0, global_pool=args.pool,
                                     drop_path=args.drop_path)
    except ValueError as error:
        raise BadInput(f"--num-heads {args.num_heads}: {error}") from None
    if args.mode == "finetune":
        nn.init.trunc_normal_(model.head.weight, std=2e-5)  # as MAE: the first loss is the logarithm of the number of classes
    if args.mode == "linear" and args.eval_only:            # a trained probe; a new one never takes a projector's tensors
        model.head = probe_head(model.embed_dim, num_classes)
    if args.keep_blocks is not None and not 0 <= args.keep_blocks <= len(model.blocks):
        raise BadInput(f"--keep-blocks {args.keep_blocks}: this network has {len(model.blocks)} blocks")
    if args.init:
        fresh = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        loaded = vit.load_weights(model, args.init, args.checkpoint_branch)
        if args.eval_only and loaded.missing:
            raise BadInput(f"--init {args.init}: {loaded.missing[0]} is not there or of another size; --eval-only needs a "
                           f"classifier of the {num_classes} classes of --data {args.data}")
        if args.keep_blocks is not None:
            kept = ("cls_token", "pos_embed", "patch_embed.", *(f"blocks.{i}." for i in range(args.keep_blocks)))
            fresh = {name: tensor for name, tensor in fresh.items() if not name.startswith(kept)}
            model.load_state_dict(fresh, strict=False)
            loaded = vit.LoadReport(list(fresh), loaded.unused)
        if rank == 0:
            print(textwrap.fill(f"--init {args.init}: {loaded}", 120, break_on_hyphens=False))
    if args.mode != "finetune":
        model.requires_grad_(False)
        if args.mode == "linear" and not args.eval_only:
            model.head = probe_head(model.embed_dim, num_classes)
    if rank == 0:
        feature = {"avg": "mean of the patch tokens, then LayerNorm", "token": "LayerNorm, then class token"}[args.pool]
        head = "" if args.mode != "linear" else ", then BatchNorm over the batch, then a linear classifier"
        every, trained = (sum(p.numel() for p in model.parameters() if p.requires_grad >= only) / 1e6 for only in (False, True))
        print(f"network: {args.arch}, {every:.2f}M parameters ({trained:.2f}M trained); feature: {feature}{head}", flush=True)
    return model


def kind_of(args, data):
    return "toy" if args.data == "toy" else "photos" if data.pixels is None else "small"


def train(args):
    rank, world, device = setup_distributed()
    stop = catch_stop()
    data, held_out = open_splits(args, rank)
    if held_out is None or data.labels is None or held_out.labels is None:
        raise BadInput(f"--data {args.data}: needs train/ and val/ (or test/) with a folder for each class")
    resolve(args, choose(args, kind_of(args, data)), data, rank, world)
    if args.mode == "linear" and args.accum > 1:
        raise BadInput("--accum: a linear probe's BatchNorm sees the whole batch; a frozen network needs little memory anyway")
    if not 0 < args.layer_decay <= 1:
        raise BadInput(f"--layer-decay {args.layer_decay} must be above 0, at most 1")
    if not 0 <= args.drop_path < 1:
        raise BadInput(f"--drop-path {args.drop_path} must be at least 0, below 1")
    real = read_real_labels(args.real_labels, held_out)

    steps_per_epoch = math.ceil(len(data) / args.batch_size)
    steps, warmup_steps = args.epochs * steps_per_epoch, int(args.warmup_epochs * steps_per_epoch)

    torch.manual_seed(args.seed)
    model = build(args, len(data.classes), rank).to(device)
    checkpoint = begin_run(args, rank)
    groups = layer_decay_groups(model, args.lr, args.weight_decay, args.layer_decay)
    optimizer = (torch.optim.AdamW(groups, betas=(0.9, 0.999), fused=True) if args.optimizer == "adamw" else
                 torch.optim.SGD(groups, momentum=0.9, nesterov=args.mode == "finetune", fused=True))
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
    autocast = functools.partial(mixed_precision, args, device)
    start, top1 = 0, -1.0
    if checkpoint:
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        scaler.load_state_dict(checkpoint["scaler"])
        start, top1 = checkpoint["step"], checkpoint["top1"]
    if args.compile:
        model.compile(dynamic=False)
    network = DistributedDataParallel(model, [device] if device.type == "cuda" else None) if world > 1 else model

    labels, mixing = torch.from_numpy(data.labels).to(device), mixers(args, len(data.classes))
    log = Log(args.out, start, steps, rank)
    save_every, eval_every = max(steps_per_epoch, steps // 100), args.eval_every * steps_per_epoch
    end = min(steps, start + (args.max_steps or steps))
    plan = (batch for step in range(start, end)
            for batch in batches_of(step, len(data), args.batch_size, args.accum, rank, world))
    augment = RandAugment(args.randaug, fill=[round(255 * v) for v in args.mean]) if args.randaug else None
    crops = crops_of(data, plan, args, device, augment=augment)
    began = since = time.perf_counter()
    step, testing, waited, seen, losses = start, False, 0.0, 0, []

    for step in range(start, end):
        lr = learning_rate(step, steps, warmup_steps, args.lr)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        model.train(args.mode == "finetune").head.train()                                   # what is frozen stays in evaluation

        loss = torch.zeros((), device=device)
        parts = batches_of(step, len(data), args.batch_size, args.accum, rank, world)
        for k, batch in enumerate(parts):
            asked = time.perf_counter()
            images = normalize(next(crops), args)                                           # (B, 3, S, S)
            waited += time.perf_counter() - asked
            targets = labels[[image_of(batch.first + row, len(data), args.seed) for row in batch.rows]]
            torch.manual_seed(seeded(args.seed, step, rank, k))                             # of all that is random below
            if args.erasing:
                images = erase(images, args.erasing)
            if mixing:
                images, targets = mixing[torch.randint(len(mixing), ())](images, targets)   # targets (B, C)
            last = batch is parts[-1]
            with contextlib.nullcontext() if last or world == 1 else network.no_sync():     # ranks talk once a step
                with autocast():
                    logits = network(images)                                                # (B, C)
                part = F.cross_entropy(logits.float(), targets, label_smoothing=args.smoothing)
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
        seen += parts[0].count
        done, step = step + 1 == end or stopping > 0, step + 1
        testing = step == steps or step % eval_every == 0
        saving = done or testing or step % save_every == 0
        log.bar.update()
        if saving or step % args.log_every == 0:
            now = time.perf_counter()
            speed = dict(images_per_s=seen / (now - since), data_wait=waited / (now - since))
            best = predict(model, held_out, args, rank, world, device) if testing else None
            result = accuracy(best, held_out.labels, real) if testing else {}
            log(epoch=step / steps_per_epoch, step=step, loss=sum(losses) / len(losses), lr=lr, **speed, **result)
            since, waited, seen, losses = time.perf_counter(), 0.0, 0, []
        if rank == 0 and testing and result["top1"] > top1:
            top1 = result["top1"]
            save_checkpoint(args.out / "best.pt", model=model.state_dict(), step=step, top1=top1, config=settings(args))
        if rank == 0 and saving:
            save_checkpoint(args.out / "last.pt", model=model.state_dict(), optimizer=optimizer.state_dict(),
                            scaler=scaler.state_dict(), step=step, top1=top1, config=settings(args))
        if rank == 0 and testing:
            draw_curve(args.out, f"{args.mode}: {args.arch} on {args.data}, init {args.init or 'none'}")
        if done:
            break
    if rank == 0:
        log.bar.close()
        if testing:
            report(best, held_out, args, real, f"{args.mode}: {args.arch} on {args.data}")
        print(f"{'done' if step == steps else 'stopped, --resume continues'}: step {step} of {steps}, "
              f"{f'best top-1 {top1:.2f}%, ' if top1 >= 0 else ''}{time.perf_counter() - began:.0f} s, "
              f"{memory_gb(device):.2f} GB; see {args.out}", flush=True)
    if dist.is_initialized():
        dist.destroy_process_group()


def evaluate(args):
    """`--eval-only` and `--mode knn`: nothing is trained."""
    rank, world, device = setup_distributed()
    if args.mode == "knn":
        data, held_out = open_splits(args, rank)
    else:
        held_out = open_data(args, train=False)
        if held_out is None and not (Path(args.data) / "train").is_dir():  # just class folders, as ImageNet-V2 comes
            held_out = folder_data(Path(args.data), train=True)
        data = held_out
    if held_out is None or data.labels is None or held_out.labels is None:
        raise BadInput(f"--data {args.data}: needs " + ("train/ and " if args.mode == "knn" else "") +
                       "val/ (or test/) with a folder for each class")
    real, num_classes = read_real_labels(args.real_labels, held_out), len(held_out.classes)
    resolve(args, choose(args, kind_of(args, held_out)), data, 1, 1)  # as rank 1: what rank 0 prints is about training
    if rank == 0:
        args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    model = build(args, num_classes, rank).to(device).eval()
    if args.mode == "knn":
        def features(images):
            with mixed_precision(args, device):
                return model(images).float()
        known, wanted = (on_every_image(features, part, args, rank, world, device) for part in (data, held_out))
        best = nearest_neighbours(known, torch.from_numpy(data.labels).to(device), wanted, num_classes).cpu()
    else:
        best = predict(model, held_out, args, rank, world, device)
    if rank == 0:
        report(best, held_out, args, real, f"{'k-NN' if args.mode == 'knn' else 'evaluation'}: {args.arch} on {args.data}")
        print(f"see {args.out}")
    if dist.is_initialized():
        dist.destroy_process_group()


@torch.inference_mode()
def throughput(args):
    """Prints images per second in evaluation, at `--batch-size` and `--amp`, and the parameter count (Table 2's columns)."""
    _, _, device = setup_distributed()
    resolve(args, choose(args, "toy" if args.data == "toy" else "photos"), (), 1, 1)
    model = build(args, len(vit.TOY_CLASSES) if args.arch == "toy" else 1000, 0).to(device).eval()
    if args.compile:
        model.compile(dynamic=False)
    images = torch.randn(args.batch_size, 3, args.img_size, args.img_size, device=device)
    times = []
    while len(times) < 4 or sum(times[2:]) < 3:
        began = time.perf_counter()
        with mixed_precision(args, device):
            model(images)
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    print(f"{args.arch}, {args.img_size} px, batch {args.batch_size}, amp {args.amp}, {device.type}: "
          f"{args.batch_size / np.median(times[2:]):,.0f} images/s, {memory_gb(device):.2f} GB")  # the first are warm-up


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.set_defaults(method="finetune")
    shared_arguments(parser)
    parser.set_defaults(clip_grad=None)  # the recipe says
    add = parser.add_argument
    add("--mode", choices=("finetune", "linear", "knn"), default="finetune", help="what is done with the network")
    add("--recipe", choices=("improved", "original", "transfer"), default="improved",
        help="of fine-tuning: the study's, DeiT's, or the study's for smaller data sets (default: improved)")
    add("--init", help="start from the weights of this checkpoint (default: from scratch)")
    add("--checkpoint-branch", choices=("base_encoder", "momentum_encoder"), default="base_encoder",
        help="which of MoCo-v3's two networks")
    add("--keep-blocks", type=int, metavar="K", help="of --init keep only the embedding and the first K blocks")
    add("--num-heads", type=int, help="attention heads (default: 12; DeiT-Tiny has 3, DeiT-Small 6)")
    add("--pool", choices=("avg", "token"), help="feature: mean of the patch tokens, or class token")
    add("--optimizer", choices=("adamw", "sgd"))
    add("--layer-decay", type=float, help="each layer learns slower than the next by this factor")
    add("--drop-path", type=float, help="probability of skipping the last block's branches; rises linearly from 0 at the first")
    add("--randaug", type=float, help="strength of RandAugment, 0 (off) to 10")
    add("--mixup", type=float, help="alpha of mixup, 0: off")
    add("--cutmix", type=float, help="alpha of cutmix, 0: off; with mixup, each has half of the batches")
    add("--erasing", type=float, help="probability of random erasing")
    add("--smoothing", type=float, help="label smoothing")
    add("--eval-every", type=int, help="epochs between evaluations")
    add("--eval-only", action="store_true", help="only evaluate --init, a classifier")
    add("--real-labels", metavar="FILE", help="ImageNet-ReaL's real.json: also count these labels as right")
    add("--throughput", action="store_true", help="only measure images per second")
    args = parser.parse_args(argv)
    args.out = args.out or Path("runs") / ("eval" if args.eval_only else args.mode)
    if args.init is None and (args.eval_only or args.keep_blocks is not None):
        raise BadInput(f"{'--eval-only' if args.eval_only else '--keep-blocks'}: needs --init CHECKPOINT")
    throughput(args) if args.throughput else evaluate(args) if args.eval_only or args.mode == "knn" else train(args)


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
