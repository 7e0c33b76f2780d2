"""Will it fit, and how long will it take? Memory and speed of every stage, computed; nothing is trained.

    python -m tools.plan                                                    # four networks, three GPUs
    python -m tools.plan --sizes smollm2 --train_layers 10 --micro_batch 4  # one of them, the upper 10 blocks trained
    python -m tools.plan --sizes 1.7b --recompute --prompt 512 --completion 512

Memory. The network is built of tensors that have a shape and no numbers (torch's fake tensors), one micro-batch goes
forward and backward through it, and what autograd would keep is added up. On top of that:

    16 bytes a weight that is trained (4 the weight, 4 its gradient, 8 Adam's two moments), 4 bytes one that is not
    networks: sft 1 trained; reward_model 1 trained and the policy; dpo 1 trained and the reference;
              ppo 2 trained (policy and value model), the reference and the reward model
    keys and values of a rollout, which come and go before the update; and a quarter of it all on top, see SLACK

Speed. Operations of the products with weights (torch counts them) over 40% of what the GPU's data sheet promises for
bfloat16; for sampling, bytes that a step has to read over 60% of its bandwidth; but at least 5 microseconds for every
operation that PyTorch starts, which is what small networks wait for (larger micro-batches and --compile help).

Memory is held against measured runs in tests/test_plan.py; speed was never held against a GPU by us: a factor of two
would be no surprise.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from frozen import choose_trainable
from lib.cli import DTYPES, Flags, check, flag, run_main
from lib.train import autocast, prepare_blocks
from model import GPT, LLAMA, GPTConfig, ScalarModel
from sampling import CACHE_NUMBERS, numbers_cached
from tools import bench
from tools.bench import GPT2, SMOLLM2, STAGES, gpt_config

SIZES = {  # token ids, block size, blocks, heads, channels
    "tiny": GPTConfig(930, 96, 3, 4, 128, rope_base=1e4),
    "gpt2": replace(gpt_config(bench.Config(**GPT2)), block_size=1024),
    "smollm2": replace(gpt_config(bench.Config(**SMOLLM2)), block_size=2048),  # SmolLM2-135M
    "360m": GPTConfig(49152, 2048, 32, 15, 960, n_kv_head=5, n_inner=2560, rope_base=1e5, **LLAMA),  # SmolLM2-360M
    "1.7b": GPTConfig(49152, 2048, 24, 32, 2048, n_inner=8192, rope_base=1e5, **LLAMA),  # SmolLM2-1.7B
}


class GPU(NamedTuple):
    gigabytes: int
    tflops: float  # dense bfloat16
    bandwidth: float  # GB/s


GPUS = {"RTX 4090": GPU(24, 165, 1008), "A100 80GB": GPU(80, 312, 2039), "H100 SXM": GPU(80, 989, 3350)}
OF_PEAK, OF_BANDWIDTH = 0.4, 0.6
SLACK = 1.25  # for what comes and goes within a step, and for gaps: what measured runs took on top of what is kept
A_CALL = 5e-6  # seconds that PyTorch takes to start an operation: small networks wait for that, not for the GPU


@dataclass
class Config(Flags):
    sizes: list[str] = flag(["gpt2", "smollm2", "360m", "1.7b"], "networks", choices=tuple(SIZES))
    gpus: list[str] = flag(list(GPUS), "whose data sheets to compute with", choices=tuple(GPUS))
    prompt: int = flag(128, "tokens of a prompt", low=1)
    completion: int = flag(128, "tokens of a completion", low=1)
    micro_batch: int = flag(8, "texts, pairs or rollouts a forward pass", low=1)
    rollouts: int = flag(64, "completions sampled at a time", low=1)
    ppo_epochs: int = flag(2, "passes over each iteration's rollouts", low=1)
    train_layers: int = flag(0, "train only the last N blocks (0: all)", low=0)
    recompute: bool = flag(False, "--recompute of the stages")
    compile = False  # no flag here, but prepare_blocks asks
    dtype: str = flag("bfloat16", "of the matrix products", choices=DTYPES)


class Pass(NamedTuple):
    """What one micro-batch takes."""

    kept: int  # bytes that the forward pass keeps for the backward pass, and the gradient of the logits
    flops: int  # operations, forward
    both_flops: int  # forward and backward
    calls: int  # operations that are started one by one, forward
    both_calls: int


class Calls(TorchDispatchMode):
    """Counts the operations that are started: all that compute something, and are not another look at what is there."""

    n = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.n += function.namespace == "aten" and not function.is_view
        return function(*args, **(kwargs or {}))


def build(c: GPTConfig, scalar: bool, config: Config) -> GPT | ScalarModel:
    model = ScalarModel(c) if scalar else GPT(c)
    choose_trainable(model, config)
    prepare_blocks(config, model)
    return model


def one_pass(c: GPTConfig, scalar: bool, paired: bool, config: Config) -> Pass:
    """A micro-batch through a network that is trained: policy or scalar model; texts, or pairs, which are a row with
    the prompt once and both completions behind it. The head reads the positions before every token of a completion, or
    the last of each of two that a reward model compares."""
    T = config.prompt + (2 if paired else 1) * config.completion
    used = 2 if scalar and paired else T - config.prompt
    kept: dict[int, int] = {}
    with FakeTensorMode():
        model = build(replace(c, block_size=max(T, c.block_size)), scalar, config)  # a row of two texts may be longer
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
    """All that the stages of one network consist of."""

    policy: Pass
    value: Pass
    pairs: Pass
    scored_pairs: Pass
    trained: int  # weights of one network
    weights: int


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
    """Bytes at the height of a stage."""
    cache, learner, other = cache_bytes(c, config), 12 * p.trained + 4 * p.weights, 4 * p.weights
    return (
        SLACK
        * {
            "sft": learner + p.policy.kept,
            "reward_model": learner + other + max(p.scored_pairs.kept, cache),  # other: the policy
            # what is frozen the reference has in common with the policy
            "dpo": learner + 4 * p.trained + p.pairs.kept,
            # and so have the value model and a reward model that was trained with the same --train_layers
            "ppo": learner + (4 + 16 + 4) * p.trained + max(p.policy.kept + p.value.kept, cache),
            "generate": other + cache,
        }[stage]
    )


def seconds(flops: float, calls: float, gpu: GPU) -> float:
    return max(flops / (OF_PEAK * gpu.tflops * 1e12), calls * A_CALL)


def seconds_a_token(c: GPTConfig, p: Passes, stage: str, config: Config, gpu: GPU) -> float:
    """Of prompts and completions (generate: of what is sampled)."""
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
            told = "".join(f"{'-' if v is None else f'{v:,.0f}':>{width}}" for v in speeds.values())
            print(f"{size:8} {stage:13}{gigabytes:8.1f}{told}")
    return results


def main() -> None:
    run_main(run, Config, __doc__)


if __name__ == "__main__":
    main()
