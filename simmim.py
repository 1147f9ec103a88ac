"""SimMIM: MAE without a decoder (Xie et al., 2022). Read it as `diff mae.py simmim.py`.

Squares of an image are masked. The encoder gets all patches, a mask token in place of each masked one, and
one linear layer predicts the pixels. Nothing is published for ViT-Tiny: the settings are this project's, from
the authors' for larger networks (100 epochs, batch 2048). Position is MAE's (theirs: a relative bias).

    loss = mean over masked pixels of |prediction - target|, target = pixels, not normalized per patch

    python simmim.py    # synthetic shapes, no download, minutes; the other commands are mae.py's
Results in --out: config.json, log.jsonl, last.pt, reconstruction.png. --resume continues exactly.
Shapes: B images, L patches, D width, p patch size, S image size. Read up to the end of `train`.
"""
import argparse
import functools
import hashlib
import json
import math
import os
import signal
import sys
import time
import traceback
from pathlib import Path

import numpy as np
import torch
import torchvision
from matplotlib.figure import Figure
from PIL import Image
from torch import distributed as dist, nn
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.transforms import v2
from tqdm import tqdm

import vit


# ------------------------------------------------------------ the method

def patchify(images, patch_size):
    """`(B, 3, H, W) -> (B, L, p*p*3)`: patches row by row, each as (3, p, p), as PixelShuffle."""
    B, C, H, W = images.shape
    x = images.reshape(B, C, H // patch_size, patch_size, W // patch_size, patch_size)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(B, -1, patch_size * patch_size * C)


def unpatchify(patches, patch_size):
    """`(B, L, p*p*3) -> (B, 3, H, W)` of a square image: the inverse of `patchify`."""
    B, L, _ = patches.shape
    side = math.isqrt(L)
    x = patches.reshape(B, side, side, -1, patch_size, patch_size).permute(0, 1, 2, 4, 5, 3)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(B, -1, side * patch_size, side * patch_size)


def random_mask(noise, unit=2, mask_ratio=0.6):
    """Masks the `ceil(U * mask_ratio)` of U units with the smallest noise (SimMIM, Sec. 3.2). A unit is
    `unit x unit` patches and has its first one's noise: noise `(B, L)` -> mask `(B, L)`, 1 = removed.
    """
    side = math.isqrt(noise.shape[1]) // unit
    noise = noise.view(len(noise), side, unit, side, unit)[:, :, 0, :, 0].flatten(1)    # (B, U)
    ids_shuffle = noise.argsort(dim=1)                       # smallest noise first
    ids_restore = ids_shuffle.argsort(dim=1)                 # the inverse permutation
    mask = (ids_restore < math.ceil(side * side * mask_ratio)).to(noise.dtype).view(-1, side, side)
    return mask.repeat_interleave(unit, dim=1).repeat_interleave(unit, dim=2).flatten(1)


class SimMIM(nn.Module):
    """An encoder of visible patches and mask tokens; one linear layer predicts pixels (SimMIM, Sec. 3)."""

    def __init__(self, encoder):
        super().__init__()
        if encoder.global_pool == "avg":     # changes the caller's: MAE normalizes every token
            encoder.norm = encoder.fc_norm
            encoder.fc_norm = nn.Identity()
            encoder.global_pool = "token"
        self.encoder = encoder
        pixels = encoder.patch_size ** 2 * encoder.patch_embed.proj.in_channels
        self.mask_token = nn.Parameter(torch.zeros(1, 1, encoder.embed_dim))
        self.decoder = nn.Linear(encoder.embed_dim, pixels)
        nn.init.normal_(self.mask_token, std=0.02)
        vit.init_weights(self.decoder)

    def forward(self, images, mask=None):
        """images `(B, 3, H, W)` -> loss (scalar), pred `(B, L, p*p*3)`, mask `(B, L)`, 1 = removed."""
        if mask is None:    # units of 2 x 2 patches
            mask = random_mask(torch.rand(len(images), self.encoder.grid ** 2, device=images.device))
        tokens = torch.where(mask[:, :, None] > 0, self.mask_token, self.encoder.patch_embed(images))
        x = self.encoder.encode(tokens + self.encoder.pos_embed[:, 1:])        # (B, 1 + L, D)
        pred = self.decoder(self.encoder.norm(x)[:, 1:])                       # without the class token
        target = patchify(images, self.encoder.patch_size)
        error = (pred.to(images.dtype) - target).abs()                         # float32, also with --amp
        loss = (error.mean(dim=-1) * mask).sum() / mask.sum().clamp(min=1)     # of removed patches only
        return loss, pred, mask


# ------------------------------------------------------------ training

SETTINGS = {  # argument: toy, small (32 px), photos; meaning; minimum, maximum or choices
    "arch":            (("toy", "tiny", "tiny"), "Vision Transformer of vit.py", *vit.ARCHS),
    "img_size":        ((32, 32, 224), "side of the images, in pixels", 1, 10 ** 5),
    "patch_size":      ((4, 4, 16), "side of a patch, in pixels", 1, 10 ** 5),
    "mask_unit":       ((8, 8, 32), "side of the squares that are masked, in pixels", 1, 10 ** 5),
    "mask_ratio":      ((0.6, 0.6, 0.6), "share of the squares that is masked", 0, 0.99),
    "min_crop":        ((0.67, 0.67, 0.67), "smallest crop, as a share of the image's area", 0, 1),
    "crops_per_image": ((1, 1, 1), "crops of each loaded image; an epoch counts crops", 1, 1000),
    "epochs":          ((8, 400, 100), "passes over the images", 1, 10 ** 6),
    "warmup_epochs":   ((1.0, 20.0, 10.0), "epochs in which the learning rate rises", 0, 10 ** 6),
    "batch_size":      ((32, 512, 2048), "images in an update, over ranks and --accum", 1, 10 ** 6),
    "base_lr":         ((1.2e-2, 3e-4, 5e-5), "learning rate per 256 images of the batch", 0, 1e12),
    "weight_decay":    ((0.05, 0.05, 0.05), "of AdamW; biases and norms have none", 0, 1),
    "clip_grad":       ((5.0, 5.0, 5.0), "largest norm of the gradient", 1e-9, 1e9),
    "init":            (None, "start from the encoder weights of this checkpoint"),
}


def make_sample(data, transform, args, i):
    """Image i as random crops `(crops, 3, S, S)`, uint8, and the masking noise of each, `(crops, L)`."""
    image, _ = data[i]
    views = [transform(image) for _ in range(args.crops_per_image)]
    return torch.stack(views), torch.rand(len(views), (args.img_size // args.patch_size) ** 2)


def train(args):
    device, stop = setup(args)
    # Data: an endless stream. All that is random about sample number v follows from (seed, v).
    data = open_data(args, train=True)
    transform = v2.Compose([
        v2.RandomResizedCrop(args.img_size, (args.min_crop, 1), interpolation=v2.InterpolationMode.BICUBIC),
        v2.RandomHorizontalFlip(),
    ])
    stream = Stream(len(data), args.seed, functools.partial(make_sample, data, transform, args))
    mean, std = MEAN.to(device), STD.to(device)    # of pixels from 0 to 255
    steps = max(1, round(args.epochs * len(data) / args.batch_size))
    warmup = min(steps - 1, round(args.warmup_epochs * len(data) / args.batch_size))

    # Model and optimizer: new, from --init, or from the checkpoint of an interrupted run.
    torch.manual_seed(args.seed)
    encoder = vit.ARCHS[args.arch](img_size=args.img_size, patch_size=args.patch_size, global_pool="token")
    if args.init and not args.resume:
        print(f"--init {args.init}: {vit.load_weights(encoder, args.init)}")
    model = SimMIM(encoder).to(device)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]    # biases and norms: no weight decay
    optimizer = torch.optim.AdamW([{"params": matrices}, {"params": vectors, "weight_decay": 0.0}],
                                  betas=(0.9, 0.999), weight_decay=args.weight_decay, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
    step = start(args, data, model=model, optimizer=optimizer, scaler=scaler)    # from last.pt; 0: a new run
    if args.compile:
        model.compile(dynamic=False)
    network = nn.parallel.DistributedDataParallel(model) if WORLD > 1 else model
    half = torch.float16 if args.amp == "fp16" else torch.bfloat16
    autocast = torch.autocast(device.type, half, enabled=args.amp != "off")
    end = min(steps, step + (args.max_steps or steps))
    batches = load(stream, step, end, args)
    log, last_save = Log(args, step, steps), time.time()
    while step < end:
        lr = learning_rate(step, steps, warmup, args.base_lr * args.batch_size / 256)
        for group in optimizer.param_groups:
            group["lr"] = lr
        loss = 0
        for part in range(args.accum):
            images, noise = log.next(batches)    # the wait is logged
            images = images.to(device, non_blocking=True).flatten(0, 1)    # (B, 3, S, S), uint8
            noise = noise.to(device, non_blocking=True).flatten(0, 1)      # (B, L)
            network.require_backward_grad_sync = part == args.accum - 1    # synchronized on the last part
            mask = random_mask(noise, args.mask_unit // args.patch_size, args.mask_ratio)
            with autocast:
                part_loss, _, _ = network((images - mean) / std, mask)
            scaler.scale(part_loss / args.accum).backward()
            loss += part_loss.detach() / args.accum
        scaler.unscale_(optimizer)
        grad_norm = nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad or math.inf)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        step += 1
        log.window.append({"loss": loss, "grad_norm": grad_norm})
        if not (step % args.log_every == 0 or step == end or (stop and WORLD == 1)):
            continue
        # Only here does the program wait for the device: it reads the losses, and ranks agree to stop.
        stopping = log.write(step, stop, epoch=step * args.batch_size / len(data), lr=lr)
        if RANK == 0 and (step == end or stopping or time.time() - last_save > 60 * args.save_minutes):
            save(args, "last.pt", step, model=model, optimizer=optimizer, scaler=scaler)
            draw_reconstructions(args, model, mean, std, step)
            last_save = time.time()
        if stopping:
            break
    print(f"{'done' if step == steps else 'stopped, --resume continues'}: step {step} of {steps}")


@torch.no_grad()
def draw_reconstructions(args, model, mean, std, step):
    """reconstruction.png: original, masked, output, and output with the visible patches pasted in."""
    data, p = open_data(args, train=False), args.patch_size
    chosen = range(0, len(data), math.ceil(len(data) / 8))
    crops = [center_crop(data[i][0], args.img_size) for i in chosen]
    images = (torch.stack(crops).to(mean.device) - mean) / std
    noise = torch.rand(len(images), model.encoder.grid ** 2, generator=torch.Generator().manual_seed(0))
    mask = random_mask(noise, args.mask_unit // p, args.mask_ratio).to(mean.device)
    _, pred, _ = model.forward(images, mask)    # not compiled
    original, mask = patchify(images, p), mask[:, :, None]
    rows = {"original": original, "masked": original * (1 - mask), "output": pred,
            "output +\nvisible": original * (1 - mask) + pred * mask}
    figure = Figure((1.2 * len(images) + 0.5, 4.9), layout="tight")
    axes = figure.subplots(4, len(images), squeeze=False, subplot_kw={"xticks": [], "yticks": []})
    for axis_row, (name, patches) in zip(axes, rows.items()):
        axis_row[0].set_ylabel(name)
        for axis, image in zip(axis_row, unpatchify(patches, p) * std + mean):
            axis.imshow(image.clamp(0, 255).byte().permute(1, 2, 0).cpu().numpy())
    figure.suptitle(f"SimMIM {args.arch}, {data.split} images of {args.data}, step {step}")
    figure.savefig(args.out / "reconstruction.png")


def main(argv=None):
    args = parse(argv, {**TRAINING, **SETTINGS}, out="runs/simmim")
    if args.img_size % args.mask_unit or args.mask_unit % args.patch_size:
        raise UserError("--mask-unit must divide --img-size and be a multiple of --patch-size")
    train(args)


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


# ======================================== plumbing, training: ranks, checkpoints, log

TRAINING = {  # argument: default; meaning; allowed values
    "resume": (False, "continue the run in --out exactly"),
    "accum": (1, "micro-batches in an update, to save memory", 1, 10 ** 6),
    "clip_grad": (None, "largest norm of the gradient", 1e-9, 1e9),
    "amp": (None, "mixed precision (default: bf16 or fp16 on a GPU)", "bf16", "fp16", "off"),
    "compile": (False, "torch.compile: a slow first step, then faster ones"),
    "log_every": (10, "steps between lines of the log", 1, 10 ** 9),
    "save_minutes": (5.0, "minutes between checkpoints and figures", 0, 10 ** 9),
    "max_steps": (None, "stop after this many steps, the schedule unchanged", 1, 10 ** 9),
}
FREE = {*TRAINING, *COMMON, "out", "init", "teacher"} - {"clip_grad", "amp", "fraction", "long_tail", "seed"}


def setup(args):
    """Prints the settings, joins the other ranks; returns the device and a set that signals fill."""
    device = torch.device("cuda", LOCAL_RANK) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
        args.amp = args.amp or ("bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16")
    args.amp = args.amp or "off"
    args.resume = args.resume and (args.out / "last.pt").exists()
    batch, parts = args.batch_size, WORLD * args.accum * getattr(args, "crops_per_image", 1)
    if batch % parts:
        raise UserError(f"--batch-size {batch}: must be a multiple of {parts}, ranks x accum x crops")
    if args.warmup_epochs >= args.epochs:
        raise UserError(f"--warmup-epochs {args.warmup_epochs} must be less than --epochs {args.epochs}")
    if RANK > 0:
        sys.stdout = open(os.devnull, "w")
    print("settings:", ", ".join(f"{name} {value}" for name, value in vars(args).items()))
    print(f"batch: {WORLD} ranks x {batch // WORLD // args.accum} images x {args.accum} accum = {batch};",
          f"lr: {args.base_lr:g} x {batch} / 256 = {args.base_lr * batch / 256:g}")
    if WORLD > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    stop = set()
    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:    # nohup ignores SIGHUP
            signal.signal(number, lambda number, frame: stop.add(number))
    return device, stop


def learning_rate(step, steps, warmup, lr, min_lr=0.0):
    """Linear warm-up from 0, then half a cosine down to `min_lr`, per step."""
    if step < warmup:
        return lr * step / warmup
    return min_lr + (lr - min_lr) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def start(args, data, **parts):
    """Fills `parts` from last.pt, read by rank 0, and returns its step. A new run makes --out: 0."""
    images, path = getattr(data, "dataset", data), args.out / "last.pt"
    names = "/".join(file[len(images.root):] for file, _ in getattr(images, "samples", [])) or args.data
    args.images = f"{len(data)} {hashlib.sha256(os.fsencode(names)).hexdigest()[:12]}"
    shared = [None, args.images]
    if args.resume and RANK == 0:
        try:
            shared[0] = torch.load(path, map_location="cpu", weights_only=True)
            config = dict(shared[0]["config"])
        except Exception as error:    # many types
            raise UserError(f"{path}: not a checkpoint ({error!r:.200})") from None
        for name in config | vars(args):
            if name not in FREE and config.get(name) != vars(args).get(name):
                raise UserError(f"{path}: {name} was {config.get(name)}, now it is {vars(args).get(name)}")
        (args.out / "log.jsonl").write_text(shared[0]["log"])
    if WORLD > 1:
        dist.barrier()    # every rank has read --init, which may lie in --out
        dist.broadcast_object_list(shared)
    if shared[1] != args.images:
        raise UserError(f"--data {args.data}: rank {RANK} has other images than rank 0")
    if shared[0]:
        for name, part in parts.items():
            part.load_state_dict(shared[0][name])
        return shared[0]["step"]
    if RANK == 0:
        out = args.out.absolute()
        if (out / "config.json").exists() or path.exists():
            free = (out.with_name(f"{out.name}-{k}") for k in range(1, 10 ** 6))
            old = out.rename(next(path for path in free if not path.exists()))
            print(f"{out} already contains a run: renamed to {old}")
        out.mkdir(parents=True, exist_ok=True)
        print(f"new run in {out}")
        (out / "config.json").write_text(json.dumps(vars(args), indent=1, default=str))
    return 0


def save(args, name, step, **parts):
    """Writes a temporary file, flushes it to disk, renames it: never half a checkpoint."""
    path, temporary = args.out / name, args.out / f"{name}.tmp"
    state = {part: module.state_dict() for part, module in parts.items()}
    state.update(step=step, config={**vars(args), "out": str(args.out)})
    state["log"] = (args.out / "log.jsonl").read_text()
    if not all(tensor.isfinite().all() for tensor in state["model"].values()):
        raise UserError(f"step {step}: a weight is not finite; {path} is unchanged")
    try:
        with temporary.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot be written ({error!r:.200}); it is unchanged") from None


class Log:
    """Keeps the scalars of the last steps, on the device, until `write` logs their means."""

    def __init__(self, args, step, steps):
        self.args, self.window, self.waited, self.since = args, [], 0.0, time.time()
        self.bar = tqdm(total=steps, initial=step, disable=RANK > 0 or not sys.stderr.isatty())

    def next(self, batches):
        """The next batch; its time counts as waiting for data."""
        began = time.time()
        batch = next(batches)
        self.waited += time.time() - began
        return batch

    def write(self, step, stop, **entry):
        """Logs means over steps and ranks; returns whether any rank is to stop. UserError."""
        table = torch.stack([torch.stack(list(scalars.values())) for scalars in self.window]).float()
        stopping = table.new_tensor(bool(stop))
        if WORLD > 1:
            dist.all_reduce(stopping)
            dist.all_reduce(table)
        table = table.cpu() / WORLD    # (steps, scalars), grad_norm last
        required = table[:, :-1] if self.args.amp == "fp16" else table    # fp16 skips steps that overflow
        bad = (~required.isfinite().all(dim=1)).tolist()
        if any(bad):
            raise UserError(f"step {step - len(bad) + bad.index(True) + 1}: loss or gradient is not finite, "
                            "last.pt is unchanged; try --amp bf16, --clip-grad 1, a lower --base-lr")
        kept, seconds = table[table.isfinite().all(dim=1)], time.time() - self.since
        entry = {**dict(zip(self.window[0], kept.mean(dim=0).tolist())), **entry}
        speed = len(table) * self.args.batch_size / seconds
        entry |= {"images_per_s": speed, "data_wait": self.waited / seconds}
        entry = {"step": step, **{name: float(f"{value:.6g}") for name, value in entry.items()}}
        if RANK == 0:
            with (self.args.out / "log.jsonl").open("a") as file:
                file.write(json.dumps(entry) + "\n")
            self.bar.update(step - self.bar.n)
            tqdm.write("  ".join(f"{name} {value:g}" for name, value in entry.items()))
        self.window, self.waited, self.since = [], 0.0, time.time()
        return stopping.item() > 0


# ======================================== the end of the plumbing

if __name__ == "__main__":
    run(main)
