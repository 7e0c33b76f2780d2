"""Small things the tests share: tiny networks, random frames, finite differences."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from model import GPT, GPTConfig, ScalarModel, completion_mask

ROOT = Path(__file__).resolve().parent.parent
REAL = ROOT.parent / "shared" / "real"  # real data; the tests that need it skip where it is absent
GPT2_BPE = REAL / "gpt2_bpe"


def spread(module: torch.nn.Module, seed: int, scale: float = 0.3) -> None:
    """Add N(0, scale) noise to every parameter, biases and LayerNorm gains too: with them at 0 and 1 a test can't see them."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p += scale * torch.randn(p.shape, generator=generator).to(p)


def make_gpt(
    seed: int = 0,
    vocab: int = 23,
    block_size: int = 48,
    n_layer: int = 2,
    n_head: int = 4,
    n_embd: int = 32,
    dropout: float = 0.0,
    real_vocab: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> GPT:
    """A tiny random GPT in eval mode, with spread-out logits and no parameter at its trivial value. Torch's global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = GPT(GPTConfig(vocab, block_size, n_layer, n_head, n_embd, dropout, real_vocab))
    spread(model, seed + 1)
    return model.to(dtype).eval()


def make_scalar(seed: int = 0, **sizes) -> ScalarModel:
    """A ScalarModel around make_gpt(seed, **sizes), in eval mode."""
    gpt = make_gpt(seed, **sizes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + 2)
        model = ScalarModel.from_gpt(gpt)
    return model.to(gpt.wte.weight.dtype).eval()


def random_prompts(lengths: list[int], vocab: int, seed: int = 0, low: int = 0) -> list[list[int]]:
    """Random ids in low..vocab-1, one prompt for each length."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(low, vocab, (n,), generator=generator).tolist() for n in lengths]


@dataclass
class Frame:
    """A right-padded batch of `prompt + completion + filler`, and the lengths that its masks come from."""

    tokens: Tensor  # (B, T)
    prompt_lens: Tensor  # (B,)
    lens: Tensor  # (B,)

    @property
    def completion_mask(self) -> Tensor:  # (B, T) bool
        return completion_mask(self.prompt_lens, self.lens, self.tokens.size(1))

    @property
    def action_mask(self) -> Tensor:  # (B, T-1) bool
        return self.completion_mask[:, 1:]

    def row(self, i: int) -> Tensor:
        """(1, len) the i-th row alone, without filler."""
        return self.tokens[i : i + 1, : int(self.lens[i])]


def frame_batch(B: int = 5, vocab: int = 23, max_prompt: int = 6, max_completion: int = 8, extra: int = 0, filler: int | None = None, seed: int = 0):
    """A Frame of B rows of unequal prompt and completion lengths (each at least 1), `extra` columns wider than its longest row.
    Filler is random unless given: what it is must not matter."""
    generator = torch.Generator().manual_seed(seed)
    prompt_lens = torch.randint(1, max_prompt + 1, (B,), generator=generator)
    lens = prompt_lens + torch.randint(1, max_completion + 1, (B,), generator=generator)
    tokens = torch.randint(0, vocab, (B, int(lens.max()) + extra), generator=generator)
    if filler is not None:
        tokens[torch.arange(tokens.size(1)) >= lens[:, None]] = filler
    return Frame(tokens, prompt_lens, lens)


def random_mask(shape: tuple[int, ...], seed: int = 0, share: float = 0.6) -> Tensor:
    """A random bool mask with at least one True."""
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share
    mask.view(-1)[0] = True
    return mask


def finite_difference_gradient(f: Callable[[Tensor], Tensor], x: Tensor, step: float = 1e-6) -> Tensor:
    """Central differences of the scalar function f at x, in float64: an independent truth for autograd. Error about step squared."""
    x = x.detach().double()
    gradient = torch.zeros_like(x)
    for i in range(x.numel()):
        up, down = x.clone(), x.clone()
        up.view(-1)[i] += step
        down.view(-1)[i] -= step
        gradient.view(-1)[i] = (float(f(up)) - float(f(down))) / (2 * step)
    return gradient


def gradient_of(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Autograd's gradient of the scalar function f at x."""
    x = x.detach().clone().requires_grad_()
    f(x).backward()
    return x.grad
