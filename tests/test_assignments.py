"""The graders of docs/assignments.md: each must reject what students really write.

A wrong version is a small change of a function's text. The function is compiled anew and the tests that grade its
exercise run, in this process. Not wrong, because provably equivalent: keys with gradient (the momentum encoder is
frozen), as is a teacher without `no_grad`; noise of any continuous distribution in `random_masking`; features that are
centered before their Gram matrix (U-centering removes it); rows and columns exchanged in `fourier_log_amplitude` (its
diagonal stays); the distance of the mean attention (it is linear). Not expressible: a learning rate per epoch.
"""
import ast
import shlex
import subprocess
import sys
import textwrap

import assignments
import pytest
from assignments import EXERCISES, HEADER, find, main, row
from conftest import ROOT

import analysis
import dino
import distill
import finetune
import mae
import mocov3
import simmim
import vit

MODULES = {module.__name__: module for module in (vit, mae, mocov3, distill, finetune, analysis, simmim, dino)}
PATCHES = "permute(0, 2, 4, 3, 5, 1)"
SDPA = "F.scaled_dot_product_attention(q, k, v)"
SCORES = "(q.to(dtype) * q.shape[-1] ** -0.5) @ k.to(dtype).transpose(-2, -1)"
MASKED_MEAN = "(error.mean(dim=-1) * mask).sum() / mask.sum().clamp(min=1)"
FILLER = "patches = torch.cat([x[:, 1:], self.mask_token.expand(B, removed, -1)], dim=1)"
CTR = "F.cross_entropy(cosines / temperature, own)"
OWN = "F.one_hot(own, cosines.shape[1]).bool()"
BOTH = "contrastive_loss(q1, k2, self.temperature) + contrastive_loss(q2, k1, self.temperature)"
KEYS = "_, k1, k2 = self.project(self.momentum_encoder, x1, x2)"
LERP = "average.lerp_(parameter, 1 - m)"
BUFFERS = "for average, own in zip(self.momentum_encoder.buffers(), self.base_encoder.buffers()):"
COSINE = "0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))"
TEACHER = "return [extras.attention[block] for block in self.blocks]"
VOTES = "(similarity / temperature).exp()"
VISIBLE = "scores[:, :, 1:, 1:].softmax(dim=-1)"
UNITS = "noise.view(len(noise), side, unit, side, unit)[:, :, 0, :, 0]"
SIMMIM_TARGET = "patchify(images, self.encoder.patch_size)"
LOG = "(amplitude + 1e-6).log().mean(dim=(0, 1))"

WRONG = {  # exercise: (what is wrong, function, old text, new text, perhaps again function, old, new)
    1: [("heads come before queries, keys, values", "heads", "(3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)",
         "(self.num_heads, 3, -1)).permute(3, 0, 2, 1, 4)"),
        ("channels of the heads interleaved", "heads", "(3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)",
         "(3, -1, self.num_heads)).permute(2, 0, 4, 1, 3)"),
        ("scaled by the width", "scores", "q.shape[-1] ** -0.5", "x.shape[-1] ** -0.5"),
        ("not scaled", "scores", " * q.shape[-1] ** -0.5", ""),
        ("divided by d", "scores", "q.shape[-1] ** -0.5", "q.shape[-1] ** -1.0"),
        ("scores after softmax", "scores", SCORES, f"({SCORES}).softmax(-1)"),
        ("scores transposed", "scores", SCORES, f"({SCORES}).transpose(-2, -1)"),
        ("scores in bf16", "scores", "torch.promote_types(q.dtype, torch.float32)", "q.dtype"),
        ("product under autocast", "scores", "enabled=False", "enabled=True"),
        ("heads not transposed back", "forward", "x.transpose(1, 2).flatten(2)", "x.reshape(len(x), x.shape[2], -1)"),
        ("no projection", "forward", "self.proj(x.transpose(1, 2).flatten(2))", "x.transpose(1, 2).flatten(2)"),
        ("scaled twice", "forward", SDPA, SDPA.replace("q,", "q * q.shape[-1] ** -0.5,")),
        ("queries and keys exchanged", "forward", SDPA, SDPA.replace("q, k", "k, q")),
        ("softmax over queries", "forward", SDPA, "(q @ k.mT * q.shape[-1] ** -0.5).softmax(-2) @ v"),
        ("no softmax", "forward", SDPA, "(q @ k.mT * q.shape[-1] ** -0.5) @ v")],
    2: [("row and column exchanged", "sincos_position", "[column, row]", "[row, column]"),
        ("sines and cosines interleaved", "sincos_position", "torch.cat([angle.sin(), angle.cos()], dim=1)",
         "torch.stack([angle.sin(), angle.cos()], dim=2).flatten(1)"),
        ("cosines first", "sincos_position", "[angle.sin(), angle.cos()]", "[angle.cos(), angle.sin()]"),
        ("exponent i / dim", "sincos_position", "float64) / (dim // 4)", "float64) / dim"),
        ("exponent i / (dim / 2)", "sincos_position", "float64) / (dim // 4)", "float64) / (dim // 2)"),
        ("frequencies rise", "sincos_position", "10000 ** -(", "10000 ** ("),
        ("class row of ones", "sincos_position", "(0, 0, 1, 0))", "(0, 0, 1, 0), value=1.0)"),
        ("class row last", "sincos_position", "(0, 0, 1, 0))", "(0, 0, 0, 1))"),
        ("counted from 1", "sincos_position", "torch.arange(grid)[", "torch.arange(1, grid + 1)[")],
    3: [("a draw per token", "stochastic_depth", "len(branch), 1, 1,", "*branch.shape[:2], 1,"),
        ("a draw per channel", "stochastic_depth", "len(branch), 1, 1,", "len(branch), 1, branch.shape[2],"),
        ("a draw for the batch", "stochastic_depth", "len(branch), 1, 1,", "1, 1, 1,"),
        ("not rescaled", "stochastic_depth", " / (1 - self.drop_path)", ""),
        ("divided by the rate", "stochastic_depth", "/ (1 - self.drop_path)", "/ self.drop_path"),
        ("keeps at the rate", "stochastic_depth", "bernoulli_(1 - self.drop_path)", "bernoulli_(self.drop_path)"),
        ("active in evaluation", "stochastic_depth", "not self.training or ", ""),
        ("active in evaluation only", "stochastic_depth", "not self.training", "self.training")],
    4: [("channels first in a patch", "patchify", PATCHES, "permute(0, 2, 4, 1, 3, 5)"),
        ("channels first, undone by unpatchify", "patchify", PATCHES, "permute(0, 2, 4, 1, 3, 5)", "unpatchify",
         "patch_size, patch_size, -1)", "-1, patch_size, patch_size).permute(0, 1, 2, 4, 5, 3)"),
        ("patches column by column", "patchify", PATCHES, "permute(0, 4, 2, 3, 5, 1)"),
        ("patches transposed", "patchify", PATCHES, "permute(0, 2, 4, 5, 3, 1)"),
        ("reshape without permute", "patchify", f"x.{PATCHES}.reshape", "x.reshape"),
        ("square images only", "patchify", "W // patch_size", "H // patch_size"),
        ("unpatchify transposes the image", "unpatchify", "permute(0, 5, 1, 3, 2, 4)", "permute(0, 5, 2, 4, 1, 3)"),
        ("unpatchify transposes patches", "unpatchify", "permute(0, 5, 1, 3, 2, 4)", "permute(0, 5, 1, 4, 2, 3)"),
        ("unpatchify without permute", "unpatchify", "x.permute(0, 5, 1, 3, 2, 4)", "x")],
    5: [("largest noise", "random_masking", "noise.argsort(dim=1) ", "noise.argsort(dim=1, descending=True) "),
        ("argsort over the batch", "random_masking", "noise.argsort(dim=1) ", "noise.argsort(dim=0) % L "),
        ("round", "random_masking", "keep = int(", "keep = round("),
        ("int of the removed", "random_masking", "int(L * (1 - mask_ratio))\n", "L - int(L * mask_ratio)\n"),
        ("share of the removed is kept", "random_masking", "int(L * (1 - mask_ratio))\n", "int(L * mask_ratio)\n"),
        ("permutation not inverted", "random_masking", "ids_shuffle.argsort(dim=1)", "ids_shuffle"),
        ("mask inverted", "random_masking", "ids_restore >= keep", "ids_restore < keep"),
        ("mask off by one", "random_masking", "ids_restore >= keep", "ids_restore > keep"),
        ("mask not restored", "random_masking", "ids_restore >= keep", "torch.arange(L).expand(B, L) >= keep"),
        ("mask permuted the wrong way", "random_masking", "ids_restore >= keep", "ids_shuffle >= keep"),
        ("one mask for the batch", "random_masking", "torch.rand(B, L, device=tokens.device)",
         "torch.rand(1, L).expand(B, L)"),
        ("noise ignored", "random_masking", " if noise is None else noise", ""),
        ("gathers by ids_restore", "random_masking", "ids_shuffle[:, :keep, None]", "ids_restore[:, :keep, None]"),
        ("kept in raster order", "random_masking", "ids_shuffle[:, :keep, None]",
         "ids_shuffle[:, :keep].sort(dim=1).values[:, :, None]"),
        ("the first are kept", "random_masking", "ids_shuffle[:, :keep, None]", "torch.arange(keep)[None, :, None]")],
    6: [("loss of all patches", "forward", MASKED_MEAN, "error.mean()"),
        ("loss of visible patches", "forward", MASKED_MEAN, MASKED_MEAN.replace("mask", "(1 - mask)")),
        ("divided by all patches", "forward", MASKED_MEAN, "(error.mean(dim=-1) * mask).mean()"),
        ("sum over pixels", "forward", "error.mean(dim=-1)", "error.sum(dim=-1)"),
        ("absolute error", "forward", "(pred.to(images.dtype) - self.target(images)) ** 2",
         "(pred.to(images.dtype) - self.target(images)).abs()"),
        ("division by zero", "forward", ".clamp(min=1)", ""),
        ("no position", "forward", "self.encoder.embed(", "self.encoder.patch_embed("),
        ("position of the first patches", "forward", "self.encoder.embed(", "self.encoder.patch_embed(",
         "forward", "self.encoder.encode(kept)",
         "self.encoder.encode(kept + self.encoder.pos_embed[:, 1:kept.shape[1] + 1])"),
        ("encoder sees zeroed tokens", "forward", "encode(kept)", "encode(tokens * (1 - mask[:, :, None]))"),
        ("latent not normalized", "forward", "self.encoder.norm(self.encoder.encode(kept))", "self.encoder.encode(kept)"),
        ("pixels not normalized", "forward", "self.target(images)", "patchify(images, self.encoder.patch_size)"),
        ("not unshuffled", "decode", "patches.gather(1, ids_restore[:, :, None].expand_as(patches))", "patches"),
        ("shuffled again", "decode", "ids_restore[:, :, None]", "ids_restore.argsort(dim=1)[:, :, None]"),
        ("no decoder position", "decode", " + self.decoder_pos_embed", ""),
        ("decoder position before the order", "decode", " + self.decoder_pos_embed", "", "decode", FILLER,
         f"{FILLER} + self.decoder_pos_embed[:, 1:]"),
        ("zeros for the mask token", "decode", "self.mask_token.expand", "(0 * self.mask_token).expand"),
        ("class token not dropped", "decode", "(x))[:, 1:]", "(x))[:, :-1]"),
        ("decoder not normalized", "decode", "self.decoder_norm(x)", "x"),
        ("variance over n", "target", "target.var(-1, keepdim", "target.var(-1, correction=0, keepdim"),
        ("normalized over the image", "target", "target.mean(-1, k", "target.mean((1, 2), k",
         "target", "target.var(-1, k", "target.var((1, 2), k"),
        ("divided by the variance", "target", "(var + 1e-6).sqrt()", "(var + 1e-6)"),
        ("epsilon outside the root", "target", "(var + 1e-6).sqrt()", "(var.sqrt() + 1e-6)"),
        ("no epsilon", "target", "(var + 1e-6).sqrt()", "var.sqrt()"),
        ("normalized if not wanted", "target", "if not self", "if self")],
    7: [("not normalized", "similarities", "F.normalize(q.to(dtype), dim=1), F.normalize(k.to(dtype), dim=1)", "q, k"),
        ("queries not normalized", "similarities", "F.normalize(q.to(dtype), dim=1)", "q"),
        ("normalized over the batch", "similarities", "F.normalize(k.to(dtype), dim=1)", "F.normalize(k, dim=0)"),
        ("product under autocast", "similarities", "enabled=False", "enabled=True"),
        ("keys look for queries", "similarities", "q @ k.T", "k @ q.T"),
        ("T for 2T", "contrastive_loss", "2 * temperature * F", "temperature * F"),
        ("no 2T", "contrastive_loss", "2 * temperature * F", "F"),
        ("times T", "contrastive_loss", "cosines / temperature", "cosines * temperature"),
        ("no T", "contrastive_loss", "cosines / temperature", "cosines"),
        ("sum over the batch", "contrastive_loss", ", own)", ', own, reduction="sum")'),
        ("positive not in the denominator", "contrastive_loss", CTR,
         f"((cosines.masked_fill({OWN}, -1e9) / temperature).logsumexp(1) - cosines[{OWN}] / temperature).mean()"),
        ("softmax before cross entropy", "contrastive_loss", CTR,
         "F.cross_entropy((cosines / temperature).softmax(1), own)")],
    8: [("updated after the keys", "forward", "self.update_momentum_encoder(m)\n", "\n", "forward", KEYS,
         f"{KEYS}\n            self.update_momentum_encoder(m)"),
        ("never updated", "forward", "self.update_momentum_encoder(m)\n", "\n"),
        ("m and 1 - m exchanged", "update_momentum_encoder", LERP, "average.lerp_(parameter, m)"),
        ("class token left alone", "update_momentum_encoder", LERP,
         f"if parameter.requires_grad and parameter.ndim != 3:\n                {LERP}"),
        ("buffers averaged", "update_momentum_encoder", LERP,
         f"{LERP}\n        {BUFFERS}\n            average.copy_(average + (1 - m) * (own - average))"),
        ("buffers copied", "update_momentum_encoder", LERP, f"{LERP}\n        {BUFFERS}\n            average.copy_(own)"),
        ("each query with its own view", "forward", BOTH,
         BOTH.replace("q1, k2", "q1, k1").replace("q2, k1", "q2, k2")),
        ("one direction", "forward", f" + {BOTH.split(' + ')[1]}", ""),
        ("mean of the directions", "forward", BOTH, f"({BOTH}) / 2"),
        ("no predictor", "forward", "self.predictor(z1), self.predictor(z2)", "z1, z2"),
        ("keys through the predictor", "forward", KEYS,
         f"{KEYS}\n            k1, k2 = self.predictor(k1), self.predictor(k2)"),
        ("keys of the base encoder", "forward", "self.project(self.momentum", "self.project(self.base"),
        ("one BatchNorm of both views", "forward", "self.predictor(z1), self.predictor(z2)",
         "self.predictor(torch.cat([z1, z2])).chunk(2)"),
        ("momentum encoder in evaluation mode", "forward", KEYS, f"self.momentum_encoder.eval()\n            {KEYS}"),
        ("accuracy within a view", "forward", "similarities(q1, k2)", "similarities(q1, k1)"),
        ("spread of the queries", "forward", "spread(z1)", "spread(q1 * 0)"),
        ("standard deviation for the spread", "forward", "spread(z1)", "z1.std()")],
    9: [("warm-up from lr / warmup", "learning_rate", "lr * step / warmup", "lr * (step + 1) / warmup"),
        ("warm-up from min_lr", "learning_rate", "lr * step / warmup", "min_lr + (lr - min_lr) * step / warmup"),
        ("warm-up a step longer", "learning_rate", "step < warmup", "step <= warmup"),
        ("ends at steps - 1", "learning_rate", "/ (steps - warmup)", "/ (steps - 1 - warmup)"),
        ("cosine from step 0", "learning_rate", "(step - warmup) / (steps - warmup)", "step / steps"),
        ("min_lr on top", "learning_rate", "(lr - min_lr)", "lr"),
        ("min_lr as a bound", "learning_rate", f"min_lr + (lr - min_lr) * {COSINE}", f"max(min_lr, lr * {COSINE})"),
        ("no min_lr", "learning_rate", "min_lr + (lr - min_lr)", "lr"),
        ("whole cosine", "learning_rate", "math.pi", "2 * math.pi"),
        ("quarter of a cosine", "learning_rate", "0.5 * (1 + math.cos(math.pi *", "(math.cos(math.pi / 2 *"),
        ("not halved", "learning_rate", "* 0.5 *", "*"),
        ("linear", "learning_rate", COSINE, "(1 - (step - warmup) / (steps - warmup))")],
    10: [("map transposed", "attention_distillation_loss", "ts,bsij", "st,bsij"),
         ("student's queries and keys exchanged", "attention_distillation_loss", "->btij", "->btji"),
         ("sum over tokens", "attention_distillation_loss", " ** 2).mean()", " ** 2).sum((-2, -1)).mean()"),
         ("sum over heads", "attention_distillation_loss", " ** 2).mean()", " ** 2).sum(1).mean()"),
         ("root", "attention_distillation_loss", " ** 2).mean()", " ** 2).mean().sqrt()"),
         ("absolute error", "attention_distillation_loss", " ** 2).mean()", ").abs().mean()"),
         ("softmax of both", "attention_distillation_loss", "teacher - mapped", "teacher.softmax(-1) - mapped.softmax(-1)"),
         ("divergence", "attention_distillation_loss", "((teacher - mapped) ** 2).mean()",
          'torch.nn.functional.kl_div(mapped.log_softmax(-1), teacher.softmax(-1), reduction="batchmean")'),
         ("class token dropped", "attention_distillation_loss", "teacher - mapped", "(teacher - mapped)[..., 1:, 1:]"),
         ("class token's row only", "attention_distillation_loss", "teacher - mapped", "(teacher - mapped)[..., :1, :]"),
         ("low precision", "attention_distillation_loss",
          "torch.promote_types(student.dtype, torch.float32)", "student.dtype"),
         ("product under autocast", "attention_distillation_loss", "enabled=False", "enabled=True"),
         ("matrices only", "attention_distillation_loss", 'getattr(head_map, "weight", head_map)', "head_map"),
         ("teacher sees all patches", "Teacher.forward", "encode(kept,", "encode(self.encoder.embed(images),"),
         ("teacher has its own masks", "Teacher.forward", "(images), mask_ratio, noise)", "(images), mask_ratio)"),
         ("unscaled scores", "Teacher.forward", TEACHER, TEACHER.replace("k] for", "k] * self.encoder.embed_dim ** 0.5 for")),
         ("attention for scores", "Teacher.forward", TEACHER, TEACHER.replace("k] for", "k].softmax(-1) for")),
         ("class token dropped by the teacher", "Teacher.forward", TEACHER, TEACHER.replace("k] for", "k][..., 1:, 1:] for")),
         ("last block only", "Teacher.forward", TEACHER, TEACHER.replace("attention[block]", "attention[self.blocks[-1]]"))],
    11: [("depth - i", "layer_decay_groups", "len(layers) - 1 - i", "len(layers) - 2 - i"),
         ("upper layers slower", "layer_decay_groups", "decay ** (len(layers) - 1 - i)", "decay ** i"),
         ("head decays", "layer_decay_groups", "len(layers) - 1 - i", "len(layers) - i"),
         ("position learns as the head", "layer_decay_groups", "model.pos_embed, ", "", "layer_decay_groups",
          "*model.norm.p", "model.pos_embed, *model.norm.p"),
         ("patches learn as the head", "layer_decay_groups", ", *model.patch_embed.parameters()", "", "layer_decay_groups",
          "*model.norm.p", "*model.patch_embed.parameters(), *model.norm.p"),
         ("norm forgotten", "layer_decay_groups", "*model.fc_norm.parameters(), ", ""),
         ("norm of class-token networks forgotten", "layer_decay_groups", "*model.norm.parameters(), ", ""),
         ("block 0 with the embeddings", "layer_decay_groups", "for block in model.blocks", "for block in model.blocks[1:]",
          "layer_decay_groups", "[embeddings, ", "[embeddings + [*model.blocks[0].parameters()], "),
         ("frozen position left out", "layer_decay_groups", "in layer if", "in layer if p.requires_grad and"),
         ("weight decay of biases", "layer_decay_groups", "p.ndim in (2, 4)", "p.ndim in (1, 2, 4)"),
         ("weight decay of class token and position", "layer_decay_groups", "p.ndim in (2, 4)", "p.ndim > 1"),
         ("decayed weight decay", "layer_decay_groups", "weight_decay * decays", "weight_decay * decays * scale"),
         ("lr not scaled", "layer_decay_groups", '"lr": base_lr * scale', '"lr": base_lr'),
         ("lr_scale is the rate", "layer_decay_groups", '"lr_scale": scale', '"lr_scale": base_lr * scale'),
         ("parameters twice", "layer_decay_groups", '"params": params', '"params": params * 2')],
    12: [("majority", "nearest_neighbors", VOTES, "torch.ones_like(similarity)"),
         ("votes in proportion to similarity", "nearest_neighbors", VOTES, "similarity"),
         ("times the temperature", "nearest_neighbors", VOTES, "(similarity * temperature).exp()"),
         ("no temperature", "nearest_neighbors", VOTES, "similarity.exp()"),
         ("gallery not normalized", "nearest_neighbors", "nn.functional.normalize(gallery, dim=1)", "gallery"),
         ("queries not normalized", "nearest_neighbors", "nn.functional.normalize(queries, dim=1)", "queries"),
         ("normalized over the images", "nearest_neighbors", "nn.functional.normalize(gallery, dim=1)", "nn.functional.normalize(gallery, dim=0)"),
         ("farthest", "nearest_neighbors", "len(gallery)))", "len(gallery)), largest=False)"),
         ("all vote", "nearest_neighbors", "min(k, len(gallery))", "len(gallery)"),
         ("needs k images", "nearest_neighbors", "min(k, len(gallery))", "k"),
         ("needs five classes", "nearest_neighbors", "min(5, num_classes)", "5"),
         ("labels of the first", "nearest_neighbors", "labels[index]", "labels[:index.shape[1]].expand_as(index)"),
         ("the last vote counts", "nearest_neighbors", "scatter_add_(", "scatter_("),
         ("worst first", "nearest_neighbors", "num_classes)).indices", "num_classes)).indices.flip(1)"),
         ("the last part only", "nearest_neighbors", "torch.cat(ranking)", "ranking[-1]")],
    13: [("biased", "centered_gram", ".fill_diagonal_(0)     ", "     ", "centered_gram", "/ (B - 2)", "/ B", "centered_gram",
          "((B - 1) * (B - 2))", "(B * B)", "centered_gram", "K.fill_diagonal_(0) / (B * (B - 3)) ** 0.5", "K / (B - 1)"),
         ("diagonal kept", "centered_gram", ".fill_diagonal_(0)     ", "     "),
         ("diagonal kept after centering", "centered_gram", "return K.fill_diagonal_(0)", "return K"),
         ("not centered", "centered_gram", " - rows[:, None] - rows[None, :] + K.sum() / ((B - 1) * (B - 2))", ""),
         ("row means", "centered_gram", "/ (B - 2)", "/ B"),
         ("B - 1 for B - 2", "centered_gram", "/ (B - 2)", "/ (B - 1)"),
         ("mean of all pairs", "centered_gram", "((B - 1) * (B - 2))", "(B * (B - 1))"),
         ("mean subtracted", "centered_gram", "+ K.sum()", "- K.sum()"),
         ("B - 1 for B - 3", "centered_gram", "(B - 3)", "(B - 1)"),
         ("not divided", "centered_gram", " / (B * (B - 3)) ** 0.5", ""),
         ("mean over tokens", "centered_gram", "features.flatten(1)", "features.reshape(B, -1, features.shape[-1]).mean(1)"),
         ("float32", "centered_gram", ".double()", ".float()"),
         ("two images", "centered_gram", "B < 4", "B < 2"),
         ("mean of ratios", "CKA.update", "(grams @ grams.T)",
          "(lambda h: h / (h.diagonal()[:, None] * h.diagonal()).sqrt())(grams @ grams.T)"),
         ("last mini-batch only", "CKA.update", "self.hsic += ", "self.hsic = "),
         ("no root", "CKA.compute", ".sqrt()", ""),
         ("not divided by both", "CKA.compute", "(norm[:, None] * norm)", "norm[:, None] ** 2"),
         ("models exchanged", "CKA.compute", "[:self.n1, self.n1:]", "[self.n1:, :self.n1]")],
    14: [("class token dropped after the softmax", "attention_distance", VISIBLE, "scores.softmax(dim=-1)[:, :, 1:, 1:]"),
         ("in patches", "attention_distance", "patch_size * torch", "torch"),
         ("no softmax", "attention_distance", ".softmax(dim=-1)", ""),
         ("softmax over queries", "attention_distance", ".softmax(dim=-1)", ".softmax(dim=-2)"),
         ("city blocks", "attention_distance", ".norm(dim=-1)", ".abs().sum(dim=-1)"),
         ("squared", "attention_distance", ".norm(dim=-1)", ".square().sum(dim=-1)"),
         ("mean over heads", "attention_distance", ".sum(dim=-1).mean(dim=-1)", ".sum(dim=-1).mean()"),
         ("mean over keys", "attention_distance", ".sum(dim=-1).mean(dim=-1)", ".mean(dim=-1).mean(dim=-1)"),
         ("most attended patch", "attention_distance", ".mean(dim=0)", ".mean(dim=0).gt(0.5).double()"),
         ("class token dropped after the softmax", "attention_entropy", VISIBLE, "scores.softmax(dim=-1)[:, :, 1:, 1:]"),
         ("class token kept", "attention_entropy", "[:, :, 1:, 1:]", ""),
         ("no softmax", "attention_entropy", ".softmax(dim=-1)", ".abs()"),
         ("in bits", "attention_entropy", ".mean(dim=(0, 2))", ".mean(dim=(0, 2)) / 0.6931471805599453"),
         ("negative", "attention_entropy", "return ", "return -"),
         ("mean over heads", "attention_entropy", ".mean(dim=(0, 2))", ".mean()"),
         ("entropy of the mean", "attention_entropy", VISIBLE, f"{VISIBLE}.mean(dim=0, keepdim=True)"),
         ("0 log 0", "attention_entropy", "torch.special.entr(attention)", "-(attention * attention.log())"),
         ("log of the mean", "fourier_log_amplitude", LOG, "(amplitude.mean(dim=(0, 1)) + 1e-6).log()"),
         ("without pi", "fourier_log_amplitude", "return log_amplitude - log_amplitude[0]",
          "return (log_amplitude - log_amplitude[0])[:-1]"),
         ("not relative", "fourier_log_amplitude", " - log_amplitude[0]", ""),
         ("power", "fourier_log_amplitude", ".abs() ", ".abs().square() "),
         ("decibels", "fourier_log_amplitude", ".log()", ".log10()"),
         ("horizontal waves", "fourier_log_amplitude", ".diagonal(dim1=-2, dim2=-1)", "[..., 0, :]"),
         ("tokens as channels", "fourier_log_amplitude", "tokens.transpose(1, 2).unflatten(-1, (grid, grid))",
          "tokens.reshape(len(tokens), -1, grid, grid)"),
         ("one-dimensional", "fourier_log_amplitude", "torch.fft.rfft2(maps)", "torch.fft.rfft(maps)"),
         ("odd grids", "fourier_log_amplitude", "grid % 2:", "grid < 0:")],
    15: [("largest noise", "random_mask", "noise.argsort(dim=1)", "noise.argsort(dim=1, descending=True)"),
         ("argsort over the batch", "random_mask", "noise.argsort(dim=1)", "noise.argsort(dim=0)"),
         ("noise ignored", "random_mask", "noise.argsort(dim=1)", "torch.rand_like(noise).argsort(dim=1)"),
         ("permutation not inverted", "random_mask", "ids_shuffle.argsort(dim=1)", "ids_shuffle"),
         ("one mask for the batch", "random_mask", "ids_shuffle.argsort(dim=1)",
          "ids_shuffle[:1].argsort(dim=1).expand_as(noise)"),
         ("floor", "random_mask", "math.ceil(", "math.floor("),
         ("round", "random_mask", "math.ceil(", "round("),
         ("share of the visible", "random_mask", "side * side * mask_ratio", "side * side * (1 - mask_ratio)"),
         ("mask inverted", "random_mask", "ids_restore <", "ids_restore >="),
         ("mask off by one", "random_mask", "ids_restore <", "ids_restore <="),
         ("noise of the upper left patches", "random_mask", UNITS, "noise.view(-1, unit, side, unit, side)[:, 0, :, 0]"),
         ("units repeated as tiles", "random_mask", "repeat_interleave(unit, dim=1).repeat_interleave(unit, dim=2)",
          "repeat(1, unit, unit)"),
         ("units of one column", "random_mask", "repeat_interleave(unit, dim=2)", "repeat_interleave(unit, dim=1)"),
         ("rows and columns exchanged", "random_mask", "unit, dim=2).", "unit, dim=2).mT."),
         ("single patches", "random_mask", "def random_mask(noise, unit=2, mask_ratio=0.6):",
          "def random_mask(noise, unit=2, mask_ratio=0.6):\n    unit = 1"),
         ("loss of all patches", "forward", MASKED_MEAN, "error.mean()"),
         ("loss of visible patches", "forward", MASKED_MEAN, MASKED_MEAN.replace("mask", "(1 - mask)")),
         ("divided by all patches", "forward", MASKED_MEAN, "(error.mean(dim=-1) * mask).mean()"),
         ("not divided by the colors", "forward", "error.mean(dim=-1)", "3 * error.mean(dim=-1)"),
         ("squared error", "forward", ".abs()", ".square()"),
         ("division by zero", "forward", ".clamp(min=1)", ""),
         ("pixels normalized", "forward", SIMMIM_TARGET, f"{SIMMIM_TARGET}\n        target = (target - target.mean(-1, "
          "keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()"),
         ("MAE's order of pixels", "forward", SIMMIM_TARGET, f"{SIMMIM_TARGET}.unflatten(-1, (3, -1)).mT.flatten(-2)"),
         ("visible patches become mask tokens", "forward", "[:, :, None] > 0", "[:, :, None] == 0"),
         ("zeros for the mask token", "forward", "self.mask_token", "0 * self.mask_token"),
         ("mask token without position", "forward", "self.mask_token", "self.mask_token - self.encoder.pos_embed[:, 1:]"),
         ("no position", "forward", " + self.encoder.pos_embed[:, 1:]", ""),
         ("position twice", "forward", "self.encoder.patch_embed(", "self.encoder.embed("),
         ("not normalized", "forward", "self.encoder.norm(x)", "x"),
         ("class token not dropped", "forward", "norm(x)[:, 1:]", "norm(x)[:, :-1]"),
         ("mask ignored", "forward", "if mask is None:", "if True:"),
         ("needs a mask", "forward", "if mask is None:", "if False:"),
         ("single patches without a mask", "forward", "device=images.device)", "device=images.device), unit=1"),
         ("one mask for all without a mask", "forward", "torch.rand(len(images), ", "torch.rand(1, ")],
    16: [("pairs of a crop with itself", "dino_loss", " if i != j", ""),
         ("global crops only", "dino_loss", "enumerate(outputs)", "enumerate(outputs[:2])"),
         ("local crops only", "dino_loss", "if i != j", "if j > 1"),
         ("rows image by image", "dino_loss", ".chunk(2)", ".unflatten(0, (-1, 2)).unbind(1)"),
         ("no center", "dino_loss", "teacher - center", "teacher"),
         ("center added", "dino_loss", "teacher - center", "teacher + center"),
         ("center after the temperature", "dino_loss", "(teacher - center) / teacher_temp", "teacher / teacher_temp - center"),
         ("student centered too", "dino_loss", "student.to(center.dtype)", "(student - center)"),
         ("teacher as soft as the student", "dino_loss", "/ teacher_temp", "/ student_temp"),
         ("times the temperature", "dino_loss", "/ student_temp", "* student_temp"),
         ("softmax over the batch", "dino_loss", "softmax(dim=1)", "softmax(dim=0)"),
         ("sum over pairs", "dino_loss", ".mean()", ".sum()"),
         ("divergence", "dino_loss", "F.cross_entropy(s, t)", 'F.kl_div(s.log_softmax(1), t, reduction="batchmean")'),
         ("softmax before cross entropy", "dino_loss", "F.cross_entropy(s, t)", "F.cross_entropy(s.softmax(1), t)"),
         ("teacher and student exchanged", "dino_loss", "F.cross_entropy(s, t)", "F.cross_entropy(t.log(), s.softmax(1))"),
         ("largest output as a label", "dino_loss", "F.cross_entropy(s, t)", "F.cross_entropy(s, t.argmax(1))"),
         ("center is the mean", "update_center", "mean, 0.1", "mean, 1.0"),
         ("0.9 and 0.1 exchanged", "update_center", "mean, 0.1", "mean, 0.9"),
         ("sum over the batch", "update_center", "teacher.mean(", "teacher.sum("),
         ("mean of all outputs", "update_center", "dim=0,", "dim=(0, 1),"),
         ("first global crop only", "update_center", "teacher.mean(", "teacher.chunk(2)[0].mean("),
         ("center of centered outputs", "update_center", "teacher.mean(", "(teacher - self.center).mean("),
         ("center of the distribution", "update_center", "teacher.mean(", "teacher.softmax(dim=1).mean("),
         ("center updated first", "forward", "self.update_center(teacher)\n        return", "return", "forward",
          "loss = dino_loss", "self.update_center(teacher)\n        loss = dino_loss"),
         ("center never updated", "forward", "self.update_center(teacher)\n", "\n"),
         ("center of the student", "forward", "update_center(teacher)", "update_center(student.detach())"),
         ("crops image by image", "forward", "x.transpose(0, 1).flatten(0, 1)", "x.flatten(0, 1)"),
         ("student sees global crops only", "forward", "torch.cat([self.student(x1), self.student(x2)])", "self.student(x1)"),
         ("local crops enlarged", "forward", "self.student(x2)", "self.student(F.interpolate(x2, x1.shape[-1]))"),
         ("teacher sees local crops", "forward", "self.teacher.embed(x1)", "self.teacher.embed(x2)"),
         ("student as the teacher", "forward", "self.teacher.pool(self.teacher.encode(self.teacher.embed(x1)))",
          "self.student.pool(self.student.encode(self.student.embed(x1)))"),
         ("head of the student", "forward", "self.teacher.head(", "self.student.head("),
         ("temperatures exchanged", "forward", "self.temperature, self.teacher_temp", "self.teacher_temp, self.temperature"),
         ("entropy of soft outputs", "forward", "/ self.teacher_temp", "/ self.temperature"),
         ("entropy in bits", "forward", "logits.softmax(dim=1))", "logits.softmax(dim=1)) / 0.6931471805599453"),
         ("negative divergence", "forward", "loss.detach() - entropy", "entropy - loss.detach()"),
         ("divergence with gradient", "forward", "loss.detach()", "loss"),
         ("spread of the outputs", "forward", "spread(tokens)", "spread(student)")],
}
TWO_RANKS = [  # what is wrong, exercise, ...: whoever starts processes needs the change in a file
    ("labels without the rank's offset", 7, "similarities", " + dist.get_rank() * len(q)", ""),
    ("keys of one's own rank", 7, "similarities", "if dist.is_initialized():", "if False:"),
    ("center of one's own rank", 16, "update_center", " / WORLD", "", "update_center", "if WORLD > 1:", "if False:")]


def changed(number, changes):
    """`{function: text}` after changes `function, old text, new text, function, ...` of an exercise's functions."""
    script, *names = EXERCISES[number].functions.replace(":", "").split()
    whole, texts = (ROOT / f"{script}.py").read_text(), {}
    for part, old, new in zip(changes[::3], changes[1::3], changes[2::3], strict=True):
        name, = [name for name in names if f".{name}".endswith(f".{part}")]
        node = find(whole, name)
        lines = whole.splitlines(keepends=True)[node.lineno - 1 - len(node.decorator_list):node.end_lineno]
        text = texts.get(name, "".join(lines))
        assert text.count(old) == 1, f"{old} stands {text.count(old)} times in {name}"
        texts[name] = text.replace(old, new)
    return texts


FAST = ["-q", "--tb=no", "--noconftest", "--assert=plain", "-p", "no:cacheprovider", "-p", "no:unraisableexception"]


class Selected:
    """Of pytest, in this process: the names of the tests that it selects."""

    def pytest_collection_finish(self, session):
        self.names = {item.originalname for item in session.items}


def graded(number, *options):
    """pytest's exit code and the names of the tests that grade an exercise."""
    *files, _, selection = shlex.split(assignments.selection(number))
    selected = Selected()
    code = pytest.main([*FAST, *options, *(str(ROOT / file) for file in files), "-k", selection], plugins=[selected])
    return code, selected.names


def compiled(number, changes, monkeypatch):
    """Puts changed functions in the place of the right ones."""
    for name, text in changed(number, changes).items():
        *parents, leaf = name.split(".")
        for module in MODULES.values():
            owner = getattr(module, parents[0], None) if parents else module
            if hasattr(owner, leaf):
                namespace = {}
                exec(compile(textwrap.dedent(text), f"{name}, changed", "exec"), vars(module), namespace)
                monkeypatch.setattr(owner, leaf, namespace[leaf])


@pytest.mark.parametrize("number", EXERCISES)
def test_graders_accept_what_is_right(number, monkeypatch):
    """The right functions, compiled anew as the wrong ones are."""
    names = EXERCISES[number].functions.split()[1:]
    compiled(number, [text for name in names for text in (name, "def ", "def ")], monkeypatch)
    code, selected = graded(number)
    assert code == 0 and len(selected) >= 2, selected


@pytest.mark.parametrize("number, changes", [pytest.param(number, changes, id=f"{number}-{wrong}")
                                             for number in WRONG for wrong, *changes in WRONG[number]])
def test_graders_reject_what_is_wrong(number, changes, monkeypatch):
    compiled(number, changes, monkeypatch)
    code, _ = graded(number, "-x")
    assert code == 1


# ------------------------------------------------------------ the command line

def call(*arguments, folder=ROOT):
    """Runs tests/assignments.py of a copy: exit code and output."""
    command = [sys.executable, folder / "tests" / "assignments.py", *map(str, arguments)]
    process = subprocess.run(command, capture_output=True, text=True)
    return process.returncode, process.stdout + process.stderr


def test_table_of_the_document_is_that_of_the_exercises(capsys):
    main(["list"])
    table = capsys.readouterr().out
    assert table == "\n".join([HEADER, *map(row, EXERCISES)]) + "\n"
    assert table in (ROOT / "docs" / "assignments.md").read_text()


@pytest.mark.parametrize("number", EXERCISES)
def test_start_erases_bodies_and_keeps_signature_and_docstring(number, tmp_path, capsys):
    main(["start", str(number), str(tmp_path / "copy")])
    assert f"exercise {number} is in {tmp_path / 'copy'}" in capsys.readouterr().out
    names = EXERCISES[number].functions.split()[1:]
    for script in MODULES:
        before, after = ((folder / f"{script}.py").read_text() for folder in (ROOT, tmp_path / "copy"))
        for name in names:
            old, new = find(before, name), find(after, name)
            if old:
                assert ast.unparse(new.args) == ast.unparse(old.args) and new.name == old.name
                assert ast.get_docstring(new) == ast.get_docstring(old) and len(new.decorator_list) == len(old.decorator_list)
                assert ast.unparse(new.body[1:]).startswith(f"raise NotImplementedError('exercise {number}: ")
            before = assignments.erase(before, name, f"exercise {number}: {EXERCISES[number].task}")
        assert before == after    # nothing else differs
    names = {path.name for path in tmp_path.glob("copy/*")}
    assert {"tests", "docs", "README.md", "vit.py"} <= names and not {".git", "runs", "data"} & names


@pytest.mark.parametrize("arguments, reason", [
    (("start", "5", ROOT / "copy"), "lies in the project itself"), (("start", "5", ROOT), "lies in the project itself"),
    (("start", "5", "full"), "is not an empty folder"), (("start", "5", "full/file"), "is not an empty folder"),
    (("start", len(EXERCISES) + 1, "copy"), f"from 1 to {len(EXERCISES)}"), (("start", "5"), "from 1 to "),
    (("grade", "x"), "from 1 to "),
    ((), "list, start")])
def test_what_cannot_be_started_or_graded_is_refused_in_one_line(arguments, reason, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    lines = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: ") and reason in lines[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full"] and not (ROOT / "copy").exists()


def test_grade_says_in_words_what_failed_and_accepts_the_right_body(tmp_path):
    main(["start", "5", str(tmp_path)])
    code, text = call("grade", 5, folder=tmp_path)
    assert code == 1 and "exercise 5: 0 of 3 tests passed" in text
    assert "failed: random masking keeps the smallest noise and says where it was\n        NotImplementedError" in text
    (tmp_path / "mae.py").write_text((ROOT / "mae.py").read_text())
    assert call("grade", 5, folder=tmp_path) == (0, "exercise 5: all 3 tests passed\n")


@pytest.mark.parametrize("number, changes", [pytest.param(number, changes, id=wrong) for wrong, number, *changes in TWO_RANKS])
def test_two_ranks_reject_what_one_rank_cannot_see(number, changes, tmp_path):
    main(["start", str(number), str(tmp_path)])
    script = EXERCISES[number].functions.split(":")[0] + ".py"
    whole = (ROOT / script).read_text()
    for name, text in changed(number, changes).items():
        whole = whole.replace(ast.get_source_segment(whole, find(whole, name)) + "\n", text.lstrip(" "))
    (tmp_path / script).write_text(whole)
    code, text = call("grade", number, folder=tmp_path)
    assert code == 1 and text.count("failed: ") == 1
    grader = {7: "eq1 moco", 16: "dino"}[number]
    assert f"failed: {grader} two ranks with half the batch each are one with the whole" in text
