"""Stage 3a: PPO. The policy writes, the reward model scores, a KL penalty holds the policy near its start.

    python ppo.py                                      # the embedded task, after sft.py and reward_model.py
    python ppo.py --reward my_reward.py:function       # any function (prompts, completions) -> list of floats
    python ppo.py --reward out/reward_model my_reward.py:function --reward_weights 0.5 0.5
    python ppo.py --trace                              # print one rollout token by token

The language model is the policy, tokens are its actions, the text so far is the state. The reward of one step is

    r_t = - kl_coef * KL_t   + score if t is the last action           (Ouyang et al. 2022, eq. 2; Ziegler et al. 2019)

with KL_t the divergence from the initial model at that token, so the objective is E[score] - kl_coef * KL(policy ||
initial). Advantages by GAE (Schulman et al. 2015, arXiv:1506.02438), update by PPO's clipped objective (Schulman et al.
2017, arXiv:1707.06347). Everything below lives in the (B, T-1) frame that frame.py draws.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn import functional as F

from data.batches import demonstrations_beside, micro_batches, minibatches
from frame import action_logprobs, at_last_action, check_first_ratio, put_back, whiten
from frozen import train_like, trainable, trunk
from lib.checkpoint import save_model
from lib.cli import check, flag, run_main
from lib.run import RunFolder, last_quarter
from lib.setup import RewardConfig, set_up
from lib.show import rollout_figures, show_samples
from lib.train import autocast, clip_gradients, generator_for, prepare_blocks, set_lr
from model import GPT, ScalarModel, flat_index
from sampling import Rollout, generate
from sft import demonstration_loss

KL_KINDS = ("k1", "k2", "k3")  # estimates from the sampled token alone: kl_penalty


@dataclass
class Config(RewardConfig):
    out_dir: str = flag("out/ppo", "folder for the checkpoint and the logs")
    iterations: int = flag(21, "rollout-and-update rounds", low=1)
    ppo_epochs: int = flag(2, "passes over each iteration's rollouts", low=1)
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
    stop_kl: float = flag(0.1, "end an update this far from the rollout's policy, nats a token (0: never)", low=0)
    ptx_coef: float = flag(0.0, "weight of the SFT loss mixed into every step (InstructGPT's PPO-ptx; 0: off)", low=0)
    ptx_data: str = flag("auto", "demonstrations for it (auto: demonstrations.jsonl beside the prompts)")
    trace: bool = flag(False, "print one rollout of each logged iteration token by token")


# What the embedded task gives at default settings, over the last quarter of the run: figure, its name, from, to.
EXPECTED = (
    ("score", "reward-model score", 0.9, 2.5),  # 0 before PPO, in standard deviations of the SFT policy's samples
    ("kl", "KL, nats a sequence", 0.5, 15.0),
    ("eos_rate", "EOS rate", 0.98, 1.0),
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
    dtype = torch.promote_types(logits.dtype, torch.float32)
    logp, ref_logp = logits.log_softmax(-1, dtype), ref_logits.log_softmax(-1, dtype)
    return (logp.exp() * (logp - ref_logp)).sum(-1)


def exact_kl(logits: Tensor, ref_logits: Tensor) -> Tensor:
    """distribution_kl in the frame: logits, ref_logits (B, T, V), as models give them -> (B, T-1)."""
    return distribution_kl(logits[:, :-1], ref_logits[:, :-1])


def shaped_rewards(scores: Tensor, kl: Tensor, action_mask: Tensor, kl_coef: float) -> Tensor:
    """r_t = score_t - kl_coef * KL_t.

    scores (B, T-1), usually 0 but at the last action; or (B,), which stand for that. kl, action_mask (B, T-1) -> (B,
    T-1), 0 where masked out."""
    mask = action_mask.bool()
    scores = at_last_action(scores, mask) if scores.dim() == 1 else scores
    return torch.where(mask, scores - kl_coef * kl, 0.0)


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
    base = torch.full((), gamma * lam, dtype=wide, device=mask.device)
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

        L = 1/2 mean of  max((V - R)^2, (V_clipped - R)^2),     V_clipped = clip(V, V_old - clip, V_old + clip)

    so that one iteration can't move V far. max, not min: a value that has moved too far already may still come back.
    clip 0: none. All (B, T-1) -> loss, share of actions clipped."""
    mask = action_mask.bool()
    n = mask.sum().clamp(min=1) if n_tokens is None else n_tokens
    # masked before the arithmetic: an inf at a masked place would give a gradient of 0 * inf = nan
    values, old_values, returns = (torch.where(mask, x, 0.0) for x in (values, old_values, returns))
    error = (values - returns) ** 2
    if not clip:
        return 0.5 * torch.where(mask, error, 0.0).sum() / n, torch.zeros((), device=values.device)
    # not old + (values - old).clamp(-clip, clip): by its rounding values that are not clipped would count as clipped
    clipped_error = (torch.clamp(values, old_values - clip, old_values + clip) - returns) ** 2
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

    def state_dict(self) -> dict:
        return {"coef": self.coef}

    def load_state_dict(self, state: dict) -> None:
        self.coef = state["coef"]


# -------------------------------------------------------------------------------- experience


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

    def rows(self, index: list[int], trim: bool) -> Experience:
        """Some rows, as wide as before or trimmed to the longest of them."""
        rows = torch.tensor(index, device=self.tokens.device)  # once: every copy to a GPU makes the CPU wait for it
        less = self.tokens.size(1) - int(self.lens[rows].max()) if trim else 0
        parts = {f.name: getattr(self, f.name) for f in fields(self)}
        parts = {name: x if x is None else x[rows] for name, x in parts.items()}
        return Experience(**{k: x if x is None or x.dim() == 1 else x[:, : x.size(1) - less] for k, x in parts.items()})


@torch.no_grad()
def measure(
    policy: GPT, reference: GPT, value_model: ScalarModel | None, rollout: Rollout, config: Config
) -> dict[str, Tensor]:
    """What the networks say about a rollout -> logprobs, ref_logprobs, kl, k3, entropy, values, below, with the shapes
    and meanings that they have in Experience.

    By the forward pass that the update uses too, not the sampler's cached one, at the sampling temperature: only then
    does the first ratio equal 1. A few rows of similar length at a time, and logits at the sampled tokens alone."""
    for model in (policy, reference, value_model):
        if model is not None:
            model.eval()  # dropout off, or the ratio would not start at 1
    lens, trim = rollout.lens.tolist(), config.may_trim(rollout.tokens.device)
    measured: dict[str, Tensor] = {}
    for part in micro_batches(list(range(len(lens))), config.micro_batch, length=lambda i: lens[i]):
        rows = torch.tensor(part, device=rollout.tokens.device)  # (b,)
        T = max(lens[i] for i in part) if trim else rollout.tokens.size(1)
        tokens, mask = rollout.tokens[rows, :T], rollout.action_mask[rows, : T - 1]  # (b, t), (b, t-1)
        places = flat_index(mask, T)  # (n,) found once for all: the CPU waits for a GPU here
        with autocast(tokens.device, config.dtype):
            below = trunk(policy, tokens)  # (b, t, C) once for all who have it in common
            logits = policy(tokens, places, below=below) / config.temperature  # (n, V)
            ref_logits = reference(tokens, places, below=below) / config.temperature  # (n, V)
            values = logits.new_zeros(len(logits))  # (n,)
            if value_model is not None:
                values = value_model(tokens, places, below=below)
        logp = logits.log_softmax(-1)  # (n, V)
        found = {
            "logprobs": action_logprobs(logits, tokens, mask, places=places),  # (b, t-1), like all that follows
            "ref_logprobs": action_logprobs(ref_logits, tokens, mask, places=places),
            "entropy": put_back(-(logp.exp() * logp).sum(-1), mask),
            "values": put_back(values, mask),
        }
        found["k3"] = kl_penalty(found["logprobs"], found["ref_logprobs"], "k3")
        if config.kl == "exact":
            found["kl"] = put_back(distribution_kl(logits, ref_logits), mask)
        else:
            found["kl"] = kl_penalty(found["logprobs"], found["ref_logprobs"], config.kl)
        for name, x in found.items():
            measured.setdefault(name, x.new_zeros(rollout.action_mask.shape))[rows, : T - 1] = x
        if below is not None:
            measured.setdefault("below", below.new_zeros(*rollout.tokens.shape, below.size(2)))[rows, :T] = below
    return measured


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
    """KL penalty, shaped rewards and advantages of a rollout with its scores (B, T-1)."""
    mask = rollout.action_mask  # (B, T-1)
    measured = measure(policy, reference, value_model, rollout, config)
    rewards = shaped_rewards(scores, measured["kl"], mask, kl_coef)
    # returns are formed first; only then are the advantages whitened, under the mask
    advantages, returns = gae(rewards, measured["values"], mask, config.gamma, config.lam)
    if config.kl == "exact":
        # KL_t depends on the state alone: as a reward it says nothing about the token that was chosen there. The
        # gradient of sum_a pi(a) log(pi(a) / ref(a)) is E[grad log pi(a) * (log-ratio(a) - KL_t)]: that is the token's
        # own share.
        own = torch.where(mask, measured["logprobs"] - measured["ref_logprobs"] - measured["kl"], 0.0)
        advantages = advantages - kl_coef * own
    if config.whiten_advantages:
        advantages = whiten(advantages, mask)
    shaped = {"rewards": rewards, "advantages": advantages, "returns": returns}
    return Experience(rollout.tokens, rollout.lens, rollout.ended, mask, **measured, **shaped)


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
    steps: list[Tensor] = []  # (6,) each, STATISTICS of a step
    off: list[Tensor] = []  # (b, t-1) each, |ratio - 1| in the first step
    first_ratio, stopped = 1.0, False
    for rows in minibatches(len(lens), config.minibatch, config.ppo_epochs, generator):
        n_tokens = experience.action_mask[rows].sum()  # of the whole step
        optimizer.zero_grad(set_to_none=True)
        sums = torch.zeros(5, device=device)  # the first five of STATISTICS
        # micro-batches of similar length, each trimmed to its longest row: less filler, and the same gradient
        for part in micro_batches(rows, config.micro_batch, length=lambda i: lens[i]):
            old = experience.rows(part, config.may_trim(device))
            mask = old.action_mask  # (b, t-1), like all of `old`
            places = flat_index(mask, old.tokens.size(1))  # (n,)
            with autocast(device, config.dtype):
                logits = policy(old.tokens, places, below=old.below)  # (n, V)
                logprobs = action_logprobs(logits, old.tokens, mask, config.temperature, places)  # (b, t-1)
                values = old.values  # (b, t-1)
                if value_model is not None:
                    values = put_back(value_model(old.tokens, places, below=old.below), mask)
            p_loss, p_clipped = policy_loss(logprobs, old.logprobs, old.advantages, mask, config.clip, n_tokens)
            v_loss, v_clipped = value_loss(values, old.values, old.returns, mask, config.value_clip, n_tokens)
            (p_loss + v_loss).backward()
            with torch.no_grad():
                # KL(policy of the rollout || policy now) on the rollout's samples: k3 with the roles exchanged
                moved = torch.where(mask, kl_penalty(old.logprobs, logprobs, "k3"), 0.0).sum() / n_tokens
                sums += torch.stack([p_loss, v_loss, p_clipped, v_clipped, moved])
                if not steps:  # nothing has moved yet
                    ratio = torch.where(mask, logprobs - old.logprobs, 0.0).exp()
                    off.append((ratio - 1).abs())
        if not steps:
            first_ratio = check_first_ratio(off, n_tokens, config.exact_products(device))
        stopped = config.stop_kl > 0 and sums[-1].item() > config.stop_kl
        if stopped:  # before this step is taken
            break
        for loss in extra_losses() if extra_losses is not None else ():
            loss.backward()
        norms = [clip_gradients(model, config.grad_clip) for model in models]  # one for each network
        optimizer.step()
        steps.append(torch.cat([sums, norms[0][None]]))
    means = torch.stack(steps).mean(0).tolist() if steps else [0.0] * len(STATISTICS)
    facts = {"first_ratio": first_ratio, "updates": len(steps), "stopped_early": stopped}
    return dict(zip(STATISTICS, means, strict=True)) | facts


def make_optimizer(policy: GPT, value_model: ScalarModel | None, config: Config) -> torch.optim.Adam:
    """Adam with eps 1e-5, as in OpenAI's code: with 1e-8 the first steps, while second moments are tiny, are huge."""
    groups = [{"params": trainable(policy), "lr": config.lr}]
    if value_model is not None:
        groups.append({"params": trainable(value_model), "lr": config.value_lr})
    return torch.optim.Adam(groups, eps=1e-5, fused=True)


def ptx_losses(policy: GPT, demonstrations: list, config: Config, iteration: int) -> Callable[[], Iterator[Tensor]]:
    """InstructGPT's PTX term (Ouyang et al. 2022, eq. 2), so that the policy keeps doing what the demonstrations do.
    Every call draws a batch of them and yields its SFT loss times ptx_coef, one micro-batch after the other."""
    rng = generator_for("cpu", config.seed, iteration, 3)

    def losses() -> Iterator[Tensor]:
        drawn = torch.randint(len(demonstrations), (config.minibatch,), generator=rng).tolist()
        batch = [demonstrations[i] for i in drawn]
        n_tokens = sum(len(e.completion) for e in batch)
        for part in micro_batches(batch, config.micro_batch):
            yield config.ptx_coef * demonstration_loss(policy, part, n_tokens, config.dtype)

    return losses


def initial_value_model(policy: GPT, reward_models: list[ScalarModel], config: Config) -> ScalarModel:
    """It starts as the reward model, which knows what a good text looks like, in the units of its weight. A function's
    units are not known: with one in the reward the head starts at 0, so the first advantages are just the rewards."""
    weights = config.reward_weights or [1.0] * len(config.reward)
    scale = {"sum": sum(weights), "mean": 1.0, "mean-std": 1.0, "min": weights[0]}[config.reward_combine]
    if reward_models and len(reward_models) == len(config.reward) and scale:
        value_model = copy.deepcopy(reward_models[0])
        value_model.std /= scale
    else:
        value_model = ScalarModel.from_gpt(reward_models[0].gpt if reward_models else policy)
        torch.nn.init.zeros_(value_model.head.weight)
    train_like(value_model, policy, config)
    return value_model


# -------------------------------------------------------------------------------- the loop


def train(config: Config) -> dict:
    check(not config.kl_target or config.kl_coef > 0, "--kl_target needs a --kl_coef above 0 to start from")
    start = set_up(config)
    policy, reference, tokenizer = start.policy, start.reference, start.tokenizer
    value_model = initial_value_model(policy, start.reward_models, config)
    demonstrations = []
    if config.ptx_coef:
        demonstrations = demonstrations_beside(config.prompts, config.ptx_data, tokenizer, policy.config.block_size)
    optimizer = make_optimizer(policy, value_model, config)
    controller = AdaptiveKL(config.kl_coef, config.kl_target, config.kl_horizon)
    prepare_blocks(config, value_model)
    parts = {"policy": policy, "value_model": value_model, "optimizer": optimizer, "controller": controller}
    run = RunFolder(config, config.iterations, **parts)
    if run.done:
        return run.done

    with run:  # whatever ends it in here, the last whole step is saved
        for iteration in run.steps("ppo"):
            # 1. sample prompts
            rng = generator_for("cpu", config.seed, iteration, 0)
            drawn = torch.randint(len(start.prompts), (config.rollouts,), generator=rng).tolist()
            asked = [start.texts[i] for i in drawn]
            # 2. roll out, by temperature alone: top-k or top-p would sample from another distribution than is trained
            rng = generator_for(policy.device, config.seed, iteration, 1)
            options = {"eos_id": tokenizer.eos_id, "temperature": config.temperature, "generator": rng}
            with autocast(policy.device, config.dtype):
                rollout = generate(policy, [start.prompts[i] for i in drawn], config.max_new_tokens, **options)
            completions = [tokenizer.decode(c) for c in rollout.completions()]
            run.lap("rollout")
            # 3. score; a completion that was cut before its EOS loses eos_penalty (no EOS is invented)
            raw_scores = at_last_action(start.score(rollout, asked, completions), rollout.action_mask)  # (B, T-1)
            scores = raw_scores - at_last_action(config.eos_penalty * (~rollout.ended), rollout.action_mask)  # (B, T-1)
            golds = start.gold(asked, completions, rollout.ended.tolist()) if start.gold else []
            # 4. KL penalty, 5. shaped rewards, 6. advantages
            experience = make_experience(policy, reference, value_model, rollout, scores, controller.coef, config)
            run.lap("score")
            # 7. update
            lr = set_lr(optimizer, iteration, config.iterations, config.warmup, "linear")
            extra_losses = ptx_losses(policy, demonstrations, config, iteration) if demonstrations else None
            rng = generator_for("cpu", config.seed, iteration, 2)
            stats = update(policy, value_model, optimizer, experience, config, rng, extra_losses)
            run.lap("update")
            # 8. log, and move the KL coefficient
            figures = rollout_figures(experience, completions, raw_scores.sum(1), scores.sum(1), controller.coef)
            if golds:
                figures["gold"] = sum(golds) / len(golds)
            run.log(iteration + 1, "score kl gold", **figures, **stats, lr=lr)
            controller.update(figures["kl"], config.rollouts)
            if iteration == 0 or run.due(iteration, config.log_every):
                show_samples(rollout, tokenizer, raw_scores.sum(1), experience if config.trace else None)

        save_model(config.out_dir, policy, tokenizer.saved, "ppo.py", config, start.task)
        return run.finish(report(run.history("score"), "PPO", start.usual))


def report(history: list[dict], name: str, usual: bool) -> dict:
    """Means over the last quarter of a run, and the gates of a usual one."""
    expected = [(figure, f"{name} {title}", *ends) for figure, title, *ends in EXPECTED if usual]
    return last_quarter(history, expected)


def main() -> None:
    run_main(train, Config, __doc__)


if __name__ == "__main__":
    main()
