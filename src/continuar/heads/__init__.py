"""Heads: z -> loss in training, z -> token in generation. `HeadConfig` is the closed table of them."""

from continuar.heads.base import Head, HeadOptions, HeadSample
from continuar.heads.diffusion import DiffusionHead, DiffusionHeadConfig

HeadConfig = DiffusionHeadConfig

__all__ = ["DiffusionHead", "DiffusionHeadConfig", "Head", "HeadConfig", "HeadOptions", "HeadSample"]
