"""Models of a sequence of tokens: known tokens -> z -> loss. `BackboneConfig` is the closed table of backbones."""

from continuar.models.base import Backbone
from continuar.models.causal import Causal, CausalConfig
from continuar.models.mar import MAE, MAEConfig

BackboneConfig = MAEConfig | CausalConfig

__all__ = ["MAE", "Backbone", "BackboneConfig", "Causal", "CausalConfig", "MAEConfig"]
