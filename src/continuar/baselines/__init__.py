"""Baselines of the paper: other models of the same tokens, with the same loss and samplers. They need the extra [diffusers]."""

from continuar.baselines.dit import DiT, DiTConfig, DiTNetworkConfig

__all__ = ["DiT", "DiTConfig", "DiTNetworkConfig"]
