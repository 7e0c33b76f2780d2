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
    TOY,
    assert_same_weights,
    checkpoint,
    completion_logprobs,
    descend,
    frame_batch,
    make_gpt,
    make_scalar,
    make_told,
    plain_sgd,
    read_lines,
    record_dtypes,
    strict_json,
    write_lines,
)


import lib.reward
import ppo
from model import Block
from lib.checkpoint import Checkpoint, load_file, load_model, save_model
from lib.cli import UserError
from lib.reward import call_reward, load_reward
from lib.train import lr_at
from model import GPT, GPTConfig, ScalarModel
from sampling import Rollout, generate
from ppo import Config, initial_value_model, make_experience

CPU = torch.device("cpu")
SCALARS = pytest.mark.parametrize("make", [make_scalar, make_told])


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

def stops(prompts, completions, ended):
    return ended

def same(prompts, completions):
    return [1.0] * len(completions)

number = 3
"""


def reward_file(folder: Path) -> str:
    path = folder / "toy_rewards.py"
    path.write_text(REWARDS, encoding="utf-8")
    return str(path)


def toy_policy(**sizes) -> Checkpoint:
    return Checkpoint(make_gpt(0, **sizes), "toy", "")


def cut_rollout(*ended: bool) -> Rollout:
    """A rollout of which only `ended` is looked at."""
    ones = torch.ones(len(ended), dtype=torch.long)
    return Rollout(torch.zeros(len(ended), 2, dtype=torch.long), ones, 2 * ones, torch.tensor(ended))


def test_reward_from_a_file(tmp_path):
    """A user's own function: the right texts in the right order, numbers of any kind back as a tensor."""
    score, models = load_reward([f"{reward_file(tmp_path)}:letters"], toy_policy(), "", CPU)
    assert models == []
    assert score(cut_rollout(True, True), ["bb", "b"], ["aab", "c"]).tolist() == pytest.approx([2.2, 0.1])


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
    score, _ = load_reward([f"{reward_file(tmp_path)}:{name}"], toy_policy(), "", CPU)
    with pytest.raises(UserError, match=message) as error:
        score(cut_rollout(True, True), ["b", "b"], ["c", "d"])
    assert f"toy_rewards.py:{name}" in str(error.value)


@pytest.mark.parametrize("name", ["number", "missing"])
def test_a_reward_that_is_no_function_is_reported(tmp_path, name):
    """A misspelt function name."""
    with pytest.raises(UserError, match=f"no function {name}"):
        load_reward([f"{reward_file(tmp_path)}:{name}"], toy_policy(), "", CPU)


def test_a_reward_that_can_not_be_loaded_is_reported(tmp_path):
    """A missing file, a file that doesn't import, a policy in the place of a reward model, another vocabulary, texts
    that are too long for it, another task: scores would be plausible and wrong, or a traceback hours later."""
    broken = tmp_path / "broken_rewards.py"
    broken.write_text("import no_such_module_anywhere\n", encoding="utf-8")
    policy, scorer = checkpoint(tmp_path / "policy", make_gpt(0)), checkpoint(tmp_path / "scorer", make_scalar(0))
    short = checkpoint(tmp_path / "short", make_scalar(0, block_size=47))
    save_model(tmp_path / "demo", make_scalar(0), "toy", "test", Config(), "tiny")
    toy = toy_policy()
    for spec, asking, message in (
        (f"{tmp_path}/absent.py:f", toy, "file to exist"),
        (f"{broken}:f", toy, "no_such_module_anywhere"),
        (str(tmp_path / "absent"), toy, "reward_model.py"),
        (policy, toy, "reward model"),
        (scorer, toy._replace(tokenizer="other"), "reads toy tokens, the policy writes other tokens"),
        (short, toy, "texts of 47 tokens at most, the policy's have up to 48"),
        (str(tmp_path / "demo"), toy, "trained on the embedded task, and the prompts are not of it"),
    ):
        with pytest.raises(UserError, match=message):
            load_reward([f"{reward_file(tmp_path)}:letters", spec], asking, "", CPU)
    for spec in (scorer, str(tmp_path / "demo")):  # the same are right where they belong
        assert len(load_reward([spec], toy, "tiny", CPU)[1]) == 1


def test_a_function_may_ask_which_completions_ended(tmp_path):
    """A function with a parameter `ended` that is told nothing, or that all have ended, can't tell a cut text from a
    finished one; one without it must not be given it."""
    score, _ = load_reward([f"{reward_file(tmp_path)}:stops"], toy_policy(), "", CPU)
    assert score(cut_rollout(True, False, True), ["b"] * 3, ["c"] * 3).tolist() == [1, 0, 1]

    def stops(prompts, completions, *, ended):
        return ended

    assert call_reward(stops, ["b"] * 2, ["c"] * 2, [False, True]) == [0, 1]
    assert call_reward(stops, ["b"] * 2, ["c"] * 2) == [1, 1]  # texts of which nothing is known are whole


MIXES = [
    ("sum", [0.5, -2.0], lambda a, b: 0.5 * a - 2 * b),
    ("sum", None, lambda a, b: a + b),
    ("mean", [0.5, 2.0], lambda a, b: (0.5 * a + 2 * b) / 2.5),
    ("mean", None, lambda a, b: (a + b) / 2),
    ("min", [0.5, 2.0], lambda a, b: min(0.5 * a, 2 * b)),
    ("min", None, min),
]


@pytest.mark.parametrize(("combine", "weights", "truth"), MIXES)
def test_several_rewards_by_hand(tmp_path, float64, combine, weights, truth):
    """A reward model and a function together, each with its own weight, against plain arithmetic: weights exchanged,
    forgotten, or not part of the mean's divisor; a minimum over rows instead of over rewards."""
    scorer = make_scalar(1)
    frame = frame_batch(B=6, seed=48)
    rollout = Rollout(frame.tokens, frame.prompt_lens, frame.lens, torch.ones(6, dtype=torch.bool))
    specs = [checkpoint(tmp_path / "scorer", scorer), f"{reward_file(tmp_path)}:letters"]
    score, models = load_reward(specs, toy_policy(), "", CPU, weights, combine)
    completions = ["a", "", "aaa", "b", "aa", "ca"]
    found = score(rollout, ["b"] * 6, completions)
    parts = [(scorer(frame.row(i))[0, -1].item(), completions[i].count("a") + 0.1) for i in range(6)]
    assert found.tolist() == pytest.approx([truth(a, b) for a, b in parts], abs=1e-7)
    assert len(models) == 1
    assert {a < b for a, b in parts} == {True, False}, "each of the two must be the smaller one somewhere"


@pytest.mark.parametrize(
    ("specs", "weights", "combine", "message"),
    [
        (2, [1.0], "sum", "--reward_weights has 1 values for 2 rewards"),
        (1, [1.0, 2.0], "sum", "--reward_weights has 2 values for 1 rewards"),
        (2, [1.0, -1.0], "mean", "--reward_combine mean"),
        (0, [], "sum", "--reward needs"),
    ],
)
def test_a_mix_that_means_nothing_is_refused(tmp_path, specs, weights, combine, message):
    """A weight too few would drop a reward silently; weights that sum to 0 have no mean."""
    with pytest.raises(UserError, match=message):
        load_reward([f"{reward_file(tmp_path)}:letters"] * specs, toy_policy(), "", CPU, weights, combine)


def test_a_checkpoint_scores_every_rollout_as_if_it_were_alone(tmp_path, float64):
    """Rewards that depend on batch mates, on slices of the batch, or on filler; the normalisation must be in them."""
    scorer = make_scalar(1)
    scorer.mean.fill_(0.7)
    scorer.std.fill_(3.0)
    score, _ = load_reward([checkpoint(tmp_path / "scorer", scorer)], toy_policy(), "", CPU)
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
        **{"value_clip": 0.5, "stop_kl": 0.1, "kl": "k1", "kl_target": 0.0},
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


@SCALARS
def test_the_value_model_starts_as_the_reward_model(tmp_path, monkeypatch, float64, make):
    """A critic from other weights, without the normalisation or what the reward model is told, or sharing storage with
    the reward model, which then drifts as it learns."""
    scorer = make(2, block_size=24)
    scorer.mean.fill_(-0.4)
    scorer.std.fill_(1.7)
    loaded = []

    def record(*args, **options):
        loaded.append(load_reward(*args, **options))
        return loaded[-1]

    monkeypatch.setattr(ppo, "load_reward", record)
    reward = checkpoint(tmp_path / "scorer", scorer)
    _, _, _, calls = run_ppo(tmp_path, monkeypatch, make_gpt(3, block_size=24), reward=reward, value_lr=1e-2)
    first = calls[0]
    assert set(first["value_start"]) == set(scorer.state_dict())
    for name, tensor in scorer.state_dict().items():
        assert torch.equal(first["value_start"][name], tensor), name
        assert torch.equal(loaded[0][1][0].state_dict()[name], tensor), f"the reward model's {name} has changed"
    rollout = first["rollout"]
    expected = scorer.score(rollout.tokens, rollout.lens) - 1.5 * (~rollout.ended)
    torch.testing.assert_close(first["scores"], expected.detach(), rtol=0, atol=1e-11)
    for (name, p), start in zip(calls[-1]["value_model"].named_parameters(), scorer.parameters(), strict=True):
        assert not torch.equal(p, start), f"{name} does not learn"


def test_without_a_reward_model_values_start_at_0(tmp_path, monkeypatch):
    """A random critic makes the first advantages noise."""
    _, _, _, calls = run_ppo(tmp_path, monkeypatch, make_gpt(4, block_size=24), iterations=1)
    assert (calls[0]["experience"].values == 0).all()


def test_with_a_function_in_the_mix_values_start_at_0(tmp_path, monkeypatch, float64):
    """A critic in the units of the reward model alone, where a function of unknown size has a part in the reward: the
    first advantages are worse than without a critic (explained variance -1.8 was seen). At 0 it is 0."""
    scorer = checkpoint(tmp_path / "scorer", make_told(2, block_size=24))
    for specs in ([scorer, f"{reward_file(tmp_path)}:letters"], [f"{reward_file(tmp_path)}:letters", scorer]):
        _, _, log, calls = run_ppo(tmp_path, monkeypatch, make_gpt(4, block_size=24), iterations=1, reward=specs)
        assert (calls[0]["experience"].values == 0).all()
        assert log[0]["explained_variance"] == pytest.approx(0, abs=1e-6)
        body = load_model(scorer, CPU, "scalar").model.gpt.state_dict()  # it knows what a good text looks like
        assert all(torch.equal(calls[0]["value_start"][f"gpt.{k}"], v) for k, v in body.items())


@pytest.mark.parametrize(
    ("combine", "weights", "factor"),
    [
        ("sum", [], 1.0),
        ("sum", [2.5], 2.5),
        ("sum", [-0.5], -0.5),
        ("sum", [0.5, 1.5], 2.0),
        ("mean", [0.5, 1.5], 1.0),
        ("mean", [3.0], 1.0),
        ("mean-std", [], 1.0),
        ("min", [3.0], 3.0),
        ("sum", [1.0, -1.0], 0.0),
    ],
    ids=str,
)
@SCALARS
def test_the_value_model_starts_in_the_units_of_the_reward(tmp_path, float64, make, combine, weights, factor):
    """A reward with a weight of 2.5 is 2.5 times as large, and so is what the critic has to predict. With equal reward
    models the truth is known: at the last token it is the very reward."""
    scorer, frame = make(2), frame_batch(B=6, seed=49)
    scorer.mean.fill_(-0.4)
    scorer.std.fill_(1.7)
    specs = [checkpoint(tmp_path / "scorer", scorer)] * max(1, len(weights))
    config = Config(reward=specs, reward_weights=weights, reward_combine=combine)
    score, models = load_reward(specs, toy_policy(), "", CPU, weights, combine)
    value_model = initial_value_model(make_gpt(0), models, config)
    found = value_model.score(frame.tokens, frame.lens)
    rollout = Rollout(frame.tokens, frame.prompt_lens, frame.lens, torch.ones(6, dtype=torch.bool))
    torch.testing.assert_close(found, score(rollout, [""] * 6, [""] * 6), rtol=0, atol=1e-12)
    torch.testing.assert_close(value_model(frame.tokens), factor * scorer(frame.tokens), rtol=0, atol=1e-12)
    assert {p.data_ptr() for p in value_model.parameters()}.isdisjoint(p.data_ptr() for p in models[0].parameters())


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


def test_partial_training_holds_in_the_script(tmp_path, monkeypatch):
    """--train_layers that is checked and then forgotten: all but the last block and the final LayerNorm stay as they
    were, to the bit."""
    start = make_gpt(5, block_size=24)
    _, policy, _, _ = run_ppo(tmp_path, monkeypatch, start, train_layers=1, lr=1e-2)
    for (name, p), before in zip(policy.named_parameters(), start.parameters(), strict=True):
        assert torch.equal(p, before) != name.startswith(("h.1.", "ln_f.")), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rollouts_and_scores_are_in_the_dtype_too(tmp_path, monkeypatch, dtype):
    """--dtype that training hears of and sampling doesn't: most of the time on a GPU is sampling. A reward function of
    the user's own is called without autocast."""
    rollouts = record_dtypes(monkeypatch, ppo, "generate")
    others = record_dtypes(monkeypatch, lib.reward, "score_rollout", "call_reward")
    rewards = [checkpoint(tmp_path / "scorer", make_scalar(1, block_size=24)), f"{reward_file(tmp_path)}:letters"]
    run_ppo(tmp_path, monkeypatch, make_gpt(5, block_size=24), reward=rewards, dtype=dtype, iterations=1)
    assert rollouts == {"generate": {dtype}}
    assert others == {"score_rollout": {dtype}, "call_reward": {"float32"}}


def test_the_adaptive_coefficient_follows_the_logged_kl(tmp_path, monkeypatch, float64):
    """A controller fed with another KL (of one rank, of prompt tokens) or a penalty that
    goes on with the initial coefficient."""
    changes = {"iterations": 5, "lr": 2e-3, "kl_target": 1.5, "kl_horizon": 20.0}
    _, _, log, calls = run_ppo(tmp_path, monkeypatch, make_gpt(6, block_size=24), **changes)
    coef = 0.2
    for row, call in zip(log, calls, strict=True):
        assert row["kl_coef"] == pytest.approx(coef, abs=1e-5)
        assert call["kl_coef"] == pytest.approx(coef, abs=1e-5)
        coef *= 1 + min(max(row["kl"] / 1.5 - 1, -0.2), 0.2) * 12 / 20
    errors = [(row["kl"] / 1.5 - 1, row["k3"] / 1.5 - 1) for row in log]
    assert any(abs(kl) < 0.2 and abs(kl - k3) > 0.1 for kl, k3 in errors[:-1]), "which KL it is must make a difference"


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


def test_every_iteration_samples_anew(tmp_path, monkeypatch):
    """The same sampling noise in every iteration (a generator seeded without the iteration) draws the same prompts and
    the same completions for ever, and the same order of the rows. With lr 0 nothing else could make them differ."""
    orders: list[list[int]] = []
    original = torch.randperm

    def record(*args, **options):
        orders.append(original(*args, **options).tolist())
        return torch.tensor(orders[-1])

    monkeypatch.setattr(torch, "randperm", record)
    monkeypatch.setattr("test_ppo.PROMPTS", ["abc"])
    _, _, _, calls = run_ppo(tmp_path, monkeypatch, make_gpt(8, block_size=24), lr=0.0, value_lr=0.0)
    written = [str(call["rollout"].completions()) for call in calls]
    assert len(set(written)) == 3
    assert len({str(o) for o in orders}) == len(orders) == 6  # three iterations of two epochs

    monkeypatch.setattr("test_ppo.PROMPTS", list("abcdefgh"))
    _, _, _, calls = run_ppo(tmp_path, monkeypatch, make_gpt(8, block_size=24), lr=0.0, value_lr=0.0)
    assert len({str(call["rollout"].tokens[:, 0].tolist()) for call in calls}) == 3


def test_the_learning_rates_warm_up_and_decay(tmp_path, monkeypatch):
    """A schedule that is logged and not used, or used for one of the two networks: what the optimiser really has at
    each of its steps, against lr_at."""
    steps: list[tuple[float, float]] = []
    original = ppo.make_optimizer

    def record(*args):
        optimizer = original(*args)
        optimizer.register_step_pre_hook(lambda o, *_: steps.append(tuple(g["lr"] for g in o.param_groups)))
        return optimizer

    monkeypatch.setattr(ppo, "make_optimizer", record)
    changes = {"iterations": 6, "warmup": 2, "lr": 4e-4, "value_lr": 1e-3, "ppo_epochs": 1, "minibatch": 12}
    _, _, log, _ = run_ppo(tmp_path, monkeypatch, make_gpt(8, block_size=24), **changes)
    factors = [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]  # up in two iterations, then down towards 0 after the last
    assert factors == [lr_at(i, 6, 2, "linear") for i in range(6)]
    assert [row["lr"] for row in log] == pytest.approx([4e-4 * f for f in factors], abs=1e-6)
    assert [s[0] for s in steps] == pytest.approx([4e-4 * f for f in factors], rel=1e-12)
    assert [s[1] for s in steps] == pytest.approx([1e-3 * f for f in factors], rel=1e-12)


def test_every_block_is_compiled(tmp_path, monkeypatch):
    """--compile that is ignored, or leaves one of the three networks as it was."""
    compiled: list[int] = []
    monkeypatch.setattr(Block, "compile", lambda self, *_, **__: compiled.append(id(self)))
    _, _, _, calls = run_ppo(tmp_path, monkeypatch, make_gpt(8, block_size=24), iterations=1)
    assert not compiled
    _, _, _, calls = run_ppo(tmp_path, monkeypatch, make_gpt(8, block_size=24), iterations=1, compile=True)
    networks = calls[0]["policy"], calls[0]["reference"], calls[0]["value_model"].gpt
    assert sorted(compiled) == sorted(id(block) for network in networks for block in network.h)


def test_the_true_reward_is_told_which_completions_ended(tmp_path, monkeypatch):
    """--gold with a function that asks for `ended`: its mean is then the share of completions that ended."""
    changes = {"gold": f"{reward_file(tmp_path)}:stops", "reward": f"{reward_file(tmp_path)}:stops"}
    changes |= {"temperature": 5.0}  # so that every token, and EOS among them, is about equally likely
    _, _, log, _ = run_ppo(tmp_path, monkeypatch, make_gpt(0, block_size=24), **changes)
    for row in log:
        assert row["gold"] == pytest.approx(row["eos_rate"], abs=1e-6)
        assert row["score"] == pytest.approx(row["eos_rate"], abs=1e-6)
    assert any(0 < row["gold"] < 1 for row in log)


def test_the_weights_reach_the_training(tmp_path, monkeypatch, float64):
    """--reward_weights and --reward_combine that are checked and then forgotten."""
    letters = f"{reward_file(tmp_path)}:letters"
    mix = {"reward": [letters, letters], "reward_weights": [3.0, 1.0], "reward_combine": "min", "eos_penalty": 0.0}
    _, _, log, calls = run_ppo(tmp_path, monkeypatch, make_gpt(0, block_size=24), iterations=1, **mix)
    rollout = calls[0]["rollout"]
    texts = zip(rollout.prompt_lens.tolist(), rollout.completions(), strict=True)
    expected = [sum(c == 0 for c in completion) + 0.1 * n for n, completion in texts]
    assert calls[0]["scores"].tolist() == pytest.approx(expected, abs=1e-6)
    assert log[0]["score"] == pytest.approx(sum(expected) / 12, abs=1e-6)


@pytest.mark.parametrize("named", [True, False])
def test_the_pretraining_term_reaches_the_training(tmp_path, monkeypatch, float64, named):
    """--ptx_coef that is read and then forgotten, or takes other demonstrations than those that are named, or else than
    those beside the prompts. The reward is the same for all, so PPO itself has no gradient, and a step
    of plain SGD is that of the SFT loss."""
    plain_sgd(monkeypatch)
    start = make_gpt(9, block_size=24)
    expected = copy.deepcopy(start)
    descend(expected, -0.5 * completion_logprobs(expected, [0, 1], [2, 3, EOS]).mean(), 0.1)
    right, other = [{"prompt": "ab", "completion": "cd"}], [{"prompt": "kl", "completion": "mno"}]
    mine = write_lines(tmp_path / "mine.jsonl", right if named else other)
    write_lines(tmp_path / "demonstrations.jsonl", other if named else right)
    ptx = {"ptx_coef": 0.5} | ({"ptx_data": mine} if named else {})
    calm = {"reward": f"{reward_file(tmp_path)}:same", "eos_penalty": 0.0, "kl_coef": 0.0, "lam": 1.0, "grad_clip": 0.0}
    once = {"iterations": 1, "ppo_epochs": 1, "minibatch": 12, "lr": 0.1}
    _, policy, _, _ = run_ppo(tmp_path, monkeypatch, start, **ptx, **calm, **once)
    assert_same_weights(policy, expected, start)


def test_prompts_that_are_cut_are_counted(tmp_path, monkeypatch, capsys):
    """A long --max_new_tokens leaves little room: prompts were cut to one token in silence. Their end stays."""
    changes = {"max_new_tokens": 20, "iterations": 1, "rollouts": 30}
    _, _, _, calls = run_ppo(tmp_path, monkeypatch, make_gpt(0, block_size=24), **changes)
    said = f"{tmp_path / 'p.jsonl'}: 2 of 8 prompts cut to their last 4 tokens; "
    advice = [line for line in capsys.readouterr().out.splitlines() if line.startswith(said)]
    assert len(advice) == 1 and "--block_size" in advice[0] and "--max_new_tokens" in advice[0]
    rollout = calls[0]["rollout"]
    seen = {TOY.decode(t[:n]) for t, n in zip(rollout.tokens.tolist(), rollout.prompt_lens, strict=True)}
    assert seen <= {p[-4:] for p in PROMPTS}
    assert {"fghi", "pqrs"} & seen
    run_ppo(tmp_path, monkeypatch, make_gpt(0, block_size=24), iterations=1)
    assert "prompts cut" not in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------ resuming


class Killed(Exception):
    pass


def run_and_die(tmp_path: Path, monkeypatch, policy, after: int, **changes) -> None:
    """run_ppo, killed in the rollout of the iteration that follows `after` whole ones."""
    iterations = iter(range(after))

    def dying(*args, **options):
        if next(iterations, None) is None:
            raise Killed
        return generate(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(ppo, "generate", dying)
        with pytest.raises(Killed):
            run_ppo(tmp_path, patch, policy, **changes)


@pytest.mark.parametrize(("n_layer", "trained"), [(1, "0"), (2, "01"), (3, "12")])
def test_a_value_model_of_fewer_blocks_is_trained_as_far_as_it_goes(tmp_path, monkeypatch, n_layer, trained):
    """--train_layers 2 with a small reward model: not the user's mistake. And what is frozen in it doesn't move."""
    scorer = make_scalar(3, n_layer=n_layer, block_size=24)
    changes = {"train_layers": 2, "reward": checkpoint(tmp_path / "scorer", scorer), "iterations": 1, "value_lr": 1e-2}
    _, _, _, calls = run_ppo(tmp_path, monkeypatch, make_gpt(5, block_size=24, n_layer=3), **changes)
    after, before = calls[0]["value_model"], calls[0]["value_start"]
    moved = {name for name, p in after.named_parameters() if not torch.equal(p, before[name])}
    assert {name.split(".")[2] for name in moved if ".h." in name} == set(trained)
    assert not any("wte" in name for name in moved)


def test_a_resumed_run_with_a_common_trunk_ends_as_the_unbroken_one(tmp_path, monkeypatch):
    """--train_layers: what policy, reference and value model have in common is in common after --resume too, to the
    bit."""
    start = make_gpt(5, block_size=24, n_layer=3)
    scorer = ScalarModel.from_gpt(start)
    changes = {"train_layers": 1, "lr": 1e-2, "reward": checkpoint(tmp_path / "scorer", scorer)}
    (tmp_path / "b").mkdir()
    _, whole, log, calls = run_ppo(tmp_path, monkeypatch, start, **changes)
    assert calls[0]["experience"].below is not None and calls[0]["value_model"].gpt.frozen == 2
    run_and_die(tmp_path / "b", monkeypatch, start, after=1, save_every=1, **changes)
    _, resumed, again, calls = run_ppo(tmp_path / "b", monkeypatch, start, resume=True, save_every=1, **changes)
    assert len(calls) == 2 and calls[0]["value_model"].gpt.frozen == 2
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    assert [row["value_loss"] for row in again] == [row["value_loss"] for row in log]


def test_a_finished_run_that_is_resumed_keeps_its_results(tmp_path, monkeypatch):
    """Resuming a finished run wrote {"gates": []} over its results, and --strict was satisfied."""
    monkeypatch.setattr(ppo, "task_of", lambda path: "tiny")
    scorer = checkpoint(tmp_path / "scorer", make_scalar(2, block_size=24))
    changes = {"reward": scorer, "gold": ""}
    results, _, _, _ = run_ppo(tmp_path, monkeypatch, make_gpt(0, block_size=24), **changes)
    files = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    assert not all(gate["ok"] for gate in results["gates"]), "a random network must fail"
    again, _, _, calls = run_ppo(tmp_path, monkeypatch, make_gpt(0, block_size=24), resume=True, **changes)
    assert not calls
    assert again == strict_json(tmp_path / "out" / "results.json")
    assert again["gates"] == results["gates"] and len(again["gates"]) == 3
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == files


def test_a_resumed_run_tells_of_the_whole_run(tmp_path, monkeypatch, capsys):
    """The summary of a resumed run covered the resumed part only: another start, and a tail of one iteration."""
    changes = {"iterations": 8, "save_every": 7, "lr": 1e-2}
    (whole_path := tmp_path / "whole").mkdir()
    whole, _, log, _ = run_ppo(whole_path, monkeypatch, make_gpt(0, block_size=24), **changes)
    summary = [line for line in capsys.readouterr().out.splitlines() if line.startswith("last quarter")]
    run_and_die(tmp_path, monkeypatch, make_gpt(0, block_size=24), after=7, **changes)
    capsys.readouterr()
    resumed, _, again, calls = run_ppo(tmp_path, monkeypatch, make_gpt(0, block_size=24), resume=True, **changes)
    assert len(calls) == 1
    for name in ("score", "kl", "k3", "eos_rate", "distinct", "length"):
        assert [row[name] for row in again] == [row[name] for row in log]
        assert resumed[name] == whole[name] == pytest.approx((log[6][name] + log[7][name]) / 2, abs=1e-9)
        assert f"{name} {resumed[name]:.2f} ({log[0][name]:.2f})" in summary[0]
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("last quarter")] == summary


def test_more_iterations_go_on_from_a_finished_run(tmp_path, monkeypatch):
    """A finished run with a larger --iterations is not finished: it goes on where it was."""
    run_ppo(tmp_path, monkeypatch, make_gpt(0, block_size=24), iterations=2)
    results, _, log, calls = run_ppo(tmp_path, monkeypatch, make_gpt(0, block_size=24), iterations=4, resume=True)
    assert [row["step"] for row in log] == [1, 2, 3, 4]
    assert len(calls) == 2
    assert results["score"] == pytest.approx(log[3]["score"], abs=1e-6)


# ------------------------------------------------------------------------------------------------ gates, refusals


def test_only_the_usual_reward_of_the_task_is_judged(tmp_path, monkeypatch):
    """The expected ranges are those of one reward model, unweighted, on the embedded task: for any other reward a gate
    would fail, or pass, by accident."""
    scorer = checkpoint(tmp_path / "scorer", make_scalar(2, block_size=24))
    letters = f"{reward_file(tmp_path)}:letters"
    for task, changes, gates in (
        ("tiny", {"reward": scorer}, 3),
        ("", {"reward": scorer}, 0),
        ("tiny", {"reward": letters}, 0),
        ("tiny", {"reward": [scorer, letters]}, 0),
        ("tiny", {"reward": scorer, "reward_weights": [2.0]}, 0),
    ):
        monkeypatch.setattr(ppo, "task_of", lambda path, task=task: task)
        start = make_gpt(0, block_size=24)
        results, _, _, _ = run_ppo(tmp_path, monkeypatch, start, iterations=1, gold="", **changes)
        assert len(results["gates"]) == gates, (task, changes)


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
        {"train_layers": -1},
        {"grad_clip": -1.0},
        {"kl_target": 4.0, "kl_coef": 0.0},
        {"kl_target": 4.0, "kl_horizon": 0.0},
        {"kl_target": -1.0},
        {"kl": "k4"},
        {"reward_combine": "product"},
        {"reward_weights": [1.0, 1.0]},
        {"reward_weights": [math.nan]},
        {"lr": math.nan},
        {"warmup": 4},
        {"ptx_coef": 0.5},  # and no demonstrations beside the prompts
    ],
    ids=str,
)
def test_impossible_settings_are_refused(tmp_path, monkeypatch, changes):
    """A setting that can't work stops at once with one line that names its flag, not as a crash or as silent nonsense
    after the first rollout. (A gradient norm of -1 ascends; a coefficient of 0 stays 0 whatever the target is.)"""
    with pytest.raises(UserError) as error:
        run_ppo(tmp_path, monkeypatch, make_gpt(10, block_size=24), **changes)
    assert "\n" not in str(error.value)
    assert any(f"--{name}" in str(error.value) for name in changes)
    assert not (tmp_path / "out" / "metrics.jsonl").exists()
