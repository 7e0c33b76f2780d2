"""Stage 3a: PPO. The policy writes, the reward model scores, a KL penalty holds the policy near its start.

    python ppo.py                                             # the embedded task, after sft.py and reward_model.py
    python ppo.py --reward my_reward.py:function              # any function (prompts, completions) -> list of floats
    python ppo.py --trace                                     # print one rollout token by token

The language model is the policy, tokens are its actions, the text so far is the state. The reward of one step is

    r_t = - kl_coef * KL_t   + score if t is the last action           (Ouyang et al. 2022, eq. 2; Ziegler et al. 2019)

with KL_t the divergence from the initial model at that token, so the objective is E[score] - kl_coef * KL(policy || initial).
Advantages by GAE (Schulman et al. 2015, arXiv:1506.02438), update by PPO's clipped objective (Schulman et al. 2017,
arXiv:1707.06347). Everything below lives in the (B, T-1) frame that model.py draws.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from common import (
    RunFolder,
    UserError,
    autocast,
    call_reward,
    check,
    check_ranges,
    flag,
    gate,
    generator_for,
    gold_function,
    load_function,
    load_model,
    lr_at,
    pick_device,
    run_main,
    save_model,
)
from data.batches import Example, truncate_prompt
from data.files import read_prompts
from data.tokenizer import Tokenizer, load_tokenizer
from model import GPT, Rollout, ScalarModel, generate, masked_mean, select_logprobs, token_logprobs, whiten
from sft import load_examples, make_batch, sft_loss


@dataclass
class Config:
    prompts: str = flag("out/data/prompts.jsonl", "prompts to practise on")
    policy: str = flag("out/sft", "checkpoint to start from; its frozen copy is the reference")
    reward: str = flag("out/reward_model", "a reward model's checkpoint, or file.py:function of (prompts, completions)")
    out_dir: str = flag("out/ppo", "folder for the checkpoint and the logs")
    iterations: int = flag(18, "rollout-and-update rounds")
    rollouts: int = flag(192, "completions sampled each iteration")
    max_new_tokens: int = flag(48, "longest completion, tokens")
    temperature: float = flag(1.0, "sampling temperature; the log-probs of policy and reference are taken at it too")
    ppo_epochs: int = flag(2, "passes over each iteration's rollouts")
    minibatch: int = flag(48, "rollouts an optimiser step")
    micro_batch: int = flag(24, "rollouts a forward pass; changes memory and nothing else (0: the whole minibatch)")
    lr: float = flag(5e-4, "peak learning rate of the policy")
    value_lr: float = flag(1e-3, "peak learning rate of the value model")
    warmup: int = flag(2, "iterations of linear warm-up, before the linear decay")
    grad_clip: float = flag(1.0, "largest gradient norm, of policy and value model separately")
    gamma: float = flag(1.0, "discount")
    lam: float = flag(0.95, "GAE's lambda: 1 is Monte Carlo (unbiased), 0 one-step (low variance)")
    clip: float = flag(0.2, "PPO's clip range of the probability ratio")
    value_clip: float = flag(0.5, "clip range of the value update, in units of the normalised reward (0: off)")
    whiten_advantages: bool = flag(True, "scale each iteration's advantages to mean 0, variance 1")
    kl: str = flag(
        "k1",
        "per-token penalty: k1, k2, k3 (estimates from the sampled token) or exact (sum over the vocabulary)",
        choices=("k1", "k2", "k3", "exact"),
    )
    kl_coef: float = flag(0.1, "KL penalty, in reward per nat")
    kl_target: float = flag(0.0, "adapt kl_coef to hold this KL, nats a sequence (0: kl_coef is fixed)")
    kl_horizon: float = flag(2000.0, "rollouts over which the adaptive coefficient moves by its error")
    eos_penalty: float = flag(1.0, "subtracted from the score of a completion that was cut before EOS")
    target_kl: float = flag(0.1, "end an iteration's update when the policy has moved this far from the rollout's, nats a token (0: never)")
    ptx_coef: float = flag(0.0, "weight of the SFT loss mixed into every step (InstructGPT's PPO-ptx; 0: off)")
    ptx_data: str = flag("out/data/demonstrations.jsonl", "demonstrations for it")
    train_layers: int = flag(0, "train only the last N blocks of the policy and its final LayerNorm (0: everything)")
    gold: str = flag("auto", "true reward to log, file.py:function (auto: the embedded task's; empty: none)")
    trace: bool = flag(False, "print one rollout of each logged iteration token by token")
    log_every: int = flag(10, "iterations between printed samples")
    save_every: int = flag(0, "iterations between states to resume from (0: only at the end)")
    resume: bool = flag(False, "go on from out_dir/state.pt")
    strict: bool = flag(False, "exit with status 1 if a gate fails")
    seed: int = flag(1, "seed of prompts, samples and minibatches")
    device: str = flag("auto", "auto, cpu, cuda or mps")
    dtype: str = flag("float32", "of the matrix products", choices=("float32", "bfloat16"))
    compile: bool = flag(False, "compile the blocks with torch.compile")


# What the embedded task gives at default settings, over the last quarter of the run.
EXPECTED_SCORE = (0.9, 2.5)  # the normalised reward: 0 before PPO, in standard deviations of the SFT policy's samples
EXPECTED_KL = (0.5, 15.0)  # nats a sequence
EXPECTED_EOS = (0.98, 1.0)


# ------------------------------------------------------------------------------------------------ the mathematics


def kl_penalty(logprobs: Tensor, ref_logprobs: Tensor, kind: str = "k1") -> Tensor:
    """Estimates of KL(policy || reference) at each token, from the sampled token alone (Schulman, "Approximating KL divergence", 2020).

    logprobs, ref_logprobs (B, T-1) -> (B, T-1), nats. With d = logprobs - ref_logprobs, over samples of the policy:
    k1 = d               unbiased, also its gradient as a penalty in the reward; single values may be negative
    k2 = d^2 / 2         biased, never negative
    k3 = e^-d - 1 + d    unbiased, never negative, less variance; but as a penalty its gradient is biased
    """
    d = logprobs - ref_logprobs
    if kind == "k1":
        return d
    if kind == "k2":
        return 0.5 * d * d
    if kind == "k3":
        # Near 0 the terms cancel to d^2/2, which float32 would lose; far out e^-d would overflow.
        series = d * d * (0.5 - d / 6)
        return torch.where(d.abs() < 1e-3, series, torch.expm1((-d).clamp(max=60.0)) + d)
    raise ValueError(f"kl_penalty kind must be k1, k2 or k3, not {kind!r}")


def exact_kl(logits: Tensor, ref_logits: Tensor) -> Tensor:
    """KL(policy || reference) of the next-token distributions, summed over the vocabulary: no sampling noise.

    logits, ref_logits (B, T, V), as a model gives them (divide both by the sampling temperature before) -> (B, T-1), nats, in
    the frame: the distributions from which tokens 1..T-1 were drawn."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    logp, ref_logp = (x[:, :-1].to(wide).log_softmax(-1) for x in (logits, ref_logits))
    return (logp.exp() * (logp - ref_logp)).sum(-1)


def shaped_rewards(scores: Tensor, kl: Tensor, action_mask: Tensor, kl_coef: float) -> Tensor:
    """r_t = -kl_coef * KL_t, plus the score at the last action (the EOS, or the last token of a cut completion).

    scores (B,), kl (B, T-1), action_mask (B, T-1) -> (B, T-1), 0 where masked out."""
    mask = action_mask.bool()
    rewards = torch.where(mask, -kl_coef * kl, 0.0)
    slots = torch.arange(mask.size(1), device=mask.device)
    last = torch.where(mask, slots, -1).amax(1)  # (B,)
    if (last < 0).any():
        raise ValueError("shaped_rewards: a row has no action; where should its score go?")
    return rewards + F.one_hot(last, mask.size(1)) * scores[:, None]


def gae(rewards: Tensor, values: Tensor, action_mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al. 2015, eq. 16).

        delta_t = r_t + gamma * V_{t+1} - V_t          A_t = sum over l >= 0 of (gamma * lam)^l * delta_{t+l}

    rewards, values, action_mask (B, T-1) -> advantages, returns (B, T-1), both 0 where masked out; returns = advantages + values.
    V after the last action is 0: the text has ended (or is treated as ended when it was cut). Filler contributes nothing: it is
    masked before the sum. The sum is one product with the matrix D[s, t] = (gamma * lam)^(s-t) for s >= t.
    The actions of a row must be consecutive, as they are in the frame.
    """
    mask = action_mask.bool()
    values = torch.where(mask, values, 0.0)
    next_values = F.pad(values[:, 1:], (0, 1))  # (B, T-1) V_{t+1}; 0 after the last action
    deltas = torch.where(mask, rewards + gamma * next_values - values, 0.0)
    slots = torch.arange(mask.size(1), device=mask.device)
    ahead = slots[:, None] - slots[None, :]  # (T-1, T-1) s - t
    # in float64 where there is one: a GPU may run float32 products in TensorFloat-32, which keeps three digits
    wide = torch.float32 if mask.device.type == "mps" else torch.float64
    discount = torch.where(ahead >= 0, torch.as_tensor(gamma * lam, dtype=wide, device=mask.device) ** ahead.clamp(min=0), 0.0)
    advantages = torch.where(mask, (deltas.to(wide) @ discount).to(deltas.dtype), 0.0)
    return advantages, advantages + values


def policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, action_mask: Tensor, clip: float, n_tokens: int | Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """PPO's clipped surrogate (Schulman et al. 2017, eq. 7), negated:  -mean of min(ratio * A, clip(ratio, 1-clip, 1+clip) * A).

    All (B, T-1) -> loss, share of actions where the clipped term is the one that counts. n_tokens: what the sums are divided by
    (default: the actions here; the actions of the whole optimiser step when it is split into micro-batches)."""
    mask = action_mask.bool()
    n = mask.sum().clamp(min=1) if n_tokens is None else n_tokens
    log_ratio = torch.where(mask, logprobs - old_logprobs, 0.0).clamp(-20, 20)  # e^20 is beyond any clip range; e^90 is inf
    ratio = log_ratio.exp()
    unclipped, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip)
    loss = torch.where(mask, torch.maximum(unclipped, clipped), 0.0).sum() / n
    return loss, ((clipped > unclipped) & mask).sum() / n


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, action_mask: Tensor, clip: float, n_tokens: int | Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Half the mean squared error to the returns, pessimistically clipped:  0.5 * mean of max((V - R)^2, (V_clipped - R)^2),
    with V_clipped within `clip` of the old value, so one iteration can't move it far. max, not min: a value that has already
    moved too far may still come back. clip 0: no clipping. All (B, T-1) -> loss, share of actions clipped."""
    mask = action_mask.bool()
    n = mask.sum().clamp(min=1) if n_tokens is None else n_tokens
    # masked before the arithmetic: an inf at a masked place would give a gradient of 0 * inf = nan
    values, old_values, returns = (torch.where(mask, x, 0.0) for x in (values, old_values, returns))
    error = (values - returns) ** 2
    if not clip:
        return 0.5 * torch.where(mask, error, 0.0).sum() / n, torch.zeros((), device=values.device)
    clipped_error = (old_values + (values - old_values).clamp(-clip, clip) - returns) ** 2
    loss = 0.5 * torch.where(mask, torch.maximum(error, clipped_error), 0.0).sum() / n
    return loss, ((clipped_error > error) & mask).sum() / n


class AdaptiveKL:
    """Ziegler et al. 2019 (arXiv:1909.08593), section 2.2: move the coefficient in proportion to how far the KL is off target.

    update(kl, n): kl in nats a sequence over n sequences;  coef *= 1 + clip(kl / target - 1, -0.2, 0.2) * n / horizon."""

    def __init__(self, init_coef: float, target: float, horizon: float):
        if target <= 0 or horizon <= 0:
            raise ValueError("AdaptiveKL needs target > 0 and horizon > 0")
        self.coef, self.target, self.horizon = init_coef, target, horizon

    def update(self, kl: float, n: int) -> None:
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        self.coef *= 1 + error * n / self.horizon


# ------------------------------------------------------------------------------------------------ one iteration


@dataclass
class Experience:
    """An iteration's rollouts with all that the update needs; every (B, T-1) tensor is in the frame and 0 where masked out."""

    tokens: Tensor  # (B, T)
    lens: Tensor  # (B,)
    action_mask: Tensor  # (B, T-1)
    logprobs: Tensor  # (B, T-1) of the policy that sampled
    ref_logprobs: Tensor  # (B, T-1)
    kl: Tensor  # (B, T-1) the penalty that goes into the reward
    entropy: Tensor  # (B, T-1) of the policy
    values: Tensor  # (B, T-1) before the update
    rewards: Tensor  # (B, T-1)
    advantages: Tensor  # (B, T-1) whitened if the config says so
    returns: Tensor  # (B, T-1)


@torch.no_grad()
def make_experience(
    policy: GPT, reference: GPT, value_model: ScalarModel, rollout: Rollout, scores: Tensor, kl_coef: float, config: Config
) -> Experience:
    """KL penalty, shaped rewards, advantages of a rollout with its scores (B,)."""
    mask = rollout.action_mask  # (B, T-1)
    columns: dict[str, list[Tensor]] = {k: [] for k in ("logprobs", "ref_logprobs", "kl", "entropy", "values")}
    for model in (policy, reference, value_model):
        model.eval()  # dropout off: otherwise the ratio would not start at 1
    size = config.micro_batch or len(scores)
    for tokens in rollout.tokens.split(size):  # slices, so that only (size, T, V) logits exist at a time
        with autocast(tokens.device, config.dtype):
            # 4. KL penalty: log-probs by the training forward, not the sampler's cached one, at the sampling temperature
            logits, ref_logits = policy(tokens), reference(tokens)  # (b, T, V)
            values = value_model(tokens)[:, :-1]  # (b, T-1) V(tokens[:t+1]), before action t
        wide = torch.promote_types(logits.dtype, torch.float32)
        logits, ref_logits = logits.to(wide), ref_logits.to(wide)
        logprobs = select_logprobs(logits[:, :-1], tokens[:, 1:], config.temperature)
        ref_logprobs = select_logprobs(ref_logits[:, :-1], tokens[:, 1:], config.temperature)
        if config.kl == "exact":
            columns["kl"].append(exact_kl(logits / config.temperature, ref_logits / config.temperature))
        else:
            columns["kl"].append(kl_penalty(logprobs, ref_logprobs, config.kl))
        logp = (logits[:, :-1] / config.temperature).log_softmax(-1)
        columns["entropy"].append(-(logp.exp() * logp).sum(-1))
        columns["logprobs"].append(logprobs)
        columns["ref_logprobs"].append(ref_logprobs)
        columns["values"].append(values)
    column = {k: torch.where(mask, torch.cat(v), 0.0) for k, v in columns.items()}

    # 5. shape rewards
    rewards = shaped_rewards(scores, column["kl"], mask, kl_coef)
    # 6. advantages: returns are formed first, then the advantages are whitened, under the mask
    advantages, returns = gae(rewards, column["values"], mask, config.gamma, config.lam)
    if config.kl == "exact":
        # KL_t is a property of the state: in r_t it is the same for every token that could be chosen there, so no token would feel its
        # own divergence. What a token adds to the mean, log pi/pi_ref - KL_t, has mean 0 and carries exactly that gradient.
        own = torch.where(mask, column["logprobs"] - column["ref_logprobs"] - column["kl"], 0.0)
        advantages = advantages - kl_coef * own
    if config.whiten_advantages:
        advantages = whiten(advantages, mask)
    return Experience(rollout.tokens, rollout.lens, mask, rewards=rewards, advantages=advantages, returns=returns, **column)


def update(
    policy: GPT,
    value_model: ScalarModel,
    optimizer: torch.optim.Optimizer,
    experience: Experience,
    config: Config,
    generator: torch.Generator,
    extra_loss: Callable[[], Tensor] | None = None,
) -> dict[str, float]:
    """Several epochs of clipped PPO steps over permuted minibatches. Policy and value model are separate networks, so their
    losses just add up: no value coefficient to tune (the learning rates are separate). -> what happened, as floats."""
    B, device = experience.tokens.size(0), experience.tokens.device
    # eval: no dropout in the update either, so that the first ratio is exactly 1 (Ziegler et al. trained without it too)
    policy.eval()
    value_model.eval()
    trained = [p for p in policy.parameters() if p.requires_grad]
    lens = experience.lens.tolist()
    totals: dict[str, list[Tensor]] = {k: [] for k in ("policy_loss", "value_loss", "clip_fraction", "value_clip_fraction", "approx_kl", "grad_norm")}
    first_ratio, stopped = 1.0, False
    for _ in range(config.ppo_epochs):
        order = torch.randperm(B, generator=generator, device=generator.device).tolist()
        for start in range(0, B, config.minibatch):
            # micro-batches of similar length, each cut to its longest row: less filler, and the same gradient
            rows = sorted(order[start : start + config.minibatch], key=lambda i: lens[i])
            n_tokens = experience.action_mask[rows].sum()  # of the whole step
            optimizer.zero_grad(set_to_none=True)
            step = {k: torch.zeros((), device=device) for k in totals}
            size = config.micro_batch or len(rows)
            for first in range(0, len(rows), size):
                part = rows[first : first + size]
                T = lens[part[-1]] if device.type != "cuda" else experience.tokens.size(1)  # a GPU wants constant shapes
                tokens = experience.tokens[part, :T]  # (b, T)
                mask, old_logprobs, advantages, old_values, returns = (
                    x[part, : T - 1]
                    for x in (experience.action_mask, experience.logprobs, experience.advantages, experience.values, experience.returns)
                )
                with autocast(device, config.dtype):
                    logprobs = token_logprobs(policy, tokens, config.temperature)  # (b, T-1)
                    values = value_model(tokens)[:, :-1]  # (b, T-1)
                p_loss, p_clipped = policy_loss(logprobs, old_logprobs, advantages, mask, config.clip, n_tokens)
                v_loss, v_clipped = value_loss(values, old_values, returns, mask, config.value_clip, n_tokens)
                (p_loss + v_loss).backward()
                with torch.no_grad():
                    log_ratio = torch.where(mask, logprobs - old_logprobs, 0.0)
                    if not totals["approx_kl"]:  # the first minibatch: nothing has moved yet
                        deviation = (log_ratio.exp() - 1).abs().max().nan_to_num(nan=torch.inf).item()
                        first_ratio = max(first_ratio, 1 + deviation)
                    # KL(policy of the rollout || policy now) on the rollout's samples: k3 with the roles exchanged
                    approx_kl = torch.where(mask, kl_penalty(old_logprobs, logprobs, "k3"), 0.0).sum() / n_tokens
                    for key, value in (
                        ("policy_loss", p_loss),
                        ("value_loss", v_loss),
                        ("clip_fraction", p_clipped),
                        ("value_clip_fraction", v_clipped),
                        ("approx_kl", approx_kl),
                    ):
                        step[key] += value.detach()
            if not totals["approx_kl"] and first_ratio > (1.001 if config.dtype == "float32" else 1.2):
                raise RuntimeError(
                    f"the probability ratio on the first minibatch is {first_ratio:.4f}, not 1: rollout and update compute different log-probs"
                )
            if config.target_kl and step["approx_kl"].item() > config.target_kl:
                stopped = True  # before this step is taken: it has gone too far already
                break
            if extra_loss is not None:
                extra_loss().backward()
            step["grad_norm"] = torch.nn.utils.clip_grad_norm_(trained, config.grad_clip).detach()
            torch.nn.utils.clip_grad_norm_(value_model.parameters(), config.grad_clip)
            optimizer.step()
            for key, value in step.items():
                totals[key].append(value)
        if stopped:
            break
    stats = {k: torch.stack(v).mean().item() if v else 0.0 for k, v in totals.items()}
    return {**stats, "first_ratio": first_ratio, "updates": len(totals["approx_kl"]), "stopped_early": stopped}


def make_optimizer(policy: GPT, value_model: ScalarModel, config: Config) -> torch.optim.Adam:
    """Adam with eps 1e-5, as OpenAI's code had it: with 1e-8 the first steps, where second moments are tiny, are far larger."""
    groups = [
        {"params": [p for p in policy.parameters() if p.requires_grad], "lr": config.lr},
        {"params": list(value_model.parameters()), "lr": config.value_lr},
    ]
    return torch.optim.Adam(groups, eps=1e-5, fused=True)


def freeze_all_but_last(policy: GPT, n: int) -> None:
    """Train only the last n blocks and the final LayerNorm. The token embedding is also the output layer (tied), so it stays."""
    check(0 < n <= len(policy.h), f"--train_layers must be between 1 and the model's {len(policy.h)} blocks")
    policy.requires_grad_(False)
    for module in [*policy.h[-n:], policy.ln_f]:
        module.requires_grad_(True)


# ------------------------------------------------------------------------------------------------ reward


def load_reward(spec: str, tokenizer: Tokenizer, device) -> tuple[Callable[[Rollout, list[str], list[str]], Tensor], ScalarModel | None]:
    """A checkpoint or file.py:function -> (score(rollout, prompts, completions) -> (B,), the reward model if it is one).
    A reward model reads the very ids that the policy wrote; a function reads text."""
    if ":" in spec and ".py" in spec:
        function = load_function(spec)
        return lambda rollout, prompts, completions: torch.tensor(call_reward(function, prompts, completions, spec), device=device), None
    model, name = load_model(spec, device, "scalar", "python reward_model.py")
    check(name == tokenizer.name, f"--reward {spec} reads {name} tokens, the policy writes {tokenizer.name} tokens")

    @torch.no_grad()
    def score(rollout: Rollout, prompts: list[str], completions: list[str]) -> Tensor:
        parts = zip(rollout.tokens.split(64), rollout.lens.split(64), strict=True)
        return torch.cat([model.score(tokens[:, : int(lens.max())], lens) for tokens, lens in parts])

    return score, model


def ptx_loss(policy: GPT, demonstrations: list[Example], tokenizer: Tokenizer, config: Config, iteration: int) -> Callable[[], Tensor]:
    """InstructGPT's PTX term (Ouyang et al. 2022, eq. 2): every call is ptx_coef times the SFT loss of a fresh batch of
    demonstrations, so that the policy keeps doing what they do."""
    generator = generator_for(torch.device("cpu"), config.seed, iteration, 3)

    def loss() -> Tensor:
        rows = torch.randint(len(demonstrations), (config.minibatch,), generator=generator).tolist()
        tokens, mask = make_batch([demonstrations[i] for i in rows], tokenizer.eos_id, policy.device)
        return config.ptx_coef * sft_loss(policy(tokens), tokens, mask)

    return loss


def print_trace(experience: Experience, tokenizer: Tokenizer, row: int = 0) -> None:
    """One rollout, token by token."""
    tqdm.write(f"{'token':>14} {'logprob':>8} {'ref':>8} {'kl':>7} {'reward':>7} {'value':>7} {'advant.':>8} {'return':>7}")
    for t in experience.action_mask[row].nonzero().squeeze(1).tolist():
        figures = [
            x[row, t].item()
            for x in (
                experience.logprobs,
                experience.ref_logprobs,
                experience.kl,
                experience.rewards,
                experience.values,
                experience.advantages,
                experience.returns,
            )
        ]
        token = tokenizer.decode([int(experience.tokens[row, t + 1])])
        tqdm.write(f"{token!r:>14} " + " ".join(f"{x:{w}.3f}" for x, w in zip(figures, (8, 8, 7, 7, 7, 8, 7), strict=True)))


# ------------------------------------------------------------------------------------------------ the loop


def train(config: Config) -> dict:
    check_ranges(config)
    check(0 < config.minibatch <= config.rollouts, f"--minibatch must be between 1 and --rollouts ({config.rollouts})")
    check(config.temperature > 0, "--temperature must be above 0: a policy that doesn't sample can't learn by trial")
    check(0 <= config.lam <= 1 and 0 <= config.gamma <= 1 and config.clip > 0, "--lam and --gamma must be in [0, 1], --clip above 0")
    device = pick_device(config.device)
    torch.manual_seed(config.seed)
    policy, tokenizer_name = load_model(config.policy, device, made_by="python sft.py")
    tokenizer = load_tokenizer(tokenizer_name)
    reference = copy.deepcopy(policy).requires_grad_(False)
    score, reward_model = load_reward(config.reward, tokenizer, device)
    gold = gold_function(config.gold, tokenizer_name)
    # The value model starts as the reward model, which knows already what a good text looks like; without one, as the policy's
    # body under a head of zeros, so that the first advantages are just the rewards.
    value_model = copy.deepcopy(reward_model) if reward_model is not None else ScalarModel.from_gpt(policy)
    if reward_model is None:
        torch.nn.init.zeros_(value_model.head.weight)
    if config.train_layers:
        freeze_all_but_last(policy, config.train_layers)
    room = policy.config.block_size - config.max_new_tokens
    check(room > 0, f"--max_new_tokens {config.max_new_tokens} leaves no room for a prompt in block_size {policy.config.block_size}")
    prompts = read_prompts(config.prompts, "python -m data.tiny")
    demonstrations = load_examples(config.ptx_data, tokenizer, policy.config.block_size) if config.ptx_coef else []
    optimizer = make_optimizer(policy, value_model, config)
    controller = AdaptiveKL(config.kl_coef, config.kl_target, config.kl_horizon) if config.kl_target else None
    if config.compile:
        for block in [*policy.h, *reference.h, *value_model.gpt.h]:
            block.compile()

    run = RunFolder(config, config.resume)
    start, kl_coef = 0, config.kl_coef
    if config.resume:
        state = run.load_state(device)
        policy.load_state_dict(state["policy"])
        value_model.load_state_dict(state["value_model"])
        optimizer.load_state_dict(state["optimizer"])
        start, kl_coef = state["step"], state["kl_coef"]
        if controller:
            controller.coef = kl_coef
    cpu = torch.device("cpu")
    history: list[dict] = []
    bar = tqdm(range(start, config.iterations), initial=start, total=config.iterations, desc="ppo", mininterval=1)
    for iteration in bar:
        clock = [time.perf_counter()]
        # 1. sample prompts
        order = torch.randint(len(prompts), (config.rollouts,), generator=generator_for(cpu, config.seed, iteration, 0))
        texts = [prompts[i] for i in order.tolist()]
        ids = [truncate_prompt(tokenizer.encode_prompt(p), room) for p in texts]
        # 2. roll out: by temperature alone. top-k or top-p would sample from another distribution than the one trained.
        rollout = generate(
            policy,
            ids,
            config.max_new_tokens,
            eos_id=tokenizer.eos_id,
            temperature=config.temperature,
            generator=generator_for(device, config.seed, iteration, 1),
        )
        completions = [tokenizer.decode(c) for c in rollout.completions()]
        clock.append(time.perf_counter())
        # 3. score; a completion that was cut before its EOS loses eos_penalty (no EOS is invented)
        raw_scores = score(rollout, texts, completions)  # (B,)
        scores = raw_scores - config.eos_penalty * (~rollout.ended)
        # 4.-6. KL penalty, shaped rewards, advantages
        experience = make_experience(policy, reference, value_model, rollout, scores, kl_coef, config)
        clock.append(time.perf_counter())

        # 7. update
        factor = lr_at(iteration, config.iterations, config.warmup, "linear")
        for group, peak in zip(optimizer.param_groups, (config.lr, config.value_lr), strict=True):
            group["lr"] = peak * factor
        extra_loss = ptx_loss(policy, demonstrations, tokenizer, config, iteration) if demonstrations else None
        stats = update(policy, value_model, optimizer, experience, config, generator_for(cpu, config.seed, iteration, 2), extra_loss)
        clock.append(time.perf_counter())

        # 8. log
        mask = experience.action_mask
        kl = experience.kl.sum(1).mean().item()  # the very tensor that went into the reward, nats a sequence
        k3 = torch.where(mask, kl_penalty(experience.logprobs, experience.ref_logprobs, "k3"), 0.0).sum(1).mean().item()
        residual = (experience.returns - experience.values)[mask]
        variance = experience.returns[mask].var(correction=0)
        figures = {
            "step": iteration + 1,
            "score": raw_scores.mean().item(),
            "kl": kl,
            "k3": k3,
            "kl_coef": kl_coef,
            "objective": scores.mean().item() - kl_coef * kl,
            "entropy": masked_mean(experience.entropy, mask).item(),
            "explained_variance": (1 - residual.var(correction=0) / variance).item() if variance > 0 else 0.0,
            "length": mask.sum(1).float().mean().item(),
            "eos_rate": rollout.ended.float().mean().item(),
            "distinct": len(set(completions)) / len(completions),
            **stats,
        }
        if gold is not None:
            figures["gold"] = sum(call_reward(gold, texts, completions, "the gold reward")) / len(texts)
        shares = [(b - a) / (clock[-1] - clock[0]) for a, b in pairwise(clock)]
        run.log(
            **figures, lr=config.lr * factor, seconds=clock[-1] - clock[0], share_rollout=shares[0], share_score=shares[1], share_update=shares[2]
        )
        history.append(figures)
        if not math.isfinite(figures["policy_loss"]) or not math.isfinite(figures["value_loss"]):
            raise UserError(
                f"the loss is not finite at iteration {iteration + 1}; lower --lr, or look at the rewards in {Path(config.out_dir) / 'metrics.jsonl'}"
            )
        if controller:
            controller.update(kl, config.rollouts)
            kl_coef = controller.coef
        bar.set_postfix(score=f"{figures['score']:.2f}", kl=f"{kl:.1f}", **({"gold": f"{figures['gold']:.2f}"} if gold else {}))
        last = iteration + 1 == config.iterations
        if (iteration + 1) % config.log_every == 0 or iteration == 0 or last:
            for text, completion, value in list(zip(texts, completions, raw_scores.tolist(), strict=True))[:3]:
                tqdm.write(f"  [{value:+.2f}] {text!r} -> {completion!r}")
            if config.trace:
                print_trace(experience, tokenizer)
        if (config.save_every and (iteration + 1) % config.save_every == 0) or last:
            run.save_state(
                iteration + 1, policy=policy.state_dict(), value_model=value_model.state_dict(), optimizer=optimizer.state_dict(), kl_coef=kl_coef
            )

    save_model(config.out_dir, policy, tokenizer.name, "ppo.py", config)
    tail = history[-max(1, config.iterations // 4) :]
    results: dict = (
        {k: sum(h[k] for h in tail) / len(tail) for k in ("score", "kl", "k3", "eos_rate", "distinct", "length", *(["gold"] if gold else []))}
        if tail
        else {}
    )
    results["gates"] = []
    if tail and tokenizer.name == "tiny" and reward_model is not None:
        gold_note = f"gold {history[0]['gold']:.2f} -> {results['gold']:.2f}" if gold else ""
        results["gates"].append(
            gate(
                "PPO reward-model score",
                results["score"],
                *EXPECTED_SCORE,
                f"{history[0]['score']:.2f} at the start" + (f"; {gold_note}" if gold_note else ""),
            )
        )
        results["gates"].append(gate("PPO KL, nats a sequence", results["kl"], *EXPECTED_KL))
        results["gates"].append(gate("PPO EOS rate", results["eos_rate"], *EXPECTED_EOS))
    elif tail:
        print("PPO, last quarter: " + ", ".join(f"{k} {v:.3f}" for k, v in results.items() if k != "gates"))
    return run.finish(results)


def main() -> None:
    run_main(train, Config, __doc__)


if __name__ == "__main__":
    main()
