"""data/: the tokenizers, the file formats, batching, the embedded task and its truth, the collection of preferences."""

from __future__ import annotations

import hashlib
import json
import math
import random
import re
import shutil
import socket
from dataclasses import dataclass
from itertools import pairwise

import pytest
import tiktoken
import tiktoken.registry
import torch
from helpers import GPT2_BPE, ROOT, make_gpt

from common import UserError, load_model, save_model
from data import collect, tiny
from data.batches import (
    RankedExamples,
    by_length,
    encode_example,
    encode_rankings,
    length_batches,
    pad,
    ranked_batch,
    truncate_prompt,
)
from data.files import (
    Ranking,
    nest_ties,
    parse_ranking,
    read_demonstrations,
    read_jsonl,
    read_prompts,
    read_rankings,
    write_jsonl,
)
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
    assert read_rankings(path) == [Ranking("p", ["a", "b"], [0, 1]), Ranking("p", ["a", "b", "c", "d"], [0, 1, 1, 2])]


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
    ],
)
def test_bad_rankings_are_located(tmp_path, bad, says):
    """Empty rankings, empty ties, wrong types: each at its line."""
    path = lines(tmp_path / "r.jsonl", '{"prompt": "p", "completions": ["a", "b"]}', bad)
    with pytest.raises(UserError) as error:
        read_rankings(path)
    assert str(error.value).startswith(f"{path}:2: ") and says in str(error.value)


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
        (6, "ef", "xyz\0"),
        (5, "f", "xyz\0"),  # down to one token
        (4, "f", "xyz"),  # then the completion loses its right, the EOS first
        (3, "f", "xy"),
        (2, "f", "x"),
        (1, None, None),  # no completion token left
    ],
)
def test_truncation_keeps_the_completion(block_size, prompt, completion):
    """Prompt cut from the left, completion kept, EOS only where the completion wasn't cut (need R18; trap 13)."""
    example = encode_example(Letters(), "abcdef", "xyz", block_size)
    if prompt is None:
        assert example is None
    else:
        assert ("".join(map(chr, example.prompt)), "".join(map(chr, example.completion))) == (prompt, completion)
        assert example.ids == example.prompt + example.completion and len(example) == len(example.ids) <= block_size


def test_empty_completions():
    """Nothing to imitate: dropped. In a ranking silence is an answer: EOS alone."""
    assert encode_example(Letters(), "abc", "", 9) is None
    assert encode_example(Letters(), "abc", "", 9, allow_empty=True).completion == [0]
    assert encode_example(Letters(), "abcdefghijkl", "", 5, allow_empty=True).ids == [*b"ijkl", 0]


def test_prompt_and_completion_decode_to_the_exact_text():
    """Encoded apart and joined: no merge crosses the boundary, nothing is lost (need R18; trap 15)."""
    rng = random.Random(1)
    texts = [t for t in TEXTS if t] + [tiny.sample_prompt(rng, False) for _ in range(50)]
    for prompt in texts:
        for completion in (" leading space", "cold", *TEXTS[1:6], prompt[::-1]):
            example = encode_example(TINY, prompt, completion, 10_000)
            assert TINY.decode(example.prompt) == format_prompt(prompt)
            assert example.completion[-1] == TINY.eos_id and TINY.decode(example.completion[:-1]) == completion
            assert TINY.decode(example.ids[:-1]) == format_prompt(prompt) + completion


def test_truncate_prompt_keeps_the_end():
    assert truncate_prompt([1, 2, 3, 4], 2) == [3, 4] and truncate_prompt([1, 2], 5) == [1, 2]


def test_pad():
    """On the right, to the longest row, or to a multiple; lens are the rows' own lengths,
    even where a row ends in the filler id."""
    tokens, lens = pad([[1, 2, 3], [4], [5, 9]], filler=9)
    assert tokens.tolist() == [[1, 2, 3], [4, 9, 9], [5, 9, 9]] and lens.tolist() == [3, 1, 2]
    assert tokens.dtype == lens.dtype == torch.long
    for multiple, width in ((1, 3), (2, 4), (3, 3), (8, 8)):
        wide, lens = pad([[1, 2, 3], [4]], 0, multiple=multiple)
        assert wide.shape == (2, width) and lens.tolist() == [3, 1]
        assert wide[0, :3].tolist() == [1, 2, 3] and wide.sum() == 10


def filler_share(lengths, batches) -> float:
    used = sum(lengths[i] for b in batches for i in b)
    return 1 - used / sum(max(lengths[i] for i in b) * len(b) for b in batches)


@pytest.mark.parametrize("n", [1, 15, 16, 17, 1000, 1025])
def test_length_batches_cover_each_row_once(n):
    """Each index once, only the last batch smaller (trap 46: a remainder silently dropped),
    reproducible, another order every epoch."""
    rng = random.Random(n)
    lengths = [rng.randint(1, 60) for _ in range(n)]
    batches = length_batches(lengths, 16, torch.Generator().manual_seed(1))
    assert sorted(i for b in batches for i in b) == list(range(n))
    assert sorted(map(len, batches), reverse=True) == [16] * (n // 16) + [n % 16] * (n % 16 > 0)
    assert batches == length_batches(lengths, 16, torch.Generator().manual_seed(1))
    if n > 100:
        assert batches != length_batches(lengths, 16, torch.Generator().manual_seed(2))
        order = torch.randperm(n, generator=torch.Generator().manual_seed(3)).tolist()
        chance = filler_share(lengths, [order[i : i + 16] for i in range(0, n, 16)])
        assert chance > 0.4 and filler_share(lengths, batches) < 0.15
        # short and long batches in random order, no curriculum
        means = [sum(lengths[i] for i in b) / len(b) for b in batches]
        rises = sum(b > a for a, b in pairwise(means))
        assert 0.25 * len(means) < rises < 0.75 * len(means)
    if n > 1000:
        together = {frozenset(b) for b in batches}
        other = {frozenset(b) for b in length_batches(lengths, 16, torch.Generator().manual_seed(2))}
        assert len(together & other) < 3  # batch mates change, not only the order of the batches


def test_by_length():
    """Short to long, each index once."""
    lengths = [5, 1, 4, 1, 3, 9, 2]
    batches = by_length(lengths, 3)
    assert [[lengths[i] for i in b] for b in batches] == [[1, 1, 2], [3, 4, 5], [9]]
    assert sorted(i for b in batches for i in b) == list(range(7))


def test_rankings_that_compare_nothing_are_dropped_and_counted():
    """Ties only, one text several times, texts equal after truncation: the loss is the constant ln 2 there."""
    rankings = [
        Ranking("p", ["a", "b"], [0, 1]),
        Ranking("p", ["a", "b", "c"], [0, 0, 0]),  # ties only
        Ranking("p", ["a", "a"], [0, 1]),  # the same text twice
        Ranking("p", ["abcdefgh1", "abcdefgh2"], [0, 1]),  # equal after truncation
        Ranking("p", ["abcdefgh1", "b", "abcdefgh2"], [0, 1, 2]),  # two of three equal: two are left
        Ranking("p", ["a", "", "b"], [0, 1, 1]),  # silence is an answer
    ]
    kept, dropped = encode_rankings(rankings, Letters(), block_size=6)
    assert dropped == 3
    assert [(item.ranks, ["".join(map(chr, e.completion)) for e in item.examples]) for item in kept] == [
        ([0, 1], ["a\0", "b\0"]),
        ([0, 1], ["abcde", "b\0"]),
        ([0, 1, 1], ["a\0", "\0", "b\0"]),
    ]
    assert [len(item) for item in kept] == [3, 6, 3]


def test_ranked_batch_of_unequal_k():
    """Every text is one row; index and ranks find them again, -1 where a ranking has fewer."""
    rankings = [
        Ranking("pq", ["a", "bb"], [0, 1]),
        Ranking("r", ["c", "d", "eee", "f"], [0, 1, 1, 2]),
        Ranking("s", ["g", "h", "i"], [0, 1, 2]),
    ]
    items, _ = encode_rankings(rankings, Letters(), 20)
    batch = ranked_batch(items, filler=7, device=torch.device("cpu"))
    assert batch.index.shape == batch.ranks.shape == (3, 4) and batch.tokens.shape == (9, 5)
    assert batch.ranks.tolist() == [[0, 1, -1, -1], [0, 1, 1, 2], [0, 1, 2, -1]]
    for n, ranking in enumerate(rankings):
        for k, text in enumerate(ranking.completions):
            row = int(batch.index[n, k])
            start, end = int(batch.prompt_lens[row]), int(batch.lens[row])
            assert batch.tokens[row, :start].tolist() == [ord(c) for c in ranking.prompt]
            assert batch.tokens[row, start:end].tolist() == [*map(ord, text), 0]
            assert (batch.tokens[row, end:] == 7).all()
    assert ranked_batch(items, 7, torch.device("cpu"), multiple=8).tokens.shape == (9, 8)
    assert isinstance(items[0], RankedExamples)


# ------------------------------------------------------------------------------------------------ the embedded task


def test_the_world_is_large_enough():
    """At least 20 families and 20,000 distinct prompts, held-out ones kept apart
    by the text alone, so for every seed."""
    assert len(tiny.FAMILIES) >= 20
    training = {p for seed in range(3) for p in tiny.distinct_prompts(20_000, random.Random(seed), held_out=False)}
    held_out = {p for seed in range(3) for p in tiny.distinct_prompts(800, random.Random(seed), held_out=True)}
    assert not training & held_out
    many = tiny.distinct_prompts(20_000, random.Random(9), False)
    assert len(many) == len(set(many)) == 20_000
    families = {tiny.parse_prompt(p)[0] for p in held_out}
    assert families == set(tiny.FAMILIES)


def test_a_world_that_is_too_small_says_so(monkeypatch):
    """More prompts than there are: a message, not an endless loop. (12 names, 2
    phrasings, 7 days make 168 prompts in all.)"""
    monkeypatch.setattr(tiny, "FAMILIES", {"day_after": tiny.FAMILIES["day_after"]})
    assert len(set(tiny.distinct_prompts(120, random.Random(0), False))) == 120
    with pytest.raises(UserError, match="169 distinct"):
        tiny.distinct_prompts(169, random.Random(0), False)


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
PRICE, MOST = 0.2, 3.0  # of a surplus word, and of all of them, as the docstring of gold_parts says
PARTS_TABLE = [
    # prompt, completion -> correct, polite, surplus words, ended, not repeated
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
    truth = (*truth[:2], -min(MOST, PRICE * truth[2]), *truth[3:])
    assert tuple(parts.values()) == pytest.approx(truth, abs=1e-9)
    assert tiny.gold_reward([prompt], [completion]) == [pytest.approx(sum(truth), abs=1e-9)]


def test_the_ceiling_is_reached_and_never_passed():
    """best_completion reaches it for 2,000 prompts; nothing that demonstrators or a shuffler writes is above it."""
    rng = random.Random(5)
    prompts = [tiny.sample_prompt(rng, held_out=i % 2 == 0) for i in range(2000)]
    assert set(tiny.gold_reward(prompts, [tiny.best_completion(p) for p in prompts])) == {tiny.CEILING}
    demonstrations = [tiny.demonstrate(p, rng) for p in prompts]
    rewards = tiny.gold_reward(prompts, demonstrations)
    assert -3 - MOST <= min(rewards) and max(rewards) <= tiny.CEILING
    assert -1.0 < sum(rewards) / 2000 < 0.5  # mediocre by construction: far below 2
    good = sum(r == tiny.CEILING for r in rewards) / 2000
    assert 0.02 < good < 0.3  # but what RLHF must find is there to be imitated
    glued = [" ".join(rng.sample(demonstrations, 3)) for _ in prompts]
    assert max(tiny.gold_reward(prompts, glued)) <= tiny.CEILING


def test_a_wrong_answer_is_wrong():
    """The mistakes that demonstrations are made of are mistakes, and plausible: in the answer's own form."""
    rng = random.Random(6)
    for _ in range(2000):
        prompt = tiny.sample_prompt(rng, False)
        family, answer = tiny.parse_prompt(prompt)
        if family != "story":
            wrong = tiny.wrong_answer(family, answer, rng)
            assert not tiny.is_correct(prompt, f"It is {wrong}.") and tiny.is_correct(prompt, f"It is {answer}.")
            assert wrong.isdigit() == answer.isdigit()


def test_demonstrations_mix_all_qualities():
    """Right, wrong, polite, rude, rambling, repeated, unfinished: each a known, sizable share."""
    rng = random.Random(7)
    prompts = [tiny.sample_prompt(rng, False) for _ in range(4000)]
    parts = [tiny.gold_parts(p, tiny.demonstrate(p, rng)) for p in prompts]
    share = {
        "right": sum(p["correct"] == 1 for p in parts),
        "polite": sum(p["polite"] == 1 for p in parts),
        "rude": sum(p["polite"] == -1 for p in parts),
        "rambling": sum(p["to_the_point"] < 0 for p in parts),
        "unfinished": sum(p["ended"] < 0 for p in parts),
        "repeated": sum(p["not_repeated"] < 0 for p in parts),
    }
    expected = {"right": (0.4, 0.7), "polite": (0.2, 0.4), "rude": (0.1, 0.3)}
    expected |= {"rambling": (0.2, 0.5), "unfinished": (0.02, 0.2), "repeated": (0.03, 0.15)}
    for name, (low, high) in expected.items():
        assert low < share[name] / 4000 < high, name


def test_the_generator_is_seeded(tmp_path, capsys):
    """Same seed, same four files; another seed, others; the files are what every stage reads."""
    sizes = {"demonstrations": 60, "held_out_demonstrations": 20, "prompts": 50, "held_out_prompts": 30}
    results = {}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        results[name] = tiny.train(tiny.Config(out_dir=str(tmp_path / name), seed=seed, **sizes))
    files = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert files == ["demonstrations.jsonl", "demonstrations_held_out.jsonl", "prompts.jsonl", "prompts_held_out.jsonl"]
    for name in files:
        a, b, c = ((tmp_path / folder / name).read_bytes() for folder in "abc")
        assert a == b != c
    rows = read_demonstrations(tmp_path / "a" / "demonstrations.jsonl")
    assert len(rows) == 60 and len(read_prompts(tmp_path / "a" / "prompts_held_out.jsonl")) == 30
    mean = sum(tiny.gold_reward([p for p, _ in rows], [c for _, c in rows])) / 60
    assert results["a"]["demonstrations_gold"] == pytest.approx(mean) and f"{mean:.2f}" in capsys.readouterr().out
    assert all(tiny.is_held_out(p) for p in read_prompts(tmp_path / "a" / "prompts_held_out.jsonl"))


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


def test_bayes_accuracy_is_that_of_a_judge_who_knows():
    """The printed bound against simulated annotators and a judge who sorts by the true
    reward (a coin where they are equal)."""
    rng, temperature = random.Random(9), 0.5
    groups = [[rng.choice([-1.0, 0.0, 0.3, 1.0]) for _ in range(4)] for _ in range(4000)]
    agreed = total = 0
    for rewards in groups:
        order = tiny.annotator_ranking(rewards, temperature, rng)
        for a in range(4):
            for b in range(a + 1, 4):
                gap = rewards[order[a]] - rewards[order[b]]
                agreed += 0.5 if gap == 0 else gap > 0
                total += 1
    assert abs(tiny.bayes_accuracy(groups, temperature) - agreed / total) < 5 * 0.5 / math.sqrt(total)
    assert tiny.bayes_accuracy([[0.0, math.log(3)]], 1.0) == pytest.approx(0.75)
    assert tiny.bayes_accuracy([[0.0, 0.0, 0.0]], 1.0) == 0.5


# ----------------------------------------------------------------------------------------------- collecting preferences


@pytest.mark.parametrize(
    ("answer", "ranks"),
    [
        ("1 2 3", [0, 1, 2]),
        ("3 1 2", [1, 2, 0]),
        ("2 1=3", [1, 0, 1]),
        ("2 1 = 3", [1, 0, 1]),
        ("1=2=3", [0, 0, 0]),
        ("  3   2=1 ", [1, 1, 0]),
        ("", None),
        ("1 2", None),  # one is missing
        ("1 2 2", None),  # named twice
        ("1 2 4", None),
        ("1 2 3 3", None),
        ("1,2,3", None),
        ("a b c", None),
        ("1 = 2 =", None),
    ],
)
def test_parse_order(answer, ranks):
    """What annotators type -> the rank of each completion, or None to ask again."""
    assert collect.parse_order(answer, 3) == ranks


def test_equal_texts_tie():
    """A text can't be better than itself (trap 36); the others keep distinct ranks."""
    for seed in range(20):
        ranks = collect.rank_simulated(["a", "b", "a", "c", "a"], [0.0, 1.0, 0.0, 0.5, 0.0], 1.0, random.Random(seed))
        assert ranks[0] == ranks[2] == ranks[4] and len(set(ranks)) == 3 and set(ranks) == {0, 1, 2}


def test_low_noise_annotators_rank_by_the_truth():
    """Best first, and the rank belongs to the completion it stands beside."""
    for seed in range(20):
        ranks = collect.rank_simulated(["x", "y", "z", "w"], [0.1, 2.0, -1.0, 1.0], 1e-3, random.Random(seed))
        assert ranks == [2, 0, 3, 1]


@pytest.fixture
def human(monkeypatch):
    """Types the given answers; then ctrl-D."""

    def start(*answers):
        left = list(answers)

        def answer(_):
            if not left:
                raise EOFError
            return left.pop(0)

        monkeypatch.setattr("builtins.input", answer)

    return start


def test_human_annotators_are_asked_until_the_answer_makes_sense(human, capsys):
    human("1 2", "best", "2=3 1")
    assert collect.rank_human("Prompt?", ["first", "second", "third"]) == [1, 0, 0]
    shown = capsys.readouterr().out
    assert "Prompt?" in shown and "2: second" in shown and shown.count("name each of 1..3 once") == 2
    human("s")
    assert collect.rank_human("p", ["a", "b"]) is None
    for answers in (("q",), ()):  # stop, or end of input
        human(*answers)
        with pytest.raises(KeyboardInterrupt):
            collect.rank_human("p", ["a", "b"])


@dataclass
class Made:
    by: str = "a test"


@pytest.fixture(scope="module")
def random_policy(tmp_path_factory):
    """Two checkpoints of small random GPTs with the tiny vocabulary, and a prompts file."""
    folder = tmp_path_factory.mktemp("policy")
    for seed in (1, 2):
        policy = make_gpt(seed, vocab=TINY.n_vocab, block_size=64, n_embd=16)
        save_model(folder / f"p{seed}", policy, "tiny", "test", Made())
    write_jsonl(folder / "prompts.jsonl", [{"prompt": p} for p in tiny.distinct_prompts(11, random.Random(1), False)])
    return folder


def collecting(folder, out, **changes) -> collect.Config:
    settings = {"policies": [str(folder / "p1")], "prompts": str(folder / "prompts.jsonl"), "out": str(out)}
    settings |= {"n_prompts": 0, "batch_size": 4, "max_new_tokens": 6, "completions": 3, "device": "cpu"}
    return collect.Config(**{**settings, **changes})


def test_collected_rankings(random_policy, tmp_path):
    """One line a prompt, in order; K completions each, sampled not copied; the truth that the simulated annotators knew
    stands in the order of the texts it belongs to (here a made-up truth that differs for every text)."""
    (tmp_path / "truth.py").write_text(
        "def f(prompts, completions):\n    return [len(set(c)) + len(c) / 100 for c in completions]\n", encoding="utf-8"
    )
    policies = [str(random_policy / "p1"), str(random_policy / "p2")]
    gold = f"{tmp_path / 'truth.py'}:f"
    out = tmp_path / "r.jsonl"
    collect.train(collecting(random_policy, out, policies=policies, temperatures=[0.7, 1.0], completions=5, gold=gold))
    rankings = read_rankings(out)
    assert [r.prompt for r in rankings] == read_prompts(random_policy / "prompts.jsonl")
    assert all(len(r.completions) == 5 for r in rankings)
    assert len({c for r in rankings for c in r.completions}) > 45
    mixed = 0
    for (_, row), ranking in zip(read_jsonl(out), rankings, strict=True):
        assert row["gold"] == pytest.approx([len(set(c)) + len(c) / 100 for c in ranking.completions], abs=1e-4)
        mixed += row["gold"] != sorted(row["gold"], reverse=True)
    assert mixed > 3  # noisy annotators: not always the order of the truth
    collect.train(collecting(random_policy, tmp_path / "sharp.jsonl", gold=gold, annotator_temperature=1e-3))
    for _, row in read_jsonl(tmp_path / "sharp.jsonl"):  # without noise: best first
        assert row["gold"] == sorted(row["gold"], reverse=True)


def test_each_completion_belongs_to_its_prompt(random_policy, tmp_path, float64):
    """At a temperature of nearly 0 each policy's completion is its greedy one,
    worked out here for each prompt alone."""
    policies = [str(random_policy / "p1"), str(random_policy / "p2")]
    collect.train(collecting(random_policy, tmp_path / "r.jsonl", policies=policies, temperatures=[1e-5]))
    texts = set()
    for ranking in read_rankings(tmp_path / "r.jsonl"):
        greedy = []
        for path in policies:
            model, _ = load_model(path, torch.device("cpu"))
            ids = TINY.encode_prompt(ranking.prompt)
            start = len(ids)
            while len(ids) < start + 6 and TINY.eos_id not in ids[start:]:
                ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
            greedy.append(TINY.decode([i for i in ids[start:] if i != TINY.eos_id]))
        expected = [greedy[0], greedy[1], greedy[0]]  # completion k comes from policy k mod 2
        assert sorted(ranking.completions) == sorted(expected)
        texts.update(greedy)
    assert len(texts) > 10  # so a completion beside the wrong prompt would be seen


def test_a_resumed_collection_equals_an_unbroken_one(random_policy, tmp_path):
    """Stopped anywhere, even within a line, and run again: the same file (need R24)."""
    whole = tmp_path / "whole.jsonl"
    collect.train(collecting(random_policy, whole))
    data = whole.read_bytes()
    ends = [m.end() for m in re.finditer(b"\n", data)]
    assert len(ends) == 11
    for i, cut in enumerate([0, ends[3], ends[5], ends[5] + 1, ends[6] + 30, len(data) - 1, len(data)]):
        part = tmp_path / f"part{i}.jsonl"
        part.write_bytes(data[:cut])
        collect.train(collecting(random_policy, part))
        assert part.read_bytes() == data, f"cut at byte {cut}"
    collect.train(collecting(random_policy, tmp_path / "seed2.jsonl", seed=2))
    assert (tmp_path / "seed2.jsonl").read_bytes() != data


def test_a_line_torn_within_a_character_is_taken_off(tmp_path):
    """A crash can cut a line anywhere, also between the bytes of one letter."""
    path = tmp_path / "r.jsonl"
    whole = json.dumps({"prompt": "é", "completions": ["a", "b"]}, ensure_ascii=False).encode() + b"\n"
    path.write_bytes(whole + '{"prompt": "é'.encode()[:-1])
    assert collect.already_ranked(path) == {"é"} and path.read_bytes() == whole
    path.write_bytes(b'{"pro')  # nothing whole
    assert collect.already_ranked(path) == set() and path.read_bytes() == b""
    assert collect.already_ranked(tmp_path / "none") == set()


def test_human_collection_writes_as_it_goes(random_policy, tmp_path, human, capsys):
    """Ranked, skipped, ranked, stopped: two lines stand in the file, best first, without
    any simulated truth; then it goes on."""
    out = tmp_path / "r.jsonl"
    human("3 2 1", "s", "1=2 3")
    with pytest.raises(KeyboardInterrupt):
        collect.train(collecting(random_policy, out, annotator="human", seed=3))
    shown = re.findall(r"^  (\d): (.*)$", capsys.readouterr().out, re.M)
    texts = [[t for _, t in shown[i : i + 3]] for i in range(0, 9, 3)]
    rows = [row for _, row in read_jsonl(out)]
    prompts = read_prompts(random_policy / "prompts.jsonl")
    assert [row["prompt"] for row in rows] == [prompts[0], prompts[2]]
    assert all(set(row) == {"prompt", "completions"} for row in rows)
    if len(set(texts[0])) == 3 and not any("\n" in t or "\r" in t for t in texts[0]):
        assert rows[0]["completions"] == texts[0][::-1]
    assert len(rows[1]["completions"]) == 2 and len(rows[1]["completions"][0]) == 2  # the tie is a nested list
    human("1 2 3")
    with pytest.raises(KeyboardInterrupt):
        collect.train(collecting(random_policy, out, annotator="human", seed=3))
    asked = [row["prompt"] for _, row in read_jsonl(out)]
    assert asked == [prompts[0], prompts[2], prompts[1]]  # the skipped one is asked again


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"completions": 1}, "--completions"),
        ({"policies": []}, "--policies"),
        ({"temperatures": [1.0, 0.0]}, "--temperatures"),
        ({"annotator_temperature": 0.0}, "--annotator_temperature"),
        ({"max_new_tokens": 64}, "--max_new_tokens"),
        ({"skip": 99}, "--skip"),
        ({"gold": ""}, "--gold"),
        ({"prompts": "nowhere.jsonl"}, "data.tiny"),
        ({"policies": ["nowhere"]}, "sft.py"),
    ],
)
def test_collection_refuses_senseless_settings(random_policy, tmp_path, changes, says):
    """A message that names the flag, or the script that makes the missing file, and no output file begun."""
    with pytest.raises(UserError, match=re.escape(says)):
        collect.train(collecting(random_policy, tmp_path / "r.jsonl", **changes))
    assert not (tmp_path / "r.jsonl").exists()
