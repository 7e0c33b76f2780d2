"""The four JSON Lines formats. A bad line is an error that names `file:line`; a file is written whole or not at all.

    demonstrations   {"prompt": "...", "completion": "..."}
    prompts          {"prompt": "..."}                                  (other keys are ignored)
    pairs            {"prompt": "...", "chosen": "...", "rejected": "..."}
    rankings         {"prompt": "...", "completions": ["best", ["tied", "tied"], "worst"]}

A prompt is a string, or a conversation [{"role": "user", "content": "..."}, {"role": "assistant", ...}, ...] that ends
with the user's turn. A pair is a ranking of two, so `read_rankings` reads both. A row of either may also hold
"ended": [true, false, ...], one for each completion in the same order: false marks a completion that was cut. Without
"ended" none was cut.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from lib.cli import UserError, check


@dataclass
class Ranking:
    """Completions of one prompt, best first. Equal ranks are ties: ranks [0, 1, 1, 2] is best, two tied, worst."""

    prompt: str
    completions: list[str]
    ranks: list[int]
    ended: list[bool]  # False: cut before it ended, so no EOS follows


def read_bytes(path: str | Path, made_by: str = "") -> bytes:
    """A whole file. UserError where it can't be read; made_by: the command to name if it is missing."""
    try:
        with open(path, "rb") as file:
            return file.read()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file" + (f"; run `{made_by}` first" if made_by else "")) from None
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror})") from None


def read_json(path: str | Path, made_by: str = "") -> dict:
    """The JSON object in a file. UserError where there is none."""
    try:
        content = json.loads(read_bytes(path, made_by))
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or nested too deeply
        raise UserError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object like {{...}}, found {type(content).__name__}")
    return content


def read_jsonl(path: str | Path, made_by: str = "") -> Iterator[tuple[str, dict]]:
    """Yield ("path:line", object) for each line of a file that is not blank."""
    raw = read_bytes(path, made_by)
    refuse_foreign(path, raw)
    yield from parse_jsonl(path, io.BytesIO(raw))


ARROW = 'an Arrow file; in Python, `datasets.Dataset.from_file("OLD").to_json("NEW.jsonl")` makes JSON Lines of it'
# How other kinds of files begin, what they are, and what to do.
FOREIGN = {
    b"version https://git-lfs": "only a pointer to the data (Git LFS); `git lfs pull` in its folder gets the file",
    b"\x1f\x8b": "compressed with gzip; unpack it, or let `python -m tools.prepare` read it",
    b"PAR1": "a Parquet file; `python -m tools.prepare` reads it",
    b"ARROW1": ARROW,
    b"\xff\xff\xff\xff": ARROW,
    b"PK\x03\x04": "a zip archive (Excel's tables are, too); unzip it and name the file inside, or save as CSV",
    b"BZh": "compressed with bzip2; unpack it with `bunzip2`",
    b"\xfd7zXZ": "compressed with xz; unpack it with `unxz`",
    b"\x28\xb5\x2f\xfd": "compressed with zstd; unpack it with `unzstd`",
    b"7z\xbc\xaf": "a 7-Zip archive; unpack it and name the file inside",
}


def refuse_foreign(path: str | Path, raw: bytes) -> None:
    """UserError that says what a file is and what to do, unless it is text in UTF-8, or may be."""
    for start, what in FOREIGN.items():
        check(not raw.startswith(start), f"{path}: {what}")
    utf16 = raw.startswith((b"\xff\xfe", b"\xfe\xff")) or json.detect_encoding(raw[:4]).startswith(("utf-16", "utf-32"))
    check(not utf16, f"{path}: text in UTF-16 or UTF-32; save it as UTF-8 (`iconv -f UTF-16 -t UTF-8 OLD > NEW`)")
    check(b"\0" not in raw[:1000], f"{path}: no text (it holds zero bytes); if it is an archive, unpack it")


def parse_jsonl(path: str | Path, lines: Iterable[bytes]) -> Iterator[tuple[str, dict]]:
    """Yield ("path:line", object) for each of these lines that is not blank."""
    for number, line in enumerate(lines, start=1):
        where = f"{path}:{number}"
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")  # -sig: tolerate a byte-order mark
        except UnicodeDecodeError as error:
            raise UserError(f"{where}: not valid UTF-8 ({error.reason})") from None
        if not text.strip():
            continue
        row = parse_json(path, text.rstrip(), first_line=number)
        if not isinstance(row, dict):
            raise UserError(f"{where}: expected a JSON object like {{...}}, found {type(row).__name__}")
        yield where, row


def parse_json(path: str | Path, text: str, first_line: int = 1):
    """The value that a text spells in JSON. first_line: the line of the file where the text begins, for the errors."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise UserError(f"{path}:{line}: not valid JSON ({error.msg} at column {error.colno})") from None
    except RecursionError:
        raise UserError(f"{path}:{first_line}: nested too deeply to be read") from None
    except ValueError:  # Python's own limit, 4,300 digits by default
        longest = max(re.finditer(r"\d+", text), key=lambda match: len(match[0]))
        line = first_line + text.count("\n", 0, longest.start())
        raise UserError(f"{path}:{line}: a number with thousands of digits; write it as a string") from None


def mend_last_line(path: str | Path) -> None:
    """Make a file safe to append to: remove a last line that a crash cut short, or end one that lacks only its
    newline."""
    content = Path(path).read_bytes() if Path(path).exists() else b""
    start = content.rfind(b"\n") + 1
    if not content[start:].startswith(b"{"):  # the last line is whole, or this is no file of ours
        return
    try:
        json.loads(content[start:])
    except ValueError:
        os.truncate(path, start)  # in place: the lines before it may be hours of somebody's work
    else:
        with open(path, "ab") as file:
            file.write(b"\n")


def text_field(where: str, row: dict, key: str) -> str:
    """row[key], which must be a string. where: the place in the data, for the error."""
    if key not in row:
        raise UserError(f'{where}: no "{key}" (found: {", ".join(row) or "nothing"})')
    if not isinstance(row[key], str):
        raise UserError(f'{where}: "{key}" must be a string, not {type(row[key]).__name__}')
    return sound_text(where, key, row[key])


ROLES = ("system", "user", "assistant")


class Prompt(str):
    """A prompt of several turns. As a string it is a text to show, to compare and to give to reward functions. The
    model reads its turns, as the vocabulary's template formats them."""

    turns: tuple[tuple[str, str], ...]  # (role, text), the last one the user's

    @classmethod
    def of(cls, turns: list[tuple[str, str]]) -> str:
        """The prompt of these turns. A single turn of the user's becomes an ordinary string."""
        if len(turns) == 1 and turns[0][0] == "user":
            return turns[0][1]
        prompt = cls("\n".join(f"{role.capitalize()}: {text}" for role, text in turns))
        prompt.turns = tuple(turns)
        return prompt


def turns_of(prompt: str) -> tuple[tuple[str, str], ...]:
    """(role, text) of every turn. An ordinary string is one turn of the user's."""
    return prompt.turns if isinstance(prompt, Prompt) else (("user", prompt),)


def prompt_json(prompt: str) -> str | list[dict[str, str]]:
    """The prompt as JSON. The inverse of prompt_field."""
    return [{"role": r, "content": t} for r, t in prompt.turns] if isinstance(prompt, Prompt) else prompt


def prompt_field(where: str, row: dict) -> str:
    """row["prompt"], a string or a list of messages -> a string, or a Prompt if it has several turns."""
    messages = row.get("prompt")
    if not isinstance(messages, list):
        return text_field(where, row, "prompt")
    turns = []
    for number, message in enumerate(messages, start=1):
        what = f"{where}: message {number} of the prompt"
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise UserError(f'{what} must be an object with a "role" of {", ".join(ROLES)}')
        turns.append((message["role"], text_field(what, message, "content")))
    if not turns or turns[-1][0] != "user":
        raise UserError(f"{where}: a prompt of messages must end with the user's")
    return Prompt.of(turns)


def sound_text(where: str, key: str, text: str) -> str:
    """The text, if it can be encoded. JSON can spell half a character (a lone surrogate), which no file and no
    vocabulary can hold. And tiktoken crashes at some hundred thousand white-space characters in a row."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f'{where}: "{key}" holds half a character at {error.start} (a lone surrogate)') from None
    blank = max(map(len, re.findall(r"\s+", text)), default=0) if len(text) > MAX_BLANK else 0
    check(blank <= MAX_BLANK, f'{where}: "{key}" holds {blank:,} white-space characters in a row; shorten them')
    return text


MAX_BLANK = 100_000


def sibling(path: str | Path, new_name: str) -> str:
    """The file of that name in the folder of `path`; "" if there is none."""
    found = Path(path).with_name(new_name)
    return str(found) if found.exists() else ""


def held_out_twin(data: str, held_out: str) -> str:
    """The file of a stage's held-out data. "auto": mine_held_out.jsonl in the folder of mine.jsonl, or "" if there is
    none. So a user's data is never judged by the demo's."""
    if held_out != "auto":
        return held_out
    name = f"{Path(data).stem}_held_out{Path(data).suffix}"
    found = sibling(data, name)
    if not found:
        print(f"no held-out data: there is no {name} beside {data}")
    return found


def prompts_beside(data: str, prompts: str) -> str:
    """The file of prompts that a preference stage samples from. "auto": prompts.jsonl in the folder of the data, or
    else the data itself."""
    if prompts != "auto":
        return prompts
    found = sibling(data, "prompts.jsonl")
    if not found:
        print(f"samples of the prompts of {data}: there is no prompts.jsonl beside it")
    return found or data


def _not_empty(path, rows: list) -> list:
    if not rows:
        raise UserError(f"{path}: no rows")
    return rows


def read_demonstrations(path: str | Path, made_by: str = "") -> list[tuple[str, str]]:
    """[(prompt, completion)]"""
    rows = [(prompt_field(w, r), text_field(w, r, "completion")) for w, r in read_jsonl(path, made_by)]
    return _not_empty(path, rows)


def read_prompts(path: str | Path, made_by: str = "") -> list[str]:
    """The prompt of every row."""
    return _not_empty(path, [prompt_field(w, r) for w, r in read_jsonl(path, made_by)])


def read_rankings(path: str | Path, made_by: str = "") -> list[Ranking]:
    """Every row, be it a ranking or a pair."""
    return _not_empty(path, [parse_ranking(w, r) for w, r in read_jsonl(path, made_by)])


def parse_ranking(where: str, row: dict) -> Ranking:
    """The ranking in a row: of K completions, or of a pair."""
    prompt = prompt_field(where, row)
    if "completions" in row:
        groups = row["completions"]
        if not isinstance(groups, list):
            raise UserError(f'{where}: "completions" must be a list, best first')
        groups = [g if isinstance(g, list) else [g] for g in groups]  # a tie is a nested list
        if any(not g or not all(isinstance(c, str) for c in g) for g in groups):
            raise UserError(f'{where}: "completions" must hold strings, or lists of strings for ties')
        completions = [sound_text(where, "completions", c) for group in groups for c in group]
        ranks = [rank for rank, group in enumerate(groups) for _ in group]
    else:
        completions, ranks = [text_field(where, row, "chosen"), text_field(where, row, "rejected")], [0, 1]
    if len(ranks) < 2:
        raise UserError(f"{where}: a ranking needs at least two completions")
    ended = row.get("ended", [True] * len(ranks))
    if not isinstance(ended, list) or len(ended) != len(ranks) or not all(isinstance(e, bool) for e in ended):
        raise UserError(f'{where}: "ended" must be a list of {len(ranks)} times true or false')
    return Ranking(prompt, completions, ranks, ended)


def nest_ties(completions: list[str], ranks: list[int]) -> list:
    """The completions as a file holds them: best first, ties as nested lists. The inverse of parse_ranking."""
    groups = [[c for c, r in zip(completions, ranks, strict=True) if r == rank] for rank in sorted(set(ranks))]
    return [g[0] if len(g) == 1 else g for g in groups]


@contextlib.contextmanager
def can_be_written(path: Path) -> Iterator[None]:
    """A full disk, or a folder that may not be written to, is one line."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: can't be written ({error.strerror})") from None


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary file to write. It takes the place of `path` at the end, so a crash leaves the old file or the new
    one, never half of one. UserError where it can't be written; then nothing is left of it."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path.parent}: can't be made a folder ({error.strerror})") from None
    temporary = path.with_name(path.name + ".tmp")
    try:
        with can_be_written(path):
            yield temporary
            os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_jsonl(path: str | Path, rows: list[dict]) -> None:
    """One row a line."""
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
