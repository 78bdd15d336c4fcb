"""Feature networks and a generating model for tests, of a few hundred and a few thousand weights."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from continuar.evaluation.networks import Classifier, ClassifierConfig, FeatureNetwork, load_network
from tests.tiny import model_configs, pipeline

CLASSES = ("ant", "bee", "cat")


def save_classifier(directory: Path, seed: int = 0) -> Path:
    """An untrained classifier of 8 features, whose weights are large enough to tell images apart."""
    torch.manual_seed(seed)
    classifier = Classifier(ClassifierConfig(CLASSES, width=2, blocks=1))
    with torch.no_grad():
        for parameter in classifier.parameters():
            parameter.mul_(3)
    classifier.save(directory)
    return directory


def tiny_network(directory: Path, seed: int = 0) -> FeatureNetwork:
    return load_network("classifier", save_classifier(directory / f"classifier{seed}", seed))


def save_model(directory: Path) -> Path:
    """A masked model with three classes; velocity, so that few denoising steps do not make everything black and white."""
    found = (c for c in model_configs() if (c.order.kind, c.backbone.kind, c.head.kind) == ("mar", "mae", "diffusion"))
    config = next(c for c in found if c.head.prediction == "v_prediction")
    return pipeline(config).save_pretrained(directory)


class MeanColour(nn.Module):
    """3 features, no weights."""

    def forward(self, images_BHW3: torch.Tensor) -> torch.Tensor:
        return images_BHW3.float().mean((1, 2))


class Halves(nn.Module):
    """Features: the mean colour. No logits. Spatial features: the mean colours of the upper and of the lower half."""

    def forward(self, images_BHW3: torch.Tensor) -> tuple[torch.Tensor, None, torch.Tensor]:
        x = images_BHW3.float()
        return x.mean((1, 2)), None, torch.cat([half.mean((1, 2)) for half in x.chunk(2, dim=1)], 1)
