"""--train_layers: only the last blocks are trained, and what the others compute is shared and kept."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator

import torch
from torch import nn

from data.batches import RankedExamples, micro_batches, ranked_batch
from lib.cli import check
from lib.train import autocast
from model import GPT, ScalarModel


def train_last_layers(model: GPT | ScalarModel, n: int) -> None:
    """Freeze all but the last n blocks, the final LayerNorm and a scalar model's own parts: head and, with expectation,
    its block (--train_layers; 0: train everything). The token embedding is the output layer too (tied), so it stays."""
    gpt = model.gpt if isinstance(model, ScalarModel) else model
    check(n <= len(gpt.h), f"--train_layers {n}: the model has {len(gpt.h)} blocks")
    if n:
        gpt.requires_grad_(False)
        for module in [*gpt.h[-n:], gpt.ln_f]:
            module.requires_grad_(True)
        gpt.frozen = len(gpt.h) - n


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that --train_layers leaves to the optimiser."""
    return [p for p in model.parameters() if p.requires_grad]


def make_reference(policy: GPT) -> GPT:
    """The policy as it is now, never to change: a copy of what will be trained; the rest (--train_layers) is the
    policy's own."""
    return copy.deepcopy(policy, {id(p): p for p in policy.parameters() if not p.requires_grad}).requires_grad_(False)


def share_frozen(model: GPT, policy: GPT) -> None:
    """Let the model have the policy's frozen parameters in the place of its own, if all of them are equal, as in a
    reward model that was trained with the same --train_layers from the same start: less memory, one `trunk` for both.
    Else it has a trunk of its own, of which nobody else knows."""
    own = dict(model.named_parameters())
    frozen = {name: p for name, p in policy.named_parameters() if not p.requires_grad}
    common = all(name in own and torch.equal(own[name], p) for name, p in frozen.items())
    for name, p in frozen.items() if common else ():
        module, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(module), leaf, p)
    model.frozen = policy.frozen if common else 0


KEPT_NUMBERS = 2**29  # that keep_trunk may keep: 2 GiB in float32


@torch.no_grad()
def keep_trunk(policy: GPT, items: list[RankedExamples], config) -> None:
    """With --train_layers: what the frozen blocks make of every ranking, once for reference and policy and all epochs.
    Left out if it would take too much memory."""
    if policy.frozen and sum(map(len, items)) * policy.config.n_embd <= KEPT_NUMBERS:
        for part in micro_batches(items, config.micro_batch or 64):
            batch = ranked_batch(part, policy.device)
            with autocast(policy.device, config.dtype):
                below = policy.trunk(batch.tokens, batch.branches)  # (N, T, C)
            for item, kept in zip(part, below, strict=True):
                item.below = kept[: len(item)].clone()


@contextlib.contextmanager
def sampling(model: GPT, dtype: str) -> Iterator[None]:
    """autocast for `generate`. It keeps its bfloat16 copy of a weight from one step to the next only if the weight asks
    for a gradient, and would cast what --train_layers has frozen at every step: so while this lasts all weights ask."""
    frozen = [p for p in model.parameters() if not p.requires_grad] if dtype != "float32" else []
    try:
        for p in frozen:
            p.requires_grad_(True)
        with autocast(model.device, dtype):
            yield
    finally:
        for p in frozen:
            p.requires_grad_(False)
