"""The network that all stages share: GPT-2 or Llama, and the scalar head of reward and value models.

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

# -------------------------------------------------------------------------------- configuration


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


# Llama's choices. It also needs a rope_base, and an n_inner of 8/3 n_embd for as many weights as GPT-2's MLP has.
LLAMA = {"norm": "rms", "mlp": "swiglu", "bias": "none"}


def at_least_float32(x: Tensor) -> Tensor:
    """bfloat16 and float16 become float32; float32 and float64 stay."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


# -------------------------------------------------------------------------------- positions
#
# Usually a row holds one text, at the positions 0, 1, 2, ... Where several completions of a prompt are compared, they
# stand behind it in one row, so that the prompt is read once:
#
#     tokens       p0  p1  a0  a1  b0  b1  b2  fill      (B, T)
#     positions     0   1   2   3   2   3   4   0        (B, T)
#
# Where positions do not go up, another completion starts. It sees the prompt and nothing of its neighbours.


def run_starts(positions: Tensor) -> tuple[Tensor, Tensor]:
    """positions (B, T) -> the column where each token's completion starts, and the position there, (B, T) each. The
    prompt and its first completion are one run, which starts at 0."""
    columns = torch.arange(positions.size(1), device=positions.device)
    starts = F.pad(positions[:, 1:] <= positions[:, :-1], (1, 0))  # (B, T)
    start = torch.where(starts, columns, 0).cummax(1).values  # (B, T)
    return start, positions.gather(1, start)


def mask_of(positions: Tensor, dtype: torch.dtype) -> Tensor:
    """positions (B, T) -> (B, 1, T, T), to be added to attention's scores: 0 at the columns that a token sees, which
    are the prompt's and those of its own completion up to itself; -inf at all others."""
    start, first = run_starts(positions)
    columns = torch.arange(positions.size(1), device=positions.device)
    own = (columns >= start[:, :, None]) & (columns <= columns[:, None])  # (B, T, T)
    seen = own | (columns < first[:, :, None])
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, -math.inf)[:, None]


def flat_before(positions: Tensor) -> Tensor:
    """positions (B, T) -> (B, T) flat place b * T + t of the token before each one in its own text (0 in row 0 for the
    first, which has none)."""
    B, T = positions.shape
    columns = torch.arange(T, device=positions.device)
    start, first = run_starts(positions)
    before = torch.where(columns == start, first, columns) - 1  # a completion's first token follows the prompt's last
    return before.clamp(min=0) + T * torch.arange(B, device=positions.device)[:, None]


def rotary_turns(config: GPTConfig) -> Tensor:
    """cos and sin of position * base^(-2j/D) for pair j of a head's channels: (block_size, D/2, 2)."""
    D = config.n_embd // config.n_head
    angles = torch.arange(config.block_size)[:, None] * config.rope_base ** (-torch.arange(0, D, 2) / D)
    return torch.stack([angles.cos(), angles.sin()], -1)


def rotate(x: Tensor, turns: Tensor) -> Tensor:
    """Rotary positions (Su et al. 2021, arXiv:2104.09864): channels 2j and 2j+1 of x (..., D) are one complex number,
    which is turned by its position's angle, turns (..., D/2, 2). So query times key depends on their distance alone.
    One complex product is the fastest way on a CPU."""
    if torch.compiler.is_compiling():
        return rotate_parts(x, turns)
    pairs = torch.view_as_complex(at_least_float32(x).unflatten(-1, (-1, 2)))  # (..., D/2)
    return torch.view_as_real(pairs * torch.view_as_complex(at_least_float32(turns))).flatten(-2).to(x.dtype)


def rotate_parts(x: Tensor, turns: Tensor) -> Tensor:
    """The same in real numbers: torch.compile knows no complex ones."""
    (a, b), (cos, sin) = at_least_float32(x).unflatten(-1, (-1, 2)).unbind(-1), at_least_float32(turns).unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2).to(x.dtype)


def flat_index(where: Tensor | None, T: int) -> Tensor | None:
    """The N true places of where (B, T) or (B, T-1) in rows of T tokens -> (N,) flat places b * T + t, in reading
    order. A table of flat places stays what it is."""
    if where is None or where.dtype != torch.bool:
        return where
    rows, columns = where.nonzero(as_tuple=True)  # (N,) each
    return rows * T + columns


def pick(x: Tensor, index: Tensor | None) -> Tensor:
    """x (B, T, C) at flat places (...) -> (..., C); all of it without an index. `embedding` is x.flatten(0, 1)[index]
    with a faster backward pass."""
    return x if index is None else F.embedding(index, x.flatten(0, 1))


# -------------------------------------------------------------------------------- attention and its cache


class View(NamedTuple):
    """What every block of a forward pass needs to know of positions."""

    positions: Tensor  # (B or 1, T)
    turns: Tensor | None  # (B or 1, T, 1, D/2, 2) rotary turns; None with learned positions
    mask: Tensor | None  # (B or 1, 1, T, T or S) to be added to the scores; None: a token sees all before it


class KVCache:
    """Keys and values of all tokens so far: for each block (2, B, G, S, D), in the dtype in which they are computed.
    The slot of a token is its position."""

    def __init__(self, batch: int, slots: int, config: GPTConfig, like: Tensor):
        kind = like.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else like.dtype
        shape = (2, batch, config.n_kv_head, slots, config.n_embd // config.n_head)
        self.kv = [like.new_zeros(shape, dtype=dtype) for _ in range(config.n_layer)]
        self.slots = slots

    def mask(self, positions: Tensor) -> Tensor:
        """positions (B, T) of new tokens -> (B, 1, T, S): 0 at the slots up to each, -inf behind it."""
        behind = torch.arange(self.slots, device=positions.device) > positions[:, None, :, None]
        return torch.zeros(behind.shape, dtype=self.kv[0].dtype, device=behind.device).masked_fill_(behind, -math.inf)

    def keep(self, rows: Tensor) -> None:
        """Rows (b,), numbers or a mask, in the place of all: fewer, or one of them several times."""
        self.kv = [kv[:, rows] for kv in self.kv]

    def grow(self, slots: int) -> None:
        """`slots` more, empty."""
        self.kv = [F.pad(kv, (0, 0, 0, slots)) for kv in self.kv]
        self.slots += slots


class Attention(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head, self.n_kv_head = config.n_head, config.n_kv_head
        self.dropout = config.dropout
        width = (config.n_head + 2 * config.n_kv_head) * (config.n_embd // config.n_head)
        self.c_attn = nn.Linear(config.n_embd, width, bias=config.bias != "none")
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias == "all")

    def forward(self, x: Tensor, view: View, kv: Tensor | None = None, index: Tensor | None = None) -> Tensor:
        """x (B, T, C) -> (B, T, C), or (..., C) at the flat places of index (...). kv (2, B, G, S, D): one block's
        part of a cache; the new tokens are written into it, and what they see is read from it."""
        B, T, C = x.shape
        H, G = self.n_head, self.n_kv_head
        qk, v = self.c_attn(x).view(B, T, H + 2 * G, C // H).split([H + G, G], 2)  # (B, T, H + G, D), (B, T, G, D)
        q, k = (qk if view.turns is None else rotate(qk, view.turns)).split([H, G], 2)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))  # (B, H, T, D), (B, G, T, D), (B, G, T, D)
        if kv is not None:
            rows = torch.arange(B, device=x.device)[:, None]
            kv[:, rows, :, view.positions] = torch.stack([k, v]).permute(1, 3, 0, 2, 4).to(kv.dtype)  # (B, T, 2, G, D)
            k, v = kv  # (B, G, S, D) each
        k, v = (part.repeat_interleave(H // G, 1) if G < H else part for part in (k, v))
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, view.mask, dropout, is_causal=view.mask is None)
        # From here on every token is on its own, so only those asked for are computed.
        y = pick(y.transpose(1, 2).reshape(B, T, C), index)
        return F.dropout(self.c_proj(y), self.dropout, self.training)


# -------------------------------------------------------------------------------- the block


def make_norm(config: GPTConfig) -> nn.Module:
    """x - mean(x) over std(x), times a weight, plus a bias; "rms": x over its root mean square, times a weight."""
    return (nn.LayerNorm if config.norm == "layer" else nn.RMSNorm)(config.n_embd, eps=config.norm_eps)


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


class Block(nn.Module):
    recompute = False  # --recompute

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1 = make_norm(config)
        self.attn = Attention(config)
        self.ln_2 = make_norm(config)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, view: View, kv: Tensor | None = None, index: Tensor | None = None) -> Tensor:
        """x (B, T, C) -> (B, T, C), or (..., C) at the flat places of index (...)."""
        x = self.attn(self.ln_1(x), view, kv, index) + pick(x, index)
        return x + self.mlp(self.ln_2(x))


def run_block(block: Block, x: Tensor, view: View, kv: Tensor | None = None, index: Tensor | None = None) -> Tensor:
    """block(x, view, kv, index). With block.recompute the backward pass computes again what the block computed inside
    (Chen et al. 2016, arXiv:1604.06174): a fraction of the memory, a third more time, the same gradients."""
    if block.recompute and torch.is_grad_enabled():
        return checkpoint(block, x, view, kv, index, use_reentrant=False)
    return block(x, view, kv, index)


def init_weights(module: nn.Module, config: GPTConfig) -> None:
    """GPT-2's N(0, 0.02) is for 768 channels; scaled so that activations have the same size at any width, and less
    where a residual branch ends, so that depth adds no variance."""
    for name, p in module.named_parameters():
        if p.dim() == 2:
            std = 0.02 * math.sqrt(768 / config.n_embd)
            nn.init.normal_(p, std=std / math.sqrt(2 * config.n_layer) if name.endswith("c_proj.weight") else std)
        elif name.endswith("bias"):
            nn.init.zeros_(p)


# -------------------------------------------------------------------------------- the language model


class GPT(nn.Module):
    """GPT-2 (Radford et al. 2019): learned positions, pre-norm blocks, output tied to the token embedding; or Llama.
    The parameters have GPT-2's own names (wte, wpe, h.0.ln_1, ...), so its weights import one to one."""

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
        self.frozen = 0  # lowest blocks that never change and that other networks have in common: see frozen.py
        init_weights(self, config)

    @property
    def device(self) -> torch.device:
        return self.wte.weight.device

    @property
    def output_weight(self) -> Tensor:
        """(V, C)"""
        return (self.wte if self.config.tied else self.unembedding).weight

    def view(self, tokens: Tensor, positions: Tensor | None = None, cache: KVCache | None = None) -> View:
        """What the blocks need to know of tokens (B, T), at positions (B, T) or, if None, at 0..T-1."""
        T = tokens.size(1)
        if positions is None and T > self.config.block_size:
            raise ValueError(f"sequence of {T} tokens is longer than block_size {self.config.block_size}")
        at = torch.arange(T, device=tokens.device)[None] if positions is None else positions  # (B or 1, T)
        turns = self.turns[at][:, :, None] if self.config.rope_base else None  # the same for all heads
        if cache is not None:
            return View(at, turns, cache.mask(at))
        return View(at, turns, None if positions is None else mask_of(at, self.wte.weight.dtype))

    def embed(self, tokens: Tensor, view: View) -> Tensor:
        """tokens (B, T) -> (B, T, C), what the lowest block reads."""
        x = self.wte(tokens) if self.config.rope_base else self.wte(tokens) + self.wpe(view.positions)
        return F.dropout(x, self.config.dropout, self.training)

    def hidden(
        self,
        tokens: Tensor,
        where: Tensor | None = None,
        positions: Tensor | None = None,
        cache: KVCache | None = None,
        below: Tensor | None = None,
    ) -> Tensor:
        """tokens (B, T) -> (B, T, C) after the final norm.

        where      (B, T) or (B, T-1) bool: only at its N true places, in reading order, (N, C). What only the other
                   places need is not computed. A table of flat places b * T + t, (...), gives (..., C)
        positions  (B, T): not 0..T-1 in every row: several completions a row, or new tokens behind a cache
        cache      keys and values of earlier tokens; those of these tokens are added
        below      (B, T, C): what the frozen blocks make of the tokens, if that is known (frozen.trunk); ignored
                   without frozen blocks"""
        view = self.view(tokens, positions, cache)
        start = self.frozen if below is not None else 0
        x = below if start else self.embed(tokens, view)  # (B, T, C)
        index = flat_index(where, tokens.size(1))
        for i in range(start, len(self.h)):
            kv = None if cache is None else cache.kv[i]
            x = run_block(self.h[i], x, view, kv, index if i + 1 == len(self.h) else None)
        return self.ln_f(x)

    def lm_head(self, hidden: Tensor) -> Tensor:
        """hidden (..., C) -> logits (..., V), by the transposed token embedding; never in bfloat16, whose numbers are
        0.5 apart near -100, where GPT-2's logits stand. (A GPU may take TensorFloat-32: three digits a factor.)"""
        weight = self.output_weight[: self.config.real_vocab]  # (V, C)
        with torch.autocast(hidden.device.type, enabled=False):
            return F.linear(at_least_float32(hidden), at_least_float32(weight))

    def forward(
        self,
        tokens: Tensor,
        where: Tensor | None = None,
        positions: Tensor | None = None,
        cache: KVCache | None = None,
        below: Tensor | None = None,
    ) -> Tensor:
        """tokens (B, T) -> logits (B, T, V) of the next token at every place; (N, V) at those of `where`. The arguments
        are those of `hidden`."""
        return self.lm_head(self.hidden(tokens, where, positions, cache, below))


# -------------------------------------------------------------------------------- reward and value models


class ScalarModel(nn.Module):
    """A GPT whose output is one number a token: the reward model (read at the last real token) and the value model
    (read before every action). `mean` and `std` are the reward model's normalisation. As buffers they are saved with it
    and hold wherever it scores, and a value model made from it starts in the same units.

    With expectation, one more block stands between the GPT and the head. It reads how strongly the GPT had expected
    each token: the logit that the token had at the place before it. In a deep network the upper layers can look at what
    the lower ones predict. Three layers can't, and learn from rankings who is polite but not who is right."""

    def __init__(self, config: GPTConfig, expectation: bool = False):
        super().__init__()
        self.config, self.expectation = config, expectation
        self.gpt = GPT(config)
        if expectation:
            self.block, self.ln = Block(config), make_norm(config)
            init_weights(self.block, config)
            self.direction = nn.Parameter(0.1 * torch.randn(config.n_embd))  # (C,) along which the logit is written
        self.head = nn.Linear(config.n_embd, 1)
        # std 1/sqrt(d+1): outputs of order one from a LayerNormed d-vector (Stiennon et al. 2020, arXiv:2009.01325)
        nn.init.normal_(self.head.weight, std=1 / math.sqrt(config.n_embd + 1))
        nn.init.zeros_(self.head.bias)
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("std", torch.ones(()))

    @classmethod
    def from_gpt(cls, gpt: GPT, expectation: bool = False) -> ScalarModel:
        """The GPT's body, copied, under a new head."""
        model = cls(gpt.config, expectation).to(gpt.device)
        model.gpt.load_state_dict(gpt.state_dict())
        return model

    def hidden(
        self, tokens: Tensor, where: Tensor | None = None, positions: Tensor | None = None, below: Tensor | None = None
    ) -> Tensor:
        """What the head reads: tokens (B, T) -> (B, T, C), or (..., C) at the places of `where`."""
        if not self.expectation:
            return self.gpt.hidden(tokens, where, positions, below=below)
        x = self.gpt.hidden(tokens, None, positions, below=below)  # (B, T, C)
        before = x[:, :-1] if positions is None else pick(x, flat_before(positions)[:, 1:])  # (B, T-1, C)
        read = F.embedding(tokens[:, 1:], self.gpt.output_weight)  # (B, T-1, C)
        logits = (before * read).sum(-1)  # (B, T-1) of tokens 1..T-1, each at the place before it
        x = x + F.pad(logits, (1, 0))[..., None] * self.direction
        index = flat_index(where, tokens.size(1))
        return self.ln(run_block(self.block, x, self.gpt.view(tokens, positions), index=index))

    def forward(
        self, tokens: Tensor, where: Tensor | None = None, positions: Tensor | None = None, below: Tensor | None = None
    ) -> Tensor:
        """tokens (B, T) -> (B, T) float32; (N,) at the N true places of `where`, or in the shape of its table. The
        arguments are those of `GPT.hidden`."""
        hidden = self.hidden(tokens, where, positions, below)  # (B, T, C) or (..., C)
        with torch.autocast(hidden.device.type, enabled=False):
            raw = self.head(at_least_float32(hidden)).squeeze(-1)  # (B, T) or (...)
        return (raw - self.mean) / self.std

    def score(self, tokens: Tensor, lens: Tensor) -> Tensor:
        """tokens (B, T), lens (B,) -> (B,): the output at each row's last real token."""
        return self(tokens, F.one_hot(lens - 1, tokens.size(1)).bool())
