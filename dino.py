"""DINO: a Vision Transformer learns from its own moving average (Caron et al., 2021), here ViT-Tiny.

Large (global) and small (local) crops of an image must give the same distribution over d outputs. The
student sees all; the teacher, its slow moving average, sees the global ones, gives the target, and is kept.
The recipe is the authors', for larger networks; ViT-Tiny is that of "A Closer Look at Self-Supervised
Lightweight Vision Transformers" (ICML 2023, Sec. 2).

    loss = mean of -sum softmax((t - center) / T_t) log softmax(s / T_s) over pairs of different crops (Eq. 3)

    laptop     python dino.py                                  # synthetic shapes, no download
    small      python dino.py --data cifar100 --download       # images of 32 pixels, patches of 4
    one GPU    python dino.py --data DIR --compile             # DIR/train/CLASS/*.jpg, DIR/val/CLASS/*.jpg
    8 GPUs     torchrun --nproc_per_node=8 dino.py --data DIR  # 100 epochs, batch 512
    two nodes  torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST dino.py ...
Results in --out: config.json, log.jsonl, last.pt, curves.png. --resume continues exactly. What the features
are worth: finetune.py --mode knn --init runs/dino/last.pt; where the class token looks: attention.png.
Shapes: B images on this rank, S pixels, D width, d dimensions that are compared. Read up to the end of
`train`, skip the plumbing.
"""
import argparse
import copy
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
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from matplotlib.figure import Figure
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.transforms import v2
from tqdm import tqdm

import vit


# ------------------------------------------------------------ the method

class Cosines(nn.Linear):
    """Cosines of rows and d directions, `(B, 256) -> (B, d)`: weight norm, norm fixed at 1 (App. C)."""

    def forward(self, x):
        return F.linear(F.normalize(x, dim=1), F.normalize(self.weight, dim=1))


def mlp(*dims):
    """Linear layers, GELU between them, none before the last, `Cosines`; no BatchNorm (App. C)."""
    layers = []
    for dim_in, dim_out in zip(dims, dims[1:-1]):
        layers += [nn.Linear(dim_in, dim_out), nn.GELU()]
    return nn.Sequential(*layers[:-1], Cosines(*dims[-2:], bias=False))


def dino_loss(student, teacher, center, student_temp, teacher_temp):
    """Cross entropy of teacher and student on different crops: a scalar, this rank's mean (Eq. 3).

    student `((2 + V) B, d)`, teacher `(2B, d)`, center `(1, d)`; rows crop by crop, global crops first.
    """
    targets = ((teacher - center) / teacher_temp).softmax(dim=1).chunk(2)    # the center is float32
    outputs = (student.to(center.dtype) / student_temp).split(len(targets[0]))
    losses = [F.cross_entropy(s, t) for i, t in enumerate(targets) for j, s in enumerate(outputs) if i != j]
    return torch.stack(losses).mean()


def spread(x):
    """Standard deviation of unit rows `(B, d)`, times sqrt(d): 1 if isotropic, 0 if all are identical."""
    return F.normalize(x.detach().float(), dim=1).std(dim=0).mean() * x.shape[1] ** 0.5


class DINO(nn.Module):
    """Two encoders with projectors, one the moving average of the other: teacher and student (Sec. 3.1).

    `encoder_fn(global_pool="token")` makes a `vit.VisionTransformer`; its `head` becomes the projector.
    `monitors`, set by `forward`: collapse indicators, detached scalars of this rank.
    """

    def __init__(self, encoder_fn, out_dim=65536, hidden_dim=2048, temperature=0.1, teacher_temp=0.04):
        super().__init__()
        self.temperature = temperature
        self.teacher_temp = teacher_temp
        self.monitors = {}
        self.student = encoder_fn(global_pool="token")
        self.student.head = mlp(self.student.embed_dim, hidden_dim, hidden_dim, 256, out_dim)
        vit.init_weights(self.student.head[:-1])
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.register_buffer("center", torch.zeros(1, out_dim))

    @torch.no_grad()
    def update_teacher(self, m):
        """`teacher <- m teacher + (1 - m) student`: all parameters, after the optimizer step (Alg. 1)."""
        for average, parameter in zip(self.teacher.parameters(), self.student.parameters()):
            average.lerp_(parameter, 1 - m)

    def update_center(self, teacher):
        """`center <- 0.9 center + 0.1 mean of all ranks' teacher outputs (2B, d)` (Eq. 4)."""
        mean = teacher.mean(dim=0, keepdim=True, dtype=self.center.dtype) / WORLD
        if WORLD > 1:
            dist.all_reduce(mean)
        self.center.lerp_(mean, 0.1)

    def forward(self, x1, x2):
        """Crops, global `(B, 2, 3, S, S)`, local `(B, V, 3, s, s)` -> loss (scalar). The center moves."""
        x1, x2 = [x.transpose(0, 1).flatten(0, 1) for x in (x1, x2)]    # crop by crop
        student = torch.cat([self.student(x1), self.student(x2)])       # position is interpolated
        with torch.no_grad():
            tokens = self.teacher.pool(self.teacher.encode(self.teacher.embed(x1)))
            teacher = self.teacher.head(tokens)
        loss = dino_loss(student, teacher, self.center, self.temperature, self.teacher_temp)
        logits = (teacher - self.center) / self.teacher_temp
        entropy = F.cross_entropy(logits, logits.softmax(dim=1))    # of the targets
        self.monitors = {"entropy": entropy, "kl": loss.detach() - entropy, "token_spread": spread(tokens)}
        self.update_center(teacher)
        return loss


# ------------------------------------------------------------ training

SETTINGS = {  # argument:   toy    32 px  photographs; meaning; allowed values
    "arch":            (("toy", "tiny", "tiny"), "Vision Transformer of vit.py", *vit.ARCHS),
    "img_size":        ((32, 32, 224), "side of the images, in pixels", 1, 10 ** 5),
    "local_size":      ((16, 16, 96), "side of the local crops", 1, 10 ** 5),
    "local_crops":     ((2, 6, 8), "local crops of an image, beside two global ones", 1, 1000),
    "patch_size":      ((8, 4, 16), "side of a patch, in pixels", 1, 10 ** 5),
    "out_dim":         ((256, 4096, 65536), "outputs of the head, d", 2, 10 ** 7),
    "hidden_dim":      ((256, 1024, 2048), "its hidden width", 1, 10 ** 6),
    "temperature":     ((0.1, 0.1, 0.1), "T_s, divides the outputs of the student", 1e-3, 100),
    "teacher_temp":    ((0.025, 0.04, 0.04), "T_t, divides those of the teacher", 1e-3, 100),
    "momentum":        ((0.99, 0.996, 0.996), "m at the start; a cosine raises it to 1", 0, 1),
    "min_crop":        ((0.6, 0.4, 0.4), "smallest global, largest local crop: share of the area", 0, 1),
    "local_min_crop":  ((0.3, 0.05, 0.05), "smallest local crop", 0, 1),
    "saturation":      ((0.8, 0.2, 0.2), "largest change of saturation: color alone", 0, 1),
    "hue":             ((0.5, 0.1, 0.1), "and of hue: must not tell toy images apart", 0, 0.5),
    "gray":            ((0.5, 0.2, 0.2), "share of the views that lose their color", 0, 1),
    "blur_sigma":      ((0.5, 0.5, 2.0), "largest blur, in pixels (the smallest: 0.1)", 0.1, 100),
    "epochs":          ((8, 100, 100), "times that each image is seen", 1, 10 ** 6),
    "warmup_epochs":   ((1.0, 10.0, 10.0), "epochs in which the learning rate rises", 0, 10 ** 6),
    "batch_size":      ((32, 512, 512), "images in an update, over all ranks", 2, 10 ** 6),
    "base_lr":         ((1.2e-2, 5e-4, 5e-4), "learning rate per 256 images of the batch", 0, 1e12),
    "weight_decay":    ((0.04, 0.04, 0.04), "AdamW's at the start, not on biases and norms", 0, 1),
    "weight_decay_end": ((0.04, 0.4, 0.4), "and at the end of a cosine", 0, 1),
    "clip_grad":       ((3.0, 3.0, 3.0), "largest norm of each tensor's gradient", 1e-9, 1e9),
    "init":            (None, "start both encoders from the weights of this checkpoint"),
}


def make_sample(data, views, i):
    """Image i as global crops `(2, 3, S, S)` and local crops `(V, 3, s, s)`, uint8."""
    image, _ = data[i]
    crops = [view(image) for view in views]
    return torch.stack(crops[:2]), torch.stack(crops[2:])


def train(args):
    device, stop = setup(args)
    # Data: an endless stream. All that is random about sample number v follows from (seed, v).
    data = open_data(args, train=True)
    if not 2 * WORLD <= args.batch_size <= len(data):
        raise UserError(f"--batch-size {args.batch_size}: from 2 images a rank to all {len(data)} images")
    bicubic = {"interpolation": v2.InterpolationMode.BICUBIC}
    crop = v2.RandomResizedCrop(args.img_size, (args.min_crop, 1), **bicubic)
    local = v2.RandomResizedCrop(args.local_size, sorted((args.local_min_crop, args.min_crop)), **bicubic)
    jitter = v2.RandomApply([v2.ColorJitter(0.4, 0.4, args.saturation, args.hue)], p=0.8)
    gray = v2.RandomGrayscale(args.gray)
    kernel = max(3, args.img_size // 20 * 2 + 1)    # odd, a tenth of the image: 23 at 224 px
    blur = v2.GaussianBlur(kernel, (0.1, args.blur_sigma))
    flip = v2.RandomHorizontalFlip()
    solarize = v2.RandomSolarize(threshold=128, p=0.2)
    view_1 = v2.Compose([crop, jitter, gray, blur, flip])
    view_2 = v2.Compose([crop, jitter, gray, v2.RandomApply([blur], p=0.1), solarize, flip])
    local_view = v2.Compose([local, jitter, gray, v2.RandomApply([blur], p=0.5), flip])
    views = [view_1, view_2] + [local_view] * args.local_crops
    stream = Stream(len(data), args.seed, functools.partial(make_sample, data, views))
    mean, std = MEAN.to(device), STD.to(device)    # of pixels from 0 to 255
    steps = max(1, round(args.epochs * len(data) / args.batch_size))
    warmup = min(steps - 1, round(args.warmup_epochs * len(data) / args.batch_size))

    # Model and optimizer: new, from --init, or from the checkpoint of an interrupted run.
    torch.manual_seed(args.seed)
    encoder_fn = functools.partial(vit.ARCHS[args.arch], img_size=args.img_size, patch_size=args.patch_size)
    model = DINO(encoder_fn, args.out_dim, args.hidden_dim, args.temperature, args.teacher_temp).to(device)
    if args.init and not args.resume:
        print(f"--init {args.init}: {vit.load_weights(model.student, args.init)}")
        model.teacher.load_state_dict(model.student.state_dict())
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW([p for p in parameters if p.ndim > 1], betas=(0.9, 0.999), fused=True)
    optimizer.add_param_group({"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0})
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
    step = start(args, data, model=model, optimizer=optimizer, scaler=scaler)    # from last.pt; 0: a new run
    if args.compile:    # the transformers alone: ranks communicate in the center
        for block in [*model.student.blocks, *model.teacher.blocks]:
            block.compile(dynamic=False)
    network = nn.parallel.DistributedDataParallel(model) if WORLD > 1 else model
    half = torch.float16 if args.amp == "fp16" else torch.bfloat16
    autocast = torch.autocast(device.type, half, enabled=args.amp != "off")
    end = min(steps, step + (args.max_steps or steps))
    batches = load(stream, step, end, args)
    log, last_save = Log(args, step, steps), time.time()
    while step < end:
        lr = learning_rate(step, steps, warmup, args.base_lr * args.batch_size / 256, 1e-6)
        momentum = learning_rate(step, steps, 0, args.momentum, 1.0)    # the same cosine, up to 1
        for group in optimizer.param_groups:
            group["lr"] = lr
        decay = learning_rate(step, steps, 0, args.weight_decay, args.weight_decay_end)
        optimizer.param_groups[0]["weight_decay"] = decay              # of the matrices
        x1, x2 = log.next(batches)    # global crops (B, 2, 3, S, S), local crops (B, V, 3, s, s), uint8
        x1 = (x1.to(device, non_blocking=True) - mean) / std
        x2 = (x2.to(device, non_blocking=True) - mean) / std
        with autocast:
            loss = network(x1, x2)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        grad_norm = torch.stack([nn.utils.clip_grad_norm_(p, args.clip_grad) for p in parameters]).norm()
        if step * args.batch_size < len(data):    # first epoch: the last layer is frozen
            model.student.head[-1].weight.grad = None
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        model.update_teacher(momentum)
        step += 1
        log.window.append({"loss": loss.detach(), **model.monitors, "grad_norm": grad_norm})
        if not (step % args.log_every == 0 or step == end or (stop and WORLD == 1)):
            continue
        # Only here does the program wait for the device: it reads the losses, and ranks agree to stop.
        epoch = step * args.batch_size / len(data)
        stopping = log.write(step, stop, epoch=epoch, lr=lr, momentum=momentum)
        if RANK == 0 and (step == end or stopping or time.time() - last_save > 60 * args.save_minutes):
            save(args, "last.pt", step, model=model, optimizer=optimizer, scaler=scaler)
            draw_curves(args)
            draw_attention(args, model.teacher, mean, std)
            last_save = time.time()
        if stopping:
            break
    print(f"{'done' if step == steps else 'stopped, --resume continues'}: step {step} of {steps}")


def draw_curves(args):
    """curves.png: the loss and the collapse indicators over the epochs, from log.jsonl."""
    log = [json.loads(line) for line in (args.out / "log.jsonl").read_text().splitlines()]
    names = ("loss", "entropy", "kl", "token_spread")
    figure = Figure((12, 3), layout="tight")
    for axis, name in zip(figure.subplots(1, 4), names):
        axis.plot([entry["epoch"] for entry in log], [entry[name] for entry in log])
        axis.set(title=name.replace("_", " "), xlabel="epoch", ylim=(0, None))
    figure.suptitle(f"DINO {args.arch} on {args.data}")
    figure.savefig(args.out / "curves.png")


def draw_attention(args, encoder, mean, std):
    """attention.png: where the class token looks in the last block; images of twice the size, finer maps."""
    data = open_data(args, train=False)
    images = [center_crop(data[i][0], 2 * args.img_size) for i in range(0, len(data), 1 + len(data) // 6)]
    inputs = (torch.stack(images).to(mean.device) - mean) / std
    maps = vit.attention_maps(encoder, inputs, [len(encoder.blocks) - 1])[0, :, :, 0, 1:]    # (B, h, L)
    figure = Figure((13, len(images) + 0.5), layout="tight")
    axes = figure.subplots(len(images), 13, squeeze=False, subplot_kw={"xticks": [], "yticks": []})
    for row, image, heads in zip(axes, images, maps.unflatten(2, (2 * encoder.grid, -1)).cpu()):
        for axis, picture in zip(row, [image.permute(1, 2, 0), *heads]):
            axis.imshow(picture.numpy(), vmin=0)
    figure.suptitle(f"DINO {args.arch}: {data.split} images of {args.data}, attention in heads 1 to 12")
    figure.savefig(args.out / "attention.png")


def main(argv=None):
    args = parse(argv, {**TRAINING, **SETTINGS}, out="runs/dino")
    if args.accum > 1:
        raise UserError(f"--accum {args.accum}: the center moves once, by the whole batch, which here "
                        "cannot be split; use more ranks, --amp bf16, or a smaller --batch-size")
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
