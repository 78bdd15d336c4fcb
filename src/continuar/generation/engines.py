"""Who follows a plan: `eager` as one would explain it, `graphs` fast and equal to it. "auto" is the fast one where it can run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, Protocol

from continuar.errors import require
from continuar.generation import eager
from continuar.generation.eager import Progress, Start
from continuar.generation.graphs import GraphEngine, why_not
from continuar.generation.plan import SamplingOptions
from continuar.generation.weights import DTYPES, Precision
from continuar.model import Model

EngineName = Literal["auto", "eager", "graphs"]
ENGINE_NAMES: tuple[EngineName, ...] = ("auto", "eager", "graphs")


class Engine(Protocol):
    """Generates with one model, which is in evaluation mode."""

    model: Model

    def stream(self, start: Start, options: SamplingOptions) -> Iterator[Progress]:
        """See `eager.stream`."""
        ...


class EagerEngine:
    """See `eager`. Autocast of the caller holds within its backbone."""

    def __init__(self, model: Model) -> None:
        self.model = model

    def stream(self, start: Start, options: SamplingOptions) -> Iterator[Progress]:
        return eager.stream(self.model, start, options)


def make_engine(model: Model, name: EngineName = "auto", precision: Precision = "float32") -> Engine:
    """The engine of that name.

    Raises:
        UserError: an unknown name or precision, a model that "graphs" cannot run, or bfloat16 without it.
    """
    require(name in ENGINE_NAMES, f"engine is '{name}'; allowed: {', '.join(ENGINE_NAMES)}")
    require(precision in DTYPES, f"precision is '{precision}'; allowed: {', '.join(DTYPES)}")
    reason = why_not(model)
    if name == "graphs" or (name == "auto" and reason is None):
        return GraphEngine(model, precision)
    because = f", for {reason}" if reason else ""
    require(precision == "float32", f"precision is '{precision}' with the eager engine{because}; allowed: float32")
    return EagerEngine(model)
