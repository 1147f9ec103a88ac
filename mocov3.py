"""MoCo-v3: a Vision Transformer learns to tell images apart (Chen, Xie, He, 2021), here ViT-Tiny.

Two random views of an image must be more similar than views of different images. One goes through the
encoder that learns, then a predictor: the query. The other goes through the momentum encoder, a slowly
moving average of the first: the key. Only the encoder is kept. Recipe: "A Closer Look at Self-Supervised
Lightweight Vision Transformers" (ICML 2023, Sec. 2).

    ctr(q, k) = -log( exp(q.k+ / T) / sum over the batch's keys k of exp(q.k / T) ),  k+: same image  (Eq. 1)
    loss = 2T (ctr(q1, k2) + ctr(q2, k1)),  momentum encoder <- m momentum encoder + (1 - m) encoder  (Alg. 1)

    laptop     python mocov3.py                                  # synthetic shapes, no download, minutes
    small      python mocov3.py --data cifar100 --download       # images of 32 x 32 pixels, patches of 4
    one GPU    python mocov3.py --data DIR --compile             # DIR/train/CLASS/*.jpg, DIR/val/CLASS/*.jpg
    8 GPUs     torchrun --nproc_per_node=8 mocov3.py --data DIR  # the paper's run: 400 epochs, batch 1024
    two nodes  torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST mocov3.py ...
Results in --out: config.json, log.jsonl, last.pt, curves.png. --resume continues exactly. What the features
are worth: finetune.py --mode knn --init runs/mocov3/last.pt.
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

class SumOverRanks(torch.autograd.Function):
    """The sum of a tensor over all ranks; gradients flow back to every rank."""

    @staticmethod
    def forward(ctx, x):
        x = x.clone()
        dist.all_reduce(x)
        return x

    backward = forward    # each rank's output depends on every rank's input


class BatchNorm(nn.BatchNorm1d):
    """BatchNorm over the images of all ranks, `(B, d) -> (B, d)`, as `nn.SyncBatchNorm`, on any device.

    With statistics per rank, the network could tell which images share a rank. Every rank must have the
    same number of images.
    """

    def forward(self, x):
        ranks = dist.get_world_size() if dist.is_initialized() else 1
        if ranks == 1 or not self.training:
            return super().forward(x)
        count, dtype = ranks * len(x), x.dtype
        x = x.to(torch.promote_types(dtype, torch.float32))
        mean = SumOverRanks.apply(x.sum(dim=0)) / count
        x = x - mean
        var = SumOverRanks.apply((x * x).sum(dim=0)) / count
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * count / (count - 1), self.momentum)
        x = x * (var + self.eps).rsqrt()
        return (x * self.weight + self.bias if self.affine else x).to(dtype)


def mlp(*dims):
    """Linear layers with BatchNorm and ReLU; the last BatchNorm has no scale and shift, no ReLU (Sec. 4)."""
    layers = []
    for dim_in, dim_out in zip(dims, dims[1:-1]):
        layers += [nn.Linear(dim_in, dim_out, bias=False), BatchNorm(dim_out), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.Linear(*dims[-2:], bias=False), BatchNorm(dims[-1], affine=False))


def similarities(q, k):
    """Cosines of queries `(B, d)` and all ranks' keys `(B, ranks * B)`; the own keys' columns `(B,)`."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    q, k = F.normalize(q.to(dtype), dim=1), F.normalize(k.to(dtype), dim=1)
    own = torch.arange(len(q), device=q.device)
    if dist.is_initialized():
        keys = [torch.empty_like(k) for _ in range(dist.get_world_size())]
        dist.all_gather(keys, k)
        k, own = torch.cat(keys), own + dist.get_rank() * len(q)
    with torch.autocast(q.device.type, enabled=False):
        return q @ k.T, own


def contrastive_loss(q, k, temperature):
    """InfoNCE of queries and the keys of all ranks, times 2T: a scalar, this rank's mean (Eq. 1, Alg. 1).

    q `(B, d)`, k `(B, d)` without gradient; row i of both comes from one image. The factor keeps the
    gradient's scale whatever T is.
    """
    cosines, own = similarities(q, k)
    return 2 * temperature * F.cross_entropy(cosines / temperature, own)


def spread(x):
    """Standard deviation of unit rows `(B, d)`, times sqrt(d): 1 if isotropic, 0 if all are identical."""
    return F.normalize(x.detach().float(), dim=1).std(dim=0).mean() * x.shape[1] ** 0.5


class MoCoV3(nn.Module):
    """Two encoders with projectors, one the moving average of the other, whose predictor learns (Sec. 4).

    `encoder_fn(global_pool="token")` makes a `vit.VisionTransformer`; its `head` becomes the projector.
    `stop_grad_conv1` freezes the random patch embedding (Sec. 4.1: steadier for large models).
    `monitors`, set by `forward`: collapse indicators, detached scalars of this rank.
    """

    def __init__(self, encoder_fn, dim=256, mlp_dim=4096, temperature=0.2, stop_grad_conv1=False):
        super().__init__()
        self.temperature = temperature
        self.monitors = {}
        self.base_encoder = encoder_fn(global_pool="token")
        for block in self.base_encoder.blocks:    # unlike MAE: query, key, value are three matrices
            for matrix in block.attn.qkv.weight.data.chunk(3):
                nn.init.xavier_uniform_(matrix)
        nn.init.normal_(self.base_encoder.cls_token, std=1e-6)
        self.base_encoder.head = mlp(self.base_encoder.embed_dim, mlp_dim, mlp_dim, dim)
        self.base_encoder.patch_embed.requires_grad_(not stop_grad_conv1)
        self.momentum_encoder = copy.deepcopy(self.base_encoder).requires_grad_(False)
        self.predictor = mlp(dim, mlp_dim, dim)

    @torch.no_grad()
    def update_momentum_encoder(self, m):
        """`momentum <- m momentum + (1 - m) base`: all parameters, no buffers (BatchNorm's statistics)."""
        for average, parameter in zip(self.momentum_encoder.parameters(), self.base_encoder.parameters()):
            average.lerp_(parameter, 1 - m)

    @staticmethod
    def project(encoder, x1, x2):
        """Class tokens `(2B, D)` of both views, and the projections `(B, d)` of each.

        The transformer takes both at once, which is faster; BatchNorm must see one view at a time.
        """
        tokens = encoder.pool(encoder.encode(encoder.embed(torch.cat([x1, x2]))))
        return tokens, encoder.head(tokens[:len(x1)]), encoder.head(tokens[len(x1):])

    def forward(self, x1, x2, m):
        """Views x1, x2 `(B, 3, S, S)`, momentum m -> loss (scalar).

        The momentum encoder is updated first: its keys come after the last optimizer step (Alg. 1).
        """
        self.update_momentum_encoder(m)
        tokens, z1, z2 = self.project(self.base_encoder, x1, x2)
        q1, q2 = self.predictor(z1), self.predictor(z2)
        with torch.no_grad():
            _, k1, k2 = self.project(self.momentum_encoder, x1, x2)
            cosines, own = similarities(q1, k2)
            self.monitors = {"contrastive_accuracy": (cosines.argmax(dim=1) == own).float().mean(),
                             "projection_spread": spread(z1), "token_spread": spread(tokens[:len(x1)])}
        return contrastive_loss(q1, k2, self.temperature) + contrastive_loss(q2, k1, self.temperature)


# ------------------------------------------------------------ training

SETTINGS = {  # argument:   toy    32 px  photographs; meaning; allowed values
    "arch":            (("toy", "tiny", "tiny"), "Vision Transformer of vit.py", *vit.ARCHS),
    "img_size":        ((32, 32, 224), "side of the images, in pixels", 1, 10 ** 5),
    "patch_size":      ((8, 4, 16), "side of a patch, in pixels", 1, 10 ** 5),
    "dim":             ((64, 256, 256), "dimensions in which images are compared", 2, 10 ** 6),
    "mlp_dim":         ((256, 1024, 4096), "hidden width of projector and predictor", 1, 10 ** 6),
    "temperature":     ((0.2, 0.2, 0.2), "T, by which cosines are divided", 1e-3, 100),
    "momentum":        ((0.95, 0.99, 0.99), "m at the start; a cosine raises it to 1", 0, 1),
    "stop_grad_conv1": ((False, False, False), "freeze the random patch embedding"),
    "min_crop":        ((0.5, 0.2, 0.08), "smallest crop, as a share of the image's area", 0, 1),
    "saturation":      ((0.8, 0.2, 0.2), "largest change of saturation: color alone", 0, 1),
    "hue":             ((0.5, 0.1, 0.1), "and of hue: must not tell toy images apart", 0, 0.5),
    "gray":            ((0.5, 0.2, 0.2), "share of the views that lose their color", 0, 1),
    "blur_sigma":      ((0.5, 0.5, 2.0), "largest blur, in pixels (the smallest: 0.1)", 0.1, 100),
    "epochs":          ((6, 400, 400), "times that each image is seen", 1, 10 ** 6),
    "warmup_epochs":   ((1.0, 20.0, 40.0), "epochs in which the learning rate rises", 0, 10 ** 6),
    "batch_size":      ((64, 512, 1024), "images in an update, over all ranks", 2, 10 ** 6),
    "base_lr":         ((4e-3, 3e-4, 1.5e-4), "learning rate per 256 images of the batch", 0, 1e12),
    "weight_decay":    ((0.1, 0.1, 0.1), "AdamW's, on all parameters", 0, 1),
    "init":            (None, "start both encoders from the weights of this checkpoint"),
}


def make_sample(data, views, i):
    """Image i as two random views, each `(3, S, S)`, uint8."""
    image, _ = data[i]
    view_1, view_2 = views
    return view_1(image), view_2(image)


def train(args):
    device, stop = setup(args)
    # Data: an endless stream. All that is random about sample number v follows from (seed, v).
    data = open_data(args, train=True)
    if not 2 * WORLD <= args.batch_size <= len(data):
        raise UserError(f"--batch-size {args.batch_size}: from 2 images a rank to all {len(data)} images")
    crop = v2.RandomResizedCrop(args.img_size, (args.min_crop, 1))    # bilinear
    jitter = v2.RandomApply([v2.ColorJitter(0.4, 0.4, args.saturation, args.hue)], p=0.8)
    gray = v2.RandomGrayscale(args.gray)
    kernel = max(3, args.img_size // 20 * 2 + 1)    # odd, a tenth of the image: 23 at 224 px
    blur = v2.GaussianBlur(kernel, (0.1, args.blur_sigma))
    flip = v2.RandomHorizontalFlip()
    solarize = v2.RandomSolarize(threshold=128, p=0.2)
    view_1 = v2.Compose([crop, jitter, gray, blur, flip])
    view_2 = v2.Compose([crop, jitter, gray, v2.RandomApply([blur], p=0.1), solarize, flip])
    stream = Stream(len(data), args.seed, functools.partial(make_sample, data, (view_1, view_2)))
    mean, std = MEAN.to(device), STD.to(device)    # of pixels from 0 to 255
    steps = max(1, round(args.epochs * len(data) / args.batch_size))
    warmup = min(steps - 1, round(args.warmup_epochs * len(data) / args.batch_size))

    # Model and optimizer: new, from --init, or from the checkpoint of an interrupted run.
    torch.manual_seed(args.seed)
    encoder_fn = functools.partial(vit.ARCHS[args.arch], img_size=args.img_size, patch_size=args.patch_size)
    model = MoCoV3(encoder_fn, args.dim, args.mlp_dim, args.temperature, args.stop_grad_conv1).to(device)
    if args.init and not args.resume:
        print(f"--init {args.init}: {vit.load_weights(model.base_encoder, args.init)}")
        model.momentum_encoder.load_state_dict(model.base_encoder.state_dict())
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.999), weight_decay=args.weight_decay, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
    step = start(args, data, model=model, optimizer=optimizer, scaler=scaler)    # from last.pt; 0: a new run
    if args.compile:    # the transformers alone: ranks communicate in BatchNorm and in the loss
        for block in [*model.base_encoder.blocks, *model.momentum_encoder.blocks]:
            block.compile(dynamic=False)
    network = nn.parallel.DistributedDataParallel(model) if WORLD > 1 else model
    half = torch.float16 if args.amp == "fp16" else torch.bfloat16
    autocast = torch.autocast(device.type, half, enabled=args.amp != "off")
    end = min(steps, step + (args.max_steps or steps))
    batches = load(stream, step, end, args)
    log, last_save = Log(args, step, steps), time.time()
    while step < end:
        lr = learning_rate(step, steps, warmup, args.base_lr * args.batch_size / 256)
        momentum = learning_rate(step, steps, 0, args.momentum, 1.0)    # the same cosine, up to 1
        for group in optimizer.param_groups:
            group["lr"] = lr
        x1, x2 = log.next(batches)                                     # (B, 3, S, S) each, uint8
        x1 = (x1.to(device, non_blocking=True) - mean) / std
        x2 = (x2.to(device, non_blocking=True) - mean) / std
        with autocast:
            loss = network(x1, x2, momentum)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        grad_norm = nn.utils.clip_grad_norm_(parameters, args.clip_grad or math.inf)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
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
            last_save = time.time()
        if stopping:
            break
    print(f"{'done' if step == steps else 'stopped, --resume continues'}: step {step} of {steps}")


def draw_curves(args):
    """curves.png: the loss and the collapse indicators over the epochs, from log.jsonl."""
    log = [json.loads(line) for line in (args.out / "log.jsonl").read_text().splitlines()]
    names = ("loss", "contrastive_accuracy", "projection_spread", "token_spread")
    figure = Figure((12, 3), layout="tight")
    for axis, name in zip(figure.subplots(1, 4), names):
        axis.plot([entry["epoch"] for entry in log], [entry[name] for entry in log])
        axis.set(title=name.replace("_", " "), xlabel="epoch", ylim=(0, None))
    figure.suptitle(f"MoCo-v3 {args.arch} on {args.data}")
    figure.savefig(args.out / "curves.png")


def main(argv=None):
    args = parse(argv, {**SETTINGS, **TRAINING}, out="runs/mocov3")
    if args.accum > 1:
        raise UserError(f"--accum {args.accum}: loss and BatchNorm compare the images of the whole batch, it "
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
