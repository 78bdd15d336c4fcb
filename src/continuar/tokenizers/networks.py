"""Autoencoder networks: frozen configs here, the networks themselves from diffusers.

`NetworkConfig` is the closed table of classes. `KLNetwork` and `VQNetwork`, which are trained and converted here, have typed fields
with diffusers' names and defaults. The others keep their constructor's arguments as diffusers writes them to ``config.json``.
"""

from __future__ import annotations

import inspect
import json
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from continuar.errors import UserError, require, unknown_name

DownBlock = Literal["DownEncoderBlock2D", "AttnDownEncoderBlock2D"]
UpBlock = Literal["UpDecoderBlock2D", "AttnUpDecoderBlock2D"]


def diffusers_class(name: str) -> Any:
    """A class of diffusers.

    Raises:
        UserError: diffusers is not installed.
    """
    try:
        import diffusers
    except ImportError as problem:
        raise UserError("autoencoder networks come from diffusers: pip install 'continuar[diffusers]'") from problem
    return getattr(diffusers, name)


class Network:
    """The interface of the configs: `build` makes the network, `encode` and `decode` call it."""

    class_name: ClassVar[str]
    """The class in diffusers."""
    has_variance: ClassVar[bool] = False
    """Whether ``encode`` gives posterior moments [B, 2C, h, w], means before log variances, rather than latents [B, C, h, w]."""
    encoder_parts: ClassVar[tuple[str, ...]] = ("encoder", "quant_conv")
    """Children that latents depend on."""

    def arguments(self) -> dict[str, Any]:
        """The arguments of the diffusers class."""
        raise NotImplementedError

    @property
    def channels(self) -> int:
        """C, channels of a latent."""
        raise NotImplementedError

    @property
    def stride(self) -> int:
        """Pixels per latent."""
        raise NotImplementedError

    def build(self) -> nn.Module:
        """The network with random weights.

        Raises:
            UserError: an argument that the class does not have or does not accept.
        """
        network, arguments = diffusers_class(self.class_name), self.arguments()
        known = inspect.signature(network.__init__).parameters
        for name in arguments:
            if name not in known:
                raise unknown_name(f"argument of {self.class_name}", name, known)
        try:
            return network(**arguments)
        except (TypeError, ValueError, LookupError, RuntimeError) as problem:
            raise UserError(f"{self.class_name} does not accept its arguments: {problem}") from problem

    def encode(self, network: Any, images_B3HW: Tensor) -> Tensor:
        """Images in [-1, 1] -> latents, or posterior moments; see ``has_variance``."""
        encoded = network.encode(images_B3HW, return_dict=False)[0]
        return encoded.parameters if self.has_variance else encoded

    def decode(self, network: Any, latents_BCHW: Tensor) -> Tensor:
        """Latents [B, C, h, w] -> images [B, 3, H, W] of about [-1, 1]."""
        return network.decode(latents_BCHW, return_dict=False)[0]


@dataclass(frozen=True)
class StagedNetwork(Network):
    """Encoder and decoder of stages that halve and double the resolution, as in LDM (Rombach et al. 2022)."""

    latent_channels: int = 4
    """Channels of the encoder's output."""
    in_channels: Literal[3] = 3
    out_channels: Literal[3] = 3
    down_block_types: tuple[DownBlock, ...] = ("DownEncoderBlock2D",)
    """One per stage, full resolution first; "Attn...": self-attention after each residual block."""
    up_block_types: tuple[UpBlock, ...] = ("UpDecoderBlock2D",)
    """One per stage of the decoder, lowest resolution first."""
    block_out_channels: tuple[int, ...] = (64,)
    """Width of each stage, full resolution first; each but the last halves the resolution."""
    layers_per_block: int = 1
    """Residual blocks per stage of the encoder; the decoder has one more."""
    act_fn: Literal["silu", "swish", "mish", "gelu", "relu"] = "silu"
    norm_num_groups: int = 32
    """Groups of the group norms; widths are multiples of it."""
    mid_block_add_attention: bool = True
    """Self-attention at the lowest resolution."""

    def __post_init__(self) -> None:
        widths, groups = self.block_out_channels, self.norm_num_groups
        require(bool(widths) and min(widths) >= 1, f"network widths are {widths}; allowed: one or more, 1 or more each")
        for name, blocks in (("down_block_types", self.down_block_types), ("up_block_types", self.up_block_types)):
            require(len(blocks) == len(widths), f"network.{name} has {len(blocks)} entries; allowed: {len(widths)}, one per width")
        for name in ("norm_num_groups", "latent_channels", "layers_per_block"):
            require(getattr(self, name) >= 1, f"network.{name} is {getattr(self, name)}; allowed: 1 or more")
        odd = [w for w in widths if w % groups]
        require(not odd, f"network width {odd[:1]} is not divisible by norm_num_groups {groups}")

    def arguments(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "kind"}

    @property
    def channels(self) -> int:
        return self.latent_channels

    @property
    def stride(self) -> int:
        return 2 ** (len(self.block_out_channels) - 1)


@dataclass(frozen=True)
class KLNetwork(StagedNetwork):
    """`AutoencoderKL`: latents of a Gaussian posterior (Kingma & Welling 2014; LDM's kl-f8, kl-f16)."""

    class_name: ClassVar[str] = "AutoencoderKL"
    has_variance: ClassVar[bool] = True

    kind: Literal["kl"] = "kl"
    use_quant_conv: bool = True
    """A 1x1 convolution after the encoder."""
    use_post_quant_conv: bool = True
    """A 1x1 convolution before the decoder."""


@dataclass(frozen=True)
class VQNetwork(StagedNetwork):
    """`VQModel` (van den Oord et al. 2017; LDM's vq-f16): latents are those before quantisation, and decoding quantises them."""

    class_name: ClassVar[str] = "VQModel"

    kind: Literal["vq"] = "vq"
    latent_channels: int = 3
    num_vq_embeddings: int = 256
    """V, entries of the codebook."""
    vq_embed_dim: int | None = None
    """Channels of a code, and of a latent; ``latent_channels`` if not given."""
    norm_type: Literal["group", "spatial"] = "group"
    """"spatial": the decoder's norms are modulated by the codes (MoVQ)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.num_vq_embeddings >= 2, f"network.num_vq_embeddings is {self.num_vq_embeddings}; allowed: 2 or more")
        require(self.channels >= 1, f"network.vq_embed_dim is {self.vq_embed_dim}; allowed: 1 or more")

    @property
    def channels(self) -> int:
        return self.latent_channels if self.vq_embed_dim is None else self.vq_embed_dim

    def decode_codes(self, network: Any, codes_BCHW: Tensor) -> Tensor:
        """Entries of the codebook [B, C, h, w] -> images, without looking for nearer ones."""
        # Not `network.decode`, which also copies a loss of zeros to the device; a CUDA graph cannot hold that copy.
        conditions = codes_BCHW if self.norm_type == "spatial" else None
        return network.decoder(network.post_quant_conv(codes_BCHW), conditions)


@dataclass(frozen=True)
class DiffusersNetwork(Network):
    """A class whose arguments are kept as diffusers writes them; `build` checks them against its constructor.

    Only what a tokenizer must know without diffusers is read here: latent channels, stages, and that images are RGB.
    """

    options: dict[str, Any]
    """Arguments of the constructor. ``latent_channels`` and ``encoder_block_out_channels`` are required."""

    def __post_init__(self) -> None:
        # JSON has no tuples: with lists, a config that was saved and read again equals itself.
        object.__setattr__(self, "options", json.loads(json.dumps(self.options)))
        channels, widths = self.options.get("latent_channels"), self.options.get("encoder_block_out_channels")
        require(type(channels) is int and channels >= 1, f"network.latent_channels is {channels!r}; allowed: 1 or more")
        fits = isinstance(widths, list) and len(widths) >= 1 and all(type(w) is int and w >= 1 for w in widths)
        require(fits, f"network.encoder_block_out_channels is {widths!r}; allowed: a list of widths, 1 or more each")
        fixed = {"in_channels": 3, "out_channels": 3, "encoder_in_channels": 3, "encoder_double_z": True}
        fixed["upsampling_scaling_factor"] = 2
        for name, only in fixed.items():
            value = self.options.get(name, only)
            require(value == only, f"network.{name} is {value!r}; allowed: {only}")

    def arguments(self) -> dict[str, Any]:
        return self.options

    @property
    def channels(self) -> int:
        return self.options["latent_channels"]

    @property
    def stride(self) -> int:
        # Each stage but the last halves the resolution.
        return 2 ** (len(self.options["encoder_block_out_channels"]) - 1)


@dataclass(frozen=True)
class TinyNetwork(DiffusersNetwork):
    """`AutoencoderTiny`: a small distilled autoencoder; its latents are those of its teacher, already scaled."""

    class_name: ClassVar[str] = "AutoencoderTiny"
    kind: Literal["tiny"] = "tiny"


@dataclass(frozen=True)
class DCNetwork(DiffusersNetwork):
    """`AutoencoderDC`: deep compression, strides of 32 and more (Chen et al. 2025)."""

    class_name: ClassVar[str] = "AutoencoderDC"
    kind: Literal["dc"] = "dc"


@dataclass(frozen=True)
class ConsistencyNetwork(DiffusersNetwork):
    """`ConsistencyDecoderVAE`: the encoder of KL-8, and a U-Net that denoises to pixels in two steps (Song et al. 2023)."""

    class_name: ClassVar[str] = "ConsistencyDecoderVAE"
    has_variance: ClassVar[bool] = True
    kind: Literal["consistency"] = "consistency"

    def decode(self, network: Any, latents_BCHW: Tensor) -> Tensor:
        # The same noise for every image, drawn on the CPU: an image depends neither on its batch nor on the device.
        same = [torch.Generator().manual_seed(0) for _ in latents_BCHW]
        return network.decode(latents_BCHW, generator=same, return_dict=False)[0]


NetworkConfig = KLNetwork | VQNetwork | TinyNetwork | DCNetwork | ConsistencyNetwork
