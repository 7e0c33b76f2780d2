"""Measures how fast the stages run on this machine, and compares that with what the machine can do.

    python -m tools.bench                                       # a network of the demo's size
    python -m tools.bench --size gpt2 --stages sft generate     # GPT-2's size
    python -m tools.bench --size smollm2 --batch_size 8 --repeats 3 --micro_batch 2  # SmolLM2-135M's, for two cores
    python -m tools.bench --compile --json out/bench.json

It needs no data: weights and token ids are random, and the learning rate is 0, so every repeat does the same work. The
code that runs is the scripts' own: their losses, micro-batches, optimisers and default --micro_batch.

    tokens/s    real tokens a second, without filler: the prompts and completions of an optimiser step; for PPO those of
                an iteration, however often it reads them; for `generate` the new tokens
    of matmul   operations that these tokens need / time / the speed of a large matrix product. A token needs 2
                operations forward and 4 backward for each weight that it is multiplied with. Nothing is counted for
                filler, for logits that are not needed, and for attention's own products (a few percent)
    of copy     bytes of weights, keys and values that a step of `generate` reads / time / the speed at which a large
                tensor is copied; it may exceed 100% if the network fits the processor's cache
    peak MB     the most memory that a process of its own takes, without the libraries
"""

from __future__ import annotations

import copy
import gc
import math
import multiprocessing
import random
import re
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import dpo
import ppo
import reward_model
import sft
from data.batches import Example, RankedExamples, micro_batches, ranked_batch
from lib.cli import DTYPES, Flags, check, flag, run_main
from lib.reward import score_rollout
from lib.run import write_json
from lib.train import autocast, clip_gradients, compile_blocks, generator_for, pick_device
from model import GPT, LLAMA, GPTConfig, ScalarModel
from sampling import Rollout, generate, numbers_cached

STAGES = ("sft", "reward_model", "dpo", "ppo", "generate")
SIZES = {  # token ids, block size, blocks, heads, channels
    "tiny": GPTConfig(924, 96, 3, 4, 128),  # the demo's, but with GPT-2's positions
    "gpt2": GPTConfig(50257, 1024, 12, 12, 768),
    "smollm2": GPTConfig(49152, 2048, 30, 9, 576, n_kv_head=3, n_inner=1536, rope_base=1e5, **LLAMA),  # SmolLM2-135M
    "360m": GPTConfig(49152, 2048, 32, 15, 960, n_kv_head=5, n_inner=2560, rope_base=1e5, **LLAMA),  # SmolLM2-360M
    "1.7b": GPTConfig(49152, 2048, 24, 32, 2048, n_inner=8192, rope_base=1e5, **LLAMA),  # SmolLM2-1.7B
}
# What a length of 0 stands for, with tiny and with the other sizes.
SHORT = {"batch_size": 64, "prompt": 20, "completion_low": 4, "completion_high": 24, "new_tokens": 100}
LONG = {"batch_size": 8, "prompt": 128, "completion_low": 128, "completion_high": 128, "new_tokens": 128}
PPO_EPOCHS, WARM_UP = 4, 2


@dataclass
class Config(Flags):
    size: str = flag("tiny", "size of the network", choices=tuple(SIZES))
    batch_size: int = flag(0, "texts an optimiser step, two to a pair; rollouts an iteration (0: 64 with tiny, else 8)")
    prompt: int = flag(0, "tokens of every prompt (0: 20 with tiny, else 128)", low=0)
    completion_low: int = flag(0, "tokens of the shortest completion (0: 4 with tiny, else 128)", low=0)
    completion_high: int = flag(0, "tokens of the longest, and of every rollout of PPO (0: 24, else 128)", low=0)
    new_tokens: int = flag(0, "tokens that `generate` adds to every prompt (0: 100 with tiny, else 128)", low=0)
    stages: list[str] = flag(list(STAGES), "stages to measure", choices=STAGES)
    micro_batch: int = flag(0, "texts (pairs, rollouts) a forward pass (0: each script's default)", low=0)
    repeats: int = flag(10, "measured steps of each stage, after two that are not", low=1)
    memory: bool = flag(True, "measure memory too, in separate processes")
    json: str = flag("", "file for the results (empty: none)")
    device: str = flag("auto", "auto, cpu, cuda or mps")
    dtype: str = flag("float32", "of the matrix products while training", choices=DTYPES)
    compile: bool = flag(False, "compile the blocks with torch.compile")

    def __post_init__(self):
        super().__post_init__()
        for name, default in (SHORT if self.size == "tiny" else LONG).items():
            setattr(self, name, getattr(self, name) or default)


# -------------------------------------------------------------------------------- what a step needs, what there is

Texts = list[tuple[int, int]]  # (tokens of the prompt, tokens of the completion) of each text


def tokens_of(stage: str, texts: Texts) -> int:
    """The tokens that count in tokens/s."""
    return sum(c if stage == "generate" else p + c for p, c in texts)


def needed_flops(stage: str, texts: Texts, net: GPTConfig) -> float:
    """Operations of the products with weights in one step, for real tokens and for results that are used. The prompt of
    a pair is read once."""
    C, rows = net.n_embd, len(texts)
    # weights of a block: up to keys and values, and after them (GPT-2: 3 C^2 and 9 C^2)
    lower = C * (net.n_head + 2 * net.n_kv_head) * (C // net.n_head)
    upper = C * C + C * net.n_inner * (3 if net.mlp == "swiglu" else 2)
    read, acted = sum(p + c for p, c in texts), sum(c for _, c in texts)

    def forward(read: int, used: int, outputs: int) -> int:
        """All blocks for the tokens read; but the last block after its keys and values, and the head, only for the
        `used` positions."""
        return 2 * (((net.n_layer - 1) * (lower + upper) + lower) * read + (upper + outputs * C) * used)

    read -= sum(p for p, _ in texts) // 2 if stage in ("reward_model", "dpo") else 0
    policy, value, score = forward(read, acted, net.vocab_size), forward(read, acted, 1), forward(read, rows, 1)
    generating = forward(read - rows, acted, net.vocab_size)  # the last token is sampled, but not read
    if stage == "ppo":  # the rollout; the reward model, policy, reference and value model read it; the update
        return generating + score + 2 * policy + value + PPO_EPOCHS * 3 * (policy + value)
    # dpo: the policy's update, and the reference
    return {"sft": 3 * policy, "reward_model": 3 * score, "dpo": 4 * policy, "generate": generating}[stage]


def decode_bytes(policy: GPT, config: Config) -> float:
    """Bytes that a step of `generate` reads: every weight, and the keys and values of all tokens so far, on average."""
    weights = sum(p.numel() for name, p in policy.named_parameters() if name != "wpe.weight")
    cached = config.batch_size * (config.prompt + config.new_tokens / 2) * numbers_cached(policy.config)
    return 4 * (weights + cached)


def now(device: torch.device) -> float:
    """The time in seconds, once the GPU has done all its work."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()
    return time.perf_counter()


def timed(f: Callable, device: torch.device) -> tuple[float, object]:
    """Run f -> (its seconds, its result)."""
    start = now(device)
    result = f()
    return now(device) - start, result


def matmul_speed(config: Config, device: torch.device) -> float:
    """GFLOP/s of a large matrix product."""
    side = 4096 if device.type == "cuda" else 1024
    x, w = (torch.randn(side, side, device=device, dtype=getattr(torch, config.dtype)) for _ in range(2))
    return 2 * side**3 / min(timed(lambda: F.linear(x, w), device)[0] for _ in range(20)) / 1e9


def copy_speed(device: torch.device) -> float:
    """GB/s of a copy of 256 MB, read and written."""
    source = torch.ones(2**26, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / min(timed(lambda: target.copy_(source), device)[0] for _ in range(5)) / 1e9


# -------------------------------------------------------------------------------- the stages' own steps


class Start(NamedTuple):
    """What a stage starts from."""

    config: Config
    device: torch.device
    policy: GPT
    reference: GPT | None  # for dpo.py and ppo.py
    scorer: ScalarModel | None  # for reward_model.py and ppo.py
    batches: list[list]  # for each step: Example of sft.py, RankedExamples of reward_model.py and dpo.py, else prompts


# Takes a batch -> the texts that it has worked on: one optimiser step, one iteration of PPO, or one `generate`.
Step = Callable[[list], Texts]


def make_start(net: GPTConfig, config: Config, stage: str) -> Start:
    device, rng = pick_device(config.device), random.Random(1)
    torch.manual_seed(1)
    paired = stage in ("reward_model", "dpo")
    block_size = config.prompt + max(config.completion_high, config.new_tokens)
    policy = GPT(replace(net, block_size=block_size)).to(device)

    def ids(n: int) -> list[int]:
        return [rng.randrange(net.vocab_size) for _ in range(n)]

    def item() -> Example | RankedExamples | list[int]:
        prompt = ids(config.prompt)
        lengths = [rng.randint(config.completion_low, config.completion_high) for _ in range(1 + paired)]
        texts = [Example(prompt, ids(n)) for n in lengths]
        return RankedExamples(texts, [0, 1]) if paired else texts[0] if stage == "sft" else prompt

    batches = [[item() for _ in range(config.batch_size // (1 + paired))] for _ in range(WARM_UP + config.repeats)]
    reference = copy.deepcopy(policy).requires_grad_(False) if stage in ("dpo", "ppo") else None
    scorer = ScalarModel.from_gpt(policy) if stage in ("reward_model", "ppo") else None
    return Start(config, device, policy, reference, scorer, batches)


def flags_of(config: Config) -> dict:
    """The flags that all stages take from the benchmark."""
    return {"lr": 0.0, "dtype": config.dtype, **({"micro_batch": config.micro_batch} if config.micro_batch else {})}


def adamw(model: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.99), weight_decay=0.01, fused=True)


def training_step(model: nn.Module, optimizer, config, loss: Callable[[list, list], Tensor]) -> Step:
    """The step in the loop of sft.py, reward_model.py and dpo.py. loss(micro-batch, batch)."""

    def step(batch: list) -> Texts:
        optimizer.zero_grad(set_to_none=True)
        for part in micro_batches(batch, config.micro_batch):
            loss(part, batch).backward()
        clip_gradients(model, config.grad_clip)
        optimizer.step()
        return [(len(e.prompt), len(e.completion)) for e in examples_of(batch)]

    return step


def examples_of(batch: list) -> list[Example]:
    """The texts of a batch; of a ranking, those that it ranks."""
    return [e for item in batch for e in getattr(item, "examples", [item])]


def sft_step(s: Start) -> Step:
    own = sft.Config(**flags_of(s.config))

    def loss(part: list[Example], batch: list[Example]) -> Tensor:
        return sft.demonstration_loss(s.policy, part, sum(len(e.completion) for e in batch), own.dtype)

    return training_step(s.policy, sft.make_optimizer(s.policy.train(), own), own, loss)


def reward_model_step(s: Start) -> Step:
    own = reward_model.Config(**flags_of(s.config))

    def loss(part: list[RankedExamples], batch: list) -> Tensor:
        ranked = ranked_batch(part, s.device)
        with autocast(s.device, own.dtype):
            scores = s.scorer(ranked.tokens, ranked.ends, ranked.positions)  # (N, 2)
        return reward_model.ranking_loss(scores, ranked.ranks)

    return training_step(s.scorer, adamw(s.scorer.train()), own, loss)


def dpo_step(s: Start) -> Step:
    own = dpo.Config(**flags_of(s.config))
    if s.config.compile:
        compile_blocks(s.reference)

    def loss(part: list[RankedExamples], batch: list) -> Tensor:
        return dpo.pair_losses(s.policy, s.reference, part, own)[0].mean()

    return training_step(s.policy, adamw(s.policy.eval()), own, loss)


def ppo_step(s: Start) -> Step:
    sizes = {"max_new_tokens": s.config.completion_high, "minibatch": max(1, s.config.batch_size // 4)}
    own = ppo.Config(value_lr=0.0, stop_kl=0.0, ppo_epochs=PPO_EPOCHS, **sizes, **flags_of(s.config))
    value_model = copy.deepcopy(s.scorer)
    optimizer, order = ppo.make_optimizer(s.policy, value_model, own), generator_for("cpu", 1)
    sample = sampler(s, own.max_new_tokens)
    if s.config.compile:
        compile_blocks(s.reference, value_model)

    def step(prompts: list[list[int]]) -> Texts:
        rollout = sample(prompts)
        scores = score_rollout(s.scorer, rollout) - own.eos_penalty * (~rollout.ended)
        networks = (s.policy, s.reference, value_model)
        experience = ppo.make_experience(*networks, rollout, scores, own.kl_coef, own)
        ppo.update(s.policy, value_model, optimizer, experience, own, order)
        return texts_of(rollout)

    return step


def sampler(s: Start, new_tokens: int) -> Callable[[list[list[int]]], Rollout]:
    rng, no_eos = generator_for(s.device, 1), s.policy.config.vocab_size  # an id that no token has: no row ends early
    return lambda prompts: generate(s.policy, prompts, new_tokens, eos_id=no_eos, generator=rng)


def texts_of(rollout: Rollout) -> Texts:
    return list(zip(rollout.prompt_lens.tolist(), (rollout.lens - rollout.prompt_lens).tolist(), strict=True))


def generate_step(s: Start) -> Step:
    sample = sampler(s, s.config.new_tokens)
    return lambda prompts: texts_of(sample(prompts))


# -------------------------------------------------------------------------------- measuring

STEPS = dict(zip(STAGES, (sft_step, reward_model_step, dpo_step, ppo_step, generate_step), strict=True))


def make_step(s: Start, stage: str) -> Step:
    step = STEPS[stage](s)
    if s.config.compile:
        compile_blocks(s.scorer if stage == "reward_model" else s.policy)
    return step


def resident_peak() -> float:
    """The most MB that this process has held; nan where the system doesn't say. (getrusage counts the parent's too.)"""
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return int(found[1]) / 1024 if found else math.nan


def peak_memory(net: GPTConfig, config: Config, stage: str) -> float:
    """The most MB that two steps take, in a fresh process. The first two steps are those of a minute network: what the
    libraries take is not counted."""
    minute = replace(net, vocab_size=16, n_layer=1, n_embd=2 * net.n_head, n_inner=0)
    for network in (minute, net):
        before = resident_peak()
        s = make_start(network, config, stage)
        step = make_step(s, stage)
        for batch in s.batches[:WARM_UP]:
            step(batch)
    return torch.cuda.max_memory_allocated() / 2**20 if s.device.type == "cuda" else resident_peak() - before


def measure(net: GPTConfig, config: Config, stage: str, ceilings: dict) -> dict:
    """-> the figures that `run` describes."""
    peak = None
    if config.memory:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:
            peak = fresh.submit(peak_memory, net, config, stage).result()
    torch.compiler.reset()  # forget what was compiled for another stage
    s = make_start(net, config, stage)
    step = make_step(s, stage)
    runs: list[tuple[float, Texts]] = []  # seconds and texts of each step
    for batch in tqdm(s.batches, stage, disable=None):
        runs.append(timed(lambda batch=batch: step(batch), s.device))
    runs = runs[WARM_UP:]
    rates = [needed_flops(stage, texts, net) / seconds for seconds, texts in runs]
    figures = {
        "tokens": median(tokens_of(stage, texts) for _, texts in runs),
        "seconds": median(seconds for seconds, _ in runs),
        "tokens_per_s": median(tokens_of(stage, texts) / seconds for seconds, texts in runs),
        "share_of_matmul": median(rates) / ceilings["matmul_gflops"] / 1e9,
        "peak_mb": peak,
    }
    if stage == "generate":
        prefill = sampler(s, 1)
        prefill_seconds = median(timed(lambda batch=batch: prefill(batch), s.device)[0] for batch in s.batches)
        figures["step_seconds"] = (figures["seconds"] - prefill_seconds) / (config.new_tokens - 1)
        speed = decode_bytes(s.policy, config) / figures["step_seconds"]
        figures["share_of_copy"] = speed / ceilings["copy_gb"] / 1e9
    return figures


def print_table(stages: dict[str, dict], config: Config) -> None:
    rows = [["stage", "tokens", "ms", "tokens/s", "of matmul", "of copy", "peak MB"]]
    for name, f in stages.items():
        cells = [f"{f['tokens']:.0f}", f"{1000 * f['seconds']:.1f}", f"{f['tokens_per_s']:,.0f}"]
        shares = [f"{f['share_of_matmul']:.0%}", f"{f.get('share_of_copy', math.nan):.0%}"]
        cells += [*shares, f"{f['peak_mb'] or math.nan:.0f}"]
        rows.append([name, *("-" if "nan" in cell else cell for cell in cells)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *rest in rows:
        cells = (cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True))
        print("  ".join([first.ljust(widths[0]), *cells]))
    print("tokens and ms of a step (medians); tokens/s of real tokens; shares of what this machine reaches; --help")
    if "generate" in stages:
        print(f"generate: {1000 * stages['generate']['step_seconds']:.2f} ms a step of {config.batch_size} rows")


def run(config: Config) -> dict:
    """-> {"machine", "config", "ceilings": {"matmul_gflops", "copy_gb"}, "stages": {stage: figures}}.

    figures: "tokens" and "seconds" of a step, "tokens_per_s", "share_of_matmul", "peak_mb" (None: not measured).
    generate also has "step_seconds" and "share_of_copy"."""
    net, low, high = SIZES[config.size], config.completion_low, config.completion_high
    check(low <= high, f"--completion_low {low} is above --completion_high {high}")
    check(config.batch_size > 1 and config.new_tokens > 1, "--batch_size and --new_tokens must be at least 2")
    check(bool(config.stages), f"--stages needs one or several of {', '.join(STAGES)}")
    device = pick_device(config.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    ceilings = {"matmul_gflops": matmul_speed(config, device), "copy_gb": copy_speed(device)}
    machine = {"device": device.type, "name": name, "torch": torch.__version__}
    print(f"{device} ({name}), torch {torch.__version__}")
    print(f"{net.n_layer} blocks x {net.n_embd} channels, {net.vocab_size} token ids, {config.dtype}")
    print("matmul {matmul_gflops:.0f} GFLOP/s, copy {copy_gb:.0f} GB/s".format(**ceilings))
    stages = {}
    for stage in config.stages:
        stages[stage] = measure(net, config, stage, ceilings)
        gc.collect()
    print_table(stages, config)
    results = {"machine": machine, "config": asdict(config), "ceilings": ceilings, "stages": stages}
    if config.json:
        write_json(results, Path(config.json))
    return results


def main() -> None:
    run_main(run, Config, __doc__)


if __name__ == "__main__":
    main()
