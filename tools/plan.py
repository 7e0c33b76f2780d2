"""Computes whether a network fits a GPU, and how fast it trains there: memory and speed of every stage. Nothing is
trained.

    python -m tools.plan                                                    # four networks, three GPUs
    python -m tools.plan --sizes smollm2 --train_layers 10 --micro_batch 4  # one network, its upper 10 blocks trained
    python -m tools.plan --sizes 1.7b --recompute --prompt 512 --completion 512

Memory. The network is made of tensors that have a shape and no numbers (torch's fake tensors). One micro-batch goes
forward and backward through it, and the tensors that autograd would keep are added up. To these come:

    16 bytes for a weight that is trained (4 the weight, 4 its gradient, 8 Adam's two moments), 4 for one that is not
    networks: sft 1 trained; reward_model 1 trained and the policy; dpo 1 trained and the reference;
              ppo 2 trained (policy and value model), the reference and the reward model
    keys and values of a rollout, which are free again before the update; and a quarter of all this, see SLACK

Speed. The time for training is the operations of the products with weights (torch counts them), divided by 40% of the
speed for bfloat16 in the GPU's data sheet. The time for sampling is the bytes that a step reads, divided by 60% of the
GPU's bandwidth. But every operation that PyTorch starts takes at least 5 microseconds. Small networks wait for these;
larger micro-batches and --compile help.

tests/test_plan.py compares memory with measured runs. We have never compared speed with a GPU: a factor of two would be
no surprise.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from frozen import choose_trainable
from lib.cli import DTYPES, Flags, check, flag, run_main
from lib.train import autocast, prepare_blocks
from model import GPT, GPTConfig, ScalarModel
from sampling import CACHE_NUMBERS, numbers_cached
from tools.bench import SIZES, STAGES


class GPU(NamedTuple):
    gigabytes: int
    tflops: float  # dense bfloat16
    bandwidth: float  # GB/s


GPUS = {"RTX 4090": GPU(24, 165, 1008), "A100 80GB": GPU(80, 312, 2039), "H100 SXM": GPU(80, 989, 3350)}
OF_PEAK, OF_BANDWIDTH = 0.4, 0.6
SLACK = 1.25  # measured runs took so much more: tensors that live within a step, and gaps in the memory
A_CALL = 5e-6  # seconds that PyTorch takes to start an operation


@dataclass
class Config(Flags):
    sizes: list[str] = flag(["gpt2", "smollm2", "360m", "1.7b"], "networks", choices=tuple(SIZES))
    gpus: list[str] = flag(list(GPUS), "GPUs", choices=tuple(GPUS))
    prompt: int = flag(128, "tokens of a prompt", low=1)
    completion: int = flag(128, "tokens of a completion", low=1)
    micro_batch: int = flag(8, "texts, pairs or rollouts a forward pass", low=1)
    rollouts: int = flag(64, "completions sampled at a time", low=1)
    ppo_epochs: int = flag(2, "passes over each iteration's rollouts", low=1)
    train_layers: int = flag(0, "train only the last N blocks (0: all)", low=0)
    recompute: bool = flag(False, "--recompute of the stages")
    compile = False  # for prepare_blocks; no flag
    dtype: str = flag("bfloat16", "of the matrix products", choices=DTYPES)


class Pass(NamedTuple):
    """The costs of one micro-batch."""

    kept: int  # bytes that the forward pass keeps for the backward pass, and the gradient of the logits
    flops: int  # arithmetic operations, forward
    both_flops: int  # forward and backward
    calls: int  # operations that PyTorch starts, forward
    both_calls: int


class Calls(TorchDispatchMode):
    """Counts the operations that PyTorch starts on a GPU. Not among them: what looks at its operand's memory in another
    shape (views, _unsafe_view), what only takes memory (empty, new_empty), what returns no tensor (promote_types)."""

    n = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        memory = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        made = [x for x in tree_leaves(found) if isinstance(x, torch.Tensor)]
        looks = not function._schema.is_mutable and all(x.untyped_storage()._cdata in memory for x in made)
        self.n += function.namespace == "aten" and not looks and "empty" not in function.name()
        return found


def build(c: GPTConfig, scalar: bool, config: Config) -> GPT | ScalarModel:
    model = ScalarModel(c) if scalar else GPT(c)
    choose_trainable(model, config)
    prepare_blocks(config, model)
    return model


def one_pass(c: GPTConfig, scalar: bool, paired: bool, config: Config) -> Pass:
    """The costs of a micro-batch for a network that is trained. scalar: a scalar model, else a policy. paired: a row is
    the prompt and two completions, else the prompt and one.

    The head reads the positions before every token of a completion. A reward model's head on pairs reads the last
    position of each completion."""
    T = config.prompt + (2 if paired else 1) * config.completion
    used = 2 if scalar and paired else T - config.prompt
    kept: dict[int, int] = {}
    with FakeTensorMode():
        model = build(replace(c, block_size=max(T, c.block_size)), scalar, config)  # a row of pairs may be longer
        weights = {p.untyped_storage()._cdata for p in model.parameters()}

        def pack(x: torch.Tensor) -> torch.Tensor:
            storage = x.untyped_storage()
            if storage._cdata not in weights:
                kept[storage._cdata] = storage.nbytes()
            return x

        tokens = torch.zeros(config.micro_batch, T, dtype=torch.long)
        where = torch.zeros(config.micro_batch * used, dtype=torch.long)  # flat positions
        with FlopCounterMode(display=False) as flops, Calls() as calls:
            with saved_tensors_hooks(pack, lambda x: x):
                with autocast(torch.device("cpu"), config.dtype):
                    out = model(tokens, where)  # (n,) or (n, V)
                loss = out.sum() if scalar else F.cross_entropy(out, where)
            forward = flops.get_total_flops(), calls.n
            loss.backward()
    logits = 0 if scalar else 4 * out.numel()
    return Pass(sum(kept.values()) + logits, forward[0], flops.get_total_flops(), forward[1], calls.n)


class Passes(NamedTuple):
    """The passes of which the stages of one network consist."""

    policy: Pass
    value: Pass
    pairs: Pass
    scored_pairs: Pass
    trained: int  # number of weights that are trained, of one network
    weights: int  # number of all its weights


def all_passes(c: GPTConfig, config: Config) -> Passes:
    with FakeTensorMode():
        parameters = list(build(c, False, config).parameters())
    trained, whole = sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)
    kinds = [(scalar, paired) for paired in (False, True) for scalar in (False, True)]
    policy, value, pairs, scored = (one_pass(c, scalar, paired, config) for scalar, paired in kinds)
    return Passes(policy, value, pairs, scored, trained, whole)


def cache_bytes(c: GPTConfig, config: Config) -> int:
    """Keys and values of the rollouts that `generate` holds at a time."""
    numbers = config.rollouts * (config.prompt + config.completion) * numbers_cached(c)
    return min(numbers, CACHE_NUMBERS) * (2 if config.dtype == "bfloat16" else 4)


def memory(c: GPTConfig, p: Passes, stage: str, config: Config) -> float:
    """The most bytes that a stage takes."""
    cache, learner, other = cache_bytes(c, config), 12 * p.trained + 4 * p.weights, 4 * p.weights
    return (
        SLACK
        * {
            "sft": learner + p.policy.kept,
            "reward_model": learner + other + max(p.scored_pairs.kept, cache),  # other: the policy
            # the reference shares the frozen weights with the policy
            "dpo": learner + 4 * p.trained + p.pairs.kept,
            # so do the value model, and a reward model that was trained with the same --train_layers
            "ppo": learner + (4 + 16 + 4) * p.trained + max(p.policy.kept + p.value.kept, cache),
            "generate": other + cache,
        }[stage]
    )


def seconds(flops: float, calls: float, gpu: GPU) -> float:
    """The time of a pass on a GPU."""
    return max(flops / (OF_PEAK * gpu.tflops * 1e12), calls * A_CALL)


def seconds_a_token(c: GPTConfig, p: Passes, stage: str, config: Config, gpu: GPU) -> float:
    """The time for a token of prompts and completions; for generate, for a token that is sampled."""
    read = (2 if config.dtype == "bfloat16" else 4) * p.weights + 0.75 * cache_bytes(c, config)  # the cache fills up
    sampling = max(read / (OF_BANDWIDTH * gpu.bandwidth * 1e9), p.policy.calls * A_CALL) / config.rollouts
    text = config.micro_batch * (config.prompt + config.completion)  # tokens of a micro-batch
    if stage == "generate":
        return sampling
    if stage == "sft":
        return seconds(p.policy.both_flops, p.policy.both_calls, gpu) / text
    if stage == "reward_model":
        return seconds(p.scored_pairs.both_flops, p.scored_pairs.both_calls, gpu) / (2 * text)
    if stage == "dpo":  # and the reference, once
        reference = seconds(p.pairs.flops, p.pairs.calls, gpu)
        return (reference + seconds(p.pairs.both_flops, p.pairs.both_calls, gpu)) / (2 * text)
    # the rollout; policy, reference, value model and reward model read it; the update, every epoch
    reading = 2 * seconds(p.policy.flops, p.policy.calls, gpu) + 2 * seconds(p.value.flops, p.value.calls, gpu)
    update = sum(seconds(x.both_flops, x.both_calls, gpu) for x in (p.policy, p.value))
    share = config.completion / (config.prompt + config.completion)
    return share * sampling + (reading + config.ppo_epochs * update) / text


def run(config: Config) -> dict:
    """-> {size: {stage: {"gigabytes", "tokens_per_s": {gpu: tokens a second, None where it doesn't fit}}}}"""
    check(bool(config.sizes) and bool(config.gpus), "--sizes and --gpus need a value each")
    results: dict = {}
    print(f"computed, not measured: {config.dtype}, prompts of {config.prompt} and completions of {config.completion}")
    print(
        f"tokens, micro-batches of {config.micro_batch}, {config.rollouts} rollouts at a time; tokens/s where it fits"
    )
    width = max(map(len, config.gpus)) + 2
    print(f"{'':22}{'GB':>8}" + "".join(f"{name:>{width}}" for name in config.gpus))
    for size in config.sizes:
        c = SIZES[size]
        needed = config.prompt + config.completion
        check(needed <= c.block_size, f"{needed} tokens are longer than the block size of {size}, {c.block_size}")
        check(config.train_layers <= c.n_layer, f"--train_layers {config.train_layers}: {size} has {c.n_layer} blocks")
        results[size], passes = {}, all_passes(c, config)
        for stage in STAGES:
            gigabytes = memory(c, passes, stage, config) / 1e9
            speeds = {name: 1 / seconds_a_token(c, passes, stage, config, GPUS[name]) for name in config.gpus}
            speeds = {name: v if gigabytes < GPUS[name].gigabytes else None for name, v in speeds.items()}
            results[size][stage] = {"gigabytes": gigabytes, "tokens_per_s": speeds}
            columns = "".join(f"{'-' if v is None else f'{v:,.0f}':>{width}}" for v in speeds.values())
            print(f"{size:8} {stage:13}{gigabytes:8.1f}{columns}")
    return results


def main() -> None:
    run_main(run, Config, __doc__)


if __name__ == "__main__":
    main()
