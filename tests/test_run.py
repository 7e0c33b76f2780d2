"""lib/run.py: a run's folder, what may be resumed and what not, its gates. The runs are sft.py's, in the toy language;
test_stages.py asks of every stage what all must do."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import strict_json
from stages import STAGES, die_after_state, run

import lib.run
import sft
from lib.cli import UserError
from lib.run import gate


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_write_json_leaves_no_half_file(tmp_path):
    """A crash in the middle leaves results.json and config.json as they were; and nan and inf, which are no JSON, are
    null, at any depth and in the log, too: other readers would stop there."""
    path = tmp_path / "deep" / "x.json"
    lib.run.write_json({"ü": [1, None], "deep": [{"x": math.nan}, (math.inf, -math.inf)]}, path)
    whole = {"ü": [1, None], "deep": [{"x": None}, [None, None]]}
    assert strict_json(path) == whole
    with pytest.raises(TypeError):
        lib.run.write_json({"a": object()}, path)
    assert strict_json(path) == whole and len(contents(tmp_path)) == 1
    log = lib.run.RunFolder(sft.Config(out_dir=str(tmp_path / "run"), warmup=0), 2)
    log.log(1, held_out_loss=math.nan)
    assert log.metrics.read_text(encoding="utf-8") == '{"step": 1, "held_out_loss": null}\n'


# ------------------------------------------------------------------------------------------------ resuming


def test_a_fresh_start_leaves_no_state_behind(tmp_path, monkeypatch):
    """Else a run that dies before its first save is resumed from the previous run's weights, under its own flags. The
    model stays until there is a new one."""
    run("sft", tmp_path)
    (tmp_path / "out" / "state.pt.tmp").write_bytes(b"half a state, of a run that was killed while it saved it")
    monkeypatch.setattr(torch.optim.AdamW, "zero_grad", lambda *_, **__: pytest.fail("and it dies at its first step"))
    with pytest.raises(pytest.fail.Exception):
        run("sft", tmp_path, seed=2)
    assert sorted(contents(tmp_path / "out")) == ["config.json", "metrics.jsonl", "model.pt"]
    assert (tmp_path / "out" / "metrics.jsonl").read_bytes() == b""
    with pytest.raises(UserError, match=r"state\.pt: no such file"):
        run("sft", tmp_path, seed=2, resume=True)


def test_what_changes_no_result_may_differ(tmp_path):
    """A run goes on on another device, with another rhythm of logs and states, or for longer; and elsewhere: out_dir
    names the place, not the run."""
    run("ppo", tmp_path, iterations=1)
    (tmp_path / "out").rename(tmp_path / "there")
    changed = {"device": "auto", "log_every": 7, "save_every": 1, "trace": True, "strict": True, "iterations": 2}
    changed["out_dir"] = str(tmp_path / "there")
    assert [row["step"] for row in run("ppo", tmp_path, resume=True, **changed).log] == [1, 2]
    found = strict_json(tmp_path / "there" / "config.json")
    assert {name: found[name] for name in changed} == changed


MAY_DIFFER = {"out_dir", "resume", "overwrite", "strict", "trace", "device", "log_every", "save_every", "save_minutes"}


@pytest.mark.parametrize("module", [s.module for s in STAGES.values()], ids=list(STAGES))
def test_what_changes_a_result_may_not_differ(module):
    """A run that goes on in bfloat16, with other layers trained or in other micro-batches, is neither run. Every flag,
    also one that is added tomorrow, is one of the few that change nothing, or refused."""
    saved = dataclasses.asdict(module.Config())
    for name in saved:
        config = module.Config()
        setattr(config, name, "another value")  # as if it could be one
        if name in MAY_DIFFER:
            lib.run.refuse_another_config({"config": saved}, config, Path("state.pt"))
        elif name in lib.run.MAY_GROW:
            for n, fits in ((saved[name] - 1, False), (saved[name] + 1, True)):
                setattr(config, name, n)
                with contextlib.nullcontext() if fits else pytest.raises(UserError, match=f"--{name} "):
                    lib.run.refuse_another_config({"config": saved}, config, Path("state.pt"))
        else:
            with pytest.raises(UserError, match=f"--{name} .* not another value"):
                lib.run.refuse_another_config({"config": saved}, config, Path("state.pt"))


def test_an_error_before_anything_is_saved_promises_nothing(tmp_path, monkeypatch):
    """ "0 of 3 steps are saved; go on with: --resume", and --resume says that there is no such file."""
    monkeypatch.setattr(torch.optim.AdamW, "zero_grad", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError) as error:
        run("sft", tmp_path)
    assert not hasattr(error.value, "last_words") and not (tmp_path / "out" / "state.pt").exists()


def test_on_a_full_disk_the_next_state_is_tried_when_it_is_time(tmp_path, monkeypatch, capsys):
    """A try, and a warning, after every step: by the clock the next one is five minutes later."""
    clock, tried = [0.0], []
    monkeypatch.setattr(lib.run.time, "monotonic", lambda: clock[0])

    def full(state, path):
        tried.append(state["step"])
        raise UserError("it is full")

    monkeypatch.setattr(lib.run, "atomic_save", full)
    folder = lib.run.RunFolder(sft.Config(out_dir=str(tmp_path), warmup=0), 12)
    for _ in folder.steps("test"):
        clock[0] += 110
    assert tried == [3, 6, 9] and capsys.readouterr().out.count("WARNING: no state was saved") == 3


def test_a_signal_in_the_last_step_stops_nothing(tmp_path):
    """All steps are done: what is left, the model and the results, is a matter of seconds."""
    folder = lib.run.RunFolder(sft.Config(out_dir=str(tmp_path), warmup=0), 2)
    with folder:
        for step in folder.steps("test"):
            if step == 1:
                os.kill(os.getpid(), signal.SIGTERM)
        folder.finish({})
    assert strict_json(tmp_path / "results.json")["seconds"] >= 0


def test_a_state_from_before_a_flag_existed_is_not_resumed(tmp_path):
    """What it was trained with is not known."""
    run("sft", tmp_path)
    state = torch.load(tmp_path / "out" / "state.pt", weights_only=True)
    del state["config"]["lr"]
    torch.save(state, tmp_path / "out" / "state.pt")
    with pytest.raises(UserError, match=r"state\.pt knows no --lr: .*start afresh"):
        run("sft", tmp_path, epochs=2, resume=True)


def test_what_is_no_state_is_not_resumed(tmp_path):
    """A model, a list, torn bytes: one line that names the file."""
    run("sft", tmp_path)
    path = tmp_path / "out" / "state.pt"
    whole = path.read_bytes()
    for content in ({"weights": torch.ones(2)}, [1, 2], None):
        torch.save(content, path) if content else path.write_bytes(whole[:300])
        before = contents(tmp_path / "out")
        with pytest.raises(UserError) as error:
            run("sft", tmp_path, resume=True)
        assert str(path) in str(error.value) and "\n" not in str(error.value)
        assert contents(tmp_path / "out") == before


def test_a_state_that_does_not_fit_is_not_resumed(tmp_path):
    """What the run started from was trained anew, with other sizes; or the results or the log are no longer whole: one
    line that names the file, where there was a traceback, at the end of all steps for the log."""
    run("sft", tmp_path, save_every=1)
    out = tmp_path / "out"
    state, results, log = ((out / name).read_bytes() for name in ("state.pt", "results.json", "metrics.jsonl"))
    (out / "results.json").write_bytes(results[:-5])
    with pytest.raises(UserError, match=r"results\.json: not valid JSON"):
        run("sft", tmp_path, resume=True)
    (out / "results.json").unlink()
    (out / "metrics.jsonl").write_bytes(log[:-5])
    with pytest.raises(UserError, match=r"metrics\.jsonl: gone or cut"):
        run("sft", tmp_path, resume=True)
    (out / "metrics.jsonl").write_bytes(log)
    for part in ("model", "optimizer"):
        content = torch.load(out / "state.pt", weights_only=True)
        content[part] = {} if part == "model" else content[part] | {"param_groups": []}
        torch.save(content, out / "state.pt")
        with pytest.raises(UserError, match=r"state\.pt doesn't fit this run; .*start afresh") as error:
            run("sft", tmp_path, resume=True)
        assert "\n" not in str(error.value)
        (out / "state.pt").write_bytes(state)
    assert run("sft", tmp_path, resume=True).results["gates"] == []


def test_resume_and_overwrite_together_are_refused(tmp_path):
    """They say opposite things; one of them would be ignored."""
    run("sft", tmp_path)
    before = contents(tmp_path / "out")
    with pytest.raises(UserError, match=r"--resume .*--overwrite .*one of the two"):
        run("sft", tmp_path, resume=True, overwrite=True)
    assert contents(tmp_path / "out") == before


def test_a_fresh_start_removes_nothing_but_its_own(tmp_path):
    """`--out_dir .` or one's home: half a state of ours goes, and no other program's temporary file. An empty name, as
    that of a variable that isn't set, is no folder."""
    (tmp_path / "out").mkdir()
    for name in ("thesis.tmp", "state.pt.tmp"):
        (tmp_path / "out" / name).write_text("work")
    run("sft", tmp_path)
    assert [p.name for p in (tmp_path / "out").glob("*.tmp")] == ["thesis.tmp"]
    with pytest.raises(UserError, match="--out_dir is empty"):
        run("sft", tmp_path, out_dir="")


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows")
def test_a_signal_that_is_ignored_stays_so(tmp_path):
    """nohup: the run is to outlive the terminal."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with lib.run.RunFolder(sft.Config(out_dir=str(tmp_path), warmup=0), 1) as folder:
            os.kill(os.getpid(), signal.SIGHUP)
        assert folder.stopped == 0
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(
    ("typed", "words", "told"),
    [
        (["python", "ppo.py"], ["--lr", "1e-4"], "python ppo.py --lr 1e-4 --resume"),
        (
            ["/a b/python3", "-u", "it's/ppo.py"],
            ["--overwrite", "--lr=1"],
            "'/a b/python3' -u 'it'\"'\"'s/ppo.py' --lr=1 --resume",
        ),
        (["python", "-m", "ppo"], ["--resume", "--policy", "a b"], "python -m ppo --policy 'a b' --resume"),
    ],
)
def test_the_command_that_goes_on_is_the_one_that_was_typed(monkeypatch, typed, words, told):
    """With the interpreter that was named: where only a virtual environment has torch, `python` is another one."""
    monkeypatch.setattr(sys, "orig_argv", [*typed, *words])
    monkeypatch.setattr(sys, "argv", ["/project/ppo.py", *words])
    assert lib.run.command("--resume") == told


def test_nothing_to_resume_writes_nothing(tmp_path):
    """--resume without a state: no folder, no config.json; one that stands there stays as it is. Nor without a log: the
    results are means over the whole of it."""
    with pytest.raises(UserError, match=r"state\.pt: no such file"):
        run("sft", tmp_path, resume=True)
    assert not (tmp_path / "out").exists()
    run("sft", tmp_path)
    for name, says in (("metrics.jsonl", r"metrics\.jsonl: gone"), ("state.pt", r"state\.pt: no such file")):
        (tmp_path / "out" / name).unlink()
        before = contents(tmp_path / "out")
        with pytest.raises(UserError, match=says):
            run("sft", tmp_path, resume=True)
        assert contents(tmp_path / "out") == before


def test_killed_before_its_results_a_run_is_not_done(tmp_path, capsys):
    """All steps done and the last state saved, but no results yet: the end of the run is still to come. And what stands
    there may be a shorter run's, which was made longer."""
    whole = run("sft", tmp_path / "whole", epochs=2)
    run("sft", tmp_path, epochs=1)
    die_after_state("sft", tmp_path, 2, epochs=2, resume=True)
    assert not (tmp_path / "out" / "results.json").exists()
    capsys.readouterr()
    ended = run("sft", tmp_path, epochs=2, resume=True)
    assert f"{tmp_path / 'out' / 'state.pt'}: 2 of 2 steps are done\n" in capsys.readouterr().out
    assert (tmp_path / "out" / "results.json").exists() and [row["step"] for row in ended.log] == [1, 2]
    for a, b in zip(ended.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_generator_of_a_gpu_is_part_of_the_state(tmp_path, monkeypatch):
    """Dropout on a GPU draws from the GPU's generator. A state goes from a machine with one to a machine without, and
    back."""
    given, state = [], torch.arange(16, dtype=torch.uint8)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda *device: state.clone())
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, *device: given.append(state))
    for epochs, there in enumerate((True, True, False, True), 1):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        run("sft", tmp_path, epochs=epochs, resume=epochs > 1)
        assert len(given) == (epochs > 1)  # the last is resumed from a state of a machine without
    assert torch.equal(given[0], state)


def test_a_warm_up_longer_than_the_run_is_refused(tmp_path):
    """The learning rate would never be reached. The figure that is needed is told, before anything is written."""
    with pytest.raises(UserError, match=r"--warmup 4 .* 3 steps"):
        run("sft", tmp_path, epochs=3, warmup=4)
    assert not (tmp_path / "out").exists()
    run("sft", tmp_path, epochs=3, warmup=3)


@pytest.mark.parametrize(
    ("stage", "name", "rates"),
    [("sft", "loss", {"lr": 1e20}), ("ppo", "policy_loss", {"lr": 1e20}), ("ppo", "value_loss", {"value_lr": 1e20})],
)
def test_a_loss_that_is_not_finite_ends_the_run(tmp_path, stage, name, rates):
    """Hours of nan are of no use, and their weights are no model: say at which step, and what to do."""
    longer = {"epochs": 3} if stage == "sft" else {"ppo_epochs": 3}
    with pytest.raises(UserError, match=rf"the {name} is (nan|-?inf) at step \d; lower --lr"):
        run(stage, tmp_path, **rates, **longer)


# ------------------------------------------------------------------------------------------------ gates


@pytest.mark.parametrize(
    ("value", "low", "high", "ok", "shown"),
    [
        (0.5, 0.4, 0.6, True, "0.500 (expected at default settings: 0.4 to 0.6)  OK"),
        (0.4, 0.4, 0.6, True, "OK"),
        (0.6, 0.4, 0.6, True, "OK"),
        (0.39996, 0.4, 0.6, False, "0.400 (expected at default settings: 0.4 to 0.6)  FAILED"),
        (0.60004, 0.4, 0.6, False, "FAILED"),
        (0.7, 0.4, 0.6, False, "0.700 (expected at default settings: 0.4 to 0.6)  FAILED"),
        (0.3, 0.4, math.inf, False, "(expected at default settings: at least 0.4)  FAILED"),
        (9.0, 0.4, math.inf, True, "(expected at default settings: at least 0.4)  OK"),
        (9.0, -math.inf, 5.0, False, "(expected at default settings: at most 5)  FAILED"),
        (math.nan, 0.4, 0.6, False, "FAILED"),
    ],
)
def test_gates(capsys, value, low, high, ok, shown):
    """The figure beside its expected range (need R3); nan passes no gate; what is returned is valid JSON."""
    result = gate("stage figure", value, low, high)
    line = capsys.readouterr().out
    assert result["ok"] is ok and result["name"] == "stage figure"
    assert line.startswith("GATE stage figure") and line.endswith(shown + "\n")
    assert result["low"] in (low, None) and result["high"] in (high, None)
    if math.isfinite(value):
        json.dumps(result, allow_nan=False)


def test_a_gate_shows_its_note(capsys):
    gate("figure", 0.5, 0.4, 0.6, "standard error 0.1")
    assert "(expected at default settings: 0.4 to 0.6; standard error 0.1)  OK" in capsys.readouterr().out


def test_the_last_quarter_of_a_run(capsys):
    """Means over the last quarter, not over all, nor the last row alone; a run of three rows has a last one. Gates are
    on these means."""
    history = [{"score": float(n), "kl": 10.0 * n, "eos_rate": 1.0} for n in range(8)]
    expected = (("score", "a score", 6.0, 7.0), ("kl", "a KL", 0.0, 60.0))
    results = lib.run.last_quarter(history, expected)
    assert (results["score"], results["kl"], results["eos_rate"]) == (6.5, 65.0, 1.0)
    assert [(g["name"], g["value"], g["ok"]) for g in results["gates"]] == [("a score", 6.5, True), ("a KL", 65, False)]
    assert "score 6.50 (0.00), kl 65.00 (0.00)" in capsys.readouterr().out
    assert lib.run.last_quarter(history[:3], ())["score"] == 2.0


def test_a_logged_figure_that_is_not_finite_is_null(tmp_path):
    """A gradient norm of inf, or an accuracy without pairs: NaN and Infinity are no JSON, and other readers stop
    there."""
    folder = lib.run.RunFolder(sft.Config(out_dir=str(tmp_path), warmup=0), 1)
    for _ in folder.steps("test"):
        folder.log(1, loss=1.0, accuracy=math.nan, grad_norm=math.inf)
    found = strict_json(tmp_path / "metrics.jsonl")
    assert (found["loss"], found["accuracy"], found["grad_norm"]) == (1.0, None, None)


def test_shares_of_a_step_s_time_by_hand(tmp_path, monkeypatch):
    """The seconds from the start of the step to the last lap, and what part of them each lap took: together 1."""
    folder = lib.run.RunFolder(sft.Config(out_dir=str(tmp_path), warmup=0), 2)
    times = iter([10.0, 12.0, 15.0, 20.0, 30.0, 31.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(times))
    steps = folder.steps("test")
    next(steps)
    for name in ("rollout", "score", "update"):
        folder.lap(name)
    folder.log(1)
    next(steps)  # the next one starts afresh
    folder.lap("rollout")
    folder.log(2)
    first, second = folder.history()
    assert first == {"step": 1, "seconds": 10.0, "share_rollout": 0.2, "share_score": 0.3, "share_update": 0.5}
    assert second == {"step": 2, "seconds": 1.0, "share_rollout": 1.0}
