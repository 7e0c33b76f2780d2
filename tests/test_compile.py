"""--compile: what torch.compile makes of the blocks is the same network, and the number of its graphs doesn't depend on
how many different lengths occur."""

from __future__ import annotations

import copy
import functools
import random

import pytest
import torch
import torch._dynamo
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

import frozen
import lib.train
import dpo
import ppo
import reward_model
import sft
from model import Block
from data.batches import Example, RankedExamples, make_batch, ranked_batch
from helpers import EOS, make_gpt, make_scalar, randn, random_prompts, rng
from frame import completion_mask
from model import GPT, ScalarModel
from sampling import generate

V = 23


@pytest.fixture
def compiler(monkeypatch):
    """compiler(backend, *models): compile_blocks with another backend, "eager" unless named, that counts its graphs in
    .frame_count. A block that would be compiled more often than the limit allows is an error."""
    torch._dynamo.reset()
    counters.clear()

    def compile_with(backend: str, *models):
        counter = CompileCounterWithBackend(backend)
        compiled = functools.partial(torch.nn.Module.compile, backend=counter)
        monkeypatch.setattr(Block, "compile", lambda self, **options: compiled(self, **options))
        lib.train.compile_blocks(*models)
        return counter

    limit = torch._dynamo.config.recompile_limit
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True, recompile_limit=limit):
        yield compile_with
    torch._dynamo.reset()


def no_graph_breaks() -> bool:
    return not counters["graph_break"] and not counters["unimplemented"]


def texts(n: int, choose: random.Random, low: int = 2) -> list[Example]:
    """Examples of all kinds of lengths."""
    lengths = [(choose.randint(low, 10), choose.randint(low, 15)) for _ in range(n)]
    return [Example(*random_prompts([p, c], V, seed=choose.randrange(10**6))) for p, c in lengths]


def sft_step(model: GPT, examples: list[Example]) -> None:
    tokens, prompt_lens, lens = make_batch(examples, torch.device("cpu"))
    mask = completion_mask(prompt_lens, lens, tokens.size(1))
    sft.sft_loss(model(tokens, mask[:, 1:]), tokens, mask).backward()


def pairs(examples: list[Example]) -> list[RankedExamples]:
    """Every two of them as answers to the prompt of the first."""
    two = zip(examples[::2], examples[1::2], strict=True)
    return [RankedExamples([a, Example(a.prompt, b.completion)], [0, 1]) for a, b in two]


def reward_step(model: ScalarModel, examples: list[Example]) -> None:
    batch = ranked_batch(pairs(examples), torch.device("cpu"))
    reward_model.ranking_loss(model(batch.tokens, batch.ends, batch.positions), batch.ranks).backward()


def dpo_step(model: GPT, examples: list[Example]) -> None:
    dpo.pair_losses(model, model, pairs(examples), dpo.Config())[0].mean().backward()


# ------------------------------------------------------------------------------------------------ number of graphs

# Where two sizes happen to be equal at first (rows and tokens, say), torch takes them for one, and compiles once more
# when they differ. So there may be up to twice as many graphs as kinds, but no more, however many lengths follow.


@pytest.mark.slow
@pytest.mark.parametrize("rope_base", [0.0, 100.0])
def test_six_kinds_of_graph_serve_training_steps_of_any_length(compiler, rope_base):
    """One for the blocks, one for the last, which goes on at the predicting positions alone; both again where
    completions share a prompt; and these once more without gradients, for DPO's reference. A graph for every length, or
    for every block."""
    policy, choose = make_gpt(n_layer=4, rope_base=rope_base), random.Random(1)
    scorer = ScalarModel.from_gpt(policy, expectation=True).eval()
    counter, counts = compiler("eager", policy, scorer), []
    for _ in range(12):
        examples = texts(2 * choose.randint(3, 6), choose)
        sft_step(policy, examples)
        dpo_step(policy, examples)
        reward_step(scorer, examples)
        counts.append(counter.frame_count)
    assert 6 <= counts[-1] == counts[3] <= 12
    assert no_graph_breaks()


@pytest.mark.slow
def test_an_iteration_of_ppo_has_nine_kinds_and_the_next_ones_are_compiled_already(compiler):
    """Two each (the last block is another) for prompts, measured policy and value model, measured reference (frozen)
    and update; one for the decode step, however many rows and slots. At torch's own limit, 8, the update would go on
    uncompiled."""
    policy, value_model = make_gpt(3), make_scalar(4)
    reference = copy.deepcopy(policy).requires_grad_(False)
    counter, choose = compiler("eager", policy, reference, value_model), random.Random(2)
    counts = []
    for _ in range(4):
        config = ppo.Config(minibatch=6, micro_batch=3, ppo_epochs=2, stop_kl=0.0)
        prompts = random_prompts([choose.randint(2, 9) for _ in range(12)], V, seed=choose.randrange(10**6))
        rollout = generate(policy, prompts, 12, eos_id=EOS, generator=rng(choose.randrange(10**6)))
        told = (rollout, randn(12).float(), 0.1, config)
        experience = ppo.make_experience(policy, reference, value_model, *told)
        optimizer = ppo.make_optimizer(policy, value_model, config)
        stats = ppo.update(policy, value_model, optimizer, experience, config, rng(5))
        assert stats["first_ratio"] < 1.0001
        counts.append(counter.frame_count)
    assert 9 <= counts[-1] == counts[1] <= 18
    assert no_graph_breaks()


def test_sizes_of_one_add_a_bounded_number_of_graphs(compiler):
    """A batch of one row, a text of one token, one predicting position: torch takes a size of 1 for another case than
    all others. They may not come without end, nor come near the limit."""
    policy, choose = make_gpt(3, n_layer=1), random.Random(3)
    counter = compiler("eager", policy)
    sizes = [(B, prompt, completion) for B in (1, 2, 3) for prompt in (1, 2, 4) for completion in (1, 2, 3)]
    counts = []
    for B, prompt, completion in sizes + choose.sample(sizes, 12):
        sft_step(policy, [Example([1] * prompt, [2] * completion)] * B)
        generate(policy, [[n, *[2] * prompt] for n in range(B)], completion, eos_id=V)
        counts.append(counter.frame_count)
    assert counts[-1] == counts[len(sizes)] <= 16 < torch._dynamo.config.recompile_limit / 2
    assert no_graph_breaks()


def test_frozen_blocks_are_compiled_too(compiler):
    """--train_layers 1: the blocks below have no gradients, the last has."""
    policy, choose = make_gpt(3, n_layer=3), random.Random(4)
    frozen.choose_trainable(policy, dpo.Config(train_layers=1))
    counter = compiler("eager", policy)
    for _ in range(6):
        sft_step(policy, texts(3, choose))
    assert 2 <= counter.frame_count <= 4 and no_graph_breaks()


# ------------------------------------------------------------------------------------------------ the same network


@pytest.mark.slow
def test_compiled_training_has_the_same_gradients(compiler, float64):
    """Rotary positions are written in two ways, one of them for torch.compile alone. All but the last step of
    compilation: writing C++ (backend "inductor") and compiling it would take 20 seconds."""
    plain, choose = make_gpt(9, rope_base=100.0), random.Random(9)
    compiled = copy.deepcopy(plain)
    compiler("aot_eager", compiled)
    for _ in range(3):
        examples = texts(7, choose)
        sft_step(plain, examples)
        sft_step(compiled, examples)
    assert no_graph_breaks()
    for (name, p), q in zip(compiled.named_parameters(), plain.parameters(), strict=True):
        assert (p.grad - q.grad).abs().max() <= 1e-10 * q.grad.abs().max(), name


def test_compiled_generate_writes_the_same_texts(compiler, float64):
    """Rows of unequal length that end at different steps, a cache that grows: the same draws give the same tokens."""
    plain = make_gpt(8, rope_base=100.0)
    compiled = copy.deepcopy(plain)
    compiler("eager", compiled)
    prompts = random_prompts([3, 7, 1, 12, 5, 2, 6], V, seed=8)
    a, b = (generate(m, prompts, 30, eos_id=EOS, generator=rng(8)) for m in (plain, compiled))
    assert torch.equal(a.tokens, b.tokens) and torch.equal(a.lens, b.lens) and a.ended.any()
    assert no_graph_breaks()
