"""What the study's runs say: means over seeds with 95% intervals, fitted curves -> results.json, and the same in print.

An interval is mean +- t * s / sqrt(n) over the n seeds, each with its own data, SFT policy, annotators and reward
models (Student's t: with three seeds 4.30 standard errors, so what is called an effect here is a large one).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from lib.cli import UserError, check
from study.jobs import SFT_BROKEN, Size

T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365}  # by number of seeds


def interval(values: list[float]) -> dict:
    """Mean over seeds and its 95% interval; one seed has none."""
    n, mean = len(values), sum(values) / len(values)
    found = {"mean": mean, "low": None, "high": None, "seeds": values}
    if n > 1:
        deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1))
        half = T95[n] * deviation / math.sqrt(n)
        found |= {"low": mean - half, "high": mean + half}
    return found


def read(path: str) -> dict:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UserError(f"{path}: not there, or damaged; run `python -m study.run` first") from None


def log_of(path: str) -> list[dict]:
    file = Path(path) / "metrics.jsonl"
    check(file.exists(), f"{file}: no such file; run `python -m study.run` first")
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


# -------------------------------------------------------------------------------- 1. over-optimisation


def blocks(rows: list[dict], size: int) -> list[dict[str, float]]:
    """Means of kl, score and gold over `size` iterations each: one iteration's samples are few."""
    size = max(1, min(size, len(rows)))
    parts = [rows[i : i + size] for i in range(0, len(rows) - size + 1, size)]
    return [{k: sum(row[k] for row in part) / len(part) for k in ("kl", "score", "gold")} for part in parts]


def fit(distances: list[float], values: list[float], start: float, shape: Callable[[Tensor], Tensor]) -> dict:
    """Least squares of value = start + d (alpha - beta shape(d)), d = sqrt(KL): the two forms of Gao et al. 2022
    (arXiv:2210.10760, section 3) are shape(d) = d for best-of-n and log d for RL. -> alpha, beta, root mean square
    error. Linear in alpha and beta, so there is one answer."""
    d = torch.tensor([x for x in distances if x > 0], dtype=torch.float64)  # (n,)
    y = torch.tensor([v for x, v in zip(distances, values, strict=True) if x > 0], dtype=torch.float64) - start
    if len(d) < 2:
        return {"start": start, "alpha": 0.0, "beta": 0.0, "error": 0.0}
    columns = torch.stack([d, -d * shape(d)], 1)  # (n, 2)
    alpha, beta = torch.linalg.lstsq(columns, y[:, None]).solution.squeeze(1).tolist()
    error = (columns @ torch.tensor([alpha, beta], dtype=torch.float64) - y).square().mean().sqrt().item()
    return {"start": start, "alpha": alpha, "beta": beta, "error": error}


def fitted(curve: dict, d: float, shape: Callable[[Tensor], Tensor]) -> float:
    """The curve's value at distance d."""
    if d <= 0:
        return curve["start"]
    return curve["start"] + d * (curve["alpha"] - curve["beta"] * shape(torch.tensor(d, dtype=torch.float64)).item())


SHAPES = {"rl": torch.log, "best_of_n": lambda d: d}


def curve(by_seed: list[list[dict]], form: str, start: dict[str, float] | None = None) -> dict:
    """Points (distance, score, gold with intervals) of one run or judge, over seeds, both curves' fits and the fall.
    start: score and gold at distance 0 (none: the first point's)."""
    points = []
    for same in zip(*by_seed, strict=True):  # the same block, or the same n, of every seed
        distance = interval([math.sqrt(max(0.0, p["kl"])) for p in same])
        points.append({"distance": distance, **{k: interval([p[k] for p in same]) for k in ("score", "gold")}})
    found = {"points": points}
    distances = [p["distance"]["mean"] for p in points]
    for key in ("score", "gold"):
        means = [p[key]["mean"] for p in points]
        found[f"{key}_fit"] = fit(distances, means, start[key] if start else means[0], SHAPES[form])
        curve_at = [fitted(found[f"{key}_fit"], d, SHAPES[form]) for d in distances]
        inside = [
            p[key]["low"] <= v <= p[key]["high"]
            for p, v in zip(points, curve_at, strict=True)
            if p[key]["low"] is not None
        ]
        found[f"{key}_fit"]["inside"] = sum(inside) / len(inside) if inside else None
    return found | {"fall": fall(found)}


def fall(found: dict) -> dict:
    """From the block where the seeds' mean gold is highest to the last one: what each seed loses, and what the score
    does meanwhile."""
    points = found["points"]
    top = max(range(len(points)), key=lambda i: points[i]["gold"]["mean"])
    change = {
        key: interval([b - a for a, b in zip(points[top][key]["seeds"], points[-1][key]["seeds"], strict=True)])
        for key in ("gold", "score")
    }
    return {"peak_block": top, **change, "kl_at_peak": points[top]["distance"]["mean"] ** 2}


RL_RUNS = ("weak_0", "weak_0.1", "strong_0", "strong_0.1", "min_0", "mean-std_0")
BLOCK = 5  # iterations


def rl_curve(runs: list[list[dict]]) -> dict:
    """The curve of some logs; it starts with what was there before the first update, SFT's own samples."""
    start = {key: sum(rows[0][key] for rows in runs) / len(runs) for key in ("score", "gold")}
    return curve([blocks(rows, BLOCK) for rows in runs], "rl", start)


def overoptimisation(size: Size, out: str) -> dict:
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


def policies(size: Size, out: str, evaluation: str, names: list[str]) -> dict[str, dict]:
    """name -> figures of evaluate.py over the seeds."""
    told = [read(f"{out}/{seed}/{evaluation}/results.json")["policies"] for seed in size.seeds]
    return {
        name: {k: interval([t[name][k] for t in told]) for k in FIGURES if told[0][name].get(k) is not None}
        for name in names
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
    return {method: policies(size, out, "evaluate_frontier", points) for method, points in names.items()}


def by_part(size: Size, out: str, path: str) -> dict:
    """Accuracy on each kind of pair."""
    told = [read(f"{out}/{seed}/{path}")["by_part"] for seed in size.seeds]
    return {part: interval([t[part] for t in told]) for part in told[0]}


def feedback(size: Size, out: str) -> dict:
    """The demo's number and noise is the frontier's ppo_0.1 and dpo_0.2."""
    usual = policies(size, out, "evaluate_frontier", ["sft", "ppo_0.1", "dpo_0.2"])
    found: dict = {"numbers": {}, "noises": {}, "sft": usual["sft"]}
    sets = [("numbers", n, f"n{n}") for n in size.numbers] + [("noises", t, f"noise{t}") for t in (0.5, *size.noises)]
    for group, key, name in sets:
        standard = key in (size.rankings, 0.5)
        model = "reward_model" if standard else f"rm_{name}"
        told = usual if standard else policies(size, out, "evaluate_feedback", [f"ppo_{name}", f"dpo_{name}"])
        ppo, dpo = (told["ppo_0.1"], told["dpo_0.2"]) if standard else (told[f"ppo_{name}"], told[f"dpo_{name}"])
        judges = [read(f"{out}/{seed}/{model}/results.json") for seed in size.seeds]
        parts = by_part(size, out, f"{model}/results.json")
        accuracy = interval([j["accuracy"] for j in judges])
        found[group][str(key)] = {"by_part": parts, "accuracy": accuracy, "ppo": ppo, "dpo": dpo}
    return found


def iterated(size: Size, out: str) -> dict:
    found = {}
    for head in ("plain", "told"):
        names = {"first half": "1", "half of the first policy's samples": "2", "all of SFT's samples": "once"}
        told = policies(size, out, "evaluate_iterated", [f"ppo_{head}_{k}" for k in names.values()])
        found[head] = {
            text: told[f"ppo_{head}_{k}"] | {"by_part": by_part(size, out, f"rm_{head}_{k}/results.json")}
            for text, k in names.items()
        }
        gain = zip(*(found[head][text]["gold"]["seeds"] for text in list(names)[1:]), strict=True)
        found[head]["gain"] = interval([second - once for second, once in gain])
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
        by_seed = [blocks(log_of(f"{out}/{seed}/{run}"), BLOCK) for seed in size.seeds]
        points = [
            {k: interval([p[k] for p in same]) for k in ("kl", "score", "gold")} for same in zip(*by_seed, strict=True)
        ]
        length = interval([log_of(f"{out}/{seed}/{run}")[-1]["length"] for seed in size.seeds])
        found["maximised"][name] = {"points": points, "length": length}
    return found


def breaks(size: Size, out: str) -> dict:
    """What each mistake changes, against the same run without it: paired by seed."""
    usual = policies(size, out, "evaluate_frontier", ["ppo_0.1", "dpo_0.2"])
    names = [*(name for name in size.breaks if name not in SFT_BROKEN), "dpo_mean", *SFT_BROKEN]
    told = policies(size, out, "evaluate_breaks", ["break_sft_as_it_is", *(f"break_{name}" for name in names)])
    found = {}
    for name in names:
        baseline = usual["dpo_0.2"] if name == "dpo_mean" else usual["ppo_0.1"]
        baseline = told["break_sft_as_it_is"] if name in SFT_BROKEN else baseline
        broken = told[f"break_{name}"]
        shared = [k for k in FIGURES if k in broken and k in baseline]
        change = {
            k: interval([b - a for a, b in zip(baseline[k]["seeds"], broken[k]["seeds"], strict=True)]) for k in shared
        }
        found[name] = {"broken": broken, "baseline": baseline, "change": change}
    return found


SECTIONS = (overoptimisation, frontier, feedback, iterated, secret, breaks)


def rounded(obj):
    """Four digits are more than three seeds can tell."""
    if isinstance(obj, dict):
        return {k: rounded(v) for k, v in obj.items()}
    if isinstance(obj, list):
        return [rounded(v) for v in obj]
    return round(obj, 4) if isinstance(obj, float) else obj


def gather(size: Size, out: str) -> dict:
    found = {section.__name__: rounded(section(size, out)) for section in SECTIONS}
    return {"seeds": list(size.seeds), **found}


# -------------------------------------------------------------------------------- in print


def show(x: dict, digits: int = 2, sign: str = "") -> str:
    """mean [low, high]"""
    if x["low"] is None:
        return f"{x['mean']:{sign}.{digits}f}"
    return f"{x['mean']:{sign}.{digits}f} [{x['low']:{sign}.{digits}f}, {x['high']:{sign}.{digits}f}]"


def print_results(results: dict) -> None:
    print("\nover-optimisation: from the peak of gold to the end")
    for family in ("rl", "best_of_n"):
        for name, run in results["overoptimisation"][family].items():
            change = run["fall"]
            print(f"  {family:9} {name:14} gold {show(change['gold'], 2, '+')}  score {show(change['score'], 2, '+')}")
            for key in ("gold", "score"):
                f = run[f"{key}_fit"]
                inside = "" if f["inside"] is None else f", {f['inside']:.0%} of the points' intervals hold it"
                form = "d (a - b log d)" if family == "rl" else "d (a - b d)"
                print(
                    f"      {key:5} = {f['start']:.2f} + {form}, a {f['alpha']:.3f}, b {f['beta']:.3f}; "
                    f"error {f['error']:.3f}{inside}"
                )
    print("\nfrontier: gold at KL")
    for points in results["frontier"].values():
        for name, p in points.items():
            print(
                f"  {name:12} gold {show(p['gold'])}  KL {show(p['kl'])}  RM {show(p['rm'])}  EOS {show(p['eos_rate'])}"
            )
    for group in ("numbers", "noises"):
        print(f"\nfeedback: {group}")
        for key, p in results["feedback"][group].items():
            print(
                f"  {key:6} accuracy {show(p['accuracy'])}  right {show(p['by_part']['right_vs_wrong'])}  "
                f"polite {show(p['by_part']['polite_vs_plain'])}  gold: PPO {show(p['ppo']['gold'])}  "
                f"DPO {show(p['dpo']['gold'])}"
            )
    print("\niterated")
    for head, rounds in results["iterated"].items():
        for name, p in rounds.items():
            if name == "gain":
                print(f"  {head:6} second round over once: gold {show(p, 2, '+')}")
                continue
            right = show(p["by_part"]["right_vs_wrong"])
            print(f"  {head:6} {name:36} right {right}  gold {show(p['gold'])}  correct {show(p['correct'])}")
    print("\nsecretly a reward model")
    for name, parts in results["secret"]["judges"].items():
        print(f"  {name}: " + ", ".join(f"{part} {show(x)}" for part, x in parts.items()))
    for name, run in results["secret"]["maximised"].items():
        told = ", ".join(f"{p['kl']['mean']:.1f}: {p['gold']['mean']:.2f}" for p in run["points"])
        print(f"  maximised {name}: KL: gold {told}; length {run['length']['mean']:.1f}")
    print("\nbroken: change against the run as it is")
    for name, p in results["breaks"].items():
        told = "  ".join(f"{k} {show(p['change'][k], 2, '+')}" for k in ("gold", "kl", "length", "eos_rate"))
        print(f"  {name:18} {told}")
