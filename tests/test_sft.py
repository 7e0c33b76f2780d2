"""Stage 1: the loss against obvious loops, its masks, its normalisation, and that `train` takes exactly the step of
that loss."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from helpers import (
    EOS,
    assert_same_weights,
    checkpoint,
    completion_logprobs,
    descend,
    distance,
    finite_difference_gradient,
    frame_batch,
    gradient_of,
    make_gpt,
    plain_sgd,
    randn,
    read_lines,
    speak_toy,
    strict_json,
    write_lines,
)
from torch import Tensor

import sft
from common import load_model
from data.batches import Example
from sft import Config, held_out_loss, make_batch, sft_loss

CPU = torch.device("cpu")


# ------------------------------------------------------------------------------------------------ the loss


def loop_loss(logits: Tensor, tokens: Tensor, completion_mask: Tensor) -> Tensor:
    """The definition, token by token in float64."""
    total, n = torch.zeros((), dtype=torch.float64), 0
    for b in range(tokens.size(0)):
        for t in range(1, tokens.size(1)):
            if completion_mask[b, t]:
                row = logits[b, t - 1].double()
                total = total + row.exp().sum().log() - row[tokens[b, t]]
                n += 1
    return total / n


def test_loss_equals_a_loop_over_tokens():
    """Logits shifted by one against their labels, or a mean over rows instead of tokens."""
    frame = frame_batch(B=6, extra=2, seed=1)
    logits = randn(*frame.tokens.shape, 23, seed=2, scale=2)
    assert sft_loss(logits, frame.tokens, frame.completion_mask).item() == pytest.approx(
        loop_loss(logits, frame.tokens, frame.completion_mask).item(), rel=1e-12
    )


def test_gradient_equals_finite_differences():
    """Gradient of the loss against central differences of the float64 loop, at every logit, masked ones included."""
    frame = frame_batch(B=2, vocab=5, max_prompt=3, max_completion=3, extra=1, seed=3)
    logits = randn(*frame.tokens.shape, 5, seed=4)
    found = gradient_of(lambda x: sft_loss(x, frame.tokens, frame.completion_mask), logits)
    expected = finite_difference_gradient(lambda x: loop_loss(x, frame.tokens, frame.completion_mask), logits)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-8)


def test_prompt_and_filler_give_no_gradient_and_eos_does():
    """Pad id equal to EOS and a mask made from ids: EOS is never learned, or the prompt and
    the filler are (the model never stops)."""
    examples = [Example([3, EOS, 4], [5, 6, EOS]), Example([7], [8, EOS]), Example([1, 2, 3, 4], [EOS])]
    tokens, mask = make_batch(examples, EOS, CPU)
    logits = randn(*tokens.shape, 23, seed=5)
    gradient = gradient_of(lambda x: sft_loss(x, tokens, mask), logits)
    where = [[t for t in range(tokens.size(1)) if gradient[b, t].abs().max() > 0] for b in range(3)]
    assert where == [[2, 3, 4], [0, 1], [3]]  # prompt_len - 1 .. len - 2: the logits that predict completion tokens
    for b, e in enumerate(examples):
        t = len(e) - 2  # where EOS is predicted: (softmax - one-hot) / tokens
        assert gradient[b, t, EOS].item() == pytest.approx((logits[b, t].softmax(-1)[EOS].item() - 1) / 6, rel=1e-11)


def test_cut_completion_is_not_taught_to_stop():
    """A completion cut by the block size has no EOS; filler of the EOS id behind it must not become its label."""
    tokens, mask = make_batch([Example([1, 2], [3, 4]), Example([1, 2], [3, 4, 5, 6, EOS])], EOS, CPU)
    gradient = gradient_of(lambda x: sft_loss(x, tokens, mask), torch.zeros(*tokens.shape, 23))
    assert (gradient[0, :, EOS] >= 0).all()  # pushed down where it is a rival, never up
    assert gradient[1, 5, EOS] < 0


def test_masked_logits_may_be_anything():
    """A product with the mask instead of a selection: a masked inf or nan leaks into loss or gradient."""
    frame = frame_batch(B=4, extra=3, seed=6)
    logits = randn(*frame.tokens.shape, 23, seed=7)
    # logits at t predict t + 1
    counts = torch.cat([frame.completion_mask[:, 1:], torch.zeros(4, 1, dtype=torch.bool)], 1)
    reference = gradient_of(lambda x: sft_loss(x, frame.tokens, frame.completion_mask), logits)
    for value in (math.nan, math.inf, -1e30):
        spoilt = torch.where(counts[..., None], logits, value)
        tokens = torch.where(frame.completion_mask, frame.tokens, 0)
        assert sft_loss(spoilt, tokens, frame.completion_mask) == sft_loss(logits, frame.tokens, frame.completion_mask)
        assert torch.equal(gradient_of(lambda x, t=tokens: sft_loss(x, t, frame.completion_mask), spoilt), reference)


@pytest.mark.parametrize("filler", [0, EOS])
def test_padding_changes_neither_loss_nor_gradients(float64, filler):
    """Filler leaking into the loss: seven more columns and other filler ids,
    through the network, with all its gradients."""
    model = make_gpt(3)
    narrow, wide = frame_batch(B=5, seed=8), frame_batch(B=5, extra=7, seed=8)
    wide.tokens = torch.full_like(wide.tokens, filler)
    for i, n in enumerate(narrow.lens.tolist()):
        wide.tokens[i, :n] = narrow.tokens[i, :n]
    results = []
    for frame in (narrow, wide):
        loss = sft_loss(model(frame.tokens), frame.tokens, frame.completion_mask)
        results.append([loss.detach(), *torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_all_rows_masked_is_zero_not_nan():
    """A division by zero tokens."""
    loss = sft_loss(torch.zeros(2, 4, 5), torch.zeros(2, 4, dtype=torch.long), torch.zeros(2, 4, dtype=torch.bool))
    assert loss.item() == 0


def test_untrained_loss_is_about_ln_v():
    """A loss at the start far from ln V: wrong initialisation, wrong labels, or a sum where a mean is meant."""
    for config in (Config(), Config(n_layer=1, n_head=2, n_embd=16)):
        torch.manual_seed(0)
        model = sft.initial_model(config, 1000, CPU)
        frame = frame_batch(B=16, vocab=1000, seed=9)
        with torch.no_grad():
            loss = sft_loss(model(frame.tokens), frame.tokens, frame.completion_mask).item()
        assert loss == pytest.approx(math.log(1000), abs=0.3)


def test_parts_of_a_step_divide_by_the_tokens_of_the_whole_step():
    """A mean for each micro-batch makes a short reply weigh more than a long one:
    0.5 against 0.054 in a known code base."""
    frame = frame_batch(B=8, max_completion=12, seed=10)
    logits = randn(*frame.tokens.shape, 23, seed=11)
    whole = sft_loss(logits, frame.tokens, frame.completion_mask)
    n = int(frame.action_mask.sum())
    for size in (1, 2, 3):
        columns = (x.split(size) for x in (logits, frame.tokens, frame.completion_mask))
        parts = [sft_loss(*part, n_tokens=n) for part in zip(*columns, strict=True)]
        assert sum(parts).item() == pytest.approx(whole.item(), rel=1e-12)


# ------------------------------------------------------------------------------------------------ held-out loss


def test_held_out_loss_is_the_mean_over_all_tokens(float64):
    """A mean of batch means, where the last batch is smaller and completions differ in length."""
    model = make_gpt(4)
    examples = [
        Example([1, 2], [3, EOS]),
        Example([4], [5, 6, 7, 8, 9, 10, EOS]),
        Example([1, 2, 3, 4], [EOS]),
        Example([9], [8]),
        Example([2], [1, EOS]),
    ]
    with torch.no_grad():
        nats = torch.cat([-completion_logprobs(model, e.prompt, e.completion) for e in examples])
    for batch_size in (1, 2, 5):
        assert held_out_loss(model, examples, batch_size, EOS, CPU) == pytest.approx(nats.mean().item(), rel=1e-11)


def test_held_out_loss_has_no_dropout(float64):
    """Evaluation in training mode: the figure depends on chance and is too high."""
    noisy = make_gpt(5, dropout=0.5)
    clean = make_gpt(5)
    examples = [Example([1, 2], [3, 4, EOS])]
    noisy.train()
    expected = held_out_loss(clean, examples, 4, EOS, CPU)
    assert held_out_loss(noisy, examples, 4, EOS, CPU) == pytest.approx(expected, rel=1e-12)


# ------------------------------------------------------------------------------------------------ the script

DEMONSTRATIONS = [("ab", "c"), ("b", "cdefghij"), ("cde", "ab"), ("wf", "gh")]
DEMONSTRATIONS += [("g", "hijk"), ("abcdef", "g"), ("hi", "jklmno"), ("k", "a")]


def write_demonstrations(path: Path, pairs: list[tuple[str, str]]) -> str:
    return write_lines(path, [{"prompt": p, "completion": c} for p, c in pairs])


def run_sft(tmp_path: Path, model=None, demonstrations=DEMONSTRATIONS, held_out=None, **changes):
    """sft.train on toy demonstrations, from `model`; -> results, the trained model, the log."""
    out = Path(changes.get("out_dir", tmp_path / "out"))
    settings = {
        "data": write_demonstrations(tmp_path / "d.jsonl", demonstrations),
        "held_out_data": write_demonstrations(tmp_path / "h.jsonl", held_out) if held_out else "",
        "init": checkpoint(tmp_path / "init", model) if model is not None else "",
        **{"out_dir": str(out), "tokenizer": "toy", "block_size": 24, "n_layer": 1},
        **{"n_embd": 32, "batch_size": 8, "warmup": 0, "weight_decay": 0.0},
        **{"grad_clip": 1e9, "lr": 0.1, "log_every": 1, "device": "cpu"},
    }
    results = sft.train(Config(**{**settings, **changes}))
    return results, load_model(out, CPU)[0], read_lines(out / "metrics.jsonl")


@pytest.mark.parametrize("micro_batch", [0, 1, 2, 3])
def test_training_steps_are_the_gradient_of_the_whole_batch(tmp_path, monkeypatch, float64, micro_batch):
    """Gradient accumulation that isn't a large batch (a mean of micro-batch means), prompt tokens or filler in the
    loss, EOS left out, gradients that pile up: two steps of the script against float64 descent on the definition,
    whatever the micro-batch and the row order."""
    tokenizer = speak_toy(monkeypatch, sft)
    plain_sgd(monkeypatch)
    before = make_gpt(6, block_size=24)
    expected, losses = copy.deepcopy(before), []
    for lr in (0.1, 0.05):  # cosine decay over two steps
        ids = [(tokenizer.encode(p), [*tokenizer.encode(c), EOS]) for p, c in DEMONSTRATIONS]
        nats = torch.cat([-completion_logprobs(expected, p, c) for p, c in ids])
        losses.append(nats.mean().item())
        descend(expected, nats.mean(), lr)
    for seed in (1, 2):  # the seed changes the order within the one batch and nothing else
        _, after, log = run_sft(tmp_path, before, micro_batch=micro_batch, seed=seed, epochs=2)
        assert_same_weights(after, expected, before)
        assert [row["loss"] for row in log] == pytest.approx(losses, abs=1e-6)  # the log rounds to six digits


def test_gradient_is_clipped_after_it_is_there(tmp_path, monkeypatch, float64):
    """Clipping before backward, or not at all: the length of the step tells."""
    speak_toy(monkeypatch, sft)
    plain_sgd(monkeypatch)
    before = make_gpt(7, block_size=24)
    _, after, log = run_sft(tmp_path, before, micro_batch=3, grad_clip=0.01, lr=1.0)
    assert distance(after, before) == pytest.approx(0.01, rel=1e-3)
    assert log[0]["grad_norm"] > 0.1  # what is logged is the norm before clipping


def test_dropout_is_on_in_training_and_off_in_evaluation(tmp_path, monkeypatch, float64):
    """A held-out loss in the middle that leaves the model in eval mode: dropout
    would be off for the rest of the run."""
    speak_toy(monkeypatch, sft)
    for dropout in (0.0, 0.5):
        _, _, log = run_sft(tmp_path, held_out=DEMONSTRATIONS[:3], dropout=dropout, lr=0.0, epochs=3, eval_every=1)
        losses = [row["loss"] for row in log if "loss" in row]
        held_out = [row["held_out_loss"] for row in log if "held_out_loss" in row]
        assert len(losses) == len(held_out) == 3
        assert len(set(held_out)) == 1
        # without dropout the order of the rows alone differs
        assert (max(losses) - min(losses) < 1e-5) == (dropout == 0)


def test_decay_spares_biases_and_gains():
    """Weight decay on LayerNorm gains and biases, or a parameter in two groups or none."""
    model = make_gpt(8)
    optimizer = sft.make_optimizer(model, Config(weight_decay=0.1))
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))
    assert {n for n, p in model.named_parameters() if decay[id(p)] == 0.0} == {
        n for n, _ in model.named_parameters() if "ln_" in n or n.endswith("bias")
    }


def test_dropout_flag_holds_for_every_start(tmp_path, monkeypatch):
    """An option that is silently ignored: --dropout must count when training goes on
    from a checkpoint, not only from scratch."""
    speak_toy(monkeypatch, sft)
    folder = checkpoint(tmp_path / "start", make_gpt(9))
    for init in ("", folder):
        model = sft.initial_model(Config(init=init, tokenizer="toy", dropout=0.25, n_embd=32), 23, CPU)
        assert model.config.dropout == 0.25


def test_after_training_the_model_stops(tmp_path, monkeypatch):
    """Stopping is never learned: after SFT at least nine samples of ten end in EOS, and the loss has come down."""
    speak_toy(monkeypatch, sft)
    demonstrations = [(p * n, "abc"[:n]) for p in "defghijk" for n in (1, 2, 3)]
    changes = {"epochs": 25, "lr": 1e-2, "grad_clip": 1.0, "warmup": 5, "block_size": 64, "log_every": 25}
    results, _, _ = run_sft(tmp_path, demonstrations=demonstrations, held_out=demonstrations, **changes)
    assert results["eos_rate"] >= 0.9
    assert results["held_out_loss"] < 0.3 < results["first_loss"]


def test_results_are_valid_json(tmp_path, monkeypatch):
    """NaN is no JSON: without held-out data the figure is left out or null, so
    that any reader can load results.json."""
    speak_toy(monkeypatch, sft)
    run_sft(tmp_path, make_gpt(10, block_size=24), out_dir=str(tmp_path / "run"))
    strict_json(tmp_path / "run" / "results.json")
