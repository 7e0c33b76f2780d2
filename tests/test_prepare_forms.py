"""tools/prepare.py on what people have: public formats, a sample of each written out by hand here, with what a reader
of the format would say that it means; and files that are no data, or data of another kind."""

from __future__ import annotations

import gzip
import io
import json
import re
import zipfile

import pytest
from test_prepare import KIND, assistant, prepared, read_back, refused, save, user

from data.files import read_demonstrations, read_json
from lib.cli import UserError
from tools.prepare import prepare

Q, A, B = "Name a color.", "Blue.", "Seven."
ONE = (("user", Q),)
SYSTEM = (("system", "Be kind."), ("user", Q))
HI = (("user", "Hi"), ("assistant", "Hello."))
TALK = [user("Hi"), assistant("Hello.")]
MORE = (*HI, ("user", Q))


def human(text: str) -> dict:
    return {"from": "human", "value": text}


def gpt(text: str) -> dict:
    return {"from": "gpt", "value": text}


def parts(message: dict) -> dict:
    return {**message, "content": [{"type": "text", "text": message["content"]}]}


# ------------------------------------------------------------------------------------------------ one answer

ONE_ANSWER = {
    "Dolly": (
        {"instruction": "When did it open?", "context": "The hall opened in 1931.", "response": "In 1931."},
        (("user", "When did it open?\nThe hall opened in 1931."),),
        "In 1931.",
    ),
    "Alpaca with a system and a history": (
        {"instruction": "Name", "input": "a color.", "output": A, "system": "Be kind.", "history": [["Hi", "Hello."]]},
        (("system", "Be kind."), *HI, ("user", "Name\na color.")),
        A,
    ),
    "a history of messages": ({"prompt": Q, "completion": A, "history": TALK}, MORE, A),
    "an empty history": ({"prompt": Q, "completion": A, "history": [], "system": "", "context": ""}, ONE, A),
    "a context of paragraphs": ({"question": Q, "answer": A, "context": ["B", "C"]}, (("user", f"{Q}\nB\nC"),), A),
    "OpenOrca": ({"id": "1", "system_prompt": "Be kind.", "question": Q, "response": A}, SYSTEM, A),
    "GSM8K": ({"question": Q, "answer": A}, ONE, A),
    "MATH": ({"problem": Q, "solution": A, "level": "Level 5"}, ONE, A),
    "MetaMath": ({"query": Q, "response": A}, ONE, A),
    "FLAN": ({"inputs": Q, "targets": A}, ONE, A),
    "input and output": ({"input": Q, "output": A}, ONE, A),
    "a table with capitals": ({"Context": Q, "Response": A}, ONE, A),
    "HelpSteer": ({"prompt": Q, "response": A, "helpfulness": 4}, ONE, A),
    "TRL, conversational": ({"prompt": [KIND, user(Q)], "completion": [assistant(A)]}, SYSTEM, A),
    "TRL, a text after messages": ({"prompt": [*TALK, user(Q)], "completion": A}, MORE, A),
    "transcript without a last Assistant": ({"prompt": f"Human: {Q}", "completion": f"Assistant: {A}"}, ONE, A),
    "a system beside ShareGPT": ({"system": "Be kind.", "conversations": [human(Q), gpt(A)]}, SYSTEM, A),
    "the system twice": ({"system": "Be kind.", "messages": [KIND, user(Q), assistant(A)]}, SYSTEM, A),
    "a system as parts": ({"system": [{"type": "text", "text": "Be kind."}], "prompt": Q, "completion": A}, SYSTEM, A),
    "OpenAI with parts": ({"messages": [parts(KIND), parts(user(Q)), parts(assistant(A))]}, SYSTEM, A),
    "two parts": ({"messages": [{"role": "user", "content": ["Name", {"text": "a color."}]}, assistant(A)]}, None, A),
    "developer": ({"messages": [{"role": "developer", "content": "Be kind."}, user(Q), assistant(A)]}, SYSTEM, A),
    "roles in capitals": ({"messages": [{"role": "Human", "content": Q}, {"role": " AI", "content": A}]}, ONE, A),
    "prompter": ({"messages": [{"role": "prompter", "text": Q}, {"role": "assistant", "text": A}]}, ONE, A),
    "a row of a table": (
        {"messages": [{**user(Q), "from": None, "value": None}, {**assistant(A), "tool_calls": None}], "label": None},
        ONE,
        A,
    ),
    "LIMA": ({"conversations": ["Hi", "Hello.", Q, A], "source": "x"}, MORE, A),
}


@pytest.mark.parametrize("name", ONE_ANSWER)
def test_one_answer(tmp_path, name):
    record, turns, answer = ONE_ANSWER[name]
    turns = turns or (("user", "Name\na color."),)
    counts, demonstrations, pairs = prepared(tmp_path, record)
    assert demonstrations == [(turns, answer)] and pairs == [] and counts == {"demonstrations": 1, "prompts": 1}


# ------------------------------------------------------------------------------------------------ two answers

TWO_ANSWERS = {
    "Orca-DPO": ({"system": "Be kind.", "question": Q, "chosen": A, "rejected": B}, SYSTEM),
    "distilabel": ({"system": "Be kind.", "input": Q, "chosen": A, "rejected": B, "generations": [A, B]}, SYSTEM),
    "Alpaca of pairs": ({"instruction": Q, "input": "", "chosen": A, "rejected": B}, ONE),
    "a context": ({"question": "Name", "context": "a color.", "chosen": A, "rejected": B}, None),
    "conversations beside messages": ({"conversations": [human(Q)], "chosen": gpt(A), "rejected": gpt(B)}, ONE),
    "conversations beside texts": (
        {"conversations": [human("Hi"), gpt("Hello."), human(Q)], "chosen": A, "rejected": B},
        MORE,
    ),
    "a conversation and the name of its user": (
        {"user": "u1", "context": "web", "messages": [user(Q)], "chosen": A, "rejected": B},
        ONE,
    ),
    "messages beside texts": ({"messages": [KIND, user(Q)], "chosen": A, "rejected": B}, SYSTEM),
    "a system beside conversations": (
        {"system": "Be kind.", "chosen": [user(Q), assistant(A)], "rejected": [user(Q), assistant(B)]},
        SYSTEM,
    ),
    "a system beside transcripts": (
        {"system": "Be kind.", **{k: f"\n\nHuman: {Q}\n\nAssistant: {v}" for k, v in (("chosen", A), ("rejected", B))}},
        SYSTEM,
    ),
    "a prompt beside transcripts": (
        {"prompt": Q, **{k: f"\n\nHuman: {Q}\n\nAssistant: {v}" for k, v in (("chosen", A), ("rejected", B))}},
        ONE,
    ),
    "stack-exchange-paired": ({"qid": 1, "question": Q, "response_j": A, "response_k": B}, ONE),
    "PKU-SafeRLHF": (
        {"prompt": Q, "response_0": B, "response_1": A, "better_response_id": 1, "safer_response_id": 0},
        ONE,
    ),
    "PKU-SafeRLHF, the first": ({"prompt": Q, "response_0": A, "response_1": B, "better_response_id": 0}, ONE),
    "by name": ({"prompt": Q, "response_0": B, "response_1": A, "better_response_id": "response_1"}, ONE),
    "a letter": ({"prompt": Q, "response_a": B, "response_b": A, "preference": "B"}, ONE),
    "counted from 1": ({"prompt": Q, "response_1": A, "response_2": B, "winner": 1.0}, ONE),
    "arena": (
        {
            "conversation_a": [*TALK, user(Q), assistant(B)],
            "conversation_b": [*TALK, user(Q), assistant(A)],
            "winner": "model_b",
        },
        MORE,
    ),
    "SHP, A": ({"history": Q, "human_ref_A": A, "human_ref_B": B, "labels": 1, "score_A": 3, "score_B": 9}, ONE),
    "SHP, B": ({"history": Q, "human_ref_A": B, "human_ref_B": A, "labels": 0}, ONE),
}


@pytest.mark.parametrize("name", TWO_ANSWERS)
def test_two_answers(tmp_path, name):
    record, turns = TWO_ANSWERS[name]
    turns = turns or (("user", "Name\na color."),)
    counts, demonstrations, pairs = prepared(tmp_path, record)
    assert demonstrations == [(turns, A)] and pairs == [(turns, A, B)]
    assert counts == {"demonstrations": 1, "prompts": 1, "pairs": 1}


@pytest.mark.parametrize(
    "judgement",
    [{"winner": "tie"}, {"winner": "Tie (bothbad)"}, {"preference": "neither"}],
)
def test_ties_are_dropped(tmp_path, judgement):
    good = {"prompt": "P", "response_a": "yes", "response_b": "no", "winner": "a"}
    counts, _, pairs = prepared(tmp_path, good, {"prompt": Q, "response_a": A, "response_b": B, **judgement})
    assert pairs == [((("user", "P"),), "yes", "no")] and counts["a tie of the two answers"] == 1


@pytest.mark.parametrize(
    ("judgement", "says"),
    [
        ({}, ":1: no field says which of response_a, response_b is better; known names: better_response_id,"),
        ({"winner": "c"}, ":1: \"winner\" is 'c', which names none of response_a, response_b"),
        ({"winner": 1}, ':1: "winner" is 1, which names none of response_a, response_b'),
        ({"winner": "llama"}, ":1: \"winner\" is 'llama', which names none of response_a, response_b"),
        ({"response_0": "?", "winner": "a"}, ":1: 3 answers (response_0, response_a, response_b); name two of them"),
    ],
)
def test_a_comparison_that_says_not_which_is_better(tmp_path, judgement, says):
    assert refused(tmp_path, {"prompt": Q, "response_a": A, "response_b": B, **judgement}).startswith(says)


# ------------------------------------------------------------------------------------------------ wanted or not

GOOD = [
    True,
    1,
    1.0,
    "1",
    "true",
    "True ",
    "YES",
    "good",
    "Desirable",
    "thumbs_up",
    "Thumbs up",
    "thumbs-up",
    "chosen",
    "👍",
]
BAD = [False, 0, -1, 0.0, "0", "false", "NO", "bad", "undesirable", "thumbs_down", "Thumbs Down", "rejected", "👎"]
HOLDERS = {
    "prompt and completion": lambda text: {"prompt": Q, "completion": text},
    "conversational": lambda text: {"prompt": [user(Q)], "completion": [assistant(text)]},
    "alpaca": lambda text: {"instruction": Q, "input": "", "output": text},
    "question and answer": lambda text: {"question": Q, "answer": text},
    "messages": lambda text: {"messages": [user(Q), assistant(text)]},
    "ShareGPT": lambda text: {"conversations": [human(Q), gpt(text)]},
}


@pytest.mark.parametrize("holder", HOLDERS)
@pytest.mark.parametrize("key", ["label", "kto_tag"])
def test_unwanted_answers_are_no_demonstrations_in_any_format(tmp_path, holder, key):
    """Data for KTO: however the label is spelt."""
    records = [{**HOLDERS[holder](f"good {i}"), key: label} for i, label in enumerate(GOOD)]
    records += [{**HOLDERS[holder](f"bad {i}"), key: label} for i, label in enumerate(BAD)]
    counts, demonstrations, pairs = prepared(tmp_path, *records)
    assert demonstrations == sorted((ONE, f"good {i}") for i in range(len(GOOD))) and pairs == []
    assert counts["labelled as unwanted"] == len(BAD)


@pytest.mark.parametrize("label", ["maybe", "", 2, 0.5, [True], {"x": 1}])
@pytest.mark.parametrize("holder", HOLDERS)
def test_an_unknown_label_is_an_error_of_its_line(tmp_path, holder, label):
    good = {**HOLDERS[holder](A), "label": True}
    message = refused(tmp_path, good, {**good, "label": label})
    assert message.startswith(f':2: "label" is {label!r}, neither wanted (true, 1,')


@pytest.mark.parametrize("holder", HOLDERS)
def test_a_label_that_is_missing_where_others_have_one(tmp_path, holder):
    good = {**HOLDERS[holder](A), "label": True}
    assert refused(tmp_path, good, {**good, "label": None}) == ':2: no "label", which other records have'


@pytest.mark.parametrize("key", ["thumbs_up", "is_safe", "desirable", "good", "is_correct"])
def test_other_names_of_a_label(tmp_path, key):
    counts, demonstrations, _ = prepared(
        tmp_path, {"prompt": Q, "response": A, key: True}, {"prompt": Q, "response": B, key: False}
    )
    assert demonstrations == [(ONE, A)] and counts["labelled as unwanted"] == 1


@pytest.mark.parametrize("judged", [{"label": "bad"}, {"weight": 0}])
def test_a_judgement_within_a_message(tmp_path, judged):
    """Of the last message alone: the other answers are part of the prompt."""
    bad = {**assistant(B), **judged}
    counts, demonstrations, _ = prepared(
        tmp_path, {"messages": [user(Q), bad]}, {"messages": [user(Q), bad, user("Again."), assistant(A)]}
    )
    assert demonstrations == [((("user", Q), ("assistant", B), ("user", "Again.")), A)]
    assert counts["labelled as unwanted"] == 1


# ------------------------------------------------------------------------------------------------ what is not read

TEXTS = ": plain texts need --prefix_words N, how many make the prompt; if these are no plain texts, write them"
TEXTS += ' otherwise: questions are {"prompt": "..."}, conversations {"messages": [{"role", "content"}, ...]}'


def test_fields_that_are_not_read_are_named_once_a_file(tmp_path, capsys):
    thought = {**assistant(A), "reasoning_content": "Hm."}
    one = save(
        tmp_path / "one.jsonl", *[{"messages": [user(f"{i}"), thought], "id": i, "tools": "[]"} for i in range(3)]
    )
    two = save(
        tmp_path / "two.jsonl", {"prompt": Q, "chosen": A, "rejected": B, "score_chosen": 1.5, "score_rejected": None}
    )
    three = save(tmp_path / "three.jsonl", {"prompt": "all", "completion": "is read"})
    prepare([one, two, three], tmp_path / "out", 0.0, 1)
    said = [line for line in capsys.readouterr().out.splitlines() if "not read" in line]
    assert said == [f"{one}: not read: id, tools, messages: reasoning_content", f"{two}: not read: score_chosen"]


@pytest.mark.parametrize(
    "record",
    [
        {"instruction": Q, "better": A, "worse": B},
        {"instruction": Q, "source": "x", "completions": [{"response": A}], "models": ["m"]},
        {"instruction": Q, "instances": [{"input": "", "output": A}]},
        {"instruction": "Be kind.", "conversations": [human(Q), gpt(A)]},
        {"instruction": Q, "id": "seed_1", "category": "open qa", "score": 3},
        {"prompt": Q},
        {"prompt": Q, "good": A},
        {"prompt": Q, "answers": [{"answer": A, "rank": 1}]},
    ],
    ids=str,
)
def test_a_prompt_without_an_answer_is_no_record(tmp_path, record):
    """Its answers may stand in fields of other names; a file of prompts alone needs no preparation."""
    message = refused(tmp_path, {"prompt": "P", "completion": "yes"}, record)
    assert message.startswith(f':2: no "completion" (found: {", ".join(record)}); known names: completion, output,')
    assert 'name two "chosen" and "rejected"' in message and "needs no preparation" in message


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ({"prompt": Q, "accepted": A, "rejected": B}, ':1: no "chosen" (found: prompt, accepted, rejected)'),
        ({"chosen": A, "rejected": B}, ':1: no "prompt" (found: chosen, rejected); known are instruction, prompt,'),
        ({"text": "How do I sleep?", "category": "x"}, TEXTS),
        ({"question_id": 1, "text": "Name a color."}, TEXTS),
        ({"text": "### Human: Hi### Assistant: Hello."}, TEXTS),
        ({"text": "A long text.", "summary": "A text."}, TEXTS),
        (
            {"message_tree_id": "1", "prompt": {"text": Q, "role": "prompter", "replies": []}},
            ":1: a message tree; write",
        ),
        ({"title": "Chat", "mapping": {"1": {"message": None}}}, ":1: a message tree; write"),
        ({"message_id": "1", "message_tree_id": "1", "text": Q, "role": "prompter"}, ":1: a message tree; write"),
        ({"version": 1, "data": [{"prompt": Q}]}, ':1: no "prompt" (found: version, data)'),
        ({"prompt": {"0": Q, "1": Q}, "completion": {"0": A}}, ':1: message 1 of "prompt": no "role" (found: 0, 1)'),
        ({"prompt": [Q, Q], "completion": [A, B]}, ':1: message 1 of "prompt" is not an object'),
        ({"history": "long", "prompt": Q, "completion": A}, ':1: "history" must be a list of messages'),
        ({"prompt": "[{'role': 'user', 'content': 'Q'}]", "completion": A}, ':1: "prompt" spells messages as a text;'),
        ({"prompt": json.dumps([user(Q)]), "completion": A}, ':1: "prompt" spells messages as a text;'),
        (
            {"messages": [user(Q), {"role": "narrator", "content": "x"}]},
            ':1: message 2 of "messages": unknown role "narrator"',
        ),
        (
            {"conversations": [human(Q), {"from": "llama", "value": A}]},
            ':1: message 2 of "conversations": unknown role "llama"',
        ),
        (
            {"prompt": Q, "completion": "a" + " " * 1_000_000 + "b"},
            ':1: "completion" holds 1,000,000 white-space characters',
        ),
    ],
)
def test_what_is_refused_says_what_to_do(tmp_path, record, says):
    assert refused(tmp_path, record).startswith(says)


@pytest.mark.parametrize(
    ("turns", "why"),
    [
        ([user(Q), {"role": "tool", "content": "x"}, assistant(A)], "a turn that is not the user's"),
        ([human(Q), {"from": "observation", "value": "x"}, gpt(A)], "a turn that is not the user's"),
        ([user(Q), {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}], "a call of a tool"),
        (
            [{"role": "user", "content": [{"type": "image_url"}, {"type": "text", "text": Q}]}, assistant(A)],
            "a part of a",
        ),
    ],
)
def test_conversations_that_are_more_than_text_are_counted(tmp_path, turns, why):
    counts, demonstrations, _ = prepared(tmp_path, {"messages": [user(Q), assistant(A)]}, {"messages": turns})
    assert demonstrations == [(ONE, A)]
    (reason,) = set(counts) - {"demonstrations", "prompts"}
    assert reason.startswith(why) and counts[reason] == 1


# ------------------------------------------------------------------------------------------------ inside the texts


@pytest.mark.parametrize(
    "end",
    ["</s>", "<|endoftext|>", "<|im_end|>\n", " <|eot_id|>", "</s></s>", "<eos>", "[EOS]", "<|END_OF_TURN_TOKEN|>"],
)
def test_a_spelt_out_eos_is_taken_off_and_counted(tmp_path, capsys, end):
    """Of every text: the model learns to end by the vocabulary's own token."""
    record = {"prompt": [user("Hi" + end), assistant("Hello." + end), user(Q)], "chosen": A + end, "rejected": B + end}
    _, demonstrations, pairs = prepared(tmp_path, record)
    assert demonstrations == [(MORE, A)] and pairs == [(MORE, A, B)]
    n = 10 if end == "</s></s>" else 5
    assert f"removed: {n} {end.strip()[: 4 if n == 10 else None]} at the end of a text\n" in capsys.readouterr().out


def test_a_text_that_was_nothing_but_an_eos_is_empty(tmp_path):
    counts, demonstrations, _ = prepared(tmp_path, {"prompt": Q, "completion": "</s>"}, {"prompt": Q, "completion": A})
    assert demonstrations == [(ONE, A)] and counts["without an output"] == 1


@pytest.mark.parametrize("text", ["<b>bold</b>", "a </s> b", "Send <|friend|>", "1 < 2 > end", "the end>"])
def test_what_is_no_eos_stays(tmp_path, text):
    assert prepared(tmp_path, {"prompt": Q, "completion": text})[1] == [(ONE, text)]


def test_marks_that_stay_in_the_texts_are_noted(tmp_path, capsys):
    records = [{"prompt": f"<image>\nWhat is {i}?", "completion": "<|im_start|>assistant\nA cat."} for i in range(3)]
    prepared(tmp_path, *records, {"prompt": "a < b > c", "completion": "<p>no</p>"})
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("careful")]
    assert sorted(line.split(";")[0] for line in said) == [
        "careful: <image> in 3 examples",
        "careful: <|im_start|> in 3 examples",
    ]


@pytest.mark.parametrize(
    ("text", "length"),
    [("蓝色是一种颜色。", 8), ("青は色です。", 6), ("สีฟ้า", 5), ("用 two words 的", 4), ("파란 색", 2)],
)
def test_lengths_of_scripts_without_spaces_are_in_characters(tmp_path, capsys, text, length):
    prepared(tmp_path, {"prompt": text, "completion": "Four words are here."})
    out = capsys.readouterr().out
    assert re.search(rf"^prompt +{length} +{length} +{length}$", out, re.MULTILINE)
    assert re.search(r"^completion +4 +4 +4$", out, re.MULTILINE)
    assert ("the characters are counted" in out) == (text != "파란 색")


def test_with_a_limit_the_drops_of_the_whole_file_are_told_apart(tmp_path, capsys):
    """Of 100 records 40 have no answer at their end; of the 60 others, all alike, 10 are drawn."""
    records = [{"messages": [user(Q), assistant(A)] if i >= 40 else [user(Q)]} for i in range(100)]
    counts, _, _ = prepared(tmp_path, *records, limit=10)
    assert counts == {"demonstrations": 1, "prompts": 1, "repeated demonstrations": 9}
    out = capsys.readouterr().out
    assert "dropped before the draw: 40 without an answer at the end\ndrawn: 10 of 60 examples\n" in out
    assert "dropped: 9 repeated demonstrations\n" in out and "dropped: 40" not in out


# ------------------------------------------------------------------------------------------------ files

LINE = json.dumps({"prompt": "Q", "completion": "A, B"}) + "\n"
OBJECT = json.dumps({"prompt": "Q", "completion": "A, B"}, indent=2) + "\n"


def archive() -> bytes:
    with zipfile.ZipFile(raw := io.BytesIO(), "w") as file:
        file.writestr("d.jsonl", LINE)
    return raw.getvalue()


@pytest.mark.parametrize(
    ("name", "raw"),
    [
        ("d.tsv", b"prompt\tcompletion\nQ\tA, B\n"),
        ("d.csv", b"prompt;completion\r\nQ;A, B\r\n"),
        ("d.csv", b'Prompt, Completion\nQ,"A, B"\n'),
        ("d.TSV.gz", gzip.compress(b"prompt\tcompletion\nQ\tA, B\n", mtime=0)),
        ("d.jsonl.gz", gzip.compress(gzip.compress(LINE.encode(), mtime=0), mtime=0)),
        ("d.jsonl", LINE.replace("}", ', "label": NaN}').encode()),
    ],
    ids=str,
)
def test_files_that_are_read(tmp_path, name, raw):
    (tmp_path / name).write_bytes(raw)
    counts = prepare(tmp_path / name, tmp_path / "out", 0.0, 1)
    assert read_back(tmp_path, counts)[1] == [((("user", "Q"),), "A, B")]


FOREIGN = [
    ("d.jsonl", OBJECT.encode(), "JSON, but its first object takes several lines; `jq -c . "),
    ("d.json", (OBJECT + OBJECT).encode(), "JSON, but its first object takes several lines; `jq -c . "),
    (
        "d.json",
        json.dumps({"data": [{"q": 1}]}, indent=1).encode(),
        "JSON, but its first object takes several lines; `jq -c . ",
    ),
    ("d.txt", b"Name a color.\nName a number.\n", "no JSON, it begins 'Name a color."),
    ("d.jsonl", b"<!DOCTYPE html>\n", "no JSON, it begins '<!DOCTYPE html>'"),
    ("d.jsonl", LINE.encode("utf-16"), "text in UTF-16 or UTF-32; save it as UTF-8"),
    ("d.csv", "prompt,completion\nQ,A\n".encode("utf-16-le"), "text in UTF-16 or UTF-32; save it as UTF-8"),
    ("d.zip", archive(), "a zip archive"),
    ("d.jsonl", archive(), "a zip archive"),
    ("d.arrow", b"ARROW1\0\0", "an Arrow file; in Python"),
    ("d.arrow", b"\xff\xff\xff\xff\x10\0\0\0", "an Arrow file; in Python"),
    ("d.jsonl.bz2", b"BZh91AY&SY", "compressed with bzip2"),
    ("d.jsonl.zst", b"\x28\xb5\x2f\xfd\x04", "compressed with zstd"),
    ("d.png", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "no text (it holds zero bytes)"),
]


@pytest.mark.parametrize(
    ("name", "raw", "says"), FOREIGN, ids=[f"{n}-{name}" for n, (name, _, _) in enumerate(FOREIGN)]
)
def test_other_kinds_of_files_are_named(tmp_path, name, raw, says):
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(UserError) as error:
        prepare(tmp_path / name, tmp_path / "out", 0.0, 1)
    assert str(error.value).startswith(f"{tmp_path / name}: {says}") and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (
            gzip.compress(LINE.encode(), mtime=0),
            "compressed with gzip; unpack it, or let `python -m tools.prepare` read",
        ),
        (b"PAR1....PAR1", "a Parquet file; `python -m tools.prepare` reads it"),
        (LINE.encode("utf-16"), "text in UTF-16 or UTF-32"),
    ],
    ids=["gzip", "parquet", "utf-16"],
)
def test_a_stage_names_them_too(tmp_path, raw, says):
    (tmp_path / "d.jsonl").write_bytes(raw)
    with pytest.raises(UserError, match="^" + re.escape(f"{tmp_path / 'd.jsonl'}: {says}")):
        read_demonstrations(tmp_path / "d.jsonl")


def test_a_json_file_that_is_nested_too_deeply(tmp_path):
    (tmp_path / "results.json").write_bytes(b'{"a": ' + b"[" * 200_000)
    with pytest.raises(UserError, match=r"results\.json: not valid JSON"):
        read_json(tmp_path / "results.json")
