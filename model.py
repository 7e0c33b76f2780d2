"""The network all stages share."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
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


class GPT(nn.Module):
    """GPT-2 (Radford et al. 2019): learned positions, pre-norm blocks, output tied to the token embedding; or Llama,
    see model.py. The parameters have GPT-2's own names (wte, wpe, h.0.ln_1, ...), so its weights import one to
    one."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        if config.rope_base:
            self.register_buffer("turns", rotary_turns(config), persistent=False)
        else:
            self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = make_norm(config)
        if not config.tied:
            self.unembedding = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.frozen = 0  # lowest blocks that never change and that policy and reference have in common: --train_layers
        init_weights(self, config)

    @property
    def device(self) -> torch.device:
        return self.wte.weight.device

    @property
    def output_weight(self) -> Tensor:
        """(V, C) the token embedding's, or the output layer's own."""
        return (self.wte if self.config.tied else self.unembedding).weight

    def hidden(
        self,
        tokens: Tensor,
        where: Tensor | None = None,
        caches: list[KVCache] | None = None,
        step: Step | None = None,
        branches: Branches | None = None,
        below: Tensor | None = None,
    ) -> Tensor:
        """tokens (B, T) -> (B, T, C) after the final LayerNorm. With where (B, T) or (B, T-1), bool, only its N true
        positions, in reading order, (N, C): nothing that only the others need is computed; it may also be a table of
        flat positions b * T + t, (...) -> (..., C). caches and step serve `generate`: caches alone are filled with the
        whole sequence; with step, tokens (B, 1) are one new one a row. below (B, T, C): what the frozen blocks say, if
        that is known from `trunk`; a model that has none frozen doesn't look at it."""
        T = tokens.size(1)
        if T > self.config.block_size and branches is None:
            raise ValueError(f"sequence of {T} tokens is longer than block_size {self.config.block_size}")
        at = torch.arange(T, device=tokens.device) if step is None else step.positions[:, None]  # (T,) or (B, 1)
        visible = None
        if branches is not None:
            at, visible = branches.positions, branches.visible  # (B, T), (B, 1, T, T)
        known = below is not None and self.frozen
        x, start = (below, self.frozen) if known else (self.embed(tokens, at), 0)  # (B, T, C)
        turns, index = self.turns_at(at), flat_index(where, T)
        for i in range(start, len(self.h)):
            here = index if i + 1 == len(self.h) else None
            x = run_block(self.h[i], x, turns, caches[i] if caches else None, step, here, visible)
        return self.ln_f(x)

    @torch.no_grad()
    def trunk(self, tokens: Tensor, branches: Branches | None = None) -> Tensor:
        """What the frozen blocks make of tokens (B, T) -> (B, T, C): the same before, during and after training, and
        for all networks that have these blocks in common."""
        at = torch.arange(tokens.size(1), device=tokens.device) if branches is None else branches.positions
        x, turns = self.embed(tokens, at), self.turns_at(at)
        for block in self.h[: self.frozen]:
            x = block(x, turns, visible=None if branches is None else branches.visible)
        return x

    def embed(self, tokens: Tensor, at: Tensor) -> Tensor:
        """tokens (B, T) at positions `at` (T,), (B, T) or (B, 1) -> (B, T, C)."""
        x = self.wte(tokens)
        return F.dropout(x if self.config.rope_base else x + self.wpe(at), self.config.dropout, self.training)

    def turns_at(self, positions: Tensor) -> Tensor | None:
        """Rotary turns of positions (T,) or (B, T), for `Block`: (..., 1, D/2, 2), the same for all heads; None with
        learned positions."""
        return self.turns[positions].unsqueeze(-3) if self.config.rope_base else None

    def lm_head(self, hidden: Tensor) -> Tensor:
        """hidden (..., C) -> logits (..., V), by the transposed token embedding; never in less than float32: GPT-2's
        logits stand near -100, where bfloat16 numbers are 0.5 apart, and a probability ratio must be right to 0.001."""
        weight = self.output_weight[: self.config.real_vocab]  # (V, C)
        with torch.autocast(hidden.device.type, enabled=False):
            return F.linear(at_least_float32(hidden), at_least_float32(weight))

    def forward(
        self,
        tokens: Tensor,
        where: Tensor | None = None,
        branches: Branches | None = None,
        below: Tensor | None = None,
    ) -> Tensor:
        """tokens (B, T) -> logits (B, T, V) of the next token at every position; (N, V) at those of `where`."""
        return self.lm_head(self.hidden(tokens, where, branches=branches, below=below))


class ScalarModel(nn.Module):
    """A GPT whose output is one number a position: the reward model (read at the last real token) and the value model
    (read before every action). `mean` and `std` are the reward model's normalisation; they are buffers, so they are
    saved with it and hold wherever it scores, and a value model made from it starts in the same units.

    With config.expectation one more block stands between the GPT and the head, and is told at every token how strongly
    the GPT had expected it: the logit that the position before gave it. In a deep network the upper layers can look at
    what the lower ones predict; three layers can't, and learn from rankings who is polite but not who is right."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.gpt = GPT(config)
        if config.expectation:
            self.block, self.ln = Block(config), make_norm(config)
            init_weights(self.block, config)
            self.direction = nn.Parameter(0.1 * torch.randn(config.n_embd))  # (C,) where the logit is written
        self.head = nn.Linear(config.n_embd, 1)
        # std 1/sqrt(d+1): outputs of order one from a LayerNormed d-vector (Stiennon et al. 2020, arXiv:2009.01325)
        nn.init.normal_(self.head.weight, std=1 / math.sqrt(config.n_embd + 1))
        nn.init.zeros_(self.head.bias)
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("std", torch.ones(()))

    @classmethod
    def from_gpt(cls, gpt: GPT, expectation: bool = False) -> ScalarModel:
        """The GPT's body, copied, under a new head."""
        model = cls(replace(gpt.config, expectation=expectation)).to(gpt.device)
        model.gpt.load_state_dict(gpt.state_dict())
        return model

    def hidden(self, tokens: Tensor, where: Tensor | None, branches: Branches | None, below: Tensor | None) -> Tensor:
        """What the head reads: tokens (B, T) -> (B, T, C), or (N, C) at the positions of `where`."""
        if not self.config.expectation:
            return self.gpt.hidden(tokens, where, branches=branches, below=below)
        T = tokens.size(1)
        x = self.gpt.hidden(tokens, branches=branches, below=below)  # (B, T, C)
        before, at, visible = x[:, :-1], torch.arange(T, device=x.device), None
        if branches is not None:
            before = F.embedding(flat_before(branches)[:, 1:], x.flatten(0, 1))  # (B, T-1, C)
            at, visible = branches.positions, branches.visible
        read = F.embedding(tokens[:, 1:], self.gpt.output_weight)  # (B, T-1, C)
        logits = (before * read).sum(-1)  # (B, T-1) of tokens 1..T-1, each before it was read
        x = x + F.pad(logits, (1, 0))[..., None] * self.direction
        return self.ln(run_block(self.block, x, self.gpt.turns_at(at), None, None, flat_index(where, T), visible))

    def forward(
        self,
        tokens: Tensor,
        where: Tensor | None = None,
        branches: Branches | None = None,
        below: Tensor | None = None,
    ) -> Tensor:
        """tokens (B, T) -> (B, T) float32; (N,) at the positions of `where` alone, or in the shape of its table."""
        hidden = self.hidden(tokens, where, branches, below)  # (B, T, C) or (N, C)
        with torch.autocast(hidden.device.type, enabled=False):
            raw = self.head(at_least_float32(hidden)).squeeze(-1)  # (B, T) or (N,)
        return (raw - self.mean) / self.std

    def score(self, tokens: Tensor, lens: Tensor) -> Tensor:
        """tokens (B, T), lens (B,) -> (B,): the output at each row's last real token."""
        return self(tokens, F.one_hot(lens - 1, tokens.size(1)).bool())
