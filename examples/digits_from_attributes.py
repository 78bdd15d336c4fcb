"""Digits from a written word and two attributes: the condition is a sequence of vectors, as a text encoder would give it.

    python examples/digits_from_attributes.py [--out out/digits_from_attributes] [--images 50000]

There are no labels. The condition of an image is six vectors: the letters of "seven" one by one, and how much ink and slant to use
compared with other sevens. A text encoder could make these vectors instead of the spelling:

1. Measure ink and slant of scikit-learn's digits; make each image's sequence [6, 28] of them and of its name.
2. Train MAR with a condition of six vectors; one in ten sequences is dropped, for guidance.
3. Generate: every word at growing ink, and at growing slant, from the same seeds.
4. Compare: the word that a support vector machine reads with the requested word, and measured with requested ink and slant.

A few minutes of one core's time on a CPU. Needs scikit-learn and matplotlib (pip install 'continuar[demo]').
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from pathlib import Path

import torch
from torch import Tensor

from continuar import Model, ModelConfig, Pipeline, SamplingOptions
from continuar.checkpoints.store import PipelineConfig
from continuar.data.loader import load_digits
from continuar.heads import DiffusionHeadConfig, DiffusionOptions
from continuar.models import MAEConfig
from continuar.models.conditions import VectorsConfig
from continuar.sampling.generate import SamplingInput, generate
from continuar.tokenizers import PixelConfig, PixelTokenizer

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
LETTERS = "abcdefghijklmnopqrstuvwxyz"
PLACES = max(map(len, WORDS))
CONDITION = VectorsConfig(dim=len(LETTERS) + 2, count=PLACES + 1)


def describe(digits_B: Tensor, attributes_B2: Tensor) -> Tensor:
    """The sequence [B, 6, 28] for each digit: its letters, zeros after a short word, then a vector with ink and slant."""
    spelled = torch.zeros(len(WORDS), PLACES, len(LETTERS))
    for number, word in enumerate(WORDS):
        for place, letter in enumerate(word):
            spelled[number, place, LETTERS.index(letter)] = 1
    sequence = torch.zeros(len(digits_B), CONDITION.count, CONDITION.dim)
    sequence[:, :PLACES, : len(LETTERS)] = spelled[digits_B]
    sequence[:, PLACES, len(LETTERS) :] = attributes_B2
    return sequence


def measure(images_BHW: Tensor) -> Tensor:
    """(ink, slant) [B, 2] of images in [0, 1]: the mean, and the shift of strokes to the right per row upwards."""
    ink = images_BHW.mean((1, 2))
    mass = images_BHW / images_BHW.sum((1, 2), keepdim=True).clamp_min(1e-6)
    rows, columns = torch.arange(8.0).view(-1, 1), torch.arange(8.0)
    y = rows - (mass * rows).sum((1, 2))[:, None, None]
    x = columns - (mass * columns).sum((1, 2))[:, None, None]
    return torch.stack((ink, -(mass * x * y).sum((1, 2)) / (mass * y * y).sum((1, 2)).clamp_min(1e-6)), 1)


@dataclasses.dataclass(frozen=True)
class Digits:
    """Images in [0, 1], their digits, and the mean and std of the attributes of each digit."""

    images_BHW: Tensor
    digits_B: Tensor
    mean_of_digit: Tensor
    std_of_digit: Tensor

    def relative(self, attributes_B2: Tensor, digits_B: Tensor) -> Tensor:
        """Measured attributes in standard deviations from the mean of their digit."""
        return (attributes_B2 - self.mean_of_digit[digits_B]) / self.std_of_digit[digits_B]


def load() -> Digits:
    """All 1,797 digits."""
    found = load_digits()
    images, digits = torch.from_numpy(found.images[..., 0]).float() / 255, torch.from_numpy(found.labels)
    of_digit = [measure(images[digits == d]) for d in range(10)]
    return Digits(images, digits, torch.stack([a.mean(0) for a in of_digit]), torch.stack([a.std(0) for a in of_digit]))


def build(std: float, width: int = 96, depth: int = 2) -> tuple[Model, PixelTokenizer]:
    """A MAR over 16 tokens of 2x2 pixels with a sequence of vectors as condition, and its tokenizer."""
    tokenizer = PixelConfig(image_size=8, patch=2, channels=1, std=std).build()
    sizes = {"width": width, "encoder_depth": depth, "heads": 4, "decoder_depth": depth}
    # The buffer holds the condition; with as many places as vectors, each vector stands there once.
    backbone = MAEConfig(**sizes, buffer=CONDITION.count, attention_dropout=0.0, dropout=0.0)
    head = DiffusionHeadConfig(width=128, depth=3, prediction="v_prediction")
    return ModelConfig(tokenizer.spec, backbone=backbone, head=head, condition=CONDITION).build(), tokenizer


def train(model: Model, tokenizer: PixelTokenizer, data: Digits, images: int, batch: int = 64) -> Model:
    """Trains on this many images, repetitions counted."""
    tokens = tokenizer.tokenize(tokenizer.encode((data.images_BHW * 2 - 1)[:, None].expand(-1, 3, -1, -1)))
    conditions = describe(data.digits_B, data.relative(measure(data.images_BHW), data.digits_B))
    steps = -(-images // batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps, pct_start=0.1)
    for step in range(steps):
        chosen = torch.randint(len(tokens), (batch,))
        loss = model.loss(
            tokens[chosen], conditions[chosen], model.training_view(batch, tokens.device), condition_dropout=0.1
        ).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 3.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps - 1:
            print(f"step {step:5d} of {steps}  loss {loss.item():.3f}", flush=True)
    return model.eval()


def sample(pipe: Pipeline, conditions: Tensor, seeds: Tensor) -> Tensor:
    """Images [B, 8, 8] in [0, 1], one per condition and seed."""
    tokens = generate(pipe.model, SamplingInput.blank(pipe.model.config.tokens, seeds, conditions), pipe.defaults)
    return (pipe.tokenizer.decode(tokens)[:, 0] + 1) / 2


def report(pipe: Pipeline, data: Digits, count: int) -> None:
    """Prints how often the word that was asked for is read, and how measured ink and slant follow the requested ones."""
    from sklearn.svm import SVC

    reader = SVC(gamma="scale").fit(data.images_BHW.flatten(1).numpy(), data.digits_B.numpy())
    digits, asked = torch.arange(count) % 10, torch.randn(count, 2).clamp(-2, 2)
    drawn = sample(pipe, describe(digits, asked), torch.arange(count))
    right = (torch.from_numpy(reader.predict(drawn.flatten(1).numpy())) == digits).float().mean()
    got = data.relative(measure(drawn), digits)
    ink, slant = (torch.corrcoef(torch.stack((asked[:, i], got[:, i])))[0, 1] for i in range(2))
    print(f"{count} images: read as the word {right:.3f}; correlation of asked and measured ink {ink:.3f}, slant {slant:.3f}")


def plot(pipe: Pipeline, out: Path) -> None:
    """A row for each word: growing ink on the left, growing slant on the right, the same seed throughout a row."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    values = torch.linspace(-2, 2, 6)
    figure, axes = plt.subplots(1, 2, figsize=(9, 7.2))
    for which, (axis, name) in enumerate(zip(axes, ("ink", "slant"), strict=True)):
        digits = torch.arange(10).repeat_interleave(len(values))
        asked = torch.zeros(len(digits), 2)
        asked[:, which] = values.repeat(10)
        drawn = sample(pipe, describe(digits, asked), digits)
        page = torch.nn.functional.pad(drawn, (0, 1, 0, 1), value=0.5).view(10, len(values), 9, 9).transpose(1, 2).reshape(90, -1)
        axis.imshow(page.numpy(), cmap="gray_r", vmin=0, vmax=1)
        axis.set_yticks([9 * i + 3.5 for i in range(10)], [f'"{w}"' for w in WORDS])
        axis.set_xticks([9 * i + 3.5 for i in range(len(values))], [f"{v:+.1f}" for v in values.tolist()])
        axis.set_title(f"{name}, in standard deviations", fontsize=10)
    figure.tight_layout()
    figure.savefig(out, dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("out/digits_from_attributes"))
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--samples", type=int, default=300)
    options = parser.parse_args()
    torch.manual_seed(0)
    data = load()
    began = time.process_time()
    model, tokenizer = build((data.images_BHW * 2).std().item())
    train(model, tokenizer, data, options.images)
    print(f"CPU time of training: {time.process_time() - began:.0f} s")
    sampling = SamplingOptions(steps=16, guidance_scale=2.0, head=DiffusionOptions(diffusion_steps=50))
    pipe = Pipeline(PipelineConfig(model.config, tokenizer.config, (), sampling), model, tokenizer)
    pipe.save_pretrained(options.out / "model")
    report(pipe, data, options.samples)
    plot(pipe, options.out / "attributes.png")
    print(f"wrote {options.out / 'attributes.png'} and {options.out / 'model'}")


if __name__ == "__main__":
    main()
