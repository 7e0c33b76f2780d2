"""`python -m lib.weights export`: the files are read here by hand, and by transformers where it is installed. The
truth is the network and the vocabulary that went in."""

from __future__ import annotations

import json
import runpy
import sys
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest
import regex
import torch
from helpers import GPT2_BPE, ROOT, make_gpt, make_scalar
from safetensors.torch import load_file
from test_tokenizer import DEFAULT, DIGITS, LLAMA3, SPELT, TALK, awkward_texts, by_hand, write_folder

from data.files import Prompt
from data.tokenizer import load_tokenizer
from lib.checkpoint import load_model, save_model
from lib.cli import UserError
from lib.vocabulary import merges_of
from lib.weights import Config, run, save_pretrained
from sampling import generate

CPU = torch.device("cpu")
LLAMA = {"norm": "rms", "mlp": "swiglu", "bias": "none", "rope_base": 50.0, "n_inner": 40, "n_kv_head": 2}
BLOCKS = pytest.mark.parametrize("block", [{}, LLAMA, {**LLAMA, "tied": False}], ids=["gpt2", "llama", "untied"])
# Awkward in other ways than those of test_tokenizer.py: a byte that a vocabulary lacks between two that it merges, ...
MORE = ["", "\r\n\r\n", "\n\r\n", "h\x04e", "1\x042 he\x04ll", "\u202eabc", "e\u0323\u0301", "\x1b[0m\x7f", "x" * 3000]


@dataclass
class Made:
    data: str = "my.jsonl"


def texts() -> list[str]:
    return [*awkward_texts(), *MORE]


def export(folder: Path, model, saved: str = "tiny") -> Path:
    """What the command makes of a checkpoint with this model."""
    save_model(folder / "in", model, saved, "ppo.py", Made())
    run(Config(["export", str(folder / "in"), str(folder / "out")]))
    return folder / "out"


def read(folder: Path, name: str) -> dict:
    return json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))


def bos_first(token: str = "<|endoftext|>", i: int = 0) -> dict:
    """A post_processor that puts a token before every text."""
    single = [{"SpecialToken": {"id": token, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    known = {token: {"id": token, "ids": [i], "tokens": [token]}}
    return {"type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": known}


@pytest.fixture(
    params=["tiny", pytest.param("gpt2", marks=pytest.mark.slow), "chatml", "llama3", "nfc", "bos", "bos chat"]
)
def vocabulary(request, tmp_path, monkeypatch):
    """Vocabularies of every kind that a checkpoint can hold."""
    name, template = request.param, "plain" if request.param in ("nfc", "bos") else "auto"
    if name == "gpt2":
        if not GPT2_BPE.exists():
            pytest.skip("GPT-2's vocabulary is not here")
        monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(GPT2_BPE))
    changes = {"bos": {"post_processor": bos_first()}, "bos chat": {"post_processor": bos_first()}}.get(name, {})
    changes |= {"normalizer": {"type": "NFC"}} if name == "nfc" else {"pre_tokenizer": DIGITS}
    content = by_hand(LLAMA3 if name == "llama3" else ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], **changes)
    beside = {"tokenizer_config": {"chat_template": DEFAULT}} if name == "chatml" else {}
    folder = write_folder(tmp_path / "published", content, **beside)
    return load_tokenizer(name if name in ("tiny", "gpt2") else folder, template)


# ------------------------------------------------------------------------------------------------ the tokenizer


def slow_reader(whole: dict) -> Callable[[str], list[int]]:
    """tokenizer.json by its definition, text -> ids: cut by the pattern, bytes as characters, one merge after the other
    in the order of the list. Bytes that the vocabulary lacks are left out first."""
    cut, byte_level = whole["pre_tokenizer"]["pretokenizers"]
    assert (cut["behavior"], cut["invert"], byte_level["use_regex"]) == ("Removed", True, False)
    visible = [b for b in range(256) if chr(b).isprintable() and b not in (32, 173)]
    hidden = sorted(set(range(256)) - set(visible))
    letters = {b: chr(b) for b in visible} | {b: chr(256 + i) for i, b in enumerate(hidden)}
    vocab = whole["model"]["vocab"]
    order = {tuple(pair): i for i, pair in enumerate(whole["model"]["merges"])}

    def ids_of(text: str) -> list[int]:
        ids = []
        for piece in regex.finditer(cut["pattern"]["Regex"], unicodedata.normalize("NFC", text) if nfc else text):
            parts = [letters[b] for b in piece.group().encode() if letters[b] in vocab]
            while any(pair in order for pair in pairwise(parts)):
                first = min(pairwise(parts), key=lambda pair: order.get(pair, len(order)))
                at = next(i for i in range(len(parts)) if tuple(parts[i : i + 2]) == first)
                parts[at : at + 2] = ["".join(first)]
            ids += [vocab[part] for part in parts]
        return ids

    nfc = whole["normalizer"] == {"type": "NFC"}
    return ids_of


def test_the_exported_tokenizer_json_gives_our_ids(vocabulary, tmp_path):
    """On 200 awkward texts and some more, by a slow reader of the file; and our own reader finds the same vocabulary in
    it, special tokens, template and start of a prompt included."""
    folder = export(tmp_path, make_gpt(3, vocab=vocabulary.n_vocab, n_layer=1), vocabulary.saved)
    whole = read(folder, "tokenizer")
    assert whole["model"]["ignore_merges"] is False
    ids_of = slow_reader(whole)
    for text in [*texts(), *SPELT]:
        if len(text) < 200:
            assert ids_of(text) == vocabulary.encode(text), text
    again = load_tokenizer(str(folder))
    assert (again.n_vocab, again.eos_id, again.template) == (vocabulary.n_vocab, vocabulary.eos_id, vocabulary.template)
    for text in [*texts(), *SPELT, TALK]:
        assert again.encode(text) == vocabulary.encode(text)
        assert again.encode_prompt(text) == vocabulary.encode_prompt(text)
    if vocabulary.name not in ("tiny", "gpt2"):
        before, after = json.loads(vocabulary.saved), json.loads(again.saved)
        for part in ("ranks", "special", "pattern", "nfc"):
            assert after[part] == before[part], part


def test_the_end_of_a_turn_is_the_end(vocabulary, tmp_path):
    """By name and by id, whatever else the vocabulary calls its EOS: chatml's is <|im_end|>, Llama 3's <|eot_id|>."""
    folder = export(tmp_path, make_gpt(3, vocab=vocabulary.n_vocab, n_layer=1), vocabulary.saved)
    ends = {"plain": "<|endoftext|>", "chatml": "<|im_end|>", "llama3": "<|eot_id|>"}
    assert read(folder, "tokenizer_config")["eos_token"] == ends[vocabulary.template]
    ids = {token["content"]: token["id"] for token in read(folder, "tokenizer")["added_tokens"]}
    assert read(folder, "generation_config")["eos_token_id"] == ids[ends[vocabulary.template]] == vocabulary.eos_id


def test_tokens_that_merging_does_not_reach():
    """Llama 3 has some: abcd is taken whole, but bc is merged first and never leads to it."""
    ranks = {b"a": 0, b"b": 1, b"c": 2, b"d": 3, b"bc": 4, b"ab": 5, b"cd": 6, b"abcd": 7, b"abc": 8}
    merges, whole_first = merges_of(ranks)
    assert whole_first and [b"ab", b"cd"] in merges and merges.index([b"b", b"c"]) == 0
    assert [b"a", b"bc"] in merges and not any(b"".join(pair) not in ranks for pair in merges)
    assert merges_of({b"a": 5, b"b": 9, b"ba": 11, b"aba": 12}) == ([[b"b", b"a"], [b"a", b"ba"]], False)


def test_the_exported_chat_template_is_ours(vocabulary, tmp_path):
    """Rendered as transformers does (whole lines of blocks trimmed), turn by turn, system turn and BOS included."""
    jinja2 = pytest.importorskip("jinja2")
    folder = export(tmp_path, make_gpt(3, vocab=vocabulary.n_vocab, n_layer=1), vocabulary.saved)
    config = read(folder, "tokenizer_config")
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(config["chat_template"])
    talks = [TALK.turns, (("user", "hello"),), (("system", "{{ x }}"), ("user", " \n 1 \n")), (("user", ""),)]
    for turns in talks:
        messages = [{"role": role, "content": text} for role, text in turns]
        found = template.render(messages=messages, add_generation_prompt=True, bos_token=config.get("bos_token"))
        assert found == "".join(mark + text for mark, text in vocabulary.pieces(Prompt.of(list(turns))))


# ----------------------------------------------------------------------------------------------- which token is what


@BLOCKS
def test_an_exported_policy_knows_its_eos(tmp_path, block):
    """Without the ids in config.json transformers takes GPT-2's or Llama's: it never stops, or at another token."""
    folder = export(tmp_path, make_gpt(3, vocab=924, **block))
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    )
    eos, tiny = 923, load_tokenizer("tiny")
    assert tiny.eos_id == eos and tiny.n_vocab == 924
    for name in ("config", "generation_config"):
        found = read(folder, name)
        assert (found["eos_token_id"], found["pad_token_id"], found["bos_token_id"]) == (eos, eos, None)
    assert read(folder, "config")["vocab_size"] == 924
    config = read(folder, "tokenizer_config")
    assert (config["eos_token"], config["pad_token"], config["padding_side"]) == ("<|endoftext|>",) * 2 + ("left",)
    assert config["split_special_tokens"] is True and config["model_max_length"] == 48
    added = read(folder, "tokenizer")["added_tokens"]
    assert [(t["content"], t["id"], t["special"]) for t in added] == [("<|endoftext|>", eos, True)]


def test_a_prompt_s_first_token_is_told(tmp_path):
    """As bos_token, in the template and in tokenizer.json's post_processor."""
    tokenizer = load_tokenizer(write_folder(tmp_path / "hf", by_hand(post_processor=bos_first())), "plain")
    folder = export(tmp_path, make_gpt(3, vocab=57), tokenizer.saved)
    assert read(folder, "config")["bos_token_id"] == 0 and read(folder, "tokenizer_config")["bos_token"] == SPELT[0]
    processor = read(folder, "tokenizer")["post_processor"]
    assert processor["single"] == bos_first()["single"] and processor["special_tokens"][SPELT[0]]["ids"] == [0]
    assert read(folder, "tokenizer_config")["split_special_tokens"] is False  # its prompts need the token


@BLOCKS
def test_an_exported_reward_model_has_padding_of_its_own(tmp_path, block, capsys):
    """It is read at the last token that is no padding. If EOS were the padding, that would be the token before EOS,
    while ours scores a finished answer at its EOS."""
    model = make_scalar(5, vocab=924, **block)
    model.mean, model.std = torch.tensor(0.7), torch.tensor(2.5)
    folder = export(tmp_path, model)
    config, tokens = read(folder, "config"), load_file(folder / "model.safetensors")
    assert (config["eos_token_id"], config["pad_token_id"], config["vocab_size"]) == (923, 924, 925)
    names = {"llama": "model.embed_tokens.weight", "gpt2": "transformer.wte.weight"}
    table = tokens[names[config["model_type"]]]
    assert table.shape == (925, 32) and torch.equal(table[:924], model.gpt.wte.weight)
    tokenizer = read(folder, "tokenizer_config")
    assert (tokenizer["pad_token"], tokenizer["padding_side"]) == ("<|pad|>", "right")
    added = {t["content"]: t["id"] for t in read(folder, "tokenizer")["added_tokens"]}
    assert added == {"<|endoftext|>": 923, "<|pad|>": 924}
    assert not (folder / "generation_config.json").exists()
    shift, told = config.get("reward_shift"), capsys.readouterr().out
    assert (shift is None) == (not block) and (f"add {shift or 0:.6f} to its scores" in told) == bool(block)


# ----------------------------------------------------------------------------------------------- what can't be exported


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (
            lambda: make_gpt(rope_base=1e4),
            ["its h.0.attn.c_attn.bias", "`sft.py --rope_base 0`", "`sft.py --block llama`"],
        ),
        (lambda: make_gpt(**LLAMA | {"rope_base": 0.0}), ["its h.0.attn.c_attn.bias", "`sft.py --block llama`"]),
        (lambda: make_scalar(expectation=True), ["its direction, block", "`reward_model.py --expectation no`"]),
        (lambda: make_scalar(expectation=True, rope_base=1e4), ["`sft.py --rope_base 0`", "--expectation no`"]),
    ],
    ids=["the demo's policy", "llama without positions", "expectation", "the demo's reward model"],
)
def test_what_can_not_be_exported_names_the_flags(tmp_path, model, says):
    """One line, before anything is written."""
    with pytest.raises(UserError) as error:
        export(tmp_path, model())
    assert all(part in str(error.value) for part in says) and "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_changed_llama_is_not_exported(tmp_path):
    """A part that Llama's layout has no name for would be left out in silence."""
    model = make_gpt(3, **LLAMA)
    model.h[1].extra = torch.nn.Linear(4, 4)
    with pytest.raises(UserError, match=r"no published layout has its h\.1\.extra\.bias"):
        save_pretrained(model, tmp_path / "out")


def test_the_command_and_its_mistakes(tmp_path, monkeypatch, capsys):
    """As the shell calls it: --help tells of both ways, a mistake is one line, and a checkpoint's own folder stays."""

    def call(*words: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["weights.py", *words])
        status = 0
        try:
            runpy.run_path(str(ROOT / "lib" / "weights.py"), run_name="__main__")
        except SystemExit as end:
            status = end.code
        told = capsys.readouterr()
        return status, told.err if status else told.out

    status, told = call("--help")
    assert status == 0 and "export out/ppo FOLDER" in told and "--init" in told
    save_model(tmp_path / "in", make_gpt(3, vocab=924, n_layer=1), "tiny", "ppo.py", Made())
    status, told = call("export", str(tmp_path / "in"), str(tmp_path / "out"))
    assert status == 0 and "AutoModelForCausalLM" in told and (tmp_path / "out" / "config.json").exists()
    for words, says in (
        (["export", str(tmp_path / "in")], "export CHECKPOINT FOLDER"),
        (["import", str(tmp_path / "in"), str(tmp_path / "x")], "export CHECKPOINT FOLDER"),
        (["export", str(tmp_path / "in"), str(tmp_path / "in")], "holds other files too (model.pt)"),
        (["export", str(tmp_path / "none"), str(tmp_path / "x")], "no such checkpoint"),
    ):
        status, told = call(*words)
        assert status == 2 and says in told and told.count("\n") == 1
    assert [path.name for path in (tmp_path / "in").iterdir()] == ["model.pt"]


def test_an_export_again_takes_the_place_of_the_first(tmp_path):
    for seed in (3, 4):
        model = make_gpt(seed, vocab=924, n_layer=1)
        folder = export(tmp_path, model)
    tokens = torch.arange(20)[None]
    assert torch.equal(load_model(folder, CPU).model(tokens), model(tokens))


# ------------------------------------------------------------------------------------------------ transformers


@BLOCKS
def test_transformers_samples_and_scores_as_we_do(tmp_path, block, vocabulary):
    """Logits, the texts at temperature 0 with their end, ids of awkward texts and prompts, scores in batches."""
    transformers = pytest.importorskip("transformers")
    tokenizer = vocabulary
    model = make_gpt(3, vocab=tokenizer.n_vocab, block_size=128, **block)
    folder = export(tmp_path / "policy", model, tokenizer.saved)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    read_by = transformers.AutoTokenizer.from_pretrained(folder)
    tokens = torch.randint(0, tokenizer.n_vocab, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(theirs(input_ids=tokens).logits, model(tokens), rtol=1e-5, atol=1e-4)
    for text in [*texts(), *SPELT]:
        spelt = any(mark in text for mark in json.loads(json.dumps(tokenizer.description()["special"])))
        if not spelt or (tokenizer.template == "plain" and not tokenizer.first):
            assert read_by(text, add_special_tokens=False).input_ids == tokenizer.encode(text), text
            talk = [{"role": "user", "content": text}]
            ids = read_by.apply_chat_template(talk, add_generation_prompt=True, return_dict=False)
            assert ids == tokenizer.encode_prompt(text), text
    prompts = ["hello", "12 o", "us er"]
    drawn = generate(model, [tokenizer.encode_prompt(p) for p in prompts], 16, eos_id=tokenizer.eos_id, temperature=0.0)
    talks = [[{"role": "user", "content": p}] for p in prompts]
    options = {"add_generation_prompt": True, "padding": True, "return_tensors": "pt", "return_dict": True}
    batch = read_by.apply_chat_template(talks, **options)
    found = theirs.generate(**batch, max_new_tokens=16, do_sample=False)[:, batch["input_ids"].size(1) :].tolist()
    for row, start, end, answer in zip(drawn.tokens.tolist(), drawn.prompt_lens, drawn.lens, found, strict=True):
        stop = answer.index(tokenizer.eos_id) + 1 if tokenizer.eos_id in answer else len(answer)
        assert answer[:stop] == row[start:end] and set(answer[stop:]) <= {tokenizer.eos_id}

    judge = make_scalar(5, vocab=tokenizer.n_vocab, block_size=128, **block)
    judge.mean, judge.std = torch.tensor(0.7), torch.tensor(2.5)
    folder = export(tmp_path / "judge", judge, tokenizer.saved)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    ended, cut = ([*tokenizer.encode_prompt(p), *tokenizer.encode("oh o")] for p in prompts[:2])
    rows = [[*ended, tokenizer.eos_id], cut]
    batch = transformers.AutoTokenizer.from_pretrained(folder).pad({"input_ids": rows}, return_tensors="pt")
    with torch.no_grad():
        scores = theirs(**batch).logits[:, 0] + read(folder, "config").get("reward_shift", 0.0)
        alone = torch.stack([judge(torch.tensor([row]))[0, -1] for row in rows])
    torch.testing.assert_close(scores, alone, rtol=1e-5, atol=1e-5)
