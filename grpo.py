"""Stage 3c: PPO without a value model. What a completion is compared with are the others of its prompt.

    python grpo.py [--kind grpo | dr_grpo | rloo]          # the embedded task, after sft.py and reward_model.py

Everything is as in ppo.py, but for this: every prompt gets a group of completions, and all tokens of a completion have
one advantage, how much better its reward R is than its group's. So no value model, no GAE.

    kind      advantage               a token counts           KL penalty
    grpo      (R - mean) / std        1 / completion's length  in the loss, k3    Shao et al. 2024, arXiv:2402.03300
    dr_grpo   R - mean                everywhere the same      in the loss, k3    Liu et al. 2025, arXiv:2503.20783
    rloo      R - mean of the others  everywhere the same      in the reward, k1  Ahmadian et al. 2024, arXiv:2402.14740

Where they lead (tests/test_optimum.py): rloo to PPO's optimum, pi* ~ pi_ref exp(R / kl_coef), the others elsewhere. In
the loss a penalty pulls by the divergence at each token alone: the states that it leads to cost nothing. And over
samples of the policy k3 has the gradient of KL(pi_ref || pi), the other way round. So dr_grpo ends at pi = pi_ref b /
(b + V - Q), with Q the expected reward after a token, V before it and b = kl_coef * group / (group - 1), since R is in
its own group's mean; with --kl k2 at pi ~ pi_ref exp(Q / b). In grpo each group has, by its std, a kl_coef of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from data.batches import micro_batches, minibatches
from frame import action_logprobs, check_first_ratio
from lib.checkpoint import save_model
from lib.cli import check, flag, run_main
from lib.run import RunFolder
from lib.setup import RewardConfig, set_up
from lib.show import rollout_figures, show_samples
from lib.train import autocast, clip_gradients, generator_for, set_lr
from model import GPT, flat_index
from ppo import Experience, kl_penalty, make_optimizer, measure, policy_loss, report, shaped_rewards
from sampling import Rollout, generate


@dataclass
class Config(RewardConfig):
    out_dir: str = flag("out/grpo", "folder for the checkpoint and the logs")
    kind: str = flag("grpo", "advantage, weight of a token, place of the penalty", choices=("grpo", "dr_grpo", "rloo"))
    iterations: int = flag(21, "rollout-and-update rounds", low=1)
    group: int = flag(8, "completions of each prompt", low=2)
    ppo_epochs: int = flag(1, "passes over each iteration's rollouts", low=1)
    lr: float = flag(5e-4, "peak learning rate", low=0)
    warmup: int = flag(2, "iterations of linear warm-up, before the linear decay", low=0)
    clip: float = flag(0.2, "clip range of the probability ratio", above=0)
    kl: str = flag("auto", "estimate of the KL (auto: k1 for rloo, else k3)", choices=("auto", "k1", "k2", "k3"))
    kl_coef: float = flag(0.1, "KL penalty, in reward per nat", low=0)

    def __post_init__(self):
        super().__post_init__()
        if self.kl == "auto":
            self.kl = "k1" if self.kind == "rloo" else "k3"


def group_advantages(rewards: Tensor, group: int, kind: str) -> Tensor:
    """rewards (B,), the completions of a prompt side by side -> (B,). See the table above."""
    groups = rewards.view(-1, group)  # (B / group, group)
    above = groups - groups.mean(1, keepdim=True)
    if kind == "grpo":
        above = above / (groups.std(1, keepdim=True) + 1e-6)
    if kind == "rloo":  # the others' mean is (group * mean - R) / (group - 1)
        above = above * group / (group - 1)
    return above.flatten()


def token_weights(action_mask: Tensor, kind: str, n_rows: int, longest: int) -> Tensor:
    """What each token's term is multiplied with, (B, T-1), 0 where masked out. n_rows: completions in the optimiser
    step; longest: tokens that a completion may have (Dr. GRPO divides by a constant; which one is a matter of --lr)."""
    if kind == "grpo":
        return action_mask / (n_rows * action_mask.sum(1, keepdim=True))
    return action_mask / (n_rows * (longest if kind == "dr_grpo" else 1))


def make_experience(policy: GPT, reference: GPT, rollout: Rollout, scores: Tensor, config: Config) -> Experience:
    """KL and group advantages of a rollout with its scores (B,)."""
    mask = rollout.action_mask  # (B, T-1)
    measured = measure(policy, reference, None, rollout, config)
    rewards = shaped_rewards(scores, measured["kl"], mask, config.kl_coef if config.kind == "rloo" else 0.0)
    above = group_advantages(rewards.sum(1), config.group, config.kind)  # (B,)
    advantages = torch.where(mask, above[:, None], 0.0)  # (B, T-1)
    shaped = {"rewards": rewards, "advantages": advantages, "returns": torch.zeros_like(rewards)}
    return Experience(rollout.tokens, rollout.lens, rollout.ended, mask, **measured, **shaped)


def update(policy: GPT, optimizer: torch.optim.Optimizer, experience: Experience, config: Config, generator) -> dict:
    """Clipped steps on an iteration's rollouts -> policy_loss, clip_fraction and grad_norm, means over the steps."""
    policy.eval()  # no dropout: the first ratio is exactly 1
    lens, device, steps = experience.lens.tolist(), experience.tokens.device, []
    off: list[Tensor] = []  # (b, t-1) each, |ratio - 1| in the first step
    for rows in minibatches(len(lens), config.minibatch, config.ppo_epochs, generator):
        n_tokens = experience.action_mask[rows].sum()  # of the whole step
        optimizer.zero_grad(set_to_none=True)
        sums = torch.zeros(2, device=device)
        for part in micro_batches(rows, config.micro_batch, length=lambda i: lens[i]):
            old = experience.rows(part, config.may_trim(device))
            mask = old.action_mask  # (b, t-1), like all of `old`
            places = flat_index(mask, old.tokens.size(1))  # (n,)
            weights = token_weights(mask, config.kind, len(rows), config.max_new_tokens)
            with autocast(device, config.dtype):
                logits = policy(old.tokens, places, below=old.below)  # (n, V)
                logprobs = action_logprobs(logits, old.tokens, mask, config.temperature, places)  # (b, t-1)
            if not steps:  # nothing has moved yet
                off.append((torch.where(mask, logprobs.detach() - old.logprobs, 0.0).exp() - 1).abs())
            # the clipped term grows in proportion to the advantage, so a weight may stand there
            loss, clipped = policy_loss(logprobs, old.logprobs, old.advantages * weights, mask, config.clip, 1)
            if config.kind != "rloo":
                penalty = torch.where(mask, kl_penalty(logprobs, old.ref_logprobs, config.kl), 0.0)
                loss = loss + config.kl_coef * (weights * penalty).sum()
            loss.backward()
            sums += torch.stack([loss.detach(), clipped / n_tokens])
        if not steps:
            check_first_ratio(off, n_tokens, config.exact_products(device))
        norm = clip_gradients(policy, config.grad_clip)
        optimizer.step()
        steps.append(torch.cat([sums, norm[None]]))
    return dict(zip(("policy_loss", "clip_fraction", "grad_norm"), torch.stack(steps).mean(0).tolist(), strict=True))


def train(config: Config) -> dict:
    check(config.rollouts % config.group == 0, f"--rollouts must be a multiple of --group ({config.group})")
    check(config.kind == "rloo" or config.kl != "k1", "--kl k1 in the loss has no gradient on average; take k2 or k3")
    start = set_up(config)
    policy, reference, tokenizer = start.policy, start.reference, start.tokenizer
    optimizer = make_optimizer(policy, None, config)
    run = RunFolder(config, config.iterations, policy=policy, optimizer=optimizer)
    if run.done:
        return run.done

    with run:  # whatever ends it in here, the last whole step is saved
        for iteration in run.steps("grpo"):
            # 1. sample prompts, each for a group side by side
            rng = generator_for("cpu", config.seed, iteration, 0)
            drawn = torch.randint(len(start.prompts), (config.rollouts // config.group,), generator=rng)
            drawn = drawn.repeat_interleave(config.group).tolist()
            asked = [start.texts[i] for i in drawn]
            # 2. roll out
            rng = generator_for(policy.device, config.seed, iteration, 1)
            options = {"eos_id": tokenizer.eos_id, "temperature": config.temperature, "generator": rng}
            with autocast(policy.device, config.dtype):
                rollout = generate(policy, [start.prompts[i] for i in drawn], config.max_new_tokens, **options)
            completions = [tokenizer.decode(c) for c in rollout.completions()]
            run.lap("rollout")
            # 3. score
            raw_scores = start.score(rollout, asked, completions)  # (B,)
            scores = raw_scores - config.eos_penalty * (~rollout.ended)  # (B,)
            golds = start.gold(asked, completions, rollout.ended.tolist()) if start.gold else []
            # 4. KL penalty, 5. shaped rewards, 6. advantages
            experience = make_experience(policy, reference, rollout, scores, config)
            run.lap("score")
            # 7. update
            lr = set_lr(optimizer, iteration, config.iterations, config.warmup, "linear")
            stats = update(policy, optimizer, experience, config, generator_for("cpu", config.seed, iteration, 2))
            run.lap("update")
            # 8. log
            figures = rollout_figures(experience, completions, raw_scores, scores, config.kl_coef)
            if golds:
                figures["gold"] = sum(golds) / len(golds)
            run.log(iteration + 1, "score kl gold", **figures, **stats, lr=lr)
            if iteration == 0 or run.due(iteration, config.log_every):
                show_samples(rollout, tokenizer, raw_scores)

        save_model(config.out_dir, policy, tokenizer.saved, "grpo.py", config, start.task)
        return run.finish(report(run.history("score"), config.kind, start.usual))


def main() -> None:
    run_main(train, Config, __doc__)


if __name__ == "__main__":
    main()
