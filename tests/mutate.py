"""Do the tests notice? Put one small, realistic bug at a time into a copy of the project: does a test turn red?

    python tests/mutate.py                 # all mutations, two at a time; exit status 1 if one survives
    python tests/mutate.py ppo.py          # only those of this file
    python tests/mutate.py kl eos          # only those whose file, function, code or effect mentions kl or eos
    python tests/mutate.py 12 40-45        # only those with these numbers
    python tests/mutate.py --list          # what they are, one a line
    python tests/mutate.py --check         # which of them no longer fit the code; exit status 1 if there are any

Each mutation is a piece of code that somebody has really written, or could have, and one line on what it would do to a
training run. Most of these runs would not crash: the loss goes down, the curves look plausible, and the model is wrong.
That is why the tests compare with closed forms and slow loops.

The mutations stand in tests/mutations/, one text file for each source file. This is how they are written; `module` or a
class stands for what is in it outside of functions, and without a line `+` the lines with the piece are left out:

    # AdaptiveKL.update                           the function, in which the piece stands once
    - error = min(max(kl / self.target - 1, -0.2), 0.2)
    + error = kl / self.target - 1
    ! the controller's error is not clipped       what that does to a training run
    ? test_ppo_math.py::test_adaptive_kl_by_hand  the tests that should notice, one a line

First the same tests run on an untouched copy. If one is red there, nothing is started (exit status 2): every mutation
would count as killed by it. A mutation is killed if a test fails, or if the tests take far longer than they did on the
untouched copy (a bug may loop for ever). One proves nothing if the function, the code or the test that it names is no
longer there, if the code stands there several times, or if the copy can't even be imported: the campaign ends with exit
status 1, so that the mutations keep up with the code.

Only the standard library is used here; the tests run in child processes. Importing torch takes longer than most of the
tests, so where the system can fork (multiprocessing's "forkserver"), one server imports torch and pytest once, and
every child starts as a copy of it; elsewhere each child imports them anew, which gives the same verdicts more slowly.
The project itself is never imported before the fork: a child finds it in its own scratch copy.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import math
import multiprocessing
import multiprocessing.connection
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from mutations import Mutation, broken_source, read_mutations

ROOT = Path(__file__).resolve().parent.parent
# What the tests import, the project excepted; torch._dynamo because making an optimiser imports it.
PRELOAD = ["torch", "torch._dynamo", "pytest", "tiktoken", "tqdm"]
LEFT_OUT = (".git", ".venv", "out", "__pycache__", ".*_cache")  # of the scratch copies


# ------------------------------------------------------------------------------------------------ running


@dataclass
class Task:
    """One run of pytest in a scratch copy of its own."""

    name: object
    tests: list[str]  # those that are marked slow too
    limit: float  # seconds after which it is killed
    changed: dict[str, str] = field(default_factory=dict)  # file -> its text in the copy


@dataclass
class Run:
    """What came of a task."""

    task: Task
    status: int | None  # pytest's exit status; None: killed because its time was up
    output: str
    seconds: float

    @property
    def red(self) -> list[str]:
        """The tests that failed, such as `test_ppo.py::test_gae`."""
        lines = [line for line in self.output.splitlines() if line.startswith(("FAILED ", "ERROR "))]
        return [line.split(" ", 1)[1].split(" - ")[0].removeprefix("tests/") for line in lines]


def run_pytest(copy: str, root: str, arguments: list[str], output: str, limit: float) -> None:
    """The child process: pytest in the scratch copy. It prints to the file `output`; its status is the exit status."""
    if hasattr(os, "setsid"):
        os.setsid()  # a process group of its own: whoever kills it also kills what the tests have started
    if hasattr(signal, "alarm"):
        # should the parent be killed, nobody else would end a loop that runs for ever
        signal.alarm(math.ceil(limit) + 10)
    with open(output, "w", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(copy)
    # The copy's modules, and never those beside this script.
    sys.path[:] = [copy, *(p for p in sys.path if p and Path(p) not in (Path(root), Path(root) / "tests"))]
    sys.dont_write_bytecode = True
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"  # for the scripts that the tests start
    import pytest

    sys.exit(int(pytest.main(arguments)))


def kill(process) -> None:
    """End the child and what its tests have started."""
    if hasattr(os, "killpg"):
        with contextlib.suppress(OSError):  # it may have ended, or not yet have its group
            os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.join()


def run_all(tasks: list[Task], root: Path, jobs: int, first_failure_only: bool = False) -> Iterator[Run]:
    """Run the tasks, `jobs` at a time, and yield each as it ends."""
    can_fork = "forkserver" in multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if can_fork else "spawn")
    if can_fork:
        context.set_forkserver_preload(PRELOAD)
    waiting, running = collections.deque(tasks), {}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                task = waiting.popleft()
                scratch = tempfile.TemporaryDirectory(prefix="mutate_", ignore_cleanup_errors=True)
                copy, output = Path(scratch.name) / "project", Path(scratch.name) / "output"
                shutil.copytree(root, copy, ignore=shutil.ignore_patterns(*LEFT_OUT))
                for file, text in task.changed.items():
                    (copy / file).write_text(text, encoding="utf-8")
                # -o addopts=: nothing is left out or run in parallel, whatever pyproject.toml says
                options = f"-q --no-header --tb=no -rfE -p no:cacheprovider -o addopts= --rootdir={copy}"
                arguments = [
                    *options.split(),
                    f"--basetemp={scratch.name}/tmp",
                    *(["-x"] if first_failure_only else []),
                ]
                arguments += [f"tests/{test}" for test in task.tests]
                process = context.Process(
                    target=run_pytest, args=(str(copy), str(root), arguments, str(output), task.limit)
                )
                process.start()
                running[process.sentinel] = (process, task, scratch, output, time.monotonic())
            next_deadline = min(start + task.limit for _, task, _, _, start in running.values())
            multiprocessing.connection.wait(list(running), timeout=max(0.0, next_deadline - time.monotonic()))
            for sentinel, (process, task, scratch, output, start) in list(running.items()):
                seconds = time.monotonic() - start
                timed_out = seconds >= task.limit and process.is_alive()
                if not timed_out and process.is_alive():
                    continue
                kill(process) if timed_out else process.join()
                del running[sentinel]
                printed = output.read_text(encoding="utf-8", errors="replace") if output.exists() else ""
                scratch.cleanup()
                yield Run(task, None if timed_out else process.exitcode, printed, seconds)
    finally:
        for process, _, scratch, _, _ in running.values():  # interrupted
            kill(process)
            scratch.cleanup()


def baseline(mutations: list[Mutation], root: Path, jobs: int) -> dict[str, Run]:
    """Run all tests that the mutations name on untouched copies."""
    wanted = {test for m in mutations for test in m.tests}
    # a single test is run with its file if that is wanted too
    wanted = sorted(test for test in wanted if "::" not in test or test.split("::")[0] not in wanted)
    return {run.task.name: run for run in run_all([Task(test, [test], 1800.0) for test in wanted], root, jobs)}


def verdict(run: Run) -> str:
    if run.status is None:
        return f"killed by time: no end after {run.seconds:.0f} s"
    if run.status == 0:
        return "SURVIVED"
    if run.status == 1 and run.red:  # 1: tests were run and some failed; anything else proves nothing
        return f"killed by {run.red[0]}"
    return f"BROKEN: pytest ended with {run.status}: {run.output.strip()[-300:]}"


# ------------------------------------------------------------------------------------------------ command line


def choose(words: list[str], mutations: list[Mutation]) -> list[int]:
    """`12`, `40-45`, files and words -> indices, in order. ValueError if one of them means nothing."""
    chosen: set[int] = set()
    for word in words:
        numbers = re.fullmatch(r"(\d+)(?:-(\d+))?", word)
        if numbers:
            low, high = int(numbers[1]), int(numbers[2] or numbers[1])
            if not 1 <= low <= high <= len(mutations):
                raise ValueError(f"{word}: the mutations have the numbers 1-{len(mutations)}")
            found = set(range(low - 1, high))
        else:
            texts = [f"{m.file} {m.function} {m.right} {m.wrong} {m.effect}".lower() for m in mutations]
            found = {i for i, m in enumerate(mutations) if m.file == word}
            found = found or {i for i, text in enumerate(texts) if word.lower() in text}
            if not found:
                raise ValueError(f"no mutation mentions {word!r}")
        chosen |= found
    return sorted(chosen) if words else list(range(len(mutations)))


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("choice", nargs="*", help="numbers (12), ranges (40-45), files or words; default: all")
    parser.add_argument("--list", action="store_true", help="print the mutations and run nothing")
    parser.add_argument("--check", action="store_true", help="print those that don't fit the code and run nothing")
    parser.add_argument("--jobs", type=int, default=2, help="mutations at a time, at most the cores (default: 2)")
    parser.add_argument(
        "--limit",
        type=float,
        help="seconds a mutation may take (default: 60, and 5 times what its tests took unharmed)",
    )
    args = parser.parse_intermixed_args(argv)
    if args.jobs < 1:
        parser.error("--jobs must be at least 1")
    if args.limit is not None and args.limit <= 0:
        parser.error("--limit must be above 0")
    args.jobs = min(args.jobs, os.cpu_count() or 1)
    args.fail = parser.error  # prints one line and exits with status 2
    return args


def main(argv: list[str] | None = None, root: Path = ROOT) -> int:
    args = parse(argv)
    try:
        mutations = read_mutations(root)
        chosen = choose(args.choice, mutations)
    except ValueError as error:
        args.fail(str(error))
    names = [f"{i:3} {m.file:16} {m.function}: {m.effect}" for i, m in enumerate(mutations, start=1)]
    if args.list:
        print(*(names[i] for i in chosen), sep="\n")
        return 0

    start = time.monotonic()
    texts, verdicts = {}, {}
    for i in chosen:
        try:
            texts[i] = broken_source(mutations[i], root)
        except ValueError as error:
            verdicts[i] = str(error)
            print(verdicts[i], flush=True)
    if args.check:
        print(f"{len(texts)} of {len(chosen)} mutations fit the code")
        return 1 if verdicts else 0

    os.environ.setdefault("OMP_NUM_THREADS", "1")  # inherited by the children; must be set before torch is imported
    print(f"the tests of {len(texts)} mutations on an untouched copy:", flush=True)
    unharmed = baseline([mutations[i] for i in texts], root, args.jobs)
    bad = [run for run in unharmed.values() if run.status != 0]
    for run in bad:
        late = f"no end after {run.seconds:.0f} s" if run.status is None else ""
        print(f"RED: {run.task.name}: {', '.join(run.red) or late or run.output.strip()[-300:]}")
    if bad:
        print("Not started: the tests must be green before a mutation can turn one red.")
        return 2
    print(f"green ({time.monotonic() - start:.0f} s)", flush=True)

    tasks = []
    for i, text in texts.items():
        m = mutations[i]
        runs = [unharmed.get(test) or unharmed[test.split("::")[0]] for test in m.tests]
        limit = args.limit or 60 + 5 * sum(run.seconds for run in runs)
        tasks.append(Task(i, m.tests, limit, {m.file: text}))
    begin = time.monotonic()
    for n, run in enumerate(run_all(tasks, root, args.jobs, first_failure_only=True), start=1):
        i = run.task.name
        verdicts[i] = verdict(run)
        left = (time.monotonic() - begin) / n * (len(tasks) - n)
        print(names[i])
        print(
            f"    {verdicts[i]} ({run.seconds:.0f} s); {n} of {len(tasks)} done, about {left / 60:.1f} min left",
            flush=True,
        )

    alive = [i for i in chosen if not verdicts[i].startswith("killed")]
    print(f"{len(chosen) - len(alive)} of {len(chosen)} mutations killed in {time.monotonic() - start:.0f} s")
    for i in alive:
        m = mutations[i]
        right, wrong = "\n".join(m.right), "\n".join(m.wrong)
        bug = f"{i + 1} {m.file} {m.function}: {right!r} -> {wrong!r}"
        print(f"NOT KILLED: {bug}: {verdicts[i]} ({m.place})" if i in texts else verdicts[i])
    return 1 if alive else 0


if __name__ == "__main__":
    sys.exit(main())
