"""The study part by part: best of n, intervals, fits, falls; its commands, mistakes, rewards, scheduler and tables."""

from __future__ import annotations

import importlib
import itertools
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import TOY, checkpoint, completion_logprobs, make_gpt, spread

from lib.cli import UserError, check_ranges, parse_config
from data.files import read_jsonl, write_jsonl
from evaluate import expected_best
from sampling import Rollout
from study import best_of_n, broken, implicit, jobs, rankings, results, run, tables

ROOT = Path(__file__).resolve().parent.parent
FULL, QUICK = jobs.FULL, jobs.QUICK


# -------------------------------------------------------------------------------- best of n


def test_kl_of_best_of_n_of_texts_that_never_repeat():
    """Where no two samples are the same the formula log n - (n - 1)/n is exact."""
    scores = torch.rand(100, 512, generator=torch.Generator().manual_seed(2))
    logprobs = torch.full((100, 512), -60.0)
    for n in (1, 2, 8, 64):
        found = expected_best(scores, best_of_n.best_log_ratio(scores, logprobs, n), n).mean().item()
        assert found == pytest.approx(math.log(n) - (n - 1) / n, abs=0.03)


def test_curve_equals_a_loop_over_all_subsets():
    """The best of every subset of n of six samples, averaged."""
    generator = torch.Generator().manual_seed(3)
    scores, golds = torch.rand(2, 6, generator=generator), torch.rand(2, 6, generator=generator)
    for point in best_of_n.curve(scores, golds, torch.full((2, 6), -5.0), [1, 2, 4]):
        subsets = list(itertools.combinations(range(6), point["n"]))
        best = [[max(s, key=lambda i: scores[p, i].item()) for s in subsets] for p in range(2)]
        gold = sum(golds[p, i].item() for p in range(2) for i in best[p]) / (2 * len(subsets))
        assert point["gold"] == pytest.approx(gold, abs=1e-6)


def test_a_text_is_scored_once_and_counted_as_often_as_it_came():
    """The same tokens with another end (cut, not ended) are another row."""
    tokens = torch.tensor([[1, 5, 2, 2], [1, 6, 2, 2], [1, 5, 2, 2], [1, 5, 2, 2]])
    lens = torch.tensor([3, 3, 3, 2])
    rollout = Rollout(tokens, torch.ones(4, dtype=torch.long), lens, torch.tensor([True, True, True, False]))
    rows, index = best_of_n.unique_rows(rollout)
    assert len(rows.lens) == 3
    assert torch.equal(rows.tokens[index], tokens) and torch.equal(rows.lens[index], lens)
    assert torch.equal(rows.ended[index], rollout.ended)


# -------------------------------------------------------------------------------- intervals, fits, falls


def test_interval_by_hand():
    """Student's t with n - 1 degrees of freedom, not 1.96: three seeds are few."""
    found = results.interval([1.0, 2.0, 4.5])
    deviation = math.sqrt(((1 - 2.5) ** 2 + (2 - 2.5) ** 2 + (4.5 - 2.5) ** 2) / 2)
    assert found["mean"] == 2.5
    assert found["high"] - 2.5 == pytest.approx(4.303 * deviation / math.sqrt(3), rel=1e-9)
    assert results.interval([0.3])["low"] is None


@pytest.mark.parametrize("form", ["rl", "best_of_n"])
def test_a_fit_finds_the_curve_that_it_is_given(form):
    """d (a - b log d) and d (a - b d), with the start that is known."""
    shape = (lambda d: math.log(d)) if form == "rl" else (lambda d: d)
    distances = [0.0, 0.3, 0.9, 1.7, 3.0]
    values = [0.7 + (d * (1.3 - 0.4 * shape(d)) if d else 0.0) for d in distances]
    found = results.fit(distances, values, 0.7, results.SHAPES[form])
    assert (found["alpha"], found["beta"], found["error"]) == pytest.approx((1.3, 0.4, 0.0), abs=1e-9)
    assert [results.fitted(found, d, results.SHAPES[form]) for d in distances] == pytest.approx(values, abs=1e-9)


def test_the_error_of_a_fit_is_the_root_of_the_mean_square():
    """A mean absolute error, or the sum, under that name. What is left of the points is computed from the curve; a
    point at distance 0 is the start itself and counts for nothing."""
    distances, values = [0.0, 1.0, 2.0, 3.0], [5.0, 1.0, 2.5, 0.5]
    found = results.fit(distances, values, 0.5, results.SHAPES["best_of_n"])
    left = [0.5 + d * (found["alpha"] - found["beta"] * d) - v for d, v in zip(distances[1:], values[1:], strict=True)]
    assert found["error"] == pytest.approx(math.sqrt(sum(x * x for x in left) / 3), rel=1e-9)
    assert abs(found["error"] - sum(map(abs, left)) / 3) > 0.03
    for alpha, beta in ((0.1, 0.0), (-0.1, 0.0), (0.0, 0.03), (0.0, -0.03)):  # no other curve is nearer
        a, b = found["alpha"] + alpha, found["beta"] + beta
        others = [0.5 + d * (a - b * d) - v for d, v in zip(distances[1:], values[1:], strict=True)]
        assert sum(x * x for x in others) > sum(x * x for x in left)


def test_one_point_gives_no_curve():
    """Two unknowns of one equation: any curve would do."""
    none = {"start": 0.7, "alpha": 0.0, "beta": 0.0, "error": 0.0}
    assert results.fit([0.0, 1.0], [0.7, 3.0], 0.7, results.SHAPES["rl"]) == none


def test_blocks_and_fall_by_hand():
    """Means over iterations; and from the block that is best on average, seed by seed: each seed's own best block would
    make a fall of mere noise."""
    rows = [{"kl": float(i), "score": 10.0 * i, "gold": -float(i)} for i in range(7)]
    assert [b["kl"] for b in results.blocks(rows, 3)] == [1.0, 4.0]
    seeds = [[1.0, 3.0, 2.0], [1.0, 2.0, 2.5]]
    points = [
        {"gold": results.interval(list(g)), "score": results.interval([0.0, 1.0]), "distance": {"mean": 1.0}}
        for g in zip(*seeds, strict=True)
    ]
    found = results.fall({"points": points})
    assert found["peak_block"] == 1 and found["gold"]["seeds"] == [-1.0, 0.5]


# -------------------------------------------------------------------------------- the commands


@pytest.mark.parametrize("size", [FULL, QUICK], ids=["full", "quick"])
def test_every_command_fits_its_script_and_finds_its_files(size):
    """A renamed flag, a value out of range, or a file that no earlier job makes: found after an hour, otherwise."""
    made: list = []
    for job in jobs.jobs(size, "out/s"):
        words = [w for w in job.command if "=" not in w or w.startswith("--")]
        if words[0] == "-m":
            words = words[1:]
        if words[0] == "study.broken":
            assert words[1] in broken.BROKEN
            words = words[2:]
        module = importlib.import_module(words[0].removesuffix(".py"))
        check_ranges(parse_config(module.Config, "", words[1:]))
        needs = {n.makes for n in jobs.needed(job, made)}
        for word in job.command:
            path = word.rpartition("=")[2]
            if path.startswith("out/s") and path != job.makes:
                assert any(path == n or path.startswith(n + "/") for n in needs), f"{job.makes}: {path}"
        made.append(job)
    assert len({job.makes for job in made}) == len(made)


@pytest.mark.parametrize("name", broken.BROKEN)
def test_a_mistake_is_one_place_and_still_python(name):
    """One that no longer fits the code would run the code as it is, and show that the mistake does no harm."""
    mistake = broken.BROKEN[name]
    text = (ROOT / mistake.file).read_text(encoding="utf-8")
    assert text.count(mistake.right) == 1
    compile(text.replace(mistake.right, mistake.wrong), mistake.file, "exec")
    assert broken.diff(mistake, text).count("\n+") >= 1


def test_a_broken_script_runs_the_broken_code(tmp_path):
    """The copy's own modules must be imported, not the project's."""
    done = subprocess.run(
        [sys.executable, "-m", "study.broken", "score_late", "ppo.py", "--policy", str(tmp_path / "none")],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert "+    late = (last + 1).clamp(" in done.stdout and "no such checkpoint" in done.stderr
    done = subprocess.run(
        [sys.executable, "-m", "study.broken", "typo", "ppo.py"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode and "error: name one of these mistakes" in done.stderr


# -------------------------------------------------------------------------------- implicit reward, rankings


def test_the_implicit_reward_is_beta_times_the_log_ratio(tmp_path, monkeypatch):
    """EOS counts where the completion ended; the reference is the run's own."""
    reference, policy = make_gpt(0), make_gpt(0)
    spread(policy, 3, scale=0.1)
    start, out = checkpoint(tmp_path / "start", reference), checkpoint(tmp_path / "dpo", policy)
    (tmp_path / "dpo" / "config.json").write_text(json.dumps({"beta": 0.3, "policy": start}), encoding="utf-8")
    monkeypatch.setenv("IMPLICIT", out)
    implicit.load.cache_clear()
    prompts, completions, ended = ["ab", "c", "ab"], ["cd", "a", "cd"], [True, True, False]
    found = implicit.reward(prompts, completions, ended)
    for prompt, completion, end, r in zip(prompts, completions, ended, found, strict=True):
        ids = TOY.encode(completion) + [TOY.eos_id] * end
        log_ratio = [completion_logprobs(m, TOY.encode_prompt(prompt), ids).sum().item() for m in (policy, reference)]
        assert r == pytest.approx(0.3 * (log_ratio[0] - log_ratio[1]), abs=1e-5)
    implicit.load.cache_clear()


def test_joining_rankings_and_taking_the_best(tmp_path):
    rows = [
        {"prompt": "a", "completions": ["x", "y"], "gold": [1, 0]},
        {"prompt": "b", "completions": [["p", "q"], "r"]},
    ]
    write_jsonl(tmp_path / "1.jsonl", rows[:1])
    write_jsonl(tmp_path / "2.jsonl", rows[1:])
    files, out = [str(tmp_path / "1.jsonl"), str(tmp_path / "2.jsonl")], str(tmp_path / "out.jsonl")
    rankings.run(rankings.Config(rankings=files, out=out))
    assert [row for _, row in read_jsonl(out)] == rows
    rankings.run(rankings.Config(rankings=files, best=True, out=out))
    assert [row for _, row in read_jsonl(out)] == [
        {"prompt": "a", "completion": "x"},
        {"prompt": "b", "completion": "p"},
    ]
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\n', encoding="utf-8")
    with pytest.raises(UserError, match=r"bad\.jsonl:1"):
        rankings.run(rankings.Config(rankings=[str(tmp_path / "bad.jsonl")], out=out))


# -------------------------------------------------------------------------------- the scheduler

SCRIPT = """
import sys, time
from pathlib import Path
out = Path(sys.argv[-1])
with open(out.parent / "log", "a") as log: log.write(out.name + " starts\\n")
time.sleep(float(sys.argv[1]))
if sys.argv[2] == "fails": sys.exit("it broke")
out.write_text(sys.argv[2])
with open(out.parent / "log", "a") as log: log.write(out.name + " ends\\n")
"""


def toy_jobs(tmp_path, b: str = "b", seconds: float = 0.05) -> list[jobs.Job]:
    """a and c stand alone, b needs a, d needs b."""
    script = tmp_path / "work.py"
    script.write_text(SCRIPT, encoding="utf-8")
    o = (tmp_path / "out").as_posix()
    (tmp_path / "out").mkdir(exist_ok=True)
    parts = [("a", "a", ""), ("b", b, f"{o}/a"), ("c", "c", ""), ("d", "d", f"{o}/b")]
    return [
        jobs.make(f"{script.as_posix()} {seconds} {word} {need} --out", f"{o}/{name}") for name, word, need in parts
    ]


def log(tmp_path) -> list[str]:
    return (tmp_path / "out" / "log").read_text().splitlines()


def run_toys(tmp_path, todo: list[jobs.Job], monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    run.run_jobs(todo, todo, (tmp_path / "out").as_posix(), 2)


def test_jobs_run_once_and_after_what_they_need(tmp_path, monkeypatch):
    todo = toy_jobs(tmp_path)
    run_toys(tmp_path, todo, monkeypatch)
    told = log(tmp_path)
    assert sorted(told) == sorted(f"{x} {y}" for x in "abcd" for y in ("starts", "ends"))
    assert told.index("a ends") < told.index("b starts") and told.index("b ends") < told.index("d starts")
    run_toys(tmp_path, todo, monkeypatch)
    assert log(tmp_path) == told


def test_a_changed_command_runs_again_with_what_needs_it(tmp_path, monkeypatch):
    """A result of the old command beside those of the new one is nobody's."""
    run_toys(tmp_path, toy_jobs(tmp_path), monkeypatch)
    before = len(log(tmp_path))
    run_toys(tmp_path, toy_jobs(tmp_path, b="other"), monkeypatch)
    assert sorted(log(tmp_path)[before:]) == ["b ends", "b starts", "d ends", "d starts"]


# -------------------------------------------------------------------------------- tables


def cells(table: str, label: str) -> dict[str, str]:
    """One row of a table, by the titles of its columns; of columns of one title the last."""
    titles, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines())
    (row,) = (row for row in rows if row[0] == label)
    return dict(zip(titles, row, strict=True))


def test_tables_are_written_where_they_belong(tmp_path):
    found, document = ROOT / "study" / "results.json", tmp_path / "new" / "study.md"
    tables.run(tables.Config(results=str(found), document=str(document)))
    assert document.read_text(encoding="utf-8") == tables.document(json.loads(found.read_text(encoding="utf-8")))


def test_tables_say_what_the_results_say():
    """A cell under another title, or another run's, would be believed."""
    found = json.loads((ROOT / "study" / "results.json").read_text(encoding="utf-8"))

    def says(cell: str, x: dict, digits: int = 2, sign: str = "") -> None:
        assert cell == f"{x['mean']:{sign}.{digits}f} [{x['low']:{sign}.{digits}f}, {x['high']:{sign}.{digits}f}]"

    over = found["overoptimisation"]
    for label, line in (
        ("PPO, 300 rankings, kl_coef 0", over["rl"]["weak_0"]),
        ("the same, 0.1", over["rl"]["weak_0.1"]),
        ("PPO, 5,000 rankings, kl_coef 0", over["rl"]["strong_0"]),
        ("the same, 0.1 (the defaults)", over["rl"]["strong_0.1"]),
        ("PPO, minimum of 4 weak ones, 0", over["rl"]["min_0"]),
        ("PPO, their mean - std, 0", over["rl"]["mean-std_0"]),
        ("best of n, 300 rankings", over["best_of_n"]["weak_0"]),
        ("best of n, minimum of 4", over["best_of_n"]["min"]),
        ("best of n, mean - std", over["best_of_n"]["mean-std"]),
        ("best of n, 5,000 rankings", over["best_of_n"]["reward_model"]),
    ):
        row = cells(tables.overoptimisation(found), label)
        says(row["true reward, peak to end"], line["fall"]["gold"], sign="+")
        says(row["opinion, meanwhile"], line["fall"]["score"], sign="+")
        fits = [line[f"{key}_fit"] for key in ("gold", "score")]
        for title, fit in zip(("the true reward", "the opinion"), fits, strict=True):
            assert row[f"a, b of {title}"] == f"{fit['alpha']:.2f}, {fit['beta']:.2f}"
        assert row["intervals"] == f"{100 * fits[1]['inside']:.0f}%" and row["error"] == f"{fits[1]['error']:.2f}"
    point, row = found["frontier"]["grpo"]["grpo_0.4"], cells(tables.frontier(found), "grpo 0.4")
    titles = {"gold": "gold", "kl": "KL", "correct": "correct", "correct_greedy": "at temperature 0"}
    for key, title in titles.items():
        says(row[title], point[key])
    for label, point in (
        ("rankings 300", found["feedback"]["numbers"]["300"]),
        ("noise 2.0", found["feedback"]["noises"]["2.0"]),
    ):
        row = cells(tables.feedback(found), label)
        says(row["accuracy"], point["accuracy"])
        says(row["right against wrong"], point["by_part"]["right_vs_wrong"])
        says(row["polite against plain"], point["by_part"]["polite_vs_plain"])
        says(row["gold of PPO"], point["ppo"]["gold"])
        says(row["gold of DPO"], point["dpo"]["gold"])
    for head, name in (("plain", "scalar head"), ("told", "told expectations")):
        for text in ("first half", "half of the first policy's samples", "all of SFT's samples"):
            point, row = found["iterated"][head][text], cells(tables.iterated(found), f"{name}: {text}")
            says(row["right against wrong"], point["by_part"]["right_vs_wrong"])
            for key, title in (("gold", "gold of PPO"), ("correct", "correct"), ("kl", "KL")):
                says(row[title], point[key])
    for judge, parts in found["secret"]["judges"].items():
        row = cells(tables.judges(found), judge)
        for title in ("right against wrong", "polite against plain", "short against rambling", "once against repeated"):
            says(row[title], parts[title.replace(" against ", "_vs_")])
    maximised = {"implicit": "DPO's implicit reward", "plain": "scalar head", "told": "told expectations"}
    for name, label in (maximised | {"gold": "the truth"}).items():
        line, row = found["secret"]["maximised"][name], cells(tables.maximised(found), label)
        golds = [p["gold"]["mean"] for p in line["points"]]
        top = golds.index(max(golds))
        assert row["best true reward"] == f"{golds[top]:.2f} at {line['points'][top]['kl']['mean']:.1f} nats"
        says(row["at the end"], line["points"][-1]["gold"])
        says(row["KL"], line["points"][-1]["kl"], 1)
        says(row["tokens an answer"], line["length"], 1)
    commands = {
        "kl_k2": "python ppo.py --kl k2 --out_dir out/broken/kl_k2",
        "score_late": "python -m study.broken score_late ppo.py --out_dir out/broken/score_late",
        "dpo_mean": "python -m study.broken dpo_mean dpo.py --out_dir out/broken/dpo_mean",
        "prompt_loss": "python -m study.broken prompt_loss sft.py --epochs 1 --out_dir out/broken/prompt_loss",
    }
    for name, command in commands.items():
        change, row = found["breaks"][name]["change"], cells(tables.breaks(found), f"`{command}`")
        titles = {"gold": ("gold", 2), "KL": ("kl", 2), "tokens": ("length", 1), "EOS rate": ("eos_rate", 3)}
        for title, (key, digits) in (titles | {"correct": ("correct", 2)}).items():
            says(row[title], change[key], digits, "+")
