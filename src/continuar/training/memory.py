"""Memory of a training step, counted on the meta device: what autograd saves, not what someone guesses.

1. Run the loss on the meta device, with hooks on every tensor that autograd saves for backward; each storage counts once.
2. What the meta device would do in its own way is done as a GPU does it: attention saves no matrix of weights, dropout saves a mask
   of bytes, and under bfloat16 autocast matrix products cast their inputs and layer norms compute in float32.
3. Where blocks are recomputed, what counts is what is saved outside of them, their inputs, and of one block at a time what is saved
   inside it; the block that needs most decides.
4. Do it for two batch sizes: activations are linear in the batch, and what does not grow is copies of weights
   and embedded timesteps.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from continuar.backbones.blocks import Block
from continuar.orders import View
from continuar.precision import META_AUTOCAST, meta_autocast
from continuar.token_model import TokenModel

COUNTED = 1024
"""Images of a batch whose costs are counted: enough for it to go the way of large ones (few rows embed timesteps one by one)."""


@dataclass(frozen=True)
class Activations:
    """Bytes of what a forward pass leaves for backward, at the number of masked tokens that needs most."""

    per_image: float
    copies: float
    """bfloat16 copies of weights, and embedded timesteps: the same for every batch."""
    largest: float
    """Of ``per_image``, the largest single tensor: its gradient is there at the same time."""


def activations(model: TokenModel, bf16: bool, recompute: bool = False) -> Activations:
    """What a forward pass of a model on the meta device saves, over the extremes of the number of masked tokens.

    Args:
        recompute: blocks are computed again in backward (`LoopConfig.recompute`).
    """
    counts = model.queried_counts()
    found = [_activations(model, queried, bf16, recompute) for queried in {min(counts), max(counts)}]
    return max(found, key=lambda a: a.per_image + a.largest)


def _activations(model: TokenModel, queried: int, bf16: bool, recompute: bool) -> Activations:
    few, many = COUNTED, 2 * COUNTED
    (small, small_largest), (large, large_largest) = (saved(model, batch, queried, bf16, recompute) for batch in (few, many))
    per_image = (large - small) / (many - few)
    copies = small - few * per_image
    if recompute:  # autocast keeps those of all blocks to the end of forward
        copies = _activations(model, queried, bf16, recompute=False).copies
    return Activations(per_image, copies, (large_largest - small_largest) / (many - few))


def saved(model: TokenModel, batch: int, queried: int, bf16: bool, recompute: bool = False) -> tuple[int, int]:
    """(bytes, bytes of the largest) of the storages that a forward pass of ``batch`` images saves, without the weights'."""
    outside: dict[int, torch.UntypedStorage] = {}
    inside: list[dict[int, torch.UntypedStorage]] = []
    within = [outside]  # the last one is of what is running

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        within[-1][id(storage)] = storage
        return tensor

    def enter(block: nn.Module, given: tuple[Tensor, ...]) -> None:
        pack(given[0])
        inside.append({})
        within.append(inside[-1])

    def leave(block: nn.Module, given: Any, out: Tensor) -> None:
        within.pop()

    spec, model = model.config.tokens, model.train()
    blocks = [m for m in model.modules() if isinstance(m, Block)] if recompute else []
    hooks = [hook for b in blocks for hook in (b.register_forward_pre_hook(enter), b.register_forward_hook(leave))]
    with torch.device("meta"), saved_tensors_hooks(pack, lambda tensor: tensor), AsOnGPU(), meta_autocast(bf16):
        view = View(torch.zeros(batch, spec.positions, dtype=torch.int64), spec.positions - queried)
        loss = model.loss(spec.blank(batch), torch.zeros(batch, dtype=torch.int64), view, 0.1).mean()
    assert loss.is_meta
    for hook in hooks:
        hook.remove()
    weights = {id(p.untyped_storage()) for p in model.parameters()}

    def sizes(found: dict[int, torch.UntypedStorage], known: Collection[int] = ()) -> list[int]:
        return [s.nbytes() for key, s in found.items() if key not in weights and key not in known]

    kept, again = sizes(outside), max((sizes(one, outside) for one in inside), key=sum, default=[])
    return sum(kept) + sum(again), max([*kept, *again])


class AsOnGPU(TorchFunctionMode):
    """See the module's docstring, 2."""

    def __init__(self) -> None:
        super().__init__()
        self._copies: dict[int, Tensor] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return _Attention.apply(*args[:3])
        if func is F.dropout:
            x, p, training = args[0], kwargs.get("p", 0.5), kwargs.get("training", True)
            return _Dropout.apply(x) if training and p > 0 else x
        if META_AUTOCAST.get() and func is F.linear:
            return func(*(self._low(x) for x in args))
        if func is F.layer_norm and (META_AUTOCAST.get() or torch.is_autocast_enabled("cpu")):
            return func(args[0].float(), *args[1:], **kwargs)
        return func(*args, **kwargs)

    def _low(self, x: Tensor | None) -> Tensor | None:
        """A bfloat16 copy; of a weight, one for all its uses."""
        if x is None or x.dtype == torch.bfloat16:
            return x
        if not x.is_leaf:
            return x.bfloat16()
        if id(x) not in self._copies:
            self._copies[id(x)] = x.bfloat16()
        return self._copies[id(x)]


class _Attention(torch.autograd.Function):
    """What flash attention saves: inputs, output, and one float32 per query and head."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out, torch.empty(q.shape[:-1], device=q.device))
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise NotImplementedError("only what is saved is counted")


class _Dropout(torch.autograd.Function):
    """What fused dropout saves: a mask of bytes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(torch.empty(x.shape, dtype=torch.bool, device=x.device))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise NotImplementedError("only what is saved is counted")
