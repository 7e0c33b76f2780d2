"""Turns public data (instructions, conversations, preferences), in the form in which it is published, into the
project's files: demonstrations, prompts and preference pairs.

    python -m tools.prepare instruction-data-with-preference.json --out_dir out/real
    python -m tools.prepare helpful-base/train.jsonl.gz harmless-base/train.jsonl.gz --out_dir out/hh
    python -m tools.prepare comparisons/batch3.json comparisons/batch4.json --limit 5000 --out_dir out/tldr
    python -m tools.prepare train.parquet --prefix_words 8 --out_dir out/imdb

A file is a JSON list, JSON Lines, a table with a header (.csv, .tsv), each also as .gz, or Parquet. All its records
have one format. It is recognised by the fields of the first record, or named by --format:

    alpaca          {"instruction", "input", "output"}, perhaps with "chosen" and "rejected"; Dolly
    hh              {"chosen", "rejected"}: two transcripts "\\n\\nHuman: ...\\n\\nAssistant: ..." (Anthropic's HH-RLHF)
    tldr            {"info", "summaries", "choice"}: OpenAI's comparisons; {"subreddit", "title", "post", "summary"}
    pairs           {"prompt", "chosen", "rejected"}, strings or messages (UltraFeedback and most others), or
                    {"prompt", "response_0", "response_1", "better_response_id"} (PKU-SafeRLHF, SHP, HelpSteer3)
    messages        {"messages"} or {"conversations"}: [{"role", "content"}] or, as in ShareGPT, [{"from", "value"}]
    demonstrations  {"prompt", "completion"}, {"question", "answer"} and the like; with a "label", data for KTO
    text            {"text"} (IMDb): the first --prefix_words words are the prompt, the rest is the demonstration

A system prompt ("system"), a "history" and a "context" beside them become part of the prompt. An answer whose "label"
says that it is unwanted (false, 0, "bad", ...) is dropped. All names that are understood stand in tools/records.py;
fields that are not read are named. The last answer of a conversation is the completion, all before it is the prompt. A
chosen text is a demonstration too. White space and a spelt-out EOS (</s>) at the end of a text are removed. A record
that can't be used is dropped and counted; a field that is missing or of the wrong kind is an error. The rows are split
by how a conversation opens (the user's first turn), so no prompt and no two stages of one conversation are on both
sides. Writes demonstrations.jsonl, prompts.jsonl and pairs.jsonl, each with its NAME_held_out.jsonl.
"""

from __future__ import annotations

import dataclasses
import json
import math
import random
import re
import statistics
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from lib.cli import Flags, UserError, check, flag, run_main
from data.files import Prompt, prompt_json, text_field, turns_of, write_jsonl
from tools.records import ANSWERS, CONVERSATIONS, LABELS, PROMPTS, Dropped, Record, Turns, first_of, read_records
from tools.records import answer_turns, better_and_worse, check_wanted, compared, conversation, messages, opened
from tools.records import prompt_turns, records_inside, transcript


@dataclass
class Example:
    """One record in the project's terms."""

    prompt: str  # a Prompt if it has several turns
    completion: str = ""  # "": none
    pair: tuple[str, str] | None = None  # (chosen, rejected)


# ---------------------------------------------------------------------------------------------- records -> examples


def paired(chosen: Turns, rejected: Turns) -> Example:
    """The example of two conversations that differ in their last answer only."""
    prompt, better = conversation(chosen)
    other, worse = conversation(rejected)
    if turns_of(prompt) != turns_of(other):
        raise Dropped("different prompts in chosen and rejected")
    return Example(prompt, better, (better, worse))


def from_hh(where: str, record: dict) -> Example:
    chosen, rejected = (transcript(text_field(where, record, key)) for key in ("chosen", "rejected"))
    return paired(opened(where, record, chosen), opened(where, record, rejected))


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


def from_fields(where: str, record: dict) -> Example:
    """A prompt with two answers, of which one is better, or with one. Lists of messages hold the whole conversation, or
    only the answer: then the prompt holds the rest."""
    answers = better_and_worse(where, record)
    if not answers:
        return from_answer(where, record)
    better, worse = answers
    chosen, rejected = answer_turns(where, record, better), answer_turns(where, record, worse)
    if isinstance(record[better], list) and not isinstance(record[worse], list):
        raise UserError(f'{where}: "{worse}" must be a list of messages, as "{better}" is')
    if {turns[0][0] for turns in (chosen, rejected) if turns} == {"assistant"}:
        prompt = prompt_turns(where, record)
        example = paired(prompt + chosen, prompt + rejected)
    else:
        example = paired(opened(where, record, chosen), opened(where, record, rejected))
    if "instruction" in record and record.get("output"):  # a demonstration beside the pair
        example.completion = text_field(where, record, "output").strip()
    return example


def from_answer(where: str, record: dict) -> Example:
    prompt, key = prompt_turns(where, record), first_of(ANSWERS, record)
    if not key and "instruction" in record:  # a prompt alone
        return Example(*conversation([*prompt, ("assistant", "")]))
    lists = [k for k in ("completions", "answers", "responses") if isinstance(record.get(k), list)]
    advice = f"known names: {', '.join(ANSWERS)}; chosen and rejected; prompts alone need no preparation"
    advice = f'of "{lists[0]}" name the best "chosen" and another "rejected"' if lists else advice
    check(bool(key), f'{where}: no "completion" (found: {", ".join(record)}); {advice}')
    if key != "label":  # there it is the answer itself
        check_wanted(where, record)
    return Example(*conversation(prompt + answer_turns(where, record, key)))


def from_messages(where: str, record: dict) -> Example:
    turns = opened(where, record, messages(where, record, first_of(CONVERSATIONS, record) or "messages"))
    check_wanted(where, record)
    if "rejected_response" in record:  # as in ms-swift: the conversation ends with the better answer
        return paired(turns, turns[:-1] + answer_turns(where, record, "rejected_response"))
    while turns and turns[-1][0] == "user":  # a question that was never answered
        turns.pop()
    return Example(*conversation(turns))


def from_text(where: str, record: dict, prefix_words: int) -> Example:
    text = re.sub(r"<br\s*/?>", "\n", text_field(where, record, "text")).strip()  # IMDb's line breaks
    match = re.match(rf"(?:\S+\s+){{{prefix_words}}}", text)
    if not match:
        raise Dropped(f"no more than {prefix_words} words")
    return Example(match[0].rstrip(), text[match.end() :])


FORMATS = {
    "alpaca": (from_fields, "instruction, input, output"),
    "hh": (from_hh, "chosen, rejected: transcripts"),
    "tldr": (from_tldr, "info, summaries, choice"),
    "pairs": (from_fields, "prompt, chosen, rejected"),
    "messages": (from_messages, "messages or conversations"),
    "demonstrations": (from_fields, "prompt, completion or label"),
    "text": (from_text, "text"),
}


@dataclass
class Config(Flags):
    files: list[str] = flag([], "published data, see above", positional=True)
    format: str = flag("auto", "format of the records", choices=("auto", *FORMATS))
    out_dir: str = flag("out/real", "folder for the files")
    held_out: float = flag(0.1, "share of the openings to hold out", low=0, below=1)
    seed: int = flag(1, "seed of the split and of --limit")
    limit: int = flag(0, "examples to use, drawn at random (0: all)", low=0)
    prefix_words: int = flag(0, "words of a plain text that make its prompt", low=0)


# Names of fields that hold no answer.
META = r"(.*_)?(ids?|index|hash|source|lang(uage)?|category|topic|task|type|tags?|url|date|model|split|dataset|level)"


def format_of(record: dict) -> str:
    """The name in FORMATS that fits the fields; "" if none does."""
    if "instruction" in record:
        return "alpaca"
    if {"info", "summaries"} <= set(record) or {"post", "summary"} <= set(record):
        return "tldr"
    if compared(record):
        text, prompt = record.get("chosen", record.get("rejected")), first_of(PROMPTS, record)
        return "hh" if not prompt and isinstance(text, str) and "\n\nAssistant:" in text else "pairs"
    if first_of(CONVERSATIONS, record):
        return "messages"
    if first_of(PROMPTS, record):
        return "demonstrations"
    return "text" if "text" in record else ""


def format_of_file(path: Path, records: list[tuple[str, dict]]) -> str:
    """The format of the first record. UserError for the first record that is clearly of another."""
    where, first = records[0]
    name, found = format_of(first), shortened(" ".join(", ".join(first).split())) or "nothing"
    root = first["prompt"] if isinstance(first.get("prompt"), dict) else first
    tree = 'a message tree; write every path from its root to an answer as {"messages": [{"role", "content"}, ...]}'
    check(not {"message_tree_id", "replies", "children", "mapping"} & set(root), f"{where}: {tree}")
    known = "; ".join(f"{key}: {fields}" for key, (_, fields) in FORMATS.items())
    advice = records_inside(path, first) or "give its fields these names"
    check(bool(name), f"{where}: none of the known formats (found: {found}); known are {known}; {advice}")
    for where, record in records:
        other = format_of(record) or name  # a record of no format lacks a field: its reader will say which
        advice = f"({FORMATS[name][1]}); --format {name} reads all records alike"
        check(other == name, f"{where}: looks like {other}, but the file began as {name} {advice}")
    return name


def text_advice(records: list[tuple[str, dict]]) -> str:
    """What to do with records of {"text"} when nobody said how many words make the prompt."""
    texts = [text_field(where, record, "text").strip() for where, record in records]
    marks = re.findall(rf"{MARKS}|(?:\A|\n)(?:Human|User|Assistant):", texts[0])
    if len(set(marks)) > 1:
        advice = 'write each as {"messages": [{"role", "content"}, ...]}'
        return f"whole conversations as texts ({marks[0].strip()} ...); {advice}"
    asked = sum(text.endswith(("?", "？")) for text in texts)
    if asked > len(texts) / 2 or any("question" in name for name in records[0][1]):
        return 'questions without answers; write each as {"prompt": "..."}, which needs no preparation'
    answers = [k for k, v in records[0][1].items() if k != "text" and isinstance(v, str) and not re.fullmatch(META, k)]
    advice = f'; if "{answers[0]}" answers the text, name the two "prompt" and "completion"' if answers else ""
    return f"plain texts need --prefix_words N, how many make the prompt{advice}"


def read_examples(path: Path, format: str, prefix_words: int, dropped: Counter) -> list[Example]:
    """The examples of one file. `dropped` counts, by reason, the records that give none."""
    records = read_records(path)
    format = format if format != "auto" else format_of_file(path, records)
    if format == "text" and not prefix_words:
        raise UserError(f"{path}: {text_advice(records)}")
    check(format == "text" or not prefix_words, f"{path}: --prefix_words is for plain texts, these are {format}")
    read = FORMATS[format][0] if format != "text" else partial(from_text, prefix_words=prefix_words)
    examples = []
    for where, record in records:
        try:
            examples.append(read(where, record))
        except Dropped as why:
            dropped[str(why)] += 1
    check_fields(path, records, examples)
    return examples


def check_fields(path: Path, records: list[tuple[str, Record]], examples: list[Example]) -> None:
    """Print which fields were not read. UserError if no example has an answer although such a field may hold it, or if
    only some records have a label."""
    read, ignored = records[0][1].read, records[0][1].ignored
    fields = {key for _, record in records for key in record}
    unread, labels = sorted(fields - read), fields & read & set(LABELS) - {"chosen"}  # mostly the better one of a pair
    answered = not examples or any(e.completion or e.pair for e in examples)
    advice = 'name an answer "output", a better and a worse one "chosen" and "rejected", and remove what is neither'
    for where, record in records:
        missing = f'no "{", ".join(sorted(labels))}", which other records have'
        check(not labels or bool(labels & set(record)), f"{where}: {missing}")
        texts = [k for k in unread if isinstance(dict.get(record, k), (str, list, dict)) and not re.fullmatch(META, k)]
        check(answered or not texts, f"{where}: nothing but prompts, but {', '.join(texts)} may hold answers; {advice}")
    if unread or ignored:
        print(f"{path}: not read: {', '.join([*unread, *sorted(ignored)])}")


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
# What other tools read as more than its characters: special tokens, pictures, the turns of a template.
MARKS = (
    r"<[|｜][^<>\s]{1,40}[|｜]>|</?s>|\[/?INST\]|<</?SYS>>|<(?:start|end)_of_turn>|</?(?:image|img|video|audio)>|"
    r"### ?(?:Human|Assistant|Instruction|Response):"
)


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
    same = example.pair and example.completion == example.pair[0]  # counted once
    return Example(prompt, pair[0] if same else clean(example.completion), pair)


def marks_in(examples: list[Example]) -> Counter:
    """How many examples hold each of the MARKS."""
    texts = ["\n".join([e.prompt, e.completion, *(e.pair or ())]) for e in examples]
    return Counter(mark for text in texts for mark in set(re.findall(MARKS, text)))


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


def prepare(
    paths: Path | list[Path], out_dir: Path, held_out: float, seed: int, format="auto", limit=0, prefix_words=0
) -> Counter:
    """Write the six files, and print a summary. Parameters as in Config -> {file: rows, reason: dropped}."""
    dropped: Counter = Counter()
    paths = paths if isinstance(paths, list) else [paths]
    eos: Counter = Counter()
    examples = [e for path in paths for e in read_examples(path, format, prefix_words, dropped)]
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
    for mark, n in marks_in(examples).most_common(8):
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
    options = dataclasses.asdict(config)
    prepare(list(map(Path, options.pop("files"))), Path(options.pop("out_dir")), **options)
    return {}


def main() -> None:
    run_main(run, Config, __doc__)


if __name__ == "__main__":
    main()
