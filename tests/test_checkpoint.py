"""lib/checkpoint.py: what is saved is what is loaded, and whatever else a file may hold is refused in one line."""

from __future__ import annotations

import dataclasses
import math
import os
import pickle
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from helpers import (
    TOY,
    make_gpt,
    make_scalar,
    make_told,
)

import data.tokenizer
import lib.checkpoint
from data.tokenizer import NAMED
from lib.cli import UserError
from data.tokenizer import load_tokenizer
from model import GPTConfig
from lib.checkpoint import load_model, load_scorer, save_model
from lib.weights import save_pretrained

CPU = torch.device("cpu")


@dataclass
class Made:
    by: str = "a test"


def content_of(path: Path) -> dict:
    """A checkpoint's content, with the ordered dict that torch makes of a state dict as a dict."""
    content = torch.load(path, weights_only=True)
    return {k: dict(v) if isinstance(v, dict) else v for k, v in content.items()}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_saved_policy_is_the_loaded_one(tmp_path):
    """Bit for bit, with every field of its shape, from the folder or the file, in eval mode (need R24)."""
    model = make_gpt(3, vocab=30, n_embd=16, dropout=0.3, real_vocab=23)
    save_model(tmp_path / "stage", model, "tiny", "sft.py", Made())
    tokens = torch.randint(0, 23, (2, 9))
    for path in (tmp_path / "stage", str(tmp_path / "stage"), tmp_path / "stage" / "model.pt"):
        loaded, _, task = load_model(path, CPU)
        assert task == "" and not loaded.training and loaded.config == model.config
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
    loaded, _, task = load_model(tmp_path, CPU, "scalar")
    tokens = torch.randint(0, 23, (2, 9))
    assert task == "" and torch.equal(loaded(tokens), model(tokens)) and float(loaded.mean) == 1.25
    assert type(loaded) is type(model) and loaded.config == model.config


def test_published_weights_are_a_policy_too(tmp_path, monkeypatch):
    """A policy, for evaluate.py or sample.py, that no stage has made: in the vocabulary of its folder, whose table may
    have more rows than tokens, without dropout, and of no task."""
    folder, model = tmp_path / "published", make_gpt(9, vocab=30)
    save_pretrained(model, folder)
    monkeypatch.setitem(NAMED, str(folder), lambda template: TOY)
    found = load_model(folder, CPU)
    assert (found.vocabulary, found.tokenizer, found.task) == ("toy", TOY, "") and not found.model.training
    tokens = torch.arange(12).view(2, 6)
    torch.testing.assert_close(found.model(tokens), model(tokens)[..., :23])
    with pytest.raises(UserError):
        load_model(folder, CPU, "scalar")


@pytest.mark.parametrize("kind", ["gpt", "scalar"])
def test_checkpoints_of_before_load_as_what_they_were(tmp_path, kind):
    """One that was saved when GPTConfig had fewer fields: each of them had the value that is its default now."""
    model = make_gpt(3) if kind == "gpt" else make_scalar(3)
    save_model(tmp_path, model, "tiny", "test", Made())
    content = content_of(tmp_path / "model.pt")
    for field in dataclasses.fields(GPTConfig):
        if content["config"][field.name] == field.default:
            del content["config"][field.name]
    assert "rope_base" not in content["config"]
    content["config"]["expectation"] = False  # a field that has gone since
    torch.save(content, tmp_path / "model.pt")
    loaded = load_model(tmp_path, CPU, kind).model
    tokens = torch.randint(0, 23, (2, 9))
    assert torch.equal(loaded(tokens), model(tokens)) and loaded.config == model.config


def test_atomic_save_leaves_no_half_file(tmp_path, monkeypatch):
    """A crash in the middle of a save leaves the old checkpoint as it was."""
    path = tmp_path / "deep" / "model.pt"
    lib.checkpoint.atomic_save({"a": 1}, path)
    assert torch.load(path, weights_only=True) == {"a": 1} and [p.name for p in path.parent.iterdir()] == ["model.pt"]
    before, save = path.read_bytes(), torch.save
    if os.name != "nt":  # there a file that somebody reads can't be replaced
        with open(path, "rb") as reader:  # who reads the old one goes on reading it: it is replaced, not written over
            lib.checkpoint.atomic_save({"a": 1, "b": [0] * 999}, path)
            assert reader.read() == before
        lib.checkpoint.atomic_save({"a": 1}, path)
        assert path.read_bytes() == before

    def crash(obj, target):
        save(obj, target)
        Path(target).write_bytes(Path(target).read_bytes()[:50])
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", crash)
    with pytest.raises(UserError, match=r"model\.pt"):
        lib.checkpoint.atomic_save({"a": 2}, path)
    assert path.read_bytes() == before


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
        without("made"),
        *(
            {**good_content(), key: value}
            for key in ("tokenizer", "made", "config", "kind")
            for value in (None, 3, [1])
        ),
        {**good_content(), "weights": None},
        {**good_content(), "weights": {"wte.weight": "text"}},
        *({**good_content(), "made": made} for made in ({}, {"script": "sft.py"}, {"script": "a", "config": None})),
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
    assert lib.checkpoint.start_vocabulary(str(tmp_path)) in ("tiny", "gpt2")  # sft.py asks this first


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["gpt.wte.weight", "head.weight", "mean"])
def test_a_checkpoint_that_is_not_finite_is_not_loaded(tmp_path, name, value):
    """As one that another program wrote, or a damaged disk: every number that comes of it would be nan."""
    save_model(tmp_path, make_scalar(1), "tiny", "reward_model.py", Made())
    content = content_of(tmp_path / "model.pt")
    content["weights"][name].view(-1)[-1] = value
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(UserError, match=rf"model\.pt: {name} holds values that are not finite") as error:
        load_model(tmp_path, CPU, "scalar")
    assert "\n" not in str(error.value)


def test_a_checkpoint_knows_its_vocabulary(tmp_path, monkeypatch):
    """`python -m data.make_vocab` has made another data/tiny.tiktoken since: the ids mean other words now, and the old
    checkpoint would speak nonsense. One of before the mark loads as ever, and so does one of the vocabulary of now."""
    save_model(tmp_path / "before", make_gpt(vocab=924), "tiny", "sft.py", Made())
    save_model(tmp_path / "gpt2", make_gpt(vocab=924), "gpt2", "sft.py", Made())
    content = content_of(tmp_path / "before" / "model.pt")
    (tmp_path / "old").mkdir()
    torch.save({k: v for k, v in content.items() if k != "fingerprint"}, tmp_path / "old" / "model.pt")
    load_model(tmp_path / "before", CPU)
    lines = data.tokenizer.TINY_RANKS.read_text(encoding="ascii").splitlines()
    changed = tmp_path / "tiny.tiktoken"
    (a, i), (b, j) = lines[-2].split(), lines[-1].split()
    for new in (lines[:-1], [*lines[:-2], f"{b} {i}", f"{a} {j}"]):  # a token less; two exchanged
        changed.write_text("\n".join(new) + "\n", encoding="ascii")
        monkeypatch.setattr(data.tokenizer, "TINY_RANKS", changed)
        load_tokenizer.cache_clear()
        for kind in ("gpt", "any"):
            with pytest.raises(UserError, match=r"before.model\.pt: made with another tiny vocabulary .* train it"):
                load_model(tmp_path / "before", CPU, kind)
        load_model(tmp_path / "old", CPU)
        load_model(tmp_path / "gpt2", CPU)
        save_model(tmp_path / "after", make_gpt(vocab=924), "tiny", "sft.py", Made())
        load_model(tmp_path / "after", CPU)
    changed.write_bytes(("\r\n".join(lines) + "\r\n").encode())  # other line ends are no other vocabulary
    load_tokenizer.cache_clear()
    load_model(tmp_path / "before", CPU)
    monkeypatch.undo()
    load_tokenizer.cache_clear()
    load_model(tmp_path / "before", CPU)


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
    policy = load_model(tmp_path / "a", CPU)
    capsys.readouterr()
    load_scorer(tmp_path / "b", policy, CPU)
    assert capsys.readouterr().out == f"{tmp_path / 'b' / 'model.pt'}: made by reward_model.py\n"


def test_a_scorer_reads_what_the_policy_writes(tmp_path):
    """Ids of another vocabulary give plausible scores of a text that nobody wrote; texts longer than the scorer's block
    size a traceback in the middle of a run. A longer block size is no harm."""
    save_model(tmp_path / "policy", make_gpt(block_size=40), "tiny", "sft.py", Made())
    policy = load_model(tmp_path / "policy", CPU)
    for name, tokenizer, block_size in (("same", "tiny", 40), ("longer", "tiny", 41)):
        model = make_scalar(3, block_size=block_size)
        save_model(tmp_path / name, model, tokenizer, "reward_model.py", Made(), "tiny")
        scorer = load_scorer(tmp_path / name, policy, CPU)
        assert scorer.task == "tiny" and not scorer.model.training
        assert torch.equal(scorer.model.head.weight, model.head.weight)
    save_model(tmp_path / "gpt2", make_scalar(block_size=40), "gpt2", "reward_model.py", Made())
    with pytest.raises(UserError, match="gpt2 reads gpt2 tokens, the policy writes tiny tokens"):
        load_scorer(tmp_path / "gpt2", policy, CPU)
    save_model(tmp_path / "short", make_scalar(block_size=39), "tiny", "reward_model.py", Made())
    with pytest.raises(UserError, match="short reads texts of 39 tokens at most, the policy's have up to 40"):
        load_scorer(tmp_path / "short", policy, CPU)
    with pytest.raises(UserError, match=r"a reward model .* is needed"):
        load_scorer(tmp_path / "policy", policy, CPU)
    with pytest.raises(UserError, match=r"run `python reward_model\.py` first"):
        load_scorer(tmp_path / "nowhere", policy, CPU)
