"""Is a run that was killed, at whatever moment, and then resumed the same as the run that nobody disturbed?

    python tests/kill_and_resume.py                                       # every stage, each killed in 40 runs
    python tests/kill_and_resume.py --stages ppo dpo --kills 200 --seed 7

Each stage runs once unbroken at a tiny size. Then it is started again and again and killed (SIGKILL: no handler, no
`finally`, as when the machine goes down) at a random moment, or in the middle of the save that follows it (every third
run), resumed, perhaps killed again, resumed again. In the end the weights of model.pt must be bit-equal to the unbroken
run's, metrics.jsonl and results.json equal apart from the clock. Exit status 1 if anything differs.

- Killed before the first state was saved, there is nothing to resume: `resume` must be refused by a message of one line
  that changes no file, and the run starts afresh.
- Every second run starts in a folder where the finished run of another seed stands: nothing of it may come back, and
  until the new run has saved a state of its own, to resume must be refused.
- To resume a run that has finished must change no byte.
- Collecting rankings has no state: killed and started again, it must write the very same file.

The children are forked from a server that has imported torch ("forkserver", so not on Windows), with one thread each.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import importlib
import json
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import collect
import data.tiny
import dpo
import grpo
import ppo
import reward_model
import sft
from lib.cli import UserError

STAGES = ["sft", "collect", "reward_model", "ppo", "grpo", "dpo"]  # each reads what those before it have written
# Imported before the fork; torch._dynamo because making an optimiser imports it. The project's own import is quick.
PRELOAD = ["torch", "torch._dynamo", "pytest", "tiktoken", "tqdm"]
LONGEST = 300.0  # seconds after which an undisturbed child is taken to hang


def configs(work: Path) -> dict:
    """Tiny configurations. They write to run/STAGE and read what the unbroken runs left in unbroken/STAGE."""
    d, before, out = work / "data", work / "unbroken", work / "run"
    rankings = str(before / "collect" / "rankings.jsonl")
    training = {"warmup": 4, "log_every": 1, "save_every": 2, "device": "cpu"}
    return {
        "sft": sft.Config(
            data=str(d / "demonstrations.jsonl"),
            held_out_data=str(d / "demonstrations_held_out.jsonl"),
            out_dir=str(out / "sft"),
            n_layer=1,
            n_head=2,
            n_embd=16,
            dropout=0.1,  # so that torch's generator has to be restored too
            batch_size=8,
            epochs=2,
            eval_every=7,
            **training,
        ),
        "collect": collect.Config(
            policies=[str(before / "sft")],
            prompts=str(d / "prompts.jsonl"),
            n_prompts=32,
            batch_size=4,
            max_new_tokens=12,
            out=str(out / "collect" / "rankings.jsonl"),
            device="cpu",
        ),
        "reward_model": reward_model.Config(
            policy=str(before / "sft"),
            data=rankings,
            held_out_data=rankings,
            prompts=str(d / "prompts.jsonl"),
            out_dir=str(out / "reward_model"),
            batch_size=4,
            epochs=2,
            normalise_samples=16,
            max_new_tokens=12,
            **training,
        ),
        "ppo": ppo.Config(
            policy=str(before / "sft"),
            reward=[str(before / "reward_model")],
            prompts=str(d / "prompts.jsonl"),
            out_dir=str(out / "ppo"),
            iterations=8,
            rollouts=8,
            minibatch=4,
            max_new_tokens=12,
            kl_target=3.0,  # so that the controller's coefficient has to be restored too
            ptx_coef=0.1,
            ptx_data=str(d / "demonstrations.jsonl"),
            # so that a run is also resumed amid the iterations its results are means of
            **{**training, "save_every": 1},
        ),
        "grpo": grpo.Config(
            policy=str(before / "sft"),
            reward=[str(before / "reward_model")],
            prompts=str(d / "prompts.jsonl"),
            out_dir=str(out / "grpo"),
            iterations=8,
            rollouts=8,
            group=4,
            minibatch=4,
            max_new_tokens=12,
            **{**training, "save_every": 1},
        ),
        "dpo": dpo.Config(
            policy=str(before / "sft"),
            data=rankings,
            held_out_data=rankings,
            out_dir=str(out / "dpo"),
            batch_size=4,
            epochs=2,
            max_new_tokens=12,
            **training,
        ),
    }


MODULES = {"sft": sft, "collect": collect, "reward_model": reward_model, "ppo": ppo, "grpo": grpo, "dpo": dpo}


def function_of(module):
    """What a script does: train(config), or run(config) where nothing is trained."""
    return getattr(module, "train", None) or module.run


# ------------------------------------------------------------------------------------------------ child processes


@dataclasses.dataclass
class End:
    """How a child ended: by itself, killed, refusing (a UserError), or crashing."""

    killed: bool = False
    refused: str = ""
    crashed: str = ""
    seconds: float = 0.0


def child(module_name: str, config, log: str, connection) -> None:
    """In the child process: run the stage; what it prints goes to the file `log`."""
    with open(log, "w", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    from tqdm import tqdm

    # its own lock is a semaphore of the system's, which a killed process leaves behind
    tqdm.set_lock(threading.RLock())
    torch.set_num_threads(1)
    module = importlib.import_module(module_name)
    connection.send("ready")  # the clock runs from here: start-up is not what is being tested
    try:
        function_of(module)(config)
    except UserError as error:
        connection.send(str(error))
        sys.exit(2)


def unfinished(folder: Path) -> dict[str, bytes]:
    """Files that are being saved: they have a name that ends in .tmp until they are whole."""
    return {path.name: path.read_bytes() for path in folder.glob("*.tmp")}


def stamps(folder: Path | None) -> dict[str, tuple[int, int]]:
    """Size and time of every file that is saved as a whole; they change as soon as one is being written."""
    found = {}
    for path in folder.glob("*") if folder is not None else []:
        with contextlib.suppress(FileNotFoundError):  # renamed meanwhile
            if path.name != "metrics.jsonl":
                found[path.name] = (path.stat().st_size, path.stat().st_mtime_ns)
    return found


def run_child(stage: str, config, log: Path, kill_after: float | None = None, amid_save: Path | None = None) -> End:
    """Run the stage in a child process, and kill it after so many seconds unless it has ended by then; with a folder
    `amid_save`, not at once but as soon as a file is being saved there."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=child, args=(MODULES[stage].__name__, config, str(log), sender))
    process.start()
    sender.close()
    try:
        receiver.recv()
        start = time.perf_counter()
        process.join(LONGEST if kill_after is None else kill_after)
        seen = stamps(amid_save)
        while amid_save is not None and process.is_alive() and stamps(amid_save) == seen:
            time.sleep(0.0001)
        process.kill()  # SIGKILL; no effect if it has ended
        process.join()
        end = End(seconds=time.perf_counter() - start)
        if process.exitcode == 2:
            end.refused = receiver.recv()
        elif process.exitcode == -9 and kill_after is not None:
            end.killed = True
        elif process.exitcode != 0:
            end.crashed = f"exit status {process.exitcode}: {log.read_text(encoding='utf-8')[-2000:]}"
        return end
    except EOFError:  # it ended without a word
        process.join()
        return End(crashed=f"exit status {process.exitcode}: {log.read_text(encoding='utf-8')[-2000:]}")
    finally:
        receiver.close()
        if process.is_alive():  # interrupted
            process.kill()
            process.join()


# ------------------------------------------------------------------------------------------------ comparing


def is_timing(name: str) -> bool:
    return name == "seconds" or name.startswith("share_") or name.endswith("_per_s")


def read_weights(folder: Path) -> dict:
    return torch.load(folder / "model.pt", map_location="cpu", weights_only=True)["weights"]


def read_metrics(folder: Path) -> list[dict]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{k: v for k, v in row.items() if not is_timing(k)} for row in rows]


def read_results(folder: Path) -> dict:
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    return {k: v for k, v in results.items() if not k.startswith("seconds")}


def differences(stage: str, folder: Path, unbroken: Path) -> list[str]:
    """What in `folder` is not as the unbroken run left it."""
    if stage == "collect":
        same = (folder / "rankings.jsonl").read_bytes() == (unbroken / "rankings.jsonl").read_bytes()
        return [] if same else ["rankings.jsonl: not the same bytes"]
    missing = [n for n in ("model.pt", "metrics.jsonl", "results.json") if not (folder / n).exists()]
    if missing:
        return [f"{name}: not there" for name in missing]
    found = []
    ours, theirs = read_weights(folder), read_weights(unbroken)
    differ = [k for k in theirs if k not in ours or not torch.equal(ours[k], theirs[k])]
    if differ or len(ours) != len(theirs):
        found.append(f"model.pt: {len(differ)} of {len(theirs)} tensors differ")
    ours, theirs = read_metrics(folder), read_metrics(unbroken)
    if ours != theirs:
        steps = [[row.get("step") for row in rows] for rows in (ours, theirs)]
        if steps[0] != steps[1]:
            found.append(f"metrics.jsonl: the lines have the steps {steps[0]}, not {steps[1]}")
        else:
            line, a, b = next((n, a, b) for n, (a, b) in enumerate(zip(ours, theirs, strict=True), 1) if a != b)
            keys = [k for k in {**a, **b} if a.get(k) != b.get(k)]
            found.append(f"metrics.jsonl: line {line} differs in {', '.join(keys)}")
    ours, theirs = read_results(folder), read_results(unbroken)
    if ours != theirs:
        keys = [k for k in {**theirs, **ours} if ours.get(k) != theirs.get(k)]
        shown = ", ".join(f"{k} {str(ours.get(k))[:30]} instead of {str(theirs.get(k))[:30]}" for k in keys[:2])
        found.append(
            f"results.json: {len(keys)} of {len(theirs)} entries differ: {shown}{', ...' if len(keys) > 2 else ''}"
        )
    return found


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())} if folder.exists() else {}


# ------------------------------------------------------------------------------------------------ one stage


def replace_folder(source: Path | None, target: Path) -> None:
    """Make `target` a copy of `source`, or remove it."""
    shutil.rmtree(target, ignore_errors=True)
    if source is not None:
        shutil.copytree(source, target)


def run_unbroken(stage: str, config, work: Path, kept: Path) -> float:
    """Run the stage to its end and keep its folder -> seconds it took."""
    replace_folder(None, work / "run" / stage)
    end = run_child(stage, config, work / "log")
    if end.refused or end.crashed:
        raise RuntimeError(f"the unbroken run of {stage} failed: {end.refused or end.crashed}")
    replace_folder(work / "run" / stage, kept)
    return end.seconds


def prepare(work: Path) -> dict[str, float]:
    """Data, and the unbroken run of every stage -> seconds each of them took."""
    sizes = {"demonstrations": 96, "held_out_demonstrations": 16, "prompts": 48, "held_out_prompts": 16}
    with contextlib.redirect_stdout(None):
        function_of(data.tiny)(data.tiny.Config(out_dir=str(work / "data"), **sizes))
    made = configs(work)
    return {stage: run_unbroken(stage, made[stage], work, work / "unbroken" / stage) for stage in STAGES}


def state_of(folder: Path, other: Path) -> int | None:
    """The step at which this run can be resumed; None without a state, or with none but the one from the other run; -1
    if the state is damaged."""
    path = folder / "state.pt"
    if not path.exists() or ((other / "state.pt").exists() and path.read_bytes() == (other / "state.pt").read_bytes()):
        return None
    try:
        return torch.load(path, map_location="cpu", weights_only=True)["step"]
    except Exception:  # torch raises many kinds
        return -1


def interrupted_run(
    stage: str, config, work: Path, moments: list[float], dirty: bool, amid_save: bool, kills: collections.Counter
) -> list[str]:
    """One run that is killed at these moments (seconds after each start) and resumed until it ends -> what is wrong.
    dirty: it starts in the folder of another run. amid_save: the first kill waits for the next save."""
    folder, unbroken, other = (work / name / stage for name in ("run", "unbroken", "other"))
    replace_folder(other if dirty else None, folder)
    last_step = None if stage == "collect" else torch.load(unbroken / "state.pt", weights_only=True)["step"]
    wrong, resume, moments = [], False, list(moments)
    while True:
        if stage == "collect":
            now = config
            has_state = False
        else:
            now = dataclasses.replace(config, resume=resume)
            has_state = state_of(folder, other) is not None
        before = contents(folder)
        end = run_child(stage, now, work / "log", moments[0] if moments else None, folder if amid_save else None)
        if end.crashed:
            return [*wrong, f"crashed with {end.crashed}"]
        if end.refused:
            if not resume:
                return [*wrong, f"a fresh start was refused: {end.refused}"]
            if has_state:
                wrong.append(f"refused to resume, though there is a state: {end.refused}")
            if "\n" in end.refused:
                wrong.append(f"the refusal has several lines: {end.refused!r}")
            changed = [n for n, content in contents(folder).items() if before.get(n) != content]
            if changed:
                wrong.append(f"refused to resume, but wrote {', '.join(changed)}")
            resume = False
            continue
        if resume and not has_state and not end.killed:
            wrong.append("resumed without a state, instead of refusing")
        if not moments:
            return wrong + differences(stage, folder, unbroken)
        if state_of(folder, other) == -1:
            return [*wrong, "left a state.pt that can't be loaded"]
        moments.pop(0)
        amid_save = False
        kills["saving"] += any(content != before.get(name) for name, content in unfinished(folder).items())
        if stage == "collect":
            written = contents(folder).get("rankings.jsonl", b"").count(b"\n")
            whole = (unbroken / "rankings.jsonl").read_bytes().count(b"\n")
            kills["before" if not written else "after" if written == whole else "during"] += 1
        else:
            step = state_of(folder, other)
            kills["before" if step is None else "after" if step == last_step or not end.killed else "during"] += 1
        resume = stage != "collect"


def check_stage(stage: str, work: Path, seconds: float, kills: int, seed: int) -> tuple[list[str], collections.Counter]:
    """Kill `kills` runs of the stage -> (what is wrong, when the kills fell)."""
    config, counter = configs(work)[stage], collections.Counter()
    folder, unbroken = work / "run" / stage, work / "unbroken" / stage
    wrong = []

    # the end of the unbroken run, resumed: not a byte may change
    replace_folder(unbroken, folder)
    end = run_child(stage, config if stage == "collect" else dataclasses.replace(config, resume=True), work / "log")
    before, after = contents(unbroken), contents(folder)
    changed = [name for name in {**before, **after} if before.get(name) != after.get(name)]
    found = [text for text in (end.refused, end.crashed) if text] or [f"{name}: changed" for name in changed]
    wrong += [f"resumed after its end: {text}" for text in found]

    if stage != "collect":  # a file of rankings is appended to, whatever the seed
        run_unbroken(stage, dataclasses.replace(config, seed=config.seed + 1), work, work / "other" / stage)
    rng = random.Random(f"{seed} {stage}")
    parts = rng.sample(range(kills), kills)  # one first kill in each of `kills` equal parts: uniform, and spread
    for n, part in enumerate(parts):
        first = seconds * (part + rng.random()) / kills
        again = [seconds / 2 * rng.random() for _ in range(rng.choice([0, 0, 1, 2]))]  # what is left is shorter
        amid_save = stage != "collect" and n % 3 == 2
        dirty = stage != "collect" and n % 2 == 1
        found = interrupted_run(stage, config, work, [first, *again], dirty, amid_save, counter)
        moments = ", ".join(f"{m:.2f}" for m in (first, *again))
        where = f"run {n + 1}, killed after {moments} s of {seconds:.2f}"
        where += (" (first amid a save)" if amid_save else "") + (", in another run's folder" if dirty else "")
        wrong += [f"{where}: {text}" for text in found]
    return wrong, counter


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES, help="default: all")
    parser.add_argument("--kills", type=int, default=40, help="runs to kill, in each stage (default: 40)")
    parser.add_argument("--seed", type=int, default=1, help="of the moments (default: 1)")
    parser.add_argument("--show", type=int, default=10, help="findings to print, of each stage (default: 10)")
    args = parser.parse_args(argv)
    bad = False
    with tempfile.TemporaryDirectory(prefix="kill_and_resume_") as folder:
        work = Path(folder)
        seconds = prepare(work)
        for stage in args.stages:
            start = time.perf_counter()
            wrong, kills = check_stage(stage, work, seconds[stage], args.kills, args.seed)
            verdict = f"{len(wrong)} FINDINGS" if wrong else "all equal to the unbroken run"
            print(
                f"{stage}: {args.kills} runs, killed {kills['before']} times before the first state, {kills['during']} "
                f"during and {kills['after']} after the last ({kills['saving']} amid a save): {verdict} "
                f"({time.perf_counter() - start:.0f} s; unbroken {seconds[stage]:.2f} s)",
                flush=True,
            )
            for text in wrong[: args.show]:
                print(f"    {text}")
            bad = bad or bool(wrong)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
