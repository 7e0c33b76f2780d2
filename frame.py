"""The frame."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from model import Branches, GPT, at_least_float32, flat_before


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
