"""Talk to a checkpoint; put several side by side.

    python sample.py --policy out/ppo                                        # chat; an empty line or ctrl-D ends it
    python sample.py --policy out/ppo --prompt "Anna: What is the opposite of hot?"
    python sample.py --compare out/sft out/ppo out/dpo --prompt "Anna: Add 2 and 3."

Prompts of the embedded task start with a speaker's name: Anna, Ben, Carl, ... (data/tiny.py lists names and questions).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cli import UserError, check, check_ranges, flag, run_main
from common import generator_for, gold_function, load_model, pick_device
from data.batches import truncate_prompt
from data.tokenizer import load_tokenizer
from model import generate


@dataclass
class Config:
    policy: str = flag("out/ppo", "checkpoint to talk to")
    compare: list[str] = flag([], "checkpoints to put side by side, instead of --policy")
    prompt: str = flag("", "answer this one prompt and end; empty: ask for prompts")
    samples: int = flag(1, "completions of each checkpoint", low=1)
    max_new_tokens: int = flag(48, "longest completion, tokens", low=1)
    temperature: float = flag(1.0, "sampling temperature; 0 takes the most likely token", low=0)
    top_k: int = flag(0, "sample from the k most likely tokens (0: all)", low=0)
    top_p: float = flag(1.0, "sample from the smallest set of tokens with this probability", above=0, high=1)
    reward: str = flag("", "reward model whose score to show; empty: none")
    gold: str = flag("auto", "true reward to show, file.py:function (auto: the embedded task's; empty: none)")
    seed: int = flag(1, "seed of the samples", low=0)
    device: str = flag("auto", "auto, cpu, cuda or mps")


def answer(model, tokenizer, prompt: str, config: Config, seed: int, reward_model=None, gold=None) -> list[str]:
    """Completions of one prompt, each as a line with its scores."""
    room = model.config.block_size - config.max_new_tokens
    ids = truncate_prompt(tokenizer.encode_prompt(prompt), room)
    rollout = generate(
        model,
        [ids] * config.samples,
        config.max_new_tokens,
        eos_id=tokenizer.eos_id,
        temperature=config.temperature,
        top_k=config.top_k or None,
        top_p=config.top_p if config.top_p < 1 else None,
        generator=generator_for(model.device, seed),
    )
    scores = reward_model.score(rollout.tokens, rollout.lens).tolist() if reward_model else [None] * config.samples
    lines = []
    for ids, ended, score in zip(rollout.completions(), rollout.ended.tolist(), scores, strict=True):
        text = tokenizer.decode(ids)
        notes = [] if score is None else [f"reward {score:+.2f}"]
        if gold:
            try:
                notes.append(f"gold {gold([prompt], [text])[0]:+.2f}")
            except UserError:  # not a prompt of the task: its truth is not known
                notes.append("gold unknown for this prompt")
        notes += [] if ended else ["cut"]
        lines.append(text + (f"   [{', '.join(notes)}]" if notes else ""))
    return lines


def run(config: Config) -> dict:
    check_ranges(config)
    device = pick_device(config.device)
    paths = config.compare or [config.policy]
    loaded = [load_model(p, device, made_by="make demo") for p in paths]
    for path, (model, _) in zip(paths, loaded, strict=True):
        check(
            config.max_new_tokens < model.config.block_size,
            f"--max_new_tokens {config.max_new_tokens} leaves no room for a prompt in {path}",
        )
    reward_model = load_model(config.reward, device, "scalar", "python reward_model.py")[0] if config.reward else None
    names = [Path(p).name or p for p in paths]
    width = max(map(len, names))
    turn = 0
    while True:
        if config.prompt:
            prompt = config.prompt
        else:
            try:
                prompt = input("you > ").strip()
            except EOFError:
                break
        if not prompt:
            break
        for name, (model, tokenizer_name) in zip(names, loaded, strict=True):
            gold = gold_function(config.gold, tokenizer_name)
            for line in answer(
                model, load_tokenizer(tokenizer_name), prompt, config, config.seed + turn, reward_model, gold
            ):
                print(f"{name:>{width}} > {line}")
        if config.prompt:
            break
        turn += 1
    return {}


def main() -> None:
    run_main(run, Config, __doc__)


if __name__ == "__main__":
    main()
