"""DiT (Peebles & Xie 2023), the baseline of speed against quality (paper, Figure 6): one diffusion over all tokens of an image.

1. Tokens [B, N, D] are laid on their grid [B, D, h, w].
2. Timestep and label become one vector, which modulates every block of diffusers' `DiTTransformer2DModel` (adaLN-zero).
3. Its output [B, 2D, h, w] is eps (or velocity) and the variance's v of every token.
4. Loss and samplers are the diffusion head's, with one timestep for all tokens of an image.

In diffusers' module every block embeds timestep and label anew, with weights of its own, and draws label dropout anew: an image
would have its label in one block and not in the next. Here one embedding serves all blocks, as in DiT's paper. It is the first
block's, applied once per forward pass in float32 with its dropout off; `DiT.loss` drops labels, once per image.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from continuar.diffusion.gaussian import (
    TRAIN_STEPS,
    LossTerms,
    Prediction,
    coefficients,
    loss_terms,
    predicted_eps,
    training_coefficients,
)
from continuar.diffusion.samplers import SAMPLERS, Denoise, SamplerName, check_sampler, check_temperature
from continuar.errors import UserError, check_scale, check_sizes, require
from continuar.heads import DiffusionOptions
from continuar.heads.base import LossByTimestep
from continuar.heads.diffusion import check_prediction, guided
from continuar.models.base import TokenModel
from continuar.noise import KeyedNoise, Purpose
from continuar.orders import RasterOrder, View
from continuar.tensors import add_loss_by_quarter, batched_gather, without_autocast
from continuar.tokenizers import TokenSpec

LN_EPS = 1e-6
DEFAULT_STEPS = 250
"""Denoising steps of an image, as in DiT's paper."""


@dataclass(frozen=True)
class DiTNetworkConfig:
    """The network. Its paper's sizes (width, depth, heads): S 384, 12, 6; B 768, 12, 12; L 1024, 24, 16; XL 1152, 28, 16."""

    patch: int = 1
    """Side of the square of tokens that are one position of the transformer; must divide the grid. DiT-XL/2 on latents of 32 x 32
    has as many positions as patch 1 on tokens of 16 x 16."""
    width: int = 1152
    """Width of the transformer; divisible by 4, for its sine and cosine positions in two dimensions, and by the heads."""
    depth: int = 28
    """Blocks."""
    heads: int = 16
    """Attention heads."""
    prediction: Prediction = "epsilon"
    """"epsilon", or "v_prediction" for short-trained networks."""

    def __post_init__(self) -> None:
        check_sizes("network.", patch=self.patch, width=self.width, depth=self.depth, heads=self.heads)
        require(self.width % 4 == 0, f"network.width is {self.width}; allowed: multiples of 4")
        require(self.width % self.heads == 0, f"network.width {self.width} is not divisible by its {self.heads} heads")
        check_prediction("network.prediction", self.prediction)


class SingleStepOrder(RasterOrder):
    """All tokens of an image in one step. Nothing can be known beforehand."""

    def group_sizes(self, steps: int | None, unknown: int) -> tuple[int, ...]:
        require(
            steps in (None, 1),
            f"steps is {steps}; the model makes all tokens of an image in one; allowed: 1, or not given (but see diffusion_steps)",
        )
        known = self.seq_len - unknown
        require(unknown in (0, self.seq_len), f"{known} tokens are known; the model makes whole images; allowed: none, or all")
        return (unknown,) if unknown else ()


@dataclass(frozen=True)
class DiTConfig:
    """Everything that determines the weights' names and shapes."""

    tokens: TokenSpec
    """Vector tokens on a square grid."""
    classes: int = 0
    """Number of class labels; 0 for an unconditional model."""
    network: DiTNetworkConfig = field(default_factory=DiTNetworkConfig)
    kind: Literal["dit"] = "dit"

    def __post_init__(self) -> None:
        require(self.tokens.kind == "vector", "DiT takes vector tokens; these are ids")
        (h, w), patch = self.tokens.grid, self.network.patch
        require(h == w, f"token grid is {self.tokens.grid}; allowed for DiT: a square")
        require(self.classes >= 0, f"classes is {self.classes}; allowed: 0 or more")
        require(h % patch == 0, f"network.patch is {patch}; allowed: divisors of {h}, the side of the token grid")

    def build(self) -> DiT:
        """A freshly initialised model on torch's current default device."""
        return DiT(self)

    def build_order(self) -> SingleStepOrder:
        """All positions in one step."""
        return SingleStepOrder(self.tokens.seq_len)

    def options(self) -> DiffusionOptions:
        """The default options of denoising images."""
        return DiffusionOptions(diffusion_steps=DEFAULT_STEPS)


class DiT(TokenModel, LossByTimestep):
    """Tokens and labels -> loss; labels and seeds -> tokens. B images, N tokens, D token dim.

    Raises:
        UserError: diffusers is not installed.
    """

    config: DiTConfig

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config, self.null_label = config, config.classes
        self.prediction: Prediction = config.network.prediction
        self.order = config.build_order()
        self.transformer = _transformer(config)
        blocks = self.transformer.transformer_blocks
        # Its table has classes + 1 rows; the last is the null condition, as in diffusers' own dropout.
        self.condition = blocks[0].norm1.emb
        self.condition.class_embedder.dropout_prob = 0.0
        for block in blocks:
            block.norm1.emb = _GivenCondition()
        # Persistent, because a loaded model is built on the meta device and never initialised: it would have no positions.
        positions = self.transformer.pos_embed
        positions.register_buffer("pos_embed", positions.pos_embed, persistent=True)
        last = self.transformer.proj_out_2
        self.transformer.proj_out_2 = _Float32Linear(last.in_features, last.out_features)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """DiT's: Xavier Linears (qkv as one matrix), N(0, 0.02) embeddings, zeros for adaLN and the output."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                # As one qkv matrix: bound sqrt(6 / (W + 3W)), where three separate matrices would have sqrt(6 / (W + W)).
                gain = 0.5**0.5 if name.endswith(("to_q", "to_k", "to_v")) else 1.0
                nn.init.xavier_uniform_(module.weight.flatten(1), gain)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for module in self.condition.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        outputs = (self.transformer.proj_out_1, self.transformer.proj_out_2)
        for module in (*(block.norm1.linear for block in self.transformer.transformer_blocks), *outputs):
            nn.init.zeros_(module.weight)

    @property
    def loss_by_timestep(self) -> LossByTimestep:
        return self

    def num_masked_distribution(self) -> dict[int, float]:
        return {self.order.seq_len: 1.0}

    def sample_num_masked(self) -> int:
        return self.order.seq_len

    def compiled_parts(self) -> Iterator[nn.Module]:
        yield from self.transformer.transformer_blocks

    def forward(self, x_BND: Tensor, t_B: Tensor, labels_B: Tensor) -> tuple[Tensor, Tensor]:
        """(x_t, timesteps 0..999, labels 0..classes) -> (eps or velocity, v), [B, N, D] float32 each."""
        b, _, d = x_BND.shape
        grid_BDhw = x_BND.mT.reshape(b, d, *self.config.tokens.grid)
        with without_autocast(x_BND):
            condition_BW = self.condition(t_B, labels_B, hidden_dtype=torch.float32)
        out_B2Dhw = self.transformer(grid_BDhw, timestep=condition_BW, class_labels=None, return_dict=False)[0]
        out, v = out_B2Dhw.flatten(2).mT.chunk(2, dim=-1)
        return out, v

    def loss(self, tokens: Tensor, condition: Tensor | None, view: View, condition_dropout: float = 0.0) -> Tensor:
        """MSE + variational bound of every token, at one random timestep per image; arguments as of `TokenModel.loss`."""
        assert view.known == 0, f"{view.known} tokens of the view are known; DiT predicts all"
        batch, device = len(tokens), tokens.device
        labels = torch.full((batch,), self.null_label, device=device) if condition is None else condition
        if condition_dropout > 0:
            labels = labels.masked_fill(torch.rand(batch, device=device) < condition_dropout, self.null_label)
        t = torch.randint(TRAIN_STEPS, (batch,), device=device)
        loss_BN = self.loss_terms(tokens, labels, t, torch.randn_like(tokens)).total
        add_loss_by_quarter(self.time_losses, t / TRAIN_STEPS, loss_BN.mean(-1))
        return batched_gather(loss_BN, view.query_BQ)

    def loss_terms(self, tokens_BND: Tensor, labels_B: Tensor, t_B: Tensor, noise_BND: Tensor) -> LossTerms:
        """Both terms of every token, [B, N], for given timesteps 0..999 and noise."""
        t_B1 = t_B.unsqueeze(-1)
        return loss_terms(lambda x: self(x, t_B, labels_B), self.prediction, tokens_BND, t_B1, noise_BND)

    @torch.no_grad()
    def sample(
        self,
        labels_B: Tensor,
        seeds_B: Tensor,
        *,
        steps: int = DEFAULT_STEPS,
        guidance: float = 1.0,
        temperature: float = 1.0,
        sampler: SamplerName = "ddpm",
    ) -> Tensor:
        """Tokens [B, N, D] float32. Noise is keyed by (seed, position), so an image does not depend on its batch.

        Args:
            labels_B: int64 0..classes; the last is the null condition.
            seeds_B: int64.
            steps: diffusion steps, 1..1000 with "ddpm", ..980 with other samplers; DiT's paper: 250.
            guidance: scale of classifier-free guidance, 0 or more, the same at every step; 1 is none and runs no null condition.
            temperature: scales the noise added per step; only for samplers that add noise.
            sampler: see `SAMPLERS`.

        Raises:
            UserError: a value that is not allowed.
        """
        require(
            labels_B.ndim == 1 and labels_B.shape == seeds_B.shape,
            f"labels are {tuple(labels_B.shape)} and seeds {tuple(seeds_B.shape)}; allowed: [B] and [B]",
        )
        check_sampler(sampler, steps)
        check_scale("temperature", temperature)
        check_temperature(sampler, temperature)
        check_scale("guidance", guidance)
        n, d = self.config.tokens.seq_len, self.config.tokens.dim
        positions = torch.arange(n, device=seeds_B.device).repeat(len(seeds_B))
        noise = KeyedNoise(seeds_B.repeat_interleave(n), positions)
        x = SAMPLERS[sampler].run(
            self.denoiser(labels_B, guidance),
            noise.normal(Purpose.INITIAL, 0, d),
            coefficients(SAMPLERS[sampler].schedule(steps), labels_B.device),
            temperature=torch.tensor(temperature, device=labels_B.device),
            step_noise=lambda i: noise.normal(Purpose.STEP, i, d),
        )
        return x.view(-1, n, d)

    def denoiser(self, labels_B: Tensor, guidance: float) -> Denoise:
        """denoise(x [B N, D], t) -> (eps, v); guidance acts on eps, and v is the conditional half's."""
        c, is_guided = training_coefficients(labels_B.device), guidance != 1.0
        labels = torch.cat((labels_B, torch.full_like(labels_B, self.null_label))) if is_guided else labels_B

        def denoise(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
            both = torch.cat((x, x)) if is_guided else x
            x_BND = both.view(len(labels), self.config.tokens.seq_len, -1)
            out, v = (part.flatten(0, 1) for part in self(x_BND, t.expand(len(labels)), labels))
            eps = predicted_eps(self.prediction, c, both, t[None], out)  # t is 0-d: one timestep for all rows
            if not is_guided:
                return eps, v
            conditional, unconditional = eps.chunk(2)
            return guided(conditional, unconditional, guidance), v[: len(x)]

        return denoise

    def parameter_groups(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """(with, without) weight decay: none on biases. DiT's own recipe has no weight decay at all."""
        parameters = list(self.parameters())
        return [p for p in parameters if p.ndim > 1], [p for p in parameters if p.ndim <= 1]


class _GivenCondition(nn.Module):
    """Replaces a block's own embedding: returns the condition [B, W], which the transformer hands over as ``timestep``."""

    def forward(self, timestep: Tensor, class_labels: None, hidden_dtype: torch.dtype | None = None) -> Tensor:
        return timestep


class _Float32Linear(nn.Linear):
    """The output layer. In bfloat16 its rounding would be an error of eps, which samplers multiply."""

    def forward(self, input: Tensor) -> Tensor:
        with without_autocast(input):
            return super().forward(input.to(self.weight.dtype))


def _transformer(config: DiTConfig) -> Any:
    try:
        from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
    except ImportError as problem:
        raise UserError("the DiT baseline needs diffusers: pip install 'continuar[diffusers]'") from problem
    return DiTTransformer2DModel(
        num_attention_heads=config.network.heads,
        attention_head_dim=config.network.width // config.network.heads,
        in_channels=config.tokens.dim,
        out_channels=2 * config.tokens.dim,
        num_layers=config.network.depth,
        sample_size=config.tokens.grid[0],
        patch_size=config.network.patch,
        num_embeds_ada_norm=config.classes,
        norm_eps=LN_EPS,
    )
