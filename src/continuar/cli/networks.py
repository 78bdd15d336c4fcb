"""The options that choose a feature network, and the device of a process, shared by ``stats``, ``evaluate`` and ``sweep``."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from continuar.devices import pick_device
from continuar.evaluation.networks import FeatureNetwork, load_network


@dataclass(frozen=True)
class NetworkOptions:
    """Which features images are compared by."""

    network: str = "inception"
    """inception (the FID network), squeezenet, classifier, dinov2 or pixels; only the first gives what is called FID."""
    network_weights: Path | None = None
    """Its weights: a file, or a directory for classifier and dinov2."""

    def load(self, device: torch.device) -> FeatureNetwork:
        """The network on a device."""
        return load_network(self.network, self.network_weights, device)


def local_device(name: str) -> torch.device:
    """As `pick_device`, with a GPU for each process of a machine under torchrun."""
    device = pick_device(name)
    spread = device.type == "cuda" and device.index is None and "LOCAL_RANK" in os.environ
    return torch.device("cuda", int(os.environ["LOCAL_RANK"])) if spread else device
