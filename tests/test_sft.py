"""Stage 1: the loss against obvious loops, its masks, its normalisation, and that `train` takes exactly the step of
that loss."""

from __future__ import annotations

import copy
import functools
import itertools
import json
import math
import random
import statistics
from pathlib import Path

import pytest
import torch
from helpers import (
    EOS,
    TOY,
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
    strict_json,
    write_lines,
)
from torch import Tensor

import sft
from lib.cli import UserError
from lib.checkpoint import load_model
from data.batches import Example, make_batch
from frame import completion_mask
from sft import held_out_loss, sft_loss
from lib.weights import save_pretrained

CPU = torch.device("cpu")


Config = functools.partial(sft.Config, tokenizer="toy")


def batch_of(examples: list[Example]) -> tuple[Tensor, Tensor]:
    """tokens (B, T) with EOS as filler, the worst there is; completion mask (B, T)."""
    tokens, prompt_lens, lens = make_batch(examples, CPU)
    tokens[torch.arange(tokens.size(1)) >= lens[:, None]] = EOS
    return tokens, completion_mask(prompt_lens, lens, tokens.size(1))


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
    """Logits shifted by one against their labels, or a mean over rows instead of tokens; of all positions, or of those
    before a completion token alone."""
    frame = frame_batch(B=6, extra=2, seed=1)
    logits = randn(*frame.tokens.shape, 23, seed=2, scale=2)
    truth = loop_loss(logits, frame.tokens, frame.completion_mask).item()
    for given in (logits, logits[:, :-1][frame.action_mask]):
        found = sft_loss(logits=given, tokens=frame.tokens, completion_mask=frame.completion_mask)
        assert found.item() == pytest.approx(truth, rel=1e-12)


def test_loss_of_bfloat16_logits_is_taken_in_float32():
    """The log-softmax in bfloat16: two and a half digits of the loss and of each gradient."""
    frame = frame_batch(B=6, extra=2, seed=1)
    logits = randn(*frame.tokens.shape, 23, seed=2, scale=2).bfloat16()
    truth = loop_loss(logits, frame.tokens, frame.completion_mask).item()
    for given in (logits, logits[:, :-1][frame.action_mask]):
        found = sft_loss(given, frame.tokens, frame.completion_mask)
        assert found.dtype == torch.float32
        assert found.item() == pytest.approx(truth, rel=1e-5)


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
    tokens, mask = batch_of(examples)
    logits = randn(*tokens.shape, 23, seed=5)
    gradient = gradient_of(lambda x: sft_loss(x, tokens, mask), logits)
    where = [[t for t in range(tokens.size(1)) if gradient[b, t].abs().max() > 0] for b in range(3)]
    assert where == [[2, 3, 4], [0, 1], [3]]  # prompt_len - 1 .. len - 2: the logits that predict completion tokens
    for b, e in enumerate(examples):
        t = len(e) - 2  # where EOS is predicted: (softmax - one-hot) / tokens
        assert gradient[b, t, EOS].item() == pytest.approx((logits[b, t].softmax(-1)[EOS].item() - 1) / 6, rel=1e-11)


def test_cut_completion_is_not_taught_to_stop():
    """A completion cut by the block size has no EOS; filler of the EOS id behind it must not become its label."""
    tokens, mask = batch_of([Example([1, 2], [3, 4]), Example([1, 2], [3, 4, 5, 6, EOS])])
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


@pytest.mark.parametrize("rope_base", [0.0, 100.0])
def test_the_positions_before_a_completion_are_all_that_the_loss_needs(float64, rope_base):
    """Logits of some positions alone, as training asks for them, in an order or at places other than the labels': the
    loss and the gradient of every parameter are those of the loss of all logits."""
    model, frame = make_gpt(3, rope_base=rope_base), frame_batch(B=5, extra=2, seed=8)
    results = []
    for logits in (model(frame.tokens), model(frame.tokens, frame.action_mask)):
        loss = sft_loss(logits, frame.tokens, frame.completion_mask)
        results.append([loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


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
    for logits in (torch.zeros(2, 4, 5), torch.zeros(0, 5)):
        loss = sft_loss(logits, torch.zeros(2, 4, dtype=torch.long), torch.zeros(2, 4, dtype=torch.bool))
        assert loss.item() == 0


def test_untrained_loss_is_about_ln_v():
    """A loss at the start far from ln V: wrong initialisation, wrong labels, or a sum where a mean is meant."""
    for config in (sft.Config(), sft.Config(n_layer=1, n_head=2, n_embd=16)):
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
    for batch_size, micro_batch in itertools.product((1, 2, 5), (0, 1, 2, 8)):
        config = Config(batch_size=batch_size, micro_batch=micro_batch)
        assert held_out_loss(model, examples, config) == pytest.approx(nats.mean().item(), rel=1e-11)


def test_held_out_loss_has_no_dropout(float64):
    """Evaluation in training mode: the figure depends on chance and is too high."""
    noisy = make_gpt(5, dropout=0.5)
    clean = make_gpt(5)
    examples = [Example([1, 2], [3, 4, EOS])]
    noisy.train()
    expected = held_out_loss(clean, examples, Config())
    assert held_out_loss(noisy, examples, Config()) == pytest.approx(expected, rel=1e-12)


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
        **{
            "out_dir": str(out),
            "batch_size": 8,
            "epochs": 1,
            "warmup": 0,
            "weight_decay": 0.0,
            "grad_clip": 1e9,
            "lr": 0.1,
        },
        **{"log_every": 1, "device": "cpu"},
    }
    if model is None:
        settings |= {"block_size": 24, "n_layer": 1, "n_embd": 32}
    else:
        settings["init"] = checkpoint(tmp_path / "init", model)
    results = sft.train(Config(**{**settings, **changes}))
    return results, load_model(out, CPU)[0], read_lines(out / "metrics.jsonl")


def watch_the_loss(monkeypatch) -> list[tuple[Tensor, Tensor, float]]:
    """What each call of the loss in training is given: tokens, mask, the completion tokens of its step."""
    seen = []

    def spy(logits, tokens, mask, n_tokens):
        if torch.is_grad_enabled():
            seen.append((tokens, mask, n_tokens))
        return sft_loss(logits, tokens, mask, n_tokens)

    monkeypatch.setattr(sft, "sft_loss", spy)
    return seen


def texts_of(tokens: Tensor, mask: Tensor) -> list[str]:
    """The completions of a batch, without EOS."""
    rows = zip(tokens.tolist(), mask.tolist(), strict=True)
    return [TOY.decode([t for t, m in zip(*row, strict=True) if m and t != EOS]) for row in rows]


@pytest.mark.parametrize("micro_batch", [0, 1, 2, 3])
def test_training_steps_are_the_gradient_of_the_whole_batch(tmp_path, monkeypatch, float64, micro_batch):
    """Gradient accumulation that isn't a large batch (a mean of micro-batch means), prompt tokens or filler in the
    loss, EOS left out, gradients that pile up: two steps of the script against float64 descent on the definition,
    whatever the micro-batch and the row order."""
    plain_sgd(monkeypatch)
    before = make_gpt(6, block_size=24)
    expected, losses = copy.deepcopy(before), []
    for lr in (0.1, 0.05):  # cosine decay over two steps
        ids = [(TOY.encode(p), [*TOY.encode(c), EOS]) for p, c in DEMONSTRATIONS]
        nats = torch.cat([-completion_logprobs(expected, p, c) for p, c in ids])
        losses.append(nats.mean().item())
        descend(expected, nats.mean(), lr)
    for seed in (1, 2):  # the seed changes the order within the one batch and nothing else
        _, after, log = run_sft(tmp_path, before, micro_batch=micro_batch, seed=seed, epochs=2)
        assert_same_weights(after, expected, before)
        assert [row["loss"] for row in log] == pytest.approx(losses, abs=1e-6)  # the log rounds to six digits


def test_gradient_is_clipped_after_it_is_there(tmp_path, monkeypatch, float64):
    """Clipping before backward, or not at all: the length of the step tells."""
    plain_sgd(monkeypatch)
    before = make_gpt(7, block_size=24)
    _, after, log = run_sft(tmp_path, before, micro_batch=3, grad_clip=0.01, lr=1.0)
    assert distance(after, before) == pytest.approx(0.01, rel=1e-3)
    assert log[0]["grad_norm"] > 0.1  # what is logged is the norm before clipping


def test_dropout_is_on_in_training_and_off_in_evaluation(tmp_path, float64):
    """A held-out loss in the middle that leaves the model in eval mode: dropout
    would be off for the rest of the run."""
    for dropout in (0.0, 0.5):
        _, _, log = run_sft(tmp_path, held_out=DEMONSTRATIONS[:3], dropout=dropout, lr=0.0, epochs=3, eval_every=1)
        losses = [row["loss"] for row in log if "loss" in row]
        held_out = [row["held_out_loss"] for row in log if "held_out_loss" in row]
        assert len(losses) == 3 and len(held_out) == 4  # one before the first step
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


def test_steps_are_adamws_by_the_textbook(tmp_path, float64):
    """Another epsilon, other betas, no bias correction, decay of gains or biases: the loss still falls, slower. Four
    steps of the script against Loshchilov and Hutter's algorithm 2 in loops."""
    before = make_gpt(11, block_size=24)
    expected = copy.deepcopy(before)
    moments = {name: [torch.zeros_like(p), torch.zeros_like(p)] for name, p in expected.named_parameters()}
    for step in range(1, 5):
        lr = 0.01 * 0.5 * (1 + math.cos(math.pi * (step - 1) / 4))
        ids = [(TOY.encode(p), [*TOY.encode(c), EOS]) for p, c in DEMONSTRATIONS]
        loss = torch.cat([-completion_logprobs(expected, p, c) for p, c in ids]).mean()
        gradients = torch.autograd.grad(loss, list(expected.parameters()))
        for (name, p), g in zip(expected.named_parameters(), gradients, strict=True):
            m, v = moments[name]
            m.mul_(0.9).add_(0.1 * g)
            v.mul_(0.99).add_(0.01 * g * g)
            decay = 0.1 if p.dim() == 2 else 0.0
            p.data -= lr * (m / (1 - 0.9**step) / ((v / (1 - 0.99**step)).sqrt() + 1e-8) + decay * p.data)
    _, after, _ = run_sft(tmp_path, before, lr=0.01, weight_decay=0.1, epochs=4)
    # a gradient that is 0 (the key bias has none) is 1e-16 here and there, which Adam divides by its epsilon
    assert_same_weights(after, expected, before, tolerance=1e-6)


def test_warm_up_and_decay_reach_the_steps(tmp_path, monkeypatch, float64):
    """--warmup ignored, or a rate that is logged and not used: lr/2, lr, then half a cosine from lr down."""
    plain_sgd(monkeypatch)
    before = make_gpt(12, block_size=24)
    expected, rates = copy.deepcopy(before), [0.05, 0.1, 0.1, 0.075, 0.025]
    for lr in rates:
        ids = [(TOY.encode(p), [*TOY.encode(c), EOS]) for p, c in DEMONSTRATIONS]
        descend(expected, torch.cat([-completion_logprobs(expected, p, c) for p, c in ids]).mean(), lr)
    _, after, log = run_sft(tmp_path, before, lr=0.1, warmup=2, epochs=5)
    assert [row["lr"] for row in log] == pytest.approx(rates, abs=1e-6)
    assert_same_weights(after, expected, before)


def test_grad_clip_0_is_no_limit(tmp_path, monkeypatch, float64):
    """A norm of at most 0 trains nothing at all, and a negative one climbs the loss."""
    plain_sgd(monkeypatch)
    before = make_gpt(7, block_size=24)
    expected = copy.deepcopy(before)
    ids = [(TOY.encode(p), [*TOY.encode(c), EOS]) for p, c in DEMONSTRATIONS]
    descend(expected, torch.cat([-completion_logprobs(expected, p, c) for p, c in ids]).mean(), 0.1)
    _, after, log = run_sft(tmp_path, before, grad_clip=0.0)
    assert_same_weights(after, expected, before)
    assert log[0]["grad_norm"] == pytest.approx(distance(after, before) / 0.1, rel=1e-5)
    with pytest.raises(UserError, match="--grad_clip must be at least 0"):
        run_sft(tmp_path, before, grad_clip=-1.0)


@pytest.mark.parametrize("n", [1, 2])
def test_train_layers_moves_the_last_blocks_alone(tmp_path, monkeypatch, float64, n):
    """Frozen parameters that weight decay still shrinks, or a step that differs from that of the parameters left."""
    before = make_gpt(13, block_size=24, n_layer=3)
    last = ("ln_f.", *(f"h.{i}." for i in range(3 - n, 3)))
    settings = {"train_layers": n, "epochs": 3, "lr": 0.01, "weight_decay": 0.1}
    _, after, _ = run_sft(tmp_path, before, **settings)
    for (name, a), b in zip(after.named_parameters(), before.parameters(), strict=True):
        assert torch.equal(a, b) is not name.startswith(last), name
    plain_sgd(monkeypatch)
    expected = copy.deepcopy(before)
    for name, p in expected.named_parameters():
        p.requires_grad_(name.startswith(last))
    ids = [(TOY.encode(p), [*TOY.encode(c), EOS]) for p, c in DEMONSTRATIONS]
    descend(expected, torch.cat([-completion_logprobs(expected, p, c) for p, c in ids]).mean(), 0.1)
    _, after, _ = run_sft(tmp_path, before, train_layers=n)
    assert_same_weights(after, expected, before)


# ------------------------------------------------------------------------------------------------ the order

SPREAD = random.Random(0)  # completions of 1 to 12 letters
UNEVEN = [("ab", "".join(SPREAD.choices("cdefghijk", k=SPREAD.randint(1, 12)))) for _ in range(240)]


def test_every_step_has_about_as_many_completion_tokens(tmp_path, monkeypatch):
    """Batches of similar length make a token of a short answer weigh several times one of a long answer, because each
    step divides by its own tokens. In random batches the tokens of a step vary as a sum of independent lengths does:
    variance B s^2 (N - B) / (N - 1), against about B^2 s^2 in batches of equal length."""
    seen = watch_the_loss(monkeypatch)
    run_sft(tmp_path, demonstrations=UNEVEN, lr=0.0, micro_batch=0)
    sums = [n for _, _, n in seen]
    assert len(sums) == 30 and all(int(mask.sum()) == n for _, mask, n in seen)
    of_a_text = statistics.pvariance([len(c) + 1 for _, c in UNEVEN])
    chance = 8 * of_a_text * (240 - 8) / (240 - 1)
    assert statistics.variance(sums) < 2.3 * chance  # five standard errors of a variance of 30 figures


def test_micro_batches_hold_little_filler(tmp_path, monkeypatch):
    """Within a step the order changes no gradient, so texts of similar length go together: no other split of the
    step's texts has less filler."""
    seen = watch_the_loss(monkeypatch)
    run_sft(tmp_path, demonstrations=UNEVEN[:48], lr=0.0, micro_batch=2)
    assert len(seen) == 6 * 4
    for step in range(6):
        parts = seen[4 * step : 4 * step + 4]
        lens = sorted(2 + len(c) + 1 for tokens, mask, _ in parts for c in texts_of(tokens, mask))
        assert len(lens) == 8
        assert sum(tokens.numel() for tokens, _, _ in parts) == 2 * sum(lens[1::2])


def test_every_demonstration_once_an_epoch_in_a_fresh_order(tmp_path, monkeypatch):
    """The same order in every epoch, a remainder that is dropped, a seed that orders nothing."""
    demonstrations = [("ab", c) for c in "abcdefghijk"]
    seen = watch_the_loss(monkeypatch)
    orders = []
    for seed in (1, 2):
        seen.clear()
        run_sft(tmp_path, demonstrations=demonstrations, lr=0.0, batch_size=4, micro_batch=0, epochs=3, seed=seed)
        steps = [sorted(texts_of(tokens, mask)) for tokens, mask, _ in seen]
        assert [len(step) for step in steps] == [4, 4, 3] * 3
        epochs = [steps[i : i + 3] for i in (0, 3, 6)]
        assert all(sorted(itertools.chain(*epoch)) == list("abcdefghijk") for epoch in epochs)
        orders += epochs
    assert all(a != b for a, b in itertools.combinations(orders, 2))


# ------------------------------------------------------------------------------------------------ flags


@pytest.mark.parametrize(("dtype", "products"), [("bfloat16", torch.bfloat16), ("float32", torch.float32)])
def test_dtype_is_that_of_the_products_in_training(tmp_path, dtype, products):
    """--dtype ignored: the run is merely slow. And the weights stay float32."""
    found = set()

    def note(module, inputs, output):
        if isinstance(module, torch.nn.Linear) and module.training:
            found.add(output.dtype)

    hook = torch.nn.modules.module.register_module_forward_hook(note)
    try:
        _, after, _ = run_sft(tmp_path, make_gpt(6, block_size=24), dtype=dtype)
    finally:
        hook.remove()
    assert found == {products}
    assert all(p.dtype == torch.float32 for p in after.parameters())


@pytest.mark.parametrize("compiled", [False, True])
def test_compile_compiles_each_block(tmp_path, monkeypatch, compiled):
    """--compile ignored, or a graph for the whole network, whose parameters then have other names."""
    names = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, *_, **__: names.append(type(self).__name__))
    run_sft(tmp_path, make_gpt(6, block_size=24), compile=compiled)
    assert names == ["Block", "Block"] * compiled


def starts(tmp_path) -> dict[str, str]:
    """--init of each kind, all of the same network."""
    save_pretrained(make_gpt(9), tmp_path / "hf")
    return {"scratch": "", "folder": str(tmp_path / "hf"), "checkpoint": checkpoint(tmp_path / "start", make_gpt(9))}


@pytest.mark.parametrize("start", ["scratch", "folder", "checkpoint"])
def test_dropout_flag_holds_for_every_start(tmp_path, start):
    """An option that is silently ignored: --dropout must count when training goes on from a checkpoint or from
    published weights, not only from scratch; in every part that drops, and in what is saved."""
    init = starts(tmp_path)[start]
    model = sft.initial_model(Config(init=init, dropout=0.25), 23, CPU)
    assert model.config.dropout == 0.25
    parts = [m for m in model.modules() if type(m).__name__ in ("Attention", "MLP")]
    assert len(parts) == 2 * model.config.n_layer and all(m.dropout == 0.25 for m in parts)


@pytest.mark.parametrize("start", ["folder", "checkpoint"])
def test_a_start_from_weights_computes_what_they_do(tmp_path, start):
    """Weights left out or transposed on the way in: training then starts from a guess."""
    model = sft.initial_model(Config(init=starts(tmp_path)[start]), 23, CPU).eval()
    tokens = torch.randint(0, 23, (2, 48), generator=torch.Generator().manual_seed(0))
    assert torch.equal(model(tokens), make_gpt(9)(tokens))


def test_block_size_is_honoured_or_refused(tmp_path):
    """--block_size ignored with --init: memory for 1,024 positions where 96 were asked for. Published weights are cut
    to it; a checkpoint has its own."""
    inits = starts(tmp_path)
    short = sft.initial_model(Config(init=inits["folder"], block_size=16), 23, CPU).eval()
    tokens = torch.randint(0, 23, (2, 16), generator=torch.Generator().manual_seed(0))
    assert short.config.block_size == 16 and torch.equal(short(tokens), make_gpt(9)(tokens))
    for start, block_size in (("folder", 0), ("folder", 48), ("checkpoint", 0), ("checkpoint", 48)):
        model = sft.initial_model(Config(init=inits[start], block_size=block_size), 23, CPU)
        assert model.config.block_size == 48
    for start, block_size in (("folder", 49), ("checkpoint", 16), ("checkpoint", 49)):
        with pytest.raises(UserError, match=rf"block_size {block_size}: .* 48"):
            sft.initial_model(Config(init=inits[start], block_size=block_size), 23, CPU)
    for block_size, expected in ((0, 96), (17, 17)):
        assert sft.initial_model(Config(block_size=block_size), 23, CPU).config.block_size == expected


@pytest.mark.parametrize("start", ["folder", "checkpoint"])
@pytest.mark.parametrize("name", ["n_layer", "n_head", "n_embd", "block", "rope_base"])
def test_sizes_are_refused_where_the_weights_have_their_own(tmp_path, start, name):
    """--n_layer 12 --init FOLDER trains the folder's two layers, and nobody notices."""
    with pytest.raises(UserError, match=f"--{name} is for a model from scratch"):
        sft.initial_model(Config(init=starts(tmp_path)[start], **{name: 8}), 23, CPU)


def test_a_llama_from_scratch_has_llama_s_blocks_and_about_as_many_weights():
    """--block that is ignored, or that changes the MLP alone; a comparison with a network of another size."""
    plain, llama = (sft.initial_model(Config(block=block), 930, CPU) for block in ("gpt2", "llama"))
    c = llama.config
    assert (c.norm, c.mlp, c.bias, c.n_inner, c.rope_base) == ("rms", "swiglu", "none", 344, 1e4)
    assert (plain.config.norm, plain.config.mlp, plain.config.bias) == ("layer", "gelu", "all")
    assert not any("bias" in name for name, _ in llama.named_parameters())
    weights = [sum(p.numel() for p in model.parameters()) for model in (plain, llama)]
    assert abs(weights[1] / weights[0] - 1) < 0.01


def test_positions_are_those_of_the_flag(tmp_path):
    """--rope_base that is ignored, lost in the checkpoint, or 1e4 whatever was asked for: the network's logits are
    those of its weights with the base of the flag, before saving and after."""
    tokens = torch.arange(12).view(2, 6)
    for rope_base in (0.0, 77.0, 1e4):
        settings = {} if rope_base == 1e4 else {"rope_base": rope_base}  # 1e4: the default
        _, model, _ = run_sft(tmp_path, **settings)
        twin = make_gpt(block_size=24, n_layer=1, rope_base=rope_base)
        twin.load_state_dict(model.state_dict())
        assert ("wpe.weight" in model.state_dict()) is (rope_base == 0)
        assert torch.equal(model.eval()(tokens), twin(tokens))


def test_impossible_starts_are_refused(tmp_path):
    """A checkpoint whose ids mean other words, heads that don't divide the channels: refused by the flag's name."""
    with pytest.raises(UserError, match="rope_base"):
        sft.initial_model(Config(n_embd=12), 23, CPU)  # 3 channels a head can't be paired
    with pytest.raises(UserError, match="was trained with --tokenizer toy"):
        sft.initial_model(Config(init=starts(tmp_path)["checkpoint"], tokenizer="tiny"), 23, CPU)
    with pytest.raises(UserError, match="n_embd 30 is not a multiple of n_head 4"):
        sft.initial_model(Config(n_embd=30), 23, CPU)


def test_published_weights_must_have_the_vocabulary_s_rows(tmp_path):
    """Fewer rows than token ids: an index error at some later token. More: padding that would be given probability."""
    save_pretrained(make_gpt(9), tmp_path)
    config = Config(init=str(tmp_path))
    assert sft.initial_model(config, 20, CPU)(torch.tensor([[1, 2]])).shape == (1, 2, 20)
    with pytest.raises(UserError, match="23 token ids, but the vocabulary has 24"):
        sft.initial_model(config, 24, CPU)


@pytest.mark.parametrize("broken", ["nothing", "config", "weights", "another"])
def test_an_init_that_can_not_be_loaded_is_one_line(tmp_path, broken):
    """A traceback, or an error of torch's that says nothing, for a folder that lacks a file or holds something else."""
    folder = tmp_path / "hf"
    if broken != "nothing":
        save_pretrained(make_gpt(9), folder)
    if broken == "config":
        (folder / "config.json").write_text("{}", encoding="utf-8")
    elif broken == "weights":
        (folder / "model.safetensors").unlink()
    elif broken == "another":
        shape = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        (folder / "config.json").write_text(json.dumps({**shape, "n_layer": 3}), encoding="utf-8")
    with pytest.raises(UserError, match=str(folder)) as error:
        sft.initial_model(Config(init=str(folder)), 23, CPU)
    assert "\n" not in str(error.value)
    if broken == "another":
        assert "h.2." in str(error.value)  # what is missing, not only that something is


# ------------------------------------------------------------------------------------------------ what a run leaves


@pytest.mark.parametrize("lr", [1e20, 1e39], ids=["the loss", "the weights"])
def test_a_run_that_blows_up_stops_and_saves_no_model(tmp_path, lr):
    """NaN or inf is saved as a model, and the next stage starts from it: one line says what happened instead. The last
    step is the subtle one: its loss was still finite."""
    epochs = 5 if lr < 1e38 else 1
    with pytest.raises(UserError, match="lower --lr") as error:
        run_sft(tmp_path, make_gpt(6, block_size=24), lr=lr, epochs=epochs)
    assert "\n" not in str(error.value)
    assert ("the loss is" if epochs == 5 else "weights are not finite") in str(error.value)
    assert not (tmp_path / "out" / "model.pt").exists() and not (tmp_path / "out" / "results.json").exists()
    assert read_lines(tmp_path / "out" / "metrics.jsonl")[0]["loss"] > 0  # what there was before is kept


def test_the_first_loss_is_that_before_training_also_after_a_resume(tmp_path, float64):
    """`first_loss` taken from the first evaluation of this process: after a resume the figure "before training" is
    that of a trained model."""
    before = make_gpt(10, block_size=24)
    held_out = [Example([0, 1], [2, EOS]), Example([1], [2, 3, EOS])]
    truth = held_out_loss(before, held_out, Config())
    settings = {"held_out": [("ab", "c"), ("b", "cd")], "lr": 0.01}
    first, _, _ = run_sft(tmp_path, before, epochs=2, **settings)
    resumed, after, log = run_sft(tmp_path, before, epochs=4, resume=True, **settings)
    assert first["first_loss"] == resumed["first_loss"] == pytest.approx(truth, abs=1e-6)
    assert [row["step"] for row in log if "held_out_loss" in row] == [0, 2, 4]
    assert resumed["held_out_loss"] == pytest.approx(held_out_loss(after, held_out, Config()), abs=1e-6)
    assert abs(resumed["first_loss"] - first["held_out_loss"]) > 0.01


def test_gates_belong_to_the_embedded_task_s_data(tmp_path, monkeypatch):
    """Data of one's own with the demo's vocabulary is judged by the demo's ranges: a good run FAILED."""
    own, _, _ = run_sft(tmp_path, held_out=DEMONSTRATIONS[:2], tokenizer="tiny")
    assert own["gates"] == [] and load_model(tmp_path / "out", CPU).task == ""
    monkeypatch.setattr(sft, "task_of", lambda path: "tiny")
    demo, _, _ = run_sft(tmp_path, held_out=DEMONSTRATIONS[:2], tokenizer="tiny")
    figures = {gate["name"]: gate["value"] for gate in demo["gates"]}
    assert figures == pytest.approx(
        {"SFT held-out loss": demo["held_out_loss"], "SFT EOS rate": demo["eos_rate"]}, abs=1e-4
    )
    assert load_model(tmp_path / "out", CPU).task == "tiny"


def test_after_training_the_model_stops(tmp_path):
    """Stopping is never learned: after SFT at least nine samples of ten end in EOS, and the loss has come down."""
    demonstrations = [(p * n, "abc"[:n]) for p in "defghijk" for n in (1, 2, 3)]
    changes = {"epochs": 25, "lr": 1e-2, "grad_clip": 1.0, "warmup": 5, "block_size": 64, "log_every": 25}
    results, _, _ = run_sft(tmp_path, demonstrations=demonstrations, held_out=demonstrations, **changes)
    assert results["eos_rate"] >= 0.9
    assert results["held_out_loss"] < 0.3 < results["first_loss"]


def test_results_are_valid_json(tmp_path):
    """NaN is no JSON: without held-out data the figure is left out or null, so
    that any reader can load results.json."""
    run_sft(tmp_path, make_gpt(10, block_size=24), out_dir=str(tmp_path / "run"))
    strict_json(tmp_path / "run" / "results.json")
