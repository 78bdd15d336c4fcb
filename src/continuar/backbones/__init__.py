"""Backbones: known tokens -> z. `BackboneConfig` is the closed table of them."""

from continuar.backbones.base import Backbone
from continuar.backbones.causal import Causal, CausalConfig
from continuar.backbones.mae import MAE, MAEConfig

BackboneConfig = MAEConfig | CausalConfig

__all__ = ["MAE", "Backbone", "BackboneConfig", "Causal", "CausalConfig", "MAEConfig"]
