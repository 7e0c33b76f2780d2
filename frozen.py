"""--train_layers N: only the last N blocks are trained. What the frozen ones below compute is the same in all networks.

So the policy, its reference and, where they were trained alike, the reward and value models have their frozen blocks in
common. These are in memory once, and run once for all of them: `trunk` gives what stands on top of them, `below` in
model.py and the stages. PPO keeps it from the measurement of its rollouts through all passes of its update.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from lib.cli import check
from model import GPT, ScalarModel


def choose_trainable(model: GPT | ScalarModel, config) -> list[nn.Parameter]:
    """Freeze all that config.train_layers doesn't leave to the optimiser -> the parameters that it does.

    0: nothing. N: all but the last N blocks, the final norm, and what a scalar model has above them. The token
    embedding stays frozen too, since it is the output layer as well (tied)."""
    gpt, n = model.gpt if isinstance(model, ScalarModel) else model, config.train_layers
    check(n <= len(gpt.h), f"--train_layers {n}: the model has {len(gpt.h)} blocks")
    if n:
        gpt.requires_grad_(False)
        for module in [*gpt.h[-n:], gpt.ln_f]:
            module.requires_grad_(True)
        gpt.frozen = len(gpt.h) - n
    return trainable(model)


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that choose_trainable leaves to the optimiser."""
    return [p for p in model.parameters() if p.requires_grad]


def make_reference(policy: GPT) -> GPT:
    """The policy as it is now, never to change: a copy of what will be trained; the frozen rest is the policy's own."""
    return copy.deepcopy(policy, {id(p): p for p in policy.parameters() if not p.requires_grad}).requires_grad_(False)


def share_frozen(model: GPT, policy: GPT) -> None:
    """Let the model have the policy's frozen parameters in the place of its own, if all of them are equal, as in a
    reward model that was trained with the same --train_layers from the same start. Else it keeps a trunk of its own."""
    own = dict(model.named_parameters())
    frozen = {name: p for name, p in policy.named_parameters() if not p.requires_grad}
    common = all(name in own and torch.equal(own[name], p) for name, p in frozen.items())
    for name, p in frozen.items() if common else ():
        module, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(module), leaf, p)
    model.frozen = policy.frozen if common else 0


def train_like(model: ScalarModel, policy: GPT, config) -> None:
    """choose_trainable for a model that is trained beside the policy, whose frozen blocks it shares if it can. It may
    have fewer blocks than the policy."""
    choose_trainable(model, replace(config, train_layers=min(config.train_layers, len(model.gpt.h))))
    share_frozen(model.gpt, policy)


@torch.no_grad()
def trunk(model: GPT, tokens: Tensor, positions: Tensor | None = None) -> Tensor | None:
    """What the frozen blocks make of tokens (B, T) -> (B, T, C): the same before, during and after training, and for
    all networks that have these blocks in common. None without frozen blocks."""
    if not model.frozen:
        return None
    view = model.view(tokens, positions)
    x = model.embed(tokens, view)
    for block in model.h[: model.frozen]:
        x = block(x, view)
    return x


@contextlib.contextmanager
def cast_once(model: GPT) -> Iterator[None]:
    """For sampling under autocast, which keeps its bfloat16 copy of a weight from one step to the next only if the
    weight asks for a gradient, and would cast frozen weights at every step. While this lasts all weights ask."""
    frozen = [p for p in model.parameters() if not p.requires_grad]
    try:
        for p in frozen:
            p.requires_grad_(True)
        yield
    finally:
        for p in frozen:
            p.requires_grad_(False)
