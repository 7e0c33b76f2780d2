"""Stage 3b: direct preference optimisation. Ranked completions -> a policy; no reward model, no sampling.

    python dpo.py                          # the embedded task, after sft.py and data/collect.py
    python dpo.py --kind ipo --beta 0.05

The optimum of "reward minus beta * KL" is pi*(y|x) ~ pi_ref(y|x) exp(r(x,y) / beta), so a policy *is* a reward:
r(x,y) = beta * log(pi(y|x) / pi_ref(y|x)) + a constant of the prompt. Put that into the Bradley-Terry likelihood and the reward
model is gone (Rafailov et al. 2023, arXiv:2305.18290, eq. 7):

    L = - mean of  log sigmoid( beta * [ log pi/pi_ref (y_w|x) - log pi/pi_ref (y_l|x) ] )
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from common import RunFolder, autocast, check, check_ranges, flag, gate, generator_for, load_model, lr_at, pick_device, run_main, save_model, set_lr
from data.batches import RankedBatch, RankedExamples, by_length, encode_rankings, length_batches, ranked_batch
from data.files import read_rankings
from data.tokenizer import load_tokenizer
from model import completion_mask, generate, token_logprobs


@dataclass
class Config:
    data: str = flag("out/data/rankings.jsonl", "rankings or pairs to learn from")
    held_out_data: str = flag("out/data/rankings_held_out.jsonl", "rankings of held-out prompts; empty: none")
    policy: str = flag("out/sft", "checkpoint to start from; its frozen copy is the reference")
    out_dir: str = flag("out/dpo", "folder for the checkpoint and the logs")
    beta: float = flag(0.1, "strength of the pull towards the reference, in reward per nat")
    kind: str = flag("sigmoid", "loss: sigmoid (DPO) or ipo", choices=("sigmoid", "ipo"))
    label_smoothing: float = flag(0.0, "probability that a label is wrong (conservative DPO), for --kind sigmoid")
    epochs: int = flag(1, "passes over the data; DPO overfits soon")
    batch_size: int = flag(12, "rankings an optimiser step; all pairs of a ranking are used")
    micro_batch: int = flag(0, "rankings a forward pass; changes memory and nothing else (0: the whole batch)")
    lr: float = flag(3e-4, "peak learning rate")
    warmup: int = flag(20, "steps of linear warm-up, before the linear decay")
    grad_clip: float = flag(1.0, "largest gradient norm")
    max_new_tokens: int = flag(48, "longest of the printed samples, tokens")
    log_every: int = flag(20, "steps between log lines")
    save_every: int = flag(0, "steps between states to resume from (0: only at the end)")
    resume: bool = flag(False, "go on from out_dir/state.pt")
    strict: bool = flag(False, "exit with status 1 if a gate fails")
    seed: int = flag(1, "seed of the batches")
    device: str = flag("auto", "auto, cpu, cuda or mps")
    dtype: str = flag("float32", "of the matrix products", choices=("float32", "bfloat16"))
    compile: bool = flag(False, "compile the blocks with torch.compile")


# What the embedded task gives at default settings.
EXPECTED_ACCURACY = (0.62, 0.90)
EXPECTED_EOS = (0.98, 1.0)


def sequence_logprobs(model: nn.Module, tokens: Tensor, completion_mask: Tensor) -> Tensor:
    """log pi(completion | prompt): the sum over completion tokens, EOS included, prompt and filler left out.

    tokens (B, T), completion_mask (B, T) -> (B,) nats. A sum, not a mean: DPO is about the probability of the whole text.
    Raises ValueError for a row without completion tokens: its log-prob would be 0 whatever the model does."""
    if not completion_mask[:, 1:].any(1).all():  # position 0 has no context to be predicted from
        raise ValueError("sequence_logprobs: a row has no completion token")
    return torch.where(completion_mask[:, 1:].bool(), token_logprobs(model, tokens), 0.0).sum(1)


def dpo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    beta: float,
    label_smoothing: float = 0.0,
    kind: str = "sigmoid",
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses of preference pairs. All arguments (B,), sequence log-probs in nats -> losses (B,), chosen_rewards (B,), rejected_rewards (B,).

    With h = log pi/pi_ref (chosen) - log pi/pi_ref (rejected) and e = label_smoothing:
    sigmoid   -(1-e) log sigmoid(beta h) - e log sigmoid(-beta h)      Rafailov et al. 2023, eq. 7; e > 0: conservative DPO (Mitchell 2023)
    ipo       (h - 1 / (2 beta))^2                                     Azar et al. 2023, arXiv:2310.12036, eq. 17
    The implicit rewards beta * log pi/pi_ref are for logging and carry no gradient. At pi = pi_ref: ln 2, and 1 / (4 beta^2).
    """
    if beta <= 0:
        raise ValueError(f"beta must be above 0, not {beta}: at 0 the loss is constant")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must be in [0, 0.5), not {label_smoothing}")
    chosen_ratio = policy_chosen - ref_chosen  # (B,)
    rejected_ratio = policy_rejected - ref_rejected  # (B,)
    h = chosen_ratio - rejected_ratio
    if kind == "sigmoid":
        losses = -(1 - label_smoothing) * F.logsigmoid(beta * h) - label_smoothing * F.logsigmoid(-beta * h)
    elif kind == "ipo":
        if label_smoothing:
            raise ValueError("label_smoothing belongs to kind 'sigmoid'")
        losses = (h - 1 / (2 * beta)) ** 2
    else:
        raise ValueError(f"kind must be 'sigmoid' or 'ipo', not {kind!r}")
    return losses, beta * chosen_ratio.detach(), beta * rejected_ratio.detach()


def ranking_pairs(logprobs: Tensor, ranks: Tensor) -> tuple[Tensor, Tensor]:
    """All strict pairs of the rankings: logprobs, ranks (N, K) -> chosen (P,), rejected (P,). Ties and absent completions make no pair."""
    i, j = torch.triu_indices(ranks.size(1), ranks.size(1), offset=1, device=ranks.device)
    strict = (ranks[:, i] >= 0) & (ranks[:, i] < ranks[:, j])
    return logprobs[:, i][strict], logprobs[:, j][strict]


def count_pairs(item: RankedExamples) -> int:
    return sum(a < b for n, a in enumerate(item.ranks) for b in item.ranks[n + 1 :])


def batch_logprobs(model: nn.Module, batch: RankedBatch) -> Tensor:
    """(M,) log-probs of all completions of the batch, chosen and rejected in one forward pass, each text once."""
    return sequence_logprobs(model, batch.tokens, completion_mask(batch.prompt_lens, batch.lens, batch.tokens.size(1)))


@torch.no_grad()
def reference_logprobs(reference: nn.Module, items: list[RankedExamples], filler: int, device, batch_size: int = 64) -> list[Tensor]:
    """The reference never changes: one pass over the data before training, (k,) log-probs for each ranking."""
    found: list[Tensor] = [torch.empty(0)] * len(items)
    for rows in by_length([len(item) for item in items], batch_size):
        logprobs = batch_logprobs(reference, ranked_batch([items[i] for i in rows], filler, device))
        for i, part in zip(rows, logprobs.split([len(items[i].ranks) for i in rows]), strict=True):
            found[i] = part
    return found


def figures_of(losses: Tensor, chosen_rewards: Tensor, rejected_rewards: Tensor, chosen: Tensor, rejected: Tensor) -> dict[str, float]:
    """What to look at. Both log-probs may fall while the margin grows: the loss asks for the margin alone."""
    margin = chosen_rewards - rejected_rewards
    return {
        "loss": losses.mean().item(),
        "accuracy": (0.5 + 0.5 * torch.sign(margin)).mean().item(),
        "margin": margin.mean().item(),
        "chosen_reward": chosen_rewards.mean().item(),
        "rejected_reward": rejected_rewards.mean().item(),
        "chosen_logprob": chosen.mean().item(),
        "rejected_logprob": rejected.mean().item(),
    }


@torch.no_grad()
def evaluate(policy: nn.Module, items: list[RankedExamples], ref: list[Tensor], config: Config, filler: int, device) -> dict[str, float]:
    """The figures over all pairs of held-out rankings."""
    policy.eval()
    parts = []
    for rows in by_length([len(item) for item in items], 64):
        batch = ranked_batch([items[i] for i in rows], filler, device)
        chosen, rejected = ranking_pairs(batch_logprobs(policy, batch)[batch.index], batch.ranks)
        ref_chosen, ref_rejected = ranking_pairs(torch.cat([ref[i] for i in rows])[batch.index], batch.ranks)
        losses, cr, rr = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, config.beta, config.label_smoothing, config.kind)
        parts.append(torch.stack([losses, cr, rr, chosen, rejected]))
    return figures_of(*torch.cat(parts, 1))


def train(config: Config) -> dict:
    check_ranges(config)
    check(config.beta > 0, "--beta must be above 0")
    check(0 <= config.label_smoothing < 0.5, "--label_smoothing must be in [0, 0.5)")
    check(config.kind == "sigmoid" or config.label_smoothing == 0, "--label_smoothing belongs to --kind sigmoid")
    device = pick_device(config.device)
    torch.manual_seed(config.seed)
    policy, tokenizer_name = load_model(config.policy, device, made_by="python sft.py")
    tokenizer = load_tokenizer(tokenizer_name)
    reference = copy.deepcopy(policy).requires_grad_(False)
    filler, block_size = tokenizer.eos_id, policy.config.block_size

    items, dropped = encode_rankings(read_rankings(config.data, "python -m data.collect"), tokenizer, block_size)
    check(bool(items), f"{config.data}: no ranking compares two different completions")
    held_out = (
        encode_rankings(read_rankings(config.held_out_data, "python -m data.collect"), tokenizer, block_size)[0] if config.held_out_data else []
    )
    print(
        f"{config.data}: {len(items):,} rankings, {sum(map(count_pairs, items)):,} pairs"
        + (f", dropped {dropped} that compare nothing" if dropped else "")
    )
    with autocast(device, config.dtype):  # as the policy's in training: only then does the first loss start at ln 2
        ref = reference_logprobs(reference, items, filler, device)
    held_out_ref = reference_logprobs(reference, held_out, filler, device)

    lengths = [len(item) for item in items]
    batches = [
        b
        for epoch in range(config.epochs)
        for b in length_batches(lengths, config.batch_size, generator_for(torch.device("cpu"), config.seed, epoch))
    ]
    optimizer = torch.optim.AdamW(policy.parameters(), lr=config.lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    if config.compile:
        for block in policy.h:
            block.compile()
    run = RunFolder(config, config.resume)
    start = 0
    if config.resume:
        state = run.load_state(device)
        policy.load_state_dict(state["policy"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]

    policy.eval()  # no dropout: policy and reference must differ by their weights alone
    bar = tqdm(range(start, len(batches)), initial=start, total=len(batches), desc="dpo", mininterval=1)
    for step in bar:
        rows = batches[step]
        n_pairs = sum(count_pairs(items[i]) for i in rows)  # of the whole step
        set_lr(optimizer, config.lr * lr_at(step, len(batches), config.warmup, "linear"))
        optimizer.zero_grad(set_to_none=True)
        parts = []
        size = config.micro_batch or len(rows)
        for first in range(0, len(rows), size):
            part = rows[first : first + size]
            batch = ranked_batch([items[i] for i in part], filler, device, multiple=32 if device.type == "cuda" else 1)
            with autocast(device, config.dtype):
                logprobs = batch_logprobs(policy, batch)  # (M,)
            chosen, rejected = ranking_pairs(logprobs[batch.index], batch.ranks)  # (P,)
            ref_chosen, ref_rejected = ranking_pairs(torch.cat([ref[i] for i in part])[batch.index], batch.ranks)
            losses, chosen_rewards, rejected_rewards = dpo_loss(
                chosen, rejected, ref_chosen, ref_rejected, config.beta, config.label_smoothing, config.kind
            )
            (losses.sum() / n_pairs).backward()
            parts.append(torch.stack([losses.detach(), chosen_rewards, rejected_rewards, chosen.detach(), rejected.detach()]))
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), config.grad_clip)
        optimizer.step()

        last = step + 1 == len(batches)
        if (step + 1) % config.log_every == 0 or last or step == 0:
            figures = figures_of(*torch.cat(parts, 1))
            run.log(step=step + 1, **figures, lr=optimizer.param_groups[0]["lr"], grad_norm=norm.item())
            bar.set_postfix(loss=f"{figures['loss']:.3f}", accuracy=f"{figures['accuracy']:.2f}", margin=f"{figures['margin']:.2f}")
        if (config.save_every and (step + 1) % config.save_every == 0) or last:
            run.save_state(step + 1, policy=policy.state_dict(), optimizer=optimizer.state_dict())

    save_model(config.out_dir, policy, tokenizer.name, "dpo.py", config)
    results: dict = {"gates": []}
    max_new_tokens = min(config.max_new_tokens, block_size - 1)
    prompts = [item.examples[0].prompt[-(block_size - max_new_tokens) :] for item in (held_out or items)[:256]]
    rollout = generate(policy, prompts, max_new_tokens, eos_id=tokenizer.eos_id, generator=generator_for(device, config.seed))
    for prompt, completion in list(zip(prompts, rollout.completions(), strict=True))[:3]:
        print(f"  {tokenizer.decode(prompt)!r} -> {tokenizer.decode(completion)!r}")
    results["eos_rate"] = rollout.ended.float().mean().item()
    if held_out:
        results |= evaluate(policy, held_out, held_out_ref, config, filler, device)
        run.log(step=len(batches), **{f"held_out_{k}": v for k, v in results.items() if isinstance(v, float)})
        note = f"margin {results['margin']:.2f}, loss {results['loss']:.3f} (ln 2 = 0.693 at the start)"
        if tokenizer.name == "tiny":
            results["gates"].append(gate("DPO held-out accuracy", results["accuracy"], *EXPECTED_ACCURACY, note))
            results["gates"].append(gate("DPO EOS rate", results["eos_rate"], *EXPECTED_EOS))
        else:
            print(f"DPO held-out accuracy {results['accuracy']:.3f} ({note})")
    return run.finish(results)


def main() -> None:
    run_main(train, Config, __doc__)


if __name__ == "__main__":
    main()
