"""Autoencoder networks: their architectures as frozen configs, the networks themselves from diffusers.

Fields have diffusers' own names and defaults, so that its ``config.json`` and ours say the same; what diffusers leaves open, these
configs check. Each knows how its class is called: ``encode`` gives what a cache keeps, ``decode`` takes latents [B, C, h, w].
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from continuar.errors import UserError, require

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


@dataclass(frozen=True)
class Network:
    """What all networks share."""

    class_name: ClassVar[str]
    """The class in diffusers."""
    has_variance: ClassVar[bool] = False
    """Whether ``encode`` gives posterior moments [B, 2C, h, w], means before log variances, rather than latents [B, C, h, w]."""
    encoder_parts: ClassVar[tuple[str, ...]] = ("encoder", "quant_conv")
    """Children that latents depend on."""

    latent_channels: int = 4
    """C, channels of a latent."""

    @property
    def channels(self) -> int:
        """C of what `decode` takes."""
        return self.latent_channels

    @property
    def stride(self) -> int:
        """Pixels per latent."""
        raise NotImplementedError

    def build(self) -> nn.Module:
        """The network with random weights."""
        settings = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "kind"}
        return diffusers_class(self.class_name)(**settings)

    def encode(self, network: Any, images_B3HW: Tensor) -> Tensor:
        """Images in [-1, 1] -> latents, or posterior moments; see ``has_variance``."""
        raise NotImplementedError

    def decode(self, network: Any, latents_BCHW: Tensor) -> Tensor:
        """Latents [B, C, h, w] -> images [B, 3, H, W] of about [-1, 1]."""
        return network.decode(latents_BCHW, return_dict=False)[0]

    def _check_stages(self, widths: tuple[int, ...], groups: int = 1, **stages: tuple[Any, ...]) -> None:
        require(bool(widths) and min(widths) >= 1, f"network widths are {widths}; allowed: one or more, 1 or more each")
        for name, values in stages.items():
            require(len(values) == len(widths), f"network.{name} has {len(values)} entries; allowed: {len(widths)}, one per width")
        require(groups >= 1, f"network.norm_num_groups is {groups}; allowed: 1 or more")
        odd = [w for w in widths if w % groups]
        require(not odd, f"network width {odd[:1]} is not divisible by norm_num_groups {groups}")
        require(self.latent_channels >= 1, f"network.latent_channels is {self.latent_channels}; allowed: 1 or more")


@dataclass(frozen=True)
class _Stages(Network):
    """Encoder and decoder of stages that halve and double the resolution, as in LDM (Rombach et al. 2022)."""

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
        stages: dict[str, Any] = {"down_block_types": self.down_block_types, "up_block_types": self.up_block_types}
        self._check_stages(self.block_out_channels, self.norm_num_groups, **stages)
        require(self.layers_per_block >= 1, f"network.layers_per_block is {self.layers_per_block}; allowed: 1 or more")

    @property
    def stride(self) -> int:
        return 2 ** (len(self.block_out_channels) - 1)


@dataclass(frozen=True)
class KLNetwork(_Stages):
    """`AutoencoderKL`: latents of a Gaussian posterior (Kingma & Welling 2014; LDM's kl-f8, kl-f16)."""

    class_name: ClassVar[str] = "AutoencoderKL"
    has_variance: ClassVar[bool] = True

    kind: Literal["kl"] = "kl"
    use_quant_conv: bool = True
    """A 1x1 convolution after the encoder."""
    use_post_quant_conv: bool = True
    """A 1x1 convolution before the decoder."""

    def encode(self, network: Any, images_B3HW: Tensor) -> Tensor:
        return network.encode(images_B3HW, return_dict=False)[0].parameters


@dataclass(frozen=True)
class VQNetwork(_Stages):
    """`VQModel` (van den Oord et al. 2017; LDM's vq-f16): latents are those before quantisation, and decoding quantises them."""

    class_name: ClassVar[str] = "VQModel"

    kind: Literal["vq"] = "vq"
    latent_channels: int = 3
    """Channels of the encoder's output."""
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

    def encode(self, network: Any, images_B3HW: Tensor) -> Tensor:
        return network.encode(images_B3HW, return_dict=False)[0]

    def decode_codes(self, network: Any, codes_BCHW: Tensor) -> Tensor:
        """Entries of the codebook [B, C, h, w] -> images, without looking for nearer ones."""
        # Not `network.decode`, which also copies a loss of zeros to the device: nothing that a CUDA graph could hold.
        conditions = codes_BCHW if self.norm_type == "spatial" else None
        return network.decoder(network.post_quant_conv(codes_BCHW), conditions)


@dataclass(frozen=True)
class TinyNetwork(Network):
    """`AutoencoderTiny`: a small distilled autoencoder; its latents are those of its teacher, already scaled."""

    class_name: ClassVar[str] = "AutoencoderTiny"

    kind: Literal["tiny"] = "tiny"
    in_channels: Literal[3] = 3
    out_channels: Literal[3] = 3
    encoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64)
    decoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64)
    act_fn: Literal["relu", "silu", "gelu", "mish"] = "relu"
    upsample_fn: Literal["nearest", "bilinear"] = "nearest"
    upsampling_scaling_factor: Literal[2] = 2
    num_encoder_blocks: tuple[int, ...] = (1, 3, 3, 3)
    num_decoder_blocks: tuple[int, ...] = (3, 3, 3, 1)

    def __post_init__(self) -> None:
        self._check_stages(
            self.encoder_block_out_channels,
            decoder_block_out_channels=self.decoder_block_out_channels,
            num_encoder_blocks=self.num_encoder_blocks,
            num_decoder_blocks=self.num_decoder_blocks,
        )

    @property
    def stride(self) -> int:
        return 2 ** (len(self.encoder_block_out_channels) - 1)

    def encode(self, network: Any, images_B3HW: Tensor) -> Tensor:
        return network.encode(images_B3HW, return_dict=False)[0]


@dataclass(frozen=True)
class DCNetwork(Network):
    """`AutoencoderDC`: deep compression, strides of 32 and more (Chen et al. 2025)."""

    class_name: ClassVar[str] = "AutoencoderDC"

    kind: Literal["dc"] = "dc"
    in_channels: Literal[3] = 3
    latent_channels: int = 32
    attention_head_dim: int = 32
    encoder_block_types: tuple[Literal["ResBlock", "EfficientViTBlock"], ...] = ("ResBlock",) * 6
    decoder_block_types: tuple[Literal["ResBlock", "EfficientViTBlock"], ...] = ("ResBlock",) * 6
    encoder_block_out_channels: tuple[int, ...] = (128, 256, 512, 512, 1024, 1024)
    decoder_block_out_channels: tuple[int, ...] = (128, 256, 512, 512, 1024, 1024)
    encoder_layers_per_block: tuple[int, ...] = (2, 2, 2, 3, 3, 3)
    decoder_layers_per_block: tuple[int, ...] = (3, 3, 3, 3, 3, 3)
    encoder_qkv_multiscales: tuple[tuple[int, ...], ...] = ((), (), (), (5,), (5,), (5,))
    decoder_qkv_multiscales: tuple[tuple[int, ...], ...] = ((), (), (), (5,), (5,), (5,))
    upsample_block_type: Literal["pixel_shuffle", "interpolate"] = "pixel_shuffle"
    downsample_block_type: Literal["pixel_unshuffle", "conv"] = "pixel_unshuffle"
    decoder_norm_types: tuple[Literal["rms_norm", "batch_norm"], ...] = ("rms_norm",) * 6
    decoder_act_fns: tuple[Literal["silu", "relu"], ...] = ("silu",) * 6
    encoder_out_shortcut: bool = True
    decoder_in_shortcut: bool = True
    decoder_conv_act_fn: Literal["relu", "silu"] = "relu"

    def __post_init__(self) -> None:
        per_stage = [f.name for f in fields(self) if isinstance(getattr(self, f.name), tuple)]
        self._check_stages(self.encoder_block_out_channels, **{name: getattr(self, name) for name in per_stage})

    @property
    def stride(self) -> int:
        return 2 ** (len(self.encoder_block_out_channels) - 1)

    def encode(self, network: Any, images_B3HW: Tensor) -> Tensor:
        return network.encode(images_B3HW, return_dict=False)[0]


@dataclass(frozen=True)
class ConsistencyNetwork(Network):
    """`ConsistencyDecoderVAE`: the encoder of KL-8, and a U-Net that denoises to pixels in two steps (Song et al. 2023)."""

    class_name: ClassVar[str] = "ConsistencyDecoderVAE"
    has_variance: ClassVar[bool] = True

    kind: Literal["consistency"] = "consistency"
    latent_channels: Literal[4] = 4
    scaling_factor: float = 0.18215
    """The decoder's own: it multiplies latents before the decoder's means and deviations apply. Not the scale of tokens."""
    encoder_act_fn: Literal["silu", "swish", "mish", "gelu", "relu"] = "silu"
    encoder_block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    encoder_double_z: Literal[True] = True
    encoder_down_block_types: tuple[DownBlock, ...] = ("DownEncoderBlock2D",) * 4
    encoder_in_channels: Literal[3] = 3
    encoder_layers_per_block: int = 2
    encoder_norm_num_groups: int = 32
    encoder_out_channels: Literal[4] = 4
    decoder_add_attention: bool = False
    decoder_block_out_channels: tuple[int, ...] = (320, 640, 1024, 1024)
    decoder_down_block_types: tuple[Literal["ResnetDownsampleBlock2D"], ...] = ("ResnetDownsampleBlock2D",) * 4
    decoder_downsample_padding: int = 1
    decoder_in_channels: Literal[7] = 7
    decoder_layers_per_block: int = 3
    decoder_norm_eps: float = 1e-5
    decoder_norm_num_groups: int = 32
    decoder_num_train_timesteps: int = 1024
    decoder_out_channels: Literal[6] = 6
    decoder_resnet_time_scale_shift: Literal["default", "scale_shift"] = "scale_shift"
    decoder_time_embedding_type: Literal["learned"] = "learned"
    decoder_up_block_types: tuple[Literal["ResnetUpsampleBlock2D"], ...] = ("ResnetUpsampleBlock2D",) * 4

    def __post_init__(self) -> None:
        down: dict[str, Any] = {"encoder_down_block_types": self.encoder_down_block_types}
        self._check_stages(self.encoder_block_out_channels, self.encoder_norm_num_groups, **down)
        both: dict[str, Any] = {
            "decoder_down_block_types": self.decoder_down_block_types,
            "decoder_up_block_types": self.decoder_up_block_types,
        }
        self._check_stages(self.decoder_block_out_channels, self.decoder_norm_num_groups, **both)

    @property
    def stride(self) -> int:
        return 2 ** (len(self.encoder_block_out_channels) - 1)

    def encode(self, network: Any, images_B3HW: Tensor) -> Tensor:
        return network.encode(images_B3HW, return_dict=False)[0].parameters

    def decode(self, network: Any, latents_BCHW: Tensor) -> Tensor:
        # The same noise for every image, drawn on the CPU: an image depends neither on its batch nor on the device.
        same = [torch.Generator().manual_seed(0) for _ in latents_BCHW]
        return network.decode(latents_BCHW, generator=same, return_dict=False)[0]


NetworkConfig = KLNetwork | VQNetwork | TinyNetwork | DCNetwork | ConsistencyNetwork
