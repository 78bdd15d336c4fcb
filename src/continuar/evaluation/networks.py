"""The networks whose features images are compared by. `NETWORKS` is the closed table of those that the command line knows.

A network is any module from uint8 images [B, H, W, 3] to features [B, D], or to (features, logits [B, C]), or to (features, logits,
spatial features [B, S]). Its name and the SHA-256 of its weights stand in every report: distances in different features, or by
different weights, cannot be compared. "FID", "sFID", "KID" and "IS" without more mean the FID Inception weights and nothing else.
"""

from __future__ import annotations

import hashlib
import io
import json
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from continuar.checkpoints.store import CONFIG, WEIGHTS
from continuar.errors import UserError, require, unknown_name
from continuar.evaluation.classifier import Classifier
from continuar.evaluation.features import SqueezeNet, exact_float32
from continuar.evaluation.inception import Inception

FID_SHA256 = "6726825d"
"""How the SHA-256 of weights-inception-2015-12-05-6726825d.pth begins, as its publisher writes it into the name."""


@dataclass(frozen=True)
class Extracted:
    """Features [n, D]; from networks that judge classes, logits [n, C]; from `inception`, spatial features [n, S]. float32."""

    features_ND: np.ndarray
    logits_NC: np.ndarray | None
    spatial_NS: np.ndarray | None = None


@dataclass(frozen=True)
class FeatureNetwork:
    """A network with its identity. `of` makes one of any module."""

    name: str
    module: nn.Module
    """uint8 images [B, H, W, 3] -> features [B, D], (features, logits [B, C]) or (features, logits, spatial features [B, S]); in
    evaluation mode."""
    sha256: str
    """Of the weights, hexadecimal."""
    classes: tuple[str, ...] = ()
    """What its logits mean, where that is known."""

    @classmethod
    def of(cls, module: nn.Module, name: str = "custom") -> FeatureNetwork:
        """Any module, identified by a name of your own and the SHA-256 of its state."""
        require(name not in NETWORKS, f"network name is '{name}', which means another one; allowed: any other name")
        return cls(name, module.eval(), sha256_of_state(module))

    @property
    def is_fid(self) -> bool:
        """Whether distances may be called FID and KID, and the score IS."""
        return self.name == "inception" and self.sha256.startswith(FID_SHA256)

    def title(self, short: str, long: str) -> str:
        """The short name of a metric, as "FID", if it is that; else the long one with the network's name."""
        return short if self.is_fid else f"{long} ({self.name})"

    def __call__(self, images_BHW3: np.ndarray) -> Extracted:
        """One batch, in float32 (no autocast, no TF32).

        Raises:
            UserError: the module returns something else.
        """
        parameter = next(self.module.parameters(), torch.empty(0))
        with exact_float32():
            out = self.module(torch.from_numpy(np.ascontiguousarray(images_BHW3)).to(parameter.device))
        features, *more = out if isinstance(out, tuple) else (out,)
        logits, spatial = (*more, None, None)[:2]
        for what, value in (("features", features), ("logits", logits), ("spatial features", spatial)):
            shape = (len(images_BHW3), 0) if value is None else tuple(value.shape)
            require(
                len(shape) == 2 and shape[0] == len(images_BHW3),
                f"the network '{self.name}' gives {what} {shape}; allowed: [{len(images_BHW3)}, any]",
            )
        logits_NC, spatial_NS = (None if value is None else value.float().cpu().numpy() for value in (logits, spatial))
        return Extracted(features.float().cpu().numpy(), logits_NC, spatial_NS)


def load_network(name: str, weights: str | Path | None, device: torch.device | str = "cpu") -> FeatureNetwork:
    """A network of the closed table with the user's weights.

    Raises:
        UserError: an unknown name; no weights, or not this network's; a package that is not installed.
    """
    if name not in NETWORKS:
        raise unknown_name("network", name, NETWORKS)
    build, what = NETWORKS[name]
    if name == PIXELS:
        require(weights is None, f"--network-weights is {weights}; the network '{PIXELS}' has none")
        return FeatureNetwork(PIXELS, Pixels(), sha256_of_state(Pixels()))
    require(weights is not None, f"the network '{name}' needs --network-weights: {what}")
    path = Path(weights or "")
    require(path.exists(), f"network weights {path} do not exist; needed: {what}")
    network = build(path)
    network.module.eval().requires_grad_(False).to(device)
    return network


class Pixels(nn.Module):
    """Colours in 0..1; of larger images, their means over a grid of 8 x 8.

    Scores in them tell how a run goes, and whether colours and layout are right; not whether things can be recognised.
    """

    def forward(self, images_BHW3: Tensor) -> Tensor:
        x = images_BHW3.permute(0, 3, 1, 2).float() / 255
        height, width = x.shape[-2:]
        return F.adaptive_avg_pool2d(x, (min(8, height), min(8, width))).flatten(1)


def _squeezenet(path: Path) -> FeatureNetwork:
    return FeatureNetwork("squeezenet", SqueezeNet.from_file(path), sha256_of_file(path))


class _ClassifierFeatures(nn.Module):
    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, images_BHW3: Tensor) -> tuple[Tensor, Tensor]:
        features = self.classifier.features(images_BHW3)
        return features, self.classifier.output(features)


def _classifier(path: Path) -> FeatureNetwork:
    classifier = Classifier.load(path)
    return FeatureNetwork("classifier", _ClassifierFeatures(classifier), sha256_of_file(path / WEIGHTS), classifier.config.classes)


def _inception(path: Path) -> FeatureNetwork:
    try:
        fidelity = import_module("torch_fidelity.feature_extractor_inceptionv3")
    except ImportError as problem:
        raise UserError("the network 'inception' needs torch-fidelity: pip install 'continuar[inception]'") from problem
    except RuntimeError as problem:
        raise UserError(
            f"torch-fidelity needs a torchvision that fits torch {torch.__version__}: {_one_line(problem)}"
        ) from problem
    try:
        # Unpickled safely here and written anew for torch-fidelity, which unpickles whatever it is given.
        state = torch.load(path, map_location="cpu", weights_only=True)
        safe = io.BytesIO()
        torch.save(state, safe)
        safe.seek(0)
        network = fidelity.FeatureExtractorInceptionV3(
            "inception", ["2048", "logits_unbiased"], feature_extractor_weights_path=safe
        )
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError, TypeError, ValueError, AttributeError) as problem:
        raise UserError(f"{path} is truncated or not the Inception network's weights: {_one_line(problem)}") from problem
    return FeatureNetwork("inception", Inception(network), sha256_of_file(path))


_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class _DINOv2(nn.Module):
    """The class token after the last norm, of images at 224x224 (Oquab et al. 2023; as features, Stein et al. 2023)."""

    def __init__(self, network: nn.Module, size: int = 224) -> None:
        super().__init__()
        self.network, self.size = network, size

    def forward(self, images_BHW3: Tensor) -> Tensor:
        x = images_BHW3.permute(0, 3, 1, 2).float() / 255
        if x.shape[-2:] != (self.size, self.size):
            x = F.interpolate(x, (self.size, self.size), mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
        mean, std = (torch.tensor(values, device=x.device).view(3, 1, 1) for values in (_IMAGENET_MEAN, _IMAGENET_STD))
        return self.network(pixel_values=(x - mean) / std).last_hidden_state[:, 0]


def _dinov2(path: Path) -> FeatureNetwork:
    try:
        transformers = import_module("transformers")
    except ImportError as problem:
        raise UserError("the network 'dinov2' needs transformers: pip install transformers") from problem
    require((path / CONFIG).is_file() and (path / WEIGHTS).is_file(), f"{path} has no {CONFIG} and {WEIGHTS}")
    try:
        kind = json.loads((path / CONFIG).read_text(encoding="utf-8")).get("model_type", "")
        require(kind.startswith("dinov2"), f"{path} is a model of type '{kind}'; allowed: dinov2")
        model, loaded = transformers.AutoModel.from_pretrained(
            path, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    except UserError:
        raise
    except Exception as problem:  # transformers and safetensors raise many kinds
        raise UserError(f"{path} is not a DINOv2 model: {_one_line(problem)}") from problem
    wrong = [k for kind in ("missing_keys", "mismatched_keys") for k in loaded[kind]]
    require(not wrong, f"{path} does not fit the model: missing or of another shape: {', '.join(map(str, wrong[:8]))}")
    return FeatureNetwork("dinov2", _DINOv2(model), sha256_of_file(path / WEIGHTS))


PIXELS = "pixels"
NETWORKS: dict[str, tuple[Callable[[Path], FeatureNetwork], str]] = {
    "inception": (_inception, "weights-inception-2015-12-05-6726825d.pth, of torch-fidelity's release v0.2.0"),
    "squeezenet": (_squeezenet, "a safetensors file with the keys of torchvision's squeezenet1_1"),
    "classifier": (_classifier, "a directory written by Classifier.save"),
    "dinov2": (_dinov2, "a directory with config.json and model.safetensors of a DINOv2 model"),
    PIXELS: (lambda _: load_network(PIXELS, None), "none"),
}
"""Name -> (loader, what its weights are)."""


def sha256_of_file(path: Path) -> str:
    """Hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_state(module: nn.Module) -> str:
    """Of a module's state: names, types, shapes and bytes, in the order of the names; hexadecimal."""
    digest = hashlib.sha256()
    state: dict[str, Any] = module.state_dict()
    for key in sorted(state):
        value: Tensor = state[key].detach().cpu().contiguous()
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _one_line(problem: BaseException, length: int = 300) -> str:
    text = " ".join(str(problem).split()) or type(problem).__name__
    return text if len(text) <= length else text[: length - 3] + "..."
