"""make study: what papers about RLHF argue about with judges, measured where the truth is known.

    python -m study.run                  # all experiments, two cores: about 70 minutes, then the figures
    python -m study.run --quick          # tiny networks, one seed: do the commands fit together?
    python -m study.run --commands       # every command; each can be run by hand
    python -m study.run --only frontier  # one experiment, and what it needs

Two jobs at a time, a thread each. What is done is remembered by its command: stopped or killed at any moment and
started again, it goes on with the jobs that are left.
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

from lib.cli import UserError, check, check_ranges, flag, run_main
from lib.run import write_json
from study import jobs as experiments
from study import tables
from study.jobs import FULL, QUICK, Job, needed
from study.results import gather, print_results


@dataclass
class Config:
    out: str = flag("auto", "folder for everything that is trained (auto: out/study, with --quick out/study_quick)")
    quick: bool = flag(False, "tiny networks, one seed: nothing is learned, every command is run")
    only: list[str] = flag([], "experiments, by their function in study/jobs.py (none: all)")
    commands: bool = flag(False, "print them and stop")
    jobs: int = flag(2, "jobs at a time", low=1)
    results: str = flag("auto", "file for the results (auto: study/results.json, with --quick in --out)")
    assets: str = flag("auto", "folder for the figures (auto: assets, with --quick in --out)")


def fingerprint(job: Job, earlier: list[Job], known: dict[str, str]) -> str:
    """A job is what its command says and what the jobs say that it needs."""
    parts = [" ".join(job.command), *(known[need.makes] for need in needed(job, earlier))]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def done_file(out: str, job: Job) -> Path:
    return Path(out) / "done" / (Path(job.makes).relative_to(out).as_posix().replace("/", "_") + ".json")


def log_file(out: str, job: Job) -> Path:
    return Path(out) / "logs" / (done_file(out, job).stem + ".log")


def is_done(out: str, job: Job, mark: str) -> bool:
    try:
        return json.loads(done_file(out, job).read_text(encoding="utf-8"))["mark"] == mark and Path(job.makes).exists()
    except (OSError, ValueError, KeyError, TypeError):
        return False


def start(job: Job, out: str) -> subprocess.Popen:
    """The job in a process of its own, which ends when this one does (study/job.py)."""
    environment = dict(os.environ, OMP_NUM_THREADS="1", GOMP_SPINCOUNT="2000", PYTHONUNBUFFERED="1")
    command = list(job.command)
    while "=" in command[0]:
        name, _, value = command.pop(0).partition("=")
        environment[name] = value
    if Path(job.makes).suffix == ".jsonl":
        Path(job.makes).unlink(missing_ok=True)  # collect.py appends; half a file may be another command's
    log = log_file(out, job)
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "w", encoding="utf-8") as file:
        arguments = [sys.executable, "study/job.py", *command]
        return subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=file, stderr=file, env=environment)


def finish(job: Job, out: str, mark: str, seconds: float) -> None:
    for state in Path(job.makes).glob("state.pt"):
        state.unlink()  # for --resume, 20 MB a run; study jobs are short and start afresh
    write_json({"mark": mark, "seconds": round(seconds, 1), "command": shlex.join(job.command)}, done_file(out, job))


def failed(job: Job, out: str) -> UserError:
    log = log_file(out, job)
    last = log.read_text(encoding="utf-8", errors="replace").splitlines()[-5:]
    return UserError("\n  ".join([f"{typed(job)} failed; the end of {log}:", *last]))


def typed(job: Job) -> str:
    """As one types it: what stands before a command comes before `python`."""
    words = shlex.join(job.command)
    return f"{job.command[0]} python {shlex.join(job.command[1:])}" if "=" in job.command[0] else f"python {words}"


def run_jobs(todo: list[Job], everything: list[Job], out: str, at_a_time: int) -> None:
    marks: dict[str, str] = {}
    for i, job in enumerate(everything):
        marks[job.makes] = fingerprint(job, everything[:i], marks)
    finished = {job.makes for job in everything if is_done(out, job, marks[job.makes])}
    needs = {job.makes: {n.makes for n in needed(job, everything[:i])} for i, job in enumerate(everything)}
    waiting = [job for job in todo if job.makes not in finished]
    running: dict[str, tuple[Job, subprocess.Popen, float]] = {}
    print(f"{len(todo) - len(waiting)} of {len(todo)} jobs are done; logs in {Path(out) / 'logs'}", flush=True)
    begin, guessed, total = time.perf_counter(), 0.0, sum(job.seconds for job in waiting)
    try:
        while waiting or running:
            ready = [job for job in waiting if needs[job.makes] <= finished]
            while ready and len(running) < at_a_time:
                job = ready.pop(0)
                waiting.remove(job)
                running[job.makes] = (job, start(job, out), time.perf_counter())
            time.sleep(0.05)
            for makes, (job, process, since) in list(running.items()):
                if process.poll() is None:
                    continue
                del running[makes]
                if process.returncode:
                    raise failed(job, out)
                spent = time.perf_counter() - since
                finish(job, out, marks[makes], spent)
                finished.add(makes)
                guessed += job.seconds
                passed = time.perf_counter() - begin
                left = max(0.0, passed * (total - guessed) / guessed)
                number = len(todo) - len(waiting) - len(running)
                text = f"[{number}/{len(todo)}, {passed / 60:.0f} min, about {left / 60:.0f} left]"
                print(f"{text} {spent:.0f} s: {typed(job)}", flush=True)
    finally:
        for _, process, _ in running.values():
            process.kill()


def with_needs(chosen: list[Job], everything: list[Job]) -> list[Job]:
    """The chosen jobs and all that they need, in order."""
    wanted = {job.makes for job in chosen}
    for i in range(len(everything) - 1, -1, -1):
        if everything[i].makes in wanted:
            wanted |= {need.makes for need in needed(everything[i], everything[:i])}
    return [job for job in everything if job.makes in wanted]


def run(config: Config) -> dict:
    check_ranges(config)
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
        from study.figures import draw  # matplotlib takes a second to import, and the jobs don't need it

        results = gather(size, out)
        print_results(results)
        aside = Path(out) if config.quick else Path()  # what is committed is not overwritten by a quick run
        path = aside / "results.json" if config.quick else Path("study/results.json")
        path = path if config.results == "auto" else Path(config.results)
        write_json(results, path)
        tables.write(results, f"{aside / 'docs/study.md'}", "" if config.quick else "docs/experiments.md")
        draw(results, str(aside / "assets") if config.assets == "auto" else config.assets)
        print(f"{path}: the numbers")
    return {"jobs": len(chosen)}


def main() -> None:
    os.chdir(Path(__file__).resolve().parent.parent)  # the commands are those of the repository's folder
    run_main(run, Config, __doc__)


if __name__ == "__main__":
    main()
