"""Measures best of n: the reward and the KL of the sample that a reward model likes best, out of up to 256.

    python -m study.best_of_n --policy out/sft --reward_models out/reward_model --out out/best_of_n.json

N samples of each prompt (twice the largest n) serve for every n: evaluate.expected_best averages over all subsets.
Several reward models also give their minimum, and their mean less standard deviation.

The KL of best-of-n to its policy is usually quoted as log n - (n - 1)/n. That is an upper bound, and exact only if no
two samples are ever the same. Here they often are, but the KL can be measured. Let F(y) be the policy's probability of
a completion that scores at most as much as y, and F-(y) that of one that scores less. Then best-of-n says y with
probability F(y)^n - F-(y)^n, and F(y) - F-(y) is pi(y). So only F- must be estimated: by the share of the N samples
that score less.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from data.batches import encode_prompts
from data.files import read_prompts
from data.tiny import task_of
from evaluate import expected_best, mean, unique_names
from frame import token_logprobs
from lib.checkpoint import load_model, load_scorer
from lib.cli import Flags, check, flag, run_main
from lib.reward import check_task, gold_function
from lib.run import write_json
from lib.train import generator_for, pick_device
from model import GPT
from sampling import Rollout, generate


@dataclass
class Config(Flags):
    policy: str = flag("out/sft", "checkpoint to sample from")
    reward_models: list[str] = flag(["out/reward_model"], "reward models; all but the first one are an ensemble")
    prompts: str = flag("out/data/prompts_test.jsonl", "prompts")
    n_prompts: int = flag(64, "prompts to use (0: all)", low=0)
    best_of: list[int] = flag([1, 2, 4, 8, 16, 32, 64, 128, 256], "values of n", low=1)
    max_new_tokens: int = flag(48, "longest completion, tokens", low=1)
    gold: str = flag("auto", "true reward, file.py:function (auto: the embedded task's; empty: none)")
    out: str = flag("out/best_of_n.json", "file to write")
    seed: int = flag(1, "seed of the samples", low=0)
    device: str = flag("auto", "auto, cpu, cuda or mps")


def best_log_ratio(scores: Tensor, logprobs: Tensor, n: int) -> Tensor:
    """log(probability under best-of-n / probability under the policy) of each sample, in nats.

    scores, logprobs of the policy (P, N) -> (P, N). Its mean over best-of-n's own choices is the KL to the policy."""
    N = scores.size(1)
    ordered, scores = scores.sort(1).values.contiguous(), scores.contiguous()
    worse = torch.searchsorted(ordered, scores)  # (P, N) number of samples that score less
    no_better = torch.searchsorted(ordered, scores, right=True)  # (P, N) number that score less or as much
    p = logprobs.double().exp()
    # A text that was sampled often covers a range of shares, from F- to F. Its middle is known better than its lower
    # end, and its upper end is 1 if nothing scored better. The share of a text that was sampled rarely says little.
    often = no_better - worse >= 10
    below = torch.where(often, (worse + no_better) / (2 * N) - p / 2, worse / N)
    below = torch.where(often & (no_better == N), 1 - p, below).clamp(0, 1)  # F-
    # (F^n - F-^n) / p with F = F- + p, written as F^n (1 - (F-/F)^n) / p: exact for p near 0, too (n F-^(n-1))
    p = torch.minimum(p, 1 - below).clamp(min=1e-300)
    x = n * torch.log1p(p / below)  # n log(F/F-), infinite where nothing scores less
    return n * (below + p).log() + torch.log(-torch.expm1(-x)) - p.log()


def unique_rows(rollout: Rollout) -> tuple[Rollout, Tensor]:
    """-> (the different rows of a rollout, the number in them of each row). So a text is scored once."""
    keys = torch.cat([rollout.tokens, rollout.lens[:, None]], 1)  # (B, S+1); all filler is EOS
    _, index = keys.unique(dim=0, return_inverse=True)  # (B,)
    first = torch.full((int(index.max()) + 1,), len(index)).scatter_reduce(0, index, torch.arange(len(index)), "amin")
    rows = [x[first] for x in (rollout.tokens, rollout.prompt_lens, rollout.lens, rollout.ended)]
    return Rollout(*rows), index


def run(config: Config) -> dict:
    check(bool(config.reward_models) and bool(config.best_of), "--reward_models and --best_of need a value each")
    names = unique_names(config.reward_models)
    taken = [name for name in ("min", "mean-std") if name in names and len(names) > 2]
    check(not taken, f"--reward_models: {' and '.join(taken)} is what the ensemble is called; rename the folder")
    device = pick_device(config.device)
    start = load_model(config.policy, device, made_by="python sft.py")
    policy, tokenizer, task = start.model, start.tokenizer, task_of(config.prompts)
    scorers = []
    for path in config.reward_models:
        scorers.append(load_scorer(path, start, device))
        check_task(scorers[-1], path, task)
    gold = gold_function(config.gold, task)
    prompts = read_prompts(config.prompts, "python -m data.tiny")[: config.n_prompts or None]
    ids = encode_prompts(prompts, tokenizer, policy.config.block_size, config.max_new_tokens, config.prompts)
    N = 2 * max(config.best_of)
    parts = (policy, scorers, gold, tokenizer, N, config)
    by_prompt = [sample(*parts, k, text, p) for k, (text, p) in enumerate(zip(prompts, ids, strict=True))]
    logprobs, golds, scores = (torch.stack(x) for x in zip(*by_prompt, strict=True))  # (P, N), (P, N), (P, models, N)
    judges = {name: scores[:, m] for m, name in enumerate(names)}
    if len(scorers) > 2:
        ensemble = scores[:, 1:]
        judges |= {"min": ensemble.amin(1), "mean-std": ensemble.mean(1) - ensemble.std(1, correction=0)}
    results = {name: curve(scores, golds, logprobs, config.best_of) for name, scores in judges.items()}
    for name, points in results.items():
        print(name)
        for p in points:
            print("  n {n:4}  score {score:6.3f}  gold {gold:6.3f}  KL {kl:.3f} <= {bound:.3f}".format(**p))
    write_json(results, Path(config.out))
    return results


@torch.no_grad()
def sample(policy: GPT, scorers: list, gold, tokenizer, N: int, config: Config, k: int, prompt: str, ids: list[int]):
    """N samples of the k-th prompt -> log-probs (N,), gold rewards (N,), scores (models, N)."""
    rng = generator_for(policy.device, config.seed, 7, k)
    rollout = generate(policy, [ids] * N, config.max_new_tokens, eos_id=tokenizer.eos_id, generator=rng)
    rows, index = unique_rows(rollout)
    logprobs = token_logprobs(policy, rows.tokens, mask=rows.action_mask).sum(1)  # (rows,)
    scores = torch.stack([s.model.score(rows.tokens, rows.lens) for s in scorers])  # (models, rows)
    golds = torch.zeros(len(rows.lens))
    if gold:
        texts = [tokenizer.decode(c) for c in rows.completions()]
        golds = torch.tensor(gold([prompt] * len(texts), texts, rows.ended.tolist()))
    return logprobs.cpu()[index], golds[index], scores.cpu()[:, index]


def curve(scores: Tensor, golds: Tensor, logprobs: Tensor, best_of: list[int]) -> list[dict]:
    """The score, gold reward and KL of the best of n, and the bound of the KL, for each n. All tensors are (P, N)."""
    points = []
    for n in best_of:
        score, gold = (mean(expected_best(scores, x, n).tolist()) for x in (scores, golds))
        kl = mean(expected_best(scores, best_log_ratio(scores, logprobs, n), n).tolist())
        points.append({"n": n, "score": score, "gold": gold, "kl": kl, "bound": math.log(n) - (n - 1) / n})
    return points


def main() -> None:
    run_main(run, Config, __doc__)


if __name__ == "__main__":
    main()
