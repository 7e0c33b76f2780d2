"""The four JSON Lines formats, read with `file:line: what is wrong` and written whole or not at all.

    demonstrations   {"prompt": "...", "completion": "..."}
    prompts          {"prompt": "..."}                                  (other keys are ignored)
    pairs            {"prompt": "...", "chosen": "...", "rejected": "..."}
    rankings         {"prompt": "...", "completions": ["best", ["tied", "tied"], "worst"]}

A prompt is a string, or a conversation [{"role": "user", "content": "..."}, {"role": "assistant", ...}, ...] that ends
with the user's turn. A pair is a ranking of two, so `read_rankings` reads both. Beside the completions of either,
"ended": [true, false, ...] says in the same order which ended by themselves and which were cut; absent: all ended.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from lib.cli import UserError


@dataclass
class Ranking:
    """Completions of one prompt, best first. Equal ranks are ties: ranks [0, 1, 1, 2] is best, two tied, worst."""

    prompt: str
    completions: list[str]
    ranks: list[int]
    ended: list[bool]  # False: cut before it ended, so no EOS follows


def read_jsonl(path: str | Path, made_by: str = "") -> Iterator[tuple[str, dict]]:
    """Yield ("file:line", object) for each line that is not blank."""
    try:
        file = open(path, "rb")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file" + (f"; run `{made_by}` first" if made_by else "")) from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    with file:
        yield from parse_jsonl(path, file)


def parse_jsonl(path: str | Path, lines: Iterable[bytes]) -> Iterator[tuple[str, dict]]:
    """The same of lines that are read already; `path` is what an error names."""
    for number, line in enumerate(lines, start=1):
        where = f"{path}:{number}"
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")  # -sig: tolerate a byte-order mark
        except UnicodeDecodeError as error:
            raise UserError(f"{where}: not valid UTF-8 ({error.reason})") from None
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except json.JSONDecodeError as error:
            raise UserError(f"{where}: not valid JSON ({error.msg} at column {error.colno})") from None
        if not isinstance(row, dict):
            raise UserError(f"{where}: expected a JSON object like {{...}}, found {type(row).__name__}")
        yield where, row


def mend_last_line(path: str | Path) -> None:
    """Before appending to a file: a last line that a crash cut short is taken off, one that lacks nothing but its end
    gets that."""
    content = Path(path).read_bytes() if Path(path).exists() else b""
    start = content.rfind(b"\n") + 1
    if not content[start:].startswith(b"{"):  # whole, or no file of ours
        return
    try:
        json.loads(content[start:])
    except ValueError:
        os.truncate(path, start)  # in place: what stands there may be hours of somebody's work
    else:
        with open(path, "ab") as file:
            file.write(b"\n")


def text_field(where: str, row: dict, key: str) -> str:
    if key not in row:
        raise UserError(f'{where}: no "{key}" (found: {", ".join(row) or "nothing"})')
    if not isinstance(row[key], str):
        raise UserError(f'{where}: "{key}" must be a string, not {type(row[key]).__name__}')
    return sound_text(where, key, row[key])


ROLES = ("system", "user", "assistant")


class Prompt(str):
    """A prompt of several turns. As a string it is a text to show, to compare and to hand to reward functions; what the
    model reads is made of its turns, by the vocabulary's template."""

    turns: tuple[tuple[str, str], ...]  # (role, text), the last one the user's

    @classmethod
    def of(cls, turns: list[tuple[str, str]]) -> str:
        """A single user's turn is an ordinary string."""
        if len(turns) == 1 and turns[0][0] == "user":
            return turns[0][1]
        prompt = cls("\n".join(f"{role.capitalize()}: {text}" for role, text in turns))
        prompt.turns = tuple(turns)
        return prompt


def turns_of(prompt: str) -> tuple[tuple[str, str], ...]:
    """(role, text) of every turn; an ordinary string is one of the user's."""
    return prompt.turns if isinstance(prompt, Prompt) else (("user", prompt),)


def prompt_json(prompt: str) -> str | list[dict[str, str]]:
    """What stands in a file for it, the inverse of prompt_field."""
    return [{"role": r, "content": t} for r, t in prompt.turns] if isinstance(prompt, Prompt) else prompt


def prompt_field(where: str, row: dict) -> str:
    """row["prompt"], a string or a list of messages -> a string, a Prompt where there are several turns."""
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
    """JSON can spell half a character (a lone surrogate), which no file and no vocabulary can hold."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f'{where}: "{key}" holds half a character at {error.start} (a lone surrogate)') from None
    return text


def sibling(path: str | Path, new_name: str) -> str:
    """The file of that name in the same folder, "" if there is none."""
    found = Path(path).with_name(new_name)
    return str(found) if found.exists() else ""


def held_out_twin(data: str, held_out: str) -> str:
    """Where a stage's held-out data is. "auto": beside the data, mine.jsonl -> mine_held_out.jsonl, if there is one; so
    data of one's own is never judged by the demo's."""
    if held_out != "auto":
        return held_out
    name = f"{Path(data).stem}_held_out{Path(data).suffix}"
    found = sibling(data, name)
    if not found:
        print(f"no held-out data: there is no {name} beside {data}")
    return found


def prompts_beside(data: str, prompts: str) -> str:
    """Prompts for sampling beside preference data. "auto": prompts.jsonl in the same folder, else those of the data."""
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
    return _not_empty(path, [prompt_field(w, r) for w, r in read_jsonl(path, made_by)])


def read_rankings(path: str | Path, made_by: str = "") -> list[Ranking]:
    return _not_empty(path, [parse_ranking(w, r) for w, r in read_jsonl(path, made_by)])


def parse_ranking(where: str, row: dict) -> Ranking:
    """A ranking or a pair."""
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
    """The inverse of parse_ranking: completions sorted by rank, ties as nested lists."""
    groups = [[c for c, r in zip(completions, ranks, strict=True) if r == rank] for rank in sorted(set(ranks))]
    return [g[0] if len(g) == 1 else g for g in groups]


def write_jsonl(path: str | Path, rows: list[dict]) -> None:
    """Write to a temporary name, then rename."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path.parent}: can't be made a folder ({error.strerror})") from None
    tmp = path.with_name(path.name + ".tmp")
    with open(tmp, "w", encoding="utf-8", newline="\n") as f:
        f.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    os.replace(tmp, path)
