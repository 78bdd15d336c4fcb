"""The loss on held-out images, by how much of the image is known: compares models of one tokenizer without drawing samples.

    python benchmarks/heldout_loss.py runs/a runs/b --test cifar10-test.parquet --out out/heldout.json

Every model sees the same images, orders, timesteps and noise; weights are the averaged ones. The first column (nothing known) says
how well a model composes an image, the last ones how well it continues what is there.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor

import continuar
from continuar.data.loader import ImageSet, load_images
from continuar.distributed import pick_device
from continuar.orders import View
from continuar.pipeline import Pipeline

SHARES = (0.0, 0.125, 0.25, 0.5, 0.75)


@torch.no_grad()
def losses(pipe: Pipeline, images: ImageSet, count: int, draws: int, block: int = 500) -> list[float]:
    """The mean loss over ``count`` images and all their unknown tokens, for each known share."""
    model, device, spec = pipe.model.eval(), pipe.device, pipe.config.model.tokens
    # Draws per token come from `draws` passes, whatever the model was trained with.
    generator = torch.Generator().manual_seed(0)
    order = torch.rand(count, spec.seq_len, generator=generator).argsort(1).to(device)
    results: list[float] = []
    for share in SHARES:
        torch.manual_seed(0)
        sums: list[Tensor] = []
        for first in range(0, count, block):
            rows = slice(first, min(first + block, count))
            pixels = torch.from_numpy(images.images[rows]).to(device).permute(0, 3, 1, 2)
            tokens = pipe.tokenizer.tokenize(pipe.tokenizer.encode(pixels.float().div(127.5).sub(1)))
            labels = torch.from_numpy(images.labels[rows]).to(device)
            view = View(order[rows], int(share * spec.seq_len))
            for _ in range(draws):
                sums.append(model.loss(tokens, labels, view).double().mean(1))
        results.append(torch.cat(sums).mean().item())
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("models", nargs="+")
    parser.add_argument("--test", required=True)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--draws", type=int, default=4)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    results: dict[str, list[float]] = {}
    print(f"{'known':<40}" + "".join(f"{s:>9.1%}" for s in SHARES) + f"{'mean':>9}")
    for name in options.models:
        pipe = continuar.load(name, device=pick_device(options.device))
        images = load_images(options.test, size=pipe.tokenizer.config.image_size)
        results[name] = losses(pipe, images, min(options.images, len(images)), options.draws)
        mean = sum(results[name]) / len(SHARES)
        print(f"{name:<40}" + "".join(f"{x:9.4f}" for x in results[name]) + f"{mean:9.4f}", flush=True)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps({"known": SHARES, "loss": results}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
