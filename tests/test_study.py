"""The study as a whole: what its jobs write is what its results read, each mistake does what it says, one scheduler at
a time. Its arithmetic is in test_study_math.py."""

from __future__ import annotations

import importlib
import itertools
import json
import math
import multiprocessing
import os
import re
import shlex
import subprocess
import sys
import time
import types
import zlib
from pathlib import Path

import pytest
import torch
from helpers import EOS, ITEMS, TOY, checkpoint, completion_logprobs, make_gpt, make_scalar, read_lines, spread
from helpers import task_rankings, write_lines
from stages import asked, reward_file

import lib.reward
import dpo
import frame
import ppo
import sft
from lib.cli import UserError, check_ranges, parse_config
from lib.checkpoint import Checkpoint, save_model
from lib.run import write_json
from lib.train import generator_for
from data import batches, tiny
from data.batches import Example
from data.tokenizer import load_tokenizer
from evaluate import expected_best
from sampling import generate
from study import best_of_n, broken, implicit, jobs, rankings, results, run, tables

ROOT = Path(__file__).resolve().parent.parent
FULL, QUICK = jobs.FULL, jobs.QUICK

# -------------------------------------------------------------------------------- best of n


def kl_of_best_of_n(p: torch.Tensor, n: int, N: int = 512, prompts: int = 60) -> tuple[float, float]:
    """The KL that study/best_of_n.py measures from samples of texts with the probabilities p, in the order of their
    scores, and the true one: q = F^n - F-^n, summed over all texts."""
    drawn = torch.multinomial(p.expand(prompts, -1), N, replacement=True, generator=torch.Generator().manual_seed(1))
    ratio = best_of_n.best_log_ratio(drawn.float(), p.log()[drawn], n)  # (P, N)
    F = p.cumsum(0)
    q = F**n - (F - p).clamp(min=0) ** n
    exact = torch.where(q > 0, q * (q / p).log(), 0).sum().item()
    return expected_best(drawn.float(), ratio, n).mean().item(), exact


@pytest.mark.parametrize("share", [0.05, 0.5, 0.9, 0.99, 1 - 1e-6])
def test_kl_of_best_of_n_where_one_text_is_almost_certain(share):
    """A prompt with one obvious answer: F/F- to the power of n leaves the range of exp, and a limit put there made the
    KL -89. The text is the best one, or the worst."""
    often, rare = torch.tensor([share], dtype=torch.float64), torch.full((8,), (1 - share) / 8, dtype=torch.float64)
    for p in (torch.cat([rare, often]), torch.cat([often, rare])):
        for n in (1, 2, 16, 64):
            found, exact = kl_of_best_of_n(p, n)
            assert found == pytest.approx(exact, abs=0.08)
    if share >= 0.5:
        found, exact = kl_of_best_of_n(torch.cat([rare, often]), 256)
        assert exact == pytest.approx(-math.log(share), abs=1e-6)  # 256 samples always hold it
        assert found == pytest.approx(exact, abs=0.01)


@pytest.mark.parametrize("kind", ["even", "halves", "zipf"])
def test_kl_of_best_of_n_stays_below_its_bound(kind):
    """log n - (n - 1)/n bounds it for every policy. The estimate may exceed it by its own error, which grows with n/N
    and is far below what a KL summed over the wrong texts would show."""
    weights = {"even": torch.ones(300), "halves": 0.5 ** torch.arange(20.0), "zipf": 1 / torch.arange(1.0, 301)}
    p = (weights[kind] / weights[kind].sum()).double()
    for n in (1, 2, 8, 32):
        found, exact = kl_of_best_of_n(p, n)
        bound = math.log(n) - (n - 1) / n
        assert exact <= bound + 1e-9
        assert -1e-9 <= found <= bound + 0.04 and found == pytest.approx(exact, abs=0.04)
    assert kl_of_best_of_n(p, 1)[0] == pytest.approx(0, abs=1e-9)


def test_samples_keep_their_own_figures():
    """Each text is scored once and its figures go back to all samples that say it: another order would pair one
    sample's gold reward with another's score. Against every sample by itself."""
    policy, scorers = make_gpt(1), [make_scalar(2), make_scalar(3)]
    config = best_of_n.Config(max_new_tokens=2, seed=5)
    gold = lambda prompts, completions, ended: [len(c) + 0.01 * sum(map(ord, c)) for c in completions]  # noqa: E731
    parts = (policy, [Checkpoint(m, "toy", "") for m in scorers], gold, TOY, 48, config)
    logprobs, golds, scores = best_of_n.sample(*parts, 3, "abc", [0, 1, 2])

    generator = generator_for(policy.device, 5, 7, 3)
    rollout = generate(policy, [[0, 1, 2]] * 48, 2, eos_id=EOS, generator=generator)
    texts = {tuple(c) for c in rollout.completions()}
    assert 2 < len(texts) < 48, "some texts must repeat"
    with torch.no_grad():
        for i in range(48):
            ids = rollout.tokens[i, 3 : int(rollout.lens[i])].tolist()  # with EOS, if it ended
            assert logprobs[i].item() == pytest.approx(
                completion_logprobs(policy, [0, 1, 2], ids).sum().item(), abs=1e-4
            )
            assert golds[i].item() == pytest.approx(gold([""], [TOY.decode(rollout.completions()[i])], [True])[0])
            for m, model in enumerate(scorers):
                alone = model(torch.tensor([[0, 1, 2, *ids]]))[0, -1].item()
                assert scores[m, i].item() == pytest.approx(alone, abs=1e-4)


def test_best_of_n_measures_every_judge_by_its_own_scores(tmp_path, capsys):
    """The whole script. Twice the largest n samples of each prompt; a judge under another's name; an ensemble with the
    first reward model in it, which is not one of its members. For every judge the figures that a loop over the very
    samples gives, which the true reward writes down."""
    policy = make_gpt(4, block_size=24, vocab=23)
    models = [make_scalar(seed, block_size=24) for seed in (5, 6, 7, 8)]
    paths = [checkpoint(tmp_path / f"rm{i}", model) for i, model in enumerate(models)]
    prompts = write_lines(tmp_path / "p.jsonl", [{"prompt": p} for p in ("ab", "c", "de", "f")])
    settings = {"policy": checkpoint(tmp_path / "policy", policy), "reward_models": paths, "prompts": prompts}
    settings |= {"n_prompts": 3, "best_of": [4, 1], "max_new_tokens": 2, "device": "cpu", "seed": 3}
    out = tmp_path / "best.json"
    found = best_of_n.run(best_of_n.Config(**settings, gold=f"{reward_file(tmp_path)}:variety", out=str(out)))
    said = capsys.readouterr().out
    assert json.loads(out.read_text(encoding="utf-8")) == found
    assert list(found) == ["rm0", "rm1", "rm2", "rm3", "min", "mean-std"]
    scores, golds = {name: [] for name in found}, []  # of each prompt, of its 8 samples
    for number, prompt in enumerate(("ab", "c", "de")):
        ids = TOY.encode(prompt)
        rollout = generate(policy, [ids] * 8, 2, eos_id=EOS, generator=generator_for("cpu", 3, 7, number))
        texts = [rollout.tokens[i, : int(rollout.lens[i])].tolist() for i in range(8)]
        with torch.no_grad():
            each = torch.tensor([[model(torch.tensor([text]))[0, -1].item() for text in texts] for model in models])
        for i in range(4):
            scores[f"rm{i}"].append(each[i].tolist())
        scores["min"].append(each[1:].amin(0).tolist())
        scores["mean-std"].append((each[1:].mean(0) - each[1:].std(0, correction=0)).tolist())
        ended = rollout.ended.tolist()
        golds.append([len(set(c)) + 0.5 * e for c, e in zip(rollout.completions(), ended, strict=True)])
    assert {call.prompts[0] for call in asked(tmp_path, "variety")} == {"ab", "c", "de"}
    for name, points in found.items():
        assert [p["n"] for p in points] == [4, 1] and f"\n{name}\n" in f"\n{said}"
        for p in points:
            best = [
                [max(choice, key=lambda i, row=row: row[i]) for choice in itertools.combinations(range(8), p["n"])]
                for row in scores[name]
            ]
            gold, score = (
                sum(sum(row[i] for i in chosen) / len(chosen) for row, chosen in zip(rows, best, strict=True)) / 3
                for rows in (golds, scores[name])
            )
            assert (p["gold"], p["score"]) == pytest.approx((gold, score), abs=1e-4)
            assert p["bound"] == pytest.approx(math.log(p["n"]) - (p["n"] - 1) / p["n"])
            assert f"  n {p['n']:4}  score {p['score']:6.3f}  gold {p['gold']:6.3f}  KL {p['kl']:.3f} <= " in said


def test_judges_of_one_name_are_two(tmp_path):
    """By the names of their folders alone two reward models of two runs were one row, the last one's, and one in a
    folder named min was the ensemble's."""
    paths = [
        checkpoint(tmp_path / name, make_scalar(i, block_size=24))
        for i, name in enumerate(("a/rm", "b/rm", "min", "x"))
    ]
    settings = {"policy": checkpoint(tmp_path / "policy", make_gpt(4, block_size=24)), "best_of": [1], "gold": ""}
    settings |= {"prompts": write_lines(tmp_path / "p.jsonl", [{"prompt": "ab"}]), "out": str(tmp_path / "out.json")}
    settings |= {"max_new_tokens": 2, "device": "cpu"}
    alone = {}
    for path in paths[:2]:
        (points,) = best_of_n.run(best_of_n.Config(**settings, reward_models=[path])).values()
        alone[path] = points
    assert best_of_n.run(best_of_n.Config(**settings, reward_models=paths[:2])) == {p: alone[p] for p in paths[:2]}
    with pytest.raises(UserError, match="--reward_models: min is what the ensemble is called"):
        best_of_n.run(best_of_n.Config(**settings, reward_models=paths[1:]))


# -------------------------------------------------------------------------------- intervals and fits


@pytest.mark.parametrize("n", sorted(results.T95))
def test_quantiles_of_student_t(n):
    """The area of t's density between -T95 and T95 is 95%, with one degree of freedom fewer than there are values; one
    more would make every interval too narrow."""
    df, steps = n - 1, 20_000
    constant = math.gamma((df + 1) / 2) / math.gamma(df / 2) / math.sqrt(df * math.pi)
    width = results.T95[n] / steps
    area = 2 * sum(constant * (1 + (width * (i + 0.5)) ** 2 / df) ** (-(df + 1) / 2) * width for i in range(steps))
    assert area == pytest.approx(0.95, abs=1e-4)


def test_every_number_of_seeds_has_its_quantile():
    """The run that over-optimises has more seeds than the others."""
    for size in (FULL, QUICK):
        for n in (len(size.seeds), len(size.seeds + size.more_seeds)):
            results.interval([0.0] * n)


def test_a_curve_starts_where_sft_is():
    """PPO's first block is no longer SFT: its curve starts at `start`. Best of 1 is SFT: its curve starts there. And
    `inside` is the share of points whose interval holds the curve."""

    def seeds(values: list[float]) -> list[list[dict]]:  # two seeds, 0.1 above and below
        return [
            [{"kl": float(i**2), "score": v + s, "gold": -v - s} for i, v in enumerate(values)] for s in (-0.1, 0.1)
        ]

    found = results.curve(seeds([0.0, 1.0, 2.0]), "best_of_n")
    assert [p["distance"]["mean"] for p in found["points"]] == [0.0, 1.0, 2.0]
    fit = found["score_fit"]
    assert (fit["start"], fit["alpha"], fit["beta"], fit["inside"]) == pytest.approx((0.0, 1.0, 0.0, 1.0))
    found = results.curve(seeds([0.0, 1.0, 2.0]), "rl", {"score": -5.0, "gold": 5.0})
    assert (found["score_fit"]["start"], found["gold_fit"]["start"]) == (-5.0, 5.0)
    # the values at distance 0 miss the start by 5, and an interval is 12.7 * 0.1 wide each way
    assert found["score_fit"]["inside"] == pytest.approx(2 / 3)


# -------------------------------------------------------------------------------- from what is made to what is read

PARTS = tuple(tables.PARTS)


def figure(name: str, key: str, seed: int) -> float:
    """What a fabricated run says: 10 more with every seed, and unlike any other run's or key's."""
    return 10.0 * seed + own(name, key)


def own(name: str, key: str) -> float:
    return zlib.crc32(f"{name} {key}".encode()) / 2**32


def named(command: list[str], flag: str) -> list[str]:
    """The values of a flag that takes several: names of folders."""
    values = command[command.index(flag) + 1 :]
    end = next((i for i, word in enumerate(values) if word.startswith("--")), len(values))
    return [Path(value).name for value in values[:end]]


def fabricate(size: jobs.Size, out: str) -> None:
    """For every job the files that it would leave, with figures of known origin, and no others."""
    for seed in size.seeds + size.more_seeds:
        for job in (job for job in jobs.jobs(size, out) if job.makes.startswith(f"{out}/{seed}/")):
            made, words, name = Path(job.makes), [Path(w).name for w in job.command], Path(job.makes).name
            by_part = {part: figure(name, part, seed) for part in PARTS}
            if "evaluate.py" in words:
                figures = {
                    p: {k: figure(p, k, seed) for k in results.FIGURES} for p in named(job.command, "--policies")
                }
                if "--loss_data" not in words:
                    figures = {p: {**f, "loss": None} for p, f in figures.items()}
                write_json({"policies": figures}, made / "results.json")
            elif "ppo.py" in words or "grpo.py" in words:
                made.mkdir(parents=True)
                number = int(job.command[job.command.index("--iterations") + 1])
                score, gold, length = (figure(name, k, seed) for k in ("score", "gold", "length"))
                # it rises from the sixth iteration on, and the length is that of the last one
                rows = [(float(i), max(0, i - 4), number - 1 - i) for i in range(number)]
                rows = [{"kl": i, "score": score + up, "gold": gold + up, "length": length + n} for i, up, n in rows]
                write_lines(made / "metrics.jsonl", rows)
            elif "reward_model.py" in words:
                write_json({"accuracy": figure(name, "accuracy", seed), "by_part": by_part}, made / "results.json")
            elif "study.implicit" in words:
                write_json({"by_part": by_part}, made)
            elif "study.best_of_n" in words:
                judges = [*named(job.command, "--reward_models"), "min", "mean-std"]
                points = [{"n": n, "kl": math.log(n), "bound": math.log(n)} for n in size.best_of]
                told = {j: [p | {k: figure(j, k, seed) for k in ("score", "gold")} for p in points] for j in judges}
                write_json(told, made)


@pytest.mark.parametrize("size", [FULL, QUICK], ids=["full", "quick"])
def test_every_result_is_of_the_run_that_it_is_named_after(size, tmp_path):
    """A result that no job makes ends the study with an error after its last job; one that is another run's, or
    compared with another baseline or across seeds, is a wrong figure that nobody sees. Seeds differ by 10 here, so only
    a difference within each seed has no spread. To four digits: no more are kept."""
    out = tmp_path.as_posix()
    fabricate(size, out)
    found = results.gather(size, out)
    shift = 10 * sum(size.seeds) / len(size.seeds)

    def says(x: dict, name: str, key: str) -> bool:
        return x["mean"] == pytest.approx(shift + own(name, key), abs=1e-4) and len(x["seeds"]) == len(size.seeds)

    for method, points in found["frontier"].items():
        for name, p in points.items():
            assert name.startswith(method) and says(p["gold"], name, "gold") and says(p["kl"], name, "kl")
    for name, p in found["breaks"].items():
        base = "dpo_0.2" if "dpo" in name else "break_sft_as_it_is" if name in jobs.SFT_BROKEN else "ppo_0.1"
        for key in ("gold", "kl", "eos_rate"):
            expected = own(f"break_{name}", key) - own(base, key)
            assert p["change"][key]["seeds"] == pytest.approx([expected] * len(size.seeds), abs=1e-4)
        assert ("loss" in p["change"]) == (name in jobs.SFT_BROKEN)  # the others' baseline has none
    numbers = {str(n): f"n{n}" for n in size.numbers} | {str(t): f"noise{t}" for t in size.noises}
    for key, p in (found["feedback"]["numbers"] | found["feedback"]["noises"]).items():
        usual = key in (str(size.rankings), "0.5")
        names = (
            ("reward_model", "ppo_0.1", "dpo_0.2") if usual else [f"{x}_{numbers[key]}" for x in ("rm", "ppo", "dpo")]
        )
        assert says(p["accuracy"], names[0], "accuracy") and says(p["by_part"][PARTS[0]], names[0], PARTS[0])
        assert says(p["ppo"]["gold"], names[1], "gold") and says(p["dpo"]["gold"], names[2], "gold")
    for head, rounds in found["iterated"].items():
        gain = own(f"ppo_{head}_2", "gold") - own(f"ppo_{head}_once", "gold")
        assert rounds["gain"]["seeds"] == pytest.approx([gain] * len(size.seeds), abs=1e-4)
        assert says(rounds["first half"]["by_part"][PARTS[1]], f"rm_{head}_1", PARTS[1])
    judges = ("implicit.json", "rm_plain_once", "reward_model")
    for name, parts in zip(judges, found["secret"]["judges"].values(), strict=True):
        assert says(parts[PARTS[0]], name, PARTS[0])
    for name, p in found["secret"]["maximised"].items():
        assert says(p["length"], "over_strong_0" if name == "told" else f"secret_{name}", "length")
    over = found["overoptimisation"]
    for name, p in over["rl"].items():
        seeds = size.seeds + size.more_seeds * (name == "weak_0")
        expected = own(f"over_{name}", "gold") + 10 * sum(seeds) / len(seeds)
        first = p["points"][0]["gold"]
        assert first["mean"] == pytest.approx(expected, abs=1e-4) and len(first["seeds"]) == len(seeds)
        assert p["gold_fit"]["start"] == pytest.approx(expected, abs=1e-4)
    for name, p in over["best_of_n"].items():
        assert [x["n"] for x in p["points"]] == list(size.best_of) and says(p["points"][1]["score"], name, "score")

    first = found["frontier"]["ppo"]["ppo_0.1"]["gold"]
    shown = f"{first['mean']:.2f}" + (f" [{first['low']:.2f}, {first['high']:.2f}]" if len(size.seeds) > 1 else "")
    assert f"| ppo 0.1 | {shown} |" in tables.frontier(found)
    Path(f"{out}/{size.seeds[-1]}/implicit.json").unlink()
    with pytest.raises(UserError, match=r"implicit\.json: no such file; run `python -m study\.run` first"):
        results.gather(size, out)


# -------------------------------------------------------------------------------- the commands


def told_commands() -> list[str]:
    """The commands in the docstrings of study/."""
    found = []
    for file in sorted((ROOT / "study").glob("*.py")):
        text = importlib.import_module(f"study.{file.stem}").__doc__ or ""
        found += re.findall(r"^ *((?:[A-Z]+=\S+ )?python (?!SCRIPT).+?)(?:  .*)?$", text, re.MULTILINE)
    return found


def test_the_commands_in_docstrings_are_right():
    """`--list` stood there, which never was a flag."""
    commands = told_commands()
    assert len(commands) >= 12
    for command in commands:
        words = [word for word in shlex.split(command.split("#")[0]) if not re.match(r"[A-Z]+=|python$|-m$", word)]
        if words[0] == "study/job.py":
            words = words[1:]
        if words[0] == "study.broken":
            assert len(words) == 1 or words[1] in broken.BROKEN, command
            words = words[2:]
        if words:
            module = importlib.import_module(words[0].removesuffix(".py").replace("/", "."))
            check_ranges(parse_config(module.Config, "", words[1:]))


# What every result of the study is of, by its name: the script and those of its flags that are not its defaults. Of the
# full study, in the folder of a seed S.
JUDGED = "--policy sft --warmup 2 --held_out_data rankings_held_out.jsonl"
RANK = "collect.py --prompts data/prompts.jsonl --policies"
RM, DPO = f"reward_model.py {JUDGED} --prompts data/prompts.jsonl --data", f"dpo.py {JUDGED} --data"
RUN = "--policy sft --prompts data/prompts.jsonl --rollouts 128 --minibatch 32 --lr 4e-4 --iterations 24 --reward"
PPO, GRPO = f"ppo.py --value_lr 1e-3 {RUN}", f"grpo.py {RUN}"
LONG, WEAK = "--iterations 40 --kl_coef 0", "weak_0 weak_1 weak_2 weak_3"
TEST = "--prompts data/prompts_test.jsonl"
AS_IT_IS = "sft.py --data data/demonstrations.jsonl --epochs 1"
OF_EACH_SEED = {
    "data": "data.tiny",
    "sft": "sft.py --data data/demonstrations.jsonl",
    "rankings_held_out": "collect.py --policies sft --prompts data/prompts_held_out.jsonl --n_prompts 400",
    "rankings_weak": f"{RANK} sft --n_prompts 300",
    "weak_0": f"{RM} rankings_weak.jsonl --expectation no --seed S0",
    "over_weak_0": f"{PPO} weak_0 {LONG}",
}
OF_A_SEED = OF_EACH_SEED | {
    "rankings": f"{RANK} sft --n_prompts 5000",
    "reward_model": f"{RM} rankings.jsonl",
    **{f"weak_{i}": f"{RM} rankings_weak.jsonl --expectation no --seed S{i}" for i in (1, 2, 3)},
    "over_weak_0.1": f"{PPO} weak_0 {LONG} --kl_coef 0.1",
    "over_strong_0": f"{PPO} reward_model {LONG}",
    "over_strong_0.1": f"{PPO} reward_model {LONG} --kl_coef 0.1",
    "over_min_0": f"{PPO} {WEAK} {LONG} --reward_combine min",
    "over_mean-std_0": f"{PPO} {WEAK} {LONG} --reward_combine mean-std",
    "best_of_n": f"study.best_of_n --policy sft {TEST} --n_prompts 64 --reward_models reward_model {WEAK}",
    **{f"ppo_{c}": f"{PPO} reward_model --kl_coef {c}" for c in (0.8, 0.4, 0.2, 0.1, 0.05, 0.02)},
    **{f"grpo_{c}": f"{GRPO} reward_model --kl_coef {c}" for c in (0.8, 0.4, 0.2, 0.1, 0.05, 0.02)},
    **{f"rloo_{c}": f"{GRPO} reward_model --kl_coef {c} --kind rloo" for c in (0.8, 0.1)},
    **{f"dpo_{b}": f"{DPO} rankings.jsonl --beta {b}" for b in (1.6, 0.8, 0.4, 0.2, 0.1, 0.05)},
    **{f"ipo_{b}": f"{DPO} rankings.jsonl --beta {b} --kind ipo" for b in (0.4, 0.1, 0.025)},
    "best_ranked": "study.rankings --rankings rankings.jsonl --best",
    "sft_best": "sft.py --init sft --data best_ranked.jsonl --lr 5e-4 --warmup 2 --epochs 1",
    "rankings_n300": f"{RANK} sft --n_prompts 300",
    "rankings_n1200": f"{RANK} sft --n_prompts 1200",
    **{f"rankings_noise{t}": f"{RANK} sft --n_prompts 5000 --annotator_temperature {t}" for t in (1.0, 2.0)},
    **{f"rm_{x}": f"{RM} rankings_{x}.jsonl" for x in ("n300", "n1200", "noise1.0", "noise2.0")},
    **{f"ppo_{x}": f"{PPO} rm_{x}" for x in ("n300", "n1200", "noise1.0", "noise2.0")},
    **{f"dpo_{x}": f"{DPO} rankings_{x}.jsonl" for x in ("n300", "n1200", "noise1.0", "noise2.0")},
    "rankings_plain_once": f"{RANK} sft --n_prompts 5000",
    "rankings_plain_1": f"{RANK} sft --n_prompts 2500",
    "rankings_plain_new": f"{RANK} ppo_plain_1 --skip 2500 --n_prompts 2500",
    "rankings_told_once": f"{RANK} sft --n_prompts 1200",
    "rankings_told_1": f"{RANK} sft --n_prompts 600",
    "rankings_told_new": f"{RANK} ppo_told_1 --skip 600 --n_prompts 600",
    **{f"rm_plain_{x}": f"{RM} rankings_plain_{x}.jsonl --expectation no" for x in ("once", "1", "2")},
    **{f"rm_told_{x}": f"{RM} rankings_told_{x}.jsonl --expectation yes" for x in ("once", "1", "2")},
    **{f"ppo_{x}": f"{PPO} rm_{x}" for x in ("plain_once", "plain_1", "plain_2", "told_once", "told_1", "told_2")},
    **{
        f"rankings_{x}_2": f"study.rankings --rankings rankings_{x}_1.jsonl rankings_{x}_new.jsonl"
        for x in ("plain", "told")
    },
    "implicit": "study.implicit --dpo dpo_0.2 --prompts data/prompts_held_out.jsonl",
    "secret_plain": f"{PPO} rm_plain_once {LONG}",
    "secret_gold": f"{PPO} data/tiny.py:gold_reward {LONG}",
    "secret_implicit": f"IMPLICIT=dpo_0.2 {PPO} study/implicit.py:reward {LONG}",
    "break_no_kl": f"{PPO} reward_model --kl_coef 0",
    **{f"break_kl_{kind}": f"{PPO} reward_model --kl {kind}" for kind in ("k2", "k3", "exact")},
    "break_no_value_clip": f"{PPO} reward_model --value_clip 0",
    "break_no_whitening": f"{PPO} reward_model --no-whiten_advantages",
    "break_no_eos_penalty": f"{PPO} reward_model --eos_penalty 0",
    **{f"break_train_layers_{n}": f"{PPO} reward_model --train_layers {n}" for n in (1, 2)},
    "break_ptx": f"{PPO} reward_model --ptx_coef 0.5",
    **{
        f"break_{mistake}": f"study.broken {mistake} {PPO} reward_model"
        for mistake in ("score_late", "raw_reward", "other_temperature")
    },
    "break_dpo_mean": f"study.broken dpo_mean {DPO} rankings.jsonl",
    "break_sft_as_it_is": AS_IT_IS,
    **{f"break_{mistake}": f"study.broken {mistake} {AS_IT_IS}" for mistake in ("length_buckets", "prompt_loss")},
}
MEASURED = {  # the evaluations, of all runs whose names begin so, on all test prompts
    "evaluate_frontier": r"(ppo|grpo|rloo|dpo|ipo)_[\d.]+|sft_best",
    "evaluate_feedback": r"(ppo|dpo)_(n\d+|noise[\d.]+)",
    "evaluate_iterated": r"ppo_(plain|told)_\w+",
    "evaluate_breaks": r"break_\w+",
}


def told(words: list[str]) -> tuple[list[str], dict]:
    """-> (what stands before the flags, all flags with their values but the output)."""
    words = [word for word in words if word != "-m"]
    script = next(i for i, word in enumerate(words) if word.endswith(".py") or word.startswith(("data.", "study.")))
    script += 2 if words[script] == "study.broken" else 0
    module = importlib.import_module(words[script].removesuffix(".py"))
    config = vars(parse_config(module.Config, "", words[script + 1 :]))
    return words[: script + 1], {k: v for k, v in config.items() if k not in ("out", "out_dir")}


@pytest.mark.parametrize("seed", [2, 4])
def test_every_result_is_of_the_experiment_that_its_name_says(seed):
    """Another reward, other data, another number of rankings, one seed for all members of an ensemble, or a seed that
    two of them have in common: the study goes through, and a published figure is of another experiment."""
    made = {}
    for job in jobs.jobs(FULL, "o"):
        if job.makes.startswith(f"o/{seed}/"):
            made[Path(job.makes).name.removesuffix(".jsonl").removesuffix(".json")] = told(
                [word.replace(f"o/{seed}/", "") for word in job.command]
            )
    expected = OF_A_SEED if seed in FULL.seeds else OF_EACH_SEED
    measured = MEASURED if seed in FULL.seeds else {}
    assert set(made) == {*expected, *measured}
    for name, command in expected.items():
        words = command.replace("--seed S", f"--seed {seed}").split()
        seeded = "study.rankings" not in words and "study.implicit" not in words and "--seed" not in words
        assert made[name] == told([*words, *(["--seed", str(seed)] if seeded else [])]), name
    for name, pattern in measured.items():
        policies = ["sft", *(run for run in made if re.fullmatch(pattern, run))]
        loss = "--loss_data data/demonstrations_held_out.jsonl" if name == "evaluate_breaks" else ""
        flags = f"--reward reward_model {TEST} --n_prompts 0 --rankings= --demonstrations= --best_of {loss}"
        script, config = told(f"evaluate.py {flags} --seed {seed} --policies".split() + policies)
        assert sorted(made[name][1].pop("policies")) == sorted(config.pop("policies")), name
        assert made[name] == (script, config), name


def skips(job: jobs.Job) -> range:
    """Which of the training prompts a job of collect.py asks."""
    told = vars(parse_config(importlib.import_module("collect").Config, "", job.command[1:]))
    return range(told["skip"], told["skip"] + told["n_prompts"])


@pytest.mark.parametrize("size", [FULL, QUICK], ids=["full", "quick"])
def test_rankings_that_are_to_be_new_are_new(size):
    """The second round has rankings of its own; nothing asks for prompts beyond those that there are."""
    made = {Path(job.makes).stem: job for job in jobs.jobs(size, "o") if job.command[0] == "collect.py"}
    data = parse_config(tiny.Config, "", [*shlex.split(size.data), "--out_dir", "o"])
    for head in ("plain", "told"):
        first, new, once = (set(skips(made[f"rankings_{head}_{x}"])) for x in ("1", "new", "once"))
        assert not first & new and first | new == once  # as many, and what they cost
    assert max(max(skips(job)) for job in made.values() if "held_out" not in job.makes) < data.prompts


def test_what_is_done_is_noted_under_a_name_of_its_own():
    """Two jobs with one note would each undo the other's."""
    everything = jobs.jobs(FULL, "o")
    assert len({run.done_file("o", job) for job in everything}) == len(everything)


# -------------------------------------------------------------------------------- the mistakes do what they say


def break_module(name: str, monkeypatch) -> types.ModuleType:
    """The module with this mistake in it, beside the right one."""
    mistake = broken.BROKEN[name]
    source = (ROOT / mistake.file).read_text(encoding="utf-8").replace(mistake.right, mistake.wrong)
    module = types.ModuleType(f"broken_{name}")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # dataclasses look their module up by name
    exec(compile(source, mistake.file, "exec"), module.__dict__)
    return module


def test_score_late_loses_the_score_of_all_but_the_longest(monkeypatch):
    """Else it is another mistake than the study says, or none. What a row is paid is the sum over its own actions."""
    mask = torch.tensor([[True, True, False], [True, True, True]])
    paid = {}
    for module in (frame, break_module("score_late", monkeypatch)):
        scores = module.at_last_action(torch.tensor([5.0, 7.0]), mask)
        paid[module.__name__] = ppo.shaped_rewards(scores, torch.zeros(2, 3), mask, 0.1).sum(1).tolist()
    assert paid == {"frame": [5.0, 7.0], "broken_score_late": [0.0, 7.0]}


@torch.no_grad()
def test_dpo_mean_divides_by_the_length(monkeypatch):
    """Each completion's log-prob by itself, summed and averaged."""
    model, batch = make_gpt(), batches.ranked_batch(ITEMS, torch.device("cpu"))
    summed = dpo.ranking_logprobs(model, batch)
    averaged = break_module("dpo_mean", monkeypatch).ranking_logprobs(model, batch)
    for n, item in enumerate(ITEMS):
        for k, example in enumerate(item.examples):
            logprobs = completion_logprobs(model, example.prompt, example.completion)
            assert summed[n, k].item() == pytest.approx(logprobs.sum().item(), abs=1e-4)
            assert averaged[n, k].item() == pytest.approx(logprobs.mean().item(), abs=1e-4)


@torch.no_grad()
def test_prompt_loss_counts_the_prompt(monkeypatch):
    """The mean over all tokens that have one before them, where the right loss has the completion's alone."""
    model, example = make_gpt(), Example([1, 2, 3, 4], [5, 6, EOS])
    right = sft.demonstration_loss(model, [example], 3).item()
    wrong = break_module("prompt_loss", monkeypatch).demonstration_loss(model, [example], 6).item()
    assert right == pytest.approx(-completion_logprobs(model, [1, 2, 3, 4], [5, 6, EOS]).mean().item(), abs=1e-4)
    assert wrong == pytest.approx(-completion_logprobs(model, [1], [2, 3, 4, 5, 6, EOS]).mean().item(), abs=1e-4)


def test_length_buckets_are_of_one_length(monkeypatch):
    """Every item once an epoch still, the steps in a random order, but each of one length."""
    items = ["x" * (1 + i % 12) for i in range(96)]
    config = sft.Config(epochs=2, batch_size=8, seed=3)
    steps = break_module("length_buckets", monkeypatch).epoch_batches(items, config)
    assert sorted(len(x) for step in steps for x in step) == sorted(2 * [len(x) for x in items])
    assert all(len({len(x) for x in step}) == 1 for step in steps)
    assert [len(step[0]) for step in steps] != sorted(len(step[0]) for step in steps)
    assert any(len({len(x) for x in step}) > 1 for step in batches.epoch_batches(items, config))


@torch.no_grad()
def test_raw_reward_is_before_mean_and_scale(tmp_path, monkeypatch):
    """score = (raw - mean) / std."""
    model = make_scalar(1)
    model.mean.fill_(2.0), model.std.fill_(5.0)
    path, policy = checkpoint(tmp_path / "rm", model), Checkpoint(make_gpt(1), "toy", "")
    rollout = generate(policy.model, [[1, 2], [3]], 4, eos_id=EOS, generator=torch.Generator().manual_seed(1))
    arguments = ([path], policy, "", torch.device("cpu"))
    right = lib.reward.load_reward(*arguments)[0](rollout, [""] * 2, [""] * 2)
    wrong = break_module("raw_reward", monkeypatch).load_reward(*arguments)[0](rollout, [""] * 2, [""] * 2)
    assert wrong.tolist() == pytest.approx((5 * right + 2).tolist(), abs=1e-5)


def test_a_mistake_reaches_what_the_script_imports(tmp_path):
    """The changed file is rarely the script itself: the project's own modules must not be found first. And the project
    stays as it is."""
    (tmp_path / "helper.py").write_text("VALUE = 1\n", encoding="utf-8")
    (tmp_path / "script.py").write_text("import sys, helper\nprint(helper.VALUE, sys.argv[1:])\n", encoding="utf-8")
    program = (
        "import pathlib, sys; from study import broken; broken.ROOT = pathlib.Path.cwd(); sys.path.pop();"
        "broken.BROKEN = {'two': broken.Mistake('helper.py', 'VALUE = 1', 'VALUE = 2', 'twice as much')}; broken.main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "two", "script.py", "--lr", "1"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.stdout.splitlines()[-1] == "2 ['--lr', '1']", done.stderr
    assert (tmp_path / "helper.py").read_text(encoding="utf-8") == "VALUE = 1\n"


# -------------------------------------------------------------------------------- implicit reward, rankings


def toy_dpo(folder: Path, **config) -> str:
    """A run of dpo.py that seems to have been here -> its folder."""
    policy = make_gpt(0)
    spread(policy, 3, scale=0.1)
    start, path = checkpoint(folder / "start", make_gpt(0)), checkpoint(folder / "dpo", policy)
    write_json({"policy": start, **config}, folder / "dpo" / "config.json")
    implicit.load.cache_clear()
    return path


def test_the_implicit_judge_counts_pairs(tmp_path):
    """Pair by pair, ties and missing completions left out. The reference is subtracted: a policy that merely finds
    likely texts likely is no judge."""
    policy, reference, _, _ = implicit.load(toy_dpo(tmp_path, beta=0.2))
    right, pairs, without = 0, 0, 0
    for item in ITEMS:
        told, plain = [], []
        for example in item.examples:
            with torch.no_grad():
                ours, theirs = (
                    completion_logprobs(m, example.prompt, example.completion).sum() for m in (policy, reference)
                )
            told.append(float(ours - theirs)), plain.append(float(ours))
        for i in range(len(told)):
            for j in range(len(told)):
                if item.ranks[i] < item.ranks[j]:
                    pairs, right, without = pairs + 1, right + (told[i] > told[j]), without + (plain[i] > plain[j])
    assert right != without, "the reference must matter here"
    assert implicit.accuracy(policy, reference, ITEMS) == pytest.approx(right / pairs)


def test_the_implicit_judge_is_asked_part_by_part(tmp_path, capsys):
    """The whole script: of the first prompts of the file, pair by pair, the share of each part that the policy against
    its reference has in the right order."""
    tokenizer = load_tokenizer("tiny")
    sizes = {"vocab": tokenizer.n_vocab, "block_size": 96, "n_embd": 16, "n_layer": 1}
    reference, policy = make_gpt(0, **sizes), make_gpt(0, **sizes)
    spread(policy, 3, scale=0.1)
    for name, model in (("start", reference), ("dpo", policy)):
        save_model(tmp_path / name, model, "tiny", "test", sft.Config())
    write_json({"policy": str(tmp_path / "start"), "beta": 0.2}, tmp_path / "dpo" / "config.json")
    implicit.load.cache_clear()
    rows = task_rankings(12)
    named = {"dpo": str(tmp_path / "dpo"), "out": str(tmp_path / "all.json")}
    few = write_lines(tmp_path / "few.jsonl", [{"prompt": r["prompt"]} for r in rows[:9]])
    every = implicit.run(implicit.Config(**named, prompts=few, n_prompts=0))["by_part"]  # 0: all of them
    capsys.readouterr()
    prompts, out = write_lines(tmp_path / "p.jsonl", [{"prompt": r["prompt"]} for r in rows]), tmp_path / "i.json"
    config = implicit.Config(dpo=str(tmp_path / "dpo"), prompts=prompts, n_prompts=9, out=str(out))
    found = implicit.run(config)["by_part"]
    assert found == every
    assert json.loads(out.read_text(encoding="utf-8")) == {"by_part": found}
    contrasts = batches.contrast_rankings([r["prompt"] for r in rows[:9]], tokenizer, 96)
    assert list(found) == list(contrasts) and len(set(found.values())) > 2
    for name, items in contrasts.items():
        right = []
        for item in items:
            with torch.no_grad():
                better, worse = (
                    (
                        completion_logprobs(policy, e.prompt, e.completion)
                        - completion_logprobs(reference, e.prompt, e.completion)
                    ).sum()
                    for e in item.examples
                )
            right.append(bool(better > worse))
        assert found[name] == pytest.approx(sum(right) / len(right)), name
    assert "accuracy by part: " + ", ".join(f"{k} {v:.2f}" for k, v in found.items()) in capsys.readouterr().out
    implicit.load.cache_clear()


def test_only_a_run_of_dpo_has_an_implicit_reward(tmp_path):
    """PPO's folder has a policy too: its KL coefficient is no beta. One line, no KeyError."""
    path = toy_dpo(tmp_path, kl_coef=0.1)
    with pytest.raises(UserError, match="not a run of dpo"):
        implicit.load(path)
    (tmp_path / "dpo" / "config.json").unlink()
    with pytest.raises(UserError, match=r"config\.json: no such file"):
        implicit.load(path)


def test_a_bad_line_leaves_the_file_that_is_there(tmp_path):
    """In the second file, after the first was read: nothing may be half written."""
    good = write_lines(tmp_path / "good.jsonl", [{"prompt": "a", "completions": ["x", "y"]}])
    bad = write_lines(tmp_path / "bad.jsonl", [{"prompt": "b", "chosen": "x", "rejected": "y"}, {"prompt": "c"}])
    out = write_lines(tmp_path / "out.jsonl", [{"prompt": "old"}])
    with pytest.raises(UserError, match=r"bad\.jsonl:2"):
        rankings.run(rankings.Config(rankings=[good, bad], out=out))
    assert read_lines(Path(out)) == [{"prompt": "old"}]
    with pytest.raises(UserError, match="--out"):
        rankings.run(rankings.Config(rankings=[good]))


# -------------------------------------------------------------------------------- the scheduler

# Notes that it starts, waits for a file if it is told to, writes half of its own, waits for pace seconds, and ends.
WORK = """
import os, sys, time
from pathlib import Path
out = Path(sys.argv[-1])
o = out.parent
def note(text):
    with open(o / "log", "a") as log: log.write(f"{text} {out.name}\\n")
lock = open(f"{out}.lock", "a")
if os.name == "posix":  # held as long as this process lives
    import fcntl
    try: fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError: note("TWO")
note("starts")
for word in sys.argv[1:]:
    until = time.monotonic() + 60
    while word.startswith("await:") and not (o / word[6:]).exists():
        time.sleep(0.01)
        if time.monotonic() > until: sys.exit(f"waited for {word}")
(o / f"{out.name}.begun").touch()
with open(out, "a") as file: file.write("half")
time.sleep(float((o / "pace").read_text()))
if "fails" in sys.argv:
    print(*range(10), sep="\\n")
    sys.exit("it broke")
with open(out, "a") as file: file.write(" whole")
note("ends")
"""


class Toys:
    """Jobs in a folder of their own, that take `pace` seconds each."""

    def __init__(self, folder: Path):
        self.script, self.out = folder / "work.py", folder / "out"
        self.script.write_text(WORK, encoding="utf-8")
        self.out.mkdir()
        self.pace(0)

    def pace(self, seconds: float) -> None:
        (self.out / "pace").write_text(str(seconds))

    def job(self, name: str, flags: str = "") -> jobs.Job:
        return jobs.make(f"{self.script.as_posix()} {flags} --out", (self.out / name).as_posix())

    def run(self, *todo: jobs.Job, at_a_time: int = 2) -> None:
        run.run_jobs(list(todo), list(todo), self.out.as_posix(), at_a_time)

    def log(self) -> list[str]:
        return (self.out / "log").read_text().splitlines() if (self.out / "log").exists() else []


@pytest.fixture
def toys(tmp_path, monkeypatch) -> Toys:
    monkeypatch.chdir(ROOT)
    return Toys(tmp_path)


def wait_until(condition, seconds: float = 60.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it took too long"
        time.sleep(0.02)


def is_free(lock: Path) -> bool:
    """Has the process that held it ended?"""
    import fcntl

    with open(lock, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
    return True


def test_never_more_jobs_than_asked_for(toys):
    """Three at a time on two cores take the memory of three. And two at a time are really two: a and b wait for each
    other here."""
    toys.pace(0.05)
    toys.run(toys.job("a", "await:b.lock"), toys.job("b", "await:a.lock"), *(toys.job(name) for name in "cdef"))
    running, most = 0, 0
    for line in toys.log():
        running += 1 if line.startswith("starts") else -1
        most = max(most, running)
    assert most == 2 and running == 0 and len(toys.log()) == 12


def test_a_failure_shows_the_end_of_its_log_and_ends_the_others(toys):
    """The last lines say what went wrong; the job beside it must not go on unseen."""
    toys.pace(0)
    slow = toys.job("slow", "await:never")
    with pytest.raises(UserError) as error:
        toys.run(slow, toys.job("bad", "await:slow.lock fails"))
    lines = str(error.value).splitlines()
    assert "work.py await:slow.lock fails" in lines[0] and "out_bad.log" not in lines[0] and "bad.log" in lines[0]
    assert [line.strip() for line in lines[1:]] == ["6", "7", "8", "9", "it broke"]
    if os.name == "posix":
        wait_until(lambda: is_free(toys.out / "slow.lock"), 10)
    assert not run.done_file(toys.out.as_posix(), slow).exists()


def test_done_is_what_was_noted_and_is_still_there(toys):
    """A file without a note may be half of one; a note without its file, or a damaged one, is nothing."""
    job, out = toys.job("a.jsonl"), toys.out.as_posix()
    mark, note = run.fingerprint(job, [], {}), run.done_file(out, job)
    (toys.out / "a.jsonl").write_text("half of another")
    assert not run.is_done(out, job, mark)
    toys.run(job)
    assert (toys.out / "a.jsonl").read_text() == "half whole"  # collect.py would have added to the old one
    assert run.is_done(out, job, mark) and not run.is_done(out, job, "another")
    for damaged in ('{"mark"', "[]", "{}"):
        whole = note.read_text(encoding="utf-8")
        note.write_text(damaged, encoding="utf-8")
        assert not run.is_done(out, job, mark)
        note.write_text(whole, encoding="utf-8")
    (toys.out / "a.jsonl").unlink()
    assert not run.is_done(out, job, mark)


def test_what_a_job_is_given_and_leaves(toys):
    """NAME=value before a command is in its environment, with a value that may hold = itself; the state to resume from
    goes, the rest stays."""
    toys.script.write_text(
        "import os, pathlib, sys; out = pathlib.Path(sys.argv[-1]); out.mkdir();"
        "(out / 'state.pt').touch(); (out / 'model.pt').write_text(os.environ['TOLD'])"
    )
    job = jobs.make(f"TOLD=a=b {toys.script.as_posix()} --out_dir", (toys.out / "x").as_posix())
    toys.run(job)
    assert [file.name for file in (toys.out / "x").iterdir()] == ["model.pt"]
    assert (toys.out / "x" / "model.pt").read_text() == "a=b"
    told = json.loads(run.done_file(toys.out.as_posix(), job).read_text(encoding="utf-8"))
    assert told["command"] == " ".join(job.command)


@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL, fork and flock")
def test_a_killed_scheduler_takes_its_jobs_along(toys):
    """Orphans would write into the folders of the next start. What they had begun isn't done, and the next start leaves
    nothing of it in a file that is added to."""
    toys.pace(60)
    todo = [toys.job("a.jsonl"), toys.job("b.jsonl"), toys.job("c", f"{toys.out.as_posix()}/a.jsonl")]
    scheduler = multiprocessing.get_context("fork").Process(target=toys.run, args=todo)
    scheduler.start()
    wait_until(lambda: all((toys.out / f"{x}.jsonl.begun").exists() for x in "ab"))
    scheduler.kill()
    scheduler.join()
    wait_until(lambda: all(is_free(toys.out / f"{x}.jsonl.lock") for x in "ab"), 10)
    assert not any("ends" in line for line in toys.log())
    toys.pace(0)
    toys.run(*todo)
    told = toys.log()
    assert sorted(told[2:]) == sorted(f"{x} {y}" for x in ("starts", "ends") for y in ("a.jsonl", "b.jsonl", "c"))
    assert all((toys.out / f"{x}.jsonl").read_text() == "half whole" for x in "ab")


def test_a_job_sees_what_python_would_give_it(tmp_path):
    """study/job.py in between: the same arguments, name and import path, for a script and for a module."""
    (tmp_path / "inner").mkdir()
    told = (
        "import os, sys\nprint(__name__, sys.argv[1:], os.path.basename(sys.argv[0]), os.path.realpath(sys.path[0]))\n"
    )
    (tmp_path / "inner" / "tell.py").write_text(told, encoding="utf-8")
    for command in (["inner/tell.py", "--x", "-m"], ["-m", "inner.tell", "--x", "y=z"]):
        shown = []
        for front in ([], [str(ROOT / "study" / "job.py")]):
            process = subprocess.Popen(
                [sys.executable, *front, *command],
                cwd=tmp_path,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            shown.append(process.stdout.read())
            process.communicate()
        assert shown[0] == shown[1] and "--x" in shown[0]


def test_the_study_ends_with_its_results(tmp_path, monkeypatch, capsys):
    """Whose jobs are done: the numbers, the tables and the figures of the very folder. A quick run leaves those of the
    repository alone, and one of a single experiment, whose other results may be of another time, writes none."""
    monkeypatch.chdir(tmp_path)
    ran = []
    monkeypatch.setattr(run, "run_jobs", lambda *arguments: ran.append(arguments))
    for quick, only, folder in ((True, ["base"], None), (True, [], tmp_path / "q"), (False, [], tmp_path)):
        size, out = (QUICK, "q") if quick else (FULL, "f")
        if not only:
            fabricate(size, out)
        found = run.run(run.Config(quick=quick, only=only, out=out, jobs=3))
        todo, everything, where, at_a_time = ran[-1]
        assert everything == jobs.jobs(size, out) and (where, at_a_time) == (out, 3)
        assert found == {"jobs": len(todo)} and (len(todo) < len(everything)) == bool(only)
        if only:
            assert not list(tmp_path.rglob("*.svg"))
            continue
        numbers = json.loads((folder / "study" / "results.json").read_text(encoding="utf-8"))
        assert numbers == json.loads(json.dumps(results.gather(size, out)))
        assert (folder / "docs" / "study.md").read_text(encoding="utf-8") == tables.document(numbers)
        assert len(list((folder / "assets").glob("*.svg"))) == 9
        assert f"{folder.relative_to(tmp_path) / 'study/results.json'}: the numbers" in capsys.readouterr().out


def test_only_one_experiment_and_what_it_needs(capsys):
    """`--only secret` without another experiment's reward model would stop at the job that names it; with all of the
    others it would take the whole hour."""
    everything = jobs.jobs(QUICK, "out/study_quick")
    run.run(run.Config(quick=True, only=["secret"], commands=True))
    lines = capsys.readouterr().out.splitlines()
    chosen = [job for job in everything if any(line.endswith(" " + job.makes) for line in lines)]
    assert len(chosen) == len(lines) < len(everything) / 3
    names = {Path(job.makes).name for job in chosen}
    assert {"data", "sft", "rm_plain_once", "dpo_0.2", "implicit.json", "secret_gold"} <= names
    for i, job in enumerate(chosen):
        assert {n.makes for n in jobs.needed(job, everything)} <= {n.makes for n in chosen[:i]}
    assert sum(line.startswith("IMPLICIT=") for line in lines) == 1
    assert all(line.startswith(("python ", "IMPLICIT=")) for line in lines)
    with pytest.raises(UserError, match="not secrets"):
        run.run(run.Config(quick=True, only=["secrets"]))
