"""Collect preferences: sample K completions of each prompt from one or several policies, let annotators rank them.

    python collect.py                                     # simulated annotators, the embedded task
    python collect.py --annotator human --n_prompts 20    # you rank, in the terminal

Appends to a rankings file as it goes and skips prompts that stand there already, so it can be stopped and run again.
Ranking is asked for, not scoring: people agree on which of two answers is better far more than on what number one
deserves.
"""

from __future__ import annotations

import json
import os
import random
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from cli import UserError, check, check_ranges, flag, run_main
from common import call_reward, generator_for, gold_function, load_model, note_task, pick_device
from data.batches import encode_prompts
from data.files import nest_ties, parse_ranking, read_jsonl, read_prompts
from data.tiny import annotator_ranking, annotators_agreement, task_of
from data.tokenizer import load_tokenizer
from model import generate


@dataclass
class Config:
    policies: list[str] = flag(["out/sft"], "checkpoints to sample from, in turn")
    temperatures: list[float] = flag([1.0], "sampling temperatures, in turn", above=0)
    prompts: str = flag("out/data/prompts.jsonl", "prompts to complete")
    skip: int = flag(0, "prompts to leave out at the start of the file", low=0)
    n_prompts: int = flag(5000, "prompts to use after those (0: all)", low=0)
    completions: int = flag(4, "completions K of each prompt", low=2)
    max_new_tokens: int = flag(48, "longest completion, tokens", low=1)
    annotator: str = flag(
        "simulated",
        "who ranks: simulated (noisy, from the gold reward) or human (in this terminal)",
        choices=("simulated", "human"),
    )
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


def rank_simulated(completions: list[str], rewards: list[float], temperature: float, rng: random.Random) -> list[int]:
    """Ranks 0, 1, ... of K completions. Different texts are ranked by Plackett-Luce; equal texts tie."""
    reward_of = dict(zip(completions, rewards, strict=True))
    texts = list(reward_of)
    order = annotator_ranking([reward_of[t] for t in texts], temperature, rng)
    rank_of = {texts[i]: rank for rank, i in enumerate(order)}
    return [rank_of[c] for c in completions]


class Sample(NamedTuple):
    text: str
    ended: bool  # False: cut by --max_new_tokens


def rank_human(prompt: str, answers: list[Sample]) -> list[int] | None:
    """Ask for an order such as `2 1=3 4` (best first, = for ties). None to skip the prompt."""
    print(f"\n{prompt}")
    for number, answer in enumerate(answers, start=1):
        print(f"  {number}: {answer.text}" + ("" if answer.ended else "   [cut]"))
    example = " ".join(map(str, range(len(answers), 0, -1)))
    while True:
        try:
            typed = input("best first, = for ties, s to skip, q to stop > ").strip()
        except EOFError:
            typed = "q"
        if typed == "q":
            raise KeyboardInterrupt
        if typed == "s":
            return None
        ranks = parse_order(typed, len(answers))
        if ranks is not None:
            return ranks
        print(f"  name each of 1..{len(answers)} once, for example: {example}")


def parse_order(answer: str, k: int) -> list[int] | None:
    """`2 1=3` -> [1, 0, 1]: the rank of each completion; None if not every number is named once."""
    groups = [group.split("=") for group in answer.replace(" =", "=").replace("= ", "=").split()]
    flat = [number for group in groups for number in group]
    if sorted(flat) != sorted(str(i) for i in range(1, k + 1)):
        return None
    rank_of = {number: rank for rank, group in enumerate(groups) for number in group}
    return [rank_of[str(i)] for i in range(1, k + 1)]


def already_ranked(path: Path) -> set[str]:
    """Prompts in the file. A last line that a crash cut short is taken off, so that appending starts on a fresh
    line."""
    if not path.exists():
        return set()
    content = path.read_bytes()
    if content and not content.endswith(b"\n"):
        os.truncate(path, content.rfind(b"\n") + 1)  # in place: what stands there may be hours of somebody's work
    return {parse_ranking(where, row).prompt for where, row in read_jsonl(path)}


def rankings_file(config: Config) -> Path:
    if config.out != "auto":
        return Path(config.out)
    prompts = Path(config.prompts)
    name = prompts.name.replace("prompts", "rankings")
    return prompts.with_name(name if name != prompts.name else f"{prompts.stem}_rankings{prompts.suffix}")


def run(config: Config) -> dict:
    check_ranges(config)
    check(bool(config.policies) and bool(config.temperatures), "--policies and --temperatures need a value each")
    path = rankings_file(config)
    check(not path.is_dir(), f"--out {path} is a folder; name a file in it")
    device = pick_device(config.device)
    loaded = [load_model(p, device, made_by="python sft.py") for p in config.policies]
    tokenizer = load_tokenizer(loaded[0].tokenizer)
    check(all(c.tokenizer == tokenizer.name for c in loaded), "the policies must share one tokenizer")
    prompts = read_prompts(config.prompts, "python -m data.tiny")[config.skip :][: config.n_prompts or None]
    check(bool(prompts), f"{config.prompts}: no prompts left after --skip {config.skip}")
    task = task_of(config.prompts)
    for policy in loaded:
        note_task(policy, task, config.prompts)
    gold = gold_function(config.gold, task)
    if config.annotator == "simulated" and gold is None:
        raise UserError("simulated annotators need --gold file.py:function; or rank yourself with --annotator human")
    room = min(c.model.config.block_size for c in loaded) - config.max_new_tokens
    check(room > 0, f"--max_new_tokens {config.max_new_tokens} leaves no room for a prompt")
    ids = encode_prompts(prompts, tokenizer, room, config.prompts)
    sources = [(c.model, t) for c in loaded for t in config.temperatures]  # completion k comes from source k mod len

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {path}: {path.parent} can't be made a folder ({error.strerror})") from None
    done, written = already_ranked(path), 0
    stood_already = len(done)
    with open(path, "a", encoding="utf-8", newline="\n") as file:
        for first in tqdm(range(0, len(prompts), config.batch_size), desc="collect", mininterval=1):
            chunk = prompts[first : first + config.batch_size]
            if done.issuperset(chunk):
                continue
            # Every chunk has its own random streams, so a run that was stopped goes on as if it had not been.
            rng = random.Random(f"{config.seed} {first}")
            samples: list[list[Sample]] = [[] for _ in chunk]
            for source, (model, temperature) in enumerate(sources):
                count = len(range(source, config.completions, len(sources)))
                if not count:
                    continue
                repeated = [p for p in ids[first : first + len(chunk)] for _ in range(count)]
                options = {"eos_id": tokenizer.eos_id, "temperature": temperature}
                options["generator"] = generator_for(device, config.seed, first, source)
                rollout = generate(model, repeated, config.max_new_tokens, **options)
                for row, (completion, ended) in enumerate(
                    zip(rollout.completions(), rollout.ended.tolist(), strict=True)
                ):
                    samples[row // count].append(Sample(tokenizer.decode(completion), ended))
            for prompt, answers in zip(chunk, samples, strict=True):
                rng.shuffle(answers)  # so that the place on the screen says nothing about where a completion came from
                texts, ended = [s.text for s in answers], [s.ended for s in answers]
                golds = call_reward(gold, [prompt] * len(texts), texts, ended, "the gold reward") if gold else None
                if config.annotator == "simulated":
                    ranks = rank_simulated(texts, golds, config.annotator_temperature, rng)
                else:
                    ranks = rank_human(prompt, answers) if prompt not in done else None
                if prompt in done or ranks is None:
                    continue
                best_first = sorted(range(len(texts)), key=lambda i: ranks[i])
                row: dict = {"prompt": prompt, "completions": nest_ties(texts, ranks)}
                row["ended"] = [ended[i] for i in best_first]
                if config.annotator == "simulated":  # what the annotators knew, for measuring; no stage learns from it
                    row["gold"] = [round(golds[i], 4) for i in best_first]
                    row["annotator_temperature"] = config.annotator_temperature
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                file.flush()
                done.add(prompt)
                written += 1
    already = f" ({stood_already} stood there already)" if stood_already else ""
    print(f"wrote {written} rankings of {config.completions} completions to {path}{already}")
    if config.annotator == "simulated":
        agreement = annotators_agreement(str(path))
        print(f"two such annotators agree on {agreement:.0%} of the pairs" if agreement else "nothing to compare")
    return {"written": written}


def main() -> None:
    run_main(run, Config, __doc__)


if __name__ == "__main__":
    main()
