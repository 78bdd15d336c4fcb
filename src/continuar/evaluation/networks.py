"""The networks whose features images are compared by; `NETWORKS` is the closed table that the command line knows.

A network is any module from uint8 images [B, H, W, 3] to features [B, D], to (features, logits [B, C]), or to (features, logits,
spatial features [B, S]). Its name and the SHA-256 of its weights stand in every report: distances in different features, or with
different weights, cannot be compared. "FID", "sFID", "KID" and "IS" mean the FID Inception weights and nothing else.

Nothing is downloaded: the user supplies weights by path.
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

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from continuar.checkpoints.store import CONFIG, WEIGHTS, load_state
from continuar.errors import UserError, require, unknown_name
from continuar.io import atomic_directory, read_config, read_tensors, write_json, write_tensors
from continuar.tensors import exact_float32

# How the SHA-256 of weights-inception-2015-12-05-6726825d.pth begins: its publisher writes it into the file's name.
FID_SHA256 = "6726825d"


@dataclass(frozen=True)
class Extracted:
    """Float32 features [B, D]; logits [B, C] of networks with classes; spatial features [B, S] of `Inception`."""

    features_ND: np.ndarray
    logits_NC: np.ndarray | None
    spatial_NS: np.ndarray | None = None


@dataclass(frozen=True)
class FeatureNetwork:
    """A network with its identity. `FeatureNetwork.from_module` makes one from any module."""

    name: str
    module: nn.Module
    """In evaluation mode; see the types at the top of this file."""
    sha256: str
    """Hexadecimal digest of the weights."""
    classes: tuple[str, ...] = ()
    """Names of the logits, where they are known."""

    @classmethod
    def from_module(cls, module: nn.Module, name: str = "custom") -> FeatureNetwork:
        """Wraps any module, identified by a name of your own and the SHA-256 of its state.

        Raises:
            UserError: the name belongs to a network of the table.
        """
        require(name not in NETWORKS, f"network name is '{name}', which means another one; allowed: any other name")
        return cls(name, module.eval(), sha256_of_state(module))

    @property
    def is_fid(self) -> bool:
        """True if distances may be called FID, sFID and KID, and the score IS."""
        return self.name == "inception" and self.sha256.startswith(FID_SHA256)

    @property
    def device(self) -> torch.device:
        """The device of the weights; the CPU for a network without weights."""
        return next((p.device for p in self.module.parameters()), torch.device("cpu"))

    def title(self, short: str, long: str) -> str:
        """Returns a metric's short name (such as "FID") with the FID weights, else its long one with the network's name."""
        return short if self.is_fid else f"{long} ({self.name})"

    def __call__(self, images_BHW3: np.ndarray) -> Extracted:
        """Extracts features of one batch of uint8 images, in float32 (no autocast, no TF32).

        Raises:
            UserError: the module returns something else.
        """
        out = _forward(self.module, images_BHW3, self.device)
        # A network may leave out the later outputs, and one in the middle by None.
        features, *more = out if isinstance(out, tuple) else (out,)
        logits, spatial = (*more, None, None)[:2]
        for what, value in (("features", features), ("logits", logits), ("spatial features", spatial)):
            require(
                value is None or (value.ndim == 2 and len(value) == len(images_BHW3)),
                f"the network '{self.name}' gives {what} {() if value is None else tuple(value.shape)}; "
                f"allowed: [{len(images_BHW3)}, any]",
            )
        logits_NC, spatial_NS = (None if value is None else value.float().cpu().numpy() for value in (logits, spatial))
        return Extracted(features.float().cpu().numpy(), logits_NC, spatial_NS)


@torch.no_grad()
def _forward(network: Callable[[Tensor], Tensor], images_BHW3: np.ndarray, device: torch.device | str) -> Tensor:
    with exact_float32():
        return network(torch.from_numpy(np.ascontiguousarray(images_BHW3)).to(device))


def extract(
    network: Callable[[Tensor], Tensor], images_BHW3: np.ndarray, *, device: torch.device | str = "cpu", batch_size: int = 256
) -> np.ndarray:
    """Returns float32 features [n, D] of uint8 images [n, H, W, 3], computed batch by batch (no autocast, no TF32)."""
    require(images_BHW3.ndim == 4 and images_BHW3.shape[-1] == 3, f"images are {images_BHW3.shape}; allowed: [n, H, W, 3]")
    starts = range(0, len(images_BHW3), batch_size)
    return np.concatenate([_forward(network, images_BHW3[i : i + batch_size], device).float().cpu().numpy() for i in starts])


def sha256_of_file(path: Path) -> str:
    """Returns the SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_state(module: nn.Module) -> str:
    """Returns the SHA-256 of a module's state: names, types, shapes and bytes, in the order of the names; hexadecimal."""
    digest = hashlib.sha256()
    # Names, types and shapes count: equal bytes under other names are another network.
    for key, value in sorted(module.state_dict().items()):
        tensor = value.detach().cpu().contiguous()
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _resized(x_B3HW: Tensor, size: int, peak: float) -> Tensor:
    """Images in 0..peak at ``size`` x ``size``, bicubic with antialiasing. Bicubic weights overshoot, hence the clamp."""
    if x_B3HW.shape[-2:] == (size, size):
        return x_B3HW
    return F.interpolate(x_B3HW, (size, size), mode="bicubic", antialias=True, align_corners=False).clamp(0, peak)


class Inception(nn.Module):
    """The FID Inception network: uint8 images [B, H, W, 3] -> features [B, 2048], logits without bias [B, 1008], spatial [B, 2023].

    torch-fidelity ports FID's graph of 2015-12-05 and resizes images to 299 x 299 bilinearly, as TensorFlow 1 did.

    The spatial features are those of sFID (Nash et al. 2021), which still know where something is. ADM's suite (Dhariwal & Nichol
    2021), whose references hold their mean and covariance as mu_s and sigma_s, reads the first 7 channels of the graph's tensor
    "mixed_6/conv:0" (17 x 17):

    * In this graph an operation with its unit's own name is the last of the unit, the ReLU. So "mixed_6/conv" is the first branch's
      1x1 convolution *after* batch norm and ReLU; the bare convolution is "mixed_6/conv/Conv2D".
    * Ports of the graph to torch load mixed_6/conv into ``Mixed_6d.branch1x1``; public ports of sFID read the same unit.
    * The suite flattens [B, 17, 17, 7], channels last. Against mu_s and sigma_s the order matters.

    sFID has not been compared with published numbers: that needs the FID weights.

    Args:
        network: torch-fidelity's FeatureExtractorInceptionV3 with the outputs "2048" and "logits_unbiased".
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self._unit: Tensor | None = None
        # The port has no output for this unit.
        network.get_submodule("Mixed_6d.branch1x1").register_forward_hook(self._keep)

    def _keep(self, unit: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self._unit = output

    def forward(self, images_BHW3: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        features, logits = self.network(images_BHW3.permute(0, 3, 1, 2).contiguous())
        assert self._unit is not None
        spatial = self._unit[:, :7].permute(0, 2, 3, 1).flatten(1)
        self._unit = None
        return features, logits, spatial


def _load_inception(path: Path) -> FeatureNetwork:
    try:
        fidelity = import_module("torch_fidelity.feature_extractor_inceptionv3")
    except ImportError as problem:
        raise UserError("the network 'inception' needs torch-fidelity: pip install 'continuar[inception]'") from problem
    except RuntimeError as problem:  # torchvision built for another torch
        raise UserError(
            f"torch-fidelity needs a torchvision that fits torch {torch.__version__}: {_one_line(problem)}"
        ) from problem
    try:
        # torch-fidelity unpickles whatever it is given. So the file is read safely here and handed over anew.
        safe = io.BytesIO()
        torch.save(torch.load(path, map_location="cpu", weights_only=True), safe)
        safe.seek(0)
        outputs = ["2048", "logits_unbiased"]
        network = fidelity.FeatureExtractorInceptionV3("inception", outputs, feature_extractor_weights_path=safe)
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError, TypeError, ValueError, AttributeError) as problem:
        raise UserError(f"{path} is truncated or not the Inception network's weights: {_one_line(problem)}") from problem
    return FeatureNetwork("inception", Inception(network), sha256_of_file(path))


class _Fire(nn.Module):
    """Squeezes to few channels, then expands by 1x1 and 3x3 convolutions side by side."""

    def __init__(self, inputs: int, squeeze: int, expand: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(inputs, squeeze, 1)
        self.expand1x1 = nn.Conv2d(squeeze, expand, 1)
        self.expand3x3 = nn.Conv2d(squeeze, expand, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.squeeze(x))
        return torch.cat((F.relu(self.expand1x1(x)), F.relu(self.expand3x3(x))), 1)


class SqueezeNet(nn.Module):
    """SqueezeNet 1.1 (Iandola et al. 2016): uint8 images [B, H, W, 3] -> features [B, 512], the mean of the last feature map.

    Written out in torch so that torchvision is not needed.
    """

    def __init__(self) -> None:
        super().__init__()
        fires = [_Fire(64, 16, 64), _Fire(128, 16, 64), nn.MaxPool2d(3, 2)]
        fires += [_Fire(128, 32, 128), _Fire(256, 32, 128), nn.MaxPool2d(3, 2)]
        fires += [_Fire(256, 48, 192), _Fire(384, 48, 192), _Fire(384, 64, 256), _Fire(512, 64, 256)]
        # The list's indices are the keys of torchvision's file.
        self.layers = nn.ModuleList([nn.Conv2d(3, 64, 3, 2), nn.ReLU(), nn.MaxPool2d(3, 2), *fires])

    @classmethod
    def from_file(cls, path: str | Path, device: torch.device | str = "cpu") -> SqueezeNet:
        """Loads the weights of torchvision's ``squeezenet1_1`` layout from a safetensors file.

        Raises:
            UserError: missing, unreadable, or other keys or shapes.
        """
        network = cls()
        tensors = read_tensors(Path(path))
        # torchvision's file holds the classifier too, and its features under a prefix.
        layers = {f"layers.{k.removeprefix('features.')}": v for k, v in tensors.items() if not k.startswith("classifier.")}
        load_state(network, layers, str(path))
        return network.eval().to(device)

    def forward(self, images_BHW3: Tensor) -> Tensor:
        # The weights were trained in Caffe's convention: BGR in 0..255, means subtracted.
        x = _resized(images_BHW3.permute(0, 3, 1, 2).flip(1).float(), 224, 255)
        x = x - torch.tensor((103.939, 116.779, 123.68), device=x.device).view(1, 3, 1, 1)
        for layer in self.layers:
            x = layer(x)
        return x.mean((2, 3))


@dataclass(frozen=True)
class ClassifierConfig:
    """The size of a `Classifier`."""

    classes: tuple[str, ...]
    """Names in label order."""
    width: int = 40
    """Channels of the first stage; each further stage doubles them."""
    blocks: int = 2
    """Residual blocks per stage."""

    def __post_init__(self) -> None:
        require(len(self.classes) >= 2, f"{len(self.classes)} classes; allowed: 2 or more")
        require(self.width >= 1 and self.blocks >= 1, f"width {self.width}, blocks {self.blocks}; allowed: 1 or more")


class _PreActivationBlock(nn.Module):
    """A residual block with the norms before the convolutions (He et al. 2016)."""

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
    """A wide residual network (Zagoruyko & Komodakis 2016) of three stages: uint8 images [B, H, W, 3] -> logits [B, classes].

    It tells whether generated images show the class that was asked for.
    """

    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__()
        self.config = config
        blocks, inputs = [], config.width
        for stage in range(3):
            width = config.width * 2**stage
            for number in range(config.blocks):
                blocks.append(_PreActivationBlock(inputs, width, 2 if stage and number == 0 else 1))
                inputs = width
        self.stem = nn.Conv2d(3, config.width, 3, padding=1, bias=False)
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.BatchNorm2d(inputs)
        self.output = nn.Linear(inputs, len(config.classes))

    def forward(self, images_BHW3: Tensor) -> Tensor:
        return self.output(self.features(images_BHW3))

    def features(self, images_BHW3: Tensor) -> Tensor:
        """Returns the input of the last layer: the mean of the last feature map, [B, 4 width]."""
        x = images_BHW3.permute(0, 3, 1, 2).float() / 127.5 - 1
        # Pre-activation blocks end with a sum, so the last one needs a norm and a ReLU of its own.
        return F.relu(self.norm(self.blocks(self.stem(x)))).mean((2, 3))

    def predict(self, images_BHW3: np.ndarray, batch_size: int = 500) -> np.ndarray:
        """Returns labels [n] int64 of uint8 images; the logits of an image and of its mirror image are averaged."""
        self.eval()
        device = self.output.weight.device
        # A flip seldom changes the class, and the mean of both views is right more often.
        logits = [extract(self, images, device=device, batch_size=batch_size) for images in (images_BHW3, images_BHW3[:, :, ::-1])]
        return (logits[0] + logits[1]).argmax(1)

    def save(self, directory: Path, dtype: torch.dtype | None = None) -> None:
        """Writes config.json and model.safetensors."""
        with atomic_directory(directory) as temporary:
            write_json(temporary / CONFIG, self.config)
            write_tensors(temporary / WEIGHTS, self.state_dict(), dtype)

    @classmethod
    def load(cls, directory: str | Path, device: torch.device | str = "cpu") -> Classifier:
        """Reads what `save` wrote, in evaluation mode and float32.

        Raises:
            UserError: missing, unreadable, or other keys or shapes.
        """
        directory = Path(directory)
        network = cls(read_config(ClassifierConfig, directory / CONFIG))
        load_state(network, read_tensors(directory / WEIGHTS), str(directory / WEIGHTS))
        return network.float().eval().to(device)


class _ClassifierFeatures(nn.Module):
    """Features and logits of a classifier in one pass."""

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, images_BHW3: Tensor) -> tuple[Tensor, Tensor]:
        features = self.classifier.features(images_BHW3)
        return features, self.classifier.output(features)


def _load_classifier(path: Path) -> FeatureNetwork:
    classifier = Classifier.load(path)
    return FeatureNetwork("classifier", _ClassifierFeatures(classifier), sha256_of_file(path / WEIGHTS), classifier.config.classes)


class _DINOv2(nn.Module):
    """DINOv2's class token after the last norm, of images at 224 x 224 (Oquab et al. 2023; as features, Stein et al. 2023)."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images_BHW3: Tensor) -> Tensor:
        x = _resized(images_BHW3.permute(0, 3, 1, 2).float() / 255, 224, 1)
        # Mean and standard deviation of ImageNet, as DINOv2 was trained.
        mean, std = (torch.tensor(v, device=x.device).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        return self.network(pixel_values=(x - mean) / std).last_hidden_state[:, 0]


def _load_dinov2(path: Path) -> FeatureNetwork:
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
    # transformers only warns of missing weights and draws them at random.
    wrong = [k for kind in ("missing_keys", "mismatched_keys") for k in loaded[kind]]
    require(not wrong, f"{path} does not fit the model: missing or of another shape: {', '.join(map(str, wrong[:8]))}")
    return FeatureNetwork("dinov2", _DINOv2(model), sha256_of_file(path / WEIGHTS))


class Pixels(nn.Module):
    """Colours in 0..1; of larger images, their means over a grid of 8 x 8. It has no weights.

    Scores in these features tell how a run goes, and whether colours and layout are right; they know nothing of objects.
    """

    def forward(self, images_BHW3: Tensor) -> Tensor:
        x = images_BHW3.permute(0, 3, 1, 2).float() / 255
        height, width = x.shape[-2:]
        return F.adaptive_avg_pool2d(x, (min(8, height), min(8, width))).flatten(1)


NETWORKS: dict[str, tuple[Callable[[Path], FeatureNetwork], str]] = {
    "inception": (_load_inception, "weights-inception-2015-12-05-6726825d.pth, of torch-fidelity's release v0.2.0"),
    "squeezenet": (
        lambda path: FeatureNetwork("squeezenet", SqueezeNet.from_file(path), sha256_of_file(path)),
        "a safetensors file with the keys of torchvision's squeezenet1_1",
    ),
    "classifier": (_load_classifier, "a directory written by Classifier.save"),
    "dinov2": (_load_dinov2, "a directory with config.json and model.safetensors of a DINOv2 model"),
    "pixels": (lambda _: FeatureNetwork("pixels", Pixels(), sha256_of_state(Pixels())), ""),
}
"""Name -> (loader, its weights for people; empty for a network that has none)."""


def load_network(name: str, weights: str | Path | None, device: torch.device | str = "cpu") -> FeatureNetwork:
    """Loads a network of the closed table with the user's weights.

    Raises:
        UserError: an unknown name; no weights, or not this network's; a package that is not installed.
    """
    if name not in NETWORKS:
        raise unknown_name("network", name, NETWORKS)
    load, needed = NETWORKS[name]
    if needed:
        require(weights is not None, f"the network '{name}' needs --network-weights: {needed}")
        require(Path(weights or "").exists(), f"network weights {weights} do not exist; needed: {needed}")
    else:
        require(weights is None, f"--network-weights is {weights}; the network '{name}' has none")
    network = load(Path(weights or ""))
    network.module.eval().requires_grad_(False).to(device)
    return network


def _one_line(problem: BaseException, length: int = 300) -> str:
    text = " ".join(str(problem).split()) or type(problem).__name__
    return text if len(text) <= length else text[: length - 3] + "..."
