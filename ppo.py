"""Stage 3a: PPO. The policy writes, the reward model scores, a KL penalty holds the policy near its start.

    python ppo.py                                      # the embedded task, after sft.py and reward_model.py
    python ppo.py --reward my_reward.py:function       # any function (prompts, completions) -> list of floats
    python ppo.py --reward out/reward_model my_reward.py:function --reward_weights 0.5 0.5
    python ppo.py --trace                              # print one rollout token by token

The language model is the policy, tokens are its actions, the text so far is the state. The reward of one step is

    r_t = - kl_coef * KL_t   + score if t is the last action           (Ouyang et al. 2022, eq. 2; Ziegler et al. 2019)

with KL_t the divergence from the initial model at that token, so the objective is E[score] - kl_coef * KL(policy ||
initial). Advantages by GAE (Schulman et al. 2015, arXiv:1506.02438), update by PPO's clipped objective (Schulman et al.
2017, arXiv:1707.06347). Everything below lives in the (B, T-1) frame that model.py draws.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn import functional as F

from lib.cli import TrainConfig, check, check_ranges, flag, run_main
from lib.reward import COMBINES, call_reward, gold_function
from lib.run import RunFolder
from lib.train import autocast, clip_gradients, due, generator_for
from frozen import make_reference
from lib.checkpoint import load_model, note_task
from lib.reward import load_reward
from lib.run import last_quarter
from lib.train import lr_at, pick_device, prepare_blocks
from frozen import sampling, share_frozen
from lib.checkpoint import save_model
from lib.show import print_trace, rollout_figures, shares, show_samples
from lib.train import progress
from frozen import train_last_layers, trainable
from data.batches import Example, encode_prompts, load_examples, micro_batches, minibatches
from data.files import read_prompts, sibling
from data.tiny import task_of
from data.tokenizer import load_tokenizer
from frame import put_back, select_logprobs
from model import GPT, ScalarModel, at_least_float32
from sampling import Rollout, generate
from frame import token_logprobs, whiten
from sft import demonstration_loss

KL_KINDS = ("k1", "k2", "k3")  # estimates from the sampled token alone: kl_penalty


@dataclass
class Config(TrainConfig):
    prompts: str = flag("out/data/prompts.jsonl", "prompts to practise on")
    policy: str = flag("out/sft", "checkpoint to start from; its frozen copy is the reference")
    reward: list[str] = flag(["out/reward_model"], "reward models' checkpoints or file.py:function, one or several")
    reward_weights: list[float] = flag([], "factor of each reward (none: 1 each)")
    reward_combine: str = flag("sum", "one reward from several, after weighting", choices=COMBINES)
    out_dir: str = flag("out/ppo", "folder for the checkpoint and the logs")
    iterations: int = flag(21, "rollout-and-update rounds", low=1)
    rollouts: int = flag(192, "completions sampled each iteration", low=1)
    max_new_tokens: int = flag(48, "longest completion, tokens", low=1)
    temperature: float = flag(1.0, "of sampling; the log-probs of policy and reference are taken at it too", above=0)
    ppo_epochs: int = flag(2, "passes over each iteration's rollouts", low=1)
    minibatch: int = flag(48, "rollouts an optimiser step", low=1)
    micro_batch: int = flag(24, "rollouts a forward pass; changes memory and nothing else (0: the minibatch)", low=0)
    lr: float = flag(2e-4, "peak learning rate of the policy", low=0)
    value_lr: float = flag(5e-4, "peak learning rate of the value model", low=0)
    warmup: int = flag(2, "iterations of linear warm-up, before the linear decay", low=0)
    gamma: float = flag(1.0, "discount", low=0, high=1)
    lam: float = flag(0.95, "GAE's lambda: 1 is Monte Carlo (unbiased), 0 one-step (low variance)", low=0, high=1)
    clip: float = flag(0.2, "PPO's clip range of the probability ratio", above=0)
    value_clip: float = flag(0.5, "clip range of the value update, in units of the normalised reward (0: off)", low=0)
    whiten_advantages: bool = flag(True, "scale each iteration's advantages to mean 0, variance 1")
    kl: str = flag("k1", "per-token penalty, from the sampled token or exact", choices=(*KL_KINDS, "exact"))
    kl_coef: float = flag(0.1, "KL penalty, in reward per nat", low=0)
    kl_target: float = flag(0.0, "adapt kl_coef to hold this KL, nats a sequence (0: kl_coef is fixed)", low=0)
    kl_horizon: float = flag(500.0, "rollouts over which the adaptive coefficient moves by its error", above=0)
    eos_penalty: float = flag(1.0, "subtracted from the score of a completion that was cut before EOS", low=0)
    stop_kl: float = flag(0.1, "end an update this far from the rollout's policy, nats a token (0: never)", low=0)
    ptx_coef: float = flag(0.0, "weight of the SFT loss mixed into every step (InstructGPT's PPO-ptx; 0: off)", low=0)
    ptx_data: str = flag("auto", "demonstrations for it (auto: demonstrations.jsonl beside the prompts)")
    gold: str = flag("auto", "true reward to log, file.py:function (auto: the embedded task's; empty: none)")
    trace: bool = flag(False, "print one rollout of each logged iteration token by token")
    log_every: int = flag(10, "iterations between printed samples", low=1)

    def __post_init__(self):
        self.reward = [self.reward] if isinstance(self.reward, str) else self.reward


# What the embedded task gives at default settings, over the last quarter of the run: figure, its name, from, to.
EXPECTED = (
    ("score", "PPO reward-model score", 0.9, 2.5),  # 0 before PPO, in standard deviations of the SFT policy's samples
    ("kl", "PPO KL, nats a sequence", 0.5, 15.0),
    ("eos_rate", "PPO EOS rate", 0.98, 1.0),
)


# -------------------------------------------------------------------------------- the mathematics


def kl_penalty(logprobs: Tensor, ref_logprobs: Tensor, kind: str = "k1") -> Tensor:
    """Estimates of KL(policy || reference) at each token, from the sampled token alone (Schulman, "Approximating KL
    divergence", 2020).

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
    raise ValueError(f"kind must be one of {', '.join(KL_KINDS)}, not {kind!r}")


def distribution_kl(logits: Tensor, ref_logits: Tensor) -> Tensor:
    """KL(policy || reference) of next-token distributions, summed over the vocabulary: no sampling noise.

    logits, ref_logits (..., V), divided by the sampling temperature -> (...), nats."""
    logp = at_least_float32(logits).log_softmax(-1)
    return (logp.exp() * (logp - at_least_float32(ref_logits).log_softmax(-1))).sum(-1)


def exact_kl(logits: Tensor, ref_logits: Tensor) -> Tensor:
    """distribution_kl in the frame: logits, ref_logits (B, T, V), as models give them -> (B, T-1)."""
    return distribution_kl(logits[:, :-1], ref_logits[:, :-1])


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

    rewards, values, action_mask (B, T-1) -> advantages, returns = advantages + values (B, T-1), 0 where masked out.
    V after the last action is 0: the text has ended (or is treated as ended when it was cut). Filler contributes
    nothing: it is masked before the sum. The sum is one product with a matrix D, D[s, t] = (gamma * lam)^(s-t) for
    s >= t. The actions of a row must be consecutive, as they are in the frame."""
    mask = action_mask.bool()
    values = torch.where(mask, values, 0.0)
    next_values = F.pad(values[:, 1:], (0, 1))  # (B, T-1) V_{t+1}; 0 after the last action
    deltas = torch.where(mask, rewards + gamma * next_values - values, 0.0)
    slots = torch.arange(mask.size(1), device=mask.device)
    ahead = slots[:, None] - slots[None, :]  # (T-1, T-1) s - t
    # in float64 where there is one: a GPU may run float32 products in TensorFloat-32, which keeps three digits
    wide = torch.float32 if mask.device.type == "mps" else torch.float64
    base = torch.tensor(gamma * lam, dtype=wide, device=mask.device)
    discount = torch.where(ahead >= 0, base ** ahead.clamp(min=0), 0.0)  # D
    advantages = torch.where(mask, (deltas.to(wide) @ discount).to(deltas.dtype), 0.0)
    return advantages, advantages + values


def policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, action_mask: Tensor, clip: float, n_tokens=None
) -> tuple[Tensor, Tensor]:
    """PPO's clipped surrogate (Schulman et al. 2017, eq. 7), negated: with ratio = pi / pi_old

        L = -mean of  min(ratio * A, clip(ratio, 1 - clip, 1 + clip) * A)

    All (B, T-1) -> loss, share of actions where the clipped term is the one that counts. n_tokens: what the sums are
    divided by (default: the actions here; those of the whole optimiser step when it goes in micro-batches)."""
    mask = action_mask.bool()
    n = mask.sum().clamp(min=1) if n_tokens is None else n_tokens
    log_ratio = torch.where(mask, logprobs - old_logprobs, 0.0)
    ratio = log_ratio.clamp(-20, 20).exp()  # e^20 is beyond any clip range; e^90 is inf
    unclipped, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip)
    loss = torch.where(mask, torch.maximum(unclipped, clipped), 0.0).sum() / n
    return loss, ((clipped > unclipped) & mask).sum() / n


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, action_mask: Tensor, clip: float, n_tokens=None
) -> tuple[Tensor, Tensor]:
    """Half the mean squared error to the returns, pessimistically clipped:

        L = 1/2 mean of  max((V - R)^2, (V_clipped - R)^2),     V_clipped = V_old + clip(V - V_old, -clip, clip)

    so that one iteration can't move V far. max, not min: a value that has moved too far already may still come back.
    clip 0: none. All (B, T-1) -> loss, share of actions clipped."""
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
    """The KL coefficient. With a target it moves in proportion to how far the KL is off (Ziegler et al. 2019,
    arXiv:1909.08593, section 2.2); target 0 leaves it alone.

    update(kl, n): kl in nats a sequence over n sequences;  coef *= 1 + clip(kl / target - 1, -0.2, 0.2) * n / horizon.
    n / horizon counts as 1 at most, so that one update changes coef by a fifth at most and never its sign."""

    def __init__(self, init_coef: float, target: float, horizon: float):
        if target < 0 or horizon <= 0:
            raise ValueError("AdaptiveKL needs target >= 0 and horizon > 0")
        if target and init_coef <= 0:
            raise ValueError("AdaptiveKL needs an init_coef above 0: a product that starts at 0 stays there")
        self.coef, self.target, self.horizon = init_coef, target, horizon

    def update(self, kl: float, n: int) -> None:
        if self.target:
            error = min(max(kl / self.target - 1, -0.2), 0.2)
            self.coef *= 1 + error * min(1.0, n / self.horizon)


# -------------------------------------------------------------------------------- experience


def may_cut(config: Config, device: torch.device) -> bool:
    """May rows be cut to the longest of their micro-batch? Not where shapes must stay: for compiled GPU kernels, and in
    bfloat16, where attention over another width rounds differently and moves a log-prob by up to 0.01."""
    return device.type != "cuda" and config.dtype == "float32"


@dataclass
class Experience:
    """An iteration's rollouts with all that the update needs; (B, T-1) tensors are in the frame, 0 where masked out."""

    tokens: Tensor  # (B, T)
    lens: Tensor  # (B,)
    ended: Tensor  # (B,)
    action_mask: Tensor  # (B, T-1)
    logprobs: Tensor  # (B, T-1) of the policy that sampled
    ref_logprobs: Tensor  # (B, T-1)
    kl: Tensor  # (B, T-1) the penalty that goes into the reward
    k3: Tensor  # (B, T-1) another estimate of it for the log, never negative
    entropy: Tensor  # (B, T-1) of the policy
    values: Tensor  # (B, T-1) before the update; 0 without a value model
    rewards: Tensor  # (B, T-1)
    advantages: Tensor  # (B, T-1) whitened if the config says so
    returns: Tensor  # (B, T-1)
    below: Tensor | None = None  # (B, T, C) with --train_layers: what the frozen blocks make of the tokens

    def rows(self, index: list[int], cut: bool = True) -> Experience:
        """Some rows, cut to the longest of them or as wide as before."""
        less = self.tokens.size(1) - int(self.lens[index].max()) if cut else 0
        there = [x for f in fields(self) if (x := getattr(self, f.name)) is not None]  # `below`, the last, may not be
        return Experience(*(x[index] if x.dim() == 1 else x[index, : x.size(1) - less] for x in there))


MEASURED = ("logprobs", "ref_logprobs", "kl", "k3", "entropy", "values")


@torch.no_grad()
def measure(
    policy: GPT, reference: GPT, value_model: ScalarModel | None, rollout: Rollout, config: Config
) -> dict[str, Tensor]:
    """What the networks say about a rollout: the columns MEASURED of an Experience, 0 where masked out, and `below`.

    By the forward pass that the update uses too, not the sampler's cached one, at the sampling temperature: only then
    does the first ratio equal 1. A few rows of similar length at a time, and logits at the sampled tokens alone."""
    for model in (policy, reference, value_model):
        if model is not None:
            model.eval()  # dropout off, or the ratio would not start at 1
    lens, cut = rollout.lens.tolist(), may_cut(config, rollout.tokens.device)
    columns = policy.wte.weight.new_zeros(len(MEASURED), *rollout.action_mask.shape)  # (6, B, T-1)
    known = columns.new_zeros(*rollout.tokens.shape, policy.config.n_embd) if policy.frozen else None  # (B, T, C)
    for rows in micro_batches(list(range(len(lens))), config.micro_batch, length=lambda i: lens[i]):
        T = max(lens[i] for i in rows) if cut else rollout.tokens.size(1)
        tokens, mask = rollout.tokens[rows, :T], rollout.action_mask[rows, : T - 1]  # (b, t), (b, t-1)
        chosen = tokens[:, 1:][mask]  # (n,) the sampled tokens
        with autocast(tokens.device, config.dtype):
            below = policy.trunk(tokens) if policy.frozen else None  # (b, t, C) once for all who have it in common
            logits = policy(tokens, mask, below=below) / config.temperature  # (n, V)
            ref_logits = reference(tokens, mask, below=below) / config.temperature  # (n, V)
            values = value_model(tokens, mask, below=below) if value_model is not None else chosen * 0.0  # (n,)
        logp = logits.log_softmax(-1)  # (n, V)
        logprobs = logp.gather(1, chosen[:, None]).squeeze(1)  # (n,), like all that follows
        ref_logprobs = select_logprobs(ref_logits, chosen)
        k3, entropy = kl_penalty(logprobs, ref_logprobs, "k3"), -(logp.exp() * logp).sum(-1)
        exact = config.kl == "exact"
        kl = distribution_kl(logits, ref_logits) if exact else kl_penalty(logprobs, ref_logprobs, config.kl)
        told = (logprobs, ref_logprobs, kl, k3, entropy, values)
        columns[:, rows, : T - 1] = torch.stack([put_back(x, mask) for x in told]).to(columns.dtype)
        if known is not None:
            known[rows, :T] = below
    return dict(zip(MEASURED, columns, strict=True)) | {"below": known}


@torch.no_grad()
def make_experience(
    policy: GPT,
    reference: GPT,
    value_model: ScalarModel | None,
    rollout: Rollout,
    scores: Tensor,
    kl_coef: float,
    config: Config,
) -> Experience:
    """KL penalty, shaped rewards and advantages of a rollout with its scores (B,)."""
    mask = rollout.action_mask  # (B, T-1)
    told = measure(policy, reference, value_model, rollout, config)
    rewards = shaped_rewards(scores, told["kl"], mask, kl_coef)
    # returns are formed first; only then are the advantages whitened, under the mask
    advantages, returns = gae(rewards, told["values"], mask, config.gamma, config.lam)
    if config.kl == "exact":
        # KL_t depends on the state alone: as a reward it says nothing about the token that was chosen there. The
        # gradient of sum_a pi(a) log(pi(a) / ref(a)) is E[grad log pi(a) * (log-ratio(a) - KL_t)]: that is the token's
        # own share.
        own = torch.where(mask, told["logprobs"] - told["ref_logprobs"] - told["kl"], 0.0)
        advantages = advantages - kl_coef * own
    if config.whiten_advantages:
        advantages = whiten(advantages, mask)
    shaped = {"rewards": rewards, "advantages": advantages, "returns": returns}
    return Experience(rollout.tokens, rollout.lens, rollout.ended, mask, **told, **shaped)


# -------------------------------------------------------------------------------- update

STATISTICS = ("policy_loss", "value_loss", "clip_fraction", "value_clip_fraction", "approx_kl", "grad_norm")


def update(
    policy: GPT,
    value_model: ScalarModel | None,
    optimizer: torch.optim.Optimizer,
    experience: Experience,
    config: Config,
    generator: torch.Generator,
    extra_losses: Callable[[], Iterator[Tensor]] | None = None,
) -> dict[str, float]:
    """Several epochs of clipped PPO steps -> STATISTICS, averaged over the steps, first_ratio, updates, stopped_early.

    Policy and value model are separate networks, so their losses just add up: no value coefficient to tune. Without a
    value model (None) the policy alone learns. extra_losses yields further losses of every step, already weighted.
    RuntimeError if the first ratio is not 1."""
    models = [policy] if value_model is None else [policy, value_model]
    for model in models:
        model.eval()  # no dropout in the update either (Ziegler et al. trained without): the first ratio is exactly 1
    lens, device = experience.lens.tolist(), experience.tokens.device
    steps: list[Tensor] = []
    first_ratio, stopped = 1.0, False
    for rows in minibatches(len(lens), config.minibatch, config.ppo_epochs, generator):
        n_tokens = experience.action_mask[rows].sum()  # of the whole step
        optimizer.zero_grad(set_to_none=True)
        figures = torch.zeros(len(STATISTICS), device=device)
        # micro-batches of similar length, each cut to its longest row: less filler, and the same gradient
        for part in micro_batches(rows, config.micro_batch, length=lambda i: lens[i]):
            old = experience.rows(part, may_cut(config, device))
            mask = old.action_mask  # (b, t-1), like all of `old`
            with autocast(device, config.dtype):
                logprobs = token_logprobs(policy, old.tokens, config.temperature, mask, below=old.below)  # (b, t-1)
                values = old.values  # (b, t-1)
                if value_model is not None:
                    values = put_back(value_model(old.tokens, mask, below=old.below), mask)
            p_loss, p_clipped = policy_loss(logprobs, old.logprobs, old.advantages, mask, config.clip, n_tokens)
            v_loss, v_clipped = value_loss(values, old.values, old.returns, mask, config.value_clip, n_tokens)
            (p_loss + v_loss).backward()
            with torch.no_grad():
                # KL(policy of the rollout || policy now) on the rollout's samples: k3 with the roles exchanged
                moved = torch.where(mask, kl_penalty(old.logprobs, logprobs, "k3"), 0.0).sum() / n_tokens
                figures[:5] += torch.stack([p_loss, v_loss, p_clipped, v_clipped, moved])
                if not steps:  # nothing has moved yet
                    ratio = torch.where(mask, logprobs - old.logprobs, 0.0).exp()
                    first_ratio = max(first_ratio, 1 + (ratio - 1).abs().max().nan_to_num(nan=torch.inf).item())
        if not steps and not first_ratio <= 1.001:
            raise RuntimeError(f"the first probability ratio is {first_ratio:.4f}, not 1: rollout and update disagree")
        stopped = config.stop_kl > 0 and figures[4].item() > config.stop_kl
        if stopped:  # before this step is taken
            break
        for loss in extra_losses() if extra_losses is not None else ():
            loss.backward()
        norms = [clip_gradients(model, config.grad_clip) for model in models]  # one for each network
        figures[5] = norms[0]
        optimizer.step()
        steps.append(figures)
    means = torch.stack(steps).mean(0).tolist() if steps else [0.0] * len(STATISTICS)
    facts = {"first_ratio": first_ratio, "updates": len(steps), "stopped_early": stopped}
    return dict(zip(STATISTICS, means, strict=True)) | facts


def make_optimizer(policy: GPT, value_model: ScalarModel | None, config: Config) -> torch.optim.Adam:
    """Adam with eps 1e-5, as in OpenAI's code: with 1e-8 the first steps, while second moments are tiny, are huge."""
    groups = [{"params": trainable(policy), "lr": config.lr}]
    if value_model is not None:
        groups.append({"params": trainable(value_model), "lr": config.value_lr})
    return torch.optim.Adam(groups, eps=1e-5, fused=True)


def ptx_losses(
    policy: GPT, demonstrations: list[Example], config: Config, iteration: int
) -> Callable[[], Iterator[Tensor]]:
    """InstructGPT's PTX term (Ouyang et al. 2022, eq. 2), so that the policy keeps doing what the demonstrations do.
    Every call draws a batch of them and yields its SFT loss times ptx_coef, one micro-batch after the other."""
    rng = generator_for(torch.device("cpu"), config.seed, iteration, 3)

    def losses() -> Iterator[Tensor]:
        drawn = torch.randint(len(demonstrations), (config.minibatch,), generator=rng).tolist()
        batch = [demonstrations[i] for i in drawn]
        n_tokens = sum(len(e.completion) for e in batch)
        for part in micro_batches(batch, config.micro_batch):
            yield config.ptx_coef * demonstration_loss(policy, part, n_tokens, config.dtype)

    return losses


# -------------------------------------------------------------------------------- the loop


def train(config: Config) -> dict:
    check_ranges(config)
    check(config.minibatch <= config.rollouts, f"--minibatch must be at most --rollouts ({config.rollouts})")
    check(not config.kl_target or config.kl_coef > 0, "--kl_target needs a --kl_coef above 0 to start from")
    device, cpu = pick_device(config.device), torch.device("cpu")
    torch.manual_seed(config.seed)
    start_from = load_model(config.policy, device, made_by="python sft.py")
    policy, tokenizer = start_from.model, load_tokenizer(start_from.tokenizer)
    train_last_layers(policy, config.train_layers)
    reference = make_reference(policy)
    texts, task = read_prompts(config.prompts, "python -m data.tiny"), task_of(config.prompts)
    note_task(start_from, task, config.prompts)
    mix = {"weights": config.reward_weights, "combine": config.reward_combine, "dtype": config.dtype}
    score, reward_models = load_reward(config.reward, start_from, task, device, **mix)
    gold = gold_function(config.gold, task)
    value_model = initial_value_model(policy, reward_models, config)
    train_last_layers(value_model, min(config.train_layers, len(value_model.gpt.h)))
    for model in (value_model, *reward_models):  # those that were trained alike have these blocks in common
        share_frozen(model.gpt, policy)
    block_size = policy.config.block_size
    prompts = encode_prompts(texts, tokenizer, block_size, config.max_new_tokens, config.prompts)
    ptx_data = sibling(config.prompts, "demonstrations.jsonl") if config.ptx_data == "auto" else config.ptx_data
    check(not config.ptx_coef or bool(ptx_data), f"--ptx_coef needs --ptx_data; none is beside {config.prompts}")
    demonstrations = load_examples(ptx_data if config.ptx_coef else "", tokenizer, block_size)
    optimizer = make_optimizer(policy, value_model, config)
    controller = AdaptiveKL(config.kl_coef, config.kl_target, config.kl_horizon)
    prepare_blocks(config, policy, reference, value_model)
    run = RunFolder(config, config.iterations)
    if run.done:
        return run.done
    state = run.resume(policy=policy, value_model=value_model, optimizer=optimizer)
    controller.coef = state.get("kl_coef", controller.coef)

    bar = progress(state["step"], config.iterations, "ppo")
    for iteration in bar:
        clock = [time.perf_counter()]
        # 1. sample prompts
        rng = generator_for(cpu, config.seed, iteration, 0)
        drawn = torch.randint(len(prompts), (config.rollouts,), generator=rng).tolist()
        asked = [texts[i] for i in drawn]
        # 2. roll out, by temperature alone: top-k or top-p would sample from another distribution than the one trained
        rng = generator_for(device, config.seed, iteration, 1)
        options = {"eos_id": tokenizer.eos_id, "temperature": config.temperature, "generator": rng}
        with sampling(policy, config.dtype):
            rollout = generate(policy, [prompts[i] for i in drawn], config.max_new_tokens, **options)
        completions = [tokenizer.decode(c) for c in rollout.completions()]
        clock.append(time.perf_counter())
        # 3. score; a completion that was cut before its EOS loses eos_penalty (no EOS is invented)
        raw_scores = score(rollout, asked, completions)  # (B,)
        scores = raw_scores - config.eos_penalty * (~rollout.ended)
        # 4. KL penalty, 5. shaped rewards, 6. advantages
        experience = make_experience(policy, reference, value_model, rollout, scores, controller.coef, config)
        clock.append(time.perf_counter())
        # 7. update
        factor = lr_at(iteration, config.iterations, config.warmup, "linear")
        for group, peak in zip(optimizer.param_groups, (config.lr, config.value_lr), strict=True):
            group["lr"] = peak * factor
        extra_losses = ptx_losses(policy, demonstrations, config, iteration) if demonstrations else None
        rng = generator_for(cpu, config.seed, iteration, 2)
        stats = update(policy, value_model, optimizer, experience, config, rng, extra_losses)
        clock.append(time.perf_counter())
        # 8. log, and move the KL coefficient
        figures = rollout_figures(experience, completions, raw_scores, scores, controller.coef) | stats
        if gold is not None:
            golds = call_reward(gold, asked, completions, rollout.ended.tolist(), "the gold reward")
            figures["gold"] = sum(golds) / len(golds)
        run.log(step=iteration + 1, **figures, lr=config.lr * factor, **shares(clock, ("rollout", "score", "update")))
        controller.update(figures["kl"], config.rollouts)
        bar.set_postfix({k: f"{figures[k]:.2f}" for k in ("score", "kl", "gold") if k in figures})
        if iteration == 0 or due(iteration, config.log_every, config.iterations):
            show_samples(rollout, tokenizer, raw_scores)
            if config.trace:
                print_trace(experience, tokenizer)
        if due(iteration, config.save_every, config.iterations):
            parts = {"policy": policy, "value_model": value_model, "optimizer": optimizer}
            run.save_state(iteration + 1, **parts, kl_coef=controller.coef)

    save_model(config.out_dir, policy, tokenizer.saved, "ppo.py", config, task)
    usual = task == "tiny" and len(reward_models) == len(config.reward) == 1 and not config.reward_weights
    return run.finish(last_quarter(run.history("score"), EXPECTED if usual else ()))


def initial_value_model(policy: GPT, reward_models: list[ScalarModel], config: Config) -> ScalarModel:
    """It starts as the reward model, which knows what a good text looks like, in the units of its weight. A function's
    units are not known: with one in the reward the head starts at 0, so the first advantages are just the rewards."""
    weights = config.reward_weights or [1.0] * len(config.reward)
    scale = {"sum": sum(weights), "mean": 1.0, "mean-std": 1.0, "min": weights[0]}[config.reward_combine]
    if reward_models and len(reward_models) == len(config.reward) and scale:
        value_model = copy.deepcopy(reward_models[0])
        value_model.std /= scale
        return value_model
    value_model = ScalarModel.from_gpt(reward_models[0].gpt if reward_models else policy)
    torch.nn.init.zeros_(value_model.head.weight)
    return value_model


def main() -> None:
    run_main(train, Config, __doc__)


if __name__ == "__main__":
    main()
