"""How fast the stages run on this machine, and how much of what the machine can do that is.

    python -m tools.bench                                       # a network of the embedded task's size
    python -m tools.bench --size gpt2 --stages sft generate     # of GPT-2's size
    python -m tools.bench --size smollm2 --batch_size 8 --repeats 3 --micro_batch 2  # SmolLM2-135M's, on two cores
    python -m tools.bench --compile --json out/bench.json
    python -m tools.bench --compare                             # beside the same steps written with `transformers`

It needs no data: weights and token ids are random, and the learning rate is 0, so every repeat does the same work. What
runs is what the scripts run: their losses, micro-batches, optimisers and default --micro_batch.

    tokens/s    real tokens a second, filler not counted: prompts and completions of an optimiser step; of PPO those of
                an iteration, however often it reads them; of `generate` the new ones
    of matmul   operations that these tokens need / time / what the fastest matrix product reaches here. A token needs 2
                operations forward and 4 backward for each weight it is multiplied with: nothing is counted for filler,
                for logits nobody asks for, and for attention's own products (a few percent)
    of copy     weights, keys and values that a step of `generate` has to read / time / the speed at which a large
                tensor is copied; a network that fits the processor's cache may come above 100%
    peak MB     memory at its height, in a process of its own, above what the libraries take
"""

from __future__ import annotations

import copy
import gc
import importlib.util
import math
import multiprocessing
import random
import re
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from itertools import pairwise
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
from data.batches import Example, RankedExamples, make_batch, micro_batches, ranked_batch
from frame import completion_mask, whiten
from lib.cli import DTYPES, Flags, check, flag, run_main
from lib.reward import score_rollout
from lib.run import write_json
from lib.train import autocast, clip_gradients, compile_blocks, generator_for, pick_device
from lib.weights import save_pretrained
from model import GPT, LLAMA, GPTConfig, ScalarModel
from sampling import Rollout, generate, numbers_cached

STAGES = ("sft", "reward_model", "dpo", "ppo", "generate")
SIZES = ("tiny", "gpt2", "smollm2")


@dataclass
class Config(Flags):
    size: str = flag("tiny", "tiny: as the flags say; gpt2, smollm2: theirs, but for flags given", choices=SIZES)
    n_layer: int = flag(4, "blocks", low=1)
    n_embd: int = flag(128, "channels", low=1)
    n_head: int = flag(4, "attention heads", low=1)
    vocab_size: int = flag(512, "token ids", low=2)
    n_kv_head: int = flag(0, "heads of keys and values (0: n_head)", low=0)
    n_inner: int = flag(0, "width of the MLP's hidden layer (0: 4 times the channels)", low=0)
    rope_base: float = flag(0.0, "base of rotary positions (0: learned positions, as in GPT-2)", low=0)
    block: str = flag("gpt2", "GPT-2's block or Llama's", choices=("gpt2", "llama"))
    batch_size: int = flag(64, "texts an optimiser step (two of them are a pair), rollouts an iteration of PPO", low=4)
    prompt: int = flag(20, "tokens of every prompt", low=1)
    completion_low: int = flag(4, "tokens of the shortest completion", low=1)
    completion_high: int = flag(24, "tokens of the longest; here PPO's rollouts, which end by chance, are cut", low=1)
    new_tokens: int = flag(100, "tokens that `generate` adds to every prompt", low=2)
    stages: list[str] = flag(list(STAGES), "what to measure", choices=STAGES)
    micro_batch: int = flag(0, "texts (pairs, rollouts) a forward pass (0: each script's default)", low=0)
    repeats: int = flag(10, "measured steps of each stage, after two that are not", low=1)
    memory: bool = flag(True, "measure memory too, in processes of their own")
    compare: bool = flag(False, "take turns with plain transformers (and TRL's log-probs, if trl is installed)")
    json: str = flag("", "file for the results (empty: none)")
    seed: int = flag(1, "seed of weights and tokens", low=0)
    device: str = flag("auto", "auto, cpu, cuda or mps")
    dtype: str = flag("float32", "of the matrix products while training", choices=DTYPES)
    compile: bool = flag(False, "compile the blocks with torch.compile")


TEXTS = {"prompt": 128, "completion_low": 128, "completion_high": 128, "new_tokens": 128, "batch_size": 8}
GPT2 = {"n_layer": 12, "n_embd": 768, "n_head": 12, "vocab_size": 50257, **TEXTS}
SMOLLM2 = {"n_layer": 30, "n_embd": 576, "n_head": 9, "n_kv_head": 3, "n_inner": 1536, "vocab_size": 49152}
SMOLLM2 |= {"rope_base": 1e5, "block": "llama", **TEXTS}
EOS, PPO_EPOCHS, WARM_UP = 0, 4, 2

# -------------------------------------------------------------------------------- what a step needs, what there is

Texts = list[tuple[int, int]]  # tokens of each prompt and its completion


def tokens_of(stage: str, texts: Texts) -> int:
    return sum(c if stage == "generate" else p + c for p, c in texts)


def gpt_config(config: Config) -> GPTConfig:
    block_size = config.prompt + max(config.completion_high, config.new_tokens)
    more = {"rope_base": config.rope_base, "n_kv_head": config.n_kv_head, "n_inner": config.n_inner}
    more |= LLAMA if config.block == "llama" else {}
    return GPTConfig(config.vocab_size, block_size, config.n_layer, config.n_head, config.n_embd, **more)


def needed_flops(stage: str, texts: Texts, config: Config) -> float:
    """Operations of the products with weights in one step, of real tokens and where the result is used. The prompt of a
    pair is read once."""
    net, rows = gpt_config(config), len(texts)
    C = net.n_embd
    # weights of a block: up to keys and values, and behind them (GPT-2: 3 C^2 and 9 C^2)
    lower = C * (net.n_head + 2 * net.n_kv_head) * (C // net.n_head)
    upper = C * C + C * net.n_inner * (3 if net.mlp == "swiglu" else 2)
    read, acted = sum(p + c for p, c in texts), sum(c for _, c in texts)

    def forward(read: int, used: int, outputs: int) -> int:
        """All blocks for the tokens read; but the last one behind its keys and values, and the head, for the `used`
        positions alone."""
        return 2 * (((net.n_layer - 1) * (lower + upper) + lower) * read + (upper + outputs * C) * used)

    read -= sum(p for p, _ in texts) // 2 if stage in ("reward_model", "dpo") else 0
    policy, value, score = forward(read, acted, config.vocab_size), forward(read, acted, 1), forward(read, rows, 1)
    generating = forward(read - rows, acted, config.vocab_size)  # the last token is sampled, but not read
    if stage == "ppo":  # the scorer, policy and reference, value model; then the update
        return generating + score + 2 * policy + value + PPO_EPOCHS * 3 * (policy + value)
    return {"sft": 3 * policy, "reward_model": 3 * score, "dpo": (1 + 3) * policy, "generate": generating}[stage]


def decode_bytes(policy: GPT, config: Config) -> float:
    """What a step of `generate` reads: every weight once, and the keys and values of all tokens so far, on average."""
    weights = sum(p.numel() for name, p in policy.named_parameters() if name != "wpe.weight")
    cached = config.batch_size * (config.prompt + config.new_tokens / 2) * numbers_cached(policy.config)
    return 4 * (weights + cached)


def now(device: torch.device) -> float:
    """Seconds, once the GPU has done all that it was given."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()
    return time.perf_counter()


def timed(f: Callable, device: torch.device) -> tuple[float, object]:
    """Run f -> its seconds, what it returns."""
    start = now(device)
    result = f()
    return now(device) - start, result


def matmul_speeds(config: Config, device: torch.device) -> dict[str, float]:
    """GFLOP/s of F.linear in the shapes of the model's layers, for a micro-batch of 16 texts, and of a large one."""
    C, side = config.n_embd, 4096 if device.type == "cuda" else 1024
    rows = min(16, config.batch_size) * (config.prompt + (config.completion_low + config.completion_high) // 2)
    shapes = {"c_attn": (rows, C, 3 * C), "c_fc": (rows, C, 4 * C), "c_proj": (rows, 4 * C, C)}
    shapes |= {"lm_head": (rows, C, config.vocab_size), "large": (side, side, side)}
    speeds = {}
    for name, (n, inner, outer) in shapes.items():
        x, w = (torch.randn(k, inner, device=device, dtype=getattr(torch, config.dtype)) for k in (n, outer))
        fastest = min(timed(lambda x=x, w=w: F.linear(x, w), device)[0] for _ in range(20))
        speeds[name] = 2 * n * inner * outer / fastest / 1e9
    return speeds


def copy_speed(device: torch.device) -> float:
    """GB/s of a copy of 256 MB: what it reads and what it writes."""
    source = torch.ones(2**26, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / min(timed(lambda: target.copy_(source), device)[0] for _ in range(5)) / 1e9


# -------------------------------------------------------------------------------- the stages' own steps


class Start(NamedTuple):
    """What a stage starts from."""

    config: Config
    device: torch.device
    policy: GPT
    reference: GPT | None  # of dpo.py and ppo.py
    scorer: ScalarModel | None  # of reward_model.py and ppo.py
    batches: list[list]  # of each step: Example for sft.py, RankedExamples for reward_model.py and dpo.py, else prompts


class Done(NamedTuple):
    """What a step has worked on."""

    texts: Texts
    seconds: tuple[float, ...] = ()  # of PPO's rollout, score and update


Step = Callable[[list], Done]  # a batch goes in: one optimiser step, one iteration of PPO, or one `generate`


def make_start(config: Config, stage: str) -> Start:
    device, rng = pick_device(config.device), random.Random(config.seed)
    torch.manual_seed(config.seed)
    low, high, paired = config.completion_low, config.completion_high, stage in ("reward_model", "dpo")
    policy = GPT(gpt_config(config)).to(device)
    if stage == "ppo" and config.block == "gpt2":
        # A rollout is to end at any token with a probability of about p. What the final LayerNorm puts out sums to 0
        # before its bias is added, so with a bias of 1 a constant row of the embedding has a constant logit.
        p = 2 / (low + high) if low < high else 1e-9
        policy.ln_f.bias.data.fill_(1.0)
        policy.wte.weight.data[EOS] = math.log((config.vocab_size - 1) * p / (1 - p)) / config.n_embd

    def ids(n: int) -> list[int]:
        return [rng.randrange(1, config.vocab_size) for _ in range(n)]

    def item() -> Example | RankedExamples | list[int]:
        prompt = ids(config.prompt)
        texts = [Example(prompt, ids(rng.randint(low, high))) for _ in range(1 + paired)]
        return RankedExamples(texts, [0, 1]) if paired else texts[0] if stage == "sft" else prompt

    batches = [[item() for _ in range(config.batch_size // (1 + paired))] for _ in range(WARM_UP + config.repeats)]
    reference = copy.deepcopy(policy).requires_grad_(False) if stage in ("dpo", "ppo") else None
    scorer = ScalarModel.from_gpt(policy) if stage in ("reward_model", "ppo") else None
    return Start(config, device, policy, reference, scorer, batches)


def parts_of(config: Config) -> dict[str, int]:
    """--micro_batch, where it is given."""
    return {"micro_batch": config.micro_batch} if config.micro_batch else {}


def adamw(model: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.99), weight_decay=0.01, fused=True)


def optimiser_step(model, optimizer, batch: list, config, loss_of: Callable[[list], Tensor]) -> Done:
    """What stands in the loop of sft.py, reward_model.py and dpo.py."""
    optimizer.zero_grad(set_to_none=True)
    for part in micro_batches(batch, config.micro_batch):
        loss_of(part).backward()
    clip_gradients(model, config.grad_clip)
    optimizer.step()
    examples = [e for item in batch for e in getattr(item, "examples", [item])]
    return Done([(len(e.prompt), len(e.completion)) for e in examples])


def own_sft(s: Start) -> Step:
    own = sft.Config(lr=0.0, dtype=s.config.dtype, **parts_of(s.config))
    optimizer = sft.make_optimizer(s.policy.train(), own)

    def step(batch: list[Example]) -> Done:
        n_tokens = sum(len(e.completion) for e in batch)

        def loss_of(part: list[Example]) -> Tensor:
            return sft.demonstration_loss(s.policy, part, n_tokens, own.dtype)

        return optimiser_step(s.policy, optimizer, batch, own, loss_of)

    return step


def own_reward_model(s: Start) -> Step:
    own = reward_model.Config(lr=0.0, dtype=s.config.dtype, **parts_of(s.config))
    optimizer = adamw(s.scorer.train())

    def loss_of(part: list[RankedExamples]) -> Tensor:
        batch = ranked_batch(part, s.device)
        with autocast(s.device, own.dtype):
            scores = s.scorer(batch.tokens, batch.ends, batch.positions)  # (N, 2)
        return reward_model.ranking_loss(scores, batch.ranks)

    return lambda batch: optimiser_step(s.scorer, optimizer, batch, own, loss_of)


def own_dpo(s: Start) -> Step:
    own, optimizer = dpo.Config(lr=0.0, dtype=s.config.dtype, **parts_of(s.config)), adamw(s.policy.eval())

    def loss_of(part: list[RankedExamples]) -> Tensor:
        return dpo.pair_losses(s.policy, s.reference, part, own)[0].mean()

    return lambda batch: optimiser_step(s.policy, optimizer, batch, own, loss_of)


def ppo_config(config: Config) -> ppo.Config:
    sizes = {"max_new_tokens": config.completion_high, "minibatch": config.batch_size // 4, **parts_of(config)}
    return ppo.Config(lr=0.0, value_lr=0.0, stop_kl=0.0, ppo_epochs=PPO_EPOCHS, dtype=config.dtype, **sizes)


def own_ppo(s: Start) -> Step:
    own, value_model = ppo_config(s.config), copy.deepcopy(s.scorer)
    optimizer, drawn = ppo.make_optimizer(s.policy, value_model, own), generator_for(s.device, s.config.seed)
    order = generator_for("cpu", s.config.seed)
    if s.config.compile:
        compile_blocks(s.reference, value_model)

    def step(prompts: list[list[int]]) -> Done:
        clock = [now(s.device)]
        rollout = generate(s.policy, prompts, own.max_new_tokens, eos_id=EOS, generator=drawn)
        clock.append(now(s.device))
        scores = score_rollout(s.scorer, rollout) - own.eos_penalty * (~rollout.ended)
        networks = (s.policy, s.reference, value_model)
        experience = ppo.make_experience(*networks, rollout, scores, own.kl_coef, own)
        clock.append(now(s.device))
        ppo.update(s.policy, value_model, optimizer, experience, own, order)
        clock.append(now(s.device))
        return Done(texts_of(rollout), tuple(b - a for a, b in pairwise(clock)))

    return step


def texts_of(rollout: Rollout) -> Texts:
    return list(zip(rollout.prompt_lens.tolist(), (rollout.lens - rollout.prompt_lens).tolist(), strict=True))


def own_generate(s: Start, new_tokens: int = 0) -> Step:
    n, drawn = new_tokens or s.config.new_tokens, generator_for(s.device, s.config.seed)
    no_eos = s.config.vocab_size  # an id that no token has: no row ends early
    return lambda prompts: Done(texts_of(generate(s.policy, prompts, n, eos_id=no_eos, generator=drawn)))


# -------------------------------------------------------------------------------- the same in plain transformers


def their_model(gpt: GPT, kind: str = "GPT2LMHeadModel", **options) -> nn.Module:
    """transformers' model with our weights, in float32 and without dropout, as ours is."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(gpt, folder)
        model = getattr(transformers, kind).from_pretrained(folder, dtype=torch.float32, **options)
    return model.to(gpt.device).train(gpt.training)


def their_scalar(scorer: ScalarModel) -> nn.Module:
    """One number a position."""
    model = their_model(scorer.gpt, "GPT2ForTokenClassification", num_labels=1)
    model.dropout = nn.Identity()
    model.classifier.load_state_dict(scorer.head.state_dict())
    return model.to(scorer.gpt.device)


def their_outputs(model: nn.Module, tokens: Tensor, lens: Tensor, dtype: str) -> Tensor:
    """(B, T, V) logits, or (B, T, 1)."""
    real = torch.arange(tokens.size(1), device=tokens.device) < lens[:, None]
    with autocast(tokens.device, dtype):
        return model(input_ids=tokens, attention_mask=real.long()).logits.float()


def their_logprobs(model: nn.Module, tokens: Tensor, lens: Tensor, mask: Tensor, dtype: str) -> Tensor:
    """(B, T-1), 0 where mask (B, T) is false."""
    logits, ids = their_outputs(model, tokens, lens, dtype)[:, :-1], tokens[:, 1:]
    if importlib.util.find_spec("trl"):
        from trl.trainer.utils import selective_log_softmax

        return selective_log_softmax(logits, ids) * mask[:, 1:]
    return logits.log_softmax(-1).gather(2, ids[..., None]).squeeze(2) * mask[:, 1:]


def their_sft(s: Start) -> Step:
    own, model = sft.Config(), their_model(s.policy.train())
    optimizer = adamw(model)

    def step(batch: list[Example]) -> Done:
        n_tokens = sum(len(e.completion) for e in batch)

        def loss_of(part: list[Example]) -> Tensor:
            tokens, prompt_lens, lens = make_batch(part, s.device)
            labels = tokens.masked_fill(~completion_mask(prompt_lens, lens, tokens.size(1)), -100)
            logits = their_outputs(model, tokens, lens, s.config.dtype)[:, :-1].flatten(0, 1)
            return F.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum") / n_tokens

        return optimiser_step(model, optimizer, batch, own, loss_of)

    return step


def their_scores(model: nn.Module, tokens: Tensor, lens: Tensor, dtype: str) -> Tensor:
    """(B,) at the last real token."""
    return their_outputs(model, tokens, lens, dtype).squeeze(2).gather(1, lens[:, None] - 1).squeeze(1)


def their_reward_model(s: Start) -> Step:
    own, model = reward_model.Config(), their_scalar(s.scorer.train())
    optimizer = adamw(model)

    def loss_of(part: list[RankedExamples]) -> Tensor:
        tokens, _, lens = make_batch([e for item in part for e in item.examples], s.device)
        chosen, rejected = their_scores(model, tokens, lens, s.config.dtype).view(-1, 2).unbind(1)
        return -F.logsigmoid(chosen - rejected).mean()

    return lambda batch: optimiser_step(model, optimizer, batch, own, loss_of)


def their_dpo(s: Start) -> Step:
    own, model, reference = dpo.Config(), their_model(s.policy.eval()), their_model(s.reference.eval())
    optimizer = adamw(model)

    def logprobs(network: nn.Module, part: list[RankedExamples]) -> Tensor:
        tokens, prompt_lens, lens = make_batch([e for item in part for e in item.examples], s.device)
        mask = completion_mask(prompt_lens, lens, tokens.size(1))
        return their_logprobs(network, tokens, lens, mask, s.config.dtype).sum(1).view(-1, 2)  # (N, 2)

    with torch.no_grad():
        told = {id(item): logprobs(reference, [item])[0] for batch in s.batches for item in batch}

    def loss_of(part: list[RankedExamples]) -> Tensor:
        chosen, rejected = (logprobs(model, part) - torch.stack([told[id(item)] for item in part])).unbind(1)
        return -F.logsigmoid(own.beta * (chosen - rejected)).mean()

    return lambda batch: optimiser_step(model, optimizer, batch, own, loss_of)


def their_samples(model: nn.Module, prompts: list[list[int]], device: torch.device, **options) -> Tensor:
    ids = torch.tensor(prompts, device=device)
    options |= {"do_sample": True, "top_k": 0, "pad_token_id": EOS, "eos_token_id": EOS}
    return model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)


def their_generate(s: Start) -> Step:
    n, model = s.config.new_tokens, their_model(s.policy.eval())

    def step(prompts: list[list[int]]) -> Done:
        tokens = their_samples(model, prompts, s.device, max_new_tokens=n, min_new_tokens=n)
        return Done([(s.config.prompt, tokens.size(1) - s.config.prompt)] * len(prompts))

    return step


def their_ppo(s: Start) -> Step:
    own, P = ppo_config(s.config), s.config.prompt
    policy, reference = their_model(s.policy.eval()), their_model(s.reference.eval())
    scorer, value_model = their_scalar(s.scorer.eval()), their_scalar(s.scorer.eval())
    optimizer = torch.optim.Adam([*policy.parameters(), *value_model.parameters()], lr=0.0, eps=1e-5, fused=True)

    def step(prompts: list[list[int]]) -> Done:
        tokens = their_samples(policy, prompts, s.device, max_new_tokens=own.max_new_tokens)  # (B, T)
        stops, prompt_lens = tokens[:, P:] == EOS, torch.full_like(tokens[:, 0], P)
        lens = torch.where(stops.any(1), P + 1 + stops.int().argmax(1), tokens.size(1))
        mask = completion_mask(prompt_lens, lens, tokens.size(1))  # (B, T)
        acted = mask[:, 1:]
        with torch.no_grad():
            scores = their_scores(scorer, tokens, lens, own.dtype) - own.eos_penalty * (~stops.any(1))
            logprobs, ref_logprobs = (their_logprobs(m, tokens, lens, mask, own.dtype) for m in (policy, reference))
            values = their_outputs(value_model, tokens, lens, own.dtype)[:, :-1, 0]
            rewards = ppo.shaped_rewards(scores, logprobs - ref_logprobs, acted, own.kl_coef)
            advantages, returns = ppo.gae(rewards, values, acted, own.gamma, own.lam)
            advantages = whiten(advantages, acted)
        for _ in range(PPO_EPOCHS):
            for rows in torch.randperm(len(prompts), device=s.device).split(own.minibatch):
                new = their_logprobs(policy, tokens[rows], lens[rows], mask[rows], own.dtype)
                v = their_outputs(value_model, tokens[rows], lens[rows], own.dtype)[:, :-1, 0]
                p_loss, _ = ppo.policy_loss(new, logprobs[rows], advantages[rows], acted[rows], own.clip)
                v_loss, _ = ppo.value_loss(v, values[rows], returns[rows], acted[rows], own.value_clip)
                optimizer.zero_grad(set_to_none=True)
                (p_loss + v_loss).backward()
                for model in (policy, value_model):
                    clip_gradients(model, own.grad_clip)
                optimizer.step()
        return Done(texts_of(Rollout(tokens, prompt_lens, lens, stops.any(1))))

    return step


# -------------------------------------------------------------------------------- measuring

OWN = (own_sft, own_reward_model, own_dpo, own_ppo, own_generate)
THEIR = (their_sft, their_reward_model, their_dpo, their_ppo, their_generate)
SIDES = {"ours": dict(zip(STAGES, OWN, strict=True)), "transformers": dict(zip(STAGES, THEIR, strict=True))}


def make_step(s: Start, stage: str, side: str) -> Step:
    step = SIDES[side][stage](s)
    if s.config.compile and side == "ours":
        compile_blocks(s.scorer if stage == "reward_model" else s.policy)
    return step


def resident_peak() -> float:
    """MB that this process has held at most; nan where the system doesn't say. (getrusage counts the parent's.)"""
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return int(found[1]) / 1024 if found else math.nan


def peak_memory(config: Config, stage: str, side: str) -> float:
    """MB that two steps take at most, in a fresh process. First those of a network next to nothing, for the libraries:
    what they take is not counted."""
    nothing = replace(config, n_layer=1, n_embd=2 * config.n_head, vocab_size=16, batch_size=4)
    for c in (nothing, config):
        before = resident_peak()
        s = make_start(c, stage)
        step = make_step(s, stage, side)
        for batch in s.batches[:WARM_UP]:
            step(batch)
    return torch.cuda.max_memory_allocated() / 2**20 if s.device.type == "cuda" else resident_peak() - before


def measure(config: Config, stage: str, ceilings: dict) -> dict:
    """-> the figures that `run` describes. Ours and transformers take turns, so that both meet the same machine."""
    sides, memory = list(SIDES)[: 1 + config.compare], {}
    for side in sides if config.memory else []:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:
            memory[side] = fresh.submit(peak_memory, config, stage, side).result()
    torch.compiler.reset()  # what was compiled for another stage
    s = make_start(config, stage)
    steps = {side: make_step(s, stage, side) for side in sides}
    runs: dict[str, list[tuple[float, Done]]] = {side: [] for side in sides}  # seconds, what was done
    for number in tqdm(range(len(s.batches)), stage, disable=None):
        for side, step in steps.items():
            runs[side].append(timed(lambda step=step, n=number: step(s.batches[n]), s.device))
    first = runs["ours"][0][0]
    ours, *theirs = (rows[WARM_UP:] for rows in runs.values())
    speeds = [tokens_of(stage, done.texts) / seconds for seconds, done in ours]
    rates = [needed_flops(stage, done.texts, config) / seconds for seconds, done in ours]
    figures = {
        "tokens": median(tokens_of(stage, done.texts) for _, done in ours),
        "seconds": median(seconds for seconds, _ in ours),
        "tokens_per_s": median(speeds),
        "share_of_matmul": median(rates) / ceilings["matmul_gflops"] / 1e9,
        "peak_mb": memory.get("ours"),
    }
    if config.compile:
        figures["compile_seconds"] = first - figures["seconds"]
    if stage == "ppo":
        phases = [median(phase) for phase in zip(*(done.seconds for _, done in ours), strict=True)]
        names = ("rollout", "score", "update")
        figures["shares"] = {name: t / sum(phases) for name, t in zip(names, phases, strict=True)}
    if stage == "generate":
        prefill = own_generate(s, 1)
        alone = median(timed(lambda batch=batch: prefill(batch), s.device)[0] for batch in s.batches)
        figures["step_seconds"] = (figures["seconds"] - alone) / (config.new_tokens - 1)
        speed = decode_bytes(s.policy, config) / figures["step_seconds"]
        figures["share_of_copy"] = speed / ceilings["copy_gb"] / 1e9
    if theirs:
        other = [tokens_of(stage, done.texts) / seconds for seconds, done in theirs[0]]
        ratios = [a / b for a, b in zip(speeds, other, strict=True)]
        figures["transformers"] = {"tokens_per_s": median(other), "peak_mb": memory.get("transformers")}
        figures["ratio"] = [median(speeds) / median(other), min(ratios), max(ratios)]
    return figures


def print_table(stages: dict[str, dict], config: Config) -> None:
    rows = [["stage", "tokens", "ms", "tokens/s", "of matmul", "of copy", "peak MB"]]
    rows[0] += ["compile s"] * config.compile + ["transformers", "its MB", "ratio [range]"] * config.compare
    for name, f in stages.items():
        copied, theirs = f.get("share_of_copy", math.nan), f.get("transformers", {})
        told = [f"{f['tokens']:.0f}", f"{1000 * f['seconds']:.1f}", f"{f['tokens_per_s']:,.0f}"]
        told += [f"{f['share_of_matmul']:.0%}", f"{copied:.0%}", f"{f['peak_mb'] or math.nan:.0f}"]
        if config.compile:
            told.append(f"{f['compile_seconds']:.1f}")
        if theirs:
            told += [f"{theirs['tokens_per_s']:,.0f}", f"{theirs['peak_mb'] or math.nan:.0f}"]
            told.append("{:.2f} [{:.2f}, {:.2f}]".format(*f["ratio"]))
        rows.append([name, *("-" if "nan" in cell else cell for cell in told)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *rest in rows:
        cells = (cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True))
        print("  ".join([first.ljust(widths[0]), *cells]))
    print("tokens and ms of a step (medians); tokens/s of real tokens; shares of what this machine reaches; --help")
    if "ppo" in stages:
        print("ppo: " + ", ".join(f"{name} {share:.0%}" for name, share in stages["ppo"]["shares"].items()))
    if "generate" in stages:
        print(f"generate: {1000 * stages['generate']['step_seconds']:.2f} ms a step of {config.batch_size} rows")


def run(config: Config) -> dict:
    """-> {"machine", "config", "ceilings": {"matmul_gflops", "matmul_shapes", "copy_gb"}, "stages": {stage: figures}}.

    figures: "tokens" and "seconds" of a step, "tokens_per_s", "share_of_matmul", "peak_mb" (None: not measured); of PPO
    also the "shares" of its phases; of generate "step_seconds" and "share_of_copy"; with --compile "compile_seconds";
    with --compare "transformers" ("tokens_per_s", "peak_mb") and "ratio": ours to theirs, of the medians, least, most.
    """
    if config.size != "tiny":
        sizes = GPT2 if config.size == "gpt2" else SMOLLM2
        config = replace(config, **{k: v for k, v in sizes.items() if getattr(config, k) == getattr(Config, k)})
    low, high = config.completion_low, config.completion_high
    check(low <= high, f"--completion_low {low} is above --completion_high {high}")
    check(bool(config.stages), f"--stages needs one or several of {', '.join(STAGES)}")
    check(config.n_embd % config.n_head == 0, f"--n_embd {config.n_embd} is not a multiple of --n_head {config.n_head}")
    chance = "ppo" in config.stages and low < high
    check(
        not chance or config.block == "gpt2",
        "with --block llama rollouts don't end by chance: give --completion_low and --completion_high the same value",
    )
    if config.compare:
        check(importlib.util.find_spec("transformers") is not None, "--compare needs `pip install transformers`")
        like_gpt2 = config.block == "gpt2" and not config.rope_base and not config.n_kv_head
        check(like_gpt2, "--compare is with GPT-2: leave --block, --n_kv_head and --rope_base as they are")
    device = pick_device(config.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    shapes, copied = matmul_speeds(config, device), copy_speed(device)
    ceilings = {"matmul_gflops": max(shapes.values()), "matmul_shapes": shapes, "copy_gb": copied}
    packages = [p for p in ("torch", "transformers", "trl") if config.compare or p == "torch"]
    versions = {p: version(p) for p in packages if importlib.util.find_spec(p)}
    machine = {"device": device.type, "name": name, **versions}
    print(f"{device} ({name}), {', '.join(map(' '.join, versions.items()))}")
    print(f"{config.n_layer} blocks x {config.n_embd} channels, {config.vocab_size} token ids, {config.dtype}")
    print("matmul GFLOP/s: " + ", ".join(f"{k} {v:.0f}" for k, v in shapes.items()) + f"; copy GB/s: {copied:.0f}")
    stages = {}
    for stage in config.stages:
        stages[stage] = measure(config, stage, ceilings)
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
