"""Reads data as it is published. A file becomes records (dicts), each with its place in the file, for errors. A
record's conversations become turns.

A file is a JSON list, JSON Lines or CSV with a header, each also compressed with gzip, or Parquet (needs pyarrow).
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import zlib
from pathlib import Path

from lib.cli import UserError, check, one_line
from data.files import ROLES, Prompt, parse_jsonl, read_bytes, text_field

Turns = list[tuple[str, str]]  # (role, text)


# ---------------------------------------------------------------------------------------------- files -> records


def read_records(path: Path) -> list[tuple[str, dict]]:
    """All records of a file: [("file:line" or "file: record number", record)]. Null fields count as absent.

    The content shows the kind of file; only CSV is known by its name."""
    raw = read_bytes(path)
    if raw.startswith(b"version https://git-lfs"):
        raise UserError(f"{path}: only a pointer to the data (Git LFS); `git lfs pull` in its folder gets the file")
    if raw.startswith(b"\x1f\x8b") or path.suffix == ".gz":
        try:
            raw = gzip.decompress(raw)
        except (EOFError, OSError, zlib.error) as error:
            raise UserError(f"{path}: cut short or damaged, get it again ({one_line(error)})") from None
    if raw.startswith(b"PAR1"):
        records = read_parquet(path, raw)
    elif path.name.lower().removesuffix(".gz").endswith(".csv"):
        records = read_csv(path, raw)
    elif raw.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
        records = read_json_list(path, raw)
    else:
        records = list(parse_jsonl(path, io.BytesIO(raw)))
    check(bool(records), f"{path}: no records")
    return [(where, {k: v for k, v in record.items() if v is not None}) for where, record in records]


def decode(path: Path, raw: bytes) -> str:
    """UTF-8 text, without its byte-order mark. UserError names the line that is not."""
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}:{line}: not valid UTF-8 ({error.reason})") from None


def read_json_list(path: Path, raw: bytes) -> list[tuple[str, dict]]:
    try:
        records = json.loads(decode(path, raw))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not valid JSON ({error.msg} at column {error.colno})") from None
    for number, record in enumerate(records, start=1):
        check(isinstance(record, dict), f"{path}: record {number} is not an object")
    return [(f"{path}: record {number}", record) for number, record in enumerate(records, start=1)]


def read_csv(path: Path, raw: bytes) -> list[tuple[str, dict]]:
    """The first line names the columns. The place of a row is its last line. An empty cell is an empty string."""
    csv.field_size_limit(2**31 - 1)  # the module's own limit is 128 KiB a cell
    rows = csv.DictReader(io.StringIO(decode(path, raw).replace("\r\n", "\n"), newline=""), strict=True)
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


def transcript(text: str) -> Turns:
    """The turns of "\\n\\nHuman: ...\\n\\nAssistant: ...". A speaker's name counts only after an empty line: "Human:"
    or "Assistant:" elsewhere is part of a text."""
    before, *rest = re.split(r"\n\n(Human|Assistant):", "\n\n" + text.lstrip())
    if before or not rest:
        raise Dropped("not a transcript from its first word")
    roles = ["user" if name == "Human" else "assistant" for name in rest[::2]]
    return list(zip(roles, (text.strip() for text in rest[1::2]), strict=True))


def messages(where: str, record: dict, key: str) -> Turns:
    """The turns in record[key], a list of {"role", "content"} or {"from", "value"}."""
    if not isinstance(record.get(key), list):
        raise UserError(f'{where}: "{key}" must be a list of messages (found: {", ".join(record) or "nothing"})')
    turns = []
    for number, message in enumerate(record[key], start=1):
        what = f'{where}: message {number} of "{key}"'
        check(isinstance(message, dict), f"{what} is not an object")
        role = text_field(what, message, "from" if "from" in message else "role")
        role = {"human": "user", "gpt": "assistant", "chatgpt": "assistant"}.get(role, role)
        if role not in ROLES:
            raise Dropped("a turn that is not the user's, the assistant's or the system's")
        turns.append((role, text_field(what, message, "value" if "from" in message else "content").strip()))
    return turns


def prompt_turns(where: str, record: dict) -> Turns:
    """The turns in record["prompt"]: messages, a transcript up to its last "Assistant:" (as in repackaged HH-RLHF), or
    a text, which is one turn."""
    if isinstance(record.get("prompt"), list):
        return messages(where, record, "prompt")
    prompt = text_field(where, record, "prompt")
    if prompt.lstrip().startswith("Human:") and prompt.rstrip().endswith("\n\nAssistant:"):
        return transcript(prompt)[:-1]  # less the empty answer
    return [("user", prompt.strip())]


def conversation(turns: Turns) -> tuple[str, str]:
    """Turns -> (prompt, last answer). They must alternate: perhaps the system's, then user, assistant, ..., assistant.
    Raises Dropped where they don't."""
    turns = [turn for turn in turns if turn != ("system", "")]  # published conversations often carry an empty one
    if not turns or turns[-1][0] != "assistant":
        raise Dropped("without an answer at the end")
    roles = [role for role, _ in turns[turns[0][0] == "system" :]]
    if roles != ["user", "assistant"] * (len(roles) // 2):
        raise Dropped("turns that don't alternate")
    if not all(text for _, text in turns[:-1]):
        raise Dropped("an empty turn in the prompt")
    return Prompt.of(turns[:-1]), turns[-1][1]
