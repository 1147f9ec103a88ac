"""SimMIM: MAE with mask tokens in the encoder (Xie et al., 2022). Read `diff mae.py simmim.py`.

Squares of an image are masked. The encoder gets all patches, a mask token in place of each masked
one, and a linear layer predicts the pixels. Settings: this project's. Commands: those of mae.py.

    loss = mean over masked pixels of |prediction - pixels|

Results in --out: config.json, log.jsonl, last.pt, reconstruction.png. --resume continues it.
Shapes: B images, L patches, D width, p patch size, S image size.
"""
import argparse
import atexit
import functools
import json
import math
import os
import sys
import time
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


# ---------- the method

def patchify(images, patch_size):
    """`(B, 3, H, W) -> (B, L, p*p*3)`: patches row by row, as (3, p, p), for published weights."""
    B, C, H, W = images.shape
    x = images.reshape(B, C, H // patch_size, patch_size, W // patch_size, patch_size)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(B, -1, patch_size * patch_size * C)


def unpatchify(patches, patch_size):
    """`(B, L, p*p*3) -> (B, 3, H, W)` of a square image: the inverse of `patchify`."""
    B, L, _ = patches.shape
    side = math.isqrt(L)
    x = patches.reshape(B, side, side, -1, patch_size, patch_size).permute(0, 3, 1, 4, 2, 5)
    return x.reshape(B, -1, side * patch_size, side * patch_size)


def random_mask(noise, mask_ratio=0.6, unit=2):
    """Masks the `ceil(U * mask_ratio)` of U squares with the smallest noise (SimMIM, Sec. 3.2).

    A square of `unit x unit` patches has the noise of its top left. `(B, L)` -> mask `(B, L)`.
    """
    side = math.isqrt(noise.shape[1]) // unit  # squares in a row
    noise = noise.unflatten(1, (side, unit, side, unit))[:, :, 0, :, 0].flatten(1)  # (B, U)
    chosen = noise.topk(math.ceil(side * side * mask_ratio), largest=False).indices
    mask = torch.zeros_like(noise).scatter(1, chosen, 1).unflatten(1, (side, side))
    return mask.repeat_interleave(unit, dim=1).repeat_interleave(unit, dim=2).flatten(1)


class SimMIM(nn.Module):
    """An encoder of visible patches and mask tokens, a layer that predicts pixels (Sec. 3)."""

    def __init__(self, encoder, mask_unit=2):
        super().__init__()
        if encoder.global_pool == "avg":  # vit.py's default; here every token is normalized
            encoder.norm = encoder.fc_norm
            encoder.fc_norm = nn.Identity()
            encoder.global_pool = "token"
        self.encoder = encoder
        self.mask_unit = mask_unit  # side of a masked square, in patches
        pixels = encoder.patch_size ** 2 * encoder.patch_embed.proj.in_channels
        self.mask_token = nn.Parameter(torch.zeros(1, 1, encoder.embed_dim))
        self.decoder = nn.Linear(encoder.embed_dim, pixels)
        nn.init.normal_(self.mask_token, std=0.02)
        vit.init_weights(self.decoder)

    def forward(self, images, mask_ratio, noise):
        """`(B, 3, S, S)` -> loss (no mask: 0), pred `(B, L, p*p*3)`, mask `(B, L)`, 1 = masked."""
        tokens = self.encoder.patch_embed(images).flatten(2).transpose(1, 2)  # (B, L, D)
        mask = random_mask(noise, mask_ratio, self.mask_unit)
        tokens = torch.where(mask[:, :, None] > 0, self.mask_token, tokens)  # position later
        latent = self.encoder.norm(self.encoder.encode(tokens + self.encoder.pos_embed[:, 1:]))
        pred = self.decoder(latent[:, 1:])  # without the class token
        error = (pred.to(images.dtype) - patchify(images, self.encoder.patch_size)).abs()
        loss = (error.mean(dim=-1) * mask).sum() / mask.sum().clamp(min=1)  # of masked patches
        return loss, pred, mask


def settings(parser):
    add = parser.add_argument
    add("--arch", default="tiny", choices=vit.ARCHS, help="network of vit.py")
    add("--img-size", type=count, default=224, help="image side in pixels")
    add("--patch-size", type=count, default=16, help="patch side in pixels")
    add("--mask-unit", type=count, default=32, help="side of a masked square in pixels")
    add("--mask-ratio", type=share, default=0.6, help="share of masked squares")
    add("--min-crop", type=share, default=0.67, help="smallest crop, share of the area")
    add("--crops-per-image", type=count, default=1, help="crops of each loaded image")
    add("--epochs", type=amount, default=100, help="passes over the images, counting crops")
    add("--warmup-epochs", type=amount, default=10, help="epochs of rising learning rate")
    add("--batch-size", type=count, default=2048, help="images in an update")
    add("--base-lr", type=amount, default=5e-5, help="learning rate per 256 images")
    add("--weight-decay", type=amount, default=0.05, help="not on biases and norms")
    add("--clip-grad", type=amount, default=5.0, help="largest norm of the gradient")
    add("--init", help="start from the encoder in this file")


PRESETS = {  # what differs from the defaults above
    "photos": {},
    "small": dict(img_size=32, patch_size=4, mask_unit=8, epochs=400, warmup_epochs=20,
                  batch_size=512, base_lr=3e-4),
    "toy": dict(arch="toy", img_size=32, patch_size=4, mask_unit=8, epochs=8, warmup_epochs=1,
                batch_size=32, base_lr=1.2e-2)}


class Samples(Dataset):
    """Sample v = 0, 1, 2, ...: an image's crops `(crops, 3, S, S)`, uint8, and noise `(crops, L)`.

    All that is random about sample v follows from (seed, v). So the number of ranks, workers and
    micro-batches changes nothing, nor does a restart.
    """

    def __init__(self, data, args):
        self.data = data
        self.args = args
        self.crop = v2.RandomResizedCrop(args.img_size, (args.min_crop, 1), interpolation=BICUBIC)
        self.flip = v2.RandomHorizontalFlip()

    def __getitem__(self, v):
        image, _ = self.data[shuffled(v, len(self.data), self.args.seed)]
        crops = [self.flip(self.crop(image)) for _ in range(self.args.crops_per_image)]
        noise = torch.rand(len(crops), (self.args.img_size // self.args.patch_size) ** 2)
        return torch.stack(crops), noise


def train(args):
    device = setup(args, args.crops_per_image)
    data = open_data(args, train=True)
    validation = open_data(args, train=False)
    chosen = range(0, len(validation), math.ceil(len(validation) / 8))
    examples = torch.stack([center_crop(validation[i][0], args.img_size) for i in chosen])
    mean = vit.MEAN.to(device)
    std = vit.STD.to(device)
    torch.manual_seed(args.seed)
    encoder = vit.ARCHS[args.arch](args.img_size, args.patch_size, global_pool="token")
    if args.init and not (args.resume and (args.out / "last.pt").exists()):
        print(f"--init {args.init}: {vit.load_weights(encoder, args.init)}")
    model = SimMIM(encoder, args.mask_unit // args.patch_size).to(device)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]  # biases and norms
    groups = [{"params": matrices, "weight_decay": args.weight_decay}, {"params": vectors}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), weight_decay=0.0, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
    done = start(args, data, model=model, optimizer=optimizer, scaler=scaler)  # steps; 0 if new
    if args.compile:
        model.compile(dynamic=False)  # all batches have one size
    network = nn.parallel.DistributedDataParallel(model) if WORLD > 1 else model
    autocast = torch.autocast(device.type, AMP[args.amp], enabled=args.amp != "off")

    steps = max(1, round(args.epochs * len(data) / args.batch_size))
    warmup = min(steps - 1, round(args.warmup_epochs * len(data) / args.batch_size))
    end = min(steps, done + args.max_steps) if args.max_steps else steps
    log = Log(args, scaler)
    B = args.batch_size // args.crops_per_image  # images a step; the first has samples 0 to B - 1
    mine = range(done * B + RANK, end * B, WORLD)  # dealt to the ranks in turn
    batches = log.timed(DataLoader(
        Samples(data, args), B // (WORLD * args.accum), sampler=mine, num_workers=args.workers,
        pin_memory=torch.cuda.is_available()))
    last_save = time.time()
    for step in tqdm(range(done + 1, end + 1), initial=done, total=steps, disable=RANK > 0 or None):
        lr = learning_rate(step - 1, steps, warmup, args.base_lr * args.batch_size / 256)
        for group in optimizer.param_groups:
            group["lr"] = lr
        for part in range(args.accum):
            images, noise = next(batches)
            images = images.to(device, non_blocking=True).flatten(0, 1)  # (B, 3, S, S), uint8
            noise = noise.to(device, non_blocking=True).flatten(0, 1)  # (B, L)
            # Ranks synchronize gradients on the last micro-batch only.
            network.require_backward_grad_sync = part == args.accum - 1
            with autocast:
                loss, _, _ = network((images - mean) / std, args.mask_ratio, noise)
            scaler.scale(loss / args.accum).backward()
            log.add(loss=loss)
        scaler.unscale_(optimizer)
        grad_norm = nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad or math.inf)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        # Up to here nothing waited for the device. Reading the losses does.
        if step % args.log_every == 0 or step == end:
            epoch = step * args.batch_size / len(data)
            log.write(step, epoch=epoch, lr=lr, grad_norm=grad_norm.item())
            if RANK == 0 and (step == end or time.time() - last_save > 60 * args.save_minutes):
                save(args, "last.pt", step, model=model, optimizer=optimizer, scaler=scaler)
                draw_reconstructions(args, model, examples, mean, std)
                last_save = time.time()
    print(f"step {end} of {steps}: {args.out}")


@torch.no_grad()
def draw_reconstructions(args, model, examples, mean, std):
    """reconstruction.png: what the model sees, and what it predicts."""
    images = (examples.to(mean.device) - mean) / std
    original = patchify(images, args.patch_size)
    noise = torch.rand(original.shape[:2], generator=torch.Generator().manual_seed(0))
    _, pred, mask = model.forward(images, args.mask_ratio, noise.to(mean.device))  # not compiled
    mask = mask[:, :, None]
    visible = original * (1 - mask)
    rows = torch.cat([original, visible, pred, visible + pred * mask])
    pixels = (unpatchify(rows, args.patch_size) * std + mean).clamp(0, 255).byte().cpu()
    grid = torchvision.utils.make_grid(pixels, nrow=len(images), pad_value=255)
    axis = Figure((10, 5), layout="tight").subplots(subplot_kw={"xticks": []})
    axis.set_title(f"SimMIM on {args.data}")
    axis.imshow(grid.permute(1, 2, 0).numpy())
    centers = range(args.img_size // 2, grid.shape[1], args.img_size + 2)
    axis.set_yticks(centers, ["original", "visible", "output", "output +\nvisible"])
    axis.figure.savefig(args.out / "reconstruction.png")


def main(argv=None):
    args = parse(argv, settings, PRESETS, out="runs/simmim")
    if args.img_size % args.mask_unit or args.mask_unit % args.patch_size:
        raise vit.InputError("--mask-unit must divide --img-size and be a multiple of --patch-size")
    parts = (args.img_size // args.mask_unit) ** 2
    kept = int(parts * (1 - args.mask_ratio))
    if not 0 < kept < parts:
        raise vit.InputError(f"--mask-ratio {args.mask_ratio}: keeps {kept} of {parts}")
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
