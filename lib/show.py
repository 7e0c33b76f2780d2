"""Samples, figures and traces of rollouts, for the log and for the screen."""

from __future__ import annotations

import torch
from torch import Tensor
from tqdm import tqdm

from data.tokenizer import Tokenizer
from frame import masked_mean, token_logprobs
from lib.train import generator_for
from model import GPT
from sampling import Rollout, generate


def sample_prompts(
    policy: GPT, prompts: list[list[int]], tokenizer: Tokenizer, max_new_tokens: int, seed: int
) -> Rollout:
    """Sample an answer to each prompt at temperature 1. A long prompt keeps its end, so that an answer has room."""
    max_new_tokens = min(max_new_tokens, policy.config.block_size - 1)
    prompts = [p[-(policy.config.block_size - max_new_tokens) :] for p in prompts]
    rng = generator_for(policy.device, seed)
    return generate(policy, prompts, max_new_tokens, eos_id=tokenizer.eos_id, generator=rng)


def show_samples(rollout: Rollout, tokenizer: Tokenizer, scores: Tensor | None = None, trace=None) -> None:
    """Print three prompts with their completions, and scores if there are any. trace, a ppo.Experience: the first of
    them token by token, too."""
    for row, completion in enumerate(rollout.completions()[:3]):
        prompt = rollout.tokens[row, : int(rollout.prompt_lens[row])].tolist()
        score = "" if scores is None else f"[{scores[row].item():+.2f}] "
        tqdm.write(f"  {score}{tokenizer.decode(prompt)!r} -> {tokenizer.decode(completion)!r}")
    if trace is not None:
        print_trace(trace, tokenizer)


@torch.no_grad()
def compare_samples(
    policy: GPT, reference: GPT, prompts: list[list[int]], tokenizer: Tokenizer, max_new_tokens: int, seed: int
) -> dict[str, float]:
    """Sample policy and reference: does the policy still stop as often, and how far has it gone? Prints three samples
    and a warning of collapse. KL in nats a sequence, as the mean of log pi/pi_ref over the policy's own samples."""
    rollout, before = (sample_prompts(m, prompts, tokenizer, max_new_tokens, seed) for m in (policy, reference))
    show_samples(rollout, tokenizer)
    sampled = rollout.action_mask  # (B, T-1)
    logprobs, ref_logprobs = (token_logprobs(m, rollout.tokens, mask=sampled) for m in (policy, reference))  # (B, T-1)
    kl = (logprobs - ref_logprobs).sum(1).mean().item()
    eos_rate, ref_eos_rate = (r.ended.float().mean().item() for r in (rollout, before))
    print(
        f"samples: EOS rate {eos_rate:.2f} (reference {ref_eos_rate:.2f}), KL to the reference {kl:.1f} nats a sequence"
    )
    if eos_rate < 0.8 * ref_eos_rate or kl > 25:
        print("WARNING: the policy has collapsed, or is about to; lower --lr, take fewer --epochs, or hold it closer")
    return {"eos_rate": eos_rate, "ref_eos_rate": ref_eos_rate, "kl": kl}


def rollout_figures(
    experience, completions: list[str], raw_scores: Tensor, scores: Tensor, kl_coef: float
) -> dict[str, float]:
    """The figures to log of an iteration, from its ppo.Experience; docs/tuning.md says how to read them.

    raw_scores (B,); scores (B,), with the penalty of cut completions."""
    e, mask = experience, experience.action_mask
    kl = e.kl.sum(1).mean().item()  # the very tensor that went into the reward, nats a sequence
    residual, returns = (e.returns - e.values)[mask], e.returns[mask]
    variance = returns.var(correction=0)
    return {
        "score": raw_scores.mean().item(),
        "kl": kl,
        "k3": e.k3.sum(1).mean().item(),
        "kl_coef": kl_coef,
        "objective": scores.mean().item() - kl_coef * kl,
        "entropy": masked_mean(e.entropy, mask).item(),
        "explained_variance": (1 - residual.var(correction=0) / variance).item() if variance > 0 else 0.0,
        "length": mask.sum(1).float().mean().item(),
        "eos_rate": e.ended.float().mean().item(),
        "distinct": len(set(completions)) / len(completions),
    }


def print_trace(experience, tokenizer: Tokenizer, row: int = 0) -> None:
    """One rollout of a ppo.Experience, token by token."""
    columns = {"logprobs": 8, "ref_logprobs": 12, "kl": 7, "rewards": 7, "values": 7, "advantages": 10, "returns": 7}
    tqdm.write(f"{'token':>14} " + " ".join(f"{name:>{width}}" for name, width in columns.items()))
    for t in experience.action_mask[row].nonzero().squeeze(1).tolist():
        figures = [f"{getattr(experience, name)[row, t].item():{width}.3f}" for name, width in columns.items()]
        token = tokenizer.decode([int(experience.tokens[row, t + 1])])
        tqdm.write(f"{token!r:>14} " + " ".join(figures))
