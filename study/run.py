"""make study: questions on which papers about RLHF need judges, measured where the truth is known.

    python -m study.run                  # all experiments, then the figures: about 70 minutes on two cores
    python -m study.run --quick          # tiny networks, one seed: do the commands fit together?
    python -m study.run --commands       # print every command; each can be run by hand
    python -m study.run --only frontier  # one experiment, and the jobs that it needs

Two jobs run at a time, with one thread each. A finished job leaves a note with its command. So the study may be stopped
or killed at any moment: started again, it goes on with the jobs that are left.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from lib.cli import Flags, UserError, check, flag, run_main
from lib.run import write_json
from study import jobs as experiments
from study import tables
from study.jobs import FULL, QUICK, Job, needed
from study.results import gather


@dataclass
class Config(Flags):
    out: str = flag("auto", "folder for everything that is trained (auto: out/study, with --quick out/study_quick)")
    quick: bool = flag(False, "tiny networks, one seed: nothing is learned; results and figures stay in --out")
    only: list[str] = flag([], "experiments, by their function in study/jobs.py (none: all)")
    commands: bool = flag(False, "print the commands and stop")
    jobs: int = flag(2, "jobs at a time", low=1)


def fingerprint(job: Job, earlier: list[Job], known: dict[str, str]) -> str:
    """The mark of a job: a hash of its command and of the marks of the jobs that it needs."""
    parts = [" ".join(job.command), *(known[need.makes] for need in needed(job, earlier))]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def done_file(out: str, job: Job) -> Path:
    """The file whose mark says that the job is done."""
    return Path(out) / "done" / (Path(job.makes).relative_to(out).as_posix().replace("/", "_") + ".json")


def log_file(out: str, job: Job) -> Path:
    return Path(out) / "logs" / (done_file(out, job).stem + ".log")


def is_done(out: str, job: Job, mark: str) -> bool:
    """Has this very command ended, and is its result still there?"""
    try:
        return json.loads(done_file(out, job).read_text(encoding="utf-8"))["mark"] == mark and Path(job.makes).exists()
    except (OSError, ValueError, KeyError, TypeError):
        return False


def start(job: Job, out: str) -> subprocess.Popen:
    """Start the job in a process of its own, which ends when this one does (study/job.py)."""
    environment = dict(os.environ, OMP_NUM_THREADS="1", GOMP_SPINCOUNT="2000", PYTHONUNBUFFERED="1")
    command = list(job.command)
    while "=" in command[0]:
        name, _, value = command.pop(0).partition("=")
        environment[name] = value
    if Path(job.makes).suffix == ".jsonl":
        Path(job.makes).unlink(missing_ok=True)  # collect.py would append to what another command has left
    if Path(job.makes).is_dir():
        (Path(job.makes) / "state.pt").unlink(missing_ok=True)  # a stage doesn't start over a job that was killed
    log = log_file(out, job)
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "w", encoding="utf-8") as file:
        arguments = [sys.executable, "study/job.py", *command]
        return subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=file, stderr=file, env=environment)


def finish(job: Job, out: str, mark: str) -> None:
    """Note that the job is done."""
    for state in Path(job.makes).glob("state.pt"):
        state.unlink()  # what --resume needs, 20 MB a run: the study starts a job afresh
    write_json({"mark": mark, "command": shlex.join(job.command)}, done_file(out, job))


def failed(job: Job, out: str) -> UserError:
    """The error of a job, with the end of its log."""
    log = log_file(out, job)
    last = log.read_text(encoding="utf-8", errors="replace").splitlines()[-5:]
    return UserError("\n  ".join([f"{typed(job)} failed; the end of {log}:", *last]))


def typed(job: Job) -> str:
    """The command as one types it. A NAME=value goes before `python`."""
    words = shlex.join(job.command)
    return f"{job.command[0]} python {shlex.join(job.command[1:])}" if "=" in job.command[0] else f"python {words}"


def run_jobs(todo: list[Job], everything: list[Job], out: str, at_a_time: int) -> None:
    """Run the jobs that are not done yet, each after the ones that it needs. UserError if one fails."""
    marks: dict[str, str] = {}
    for i, job in enumerate(everything):
        marks[job.makes] = fingerprint(job, everything[:i], marks)
    finished = {job.makes for job in everything if is_done(out, job, marks[job.makes])}
    needs = {job.makes: {n.makes for n in needed(job, everything[:i])} for i, job in enumerate(everything)}
    waiting = [job for job in todo if job.makes not in finished]
    running: dict[str, tuple[Job, subprocess.Popen, float]] = {}  # makes: (job, its process, when it started)
    begin = time.perf_counter()
    print(f"{len(todo) - len(waiting)} of {len(todo)} jobs are done; logs in {Path(out) / 'logs'}", flush=True)
    try:
        while waiting or running:
            ready = [job for job in waiting if needs[job.makes] <= finished]
            while ready and len(running) < at_a_time:
                job = ready.pop(0)
                waiting.remove(job)
                running[job.makes] = (job, start(job, out), time.perf_counter())
            time.sleep(0.05)
            for makes, (job, process, started) in list(running.items()):
                if process.poll() is None:
                    continue
                del running[makes]
                if process.returncode:
                    raise failed(job, out)
                finish(job, out, marks[makes])
                finished.add(makes)
                number, now = len(todo) - len(waiting) - len(running), time.perf_counter()
                count = f"[{number}/{len(todo)}, {(now - begin) / 60:.0f} min]"
                print(f"{count} {now - started:.0f} s: {typed(job)}", flush=True)
    finally:
        for _, process, _ in running.values():
            process.kill()


def with_needs(chosen: list[Job], everything: list[Job]) -> list[Job]:
    """The chosen jobs and all jobs that they need, in order."""
    wanted = {job.makes for job in chosen}
    for i in range(len(everything) - 1, -1, -1):
        if everything[i].makes in wanted:
            wanted |= {need.makes for need in needed(everything[i], everything[:i])}
    return [job for job in everything if job.makes in wanted]


def run(config: Config) -> dict:
    size = QUICK if config.quick else FULL
    out = config.out if config.out != "auto" else "out/study_quick" if config.quick else "out/study"
    everything = experiments.jobs(size, out)
    chosen = everything
    if config.only:
        names = [part.__name__ for part in experiments.PARTS]
        unknown = [name for name in config.only if name not in names]
        check(not unknown, f"--only takes {', '.join(names)}, not {' '.join(unknown)}")
        chosen = with_needs(experiments.jobs(size, out, config.only), everything)
    if config.commands:
        for job in chosen:
            print(typed(job))
        return {}
    run_jobs(chosen, everything, out, config.jobs)
    if not config.only:
        from study import figures  # matplotlib takes a second to import, and the jobs don't need it

        folder = Path(out) if config.quick else Path()  # a quick run doesn't overwrite the files of the repository
        results = folder / "study/results.json"
        write_json(gather(size, out), results)
        tables.run(tables.Config(str(results), str(folder / "docs/study.md")))
        figures.run(figures.Config(str(results), str(folder / "assets")))
        print(f"{results}: the numbers")
    return {"jobs": len(chosen)}


def main() -> None:
    os.chdir(Path(__file__).resolve().parent.parent)  # the commands are those of the repository's folder
    run_main(run, Config, __doc__)


if __name__ == "__main__":
    main()
