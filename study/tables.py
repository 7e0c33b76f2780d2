"""Writes the study's results as tables: docs/study.md.

python -m study.tables --results study/results.json
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lib.cli import Flags, flag, run_main
from lib.run import write_text
from study.jobs import PPO_FLAGS, SFT_BROKEN
from study.results import read


@dataclass
class Config(Flags):
    results: str = flag("study/results.json", "results of the study, as study.run writes them")
    document: str = flag("docs/study.md", "file for all tables")


def show(x: dict, digits: int = 2, sign: str = "") -> str:
    """A mean over seeds with its interval: "mean [low, high]"."""
    if x["low"] is None:
        return f"{x['mean']:{sign}.{digits}f}"
    return f"{x['mean']:{sign}.{digits}f} [{x['low']:{sign}.{digits}f}, {x['high']:{sign}.{digits}f}]"


def table(head: str, rows: Iterator[list[str]]) -> str:
    """A Markdown table. head: its first line, the titles between bars."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([head, "|" + " --- |" * (head.count("|") - 1), *lines])


def overoptimisation(results: dict) -> str:
    found = results["overoptimisation"]
    runs = {
        "PPO, 300 rankings, kl_coef 0": found["rl"]["weak_0"],
        "the same, 0.1": found["rl"]["weak_0.1"],
        "PPO, 5,000 rankings, kl_coef 0": found["rl"]["strong_0"],
        "the same, 0.1 (the defaults)": found["rl"]["strong_0.1"],
        "PPO, minimum of 4 weak ones, 0": found["rl"]["min_0"],
        "PPO, their mean - std, 0": found["rl"]["mean-std_0"],
        "best of n, 300 rankings": found["best_of_n"]["weak_0"],
        "best of n, minimum of 4": found["best_of_n"]["min"],
        "best of n, mean - std": found["best_of_n"]["mean-std"],
        "best of n, 5,000 rankings": found["best_of_n"]["reward_model"],
    }

    def row(label: str, run: dict) -> list[str]:
        cells = [label, *(show(run["fall"][key], 2, "+") for key in ("gold", "score"))]
        for fit in (run["gold_fit"], run["score_fit"]):
            inside = "-" if fit["inside"] is None else f"{fit['inside']:.0%}"
            cells += [f"{fit['alpha']:.2f}, {fit['beta']:.2f}", f"{fit['error']:.2f}", inside]
        return cells

    fits = "a, b of the true reward | error | intervals | a, b of the opinion | error | intervals"
    return table(f"| | true reward, peak to end | opinion, meanwhile | {fits} |", (row(*run) for run in runs.items()))


def frontier(results: dict) -> str:
    points = [(name, p) for method in results["frontier"].values() for name, p in method.items()]
    columns = ("gold", "kl", "correct", "correct_greedy")
    rows = ([name.replace("_", " "), *(show(p[key]) for key in columns)] for name, p in points)
    return table("| method, coefficient | gold | KL | correct | at temperature 0 |", rows)


def feedback(results: dict) -> str:
    groups = (("numbers", "rankings"), ("noises", "noise"))
    points = [(f"{label} {key}", p) for group, label in groups for key, p in results["feedback"][group].items()]

    def row(label: str, p: dict) -> list[str]:
        parts = (p["by_part"][part] for part in ("right_vs_wrong", "polite_vs_plain"))
        return [label, *map(show, (p["accuracy"], *parts, p["ppo"]["gold"], p["dpo"]["gold"]))]

    head = "| | accuracy | right against wrong | polite against plain | gold of PPO | gold of DPO |"
    return table(head, (row(*point) for point in points))


def iterated(results: dict) -> str:
    heads = (("plain", "scalar head"), ("told", "told expectations"))
    rounds = [(f"{label}: {name}", p) for head, label in heads for name, p in results["iterated"][head].items()]
    rows = (
        [name, show(p["by_part"]["right_vs_wrong"]), *(show(p[key]) for key in ("gold", "correct", "kl"))]
        for name, p in rounds
        if "by_part" in p  # the last is the difference of two others
    )
    return table("| reward model | right against wrong | gold of PPO | correct | KL |", rows)


PARTS = ("right_vs_wrong", "polite_vs_plain", "short_vs_rambling", "once_vs_repeated")


def judges(results: dict) -> str:
    titles = " | ".join(part.replace("_vs_", " against ") for part in PARTS)
    found = results["secret"]["judges"].items()
    return table(f"| judge | {titles} |", ([name, *(show(parts[part]) for part in PARTS)] for name, parts in found))


MAXIMISED = {
    "implicit": "DPO's implicit reward",
    "plain": "scalar head",
    "told": "told expectations",
    "gold": "the truth",
}


def maximised(results: dict) -> str:
    def row(name: str, run: dict) -> list[str]:
        top, last = max(run["points"], key=lambda p: p["gold"]["mean"]), run["points"][-1]
        peak = f"{top['gold']['mean']:.2f} at {top['kl']['mean']:.1f} nats"
        return [MAXIMISED[name], peak, show(last["gold"]), show(last["kl"], 1), show(run["length"], 1)]

    rows = (row(*run) for run in results["secret"]["maximised"].items())
    return table("| what is maximised | best true reward | at the end | KL | tokens an answer |", rows)


def command(name: str) -> str:
    """The command that makes the mistake on the files of `make demo` in out/."""
    if name in PPO_FLAGS:
        script = f"ppo.py {PPO_FLAGS[name]}"
    else:
        stage = "sft.py --epochs 1" if name in SFT_BROKEN else "dpo.py" if name == "dpo_mean" else "ppo.py"
        script = f"-m study.broken {name} {stage}"
    return f"python {script} --out_dir out/broken/{name}"


def breaks(results: dict) -> str:
    def row(name: str, change: dict) -> list[str]:
        digits = {"gold": 2, "kl": 2, "length": 1, "eos_rate": 3, "correct": 2}
        return [f"`{command(name)}`", *(show(change[key], d, "+") for key, d in digits.items())]

    rows = (row(name, p["change"]) for name, p in results["breaks"].items())
    return table("| the mistake, as a command | gold | KL | tokens | EOS rate | correct |", rows)


DOCUMENT = """# The study in numbers

[RLHF from scratch](../README.md) · what the numbers mean: [the experiments](experiments.md)

From `study/results.json` (`make study`, which writes this file too): mean over three seeds [95% interval], six
where PPO without a penalty maximises a reward model from 300 rankings. Gold is the true reward, 3 at most.

## Over-optimisation

From the peak of the true reward to the end of the run (or n = 256), and the fits d (a - b log d) for PPO, d (a - b d)
for best of n, with d = sqrt(KL); "intervals": share of the points whose 95% interval holds the curve.

{overoptimisation}

## Reward against KL

{frontier}

## How much feedback?

{feedback}

## A second round

{iterated}

## Your language model is secretly a reward model

As judges, on pairs that differ in one respect (share of pairs right):

{judges}

As what PPO maximises, without a penalty:

{maximised}

## Break it on purpose

Change against the same run without the mistake, paired by seed; "correct" is the share of right answers. Each command
makes one mistake, and runs on what `make demo` has left in `out/`. The figures are those of the study's setting
(`python -m study.run --only breaks --commands`).

{breaks}
"""


def document(results: dict) -> str:
    parts = (overoptimisation, frontier, feedback, iterated, judges, maximised, breaks)
    return DOCUMENT.format(**{part.__name__: part(results) for part in parts})


def run(config: Config) -> dict:
    write_text(document(read(config.results)), Path(config.document))
    print(f"{config.document}: the tables")
    return {}


def main() -> None:
    run_main(run, Config, __doc__)


if __name__ == "__main__":
    main()
