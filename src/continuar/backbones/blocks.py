"""ViT pre-norm transformer blocks (Dosovitskiy et al. 2021), shared by every backbone."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LN_EPS = 1e-6


class Attention(nn.Module):
    """Multi-head self-attention with one qkv projection; rows of its weight are q, then k, then v."""

    def __init__(self, width: int, heads: int, attention_dropout: float, dropout: float) -> None:
        super().__init__()
        self.heads, self.attention_dropout = heads, attention_dropout
        self.qkv = nn.Linear(width, 3 * width)
        self.projection = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BLE: Tensor) -> Tensor:
        batch, length, width = x_BLE.shape
        q, k, v = self.qkv(x_BLE).view(batch, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        dropout = self.attention_dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
        return self.dropout(self.projection(y.transpose(1, 2).reshape(batch, length, width)))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); GELU MLP of ratio 4."""

    def __init__(self, width: int, heads: int, attention_dropout: float, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=LN_EPS)
        self.attention = Attention(width, heads, attention_dropout, dropout)
        self.norm2 = nn.LayerNorm(width, eps=LN_EPS)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(4 * width, width),
            nn.Dropout(dropout),
        )

    def forward(self, x_BLE: Tensor) -> Tensor:
        x_BLE = x_BLE + self.attention(self.norm1(x_BLE))
        return x_BLE + self.mlp(self.norm2(x_BLE))


def init_transformer(module: nn.Module) -> None:
    """Xavier-uniform Linears (qkv as one matrix) with zero biases, and N(0, 0.02) for every bare parameter and embedding."""
    for child in module.modules():
        if isinstance(child, nn.Linear):
            nn.init.xavier_uniform_(child.weight)
            nn.init.zeros_(child.bias)
        elif isinstance(child, nn.Embedding):
            nn.init.normal_(child.weight, std=0.02)
        for parameter in child.parameters(recurse=False):
            if not isinstance(child, nn.Linear | nn.LayerNorm | nn.Embedding):
                nn.init.normal_(parameter, std=0.02)


def take(x_BNE: Tensor, index_BK: Tensor) -> Tensor:
    """Rows of each image at its own positions: [B, N, E], [B, K] -> [B, K, E]. A batch of one in x is shared by all."""
    x_BNE = x_BNE.expand(index_BK.shape[0], *x_BNE.shape[1:])
    return torch.gather(x_BNE, 1, index_BK.unsqueeze(-1).expand(*index_BK.shape, x_BNE.shape[-1]))
