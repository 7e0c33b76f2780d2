"""Stage 1: supervised fine-tuning. Demonstrations -> a policy that imitates them.

    python sft.py                                                            # the embedded task, a small GPT from scratch
    python sft.py --init gpt2 --tokenizer gpt2 --data my.jsonl --lr 2e-5     # GPT-2 on your own demonstrations

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
from tqdm import tqdm

from common import (
    RunFolder,
    UserError,
    autocast,
    check,
    check_ranges,
    first_line,
    flag,
    gate,
    generator_for,
    load_model,
    lr_at,
    pick_device,
    run_main,
    save_model,
    set_lr,
)
from data.batches import Example, by_length, encode_example, length_batches, pad
from data.files import read_demonstrations
from data.tokenizer import NAMES, load_tokenizer
from model import GPT, GPT2_SIZES, GPTConfig, completion_mask, generate


@dataclass
class Config:
    data: str = flag("out/data/demonstrations.jsonl", "demonstrations to learn from")
    held_out_data: str = flag("out/data/demonstrations_held_out.jsonl", "demonstrations for the held-out loss; empty: none")
    out_dir: str = flag("out/sft", "folder for the checkpoint and the logs")
    init: str = flag("", "where to start: empty (from scratch), gpt2 / gpt2-medium / ..., a Hugging Face folder, or a checkpoint")
    tokenizer: str = flag("tiny", "vocabulary", choices=NAMES)
    n_layer: int = flag(3, "blocks (from scratch)")
    n_head: int = flag(4, "attention heads (from scratch)")
    n_embd: int = flag(128, "channels (from scratch)")
    block_size: int = flag(96, "longest sequence, tokens (from scratch)")
    dropout: float = flag(0.0, "dropout probability while training")
    epochs: int = flag(1, "passes over the data")
    batch_size: int = flag(16, "demonstrations an optimiser step")
    micro_batch: int = flag(0, "demonstrations a forward pass; changes memory and nothing else (0: the whole batch)")
    lr: float = flag(3e-3, "peak learning rate")
    warmup: int = flag(50, "steps of linear warm-up, before the cosine decay")
    weight_decay: float = flag(0.1, "AdamW's decay of matrices")
    grad_clip: float = flag(1.0, "largest gradient norm")
    log_every: int = flag(50, "steps between log lines")
    eval_every: int = flag(1000, "steps between held-out losses and samples")
    save_every: int = flag(0, "steps between states to resume from (0: only at the end)")
    resume: bool = flag(False, "go on from out_dir/state.pt")
    strict: bool = flag(False, "exit with status 1 if a gate fails")
    seed: int = flag(1, "seed of weights and batches")
    device: str = flag("auto", "auto, cpu, cuda or mps")
    dtype: str = flag("float32", "of the matrix products", choices=("float32", "bfloat16"))
    compile: bool = flag(False, "compile the blocks with torch.compile")


# What the embedded task gives at default settings (seeds 1 to 5); printed beside what this run gave.
EXPECTED_LOSS = (0.72, 0.88)
EXPECTED_EOS = (0.95, 1.0)


def sft_loss(logits: Tensor, tokens: Tensor, completion_mask: Tensor, n_tokens: int | Tensor | None = None) -> Tensor:
    """Mean negative log-likelihood of the completion tokens.

    logits (B, T, V); tokens (B, T); completion_mask (B, T), True on completion tokens, EOS included -> scalar, nats a token.
    `n_tokens` is what the sum is divided by: by default the completion tokens here; when a step is split into micro-batches,
    the completion tokens of the whole step, so that the gradients add up to those of one large batch.
    """
    target_mask = completion_mask[:, 1:].bool()  # (B, T-1): logits at t predict the token at t+1
    predictions = logits[:, :-1][target_mask]  # (completion tokens, V)
    predictions = predictions.to(torch.promote_types(predictions.dtype, torch.float32))
    losses = F.cross_entropy(predictions, tokens[:, 1:][target_mask], reduction="sum")
    return losses / (target_mask.sum().clamp(min=1) if n_tokens is None else n_tokens)


def load_examples(path: str, tokenizer, block_size: int, made_by: str = "") -> list[Example]:
    rows = read_demonstrations(path, made_by)
    examples = [encode_example(tokenizer, p, c, block_size) for p, c in rows]
    kept = [e for e in examples if e is not None]
    if len(kept) < len(rows):
        print(f"{path}: dropped {len(rows) - len(kept)} of {len(rows)} rows without completion tokens")
    check(bool(kept), f"{path}: no row has completion tokens")
    return kept


def make_batch(examples: list[Example], filler: int, device) -> tuple[Tensor, Tensor]:
    """tokens (B, T), completion mask (B, T)."""
    tokens, lens = pad([e.ids for e in examples], filler, device, multiple=32 if device.type == "cuda" else 1)
    prompt_lens = torch.tensor([len(e.prompt) for e in examples], device=device)
    return tokens, completion_mask(prompt_lens, lens, tokens.size(1))


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
            model = GPT.from_pretrained(config.init, dropout=config.dropout)
        except (OSError, KeyError, ValueError, RuntimeError) as error:
            raise UserError(f"--init {config.init}: can't be loaded ({first_line(error)})") from None
        check(model.config.vocab_size >= n_vocab, f"--init {config.init}: {model.config.vocab_size} token ids, but {config.tokenizer} has {n_vocab}")
        if model.config.vocab_size > n_vocab:  # a padded table: its extra rows are no tokens
            model.config.real_vocab = n_vocab
        return model.to(device)
    model, tokenizer_name = load_model(config.init, device)
    check(tokenizer_name == config.tokenizer, f"--init {config.init} was trained with --tokenizer {tokenizer_name}")
    for part in [model.config, *(m for m in model.modules() if hasattr(m, "dropout"))]:
        part.dropout = config.dropout
    return model


@torch.no_grad()
def held_out_loss(model: GPT, examples: list[Example], batch_size: int, filler: int, device) -> float:
    """Mean over all completion tokens, nats a token."""
    model.eval()
    total = torch.zeros((), device=device)
    for rows in by_length([len(e) for e in examples], batch_size):
        tokens, mask = make_batch([examples[i] for i in rows], filler, device)
        total += sft_loss(model(tokens), tokens, mask, n_tokens=1)
    return total.item() / sum(len(e.completion) for e in examples)


def sample(model: GPT, examples: list[Example], tokenizer, seed: int, max_new_tokens: int = 48, show: int = 3) -> float:
    """Answer held-out prompts at temperature 1, print a few; -> share that ended in EOS."""
    max_new_tokens = min(max_new_tokens, model.config.block_size - 1)
    prompts = [e.prompt[-(model.config.block_size - max_new_tokens) :] for e in examples[:256]]
    rollout = generate(model, prompts, max_new_tokens, eos_id=tokenizer.eos_id, generator=generator_for(model.device, seed))
    for prompt, completion in list(zip(prompts, rollout.completions(), strict=True))[:show]:
        tqdm.write(f"  {tokenizer.decode(prompt)!r} -> {tokenizer.decode(completion)!r}")
    return rollout.ended.float().mean().item()


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
    held_out = load_examples(config.held_out_data, tokenizer, model.config.block_size, "python -m data.tiny") if config.held_out_data else []

    lengths = [len(e) for e in examples]
    batches = [
        b
        for epoch in range(config.epochs)
        for b in length_batches(lengths, config.batch_size, generator_for(torch.device("cpu"), config.seed, epoch))
    ]
    optimizer = make_optimizer(model, config)
    if config.compile:
        for block in model.h:
            block.compile()
    run = RunFolder(config, config.resume)
    start = 0
    if config.resume:
        state = run.load_state(device)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
    print(f"SFT: {sum(p.numel() for p in model.parameters()):,} parameters, {len(examples):,} demonstrations, {len(batches)} steps on {device}")

    first_loss = held_out_loss(model, held_out, config.batch_size, tokenizer.eos_id, device) if held_out else math.nan
    loss_now = first_loss
    bar = tqdm(range(start, len(batches)), initial=start, total=len(batches), desc="sft", mininterval=1)
    clock, tokens_seen = time.perf_counter(), 0
    for step in bar:
        model.train()
        rows = batches[step]
        n_tokens = sum(len(examples[i].completion) for i in rows)  # of the whole step
        set_lr(optimizer, config.lr * lr_at(step, len(batches), config.warmup))
        optimizer.zero_grad(set_to_none=True)
        size = config.micro_batch or len(rows)
        loss = torch.zeros((), device=device)
        for first in range(0, len(rows), size):
            tokens, mask = make_batch([examples[i] for i in rows[first : first + size]], tokenizer.eos_id, device)
            with autocast(device, config.dtype):
                logits = model(tokens)  # (b, T, V)
            part = sft_loss(logits, tokens, mask, n_tokens)
            part.backward()
            loss += part.detach()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        optimizer.step()

        tokens_seen += sum(lengths[i] for i in rows)
        last = step + 1 == len(batches)
        if (step + 1) % config.log_every == 0 or last:
            run.log(
                step=step + 1,
                loss=loss.item(),
                lr=optimizer.param_groups[0]["lr"],
                grad_norm=norm.item(),
                tokens_per_s=round(tokens_seen / (time.perf_counter() - clock)),
            )
            bar.set_postfix(loss=f"{loss.item():.3f}", held_out=f"{loss_now:.3f}")
        if held_out and ((step + 1) % config.eval_every == 0 or last):
            loss_now = held_out_loss(model, held_out, config.batch_size, tokenizer.eos_id, device)
            run.log(step=step + 1, held_out_loss=loss_now)
            if not last:
                sample(model, held_out, tokenizer, config.seed)
        if (config.save_every and (step + 1) % config.save_every == 0) or last:
            run.save_state(step + 1, model=model.state_dict(), optimizer=optimizer.state_dict())

    save_model(config.out_dir, model, tokenizer.name, "sft.py", config)
    results: dict = {"held_out_loss": loss_now, "first_loss": first_loss, "gates": []} if held_out else {"gates": []}
    if held_out:
        results["eos_rate"] = sample(model, held_out, tokenizer, config.seed)
        if tokenizer.name == "tiny":
            results["gates"].append(
                gate("SFT held-out loss", loss_now, *EXPECTED_LOSS, f"before training {first_loss:.2f}; ln V {math.log(tokenizer.n_vocab):.2f}")
            )
            results["gates"].append(gate("SFT EOS rate", results["eos_rate"], *EXPECTED_EOS))
        else:
            print(f"SFT held-out loss {loss_now:.3f} (before training {first_loss:.3f}), EOS rate {results['eos_rate']:.2f}")
    return run.finish(results)


def main() -> None:
    run_main(train, Config, __doc__)


if __name__ == "__main__":
    main()
