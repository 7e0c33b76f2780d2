"""The network all stages share: a GPT-2, the scalar head of reward and value models, sampling, token log-probabilities.

The frame. Every sequence is `prompt + completion (+ EOS) + filler`, padded on the right:

    index          0     1     2     3     4     5     6
    tokens        p0    p1    p2    a0    a1   EOS   fill      (B, T)
    logprobs[t] = log pi(tokens[t+1] | tokens[:t+1])            (B, T-1)
    action_mask    0     0     1     1     1     0              (B, T-1)   1 where tokens[t+1] was sampled, EOS included

Real tokens stand at positions 0..len-1 and attention is causal, so no real token ever sees filler: no attention mask,
no position trick, and what the filler ids are makes no difference.

Shapes: B rows, T tokens, C channels (n_embd), H heads, D = C / H, V vocabulary, S cache slots.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn import functional as F

# -------------------------------------------------------------------------------- the network


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

    def __post_init__(self):
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} is not a multiple of n_head {self.n_head}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), not {self.dropout}")


class KVCache:
    """Keys and values of one layer for a batch of rows: (B, H, S, D) each, allocated once."""

    def __init__(self, batch: int, slots: int, config: GPTConfig, like: Tensor):
        shape = (batch, config.n_head, slots, config.n_embd // config.n_head)
        self.k = torch.zeros(shape, device=like.device, dtype=like.dtype)
        self.v = torch.zeros(shape, device=like.device, dtype=like.dtype)

    def write(self, k: Tensor, v: Tensor, positions: Tensor | None, span: int) -> tuple[Tensor, Tensor]:
        """k, v (B, H, T, D) of positions 0..T-1, or (B, H, 1, D) at each row's own of positions (B,) -> the keys and
        values to look at: those given, or the first `span` slots."""
        if positions is None:
            self.k[:, :, : k.size(2)], self.v[:, :, : v.size(2)] = k, v
            return k, v
        rows = torch.arange(k.size(0), device=k.device)
        self.k[rows, :, positions] = k[:, :, 0].to(self.k.dtype)
        self.v[rows, :, positions] = v[:, :, 0].to(self.v.dtype)
        return self.k[:, :, :span].to(k.dtype), self.v[:, :, :span].to(v.dtype)


class Attention(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(
        self, x: Tensor, cache: KVCache | None = None, positions: Tensor | None = None, visible: Tensor | None = None
    ) -> Tensor:
        B, T, C = x.shape
        q, k, v = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)  # 3 x (B, H, T, D)
        if cache is not None:
            k, v = cache.write(k, v, positions, visible.size(-1) if visible is not None else T)
        # visible (B, 1, 1, S') is True on slots 0..position of the one new token a row; else whole sequences, causal
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, is_causal=visible is None, dropout_p=dropout)
        return F.dropout(self.c_proj(y.transpose(1, 2).reshape(B, T, C)), self.dropout, self.training)


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
        self, x: Tensor, cache: KVCache | None = None, positions: Tensor | None = None, visible: Tensor | None = None
    ) -> Tensor:
        x = x + self.attn(self.ln_1(x), cache, positions, visible)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """GPT-2 (Radford et al. 2019): learned positions, pre-norm blocks, output tied to the token embedding. The
    parameters have GPT-2's own names (wte, wpe, h.0.ln_1, ...), so its weights import one to one."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                # GPT-2's N(0, 0.02) is for 768 channels; scaled so that activations have the same size at any width,
                # and less where a residual branch ends, so that depth adds no variance.
                std = 0.02 * math.sqrt(768 / config.n_embd)
                nn.init.normal_(p, std=std / math.sqrt(2 * config.n_layer) if name.endswith("c_proj.weight") else std)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    @property
    def device(self) -> torch.device:
        return self.wte.weight.device

    def hidden(
        self,
        tokens: Tensor,
        caches: list[KVCache] | None = None,
        positions: Tensor | None = None,
        visible: Tensor | None = None,
    ) -> Tensor:
        """tokens (B, T) -> (B, T, C) after the final LayerNorm. The other arguments serve `generate`: with `caches`
        alone the whole sequence fills them; with positions (B,) too, tokens (B, 1) stand at those positions."""
        T = tokens.size(1)
        if T > self.config.block_size:
            raise ValueError(f"sequence of {T} tokens is longer than block_size {self.config.block_size}")
        where = torch.arange(T, device=tokens.device) if positions is None else positions[:, None]  # (T,) or (B, 1)
        x = F.dropout(self.wte(tokens) + self.wpe(where), self.config.dropout, self.training)  # (B, T, C)
        for i, block in enumerate(self.h):
            x = block(x, caches[i] if caches else None, positions, visible)
        return self.ln_f(x)

    def lm_head(self, hidden: Tensor) -> Tensor:
        """hidden (..., C) -> logits (..., V), by the transposed token embedding; never in less than float32: GPT-2's
        logits stand near -100, where bfloat16 numbers are 0.5 apart, and a probability ratio must be right to 0.001."""
        with torch.autocast(hidden.device.type, enabled=False):
            return F.linear(at_least_float32(hidden), at_least_float32(self.wte.weight[: self.config.real_vocab]))

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (B, T) -> logits (B, T, V) of the next token at every position."""
        return self.lm_head(self.hidden(tokens))


class ScalarModel(nn.Module):
    """A GPT whose output is one number a position: the reward model (read at the last real token) and the value model
    (read before every action). `mean` and `std` are the reward model's normalisation; they are buffers, so they are
    saved with it and hold wherever it scores, and a value model made from it starts in the same units."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.gpt = GPT(config)
        self.head = nn.Linear(config.n_embd, 1)
        # std 1/sqrt(d+1): outputs of order one from a LayerNormed d-vector (Stiennon et al. 2020, arXiv:2009.01325)
        nn.init.normal_(self.head.weight, std=1 / math.sqrt(config.n_embd + 1))
        nn.init.zeros_(self.head.bias)
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("std", torch.ones(()))

    @classmethod
    def from_gpt(cls, gpt: GPT) -> ScalarModel:
        """The GPT's body, copied, under a new head."""
        model = cls(gpt.config).to(gpt.device)
        model.gpt.load_state_dict(gpt.state_dict())
        return model

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (B, T) -> (B, T) float32."""
        hidden = self.gpt.hidden(tokens)  # (B, T, C)
        with torch.autocast(hidden.device.type, enabled=False):
            raw = self.head(at_least_float32(hidden)).squeeze(-1)  # (B, T)
        return (raw - self.mean) / self.std

    def score(self, tokens: Tensor, lens: Tensor) -> Tensor:
        """tokens (B, T), lens (B,) -> (B,): the output at each row's last real token."""
        return self(tokens).gather(1, lens[:, None] - 1).squeeze(1)


# -------------------------------------------------------------------------------- log-probabilities


def select_logprobs(logits: Tensor, ids: Tensor, temperature: float = 1.0) -> Tensor:
    """log softmax(logits / temperature)[ids]: logits (..., V), ids (...) -> (...) float32. As logit minus log-sum-exp,
    so that the full log-softmax is never stored beside the logits."""
    logits = at_least_float32(logits) / temperature
    return logits.gather(-1, ids[..., None]).squeeze(-1) - logits.logsumexp(-1)


def rows_at_a_time(tokens: Tensor, model: GPT) -> int:
    """Rows of tokens (B, T) to send through the model at once without gradients: about 64 million logits, 256 MB."""
    return max(1, 2**26 // (tokens.size(1) * model.config.vocab_size))


def token_logprobs(model: GPT, tokens: Tensor, temperature: float = 1.0) -> Tensor:
    """log pi(tokens[t+1] | tokens[:t+1]): tokens (B, T) -> (B, T-1) float32, at the sampling temperature. The one
    function for policy, old policy and reference. Without gradients it works through the rows in slices; with them,
    what is kept for the backward pass is the caller's business (--micro_batch)."""
    rows = len(tokens) if torch.is_grad_enabled() else rows_at_a_time(tokens, model)
    return torch.cat([select_logprobs(model(part)[:, :-1], part[:, 1:], temperature) for part in tokens.split(rows)])


# -------------------------------------------------------------------------------- masked statistics


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of x where mask is 1. `where`, not a product: a masked inf or nan must not leak (0 * inf is nan)."""
    mask = mask.bool()
    return torch.where(mask, x, 0.0).sum() / mask.sum().clamp(min=1)


def whiten(x: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """Scale the masked entries to (biased) variance 1 and, unless shift_mean is False, mean 0; 0 where masked out."""
    mean = masked_mean(x, mask)
    variance = masked_mean((x - mean) ** 2, mask)
    white = (x - mean) * torch.rsqrt(variance + 1e-8)
    return torch.where(mask.bool(), white if shift_mean else white + mean, 0.0)


def completion_mask(prompt_lens: Tensor, lens: Tensor, T: int) -> Tensor:
    """(B, T) bool, True on completion tokens (EOS included): positions prompt_len .. len-1. Built from lengths, never
    from ids: the filler may be the EOS id, and a mask that hides EOS never teaches a model to stop. The action mask of
    the frame is this mask shifted by one: completion_mask(...)[:, 1:]."""
    where = torch.arange(T, device=lens.device)
    return (where >= prompt_lens[:, None]) & (where < lens[:, None])


# -------------------------------------------------------------------------------- sampling


@dataclass
class Rollout:
    tokens: Tensor  # (B, S) prompt, completion, then eos_id as filler; S is the longest row's length
    prompt_lens: Tensor  # (B,)
    lens: Tensor  # (B,) prompt and completion, EOS included where it was sampled
    ended: Tensor  # (B,) bool: EOS was sampled; False is a completion that was cut

    @property
    def action_mask(self) -> Tensor:
        """(B, S-1) bool, True where tokens[t+1] was sampled."""
        return completion_mask(self.prompt_lens, self.lens, self.tokens.size(1))[:, 1:]

    def completions(self) -> list[list[int]]:
        """Ids of each completion without its EOS."""
        rows = zip(*(x.tolist() for x in (self.tokens, self.prompt_lens, self.lens, self.ended)), strict=True)
        return [tokens[start : end - stop] for tokens, start, end, stop in rows]


def join(rollouts: list[Rollout], filler: int) -> Rollout:
    """Several rollouts as one, as wide as the widest."""
    S = max(r.tokens.size(1) for r in rollouts)
    tokens = torch.cat([F.pad(r.tokens, (0, S - r.tokens.size(1)), value=filler) for r in rollouts])
    rest = [torch.cat([getattr(r, name) for r in rollouts]) for name in ("prompt_lens", "lens", "ended")]
    return Rollout(tokens, *rest)


def sample_token(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator | None
) -> Tensor:
    """logits (B, V) -> ids (B,). Temperature 0 takes the most likely token."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = at_least_float32(logits) / temperature
    if top_k is not None:
        best = logits.topk(min(top_k, logits.size(-1)))  # by place, not by value: a tie must not let a k+1st token in
        logits = torch.full_like(logits, -math.inf).scatter(-1, best.indices, best.values)
    probs = logits.softmax(-1)  # (B, V)
    if top_p is not None:  # keep the smallest set of tokens whose probability reaches top_p
        ranked, order = probs.sort(-1, descending=True)
        ranked[ranked.cumsum(-1) - ranked >= top_p] = 0.0  # the probability of all better tokens already reaches it
        probs = torch.zeros_like(probs).scatter(-1, order, ranked)
    return torch.multinomial(probs, 1, generator=generator).squeeze(1)


def prefill(model: GPT, tokens: Tensor, lens: Tensor, caches: list[KVCache]) -> Tensor:
    """One pass over right-padded prompts, tokens (B, T), lens (B,), fills the caches -> logits (B, V) of what follows.
    Filler's keys land in slots behind the prompt, which are overwritten before anything looks at them."""
    hidden = model.hidden(tokens, caches)  # (B, T, C)
    return model.lm_head(hidden[torch.arange(len(lens), device=lens.device), lens - 1])


def decode_one_token(model: GPT, last: Tensor, positions: Tensor, caches: list[KVCache], span: int) -> Tensor:
    """Feed one token a row, last (B,) at its own positions (B,) -> logits (B, V) of the next. span: slots looked at."""
    visible = torch.arange(span, device=last.device) <= positions[:, None]  # (B, span)
    hidden = model.hidden(last[:, None], caches, positions, visible[:, None, None])  # (B, 1, C)
    return model.lm_head(hidden[:, 0])


CACHE_NUMBERS = 2**29  # keys and values that `generate` holds at a time: 2 GiB in float32


@torch.no_grad()
def generate(
    model: GPT,
    prompts: list[list[int]],
    max_new_tokens: int,
    *,
    eos_id: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Rollout:
    """Sample a completion of every prompt, the whole batch at once; a row stops at EOS, the loop when all rows have.

    Prompts of unequal length need no left padding: they stand on the left, each row's new tokens are written right
    behind its own prompt, and the cache slot of a token is its position. If the cache would exceed CACHE_NUMBERS, the
    rows go in slices. Raises ValueError if a prompt is empty or has no room for max_new_tokens within block_size."""
    if not prompts or not all(prompts):
        raise ValueError("generate needs at least one prompt, and no prompt may be empty")
    bad_cut = (top_k is not None and top_k < 1) or (top_p is not None and not 0 < top_p <= 1)
    if max_new_tokens < 1 or temperature < 0 or bad_cut:
        raise ValueError("generate needs max_new_tokens >= 1, temperature >= 0, top_k >= 1 and 0 < top_p <= 1")
    B, longest = len(prompts), max(map(len, prompts))
    S, c = longest + max_new_tokens, model.config
    if S > c.block_size:
        raise ValueError(f"{longest} prompt tokens and {max_new_tokens} new ones don't fit block_size {c.block_size}")
    fit = max(1, CACHE_NUMBERS // (2 * c.n_layer * c.n_embd * S))  # rows whose keys and values may exist at a time
    if fit < B:
        options = {"eos_id": eos_id, "temperature": temperature, "top_k": top_k, "top_p": top_p, "generator": generator}
        parts = [generate(model, prompts[i : i + fit], max_new_tokens, **options) for i in range(0, B, fit)]
        return join(parts, eos_id)
    tokens = torch.full((B, S), eos_id, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = torch.tensor(prompt)
    tokens = tokens.to(model.device)
    prompt_lens = torch.tensor([len(p) for p in prompts], device=model.device)  # (B,)
    lens = prompt_lens.clone()  # (B,) grows by one a step for the rows that go on
    ended = torch.zeros(B, dtype=torch.bool, device=model.device)
    rows = torch.arange(B, device=model.device)  # (b,) the rows still computed: all of them at first
    on_gpu = model.device.type == "cuda"
    training = model.training
    model.eval()  # dropout off
    try:
        caches = [KVCache(B, S, c, model.wte.weight) for _ in model.h]
        logits = prefill(model, tokens[:, :longest], lens, caches)  # (B, V)
        for step in range(1, max_new_tokens + 1):
            new = sample_token(logits, temperature, top_k, top_p, generator)  # (b,)
            going = ~ended[rows]
            # lens is where the next token goes; a row that has ended writes what stands there already
            places = lens[rows].clamp(max=S - 1)
            tokens[rows, places] = torch.where(going, new, tokens[rows, places])
            lens[rows] += going.long()
            ended[rows] |= new == eos_id
            if step == max_new_tokens:
                break
            # To look at `ended` makes the CPU wait for the GPU, so there only every 8th step.
            if not on_gpu or step % 8 == 0:
                going = ~ended[rows]
                alive = int(going.sum())
                if alive == 0:
                    break
                if not on_gpu and alive <= len(rows) // 2:  # leave the rows that have ended behind
                    rows = rows[going]
                    for cache in caches:
                        cache.k, cache.v = cache.k[going], cache.v[going]
            positions = lens[rows] - 1  # (b,) of the token sampled last; a row that has ended rewrites its last slot
            span = S if on_gpu else longest + step  # a GPU wants constant shapes, a CPU less work
            logits = decode_one_token(model, tokens[rows, positions], positions, caches, span)  # (b, V)
    finally:
        model.train(training)
    return Rollout(tokens[:, : int(lens.max())], prompt_lens, lens, ended)
