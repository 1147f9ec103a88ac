"""Layer similarity, frequency and attention analysis of pre-trained Vision Transformers.

Instruments of "A Closer Look at Self-Supervised Lightweight Vision Transformers" (ICML 2023, Sec. 4):
    cka        how similar two layers are: unbiased centered kernel alignment (Fig. 1, Fig. 6)
    fourier    how much fine detail a layer keeps: log amplitude by frequency (Fig. 3)
    attention  how far (Eq. 1) and how broadly (Eq. 2) each head looks (Fig. 5)
Run it
    python analysis.py                               # all three: mae.py's run and an untrained twin
    python analysis.py cka deit:3=D.pth mae=M.pth random --data DIR    # or fourier, attention, all
    python analysis.py curves runs/mae runs/mae-1    # training curves, a line per run
A model is `label=path`, any file vit.py loads (`label:3=path` if it has 3 heads, not 12), or `random`, an
untrained twin of the first. Results in --out: figures, and their numbers as .json.
Shapes: B images, L patches, N = L + 1 tokens, D width, h heads. Layer 0 is the patch embedding.
"""
import argparse
import functools
import json
import os
import signal
import sys
import traceback
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torchvision
from matplotlib.figure import Figure
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.transforms import v2
from tqdm import tqdm

import vit


# ------------------------------------------------------------ the instruments

class CKA:
    """Centered kernel alignment of each of `n1` with each of `n2` layers, from mini-batches (Fig. 1).

    Two layers are similar if they find the same images similar. With Gram matrices K, L of a mini-batch
    `CKA = mean HSIC(K, L) / sqrt(mean HSIC(K, K) mean HSIC(L, L))`, unbiased (Nguyen et al., 2021).
    """

    def __init__(self, n1, n2):
        self.n1 = n1
        self.hsic = torch.zeros(n1 + n2, n1 + n2, dtype=torch.float64)    # summed: the number cancels

    def update(self, features1, features2):
        """Adds a mini-batch: for each layer `(B, ...)`, the same B images. UserError for B < 4."""
        grams = torch.stack([centered_gram(x) for x in (*features1, *features2)]).flatten(1)
        self.hsic += (grams @ grams.T).cpu()                              # all pairs of layers at once

    def compute(self):
        """CKA `(n1, n2)`, float64, at most 1; nan if a layer is zero."""
        norm = self.hsic.diagonal().sqrt()
        return (self.hsic / (norm[:, None] * norm))[:self.n1, self.n1:]


def centered_gram(features):
    """`(B, ...) -> (B, B)`, float64: of two, `(K * L).sum()` is the unbiased HSIC."""
    B = len(features)
    if B < 4:
        raise UserError(f"unbiased HSIC needs mini-batches of at least 4 images, not {B}")
    X = features.flatten(1).double()
    K = (X @ X.T).fill_diagonal_(0)                    # the Gram matrix without its diagonal,
    rows = K.sum(dim=1) / (B - 2)                      # centered (Szekely and Rizzo, 2014)
    K = K - rows[:, None] - rows[None, :] + K.sum() / ((B - 1) * (B - 2))
    return K.fill_diagonal_(0) / (B * (B - 3)) ** 0.5


def cka_features(model, hidden):
    """All hidden states `(B, N, D)` as the next norm puts them out, without class token: `(B, L, D)`."""
    final = model.norm if model.global_pool == "token" else model.fc_norm
    norms = [block.norm1 for block in model.blocks] + [final]
    return [norm(x[:, 1:]) for norm, x in zip(norms, hidden)]


def fourier_log_amplitude(tokens, grid):
    """Log amplitude of feature maps at frequencies 0, 2 pi / grid, ..., pi, relative to that at 0 (Fig. 3).

    tokens `(B, L, D)`, no class token -> `(grid // 2 + 1,)`: the diagonal of the Fourier transform, log of
    its modulus, mean over images and channels (Park and Kim, 2022). UserError for an odd grid.
    """
    if grid % 2:
        raise UserError(f"{grid} x {grid} patches: an odd number has no frequency pi")
    maps = tokens.transpose(1, 2).unflatten(-1, (grid, grid))             # (B, D, grid, grid)
    amplitude = torch.fft.rfft2(maps).diagonal(dim1=-2, dim2=-1).abs()    # (B, D, grid // 2 + 1)
    log_amplitude = (amplitude + 1e-6).log().mean(dim=(0, 1))
    return log_amplitude - log_amplitude[0]


def attention_distance(scores, grid, patch_size):
    """Mean distance in pixels between a patch and where it looks, per head `(h,)` (Eq. 1).

    scores `(B, h, N, N)`, pre-softmax; the class token, at 0, is dropped. Mean over images and queries.
    """
    attention = scores[:, :, 1:, 1:].softmax(dim=-1).mean(dim=0)    # (h, L, L)
    places = patch_size * torch.cartesian_prod(torch.arange(grid), torch.arange(grid)).to(attention)
    distances = (places[:, None] - places).norm(dim=-1)             # (L, L), patches in raster order
    return (attention * distances).sum(dim=-1).mean(dim=-1)


def attention_entropy(scores):
    """Mean entropy in nats of a patch's attention, 0 to log L, per head `(h,)`; scores as above (Eq. 2)."""
    attention = scores[:, :, 1:, 1:].softmax(dim=-1)
    return torch.special.entr(attention).sum(dim=-1).mean(dim=(0, 2))    # entr(p) = -p log p


# ------------------------------------------------------------ one pass over the images
SETTINGS = {  # argument: default; meaning; allowed values
    "images": (1024, "images to look at, chosen by --seed", 4, 10 ** 6),
    "batch_size": (128, "images in a mini-batch; fewer need less memory", 4, 10 ** 6),
}
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")    # Okabe and Ito


def make_sample(data, img_size, i):
    return center_crop(data[i][0], img_size)


def open_models(words, seed):
    """The networks that `label=path`, `label:heads=path` and `random` name, by label. UserError."""
    models = {}
    for word in words:
        name, _, path = word.partition("=")
        label, _, heads = name.partition(":")
        if path and label not in models and (heads or "0").isdigit():
            models[label], report = vit.from_weights(path, num_heads=int(heads or 0) or None)
            print(f"{label}: {path}, {models[label].blocks[0].attn.num_heads} heads; {report}")
        elif word == "random" and models:
            first = next(iter(models.values()))
            sizes = [first.grid * first.patch_size, first.patch_size, 3, first.embed_dim, len(first.blocks)]
            sizes += [first.blocks[0].attn.num_heads, first.blocks[0].mlp.fc1.out_features / first.embed_dim]
            torch.manual_seed(seed)
            models[word] = vit.VisionTransformer(*sizes)
        else:
            raise UserError(f"{word}: not label=path or label:heads=path, each label once, or then random")
    return models


@torch.inference_mode()
def measure(models, batches, names):
    """What the named instruments measure on mini-batches `(B, 3, S, S)` of equal size: arrays.

    `["cka"][a][b] (depth + 1, depth + 1)`, layers of model a, then of b, which is a or the first model;
    `["fourier"][a] (depth + 1, grid // 2 + 1)`; `["attention"][a] (depth, 2, h)`, distance and entropy.
    """
    n = {a: len(model.blocks) + 1 for a, model in models.items()}
    cka = {a: {b: CKA(n[a], n[b]) for b in (a, next(iter(models)))} for a in models}
    means = {"fourier": dict.fromkeys(models, 0), "attention": dict.fromkeys(models, 0)}
    for step, images in enumerate(batches, 1):
        features = {}
        for a, model in models.items():
            hidden = model.encode(model.embed(images), hidden=True)[1].hidden    # states of all layers
            if "cka" in names:
                features[a] = cka_features(model, hidden)
                for b in cka[a]:
                    cka[a][b].update(features[a], features[b])
            if "fourier" in names:
                rows = [fourier_log_amplitude(x[:, 1:], model.grid) for x in hidden]
                means["fourier"][a] += (torch.stack(rows).cpu().numpy() - means["fourier"][a]) / step
            if "attention" in names:    # of one block at a time: the scores are large
                scores = (block.attn.scores(block.norm1(x)) for block, x in zip(model.blocks, hidden))
                size = (model.grid, model.patch_size)
                rows = [torch.stack([attention_distance(s, *size), attention_entropy(s)]) for s in scores]
                means["attention"][a] += (torch.stack(rows).cpu().numpy() - means["attention"][a]) / step
    return {**means, "cka": {a: {b: cka[a][b].compute().numpy() for b in cka[a]} for a in models}}


def draw_cka(cka):
    """Fig. 1, 6: each model with itself; below, with the first."""
    figure = Figure((2.2 * len(cka) + 1, 2.6 * min(2, len(cka))), layout="constrained")
    for column, a in zip(figure.subplots(min(2, len(cka)), len(cka), squeeze=False).T, cka):
        for axis, b in zip(column, (a, next(iter(cka)))):
            image = axis.imshow(cka[a][b], origin="lower", vmin=0, vmax=1)
            axis.set(xlabel=f"layer of {b}", ylabel=f"layer of {a}")
    figure.colorbar(image, ax=figure.axes, label="CKA")
    return figure


def draw_lines(panels, xlabel):
    """A panel for each `name: {label: (x, y)}`, a line for each label; y `(n, h)`: dots and their mean."""
    figure = Figure((4.5 * len(panels), 4), layout="constrained")
    for axis, (name, lines) in zip(figure.subplots(1, len(panels), squeeze=False).flat, panels.items()):
        for i, (label, (x, y)) in enumerate(lines.items()):
            axis.plot(x, y, ".", color=COLORS[i % 7], alpha=0.4)
            axis.plot(x, np.atleast_2d(np.transpose(y)).mean(axis=0), color=COLORS[i % 7], label=label)
        axis.set(xlabel=xlabel, ylabel=name)
    figure.legend(*axis.get_legend_handles_labels(), loc="outside right center")
    return figure


def draw_fourier(fourier):
    """Fig. 3: the value at frequency pi, layer by layer."""
    lines = {label: (range(len(rows)), rows[:, -1]) for label, rows in fourier.items()}
    return draw_lines({"log amplitude at frequency pi, relative to 0": lines}, "layer")


def draw_attention(attention):
    """Fig. 5: a dot is a head, a line their mean."""
    names = "distance in pixels\n(the paper's figure: patch size 14, not 16)", "entropy in nats"
    panels = [{a: (range(1, len(v) + 1), v[:, k]) for a, v in attention.items()} for k in (0, 1)]
    return draw_lines(dict(zip(names, panels)), "layer")


def draw_curves(folders):
    """The scalars in the log.jsonl of training runs. UserError if there are none."""
    panels = {}
    for folder in folders:
        for entry in map(json.loads, (Path(folder) / "log.jsonl").read_text().splitlines()):
            for name in entry.keys() - {"epoch", "step", "lr", "images_per_s", "data_wait"}:
                x, y = panels.setdefault(name, {run: ([], []) for run in folders})[folder]
                x.append(entry["epoch"])
                y.append(entry[name])
    if not panels:
        raise UserError(f"{' '.join(folders)}: nothing logged yet")
    return draw_lines(dict(sorted(panels.items())), "epoch")


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    end = next((i for i, word in enumerate(argv) if word.startswith("-")), len(argv))    # options come last
    verb, *words = argv[:end] or ["all", "mae=runs/mae/last.pt", "random"]
    args = parse(argv[end:], SETTINGS, out="runs/analysis")
    draw = {"cka": draw_cka, "fourier": draw_fourier, "attention": draw_attention}
    names = list(draw) if verb == "all" else [verb]
    if names[0] not in (*draw, "curves") or not words:
        raise UserError(f"{verb}: choose from {', '.join(draw)}, all, curves; then name models, or runs")
    args.out.mkdir(parents=True, exist_ok=True)
    if verb == "curves":
        return draw_curves(words).savefig(args.out / "curves.png", dpi=150)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    models = open_models(words, args.seed)
    sizes = {model.to(device).eval().grid * model.patch_size for model in models.values()}
    if len(sizes) > 1:
        raise UserError(f"the models take images of different sizes, in pixels: {sorted(sizes)}")
    args.img_size = max(sizes)
    data = open_data(args, train=False)
    args.batch_size, args.accum = min(args.batch_size, args.images, len(data)), 1
    steps = min(args.images, len(data)) // args.batch_size    # whole mini-batches only
    stream = Stream(len(data), args.seed, functools.partial(make_sample, data, args.img_size))
    batches = tqdm(load(stream, 0, steps, args), total=steps, disable=not sys.stderr.isatty())
    numbers = measure(models, ((x.to(device) - MEAN.to(device)) / STD.to(device) for x in batches), names)
    about = f"{steps * args.batch_size:,} {data.split} images of {Path(args.data).name}"
    for name in names:
        figure = draw[name](numbers[name])
        figure.suptitle(f"{name}: {about}")
        figure.savefig(args.out / f"{name}.png", dpi=150)
        record = {"about": about, "models": words, name: numbers[name]}
        (args.out / f"{name}.json").write_text(json.dumps(record, default=np.ndarray.tolist))
    print(f"{about}; figures and numbers in {args.out}: {', '.join(names)}")


# ======================================== plumbing, start: arguments and errors
class UserError(Exception):
    """Invalid input: one line on stderr, exit code 2."""


RANK, LOCAL_RANK = (int(os.environ.get(name, 0)) for name in ("RANK", "LOCAL_RANK"))    # torchrun's
WORLD = int(os.environ.get("WORLD_SIZE", 1))
SIGNALS = {signal.SIGTERM, signal.SIGINT, getattr(signal, "SIGHUP", signal.SIGINT)}
MEAN = 255 * torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)    # ImageNet's
STD = 255 * torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
PRESETS = ("toy", "small", "photos")    # the columns of SETTINGS
NAMED = {"toy": "toy", "cifar10": "small", "cifar100": "small", "fashionmnist": "small"}
COMMON = {  # argument: default; meaning; allowed values
    "data": ("toy", f"a folder with train/ and val/, or one of: {' '.join(NAMED)}"),
    "preset": (None, "column of the settings (default: by --data)", *PRESETS),
    "root": ("data", "folder of CIFAR and Fashion-MNIST"),
    "download": (False, "fetch them first"),
    "fraction": (1.0, "train on this share of each class", 1e-9, 1),
    "long_tail": (False, "train on class sizes shaped like ImageNet-LT's"),
    "workers": (None, "processes that load images, per rank (default: its cores)", 0, 999),
    "seed": (0, "seed of weights, order, crops, masks", 0, 2 ** 32 - 1),
}


def parse(argv, settings, out):
    """The arguments of `COMMON` and `settings`; a tuple has a default per preset. UserError."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = refuse
    table = {"out": (Path(out), "folder of the results"), **COMMON, **settings}
    for name, (default, meaning, *allowed) in table.items():
        values = default if isinstance(default, tuple) else (default,)
        kind = type([value for value in (*values, *allowed, "") if value is not None][0])
        options = {"action": argparse.BooleanOptionalAction} if kind is bool else {"type": kind}
        if allowed and kind is str:
            options["choices"] = allowed
        parser.add_argument("--" + name.replace("_", "-"), help=f"{meaning} [{default}]", **options)
    parser.set_defaults(**{name: row[0] for name, row in table.items() if not isinstance(row[0], tuple)})
    args = parser.parse_args(argv)
    args.preset = args.preset or NAMED.get(args.data, "photos")
    for name, (default, _, *allowed) in table.items():
        if getattr(args, name) is None and isinstance(default, tuple):
            setattr(args, name, default[PRESETS.index(args.preset)])
        value = getattr(args, name)
        if allowed and isinstance(value, (int, float)) and not allowed[0] <= value <= allowed[1]:
            raise UserError(f"--{name.replace('_', '-')} {value} is not from {allowed[0]} to {allowed[1]}")
    return args


def refuse(reason):
    raise UserError(str(reason))


def run(main, leave=os._exit):
    """Runs a script. Invalid input, also in a worker, ends it with one line and exit code 2."""
    sys.stdout.reconfigure(line_buffering=True)
    try:
        main()
    except Exception as error:
        line = traceback.format_exc()
        if isinstance(error, (UserError, vit.InputError, OSError)):
            line = "error: " + str(error).strip().splitlines()[-1].split("UserError: ")[-1]
        if isinstance(error, (ConnectionError, EOFError)) or "DataLoader worker (pid" in str(error):
            line = "error: a process that loads images was killed (out of memory?)"
        print(line, file=sys.stderr, flush=True)
        leave(2)    # waits for no rank and no worker


# ======================================== plumbing, data: images and the sample stream

class Folder(torchvision.datasets.ImageFolder):
    """Images below a folder: top folders are classes (2 before 10); without them all labels are 0."""

    def __init__(self, root):
        seen = set()
        for folder, _, _ in os.walk(root, onerror=refuse, followlinks=True):
            if os.path.realpath(folder) in seen:
                raise UserError(f"{folder}: links lead here twice, its images would count twice")
            seen.add(os.path.realpath(folder))
        super().__init__(root, transform=to_tensor, loader=read_image)

    def find_classes(self, directory):
        names = sorted(next(os.walk(directory))[1], key=lambda n: (len(n) * n.isdecimal(), n)) or [""]
        return names, {name: label for label, name in enumerate(names)}


def read_image(path):
    """A file as a PIL image. UserError that names it."""
    try:
        with Image.open(path) as image:
            image.load()
    except Exception as error:    # PIL raises many types
        raise UserError(f"{path}: unreadable image ({error!r:.200})") from None
    if image.mode[0] in "IF":
        raise UserError(f"{path}: more than 8 bits a pixel (PIL mode {image.mode})")
    return image


def to_tensor(image):
    """A PIL image as an RGB uint8 tensor, `(3, H, W)`."""
    image = image.convert("RGBA") if image.mode == "P" else image    # else PIL warns of transparency
    return v2.functional.pil_to_tensor(image.convert("RGB"))


def open_data(args, train):
    """One split: `data[i] -> (uint8 tensor (3, H, W), label)`, with `targets`, `classes`, `split`."""
    root = Path(args.data)
    if args.data == "toy":
        data = vit.ToyShapes(train, args.img_size)
    elif args.data in NAMED:
        names = {"cifar10": "CIFAR10", "cifar100": "CIFAR100", "fashionmnist": "FashionMNIST"}
        dataset = getattr(torchvision.datasets, names[args.data])
        if args.download and (train or WORLD == 1) and LOCAL_RANK == 0:    # once a node, both splits
            dataset(args.root, train, download=True)
        if args.download and train and WORLD > 1:
            dist.barrier()
        try:
            data = dataset(args.root, train, transform=to_tensor)
        except RuntimeError:
            raise UserError(f"--data {args.data}: not in --root {args.root}; --download fetches it") from None
    elif not root.is_dir():
        raise UserError(f"--data {root}: no such folder, nor one of: {' '.join(NAMED)}")
    else:
        tests = [root / name for name in ("val", "test") if (root / name).is_dir()]
        if not train and not tests:    # training images also serve for evaluation
            return open_data(args, train=True)
        split = root / "train" if tests or (root / "train").is_dir() else root
        data = Folder(str(split if train else tests[0]))
    if train and (args.fraction < 1 or args.long_tail):
        whole, targets = data, np.array(data.targets)
        data = Subset(whole, subset(targets, args))
        data.targets, data.classes = targets[data.indices], whole.classes
    data.split = "training" if train else "validation"
    return data


def subset(targets, args):
    """Sorted indices: --fraction of each class; --long-tail: Pareto, power 6, 1280 to 5."""
    rng = np.random.default_rng((args.seed, 1))
    classes = rng.permutation(np.unique(targets))
    pareto = (np.arange(1, len(classes) + 1) / (len(classes) + 1)) ** (-1 / 6) - 1
    shares = np.maximum(pareto / pareto[0], 5 / 1280) if args.long_tail else np.ones(len(classes))
    members = [rng.permutation(np.flatnonzero(targets == label)) for label in classes]
    counts = [max(1, round(args.fraction * share * len(m))) for share, m in zip(shares, members)]
    return np.sort(np.concatenate([m[:count] for m, count in zip(members, counts)]))


def center_crop(image, size):
    """Evaluation's view of `(3, H, W)`: resized to 256/224 of the size, bicubic, center crop."""
    if image.shape[1:] != (size, size):
        image = v2.functional.resize(image, round(size * 256 / 224), v2.InterpolationMode.BICUBIC)
    return v2.functional.center_crop(image, size)


class Stream(Dataset):
    """Endless samples of n images: sample v is `make(i)`, i = permutation(seed, v // n)[v % n].

    All that is random about it comes from (seed, v). Step s is samples [s B, (s + 1) B), every R-th of
    them for a rank of R. So resuming, workers, ranks and accumulation change nothing.
    """

    def __init__(self, n, seed, make):
        self.n, self.seed, self.make, self.epoch = n, seed, make, None

    def __getitem__(self, v):
        if v // self.n != self.epoch:
            self.epoch = v // self.n
            self.order = np.random.default_rng((self.seed, self.epoch)).permutation(self.n)
        seed = np.random.SeedSequence((self.seed, v)).generate_state(1)[0]
        torch.default_generator.manual_seed(int(seed))    # uses 32 bits
        return self.make(self.order[v % self.n])


def load(stream, step, end, args):
    """This rank's batches from `step` to `end`, --accum a step; workers are at most two ahead."""
    batch = args.batch_size // getattr(args, "crops_per_image", 1)
    batches = (list(range(s * batch + RANK, (s + 1) * batch, WORLD)[part::args.accum])
               for s in range(step, end) for part in range(args.accum))
    cuda = torch.cuda.is_available()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    workers = min(16, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    workers = 0 if args.data in NAMED and not cuda else workers    # 0: images in memory
    return iter(DataLoader(stream, batch_sampler=batches, pin_memory=cuda, worker_init_fn=ignore_signals,
                           num_workers=workers if args.workers is None else args.workers))


def ignore_signals(_):
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


# ======================================== the end of the plumbing

if __name__ == "__main__":
    run(main)
