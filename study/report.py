"""One page about a run: curves, tables, answers before and after, and rollouts token by token.

    python -m study.report                                  # out/ -> out/report.html
    python -m study.report --run out/real --out page.html   # any folder that holds sft/, ppo/, ... or some of them

The page is one file that loads nothing, so it can be opened from the disk, sent and kept. report_page.html is its text,
style and script; here is what it shows. What a run doesn't have is left out, and the page says so.
"""

from __future__ import annotations

import copy
import html
import json
import random
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import NamedTuple

import torch

import ppo
from data.batches import encode_prompts
from data.files import read_jsonl, read_prompts
from data.tiny import gold_parts, task_of
from data.tokenizer import Tokenizer
from evaluate import COLUMNS
from lib.checkpoint import Checkpoint, is_published, load_model
from lib.cli import Flags, UserError, check, flag, one_line, run_main
from lib.reward import gold_function, load_reward
from lib.run import finite, write_text
from lib.train import generator_for, pick_device
from model import ScalarModel
from sampling import Rollout, generate
from study.metrics import METRICS, Metric

PAGE = Path(__file__).with_name("report_page.html")


@dataclass
class Config(Flags):
    run: str = flag("out", "folder of the run: sft/, reward_model/, ppo/, grpo/, dpo/, evaluate/, data/, if there")
    out: str = flag("auto", "the page (auto: report.html in the folder of the run)")
    stages: list[str] = flag([], "folders in it to show (none: all)")
    rollouts: int = flag(8, "prompts whose answers are shown (0: none, and no model is loaded)", low=0)
    prompts: str = flag("auto", "prompts for that (auto: RUN/data/prompts_test.jsonl, else _held_out, else prompts)")
    max_new_tokens: int = flag(0, "longest answer, tokens (0: what the run allowed, else 48)", low=0)
    seed: int = flag(1, "seed of the prompts' choice and of the samples", low=0, high=2**63 - 1)
    strict: bool = flag(False, "exit with status 1 if a gate of the run failed")
    device: str = flag("auto", "auto, cpu, cuda or mps")


# -------------------------------------------------------------------------------- what is there


class Stage(NamedTuple):
    """A folder that a training script has written."""

    name: str
    kind: str  # of KINDS
    path: Path
    config: dict
    history: list[dict]  # metrics.jsonl
    results: dict  # results.json; empty while the run isn't finished


# script -> a flag that no other script has
KINDS = {"sft": "init", "reward_model": "expectation", "ppo": "value_lr", "grpo": "group", "dpo": "beta"}
ALIGNED = ("ppo", "grpo", "dpo")
MOST_STAGES = 12


def read_json(path: Path) -> dict:
    """A JSON object; an empty one where there is no such file."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: can't be read ({one_line(error)})") from None
    check(isinstance(found, dict), f"{path}: expected a JSON object")
    return found


def find_stages(run: Path, names: list[str]) -> list[Stage]:
    """The stages in a folder, in the order of the pipeline."""
    for name in names:
        check((run / name / "config.json").exists(), f"--stages {name}: there is no {run / name / 'config.json'}")
    folders = [run / name for name in names] or sorted(path.parent for path in run.glob("*/config.json"))
    stages = []
    for folder in folders:
        config = read_json(folder / "config.json")
        kind = next((kind for kind, only_here in KINDS.items() if only_here in config), "")
        if kind:
            log = folder / "metrics.jsonl"
            history = [row for _, row in read_jsonl(log)] if log.exists() else []
            stages.append(Stage(folder.name, kind, folder, config, history, read_json(folder / "results.json")))
    n = len(stages)
    check(n <= MOST_STAGES, f"{run} holds {n} stages, too many for a page; name up to {MOST_STAGES} with --stages")
    # a folder with its stage's own name comes before its variants: ppo before ppo_no_kl
    return sorted(stages, key=lambda s: (list(KINDS).index(s.kind), s.name != s.kind, s.name))


def locate(path: str, run: Path) -> str:
    """A path from a config.json, which was written in another folder perhaps: as it stands, else by its last part in
    the folder of the run; "" if it is in neither."""
    if Path(path).exists() or is_published(path):
        return path
    last = run / Path(path.replace("\\", "/")).name
    return str(last) if last.exists() else ""


def locate_reward(spec: str, run: Path) -> str:
    """The same for a reward; a file.py:function is found, or not, when it is loaded."""
    return spec if ".py:" in spec else locate(spec, run)


def find_prompts(config: Config, run: Path, stages: list[Stage]) -> str:
    """Those that nothing was trained on if there are any; "" if there are none at all."""
    if config.prompts != "auto":
        return config.prompts
    found = [run / "data" / f"prompts{twin}.jsonl" for twin in ("_test", "_held_out", "")]
    trained_on = [locate(s.config["prompts"], run) for s in stages if s.kind in ("ppo", "grpo")]
    return next((str(path) for path in [*found, *trained_on] if str(path) and Path(path).is_file()), "")


# -------------------------------------------------------------------------------- curves

# Stages that log alike share their charts: which, and what is shown at once. The rest waits behind a button.
GROUPS = {
    "SFT": (("sft",), ("held_out_loss", "loss")),
    "Reward model": (("reward_model",), ("loss", "accuracy")),
    "PPO": (
        ("ppo", "grpo"),
        ("score", "gold", "kl", "entropy", "eos_rate", "distinct", "length", "explained_variance", "clip_fraction"),
    ),
    "DPO": (("dpo",), ("loss", "accuracy", "margin", "chosen_logprob", "rejected_logprob")),
}
MOST_POINTS = 300  # of a curve


def thinned(points: list) -> list:
    """At most MOST_POINTS of them, evenly spaced, the first and the last included."""
    n = len(points)
    if n <= MOST_POINTS:
        return points
    return [points[round(i * (n - 1) / (MOST_POINTS - 1))] for i in range(MOST_POINTS)]


def curve(history: list[dict], name: str) -> list[list[float]]:
    """[[step, value], ...] of a metric, where it was logged as a number."""
    rows = [(row.get("step"), row.get(name)) for row in history]
    numbers = [[step, float(value)] for step, value in rows if isinstance(value, (int, float)) and step is not None]
    return thinned(numbers)


def curves(stages: list[Stage]) -> list[dict]:
    """The charts of each group, those shown at once first."""
    groups = []
    for title, (kinds, main) in GROUPS.items():
        runs = [s for s in stages if s.kind in kinds and s.history]
        logged = {name for s in runs for row in s.history for name in row} - {"step"}
        order = [*main, *(name for name in METRICS if name not in main), *sorted(logged - set(METRICS))]
        charts = []
        for name in order:
            known = [s for s in runs if (s.kind, name) != ("grpo", "explained_variance")]  # 0: it has no value model
            series = [{"run": s.name, "points": points} for s in known if (points := curve(s.history, name))]
            if series:
                metric = METRICS.get(name, Metric(name, "", None, None, ""))
                charts.append({"name": name, "main": name in main, "series": series, **metric._asdict()})
        if charts:
            x = "iteration" if title == "PPO" else "step"
            found = " and ".join(dict.fromkeys(s.kind.upper() for s in runs)) if title == "PPO" else title
            groups.append({"group": title, "title": found, "runs": [s.name for s in runs], "x": x, "charts": charts})
    return groups


# -------------------------------------------------------------------------------- answers and rollouts

# What a token's colour and number may show: field of ppo.Experience -> (title, unit, explanation)
QUANTITIES = {
    "advantages": (
        "advantage",
        "reward",
        "How much better things went from this token on than the value model had expected (GAE). PPO makes tokens "
        "above 0 likelier and tokens below 0 less likely. In training they are first scaled to mean 0 and "
        "variance 1 over an iteration; here they are in units of the reward.",
    ),
    "rewards": (
        "reward",
        "reward",
        "What the token earns at once: minus kl_coef times its KL, and at the last token the score of the whole answer "
        "too, less the penalty if it was cut. Nearly all of it comes at the end; whom to thank for it is what values "
        "and advantages are for.",
    ),
    "values": (
        "value",
        "reward",
        "What the value model expects before the token is written: the sum of the rewards from here to the end.",
    ),
    "kl": (
        "KL",
        "nats",
        "How far the policy is from the reference at this token; their sum is the answer's KL. As the plain estimate "
        "(k1) it is log-prob less reference log-prob: above 0 where training made the token likelier.",
    ),
    "logprobs": (
        "log-prob",
        "nats",
        "The log of the probability that the policy gives the token: 0 is certain, -0.7 is one half, -2.3 one tenth.",
    ),
    "entropy": (
        "entropy",
        "nats",
        "How undecided the policy was before it chose the token: 0 when only one is possible, 0.7 for two equally "
        "likely ones.",
    ),
    "ref_logprobs": ("reference log-prob", "nats", "The log of the probability that the reference gives the token."),
    "returns": ("return", "reward", "Value plus advantage: what the value model is trained to predict here."),
}
NEED_VALUES = ("advantages", "values", "returns")


def write(policy: Checkpoint, texts: list[str], max_new_tokens: int, temperature: float, seed: int) -> Rollout:
    """The policy's answers. The same seed draws the same random numbers for every policy."""
    tokenizer, block_size = policy.tokenizer, policy.model.config.block_size
    n = min(max_new_tokens, block_size - 1)
    ids = encode_prompts(texts, tokenizer, block_size, n, "")
    rng = generator_for(policy.model.device, seed)
    return generate(policy.model, ids, n, eos_id=tokenizer.eos_id, temperature=temperature, generator=rng)


def judge(rollout: Rollout, texts: list[str], tokenizer: Tokenizer, score: Callable | None, gold, task: str) -> dict:
    """What is known of the answers: lists in the order of the prompts; None where nothing judges."""
    completions, ended = [tokenizer.decode(c) for c in rollout.completions()], rollout.ended.tolist()
    right = [gold_parts(p, c)["correct"] > 0 for p, c in zip(texts, completions, strict=True)] if task else None
    return {
        "text": completions,
        "ended": ended,
        "score": score(rollout, texts, completions).tolist() if score else None,
        "gold": gold(texts, completions, ended) if gold else None,
        "right": right,
    }


def token_figures(experience: ppo.Experience, tokenizer: Tokenizer, names: list[str]) -> list[dict]:
    """Of each rollout the tokens that were sampled and, in the same order, their figures."""
    rows = []
    for row, slots in enumerate(experience.action_mask):  # (T-1,)
        at = slots.nonzero().squeeze(1)  # (n,) the actions
        ids = experience.tokens[row, at + 1].tolist()
        found = {name: getattr(experience, name)[row, at].tolist() for name in names}
        rounded = {name: [round(x, 4) for x in column] for name, column in found.items()}
        rows.append({"tokens": [tokenizer.decode([i]) for i in ids], "figures": rounded})
        rows[-1]["eos"] = bool(experience.ended[row])
    return rows


def final_value_model(stage: Stage, initial: ScalarModel, config: ppo.Config) -> ScalarModel:
    """The value model at the end of a run, out of its state.pt."""
    file = stage.path / "state.pt"
    check(file.exists(), f"no values and advantages: {file} is gone, and with it the value model")
    try:
        # mmap: of the whole state, the optimiser's moments too, no more is read than is used
        state = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
        check(state["step"] == config.iterations, f"no values and advantages: {file} is not that of the finished run")
        model = copy.deepcopy(initial)
        model.load_state_dict(state["value_model"])
        return model.eval()
    except UserError:
        raise
    except Exception as error:  # torch raises many kinds for a damaged file
        raise UserError(f"no values and advantages: {file} can't be used ({one_line(error)})") from None


def run_config(stage: Stage, device: torch.device) -> ppo.Config:
    """A PPO run's settings, for measuring as it did, but in float32 and in units of the reward."""
    known = {f.name for f in fields(ppo.Config)}
    config = ppo.Config(**{k: v for k, v in stage.config.items() if k in known})
    return replace(config, dtype="float32", whiten_advantages=False, train_layers=0, device=str(device))


class Answers(NamedTuple):
    """The part of the page that needs the models."""

    samples: dict
    tokens: dict


def measure_answers(config: Config, run: Path, stages: list[Stage], notes: list[str]) -> Answers:
    """Let every policy answer the same prompts, and look at PPO's rollouts token by token. What is missing goes to
    notes."""
    nothing = Answers({}, {})
    aligned = [s for s in stages if s.kind in ALIGNED]
    policies = {s.name: str(s.path) for s in stages if s.kind in ("sft", *ALIGNED) and (s.path / "model.pt").exists()}
    start = locate(aligned[0].config["policy"], run) if aligned else next(iter(policies.values()), "")
    same = [name for name, path in policies.items() if Path(path).resolve() == Path(start).resolve()]
    first = same[0] if same else Path(start).name
    if start:
        policies = {first: start} | policies
    elif aligned:
        notes.append(f"no answers of the policy that training started from: {aligned[0].config['policy']} is gone")
    path = find_prompts(config, run, stages)
    if not policies or not path:
        notes.append("no answers: there is " + ("no policy" if path else "no file of prompts; name one with --prompts"))
        return nothing

    device, task = pick_device(config.device), task_of(path)
    everything = read_prompts(path)
    texts = random.Random(config.seed).sample(everything, min(config.rollouts, len(everything)))
    practised = [s for s in aligned if s.kind != "dpo"]
    judged_by = practised[0].config if practised else {}
    temperature = judged_by.get("temperature", 1.0)
    longest = config.max_new_tokens or (aligned[0].config.get("max_new_tokens", 48) if aligned else 48)
    loaded = {first: load_model(policies[first], device)} if start else {}
    score, reward_models, gold = None, [], None
    try:
        gold = gold_function(judged_by.get("gold", "auto"), task)
        specs = [locate_reward(spec, run) for spec in judged_by.get("reward", [])]
        specs = specs or [str(s.path) for s in stages if s.kind == "reward_model"][:1]
        check(all(specs), f"no scores: of --reward {' '.join(judged_by.get('reward', []))} not all are there")
        mix = {"weights": judged_by.get("reward_weights"), "combine": judged_by.get("reward_combine", "sum")}
        if specs and loaded:
            score, reward_models = load_reward(specs, loaded[first], task, device, **mix)
    except UserError as error:
        notes.append(str(error))

    greedy, sampled, tokens = {}, {}, {}
    run_of = next((s for s in stages if s.kind == "ppo"), None)
    for name, policy_path in policies.items():
        policy = loaded.get(name) or load_model(policy_path, device)
        tokenizer = policy.tokenizer
        for kept, t in ((greedy, 0.0), (sampled, temperature)):
            rollout = write(policy, texts, longest, t, config.seed)
            kept[name] = judge(rollout, texts, tokenizer, score, gold, task)
        if run_of and name == run_of.name and loaded and score:
            again = write(loaded[first], texts, longest, temperature, config.seed)
            before_after = [(loaded[first], again, sampled[first]), (policy, rollout, sampled[name])]
            tokens = measure_tokens(run_of, first, before_after, reward_models, device, notes)
    if run_of is None:
        notes.append("no rollouts token by token: there is no run of ppo.py")
    elif not tokens:
        notes.append("no rollouts token by token: they need the reference, the trained policy and the reward")
    return Answers(
        {
            "prompts": [{"text": text, "turns": list(getattr(text, "turns", ()))} for text in texts],
            "policies": list(policies),
            "temperature": temperature,
            "greedy": greedy,
            "sampled": sampled,
            "file": Path(path).name,
        },
        tokens,
    )


def measure_tokens(stage: Stage, first: str, before_after: list, reward_models: list, device, notes) -> dict:
    """The rollouts of a PPO run as ppo.make_experience sees them: before the first iteration, by the reference and the
    value model that training began with, and after the last one. before_after: (policy, rollout, judged) of both."""
    config = run_config(stage, device)
    reference = before_after[0][0].model
    value_models: list[ScalarModel | None] = [None, None]
    try:
        initial = ppo.initial_value_model(reference, reward_models, config).eval()
        value_models = [initial, final_value_model(stage, initial, config)]
    except UserError as error:
        notes.append(str(error))
    names = [name for name in QUANTITIES if value_models[0] is not None or name not in NEED_VALUES]
    kl_coef = stage.history[-1].get("kl_coef", config.kl_coef) if stage.history else config.kl_coef
    passes = []
    for (policy, rollout, judged), value_model in zip(before_after, value_models, strict=True):
        scores = torch.tensor(judged["score"], device=device) - config.eos_penalty * (~rollout.ended)  # (B,)
        experience = ppo.make_experience(policy.model, reference, value_model, rollout, scores, kl_coef, config)
        rows = token_figures(experience, policy.tokenizer, names)
        passes.append([{**row, "score": round(s, 4)} for row, s in zip(rows, scores.tolist(), strict=True)])
    quantities = [dict(zip(("title", "unit", "note"), QUANTITIES[name], strict=True), name=name) for name in names]
    return {
        "before": first,
        "after": stage.name,
        "from_reward_model": len(reward_models) == len(config.reward),
        "quantities": quantities,
        "kl_coef": kl_coef,
        "kl": config.kl,
        "rows": [list(pair) for pair in zip(*passes, strict=True)],
    }


# -------------------------------------------------------------------------------- tables


class Cell(NamedTuple):
    text: str
    style: str = ""


def table(head: list[tuple[str, str]], rows: list[list[str | Cell]]) -> str:
    """head: (title, explanation or ""). The first cell of a row is its name."""
    styles = ["", *(cell.style if isinstance(cell, Cell) else "" for cell in rows[0][1:])]
    titles = []
    for (title, note), style in zip(head, styles, strict=True):
        asked = f'<button type="button" class="ask" data-note="{html.escape(note)}">{html.escape(title)}</button>'
        style = "text" if style == "text" else ""  # titles stand as their columns do
        titles.append(f'<th scope="col" class="{style}">{asked if note else html.escape(title)}</th>')
    body = []
    for name, *cells in rows:
        cells = [cell if isinstance(cell, Cell) else Cell(cell) for cell in cells]
        shown = "".join(f'<td class="{cell.style}">{html.escape(cell.text)}</td>' for cell in cells)
        body.append(f'<tr><th scope="row">{html.escape(name)}</th>{shown}</tr>')
    head_row, lines = "".join(titles), "\n".join(body)
    return f'<div class="wide"><table><thead><tr>{head_row}</tr></thead><tbody>\n{lines}\n</tbody></table></div>'


def glossary(entries: list[tuple[str, str]]) -> str:
    lines = "".join(f"<dt>{html.escape(title)}</dt><dd>{html.escape(note)}</dd>" for title, note in entries)
    return f"<details><summary>What the columns say</summary><dl>{lines}</dl></details>"


NOTES = {  # of evaluate.COLUMNS
    "gold": "Mean true reward of one sampled answer to each prompt. Training never sees it.",
    "gold_se": "The standard error of that mean: twice this much may be chance.",
    "rm": "The reward model's opinion of the same answers. A normalised one gives the SFT policy a mean of 0 and a "
    "standard deviation of 1.",
    "kl": "How far the policy has moved from the first one, in nats a sequence. Best of n has an upper bound only.",
    "win_rate": "How often the answer is better than the first policy's to the same prompt, ties as half; in brackets "
    "the 95% interval.",
    "rm_win_rate": "The same, as the reward model judges. Higher than the truth is usual: it was trained against.",
    "eos_rate": "Share of answers that end by themselves.",
    "length": "Tokens an answer.",
    "distinct": "Share of different answers. A low one means the same answer to everything.",
    "headroom_closed": "How far from the first policy's true reward to the best possible one: 100% can't be beaten.",
    "correct": "Share of right answers among the samples.",
    "correct_greedy": "Share of right answers when the likeliest token is taken every time: what the policy knows.",
    "loss": "Loss on human-written answers, nats a token: what alignment has cost elsewhere.",
}
PART_NOTES = {
    "correct": "2 for a right answer",
    "polite": "1 if polite, -1 if rude",
    "to_the_point": "-0.2 for each word too many",
    "ended": "-1 unless the text is finished",
    "not_repeated": "-1 if a sentence occurs twice",
}


def written(figures: dict, shown: list) -> list[str | Cell]:
    """A row's cells, "-" where a figure is missing."""
    cells = {key: template.format(figures[key]) for key, _, template in shown if figures.get(key) is not None}
    for key in ("win", "rm_win"):
        if f"{key}_rate" in cells:
            interval = f"[{figures[f'{key}_low']:.3f},\u00a0{figures[f'{key}_high']:.3f}]"
            cells[f"{key}_rate"] = Cell(f"{cells[f'{key}_rate']}\n{interval}", "lines")
    if "kl_bound" in figures:
        cells["kl"] = f"≤ {figures['kl_bound']:.2f}"
    return [cells.get(key, "–") for key, _, _ in shown]


def comparison(evaluation: dict) -> str:
    """evaluate.py's table, what the true reward is made of, and how good the reward model is."""
    policies = evaluation.get("policies", {})
    if not policies:
        return '<p class="missing">evaluate.py has not been run, so nothing is compared here.</p>'
    shown = [c for c in COLUMNS if any(p.get(c[0]) is not None for p in policies.values())]
    rows = [[name, *written(figures, shown)] for name, figures in policies.items()]
    rows += [[f"best of {n}", *written(figures, shown)] for n, figures in evaluation.get("best_of_n", {}).items()]
    notes = [(title, NOTES.get(key, "")) for key, title, _ in shown]
    if evaluation.get("best_of_n"):
        note = "Sample n answers of the first policy and keep the one that the reward model likes best: no training at "
        notes.append(("best of n", note + "all, and n times the work. It is the yardstick for the trained policies."))
    parts = table([("policy", ""), *notes[: len(shown)]], rows) + glossary(notes)
    if evaluation.get("ceiling") is not None:
        parts += f"<p>The best possible true reward is {evaluation['ceiling']:.2f}.</p>"
    split = {name: figures["parts"] for name, figures in policies.items() if figures.get("parts")}
    if split:
        names = list(next(iter(split.values())))
        head = [("policy", ""), *((name.replace("_", " "), PART_NOTES.get(name, "")) for name in names)]
        body = [[policy, *(f"{figures[name]:+.2f}" for name in names)] for policy, figures in split.items()]
        parts += f"<h3>What the true reward is made of</h3>{table(head, body)}"
    judge_figures = {k: v for k, v in evaluation.get("reward_model", {}).items() if isinstance(v, (int, float))}
    if judge_figures:
        head = [("reward model, on held-out rankings", ""), ("share of pairs it gets right", "")]
        right = {k: v for k, v in judge_figures.items() if k.startswith(("accuracy", "bayes", "length_alone"))}
        right = {k: v for k, v in right.items() if k != "accuracy_se"} | {
            k: v for k, v in judge_figures.items() if "_vs_" in k
        }
        titles = {"bayes_accuracy": "the most that the annotators' noise allows", "length_alone": "by length alone"}
        body = [[titles.get(k, k.replace("_", " ")), f"{v:.2f}"] for k, v in right.items()]
        parts += f"<h3>How good the reward model is</h3>{table(head, body)}"
    return parts


def usual(gate: dict) -> str:
    """Its range, in words."""
    low, high = gate.get("low"), gate.get("high")
    if low is None or high is None:
        return f"at least {low:g}" if low is not None else f"at most {high:g}" if high is not None else "any"
    return f"{low:g} to {high:g}"


def value_of(gate: dict) -> str:
    return "nan" if gate["value"] is None else f"{gate['value']:.3f}"


def find_gates(stages: list[Stage], evaluation: dict) -> list[tuple[str, dict]]:
    """Every gate of the run, with the stage that it belongs to."""
    found = [(s.name, gate) for s in stages for gate in s.results.get("gates", [])]
    return found + [("evaluate", gate) for gate in evaluation.get("gates", [])]


def print_verdict(found: list[tuple[str, dict]]) -> None:
    """Which gates failed, and what that means."""
    failed = [(stage, gate) for stage, gate in found if not gate["ok"]]
    if not failed:
        print(f"all {len(found)} gates OK")
        return
    print(f"{len(failed)} of {len(found)} gates FAILED:")
    for stage, gate in failed:
        print(f"  {stage}: {gate['name']} {value_of(gate)}, usually {usual(gate)}")
    print("A gate compares a figure with its range in earlier runs. Just outside, it is most likely chance: another")
    print("seed or another CPU. Far outside, look at that stage first: what follows stands on it.")


def gates(found: list[tuple[str, dict]]) -> str:
    if not found:
        text = "No stage has gates: they belong to the embedded task, and data of your own has only the figures."
        return f'<p class="missing">{text}</p>'
    rows = []
    for name, gate in found:
        verdict = Cell("OK", "ok") if gate["ok"] else Cell("FAILED", "failed")
        rows.append([name, Cell(gate["name"], "text"), value_of(gate), usual(gate), verdict])
    return table([("stage", ""), ("gate", ""), ("figure", ""), ("usual range", ""), ("verdict", "")], rows)


def headline(evaluation: dict, stages: list[Stage]) -> str:
    """The result in a sentence or two."""
    policies = evaluation.get("policies", {})
    first = next(iter(policies), "")
    won = {name: f for name, f in policies.items() if f.get("win_rate") is not None}
    if won:
        truth = any(f.get("gold") is not None for f in won.values())
        shares = [f"{name} {f['win_rate']:.0%} ({f['win_low']:.0%} to {f['win_high']:.0%})" for name, f in won.items()]
        judge = "the true reward" if truth else "the reward model"
        text = f"How often {judge} likes an answer better than that of {first}, with 95% interval: {', '.join(shares)}."
        right = [f"{name} {f['correct']:.0%}" for name, f in policies.items() if f.get("correct") is not None]
        text += f" Right answers: {', '.join(right)}." if right else ""
        moved = [f"{name} {f['kl']:.1f}" for name, f in won.items() if f.get("kl") is not None]
        return text + (f" Distance from {first} in nats: {', '.join(moved)}." if moved else "")
    for stage in stages:
        rows = [row for row in stage.history if isinstance(row.get("score"), (int, float))]
        if rows:
            a, b = rows[0], rows[-1]
            moved = f" at a KL of {b['kl']:.1f} nats a sequence" if "kl" in b else ""
            return f"{stage.name} took the mean score from {a['score']:.2f} to {b['score']:.2f}{moved}."
    return f"So far there is: {', '.join(s.name for s in stages)}." if stages else ""


def summary(stages: list[Stage]) -> str:
    """Each stage: what it was made from, seed, steps, time; and all its settings, folded away."""
    if not stages:
        return ""
    rows, settings = [], []
    for s in stages:
        source = next((str(s.config[k]) for k in ("data", "prompts") if k in s.config), "–")
        seconds = s.results.get("seconds")
        steps = max((row.get("step", 0) for row in s.history), default=0)
        ended = s.path / "results.json"
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(ended.stat().st_mtime)) if s.results else "not finished"
        seed = str(s.config.get("seed", "–"))
        lasted = "–" if seconds is None else f"{seconds:.0f} s"
        rows.append([s.name, f"{s.kind}.py", Cell(source, "text"), seed, f"{steps:,}", lasted, when])
        shown = "".join(
            f"<dt>{html.escape(k)}</dt><dd>{html.escape(' '.join(map(str, v)) if isinstance(v, list) else str(v))}</dd>"
            for k, v in s.config.items()
        )
        settings.append(f"<details><summary>{html.escape(s.name)}</summary><dl>{shown}</dl></details>")
    titles = ("stage", "script", "learned from", "seed", "steps", "time", "finished")
    folded = f"<details><summary>All settings</summary>{''.join(settings)}</details>"
    return table([(title, "") for title in titles], rows) + folded


# -------------------------------------------------------------------------------- the page


def as_json(content: dict) -> str:
    """JSON that may stand within <script>: no text in it, however hostile, can end the block or open a comment, since
    it holds no <, and ensure_ascii writes U+2028 and its like as escapes."""
    text = json.dumps(finite(content), ensure_ascii=True, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def fill(page: str, parts: dict[str, str]) -> str:
    """Put the parts in the places of their {{name}}, all at once: what stands in a part is no place."""
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found.group(1)], page)


def write_page(text: str, out: Path) -> None:
    try:
        write_text(text, out)
    except OSError as error:
        raise UserError(f"--out {out}: can't be written ({error.strerror})") from None


def run(config: Config) -> dict:
    folder = Path(config.run)
    out = folder / "report.html" if config.out == "auto" else Path(config.out)
    stages = find_stages(folder, config.stages)
    evaluation = read_json(folder / "evaluate" / "results.json")
    there = bool(stages or evaluation.get("policies"))
    check(there, f"{folder}: holds no run; `make demo` makes one in out/, and --run names another folder")
    check(not out.is_dir(), f"--out {out} is a folder; name a file")
    notes = [f"no {kind}: {kind}.py has not been run here" for kind in KINDS if kind not in {s.kind for s in stages}]
    notes += [f"{s.name} is not finished" for s in stages if not s.results]
    samples, tokens = measure_answers(config, folder, stages, notes) if config.rollouts else ({}, {})
    found = find_gates(stages, evaluation)
    shown = {"curves": curves(stages), "samples": samples, "tokens": tokens}
    parts = {
        "title": html.escape(str(config.run)),
        "headline": html.escape(headline(evaluation, stages)),
        "summary": summary(stages),
        "comparison": comparison(evaluation),
        "gates": gates(found),
        "notes": "".join(f"<li>{html.escape(note)}</li>" for note in notes),
        "data": as_json(shown),
    }
    text = fill(PAGE.read_text(encoding="utf-8"), parts)
    write_page(text, out)
    print(f"{out}: the report, {len(text.encode()) / 1e6:.2f} MB; open it in a browser")
    if found:
        print_verdict(found)
    return {"out": str(out), "notes": notes, "gates": [gate for _, gate in found]}


def main() -> None:
    run_main(run, Config, __doc__)


if __name__ == "__main__":
    main()
