"""A policy trained by DPO *is* a reward model: r(x, y) = beta log(pi(y|x) / pi_ref(y|x)) + a constant of the prompt.

    python -m study.implicit --dpo out/dpo --out out/implicit.json                       # how well does it judge?
    IMPLICIT=out/dpo python ppo.py --reward study/implicit.py:reward --out_dir out/x     # what does PPO make of it?

The config.json of the DPO run names the reference and beta.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from data.batches import RankedExamples, by_length, contrast_rankings, encode_example, make_batch, pair_accuracy
from data.batches import ranked_batch
from data.files import read_json, read_prompts
from data.tokenizer import Tokenizer
from dpo import ranking_logprobs, sequence_logprobs
from frame import completion_mask
from lib.checkpoint import load_model, model_file
from lib.cli import Flags, check, flag, run_main
from lib.run import write_json
from lib.train import pick_device
from model import GPT


@dataclass
class Config(Flags):
    dpo: str = flag("out/dpo", "folder of the DPO run")
    prompts: str = flag("out/data/prompts_held_out.jsonl", "prompts of the embedded task")
    n_prompts: int = flag(400, "prompts to use (0: all)", low=0)
    out: str = flag("out/implicit.json", "file to write")


@lru_cache(maxsize=1)
def load(folder: str) -> tuple[GPT, GPT, Tokenizer, float]:
    """A DPO run -> policy, reference, tokenizer, beta."""
    config = read_json(model_file(folder).with_name("config.json"), "python dpo.py")
    check("beta" in config, f"{folder} is not a run of dpo.py")
    start = load_model(folder, pick_device("auto"))
    policy, tokenizer = start.model, start.tokenizer
    reference = load_model(config["policy"], policy.device).model
    return policy, reference, tokenizer, config["beta"]


@torch.no_grad()
def reward(prompts: list[str], completions: list[str], ended: list[bool]) -> list[float]:
    """The implicit reward of each completion, by the DPO run in the folder that the environment's IMPLICIT names. EOS
    counts if a completion ended by itself."""
    policy, reference, tokenizer, beta = load(os.environ.get("IMPLICIT", "out/dpo"))
    texts = zip(prompts, completions, ended, strict=True)
    block_size = policy.config.block_size
    examples = [encode_example(tokenizer, p, c, block_size, e, allow_empty=True) for p, c, e in texts]
    rewards = [0.0] * len(examples)
    for rows in by_length(examples, 64):
        batch = [examples[i] for i in rows]
        tokens, prompt_lens, lens = make_batch(batch, policy.device, block_size)  # (b, T), (b,), (b,)
        mask = completion_mask(prompt_lens, lens, tokens.size(1))  # (b, T)
        ratio = sequence_logprobs(policy, tokens, mask) - sequence_logprobs(reference, tokens, mask)  # (b,)
        for i, r in zip(rows, ratio.tolist(), strict=True):
            rewards[i] = beta * r
    return rewards


@torch.no_grad()
def accuracy(policy: GPT, reference: GPT, items: list[RankedExamples]) -> float:
    """The share of pairs in the right order. The texts of a pair share their prompt, so its constant doesn't matter."""
    batch = ranked_batch(items, policy.device)
    ratio = ranking_logprobs(policy, batch) - ranking_logprobs(reference, batch)  # (N, K)
    correct, gap = pair_accuracy(ratio, batch.ranks)  # (N, P)
    return correct[gap > 0].mean().item()


def run(config: Config) -> dict:
    policy, reference, tokenizer, _ = load(config.dpo)
    prompts = read_prompts(config.prompts, "python -m data.tiny")[: config.n_prompts or None]
    parts = contrast_rankings(prompts, tokenizer, policy.config.block_size)
    results = {"by_part": {name: accuracy(policy, reference, items) for name, items in parts.items()}}
    print("accuracy by part: " + ", ".join(f"{name} {share:.2f}" for name, share in results["by_part"].items()))
    write_json(results, Path(config.out))
    return results


def main() -> None:
    run_main(run, Config, __doc__)


if __name__ == "__main__":
    main()
