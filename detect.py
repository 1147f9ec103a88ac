"""Detection: a pre-trained ViT-Tiny as the backbone of Mask R-CNN (ViTDet, Li et al., 2022).

Mask R-CNN needs large images and maps at several scales; a plain ViT has one scale and attends to everything.
So most blocks attend inside windows, and a pyramid is made from the last map. The rest is torchvision's, set
as in ViTDet. COCO's average precision is computed by hand.

    laptop    python detect.py                          # synthetic scenes, no download, three minutes
              python detect.py --init runs/mae/last.pt  # from the encoder of `python mae.py`
    one GPU   python detect.py --data COCO --init mae_tiny.pth --accum 8    # --preset small: 224 px
    8 GPUs    torchrun --nproc_per_node=8 detect.py --data COCO --init mae_tiny.pth  # the authors' run
    evaluate  python detect.py --data COCO --init runs/detect/last.pt --eval-only    # writes beside it
COCO holds annotations/instances_{train,val}2017.json, train2017/, val2017/. Results in --out: config.json,
log.jsonl, last.pt, detections.json, detections.png. N ranks do not repeat the run of one, as each draws the
anchors and boxes that it trains on; weights stay equal.
Shapes: B images, D width, h heads, d = D / h; boxes are (x1, y1, x2, y2). Read up to the end of `train`.
"""
import argparse
import hashlib
import json
import math
import os
import signal
import sys
import time
import traceback
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image, ImageDraw
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.models.detection import MaskRCNN, anchor_utils, faster_rcnn, mask_rcnn, rpn
from torchvision.ops import MultiScaleRoIAlign, box_area, masks_to_boxes
from torchvision.transforms import v2
from tqdm import tqdm

import vit


# ------------------------------------------------------------ the method

class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over C of `(B, C, H, W)`."""

    def __init__(self, channels):
        super().__init__(channels, eps=1e-6)

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def to_windows(x, size):
    """`(B, H, W, D) -> (B * windows, size * size, D)`, padded with zeros at the bottom and right."""
    x = F.pad(x, (0, 0, 0, -x.shape[2] % size, 0, -x.shape[1] % size))
    x = x.unflatten(2, (-1, size)).unflatten(1, (-1, size))    # (B, rows, size, columns, size, D)
    return x.transpose(2, 3).flatten(3, 4).flatten(0, 2)


def from_windows(windows, size, H, W):
    """`(B * windows, size * size, D) -> (B, H, W, D)`: the inverse of `to_windows`."""
    rows, columns = math.ceil(H / size), math.ceil(W / size)
    x = windows.unflatten(1, (size, size)).unflatten(0, (-1, rows, columns))
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)[:, :H, :W]


class RelativeAttention(vit.Attention):
    """Attention that also knows how far apart two tokens of a `side x side` map are (MViTv2).

    scores[i, j] = q_i k_j / sqrt(d) + q_i R_h[row_i - row_j] + q_i R_w[column_i - column_j]

    The tables R, `(2 side - 1, d)`, are zero at first: pre-trained attention is unchanged.
    """

    def __init__(self, dim, num_heads, side):
        super().__init__(dim, num_heads)
        self.side = side
        self.rel_pos_h = nn.Parameter(torch.zeros(2 * side - 1, dim // num_heads))
        self.rel_pos_w = nn.Parameter(torch.zeros(2 * side - 1, dim // num_heads))
        i, eye = torch.arange(side), torch.eye(side)
        place = torch.cat([eye.repeat_interleave(side, dim=0), eye.repeat(side, 1)], dim=1)
        self.register_buffer("apart", i[:, None] - i + side - 1, persistent=False)    # rows of R
        self.register_buffer("place", place, persistent=False)    # (N, 2 side)

    def heads(self, x):
        """Longer q, k, `(B, h, N, d + 2 side)`: q has terms for all rows and columns, k a one at its own."""
        q, k, v = super().heads(x)
        grid = q.unflatten(2, (self.side, self.side))
        rows = torch.einsum("bhyxd,ykd->bhyxk", grid, self.rel_pos_h[self.apart])
        columns = torch.einsum("bhyxd,xkd->bhyxk", grid, self.rel_pos_w[self.apart])
        relative = torch.cat([rows, columns], dim=-1).flatten(2, 3)    # (B, h, N, 2 side)
        q = torch.cat([q * q.shape[-1] ** -0.5, relative], dim=-1)
        k = torch.cat([k, self.place.to(k.dtype).expand(*k.shape[:2], -1, -1)], dim=-1)
        return q * q.shape[-1] ** 0.5, k, v    # attention divides by sqrt(d + 2 side)


class SimplePyramid(nn.Module):
    """A plain ViT's last map at 4, 2, 1, 1/2 times its size, and one more by subsampling (ViTDet, Fig. 2).

    Blocks attend inside windows, except the last of each quarter (2, 5, 8, 11 of twelve). The encoder's
    position is now trained; its class token and norm go unused. No map has a stride below 2 pixels.
    """

    def __init__(self, encoder, img_size, window=14, channels=256):
        super().__init__()
        depth, D = len(encoder.blocks), encoder.embed_dim
        self.encoder, self.window, self.out_channels = encoder, window, channels
        self.global_blocks = [depth * quarter // 4 - 1 for quarter in (1, 2, 3, 4)]
        encoder.norm = encoder.fc_norm = encoder.head = nn.Identity()
        encoder.cls_token.requires_grad_(False)
        encoder.pos_embed.requires_grad_(True)
        for i, block in enumerate(encoder.blocks):
            side = img_size // encoder.patch_size if i in self.global_blocks else window
            attention = RelativeAttention(D, block.attn.num_heads, side)
            attention.load_state_dict(block.attn.state_dict(), strict=False)
            block.attn = attention
        up = [nn.ConvTranspose2d(D // k, D // k // 2, 2, stride=2) for k in (1, 2, 1)]
        scales = [s for s in (4, 2, 1, 0.5) if encoder.patch_size / s >= 2]
        self.strides = [int(encoder.patch_size / s) for s in (*scales, 0.25)]
        resize = {4: [up[0], LayerNorm2d(D // 2), nn.GELU(), up[1]], 2: [up[2]], 1: [], .5: [nn.MaxPool2d(2)]}
        self.levels = nn.ModuleList(nn.Sequential(
            *resize[s], nn.Conv2d(D // max(1, int(s)), channels, 1, bias=False), LayerNorm2d(channels),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False), LayerNorm2d(channels)) for s in scales)

    def encode(self, images):
        """The map after the last block, `(B, D, H, W)`, H and W in patches."""
        H, W = (side // self.encoder.patch_size for side in images.shape[-2:])
        x = self.encoder.embed(images)    # (B, L, D)
        for i, block in enumerate(self.encoder.blocks):
            size = max(H, W) if i in self.global_blocks else self.window
            windows = to_windows(block.norm1(x).unflatten(1, (H, W)), size)
            attended = from_windows(block.attn(windows), size, H, W)
            x = x + block.stochastic_depth(attended.flatten(1, 2))
            x = x + block.stochastic_depth(block.mlp(block.norm2(x)))    # per token: no windows
        return x.transpose(1, 2).unflatten(2, (H, W))

    def forward(self, images):
        """Images `(B, 3, S, S)` to maps `(B, channels, S / stride, S / stride)`, the largest first."""
        x = self.encode(images)
        maps = [level(x) for level in self.levels]
        maps.append(F.max_pool2d(maps[-1], 1, stride=2))
        return dict(enumerate(maps))


def detector(args, num_classes):
    """torchvision's Mask R-CNN with ViTDet's settings; class 0 is the background, images are 0 to 255.

    `model(images, targets)` is a dict of losses; in evaluation `model(images)` lists dicts of boxes `(n, 4)`,
    labels, scores `(n,)` and masks `(n, 1, H, W)` in 0..1.
    """
    encoder = vit.ARCHS[args.arch](args.pretrain_size, args.patch_size, num_heads=args.num_heads)
    C, box_features, proposals, rpn_samples, box_samples = HEADS[args.heads]
    backbone = SimplePyramid(encoder, args.img_size, args.window, C)
    S, strides, maps = args.img_size, backbone.strides, list(range(len(backbone.levels)))
    anchors = anchor_utils.AnchorGenerator([(8 * s,) for s in strides], [(0.5, 1.0, 2.0)] * len(strides))
    model = MaskRCNN(
        backbone, image_mean=MEAN.flatten().tolist(), image_std=STD.flatten().tolist(),
        min_size=S, max_size=S, size_divisible=S,    # longest side; padded to a square
        rpn_anchor_generator=anchors, rpn_head=rpn.RPNHead(C, 3, conv_depth=2),
        rpn_batch_size_per_image=rpn_samples, box_batch_size_per_image=box_samples,
        rpn_pre_nms_top_n_train=2 * proposals, rpn_post_nms_top_n_train=proposals,
        rpn_pre_nms_top_n_test=proposals, rpn_post_nms_top_n_test=proposals,
        box_roi_pool=MultiScaleRoIAlign(maps, 7, 0),
        box_head=faster_rcnn.FastRCNNConvFCHead((C, 7, 7), [C] * 4, [box_features], LayerNorm2d),
        box_predictor=faster_rcnn.FastRCNNPredictor(box_features, num_classes + 1),
        mask_roi_pool=MultiScaleRoIAlign(maps, 14, 0),
        mask_head=mask_rcnn.MaskRCNNHeads(C, [C] * 4, 1, LayerNorm2d),
        mask_predictor=mask_rcnn.MaskRCNNPredictor(C, C, num_classes + 1))
    # Positions stay float32 (bf16 rounds 600 to a multiple of 4): anchors take their type from maps, boxes
    # from predictions. Maps cover the padded square; torchvision would take the first image's size.
    head, box, mask = model.rpn.head, model.roi_heads.box_predictor, model.roi_heads.mask_predictor
    for part in (*backbone.levels, head.cls_logits, head.bbox_pred, *box.children(), mask.mask_fcn_logits):
        part.register_forward_hook(lambda module, inputs, output: output.float())
    for pool in (model.roi_heads.box_roi_pool, model.roi_heads.mask_roi_pool):
        pool.register_forward_pre_hook(lambda module, inputs: (*inputs[:2], [(S, S)]))
    return model


# ------------------------------------------------------------ average precision

# A detection hits an object of its class if they overlap by a threshold. Each, best first, adds a point
# (recall, precision); AP is the area under this curve, read at 101 recalls, averaged over ten thresholds.
THRESHOLDS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0, 1, 101)
AREAS = np.array([[0, 1e10], [0, 1024], [1024, 9216], [9216, 1e10]])    # all, small, medium, large


def outside(areas):
    """Which of n areas are outside the four ranges: `(4, n)`."""
    return (areas < AREAS[:, :1]) | (areas > AREAS[:, 1:])


def match(iou, ignored, crowd):
    """Which object each detection of one class in one image hits, best first; -1 for none.

    iou `(n, m)`; ignored `(4, m)`: does not count in an area range; crowd `(m,)`: may be hit many times.
    Returns `(4, 10, n)`: area ranges, thresholds, detections.
    """
    n, m = iou.shape
    taken = np.zeros((4, 10, m), bool)
    objects = np.full((4, 10, n), -1)
    for i in range(n if m else 0):
        fits = (iou[i] >= THRESHOLDS[:, None]) & (~taken | crowd)    # (4, 10, m)
        counting = fits & ~ignored[:, None]
        allowed = np.where(counting.any(axis=-1, keepdims=True), counting, fits)
        best = m - 1 - np.where(allowed, iou[i], -1)[..., ::-1].argmax(axis=-1)    # a tie: the last
        objects[..., i] = np.where(allowed.any(axis=-1), best, -1)
        taken |= objects[..., i, None] == np.arange(m)
    return objects


def average_precision(records, num_classes, kind):
    """COCO's six numbers in percent, where there are objects; kind is "box" or "mask".

    records: `compare` of each image, sorted by image id (which orders equal scores).
    """
    found = [[] for _ in range(num_classes)]    # scores, hits, which do not count
    objects = np.zeros((num_classes, 4), int)
    for r in records:
        for c in np.union1d(r["labels"], r["true_labels"]):
            ours, true = np.flatnonzero(r["labels"] == c), np.flatnonzero(r["true_labels"] == c)
            ours = ours[np.argsort(-r["scores"][ours], kind="stable")][:100]
            crowd = r["crowd"][true]
            ignored = outside(r["true_area"][true]) | crowd
            which = match(r[kind + "_iou"][np.ix_(ours, true)], ignored, crowd)    # (4, 10, n)
            hit = which >= 0
            on_ignored = np.pad(ignored, ((0, 0), (0, 1)))[np.arange(4)[:, None, None], which]    # -1: no
            skip = on_ignored | (~hit & outside(r[kind + "_area"][ours])[:, None])
            found[c].append((r["scores"][ours], hit & ~skip, skip))
            objects[c] += (~ignored).sum(axis=1)
    table = np.full((num_classes, 4, 10), np.nan)
    for c in np.flatnonzero(objects.any(axis=1)):
        scores, hit, skip = (np.concatenate(parts, axis=-1) for parts in zip(*found[c]))
        order = np.argsort(-scores, kind="stable")
        hits, counted = hit[..., order].cumsum(axis=-1), (~skip[..., order]).cumsum(axis=-1)
        precision = hits / np.maximum(counted, 1)
        precision = np.maximum.accumulate(precision[..., ::-1], axis=-1)[..., ::-1]
        precision = np.pad(precision, ((0, 0), (0, 0), (0, 1)))    # 0: recall not reached
        for a, t in np.ndindex(4, 10):
            if objects[c, a]:
                at = np.searchsorted(hits[a, t] / objects[c, a], RECALLS)
                table[c, a, t] = precision[a, t, at].mean()
    numbers = {"AP": table[:, 0], "AP50": table[:, 0, 0], "AP75": table[:, 0, 5],
               "APs": table[:, 1], "APm": table[:, 2], "APl": table[:, 3]}
    return {name: 100 * float(np.nanmean(n)) for name, n in numbers.items() if not np.isnan(n).all()}


def compare(output, truth):
    """What AP needs from an image: overlaps `(n, m)`, areas, scores, labels from 0; numpy arrays."""
    def overlap(intersection, area, true_area):    # of a crowd: the share of the detection inside it
        union = torch.where(truth["crowd"], area[:, None], area[:, None] + true_area - intersection)
        return intersection / union.clamp(min=1e-9)

    boxes, true_boxes = output["boxes"].double(), truth["boxes"].double()
    low = torch.maximum(boxes[:, None, :2], true_boxes[:, :2])
    sides = torch.minimum(boxes[:, None, 2:], true_boxes[:, 2:]) - low
    box_areas = box_area(boxes), box_area(true_boxes)
    masks, true_masks = output["masks"].flatten(1).float(), truth["masks"].flatten(1).float()
    mask_areas = masks.sum(dim=1).double(), true_masks.sum(dim=1).double()
    record = {
        "scores": output["scores"].double(), "labels": output["labels"] - 1,
        "true_labels": truth["labels"] - 1, "true_area": truth["area"], "crowd": truth["crowd"],
        "box_area": box_areas[0], "box_iou": overlap(sides.clamp(min=0).prod(dim=2), *box_areas),
        "mask_area": mask_areas[0], "mask_iou": overlap((masks @ true_masks.T).double(), *mask_areas),
    }
    return {name: value.numpy() for name, value in record.items()}


# ------------------------------------------------------------ training

HEADS = {  # channels, features of the box head, proposals, anchors and boxes in the losses
    "toy": (48, 128, 100, 64, 32), "small": (64, 256, 300, 256, 128), "full": (256, 1024, 1000, 256, 512)}
SETTINGS = {  # argument:   toy   small  photos (the authors'); meaning; allowed values
    "arch":          (("toy", "tiny", "tiny"), "Vision Transformer of vit.py", *vit.ARCHS),
    "img_size":      ((48, 224, 640), "longest side of the images"),
    "pretrain_size": ((32, 224, 224), "img_size of pre-training"),
    "patch_size":    ((4, 16, 16), "side of a patch"),
    "window":        ((6, 7, 14), "side of a window, in patches", 1, 999),
    "heads":         (("toy", "small", "full"), "size of the detector's heads", *HEADS),
    "num_heads":     (12, "of the encoder; DeiT-Tiny has 3", 1, 1000),
    "min_scale":     ((0.8, 0.5, 0.1), "smallest image, in img_size"),
    "max_scale":     ((1.25, 2.0, 2.0), "largest image, cropped to img_size"),
    "epochs":        ((2, 25, 100), "passes over the images", 1, 10 ** 6),
    "warmup_epochs": ((0.1, 0.136, 0.136), "epochs of warm-up (COCO: 250 steps)", 0, 10 ** 6),
    "batch_size":    ((4, 16, 64), "images in an update, over ranks, --accum", 1, 10 ** 6),
    "base_lr":       ((0.064, 1.6e-3, 4e-4), "learning rate per 256 images", 0, 1e12),
    "weight_decay":  ((0.05, 0.05, 0.05), "AdamW's, not on 1-D tensors and position", 0, 1),
    "clip_grad":     ((1.0, 1.0, None), "largest norm of the gradient", 1e-9, 1e9),
    "init":          (None, "start from the encoder in this checkpoint"),
    "eval_only":     (False, "evaluate the detector in --init"),
    "scenes":        (1300, "toy scenes to train on", 1, 10 ** 9),
    "val_scenes":    (150, "toy scenes to evaluate", 1, 10 ** 6),
}


def make_sample(data, transform, i):
    """Image i `(3, S, S)`, uint8, and its objects: boxes `(n, 4)`, labels `(n,)`, masks `(n, S, S)`."""
    image, truth = data[i]
    image, masks = transform(tv_tensors.Image(image), tv_tensors.Mask(truth["masks"]))
    kept = masks.sum(dim=(1, 2)) > 0    # some objects lie outside the crop
    masks = masks[kept]
    return image, {"boxes": mask_boxes(masks), "labels": truth["labels"][kept], "masks": masks}


def step_decay(step, steps, warmup, lr):
    """Linear warm-up from a thousandth; a tenth after 24/27 of the steps, a hundredth after 26/27."""
    rise = min(1, 0.001 + 0.999 * step / max(1, warmup))
    drops = (step >= steps * 24 / 27) + (step >= steps * 26 / 27)
    return lr * rise * 0.1 ** drops


def train(args):
    device, stop = setup(args)
    data, validation = open_scenes(args, train=True), open_scenes(args, train=False)
    transform = v2.Compose([    # large-scale jitter (Ghiasi et al., 2021), gray padding
        v2.RandomHorizontalFlip(),
        v2.ScaleJitter((args.img_size, args.img_size), (args.min_scale, args.max_scale)),
        v2.RandomCrop(args.img_size, pad_if_needed=True,
                      fill={tv_tensors.Image: (124, 116, 104), tv_tensors.Mask: 0}),
    ])
    stream = Stream(data, transform, args.seed)
    steps = max(1, round(args.epochs * len(data) / args.batch_size))
    warmup = min(steps - 1, round(args.warmup_epochs * len(data) / args.batch_size))
    torch.manual_seed(args.seed)
    model = detector(args, len(data.classes))
    encoder = model.backbone.encoder
    if args.init and not args.resume:
        print(f"--init {args.init}: {vit.load_weights(encoder, args.init)}")
    model.to(device)
    matrices = [p for p in model.parameters() if p.ndim > 1 and p is not encoder.pos_embed]
    others = [p for p in model.parameters() if p.ndim == 1 or p is encoder.pos_embed]    # no weight decay
    optimizer = torch.optim.AdamW([{"params": matrices}, {"params": others, "weight_decay": 0.0}],
                                  weight_decay=args.weight_decay, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
    step = start(args, data, model=model, optimizer=optimizer, scaler=scaler)
    if args.compile:
        model.backbone.compile(dynamic=False)    # shapes in the heads vary
    network = nn.parallel.DistributedDataParallel(model) if WORLD > 1 else model
    half = torch.float16 if args.amp == "fp16" else torch.bfloat16
    autocast = torch.autocast(device.type, half, enabled=args.amp != "off")
    end = min(steps, step + (args.max_steps or steps))
    batches = load(stream, step, end, args)
    log, last_save, stopping = Log(args, step, steps), time.time(), False
    while step < end:
        lr = step_decay(step, steps, warmup, args.base_lr * args.batch_size / 256)
        for group in optimizer.param_groups:
            group["lr"] = lr
        sums = {}
        for part in range(args.accum):
            images, targets = zip(*log.next(batches))
            images = [image.to(device).float() for image in images]
            targets = [{name: tensor.to(device) for name, tensor in target.items()} for target in targets]
            seed = np.random.SeedSequence((args.seed, step, RANK, part)).generate_state(1)[0]
            torch.manual_seed(int(seed))    # anchors and boxes are chosen at random
            network.require_backward_grad_sync = part == args.accum - 1
            with autocast:
                losses = network(images, targets)
            losses["loss"] = sum(losses.values())
            scaler.scale(losses["loss"] / args.accum).backward()
            for name in losses:
                sums[name] = sums.get(name, 0) + losses[name].detach() / args.accum

        scaler.unscale_(optimizer)
        grad_norm = nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad or math.inf)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        step += 1
        log.window.append({**sums, "grad_norm": grad_norm})
        if not (step % args.log_every == 0 or step == end or (stop and WORLD == 1)):
            continue

        stopping = log.write(step, stop, epoch=step * args.batch_size / len(data), lr=lr)
        if RANK == 0 and (step == end or stopping or time.time() - last_save > 60 * args.save_minutes):
            save(args, "last.pt", step, model=model, optimizer=optimizer, scaler=scaler)
            last_save = time.time()
        if stopping:
            break
    print(f"{'done' if step == steps else 'stopped, --resume continues'}: step {step} of {steps}", flush=True)
    if not stopping:
        evaluate(args, model, validation, device, stop, args.out / "detections.json")


def evaluate_only(args):
    """--eval-only: the detector in --init; writes beside it."""
    device, stop = setup(args)
    data = open_scenes(args, train=False)
    try:
        checkpoint = torch.load(args.init, map_location="cpu", weights_only=True)
        vars(args).update({name: checkpoint["config"][name] for name in list(SETTINGS)[:7]})
        data.img_size = args.img_size    # of toy scenes
        model = detector(args, len(data.classes))
        model.load_state_dict(checkpoint["model"])
    except Exception as error:
        message = f"--init {args.init}: no detector of {len(data.classes)} classes ({error!r:.200})"
        raise UserError(message) from None
    evaluate(args, model.to(device), data, device, stop, Path(args.init).with_name("evaluation.json"))


@torch.no_grad()
def evaluate(args, model, data, device, stop, path):
    """Prints and writes AP, each image seen by one rank, and draws some; in float32."""
    model.eval()
    records, shown = {}, []
    for i in tqdm(range(RANK, len(data), WORLD), disable=not sys.stderr.isatty()):
        if stop:
            return print("interrupted")
        image, truth = data[i]
        output, = model([image.to(device).float()])
        output["masks"] = output["masks"][:, 0] >= 0.5
        output = {name: part.cpu() for name, part in output.items()}
        records[i] = compare(output, truth)
        if len(shown) < 6:
            shown.append((image, truth, output))
    gathered = [records] * WORLD
    if WORLD > 1:
        dist.all_gather_object(gathered, records)
    if RANK > 0:
        return
    records = [gathered[i % WORLD][i] for i in range(len(data))]
    results = {"images": len(records)}
    for kind in ("box", "mask"):
        results[kind] = numbers = average_precision(records, len(data.classes), kind)
        print(kind, *(f"{name} {number:.1f}" for name, number in numbers.items()))
    path.write_text(json.dumps(results, indent=1))
    title = f"box AP {results['box']['AP']:.1f}, mask AP {results['mask']['AP']:.1f}"
    draw_detections(path.with_suffix(".png"), shown, data.classes, title)


def draw_detections(path, shown, classes, title):
    """True objects above, detections below."""
    figure = Figure((2.4 * len(shown) + 0.4, 5.6), layout="tight")
    axes = figure.subplots(2, len(shown), squeeze=False, subplot_kw={"xticks": [], "yticks": []})
    axes[0, 0].set_ylabel("true")
    axes[1, 0].set_ylabel("predicted, score >= 0.5")
    for column, (image, *both) in zip(axes.T, shown):
        for axis, found in zip(column, both):
            axis.imshow(image.permute(1, 2, 0).numpy())
            scores = found.get("scores", torch.ones(len(found["labels"])))
            for k in (scores >= 0.5).nonzero().flatten():
                label = int(found["labels"][k]) - 1
                text = classes[label] + (f" {scores[k]:.2f}" if "scores" in found else "")
                color = matplotlib.colormaps["tab10"](label % 10)
                axis.imshow(found["masks"][k, :, :, None].numpy() * np.array([*color[:3], 0.45]))
                x1, y1, x2, y2 = found["boxes"][k].numpy() - 0.5    # imshow centers the first pixel at 0
                axis.plot([x1, x2, x2, x1, x1], [y1, y1, y2, y2, y1], color=color)
                axis.text(x1, y1, text, fontsize=6, color="white", backgroundcolor=color)
    figure.suptitle(title)
    figure.savefig(path)


# ------------------------------------------------------------ data: scenes with objects

def open_scenes(args, train):
    """A split: `data[i] -> (uint8 image (3, H, W), truth)`, with `classes`.

    truth: masks `(n, H, W)`, labels `(n,)` from 1, boxes `(n, 4)`, area `(n,)`, crowd `(n,)`.
    """
    if args.data == "toy":
        return ToyScenes(args.scenes if train else args.val_scenes, args.img_size, seed=int(not train))
    return Coco(Path(args.data), "train2017" if train else "val2017", train)


class ToyScenes(Dataset):
    """Images of one to three of vit.py's shapes."""
    classes = ["circle", "cross", "ring", "triangle"]

    def __init__(self, count, img_size, seed):
        self.count, self.img_size, self.seed = count, img_size, seed

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        rng = np.random.default_rng((self.seed, i))
        labels = rng.integers(len(self.classes), size=rng.integers(1, 4))
        uniform = torch.from_numpy(rng.random((len(labels), 20), dtype=np.float32))
        uniform[:, 0] -= 5 / 6    # radius 0.3 to 0.6 of half the image
        uniform[:, 1:3] = 0.5 + (uniform[:, 1:3] - 0.5) * 1.5 / 0.7    # center in the middle three quarters
        shapes = [vit.TOY_CLASSES.index(self.classes[label]) for label in labels]
        drawn, masks = vit.draw_shapes(torch.tensor(shapes), uniform, self.img_size)
        image = drawn[0]
        for k in range(1, len(labels)):    # later ones in front
            image = torch.where(masks[k], drawn[k], image)
            masks[:k] &= ~masks[k]
        area = masks.sum(dim=(1, 2))
        seen = area > 40    # pixels
        masks, labels = masks[seen].byte(), torch.from_numpy(labels)[seen] + 1
        return image, {"masks": masks, "labels": labels, "boxes": mask_boxes(masks),
                       "area": area[seen].double(), "crowd": labels == 0}


class Coco(Dataset):
    """COCO's folder. For training: no crowds, no images without objects."""

    def __init__(self, root, split, train):
        path, folder = root / "annotations" / f"instances_{split}.json", root / split
        listing = json.loads(path.read_text())
        categories = sorted(listing["categories"], key=lambda c: c["id"])
        self.classes = [c["name"] for c in categories]
        labels = {c["id"]: k for k, c in enumerate(categories, 1)}    # ids have gaps
        objects = {image["id"]: [] for image in listing["images"]}
        for a in listing["annotations"]:
            if a["category_id"] not in labels or a["image_id"] not in objects:
                raise UserError(f"{path}: no category {a['category_id']} or no image {a['image_id']}")
            if not (train and a["iscrowd"]):
                values = (a[name] for name in ("segmentation", "bbox", "area", "iscrowd"))
                objects[a["image_id"]].append((labels[a["category_id"]], *values))
        self.root, self.samples = str(folder), []
        present = set(os.listdir(folder))
        for image in sorted(listing["images"], key=lambda image: image["id"]):
            if image["file_name"] not in present:
                raise UserError(f"{folder / image['file_name']}: not there, but listed in {path}")
            if objects[image["id"]] or not train:    # as text: small
                self.samples.append((str(folder / image["file_name"]), json.dumps(objects[image["id"]])))
        if not any(objects.values()):
            raise UserError(f"{path}: lists no objects")

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, i):
        file, text = self.samples[i]
        try:
            image = v2.functional.pil_to_tensor(Image.open(file).convert("RGB"))
        except Exception as error:
            raise UserError(f"{file}: unreadable image ({error!r})") from None
        H, W = image.shape[1:]
        labels, outlines, boxes, area, crowd = zip(*json.loads(text)) if text != "[]" else [()] * 5
        masks = np.array([object_mask(outline, H, W) for outline in outlines], np.uint8)
        boxes = torch.tensor(boxes, dtype=torch.float64).view(-1, 4)    # x, y, width, height
        boxes[:, 2:] += boxes[:, :2]
        return image, {"masks": torch.from_numpy(masks.reshape(-1, H, W)), "boxes": boxes,
                       "labels": torch.tensor(labels).long(), "crowd": torch.tensor(crowd).bool(),
                       "area": torch.tensor(area, dtype=torch.float64)}


def object_mask(segmentation, height, width):
    """COCO's polygons, or the run lengths of a crowd, as `(height, width)`, 0 or 1.

    PIL fills all that a border touches. Drawn 5 times as large and sampled at pixel centers, 0.3% of the
    pixels of 1,503 real masks differ from pycocotools'.
    """
    if isinstance(segmentation, dict):    # runs of 0, 1, 0, ..., column by column
        counts = segmentation["counts"]
        return np.repeat(np.arange(len(counts), dtype=np.uint8) % 2, counts).reshape(width, height).T
    canvas = Image.new("L", (5 * width, 5 * height))
    for polygon in segmentation:
        ImageDraw.Draw(canvas).polygon([5 * value - 0.5 for value in polygon], fill=1)
    return np.array(canvas)[2::5, 2::5]


def mask_boxes(masks):
    """Boxes `(n, 4)` around masks `(n, H, W)`, to the far side of the last pixel."""
    boxes = masks_to_boxes(masks)
    boxes[:, 2:] += 1
    return boxes


class Stream(Dataset):
    """Endless samples, as in mae.py: sample v shows image `permutation(seed, v // n)[v % n]`."""

    def __init__(self, data, transform, seed):
        self.data, self.transform, self.seed = data, transform, seed

    def __getitem__(self, v):
        n = len(self.data)
        order = np.random.default_rng((self.seed, v // n)).permutation(n)
        seed = np.random.SeedSequence((self.seed, v)).generate_state(1)[0]
        torch.default_generator.manual_seed(int(seed))
        return make_sample(self.data, self.transform, order[v % n])


def load(stream, step, end, args):
    batches = (list(range(s * args.batch_size + RANK, (s + 1) * args.batch_size, WORLD)[part::args.accum])
               for s in range(step, end) for part in range(args.accum))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    workers = 0 if args.data == "toy" else min(16, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    return iter(DataLoader(stream, batch_sampler=batches, collate_fn=list, worker_init_fn=ignore_signals,
                           num_workers=workers if args.workers is None else args.workers))


def ignore_signals(_):
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def main(argv=None):
    args = parse(argv, {**TRAINING, **SETTINGS}, out="runs/detect")
    if args.download or args.long_tail or args.fraction < 1:
        raise UserError("--download, --long-tail, --fraction: not here")
    if args.patch_size.bit_count() != 1 or args.img_size % (2 * args.patch_size):
        raise UserError(f"--patch-size {args.patch_size}: not a power of 2 that divides half of --img-size")
    return evaluate_only(args) if args.eval_only else train(args)


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
