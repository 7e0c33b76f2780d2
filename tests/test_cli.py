"""lib/cli.py and the scripts from outside: flags and ranges, errors that users see, exit statuses, imports, layers."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import json
import math
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from helpers import ROOT, make_gpt, make_scalar

from lib import cli
from lib.cli import TrainConfig, UserError, check, check_ranges, flag, one_line, parse_config
from lib.checkpoint import save_model
from data.files import write_jsonl
from data.tokenizer import load_tokenizer

STAGES = ("sft.py", "reward_model.py", "ppo.py", "grpo.py", "dpo.py")
SCRIPTS = (*STAGES, "evaluate.py", "sample.py", "collect.py")
MODULES = ("data.tiny",)
ENV = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "1000"}
ENV |= {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONIOENCODING": "utf-8"}


def config_of(script: str):
    return importlib.import_module(script.removesuffix(".py").replace("/", ".")).Config


# ------------------------------------------------------------------------------------------------ flags


@dataclass
class Flags(cli.Flags):
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
    said = capsys.readouterr().err
    assert stop.value.code == 2 and line.split()[0] in said and said.count("\n") == 1


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("--sizs 1", "--sizes"),
        ("--kinds=two", "--kind"),
        ("--Name x", "--names"),
        ("--no_off", "--no-off"),
        ("--s 1", "--sizes"),
        ("-kind two", "--kind"),
        ("\u2013names x", "--names"),
    ],
)
def test_a_mistyped_flag_names_the_nearest(typed, meant, capsys):
    """Thirty lines of usage, in which the right spelling is to be found."""
    with pytest.raises(SystemExit):
        parse(*typed.split())
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"did you mean {meant}?" in said
    for unlike in ("--quite_another", "--nix", "--", "", " ", "sizs"):  # by its dashes --nix is as near as --sizs
        with pytest.raises(SystemExit):
            parse(unlike)
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and "did you mean" not in said, unlike


def test_help_stands_in_groups():
    """Forty flags in one list, those of PPO between those of the folder. Every flag that two scripts share has a group;
    what is left in a script's own is of its subject."""
    shared = {name for names in cli.GROUPS.values() for name in names.split()}
    stages = {name: importlib.import_module(name).Config for name in (s.removesuffix(".py") for s in STAGES)}
    own = {name: {f.name for f in dataclasses.fields(config)} - shared for name, config in stages.items()}
    assert own["ppo"] >= {"gamma", "lam", "clip", "kl_coef", "stop_kl"} and own["dpo"] >= {"beta", "label_smoothing"}
    assert not own["sft"] and not own["reward_model"]
    assert not set.union(*own.values()) & {"seed", "lr", "prompts", "policy", "resume"}


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


@dataclass
class Ranges(cli.Flags):
    size: int = flag(3, "from 2 to 5", low=2, high=5)
    share: float = flag(0.5, "between 0 and 1", above=0, below=1)
    part: float = flag(0.5, "above 0, at most 1", above=0, high=1)
    rate: float = flag(0.5, "a number")
    sizes: list[int] = flag([2, 3], "at least 2 each", low=2)
    rates: list[float] = flag([], "numbers")
    kind: str = flag("one", "a choice", choices=("one", "two"))


@pytest.mark.parametrize(
    ("name", "right", "wrong"),
    [
        ("size", [2, 5], {1: "at least 2, not 1", 6: "at most 5, not 6"}),
        ("share", [1e-9, 0.999], {0.0: "above 0, not 0.0", 1.0: "below 1, not 1.0"}),
        ("part", [1e-9, 1.0], {0.0: "above 0", -1.0: "above 0", 1.001: "at most 1"}),
        ("rate", [-1e30, 0.0, 1e30], {math.inf: "finite number, not inf", -math.inf: "finite", math.nan: "finite"}),
        ("kind", ["one", "two"], {"three": "one of one, two, not three", "": "one of one, two"}),
    ],
)
def test_ranges(name, right, wrong):
    """The ends of a range belong to it or not, as the flag says; nan and inf are in none. The flag, the bound and what
    was given are named: also for configs that are made in Python, where argparse has seen nothing."""
    for value in right:
        check_ranges(Ranges(**{name: value}))
    for value, says in wrong.items():
        with pytest.raises(UserError) as error:
            check_ranges(Ranges(**{name: value}))
        assert f"--{name} must be " in str(error.value) and says in str(error.value)


def test_every_value_of_a_list_is_checked():
    """best_of 4 0: the second is as wrong as the first would be."""
    check_ranges(Ranges(sizes=[2, 9]))
    check_ranges(Ranges(sizes=[]))
    for wrong in ({"sizes": [2, 1]}, {"sizes": [1, 2]}, {"rates": [1.0, math.nan]}):
        with pytest.raises(UserError, match=f"--{next(iter(wrong))} must be"):
            check_ranges(Ranges(**wrong))


def test_a_seed_is_what_torch_takes():
    """torch.manual_seed overflows beyond 64 bits, with a traceback; below that every seed is its own."""
    for seed in (0, 2**63 - 1):
        check_ranges(TrainConfig(seed=seed))
    for seed in (-1, 2**63, 2**64, 10**30):
        with pytest.raises(UserError, match="--seed must be"):
            check_ranges(TrainConfig(seed=seed))


def test_a_range_stops_the_run_before_it_starts(monkeypatch, capsys):
    """run_main checks, so no script can forget to."""
    monkeypatch.setattr(sys, "argv", ["script.py", "--size", "9"])
    with pytest.raises(SystemExit) as stop:
        cli.run_main(lambda config: pytest.fail("it ran"), Ranges, "description")
    assert stop.value.code == 2 and capsys.readouterr().err == "script.py: error: --size must be at most 5, not 9\n"


@pytest.mark.parametrize("script", STAGES)
def test_the_training_scripts_share_their_common_flags(script):
    """--resume, --seed, --grad_clip ... mean the same everywhere: no stage has its own."""
    shared = [f.name for f in dataclasses.fields(TrainConfig)]
    assert issubclass(config_of(script), TrainConfig)
    own = config_of(script).__annotations__
    assert not set(shared) & set(own), "a stage gives a shared flag another meaning"


@pytest.mark.parametrize("script", [*SCRIPTS, *MODULES])
def test_every_flag_is_documented(script):
    """Each Config field has a help text, a default in its own range, and a type that the command line can give."""
    fields = dataclasses.fields(config_of(script))
    assert len(fields) >= 6
    for f in fields:
        assert len(f.metadata.get("help", "")) > 3, f.name
        assert f.default is not dataclasses.MISSING or f.default_factory is not dataclasses.MISSING, f.name
        assert f.type in ("str", "int", "float", "bool", "list[str]", "list[int]", "list[float]"), (f.name, f.type)
        choices = f.metadata["choices"]
        assert choices is None or f.default in choices, f.name
    check_ranges(config_of(script)())


def test_one_line_keeps_the_useful_part():
    """torch writes "Error(s) in loading state_dict for GPT:" and puts the keys on the lines below: the first line alone
    says nothing. Joined, and cut to a length that a terminal shows."""
    assert one_line(ValueError('first:\n\tMissing key(s): "h.0".\n\n  more ')) == (
        'ValueError: first: Missing key(s): "h.0". more'
    )
    assert one_line(KeyError("kind")) == "KeyError: 'kind'"
    assert len(one_line(RuntimeError("x\n" * 10_000))) == 240


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
    """A policy, reward models, good and bad data, damaged checkpoints: what the command lines below name."""
    n_vocab = load_tokenizer("tiny").n_vocab
    save_model(folder / "policy", make_gpt(1, vocab=n_vocab, block_size=64, n_embd=16), "tiny", "sft.py", Made())
    for name, tokenizer, block_size, task in (
        ("rm", "tiny", 64, ""),
        ("rm_of_the_task", "tiny", 64, "tiny"),
        ("rm_gpt2", "gpt2", 64, ""),
        ("rm_short", "tiny", 32, ""),
    ):
        scorer = make_scalar(1, vocab=n_vocab, block_size=block_size, n_embd=16)
        save_model(folder / name, scorer, tokenizer, "reward_model.py", Made(), task)
    good = {"prompt": "Anna: What is the opposite of hot?", "completion": "It is cold."}
    write_jsonl(folder / "good.jsonl", [good] * 4)
    write_jsonl(folder / "own.jsonl", [{"prompt": "Name a colour.", "completion": "Blue."}] * 4)
    write_jsonl(folder / "pairs.jsonl", [{"prompt": "p", "chosen": "a", "rejected": "b"}] * 4)
    write_jsonl(folder / "ties.jsonl", [{"prompt": "p", "completions": [["a", "b"]]}])
    (folder / "bad.jsonl").write_text('{"prompt": "p", "completion": "c"}\n{"prompt": "p"}\n', encoding="utf-8")
    (folder / "half.jsonl").write_text('{"prompt": "\\ud800", "completion": "c"}\n', encoding="utf-8")
    (folder / "half.json").write_text('[{"instruction": "\\ud800", "output": "c"}]', encoding="utf-8")
    (folder / "empty.jsonl").write_text("\n", encoding="utf-8")
    (folder / "damaged").mkdir()
    (folder / "damaged" / "model.pt").write_bytes((folder / "policy" / "model.pt").read_bytes()[:500])
    (folder / "rewards.py").write_text("def short(prompts, completions):\n    return [0.0]\n", encoding="utf-8")
    (folder / "broken.py").write_text("import nonsense_that_is_not_there\n", encoding="utf-8")
    return folder


START = ["--out_dir", "o", "--warmup", "0", "--device", "cpu"]
SFT = ["sft.py", "--data", "good.jsonl", *START, "--n_layer", "1", "--n_embd", "8", "--epochs", "1"]
DPO = ["dpo.py", "--policy", "policy", "--data", "pairs.jsonl", *START]
RM = ["reward_model.py", "--policy", "policy", "--data", "pairs.jsonl", "--prompts", "good.jsonl", *START]
PPO = ["ppo.py", "--policy", "policy", "--prompts", "good.jsonl", "--max_new_tokens", "4", *START]
PPO += ["--rollouts", "4", "--minibatch", "4", "--iterations", "1"]
EVALUATE = ["evaluate.py", "--policies", "policy", "--prompts", "good.jsonl", "--out_dir", "o"]
SAMPLE = ["sample.py", "--policy", "policy", "--prompt", "Hi.", "--max_new_tokens", "4"]
COLLECT = ["collect.py", "--policies", "policy", "--prompts", "good.jsonl", "--max_new_tokens", "4"]
TINY = ["data.tiny", "--demonstrations", "1", "--held_out_demonstrations", "1", "--prompts", "1"]
MISTAKES = [
    # command line -> what the one line on stderr must name
    (["ppo.py", "--policy", "nowhere"], ["nowhere", "no such checkpoint", "python sft.py"]),
    ([*PPO, "--reward", "nowhere"], ["nowhere", "python reward_model.py"]),
    ([*PPO, "--reward", "policy"], ["policy", "reward model"]),
    ([*PPO, "--reward", "nowhere.py:f"], ["nowhere.py:f"]),
    ([*PPO, "--reward", "rewards.py:g"], ["rewards.py", "no function g"]),
    ([*PPO, "--reward", "broken.py:f"], ["broken.py", "ModuleNotFoundError", "nonsense_that_is_not_there"]),
    ([*PPO, "--reward", "rewards.py:short"], ["rewards", "1 rewards for 4"]),
    ([*PPO, "--reward"], ["--reward", "checkpoint"]),
    ([*PPO, "--reward", "rm", "rm", "--reward_weights", "1"], ["--reward_weights", "1 values for 2"]),
    ([*PPO, "--reward", "rm", "--reward_weights", "inf"], ["--reward_weights", "finite"]),
    ([*PPO, "--reward", "rm", "--reward_weights", "0", "--reward_combine", "mean"], ["--reward_combine mean"]),
    ([*PPO, "--reward", "rm_gpt2"], ["rm_gpt2", "gpt2 tokens", "tiny tokens"]),
    ([*PPO, "--reward", "rm_short"], ["rm_short", "32", "64"]),
    ([*PPO, "--reward", "rm_of_the_task", "--prompts", "own.jsonl"], ["--reward rm_of_the_task", "embedded task"]),
    ([*PPO, "--reward", "rm", "--prompts", "own.jsonl", "--gold", "data/tiny.py:gold_reward"], ["gold", "Name a"]),
    ([*PPO, "--reward", "rm", "--max_new_tokens", "64"], ["--max_new_tokens"]),
    ([*PPO, "--reward", "rm", "--warmup", "2"], ["--warmup 2", "1 step"]),
    ([*PPO, "--temperature", "0"], ["--temperature"]),
    ([*PPO, "--temperature", "inf"], ["--temperature", "finite"]),
    ([*PPO, "--lr", "nan"], ["--lr", "finite"]),
    ([*PPO, "--minibatch", "500"], ["--minibatch"]),
    ([*PPO, "--kl_coef=-1"], ["--kl_coef"]),
    ([*PPO, "--kl_horizon", "0"], ["--kl_horizon"]),
    ([*PPO, "--kl_target", "4", "--kl_coef", "0"], ["--kl_target", "--kl_coef"]),
    ([*PPO, "--seed", str(2**64)], ["--seed", "at most"]),
    (["sft.py", "--data", "nowhere.jsonl"], ["nowhere.jsonl", "python -m data.tiny"]),
    (["sft.py", "--data", "bad.jsonl"], ["bad.jsonl:2:", '"completion"']),
    (["sft.py", "--data", "empty.jsonl"], ["empty.jsonl", "no rows"]),
    (["sft.py", "--data", "half.jsonl"], ["half.jsonl:1:", "surrogate"]),
    (["sft.py", "--data", "policy"], ["policy", "directory"]),
    ([*SFT, "--init", "nowhere"], ["--n_layer", "nowhere"]),
    (["sft.py", "--data", "good.jsonl", "--init", "nowhere"], ["nowhere", "no such checkpoint"]),
    (["sft.py", "--data", "good.jsonl", "--init", "damaged"], ["damaged", "checkpoint"]),
    (["sft.py", "--data", "good.jsonl", "--init", "rm"], ["rm", "policy"]),
    (["sft.py", "--data", "good.jsonl", "--init", "policy", "--block_size", "32"], ["--block_size 32", "64"]),
    ([*SFT, "--device", "quantum"], ["--device quantum"]),
    ([*SFT, "--resume", "--out_dir", "fresh"], ["state.pt", "no such file"]),
    ([*SFT, "--out_dir", "good.jsonl"], ["--out_dir good.jsonl", "folder"]),
    ([*SFT, "--out_dir", "good.jsonl/deeper"], ["--out_dir", "folder"]),
    ([*SFT, "--warmup", "50"], ["--warmup 50", "1 step"]),
    ([*SFT, "--batch_size", "0"], ["--batch_size"]),
    ([*SFT, "--n_head", "3"], ["n_head"]),
    ([*SFT, "--dropout", "1.5"], ["dropout"]),
    ([*SFT, "--lr=-1"], ["lr"]),
    ([*SFT, "--lr", "1e30", "--epochs", "4"], ["--lr"]),
    ([*SFT, "--grad_clip=-1"], ["--grad_clip", "at least 0"]),
    ([*SFT, "--train_layers", "2"], ["--train_layers 2", "1 block"]),
    ([*SFT, "--log_every", "0"], ["--log_every"]),
    ([*SFT, "--seed", str(10**30)], ["--seed", "at most"]),
    ([*SFT, "--seed=-1"], ["--seed", "at least 0"]),
    ([*DPO, "--beta", "0"], ["--beta"]),
    ([*DPO, "--data", "ties.jsonl"], ["ties.jsonl"]),
    ([*DPO, "--data", "good.jsonl"], ["good.jsonl:1:", '"chosen"']),
    ([*DPO, "--kind", "ipo", "--label_smoothing", "0.1"], ["--label_smoothing"]),
    ([*DPO, "--warmup", "2"], ["--warmup 2", "1 step"]),
    ([*RM, "--policy", "rm"], ["rm", "policy"]),
    ([*RM, "--normalise_samples", "1"], ["--normalise_samples"]),
    ([*RM, "--warmup", "2"], ["--warmup 2", "1 step"]),
    (["evaluate.py", "--policies"], ["--policies"]),
    ([*EVALUATE, "--reward", "", "--gold", ""], ["--gold", "--reward"]),
    ([*EVALUATE, "--reward", "rm_gpt2"], ["rm_gpt2", "gpt2 tokens", "tiny tokens"]),
    ([*EVALUATE, "--reward", "rm_short"], ["rm_short", "32", "64"]),
    ([*EVALUATE, "--reward", "", "--best_of", "0"], ["--best_of"]),
    ([*EVALUATE, "--reward", "", "--best_of", "2", "0"], ["--best_of"]),
    ([*EVALUATE, "--reward", "", "--temperature", "inf"], ["--temperature", "finite"]),
    ([*EVALUATE, "--reward", "", "--seed", str(2**64)], ["--seed", "at most"]),
    ([*EVALUATE, "--reward", "", "--out_dir", "good.jsonl"], ["--out_dir good.jsonl", "folder"]),
    ([*SAMPLE, "--top_p", "0"], ["--top_p"]),
    ([*SAMPLE, "--temperature", "inf"], ["--temperature", "finite"]),
    ([*SAMPLE, "--max_new_tokens", "64"], ["--max_new_tokens"]),
    ([*SAMPLE, "--policy", "nowhere"], ["nowhere"]),
    ([*SAMPLE, "--reward", "rm_gpt2"], ["rm_gpt2", "gpt2 tokens", "tiny tokens"]),
    ([*SAMPLE, "--reward", "rm_short"], ["rm_short", "32", "64"]),
    (["collect.py", "--policies", "nowhere"], ["nowhere", "python sft.py"]),
    ([*COLLECT, "--prompts", "empty.jsonl"], ["empty.jsonl"]),
    ([*COLLECT, "--prompts", "own.jsonl"], ["--gold", "--annotator human"]),
    ([*COLLECT, "--skip", "4"], ["good.jsonl", "--skip 4"]),
    ([*COLLECT, "--out", "policy"], ["--out policy", "folder"]),
    ([*COLLECT, "--temperatures", "1", "inf"], ["--temperatures", "finite"]),
    (["tools.prepare", "half.json", "--out_dir", "o"], ["half.json: record 1", "surrogate"]),
    ([*TINY, "--held_out_prompts", "-1"], ["--held_out_prompts"]),
    ([*TINY, "--prompts", "0"], ["--prompts"]),
    ([*TINY, "--out_dir", "good.jsonl"], ["good.jsonl", "folder"]),
]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """{command line: (status, stdout, stderr)} of all mistakes and all --help pages, from one process."""
    folder = make_folder(tmp_path_factory.mktemp("folder"))
    cases = [argv for argv, _ in MISTAKES] + [[name, "--help"] for name in (*SCRIPTS, *MODULES)]
    return dict(zip(map(" ".join, cases), drive(cases, folder), strict=True))


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
    found = re.findall(r"^  --(?!no-)(\w+)", out, re.MULTILINE)  # each in one group
    assert sorted(found) == sorted(f.name for f in fields)


def from_outside(script: str, *argv: str, cwd: Path) -> subprocess.CompletedProcess:
    env = {k: v for k, v in ENV.items() if k != "PYTHONPATH"}
    return subprocess.run([sys.executable, str(ROOT / script), *argv], cwd=cwd, env=env, capture_output=True, text=True)


def test_a_real_process_in_another_folder(tmp_path):
    """The same from outside, without the driver: exit status, stderr, no file left."""
    run = from_outside("collect.py", "--policies", "nowhere", cwd=tmp_path)
    message = f"collect.py: error: {Path('nowhere') / 'model.pt'}: no such checkpoint; run `python sft.py` first\n"
    assert (run.returncode, run.stdout, run.stderr) == (2, "", message)
    assert list(tmp_path.iterdir()) == []


def run_main_with(monkeypatch, run, *argv: str) -> int:
    monkeypatch.setattr(sys, "argv", ["folder/script.py", *argv])
    try:
        cli.run_main(run, StrictFlags, "description")
    except SystemExit as stop:
        return stop.code
    return 0


@dataclass
class StrictFlags(cli.Flags):
    strict: bool = flag(False, "fail on gates")


def test_exit_statuses(monkeypatch, capsys):
    """0 done, 1 a failed gate under --strict, 2 a user's mistake, 130 interrupted; a bug keeps its traceback."""
    failed = {"gates": [{"name": "A", "ok": True}, {"name": "B", "ok": False}]}
    assert run_main_with(monkeypatch, lambda config: failed) == 0
    assert run_main_with(monkeypatch, lambda config: {"gates": [{"name": "A", "ok": True}]}, "--strict") == 0
    assert run_main_with(monkeypatch, lambda config: {}, "--strict") == 0
    assert capsys.readouterr().err == ""
    assert run_main_with(monkeypatch, lambda config: failed, "--strict") == 1
    assert capsys.readouterr().err == "script.py: error: gate failed: B\n"
    assert run_main_with(monkeypatch, lambda config: check(False, "wrong")) == 2
    assert capsys.readouterr().err == "script.py: error: wrong\n"

    def interrupted(config):
        raise KeyboardInterrupt

    def bug(config):
        raise KeyError("bug")

    def stopped_at_once(config):
        raise KeyboardInterrupt(128 + 15)

    assert run_main_with(monkeypatch, interrupted) == 130
    assert run_main_with(monkeypatch, stopped_at_once) == 143
    with pytest.raises(KeyError):
        run_main_with(monkeypatch, bug)


# ------------------------------------------------------------------------------------------------ imports

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


def sources() -> dict[str, Path]:
    """{module: file} of the project, the tests excepted."""
    found = {p.stem: p for p in sorted(ROOT.glob("*.py"))}
    for folder in ("lib", "data", "tools", "study"):
        found |= {f"{folder}.{p.stem}": p for p in sorted((ROOT / folder).glob("*.py")) if p.stem != "__init__"}
    return found


def test_importing_has_no_side_effect(tmp_path):
    """Every module imports silently: no output, no file, no changed generator, thread
    count, precision, path or environment."""
    names = list(sources())
    assert {"model", "ppo", "collect", "data.tiny"} <= set(names)
    run = subprocess.run([sys.executable, "-c", IMPORTS, *names], cwd=tmp_path, env=ENV, capture_output=True, text=True)
    assert run.returncode == 0 and run.stdout == "" and run.stderr == "[]"
    assert list(tmp_path.iterdir()) == []


def test_text_is_read_and_written_without_torch():
    """The command line, the file formats, the embedded task and the preparation of data: a second, not five, and where
    there is no torch at all."""
    program = "import sys, lib.cli, data.files, data.tiny, tools.prepare; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=ENV).returncode == 0


# Each may import from those above it and, within a folder, from its neighbours. PPO mixes in the loss of sft.py, and
# GRPO is told by its difference from PPO.
LAYERS = [
    {"lib.cli"},
    {"lib.vocabulary"},
    {"data"},
    {"model"},
    {"frame"},
    {"frozen"},
    {"sampling"},
    {"lib"},
    {"tools.records", "tools.annotate"},
    {"sft"},
    {"reward_model", "ppo", "dpo", "collect"},
    {"grpo"},
    {"evaluate", "sample"},
    {"tools"},
    {"study"},
]
LAYER_OF = {name: n for n, names in enumerate(LAYERS) for name in names}


def room(module: str) -> str:
    """The entry of LAYERS that a module belongs to: its own, or its folder's."""
    return module if module in LAYER_OF else module.split(".")[0]


def imported(file: Path) -> set[str]:
    """The modules of the project that a file imports, at its top or within a function."""
    nodes = list(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    for node in nodes:
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}: a relative import"
            names += [f"{node.module}.{alias.name}" for alias in node.names] + [node.module]
    return {name for name in names if name in sources()}


@pytest.mark.parametrize("module", sources())
def test_imports_point_one_way(module):
    """So that a file can be read, tested and reused without those that build on it."""
    assert room(module) in LAYER_OF, f"{module} stands in no layer"
    theirs = {room(name) for name in imported(sources()[module])} - {room(module)}
    wrong = {name for name in theirs if LAYER_OF[name] >= LAYER_OF[room(module)]}
    assert not wrong, f"{module} imports {', '.join(sorted(wrong))}"


# ------------------------------------------------------------------------------------------------ the runs


@pytest.mark.skipif(sys.platform == "win32", reason="needs bash")
@pytest.mark.parametrize(
    ("run", "setting"),
    [("tiny", {}), ("tiny", {"LONG": "1"}), ("smollm2", {}), ("smollm2", {"FULL": "1", "SEED": "7"})],
)
def test_the_commands_of_a_run_fit_the_scripts_and_each_other(tmp_path, run, setting):
    """A flag that was renamed, a value out of its range, a file that no earlier command has written: found after half
    an hour, or only on the GPU that nobody here has. A stand-in for python writes the commands down."""
    (tmp_path / "python").write_text(f"#!/bin/sh\nIFS='\t'\nprintf '%s\\n' \"$*\" >> {tmp_path}/log\n")
    (tmp_path / "python").chmod(0o755)
    (tmp_path / "data.json").write_text("[]")
    (tmp_path / "out").mkdir()  # a python that writes nothing makes no folders either
    env = {**ENV, **setting, "PATH": f"{tmp_path}:{os.environ['PATH']}", "OUT": f"{tmp_path}/out"}
    env |= {"START": f"{tmp_path}/start.gguf", "DATA": f"{tmp_path}/data.json"}
    done = subprocess.run(["bash", ROOT / "runs" / f"{run}.sh"], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    commands = [line.split("\t") for line in (tmp_path / "log").read_text().splitlines()]
    assert len(commands) > 8
    written: list[str] = []
    for script, *flags in commands:
        if script == "-m":
            script, *flags = flags
        if script == "tools.prepare":  # has a parser of its own
            written.append(flags[flags.index("--out_dir") + 1])
            continue
        config = parse_config(config_of(script), "", flags)
        check_ranges(config)
        for f in dataclasses.fields(config):
            value = getattr(config, f.name)
            for path in value if isinstance(value, list) else [value]:
                if str(path).startswith(env["OUT"]) and f.name not in ("out", "out_dir"):
                    known = any(path.startswith(place) or place.startswith(f"{path}/") for place in written)
                    assert known, f"{script} --{f.name} {path}"
        written += [getattr(config, name) for name in ("out", "out_dir") if hasattr(config, name)]
        if "SEED" in setting:
            assert config.seed % 100 == 7, script


# ------------------------------------------------------------------------------------------------ sizes


def test_no_line_is_wider_than_120_columns():
    """What does not fit a screen is not read."""
    files = [*sources().values(), *(ROOT / "tests").glob("*.py")]
    wide = [
        f"{file.name}:{number}"
        for file in files
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1)
        if len(line) > 120
    ]
    assert not wide
