"""lib/: checkpoints, run folders and resuming, the user's own functions, seeds, schedule, gates."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import os
import pickle
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import (
    TOY,
    completion_logprobs,
    frame_batch,
    make_gpt,
    make_scalar,
    make_told,
    random_prompts,
    spread,
    strict_json,
)

import frozen
import lib.checkpoint
import lib.reward
import lib.run
import lib.show
import lib.train
from lib.cli import TrainConfig, UserError
from lib.checkpoint import Checkpoint, load_model, load_scorer, save_model
from lib.reward import call_reward, load_function
from lib.run import RunFolder, gate
from lib.train import clip_gradients, generator_for, lr_at
from sampling import Rollout, generate

CPU = torch.device("cpu")


@dataclass
class Made:
    by: str = "a test"


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
        loaded, tokenizer, task = load_model(path, CPU)
        assert (tokenizer, task) == ("tiny", "") and not loaded.training and loaded.config == model.config
        assert torch.equal(loaded(tokens), model(tokens))
    assert [p.name for p in (tmp_path / "stage").iterdir()] == ["model.pt"]


@pytest.mark.parametrize("make", [make_scalar, make_told])
def test_a_saved_reward_model_is_the_loaded_one(tmp_path, make):
    """Head and normalisation included (trap 25: or it scores in other units after loading), and what it is told."""
    model = make(3)
    model.mean.fill_(1.25)
    model.std.fill_(0.75)
    save_model(tmp_path, model, "gpt2", "reward_model.py", Made())
    save_model(tmp_path / "other", model, "gpt2", "reward_model.py", Made(), "tiny")
    assert load_model(tmp_path / "other", CPU, "scalar").task == "tiny"
    loaded, tokenizer, task = load_model(tmp_path, CPU, "scalar")
    tokens = torch.randint(0, 23, (2, 9))
    assert (
        (tokenizer, task) == ("gpt2", "") and torch.equal(loaded(tokens), model(tokens)) and float(loaded.mean) == 1.25
    )
    assert loaded.config == model.config


@pytest.mark.parametrize("kind", ["gpt", "scalar"])
def test_checkpoints_of_before_load_as_what_they_were(tmp_path, kind):
    """One that was saved when GPTConfig had fewer fields: learned positions, and a head that is told nothing."""
    model = make_gpt(3) if kind == "gpt" else make_scalar(3)
    save_model(tmp_path, model, "tiny", "test", Made())
    content = content_of(tmp_path / "model.pt")
    for field in ("rope_base", "expectation"):
        del content["config"][field]
    torch.save(content, tmp_path / "model.pt")
    loaded = load_model(tmp_path, CPU, kind).model
    tokens = torch.randint(0, 23, (2, 9))
    assert torch.equal(loaded(tokens), model(tokens)) and loaded.config == model.config


def test_checkpoints_hold_tensors_and_plain_python(tmp_path):
    """weights_only=True loads them, and nothing in them is of this project's classes (need R12)."""
    model = make_gpt()
    save_model(tmp_path, model, "tiny", "sft.py", Made("hand"))
    content = content_of(tmp_path / "model.pt")
    assert plain(content)
    made = {"script": "sft.py", "config": {"by": "hand"}, "task": ""}
    assert content["made"] == made and content["kind"] == "gpt"
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(torch.zeros(1, 4, dtype=torch.long)).sum().backward()
    optimizer.step()
    run = RunFolder(Run(str(tmp_path / "run")), 9)
    run.save_state(7, model=model, optimizer=optimizer, kl_coef=0.1)
    assert plain(content_of(tmp_path / "run" / "state.pt"))


def test_atomic_save_leaves_no_half_file(tmp_path, monkeypatch):
    """A crash in the middle of a save leaves the old checkpoint as it was."""
    path = tmp_path / "deep" / "model.pt"
    lib.checkpoint.atomic_save({"a": 1}, path)
    assert torch.load(path, weights_only=True) == {"a": 1} and [p.name for p in path.parent.iterdir()] == ["model.pt"]
    before, save = path.read_bytes(), torch.save

    def crash(obj, target):
        save(obj, target)
        Path(target).write_bytes(Path(target).read_bytes()[:50])
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", crash)
    with pytest.raises(OSError):
        lib.checkpoint.atomic_save({"a": 2}, path)
    assert path.read_bytes() == before


def test_write_json_leaves_no_half_file(tmp_path):
    """The same for results.json and config.json."""
    path = tmp_path / "deep" / "x.json"
    lib.run.write_json({"ü": [1, None]}, path)
    assert json.loads(path.read_text(encoding="utf-8")) == {"ü": [1, None]}
    with pytest.raises(TypeError):
        lib.run.write_json({"a": object()}, path)
    assert json.loads(path.read_text(encoding="utf-8")) == {"ü": [1, None]}


MADE = {"script": "sft.py", "config": {}, "task": ""}


def good_content() -> dict:
    model = make_gpt(n_embd=8)
    shape = dataclasses.asdict(model.config)
    return {"kind": "gpt", "config": shape, "tokenizer": "tiny", "made": MADE, "weights": model.state_dict()}


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


def test_a_wrong_state_dict_names_a_key(tmp_path):
    """torch's message has the keys on its second line: the first alone says that something is wrong, and not what."""
    content = good_content()
    del content["weights"]["h.1.ln_2.bias"]
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(UserError, match=r"h\.1\.ln_2\.bias") as error:
        load_model(tmp_path, CPU)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["gpt.h.1.mlp.c_fc.weight", "head.bias", "std"])
def test_weights_that_are_not_finite_are_no_model(tmp_path, name, value):
    """One nan anywhere, in a buffer too, and every later stage computes nan. The model that stood there stays."""
    save_model(tmp_path, make_scalar(1), "tiny", "reward_model.py", Made())
    before = contents(tmp_path)
    model = make_scalar(2)
    model.state_dict()[name].view(-1)[-1] = value
    with pytest.raises(UserError, match=r"not finite.*--lr"):
        save_model(tmp_path, model, "tiny", "reward_model.py", Made())
    assert contents(tmp_path) == before


@dataclass
class MadeFrom:
    data: str = "some/where.jsonl"


def test_what_was_loaded_is_named(tmp_path, capsys):
    """The file, the script that made it and the data it learned from: so the demo's among one's own shows."""
    save_model(tmp_path / "a", make_gpt(), "tiny", "sft.py", MadeFrom())
    save_model(tmp_path / "b", make_scalar(), "tiny", "reward_model.py", Made())
    load_model(tmp_path / "a", CPU)
    assert capsys.readouterr().out == f"{tmp_path / 'a' / 'model.pt'}: made by sft.py from some/where.jsonl\n"
    load_scorer(tmp_path / "b", Checkpoint(make_gpt(), "tiny", ""), CPU)
    assert capsys.readouterr().out == f"{tmp_path / 'b' / 'model.pt'}: made by reward_model.py\n"


def test_a_scorer_reads_what_the_policy_writes(tmp_path):
    """Ids of another vocabulary give plausible scores of a text that nobody wrote; texts longer than the scorer's block
    size a traceback in the middle of a run. A longer block size is no harm."""
    policy = Checkpoint(make_gpt(block_size=40), "tiny", "")
    for name, tokenizer, block_size in (("same", "tiny", 40), ("longer", "tiny", 41)):
        model = make_scalar(3, block_size=block_size)
        save_model(tmp_path / name, model, tokenizer, "reward_model.py", Made(), "tiny")
        scorer = load_scorer(tmp_path / name, policy, CPU)
        assert (scorer.tokenizer, scorer.task) == ("tiny", "tiny") and not scorer.model.training
        assert torch.equal(scorer.model.head.weight, model.head.weight)
    save_model(tmp_path / "gpt2", make_scalar(block_size=40), "gpt2", "reward_model.py", Made())
    with pytest.raises(UserError, match="gpt2 reads gpt2 tokens, the policy writes tiny tokens"):
        load_scorer(tmp_path / "gpt2", policy, CPU)
    save_model(tmp_path / "short", make_scalar(block_size=39), "tiny", "reward_model.py", Made())
    with pytest.raises(UserError, match="short reads texts of 39 tokens at most, the policy's have up to 40"):
        load_scorer(tmp_path / "short", policy, CPU)
    save_model(tmp_path / "policy", policy.model, "tiny", "sft.py", Made())
    with pytest.raises(UserError, match=r"a reward model .* is needed"):
        load_scorer(tmp_path / "policy", policy, CPU)
    with pytest.raises(UserError, match=r"run `python reward_model\.py` first"):
        load_scorer(tmp_path / "nowhere", policy, CPU)


def test_the_demo_s_policy_on_one_s_own_data_is_noted(capsys):
    """It is rarely meant, and nothing else would show it. In all other cases: silence."""
    for of_policy, of_data in (("tiny", "tiny"), ("", "tiny"), ("", "")):
        lib.checkpoint.note_task(Checkpoint(None, "tiny", of_policy), of_data, "mine.jsonl")
    assert capsys.readouterr().out == ""
    lib.checkpoint.note_task(Checkpoint(None, "tiny", "tiny"), "", "mine.jsonl")
    assert "mine.jsonl" in capsys.readouterr().out


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
    assert load_function("data/tiny.py:gold_reward")(["Anna: Add 2 and 3."], ["Sure! It is 5."]) == [3.0]


def test_a_user_s_file_may_have_any_name(tmp_path, monkeypatch):
    """One that is named like a module of the project or of Python, imported already or later, takes nobody's place."""
    import colorsys

    import evaluate

    for module in (colorsys, evaluate):  # as if they had not been imported yet
        monkeypatch.delitem(sys.modules, module.__name__)
    for name in ("model", "ppo", "json", "evaluate", "colorsys"):
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


def test_a_reward_function_is_told_what_was_cut_if_it_asks():
    """A function with a parameter `ended` learns which texts ended by themselves (nobody says: all); one without is
    called as before."""
    told = []

    def asks(prompts, completions, ended):
        told.append(ended)
        return [float(e) for e in ended]

    def asks_with_a_default(prompts, completions, *, ended=None):
        return asks(prompts, completions, ended)

    for function in (asks, asks_with_a_default):
        assert call_reward(function, ["p", "q"], ["a", "b"], [True, False]) == [1.0, 0.0]
        assert call_reward(function, ["p", "q"], ["a", "b"]) == [1.0, 1.0]
    assert told == [[True, False], [True, True]] * 2
    assert call_reward(lambda prompts, completions: [2.0, 3.0], ["p", "q"], ["a", "b"], [True, False]) == [2.0, 3.0]


def test_a_wrong_reward_names_the_function():
    """With several rewards it has to be clear whose it is."""
    with pytest.raises(UserError, match=r"^mine\.py:f returned 1 rewards for 2 completions$"):
        call_reward(lambda p, c: [0.0], ["p", "q"], ["a", "b"], name="mine.py:f")


def test_a_bug_in_a_reward_function_is_not_blamed_on_its_result():
    """A TypeError inside the user's function is no wrong return value: the user needs to see where it was raised."""

    def buggy(prompts, completions):
        return [len(c) + "1" for c in completions]

    with pytest.raises((TypeError, UserError)) as error:
        call_reward(buggy, ["p"], ["c"])
    assert "must return one number" not in str(error.value)


def test_gold_function(tmp_path):
    """auto: the embedded task's truth on the embedded task's prompts, none otherwise; empty: none; a name: that."""
    assert lib.reward.gold_function("auto", "tiny")(["Anna: Add 2 and 3."], ["It is 5."]) == [2.0]
    assert lib.reward.gold_function("auto", "") is None and lib.reward.gold_function("", "tiny") is None
    (tmp_path / "mine.py").write_text("def f(p, c):\n    return [7.0]\n", encoding="utf-8")
    for task in ("", "tiny"):
        assert lib.reward.gold_function(f"{tmp_path / 'mine.py'}:f", task)(["p"], ["c"]) == [7.0]


# ------------------------------------------------------------------------------------------------ several rewards


def a_rollout(seed: int = 0, B: int = 5) -> Rollout:
    frame = frame_batch(B, seed=seed)
    return Rollout(frame.tokens, frame.prompt_lens, frame.lens, torch.arange(B) % 2 == 0)


def test_score_rollout_equals_each_row_alone(float64):
    """In slices of any size, each cut to its longest row: a row's score is that of its text without filler."""
    model, rollout = make_scalar(4), a_rollout(3, B=7)
    alone = [model(rollout.tokens[i : i + 1, : int(n)])[0, -1].item() for i, n in enumerate(rollout.lens)]
    for rows in (1, 2, 3, 7, 64):
        assert lib.reward.score_rollout(model, rollout, rows).tolist() == pytest.approx(alone, abs=1e-9)


@pytest.mark.parametrize(
    ("weights", "combine", "expected"),
    [
        (None, "sum", lambda a, b, c: a + b + c),
        ([0.5, 2.0, -1.0], "sum", lambda a, b, c: 0.5 * a + 2 * b - c),
        (None, "mean", lambda a, b, c: (a + b + c) / 3),
        ([1.0, 2.0, 5.0], "mean", lambda a, b, c: (a + 2 * b + 5 * c) / 8),
        (None, "min", min),
        ([1.0, 2.0, -1.0], "min", lambda a, b, c: min(a, 2 * b, -c)),
        (None, "mean-std", lambda *x: sum(x) / 3 - (sum(v * v for v in x) / 3 - (sum(x) / 3) ** 2) ** 0.5),
    ],
)
def test_rewards_are_combined_as_the_flags_say(tmp_path, float64, weights, combine, expected):
    """A reward model and two functions, one of which asks which texts were cut: weighted first, then combined, row by
    row; and the reward models among them are handed on."""
    model, rollout = make_scalar(4), a_rollout(3)
    save_model(tmp_path / "rm", model, "toy", "reward_model.py", Made())
    source = "def length(prompts, completions):\n    return [float(len(c)) for c in completions]\n"
    source += "def whole(prompts, completions, ended):\n    return [3.0 * e for e in ended]\n"
    (tmp_path / "mine.py").write_text(source, encoding="utf-8")
    mine = f"{tmp_path / 'mine.py'}"
    policy = Checkpoint(make_gpt(), "toy", "")
    specs = [f"{mine}:length", str(tmp_path / "rm"), f"{mine}:whole"]
    score, models = lib.reward.load_reward(specs, policy, "", CPU, weights, combine)
    completions = ["a" * n for n in range(5)]
    found = score(rollout, ["p"] * 5, completions).tolist()
    scores = model.score(rollout.tokens, rollout.lens).tolist()
    parts = zip((0, 1, 2, 3, 4), scores, (3.0, 0.0, 3.0, 0.0, 3.0), strict=True)
    assert found == pytest.approx([expected(*p) for p in parts], abs=1e-9)
    assert len(models) == 1 and torch.equal(models[0].head.weight, model.head.weight)


def test_rewards_that_do_not_fit_are_refused(tmp_path):
    """No reward; weights for another number of rewards; a mean that divides by nothing; the demo's reward model on
    prompts that are not of its task, which is plausible and wrong."""
    save_model(tmp_path, make_scalar(), "tiny", "reward_model.py", Made(), "tiny")
    policy, rm = Checkpoint(make_gpt(), "tiny", "tiny"), str(tmp_path)
    for arguments, says in (
        (([], policy, "tiny", CPU), "--reward needs"),
        (([rm], policy, "tiny", CPU, [1.0, 2.0]), "--reward_weights has 2 values for 1"),
        (([rm, rm], policy, "tiny", CPU, [1.0, -1.0], "mean"), "--reward_combine mean needs"),
        (([rm, rm], policy, "tiny", CPU, [1.0, 2.0], "mean-std"), "--reward_combine mean-std takes no"),
        (([rm], policy, "", CPU), "embedded task"),
    ):
        with pytest.raises(UserError, match=says):
            lib.reward.load_reward(*arguments)
    assert len(lib.reward.load_reward([rm], policy, "tiny", CPU)[1]) == 1


# ------------------------------------------------------------------------------------------------ run folder


@dataclass
class Run:
    """The flags that a run folder looks at, and a few that it doesn't know."""

    out_dir: str
    lr: float = 0.5
    seed: int = 1
    data: str = "a.jsonl"
    reward: list[str] = dataclasses.field(default_factory=lambda: ["one", "two"])
    epochs: int = 2
    iterations: int = 3
    warmup: int = 0
    save_every: int = 0
    log_every: int = 1
    device: str = "cpu"
    trace: bool = False
    strict: bool = False
    resume: bool = False


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_run_folder(tmp_path):
    """config.json first, one JSON object a log step, results at the end with the time; a new run starts fresh logs."""
    folder = tmp_path / "out" / "stage"
    config = Run(str(folder))
    run = RunFolder(config, 9)
    assert json.loads((folder / "config.json").read_text(encoding="utf-8")) == dataclasses.asdict(config)
    run.log(step=1, loss=0.123456789, note="ü")
    run.log(step=2, loss=1e-3)
    first, second = lines_of(folder / "metrics.jsonl")
    assert first == {"step": 1, "loss": 0.123457, "note": "ü"} and second == {"step": 2, "loss": 0.001}
    results = run.finish({"a": 1})
    assert json.loads((folder / "results.json").read_text(encoding="utf-8")) == results
    assert results["a"] == 1 and results["seconds"] >= 0
    assert run.resume(model=torch.nn.Linear(1, 1)) == {"step": 0} and run.done is None
    RunFolder(config, 9)
    assert (folder / "metrics.jsonl").read_text(encoding="utf-8") == "" and not (folder / "results.json").exists()


def finished_run(config: Run, total: int) -> dict:
    """A run whose every step did nothing but log -> its results."""
    run = RunFolder(config, total)
    for step in range(total):
        run.log(step=step + 1, loss=1.0)
        run.save_state(step + 1, model=torch.nn.Linear(2, 1))
    (run.path / "model.pt").write_bytes(b"a model")
    return run.finish({"gates": [{"name": "A", "ok": False}], "loss": 1.0})


def test_a_fresh_start_leaves_no_state_behind(tmp_path):
    """Else a run that dies before its first save is resumed from the previous run's weights, under its own flags. The
    model stays until there is a new one: a mistyped flag must not cost it."""
    config = Run(str(tmp_path / "run"))
    finished_run(config, 3)
    RunFolder(dataclasses.replace(config, seed=2), 3)
    assert sorted(contents(tmp_path / "run")) == ["config.json", "metrics.jsonl", "model.pt"]
    with pytest.raises(UserError, match=r"state\.pt: no such file"):
        RunFolder(dataclasses.replace(config, seed=2, resume=True), 3)


def test_a_resumed_run_continues_its_log(tmp_path):
    """Lines after the saved step, and one that a crash tore, are taken off; torch's generator goes on where it was."""
    config = Run(str(tmp_path))
    run, model, other = RunFolder(config, 9), torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    for step in (1, 2):
        run.log(step=step, loss=float(step))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        run.save_state(2, model=model, coefficient=0.25)
        following = torch.rand(3)
        run.log(step=3, loss=3.0)
        with open(run.metrics, "a", encoding="utf-8") as f:
            f.write('{"step": 4, "lo')
        torch.manual_seed(99)
        resumed = RunFolder(dataclasses.replace(config, resume=True), 9)
        assert resumed.done is None
        state = resumed.resume(model=other)
        assert torch.equal(torch.rand(3), following)
    assert state["step"] == 2 and state["coefficient"] == 0.25 and torch.equal(other.weight, model.weight)
    resumed.log(step=3, loss=3.5)
    assert [(r["step"], r["loss"]) for r in lines_of(run.metrics)] == [(1, 1.0), (2, 2.0), (3, 3.5)]


def test_the_history_is_that_of_the_whole_run(tmp_path):
    """Means over "the last quarter" and "at the start" are of the run, not of the part after a resume. Rows without the
    figure are left out."""
    config = Run(str(tmp_path))
    run = RunFolder(config, 4)
    run.log(step=0, held_out_loss=5.0)
    run.log(step=1, loss=4.0)
    run.save_state(1)
    run.log(step=2, loss=9.0)  # after the state: it comes again
    resumed = RunFolder(dataclasses.replace(config, resume=True), 4)
    resumed.resume()
    resumed.log(step=2, loss=3.0)
    resumed.log(step=2, held_out_loss=2.0)
    assert [row["held_out_loss"] for row in resumed.history("held_out_loss")] == [5.0, 2.0]
    assert [(row["step"], row["loss"]) for row in resumed.history("loss")] == [(1, 4.0), (2, 3.0)]
    assert [row["step"] for row in resumed.history()] == [0, 1, 2, 2]


@pytest.mark.parametrize(
    ("changed", "shown"),
    [
        ({"lr": 0.25}, "--lr 0.5, not 0.25"),
        ({"seed": 2}, "--seed 1, not 2"),
        ({"data": "b.jsonl"}, "--data a.jsonl, not b.jsonl"),
        ({"reward": ["two", "one"]}, "--reward ['one', 'two'], not ['two', 'one']"),
        ({"warmup": 1}, "--warmup 0, not 1"),
        ({"epochs": 1}, "--epochs 2, not 1"),
        ({"iterations": 2}, "--iterations 3, not 2"),
    ],
)
def test_another_configuration_is_not_resumed(tmp_path, changed, shown):
    """Going on from one run's weights with another seed or learning rate gives neither run: refused, the flag named, no
    byte written. A run that shrinks has done more than it was asked for."""
    config = Run(str(tmp_path))
    finished_run(config, 3)
    before = contents(tmp_path)
    with pytest.raises(UserError) as error:
        RunFolder(dataclasses.replace(config, resume=True, **changed), 5)
    assert str(tmp_path / "state.pt") in str(error.value) and shown in str(error.value)
    assert "\n" not in str(error.value) and contents(tmp_path) == before


@pytest.mark.parametrize(
    "changed",
    [
        {"device": "cuda"},
        {"log_every": 7},
        {"save_every": 1},
        {"trace": True},
        {"strict": True},
        {"epochs": 5},
        {"iterations": 4},
    ],
    ids=str,
)
def test_what_changes_no_result_may_differ(tmp_path, changed):
    """A run goes on on another device, with another rhythm of logs and states, or for longer."""
    config = Run(str(tmp_path))
    run = RunFolder(config, 3)
    run.save_state(1)
    resumed = RunFolder(dataclasses.replace(config, resume=True, **changed), 5)
    assert resumed.resume()["step"] == 1
    found = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert {name: found[name] for name in changed} == changed


def test_a_folder_that_moved_is_resumed(tmp_path):
    """out_dir names the place, not the run."""
    RunFolder(Run(str(tmp_path / "here")), 3).save_state(1)
    (tmp_path / "here").rename(tmp_path / "there")
    assert RunFolder(Run(str(tmp_path / "there"), resume=True), 3).resume()["step"] == 1


def test_a_state_from_before_a_flag_existed_is_not_resumed(tmp_path):
    """What it was trained with is not known."""
    config = Run(str(tmp_path))
    RunFolder(config, 3).save_state(1)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    del state["config"]["lr"]
    torch.save(state, tmp_path / "state.pt")
    with pytest.raises(UserError, match=r"--lr None, not 0\.5"):
        RunFolder(dataclasses.replace(config, resume=True), 3)


def test_what_is_no_state_is_not_resumed(tmp_path):
    """A model, a list, torn bytes: one line that names the file."""
    config = Run(str(tmp_path))
    RunFolder(config, 3).save_state(1)
    whole = (tmp_path / "state.pt").read_bytes()
    for content in ({"weights": torch.ones(2)}, [1, 2], None):
        torch.save(content, tmp_path / "state.pt") if content else (tmp_path / "state.pt").write_bytes(whole[:300])
        before = contents(tmp_path)
        with pytest.raises(UserError) as error:
            RunFolder(dataclasses.replace(config, resume=True), 3)
        assert str(tmp_path / "state.pt") in str(error.value) and "\n" not in str(error.value)
        assert contents(tmp_path) == before


def test_nothing_to_resume_writes_nothing(tmp_path):
    """--resume without a state: no folder, no config.json; one that stands there stays as it is."""
    with pytest.raises(UserError, match=r"state\.pt: no such file"):
        RunFolder(Run(str(tmp_path / "deep" / "run"), resume=True), 3)
    assert list(tmp_path.iterdir()) == []
    finished_run(Run(str(tmp_path / "run")), 3)
    (tmp_path / "run" / "state.pt").unlink()
    before = contents(tmp_path)
    with pytest.raises(UserError, match=r"state\.pt: no such file"):
        RunFolder(Run(str(tmp_path / "run"), lr=0.25, resume=True), 3)
    assert contents(tmp_path) == before


def test_a_run_whose_log_is_gone_is_not_resumed(tmp_path):
    """Its results are means over the whole log: of the part after the resume alone they would be other figures, or a
    traceback after hours of training."""
    config = Run(str(tmp_path))
    RunFolder(config, 3).save_state(1)
    (tmp_path / "metrics.jsonl").unlink()
    before = contents(tmp_path)
    with pytest.raises(UserError, match=r"metrics\.jsonl: gone"):
        RunFolder(dataclasses.replace(config, resume=True), 3)
    assert contents(tmp_path) == before


def test_a_finished_run_is_done(tmp_path, capsys):
    """To resume it gives the stored results, gates included, so that --strict fails as it did; no byte changes. Before,
    the results were replaced by those of no step at all."""
    config = Run(str(tmp_path), strict=True)
    results = finished_run(config, 3)
    before = contents(tmp_path)
    capsys.readouterr()
    again = RunFolder(dataclasses.replace(config, resume=True), 3)
    assert again.done == results and contents(tmp_path) == before
    assert capsys.readouterr().out == f"{tmp_path / 'state.pt'}: 3 of 3 steps are done\n"


def test_killed_before_its_results_a_run_is_not_done(tmp_path):
    """All steps done and the last state saved, but no results yet: the end of the run is still to come."""
    config = Run(str(tmp_path))
    finished_run(config, 3)
    (tmp_path / "results.json").unlink()
    resumed = RunFolder(dataclasses.replace(config, resume=True), 3)
    assert resumed.done is None and resumed.resume()["step"] == 3


def test_a_longer_run_is_not_done_with_the_results_of_the_shorter(tmp_path):
    """Resumed with more epochs, then killed between its last state and its results: what stands there is the shorter
    run's."""
    finished_run(Run(str(tmp_path)), 3)
    longer = Run(str(tmp_path), epochs=4, resume=True)
    run = RunFolder(longer, 6)
    assert run.done is None and run.resume()["step"] == 3
    run.save_state(6)  # and killed
    assert RunFolder(longer, 6).done is None


def test_the_generator_of_a_gpu_is_part_of_the_state(tmp_path, monkeypatch):
    """Dropout on a GPU draws from the GPU's generator. A state goes from a machine with one to a machine without, and
    back."""
    config, given = Run(str(tmp_path)), []
    resume = dataclasses.replace(config, resume=True)
    state = torch.arange(16, dtype=torch.uint8)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda *device: state.clone())
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, *device: given.append(state))
    RunFolder(config, 3).save_state(1)
    RunFolder(resume, 3).resume()
    assert len(given) == 1 and torch.equal(given[0], state)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    RunFolder(resume, 3).resume()
    RunFolder(config, 3).save_state(1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    RunFolder(resume, 3).resume()
    assert len(given) == 1


@pytest.mark.parametrize("deeper", ["", "deeper"])
def test_an_out_dir_that_is_a_file(tmp_path, deeper):
    """One line that names the flag, and the file is as it was."""
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(UserError, match=r"--out_dir .*notes\.txt.*folder"):
        RunFolder(Run(str(tmp_path / "notes.txt" / deeper)), 3)
    assert contents(tmp_path) == {"notes.txt": b"mine"}


def test_a_warm_up_longer_than_the_run_is_refused(tmp_path):
    """The learning rate would never be reached. The figure that is needed is told, before anything is written."""
    with pytest.raises(UserError, match=r"--warmup 4 .* 3 steps"):
        RunFolder(Run(str(tmp_path / "run"), warmup=4), 3)
    assert list(tmp_path.iterdir()) == []
    RunFolder(Run(str(tmp_path / "run"), warmup=3), 3)


@pytest.mark.parametrize("name", ["loss", "policy_loss", "value_loss"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_ends_the_run(tmp_path, name, value):
    """Hours of nan are of no use, and their weights are no model: say at which step, and what to do."""
    run = RunFolder(Run(str(tmp_path)), 9)
    run.log(step=3, **{name: 1e30})
    with pytest.raises(UserError, match=f"{name} is {value} at step 4; lower --lr"):
        run.log(step=4, **{name: value})
    assert [row["step"] for row in run.history()] == [3]


def test_logs_and_results_are_valid_json(tmp_path):
    """A figure that is nan (no held-out data: no held-out loss) must not make a file that JSON readers refuse."""
    run = RunFolder(Run(str(tmp_path)), 9)
    run.log(step=1, loss=1.0, held_out_loss=float("nan"), score=float("-inf"))
    run.finish({"held_out_loss": float("nan"), "deep": [{"x": float("inf")}], "gates": []})
    assert strict_json(tmp_path / "metrics.jsonl") == {"step": 1, "loss": 1.0, "held_out_loss": None, "score": None}
    results = strict_json(tmp_path / "results.json")
    assert results["held_out_loss"] is None and results["deep"] == [{"x": None}]


# --------------------------------------------------------------------------------------- device, seeds, schedule, gates


def test_pick_device():
    """auto takes what is there; what isn't there is a one-line message with the flag."""
    precision = torch.get_float32_matmul_precision()
    try:
        assert lib.train.pick_device("cpu") == CPU
        best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        assert lib.train.pick_device("auto").type == best
        for name in ["quantum", "cpu:x", ""] + ([] if torch.cuda.is_available() else ["cuda"]):
            with pytest.raises(UserError, match="--device") as error:
                lib.train.pick_device(name)
            assert "\n" not in str(error.value)
    finally:
        torch.set_float32_matmul_precision(precision)


def test_autocast():
    """float32 leaves everything alone; bfloat16 makes matrix products of half precision from float32 weights."""
    layer = torch.nn.Linear(4, 4)
    with lib.train.autocast(CPU, "float32"):
        assert layer(torch.ones(1, 4)).dtype == torch.float32
    with lib.train.autocast(CPU, "bfloat16"):
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
    lib.train.set_lr(optimizer, 0.125)
    assert [g["lr"] for g in optimizer.param_groups] == [0.125, 0.125]


@pytest.mark.parametrize(
    ("value", "low", "high", "ok", "shown"),
    [
        (0.5, 0.4, 0.6, True, "0.500 (expected at default settings: 0.4 to 0.6)  OK"),
        (0.4, 0.4, 0.6, True, "OK"),
        (0.6, 0.4, 0.6, True, "OK"),
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


def test_shares_of_the_time_by_hand():
    """The seconds from the first time to the last, and what part of them each step took: together 1."""
    found = lib.show.shares([10.0, 12.0, 15.0, 20.0], ("rollout", "score", "update"))
    assert found == {"seconds": 10.0, "share_rollout": 0.2, "share_score": 0.3, "share_update": 0.5}
    with pytest.raises(ValueError):
        lib.show.shares([10.0, 12.0, 15.0], ("rollout", "score", "update"))


# ------------------------------------------------------------------------------------------------ training


def model_with_gradients(seed: int, dtype=torch.float64):
    """A GPT whose gradients are known -> the model, and its gradients as one vector."""
    model = make_gpt(seed, n_embd=8, dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator, dtype=dtype)
    return model, gradients(model)


def gradients(model) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def test_gradients_are_clipped_by_their_common_norm():
    """Scaled down all together to the given length, their direction kept; shorter ones are left alone. What comes back
    is their norm before."""
    for share in (0.1, 0.999):
        model, before = model_with_gradients(1)
        norm = before.norm().item()
        assert clip_gradients(model, share * norm).item() == pytest.approx(norm, rel=1e-9)
        assert torch.allclose(gradients(model), share * before, rtol=1e-6, atol=0)  # torch adds 1e-6 to the norm
    model, before = model_with_gradients(1)
    assert clip_gradients(model, 1.001 * norm).item() == pytest.approx(norm, rel=1e-9)
    assert torch.equal(gradients(model), before)


def test_a_limit_of_0_leaves_the_gradients_alone():
    """--grad_clip 0 is off. Taken for a limit it would train nothing: every gradient becomes 0."""
    model, before = model_with_gradients(2)
    assert clip_gradients(model, 0.0).item() == pytest.approx(before.norm().item(), rel=1e-9)
    assert torch.equal(gradients(model), before) and before.norm() > 1


def test_frozen_parameters_do_not_count_when_clipping():
    """A left-over gradient of a frozen layer would shrink those that are trained."""
    model, _ = model_with_gradients(3)
    model.wte.requires_grad_(False)
    expected = torch.cat([p.grad.flatten() for name, p in model.named_parameters() if name != "wte.weight"]).norm()
    assert clip_gradients(model, 1.0).item() == pytest.approx(expected.item(), rel=1e-9)


@pytest.mark.parametrize("make", [make_gpt, make_scalar, make_told])
def test_train_last_layers(make):
    """The last n blocks, the final LayerNorm and all that a scalar model has above them; 0: everything. The token
    embedding is the output layer too, so it stays. More blocks than there are: the flag is named."""
    above = r"|head\.|block\.|ln\.|direction$"
    for n, kept in ((0, r""), (1, rf"(gpt\.)?(h\.2|ln_f)\.{above}"), (2, rf"(gpt\.)?(h\.[12]|ln_f)\.{above}")):
        model = make(n_layer=3)
        frozen.train_last_layers(model, n)
        expected = [name for name, _ in model.named_parameters() if re.match(kept, name)]
        assert [name for name, p in model.named_parameters() if p.requires_grad] == expected
        assert len(frozen.trainable(model)) == len(expected) > 0
    with pytest.raises(UserError, match="--train_layers 4: the model has 3 blocks"):
        frozen.train_last_layers(make(n_layer=3), 4)


def test_due_is_every_n_steps_and_at_the_end():
    assert [step for step in range(7) if lib.train.due(step, 3, 7)] == [2, 5, 6]
    assert [step for step in range(6) if lib.train.due(step, 3, 6)] == [2, 5]
    assert [step for step in range(3) if lib.train.due(step, 1, 3)] == [0, 1, 2]
    assert [step for step in range(7) if lib.train.due(step, 0, 7)] == [6]


def test_the_bar_starts_where_the_run_goes_on():
    bar = lib.train.progress(2, 5, "name")
    assert (bar.n, bar.total, list(bar)) == (2, 5, [2, 3, 4])


def test_every_block_is_compiled_and_no_name_changes(monkeypatch):
    """torch.compile(model) would put _orig_mod before every name, and no checkpoint would load."""
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, *a, **k: compiled.append(self))
    policy, scorer = make_gpt(), make_told()
    names = [*policy.state_dict(), *scorer.state_dict()]
    lib.train.compile_blocks(policy, scorer)
    assert len(compiled) == len(set(compiled)) and set(compiled) == {*policy.h, *scorer.gpt.h, scorer.block}
    assert [*policy.state_dict(), *scorer.state_dict()] == names


def test_blocks_are_recomputed_where_asked_for(monkeypatch):
    """--recompute reaches every block of every network, the scalar model's own too, and only where it is set."""
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, *a, **k: compiled.append(self))
    policy, scorer, other = make_gpt(), make_told(), make_gpt()
    blocks = [*policy.h, *scorer.gpt.h, scorer.block]
    lib.train.prepare_blocks(TrainConfig(recompute=True), policy, scorer)
    assert all(block.recompute for block in blocks) and not any(block.recompute for block in other.h)
    lib.train.prepare_blocks(TrainConfig(compile=True), policy, scorer, other)
    assert not any(block.recompute for block in blocks) and len(compiled) == len(blocks) + len(other.h)


# ------------------------------------------------------------------------------------------------ samples


def test_sample_prompts_leaves_room_for_an_answer(monkeypatch):
    """The end of each prompt, where the question is; and at least one token of it, whatever --max_new_tokens says."""
    policy, seen = make_gpt(block_size=16), []

    def record(policy, prompts, max_new_tokens, **options):
        seen.append((prompts, max_new_tokens, options["eos_id"], options.get("temperature", 1.0)))
        return generate(policy, prompts, max_new_tokens, **options)

    monkeypatch.setattr(lib.show, "generate", record)
    prompts = [list(range(20)), [1, 2, 3]]
    lib.show.sample_prompts(policy, prompts, TOY, 6, seed=1)
    lib.show.sample_prompts(policy, prompts, TOY, 99, seed=1)
    assert seen == [
        ([list(range(10, 20)), [1, 2, 3]], 6, TOY.eos_id, 1.0),
        ([[19], [3]], 15, TOY.eos_id, 1.0),
    ]


def test_show_samples(capsys):
    """Three prompts with what was made of them, without EOS, and scores if there are any."""
    tokens = torch.tensor([[0, 1, 2, TOY.eos_id], [3, 4, 5, 6], [7, 8, TOY.eos_id, 0], [1, 1, 1, 1]])
    rollout = Rollout(tokens, torch.tensor([2, 1, 1, 1]), torch.tensor([4, 4, 3, 4]), torch.tensor([1, 0, 1, 0]).bool())
    lib.show.show_samples(rollout, TOY, torch.tensor([1.0, -0.256, 0.0, 9.0]))
    lib.show.show_samples(rollout, TOY)
    with_scores = ["  [+1.00] 'ab' -> 'c'", "  [-0.26] 'd' -> 'efg'", "  [+0.00] 'h' -> 'i'"]
    without = ["  'ab' -> 'c'", "  'd' -> 'efg'", "  'h' -> 'i'"]
    assert capsys.readouterr().out.splitlines() == [*with_scores, *without]


def test_compare_samples_equals_a_loop(float64, capsys):
    """EOS rates of both, and the mean over the policy's own samples of log pi/pi_ref, token after token; the same
    whether or not the two have been compared before."""
    policy, reference = make_gpt(1), make_gpt(1)
    spread(policy, 5, 0.05)
    prompts = random_prompts([3, 1, 4, 2, 5, 2, 3, 3], 22)
    found = lib.show.compare_samples(policy, reference, prompts, TOY, 8, seed=3)
    rollout, before = (lib.show.sample_prompts(m, prompts, TOY, 8, seed=3) for m in (policy, reference))
    ratios = []
    for row, prompt in enumerate(prompts):
        completion = rollout.tokens[row, len(prompt) : int(rollout.lens[row])].tolist()
        both = [completion_logprobs(m, prompt, completion).sum().item() for m in (policy, reference)]
        ratios.append(both[0] - both[1])
    assert found["kl"] == pytest.approx(sum(ratios) / len(ratios), abs=1e-9) and abs(found["kl"]) > 0.01
    assert found["eos_rate"] == rollout.ended.double().mean() and found["ref_eos_rate"] == before.ended.double().mean()
    assert f"EOS rate {found['eos_rate']:.2f} (reference {found['ref_eos_rate']:.2f})" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("ended", "ref_ended", "per_token", "warned"),
    [
        (10, 10, 0.0, False),
        (8, 10, 2.4, False),  # 10 tokens each: 24 nats
        (7, 10, 0.0, True),
        (5, 6, 0.0, False),
        (10, 10, 2.6, True),
        (0, 0, 0.0, False),  # neither has learned to stop
    ],
)
def test_a_collapse_is_said_aloud(monkeypatch, capsys, ended, ref_ended, per_token, warned):
    """A policy that no longer stops, or that is far from where it began: without held-out data, nothing else shows
    it."""
    policy, reference = make_gpt(1), make_gpt(2)
    tokens, ten = torch.zeros(10, 12, dtype=torch.long), torch.arange(10)
    lens = torch.full((10,), 12), torch.full((10,), 2)

    def sampled(model, *arguments):
        return Rollout(tokens, lens[1], lens[0], ten < (ended if model is policy else ref_ended))

    monkeypatch.setattr(lib.show, "sample_prompts", sampled)
    per = {policy: per_token, reference: 0.0}
    monkeypatch.setattr(lib.show, "token_logprobs", lambda model, tokens, mask: per[model] * mask)
    found = lib.show.compare_samples(policy, reference, [[1, 2]] * 10, TOY, 10, 1)
    assert found == {
        "eos_rate": pytest.approx(ended / 10),
        "ref_eos_rate": pytest.approx(ref_ended / 10),
        "kl": pytest.approx(10 * per_token, rel=1e-6),
    }
    assert ("WARNING" in capsys.readouterr().out) is warned


def test_a_trace_shows_one_rollout_token_by_token(capsys):
    """Every action with its figures, and no other position: the shift by one between a token and its log-prob is where
    a reader looks first."""
    names = ("logprobs", "ref_logprobs", "kl", "rewards", "values", "advantages", "returns")
    columns = {name: torch.arange(8.0).view(2, 4) + 10 * n for n, name in enumerate(names)}
    mask = torch.tensor([[0, 1, 1, 0], [0, 0, 1, 1]]).bool()
    tokens = torch.tensor([[0, 1, 2, TOY.eos_id, 0], [3, 4, 5, 6, 7]])
    lib.show.print_trace(SimpleNamespace(tokens=tokens, action_mask=mask, **columns), TOY, row=0)
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split() == ["token", *names]
    assert [line.split() for line in lines] == [
        [repr("c"), *(f"{1 + 10 * n}.000" for n in range(7))],
        [repr("w"), *(f"{2 + 10 * n}.000" for n in range(7))],
    ]


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
