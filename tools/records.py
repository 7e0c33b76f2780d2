"""Reads data as it is published. A file becomes records (dicts), each with its place in the file, for errors. The
fields of a record become turns, answers and judgements, however they are called and written."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import zlib
from pathlib import Path

from lib.cli import UserError, check, one_line
from data.files import Prompt, parse_json, parse_jsonl, read_bytes, refuse_foreign, text_field

Turns = list[tuple[str, str]]  # (role, text)


# ---------------------------------------------------------------------------------------------- files -> records


class Record(dict):
    """A record that notes which of its fields are asked for. All records of a file share the notes."""

    def __init__(self, fields: dict, read: set[str], ignored: set[str]):
        super().__init__(fields)
        self.read = read  # names of fields
        self.ignored = ignored  # fields of messages that mean nothing here, as "messages: weight"

    def __getitem__(self, key):
        self.read.add(key)
        return super().__getitem__(key)

    def get(self, key, default=None):
        self.read.add(key)
        return super().get(key, default)


def read_records(path: Path) -> list[tuple[str, Record]]:
    """All records of a file: [("file:line" or "file: record number", record)]. Null fields count as absent; the names
    of fields are taken in small letters.

    The content shows the kind of file; only tables are known by their name."""
    raw = read_bytes(path)
    while raw.startswith(b"\x1f\x8b"):  # some files are compressed twice
        try:
            raw = gzip.decompress(raw)
        except (EOFError, OSError, zlib.error) as error:
            raise UserError(f"{path}: cut short or damaged, get it again ({one_line(error)})") from None
    if raw.startswith(b"PAR1"):
        records = read_parquet(path, raw)
    else:
        refuse_foreign(path, raw)
        text = decode(path, raw)
        if re.search(r"\.(csv|tsv)(\.gz)?$", path.name.lower()):
            records = read_table(path, text)
        elif text.lstrip().startswith("["):
            records = read_json_list(path, text)
        else:
            check_lines(path, text.strip())
            records = list(parse_jsonl(path, io.BytesIO(raw)))
    check(bool(records), f"{path}: no records")
    for where, record in records:  # a table holds nothing but texts
        for key, value in record.items():
            spelt = isinstance(value, str) and re.match(r"\[\s*\{\s*['\"](role|from|content|value)\b", value)
            check(not spelt, f'{where}: "{key}" spells messages as a text; write JSON Lines, with lists')
    read, ignored = set(), set()
    named = [(where, {key.strip().lower(): value for key, value in record.items()}) for where, record in records]
    # v == v: pandas writes NaN where a text is missing, and NaN is the one value that isn't equal to itself
    present = [(where, {k: v for k, v in record.items() if v is not None and v == v}) for where, record in named]
    return [(where, Record(record, read, ignored)) for where, record in present]


def decode(path: Path, raw: bytes) -> str:
    """UTF-8 text, without its byte-order mark. UserError names the line that is not."""
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}:{line}: not valid UTF-8 ({error.reason}); save the file as UTF-8") from None


def check_lines(path: Path, text: str) -> None:
    """UserError that says what to do with a text that is neither a table nor a list nor one JSON object a line."""
    advice = 'write one JSON object a line, as {"prompt": "..."} or {"text": "..."}; name a table .csv or .tsv'
    check(not text or text[0] == "{", f"{path}: no JSON, it begins {text[:40]!r}; {advice}")
    try:
        _, end = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):  # broken: the reader of lines says where
        return
    advice = f'`jq -c . {path} > NEW.jsonl` writes one object a line; `.data[]` for `.`, if "data" holds the records'
    check("\n" not in text[:end], f"{path}: JSON, but its first object takes several lines; {advice}")


def read_json_list(path: Path, text: str) -> list[tuple[str, dict]]:
    records = [(f"{path}: record {n}", record) for n, record in enumerate(parse_json(path, text), start=1)]
    for where, record in records:
        check(isinstance(record, dict), f"{where} is not an object")
    return records


def read_table(path: Path, text: str) -> list[tuple[str, dict]]:
    """The first line names the columns; commas, tabs or semicolons divide them. The place of a row is its last line. An
    empty cell is an empty string."""
    csv.field_size_limit(2**31 - 1)  # the module's own limit is 128 KiB a cell
    text = text.replace("\r\n", "\n")
    delimiter = max(",\t;", key=text.split("\n", 1)[0].count)
    rows = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    records = []
    try:
        for row in rows:
            where = f"{path}:{rows.line_num}"
            check(None not in row, f"{where}: more cells than the header has columns")
            records.append((where, row))
    except csv.Error as error:
        raise UserError(f"{path}:{rows.line_num + 1}: the row that begins here is not valid CSV ({error})") from None
    return records


def read_parquet(path: Path, raw: bytes) -> list[tuple[str, dict]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{path}: reading Parquet needs pyarrow; `pip install pyarrow`") from None
    try:
        records = pyarrow.parquet.read_table(pyarrow.BufferReader(raw)).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: cut short or damaged, get it again ({one_line(error)})") from None
    return [(f"{path}: row {number}", record) for number, record in enumerate(records, start=1)]


# ---------------------------------------------------------------------------------------------- fields -> turns


class Dropped(Exception):
    """Raised for a sound record that can't be used. Its text says why, and such records are counted by it."""


# The names that published data give to one thing. Of several in a record the first counts.
CONVERSATIONS = "messages conversations conversation".split()
PROMPTS = ["instruction", "prompt", "question", "query", "problem", *CONVERSATIONS]
PROMPTS += ["user", "human", "input", "inputs", "history", "context"]  # elsewhere these mean other things
SYSTEMS = "system system_prompt system_message".split()
ANSWERS = "completion output response answer solution assistant target targets label".split()

# Two answers, the better one first; or two with names like these, and a field that says which is better.
PAIRS = [["chosen", "rejected"], ["chosen_response", "rejected_response"], ["response_j", "response_k"]]
COMPARED = r"(response|answer|completion|output|conversation|human_ref)_?[0-9ab]"
CHOICES = "better_response_id winner choice preference preferred better label labels".split()

# One answer, and a field that says whether it is wanted.
LABELS = """label labels kto_tag desirable is_desirable preferred is_preferred accepted liked good is_good
    thumbs_up is_safe is_correct""".split()
WANTED = """true t yes y 1 +1 good desirable desired wanted chosen accepted preferred positive pos thumbs_up thumbsup up
    like liked upvote correct right safe win 👍""".split()
UNWANTED = """false f no n 0 -1 bad undesirable undesired unwanted rejected dispreferred negative neg thumbs_down
    thumbsdown down dislike disliked downvote incorrect wrong unsafe lose 👎""".split()

ROLES = {
    "system": "system developer",
    "user": "user human prompter customer",
    "assistant": "assistant gpt chatgpt bot chatbot model ai bing bard claude",
    "tool": "tool function function_call function_response observation ipython tool_call tool_response",
}
ROLE_OF = {name: role for role, names in ROLES.items() for name in names.split()}


def first_of(names: list[str], record: dict) -> str:
    """The first of these fields that holds something, or else that is there; "" if none is."""
    there = [name for name in names if name in record]
    return next((name for name in there if dict.get(record, name) not in ("", [], {})), there[0] if there else "")


def transcript(text: str) -> Turns:
    """The turns of "\\n\\nHuman: ...\\n\\nAssistant: ...". A speaker's name counts only after an empty line: "Human:"
    or "Assistant:" elsewhere is part of a text."""
    before, *rest = re.split(r"\n\n(Human|Assistant):", "\n\n" + text.lstrip())
    if before or not rest:
        raise Dropped("not a transcript from its first word")
    roles = ["user" if name == "Human" else "assistant" for name in rest[::2]]
    return list(zip(roles, (text.strip() for text in rest[1::2]), strict=True))


def content(where: str, record: dict, key: str) -> str:
    """The text in record[key]: a string, or a list of parts ["...", {"type": "text", "text": "..."}]."""
    text = record.get(key)
    if isinstance(text, list):
        parts = [part.get("text") if isinstance(part, dict) else part for part in text]
        if not all(isinstance(part, str) for part in parts):
            raise Dropped("a part of a message that is not text (a picture, a call of a tool)")
        record = {key: "\n".join(parts)}
    return text_field(where, record, key).strip()


def messages(where: str, record: dict, key: str) -> Turns:
    """The turns in record[key]: messages {"role", "content"} or {"from", "value"}, or a single one; of a conversation
    or a history also texts, perhaps in pairs, of which the first is the user's."""
    listed = record.get(key)
    listed = [listed] if isinstance(listed, dict) else listed
    if not isinstance(listed, list):
        raise UserError(f'{where}: "{key}" must be a list of messages (found: {", ".join(record) or "nothing"})')
    listed = [m for item in listed for m in (item if isinstance(item, list) else [item])]
    if (key in CONVERSATIONS or "history" in key) and all(isinstance(m, str) for m in listed):
        listed = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(listed)]
    turns = []
    for number, message in enumerate(listed, start=1):
        what = f'{where}: message {number} of "{key}"'
        check(isinstance(message, dict), f"{what} is not an object with a role and a text")
        message = {k: v for k, v in message.items() if v is not None}
        name, text = first_of(["from", "role"], message), first_of(["content", "value", "text"], message)
        if not text and (message.get("tool_calls") or message.get("function_call")):
            raise Dropped("a call of a tool")
        said = text_field(what, message, name or "role")
        role = ROLE_OF.get(said.strip().lower())
        check(role is not None, f"{what}: unknown role {json.dumps(said)}; known are {', '.join(ROLE_OF)}")
        if role == "tool":
            raise Dropped("a turn that is not the user's, the assistant's or the system's")
        turns.append((role, content(what, message, text or "content")))
        if number == len(listed) and role == "assistant":  # a judgement may stand in the message; "weight" is OpenAI's
            check_wanted(what, {"label": message.get("label", message.get("weight") != 0)})
        if isinstance(record, Record):
            record.ignored.update(f"{key}: {k}" for k in message if k not in (name, text, "label", "weight"))
    return turns


def prompt_turns(where: str, record: dict) -> Turns:
    """What stands before an answer: the history, and the question with its context; or a conversation; or a transcript,
    perhaps up to its last "Assistant:" (as in repackaged HH-RLHF)."""
    key = first_of(PROMPTS, record)
    check(bool(key), f'{where}: no "prompt" (found: {", ".join(record) or "nothing"}); known are {", ".join(PROMPTS)}')
    histories = [k for k in ("history", "chat_history") if k != key and record.get(k)]
    before = [turn for k in histories for turn in messages(where, record, k)]
    if key in CONVERSATIONS or isinstance(record[key], (list, dict)):
        return before + messages(where, record, key)
    prompt = text_field(where, record, key).strip()
    if prompt.startswith("Human:"):
        turns = transcript(prompt)
        return before + turns[: -1 if turns[-1] == ("assistant", "") else None]
    extra = [content(where, record, k) for k in ("input", "context") if k in record and k != key]
    return [*before, ("user", "\n".join(filter(None, [prompt, *extra])))]


def answer_turns(where: str, record: dict, key: str) -> Turns:
    """An answer: a text or messages. A transcript, or messages that the user begins, are a whole conversation."""
    if isinstance(record.get(key), (list, dict)):
        return messages(where, record, key)
    text = text_field(where, record, key).strip()
    whole = text.startswith("Human:") or not first_of(PROMPTS, record)
    if whole and "\n\nAssistant:" in f"\n\n{text}":
        return transcript(text)
    return [("assistant", text.removeprefix("Assistant:").strip())]


def check_wanted(where: str, record: dict) -> None:
    """Raises Dropped for a record whose label says that its answer is unwanted (data for KTO)."""
    key = first_of(LABELS, record)
    if not key:
        return
    said = re.sub(r"(?<=\w)[ -](?=\w)", "_", str(record[key]).strip().lower()).removesuffix(".0")
    known = "wanted (true, 1, good, desirable, ...) nor unwanted (false, 0, bad, undesirable, ...)"
    advice = "rename the field if it is no such label"
    check(said in WANTED + UNWANTED, f'{where}: "{key}" is {record[key]!r}, neither {known}; {advice}')
    if said in UNWANTED:
        raise Dropped("labelled as unwanted")


def better_and_worse(where: str, record: dict) -> list[str]:
    """The fields of the better and of the worse answer; [] if the record compares nothing."""
    for pair in PAIRS:
        if pair[0] in record or pair[1] in record:
            return pair
    found = sorted(name for name in record if re.fullmatch(COMPARED, name))
    if len(found) < 2:
        return []
    names, key = ", ".join(found), first_of(CHOICES, record)
    check(len(found) == 2, f'{where}: {len(found)} answers ({names}); name two of them "chosen" and "rejected"')
    known = f'known names: {", ".join(CHOICES)}; or name the better answer "chosen" and the other one "rejected"'
    check(bool(key), f"{where}: no field says which of {names} is better; {known}")
    said = str(record[key]).strip().lower().removesuffix(".0")
    if found[0] == "human_ref_a":  # Stanford's SHP says 1 for A and 0 for B
        said = {"1": "a", "0": "b"}.get(said, said)
    if re.match("tie|draw|equal|same|both|neither|none", said):
        raise Dropped("a tie of the two answers")
    better = [name for name in found if said in (name, name[-1], f"model_{name[-1]}")]
    check(bool(better), f'{where}: "{key}" is {record[key]!r}, which names none of {names}')
    return found if better[0] == found[0] else found[::-1]


def conversation(where: str, record: dict, turns: Turns) -> tuple[str, str]:
    """The record's turns -> (prompt, last answer). The system's text may stand in a field of its own. The turns must
    alternate: perhaps the system's, then user, assistant, ..., assistant. Raises Dropped where they don't."""
    system = first_of(SYSTEMS, record)
    before = [("system", content(where, record, system))] if system else []
    turns = turns if turns[:1] == before else before + turns
    turns = [turn for turn in turns if turn != ("system", "")]  # published conversations often carry an empty one
    if not turns or turns[-1][0] != "assistant":
        raise Dropped("without an answer at the end")
    roles = [role for role, _ in turns[turns[0][0] == "system" :]]
    if roles != ["user", "assistant"] * (len(roles) // 2):
        raise Dropped("turns that don't alternate")
    if not all(text for _, text in turns[:-1]):
        raise Dropped("an empty turn in the prompt")
    return Prompt.of(turns[:-1]), turns[-1][1]
