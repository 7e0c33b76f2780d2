"""Collect preferences: sample K completions of each prompt from one or several policies, let annotators rank them.

    python collect.py                                     # simulated annotators, the embedded task
    python collect.py --annotator human --n_prompts 20    # you rank, in the terminal
    python collect.py --annotator web --n_prompts 20 --annotator_name anna --repeat 0.1    # or in the browser

Appends to a rankings file as it goes and skips prompts that stand there already, so it can be stopped and run again.
How people are asked is in tools/annotate.py; `python -m tools.annotate anna.jsonl ben.jsonl` says how far they agree.
Ranking is asked for, not scoring: people agree on which of two answers is better far more than on what number one
deserves.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from data.batches import encode_prompts
from data.files import can_be_written, mend_last_line, nest_ties, parse_ranking, prompt_json, read_jsonl, read_prompts
from data.tiny import annotator_ranking, annotators_agreement, task_of
from lib.checkpoint import load_model, note_task
from lib.cli import DTYPES, Flags, UserError, check, flag, run_main
from lib.reward import gold_function
from lib.run import hold
from lib.train import autocast, generator_for, pick_device
from sampling import generate
from tools.annotate import Sample, Session, in_browser, in_terminal


@dataclass
class Config(Flags):
    policies: list[str] = flag(["out/sft"], "checkpoints to sample from, in turn")
    temperatures: list[float] = flag([1.0], "sampling temperatures, in turn", above=0)
    prompts: str = flag("out/data/prompts.jsonl", "prompts to complete")
    skip: int = flag(0, "prompts to leave out at the start of the file", low=0)
    n_prompts: int = flag(5000, "prompts to use after those (0: all)", low=0)
    completions: int = flag(4, "completions K of each prompt", low=2)
    max_new_tokens: int = flag(48, "longest completion, tokens", low=1)
    annotator: str = flag(
        "simulated",
        "who ranks: simulated (noisy, from the gold reward), human (in this terminal) or web (in the browser)",
        choices=("simulated", "human", "web"),
    )
    annotator_name: str = flag("", "the person's name, kept in each row and in the name of the file")
    repeat: float = flag(0.0, "share of a person's items to show a second time, for self-agreement", low=0, high=1)
    port: int = flag(8765, "of the page, on 127.0.0.1", low=1024, high=65535)
    annotator_temperature: float = flag(
        0.5,
        "noise of the simulated annotators, in units of the gold reward",
        above=0,
    )
    gold: str = flag(
        "auto", "true reward behind the simulated annotators, file.py:function (auto: the embedded task's)"
    )
    out: str = flag("auto", "file to append to (auto: beside the prompts, prompts_test.jsonl -> rankings_test.jsonl)")
    batch_size: int = flag(64, "prompts sampled at a time", low=1)
    seed: int = flag(1, "seed of samples and annotators", low=0)
    device: str = flag("auto", "auto, cpu, cuda or mps")
    dtype: str = flag("float32", "of the matrix products", choices=DTYPES)


def rank_simulated(completions: list[str], rewards: list[float], temperature: float, rng: random.Random) -> list[int]:
    """Ranks 0, 1, ... of K completions. Different texts are ranked by Plackett-Luce; equal texts tie."""
    reward_of = dict(zip(completions, rewards, strict=True))
    texts = list(reward_of)
    order = annotator_ranking([reward_of[t] for t in texts], temperature, rng)
    rank_of = {texts[i]: rank for rank, i in enumerate(order)}
    return [rank_of[c] for c in completions]


def already_ranked(path: Path) -> set[str]:
    """Prompts in the file. A last line that a crash cut short is taken off, so that appending starts on a fresh
    line."""
    mend_last_line(path)
    return {parse_ranking(where, row).prompt for where, row in read_jsonl(path)} if path.exists() else set()


def rankings_file(config: Config) -> Path:
    if config.out != "auto":
        return Path(config.out)
    prompts = Path(config.prompts)
    name = prompts.name.replace("prompts", "rankings")
    path = prompts.with_name(name if name != prompts.name else f"{prompts.stem}_rankings{prompts.suffix}")
    return path.with_name(f"{path.stem}_{config.annotator_name}{path.suffix}") if config.annotator_name else path


def sampled_chunks(
    config: Config, prompts: list[str], ids: list[list[int]], sources: list, tokenizer, device, done: set[str]
) -> Iterator[tuple[random.Random, list[tuple[str, list[Sample]]]]]:
    """--batch_size prompts at a time, each with its K samples, and random numbers for what is left to do with them.
    Left out: chunks that lie in `done`. sources: (model, temperature); completion k comes from source k mod len."""
    people = config.annotator != "simulated"
    for first in tqdm(range(0, len(prompts), config.batch_size), desc="collect", mininterval=1, disable=people):
        chunk = prompts[first : first + config.batch_size]
        if done.issuperset(chunk):
            continue
        if people:
            print(f"sampling {config.completions} answers to each of {len(chunk)} prompts ...", flush=True)
        # Every chunk has its own random streams, so a run that was stopped goes on as if it had not been.
        rng = random.Random(f"{config.seed} {first}")
        samples: list[list[Sample]] = [[] for _ in chunk]
        for source, (model, temperature) in enumerate(sources):
            count = len(range(source, config.completions, len(sources)))
            repeated = [p for p in ids[first : first + len(chunk)] for _ in range(count)]
            options = {"eos_id": tokenizer.eos_id, "temperature": temperature}
            options["generator"] = generator_for(device, config.seed, first, source)
            with autocast(device, config.dtype):
                rollout = generate(model, repeated, config.max_new_tokens, **options)
            for row, (completion, ended) in enumerate(zip(rollout.completions(), rollout.ended.tolist(), strict=True)):
                samples[row // count].append(Sample(tokenizer.decode(completion), ended))
        yield rng, list(zip(chunk, samples, strict=True))


def simulate(config: Config, chunks: Iterator, gold: Callable, path: Path, done: set[str]) -> int:
    """Rank the samples by the gold reward, with noise; append to the file. -> rankings written"""
    written = 0
    with open(path, "a", encoding="utf-8", newline="\n") as file:
        for rng, chunk in chunks:
            for prompt, answers in chunk:
                rng.shuffle(answers)  # as for people, so that the order of equal ranks says nothing either
                texts, ended = [s.text for s in answers], [s.ended for s in answers]
                golds = gold([prompt] * len(texts), texts, ended)
                ranks = rank_simulated(texts, golds, config.annotator_temperature, rng)
                if prompt in done:
                    continue
                best_first = sorted(range(len(texts)), key=lambda i: ranks[i])
                row: dict = {"prompt": prompt_json(prompt), "completions": nest_ties(texts, ranks)}
                row["ended"] = [ended[i] for i in best_first]
                # What the annotators knew, for measuring; no stage learns from it.
                row["gold"] = [round(golds[i], 4) for i in best_first]
                row["annotator_temperature"] = config.annotator_temperature
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                file.flush()
                done.add(prompt)
                written += 1
    return written


def shuffled_items(chunks: Iterator) -> Iterator[list[tuple[str, list[Sample]]]]:
    for rng, chunk in chunks:
        for _, answers in chunk:
            rng.shuffle(answers)  # so that the place on the screen says nothing about where a completion came from
        yield chunk


def run(config: Config) -> dict:
    check(bool(config.policies) and bool(config.temperatures), "--policies and --temperatures need a value each")
    check(re.fullmatch(r"[\w-]*", config.annotator_name) is not None, "--annotator_name takes letters, digits, _ and -")
    path = rankings_file(config)
    check(not path.is_dir(), f"--out {path} is a folder; name a file in it")
    device = pick_device(config.device)
    loaded = [load_model(p, device, made_by="python sft.py") for p in config.policies]
    tokenizer = loaded[0].tokenizer
    check(all(c.vocabulary == tokenizer.saved for c in loaded), "the policies must share one tokenizer")
    prompts = read_prompts(config.prompts, "python -m data.tiny")[config.skip :][: config.n_prompts or None]
    check(bool(prompts), f"{config.prompts}: no prompts left after --skip {config.skip}")
    task = task_of(config.prompts)
    for policy in loaded:
        note_task(policy, task, config.prompts)
    gold = gold_function(config.gold, task)
    if config.annotator == "simulated" and gold is None:
        raise UserError("simulated annotators need --gold file.py:function; or rank yourself with --annotator human")
    block_size = min(c.model.config.block_size for c in loaded)
    ids = encode_prompts(prompts, tokenizer, block_size, config.max_new_tokens, config.prompts)
    sources = [(c.model, t) for c in loaded for t in config.temperatures]
    few = f"--completions {config.completions} is less than the {len(sources)} pairs of --policies and --temperatures"
    check(config.completions >= len(sources), f"{few}: some would never be sampled")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {path}: {path.parent} can't be made a folder ({error.strerror})") from None

    # two processes that write to one file would rank everything twice
    with hold(path.with_name(path.name + ".lock")):
        done = already_ranked(path)
        stood_already = len(done)
        sampling = (config, prompts, ids, sources, tokenizer, device)
        if config.annotator == "simulated":
            with can_be_written(path):
                written = simulate(config, sampled_chunks(*sampling, done), gold, path, done)
        else:
            session = Session(path, prompts, config.annotator_name, config.repeat)
            items = shuffled_items(sampled_chunks(*sampling, session.done))
            if config.annotator == "human":
                in_terminal(session, items)
            else:
                in_browser(session, items, config.port)
            written = session.written
    already = f" ({stood_already} stood there already)" if stood_already else ""
    print(f"wrote {written} rankings of {config.completions} completions to {path}{already}")
    if config.annotator == "simulated":
        agreement = annotators_agreement(str(path))
        print(f"two such annotators agree on {agreement:.0%} of the pairs" if agreement else "nothing to compare")
    else:
        print(session.report())
    return {"written": written}


def main() -> None:
    run_main(run, Config, __doc__)


if __name__ == "__main__":
    main()
