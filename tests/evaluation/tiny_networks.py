"""Feature networks for tests, of a few hundred weights."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from continuar.evaluation.classifier import Classifier, ClassifierConfig
from continuar.evaluation.networks import FeatureNetwork, load_network

CLASSES = ("ant", "bee", "cat")


def save_classifier(directory: Path, seed: int = 0) -> Path:
    """An untrained classifier of 8 features."""
    torch.manual_seed(seed)
    Classifier(ClassifierConfig(CLASSES, width=2, blocks=1)).save(directory)
    return directory


def tiny_network(directory: Path, seed: int = 0) -> FeatureNetwork:
    return load_network("classifier", save_classifier(directory / f"classifier{seed}", seed))


class MeanColour(nn.Module):
    """3 features, no weights."""

    def forward(self, images_BHW3: torch.Tensor) -> torch.Tensor:
        return images_BHW3.float().mean((1, 2))
