"""Detection: a pre-trained ViT-Tiny as the backbone of Mask R-CNN (ViTDet, Li et al., 2022).

Blocks attend inside windows, four globally. The last map becomes a pyramid. The rest is
torchvision's, set as in ViTDet. COCO's average precision is computed by hand.

    python detect.py --init runs/mae/last.pt  # synthetic scenes: minutes
    torchrun --nproc_per_node=8 detect.py --data DIR --init mae_tiny.pth  # the authors' run
    python detect.py --data DIR --init runs/detect/last.pt --eval-only

DIR: annotations/instances_{train,val}2017.json, train2017/, val2017/, or Roboflow's train/, valid/.
Ranks sample their own anchors and boxes: N ranks and one give unequal runs.
Shapes: B images, D width, h heads, d = D / h, S image side; boxes are (x1, y1, x2, y2).
"""
import argparse
import atexit
import functools
import json
import math
import os
import re
import sys
import time
from operator import itemgetter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageOps
from torch import distributed as dist, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.models import convnext
from torchvision.models.detection import (
    MaskRCNN, anchor_utils, faster_rcnn, mask_rcnn, roi_heads, rpn, transform)
from torchvision.ops import MultiScaleRoIAlign, box_area, masks_to_boxes, poolers, roi_align
from torchvision.transforms import v2
from tqdm import tqdm

import vit

LayerNorm2d = functools.partial(convnext.LayerNorm2d, eps=1e-6)  # over C of (B, C, H, W)


# ---------- the method

class RelativeAttention(vit.Attention):
    """Attention in windows of `side x side` tokens that knows how far apart two are (MViTv2).

        scores[i, j] = q_i k_j / sqrt(d) + q_i R_h[row_i - row_j] + q_i R_w[column_i - column_j]

    The tables R, `(2 side - 1, d)`, are zero at first: pre-trained attention is unchanged.
    """

    def __init__(self, dim, num_heads, side):
        super().__init__(dim, num_heads)
        self.side = side
        self.rel_pos_h = nn.Parameter(torch.zeros(2 * side - 1, dim // num_heads))
        self.rel_pos_w = nn.Parameter(torch.zeros(2 * side - 1, dim // num_heads))
        i = torch.arange(side)
        self.register_buffer("apart", i[:, None] - i + side - 1, persistent=False)  # row of R
        place = F.one_hot(torch.cartesian_prod(i, i)).flatten(1)  # (N, 2 side)
        self.register_buffer("place", place, persistent=False)

    def heads(self, x):
        """q with its scores of rows and columns, k with its place one-hot: `q k` adds them up."""
        q, k, v = super().heads(x)
        grid = q.unflatten(2, (self.side, self.side))
        rows = torch.einsum("bhyxd,ykd->bhyxk", grid, self.rel_pos_h[self.apart])
        columns = torch.einsum("bhyxd,xkd->bhyxk", grid, self.rel_pos_w[self.apart])
        relative = torch.cat([rows, columns], dim=-1).flatten(2, 3)  # (B, h, N, 2 side)
        q = torch.cat([q * q.shape[-1] ** -0.5, relative], dim=-1)
        k = torch.cat([k, self.place.expand(*k.shape[:2], -1, -1)], dim=-1)
        pad = (0, -q.shape[-1] % 8)  # a GPU's fast attention needs multiples of 8
        q = F.pad(q, pad)
        return q * q.shape[-1] ** 0.5, F.pad(k, pad), v  # attention divides by this root

    def forward(self, x):
        """`(B, H * H, D) -> (B, H * H, D)`, a map row by row, its last windows padded with 0."""
        H = math.isqrt(x.shape[1])
        zeros = -H % self.side
        x = F.pad(x.unflatten(1, (H, H)), (0, 0, 0, zeros, 0, zeros))
        x = x.unflatten(2, (-1, self.side)).unflatten(1, (-1, self.side)).transpose(2, 3)
        tokens = super().forward(x.flatten(3, 4).flatten(0, 2))  # (windows, side * side, D)
        x = tokens.view(x.shape).transpose(2, 3)  # (B, rows, side, columns, side, D)
        return x.flatten(3, 4).flatten(1, 2)[:, :H, :H].flatten(1, 2)


class SimplePyramid(nn.Module):
    """A plain ViT's last map at 4, 2, 1, 1/2 and 1/4 times its size (ViTDet, Fig. 2).

    Blocks attend inside windows, the last of each quarter globally. Position is trained; class
    token and norm are unused. No map has a stride below 2 pixels.
    """

    def __init__(self, encoder, img_size, window=14, channels=256):
        super().__init__()
        self.encoder = encoder
        self.out_channels = channels
        encoder.norm = encoder.fc_norm = encoder.head = nn.Identity()
        encoder.cls_token.requires_grad_(False)
        encoder.pos_embed.requires_grad_(True)
        D = encoder.embed_dim
        depth = len(encoder.blocks)
        for i, block in enumerate(encoder.blocks, start=1):
            last = i in [depth * k // 4 for k in (1, 2, 3, 4)]  # of quarters
            side = img_size // encoder.patch_size if last else window
            attention = RelativeAttention(D, block.attn.num_heads, side)
            attention.load_state_dict(block.attn.state_dict(), strict=False)
            block.attn = attention
        double = functools.partial(nn.ConvTranspose2d, kernel_size=2, stride=2)
        four = [double(D, D // 2), LayerNorm2d(D // 2), nn.GELU(), double(D // 2, D // 4)]
        two = [double(D, D // 2)]
        resize = {4: (four, D // 4), 2: (two, D // 2), 1: ([], D), 0.5: ([nn.MaxPool2d(2)], D)}
        scales = [scale for scale in resize if encoder.patch_size / scale >= 2]
        self.strides = [int(encoder.patch_size / scale) for scale in (*scales, 0.25)]
        self.levels = nn.ModuleList()
        for layers, width in [resize[scale] for scale in scales]:
            self.levels.append(nn.Sequential(
                *layers, nn.Conv2d(width, channels, 1, bias=False), LayerNorm2d(channels),
                nn.Conv2d(channels, channels, 3, padding=1, bias=False), LayerNorm2d(channels)))

    def forward(self, images):
        """`(B, 3, S, S)` -> `{level: (B, channels, S / stride, S / stride)}`."""
        x = self.encoder.embed(images)  # (B, L, D)
        for block in self.encoder.blocks:
            x = block(x)
        H = math.isqrt(x.shape[1])
        x = x.transpose(1, 2).unflatten(2, (H, H))  # (B, D, H, H)
        maps = [level(x).float() for level in self.levels]  # anchors take their type
        maps.append(F.max_pool2d(maps[-1], 1, stride=2))
        return dict(enumerate(maps))


def detector(args, num_classes):
    """torchvision's Mask R-CNN with ViTDet's settings; class 0 is the background.

    Images `(3, H, W)`, 0 to 255, and targets give losses; in evaluation, images alone give boxes
    `(n, 4)`, labels and scores `(n,)`, masks `(n, 1, H, W)`.
    """
    # Replaces torchvision's, half a pixel off, which it looks up by name.
    poolers.roi_align = functools.partial(roi_align, aligned=True)
    roi_heads.project_masks_on_boxes = mask_targets
    transform.paste_masks_in_image = paste_masks
    encoder = vit.ARCHS[args.arch](args.pretrain_size, args.patch_size, num_heads=args.num_heads)
    C = args.channels
    S = args.img_size
    backbone = SimplePyramid(encoder, S, args.window, C)
    maps = range(len(backbone.levels))
    anchors = anchor_utils.AnchorGenerator([8 * s for s in backbone.strides], [0.5, 1, 2])
    height = torch.tensor([0.5, 1, 2]).sqrt()  # unrounded; area 1
    corner = torch.stack([1 / height, height], dim=1) / 2
    anchors.cell_anchors = [8 * s * torch.cat([-corner, corner], dim=1) for s in backbone.strides]
    model = MaskRCNN(
        backbone, image_mean=vit.MEAN.flatten(), image_std=vit.STD.flatten(),
        min_size=S, max_size=S, size_divisible=S,  # longest side; padded to a square
        rpn_anchor_generator=anchors, rpn_head=rpn.RPNHead(C, 3, conv_depth=2),
        rpn_pre_nms_top_n_train=2 * args.proposals, rpn_post_nms_top_n_train=args.proposals,
        rpn_pre_nms_top_n_test=args.proposals, rpn_post_nms_top_n_test=args.proposals,
        rpn_batch_size_per_image=args.anchors, box_batch_size_per_image=args.boxes,  # in the loss
        box_roi_pool=MultiScaleRoIAlign(maps, 7, 0), mask_roi_pool=MultiScaleRoIAlign(maps, 14, 0),
        box_head=faster_rcnn.FastRCNNConvFCHead((C, 7, 7), [C] * 4, [args.features], LayerNorm2d),
        box_predictor=faster_rcnn.FastRCNNPredictor(args.features, num_classes + 1),
        mask_head=mask_rcnn.MaskRCNNHeads(C, [C] * 4, 1, LayerNorm2d),
        mask_predictor=mask_rcnn.MaskRCNNPredictor(C, C, num_classes + 1))
    keep_boxes_in_float32(model)
    scale_by_the_square(model, S)
    return model


def keep_boxes_in_float32(model):
    """Offsets become boxes in float32: bf16 rounds 600 pixels to a multiple of 4."""
    for part in (model.rpn.head.cls_logits, model.rpn.head.bbox_pred,
                 *model.roi_heads.box_predictor.children(), model.roi_heads.mask_predictor):
        part.register_forward_hook(lambda module, inputs, output: output.float())


def scale_by_the_square(model, S):
    """Maps cover the padded square; torchvision would divide by the first images' sizes."""
    maps = {k: torch.zeros(1, 1, S // s, S // s) for k, s in enumerate(model.backbone.strides)}
    for pool in (model.roi_heads.box_roi_pool, model.roi_heads.mask_roi_pool):
        pool(maps, [torch.zeros(0, 4)], [(S, S)])  # it keeps its first scales


def mask_targets(masks, boxes, matched, size):
    """`masks[matched]` inside their boxes `(n, 4)`, resized to `(n, size, size)`, 0 or 1."""
    rois = torch.cat([matched[:, None], boxes], dim=1)
    return (roi_align(masks[:, None].float(), rois, size, aligned=True)[:, 0] >= 0.5).float()


def paste_masks(masks, boxes, size):
    """Each mask `(1, M, M)` of a box, sampled at the pixels of an image: `(n, 1, H, W)`."""
    corner = boxes[:, [0, 1, 0, 1]]
    sides = boxes[:, [2, 3, 2, 3]] - corner
    frame = boxes.new_tensor([0, 0, size[1], size[0]])
    rois = (frame - corner) / sides * masks.shape[-1] + 1  # in cells of a padded mask
    masks = F.pad(masks, (1, 1, 1, 1))
    return roi_align(masks, rois.split(1), size, sampling_ratio=1, aligned=True)


# ---------- average precision
# A detection hits an object if they overlap by a threshold. Detections, best first, add points
# (recall, precision). AP is the area under this curve, a mean over ten thresholds and all classes.
THRESHOLDS = np.linspace(0.5, 0.95, 10)
AREAS = [(0, 1e10), (0, 1024), (1024, 9216), (9216, 1e10)]  # all, small, medium, large: pixels


def compare(output, truth):
    """What AP needs of an image: `{("box" or "mask", class): (detections, objects)}`."""
    order = output["scores"].argsort(descending=True, stable=True)
    objects = torch.column_stack([truth["area"], truth["crowd"]])
    boxes, true_boxes = output["boxes"].double(), truth["boxes"].double()
    low = torch.maximum(boxes[:, None, :2], true_boxes[:, :2])
    high = torch.minimum(boxes[:, None, 2:], true_boxes[:, 2:])
    masks, true_masks = [each["masks"].flatten(1).float() for each in (output, truth)]
    sizes = {  # of intersections `(n, m)`, detections `(n,)`, objects `(m,)`
        "box": ((high - low).clamp(min=0).prod(dim=2), box_area(boxes), box_area(true_boxes)),
        "mask": ((masks @ true_masks.T).double(), masks.sum(dim=1), true_masks.sum(dim=1))}
    record = {}
    for kind, (shared, area, true_area) in sizes.items():
        union = area[:, None] + true_area - shared
        union = torch.where(truth["crowd"], area[:, None], union)  # a crowd: the detection itself
        overlaps = shared / union.clamp(min=1e-9)
        for c in {*output["labels"].tolist(), *truth["labels"].tolist()}:
            found = order[output["labels"][order] == c][:100]
            true = truth["labels"] == c
            detections = [output["scores"][found], area[found], overlaps[found][:, true]]
            record[kind, c] = torch.column_stack(detections).tolist(), objects[true].tolist()
    return record


def class_precision(images, low, high, threshold):
    """AP of one class at one threshold. Crowds and objects of other areas do not count."""
    ranked = []  # (score, is a hit)
    total = 0
    for detections, objects in images:  # score, area, overlap with each object; area, crowd
        counted = [low <= area <= high and not crowd for area, crowd in objects]
        total += sum(counted)
        free = [True] * len(objects)
        for score, area, *overlaps in detections:  # best first
            fits = [(counted[j], overlap, j) for j, overlap in enumerate(overlaps)
                    if overlap >= threshold and free[j]]
            valid = low <= area <= high
            if fits:
                valid, _, best = max(fits)  # objects that count first; of equal overlaps the last
                free[best] = objects[best][1]  # a crowd is hit many times
            if valid:
                ranked.append((score, len(fits) > 0))
    if total == 0:
        return math.nan
    ranked.sort(key=itemgetter(0), reverse=True)
    hits = np.cumsum([hit for _, hit in ranked])
    precision = hits / np.arange(1, len(hits) + 1)
    precision = np.maximum.accumulate(precision[::-1])[::-1]  # the best at this recall or higher
    at = np.searchsorted(hits / total, np.linspace(0, 1, 101))  # recalls
    return np.append(precision, 0)[at].mean()  # 0: a recall that is not reached


def average_precision(records, num_classes, kind):
    """COCO's numbers, in percent, of `compare` for each image by id; equals pycocotools to 1e-9."""
    table = np.empty((num_classes, len(AREAS), len(THRESHOLDS)))
    for c in range(num_classes):
        images = [record[kind, c + 1] for record in records if (kind, c + 1) in record]
        for a, t in np.ndindex(table.shape[1:]):
            table[c, a, t] = class_precision(images, *AREAS[a], THRESHOLDS[t])
    parts = {"AP": table[:, 0], "AP50": table[:, 0, 0], "AP75": table[:, 0, 5],
             "APs": table[:, 1], "APm": table[:, 2], "APl": table[:, 3]}
    return {name: 100 * float(np.nanmean(part)) for name, part in parts.items()
            if not np.isnan(part).all()}


def parse_detection(argv):
    """What is typed; else what the run to resume had; else the preset's; else the default."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        usage=argparse.SUPPRESS, allow_abbrev=False, add_help=False)
    add = parser.add_argument
    add("--data", default="toy", help="folder as of COCO or Roboflow, or toy")
    add("--preset", choices=PRESETS, help="sizes and recipe, else by --data")
    add("--arch", default="tiny", choices=vit.ARCHS, help="network of vit.py")
    add("--img-size", type=count, default=640, help="longest side")
    add("--patch-size", type=int, default=16, choices=[4, 8, 16, 32], help="in pixels")
    add("--window", type=count, default=14, help="in patches")
    add("--num-heads", type=count, default=12, help="of the encoder; DeiT-Tiny has 3")
    add("--pretrain-size", type=count, default=224, help="--img-size of pre-training")
    sizes = dict(channels=256, features=1024, proposals=1000, anchors=256, boxes=512)
    for name, size in sizes.items():
        add(f"--{name}", type=count, default=size, help="see detector")
    add("--min-scale", type=amount, default=0.1, help="in --img-size")
    add("--max-scale", type=amount, default=2.0, help="in --img-size")
    add("--epochs", type=amount, default=100, help="passes over images")
    add("--warmup-epochs", type=amount, default=0.136, help="of warm-up")
    add("--batch-size", type=count, default=64, help="images in an update")
    add("--base-lr", type=amount, default=4e-4, help="per 256 images")
    add("--weight-decay", type=amount, default=0.05, help="not on biases, norms, position")
    add("--clip-grad", type=amount, help="largest norm of the gradient")
    add("--init", help="encoder to start from")
    add("--eval-only", action="store_true", help="evaluate --init, else --out")
    add("--scenes", type=count, default=1300, help="toy scenes to train on")
    add("--val-scenes", type=count, default=150, help="to evaluate")
    add("--out", type=Path, default="runs/detect", help="folder of results")
    add("--resume", action="store_true", help="continue the run in --out")
    add("--seed", type=int, default=0, help="of random numbers")
    add("--accum", type=count, default=1, help="micro-batches in an update")
    add("--amp", choices=AMP, help="mixed precision")
    add("--workers", type=int, default=WORKERS, help="loading processes")
    add("--log-every", type=count, default=10, help="steps between log lines")
    add("--save-minutes", type=amount, default=5.0, help="minutes between saves")
    add("--max-steps", type=count, help="stop early")
    typed, _ = parser.parse_known_args(argv)
    preset = typed.preset or {"toy": "toy"}.get(typed.data, "photos")
    parser.set_defaults(preset=preset, **PRESETS[preset])
    if typed.resume and (typed.out / "config.json").exists():
        before = json.loads((typed.out / "config.json").read_text())
        names = (before.keys() & vars(typed)) - {"max_steps", "out"}
        parser.set_defaults(**{name: before[name] for name in names})
    add("-h", "--help", action="help", default=argparse.SUPPRESS)
    return parser.parse_args(argv)


PRESETS = {  # what differs from the authors' recipe above
    "photos": {},
    "small": dict(img_size=224, window=7, channels=64, features=256, proposals=300, boxes=128,
                  min_scale=0.5, epochs=25, batch_size=16, base_lr=1.6e-3, clip_grad=1.0),
    "toy": dict(arch="toy", img_size=48, pretrain_size=32, patch_size=4, window=6, channels=48,
                features=128, proposals=100, anchors=64, boxes=32, min_scale=0.8, max_scale=1.25,
                epochs=2, warmup_epochs=0.1, batch_size=4, base_lr=0.064, clip_grad=1.0)}
FAR_SIDE = torch.tensor([0, 0, 1, 1])  # boxes include the last pixel


class Samples(Dataset):
    """Sample v, which follows from (seed, v): image `(3, S, S)`, boxes, labels, masks."""

    def __init__(self, data, args):
        self.data = data
        self.seed = args.seed
        S = args.img_size
        gray = {tv_tensors.Image: (124, 116, 104), tv_tensors.Mask: 0}
        self.transform = v2.Compose([  # large-scale jitter (Ghiasi et al., 2021)
            v2.RandomHorizontalFlip(),
            v2.ScaleJitter((S, S), (max(32 / S, args.min_scale), args.max_scale)),  # see `least`
            v2.RandomCrop(S, pad_if_needed=True, fill=gray)])

    def __getitem__(self, v):
        image, truth = self.data[shuffled(v, len(self.data), self.seed)]  # seeds torch, too
        image, masks = self.transform(tv_tensors.Image(image), tv_tensors.Mask(truth["masks"]))
        kept = masks.sum(dim=(1, 2)) > 0  # others lie outside the crop
        return image, masks_to_boxes(masks[kept]) + FAR_SIDE, truth["labels"][kept], masks[kept]


def collate(samples):
    """Concatenates objects: each tensor that a worker sends holds a file open."""
    images, *objects = zip(*samples)
    counts = [len(boxes) for boxes in objects[0]]
    return torch.stack(images), counts, *[torch.cat(parts) for parts in objects]


def step_decay(step, steps, warmup, lr):
    """Linear warm-up from a thousandth; a tenth after 24/27 of the steps, a hundredth at 26/27."""
    rise = min(1, 0.001 + 0.999 * step / max(1, warmup))
    drops = (step >= steps * 24 / 27) + (step >= steps * 26 / 27)
    return lr * rise * 0.1 ** drops


def train(args):
    device = setup(args)
    data = open_scenes(args, train=True)
    validation = open_scenes(args, train=False, classes=data.classes)
    args.classes = data.classes  # saved

    torch.manual_seed(args.seed)
    model = detector(args, len(data.classes))
    if args.init and not (args.resume and (args.out / "last.pt").exists()):
        print(f"--init {args.init}: {vit.load_weights(model.backbone.encoder, args.init)}")
    model.to(device)
    matrices = [p for p in model.parameters() if p.ndim in (2, 4)]
    others = [p for p in model.parameters() if p.ndim in (1, 3)]  # biases, norms, position
    groups = [{"params": matrices, "weight_decay": args.weight_decay}, {"params": others}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
    done = start(args, data, model=model, optimizer=optimizer, scaler=scaler)  # steps
    network = nn.parallel.DistributedDataParallel(model) if WORLD > 1 else model
    autocast = torch.autocast(device.type, AMP[args.amp], enabled=args.amp != "off")

    B = args.batch_size
    steps = max(1, round(args.epochs * len(data) / B))
    warmup = min(steps - 1, round(args.warmup_epochs * len(data) / B))
    end = min(steps, done + (args.max_steps or steps))
    log = Log(args, scaler)
    mine = range(done * B + RANK, end * B, WORLD)  # dealt to ranks in turn
    batches = log.timed(DataLoader(
        Samples(data, args), B // (WORLD * args.accum), sampler=mine, collate_fn=collate,
        num_workers=args.workers, pin_memory=torch.cuda.is_available()))
    last_save = time.time()
    for step in tqdm(range(done + 1, end + 1), initial=done, total=steps, disable=RANK > 0 or None):
        lr = step_decay(step - 1, steps, warmup, args.base_lr * B / 256)
        for group in optimizer.param_groups:
            group["lr"] = lr
        for part in range(args.accum):
            images, counts, *objects = next(batches)
            images = images.to(device, non_blocking=True).float()
            objects = [tensor.to(device, non_blocking=True).split(counts) for tensor in objects]
            targets = [{"boxes": b, "labels": c, "masks": m} for b, c, m in zip(*objects)]
            # Anchors and boxes are drawn at random, the same after a restart.
            seed = np.random.SeedSequence((args.seed, step - 1, RANK, part)).generate_state(1)
            torch.manual_seed(seed.item())
            # Ranks synchronize gradients on the last micro-batch only.
            network.require_backward_grad_sync = part == args.accum - 1
            with autocast:
                losses = network(list(images), targets)
            loss = sum(losses.values())
            scaler.scale(loss / args.accum).backward()
            log.add(loss=loss, **losses)
        scaler.unscale_(optimizer)
        grad_norm = nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad or math.inf)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if step % args.log_every == 0 or step == end:
            log.write(step, epoch=step * B / len(data), lr=lr, grad_norm=grad_norm.item())
            if RANK == 0 and (step == end or time.time() - last_save > 60 * args.save_minutes):
                save(args, "last.pt", step, model=model, optimizer=optimizer, scaler=scaler)
                last_save = time.time()
    evaluate(model, validation, device, args.out / "detections.json")


def evaluate_only(args):
    """The detector in --init, else in --out; writes beside it."""
    path = Path(args.init or args.out / "last.pt")
    checkpoint = vit.open_checkpoint(path)
    config = checkpoint.get("config") or {}
    if "proposals" not in config:
        raise vit.InputError(f"{path}: not a detector of detect.py")
    args.img_size = config["img_size"]  # of toy scenes
    args.batch_size = WORLD * args.accum  # any ranks
    device = setup(args)
    data = open_scenes(args, train=False, classes=config["classes"])
    model = detector(argparse.Namespace(**config), len(data.classes))
    model.load_state_dict(checkpoint["model"])
    evaluate(model.to(device), data, device, path.with_name("evaluation.json"))


@torch.no_grad()
def evaluate(model, data, device, path):
    """Prints and writes AP, draws six images; no autocast."""
    model.eval()
    records = []
    shown = []
    for i in tqdm(range(RANK, len(data), WORLD), disable=RANK > 0 or None):
        image, truth = data[i]
        output = model([image.to(device).float()])[0]
        output = {name: tensor.cpu() for name, tensor in output.items()}
        output["masks"] = output["masks"][:, 0] >= 0.5
        records.append(compare(output, truth))
        if len(shown) < 6:
            shown.append((image, truth["masks"], output["masks"][output["scores"] >= 0.5]))
    ranks = [records] * WORLD
    if WORLD > 1:
        dist.all_gather_object(ranks, records)
    if RANK > 0:
        return
    records = [ranks[i % WORLD][i // WORLD] for i in range(len(data))]
    results = {kind: average_precision(records, len(data.classes), kind) for kind in data.kinds}
    for kind, numbers in results.items():
        print(kind, *[f"{name} {number:.1f}" for name, number in numbers.items()])
    path.write_text(json.dumps({"images": len(data), **results}, indent=1))
    draw_detections(path.with_suffix(".png"), shown, f"box AP {results['box']['AP']:.1f}")


def draw_detections(path, shown, title):
    """Rows: images, true outlines, predicted ones."""
    figure = Figure((2.2 * len(shown), 7), layout="tight")
    axes = figure.subplots(3, len(shown), squeeze=False, subplot_kw={"xticks": [], "yticks": []})
    for column, (image, true, predicted) in zip(axes.T, shown):
        for axis, masks in zip(column, ([], true, predicted)):
            axis.imshow(image.permute(1, 2, 0).numpy())
            for k, mask in enumerate(masks):
                if 0 < mask.float().mean() < 1:
                    axis.contour(mask.numpy(), [0.5], colors=f"C{k}")
    figure.suptitle(f"{title}\nimage, true, predicted (score >= 0.5)")
    figure.savefig(path)


# ---------- data

def open_scenes(args, train, classes=None):
    """A split: `data[i] -> (uint8 image (3, H, W), truth)`. `classes`: training's.

    truth: masks `(n, H, W)`, labels `(n,)` from 1, boxes `(n, 4)`, area `(n,)`, crowd `(n,)`.
    """
    data = ToyScenes(args, train) if args.data == "toy" else Coco(args, train, classes)
    if classes not in (None, data.classes):
        raise vit.InputError(f"--data {args.data}: {data.classes}, but training had {classes}")
    split = "training" if train else "validation"
    print(f"{split}: {len(data):,} images of {len(data.classes)} classes from {args.data}")
    return data


class ToyScenes(Dataset):
    """Images of one to three of vit.py's shapes."""
    classes = ["circle", "cross", "ring", "triangle"]
    kinds = ["box", "mask"]  # of AP

    def __init__(self, args, train):
        self.args = args
        self.train = train

    def __len__(self):
        return self.args.scenes if self.train else self.args.val_scenes

    def __getitem__(self, i):
        rng = np.random.default_rng((int(not self.train), i))
        labels = rng.integers(len(self.classes), size=rng.integers(1, 4))
        uniform = torch.from_numpy(rng.random((len(labels), 20), dtype=np.float32))
        uniform[:, 0] -= 5 / 6  # radius 0.3 to 0.6 of half the image
        uniform[:, 1:3] = 0.5 + (uniform[:, 1:3] - 0.5) * 1.5 / 0.7  # centers not at borders
        shapes = [vit.TOY_CLASSES.index(self.classes[label]) for label in labels]
        drawn, masks = vit.draw_shapes(torch.tensor(shapes), uniform, self.args.img_size)
        image = drawn[0]
        for k in range(1, len(labels)):  # later ones on top
            image = torch.where(masks[k], drawn[k], image)
            masks[:k] &= ~masks[k]
        seen = masks.sum(dim=(1, 2)) > 40
        masks = masks[seen].byte()
        labels = torch.from_numpy(labels)[seen] + 1
        return image, {
            "masks": masks, "labels": labels, "boxes": masks_to_boxes(masks) + FAR_SIDE,
            "area": masks.sum(dim=(1, 2)).double(), "crowd": torch.zeros_like(labels).bool()}


class Coco(Dataset):
    """A split in COCO's format. For training: no crowds, no images without objects."""

    def __init__(self, args, train, classes):
        self.classes, images, self.kinds = read_listing(Path(args.data), train, classes)
        texts = [json.dumps(image).encode() for image in images]
        self.text = b"".join(texts)  # one object: workers share it
        self.offsets = np.cumsum([0, *map(len, texts)])

    def __len__(self):
        return len(self.offsets) - 1

    def __getitem__(self, i):
        entry = json.loads(self.text[self.offsets[i]:self.offsets[i + 1]])
        image = v2.functional.pil_to_tensor(read_upright(entry["file"], entry["size"]))
        H, W = image.shape[1:]
        masks = [object_mask(outline, H, W) for outline in entry["outlines"]]
        masks = torch.from_numpy(np.array(masks, np.uint8).reshape(-1, H, W))
        numbers = torch.tensor(entry["numbers"], dtype=torch.float64).view(-1, 7)
        labels, area, crowd = numbers[:, 4:].T
        least = max(H, W) // 32 + 1  # Samples scales to 32 pixels at least
        border = (0, max(0, least - W), 0, max(0, least - H))
        return F.pad(image, border), {
            "masks": F.pad(masks, border), "boxes": numbers[:, :4], "labels": labels.long(),
            "area": torch.where(area < 0, masks.sum(dim=(1, 2)), area), "crowd": crowd.bool()}


def read_listing(root, train, classes):
    """Class names (`classes` if given), images by id, kinds of AP. Raises InputError."""
    folder = root / "train" if train else root / "valid"
    path = folder / "_annotations.coco.json"  # Roboflow's
    if not path.exists():
        folder = root / "train2017" if train else root / "val2017"
        path = root / "annotations" / f"instances_{folder.name}.json"
    place = path
    images = {}
    objects = boxed = 0
    try:
        listing = json.loads(path.read_text(encoding="utf-8-sig"))  # skips a byte order mark
        names = {entry["id"]: entry["name"] for entry in listing["categories"]}
        classes = classes or list(dict.fromkeys(names[number] for number in sorted(names)))
        for entry in sorted(listing["images"], key=itemgetter("id")):
            name = entry["file_name"].replace("\\", "/")
            file = folder / name if (folder / name).is_file() else root / name
            if not file.is_file() or entry["id"] in images:
                raise ValueError(f"{folder / name} is not there, or its id is another's")
            size = [int(entry.get(side) or -1) for side in ("height", "width")]
            images[entry["id"]] = {"file": str(file), "size": size, "outlines": [], "numbers": []}
        for entry in listing["annotations"]:
            place = f"{path}: annotation {entry.get('id')}, image {entry.get('image_id')}"
            image = images[entry["image_id"]]
            name = names[entry["category_id"]]
            if name not in classes:
                raise ValueError(f"class {name} is none of {classes}")
            x, y, width, height = entry["bbox"]
            right, bottom = x + width, y + height
            area = float(entry.get("area") or -1)  # below 0: the mask's
            if min(width, height) < 0 or not math.isfinite(right + bottom + area):
                raise ValueError(f"bbox {entry['bbox']}, area {area}")
            outline = entry.get("segmentation")
            if not outline or not any(outline):
                outline = [[x, y, right, y, right, bottom, x, bottom]]
                boxed += 1
            outline = check_outline(outline, image)
            crowd = entry.get("iscrowd") == 1
            objects += bool(outline) and not crowd
            if outline and not (train and crowd):
                numbers = [x, y, right, bottom, 1 + classes.index(name), area, crowd]
                image["numbers"].append(numbers)
                image["outlines"].append(outline)
    except Exception as error:  # of many types
        raise vit.InputError(f"{place}: {error!r:.300}") from None
    if objects == 0:
        raise vit.InputError(f"{path}: lists no objects, or only crowds")
    chosen = [image for image in images.values() if image["numbers"] or not train]
    total = len(listing["annotations"])
    print(f"{path}: {len(images):,} images, {objects:,} objects of {total:,}, {boxed:,} only boxes")
    return classes, chosen, ["box"] if boxed else ["box", "mask"]


def check_outline(outline, image):
    """Polygons of three points or more, or run lengths. Raises ValueError."""
    if not isinstance(outline, dict):
        polygons = [np.asarray_chkfinite(each, float).reshape(-1, 2) for each in outline]
        return [points.tolist() for points in polygons if len(points) >= 3]
    size = outline["size"]
    runs = run_lengths(outline["counts"])
    if min(image["size"]) < 1:
        image["size"] = size
    if size != image["size"] or sum(runs) != math.prod(size) or min(runs) < 0:
        raise ValueError(f"run lengths of {size}, {sum(runs)}, in an image of {image['size']}")
    return {"counts": runs}


def run_lengths(counts):
    """Runs of 0, 1, 0, ... from a list, or a string with five bits a character."""
    if isinstance(counts, list):
        return counts
    lengths = []
    for characters in re.findall("[P-o]*[0-O]", counts):  # P-o go on; lowest bits first
        bits = [ord(c) - 48 for c in characters]
        value = sum((five & 31) << 5 * k for k, five in enumerate(bits))
        if bits[-1] & 16:  # below zero
            value -= 1 << 5 * len(bits)
        if len(lengths) > 2:  # a difference from the last but one
            value += lengths[-2]
        lengths.append(value)
    return lengths


def read_upright(path, size):
    """An RGB image of a size [height, width]: turned as its EXIF says, else as stored."""
    image = read_image(path)
    for view in (ImageOps.exif_transpose(image), image):
        if min(size) < 1 or [view.height, view.width] == size:
            return view
    raise vit.InputError(f"{path}: {image.height} x {image.width} pixels, {size} in the listing")


def object_mask(outline, height, width):
    """COCO's polygons or run lengths as `(height, width)`, 0 or 1."""
    if isinstance(outline, dict):
        runs = outline["counts"]
        return np.repeat(np.arange(len(runs)) % 2, runs).reshape(width, height).T  # by columns
    mask = np.zeros((height, width), np.uint8)
    for polygon in outline:  # 5 times as large: PIL fills all that a border touches
        points = np.reshape(polygon, (-1, 2))  # x, y
        left, top = np.clip(points.min(axis=0).astype(int) - 1, 0, [width, height])
        right, bottom = np.clip(points.max(axis=0).astype(int) + 1, 0, [width, height])
        canvas = Image.new("L", (5 * (right - left), 5 * (bottom - top)))
        corners = 5 * points - 0.5 - [5 * left, 5 * top]
        ImageDraw.Draw(canvas).polygon(corners.flatten().tolist(), fill=1)
        mask[top:bottom, left:right] |= np.array(canvas)[2::5, 2::5]  # pixel centers
    return mask


def main(argv=None):
    args = parse_detection(argv)
    if args.img_size % (2 * args.patch_size):
        raise vit.InputError("--img-size: not a multiple of 2 x --patch-size")
    if args.eval_only:
        return evaluate_only(args)
    train(args)


# ==================== plumbing: one text for each name, in all scripts

RANK = int(os.environ.get("RANK", 0))  # set by torchrun
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))
WORLD = int(os.environ.get("WORLD_SIZE", 1))
WORKERS = min(8, os.cpu_count()) if torch.cuda.is_available() else 0
AMP = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}
MAY_CHANGE = ("out", "preset", "data", "root", "download", "workers", "accum", "compile",
              "log_every", "save_minutes", "max_steps", "resume", "init", "teacher")


def count(text):  # type of an argument: 1, 2, 3, ...
    if int(text) < 1:
        raise ValueError
    return int(text)


def amount(text):  # a number from 0 up
    if not 0 <= float(text) < math.inf:
        raise ValueError
    return float(text)


def read_image(path):
    """A file as an RGB PIL image. Raises InputError that names it."""
    try:
        image = Image.open(path)
        if image.mode[0] in "IF":
            raise ValueError(f"more than 8 bits a pixel, mode {image.mode}")
        return image.convert("RGB")
    except Exception as error:  # PIL raises many types
        raise vit.InputError(f"{path}: unreadable image ({error!r:.200})") from None


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
