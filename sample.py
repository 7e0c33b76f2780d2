"""Talk to a checkpoint; put several side by side.

    python sample.py --policy out/ppo                                        # chat; an empty line or ctrl-D ends it
    python sample.py --policy out/ppo --prompt "Anna: What is the opposite of hot?"
    python sample.py --compare out/sft out/ppo out/dpo --prompt "Anna: Add 2 and 3."

Prompts of the embedded task start with a speaker's name: Anna, Ben, Carl, ... (data/tiny.py lists names and questions).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from data.batches import encode_prompts
from lib.checkpoint import Checkpoint, check_scorer, load_model, load_scorer
from lib.cli import Flags, UserError, check, flag, run_main
from lib.reward import gold_function, score_rollout
from lib.train import generator_for, pick_device
from sampling import generate


@dataclass
class Config(Flags):
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


def answer(policy: Checkpoint, prompt: str, config: Config, seed: int, scorer: Checkpoint | None) -> list[str]:
    """Completions of one prompt, each as a line with its scores."""
    tokenizer, gold = policy.tokenizer, gold_function(config.gold, policy.task)
    ids = encode_prompts([prompt], tokenizer, policy.model.config.block_size, config.max_new_tokens, "")[0]
    rollout = generate(
        policy.model,
        [ids] * config.samples,
        config.max_new_tokens,
        eos_id=tokenizer.eos_id,
        temperature=config.temperature,
        top_k=config.top_k or None,
        top_p=config.top_p if config.top_p < 1 else None,
        generator=generator_for(policy.model.device, seed),
    )
    scores = score_rollout(scorer.model, rollout).tolist() if scorer else [None] * config.samples
    lines = []
    for completion, ended, score in zip(rollout.completions(), rollout.ended.tolist(), scores, strict=True):
        text = tokenizer.decode(completion)
        notes = [] if score is None else [f"reward {score:+.2f}"]
        if gold:
            try:
                notes.append(f"gold {gold([prompt], [text], [ended])[0]:+.2f}")
            except UserError:  # not a prompt of the task: its truth is not known
                notes.append("gold unknown for this prompt")
        notes += [] if ended else ["cut"]
        lines.append(text + (f"   [{', '.join(notes)}]" if notes else ""))
    return lines


def run(config: Config) -> dict:
    device = pick_device(config.device)
    paths = config.compare or [config.policy]
    loaded = [load_model(p, device, made_by="make demo") for p in paths]
    for path, policy in zip(paths, loaded, strict=True):
        fits = config.max_new_tokens < policy.model.config.block_size
        check(fits, f"--max_new_tokens {config.max_new_tokens} leaves no room for a prompt in {path}")
    scorer = load_scorer(config.reward, loaded[0], device) if config.reward else None
    for policy in loaded[1:] if scorer else ():
        check_scorer(scorer, config.reward, policy)
    names = [Path(p).name or p for p in paths]
    width = max(map(len, names))
    turn = 0
    while True:
        prompt = config.prompt
        if not prompt:
            try:
                prompt = input("you > ").strip()
            except EOFError:
                break
        if not prompt:
            break
        for name, policy in zip(names, loaded, strict=True):
            for line in answer(policy, prompt, config, config.seed + turn, scorer):
                print(f"{name:>{width}} > {line}")
        if config.prompt:
            break
        turn += 1
    return {}


def main() -> None:
    run_main(run, Config, __doc__)


if __name__ == "__main__":
    main()
