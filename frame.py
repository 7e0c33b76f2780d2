"""The frame that all tensors of this project share, and the log-probabilities and means that live in it.

Every sequence is `prompt + completion (+ EOS) + filler`, padded on the right:

    index          0     1     2     3     4     5     6
    tokens        p0    p1    p2    a0    a1   EOS   fill      (B, T)
    logprobs[t] = log pi(tokens[t+1] | tokens[:t+1])            (B, T-1)
    values[t]   = V(tokens[:t+1]), the value before the action  (B, T-1)
    action_mask    0     0     1     1     1     0              (B, T-1)   1 where tokens[t+1] was sampled, EOS included

Real tokens stand at positions 0..len-1 and attention is causal, so no real token ever sees filler. There is no
attention mask for it, no shifted position, and the ids of the filler make no difference.

Shapes: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from model import GPT, at_least_float32, flat_index

# -------------------------------------------------------------------------------- masks and places


def completion_mask(prompt_lens: Tensor, lens: Tensor, T: int) -> Tensor:
    """(B, T) bool, True on completion tokens (EOS included): positions prompt_len .. len-1. Built from lengths, never
    from ids: the filler may be the EOS id, and a mask that hides EOS never teaches a model to stop. The action mask of
    the frame is this mask shifted by one: completion_mask(...)[:, 1:]."""
    where = torch.arange(T, device=lens.device)
    return (where >= prompt_lens[:, None]) & (where < lens[:, None])


def put_back(found: Tensor, mask: Tensor) -> Tensor:
    """found (N,) at the N true places of mask (B, T), in reading order; 0 elsewhere -> (B, T)."""
    return torch.zeros(mask.shape, dtype=found.dtype, device=found.device).masked_scatter(mask, found)


def at_last_action(scores: Tensor, action_mask: Tensor) -> Tensor:
    """A score for each completion, (B,), in the frame: at its last action, which is the EOS or the last token of a cut
    completion; 0 elsewhere -> (B, T-1). ValueError if a row has no action."""
    slots = torch.arange(action_mask.size(1), device=action_mask.device)
    last = torch.where(action_mask.bool(), slots, -1).amax(1)  # (B,)
    if (last < 0).any():
        raise ValueError("at_last_action: a row has no action; where should its score go?")
    return F.one_hot(last, action_mask.size(1)) * scores[:, None]


# -------------------------------------------------------------------------------- log-probabilities


def select_logprobs(logits: Tensor, ids: Tensor, temperature: float = 1.0) -> Tensor:
    """log softmax(logits / temperature)[ids]: logits (..., V), ids (...) -> (...) float32."""
    logits = at_least_float32(logits)
    logits = logits if temperature == 1 else logits / temperature
    losses = F.cross_entropy(logits.reshape(-1, logits.size(-1)), ids.reshape(-1), reduction="none")
    return -losses.view(ids.shape)


def action_logprobs(
    logits: Tensor, tokens: Tensor, action_mask: Tensor, temperature: float = 1.0, places: Tensor | None = None
) -> Tensor:
    """Log-probs of the actions: logits (N, V) at the N places of action_mask (B, T-1), tokens (B, T) -> (B, T-1), 0
    where masked out. The one function for measuring a rollout and for the update, so that the first ratio is 1.
    places (N,): flat_index(action_mask, T), where it is known: to find it, the CPU waits for a GPU."""
    places = flat_index(action_mask, tokens.size(1)) if places is None else places  # (N,)
    actions = tokens.flatten()[places + 1]  # (N,) places b * T + t predict the token at t + 1
    return put_back(select_logprobs(logits, actions, temperature), action_mask)


def rows_at_a_time(tokens: Tensor, model: GPT) -> int:
    """Rows of tokens (B, T) to send through the model at once without gradients: about 64 million logits, 256 MB."""
    return max(1, 2**26 // (tokens.size(1) * model.config.vocab_size))


def token_logprobs(model: GPT, tokens: Tensor, temperature: float = 1.0, mask: Tensor | None = None) -> Tensor:
    """log pi(tokens[t+1] | tokens[:t+1]): tokens (B, T) -> (B, T-1) float32, at the sampling temperature.

    With mask (B, T-1) only where it is true, and 0 elsewhere: logits are what costs most. Without gradients the rows go
    through the model in slices; with them, what is kept for the backward pass is the caller's business (--micro_batch).
    model may be any function from tokens (B, T) to logits (B, T, V)."""
    mask = torch.ones_like(tokens[:, 1:], dtype=torch.bool) if mask is None else mask.bool()
    rows = len(tokens) if torch.is_grad_enabled() else rows_at_a_time(tokens, model)
    found = []  # (n,) each
    for part, here in zip(tokens.split(rows), mask.split(rows), strict=True):
        logits = model(part, here) if isinstance(model, GPT) else model(part)[:, :-1][here]  # (n, V)
        found.append(select_logprobs(logits, part[:, 1:][here], temperature))
    return put_back(torch.cat(found), mask)


def check_first_ratio(off: list[Tensor], n_tokens: Tensor, exact: bool) -> float:
    """The largest ratio of the first step, before anything has moved. off: |ratio - 1| at the n_tokens actions of its
    micro-batches, 0 elsewhere. RuntimeError where it isn't 1: rollout and update compute different things.

    exact: products are right to float32, so each ratio is right to 0.001. bfloat16 and TensorFloat-32 round by the
    shape of the batch: some ratios are off by 0.05, but the mean of |ratio - 1| stays below 0.01; a wrong temperature,
    or dropout, moves it by 0.1."""
    largest = torch.stack([x.max() for x in off]).max().nan_to_num(nan=torch.inf).item()
    mean = (torch.stack([x.sum() for x in off]).sum() / n_tokens).item()
    if not (largest <= 1e-3 if exact else mean <= 0.02):
        raise RuntimeError(
            f"the first probability ratio is {1 + largest:.4f}, not 1 (|ratio - 1| is {mean:.4f} on average): "
            "rollout and update disagree"
        )
    return 1 + largest


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
