"""The Vision Transformer, the loading of published weights, and a toy data set to try things on.

An image is cut into patches, each patch becomes a token, a class token joins them, and a stack of blocks lets the
tokens look at each other (Dosovitskiy et al., 2021). This file is the network that every script here trains: ViT-Tiny
with 12 heads instead of DeiT's 3 (A Closer Look at Self-Supervised Lightweight Vision Transformers, ICML 2023, Sec. 2).

    import vit
    model = vit.vit_tiny(num_classes=1000)                      # 5.7M parameters
    print(vit.load_weights(model, "mae_tiny.pth"))              # any published format; says what did not fit
    logits = model(images)                                      # (B, 3, 224, 224) -> (B, 1000)
    maps = vit.attention_maps(model, images)                    # (12, B, 12, 197, 197)

Shapes in the comments: B images, L patches, N = L + 1 tokens, D width, h heads.
"""
import argparse
import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


# ------------------------------------------------------------------------------------------------ the network

class Attention(nn.Module):
    """Multi-head self-attention over the tokens of one image."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, return_scores=False):
        """`(B, N, D) -> (B, N, D)` and, if asked for, the pre-softmax scores `A = q k^T / sqrt(d)`, `(B, h, N, N)`."""
        B, N, D = x.shape
        q, k, v = self.qkv(x).view(B, N, 3, self.num_heads, D // self.num_heads).permute(2, 0, 3, 1, 4)  # (B, h, N, d)
        if return_scores:  # the explicit way: the scores exist as a tensor
            with torch.autocast(x.device.type, enabled=False):  # in float32 or wider, whatever the rest runs in
                wide = torch.promote_types(q.dtype, torch.float32)
                scores = (q.to(wide) * q.shape[-1] ** -0.5) @ k.to(wide).transpose(-2, -1)               # (B, h, N, N)
            x = scores.softmax(dim=-1).to(v.dtype) @ v
        else:              # the fast way: they never do
            scores, x = None, F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(B, N, D)), scores


class Mlp(nn.Module):
    """Two linear layers with a GELU between, applied to each token by itself."""

    def __init__(self, dim, hidden_dim):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block; while training, each residual branch is skipped per image with probability `drop_path`."""

    def __init__(self, dim, num_heads, mlp_ratio=4, drop_path=0.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = drop_path

    def stochastic_depth(self, branch):
        """Drops whole images' branches and rescales the rest, so that the expectation stays (Huang et al., 2016)."""
        if not self.training or self.drop_path == 0:
            return branch
        kept = 1 - self.drop_path
        return branch * torch.empty(len(branch), 1, 1, device=branch.device).bernoulli_(kept).to(branch.dtype) / kept

    def forward(self, x, return_scores=False):
        attended, scores = self.attn(self.norm1(x), return_scores)
        x = x + self.stochastic_depth(attended)
        x = x + self.stochastic_depth(self.mlp(self.norm2(x)))
        return x, scores


class PatchEmbed(nn.Module):
    """One linear map of each `patch_size x patch_size` patch: `(B, C, H, W) -> (B, L, D)`, patches in raster order."""

    def __init__(self, patch_size, in_chans, embed_dim):
        super().__init__()
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, images):
        return self.proj(images).flatten(2).transpose(1, 2)


class Extras(NamedTuple):
    attention: dict  # {block index: pre-softmax scores (B, h, N, N)}
    hidden: list     # depth + 1 states (B, N, D): what enters each block, and what leaves the last


class VisionTransformer(nn.Module):
    """Vision Transformer with a fixed 2-D sin-cos position embedding; parameter names are timm's.

    `global_pool`: "avg" means the patch tokens, then normalises (`fc_norm`); "token" normalises, then takes the class
    token (`norm`). `num_classes=0` leaves out the head: the model then returns the pooled feature `(B, D)`.
    ValueError when a size does not divide.
    """

    def __init__(self, img_size=224, patch_size=16, in_chans=3, embed_dim=192, depth=12, num_heads=12, mlp_ratio=4,
                 num_classes=0, global_pool="avg", drop_path=0.0):
        super().__init__()
        if img_size % patch_size:
            raise ValueError(f"patch size {patch_size} does not divide image size {img_size}")
        if embed_dim % num_heads or embed_dim % 4:
            raise ValueError(f"width {embed_dim} is not divisible by {num_heads} heads and by 4")
        if global_pool not in ("avg", "token"):
            raise ValueError(f'global_pool is "avg" or "token", not {global_pool!r}')
        self.patch_size, self.grid, self.embed_dim, self.global_pool = patch_size, img_size // patch_size, embed_dim, global_pool
        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(sincos_position(embed_dim, self.grid), requires_grad=False)  # (1, N, D), not trained
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, mlp_ratio, drop_path * i / max(depth - 1, 1)) for i in range(depth))
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6) if global_pool == "token" else nn.Identity()
        self.fc_norm = nn.LayerNorm(embed_dim, eps=1e-6) if global_pool == "avg" else nn.Identity()
        self.head = nn.Linear(embed_dim, num_classes) if num_classes else nn.Identity()
        nn.init.normal_(self.cls_token, std=0.02)
        init_weights(self)

    def embed(self, images):
        """Patch embedding plus position, without class token: `(B, C, H, W) -> (B, L, D)`; any H, W the patch divides."""
        H, W = images.shape[-2:]
        if H % self.patch_size or W % self.patch_size:
            raise ValueError(f"patch size {self.patch_size} does not divide images of {H} x {W}")
        position = resize_position(self.pos_embed, (H // self.patch_size, W // self.patch_size))
        return self.patch_embed(images) + position[:, 1:]

    def encode(self, tokens, attention=(), hidden=False):
        """The blocks over a class token and any subset of the patches, `(B, n, D) -> (B, n + 1, D)`, before the final norm.

        `attention`: indices of blocks whose pre-softmax scores are wanted; only these leave the fast attention path.
        Returns `x`, or `(x, extras)` when scores or hidden states are asked for. ValueError for a block not there.
        """
        if not set(attention) <= set(range(len(self.blocks))):
            raise ValueError(f"blocks are 0 to {len(self.blocks) - 1}, not {sorted(attention)}")
        cls_token = (self.cls_token + self.pos_embed[:, :1]).expand(len(tokens), -1, -1)
        x = torch.cat([cls_token, tokens], dim=1)                                                        # (B, n + 1, D)
        extras = Extras({}, [x] if hidden else [])
        for i, block in enumerate(self.blocks):
            x, scores = block(x, i in attention)
            if scores is not None:
                extras.attention[i] = scores
            if hidden:
                extras.hidden.append(x)
        return (x, extras) if hidden or attention else x

    def pool(self, x):
        """`(B, N, D) -> (B, D)`: the mean of the patch tokens, or the class token, normalised."""
        return self.fc_norm(x[:, 1:].mean(dim=1)) if self.global_pool == "avg" else self.norm(x)[:, 0]

    def forward(self, images):
        return self.head(self.pool(self.encode(self.embed(images))))


def vit_toy(**kw):
    """Width 96, 6 blocks, 12 heads: 0.7M parameters, for two cores."""
    return VisionTransformer(**{"embed_dim": 96, "depth": 6, "num_heads": 12, **kw})


def vit_tiny(**kw):
    """Width 192, 12 blocks, 12 heads (the study's; DeiT-Tiny has 3): 5.7M parameters."""
    return VisionTransformer(**{"embed_dim": 192, "depth": 12, "num_heads": 12, **kw})


def vit_small(**kw):
    """Width 384, 12 blocks, 12 heads: 22M parameters."""
    return VisionTransformer(**{"embed_dim": 384, "depth": 12, "num_heads": 12, **kw})


def vit_base(**kw):
    """Width 768, 12 blocks, 12 heads: 86M parameters."""
    return VisionTransformer(**{"embed_dim": 768, "depth": 12, "num_heads": 12, **kw})


ARCHS = {"toy": vit_toy, "tiny": vit_tiny, "small": vit_small, "base": vit_base}


@torch.no_grad()
def attention_maps(model, images, layers=None):
    """Softmaxed attention of blocks `layers` (default: all), `(len(layers), B, h, N, N)` in float32 or wider."""
    layers = list(range(len(model.blocks))) if layers is None else list(layers)
    _, extras = model.encode(model.embed(images), attention=layers)
    return torch.stack([F.softmax(extras.attention[i], -1, torch.promote_types(images.dtype, torch.float32)) for i in layers])


# ------------------------------------------------------------------------------- position, initialisation

def sincos_position(dim, grid):
    """2-D sin-cos table `(1, 1 + grid * grid, dim)`; the class token's row is zero (MAE, MoCo-v3).

    The first half of the channels encodes the column, the second the row; each half is sines, then cosines, at
    frequencies `1 / 10000^(i / (dim / 4))`.
    """
    omega = 10000 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    row, column = torch.meshgrid(*[torch.arange(grid, dtype=torch.float64)] * 2, indexing="ij")
    angles = [axis.reshape(-1, 1) * omega for axis in (column, row)]                                     # (L, dim / 4)
    table = torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], dim=1)             # (L, dim)
    return F.pad(table, (0, 0, 1, 0))[None].float()


def resize_position(table, grid):
    """The position table `(1, 1 + L, D)` of a square grid, bicubically interpolated to `grid = (rows, columns)`."""
    side = math.isqrt(table.shape[1] - 1)
    if tuple(grid) == (side, side):
        return table
    patches = table[:, 1:].view(1, side, side, -1).permute(0, 3, 1, 2)                                   # (1, D, side, side)
    patches = F.interpolate(patches, size=tuple(grid), mode="bicubic", align_corners=False)
    return torch.cat([table[:, :1], patches.flatten(2).transpose(1, 2)], dim=1)


def init_weights(model):
    """Xavier-uniform matrices (the patch embedding counted as one), zero biases, as MAE does."""
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            nn.init.xavier_uniform_(module.weight.data.view(len(module.weight), -1))
            if module.bias is not None:
                nn.init.zeros_(module.bias)


# ------------------------------------------------------------------------------------------------ weights

class WeightsError(ValueError):
    """A checkpoint that cannot be read or does not fit; the message names the file or the tensor."""


class LoadReport(NamedTuple):
    missing: list  # tensors of the model that the file has not: they keep their initial values
    unused: list   # tensors of the file that the model has no place for

    def __str__(self):
        return (f"initialised afresh: {', '.join(self.missing) or 'nothing'}; "
                f"unused in the file: {', '.join(self.unused) or 'nothing'}")


def read_weights(path_or_state, branch="base_encoder"):
    """The encoder's tensors of a checkpoint under timm's names, and the names of the rest, `(state, others)`.

    Reads MAE, MAE-Lite, MoCo-v3, DeiT, timm and this project's checkpoints, from a path or already loaded. The encoder
    is found by its patch embedding, whatever the prefix; where a file has two (MoCo-v3), `branch` names one of them.
    WeightsError for what is not a checkpoint, or holds no Vision Transformer.
    """
    name, state = "the state dict", path_or_state
    if not isinstance(path_or_state, dict):
        name = str(path_or_state)
        try:
            with torch.serialization.safe_globals([argparse.Namespace]):  # published files keep their settings in one
                state = torch.load(path_or_state, map_location="cpu", weights_only=True)
        except OSError as error:
            raise WeightsError(f"{name}: cannot be opened ({error.strerror})") from None
        except Exception as error:  # torch.load fails in many ways on what is not a checkpoint
            raise WeightsError(f"{name}: not a PyTorch checkpoint ({str(error).splitlines()[0]})") from None
    for key in ("model", "state_dict"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    anchor = "patch_embed.proj.weight"
    prefixes = [key[:-len(anchor)] for key in state if key.endswith(anchor)] if isinstance(state, dict) else []
    if len(prefixes) > 1:
        prefixes = [prefix for prefix in prefixes if branch in prefix]
    if len(prefixes) != 1:
        raise WeightsError(f"{name}: holds no Vision Transformer ({anchor} is missing, or there is no {branch!r} among several)")
    prefix = prefixes[0]
    return ({key[len(prefix):]: tensor for key, tensor in state.items() if key.startswith(prefix)},
            [key for key in state if not key.startswith(prefix)])


def load_weights(model, path_or_state, branch="base_encoder"):
    """Fills a VisionTransformer from a published or own checkpoint; returns `LoadReport(missing, unused)`.

    The position embedding is interpolated to the model's grid. What may differ is the end of the network (`norm`,
    `fc_norm`, `head`: a head of another size is initialised afresh) and what pre-training leaves behind (decoder, mask
    token, projector). WeightsError, naming the tensor and both shapes, for anything else.
    """
    state, others = read_weights(path_or_state, branch)
    own = model.state_dict()
    if "pos_embed" in state and state["pos_embed"].shape[-1] == own["pos_embed"].shape[-1] \
            and math.isqrt(state["pos_embed"].shape[1] - 1) ** 2 == state["pos_embed"].shape[1] - 1:
        state["pos_embed"] = resize_position(state["pos_embed"].float(), (model.grid, model.grid))
    fitting = {}
    for key, tensor in state.items():
        if key in own and tensor.shape == own[key].shape:
            fitting[key] = tensor
        elif key in own and not key.startswith("head."):
            raise WeightsError(f"{key}: {tuple(tensor.shape)} in the file, {tuple(own[key].shape)} in the model")
    missing, unused = [key for key in own if key not in fitting], [key for key in state if key not in fitting]
    for key in missing + unused:
        if not key.startswith(("norm.", "fc_norm.", "head", "pre_logits.", "decoder_", "mask_token")):
            raise WeightsError(f"{key}: {tuple(own[key].shape)} in the model, none in the file" if key in own else
                             f"{key}: {tuple(state[key].shape)} in the file, none in the model")
    model.load_state_dict(fitting, strict=False)
    return LoadReport(missing, unused + others)


def from_weights(path_or_state, num_heads=None, branch="base_encoder", **kw):
    """A VisionTransformer whose sizes are read off a checkpoint, filled from it; returns `(model, report)`.

    Heads leave no trace in the shapes: 12, as all networks here have, unless this project's checkpoint says otherwise or
    `num_heads` does (DeiT-Tiny has 3, DeiT-Small 6). A classifier's head and pooling are kept; `kw` overrides. WeightsError
    as `load_weights`.
    """
    state, _ = read_weights(path_or_state, branch)
    width, in_chans, patch_size, _ = state["patch_embed.proj.weight"].shape
    try:
        sizes = {
            "img_size": patch_size * math.isqrt(state["pos_embed"].shape[1] - 1), "patch_size": patch_size,
            "in_chans": in_chans, "embed_dim": width, "num_heads": num_heads or own_heads(path_or_state),
            "depth": 1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks.")),
            "mlp_ratio": len(state["blocks.0.mlp.fc1.weight"]) / width,
            "num_classes": len(state["head.weight"]) if "head.weight" in state else 0,
            "global_pool": "avg" if "fc_norm.weight" in state else "token"}
    except (KeyError, ValueError):
        raise WeightsError("the checkpoint has a patch embedding but no position embedding or blocks: not a whole ViT") from None
    try:
        model = VisionTransformer(**{**sizes, **kw})
    except ValueError as error:
        raise WeightsError(f"{error}: give the number of heads") from None
    return model, load_weights(model, path_or_state, branch)


def own_heads(path_or_state):
    """The heads that one of this project's checkpoints notes in its settings, else 12."""
    checkpoint = path_or_state
    if not isinstance(checkpoint, dict):
        with torch.serialization.safe_globals([argparse.Namespace]):
            checkpoint = torch.load(path_or_state, map_location="cpu", weights_only=True)
    config = checkpoint.get("config")
    return config.get("num_heads", 12) if isinstance(config, dict) else 12


# ------------------------------------------------------------------------------------------------ toy data

TOY_CLASSES = ("circle", "crescent", "cross", "ellipse", "flower", "half disc", "ring", "square", "star", "triangle")


def toy_shapes(num_images, img_size=32, seed=0):
    """Drawn shapes: `images (n, 3, S, S)` uint8, `labels (n,)` int64, indices into TOY_CLASSES.

    One shape an image, its kind the label; position, size, angle, colours are free. Shape and background are colour
    gradients, so that a few visible patches tell how the rest must look, but only the outline tells the class. Image i
    depends on `(seed, i)`, not on how many are drawn, and shows the same scene at any size.
    """
    images = torch.empty(num_images, 3, img_size, img_size, dtype=torch.uint8)
    labels = torch.empty(num_images, dtype=torch.int64)
    for start in range(0, num_images, 256):
        rng, count = np.random.default_rng((seed, start)), min(256, num_images - start)
        kinds = torch.from_numpy(rng.integers(len(TOY_CLASSES), size=256))[:count]
        uniform = torch.from_numpy(rng.random((256, 20), dtype=np.float32))[:count]
        labels[start:start + count] = kinds
        step = max(1, 2 ** 18 // img_size ** 2)  # large images a few at a time, for the memory's sake
        for k in range(0, count, step):
            images[start + k:start + min(k + step, count)] = draw_shapes(kinds[k:k + step], uniform[k:k + step], img_size)
    return images, labels


def draw_shapes(kinds, uniform, img_size):
    """Draws scenes, `(n, 3, S, S)` uint8: classes `(n,)`, and numbers in (0, 1) for all that is free, `(n, 20)`."""
    uniform = uniform[:, :, None, None]                                                   # (n, 20, 1, 1)
    axis = (torch.arange(img_size) + 0.5) / img_size * 2 - 1                              # pixel centres in (-1, 1)
    x, y = axis[None, None, :], axis[None, :, None]
    size = 0.55 + 0.3 * uniform[:, 0]
    dx, dy = x - (uniform[:, 1] - 0.5) * 0.7, y - (uniform[:, 2] - 0.5) * 0.7             # (n, S, S)
    angle = 2 * math.pi * uniform[:, 3]
    u, v = (dx * angle.cos() + dy * angle.sin()) / size, (dy * angle.cos() - dx * angle.sin()) / size
    radius, theta = torch.hypot(u, v), torch.atan2(v, u)

    def polygon(sides):  # distance to the nearest edge of a regular polygon with corners at radius 1
        sector = 2 * math.pi / sides
        return math.cos(sector / 2) - radius * torch.cos(torch.remainder(theta, sector) - sector / 2)

    fifth = torch.remainder(theta, 2 * math.pi / 5) - math.pi / 5
    inside = {  # > 0 inside the shape, about 1 per shape radius
        "circle": 0.9 - radius,
        "crescent": torch.minimum(0.95 - radius, torch.hypot(u - 0.5, v) - 0.75),
        "cross": torch.minimum(0.95 - torch.maximum(u.abs(), v.abs()), 0.3 - torch.minimum(u.abs(), v.abs())),
        "ellipse": 0.45 * (1 - torch.hypot(u, v / 0.45)),
        "flower": 0.7 + 0.28 * torch.cos(5 * theta) - radius,
        "half disc": torch.minimum(1 - radius, u + 0.1),
        "ring": 0.22 - (radius - 0.75).abs(),
        "square": polygon(4),
        "star": 0.39 - radius * torch.cos(math.pi / 5 * 1.75 - fifth.abs()) * 0.9,
        "triangle": polygon(3),
    }
    inside = torch.stack([inside[name] for name in TOY_CLASSES], 1)[torch.arange(len(kinds)), kinds]
    alpha = (inside * size * img_size / 2 + 0.5).clamp(0, 1)[:, None]                     # one pixel of soft edge
    ramp = 0.5 + 0.45 * (x * torch.cos(angle * 3) + y * torch.sin(angle * 3))[:, None]
    ramp_inside = 0.5 + 0.45 * (x * torch.cos(angle * 5 + 1) + y * torch.sin(angle * 5 + 1))[:, None]
    background = uniform[:, 4:7] * (1 - ramp) + uniform[:, 7:10] * ramp                   # (n, 3, S, S)
    shape = uniform[:, 10:13] * (1 - ramp_inside) + uniform[:, 13:16] * ramp_inside
    dark = (uniform[:, 16:17] > 0.5).float()                                              # the two always differ in light
    background, shape = 0.5 * (background + dark), 0.5 * (shape + 1 - dark)
    return ((background * (1 - alpha) + shape * alpha) * 255).round().clamp(0, 255).to(torch.uint8)
