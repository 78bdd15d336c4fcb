"""What a training run of a tokenizer is: one frozen dataclass per concern, each field documented where it is declared."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from continuar.errors import UserError, require
from continuar.tokenizers import VAEConfig, VQConfig
from continuar.tokenizers.networks import KLNetwork
from continuar.training.config import OptimConfig


@dataclass(frozen=True)
class ImagesConfig:
    """Where images come from; their labels do not matter."""

    path: str = ""
    """A folder of class folders, Parquet files, WebDataset tars, or "digits"."""
    split: str = "train"
    """Which part of it, where there are several."""
    flip: bool = True
    """Mirror images left-right with probability 1/2."""
    max_skipped_share: float = 0.01
    """The share of unreadable images above which training stops; 0..1."""
    max_memory_gib: float = 16.0
    """Decoded images are kept in memory if they fit in this; else each batch is decoded when it is needed."""

    def __post_init__(self) -> None:
        require(0 <= self.max_skipped_share <= 1, f"data.max_skipped_share is {self.max_skipped_share}; allowed: 0 to 1")
        require(self.max_memory_gib >= 0, f"data.max_memory_gib is {self.max_memory_gib}; allowed: 0 or more")


@dataclass(frozen=True)
class LossConfig:
    """What reconstructions are held to. The L1 distance of pixels in [-1, 1] has weight 1."""

    perceptual: Literal["off", "lpips", "squeezenet"] = "off"
    """Distance of an image network's features: LPIPS (VGG; Zhang et al. 2018), SqueezeNet's, or none."""
    perceptual_weights: str = ""
    """The file of that network's weights: the state of an LPIPS module (also inside an LDM autoencoder's file), or torchvision's
    ``squeezenet1_1`` features as safetensors."""
    perceptual_weight: float = 1.0
    kl_weight: float = 1e-6
    """Of the KL divergence to N(0, I), both summed over an image (LDM: 1e-6). KL tokenizers only."""

    def __post_init__(self) -> None:
        for name in ("perceptual_weight", "kl_weight"):
            require(0 <= getattr(self, name) < math.inf, f"loss.{name} is {getattr(self, name)}; allowed: 0 or more")


@dataclass(frozen=True)
class DiscriminatorConfig:
    """A discriminator of patches (Isola et al. 2017), trained against the decoder with the hinge loss."""

    weight: float = 0.5
    """Of the adversarial term beside the others, on top of the adaptive weight (Esser et al. 2021); 0: no discriminator."""
    start_images: int = 0
    """Images before it joins, and begins to train."""
    width: int = 64
    """Channels of its first layer."""
    layers: int = 3
    """Layers that halve the resolution."""

    def __post_init__(self) -> None:
        require(0 <= self.weight < math.inf, f"discriminator.weight is {self.weight}; allowed: 0 or more")
        require(self.start_images >= 0, f"discriminator.start_images is {self.start_images}; allowed: 0 or more")
        for name in ("width", "layers"):
            require(getattr(self, name) >= 1, f"discriminator.{name} is {getattr(self, name)}; allowed: 1 or more")
        require(self.width % 8 == 0, f"discriminator.width is {self.width}; allowed: multiples of 8, for its group norms")

    @property
    def smallest_image(self) -> int:
        """Pixels per side below which no patch is left: two layers of stride 1 take one each from what the others have halved."""
        return 3 * 2**self.layers


@dataclass(frozen=True)
class CodebookLearning:
    """How codes follow the encoder's vectors. VQ tokenizers only."""

    update: Literal["ema", "gradient"] = "ema"
    """"ema": codes are moving averages of the vectors that choose them; "gradient": a loss pulls them there."""
    decay: float = 0.99
    """Of the moving averages, per step."""
    commitment: float = 0.25
    """Weight of the loss that keeps vectors near their codes."""
    revive_below: float = 0.03
    """A code whose average use falls below this share of an even use is moved onto a vector of the batch; 0: never."""

    def __post_init__(self) -> None:
        require(0 <= self.decay < 1, f"codebook.decay is {self.decay}; allowed: 0 up to below 1")
        require(0 <= self.commitment < math.inf, f"codebook.commitment is {self.commitment}; allowed: 0 or more")
        require(0 <= self.revive_below < 1, f"codebook.revive_below is {self.revive_below}; allowed: 0 up to below 1")


@dataclass(frozen=True)
class TokenizerLoopConfig:
    """How long, how large, how often."""

    images: int = 1_000_000
    """Training images in all, repetitions counted; rounded up to whole batches."""
    batch_size: int = 64
    """Images per step, of all processes together."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """"auto": bfloat16 autocast on CUDA, float32 elsewhere."""
    engine: Literal["auto", "eager", "compile", "graphs", "compile-graphs"] = "auto"
    """"compile": the networks' blocks through torch.compile, when training begins and when a discriminator joins; "graphs": all
    of a step as one CUDA graph, which one process alone can have; "compile-graphs": both; "auto": on CUDA both, or "compile"
    where several processes train; "eager" elsewhere."""
    log_images: int = 10_000
    """Write metrics every so many images."""
    sample_images: int = 200_000
    """Draw reconstructions every so many images; 0: never."""
    save_images: int = 200_000
    """Write a checkpoint every so many images (and at the end); 0: only at the end."""
    keep: int = 2
    """Newest checkpoints kept."""
    max_bad_steps: int = 20
    """Steps in a row with a non-finite loss or gradient (each is skipped) after which the run stops."""
    measure_images: int = 50_000
    """Images on which the scale of a KL tokenizer is measured at the end."""

    def __post_init__(self) -> None:
        for name in ("images", "batch_size", "log_images", "keep", "max_bad_steps", "measure_images"):
            require(getattr(self, name) >= 1, f"train.{name} is {getattr(self, name)}; allowed: 1 or more")
        for name in ("sample_images", "save_images"):
            require(getattr(self, name) >= 0, f"train.{name} is {getattr(self, name)}; allowed: 0 or more")

    @property
    def steps(self) -> int:
        """Optimizer steps in all."""
        return -(-self.images // self.batch_size)


@dataclass(frozen=True)
class TokenizerRun:
    """A training run of a tokenizer: what a recipe returns and a run directory's config.json holds."""

    data: ImagesConfig = field(default_factory=ImagesConfig)
    tokenizer: VAEConfig | VQConfig = field(default_factory=VAEConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    codebook: CodebookLearning = field(default_factory=CodebookLearning)
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Of the autoencoder and, alike, of the discriminator."""
    train: TokenizerLoopConfig = field(default_factory=TokenizerLoopConfig)
    seed: int = 0
    """Of initial weights, the order of images and every draw; 0 or more."""

    def __post_init__(self) -> None:
        require(self.seed >= 0, f"seed is {self.seed}; allowed: 0 or more")
        tokenizer = self.tokenizer
        if isinstance(tokenizer, VAEConfig) and not isinstance(tokenizer.network, KLNetwork):
            kind = tokenizer.network.kind
            raise UserError(f"tokenizer.network is of kind '{kind}', which is not trained here; allowed: kl, or vq ids")
        smallest = self.discriminator.smallest_image if self.discriminator.weight else 1
        require(
            tokenizer.image_size >= smallest,
            f"image size {tokenizer.image_size} is too small for discriminator.layers {self.discriminator.layers}; "
            f"allowed: {smallest} or more, or fewer layers",
        )
