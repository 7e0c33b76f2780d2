"""The four JSON Lines formats, read with `file:line: what is wrong` and written whole or not at all.

    demonstrations   {"prompt": "...", "completion": "..."}
    prompts          {"prompt": "..."}                                  (other keys are ignored)
    pairs            {"prompt": "...", "chosen": "...", "rejected": "..."}
    rankings         {"prompt": "...", "completions": ["best", ["tied", "tied"], "worst"]}

A pair is a ranking of two, so `read_rankings` reads both.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cli import UserError


@dataclass
class Ranking:
    """Completions of one prompt, best first. Equal ranks are ties: ranks [0, 1, 1, 2] is best, two tied, worst."""

    prompt: str
    completions: list[str]
    ranks: list[int]


def read_jsonl(path: str | Path, made_by: str = "") -> Iterator[tuple[str, dict]]:
    """Yield ("file:line", object) for each line that is not blank."""
    try:
        file = open(path, "rb")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file" + (f"; run `{made_by}` first" if made_by else "")) from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    with file:
        for number, line in enumerate(file, start=1):
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


def text_field(where: str, row: dict, key: str) -> str:
    if key not in row:
        raise UserError(f'{where}: no "{key}" (found: {", ".join(row) or "nothing"})')
    if not isinstance(row[key], str):
        raise UserError(f'{where}: "{key}" must be a string, not {type(row[key]).__name__}')
    return row[key]


def _not_empty(path, rows: list) -> list:
    if not rows:
        raise UserError(f"{path}: no rows")
    return rows


def read_demonstrations(path: str | Path, made_by: str = "") -> list[tuple[str, str]]:
    """[(prompt, completion)]"""
    rows = [(text_field(w, r, "prompt"), text_field(w, r, "completion")) for w, r in read_jsonl(path, made_by)]
    return _not_empty(path, rows)


def read_prompts(path: str | Path, made_by: str = "") -> list[str]:
    return _not_empty(path, [text_field(w, r, "prompt") for w, r in read_jsonl(path, made_by)])


def read_rankings(path: str | Path, made_by: str = "") -> list[Ranking]:
    return _not_empty(path, [parse_ranking(w, r) for w, r in read_jsonl(path, made_by)])


def parse_ranking(where: str, row: dict) -> Ranking:
    prompt = text_field(where, row, "prompt")
    if "completions" not in row:
        return Ranking(prompt, [text_field(where, row, "chosen"), text_field(where, row, "rejected")], [0, 1])
    groups = row["completions"]
    if not isinstance(groups, list):
        raise UserError(f'{where}: "completions" must be a list, best first')
    groups = [g if isinstance(g, list) else [g] for g in groups]  # a tie is a nested list
    if any(not g or not all(isinstance(c, str) for c in g) for g in groups):
        raise UserError(f'{where}: "completions" must hold strings, or lists of strings for ties')
    ranks = [rank for rank, group in enumerate(groups) for _ in group]
    if len(ranks) < 2:
        raise UserError(f"{where}: a ranking needs at least two completions")
    return Ranking(prompt, [c for group in groups for c in group], ranks)


def nest_ties(completions: list[str], ranks: list[int]) -> list:
    """The inverse of parse_ranking: completions sorted by rank, ties as nested lists."""
    groups = [[c for c, r in zip(completions, ranks, strict=True) if r == rank] for rank in sorted(set(ranks))]
    return [g[0] if len(g) == 1 else g for g in groups]


def write_jsonl(path: str | Path, rows: list[dict]) -> None:
    """Write to a temporary name, then rename."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(path.name + ".tmp")
    with open(tmp, "w", encoding="utf-8", newline="\n") as f:
        f.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    os.replace(tmp, path)
