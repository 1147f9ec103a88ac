"""Fine-tuning: what is a pre-trained Vision Transformer worth?

Fine-tuning trains all of it to classify images, a linear probe only a layer on its features, and
k-NN nothing: the most similar training images vote.
Recipes: A Closer Look at Self-Supervised Lightweight Vision Transformers (ICML 2023), its code.

    python finetune.py --init runs/mae/last.pt                # a laptop; no --init: from scratch
    python finetune.py --mode linear --init runs/mae/last.pt  # or --mode knn
    python finetune.py --data DIR --init mae.pth --compile    # DIR/train/CLASS/*.jpg, DIR/val/...
    torchrun --nproc_per_node=8 finetune.py --data DIR --init mae.pth
    python finetune.py --recipe transfer --data cifar100 --download --init mae.pth
    python finetune.py --eval-only --init runs/finetune/best.pt

Each run needs its own --out: config.json, log.jsonl, last.pt, best.pt; --resume continues it.
k-NN: knn.json; test: eval.json. Shapes: B images, C classes, D width, S image size.
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
from PIL import Image
from torch import distributed as dist, nn
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.transforms import v2
from tqdm import tqdm

import vit


# ---------- the method

def layer_decay_groups(model, base_lr, weight_decay, decay):
    """Optimizer groups; layer i learns at `lr_scale = decay^(depth + 1 - i)` of `base_lr` (BEiT).

    Layer 0 is patches, class token and position, block k is layer k + 1, norm and head are last.
    No weight decay on 1-D tensors, class token, position. Groups have `lr_scale` and `names`.
    """
    embeddings = [model.cls_token, model.pos_embed, *model.patch_embed.parameters()]
    end = [*model.norm.parameters(), *model.fc_norm.parameters(), *model.head.parameters()]
    layers = [embeddings, *[list(block.parameters()) for block in model.blocks], end]
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = []
    for i, layer in enumerate(layers):
        scale = decay ** (len(layers) - 1 - i)
        matrices = [p for p in layer if p.ndim in (2, 4)]  # 4-D: the patch embedding
        others = [p for p in layer if p.ndim not in (2, 4)]  # 3-D: class token, position
        for params, group_decay in ((others, 0.0), (matrices, weight_decay)):
            groups.append({"params": params, "names": [names[p] for p in params],
                           "lr": base_lr * scale, "lr_scale": scale, "weight_decay": group_decay})
    return groups


def nearest_neighbors(gallery, labels, queries, num_classes, k=20, temperature=0.07):
    """The five classes with most votes of k neighbors, best first, `(n, min(5, C))`.

    A neighbor at cosine similarity s has exp(s / temperature) votes (Wu et al., 2018). gallery
    `(m, D)`, queries `(n, D)`. If m < k, all vote.
    """
    gallery = nn.functional.normalize(gallery, dim=1)
    ranking = []
    for part in nn.functional.normalize(queries, dim=1).split(256):
        similarity, index = (part @ gallery.T).topk(min(k, len(gallery)))  # (256, k)
        votes = part.new_zeros(len(part), num_classes)  # (256, C)
        votes.scatter_add_(1, labels[index], (similarity / temperature).exp())
        ranking.append(votes.topk(min(5, num_classes)).indices)
    return torch.cat(ranking)


def new_head(dim, num_classes, probe):
    """A classifier of features `(B, D)`; a linear probe's normalizes them (MAE, Appendix A.1)."""
    linear = nn.Linear(dim, num_classes)
    nn.init.zeros_(linear.bias)
    if probe:
        nn.init.normal_(linear.weight, std=0.01)
        return nn.Sequential(nn.BatchNorm1d(dim, eps=1e-6, affine=False), linear)
    nn.init.trunc_normal_(linear.weight, std=0.02)
    return linear


def mix(images, labels, mixup, cutmix, num_classes):
    """Mixup or cutmix at random (alpha 0: off), one lambda per 128 images; targets `(B, C)`."""
    mixers = []
    if mixup:
        mixers.append(v2.MixUp(alpha=mixup, num_classes=num_classes))
    if cutmix:
        mixers.append(v2.CutMix(alpha=cutmix, num_classes=num_classes))
    mixer = v2.RandomChoice(mixers)
    mixed = [mixer(*pair) for pair in zip(images.split(128), labels.split(128))]
    return [torch.cat(parts) for parts in zip(*mixed)]


def settings(parser):
    add = parser.add_argument
    add("--recipe", "--mode", default="improved", choices=RECIPES, help="linear: probe; eval: test")
    add("--eval-only", dest="recipe", action="store_const", const="eval", help="test --init")
    add("--init", help="start from the weights in this file")
    add("--keep-blocks", type=int, choices=range(25), metavar="N", help="lower blocks kept, Fig. 2")
    add("--arch", default="tiny", choices=vit.ARCHS, help="network of vit.py, only from scratch")
    add("--img-size", type=count, help="image side in pixels, else by --init or --preset")
    add("--patch-size", type=count, default=16, help="patch side in pixels, only from scratch")
    add("--num-heads", type=count, help="else by --init, or 12 (DeiT-Tiny has 3)")
    add("--global-pool", default="avg", choices=("avg", "token"), help="mean of patches, or token")
    add("--drop-path", type=share, default=0.0, help="stochastic depth, last block")
    add("--min-crop", type=share, default=0.08, help="smallest crop, share of the area")
    add("--randaug", type=int, default=10, choices=range(11), metavar="M", help="strength, 0: off")
    add("--mixup", type=amount, default=0.2, help="alpha, 0: off")
    add("--cutmix", type=amount, default=0.0, help="alpha, 0: off")
    add("--erasing", type=share, default=0.0, help="probability of random erasing")
    add("--smoothing", type=share, default=0.0, help="label smoothing")
    add("--epochs", type=count, default=300, help="passes over the images")
    add("--warmup-epochs", type=amount, default=5, help="epochs of rising learning rate")
    add("--batch-size", type=count, default=1024, help="images in an update")
    add("--optimizer", default="adamw", choices=("adamw", "sgd", "nesterov"), help="of torch")
    add("--base-lr", type=amount, default=1e-3, help="learning rate per 256 images")
    add("--min-lr", type=amount, default=1e-6, help="learning rate at the end")
    add("--weight-decay", type=amount, default=0.05, help="not on biases, norms, position")
    add("--layer-decay", type=share, default=0.85, help="learning rate relative to the next layer")
    add("--clip-grad", type=amount, help="largest norm of the gradient")
    add("--eval-every", type=count, default=1, help="epochs between evaluations")


PRESETS = {  # what differs from the defaults above
    "photos": {},
    "small": dict(patch_size=4, min_crop=0.2, epochs=100, batch_size=512, eval_every=5),
    "toy": dict(arch="toy", patch_size=4, fraction=0.04, min_crop=0.5, randaug=0, mixup=0.0,
                epochs=20, warmup_epochs=2, batch_size=64, base_lr=8e-3, layer_decay=0.75,
                eval_every=10)}
RECIPES = {  # what differs from the defaults and the preset; these win
    "improved": {},
    "original": dict(drop_path=0.1, randaug=9, mixup=0.8, cutmix=1.0, erasing=0.25, smoothing=0.1),
    "transfer": dict(preset="photos", patch_size=16, fraction=1.0, min_crop=0.08, randaug=0,
                     mixup=0.0, epochs=50, warmup_epochs=10, batch_size=512, optimizer="nesterov",
                     base_lr=0.05, weight_decay=0.0, layer_decay=0.75, clip_grad=1.0, eval_every=1),
    "linear": dict(global_pool=None, randaug=0, mixup=0.0, epochs=90, warmup_epochs=10,
                   optimizer="sgd", base_lr=0.75, min_lr=0.0, weight_decay=0.0),
    "knn": dict(global_pool=None, fraction=1.0),  # None: as in --init, or token
    "eval": dict(global_pool=None)}
IMG_SIZES = {"photos": 224, "small": 32, "toy": 32}  # from scratch, by --preset


class Samples(Dataset):
    """Sample v: a crop `(3, S, S)`, uint8 (with --erasing normalized float32), and its label."""

    def __init__(self, data, args, evaluation=False):
        self.data = data
        self.args = args
        self.evaluation = evaluation
        crop = v2.RandomResizedCrop(args.img_size, (args.min_crop, 1), interpolation=BICUBIC)
        steps = [crop, v2.RandomHorizontalFlip()]
        if args.randaug:  # strengths 0 to 10 are 0, 3, ..., 30 of torchvision's 31
            operation = v2.RandAugment(num_ops=1, magnitude=3 * args.randaug, fill=[124, 116, 104],
                                       interpolation=v2.InterpolationMode.BILINEAR)
            steps += 2 * [v2.RandomApply([operation], p=0.5)]
        if args.erasing:  # in place of normalized pixels, noise of mean 0 and variance 1
            normalize = v2.Normalize(vit.MEAN.flatten().tolist(), vit.STD.flatten().tolist())
            erase = v2.RandomErasing(args.erasing, (0.02, 1 / 3), (0.3, 1 / 0.3), value="random")
            steps += [v2.ToDtype(torch.float32), normalize, erase]
        self.transform = v2.Compose(steps)

    def __getitem__(self, v):
        if self.evaluation:
            image, label = self.data[v]
            return center_crop(image, self.args.img_size), label
        image, label = self.data[shuffled(v, len(self.data), self.args.seed)]
        return self.transform(image), label


def build(args, checkpoint):
    """The network of a checkpoint, without its head unless --eval-only; or one from scratch."""
    torch.manual_seed(args.seed)
    names = ("img_size", "num_heads", "global_pool", "drop_path")
    sizes = {name: vars(args)[name] for name in names if vars(args)[name]}  # None: the file's
    if args.recipe != "eval":
        sizes["num_classes"] = 0
    resumed = checkpoint.get("path") != args.init  # from --out
    if checkpoint:
        model, report = vit.from_weights(checkpoint, in_chans=3, **sizes)
        if args.recipe == "eval" and "head.1.weight" in checkpoint.get("model", {}):  # of a probe
            model.head = new_head(model.embed_dim, len(checkpoint["model"]["head.1.weight"]), True)
            report = vit.load_weights(model, checkpoint)
        if not resumed:
            print(f"{args.init}: {report}")
    else:
        sizes = {"img_size": IMG_SIZES[args.preset], "global_pool": "token", **sizes}
        model = vit.ARCHS[args.arch](patch_size=args.patch_size, **sizes)
        vit.init_weights(model, "truncated")
    if args.keep_blocks is not None and not resumed:
        if args.recipe == "eval" or args.keep_blocks > len(model.blocks):
            raise vit.InputError(f"--keep-blocks: up to {len(model.blocks)}; not with --eval-only")
        upper = model.blocks[args.keep_blocks:]
        vit.init_weights(upper, "truncated")
        for norm in [m for m in upper.modules() if isinstance(m, nn.LayerNorm)]:
            norm.reset_parameters()
        print(f"--keep-blocks: {len(upper)} upper blocks randomly initialized")
    args.img_size = model.grid * model.patch_size  # for the data and config.json
    args.patch_size = model.patch_size
    args.num_heads = model.blocks[0].attn.num_heads
    args.global_pool = model.global_pool
    print(f"{args.img_size} px, {args.num_heads} heads; feature: --global-pool {args.global_pool}")
    return model


def train(args, model):
    data, validation = open_splits(args)
    args.classes = list(data.classes)  # in checkpoints, for --eval-only
    probe = args.recipe == "linear"
    device = model.pos_embed.device
    mean, std = vit.MEAN.to(device), vit.STD.to(device)
    model.requires_grad_(not probe)  # the position, too
    model.head = new_head(model.embed_dim, len(data.classes), probe).to(device)
    if WORLD > 1 and device.type == "cuda":  # on CPUs each rank has a BatchNorm of its own
        model.head = nn.SyncBatchNorm.convert_sync_batchnorm(model.head)
    print(f"head: {model.head}")
    peak_lr = args.base_lr * args.batch_size / 256
    groups = layer_decay_groups(model, peak_lr, args.weight_decay, args.layer_decay)
    if args.optimizer == "adamw":
        optimizer = torch.optim.AdamW(groups, fused=True)
    else:  # fused SGD leaves its momentum uninitialized if fp16 skips the first step
        nesterov = args.optimizer == "nesterov"
        optimizer = torch.optim.SGD(groups, momentum=0.9, nesterov=nesterov, fused=False)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
    done = start(args, data, model=model, optimizer=optimizer, scaler=scaler)  # steps; 0 if new
    if args.compile:
        model.compile(dynamic=False)  # all batches have one size
    network = nn.parallel.DistributedDataParallel(model) if WORLD > 1 else model
    autocast = torch.autocast(device.type, AMP[args.amp], enabled=args.amp != "off")

    B = args.batch_size
    steps = max(1, round(args.epochs * len(data) / B))
    warmup = min(steps - 1, round(args.warmup_epochs * len(data) / B))
    end = min(steps, done + args.max_steps) if args.max_steps else steps
    evaluated_epochs = [*range(args.eval_every, args.epochs, args.eval_every), args.epochs]
    steps_to_evaluate = {max(1, round(epoch * len(data) / B)) for epoch in evaluated_epochs}
    log = Log(args, scaler)
    mine = range(done * B + RANK, end * B, WORLD)  # dealt to the ranks in turn
    batches = log.timed(DataLoader(
        Samples(data, args), B // (WORLD * args.accum), sampler=mine, num_workers=args.workers,
        pin_memory=torch.cuda.is_available()))
    last_save = time.time()
    for step in tqdm(range(done + 1, end + 1), initial=done, total=steps, disable=RANK > 0 or None):
        lr = learning_rate(step - 1, steps, warmup, peak_lr, args.min_lr)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        for part in range(args.accum):
            images, targets = next(batches)
            images = images.to(device, non_blocking=True)  # (B, 3, S, S)
            targets = targets.to(device, non_blocking=True)  # (B,); mixed (B, C)
            if not args.erasing:  # else Samples has done it
                images = (images - mean) / std
            seed = np.random.SeedSequence((args.seed, step - 1, RANK, part))
            torch.manual_seed(int(seed.generate_state(1)[0]))  # mixing, drop path: same if resumed
            if args.mixup or args.cutmix:
                images, targets = mix(images, targets, args.mixup, args.cutmix, len(data.classes))
            # Ranks synchronize gradients on the last micro-batch only.
            network.require_backward_grad_sync = part == args.accum - 1
            with autocast:
                logits = network(images).float()  # (B, C)
            loss = nn.functional.cross_entropy(logits, targets, label_smoothing=args.smoothing)
            scaler.scale(loss / args.accum).backward()
            log.add(loss=loss)
        scaler.unscale_(optimizer)
        grad_norm = nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad or math.inf)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        # Up to here nothing waited for the device. Reading the losses does.
        if step % args.log_every == 0 or step in steps_to_evaluate or step == end:
            log.write(step, epoch=step * B / len(data), lr=lr, grad_norm=grad_norm.item())
            if step in steps_to_evaluate:
                validate(args, model, validation, step)
            if RANK == 0 and (step == end or time.time() - last_save > 60 * args.save_minutes):
                save(args, "last.pt", step, model=model, optimizer=optimizer, scaler=scaler)
                last_save = time.time()
            log.clear()  # images_per_s is of training alone
    print(f"step {end} of {steps}: {args.out}")


@torch.no_grad()
def predict(args, model, data):
    """Outputs `(n, C)`, without a head features `(n, D)`, and labels `(n,)`; on all ranks."""
    device = model.pos_embed.device
    mean, std = vit.MEAN.to(device), vit.STD.to(device)
    mine = Subset(Samples(data, args, evaluation=True), range(RANK, len(data), WORLD))
    parts = []
    model.eval()
    for images, _ in DataLoader(mine, 128, num_workers=args.workers):
        parts.append(model.forward((images.to(device) - mean) / std))  # not compiled
    model.train()
    own = torch.cat(parts)
    outputs = own.new_zeros(len(data), own.shape[1])
    outputs[RANK::WORLD] = own
    if WORLD > 1:
        dist.all_reduce(outputs)
    return outputs, torch.as_tensor(data.targets, device=device)


def accuracy(ranking, labels):
    """Percentages of images whose class is the first, or any, of `ranking (n, up to 5)`."""
    hits = 100 * (ranking == labels[:, None]).double()
    return {"top1": hits[:, 0].mean().item(), "top5": hits.sum(dim=1).mean().item()}


def validate(args, model, validation, step):
    """Logs the accuracy after a step; best.pt is the best of the log."""
    outputs, labels = predict(args, model, validation)
    result = accuracy(outputs.topk(min(5, outputs.shape[1])).indices, labels)
    print(f"step {step}: {result}")
    if RANK == 0:
        lines = (args.out / "log.jsonl").read_text().splitlines()
        best = max(json.loads(line).get("top1", -1) for line in lines)
        entry = {"step": step, "epoch": step * args.batch_size / args.images, **result}
        with open(args.out / "log.jsonl", "a") as file:
            file.write(json.dumps(entry) + "\n")
        if result["top1"] > best:
            save(args, "best.pt", step, model=model)


def knn(args, model):
    """Accuracy of k-nearest-neighbor classification, with nothing trained."""
    data, validation = open_splits(args)
    gallery, targets = predict(args, model, data)
    queries, labels = predict(args, model, validation)
    return accuracy(nearest_neighbors(gallery, targets, queries, len(data.classes)), labels)


def evaluate(args, model, checkpoint):
    """Accuracy of the classifier in --init; only outputs for the classes of --data count."""
    if isinstance(model.head, nn.Identity):
        raise vit.InputError(f"--init {args.init}: no head, nothing to evaluate")
    validation = open_data(args, train=False)
    classes = validation.classes
    num_classes = len(list(model.head.parameters())[-1])  # its bias
    names = checkpoint.get("config", {}).get("classes", [])  # published files have none
    chosen = list(range(num_classes))  # outputs; a published file: the folders in order
    if set(classes) <= set(names):  # all, or a part (ImageNet-A, -R)
        chosen = [names.index(name) for name in classes]
    elif set(classes) <= set(map(str, chosen)):  # ImageNet-V2
        chosen = [int(name) for name in classes]
    elif names or len(classes) != num_classes:
        raise vit.InputError(f"--data: {len(classes)} classes, --init: {num_classes} with "
                             f"{len(names)} names, not {sorted(set(classes) - set(names))[:5]}")
    outputs, labels = predict(args, model, validation)
    return accuracy(outputs[:, chosen].topk(min(5, len(chosen))).indices, labels)


def main(argv=None):
    args = parse(argv, settings, PRESETS, out="runs/finetune", recipes=RECIPES)
    if args.recipe == "linear" and args.accum > 1:
        raise vit.InputError("--accum: not with linear, whose BatchNorm needs the whole batch")
    if args.recipe in ("eval", "knn") and args.resume:
        raise vit.InputError("--resume continues a training run; here give --init")
    device = setup(args)
    source = args.init or {}  # nothing: from scratch
    if args.resume and (args.out / "last.pt").exists():
        source = args.out / "last.pt"
    checkpoint = vit.open_checkpoint(source)
    model = build(args, checkpoint).to(device)
    if args.recipe == "eval":
        result = evaluate(args, model, checkpoint)
    elif args.recipe == "knn":
        result = knn(args, model)
    else:
        return train(args, model)
    print(result)
    if RANK == 0:
        args.out.mkdir(parents=True, exist_ok=True)
        text = json.dumps({**result, **vars(args)}, indent=1, default=str)
        (args.out / f"{args.recipe}.json").write_text(text)


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


def open_splits(args):
    """Training and validation images of the same classes, or InputError."""
    data = open_data(args, train=True)
    validation = open_data(args, train=False)
    root = Path(args.data)
    if isinstance(validation, Folder) and validation.root in (root, root / "train"):
        raise vit.InputError(f"--data {root}: needs train/ and val/ in it")
    other = sorted(set(data.classes) ^ set(validation.classes))
    if other or "" in data.classes:
        raise vit.InputError(f"--data {root}: needs train/CLASS, val/CLASS; only one: {other[:5]}")
    return data, validation


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
