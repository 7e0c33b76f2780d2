"""Stage 1: supervised fine-tuning. Demonstrations -> a policy that imitates them.

    python sft.py                                                            # the embedded task, a small GPT from
    scratch python sft.py --init gpt2 --tokenizer gpt2 --data my.jsonl --lr 2e-5     # GPT-2 on your own demonstrations

Maximises the log-likelihood of the completions given their prompts (Ouyang et al. 2022, arXiv:2203.02155, section 3.5):

    L = - 1/N  sum over completion tokens t of  log pi(token_t | tokens before t)

with N the completion tokens of the whole optimiser step. The prompt is read, not learned; EOS is learned.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from cli import TrainConfig, UserError, check, check_ranges, first_line, flag, run_main
from common import (
    RunFolder,
    autocast,
    compile_blocks,
    due,
    gate,
    load_model,
    lr_at,
    pick_device,
    progress,
    save_model,
    set_lr,
    show_samples,
)
from data.batches import Example, by_length, epoch_batches, load_examples, make_batch, micro_batches
from data.tokenizer import NAMES, load_tokenizer
from model import GPT, GPTConfig, completion_mask
from weights import GPT2_SIZES, load_pretrained


@dataclass
class Config(TrainConfig):
    data: str = flag("out/data/demonstrations.jsonl", "demonstrations to learn from")
    held_out_data: str = flag(
        "out/data/demonstrations_held_out.jsonl", "demonstrations for the held-out loss; empty: none"
    )
    out_dir: str = flag("out/sft", "folder for the checkpoint and the logs")
    init: str = flag(
        "", "where to start: empty (from scratch), gpt2 / gpt2-medium / ..., a Hugging Face folder, or a checkpoint"
    )
    tokenizer: str = flag("tiny", "vocabulary", choices=NAMES)
    n_layer: int = flag(3, "blocks (from scratch)", low=1)
    n_head: int = flag(4, "attention heads (from scratch)", low=1)
    n_embd: int = flag(128, "channels (from scratch)", low=1)
    block_size: int = flag(96, "longest sequence, tokens (from scratch)", low=1)
    dropout: float = flag(0.0, "dropout probability while training", low=0, below=1)
    epochs: int = flag(1, "passes over the data", low=1)
    batch_size: int = flag(16, "demonstrations an optimiser step", low=1)
    micro_batch: int = flag(
        0, "demonstrations a forward pass; changes memory and nothing else (0: the whole batch)", low=0
    )
    lr: float = flag(3e-3, "peak learning rate", low=0)
    warmup: int = flag(50, "steps of linear warm-up, before the cosine decay", low=0)
    weight_decay: float = flag(0.1, "AdamW's decay of matrices", low=0)
    log_every: int = flag(50, "steps between log lines", low=1)
    eval_every: int = flag(1000, "steps between held-out losses and samples", low=1)


# What the embedded task gives at default settings (seeds 1 to 5); printed beside what this run gave.
EXPECTED_LOSS = (0.72, 0.88)
EXPECTED_EOS = (0.95, 1.0)


def sft_loss(logits: Tensor, tokens: Tensor, completion_mask: Tensor, n_tokens: int | Tensor | None = None) -> Tensor:
    """Mean negative log-likelihood of the completion tokens.

    logits (B, T, V); tokens (B, T); completion_mask (B, T), True on completion tokens, EOS included -> scalar, nats a
    token. `n_tokens` is what the sum is divided by: by default the completion tokens here; when a step is split into
    micro-batches, the completion tokens of the whole step, so that the gradients add up to those of one large batch.
    """
    target_mask = completion_mask[:, 1:].bool()  # (B, T-1): logits at t predict the token at t+1
    losses = F.cross_entropy(logits[:, :-1][target_mask].float(), tokens[:, 1:][target_mask], reduction="sum")
    return losses / (target_mask.sum().clamp(min=1) if n_tokens is None else n_tokens)


def initial_model(config: Config, n_vocab: int, device) -> GPT:
    """From scratch, from GPT-2's weights, or from a checkpoint; every start has the tokenizer's vocabulary."""
    if not config.init:
        try:
            shape = GPTConfig(n_vocab, config.block_size, config.n_layer, config.n_head, config.n_embd, config.dropout)
        except ValueError as error:
            raise UserError(str(error)) from None
        return GPT(shape).to(device)
    check(0 <= config.dropout < 1, f"--dropout must be in [0, 1), not {config.dropout}")
    folder = Path(config.init)
    if config.init in GPT2_SIZES or ((folder / "config.json").exists() and not (folder / "model.pt").exists()):
        try:
            model = load_pretrained(config.init, dropout=config.dropout)
        except (OSError, KeyError, ValueError, RuntimeError) as error:
            raise UserError(f"--init {config.init}: can't be loaded ({first_line(error)})") from None
        check(
            model.config.vocab_size >= n_vocab,
            f"--init {config.init}: {model.config.vocab_size} token ids, but {config.tokenizer} has {n_vocab}",
        )
        if model.config.vocab_size > n_vocab:  # a padded table: its extra rows are no tokens
            model.config.real_vocab = n_vocab
        return model.to(device)
    model, tokenizer_name = load_model(config.init, device)
    check(tokenizer_name == config.tokenizer, f"--init {config.init} was trained with --tokenizer {tokenizer_name}")
    for part in [model.config, *(m for m in model.modules() if hasattr(m, "dropout"))]:
        part.dropout = config.dropout
    return model


@torch.no_grad()
def held_out_loss(model: GPT, examples: list[Example], batch_size: int, device) -> float:
    """Mean over all completion tokens, nats a token."""
    model.eval()
    total = torch.zeros((), device=device)
    for rows in by_length(examples, batch_size):
        tokens, prompt_lens, lens = make_batch([examples[i] for i in rows], device)
        total += sft_loss(model(tokens), tokens, completion_mask(prompt_lens, lens, tokens.size(1)), n_tokens=1)
    return total.item() / sum(len(e.completion) for e in examples)


def make_optimizer(model: GPT, config: Config) -> torch.optim.AdamW:
    """AdamW that decays matrices only; biases and LayerNorm gains are left alone."""
    groups = [
        {"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.99), fused=True)


def train(config: Config) -> dict:
    check_ranges(config)
    device = pick_device(config.device)
    tokenizer = load_tokenizer(config.tokenizer)
    torch.manual_seed(config.seed)  # weights and dropout
    model = initial_model(config, tokenizer.n_vocab, device)
    examples = load_examples(config.data, tokenizer, model.config.block_size, "python -m data.tiny")
    held_out = []
    if config.held_out_data:
        held_out = load_examples(config.held_out_data, tokenizer, model.config.block_size, "python -m data.tiny")
    batches = epoch_batches(examples, config)
    optimizer = make_optimizer(model, config)
    if config.compile:
        compile_blocks(model)
    run = RunFolder(config)
    start = run.resume(device, model=model, optimizer=optimizer)["step"]
    n_parameters = sum(p.numel() for p in model.parameters())
    print(f"SFT: {n_parameters:,} parameters, {len(examples):,} demonstrations, {len(batches)} steps on {device}")

    first_loss = held_out_loss(model, held_out, config.batch_size, device) if held_out else math.nan
    loss_now = first_loss
    bar = progress(start, len(batches), "sft")
    clock, tokens_seen = time.perf_counter(), 0
    for step in bar:
        model.train()
        n_tokens = sum(len(e.completion) for e in batches[step])  # of the whole step
        set_lr(optimizer, config.lr * lr_at(step, len(batches), config.warmup))
        optimizer.zero_grad(set_to_none=True)
        loss = torch.zeros((), device=device)
        for part in micro_batches(batches[step], config.micro_batch):
            tokens, prompt_lens, lens = make_batch(part, device)  # (b, T), (b,), (b,)
            mask = completion_mask(prompt_lens, lens, tokens.size(1))  # (b, T)
            with autocast(device, config.dtype):
                logits = model(tokens)  # (b, T, V)
            part_loss = sft_loss(logits, tokens, mask, n_tokens)
            part_loss.backward()
            loss += part_loss.detach()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        optimizer.step()

        tokens_seen += sum(map(len, batches[step]))
        last = step + 1 == len(batches)
        if due(step, config.log_every, len(batches)):
            run.log(
                step=step + 1,
                loss=loss.item(),
                lr=optimizer.param_groups[0]["lr"],
                grad_norm=norm.item(),
                tokens_per_s=round(tokens_seen / (time.perf_counter() - clock)),
            )
            bar.set_postfix(loss=f"{loss.item():.3f}", held_out=f"{loss_now:.3f}")
        if held_out and due(step, config.eval_every, len(batches)):
            loss_now = held_out_loss(model, held_out, config.batch_size, device)
            run.log(step=step + 1, held_out_loss=loss_now)
            if not last:
                show_samples(model, [e.prompt for e in held_out[:256]], tokenizer, 48, config.seed)
        if due(step, config.save_every, len(batches)):
            run.save_state(step + 1, model=model, optimizer=optimizer)

    save_model(config.out_dir, model, tokenizer.name, "sft.py", config)
    results: dict = {"gates": []}
    if held_out:
        eos_rate = show_samples(model, [e.prompt for e in held_out[:256]], tokenizer, 48, config.seed)
        results |= {"held_out_loss": loss_now, "first_loss": first_loss, "eos_rate": eos_rate}
        if tokenizer.name == "tiny":
            note = f"before training {first_loss:.2f}; ln V {math.log(tokenizer.n_vocab):.2f}"
            results["gates"].append(gate("SFT held-out loss", loss_now, *EXPECTED_LOSS, note))
            results["gates"].append(gate("SFT EOS rate", eos_rate, *EXPECTED_EOS))
        else:
            print(f"SFT held-out loss {loss_now:.3f} (before training {first_loss:.3f}), EOS rate {eos_rate:.2f}")
    return run.finish(results)


def main() -> None:
    run_main(train, Config, __doc__)


if __name__ == "__main__":
    main()
