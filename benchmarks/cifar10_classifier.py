"""Trains the small classifier that tells whether generated CIFAR-10 images show what was asked for.

    python benchmarks/cifar10_classifier.py --train cifar10-train.parquet --test cifar10-test.parquet --out out/classifier

The data stays on the device; random shifts by 4 pixels, mirror images and one grey square per image (cutout, DeVries & Taylor
2017); SGD with Nesterov momentum, one cycle of the learning rate, label smoothing 0.1, and an average of the weights. The cycle
ends with the last epoch or with --minutes, whichever comes first. The accuracy printed, and written to result.json, is that of the
stored bfloat16 weights on the test images, logits averaged with those of mirror images.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils import convert_conv2d_weight_memory_format
from torch.optim.swa_utils import get_ema_multi_avg_fn

from continuar.data.loader import load_images
from continuar.distributed import pick_device
from continuar.evaluation.metrics import class_accuracy
from continuar.evaluation.networks import Classifier, ClassifierConfig
from continuar.io import write_json
from continuar.training.config import DataConfig
from continuar.training.data import IndexStream, augment

PEAK_LR = 0.4


def cut_out(pixels_BHW3: Tensor, side: int) -> Tensor:
    """Sets a square of ``side`` pixels, its place drawn per image and clipped at the edges, to grey."""
    batch, height, width, _ = pixels_BHW3.shape
    device = pixels_BHW3.device
    top, left = (torch.randint(n, (batch, 1), device=device) - side // 2 for n in (height, width))
    y, x = torch.arange(height, device=device), torch.arange(width, device=device)
    rows, columns = (y >= top) & (y < top + side), (x >= left) & (x < left + side)
    return pixels_BHW3.masked_fill((rows[:, :, None] & columns[:, None, :])[..., None], 128)


def one_cycle(progress: float, rise: float = 0.2) -> float:
    """The learning rate's factor at ``progress`` 0..1: by cosines up from 1/25, then down to 0 (Smith & Topin 2018)."""
    if progress < rise:
        return 1 - (1 - 1 / 25) * (1 + math.cos(math.pi * progress / rise)) / 2
    return (1 + math.cos(math.pi * min(1.0, (progress - rise) / (1 - rise)))) / 2


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--train", required=True)
    parser.add_argument("--test", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=45)
    parser.add_argument("--minutes", type=float, default=math.inf, help="of training at most")
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--width", type=int, default=80)
    parser.add_argument("--cutout", type=int, default=8, help="side of the grey square in pixels; 0: none")
    parser.add_argument("--limit", type=int, default=0, help="use only so many training and test images")
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    device = pick_device(options.device)
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True
    data, test = (load_images(p, size=32) for p in (options.train, options.test))
    count = options.limit or len(data)
    pixels = torch.from_numpy(data.images[:count]).permute(0, 3, 1, 2).to(device)
    labels = torch.from_numpy(data.labels[:count]).to(device)
    network = Classifier(ClassifierConfig(data.classes, options.width)).to(device)
    convert_conv2d_weight_memory_format(network, torch.channels_last)
    average = copy.deepcopy(network)
    print(f"{sum(p.numel() for p in network.parameters()) / 1e6:.2f} M parameters, {count} images, {device}")

    steps = options.epochs * count // options.batch_size
    optimizer = torch.optim.SGD(network.parameters(), lr=PEAK_LR, momentum=0.9, nesterov=True, weight_decay=5e-4)
    stream, augmentation = IndexStream(count, options.batch_size, 0), DataConfig(flip=True, crop_padding=4)
    began, step = time.perf_counter(), 0
    while (progress := max(step / max(1, steps), (time.perf_counter() - began) / (60 * options.minutes))) < 1:
        for group in optimizer.param_groups:
            group["lr"] = PEAK_LR * one_cycle(progress)
        index = torch.from_numpy(stream.batch(step)).to(device)
        batch = cut_out(augment(pixels[index], augmentation).permute(0, 2, 3, 1), options.cutout)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = F.cross_entropy(network(batch), labels[index], label_smoothing=0.1)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        decay = min(0.998, (1 + step) / (10 + step))
        with torch.no_grad():
            get_ema_multi_avg_fn(decay)(list(average.parameters()), list(network.parameters()), step)
            for mine, theirs in zip(average.buffers(), network.buffers(), strict=True):
                mine.copy_(theirs)
        if step % max(1, steps // 10) == 0:
            print(f"step {step}/{steps}  loss {loss.item():.3f}  {time.perf_counter() - began:.0f} s", flush=True)
        step += 1
    seconds = time.perf_counter() - began
    average.save(options.out, torch.bfloat16)
    shown = test.images[: options.limit or None]
    accuracy = class_accuracy(Classifier.load(options.out, device).predict(shown), test.labels[: len(shown)])
    result = {"test_accuracy": accuracy, "test_images": len(shown), "epochs": step * options.batch_size / count, "seconds": seconds}
    write_json(options.out / "result.json", result)
    print(f"test accuracy {accuracy:.4f} on {len(shown)} images; {result['epochs']:.1f} epochs in {seconds:.0f} s; {options.out}")


if __name__ == "__main__":
    main()
