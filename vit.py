"""The Vision Transformer, the loading of published weights, and a toy data set for experiments.

The patches of an image become tokens, and blocks let them look at each other (Dosovitskiy et al., 2021).
ViT-Tiny has 12 heads here, not 3 (A Closer Look at Self-Supervised Lightweight ViTs, ICML 2023, Sec. 2).

    import vit
    model = vit.vit_tiny(num_classes=1000)           # 5.7M parameters
    print(vit.load_weights(model, "mae_tiny.pth"))   # any published format; says what did not fit
    logits = model(images)                           # (B, 3, 224, 224) -> (B, 1000)
    maps = vit.attention_maps(model, images)         # (12, B, 12, 197, 197)

Shapes in the comments: B images, L patches, N = L + 1 tokens, D width, h heads, d = D / h.
"""
import argparse
import functools
import itertools
import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


class InputError(ValueError):
    """Sizes that do not divide, or a checkpoint that does not fit; one line that says which."""


# ------------------------------------------------------------ the network

class Attention(nn.Module):
    """Multi-head self-attention over the tokens of one image. InputError if the heads do not divide `dim`."""

    def __init__(self, dim, num_heads):
        super().__init__()
        if dim % num_heads:
            raise InputError(f"width {dim} is not divisible by {num_heads} heads")
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def heads(self, x):
        """Queries, keys and values of each head: `(B, N, D) -> (3, B, h, N, d)`."""
        return self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)

    def scores(self, x):
        """Pre-softmax scores `q k^T / sqrt(d)`: `(B, N, D) -> (B, h, N, N)`, in float32 or wider."""
        q, k, _ = self.heads(x)
        dtype = torch.promote_types(q.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            return (q.to(dtype) * q.shape[-1] ** -0.5) @ k.to(dtype).transpose(-2, -1)

    def forward(self, x):
        """`(B, N, D) -> (B, N, D)`."""
        q, k, v = self.heads(x)
        x = F.scaled_dot_product_attention(q, k, v)  # softmax(scores) @ v, scores never stored
        return self.proj(x.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Pre-norm transformer block; in training, an image skips each branch with probability `drop_path`."""

    def __init__(self, dim, num_heads, mlp_ratio=4, drop_path=0.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.Sequential()  # applied to each token independently
        self.mlp.fc1 = nn.Linear(dim, int(dim * mlp_ratio))
        self.mlp.act = nn.GELU()
        self.mlp.fc2 = nn.Linear(int(dim * mlp_ratio), dim)
        self.drop_path = drop_path

    def stochastic_depth(self, branch):
        """Zeroes whole images' branches, `(B, N, D)`; the mean stays (Huang et al., 2016)."""
        if not self.training or self.drop_path == 0:
            return branch
        mask = torch.empty(len(branch), 1, 1, device=branch.device).bernoulli_(1 - self.drop_path)
        return branch * mask.to(branch.dtype) / (1 - self.drop_path)

    def forward(self, x):
        x = x + self.stochastic_depth(self.attn(self.norm1(x)))
        return x + self.stochastic_depth(self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    """One linear map of each square patch: `(B, C, H, W) -> (B, L, D)`, patches row by row."""

    def __init__(self, patch_size, in_chans, embed_dim):
        super().__init__()
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, images):
        return self.proj(images).flatten(2).transpose(1, 2)


class Extras(NamedTuple):
    attention: dict  # {block index: pre-softmax scores (B, h, N, N)}
    hidden: list     # depth + 1 states (B, N, D): the input of each block, the output of the last


class VisionTransformer(nn.Module):
    """Vision Transformer with a 2-D sin-cos position embedding; parameter names are timm's.

    The position is fixed unless `model.pos_embed.requires_grad_(True)`. `global_pool`: "avg" averages
    the patches, then normalizes (`fc_norm`); "token" normalizes (`norm`), then takes the class token.
    `num_classes=0`: no head, the pooled feature `(B, D)`. InputError when a size does not divide.
    """

    def __init__(self, img_size=224, patch_size=16, in_chans=3, embed_dim=192, depth=12,
                 num_heads=12, mlp_ratio=4, num_classes=0, global_pool="avg", drop_path=0.0):
        super().__init__()
        if img_size % patch_size:
            raise InputError(f"patch size {patch_size} does not divide image size {img_size}")
        if global_pool not in ("avg", "token"):
            raise InputError(f'global_pool is "avg" or "token", not {global_pool!r}')
        self.patch_size = patch_size
        self.grid = img_size // patch_size
        self.embed_dim = embed_dim
        self.global_pool = global_pool
        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(sincos_position(embed_dim, self.grid), requires_grad=False)
        rates = [drop_path * i / max(depth - 1, 1) for i in range(depth)]
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, mlp_ratio, rate) for rate in rates)
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6) if global_pool == "token" else nn.Identity()
        self.fc_norm = nn.LayerNorm(embed_dim, eps=1e-6) if global_pool == "avg" else nn.Identity()
        self.head = nn.Linear(embed_dim, num_classes) if num_classes else nn.Identity()
        nn.init.normal_(self.cls_token, std=0.02)
        init_weights(self)

    def embed(self, images):
        """Patches plus position, no class token: `(B, C, H, W) -> (B, L, D)`. InputError as above."""
        H, W = images.shape[-2:]
        if H % self.patch_size or W % self.patch_size:
            raise InputError(f"patch size {self.patch_size} does not divide images of {H} x {W}")
        position = resize_position(self.pos_embed, (H // self.patch_size, W // self.patch_size))
        return self.patch_embed(images) + position[:, 1:]

    def encode(self, tokens, attention=(), hidden=False):
        """Runs the blocks on a class token and any subset of the patches: `(B, n, D) -> (B, n + 1, D)`.

        Returns `x`, before the final norm, or `(x, extras)`: with `attention=(0, 11)` the scores of these
        blocks, with `hidden=True` all states. InputError for a block not there.
        """
        if not set(attention) <= set(range(len(self.blocks))):
            raise InputError(f"blocks are 0 to {len(self.blocks) - 1}, not {sorted(attention)}")
        cls_token = self.cls_token + self.pos_embed[:, :1]
        x = torch.cat([cls_token.expand(len(tokens), -1, -1), tokens], dim=1)
        extras = Extras({}, [x] if hidden else [])
        for i, block in enumerate(self.blocks):
            if i in attention:
                extras.attention[i] = block.attn.scores(block.norm1(x))
            x = block(x)
            if hidden:
                extras.hidden.append(x)
        return (x, extras) if hidden or attention else x

    def pool(self, x):
        """`(B, N, D) -> (B, D)`: the mean of the patch tokens, or the class token, normalized."""
        return self.fc_norm(x[:, 1:].mean(dim=1)) if self.global_pool == "avg" else self.norm(x)[:, 0]

    def forward(self, images):
        return self.head(self.pool(self.encode(self.embed(images))))


# 0.7M (for a laptop), 5.7M, 22M and 86M parameters; always 12 heads (DeiT: 3 in Tiny, 6 in Small)
vit_toy = functools.partial(VisionTransformer, embed_dim=96, depth=6)
vit_tiny = functools.partial(VisionTransformer, embed_dim=192, depth=12)
vit_small = functools.partial(VisionTransformer, embed_dim=384, depth=12)
vit_base = functools.partial(VisionTransformer, embed_dim=768, depth=12)
ARCHS = {"toy": vit_toy, "tiny": vit_tiny, "small": vit_small, "base": vit_base}


@torch.no_grad()
def attention_maps(model, images, layers=None):
    """Softmaxed attention of blocks `layers` (default: all): `(len(layers), B, h, N, N)`."""
    layers = range(len(model.blocks)) if layers is None else layers
    _, extras = model.encode(model.embed(images), attention=layers)
    return torch.stack([extras.attention[i].softmax(dim=-1) for i in layers])


def sincos_position(dim, grid):
    """2-D sin-cos table `(1, 1 + grid * grid, dim)`; the class token's row is zero (MAE, MoCo-v3).

    The first half of the channels encodes the column, the second the row; each half is sines, then
    cosines, at frequencies `1 / 10000^(i / (dim / 4))`.
    """
    if dim % 4:
        raise InputError(f"width {dim} is not divisible by 4, as the position table needs")
    omega = 10000 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angle = torch.arange(grid)[:, None] * omega  # (grid, dim / 4)
    wave = torch.cat([angle.sin(), angle.cos()], dim=1)  # (grid, dim / 2)
    column, row = wave.repeat(grid, 1), wave.repeat_interleave(grid, dim=0)  # (L, dim / 2)
    return F.pad(torch.cat([column, row], dim=1), (0, 0, 1, 0))[None].float()


def resize_position(table, grid):
    """The table `(1, 1 + L, D)` of a square grid, bicubically resized to `grid = (rows, columns)`."""
    side = math.isqrt(table.shape[1] - 1)
    if tuple(grid) == (side, side) or table.shape[1] != 1 + side * side:  # or no such table
        return table
    patches = table[:, 1:].view(1, side, side, -1).permute(0, 3, 1, 2)  # (1, D, side, side)
    patches = F.interpolate(patches, size=tuple(grid), mode="bicubic", align_corners=False)
    return torch.cat([table[:, :1], patches.flatten(2).transpose(1, 2)], dim=1)


def init_weights(model, scheme="xavier"):
    """Initializes all linear layers and convolutions in `model`; biases become zero.

    "xavier": uniform, the patch embedding as a matrix (MAE). "truncated": normal, standard deviation
    0.02, also a VisionTransformer's class token and position (DeiT). KeyError for another name.
    """
    schemes = {"xavier": nn.init.xavier_uniform_, "truncated": lambda w: nn.init.trunc_normal_(w, std=0.02)}
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            schemes[scheme](module.weight.data.view(len(module.weight), -1))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    if scheme == "truncated" and isinstance(model, VisionTransformer):
        schemes[scheme](model.cls_token)
        schemes[scheme](model.pos_embed)


# ------------------------------------------------------------ weights

class LoadReport(NamedTuple):
    missing: list  # tensors of the model that are not in the file: they keep their initial values
    unused: list   # tensors of the file that the model has no place for

    def __str__(self):
        texts = []
        for names in self:  # "head.weight, head.bias, decoder_blocks.0.norm1.weight and 11 more"
            groups = [list(group) for _, group in itertools.groupby(names, lambda name: name.split(".")[0])]
            parts = [", ".join(g) if len(g) < 3 else f"{g[0]} and {len(g) - 1} more" for g in groups]
            texts.append(", ".join(parts) or "nothing")
        return "randomly initialized: {}; unused in the file: {}".format(*texts)


class Weights(NamedTuple):
    name: str     # of the file, for messages
    state: dict   # the encoder's tensors under timm's names
    others: list  # names of the file's other tensors
    config: dict  # settings of the run, in this project's checkpoints


def read_weights(path_or_state, branch="base_encoder"):
    """Reads a checkpoint, from a path or loaded already, and finds its encoder: `Weights`. InputError.

    Of several encoders: the one `branch` names (MoCo-v3), the teacher (DINO), the student (MAE-Lite).
    """
    if isinstance(path_or_state, Weights):
        return path_or_state
    name, checkpoint = "the state dict", path_or_state
    if not isinstance(path_or_state, dict):
        name = str(path_or_state)
        number = np.float64(0).__reduce__()[0]  # published files also hold numpy floats and a Namespace
        numpy = [np.dtype, type(np.dtype(float)), number, (number, "numpy.core.multiarray.scalar")]
        try:
            with torch.serialization.safe_globals([argparse.Namespace, *numpy]):
                checkpoint = torch.load(path_or_state, map_location="cpu", weights_only=True)
        except Exception as error:  # torch.load fails in many ways
            reason = getattr(error, "strerror", None) or "not a PyTorch checkpoint"
            raise InputError(f"{name}: cannot be opened ({reason})") from None
    checkpoint = checkpoint if isinstance(checkpoint, dict) else {}
    inner = [checkpoint.get(key) for key in ("model", "state_dict", "teacher")]
    tensors = next((part for part in inner if isinstance(part, dict)), checkpoint)
    tensors = {str(k).removeprefix("module."): v for k, v in tensors.items() if torch.is_tensor(v)}
    anchor = "patch_embed.proj.weight"
    prefixes = [key.removesuffix(anchor) for key in tensors if key.endswith(anchor)]
    for start in (branch, "teacher", "model."):
        prefixes = [prefix for prefix in prefixes if prefix.startswith(start)] or prefixes
    if len(prefixes) != 1:
        raise InputError(f"{name}: holds no Vision Transformer (no {anchor}), or several but no {branch!r}")
    prefix = prefixes[0]
    state = {key.removeprefix(prefix): tensors[key] for key in tensors if key.startswith(prefix)}
    for key, ndim in ((anchor, 4), ("pos_embed", 3), ("blocks.0.mlp.fc1.weight", 2)):
        if key not in state or state[key].ndim != ndim or 0 in state[key].shape:
            raise InputError(f"{name}: holds no Vision Transformer ({key} is missing or not {ndim}-D)")
    config = checkpoint["config"] if isinstance(checkpoint.get("config"), dict) else {}
    return Weights(name, state, [key for key in tensors if not key.startswith(prefix)], config)


def load_weights(model, path_or_state, branch="base_encoder"):
    """Fills a VisionTransformer from a checkpoint, position interpolated: `LoadReport(missing, unused)`.

    What may differ is the end of the network (`norm`, `fc_norm`, `head`), the rest of pre-training (decoder,
    mask token) and what detection changes (class token, relative positions); else InputError.
    """
    weights = read_weights(path_or_state, branch)
    state, own = dict(weights.state), model.state_dict()
    state["pos_embed"] = resize_position(state["pos_embed"].float(), (model.grid, model.grid))
    fitting = {k: v for k, v in state.items() if k in own and v.shape == own[k].shape}
    missing = [key for key in own if key not in fitting]
    unused = [key for key in state if key not in fitting]
    optional = ("norm.", "fc_norm.", "head", "pre_logits.", "decoder_", "mask_token", "cls_token")
    for key in missing + unused:
        there, here = [tuple(part[key].shape) if key in part else "none" for part in (state, own)]
        may_differ = optional if "none" in (there, here) else "head."
        if not key.startswith(may_differ) and ".rel_pos_" not in key:
            raise InputError(f"{weights.name}: {key}: {there} in the file, {here} in the model")
    model.load_state_dict(fitting, strict=False)
    return LoadReport(missing, unused + weights.others)


def from_weights(path_or_state, num_heads=None, branch="base_encoder", **kw):
    """A VisionTransformer as large as a checkpoint's, filled from it: `(model, report)`. InputError.

    The number of heads cannot be inferred from tensor shapes: it is `num_heads`, or what the settings in
    the checkpoint say, or 12 (DeiT-Tiny has 3, DeiT-Small 6). `kw` overrides the other arguments.
    """
    weights = read_weights(path_or_state, branch)
    state = weights.state
    width, in_chans, patch_size, _ = state["patch_embed.proj.weight"].shape
    sizes = {
        "img_size": patch_size * math.isqrt(state["pos_embed"].shape[1] - 1), "patch_size": patch_size,
        "in_chans": in_chans, "embed_dim": width, "mlp_ratio": len(state["blocks.0.mlp.fc1.weight"]) / width,
        "depth": len({key.split(".")[1] for key in state if key.startswith("blocks.")}),
        "num_heads": num_heads or weights.config.get("num_heads") or 12,
        "num_classes": len(state["head.weight"]) if "head.weight" in state else 0,
        "global_pool": "avg" if "fc_norm.weight" in state else "token"}
    try:
        model = VisionTransformer(**{**sizes, **kw})
    except InputError as error:
        raise InputError(f"{weights.name}: {error}") from None
    return model, load_weights(model, weights)


# ------------------------------------------------------------ toy data

TOY_CLASSES = (
    "circle", "crescent", "cross", "ellipse", "flower", "half disc", "ring", "square", "star", "triangle")


class ToyShapes(torch.utils.data.Dataset):
    """Synthetic shapes: 8,192 images for training (seed 0) or 1,024 for validation (seed 1).

    `data[i] -> (image (3, S, S) uint8, label)`; `targets` and `classes` as torchvision's data sets.
    """

    def __init__(self, train, img_size=32):
        self.images, labels = toy_shapes(8192 if train else 1024, img_size, seed=0 if train else 1)
        self.targets = labels.tolist()
        self.classes = list(TOY_CLASSES)

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, i):
        return self.images[i], self.targets[i]


def toy_shapes(num_images, img_size=32, seed=0):
    """One shape an image: `images (n, 3, S, S)` uint8, `labels (n,)` int64, indices of TOY_CLASSES.

    Shape and background are color gradients: a few patches tell how the rest must look, but only the
    outline tells the class. Image i depends on `(seed, i)` alone, and is the same scene at any size.
    """
    rngs = [np.random.default_rng((seed, start)) for start in range(0, num_images, 256)]
    labels = torch.cat([torch.from_numpy(rng.integers(len(TOY_CLASSES), size=256)) for rng in rngs])
    uniform = torch.cat([torch.from_numpy(rng.random((256, 20), dtype=np.float32)) for rng in rngs])
    few = max(1, 2 ** 18 // img_size ** 2)  # images at a time, to bound the memory
    parts = zip(labels[:num_images].split(few), uniform[:num_images].split(few))
    return torch.cat([draw_shapes(*part, img_size)[0] for part in parts]), labels[:num_images]


def draw_shapes(labels, uniform, img_size):
    """Draws one shape an image: `images (n, 3, S, S)` uint8 and the shapes' masks `(n, S, S)` bool.

    `uniform (n, 20)`, in (0, 1), sets size, center, angle and colors of shapes of classes `labels`.
    """
    uniform = uniform[:, :, None, None]  # (n, 20, 1, 1)
    axis = (torch.arange(img_size) + 0.5) / img_size * 2 - 1  # pixel centers in (-1, 1)
    x, y = axis[None, None, :], axis[None, :, None]
    size = 0.55 + 0.3 * uniform[:, 0]
    dx, dy = x - (uniform[:, 1] - 0.5) * 0.7, y - (uniform[:, 2] - 0.5) * 0.7  # (n, S, S)
    angle = 2 * math.pi * uniform[:, 3]
    u, v = (dx * angle.cos() + dy * angle.sin()) / size, (dy * angle.cos() - dx * angle.sin()) / size
    radius, theta = torch.hypot(u, v), torch.atan2(v, u)
    wedge = {k: torch.remainder(theta, 2 * math.pi / k) - math.pi / k for k in (3, 4, 5)}  # 0 in its middle
    inside = torch.stack([  # in TOY_CLASSES' order: > 0 inside, about 1 per shape radius
        0.9 - radius,
        torch.minimum(0.95 - radius, torch.hypot(u - 0.5, v) - 0.75),
        torch.minimum(0.95 - torch.maximum(u.abs(), v.abs()), 0.3 - torch.minimum(u.abs(), v.abs())),
        0.45 * (1 - torch.hypot(u, v / 0.45)),
        0.7 + 0.28 * torch.cos(5 * theta) - radius,
        torch.minimum(1 - radius, u + 0.1),
        0.22 - (radius - 0.75).abs(),
        math.cos(math.pi / 4) - radius * torch.cos(wedge[4]),
        0.39 - radius * torch.cos(math.pi / 5 * 1.75 - wedge[5].abs()) * 0.9,
        math.cos(math.pi / 3) - radius * torch.cos(wedge[3])])[labels, torch.arange(len(labels))]
    alpha = (inside * size * img_size / 2 + 0.5).clamp(0, 1)[:, None]  # one pixel of soft edge
    ramps = [0.5 + 0.45 * (x * a.cos() + y * a.sin())[:, None] for a in (angle * 3, angle * 5 + 1)]
    background = uniform[:, 4:7] * (1 - ramps[0]) + uniform[:, 7:10] * ramps[0]  # (n, 3, S, S)
    shape = uniform[:, 10:13] * (1 - ramps[1]) + uniform[:, 13:16] * ramps[1]
    dark = (uniform[:, 16:17] > 0.5).float()  # object and background always differ in brightness
    background, shape = 0.5 * (background + dark), 0.5 * (shape + 1 - dark)
    images = ((background * (1 - alpha) + shape * alpha) * 255).round().clamp(0, 255).to(torch.uint8)
    return images, alpha[:, 0] >= 0.5
