"""tools/prepare.py and tools/records.py: public data in each form in which it is published, written out by hand here
and compared field by field with what the project's readers make of it."""

from __future__ import annotations

import gzip
import itertools
import json
import os
import random
import re
import subprocess
import sys

import pytest
from helpers import ROOT

from lib.cli import UserError, check_ranges
from tools import prepare as module
from data.files import read_demonstrations, read_prompts, read_rankings, turns_of
from tools.prepare import prepare

HALF = chr(0xD83D)  # the first half of an emoji


def save(path, *records, ending: str = "\n", start: bytes = b""):
    """JSON Lines, compressed where the name says so."""
    raw = start + "".join(json.dumps(r, ensure_ascii=True) + ending for r in records).encode()
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return path


def prepared(tmp_path, *records, **options):
    """(counts, demonstrations [(turns, completion)], pairs [(turns, chosen, rejected)]) of records in one file, none of
    it held out, as the project's readers read them."""
    tmp_path.mkdir(exist_ok=True)
    path = save(tmp_path / "raw.jsonl", *records)
    return read_back(tmp_path, prepare(path, tmp_path / "out", held_out=0.0, seed=1, **options))


def read_back(tmp_path, counts):
    demonstrations, pairs = tmp_path / "out" / "demonstrations.jsonl", tmp_path / "out" / "pairs.jsonl"
    return (
        counts,
        sorted((turns_of(p), c) for p, c in read_demonstrations(demonstrations)) if demonstrations.exists() else [],
        sorted((turns_of(r.prompt), *r.completions) for r in read_rankings(pairs)) if pairs.exists() else [],
    )


def refused(tmp_path, *records, name: str = "raw.jsonl", **options) -> str:
    """The error's message, one line; nothing may be written."""
    path = save(tmp_path / name, *records)
    with pytest.raises(UserError) as error:
        prepare(path, tmp_path / "out", held_out=0.0, seed=1, **options)
    assert not (tmp_path / "out").exists() and "\n" not in str(error.value)
    assert str(error.value).startswith(str(path))
    return str(error.value).removeprefix(str(path))


KIND = {"role": "system", "content": "Be kind."}


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


# ------------------------------------------------------------------------------------------------ Anthropic's HH-RLHF

HH = {
    "chosen": "\n\nHuman: Name a color.\n\nAssistant: Which kind?\n\nHuman: A cold one. \n\nAssistant: Blue.",
    "rejected": "\n\nHuman: Name a color.\n\nAssistant: Which kind?\n\nHuman: A cold one. \n\nAssistant: Red.\n",
}
HH_TURNS = (("user", "Name a color."), ("assistant", "Which kind?"), ("user", "A cold one."))


def hh(chosen: str, rejected: str) -> dict:
    """A pair with one human's turn, or with the turns given."""
    return {
        k: v if v.startswith("\n\n") else f"\n\nHuman: Q\n\nAssistant:{v}"
        for k, v in (("chosen", chosen), ("rejected", rejected))
    }


@pytest.mark.parametrize("name", ["train.jsonl.gz", "train.jsonl", "train.json.gz", "unpacked.gz.jsonl"])
def test_hh(tmp_path, name):
    """Published as .jsonl.gz; the prompt keeps its turns, spaces at the ends go."""
    counts = prepare(save(tmp_path / name, HH), tmp_path / "out", held_out=0.0, seed=1)
    assert counts == {"demonstrations": 1, "prompts": 1, "pairs": 1}
    _, demonstrations, pairs = read_back(tmp_path, counts)
    assert demonstrations == [(HH_TURNS, "Blue.")] and pairs == [(HH_TURNS, "Blue.", "Red.")]
    assert [turns_of(p) for p in read_prompts(tmp_path / "out" / "prompts.jsonl")] == [HH_TURNS]
    line = json.loads((tmp_path / "out" / "pairs.jsonl").read_text(encoding="utf-8"))
    assert line == {
        "prompt": [user("Name a color."), assistant("Which kind?"), user("A cold one.")],
        "chosen": "Blue.",
        "rejected": "Red.",
    }


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        (" Human: hello\nAssistant: hi", "Human: hello\nAssistant: hi"),
        (" As Human: or Assistant: I say\n Human: no", "As Human: or Assistant: I say\n Human: no"),
        (" one\n\nHumans: two\n\n Assistant: three", "one\n\nHumans: two\n\n Assistant: three"),
        ("no space, many at the end  \n\n\n", "no space, many at the end"),
        (" two\n\nparagraphs", "two\n\nparagraphs"),
    ],
)
def test_hh_names_inside_a_text(tmp_path, text, kept):
    """A speaker's name counts after an empty line and before a colon alone."""
    _, demonstrations, pairs = prepared(tmp_path, hh(text, " other"))
    assert demonstrations == [((("user", "Q"),), kept)] and pairs == [((("user", "Q"),), kept, "other")]


ANSWERED = "\n\nHuman: Q\n\nAssistant: A"
DROPPED = [
    (hh(ANSWERED, "\n\nHuman: Q2\n\nAssistant: B"), "different prompts in chosen and rejected"),
    (hh(ANSWERED, f"{ANSWERED}\n\nHuman: R\n\nAssistant: B"), "different prompts in chosen and rejected"),
    (hh("\n\nHuman: Q\n\nHuman: R\n\nAssistant: A", " B"), "turns that don't alternate"),
    (hh(f"{ANSWERED}\n\nAssistant: again", " B"), "turns that don't alternate"),
    (hh("\n\nAssistant: A", " B"), "turns that don't alternate"),
    (hh(f"{ANSWERED}\n\nHuman: R", " B"), "without an answer at the end"),
    (hh(" A", f"{ANSWERED}\n\nHuman: R"), "without an answer at the end"),
    (hh("\n\nHuman: \n\nAssistant: A", "\n\nHuman: \n\nAssistant: B"), "an empty turn in the prompt"),
    (hh("\n\nHuman: Q\n\nAssistant: \n\nHuman: R\n\nAssistant: A", " B"), "an empty turn in the prompt"),
    (hh("\n\nWell.\n\nHuman: Q\n\nAssistant: A", " B"), "not a transcript from its first word"),
]


@pytest.mark.parametrize(("record", "why"), DROPPED)
def test_hh_what_is_dropped(tmp_path, capsys, record, why):
    """Counted under its reason, and the good records around it stay."""
    counts, _, pairs = prepared(tmp_path, HH, record, hh(" yes", " no"))
    assert counts == {"demonstrations": 2, "prompts": 2, "pairs": 2, why: 1}
    assert pairs == [(HH_TURNS, "Blue.", "Red."), ((("user", "Q"),), "yes", "no")]
    assert f"dropped: 1 {why}\n" in capsys.readouterr().out


def test_hh_empty_and_equal_answers(tmp_path, capsys):
    """An empty chosen text would teach silence; that any answer is better than an empty one is true, and kept. Of a
    dropped pair the prompt stays, and a chosen text that is no better than the other is still an answer."""
    records = hh("", " B"), hh(" A", " "), hh(" same", " same\n"), hh(" ", "")
    counts, demonstrations, pairs = prepared(tmp_path, *records)
    q = (("user", "Q"),)
    assert pairs == [(q, "A", "")] and demonstrations == [(q, "A"), (q, "same")]
    empty, equal = "pairs with an empty chosen text", "pairs of equal texts"
    assert counts == {"demonstrations": 2, "prompts": 1, "pairs": 1, empty: 1, equal: 2}
    assert "kept: 1 pairs with an empty rejected text\n" in capsys.readouterr().out


def test_hh_where_nothing_is_left(tmp_path):
    message = refused(tmp_path, *(record for record, _ in DROPPED[:3]))
    assert message == ": nothing left; dropped 2 different prompts in chosen and rejected, 1 turns that don't alternate"


# ------------------------------------------------------------------------------------------------ TL;DR

TLDR = {
    "info": {
        "id": "t3_1",
        "post": "I had an accident.\n\nHelp! ",
        "title": " Car?",
        "subreddit": "legaladvice",
        "site": None,
        "article": None,
    },
    "summaries": [
        {"text": " hit by a car", "policy": "sup2", "note": None},
        {"text": " hit; need help", "policy": "ref", "note": "x"},
    ],
    "choice": 1,
    "worker": "w",
    "batch": "batch9",
    "split": "train",
    "extra": {"confidence": 8},
}
TLDR_PROMPT = "SUBREDDIT: r/legaladvice\n\nTITLE: Car?\n\nPOST: I had an accident.\n\nHelp!\n\nTL;DR:"


def test_tldr_comparisons(tmp_path):
    """The chosen one is summaries[choice]; a summary that won twice is one demonstration and two pairs."""
    third = {**TLDR, "summaries": [{"text": " hit; need help"}, {"text": "?"}], "choice": 0}
    counts, demonstrations, pairs = prepared(tmp_path, TLDR, {**TLDR, "choice": 0}, third)
    turns = (("user", TLDR_PROMPT),)
    first, second = "hit by a car", "hit; need help"
    assert demonstrations == [(turns, first), (turns, second)]
    assert pairs == sorted([(turns, second, first), (turns, first, second), (turns, second, "?")])
    assert counts == {"demonstrations": 2, "prompts": 1, "pairs": 3, "repeated demonstrations": 1}


def test_tldr_of_news_and_of_posts_with_their_own_summary(tmp_path):
    news = {**TLDR, "info": {"id": "1", "article": "Rain in Leeds.\n", "title": "Rain", "site": "cnn"}}
    post = {"id": "t3_2", "subreddit": "pets", "title": "Cat", "post": "It purrs.", "summary": "cat purrs "}
    assert prepared(tmp_path / "a", news)[2] == [
        ((("user", "Article:\n\nRain in Leeds.\n\nTL;DR:"),), "hit; need help", "hit by a car")
    ]
    _, demonstrations, pairs = prepared(tmp_path / "b", post)
    assert demonstrations == [
        ((("user", "SUBREDDIT: r/pets\n\nTITLE: Cat\n\nPOST: It purrs.\n\nTL;DR:"),), "cat purrs")
    ]
    assert pairs == []


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"choice": 2}, '"choice" must be 0 or 1 (found: 2)'),
        ({"choice": True}, '"choice" must be 0 or 1 (found: True)'),
        ({"choice": None}, '"choice" must be 0 or 1 (found: None)'),
        ({"summaries": [{"text": "one"}]}, '"summaries" must be a list of two objects'),
        ({"summaries": [{"text": "one"}, {"policy": "ref"}]}, 'summary 2: no "text"'),
        ({"info": {"post": "p", "title": "t"}}, 'no "subreddit"'),
        ({"info": []}, '"info" must be an object'),
    ],
)
def test_tldr_bad_fields_are_located(tmp_path, change, says):
    message = refused(tmp_path, TLDR, {**TLDR, **change})
    assert message.startswith(":2: ") and says in message


def test_tldr_prompt_and_label(tmp_path):
    _, demonstrations, pairs = prepared(tmp_path, {"prompt": f"{TLDR_PROMPT} ", "label": " car crash"})
    assert demonstrations == [((("user", TLDR_PROMPT),), "car crash")] and pairs == []


def test_unwanted_completions_are_no_demonstrations(tmp_path):
    """KTO's form of data: the label is true or false."""
    wanted = {"prompt": [user("Q")], "completion": "yes", "label": True}
    counts, demonstrations, _ = prepared(tmp_path, wanted, {**wanted, "completion": "no", "label": False})
    assert demonstrations == [((("user", "Q"),), "yes")] and counts["labelled as unwanted"] == 1


# ------------------------------------------------------------------------------------------------ pairs

ASKED = [user("Hi"), assistant("Hello."), user("Name a color.")]
ASKED_TRANSCRIPT = "Human: Hi\n\nAssistant: Hello.\n\nHuman: Name a color.\n\nAssistant:"
ASKED_TURNS = (("user", "Hi"), ("assistant", "Hello."), ("user", "Name a color."))


@pytest.mark.parametrize(
    "record",
    [
        # TRL, HF's ultrafeedback_binarized with whole conversations
        {"prompt": "Name a color.", "chosen": [*ASKED, assistant("Blue. ")], "rejected": [*ASKED, assistant("7")]},
        {"chosen": [*ASKED, assistant("Blue.")], "rejected": [*ASKED, assistant("7")], "score_chosen": 8.5},
        {"prompt": ASKED, "chosen": [assistant("Blue.")], "rejected": [assistant(" 7")]},
        {"prompt": ASKED, "chosen": "Blue.", "rejected": "7", "prompt_id": "x"},
        {"prompt": [user("Hi"), assistant("Hello."), user(" Name a color.\n")], "chosen": "\nBlue.", "rejected": "7"},
        # repackaged HH-RLHF
        {"prompt": f"\n\n{ASKED_TRANSCRIPT}", "chosen": " Blue.", "rejected": "7"},
        {"prompt": f"{ASKED_TRANSCRIPT} ", "chosen": "Blue.", "rejected": "7"},
        # the conversation as ShareGPT spells it
        {
            "chosen": [
                {"from": "human", "value": "Hi"},
                {"from": "gpt", "value": "Hello."},
                {"from": "human", "value": "Name a color."},
                {"from": "chatgpt", "value": "Blue."},
            ],
            "rejected": [*ASKED, assistant("7")],
        },
        {
            "prompt": "Name a color.",
            "prompt_id": "ab",
            "messages": [user("elsewhere"), assistant("?")],
            "chosen": [{"role": "system", "content": ""}, *ASKED, assistant("Blue.")],
            "rejected": [*ASKED, assistant("7")],
            "score_chosen": 8.5,
            "score_rejected": None,
        },
    ],
)
def test_pairs_of_several_turns(tmp_path, record):
    counts, demonstrations, pairs = prepared(tmp_path, record)
    assert demonstrations == [(ASKED_TURNS, "Blue.")] and pairs == [(ASKED_TURNS, "Blue.", "7")]
    assert counts == {"demonstrations": 1, "prompts": 1, "pairs": 1}
    assert [turns_of(p) for p in read_prompts(tmp_path / "out" / "prompts.jsonl")] == [ASKED_TURNS]


def test_pairs_of_one_turn_are_plain_strings(tmp_path):
    strings = {"prompt": " Name a color.\n", "chosen": "Blue.", "rejected": "7"}
    lists = {
        "chosen": [user("Name a number."), assistant("7")],
        "rejected": [user("Name a number."), assistant("Blue.")],
    }
    prepared(tmp_path, strings, lists)
    rows = [json.loads(line) for line in (tmp_path / "out" / "pairs.jsonl").read_text(encoding="utf-8").splitlines()]
    assert sorted(rows, key=str) == [
        {"prompt": "Name a color.", "chosen": "Blue.", "rejected": "7"},
        {"prompt": "Name a number.", "chosen": "7", "rejected": "Blue."},
    ]


@pytest.mark.parametrize(
    ("chosen", "rejected", "why"),
    [
        ([*ASKED, assistant("A")], [user("Hi"), assistant("Hallo."), ASKED[2], assistant("B")], "different"),
        ([*ASKED, assistant("A")], [user("Hi"), assistant("B")], "different prompts"),
        ([KIND, user("Q"), assistant("A")], [user("Q"), assistant("B")], "different"),
        ([user("Q"), user("R"), assistant("A")], [user("Q"), user("R"), assistant("B")], "don't alternate"),
        ([*ASKED, assistant("A")], ASKED, "without an answer"),
        ([user("Q"), {"role": "tool", "content": "x"}, assistant("A")], [user("Q"), assistant("B")], "that is not"),
        ([], [], "without an answer"),
    ],
)
def test_pairs_what_is_dropped(tmp_path, chosen, rejected, why):
    good = {"prompt": "Q", "chosen": "yes", "rejected": "no"}
    counts, _, pairs = prepared(tmp_path, good, {"prompt": "Q", "chosen": chosen, "rejected": rejected})
    assert pairs == [((("user", "Q"),), "yes", "no")]
    (reason,) = set(counts) - {"demonstrations", "prompts", "pairs"}
    assert why in reason and counts[reason] == 1


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ({"prompt": "Q", "chosen": "A"}, ':2: no "rejected" (found: prompt, chosen)'),
        ({"prompt": "Q", "chosen": "A", "rejected": None}, ':2: no "rejected" (found: prompt, chosen)'),
        ({"prompt": "Q", "rejected": "A"}, ':2: no "chosen" (found: prompt, rejected)'),
        ({"chosen": "A", "rejected": "B"}, ':2: no "prompt" (found: chosen, rejected)'),
        ({"prompt": "Q", "chosen": 1, "rejected": "B"}, ':2: "chosen" must be a string, not int'),
        ({"prompt": 5, "chosen": "A", "rejected": "B"}, ':2: "prompt" must be a string, not int'),
        ({"chosen": [user("Q"), {"role": "assistant"}], "rejected": []}, ':2: message 2 of "chosen": no "content"'),
        ({"chosen": [user("Q"), "A"], "rejected": []}, ':2: message 2 of "chosen" is not an object'),
        ({"chosen": [{"content": "Q"}], "rejected": []}, ':2: message 1 of "chosen": no "role"'),
        ({"prompt": "Q", "chosen": "A" + HALF, "rejected": "B"}, ':2: "chosen" holds half a character at 1'),
        ({"prompt": [user(HALF)], "chosen": "A", "rejected": "B"}, ':2: message 1 of "prompt": "content" holds half a'),
    ],
)
def test_pairs_bad_fields_are_located(tmp_path, record, says):
    assert refused(tmp_path, {"prompt": "Q", "chosen": "yes", "rejected": "no"}, record).startswith(says)


# ------------------------------------------------------------------------------------------------ conversations


@pytest.mark.parametrize("key", ["messages", "conversations"])
@pytest.mark.parametrize("style", ["roles", "sharegpt"])
def test_conversations(tmp_path, key, style):
    """The last answer is the completion, what came before it the prompt; an unanswered question at the end goes."""

    def spelled(*messages):
        if style == "roles":
            return list(messages)
        names = {"user": "human", "assistant": "gpt", "system": "system"}
        return [{"from": names[m["role"]], "value": m["content"]} for m in messages]

    counts, demonstrations, pairs = prepared(
        tmp_path,
        {key: spelled(*ASKED, assistant(" Blue.\n")), "prompt": "unused", "prompt_id": "1"},
        {key: spelled(user("Q"), assistant("A"))},
        {key: spelled(KIND, user("Q"), assistant("A"), user("more?"))},
        {key: spelled(assistant("Welcome!"), user("Q"), assistant("A"))},
        {key: spelled(user("Q"))},
        {key: spelled(user("Q"), assistant(" "))},
    )
    assert pairs == []
    assert demonstrations == [
        ((("system", "Be kind."), ("user", "Q")), "A"),
        (ASKED_TURNS, "Blue."),
        ((("user", "Q"),), "A"),
    ]
    dropped = {"turns that don't alternate": 1, "without an answer at the end": 1, "without an output": 1}
    assert counts == {"demonstrations": 3, "prompts": 3, **dropped}


# ------------------------------------------------------------------------------------------------ texts


def test_prefixes_of_texts(tmp_path):
    """IMDb: the first words are the prompt, the rest is the demonstration, as it stood there."""
    records = [
        {"text": "This film  was dull.<br /><br />Very\n dull.", "label": 0},
        {"text": " One two three", "label": 1},
        {"text": "One two three four ", "label": 1},
    ]
    counts, demonstrations, pairs = prepared(tmp_path, *records, prefix_words=3)
    assert demonstrations == [
        ((("user", "One two three"),), "four"),
        ((("user", "This film  was"),), "dull.\n\nVery\n dull."),
    ]
    assert counts == {"demonstrations": 2, "prompts": 2, "no more than 3 words": 1} and pairs == []


def test_prefix_words_is_for_texts_alone(tmp_path):
    assert refused(tmp_path, {"text": "a b"}).startswith(": plain texts need --prefix_words N")
    assert refused(tmp_path, HH, prefix_words=3) == ": --prefix_words is for plain texts (found: chosen, rejected)"


# ------------------------------------------------------------------------------------------------ formats

ONE_OF_EACH = {
    "alpaca": {"instruction": "i", "input": "", "output": "o", "chosen": "c", "rejected": "r"},
    "hh": HH,
    "tldr": TLDR,
    "pairs": {"prompt": "p", "chosen": "c", "rejected": "r"},
    "messages": {"messages": [user("p"), assistant("c")]},
    "demonstrations": {"prompt": "p", "completion": "c"},
    "text": {"text": "a b c"},
}


def test_every_record_is_read_by_its_own_fields(tmp_path):
    """A file of several forms gives what files of one form each would give."""
    records = [record for name, record in ONE_OF_EACH.items() if name != "text"]
    _, demonstrations, pairs = prepared(tmp_path / "all", *records)
    alone = [prepared(tmp_path / str(n), record)[1:] for n, record in enumerate(records)]
    assert demonstrations == sorted({d for found, _ in alone for d in found}) and len(demonstrations) == 4
    assert pairs == sorted(p for _, found in alone for p in found) and len(pairs) == 4


@pytest.mark.parametrize("name", ["hh", "pairs", "messages", "demonstrations"])
def test_a_record_without_the_fields_of_the_others_is_an_error(tmp_path, name):
    assert refused(tmp_path, ONE_OF_EACH[name], {"text": "a b c"}).startswith(':2: no "prompt" (found: text); known')
    message = refused(tmp_path, {"text": "a b c"}, ONE_OF_EACH[name], prefix_words=1)
    assert message.startswith(':2: no "text" (found: ')


def test_several_files_each_of_its_own_format(tmp_path):
    paths = [save(tmp_path / f"{name}.jsonl", ONE_OF_EACH[name]) for name in ("hh", "tldr", "messages")]
    counts = prepare(paths, tmp_path / "out", held_out=0.0, seed=1)
    assert counts == {"demonstrations": 3, "prompts": 3, "pairs": 2}


@pytest.mark.parametrize("record", [{}, {"q": "q", "a": "a"}, {"info": {}, "summary": {}, "axes": {}}])
def test_unknown_fields_name_the_known(tmp_path, record):
    found = ", ".join(record) or "nothing"
    assert refused(tmp_path, record).startswith(f':1: no "prompt" (found: {found}); known are instruction, prompt,')


def test_null_fields_are_absent(tmp_path):
    """A table writes every column, also where a record has nothing there."""
    nothing = {"chosen": None, "rejected": None}
    counts, demonstrations, pairs = prepared(
        tmp_path, {"instruction": "i", "input": None, "output": "o", **nothing}, {"instruction": "j", "output": "p"}
    )
    assert demonstrations == [((("user", "i"),), "o"), ((("user", "j"),), "p")] and pairs == []
    assert counts == {"demonstrations": 2, "prompts": 2}


def test_alpaca_says_which_field_is_missing(tmp_path):
    message = refused(tmp_path, ONE_OF_EACH["alpaca"], {"instruction": "i", "chosen": "c"})
    assert message == ':2: no "rejected" (found: instruction, chosen)'
    assert refused(tmp_path, {"output": "o"}).startswith(':1: no "prompt" (found: output); known are')


# ------------------------------------------------------------------------------------------------ files


def test_line_endings_byte_order_mark_blank_lines_and_any_script(tmp_path):
    text = "naïve 東京 עברית 👩‍👩‍👧 \u2028 \x00"
    record = {"prompt": f"p {text} ?", "chosen": f"c {text} .", "rejected": "r"}
    path = save(tmp_path / "raw.jsonl", record, ending="\r\n\r\n", start=b"\xef\xbb\xbf")
    _, _, pairs = read_back(tmp_path, prepare(path, tmp_path / "out", 0.0, 1))
    assert pairs == [((("user", record["prompt"]),), record["chosen"], "r")]
    as_list = tmp_path / "list.json"
    as_list.write_bytes(b"\xef\xbb\xbf\r\n " + json.dumps([record], indent=2).replace("\n", "\r\n").encode())
    assert read_back(tmp_path, prepare(as_list, tmp_path / "out", 0.0, 1))[2] == pairs


CSV_FORMS = [
    ('prompt,chosen,rejected,id\n"Say ""hi"",\nplease",hi,no,1\n', ('Say "hi",\nplease', "hi", "no")),
    ('chosen,prompt,rejected\r\nyes,"Q\r\n?",no\r\n', ("Q\n?", "yes", "no")),
    ("instruction,input,output,chosen,rejected\nAdd,1 2,3,3,4\n", ("Add\n1 2", "3", "4")),
]


@pytest.mark.parametrize(("text", "pair"), CSV_FORMS)
@pytest.mark.parametrize("name", ["d.csv", "d.CSV.gz"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_csv(tmp_path, text, pair, name, mark):
    raw = (mark + text).encode()
    (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith("gz") else raw)
    _, _, pairs = read_back(tmp_path, prepare(tmp_path / name, tmp_path / "out", 0.0, 1))
    assert pairs == [((("user", pair[0]),), *pair[1:])]


def test_csv_of_texts_and_of_prompts_with_completions(tmp_path):
    (tmp_path / "imdb.csv").write_text('text,label\n"a, b c",1\n' + "d " * 100_000 + ",0\n", encoding="utf-8")
    counts = prepare(tmp_path / "imdb.csv", tmp_path / "out", 0.0, 1, prefix_words=2)
    _, demonstrations, _ = read_back(tmp_path, counts)
    assert demonstrations[0] == ((("user", "a, b"),), "c")
    assert demonstrations[1] == ((("user", "d d"),), " ".join(["d"] * 99_998))
    (tmp_path / "d.csv").write_text("prompt,completion\nQ,A\n", encoding="utf-8")
    assert read_back(tmp_path, prepare(tmp_path / "d.csv", tmp_path / "out", 0.0, 1))[1] == [((("user", "Q"),), "A")]


@pytest.mark.parametrize(
    ("name", "raw", "says"),
    [
        ("d.csv", b"prompt,completion\nQ,A\nQ,A,more\n", ":3: more cells than the header has columns"),
        ("d.csv", b"prompt,completion\nQ,A\nQ\n", ':3: no "completion" (found: prompt)'),
        (
            "d.csv",
            b'prompt,completion\nQ,"A\n',
            ":2: the row that begins here is not valid CSV (unexpected end of data)",
        ),
        ("d.csv", b"prompt,completion\nQ,caf\xe9\n", ":2: not valid UTF-8"),
        ("d.csv", b"prompt,completion\n", ": no records"),
        ("d.jsonl", b'{"prompt": "p", "completion": "c"}\n{"prompt"\n', ":2: not valid JSON"),
        ("d.jsonl", b'{"prompt": "p", "completion": "c"}\n{"prompt": "\xe9"}\n', ":2: not valid UTF-8"),
        ("d.jsonl", b"\xef\xbb\xbf", ": no records"),
        (
            "d.jsonl",
            b'{"prompt": "p", "completion": "c", "n": ' + b"9" * 5000 + b"}",
            ":1: a number with thousands of digits",
        ),
        ("d.json", b'[{"prompt": "p"},\n{"n": ' + b"9" * 5000 + b"}]", ":2: a number with thousands of digits"),
        ("d.jsonl", b'{"prompt": "p"}\n{"n": ' + b"[" * 200_000, ":2: nested too deeply to be read"),
        ("d.json", b"[" * 200_000, ":1: nested too deeply to be read"),
        ("d.json", b'[{"prompt": "p", "completion": "c"},\n{"prompt"}]', ":2: not valid JSON"),
        ("d.json", b'[{"prompt": "p", "completion": "c"}, 3]', ": record 2 is not an object"),
        ("d.json", b'[{"prompt": "p"}]', ': record 1: no "completion" (found: prompt)'),
        ("d.json", b"[]", ": no records"),
        ("d.jsonl.gz", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", ": only a pointer"),
        ("d.jsonl.gz", gzip.compress(bytes(range(256)) * 2, mtime=0)[:-9], ": cut short or damaged"),
        ("d.jsonl.gz", gzip.compress(b"{}", mtime=0)[:-8] + b"\x00" * 8, ": cut short or damaged"),
        ("d.jsonl.gz", gzip.compress(b"{}", mtime=0)[:10] + b"\xff" * 20, ": cut short or damaged"),
        ("d.jsonl.gz", gzip.compress(b'{"prompt": "p"}\n{', 9, mtime=0), ":2: not valid JSON"),
    ],
    ids=itertools.count(),  # a gzip header holds the time: every process of the test run would name the cases otherwise
)
def test_broken_files_are_one_line(tmp_path, name, raw, says):
    """The file and its line; nothing is written."""
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(UserError) as error:
        prepare(tmp_path / name, tmp_path / "out", 0.0, 1)
    assert str(error.value).startswith(str(tmp_path / name) + says) and "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_cut_gzip_after_a_good_file_writes_nothing(tmp_path):
    """However far the good part goes: what stood in the file before stays."""
    good, cut = save(tmp_path / "good.jsonl.gz", HH), tmp_path / "cut.jsonl.gz"
    cut.write_bytes(save(tmp_path / "whole.jsonl.gz", *[{**HH, "n": i} for i in range(5000)]).read_bytes()[:-4000])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "pairs.jsonl").write_text("before\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"^\S*cut\.jsonl\.gz: cut short or damaged, get it again \(EOFError"):
        prepare([good, cut], tmp_path / "out", 0.0, 1)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["pairs.jsonl"]
    assert (tmp_path / "out" / "pairs.jsonl").read_text(encoding="utf-8") == "before\n"


def test_parquet(tmp_path):
    """Lists of structs, as UltraFeedback is stored; a null is an absent field, and a row is named by its number."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [
        {
            "prompt": "unused",
            "chosen": [*ASKED, assistant("Blue.")],
            "rejected": [*ASKED, assistant("7")],
            "score": 8.5,
        },
        {
            "prompt": "unused",
            "chosen": [user("Q"), assistant("A")],
            "rejected": [user("Q"), assistant("B")],
            "score": None,
        },
    ]
    path = tmp_path / "train_prefs-00000-of-00001.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    _, demonstrations, pairs = read_back(tmp_path, prepare(path, tmp_path / "out", 0.0, 1))
    assert pairs == [(ASKED_TURNS, "Blue.", "7"), ((("user", "Q"),), "A", "B")]
    assert demonstrations == [(ASKED_TURNS, "Blue."), ((("user", "Q"),), "A")]
    parquet.write_table(pyarrow.Table.from_pylist([{"prompt": "p", "completion": "c"}, {"prompt": "p"}]), path)
    with pytest.raises(UserError, match=r'parquet: row 2: no "completion" \(found: prompt\)'):
        prepare(path, tmp_path / "out2", 0.0, 1)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"parquet: cut short or damaged, get it again \(Arrow"):
        prepare(path, tmp_path / "out2", 0.0, 1)
    assert not (tmp_path / "out2").exists()


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "d.parquet").write_bytes(b"PAR1....PAR1")
    with pytest.raises(UserError, match=r"d\.parquet: reading Parquet needs pyarrow; `pip install pyarrow`$"):
        prepare(tmp_path / "d.parquet", tmp_path / "out", 0.0, 1)


# ------------------------------------------------------------------------------------------------ the six files


def stages(n: int) -> list[dict]:
    """n conversations that open differently, each at three stages of its length."""
    records = []
    for i in range(n):
        turns = [user(f"question {i}")]
        for stage in range(3):
            records.append({"prompt": list(turns), "chosen": f"good {i} {stage}", "rejected": f"bad {i} {stage}"})
            turns += [assistant(f"good {i} {stage}"), user(f"more {stage}")]
    random.Random(0).shuffle(records)
    return records


def test_held_out_twins(tmp_path):
    """A tenth of the openings, with all that opens so; together the two sides are the whole; the seed chooses."""
    path = save(tmp_path / "d.jsonl", *stages(40))
    opened = {}
    for name, seed in (("one", 1), ("again", 1), ("two", 2)):
        out = tmp_path / name
        counts = prepare(path, out, held_out=0.1, seed=seed)
        sizes = {
            f"{kind}{side}": n
            for kind in ("demonstrations", "prompts", "pairs")
            for side, n in (("", 108), ("_held_out", 12))
        }
        assert counts == sizes
        sides = [{turns_of(p) for p in read_prompts(out / f"prompts{side}.jsonl")} for side in ("", "_held_out")]
        assert len(sides[0]) == 108 and len(sides[1]) == 12
        openings = [{turns[0][1] for turns in side} for side in sides]
        assert len(openings[1]) == 4 and not openings[0] & openings[1] and len(openings[0] | openings[1]) == 40
        for side, prompts in zip(("", "_held_out"), sides, strict=True):
            assert {turns_of(p) for p, _ in read_demonstrations(out / f"demonstrations{side}.jsonl")} == prompts
            assert {turns_of(r.prompt) for r in read_rankings(out / f"pairs{side}.jsonl")} == prompts
        opened[name] = openings[1]
    assert opened["one"] == opened["again"] != opened["two"]


def test_held_out_whoever_speaks_first(tmp_path):
    """The same system's turn in every conversation doesn't put them all on one side."""
    records = [{"messages": [KIND, user(f"question {i}"), assistant("A")]} for i in range(40)]
    counts = prepare(save(tmp_path / "d.jsonl", *records), tmp_path / "out", held_out=0.1, seed=1)
    assert counts["prompts"] == 36 and counts["prompts_held_out"] == 4


def test_limit_draws_from_the_whole_file(tmp_path):
    """A published file may be sorted, so not the first ones: as many examples as asked for, from all over the file."""
    path = save(tmp_path / "d.jsonl", *({"prompt": f"p{i}", "completion": f"c{i}"} for i in range(1000)))
    found = {}
    for seed in (1, 2):
        counts = prepare(path, tmp_path / "out", held_out=0.2, seed=seed, limit=50)
        assert counts == {"demonstrations": 40, "prompts": 40, "demonstrations_held_out": 10, "prompts_held_out": 10}
        rows = [
            row
            for side in ("", "_held_out")
            for row in read_demonstrations(tmp_path / "out" / f"demonstrations{side}.jsonl")
        ]
        found[seed] = {int(p[1:]) for p, c in rows if c == f"c{p[1:]}"}
        assert len(found[seed]) == 50 and min(found[seed]) < 200 and max(found[seed]) > 800
    assert found[1] != found[2]
    assert prepare(path, tmp_path / "out", held_out=0.0, seed=1, limit=5000)["demonstrations"] == 1000


@pytest.mark.parametrize(
    ("option", "value"), [("held_out", 1.0), ("held_out", -0.1), ("limit", -1), ("prefix_words", -1)]
)
def test_bad_flags(option, value):
    with pytest.raises(UserError, match=f"--{option} must be"):
        check_ranges(module.Config(**{option: value}))


def test_a_file_of_an_earlier_run_is_pointed_out(tmp_path, capsys):
    prepare(save(tmp_path / "hh.jsonl", HH), tmp_path / "out", 0.0, 1)
    assert "careful" not in capsys.readouterr().out
    prepare(save(tmp_path / "m.jsonl", ONE_OF_EACH["messages"]), tmp_path / "out", 0.0, 1)
    assert f"careful: {tmp_path / 'out' / 'pairs.jsonl'} is from an earlier run" in capsys.readouterr().out


def test_what_is_printed(tmp_path, capsys):
    """How many rows each file got; 1 ... 100 words have median 50.5, 95% within 95, the longest 100; three records."""
    records = [{"prompt": "p " * n, "chosen": "c " * (2 * n), "rejected": "r"} for n in range(1, 101)]
    prepare(save(tmp_path / "d.jsonl", *records, {**records[0], "prompt": ""}), tmp_path / "out", 0.25, 1)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == (
        f"wrote to {tmp_path / 'out'}: 75 demonstrations, 75 prompts, 75 pairs, "
        "25 demonstrations_held_out, 25 prompts_held_out, 25 pairs_held_out"
    )
    assert lines[1] == "dropped: 1 an empty turn in the prompt"
    table = [line.split() for line in lines[2:7]]
    assert table[0] == ["words", "median", "95%", "longest"]
    assert [row[0] for row in table[1:]] == ["prompt", "completion", "chosen", "rejected"]
    assert table[1][1] in ("50", "51") and table[1][2:] == ["95", "100"]
    assert table[3][1:] == ["101", "190", "200"] and table[4][1:] == ["1", "1", "1"]
    written = (tmp_path / "out" / "pairs.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 10
    for shown, whole in zip(lines[7:], written, strict=False):
        shown, whole = json.loads(shown), json.loads(whole)
        assert set(shown) == set(whole)
        for key, text in shown.items():
            begin, *end = text.split(" ... ")
            assert len(text) <= 90 and whole[key].startswith(begin) and whole[key].endswith(end[0] if end else begin)


def test_length_of_several_turns_counts_their_words_alone(tmp_path, capsys):
    prepared(tmp_path, HH)
    assert re.search(r"^prompt +8 +8 +8$", capsys.readouterr().out, re.MULTILINE)  # 3 + 2 + 3


# ------------------------------------------------------------------------------------------------ the command line


def command(*argv: str, cwd) -> subprocess.CompletedProcess:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"}  # a console without most letters
    return subprocess.run([sys.executable, "-m", "tools.prepare", *argv], cwd=cwd, env=env, capture_output=True)


def test_command_line(tmp_path):
    save(tmp_path / "one.jsonl.gz", HH)
    save(tmp_path / "two.jsonl", {"prompt": "東京?", "chosen": "東京", "rejected": "no"})
    flags = "--out_dir made --held_out 0 --seed 3 --limit 9 --prefix_words 0".split()
    run = command("one.jsonl.gz", "two.jsonl", *flags, cwd=tmp_path)
    assert run.returncode == 0 and not run.stderr and "東京" in run.stdout.decode()
    assert len(read_rankings(tmp_path / "made" / "pairs.jsonl")) == 2
    (tmp_path / "cut.jsonl.gz").write_bytes((tmp_path / "one.jsonl.gz").read_bytes()[:-12])
    run = command("two.jsonl", "cut.jsonl.gz", "--out_dir", "none", cwd=tmp_path)
    assert run.returncode == 2 and not run.stdout and not (tmp_path / "none").exists()
    (line,) = run.stderr.decode().splitlines()
    assert line.startswith("prepare.py: error: cut.jsonl.gz: cut short or damaged")


def test_help_names_the_fields_and_every_flag(tmp_path):
    out = command("--help", cwd=tmp_path).stdout.decode()
    for field in ("prompt", "completion", "chosen", "rejected", "messages", "conversations", "summaries", "text"):
        assert f'"{field}"' in out
    assert "\\n\\nHuman" in out
    for name in ("out_dir", "held_out", "seed", "limit", "prefix_words"):
        assert f"--{name} " in out
