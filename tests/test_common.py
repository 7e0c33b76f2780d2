"""common.py and the scripts' outside: command line, side effects, checkpoints, errors that users see, logs, schedule,
gates."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import os
import pickle
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from helpers import ROOT, make_gpt, make_scalar

import common
from common import (
    RunFolder,
    UserError,
    call_reward,
    check,
    flag,
    gate,
    generator_for,
    load_function,
    load_model,
    lr_at,
    parse_config,
    save_model,
)
from data.files import write_jsonl
from data.tokenizer import load_tokenizer

CPU = torch.device("cpu")
SCRIPTS = ("sft.py", "reward_model.py", "ppo.py", "dpo.py", "evaluate.py", "sample.py")
MODULES = ("data.tiny", "data.collect")
ENV = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "1000"}
ENV |= {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONIOENCODING": "utf-8"}


def config_of(script: str):
    return importlib.import_module(script.removesuffix(".py")).Config


# ------------------------------------------------------------------------------------------------ flags


@dataclass
class Flags:
    text: str = flag("abc", "some text, 100 % of it")
    n: int = flag(3, "a number")
    x: float = flag(0.5, "a real number")
    on: bool = flag(True, "a switch")
    off: bool = flag(False, "another")
    names: list[str] = flag(["a", "b"], "names")
    sizes: list[int] = flag([], "sizes")
    kind: str = flag("one", "a choice", choices=("one", "two"))


def parse(*argv: str) -> Flags:
    return parse_config(Flags, "description", list(argv))


@pytest.mark.parametrize(
    ("argv", "changed"),
    [
        ([], {}),
        (["--n", "7"], {"n": 7}),
        (["--n=7"], {"n": 7}),
        (["--n", "-7"], {"n": -7}),
        (["--x", "2"], {"x": 2.0}),
        (["--x=-1e-3"], {"x": -1e-3}),
        (["--text", ""], {"text": ""}),
        (["--text="], {"text": ""}),
        (["--text", "a b"], {"text": "a b"}),
        (["--no-on", "--off"], {"on": False, "off": True}),
        (["--on", "--no-off"], {}),
        (["--names", "x"], {"names": ["x"]}),
        (["--names=x"], {"names": ["x"]}),
        (["--names", "--n", "1"], {"names": [], "n": 1}),
        (["--sizes", "1", "2", "16"], {"sizes": [1, 2, 16]}),
        (["--kind", "two"], {"kind": "two"}),
    ],
)
def test_flags(argv, changed):
    """Both `--a 1` and `--a=1`, switches, lists, choices; every value has its field's type."""
    expected = {**dataclasses.asdict(Flags()), **changed}
    found = dataclasses.asdict(parse(*argv))
    assert found == expected and {k: type(v) for k, v in found.items()} == {k: type(v) for k, v in expected.items()}


@pytest.mark.parametrize(
    "line", ["--n 1.5", "--n", "--x abc", "--kind three", "--sizes 1 b", "--nonsense 1", "--nam x", "stray"]
)
def test_bad_flags_are_named(line, capsys):
    """Status 2 and the flag in question; abbreviations are refused, for they
    would change meaning when a flag is added."""
    with pytest.raises(SystemExit) as stop:
        parse(*line.split())
    assert stop.value.code == 2 and line.split()[0] in capsys.readouterr().err


def test_default_lists_are_not_shared():
    """A list default that one config changes must not change the next one's."""
    parse().names.append("c")
    Flags().names.append("d")
    assert parse().names == Flags().names == ["a", "b"]


def test_help_of_the_flags(capsys):
    """Each flag with its help (a percent sign too) and default."""
    with pytest.raises(SystemExit) as stop:
        parse("--help")
    shown = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0 and "100 % of it (default: abc)" in shown and "names (default: a b)" in shown
    assert "sizes (default: none)" in shown and "{one,two}" in shown and "--no-on" in shown


@pytest.mark.parametrize("script", [*SCRIPTS, *MODULES])
def test_every_flag_is_documented(script):
    """Each Config field has a help text, a default, and a type that the command line can give."""
    fields = dataclasses.fields(config_of(script))
    assert len(fields) >= 6
    for f in fields:
        assert len(f.metadata.get("help", "")) > 3, f.name
        assert f.default is not dataclasses.MISSING or f.default_factory is not dataclasses.MISSING, f.name
        assert f.type in ("str", "int", "float", "bool", "list[str]", "list[int]", "list[float]"), (f.name, f.type)
        choices = f.metadata["choices"]
        assert choices is None or f.default in choices, f.name


# --------------------------------------------------------------------------------------------- the scripts from outside

# Runs many command lines in one process (importing torch takes seconds), each as `python X.py ...` would be: under
# __main__, with its own argv, output and exit status. argv[0] that ends in .py is a file, any other a module.
DRIVER = """
import contextlib, io, json, runpy, sys, traceback
import torch
root, results = sys.argv[1], []
for argv in json.loads(sys.stdin.read()):
    out, err, status = io.StringIO(), io.StringIO(), 0
    torch.set_grad_enabled(True)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            if argv[0].endswith(".py"):
                sys.argv = [argv[0], *argv[1:]]
                runpy.run_path(root + "/" + argv[0], run_name="__main__")
            else:
                sys.argv = [root + "/" + argv[0].replace(".", "/") + ".py", *argv[1:]]
                imported = sys.modules.pop(argv[0], None)  # or runpy warns that the module runs twice
                runpy.run_module(argv[0], run_name="__main__")
        except SystemExit as stop:
            status = stop.code or 0
        except BaseException:
            status = 1
            traceback.print_exc()
    if not argv[0].endswith(".py") and imported:
        sys.modules[argv[0]] = imported
    results.append([status, out.getvalue(), err.getvalue()])
sys.__stdout__.write(json.dumps(results))
"""


def drive(cases: list[list[str]], cwd: Path) -> list[tuple[int, str, str]]:
    command = [sys.executable, "-c", DRIVER, str(ROOT)]
    run = subprocess.run(command, input=json.dumps(cases), capture_output=True, text=True, cwd=cwd, env=ENV)
    assert run.returncode == 0, run.stderr
    return [tuple(r) for r in json.loads(run.stdout)]


@dataclass
class Made:
    by: str = "a test"


def make_folder(folder: Path) -> Path:
    """A policy, a reward model, good and bad data, damaged checkpoints: what the command lines below name."""
    n_vocab = load_tokenizer("tiny").n_vocab
    save_model(folder / "policy", make_gpt(1, vocab=n_vocab, block_size=64, n_embd=16), "tiny", "sft.py", Made())
    scorer = make_scalar(1, vocab=n_vocab, block_size=64, n_embd=16)
    save_model(folder / "rm", scorer, "tiny", "reward_model.py", Made())
    good = {"prompt": "Anna: What is the opposite of hot?", "completion": "It is cold."}
    write_jsonl(folder / "good.jsonl", [good] * 4)
    write_jsonl(folder / "pairs.jsonl", [{"prompt": "p", "chosen": "a", "rejected": "b"}] * 4)
    write_jsonl(folder / "ties.jsonl", [{"prompt": "p", "completions": [["a", "b"]]}])
    (folder / "bad.jsonl").write_text('{"prompt": "p", "completion": "c"}\n{"prompt": "p"}\n', encoding="utf-8")
    (folder / "empty.jsonl").write_text("\n", encoding="utf-8")
    (folder / "damaged").mkdir()
    (folder / "damaged" / "model.pt").write_bytes((folder / "policy" / "model.pt").read_bytes()[:500])
    (folder / "rewards.py").write_text("def short(prompts, completions):\n    return [0.0]\n", encoding="utf-8")
    (folder / "broken.py").write_text("import nonsense_that_is_not_there\n", encoding="utf-8")
    return folder


NO_HELD_OUT = ["--held_out_data", ""]
SFT = ["sft.py", "--data", "good.jsonl", *NO_HELD_OUT, "--out_dir", "o"]
DPO = ["dpo.py", "--policy", "policy", "--data", "pairs.jsonl", *NO_HELD_OUT, "--out_dir", "o"]
RM = ["reward_model.py", "--policy", "policy", "--data", "pairs.jsonl", *NO_HELD_OUT]
RM += ["--prompts", "good.jsonl", "--out_dir", "o"]
PPO = ["ppo.py", "--policy", "policy", "--prompts", "good.jsonl", "--out_dir", "o", "--max_new_tokens", "4"]
EVALUATE = ["evaluate.py", "--policies", "policy", "--prompts", "good.jsonl", "--out_dir", "o"]
EVALUATE += ["--rankings", "", "--demonstrations", ""]
TINY = ["data.tiny", "--demonstrations", "1", "--held_out_demonstrations", "1", "--prompts", "1"]
MISTAKES = [
    # command line -> what the one line on stderr must name
    (["ppo.py", "--policy", "nowhere"], ["nowhere", "no such checkpoint", "python sft.py"]),
    (["ppo.py", "--policy", "policy", "--reward", "nowhere"], ["nowhere", "python reward_model.py"]),
    ([*PPO, "--reward", "policy"], ["policy", "reward model"]),
    ([*PPO, "--reward", "nowhere.py:f"], ["nowhere.py:f"]),
    ([*PPO, "--reward", "rewards.py:g"], ["rewards.py", "no function g"]),
    ([*PPO, "--reward", "broken.py:f"], ["broken.py", "ModuleNotFoundError", "nonsense_that_is_not_there"]),
    ([*PPO, "--reward", "rewards.py:short", "--rollouts", "4", "--minibatch", "4"], ["rewards", "1 rewards for 4"]),
    ([*PPO, "--reward", "rm", "--max_new_tokens", "64"], ["--max_new_tokens"]),
    (["ppo.py", "--temperature", "0"], ["--temperature"]),
    (["ppo.py", "--minibatch", "500"], ["--minibatch"]),
    (["ppo.py", "--kl_coef=-1"], ["--kl_coef"]),
    (["sft.py", "--data", "nowhere.jsonl"], ["nowhere.jsonl", "python -m data.tiny"]),
    (["sft.py", "--data", "bad.jsonl"], ["bad.jsonl:2:", '"completion"']),
    (["sft.py", "--data", "empty.jsonl"], ["empty.jsonl", "no rows"]),
    ([*SFT, "--init", "nowhere"], ["nowhere"]),
    ([*SFT, "--init", "damaged"], ["damaged", "checkpoint"]),
    ([*SFT, "--init", "rm"], ["rm", "policy"]),
    ([*SFT, "--device", "quantum"], ["--device quantum"]),
    ([*SFT, "--resume", "--out_dir", "fresh"], ["state.pt", "no such file"]),
    ([*SFT, "--batch_size", "0"], ["--batch_size"]),
    ([*SFT, "--n_head", "3"], ["n_head"]),
    ([*SFT, "--dropout", "1.5"], ["dropout"]),
    ([*SFT, "--lr=-1"], ["lr"]),
    ([*SFT, "--log_every", "0"], ["--log_every"]),
    (["dpo.py", "--beta", "0"], ["--beta"]),
    ([*DPO, "--data", "ties.jsonl"], ["ties.jsonl"]),
    ([*DPO, "--data", "good.jsonl"], ["good.jsonl:1:", '"chosen"']),
    ([*DPO, "--kind", "ipo", "--label_smoothing", "0.1"], ["--label_smoothing"]),
    ([*RM, "--policy", "rm"], ["rm", "policy"]),
    ([*RM, "--normalise_samples", "1"], ["--normalise_samples"]),
    (["evaluate.py", "--policies"], ["--policies"]),
    ([*EVALUATE, "--reward", "", "--gold", ""], ["--gold", "--reward"]),
    ([*EVALUATE, "--reward", "", "--best_of", "0"], ["--best_of"]),
    (["sample.py", "--policy", "policy", "--top_p", "0"], ["--top_p"]),
    (["sample.py", "--policy", "policy", "--max_new_tokens", "64"], ["--max_new_tokens"]),
    (["sample.py", "--policy", "nowhere"], ["nowhere"]),
    (["data.collect", "--policies", "nowhere"], ["nowhere", "python sft.py"]),
    (["data.collect", "--policies", "policy", "--prompts", "empty.jsonl"], ["empty.jsonl"]),
    ([*TINY, "--held_out_prompts", "-1"], ["held-out"]),
]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """{command line: (status, stdout, stderr)} of all mistakes and all --help pages, from one process."""
    cases = [argv for argv, _ in MISTAKES] + [[name, "--help"] for name in (*SCRIPTS, *MODULES)]
    return dict(zip(map(" ".join, cases), drive(cases, make_folder(tmp_path_factory.mktemp("folder"))), strict=True))


@pytest.mark.parametrize(("argv", "names"), MISTAKES, ids=lambda v: " ".join(v) if isinstance(v, list) else None)
def test_user_mistakes_are_one_line(outcomes, argv, names):
    """Exit status 2 and one line on stderr that names the flag, file or line, and which
    script makes a missing file. No traceback."""
    status, _, err = outcomes[" ".join(argv)]
    lines = [line for line in err.splitlines() if line.strip()]
    shown = [line for line in lines if "it/s]" not in line and "?it" not in line]  # progress bars aside
    assert status == 2 and "Traceback" not in err, err[-500:]
    script = argv[0] if argv[0].endswith(".py") else argv[0].split(".")[-1] + ".py"
    assert len(shown) == 1 and shown[0].startswith(f"{script}: error: "), shown
    assert all(name in shown[0] for name in names), shown


@pytest.mark.parametrize("script", [*SCRIPTS, *MODULES])
def test_help_shows_every_flag(outcomes, script):
    """`--help` of each script: the docstring's usage lines, every flag, what it does and its default."""
    status, out, err = outcomes[f"{script} --help"]
    assert status == 0 and not err
    shown = " ".join(out.split())
    name = script if script.endswith(".py") else f"-m {script}"
    assert f"python {name}" in shown
    fields = dataclasses.fields(config_of(script))
    assert shown.count("(default: ") == len(fields)
    for f in fields:
        assert f"--{f.name} " in shown or f"--{f.name}, " in shown, f.name
        assert " ".join(f.metadata["help"].split()) in shown, f.name


def test_a_real_process_in_another_folder(tmp_path):
    """The same from outside, without the driver: exit status, stderr, no file left, and `python
    data/collect.py` finds the project by itself."""
    env = {k: v for k, v in ENV.items() if k != "PYTHONPATH"}
    command = [sys.executable, str(ROOT / "data" / "collect.py"), "--policies", "nowhere"]
    run = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    message = f"collect.py: error: {Path('nowhere') / 'model.pt'}: no such checkpoint; run `python sft.py` first\n"
    assert (run.returncode, run.stdout, run.stderr) == (2, "", message)
    assert list(tmp_path.iterdir()) == []


IMPORTS = """
import io, json, logging, os, random, signal, sys, warnings
import numpy, regex, requests, tiktoken, torch, tqdm
def state():
    return {
        "torch's generator": torch.get_rng_state().tolist(), "threads": torch.get_num_threads(),
        "random": repr(random.getstate()), "numpy": repr(numpy.random.get_state()),
        "gradients": torch.is_grad_enabled(), "dtype": str(torch.get_default_dtype()),
        "matmul precision": torch.get_float32_matmul_precision(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "environment": dict(os.environ), "sys.path": sys.path[:], "folder": os.getcwd(), "argv": sys.argv[:],
        "log handlers": repr(logging.getLogger().handlers), "signals": repr(signal.getsignal(signal.SIGINT)),
        "excepthook": repr(sys.excepthook), "recursion": sys.getrecursionlimit(),
        "stdout": [repr(sys.stdout), sys.stdout.encoding],
    }
before = state()
for name in sys.argv[1:]:
    __import__(name)
after = state()
sys.stderr.write(json.dumps([key for key in before if before[key] != after[key]]))
"""


def test_importing_has_no_side_effect(tmp_path):
    """Every module imports silently: no output, no file, no changed generator, thread
    count, precision, path or environment."""
    names = [p.stem for p in ROOT.glob("*.py")]
    names += [f"data.{p.stem}" for p in (ROOT / "data").glob("*.py") if p.stem != "__init__"]
    assert {"model", "ppo", "data.tiny"} <= set(names)
    run = subprocess.run([sys.executable, "-c", IMPORTS, *names], cwd=tmp_path, env=ENV, capture_output=True, text=True)
    assert run.returncode == 0 and run.stdout == "" and run.stderr == "[]"
    assert list(tmp_path.iterdir()) == []


def run_main_with(monkeypatch, train, *argv: str) -> int:
    monkeypatch.setattr(sys, "argv", ["folder/script.py", *argv])
    try:
        common.run_main(train, StrictFlags, "description")
    except SystemExit as stop:
        return stop.code
    return 0


@dataclass
class StrictFlags:
    strict: bool = flag(False, "fail on gates")


def test_exit_statuses(monkeypatch, capsys):
    """0 done, 1 a failed gate under --strict, 2 a user's mistake, 130 interrupted; a bug keeps its traceback."""
    failed = {"gates": [{"name": "A", "ok": True}, {"name": "B", "ok": False}]}
    assert run_main_with(monkeypatch, lambda config: failed) == 0
    assert run_main_with(monkeypatch, lambda config: {"gates": [{"name": "A", "ok": True}]}, "--strict") == 0
    assert run_main_with(monkeypatch, lambda config: None, "--strict") == 0
    assert capsys.readouterr().err == ""
    assert run_main_with(monkeypatch, lambda config: failed, "--strict") == 1
    assert capsys.readouterr().err == "script.py: error: gate failed: B\n"
    assert run_main_with(monkeypatch, lambda config: check(False, "wrong")) == 2
    assert capsys.readouterr().err == "script.py: error: wrong\n"

    def interrupted(config):
        raise KeyboardInterrupt

    def bug(config):
        raise KeyError("bug")

    assert run_main_with(monkeypatch, interrupted) == 130
    with pytest.raises(KeyError):
        run_main_with(monkeypatch, bug)


# ------------------------------------------------------------------------------------------------ checkpoints


def plain(value) -> bool:
    """Tensors and plain Python only: exact types, so no numpy scalar, dataclass or subclass."""
    if type(value) is dict:
        return all(plain(k) and plain(v) for k, v in value.items())
    if type(value) in (list, tuple):
        return all(map(plain, value))
    return type(value) in (str, int, float, bool, type(None), torch.Tensor)


def content_of(path: Path) -> dict:
    """A checkpoint's content, with the ordered dict that torch makes of a state dict as a dict."""
    content = torch.load(path, weights_only=True)
    return {k: dict(v) if isinstance(v, dict) else v for k, v in content.items()}


def test_a_saved_policy_is_the_loaded_one(tmp_path):
    """Bit for bit, with every field of its shape, from the folder or the file, in eval mode (need R24)."""
    model = make_gpt(3, vocab=30, n_embd=16, dropout=0.3, real_vocab=23)
    save_model(tmp_path / "stage", model, "tiny", "sft.py", Made())
    tokens = torch.randint(0, 23, (2, 9))
    for path in (tmp_path / "stage", str(tmp_path / "stage"), tmp_path / "stage" / "model.pt"):
        loaded, tokenizer = load_model(path, CPU)
        assert tokenizer == "tiny" and not loaded.training and loaded.config == model.config
        assert torch.equal(loaded(tokens), model(tokens))
    assert [p.name for p in (tmp_path / "stage").iterdir()] == ["model.pt"]


def test_a_saved_reward_model_is_the_loaded_one(tmp_path):
    """Head and normalisation included (trap 25: or it scores in other units after loading)."""
    model = make_scalar(3)
    model.mean.fill_(1.25)
    model.std.fill_(0.75)
    save_model(tmp_path, model, "gpt2", "reward_model.py", Made())
    loaded, tokenizer = load_model(tmp_path, CPU, "scalar")
    tokens = torch.randint(0, 23, (2, 9))
    assert tokenizer == "gpt2" and torch.equal(loaded(tokens), model(tokens)) and float(loaded.mean) == 1.25


def test_checkpoints_hold_tensors_and_plain_python(tmp_path):
    """weights_only=True loads them, and nothing in them is of this project's classes (need R12)."""
    model = make_gpt()
    save_model(tmp_path, model, "tiny", "sft.py", Made("hand"))
    content = content_of(tmp_path / "model.pt")
    assert plain(content)
    assert content["made"] == {"script": "sft.py", "config": {"by": "hand"}} and content["kind"] == "gpt"
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(torch.zeros(1, 4, dtype=torch.long)).sum().backward()
    optimizer.step()
    run = RunFolder(OutDir(str(tmp_path / "run")))
    run.save_state(7, model=dict(model.state_dict()), optimizer=optimizer.state_dict(), kl_coef=0.1)
    assert plain(content_of(tmp_path / "run" / "state.pt"))


def test_atomic_save_leaves_no_half_file(tmp_path, monkeypatch):
    """A crash in the middle of a save leaves the old checkpoint as it was."""
    path = tmp_path / "deep" / "model.pt"
    common.atomic_save({"a": 1}, path)
    assert torch.load(path, weights_only=True) == {"a": 1} and [p.name for p in path.parent.iterdir()] == ["model.pt"]
    before, save = path.read_bytes(), torch.save

    def crash(obj, target):
        save(obj, target)
        Path(target).write_bytes(Path(target).read_bytes()[:50])
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", crash)
    with pytest.raises(OSError):
        common.atomic_save({"a": 2}, path)
    assert path.read_bytes() == before


def test_write_json_leaves_no_half_file(tmp_path):
    """The same for results.json and config.json."""
    path = tmp_path / "deep" / "x.json"
    common.write_json({"ü": [1, None]}, path)
    assert json.loads(path.read_text(encoding="utf-8")) == {"ü": [1, None]}
    with pytest.raises(TypeError):
        common.write_json({"a": object()}, path)
    assert json.loads(path.read_text(encoding="utf-8")) == {"ü": [1, None]}


def good_content() -> dict:
    model = make_gpt(n_embd=8)
    shape = dataclasses.asdict(model.config)
    return {"kind": "gpt", "config": shape, "tokenizer": "tiny", "made": {}, "weights": model.state_dict()}


def without(key: str) -> dict:
    return {k: v for k, v in good_content().items() if k != key}


@pytest.mark.parametrize(
    "content",
    [
        without("kind"),
        without("config"),
        without("weights"),
        without("tokenizer"),
        {**good_content(), "config": {"vocab_size": 3}},
        {**good_content(), "config": {**good_content()["config"], "n_head": 3}},
        {**good_content(), "config": {**good_content()["config"], "future": 1}},
        {**good_content(), "weights": make_gpt(n_embd=16).state_dict()},
        {**good_content(), "kind": "diffusion"},
        make_gpt().state_dict(),  # weights alone
        [1, 2, 3],
        torch.zeros(3),
        "text",
        None,
    ],
    ids=lambda c: f"{type(c).__name__} {sorted(c)[:3] if isinstance(c, dict) else ''}",
)
def test_files_that_are_no_checkpoints(tmp_path, content):
    """Whatever else torch.save wrote: one line that names the file."""
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(UserError) as error:
        load_model(tmp_path, CPU)
    assert str(tmp_path / "model.pt") in str(error.value) and "\n" not in str(error.value)


def test_damaged_files(tmp_path):
    """Truncated, empty, text, bytes turned over."""
    torch.save(good_content(), tmp_path / "model.pt")
    data = (tmp_path / "model.pt").read_bytes()
    for damaged in (data[: len(data) // 2], b"", b"hello\n", data[:100] + bytes(100) + data[200:], b"\x80\x02."):
        (tmp_path / "model.pt").write_bytes(damaged)
        with pytest.raises(UserError) as error:
            load_model(tmp_path, CPU)
        assert str(tmp_path / "model.pt") in str(error.value) and "\n" not in str(error.value)


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_checkpoint_runs_no_code(tmp_path):
    """A pickle that would run a function is refused before it does (weights_only=True)."""

    def save_pickle(obj, path):
        path.write_bytes(pickle.dumps(obj, protocol=2))

    for name, save in (("a.pt", torch.save), ("b.pt", save_pickle)):
        save({**good_content(), "made": Bomb(tmp_path / "boom")}, tmp_path / name)
        with pytest.raises(UserError):
            load_model(tmp_path / name, CPU)
        assert not (tmp_path / "boom").exists()


def test_missing_and_mistaken_checkpoints(tmp_path):
    """Missing: which script makes it. The wrong kind: what it is and what is needed."""
    with pytest.raises(UserError, match=r"no such checkpoint; run `python sft\.py` first"):
        load_model(tmp_path / "out", CPU, made_by="python sft.py")
    save_model(tmp_path / "gpt", make_gpt(), "tiny", "sft.py", Made())
    save_model(tmp_path / "rm", make_scalar(), "tiny", "reward_model.py", Made())
    with pytest.raises(UserError, match=r"holds a policy .* a reward model .* is needed"):
        load_model(tmp_path / "gpt", CPU, "scalar")
    with pytest.raises(UserError, match=r"holds a reward model .* a policy .* is needed"):
        load_model(tmp_path / "rm", CPU)


# --------------------------------------------------------------------------------------------- the user's own functions


def test_load_function(tmp_path, monkeypatch):
    """file.py:function, from any folder; the project's own data/tiny.py from
    everywhere; files of one name don't mix."""
    monkeypatch.chdir(tmp_path)
    source = "from __future__ import annotations\nfrom dataclasses import dataclass\n\n"
    source += "@dataclass\nclass A:\n    x: int = {0}\n\ndef f(p, c):\n    return [A().x] * len(c)\n"
    for folder, value in (("one", 1), ("two", 2)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "my_reward.py").write_text(source.format(value), encoding="utf-8")
    one, two = load_function("one/my_reward.py:f"), load_function(str(tmp_path / "two" / "my_reward.py") + ":f")
    assert one(["p"], ["c"]) == [1] and two(["p"], ["c", "d"]) == [2, 2]
    assert load_function("data/tiny.py:gold_reward")(["Anna: Add 2 and 3."], ["Sure! It is 5."]) == [2.0]


def test_a_user_s_file_may_have_any_name(tmp_path, monkeypatch):
    """One that is named like a module of the project or of Python, imported already or later, takes nobody's place."""
    import colorsys

    import evaluate

    for module in (colorsys, evaluate):  # as if they had not been imported yet
        monkeypatch.delitem(sys.modules, module.__name__)
    for name in ("model", "common", "json", "evaluate", "colorsys"):
        (tmp_path / f"{name}.py").write_text("def f(p, c):\n    return [3.0]\n", encoding="utf-8")
        assert load_function(f"{tmp_path / name}.py:f")(["p"], ["c"]) == [3.0]
        assert not hasattr(importlib.import_module(name), "f"), name


NO_FUNCTIONS = ["", "rewards", "rewards.py", "rewards.py:", "rewards.py:missing", "rewards.py:number"]
NO_FUNCTIONS += ["nowhere.py:f", "bad.py:f", ":f"]


@pytest.mark.parametrize("spec", NO_FUNCTIONS)
def test_load_function_errors(tmp_path, monkeypatch, spec):
    """Each mistake in `--reward` or `--gold` is a UserError that shows what was given."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rewards.py").write_text("number = 3\ndef f(p, c):\n    return [0.0]\n", encoding="utf-8")
    (tmp_path / "bad.py").write_text("def f(p, c)\n", encoding="utf-8")
    with pytest.raises(UserError) as error:
        load_function(spec)
    assert repr(spec) in str(error.value)


@pytest.mark.parametrize(
    ("returned", "says"),
    [
        ([1.0], "1 rewards for 2"),
        ([1.0, 2.0, 3.0], "3 rewards for 2"),
        ([1.0, None], "one number"),
        ([1.0, "good"], "one number"),
        (None, "one number"),
        (3.0, "one number"),
        ([1.0, float("nan")], "finite"),
        ([1.0, float("inf")], "finite"),
    ],
)
def test_call_reward_checks_what_comes_back(returned, says):
    """A reward function that returns anything but one finite number a completion is told so at once (need R8)."""
    with pytest.raises(UserError, match=says):
        call_reward(lambda prompts, completions: returned, ["p", "q"], ["a", "b"])


def test_call_reward_takes_all_kinds_of_numbers():
    """Ints, bools, tensors, generators; order kept; a UserError of the function's own passes through."""
    for returned in ([1, 2], [True, 2.0], torch.tensor([1.0, 2.0]), (float(x) for x in (1, 2))):
        rewards = call_reward(lambda p, c, r=returned: r, ["p", "q"], ["a", "b"])
        assert rewards == [1.0, 2.0] and all(type(r) is float for r in rewards)

    def refuses(prompts, completions):
        raise UserError("not my prompt")

    with pytest.raises(UserError, match=r"^not my prompt$"):
        call_reward(refuses, ["p"], ["c"])


def test_a_bug_in_a_reward_function_is_not_blamed_on_its_result():
    """A TypeError inside the user's function is no wrong return value: the user needs to see where it was raised."""

    def buggy(prompts, completions):
        return [len(c) + "1" for c in completions]

    with pytest.raises((TypeError, UserError)) as error:
        call_reward(buggy, ["p"], ["c"])
    assert "must return one number" not in str(error.value)


def test_gold_function():
    """auto: the embedded task's truth where its vocabulary is used, none otherwise; empty: none."""
    assert common.gold_function("auto", "tiny")(["Anna: Add 2 and 3."], ["It is 5."]) == [1.0]
    assert common.gold_function("auto", "gpt2") is None and common.gold_function("", "tiny") is None


# ------------------------------------------------------------------------------------------------ run folder


@dataclass
class OutDir:
    out_dir: str
    lr: float = 0.5


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_run_folder(tmp_path):
    """config.json first, one JSON object a log step, results at the end with the time; a new run starts fresh logs."""
    folder = tmp_path / "out" / "stage"
    run = RunFolder(OutDir(str(folder)))
    assert json.loads((folder / "config.json").read_text(encoding="utf-8")) == {"out_dir": str(folder), "lr": 0.5}
    run.log(step=1, loss=0.123456789, note="ü")
    run.log(step=2, loss=1e-3)
    first, second = lines_of(folder / "metrics.jsonl")
    assert first == {"step": 1, "loss": 0.123457, "note": "ü"} and second == {"step": 2, "loss": 0.001}
    results = run.finish({"a": 1})
    assert json.loads((folder / "results.json").read_text(encoding="utf-8")) == results
    assert results["a"] == 1 and results["seconds"] >= 0
    RunFolder(OutDir(str(folder)))
    assert (folder / "metrics.jsonl").read_text(encoding="utf-8") == "" and not (folder / "results.json").exists()


def test_a_resumed_run_continues_its_log(tmp_path):
    """Lines after the saved step, and one that a crash tore, are taken off; torch's generator goes on where it was."""
    run = RunFolder(OutDir(str(tmp_path)))
    for step in (1, 2):
        run.log(step=step, loss=float(step))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        run.save_state(2, weight=torch.ones(2))
        following = torch.rand(3)
        run.log(step=3, loss=3.0)
        with open(run.metrics, "a", encoding="utf-8") as f:
            f.write('{"step": 4, "lo')
        torch.manual_seed(99)
        resumed = RunFolder(OutDir(str(tmp_path)), resume=True)
        state = resumed.load_state(CPU)
        assert torch.equal(torch.rand(3), following)
    assert state["step"] == 2 and torch.equal(state["weight"], torch.ones(2))
    resumed.log(step=3, loss=3.5)
    assert [(r["step"], r["loss"]) for r in lines_of(run.metrics)] == [(1, 1.0), (2, 2.0), (3, 3.5)]


def test_logs_and_results_are_valid_json(tmp_path):
    """A figure that is nan (no held-out data: no held-out loss) must not make a file that JSON readers refuse."""
    run = RunFolder(OutDir(str(tmp_path)))
    run.log(step=1, loss=float("nan"))
    run.finish({"held_out_loss": float("nan"), "gates": []})

    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    for path in (tmp_path / "metrics.jsonl", tmp_path / "results.json"):
        json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)


# --------------------------------------------------------------------------------------- device, seeds, schedule, gates


def test_pick_device():
    """auto takes what is there; what isn't there is a one-line message with the flag."""
    precision = torch.get_float32_matmul_precision()
    try:
        assert common.pick_device("cpu") == CPU
        best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        assert common.pick_device("auto").type == best
        for name in ["quantum", "cpu:x", ""] + ([] if torch.cuda.is_available() else ["cuda"]):
            with pytest.raises(UserError, match="--device") as error:
                common.pick_device(name)
            assert "\n" not in str(error.value)
    finally:
        torch.set_float32_matmul_precision(precision)


def test_autocast():
    """float32 leaves everything alone; bfloat16 makes matrix products of half precision from float32 weights."""
    layer = torch.nn.Linear(4, 4)
    with common.autocast(CPU, "float32"):
        assert layer(torch.ones(1, 4)).dtype == torch.float32
    with common.autocast(CPU, "bfloat16"):
        assert layer(torch.ones(1, 4)).dtype == torch.bfloat16
    assert layer.weight.dtype == torch.float32


def test_generators_are_independent_streams():
    """The same key gives the same numbers whatever was drawn before; every other key gives
    others (order of the key matters too)."""
    keys = [(), (0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (1, 1), (0, 0, 0), (7, 3, 1), (7, 1, 3), (3, 7, 1)]
    draws = {}
    for key in keys:
        draws[key] = torch.rand(4, generator=generator_for(CPU, *key))
        torch.rand(3)
    assert len({tuple(d.tolist()) for d in draws.values()}) == len(keys)
    for key in reversed(keys):
        assert torch.equal(torch.rand(4, generator=generator_for(CPU, *key)), draws[key])
    state = torch.get_rng_state()
    torch.rand(4, generator=generator_for(CPU, 5))
    assert torch.equal(torch.get_rng_state(), state)
    # neighbouring steps: no pattern
    many = torch.stack([torch.rand(2, generator=generator_for(CPU, 1, step)) for step in range(400)])
    assert abs(float(many.mean()) - 0.5) < 0.05 and abs(float(torch.corrcoef(many.T)[0, 1])) < 0.2
    assert abs(float(torch.corrcoef(torch.stack([many[:-1, 0], many[1:, 0]]))[0, 1])) < 0.2


@pytest.mark.parametrize(
    ("kind", "floor", "factors"),
    [
        ("cosine", 0.0, {0: 0.25, 1: 0.5, 2: 0.75, 3: 1.0, 4: 1.0, 8: 0.5}),
        ("cosine", 0.0, {6: (1 + math.cos(math.pi / 4)) / 2, 10: (1 - math.cos(math.pi / 4)) / 2}),
        ("cosine", 0.1, {3: 1.0, 4: 1.0, 8: 0.55}),
        ("linear", 0.0, {0: 0.25, 3: 1.0, 4: 1.0, 5: 0.875, 8: 0.5, 11: 0.125}),
        ("linear", 0.2, {8: 0.6, 11: 0.3}),
        ("constant", 0.0, {0: 0.25, 3: 1.0, 4: 1.0, 11: 1.0}),
    ],
)
def test_lr_at_by_hand(kind, floor, factors):
    """12 steps, 4 of warm-up: the first step already learns, the peak is reached at the
    end of warm-up, no step is beyond it."""
    for step, factor in factors.items():
        assert lr_at(step, 12, 4, kind, floor) == pytest.approx(factor, abs=1e-12), step
    curve = [lr_at(s, 12, 4, kind, floor) for s in range(12)]
    assert max(curve) == 1.0 and min(curve) > floor and curve[4:] == sorted(curve[4:], reverse=True)


def test_lr_at_edges():
    """No warm-up, or more warm-up than steps, or one step: no division by zero, never above the peak."""
    assert lr_at(0, 10, 0, "cosine") == 1.0 and lr_at(0, 1, 0) == 1.0
    assert [lr_at(s, 3, 4) for s in range(3)] == [0.25, 0.5, 0.75]
    assert lr_at(4, 4, 4) == 1.0


def test_set_lr():
    optimizer = torch.optim.SGD([{"params": [torch.zeros(1)], "lr": 3.0}, {"params": [torch.zeros(1)]}], lr=1.0)
    common.set_lr(optimizer, 0.125)
    assert [g["lr"] for g in optimizer.param_groups] == [0.125, 0.125]


@pytest.mark.parametrize(
    ("value", "low", "high", "ok", "shown"),
    [
        (0.5, 0.4, 0.6, True, "0.500 (expected 0.4-0.6)  OK"),
        (0.4, 0.4, 0.6, True, "OK"),
        (0.7, 0.4, 0.6, False, "0.700 (expected 0.4-0.6)  FAILED"),
        (0.3, 0.4, math.inf, False, "(expected at least 0.4)  FAILED"),
        (9.0, 0.4, math.inf, True, "(expected at least 0.4)  OK"),
        (9.0, -math.inf, 5.0, False, "(expected at most 5)  FAILED"),
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
