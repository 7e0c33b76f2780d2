"""The results of the study: from what its jobs wrote to means over seeds, 95% intervals and fitted curves
(results.json).

An interval is mean +- t * s / sqrt(n) over n seeds. Each seed has its own data, SFT policy, annotators and reward
models. Student's t for three seeds is 4.30, so only a large effect is called an effect here.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from data.files import read_json, read_jsonl
from study.jobs import SFT_BROKEN, Size

T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365}  # Student's t, by number of seeds
MADE_BY = "python -m study.run"


def interval(values: list[float]) -> dict:
    """The mean over seeds and its 95% interval. One seed has no interval."""
    n, mean = len(values), sum(values) / len(values)
    found = {"mean": mean, "low": None, "high": None, "seeds": values}
    if n > 1:
        half = T95[n] * float(np.std(values, ddof=1)) / math.sqrt(n)
        found |= {"low": mean - half, "high": mean + half}
    return found


def difference(before: dict, after: dict) -> dict:
    """The interval of what changes from one figure to another of the same seeds."""
    return interval([b - a for a, b in zip(before["seeds"], after["seeds"], strict=True)])


def over_seeds(by_seed: list[list[dict]], keys: tuple[str, ...]) -> list[dict]:
    """The points of each seed -> one list of points, with the interval of each key over the seeds."""
    return [{k: interval([p[k] for p in same]) for k in keys} for same in zip(*by_seed, strict=True)]


def read(path: str) -> dict:
    return read_json(path, MADE_BY)


def log_of(folder: str) -> list[dict]:
    """The metrics that a run logged."""
    return [row for _, row in read_jsonl(f"{folder}/metrics.jsonl", MADE_BY)]


# -------------------------------------------------------------------------------- 1. over-optimisation


def blocks(rows: list[dict], size: int) -> list[dict[str, float]]:
    """Means of kl, score and gold over each `size` iterations, because one iteration has few samples."""
    size = max(1, min(size, len(rows)))
    parts = [rows[i : i + size] for i in range(0, len(rows) - size + 1, size)]
    return [{k: sum(row[k] for row in part) / len(part) for k in ("kl", "score", "gold")} for part in parts]


SHAPES = {"rl": math.log, "best_of_n": lambda d: d}


def fit(distances: list[float], values: list[float], start: float, shape: Callable[[float], float]) -> dict:
    """Least squares of value = start + d (alpha - beta shape(d)) with d = sqrt(KL), the two forms of Gao et al. 2022
    (arXiv:2210.10760, section 3): shape(d) = d for best-of-n, log d for RL. It is linear in alpha and beta, so there is
    one answer -> start, alpha, beta, root mean square error."""
    points = [(d, value - start) for d, value in zip(distances, values, strict=True) if d > 0]
    if len(points) < 2:
        return {"start": start, "alpha": 0.0, "beta": 0.0, "error": 0.0}
    columns = np.array([(d, -d * shape(d)) for d, _ in points])  # (n, 2)
    rises = np.array([rise for _, rise in points])  # (n,)
    coefficients = np.linalg.lstsq(columns, rises, rcond=None)[0]  # (2,)
    error = np.sqrt(np.mean((columns @ coefficients - rises) ** 2))
    return {"start": start, "alpha": float(coefficients[0]), "beta": float(coefficients[1]), "error": float(error)}


def fitted(curve: dict, d: float, shape: Callable[[float], float]) -> float:
    """The value of a fitted curve at distance d."""
    return curve["start"] + (d * (curve["alpha"] - curve["beta"] * shape(d)) if d > 0 else 0.0)


def curve(by_seed: list[list[dict]], form: str, start: dict[str, float] | None = None) -> dict:
    """The curve of one run, or of one judge: its points (distance, score, gold, each with its interval over seeds), the
    fits to score and gold, and the fall. start: score and gold at distance 0 (None: those of the first point)."""
    with_distance = [[p | {"distance": math.sqrt(max(0.0, p["kl"]))} for p in points] for points in by_seed]
    points = over_seeds(with_distance, ("distance", "score", "gold"))
    found = {"points": points}
    distances = [p["distance"]["mean"] for p in points]
    for key in ("score", "gold"):
        means = [p[key]["mean"] for p in points]
        fit_to = fit(distances, means, start[key] if start else means[0], SHAPES[form])
        at_points = [(p[key], fitted(fit_to, p["distance"]["mean"], SHAPES[form])) for p in points]
        inside = [x["low"] <= value <= x["high"] for x, value in at_points if x["low"] is not None]
        found[f"{key}_fit"] = fit_to | {"inside": sum(inside) / len(inside) if inside else None}
    return found | {"fall": fall(found)}


def fall(found: dict) -> dict:
    """What changes from the point where the mean gold is highest to the last point, seed by seed."""
    points = found["points"]
    top = max(range(len(points)), key=lambda i: points[i]["gold"]["mean"])
    change = {key: difference(points[top][key], points[-1][key]) for key in ("gold", "score")}
    return {"peak_block": top, **change, "kl_at_peak": points[top]["distance"]["mean"] ** 2}


RL_RUNS = ("weak_0", "weak_0.1", "strong_0", "strong_0.1", "min_0", "mean-std_0")
BLOCK = 5  # iterations


def rl_curve(runs: list[list[dict]]) -> dict:
    """The curve of one run's logs, a log for each seed. It starts with SFT's own samples, from before the first
    update."""
    start = {key: sum(rows[0][key] for rows in runs) / len(runs) for key in ("score", "gold")}
    return curve([blocks(rows, BLOCK) for rows in runs], "rl", start)


def overoptimisation(size: Size, out: str) -> dict:
    """The curves of PPO's runs and of best of n."""
    found: dict = {"rl": {}, "best_of_n": {}}
    for name in RL_RUNS:
        seeds = size.seeds + size.more_seeds * (name == "weak_0")
        found["rl"][name] = rl_curve([log_of(f"{out}/{seed}/over_{name}") for seed in seeds])
    judged = [read(f"{out}/{seed}/best_of_n.json") for seed in size.seeds]
    for name in judged[0]:
        found["best_of_n"][name] = curve([results[name] for results in judged], "best_of_n")
        for k, point in enumerate(found["best_of_n"][name]["points"]):
            point |= {"n": judged[0][name][k]["n"], "bound": judged[0][name][k]["bound"]}
    return found


# -------------------------------------------------------------------------------- the others

FIGURES = ("gold", "rm", "kl", "length", "eos_rate", "distinct", "correct", "correct_greedy", "loss")


def policies(size: Size, out: str, evaluation: str) -> dict[str, dict]:
    """{policy: its figures in a run of evaluate.py, over the seeds}"""
    by_seed = [read(f"{out}/{seed}/{evaluation}/results.json")["policies"] for seed in size.seeds]
    return {
        name: {k: interval([seed[name][k] for seed in by_seed]) for k in FIGURES if figures.get(k) is not None}
        for name, figures in by_seed[0].items()
    }


def frontier(size: Size, out: str) -> dict:
    names = {
        "ppo": [f"ppo_{c}" for c in size.kl_coefs],
        "grpo": [f"grpo_{c}" for c in size.kl_coefs],
        "rloo": [f"rloo_{c}" for c in size.kl_coefs[::3]],
        "dpo": [f"dpo_{b}" for b in size.betas],
        "ipo": [f"ipo_{b}" for b in size.ipo_betas],
        "sft_best": ["sft_best"],
        "sft": ["sft"],
    }
    figures = policies(size, out, "evaluate_frontier")
    return {method: {name: figures[name] for name in points} for method, points in names.items()}


def by_part(size: Size, out: str, path: str) -> dict:
    """A judge's accuracy on each kind of pair."""
    by_seed = [read(f"{out}/{seed}/{path}")["by_part"] for seed in size.seeds]
    return {part: interval([seed[part] for seed in by_seed]) for part in by_seed[0]}


def feedback(size: Size, out: str) -> dict:
    """The demo's number and noise of rankings is that of the frontier's ppo_0.1 and dpo_0.2."""
    usual, others = policies(size, out, "evaluate_frontier"), policies(size, out, "evaluate_feedback")
    found: dict = {"numbers": {}, "noises": {}, "sft": usual["sft"]}
    sets = [("numbers", n, f"n{n}") for n in size.numbers] + [("noises", t, f"noise{t}") for t in (0.5, *size.noises)]
    for group, key, name in sets:
        if key in (size.rankings, 0.5):
            judge, ppo, dpo = "reward_model", usual["ppo_0.1"], usual["dpo_0.2"]
        else:
            judge, ppo, dpo = f"rm_{name}", others[f"ppo_{name}"], others[f"dpo_{name}"]
        parts = by_part(size, out, f"{judge}/results.json")
        accuracy = interval([read(f"{out}/{seed}/{judge}/results.json")["accuracy"] for seed in size.seeds])
        found[group][str(key)] = {"by_part": parts, "accuracy": accuracy, "ppo": ppo, "dpo": dpo}
    return found


def iterated(size: Size, out: str) -> dict:
    """The reward model and PPO after each round; "gain": true reward of the second round over one round of all."""
    rounds = {"first half": "1", "half of the first policy's samples": "2", "all of SFT's samples": "once"}
    figures, found = policies(size, out, "evaluate_iterated"), {}
    for head in ("plain", "told"):
        found[head] = {
            text: figures[f"ppo_{head}_{name}"] | {"by_part": by_part(size, out, f"rm_{head}_{name}/results.json")}
            for text, name in rounds.items()
        }
        _, second, once = found[head].values()
        found[head]["gain"] = difference(once["gold"], second["gold"])
    return found


def secret(size: Size, out: str) -> dict:
    judges = {
        "DPO's implicit reward": "implicit.json",
        "scalar head": "rm_plain_once/results.json",
        "scalar head that is told expectations": "reward_model/results.json",
    }
    found: dict = {"judges": {name: by_part(size, out, path) for name, path in judges.items()}, "maximised": {}}
    runs = {"implicit": "secret_implicit", "plain": "secret_plain", "told": "over_strong_0", "gold": "secret_gold"}
    for name, run in runs.items():
        logs = [log_of(f"{out}/{seed}/{run}") for seed in size.seeds]
        points = over_seeds([blocks(log, BLOCK) for log in logs], ("kl", "score", "gold"))
        found["maximised"][name] = {"points": points, "length": interval([log[-1]["length"] for log in logs])}
    return found


def breaks(size: Size, out: str) -> dict:
    """What each mistake changes against the same run without it."""
    usual, with_mistakes = policies(size, out, "evaluate_frontier"), policies(size, out, "evaluate_breaks")
    found = {}
    for name in [*(name for name in size.breaks if name not in SFT_BROKEN), "dpo_mean", *SFT_BROKEN]:
        baseline = usual["dpo_0.2"] if name == "dpo_mean" else usual["ppo_0.1"]
        baseline = with_mistakes["break_sft_as_it_is"] if name in SFT_BROKEN else baseline
        broken = with_mistakes[f"break_{name}"]
        change = {k: difference(baseline[k], broken[k]) for k in FIGURES if k in broken and k in baseline}
        found[name] = {"broken": broken, "baseline": baseline, "change": change}
    return found


SECTIONS = (overoptimisation, frontier, feedback, iterated, secret, breaks)


def rounded(obj):
    """The same results with four digits: more than three seeds can tell."""
    if isinstance(obj, dict):
        return {k: rounded(v) for k, v in obj.items()}
    if isinstance(obj, list):
        return [rounded(v) for v in obj]
    return round(obj, 4) if isinstance(obj, float) else obj


def gather(size: Size, out: str) -> dict:
    """All results of the study, from the files in `out`."""
    found = {section.__name__: rounded(section(size, out)) for section in SECTIONS}
    return {"seeds": list(size.seeds), **found}
