"""continuar: autoregressive generation over continuous tokens.

The method of "Autoregressive Image Generation without Vector Quantization" (Li et al., NeurIPS 2024). Names are imported when they
are first used, so that ``import continuar`` and the command line start fast.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from continuar.errors import UserError
    from continuar.heads.diffusion import DiffusionHead
    from continuar.models.autoregressive import Model, ModelConfig
    from continuar.pipeline import Pipeline, load
    from continuar.sampling.options import SamplingOptions

__version__ = "0.1.0"

_HOME = {
    "DiffusionHead": "continuar.heads.diffusion",
    "Model": "continuar.models.autoregressive",
    "ModelConfig": "continuar.models.autoregressive",
    "Pipeline": "continuar.pipeline",
    "SamplingOptions": "continuar.sampling.options",
    "UserError": "continuar.errors",
    "load": "continuar.pipeline",
}

__all__ = ["DiffusionHead", "Model", "ModelConfig", "Pipeline", "SamplingOptions", "UserError", "load"]


def __getattr__(name: str) -> object:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'continuar' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
