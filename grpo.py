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

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from lib.cli import TrainConfig, check, check_ranges, flag, run_main
from lib.reward import COMBINES, call_reward, gold_function
from lib.run import RunFolder
from lib.train import autocast, clip_gradients, due, generator_for
from frozen import make_reference
from lib.checkpoint import load_model, note_task
from lib.reward import load_reward
from lib.run import last_quarter
from lib.train import lr_at, pick_device, prepare_blocks
from frozen import sampling, train_last_layers
from lib.checkpoint import save_model
from lib.show import rollout_figures, shares, show_samples
from lib.train import progress, set_lr
from data.batches import encode_prompts, micro_batches, minibatches
from data.files import read_prompts
from data.tiny import task_of
from data.tokenizer import load_tokenizer
from frame import token_logprobs
from model import GPT
from sampling import Rollout, generate
from ppo import EXPECTED, Experience, kl_penalty, make_optimizer, may_cut, measure, policy_loss, shaped_rewards


@dataclass
class Config(TrainConfig):
    prompts: str = flag("out/data/prompts.jsonl", "prompts to practise on")
    policy: str = flag("out/sft", "checkpoint to start from; its frozen copy is the reference")
    reward: list[str] = flag(["out/reward_model"], "reward models' checkpoints or file.py:function, one or several")
    reward_weights: list[float] = flag([], "factor of each reward (none: 1 each)")
    reward_combine: str = flag("sum", "one reward from several, after weighting", choices=COMBINES)
    out_dir: str = flag("out/grpo", "folder for the checkpoint and the logs")
    kind: str = flag("grpo", "advantage, weight of a token, place of the penalty", choices=("grpo", "dr_grpo", "rloo"))
    iterations: int = flag(21, "rollout-and-update rounds", low=1)
    rollouts: int = flag(192, "completions sampled each iteration", low=2)
    group: int = flag(8, "of them for each prompt", low=2)
    max_new_tokens: int = flag(48, "longest completion, tokens", low=1)
    temperature: float = flag(1.0, "of sampling; the log-probs of policy and reference are taken at it too", above=0)
    ppo_epochs: int = flag(1, "passes over each iteration's rollouts", low=1)
    minibatch: int = flag(48, "rollouts an optimiser step", low=1)
    micro_batch: int = flag(24, "rollouts a forward pass; changes memory and nothing else (0: the minibatch)", low=0)
    lr: float = flag(5e-4, "peak learning rate", low=0)
    warmup: int = flag(2, "iterations of linear warm-up, before the linear decay", low=0)
    clip: float = flag(0.2, "clip range of the probability ratio", above=0)
    kl: str = flag("auto", "estimate of the KL (auto: k1 for rloo, else k3)", choices=("auto", "k1", "k2", "k3"))
    kl_coef: float = flag(0.1, "KL penalty, in reward per nat", low=0)
    eos_penalty: float = flag(1.0, "subtracted from the score of a completion that was cut before EOS", low=0)
    gold: str = flag("auto", "true reward to log, file.py:function (auto: the embedded task's; empty: none)")
    log_every: int = flag(10, "iterations between printed samples", low=1)

    def __post_init__(self):
        self.reward = [self.reward] if isinstance(self.reward, str) else self.reward
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
    told = measure(policy, reference, None, rollout, config)
    rewards = shaped_rewards(scores, told["kl"], mask, config.kl_coef if config.kind == "rloo" else 0.0)  # (B, T-1)
    above = group_advantages(rewards.sum(1), config.group, config.kind)  # (B,)
    advantages = torch.where(mask, above[:, None], 0.0)  # (B, T-1)
    shaped = {"rewards": rewards, "advantages": advantages, "returns": torch.zeros_like(rewards)}
    return Experience(rollout.tokens, rollout.lens, rollout.ended, mask, **told, **shaped)


def update(policy: GPT, optimizer: torch.optim.Optimizer, experience: Experience, config: Config, generator) -> dict:
    """Clipped steps on an iteration's rollouts -> means over the steps."""
    policy.eval()  # no dropout: the first ratio is exactly 1
    lens, device, steps = experience.lens.tolist(), experience.tokens.device, []
    for rows in minibatches(len(lens), config.minibatch, config.ppo_epochs, generator):
        optimizer.zero_grad(set_to_none=True)
        figures = torch.zeros(3, device=device)
        for part in micro_batches(rows, config.micro_batch, length=lambda i: lens[i]):
            old = experience.rows(part, may_cut(config, device))
            mask = old.action_mask  # (b, t-1), like all of `old`
            weights = token_weights(mask, config.kind, len(rows), config.max_new_tokens)
            with autocast(device, config.dtype):
                logprobs = token_logprobs(policy, old.tokens, config.temperature, mask, below=old.below)
            if not steps:  # nothing has moved yet
                off = torch.where(mask, logprobs - old.logprobs, 0.0).abs().max().item()
                check(off <= 1e-3, f"the first log-ratio is {off:.4f}, not 0: rollout and update disagree")
            # the clipped term grows in proportion to the advantage, so a weight may stand there
            loss, clipped = policy_loss(logprobs, old.logprobs, old.advantages * weights, mask, config.clip, 1)
            if config.kind != "rloo":
                penalty = torch.where(mask, kl_penalty(logprobs, old.ref_logprobs, config.kl), 0.0)
                loss = loss + config.kl_coef * (weights * penalty).sum()
            loss.backward()
            figures[:2] += torch.stack([loss.detach(), clipped / experience.action_mask[rows].sum()])
        figures[2] = clip_gradients(policy, config.grad_clip)
        optimizer.step()
        steps.append(figures)
    return dict(zip(("policy_loss", "clip_fraction", "grad_norm"), torch.stack(steps).mean(0).tolist(), strict=True))


def train(config: Config) -> dict:
    check_ranges(config)
    check(config.rollouts % config.group == 0, f"--rollouts must be a multiple of --group ({config.group})")
    check(config.minibatch <= config.rollouts, f"--minibatch must be at most --rollouts ({config.rollouts})")
    check(config.kind == "rloo" or config.kl != "k1", "--kl k1 in the loss has no gradient on average; take k2 or k3")
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
    block_size = policy.config.block_size
    prompts = encode_prompts(texts, tokenizer, block_size, config.max_new_tokens, config.prompts)
    optimizer = make_optimizer(policy, None, config)
    prepare_blocks(config, policy, reference)
    run = RunFolder(config, config.iterations)
    if run.done:
        return run.done

    bar = progress(run.resume(policy=policy, optimizer=optimizer)["step"], config.iterations, "grpo")
    for iteration in bar:
        clock = [time.perf_counter()]
        rng = generator_for(cpu, config.seed, iteration, 0)
        drawn = torch.randint(len(prompts), (config.rollouts // config.group,), generator=rng)
        drawn = drawn.repeat_interleave(config.group).tolist()  # a group side by side
        asked = [texts[i] for i in drawn]
        rng = generator_for(device, config.seed, iteration, 1)
        options = {"eos_id": tokenizer.eos_id, "temperature": config.temperature, "generator": rng}
        with sampling(policy, config.dtype):
            rollout = generate(policy, [prompts[i] for i in drawn], config.max_new_tokens, **options)
        completions = [tokenizer.decode(c) for c in rollout.completions()]
        clock.append(time.perf_counter())
        raw_scores = score(rollout, asked, completions)  # (B,)
        scores = raw_scores - config.eos_penalty * (~rollout.ended)
        experience = make_experience(policy, reference, rollout, scores, config)
        clock.append(time.perf_counter())
        lr = config.lr * lr_at(iteration, config.iterations, config.warmup, "linear")
        set_lr(optimizer, lr)
        stats = update(policy, optimizer, experience, config, generator_for(cpu, config.seed, iteration, 2))
        clock.append(time.perf_counter())
        figures = rollout_figures(experience, completions, raw_scores, scores, config.kl_coef) | stats
        if gold is not None:
            golds = call_reward(gold, asked, completions, rollout.ended.tolist(), "the gold reward")
            figures["gold"] = sum(golds) / len(golds)
        run.log(step=iteration + 1, **figures, lr=lr, **shares(clock, ("rollout", "score", "update")))
        bar.set_postfix({k: f"{figures[k]:.2f}" for k in ("score", "kl", "gold") if k in figures})
        if iteration == 0 or due(iteration, config.log_every, config.iterations):
            show_samples(rollout, tokenizer, raw_scores)
        if due(iteration, config.save_every, config.iterations):
            run.save_state(iteration + 1, policy=policy, optimizer=optimizer)

    save_model(config.out_dir, policy, tokenizer.saved, "grpo.py", config, task)
    usual = task == "tiny" and len(reward_models) == len(config.reward) == 1 and not config.reward_weights
    expected = [(figure, name.replace("PPO", config.kind), *ends) for figure, name, *ends in EXPECTED if usual]
    return run.finish(last_quarter(run.history("score"), expected))


def main() -> None:
    run_main(train, Config, __doc__)


if __name__ == "__main__":
    main()
