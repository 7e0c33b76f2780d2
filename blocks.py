"""One transformer block, GPT-2's or Llama's: causal attention with its cache, the MLP, norms, positions.

Llama (Touvron et al. 2023, arXiv:2302.13971; also SmolLM2, Qwen2, ...) differs from GPT-2 in four places, each a field
of GPTConfig: rotary positions (rope_base), RMSNorm (norm), fewer heads of keys and values than of queries (n_kv_head),
a gated MLP (mlp). And it has no biases.

Shapes: B rows, T tokens, C channels (n_embd), H heads, G heads of keys and values (n_kv_head, H in GPT-2), D = C / H,
V vocabulary, S cache slots.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


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
    # What Llama and its like have instead of what GPT-2 has
    norm: str = "layer"  # or "rms": no mean is subtracted and no bias added (Zhang and Sennrich 2019, arXiv:1910.07467)
    norm_eps: float = 1e-5
    # 0: n_head. Fewer: several queries share a key and a value (grouped queries, Ainslie et al. 2023, arXiv:2305.13245)
    n_kv_head: int = 0
    mlp: str = "gelu"  # or "swiglu": the hidden layer times a gate of its own (Shazeer 2020, arXiv:2002.05202)
    n_inner: int = 0  # width of the MLP's hidden layer; 0: 4 * n_embd
    bias: str = "all"  # or "none", or "qkv": in the projection to queries, keys and values alone, as in Qwen2
    tied: bool = True  # False: the output layer has weights of its own, not the embedding's

    def __post_init__(self):
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} is not a multiple of n_head {self.n_head}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), not {self.dropout}")
        if self.rope_base and (self.rope_base < 0 or self.n_embd // self.n_head % 2):
            raise ValueError("rotary positions need a rope_base above 0 and an even number of channels a head")
        self.n_kv_head = self.n_kv_head or self.n_head
        self.n_inner = self.n_inner or 4 * self.n_embd
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_head {self.n_head} is not a multiple of n_kv_head {self.n_kv_head}")
        for name, known in (("norm", ("layer", "rms")), ("mlp", ("gelu", "swiglu")), ("bias", ("all", "qkv", "none"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, not {getattr(self, name)!r}")

    @property
    def numbers_cached(self) -> int:
        """Keys and values of one token, in all blocks."""
        return 2 * self.n_layer * self.n_kv_head * (self.n_embd // self.n_head)


# What makes a Llama of a GPTConfig, beside a rope_base and an n_inner of 8/3 n_embd: as many weights as GPT-2's MLP has
LLAMA = {"norm": "rms", "mlp": "swiglu", "bias": "none"}


class KVCache:
    """Keys and values of one layer for a batch of rows, (2, B, G, S, D), in the dtype in which they are computed. The
    slot of a token is its position."""

    def __init__(self, batch: int, slots: int, config: GPTConfig, like: Tensor):
        kind = like.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else like.dtype
        self.kv = like.new_zeros(2, batch, config.n_kv_head, slots, config.n_embd // config.n_head, dtype=dtype)

    def fill(self, k: Tensor, v: Tensor) -> None:
        """k, v (B, G, T, D) of positions 0..T-1."""
        self.kv[0, :, :, : k.size(2)], self.kv[1, :, :, : v.size(2)] = k, v

    def write(self, k: Tensor, v: Tensor, rows: Tensor, positions: Tensor) -> None:
        """k, v (B, G, 1, D) of one token a row, rows (B,) 0..B-1, at its own of positions (B,)."""
        self.kv[:, rows, :, positions] = torch.stack([k[:, :, 0], v[:, :, 0]], 1).to(self.kv.dtype)  # (B, 2, G, D)

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
    bias: Tensor  # (B * G, 1, S) 0 on the slots up to there, -inf on those behind


class Branches(NamedTuple):
    """Rows in which all completions of a prompt stand behind it, so that it is read once: p0 p1 a0 a1 b0 b1 b2. Each of
    them is to be seen as if it stood there alone."""

    positions: Tensor  # (B, T) of each token in its own text: 0 1 2 3 2 3 4
    before: Tensor  # (B, T) column of the token before it there: 0 0 1 2 1 4 5 (the first has none)
    visible: Tensor  # (B, 1, T, T) bool: the columns that each token looks at, the prompt's and its own completion's


def flat_index(where: Tensor | None, T: int) -> Tensor | None:
    """The N true positions of where (B, T) or (B, T-1) in rows of T tokens -> (N,), in reading order. What is no
    mask is such an index already."""
    if where is None or where.dtype != torch.bool:
        return where
    rows, columns = where.nonzero(as_tuple=True)  # (N,) each
    return rows * T + columns


def flat_before(branches: Branches) -> Tensor:
    """(B, T) flat position of the token before each one."""
    B, T = branches.before.shape
    return branches.before + T * torch.arange(B, device=branches.before.device)[:, None]


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

    q (B, H, 1, D); k, v (B, G, S, D); bias (B * G, 1, S), 0 on slots to look at and -inf on the others -> (B, H, 1, D).
    On a CPU faster than the fused kernel, which is made for many queries."""
    D = q.size(-1)
    q_of_k = q.reshape(len(bias), -1, D)  # (B * G, H / G, D): the queries that share a key and a value
    scores = torch.baddbmm(bias, q_of_k, k.flatten(0, 1).mT, alpha=D**-0.5)  # (B * G, H / G, S)
    return torch.bmm(scores.softmax(-1), v.flatten(0, 1)).view(q.shape)


class Attention(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head, self.n_kv_head = config.n_head, config.n_kv_head
        self.dropout = config.dropout
        width = (config.n_head + 2 * config.n_kv_head) * (config.n_embd // config.n_head)
        self.c_attn = nn.Linear(config.n_embd, width, bias=config.bias != "none")
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias == "all")

    def mix(
        self, x: Tensor, turns: Tensor | None, cache: KVCache | None, step: Step | None, visible: Tensor | None
    ) -> Tensor:
        """What the heads read at every position: x (B, T, C) -> (B, T, C), before the output projection. Every token
        looks at itself and all before it, or at what `visible` (B, 1, T, T) says."""
        B, T, C = x.shape
        H, G = self.n_head, self.n_kv_head
        qk, v = self.c_attn(x).view(B, T, H + 2 * G, C // H).split([H + G, G], 2)
        q, k = (qk if turns is None else rotate(qk, turns)).split([H, G], 2)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))  # (B, H, T, D), (B, G, T, D), (B, G, T, D)
        if step is not None:
            cache.write(k, v, step.rows, step.positions)
            y = attend_to_slots(q, *cache.kv, step.bias)
        else:
            if cache is not None:
                cache.fill(k, v)
            dropout = self.dropout if self.training else 0.0
            if G < H:
                k, v = (x.repeat_interleave(H // G, 1) for x in (k, v))  # (B, H, T, D)
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
        self.dropout, self.gated = config.dropout, config.mlp == "swiglu"
        self.c_fc = nn.Linear(config.n_embd, (1 + self.gated) * config.n_inner, bias=config.bias == "all")
        self.c_proj = nn.Linear(config.n_inner, config.n_embd, bias=config.bias == "all")

    def forward(self, x: Tensor) -> Tensor:
        x = self.c_fc(x)
        if self.gated:
            gate, x = x.chunk(2, -1)  # one product for both
            x = F.silu(gate) * x
        else:
            x = F.gelu(x, approximate="tanh")
        return F.dropout(self.c_proj(x), self.dropout, self.training)


def make_norm(config: GPTConfig) -> nn.Module:
    """x - mean(x) over std(x), times a weight, plus a bias; "rms": x over its root mean square, times a weight."""
    return (nn.LayerNorm if config.norm == "layer" else nn.RMSNorm)(config.n_embd, eps=config.norm_eps)


class Block(nn.Module):
    recompute = False  # --recompute

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1 = make_norm(config)
        self.attn = Attention(config)
        self.ln_2 = make_norm(config)
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
        """x (B, T, C) -> (B, T, C); with index (...), flat positions b * T + t, what comes out there, (..., C)."""
        y = self.attn.mix(self.ln_1(x), turns, cache, step, visible)
        if index is not None:  # from here on every position is on its own, so the others need not be computed
            # (..., C) each; `embedding` is x.flatten(0, 1)[index] with a faster backward pass
            x, y = (F.embedding(index, part.flatten(0, 1)) for part in (x, y))
        x = x + self.attn.project(y)
        return x + self.mlp(self.ln_2(x))


def run_block(block: Block, *inputs) -> Tensor:
    """block(*inputs). With block.recompute nothing computed inside is kept for the backward pass, which computes it
    again (Chen et al. 2016, arXiv:1604.06174): a fraction of the memory, a third more time, the same gradients."""
    if block.recompute and torch.is_grad_enabled():
        return checkpoint(block, *inputs, use_reentrant=False)
    return block(*inputs)
