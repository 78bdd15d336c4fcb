"""Heads: z -> loss in training, z -> token in generation. `HeadConfig` and `HeadOptions` are the closed tables of them."""

from continuar.heads.base import Head, HeadSample, Options, option_names, with_values
from continuar.heads.categorical import CategoricalHead, CategoricalHeadConfig, CategoricalOptions
from continuar.heads.diffusion import DiffusionHead, DiffusionHeadConfig, DiffusionOptions
from continuar.heads.flow import FlowHead, FlowHeadConfig, FlowOptions
from continuar.heads.mixture import MixtureHead, MixtureHeadConfig, MixtureOptions
from continuar.heads.regression import RegressionHead, RegressionHeadConfig, RegressionOptions

HeadConfig = DiffusionHeadConfig | FlowHeadConfig | CategoricalHeadConfig | MixtureHeadConfig | RegressionHeadConfig
HeadOptions = DiffusionOptions | FlowOptions | CategoricalOptions | MixtureOptions | RegressionOptions

__all__ = [
    "CategoricalHead",
    "CategoricalHeadConfig",
    "CategoricalOptions",
    "DiffusionHead",
    "DiffusionHeadConfig",
    "DiffusionOptions",
    "FlowHead",
    "FlowHeadConfig",
    "FlowOptions",
    "Head",
    "HeadConfig",
    "HeadOptions",
    "HeadSample",
    "MixtureHead",
    "MixtureHeadConfig",
    "MixtureOptions",
    "Options",
    "RegressionHead",
    "RegressionHeadConfig",
    "RegressionOptions",
    "option_names",
    "with_values",
]
