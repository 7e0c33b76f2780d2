"""What every training loop needs: device, dtype, random generators, learning rate, gradients."""

from __future__ import annotations

import contextlib
import math

import torch
from torch import Tensor, nn

from lib.cli import UserError, one_line
from model import Block


def pick_device(name: str) -> torch.device:
    """ "auto" takes the GPU where there is one, then Apple's, then the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name} can't be used here: {one_line(error)}") from None
    torch.set_float32_matmul_precision("high")  # TensorFloat-32 where the GPU has it; no effect on a CPU
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False  # the sums of products stay in float32
    return torch.device(name)


def autocast(device: torch.device, dtype: str):
    """Context for the forward pass: weights stay float32, matrix products run in `dtype`."""
    if dtype == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


def generator_for(device: torch.device | str, *key: int) -> torch.Generator:
    """A random generator for one purpose, e.g. (seed, epoch): independent of what else was drawn before."""
    seed = 0
    for k in key:
        seed = (seed * 1_000_003 + k + 1) % (2**63 - 1)
    return torch.Generator(device=device).manual_seed(seed)


# -------------------------------------------------------------------------------- the optimiser's step


def lr_at(step: int, total: int, warmup: int, kind: str) -> float:
    """Factor on the peak learning rate at step 0..total-1: linear warm-up, then "cosine" or "linear" decay to 0."""
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, total - warmup)
    return 0.5 * (1 + math.cos(math.pi * done)) if kind == "cosine" else 1 - done


def set_lr(optimizer: torch.optim.Optimizer, step: int, total: int, warmup: int, kind: str) -> float:
    """Set each group's learning rate for a step: its peak, which is the rate that the optimiser was made with, times
    lr_at -> that of the first group."""
    for group in optimizer.param_groups:
        group["lr"] = group.setdefault("initial_lr", group["lr"]) * lr_at(step, total, warmup, kind)
    return optimizer.param_groups[0]["lr"]


def clip_gradients(model: nn.Module, max_norm: float) -> Tensor:
    """Scale the gradients down to this norm, all together; 0: leave them -> their norm before."""
    return nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], max_norm or math.inf)


# -------------------------------------------------------------------------------- blocks


def prepare_blocks(config, *models: nn.Module) -> None:
    """--recompute and --compile, for all blocks of these models."""
    for block in (module for model in models for module in model.modules() if isinstance(module, Block)):
        block.recompute = config.recompute
    if config.compile:
        compile_blocks(*models)


def compile_blocks(*models: nn.Module) -> None:
    """torch.compile for each block: what is compiled serves them all, and parameter names stay as they are.

    dynamic: every micro-batch has another length, and code made for each would cost more than it saves. So the number
    of graphs doesn't depend on the lengths but on how a block is called: with gradients or without, trained or frozen,
    whole or at chosen places, with a cache or not; each once more where something has size 1. That is 9 in a usual run
    of ppo.py and at most about 40: more than the 8 at which torch would give up and go on uncompiled.

    On a GPU the decode step could also be one CUDA graph (mode="reduce-overhead"), but that needs a cache that stays at
    one address from one `generate` to the next; ours belongs to the call, and would be recorded anew each time."""
    torch._dynamo.config.cache_size_limit = 64  # the name of recompile_limit that torch 2.6 knows too
    for model in models:
        for module in model.modules():
            if isinstance(module, Block):
                module.compile(dynamic=True)
