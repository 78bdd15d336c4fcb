"""Who follows a plan: `eager` as one would explain it, `graphs` fast and equal to it; the one step of a DiT is done by `whole`.

"auto" is the fast one where it can run the model, on a CPU and on CUDA, else the eager one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, Protocol

from continuar.errors import require
from continuar.models.autoregressive import Model
from continuar.models.base import TokenModel
from continuar.models.dit import DiT
from continuar.sampling import generate as eager
from continuar.sampling.fast.engine import FastEngine, why_not
from continuar.sampling.fast.weights import DTYPES, Precision
from continuar.sampling.generate import Progress, SamplingInput, SamplingOptions

EngineName = Literal["auto", "eager", "fast"]
ENGINE_NAMES: tuple[EngineName, ...] = ("auto", "eager", "fast")
TESTED = ("cpu", "cuda")
"""Devices on which the fast engine was seen to equal the eager one."""


class Engine(Protocol):
    """Generates with one model, which is in evaluation mode."""

    @property
    def model(self) -> TokenModel:
        """What it generates with."""
        ...

    def stream(self, start: SamplingInput, options: SamplingOptions) -> Iterator[Progress]:
        """See `eager.stream`."""
        ...


class EagerEngine:
    """See `eager`, and of a DiT `whole`. Autocast of the caller holds within its backbone."""

    def __init__(self, model: TokenModel) -> None:
        self.model = model

    def stream(self, start: SamplingInput, options: SamplingOptions) -> Iterator[Progress]:
        if isinstance(self.model, DiT):
            return eager.stream_single_step(self.model, start, options)
        assert isinstance(self.model, Model)
        return eager.stream(self.model, start, options)


def chosen(model: TokenModel, name: EngineName) -> EngineName:
    """What "auto" means for a model; other names mean themselves."""
    if name != "auto":
        return name
    return "fast" if why_not(model) is None and next(model.parameters()).device.type in TESTED else "eager"


def make_engine(model: TokenModel, name: EngineName = "auto", precision: Precision = "float32") -> Engine:
    """The engine of that name.

    Raises:
        UserError: an unknown name or precision, a model that "fast" cannot run, or bfloat16 without it.
    """
    require(name in ENGINE_NAMES, f"engine is '{name}'; allowed: {', '.join(ENGINE_NAMES)}")
    require(precision in DTYPES, f"precision is '{precision}'; allowed: {', '.join(DTYPES)}")
    reason, fast = why_not(model), chosen(model, name) == "fast"
    if fast and isinstance(model, Model):
        return FastEngine(model, precision)
    require(not fast, f"engine is 'graphs', but {reason}; allowed: eager")
    because, allowed = (f", for {reason}", "float32") if reason else ("", "float32, or engine graphs")
    require(precision == "float32", f"precision is '{precision}' with the eager engine{because}; allowed: {allowed}")
    return EagerEngine(model)
