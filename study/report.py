"""Makes one page about a run: curves, tables, answers before and after training, and rollouts token by token.

    python -m study.report                                  # out/ -> out/report.html
    python -m study.report --run out/real --out page.html   # any folder that holds some of sft/, ppo/, ...

The page is one file that loads nothing, so it can be opened from the disk, sent and kept. report_page.html holds its
text, style and script; this file puts the figures in. The page leaves out what the run doesn't have, and says so.
"""

from __future__ import annotations

import copy
import html
import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import NamedTuple

import torch

import ppo
from data.batches import encode_prompts
from data.files import read_json, read_jsonl, read_prompts, replacing
from data.tiny import gold_parts, task_of
from data.tokenizer import Tokenizer
from evaluate import COLUMNS
from lib.checkpoint import Checkpoint, is_published, load_file, load_model
from lib.cli import Flags, UserError, check, flag, run_main
from lib.reward import gold_function, load_reward
from lib.run import bounds, finite
from lib.train import generator_for, pick_device
from model import ScalarModel
from sampling import Rollout, generate
from study.metrics import METRICS, Metric

PAGE = Path(__file__).with_name("report_page.html")


@dataclass
class Config(Flags):
    run: str = flag("out", "folder of the run, with some of sft/, reward_model/, ppo/, grpo/, dpo/, evaluate/, data/")
    out: str = flag("auto", "page to write (auto: report.html in the folder of the run)")
    stages: list[str] = flag([], "stages to show, by their folders (none: all)")
    rollouts: int = flag(8, "prompts whose answers are shown (0: none, and no model is loaded)", low=0)
    prompts: str = flag("auto", "file of these prompts (auto: RUN/data/prompts_test, else _held_out, else prompts)")
    max_new_tokens: int = flag(0, "longest answer, tokens (0: what the run allowed, else 48)", low=0)
    seed: int = flag(1, "seed of the prompts' choice and of the samples", low=0, high=2**63 - 1)
    strict: bool = flag(False, "exit with status 1 if a gate of the run failed")
    device: str = flag("auto", "auto, cpu, cuda or mps")


# -------------------------------------------------------------------------------- the files of the run


class Stage(NamedTuple):
    """A folder that a training script has written."""

    name: str
    kind: str  # of KINDS
    path: Path
    config: dict
    history: list[dict]  # metrics.jsonl
    results: dict  # results.json; empty while the run isn't finished


# {script: a flag that no other script has}
KINDS = {"sft": "init", "reward_model": "expectation", "ppo": "value_lr", "grpo": "group", "dpo": "beta"}
ALIGNED = ("ppo", "grpo", "dpo")
MOST_STAGES = 12


def results_in(folder: Path) -> dict:
    """What results.json says; {} if there is none."""
    file = folder / "results.json"
    return read_json(file) if file.exists() else {}


def find_stages(run: Path, names: list[str]) -> list[Stage]:
    """The stages in the folder of a run, in the order of the pipeline. names: only these (empty: all)."""
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
            stages.append(Stage(folder.name, kind, folder, config, history, results_in(folder)))
    n = len(stages)
    check(n <= MOST_STAGES, f"{run} holds {n} stages, too many for a page; name up to {MOST_STAGES} with --stages")
    # a folder with the name of its kind comes before its variants: ppo before ppo_no_kl
    return sorted(stages, key=lambda s: (list(KINDS).index(s.kind), s.name != s.kind, s.name))


def locate(path: str, run: Path) -> str:
    """Find what a path in a config.json names, although the run may have been moved: at that path, or under the path's
    last part in the folder of the run. "" if it is in neither place."""
    if Path(path).exists() or is_published(path):
        return path
    last = run / Path(path.replace("\\", "/")).name
    return str(last) if last.exists() else ""


def find_prompts(config: Config, run: Path, stages: list[Stage]) -> str:
    """The file of prompts to answer: one that nothing was trained on, if there is one. "" if there is none at all."""
    if config.prompts != "auto":
        return config.prompts
    found = [run / "data" / f"prompts{twin}.jsonl" for twin in ("_test", "_held_out", "")]
    trained_on = [locate(s.config["prompts"], run) for s in stages if s.kind in ("ppo", "grpo")]
    return next((str(path) for path in [*found, *trained_on] if str(path) and Path(path).is_file()), "")


# -------------------------------------------------------------------------------- curves

# Stages that log the same metrics share their charts. {title: (kinds of stages, metrics that are shown at once)}; the
# other metrics are folded away.
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
    """At most MOST_POINTS of the points, evenly spaced, with the first and the last."""
    n = len(points)
    if n <= MOST_POINTS:
        return points
    return [points[round(i * (n - 1) / (MOST_POINTS - 1))] for i in range(MOST_POINTS)]


def curve(history: list[dict], name: str) -> list[list[float]]:
    """[[step, value], ...] of a metric, wherever it was logged as a number."""
    rows = [(row.get("step"), row.get(name)) for row in history]
    numbers = [[step, float(value)] for step, value in rows if isinstance(value, (int, float)) and step is not None]
    return thinned(numbers)


def curves(stages: list[Stage]) -> list[dict]:
    """The charts of each group. Those that are shown at once come first."""
    groups = []
    for title, (kinds, main) in GROUPS.items():
        runs = [s for s in stages if s.kind in kinds and s.history]
        logged = {name for s in runs for row in s.history for name in row} - {"step"}
        order = [*main, *(name for name in METRICS if name not in main), *sorted(logged - set(METRICS))]
        charts = []
        for name in order:
            # GRPO has no value model: the 0 that it logs explains nothing
            known = [s for s in runs if (s.kind, name) != ("grpo", "explained_variance")]
            series = [{"run": s.name, "points": points} for s in known if (points := curve(s.history, name))]
            if series:
                metric = METRICS.get(name, Metric(name))
                charts.append({"name": name, "main": name in main, "series": series, **metric._asdict()})
        if charts:
            x = "iteration" if title == "PPO" else "step"
            found = " and ".join(dict.fromkeys(s.kind.upper() for s in runs)) if title == "PPO" else title
            groups.append({"group": title, "title": found, "runs": [s.name for s in runs], "x": x, "charts": charts})
    return groups


# -------------------------------------------------------------------------------- answers and rollouts

# What a token's colour and number may show: fields of ppo.Experience. The page has their titles and explanations.
QUANTITIES = ("advantages", "rewards", "values", "kl", "logprobs", "entropy", "ref_logprobs", "returns")
NEED_VALUES = ("advantages", "values", "returns")


class Judges(NamedTuple):
    """What judges the answers."""

    score: Callable | None  # the reward of the run
    reward_models: list[ScalarModel]  # the reward models in it
    gold: Callable | None  # the true reward
    task: str  # "tiny" for the embedded task, which knows the right answers


def answer(policy: Checkpoint, texts: list[str], max_new_tokens: int, temperature: float, seed: int) -> Rollout:
    """The policy's answers. The same seed draws the same random numbers for every policy."""
    tokenizer, block_size = policy.tokenizer, policy.model.config.block_size
    n = min(max_new_tokens, block_size - 1)
    ids = encode_prompts(texts, tokenizer, block_size, n, "")
    rng = generator_for(policy.model.device, seed)
    return generate(policy.model, ids, n, eos_id=tokenizer.eos_id, temperature=temperature, generator=rng)


def judge(judges: Judges, rollout: Rollout, texts: list[str], tokenizer: Tokenizer) -> dict:
    """The answers and their judgements: lists in the order of the prompts, or None where nothing judges."""
    completions, ended = [tokenizer.decode(c) for c in rollout.completions()], rollout.ended.tolist()
    pairs, score, gold = list(zip(texts, completions, strict=True)), judges.score, judges.gold
    return {
        "text": completions,
        "ended": ended,
        "score": score(rollout, texts, completions).tolist() if score else None,
        "gold": gold(texts, completions, ended) if gold else None,
        "right": [gold_parts(*pair)["correct"] > 0 for pair in pairs] if judges.task else None,
    }


def token_figures(experience: ppo.Experience, tokenizer: Tokenizer, names: list[str]) -> list[dict]:
    """The sampled tokens of each rollout and, in the same order, their figures."""
    rows = []
    for row, actions in enumerate(experience.action_mask):  # (T-1,)
        at = actions.nonzero().squeeze(1)  # (n,) places of the actions
        ids = experience.tokens[row, at + 1].tolist()
        found = {name: getattr(experience, name)[row, at].tolist() for name in names}
        rounded = {name: [round(x, 4) for x in column] for name, column in found.items()}
        tokens, eos = [tokenizer.decode([i]) for i in ids], bool(experience.ended[row])
        rows.append({"tokens": tokens, "figures": rounded, "eos": eos})
    return rows


def final_value_model(stage: Stage, initial: ScalarModel, config: ppo.Config) -> ScalarModel:
    """The value model at the end of a run, from its state.pt. UserError if it is not there."""
    file = stage.path / "state.pt"
    state = load_file(file)
    check(state["step"] == config.iterations, f"no values and advantages: {file} is not that of the finished run")
    model = copy.deepcopy(initial)
    model.load_state_dict(state["value_model"])
    return model.eval()


def run_config(stage: Stage, device: torch.device) -> ppo.Config:
    """The settings of a PPO run, to measure as it did, but in float32 and with advantages in units of the reward."""
    known = {f.name for f in fields(ppo.Config)}
    config = ppo.Config(**{k: v for k, v in stage.config.items() if k in known})
    return replace(config, dtype="float32", whiten_advantages=False, train_layers=0, device=str(device))


def find_judges(run: Path, stages: list[Stage], start: Checkpoint | None, task: str, notes: list[str]) -> Judges:
    """The judges of a run: the reward and the gold reward of its first PPO or GRPO stage, else its reward model. start:
    the policy that training started from. What is missing goes to notes."""
    trained = [s for s in stages if s.kind in ("ppo", "grpo")]
    flags = trained[0].config if trained else {}
    named = flags.get("reward", [])
    score, reward_models, gold = None, [], None
    try:
        gold = gold_function(flags.get("gold", "auto"), task)
        specs = [spec if ".py:" in spec else locate(spec, run) for spec in named]
        specs = specs or [str(s.path) for s in stages if s.kind == "reward_model"][:1]
        check(all(specs), f"no scores: of --reward {' '.join(named)} not all are there")
        if specs and start:
            mix = {"weights": flags.get("reward_weights"), "combine": flags.get("reward_combine", "sum")}
            score, reward_models = load_reward(specs, start, task, start.model.device, **mix)
    except UserError as error:
        notes.append(str(error))
    return Judges(score, reward_models, gold, task)


def measure_answers(config: Config, run: Path, stages: list[Stage], notes: list[str]) -> tuple[dict, dict]:
    """Let every policy answer the same prompts -> (the answers, PPO's rollouts token by token), as the page shows them.
    What is missing goes to notes."""
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
        return {}, {}

    everything = read_prompts(path)
    texts = random.Random(config.seed).sample(everything, min(config.rollouts, len(everything)))
    temperature = next((s.config.get("temperature", 1.0) for s in aligned if s.kind != "dpo"), 1.0)
    longest = config.max_new_tokens or (aligned[0].config.get("max_new_tokens", 48) if aligned else 48)
    device = pick_device(config.device)
    reference = load_model(policies[first], device) if start else None
    judges = find_judges(run, stages, reference, task_of(path), notes)

    greedy, sampled, rollouts = {}, {}, {}
    ppo_stage = next((s for s in stages if s.kind == "ppo"), None)
    tokens: dict = {}
    for name, policy_path in policies.items():
        policy = reference if reference and name == first else load_model(policy_path, device)
        for judged, t in ((greedy, 0.0), (sampled, temperature)):
            rollouts[name] = answer(policy, texts, longest, t, config.seed)
            judged[name] = judge(judges, rollouts[name], texts, policy.tokenizer)
        if ppo_stage and name == ppo_stage.name and reference and judges.score:
            passes = [(p.model, rollouts[n], sampled[n]["score"]) for p, n in ((reference, first), (policy, name))]
            tokens = measure_tokens(ppo_stage, passes, judges.reward_models, policy.tokenizer, notes)
            tokens["before"] = first
    if ppo_stage is None:
        notes.append("no rollouts token by token: there is no run of ppo.py")
    elif not tokens:
        notes.append("no rollouts token by token: they need the reference, the trained policy and the reward")
    samples = {
        "prompts": [{"text": text, "turns": list(getattr(text, "turns", ()))} for text in texts],
        "policies": list(policies),
        "temperature": temperature,
        "greedy": greedy,
        "sampled": sampled,
    }
    return samples, tokens


def measure_tokens(stage: Stage, passes: list, reward_models: list, tokenizer: Tokenizer, notes: list[str]) -> dict:
    """The rollouts of a PPO run as ppo.make_experience sees them: before the first iteration, by the reference and the
    value model that training began with, and after the last one. passes: (policy, rollout, scores) of both."""
    reference = passes[0][0]
    config = run_config(stage, reference.device)
    value_models: list[ScalarModel | None] = [None, None]
    try:
        initial = ppo.initial_value_model(reference, reward_models, config).eval()
        value_models = [initial, final_value_model(stage, initial, config)]
    except UserError as error:
        notes.append(str(error))
    names = [name for name in QUANTITIES if value_models[0] is not None or name not in NEED_VALUES]
    kl_coef = stage.history[-1].get("kl_coef", config.kl_coef) if stage.history else config.kl_coef
    measured = []
    for (policy, rollout, scores), value_model in zip(passes, value_models, strict=True):
        scores = torch.tensor(scores, device=reference.device) - config.eos_penalty * (~rollout.ended)  # (B,)
        experience = ppo.make_experience(policy, reference, value_model, rollout, scores, kl_coef, config)
        rows = token_figures(experience, tokenizer, names)
        measured.append([{**row, "score": round(s, 4)} for row, s in zip(rows, scores.tolist(), strict=True)])
    return {
        "after": stage.name,
        "from_reward_model": len(reward_models) == len(config.reward),
        "quantities": names,
        "kl_coef": kl_coef,
        "kl": config.kl,
        "rows": [list(pair) for pair in zip(*measured, strict=True)],
    }


# -------------------------------------------------------------------------------- tables


class Cell(NamedTuple):
    text: str
    style: str = ""


def table(head: list[str], rows: list[list[str | Cell]]) -> str:
    """An HTML table with these titles. The first cell of a row is its name."""
    styles = ["", *(cell.style if isinstance(cell, Cell) else "" for cell in rows[0][1:])]
    titles = []
    for title, style in zip(head, styles, strict=True):
        style = "text" if style == "text" else ""  # a title is aligned as its column
        titles.append(f'<th scope="col" class="{style}">{html.escape(title)}</th>')
    body = []
    for name, *cells in rows:
        cells = [cell if isinstance(cell, Cell) else Cell(cell) for cell in cells]
        shown = "".join(f'<td class="{cell.style}">{html.escape(cell.text)}</td>' for cell in cells)
        body.append(f'<tr><th scope="row">{html.escape(name)}</th>{shown}</tr>')
    head_row, lines = "".join(titles), "\n".join(body)
    return f'<div class="wide"><table><thead><tr>{head_row}</tr></thead><tbody>\n{lines}\n</tbody></table></div>'


def written(figures: dict, shown: list) -> list[str | Cell]:
    """The cells of a row; "–" where a figure is missing. shown: some of evaluate.COLUMNS."""
    cells = {key: template.format(figures[key]) for key, _, template in shown if figures.get(key) is not None}
    for key in ("win", "rm_win"):
        if f"{key}_rate" in cells:
            interval = f"[{figures[f'{key}_low']:.3f},\u00a0{figures[f'{key}_high']:.3f}]"
            cells[f"{key}_rate"] = Cell(f"{cells[f'{key}_rate']}\n{interval}", "lines")
    if "kl_bound" in figures:
        cells["kl"] = f"≤ {figures['kl_bound']:.2f}"
    return [cells.get(key, "–") for key, _, _ in shown]


def comparison(evaluation: dict) -> str:
    """evaluate.py's table, the parts of the true reward, and how good the reward model is."""
    policies = evaluation.get("policies", {})
    if not policies:
        return '<p class="missing">evaluate.py has not been run, so nothing is compared here.</p>'
    shown = [c for c in COLUMNS if any(p.get(c[0]) is not None for p in policies.values())]
    rows = [[name, *written(figures, shown)] for name, figures in policies.items()]
    rows += [[f"best of {n}", *written(figures, shown)] for n, figures in evaluation.get("best_of_n", {}).items()]
    parts = table(["policy", *(title for _, title, _ in shown)], rows)
    if evaluation.get("best_of_n"):
        parts += (
            "<p>Best of n: sample n answers of the first policy and keep the one that the reward model likes best. "
            "This takes no training, and n times the work. It is the yardstick for the trained policies.</p>"
        )
    if evaluation.get("ceiling") is not None:
        parts += f"<p>The best possible true reward is {evaluation['ceiling']:.2f}.</p>"
    split = {name: figures["parts"] for name, figures in policies.items() if figures.get("parts")}
    if split:
        names = list(next(iter(split.values())))
        head = ["policy", *(name.replace("_", " ") for name in names)]
        body = [[policy, *(f"{figures[name]:+.2f}" for name in names)] for policy, figures in split.items()]
        parts += f"<h3>What the true reward is made of</h3>{table(head, body)}"
    shares = {k: v for k, v in evaluation.get("reward_model", {}).items() if isinstance(v, (int, float))}
    if shares:
        head = ["reward model, on held-out rankings", "share of pairs it gets right"]
        titles = {"bayes_accuracy": "the most that the annotators' noise allows", "length_alone": "by length alone"}
        known = [k for k in shares if k.startswith("accuracy") or k in titles or "_vs_" in k]
        body = [[titles.get(k, k.replace("_", " ")), f"{shares[k]:.2f}"] for k in known if k != "accuracy_se"]
        parts += f"<h3>How good the reward model is</h3>{table(head, body)}"
    return parts


def value_of(gate: dict) -> str:
    return "nan" if gate["value"] is None else f"{gate['value']:.3f}"


def find_gates(stages: list[Stage], evaluation: dict) -> list[tuple[str, dict]]:
    """Every gate of the run: (stage, gate)."""
    found = [(s.name, gate) for s in stages for gate in s.results.get("gates", [])]
    return found + [("evaluate", gate) for gate in evaluation.get("gates", [])]


def print_verdict(found: list[tuple[str, dict]]) -> None:
    """Print which gates failed, and what that means."""
    failed = [(stage, gate) for stage, gate in found if not gate["ok"]]
    if not failed:
        print(f"all {len(found)} gates OK")
        return
    print(f"{len(failed)} of {len(found)} gates FAILED:")
    for stage, gate in failed:
        print(f"  {stage}: {gate['name']} {value_of(gate)}, usually {bounds(gate)}")
    print("A gate compares a figure with its range in earlier runs. Just outside, it is most likely chance: another")
    print("seed or another CPU. Far outside, look at that stage first: what follows stands on it.")


def gates(found: list[tuple[str, dict]]) -> str:
    """The table of gates."""
    if not found:
        text = "No stage has gates: they belong to the embedded task, and data of your own has only the figures."
        return f'<p class="missing">{text}</p>'
    rows = []
    for name, gate in found:
        verdict = Cell("OK", "ok") if gate["ok"] else Cell("FAILED", "failed")
        rows.append([name, Cell(gate["name"], "text"), value_of(gate), bounds(gate), verdict])
    return table(["stage", "gate", "figure", "usual range", "verdict"], rows)


def summary(stages: list[Stage]) -> str:
    """The table of stages (data, seed, steps, time), and all settings of each, folded away."""
    if not stages:
        return ""
    rows, settings = [], []
    for s in stages:
        source = next((str(s.config[k]) for k in ("data", "prompts") if k in s.config), "–")
        seconds = s.results.get("seconds")
        steps = max((row.get("step", 0) for row in s.history), default=0)
        seed = str(s.config.get("seed", "–"))
        lasted = "–" if seconds is None else f"{seconds:.0f} s"
        rows.append([s.name, f"{s.kind}.py", Cell(source, "text"), seed, f"{steps:,}", lasted])
        shown = "".join(
            f"<dt>{html.escape(k)}</dt><dd>{html.escape(' '.join(map(str, v)) if isinstance(v, list) else str(v))}</dd>"
            for k, v in s.config.items()
        )
        settings.append(f"<details><summary>{html.escape(s.name)}</summary><dl>{shown}</dl></details>")
    folded = f"<details><summary>All settings</summary>{''.join(settings)}</details>"
    return table(["stage", "script", "learned from", "seed", "steps", "time"], rows) + folded


# -------------------------------------------------------------------------------- the page


def as_json(content: dict) -> str:
    """JSON that is safe within <script>. It holds no <, so no text in it, however hostile, can end the block or open a
    comment; ensure_ascii writes U+2028 and its like as escapes."""
    text = json.dumps(finite(content), ensure_ascii=True, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def fill(page: str, parts: dict[str, str]) -> str:
    """Replace each {{name}} in the page by the part of that name, all in one pass: a {{name}} in a part stays text."""
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found.group(1)], page)


def run(config: Config) -> dict:
    folder = Path(config.run)
    out = folder / "report.html" if config.out == "auto" else Path(config.out)
    stages = find_stages(folder, config.stages)
    evaluation = results_in(folder / "evaluate")
    found = bool(stages or evaluation.get("policies"))
    check(found, f"{folder}: holds no run; `make demo` makes one in out/, and --run names another folder")
    check(not out.is_dir(), f"--out {out} is a folder; name a file")
    notes = [f"no {kind}: {kind}.py has not been run here" for kind in KINDS if kind not in {s.kind for s in stages}]
    notes += [f"{s.name} is not finished" for s in stages if not s.results]
    samples, tokens = measure_answers(config, folder, stages, notes) if config.rollouts else ({}, {})
    all_gates = find_gates(stages, evaluation)
    parts = {
        "title": html.escape(str(config.run)),
        "summary": summary(stages),
        "comparison": comparison(evaluation),
        "gates": gates(all_gates),
        "notes": "".join(f"<li>{html.escape(note)}</li>" for note in notes),
        "data": as_json({"curves": curves(stages), "samples": samples, "tokens": tokens}),
    }
    text = fill(PAGE.read_text(encoding="utf-8"), parts)
    with replacing(out) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")
    print(f"{out}: the report, {len(text.encode()) / 1e6:.2f} MB; open it in a browser")
    if all_gates:
        print_verdict(all_gates)
    return {"out": str(out), "notes": notes, "gates": [gate for _, gate in all_gates]}


def main() -> None:
    run_main(run, Config, __doc__)


if __name__ == "__main__":
    main()
