"""Transformers of two families with ReLU, OPT and T5, in plain torch, with the activation as an argument."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Activation = Callable[[], nn.Module]


@dataclass(frozen=True)
class TransformerConfig:
    """Sizes of a stack. inner: the total width of all heads. hidden: the width between the two feed-forward Linears.
    dropout: its probability between the feed-forward Linears, in T5."""

    vocabulary: int
    positions: int
    layers: int
    width: int
    heads: int
    inner: int
    hidden: int
    dropout: float = 0.0

    def resized(self, **sizes: int | float | None) -> TransformerConfig:
        """A copy with the sizes that are not None."""
        given: dict[str, Any] = {name: size for name, size in sizes.items() if size is not None}
        return replace(self, **given)


# Zhang et al. 2022, arXiv 2205.01068, table 1; Raffel et al. 2020, arXiv 1910.10683, section 3.7.
OPT_125M = TransformerConfig(50272, 2048, 12, 768, 12, 768, 3072)
OPT_1_3B = TransformerConfig(50272, 2048, 24, 2048, 32, 2048, 8192)
T5_SMALL = TransformerConfig(32128, 512, 6, 512, 8, 512, 2048, dropout=0.1)


class _Attention(nn.Module):
    def __init__(self, config: TransformerConfig, bias: bool) -> None:
        super().__init__()
        self.heads = config.heads
        self.q, self.k, self.v = (nn.Linear(config.width, config.inner, bias=bias) for _ in range(3))
        self.out = nn.Linear(config.inner, config.width, bias=bias)

    def forward(self, x: Tensor, position_bias: Tensor | None, causal: bool, scale: float | None) -> Tensor:
        q, k, v = (project(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for project in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=position_bias, is_causal=causal, scale=scale)
        return self.out(y.transpose(1, 2).flatten(-2))


class _OptLayer(nn.Module):
    def __init__(self, config: TransformerConfig, activation: Activation) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(config.width), _Attention(config, bias=True)
        self.norm2 = nn.LayerNorm(config.width)
        self.fc1 = nn.Linear(config.width, config.hidden)
        self.activation = activation()
        self.fc2 = nn.Linear(config.hidden, config.width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x), None, causal=True, scale=None)
        return x + self.fc2(self.activation(self.fc1(self.norm2(x))))


class Opt(nn.Module):
    """A decoder like OPT: pre-norm, learned positions, Linear-ReLU-Linear; tokens [B, T] to logits [B, T, V]."""

    def __init__(self, config: TransformerConfig, activation: Activation) -> None:
        super().__init__()
        self.tokens = nn.Embedding(config.vocabulary, config.width)
        self.positions = nn.Embedding(config.positions, config.width)
        self.layers = nn.ModuleList(_OptLayer(config, activation) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.size(1), device=tokens.device))
        for layer in self.layers:
            x = layer(x)
        return F.linear(self.norm(x), self.tokens.weight)


class _T5Layer(nn.Module):
    def __init__(self, config: TransformerConfig, activation: Activation) -> None:
        super().__init__()
        self.norm1, self.attention = nn.RMSNorm(config.width, eps=1e-6), _Attention(config, bias=False)
        self.norm2 = nn.RMSNorm(config.width, eps=1e-6)
        self.wi = nn.Linear(config.width, config.hidden, bias=False)
        self.activation = activation()
        self.dropout = nn.Dropout(config.dropout)
        self.wo = nn.Linear(config.hidden, config.width, bias=False)

    def forward(self, x: Tensor, position_bias: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x), position_bias, causal=False, scale=1.0)
        return x + self.wo(self.dropout(self.activation(self.wi(self.norm2(x)))))


class T5Encoder(nn.Module):
    """An encoder like T5: RMSNorm, relative position bias, Linear-ReLU-Dropout-Linear; tokens [B, T] to states
    [B, T, width]. Every relative position has its own bias; in T5 distant ones share."""

    def __init__(self, config: TransformerConfig, activation: Activation) -> None:
        super().__init__()
        self.last = config.positions - 1
        self.tokens = nn.Embedding(config.vocabulary, config.width)
        self.position_bias = nn.Embedding(2 * config.positions - 1, config.heads)
        self.layers = nn.ModuleList(_T5Layer(config, activation) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.width, eps=1e-6)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens)
        place = torch.arange(tokens.size(1), device=tokens.device)
        bias = self.position_bias(place[None, :] - place[:, None] + self.last).permute(2, 0, 1)[None]
        for layer in self.layers:
            x = layer(x, bias)
        return self.norm(x)
