"""Image features of SqueezeNet 1.1 (Iandola et al. 2016), written out in torch so that torchvision is not needed.

The weights are the user's to supply by path: a safetensors file with the keys of torchvision's ``squeezenet1_1``, trained on
ImageNet in Caffe's convention (BGR, means subtracted).

The Inception network of FID as torch-fidelity ports it, with the spatial features of sFID beside its own.

sFID (Nash et al. 2021) is the Frechet distance of features that still know where something is: the first 7 channels of a 17 x 17
map, 2,023 numbers, about as many as FID's 2,048. ADM's suite (Dhariwal & Nichol 2021), whose references hold their mean and
covariance as mu_s and sigma_s, reads them from the tensor "mixed_6/conv:0" of the graph of 2015-12-05. What that is:

* The graph lists the operations of a unit, as published listings of its first ones show, in the order conv2d_params, Conv2D,
  batchnorm, CheckNumerics, control_dependency, and last one with the unit's own name, which the next unit reads: the ReLU. So
  "mixed_6/conv" is the first branch's 1x1 convolution *after* batch norm and ReLU; the bare convolution is "mixed_6/conv/Conv2D".
* The ports of the graph to torch load mixed_6/conv into ``Mixed_6d.branch1x1``, channel by channel; public ports of sFID read the
  whole unit as well.
* The suite flattens [N, 17, 17, 7], channels last. The distance of two sets computed here would be the same in any order; against
  mu_s and sigma_s the order matters.

It has not been compared with published numbers: the weights are the user's to supply.

A small residual classifier of images, to ask of generated images whether they show what was asked for.

Three stages of pre-activation blocks (He et al. 2016; the wide variant of Zagoruyko & Komodakis 2016), global average, linear.

The networks whose features images are compared by. `NETWORKS` is the closed table of those that the command line knows.

A network is any module from uint8 images [B, H, W, 3] to features [B, D], or to (features, logits [B, C]), or to (features, logits,
spatial features [B, S]). Its name and the SHA-256 of its weights stand in every report: distances in different features, or by
different weights, cannot be compared. "FID", "sFID", "KID" and "IS" without more mean the FID Inception weights and nothing else.
"""

from __future__ import annotations

import hashlib
import io
import json
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

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
from continuar.config import from_json
from continuar.devices import pick_device
from continuar.errors import UserError, require, unknown_name

FEATURES = 512
_SIZE = 224
_MEANS_BGR = (103.939, 116.779, 123.68)


class _Fire(nn.Module):
    """Squeeze to few channels, expand by 1x1 and 3x3 side by side."""

    def __init__(self, inputs: int, squeeze: int, expand: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(inputs, squeeze, 1)
        self.expand1x1 = nn.Conv2d(squeeze, expand, 1)
        self.expand3x3 = nn.Conv2d(squeeze, expand, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.squeeze(x))
        return torch.cat((F.relu(self.expand1x1(x)), F.relu(self.expand3x3(x))), 1)


class SqueezeNet(nn.Module):
    """uint8 images [B, H, W, 3] of any size -> features [B, 512] float32, the global average of the last feature map."""

    def __init__(self) -> None:
        super().__init__()
        fires = [_Fire(64, 16, 64), _Fire(128, 16, 64), nn.MaxPool2d(3, 2)]
        fires += [_Fire(128, 32, 128), _Fire(256, 32, 128), nn.MaxPool2d(3, 2)]
        fires += [_Fire(256, 48, 192), _Fire(384, 48, 192), _Fire(384, 64, 256), _Fire(512, 64, 256)]
        # The list's indices are the keys of torchvision's layout.
        self.layers = nn.ModuleList([nn.Conv2d(3, 64, 3, 2), nn.ReLU(), nn.MaxPool2d(3, 2), *fires])

    @classmethod
    def from_file(cls, path: str | Path, device: torch.device | str = "cpu") -> SqueezeNet:
        """The network with weights from a safetensors file.

        Raises:
            UserError: missing, unreadable, or other keys or shapes.
        """
        network = cls()
        tensors = read_tensors(Path(path))
        # A whole network's file has its classifier beside the features, under a prefix.
        layers = {f"layers.{k.removeprefix('features.')}": v for k, v in tensors.items() if not k.startswith("classifier.")}
        load_state(network, layers, str(path))
        return network.eval().to(device)

    def forward(self, images_BHW3: Tensor) -> Tensor:
        x = images_BHW3.permute(0, 3, 1, 2).flip(1).float()
        if x.shape[-2:] != (_SIZE, _SIZE):
            x = F.interpolate(x, (_SIZE, _SIZE), mode="bicubic", antialias=True, align_corners=False).clamp(0, 255)
        x = x - torch.tensor(_MEANS_BGR, device=x.device).view(1, 3, 1, 1)
        for layer in self.layers:
            x = layer(x)
        return x.mean((2, 3))


@contextmanager
def exact_float32() -> Iterator[None]:
    """No gradients, and float32 products in float32: no TF32 inside the block."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        with torch.no_grad():
            yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def extract(
    network: Callable[[Tensor], Tensor],
    images_BHW3: np.ndarray,
    *,
    device: torch.device | str = "cpu",
    batch_size: int = 256,
    on_progress: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """Features [n, D] float32 of uint8 images [n, H, W, 3], batch by batch, in float32 (no autocast, no TF32)."""
    require(images_BHW3.ndim == 4 and images_BHW3.shape[-1] == 3, f"images are {images_BHW3.shape}; allowed: [n, H, W, 3]")
    parts = []
    with exact_float32():
        for first in range(0, len(images_BHW3), batch_size):
            batch = torch.from_numpy(np.ascontiguousarray(images_BHW3[first : first + batch_size])).to(device)
            parts.append(network(batch).float().cpu().numpy())
            if on_progress is not None:
                on_progress(min(first + batch_size, len(images_BHW3)), len(images_BHW3))
    return np.concatenate(parts)


def check_same_dimensions(a_MD: np.ndarray, b_ND: np.ndarray) -> None:
    """Refuses two sets that are not features of one network."""
    require(a_MD.ndim == b_ND.ndim == 2, f"features are {a_MD.shape} and {b_ND.shape}; allowed: [images, dimensions]")
    require(a_MD.shape[1] == b_ND.shape[1], f"features of {a_MD.shape[1]} and {b_ND.shape[1]} dimensions cannot be compared")


def float64_device(device: torch.device | str) -> torch.device:
    """The device, or the CPU instead of one that has no float64."""
    found = pick_device(device)
    return torch.device("cpu") if found.type == "mps" else found


SPATIAL_CHANNELS = 7


class Inception(nn.Module):
    """uint8 images [B, H, W, 3] -> features [B, 2048], logits without bias [B, 1008], spatial features [B, 2023].

    The images are resized bilinearly to 299 x 299 as in TensorFlow 1.

    Args:
        network: torch-fidelity's FeatureExtractorInceptionV3, asked for 2048 and logits_unbiased.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self._unit: Tensor | None = None
        network.get_submodule("Mixed_6d.branch1x1").register_forward_hook(self._keep)

    def _keep(self, unit: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self._unit = output

    def forward(self, images_BHW3: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        features, logits = self.network(images_BHW3.permute(0, 3, 1, 2).contiguous())
        assert self._unit is not None
        spatial = self._unit[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
        self._unit = None
        return features, logits, spatial


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
