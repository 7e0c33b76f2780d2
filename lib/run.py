"""A run: its folder, its steps, its log, its gates."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import math
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import torch
from tqdm import tqdm

from data.files import can_be_written, read_json, replacing
from lib.checkpoint import atomic_save, load_file
from lib.cli import UserError, check, one_line


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
MAY_DIFFER = ("out_dir", "resume", "overwrite", "strict", "trace", "device", "log_every", "save_every", "save_minutes")
MAY_GROW = ("epochs", "iterations")


class RunFolder:
    """out/<stage>/: config.json, metrics.jsonl as the run goes, state.pt to resume from, model.pt and results.json at
    last.

    A fresh start removes the results of an earlier run; its model.pt stays until there is a new one. An unfinished run
    is kept: --resume goes on with it, --overwrite removes it. With --resume the state is read first, and refused if it
    belongs to another configuration, before anything is written.
    total: the steps of the whole run. parts: models, optimisers and all else whose state dict a state keeps; with
    --resume they are as they were when it was saved.

    The loop and what follows it stand in a `with run:`. Nothing that stops the run in there costs more than a step, or
    than --save_minutes: see __exit__ and `interrupt`."""

    def __init__(self, config, total: int, **parts):
        warmup = config.warmup
        check(warmup <= total, f"--warmup {warmup} is longer than the whole run, which has {total} steps; lower it")
        self.config, self.total, self.parts = config, total, parts
        self.path = Path(config.out_dir)
        self.metrics, self.results = self.path / "metrics.jsonl", self.path / "results.json"
        self.state = self.path / "state.pt"
        self.done: dict | None = None  # the results, if the run that is to be resumed has ended already
        self.first = self.whole = self.saved = 0  # steps that were done at the start, that are done, that are saved
        self.laps: list[tuple[str, float]] = []
        self.start = time.perf_counter()
        self.stopped = 0  # the number of the signal that has asked the run to stop
        both = config.resume and config.overwrite
        check(not both, "--resume goes on, --overwrite starts anew; give one of the two")
        check(config.out_dir != "", "--out_dir is empty; name a folder")
        nothing = f"{self.state}: no such file, so nothing was saved yet; start without --resume"
        check(self.state.exists() or not config.resume, nothing)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--out_dir {self.path}: can't be made a folder ({error.strerror})") from None
        self.at_the_end = contextlib.ExitStack()  # what is to be undone then: the lock, the handlers of signals
        self.at_the_end.enter_context(hold(self.path / "lock"))
        try:
            if config.resume:
                self.resume()
            else:
                self.start_afresh()
        except BaseException:
            self.at_the_end.close()
            raise
        self.step_is_whole()
        self.saved_at = time.monotonic()
        for part in parts.values():
            if isinstance(part, torch.optim.Optimizer):
                part.register_step_pre_hook(self.weights_move)

    def start_afresh(self) -> None:
        unfinished = self.state.exists() and not self.results.exists()
        what = f"{self.path} holds an unfinished run. Go on with it by --resume, or start anew by --overwrite"
        check(not unfinished or self.config.overwrite, what)
        with can_be_written(self.path):
            for old in (self.state, self.results, self.path / "state.pt.tmp"):  # the last: of a run that was killed
                old.unlink(missing_ok=True)
            self.metrics.write_text("", encoding="utf-8")
        write_json(dataclasses.asdict(self.config), self.path / "config.json")

    def resume(self) -> None:
        """Bring the parts and torch's generators to the saved state, and cut the log back to it."""
        file = self.state
        state = load_file(file)
        refuse_another_config(state, self.config, file)
        logged = self.metrics.stat().st_size if self.metrics.exists() else -1
        whole = logged >= state["logged"]
        check(whole, f"{self.metrics}: gone or cut short, and with it the log of the run; start afresh")
        self.first = self.whole = self.saved = state["step"]
        print(f"{file}: {self.first} of {self.total} steps are done")
        if self.first >= self.total and self.results.exists():
            self.done = read_json(self.results)
            self.at_the_end.close()
            return
        try:
            for name, part in self.parts.items():
                part.load_state_dict(state[name])
            torch.set_rng_state(state["rng"][0])
            if torch.cuda.is_available() and len(state["rng"]) > 1:
                torch.cuda.set_rng_state(state["rng"][1])
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            changed = "has what it started from changed since? If so, start afresh"
            raise UserError(f"{file} doesn't fit this run; {changed} ({one_line(error)})") from None
        with can_be_written(self.path):
            if logged > state["logged"]:
                os.truncate(self.metrics, state["logged"])  # what was logged after the state was saved comes again
            self.results.unlink(missing_ok=True)  # of the shorter run that this one makes longer
        write_json(dataclasses.asdict(self.config), self.path / "config.json")

    # ---------------------------------------------------------------------------- the loop, and what stops it

    def __enter__(self) -> RunFolder:
        names = ("SIGINT", "SIGTERM", "SIGHUP")  # the last: the terminal is closed, or the connection lost
        stopping = [getattr(signal, name) for name in names if hasattr(signal, name)]
        stopping = [s for s in stopping if signal.getsignal(s) != signal.SIG_IGN]  # nohup, or `&` in a script
        if threading.current_thread() is threading.main_thread():  # the only one that may
            for number in stopping:
                self.at_the_end.callback(signal.signal, number, signal.signal(number, self.interrupt))
        return self

    def interrupt(self, signum: int, frame) -> None:
        """SIGINT (Ctrl-C), SIGTERM or SIGHUP: the run stops when its step is whole. The second one stops it at once,
        even amid a reward function (whose own SystemExit is an error like any other)."""
        if self.stopped:
            raise KeyboardInterrupt(128 + signum)
        self.stopped = signum
        with contextlib.suppress(OSError, RuntimeError):  # the terminal is gone, or amid a line of it
            print("\nstopping when this step is done; once more: at once", file=sys.stderr, flush=True)

    def __exit__(self, kind, error, traceback) -> None:
        """After an error, or a signal, the state is that of the last whole step. It can be saved unless a step has been
        left with weights that are half updated; then what was saved last stays."""
        with self.at_the_end:
            if error is not None and self.saved < self.whole and not self.moved:
                with contextlib.suppress(Exception):  # the error that is told is the first; the earlier state stays
                    self.save_state()
            if error is not None and self.saved:
                saved = f"{self.saved} of {self.total} steps are saved in {self.state}"
                error.last_words = f"{saved}; go on with: {command('--resume')}"

    def step_is_whole(self) -> None:
        """From here on a state can be saved, until `weights_move`: torch's generators are kept as they are now."""
        self.moved = False
        self.rng = [torch.get_rng_state()] + ([torch.cuda.get_rng_state()] if torch.cuda.is_available() else [])

    def weights_move(self, *_) -> None:
        """A hook of the optimisers: from its first update to its end a step can't be taken back."""
        self.moved = True

    def steps(self, name: str) -> Iterator[int]:
        """The steps that are left, 0..total-1, under a progress bar. After each a state is saved if it is time."""
        self.bar = tqdm(range(self.first, self.total), initial=self.first, total=self.total, desc=name, mininterval=1)
        for step in self.bar:
            self.laps = [("", time.perf_counter())]
            yield step
            self.whole = step + 1
            self.step_is_whole()
            if self.stopped and self.whole < self.total:
                self.bar.close()
                raise SystemExit(128 + self.stopped)
            late = time.monotonic() - self.saved_at > 60 * self.config.save_minutes > 0
            if self.whole < self.total and (late or self.due(step, self.config.save_every)):
                self.save_if_it_fits()

    def due(self, step: int, every: int) -> bool:
        """Is it time, after this step, for what happens every `every` steps (0: never) and at the end?"""
        return step + 1 == self.total or (every > 0 and (step + 1) % every == 0)

    def save_state(self) -> None:
        """All that resuming needs. The random streams derive from (seed, step), so the number of steps that are done is
        the whole data position; torch's own generators are kept for dropout."""
        state = {name: part.state_dict() for name, part in self.parts.items()}
        state |= {"step": self.whole, "config": dataclasses.asdict(self.config), "rng": self.rng}
        state["logged"] = self.metrics.stat().st_size
        atomic_save(state, self.state)
        self.saved, self.saved_at = self.whole, time.monotonic()

    def save_if_it_fits(self) -> None:
        """A full disk doesn't end the run: the earlier state stays, and the next one is tried when it is time."""
        try:
            self.save_state()
        except UserError as error:
            self.saved_at = time.monotonic()
            tqdm.write(f"WARNING: no state was saved after step {self.whole}: {error}")

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
        with can_be_written(self.metrics), open(self.metrics, "a", encoding="utf-8", newline="\n") as f:
            f.write(json.dumps(finite(figures)) + "\n")

    def history(self, key: str = "step") -> list[dict]:
        """What was logged with this key, by this process and by those that it resumes."""
        rows = [json.loads(line) for line in self.metrics.read_text(encoding="utf-8").splitlines()]
        return [row for row in rows if key in row]

    def finish(self, results: dict) -> dict:
        """The last state, which a longer run can go on from, and the results. The model is saved by now."""
        self.save_if_it_fits()
        results["seconds"] = round(time.perf_counter() - self.start, 2)
        write_json(results, self.results)
        return results


@contextlib.contextmanager
def hold(path: Path) -> Iterator[None]:
    """Hold a file that one process at a time can hold, until the end or until the process ends, however that ends."""
    with can_be_written(path):
        file = open(path, "a")
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):
            raise UserError(
                f"{path}: held by another process, which writes here; wait for it, or name another place"
            ) from None
        # a file system that has no locks: without
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # Windows doesn't remove an open file; an empty one does no harm
            path.unlink()
        file.close()


def command(*flags: str) -> str:
    """This program's command line, with these flags in the place of those that say how to start."""
    before = len(sys.orig_argv) - len(sys.argv) + 1  # the interpreter's words: sft.py, or -m sft
    words = [word for word in sys.argv[1:] if word not in ("--resume", "--overwrite")]
    return shlex.join([*sys.orig_argv[:before], *words, *flags])


def refuse_another_config(state: dict, config, file: Path) -> None:
    """A state belongs to the run that saved it: under another seed or learning rate the result would be neither
    run's."""
    saved = state.get("config", {}) if isinstance(state, dict) else {}
    for name, value in dataclasses.asdict(config).items():
        if name in MAY_DIFFER or (name in saved and saved[name] == value):
            continue
        if name in MAY_GROW and name in saved and value > saved[name]:
            continue
        check(name in saved, f"{file} knows no --{name}: another script or an earlier version saved it; start afresh")
        raise UserError(f"{file} was saved with --{name} {saved[name]}, not {value}: resume with that, or start afresh")


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
