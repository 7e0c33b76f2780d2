"""One transformer block, as GPT-2 has it: causal attention with its cache, the MLP, positions.

Shapes: B rows, T tokens, C channels (n_embd), H heads, D = C / H, V vocabulary, S cache slots.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn import functional as F


def at_least_float32(x: Tensor) -> Tensor:
    """bfloat16 and float16 become float32; float32 and float64 stay."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


@dataclass
class GPTConfig:
    vocab_size: int
    block_size: int  # the longest sequence, in tokens
    n_layer: int
    n_head: int
    n_embd: int
    dropout: float = 0.0
    # Rows of the embedding that belong to real token ids, where a table has more (imported weights padded to a round
    # number). Logits beyond it are cut off inside the model, so no such id can be sampled or be given probability.
    real_vocab: int | None = None
    # 0: learned positions, as in GPT-2. Above 0: rotary positions of this base (Su et al. 2021), and no table of them.
    rope_base: float = 0.0
    expectation: bool = False  # of a ScalarModel: it is told how expected each token was, see there

    def __post_init__(self):
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} is not a multiple of n_head {self.n_head}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), not {self.dropout}")
        if self.rope_base and (self.rope_base < 0 or self.n_embd // self.n_head % 2):
            raise ValueError("rotary positions need a rope_base above 0 and an even number of channels a head")


class KVCache:
    """Keys and values of one layer for a batch of rows, (2, B, H, S, D). The slot of a token is its position."""

    def __init__(self, batch: int, slots: int, config: GPTConfig, like: Tensor):
        self.kv = like.new_zeros(2, batch, config.n_head, slots, config.n_embd // config.n_head)

    def fill(self, k: Tensor, v: Tensor) -> None:
        """k, v (B, H, T, D) of positions 0..T-1."""
        self.kv[0, :, :, : k.size(2)], self.kv[1, :, :, : v.size(2)] = k, v

    def write(self, k: Tensor, v: Tensor, rows: Tensor, positions: Tensor) -> None:
        """k, v (B, H, 1, D) of one token a row, rows (B,) 0..B-1, at its own of positions (B,)."""
        self.kv[:, rows, :, positions] = torch.stack([k[:, :, 0], v[:, :, 0]], 1).to(self.kv.dtype)  # (B, 2, H, D)

    def keep(self, rows: Tensor) -> None:
        """Rows (b,) in the place of all: fewer, or one of them several times."""
        self.kv = self.kv[:, rows]

    def grow(self, slots: int) -> None:
        """`slots` more, empty."""
        self.kv = torch.cat([self.kv, self.kv.new_zeros(*self.kv.shape[:3], slots, self.kv.size(4))], 3)


class Step(NamedTuple):
    """One new token a row, as `generate` feeds it."""

    rows: Tensor  # (B,) 0..B-1
    positions: Tensor  # (B,) where the token of each row stands
    bias: Tensor  # (B * H, 1, S) 0 on the slots up to there, -inf on those behind


class Branches(NamedTuple):
    """Rows in which all completions of a prompt stand behind it, so that it is read once: p0 p1 a0 a1 b0 b1 b2. Each of
    them is to be seen as if it stood there alone."""

    positions: Tensor  # (B, T) of each token in its own text: 0 1 2 3 2 3 4
    before: Tensor  # (B, T) column of the token before it there: 0 0 1 2 1 4 5 (the first has none)
    visible: Tensor  # (B, 1, T, T) bool: the columns that each token looks at, the prompt's and its own completion's


def rotary_turns(config: GPTConfig) -> Tensor:
    """cos and sin of position * base^(-2j/D) for pair j of a head's channels: (block_size, D/2, 2)."""
    D = config.n_embd // config.n_head
    angles = torch.arange(config.block_size)[:, None] * config.rope_base ** (-torch.arange(0, D, 2) / D)
    return torch.stack([angles.cos(), angles.sin()], -1)


def rotate(x: Tensor, turns: Tensor) -> Tensor:
    """Rotary positions (Su et al. 2021, arXiv:2104.09864): channels 2j and 2j+1 of x (..., D) are one complex number,
    which is turned by its position's angle, turns (..., D/2, 2). So query times key depends on their distance alone.
    One complex product, because on a CPU it is the fastest way; in parts for torch.compile, which knows no complex
    numbers."""
    if torch.compiler.is_compiling():
        (a, b), (cos, sin) = at_least_float32(x).unflatten(-1, (-1, 2)).unbind(-1), at_least_float32(turns).unbind(-1)
        return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2).to(x.dtype)
    pairs = torch.view_as_complex(at_least_float32(x).unflatten(-1, (-1, 2)))  # (..., D/2)
    return torch.view_as_real(pairs * torch.view_as_complex(at_least_float32(turns))).flatten(-2).to(x.dtype)


def attend_to_slots(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """Attention written out, for one query a row against the cache: softmax(q k' / sqrt(D) + bias) v.

    q (B, H, 1, D); k, v (B, H, S, D); bias (B * H, 1, S), 0 on slots to look at and -inf on the others -> (B, H, 1, D).
    On a CPU faster than the fused kernel, which is made for many queries."""
    scores = torch.baddbmm(bias, q.flatten(0, 1), k.flatten(0, 1).mT, alpha=q.size(-1) ** -0.5)  # (B * H, 1, S)
    return torch.bmm(scores.softmax(-1), v.flatten(0, 1)).view(q.shape)


class Attention(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def mix(
        self, x: Tensor, turns: Tensor | None, cache: KVCache | None, step: Step | None, visible: Tensor | None
    ) -> Tensor:
        """What the heads read at every position: x (B, T, C) -> (B, T, C), before the output projection. Every token
        looks at itself and all before it, or at what `visible` (B, 1, T, T) says."""
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)
        qk, v = qkv[:, :, :2], qkv[:, :, 2].transpose(1, 2)  # (B, T, 2, H, D), (B, H, T, D)
        q, k = (qk if turns is None else rotate(qk, turns)).permute(2, 0, 3, 1, 4)  # (B, H, T, D) each
        if step is not None:
            cache.write(k, v, step.rows, step.positions)
            y = attend_to_slots(q, *cache.kv, step.bias)
        else:
            if cache is not None:
                cache.fill(k, v)
            dropout = self.dropout if self.training else 0.0
            y = F.scaled_dot_product_attention(q, k, v, visible, dropout, is_causal=visible is None)
        return y.transpose(1, 2).reshape(B, T, C)

    def project(self, y: Tensor) -> Tensor:
        return F.dropout(self.c_proj(y), self.dropout, self.training)


def init_weights(module: nn.Module, config: GPTConfig) -> None:
    """GPT-2's N(0, 0.02) is for 768 channels; scaled so that activations have the same size at any width, and less
    where a residual branch ends, so that depth adds no variance."""
    for name, p in module.named_parameters():
        if p.dim() == 2:
            std = 0.02 * math.sqrt(768 / config.n_embd)
            nn.init.normal_(p, std=std / math.sqrt(2 * config.n_layer) if name.endswith("c_proj.weight") else std)
        elif name.endswith("bias"):
            nn.init.zeros_(p)


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.dropout = config.dropout
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.c_proj(F.gelu(self.c_fc(x), approximate="tanh")), self.dropout, self.training)


class Block(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(
        self,
        x: Tensor,
        turns: Tensor | None = None,
        cache: KVCache | None = None,
        step: Step | None = None,
        index: Tensor | None = None,
        visible: Tensor | None = None,
    ) -> Tensor:
        """x (B, T, C) -> (B, T, C); with index (N,), flat positions b * T + t, only what comes out there, (N, C)."""
        y = self.attn.mix(self.ln_1(x), turns, cache, step, visible)
        if index is not None:  # from here on every position is on its own, so the others need not be computed
            # (N, C) each; `embedding` is x.flatten(0, 1)[index] with a faster backward pass
            x, y = (F.embedding(index, part.flatten(0, 1)) for part in (x, y))
        x = x + self.attn.project(y)
        return x + self.mlp(self.ln_2(x))
