"""The comparison: intervals against known values, exact KL against a slow loop, best-of-n, and what ends up in
results.json."""

from __future__ import annotations

import copy
import itertools
import math
from pathlib import Path

import pytest
import torch
from helpers import (
    EOS,
    ToyTokenizer,
    checkpoint,
    make_gpt,
    make_scalar,
    random_prompts,
    speak_toy,
    spread,
    strict_json,
    write_lines,
)

import evaluate
from common import UserError
from evaluate import Config, best_of_n, sample_policy, standard_error, wilson_interval, win_rate

TOY = ToyTokenizer()


# ------------------------------------------------------------------------------------------------ statistics


@pytest.mark.parametrize(
    ("share", "n", "low", "high"),
    [
        (0.5, 100, 0.4038, 0.5962),
        (0.0, 10, 0.0, 0.2775),
        (1.0, 10, 0.7225, 1.0),
        (0.9, 10, 0.5958, 0.9821),
        (0.95, 400, 0.9240, 0.9674),
    ],
)
def test_wilson_interval_equals_known_values(share, n, low, high):
    """mean +- 1.96 errors gives [1, 1] for ten wins of ten and leaves [0, 1] near the ends."""
    assert wilson_interval(share, n) == pytest.approx((low, high), abs=6e-5)


@pytest.mark.parametrize("share", [0.0, 0.13, 0.5, 0.999, 1.0])
def test_wilson_interval_solves_its_equation(share):
    """The ends are the p whose own standard error puts the observed share 1.96 of them away (Wilson's definition)."""
    for n in (5, 200):
        for p in wilson_interval(share, n):
            assert abs(share - p) == pytest.approx(1.96 * math.sqrt(max(0.0, p * (1 - p)) / n), abs=1e-7)
            assert -1e-12 <= p <= 1 + 1e-12


def test_win_rate_counts_ties_as_half():
    """Ties counted as losses (or wins), pairs of different prompts, or an interval of another rate."""
    rate, low, high = win_rate([1.0, 2.0, 3.0, 0.0], [0.0, 2.0, 4.0, -1.0])
    assert rate == 0.625
    assert (low, high) == wilson_interval(0.625, 4)
    same = [0.3, 1.0, -2.0]
    assert win_rate(same, same)[0] == 0.5
    assert win_rate([1.0] * 10, [0.0] * 10) == pytest.approx((1.0, 0.7225, 1.0), abs=1e-4)
    assert win_rate([0.0] * 10, [1.0] * 10) == pytest.approx((0.0, 0.0, 0.2775), abs=1e-4)
    with pytest.raises(ValueError):
        win_rate([1.0, 2.0], [1.0])


def test_standard_error_by_hand(float64):
    """The deviation of the values in the place of that of their mean, or nan for a single value."""
    assert standard_error([1.0, 2.0, 3.0, 4.0]) == pytest.approx(math.sqrt(5 / 3) / 2, rel=1e-12)
    assert standard_error([7.0]) == 0.0


# ------------------------------------------------------------------------------------------------ samples and KL


def relatives(seed: int = 0):
    """A policy and a baseline near it."""
    baseline = make_gpt(seed, block_size=24)
    policy = copy.deepcopy(baseline)
    spread(policy, seed + 1, scale=0.05)
    return policy, baseline


def slow_kl(policy, baseline, prompt: list[int], actions: list[int], temperature: float) -> float:
    """Sum over the actions of KL(policy || baseline) of the distribution each was
    drawn from, by enumeration in float64."""
    ids, total = prompt + actions, 0.0
    logits = [m(torch.tensor([ids]))[0] / temperature for m in (policy, baseline)]
    for t in range(len(prompt), len(ids)):
        p, q = (x[t - 1].softmax(-1).tolist() for x in logits)
        total += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    return total


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_samples_come_with_their_own_figures(float64, temperature):
    """Figures in the order of the batches instead of the prompts, KL over prompt or filler or at temperature 1, EOS
    missing in length or KL, scores that depend on batch mates: 70 prompts of unequal length against one at a time."""
    policy, baseline = relatives()
    scorer = make_scalar(3, block_size=24)
    scorer.mean.fill_(0.2)
    scorer.std.fill_(1.5)
    ids = random_prompts([1 + (7 * i) % 11 for i in range(70)], 22, seed=4)
    config = Config(max_new_tokens=8, temperature=temperature)
    with torch.no_grad():
        found = sample_policy(policy, baseline, scorer, ids, TOY, config, seed=5)
        for i, prompt in enumerate(ids):
            completion = TOY.encode(found["completion"][i])
            actions = completion + [EOS] * found["ended"][i]
            assert len(actions) == found["length"][i]
            assert found["ended"][i] or len(actions) == 8
            assert EOS not in completion
            assert found["kl"][i] == pytest.approx(slow_kl(policy, baseline, prompt, actions, temperature), abs=1e-10)
            assert found["rm"][i] == pytest.approx(scorer(torch.tensor([prompt + actions]))[0, -1].item(), abs=1e-10)
    assert 0 < sum(found["ended"]) < 70
    assert all(k > 0 for k in found["kl"])


def test_the_baseline_has_no_kl_to_itself(float64):
    """KL of the baseline that is not 0: other code for the two; also for a copy, where the
    shortcut for the same object doesn't help."""
    baseline = make_gpt(6, block_size=24)
    ids = random_prompts([1, 5, 3, 7], 22, seed=7)
    config = Config(max_new_tokens=6)
    assert sample_policy(baseline, baseline, None, ids, TOY, config, seed=1)["kl"] == [0.0] * 4
    twin = copy.deepcopy(baseline)
    assert sample_policy(twin, baseline, None, ids, TOY, config, seed=1)["kl"] == pytest.approx([0.0] * 4, abs=1e-11)


def test_samples_are_drawn_at_the_temperature_without_truncation(float64):
    """A temperature that is not passed on: at 0.01 the samples must be the greedy ones."""
    policy, baseline = relatives(8)
    ids = random_prompts([2, 4], 22, seed=9)
    found = sample_policy(policy, baseline, None, ids, TOY, Config(max_new_tokens=5, temperature=0.01), seed=1)
    for prompt, text, ended in zip(ids, found["completion"], found["ended"], strict=True):
        row = list(prompt)
        for token in TOY.encode(text) + [EOS] * ended:
            assert policy(torch.tensor([row]))[0, -1].argmax().item() == token
            row.append(token)


# ------------------------------------------------------------------------------------------------ best of n


def test_best_of_n_picks_among_the_first_n_of_each_prompt(float64):
    """n = 1 must be the first sample, the chosen score never falls as n grows, and the pick is the reward model's best,
    not the gold's: against the samples themselves, whose gold reward tells them apart."""
    policy, scorer = make_gpt(10, block_size=24), make_scalar(11, block_size=24)
    ids = random_prompts([1, 6, 3, 3, 9, 2, 4], 22, seed=12)
    prompts = [TOY.decode(p) for p in ids]
    config = Config(max_new_tokens=6, best_of=[1, 2, 5, 16])
    asked: list[list[str]] = []

    def gold(prompts, completions):
        asked.append(completions)
        return [float(len(c)) for c in completions]

    found = best_of_n(policy, scorer, prompts, ids, gold, TOY, config)
    rm = [found[str(n)]["rm"] for n in config.best_of]
    assert rm == sorted(rm)
    assert rm[-1] > rm[0]

    def score(prompt: list[int], text: str) -> float:
        """Ended or cut is not in the text; a completion shorter than the limit has ended."""
        actions = TOY.encode(text)
        actions += [EOS] * (len(actions) < 6)
        return scorer(torch.tensor([prompt + actions]))[0, -1].item()

    with torch.no_grad():
        for n, completions in zip(config.best_of, asked, strict=True):
            scores = [score(p, c) for p, c in zip(ids, completions, strict=True)]
            assert found[str(n)]["rm"] == pytest.approx(sum(scores) / len(scores), abs=1e-10)
            assert found[str(n)]["gold"] == pytest.approx(sum(map(len, completions)) / len(completions))
            assert found[str(n)]["kl_bound"] == pytest.approx(math.log(n) - (n - 1) / n)
        for earlier, later in itertools.pairwise(asked):
            for prompt, a, b in zip(ids, earlier, later, strict=True):
                assert score(prompt, b) >= score(prompt, a) - 1e-10


def test_best_of_one_is_a_plain_sample(monkeypatch, float64):
    """The first of n chosen by score after all, or prompts and samples mixed up
    when each prompt is repeated n times."""
    policy, scorer = make_gpt(13, block_size=24), make_scalar(14, block_size=24)
    ids = random_prompts([5, 1, 3], 22, seed=15)
    rollouts = []
    original = evaluate.generate

    def record(*args, **kwargs):
        rollouts.append(original(*args, **kwargs))
        return rollouts[-1]

    monkeypatch.setattr(evaluate, "generate", record)
    asked: list[list[str]] = []

    def gold(prompts, completions):
        asked.append(completions)
        return [0.0] * len(completions)

    config = Config(max_new_tokens=6, best_of=[1, 4])
    found = best_of_n(policy, scorer, [TOY.decode(p) for p in ids], ids, gold, TOY, config)
    firsts, best, means = {}, {}, {}
    for rollout in rollouts:
        for i, (P, completion) in enumerate(zip(rollout.prompt_lens.tolist(), rollout.completions(), strict=True)):
            prompt = tuple(rollout.tokens[i, :P].tolist())
            with torch.no_grad():
                value = scorer(rollout.tokens[i : i + 1, : rollout.lens[i]])[0, -1].item()
            firsts.setdefault(prompt, (TOY.decode(completion), value))
            best[prompt] = max(best.get(prompt, (-math.inf, "")), (value, TOY.decode(completion)))
            means.setdefault(prompt, []).append(value)
    assert [len(v) for v in means.values()] == [4, 4, 4]
    assert asked[0] == [firsts[tuple(p)][0] for p in ids]
    assert asked[1] == [best[tuple(p)][1] for p in ids]
    assert found["1"]["rm"] == pytest.approx(sum(firsts[tuple(p)][1] for p in ids) / 3, abs=1e-10)
    assert found["4"]["rm"] == pytest.approx(sum(best[tuple(p)][0] for p in ids) / 3, abs=1e-10)


# ------------------------------------------------------------------------------------------------ the script

GOLD = "def gold(prompts, completions):\n    return [float(len(set(c))) for c in completions]\n"
PROMPTS = ["a", "bcd", "efghi", "jw", "wkl", "mnop", "t", "uv", "abc", "ba"]


def run_evaluate(tmp_path: Path, monkeypatch, policies: dict, **changes) -> dict:
    speak_toy(monkeypatch, evaluate)
    (tmp_path / "toy_gold.py").write_text(GOLD, encoding="utf-8")
    demonstrations = [{"prompt": "a", "completion": "bbc"}, {"prompt": "b", "completion": "abcd"}]
    settings = {
        "policies": [checkpoint(tmp_path / name, model) for name, model in policies.items()],
        "reward": checkpoint(tmp_path / "scorer", make_scalar(16, block_size=24)),
        "prompts": write_lines(tmp_path / "p.jsonl", [{"prompt": p} for p in PROMPTS]),
        "rankings": "",
        "demonstrations": write_lines(tmp_path / "d.jsonl", demonstrations),
        "gold": f"{tmp_path / 'toy_gold.py'}:gold",
        **{"max_new_tokens": 6, "best_of": [1, 3], "best_of_prompts": 4},
        **{"out_dir": str(tmp_path / "out"), "device": "cpu"},
    }
    results = evaluate.train(Config(**{**settings, **changes}))
    assert strict_json(tmp_path / "out" / "results.json") == results
    return results


def test_results_are_those_of_the_samples(tmp_path, monkeypatch):
    """Win rates against another policy than the first, KL to itself, a rate over the wrong number of
    prompts, figures of the wrong policy."""
    samples = []
    original = sample_policy

    def record(*args):
        samples.append(original(*args))
        return samples[-1]

    monkeypatch.setattr(evaluate, "sample_policy", record)
    policy, baseline = relatives(17)
    results = run_evaluate(tmp_path, monkeypatch, {"sft": baseline, "ppo": policy, "dpo": make_gpt(18, block_size=24)})
    golds = [[float(len(set(c))) for c in s["completion"]] for s in samples]
    assert list(results["policies"]) == ["sft", "ppo", "dpo"]
    for number, (figures, s, gold) in enumerate(zip(results["policies"].values(), samples, golds, strict=True)):
        assert figures["gold"] == pytest.approx(sum(gold) / 10)
        assert figures["rm"] == pytest.approx(sum(s["rm"]) / 10)
        assert figures["kl"] == pytest.approx(sum(s["kl"]) / 10)
        assert figures["eos_rate"] == pytest.approx(sum(s["ended"]) / 10)
        assert figures["length"] == pytest.approx(sum(s["length"]) / 10)
        assert figures["distinct"] == len(set(s["completion"])) / 10
        if number:
            wins = sum(1.0 if a > b else 0.5 if a == b else 0.0 for a, b in zip(gold, golds[0], strict=True))
            found = [figures[k] for k in ("win_rate", "win_low", "win_high")]
            assert found == pytest.approx([wins / 10, *wilson_interval(wins / 10, 10)])
            assert figures["kl"] > 0
    first = results["policies"]["sft"]
    assert first["kl"] == 0.0
    assert first["win_rate"] is None
    assert results["demonstrations"] == 3.0  # {b, c} and {a, b, c, d}
    assert set(results["best_of_n"]) == {"1", "3"}
    assert results["ceiling"] is None


def test_the_same_weights_twice_are_an_even_match(tmp_path, monkeypatch, float64):
    """A position bias: a copy of the baseline, sampled afresh, must win about as often as it loses, at KL 0."""
    baseline = make_gpt(19, block_size=24)
    ids = random_prompts([1 + i % 9 for i in range(300)], 22, seed=20)
    prompts = write_lines(tmp_path / "many.jsonl", [{"prompt": TOY.decode(p)} for p in ids])
    results = run_evaluate(tmp_path, monkeypatch, {"one": baseline, "two": baseline}, prompts=prompts, n_prompts=0)
    figures = results["policies"]["two"]
    assert figures["win_low"] < 0.5 < figures["win_high"]
    assert figures["kl"] == pytest.approx(0, abs=1e-11)


def test_without_gold_the_reward_model_judges(tmp_path, monkeypatch):
    """Win rates need a judge: the reward model where no truth is known, and a clear message where there is neither."""
    policy, baseline = relatives(21)
    results = run_evaluate(tmp_path, monkeypatch, {"a": baseline, "b": policy}, gold="", demonstrations="")
    assert results["policies"]["b"]["gold"] is None
    assert 0 <= results["policies"]["b"]["win_rate"] <= 1
    assert results["policies"]["b"]["rm"] is not None
    with pytest.raises(UserError, match="judge"):
        run_evaluate(tmp_path, monkeypatch, {"a": baseline}, gold="", reward="")


def test_rankings_that_compare_nothing_are_reported(tmp_path, monkeypatch):
    """Held-out rankings of ties only leave no pair to measure accuracy on: one line, not a crash inside torch."""
    rankings = write_lines(tmp_path / "r.jsonl", [{"prompt": "a", "completions": [["b", "c"]]}])
    try:
        results = run_evaluate(tmp_path, monkeypatch, {"a": make_gpt(22, block_size=24)}, rankings=rankings)
    except UserError as error:
        assert "r.jsonl" in str(error)
    else:
        assert "accuracy" not in results["reward_model"]
