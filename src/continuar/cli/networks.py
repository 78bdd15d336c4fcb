"""The options that choose a feature network and what it is run on, shared by ``stats``, ``evaluate`` and ``sweep``."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress

from continuar.devices import pick_device
from continuar.evaluation.networks import FeatureNetwork, load_network

OnProgress = Callable[[int, int], None]


@dataclass(frozen=True)
class NetworkOptions:
    """Which features images are compared by."""

    network: str = "inception"
    """inception (the FID network), squeezenet, classifier or dinov2; only the first gives what is called FID."""
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


@contextmanager
def progress_bars(*, shown: bool = True) -> Iterator[Callable[[str], OnProgress]]:
    """Yields a function from a description to what is told (done, in all); on stderr."""
    with Progress(console=Console(file=sys.stderr), disable=not shown) as progress:

        def bar(description: str) -> OnProgress:
            task = progress.add_task(description, total=None)
            return lambda done, total: progress.update(task, completed=done, total=total)

        yield bar
