"""Stage 3b: direct preference optimisation. Ranked completions -> a policy; no reward model, no sampling.

    python dpo.py                          # the embedded task, after sft.py and collect.py
    python dpo.py --kind ipo --beta 0.05

The optimum of "reward minus beta * KL" is pi*(y|x) ~ pi_ref(y|x) exp(r(x,y) / beta), so a policy *is* a reward:
r(x,y) = beta * log(pi(y|x) / pi_ref(y|x)) + a constant of the prompt. Put that into the Bradley-Terry likelihood and
the reward model is gone (Rafailov et al. 2023, arXiv:2305.18290, eq. 7):

    L = - mean of  log sigmoid( beta * [ log pi/pi_ref (y_w|x) - log pi/pi_ref (y_l|x) ] )
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from data.batches import RankedBatch, RankedExamples, epoch_batches, micro_batches, ranked_batch
from frame import action_logprobs, token_logprobs
from frozen import make_reference, trainable, trunk
from lib.checkpoint import save_model
from lib.cli import TrainConfig, check, flag, run_main
from lib.run import RunFolder, gate
from lib.setup import load_policy, load_preferences
from lib.show import compare_samples
from lib.train import autocast, clip_gradients, prepare_blocks, set_lr
from model import GPT, flat_before, flat_index


# Losses of the margin h = log pi/pi_ref (chosen) - log pi/pi_ref (rejected), (B,) in nats -> (B,)


def sigmoid_loss(h: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """Rafailov et al. 2023, eq. 7; with label_smoothing Mitchell 2023."""
    return -(1 - label_smoothing) * F.logsigmoid(beta * h) - label_smoothing * F.logsigmoid(-beta * h)


def ipo_loss(h: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """Azar et al. 2023, arXiv:2310.12036, eq. 17."""
    return (h - 1 / (2 * beta)) ** 2


KINDS = {"sigmoid": sigmoid_loss, "ipo": ipo_loss}


@dataclass
class Config(TrainConfig):
    data: str = flag("out/data/rankings.jsonl", "rankings or pairs to learn from")
    held_out_data: str = flag("auto", "rankings of held-out prompts (auto: DATA_held_out.jsonl; empty: none)")
    policy: str = flag("out/sft", "checkpoint to start from; its frozen copy is the reference")
    out_dir: str = flag("out/dpo", "folder for the checkpoint and the logs")
    beta: float = flag(0.2, "strength of the pull towards the reference, in reward per nat", above=0)
    kind: str = flag("sigmoid", "loss: sigmoid (DPO) or ipo", choices=tuple(KINDS))
    label_smoothing: float = flag(0.0, "probability that a label is wrong (sigmoid only)", low=0, below=0.5)
    epochs: int = flag(1, "passes over the data; DPO overfits soon", low=1)
    batch_size: int = flag(12, "rankings an optimiser step; all pairs of a ranking are used", low=1)
    micro_batch: int = flag(16, "rankings a forward pass; changes memory and nothing else (0: the whole batch)", low=0)
    lr: float = flag(2e-4, "peak learning rate", low=0)
    warmup: int = flag(20, "steps of linear warm-up, before the linear decay", low=0)
    max_new_tokens: int = flag(48, "longest of the printed samples, tokens", low=1)
    log_every: int = flag(20, "steps between log lines", low=1)


# What the embedded task gives at default settings; the loss as a share of what it is before training.
EXPECTED_ACCURACY, EXPECTED_LOSS, EXPECTED_EOS = (0.62, 0.90), (0.6, 0.95), (0.98, 1.0)


# -------------------------------------------------------------------------------- the mathematics


def sequence_logprobs(model: GPT, tokens: Tensor, completion_mask: Tensor) -> Tensor:
    """log pi(completion | prompt): the sum over completion tokens, EOS included, prompt and filler left out.

    tokens (B, T), completion_mask (B, T) -> (B,) nats. A sum, not a mean: DPO is about the probability of the whole
    text. Raises ValueError for a row without completion tokens: its log-prob would be 0 whatever the model does."""
    if not completion_mask[:, 1:].any(1).all():  # position 0 has no context to be predicted from
        raise ValueError("sequence_logprobs: a row has no completion token")
    return token_logprobs(model, tokens, mask=completion_mask[:, 1:]).sum(1)


def dpo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    beta: float,
    label_smoothing: float = 0.0,
    kind: str = "sigmoid",
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses of preference pairs: sequence log-probs in nats, (B,) -> losses, chosen_rewards, rejected_rewards, (B,).

    With h = log pi/pi_ref (chosen) - log pi/pi_ref (rejected) and e = label_smoothing:
    sigmoid   -(1-e) log sigmoid(beta h) - e log sigmoid(-beta h)     ln 2 at pi = pi_ref
    ipo       (h - 1 / (2 beta))^2                                    1 / (4 beta^2) at pi = pi_ref
    The implicit rewards beta * log pi/pi_ref are for logging: no gradient."""
    if beta <= 0:
        raise ValueError(f"beta must be above 0, not {beta}: at 0 the loss is constant")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must be in [0, 0.5), not {label_smoothing}")
    if kind not in KINDS or (kind != "sigmoid" and label_smoothing):
        raise ValueError(f"kind must be 'sigmoid', or one of {', '.join(KINDS)} without label_smoothing, not {kind!r}")
    chosen_ratio, rejected_ratio = policy_chosen - ref_chosen, policy_rejected - ref_rejected  # (B,)
    losses = KINDS[kind](chosen_ratio - rejected_ratio, beta, label_smoothing)
    return losses, beta * chosen_ratio.detach(), beta * rejected_ratio.detach()


def ranking_pairs(logprobs: Tensor, ranks: Tensor) -> tuple[Tensor, Tensor]:
    """All strict pairs of the rankings: logprobs, ranks (N, K) -> chosen, rejected (P,). Ties and gaps make no pair."""
    i, j = torch.triu_indices(ranks.size(1), ranks.size(1), offset=1, device=ranks.device)
    row, pair = ((ranks[:, i] >= 0) & (ranks[:, i] < ranks[:, j])).nonzero(as_tuple=True)  # (P,) each
    return logprobs[row, i[pair]], logprobs[row, j[pair]]


# -------------------------------------------------------------------------------- rankings


def ranking_logprobs(model: GPT, batch: RankedBatch, below: Tensor | None = None) -> Tensor:
    """(N, K) sequence_logprobs of the completions of N rankings, 0 where one has fewer. The prompt is read once for all
    of them. below (N, T, C): what the frozen blocks make of the batch's tokens, if that is known."""
    owner, K = batch.owner[:, 1:], batch.ranks.size(1)  # (N, T-1)
    sampled = owner < K  # (N, T-1) where the next token is a completion's
    places = flat_index(sampled, batch.tokens.size(1))  # (n,)
    before = flat_before(batch.positions).flatten()[places + 1]  # (n,) the token before it in its own text predicts it
    logits = model(batch.tokens, before, batch.positions, below=below)  # (n, V)
    logprobs = action_logprobs(logits, batch.tokens, sampled, places=places)  # (N, T-1)
    return logprobs.new_zeros(len(owner), K + 1).scatter_add(1, owner, logprobs)[:, :K]


PAIR_FIGURES = ("loss", "chosen_reward", "rejected_reward", "chosen_logprob", "rejected_logprob")


def pair_losses(policy: GPT, reference: GPT, items: list[RankedExamples], config: Config) -> Tensor:
    """PAIR_FIGURES of all P strict pairs of some rankings, (5, P). The losses alone carry a gradient."""
    batch = ranked_batch(items, policy.device)
    # policy and reference in the same dtype: only then does the loss start at ln 2
    with autocast(policy.device, config.dtype):
        below = trunk(policy, batch.tokens, batch.positions)  # (N, T, C) with --train_layers, once for both
        logprobs = ranking_logprobs(policy, batch, below)  # (N, K)
        with torch.no_grad():
            ref_logprobs = ranking_logprobs(reference, batch, below)  # (N, K)
    chosen, rejected = ranking_pairs(logprobs, batch.ranks)  # (P,) each
    ref_chosen, ref_rejected = ranking_pairs(ref_logprobs, batch.ranks)  # (P,) each
    figures = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, config.beta, config.label_smoothing, config.kind)
    return torch.stack([*figures, chosen.detach(), rejected.detach()])


def figures_of(pairs: Tensor) -> dict[str, float]:
    """Means over the pairs, pairs (5, P). Both log-probs may fall while the margin grows: the loss asks for the
    margin."""
    margin = pairs[1] - pairs[2]  # (P,)
    accuracy = (0.5 + 0.5 * torch.sign(margin)).mean().item()  # an equal pair counts as half
    means = dict(zip(PAIR_FIGURES, pairs.mean(1).tolist(), strict=True))
    return {**means, "margin": margin.mean().item(), "accuracy": accuracy}


@torch.no_grad()
def evaluate(policy: GPT, reference: GPT, items: list[RankedExamples], config: Config) -> dict[str, float]:
    """The figures over all pairs of held-out rankings."""
    policy.eval()
    parts = micro_batches(items, config.micro_batch or 64)
    return figures_of(torch.cat([pair_losses(policy, reference, part, config) for part in parts], 1))


def report(results: dict, logged: list[dict], task: str) -> list[dict]:
    """Print the held-out figures, warn of overfitting -> gates, on the embedded task. logged: the rows of the log, of
    which the first is of the policy before any step."""
    if "accuracy" not in results:
        return []
    accuracy, loss = results["accuracy"], results["loss"]
    last = [row["accuracy"] for row in logged[-10:]]  # on the training pairs of the last logged steps
    train_accuracy = sum(last) / len(last)
    print(f"DPO held-out accuracy {accuracy:.3f} (training {train_accuracy:.3f}), loss {loss:.3f}")
    if train_accuracy > 0.95 and accuracy < train_accuracy - 0.15:
        print("WARNING: it knows the training pairs by heart; take fewer --epochs or a lower --lr")
    if task != "tiny":
        return []
    share = loss / logged[0]["loss"]
    return [
        gate("DPO held-out accuracy", accuracy, *EXPECTED_ACCURACY, f"margin {results['margin']:.2f}"),
        gate("DPO held-out loss, share of the start's", share, *EXPECTED_LOSS),
        gate("DPO EOS rate", results["eos_rate"], *EXPECTED_EOS),
    ]


# -------------------------------------------------------------------------------- the loop


def train(config: Config) -> dict:
    check(config.kind == "sigmoid" or config.label_smoothing == 0, "--label_smoothing belongs to --kind sigmoid")
    start = load_policy(config)
    policy, reference, tokenizer = start.model, make_reference(start.model), start.tokenizer
    data = load_preferences(config, start)
    batches = epoch_batches(data.items, config)
    optimizer = torch.optim.AdamW(trainable(policy), lr=config.lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    prepare_blocks(config, policy, reference)
    run = RunFolder(config, len(batches), policy=policy, optimizer=optimizer)
    if run.done:
        return run.done

    policy.eval()  # no dropout: policy and reference must differ by their weights alone
    with run:  # whatever ends it in here, the last whole step is saved
        for step in run.steps("dpo"):
            n_pairs = sum(item.n_strict_pairs for item in batches[step])  # of the whole step
            lr = set_lr(optimizer, step, len(batches), config.warmup, "linear")
            optimizer.zero_grad(set_to_none=True)
            parts = []  # (5, p) each, PAIR_FIGURES
            for part in micro_batches(batches[step], config.micro_batch):
                pairs = pair_losses(policy, reference, part, config)
                (pairs[0].sum() / n_pairs).backward()
                parts.append(pairs.detach())
            norm = clip_gradients(policy, config.grad_clip)
            optimizer.step()
            if step == 0 or run.due(step, config.log_every):
                figures = figures_of(torch.cat(parts, 1))
                run.log(step + 1, "loss accuracy margin", **figures, lr=lr, grad_norm=norm.item())

        save_model(config.out_dir, policy, tokenizer.saved, "dpo.py", config, data.task)
        prompts = [item.examples[0].prompt for item in (data.held_out or data.items)[:256]]
        results = compare_samples(policy, reference, prompts, tokenizer, config.max_new_tokens, config.seed)
        results |= evaluate(policy, reference, data.held_out, config) if data.held_out else {}
        results["gates"] = report(results, run.history("accuracy"), data.task)
        return run.finish(results)


def main() -> None:
    run_main(train, Config, __doc__)


if __name__ == "__main__":
    main()
