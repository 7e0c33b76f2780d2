"""The comparison: intervals against known values, exact KL against a slow loop, best-of-n, and what ends up in
results.json."""

from __future__ import annotations

import copy
import itertools
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from helpers import (
    EOS,
    TOY,
    beside_a_demo,
    checkpoint,
    completion_logprobs,
    make_gpt,
    make_scalar,
    make_told,
    own_pairs,
    random_prompts,
    slow_generate,
    spread,
    strict_json,
    task_rankings,
    write_lines,
)

from stages import asked, demonstrations, reward_file, run, steady_policy, watching

import evaluate
import sft
from data.batches import contrast_rankings
from data.tiny import gold_parts
from data.tokenizer import load_tokenizer
from evaluate import Config, expected_best, standard_error, token_kl, unique_names, wilson_interval, win_rate
from lib.checkpoint import load_model, save_model
from lib.cli import UserError
from model import ScalarModel
from reward_model import accuracy_by_part
from sampling import Rollout


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


def test_wilson_interval_stays_within_0_and_1():
    """Rounding put its ends a hair outside: -0.000 in the table."""
    for n in range(1, 500):
        low, high = wilson_interval(0.0, n)
        assert low >= 0 and f"{low:.3f}" == "0.000" and high < 1
        low, high = wilson_interval(1.0, n)
        assert high <= 1 and low > 0


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


PROMPTS = ["a", "bcd", "efghi", "jw", "wkl", "mnop", "t", "uv", "abc", "ba"]


def run_evaluate(folder: Path, models: dict, **changes) -> dict:
    demonstrations = [{"prompt": "a", "completion": "bbc"}, {"prompt": "b", "completion": "abcd"}]
    settings = {
        "policies": [checkpoint(folder / name, model) for name, model in models.items()],
        "reward": checkpoint(folder / "scorer", scorer_of_texts()),
        "prompts": write_lines(folder / "p.jsonl", [{"prompt": p} for p in PROMPTS]),
        "rankings": "",
        "demonstrations": write_lines(folder / "d.jsonl", demonstrations),
        "gold": f"{reward_file(folder)}:variety",
        **{"max_new_tokens": 6, "best_of": [1, 3]},
        **{"out_dir": str(folder / "out"), "device": "cpu"},
    }
    results = evaluate.run(Config(**{**settings, **changes}))
    assert strict_json(folder / "out" / "results.json") == results
    return results


def scorer_of_texts():
    scorer = make_scalar(16, block_size=24)
    scorer.mean.fill_(0.2)
    scorer.std.fill_(1.5)
    return scorer


def actions(text: str, ended: bool) -> list[int]:
    return TOY.encode(text) + [EOS] * ended


def mean_and_error(values: list[float]) -> tuple[float, float]:
    return sum(values) / len(values), torch.tensor(values).double().std().item() / math.sqrt(len(values))


def wins(ours: list[float], theirs: list[float]) -> list[float]:
    """The win rate and its interval."""
    share = sum(1.0 if a > b else 0.5 if a == b else 0.0 for a, b in zip(ours, theirs, strict=True)) / len(ours)
    return [share, *wilson_interval(share, len(ours))]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_results_are_those_of_the_samples(tmp_path, float64, temperature):
    """Win rates against another policy than the first, figures in the order of the batches instead of the prompts, KL
    over prompt or filler or at temperature 1, EOS missing in length or KL, scores that depend on batch mates, KL of the
    baseline to itself: of 40 prompts of unequal length, each sample by itself. The true reward writes the samples
    down."""
    policy, baseline = relatives(17)
    models = {"sft": baseline, "ppo": policy, "dpo": make_gpt(18, block_size=24), "twin": copy.deepcopy(baseline)}
    ids = random_prompts([1 + (7 * i) % 11 for i in range(40)], 22, seed=4)
    prompts = write_lines(tmp_path / "many.jsonl", [{"prompt": TOY.decode(p)} for p in ids])
    results = run_evaluate(tmp_path, models, prompts=prompts, best_of=[], temperature=temperature, max_new_tokens=8)
    written, *samples = asked(tmp_path, "variety")
    assert (written.prompts, written.completions) == (["a", "b"], ["bbc", "abcd"])  # the demonstrations
    assert list(results["policies"]) == list(models)
    scorer, first = scorer_of_texts(), None
    for (name, model), call in zip(models.items(), samples, strict=True):
        assert call.prompts == [TOY.decode(p) for p in ids]
        written = list(map(actions, call.completions, call.ended))
        assert all(end or len(ids) == 8 for end, ids in zip(call.ended, written, strict=True))
        with torch.no_grad():
            rm = [scorer(torch.tensor([p + w]))[0, -1].item() for p, w in zip(ids, written, strict=True)]
            kl = [slow_kl(model, baseline, p, w, temperature) for p, w in zip(ids, written, strict=True)]
        gold = [len(set(c)) + 0.5 * e for c, e in zip(call.completions, call.ended, strict=True)]
        first = first or (gold, rm)
        found = results["policies"][name]
        assert (found["gold"], found["gold_se"]) == pytest.approx(mean_and_error(gold))
        expected = {
            "rm": sum(rm) / 40,
            "kl": sum(kl) / 40,
            "eos_rate": sum(call.ended) / 40,
            "length": sum(map(len, written)) / 40,
            "distinct": len(set(call.completions)) / 40,
        }
        assert {k: found[k] for k in expected} == pytest.approx(expected, abs=1e-9)
        for key, ours, theirs in (("win", gold, first[0]), ("rm_win", rm, first[1])):
            rates = [found[f"{key}_{k}"] for k in ("rate", "low", "high")]
            assert rates == ([None] * 3 if name == "sft" else pytest.approx(wins(ours, theirs)))
        assert (found["kl"] == 0) if name == "sft" else abs(found["kl"]) < 1e-11 if name == "twin" else found["kl"] > 0
    assert 0 < sum(samples[1].ended) < 40
    assert results["demonstrations"] == 3.5  # {b, c} and {a, b, c, d}, which have all ended
    assert (results["ceiling"], results["best_of_n"]) == (None, {})


def test_samples_are_drawn_at_the_temperature_without_truncation(tmp_path, float64):
    """A temperature that is not passed on: at 0.01 the samples must be the greedy ones."""
    policy, _ = relatives(8)
    run_evaluate(tmp_path, {"a": policy}, temperature=0.01, best_of=[2, 1], demonstrations="")
    calls = asked(tmp_path, "variety")
    assert [sorted(call.prompts) for call in calls] == [sorted(PROMPTS), sorted(2 * PROMPTS)]
    for call in calls:  # the policy's own samples, and those of best of n
        for prompt, text, ended in zip(call.prompts, call.completions, call.ended, strict=True):
            row = TOY.encode(prompt)
            for token in actions(text, ended):
                assert policy(torch.tensor([row]))[0, -1].argmax().item() == token
                row.append(token)
            assert ended or len(row) == len(prompt) + 6


def test_every_sample_has_its_own_luck(tmp_path):
    """Every 128 prompts with the same random numbers, in the samples or in best of n: standard errors are too small.
    Or the second policy of a seed with those of the next seed's first: what looks like two runs is one. The same prompt
    260 times, two policies that are one, two seeds."""
    steady, written = steady_policy([0.0] * 22 + [-30.0]), []
    prompts = write_lines(tmp_path / "same.jsonl", [{"prompt": "abc"}] * 260)
    changes = {"prompts": prompts, "best_of": [1, 2], "max_new_tokens": 10, "demonstrations": "", "n_prompts": 0}
    for seed in (1, 2):
        run_evaluate(tmp_path, {"one": steady, "two": steady}, seed=seed, **changes)
        written = [text for call in asked(tmp_path, "variety") for text in call.completions]
        assert len(written) == seed * (2 * 260 + 2 * 260)
    assert len(set(written)) == len(written)  # of 22^10


def test_the_first_prompts_are_used(tmp_path):
    """--n_prompts that is ignored, or means other prompts than the ceiling's and the table's."""
    for n, used in ((4, PROMPTS[:4]), (0, PROMPTS), (99, PROMPTS)):
        run_evaluate(tmp_path, {"a": make_gpt(22, block_size=24)}, n_prompts=n, best_of=[], demonstrations="")
        assert asked(tmp_path, "variety")[-1].prompts == used


def test_the_kl_goes_through_the_models_a_few_rows_at_a_time(float64):
    """About eight tensors of the logits' size exist at once: at GPT-2's vocabulary the whole batch was gigabytes. With
    a pretended vocabulary no forward pass may have more than a quarter of the 2^26 logits that are allowed, unless it
    is one row; and the slices must be put together in order."""
    policy, baseline = relatives(3)
    tokens = torch.randint(0, 22, (11, 19), generator=torch.Generator().manual_seed(1))
    prompt_lens, lens = 1 + torch.arange(11) % 5, 19 - 3 * torch.arange(11) % 12
    rollout = Rollout(tokens, prompt_lens, lens, torch.ones(11, dtype=torch.bool))
    with torch.no_grad():
        whole = token_kl(policy, baseline, rollout, 0.7)
        assert whole.shape == (11, 18) and (whole[~rollout.action_mask] == 0).all()
        for i, (start, end) in enumerate(zip(prompt_lens.tolist(), lens.tolist(), strict=True)):
            prompt, actions = tokens[i, :start].tolist(), tokens[i, start:end].tolist()
            assert whole[i].sum().item() == pytest.approx(slow_kl(policy, baseline, prompt, actions, 0.7), abs=1e-10)
    shapes = []
    for model in (policy, baseline):
        model.register_forward_hook(lambda _, inputs, __: shapes.append(tuple(inputs[0].shape)))
    for pretended, rows in ((2**18, 3), (2**30, 1)):
        policy.config.vocab_size = baseline.config.vocab_size = pretended
        shapes.clear()
        with torch.no_grad():
            sliced = token_kl(policy, baseline, rollout, 0.7)
        torch.testing.assert_close(sliced, whole, rtol=0, atol=1e-11)
        assert all(b * T * pretended <= 2**24 or b == 1 for b, T in shapes)
        assert len(shapes) == 2 * -(-11 // rows)  # and no more passes than that takes


def test_samples_and_scores_are_in_the_dtype_and_kl_and_loss_are_not(tmp_path):
    """Small differences of large numbers, as KL and a loss before and after are, would drown in bfloat16; samples and
    scores, where the time goes, are in it."""
    policy, baseline = relatives(3)
    rows = [{"prompt": "a", "completion": "bbc"}]
    changes = {"dtype": "bfloat16", "loss_data": write_lines(tmp_path / "loss.jsonl", rows), "best_of": []}
    results = run_evaluate(tmp_path, {"a": baseline, "b": policy}, demonstrations="", **changes)["policies"]["b"]
    call, scorer = asked(tmp_path, "variety")[1], scorer_of_texts()
    texts = [(TOY.encode(p), actions(c, e)) for p, c, e in zip(call.prompts, call.completions, call.ended, strict=True)]
    with torch.no_grad():
        kl = sum(slow_kl(policy, baseline, *text, 1.0) for text in texts) / 10
        rm = sum(scorer(torch.tensor([p + w]))[0, -1].item() for p, w in texts) / 10
        loss = -completion_logprobs(policy, [0], actions("bbc", True)).mean().item()
    assert results["kl"] == pytest.approx(kl, rel=1e-5) and results["loss"] == pytest.approx(loss, rel=1e-5)
    assert 1e-6 < abs(results["rm"] - rm) < 0.1
    with watching() as watch:
        run_evaluate(tmp_path, {"a": policy}, reward="", dtype="bfloat16")
    assert torch.bfloat16 in watch.products[False]


def test_the_loss_elsewhere_is_each_policy_s_own(tmp_path, float64):
    """What alignment has cost: the mean loss a completion token, EOS included, of each policy on demonstrations that it
    has not seen, by a loop."""
    policy, baseline = relatives(19)
    rows = [{"prompt": "ab", "completion": "cde"}, {"prompt": "f", "completion": "gh"}]
    path = write_lines(tmp_path / "loss.jsonl", rows)
    results = run_evaluate(tmp_path, {"sft": baseline, "ppo": policy}, loss_data=path)["policies"]
    for name, model in (("sft", baseline), ("ppo", policy)):
        losses = []
        for row in rows:
            prompt = TOY.encode_prompt(row["prompt"])
            ids = [*prompt, *TOY.encode(row["completion"]), TOY.eos_id]
            logp = model(torch.tensor([ids]))[0].log_softmax(-1)
            losses += [-logp[t - 1, ids[t]].item() for t in range(len(prompt), len(ids))]
        assert results[name]["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-9)


def test_answers_are_shown_side_by_side(tmp_path, capsys, float64):
    """--show: the prompt, then what every policy says to that very prompt at temperature 0, and whether it was cut; of
    more prompts, and of other lengths, than go through the network at a time."""
    policy, baseline = relatives(17)
    ids = random_prompts([1 + i % 9 for i in range(140)], 22, seed=20)
    prompts = write_lines(tmp_path / "many.jsonl", [{"prompt": TOY.decode(p)} for p in ids])
    run_evaluate(tmp_path, {"sft": baseline, "ppo": policy}, prompts=prompts, show=135, best_of=[])
    lines = []
    for prompt in ids[:135]:
        lines += ["", TOY.decode(prompt)]
        for name, model in (("sft", baseline), ("ppo", policy)):
            rollout = slow_generate(model, [prompt], 6, eos_id=EOS, temperature=0)
            said = TOY.decode(rollout.completions()[0])
            lines.append(f"  {name:12} {said!r}" + ("" if rollout.ended else " [cut]"))
    assert "\n".join(lines) in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------ best of n


@pytest.mark.parametrize("n", [1, 2, 3, 5, 7])
def test_expected_best_is_the_mean_over_all_choices(n):
    """The best of the first n samples alone throws the others away; C(i, n) in the place of C(i, n-1) forgets the best
    one. Against every choice of n of 7 samples."""
    generator = torch.Generator().manual_seed(n)
    scores, values = (torch.randn(4, 7, generator=generator, dtype=torch.float64) for _ in range(2))
    scores[3] = torch.tensor([3.0, 1, 3, 2, 1, 3, 0])  # ties: between equal scores the values must be equal too
    values[3] = -scores[3]
    found = expected_best(scores, values, n)
    for row in range(4):
        chosen = [max(c, key=lambda i: scores[row, i].item()) for c in itertools.combinations(range(7), n)]
        expected = sum(values[row, i].item() for i in chosen) / math.comb(7, n)
        assert found[row].item() == pytest.approx(expected, abs=1e-12)


def test_expected_best_of_very_many_samples_does_not_overflow(float64):
    """C(1024, 512) has 307 digits, which is beyond a float; uniform values have the mean n / (n + 1) in the limit."""
    scores = torch.linspace(0, 1, 1025)[None, :-1]
    for n in (1, 2, 512, 1024):
        expected = (n * 1025 / (n + 1) - 1) / 1024  # the mean of the largest of n of 0, 1, ..., 1023, over 1024
        assert expected_best(scores, scores, n).item() == pytest.approx(expected, abs=1e-9)


def test_best_of_n_equals_a_loop_over_all_choices(tmp_path, float64, capsys):
    """The pick is the reward model's best, not the gold's; n samples of one prompt, not of n prompts; every prompt,
    every sample and every choice counts; n = 1 is the plain mean; the error is that of the mean over prompts. And its
    row in the table, whose KL says that it is an upper bound."""
    policy, scorer = make_gpt(10, block_size=24), scorer_of_texts()
    results = run_evaluate(tmp_path, {"sft": policy}, best_of=[1, 2, 5, 8], demonstrations="")["best_of_n"]
    drawn: dict[str, list[tuple[float, float]]] = {}  # prompt -> score and gold of each sample
    _, *calls = asked(tmp_path, "variety")
    for call in calls:
        for prompt, text, ended in zip(call.prompts, call.completions, call.ended, strict=True):
            with torch.no_grad():
                score = scorer(torch.tensor([TOY.encode(prompt) + actions(text, ended)]))[0, -1].item()
            drawn.setdefault(prompt, []).append((score, len(set(text)) + 0.5 * ended))
    assert set(drawn) == set(PROMPTS) and all(len(v) == 8 for v in drawn.values())
    assert len({pair for v in drawn.values() for pair in v}) > 50
    lines = capsys.readouterr().out.splitlines()
    (header,) = (line for line in lines if line.startswith("policy "))
    assert list(results) == ["1", "2", "5", "8"]
    for n, figures in results.items():
        best = [[max(choice) for choice in itertools.combinations(pairs, int(n))] for pairs in drawn.values()]
        rm, gold = ([sum(pair[k] for pair in pairs) / len(pairs) for pairs in best] for k in (0, 1))
        assert figures["rm"] == pytest.approx(sum(rm) / 10, abs=1e-10)
        assert (figures["gold"], figures["gold_se"]) == pytest.approx(mean_and_error(gold), abs=1e-10)
        assert figures["kl_bound"] == pytest.approx(math.log(int(n)) - (int(n) - 1) / int(n))
        (row,) = (line for line in lines if line.startswith(f"best of {n} "))
        cells = row.removeprefix(f"best of {n}").split()
        shown = [f"{figures['gold']:.3f}", f"{figures['gold_se']:.3f}", f"{figures['rm']:.2f}"]
        assert cells == [*shown, f"<={figures['kl_bound']:.2f}"]
        assert row.index("<=") + len(cells[-1]) == header.index("KL") + 2  # in the column of the exact ones
    values = [figures["rm"] for figures in results.values()]
    assert values == sorted(values) and values[-1] > values[0]
    assert "gold" not in run_evaluate(tmp_path, {"sft": policy}, gold="", demonstrations="")["best_of_n"]["3"]


# ------------------------------------------------------------------------------------------------ the script


def test_one_checkpoint_twice_is_two_rows(tmp_path):
    """Rows by folder name: `--policies a a`, or two folders of one name, collapsed to one."""
    assert unique_names(["x/a", "y/b"]) == ["a", "b"]
    assert unique_names(["x/a", "y/a", "z/b"]) == ["x/a", "y/a", "z/b"]
    assert unique_names(["x/a", "x/a", "y/a"]) == ["x/a", "x/a (2)", "y/a"]
    model = checkpoint(tmp_path / "a", make_gpt(17, block_size=24))
    results = run_evaluate(tmp_path, {}, policies=[model, model])
    assert len(results["policies"]) == 2
    second = list(results["policies"].values())[1]
    assert second["kl"] == pytest.approx(0, abs=1e-4) and second["win_rate"] is not None


def test_the_same_weights_twice_are_an_even_match(tmp_path, float64):
    """A position bias, or a copy that draws the baseline's own random numbers, so that every match is a tie: sampled
    afresh, a copy must win about as often as it loses, at KL 0."""
    baseline = make_gpt(19, block_size=24)
    ids = random_prompts([1 + i % 9 for i in range(300)], 22, seed=20)
    prompts = write_lines(tmp_path / "many.jsonl", [{"prompt": TOY.decode(p)} for p in ids])
    results = run_evaluate(tmp_path, {"one": baseline, "two": baseline}, prompts=prompts, n_prompts=0)
    first, figures = results["policies"].values()
    assert figures["gold"] != first["gold"] and figures["win_low"] < 0.5 < figures["win_high"]
    assert figures["kl"] == pytest.approx(0, abs=1e-11)


def test_without_gold_the_reward_model_judges(tmp_path):
    """Win rates need a judge: the reward model where no truth is known, and a clear message where there is neither."""
    policy, baseline = relatives(21)
    results = run_evaluate(tmp_path, {"a": baseline, "b": policy}, gold="", demonstrations="")
    assert results["policies"]["b"]["gold"] is None
    assert 0 <= results["policies"]["b"]["win_rate"] <= 1
    assert results["policies"]["b"]["rm"] is not None
    with pytest.raises(UserError, match="judge"):
        run_evaluate(tmp_path, {"a": baseline}, gold="", reward="")


def test_rankings_that_compare_nothing_are_reported(tmp_path):
    """Held-out rankings of ties only leave no pair to measure accuracy on: one line, not a crash inside torch."""
    rankings = write_lines(tmp_path / "r.jsonl", [{"prompt": "a", "completions": [["b", "c"]]}])
    try:
        results = run_evaluate(tmp_path, {"a": make_gpt(22, block_size=24)}, rankings=rankings)
    except UserError as error:
        assert "r.jsonl" in str(error)
    else:
        assert "accuracy" not in results["reward_model"]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"policies": []}, "--policies"),
        ({"temperature": math.inf}, "--temperature"),
        ({"temperature": 0.0}, "--temperature"),
        ({"best_of": [4, 0]}, "--best_of"),
        ({"n_prompts": -1}, "--n_prompts"),
        ({"seed": 2**64}, "--seed"),
        ({"max_new_tokens": 24}, "--max_new_tokens"),
        ({"prompts": "nowhere.jsonl"}, r"data\.tiny"),
    ],
    ids=str,
)
def test_impossible_settings_are_refused(tmp_path, changes, says):
    """One line that names the flag, or the script that makes the missing file."""
    with pytest.raises(UserError, match=says):
        run_evaluate(tmp_path, {"a": make_gpt(22, block_size=24)}, **changes)
    assert not (tmp_path / "out").exists()


def test_a_file_in_the_place_of_the_output_folder_is_reported_first(tmp_path):
    """Not after all the sampling."""
    (tmp_path / "out").write_text("mine", encoding="utf-8")
    with watching() as watch, pytest.raises(UserError, match="--out_dir"):
        run_evaluate(tmp_path, {"a": make_gpt(22, block_size=24)})
    assert not watch.block_runs


def test_policies_that_can_not_be_compared_are_refused(tmp_path):
    """Another vocabulary, or too short a context for the baseline's texts: one line that names the checkpoint."""
    baseline = checkpoint(tmp_path / "a", make_gpt(22, block_size=24))
    save_model(tmp_path / "b", make_gpt(22, block_size=24), "gpt2", "test", sft.Config())
    small = checkpoint(tmp_path / "c", make_gpt(22, block_size=20))
    for other, says in ((str(tmp_path / "b"), "b has the gpt2 vocabulary"), (small, "c: its block_size is smaller")):
        with pytest.raises(UserError, match=says):
            run_evaluate(tmp_path, {}, policies=[baseline, other])


# ------------------------------------------------------------------------------------------------ the embedded task


@pytest.fixture(scope="module")
def task_policies(tmp_path_factory) -> tuple[list[dict], list[str]]:
    """Right answers to six prompts of the embedded task, and two policies that have learned some of them: the first
    with wrong ones among them, the second by heart."""
    folder, rows = tmp_path_factory.mktemp("task"), task_rankings(6, seed=4)
    answers = [(row["prompt"], row["completions"][0]) for row in rows]
    mixed = answers + [(prompt, rows[i - 1]["completions"][0]) for i, (prompt, _) in enumerate(answers) if i % 2]
    network = {"init": "", "tokenizer": "tiny", "block_size": 64, "n_layer": 1, "n_embd": 64, "lr": 1e-2}
    for name, pairs, epochs in (("sft", mixed, 40), ("ppo", answers, 80)):
        run("sft", folder / name, rows=demonstrations(pairs), epochs=epochs, log_every=100, **network)
    return rows, [str(folder / name / "out") for name in ("sft", "ppo")]


def test_correct_answers_are_counted_as_sampled_and_at_temperature_0(tmp_path, task_policies, capsys):
    """Answers of the batches' order in the place of the prompts', greedy ones that are sampled after all, manners that
    count as being right, a share over the wrong number of prompts, a headroom that is always closed by 0: two policies
    whose every sample is seen as the reward model reads it."""
    rows, paths = task_policies
    tokenizer, prompts = load_tokenizer("tiny"), [row["prompt"] for row in rows]
    baseline = load_model(paths[0], torch.device("cpu"))
    save_model(tmp_path / "rm", ScalarModel.from_gpt(baseline.model), "tiny", "t", sft.Config(), "tiny")
    settings = {"prompts": write_lines(tmp_path / "prompts.jsonl", [{"prompt": p} for p in prompts]), "best_of": []}
    settings |= {"reward": str(tmp_path / "rm"), "out_dir": str(tmp_path / "out"), "device": "cpu"}
    names = ["mixed", "ppo"]
    for path, name in zip(paths, names, strict=True):
        shutil.copytree(path, tmp_path / name)
    with watching() as watch:
        policies = [str(tmp_path / name) for name in names]
        results = evaluate.run(Config(policies=policies, max_new_tokens=20, **settings))
    said = capsys.readouterr().out
    figures = results["policies"]
    read = [row for p in watch.passes if isinstance(p.network, ScalarModel) for row in p.tokens.tolist()]
    assert len(read) == 2 * 6
    right: dict[str, list[bool]] = {}
    sampled = []
    for number, (name, path) in enumerate(zip(names, paths, strict=True)):
        model, parts, right[name] = load_model(path, torch.device("cpu")).model, [], []
        for prompt in prompts:
            ids = tokenizer.encode_prompt(prompt)
            (row,) = [r for r in read[6 * number : 6 * number + 6] if r[: len(ids)] == ids]
            text = row[len(ids) :]
            text = text[: text.index(tokenizer.eos_id)] if tokenizer.eos_id in text else text[:20]
            parts.append(gold_parts(prompt, tokenizer.decode(text)))
            greedy = slow_generate(model, [ids], 20, eos_id=tokenizer.eos_id, temperature=0).completions()[0]
            right[name].append(gold_parts(prompt, tokenizer.decode(greedy))["correct"] > 0)
        sampled.append(sum(sum(p.values()) for p in parts) / 6)
        assert figures[name]["correct"] == pytest.approx(sum(p["correct"] > 0 for p in parts) / 6)
        assert figures[name]["correct_greedy"] == pytest.approx(sum(right[name]) / 6)
        assert figures[name]["parts"]["correct"] == pytest.approx(sum(p["correct"] for p in parts) / 6)
        assert figures[name]["gold"] == pytest.approx(sampled[-1])
    closed = (sampled[1] - sampled[0]) / (results["ceiling"] - sampled[0])
    assert [figures[name]["headroom_closed"] for name in names] == pytest.approx([0.0, closed]) and closed > 0.1
    assert 0 < sum(right["mixed"]) < 6 and figures["mixed"]["correct"] != figures["mixed"]["correct_greedy"]

    header, *table = said[said.index("policy  ") :].splitlines()[:3]
    assert header.split("  ")[-2:] == ["correct", "at temperature 0"]
    assert [line.split()[-2:] for line in table] == [
        [f"{figures[name][key]:.2f}" for key in ("correct", "correct_greedy")] for name in names
    ]
    shown = said[said.index("answers at temperature 0") :].splitlines()[1:]
    blocks = [shown[i : i + 3] for i in range(0, len(shown), 3)]
    everyone = [i for i in range(6) if right["mixed"][i] and right["ppo"][i]]
    wrong = [i for i in range(6) if not right["mixed"][i]]
    assert [block[0].strip() for block in blocks[: len(everyone[:4]) + 2]] == [
        prompts[i] for i in everyone[:4] + wrong[:2]
    ]
    for prompt, *answers in blocks:
        for line, name in zip(answers, names, strict=True):
            verdict = "right" if right[name][prompts.index(prompt.strip())] else "WRONG"
            assert line.split(maxsplit=2)[:2] == [name, verdict]


def test_every_prompt_is_shown_once(capsys):
    """Answers that two policies get wrong stood there twice, and others not at all."""
    right = {"sft": "0001111011", "ppo": "0001111100"}  # of prompts 0 to 9
    greedy = {name: {"right": [r == "1" for r in row], "completion": list("abcdefghij")} for name, row in right.items()}
    evaluate.show_answers([f"prompt {i}" for i in range(10)], greedy)
    shown = [line.strip() for line in capsys.readouterr().out.splitlines() if line.startswith("  prompt")]
    assert shown == [f"prompt {i}" for i in (3, 4, 5, 6, 0, 1, 2, 8)]


def test_demonstrations_at_the_ceiling_leave_no_way_open(tmp_path, task_policies):
    """Perfect demonstrations, and a policy that has learned them: shares of a way of length 0 were a traceback. Answers
    at temperature 0 to the prompts of --show alone would be one, too: all are judged."""
    rows, paths = task_policies
    prompts = write_lines(tmp_path / "prompts.jsonl", [{"prompt": r["prompt"]} for r in rows])
    best = [{"prompt": r["prompt"], "completion": r["completions"][0]} for r in rows]
    write_lines(tmp_path / "demonstrations.jsonl", best)
    settings = {"policies": [paths[1]] * 2, "prompts": prompts, "reward": "", "out_dir": str(tmp_path / "out")}
    results = evaluate.run(Config(**settings, temperature=0.01, max_new_tokens=20, device="cpu", show=1))
    assert results["demonstrations"] == results["ceiling"] == 3.0
    # no share of a way that isn't there; but a baseline that is always right is not what RLHF should start from
    (gate,) = results["gates"]
    assert gate["name"].endswith("correct at temperature 1") and gate["value"] == 1.0 and not gate["ok"]
    assert [f["headroom_closed"] for f in results["policies"].values()] == [0.0, 0.0]


def test_the_reward_model_is_judged_part_by_part(tmp_path):
    """Its accuracies on pairs that differ in one part alone, of the evaluated prompts, stand in the results."""
    tokenizer = load_tokenizer("tiny")
    sizes = {"vocab": tokenizer.n_vocab, "block_size": 96, "n_embd": 16, "n_layer": 1}
    scorer, rows = make_told(15, **sizes), task_rankings(102)
    save_model(tmp_path / "policy", make_gpt(14, **sizes), "tiny", "t", sft.Config(), "tiny")
    save_model(tmp_path / "rm", scorer, "tiny", "t", sft.Config(), "tiny")
    settings = {"prompts": write_lines(tmp_path / "prompts.jsonl", [{"prompt": r["prompt"]} for r in rows])}
    settings |= {"policies": [str(tmp_path / "policy")], "reward": str(tmp_path / "rm"), "best_of": [1]}
    settings |= {"device": "cpu", "max_new_tokens": 4, "n_prompts": 100}
    write_lines(tmp_path / "rankings.jsonl", rows)
    shown = [(r["prompt"], r["completions"][i % 2]) for i, r in enumerate(rows)]  # a right one, a wrong one, ...
    write_lines(tmp_path / "demonstrations.jsonl", demonstrations(shown[:7]))
    results = evaluate.run(Config(**settings | {"n_prompts": 5}, out_dir=str(tmp_path / "few")))
    golds = [sum(gold_parts(*pair).values()) for pair in shown[:7]]  # all, however many prompts are used
    assert results["demonstrations"] == pytest.approx(sum(golds) / 7) and len(set(golds)) > 1
    found = evaluate.run(Config(**settings, out_dir=str(tmp_path / "out")))["reward_model"]
    expected = accuracy_by_part(
        scorer, contrast_rankings([r["prompt"] for r in rows[:100]], tokenizer, 96), torch.device("cpu")
    )
    assert {name: share for name, share in found.items() if "_vs_" in name} == expected and len(expected) == 7
    assert len(set(expected.values())) > 2


def good_figures(**changes) -> dict:
    """What a good run gives for a policy."""
    figures = {"gold": 2.5, "headroom_closed": 0.75, "win_low": 0.8, "kl": 6.0, "correct": 0.95, "correct_greedy": 0.9}
    return {**figures, "eos_rate": 1.0, "parts": {"correct": 1.9}, **changes}


def good_results(**changes) -> dict:
    """What a good run gives; `changes` maps a policy, or "reward_model", to figures that differ."""
    start = good_figures(gold=1.0, headroom_closed=0.0, win_low=None, kl=0.0, correct=0.45, correct_greedy=0.9)
    judge = {"accuracy": 0.76, "bayes_accuracy": 0.8, "right_vs_wrong": 0.85, "polite_vs_plain": 1.0}
    made = {"sft": start, "ppo": good_figures(), "dpo": good_figures(), "reward_model": judge}
    made = {name: figures | changes.get(name, {}) for name, figures in made.items()}
    return {"ceiling": 3.0, "demonstrations": 0.9, "reward_model": made.pop("reward_model"), "policies": made}


GATES = [
    # whose figures differ, how -> the gates that fail
    ("sft", {"correct": 0.7}, ["sft: correct at temperature 1"]),  # nothing would be left to learn
    ("sft", {"gold": 2.9}, ["sft: share of the way from demonstrations to ceiling still open"]),
    ("reward_model", {"accuracy": 0.6}, ["reward model: share of the annotators' Bayes accuracy"]),
    ("reward_model", {"right_vs_wrong": 0.5}, ["reward model: right against wrong, manners equal"]),
]
for who in ("ppo", "dpo"):
    GATES += [
        (who, {"headroom_closed": 0.2}, [f"{who}: headroom closed"]),
        (who, {"win_low": 0.3}, [f"{who}: win rate over sft, low end"]),
        (who, {"kl": 100.0}, [f"{who}: exact KL, nats a sequence"]),
        (who, {"kl": 0.0}, [f"{who}: exact KL, nats a sequence"]),
        (
            who,
            {"correct": 0.55},
            [f"{who}: correct at temperature 1, above sft"],
        ),  # polite, but hardly more often right
        (who, {"correct_greedy": 0.6}, [f"{who}: correct at temperature 0, above sft"]),  # it has forgotten facts
        (who, {"eos_rate": 0.5}, [f"{who}: EOS rate"]),
    ]


@pytest.mark.parametrize(("who", "changes", "fails"), GATES, ids=str)
def test_every_gate_can_fail(capsys, who, changes, fails):
    """At the figures of a good run all are passed; each fails by its own figure alone, and says so."""
    gates = evaluate.report_task(good_results())
    assert all(gate["ok"] for gate in gates) and len(gates) == 4 + 2 * 6
    assert "polite_vs_plain 1.00" in capsys.readouterr().out
    gates = evaluate.report_task(good_results(**{who: changes}))
    assert [gate["name"] for gate in gates if not gate["ok"]] == fails
    assert capsys.readouterr().out.count("FAILED") == len(fails)


def test_what_is_beyond_the_table_is_each_policy_s_own(capsys):
    """The baseline's parts beside every policy, or the demonstrations' reward as the ceiling."""
    parts = {"sft": {"correct": 0.5, "polite": -0.25}, "ppo": {"correct": 1.5, "polite": 0.75}}
    evaluate.report_task(good_results(**{name: {"parts": p} for name, p in parts.items()}))
    said = capsys.readouterr().out
    assert re.search(r"^  sft +correct \+0\.50  polite -0\.25$", said, re.M)
    assert re.search(r"^  ppo +correct \+1\.50  polite \+0\.75$", said, re.M)
    assert "\nceiling 3.00; demonstrations 0.90\n" in said
    assert "\nreward model, part by part: right_vs_wrong 0.85, polite_vs_plain 1.00\n" in said


def test_gates_are_about_what_was_measured():
    """Without rankings nothing is known of the reward model, without demonstrations of the way from them."""
    results = good_results()
    results |= {"reward_model": {}, "demonstrations": None}
    del results["policies"]["dpo"]
    names = [gate["name"] for gate in evaluate.report_task(results)]
    assert len(names) == 1 + 6 and all(name.startswith(("sft: correct", "ppo: ")) for name in names)


def test_the_baseline_is_not_measured_against_itself():
    """A baseline in a folder named ppo ended in a traceback after the sampling: it has no win rate over itself."""
    results = good_results()
    results["policies"] = {"ppo": results["policies"]["sft"], "dpo": results["policies"]["dpo"]}
    names = [gate["name"] for gate in evaluate.report_task(results)]
    assert len(names) == 4 + 6 and {name for name in names if name.startswith("ppo: ")} == {
        "ppo: share of the way from demonstrations to ceiling still open",
        "ppo: correct at temperature 1",
    }


# ------------------------------------------------------------------------------------------------ data of one's own


def test_own_prompts_read_no_file_of_the_demo(tmp_path, monkeypatch, capsys):
    """A plausible table from the demo's prompts, rankings or demonstrations. What lies beside the prompts is taken,
    where it is there; every file that is read is named."""
    own, opened = beside_a_demo(tmp_path, monkeypatch)
    settings = {
        "policies": [checkpoint(own / "sft", make_gpt(17, block_size=24))],
        "reward": checkpoint(own / "rm", make_scalar(16, block_size=24)),
        "gold": f"{reward_file(own)}:variety",
        **{"max_new_tokens": 4, "best_of": [1, 2], "out_dir": str(own / "eval"), "device": "cpu"},
    }
    prompts = [{"prompt": p} for p in PROMPTS]
    for name, rankings, written in (
        ("prompts_test.jsonl", "rankings_test.jsonl", "demonstrations_test.jsonl"),
        ("prompts.jsonl", "rankings.jsonl", "demonstrations.jsonl"),
        ("mine.jsonl", None, None),
    ):
        path = write_lines(own / name, prompts)
        results = evaluate.run(Config(**settings, prompts=path))
        said = capsys.readouterr().out
        assert (results["demonstrations"], results["reward_model"], results["gates"]) == (None, {}, [])
        assert all(p in said for p in (path, settings["reward"], *settings["policies"]))
        if rankings:
            beside = [
                write_lines(own / rankings, own_pairs(5)),
                write_lines(own / written, [{"prompt": "a", "completion": "abc"}]),
            ]
            results = evaluate.run(Config(**settings, prompts=path))
            said = capsys.readouterr().out
            assert results["demonstrations"] == 3.5 and "accuracy" in results["reward_model"]
            assert all(p in said for p in beside)
    assert opened == []


@pytest.mark.parametrize(
    ("vocabulary", "own", "gates"), [("tiny", True, 0), ("tiny", False, 4), ("bytes", True, 0), ("bytes", False, 4)]
)
def test_the_task_is_known_by_its_prompts_not_by_the_vocabulary(tmp_path, capsys, vocabulary, own, gates):
    """Own prompts in the tiny vocabulary met the embedded task's truth and gates, the task's prompts in another one
    lost them. A policy of the embedded task on own prompts is noted, a reward model of it refused: it would print a
    plausible table."""
    tokenizer = load_tokenizer(vocabulary)
    sizes = {"vocab": tokenizer.n_vocab, "block_size": 192, "n_layer": 1, "n_embd": 16}
    save_model(tmp_path / "policy", make_gpt(14, **sizes), vocabulary, "sft.py", sft.Config(), "tiny")
    save_model(tmp_path / "own", make_scalar(15, **sizes), vocabulary, "reward_model.py", sft.Config(), "")
    save_model(tmp_path / "tiny", make_scalar(15, **sizes), vocabulary, "reward_model.py", sft.Config(), "tiny")
    rows = own_pairs(4, gold=True) if own else task_rankings(4)
    write_lines(tmp_path / "rankings.jsonl", rows)
    demonstrations = [{"prompt": r["prompt"], "completion": r["completions"][1]} for r in rows]
    write_lines(tmp_path / "demonstrations.jsonl", demonstrations)
    settings = {"prompts": write_lines(tmp_path / "prompts.jsonl", [{"prompt": r["prompt"]} for r in rows])}
    settings |= {"policies": [str(tmp_path / "policy")], "out_dir": str(tmp_path / "out"), "device": "cpu"}
    settings |= {"max_new_tokens": 4, "best_of": [1]}
    if own:
        with pytest.raises(UserError, match="--reward"):
            evaluate.run(Config(**settings, reward=str(tmp_path / "tiny")))
    capsys.readouterr()
    results = evaluate.run(Config(**settings, reward=str(tmp_path / ("own" if own else "tiny"))))
    figures = results["policies"]["policy"]
    assert len(results["gates"]) == gates
    assert (results["ceiling"], figures["gold"] is None, "parts" in figures) == (
        (None, True, False) if own else (pytest.approx(3.0), False, True)
    )
    assert ("NOTE" in capsys.readouterr().out) == own
