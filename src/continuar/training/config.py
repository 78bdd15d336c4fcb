"""What a training run is: one frozen dataclass per concern, each field documented where it is declared.

What is known to disappoint and can be told before a run begins, one line each: the combination, then what is better.

What a training run of a tokenizer is: one frozen dataclass per concern, each field documented where it is declared.
"""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Literal

from continuar.errors import UserError, require
from continuar.heads import DiffusionHeadConfig, HeadConfig
from continuar.models import BackboneConfig, MAEConfig
from continuar.models.autoregressive import ModelConfig
from continuar.models.compatibility import config_warnings
from continuar.models.dit import DiTConfig, DiTNetworkConfig
from continuar.orders import MAROrderConfig, OrderConfig
from continuar.sampling.generate import make_plan
from continuar.sampling.options import SamplingOptions
from continuar.tokenizers import PixelConfig, TokenizerConfig, VAEConfig, VQConfig
from continuar.tokenizers.networks import KLNetwork


@dataclass(frozen=True)
class DataConfig:
    """Training images."""

    path: str = ""
    """Training images: a folder of class folders, a Parquet file or a folder of them, "digits", or a cache of latents (`continuar
    cache`), whose tokenizer replaces the run's."""
    tokenizer: str = ""
    """For a cache: where the tokenizer is that made it, if it was moved."""
    split: str = "train"
    """Part of the data to read, if it has several."""
    classes: int = 0
    """Number of classes, known before the data is read; 0: read from the data."""
    flip: bool = False
    """Mirror images left-right with probability 1/2."""
    crop_padding: int = 0
    """Shift images at random by up to this many pixels, with repeated edges; 0: never."""
    max_skipped_share: float = 0.01
    """Largest share of unreadable images with which training starts; 0..1."""

    def __post_init__(self) -> None:
        require(self.classes >= 0, f"data.classes is {self.classes}; allowed: 0 or more")
        require(self.crop_padding >= 0, f"data.crop_padding is {self.crop_padding}; allowed: 0 or more")
        require(0 <= self.max_skipped_share <= 1, f"data.max_skipped_share is {self.max_skipped_share}; allowed: 0 to 1")


@dataclass(frozen=True)
class OptimConfig:
    """AdamW and its learning rate."""

    lr: float = 1e-4
    """Learning rate after warm-up. Paper: 1e-4 per 256 images of batch."""
    warmup_images: int = 0
    """Images over which the rate rises linearly from 0. Paper: 100 epochs."""
    decay: Literal["constant", "cosine", "linear"] = "constant"
    """Learning rate after warm-up: constant (paper, diffusion loss), or falling to final_lr at the end of the run."""
    final_lr: float = 0.0
    """Learning rate at the end of a cosine or linear decay, as a fraction of lr; 0..1."""
    decay_images: int = 0
    """Images over which a linear decay falls, at the end of the run; 0: all after warm-up."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decays of AdamW's first and second moment."""
    weight_decay: float = 0.02
    """Weight decay, of all weights except biases, norms and the head."""
    clip: float = 3.0
    """Largest norm of the gradient; larger ones are scaled down. 0: no clipping."""

    def __post_init__(self) -> None:
        require(0 < self.lr < math.inf, f"optim.lr is {self.lr}; allowed: above 0")
        require(self.warmup_images >= 0, f"optim.warmup_images is {self.warmup_images}; allowed: 0 or more")
        require(self.decay_images >= 0, f"optim.decay_images is {self.decay_images}; allowed: 0 or more")
        require(0 <= self.final_lr <= 1, f"optim.final_lr is {self.final_lr}; allowed: 0 to 1")
        require(all(0 <= b < 1 for b in self.betas), f"optim.betas is {self.betas}; allowed: 0 up to below 1")
        require(0 <= self.weight_decay < math.inf, f"optim.weight_decay is {self.weight_decay}; allowed: 0 or more")
        require(0 <= self.clip < math.inf, f"optim.clip is {self.clip}; allowed: 0 or more")


@dataclass(frozen=True)
class EMAConfig:
    """Exponential moving average of the weights; samples are generated with it."""

    decay: float = 0.9999
    """Decay per step; 0..1."""
    warmup: bool = True
    """Limit the decay to (1 + step)/(10 + step). Without it, early averages are mostly initial weights (a share of decay^steps)."""
    snapshot_images: int = 0
    """Also keep averages with power-function profiles (EDM2), and write them every so many images; `continuar extract` then makes
    an average of any length. 0: do not."""
    lengths: tuple[float, ...] = (0.05, 0.1)
    """Lengths of those averages, as a share of the training so far; EDM2: 0.05 and 0.1. Each takes the memory of the weights."""

    def __post_init__(self) -> None:
        require(0 <= self.decay < 1, f"ema.decay is {self.decay}; allowed: 0 up to below 1")
        require(self.snapshot_images >= 0, f"ema.snapshot_images is {self.snapshot_images}; allowed: 0 or more")
        require(
            bool(self.lengths) and all(0 < s < 0.28 for s in self.lengths),
            f"ema.lengths is {self.lengths}; allowed: one or more, each above 0 to below 0.28",
        )


@dataclass(frozen=True)
class LoopConfig:
    """Length of the training, batch size, precision, and how often results are written."""

    images: int = 1_000_000
    """Training images in all, repetitions counted; rounded up to whole batches."""
    batch_size: int = 64
    """Images per step, over all processes."""
    micro_batch: int = 0
    """Images per forward and backward pass; gradients accumulate over a batch. Divides the batch size; 0: one pass per process.
    Runs with the same micro-batch draw the same random numbers on any number of processes."""
    label_dropout: float = 0.1
    """Probability of training with the null condition instead of the label, for guidance; 0..1."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """"auto": bfloat16 autocast on CUDA, float32 elsewhere. There is no float16: it gives NaN losses."""
    engine: Literal["eager", "compile", "graphs", "compile-graphs"] = "eager"
    """How a step runs: "compile" (torch.compile; minutes of compilation first), "graphs" (CUDA graphs), or both. Each number of
    masked tokens is compiled or captured anew; backbone.mask_granularity makes them few."""
    activation_checkpointing: bool = False
    """Keep only the input of every transformer block in the forward pass, and compute the block again in the backward pass: less
    memory, more work, the same gradients (`continuar plan` counts both). The head is not affected. Not with CUDA graphs."""
    log_images: int = 10_000
    """Write metrics every so many images."""
    sample_images: int = 200_000
    """Draw sample grids every so many images; 0: never."""
    save_images: int = 200_000
    """Write a checkpoint every so many images (and at the end); 0: only at the end."""
    keep: int = 2
    """Number of newest checkpoints to keep."""
    milestone_images: int = 0
    """Every so many images, write a checkpoint that is never deleted; 0: never."""
    max_bad_steps: int = 20
    """Steps in a row with a non-finite loss or gradient until the run goes back to its last checkpoint. Each is skipped."""
    max_rollbacks: int = 3
    """Number of times that a run goes back before it stops."""

    def __post_init__(self) -> None:
        for name in ("images", "batch_size", "log_images", "keep", "max_bad_steps"):
            require(getattr(self, name) >= 1, f"train.{name} is {getattr(self, name)}; allowed: 1 or more")
        for name in ("sample_images", "save_images", "milestone_images", "max_rollbacks"):
            require(getattr(self, name) >= 0, f"train.{name} is {getattr(self, name)}; allowed: 0 or more")
        require(
            self.micro_batch >= 0 and self.batch_size % (self.micro_batch or 1) == 0,
            f"train.micro_batch is {self.micro_batch}; allowed: a divisor of the batch size {self.batch_size}, or 0",
        )
        require(
            not (self.activation_checkpointing and self.engine.endswith("graphs")),
            f"train.activation_checkpointing restores dropout's random numbers, which train.engine {self.engine} cannot capture; "
            "allowed: eager, compile",
        )
        require(0 <= self.label_dropout < 1, f"train.label_dropout is {self.label_dropout}; allowed: 0 up to below 1")

    @property
    def steps(self) -> int:
        """Optimizer steps in all."""
        return -(-self.images // self.batch_size)

    @property
    def micro_batches(self) -> int:
        """How many of them make a batch."""
        return self.batch_size // (self.micro_batch or self.batch_size)

    def due(self, done: int, every_images: int) -> bool:
        """Whether step ``done`` is the first to reach another multiple of ``every_images``; never for 0."""
        return every_images > 0 and done * self.batch_size // every_images > (done - 1) * self.batch_size // every_images


@dataclass(frozen=True)
class OnlineConfig:
    """Scores of generated images during training, with averaged and raw weights; they are written to the metrics."""

    every_images: int = 0
    """Score every so many training images; 0: never."""
    samples: int = 1000
    """Images generated per score, a multiple of the number of classes."""
    batch_size: int = 100
    """Images generated together."""
    max_share: float = 0.05
    """Largest share of the run's time that scoring may take, above 0 to 1; a score that would take more is delayed."""
    network: str = "pixels"
    """Network whose features are compared: pixels (no network), squeezenet, classifier, dinov2 or inception."""
    weights: str = ""
    """Weights of the network: a file, or a directory for classifier and dinov2."""
    reference: str = ""
    """Images to score against, or a file of `continuar stats`; empty: the run's own data, measured once before the first step."""

    def __post_init__(self) -> None:
        require(self.every_images >= 0, f"online.every_images is {self.every_images}; allowed: 0 or more")
        require(self.samples >= 2, f"online.samples is {self.samples}; allowed: 2 or more")
        require(self.batch_size >= 1, f"online.batch_size is {self.batch_size}; allowed: 1 or more")
        require(0 < self.max_share <= 1, f"online.max_share is {self.max_share}; allowed: above 0 to 1")


@dataclass(frozen=True)
class BaseRun(ABC):
    """What all training runs have, whatever they train. Sampling options that are left out become the model's defaults."""

    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = field(default_factory=PixelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    ema: EMAConfig = field(default_factory=EMAConfig)
    train: LoopConfig = field(default_factory=LoopConfig)
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    online: OnlineConfig = field(default_factory=OnlineConfig)
    init: str = ""
    """A run, saved model, checkpoint or official .pth file whose (averaged) weights the run starts from; empty: random weights.
    Grid, classes, order, dropout and masks may differ; position embeddings are interpolated."""
    seed: int = 0
    """Seed of the initial weights, the order of images and every random draw; 0 or more."""

    def __post_init__(self) -> None:
        require(self.seed >= 0, f"seed is {self.seed}; allowed: 0 or more")
        config = self.model_config(self.data.classes)
        object.__setattr__(self, "sampling", self.sampling.for_head(config))
        make_plan(config.build_order(), self.sampling, config.tokens.seq_len)  # refuses steps that the order cannot take

    @abstractmethod
    def model_config(self, classes: int) -> ModelConfig | DiTConfig:
        """The model this run trains on data of ``classes`` classes.

        Raises:
            UserError: parts that do not go together.
        """


@dataclass(frozen=True)
class Run(BaseRun):
    """A training run: what a recipe returns and a run directory's config.json holds."""

    order: OrderConfig = field(default_factory=MAROrderConfig)
    backbone: BackboneConfig = field(default_factory=MAEConfig)
    head: HeadConfig = field(default_factory=DiffusionHeadConfig)

    def model_config(self, classes: int) -> ModelConfig:
        return ModelConfig(self.tokenizer.spec, classes, self.order, self.backbone, self.head)


@dataclass(frozen=True)
class DiTRun(BaseRun):
    """A training run of the baseline DiT."""

    network: DiTNetworkConfig = field(default_factory=DiTNetworkConfig)

    def __post_init__(self) -> None:
        require(not self.init, f"init is '{self.init}'; a DiT begins with random weights; allowed: empty")
        require(
            not self.train.activation_checkpointing,
            "train.activation_checkpointing is True, which a DiT's blocks do not know; allowed: False",
        )
        super().__post_init__()

    def model_config(self, classes: int) -> DiTConfig:
        return DiTConfig(self.tokenizer.spec, classes, self.network)


_LOG = logging.getLogger("continuar")
SHORT_IMAGES = 1_000_000
"""Training images below which a predicted eps was seen to fail: digits came out black and white."""
INITIAL_SHARE = 0.1
"""The share of initial weights in an average at the end of a run above which its samples are poor."""


def warn(run: BaseRun) -> None:
    """Logs every line of `run_warnings`."""
    for line in run_warnings(run):
        _LOG.warning(line)


def run_warnings(run: BaseRun) -> list[str]:
    """Of parts (`parts.known_to_disappoint`) and of how they are trained."""
    loop, ema = run.train, run.ema
    found = config_warnings(run.tokenizer, run.head) if isinstance(run, Run) else []
    diffusion, field = (run.network, "network") if isinstance(run, DiTRun) else (run.head if isinstance(run, Run) else None, "head")
    if (
        isinstance(diffusion, DiffusionHeadConfig | DiTNetworkConfig)
        and diffusion.prediction == "epsilon"
        and loop.images < SHORT_IMAGES
        and not run.init
    ):
        found.append(
            f"a predicted eps after {loop.images:,} images is known to give black and white samples, for sampling multiplies "
            f"its error by 300 at first; better: --{field}.prediction v_prediction"
        )
    share = ema.decay**loop.steps
    if not ema.warmup and share > INITIAL_SHARE and not run.init:
        found.append(
            f"without warm-up the average still holds {share:.0%} of the initial weights after {loop.steps:,} steps; "
            "better: --ema.warmup"
        )
    if loop.label_dropout == 0 and run.sampling.guidance_scale != 1:
        found.append(
            f"guidance_scale {run.sampling.guidance_scale:g} needs the null condition, which train.label_dropout 0 never trains; "
            "better: --train.label-dropout 0.1, or --sampling.guidance-scale 1"
        )
    return found


@dataclass(frozen=True)
class ImagesConfig:
    """Training images; labels are not used."""

    path: str = ""
    """A folder of class folders, Parquet files, WebDataset tars, or "digits"."""
    split: str = "train"
    """Part of the data to read, if it has several."""
    flip: bool = True
    """Mirror images left-right with probability 1/2."""
    max_skipped_share: float = 0.01
    """Largest share of unreadable images with which training goes on; 0..1."""
    max_memory_gib: float = 16.0
    """Memory for decoded images, in GiB. If they do not fit, each batch is decoded when it is needed."""

    def __post_init__(self) -> None:
        require(0 <= self.max_skipped_share <= 1, f"data.max_skipped_share is {self.max_skipped_share}; allowed: 0 to 1")
        require(self.max_memory_gib >= 0, f"data.max_memory_gib is {self.max_memory_gib}; allowed: 0 or more")


@dataclass(frozen=True)
class LossConfig:
    """Loss of reconstructions. The L1 distance of pixels in [-1, 1] has weight 1."""

    perceptual: Literal["off", "lpips", "squeezenet"] = "off"
    """Perceptual distance to add: LPIPS (VGG; Zhang et al. 2018), SqueezeNet features, or none."""
    perceptual_weights: str = ""
    """Weights file of the perceptual network: the state of an LPIPS module (also inside an LDM autoencoder's file), or
    torchvision's squeezenet1_1 features as safetensors."""
    perceptual_weight: float = 1.0
    """Weight of the perceptual distance."""
    kl_weight: float = 1e-6
    """Weight of the KL divergence to N(0, I); losses are sums over an image (LDM: 1e-6). KL tokenizers only."""

    def __post_init__(self) -> None:
        for name in ("perceptual_weight", "kl_weight"):
            require(0 <= getattr(self, name) < math.inf, f"loss.{name} is {getattr(self, name)}; allowed: 0 or more")


@dataclass(frozen=True)
class DiscriminatorConfig:
    """A discriminator of patches (Isola et al. 2017), trained against the decoder with the hinge loss."""

    weight: float = 0.5
    """Weight of the adversarial loss, times the adaptive weight (Esser et al. 2021); 0: no discriminator."""
    start_images: int = 0
    """Training images before the discriminator is used and trained."""
    width: int = 64
    """Channels of the first layer."""
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
    """Learning of the codebook. VQ tokenizers only."""

    update: Literal["ema", "gradient"] = "ema"
    """"ema": codes are moving averages of the vectors that choose them; "gradient": a loss pulls them there."""
    decay: float = 0.99
    """Decay of the moving averages per step."""
    commitment: float = 0.25
    """Weight of the loss that keeps vectors near their codes."""
    revive_below: float = 0.03
    """Move a code onto a vector of the batch if its average use falls below this share of even use; 0: never."""

    def __post_init__(self) -> None:
        require(0 <= self.decay < 1, f"codebook.decay is {self.decay}; allowed: 0 up to below 1")
        require(0 <= self.commitment < math.inf, f"codebook.commitment is {self.commitment}; allowed: 0 or more")
        require(0 <= self.revive_below < 1, f"codebook.revive_below is {self.revive_below}; allowed: 0 up to below 1")


@dataclass(frozen=True)
class TokenizerLoopConfig:
    """Length of the training, batch size, precision, and how often results are written."""

    images: int = 1_000_000
    """Training images in all, repetitions counted; rounded up to whole batches."""
    batch_size: int = 64
    """Images per step, over all processes."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """"auto": bfloat16 autocast on CUDA, float32 elsewhere."""
    engine: Literal["auto", "eager", "compile", "graphs", "compile-graphs"] = "auto"
    """"compile": torch.compile of the blocks. "graphs": the whole step as one CUDA graph, in a single process only.
    "compile-graphs": both. "auto": both on CUDA, "compile" with several processes, "eager" without CUDA."""
    log_images: int = 10_000
    """Write metrics every so many images."""
    sample_images: int = 200_000
    """Draw reconstructions every so many images; 0: never."""
    save_images: int = 200_000
    """Write a checkpoint every so many images (and at the end); 0: only at the end."""
    keep: int = 2
    """Number of newest checkpoints to keep."""
    max_bad_steps: int = 20
    """Steps in a row with a non-finite loss or gradient until the run goes back to its last checkpoint. Each is skipped."""
    max_rollbacks: int = 3
    """Number of times that a run goes back before it stops."""
    milestone_images: int = 0
    """Every so many images, write a checkpoint that is never deleted; 0: never."""
    measure_images: int = 50_000
    """Images for measuring the scale of a KL tokenizer at the end."""

    def __post_init__(self) -> None:
        for name in ("images", "batch_size", "log_images", "keep", "max_bad_steps", "measure_images"):
            require(getattr(self, name) >= 1, f"train.{name} is {getattr(self, name)}; allowed: 1 or more")
        for name in ("sample_images", "save_images", "milestone_images", "max_rollbacks"):
            require(getattr(self, name) >= 0, f"train.{name} is {getattr(self, name)}; allowed: 0 or more")

    @property
    def steps(self) -> int:
        """Optimizer steps in all."""
        return -(-self.images // self.batch_size)

    def due(self, done: int, every_images: int) -> bool:
        """Whether step ``done`` is the first to reach another multiple of ``every_images``; never for 0."""
        return every_images > 0 and done * self.batch_size // every_images > (done - 1) * self.batch_size // every_images


@dataclass(frozen=True)
class TokenizerRun:
    """A training run of a tokenizer: what a recipe returns and a run directory's config.json holds."""

    data: ImagesConfig = field(default_factory=ImagesConfig)
    tokenizer: VAEConfig | VQConfig = field(default_factory=VAEConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    codebook: CodebookLearning = field(default_factory=CodebookLearning)
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimizer of the autoencoder, and of the discriminator."""
    train: TokenizerLoopConfig = field(default_factory=TokenizerLoopConfig)
    seed: int = 0
    """Seed of the initial weights, the order of images and every random draw; 0 or more."""

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
