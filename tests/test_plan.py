"""tools/plan.py: what it computes without numbers is what happens with them."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from frozen import choose_trainable
from lib.cli import UserError
from model import GPT, GPTConfig, ScalarModel
from tools import bench, plan

LLAMA = {"norm": "rms", "n_kv_head": 1, "mlp": "swiglu", "n_inner": 24, "bias": "none", "rope_base": 100.0}
KINDS = [GPTConfig(40, 64, 3, 2, 16), GPTConfig(40, 64, 3, 2, 16, **LLAMA)]
SMALL = plan.Config(prompt=6, completion=5, micro_batch=3, rollouts=8, dtype="float32")


def really_kept(c: GPTConfig, config: plan.Config, scalar: bool) -> int:
    """Bytes that autograd keeps of a real forward pass, and the gradient of the logits."""
    model = ScalarModel(c) if scalar else GPT(c)
    choose_trainable(model, config)
    weights, kept, alive = {p.data_ptr() for p in model.parameters()}, {}, []

    def pack(x):
        alive.append(x)  # so that no two of them are given the same memory
        if x.untyped_storage().data_ptr() not in weights:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    tokens = torch.randint(40, (3, 11))
    where = torch.arange(33).view(3, 11)[:, 5:10].reshape(-1)  # before each token of a completion
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = model(tokens, where)
        loss = out.sum() if scalar else F.cross_entropy(out, torch.randint(40, (15,)))
    assert loss.requires_grad
    return sum(kept.values()) + (0 if scalar else 4 * out.numel())


@pytest.mark.parametrize("train_layers", [0, 1])
@pytest.mark.parametrize("scalar", [False, True])
@pytest.mark.parametrize("c", KINDS)
def test_what_is_kept_without_numbers_is_kept_with_them(c, scalar, train_layers):
    """Memory that is counted twice, or a network other than the one that is trained. (A few bytes are indices.)"""
    config = replace(SMALL, train_layers=train_layers)
    found = plan.one_pass(c, scalar, False, config).kept
    assert found == pytest.approx(really_kept(c, config, scalar), abs=600)


@pytest.mark.parametrize("c", KINDS)
def test_less_is_kept_where_less_is_trained_or_it_is_computed_again(c):
    whole = plan.one_pass(c, False, False, SMALL)
    one = plan.one_pass(c, False, False, replace(SMALL, train_layers=1))
    again = plan.one_pass(c, False, False, replace(SMALL, recompute=True))
    assert one.kept < 0.6 * whole.kept and again.kept < 0.7 * whole.kept
    assert one.both_flops < whole.both_flops < again.both_flops
    assert one.flops == whole.flops == again.flops


@pytest.mark.parametrize("c", KINDS)
def test_operations_are_those_that_bench_counts(c):
    """Its formula; backward twice of forward. (Attention's own products are in neither: torch's counter doesn't know
    the CPU's fused kernel.)"""
    found = plan.one_pass(c, False, False, SMALL)
    products = bench.needed_flops("sft", [(6, 5)] * 3, c)
    assert found.both_flops == products == 3 * found.flops
    assert found.calls < found.both_calls / 2


@pytest.mark.parametrize("c", KINDS)
def test_pairs_are_read_as_bench_counts_them(c):
    """A row of a pair has both completions, and a reward model reads one score of each; a pass in the place of another
    stage's gives a speed and a memory that look right."""
    p, texts = plan.all_passes(c, SMALL), [(6, 5)] * 6  # three pairs
    assert p.pairs.both_flops + p.pairs.flops == bench.needed_flops("dpo", texts, c)
    assert p.scored_pairs.both_flops == bench.needed_flops("reward_model", texts, c)
    assert p.policy == plan.one_pass(c, False, False, SMALL) and p.value == plan.one_pass(c, True, False, SMALL)
    assert p.pairs.kept > 1.3 * p.policy.kept and p.value.flops < p.policy.flops


def test_calls_are_counted_without_looks():
    """A view starts nothing on a GPU, nor does memory that is taken, nor a question about types. What is computed in
    place, or written into memory that is there, does."""
    with plan.Calls() as calls:
        x = torch.ones(3, 4)
        y = x.view(12).unsqueeze(0).detach() * 2
        torch.ops.aten._unsafe_view(y, [3, 4]).t().expand(2, 4, 3)
        torch.promote_types(y.dtype, torch.float32)
        torch.empty(3), torch.empty_like(x), x.new_empty(2)
    assert calls.n == 2 and y.shape == (1, 12)
    with plan.Calls() as calls:
        x.add_(1)
        x.view(12)[:3].zero_()
        x[0].max(0)  # one operation, two results
        torch.zeros(2)
    assert calls.n == 4


def test_a_product_of_a_batch_is_one_call():
    """(B, T, C) times a matrix is a view, a product and an _unsafe_view: one thing that a GPU does."""
    with torch._subclasses.FakeTensorMode(), plan.Calls() as calls:
        F.linear(torch.ones(2, 3, 4), torch.ones(5, 4))
    assert calls.n == 3  # two tensors of ones, and it


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_memory_is_what_a_measured_run_takes(stage):
    """The stage itself, in a process of its own, on this machine: the networks' copies, Adam, activations and what
    comes and goes."""
    c, lengths = GPTConfig(4096, 128, 4, 6, 384), {"completion_low": 64, "completion_high": 64, "new_tokens": 64}
    measuring = bench.Config(batch_size=32, micro_batch=8, prompt=64, device="cpu", **lengths)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:
        measured = fresh.submit(bench.peak_memory, c, measuring, stage).result()
    if measured != measured:
        pytest.skip("this system doesn't say what a process takes")
    config = plan.Config(prompt=64, completion=64, micro_batch=8, rollouts=32, dtype="float32")
    computed = plan.memory(c, plan.all_passes(c, config), stage, config) / 2**20
    assert 0.7 < computed / measured < 1.4


def test_memory_by_hand():
    """16 bytes a weight that learns, 4 one that doesn't; what is frozen is in memory once, but for reward_model.py's
    policy."""
    c, config = KINDS[0], replace(SMALL, train_layers=1)
    p = plan.all_passes(c, config)
    network = GPT(c)
    own = sum(x.numel() for x in [*network.h[-1].parameters(), *network.ln_f.parameters()])
    assert (p.trained, p.weights) == (own, sum(x.numel() for x in network.parameters()))
    rest, cache = p.weights - own, 4 * 8 * 2 * 3 * 16 * 11
    assert plan.cache_bytes(c, config) == cache
    static = {"sft": 16 * own + 4 * rest, "dpo": 20 * own + 4 * rest, "generate": 4 * p.weights}
    static |= {"reward_model": 20 * own + 8 * rest, "ppo": 40 * own + 4 * rest}
    moving = {"sft": p.policy.kept, "dpo": p.pairs.kept, "generate": cache}
    moving |= {"reward_model": max(cache, p.scored_pairs.kept), "ppo": max(cache, p.policy.kept + p.value.kept)}
    for stage in plan.STAGES:
        assert plan.memory(c, p, stage, config) == 1.25 * (static[stage] + moving[stage])


def test_speed_by_hand():
    """Epochs, the cache's bytes, the share of tokens that are sampled, or a network that only reads, left out: a speed
    of the right order and wrong. On a GPU of 4e13 useful operations and 6e11 useful bytes a second."""
    c, gpu = KINDS[0], plan.GPU(24, 100.0, 1000.0)
    config = plan.Config(prompt=6, completion=5, micro_batch=3, rollouts=8, ppo_epochs=3, dtype="bfloat16")
    policy, value = plan.Pass(0, int(4e12), int(12e12), 0, 0), plan.Pass(0, int(8e12), int(24e12), 0, 0)
    pairs, scored = plan.Pass(0, int(16e12), int(48e12), 0, 0), plan.Pass(0, int(20e12), int(60e12), 0, 0)
    p = plan.Passes(policy, value, pairs, scored, 500, 1000)
    cache = 2 * (8 * 11 * 2 * 3 * 16)  # bytes: rollouts of 11 tokens, keys and values of 3 blocks of 16 channels
    sampling = (2 * 1000 + 0.75 * cache) / 6e11 / 8
    expected = {
        "sft": 0.3 / 33,
        "reward_model": 1.5 / 66,
        "dpo": (0.4 + 1.2) / 66,  # the reference reads, the policy learns
        # two policies and two scalar models read; policy and value model learn three times
        "ppo": 5 / 11 * sampling + (2 * 0.1 + 2 * 0.2 + 3 * (0.3 + 0.6)) / 33,
        "generate": sampling,
    }
    for stage, seconds in expected.items():
        assert plan.seconds_a_token(c, p, stage, config, gpu) == pytest.approx(seconds, rel=1e-9), stage
    # PPO without the passes is its sampling; in float32 every byte counts twice
    idle = plan.Pass(0, 0, 0, 0, 0)
    calm = plan.Passes(idle, idle, idle, idle, 500, 1000)
    assert plan.seconds_a_token(c, calm, "ppo", config, gpu) == pytest.approx(5 / 11 * sampling, rel=1e-9)
    wide = replace(config, dtype="float32")
    assert plan.seconds_a_token(c, calm, "generate", wide, gpu) == pytest.approx(2 * sampling, rel=1e-9)


def test_small_networks_wait_for_calls():
    """5 microseconds each, however little they compute: of a pass, and of a step of sampling."""
    few = plan.Pass(0, 1, 3, 1000, 3000)
    p, gpu = plan.Passes(few, few, few, few, 500, 1000), plan.GPUS["H100 SXM"]
    expected = {"sft": 0.015 / 33, "reward_model": 0.015 / 66, "dpo": 0.02 / 66, "generate": 0.005 / 8}
    expected["ppo"] = 5 / 11 * expected["generate"] + (4 * 0.005 + 2 * 2 * 0.015) / 33
    for stage, seconds in expected.items():
        assert plan.seconds_a_token(KINDS[0], p, stage, SMALL, gpu) == pytest.approx(seconds, rel=1e-9), stage


def test_a_cache_is_no_larger_than_generate_makes_it():
    """More rollouts than that go in slices."""
    many = replace(SMALL, rollouts=10**9)
    assert plan.cache_bytes(KINDS[0], many) == 4 * plan.CACHE_NUMBERS
    assert plan.cache_bytes(KINDS[0], replace(many, dtype="bfloat16")) == 2 * plan.CACHE_NUMBERS


def test_the_known_sizes_are_those_networks():
    """Their published numbers of weights, in millions."""
    for size, millions in {"gpt2": 124.4, "smollm2": 134.5, "360m": 361.8, "1.7b": 1711.4}.items():
        with torch.device("meta"):
            weights = sum(p.numel() for p in GPT(plan.SIZES[size]).parameters())
        assert weights / 1e6 == pytest.approx(millions, abs=0.06), size


def test_the_gpus_are_those_of_the_data_sheets():
    """NVIDIA's: memory, dense bfloat16 with float32 sums, bandwidth."""
    assert plan.GPUS["RTX 4090"] == (24, 165, 1008)  # half of its 330 with float16 sums
    assert plan.GPUS["A100 80GB"] == (80, 312, 2039)  # 19.5 of float32
    assert plan.GPUS["H100 SXM"] == (80, 989, 3350)


def test_each_speed_stands_under_its_gpu_where_the_stage_fits(monkeypatch, capsys):
    """One GPU's memory or speed for all, GiB for GB, seconds a token for tokens a second."""
    gigabytes = {"sft": 23.9, "reward_model": 24.1, "dpo": 79.9, "ppo": 80.1, "generate": 0.5}
    monkeypatch.setattr(plan, "all_passes", lambda c, config: (c, config))
    monkeypatch.setattr(plan, "memory", lambda c, p, stage, config: gigabytes[stage] * 1e9)
    monkeypatch.setattr(plan, "seconds_a_token", lambda c, p, stage, config, gpu: 1 / (10 * gpu.tflops + c.n_layer))
    results = plan.run(plan.Config(sizes=["gpt2", "360m"], gpus=["H100 SXM", "RTX 4090"], train_layers=12))
    lines = [line.split() for line in capsys.readouterr().out.splitlines()[3:]]
    for size, n_layer in (("gpt2", 12), ("360m", 32)):
        for stage, gb in gigabytes.items():
            speeds = [9890 + n_layer if gb < 80 else None, 1650 + n_layer if gb < 24 else None]
            found = results[size][stage]
            assert found["gigabytes"] == pytest.approx(gb)
            assert list(found["tokens_per_s"]) == ["H100 SXM", "RTX 4090"]
            assert list(found["tokens_per_s"].values()) == [s and pytest.approx(s) for s in speeds]
            assert [size, stage, f"{gb:.1f}", *("-" if s is None else f"{s:,}" for s in speeds)] in lines


@pytest.mark.slow
def test_the_table_says_that_it_is_computed_and_what_fits(capsys):
    results = plan.run(plan.Config(sizes=["tiny", "1.7b"], gpus=["RTX 4090"], prompt=40, completion=40))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("computed, not measured")
    for size in results:
        for stage, figures in results[size].items():
            fits = figures["gigabytes"] < 24
            assert (figures["tokens_per_s"]["RTX 4090"] is not None) == fits
            row = next(line for line in lines if line.split()[:2] == [size, stage])
            assert row.endswith("-") != fits
    assert results["tiny"]["ppo"]["gigabytes"] < 0.2 < 24 < results["1.7b"]["sft"]["gigabytes"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"sizes": ["7b"]}, "--sizes must be one of"),
        ({"sizes": []}, "--sizes and --gpus need a value each"),
        ({"train_layers": 13}, "--train_layers 13: gpt2 has 12 blocks"),
        ({"prompt": 1000}, "1128 tokens are longer than the block size of gpt2, 1024"),
    ],
)
def test_flags_that_make_no_sense(flags, message):
    with pytest.raises(UserError, match=message):
        plan.run(replace(plan.Config(sizes=["gpt2"]), **flags))
