"""MoCo-v3: a Vision Transformer learns to tell images apart (Chen, Xie, He, 2021), here ViT-Tiny.

Two random views of an image must resemble each other more than they resemble the other images of the batch. One view goes
through the encoder that learns, the other through its slowly moving average, the momentum encoder, whose outputs ("keys")
are what the first one's ("queries") are compared with. What is kept in the end is the encoder. The recipe is that of A Closer
Look at Self-Supervised Lightweight Vision Transformers (ICML 2023, Sec. 2).

    q = predictor(encoder(x1)),  k = momentum_encoder(x2),  both of length 1
    ctr(q, k) = -log( exp(q.k+ / T) / sum over the keys k of the batch exp(q.k / T) ),  k+ = the same image's     (Eq. 1)
    loss = 2T (ctr(q1, k2) + ctr(q2, k1)),   momentum_encoder <- m momentum_encoder + (1 - m) encoder      (Algorithm 1)

Run it
    laptop      python mocov3.py                                         # drawn shapes, no download, minutes
    small       python mocov3.py --data cifar100 --download              # 32 x 32 images: patch 4, held in memory
    one GPU     python mocov3.py --data DIR --compile                    # DIR/train/CLASS/*.jpg, DIR/val/CLASS/*.jpg
    8 GPUs      torchrun --nproc_per_node=8 mocov3.py --data DIR         # the paper's run: 400 epochs, batch 1024
    two nodes   torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 mocov3.py --data DIR
Results land in --out: config.json, log.jsonl, last.pt, curves.png, neighbours.png. --resume continues. In the log, beside the
loss: `positive`, how often a view's own key is the nearest; `spread`, the deviation of the projections per dimension over
1 / sqrt(dim), 1 at best and 0 in a collapse; `token_spread`, that of the class tokens; `knn`, accuracy by nearest neighbours.

Shapes in the comments: B images on this rank, S pixels, D width, d dimensions compared.
"""
import argparse
import copy
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
from torch.distributed.nn.functional import all_reduce  # the one that gradients flow through
from torch.nn.parallel import DistributedDataParallel
from torchvision.transforms import v2
from tqdm import tqdm

import vit

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (after the choice of a backend that needs no screen)


# ------------------------------------------------------------------------------------------------ the method

class BatchNorm(nn.BatchNorm1d):
    """BatchNorm over the images of all ranks, `(B, d) -> (B, d)`; alone it is `nn.BatchNorm1d`.

    With statistics of its own per rank, the network could tell by them which images share a rank. What `nn.SyncBatchNorm`
    does on GPUs, on any device. Each rank must bring the same number of images.
    """

    def forward(self, x):
        if not (self.training and dist.is_initialized() and dist.get_world_size() > 1):
            return super().forward(x)
        count, dtype = len(x) * dist.get_world_size(), x.dtype
        x = x.to(torch.promote_types(dtype, torch.float32))
        mean = all_reduce(x.sum(dim=0)) / count
        x = x - mean
        var = all_reduce((x * x).sum(dim=0)) / count
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * count / (count - 1), self.momentum)
        x = x * (var + self.eps).rsqrt()
        return (x * self.weight + self.bias if self.affine else x).to(dtype)


def mlp(*dims):
    """Linear layers, each with BatchNorm and, but for the last, ReLU; the last BatchNorm has no scale and shift (Sec. 4)."""
    layers = []
    for i, (dim_in, dim_out) in enumerate(zip(dims, dims[1:]), 1):
        last = i == len(dims) - 1
        layers += [nn.Linear(dim_in, dim_out, bias=False), BatchNorm(dim_out, affine=not last)]
        layers += [] if last else [nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


def similarities(q, k):
    """Cosines of this rank's queries `(B, d)` with all ranks' keys, `(B, B * ranks)`, and the column of each one's own key."""
    q, k = (F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=1) for x in (q, k))
    rank, keys = 0, k
    if dist.is_initialized():
        rank, keys = dist.get_rank(), k.new_empty(dist.get_world_size() * len(k), k.shape[1])
        dist.all_gather_into_tensor(keys, k.contiguous())
    with torch.autocast(q.device.type, enabled=False):  # the loss stays in float32
        return q @ keys.T, torch.arange(len(q), device=q.device) + rank * len(q)


def contrastive_loss(q, k, temperature):
    """InfoNCE of queries with the keys of all ranks, times 2T, which keeps the gradient's scale whatever T is (Eq. 1, Alg. 1).

    q `(B, d)`, k `(B, d)` without gradient; row i of both belongs to one image. A number: this rank's mean.
    """
    cosines, own = similarities(q, k)
    return 2 * temperature * F.cross_entropy(cosines / temperature, own)


class Monitors(NamedTuple):
    """What tells a collapse, each a number, this rank's mean."""
    positive: torch.Tensor      # share of the queries whose own key is the nearest of all
    spread: torch.Tensor        # of the projections
    token_spread: torch.Tensor  # of the class tokens: here no BatchNorm hides a collapse


def spread(x):
    """Deviation per dimension of rows `(B, d)` normalised to length 1, over the 1 / sqrt(d) of isotropic ones; all alike: 0."""
    return F.normalize(x.detach().float(), dim=1).std(dim=0).mean() * x.shape[1] ** 0.5


class MoCoV3(nn.Module):
    """Two encoders with projectors, one the moving average of the other, and the predictor of the first (Sec. 4).

    `encoder_fn(global_pool="token")` makes a `vit.VisionTransformer`; its `head` becomes the projector of 3 layers.
    `stop_grad_conv1` freezes the random patch embedding (Sec. 4.1: steadier for large models; the study does not).
    """

    def __init__(self, encoder_fn, dim=256, mlp_dim=4096, temperature=0.2, stop_grad_conv1=False):
        super().__init__()
        self.temperature = temperature
        self.base_encoder = encoder_fn(global_pool="token")
        with torch.no_grad():  # MoCo-v3 starts unlike MAE: query, key, value are three matrices to Xavier; the token is near 0
            for block in self.base_encoder.blocks:
                for matrix in block.attn.qkv.weight.chunk(3):
                    nn.init.xavier_uniform_(matrix)
            nn.init.normal_(self.base_encoder.cls_token, std=1e-6)
        self.base_encoder.head = mlp(self.base_encoder.embed_dim, mlp_dim, mlp_dim, dim)
        self.base_encoder.patch_embed.requires_grad_(not stop_grad_conv1)
        self.momentum_encoder = copy.deepcopy(self.base_encoder).requires_grad_(False)
        self.predictor = mlp(dim, mlp_dim, dim)

    @torch.no_grad()
    def update_momentum_encoder(self, m):
        """`momentum <- m momentum + (1 - m) base`: all parameters, no buffers (each encoder counts its own statistics)."""
        for average, parameter in zip(self.momentum_encoder.parameters(), self.base_encoder.parameters()):
            average.add_((parameter - average) * (1 - m))  # not lerp_: torch.compile would compile anew for every m

    @staticmethod
    def project(encoder, x1, x2):
        """Class tokens `(2B, D)` of two views `(B, 3, S, S)` each, and projections `(B, d)` of the one and the other.

        The transformer takes both at once, which keeps a GPU busy; BatchNorm must see one view at a time.
        """
        tokens = class_tokens(encoder, torch.cat([x1, x2]))
        return tokens, *map(encoder.head, tokens.chunk(2))

    def forward(self, x1, x2, m, monitors=False):
        """Views x1, x2 `(B, 3, S, S)`, momentum m -> loss (a number), and `Monitors` if asked for.

        The momentum encoder is updated first, so that its keys are those of after the last optimizer step (Alg. 1).
        """
        self.update_momentum_encoder(m)
        tokens, z1, z2 = self.project(self.base_encoder, x1, x2)
        q1, q2 = self.predictor(z1), self.predictor(z2)
        with torch.no_grad():
            _, k1, k2 = self.project(self.momentum_encoder, x1, x2)
        loss = contrastive_loss(q1, k2, self.temperature) + contrastive_loss(q2, k1, self.temperature)
        if not monitors:
            return loss
        cosines, own = similarities(q1.detach(), k2)
        return loss, Monitors((cosines.argmax(dim=1) == own).float().mean(), spread(z1), spread(tokens[:len(x1)]))


def class_tokens(encoder, images):
    """The feature that is kept: the encoder's normalised class token `(B, D)`, before the projector."""
    return encoder.pool(encoder.encode(encoder.embed(images)))


# ------------------------------------------------------------------------------------------------ the two views
# Both views are crops of one decoding. What follows the crop is done here to whole batches on the training device, with
# parameters drawn per image: batches `(n, 3, S, S)` of floats from 0 to 255, parameters `(n,)`. Each operation is
# torchvision's functional one.

def grey(images):
    return images.new_tensor([0.2989, 0.587, 0.114]).view(1, 3, 1, 1).mul(images).sum(dim=1, keepdim=True)


def brightness(images, factor):
    return (images * factor.view(-1, 1, 1, 1)).clamp_(0, 255)


def contrast(images, factor):
    return torch.lerp(grey(images).mean((1, 2, 3), keepdim=True), images, factor.view(-1, 1, 1, 1)).clamp_(0, 255)


def saturation(images, factor):
    return torch.lerp(grey(images), images, factor.view(-1, 1, 1, 1)).clamp_(0, 255)


def hue(images, turn):
    """Turns the hue by `turn` (1 = all the way round), HSV's value and saturation staying as they are."""
    r, g, b = images.unbind(dim=1)
    low, high = images.aminmax(dim=1)
    chroma = high - low
    divisor = torch.where(chroma > 0, chroma, 1)
    h = torch.where(high == r, g - b, torch.where(high == g, b - r + 2 * divisor, r - g + 4 * divisor)) / divisor
    h = h + 6 * turn.view(-1, 1, 1)
    h = h - 6 * (h / 6).floor()                     # (n, S, S), from 0, red, over 2, green, and 4, blue, to 6
    shares = (h - 3).abs() - 1, 2 - (h - 2).abs(), 2 - (h - 4).abs()
    return torch.stack([torch.addcmul(low, share.clamp_(0, 1), chroma) for share in shares], dim=1)


def blur(images, sigma, radius):
    """Gaussian blur of `sigma` pixels, kernel of `2 radius + 1` pixels, edges reflected; one direction after the other."""
    n, C, S, _ = images.shape
    kernel = torch.exp(-0.5 * (torch.arange(-radius, radius + 1, device=images.device) / sigma[:, None]) ** 2)
    kernel = (kernel / kernel.sum(dim=1, keepdim=True)).repeat_interleave(C, dim=0)[:, None]            # (n * C, 1, taps)
    x = F.pad(images, [radius] * 4, mode="reflect").view(1, n * C, S + 2 * radius, S + 2 * radius)
    x = F.conv2d(F.conv2d(x, kernel[:, :, :, None], groups=n * C), kernel[:, :, None, :], groups=n * C)
    return x.view(n, C, S, S)


def solarise(images):
    return torch.where(images >= 128, 255 - images, images)


JITTER = (brightness, contrast, saturation, hue)


class Views(NamedTuple):
    """What is to be done to each of n views."""
    jittered: torch.Tensor   # (n,) bool
    order: torch.Tensor      # (n, 4): a permutation of JITTER
    factors: torch.Tensor    # (n, 4): JITTER's parameters
    grey: torch.Tensor       # (n,) bool
    blurred: torch.Tensor    # (n,) bool
    sigma: torch.Tensor      # (n,) pixels
    solarised: torch.Tensor  # (n,) bool


def draw_views(u, jitter=(0.4, 0.4, 0.2, 0.1), grey=0.2, blur_sigma=2.0):
    """Uniform numbers `(B, 2, 13)` to the parameters of B pairs of views, pair by pair: BYOL's recipe, which MoCo-v3 took."""
    first_or_second = torch.tensor([[1.0, 0.0], [0.1, 0.2]])        # chances of a blur and of solarising
    factors = torch.tensor([1.0, 1.0, 1.0, 0.0]) + torch.tensor(jitter) * (2 * u[..., 5:9] - 1)
    views = Views(u[..., 0] < 0.8, u[..., 1:5].argsort(dim=-1), factors, u[..., 9] < grey,
                  u[..., 10] < first_or_second[:, 0], 0.1 + (blur_sigma - 0.1) * u[..., 11], u[..., 12] < first_or_second[:, 1])
    return Views(*(part.flatten(0, 1) for part in views))


def augment(images, views, radius):
    """Jitter, grey, blur, solarise, in place and in this order; each on those images of `(n, 3, S, S)` that are to have it."""
    def change(chosen, operation, *parameters):
        index = chosen.nonzero()[:, 0]
        if len(index):
            there = index.to(images.device, non_blocking=True)
            images[there] = operation(images[there], *(p[index].to(images.device, non_blocking=True) for p in parameters))

    for order in views.order.unique(dim=0):  # the images with one order of the four, together
        def jitter(x, factors, order=order.tolist()):
            for i in order:
                x = JITTER[i](x, factors[:, i])
            return x
        change(views.jittered & (views.order == order).all(dim=1), jitter, views.factors)
    change(views.grey, lambda x: grey(x).expand_as(x))
    change(views.blurred, lambda x, sigma: blur(x, sigma, radius), views.sigma)
    change(views.solarised, solarise)
    return images


def two_views(crops, batch, args):
    """The crops of `batch`, two of each image in turn, float `(2B, 3, S, S)`, 0 to 255, to views x1, x2 `(B, 3, S, S)`.

    The parameters are drawn on the CPU: choosing images by them then makes no GPU wait.
    """
    u = draw(batch, 2, 13, seed=args.seed, device=torch.device("cpu"))
    images = augment(crops, draw_views(u, args.jitter, args.grey, args.blur_sigma), math.ceil(3 * args.blur_sigma))
    return normalize(images, args).unflatten(0, (-1, 2)).unbind(dim=1)


# ------------------------------------------------------------------------------------ what the features are worth

class Neighbours(NamedTuple):
    """Of some images that are asked about: the nearest of some training images, by the cosine of their class tokens."""
    asked: list               # n indices
    nearest: torch.Tensor     # (n, k) indices of training images
    cosines: torch.Tensor     # (n, k)
    accuracy: float | None    # of their weighted vote on the label; None without labels


@torch.no_grad()
def features_of(encoder, data, index, args, device):
    """Class tokens of length 1, `(len(index), D)`, on the CPU, of the images in evaluation's view."""
    encoder.eval()
    features = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for k in range(0, len(index), 256):
            images = torch.cat(list(pool.map(lambda i: centre_crops(data, [i], args), index[k:k + 256])))
            features.append(F.normalize(class_tokens(encoder, normalize(images.to(device), args)), dim=1).cpu())
    encoder.train()
    return torch.cat(features)


def find_neighbours(encoder, data, held_out, args, device, k=20, temperature=0.07):
    """k-NN with the usual weights, exp(cosine / T): `--knn-images` training images, asked about half as many held-out ones.

    Without held-out images, the ones asked about are training images that are left out of the others.
    """
    asked_data = data if held_out is None else held_out
    asked = list(range(0, len(asked_data), math.ceil(len(asked_data) / math.ceil(args.knn_images / 2))))
    bank = list(range(0, len(data), math.ceil(len(data) / args.knn_images)))
    if held_out is None:
        asked = asked[::2]
        bank = sorted(set(bank) - set(asked)) or bank
    queries, keys = features_of(encoder, asked_data, asked, args, device), features_of(encoder, data, bank, args, device)
    cosines, nearest = (queries @ keys.T).topk(min(k, len(bank)))
    nearest, accuracy = torch.tensor(bank)[nearest], None
    if data.labels is not None and asked_data.labels is not None:
        labels = torch.from_numpy(data.labels)[nearest]                                                 # (n, k)
        votes = torch.zeros(len(asked), len(data.classes)).scatter_add_(1, labels, (cosines / temperature).exp())
        accuracy = (votes.argmax(dim=1) == torch.from_numpy(asked_data.labels)[asked]).float().mean().item()
    return Neighbours(asked, nearest, cosines, accuracy)


# ------------------------------------------------------------------------------------------------ pictures

def draw_neighbours(path, neighbours, data, held_out, args, title, rows=8, columns=8):
    """Some held-out images, each with its nearest training images, as PNG; green frame: the same class, red: another."""
    asked_data = data if held_out is None else held_out
    chosen = range(0, len(neighbours.asked), math.ceil(len(neighbours.asked) / rows))
    figure, axis = plt.subplots(figsize=(9.4, 1.05 * len(chosen) + 0.8))
    for row, i in enumerate(chosen):
        asked, nearest = neighbours.asked[i], neighbours.nearest[i, :columns].tolist()
        images = torch.cat([centre_crops(asked_data, [asked], args), centre_crops(data, nearest, args)]) / 255
        for column, image in enumerate(images.permute(0, 2, 3, 1).numpy()):
            x, y = 1.1 * column + 0.25 * (column > 0), 1.22 * row
            axis.imshow(image, extent=(x, x + 1, y + 1, y), interpolation="nearest" if args.img_size < 64 else "antialiased")
            if column == 0:
                continue
            axis.text(x + 0.5, y + 1.02, f"{neighbours.cosines[i, column - 1]:.2f}", fontsize=7, ha="center", va="top")
            if neighbours.accuracy is not None:
                alike = data.labels[nearest[column - 1]] == asked_data.labels[asked]
                axis.add_patch(plt.Rectangle((x, y), 1, 1, fill=False, linewidth=2, color="tab:green" if alike else "tab:red"))
        if neighbours.accuracy is not None:
            name = textwrap.shorten(str(asked_data.classes[asked_data.labels[asked]]), 16, placeholder=".")
            axis.text(-0.1, y + 0.5, name, fontsize=8, ha="right", va="center")
    axis.text(0.5, -0.08, "training" if held_out is None else "held-out", fontsize=9, ha="center")
    axis.text(1.35, -0.08, "nearest training images, cosine below", fontsize=9)
    axis.set(xlim=(-1.1, 1.35 + 1.1 * columns), ylim=(1.22 * len(chosen), -0.3))
    axis.axis("off")
    figure.suptitle(title, fontsize=11)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def draw_curves(folder, title, args, classes):
    """Loss and monitors over the epochs, from log.jsonl, as curves.png."""
    entries = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    figure, ((loss, positive), (deviation, knn)) = plt.subplots(2, 2, figsize=(8.4, 5.2), sharex=True)

    def plot(axis, key, **style):
        points = [(entry["epoch"], entry[key]) for entry in entries if entry.get(key) is not None]
        axis.plot([epoch for epoch, _ in points], [value for _, value in points], **style)
        return points

    def level(axis, value, label, style=":"):
        axis.axhline(value, color="black", linestyle=style, linewidth=1, label=label)

    plot(loss, "loss")
    plot(positive, "positive")
    level(positive, 1 / args.batch_size, "chance")
    plot(deviation, "spread", label="projections")
    plot(deviation, "token_spread", label="class tokens")
    level(deviation, 1, "isotropic")
    measured = plot(knn, "knn", marker="o", markersize=4)
    if measured:
        level(knn, measured[0][1], "untrained" if measured[0][0] == 0 else "first", "--")
        level(knn, 1 / classes, "chance")
    for axis, name in ((loss, "loss"), (positive, "own key is the nearest, share of views"),
                       (deviation, "deviation x sqrt(dimensions)"), (knn, "k-NN accuracy" if measured else "no labels, no k-NN")):
        axis.set_title(name, fontsize=10)
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.set_ylim(bottom=0)
            axis.legend(fontsize=8)
        if axis in (deviation, knn):
            axis.set_xlabel("epoch")
    figure.suptitle(title, fontsize=11)
    figure.tight_layout()
    figure.savefig(folder / "curves.png", dpi=100)
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

COMMON = dict(temperature=0.2, stop_grad_conv1=False, weight_decay=0.1)
REAL = dict(COMMON, momentum=0.99, jitter=[0.4, 0.4, 0.2, 0.1], grey=0.2)
PRESETS = {  # the defaults, chosen by the data: toy shapes, small images, folders of photographs (the paper's)
    # Two views of a toy scene would know each other by its colours, hence the strong jitter; a short run needs a fast average.
    "toy": dict(COMMON, momentum=0.95, jitter=[0.4, 0.4, 0.8, 0.5], grey=0.5, arch="toy", img_size=32, patch_size=8, min_crop=0.5,
                blur_sigma=0.5, dim=64, mlp_dim=256, epochs=8, warmup_epochs=1, batch_size=64, base_lr=4e-3, knn_every=2,
                knn_images=2048),
    "small": dict(REAL, arch="tiny", img_size=32, patch_size=4, min_crop=0.2, blur_sigma=0.5, dim=256,
                  mlp_dim=1024, epochs=400, warmup_epochs=20, batch_size=512, base_lr=3e-4, knn_every=10, knn_images=10000),
    "photos": dict(REAL, arch="tiny", img_size=224, patch_size=16, min_crop=0.08, blur_sigma=2.0, dim=256,
                   mlp_dim=4096, epochs=400, warmup_epochs=40, batch_size=1024, base_lr=1.5e-4, knn_every=10, knn_images=10000),
}


def build(args):
    """The encoders and heads that the arguments describe."""
    encoder_fn = functools.partial(vit.ARCHS[args.arch], img_size=args.img_size, patch_size=args.patch_size)
    return MoCoV3(encoder_fn, args.dim, args.mlp_dim, args.temperature, args.stop_grad_conv1)


def train(args):
    rank, world, device = setup_distributed()
    stop = catch_stop()
    data, held_out = open_splits(args, rank)
    resolve(args, PRESETS["toy" if args.data == "toy" else "photos" if data.pixels is None else "small"], data, rank, world)

    # An epoch is as many whole batches as the images fill: keys are gathered in equal parts, and BatchNorm wants its batch.
    # The rest is not lost, the next epoch begins with it.
    visits = len(data) // args.batch_size * args.batch_size
    if visits == 0 or args.batch_size < 2 * world:
        raise BadInput(f"--batch-size {args.batch_size}: MoCo-v3 compares the images of whole batches, take from {2 * world} "
                       f"(two per rank) to {len(data)} (the training images)")
    steps_per_epoch = visits // args.batch_size
    steps, warmup_steps = args.epochs * steps_per_epoch, int(args.warmup_epochs * steps_per_epoch)

    torch.manual_seed(args.seed)
    model = build(args).to(device)
    if args.init:
        report = vit.load_weights(model.base_encoder, args.init)
        model.momentum_encoder.load_state_dict(model.base_encoder.state_dict())
        if rank == 0:
            print(f"--init {args.init}: {report}")
    if args.compile and world > 1:
        raise BadInput("--compile: only in one process here; BatchNorm and the keys talk to the other ranks in the middle of the network")
    checkpoint = begin_run(args, rank)
    optimizer = torch.optim.AdamW(parameter_groups(model, args.weight_decay), betas=(0.9, 0.999), fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
    autocast = functools.partial(torch.autocast, device.type, {"fp16": torch.float16}.get(args.amp, torch.bfloat16), args.amp != "off")
    start = 0
    if checkpoint:
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        scaler.load_state_dict(checkpoint["scaler"])
        start = checkpoint["step"]
    if args.compile:
        model.compile()  # not dynamic=False: the momentum, another number each step, would be compiled into it
    network = model
    if world > 1:  # no buffers to broadcast: the statistics of BatchNorm are those of all ranks already
        network = DistributedDataParallel(model, [device] if device.type == "cuda" else None, broadcast_buffers=False)

    log = Log(args.out, start, steps, rank)
    save_every, look_every = max(steps_per_epoch, steps // 100), args.knn_every * steps_per_epoch
    title, classes = f"MoCo-v3 {args.arch} on {args.data}", len(data.classes)

    def look():
        """Measures the encoder by its neighbours (rank 0), and draws them; the k-NN accuracy, where there are labels."""
        if rank > 0 or args.knn_images < 1:
            return {}
        found = find_neighbours(model.base_encoder, data, held_out, args, device)
        draw_neighbours(args.out / "neighbours.png", found, data, held_out, args,
                        f"{title}, step {step} of {steps}" + ("" if found.accuracy is None else f": k-NN {found.accuracy:.1%}"))
        return {} if found.accuracy is None else {"knn": found.accuracy}

    step = start
    if start == 0 and (found := look()):
        log(epoch=0.0, step=0, loss=None, **found)  # the untrained encoder's, to compare with
    end = min(steps, start + (args.max_steps or steps))
    plan = (batch for step in range(start, end) for batch in batches_of(step, visits, args.batch_size, 1, rank, world))
    crops = crops_of(data, plan, args, device, crops=2)
    began = since = time.perf_counter()
    waited, losses = 0.0, []

    for step in range(start, end):
        lr = learning_rate(step, steps, warmup_steps, args.lr)
        m = learning_rate(step, steps, 0, args.momentum, 1.0)           # the same cosine, from --momentum up to 1
        for group in optimizer.param_groups:
            group["lr"] = lr

        batch, = batches_of(step, visits, args.batch_size, 1, rank, world)
        asked = time.perf_counter()
        x1, x2 = two_views(next(crops), batch, args)                                        # (B, 3, S, S) each
        waited += time.perf_counter() - asked
        with autocast():
            loss, monitors = network(x1, x2, m, monitors=True)
        scaler.scale(loss).backward()

        mean_loss, stopping, *watched = across_ranks(loss.detach(), float(bool(stop)), *monitors)
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad)
        if not math.isfinite(mean_loss + (0 if scaler.is_enabled() else norm.item())):  # seen by all ranks alike, before the update
            raise BadInput(f"step {step + 1}: the loss is {mean_loss}, its gradient {norm:.3g} long; stopped before the update, "
                           f"{args.out / 'last.pt'} is as it was (try --amp bf16, --clip-grad 1, a lower --base-lr; or a broken image?)")
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

        losses.append((mean_loss, *watched))
        done, step = step + 1 == end or stopping > 0, step + 1
        saving = done or step % save_every == 0
        looking = step % look_every == 0 or (done and not stopping)
        log.bar.update()
        if saving or looking or step % args.log_every == 0:
            now = time.perf_counter()
            mean = np.mean(losses, axis=0).tolist()
            log(epoch=step / steps_per_epoch, step=step, loss=mean[0], lr=lr, momentum=m, **dict(zip(Monitors._fields, mean[1:])),
                images_per_s=len(losses) * args.batch_size / (now - since), data_wait=waited / (now - since),
                **(look() if looking else {}))
            since, waited, losses = time.perf_counter(), 0.0, []
        if rank == 0 and saving:
            save_checkpoint(args.out / "last.pt", model=model.state_dict(), optimizer=optimizer.state_dict(),
                            scaler=scaler.state_dict(), step=step, config=settings(args))
        if rank == 0 and (looking or done):
            draw_curves(args.out, title, args, classes)
        if done:
            break
    if rank == 0:
        log.bar.close()
        print(f"{'done' if step == steps else 'stopped, --resume continues'}: step {step} of {steps}, "
              f"{time.perf_counter() - began:.0f} s, {memory_gb(device):.2f} GB; see {args.out}", flush=True)
    if dist.is_initialized():
        dist.destroy_process_group()


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.set_defaults(method="mocov3")
    shared_arguments(parser)
    add = parser.add_argument
    add("--momentum", type=float, help="of the momentum encoder at the start; a cosine takes it to 1")
    add("--temperature", type=float, help="that cosines are divided by, T")
    add("--dim", type=int, help="dimensions in which images are compared")
    add("--mlp-dim", type=int, help="hidden width of projector and predictor")
    add("--jitter", type=float, nargs=4, metavar="X", help="largest change of brightness, contrast, saturation, hue")
    add("--grey", type=float, help="share of the views that lose their colours")
    add("--blur-sigma", type=float, help="largest blur in pixels (the smallest is 0.1); kernel: three times that to each side")
    add("--stop-grad-conv1", action=argparse.BooleanOptionalAction, default=None, help="freeze the random patch embedding")
    add("--knn-every", type=int, help="epochs between measurements of the k-NN accuracy")
    add("--knn-images", type=int, help="training images that k-NN looks among; 0: no k-NN, no picture of neighbours")
    add("--init", help="start from the encoder weights of this checkpoint")
    args = parser.parse_args(argv)
    args.out = args.out or Path("runs") / args.method
    if args.accum != 1:
        raise BadInput(f"--accum {args.accum}: MoCo-v3 cannot split an update, as its loss and its BatchNorm compare the images of "
                       "the whole batch; leave it at 1 and use more ranks, --amp, or a smaller --batch-size")
    if args.momentum is not None and not 0 <= args.momentum <= 1:
        raise BadInput(f"--momentum {args.momentum} must be from 0 to 1")
    if args.temperature is not None and not args.temperature > 0:
        raise BadInput(f"--temperature {args.temperature} must be above 0")
    if args.jitter and not (all(0 <= change <= 1 for change in args.jitter) and args.jitter[3] <= 0.5):
        raise BadInput(f"--jitter {args.jitter}: each must be from 0 to 1, the hue's up to 0.5")
    if args.blur_sigma is not None and not args.blur_sigma >= 0.1:
        raise BadInput(f"--blur-sigma {args.blur_sigma} must be at least 0.1")
    if args.knn_every is not None and args.knn_every < 1:
        raise BadInput(f"--knn-every {args.knn_every} must be at least 1 (--knn-images 0 switches k-NN off)")
    train(args)


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
