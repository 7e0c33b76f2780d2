"""People who rank: no answer is lost or asked for twice, whatever happens; agreement; the page and who may use it."""

from __future__ import annotations

import base64
import hashlib
import http.client
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import threading
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path

import pytest
from helpers import ROOT

from lib.cli import UserError
from tools import annotate
from tools.annotate import Item, Sample, Session, agreement, comes_again, parse_order
from data.files import Prompt, read_jsonl, read_rankings, write_jsonl

ENV = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", "PYTHONIOENCODING": "utf-8"}


def items_of(n: int, k: int = 3, first: int = 0) -> list[tuple[str, list[Sample]]]:
    """n prompts with k different completions each; the last is cut."""
    return [(f"p{i}", [Sample(f"{i}{'abcdefgh'[j]}", j < k - 1) for j in range(k)]) for i in range(first, first + n)]


def session_of(path, n: int = 5, k: int = 3, **settings) -> Session:
    """With n items, all there."""
    session = Session(path, [p for p, _ in items_of(n)], **settings)
    session.add(items_of(n, k))
    session.complete = True
    return session


def asked(session: Session, answer=None) -> list[Item]:
    """Everything that is asked, in order, answered by `answer` or first = best."""
    found = []
    while (item := session.current()) is not None:
        found.append(item)
        session.answer(answer(item) if answer else list(range(len(item.shown))))
    return found


def content(path: Path) -> tuple[bytes, bytes]:
    """Of both of a person's files."""
    return tuple(p.read_bytes() if p.exists() else b"" for p in (path, annotate.aside_of(path)))


# ------------------------------------------------------------------------------------------------ what is typed


@pytest.mark.parametrize(
    ("answer", "ranks"),
    [
        ("1 2 3", [0, 1, 2]),
        ("3 1 2", [1, 2, 0]),
        ("2 1=3", [1, 0, 1]),
        ("2 1 = 3", [1, 0, 1]),
        ("1=2=3", [0, 0, 0]),
        ("  3   2=1 ", [1, 1, 0]),
        ("312", [1, 2, 0]),
        ("21=3", [1, 0, 1]),
        ("", None),
        ("1 2", None),  # one is missing
        ("1 2 2", None),  # named twice
        ("1 2 4", None),
        ("1 2 3 3", None),
        ("1,2,3", None),
        ("a b c", None),
        ("1 = 2 =", None),
        ("= 1 2 3", None),
        ("1 == 2 3", None),
    ],
)
def test_parse_order(answer, ranks):
    """What annotators type -> the rank of each completion, or None to ask again."""
    assert parse_order(answer, 3) == ranks


def test_numbers_of_two_digits_need_their_spaces():
    assert parse_order("10 1 2 3 4=5 6 7 8 9", 10) == [1, 2, 3, 4, 4, 5, 6, 7, 8, 0]
    assert parse_order("10123456789", 10) is None


def in_terminal(path, items, person, *typed, **settings) -> Session:
    session = Session(path, [p for p, _ in items], **settings)
    person(*typed)
    annotate.in_terminal(session, iter([items]))
    return session


def test_people_are_asked_until_the_answer_makes_sense(person, tmp_path, capsys):
    samples = [Sample(text, True) for text in ("first", "second", "third")]
    in_terminal(tmp_path / "r.jsonl", [("Prompt?", samples)], person, "1 2", "best", "?", "2=3 1", "")
    shown = capsys.readouterr().out
    assert shown.count("Prompt?") == 1 and "item 1 of 1" in shown and "  2: second" in shown
    assert shown.count("name each of 1..3 once") == 2 and "undo" in shown
    assert [row for _, row in read_jsonl(tmp_path / "r.jsonl")] == [
        {
            "prompt": "Prompt?",
            "completions": [["second", "third"], "first"],
            "ended": [True, True, True],
            "shown": [2, 3, 1],
            "answer": 1,
        }
    ]


def test_enter_alone_ends_nothing_but_the_last_question(person, tmp_path, capsys):
    """A key pressed once too often ended the work amid the items."""
    session = session_of(tmp_path / "r.jsonl", 2)
    person("", "1 2 3", "", "", "1 2 3", "", "1 2 3")
    annotate.in_terminal(session, iter([]))
    assert session.written == 2
    said = capsys.readouterr().out
    assert said.count("name each of 1..3 once") == 3 and annotate.HELP not in said


def test_people_see_which_answers_were_cut(person, tmp_path, capsys):
    """A text that stops in mid-sentence because of --max_new_tokens is not one that its writer left unfinished."""
    texts = [Sample("It is", False), Sample("It is", True), Sample("", False)]
    in_terminal(tmp_path / "r.jsonl", [("p", texts)], person, "3 1 2")
    assert re.findall(r"^  (\d): (.*)$", capsys.readouterr().out, re.M) == [
        ("1", "It is   [cut]"),
        ("2", "It is"),
        ("3", "   [cut]"),
    ]
    (row,) = [row for _, row in read_jsonl(tmp_path / "r.jsonl")]
    assert (row["completions"], row["ended"]) == (["", "It is", "It is"], [False, False, True])


def test_a_model_s_text_can_not_drive_the_terminal(person, tmp_path, capsys):
    """Escape sequences move the cursor, colour the screen, even type; a carriage return overwrites a line."""
    texts = [Sample("\x1b[2Jgone\r1: best", True), Sample("two\n  lines\x9b31m", True)]
    in_terminal(tmp_path / "r.jsonl", [("p\x07", texts)], person, "1 2")
    shown = capsys.readouterr().out
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", shown)
    assert "  1: \\x1b[2Jgone\\x0d1: best\n" in shown and "two\n       lines\\x9b31m" in shown and "p\\x07" in shown
    assert read_rankings(tmp_path / "r.jsonl")[0].completions == [s.text for s in texts]  # the file keeps the text


def test_equal_answers_are_shown_once_and_tie(person, tmp_path, capsys):
    """A text can't be better than itself. Where all are the same there is nothing to ask."""
    a, b, cut = Sample("a", True), Sample("b", True), Sample("a", False)
    path = tmp_path / "r.jsonl"
    items = [("same", [a, a, a]), ("p", [a, b, a, cut])]
    in_terminal(path, items, person, "2 1 3")
    assert "item 1 of 1" in capsys.readouterr().out
    (row,) = [row for _, row in read_jsonl(path)]
    assert row["prompt"] == "p" and row["completions"] == ["b", ["a", "a"], "a"]
    assert row["ended"] == [True, True, True, False] and row["shown"] == [2, 1, 1, 3]
    session = Session(path, ["same", "p"])
    assert session.undo() and session.current() == Item("p", [a, a, b, cut])  # as it was shown


def test_skip_undo_and_quit(person, tmp_path, capsys):
    """Undo goes back any number of answers, over a skipped one too, also after a restart, also after the last item."""
    path, items = tmp_path / "r.jsonl", items_of(3)
    in_terminal(path, items, person, "u", "1 2 3", "S", "2 1 3", "u", "u", "u", "u", "3 2 1", "q")
    shown = capsys.readouterr().out
    assert shown.count("there is nothing to undo") == 2 and shown.count("taken back") == 3
    assert re.findall(r"^item (\d) of 3\n(.*)$", shown, re.M) == [
        *[("1", "p0"), ("1", "p0"), ("2", "p1"), ("3", "p2")],
        *[("3", "p2"), ("2", "p1"), ("1", "p0"), ("1", "p0"), ("2", "p1")],
    ]
    session = in_terminal(path, items, person, "s", "s", "u", "1 2 3", "u", "u", "u", "1 3 2", "1 2 3", "1=2=3", "")
    assert [a.item.prompt for a in session.answers] == ["p0", "p1", "p2"]
    assert "that was" not in capsys.readouterr().out  # the question itself is input's
    assert [(r.prompt, r.completions) for r in read_rankings(path)] == [
        ("p0", ["0a", "0c", "0b"]),
        ("p1", ["1a", "1b", "1c"]),
        ("p2", ["2a", "2b", "2c"]),
    ]
    assert session.written == 2  # and one was there
    session = in_terminal(path, items, person, "u", "3 2 1")  # everything is answered: still to be taken back
    assert read_rankings(path)[2].ranks == [0, 1, 2] and session.written == 0


def test_skipped_items_are_not_asked_again_nor_learned_from(tmp_path):
    path = tmp_path / "r.jsonl"
    asked(session_of(path), lambda item: None if item.prompt in ("p1", "p4") else [0, 1, 2])
    assert [r.prompt for r in read_rankings(path)] == ["p0", "p2", "p3"]
    assert asked(session_of(path)) == []
    with pytest.raises(UserError, match='no "prompt"'):  # should somebody train on it
        read_rankings(annotate.aside_of(path))


def test_a_conversation_stays_one(person, tmp_path, capsys):
    prompt = Prompt.of([("user", "Hi"), ("assistant", "Hello!"), ("user", "2 + 2?")])
    items = [(prompt, [Sample("4", True), Sample("5", True)])]
    in_terminal(tmp_path / "r.jsonl", items, person, "1 2")
    assert "User: Hi\nAssistant: Hello!\nUser: 2 + 2?" in capsys.readouterr().out
    (row,) = [row for _, row in read_jsonl(tmp_path / "r.jsonl")]
    assert row["prompt"][1] == {"role": "assistant", "content": "Hello!"}
    session = Session(tmp_path / "r.jsonl", [prompt])
    assert prompt in session.done and session.undo() and session.current().prompt.turns == prompt.turns


# ------------------------------------------------------------------------------------------------ nothing is lost

# A person whose answers follow from what is on the screen and from a notebook that outlives the program: mistaken about
# p7, which she notices at the next item. The program ends, with nothing flushed and nobody told, after argv[2] lines of
# tools/annotate.py.
KILLED = """
import builtins, json, os, random, sys, zlib
from pathlib import Path
from tools import annotate
from tools.annotate import Sample, Session
folder, lines_left = Path(sys.argv[1]), int(sys.argv[2])
log = open(folder / "notebook", "a", buffering=1)
notes = [json.loads(line) for line in open(folder / "notebook")]
on_screen = None
def note(*what):
    notes.append([os.getpid(), *what])
    log.write(json.dumps(notes[-1]) + "\\n")
def show(session, item):
    global on_screen
    on_screen = item
def typed(question):
    if question.startswith("that was the last"):
        return ""
    prompt, shown = on_screen.prompt, [s.text for s in on_screen.shown]
    said = [n[3] for n in notes if n[1] == "p7"]
    if "wrong" in said and "right" not in said and prompt != "p7":
        note(prompt, shown, "undo")
        return "u"
    note(prompt, shown, "answer" if prompt != "p7" else "right" if "wrong" in said else "wrong")
    order = list("123")
    random.Random(zlib.crc32("".join(shown).encode())).shuffle(order)
    answer = order[0] + " " + order[1] + "=" + order[2] if prompt == "p11" else " ".join(order)
    return "s" if prompt == "p3" else "1 2 3" if notes[-1][3] == "wrong" else answer
def watch(frame, event, arg):
    global lines_left
    if not frame.f_code.co_filename.endswith("annotate.py"):
        return None
    if event == "line":
        lines_left -= 1
        if lines_left == 0:
            os._exit(9)
    return watch
builtins.input, annotate.show, builtins.print = typed, show, lambda *a, **k: None
items = [(f"p{i}", [Sample(f"{i}{c}", c != "c") for c in "abc"]) for i in range(24)]
sys.settrace(watch)
session = Session(folder / "r.jsonl", [p for p, _ in items], "anna", 0.2)
chunks = [items[i : i + 5] for i in range(0, 24, 5)]
annotate.in_terminal(session, (chunk for chunk in chunks if not session.done.issuperset(dict(chunk))))
sys.settrace(None)
sys.stderr.write(str(-lines_left))
"""


def until_killed(folder: Path, lines: int) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", KILLED, str(folder), str(lines)]
    return subprocess.run(command, env=ENV, capture_output=True, text=True)


def test_killed_at_any_moment_no_answer_is_lost_and_none_is_asked_twice(tmp_path):
    """20 random moments or more, reading and undoing among them: both files end as those of somebody who was never
    interrupted; and who was asked something else afterwards, in the same run, had answered for good."""
    (tmp_path / "whole").mkdir()
    run = until_killed(tmp_path / "whole", 0)
    assert run.returncode == 0, run.stderr
    whole = content(tmp_path / "whole" / "r.jsonl")
    assert whole[0].count(b"\n") == 23 and whole[1].count(b"\n") == 1 + 4  # p3 skipped; every fifth of 20 came again
    rng, lines, kills = random.Random(1), int(run.stderr), []
    while sum(kills) < 20:
        folder = tmp_path / f"killed{len(kills)}"
        folder.mkdir()
        kills.append(0)
        while (run := until_killed(folder, rng.randint(1, lines // 3))).returncode:
            assert run.returncode == 9, run.stderr
            kills[-1] += 1
        assert content(folder / "r.jsonl") == whole
        notes = [json.loads(line) for line in (folder / "notebook").read_text(encoding="utf-8").splitlines()]
        for n, (pid, prompt, shown, what) in enumerate(notes):
            confirmed = n + 1 < len(notes) and notes[n + 1][0] == pid
            if confirmed and what in ("answer", "right"):
                assert [prompt, shown] not in [[p, s] for _, p, s, w in notes[n + 1 :] if w != "undo"], (
                    f"{prompt} twice"
                )
    assert max(kills) > 4


def test_an_answer_is_on_the_disk_before_the_next_item_is_shown(tmp_path, monkeypatch):
    """Not only written: what is in the system's memory is lost with the power."""
    path, events, fsync = tmp_path / "r.jsonl", [], os.fsync

    def record(fd):
        events.append(("sync", os.fstat(fd).st_size, path.exists() and path.stat().st_size))
        fsync(fd)

    monkeypatch.setattr(annotate.os, "fsync", record)
    monkeypatch.setattr(
        annotate, "show", lambda session, item: events.append(("show", path.exists() and path.stat().st_size))
    )
    typed = iter(["1 2 3", "3 2 1", "u", "s", "q"])
    monkeypatch.setattr("builtins.input", lambda _: next(typed))
    annotate.in_terminal(Session(path, []), iter([items_of(3)]))
    kinds = [e[0] for e in events]
    shows = [i for i, kind in enumerate(kinds) if kind == "show"]
    assert len(shows) == 5 and all("sync" in kinds[a:b] for a, b in itertools.pairwise(shows))
    synced = [e[1] for e in events if e[0] == "sync"]
    for i in shows[1:3]:
        assert events[i][1] in synced  # the whole file, as long as it is when the next item is shown


def test_a_line_torn_anywhere_is_asked_again(tmp_path):
    """A crash can cut a line between any two bytes, also within a letter; what stands before it stays."""
    path = tmp_path / "r.jsonl"
    items = [("é", [Sample("ü", True), Sample("ö", True)]), ("p", [Sample("x", True), Sample("ß", False)])]

    def opened():
        session = Session(path, ["é", "p"])
        session.add(items)
        return session

    session = opened()
    session.answer([1, 0])
    session.answer([0, 1])
    whole = path.read_bytes()
    start = whole.index(b"\n") + 1
    for cut in range(start, len(whole) - 1):
        path.write_bytes(whole[:cut])
        session = opened()
        assert session.current().prompt == "p" and path.read_bytes() == whole[:start], cut
        session.answer([0, 1])
        assert path.read_bytes() == whole
    path.write_bytes(whole[:-1])  # whole but for its end
    assert opened().current() is None and path.read_bytes() == whole
    session = opened()
    session.undo()
    session.answer(None)
    aside = annotate.aside_of(path)
    skipped = aside.read_bytes()
    for cut in range(len(skipped) - 1):
        aside.write_bytes(skipped[:cut])
        assert opened().current().prompt == "p" and aside.read_bytes() == b""


@pytest.mark.parametrize("fails", ["fsync", "replace"])
def test_a_write_that_fails_changes_nothing(tmp_path, monkeypatch, fails):
    """The disk is full: one line that names the file, the same item is asked again, and nothing half-written stays."""
    path = tmp_path / "r.jsonl"
    session = session_of(path, repeat=0.5)
    answers = [[0, 1, 2], None, [2, 1, 0], [0, 0, 1]]
    real = getattr(os, fails)

    def broken(*args):
        monkeypatch.setattr(annotate.os, fails, real)
        raise OSError(28, "No space left on device")

    for ranks in answers:
        before, item = content(path), session.current()
        if fails == "fsync":
            monkeypatch.setattr(annotate.os, fails, broken)
            with pytest.raises(UserError, match=re.escape(f"{path}") + ".*No space left"):
                session.answer(ranks)
        assert content(path) == before and session.current() == item
        session.answer(ranks)
    states = []
    while session.answers:
        states.append(content(path))
        item = session.current()
        monkeypatch.setattr(annotate.os, fails, broken)
        with pytest.raises(UserError, match=r"can't be written.*No space left"):
            session.undo()
        assert content(path) == states[-1] and session.current() == item
        session = session_of(path, repeat=0.5)
        assert session.undo()
    assert content(path) == (b"", b"") and len(states) == 4
    assert [
        i.prompt for i in asked(session, lambda item: answers[int(item.prompt[1])] if item.prompt < "p4" else None)
    ][:4] == [
        "p0",
        "p1",
        "p2",
        "p3",
    ]


def test_undo_leaves_all_other_lines_alone(tmp_path):
    """Byte for byte, rows of other tools among them: those are done, and nobody's to take back."""
    path = tmp_path / "r.jsonl"
    foreign = b'{"prompt":"p1",  "chosen":"x","rejected":"y","answered by":"a tool"}\n\n'
    path.write_bytes(foreign)
    session = session_of(path)
    assert session.undo() is False
    assert [i.prompt for i in asked(session)] == ["p0", "p2", "p3", "p4"]
    whole = path.read_bytes()
    session = session_of(path)
    assert session.undo() and session.undo()
    assert path.read_bytes() == b"".join(whole.splitlines(keepends=True)[:-2]) and whole.startswith(foreign)
    assert session.progress() == (3, 4)
    asked(session)
    assert path.read_bytes() == whole


def test_what_is_read_back_is_what_was_said(tmp_path):
    """Ranks of another sample after a restart: her agreement with herself would be chance. Every order and tie, skips
    and repeats, are read as they were given."""
    path = tmp_path / "r.jsonl"
    orders = itertools.cycle([[2, 0, 1], [0, 0, 1], [1, 2, 0], None, [1, 0, 0], [2, 1, 0], [0, 1, 2]])
    session = session_of(path, 30, repeat=0.5)
    asked(session, lambda item: next(orders))
    assert {a.kind for a in session.answers} == {"ranking", "repeat", "skip", "repeat_skip"}
    again = session_of(path, 30, repeat=0.5)
    assert again.answers == session.answers and again.report() == session.report()


def test_an_answer_s_number_is_above_all_others(tmp_path):
    """Where somebody has taken a line out by hand, two answers of one number: undo would remove both."""
    path = tmp_path / "r.jsonl"
    session = session_of(path)
    for _ in range(3):
        session.answer(list(range(len(session.current().shown))))
    _, *others = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(others))
    session = session_of(path)
    session.answer(list(range(len(session.current().shown))))
    assert len(path.read_bytes().splitlines()) == 3 and session.undo()
    assert path.read_bytes().splitlines(keepends=True) == others


def test_undo_reaches_items_whose_chunk_is_not_sampled_again(tmp_path):
    """After a restart the samples of finished chunks are not made anew: the item comes from the file, as it was."""
    path = tmp_path / "r.jsonl"
    session = Session(path, [])
    session.add(items_of(4))
    first = asked(session, lambda item: None if item.prompt == "p3" else [2, 0, 1])
    session = Session(path, [f"p{i}" for i in range(6)])
    session.add(items_of(2, first=4))
    assert session.current().prompt == "p4" and session.progress() == (5, 6)
    for item in first[::-1]:
        assert session.undo() and session.current() == item
    assert [i.prompt for i in asked(session)] == [f"p{i}" for i in range(6)]


def test_two_programs_on_one_file_are_noticed(tmp_path):
    """Else both ask the same, and an undo of one could take the other's answer."""
    one, two = session_of(tmp_path / "r.jsonl"), session_of(tmp_path / "r.jsonl")
    one.answer([0, 1, 2])
    before = content(tmp_path / "r.jsonl")
    for act in (lambda: two.answer([0, 1, 2]), lambda: (two.answers.append(one.answers[0]), two.undo())):
        with pytest.raises(UserError, match="another program"):
            act()
    assert content(tmp_path / "r.jsonl") == before


def test_a_file_is_one_person_s(tmp_path):
    path = tmp_path / "r.jsonl"
    asked(session_of(path, 2, annotator="anna"))
    assert {row["annotator"] for _, row in read_jsonl(path)} == {"anna"}
    for other in ("ben", ""):
        with pytest.raises(UserError, match=r"r.jsonl:1: ranked with --annotator_name anna"):
            session_of(path, annotator=other)
    assert len(asked(session_of(path, 3, annotator="anna"))) == 1


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"shown": [1]}, '"shown"'),
        ({"shown": [1, "2"]}, '"shown"'),
        ({"shown": None}, '"shown"'),
        ({"answer": "x"}, '"answer"'),
    ],
)
def test_damaged_rows_are_reported(tmp_path, row, says):
    good = {"prompt": "p", "completions": ["a", "b"], "shown": [1, 2], "answer": 1}
    path = tmp_path / "r.jsonl"
    write_jsonl(path, [{**good, **row}])
    with pytest.raises(UserError, match=f"r.jsonl:1: {says}"):
        Session(path, [])
    write_jsonl(path, [good])
    write_jsonl(annotate.aside_of(path), [{"skip": {**good, **row}}])
    with pytest.raises(UserError, match=f"r.jsonl.aside:1: {says}"):
        Session(path, [])
    write_jsonl(annotate.aside_of(path), [good])
    with pytest.raises(UserError, match=r"r.jsonl.aside:1: no answer put aside"):
        Session(path, [])


# ------------------------------------------------------------------------------------------------ second times


@pytest.mark.parametrize("share", [0.0, 0.03, 0.1, 0.25, 1 / 3, 0.5, 0.9, 1.0])
def test_the_share_that_comes_again(share):
    """Of any first n rankings n * share, to the nearest whole number."""
    picked = [comes_again(k, share) for k in range(1, 201)]
    assert all(abs(sum(picked[:n]) - n * share) <= 0.5 + 1e-9 for n in range(201))


def test_items_come_again_later_and_in_another_order(tmp_path):
    """Nothing tells them from the others; what is answered the second time stands aside."""
    path = tmp_path / "r.jsonl"
    session = session_of(path, 30, k=4, repeat=0.2)
    numbers, order = [], []
    while (item := session.current()) is not None:
        numbers.append(session.progress())
        page = annotate.page_state(session)
        assert "again" not in json.dumps(page) and [s["text"] for s in page["answers"]] == [s.text for s in item.shown]
        order.append(item)
        session.answer([0, 1, 2, 3])
    assert numbers == [(n, 35) for n in range(1, 36)]
    again = [item for item in order if item.again]
    assert [item.prompt for item in again] == ["p2", "p7", "p12", "p17", "p22"]  # p27 came too late
    for item in again:
        first = next(i for i in order if i.prompt == item.prompt)
        between = order.index(item) - order.index(first) - 1
        assert between >= 10 or (item.prompt == "p22" and between >= 3)
        assert first.shown != item.shown and sorted(first.shown) == sorted(item.shown)
    prompts = [r.prompt for r in read_rankings(path)]
    assert sorted(prompts) == sorted(set(prompts)) and len(prompts) == 30
    aside = [row for _, row in read_jsonl(annotate.aside_of(path))]
    assert [row["repeat"]["prompt"] for row in aside] == [item.prompt for item in again]
    assert session_of(path, 30, k=4, repeat=0.2).current() is None
    two = session_of(tmp_path / "2.jsonl", 4, k=2, repeat=0.5)
    assert [(i.prompt, [s.text for s in i.shown]) for i in asked(two)][4:] == [("p0", ["0b", "0a"])]


def test_progress_is_right_with_skips_undo_and_restarts(tmp_path):
    """The first number counts on, the second is where it ends, if nothing more is skipped."""
    rng, path = random.Random(3), tmp_path / "r.jsonl"
    session, skipped = session_of(path, 25, repeat=0.3), 0
    for _ in range(120):
        if session.current() is None:
            break
        assert session.progress()[0] == len(session.answers) + 1
        act = rng.random()
        if act < 0.2 and session.answers:
            session.undo()
        elif act < 0.3:
            session.answer(None)
        elif act < 0.4:
            session = session_of(path, 25, repeat=0.3)
        else:
            session.answer([1, 0, 2])
    number, total = session.progress()
    assert number == total + 1 == len(session.answers) + 1 and any(a.kind == "skip" for a in session.answers)
    assert {a.item.prompt for a in session.answers} == {f"p{i}" for i in range(25)} and skipped == 0


def test_a_second_time_that_is_skipped_is_over(tmp_path):
    """It was asked for ever: whoever can't say a second time what is better could say nothing more."""
    session, again = session_of(tmp_path / "r.jsonl", 30, repeat=0.5), []
    for _ in range(60):
        item = session.current()
        if item is None:
            break
        again += [item.prompt] * item.again
        session.answer(None if item.again else [0, 1, 2])
    assert session.current() is None and len(session.of_kind("ranking")) == 30
    assert len(again) == len(set(again)) == len(session.of_kind("repeat_skip")) > 10
    assert session_of(tmp_path / "r.jsonl", 30, repeat=0.5).current() is None  # nor after a restart


# ------------------------------------------------------------------------------------------------ agreement

A, B, C, D = (Sample(text, True) for text in "abcd")


def test_agreement_by_hand():
    """Item 1: all three pairs alike. Item 2: a and b turned round, and c, tied with b at first, then below both: of the
    three pairs only a over c is alike. So 4 of 6; the two shares 1 and 1/3 have the standard error 1/3. Item 3
    compares nothing."""
    first = ({A: 0, B: 1, C: 2}, {A: 0, B: 1, C: 2})
    second = ({A: 0, B: 1, C: 1}, {A: 1, B: 0, C: 2})
    found = agreement([[first], [second], [({D: 0}, {D: 0})]])
    assert (found.pairs, found.items) == (6, 2) and found.share == pytest.approx(4 / 6)
    assert found.error == pytest.approx(1 / 3)
    assert math.isnan(agreement([[first]]).error) and agreement([]).items == 0
    tie, above, below = {A: 0, B: 0}, {A: 0, B: 1}, {A: 1, B: 0}
    tied = agreement([[(tie, tie)], [(tie, above)], [(tie, below)], [(above, tie)]])
    assert tied.share == 1 / 4


def test_the_standard_error_is_that_of_many_repetitions():
    """People who are sure on some items and guess on others, 2 to 4 completions each: pairs of an item hang together.
    The error that is stated is the spread of the share over 300 such studies; of independent pairs it was 2/3 of it."""
    rng, shares, errors = random.Random(5), [], []
    for _ in range(300):
        items = []
        for _ in range(40):
            samples = [A, B, C, D][: rng.choice((2, 3, 4))]
            one, other = list(range(len(samples))), list(range(len(samples)))
            if rng.random() < 0.5:
                rng.shuffle(other)
            items.append([(dict(zip(samples, one, strict=True)), dict(zip(samples, other, strict=True)))])
        found = agreement(items)
        shares.append(found.share)
        errors.append(found.error)
    assert statistics.mean(errors) == pytest.approx(statistics.stdev(shares), rel=0.1)


def test_self_agreement(tmp_path):
    """Over the items that were ranked twice; the orders on the screen differ, so the texts are compared."""
    by_text = session_of(tmp_path / "same.jsonl", 20, repeat=0.2)
    asked(by_text, lambda item: [s.text[-1] > "a" for s in item.shown])  # a is best, b and c tie
    found = annotate.self_agreement(by_text.answers)
    assert (found.share, found.error, found.items, found.pairs) == (1, 0, 3, 9)
    by_text.undo()
    assert annotate.self_agreement(by_text.answers).items == 2
    contrary = session_of(tmp_path / "contrary.jsonl", 20, repeat=0.2)
    sign = {False: 1, True: -1}
    asked(
        contrary,
        lambda item: [
            sorted(sign[item.again] * ord(t.text[-1]) for t in item.shown).index(sign[item.again] * ord(s.text[-1]))
            for s in item.shown
        ],
    )
    found = annotate.self_agreement(contrary.answers)
    assert found.share == 0
    assert (
        "0.0% +- 0.0% of 9 pairs" in contrary.report() and "20 ranked, 0 skipped, 3 ranked twice" in contrary.report()
    )
    assert "nothing to compare" in session_of(tmp_path / "new.jsonl").report()


def people(folder: Path) -> list[str]:
    """Anna and Ben share p1 and p2, Cem has p2 (and no name), on which he ties everything."""
    rows = {
        "anna": [("p0", "abc"), ("p1", "abc"), ("p2", "abc")],
        "ben": [("p1", "abc"), ("p2", "cab"), ("p3", "abc")],
    }
    for name, ranked in rows.items():
        write_jsonl(
            folder / f"{name}.jsonl", [{"prompt": p, "completions": list(c), "annotator": name} for p, c in ranked]
        )
    write_jsonl(folder / "cem.jsonl", [{"prompt": "p2", "completions": [["c", "b", "a"]]}])
    return [str(folder / f"{name}.jsonl") for name in ("anna", "ben", "cem")]


def run_main(monkeypatch, capsys, *argv) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["annotate.py", *map(str, argv)])
    status = 0
    try:
        annotate.main()
    except SystemExit as stop:
        status = stop.code
    return status, *capsys.readouterr()


def test_agreement_of_several_people_and_the_merged_file(tmp_path, monkeypatch, capsys):
    """p1 alike (3 of 3), p2 abc against cab: 1 of 3. Cem's ties are like nobody's order, so of all
    pairs 3 of 3 and 1 of 9: the standard error is sqrt(2 (2^2 + 2^2)) / 12."""
    files = people(tmp_path)
    merged = tmp_path / "merged.jsonl"
    status, out, _ = run_main(monkeypatch, capsys, *files, "--out", merged)
    assert status == 0
    assert "anna: 3 rankings\nben: 3 rankings\n" in out
    assert "anna and ben: 66.7% +- 33.3% of 6 pairs of completions ranked alike (2 items)\n" in out
    assert f"anna and {files[2]}: 0.0% of 3 pairs of completions ranked alike (1 item)\n" in out
    assert "overall: 33.3% +- 33.3% of 12 pairs of completions ranked alike (2 items)\n" in out
    assert "wrote 7 rankings" in out
    rankings = read_rankings(merged)
    assert [r.prompt for r in rankings].count("p2") == 3  # one ranking a person
    assert [row["annotator"] for _, row in read_jsonl(merged)] == ["anna"] * 3 + ["ben"] * 3 + [files[2]]
    status, again, _ = run_main(monkeypatch, capsys, merged)  # who is who stands in the merged file
    assert status == 0 and out.startswith(again)


def test_merging_refuses_what_can_not_be_meant(tmp_path, monkeypatch, capsys):
    files = people(tmp_path)
    before = Path(files[0]).read_bytes()
    for argv, says in (
        ([*files, "--out", files[0]], f"--out {files[0]}"),
        ([tmp_path / "nowhere.jsonl"], "nowhere.jsonl: no such file"),
    ):
        status, out, err = run_main(monkeypatch, capsys, *argv)
        assert status == 2 and out == "" and says in err and err.count("\n") == 1
    twice = tmp_path / "twice.jsonl"
    twice.write_bytes(before)
    status, out, err = run_main(monkeypatch, capsys, files[0], twice)
    assert status == 2 and err.endswith(f"{twice}:1: anna has ranked these completions at {files[0]}:1 already\n")
    assert Path(files[0]).read_bytes() == before


def test_the_command_shows_self_agreement(tmp_path, monkeypatch, capsys):
    path = tmp_path / "anna.jsonl"
    asked(session_of(path, 20, annotator="anna", repeat=0.1))
    _, out, _ = run_main(monkeypatch, capsys, path)
    assert out.startswith("anna: 20 rankings\n") and f"{path} with itself: " in out and "(2 items)" in out


def test_no_torch_is_needed():
    program = "import sys, tools.annotate; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=ENV).returncode == 0
    command = [sys.executable, "-m", "tools.annotate", "--help"]
    script = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert script.returncode == 0 and "merged.jsonl" in script.stdout


# ------------------------------------------------------------------------------------------------ the page


class Client:
    def __init__(self, session: Session, port: int) -> None:
        self.session, self.port = session, port

    def request(self, method: str, path: str, body=None, **headers) -> tuple[int, dict, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        body = json.dumps(body).encode() if isinstance(body, (dict, list)) else body
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        found = response.status, dict(response.getheaders()), response.read()
        connection.close()
        return found

    def state(self) -> dict:
        """Once there is something to answer."""
        while True:
            state = json.loads(self.request("GET", "/state")[2])["state"]
            if state["answers"] or state["report"]:
                return state

    def post(self, action: str, **body) -> tuple[int, str, dict]:
        status, _, answer = self.request("POST", action, body)
        answer = json.loads(answer)
        return status, answer["message"], answer["state"]


@contextmanager
def served(session: Session):
    server = annotate.make_server(session, threading.Condition(), 0)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        assert server.server_address[0] == "127.0.0.1"
        yield Client(session, server.server_port)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_the_page_s_answers(tmp_path):
    """Rank, tie, skip, undo, to the end and back; the same rows as in the terminal."""
    path = tmp_path / "r.jsonl"
    with served(session_of(path, 3, annotator="anna")) as page:
        state = page.state()
        assert (state["number"], state["total"], state["annotator"], state["can_undo"]) == (1, 3, "anna", False)
        assert state["prompt"] == [{"role": "user", "text": "p0"}]
        assert state["answers"][2] == {"text": "0c", "ended": False}
        status, _, state = page.post("/rank", id=state["id"], ranks=[1, 0, 1])
        assert status == 200 and state["number"] == 2 and state["can_undo"]
        status, _, state = page.post("/skip", id=state["id"])
        status, _, state = page.post("/rank", id=state["id"], ranks=[2, 1, 0])
        assert state["answers"] is None and "2 ranked, 1 skipped" in state["report"]
        assert page.post("/rank", id=state["id"], ranks=[2, 1, 0])[0] == 409  # nothing is asked
        _, message, state = page.post("/undo", id=state["id"])
        assert message == "Taken back." and state["prompt"][0]["text"] == "p2"
        page.post("/rank", id=state["id"], ranks=[0, 1, 2])
    assert [(r.prompt, r.completions, r.ranks) for r in read_rankings(path)] == [
        ("p0", ["0b", "0a", "0c"], [0, 1, 1]),
        ("p2", ["2a", "2b", "2c"], [0, 1, 2]),
    ]


def test_an_answer_is_taken_once(tmp_path):
    """A double click, a second tab, a page left open from before an undo: gently refused, with what is current."""
    with served(session_of(tmp_path / "r.jsonl")) as page:
        tab = page.state()
        assert page.post("/rank", id=tab["id"], ranks=[0, 1, 2])[0] == 200
        for action in ("/rank", "/skip", "/undo"):
            status, message, state = page.post(action, id=tab["id"], ranks=[2, 1, 0])
            assert status == 409 and "answered already" in message and state["prompt"][0]["text"] == "p1"
        assert page.state() == page.state() == state  # a reload
        before = content(tmp_path / "r.jsonl")
        answers, gate = [], threading.Barrier(8)

        def click():
            gate.wait()
            answers.append(page.post("/rank", id=state["id"], ranks=[0, 1, 2])[0])

        threads = [threading.Thread(target=click) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(answers) == [200] + [409] * 7
        assert content(tmp_path / "r.jsonl")[0].count(b"\n") == before[0].count(b"\n") + 1
        old = page.state()["id"]
        page.post("/skip", id=old)
        page.post("/undo", id=page.state()["id"])
        assert page.state()["id"] == old  # the very same question: a tab that still shows it may answer


def test_the_page_waits_for_samples(tmp_path):
    """It can take back meanwhile; and a page that still waits from before another answer can't."""
    session = Session(tmp_path / "r.jsonl", ["p0", "p1", "p2"])
    waiting = []
    for first in (0, 1):
        session.add(items_of(1, first=first))
        session.answer([0, 1, 2])
        waiting.append(annotate.page_state(session))
        assert waiting[-1]["answers"] is None and waiting[-1]["report"] is None and waiting[-1]["total"] == 3
    assert annotate.handle_post(session, "/rank", json.dumps({"id": waiting[1]["id"]}).encode())[0] == 409
    assert annotate.handle_post(session, "/undo", json.dumps({"id": waiting[0]["id"]}).encode())[0] == 409
    assert annotate.handle_post(session, "/undo", json.dumps({"id": waiting[1]["id"]}).encode())[0] == 200
    assert session.current().prompt == "p1"
    session.add(items_of(2, first=1))  # sampled once more: asked once all the same
    assert [item.prompt for item in asked(session)] == ["p1", "p2"]


def test_who_may_ask(tmp_path):
    """Only the address itself: a name that points to 127.0.0.1 (DNS rebinding) and posts of other sites are refused,
    and nothing is told or done."""
    with served(session_of(tmp_path / "r.jsonl")) as page:
        own = f"127.0.0.1:{page.port}"
        question = {"id": page.state()["id"], "ranks": [0, 1, 2]}
        here, other = page.port, page.port + 1
        foreign = ["evil.example", f"evil.example:{here}", f"localhost.evil.example:{here}", f"127.0.0.1:{here}@evil"]
        foreign += ["127.0.0.1", f"127.0.0.1:{other}", "", f"[::1]:{here}", f"0.0.0.0:{here}"]
        for host in foreign:
            for method, path, body in (("GET", "/", None), ("GET", "/state", None), ("POST", "/rank", question)):
                status, headers, answer = page.request(method, path, body, Host=host)
                assert status == 403 and b"p0" not in answer and "Access-Control-Allow-Origin" not in headers
        origins = ["http://evil.example", "null", f"https://{own}", "http://127.0.0.1", f"http://127.0.0.1:{other}", ""]
        for origin in origins:
            for path in ("/rank", "/skip", "/undo"):
                assert page.request("POST", path, question, Origin=origin)[0] == 403
        assert content(tmp_path / "r.jsonl") == (b"", b"")
        for host in (own, f"localhost:{page.port}"):
            assert page.request("GET", "/state", Host=host)[0] == 200
            question["id"] = page.state()["id"]
            assert page.request("POST", "/rank", question, Host=host, Origin=f"http://{host}")[0] == 200
    assert len(read_rankings(tmp_path / "r.jsonl")) == 2


def test_getting_has_no_side_effects(tmp_path):
    with served(session_of(tmp_path / "r.jsonl")) as page:
        page.post("/rank", id=page.state()["id"], ranks=[0, 1, 2])
        before, state = content(tmp_path / "r.jsonl"), page.state()
        for path, status in (
            *[("/", 200), ("/state", 200), ("/rank", 404), ("/undo", 404), (f"/skip?id={state['id']}", 404)],
            *[("/favicon.ico", 404), ("/../cli.py", 404), ("/annotate.py", 404)],
        ):
            assert page.request("GET", path)[0] == status, path
        assert page.request("PUT", "/rank", {"id": state["id"]})[0] == 501
        for path in ("/state", "/ranks", "/rank/", "/Skip", "/undo?"):
            assert page.request("POST", path, {"id": state["id"], "ranks": [0, 1, 2]})[0] == 404, path
        assert content(tmp_path / "r.jsonl") == before and page.state() == state
        assert sorted(p.name for p in tmp_path.iterdir()) == ["r.jsonl"]


NO_RANKS = (None, "012", [0, 1], [0, 1, 2, 3], [0, 1, 3], [1, 2, 3], [0, 1, True], [0.0, 1.0, 2.0], [0, 1, -1], {})
NO_REQUEST = (b"", b"x", b"[]", b'"id"', b"{}", b"\xff", b"[" * 50_000, b"null")


@pytest.mark.parametrize("body", [*NO_REQUEST, *(json.dumps({"ranks": ranks}).encode() for ranks in NO_RANKS)])
def test_posts_that_make_no_sense_change_nothing(tmp_path, body):
    with served(session_of(tmp_path / "r.jsonl")) as page:
        if body.startswith(b'{"ranks"'):
            body = json.dumps({**json.loads(body), "id": page.state()["id"]}).encode()
        status, _, answer = page.request("POST", "/rank", body)
        assert status == 400 and json.loads(answer)["message"] and json.loads(answer)["state"]["number"] == 1
        for length in ("1000000", "-1", "x", ""):
            assert page.request("POST", "/rank", b"", Content_Length=length)[0] == 413
        assert content(tmp_path / "r.jsonl") == (b"", b"")


def test_the_page_tells_that_an_answer_could_not_be_saved(tmp_path, monkeypatch):
    def broken(fd):
        raise OSError(28, "No space left on device")

    with served(session_of(tmp_path / "r.jsonl")) as page:
        before = page.state()
        with monkeypatch.context() as patch:
            patch.setattr(annotate.os, "fsync", broken)
            status, message, state = page.post("/rank", id=before["id"], ranks=[0, 1, 2])
        assert status == 500 and "No space left" in message and state == before
        assert content(tmp_path / "r.jsonl") == (b"", b"")
        assert page.post("/rank", id=before["id"], ranks=[0, 1, 2])[0] == 200


class Parts(HTMLParser):
    """Tags, attributes and what stands in <script> and <style>."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.attributes, self.inside, self.raw = [], [], "", {"script": [], "style": []}
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        self.inside = tag

    def handle_endtag(self, tag):
        self.inside = ""

    def handle_data(self, data):
        if self.inside in self.raw:
            self.raw[self.inside].append(data)


def test_the_page_loads_nothing_and_runs_only_itself(tmp_path):
    """The policy allows one script and one style, by hash, and requests to the server itself."""
    with served(session_of(tmp_path / "r.jsonl")) as page:
        _, headers, body = page.request("GET", "/")
    parts = Parts(body.decode("utf-8"))
    rules = dict(rule.split(" ", 1) for rule in headers["Content-Security-Policy"].split("; "))
    for kind in ("script", "style"):
        (text,) = parts.raw[kind]
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert rules.pop(f"{kind}-src") == f"'sha256-{digest}'"
    nothing = dict.fromkeys(("default-src", "base-uri", "form-action", "frame-ancestors"), "'none'")
    assert rules == {**nothing, "connect-src": "'self'"}
    assert headers["Content-Type"] == "text/html; charset=utf-8" and headers["X-Content-Type-Options"] == "nosniff"
    assert not {"img", "link", "iframe", "object", "embed", "form", "base"} & set(parts.tags)
    assert not [n for n, _ in parts.attributes if n in ("src", "href", "style", "srcset") or n.startswith("on")]
    assert not re.search(r"https?:|//\w+\.|@import|url\(", body.decode().replace("http-equiv", ""))


def test_texts_of_the_model_come_as_text(tmp_path):
    """In JSON, and the page's script has no way but textContent to show them."""
    text = "<script>alert(1)</script><img src=x onerror=alert(1)>\u2028</textarea>&amp; \"'`${1}"
    session = Session(tmp_path / "r.jsonl", [text])
    session.add([(text, [Sample(text, True), Sample("b", True)])])
    with served(session) as page:
        _, headers, body = page.request("GET", "/state")
        assert text.encode() not in page.request("GET", "/")[2]
    assert headers["Content-Type"] == "application/json" and headers["X-Content-Type-Options"] == "nosniff"
    state = json.loads(body)["state"]
    assert state["answers"][0]["text"] == text == state["prompt"][0]["text"]
    (script,) = Parts(annotate.PAGE.read_text(encoding="utf-8")).raw["script"]
    assert "textContent" in script
    for way in (
        "innerHTML",
        "outerHTML",
        "insertAdjacentHTML",
        "document.write",
        "eval(",
        "Function(",
        "setHTML",
        "parseFrom",
    ):
        assert way not in script


SERVING = """
import signal, sys
from tools.annotate import Sample, Session, in_browser
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background may have been started to ignore it
session = Session(sys.argv[1], ["p0", "p1"], "anna")
text = sys.argv[3] if len(sys.argv) > 3 else "a"
in_browser(session, ([(p, [Sample(text, True), Sample("b", True)])] for p in ("p0", "p1")), int(sys.argv[2]))
print(session.report())
"""


@contextmanager
def serving(path: Path, *text: str):
    """in_browser in a process of its own -> (process, its port)."""
    command = [sys.executable, "-u", "-c", SERVING, str(path), "0", *text]
    process = subprocess.Popen(command, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        line = process.stdout.readline()
        yield process, int(re.search(r"http://127\.0\.0\.1:(\d+)/", line).group(1))
    finally:
        process.kill()
        process.communicate()


@pytest.mark.skipif(os.name == "nt", reason="no SIGINT for another process")
def test_ctrl_c_ends_the_page_with_everything_saved(tmp_path):
    """Also while it is idle; the port is free again, and the next start goes on with the next item."""
    path = tmp_path / "r.jsonl"
    with serving(path) as (process, port):
        page = Client(None, port)
        assert page.post("/rank", id=page.state()["id"], ranks=[0, 1])[0] == 200
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
        assert process.returncode == 0 and err == "" and "1 ranked, 0 skipped" in out
    with serving(path) as (process, port):
        assert Client(None, port).state()["prompt"][0]["text"] == "p1"
        session = session_of(tmp_path / "other.jsonl")
        with pytest.raises(UserError, match=f"--port {port} can't be used"):
            annotate.in_browser(session, iter([]), port)


def browser() -> str | None:
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.skipif(browser() is None, reason="no Chromium")
def test_a_browser_shows_the_page(tmp_path):
    """The policy lets the page's own script and style run; a text with a script in it is shown, not run."""
    text = "<script>document.title = 'run'</script><b>bold</b>"
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    flags += f" --disable-component-update --disable-sync --user-data-dir={tmp_path / 'profile'}"
    with serving(tmp_path / "r.jsonl", text) as (_, port):
        command = [browser(), *flags.split(), "--virtual-time-budget=3000", "--dump-dom", f"http://localhost:{port}/"]
        try:
            run = subprocess.run(command, capture_output=True, text=True, timeout=60)
        except subprocess.TimeoutExpired:
            pytest.skip("the browser does not start here")
    if run.returncode or not run.stdout.strip():
        pytest.skip("the browser does not start here")
    assert "item 1 of 2" in run.stdout and "<title>Rank the answers</title>" in run.stdout
    assert '<div class="text">&lt;script&gt;document.title' in run.stdout and "&lt;b&gt;bold" in run.stdout
    assert Parts(run.stdout).tags.count("b") == 0
