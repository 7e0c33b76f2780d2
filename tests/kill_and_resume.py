"""Is a run that was killed, at whatever moment, and then resumed the same as the run that nobody disturbed?

    python tests/kill_and_resume.py                                       # every stage, each killed in 40 runs
    python tests/kill_and_resume.py --stages ppo dpo --kills 200 --seed 7

Each stage runs once unbroken, at the size of stages.py. Then it is started again and again, with default flags or with
--save_every 2, and stopped at a random moment: by SIGINT (Ctrl-C), by SIGTERM, or by SIGKILL (no handler, no `finally`,
as when the machine goes down), every third run in the middle of the save that follows that moment. It is resumed,
perhaps stopped again, resumed again. In the end the weights of model.pt must be bit-equal to the unbroken run's,
metrics.jsonl and results.json equal apart from the clock. Exit status 1 if anything differs.

- SIGINT and SIGTERM cost at most the step that they fall into: where a step was logged there must be a state.
- Killed before the first state was saved, there is nothing to resume: `resume` must be refused by a message of one line
  that changes no file, and the run starts afresh.
- Every second run starts in a folder where the finished run of another seed stands: nothing of it may come back.
- To resume a run that has finished must change no byte.
- Collecting rankings has no state: killed and started again, it must write the very same file.

The children are forked from a server that has imported torch ("forkserver", so not on Windows), with one thread each.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from helpers import checkpoint, strict_json, write_lines
from stages import PROMPTS, STAGES, reward_file, same_figures, settings, toy_policy

import collect
from lib.cli import UserError

NAMES = [*STAGES, "collect"]
PRELOAD = ["torch", "torch._dynamo", "pytest", "tiktoken", "tqdm"]  # imported before the fork


def make(stage: str, work: Path, **changes) -> tuple:
    """What a script does, and its configuration: a run in work/STAGE/out that takes about a second."""
    folder = work / stage
    if stage == "collect":
        files = {"policies": [checkpoint(folder / "start", toy_policy())], "out": str(folder / "out" / "r.jsonl")}
        files["prompts"] = write_lines(folder / "p.jsonl", [{"prompt": p * n} for p in PROMPTS for n in (1, 2)])
        flags = {"gold": f"{reward_file(folder)}:letters", "max_new_tokens": 8, "batch_size": 2, "device": "cpu"}
        return collect.run, collect.Config(**files, **flags)
    longer = {STAGES[stage].longer: 6 if STAGES[stage].rollouts else 40}
    longer |= {"kl_target": 3.0} if stage == "ppo" else {"dropout": 0.1} if stage == "sft" else {}
    module, model = STAGES[stage].module, toy_policy(dropout=0.1)
    return module.train, module.Config(**settings(stage, folder, model, lr=1e-3, **longer, **changes))


class End(NamedTuple):
    """How a child ended: "done", "killed", "refused" by a UserError, "crashed"; what it said; after what time."""

    how: str
    said: str
    seconds: float


def child(stage: str, work: Path, changes: dict, log: str, connection) -> None:
    """In the child process: run the stage; what it prints goes to the file `log`."""
    with open(log, "w", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    from tqdm import tqdm

    tqdm.set_lock(threading.RLock())  # its own is a semaphore of the system's, which a killed process leaves behind
    torch.set_num_threads(1)
    run, config = make(stage, work, **changes)
    connection.send("ready")  # the clock runs from here: start-up is not what is being tested
    try:
        run(config)
    except UserError as error:
        connection.send(str(error))
        sys.exit(2)
    except KeyboardInterrupt:  # before the loop, or in collect.py
        sys.exit(130)


def stamps(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of every file that is saved as a whole; they change as soon as one is being written."""
    found = {}
    for path in folder.glob("*"):
        with contextlib.suppress(FileNotFoundError):  # renamed meanwhile
            if path.name != "metrics.jsonl":
                found[path.name] = (path.stat().st_size, path.stat().st_mtime_ns)
    return found


def run_child(
    stage: str, work: Path, kill_after: float | None = None, how: int = signal.SIGKILL, amid_save=False, **changes
) -> End:
    """Run the stage in a child process, and send it the signal `how` after so many seconds unless it has ended by then;
    amid_save: as soon after that as a file is being saved."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    context, log = multiprocessing.get_context("forkserver"), work / "log"
    context.set_forkserver_preload(PRELOAD)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=child, args=(stage, work, changes, str(log), sender))
    process.start()
    sender.close()
    said = ""
    try:
        receiver.recv()
        start = time.perf_counter()
        process.join(300 if kill_after is None else kill_after)
        seen = stamps(work / stage / "out")
        while amid_save and process.is_alive() and stamps(work / stage / "out") == seen:
            time.sleep(0.0001)
        if process.is_alive():
            os.kill(process.pid, how)
        process.join()
        seconds = time.perf_counter() - start
        said = receiver.recv() if process.exitcode == 2 else ""
    except EOFError:  # it ended without a word
        process.join()
    if process.exitcode in (0, 2):
        return End("done" if process.exitcode == 0 else "refused", said, seconds)
    if process.exitcode in (-how, 128 + how) and kill_after is not None:
        return End("killed", "", seconds)
    return End("crashed", f"exit status {process.exitcode}: {log.read_text(encoding='utf-8')[-2000:]}", 0.0)


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())} if folder.exists() else {}


def differences(folder: Path, unbroken: Path) -> list[str]:
    """What in `folder` is not as the unbroken run left it."""
    ours, theirs = contents(folder), contents(unbroken)
    if set(ours) != set(theirs):
        return [f"the files are {', '.join(ours)}"]
    found = []
    for name in ours:
        if name == "model.pt":
            a, b = (torch.load(f / name, weights_only=True)["weights"] for f in (folder, unbroken))
            same = set(a) == set(b) and all(torch.equal(a[k], b[k]) for k in b)
        elif name == "metrics.jsonl":
            a, b = ([json.loads(line) for line in files[name].decode().splitlines()] for files in (ours, theirs))
            same = same_figures(a) == same_figures(b)
        elif name == "results.json":
            same = same_figures([strict_json(folder / name)]) == same_figures([strict_json(unbroken / name)])
        else:
            same = name.endswith((".pt", ".json")) or ours[name] == theirs[name]
        found += [] if same else [name]
    return found


def step_of(folder: Path) -> int | None:
    """The step at which this run can be resumed; None without a state, or with one of the other seed's run."""
    path = folder / "state.pt"
    state = torch.load(path, weights_only=True) if path.exists() else {"config": {"seed": None}}
    return state["step"] if state["config"]["seed"] == 1 else None


def interrupted_run(
    stage: str, work: Path, moments: list[tuple[float, int]], amid_save: bool, kills: Counter, **changes
) -> list[str]:
    """One run that is stopped at these moments (seconds after each start, by which signal) and resumed until it ends ->
    what is wrong. amid_save: the first signal waits for the next save."""
    folder, wrong, resume, started = work / stage / "out", [], False, False
    while True:
        before, has_state = contents(folder), started and step_of(folder) is not None
        moment, how = moments[0] if moments else (None, signal.SIGKILL)
        end = run_child(stage, work, moment, how, amid_save, **changes, **({"resume": True} if resume else {}))
        if end.how == "crashed":
            return [*wrong, end.said]
        if end.how == "refused":
            changed = [n for n, content in contents(folder).items() if before.get(n) != content]
            wrong += [f"refused a fresh start: {end.said}"] * (not resume) + [f"refused: {end.said}"] * has_state
            wrong += [f"the refusal has several lines: {end.said!r}"] * ("\\n" in end.said)
            wrong += [f"refused, but wrote {', '.join(changed)}"] * bool(changed)
            if wrong:
                return wrong
            resume = False
            continue
        wrong += ["resumed without a state, instead of refusing"] * (resume and not has_state and end.how == "done")
        if not moments:
            return wrong + differences(folder, work / "unbroken" / stage)
        moments, amid_save, started = moments[1:], False, True
        log = folder / "metrics.jsonl"
        if end.how == "killed" and how != signal.SIGKILL and stage != "collect" and log.exists():
            ours = log.read_bytes() != before.get(log.name)  # not what a killed process has left
            lost = ours and '"step": 1,' in log.read_text("utf-8") and step_of(folder) is None
            wrong += [f"a step was logged, and {signal.Signals(how).name} has left no state"] * lost
        kills[signal.Signals(how).name] += end.how == "killed"
        kills["saving"] += any(path.suffix == ".tmp" for path in folder.glob("*"))
        kills["after the end" if end.how == "done" else "before a state" if step_of(folder) is None else "during"] += 1
        resume = stage != "collect"


def check_stage(stage: str, work: Path, kills: int, seed: int) -> tuple[list[str], Counter]:
    """Kill `kills` runs of the stage -> what is wrong, when the kills fell."""
    counter, wrong, folder = Counter(), [], work / stage / "out"
    kept = {name: work / name / stage for name in ("other", "unbroken")}
    for name, changes in (("other", {"seed": 2}), ("unbroken", {})):
        shutil.rmtree(folder, ignore_errors=True)
        end = run_child(stage, work, **(changes if stage != "collect" else {}))
        if end.how != "done":
            raise RuntimeError(f"the unbroken run of {stage} failed: {end.said}")
        shutil.copytree(folder, kept[name])
    # the end of the unbroken run, resumed: not a byte may change
    again = run_child(stage, work, **({"resume": True} if stage != "collect" else {}))
    if again.how != "done" or contents(folder) != contents(kept["unbroken"]):
        wrong.append(f"resumed after its end: {again.said or 'a file has changed'}")
    rng = random.Random(f"{seed} {stage}")
    parts = rng.sample(range(kills), kills)  # one first kill in each of `kills` equal parts: uniform, and spread
    for n, part in enumerate(parts):
        times = [end.seconds * (part + rng.random()) / kills]
        times += [end.seconds / 2 * rng.random() for _ in range(rng.choice([0, 0, 1, 2]))]  # what is left is shorter
        moments = [(t, rng.choice([signal.SIGINT, signal.SIGTERM, signal.SIGKILL])) for t in times]
        changes = {"save_every": 2} if rng.random() < 0.5 and stage != "collect" else {}
        shutil.rmtree(folder)
        dirty, amid_save = stage != "collect" and n % 2 == 1, stage != "collect" and n % 3 == 2
        if dirty:
            shutil.copytree(kept["other"], folder)
        found = interrupted_run(stage, work, moments, amid_save, counter, **changes)
        told = ", ".join(f"{signal.Signals(how).name} after {t:.2f} s" for t, how in moments)
        where = f"run {n + 1}, {told} of {end.seconds:.2f}" + (", default flags" if not changes else "")
        where += (" (first amid a save)" if amid_save else "") + (", in another run's folder" if dirty else "")
        wrong += [f"{where}: {text}" for text in found]
    return wrong, counter


def main(argv: list[str] | None = None) -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    parser.add_argument("--stages", nargs="+", choices=NAMES, default=NAMES, help="default: all")
    parser.add_argument("--kills", type=int, default=40, help="runs to kill, in each stage (default: 40)")
    parser.add_argument("--seed", type=int, default=1, help="of the moments (default: 1)")
    args = parser.parse_args(argv)
    bad = False
    for stage in args.stages:
        with tempfile.TemporaryDirectory(prefix="kill_and_resume_") as folder:
            wrong, kills = check_stage(stage, Path(folder), args.kills, args.seed)
        print(f"{stage}: killed {dict(kills)}: {len(wrong)} findings", flush=True)
        print("".join(f"    {text}\n" for text in wrong[:10]), end="", flush=True)
        bad = bad or bool(wrong)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
