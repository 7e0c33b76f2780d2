"""Is ppo.py made of parts? GRPO, a known variant without a critic, in fifty lines that reuse them; and it learns.

Shao et al. 2024, arXiv:2402.03300, section 4.1.1: every prompt gets a group of completions, and the group's own mean
and standard deviation take the place of the value model. The KL penalty stays where PPO has it, in the reward.
"""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass

import pytest
import torch
from helpers import EOS, ToyTokenizer, checkpoint, make_gpt, randn, random_prompts, read_lines, rng, speak_toy, spread
from helpers import write_lines
from torch import Tensor

import common
import ppo
from cli import check, flag
from data.batches import encode_prompts
from data.files import read_prompts
from model import GPT, GPTConfig, Rollout, generate

# ------------------------------------------------------------------------------------------------ the example


@dataclass
class Config(ppo.Config):
    group: int = flag(8, "completions of every prompt", low=2)


def group_advantages(rewards: Tensor, group: int) -> Tensor:
    """How much better than the others of its group, in standard deviations: (B,) -> (B,). A group stands together."""
    groups = rewards.view(-1, group)
    deviation = groups.std(1, keepdim=True)
    return ((groups - groups.mean(1, keepdim=True)) / (deviation + 1e-6)).flatten()


@torch.no_grad()
def make_experience(
    policy: GPT, reference: GPT, rollout: Rollout, scores: Tensor, kl_coef: float, config: Config
) -> ppo.Experience:
    """ppo.make_experience without values: all tokens of a completion share its advantage."""
    mask = rollout.action_mask
    told = ppo.measure(policy, reference, None, rollout, config)
    rewards = ppo.shaped_rewards(scores, told["kl"], mask, kl_coef)
    advantages = torch.where(mask, group_advantages(rewards.sum(1), config.group)[:, None], 0.0)
    shaped = {"rewards": rewards, "advantages": advantages, "returns": advantages}
    return ppo.Experience(rollout.tokens, rollout.lens, rollout.ended, mask, **told, **shaped)


def train(config: Config) -> dict:
    check(config.rollouts % config.group == 0, f"--rollouts must be a multiple of --group ({config.group})")
    device, cpu = common.pick_device(config.device), torch.device("cpu")
    start_from = common.load_model(config.policy, device)
    policy, tokenizer = start_from.model, ppo.load_tokenizer(start_from.tokenizer)
    reference = copy.deepcopy(policy).requires_grad_(False)
    score, _ = common.load_reward(config.reward, start_from, "", device, config.reward_weights, config.reward_combine)
    texts = read_prompts(config.prompts)
    prompts = encode_prompts(texts, tokenizer, policy.config.block_size - config.max_new_tokens, config.prompts)
    optimizer = ppo.make_optimizer(policy, None, config)
    run = common.RunFolder(config, config.iterations)
    for iteration in range(config.iterations):
        rng = common.generator_for(cpu, config.seed, iteration, 0)
        drawn = torch.randint(len(prompts), (config.rollouts // config.group,), generator=rng)
        drawn = drawn.repeat_interleave(config.group).tolist()
        rng = common.generator_for(device, config.seed, iteration, 1)
        options = {"eos_id": tokenizer.eos_id, "temperature": config.temperature, "generator": rng}
        rollout = generate(policy, [prompts[i] for i in drawn], config.max_new_tokens, **options)
        completions = [tokenizer.decode(c) for c in rollout.completions()]
        raw_scores = score(rollout, [texts[i] for i in drawn], completions)
        scores = raw_scores - config.eos_penalty * (~rollout.ended)
        experience = make_experience(policy, reference, rollout, scores, config.kl_coef, config)
        common.set_lr(optimizer, config.lr * common.lr_at(iteration, config.iterations, config.warmup, "linear"))
        rng = common.generator_for(cpu, config.seed, iteration, 2)
        stats = ppo.update(policy, None, optimizer, experience, config, rng)
        figures = common.rollout_figures(experience, completions, raw_scores, scores, config.kl_coef)
        run.log(step=iteration + 1, **figures, **stats)
    common.save_model(config.out_dir, policy, tokenizer.saved, "grpo.py", config)
    return run.finish(common.last_quarter(run.history(), ()))


EXAMPLE = (Config, group_advantages, make_experience, train)

# ------------------------------------------------------------------------------------------------ the tests


def test_the_example_is_short():
    """A variant that needs more than 80 lines is no longer written by reuse."""
    assert sum(len(inspect.getsource(part).splitlines()) for part in EXAMPLE) <= 80


def test_a_group_is_its_own_baseline(float64):
    """The advantages against plain sums, row by row: (reward - mean) / deviation of the group, where the reward is
    the score minus the coefficient times the KL of the whole completion; the same for all its tokens."""
    policy = make_gpt(0)
    reference = copy.deepcopy(policy)
    spread(reference, 5, scale=0.05)
    prompts = [p for p in random_prompts([1, 6, 3], 23) for _ in range(4)]
    rollout = generate(policy, prompts, 6, eos_id=EOS, temperature=0.7, generator=rng(1))
    config = Config(group=4, micro_batch=5, temperature=0.7)
    scores = randn(12, seed=2)
    e = make_experience(policy, reference, rollout, scores, 0.3, config)
    assert (e.values == 0).all()
    for group in range(3):
        rows = range(4 * group, 4 * group + 4)
        masks = [e.action_mask[i] for i in rows]
        d = [(e.logprobs[i] - e.ref_logprobs[i])[m].sum().item() for i, m in zip(rows, masks, strict=True)]
        rewards = [scores[i].item() - 0.3 * x for i, x in zip(rows, d, strict=True)]
        mean = sum(rewards) / 4
        deviation = (sum((r - mean) ** 2 for r in rewards) / 3) ** 0.5
        for i, mask, reward in zip(rows, masks, rewards, strict=True):
            own = e.advantages[i][mask].tolist()
            assert own == pytest.approx([(reward - mean) / (deviation + 1e-6)] * len(own), abs=1e-9)
            assert (e.advantages[i][~mask] == 0).all()


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_it_raises_a_simple_reward(tmp_path, monkeypatch, seed):
    """Without a critic the parts must still work together: a reward for one letter makes the policy write it, on every
    seed, and the first ratio of each iteration is 1."""
    speak_toy(monkeypatch, ppo)
    torch.manual_seed(seed)
    even = GPT(GPTConfig(23, 24, n_layer=1, n_head=2, n_embd=32))  # every letter about equally likely
    reward = tmp_path / "letters.py"
    reward.write_text("def letters(prompts, completions):\n    return [c.count('a') for c in completions]\n")
    config = Config(
        **{"prompts": write_lines(tmp_path / "p.jsonl", [{"prompt": p} for p in ("a", "bcd", "jw", "mnopqrs")])},
        **{"policy": checkpoint(tmp_path / "policy", even), "reward": f"{reward}:letters"},
        **{"out_dir": str(tmp_path / "out"), "device": "cpu", "seed": seed, "max_new_tokens": 7},
        **{"iterations": 12, "rollouts": 32, "group": 8, "minibatch": 16, "micro_batch": 5, "ppo_epochs": 2},
        **{"lr": 1e-2, "warmup": 0, "kl_coef": 0.01, "eos_penalty": 0.0},
    )
    train(config)
    log = read_lines(tmp_path / "out" / "metrics.jsonl")
    assert len(log) == 12
    assert all(abs(row["first_ratio"] - 1) < 1e-5 for row in log)
    assert log[-1]["score"] > log[0]["score"] + 2
    assert common.load_model(tmp_path / "out", torch.device("cpu")).tokenizer == ToyTokenizer.name
