"""The network all stages share: a GPT-2 or a Llama, the scalar head of reward and value models, sampling, log-probs.

The frame. Every sequence is `prompt + completion (+ EOS) + filler`, padded on the right:

    index          0     1     2     3     4     5     6
    tokens        p0    p1    p2    a0    a1   EOS   fill      (B, T)
    logprobs[t] = log pi(tokens[t+1] | tokens[:t+1])            (B, T-1)
    action_mask    0     0     1     1     1     0              (B, T-1)   1 where tokens[t+1] was sampled, EOS included

Real tokens stand at positions 0..len-1 and attention is causal, so no real token ever sees filler: no attention mask,
no position trick, and what the filler ids are makes no difference. (One exception: where several completions of one
prompt are compared, they all stand behind it in one row, and the prompt is read once; see `Branches` in blocks.py.)

Shapes: B rows, T tokens, C channels (n_embd), H heads, D = C / H, V vocabulary, S cache slots.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn import functional as F

from blocks import Block, Branches, GPTConfig, KVCache, Step, at_least_float32, flat_before, flat_index
from blocks import init_weights, make_norm, rotary_turns, run_block

# -------------------------------------------------------------------------------- the network


class GPT(nn.Module):
    """GPT-2 (Radford et al. 2019): learned positions, pre-norm blocks, output tied to the token embedding; or Llama,
    see blocks.py. The parameters have GPT-2's own names (wte, wpe, h.0.ln_1, ...), so its weights import one to
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


# -------------------------------------------------------------------------------- log-probabilities


def select_logprobs(logits: Tensor, ids: Tensor, temperature: float = 1.0) -> Tensor:
    """log softmax(logits / temperature)[ids]: logits (..., V), ids (...) -> (...) float32."""
    logits = at_least_float32(logits)
    logits = logits if temperature == 1 else logits / temperature
    losses = F.cross_entropy(logits.reshape(-1, logits.size(-1)), ids.reshape(-1), reduction="none")
    return -losses.view(ids.shape)


def rows_at_a_time(tokens: Tensor, model: GPT) -> int:
    """Rows of tokens (B, T) to send through the model at once without gradients: about 64 million logits, 256 MB."""
    return max(1, 2**26 // (tokens.size(1) * model.config.vocab_size))


def put_back(found: Tensor, mask: Tensor) -> Tensor:
    """found (N,) at the N true places of mask (B, T), in reading order; 0 elsewhere -> (B, T)."""
    return torch.zeros(mask.shape, dtype=found.dtype, device=found.device).masked_scatter(mask, found)


def token_logprobs(
    model: GPT,
    tokens: Tensor,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    branches: Branches | None = None,
    below: Tensor | None = None,
) -> Tensor:
    """log pi(tokens[t+1] | tokens[:t+1]): tokens (B, T) -> (B, T-1) float32, at the sampling temperature. With mask (B,
    T-1) only where it is true, and 0 elsewhere: logits are what costs most. The one function for policy, old policy and
    reference. Without gradients it works through the rows in slices; with them, what is kept for the backward pass is
    the caller's business (--micro_batch). branches, below: see `GPT.hidden`."""
    mask = torch.ones_like(tokens[:, 1:], dtype=torch.bool) if mask is None else mask.bool()
    rows = len(tokens) if torch.is_grad_enabled() else rows_at_a_time(tokens, model)
    found = []  # (n,) each
    for first in range(0, len(tokens), rows):
        part, here = tokens[first : first + rows], mask[first : first + rows]
        known = None if below is None else below[first : first + rows]
        if branches is not None:
            grown = Branches(*(x[first : first + rows] for x in branches))
            logits = model(part, flat_before(grown)[:, 1:][here], grown, known)  # (n, V)
        elif isinstance(model, GPT):
            logits = model(part, here, below=known)  # (n, V)
        else:  # any other function from tokens to logits (b, T, V) will do too
            logits = model(part)[:, :-1][here]  # (n, V)
        found.append(select_logprobs(logits, part[:, 1:][here], temperature))
    return put_back(torch.cat(found), mask)


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
    logits: Tensor, uniforms: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> Tensor:
    """logits (B, V), uniforms (B,) in [0, 1) -> ids (B,). Temperature 0 takes the most likely token.

    The token at which the cumulative probability first exceeds the row's uniform number: an exact draw, from one random
    number a row instead of one for each word of the vocabulary."""
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
    cumulative = probs.cumsum(-1)
    target = uniforms[:, None] * cumulative[:, -1:]  # the last is 1, but for rounding and for what was cut off
    # right=True: the first place above the number, so that a token of probability 0 is never taken
    return torch.searchsorted(cumulative, target, right=True).squeeze(1)


def prefill(model: GPT, tokens: Tensor, lens: Tensor, caches: list[KVCache]) -> Tensor:
    """One pass over right-padded prompts, tokens (B, T), lens (B,), fills the caches -> logits (B, V) of what follows.
    Filler's keys land in slots behind the prompt, which are overwritten before anything looks at them."""
    return model.lm_head(model.hidden(tokens, F.one_hot(lens - 1, tokens.size(1)).bool(), caches))


def decode_one_token(model: GPT, last: Tensor, positions: Tensor, caches: list[KVCache]) -> Tensor:
    """Feed one token a row, last (B,) at its own positions (B,) -> logits (B, V) of the next."""
    B, G, S = last.size(0), model.config.n_kv_head, caches[0].kv.size(3)
    behind = torch.arange(S, device=last.device) > positions[:, None]  # (B, S)
    bias = caches[0].kv.new_zeros(B, G, S).masked_fill_(behind[:, None], -math.inf).view(B * G, 1, S)
    step = Step(torch.arange(B, device=last.device), positions, bias)
    return model.lm_head(model.hidden(last[:, None], None, caches, step)[:, 0])


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
    behind its own prompt. A prompt that occurs several times is read once. If the cache would exceed CACHE_NUMBERS, the
    rows go in slices. Raises ValueError if a prompt is empty or has no room for max_new_tokens within block_size."""
    if not prompts or not all(prompts):
        raise ValueError("generate needs at least one prompt, and no prompt may be empty")
    bad_cut = (top_k is not None and top_k < 1) or (top_p is not None and not 0 < top_p <= 1)
    if max_new_tokens < 1 or temperature < 0 or bad_cut:
        raise ValueError("generate needs max_new_tokens >= 1, temperature >= 0, top_k >= 1 and 0 < top_p <= 1")
    B, longest = len(prompts), max(map(len, prompts))
    S, c, device = longest + max_new_tokens, model.config, model.device
    if S > c.block_size:
        raise ValueError(f"{longest} prompt tokens and {max_new_tokens} new ones don't fit block_size {c.block_size}")
    fit = max(1, CACHE_NUMBERS // (c.numbers_cached * S))  # rows whose keys and values may exist at a time
    if fit < B:
        options = {"eos_id": eos_id, "temperature": temperature, "top_k": top_k, "top_p": top_p, "generator": generator}
        parts = [generate(model, prompts[i : i + fit], max_new_tokens, **options) for i in range(0, B, fit)]
        return join(parts, eos_id)
    number = {prompt: n for n, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}  # of each distinct prompt
    distinct = torch.full((len(number), S), eos_id)
    for prompt, n in number.items():
        distinct[n, : len(prompt)] = torch.tensor(prompt)
    distinct, distinct_lens = distinct.to(device), torch.tensor([len(p) for p in number], device=device)
    source = torch.tensor([number[tuple(p)] for p in prompts], device=device)  # (B,)
    tokens, prompt_lens = distinct[source], distinct_lens[source]  # (B, S), (B,)
    # one number a step for every row, also for those that will have left: what a row draws doesn't depend on the others
    uniforms = torch.zeros(max_new_tokens, B, device=device)
    if temperature:
        uniforms.uniform_(generator=generator)
    on_gpu = device.type == "cuda"
    training = model.training
    model.eval()  # dropout off
    try:
        # a GPU wants constant shapes; a CPU has less to do with a cache that grows 16 slots at a time
        slots = S if on_gpu else min(S, longest + 16)
        caches = [KVCache(len(number), slots, c, model.wte.weight) for _ in model.h]
        logits = prefill(model, distinct[:, :longest], distinct_lens, caches)[source]  # (B, V)
        if logits.isnan().any():
            raise ValueError("the model's logits are nan")
        if len(number) < B:
            for cache in caches:
                cache.keep(source)
        # the rows that are still computed, at first all of them; where each goes on; whether it does: (b,) each
        rows, positions = torch.arange(B, device=device), prompt_lens.clone()
        going = torch.ones(B, dtype=torch.bool, device=device)
        for step in range(max_new_tokens):
            drawn = uniforms[step] if len(rows) == B else uniforms[step, rows]
            # a row that has ended goes on with filler
            new = torch.where(going, sample_token(logits, drawn, temperature, top_k, top_p), eos_id)  # (b,)
            tokens[rows, positions] = new
            going &= new != eos_id
            # To look at `going` makes the CPU wait for the GPU, so there only every 8th step.
            if not on_gpu or step % 8 == 7:
                alive = int(going.sum())
                if alive == 0:
                    break
                if not on_gpu and alive <= 0.8 * len(rows):  # leave the rows that have ended behind
                    for cache in caches:
                        cache.keep(going)
                    rows, new, positions, going = (x[going] for x in (rows, new, positions, going))
            if step + 1 == max_new_tokens:
                break
            if longest + step >= caches[0].kv.size(3):
                for cache in caches:
                    cache.grow(min(16, S - cache.kv.size(3)))
            logits = decode_one_token(model, new, positions, caches)  # (b, V)
            positions += 1
    finally:
        model.train(training)
    stops = completion_mask(prompt_lens, prompt_lens + max_new_tokens, S) & (tokens == eos_id)  # (B, S) EOS and filler
    ended = stops.any(1)
    lens = torch.where(ended, stops.int().argmax(1) + 1, prompt_lens + max_new_tokens)
    return Rollout(tokens[:, : int(lens.max())], prompt_lens, lens, ended)
