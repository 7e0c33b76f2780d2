"""model.py: the network of both kinds, its positions, its scalar head."""

from __future__ import annotations

import inspect
import math
import weakref
from collections import Counter
from dataclasses import fields
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from helpers import (
    frame_batch,
    gradient_of,
    make_gpt,
    make_scalar,
    make_told,
    randn,
    random_mask,
    random_prompts,
    slow_draw,
    slow_generate,
    slow_hidden,
)
from torch import nn

import sampling
from model import LLAMA, MLP, Attention, Block, KVCache, rotary_turns, rotate
from frame import completion_mask, masked_mean, put_back, select_logprobs, token_logprobs, whiten
from model import GPT, GPTConfig, ScalarModel
from sampling import Rollout, decode_one_token, generate, prefill, sample_token

V = 23  # make_gpt's vocabulary
PROMPTS = random_prompts([1, 5, 17], V, seed=3)


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def endless(seed: int = 0, **sizes) -> GPT:
    """A GPT that never samples id V: a row of its embedding table, so that it can be
    filler, but no token of the vocabulary."""
    return make_gpt(seed, vocab=V + 1, real_vocab=V, **sizes)


def restless(seed: int = 0, **sizes) -> GPT:
    """A float64 GPT whose logits are about -2 .. 2: no probability is tiny, so with any id as EOS rows end, and at very
    different times."""
    model = make_gpt(seed, dtype=torch.float64, **sizes)
    with torch.no_grad():
        for p in model.ln_f.parameters():
            p *= 0.3
    return model


def greedy_alone(model, prompt: list[int], max_new_tokens: int, eos_id: int) -> tuple[list[int], bool]:
    """One prompt, no cache, no padding -> (completion with its EOS, ended)"""
    return rows_of(slow_generate(model, [prompt], max_new_tokens, eos_id=eos_id, temperature=0))[0]


def rows_of(rollout: Rollout) -> list[tuple[list[int], bool]]:
    """(completion with its EOS, ended) of each row, read from the raw fields."""
    rows = zip(rollout.tokens.tolist(), rollout.prompt_lens.tolist(), rollout.lens.tolist(), strict=True)
    return list(zip([ids[start:end] for ids, start, end in rows], rollout.ended.tolist(), strict=True))


def successor(V: int = 12) -> GPT:
    """A GPT, with cache and all, built by hand so that the next token is always (last + 1) mod V."""
    model = make_gpt(vocab=V, n_embd=V, n_head=1, n_layer=1, block_size=64)
    block = model.h[0]
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        model.wte.weight.copy_(torch.eye(V))
        for norm in (block.ln_1, block.ln_2, model.ln_f):
            norm.weight.fill_(1.0)
        block.mlp.c_fc.weight[:V] = 10 * torch.eye(V)
        block.mlp.c_proj.weight[:, :V] = torch.eye(V).roll(1, 0)  # channel i writes channel i + 1
    return model


def bigram(V: int) -> tuple[GPT, torch.Tensor]:
    """A GPT, with cache and all, whose next token depends on the last one alone (no positions, and blocks that add
    nothing), so that every probability is known -> it, and its table of logits (V, V). Id V is filler, no token."""
    model = restless(seed=3, vocab=V + 1, real_vocab=V)
    with torch.no_grad():
        for part in (model.wpe, *(layer for block in model.h for layer in (block.attn.c_proj, block.mlp.c_proj))):
            for p in part.parameters():
                p.zero_()
        x = nn.functional.layer_norm(model.wte.weight, (32,), model.ln_f.weight, model.ln_f.bias)
        return model, (x @ model.wte.weight.T)[:V, :V]


def chi_square(counts: torch.Tensor, probs: torch.Tensor) -> tuple[float, float]:
    """(statistic, bound): the bound is five standard deviations above what chance gives."""
    n, cells = counts.sum(), int((probs > 0).sum())
    assert counts[probs == 0].sum() == 0, "something of probability 0 was drawn"
    expected = n * probs[probs > 0]
    assert expected.min() > 5
    return float(((counts[probs > 0] - expected) ** 2 / expected).sum()), cells - 1 + 5 * math.sqrt(2 * (cells - 1))


def test_names_and_signatures_that_others_build_on():
    """An argument renamed, reordered or without its default: every script, and code of a user's own, calls these."""

    def shown(f) -> str:
        parts = []
        for name, p in inspect.signature(f).parameters.items():
            keyword = "*" if p.kind is p.KEYWORD_ONLY else ""
            parts.append(keyword + name + ("" if p.default is p.empty else f"={p.default}"))
        return " ".join(parts)

    assert shown(GPTConfig).startswith("vocab_size block_size n_layer n_head n_embd dropout=0.0 real_vocab=None")
    assert shown(token_logprobs) == "model tokens temperature=1.0 mask=None"
    assert shown(sample_token) == "logits uniforms temperature=1.0 top_k=None top_p=None"
    options = "*eos_id *temperature=1.0 *top_k=None *top_p=None *generator=None"
    assert shown(generate) == f"model prompts max_new_tokens {options}"
    assert shown(masked_mean) == "x mask" and shown(whiten) == "x mask shift_mean=True"
    assert shown(GPT.forward) == shown(GPT.hidden) == "self tokens where=None positions=None cache=None below=None"
    assert shown(ScalarModel.forward) == "self tokens where=None positions=None below=None"
    assert shown(ScalarModel.from_gpt) == "gpt expectation=False"
    assert shown(GPT) == "config" and shown(ScalarModel) == "config expectation=False"
    assert [f.name for f in fields(Rollout)] == ["tokens", "prompt_lens", "lens", "ended"]


# ------------------------------------------------------------------------------------------------ the network


def turn(x: torch.Tensor, position: int, base: float) -> torch.Tensor:
    """Rotary positions by the paper (Su et al. 2021, eq. 15): each pair of the channels (D,) times its 2 x 2 rotation
    matrix, by the angle position * base^(-2j/D)."""
    pairs = []
    for j in range(len(x) // 2):
        angle = position * base ** (-2 * j / len(x))
        rotation = [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]
        pairs.append(torch.tensor(rotation, dtype=torch.float64) @ x[2 * j : 2 * j + 2].double())
    return torch.cat(pairs)


def slow_gpt(model: GPT, tokens: list[int]) -> torch.Tensor:
    """GPT-2's forward for one row, by the paper and with loops, in float64: (T, V). With a rope_base queries and keys
    of every head are turned, and no position is added."""
    state = {k: v.double() for k, v in model.state_dict().items()}
    return slow_body(state, model.config, tokens) @ state["wte.weight"].T


def slow_norm(state: dict, name: str, x: torch.Tensor) -> torch.Tensor:
    centred = [row - row.mean() for row in x]
    scaled = torch.stack([row / (row.pow(2).mean() + 1e-5).sqrt() for row in centred])
    return scaled * state[f"{name}.weight"] + state[f"{name}.bias"]


def slow_block(state: dict, name: str, config: GPTConfig, x: torch.Tensor) -> torch.Tensor:
    """One block for one row, x (T, C) -> (T, C)."""
    C, H, base = config.n_embd, config.n_head, config.rope_base
    D = C // H

    def dense(x, part):
        return x @ state[f"{name}.{part}.weight"].T + state[f"{name}.{part}.bias"]

    qkv = dense(slow_norm(state, f"{name}.ln_1", x), "attn.c_attn")
    q, k, v = qkv[:, :C], qkv[:, C : 2 * C], qkv[:, 2 * C :]
    y = torch.zeros_like(x)
    for t in range(len(x)):
        for head in range(H):
            part = slice(head * D, (head + 1) * D)
            query, keys = q[t, part], [k[s, part] for s in range(t + 1)]  # only s <= t
            if base:
                query, keys = turn(query, t, base), [turn(key, s, base) for s, key in enumerate(keys)]
            weights = [math.exp(float(query @ key) / math.sqrt(D)) for key in keys]
            y[t, part] = sum(w * v[s, part] for s, w in enumerate(weights)) / sum(weights)
    x = x + dense(y, "attn.c_proj")
    u = dense(slow_norm(state, f"{name}.ln_2", x), "mlp.c_fc")
    u = 0.5 * u * (1 + torch.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)))
    return x + dense(u, "mlp.c_proj")


def slow_body(state: dict, config: GPTConfig, tokens: list[int], prefix: str = "") -> torch.Tensor:
    """What the output layer reads: (T, C)."""
    x = torch.stack([state[f"{prefix}wte.weight"][t] for t in tokens])
    x = x if config.rope_base else x + state[f"{prefix}wpe.weight"][: len(tokens)]
    for layer in range(config.n_layer):
        x = slow_block(state, f"{prefix}h.{layer}", config, x)
    return slow_norm(state, f"{prefix}ln_f", x)


POSITIONS = pytest.mark.parametrize("rope_base", [0.0, 50.0], ids=["learned", "rotary"])
SCALARS = pytest.mark.parametrize("make", [make_scalar, make_told])


@POSITIONS
def test_forward_is_gpt2_by_loops(float64, rope_base):
    """Heads, scaling, causal mask, residuals, tanh-GELU, tied output, positions of both kinds: against an obvious
    float64 implementation."""
    model = make_gpt(seed=3, vocab=11, n_embd=12, n_head=3, block_size=9, rope_base=rope_base)
    tokens = random_prompts([9, 1, 4], 11, seed=5)
    for row in tokens:
        torch.testing.assert_close(model(torch.tensor([row]))[0], slow_gpt(model, row), rtol=0, atol=1e-10)


def test_parameter_names_and_count_are_gpt2s():
    """GPT-2 small has 124,439,808 parameters, under these names (so its weights import one to one)."""
    with torch.device("meta"):
        small = GPT(GPTConfig(50257, 1024, 12, 12, 768))
    assert sum(p.numel() for p in small.parameters()) == 124_439_808
    modules = ["ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"]
    block = [f"{module}.{kind}" for module in modules for kind in ("weight", "bias")]
    names = ["wte.weight", "wpe.weight", "ln_f.weight", "ln_f.bias"]
    names += [f"h.{i}.{name}" for i in range(12) for name in block]
    assert sorted(small.state_dict()) == sorted(names)


def test_initial_loss_is_that_of_a_guess():
    """A fresh network knows nothing: its loss is ln V, at any width."""
    for n_embd in (32, 128):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            model = GPT(GPTConfig(500, 32, 3, 4, n_embd))
        tokens = torch.randint(0, 500, (16, 32), generator=gen())
        loss = -token_logprobs(model, tokens).mean().detach()
        assert abs(float(loss) - math.log(500)) < 0.3


def test_sequences_longer_than_the_block_are_refused():
    """Positions beyond wpe must raise, not wrap or crash inside an embedding."""
    with pytest.raises(ValueError, match="block_size"):
        make_gpt(block_size=8)(torch.zeros(1, 9, dtype=torch.long))
    with pytest.raises(ValueError, match="n_head"):
        GPTConfig(10, 8, 1, 3, 32)
    with pytest.raises(ValueError, match="dropout"):
        GPTConfig(10, 8, 1, 4, 32, dropout=1.0)
    with pytest.raises(ValueError, match="block_size"):
        make_gpt(block_size=8, rope_base=100.0)(torch.zeros(1, 9, dtype=torch.long))
    for rope_base, n_embd in ((-1.0, 32), (100.0, 12)):  # 12 channels in 4 heads: 3 can't be paired
        with pytest.raises(ValueError, match="rope_base"):
            GPTConfig(10, 8, 1, 4, n_embd, rope_base=rope_base)
    with pytest.raises(ValueError, match="n_head 6 is not a multiple of n_kv_head 4"):
        GPTConfig(10, 8, 1, 6, 24, n_kv_head=4)
    for name in ("norm", "mlp", "bias"):
        with pytest.raises(ValueError, match=f"{name} must be one of .*, not 'llama'"):
            GPTConfig(10, 8, 1, 4, 32, **{name: "llama"})


@SCALARS
def test_padding_changes_nothing(make):
    """Other filler ids, more filler columns, other batch mates: no real position moves
    (needs R1, R5, R14; traps 1, 30, 41)."""
    gpt, scalar = make_gpt(seed=1, dtype=torch.float64), make(seed=1, dtype=torch.float64)
    scalar.mean.fill_(0.3)
    frame = frame_batch(B=6, seed=2)
    where = torch.arange(frame.tokens.size(1)) < frame.lens[:, None]  # (B, T) real tokens
    scores = scalar.score(frame.tokens, frame.lens)
    for other in (
        frame.tokens.masked_fill(~where, 0),
        frame.tokens.masked_fill(~where, V - 1),
        torch.cat([frame.tokens, torch.randint(0, V, (6, 7), generator=gen(9))], dim=1),
    ):
        T = frame.tokens.size(1)
        for f in (gpt, gpt.hidden, scalar):
            torch.testing.assert_close(f(other)[:, :T][where], f(frame.tokens)[where], rtol=0, atol=1e-12)
        torch.testing.assert_close(scalar.score(other, frame.lens), scores, rtol=0, atol=1e-12)
    for i in range(6):  # alone, without any filler
        n = int(frame.lens[i])
        torch.testing.assert_close(gpt(frame.row(i))[0], gpt(frame.tokens)[i, :n], rtol=0, atol=1e-12)
        alone = scalar.score(frame.row(i), frame.lens[i : i + 1])
        torch.testing.assert_close(alone, scores[i : i + 1], rtol=0, atol=1e-12)


def test_dropout_is_off_in_eval_and_in_generate():
    """Dropout configured > 0 must not touch scoring or rollouts (need R2; traps 39, 25), and
    generate gives back the mode it found."""
    model, twin = endless(seed=2, dropout=0.5), endless(seed=2)
    tokens = torch.randint(0, V, (3, 12), generator=gen())
    assert torch.equal(model(tokens), twin(tokens))
    for training in (True, False):
        model.train(training)
        found, expected = (generate(m, [[1, 2], [3]], 9, eos_id=V, temperature=0).tokens for m in (model, twin))
        assert torch.equal(found, expected)
        assert all(m.training is training for m in model.modules())
    with pytest.raises(RuntimeError):  # ... also when the model fails on the way
        model.train()
        model.ln_f.register_forward_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("boom")))
        generate(model, [[1]], 3, eos_id=V)
    assert model.training


def test_dropout_is_on_in_training():
    """The counterpart: in train mode every kind of dropout draws anew, so a
    configured dropout isn't silently ignored."""
    tokens = torch.randint(0, V, (3, 12), generator=gen())
    model = make_gpt(seed=2, dropout=0.5).train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        assert not torch.equal(model(tokens), model(tokens))


def sites_of(model: nn.Module, tokens: torch.Tensor) -> list[tuple[str, torch.Tensor, torch.Tensor]]:
    """One pass in training mode -> for every place behind which a network drops: its name, what comes to it, what
    leaves it."""
    found, before, handles = [], {}, []
    gpt = model.gpt if isinstance(model, ScalarModel) else model
    for name, module in model.named_modules():
        if name.endswith("c_proj"):  # attention's or the MLP's, which is named before it
            module.register_forward_hook(lambda m, _, out: before.__setitem__(m, out))
        if isinstance(module, Attention | MLP):
            keep = lambda m, _, out, name=name: found.append((name, before[m.c_proj], out))  # noqa: E731
            handles.append(module.register_forward_hook(keep))
    keep = lambda _, inputs: found.append(("embedding", gpt.wte(tokens), inputs[0]))  # noqa: E731
    handles.append(gpt.h[0].ln_1.register_forward_pre_hook(keep))
    model.train()
    model(tokens)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("expectation", [False, True])
@pytest.mark.parametrize("others", [{}, {"rope_base": 100.0, **LLAMA}], ids=["gpt2", "llama"])
def test_dropout_acts_in_every_place(expectation, others):
    """None behind the embedding or one of the projections, or in the block that a reward model has of its own: the
    network drops somewhere, so that no other test notices. With p = 0.5 half of what comes to each place is 0 behind
    it, and the rest is twice as large."""
    model = make_scalar(2, expectation, dropout=0.5, block_size=64, **others)
    tokens = torch.randint(0, V, (4, 64), generator=gen())
    places = sites_of(model, tokens)
    assert len(places) == 1 + 2 * (2 + expectation) and len({name for name, _, _ in places}) == len(places)
    for name, before, after in places:
        if name == "embedding" and not others:
            before = before + model.gpt.wpe(torch.arange(64))
        gone = after == 0
        assert 0.45 < gone.float().mean().item() < 0.55, name
        torch.testing.assert_close(after[~gone], 2 * before[~gone], msg=name)


def test_dropout_in_attention_leaves_keys_out():
    """A single token sees itself alone: with p = 0.5 a head reads nothing at all in half of the rows, and in the others
    what it reads is doubled."""
    model, rows = make_gpt(3, dropout=0.5), 400
    attention, read = model.h[0].attn, []
    attention.c_proj.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0].view(rows, 4, 8)))  # heads
    view = model.view(torch.zeros(rows, 1, dtype=torch.long))
    x = torch.randn(1, 1, 32, generator=gen()).expand(rows, 1, 32)
    for training in (False, True):
        attention.train(training)(x, view)
    whole, dropped = read
    gone = (dropped == 0).all(2)  # (rows, heads)
    assert 0.4 < gone.float().mean().item() < 0.6 and (gone.any(1) & ~gone.all(1)).any()  # each head by itself
    torch.testing.assert_close(dropped[~gone], 2 * whole[~gone])


# ------------------------------------------------------------------------------------------------ rotary positions


def turned(x: torch.Tensor, first: int = 0, base: float = 50.0, slots: int = 99) -> torch.Tensor:
    """x (..., T, D) at positions first, first + 1, ..."""
    turns = rotary_turns(GPTConfig(9, slots, 1, 1, x.size(-1), rope_base=base))
    return rotate(x, turns[first : first + x.size(-2)])


def test_rotary_positions_are_2_by_2_rotations(float64):
    """Another pairing of the channels, sine and cosine exchanged, the angles of another base or turned the other way:
    against a rotation matrix for each pair. Position 0 is not turned, and no vector changes its length."""
    for base, D in ((10000.0, 8), (50.0, 6), (3.0, 2)):
        x = randn(2, 20, D, seed=D)
        found = turned(x, 11, base)
        for b, t in product(range(2), range(20)):
            torch.testing.assert_close(found[b, t], turn(x[b, t], 11 + t, base), rtol=0, atol=1e-12)
        torch.testing.assert_close(found.norm(dim=-1), x.norm(dim=-1), rtol=0, atol=1e-12)
        torch.testing.assert_close(turned(x, 0, base)[:, 0], x[:, 0], rtol=0, atol=1e-15)


@pytest.mark.parametrize("base", [1e4, 1e5])
def test_rotary_positions_are_right_far_out(base):
    """Positions in bfloat16 coincide beyond 256, in float16 beyond 2,048; angles that are rounded to either are wrong
    from the start. At every position its own angle, as far as float32 holds it."""
    turns = rotary_turns(GPTConfig(9, 8192, 1, 1, 64, rope_base=base))
    assert turns.dtype == torch.float32 and turns.shape == (8192, 32, 2)
    for position in (1, 200, 257, 1000, 2049, 4999, 8191):
        for j in (0, 1, 5, 17, 31):
            angle = position * base ** (-2 * j / 64)
            expected = [math.cos(angle), math.sin(angle)]
            assert turns[position, j].tolist() == pytest.approx(expected, abs=1e-6 + angle * 2**-22)


def test_a_rotary_product_depends_on_the_distance_alone(float64):
    """Queries and keys turned by different angles, or opposite ones: their product would depend on where both stand."""
    q, k = randn(8, seed=1), randn(8, seed=2)
    queries, keys = (turned(x.expand(30, 8)) for x in (q, k))
    products = queries @ keys.T  # (30, 30) of the same two vectors at every two positions
    for distance in range(-29, 30):
        diagonal = products.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=0, atol=1e-12)
    of_each = torch.stack([products.diagonal(distance)[0] for distance in range(-29, 30)])
    assert (of_each[:, None] - of_each).abs().fill_diagonal_(1).min() > 1e-5  # and on the distance it does depend


def test_rotary_positions_in_other_precisions():
    """Half precision keeps its dtype and is turned in float32, so a channel is off by its own rounding and no more:
    angles of 90 in bfloat16 would be off by a quarter, cosines in bfloat16 by as much again as the rounding. A float64
    tensor is not cut to float32."""
    x = randn(30, 8, seed=3)
    for dtype, relative in ((torch.bfloat16, 2**-8), (torch.float16, 2**-11), (torch.float32, 2**-24)):
        found, given = turned(x.to(dtype), 60), x.to(dtype)
        assert found.dtype == dtype
        truth = torch.stack([turn(row, 60 + t, 50.0) for t, row in enumerate(given)])
        allowed = relative * truth.abs() + 1e-5 * given.double().norm(dim=-1, keepdim=True)
        assert ((found.double() - truth).abs() <= allowed).all()
    assert turned(x).dtype == torch.float64


def test_a_rotary_network_has_no_table_of_positions():
    """No parameter and no entry of the checkpoint belongs to positions, so that a checkpoint is weights alone; the
    scalar head copies such a body too."""
    model = make_gpt(seed=4, rope_base=50.0)
    learned = make_gpt(seed=4)
    assert set(learned.state_dict()) - set(model.state_dict()) == {"wpe.weight"}
    assert set(model.state_dict()) == {name for name, _ in model.named_parameters()}
    twin = make_gpt(seed=5, rope_base=50.0)
    twin.load_state_dict(model.state_dict())
    tokens = torch.randint(0, V, (2, 20), generator=gen())
    assert torch.equal(twin(tokens), model(tokens))
    assert torch.equal(ScalarModel.from_gpt(model).gpt.hidden(tokens), model.hidden(tokens))


def test_a_rotary_network_made_double_is_one_of_float64():
    """The angles are float32 numbers then, but everything that is computed from them is float64: forward and cached
    sampling agree to that."""
    model = make_gpt(seed=4, rope_base=50.0).double()
    tokens = torch.randint(0, V, (2, 20), generator=gen())
    assert model(tokens).dtype == torch.float64
    torch.testing.assert_close(model(tokens)[0], slow_gpt(model, tokens[0].tolist()), rtol=0, atol=1e-4)
    torch.testing.assert_close(model(tokens[:, :7]), model(tokens)[:, :7], rtol=0, atol=1e-11)
    assert rows_of(generate(model, PROMPTS, 20, eos_id=0, generator=gen(3))) == rows_of(
        slow_generate(model, PROMPTS, 20, eos_id=0, generator=gen(3))
    )


# ------------------------------------------------------------------------------------------------ some positions alone


SHAPES = [(1, 2), (3, 7), (5, 12)]


def masks_of(B: int, T: int) -> list[torch.Tensor]:
    """Masks (B, T) and (B, T-1): random ones, one row of which is empty, everything, a single place, and nothing."""
    masks = []
    for width in (T, T - 1):
        some = random_mask((B, width), seed=B + width, share=0.5)
        some[B - 1] = B == 1
        single, nothing = torch.zeros(B, width, dtype=torch.bool), torch.zeros(B, width, dtype=torch.bool)
        single[B // 2, width - 1] = True
        masks += [some, torch.ones(B, width, dtype=torch.bool), single, nothing]
    return masks


def gradients(model: nn.Module, loss: torch.Tensor) -> list[torch.Tensor]:
    """Of all parameters; 0 where there is none."""
    parameters = list(model.parameters())
    found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]


@pytest.mark.parametrize("n_layer", [1, 3])
@pytest.mark.parametrize("make", [make_gpt, make_scalar, make_told])
@POSITIONS
def test_some_positions_alone_equal_those_of_the_full_forward(float64, make, rope_base, n_layer):
    """Positions off by one or of another row, an order other than reading order, a last block that mixes up its rows:
    values, and the gradients of all parameters, of any masks."""
    model = make(seed=21, rope_base=rope_base, n_layer=n_layer)
    if make is not make_gpt:
        model.mean.fill_(0.3)
        model.std.fill_(2.0)
    for B, T in SHAPES:
        tokens = torch.randint(0, V, (B, T), generator=gen(T))
        for where in masks_of(B, T):
            full = model(tokens)[:, : where.size(1)][where]  # (N, V) or (N,)
            some = model(tokens, where)
            assert some.shape == full.shape == (int(where.sum()), *full.shape[1:])
            torch.testing.assert_close(some, full, rtol=0, atol=1e-11)
            weight = randn(*full.shape, seed=T)
            pairs = zip(gradients(model, (some * weight).sum()), gradients(model, (full * weight).sum()), strict=True)
            for (name, _), (a, b) in zip(model.named_parameters(), pairs, strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


def test_nothing_is_computed_that_only_other_positions_need():
    """What makes it worth while: the last block's projection and MLP, the final norm and the output layer see the
    positions asked for and no others; the blocks before, whose keys are read, see all."""
    model, tokens = make_gpt(seed=22), torch.randint(0, V, (4, 10), generator=gen())
    where, rows = random_mask((4, 9), seed=1, share=0.3), {}
    for name in ("h.0.mlp", "h.1.attn.c_attn", "h.1.attn.c_proj", "h.1.mlp", "ln_f"):
        hook = lambda _, inputs, __, name=name: rows.update({name: inputs[0].numel() // 32})  # noqa: E731
        model.get_submodule(name).register_forward_hook(hook)
    model(tokens, where)
    N = int(where.sum())
    assert 0 < N < 36
    assert rows == {"h.0.mlp": 40, "h.1.attn.c_attn": 40, "h.1.attn.c_proj": N, "h.1.mlp": N, "ln_f": N}


# ------------------------------------------------------------------------------------------------ scalar head


@pytest.mark.parametrize("expectation", [False, True])
def test_scalar_model_copies_the_body_under_a_new_head(expectation):
    """from_gpt shares no storage with its GPT (a value model must not move the
    policy), and starts from exactly its body."""
    gpt = make_gpt(seed=4)
    scalar = ScalarModel.from_gpt(gpt, expectation)
    assert scalar.expectation is expectation and scalar.config == gpt.config
    tokens = torch.randint(0, V, (2, 7), generator=gen())
    assert torch.equal(scalar.gpt.hidden(tokens), gpt.hidden(tokens))
    ours = {p.untyped_storage().data_ptr() for p in gpt.parameters()}
    assert not ours & {p.untyped_storage().data_ptr() for p in scalar.parameters()}
    before = gpt(tokens).clone()
    with torch.no_grad():
        for p in scalar.parameters():
            p += 1
    assert torch.equal(gpt(tokens), before)


def test_scalar_head_starts_at_one_over_sqrt_d_plus_1():
    """Head weights N(0, 1/(d+1)), bias 0 (std 1/(d+1) is a common slip)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        heads = [ScalarModel(GPTConfig(10, 4, 1, 1, 255)).head for _ in range(12)]
    weights = torch.cat([head.weight.flatten() for head in heads]).detach()
    assert abs(float(weights.std()) * 16 - 1) < 0.05 and abs(float(weights.mean())) < 4 / 16 / math.sqrt(len(weights))
    assert ScalarModel(GPTConfig(10, 4, 1, 1, 15)).head.bias.item() == 0


@SCALARS
def test_scalar_model_reads_the_last_real_token_normalised(float64, make):
    """score = (w . hidden[len - 1] + b - mean) / std, row by row (need R14: off by one, read at a pad)."""
    scalar, frame = make(seed=5), frame_batch(B=5, seed=3)
    scalar.mean.fill_(-0.7)
    scalar.std.fill_(2.5)
    scores = scalar.score(frame.tokens, frame.lens)
    assert scores.shape == (5,) and scalar(frame.tokens).shape == frame.tokens.shape
    for i in range(5):
        last = slow_hidden(scalar, frame.row(i)[0].tolist())[-1]
        truth = ((last @ scalar.head.weight[0]).item() + scalar.head.bias.item() + 0.7) / 2.5
        assert abs(scores[i].item() - truth) < 1e-12
    for mode in (True, False):  # what it returns must not depend on the mode it is in (trap 25)
        scalar.train(mode)
        assert torch.equal(scalar.score(frame.tokens, frame.lens), scores)


@SCALARS
def test_the_scalar_head_is_no_less_than_float32_under_autocast(make):
    """Scores in bfloat16 have two and a half digits: behind a bias of -100 they are 0.5 apart, and so are rewards."""
    scalar = make(seed=5)
    tokens = torch.randint(0, V, (4, 12), generator=gen())
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        scalar.head.bias.fill_(-100.0)
        found, hidden = scalar(tokens), scalar.hidden(tokens)
    truth = hidden.double() @ scalar.head.weight[0].double() - 100
    assert found.dtype == torch.float32
    # float32 numbers near 100 are 8e-6 apart; each of 32 products and sums may round
    torch.testing.assert_close(found.double(), truth, rtol=0, atol=33 * 8e-6)


# ------------------------------------------------------------------------------------------------ what was expected


def slow_scalar(model: ScalarModel, tokens: list[int]) -> list[float]:
    """A ScalarModel that is told what was expected, position by position in float64: the GPT's state, plus the logit
    that the position before gave this token, along `direction`; one more block, its norm, the head."""
    state = {k: v.double() for k, v in model.state_dict().items()}
    body = slow_body(state, model.config, tokens, "gpt.")
    x = body.clone()
    for t in range(1, len(tokens)):
        logit = sum(float(a) * float(b) for a, b in zip(body[t - 1], state["gpt.wte.weight"][tokens[t]], strict=True))
        x[t] += logit * state["direction"]
    last = slow_norm(state, "ln", slow_block(state, "block", model.config, x))
    raw = last @ state["head.weight"][0] + state["head.bias"]
    return ((raw - state["mean"]) / state["std"]).tolist()


@POSITIONS
def test_a_told_model_equals_a_loop_over_positions(float64, rope_base):
    """The logit of the next token in the place of this one's (which would be the answer), one from the position after
    or two before, a first token that is told something, the new block without positions: against loops."""
    model = make_told(seed=3, vocab=11, n_embd=12, n_head=3, block_size=9, rope_base=rope_base)
    model.mean.fill_(0.4)
    model.std.fill_(1.7)
    plain = make_scalar(seed=3, vocab=11, n_embd=12, n_head=3, block_size=9, rope_base=rope_base)
    for row in random_prompts([9, 1, 2, 4], 11, seed=5):
        found = model(torch.tensor([row]))[0]
        assert found.tolist() == pytest.approx(slow_scalar(model, row), abs=1e-10)
        assert (found - plain(torch.tensor([row]))[0]).abs().min() > 1e-3


def test_what_is_told_is_the_gpt_s_own_logit(float64):
    """What is written along the direction is, to the last digit, the logit that the GPT gave each token before it was
    read; of the first token, which nothing foretold, 0. Padding rows of an imported table change nothing."""
    for changes in ({}, {"real_vocab": V - 3}, {"tied": False}):
        model = make_told(seed=6, **changes)
        tokens = torch.randint(0, V - 3, (3, 9), generator=gen())
        told = []
        model.block.register_forward_pre_hook(lambda _, inputs, told=told: told.append(inputs[0]))
        model(tokens)
        written = (told[0] - model.gpt.hidden(tokens)) @ model.direction / model.direction.pow(2).sum()  # (3, 9)
        logits = model.gpt(tokens)[:, :-1].gather(2, tokens[:, 1:, None]).squeeze(2)
        torch.testing.assert_close(written[:, 1:], logits, rtol=0, atol=1e-10)
        assert (written[:, 0].abs() < 1e-12).all()


@SCALARS
@POSITIONS
def test_later_tokens_change_nothing_before(float64, make, rope_base):
    """A value that has seen the action it is to judge explains everything in training and nothing is learned. Whatever
    follows, and however long: the values before it stay, and no gradient leads there."""
    model, tokens = make(seed=7, rope_base=rope_base), torch.randint(0, V, (4, 12), generator=gen())
    values = model(tokens)
    for t in range(1, 12):
        other = tokens.clone()
        other[:, t:] = (tokens[:, t:] + 1 + torch.arange(12 - t)) % V
        changed = model(other)
        torch.testing.assert_close(changed[:, :t], values[:, :t], rtol=0, atol=1e-11)
        assert (changed[:, t:] != values[:, t:]).all()
        torch.testing.assert_close(model(tokens[:, :t]), values[:, :t], rtol=0, atol=1e-11)


def test_the_expectation_is_learned_through():
    """What is told has gradients of its own: of the direction, of the new block and norm, and of the GPT below; and
    dropout reaches the new block in training alone."""
    model, tokens = make_told(seed=8, dropout=0.5), torch.randint(0, V, (3, 9), generator=gen())
    model(tokens).sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())
    seen = []
    model.block.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0], output)))
    twin = make_told(seed=8)
    assert torch.equal(model(tokens), twin(tokens))
    model.train()
    for module in model.gpt.modules():
        module.training = False
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model(tokens), model(tokens)
    assert torch.equal(seen[-1][0], seen[-2][0]) and not torch.equal(seen[-1][1], seen[-2][1])


@pytest.mark.parametrize("n_layer", [1, 4])
def test_the_new_block_starts_like_one_of_the_gpt_s(n_layer):
    """Weights N(0, 0.02) at GPT-2's width, smaller where a branch ends, biases 0, norms 1: left as torch makes them
    (uniform, biases too) the new block drowns what it is told in noise."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        gpt = GPT(GPTConfig(23, 8, n_layer, 4, 192))
        model = ScalarModel.from_gpt(gpt, expectation=True)
    for block in (model.block, *gpt.h):
        for name, p in block.named_parameters():
            if p.dim() == 1:
                assert (p == (1.0 if name.startswith("ln_") and name.endswith("weight") else 0.0)).all(), name
            else:
                std = 0.02 * 2 / (math.sqrt(2 * n_layer) if "c_proj" in name else 1)  # 192 is a quarter of 768
                assert p.std().item() == pytest.approx(std, rel=5 / math.sqrt(2 * p.numel())), name
                assert abs(p.mean().item()) < 5 * std / math.sqrt(p.numel()), name
    spread_of_it = model.direction.std().item()
    assert spread_of_it == pytest.approx(0.1, rel=5 / math.sqrt(2 * 192))
    assert (model.ln.weight == 1).all() and (model.ln.bias == 0).all()


def pairs_by_likelihood(gpt: GPT, n: int, seed: int) -> torch.Tensor:
    """n prompts of six random tokens, each with two tokens, of which the GPT finds the first at least e times likelier
    than the second: (n, 2, 7)."""
    generator = gen(seed)
    prompts = torch.randint(0, V, (4 * n, 6), generator=generator)
    both = torch.stack([torch.randperm(V, generator=generator)[:2] for _ in range(4 * n)])  # (4n, 2)
    with torch.no_grad():
        logits = gpt(prompts)[:, -1].gather(1, both)  # (4n, 2)
    both = both.gather(1, logits.argsort(1, descending=True))
    clear = ((logits[:, 0] - logits[:, 1]).abs() > 1).nonzero().flatten()[:n]
    assert len(clear) == n
    return torch.cat([prompts[clear][:, None].expand(n, 2, 6), both[clear][..., None]], 2)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_who_is_told_learns_in_few_pairs_what_the_gpt_knows(seed):
    """The better of two completions is the one that the GPT itself finds likelier, as the right answer mostly is. 400
    pairs, learned by heart by both: the model that is told is right on new prompts too, the one that isn't would have
    to work out in its two blocks what they predict, and has only learned those 400."""
    gpt = make_gpt(seed)
    learn, test = pairs_by_likelihood(gpt, 400, seed), pairs_by_likelihood(gpt, 600, seed + 10)
    accuracy = {}
    for expectation in (True, False):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = ScalarModel.from_gpt(gpt, expectation)
        optimizer, generator = torch.optim.AdamW(model.parameters(), lr=2e-3), gen(seed)
        steps = [part for _ in range(4) for part in learn[torch.randperm(400, generator=generator)].split(20)]
        for step, part in enumerate(steps):
            optimizer.param_groups[0]["lr"] = 2e-3 * (1 - step / len(steps))
            scores = model(part.flatten(0, 1))[:, -1].view(-1, 2)
            optimizer.zero_grad()
            nn.functional.softplus(scores[:, 1] - scores[:, 0]).mean().backward()
            optimizer.step()
        with torch.no_grad():
            scores = model(test.flatten(0, 1))[:, -1].view(-1, 2)
        accuracy[expectation] = (scores[:, 0] > scores[:, 1]).float().mean().item()
    assert accuracy[True] > 0.9 and accuracy[False] < 0.85


# ------------------------------------------------------------------------------------------------ log-probabilities


def test_select_logprobs_is_the_log_softmax_in_value_and_gradient():
    """The gather-minus-logsumexp shortcut against the full log-softmax, at T = 1 and 0.7 (need R20; trap 38)."""
    logits = 3 * torch.randn(4, 6, 11, generator=gen(), dtype=torch.float64)
    ids = torch.randint(0, 11, (4, 6), generator=gen(1))
    weight = torch.randn(4, 6, generator=gen(2), dtype=torch.float64)
    for T in (1.0, 0.7):
        ours = select_logprobs(logits, ids, T)
        for b, t in product(range(4), range(6)):
            assert abs(ours[b, t] - (logits[b, t] / T).log_softmax(0)[ids[b, t]]) < 1e-12
        gradient = gradient_of(lambda x, T=T: (select_logprobs(x, ids, T) * weight).sum(), logits)
        onehot = nn.functional.one_hot(ids, 11).double()
        expected = weight[..., None] * (onehot - (logits / T).softmax(-1)) / T
        torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-12)


def test_select_logprobs_of_huge_logits_stays_finite():
    """+-1e4 logits: no overflow in value or gradient (a log of a softmax would give -inf)."""
    known = (([0, 0], [0, -math.log(2)]), ([1, 1], [-1e4, -math.log(2)]), ([2, 2], [-2e4, -2e4 - math.log(2)]))
    for dtype, atol in ((torch.float32, 1e-2), (torch.float64, 1e-10)):  # one step of float32 at 2e4 is 2e-3
        logits = torch.tensor([[1e4, 0.0, -1e4], [1e4, 1e4, -1e4]], dtype=dtype)
        for ids, truth in known:
            ours = select_logprobs(logits, torch.tensor(ids))
            torch.testing.assert_close(ours, torch.tensor(truth, dtype=dtype), rtol=0, atol=atol)
            assert gradient_of(lambda x, ids=ids: select_logprobs(x, torch.tensor(ids)).sum(), logits).isfinite().all()


def test_select_logprobs_works_in_float32_at_least():
    """bfloat16 logits are cast before the softmax, not after, which would cost two
    digits; float64 logits stay what they are."""
    logits = (5 * torch.randn(3, 500, generator=gen())).bfloat16()
    ids = torch.tensor([1, 2, 3])
    truth = logits.double().log_softmax(-1)[[0, 1, 2], ids]
    for given, wanted in (("bfloat16", "float32"), ("float32", "float32"), ("float64", "float64")):
        ours = select_logprobs(logits.to(getattr(torch, given)), ids)
        assert ours.dtype == getattr(torch, wanted)
        atol = 1e-4 if wanted == "float32" else 1e-12
        torch.testing.assert_close(ours.double(), truth, rtol=0, atol=atol)


def test_the_output_layer_is_no_less_than_float32_under_autocast():
    """The product with the embedding table in bfloat16, and a cast to float32 when the digits are gone: logits near
    -100 are then 0.5 apart. Against the float64 product of the same hidden states; float64 itself is left alone."""
    model = make_gpt(seed=9, vocab=500)
    with torch.no_grad():
        model.ln_f.weight[0], model.ln_f.bias[0], model.wte.weight[:, 0] = 0.0, 10.0, -10.0  # every logit 100 lower
    tokens = torch.randint(0, 500, (3, 12), generator=gen())
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        found, hidden = model(tokens), model.hidden(tokens)
        logprobs = token_logprobs(model, tokens)
    assert found.dtype == logprobs.dtype == torch.float32
    truth = hidden.double() @ model.wte.weight.double().T
    assert truth.mean() < -90
    # float32 numbers near 100 are 8e-6 apart; each of 32 products and sums may round, and the softmax once more
    torch.testing.assert_close(found.double(), truth, rtol=0, atol=33 * 8e-6)
    picked = truth.log_softmax(-1)[:, :-1].gather(-1, tokens[:, 1:, None]).squeeze(-1)
    torch.testing.assert_close(logprobs.double(), picked, rtol=0, atol=70 * 8e-6)
    assert model.double()(tokens).dtype == torch.float64


def test_log_probs_in_bfloat16_are_close_where_bfloat16_logits_are_not():
    """GPT-2's shapes, and logits about -100 as GPT-2 has them: what bfloat16 blocks change is small, while logits that
    went through bfloat16 once, as all do that leave such a product, are off by a tenth of a nat: as far as PPO's
    clip."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = GPT(GPTConfig(50257, 32, 2, 12, 768)).eval()
        tokens = torch.randint(0, 50257, (4, 32))
    with torch.no_grad():
        model.wte.weight *= 4  # GPT-2's entries are about this large
        model.ln_f.weight[0], model.ln_f.bias[0], model.wte.weight[:, 0] = 0.0, 10.0, -10.0
        logits = model(tokens)
        truth = token_logprobs(model, tokens)
        assert logits.mean() == pytest.approx(-100, abs=1) and logits.std(-1).mean() > 1
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = token_logprobs(model, tokens)
        coarse = select_logprobs(logits[:, :-1].bfloat16(), tokens[:, 1:])
    assert (coarse - truth).abs().mean() > 0.1
    assert 0 < (found - truth).abs().mean() < 0.02 and (found - truth).abs().max() < 0.1


def test_token_logprobs_frame():
    """logprobs[t] is that of tokens[t+1], given the tokens before it alone (trap 6: off by one)."""
    model, tokens = make_gpt(seed=9, dtype=torch.float64), torch.randint(0, V, (3, 9), generator=gen())
    for T in (1.0, 0.7):
        ours = token_logprobs(model, tokens, T)
        assert ours.shape == (3, 8) and ours.dtype == torch.float64
        for b, t in product(range(3), range(8)):
            truth = (model(tokens[b : b + 1, : t + 1])[0, -1] / T).log_softmax(0)[tokens[b, t + 1]]
            assert abs(ours[b, t].item() - truth.item()) < 1e-11


@POSITIONS
def test_token_logprobs_of_some_tokens_are_those_of_all(float64, rope_base):
    """With a mask: the same values at its places and 0 elsewhere, and the same gradient; what the ids elsewhere are,
    even ids that no vocabulary has, makes no difference. A mask of 0 and 1 will do, and with no_grad slices too."""
    model = make_gpt(seed=23, rope_base=rope_base)
    for B, T in SHAPES:
        tokens = torch.randint(0, V, (B, T), generator=gen(T))
        everything = token_logprobs(model, tokens, 0.7)
        for mask in masks_of(B, T)[4:]:
            expected = torch.where(mask, everything, 0.0)
            for given in (mask, mask.long()):
                found = token_logprobs(model, tokens, 0.7, given)
                assert found.shape == (B, T - 1) and (found[~mask] == 0).all()
                torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)
            weight = randn(B, T - 1, seed=T)
            pairs = zip(*(gradients(model, (x * weight).sum()) for x in (found, expected)), strict=True)
            for a, b in pairs:
                torch.testing.assert_close(a, b, rtol=0, atol=1e-9)
    sampled = random_mask((5, 11), seed=2, share=0.15)
    behind = sampled.flip(1).cumsum(1).flip(1) == 0  # no token that counts comes after these
    spoilt = tokens.clone()
    spoilt[:, 1:][behind] = 0
    found, expected = (token_logprobs(model, x, 1.0, sampled) for x in (spoilt, tokens))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    model = make_gpt(seed=23, vocab=V + 1, real_vocab=V, rope_base=rope_base)
    spoilt[:, 1:][behind] = V  # filler that is no token: beyond the logits
    expected = torch.where(sampled, token_logprobs(model, tokens), 0.0)
    torch.testing.assert_close(token_logprobs(model, spoilt, 1.0, sampled), expected, rtol=0, atol=1e-11)


def test_put_back_by_hand():
    """In reading order, 0 elsewhere; the gradient finds its way back."""
    mask = torch.tensor([[False, True, True], [False, False, False], [True, False, True]])
    found = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    assert put_back(found, mask).tolist() == [[0, 1, 2], [0, 0, 0], [3, 0, 4]]
    assert put_back(found, mask).dtype == torch.float64
    weight = torch.arange(9.0, dtype=torch.float64).view(3, 3)
    assert gradient_of(lambda x: (put_back(x, mask) * weight).sum(), found).tolist() == [1, 2, 6, 8]
    assert put_back(found[:0], torch.zeros(2, 3, dtype=torch.bool)).tolist() == [[0, 0, 0]] * 2


class Recorder:
    """A function from tokens to logits that claims a huge vocabulary, so that token_logprobs must slice, and notes
    what it was asked."""

    def __init__(self, model, vocab):
        self.model, self.config, self.rows = model, SimpleNamespace(vocab_size=vocab), []

    def __call__(self, tokens):
        self.rows.append(tokens.size(0))
        return self.model(tokens)


class RecordingGPT(GPT):
    """The same, as a GPT, which can be asked for some positions alone."""

    def __init__(self, model, vocab):
        super().__init__(model.config)
        self.load_state_dict(model.state_dict())
        self.config, self.rows = GPTConfig(vocab, 48, 2, 4, 32), []
        self.eval()

    def forward(self, tokens, where=None, **known):
        self.rows.append(tokens.size(0))
        return super().forward(tokens, where, **known)


@pytest.mark.parametrize("kind", [Recorder, RecordingGPT])
@pytest.mark.parametrize("vocab", [2**22, 2**24, 2**30])
def test_token_logprobs_in_slices_changes_nothing(float64, vocab, kind):
    """Without gradients the rows go through in slices that bound memory (need R20); the answer is that of one pass,
    with a mask, whose rows are of different fullness, as without."""
    model, tokens = make_gpt(seed=9), torch.randint(0, V, (7, 5), generator=gen())
    mask = random_mask((7, 4), seed=4, share=0.4)
    for given in (None, mask):
        whole = token_logprobs(model, tokens, 0.7, given)
        recorder = kind(model, vocab)
        with torch.no_grad():
            sliced = token_logprobs(recorder, tokens, 0.7, given)
        torch.testing.assert_close(sliced, whole, rtol=0, atol=1e-11)
        assert sum(recorder.rows) == 7 and len(recorder.rows) > 1
        assert all(n == 1 or n * 5 * vocab <= 2**26 for n in recorder.rows)
        recorder = kind(model, vocab)
        token_logprobs(recorder, tokens, 0.7, given)
        assert recorder.rows == [7]  # with gradients: one pass, whose memory is the caller's business


def test_real_vocab_gets_all_the_probability():
    """Padded embedding rows are no tokens: no probability, never sampled (trap 4)."""
    padded = make_gpt(seed=10, vocab=40, real_vocab=6, dtype=torch.float64)
    with torch.no_grad():
        padded.wte.weight[6:] *= 20  # the padding rows would dominate every softmax
    tokens = torch.randint(0, 6, (4, 8), generator=gen())
    assert padded(tokens).shape == (4, 8, 6)
    everything = padded.hidden(tokens) @ padded.wte.weight.T
    assert everything.softmax(-1)[..., 6:].sum(-1).mean().item() > 0.5  # so the cut matters
    truth = everything[..., :6].log_softmax(-1)[:, :-1].gather(-1, tokens[:, 1:, None]).squeeze(-1)
    torch.testing.assert_close(token_logprobs(padded, tokens), truth, rtol=0, atol=1e-11)
    rollout = generate(padded, [[1], [2, 3]] * 50, 10, eos_id=39, temperature=5.0, generator=gen())
    assert int(rollout.tokens[:, 2:12].max()) < 40 and not rollout.ended.any()
    assert all(max(c) < 6 for c in rollout.completions())


# ------------------------------------------------------------------------------------------------ masked statistics


def test_masked_mean_by_hand():
    """Divides by the number of masked-in entries, whatever stands elsewhere: not
    even inf or nan leaks (traps 8, 9, 21)."""
    x = torch.tensor([[1.0, 2.0, math.inf], [4.0, math.nan, -math.inf]], dtype=torch.float64)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    for m in (mask, mask.bool(), mask.float()):
        assert float(masked_mean(x, m)) == pytest.approx(7 / 3, abs=1e-12)
    gradient = gradient_of(lambda x: masked_mean(x, mask), x)
    torch.testing.assert_close(gradient, mask.double() / 3, rtol=0, atol=1e-12)
    assert float(masked_mean(x, torch.zeros(2, 3))) == 0.0


def test_whiten_published_vector():
    """The test vector of "The N implementation details of RLHF with PPO"."""
    x = torch.tensor([[1.2, 1.3, 1.4], [1.5, 1.6, 1.7], [1.8, 1.9, 2.0]])
    truth = torch.tensor([[0.0508, 0.4381, 0.8254], [1.2127, 1.6, 1.9873], [2.3746, 2.7619, 3.1492]])
    torch.testing.assert_close(whiten(x, torch.ones(3, 3), shift_mean=False), truth, rtol=0, atol=5.1e-5)
    torch.testing.assert_close(whiten(x, torch.ones(3, 3)), truth - 1.6, rtol=0, atol=5.1e-5)


@pytest.mark.parametrize("shift_mean", [True, False])
def test_whiten_under_a_mask(shift_mean):
    """Statistics of the masked-in entries alone, biased variance, 0 elsewhere (traps 24, 44: not by signed sums)."""
    x = 3 * torch.randn(6, 9, generator=gen(), dtype=torch.float64) + 2
    mask = random_mask((6, 9), seed=3)
    inside = x[mask]
    truth = (inside - inside.mean()) / inside.std(unbiased=False) + (0 if shift_mean else inside.mean())
    ours = whiten(x, mask, shift_mean)
    torch.testing.assert_close(ours[mask], truth, rtol=0, atol=1e-7)
    assert (ours[~mask] == 0).all()
    for poison in (float("inf"), float("nan"), 1e30):
        assert torch.equal(whiten(x.masked_fill(~mask, poison), mask, shift_mean), ours)


def test_whiten_of_equal_entries_is_finite():
    """Variance 0: no division by zero."""
    assert torch.equal(whiten(torch.full((2, 3), 4.0), torch.ones(2, 3)), torch.zeros(2, 3))


def test_completion_mask_by_hand():
    """prompt_len .. len-1, from lengths alone: an EOS as last completion token is in it (traps 2, 3, 11)."""
    mask = completion_mask(torch.tensor([1, 3, 2]), torch.tensor([4, 4, 6]), 6)
    assert mask.dtype == torch.bool
    assert mask.int().tolist() == [[0, 1, 1, 1, 0, 0], [0, 0, 0, 1, 0, 0], [0, 0, 1, 1, 1, 1]]


# ------------------------------------------------------------------------------------------------ one token


PROBS = [0.05, 0.5, 0.12, 0.3, 0.03]  # of ids 0..4


def frequencies(n: int = 20_000, temperature: float = 1.0, top_k=None, top_p=None, seed: int = 0) -> torch.Tensor:
    logits = torch.tensor(PROBS).log() * temperature + 3.0  # any shift; divided by T again they are log PROBS
    ids = sample_token(logits.expand(n, -1), torch.rand(n, generator=gen(seed)), temperature, top_k, top_p)
    return torch.bincount(ids, minlength=5).double()


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_sampling_frequencies(temperature):
    """P(id) = softmax(logits / T)[id], by a chi-square bound."""
    statistic, bound = chi_square(frequencies(temperature=temperature), torch.tensor(PROBS).double())
    assert statistic < bound


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [
        (0.3, [1]),
        (0.49, [1]),
        (0.51, [1, 3]),
        (0.79, [1, 3]),
        (0.81, [1, 2, 3]),
        (0.93, [0, 1, 2, 3]),
        (0.99, [0, 1, 2, 3, 4]),
        (1.0, [0, 1, 2, 3, 4]),
    ],
)
def test_top_p_keeps_the_smallest_set(top_p, kept):
    """The fewest most likely ids whose probability reaches top_p, renormalised; never none."""
    probs = torch.zeros(5).double()
    probs[kept] = torch.tensor(PROBS).double()[kept]
    statistic, bound = chi_square(frequencies(top_p=top_p), probs / probs.sum())
    assert statistic < max(bound, 1e-9)


@pytest.mark.parametrize(
    ("top_k", "kept"), [(1, [1]), (2, [1, 3]), (4, [0, 1, 2, 3]), (5, [0, 1, 2, 3, 4]), (99, [0, 1, 2, 3, 4])]
)
def test_top_k_keeps_the_k_most_likely(top_k, kept):
    """Exactly the k most likely ids, renormalised; k beyond the vocabulary keeps all."""
    probs = torch.zeros(5).double()
    probs[kept] = torch.tensor(PROBS).double()[kept]
    statistic, bound = chi_square(frequencies(top_k=top_k), probs / probs.sum())
    assert statistic < max(bound, 1e-9)


@pytest.mark.parametrize(
    ("top_k", "top_p", "kept"), [(1, None, 1), (2, None, 2), (3, None, 3), (None, 0.25, 1), (None, 0.5, 2), (3, 0.5, 2)]
)
def test_of_equal_logits_no_more_stay_than_asked_for(top_k, top_p, kept):
    """Chosen by value, all that equal the last one stay too. Of four equal ones, in two rows at other places."""
    no = -math.inf
    logits = torch.tensor([[no, no, 1.0, 1.0, 1.0, 1.0], [1.0, no, 1.0, 1.0, no, 1.0]]).repeat(300, 1)
    found = sample_token(logits, torch.rand(600, generator=gen()), 1.0, top_k, top_p).view(300, 2)
    for column, best in zip(found.mT.tolist(), ({2, 3, 4, 5}, {0, 2, 3, 5}), strict=True):
        counts = Counter(column)
        assert len(counts) == kept and set(counts) <= best
        assert all(abs(n - 300 / kept) < 5 * math.sqrt(300 / kept) for n in counts.values())


def test_top_p_acts_on_what_top_k_left():
    """k = 2 leaves 0.5 and 0.3, renormalised 0.625 and 0.375: p = 0.6 then keeps
    one id (of all five it would keep two)."""
    assert frequencies(top_k=2, top_p=0.6).nonzero().flatten().tolist() == [1]
    assert frequencies(top_p=0.6).nonzero().flatten().tolist() == [1, 3]


def test_top_p_works_row_by_row():
    """Each row has its own set, whatever the order of its ids."""
    logits = torch.tensor([[0.6, 0.3, 0.1], [0.1, 0.3, 0.6], [0.34, 0.33, 0.33]]).log().repeat(500, 1)
    ids = sample_token(logits, torch.rand(1500, generator=gen()), top_p=0.7).view(500, 3)
    assert [sorted(set(ids[:, i].tolist())) for i in range(3)] == [[0, 1], [1, 2], [0, 1, 2]]


def test_temperature_zero_and_top_k_one_are_greedy():
    """Both take the most likely id."""
    logits, uniforms = torch.randn(200, 50, generator=gen()), torch.rand(200, generator=gen(1))
    assert torch.equal(sample_token(logits, uniforms, 0), logits.argmax(-1))
    assert torch.equal(sample_token(logits, uniforms, 1.3, 1), logits.argmax(-1))


@pytest.mark.parametrize("temperature", [1.0, 0.6, 3.0])
def test_a_token_is_where_the_summed_probability_passes_the_number(temperature):
    """Each row by its own number: the first token at which the cumulative probability exceeds it, against adding up in
    a loop; logits that are huge, and a vocabulary of a single token, too."""
    for V, scale, shift in ((23, 2.0, 0.0), (300, 1.0, -100.0), (2, 5.0, 1e4), (1, 1.0, 0.0)):
        logits = randn(400, V, seed=V, scale=scale) + shift
        uniforms = torch.rand(400, generator=gen(V), dtype=torch.float64)
        found = sample_token(logits, uniforms, temperature).tolist()
        rows = zip(logits.tolist(), uniforms.tolist(), strict=True)
        assert found == [slow_draw(row, u, temperature) for row, u in rows]


@pytest.mark.parametrize(("top_k", "top_p"), [(7, None), (None, 0.8), (7, 0.8), (1, 0.5), (3, 1e-9)])
def test_what_was_cut_off_leaves_its_probability_to_the_others(top_k, top_p):
    """Numbers that are not scaled by what top-k and top-p left: the last token kept is drawn far too often. Against a
    loop over the sets by their definition, and the frequencies of 400 draws at evenly spaced numbers, which can be off
    by one draw at each boundary and no more."""
    for seed in range(5):
        logits, n = randn(23, seed=seed, scale=2.0), 400
        probs = (logits / 0.9).softmax(-1).tolist()
        kept = sorted(range(23), key=lambda i: -probs[i])[:top_k]
        if top_p is not None:
            total, reached = sum(probs[i] for i in kept), 0
            while sum(probs[i] for i in kept[:reached]) < top_p * total:
                reached += 1
            kept = kept[:reached]
        uniforms = (torch.arange(n, dtype=torch.float64) + 0.5) / n
        found = sample_token(logits.expand(n, -1), uniforms, 0.9, top_k, top_p)
        cut = [x if i in kept else -math.inf for i, x in enumerate(logits.tolist())]
        assert found.tolist() == [slow_draw(cut, u, 0.9) for u in uniforms.tolist()]
        counts = torch.bincount(found, minlength=23).double()
        expected = n * torch.tensor([probs[i] if i in kept else 0.0 for i in range(23)]) / sum(probs[i] for i in kept)
        assert ((counts - expected).abs() <= 1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_numbers_on_a_boundary_and_tokens_of_probability_0(dtype):
    """Four tokens of a quarter each, which softmax and sum give exactly, and tokens of probability 0 before, between
    and behind them, which are never drawn: not by 0, not by a boundary, not by the last number below 1."""
    no = -math.inf
    logits = torch.tensor([no, 0.0, no, 0.0, 0.0, no, no, 0.0, no], dtype=dtype)
    below = torch.nextafter(torch.tensor([0.25, 0.5, 0.75, 1.0], dtype=dtype), torch.zeros(4, dtype=dtype))
    uniforms = torch.cat([torch.tensor([0.0, 0.25, 0.5, 0.75], dtype=dtype), below])
    assert sample_token(logits.expand(8, -1), uniforms).tolist() == [1, 3, 4, 7, 1, 3, 4, 7]
    for V in (2, 23, 1000):  # whatever the sum of the probabilities is rounded to
        rows = randn(500, V, seed=V, scale=3.0).to(dtype)
        rows[random_mask((500, V), seed=V, share=0.5)] = no
        rows[:, 0], rows[:, -1] = no, no
        rows[:, V // 2] = 0.0
        if V == 2:
            rows = torch.tensor([no, 0.0], dtype=dtype).expand(500, 2)
        for uniform in (0.0, 2.0**-149, 0.5, float(below[-1])):
            drawn = sample_token(rows, torch.full((500,), uniform, dtype=dtype))
            assert (rows[torch.arange(500), drawn] > no).all()


# ------------------------------------------------------------------------------------------------ generate


def test_the_cache_keeps_and_adds_slots_of_every_block():
    """Rows that are mixed up, or slots lost, when rows leave, are copied, or slots are added; one block forgotten."""
    cache = KVCache(3, 6, GPTConfig(10, 9, 2, 2, 8), torch.zeros(()))
    assert [tuple(kv.shape) for kv in cache.kv] == [(2, 3, 2, 6, 4)] * 2 and cache.slots == 6
    for kv in cache.kv:
        kv.normal_(generator=gen())
    before = [kv.clone() for kv in cache.kv]
    cache.grow(3)
    for kv, old in zip(cache.kv, before, strict=True):
        assert kv.size(3) == 9 and torch.equal(kv[:, :, :, :6], old) and not kv[:, :, :, 6:].any()
    cache.keep(torch.tensor([True, False, True]))
    cache.keep(torch.tensor([1, 0, 1, 1]))
    for kv, old in zip(cache.kv, before, strict=True):
        assert torch.equal(kv[:, :, :, :6], old[:, [2, 0, 2, 2]])


@POSITIONS
@pytest.mark.parametrize("slots", [10, 13, 20], ids=["grows-by-1", "grows-by-3", "whole-cache"])
def test_prefill_and_decode_one_token_equal_the_full_forward(float64, slots, rope_base):
    """Logits read from filler, a token that doesn't see itself, or sees stale slots behind it; the two functions that
    sampling is made of, on given texts, however many slots there are, and whatever has stood in them."""
    model = make_gpt(seed=20, rope_base=rope_base)
    texts, filler = torch.randint(0, V, (2, 5, 20), generator=gen())
    lens = torch.tensor([1, 5, 9, 3, 8])
    prompts = torch.where(torch.arange(9) < lens[:, None], texts[:, :9], filler[:, :9])
    cache = KVCache(5, slots, model.config, model.wte.weight)
    for kv in cache.kv:
        kv += 7.0
    with torch.no_grad():
        found = [prefill(model, prompts, lens, cache)]
        for step in range(11):
            positions = lens + step
            if int(positions.max()) == cache.slots:
                cache.grow(slots - 9)
            last = texts[torch.arange(5), positions]
            found.append(decode_one_token(model, last, positions, cache))
        for step, logits in enumerate(found):
            for row, n in enumerate((lens + step).tolist()):
                truth = model(texts[row : row + 1, :n])[0, -1]
                torch.testing.assert_close(logits[row], truth, rtol=0, atol=1e-11)


@POSITIONS
def test_cached_sampling_works_under_autocast(rope_base):
    """Products in bfloat16, a cache in the same and logits in float32: no crash over mixed dtypes, products that are
    not in float32 after all, or keys of another token. bfloat16 has 8 bits, and the logits are of order 10."""
    model = make_gpt(seed=20, rope_base=rope_base)
    texts, lens = torch.randint(0, V, (3, 12), generator=gen()), torch.tensor([1, 6, 9])
    products = set()
    for block in model.h:
        block.attn.c_proj.register_forward_hook(lambda _, inputs, __: products.add(inputs[0].dtype))
    with torch.no_grad():
        truth = model(texts)
        assert products == {torch.float32}
        products.clear()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            cache = KVCache(3, 12, model.config, model.wte.weight)
            assert cache.kv[0].dtype == torch.bfloat16  # as keys and values are computed
            found = [prefill(model, texts[:, :9], lens, cache)]
            for step in range(3):
                last = texts[torch.arange(3), lens + step]
                found.append(decode_one_token(model, last, lens + step, cache))
    assert products == {torch.bfloat16}
    for step, logits in enumerate(found):
        expected = truth[torch.arange(3), lens - 1 + step]
        assert logits.dtype == torch.float32
        assert (logits - expected).pow(2).mean() < 0.01 * expected.var()


@POSITIONS
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_generate_and_the_slow_sampler_draw_the_same_tokens(temperature, rope_base):
    """The same numbers, the same draws: with rows that end at very different times (and are left behind by `generate`
    alone) and with rows that never do."""
    never = endless(seed=13, dtype=torch.float64, rope_base=rope_base)
    models = (V, never), (0, restless(seed=13, vocab=5, rope_base=rope_base))
    for eos_id, model in models:
        prompts = random_prompts([1, 5, 17, 2, 9, 3, 1, 4] * 6, 5, seed=4)  # so many that some end, whatever is drawn
        settings = {"eos_id": eos_id, "temperature": temperature}
        cached = generate(model, prompts, 20, generator=gen(2), **settings)
        slow = slow_generate(model, prompts, 20, generator=gen(2), **settings)
        assert rows_of(cached) == rows_of(slow) and torch.equal(cached.tokens, slow.tokens)
        assert bool(cached.ended.any()) is (eos_id == 0)


@pytest.mark.parametrize("new", [1, 15, 16, 17, 32, 33, 48, 49, 64])
def test_a_completion_may_be_as_long_as_the_block_leaves_room(monkeypatch, new):
    """A cache that grows one token too late, one slot too far or not at all: completions that need one more slot than
    there are, and exactly as many, the longest prompt ending at the last position there is."""
    model = endless(seed=24, dtype=torch.float64, block_size=17 + new, n_layer=1)
    widths = [0]

    class Watched(KVCache):
        def grow(self, slots):
            super().grow(slots)
            widths.append(self.slots)

    monkeypatch.setattr(sampling, "KVCache", Watched)
    cached = generate(model, PROMPTS, new, eos_id=V, generator=gen(new))
    slow = slow_generate(model, PROMPTS, new, eos_id=V, generator=gen(new))
    assert rows_of(cached) == rows_of(slow) and torch.equal(cached.tokens, slow.tokens)
    assert max(widths) <= 17 + new


def test_copies_of_a_prompt_are_read_once_and_answered_each(monkeypatch):
    """A group of samples of one prompt, or prompts that are drawn twice: the prompts are read once, every copy goes on
    with the keys of its own prompt, and draws by numbers of its own."""
    model = restless(seed=25, vocab=7)
    rows, _ = slices_of_the_cache(monkeypatch, 2**29)
    long, short, one = random_prompts([9, 3, 1], 7, seed=8)
    for distinct, prompts in (
        (1, [long] * 8),
        (3, [short, long, short, one, long, short, short, one]),
        (3, [one, short, long]),
        (2, [long, short[:1], long]),
        (2, [short, [*short, 0], short]),  # one of them is the beginning of the other
    ):
        for eos_id in (0, 3):
            rows.clear()
            found = generate(model, prompts, 20, eos_id=eos_id, generator=gen(9))
            assert rows == [distinct]
            slow = slow_generate(model, prompts, 20, eos_id=eos_id, generator=gen(9))
            assert rows_of(found) == rows_of(slow) and torch.equal(found.tokens, slow.tokens)
    many = rows_of(generate(model, [long] * 40, 20, eos_id=0, generator=gen()))
    assert len({tuple(ids) for ids, _ in many}) > 20


def test_what_a_row_draws_does_not_depend_on_which_rows_have_left():
    """Numbers handed out to the rows that are left, and not to each its own: for every id as EOS, a row is what it is
    without any EOS, up to there."""
    model = endless(seed=26, dtype=torch.float64)
    prompts = random_prompts([1, 7, 3, 12, 5, 2, 9, 4] * 4, V, seed=10)
    free = rows_of(generate(model, prompts, 30, eos_id=V, generator=gen(11)))
    for eos_id in range(V):
        found = rows_of(generate(model, prompts, 30, eos_id=eos_id, generator=gen(11)))
        expected = [(ids[: ids.index(eos_id) + 1], True) if eos_id in ids else (ids, False) for ids, _ in free]
        assert found == expected


def test_rows_that_have_ended_are_left_behind():
    """Rows that have ended and are computed to the end all the same: sampling takes several times as long. More than
    four of five rows that are computed must be going on."""
    model = restless(seed=14, vocab=9)
    prompts = random_prompts([4, 7, 5, 12, 6] * 12, 9, seed=6)
    widths = []  # rows of every pass: over the prompts, then of one token each
    model.h[0].register_forward_pre_hook(lambda _, inputs: widths.append(len(inputs[0])))
    rollout = generate(model, prompts, 24, eos_id=0, generator=gen(1))
    lens = rollout.lens - rollout.prompt_lens
    going = [int((lens > step).sum()) for step in range(24)]  # rows that step 0, 1, ... has a token for
    assert widths[0] == 60 and len(set(widths)) > 4 and len(widths) == int(lens.max())
    assert all(0.8 * width < n <= width for n, width in zip(going, widths, strict=False))


def test_a_model_whose_next_token_is_known():
    """next = last + 1 mod 12: rows stop by themselves at EOS = 9, a row that doesn't reach it
    is cut, the filler behind a row is no token of it."""
    model = successor()
    prompts = [[7], [3, 8], [1, 2, 3], [10, 0, 11], [5, 6, 7, 8], [11]]
    rollout = generate(model, prompts, 6, eos_id=9, temperature=0)
    cut = [0, 1, 2, 3, 4, 5], False
    assert rows_of(rollout) == [([8, 9], True), ([9], True), ([4, 5, 6, 7, 8, 9], True), cut, ([9], True), cut]
    assert rollout.lens.tolist() == [3, 3, 9, 9, 5, 7] and rollout.prompt_lens.tolist() == [1, 2, 3, 3, 4, 1]
    assert rollout.tokens.shape == (6, 9)  # as wide as the longest row, no wider
    for i, n in enumerate(rollout.lens.tolist()):
        assert (rollout.tokens[i, n:] == 9).all()
    assert rollout.completions() == [[8], [], [4, 5, 6, 7, 8], [0, 1, 2, 3, 4, 5], [], [0, 1, 2, 3, 4, 5]]
    # EOS is an action like any other; the filler, which is the same id, is none (traps 2, 3, 11)
    assert rollout.action_mask.sum(1).tolist() == [2, 1, 6, 6, 1, 6]
    for i, n in enumerate(rollout.lens.tolist()):
        assert rollout.action_mask[i, n - 2] and not rollout.action_mask[i, n - 1 :].any()


def test_eos_in_the_prompt_ends_nothing():
    """Only the completion is looked at for EOS, and an id next to the last slot counts as any other (need R23)."""
    rollout = generate(successor(), [[9, 1], [9], [9, 9, 9], [8, 9]], 3, eos_id=9, temperature=0)
    assert rows_of(rollout) == [([2, 3, 4], False), ([10, 11, 0], False), ([10, 11, 0], False), ([10, 11, 0], False)]
    # EOS as the very last token that fits
    rollout = generate(successor(), [[9, 6]], 3, eos_id=9, temperature=0)
    assert rows_of(rollout) == [([7, 8, 9], True)]


def slices_of_the_cache(monkeypatch, numbers: int) -> tuple[list[int], list[int]]:
    """Let `generate` hold this many keys and values -> (rows of each pass over prompts, numbers held whenever a cache
    is new or has another size), filled while it works."""
    rows, held, peaks = [], {}, []

    class Counted(KVCache):
        def count(self):
            held[id(self)] = sum(kv.numel() for kv in self.kv)
            peaks.append(sum(held.values()))

        def __init__(self, *args):
            super().__init__(*args)
            self.count()
            weakref.finalize(self, held.pop, id(self))

        def keep(self, rows):
            super().keep(rows)
            self.count()

        def grow(self, slots):
            super().grow(slots)
            self.count()

    def spy(model, tokens, *args):
        rows.append(len(tokens))
        return prefill(model, tokens, *args)

    monkeypatch.setattr(sampling, "CACHE_NUMBERS", numbers)
    monkeypatch.setattr(sampling, "KVCache", Counted)
    monkeypatch.setattr(sampling, "prefill", spy)
    return rows, peaks


@pytest.mark.parametrize(("at_a_time", "n_kv_head"), [(1, 4), (3, 4), (6, 4), (7, 4), (3, 1)])
def test_rows_in_slices_are_the_rows_at_once_and_bound_the_cache(monkeypatch, at_a_time, n_kv_head):
    """192 rows of GPT-2 need 14 GB of keys and values: rows go in slices, none lost, swapped or widened, and each
    slice's memory is given back before the next. What fits is not cut, and where heads share keys and values more
    fits."""
    model = make_gpt(seed=5, vocab=10, real_vocab=9, dtype=torch.float64, n_kv_head=n_kv_head)  # 9 is never sampled
    prompts = random_prompts([1, 7, 3, 12, 5, 2, 9], 9, seed=6)
    a_row = 2 * 2 * 8 * n_kv_head * (12 + 36)  # keys and values, layers, channels, slots of the longest
    whole = [generate(model, prompts, 36, eos_id=eos, temperature=0) for eos in range(10)]
    assert len({tuple(c) for c, _ in rows_of(whole[9])}) == 7  # no two alike
    assert len({r.tokens.size(1) for r in whole}) > 1 and any(r.ended.any() for r in whole)
    rows, peaks = slices_of_the_cache(monkeypatch, at_a_time * a_row + a_row // 2)
    for eos, expected in enumerate(whole):
        rows.clear()
        found = generate(model, prompts, 36, eos_id=eos, temperature=0)
        assert rows == [at_a_time] * (7 // at_a_time) + [7 % at_a_time] * (7 % at_a_time > 0)
        assert rows_of(found) == rows_of(expected) and torch.equal(found.tokens, expected.tokens)
        assert found.prompt_lens.tolist() == [1, 7, 3, 12, 5, 2, 9]
    assert max(peaks) <= at_a_time * a_row


def test_one_row_goes_whatever_the_cache_may_hold(monkeypatch):
    """No slice of 0 rows: a single row that is too large is the user's business."""
    model = endless(seed=12, dtype=torch.float64)
    expected = generate(model, PROMPTS, 5, eos_id=V, temperature=0)
    rows, _ = slices_of_the_cache(monkeypatch, 1)
    assert torch.equal(generate(model, PROMPTS, 5, eos_id=V, temperature=0).tokens, expected.tokens)
    assert rows == [1, 1, 1]


def test_slices_sample_as_the_whole_does(monkeypatch):
    """A setting that doesn't reach the slices, or slices that all draw the same noise."""
    model, state = endless(seed=17, dtype=torch.float64), torch.get_rng_state()
    greedy = generate(model, PROMPTS, 12, eos_id=V, temperature=0, generator=gen()).tokens
    slices_of_the_cache(monkeypatch, 1)
    for one in ({"top_k": 1}, {"top_p": 1e-9}):
        assert torch.equal(generate(model, PROMPTS, 12, eos_id=V, generator=gen(), **one).tokens, greedy)
    a, b, c = (generate(model, [[1, 2]] * 6, 12, eos_id=V, generator=gen(seed)) for seed in (1, 1, 2))
    assert torch.equal(a.tokens, b.tokens) and not torch.equal(a.tokens, c.tokens)
    assert len({tuple(ids) for ids, _ in rows_of(a)}) == 6
    assert torch.equal(torch.get_rng_state(), state)
    rows, peaks = slices_of_the_cache(monkeypatch, 2 * 2 * 32 * 14 * 4)  # four rows of 14 slots
    generate(model, [[1, 2]] * 10, 12, eos_id=V, generator=gen())
    assert rows == [1, 1, 1] and max(peaks) == 2 * 2 * 32 * 14 * 4  # a prompt is read once in each slice


def test_the_first_sampled_token_honours_top_k_and_top_p():
    """Anchors trap 45: the token that the prefill gives is drawn like all others."""
    model = endless(seed=15, dtype=torch.float64)
    logits = model(torch.tensor([[4, 2]]))[0, -1]
    best = logits.topk(3).indices.tolist()
    for kwargs, allowed in (({"top_k": 1}, best[:1]), ({"top_k": 3}, best), ({"top_p": 1e-6}, best[:1])):
        rollout = generate(model, [[4, 2]] * 300, 2, eos_id=V, temperature=3.0, generator=gen(), **kwargs)
        assert set(rollout.tokens[:, 2].tolist()) == set(allowed)
    greedy = generate(model, PROMPTS, 12, eos_id=V, temperature=0)
    sampled = generate(model, PROMPTS, 12, eos_id=V, top_k=1, generator=gen())
    assert torch.equal(sampled.tokens, greedy.tokens)


def test_whole_completions_have_the_right_probability():
    """4,000 sampled completions of a GPT with 4 tokens, EOS and cut ones among them: the frequency of every possible
    completion against the product of its token probabilities, enumerated. Sampler, cache, shrinking batch and
    token_logprobs agree on one distribution (need R6)."""
    model, T, eos_id = make_gpt(seed=16, vocab=4, block_size=8, dtype=torch.float64), 1.5, 0
    for prompt in ([2], [1, 3, 3]):
        probs = {}
        for completion in product(range(4), repeat=3):
            end = completion.index(eos_id) + 1 if eos_id in completion else 3
            kept = completion[:end]
            with torch.no_grad():
                lp = token_logprobs(model, torch.tensor([[*prompt, *kept]]), T)[0, len(prompt) - 1 :]
            probs[kept] = float(lp.sum().exp())
        assert abs(sum(probs.values()) - 1) < 1e-11  # of 40 completions: they are all there are
        other = [1, 2, 3, 2] if len(prompt) == 1 else [3]  # batch mates of another length
        rollout = generate(model, [prompt, other] * 4000, 3, eos_id=eos_id, temperature=T, generator=gen(len(prompt)))
        found = [tuple(c) for c, _ in rows_of(rollout)[::2]]
        names = [c for c in probs if 4000 * probs[c] > 5]
        counts = torch.tensor([found.count(c) for c in names] + [sum(c not in names for c in found)]).double()
        shares = torch.tensor([probs[c] for c in names]).double()
        shares = torch.cat([shares, 1 - shares.sum(0, keepdim=True)])
        if float(shares[-1]) * 4000 <= 5:
            counts, shares = counts[:-1], shares[:-1] / shares[:-1].sum()
        statistic, bound = chi_square(counts, shares)
        assert len(names) > 15 and statistic < bound


@pytest.mark.parametrize("slices", [1, 3])
def test_temperature_reaches_every_token(monkeypatch, slices):
    """A bigram model's second token, at T = 0.5, has softmax(logits / 0.5): not only the first one is scaled, and not
    only where all rows fit the cache."""
    model, table = bigram(6)
    torch.testing.assert_close(model(torch.tensor([[4, 2, 5]]))[0], table[[4, 2, 5]], rtol=0, atol=1e-12)
    rows, _ = slices_of_the_cache(monkeypatch, 6000 // slices * 2 * 2 * 32 * 3)
    rollout = generate(model, [[0]] * 6000, 2, eos_id=6, temperature=0.5, generator=gen())
    assert len(rows) == slices
    second = (table[0] / 0.5).softmax(0) @ (table / 0.5).softmax(-1)
    statistic, bound = chi_square(torch.bincount(rollout.tokens[:, 2], minlength=6).double(), second)
    assert statistic < bound


@pytest.mark.parametrize("generator", [None, gen(5)], ids=["global", "own"])
def test_at_temperature_0_nothing_is_drawn(generator):
    """A script that shows its greedy answers in between would go on with other random numbers than one that doesn't;
    and no draw could change what the most likely token is."""
    model = endless(seed=17)
    states = [torch.get_rng_state(), (generator or gen()).get_state()]
    found = generate(model, PROMPTS, 15, eos_id=V, temperature=0, generator=generator)
    after = [torch.get_rng_state(), (generator or gen()).get_state()]
    assert all(torch.equal(a, b) for a, b in zip(states, after, strict=True))
    assert rows_of(found) == [greedy_alone(model, p, 15, V) for p in PROMPTS]


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_nan_logits_are_refused(temperature):
    """A model that has blown up gave an index error deep inside, or a text of one and the same token. One row whose
    logits are nan is enough; the mode is given back."""
    model = endless(seed=17).train()
    generate(model, [[1], [V, 2]], 3, eos_id=V, temperature=temperature, generator=gen())
    with torch.no_grad():
        model.wte.weight[V] = math.nan  # the id that no logit belongs to: the other row is fine
    generate(model, [[1], [2]], 3, eos_id=V, temperature=temperature, generator=gen())
    with pytest.raises(ValueError, match="nan"):
        generate(model, [[1], [V, 2]], 3, eos_id=V, temperature=temperature, generator=gen())
    assert model.training


def test_generate_refuses_what_it_can_t_do():
    """Empty prompts, no room, senseless settings: a message, not a crash deep inside (or a silently cut prompt)."""
    model = endless(block_size=10)
    for prompts in ([], [[]], [[1], []]):
        with pytest.raises(ValueError, match="prompt"):
            generate(model, prompts, 3, eos_id=0)
    generate(model, [[1] * 7], 3, eos_id=V)  # just fits
    with pytest.raises(ValueError, match="block_size"):
        generate(model, [[1] * 8], 3, eos_id=V)
    for bad in ({"max_new_tokens": 0}, {"temperature": -1.0}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.1}):
        with pytest.raises(ValueError):
            generate(model, [[1]], **{"max_new_tokens": 3, "eos_id": 0, **bad})


def test_generate_records_no_graph():
    """Sampling keeps no activations for a backward pass."""
    model = endless()
    rollout = generate(model, [[1, 2]], 4, eos_id=V, generator=gen())
    assert not rollout.tokens.requires_grad and torch.is_grad_enabled()
    assert all(p.grad is None for p in model.parameters())


def test_compiled_blocks_keep_values_and_names():
    """`block.compile()` as the scripts call it (here without a code generator): same logits, same cached sampling, and
    the names of the checkpoint don't change, so a compiled run's checkpoint loads everywhere."""
    plain, compiled = (endless(seed=18, dtype=torch.float64) for _ in range(2))
    for block in compiled.h:
        block.compile(backend="eager")
    tokens = torch.randint(0, V, (2, 9), generator=gen())
    torch.testing.assert_close(compiled(tokens), plain(tokens), rtol=0, atol=1e-11)
    assert list(compiled.state_dict()) == list(plain.state_dict())
    a, b = (generate(m, PROMPTS, 6, eos_id=V, temperature=0).tokens for m in (compiled, plain))
    assert torch.equal(a, b)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_generate_on_a_gpu_equals_the_cpu():
    """The GPU takes its own branches (constant cache span, rows looked at every 8th step,
    none left behind): same greedy tokens."""
    cpu, gpu = endless(seed=14, dtype=torch.float64), endless(seed=14, dtype=torch.float64).cuda()
    prompts = random_prompts([1, 7, 3, 12, 5, 2, 9, 4], V, seed=6)
    for eos_id in range(V + 1):
        a, b = (generate(m, prompts, 21, eos_id=eos_id, temperature=0) for m in (cpu, gpu))
        assert rows_of(a) == rows_of(b) and a.tokens.tolist() == b.tokens.tolist()


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("rope_base", [0.0, 100.0])
def test_recomputed_blocks_give_the_same_gradients_and_keep_less(float64, rope_base, dropout):
    """--recompute: what lies inside a block is not kept for the backward pass but computed again, with the same
    dropout. The loss and every gradient are the same, bit for bit, and a fraction of the numbers is kept."""
    model = ScalarModel.from_gpt(make_gpt(seed=4, n_layer=4, rope_base=rope_base, dropout=dropout), expectation=True)
    tokens = torch.randint(0, V, (3, 20), generator=gen())
    mask = completion_mask(torch.tensor([2, 5, 9]), torch.tensor([20, 11, 15]), 20)
    found = []
    for recompute in (False, True):
        for module in model.modules():
            if isinstance(module, Block):
                module.recompute = recompute
        kept = {}
        torch.manual_seed(1)
        model.train()
        model.zero_grad()

        def keep(x: torch.Tensor, kept: dict = kept) -> torch.Tensor:
            kept[x.data_ptr()] = x
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            out = model(tokens, mask)
        out.square().sum().backward()
        own = {p.data_ptr() for p in model.parameters()}
        numbers = sum(x.numel() for key, x in kept.items() if key not in own)
        found.append((out.detach(), [p.grad.clone() for p in model.parameters()], numbers))
    (out, grads, all_kept), (again, regrads, few) = found
    assert torch.equal(out, again) and all(torch.equal(a, b) for a, b in zip(grads, regrads, strict=True))
    assert few < 0.3 * all_kept
