"""Stage 1: supervised fine-tuning. Demonstrations -> a policy that imitates them.

    python sft.py                                                          # the embedded task, from scratch
    python sft.py --init gpt2 --data my.jsonl --lr 2e-5                    # GPT-2 on your own demonstrations
    python sft.py --init SmolLM2-135M-Instruct.gguf --data my.jsonl --lr 2e-5   # or a Hugging Face folder

Maximises the log-likelihood of the completions given their prompts (Ouyang et al. 2022, arXiv:2203.02155, section 3.5):

    L = - 1/N  sum over completion tokens t of  log pi(token_t | tokens before t)

with N the completion tokens of the whole optimiser step. The prompt is read, not learned; EOS is learned.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from data.batches import Example, epoch_batches, make_batch, micro_batches
from data.tokenizer import TEMPLATES
from frame import completion_mask
from frozen import choose_trainable, trainable
from lib.checkpoint import save_model
from lib.cli import TrainConfig, flag, run_main
from lib.run import RunFolder, gate
from lib.setup import load_demonstrations, start_network
from lib.show import sample_prompts, show_samples
from lib.train import autocast, clip_gradients, prepare_blocks, set_lr
from model import GPT, at_least_float32


@dataclass
class Config(TrainConfig):
    data: str = flag("out/data/demonstrations.jsonl", "demonstrations to learn from")
    held_out_data: str = flag("auto", "demonstrations for the held-out loss (auto: DATA_held_out.jsonl; empty: none)")
    out_dir: str = flag("out/sft", "folder for the checkpoint and the logs")
    init: str = flag(
        "", "where to start: empty (from scratch), gpt2 / ..., a Hugging Face folder, a .gguf file, or a checkpoint"
    )
    tokenizer: str = flag("auto", "vocabulary: tiny, gpt2, a folder or a .gguf file (auto: that of --init, else tiny)")
    template: str = flag("auto", "around prompts (auto: the vocabulary's own)", choices=("auto", *TEMPLATES))
    n_layer: int = flag(3, "blocks (from scratch)", low=1)
    n_head: int = flag(4, "attention heads (from scratch)", low=1)
    n_embd: int = flag(128, "channels (from scratch)", low=1)
    block: str = flag("gpt2", "GPT-2's block or Llama's (from scratch)", choices=("gpt2", "llama"))
    rope_base: float = flag(1e4, "base of rotary positions (from scratch; 0: learned positions, as in GPT-2)", low=0)
    block_size: int = flag(0, "longest sequence, tokens (0: 96, or with --init the model's own)", low=0)
    dropout: float = flag(0.0, "dropout probability while training", low=0, below=1)
    epochs: int = flag(3, "passes over the data", low=1)
    batch_size: int = flag(32, "demonstrations an optimiser step", low=1)
    micro_batch: int = flag(
        16, "demonstrations a forward pass; changes memory and nothing else (0: the whole batch)", low=0
    )
    lr: float = flag(3e-3, "peak learning rate", low=0)
    warmup: int = flag(50, "steps of linear warm-up, before the cosine decay", low=0)
    weight_decay: float = flag(0.1, "AdamW's decay of matrices", low=0)
    log_every: int = flag(50, "steps between log lines", low=1)
    eval_every: int = flag(1000, "steps between held-out losses and samples", low=1)


# What the embedded task gives at default settings (seeds 1 to 5); printed beside what this run gave.
EXPECTED_LOSS = (0.62, 0.80)
EXPECTED_EOS = (0.95, 1.0)


def sft_loss(logits: Tensor, tokens: Tensor, completion_mask: Tensor, n_tokens: int | Tensor | None = None) -> Tensor:
    """Mean negative log-likelihood of the completion tokens.

    logits (B, T, V), or (N, V) of the N positions before a completion token alone; tokens (B, T); completion_mask (B,
    T), True on completion tokens, EOS included -> scalar, nats a token. `n_tokens` is what the sum is divided by: by
    default the completion tokens here; when a step is split into micro-batches, the completion tokens of the whole
    step, so that the gradients add up to those of one large batch."""
    target_mask = completion_mask[:, 1:].bool()  # (B, T-1): logits at t predict the token at t+1
    picked = logits if logits.dim() == 2 else logits[:, :-1][target_mask]  # (N, V)
    losses = F.cross_entropy(at_least_float32(picked), tokens[:, 1:][target_mask], reduction="sum")
    return losses / (target_mask.sum().clamp(min=1) if n_tokens is None else n_tokens)


def demonstration_loss(model: GPT, examples: list[Example], n_tokens: int, dtype: str = "float32") -> Tensor:
    """sft_loss of some demonstrations: logits at the N positions before a completion token alone, in one pass."""
    tokens, prompt_lens, lens = make_batch(examples, model.device, model.config.block_size)  # (b, T), (b,), (b,)
    mask = completion_mask(prompt_lens, lens, tokens.size(1))  # (b, T)
    with autocast(model.device, dtype):
        logits = model(tokens, mask[:, 1:])  # (N, V)
    return sft_loss(logits, tokens, mask, n_tokens)


@torch.no_grad()
def held_out_loss(model: GPT, examples: list[Example], config: Config) -> float:
    """Mean over all completion tokens, nats a token."""
    model.eval()
    total = torch.zeros((), device=model.device)
    for part in micro_batches(examples, config.micro_batch or config.batch_size):
        total += demonstration_loss(model, part, n_tokens=1)
    return total.item() / sum(len(e.completion) for e in examples)


def make_optimizer(model: GPT, config: Config) -> torch.optim.AdamW:
    """AdamW that decays matrices only; biases and LayerNorm gains are left alone."""
    matrices, vectors = ([p for p in trainable(model) if (p.dim() >= 2) == yes] for yes in (True, False))
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.99), fused=True)


def train(config: Config) -> dict:
    model, tokenizer = start_network(config)
    choose_trainable(model, config)
    data = load_demonstrations(config, tokenizer, model.config.block_size)
    batches = epoch_batches(data.items, config)
    optimizer = make_optimizer(model, config)
    prepare_blocks(config, model)
    run = RunFolder(config, len(batches), model=model, optimizer=optimizer)
    if run.done:
        return run.done
    n_parameters = sum(p.numel() for p in trainable(model))
    print(f"SFT: {n_parameters:,} parameters to train in {len(batches)} steps on {model.device}")
    asked = [e.prompt for e in data.held_out[:256]]
    if data.held_out and run.first == 0:
        run.log(0, held_out_loss=held_out_loss(model, data.held_out, config))

    clock, tokens_seen = time.perf_counter(), 0
    with run:  # whatever ends it in here, the last whole step is saved
        for step in run.steps("sft"):
            model.train()
            n_tokens = sum(len(e.completion) for e in batches[step])  # of the whole step
            lr = set_lr(optimizer, step, len(batches), config.warmup, "cosine")
            optimizer.zero_grad(set_to_none=True)
            loss = torch.zeros((), device=model.device)
            for part in micro_batches(batches[step], config.micro_batch):
                part_loss = demonstration_loss(model, part, n_tokens, config.dtype)
                part_loss.backward()
                loss += part_loss.detach()
            norm = clip_gradients(model, config.grad_clip)
            optimizer.step()
            tokens_seen += sum(map(len, batches[step]))
            if run.due(step, config.log_every):
                speed = round(tokens_seen / (time.perf_counter() - clock))
                run.log(step + 1, "loss", loss=loss.item(), lr=lr, grad_norm=norm.item(), tokens_per_s=speed)
            if data.held_out and run.due(step, config.eval_every):
                run.log(step + 1, held_out_loss=held_out_loss(model, data.held_out, config))
                show_samples(sample_prompts(model, asked[:3], tokenizer, 48, config.seed), tokenizer)

        save_model(config.out_dir, model, tokenizer.saved, "sft.py", config, data.task)
        results = {"gates": []}
        if data.held_out:
            rollout = sample_prompts(model, asked, tokenizer, 48, config.seed)
            show_samples(rollout, tokenizer)
            losses = [row["held_out_loss"] for row in run.history("held_out_loss")]
            eos_rate = rollout.ended.float().mean().item()
            results |= {"held_out_loss": losses[-1], "first_loss": losses[0], "eos_rate": eos_rate}
            results["gates"] = report(results, data.task, tokenizer.n_vocab)
        return run.finish(results)


def report(results: dict, task: str, n_vocab: int) -> list[dict]:
    """Print the held-out figures -> gates, on the embedded task."""
    loss, eos_rate = results["held_out_loss"], results["eos_rate"]
    print(f"SFT held-out loss {loss:.3f} (before training {results['first_loss']:.3f}), EOS rate {eos_rate:.2f}")
    if task != "tiny":
        return []
    note = f"ln V = {math.log(n_vocab):.2f} is a guess"
    return [gate("SFT held-out loss", loss, *EXPECTED_LOSS, note), gate("SFT EOS rate", eos_rate, *EXPECTED_EOS)]


def main() -> None:
    run_main(train, Config, __doc__)


if __name__ == "__main__":
    main()
