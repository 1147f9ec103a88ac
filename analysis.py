"""Analysis of pre-trained Vision Transformers: similarity of layers, frequencies, attention.

Instruments of A Closer Look at Self-Supervised Lightweight Vision Transformers (ICML 2023, Sec. 4):
    cka        how similar two layers are: unbiased centered kernel alignment (Fig. 1, Fig. 6)
    fourier    how much fine detail a layer keeps: log amplitude by frequency (Fig. 3)
    attention  how far (Eq. 1) and how broadly (Eq. 2) each head looks (Fig. 5)

    python analysis.py                             # all three: mae.py's run and an untrained twin
    python analysis.py cka deit:3=D.pth mae=M.pth random --data DIR
    python analysis.py curves runs/mae runs/mae-1  # training curves, a line for each run

A model is `label=path`, any file that vit.py loads (`label:3=path` if it has 3 heads, not 12), or
`random`, an untrained twin of the first. Results in --out: figures, and their numbers as .json.
Shapes: B images, L patches, N = L + 1 tokens, D width, h heads. Layer 0 is the patch embedding.
"""
import argparse
import json
import os
import sys
from pathlib import Path

import numpy as np
import torch
import torchvision
from matplotlib.figure import Figure
from PIL import Image
from torch import distributed as dist
from torch.utils.data import Dataset, Subset
from torchvision.transforms import v2
from tqdm import tqdm

import vit


class CKA:
    """Centered kernel alignment of each of `n1` and each of `n2` layers, by mini-batches (Fig. 1).

    Two layers are similar if they find the same images similar. Of Gram matrices K, L of a batch,
    `CKA = mean HSIC(K, L) / sqrt(mean HSIC(K, K) mean HSIC(L, L))`, unbiased (Nguyen et al., 2021).
    """

    def __init__(self, n1, n2):
        self.n1 = n1
        self.hsic = torch.zeros(n1 + n2, n1 + n2, dtype=torch.float64)  # sums over batches

    def update(self, features1, features2):
        """Adds a mini-batch: for each layer `(B, ...)`, the same B images. InputError for B < 4."""
        grams = torch.stack([centered_gram(x) for x in (*features1, *features2)]).flatten(1)
        self.hsic += (grams @ grams.T).cpu()  # of all pairs of layers; the diagonal normalizes

    def compute(self):
        """CKA `(n1, n2)`, float64, at most 1; nan if a layer is zero."""
        norm = self.hsic.diagonal().sqrt()
        return (self.hsic / (norm[:, None] * norm))[:self.n1, self.n1:]


def centered_gram(features):
    """`(B, ...) -> (B, B)`, float64; of two layers `(K * L).sum()` is the unbiased HSIC. B >= 4."""
    B = len(features)
    if B < 4:
        raise vit.InputError(f"CKA: at least 4 images a batch, not {B} (--batch-size, --images)")
    X = features.flatten(1).double()
    K = (X @ X.T).fill_diagonal_(0)  # Gram matrix; the unbiased HSIC leaves out the diagonal
    rows = K.sum(dim=1) / (B - 2)  # U-centering (Szekely and Rizzo, 2014)
    K = K - rows[:, None] - rows[None, :] + K.sum() / ((B - 1) * (B - 2))
    return K.fill_diagonal_(0) / (B * (B - 3)) ** 0.5


def cka_features(model, states):
    """All states `(B, N, D)` as the next norm puts them out, without class token: `(B, L, D)`."""
    final = model.norm if model.global_pool == "token" else model.fc_norm
    norms = [block.norm1 for block in model.blocks] + [final]
    return [norm(x[:, 1:]) for norm, x in zip(norms, states)]


def fourier_log_amplitude(tokens, grid):
    """Log amplitude of feature maps at frequencies 0, 2 pi / grid, ..., pi; at 0 it is 0 (Fig. 3).

    tokens `(B, L, D)`, no class token -> `(grid // 2 + 1,)`: diagonal of the Fourier transform, log
    modulus, mean over images and channels (Park and Kim, 2022). InputError for an odd grid.
    """
    if grid % 2:
        raise vit.InputError(f"{grid} x {grid} patches, odd: no frequency pi; use cka, attention")
    maps = tokens.transpose(1, 2).unflatten(-1, (grid, grid))  # (B, D, grid, grid)
    amplitude = torch.fft.rfft2(maps).diagonal(dim1=-2, dim2=-1).abs()  # (B, D, grid // 2 + 1)
    log_amplitude = (amplitude + 1e-6).log().mean(dim=(0, 1))
    return log_amplitude - log_amplitude[0]


def attention_distance(scores, grid, patch_size):
    """Mean distance in pixels between a patch and where it looks, per head `(h,)` (Eq. 1).

    scores `(B, h, N, N)`; the class token is dropped before the softmax; mean of images, queries.
    """
    attention = scores[:, :, 1:, 1:].softmax(dim=-1).mean(dim=0)  # (h, L, L)
    places = patch_size * torch.cartesian_prod(torch.arange(grid), torch.arange(grid)).to(attention)
    distances = (places[:, None] - places).norm(dim=-1)  # (L, L), patches row by row
    return (attention * distances).sum(dim=-1).mean(dim=-1)


def attention_entropy(scores):
    """Mean entropy in nats, 0 to log L, of patches' attention per head (Eq. 2); scores as above."""
    attention = scores[:, :, 1:, 1:].softmax(dim=-1)
    return torch.special.entr(attention).sum(dim=-1).mean(dim=(0, 2))  # entr(p) = -p log p


def open_models(words, seed):
    """Networks by label, from the words `label=path`, `label:heads=path` and `random`."""
    models = {}
    for word in words:
        name, _, path = word.partition("=")
        label, _, heads = name.partition(":")
        num_heads = int(heads) if heads.isdigit() else None
        if path and label not in models and (num_heads or not heads):
            models[label], report = vit.from_weights(path, num_heads)
            print(f"{label}: {path}, {models[label].blocks[0].attn.num_heads} heads; {report}")
        elif word == "random" and models and word not in models:
            first = list(models.values())[0]
            block = first.blocks[0]
            torch.manual_seed(seed)
            models[word] = vit.VisionTransformer(
                img_size=first.grid * first.patch_size, patch_size=first.patch_size,
                embed_dim=first.embed_dim, depth=len(first.blocks), num_heads=block.attn.num_heads,
                mlp_ratio=block.mlp.fc1.out_features / first.embed_dim)
        else:
            raise vit.InputError(f"{word}: give label=path (each label once), then maybe random")
    return models


def mini_batches(args, data, device):
    """Yields images that --seed chooses, normalized, `(B, 3, S, S)`."""
    chosen = np.random.default_rng((args.seed, 0)).permutation(len(data))[:args.images]
    for indices in tqdm(np.split(chosen, args.images // args.batch_size), disable=None):
        images = torch.stack([center_crop(data[i][0], args.img_size) for i in indices]).to(device)
        yield (images - vit.MEAN.to(device)) / vit.STD.to(device)


@torch.inference_mode()
def measure(models, batches, instruments, reference=None):
    """What instruments measure on mini-batches `(B, 3, S, S)` of equal size: arrays by label.

    "cka": `[a][b] (layers of a, layers of b)`, b is a itself or the reference; "fourier": `[a]
    (depth + 1, grid // 2 + 1)`; "attention": `[a] (depth, 2, h)`, Eq. 1 and 2 of each block.
    """
    reference = reference or list(models)[0]
    cka = {}
    if "cka" in instruments:
        pairs = [(a, b) for a in models for b in (a, reference)]
        cka = {(a, b): CKA(len(models[a].blocks) + 1, len(models[b].blocks) + 1) for a, b in pairs}
    fourier = {label: [] for label in models}  # a tensor for each mini-batch
    attention = {label: [] for label in models}
    for images in batches:
        features = {}
        for label, model in models.items():
            states = list(model.states(model.embed(images)))
            if "cka" in instruments:
                features[label] = cka_features(model, states)
            if "fourier" in instruments:
                rows = [fourier_log_amplitude(x[:, 1:], model.grid) for x in states]
                fourier[label].append(torch.stack(rows).cpu())
            if "attention" in instruments:
                attention[label].append(head_statistics(model, states).cpu())
        for a, b in cka:
            cka[a, b].update(features[a], features[b])
    results = {"cka": {}}
    for a, b in cka:
        results["cka"].setdefault(a, {})[b] = cka[a, b].compute().numpy()
    for name, parts in (("fourier", fourier), ("attention", attention)):
        if name in instruments:
            results[name] = {a: torch.stack(parts[a]).mean(dim=0).numpy() for a in models}
    return results


def head_statistics(model, states):
    """Distance and entropy of the heads of all blocks, `(depth, 2, h)`."""
    rows = []
    for block, x in zip(model.blocks, states):
        scores = block.attn.scores(block.norm1(x))  # of one block at a time: they are large
        distance = attention_distance(scores, model.grid, model.patch_size)
        rows.append(torch.stack([distance, attention_entropy(scores)]))
    return torch.stack(rows)


def draw_cka(cka):
    """Fig. 1, 6: each model with itself; below, with the reference."""
    rows = min(2, len(cka))
    figure = Figure((2.2 * len(cka) + 1, 2.6 * rows), layout="constrained")
    for column, a in enumerate(cka, 1):
        for row, b in enumerate(cka[a]):  # a itself, then the reference (one entry if it is a)
            axis = figure.add_subplot(rows, len(cka), row * len(cka) + column)
            image = axis.imshow(cka[a][b], origin="lower", vmin=0, vmax=1)
            axis.set(xlabel=f"layer of {b}", ylabel=f"layer of {a}")
    figure.colorbar(image, ax=figure.axes, label="CKA")
    return figure


def draw_fourier(fourier):
    """Fig. 3: the value at frequency pi, layer by layer."""
    lines = {label: (range(len(rows)), rows[:, -1]) for label, rows in fourier.items()}
    return draw_lines([("log amplitude at frequency pi, relative to 0", lines)], "layer")


def draw_attention(attention):
    """Fig. 5: a dot is a head, a line their mean."""
    panels = []
    for k, name in enumerate(("distance in pixels", "entropy in nats")):
        lines = {a: (range(1, len(rows) + 1), rows[:, k]) for a, rows in attention.items()}
        panels.append((name, lines))
    return draw_lines(panels, "layer")


def draw_curves(folders):
    """The scalars in the log.jsonl of training runs, a panel for each scalar of each script."""
    panels = {}
    for folder in folders:
        log = Path(folder) / "log.jsonl"
        if not log.exists():
            raise vit.InputError(f"{log}: no such file")
        config = log.with_name("config.json")  # each script has settings of its own
        setting_names = sorted(json.loads(config.read_text())) if config.exists() else []
        entries = [json.loads(line) for line in log.read_text().splitlines()]
        names = {name for entry in entries for name in entry}
        for name in names - {"epoch", "step", "lr", "images_per_s", "data_wait"}:
            points = [(entry["epoch"], entry[name]) for entry in entries if name in entry]
            lines = panels.setdefault((name, *setting_names), {})
            lines[folder] = np.transpose(points)  # x, y
    if not panels:
        raise vit.InputError(f"{' '.join(folders)}: nothing logged yet")
    return draw_lines([(key[0], panels[key]) for key in sorted(panels)], "epoch")


def draw_lines(panels, xlabel):
    """Panels `(ylabel, {label: (x, y)})`; y is `(n,)`, or `(n, h)`: h dots and their mean."""
    columns = min(3, len(panels))
    rows = (len(panels) + 2) // 3
    figure = Figure((4.5 * columns, 4 * rows), layout="constrained")
    for place, (ylabel, lines) in enumerate(panels, 1):
        axis = figure.add_subplot(rows, columns, place, xlabel=xlabel, ylabel=ylabel)
        for label, (x, y) in lines.items():
            line, = axis.plot(x, y.reshape(len(y), -1).mean(axis=1), label=label)
            if y.ndim == 2:
                axis.plot(x, y, ".", color=line.get_color(), alpha=0.4)
        axis.legend()
    return figure


def main(argv=None):
    draw = {"cka": draw_cka, "fourier": draw_fourier, "attention": draw_attention}
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        usage=argparse.SUPPRESS, allow_abbrev=False)
    add = parser.add_argument
    add("command", nargs="?", default="all", choices=["all", *draw, "curves"], help="what to do")
    add("names", nargs="*", help="models, label=path or random; curves: folders of runs")
    add("--reference", help="label of the model that cka compares the others with, else the first")
    add("--images", type=count, default=1024, help="images in whole mini-batches, chosen by --seed")
    add("--batch-size", type=count, default=128, help="images in a mini-batch")
    add("--data", default="toy", help=f"folder with val/, or toy, {', '.join(NAMED)}")
    add("--root", default="data", help="folder of downloads")
    add("--download", action="store_true", help="download CIFAR or Fashion-MNIST")
    add("--seed", type=int, default=0, help="of the images, and of random")
    add("--out", type=Path, default="runs/analysis", help="folder of the results")
    args = parser.parse_intermixed_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.command == "curves":
        draw_curves(args.names or ["runs/mae"]).savefig(args.out / "curves.png", dpi=150)
        print(f"figure: {args.out / 'curves.png'}")
        return
    words = args.names or ["mae=runs/mae/last.pt", "random"]
    models = open_models(words, args.seed)
    if args.reference and args.reference not in models:
        raise vit.InputError(f"--reference {args.reference}: not one of {', '.join(models)}")
    sizes = sorted({model.grid * model.patch_size for model in models.values()})
    if len(sizes) > 1:
        raise vit.InputError(f"the models take images of different sizes, in pixels: {sizes}")
    args.img_size = sizes[0]
    data = open_data(args, train=False)
    args.batch_size = min(args.batch_size, args.images, len(data))
    args.images = min(args.images, len(data)) // args.batch_size * args.batch_size
    instruments = list(draw) if args.command == "all" else [args.command]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    models = {label: model.to(device).eval() for label, model in models.items()}
    results = measure(models, mini_batches(args, data, device), instruments, args.reference)

    about = f"{args.images:,} validation images of {Path(args.data).name}"
    for name in instruments:
        figure = draw[name](results[name])
        figure.suptitle(f"{name}: {about}")
        figure.savefig(args.out / f"{name}.png", dpi=150)
        record = {"about": about, "models": words, name: results[name]}
        (args.out / f"{name}.json").write_text(json.dumps(record, default=np.ndarray.tolist))
    print(f"{about}; figures and numbers in {args.out}: {', '.join(instruments)}")


# ==================== plumbing: the same in all scripts; skip it at first

LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))
WORLD = int(os.environ.get("WORLD_SIZE", 1))
BICUBIC = v2.InterpolationMode.BICUBIC
to_tensor = v2.Compose([v2.RGB(), v2.PILToTensor()])  # PIL image -> (3, H, W), uint8
NAMED = {"cifar10": "CIFAR10", "cifar100": "CIFAR100", "fashionmnist": "FashionMNIST"}
IMAGES = (".jpg", ".jpeg", ".jfif", ".jp2", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff")


def count(text):  # type of an argument: 1, 2, 3, ...
    if int(text) < 1:
        raise ValueError
    return int(text)


class Folder(Dataset):
    """All images below a folder; the class is the top folder, "" if it lies in none."""

    def __init__(self, root):
        self.root = root
        self.skipped = 0
        paths = []
        errors = []
        seen = set()
        for folder, folders, files in os.walk(root, onerror=errors.append, followlinks=True):
            if os.path.realpath(folder) in seen:
                raise vit.InputError(f"{folder}: links lead here twice")
            seen.add(os.path.realpath(folder))
            folders[:] = sorted(name for name in folders if name[0] != "." and name != "__MACOSX")
            files = sorted(name for name in files if name[0] != ".")
            images = [name for name in files if name.lower().endswith(IMAGES)]
            self.skipped += len(files) - len(images)
            inside = os.path.relpath(folder, root).removeprefix(".")
            paths += [os.path.join(inside, name) for name in images]
        if not paths:
            errors.append("no images")
        if errors:
            raise vit.InputError(f"{root}: {errors[0]}")
        tops = [os.path.dirname(path).split(os.sep)[0] for path in paths]
        classes, self.targets = np.unique(tops, return_inverse=True)
        self.classes = classes.tolist()
        self.paths = np.array([os.fsencode(path) for path in paths])  # workers share an array

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        image = read_image(os.path.join(self.root, os.fsdecode(self.paths[i])))
        return to_tensor(image), int(self.targets[i])


def read_image(path):
    """A file as an RGB PIL image. Raises InputError that names it."""
    try:
        image = Image.open(path)
        if image.mode[0] in "IF":
            raise ValueError(f"more than 8 bits a pixel, mode {image.mode}")
        return image.convert("RGB")
    except Exception as error:  # PIL raises many types
        raise vit.InputError(f"{path}: unreadable image ({error!r:.200})") from None


def open_data(args, train):
    """A split: `data[i] -> (uint8 (3, H, W), label)`, with `targets` and `classes`."""
    source = args.data
    if args.data == "toy":
        data = vit.ToyShapes(train, args.img_size)
    elif args.data in NAMED:
        dataset = getattr(torchvision.datasets, NAMED[args.data])
        try:
            if args.download and LOCAL_RANK == 0:
                dataset(args.root, train, download=True)
            if args.download and WORLD > 1:
                dist.barrier()
            data = dataset(args.root, train, transform=to_tensor)
        except (OSError, RuntimeError) as error:
            raise vit.InputError(f"--data {args.data}: {error}") from None
    else:
        root = Path(args.data)
        held_out = [root / name for name in ("val", "valid", "test") if (root / name).is_dir()]
        if held_out and not train:
            root = held_out[0]
        elif held_out or (root / "train").is_dir():  # train/ alone serves for both splits
            root = root / "train"
        data = Folder(root)
        source = f"{root}, {data.skipped:,} other files skipped"
    if train and (args.fraction < 1 or args.long_tail):
        targets, classes = np.array(data.targets), data.classes
        data = Subset(data, subset(targets, args))
        data.targets, data.classes = targets[data.indices], classes
    split = "training" if train else "validation"
    print(f"{split}: {len(data):,} images of {len(data.classes):,} classes from {source}")
    return data


def subset(targets, args):
    """Sorted indices: --fraction of each class; --long-tail: Pareto, 1280 to 5."""
    rng = np.random.default_rng((args.seed, 1))
    classes = rng.permutation(np.unique(targets))
    pareto = (np.arange(1, len(classes) + 1) / (len(classes) + 1)) ** (-1 / 6) - 1
    shares = np.maximum(pareto / pareto[0], 5 / 1280) if args.long_tail else np.ones(len(classes))
    chosen = []
    for label, part in zip(classes, args.fraction * shares):
        members = rng.permutation(np.flatnonzero(targets == label))
        chosen.append(members[:max(1, round(part * len(members)))])
    return np.sort(np.concatenate(chosen))


def center_crop(image, size):
    """Evaluation's view of `(3, H, W)`: resized to 256/224 of the size, center crop."""
    if image.shape[1:] != (size, size):
        image = v2.functional.resize(image, round(size * 256 / 224), BICUBIC)
    return v2.functional.center_crop(image, size)


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)
    try:
        main()
    except vit.InputError as error:  # a worker's has its traceback in front
        print("error:", str(error).rpartition("InputError: ")[2].strip(), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted: --resume continues", file=sys.stderr)
        sys.exit(130)
