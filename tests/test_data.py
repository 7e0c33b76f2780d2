"""data/: the tokenizers, the file formats, batching, the embedded task and its truth, public data."""

from __future__ import annotations

import hashlib
import json
import math
import random
import re
import shutil
import socket
import statistics
from collections import Counter
from dataclasses import dataclass
from itertools import combinations

import pytest
import tiktoken
import tiktoken.registry
import torch
from helpers import GPT2_BPE, ROOT, text_before, write_lines

from lib.cli import UserError
from model import mask_of
from data import tiny
from data.batches import (
    Example,
    by_length,
    contrast_rankings,
    encode_example,
    encode_group,
    encode_prompts,
    encode_rankings,
    epoch_batches,
    load_examples,
    load_rankings,
    make_batch,
    micro_batches,
    pad,
    RankedExamples,
    ranked_batch,
)
from data.files import (
    Prompt,
    Ranking,
    held_out_twin,
    mend_last_line,
    nest_ties,
    parse_ranking,
    prompt_json,
    prompts_beside,
    read_demonstrations,
    read_jsonl,
    read_prompts,
    read_rankings,
    replacing,
    turns_of,
    write_jsonl,
)
from tools.prepare import prepare
from data.tokenizer import TINY_RANKS, format_prompt, load_tokenizer

TINY = load_tokenizer("tiny")
TEXTS = [
    "",
    "Anna: What is the opposite of hot?",
    "It is  cold.\n\n  two   spaces\ttab\r\n",
    "naïve café, Größe, 東京, Ελλάδα, עברית",
    "emoji 👩‍👩‍👧‍👦 🏳️‍🌈 \U0001f600",
    "e\u0301 combining, \u200b zero width, \u2028 line separator, \x00 nul",
    "<|endoftext|>",
    "1234567890 3.14 -5 x2y",
    "".join(map(chr, range(1, 256))),
]


@pytest.fixture
def offline(monkeypatch):
    """No sockets, and no tokenizer left over from another test."""

    def refuse(*args, **kwargs):
        raise OSError("the network is blocked in this test")

    for name in ("socket", "create_connection", "getaddrinfo"):
        monkeypatch.setattr(socket, name, refuse)
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    load_tokenizer.cache_clear()
    yield
    load_tokenizer.cache_clear()


# ------------------------------------------------------------------------------------------------ tokenizers


@pytest.mark.parametrize("text", TEXTS)
def test_tiny_round_trip(text):
    """Any UTF-8 text comes back exactly, and no text at all gives the EOS id."""
    ids = TINY.encode(text)
    assert TINY.decode(ids) == text
    assert all(0 <= i < TINY.n_vocab and i != TINY.eos_id for i in ids)


def test_tiny_round_trip_of_random_text():
    """The same for 500 random strings of random characters from all planes."""
    rng = random.Random(0)
    alphabets = [range(32, 127), range(1, 0x2FF), range(0x3000, 0x9FFF), range(0x1F300, 0x1FAFF)]
    for _ in range(500):
        text = "".join(chr(rng.choice(rng.choice(alphabets))) for _ in range(rng.randint(1, 30)))
        assert TINY.decode(TINY.encode(text)) == text


def test_tiny_vocabulary():
    """At most 1,024 ids, all in use: each decodes by itself, EOS is one of them, no two ids are the same bytes."""
    assert TINY.n_vocab <= 1024 and 0 <= TINY.eos_id < TINY.n_vocab
    pieces = [TINY._encoding.decode_single_token_bytes(i) for i in range(TINY.n_vocab)]
    assert len(set(pieces)) == TINY.n_vocab and TINY.decode([TINY.eos_id]) == "<|endoftext|>"
    assert {bytes([b]) for b in range(256)} <= set(pieces)
    assert all(isinstance(TINY.decode([i]), str) for i in range(TINY.n_vocab))


def test_tiny_knows_its_world():
    """Every word of the world is one token, so a question's shape doesn't depend on its words."""
    world = [*tiny.NOUNS, *tiny.OPPOSITE, *tiny.PLURAL.values(), *tiny.PAST.values(), *tiny.DAYS]
    words = [f" {w}" for w in world]
    whole = [w for w in words if len(TINY.encode(w)) == 1]
    assert len(whole) > 0.98 * len(words)
    assert all(len(TINY.encode(f" {name}:")) == 2 for name in tiny.NAMES)


def test_prompt_template():
    """One template for all stages; the boundary is a newline, so prompt and
    completion texts join without loss (need R14)."""
    assert format_prompt("Hi") == "User: Hi\nAssistant:\n"
    assert TINY.decode(TINY.encode_prompt("Hi")) == format_prompt("Hi")


def test_tiny_needs_no_network_and_no_cache(offline, monkeypatch, tmp_path):
    """Sockets blocked, and a stale copy in tiktoken's cache folder: the file in data/ alone counts (need R11)."""
    for key in (str(TINY_RANKS), TINY_RANKS.as_uri()):
        (tmp_path / hashlib.sha1(key.encode()).hexdigest()).write_bytes(b"YQ== 0\n")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    fresh = load_tokenizer("tiny")
    assert fresh is not TINY and fresh.n_vocab == TINY.n_vocab
    assert fresh.encode(TEXTS[1]) == TINY.encode(TEXTS[1])


def test_gpt2_missing_is_explained(offline, monkeypatch, tmp_path):
    """No network, no cache: one message that names the variable, both files, and the way out (need R11)."""
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    with pytest.raises(UserError) as error:
        load_tokenizer("gpt2")
    for part in (
        "TIKTOKEN_CACHE_DIR",
        "6d1cbeee0f20b3d9449abfede4726ed8212e3aee",
        "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6",
        "vocab.bpe",
        "encoder.json",
        "tiny",
    ):
        assert part in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.skipif(not GPT2_BPE.exists(), reason="GPT-2's vocabulary is not here")
def test_gpt2_from_the_cache_folder(offline, monkeypatch, tmp_path):
    """With the two files at hand it works with sockets blocked: known ids, EOS never from text, lossless (need R11)."""
    shutil.copytree(GPT2_BPE, tmp_path / "bpe")  # a copy: tiktoken deletes a file whose hash is off
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "bpe"))
    gpt2 = load_tokenizer("gpt2")
    assert gpt2.encode("Hello, I am") == [15496, 11, 314, 716]
    assert (gpt2.name, gpt2.n_vocab, gpt2.eos_id) == ("gpt2", 50257, 50256)
    for text in TEXTS:
        ids = gpt2.encode(text)
        assert 50256 not in ids and gpt2.decode(ids) == text
    assert gpt2.decode(gpt2.encode("😀")[:1]) == "\ufffd"  # half a character is no crash


def test_unknown_tokenizer():
    with pytest.raises(UserError, match="tiny, gpt2"):
        load_tokenizer("gpt4")


@pytest.mark.slow
def test_committed_vocabulary_is_what_make_vocab_makes():
    """data/tiny.tiktoken can be made again, byte for byte, from the world's own text."""
    from data import make_vocab

    ranks = make_vocab.train_bpe(make_vocab.world_text(), make_vocab.MAX_TOKENS)
    assert make_vocab.rank_file(ranks) == TINY_RANKS.read_bytes()


def test_vocabulary_file_is_kept_from_line_ending_conversion():
    """.gitattributes: a CRLF checkout would change it."""
    assert b"\r" not in TINY_RANKS.read_bytes()
    lines = (ROOT / ".gitattributes").read_text(encoding="utf-8").splitlines()
    assert any(line.split()[:2] == ["*.tiktoken", "-text"] for line in lines)


def test_bpe_by_hand():
    """The classic example: "low" five times more frequent than "er"; first merges by count, ties by the bytes."""
    from data.make_vocab import train_bpe

    texts = ["low"] * 50 + ["lower"] * 30 + ["new"] * 25
    learned = [token for token, rank in train_bpe(texts, 300).items() if rank >= 256]
    # pairs at first: lo 80, ow 80, we 30, er 30, ne 25, ew 25
    # ow > lo by bytes; then l+ow; then er > (low)e; (low)er; ne > ew by bytes; ne+w
    assert learned == [b"ow", b"low", b"lowe", b"lower", b"ne", b"new"]


# ------------------------------------------------------------------------------------------------ files


def lines(path, *rows: str | bytes):
    path.write_bytes(b"".join((r if isinstance(r, bytes) else r.encode()) + b"\n" for r in rows))
    return path


def test_each_format_reads(tmp_path):
    """Demonstrations, prompts (other keys ignored), pairs and rankings with ties."""
    first, second = '{"prompt": "p", "completion": "ü\\n☃"}', '{"completion": "", "prompt": "q", "more": 1}'
    path = lines(tmp_path / "d.jsonl", first, second)
    assert read_demonstrations(path) == [("p", "ü\n☃"), ("q", "")]
    assert read_prompts(path) == ["p", "q"]
    pair = '{"prompt": "p", "chosen": "a", "rejected": "b"}'
    ranking = '{"prompt": "p", "completions": ["a", ["b", "c"], "d"]}'
    path = lines(tmp_path / "r.jsonl", pair, ranking)
    assert read_rankings(path) == [
        Ranking("p", ["a", "b"], [0, 1], [True] * 2),
        Ranking("p", ["a", "b", "c", "d"], [0, 1, 1, 2], [True] * 4),
    ]
    path = lines(
        tmp_path / "e.jsonl",
        pair[:-1] + ', "ended": [false, true]}',
        ranking[:-1] + ', "ended": [true, false, true, false]}',
    )
    assert [r.ended for r in read_rankings(path)] == [[False, True], [True, False, True, False]]


def test_tolerated_files(tmp_path):
    """A byte-order mark, CRLF, blank lines, no newline at the end, U+2028 inside a
    string: what editors on other systems leave."""
    path = tmp_path / "d.jsonl"
    first, second = b'{"prompt": "a", "completion": "b"}', b'{"prompt": "c\xe2\x80\xa8", "completion": "d"}'
    path.write_bytes(b"\xef\xbb\xbf" + first + b"\r\n\r\n   \r\n" + second)
    assert read_demonstrations(path) == [("a", "b"), ("c\u2028", "d")]
    assert [where for where, _ in read_jsonl(path)] == [f"{path}:1", f"{path}:4"]


GOOD = '{"prompt": "p", "completion": "c"}'
BAD_LINES = [
    ('{"prompt": "p", "completion": "c"', "not valid JSON"),
    ('{"prompt": "p" "completion": "c"}', "not valid JSON"),
    ('["p", "c"]', "list"),
    ("17", "int"),
    ('{"prompt": "p", "text": "c"}', '"completion"'),
    ("{}", '"prompt"'),
    ('{"prompt": "p", "completion": null}', "NoneType"),
    ('{"prompt": 3, "completion": "c"}', "int"),
    ('{"prompt": "p", "completion": ["c"]}', "list"),
]


@pytest.mark.parametrize(("bad", "says"), BAD_LINES)
def test_bad_demonstrations_are_located(tmp_path, bad, says):
    """`file:line: what is wrong`, with the right line (blank ones counted)."""
    path = lines(tmp_path / "d.jsonl", GOOD, "", bad, GOOD)
    with pytest.raises(UserError) as error:
        read_demonstrations(path)
    assert str(error.value).startswith(f"{path}:3: ") and says in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ('{"prompt": "p"}', '"chosen"'),
        ('{"prompt": "p", "chosen": "a"}', '"rejected"'),
        ('{"prompt": "p", "chosen": "a", "rejected": 1}', "int"),
        ('{"prompt": "p", "completions": "ab"}', "list"),
        ('{"prompt": "p", "completions": []}', "two completions"),
        ('{"prompt": "p", "completions": ["a"]}', "two completions"),
        ('{"prompt": "p", "completions": ["a", []]}', "strings"),
        ('{"prompt": "p", "completions": ["a", 2]}', "strings"),
        ('{"prompt": "p", "completions": ["a", ["b", null]]}', "strings"),
        ('{"prompt": "p", "completions": ["a", [["b"]]]}', "strings"),
        ('{"completions": ["a", "b"]}', '"prompt"'),
        ('{"prompt": "p", "completions": ["a", "b"], "ended": [true]}', '"ended" must be a list of 2'),
        ('{"prompt": "p", "completions": ["a", "b"], "ended": [true, true, false]}', '"ended" must be a list of 2'),
        ('{"prompt": "p", "completions": ["a", ["b", "c"]], "ended": [true, false]}', '"ended" must be a list of 3'),
        ('{"prompt": "p", "completions": ["a", "b"], "ended": [1, 0]}', '"ended"'),
        ('{"prompt": "p", "completions": ["a", "b"], "ended": ["true", "false"]}', '"ended"'),
        ('{"prompt": "p", "completions": ["a", "b"], "ended": true}', '"ended"'),
        ('{"prompt": "p", "completions": ["a", "b"], "ended": null}', '"ended"'),
        ('{"prompt": "p", "chosen": "a", "rejected": "b", "ended": [false]}', '"ended" must be a list of 2'),
    ],
)
def test_bad_rankings_are_located(tmp_path, bad, says):
    """Empty rankings, empty ties, wrong types, "ended" of another length than the completions: each at its line."""
    path = lines(tmp_path / "r.jsonl", '{"prompt": "p", "completions": ["a", "b"]}', bad)
    with pytest.raises(UserError) as error:
        read_rankings(path)
    assert str(error.value).startswith(f"{path}:2: ") and says in str(error.value)


HALF = "\\ud83d"  # as JSON spells half an emoji


@pytest.mark.parametrize(
    ("read", "row", "key"),
    [
        (read_prompts, '{"prompt": "HALF"}', "prompt"),
        (read_demonstrations, '{"prompt": "a HALF", "completion": "c"}', "prompt"),
        (read_demonstrations, '{"prompt": "p", "completion": "c HALF"}', "completion"),
        (read_rankings, '{"prompt": "p", "chosen": "HALF", "rejected": "b"}', "chosen"),
        (read_rankings, '{"prompt": "p", "chosen": "a", "rejected": "HALF"}', "rejected"),
        (read_rankings, '{"prompt": "HALF", "completions": ["a", "b"]}', "prompt"),
        (read_rankings, '{"prompt": "p", "completions": ["a", ["b", "HALF"]]}', "completions"),
    ],
)
def test_half_a_character_is_located(tmp_path, read, row, key):
    """JSON can spell a lone surrogate, and json.loads takes it; the traceback came later, from the vocabulary or from
    the first file that was to hold it."""
    path = lines(tmp_path / "d.jsonl", row.replace("HALF", "\\ud83d\\ude00"), "", row.replace("HALF", HALF))
    with pytest.raises(UserError) as error:
        read(path)
    assert str(error.value).startswith(f'{path}:3: "{key}" ') and "surrogate" in str(error.value)


TALK = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Yes?\n"},
    {"role": "user", "content": "2+2"},
]
SYSTEM = {"role": "system", "content": "Be kind."}


def test_conversations_as_prompts(tmp_path):
    """In every kind of file: all turns, as they stand there; what a reward function gets is a text with all of them;
    and it goes back into a file as it came. One turn of the user's is a plain string, a system's before it is not."""
    rows = [
        {"prompt": p, "completion": "4", "chosen": "4", "rejected": "5"} for p in (TALK, [SYSTEM, TALK[2]], TALK[2:])
    ]
    path = write_lines(tmp_path / "talk.jsonl", rows)
    prompts = read_prompts(path)
    assert prompts == [p for p, _ in read_demonstrations(path)] == [r.prompt for r in read_rankings(path)]
    assert [type(p) for p in prompts] == [Prompt, Prompt, str]
    assert prompts == ["User: Hi\nAssistant: Yes?\n\nUser: 2+2", "System: Be kind.\nUser: 2+2", "2+2"]
    assert [turns_of(p) for p in prompts] == [
        (("user", "Hi"), ("assistant", "Yes?\n"), ("user", "2+2")),
        (("system", "Be kind."), ("user", "2+2")),
        (("user", "2+2"),),
    ]
    assert [prompt_json(p) for p in prompts] == [TALK, [SYSTEM, TALK[2]], "2+2"]
    rankings = write_lines(tmp_path / "r.jsonl", [{"prompt": TALK, "completions": ["4", ["5", "6"]]}])
    assert turns_of(read_rankings(rankings)[0].prompt) == turns_of(prompts[0])


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        ([], "a prompt of messages must end with the user's"),
        (TALK[:2], "a prompt of messages must end with the user's"),
        ([SYSTEM], "a prompt of messages must end with the user's"),
        ([*TALK[:2], "2+2"], 'message 3 of the prompt must be an object with a "role" of system, user, assistant'),
        (
            [{"role": "human", "content": "Hi"}],
            'message 1 of the prompt must be an object with a "role" of system, user',
        ),
        ([SYSTEM, {"content": "Hi"}], 'message 2 of the prompt must be an object with a "role" of system, user'),
        ([SYSTEM, {"role": "user"}], 'message 2 of the prompt: no "content" (found: role)'),
        ([{"role": "user", "content": None}], 'message 1 of the prompt: "content" must be a string, not NoneType'),
        (
            [{"role": "user", "content": "x" + chr(0xD83D)}],
            'message 1 of the prompt: "content" holds half a character at 1',
        ),
        ({"role": "user", "content": "Hi"}, '"prompt" must be a string, not dict'),
    ],
)
def test_bad_conversations_are_located(tmp_path, prompt, says):
    """The line, and which message of it."""
    path = lines(tmp_path / "d.jsonl", GOOD, json.dumps({"prompt": prompt, "completion": "c"}))
    with pytest.raises(UserError) as error:
        read_demonstrations(path)
    assert str(error.value).startswith(f"{path}:2: {says}") and "\n" not in str(error.value)


@pytest.mark.parametrize("row", [b'{"a": 1}', '{"a": "{é"}'.encode()])
def test_a_torn_line_is_taken_off_and_no_other(tmp_path, row):
    """A crash in the middle of a row, of a character or right before the end of the line; nothing whole is lost."""
    path = tmp_path / "r.jsonl"
    mend_last_line(path)
    assert not path.exists()
    for torn in range(len(row) + 1):
        path.write_bytes(row + b"\n" + row[:torn])
        mend_last_line(path)
        assert path.read_bytes() == (row + b"\n") * (2 if torn == len(row) else 1)
    path.write_bytes(b"no file of ours")
    mend_last_line(path)
    assert path.read_bytes() == b"no file of ours"


@pytest.mark.parametrize("key", ["instruction", "input", "output", "chosen", "rejected"])
@pytest.mark.parametrize("as_list", [True, False])
def test_half_a_character_in_public_data_is_located(tmp_path, key, as_list):
    """The same in what is prepared from elsewhere: one line, and no file begun."""
    record = {"instruction": "i", "input": "in", "output": "o", "chosen": "c", "rejected": "r"}
    rows = [json.dumps(record), json.dumps({**record, key: "x" + chr(0xD83D)})]
    path = lines(tmp_path / "raw.json", "[" + ",".join(rows) + "]") if as_list else lines(tmp_path / "raw.json", *rows)
    with pytest.raises(UserError) as error:
        prepare(path, tmp_path / "out", held_out=0.0, seed=1)
    where = f"{path}: record 2" if as_list else f"{path}:2"
    assert str(error.value).startswith(f'{where}: "{key}" ') and "surrogate" in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("line", [1, 3, 400])
def test_invalid_utf8_is_located(tmp_path, line):
    """A byte that is no UTF-8 is reported at its own line, wherever in the file it stands."""
    rows = [GOOD.encode()] * 500
    rows[line - 1] = b'{"prompt": "caf\xe9", "completion": "c"}'
    path = lines(tmp_path / "d.jsonl", *rows)
    with pytest.raises(UserError, match="UTF-8") as error:
        read_demonstrations(path)
    assert str(error.value).startswith(f"{path}:{line}: ")


def test_missing_and_empty_files(tmp_path):
    """No file: which script makes it. No rows: said, not an IndexError later."""
    with pytest.raises(UserError, match=r"no such file; run `python sft\.py` first"):
        read_prompts(tmp_path / "nowhere.jsonl", "python sft.py")
    with pytest.raises(UserError):
        read_prompts(tmp_path)  # a folder
    for content in (b"", b"\n  \n", b"\xef\xbb\xbf"):
        (tmp_path / "e.jsonl").write_bytes(content)
        for read in (read_prompts, read_demonstrations, read_rankings):
            with pytest.raises(UserError, match="no rows"):
                read(tmp_path / "e.jsonl")


def test_ties_round_trip():
    """nest_ties and parse_ranking undo each other, in any order of input."""
    assert nest_ties(["a", "b", "c", "d"], [2, 0, 1, 0]) == [["b", "d"], "c", "a"]
    rng = random.Random(0)
    for _ in range(200):
        texts = [f"t{i}" for i in range(rng.randint(2, 6))]
        ranks = [rng.randint(0, 3) for _ in texts]
        ranking = parse_ranking("here", {"prompt": "p", "completions": nest_ties(texts, ranks)})
        found = dict(zip(ranking.completions, ranking.ranks, strict=True))
        for a in range(len(texts)):
            for b in range(len(texts)):
                assert (ranks[a] < ranks[b]) == (found[texts[a]] < found[texts[b]])


def test_write_jsonl_is_whole_or_not_at_all(tmp_path):
    """A row that can't be written leaves the old file as it was; a good write is UTF-8 with \\n, one object a line."""
    path = tmp_path / "deep" / "x.jsonl"
    rows = [{"prompt": "ü\u2028\n"}, {"prompt": "☃"}]
    write_jsonl(path, rows)
    before = path.read_bytes()
    assert before.count(b"\n") == 2 and b"\r" not in before and "☃".encode() in before
    assert [row for _, row in read_jsonl(path)] == rows
    with pytest.raises(TypeError):
        write_jsonl(path, [{"prompt": "new"}, {"prompt": object()}])
    assert path.read_bytes() == before


def test_what_belongs_to_a_file_lies_beside_it(tmp_path, capsys):
    """Data of one's own must never be judged by the demo's: "auto" takes the twin in the same folder or none, and says
    so; a path that is given is taken as it is."""
    mine = tmp_path / "mine.jsonl"
    assert held_out_twin(str(mine), "auto") == "" and prompts_beside(str(mine), "auto") == str(mine)
    said = capsys.readouterr().out
    assert "mine_held_out.jsonl" in said and "prompts.jsonl" in said
    for name in ("mine_held_out.jsonl", "prompts.jsonl"):
        lines(tmp_path / name, GOOD)
    assert held_out_twin(str(mine), "auto") == str(tmp_path / "mine_held_out.jsonl")
    assert prompts_beside(str(mine), "auto") == str(tmp_path / "prompts.jsonl")
    assert held_out_twin("out/data/rankings.jsonl", "auto") in ("", "out/data/rankings_held_out.jsonl")
    assert capsys.readouterr().out.count("\n") <= 1
    for given in ("", "other.jsonl"):
        assert held_out_twin(str(mine), given) == prompts_beside(str(mine), given) == given


# ------------------------------------------------------------------------------------------------ examples and batches


class Letters:
    """One id a character; EOS is 0. Makes truncation readable."""

    name, eos_id, n_vocab = "letters", 0, 128

    def encode(self, text):
        return [ord(c) for c in text]

    encode_prompt = encode

    def decode(self, ids):
        return "".join(map(chr, ids))


@pytest.mark.parametrize(
    ("block_size", "prompt", "completion"),
    [
        (99, "abcdef", "xyz\0"),
        (10, "abcdef", "xyz\0"),  # just fits
        (9, "bcdef", "xyz\0"),  # the prompt loses its left
        (8, "cdef", "xyz\0"),  # down to half of the block
        (7, "cdef", "xyz"),  # then the completion loses its right, the EOS first
        (6, "def", "xyz"),
        (5, "def", "xy"),
        (4, "ef", "xy"),
        (3, "ef", "x"),
        (2, "f", "x"),
        (1, None, None),  # no completion token left
    ],
)
def test_truncation_keeps_half_of_the_block_for_the_prompt(block_size, prompt, completion):
    """Prompt cut from the left, down to half of the block; then the completion from the right, and EOS only where it
    wasn't cut (need R18; trap 13)."""
    example = encode_example(Letters(), "abcdef", "xyz", block_size)
    if prompt is None:
        assert example is None
    else:
        assert ("".join(map(chr, example.prompt)), "".join(map(chr, example.completion))) == (prompt, completion)
        assert example.ids == example.prompt + example.completion and len(example) == len(example.ids) <= block_size
        assert (example.prompt_cut, example.completion_cut) == (block_size < 10, block_size < 8)


def test_empty_completions():
    """Nothing to imitate: dropped. In a ranking silence is an answer: EOS alone, unless it was cut: then nothing was
    said."""
    assert encode_example(Letters(), "abc", "", 9) is None
    assert encode_example(Letters(), "abc", "", 9, ended=False, allow_empty=True) is None
    assert encode_example(Letters(), "abc", "", 9, allow_empty=True).completion == [0]
    assert encode_example(Letters(), "abcdefghijkl", "", 5, allow_empty=True).ids == [*b"ijkl", 0]


def test_prompt_and_completion_decode_to_the_exact_text():
    """Encoded apart and joined: no merge crosses the boundary, nothing is lost (need R18; trap 15)."""
    rng = random.Random(1)
    texts = [t for t in TEXTS if t] + [tiny.sample_prompt(rng, "train") for _ in range(50)]
    for prompt in texts:
        for completion in (" leading space", "cold", *TEXTS[1:6], prompt[::-1]):
            example = encode_example(TINY, prompt, completion, 10_000)
            assert TINY.decode(example.prompt) == format_prompt(prompt)
            assert example.completion[-1] == TINY.eos_id and TINY.decode(example.completion[:-1]) == completion
            assert TINY.decode(example.ids[:-1]) == format_prompt(prompt) + completion


def text_of(ids: list[int]) -> str:
    return "".join(map(chr, ids))


def test_a_cut_text_gets_no_eos():
    """A text that --max_new_tokens cut must not be read as one that stopped there: DPO would learn to stop in
    mid-sentence. And none is invented where block_size cuts it."""
    assert encode_example(Letters(), "ab", "xyz", 9, ended=False).completion == [*b"xyz"]
    texts = encode_group(Letters(), "ab", ["xyz", "xyz", ""], [True, False, True], 9)
    assert [text_of(e.completion) for e in texts] == ["xyz\0", "xyz", "\0"]
    texts = encode_group(Letters(), "ab", ["uvwxyz", "xyz", "xy"], [True, False, True], 4)
    assert [text_of(e.completion) for e in texts] == ["uv", "xy", "xy"]
    assert [e.completion_cut for e in texts] == [True, True, True]


@pytest.mark.parametrize("block_size", [4, 6, 8, 11, 12, 30])
def test_completions_of_one_prompt_see_the_same_prompt(block_size):
    """Each cut by itself, the longer text would answer another question than the shorter one: a comparison of two
    things that were never compared."""
    ranking = Ranking("abcdefgh", ["xyz", "u", "vwvwvw"], [0, 1, 2], [True, False, True])
    item = encode_rankings([ranking], Letters(), block_size)[0]
    assert len({tuple(e.prompt) for e in item.examples}) == 1
    prompt = text_of(item.examples[0].prompt)
    assert prompt and "abcdefgh".endswith(prompt) and len(prompt) == min(8, max(-(-block_size // 2), block_size - 7))
    for example, text in zip(item.examples, ["xyz\0", "u", "vwvwvw\0"], strict=True):
        assert text_of(example.completion) == text[: block_size - len(prompt)]
        assert example.prompt_cut == (block_size < 15) and len(example) <= block_size
        assert example.completion_cut == (text_of(example.completion) != text)


def test_a_long_answer_does_not_cut_the_question_away():
    """One rejected answer of 540 characters left one token of the question, to it and to the short chosen one: the
    reward model never saw what was asked, and PPO was scored by it on whole questions."""
    question, chosen, rejected = "Which colour is the sky?", "blue", "abcdefgh " * 60
    item = encode_rankings([Ranking(question, [chosen, rejected], [0, 1], [True, True])], Letters(), 96)[0]
    assert [text_of(e.prompt) for e in item.examples] == [question] * 2
    assert [text_of(e.completion) for e in item.examples] == ["blue\0", rejected[: 96 - len(question)]]
    example = encode_example(Letters(), "q" * 90 + question, rejected, 96)
    assert text_of(example.prompt) == ("q" * 90 + question)[-48:] and text_of(example.completion) == rejected[:48]


@pytest.mark.parametrize("block_size", [2, 7, 8, 33])
def test_whatever_their_lengths_prompt_and_answers_share_the_block_by_one_rule(block_size):
    """The definition: everything where it fits. Else the prompt's end, as long as the longest answer allows but never
    less than half of the block (or the whole prompt), and of each answer the beginning that fits."""
    rng, prompt = random.Random(block_size), "".join(map(chr, range(200, 240)))
    for _ in range(300):
        asked = prompt[: rng.randint(1, 40)]
        answers = ["z" * rng.randint(1, 50) for _ in range(rng.randint(1, 3))]
        texts, longest = [a + "\0" for a in answers], max(map(len, answers)) + 1
        for example, text in zip(
            encode_group(Letters(), asked, answers, [True] * len(answers), block_size), texts, strict=True
        ):
            kept = text_of(example.prompt)
            assert asked.endswith(kept) and len(kept) == min(len(asked), max(block_size - longest, -(-block_size // 2)))
            assert text_of(example.completion) == text[: block_size - len(kept)]
            assert (example.prompt_cut, example.completion_cut) == (kept != asked, text_of(example.completion) != text)


def test_prompts_keep_their_end_and_what_was_cut_is_counted(capsys):
    """Cut in silence, a run with too many --max_new_tokens trained on prompts of one token."""
    kept = encode_prompts(["abcde", "xy", "uvw"], Letters(), 8, 5, "my.jsonl")
    assert [text_of(p) for p in kept] == ["cde", "xy", "uvw"]
    read, cut = capsys.readouterr().out.splitlines()
    assert read == "my.jsonl: 3 prompts" and cut.startswith("my.jsonl: 1 of 3 prompts cut to their last 3 tokens")
    assert "--block_size" in cut and "--max_new_tokens" in cut
    encode_prompts(["abcde", "xy"], Letters(), 8, 3, "my.jsonl")
    assert capsys.readouterr().out == "my.jsonl: 2 prompts\n"
    with pytest.raises(UserError, match="--max_new_tokens 8 leaves no room for a prompt in block_size 8"):
        encode_prompts(["abcde"], Letters(), 8, 8, "my.jsonl")


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_a_file_that_is_interrupted_leaves_the_old_one_alone(tmp_path, error):
    """Half a file beside it, or in its place, whatever ends the writing."""
    path = tmp_path / "mine.jsonl"
    write_jsonl(path, [{"prompt": "a"}])
    before = path.read_bytes()
    with pytest.raises(error), replacing(path) as temporary:
        temporary.write_text("half")
        raise error
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["mine.jsonl"]


def test_a_twin_has_the_same_ending(tmp_path):
    mine = tmp_path / "mine.json"
    for name in ("mine_held_out.json", "mine_held_out.jsonl", "mine.jsonl"):
        (tmp_path / name).touch()
    assert held_out_twin(str(mine), "auto") == str(tmp_path / "mine_held_out.json")
    assert held_out_twin(str(tmp_path / "mine.jsonl"), "auto") == str(tmp_path / "mine_held_out.jsonl")


@pytest.mark.parametrize("n", range(4, 18))
def test_a_story_has_6_to_14_words(n):
    """The ends of the range, which the docstring names, belong to it."""
    story = " ".join(["One", *["day"] * (n - 2), "cat."])
    parts = tiny.gold_parts("Anna: Write one line about a cat.", story)
    assert parts["correct"] == (2.0 if 6 <= n <= 14 else 0.0)


@pytest.mark.parametrize("blank", [" ", "\n", "\t ", "\u2003", "\r\n"])
def test_white_space_without_end_is_refused(tmp_path, blank):
    """Of any kind: tiktoken crashes on it. As much as it can bear is read, and so is a long text with words in it."""
    limit = 100_000 // len(blank)
    for n, fits in ((limit, True), (limit + 1, False)):
        path = write_lines(tmp_path / "mine.jsonl", [{"prompt": "a" + blank * n + "b" + blank * 9}])
        if fits:
            assert len(read_prompts(path)[0]) == 2 + (n + 9) * len(blank)
            continue
        with pytest.raises(UserError, match=r'mine\.jsonl:1: "prompt" holds 100,00\d white-space characters'):
            read_prompts(path)


def test_a_prompt_that_is_too_long_by_one_token_loses_one(capsys):
    """Its end, or more than it must, or one that just fits counted as cut."""
    text = "abcdefghij"
    for room in (1, 4, 9):
        texts = [text[:n] for n in range(1, 11)]
        found = encode_prompts(texts, Letters(), room + 5, 5, "mine.jsonl")
        assert found == [Letters().encode_prompt(t)[max(0, len(t) - room) :] for t in texts]
        said = capsys.readouterr().out
        assert f"mine.jsonl: 10 prompts\nmine.jsonl: {10 - room} of 10 prompts cut to their last {room} tokens" in said


def test_what_does_not_fit_is_counted(tmp_path, capsys):
    """How many rows lost something to block_size, with the path and the flag; nothing where all fit."""
    rankings = [{"prompt": "abc", "chosen": "xyz", "rejected": "u"}, {"prompt": "a", "chosen": "x", "rejected": "u"}]
    path = write_lines(tmp_path / "r.jsonl", rankings)
    found = [[(e.prompt_cut, e.completion_cut) for e in r.examples] for r in load_rankings(path, Letters(), 5)]
    assert found == [[(False, True), (False, False)], [(False, False)] * 2]
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"{path}: 2 rankings" and len(said) == 2
    assert said[1].startswith(f"{path}: 1 of 4 answers lost their end, of 5 tokens") and "--block_size" in said[1]
    load_rankings(path, Letters(), 4)
    said = capsys.readouterr().out.splitlines()
    assert said[1].startswith(f"{path}: 1 of 2 prompts lost their beginning, of 4 tokens") and "--block_size" in said[1]
    assert said[2].startswith(f"{path}: 1 of 4 answers lost their end, of 4 tokens")
    load_rankings(path, Letters(), 7)
    assert capsys.readouterr().out.splitlines() == [f"{path}: 2 rankings"]

    rows = [
        {"prompt": "abc", "completion": "xyz"},
        {"prompt": "a", "completion": ""},
        {"prompt": "a", "completion": "x"},
    ]
    path = write_lines(tmp_path / "d.jsonl", rows)
    assert [text_of(e.ids) for e in load_examples(path, Letters(), 6)] == ["abcxyz", "ax\0"]
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"{path}: 2 demonstrations, dropped 1 without completion tokens"
    assert said[1].startswith(f"{path}: 1 of 2 answers lost their end, of 6 tokens") and "--block_size" in said[1]
    assert [text_of(e.ids) for e in load_examples(path, Letters(), 4)] == ["bcxy", "ax\0"]
    said = capsys.readouterr().out.splitlines()
    assert said[1].startswith(f"{path}: 1 of 2 prompts lost their beginning") and "1 of 2 answers" in said[2]
    assert load_examples("", Letters(), 6) == load_rankings("", Letters(), 6) == []
    with pytest.raises(UserError, match="no row has completion tokens"):
        load_examples(write_lines(tmp_path / "e.jsonl", rows[1:2]), Letters(), 6)


def test_cut_completions_of_a_file_carry_no_eos(tmp_path):
    """The whole way from the line to the ids: EOS where "ended" is true or absent, none where it is false; a cut empty
    text compares nothing."""
    rows = [
        {"prompt": "ab", "completions": ["x", ["yy", "z"], "x"], "ended": [True, False, True, False]},
        {"prompt": "ab", "chosen": "x", "rejected": "y", "ended": [False, False]},
        {"prompt": "ab", "chosen": "x", "rejected": "y"},
        {"prompt": "ab", "chosen": "x", "rejected": "", "ended": [True, False]},
        {"prompt": "ab", "chosen": "x", "rejected": "", "ended": [False, True]},
    ]
    path = write_lines(tmp_path / "r.jsonl", rows)
    found = [[text_of(e.completion) for e in item.examples] for item in load_rankings(path, Letters(), 20)]
    assert found == [["x\0", "yy", "z\0", "x"], ["x", "y"], ["x\0", "y\0"], ["x", "\0"]]


def test_pad():
    """On the right, to the longest row; lens are the rows' own lengths, even where a row ends in the filler id."""
    tokens = pad([[1, 2, 3], [4], [5, 9]], torch.device("cpu"), filler=9)
    assert tokens.tolist() == [[1, 2, 3], [4, 9, 9], [5, 9, 9]] and tokens.dtype == torch.long
    examples = [Example([1, 2], [3]), Example([4], [5, 0, 0])]
    tokens, prompt_lens, lens = make_batch(examples, torch.device("cpu"))
    assert tokens.tolist() == [[1, 2, 3, 0], [4, 5, 0, 0]]
    assert prompt_lens.tolist() == [2, 1] and lens.tolist() == [3, 4] and lens.dtype == torch.long


def test_for_a_gpu_the_width_is_a_multiple_of_32_within_the_block_size():
    """A network that reads 40 tokens can't be given rows of 64."""
    gpu = torch.device("cuda")
    for longest, width, within_40 in ((1, 32, 32), (32, 32, 32), (33, 64, 40), (40, 64, 40)):
        for block_size, wanted in ((None, width), (96, width), (40, within_40)):
            tokens = pad([[7] * longest, [4]], gpu, 9, block_size)
            assert tokens.shape == (2, wanted) and tokens.device.type == "cpu"
            assert tokens[0, :longest].eq(7).all() and tokens[0, longest:].eq(9).all() and tokens[1, 1:].eq(9).all()


@dataclass
class Passes:
    epochs: int = 2
    batch_size: int = 16
    seed: int = 1


@pytest.mark.parametrize("n", [1, 15, 16, 17, 1000])
def test_an_epoch_takes_each_row_once(n):
    """Each row once a pass, only the last batch smaller (trap 46: a remainder silently dropped), reproducible, another
    order every epoch and for every seed."""
    rows = [[i] for i in range(n)]
    batches = epoch_batches(rows, Passes())
    per_epoch = -(-n // 16)
    sizes = [16] * (n // 16) + [n % 16] * (n % 16 > 0)
    assert len(batches) == 2 * per_epoch and list(map(len, batches)) == sizes * 2
    first, second = batches[:per_epoch], batches[per_epoch:]
    for part in (first, second):
        assert sorted(row for batch in part for row in batch) == rows
    assert batches == epoch_batches(rows, Passes())
    assert epoch_batches(rows, Passes(epochs=3))[: len(batches)] == batches  # more epochs go on where these stop
    assert rows == [[i] for i in range(n)]  # the caller's list is left alone
    if n > 10:
        other = epoch_batches(rows, Passes(epochs=1, seed=2))
        assert first != second and first != other
    if n == 1000:  # batch mates change, not only the order of the batches
        mates, *others = ({frozenset(row[0] for row in batch) for batch in part} for part in (first, second, other))
        assert not any(mates & part for part in others)


def test_a_step_holds_rows_of_all_lengths():
    """Steps of similar lengths have few tokens or many, so a token of a short text weighs several times one of a long
    text in the mean of its step. Rows must meet by chance: the deviation of a step's tokens is that of 16 random
    rows."""
    rng = random.Random(0)
    rows = [[0] * rng.randint(1, 60) for _ in range(16_000)]
    totals = torch.tensor([float(sum(map(len, batch))) for batch in epoch_batches(rows, Passes(epochs=1))])
    lengths = torch.tensor([float(len(row)) for row in rows])
    by_chance = 4 * lengths.std().item()  # of the sum of 16
    assert totals.std().item() == pytest.approx(by_chance, rel=5 / math.sqrt(2 * len(totals)))
    neighbours = torch.stack([totals[:-1], totals[1:]])  # no curriculum either
    assert abs(torch.corrcoef(neighbours)[0, 1].item()) < 5 / math.sqrt(len(totals))


@pytest.mark.parametrize("size", [0, 1, 3, 7, 50])
def test_micro_batches_are_the_whole_step_in_similar_lengths(size):
    """Each row of the step once, whatever the size; from short to long, so that little filler is computed."""
    rng = random.Random(1)
    rows = [[i] * rng.randint(1, 30) for i in range(24)]
    parts = micro_batches(rows, size)
    assert sorted(row for part in parts for row in part) == sorted(rows)
    assert [len(part) for part in parts] == [len(rows[i : i + (size or 24)]) for i in range(0, 24, size or 24)]
    flat = [len(row) for part in parts for row in part]
    assert flat == sorted(flat)
    widest = [row for part in micro_batches(rows, size, length=lambda row: -len(row)) for row in part]
    assert [len(row) for row in widest] == sorted(flat, reverse=True)


def test_by_length():
    """Short to long, each index once."""
    lengths = [5, 1, 4, 1, 3, 9, 2]
    batches = by_length([[0] * n for n in lengths], 3)
    assert [[lengths[i] for i in b] for b in batches] == [[1, 1, 2], [3, 4, 5], [9]]
    assert sorted(i for b in batches for i in b) == list(range(7))


def test_rankings_that_compare_nothing_are_dropped_and_counted(tmp_path, capsys):
    """Ties only, one text several times, texts equal after truncation: the loss is the constant ln 2 there."""
    rows = [
        {"prompt": "p", "completions": ["a", "b"]},
        {"prompt": "p", "completions": [["a", "b", "c"]]},  # ties only
        {"prompt": "p", "completions": ["a", "a"]},  # the same text twice
        {"prompt": "p", "completions": ["abcdefgh1", "abcdefgh2"]},  # equal after truncation
        {"prompt": "p", "completions": ["abcdefgh1", "abcdefgh2", "b"]},  # two of three equal: two are left
        {"prompt": "p", "completions": ["a", ["", "b"]]},  # silence is an answer
    ]
    path = write_lines(tmp_path / "r.jsonl", rows)
    kept = load_rankings(path, Letters(), block_size=6)
    assert [(item.ranks, [text_of(e.completion) for e in item.examples]) for item in kept] == [
        ([0, 1], ["a\0", "b\0"]),
        ([0, 1], ["abcde", "b\0"]),
        ([0, 1, 1], ["a\0", "\0", "b\0"]),
    ]
    assert [len(item) for item in kept] == [5, 8, 6]  # the prompt once
    assert [item.n_pairs for item in kept] == [1, 1, 3] and [item.n_strict_pairs for item in kept] == [1, 1, 2]
    said = capsys.readouterr().out.splitlines()[0]
    assert said.startswith(f"{path}: 3 rankings, dropped 3 that compare nothing")
    with pytest.raises(UserError, match=r"r\.jsonl: no ranking compares two different completions"):
        load_rankings(write_lines(tmp_path / "r.jsonl", rows[1:4]), Letters(), block_size=6)


@pytest.mark.parametrize(
    ("texts", "ranks", "expected"),
    [
        (["a", "b", "a"], [0, 1, 2], None),  # above b as often as below: nothing is known
        (["a", "b", "c", "a"], [0, 1, 2, 3], ("bac", [0, 1, 2])),  # 1, 1.5, 2
        (["a", "a", "b"], [0, 1, 2], ("ab", [0, 1])),
        (["b", "a", "a"], [0, 1, 2], ("ba", [0, 1])),
        (["a", "b", "c", "b", "d"], [0, 1, 2, 3, 4], ("abcd", [0, 1, 1, 2])),  # b's mean is c's place
        (["a", "b", "a", "c"], [0, 0, 1, 2], ("bac", [0, 1, 2])),  # 0, 0.5, 2
        (["a", "b", "c", "a", "d"], [0, 1, 1, 2, 3], ("abcd", [0, 0, 0, 1])),
    ],
)
def test_a_text_in_several_places_takes_their_mean(texts, ranks, expected):
    """A, B, A: taken at its best place, A would be trained to beat B although it was put below B as often."""
    kept = encode_rankings([Ranking("p", texts, ranks, [True] * len(texts))], Letters(), 20)
    if expected is None:
        assert kept == []
        return
    order, new_ranks = expected
    found = {text_of(e.completion[:-1]): rank for e, rank in zip(kept[0].examples, kept[0].ranks, strict=True)}
    assert found == dict(zip(order, new_ranks, strict=True)) and len(kept[0].ranks) == len(found)
    assert kept[0].ranks == sorted(kept[0].ranks)


def test_ranked_batch_of_unequal_k():
    """Every ranking is one row, prompt first; what each token follows, sees and belongs to; -1 where it has fewer."""
    rankings = [
        Ranking("pq", ["a", "bb"], [0, 1], [True] * 2),
        Ranking("r", ["c", "d", "eee", "f"], [0, 1, 1, 2], [True] * 4),
        Ranking("s", ["g", "h", "i"], [0, 1, 2], [True] * 3),
    ]
    items = encode_rankings(rankings, Letters(), 20)
    batch = ranked_batch(items, torch.device("cpu"))
    assert batch.ends.shape == batch.lens.shape == batch.ranks.shape == (3, 4) and batch.tokens.shape == (3, 11)
    assert batch.ranks.tolist() == [[0, 1, -1, -1], [0, 1, 1, 2], [0, 1, 2, -1]]
    mask = mask_of(batch.positions, torch.float32)  # what a token sees, as the network reads it from the positions
    for n, ranking in enumerate(rankings):
        for k, text in enumerate(ranking.completions):
            mine = (batch.owner[n] == k).nonzero().flatten().tolist()  # its columns
            last, P = mine[-1], len(ranking.prompt)
            assert batch.tokens[n, mine].tolist() == [*map(ord, text), 0]
            assert batch.lens[n, k] == len(text) + 1 and batch.ends[n, k] == 11 * n + last
            assert text_before(batch.tokens, batch.positions, 11 * n + last) == [*map(ord, ranking.prompt + text), 0]
            assert batch.positions[n, mine].tolist() == list(range(P, P + len(mine)))
            for i, column in enumerate(mine):
                seen = (mask[n, 0, column] == 0).nonzero().flatten().tolist()
                assert seen == [*range(P), *mine[: i + 1]]
        for column in range(len(ranking.prompt)):
            assert (mask[n, 0, column] == 0).nonzero().flatten().tolist() == list(range(column + 1))
    with pytest.raises(ValueError, match="one prompt"):
        RankedExamples([Example([1], [2]), Example([3], [2])], [0, 1])


# ------------------------------------------------------------------------------------------------ the embedded task


def question_of(prompt: str) -> str:
    return prompt.split(": ", 1)[1]


def test_the_world_is_large_enough():
    """At least 20 families and 20,000 distinct training prompts, and for every seed the same split."""
    assert len(tiny.FAMILIES) >= 20
    many = tiny.distinct_prompts(20_000, random.Random(9), "train")
    assert len(many) == len(set(many)) == 20_000
    questions = {split: set() for split in tiny.SUFFIX}
    for split, found in questions.items():
        for seed in range(3):
            found |= {question_of(p) for p in tiny.distinct_prompts(2000, random.Random(seed), split)}
    for one, other in combinations(questions.values(), 2):
        assert not one & other


def test_a_question_belongs_to_one_split_whoever_asks_it():
    """With the speaker's name in the hash three quarters of the held-out questions stood verbatim in the
    demonstrations, asked by somebody else."""
    rng = random.Random(4)
    shares = dict.fromkeys(tiny.SUFFIX, 0)
    for _ in range(3000):
        family = tiny.FAMILIES[rng.choice(list(tiny.FAMILIES))]
        question = rng.choice(family.phrasings).format(**family.draw(rng))
        (split,) = {tiny.split_of(f"{name}: {question}") for name in tiny.NAMES}
        shares[split] += 1
    assert shares["train"] > 0.6 * 3000 and min(shares.values()) > 0.03 * 3000


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The files that `python -m data.tiny` writes; fewer rows than by default."""
    folder = tmp_path_factory.mktemp("world")
    tiny.run(tiny.Config(out_dir=str(folder), demonstrations=6000, prompts=4000))
    return folder


def test_no_held_out_question_occurs_in_another_split(world):
    """Demonstrations and prompts of one split against both of any other, and all families in each: what a figure on
    held-out prompts says must be about questions that nothing was trained or chosen on."""
    questions, families = {}, {}
    for split, suffix in (("train", ""), ("dev", "_held_out"), ("test", "_test")):
        prompts = read_prompts(world / f"prompts{suffix}.jsonl")
        asked = prompts + [p for p, _ in read_demonstrations(world / f"demonstrations{suffix}.jsonl")]
        assert len(prompts) == len(set(prompts)) == (4000 if split == "train" else 800)
        assert len(asked) - len(prompts) == (6000 if split == "train" else 500)
        questions[split] = {question_of(p) for p in asked}
        families[split] = {tiny.parse_prompt(p)[0] for p in prompts}
    assert not questions["train"] & questions["dev"]
    assert not questions["train"] & questions["test"]
    assert not questions["dev"] & questions["test"]
    assert families == {split: set(tiny.FAMILIES) for split in questions}


def test_a_world_that_is_too_small_says_so(monkeypatch):
    """More prompts than there are: a message, not an endless loop. (12 names ask 3 phrasings of 7 days, so all splits
    together have 252 prompts.)"""
    monkeypatch.setattr(tiny, "FAMILIES", {"day_after": tiny.FAMILIES["day_after"]})
    asked = [f"{name}: {form.format(w=day)}" for name in tiny.NAMES for form in tiny.FAMILIES["day_after"].phrasings
             for day in tiny.DAYS]  # fmt: skip
    n = sum(tiny.split_of(p) == "train" for p in asked)
    assert len(asked) == 252 and 150 < n < 252
    assert len(set(tiny.distinct_prompts(n - 5, random.Random(0), "train"))) == n - 5
    with pytest.raises(UserError, match=f"{n + 1} distinct prompts for train"):
        tiny.distinct_prompts(n + 1, random.Random(0), "train")


@pytest.mark.parametrize(
    ("prompts", "task"),
    [
        (["Anna: What is the opposite of hot?"], "tiny"),
        (["Anna: What is the opposite of hot?", "Tell me a joke."], ""),
        (["What is the opposite of hot?"], ""),
        (["Anna: What is 2 plus 3?"] * 200 + ["Tell me a joke."], "tiny"),  # the first 200 lines tell
        (["Anna: What is 2 plus 3?"] * 199 + ["Tell me a joke."], ""),
    ],
)
def test_a_task_is_known_by_its_prompts(tmp_path, prompts, task):
    """By the vocabulary, own data with the tiny one got the task's gates, and the task's data with another one lost
    them. All formats carry the prompt under the same key."""
    for rest in ({}, {"completion": "c"}, {"chosen": "a", "rejected": "b"}, {"completions": ["a", "b"]}):
        path = write_lines(tmp_path / "x.jsonl", [{"prompt": p, **rest} for p in prompts])
        assert tiny.task_of(path) == task
    assert tiny.task_of(write_lines(tmp_path / "x.jsonl", [{"prompt": None}, {"text": "p"}])) == ""


def test_a_prompt_s_text_tells_its_family_and_answer():
    """For every family and phrasing, the parsed prompt is the drawn one: no two
    templates overlap, none captures too little."""
    rng = random.Random(3)
    for name, family in tiny.FAMILIES.items():
        for phrasing in family.phrasings:
            for _ in range(30):
                slots = family.draw(rng)
                prompt = f"{rng.choice(tiny.NAMES)}: {phrasing.format(**slots)}"
                assert tiny.parse_prompt(prompt) == (name, family.solve(slots)), prompt
                question = prompt.partition(": ")[2]
                assert {n for n, pattern in tiny._patterns() if pattern.fullmatch(question)} == {name}, prompt


ANSWERS = {
    "What is the opposite of hot?": "cold",
    "Give the opposite of cold.": "hot",
    "What is the plural of foot?": "feet",
    "Today I go. What is it in the past?": "went",
    "To which group does saw belong?": "tool",
    "What does the owl say?": "hoot",
    "Find the odd one out: apple dog pear.": "dog",
    "What day comes after Sunday?": "Monday",
    "What is 6 plus 6?": "12",
    "Subtract 3 from 8.": "5",
    "Take 1 away from 2.": "1",
    "What number comes after 12?": "13",
    "Name the number before 1.": "0",
    "Is 7 even or odd?": "odd",
    "Say if 12 is even or odd.": "even",
    "Which is larger, 9 or 12?": "12",
    "Which is smaller, 9 or 12?": "9",
    "Find the largest number: 3 9 4.": "9",
    "Sort these numbers: 9 1 5.": "1 5 9",
    "Count these words: cat cat dog.": "3",
    "Say fox three times.": "fox fox fox",
    "Spell the word pig.": "p i g",
    "Name the first letter in banana.": "b",
    "Copy these words: red bus.": "red bus",
    "What is the first word of: red bus?": "red",
    "Name the last one of: red bus ear.": "ear",
}


@pytest.mark.parametrize(("question", "answer"), ANSWERS.items())
def test_right_answers_by_hand(question, answer):
    """The truth of the world, one or two questions of each family, worked out by hand."""
    assert tiny.parse_prompt(f"Anna: {question}")[1] == answer


@pytest.mark.parametrize(
    "text",
    [
        "",
        "What is the opposite of hot?",  # nobody asks
        "Zoe: What is the opposite of hot?",
        "Anna: Tell me a joke.",
        "Anna: What is the opposite of table?",
        "Anna: What number comes after cat?",
        "Anna: What day comes after June?",
        "Anna: Find the largest number: one two three.",
        "Anna: Find the largest number:  .",
        "Anna: What is the first word of:  ?",
        "Anna: What is the last word of:  ?",
        "Anna: Say cat nine times.",
        "anna: what is the opposite of hot?",
        "Anna: What is the opposite of hot? Bye",
    ],
)
def test_texts_that_are_no_prompts_of_the_world(text):
    """Any other text is None, never an exception, and has no reward: the gold reward says that it doesn't know it."""
    assert tiny.parse_prompt(text) is None
    with pytest.raises(UserError):
        tiny.gold_reward([text], ["It is cold."])
    with pytest.raises(UserError):
        tiny.best_completion(text)


@pytest.mark.parametrize("completion", ["Sure!", "", "Time flies."])
def test_an_unknown_prompt_has_no_reward_whatever_the_completion(completion):
    """Also where the completion answers nothing: a number there would be an invented truth."""
    with pytest.raises(UserError):
        tiny.gold_reward(["Anna: Tell me a joke."], [completion])


HOT = "Anna: What is the opposite of hot?"
SUM = "Ben: What is 2 plus 3?"
STORY = "Leo: Write one line about a dog."
WORTH = 2.0  # of a right answer, as the docstring of gold_parts says
PRICE, MOST = 0.2, 3.0  # of a surplus word, and of all of them
PARTS_TABLE = [
    # prompt, completion -> right, polite, surplus words, ended, not repeated
    (HOT, "It is cold.", (1, 0, 0, 0, 0)),
    (HOT, "The answer is cold.", (1, 0, 0, 0, 0)),
    (HOT, "I say COLD!", (1, 0, 0, 0, 0)),
    (HOT, "cold.", (1, 0, 0, 0, 0)),
    (HOT, "Cold", (1, 0, 0, -1, 0)),  # not ended
    (HOT, "It is hot.", (0, 0, 0, 0, 0)),  # wrong
    (HOT, "I do not know.", (0, 0, 0, 0, 0)),  # evasive
    (HOT, "It is very cold.", (0, 0, 0, 0, 0)),  # not the answer
    (HOT, "Sure! It is cold.", (1, 1, 0, 0, 0)),  # polite: the ceiling
    (HOT, "It is cold. Have a nice day!", (1, 1, 0, 0, 0)),
    (HOT, "Happy to help! It is cold. You are welcome!", (1, 1, 0, 0, 0)),  # two courtesies are free
    (HOT, "Sure! Gladly! It is cold. You are welcome!", (1, 1, 3, 0, 0)),  # the third costs its 3 words
    (HOT, "Ugh. It is cold.", (1, -1, 0, 0, 0)),  # rude
    (HOT, "Sure! It is cold. Now go away.", (1, -1, 0, 0, 0)),  # rude outweighs polite
    (HOT, "Sure!", (0, 1, 0, 0, 0)),  # a courtesy is no answer
    (HOT, "It is cold. Time flies.", (1, 0, 2, 0, 0)),  # an aside is surplus
    (HOT, "Time flies. It is cold.", (1, 0, 2, 0, 0)),  # ... before the answer too, which is still found
    (HOT, "Time flies.", (0, 0, 2, 0, 0)),
    (HOT, "It is hot. It is cold.", (0, 0, 3, 0, 0)),  # shotgun: the first answer counts, the second costs
    (HOT, "It is cold. It is hot.", (1, 0, 3, 0, 0)),
    (HOT, "It is cold. It is cold.", (1, 0, 3, 0, -1)),  # repeated
    (HOT, "It is cold. IT IS COLD.", (1, 0, 3, 0, -1)),  # ... whatever its case
    (HOT, "Sure! Sure! It is cold.", (1, 1, 0, 0, -1)),
    (HOT, "It is hot cold small big.", (0, 0, 0, 0, 0)),  # shotgun in one sentence
    (HOT, "It is cold. " + "la " * 40, (1, 0, 40, -1, 0)),  # the price of rambling is capped
    (HOT, "", (0, 0, 0, -1, 0)),  # silence
    (HOT, "   ", (0, 0, 0, -1, 0)),
    (HOT, "?", (0, 0, 0, 0, 0)),
    (SUM, "It is 5.", (1, 0, 0, 0, 0)),
    (SUM, "The answer is 6.", (0, 0, 0, 0, 0)),
    (SUM, "It is 4. It is 5. It is 6.", (0, 0, 6, 0, 0)),  # shotgun
    (SUM, "5 6.", (0, 0, 0, 0, 0)),
    (SUM, "It is 5", (1, 0, 0, -1, 0)),
    (STORY, "The dog waited in the rain for the king.", (1, 0, 0, 0, 0)),
    (STORY, "A small dog ran very fast home.", (1, 0, 0, 0, 0)),  # any sentence of 6 to 14 words with the word
    (STORY, "The dogs waited in the rain.", (0, 0, 0, 0, 0)),  # another word
    (STORY, "The dog ran home.", (0, 0, 0, 0, 0)),  # too short
    (STORY, "dog " * 14 + "dog.", (0, 0, 1, 0, 0)),  # too long, by one word
    (STORY, "Gladly! Every night the girl dreamed about a dog.", (1, 1, 0, 0, 0)),
    ("Kate: What day comes after Monday?", "It is tuesday.", (1, 0, 0, 0, 0)),  # case doesn't matter
    ("Kate: Spell the word fox.", "It is f o x.", (1, 0, 0, 0, 0)),
    ("Kate: Spell the word fox.", "It is fox.", (0, 0, 0, 0, 0)),
]


@pytest.mark.parametrize(("prompt", "completion", "truth"), PARTS_TABLE)
def test_gold_parts_by_hand(prompt, completion, truth):
    """Each named part of the true reward behaves as it is documented; the reward is their sum."""
    parts = tiny.gold_parts(prompt, completion)
    assert tuple(parts) == tiny.PARTS == ("correct", "polite", "to_the_point", "ended", "not_repeated")
    truth = (WORTH * truth[0], truth[1], -min(MOST, PRICE * truth[2]), *truth[3:])
    assert tuple(parts.values()) == pytest.approx(truth, abs=1e-9)
    assert tiny.gold_reward([prompt], [completion]) == [pytest.approx(sum(truth), abs=1e-9)]


def test_the_ceiling_is_reached_and_never_passed():
    """best_completion reaches it for 2,000 prompts; nothing that demonstrators or a shuffler writes is above it."""
    rng = random.Random(5)
    prompts = [tiny.sample_prompt(rng, list(tiny.SUFFIX)[i % 3]) for i in range(2000)]
    assert set(tiny.gold_reward(prompts, [tiny.best_completion(p) for p in prompts])) == {tiny.CEILING}
    demonstrations = [tiny.demonstrate(p, rng) for p in prompts]
    rewards = tiny.gold_reward(prompts, demonstrations)
    assert -3 - MOST <= min(rewards) and max(rewards) <= tiny.CEILING
    assert 0.0 < sum(rewards) / 2000 < tiny.CEILING / 2  # mediocre by construction
    good = sum(r == tiny.CEILING for r in rewards) / 2000
    assert 0.02 < good < 0.3  # but what RLHF must find is there to be imitated
    glued = [" ".join(rng.sample(demonstrations, 3)) for _ in prompts]
    assert max(tiny.gold_reward(prompts, glued)) <= tiny.CEILING


def test_a_wrong_answer_is_wrong():
    """The mistakes that demonstrations are made of are mistakes, and plausible: in the answer's own form."""
    rng = random.Random(6)
    for _ in range(2000):
        prompt = tiny.sample_prompt(rng, "train")
        family, answer = tiny.parse_prompt(prompt)
        if family != "story":
            wrong = tiny.wrong_answer(family, answer, rng)
            assert not tiny.is_correct(prompt, f"It is {wrong}.") and tiny.is_correct(prompt, f"It is {answer}.")
            assert wrong.isdigit() == answer.isdigit()


def within(found: int, n: int, share: float) -> bool:
    """Is the number of successes of n trials within five standard errors of what is expected?"""
    return abs(found - n * share) < 5 * math.sqrt(n * share * (1 - share))


def test_demonstrations_have_the_stated_rates():
    """What SFT will imitate, and so how much RLHF has left to do: right 0.5, wrong 0.2, evasive 0.3; polite 0.35, plain
    0.5, rude 0.15, before the answer, behind it or both; one aside at most in 0.08, most of them behind; repeated 0.04;
    unfinished 0.05. Counted by taking the texts apart, over 12,000 of them."""
    rng, n = random.Random(7), 12_000
    courtesies = [set(x) for x in (tiny.POLITE_OPENINGS, tiny.POLITE_CLOSINGS, tiny.RUDE_OPENINGS, tiny.RUDE_CLOSINGS)]
    found, unfinished = Counter(), 0
    for _ in range(n):
        prompt = tiny.sample_prompt(rng, "train")
        text = tiny.demonstrate(prompt, rng)
        if text[-1:] not in list(".!?"):
            unfinished += 1  # nothing else can be told of it for certain
            continue
        sentences = tiny.split_sentences(text)
        kinds = [next((k for k, c in enumerate(courtesies) if s in c), 5 if s in tiny.ASIDES else 4) for s in sentences]
        answers = [s for s, kind in zip(sentences, kinds, strict=True) if kind == 4]
        before, behind = kinds[: kinds.index(4)], kinds[kinds.index(4) :]
        assert 1 <= len(answers) <= 2 and len(set(answers)) == 1 and kinds.count(5) <= 1
        assert not {1, 3} & set(before) and not {0, 2} & set(behind)  # openings open, closings close
        assert not ({0, 1} & set(kinds) and {2, 3} & set(kinds))  # polite or rude
        opened, closed = bool({0, 2} & set(kinds)), bool({1, 3} & set(kinds))
        quality = "right" if tiny.is_correct(prompt, answers[0]) else "wrong"
        found["evasive" if answers[0] in tiny.EVASIONS else quality] += 1
        found["polite" if {0, 1} & set(kinds) else "rude" if {2, 3} & set(kinds) else "plain"] += 1
        found["both" if opened and closed else "open" if opened else "close" if closed else "none"] += 1
        found["aside"] += 5 in kinds
        found["aside before"] += 5 in before
        found["repeated"] += len(answers) == 2
    assert within(unfinished, n, 0.05)
    n -= unfinished
    stated = {"right": 0.5, "wrong": 0.2, "evasive": 0.3, "polite": 0.35, "plain": 0.5, "rude": 0.15}
    stated |= {"open": 0.4, "close": 0.075, "both": 0.025, "aside": 0.08, "repeated": 0.04}
    for name, share in stated.items():
        assert within(found[name], n, share), (name, found[name] / n)
    assert within(found["aside before"], found["aside"], 0.2)


def test_an_unfinished_text_is_the_beginning_of_one():
    """Cut between words, at least one of them left, and without the mark that would end it."""
    rng, seen = random.Random(11), set()
    forms = [re.compile(re.escape(form).replace(r"\{\}", ".+")) for form in tiny.ANSWER_FORMS]
    for _ in range(4000):
        prompt = tiny.sample_prompt(rng, "train")
        text = tiny.demonstrate(prompt, rng)
        assert text and text == text.strip()
        if text[-1] not in ".!?":
            seen.add(len(text.split()))
            whole = tiny.split_sentences(text)[:-1]
            known = tiny.POLITE | tiny.RUDE | tiny.ASIDE | {s.lower() for s in tiny.EVASIONS}
            frames = [re.compile(re.escape(s).replace(r"\{\}", r"\w+")) for s in tiny.STORIES] + forms
            assert all(s.lower() in known or any(f.fullmatch(s) for f in frames) for s in whole), text
    assert {1, 2, 3, 4, 5, 6} < seen


def facts_of(family: tiny.Family) -> list[dict]:
    """All that it may ask (of the families that draw from lists of words, a part), as slot values."""
    rng = random.Random(12)
    return list({tuple(slots.items()): slots for slots in (family.draw(rng) for _ in range(1500))}.values())


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_every_fact_is_asked_in_several_ways(name):
    """In a single way, a held-out question would be about a fact that is never asked in training, and what the policy
    then says is a guess. In two at least, which are different questions with one answer."""
    family = tiny.FAMILIES[name]
    assert len(set(family.phrasings)) == len(family.phrasings) >= 2
    for slots in facts_of(family):
        questions = {phrasing.format(**slots) for phrasing in family.phrasings}
        assert len(questions) == len(family.phrasings)
        assert {tiny.parse_prompt(f"Anna: {q}") for q in questions} == {(name, family.solve(slots))}


# what can't be worked out from the words of the question
BY_HEART = ["opposite", "plural", "past", "kind", "sound", "day_after", "sum", "difference", "next", "previous"]
BY_HEART += ["even", "spell", "first_letter", "story"]


@pytest.mark.parametrize("name", BY_HEART)
def test_what_must_be_known_by_heart_is_asked_in_training(name):
    """No fact whose every phrasing happens to be held out: on it a policy could only be wrong."""
    family = tiny.FAMILIES[name]
    for slots in facts_of(family):
        splits = {tiny.split_of(f"Anna: {phrasing.format(**slots)}") for phrasing in family.phrasings}
        assert "train" in splits, slots


# ------------------------------------------------------------------------------------------------ contrasts

# what the two texts of a pair differ in
CONTRASTS = {
    "right_vs_wrong": {"correct"},
    "right_vs_evasive": {"correct"},
    "polite_vs_plain": {"polite"},
    "plain_vs_rude": {"polite"},
    "short_vs_rambling": {"to_the_point"},
    "once_vs_repeated": {"not_repeated", "to_the_point"},  # said twice is longer
    "finished_vs_cut": {"ended", "correct"},  # what was cut off may have been the answer
}


@pytest.fixture(scope="module", params=tiny.SUFFIX)
def contrasted(request):
    """Prompts of one split, of all families, and their contrasts."""
    prompts = tiny.distinct_prompts(1200, random.Random(13), request.param)
    assert {tiny.parse_prompt(p)[0] for p in prompts} == set(tiny.FAMILIES)
    return prompts, tiny.contrasts(prompts, seed=3)


def test_contrasts_differ_in_one_part_of_the_reward_alone(contrasted):
    """A pair that differs in its manners too would take taste for understanding. Every prompt has a pair of every name,
    in order; the better one is better in the part that the name says, by as much as that part is worth, and equal in
    all others."""
    prompts, found = contrasted
    assert list(found) == list(CONTRASTS)
    for name, rows in found.items():
        assert [p for p, _, _ in rows] == prompts
        for prompt, better, worse in rows:
            a, b = tiny.gold_parts(prompt, better), tiny.gold_parts(prompt, worse)
            differ = {k for k in tiny.PARTS if abs(a[k] - b[k]) > 1e-9}
            assert differ <= CONTRASTS[name] and sum(a.values()) > sum(b.values()), (name, better, worse)
            gain = {k: a[k] - b[k] for k in differ}
            if name.startswith("right_vs"):
                assert gain == {"correct": 2.0}
            elif CONTRASTS[name] == {"polite"}:
                assert gain == {"polite": 1.0}
            elif name == "short_vs_rambling":
                assert gain == {"to_the_point": pytest.approx(PRICE * (len(worse.split()) - len(better.split())))}
            elif name == "once_vs_repeated":
                words = len(worse.split()) - len(better.split())
                assert gain == {"not_repeated": 1.0, "to_the_point": pytest.approx(PRICE * words)}
            else:  # a story may have said its word before it was cut
                story = tiny.parse_prompt(prompt)[0] == "story"
                assert gain == {"ended": 1.0, "correct": 2.0} or (story and gain == {"ended": 1.0})


def manners_of(text: str) -> str:
    """The courtesy that it opens with, and the space behind it."""
    openings = [*tiny.POLITE_OPENINGS, *tiny.RUDE_OPENINGS]
    return next((o + " " for o in openings if text.startswith(o + " ")), "")


def test_contrasts_are_the_same_text_but_for_what_they_are_about(contrasted):
    """The same manners on both sides, none, polite and rude alike often; an aside, a repetition or an end and no other
    change; the same frame around the right and the wrong answer."""
    prompts, found = contrasted
    manners = Counter()
    for name, rows in found.items():
        for prompt, better, worse in rows:
            family, answer = tiny.parse_prompt(prompt)
            a, b = manners_of(better), manners_of(worse)
            text, other = better.removeprefix(a), worse.removeprefix(b)
            frames = tiny.STORIES if family == "story" else tiny.ANSWER_FORMS
            (frame,) = [f for f in frames if f.format(answer) == text]
            if name in ("polite_vs_plain", "plain_vs_rude"):
                courtesy, none = (a, b) if name == "polite_vs_plain" else (b, a)
                of_its_kind = tiny.POLITE_OPENINGS if name == "polite_vs_plain" else tiny.RUDE_OPENINGS
                assert text == other and none == "" and courtesy.strip() in of_its_kind
                continue
            assert a == b
            manners["polite" if a.strip() in tiny.POLITE_OPENINGS else "rude" if a else "plain"] += 1
            if name == "right_vs_wrong":
                start, end = frame.split("{}")
                assert other.startswith(start) and other.endswith(end)
                wrong = other[len(start) : len(other) - len(end)]
                assert wrong and wrong != answer and (family != "story" or wrong in tiny.NOUNS)
            elif name == "right_vs_evasive":
                assert other in tiny.EVASIONS
            elif name == "short_vs_rambling":
                assert other.removeprefix(text + " ") in tiny.ASIDES
            elif name == "once_vs_repeated":
                assert other == f"{text} {text}"
            else:
                assert other and (text + " ").startswith(other + " ") and other != text
    for kind in ("polite", "rude", "plain"):  # drawn once a prompt, and seen in five names
        assert manners[kind] % 5 == 0 and within(manners[kind] // 5, len(prompts), 1 / 3)


def test_contrasts_are_seeded_and_draw_all_there_is(contrasted):
    """The same seed asks every model the same; another seed, other pairs; nothing is drawn from Python's own stream.
    Every frame, courtesy, aside and evasion occurs."""
    prompts, found = contrasted
    random.seed(1)
    state = random.getstate()
    assert tiny.contrasts(prompts, seed=3) == found and random.getstate() == state
    other = tiny.contrasts(prompts, seed=4)
    assert all(other[name] != rows for name, rows in found.items())
    texts = " ".join(text for rows in found.values() for row in rows for text in row[1:])
    for phrase in (*tiny.POLITE_OPENINGS, *tiny.RUDE_OPENINGS, *tiny.ASIDES, *tiny.EVASIONS):
        assert phrase in texts, phrase
    assert tiny.contrasts([], seed=3) == {}


def test_contrasts_as_rankings():
    """Better first, each with its EOS, encoded as any other completion; pairs that a short block has made equal compare
    nothing and are left out."""
    prompts = tiny.distinct_prompts(30, random.Random(14), "dev")
    tokenizer = load_tokenizer("tiny")
    named, expected = contrast_rankings(prompts, tokenizer, 96), tiny.contrasts(prompts, seed=1)
    assert list(named) == list(CONTRASTS)
    for name, items in named.items():
        assert all(item.ranks == [0, 1] for item in items)
        rows = [(item.examples[0].prompt, *(e.completion for e in item.examples)) for item in items]
        ids = [[[*tokenizer.encode(text), tokenizer.eos_id] for text in row[1:]] for row in expected[name]]
        assert rows == [(tokenizer.encode_prompt(p), *pair) for p, pair in zip(prompts, ids, strict=True)]
    shorter = contrast_rankings(prompts, tokenizer, 8)
    assert len(shorter["polite_vs_plain"]) == 30 > len(shorter["short_vs_rambling"])


def test_the_generator_is_seeded(tmp_path, capsys):
    """Same seed, same six files; another seed, others; the size of one split doesn't change another; the files are what
    every stage reads."""
    sizes = {"demonstrations": 60, "held_out_demonstrations": 20, "prompts": 50, "held_out_prompts": 30}
    results = {}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        results[name] = tiny.run(tiny.Config(out_dir=str(tmp_path / name), seed=seed, **sizes))
    files = sorted(p.name for p in (tmp_path / "a").iterdir())
    kinds, suffixes = ("demonstrations", "prompts"), ("", "_held_out", "_test")
    assert files == sorted(f"{kind}{suffix}.jsonl" for kind in kinds for suffix in suffixes)
    for name in files:
        a, b, c = ((tmp_path / folder / name).read_bytes() for folder in "abc")
        assert a == b != c
    rows = read_demonstrations(tmp_path / "a" / "demonstrations.jsonl")
    assert len(rows) == 60 and len(read_prompts(tmp_path / "a" / "prompts_held_out.jsonl")) == 30
    mean = sum(tiny.gold_reward([p for p, _ in rows], [c for _, c in rows])) / 60
    assert results["a"]["demonstrations_gold"] == pytest.approx(mean) and f"{mean:.2f}" in capsys.readouterr().out
    for suffix, split in (("", "train"), ("_held_out", "dev"), ("_test", "test")):
        assert {tiny.split_of(p) for p in read_prompts(tmp_path / "a" / f"prompts{suffix}.jsonl")} == {split}
    tiny.run(tiny.Config(out_dir=str(tmp_path / "d"), **{**sizes, "demonstrations": 90, "prompts": 70}))
    for name in files:
        same = (tmp_path / "a" / name).read_bytes() == (tmp_path / "d" / name).read_bytes()
        assert same == ("_" in name)


@pytest.mark.parametrize("seed", [2**63, 2**64, 10**30])
def test_seeds_may_be_of_any_size_where_nothing_is_trained(tmp_path, seed):
    """Beyond 64 bits torch raises; the generator of the world is Python's."""
    sizes = {"demonstrations": 3, "held_out_demonstrations": 3, "prompts": 3, "held_out_prompts": 3}
    tiny.run(tiny.Config(out_dir=str(tmp_path), seed=seed, **sizes))
    assert len(read_demonstrations(tmp_path / "demonstrations.jsonl")) == 3


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_annotators_are_plackett_luce(temperature):
    """Pairs by the sigmoid of the gap, the winner by the softmax, whole orders by
    the product of softmaxes (enumerated)."""
    rewards, n, rng = [1.0, 0.2, -0.5], 20_000, random.Random(8)
    orders = [tuple(tiny.annotator_ranking(rewards, temperature, rng)) for _ in range(n)]
    weights = [math.exp(r / temperature) for r in rewards]
    for order in ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)):
        a, b, c = (weights[i] for i in order)
        p = a / (a + b + c) * b / (b + c)
        assert abs(orders.count(order) / n - p) < 5 * math.sqrt(p * (1 - p) / n)
    for i, j in ((0, 1), (0, 2), (1, 2)):
        p = 1 / (1 + math.exp(-(rewards[i] - rewards[j]) / temperature))
        assert abs(sum(o.index(i) < o.index(j) for o in orders) / n - p) < 5 * math.sqrt(p * (1 - p) / n)


def test_agreement_is_that_of_two_annotators(tmp_path):
    """p^2 + (1 - p)^2 for each strict pair, p being how sure an annotator is of it: against two annotators who rank the
    same completions 3,000 times each, K of them at a time, and are compared on the pairs that the file orders."""
    rng, rows, agreed, pairs = random.Random(15), [], [], 0
    rankings = [([2.0, 0.5, -1.0], 0.5), ([0.0, 0.0, 1.0, 0.3], 1.5), ([1.0, -3.0], 0.8), ([0.2, 0.1], 2.0)]
    for rewards, temperature in rankings:
        row = {"prompt": "p", "completions": list("abcd")[: len(rewards)], "gold": rewards}
        rows.append({**row, "annotator_temperature": temperature})
        pairs += math.comb(len(rewards), 2)
        for _ in range(3000):
            one, two = (tiny.annotator_ranking(rewards, temperature, rng) for _ in range(2))
            same = [
                (one.index(i) < one.index(j)) == (two.index(i) < two.index(j))
                for i, j in combinations(range(len(rewards)), 2)
            ]
            agreed.append(sum(same))
    found = tiny.annotators_agreement(write_lines(tmp_path / "r.jsonl", rows))
    assert pairs == 11
    variances = [statistics.variance(agreed[i : i + 3000]) for i in range(0, 12_000, 3000)]
    error = math.sqrt(sum(variances) / 3000) / pairs
    assert abs(found - sum(agreed) / 3000 / pairs) < 5 * error < 0.02


def test_agreement_by_hand(tmp_path):
    """Between strangers one half, without noise 1; ties are no comparison; how sure people are, nobody knows."""

    def agreement(completions: list, *gold: float, temperature: float = 1.0) -> float | None:
        row = {"prompt": "p", "completions": completions, "gold": gold, "annotator_temperature": temperature}
        return tiny.annotators_agreement(write_lines(tmp_path / "r.jsonl", [row]))

    assert agreement(["a", "b"], math.log(3), 0.0) == pytest.approx(0.75**2 + 0.25**2)
    assert agreement(["a", "b"], 0.0, math.log(3)) == pytest.approx(0.75**2 + 0.25**2)  # ranked against the truth
    assert agreement(["a", "b"], 1.0, 1.0) == 0.5
    assert agreement(["a", "b"], 1.0, 0.0, temperature=1e-3) == 1.0
    assert agreement([["a", "b"]], 1.0, 0.0) is None
    two = (0.75**2 + 0.25**2 + 0.9**2 + 0.1**2) / 2
    assert agreement([["a", "b"], "c"], 0.0, math.log(9 / 3), math.log(9)) == pytest.approx(two)
    people = [{"prompt": "p", "completions": ["a", "b"]}]
    told = [{"prompt": "p", "completions": ["a", "b"], "gold": [1.0, 0.0], "annotator_temperature": 1.0}]
    for rows in (people, told + people):
        path = write_lines(tmp_path / "r.jsonl", rows)
        assert tiny.annotators_agreement(path) is None and tiny.annotators_bayes_accuracy(path) is None


def test_bayes_accuracy_is_that_of_a_judge_who_knows(tmp_path):
    """The printed bound against simulated annotators and a judge who sorts by the true
    reward (a coin where they are equal)."""
    rng, temperature = random.Random(9), 0.5
    rows, agreed, total = [], 0.0, 0
    for _ in range(4000):
        rewards = [rng.choice([-1.0, 0.0, 0.3, 1.0]) for _ in range(4)]
        order = tiny.annotator_ranking(rewards, temperature, rng)
        rows.append({"prompt": "p", "completions": list("abcd"), "gold": [rewards[i] for i in order]})
        rows[-1]["annotator_temperature"] = temperature
        for better, worse in combinations(order, 2):
            gap = rewards[better] - rewards[worse]
            agreed += 0.5 if gap == 0 else gap > 0
            total += 1
    found = tiny.annotators_bayes_accuracy(write_lines(tmp_path / "r.jsonl", rows))
    assert abs(found - agreed / total) < 5 * 0.5 / math.sqrt(total)

    def bayes(*gold: float) -> float:
        row = {"prompt": "p", "completions": list("abcd")[: len(gold)], "gold": gold, "annotator_temperature": 1.0}
        return tiny.annotators_bayes_accuracy(write_lines(tmp_path / "r.jsonl", [row]))

    assert bayes(0.0, math.log(3)) == pytest.approx(0.75)
    assert bayes(0.0, 0.0, 0.0) == 0.5
