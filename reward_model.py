"""Stage 2: the reward model. Ranked completions -> a scalar reward.

    python collect.py               # sample and rank completions of the SFT policy
    python reward_model.py          # learn to score them

A ranking of K completions of one prompt is K(K-1)/2 comparisons. Under Bradley-Terry, P(i preferred to j) =
sigmoid(r_i - r_j), and the reward is fitted by maximum likelihood (Ouyang et al. 2022, arXiv:2203.02155, eq. 1):

    L = - 1/pairs  sum over pairs (w better than l) of  log sigmoid(r(x, y_w) - r(x, y_l))

All comparisons of a prompt stand in the same batch, so each completion is read once, not K-1 times, the prompt is read
once for all of them, and the model doesn't overfit to either. The loss fixes r only up to a constant; afterwards it is
shifted and scaled to mean 0 and standard deviation 1 on the policy's own samples, so that PPO's coefficients mean the
same for every reward model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from data.batches import RankedExamples, by_length, epoch_batches, micro_batches, pair_accuracy, ranked_batch
from frozen import choose_trainable
from lib.checkpoint import save_model
from lib.cli import TrainConfig, check, flag, run_main
from lib.reward import score_rollout
from lib.run import RunFolder, gate
from lib.setup import load_policy, load_preferences, sampling_prompts
from lib.train import autocast, clip_gradients, generator_for, prepare_blocks, set_lr
from model import GPT, ScalarModel
from sampling import generate


@dataclass
class Config(TrainConfig):
    data: str = flag("out/data/rankings.jsonl", "rankings or pairs to learn from")
    held_out_data: str = flag("auto", "rankings of held-out prompts (auto: DATA_held_out.jsonl; empty: none)")
    prompts: str = flag("auto", "prompts for the normalisation (auto: prompts.jsonl beside the data, or the data's)")
    policy: str = flag("out/sft", "checkpoint to start from, and whose samples set the normalisation")
    out_dir: str = flag("out/reward_model", "folder for the checkpoint and the logs")
    expectation: str = flag(
        "auto", "tell the head how expected each token was (auto: below 4 blocks)", choices=("auto", "yes", "no")
    )
    epochs: int = flag(1, "passes over the data; more than one overfits", low=1)
    batch_size: int = flag(8, "rankings an optimiser step", low=1)
    micro_batch: int = flag(16, "rankings a forward pass; changes memory and nothing else (0: the whole batch)", low=0)
    lr: float = flag(5e-4, "peak learning rate", low=0)
    warmup: int = flag(20, "steps of linear warm-up, before the linear decay", low=0)
    weight_decay: float = flag(0.01, "AdamW's decay", low=0)
    normalise_samples: int = flag(512, "samples of the policy that set mean and standard deviation", low=2)
    max_new_tokens: int = flag(48, "longest of those samples, tokens", low=1)
    log_every: int = flag(20, "steps between log lines", low=1)


# What the embedded task gives at default settings: held-out accuracy, its share of what the noise allows, and the
# accuracy on pairs of a right and a wrong answer with the same manners.
EXPECTED_ACCURACY, EXPECTED_SHARE_OF_BAYES, EXPECTED_RIGHT = (0.70, 0.85), (0.89, 1.03), (0.75, 1.0)


def ranking_loss(scores: Tensor, ranks: Tensor | None = None, n_pairs: int | Tensor | None = None) -> Tensor:
    """Mean over pairs of -log sigmoid(better score - worse score). Ouyang et al. 2022, eq. 1; K = 2 is Bradley-Terry.

    scores (N, K), best first. ranks (N, K) ascending, by default 0..K-1: equal ranks are a tie, whose target is half /
    half; -1 marks a completion that this ranking doesn't have. n_pairs: what the sum is divided by (default: the pairs
    here; the pairs of the whole step when it is split into micro-batches). -> scalar."""
    if scores.dim() != 2 or scores.size(1) < 2:
        raise ValueError(f"scores must be (N, K) with K >= 2, not {tuple(scores.shape)}")
    K = scores.size(1)
    i, j = torch.triu_indices(K, K, offset=1, device=scores.device)  # (P,) each, i ranked before j
    gap = scores[:, i] - scores[:, j]  # (N, P)
    losses = F.softplus(-gap)  # -log sigmoid(gap), without overflow
    if ranks is None:
        return losses.sum() / (losses.numel() if n_pairs is None else n_pairs)
    tied = ranks[:, i] == ranks[:, j]
    losses = torch.where(tied, 0.5 * (losses + F.softplus(gap)), losses)  # cross-entropy against the target 1/2
    present = (ranks[:, i] >= 0) & (ranks[:, j] >= 0)
    return torch.where(present, losses, 0.0).sum() / (present.sum().clamp(min=1) if n_pairs is None else n_pairs)


@torch.no_grad()
def evaluate(model: ScalarModel, items: list[RankedExamples], device, batch_size: int = 64) -> dict[str, float]:
    """Held-out loss, of raw scores (the objective; the normalisation would divide each gap by std); accuracy over the
    strict pairs, by rank gap too; and how far one gets by length alone."""
    model.eval()
    loss, pairs, per_ranking = 0.0, [], []
    for part in micro_batches(items, batch_size):
        batch = ranked_batch(part, device)
        scores = model(batch.tokens, batch.ends, batch.positions)  # (N, K)
        correct, gap = pair_accuracy(scores, batch.ranks)  # (N, P)
        longer, _ = pair_accuracy(batch.lens.float(), batch.ranks)  # (N, P)
        strict = gap > 0
        loss += ranking_loss(scores * model.std, batch.ranks, n_pairs=1).item()
        pairs.append(torch.stack([correct[strict], longer[strict], gap[strict]]))  # (3, strict pairs)
        per_ranking.append((torch.where(strict, correct, 0.0).sum(1) / strict.sum(1).clamp(min=1))[strict.any(1)])
    right, longer, gaps = torch.cat(pairs, 1)
    # the pairs of one prompt are not independent, so the error is taken over prompts
    per_ranking = torch.cat(per_ranking)
    longer_wins = longer.mean().item()
    results = {
        "loss": loss / sum(item.n_pairs for item in items),
        "accuracy": right.mean().item(),
        "accuracy_se": (per_ranking.std() / math.sqrt(len(per_ranking))).item() if len(per_ranking) > 1 else 0.0,
        "longer_wins": longer_wins,
        "length_alone": max(longer_wins, 1 - longer_wins),  # a judge may just as well prefer the shorter
    }
    return results | {f"accuracy_gap_{int(g)}": right[gaps == g].mean().item() for g in gaps.unique().tolist()}


def accuracy_by_part(model: ScalarModel, contrasts: dict[str, list[RankedExamples]], device) -> dict[str, float]:
    """How often it prefers the better of two texts that differ in one respect (tiny.contrasts), for each of them."""
    return {name: evaluate(model, items, device)["accuracy"] for name, items in contrasts.items()}


@torch.no_grad()
def normalise(
    model: ScalarModel, policy: GPT, prompts: list[list[int]], max_new_tokens: int, eos_id: int, seed: int
) -> None:
    """Set the model's mean and std so that the policy's own samples score mean 0 and standard deviation 1."""
    model.eval()
    generator = generator_for(policy.device, seed)
    scores = []
    for rows in by_length(prompts, 128):
        rollout = generate(policy, [prompts[i] for i in rows], max_new_tokens, eos_id=eos_id, generator=generator)
        scores.append(score_rollout(model, rollout))
    scores = torch.cat(scores) * model.std + model.mean  # as they would be with mean 0 and std 1
    told_apart = scores.std() > 1e-6 * scores.abs().max()  # more than by rounding
    check(bool(told_apart), "the reward model gives all samples of the policy the same score; it learned nothing")
    model.mean.copy_(scores.mean())
    model.std.copy_(scores.std())


def train(config: Config) -> dict:
    start = load_policy(config)
    policy, tokenizer = start.model, start.tokenizer
    torch.manual_seed(config.seed)  # of the head
    shallow = policy.config.n_layer < 4
    expectation = config.expectation == "yes" or (config.expectation == "auto" and shallow)
    model = ScalarModel.from_gpt(policy, expectation)
    parameters = choose_trainable(model, config)
    data = load_preferences(config, start)
    max_new_tokens = min(config.max_new_tokens, policy.config.block_size - 1)
    prompts = sampling_prompts(config, start, max_new_tokens)
    batches = epoch_batches(data.items, config)
    adamw = {"lr": config.lr, "betas": (0.9, 0.99), "weight_decay": config.weight_decay, "fused": True}
    optimizer = torch.optim.AdamW(parameters, **adamw)
    prepare_blocks(config, model)
    run = RunFolder(config, len(batches), model=model, optimizer=optimizer)
    if run.done:
        return run.done

    device = policy.device
    model.mean.zero_(), model.std.fill_(1.0)  # while it learns; the state of a finished run holds its own
    with run:  # whatever ends it in here, the last whole step is saved
        for step in run.steps("reward model"):
            model.train()
            n_pairs = sum(item.n_pairs for item in batches[step])  # of the whole step
            lr = set_lr(optimizer, step, len(batches), config.warmup, "linear")
            optimizer.zero_grad(set_to_none=True)
            loss, right, strict_pairs = torch.zeros((), device=device), torch.zeros((), device=device), 0
            for part in micro_batches(batches[step], config.micro_batch):
                batch = ranked_batch(part, device)
                with autocast(device, config.dtype):
                    scores = model(batch.tokens, batch.ends, batch.positions)  # (N, K), best first
                part_loss = ranking_loss(scores, batch.ranks, n_pairs)
                part_loss.backward()
                loss += part_loss.detach()
                correct, gap = pair_accuracy(scores.detach(), batch.ranks)  # (N, P)
                right += torch.where(gap > 0, correct, 0.0).sum()
                strict_pairs += (gap > 0).sum()
            norm = clip_gradients(model, config.grad_clip)
            optimizer.step()
            if step == 0 or run.due(step, config.log_every):
                figures = {"loss": loss.item(), "accuracy": (right / strict_pairs).item(), "lr": lr}
                run.log(step + 1, "loss accuracy", **figures, grad_norm=norm.item())

        with autocast(device, config.dtype):
            normalise(model, policy, prompts, max_new_tokens, tokenizer.eos_id, config.seed)
        save_model(config.out_dir, model, tokenizer.saved, "reward_model.py", config, data.task)
        results = {"mean": model.mean.item(), "std": model.std.item(), "gates": []}
        if data.held_out:
            results |= evaluate(model, data.held_out, device, config.micro_batch or 64)
            results["bayes_accuracy"] = data.bayes_accuracy
            if data.contrasts:
                results["by_part"] = accuracy_by_part(model, data.contrasts, device)
            results["gates"] = report(results)
        return run.finish(results)


def report(results: dict) -> list[dict]:
    """Print the held-out figures -> gates, on the embedded task's own annotators."""
    gaps = ", ".join(f"{k[13:]}: {v:.2f}" for k, v in results.items() if k.startswith("accuracy_gap_"))
    print(f"raw scores: mean {results['mean']:.2f}, std {results['std']:.2f}; held-out accuracy by rank gap {gaps}")
    accuracy, bayes = results["accuracy"], results["bayes_accuracy"]
    note = f"standard error {results['accuracy_se']:.3f}; length alone {results['length_alone']:.2f}"
    note += "" if bayes is None else f"; annotators' Bayes {bayes:.2f}"
    if bayes is None or "by_part" not in results:
        print(f"RM held-out accuracy {accuracy:.3f} ({note})")
        return []
    print("accuracy by part: " + ", ".join(f"{name} {share:.2f}" for name, share in results["by_part"].items()))
    return [
        gate("RM held-out accuracy", accuracy, *EXPECTED_ACCURACY, note),
        gate("RM share of Bayes accuracy", accuracy / bayes, *EXPECTED_SHARE_OF_BAYES),
        gate("RM right against wrong, manners equal", results["by_part"]["right_vs_wrong"], *EXPECTED_RIGHT),
    ]


def main() -> None:
    run_main(train, Config, __doc__)


if __name__ == "__main__":
    main()
