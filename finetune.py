"""Fine-tuning: what is a pre-trained Vision Transformer worth? Also linear probe, k-NN, evaluation.

Recipes: "A Closer Look at Self-Supervised Lightweight Vision Transformers" (ICML 2023), DeiT's ("original").

    laptop     python finetune.py --init runs/mae/last.pt    # without --init: from scratch
    probes     python finetune.py --mode linear --init runs/mae/last.pt    # or --mode knn
    transfer   python finetune.py --recipe transfer --data pets --init mae.pth --epochs 100
    one GPU    python finetune.py --data DIR --init mae.pth --compile    # DIR/{train,val}/CLASS/*.jpg
    8 GPUs     torchrun --nproc_per_node=8 finetune.py --data DIR --init mae.pth    # two nodes: as mae.py
    evaluate   python finetune.py --eval-only --init runs/finetune/best.pt    # writes eval.json beside it
Results in --out. B images, C classes, D width, S image size. Read up to the end of `train`.
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
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF
from tqdm import tqdm

import vit


# ------------------------------------------------------------ the method

def layer_decay_groups(model, base_lr, weight_decay, decay):
    """Optimizer groups; layer i learns at `lr_scale = decay^(depth + 1 - i)` of `base_lr` (BEiT, MAE).

    Layer 0 is the embeddings (patches, class token, position), block k is layer k + 1, norm and head are
    depth + 1. No weight decay on 1-D tensors, class token, position. Groups have `lr_scale` and `names`.
    """
    embeddings = [model.cls_token, model.pos_embed, *model.patch_embed.parameters()]
    end = [*model.norm.parameters(), *model.fc_norm.parameters(), *model.head.parameters()]
    layers = [embeddings, *[list(block.parameters()) for block in model.blocks], end]
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = []
    for i, layer in enumerate(layers):
        scale = decay ** (len(layers) - 1 - i)
        for decays in (False, True):    # matrices are 2-D and 4-D; class token and position 3-D
            params = [p for p in layer if (p.ndim in (2, 4)) == decays]
            groups.append({"params": params, "names": [names[p] for p in params], "lr": base_lr * scale,
                           "lr_scale": scale, "weight_decay": weight_decay * decays})
    return groups


class FeatureNorm(nn.BatchNorm1d):
    """BatchNorm of frozen features `(B, D)`; the batch is that of all ranks."""

    def forward(self, x):
        return super().forward(gather(x.to(self.running_mean.dtype)))[RANK::WORLD]    # float32, if --amp


def probe_head(dim, num_classes):
    """What a linear probe trains (MAE, Appendix A.1)."""
    linear = nn.Linear(dim, num_classes)
    nn.init.normal_(linear.weight, std=0.01)
    nn.init.zeros_(linear.bias)
    return nn.Sequential(FeatureNorm(dim, eps=1e-6, affine=False), linear)


def nearest_neighbors(gallery, labels, queries, num_classes, k=20, temperature=0.07):
    """The five classes with most votes of k neighbors, best first, `(n, min(5, C))` (Wu et al., 2018).

    A neighbor at cosine similarity s has exp(s / temperature) votes. gallery `(m, D)`, queries `(n, D)`.
    """
    gallery, ranking = nn.functional.normalize(gallery, dim=1), []
    for part in nn.functional.normalize(queries, dim=1).split(256):
        similarity, index = (part @ gallery.T).topk(min(k, len(gallery)))    # (256, k)
        votes = part.new_zeros(len(part), num_classes)                       # (256, C)
        votes.scatter_add_(1, labels[index], (similarity / temperature).exp())
        ranking.append(votes.topk(min(5, num_classes)).indices)
    return torch.cat(ranking)


FILL = {"interpolation": v2.InterpolationMode.BILINEAR, "fill": [124, 116, 104]}    # the mean color
warp = functools.partial(TF.affine, angle=0.0, scale=1.0, center=[0, 0], **FILL)
OPERATIONS = {  # of a uint8 image (3, H, W); strength m from 0 to 1; s is m or -m
    "autocontrast": lambda x, m, s: TF.autocontrast(x),
    "equalize": lambda x, m, s: TF.equalize(x),
    "invert": lambda x, m, s: TF.invert(x),
    "rotate": lambda x, m, s: TF.rotate(x, 30 * s, **FILL),
    "posterize": lambda x, m, s: TF.posterize(x, 4 - int(4 * m)),    # 0 bits: black
    "solarize": lambda x, m, s: TF.solarize(x, min(255, 256 - int(256 * m))),
    "solarize_add": lambda x, m, s: torch.where(x < 128, x + int(110 * m), x),
    "color": lambda x, m, s: TF.adjust_saturation(x, 1 + 0.9 * s),
    "contrast": lambda x, m, s: TF.adjust_contrast(x, 1 + 0.9 * s),
    "brightness": lambda x, m, s: TF.adjust_brightness(x, 1 + 0.9 * s),
    "sharpness": lambda x, m, s: TF.adjust_sharpness(x, 1 + 0.9 * s),
    "shear_x": lambda x, m, s: warp(x, translate=[0, 0], shear=[math.degrees(math.atan(0.3 * s)), 0.0]),
    "shear_y": lambda x, m, s: warp(x, translate=[0, 0], shear=[0.0, math.degrees(math.atan(0.3 * s))]),
    "translate_x": lambda x, m, s: warp(x, translate=[0.45 * s * x.shape[2], 0], shear=[0.0, 0.0]),
    "translate_y": lambda x, m, s: warp(x, translate=[0, 0.45 * s * x.shape[1]], shear=[0.0, 0.0]),
}


class RandAugment(nn.Module):
    """timm's: two operations, each applied with probability 0.5; strength: normal, std 0.5, 0 (off) to 10."""

    def __init__(self, strength):
        super().__init__()
        self.strength = strength

    def forward(self, image):
        names = list(OPERATIONS)
        for i in torch.randint(len(names), (2,)).tolist():
            applied, negative = (torch.rand(2) < 0.5).tolist()
            m = (self.strength + 0.5 * torch.randn(())).clamp(0, 10).item() / 10
            if applied and self.strength > 0:
                image = OPERATIONS[names[i]](image, m, -m if negative else m)
        return image


def mix(images, labels, mixup, cutmix, num_classes):
    """Mixup or cutmix at random (alpha 0: off), one lambda per 128 images: images, targets `(B, C)`."""
    pairs = [(v2.MixUp, mixup), (v2.CutMix, cutmix)]
    mixers = [mixer(alpha=alpha, num_classes=num_classes) for mixer, alpha in pairs if alpha]
    chunks = map(v2.RandomChoice(mixers), images.split(128), labels.split(128))
    return [torch.cat(parts) for parts in zip(*chunks)]


# ------------------------------------------------------------ training

SETTINGS = {  # argument: toy, small (32 px), photos, or all; meaning; minimum, maximum or choices
    "mode": ("finetune", "what to do", "finetune", "linear", "knn"),
    "recipe": ("improved", "of finetune: the paper's, DeiT's", "improved", "original", "transfer"),
    "init": (None, "start from the weights of this checkpoint"),
    "keep_blocks": (100, "keep the lower blocks of --init (Fig. 2)", 0, 100),
    "arch": (("toy", "tiny", "tiny"), "of vit.py; default: of --init", *vit.ARCHS),
    "img_size": ((32, 32, 224), "side of the images; default: of --init", 1, 10 ** 5),
    "patch_size": ((4, 4, 16), "side of a patch; default: of --init", 1, 10 ** 5),
    "num_heads": (None, "default: 12; DeiT-Tiny has 3, DeiT-Small 6", 1, 1000),
    "global_pool": ("avg", "mean of the patches, or class token", "avg", "token"),
    "fraction": ((0.04, 1.0, 1.0), "train on this share of each class", 1e-9, 1),
    "epochs": ((20, 100, 300), "passes over the images", 1, 10 ** 6),
    "warmup_epochs": ((2.0, 5.0, 5.0), "epochs in which the learning rate rises", 0, 10 ** 6),
    "batch_size": ((64, 512, 1024), "images in an update, over ranks and --accum", 1, 10 ** 6),
    "optimizer": ("adamw", "SGD's momentum is 0.9", "adamw", "sgd", "nesterov"),
    "base_lr": ((8e-3, 1e-3, 1e-3), "learning rate per 256 images of the batch", 0, 1e12),
    "min_lr": (1e-6, "learning rate at the end", 0, 1e12),
    "weight_decay": (0.05, "not on 1-D tensors, class token, position", 0, 1),
    "layer_decay": ((0.75, 0.85, 0.85), "lr of a layer, relative to the next", 1e-3, 1),
    "drop_path": (0.0, "stochastic depth, last block", 0, 0.99),
    "min_crop": ((0.5, 0.2, 0.08), "smallest crop, as a share of the image's area", 0, 1),
    "randaug": ((0.0, 10.0, 10.0), "strength of RandAugment, 0: off", 0, 10),
    "mixup": ((0.0, 0.2, 0.2), "alpha of mixup, 0: off", 0, 100),
    "cutmix": (0.0, "alpha of cutmix, 0: off", 0, 100),
    "erasing": (0.0, "probability of random erasing", 0, 1),
    "smoothing": (0.0, "label smoothing", 0, 1),
    "eval_every": ((10, 5, 1), "epochs between evaluations", 1, 10 ** 6),
    "eval_only": (False, "evaluate --init, a classifier"),
    "real_labels": (None, "ImageNet-ReaL's real.json: also count these labels"),
}
RECIPES = {"improved": {},    # SETTINGS; what the others change, in each column or in all
    "original": {"base_lr": (2e-3, 2.5e-4, 2.5e-4), "min_lr": 1e-5, "layer_decay": 1.0, "drop_path": 0.1,
                 "global_pool": "token", "randaug": (0.0, 9.0, 9.0), "mixup": 0.8, "cutmix": 1.0,
                 "erasing": 0.25, "smoothing": 0.1},
    "transfer": {"preset": "photos", "epochs": 50, "warmup_epochs": 10.0, "batch_size": 512, "base_lr": 0.05,
                 "optimizer": "nesterov", "weight_decay": 0.0, "layer_decay": 0.75, "clip_grad": 1.0,
                 "randaug": 0.0, "mixup": 0.0},
    "linear": {"epochs": (10, 90, 90), "warmup_epochs": (1.0, 10.0, 10.0), "batch_size": (256, 512, 1024),
               "optimizer": "sgd", "base_lr": (0.1, 0.1, 0.75), "min_lr": 0.0, "weight_decay": 0.0,
               "layer_decay": 1.0, "global_pool": None, "fraction": 1.0, "randaug": 0.0, "mixup": 0.0}}


def make_sample(data, transform, i):
    """Image i, transformed, and its label."""
    image, label = data[i]
    return transform(image), label


def train(args):
    device, stop = setup(args)
    model, data, validation = prepare(args, device)
    if args.eval_only or args.mode == "knn":    # signals end it
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        return evaluate(args, model, data, validation, device)

    # Data: an endless stream. All that is random about sample number v follows from (seed, v).
    erase = [v2.ToDtype(torch.float32), v2.Normalize(MEAN.flatten().tolist(), STD.flatten().tolist()),
             v2.RandomErasing(args.erasing, (0.02, 1 / 3), (0.3, 1 / 0.3), value="random")]
    transform = v2.Compose([
        v2.RandomResizedCrop(args.img_size, (args.min_crop, 1), interpolation=v2.InterpolationMode.BICUBIC),
        v2.RandomHorizontalFlip(),
        RandAugment(args.randaug),
        *(erase if args.erasing else []),    # float32: four times the bytes
    ])
    stream = Stream(len(data), args.seed, functools.partial(make_sample, data, transform))
    mean, std = (0, 1) if args.erasing else (MEAN.to(device), STD.to(device))
    steps = max(1, round(args.epochs * len(data) / args.batch_size))
    warmup = min(steps - 1, round(args.warmup_epochs * len(data) / args.batch_size))
    epochs = [*range(args.eval_every, args.epochs, args.eval_every), args.epochs]
    tests = {max(1, round(epoch * len(data) / args.batch_size)) for epoch in epochs}

    # Optimizer: new or from the checkpoint of an interrupted run.
    base_lr = args.base_lr * args.batch_size / 256
    groups = layer_decay_groups(model, base_lr, args.weight_decay, args.layer_decay)
    sgd = functools.partial(torch.optim.SGD, momentum=0.9, nesterov=args.optimizer == "nesterov")
    make_optimizer = torch.optim.AdamW if args.optimizer == "adamw" else sgd
    optimizer = make_optimizer(groups, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
    step = start(args, data, model=model, optimizer=optimizer, scaler=scaler)    # from last.pt; 0: a new run
    if args.compile:
        model.compile(dynamic=False)
    network = nn.parallel.DistributedDataParallel(model) if WORLD > 1 else model
    half = torch.float16 if args.amp == "fp16" else torch.bfloat16
    autocast = torch.autocast(device.type, half, enabled=args.amp != "off")
    end = min(steps, step + (args.max_steps or steps))
    batches = load(stream, step, end, args)
    if step in tests:    # perhaps killed between last.pt and evaluation
        evaluate(args, model, data, validation, device, step)
    log, last_save = Log(args, step, steps), time.time()
    while step < end:
        lr = learning_rate(step, steps, warmup, base_lr, args.min_lr)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        loss = 0
        for part in range(args.accum):
            images, targets = log.next(batches)
            images = (images.to(device, non_blocking=True) - mean) / std   # (B, 3, S, S)
            targets = targets.to(device, non_blocking=True)                # (B,); mixed (B, C)
            seed = np.random.SeedSequence((args.seed, step, RANK, part))   # of mixing, stochastic depth
            torch.manual_seed(int(seed.generate_state(1)[0]))
            if args.mixup or args.cutmix:
                images, targets = mix(images, targets, args.mixup, args.cutmix, len(data.classes))
            network.require_backward_grad_sync = part == args.accum - 1    # synchronized on the last part
            with autocast:
                logits = network(images)                                   # (B, C)
            part_loss = nn.functional.cross_entropy(logits.float(), targets, label_smoothing=args.smoothing)
            scaler.scale(part_loss / args.accum).backward()
            loss += part_loss.detach() / args.accum
        scaler.unscale_(optimizer)
        grad_norm = nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad or math.inf)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        step += 1
        log.window.append({"loss": loss, "grad_norm": grad_norm})
        due = step == end or step in tests
        if not (step % args.log_every == 0 or due or (stop and WORLD == 1)):
            continue
        # Only here does the program wait for the device: it reads the losses, and ranks agree to stop.
        stopping = log.write(step, stop, epoch=step * args.batch_size / len(data), lr=lr)
        if RANK == 0 and (due or stopping or time.time() - last_save > 60 * args.save_minutes):
            save(args, "last.pt", step, model=model, optimizer=optimizer, scaler=scaler)
            last_save = time.time()
        if stopping:
            break
        if step in tests:
            evaluate(args, model, data, validation, device, step)
            log.since = time.time()
    print(f"{'done' if step == steps else 'stopped, --resume continues'}: step {step} of {steps}")


def prepare(args, device):
    """The network with its mode's head, training and validation images. UserError."""
    torch.manual_seed(args.seed)
    names = ("img_size", "patch_size", "num_heads", "global_pool", "drop_path")
    sizes = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    sizes |= vit.ARCHS[args.arch].keywords if args.arch else {}
    if args.init:    # gives the sizes that were not typed
        weights = vit.read_weights(args.out / "last.pt" if args.resume else args.init)    # may be gone
        model, report = vit.from_weights(weights, num_classes=0, in_chans=3, **sizes)
        args.mode = weights.config.get("mode", "finetune") if args.eval_only else args.mode
    else:
        model = vit.VisionTransformer(**sizes)
        vit.init_weights(model, "truncated")
    args.img_size = model.grid * model.patch_size
    args.num_heads = model.blocks[0].attn.num_heads    # for config.json: the weights do not tell
    for module in model.blocks[args.keep_blocks:].modules():
        if isinstance(module, nn.LayerNorm):
            module.reset_parameters()
    vit.init_weights(model.blocks[args.keep_blocks:], "truncated")
    data, validation = open_split(args, train=not args.eval_only), open_split(args, train=False)
    other = sorted(set(data.classes) ^ set(validation.classes))
    if not args.eval_only and (other or validation.split == "training" or data.classes == [""]):
        raise UserError(f"--data {args.data}: train/ and val/ need the same folders {' '.join(other[:5])}")
    if args.mode == "linear":
        model.head = probe_head(model.embed_dim, len(data.classes))
    elif args.mode != "knn":
        model.head = nn.Linear(model.embed_dim, len(data.classes))
        nn.init.trunc_normal_(model.head.weight, std=2e-5 if args.init else 0.02)    # as MAE, DeiT
        nn.init.zeros_(model.head.bias)
    if args.eval_only:
        report = vit.load_weights(model, weights)
        if "head" in str(report.missing):
            raise UserError(f"--init {args.init}: no head for the {len(data.classes)} classes of --data")
    model.requires_grad_(args.mode == "finetune")    # the position too
    model.head.requires_grad_(True)
    feature = "mean of the patches" if model.global_pool == "avg" else "class token"
    print(f"{weights.name}: {report}" if args.init else "from scratch")
    print(f"{args.img_size} px, {args.num_heads} heads; feature: {feature}, normalized; head: {model.head}")
    return model.to(device), data, validation


def gather(x):
    """The rows `(n, ...)` of each rank as `(n * WORLD, ...)` on all: rank r has rows r, r + WORLD, ..."""
    rows = x.new_zeros(len(x) * WORLD, *x.shape[1:])
    rows[RANK::WORLD] = x
    if WORLD > 1:
        dist.all_reduce(rows)
    return rows


@torch.no_grad()
def predict(args, model, data, device):
    """The output for each image, `(n, C)`, in float32, and the labels `(n,)`, on all ranks."""
    crop = functools.partial(center_crop, size=args.img_size)
    stream = Stream(len(data), args.seed, functools.partial(make_sample, data, crop))
    stream.epoch, stream.order = 0, range(len(data))    # not shuffled
    plan = argparse.Namespace(data=args.data, workers=args.workers, batch_size=128 * WORLD, accum=1)
    parts = []
    for images, labels in load(stream, 0, math.ceil(len(data) / plan.batch_size), plan):
        outputs = model.forward((images.to(device) - MEAN.to(device)) / STD.to(device))    # not compiled
        parts.append((outputs, labels.to(device)))
    return [gather(torch.cat(part))[:len(data)] for part in zip(*parts)]


def evaluate(args, model, data, validation, device, step=None):
    """Accuracy, with --mode knn by votes of the training images; best.pt: best by the log."""
    model.eval()
    outputs, labels = predict(args, model, validation, device)
    ranking = outputs.topk(min(5, outputs.shape[1])).indices
    if args.mode == "knn":
        gallery, targets = predict(args, model, data, device)
        ranking = nearest_neighbors(gallery, targets, outputs, len(data.classes))
    model.train()
    hits = 100 * (ranking == labels[:, None]).double()    # (n, 5)
    result = {"top1": hits[:, 0].mean().item(), "top5": hits.sum(dim=1).mean().item()}
    if args.real_labels:    # the classes that each image may have, in the order of the file names
        real = json.loads(Path(args.real_labels).read_text())
        order = np.argsort([os.path.basename(file) for file, _ in getattr(validation, "samples", [])])
        if len(real) != len(order):
            raise UserError(f"--real-labels: {len(real)} images, --data has {len(order)} files")
        pairs = zip(ranking[order, 0].tolist(), real)
        result["real"] = 100 * np.mean([best in accepted for best, accepted in pairs if accepted])
    print(f"{len(validation):,} {validation.split} images: {result}", flush=True)
    if RANK > 0:
        return
    args.out.mkdir(parents=True, exist_ok=True)
    if args.mode == "knn":
        draw_neighbors(args, data, validation, gallery, outputs)
    if step is None:
        path = args.out / ("knn.json" if args.mode == "knn" else "eval.json")
        return path.write_text(json.dumps({**result, **vars(args)}, indent=1, default=str))
    with (args.out / "log.jsonl").open("r+") as file:
        best = max(json.loads(line).get("top1", -1) for line in file)
        file.write(json.dumps({"step": step, "epoch": step * args.batch_size / len(data), **result}) + "\n")
    if result["top1"] > best:
        save(args, "best.pt", step, model=model)


def draw_neighbors(args, data, validation, gallery, queries):
    """neighbors.png: validation images and the nearest training images of each; green: same class."""
    figure = Figure((10, 11), layout="tight")
    axes = figure.subplots(8, 9, subplot_kw={"xticks": [], "yticks": []})
    for row, i in zip(axes, range(0, len(validation), math.ceil(len(validation) / 8))):
        nearest = nn.functional.cosine_similarity(queries[i, None], gallery).topk(min(8, len(data))).indices
        for axis, (image, label) in zip(row, [validation[i], *[data[j] for j in nearest.tolist()]]):
            axis.imshow(center_crop(image, args.img_size).permute(1, 2, 0).numpy())
            axis.set_title(data.classes[label], fontsize=7)
            axis.spines[:].set(color="green" if label == validation[i][1] else "red", linewidth=3)
    figure.suptitle(f"{args.init or 'from scratch'}: validation image, nearest training images")
    figure.savefig(args.out / "neighbors.png")


TRANSFER = {"flowers102": ("Flowers102", "train", "val"), "pets": ("OxfordIIITPet", "trainval"),
            "aircraft": ("FGVCAircraft", "trainval")}    # torchvision's class, its splits for training


def open_split(args, train):
    """`open_data`, or a transfer set. UserError."""
    if args.data not in TRANSFER:
        return open_data(args, train)
    name, *splits = TRANSFER[args.data]
    split = functools.partial(getattr(torchvision.datasets, name), args.root, transform=to_tensor)
    try:
        parts = [split(p, download=args.download and WORLD == 1) for p in (splits if train else ["test"])]
    except (ImportError, RuntimeError) as error:
        raise UserError(f"--data {args.data}: {error} (--download; pip install scipy)") from None
    data = ConcatDataset(parts)
    if train and (args.fraction < 1 or args.long_tail):    # the only use of labels; decodes each image
        data = Subset(data, subset(np.array([label for _, label in data]), args))
    data.classes = getattr(parts[0], "classes", range(102))    # flowers, older torchvision
    data.split = "training" if train else "validation"
    return data


def main(argv=None):
    table = {**COMMON, **SETTINGS, **TRAINING}
    args = parse(argv, table, "runs/finetune")    # says the recipe, which says the defaults
    evaluates = args.eval_only or args.mode == "knn"
    changes = dict(RECIPES["linear" if evaluates or args.mode == "linear" else args.recipe])
    changes |= {"arch": None, "img_size": None, "patch_size": None} if args.init else {"layer_decay": 1.0}
    table |= {name: (value, *table[name][1:]) for name, value in changes.items()}
    args = parse(argv, table, Path(args.init).parent if evaluates and args.init else f"runs/{args.mode}")
    if args.eval_only and not args.init:
        raise UserError("--eval-only needs --init CHECKPOINT")
    if args.mode == "linear" and args.accum > 1:
        raise UserError("--accum: the probe's BatchNorm sees the whole batch; it needs little memory anyway")
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
