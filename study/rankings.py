"""Joins files of rankings, or writes the best completion of each ranking as a demonstration.

python -m study.rankings --rankings a.jsonl b.jsonl --out both.jsonl
python -m study.rankings --rankings out/data/rankings.jsonl --best --out best.jsonl     # SFT on the best of K
"""

from __future__ import annotations

from dataclasses import dataclass

from lib.cli import Flags, check, flag, run_main
from data.files import parse_ranking, prompt_json, read_jsonl, write_jsonl


@dataclass
class Config(Flags):
    rankings: list[str] = flag(["out/data/rankings.jsonl"], "files of rankings or pairs")
    best: bool = flag(False, "write demonstrations: each prompt with its best completion")
    out: str = flag("", "file to write")


def run(config: Config) -> dict:
    check(bool(config.out), "--out: name the file to write")
    rows = [(where, row) for path in config.rankings for where, row in read_jsonl(path)]
    ranked = [parse_ranking(where, row) for where, row in rows]  # best first
    best = [{"prompt": prompt_json(r.prompt), "completion": r.completions[0]} for r in ranked]
    write_jsonl(config.out, best if config.best else [row for _, row in rows])
    print(f"wrote {len(rows):,} rows to {config.out}")
    return {"rows": len(rows)}


def main() -> None:
    run_main(run, Config, __doc__)


if __name__ == "__main__":
    main()
