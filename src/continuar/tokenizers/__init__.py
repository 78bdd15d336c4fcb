"""Tokenizers: images <-> tokens. `TokenizerConfig` is the closed table of them."""

from continuar.tokenizers.base import Tokenizer, TokenKind, TokenSpec, fingerprint
from continuar.tokenizers.kmeans import CodebookConfig, CodebookTokenizer
from continuar.tokenizers.pixel import PixelConfig, PixelTokenizer
from continuar.tokenizers.vae import LatentConfig, LatentTokenizer, VAEConfig, VAETokenizer
from continuar.tokenizers.vq import VQConfig, VQTokenizer

TokenizerConfig = PixelConfig | CodebookConfig | LatentConfig | VAEConfig | VQConfig

__all__ = [
    "CodebookConfig",
    "CodebookTokenizer",
    "LatentConfig",
    "LatentTokenizer",
    "PixelConfig",
    "PixelTokenizer",
    "TokenKind",
    "TokenSpec",
    "Tokenizer",
    "TokenizerConfig",
    "VAEConfig",
    "VAETokenizer",
    "VQConfig",
    "VQTokenizer",
    "fingerprint",
]
