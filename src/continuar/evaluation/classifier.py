"""A small residual classifier of images, to ask of generated images whether they show what was asked for.

Three stages of pre-activation blocks (He et al. 2016; the wide variant of Zagoruyko & Komodakis 2016), global average, linear.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from continuar.checkpoints.store import (
    CONFIG,
    WEIGHTS,
    atomic_directory,
    load_state,
    read_json,
    read_tensors,
    write_json,
    write_tensors,
)
from continuar.configs import from_json
from continuar.errors import require
from continuar.evaluation.features import extract


@dataclass(frozen=True)
class ClassifierConfig:
    """Width of the first stage (doubled twice), blocks per stage, class names in label order."""

    classes: tuple[str, ...]
    width: int = 40
    blocks: int = 2

    def __post_init__(self) -> None:
        require(len(self.classes) >= 2, f"{len(self.classes)} classes; allowed: 2 or more")
        require(self.width >= 1 and self.blocks >= 1, f"width {self.width}, blocks {self.blocks}; allowed: 1 or more")


class _Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(inputs), nn.BatchNorm2d(outputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if inputs != outputs or stride > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm1(x))
        skip = x if self.shortcut is None else self.shortcut(h)
        return skip + self.conv2(F.relu(self.norm2(self.conv1(h))))


class Classifier(nn.Module):
    """uint8 images [B, H, W, 3] -> logits [B, classes]."""

    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__()
        self.config = config
        widths = [config.width, 2 * config.width, 4 * config.width]
        blocks, inputs = [], config.width
        for stage, width in enumerate(widths):
            for number in range(config.blocks):
                blocks.append(_Block(inputs, width, 2 if stage and number == 0 else 1))
                inputs = width
        self.stem = nn.Conv2d(3, config.width, 3, padding=1, bias=False)
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.BatchNorm2d(inputs)
        self.output = nn.Linear(inputs, len(config.classes))

    def forward(self, images_BHW3: Tensor) -> Tensor:
        return self.output(self.features(images_BHW3))

    def features(self, images_BHW3: Tensor) -> Tensor:
        """What the last layer sees: the global average of the last feature map, [B, 4 width]."""
        x = images_BHW3.permute(0, 3, 1, 2).float() / 127.5 - 1
        return F.relu(self.norm(self.blocks(self.stem(x)))).mean((2, 3))

    def predict(self, images_BHW3: np.ndarray, batch_size: int = 500) -> np.ndarray:
        """Labels [n] int64 of uint8 images; the logits of an image and of its mirror image are averaged."""
        device = next(self.parameters()).device
        mirrored = np.ascontiguousarray(images_BHW3[:, :, ::-1])
        logits = [extract(self.eval(), images, device=device, batch_size=batch_size) for images in (images_BHW3, mirrored)]
        return (logits[0] + logits[1]).argmax(1)

    def save(self, directory: Path, dtype: torch.dtype | None = None) -> None:
        """Writes config.json and model.safetensors."""
        with atomic_directory(directory) as temporary:
            write_json(temporary / CONFIG, self.config)
            write_tensors(temporary / WEIGHTS, self.state_dict(), dtype)

    @classmethod
    def load(cls, directory: str | Path, device: torch.device | str = "cpu") -> Classifier:
        """The inverse of `save`, in evaluation mode and float32.

        Raises:
            UserError: missing, unreadable, or other keys or shapes.
        """
        directory = Path(directory)
        config = from_json(ClassifierConfig, read_json(directory / CONFIG), str(directory / CONFIG))
        network = cls(config)
        load_state(network, read_tensors(directory / WEIGHTS), str(directory / WEIGHTS))
        return network.float().eval().to(device)


def class_accuracy(predicted: np.ndarray, labels: np.ndarray) -> float:
    """The share of images that are recognised as what they should show."""
    require(len(predicted) == len(labels) > 0, f"{len(predicted)} predictions for {len(labels)} labels; allowed: as many, not 0")
    return float((predicted == labels).mean())
