"""The Vision Transformer, the loading of published weights, and a toy data set for experiments.

Patches of an image become tokens, and blocks let them look at each other (Dosovitskiy et al.,
2021). ViT-Tiny has 12 heads here, not 3 (A Closer Look at ... Lightweight ViTs, ICML 2023, Sec. 2).

    import vit
    model = vit.vit_tiny(num_classes=1000)            # 5.7M parameters
    print(vit.load_weights(model, "mae_tiny.pth"))    # any published format
    logits = model((pixels - vit.MEAN) / vit.STD)     # (B, 3, 224, 224), 0 to 255 -> (B, 1000)
    maps = vit.attention_maps(model, images)          # (12, B, 12, 197, 197)

Shapes: B images, L patches, N = L + 1 tokens, D width, h heads, d = D / h.
"""
import argparse
import functools
import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

MEAN = 255 * torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)  # ImageNet's, of pixels 0 to 255
STD = 255 * torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


class InputError(ValueError):
    """An input that does not fit: a size, a file, an option. One line says which."""


# ---------- the network

class Attention(nn.Module):
    """Multi-head self-attention. Raises InputError if `num_heads` does not divide `dim`."""

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
        """Pre-softmax scores `q k^T / sqrt(d)`, float32 or wider: `(B, N, D) -> (B, h, N, N)`."""
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
    """Transformer block. In training, an image skips each branch with probability `drop_path`."""

    def __init__(self, dim, num_heads, mlp_ratio=4, drop_path=0.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.Sequential()  # its layers are named as in published files
        self.mlp.fc1 = nn.Linear(dim, round(dim * mlp_ratio))
        self.mlp.act = nn.GELU()
        self.mlp.fc2 = nn.Linear(round(dim * mlp_ratio), dim)
        self.drop_path = drop_path

    def stochastic_depth(self, branch):
        """Zeroes whole images of a branch `(B, N, D)`; the mean stays (Huang et al., 2016)."""
        if not self.training or self.drop_path == 0:
            return branch
        mask = torch.empty(len(branch), 1, 1, device=branch.device).bernoulli_(1 - self.drop_path)
        return branch * mask.to(branch.dtype) / (1 - self.drop_path)

    def forward(self, x):
        x = x + self.stochastic_depth(self.attn(self.norm1(x)))
        return x + self.stochastic_depth(self.mlp(self.norm2(x)))


class VisionTransformer(nn.Module):
    """Vision Transformer with a 2-D sin-cos position embedding; parameter names are timm's.

    The position is fixed unless `model.pos_embed.requires_grad_(True)`. `global_pool`: "avg", the
    mean of the patches, then `fc_norm`; "token", `norm`, then the class token. `num_classes=0`: no
    head, the pooled feature `(B, D)`. Raises InputError for sizes that do not divide.
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
        self.patch_embed = nn.Sequential()  # one linear map of each patch; timm's names
        self.patch_embed.proj = nn.Conv2d(in_chans, embed_dim, patch_size, stride=patch_size)
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
        """Patches plus position, no class token: `(B, C, H, W) -> (B, L, D)`."""
        H, W = images.shape[-2:]
        if H % self.patch_size or W % self.patch_size:
            raise InputError(f"patch size {self.patch_size} does not divide images of {H} x {W}")
        position = resize_position(self.pos_embed, (H // self.patch_size, W // self.patch_size))
        return self.patch_embed(images).flatten(2).transpose(1, 2) + position[:, 1:]

    def states(self, tokens):
        """Yields the input of each block, then the output of the last, all `(B, 1 + n, D)`."""
        cls_token = self.cls_token + self.pos_embed[:, :1]
        x = torch.cat([cls_token.expand(len(tokens), -1, -1), tokens], dim=1)
        yield x
        for block in self.blocks:
            x = block(x)
            yield x

    def encode(self, tokens):
        """Class token and any n patches through all blocks: `(B, n, D) -> (B, 1 + n, D)`."""
        for x in self.states(tokens):  # only the last is kept
            pass
        return x

    def pool(self, x):
        """`(B, N, D) -> (B, D)`: the normalized mean of the patches, or the class token."""
        if self.global_pool == "avg":
            return self.fc_norm(x[:, 1:].mean(dim=1))
        return self.norm(x[:, 0])

    def forward(self, images):
        return self.head(self.pool(self.encode(self.embed(images))))


# 0.7M (for a laptop), 5.7M, 22M and 86M parameters; 12 heads (DeiT: 3 in Tiny, 6 in Small).
vit_toy = functools.partial(VisionTransformer, embed_dim=96, depth=6)
vit_tiny = functools.partial(VisionTransformer, embed_dim=192, depth=12)
vit_small = functools.partial(VisionTransformer, embed_dim=384, depth=12)
vit_base = functools.partial(VisionTransformer, embed_dim=768, depth=12)
ARCHS = {"toy": vit_toy, "tiny": vit_tiny, "small": vit_small, "base": vit_base}


@torch.no_grad()
def attention_maps(model, images, layers=None):
    """Softmaxed attention of blocks `layers`, by default all: `(len(layers), B, h, N, N)`."""
    blocks = model.blocks
    states = list(model.states(model.embed(images)))[:-1]  # the input of each block
    layers = range(len(blocks)) if layers is None else layers
    scores = [blocks[i].attn.scores(blocks[i].norm1(states[i])) for i in layers]
    return torch.stack(scores).softmax(dim=-1)


def sincos_position(dim, grid):
    """2-D sin-cos table `(1, 1 + grid * grid, dim)`; the class token's row is zero (MAE, MoCo-v3).

    The first half of the channels encodes the column, the second the row; each half is sines, then
    cosines, at frequencies `1 / 10000^(i / (dim / 4))`. Raises InputError unless 4 divides `dim`.
    """
    if dim % 4:
        raise InputError(f"width {dim} is not divisible by 4, as the position table needs")
    omega = 10000 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angle = torch.arange(grid)[:, None] * omega  # (grid, dim / 4)
    wave = torch.cat([angle.sin(), angle.cos()], dim=1)  # (grid, dim / 2)
    column, row = wave.repeat(grid, 1), wave.repeat_interleave(grid, dim=0)  # (L, dim / 2) each
    return F.pad(torch.cat([column, row], dim=1), (0, 0, 1, 0))[None].float()


def resize_position(table, grid):
    """The table `(1, 1 + L, D)` of a square grid, resized (bicubic) to `grid = (rows, columns)`."""
    side = math.isqrt(table.shape[1] - 1)
    if tuple(grid) == (side, side) or table.shape[1] != 1 + side * side:  # fits, or is not square
        return table
    patches = table[:, 1:].view(1, side, side, -1).permute(0, 3, 1, 2)  # (1, D, side, side)
    patches = F.interpolate(patches, size=tuple(grid), mode="bicubic", align_corners=False)
    return torch.cat([table[:, :1], patches.flatten(2).transpose(1, 2)], dim=1)


def init_weights(model, scheme="xavier"):
    """Initializes all linear layers and convolutions in `model`; biases become zero.

    "xavier": uniform, the patch embedding as one matrix (MAE). "truncated": normal, standard
    deviation 0.02, also a VisionTransformer's class token and position (DeiT).
    """
    truncated = functools.partial(nn.init.trunc_normal_, std=0.02)
    initialize = {"xavier": nn.init.xavier_uniform_, "truncated": truncated}[scheme]
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            initialize(module.weight.data.flatten(1))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    if scheme == "truncated" and isinstance(model, VisionTransformer):
        initialize(model.cls_token)
        initialize(model.pos_embed)


# ---------- weights

class LoadReport(NamedTuple):
    missing: list  # tensors that the file lacks, but zero tables: they keep their initial values
    unused: list  # tensors of the file that the model has no place for

    def __str__(self):
        parts = [dict.fromkeys(name.split(".")[0] for name in names) for names in self]
        missing, unused = [", ".join(names) or "nothing" for names in parts]
        return f"randomly initialized: {missing}; unused in the file: {unused}"


def open_checkpoint(path_or_state):
    """What a file holds, and its "path"; a dict stays as it is. Raises InputError."""
    if isinstance(path_or_state, dict):
        return path_or_state
    scalar = np.float64(0).__reduce__()[0]  # published files also hold numpy numbers and settings
    harmless = [np.dtype, type(np.dtype(float)), scalar, (scalar, "numpy.core.multiarray.scalar")]
    try:
        with torch.serialization.safe_globals([argparse.Namespace, *harmless]):
            checkpoint = dict(torch.load(path_or_state, map_location="cpu", weights_only=True))
    except Exception as error:  # torch.load fails in many ways
        raise InputError(f"{path_or_state}: not a PyTorch checkpoint ({error!r:.100})") from None
    return {**checkpoint, "path": str(path_or_state)}


def find_tensors(checkpoint):
    """The tensors of "model", "state_dict" or "teacher", else of the checkpoint itself."""
    for part in ("model", "state_dict", "teacher"):
        if isinstance(checkpoint.get(part), dict):
            return find_tensors(checkpoint[part])
    tensors = {}
    for key, tensor in checkpoint.items():
        if torch.is_tensor(tensor):  # without the prefixes of DistributedDataParallel and compile
            tensors[str(key).removeprefix("module.").replace("_orig_mod.", "")] = tensor
    return tensors


def find_encoders(tensors, branch):
    """Prefixes of the encoder's names. Of several: `branch`, then DINO's teacher, or "model.".

        MAE, DeiT, timm  ""           MAE-Lite             "model." (its teacher: "tch_model.")
        mae.py           "encoder."   MoCo-v3, mocov3.py   "base_encoder.", "momentum_encoder."
        DINO             "backbone."  dino.py              "student.", "teacher."
    """
    anchor = "patch_embed.proj.weight"
    found = [key.removesuffix(anchor) for key in tensors if key.endswith(anchor)]
    for preferred in (branch, "teacher", "model."):
        found = [prefix for prefix in found if prefix.startswith(preferred)] or found
    return found


def read_weights(path_or_state, branch="base_encoder"):
    """`(name, the encoder's tensors under timm's names, names of other tensors)`, or InputError."""
    checkpoint = open_checkpoint(path_or_state)
    name = checkpoint.get("path", "the state dict")
    tensors = find_tensors(checkpoint)
    prefixes = find_encoders(tensors, branch)
    if len(prefixes) != 1:
        raise InputError(f"{name}: no Vision Transformer, or several but no {branch!r}")
    state = {k.removeprefix(prefixes[0]): tensors[k] for k in tensors if k.startswith(prefixes[0])}
    needed = {"patch_embed.proj.weight": 4, "pos_embed": 3, "blocks.0.mlp.fc1.weight": 2}
    for key, ndim in needed.items():
        if key not in state or state[key].ndim != ndim or 0 in state[key].shape:
            raise InputError(f"{name}: no Vision Transformer: {key} is missing or not {ndim}-D")
    if "dist_token" in state:  # of distilled DeiT
        state["pos_embed"] = torch.cat([state["pos_embed"][:, :1], state["pos_embed"][:, 2:]], 1)
    return name, state, [key for key in tensors if not key.startswith(prefixes[0])]


def load_weights(model, path_or_state, branch="base_encoder"):
    """Fills a VisionTransformer from a checkpoint, position interpolated: `LoadReport`.

    Model or file may lack the network's end, a decoder, the mask or class token, and detection's
    relative positions; only the head may have another shape. Raises InputError that names the rest.
    """
    name, state, others = read_weights(path_or_state, branch)
    state["pos_embed"] = resize_position(state["pos_embed"].float(), (model.grid, model.grid))
    own = model.state_dict()
    fitting = {k: v for k, v in state.items() if k in own and v.shape == own[k].shape}
    missing = [key for key in own if key not in fitting and ".rel_pos_" not in key]  # they are 0
    unused = [key for key in state if key not in fitting]
    optional = ("norm.", "fc_norm.", "head", "decoder_", "mask_token", "cls_token", "dist_token")
    for key in missing + unused:
        there = tuple(state[key].shape) if key in state else "none"
        here = tuple(own[key].shape) if key in own else "none"
        may_differ = optional if "none" in (there, here) else "head."  # or in shape
        if not key.startswith(may_differ) and ".rel_pos_" not in key:
            raise InputError(f"{name}: {key}: {there} in the file, {here} in the model")
    model.load_state_dict(fitting, strict=False)
    return LoadReport(missing, unused + others)


def from_weights(path_or_state, num_heads=None, branch="base_encoder", **kw):
    """A VisionTransformer of a checkpoint's sizes, or `kw`, filled from it: `(model, report)`."""
    checkpoint = open_checkpoint(path_or_state)
    _, state, _ = read_weights(checkpoint, branch)
    if num_heads is None:  # tensors do not tell it: pass 3 for DeiT-Tiny, 6 for DeiT-Small
        num_heads = checkpoint.get("config", {}).get("num_heads") or 12
    width, in_chans, patch_size, _ = state["patch_embed.proj.weight"].shape
    sizes = dict(
        img_size=patch_size * math.isqrt(state["pos_embed"].shape[1] - 1),
        patch_size=patch_size, in_chans=in_chans, embed_dim=width,
        depth=len({key.split(".")[1] for key in state if key.startswith("blocks.")}),
        num_heads=num_heads, mlp_ratio=len(state["blocks.0.mlp.fc1.weight"]) / width,
        num_classes=len(state["head.weight"]) if "head.weight" in state else 0,
        global_pool="avg" if "fc_norm.weight" in state else "token")
    model = VisionTransformer(**{**sizes, **kw})
    return model, load_weights(model, checkpoint, branch)


# ---------- toy data

TOY_CLASSES = ("circle", "crescent", "cross", "ellipse", "flower", "half disc", "ring", "square",
               "star", "triangle")


class ToyShapes(torch.utils.data.Dataset):
    """8,192 images for training or 1,024 for validation: `data[i] -> (uint8 (3, S, S), label)`."""

    def __init__(self, train, img_size=32):
        number, seed = (8192, 0) if train else (1024, 1)
        self.images, labels = toy_shapes(number, img_size, seed)
        self.targets = labels.tolist()
        self.classes = list(TOY_CLASSES)

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, i):
        return self.images[i], self.targets[i]


def toy_shapes(num_images, img_size=32, seed=0):
    """A shape per image: `images (n, 3, S, S)` uint8, `labels (n,)` int64, as in TOY_CLASSES.

    Shape and background are color gradients: a few patches tell how the rest must look, but only
    the outline tells the class. Image i depends on (seed, i) alone, the same scene at any size.
    """
    rngs = [np.random.default_rng((seed, start)) for start in range(0, num_images, 256)]
    labels = np.concatenate([rng.integers(len(TOY_CLASSES), size=256) for rng in rngs])
    uniform = np.concatenate([rng.random((256, 20), dtype=np.float32) for rng in rngs])
    labels, uniform = [torch.from_numpy(part[:num_images]) for part in (labels, uniform)]
    few = max(1, 2 ** 18 // img_size ** 2)  # images at a time, to bound the memory
    images = [draw_shapes(labels[i:i + few], uniform[i:i + few], img_size)[0]
              for i in range(0, num_images, few)]
    return torch.cat(images), labels


def draw_shapes(labels, uniform, img_size):
    """Draws a shape per image: `images (n, 3, S, S)` uint8, the shapes' masks `(n, S, S)` bool.

    `uniform (n, 20)`, in (0, 1), sets size, center, angle and colors of shapes of classes `labels`.
    """
    uniform = uniform[:, :, None, None]  # (n, 20, 1, 1)
    axis = (torch.arange(img_size) + 0.5) / img_size * 2 - 1  # pixel centers in (-1, 1)
    x, y = axis[None, None, :], axis[None, :, None]
    size = 0.55 + 0.3 * uniform[:, 0]
    dx, dy = x - (uniform[:, 1] - 0.5) * 0.7, y - (uniform[:, 2] - 0.5) * 0.7  # (n, S, S)
    angle = 2 * math.pi * uniform[:, 3]
    u = (dx * angle.cos() + dy * angle.sin()) / size  # turned, in units of the shape's radius
    v = (dy * angle.cos() - dx * angle.sin()) / size
    far, near = torch.maximum(u.abs(), v.abs()), torch.minimum(u.abs(), v.abs())
    radius, theta = torch.hypot(u, v), torch.atan2(v, u)
    third, fourth, fifth = [  # the angle from the middle of one of k equal wedges
        torch.remainder(theta, 2 * math.pi / k) - math.pi / k for k in (3, 4, 5)]
    formulas = [  # above 0 inside, falls by about 1 per radius
        0.9 - radius,  # circle
        torch.minimum(0.95 - radius, torch.hypot(u - 0.5, v) - 0.75),  # crescent
        torch.minimum(0.95 - far, 0.3 - near),  # cross
        0.45 * (1 - torch.hypot(u, v / 0.45)),  # ellipse
        0.7 + 0.28 * torch.cos(5 * theta) - radius,  # flower
        torch.minimum(1 - radius, u + 0.1),  # half disc
        0.22 - (radius - 0.75).abs(),  # ring
        math.cos(math.pi / 4) - radius * torch.cos(fourth),  # square
        0.39 - radius * torch.cos(math.pi / 5 * 1.75 - fifth.abs()) * 0.9,  # star
        math.cos(math.pi / 3) - radius * torch.cos(third)]  # triangle
    inside = torch.stack(formulas)[labels, torch.arange(len(labels))]
    alpha = (inside * size * img_size / 2 + 0.5).clamp(0, 1)[:, None]  # one pixel of soft edge
    ramp, other = [0.5 + 0.45 * (x * a.cos() + y * a.sin())[:, None]
                   for a in (angle * 3, angle * 5 + 1)]
    background = uniform[:, 4:7] * (1 - ramp) + uniform[:, 7:10] * ramp  # (n, 3, S, S)
    shape = uniform[:, 10:13] * (1 - other) + uniform[:, 13:16] * other
    dark = (uniform[:, 16:17] > 0.5).float()  # shape and background always differ in brightness
    background, shape = 0.5 * (background + dark), 0.5 * (shape + 1 - dark)
    images = ((background * (1 - alpha) + shape * alpha) * 255).round().clamp(0, 255)
    return images.to(torch.uint8), alpha[:, 0] >= 0.5
