"""Stage 1: the loss against obvious loops, its masks, its normalisation, and that `train` takes exactly the step of
that loss."""

from __future__ import annotations

import copy
import functools
import itertools
import json
import math
from types import SimpleNamespace

import pytest
import torch
from helpers import (
    EOS,
    TOY,
    assert_same_weights,
    checkpoint,
    completion_logprobs,
    descend,
    finite_difference_gradient,
    frame_batch,
    gradient_of,
    make_gpt,
    plain_sgd,
    randn,
)
from stages import DEMONSTRATIONS, demonstrations, run, watching
from torch import Tensor

import sft
from lib.setup import initial_model
from lib.cli import UserError
from data.batches import Example, make_batch
from frame import completion_mask
from model import GPT
from sft import held_out_loss, sft_loss
from lib.weights import save_pretrained

CPU = torch.device("cpu")


Config = functools.partial(sft.Config, tokenizer="toy")
SCRATCH = {"init": "", "block_size": 24, "n_layer": 1, "n_embd": 32}


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
        model = initial_model(config, 1000, CPU)
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


def slow_loss(model) -> Tensor:
    """The definition, on all demonstrations of stages.py: mean over completion tokens, text by text."""
    ids = [(TOY.encode(p), [*TOY.encode(c), EOS]) for p, c in DEMONSTRATIONS]
    return torch.cat([-completion_logprobs(model, p, c) for p, c in ids]).mean()


def test_training_steps_are_the_gradient_of_the_whole_batch(tmp_path, monkeypatch, float64):
    """Gradient accumulation that isn't a large batch (a mean of micro-batch means), prompt tokens or filler in the
    loss, EOS left out, gradients that pile up: two steps of the script against float64 descent on the definition,
    whatever the row order."""
    plain_sgd(monkeypatch)
    before = make_gpt(6, block_size=24)
    expected, losses = copy.deepcopy(before), []
    for lr in (0.1, 0.05):  # cosine decay over two steps
        loss = slow_loss(expected)
        losses.append(loss.item())
        descend(expected, loss, lr)
    for seed in (1, 2):  # the seed changes the order within the one batch and nothing else
        _, after, log = run("sft", tmp_path, before, micro_batch=3, seed=seed, epochs=2)
        assert_same_weights(after, expected, before)
        assert [row["loss"] for row in log] == pytest.approx(losses, abs=1e-6)  # the log rounds to six digits


def test_steps_are_adamws_by_the_textbook(tmp_path, float64):
    """Another epsilon, other betas, no bias correction, decay of gains or biases: the loss still falls, slower. Four
    steps of the script against Loshchilov and Hutter's algorithm 2 in loops."""
    before = make_gpt(11, block_size=24)
    expected = copy.deepcopy(before)
    moments = {name: [torch.zeros_like(p), torch.zeros_like(p)] for name, p in expected.named_parameters()}
    for step in range(1, 5):
        lr = 0.01 * 0.5 * (1 + math.cos(math.pi * (step - 1) / 4))
        gradients = torch.autograd.grad(slow_loss(expected), list(expected.parameters()))
        for (name, p), g in zip(expected.named_parameters(), gradients, strict=True):
            m, v = moments[name]
            m.mul_(0.9).add_(0.1 * g)
            v.mul_(0.99).add_(0.01 * g * g)
            decay = 0.1 if p.dim() == 2 else 0.0
            p.data -= lr * (m / (1 - 0.9**step) / ((v / (1 - 0.99**step)).sqrt() + 1e-8) + decay * p.data)
    after = run("sft", tmp_path, before, lr=0.01, weight_decay=0.1, epochs=4).model
    # a gradient that is 0 (the key bias has none) is 1e-16 here and there, which Adam divides by its epsilon
    assert_same_weights(after, expected, before, tolerance=1e-6)


# ------------------------------------------------------------------------------------------------ flags


def starts(tmp_path) -> dict[str, str]:
    """--init of each kind, all of the same network."""
    save_pretrained(make_gpt(9), tmp_path / "hf")
    return {"scratch": "", "folder": str(tmp_path / "hf"), "checkpoint": checkpoint(tmp_path / "start", make_gpt(9))}


@pytest.mark.parametrize("start", ["scratch", "folder", "checkpoint"])
def test_dropout_flag_holds_for_every_start(tmp_path, start):
    """An option that is silently ignored: --dropout must count when training goes on from a checkpoint or from
    published weights, not only from scratch; in every part that drops, and in what is saved."""
    init = starts(tmp_path)[start]
    model = initial_model(Config(init=init, dropout=0.25), 23, CPU)
    assert model.config.dropout == 0.25
    twin = GPT(model.config)  # what the saved configuration says
    twin.load_state_dict(model.state_dict())
    drawn = []
    for network in (model.train(), twin.train()):
        torch.manual_seed(0)
        drawn.append(network(torch.arange(12).view(2, 6)))
    assert torch.equal(*drawn) and not torch.equal(drawn[0], model.eval()(torch.arange(12).view(2, 6)))


@pytest.mark.parametrize("start", ["folder", "checkpoint"])
def test_a_start_from_weights_computes_what_they_do(tmp_path, start):
    """Weights left out or transposed on the way in: training then starts from a guess."""
    model = initial_model(Config(init=starts(tmp_path)[start]), 23, CPU).eval()
    tokens = torch.randint(0, 23, (2, 48), generator=torch.Generator().manual_seed(0))
    assert torch.equal(model(tokens), make_gpt(9)(tokens))


def test_block_size_is_honoured_or_refused(tmp_path):
    """--block_size ignored with --init: memory for 1,024 positions where 96 were asked for. Published weights are cut
    to it; a checkpoint has its own."""
    inits = starts(tmp_path)
    short = initial_model(Config(init=inits["folder"], block_size=16), 23, CPU).eval()
    tokens = torch.randint(0, 23, (2, 16), generator=torch.Generator().manual_seed(0))
    assert short.config.block_size == 16 and torch.equal(short(tokens), make_gpt(9)(tokens))
    for start, block_size in (("folder", 0), ("folder", 48), ("checkpoint", 0), ("checkpoint", 48)):
        model = initial_model(Config(init=inits[start], block_size=block_size), 23, CPU)
        assert model.config.block_size == 48
    for start, block_size in (("folder", 49), ("checkpoint", 16), ("checkpoint", 49)):
        with pytest.raises(UserError, match=rf"block_size {block_size}: .* 48"):
            initial_model(Config(init=inits[start], block_size=block_size), 23, CPU)
    for block_size, expected in ((0, 96), (17, 17)):
        assert initial_model(Config(block_size=block_size), 23, CPU).config.block_size == expected


@pytest.mark.parametrize("start", ["folder", "checkpoint"])
@pytest.mark.parametrize("name", ["n_layer", "n_head", "n_embd", "block", "rope_base"])
def test_sizes_are_refused_where_the_weights_have_their_own(tmp_path, start, name):
    """--n_layer 12 --init FOLDER trains the folder's two layers, and nobody notices."""
    with pytest.raises(UserError, match=f"--{name} is for a model from scratch"):
        initial_model(Config(init=starts(tmp_path)[start], **{name: "llama" if name == "block" else 8}), 23, CPU)


def test_a_llama_from_scratch_has_llama_s_blocks_and_about_as_many_weights():
    """--block that is ignored, or that changes the MLP alone; a comparison with a network of another size."""
    plain, llama = (initial_model(Config(block=block), 930, CPU) for block in ("gpt2", "llama"))
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
        model = run("sft", tmp_path, **SCRATCH, **settings).model
        twin = make_gpt(block_size=24, n_layer=1, rope_base=rope_base)
        twin.load_state_dict(model.state_dict())
        assert ("wpe.weight" in model.state_dict()) is (rope_base == 0)
        assert torch.equal(model.eval()(tokens), twin(tokens))


def test_impossible_starts_are_refused(tmp_path):
    """A checkpoint whose ids mean other words, heads that don't divide the channels: refused by the flag's name."""
    with pytest.raises(UserError, match="rope_base"):
        initial_model(Config(n_embd=12), 23, CPU)  # 3 channels a head can't be paired
    with pytest.raises(UserError, match="was trained with --tokenizer toy"):
        initial_model(Config(init=starts(tmp_path)["checkpoint"], tokenizer="tiny"), 23, CPU)
    with pytest.raises(UserError, match="n_embd 30 is not a multiple of n_head 4"):
        initial_model(Config(n_embd=30), 23, CPU)


def test_published_weights_must_have_the_vocabulary_s_rows(tmp_path):
    """Fewer rows than token ids: an index error at some later token. More: padding that would be given probability."""
    save_pretrained(make_gpt(9), tmp_path)
    config = Config(init=str(tmp_path))
    assert initial_model(config, 20, CPU)(torch.tensor([[1, 2]])).shape == (1, 2, 20)
    with pytest.raises(UserError, match="23 token ids, but the vocabulary has 24"):
        initial_model(config, 24, CPU)


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
        initial_model(Config(init=str(folder)), 23, CPU)
    assert "\n" not in str(error.value)
    if broken == "another":
        assert "h.2." in str(error.value)  # what is missing, not only that something is


# ------------------------------------------------------------------------------------------------ what a run leaves


def test_the_first_loss_is_that_before_training_also_after_a_resume(tmp_path, float64):
    """`first_loss` taken from the first evaluation of this process: after a resume the figure "before training" is
    that of a trained model."""
    before = make_gpt(10, block_size=24)
    held_out = [Example([0, 1], [2, EOS]), Example([1], [2, 3, EOS])]
    truth = held_out_loss(before, held_out, Config())
    settings = {"held_out": demonstrations([("ab", "c"), ("b", "cd")]), "lr": 0.01}
    first = run("sft", tmp_path, before, epochs=2, **settings).results
    resumed, after, log = run("sft", tmp_path, before, epochs=4, resume=True, **settings)
    assert first["first_loss"] == resumed["first_loss"] == pytest.approx(truth, abs=1e-6)
    assert [row["step"] for row in log if "held_out_loss" in row] == [0, 2, 4]
    assert resumed["held_out_loss"] == pytest.approx(held_out_loss(after, held_out, Config()), abs=1e-6)
    assert abs(resumed["first_loss"] - first["held_out_loss"]) > 0.01


def test_a_loss_that_rises_is_reported_as_it_ends(tmp_path):
    """The best loss of the run in the place of the saved model's, or the highest in the place of the first: texts that
    say the contrary of what is held out."""
    rows, held_out = demonstrations([("ab", "ccc"), ("b", "cc")]), demonstrations([("ab", "ddd"), ("b", "dd")])
    results, _, log = run("sft", tmp_path, rows=rows, held_out=held_out, epochs=8, lr=0.01, eval_every=1)
    losses = [row["held_out_loss"] for row in log if "held_out_loss" in row]
    assert min(losses) <= losses[0] < losses[-1] - 1 and len(losses) == 9
    assert (results["first_loss"], results["held_out_loss"]) == (losses[0], losses[-1])


def test_a_start_from_scratch_is_of_the_seed(tmp_path):
    """The same weights whatever the seed is: runs that should be independent have a start in common."""
    starts = [run("sft", tmp_path, lr=0.0, seed=seed, **SCRATCH).model.wte.weight for seed in (1, 1, 2)]
    assert torch.equal(starts[0], starts[1]) and not torch.equal(starts[0], starts[2])


def test_speed_counts_tokens(tmp_path, monkeypatch):
    """Demonstrations, or the tokens of the last step alone, under the name of tokens a second; by a clock that ticks
    once a look."""
    ticks = itertools.count()
    monkeypatch.setattr(sft, "time", SimpleNamespace(perf_counter=lambda: float(next(ticks))))
    with watching() as watch:
        log = run("sft", tmp_path, batch_size=1).log
    sizes = [sum(p.tokens.numel() for p in watch.of_step(i)) for i in range(8)]  # one text each, so without filler
    assert sum(sizes) == sum(len(p) + len(c) + 1 for p, c in DEMONSTRATIONS)  # and an EOS each
    assert [row["tokens_per_s"] for row in log] == [round(sum(sizes[: i + 1]) / (i + 1)) for i in range(8)]


def test_each_gate_can_fail(capsys):
    """A gate that looks at another figure, or at none, passes whatever happened."""
    good = {"held_out_loss": 0.7, "first_loss": 6.9, "eos_rate": 0.99}
    for changes, failed in (
        ({}, []),
        ({"held_out_loss": 1.5}, ["SFT held-out loss"]),
        ({"held_out_loss": 0.3}, ["SFT held-out loss"]),  # it has seen what is held out
        ({"eos_rate": 0.5}, ["SFT EOS rate"]),
    ):
        gates = sft.report(good | changes, "tiny", 924)
        assert len(gates) == 2 and [gate["name"] for gate in gates if not gate["ok"]] == failed
        said = capsys.readouterr().out
        assert f"loss {(good | changes)['held_out_loss']:.3f} (before training 6.900)" in said and "ln V = 6.83" in said
    assert sft.report(good, "", 924) == []


def test_after_training_the_model_stops(tmp_path):
    """Stopping is never learned: after SFT at least nine samples of ten end in EOS, and the loss has come down."""
    rows = demonstrations([(p * n, "abc"[:n]) for p in "defghijk" for n in (1, 2, 3)])
    changes = {"epochs": 25, "lr": 1e-2, "grad_clip": 1.0, "warmup": 5, "log_every": 25}
    results = run("sft", tmp_path, rows=rows, held_out=rows, **{**SCRATCH, "block_size": 64}, **changes).results
    assert results["eos_rate"] >= 0.9
    assert results["held_out_loss"] < 0.3 < results["first_loss"]


def test_it_says_how_many_parameters_it_trains(tmp_path, capsys):
    """With --train_layers the number of all: a reader would take it for the memory of gradients and moments."""
    for n in (0, 1):
        with watching() as watch:
            run("sft", tmp_path, train_layers=n)
        held = sum(p.numel() for group in watch.steps[0].optimizer.param_groups for p in group["params"])
        assert f"SFT: {held:,} parameters to train in {len(watch.steps)} steps" in capsys.readouterr().out
