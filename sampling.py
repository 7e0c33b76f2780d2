"""Sampling completions: the whole batch at once, a cache of keys and values, one token a row and step.

Shapes: B rows, S tokens in the longest of them, V vocabulary.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from frame import completion_mask
from frozen import cast_once
from model import GPT, GPTConfig, KVCache, at_least_float32


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


# -------------------------------------------------------------------------------- one token


def sample_token(
    logits: Tensor, uniforms: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> Tensor:
    """logits (B, V), uniforms (B,) in [0, 1) -> ids (B,). Temperature 0 takes the most likely token.

    It is the token at which the cumulative probability first exceeds the row's uniform number: an exact draw, from one
    random number a row instead of one for each word of the vocabulary."""
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


def prefill(model: GPT, tokens: Tensor, lens: Tensor, cache: KVCache) -> Tensor:
    """Read right-padded prompts, tokens (B, T), lens (B,), into the cache -> logits (B, V) of what follows each. Filler
    writes into slots behind its prompt, which are overwritten before anything looks at them."""
    return model(tokens, F.one_hot(lens - 1, tokens.size(1)).bool(), cache=cache)


def decode_one_token(model: GPT, last: Tensor, positions: Tensor, cache: KVCache) -> Tensor:
    """Read one token a row, last (B,) at its own positions (B,) -> logits (B, V) of the next."""
    return model(last[:, None], positions=positions[:, None], cache=cache)[:, 0]


# -------------------------------------------------------------------------------- whole completions


def read_once(prompts: list[list[int]], width: int, filler: int) -> tuple[Tensor, Tensor, Tensor]:
    """Each of the U distinct prompts once -> tokens (U, width), lens (U,), and the number of every prompt's, (B,)."""
    number = {prompt: n for n, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
    tokens = torch.full((len(number), width), filler)
    for prompt, n in number.items():
        tokens[n, : len(prompt)] = torch.tensor(prompt)
    return tokens, torch.tensor([len(p) for p in number]), torch.tensor([number[tuple(p)] for p in prompts])


@contextlib.contextmanager
def without_dropout(model: GPT) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


CACHE_NUMBERS = 2**29  # keys and values that `generate` holds at a time: 2 GiB in float32


def numbers_cached(config: GPTConfig) -> int:
    """Keys and values of one token, in all blocks."""
    return 2 * config.n_layer * config.n_kv_head * (config.n_embd // config.n_head)


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

    Prompts of unequal length need no left padding: they stand on the left, and each row's new tokens are written right
    behind its own prompt. If the cache would exceed CACHE_NUMBERS, the rows go in slices. Raises ValueError if a prompt
    is empty or has no room for max_new_tokens within block_size."""
    if not prompts or not all(prompts):
        raise ValueError("generate needs at least one prompt, and no prompt may be empty")
    bad_cut = (top_k is not None and top_k < 1) or (top_p is not None and not 0 < top_p <= 1)
    if max_new_tokens < 1 or temperature < 0 or bad_cut:
        raise ValueError("generate needs max_new_tokens >= 1, temperature >= 0, top_k >= 1 and 0 < top_p <= 1")
    B, longest, config, device = len(prompts), max(map(len, prompts)), model.config, model.device
    S = longest + max_new_tokens
    if S > config.block_size:
        raise ValueError(
            f"{longest} prompt tokens and {max_new_tokens} new ones don't fit block_size {config.block_size}"
        )
    fit = max(1, CACHE_NUMBERS // (numbers_cached(config) * S))  # rows whose keys and values may exist at a time
    if fit < B:
        options = {"eos_id": eos_id, "temperature": temperature, "top_k": top_k, "top_p": top_p, "generator": generator}
        parts = [generate(model, prompts[i : i + fit], max_new_tokens, **options) for i in range(0, B, fit)]
        return join(parts, eos_id)

    distinct, distinct_lens, source = (x.to(device) for x in read_once(prompts, S, eos_id))  # (U, S), (U,), (B,)
    tokens, prompt_lens = distinct[source], distinct_lens[source]  # (B, S), (B,)
    # One number a step for every row, also for those that will have left: what a row draws doesn't depend on others.
    uniforms = torch.zeros(max_new_tokens, B, device=device)
    if temperature:
        uniforms.uniform_(generator=generator)
    on_gpu = device.type == "cuda"
    with cast_once(model), without_dropout(model):
        # A GPU wants constant shapes; a CPU has less to do with a cache that grows 16 slots at a time.
        cache = KVCache(len(distinct), S if on_gpu else min(S, longest + 16), config, model.wte.weight)
        logits = prefill(model, distinct[:, :longest], distinct_lens, cache)[source]  # (B, V)
        if logits.isnan().any():
            raise ValueError("the model's logits are nan")
        if len(distinct) < B:
            cache.keep(source)
        # The rows that are still computed, at first all of them; where each goes on; whether it does: (b,) each.
        rows, positions = torch.arange(B, device=device), prompt_lens.clone()
        going = torch.ones(B, dtype=torch.bool, device=device)
        for step in range(max_new_tokens):
            new = sample_token(logits, uniforms[step, rows], temperature, top_k, top_p)  # (b,)
            new = torch.where(going, new, eos_id)  # a row that has ended goes on with filler
            tokens[rows, positions] = new
            going &= new != eos_id
            # To look at `going` makes the CPU wait for the GPU, so there only every 8th step.
            if not on_gpu or step % 8 == 7:
                alive = int(going.sum())
                if alive == 0:
                    break
                if not on_gpu and alive <= 0.8 * len(rows):  # leave the rows that have ended behind
                    cache.keep(going)
                    rows, new, positions, going = (x[going] for x in (rows, new, positions, going))
            if step + 1 == max_new_tokens:
                break
            if longest + step >= cache.slots:
                cache.grow(min(16, S - cache.slots))
            logits = decode_one_token(model, new, positions, cache)  # (b, V)
            positions += 1
    stops = completion_mask(prompt_lens, prompt_lens + max_new_tokens, S) & (tokens == eos_id)  # (B, S) EOS and filler
    ended = stops.any(1)
    lens = torch.where(ended, stops.int().argmax(1) + 1, prompt_lens + max_new_tokens)
    return Rollout(tokens[:, : int(lens.max())], prompt_lens, lens, ended)
