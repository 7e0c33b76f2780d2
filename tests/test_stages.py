"""What every training stage must do, whichever it is: stages.py holds the table of how to start each one small."""

from __future__ import annotations

import contextlib
import functools
import importlib
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys

import pytest
import torch
from helpers import (
    EOS,
    ROOT,
    TOY,
    assert_same_weights,
    beside_a_demo,
    checkpoint,
    make_told,
    plain_sgd,
    read_lines,
    strict_json,
    write_lines,
)
from stages import (
    CPU,
    DEMONSTRATIONS,
    STAGES,
    asked,
    demonstrations,
    die_after_state,
    on_task,
    reward_file,
    run,
    same_figures,
    settings,
    steady_policy,
    toy_policy,
    watching,
)
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import lib.run
from lib.checkpoint import load_file, load_model
from lib.cli import TrainConfig, UserError
from model import GPT, Block, ScalarModel

every_stage = pytest.mark.parametrize("stage", STAGES)
learns_from_files = pytest.mark.parametrize("stage", [name for name, s in STAGES.items() if not s.rollouts])
samples = pytest.mark.parametrize("stage", [name for name, s in STAGES.items() if s.rollouts])
has_a_reference = pytest.mark.parametrize("stage", [name for name, s in STAGES.items() if s.reference])


def test_no_stage_is_forgotten():
    """A new stage that stands in the root and not in the table: nothing below would be asked of it."""
    scripts = [path.stem for path in ROOT.glob("*.py")]
    modules = {name: importlib.import_module(name) for name in scripts}
    trains = {n for n, m in modules.items() if hasattr(m, "Config") and issubclass(m.Config, TrainConfig)}
    assert trains == set(STAGES)


def length_of(stage: str, n: int) -> dict:
    """The flag that makes a run of this stage n epochs, or n iterations, long."""
    return {STAGES[stage].longer: n}


def one_step(stage: str, n: int = 1) -> dict:
    """n epochs or iterations of one optimiser step each, on all items."""
    once = {"minibatch": 12, "ppo_epochs": 1} if STAGES[stage].rollouts else {}
    return {**length_of(stage, n), **once}


def files_of(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ------------------------------------------------------------------------------------------------ what a run leaves


@every_stage
def test_a_run_leaves_the_files_of_the_contract(tmp_path, stage):
    """A file that the next stage or --resume needs and that is missing, a .tmp file that stays, numpy or a class of the
    project's in a checkpoint (weights_only=True reads it all), NaN in a file that other readers take for JSON."""
    results, model, log = run(stage, tmp_path)
    out = tmp_path / "out"
    names = ["config.json", "metrics.jsonl", "model.pt", "results.json", "state.pt"]
    assert sorted(path.name for path in out.iterdir()) == names
    assert strict_json(out / "results.json") == results and results["gates"] == [] and results["seconds"] >= 0
    config = strict_json(out / "config.json")
    assert all(config[name] in (value, [value]) for name, value in settings(stage, tmp_path).items())
    assert [row["step"] for row in log] == list(range(1, len(log) + 1))
    content = load_file(out / "model.pt")
    assert set(content) == {"kind", "config", "tokenizer", "made", "weights"}
    assert content["tokenizer"] == "toy" and content["kind"] == STAGES[stage].kind
    made = content["made"]
    assert made == {"script": f"{stage}.py", "config": config, "task": ""}
    assert load_file(out / "state.pt")["step"] == log[-1]["step"]
    assert all(p.isfinite().all() for p in model.parameters())
    if STAGES[stage].rollouts:  # what part of an iteration's seconds each part took
        assert all(
            sum(v for k, v in row.items() if k.startswith("share_")) == pytest.approx(1, abs=1e-5) for row in log
        )
    for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        json.loads(line, parse_constant=pytest.fail)


@every_stage
def test_the_log_and_the_states_come_as_often_as_asked(tmp_path, stage):
    """--log_every and --save_every that are ignored, or count from another step; the last step is always logged and
    saved."""
    seen: list[int] = []
    replace = os.replace

    def note(source, target):
        replace(source, target)
        if str(target).endswith("state.pt"):
            seen.append(load_file(target)["step"])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", note)
        log = run(stage, tmp_path, **one_step(stage, 7), log_every=3, save_every=2).log
    assert seen == [2, 4, 6, 7]
    if STAGES[stage].rollouts:  # every iteration is logged; --log_every is about printed samples
        assert [row["step"] for row in log] == [1, 2, 3, 4, 5, 6, 7]
    else:
        first = [] if stage == "sft" else [1]
        assert [row["step"] for row in log] == [*first, 3, 6, 7]


@every_stage
@pytest.mark.parametrize("lr", [1e20, 1e39], ids=["the loss", "the weights"])
def test_a_run_that_blows_up_stops_and_leaves_no_model(tmp_path, stage, lr):
    """NaN or inf is saved as a model, and the next stage starts from it: one line says what happened instead. After a
    single step is the subtle case: its loss was still finite. What was logged before is kept."""
    several = {"ppo_epochs": 3} if STAGES[stage].rollouts else {"epochs": 5}
    says = "loss is .* lower --lr" if lr < 1e38 else "weights are not finite.* lower --lr|learned nothing"
    with pytest.raises(UserError, match=says) as error:
        run(stage, tmp_path, **one_step(stage) | (several if lr < 1e38 else {}), lr=lr)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out" / "model.pt").exists() and not (tmp_path / "out" / "results.json").exists()
    if lr > 1e38 or not STAGES[stage].rollouts:
        assert read_lines(tmp_path / "out" / "metrics.jsonl")


# ------------------------------------------------------------------------------------------------ resuming


@every_stage
@pytest.mark.parametrize("train_layers", [0, 1])
def test_a_resumed_run_equals_the_unbroken_one(tmp_path, stage, train_layers):
    """Killed after a saved state and resumed, with half a line in its log and torch's generator elsewhere, a run ends
    with the same weights to the bit and the same log and results. An optimiser that starts anew, a data position or a
    KL coefficient that is lost, dropout of other draws, a common trunk that is common no more."""
    start = toy_policy(dropout=0.1, n_layer=3)
    changes = {"model": start, **one_step(stage, 8), "train_layers": train_layers}
    changes |= {"dropout": 0.1} if stage == "sft" else {}
    if stage == "ppo":
        mine = write_lines(tmp_path / "mine.jsonl", demonstrations(DEMONSTRATIONS))
        changes |= {"kl_target": 3.0, "ptx_coef": 0.1, "ptx_data": mine}
        changes |= {"reward": checkpoint(tmp_path / "rm", ScalarModel.from_gpt(start))}
    whole = run(stage, tmp_path / "whole", **changes)
    die_after_state(stage, tmp_path / "broken", 6, save_every=6, **changes)
    with open(tmp_path / "broken" / "out" / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 7, "loss"')  # a line that the crash cut short
    torch.manual_seed(12345)
    with watching() as watch:
        resumed = run(stage, tmp_path / "broken", save_every=6, resume=True, **changes)
    assert len(watch.steps) == 2
    for (name, a), b in zip(resumed.model.state_dict().items(), whole.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert same_figures(resumed.log) == same_figures(whole.log)
    assert same_figures([resumed.results]) == same_figures([whole.results])


@every_stage
def test_a_finished_run_goes_on_for_longer_or_is_left_as_it_is(tmp_path, stage):
    """Resumed as it was, not a byte changes and nothing is computed. With more epochs or iterations what was logged
    stays, and the new steps follow."""
    first = run(stage, tmp_path, **one_step(stage, 2))
    before = files_of(tmp_path / "out")
    with watching() as watch:
        again = run(stage, tmp_path, **one_step(stage, 2), resume=True)
    assert again.results == first.results and files_of(tmp_path / "out") == before
    assert not watch.steps
    with watching() as watch:
        longer = run(stage, tmp_path, **one_step(stage, 4), resume=True)
    assert len(watch.steps) == 2 and same_figures(longer.log)[:2] == same_figures(first.log)
    assert [row["step"] for row in longer.log] == [1, 2, 3, 4]
    if "score" in longer.results:
        assert longer.results["score"] == pytest.approx(longer.log[3]["score"], abs=1e-6)


@every_stage
def test_a_state_belongs_to_its_configuration(tmp_path, stage):
    """Going on from one run's weights with another learning rate, seed, start or data gives neither run, and a run that
    shrinks has done more than it was asked for: refused, the flag named, no byte changed. A run that is started anew
    has no results of the one before; the model stays until there is a new one: a mistyped flag must not cost it."""
    changes = {**one_step(stage, 2), "save_every": 1}
    if STAGES[stage].rollouts:
        rewards = [f"{reward_file(tmp_path)}:{name}" for name in ("letters", "stops")]
        changes["reward"] = rewards
    run(stage, tmp_path, **changes)
    before = files_of(tmp_path / "out")
    flag, start, longer = STAGES[stage].data, STAGES[stage].start, STAGES[stage].longer
    other = write_lines(tmp_path / "other.jsonl", read_lines(settings(stage, tmp_path)[flag]))
    changed = {"lr": 1e-4, "seed": 2, "grad_clip": 0.5, "warmup": 1, longer: 1, flag: other}
    changed[start] = checkpoint(tmp_path / "elsewhere", toy_policy())
    changed |= {"reward": rewards[::-1]} if "reward" in changes else {}
    for name, value in changed.items():
        with pytest.raises(UserError, match=rf"state\.pt was saved with --{name} ") as error:
            run(stage, tmp_path, **changes | {name: value}, resume=True)
        assert "\n" not in str(error.value) and files_of(tmp_path / "out") == before
    die_after_state(stage, tmp_path, 1, **changes | {"seed": 2})
    assert not (tmp_path / "out" / "results.json").exists() and (tmp_path / "out" / "model.pt").exists()


# ------------------------------------------------------------------------------------------------ what stops a run


@contextlib.contextmanager
def at_update(do, number: int, register=register_optimizer_step_pre_hook):
    """`do()` is called in the middle of the step, before an optimiser's update of this number (from 1), or after it."""
    counted = itertools.count(1)
    handle = register(lambda *_: do() if next(counted) == number else None)
    try:
        yield
    finally:
        handle.remove()


def same_end(one, other) -> None:
    """Two runs have ended with the same weights to the bit, the same log and results."""
    for (name, a), b in zip(one.model.state_dict().items(), other.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert same_figures(one.log) == same_figures(other.log)
    assert same_figures([one.results]) == same_figures([other.results])


def state_of(folder) -> int | None:
    """The number of steps that a run can go on from."""
    path = folder / "out" / "state.pt"
    return load_file(path)["step"] if path.exists() else None


@every_stage
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_stops_a_run_when_its_step_is_whole(tmp_path, stage, name, request):
    """Ctrl-C, a cluster that takes its machine back, or a connection that is lost, with default flags: nothing that was
    done is lost, and the run goes on as if nothing had been. The second signal doesn't wait: amid a step the state is
    that of the one before."""
    if not hasattr(signal, name):
        pytest.skip("Windows")
    number, changes = signal.Signals[name], {**one_step(stage, 5), "model": toy_policy(dropout=0.1)}
    before = signal.signal(number, lambda *_: None)  # a run that doesn't mind it must not end the tests
    request.addfinalizer(lambda: signal.signal(number, before))
    whole = run(stage, tmp_path / "whole", **changes)
    stop = functools.partial(os.kill, os.getpid(), number)
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, number)]
    with at_update(stop, 3), pytest.raises(SystemExit) as end:
        run(stage, tmp_path, **changes)
    assert end.value.code == 128 + number and state_of(tmp_path) == 3
    assert "3 of 5 steps are saved" in end.value.last_words and "--resume" in end.value.last_words
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, number)] == handlers
    changes |= {"resume": True}
    with at_update(lambda: (stop(), stop()), 1), pytest.raises(KeyboardInterrupt) as at_once:
        run(stage, tmp_path, **changes)
    assert at_once.value.args == (128 + number,)
    assert state_of(tmp_path) == 3 and not (tmp_path / "out" / "results.json").exists()
    same_end(run(stage, tmp_path, **changes), whole)


@every_stage
def test_an_error_costs_no_step_that_was_whole(tmp_path, stage):
    """A file that is gone, memory that is full, at the start of a step: nothing is lost. Amid its update the weights
    are neither the old nor the new ones: such a state would be resumed without a word."""
    changes = {**one_step(stage, 4), "model": toy_policy(dropout=0.1)}
    whole = run(stage, tmp_path / "whole", **changes)

    def fails(*_, **__):
        raise MemoryError

    with monkeypatched(torch.optim.Optimizer, "zero_grad", fails, at=3), pytest.raises(MemoryError) as error:
        run(stage, tmp_path, **changes)
    assert state_of(tmp_path) == 2 and "2 of 4 steps" in error.value.last_words
    with at_update(fails, 2, register_optimizer_step_post_hook), pytest.raises(MemoryError):
        run(stage, tmp_path, **changes, resume=True)
    assert state_of(tmp_path) == 2
    same_end(run(stage, tmp_path, **changes, resume=True), whole)


@contextlib.contextmanager
def monkeypatched(owner, name: str, instead, at: int):
    """The call of this number (from 1) of owner.name does something else."""
    counted, real = itertools.count(1), getattr(owner, name)

    def called(*args, **kwargs):
        return (instead if next(counted) == at else real)(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        for kind in (owner, torch.optim.Adam, torch.optim.AdamW):
            if name in vars(kind):
                patch.setattr(kind, name, called)
        yield


@every_stage
def test_states_come_by_the_clock(tmp_path, stage, monkeypatch):
    """A run of hours with default flags that a power cut ends: every five minutes a state, and not after every step."""
    clock, saved = [1000.0], []
    monkeypatch.setattr(lib.run.time, "monotonic", lambda: clock[0])
    real = lib.run.atomic_save
    monkeypatch.setattr(lib.run, "atomic_save", lambda state, path: (saved.append(state["step"]), real(state, path)))
    handle = register_optimizer_step_pre_hook(lambda *_: clock.append(clock.pop() + 110))
    try:
        run(stage, tmp_path, **one_step(stage, 8))
        assert saved == [3, 6, 8]
        saved.clear()
        run(stage, tmp_path, **one_step(stage, 8), save_minutes=0)
        assert saved == [8]
    finally:
        handle.remove()


@every_stage
def test_an_unfinished_run_is_not_overwritten(tmp_path, stage):
    """--resume forgotten: the night's work was gone at once."""
    changes = {**one_step(stage, 3), "save_every": 1}
    die_after_state(stage, tmp_path, 2, **changes)
    before = files_of(tmp_path / "out")
    with pytest.raises(UserError, match=r"unfinished run.*--resume.*--overwrite"):
        run(stage, tmp_path, **changes)
    assert files_of(tmp_path / "out") == before
    anew = run(stage, tmp_path, **changes, overwrite=True)
    same_end(run(stage, tmp_path, **changes), anew)  # and a finished one is replaced as ever


@every_stage
def test_one_job_a_folder(tmp_path, stage):
    """Two jobs whose logs and states are mixed, both with status 0. One that is dead holds nothing."""
    (tmp_path / "out").mkdir()
    held = "import sys, lib.run, pathlib\nwith lib.run.hold(pathlib.Path(sys.argv[1])): print(1, flush=True), input()"
    command = [sys.executable, "-c", held, str(tmp_path / "out" / "lock")]
    other = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert other.stdout.readline().strip() == b"1"
    with pytest.raises(UserError, match="another process"):
        run(stage, tmp_path)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["lock"]
    other.kill()
    other.wait()
    other.stdin.close(), other.stdout.close()
    run(stage, tmp_path)
    assert not (tmp_path / "out" / "lock").exists()


@every_stage
def test_a_full_disk_costs_neither_model_nor_state(tmp_path, stage, monkeypatch, capsys):
    """The last save fails, and with it hours of work; half a file that keeps the disk full."""
    changes = {**one_step(stage, 4), "save_every": 2}
    whole = run(stage, tmp_path / "whole", **changes)
    real, full = torch.save, set()

    def save(obj, path):
        kind = "state" if "step" in obj else "model"
        if kind in full and obj.get("step") != 2 and path.parent == tmp_path / "out":
            path.write_bytes(b"half a fi")
            raise RuntimeError("PytorchStreamWriter failed writing file: file write failed")
        real(obj, path)

    monkeypatch.setattr(torch, "save", save)
    full.add("state")  # the model fits, and the run has ended well
    same_end(run(stage, tmp_path, **changes), whole)
    assert state_of(tmp_path) == 2 and not list(tmp_path.rglob("*.tmp"))
    assert "no state was saved after step 4" in capsys.readouterr().out
    full.add("model")  # nothing fits: one line, and what was saved stays
    with pytest.raises(UserError, match=r"model\.pt: can't be written .*full") as error:
        run(stage, tmp_path, **changes, overwrite=True)
    assert "2 of 4 steps" in error.value.last_words
    assert state_of(tmp_path) == 2 and not list(tmp_path.rglob("*.tmp"))
    full.clear()
    same_end(run(stage, tmp_path, **changes, resume=True), whole)


REWARD = """
import math, pathlib, sys
def reward(prompts, completions):
    rewards = [0.1 * len(c) for c in completions]
    calls = pathlib.Path(__file__).with_suffix(".calls")
    calls.write_text((calls.read_text() if calls.exists() else "") + "x")
    {trouble}
    return rewards
"""
TROUBLES = {
    "raises": "if len(calls.read_text()) > 2: rewards[0] / 0",
    "nan": "if len(calls.read_text()) > 2: rewards[1] = math.nan",
    "exits": "if len(calls.read_text()) > 2: sys.exit(0)",
}


@samples
@pytest.mark.parametrize("trouble", TROUBLES)
def test_a_reward_function_that_fails_costs_nothing(tmp_path, stage, trouble):
    """In the third of five iterations: an exception, a nan, sys.exit(0), which ended the run with status 0 and no
    model. What was done is kept, and mended the run goes on as if nothing had been."""
    file = tmp_path / "mine.py"
    file.write_text(REWARD.format(trouble="pass"), encoding="utf-8")
    changes = {**one_step(stage, 5), "reward": f"{file}:reward", "rollouts": 12}
    whole = run(stage, tmp_path / "whole", **changes)
    (tmp_path / "mine.calls").unlink()
    file.write_text(REWARD.format(trouble=TROUBLES[trouble]), "utf-8")
    with pytest.raises(UserError, match=r"mine\.py:reward .*(for the completion|on \d+ samples)") as error:
        run(stage, tmp_path, **changes)
    assert "\n" not in str(error.value) and "2 of 5 steps" in error.value.last_words
    file.write_text(REWARD.format(trouble="pass"), encoding="utf-8")
    same_end(run(stage, tmp_path, **changes, resume=True), whole)


@samples
def test_the_second_signal_ends_a_reward_function(tmp_path, stage):
    """One that waits for a judge over the network. It was taken for a failure of the function, which was then called
    again on ever fewer samples, and the status was that of a user's mistake."""
    file = tmp_path / "mine.py"
    trouble = 'if len(calls.read_text()) > 1: __import__("os").kill(__import__("os").getpid(), 2); sys.stdout.flush()'
    file.write_text(REWARD.format(trouble=trouble + "; " + trouble.partition(": ")[2]), encoding="utf-8")
    with pytest.raises(KeyboardInterrupt) as error:
        run(stage, tmp_path, **one_step(stage, 5), reward=f"{file}:reward", rollouts=12)
    assert error.value.args == (130,) and "1 of 5 steps" in error.value.last_words
    assert len((tmp_path / "mine.calls").read_text()) == 2


# ------------------------------------------------------------------------------------------------ the steps


@every_stage
def test_micro_batches_change_memory_and_nothing_else(tmp_path, monkeypatch, float64, stage):
    """A mean of the means of micro-batches, weights or figures that depend on how a step is split, gradients that pile
    up: the same weights and the same log, to rounding, whatever --micro_batch is."""
    plain_sgd(monkeypatch)
    start = toy_policy()
    changes = {**length_of(stage, 2), "lr": 0.02 if stage != "dpo" else 2e-3}
    whole, *others = (run(stage, tmp_path, start, micro_batch=size, **changes) for size in (0, 1, 2))
    before = start if STAGES[stage].kind == "gpt" else run(stage, tmp_path, start, lr=0.0).model
    for other in others:
        assert_same_weights(other.model, whole.model, before)
        for row, expected in zip(same_figures(other.log), same_figures(whole.log), strict=True):
            assert row == pytest.approx(expected, abs=2e-6)


@every_stage
@pytest.mark.parametrize("limit", [0.0, 0.01])
def test_gradients_are_clipped_when_they_are_there_and_before_the_step(tmp_path, stage, limit):
    """Clipping before the backward pass or after the step, one norm for two networks, and a limit of 0, which is none:
    taken for a largest norm it would train nothing. Of the gradients that the optimiser finds, PPO's pretraining term
    among them. What is logged is the norm before clipping."""
    changes = {"ptx_coef": 0.5} if stage == "ppo" else {}
    write_lines(tmp_path / "demonstrations.jsonl", demonstrations(DEMONSTRATIONS))
    with watching() as watch:
        log = run(stage, tmp_path, **one_step(stage, 2), grad_clip=limit, lr=1e-3, **changes).log
    for step, row in zip(watch.steps, log, strict=True):
        networks = step.norms if len(STAGES[stage].rates) > 1 else [step.norm]
        assert row["grad_norm"] > 0.02
        if limit:
            assert networks == pytest.approx([limit] * len(networks), rel=1e-3)
        else:
            assert networks[0] == pytest.approx(row["grad_norm"], rel=1e-4)


@every_stage
def test_the_learning_rate_warms_up_and_decays(tmp_path, stage):
    """A schedule that is logged and not used, or used for one of two networks: up in two steps, then half a cosine or a
    straight line down."""
    rates = dict(zip(STAGES[stage].rates, (4e-4, 1e-3), strict=False))
    with watching() as watch:
        log = run(stage, tmp_path, **one_step(stage, 6), warmup=2, **rates).log
    factors = [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    if STAGES[stage].decay == "cosine":
        factors[3:] = [0.5 * (1 + math.cos(math.pi * done)) for done in (0.25, 0.5, 0.75)]
    peaks = list(rates.values()) * (len(watch.steps[0].rates) // len(rates))  # a network may have several groups
    assert [row["lr"] for row in log] == pytest.approx([4e-4 * f for f in factors], abs=1e-6)
    for step, factor in zip(watch.steps, factors, strict=True):
        assert step.rates == pytest.approx([peak * factor for peak in peaks], rel=1e-12)


@every_stage
def test_the_optimiser_is_built_with_these_arguments(tmp_path, stage):
    """A decay that nobody asked for (AdamW's own is 0.01), --weight_decay that is ignored, other betas or another eps:
    the loss falls all the same, a little worse. Every parameter of the network stands in one group."""
    name, betas, eps, decays = STAGES[stage].optimiser
    with watching() as watch:
        run(stage, tmp_path, **one_step(stage), **({"weight_decay": 0.3} if any(decays) else {}))
    optimizer = watch.steps[0].optimizer
    assert type(optimizer).__name__ == name
    for group, decay in zip(optimizer.param_groups, decays, strict=True):
        assert (group["betas"], group["eps"], group["weight_decay"]) == (betas, eps, decay)
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    networks = {p.network for p in watch.training()}
    assert len(held) == len(set(held)) and set(held) == {id(p) for net in networks for p in net.parameters()}
    if stage == "sft":
        assert {p.dim() >= 2 for p in optimizer.param_groups[0]["params"]} == {True}
        assert {p.dim() >= 2 for p in optimizer.param_groups[1]["params"]} == {False}


# ------------------------------------------------------------------------------------------------ the order


def numbered(stage: str, lengths: list[int]) -> list[dict]:
    """Items with a prompt of two letters of its own each, and answers of these lengths."""
    prompts = [TOY.decode([1 + i // 20, i % 20]) for i in range(len(lengths))]
    if stage == "sft":
        return demonstrations([(p, "a" * n) for p, n in zip(prompts, lengths, strict=True)])
    rows = zip(prompts, lengths, strict=True)
    return [{"prompt": p, "chosen": "a" * n, "rejected": "b" * n} for p, n in rows]


def items_of_steps(watch) -> list[list[str]]:
    """The prompts of the items of every step, sorted."""
    return [sorted(t[:2] for p in watch.of_step(i) for t in p.texts()) for i in range(len(watch.steps))]


@learns_from_files
def test_every_item_once_an_epoch_in_a_fresh_order(tmp_path, stage):
    """The same order in every epoch, a remainder that is dropped, a seed that orders nothing."""
    rows, orders = numbered(stage, [1] * 11), []
    for seed in (1, 2):
        with watching() as watch:
            run(stage, tmp_path, rows=rows, batch_size=4, micro_batch=2, epochs=3, seed=seed, lr=0.0)
        steps = items_of_steps(watch)
        assert [len(step) for step in steps] == [4, 4, 3] * 3
        epochs = [steps[i : i + 3] for i in (0, 3, 6)]
        assert all(sorted(itertools.chain(*epoch)) == [row["prompt"] for row in rows] for epoch in epochs)
        orders += epochs
    assert all(a != b for a, b in itertools.combinations(orders, 2))


@learns_from_files
def test_a_step_holds_items_of_all_lengths(tmp_path, stage):
    """Steps of similar lengths: a token of a short answer would weigh several times one of a long answer, and the
    decay of the learning rate, and each step's clipping, would fall on one length alone. Steps of 8 items sorted by
    length have 1 to 24 times as many tokens as the shortest, random ones about as many as any other."""
    rows = numbered(stage, [1 + i % 24 for i in range(96)])
    tokens = {row["prompt"]: len(row.get("completion", row.get("chosen"))) for row in rows}
    start = toy_policy(n_layer=1, block_size=32)
    with watching() as watch:
        run(stage, tmp_path, start, rows, batch_size=8, lr=0.0, epochs=2)
    sums = [sum(tokens[prompt] for prompt in step) for step in items_of_steps(watch)]
    assert len(sums) == 2 * 12 and max(sums) < 3 * min(sums)


@learns_from_files
def test_micro_batches_hold_little_filler(tmp_path, stage):
    """Within a step the order changes no gradient, so items of similar length go together: no other split of the
    step's items has less filler."""
    rows = numbered(stage, [1 + 7 * i % 17 for i in range(16)])
    # of a row: the prompt, and every answer with its EOS
    sizes = {row["prompt"]: 2 + sum(len(row[k]) + 1 for k in row if k != "prompt") for row in rows}
    with watching() as watch:
        run(stage, tmp_path, toy_policy(block_size=40), rows, batch_size=8, micro_batch=2, lr=0.0)
    assert len(watch.steps) == 2
    for number in range(2):
        passes = watch.of_step(number)
        lens = sorted(sizes[text[:2]] for p in passes for text in p.texts())
        assert len(lens) == 8 and len(passes) == 4
        assert sum(p.tokens.numel() for p in passes) == 2 * sum(lens[1::2])


@samples
def test_every_rollout_is_used_once_an_epoch_in_a_fresh_order(tmp_path, stage):
    """A remainder that is dropped where the minibatch doesn't divide the rollouts, one permutation for all epochs or
    all iterations, prompts or samples that are the same in every iteration. At a learning rate of 0 nothing else could
    make them differ."""
    with watching() as watch:
        run(stage, tmp_path, lr=0.0, iterations=2)
    calls = asked(tmp_path)
    assert len(watch.steps) == 2 * 2 * 3  # iterations, epochs, minibatches of 5, 5 and 2
    orders = []
    for iteration, call in enumerate(calls):
        texts = [(p + c).rstrip(TOY.decode([EOS])) for p, c in zip(call.prompts, call.completions, strict=True)]
        for epoch in range(2):
            numbers = range(6 * iteration + 3 * epoch, 6 * iteration + 3 * epoch + 3)
            steps = [sorted(t for p in watch.of_step(i, GPT) for t in p.texts()) for i in numbers]
            assert [len(step) for step in steps] == [5, 5, 2]
            assert sorted(itertools.chain(*steps)) == sorted(texts)
            orders.append([sorted(texts.index(text) for text in step) for step in steps])
    assert all(a != b for a, b in itertools.combinations(orders, 2))
    assert calls[0].prompts != calls[1].prompts and calls[0].completions != calls[1].completions


@samples
def test_samples_are_new_in_every_iteration_and_of_the_seed(tmp_path, stage):
    """The same luck in every iteration, or whatever the seed is. With one prompt and a learning rate of 0 nothing else
    could make the texts differ."""
    for folder, seed in (("a", 1), ("b", 1), ("c", 2)):
        run(stage, tmp_path / folder, rows=[{"prompt": "abc"}], iterations=2, lr=0.0, seed=seed)
    a, b, c = ([call.completions for call in asked(tmp_path / folder)] for folder in "abc")
    assert a == b and a[0] != a[1] and a[0] != c[0]


@samples
def test_every_prompt_is_asked_in_time(tmp_path, stage):
    """Prompts of the first --rollouts rows alone, the same ones in every iteration, or whatever the seed is."""
    rows = [{"prompt": TOY.decode([i, i])} for i in range(12)]
    few = {"rollouts": 4, "minibatch": 4, "ppo_epochs": 1, "iterations": 30, "max_new_tokens": 1}
    few |= {"group": 2} if stage == "grpo" else {}
    for folder, seed in (("a", 1), ("b", 2)):
        run(stage, tmp_path / folder, toy_policy(n_layer=1), rows, lr=0.0, seed=seed, save_every=30, **few)
    a, b = ([call.prompts for call in asked(tmp_path / folder)] for folder in "ab")
    assert set(itertools.chain(*a)) == {row["prompt"] for row in rows}
    assert a != b and len(set(map(tuple, a))) > 20


@samples
def test_samples_are_drawn_at_the_temperature_from_the_whole_vocabulary(tmp_path, stage):
    """A temperature that is not passed on, top-k or top-p in rollouts: the policy sampled from is not the one that is
    scored, and KL turns negative. Of a policy whose next token has the same known distribution everywhere: each token's
    share within 4.5 standard errors."""
    logits = [3.0, 2.0, 1.0, *[0.0] * 19, 1.0]
    few = {"minibatch": 240, "micro_batch": 0, "ppo_epochs": 1}
    run(stage, tmp_path, steady_policy(logits), rollouts=240, iterations=1, lr=0.0, temperature=0.7, **few)
    (call,) = asked(tmp_path)
    written = [
        i
        for text, ended in zip(call.completions, call.ended, strict=True)
        for i in [*TOY.encode(text), EOS][: len(text) + ended]
    ]
    probabilities = (torch.tensor(logits) / 0.7).softmax(0).tolist()
    assert len(written) > 1000
    for token, p in enumerate(probabilities):
        share = written.count(token) / len(written)
        assert abs(share - p) < 4.5 * math.sqrt(p * (1 - p) / len(written)), token


# ----------------------------------------------------------------------------------------------- memory and speed


@every_stage
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_dtype_is_that_of_the_products(tmp_path, stage, dtype):
    """--dtype that is ignored in training, in sampling or in scoring: the run is merely slow. The weights stay float32,
    and a little rounding changes the first step's figures by little."""
    changes = {}
    if STAGES[stage].rollouts:
        scorer = checkpoint(tmp_path / "rm", make_told(2, block_size=24))
        changes["reward"] = [scorer, f"{reward_file(tmp_path)}:letters"]
    if stage == "ppo":
        mine = write_lines(tmp_path / "mine.jsonl", demonstrations(DEMONSTRATIONS))
        changes |= {"ptx_coef": 0.5, "ptx_data": mine}
    with watching() as watch:
        _, model, log = run(stage, tmp_path, **one_step(stage), **changes, dtype=dtype)
    wanted = getattr(torch, dtype)
    assert watch.products[True] == {wanted}
    if STAGES[stage].rollouts or stage == "reward_model":  # whose samples and scores are in it too
        assert watch.products[False] == {wanted}
    if "reward" in changes:  # a function of the user's own is called without autocast
        assert not any(call.autocast for call in asked(tmp_path))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert {p.dtype for p in watch.steps[0].optimizer.param_groups[0]["params"]} == {torch.float32}
    exact = run(stage, tmp_path / "exact", **one_step(stage), **changes).log[0]
    assert (log[0]["grad_norm"] != exact["grad_norm"]) == (dtype == "bfloat16")
    if not STAGES[stage].rollouts:
        assert log[0]["loss"] == pytest.approx(exact["loss"], rel=0.05)


@every_stage
def test_every_block_is_compiled(tmp_path, monkeypatch, stage):
    """--compile that is ignored or leaves one of the networks as it was; or a graph of a whole network, which gives its
    parameters other names."""
    compiled: list[torch.nn.Module] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, *_, **__: compiled.append(self))
    run(stage, tmp_path)
    assert not compiled
    with watching() as watch:
        run(stage, tmp_path, compile=True)
    assert all(type(module) is Block for module in compiled) and len(compiled) == len(set(compiled))
    networks = {p.network for p in (watch.passes if STAGES[stage].rollouts else watch.training())}
    assert {m for network in networks for m in network.modules() if isinstance(m, Block)} <= set(compiled)


@every_stage
def test_every_trained_block_is_recomputed(tmp_path, stage):
    """--recompute that is ignored or leaves a network out: out of memory where it was asked for. Every block that is
    trained runs once more in each backward pass, and the run is the same to the last bit."""
    runs, logs = [], []
    for recompute in (False, True):
        with watching() as watch:
            logs.append(same_figures(run(stage, tmp_path, **one_step(stage), recompute=recompute).log))
        trained = [m for p in watch.training() for m in p.network.modules() if isinstance(m, Block)]
        runs.append(len(watch.block_runs))
    assert runs[1] == runs[0] + len(trained) and trained
    assert logs[0] == logs[1]


@every_stage
def test_train_layers_trains_exactly_the_last_blocks(tmp_path, monkeypatch, float64, stage):
    """--train_layers that is ignored, that freezes too much or too little, or frozen weights that decay all the same.
    What is trained takes the very step that it takes in a run that trains everything."""
    start = toy_policy(n_layer=3)
    decay = {"weight_decay": 0.1} if any(STAGES[stage].optimiser[3]) else {}
    before = dict(run(stage, tmp_path, start, **one_step(stage), lr=0.0).model.named_parameters())
    for n, blocks in ((2, "h.1. h.2."), (1, "h.2.")):
        above = ("ln_f.", "gpt.ln_f.", "head.", "block.", "ln.", "direction", *blocks.split())
        above += tuple(f"gpt.{block}" for block in blocks.split())
        after = run(stage, tmp_path, start, **one_step(stage), train_layers=n, **decay).model
        moved = {name for name, p in after.named_parameters() if not torch.equal(p, before[name])}
        assert moved == {name for name in before if name.startswith(above)}
    plain_sgd(monkeypatch)
    some, everything = (run(stage, tmp_path, start, **one_step(stage), train_layers=n).model for n in (1, 0))
    for (name, a), b in zip(some.named_parameters(), everything.parameters(), strict=True):
        if name.startswith(above):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")
    with pytest.raises(UserError, match="--train_layers 4: the model has 3 blocks"):
        run(stage, tmp_path, start, train_layers=4)


@has_a_reference
def test_frozen_blocks_never_run_with_gradients(tmp_path, stage):
    """With --train_layers what the frozen blocks say of a text is the same for policy and reference and in every pass
    over it: computed again in every update, it is most of the time that the flag should save."""
    with watching() as watch:
        run(stage, tmp_path, toy_policy(n_layer=3), train_layers=1)
    (policy,) = {p.network for p in watch.training(GPT)}
    runs = {block for block, gradients in watch.block_runs if gradients}
    assert [block in runs for block in policy.h] == [False, False, True]


@every_stage
def test_dropout_is_on_in_training_where_it_belongs_and_off_elsewhere(tmp_path, stage):
    """Dropout in evaluation, sampling or a reference: a figure that depends on chance. None in training, after an
    evaluation in the middle of it for example: a flag that does nothing. PPO, GRPO and DPO compare two networks, so
    they train without."""
    changes = {} if STAGES[stage].rollouts else {"held_out": STAGES[stage].rows}
    changes |= {"dropout": 0.5, "eval_every": 1} if stage == "sft" else {}
    with watching() as watch:
        log = run(stage, tmp_path, toy_policy(dropout=0.5), **one_step(stage, 3), lr=0.0, **changes).log
    assert {p.dropout for p in watch.training()} == {STAGES[stage].dropout}
    assert not any(p.dropout for p in watch.passes if not p.training)
    losses = [row["loss"] for row in log if "loss" in row]
    if losses:  # on the same batch three times: the order of the rows alone differs
        assert (max(losses) - min(losses) > 1e-4) == STAGES[stage].dropout


@has_a_reference
def test_the_reference_stays_frozen(tmp_path, stage):
    """A reference that shares storage with what is trained, or learns along: the KL penalty would hold nothing."""
    start = toy_policy()
    with watching() as watch:
        after = run(stage, tmp_path, start, lr=1e-2).model
    trained = {p.network for p in watch.training()}
    (reference,) = {p.network for p in watch.passes if isinstance(p.network, GPT)} - trained
    storages = {p.data_ptr() for network in trained for p in network.parameters()}
    for (name, p), original in zip(reference.named_parameters(), start.parameters(), strict=True):
        assert torch.equal(p, original), name
        assert not p.requires_grad and p.grad is None and p.data_ptr() not in storages
    assert not torch.equal(after.wte.weight, start.wte.weight)


# ------------------------------------------------------------------------------------------------ whose data it is


@learns_from_files
def test_held_out_figures_are_those_of_the_held_out_data(tmp_path, float64, stage):
    """Figures of the training data under the name of held-out ones, or of a policy before the last step: the same data
    as training data and held out, and then other data that says the contrary."""
    rows = numbered(stage, [2] * 6)
    other = [
        {**row, "completion": "bb"} if stage == "sft" else {**row, "chosen": "bb", "rejected": "aa"} for row in rows
    ]
    changes = {**one_step(stage, 15), "lr": 5e-3, "micro_batch": 64}
    same, contrary = (run(stage, tmp_path, rows=rows, held_out=held_out, **changes) for held_out in (rows, other))
    assert all(torch.equal(a, b) for a, b in zip(same.model.parameters(), contrary.model.parameters(), strict=True))
    if stage == "sft":
        assert contrary.results["held_out_loss"] > same.results["held_out_loss"] + 1
    else:
        assert (same.results["accuracy"], contrary.results["accuracy"]) == (1.0, 0.0)
        assert contrary.results["loss"] > same.results["loss"]
    # of a large file all rows count: at its end, too
    mixed = run(stage, tmp_path, rows=rows, held_out=rows * 90 + other * 10, **changes).results
    loss = "held_out_loss" if stage == "sft" else "loss"
    wanted = 0.9 * same.results[loss] + 0.1 * contrary.results[loss]
    assert mixed[loss] == pytest.approx(wanted, abs=1e-6) and mixed.get("accuracy", 0.9) == pytest.approx(0.9)


@learns_from_files
def test_samples_are_of_the_held_out_prompts_and_of_the_seed(tmp_path, capsys, stage):
    """Samples, EOS rates and KL of training prompts, which the policy may know by heart, of three prompts in the place
    of all, or of one seed for ever. The reward model, which has no samples to show, is normalised on prompts of its
    own."""
    rows, held_out = numbered(stage, [2] * 12)[:4], numbered(stage, [2] * 12)[5:]
    texts = []
    for seed in (1, 2):
        with watching() as watch:
            run(stage, tmp_path, toy_policy(block_size=64), rows, held_out, seed=seed, lr=0.0)
        said = capsys.readouterr().out
        if stage == "reward_model":  # what it scores: held-out rankings, and behind them its own samples
            scored = [p.texts() for p in watch.passes if not p.training and isinstance(p.network, ScalarModel)]
            read = {text[0] for text in itertools.chain(*scored[:1])}
            assert read == set("abcdefgh")
            texts.append((scored[0],))
        else:
            prompts = [p for p in watch.passes if not p.training and p.tokens.size(1) == 2]  # what is sampled from
            assert {text for p in prompts for text in p.texts()} == {row["prompt"] for row in held_out}
            lines = [line for line in said.splitlines() if "' -> '" in line]
            texts.append((lines[:3], lines[-3:]))  # those of the middle of a run, and of its end
    assert all(a != b for a, b in zip(*texts, strict=True)) and len(texts[0][0]) >= 3


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_of_many_held_out_prompts_256_are_asked(tmp_path, stage):
    """An EOS rate of a handful of samples, whose error is larger than what its gate would notice."""
    held_out = numbered(stage, [1] * 300)
    with watching() as watch:
        run(stage, tmp_path, toy_policy(block_size=64), held_out=held_out, epochs=1, lr=0.0)
    read = [p.texts() for p in watch.passes if not p.training and p.tokens.size(1) == 2]
    assert {text for texts in read for text in texts} == {row["prompt"] for row in held_out[:256]}


@samples
def test_samples_are_printed_with_the_reward_s_own_number(tmp_path, capsys, stage):
    """A score less the penalty for what was cut, or another row's: a reader judges the reward by what is printed. Three
    samples of the first iteration, and then of every --log_every-th."""
    run(stage, tmp_path, steady_policy([0.0] * 22 + [1.5]), iterations=5, log_every=2, eos_penalty=5.0)
    said = re.findall(r"^  \[([+-][\d.]+)\] '(\w+)' -> '(\w*)'$", capsys.readouterr().out, re.M)
    calls = [asked(tmp_path)[i] for i in (0, 1, 3, 4)]  # 1st, 2nd, 4th, and the last
    wanted = [row for call in calls for row in list(zip(call.prompts, call.completions, strict=True))[:3]]
    assert not all(itertools.chain(*(call.ended[:3] for call in calls)))
    assert [(f"{c.count('a') + 0.1 * len(p):+.2f}", p, c) for p, c in wanted] == said


@samples
def test_the_logged_figures_of_the_samples_are_counted(tmp_path, stage):
    """A score less its penalty, sums under the name of means, figures of a part: of each iteration's own texts, as the
    reward function was asked for them."""
    gold = f"{reward_file(tmp_path)}:variety"
    log = run(stage, tmp_path, steady_policy([0.0] * 22 + [1.5]), gold=gold, eos_penalty=5.0).log
    for row, call in zip(log, asked(tmp_path), strict=True):
        answers = list(zip(call.prompts, call.completions, call.ended, strict=True))
        scores = [c.count("a") + 0.1 * len(p) for p, c, _ in answers]
        penalised = [score - 5.0 * (not e) for score, e in zip(scores, call.ended, strict=True)]
        counted = {
            "score": scores,
            "gold": [len(set(c)) + 0.5 * e for _, c, e in answers],
            "length": [len(c) + e for _, c, e in answers],
            "eos_rate": [float(e) for e in call.ended],
        }
        means = {k: sum(x) / 12 for k, x in counted.items()} | {"distinct": len(set(call.completions)) / 12}
        assert {k: row[k] for k in means} == pytest.approx(means, abs=1e-5)
        assert row["objective"] == pytest.approx(sum(penalised) / 12 - row["kl_coef"] * row["kl"], abs=1e-5)
        assert row["kl_coef"] == 0.2
    assert min(row["eos_rate"] for row in log) < 1  # some were cut


@every_stage
@pytest.mark.parametrize("vocabulary", ["tiny", "bytes"])
@pytest.mark.parametrize("own", [True, False])
def test_the_task_is_known_by_its_data_not_by_the_vocabulary(tmp_path, capsys, stage, vocabulary, own):
    """Own data in the tiny vocabulary got the embedded task's gates, so that a good run FAILED; the task's data in
    another vocabulary lost them. A policy of the embedded task on own data is rarely meant, and noted; sft.py is there
    to teach it something else."""
    results = run(stage, tmp_path, **on_task(stage, tmp_path, own, vocabulary)).results
    said = capsys.readouterr().out
    assert len(results["gates"]) == said.count("GATE") == (0 if own else STAGES[stage].gates)
    assert ("NOTE" in said) == (own and stage != "sft")
    assert load_model(tmp_path / "out", CPU, STAGES[stage].kind).task == ("" if own else "tiny")
    own_name = {"sft": "SFT ", "reward_model": "RM ", "ppo": "PPO ", "grpo": "grpo ", "dpo": "DPO "}[stage]
    assert all(gate["name"].startswith(own_name) for gate in results["gates"])
    if not own:  # a failed gate is one of a resumed run too
        changes = on_task(stage, tmp_path, own, vocabulary)
        assert run(stage, tmp_path, **changes, resume=True).results == results


@samples
def test_only_the_usual_reward_of_the_task_is_judged(tmp_path, stage):
    """The expected ranges are those of one reward model, unweighted, on the embedded task: for any other reward a gate
    would fail, or pass, by accident."""
    changes = on_task(stage, tmp_path, own=False, vocabulary="bytes")
    usual, letters = changes.pop("reward"), f"{reward_file(tmp_path)}:letters"
    for other in (
        {"reward": letters},
        {"reward": [usual, letters]},
        {"reward": usual, "reward_weights": [2.0]},
    ):
        assert run(stage, tmp_path, **changes, **other, gold="").results["gates"] == [], other


@every_stage
def test_own_data_reads_no_file_of_the_demo(tmp_path, monkeypatch, capsys, stage):
    """With data of one's own the stage was judged on the demo's held-out data, or normalised on the demo's prompts, in
    silence. What lies beside the data is taken where it is there, and every file that is read is named."""
    own, opened = beside_a_demo(tmp_path, monkeypatch)
    changes = {} if STAGES[stage].rollouts else {"held_out_data": "auto"}
    changes |= {"prompts": "auto"} if stage == "reward_model" else {}
    flags = settings(stage, own, **changes)
    for left_over in ("held_out.jsonl", "prompts.jsonl"):
        if not STAGES[stage].rollouts:
            (own / left_over).unlink(missing_ok=True)
    data, start = flags[STAGES[stage].data], flags[STAGES[stage].start]
    module = STAGES[stage].module
    results = module.train(module.Config(**flags))
    said = capsys.readouterr().out
    assert f"{data}: " in said and f"{start}/model.pt: made by" in said and "accuracy" not in results
    assert "NOTE" not in said  # the policy isn't the demo's
    assert load_model(own / "out", CPU, STAGES[stage].kind).task == ""
    if not STAGES[stage].rollouts:
        assert "data_held_out.jsonl" in said  # what is missing is said
        twin = write_lines(own / "data_held_out.jsonl", read_lines(data)[:3])
        prompts = write_lines(own / "prompts.jsonl", [{"prompt": "ttt"}, {"prompt": "sss"}])
        results = module.train(module.Config(**flags))
        said = capsys.readouterr().out
        assert f"{twin}: 3 " in said and {"accuracy", "held_out_loss"} & set(results)
        assert (f"{prompts}: 2 prompts" in said) == (stage == "reward_model")
    assert opened == []


# ------------------------------------------------------------------------------------------------ refusals

REFUSED = {
    "every": [
        {"micro_batch": -1},  # range(0, n, -1) is empty: it would go through and learn nothing
        {"grad_clip": -1.0},  # would climb
        {"grad_clip": math.nan},
        {"lr": math.nan},
        {"lr": math.inf},
        {"seed": 2**64},
        {"seed": -1},
        {"train_layers": 3},
        {"train_layers": -1},
        {"warmup": 99},
        {"dtype": "float16"},
        {"log_every": 0},
    ],
    "sft": [{"epochs": 0}, {"batch_size": 0}, {"dropout": 1.0}],
    "reward_model": [{"epochs": 0}, {"normalise_samples": 1}, {"expectation": "perhaps"}],
    "ppo": [
        {"temperature": 0.0},
        {"minibatch": 13},
        {"minibatch": 0},
        {"lam": 1.1},
        {"gamma": -0.1},
        {"clip": 0.0},
        {"kl_coef": -0.1},
        {"rollouts": 0},
        {"max_new_tokens": 24},
        {"iterations": 0},
        {"kl_target": 4.0, "kl_coef": 0.0},  # a coefficient of 0 stays 0 whatever the target is
        {"kl_target": 4.0, "kl_horizon": 0.0},
        {"kl_target": -1.0},
        {"kl": "k4"},
        {"reward_combine": "product"},
        {"reward_weights": [1.0, 1.0]},
        {"reward_weights": [math.nan]},
        {"ptx_coef": 0.5},  # and no demonstrations beside the prompts
    ],
    "grpo": [
        {"rollouts": 10},  # no multiple of the group
        {"minibatch": 13},
        {"kl": "k1"},  # in the loss it has no gradient on average
        {"kind": "reinforce"},
        {"max_new_tokens": 24},
        {"iterations": 0},
    ],
    "dpo": [
        {"beta": 0.0},
        {"beta": math.inf},
        {"label_smoothing": 0.5},
        {"kind": "ipo", "label_smoothing": 0.1},
        {"kind": "hinge"},
        {"epochs": 0},
    ],
}


@pytest.mark.parametrize(
    ("stage", "changes"),
    [(stage, changes) for stage in STAGES for changes in (*REFUSED["every"], *REFUSED.get(stage, []))],
    ids=str,
)
def test_impossible_settings_are_refused(tmp_path, stage, changes):
    """A setting that can't work, or would be ignored, stops at once with one line that names its flag, before anything
    is written: not as a crash or as silent nonsense after the first step."""
    with pytest.raises(UserError) as error:
        run(stage, tmp_path, **changes)
    assert "\n" not in str(error.value)
    assert any(f"--{name}" in str(error.value) for name in changes)
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_says_what_block_size_has_cut(tmp_path, capsys, stage):
    """A long answer had taken the place of the question, and a stage said only that a text was cut."""
    question, answer = "abc" * 7, "defg" * 8  # 21 and 32 tokens, in a block of 24
    rows = {"sft": [{"prompt": question, "completion": answer}]}.get(stage)
    rows = rows or [
        {"prompt": question} if STAGES[stage].rollouts else {"prompt": question, "chosen": answer, "rejected": "d"}
    ]
    run(stage, tmp_path, rows=rows)
    said = capsys.readouterr().out
    if STAGES[stage].rollouts:
        assert "1 of 1 prompts cut to their last 17 tokens" in said
    else:
        answers = 1 if stage == "sft" else 2
        assert "1 of 1 prompts lost their beginning, of 24 tokens for both" in said
        assert f"1 of {answers} answers lost their end, of 24 tokens for both" in said
