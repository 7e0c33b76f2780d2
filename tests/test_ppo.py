"""Stage 3a, the script: rewards from outside, and what `train` does with them."""

from __future__ import annotations

import copy
import math
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from helpers import (
    EOS,
    ToyTokenizer,
    assert_same_weights,
    checkpoint,
    frame_batch,
    make_gpt,
    make_scalar,
    plain_sgd,
    read_lines,
    speak_toy,
    strict_json,
    write_lines,
)

import ppo
from common import UserError, load_file, load_model
from model import GPT, GPTConfig, Rollout, generate
from ppo import Config, load_reward, make_experience

CPU = torch.device("cpu")


# ------------------------------------------------------------------------------------------------ rewards from outside

REWARDS = """
def letters(prompts, completions):
    return [c.count("a") + 0.1 * len(p) for p, c in zip(prompts, completions)]

def too_few(prompts, completions):
    return [1.0]

def not_finite(prompts, completions):
    return [float("nan")] * len(completions)

def words(prompts, completions):
    return ["good"] * len(completions)

def none(prompts, completions):
    return None

number = 3
"""


def reward_file(folder: Path) -> str:
    path = folder / "toy_rewards.py"
    path.write_text(REWARDS, encoding="utf-8")
    return str(path)


def test_reward_from_a_file(tmp_path):
    """A user's own function: the right texts in the right order, numbers of any kind back as a tensor."""
    score, model = load_reward(f"{reward_file(tmp_path)}:letters", ToyTokenizer(), CPU)
    assert model is None
    assert score(None, ["bb", "b"], ["aab", "c"]).tolist() == pytest.approx([2.2, 0.1])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("too_few", "1 rewards for 2"),
        ("not_finite", "not a finite number"),
        ("words", "one number"),
        ("none", "one number"),
    ],
)
def test_wrong_rewards_are_reported(tmp_path, name, message):
    """A reward function that returns too few, nan or text: a message with its name, not a crash
    later or silent training on nonsense."""
    score, _ = load_reward(f"{reward_file(tmp_path)}:{name}", ToyTokenizer(), CPU)
    with pytest.raises(UserError, match=message) as error:
        score(None, ["b", "b"], ["c", "d"])
    assert f"toy_rewards.py:{name}" in str(error.value)


@pytest.mark.parametrize("name", ["number", "missing"])
def test_a_reward_that_is_no_function_is_reported(tmp_path, name):
    """A misspelt function name."""
    with pytest.raises(UserError, match=f"no function {name}"):
        load_reward(f"{reward_file(tmp_path)}:{name}", ToyTokenizer(), CPU)


def test_a_reward_that_can_not_be_loaded_is_reported(tmp_path):
    """A missing file, a file that doesn't import, a policy in the place of a reward model, another vocabulary."""
    broken = tmp_path / "broken_rewards.py"
    broken.write_text("import no_such_module_anywhere\n", encoding="utf-8")
    policy, scorer = checkpoint(tmp_path / "policy", make_gpt(0)), checkpoint(tmp_path / "scorer", make_scalar(0))
    other = ToyTokenizer()
    other.name = "other"
    for spec, tokenizer, message in (
        (f"{tmp_path}/absent.py:f", ToyTokenizer(), "file to exist"),
        (f"{broken}:f", ToyTokenizer(), "no_such_module_anywhere"),
        (str(tmp_path / "absent"), ToyTokenizer(), "reward_model.py"),
        (policy, ToyTokenizer(), "reward model"),
        (scorer, other, "toy tokens"),
    ):
        with pytest.raises(UserError, match=message):
            load_reward(spec, tokenizer, CPU)


def test_a_checkpoint_scores_every_rollout_as_if_it_were_alone(tmp_path, float64):
    """Rewards that depend on batch mates, on slices of the batch, or on filler; the normalisation must be in them."""
    scorer = make_scalar(1)
    scorer.mean.fill_(0.7)
    scorer.std.fill_(3.0)
    score, _ = load_reward(checkpoint(tmp_path / "scorer", scorer), ToyTokenizer(), CPU)
    frame = frame_batch(B=70, extra=3, seed=47)
    found = score(Rollout(frame.tokens, frame.prompt_lens, frame.lens, torch.ones(70, dtype=torch.bool)), [], [])
    assert found.shape == (70,)
    assert not found.requires_grad
    for i in range(0, 70, 3):
        raw = scorer.head(scorer.gpt.hidden(frame.row(i)))[0, -1, 0].item()
        assert found[i].item() == pytest.approx((raw - 0.7) / 3, abs=1e-11)


# ------------------------------------------------------------------------------------------------ the script

PROMPTS = ["a", "bcd", "efghi", "jw", "wkl", "mnopqrs", "t", "uv"]  # w is the EOS id


def run_ppo(tmp_path: Path, monkeypatch, policy, **changes):
    """ppo.train on toy prompts; -> results, trained policy, log, what every make_experience was given and gave."""
    speak_toy(monkeypatch, ppo)
    calls: list[dict] = []
    original = make_experience

    def record(policy, reference, value_model, rollout, scores, kl_coef, config):
        call = {"policy": policy, "reference": reference, "value_model": value_model, "rollout": rollout}
        call |= {"scores": scores, "kl_coef": kl_coef, "value_start": copy.deepcopy(value_model.state_dict())}
        call["experience"] = original(policy, reference, value_model, rollout, scores, kl_coef, config)
        calls.append(call)
        return call["experience"]

    monkeypatch.setattr(ppo, "make_experience", record)
    out = tmp_path / "out"
    settings = {
        "prompts": write_lines(tmp_path / "p.jsonl", [{"prompt": p} for p in PROMPTS]),
        "policy": checkpoint(tmp_path / "policy", policy),
        "reward": f"{reward_file(tmp_path)}:letters",
        **{"out_dir": str(out), "iterations": 3, "rollouts": 12, "max_new_tokens": 7},
        **{"temperature": 0.7, "minibatch": 5, "micro_batch": 2},
        **{"lr": 3e-3, "value_lr": 3e-3, "warmup": 0, "eos_penalty": 1.5, "kl_coef": 0.2, "device": "cpu"},
        **{"ppo_epochs": 2, "gamma": 1.0, "lam": 0.95, "clip": 0.2},
        **{"value_clip": 0.5, "target_kl": 0.1, "kl": "k1", "kl_target": 0.0},
    }
    results = ppo.train(Config(**{**settings, **changes}))
    return results, load_model(out, CPU)[0], read_lines(out / "metrics.jsonl"), calls


def test_what_is_logged_is_what_was_used(tmp_path, monkeypatch, float64):
    """Logged KL that is not the KL trained on, entropy or KL averaged over pads, a cut completion that keeps its
    score, EOS looked for in the prompt, a score shown with the penalty in it: every logged figure against the
    rollout and the tensors of the update."""
    results, _, log, calls = run_ppo(tmp_path, monkeypatch, make_gpt(0, block_size=24), kl="k1")
    assert len(log) == len(calls) == 3
    cut_rows = 0
    for row, call in zip(log, calls, strict=True):
        rollout, e = call["rollout"], call["experience"]
        totals, raw, kls, k3s, entropies, stops = [], [], [], [], [], []
        for i, (P, n) in enumerate(zip(rollout.prompt_lens.tolist(), rollout.lens.tolist(), strict=True)):
            prompt, completion = rollout.tokens[i, :P].tolist(), rollout.tokens[i, P:n].tolist()
            stops.append(EOS in completion)
            raw.append(sum(c == 0 for c in completion) + 0.1 * len(prompt))
            d = [(e.logprobs[i, t] - e.ref_logprobs[i, t]).item() for t in range(P - 1, n - 1)]
            kls.append(sum(d))
            k3s.append(sum(math.exp(-x) - 1 + x for x in d))
            entropies += [e.entropy[i, t].item() for t in range(P - 1, n - 1)]
            totals.append(raw[-1] - 1.5 * (not stops[-1]) - 0.2 * kls[-1])
            assert e.rewards[i].sum().item() == pytest.approx(totals[-1], abs=1e-10)
            assert e.rewards[i, n - 2].item() == pytest.approx(raw[-1] - 1.5 * (not stops[-1]) - 0.2 * d[-1], abs=1e-10)
        cut_rows += stops.count(False)
        mask = e.action_mask
        residual, returns = (e.returns - e.values)[mask], e.returns[mask]
        expected = {
            "score": sum(raw) / 12,
            "kl": sum(kls) / 12,
            "k3": sum(k3s) / 12,
            "objective": sum(totals) / 12,
            "entropy": sum(entropies) / len(entropies),
            "eos_rate": sum(stops) / 12,
            "length": len(entropies) / 12,
            "distinct": len({tuple(c) for c in rollout.completions()}) / 12,
            "explained_variance": 1 - (residual.var(correction=0) / returns.var(correction=0)).item(),
            "kl_coef": 0.2,
        }
        assert {k: row[k] for k in expected} == pytest.approx(expected, abs=1e-6)  # the log rounds to six digits
        assert row["first_ratio"] == 1  # to six digits
    assert 0 < cut_rows < 36, "some completions must be cut and some ended"
    assert (log[0]["kl"], log[0]["k3"]) == (0.0, 0.0)  # the policy starts as the reference
    assert log[2]["k3"] > 0
    assert results["score"] == pytest.approx(log[2]["score"], abs=1e-6)  # the last quarter of three iterations
    strict_json(tmp_path / "out" / "results.json")


def test_the_reference_stays_frozen(tmp_path, monkeypatch):
    """A reference that shares storage with the policy, or learns: the KL penalty would hold nothing."""
    start = make_gpt(1, block_size=24)
    _, policy, _, calls = run_ppo(tmp_path, monkeypatch, start, lr=1e-2)
    reference = calls[-1]["reference"]
    storages = {p.data_ptr() for m in (calls[-1]["policy"], calls[-1]["value_model"]) for p in m.parameters()}
    for (name, p), original in zip(reference.named_parameters(), start.parameters(), strict=True):
        assert torch.equal(p, original), name
        assert not p.requires_grad
        assert p.grad is None
        assert p.data_ptr() not in storages
    assert not torch.equal(policy.wte.weight, start.wte.weight)


def test_the_value_model_starts_as_the_reward_model(tmp_path, monkeypatch, float64):
    """A critic from other weights, without the normalisation, or sharing storage with the reward
    model, which then drifts as it learns."""
    scorer = make_scalar(2, block_size=24)
    scorer.mean.fill_(-0.4)
    scorer.std.fill_(1.7)
    loaded = []
    original = load_reward

    def record(*args):
        loaded.append(original(*args))
        return loaded[-1]

    monkeypatch.setattr(ppo, "load_reward", record)
    reward = checkpoint(tmp_path / "scorer", scorer)
    _, _, _, calls = run_ppo(tmp_path, monkeypatch, make_gpt(3, block_size=24), reward=reward, value_lr=1e-2)
    first = calls[0]
    for name, tensor in scorer.state_dict().items():
        assert torch.equal(first["value_start"][name], tensor), name
        assert torch.equal(loaded[0][1].state_dict()[name], tensor), f"the reward model's {name} has changed"
    rollout = first["rollout"]
    expected = scorer.score(rollout.tokens, rollout.lens) - 1.5 * (~rollout.ended)
    torch.testing.assert_close(first["scores"], expected.detach(), rtol=0, atol=1e-11)
    assert not torch.equal(calls[-1]["value_model"].head.weight, scorer.head.weight)


def test_without_a_reward_model_values_start_at_0(tmp_path, monkeypatch):
    """A random critic makes the first advantages noise."""
    _, _, _, calls = run_ppo(tmp_path, monkeypatch, make_gpt(4, block_size=24), iterations=1)
    assert (calls[0]["experience"].values == 0).all()


def test_learning_rates_belong_to_their_networks(tmp_path, monkeypatch, float64):
    """lr 0 leaves the policy as it was, to the bit, for a whole run, while the
    critic learns; and the other way round."""
    start = make_gpt(5, block_size=24)
    _, policy, log, calls = run_ppo(tmp_path, monkeypatch, start, lr=0.0, value_lr=1e-2)
    assert all(torch.equal(a, b) for a, b in zip(policy.parameters(), start.parameters(), strict=True))
    assert all(row["approx_kl"] == 0 and row["clip_fraction"] == 0 and row["kl"] == 0 for row in log)
    state = load_file(tmp_path / "out" / "state.pt")["value_model"]
    assert any(not torch.equal(state[k], v) for k, v in calls[0]["value_start"].items())

    _, policy, _, calls = run_ppo(tmp_path, monkeypatch, start, lr=1e-2, value_lr=0.0)
    state = load_file(tmp_path / "out" / "state.pt")["value_model"]
    assert all(torch.equal(state[k], v) for k, v in calls[0]["value_start"].items())
    assert not torch.equal(policy.wte.weight, start.wte.weight)


def test_the_adaptive_coefficient_follows_the_logged_kl(tmp_path, monkeypatch, float64):
    """A controller fed with another KL (of one rank, of prompt tokens) or a penalty that
    goes on with the initial coefficient."""
    changes = {"iterations": 4, "lr": 1e-2, "kl_target": 0.5, "kl_horizon": 100.0}
    _, _, log, calls = run_ppo(tmp_path, monkeypatch, make_gpt(6, block_size=24), **changes)
    coef = 0.2
    for row, call in zip(log, calls, strict=True):
        assert row["kl_coef"] == pytest.approx(coef, abs=1e-5)
        assert call["kl_coef"] == pytest.approx(coef, abs=1e-5)
        coef *= 1 + min(max(row["kl"] / 0.5 - 1, -0.2), 0.2) * 12 / 100


def test_rollouts_use_temperature_only(tmp_path, monkeypatch):
    """top-k, top-p or a minimum length in rollouts: the policy sampled from is not the policy
    that is scored, and KL turns negative."""
    seen = []
    original = generate

    def record(*args, **kwargs):
        seen.append(kwargs)
        return original(*args, **kwargs)

    monkeypatch.setattr(ppo, "generate", record)
    run_ppo(tmp_path, monkeypatch, make_gpt(7, block_size=24), iterations=1)
    assert seen[0]["temperature"] == 0.7
    assert not {"top_k", "top_p"} & seen[0].keys()
    assert not {"top_k", "top_p", "min_len", "min_length", "min_new_tokens"} & {f.name for f in fields(Config)}


def test_training_raises_the_reward(tmp_path, monkeypatch):
    """The toy must work: a reward for one letter makes the policy write it."""
    torch.manual_seed(0)
    even = GPT(GPTConfig(23, 24, n_layer=1, n_head=2, n_embd=32))  # every letter about equally likely
    changes = {"iterations": 10, "rollouts": 32, "minibatch": 16, "micro_batch": 0}
    changes |= {"lr": 1e-2, "kl_coef": 0.01, "temperature": 1.0}
    _, _, log, _ = run_ppo(tmp_path, monkeypatch, even, **changes)
    assert log[-1]["score"] > log[0]["score"] + 2


def test_gradients_are_those_of_the_script_s_optimiser(tmp_path, monkeypatch, float64):
    """The whole script with plain SGD: the micro-batch changes memory and nothing else, over several iterations."""
    plain_sgd(monkeypatch)
    start, trained = make_gpt(9, block_size=24), []
    for size in (1, 2, 0):
        _, model, _, _ = run_ppo(tmp_path, monkeypatch, start, iterations=2, micro_batch=size, lr=0.02)
        trained.append(model)
    for model in trained[1:]:
        assert_same_weights(model, trained[0], start)


@pytest.mark.parametrize(
    "changes",
    [
        {"temperature": 0.0},
        {"minibatch": 13},
        {"minibatch": 0},
        {"lam": 1.1},
        {"gamma": -0.1},
        {"clip": 0.0},
        {"kl_coef": -0.1},
        {"rollouts": 0},
        {"max_new_tokens": 24},
        {"train_layers": 3},
        {"micro_batch": -1},
        {"iterations": 0},
    ],
    ids=str,
)
def test_impossible_settings_are_refused(tmp_path, monkeypatch, changes):
    """A setting that can't work stops at once with one line, not as a crash or as
    silent nonsense after the first rollout."""
    with pytest.raises(UserError):
        run_ppo(tmp_path, monkeypatch, make_gpt(10, block_size=24), **changes)
