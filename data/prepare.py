"""Turn public instruction data into the project's files: Alpaca-style records -> demonstrations, prompts and preference
pairs.

    python -m data.prepare instruction-data-with-preference.json --out_dir out/real

Input: a JSON list, or JSON Lines, of records {"instruction", "input", "output"} and, for pairs, "chosen" and
"rejected". The prompt is the instruction, followed by its input on a new line where there is one. Held-out rows are
split off by prompt, so no prompt stands on both sides. Writes demonstrations, prompts and pairs, each with its
_held_out twin.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path

if __package__ in (None, ""):  # run as `python data/prepare.py`
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cli import UserError, check
from data.files import read_jsonl, text_field, write_jsonl


def read_records(path: Path) -> list[tuple[str, dict]]:
    """[("file:record number", record)] of a JSON list or of JSON Lines."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: can't be read as UTF-8 text ({error})") from None
    if not text.lstrip().startswith("["):
        return list(read_jsonl(path))
    try:
        records = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not valid JSON ({error.msg} at column {error.colno})") from None
    for number, record in enumerate(records, start=1):
        check(isinstance(record, dict), f"{path}: record {number} is not an object")
    return [(f"{path}: record {number}", record) for number, record in enumerate(records, start=1)]


def prompt_of(where: str, record: dict) -> str:
    instruction = text_field(where, record, "instruction").strip()
    extra = text_field(where, {"input": record.get("input") or ""}, "input").strip()
    return f"{instruction}\n{extra}" if extra else instruction


def prepare(path: Path, out_dir: Path, held_out: float, seed: int) -> dict[str, int]:
    """Write the six files; -> how many rows each got, and what was dropped."""
    check(0 <= held_out < 1, "--held_out must be in [0, 1)")
    records = read_records(path)
    check(bool(records), f"{path}: no records")
    by_prompt: dict[str, list[tuple[str, dict]]] = {}
    counts = {"without a prompt": 0, "without an output": 0, "pairs of equal texts": 0}
    for where, record in records:
        prompt = prompt_of(where, record)
        if not prompt:
            counts["without a prompt"] += 1
            continue
        by_prompt.setdefault(prompt, []).append((where, record))
    prompts = sorted(by_prompt)
    random.Random(seed).shuffle(prompts)
    n_held_out = round(held_out * len(prompts))

    written: dict[str, int] = {}
    for suffix, part in (("_held_out", prompts[:n_held_out]), ("", prompts[n_held_out:])):
        demonstrations, pairs = [], []
        for prompt in part:
            for where, record in by_prompt[prompt]:
                output = text_field(where, record, "output").strip() if "output" in record else ""
                if output:
                    demonstrations.append({"prompt": prompt, "completion": output})
                else:
                    counts["without an output"] += 1
                if "chosen" in record or "rejected" in record:
                    chosen, rejected = (text_field(where, record, key).strip() for key in ("chosen", "rejected"))
                    if chosen == rejected:  # says nothing: its loss is ln 2 whatever the model does
                        counts["pairs of equal texts"] += 1
                    else:
                        pairs.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
        for name, rows in (
            ("demonstrations", demonstrations),
            ("pairs", pairs),
            ("prompts", [{"prompt": p} for p in part]),
        ):
            if rows:
                write_jsonl(out_dir / f"{name}{suffix}.jsonl", rows)
                written[f"{name}{suffix}"] = len(rows)
    dropped = ", ".join(f"{n} {what}" for what, n in counts.items() if n)
    print(
        f"wrote to {out_dir}: "
        + ", ".join(f"{n} {name}" for name, n in written.items())
        + (f"; dropped {dropped}" if dropped else "")
    )
    return {**written, **counts}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="JSON list or JSON Lines of Alpaca-style records")
    parser.add_argument(
        "--out_dir", type=Path, default=Path("out/real"), help="folder for the files (default: out/real)"
    )
    parser.add_argument("--held_out", type=float, default=0.1, help="share of the prompts to hold out (default: 0.1)")
    parser.add_argument("--seed", type=int, default=1, help="seed of the split (default: 1)")
    args = parser.parse_args()
    try:
        prepare(args.file, args.out_dir, args.held_out, args.seed)
    except UserError as error:
        print(f"prepare.py: error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
