"""Turns public data (instructions, conversations, preferences), in the form in which it is published, into the
project's files: demonstrations, prompts and preference pairs.

    python -m tools.prepare instruction-data-with-preference.json --out_dir out/real
    python -m tools.prepare helpful-base/train.jsonl.gz harmless-base/train.jsonl.gz --out_dir out/hh
    python -m tools.prepare comparisons/batch3.json comparisons/batch4.json --limit 5000 --out_dir out/tldr
    python -m tools.prepare train.parquet --prefix_words 8 --out_dir out/imdb

A file is a JSON list, JSON Lines, a table with a header (.csv, .tsv), each also as .gz, or Parquet. Its records are
known by their fields:

    {"prompt", "completion"}           one answer (Alpaca, Dolly and most others); with a "label", data for KTO
    {"prompt", "chosen", "rejected"}   two answers, texts or messages (UltraFeedback and most others), or
    {"prompt", "response_0", "response_1", "better_response_id"}   two and a field that chooses (PKU-SafeRLHF, SHP)
    {"chosen", "rejected"}             two transcripts "\\n\\nHuman: ...\\n\\nAssistant: ..." (Anthropic's HH-RLHF)
    {"messages"}, {"conversations"}    [{"role", "content"}] or, as in ShareGPT, [{"from", "value"}]
    {"info", "summaries", "choice"}    OpenAI's TL;DR comparisons; also {"subreddit", "title", "post", "summary"}
    {"text"}                           IMDb: the first --prefix_words words are the prompt, the rest the demonstration

A system prompt ("system"), a "history" and a "context" beside them become part of the prompt. An answer whose "label"
says that it is unwanted (false, 0, "bad", ...) is dropped. All names that are understood stand in tools/records.py;
fields that are not read are named. The last answer of a conversation is the completion; a chosen text is a
demonstration too. A record that can't be used is dropped and counted; a field that is missing or of the wrong kind is
an error. The rows are split by how a conversation opens (the user's first turn), so no prompt and no two stages of one
conversation are on both sides. Writes demonstrations.jsonl, prompts.jsonl and pairs.jsonl, each with a _held_out twin.
"""

from __future__ import annotations

import json
import math
import random
import re
import statistics
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from lib.cli import Flags, UserError, check, flag, run_main
from data.files import Prompt, prompt_json, text_field, turns_of, write_jsonl
from tools.records import ANSWERS, CONVERSATIONS, LABELS, PROMPTS, Dropped, answer_turns, better_and_worse, check_wanted
from tools.records import conversation, first_of, messages, prompt_turns, read_records


@dataclass
class Example:
    """One record in the project's terms."""

    prompt: str  # a Prompt if it has several turns
    completion: str = ""  # "": none
    pair: tuple[str, str] | None = None  # (chosen, rejected)


# ---------------------------------------------------------------------------------------------- records -> examples


def from_record(where: str, record: dict) -> Example:
    if {"info", "summaries"} <= set(record) or {"post", "summary"} <= set(record):
        return from_tldr(where, record)
    compared = better_and_worse(where, record)
    return from_pair(where, record, *compared) if compared else from_answer(where, record)


def from_tldr(where: str, record: dict) -> Example:
    """The prompt is written as in Stiennon et al. (2020). Some later batches compare summaries of news articles."""
    info = record.get("info", record)
    check(isinstance(info, dict), f'{where}: "info" must be an object')
    if info.get("article"):
        prompt = f"Article:\n\n{text_field(where, info, 'article').strip()}\n\nTL;DR:"
    else:
        subreddit, title, post = (text_field(where, info, key).strip() for key in ("subreddit", "title", "post"))
        prompt = f"SUBREDDIT: r/{subreddit}\n\nTITLE: {title}\n\nPOST: {post}\n\nTL;DR:"
    if "info" not in record:
        return Example(prompt, text_field(where, record, "summary").strip())
    summaries, choice = record.get("summaries"), record.get("choice")
    if not isinstance(summaries, list) or len(summaries) != 2 or not all(isinstance(s, dict) for s in summaries):
        raise UserError(f'{where}: "summaries" must be a list of two objects (found: {", ".join(record)})')
    check(type(choice) is int and choice in (0, 1), f'{where}: "choice" must be 0 or 1 (found: {choice!r})')
    texts = [text_field(f"{where}: summary {n}", summary, "text").strip() for n, summary in enumerate(summaries, 1)]
    return Example(prompt, texts[choice], (texts[choice], texts[1 - choice]))


def from_pair(where: str, record: dict, better: str, worse: str) -> Example:
    """Two answers, each in its field. Each holds the whole conversation, or only the answer: then the prompt holds the
    rest."""
    chosen, rejected = answer_turns(where, record, better), answer_turns(where, record, worse)
    alone = all(turns[0][0] == "assistant" for turns in (chosen, rejected) if turns)
    before = prompt_turns(where, record) if alone else []
    prompt, chosen = conversation(where, record, before + chosen)
    other, rejected = conversation(where, record, before + rejected)
    if turns_of(prompt) != turns_of(other):
        raise Dropped("different prompts in chosen and rejected")
    beside = "instruction" in record and record.get("output")  # Alpaca's demonstration
    return Example(prompt, text_field(where, record, "output").strip() if beside else chosen, (chosen, rejected))


def from_answer(where: str, record: dict) -> Example:
    """A conversation, or a prompt and an answer."""
    talk, key = first_of(CONVERSATIONS, record), first_of(ANSWERS, record)
    if talk and "instruction" not in record:
        turns = messages(where, record, talk)
        check_wanted(where, record)
        while turns and turns[-1][0] == "user":  # a question that was never answered
            turns.pop()
        return Example(*conversation(where, record, turns))
    prompt = prompt_turns(where, record)
    advice = 'of several answers name two "chosen" and "rejected"; {"prompt": "..."} alone needs no preparation'
    found = f"(found: {', '.join(record)}); known names: {', '.join(ANSWERS)}; {advice}"
    check(bool(key), f'{where}: no "completion" {found}')
    if key != "label":  # there it is the answer itself
        check_wanted(where, record)
    return Example(*conversation(where, record, prompt + answer_turns(where, record, key)))


def from_text(where: str, record: dict, prefix_words: int) -> Example:
    text = re.sub(r"<br\s*/?>", "\n", text_field(where, record, "text")).strip()  # IMDb's line breaks
    match = re.match(rf"(?:\S+\s+){{{prefix_words}}}", text)
    if not match:
        raise Dropped(f"no more than {prefix_words} words")
    return Example(match[0].rstrip(), text[match.end() :])


@dataclass
class Config(Flags):
    files: list[str] = flag([], "published data, see above", positional=True)
    out_dir: str = flag("out/real", "folder for the files")
    held_out: float = flag(0.1, "share of the openings to hold out", low=0, below=1)
    seed: int = flag(1, "seed of the split and of --limit")
    limit: int = flag(0, "examples to use, drawn at random (0: all)", low=0)
    prefix_words: int = flag(0, "words of a plain text that make its prompt", low=0)


def read_examples(path: Path, prefix_words: int, dropped: Counter) -> list[Example]:
    """The examples of one file. `dropped` counts, by reason, the records that give none."""
    records = read_records(path)
    where, first = records[0]
    tree = 'a message tree; write every path from its root to an answer as {"messages": [{"role", "content"}, ...]}'
    check(not {"message_tree_id", "replies", "mapping"} & set(first), f"{where}: {tree}")
    if "text" in first and not first_of(PROMPTS, first):
        advice = "plain texts need --prefix_words N, how many make the prompt"
        others = 'questions are {"prompt": "..."}, conversations {"messages": [{"role", "content"}, ...]}'
        check(prefix_words > 0, f"{path}: {advice}; if these are no plain texts, write them otherwise: {others}")
    else:
        check(not prefix_words, f"{path}: --prefix_words is for plain texts (found: {', '.join(first) or 'nothing'})")
    examples = []
    for where, record in records:
        try:
            example = from_text(where, record, prefix_words) if prefix_words else from_record(where, record)
            examples.append(example)
        except Dropped as why:
            dropped[str(why)] += 1

    fields = {key for _, record in records for key in record}
    labels = fields & first.read & set(LABELS)
    for where, record in records:
        missing = f'no "{", ".join(sorted(labels))}", which other records have'
        check(not labels or bool(labels & set(record)), f"{where}: {missing}")
    unread = [*sorted(fields - first.read), *sorted(first.ignored)]
    if unread:
        print(f"{path}: not read: {', '.join(unread)}")
    return examples


# ---------------------------------------------------------------------------------------------- examples -> files


def split(examples: list[Example], held_out: float, seed: int) -> dict[str, list[Example]]:
    """{"": the examples for training, "_held_out": the others}. Examples with the same first turn of the user's stay
    together; held_out is the share of these turns."""
    groups: dict[str, list[Example]] = {}
    for example in examples:
        opening = next(text for role, text in turns_of(example.prompt) if role == "user")
        groups.setdefault(opening, []).append(example)
    openings = sorted(groups)
    random.Random(seed).shuffle(openings)
    n = round(held_out * len(openings))
    sides = {"": openings[n:], "_held_out": openings[:n]}
    return {suffix: [e for opening in side for e in groups[opening]] for suffix, side in sides.items()}


EOS = r"""(<[|｜]([^<>]{0,20}[^a-z<>])?(end|eos|eot|eom|eod)[^<>]{0,20}[|｜]>|</s>|<eos>|<eot>|<eod>|\[EOS\]|
    <end_of_turn>|<end_of_utterance>)\Z"""
# What other tools read as more than its characters: special tokens, pictures.
MARKS = r"<[|｜][^<>\s]{1,40}[|｜]>|</?s>|\[/?INST\]|<</?SYS>>|<(?:start|end)_of_turn>|</?(?:image|img|video|audio)>"


def without_eos(example: Example, found: Counter) -> Example:
    """The example without the EOS tokens that its texts spell at their ends: the stages put in the vocabulary's own.
    `found` counts them."""

    def clean(text: str) -> str:
        while match := re.search(EOS, text, re.IGNORECASE | re.VERBOSE):
            found[match[0]] += 1
            text = text[: match.start()].rstrip()
        return text

    prompt = Prompt.of([(role, clean(text)) for role, text in turns_of(example.prompt)])
    pair = example.pair and (clean(example.pair[0]), clean(example.pair[1]))
    return Example(prompt, clean(example.completion), pair)


def rows_of(examples: list[Example], dropped: Counter) -> dict[str, list[dict]]:
    """{name of a file: its rows}. A prompt or a demonstration that comes again (a post has many comparisons) is written
    once, a pair as often as it was judged. `dropped` counts what gives no row."""
    prompts, demonstrations, pairs = {}, {}, []
    for example in examples:
        prompt, turns = prompt_json(example.prompt), turns_of(example.prompt)
        prompts[turns] = {"prompt": prompt}
        if example.completion:
            dropped["repeated demonstrations"] += (turns, example.completion) in demonstrations
            demonstrations[turns, example.completion] = {"prompt": prompt, "completion": example.completion}
        elif not example.pair or example.pair[0]:  # an empty chosen text is counted below
            dropped["without an output"] += 1
        if example.pair:
            chosen, rejected = example.pair
            if chosen == rejected:  # teaches nothing: its loss is ln 2 whatever the model does
                dropped["pairs of equal texts"] += 1
            elif not chosen:  # would teach silence; an empty rejected text teaches to answer, so it stays
                dropped["pairs with an empty chosen text"] += 1
            else:
                pairs.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return {"demonstrations": [*demonstrations.values()], "prompts": [*prompts.values()], "pairs": pairs}


# One character of a script without spaces between words: Chinese, Japanese, Thai, Lao, Burmese, Khmer.
UNSPACED = "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3000-\u30ff\u3400-\u9fff\uff00-\uff65\U00020000-\U0003ffff]"


def print_lengths(key: str, rows: list[dict]) -> None:
    """Print one line: how many words the texts row[key] have. In a script without spaces a character counts as one."""
    texts = [" ".join(m["content"] for m in row[key]) if isinstance(row[key], list) else row[key] for row in rows]
    words = sorted(len(re.sub(UNSPACED, " x ", text).split()) for text in texts)
    if words:
        at_95 = words[math.ceil(0.95 * len(words)) - 1]
        print(f"{key:<12}{statistics.median(words):>8.0f}{at_95:>8}{words[-1]:>8}")


def shortened(value):
    """The same JSON value, with the middle of its long strings left out."""
    if isinstance(value, str):
        return value if len(value) <= 90 else f"{value[:42]} ... {value[-42:]}"
    if isinstance(value, list):
        return [shortened(v) for v in value]
    return {k: shortened(v) for k, v in value.items()}


def prepare(paths: Path | list[Path], out_dir: Path, held_out: float, seed: int, limit=0, prefix_words=0) -> Counter:
    """Write the six files, and print a summary. Parameters as in Config -> {file: rows, reason: dropped}."""
    dropped: Counter = Counter()
    paths = paths if isinstance(paths, list) else [paths]
    eos: Counter = Counter()
    examples = [e for path in paths for e in read_examples(path, prefix_words, dropped)]
    names = ", ".join(map(str, paths))
    check(bool(examples), f"{names}: nothing left; dropped {', '.join(f'{n} {why}' for why, n in dropped.items())}")
    if 0 < limit < len(examples):  # drawn at random: a published file may be sorted (IMDb's is, by its label)
        print("".join(f"dropped before the draw: {n} {why}\n" for why, n in dropped.items()), end="")
        print(f"drawn: {limit} of {len(examples)} examples")
        dropped.clear()
        examples = [examples[i] for i in sorted(random.Random(seed).sample(range(len(examples)), limit))]
    examples = [without_eos(example, eos) for example in examples]

    files = {suffix: rows_of(side, dropped) for suffix, side in split(examples, held_out, seed).items()}
    written: Counter = Counter()
    for suffix, rows_by_name in files.items():
        for name, rows in rows_by_name.items():
            path = out_dir / f"{name}{suffix}.jsonl"
            if rows:
                write_jsonl(path, rows)
                written[f"{name}{suffix}"] = len(rows)
            elif path.exists():
                print(f"careful: {path} is from an earlier run, this data has none")

    print(f"wrote to {out_dir}: " + ", ".join(f"{n} {name}" for name, n in written.items()))
    print("".join(f"dropped: {n} {why}\n" for why, n in dropped.items() if n), end="")
    demonstrations, prompts, pairs = (rows + files["_held_out"][name] for name, rows in files[""].items())
    print("".join(f"removed: {n} {mark} at the end of a text\n" for mark, n in eos.items()), end="")
    texts = ["\n".join([e.prompt, e.completion, *(e.pair or ())]) for e in examples]
    marks = Counter(mark for text in texts for mark in set(re.findall(MARKS, text)))
    for mark, n in marks.most_common(8):
        print(f"careful: {mark} in {n} examples; it is learned as ordinary characters, no picture and no special token")
    empty = sum(not pair["rejected"] for pair in pairs)
    print(f"kept: {empty} pairs with an empty rejected text\n" if empty else "", end="")
    if re.search(UNSPACED, "".join(map(str, prompts[:100] + demonstrations[:100]))):
        print("words: in scripts without spaces the characters are counted")
    print(f"{'words':<12}{'median':>8}{'95%':>8}{'longest':>8}")
    for key, rows in (("prompt", prompts), ("completion", demonstrations), ("chosen", pairs), ("rejected", pairs)):
        print_lengths(key, rows)
    for row in (pairs or demonstrations or prompts)[:3]:
        print(json.dumps(shortened(row), ensure_ascii=False))
    return written + dropped


def run(config: Config) -> dict:
    c = config
    prepare([Path(file) for file in c.files], Path(c.out_dir), c.held_out, c.seed, c.limit, c.prefix_words)
    return {}


def main() -> None:
    run_main(run, Config, __doc__)


if __name__ == "__main__":
    main()
