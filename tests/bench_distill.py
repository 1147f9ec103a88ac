"""What distillation costs: images/s of a training step of MAE-Tiny at 224 px, plain and with a ViT-Base teacher.

    python tests/bench.py distill
"""
import sys

import torch

import bench
import distill
import vit


def make(batch_size, blocks=(), img_size=224):
    """A step's network, teacher (None without blocks) and loss."""
    student = distill.MaskedAutoencoder(vit.vit_tiny(img_size=img_size, global_pool="token"), blocks=blocks).to(bench.DEVICE)
    teacher = distill.Teacher(vit.vit_base(img_size=img_size, global_pool="token").to(bench.DEVICE), blocks) if blocks else None
    images = torch.randn(batch_size, 3, img_size, img_size, device=bench.DEVICE)

    def loss_of(network):
        noise = torch.rand(batch_size, student.encoder.grid ** 2, device=bench.DEVICE)
        scores = teacher(images, 0.75, noise) if teacher else ()
        loss, _, _, attention = network(images, 0.75, noise, scores)
        return loss + attention
    return student, loss_of


def last(batch_size):
    return make(batch_size, (11,))


def every(batch_size):
    return make(batch_size, tuple(range(12)))


def run(args):
    batch_size = args.batch_size or (1024 if bench.DEVICE.type == "cuda" else 32)
    ways = {"plain MAE": make, "last block distilled": last, "all blocks distilled": every}
    steps = {name: bench.training_step(*way(batch_size), plain=False, compile=args.compile) for name, way in ways.items()}
    seconds = bench.alternate(steps, args.rounds, torch.cuda.synchronize if bench.DEVICE.type == "cuda" else lambda: None)
    memory = {name: f"{bench.peak_memory(bench.few_steps, way, batch_size, False, args.compile):.2f}" for name, way in ways.items()}
    bench.table(f"Distillation, ViT-Tiny by ViT-Base, 224 px, batch {batch_size}, {bench.DEVICE.type}", batch_size, "images", seconds,
                **{"peak GB": memory})


if __name__ == "__main__":
    sys.argv.insert(1, "distill")
    bench.main()
