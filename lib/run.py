"""A run: its folder, its steps, its log, its gates."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import torch
from tqdm import tqdm

from data.files import replacing
from lib.checkpoint import atomic_save, load_file
from lib.cli import UserError, check


def finite(obj):
    """nan and inf are no JSON: None instead."""
    if isinstance(obj, dict):
        return {k: finite(v) for k, v in obj.items()}
    if isinstance(obj, (list, tuple)):
        return [finite(v) for v in obj]
    return None if isinstance(obj, float) and not math.isfinite(obj) else obj


def write_text(text: str, path: Path) -> None:
    """The whole file, or the old one stays."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def write_json(obj, path: Path) -> None:
    write_text(json.dumps(finite(obj), indent=2) + "\n", path)


# What may differ when a run is resumed: nothing that changes what is learned. More epochs or iterations go on.
MAY_DIFFER = ("out_dir", "resume", "strict", "trace", "device", "log_every", "save_every")
MAY_GROW = ("epochs", "iterations")


class RunFolder:
    """out/<stage>/: config.json, metrics.jsonl as the run goes, state.pt to resume from, model.pt and results.json at
    last.

    A fresh start removes the state and the results of an earlier run; its model.pt stays until there is a new one. With
    --resume the state is read first, and refused if it belongs to another configuration, before anything is written.
    total: the steps of the whole run. parts: models, optimisers and all else whose state dict a state keeps; with
    --resume they are as they were when it was saved."""

    def __init__(self, config, total: int, **parts):
        warmup = config.warmup
        check(warmup <= total, f"--warmup {warmup} is longer than the whole run, which has {total} steps; lower it")
        self.config, self.total, self.parts = config, total, parts
        self.path = Path(config.out_dir)
        self.metrics, self.results = self.path / "metrics.jsonl", self.path / "results.json"
        self.first = 0  # steps that are done
        self.done: dict | None = None  # the results, if the run that is to be resumed has ended already
        self.laps: list[tuple[str, float]] = []
        self.start = time.perf_counter()
        if config.resume:
            self.resume()
        else:
            self.start_afresh()

    def start_afresh(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--out_dir {self.path}: can't be made a folder ({error.strerror})") from None
        for old in (self.path / "state.pt", self.results):
            old.unlink(missing_ok=True)
        self.metrics.write_text("", encoding="utf-8")
        write_json(dataclasses.asdict(self.config), self.path / "config.json")

    def resume(self) -> None:
        """Bring the parts and torch's generators to the saved state, and cut the log back to it."""
        file = self.path / "state.pt"
        state = load_file(file)
        refuse_another_config(state, self.config, file)
        check(self.metrics.exists(), f"{self.metrics}: gone, and with it the log of the run; start afresh")
        self.first = state["step"]
        print(f"{file}: {self.first} of {self.total} steps are done")
        if self.first >= self.total and self.results.exists():
            self.done = json.loads(self.results.read_text(encoding="utf-8"))
            return
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        torch.set_rng_state(state["rng"][0])
        if torch.cuda.is_available() and len(state["rng"]) > 1:
            torch.cuda.set_rng_state(state["rng"][1])
        if self.metrics.stat().st_size > state["logged"]:
            os.truncate(self.metrics, state["logged"])  # what was logged after the state was saved comes again
        self.results.unlink(missing_ok=True)  # of the shorter run that this one makes longer
        write_json(dataclasses.asdict(self.config), self.path / "config.json")

    def steps(self, name: str) -> Iterator[int]:
        """The steps that are left, 0..total-1, under a progress bar. After each a state is saved if it is time."""
        self.bar = tqdm(range(self.first, self.total), initial=self.first, total=self.total, desc=name, mininterval=1)
        for step in self.bar:
            self.laps = [("", time.perf_counter())]
            yield step
            if self.due(step, self.config.save_every):
                self.save_state(step + 1)

    def due(self, step: int, every: int) -> bool:
        """Is it time, after this step, for what happens every `every` steps (0: never) and at the end?"""
        return step + 1 == self.total or (every > 0 and (step + 1) % every == 0)

    def save_state(self, step: int) -> None:
        """All that resuming needs. The random streams derive from (seed, step), so the number of steps that are done is
        the whole data position; torch's own generators are kept for dropout."""
        state = {name: part.state_dict() for name, part in self.parts.items()}
        state |= {"step": step, "config": dataclasses.asdict(self.config), "logged": self.metrics.stat().st_size}
        state["rng"] = [torch.get_rng_state()] + ([torch.cuda.get_rng_state()] if torch.cuda.is_available() else [])
        atomic_save(state, self.path / "state.pt")

    def lap(self, name: str) -> None:
        """The part of a step that has just ended; what is logged next holds each part's share of the seconds."""
        self.laps.append((name, time.perf_counter()))

    def log(self, step: int, show: str = "", **figures) -> None:
        """Append one JSON object; the file is whole after every line. A loss that is not finite ends the run. show: the
        figures for the progress bar."""
        for name in ("loss", "policy_loss", "value_loss"):
            loss = figures.get(name, 0.0)
            check(math.isfinite(loss), f"the {name} is {loss} at step {step}; lower --lr, or look at {self.metrics}")
        if show:
            self.bar.set_postfix({name: f"{figures[name]:.3f}" for name in show.split() if name in figures})
        if len(self.laps) > 1:
            seconds = self.laps[-1][1] - self.laps[0][1]
            figures["seconds"] = seconds
            figures |= {f"share_{name}": (end - begin) / seconds for (_, begin), (name, end) in pairwise(self.laps)}
        figures = {k: round(v, 6) if isinstance(v, float) else v for k, v in {"step": step, **figures}.items()}
        with open(self.metrics, "a", encoding="utf-8", newline="\n") as f:
            f.write(json.dumps(finite(figures)) + "\n")

    def history(self, key: str = "step") -> list[dict]:
        """What was logged with this key, by this process and by those that it resumes."""
        rows = [json.loads(line) for line in self.metrics.read_text(encoding="utf-8").splitlines()]
        return [row for row in rows if key in row]

    def finish(self, results: dict) -> dict:
        results["seconds"] = round(time.perf_counter() - self.start, 2)
        write_json(results, self.results)
        return results


def refuse_another_config(state: dict, config, file: Path) -> None:
    """A state belongs to the run that saved it: under another seed or learning rate the result would be neither
    run's."""
    saved = state.get("config", {}) if isinstance(state, dict) else {}
    for name, value in dataclasses.asdict(config).items():
        if name in MAY_DIFFER or (name in saved and saved[name] == value):
            continue
        if name in MAY_GROW and name in saved and value > saved[name]:
            continue
        raise UserError(
            f"{file} was saved with --{name} {saved.get(name)}, not {value}: resume with that, or start afresh"
        )


def gate(name: str, value: float, low: float, high: float, note: str = "") -> dict:
    """Did this stage work? Print the figure beside the range that it has at default settings."""
    found = {
        "name": name,
        "value": round(value, 4),
        "low": finite(low),
        "high": finite(high),
        "ok": low <= value <= high,
    }
    note = f"; {note}" if note else ""
    verdict = "OK" if found["ok"] else "FAILED"
    print(f"GATE {name} {value:.3f} (expected at default settings: {bounds(found)}{note})  {verdict}", flush=True)
    return found


def bounds(gate: dict) -> str:
    """The range of a gate in words."""
    low, high = gate["low"], gate["high"]
    if low is None or high is None:
        return f"at most {high:g}" if low is None else f"at least {low:g}"
    return f"{low:g} to {high:g}"


def last_quarter(history: list[dict], expected: tuple) -> dict:
    """Means over the last quarter of a run, and gates: expected holds (figure, name, from, to)."""
    tail = history[-max(1, len(history) // 4) :]
    shown = [k for k in ("score", "kl", "k3", "eos_rate", "distinct", "length", "gold") if k in tail[0]]
    results = {k: sum(row[k] for row in tail) / len(tail) for k in shown}
    print("last quarter (first iteration): " + ", ".join(f"{k} {results[k]:.2f} ({history[0][k]:.2f})" for k in shown))
    return {**results, "gates": [gate(name, results[key], low, high) for key, name, low, high in expected]}
