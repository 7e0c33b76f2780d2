"""Stage 3c: group advantages and token weights by hand, an update against the written-out objective, and the script."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from helpers import (
    EOS,
    assert_same_weights,
    checkpoint,
    completion_logprobs,
    descend,
    distance,
    make_gpt,
    plain_sgd,
    random_prompts,
    randn,
    read_lines,
    record_dtypes,
    rng,
    spread,
    write_lines,
)

import grpo
from model import Block
from lib.cli import UserError
from frozen import make_reference, train_last_layers, trainable
from lib.checkpoint import load_model
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


def world(seed: int = 0):
    policy = make_gpt(seed, dropout=0.1, dtype=torch.float64)
    reference = copy.deepcopy(policy).requires_grad_(False)
    spread(reference, seed + 5, scale=0.05)
    prompts = [p for p in random_prompts([1, 6, 3], 23, seed=seed) for _ in range(4)]
    rollout = generate(policy, prompts, 6, eos_id=EOS, temperature=0.7, generator=rng(1))
    return policy, reference, rollout


def slow_objective(policy, reference, old, rollout, scores, config: Config):
    """What one optimiser step on all rows ascends, row by row and token by token, as the papers write it."""
    texts = []  # of each row: log-probs under the policy, the policy that sampled, and the reference
    for i, (P, n) in enumerate(zip(rollout.prompt_lens.tolist(), rollout.lens.tolist(), strict=True)):
        ids = rollout.tokens[i, :n].tolist()
        texts.append([completion_logprobs(m, ids[:P], ids[P:], 0.7) for m in (policy, old, reference)])
    rewards = [s.item() for s in scores]
    if config.kind == "rloo":
        rewards = [
            r - config.kl_coef * (was - ref).sum().item() for r, (_, was, ref) in zip(rewards, texts, strict=True)
        ]
    total = 0.0
    for i, (now, was, ref) in enumerate(texts):
        group = rewards[i // 4 * 4 : i // 4 * 4 + 4]
        mean = sum(group) / 4
        A = rewards[i] - mean
        if config.kind == "grpo":
            A /= (sum((r - mean) ** 2 for r in group) / 3) ** 0.5 + 1e-6
        if config.kind == "rloo":
            A = rewards[i] - (sum(group) - rewards[i]) / 3
        each = 0.0
        for t in range(len(now)):
            ratio = (now[t] - was[t].detach()).exp()
            term = torch.minimum(ratio * A, ratio.clamp(0.8, 1.2) * A)
            d = now[t] - ref[t].detach()
            if config.kind != "rloo":
                term = term - config.kl_coef * (d * d / 2 if config.kl == "k2" else (-d).exp() - 1 + d)
            each = each + term
        total = total + each / {"grpo": len(now), "dr_grpo": 6, "rloo": 1}[config.kind]
    return total / len(texts)


@pytest.mark.parametrize("micro_batch", [0, 5])
@pytest.mark.parametrize(("kind", "kl"), [("grpo", "k3"), ("dr_grpo", "k3"), ("dr_grpo", "k2"), ("rloo", "k1")])
def test_an_update_is_the_gradient_of_the_objective(float64, kind, kl, micro_batch):
    """Weights that depend on the micro-batch, a penalty of the wrong sign or twice, advantages of other rows. Two
    steps: the first at ratio 1, the second beyond the clip range."""
    policy, reference, rollout = world()
    settings = {"kind": kind, "kl": kl, "group": 4, "minibatch": 12, "rollouts": 12, "temperature": 0.7, "kl_coef": 0.3}
    config = Config(**settings, micro_batch=micro_batch, max_new_tokens=6, grad_clip=0.0, ppo_epochs=2, device="cpu")
    scores, lr = randn(12, seed=2), {"grpo": 1.0, "dr_grpo": 1.0, "rloo": 0.5}[kind]
    experience = make_experience(policy, reference, rollout, scores, config)
    old, before, expected = (copy.deepcopy(policy).eval() for _ in range(3))
    losses = []
    for _ in range(2):
        loss = -slow_objective(expected, reference, old, rollout, scores, config)
        descend(expected, loss, lr)
        losses.append(loss.item())
    figures = grpo.update(policy, torch.optim.SGD(policy.parameters(), lr), experience, config, rng())
    assert_same_weights(policy, expected, before)
    assert figures["policy_loss"] == pytest.approx(sum(losses) / 2, rel=1e-9)
    assert 0 < figures["clip_fraction"] < 1


def test_a_ratio_that_starts_off_1_stops_the_run(float64):
    """Log-probs of another policy than the one that wrote: a gradient of nothing."""
    policy, reference, rollout = world()
    config = Config(group=4, minibatch=12, rollouts=12, max_new_tokens=6, temperature=0.7, device="cpu")
    experience = make_experience(policy, reference, rollout, randn(12, seed=2), config)
    experience.logprobs = experience.logprobs + 0.01
    with pytest.raises(UserError, match=r"the first log-ratio is 0\.0100, not 0"):
        grpo.update(policy, torch.optim.SGD(policy.parameters(), 0.1), experience, config, rng())


def run_grpo(tmp_path, **changes):
    torch.manual_seed(changes.get("seed", 1))
    even = GPT(GPTConfig(23, 24, n_layer=1, n_head=2, n_embd=32))  # every letter about equally likely
    reward = tmp_path / "letters.py"
    reward.write_text("def letters(prompts, completions):\n    return [c.count('a') for c in completions]\n")
    settings = {
        **{"prompts": write_lines(tmp_path / "p.jsonl", [{"prompt": p} for p in ("a", "bcd", "jw", "mnopqrs")])},
        **{"policy": checkpoint(tmp_path / "policy", even), "reward": f"{reward}:letters"},
        **{"out_dir": str(tmp_path / "out"), "device": "cpu", "max_new_tokens": 7},
        **{"iterations": 12, "rollouts": 32, "group": 8, "minibatch": 16, "micro_batch": 5, "ppo_epochs": 2},
        **{"lr": 1e-2, "warmup": 0, "kl_coef": 0.01, "eos_penalty": 0.0},
    }
    results = grpo.train(Config(**{**settings, **changes}))
    return results, read_lines(tmp_path / "out" / "metrics.jsonl")


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_it_raises_a_simple_reward(tmp_path, kind, seed):
    _, log = run_grpo(tmp_path, kind=kind, seed=seed)
    assert len(log) == 12
    assert log[-1]["score"] > log[0]["score"] + 2
    assert load_model(tmp_path / "out", torch.device("cpu")).tokenizer == "toy"


def test_a_group_has_one_prompt(tmp_path, monkeypatch):
    """Completions of several prompts as one group: the baseline is that of another question."""
    seen = []
    original = grpo.make_experience

    def record(policy, reference, rollout, scores, config):
        seen.append([rollout.tokens[i, :n].tolist() for i, n in enumerate(rollout.prompt_lens)])
        return original(policy, reference, rollout, scores, config)

    monkeypatch.setattr(grpo, "make_experience", record)
    run_grpo(tmp_path, iterations=3)
    for prompts in seen:
        groups = [prompts[i : i + 8] for i in range(0, 32, 8)]
        assert all(p == group[0] for group in groups for p in group)
    assert len({str(p) for prompts in seen for p in prompts}) > 1


def test_rloo_is_penalised_in_the_reward_alone(float64):
    """Whatever the estimator: as a reward and as a loss the penalty would count twice. With all scores equal and no
    other difference, the update is that of the rewards -kl_coef * KL."""
    policy, reference, rollout = world()
    settings = {"group": 4, "minibatch": 12, "rollouts": 12, "temperature": 0.7, "kl_coef": 0.3, "max_new_tokens": 6}
    config = Config(kind="rloo", kl="k3", grad_clip=0.0, device="cpu", **settings)
    experience = make_experience(policy, reference, rollout, torch.zeros(12), config)
    before, expected = copy.deepcopy(policy), copy.deepcopy(policy).eval()
    rewards = (-0.3 * experience.kl).sum(1)
    own = torch.stack([rewards[i] - (rewards[i // 4 * 4 : i // 4 * 4 + 4].sum() - rewards[i]) / 3 for i in range(12)])
    loss = 0.0
    for i, (P, n) in enumerate(zip(rollout.prompt_lens.tolist(), rollout.lens.tolist(), strict=True)):
        ids = rollout.tokens[i, :n].tolist()
        loss = loss - own[i] * completion_logprobs(expected, ids[:P], ids[P:], 0.7).sum() / 12
    descend(expected, loss, 0.1)  # at ratio 1 the gradient of the ratio is that of the log-prob
    grpo.update(policy, torch.optim.SGD(policy.parameters(), 0.1), experience, config, rng())
    assert_same_weights(policy, expected, before)


def test_a_cut_completion_loses_the_penalty(tmp_path, monkeypatch):
    """The score that a group is compared by, of a policy whose every completion is cut after one token."""
    seen = []
    original = grpo.make_experience

    def record(policy, reference, rollout, scores, config):
        seen.append((rollout.ended.tolist(), scores.tolist()))
        return original(policy, reference, rollout, scores, config)

    monkeypatch.setattr(grpo, "make_experience", record)
    run_grpo(tmp_path, iterations=1, max_new_tokens=1, eos_penalty=7.0)
    ended, scores = seen[0]
    assert not all(ended)
    assert all((score < -3) == (not end) for end, score in zip(ended, scores, strict=True))


def calls_of(monkeypatch, name: str) -> list[dict]:
    """What grpo's function of this name is called with, by parameter, from now on."""
    original, seen = getattr(grpo, name), []
    parameters = list(inspect.signature(original).parameters)

    def record(*args):
        seen.append(dict(zip(parameters, args, strict=True)))
        return original(*args)

    monkeypatch.setattr(grpo, name, record)
    return seen


def test_what_is_logged_is_what_was_used(tmp_path, monkeypatch, float64):
    """A score shown with the penalty in it, a KL that is not the one trained on, --reward_weights that are forgotten,
    gates of the embedded task for data of one's own."""
    calls = calls_of(monkeypatch, "update")
    changes = {"reward_weights": [3.0], "eos_penalty": 2.0, "iterations": 4, "max_new_tokens": 2, "lr": 5e-2}
    results, log = run_grpo(tmp_path, **changes)
    assert results["gates"] == []
    for row, call in zip(log, calls, strict=True):
        e = call["experience"]
        written = [e.tokens[i, 1:][mask].tolist() for i, mask in enumerate(e.action_mask)]
        scores = [3.0 * ids.count(0) for ids in written]
        penalised = [s - 2.0 * (EOS not in ids) for s, ids in zip(scores, written, strict=True)]
        assert e.rewards.sum(1).tolist() == pytest.approx(penalised, abs=1e-9)
        assert row["score"] == pytest.approx(sum(scores) / 32, abs=1e-6)
        d = torch.where(e.action_mask, e.ref_logprobs - e.logprobs, 0.0)
        assert row["kl"] == pytest.approx((d.exp() - 1 - d).sum().item() / 32, abs=1e-6)
    assert results["score"] == pytest.approx(log[-1]["score"], abs=1e-6)  # the last quarter of four
    assert log[0]["kl"] == 0 < log[-1]["kl"]


def test_every_iteration_has_prompts_samples_and_an_order_of_its_own(tmp_path, monkeypatch):
    """A generator that is made anew from the same seed: the same prompts, the same luck or the same minibatches."""
    calls = calls_of(monkeypatch, "update")
    run_grpo(tmp_path, iterations=2, lr=0.0, ppo_epochs=1)
    first, second = (call["experience"].tokens.tolist() for call in calls)
    prompts = [[(row[0], len(row)) for row in rows[::8]] for rows in (first, second)]
    assert prompts[0] != prompts[1]
    orders = [torch.randperm(32, generator=call["generator"]).tolist() for call in calls]
    assert orders[0] != orders[1]
    same = [{"prompts": write_lines(tmp_path / "one.jsonl", [{"prompt": "a"}]), "seed": s} for s in (1, 1, 2)]
    calls.clear()
    for changes in same:
        run_grpo(tmp_path, iterations=2, lr=0.0, **changes)
    texts = [call["experience"].tokens.tolist() for call in calls]
    assert texts[:2] == texts[2:4] and texts[0] != texts[1] and texts[0] != texts[4]


def test_the_learning_rate_warms_up_and_decays_and_gradients_are_clipped(tmp_path, monkeypatch, float64):
    """A schedule that is logged and not used; --grad_clip that is ignored, or comes after the step: with plain SGD no
    step is longer than its learning rate times --grad_clip, and the first is as long."""
    plain_sgd(monkeypatch)
    lengths: list[float] = []
    original = grpo.make_optimizer

    def record(policy, *others):
        optimizer = original(policy, *others)
        kept = {}
        optimizer.register_step_pre_hook(lambda *_: kept.update(before=copy.deepcopy(policy)))
        optimizer.register_step_post_hook(lambda *_: lengths.append(distance(policy, kept["before"])))
        return optimizer

    monkeypatch.setattr(grpo, "make_optimizer", record)
    changes = {"iterations": 6, "warmup": 2, "minibatch": 32, "ppo_epochs": 1, "grad_clip": 1e-3, "lr": 4e-2}
    _, log = run_grpo(tmp_path, **changes)
    factors = [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]  # up in two iterations, then down towards 0 after the last
    assert [row["lr"] for row in log] == pytest.approx([4e-2 * f for f in factors], abs=1e-6)
    assert lengths == pytest.approx([4e-2 * f * 1e-3 for f in factors], rel=1e-3)
    assert all(row["grad_norm"] > 1e-3 for row in log)  # as it was before


@pytest.mark.parametrize("kind", KINDS)
def test_with_frozen_blocks_it_takes_the_steps_of_a_network_that_computes_them(float64, kind):
    """--train_layers: rows of another micro-batch's trunk, frozen weights that move, blocks that run again in the
    update."""
    found = []
    for shared in (True, False):
        policy, reference, rollout = world()
        train_last_layers(policy, 1)
        if shared:
            reference = make_reference(policy)
        else:
            policy.frozen, reference = 0, copy.deepcopy(policy).requires_grad_(False)
        before = copy.deepcopy(policy)
        with torch.no_grad():  # away from the reference
            for p in trainable(policy):
                p.add_(0.02 * randn(*p.shape, seed=7))
        start = copy.deepcopy(policy)
        runs: list[int] = []
        settings = {"kind": kind, "group": 4, "minibatch": 6, "micro_batch": 4, "ppo_epochs": 2, "temperature": 0.7}
        config = Config(**settings, max_new_tokens=6, kl_coef=0.3, device="cpu", grad_clip=0.0)
        experience = make_experience(policy, reference, rollout, randn(12, seed=2), config)
        assert (experience.below is not None) == shared
        policy.h[0].register_forward_hook(lambda *_, runs=runs: runs.append(0))
        grpo.update(policy, torch.optim.SGD(trainable(policy), 0.02), experience, config, rng())
        assert bool(runs) != shared
        frozen = [n for n, p in policy.named_parameters() if not p.requires_grad]
        assert frozen and all(torch.equal(policy.get_parameter(n), before.get_parameter(n)) for n in frozen)
        found.append(policy)
    assert_same_weights(found[0], found[1], start)


def test_the_flags_of_memory_and_speed_reach_the_networks(tmp_path, monkeypatch):
    """--train_layers, --dtype, --compile or --recompute that is accepted and ignored."""
    compiled: list[int] = []
    monkeypatch.setattr(Block, "compile", lambda self, *_, **__: compiled.append(id(self)))
    seen = record_dtypes(monkeypatch, grpo, "token_logprobs", "generate")
    made, steps = calls_of(monkeypatch, "make_experience"), calls_of(monkeypatch, "update")
    run_grpo(tmp_path, iterations=1)
    networks = made[0]["policy"], made[0]["reference"]
    assert seen == {"token_logprobs": {"float32"}, "generate": {"float32"}} and not compiled
    assert not any(block.recompute for network in networks for block in network.h)
    assert all(p.requires_grad for p in networks[0].parameters())
    for dtypes in seen.values():
        dtypes.clear()
    flags = {"dtype": "bfloat16", "compile": True, "recompute": True, "train_layers": 1}
    run_grpo(tmp_path, iterations=1, **flags)
    networks = made[1]["policy"], made[1]["reference"]
    assert seen == {"token_logprobs": {"bfloat16"}, "generate": {"bfloat16"}}
    assert sorted(compiled) == sorted(id(block) for network in networks for block in network.h)
    assert all(block.recompute for network in networks for block in network.h)
    assert steps[1]["policy"].wte.weight.requires_grad is False and len(steps) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rollouts": 30}, r"--rollouts must be a multiple of --group \(8\)"),
        ({"minibatch": 33}, "--minibatch must be at most --rollouts"),
        ({"kl": "k1"}, "--kl k1 in the loss has no gradient"),
        ({"kind": "reinforce"}, "--kind must be one of"),
        ({"max_new_tokens": 24}, "--max_new_tokens 24 leaves no room"),
    ],
)
def test_settings_that_make_no_sense(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        run_grpo(tmp_path, **changes)
