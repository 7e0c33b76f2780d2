"""Stage 3c: group advantages and token weights by hand, and two updates of the script against the written-out
objective."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from helpers import (
    EOS,
    assert_same_weights,
    completion_logprobs,
    descend,
    make_gpt,
    plain_sgd,
    random_prompts,
    randn,
    rng,
)
from stages import asked, run, toy_policy, watching

import grpo
from data.batches import minibatches
from grpo import Config, group_advantages, make_experience, token_weights
from model import GPT, GPTConfig
from sampling import generate

KINDS = ("grpo", "dr_grpo", "rloo")


def test_advantages_by_hand():
    """Two groups of three: what each is above its group's mean, over the deviation, above the mean of the others."""
    rewards = torch.tensor([1.0, 2.0, 6.0, -1.0, -1.0, 2.0], dtype=torch.float64)
    assert group_advantages(rewards, 3, "dr_grpo").tolist() == [-2, -1, 3, -1, -1, 2]
    assert group_advantages(rewards, 3, "rloo").tolist() == pytest.approx([1 - 4, 2 - 3.5, 6 - 1.5, -1.5, -1.5, 3])
    found = group_advantages(rewards, 3, "grpo").tolist()
    assert found == pytest.approx(
        [-2 / 7**0.5, -1 / 7**0.5, 3 / 7**0.5, -1 / 3**0.5, -1 / 3**0.5, 2 / 3**0.5], abs=1e-5
    )


def test_a_group_of_equals_teaches_nothing():
    """Division by a deviation of 0: nan in every weight."""
    for kind in KINDS:
        assert group_advantages(torch.full((4,), 0.7), 4, kind).tolist() == [0.0] * 4


def test_what_a_token_counts_by_hand():
    mask = torch.tensor([[0, 1, 1, 0], [1, 1, 1, 1]]).bool()
    assert token_weights(mask, "grpo", 2, 8).tolist() == [[0, 0.25, 0.25, 0], [0.125] * 4]
    assert token_weights(mask, "dr_grpo", 2, 8).tolist() == [[0, 1 / 16, 1 / 16, 0], [1 / 16] * 4]
    assert token_weights(mask, "rloo", 2, 8).tolist() == [[0, 0.5, 0.5, 0], [0.5] * 4]


ESTIMATES = {"k1": lambda d: d, "k2": lambda d: d * d / 2, "k3": lambda d: (-d).exp() - 1 + d}


def slow_objective(policy, reference, old, rollout, scores, kind: str, kl: str):
    """The objective as the table in grpo.py has it, completion by completion and token by token; groups of four, at
    most seven tokens, clip 0.15, a KL coefficient of 0.3, temperature 0.7."""
    texts = []  # log-probs of the tokens of each: now, when they were written, of the reference
    for i, (P, n) in enumerate(zip(rollout.prompt_lens.tolist(), rollout.lens.tolist(), strict=True)):
        ids = rollout.tokens[i, :n].tolist()
        texts.append([completion_logprobs(model, ids[:P], ids[P:], 0.7) for model in (policy, old, reference)])
    rewards = scores.tolist()
    if kind == "rloo":
        penalties = [0.3 * ESTIMATES[kl](was - ref).sum().item() for _, was, ref in texts]
        rewards = [r - penalty for r, penalty in zip(rewards, penalties, strict=True)]
    total = 0.0
    for i, (now, was, ref) in enumerate(texts):
        group = rewards[i // 4 * 4 : i // 4 * 4 + 4]
        mean = sum(group) / 4
        A = rewards[i] - mean
        if kind == "grpo":
            A /= (sum((r - mean) ** 2 for r in group) / 3) ** 0.5 + 1e-6
        if kind == "rloo":
            A = rewards[i] - (sum(group) - rewards[i]) / 3
        each = 0.0
        for t in range(len(now)):
            ratio = (now[t] - was[t].detach()).exp()
            term = torch.minimum(ratio * A, ratio.clamp(0.85, 1.15) * A)
            if kind != "rloo":
                term = term - 0.3 * ESTIMATES[kl](now[t] - ref[t].detach())
            each = each + term
        total = total + each / {"grpo": len(now), "dr_grpo": 7, "rloo": 1}[kind]
    return total / len(texts)


@pytest.mark.parametrize(
    ("kind", "kl"), [("grpo", "auto"), ("dr_grpo", "auto"), ("dr_grpo", "k2"), ("rloo", "auto"), ("rloo", "k3")]
)
def test_two_updates_are_the_gradient_of_the_objective(tmp_path, monkeypatch, float64, kind, kl):
    """The whole script, two iterations of two steps with plain SGD. In the second iteration the policy has left its
    reference, and in its second step the ratios are beyond the clip range. Weights of a token that depend on the
    micro-batch, a penalty of the wrong sign, or in reward and loss both, advantages of other rows or of other prompts'
    groups, a score that isn't penalised where it was cut; and a logged score with the penalty in it, or a KL that is
    not the one trained on."""
    plain_sgd(monkeypatch)
    seed, lr = {"grpo": (4, 0.05), "dr_grpo": (1, 0.02), "rloo": (1, 0.007)}[kind]
    start = toy_policy(seed)
    settings = {
        "kind": kind,
        "kl": kl,
        "iterations": 2,
        "minibatch": 12,
        "micro_batch": 5,
        "kl_coef": 0.3,
        "lr": lr,
        "clip": 0.15,
    }
    with watching() as watch:
        results, policy, log = run("grpo", tmp_path, start, **settings)
    call = asked(tmp_path)[1]
    rollout = call.rollout()
    raw = [c.count("a") + 0.1 * len(p) for p, c in zip(call.prompts, call.completions, strict=True)]
    assert 0 < sum(call.ended) < 12, "some completions must be cut and some ended"
    scores = torch.tensor([r - 1.5 * (not end) for r, end in zip(raw, call.ended, strict=True)])
    kl = {"auto": "k1" if kind == "rloo" else "k3"}.get(kl, kl)
    old = watch.at(2)
    expected, losses = copy.deepcopy(old).requires_grad_(), []
    for _ in range(2):
        loss = -slow_objective(expected, start, old, rollout, scores, kind, kl)
        losses.append(loss.item())
        descend(expected, loss, lr / 2)  # the rate has halved: linear decay over two iterations
    assert_same_weights(policy, expected, old, tolerance=1e-7)
    assert log[1]["policy_loss"] == pytest.approx(sum(losses) / 2, abs=2e-6)  # the log rounds to six digits
    assert 0 < log[1]["clip_fraction"] < 1
    assert log[1]["score"] == results["score"] == pytest.approx(sum(raw) / 12, abs=1e-6)
    divergence = 0.0
    for i, (P, n) in enumerate(zip(rollout.prompt_lens.tolist(), rollout.lens.tolist(), strict=True)):
        ids = rollout.tokens[i, :n].tolist()
        now, ref = (completion_logprobs(model, ids[:P], ids[P:], 0.7) for model in (old, start))
        divergence += ESTIMATES[kl](now - ref).sum().item() / 12
    assert log[0]["kl"] == 0 and log[1]["kl"] == pytest.approx(divergence, abs=1e-6)
    assert log[1]["kl_coef"] == 0.3
    assert log[1]["objective"] == pytest.approx(scores.mean().item() - 0.3 * divergence, abs=1e-6)


def test_a_ratio_that_starts_off_1_stops_the_run(float64):
    """Log-probs of another policy than the one that wrote: a gradient of nothing."""
    policy = make_gpt(0, dropout=0.1)
    prompts = [p for p in random_prompts([1, 6, 3], 23) for _ in range(4)]
    rollout = generate(policy, prompts, 6, eos_id=EOS, temperature=0.7, generator=rng(1))
    config = Config(group=4, minibatch=12, rollouts=12, max_new_tokens=6, temperature=0.7, device="cpu")
    experience = make_experience(policy, copy.deepcopy(policy), rollout, randn(12, seed=2), config)
    wrong = replace(experience, logprobs=experience.logprobs + 0.01)
    with pytest.raises(RuntimeError, match=r"the first probability ratio is 1\.0100, not 1"):
        grpo.update(policy, torch.optim.SGD(policy.parameters(), 0.1), wrong, config, rng())


@pytest.mark.parametrize("kind", KINDS)
def test_a_smaller_minibatch_counts_as_a_whole_one(float64, kind):
    """The remainder of an epoch, two completions where a step has five, divided by five: its step is too small. Every
    step has the gradient that its rows have by themselves."""
    policy, reference = make_gpt(0), make_gpt(1)
    prompts = [p for p in random_prompts([1, 6, 3], 23) for _ in range(4)]
    rollout = generate(policy, prompts, 6, eos_id=EOS, temperature=0.7, generator=rng(1))
    settings = {"kind": kind, "group": 4, "rollouts": 12, "max_new_tokens": 6, "temperature": 0.7, "grad_clip": 0.0}
    config = Config(**settings, minibatch=5, micro_batch=2, device="cpu")
    experience = make_experience(policy, reference, rollout, randn(12, seed=2), config)
    with watching() as watch:
        grpo.update(policy, torch.optim.SGD(policy.parameters(), 0.0), experience, config, rng())
    drawn = list(minibatches(12, 5, 1, rng()))
    assert [len(rows) for rows in drawn] == [5, 5, 2] and len(watch.steps) == 3
    for step, rows in zip(watch.steps, drawn, strict=True):
        alone, own = (
            experience.rows(rows, False),
            replace(config, minibatch=len(rows), rollouts=len(rows), micro_batch=0),
        )
        norm = grpo.update(policy, torch.optim.SGD(policy.parameters(), 0.0), alone, own, rng())["grad_norm"]
        assert step.norm == pytest.approx(norm, rel=1e-9) and norm > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_it_raises_a_simple_reward(tmp_path, kind):
    torch.manual_seed(1)
    even = GPT(GPTConfig(23, 24, n_layer=1, n_head=2, n_embd=32))  # every letter about equally likely
    changes = {"iterations": 12, "rollouts": 32, "group": 8, "minibatch": 16, "micro_batch": 5, "temperature": 1.0}
    log = run("grpo", tmp_path, even, kind=kind, lr=1e-2, kl_coef=0.01, eos_penalty=0.0, **changes).log
    assert log[-1]["score"] > log[0]["score"] + 2


def test_a_group_has_one_prompt(tmp_path):
    """Completions of several prompts as one group: the baseline is that of another question."""
    run("grpo", tmp_path, rollouts=24)
    for call in asked(tmp_path):
        groups = [call.prompts[i : i + 4] for i in range(0, 24, 4)]
        assert all(len(set(group)) == 1 for group in groups) and len(set(call.prompts)) > 1
