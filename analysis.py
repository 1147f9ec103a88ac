"""What the networks learned: layer similarity, frequencies and attention of pre-trained Vision Transformers, as figures.

The half of A Closer Look at Self-Supervised Lightweight Vision Transformers (ICML 2023, Sec. 4) that explains the other
half. Four instruments look at the layers of one or more checkpoints; layer 0 is the patch embedding, position added.

    cka        how similar two layers are: unbiased centred kernel alignment (Fig. 1, 6; Nguyen et al., 2021)
    fourier    how much fine detail a layer keeps: log amplitude at each frequency, relative to 0 (Fig. 3)
    attention  how far (Eq. 1) and how broadly (Eq. 2) each head looks (Fig. 5)
    maps       where the class token looks, layer by layer and in all (rollout; Abnar & Zuidema, 2020)
    all        the four of them, and all.png with everything on one page

Run it
    python analysis.py                                                   # all of runs/*/last.pt, on drawn shapes
    python analysis.py cka supervised=A.pt mae=B.pt moco=C.pt --data DIR # the first model is what the others meet
    python analysis.py all mae=B.pt random --format pdf                  # random: untrained, of the first one's size
    python analysis.py attention deit=D.pth mae=B.pth --heads 3 12       # heads cannot be read off a checkpoint
Any checkpoint that vit.load_weights reads will do. Results land in --out (runs/analysis): per instrument a figure, an .npz and
a .csv with the same numbers.

Shapes in the comments: B images, L patches, N = L + 1 tokens, D width, h heads, n layers.
"""
import argparse
import csv
import json
import math
import os
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from matplotlib.figure import Figure
from torchvision.transforms import v2
from tqdm import tqdm

import vit


# ------------------------------------------------------------------------------- layer similarity (Fig. 1, Fig. 6)

class CKA:
    """Centred kernel alignment between each of `n1` and each of `n2` layers, from mini-batches (Nguyen et al., 2021).

    Two layers are similar if they find the same images similar: with Gram matrices `K = X X^T`, `L = Y Y^T` of a mini-batch,

        CKA = mean HSIC(K, L) / sqrt(mean HSIC(K, K) * mean HSIC(L, L)),        means over the mini-batches.

    HSIC is the unbiased estimator (Song et al., 2012), so small mini-batches estimate the same number as large ones, and
    unrelated layers get 0 on average (a single value may be slightly negative). All sums are float64, and their size does
    not depend on how many images are seen.
    """

    def __init__(self, n1, n2):
        self.n1, self.n2, self.batches = n1, n2, 0
        self.sums = torch.zeros(n1, n2, 3, dtype=torch.float64)        # over mini-batches, of HSIC(K, L), (K, K), (L, L)
        self.products = torch.zeros(n1, n2, 3, 3, dtype=torch.float64)  # and of their products, for the standard error

    def update(self, features1, features2=None):
        """Adds a mini-batch: per layer `(B, ...)`, the same B >= 4 images everywhere; `features2=None`: `features1` again.

        Features may come from a generator: of each layer only the `(B, B)` Gram matrix is kept. ValueError for fewer than
        4 images, another number of layers, or another number of images.
        """
        grams1 = [centred_gram(features) for features in features1]
        grams2 = grams1 if features2 is None else [centred_gram(features) for features in features2]
        self.add(grams1, grams2)

    def add(self, grams1, grams2):
        """Adds a mini-batch given as two lists of `centred_gram` matrices `(B, B)`."""
        if (len(grams1), len(grams2)) != (self.n1, self.n2):
            raise ValueError(f"CKA of {self.n1} and {self.n2} layers got {len(grams1)} and {len(grams2)}")
        if len({len(gram) for gram in [*grams1, *grams2]}) > 1:
            raise ValueError("CKA compares layers on the same images: all layers need the same number of them")
        B = len(grams1[0])
        flat1, flat2 = (torch.stack(grams).flatten(1) / math.sqrt(B * (B - 3)) for grams in (grams1, grams2))  # (n, B * B)
        hsic = torch.stack([flat1 @ flat2.T,                            # all pairs of layers in one product
                            flat1.square().sum(1)[:, None].expand(self.n1, self.n2),
                            flat2.square().sum(1)[None].expand(self.n1, self.n2)], dim=-1).cpu()     # (n1, n2, 3)
        self.sums += hsic
        self.products += hsic[..., :, None] * hsic[..., None, :]
        self.batches += 1

    def compute(self):
        """CKA `(n1, n2)`, float64, at most 1; nan where a layer is the same for all images."""
        KL, KK, LL = self.mean().unbind(-1)
        return KL / (KK * LL).sqrt()

    def standard_error(self):
        """Standard error of `compute()`, `(n1, n2)`: its spread over mini-batches, by the delta method; nan if there is one."""
        mean = self.mean()                                              # (n1, n2, 3)
        KL, KK, LL = mean.unbind(-1)
        gradient = torch.stack([torch.ones_like(KL), -KL / (2 * KK), -KL / (2 * LL)], -1) / (KK * LL).sqrt()[..., None]
        covariance = self.products / self.batches - mean[..., :, None] * mean[..., None, :]
        variance = torch.einsum("xyi,xyij,xyj->xy", gradient, covariance, gradient).clamp(min=0)
        return (variance / (self.batches - 1 or math.nan)).sqrt()

    def mean(self):
        if not self.batches:
            raise ValueError("CKA has seen no mini-batch yet")
        return self.sums / self.batches


def centred_gram(features):
    """The Gram matrix of `features (B, ...)`, centred so that HSIC becomes an inner product; `(B, B)`, float64.

    With the diagonal left out, take off row and column sums / (B - 2) and put back the total / ((B - 1)(B - 2)) (Szekely &
    Rizzo, 2014). Of two such matrices, `(K * L).sum() / (B (B - 3))` is the unbiased HSIC, so each layer is centred once,
    not once per pair. ValueError for fewer than 4 images.
    """
    B = len(features)
    if B < 4:
        raise ValueError(f"the unbiased HSIC needs mini-batches of at least 4 images, not {B}")
    X = features.flatten(1).double()
    K = (X @ X.T).fill_diagonal_(0)
    rows = K.sum(1) / (B - 2)
    return (K - rows[:, None] - rows[None] + K.sum() / ((B - 1) * (B - 2))).fill_diagonal_(0)


# ------------------------------------------------------------------------------------------- frequencies (Fig. 3)

def fourier_log_amplitude(tokens, grid):
    """Relative log amplitude of feature maps along the diagonal, `(grid // 2 + 1,)`: frequency 0, 2 pi / grid, ..., pi.

    `tokens (B, L, D)` without class token. Per image and channel the log modulus of the 2-D Fourier transform, at equal
    horizontal and vertical frequency; mean over images and channels, minus its value at 0 (Park & Kim, 2022). The lower the
    last value, the less fine detail. ValueError if the patches are no `grid x grid`, or the grid is odd: it has no pi.
    """
    B, L, D = tokens.shape
    if L != grid * grid or grid % 2:
        raise ValueError(f"frequency pi needs a square grid of even side, not {L} patches on a side of {grid}")
    maps = tokens.transpose(1, 2).reshape(B, D, grid, grid)
    amplitude = torch.fft.rfft2(maps).diagonal(dim1=-2, dim2=-1).abs()                       # (B, D, grid // 2 + 1)
    log_amplitude = (amplitude + 1e-6).log().mean(dim=(0, 1))
    return log_amplitude - log_amplitude[0]


# --------------------------------------------------------------------------------------------- attention (Fig. 5)

def patch_attention(scores):
    """Pre-softmax scores `(B, h, N, N)`, class token at 0, to probabilities among the patches alone, `(B, h, L, L)`."""
    return scores[:, :, 1:, 1:].softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))


def attention_distance(scores, grid, patch_size):
    """Mean distance in pixels between a patch and where it looks, per head `(h,)` (Eq. 1).

    `scores (B, h, N, N)` pre-softmax with the class token at 0, which is dropped before the softmax; mean over images and
    queries. ValueError if the patches are no `grid x grid`.
    """
    distances = patch_distances(grid, patch_size).to(scores.device)
    if scores.shape[-1] != len(distances) + 1:
        raise ValueError(f"scores of {scores.shape[-1]} tokens, but a grid of {grid} x {grid} patches and a class token")
    probabilities = patch_attention(scores)
    return torch.einsum("bhqk,qk->h", probabilities, distances.to(probabilities.dtype)) / (len(scores) * len(distances))


def attention_entropy(scores):
    """Mean entropy in nats of a patch's attention over the patches, per head `(h,)`, from 0 to log L (Eq. 2).

    `scores (B, h, N, N)` as in `attention_distance`. Small: the head is sure where to look; large: it looks everywhere.
    """
    return torch.special.entr(patch_attention(scores)).sum(-1).mean(dim=(0, 2))


def patch_distances(grid, patch_size):
    """Euclidean distances in pixels between the patches of a `grid x grid` image, `(L, L)`, float64."""
    places = torch.cartesian_prod(*[torch.arange(grid, dtype=torch.float64)] * 2) * patch_size  # (L, 2), raster order
    return (places[:, None] - places).norm(dim=-1)


def attention_rollout(maps):
    """Attention followed through the blocks, `(depth, B, h, N, N) -> (B, N, N)` (Abnar & Zuidema, 2020).

    The residual connection keeps half of each token where it is; heads count alike. Rows sum to 1.
    """
    steps = 0.5 * maps.mean(2) + 0.5 * torch.eye(maps.shape[-1], dtype=maps.dtype, device=maps.device)  # (depth, B, N, N)
    rollout = steps[0]
    for step in steps[1:]:
        rollout = step @ rollout
    return rollout


# -------------------------------------------------------------------------------------------------- one pass

def layer_by_layer(model, images, return_scores=False):
    """Yields, from the embedding to the last block, the hidden state `(B, N, D)` and the block's pre-softmax scores.

    The same states as `model.encode(tokens, hidden=True)`, but never more than one layer at a time in memory. Scores
    `(B, h, N, N)` are None for the embedding, and where they are not asked for.
    """
    cls_token = (model.cls_token + model.pos_embed[:, :1]).expand(len(images), -1, -1)
    x = torch.cat([cls_token, model.embed(images)], dim=1)
    yield x, None
    for block in model.blocks:
        x, scores = block(x, return_scores)
        yield x, scores


def cka_features(model, layer, x):
    """What CKA compares of hidden state number `layer`: the patches of `x (B, N, D)`, normalised as what comes next sees them.

    That is the next block's first LayerNorm, or the network's last one.
    """
    final = model.norm if model.global_pool == "token" else model.fc_norm
    norm = model.blocks[layer].norm1 if layer < len(model.blocks) else final
    return norm(x[:, 1:])


@torch.inference_mode()
def measure(models, batches, statistics):
    """One pass through the data: `models {label: VisionTransformer}`, `batches` of images `(B, 3, S, S)`, B >= 4.

    Returns what `statistics` asks for: "cka": a `CKA` of all layers of all models, one model after the other; "fourier":
    `{label: (depth + 1, grid // 2 + 1)}`; "attention": "distance" and "entropy", `{label: (depth, h)}`. Images larger than a
    model's are shrunk. BadInput when a model's features are not finite.
    """
    n = sum(len(model.blocks) + 1 for model in models.values())
    cka, sums, count = CKA(n, n), {}, 0
    for images in batches:
        grams, count = [], count + len(images)
        for label, model in models.items():
            seen = {"fourier": [], "distance": [], "entropy": []}  # one entry per layer
            scan = layer_by_layer(model, fit(images, model), "attention" in statistics)
            for layer, (x, scores) in enumerate(scan):
                if "cka" in statistics:
                    grams.append(centred_gram(cka_features(model, layer, x)))
                if "fourier" in statistics:
                    seen["fourier"].append(fourier_log_amplitude(x[:, 1:], model.grid))
                if scores is not None:
                    seen["distance"].append(attention_distance(scores, model.grid, model.patch_size))
                    seen["entropy"].append(attention_entropy(scores))
            if not x.isfinite().all():
                raise BadInput(f"{label}: its features are not finite numbers, the checkpoint is damaged")
            for name, values in seen.items():
                if values:  # means over images: a mini-batch weighs as many as it has
                    by_model = sums.setdefault(name, {})
                    by_model[label] = by_model.get(label, 0) + torch.stack(values).double().cpu().numpy() * len(images)
        if grams:
            cka.add(grams, grams)
    found = {name: {label: total / count for label, total in by_model.items()} for name, by_model in sums.items()}
    return {**found, "cka": cka} if "cka" in statistics else found


def fit(images, model):
    """Images `(B, 3, S, S)` at the model's size, antialiased."""
    size = model.grid * model.patch_size
    return images if images.shape[-1] == size else F.interpolate(images, (size, size), mode="bicubic", antialias=True)


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


# -------------------------------------------------------------------------------------------------- figures

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe & Ito: told apart by all
STYLE = {"font.size": 9, "axes.titlesize": 9, "figure.titlesize": 11, "axes.spines.top": False, "axes.spines.right": False,
         "figure.dpi": 100, "savefig.dpi": 200}
WIDTH = 9  # inches


def draw_cka(figure, models, cka):
    """Above, each model with itself; below, each against the first, and how similar their layers are one by one."""
    labels, depths = list(models), [len(model.blocks) + 1 for model in models.values()]
    parts = dict(zip(labels, np.split(np.arange(sum(depths)), np.cumsum(depths)[:-1])))
    similarity, error = cka.compute().numpy(), cka.standard_error().numpy()
    first, n = labels[0], len(labels)
    rows = 1 if n == 1 else 2 if n < 4 else 3  # where the maps get small, the lines have a row of their own
    grid = figure.add_gridspec(rows, max(n, 2))
    lines = figure.add_subplot(grid[0, 1] if n == 1 else grid[1, 0] if n < 4 else grid[2, :])
    heat = [(figure.add_subplot(grid[0, i]), label, label) for i, label in enumerate(labels)]
    heat += [(figure.add_subplot(grid[1, i]), first, label) for i, label in enumerate(labels) if i]
    for axis, x, y in heat:
        picture = axis.imshow(similarity[np.ix_(parts[y], parts[x])], origin="lower", aspect="auto", vmin=0, vmax=1, cmap="viridis")
        axis.set_box_aspect(1)
        axis.spines[:].set_visible(False)
        ticks = [range(0, len(parts[label]), 1 if len(parts[label]) < 8 else 2 if n < 4 else 4) for label in (x, y)]
        axis.set(xlabel=f"layer of {x}", ylabel=f"layer of {y}", title=x if x == y else f"{y} and {x}",
                 xticks=ticks[0], yticks=ticks[1])
    figure.colorbar(picture, ax=[axis for axis, _, _ in heat], label="CKA", shrink=0.7).outline.set_visible(False)
    last = parts[first][-1]
    for colour, label in list(zip(COLOURS, labels))[n > 1:]:  # the first with itself only where it is alone
        alike = label != first and len(parts[label]) == len(parts[first])
        lines.plot(similarity[parts[label], last], color=colour, linestyle="--", linewidth=1, label=None if alike else label)
        if alike:
            same, spread = (values[parts[label], parts[first]] for values in (similarity, 2 * error))
            lines.plot(same, color=colour, marker="o", markersize=3, label=label)
            lines.fill_between(range(len(same)), same - spread, same + spread, color=colour, alpha=0.2, linewidth=0)
    lines.plot([], color="0.4", linestyle="--", linewidth=1, label="with its last layer")
    lines.set(xlabel="layer", ylabel=f"CKA with {first}'s same layer" if n > 1 else "CKA", xticks=range(0, max(depths), 2),
              ylim=(min(0, np.nan_to_num(similarity).min()), 1.03))
    lines.set_box_aspect(1 if n < 4 else None)
    lines.legend(fontsize=8, handlelength=1.5, framealpha=0.6, loc="lower left", ncols=6)


def draw_fourier(figure, models, fourier):
    """Per model the log amplitude over the frequencies, one line per layer; last, its value at pi per layer (Fig. 3)."""
    colours = matplotlib.colormaps["viridis"]
    wide = len(models) > 2
    grid = figure.add_gridspec(2 if wide else 1, len(models) + (not wide))
    depth = max(len(amplitude) for amplitude in fourier.values()) - 1
    spectra, axis = [], None
    for i, (label, amplitude) in enumerate(fourier.items()):
        axis = figure.add_subplot(grid[0, i], sharey=axis, sharex=axis)
        for layer, line in enumerate(amplitude):
            axis.plot(np.linspace(0, 1, len(line)), line, color=colours(layer / depth * 0.95))
        axis.set(title=label, xlabel="frequency", xticks=(0, 0.5, 1), xticklabels=("0", "0.5$\\pi$", "$\\pi$"))
        axis.tick_params(labelleft=not spectra)
        spectra.append(axis)
    spectra[0].set_ylabel("relative log amplitude")
    scale = matplotlib.cm.ScalarMappable(matplotlib.colors.Normalize(0, depth / 0.95), colours)
    bar = figure.colorbar(scale, ax=spectra, label="layer", boundaries=np.linspace(-0.5, depth + 0.5, depth + 2),
                          ticks=range(0, depth + 1, max(1, depth // 6)), pad=0.02)
    bar.outline.set_visible(False)
    axis = figure.add_subplot(grid[1, :] if wide else grid[0, -1])
    for colour, (label, amplitude) in zip(COLOURS, fourier.items()):
        axis.plot(amplitude[:, -1], color=colour, marker="o", markersize=3, label=label)
    axis.set(title="high frequencies", xlabel="layer", ylabel="$\\Delta$ log amplitude at $\\pi$", xticks=range(0, depth + 1, 2))
    axis.legend(fontsize=8)


def draw_attention(figure, models, distance, entropy):
    """Distance and entropy of every head (dots) over the layers, a column per model; blocks count from 1 (Fig. 5)."""
    axes = figure.subplots(2, len(models), sharex="col", sharey="row", squeeze=False)
    model = next(iter(models.values()))  # all have the same patches here
    uniform = patch_distances(model.grid, model.patch_size).mean().item(), math.log(model.grid ** 2)
    names = "attention distance (pixels)", "attention entropy (nats)"
    for row, values, limit, name in zip(axes, (distance, entropy), uniform, names):
        for axis, colour, (label, heads) in zip(row, COLOURS, values.items()):
            layers = np.arange(1, len(heads) + 1)
            axis.axhline(limit, color="0.6", linestyle="--", linewidth=1, label="uniform attention")
            axis.plot(layers, heads, ".", color=colour, alpha=0.7, markersize=5)
            axis.plot(layers, heads.mean(1), color=colour, label="mean of the heads")
            axis.set(xticks=layers[::1 if len(layers) < 8 else 2])
        row[0].set_ylabel(name)
    for axis, label in zip(axes[0], models):
        axis.set_title(label)
    for axis in axes[1]:
        axis.set_xlabel("layer")
    axes[0, 0].legend(fontsize=7)


@torch.inference_mode()
def draw_maps(figure, models, images, pixels, layers):
    """Where the class token looks, mean over heads: images `(B, 3, S, S)` normalised, `pixels` of them 0 to 1."""
    rows = [(label, i) for label in models for i in range(len(images))]
    axes = figure.subplots(len(rows), len(layers) + 2, squeeze=False)
    for axis_row, (label, i) in zip(axes, rows):
        model = models[label]
        maps = vit.attention_maps(model, fit(images[i:i + 1], model))                       # (depth, 1, h, N, N)
        pictures = {f"layer {layer}": maps[layer - 1, 0].mean(0) for layer in layers}
        pictures["rollout"] = attention_rollout(maps)[0]
        axis_row[0].imshow(pixels[i].permute(1, 2, 0).cpu().numpy())
        for axis, (name, picture) in zip(axis_row[1:], pictures.items()):
            axis.imshow(picture[0, 1:].view(model.grid, model.grid).cpu().numpy(), cmap="viridis", vmin=0)
            axis.set_title(name if (label, i) == rows[0] else "")
        axis_row[0].set_ylabel(label if i == 0 else "")
    axes[0, 0].set_title("image")
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)


def heights(n, rows):
    """Inches that each figure needs for `n` models, and `rows` images with maps."""
    return {"cka": 4.2 if n == 1 else 2 * min(8.2 / n, 3) + 1.1 if n < 4 else 3 * 8.2 / n + 1.8,
            "fourier": 3.3 if n < 3 else 5.2, "attention": 5, "maps": 0.7 + 1.45 * n * rows}


# -------------------------------------------------------------------------------------------------- numbers

def write_numbers(folder, models, found):
    """What was measured, as arrays (`.npz`) and as tables that a person can read (`.csv`), under the figures' names."""
    if "cka" in found:  # rows and columns of the matrices: all layers of the first model, of the second, ...
        names = [(label, layer) for label, model in models.items() for layer in range(len(model.blocks) + 1)]
        similarity, error = found["cka"].compute().numpy(), found["cka"].standard_error().numpy()
        write(folder / "cka", ["model", "layer", "other model", "other layer", "cka", "standard error"],
              ([*names[i], *names[j], similarity[i, j], error[i, j]] for i in range(len(names)) for j in range(i, len(names))),
              cka=similarity, standard_error=error, model=[label for label, _ in names], layer=[layer for _, layer in names])
    if "fourier" in found:
        steps = max(model.grid for model in models.values()) // 2
        write(folder / "fourier", ["model", "layer", *(f"{i / steps:.3g} pi" for i in range(steps + 1))],
              ([label, layer, *line] for label, lines in found["fourier"].items() for layer, line in enumerate(lines)),
              **{f"{label} amplitude": lines for label, lines in found["fourier"].items()})
    if "distance" in found:
        write(folder / "attention", ["model", "layer", "head", "distance (pixels)", "entropy (nats)"],
              ([label, i + 1, j + 1, found["distance"][label][i, j], found["entropy"][label][i, j]]
               for label in models for i, j in np.ndindex(*found["distance"][label].shape)),
              **{f"{label} {name}": found[name][label] for label in models for name in ("distance", "entropy")})


def write(stem, header, rows, **arrays):
    np.savez(stem.with_suffix(".npz"), **arrays)
    with stem.with_suffix(".csv").open("w", newline="") as file:
        csv.writer(file).writerows([header, *([round(v, 6) if isinstance(v, float) else v for v in row] for row in rows)])


# -------------------------------------------------------------------------------------------------- models, arguments

def open_models(args, device):
    """The networks to compare, `{label: VisionTransformer}`, sizes read off the checkpoints; says what it loads. BadInput."""
    names = args.models or [str(path) for path in sorted(Path("runs").glob("*/last.pt"))] or ["random"]
    if not args.models:
        print("no models named: " + (f"comparing what is in runs/: {', '.join(names)}" if names != ["random"] else
                                     "there is none in runs/*/last.pt either, so an untrained ViT is compared with itself"))
    heads = args.heads * len(names) if len(args.heads) == 1 else args.heads
    if len(heads) != len(names):
        raise BadInput(f"--heads: {len(heads)} numbers for {len(names)} models (give one for all, or one each)")
    models, untrained = {}, []
    for name, num_heads in zip(names, heads):
        label, path = name.split("=", 1) if "=" in name and not Path(name).exists() else (default_label(Path(name)), name)
        if label in models:
            raise BadInput(f"two models are called {label}: name them, as in one={path}")
        models[label] = None
        if path == "random":
            untrained.append(label)
            continue
        try:
            models[label], report = vit.from_weights(path, num_heads=num_heads)
        except ValueError as error:
            raise BadInput(f"model {label}: {error}") from None
        missing, unused = (", ".join(dict.fromkeys(key.split(".")[0] for key in keys)) or "nothing" for keys in report)
        print(f"{label}: {path}; initialised afresh: {missing}; unused in the file: {unused}")
    first = next((model for model in models.values() if model), None)
    for i, label in enumerate(untrained):
        torch.manual_seed(args.seed + i)
        models[label] = untrained_like(first) if first else \
            vit.vit_toy(img_size=32, patch_size=4) if args.data == "toy" else vit.vit_tiny()
    if not args.models:  # of what was found, only what can be compared
        left_out = [label for label in models if first and patches_of(models[label]) != patches_of(first)]
        left_out += [label for label in models if label not in left_out][len(COLOURS):]
        models = {label: model for label, model in models.items() if label not in left_out}
        if left_out:
            print(f"left out (other sizes, or no room): {', '.join(left_out)}")
    for label, model in models.items():
        print(f"{label}: {len(model.blocks)} blocks, width {model.embed_dim}, {model.blocks[0].attn.num_heads} heads, "
              f"{patches_of(model)}", flush=True)
    return {label: model.to(device).eval() for label, model in models.items()}


def default_label(path):
    """`runs/mae/last.pt` is called mae, `weights/deit.pth` deit."""
    return path.parent.name if path.stem == "last" and path.parent.name else path.stem


def untrained_like(model):
    block = model.blocks[0]
    return vit.VisionTransformer(
        model.grid * model.patch_size, model.patch_size, model.patch_embed.proj.in_channels, model.embed_dim, len(model.blocks),
        block.attn.num_heads, block.mlp.fc1.out_features / model.embed_dim)


def patches_of(model):
    return f"{model.grid} x {model.grid} patches of {model.patch_size} pixels"


def check(args, models):
    """What does not go together. BadInput."""
    first = next(iter(models))
    for label, model in models.items():
        if model.patch_embed.proj.in_channels != 3:
            raise BadInput(f"{label}: takes images of {model.patch_embed.proj.in_channels} channels, not 3")
        if args.what in ("fourier", "attention", "all") and patches_of(model) != patches_of(models[first]):
            raise BadInput(f"{args.what}: {first} has {patches_of(models[first])}, {label} has {patches_of(model)}; "
                           "frequencies, distances and entropies compare only on equal patches (cka and maps take any)")
        if args.what in ("fourier", "all") and model.grid % 2:
            raise BadInput(f"{args.what}: {label} has {patches_of(model)}, and an odd grid has no frequency pi (Fig. 3)")
        if args.what in ("maps", "all") and not set(args.layers or ()) <= set(range(1, len(model.blocks) + 1)):
            raise BadInput(f"--layers {args.layers}: the blocks of {label} are 1 to {len(model.blocks)}")
    if len(models) > len(COLOURS):
        raise BadInput(f"{len(models)} models: at most {len(COLOURS)} can be told apart in one figure")


def analyse(args):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    models = open_models(args, device)
    check(args, models)
    args.img_size = max(model.grid * model.patch_size for model in models.values())
    data, which = open_data(args, train=False), "held-out"
    if data is None:
        data, which = open_data(args, train=True), "training"
    index = np.random.default_rng(args.seed).permutation(len(data))[:args.images]
    parts = np.array_split(index, math.ceil(len(index) / args.batch_size))  # of equal size, to one image
    if args.what in ("cka", "all") and len(parts[-1]) < 4:
        raise BadInput(f"cka: {len(index)} images in mini-batches of --batch-size {args.batch_size}: the unbiased estimator "
                       "needs at least 4 in each")
    kind = "toy shapes" if args.data == "toy" else Path(args.data).resolve().name
    title = f"{len(index):,} {which} images of {kind}"
    print(f"{args.what}: {title}, {len(parts)} mini-batches of {len(parts[0])}, on {device}", flush=True)
    args.out.mkdir(parents=True, exist_ok=True)

    batches = (normalize(centre_crops(data, part, args).to(device), args) for part in parts)
    batches = tqdm(batches, total=len(parts), disable=not sys.stderr.isatty(), unit="batch")
    statistics = {"all": ("cka", "fourier", "attention"), "maps": ()}.get(args.what, (args.what,))
    found = measure(models, batches, statistics) if statistics else {}
    write_numbers(args.out, models, found)

    panels = {}  # figure: heading, and the function and arguments that draw it
    if "cka" in found:
        panels["cka"] = f"Layer similarity (CKA), {title}", draw_cka, (found["cka"],)
    if "fourier" in found:
        panels["fourier"] = f"Frequencies in the features, {title}", draw_fourier, (found["fourier"],)
    if "distance" in found:
        panels["attention"] = f"Attention of the heads, {title}", draw_attention, (found["distance"], found["entropy"])
    if args.what in ("maps", "all"):
        shown = centre_crops(data, index[:args.shown], args).to(device)
        pixels = shown / 255
        depth = min(len(model.blocks) for model in models.values())
        layers = args.layers or sorted({1, math.ceil(depth / 3), math.ceil(depth * 2 / 3), depth})
        panels["maps"] = (f"Attention of the class token (mean of the heads, each map from 0 to its maximum), {kind}",
                          draw_maps, (normalize(shown, args), pixels, layers))
    inches = heights(len(models), min(args.shown, len(index)))
    with matplotlib.rc_context(STYLE):
        for name, (heading, draw, values) in panels.items():
            figure = Figure((WIDTH, inches[name]), layout="constrained")
            figure.suptitle(heading)
            draw(figure, models, *values)
            save_figure(figure, args.out / f"{name}.{args.format}")
        if args.what == "all":
            page = Figure((WIDTH, sum(inches.values())), layout="constrained")
            parts = page.subfigures(len(panels), height_ratios=[inches[name] for name in panels])
            for part, (heading, draw, values) in zip(parts, panels.values()):
                part.suptitle(heading)
                draw(part, models, *values)
            save_figure(page, args.out / f"all.{args.format}")


def save_figure(figure, path):
    figure.savefig(path)
    print(f"drawn: {path}", flush=True)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("what", nargs="?", default="all", choices=("cka", "fourier", "attention", "maps", "all"), help="default: all")
    add("models", nargs="*", help="checkpoints as label=path or path; random: untrained (default: runs/*/last.pt)")
    add("--heads", type=int, nargs="+", default=[None], help="attention heads, one number for all models or one each (default: 12)")
    add("--data", default="toy", help=f"toy (drawn shapes), a folder with train/ and val/, or one of: {' '.join(NAMED)}")
    add("--root", default="data", help="where the named data sets lie")
    add("--download", action="store_true", help="fetch a named data set into --root first")
    add("--images", type=int, default=1024, help="look at this many, chosen by --seed")
    add("--batch-size", type=int, default=32, help="images in a mini-batch")
    add("--layers", type=int, nargs="+", help="maps: of these blocks, from 1 (default: four of them)")
    add("--shown", type=int, default=2, help="maps: of this many images")
    add("--mean", type=float, nargs=3, default=[0.485, 0.456, 0.406], help="of the images, subtracted (default: ImageNet's)")
    add("--std", type=float, nargs=3, default=[0.229, 0.224, 0.225], help="of the images, divided by (default: ImageNet's)")
    add("--seed", type=int, default=0)
    add("--out", type=Path, default=Path("runs/analysis"), help="folder for figures and numbers")
    add("--format", choices=("png", "pdf"), default="png", help="of the figures")
    args = parser.parse_intermixed_args(argv)
    for name in ("images", "batch_size", "shown"):
        if getattr(args, name) < 1:
            raise BadInput(f"--{name.replace('_', '-')} {getattr(args, name)} must be at least 1")
    args.fraction, args.long_tail = 1, False  # all of the data, for those functions that could take less
    analyse(args)


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
