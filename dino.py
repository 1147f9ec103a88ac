"""DINO: a Vision Transformer learns from its own moving average (Caron et al., 2021).

Large (global) and small (local) crops of an image must give the same distribution over d outputs.
The student sees all crops. The teacher, its slowly moving average, sees the global ones and gives
the target; it is used afterwards. Both could give the same output for all images: a low temperature
T_t and subtracting the center, a running mean of outputs t of the teacher, prevent that. The recipe
is the authors', for larger networks.

    loss = mean over pairs of crops, -sum softmax((t - center) / T_t) log softmax(s / T_s)  (Eq. 3)

    python dino.py                                  # a laptop: synthetic shapes, minutes
    python dino.py --data cifar100 --download       # images of 32 x 32 pixels
    python dino.py --data DIR --compile             # one GPU; DIR/train/CLASS/*.jpg, DIR/val/...
    torchrun --nproc_per_node=8 dino.py --data DIR  # 100 epochs, batch 512

Results in --out: config.json, log.jsonl, last.pt, curves.png, attention.png. --resume continues it.
Shapes: B images on this rank, V local crops, S and S' sides of global and local crops, d outputs.
"""
import argparse
import atexit
import copy
import functools
import json
import math
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from matplotlib.figure import Figure
from PIL import Image
from torch import distributed as dist, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.transforms import v2
from tqdm import tqdm

import vit


# ---------- the method

def dino_loss(student, teacher, center, student_temp, teacher_temp):
    """Cross entropy of teacher and student on different crops: a scalar, this rank's mean (Eq. 3).

    student `((2 + V) B, d)`, teacher `(2B, d)`, center `(1, d)`; float32 inside, also with --amp.
    Rows: first global crop of all B images, then the second, then the local crops.
    """
    targets = ((teacher - center) / teacher_temp).softmax(dim=1).chunk(2)  # (B, d) each
    outputs = (student.to(center.dtype) / student_temp).split(len(targets[0]))  # 2 + V of (B, d)
    losses = []
    for i, target in enumerate(targets):
        for j, output in enumerate(outputs):
            if i == j:
                continue  # never compare a crop with itself
            losses.append(F.cross_entropy(output, target))
    return torch.stack(losses).mean()


class DINO(nn.Module):
    """A student and a teacher, its moving average: encoders with a projector as `head` (Sec. 3.1).

    `encoder_fn(global_pool="token")` makes a `vit.VisionTransformer`.
    """

    def __init__(self, encoder_fn, out_dim=65536, hidden_dim=2048, temperature=0.1,
                 teacher_temp=0.04):
        super().__init__()
        self.temperature = temperature
        self.teacher_temp = teacher_temp
        self.student = encoder_fn(global_pool="token")
        self.student.head = projector(self.student.embed_dim, hidden_dim, 256, out_dim)
        vit.init_weights(self.student.head[:-1])
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.register_buffer("center", torch.zeros(1, out_dim))

    def update_teacher(self, m):
        """`teacher <- m teacher + (1 - m) student`: all parameters (Alg. 1)."""
        teacher = list(self.teacher.parameters())
        student = list(self.student.parameters())
        get_ema_multi_avg_fn(m)(teacher, student, None)  # None: a count, which it ignores

    @torch.no_grad()
    def update_center(self, teacher):
        """`center <- 0.9 center + 0.1 mean` of all ranks' teacher outputs `(2B, d)` (Eq. 4)."""
        mean = teacher.mean(dim=0, keepdim=True, dtype=self.center.dtype)
        if dist.is_initialized():
            dist.all_reduce(mean)
            mean /= dist.get_world_size()
        self.center.lerp_(mean, 0.1)

    def forward(self, global_crops, local_crops):
        """Crops `(B, 2, 3, S, S)` and `(B, V, 3, S', S')` -> loss (scalar); then moves the center.

        Sets `monitors`, collapse indicators, detached scalars of this rank: `entropy` of the
        targets, `kl` from target to student (the rest of the loss), `token_spread`, the `spread` of
        the teacher's class tokens. Collapse: kl 0, entropy 0 or log d.
        """
        global_crops = global_crops.transpose(0, 1).flatten(0, 1)  # (2B, 3, S, S), crop by crop
        local_crops = local_crops.transpose(0, 1).flatten(0, 1)  # (V B, 3, S', S')
        student = torch.cat([self.student(global_crops), self.student(local_crops)])
        with torch.no_grad():
            tokens = self.teacher.pool(self.teacher.encode(self.teacher.embed(global_crops)))
            teacher = self.teacher.head(tokens)
        loss = dino_loss(student, teacher, self.center, self.temperature, self.teacher_temp)
        logits = (teacher - self.center) / self.teacher_temp
        entropy = F.cross_entropy(logits, logits.softmax(dim=1))
        self.update_center(teacher)
        self.monitors = {
            "entropy": entropy, "kl": loss.detach() - entropy, "token_spread": spread(tokens)}
        return loss


def spread(x):
    """Standard deviation of unit rows `(B, d)`, times sqrt(d): 1 if isotropic, 0 if identical."""
    return F.normalize(x.detach().float(), dim=1).std(dim=0).mean() * x.shape[1] ** 0.5


def projector(dim, hidden_dim, bottleneck, out_dim):  # without BatchNorm (App. C)
    return nn.Sequential(
        nn.Linear(dim, hidden_dim), nn.GELU(),
        nn.Linear(hidden_dim, hidden_dim), nn.GELU(),
        nn.Linear(hidden_dim, bottleneck),
        Cosines(bottleneck, out_dim, bias=False))


class Cosines(nn.Linear):  # weight norm: rows of x and of the weight have norm 1
    def forward(self, x):
        return F.linear(F.normalize(x, dim=1), F.normalize(self.weight, dim=1))


def clip_each(parameters, largest):
    """Scales each tensor's gradient to a norm of at most `largest`; returns the norms before."""
    norms = torch.stack([p.grad.norm() for p in parameters])
    factors = (largest / (norms + 1e-6)).clamp(max=1)
    for parameter, factor in zip(parameters, factors):
        parameter.grad.mul_(factor)
    return norms


# ---------- training

def settings(parser):
    add = parser.add_argument
    add("--arch", default="tiny", choices=vit.ARCHS, help="network of vit.py")
    add("--img-size", type=count, default=224, help="side of the global crops in pixels")
    add("--local-size", type=count, default=96, help="side of the local crops in pixels")
    add("--local-crops", type=count, default=8, help="local crops of an image")
    add("--patch-size", type=count, default=16, help="patch side in pixels")
    add("--out-dim", type=count, default=65536, help="outputs d")
    add("--hidden-dim", type=count, default=2048, help="hidden width of the projector")
    add("--temperature", type=amount, default=0.1, help="T_s, divides the student's outputs")
    add("--teacher-temp", type=amount, default=0.04, help="T_t, divides the teacher's outputs")
    add("--momentum", type=share, default=0.996, help="m at first; a cosine raises it to 1")
    add("--min-crop", type=share, default=0.4, help="smallest global = largest local crop")
    add("--local-min-crop", type=share, default=0.05, help="smallest crop, share of the area")
    add("--saturation", type=share, default=0.2, help="largest change of saturation")
    add("--hue", type=share, default=0.1, help="largest change of hue, 0.5 is any hue")
    add("--gray", type=share, default=0.2, help="share of gray crops")
    add("--blur-sigma", type=amount, default=2.0, help="largest sigma of the blur, from 0.1")
    add("--epochs", type=amount, default=100, help="passes over the images")
    add("--warmup-epochs", type=amount, default=10, help="epochs of rising learning rate")
    add("--batch-size", type=count, default=512, help="images in an update")
    add("--base-lr", type=amount, default=5e-4, help="learning rate per 256 images")
    add("--weight-decay", type=amount, default=0.04, help="at first; not on biases and norms")
    add("--weight-decay-end", type=amount, default=0.4, help="at the end, by a cosine")
    add("--clip-grad", type=amount, default=3.0, help="largest norm of each tensor's gradient")
    add("--init", help="start from the encoder in this file, and its head")


# What differs from the recipe above. A toy image has few colors: crops could be matched by color
# alone. Strong changes of saturation and hue leave only the shape.
PRESETS = {
    "photos": {},
    "small": dict(img_size=32, local_size=16, local_crops=6, patch_size=4, out_dim=4096,
                  hidden_dim=1024, blur_sigma=0.5),
    "toy": dict(arch="toy", img_size=32, local_size=16, local_crops=2, patch_size=8, out_dim=256,
                hidden_dim=256, teacher_temp=0.025, momentum=0.99, min_crop=0.6,
                local_min_crop=0.3, saturation=0.8, hue=0.5, gray=0.5, blur_sigma=0.5, epochs=8,
                warmup_epochs=1, batch_size=32, base_lr=1.2e-2, weight_decay_end=0.04)}


class Samples(Dataset):
    """Sample v: crops `(2, 3, S, S)` and `(V, 3, S', S')`, uint8, drawn from (seed, v)."""

    def __init__(self, data, args):
        self.data = data
        self.args = args
        self.global_crop = v2.RandomResizedCrop(
            args.img_size, (args.min_crop, 1), interpolation=BICUBIC)
        self.local_crop = v2.RandomResizedCrop(
            args.local_size, (args.local_min_crop, args.min_crop), interpolation=BICUBIC)
        self.jitter = v2.ColorJitter(0.4, 0.4, args.saturation, args.hue)

    def __getitem__(self, v):
        image, _ = self.data[shuffled(v, len(self.data), self.args.seed)]
        first = self.change(self.global_crop(image), blur=1, solarize=0)
        second = self.change(self.global_crop(image), blur=0.1, solarize=0.2)
        local_crops = [self.change(self.local_crop(image), blur=0.5, solarize=0)
                       for _ in range(self.args.local_crops)]
        return torch.stack([first, second]), torch.stack(local_crops)

    def change(self, image, blur, solarize):
        """Random changes of a crop, as in BYOL; `blur` and `solarize` are probabilities."""
        image = image / 255  # float32: jitter is faster than on uint8
        if torch.rand(1) < 0.8:
            image = self.jitter(image)
        if torch.rand(1) < self.args.gray:
            image = v2.functional.rgb_to_grayscale(image, num_output_channels=3)
        if torch.rand(1) < blur:
            image = random_blur(image, self.args.blur_sigma)
        if torch.rand(1) < solarize:
            image = v2.functional.solarize(image, 0.5)  # inverts bright pixels
        if torch.rand(1) < 0.5:
            image = v2.functional.horizontal_flip(image)
        return (255 * image).round().byte()


def random_blur(image, largest):
    """Gaussian blur along one axis, then the other: equal to a 2-D blur, but faster."""
    sigma = 0.1 + (largest - 0.1) * torch.rand(1).item()
    kernel = 2 * math.ceil(3 * sigma) + 1  # three standard deviations to each side
    image = v2.functional.gaussian_blur(image, [kernel, 1], [sigma, sigma])
    return v2.functional.gaussian_blur(image, [1, kernel], [sigma, sigma])


def train(args):
    device = setup(args)
    data = open_data(args, train=True)
    validation = open_data(args, train=False)
    chosen = range(0, len(validation), math.ceil(len(validation) / 6))
    examples = torch.stack([center_crop(validation[i][0], 2 * args.img_size) for i in chosen])
    mean, std = vit.MEAN.to(device), vit.STD.to(device)

    torch.manual_seed(args.seed)
    encoder_fn = functools.partial(vit.ARCHS[args.arch], args.img_size, args.patch_size)
    model = DINO(encoder_fn, args.out_dim, args.hidden_dim, args.temperature, args.teacher_temp)
    model.to(device)
    if args.init and not (args.resume and (args.out / "last.pt").exists()):
        print(f"--init {args.init}: {vit.load_weights(model.student, args.init)}")
        model.teacher.load_state_dict(model.student.state_dict())
    parameters = [p for p in model.parameters() if p.requires_grad]
    matrices = {"name": "matrices", "params": [p for p in parameters if p.ndim > 1]}
    vectors = {"name": "vectors", "params": [p for p in parameters if p.ndim == 1]}  # biases, norms
    optimizer = torch.optim.AdamW([matrices, vectors], weight_decay=0.0, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
    done = start(args, data, model=model, optimizer=optimizer, scaler=scaler)  # steps; 0 if new
    if args.compile:  # not the center, where ranks communicate
        for block in [*model.student.blocks, *model.teacher.blocks]:
            block.compile(dynamic=False)  # once for each size of crops
    network = nn.parallel.DistributedDataParallel(model) if WORLD > 1 else model
    autocast = torch.autocast(device.type, AMP[args.amp], enabled=args.amp != "off")

    steps = max(1, round(args.epochs * len(data) / args.batch_size))
    warmup = min(steps - 1, round(args.warmup_epochs * len(data) / args.batch_size))
    end = min(steps, done + args.max_steps) if args.max_steps else steps
    log = Log(args, scaler)
    B = args.batch_size  # of all ranks; the first step has samples 0 to B - 1
    mine = range(done * B + RANK, end * B, WORLD)  # dealt to the ranks in turn
    batches = log.timed(DataLoader(
        Samples(data, args), B // WORLD, sampler=mine, num_workers=args.workers,
        pin_memory=torch.cuda.is_available()))
    last_save = time.time()
    for step in tqdm(range(done + 1, end + 1), initial=done, total=steps, disable=RANK > 0 or None):
        lr = learning_rate(step - 1, steps, warmup, args.base_lr * B / 256, min_lr=1e-6)
        decay = cosine(step - 1, steps, args.weight_decay, args.weight_decay_end)
        momentum = cosine(step - 1, steps, args.momentum, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = lr
            if group["name"] == "matrices":
                group["weight_decay"] = decay
        global_crops, local_crops = [x.to(device, non_blocking=True) for x in next(batches)]
        with autocast:
            loss = network((global_crops - mean) / std, (local_crops - mean) / std)
        scaler.scale(loss).backward()
        log.add(loss=loss, **model.monitors)
        scaler.unscale_(optimizer)
        grad_norm = clip_each(parameters, args.clip_grad or math.inf).norm()
        if (step - 1) * args.batch_size < len(data):  # epoch 0: freeze the last layer, steadier
            model.student.head[-1].weight.grad = None
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        model.update_teacher(momentum)
        # Up to here nothing waited for the device. Reading the losses does.
        if step % args.log_every == 0 or step == end:
            epoch = step * args.batch_size / len(data)
            log.write(step, epoch=epoch, lr=lr, momentum=momentum, grad_norm=grad_norm.item())
            if RANK == 0 and (step == end or time.time() - last_save > 60 * args.save_minutes):
                save(args, "last.pt", step, model=model, optimizer=optimizer, scaler=scaler)
                draw_curves(args)
                draw_attention(args, model.teacher, examples, mean, std)
                last_save = time.time()
    print(f"step {end} of {steps}: {args.out}")


def cosine(step, steps, first, last):  # from `first` at step 0 to `last` at `steps`
    return last + (first - last) * 0.5 * (1 + math.cos(math.pi * step / steps))


def draw_curves(args):
    """curves.png: the loss and the collapse indicators over the epochs, from log.jsonl."""
    log = [json.loads(line) for line in (args.out / "log.jsonl").read_text().splitlines()]
    figure = Figure((12, 3), layout="tight")
    for axis, name in zip(figure.subplots(1, 4), ("loss", "entropy", "kl", "token_spread")):
        values = [entry[name] for entry in log]
        axis.plot([entry["epoch"] for entry in log], values)
        axis.set(title=name.replace("_", " "), xlabel="epoch", ylim=(0, max(values) + 0.1))
    figure.suptitle(f"DINO {args.arch} on {args.data}")
    figure.savefig(args.out / "curves.png")


def draw_attention(args, encoder, examples, mean, std):
    """attention.png: attention of the class token in the last block, at twice the image size."""
    images = (examples.to(mean.device) - mean) / std
    maps = vit.attention_maps(encoder, images, [len(encoder.blocks) - 1])  # (1, B, h, N, N)
    side = 2 * encoder.grid
    maps = maps[0, :, :, 0, 1:].unflatten(2, (side, side)).cpu().numpy()  # (B, h, side, side)
    figure = Figure((13, len(images) + 0.5), layout="tight")
    axes = figure.subplots(len(images), 13, squeeze=False, subplot_kw={"xticks": [], "yticks": []})
    for i, image in enumerate(examples):
        axes[i, 0].imshow(image.permute(1, 2, 0).numpy())
        for head in range(12):
            axes[i, 1 + head].imshow(maps[i, head], vmin=0)
    figure.suptitle(f"DINO {args.arch} on {args.data}: attention in heads 1 to 12")
    figure.savefig(args.out / "attention.png")


def main(argv=None):
    args = parse(argv, settings, PRESETS, out="runs/dino")
    if args.accum > 1:
        raise vit.InputError(f"--accum {args.accum}: the center moves once for all images of a "
                             "batch; use more ranks, --amp bf16, or a smaller --batch-size")
    if args.local_min_crop > args.min_crop:
        raise vit.InputError(f"--local-min-crop {args.local_min_crop} is above --min-crop")
    train(args)


# ==================== plumbing: the same in all scripts; skip it at first

RANK = int(os.environ.get("RANK", 0))  # set by torchrun
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))
WORLD = int(os.environ.get("WORLD_SIZE", 1))
WORKERS = min(8, os.cpu_count()) if torch.cuda.is_available() else 0
AMP = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}
BICUBIC = v2.InterpolationMode.BICUBIC
to_tensor = v2.Compose([v2.RGB(), v2.PILToTensor()])  # PIL image -> (3, H, W), uint8
NAMED = {"cifar10": "CIFAR10", "cifar100": "CIFAR100", "fashionmnist": "FashionMNIST"}
IMAGES = (".jpg", ".jpeg", ".jfif", ".jp2", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff")
MAY_CHANGE = ("out", "preset", "data", "root", "download", "workers", "accum", "compile",
              "log_every", "save_minutes", "max_steps", "resume", "init", "teacher")


def parse(argv, settings, presets, out, recipes=None):
    """What is typed; else what the run to resume had; else the preset's; else the default."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        usage=argparse.SUPPRESS, allow_abbrev=False, add_help=False)
    add = parser.add_argument
    add("--data", default="toy", help=f"folder with train/ and val/, or toy, {', '.join(NAMED)}")
    add("--preset", choices=presets, help="sizes and recipe, else by --data")
    settings(parser)
    add("--out", type=Path, default=out, help="folder of the results")
    add("--resume", action="store_true", help="continue the run in --out")
    add("--root", default="data", help="folder of downloads")
    add("--download", action="store_true", help="download CIFAR or Fashion-MNIST")
    add("--fraction", type=share, default=1.0, help="share of each class to train on")
    add("--long-tail", action="store_true", help="class sizes like ImageNet-LT's")
    add("--seed", type=int, default=0, help="of weights, order, crops, masks")
    add("--accum", type=count, default=1, help="micro-batches in an update")
    add("--amp", choices=AMP, help="mixed precision, else bf16 or fp16 on a GPU")
    add("--compile", action="store_true", help="torch.compile the network")
    add("--workers", type=int, default=WORKERS, help="loading processes")
    add("--log-every", type=count, default=10, help="steps between log lines")
    add("--save-minutes", type=amount, default=5.0, help="minutes between saves")
    add("--max-steps", type=count, help="stop early, the schedule unchanged")
    typed, _ = parser.parse_known_args(argv)
    by_data = {"toy": "toy", **dict.fromkeys(NAMED, "small")}.get(typed.data, "photos")
    preset = typed.preset or by_data
    parser.set_defaults(preset=preset, **presets[preset])
    if recipes:
        parser.set_defaults(**recipes[typed.recipe])
    if typed.resume and (typed.out / "config.json").exists():
        before = json.loads((typed.out / "config.json").read_text())
        names = (before.keys() & vars(typed)) - {"max_steps", "out"}
        parser.set_defaults(**{name: before[name] for name in names})
    add("-h", "--help", action="help", default=argparse.SUPPRESS)
    return parser.parse_args(argv)


def count(text):  # type of an argument: 1, 2, 3, ...
    if int(text) < 1:
        raise ValueError
    return int(text)


def amount(text):  # a number from 0 up
    if not 0 <= float(text) < math.inf:
        raise ValueError
    return float(text)


def share(text):  # a number from 0 to 1
    if not 0 <= float(text) <= 1:
        raise ValueError
    return float(text)


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


@functools.lru_cache(maxsize=1)
def permutation(n, seed, epoch):
    return np.random.default_rng((seed, epoch)).permutation(n).astype(np.int32)


def shuffled(v, n, seed):
    """The image of sample v. Seeds torch, too: all drawn after it follows from (seed, v)."""
    number = np.random.SeedSequence((seed, v)).generate_state(1)[0]
    torch.default_generator.manual_seed(int(number))
    return permutation(n, seed, v // n)[v % n]


def setup(args, crops=1):
    """Joins the ranks, prints the settings, returns the device."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        if LOCAL_RANK >= torch.cuda.device_count():
            raise vit.InputError(f"--nproc_per_node: only {torch.cuda.device_count()} GPUs")
        device = torch.device("cuda", LOCAL_RANK)
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        args.amp = args.amp or ("bf16" if bf16 else "fp16")
    args.amp = args.amp or "off"
    if WORLD > 1:
        dist.init_process_group(device_id=device if device.type == "cuda" else None)
        atexit.register(dist.destroy_process_group)  # else its threads may abort
    B = args.batch_size
    parts = WORLD * args.accum * crops
    if B % parts:
        raise vit.InputError(f"--batch-size {B}: not a multiple of {parts}, ranks x accum x crops")
    if args.warmup_epochs >= args.epochs or args.seed < 0:
        raise vit.InputError(f"--warmup-epochs {args.warmup_epochs} or --seed is out of range")
    if RANK > 0:
        sys.stdout = open(os.devnull, "w")
    print(*[f"--{name.replace('_', '-')} {value}" for name, value in vars(args).items()])
    print(f"batch {B} = {WORLD} ranks x {args.accum} accum x {B // (WORLD * args.accum)} images;",
          f"lr {args.base_lr * B / 256:g} = {args.base_lr:g} x {B} / 256")
    return device


def learning_rate(step, steps, warmup, lr, min_lr=0.0):
    """Linear warm-up from 0, if any, then half a cosine to `min_lr`, by step."""
    if step < warmup:
        return lr * step / warmup
    progress = (step - warmup) / (steps - warmup)
    return min_lr + (lr - min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def start(args, data, **parts):
    """Claims --out, or fills `parts` from the run in it. Returns its steps."""
    args.images = len(data)
    if args.batch_size > args.images:
        raise vit.InputError(f"--batch-size {args.batch_size}: only {len(data)} images, give less")
    path = args.out / "last.pt"
    checkpoint = {"step": 0, "log": ""}
    if args.resume and path.exists():
        checkpoint = vit.open_checkpoint(path)
        changed = [f"--{name.replace('_', '-')} was {value}, now {vars(args).get(name)}"
                   for name, value in checkpoint["config"].items()
                   if name not in MAY_CHANGE and value != vars(args).get(name)]
        if changed:
            raise vit.InputError(f"{path}: {'; '.join(changed)}")
        for name, part in parts.items():
            part.load_state_dict(checkpoint[name])
    ranks = [(checkpoint["step"], args.images)] * WORLD
    if WORLD > 1:
        dist.all_gather_object(ranks, ranks[0])
    if len(set(ranks)) > 1:
        raise vit.InputError(f"ranks differ in (step, images): {ranks}")
    if RANK == 0:
        args.out.mkdir(parents=True, exist_ok=True)
        try:
            with open(args.out / "config.json", "w" if args.resume else "x") as file:
                json.dump(vars(args), file, indent=1, default=str)
        except FileExistsError:
            raise vit.InputError(f"{args.out} holds a run: --resume, or another --out") from None
        (args.out / "log.jsonl").write_text(checkpoint["log"])  # drops later lines
    return checkpoint["step"]


def save(args, name, step, **parts):
    """Writes a checkpoint beside the old one, then renames it."""
    state = {part: module.state_dict() for part, module in parts.items()}
    if not all(tensor.isfinite().all() for tensor in state["model"].values()):
        raise vit.InputError(f"step {step}: a weight is not finite, {name} is unchanged")
    config = {**vars(args), "out": str(args.out)}
    state.update(step=step, config=config, log=(args.out / "log.jsonl").read_text())
    torch.save(state, args.out / "saving.tmp")
    os.replace(args.out / "saving.tmp", args.out / name)


class Log:
    """Sums scalars on the device; `write` prints and files their means over steps and ranks."""

    def __init__(self, args, scaler):
        self.args = args
        self.scaler = scaler
        self.clear()

    def clear(self):
        self.sums = {}
        self.parts = 0
        self.waited = 0.0
        self.since = time.time()

    def timed(self, batches):  # the time they take to come is logged as data_wait
        began = time.time()
        for batch in batches:
            self.waited += time.time() - began
            yield batch
            began = time.time()

    def add(self, **scalars):  # tensors of a micro-batch, on the device
        for name, scalar in scalars.items():
            self.sums[name] = self.sums.get(name, 0) + scalar.detach()
        self.parts += 1

    def write(self, step, **entry):
        """Adds a line to log.jsonl, or raises InputError on all ranks if it is not finite."""
        means = torch.stack(list(self.sums.values())).float() / self.parts / WORLD
        if WORLD > 1:
            dist.all_reduce(means)
        entry = {"step": step, **dict(zip(self.sums, means.tolist())), **entry}
        if self.args.amp == "fp16" and not math.isfinite(entry["grad_norm"]):
            del entry["grad_norm"]  # fp16 skipped this step
        if not all(map(math.isfinite, entry.values())) or self.scaler.get_scale() < 1:
            raise vit.InputError(f"not finite, or overflow: {entry}; try --amp bf16, --clip-grad 1")
        seconds = time.time() - self.since
        images = self.args.batch_size * self.parts / self.args.accum
        entry = {**entry, "images_per_s": images / seconds, "data_wait": self.waited / seconds}
        tqdm.write("  ".join(f"{name} {value:.6g}" for name, value in entry.items()))
        if RANK == 0:
            with open(self.args.out / "log.jsonl", "a") as file:
                file.write(json.dumps(entry) + "\n")
        self.clear()


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
