"""tools/bench.py: that it counts right, measures what the scripts run, and says what is missing."""

from __future__ import annotations

import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from helpers import ROOT, strict_json
from stages import watching
from lib.cli import UserError
from model import LLAMA, Block, GPTConfig
from tools import bench

NET = GPTConfig(40, 64, 2, 2, 16)
SHORT = {"batch_size": 8, "prompt": 6, "new_tokens": 7, "completion_low": 2, "completion_high": 9}
SHORT |= {"repeats": 2, "device": "cpu"}
EQUAL = SHORT | {"completion_low": 5, "completion_high": 5}  # no filler


def first_step(stage: str, **changes) -> tuple[bench.Config, bench.Start, bench.Texts]:
    config = bench.Config(**(SHORT | changes))
    start = bench.make_start(NET, config, stage)
    return config, start, bench.make_step(start, stage)(start.batches[0])


@pytest.mark.parametrize("net", [NET, GPTConfig(40, 64, 2, 2, 16, n_kv_head=1, n_inner=24, rope_base=100.0, **LLAMA)])
@pytest.mark.parametrize("stage", bench.STAGES)
def test_the_counted_operations_are_those_that_torch_counts(stage, net):
    """Where there is no filler nothing but what is needed is computed: torch's own counter, which sees every matrix
    product as it runs, must come to the same number. (It lists attention's products by themselves.)"""
    config = bench.Config(**EQUAL)
    start = bench.make_start(net, config, stage)
    step = bench.make_step(start, stage)
    with FlopCounterMode(display=False) as counter:
        texts = step(start.batches[0])
    counts = counter.get_flop_counts()["Global"]
    found = sum(n for op, n in counts.items() if str(op) in ("aten.mm", "aten.addmm"))
    if stage == "ppo":
        found -= 2 * config.batch_size * (6 + 5 - 1) ** 2  # the product with a matrix in ppo.gae
    assert found == bench.needed_flops(stage, texts, net)


@pytest.mark.parametrize("stage", bench.STAGES)
def test_filler_is_not_counted(stage):
    """Tokens of a step, by hand from its batch; PPO's rollouts all have the greatest length."""
    config, start, texts = first_step(stage)
    batch, B = start.batches[0], config.batch_size
    n = bench.tokens_of(stage, texts)
    if stage == "sft":
        assert n == sum(len(e.prompt) + len(e.completion) for e in batch) < B * (6 + 9)
    elif stage in ("reward_model", "dpo"):
        assert n == sum(len(e.ids) for item in batch for e in item.examples) and len(batch) == B / 2
    elif stage == "generate":
        assert n == B * config.new_tokens
    else:
        assert texts == [(6, 9)] * B and n == B * (6 + 9)


@pytest.mark.parametrize("stage", bench.STAGES)
def test_a_step_leaves_the_weights_alone(stage):
    """Every repeat does the same work: the learning rate is 0. But a step is taken: there are gradients."""
    config, start, _ = first_step(stage)
    fresh = bench.make_start(NET, config, stage)
    for name in ("policy", "scorer"):
        if getattr(start, name) is not None:
            pairs = zip(getattr(start, name).parameters(), getattr(fresh, name).parameters(), strict=True)
            assert all(torch.equal(p, q) for p, q in pairs)
    learner = start.scorer if stage == "reward_model" else start.policy
    assert all(p.grad is not None for p in learner.parameters()) == (stage != "generate")


@pytest.mark.parametrize("stage", ["sft", "reward_model", "dpo"])
def test_a_step_starts_without_the_gradients_of_the_last(stage):
    found = []
    for batches in ((0, 1), (1,)):
        start = bench.make_start(NET, bench.Config(**SHORT), stage)
        step, learner = bench.make_step(start, stage), start.scorer if stage == "reward_model" else start.policy
        for number in batches:
            step(start.batches[number])
        found.append([p.grad.clone() for p in learner.parameters()])
    for first, second in zip(*found, strict=True):
        torch.testing.assert_close(first, second)


def test_the_bytes_of_a_decode_step():
    config = bench.Config(**SHORT)
    policy = bench.make_start(NET, config, "generate").policy
    blocks = 2 * (12 * 16 * 16 + 13 * 16)  # matrices; biases and the gains of two LayerNorms
    weights = 40 * 16 + blocks + 2 * 16  # no positions: one row of their table is read
    cached = 8 * (6 + 7 / 2) * 2 * 2 * 16  # rows, tokens so far, layers, keys and values
    assert bench.decode_bytes(policy, config) == 4 * (weights + cached)


def test_a_run_writes_what_its_docstring_says(tmp_path, capsys):
    file = tmp_path / "bench.json"
    results = bench.run(bench.Config(**SHORT, memory=False, json=str(file)))
    assert strict_json(file) == results
    assert set(results) == {"machine", "config", "ceilings", "stages"}
    assert set(results["ceilings"]) == {"matmul_gflops", "copy_gb"}
    usual = {"tokens", "seconds", "tokens_per_s", "share_of_matmul", "peak_mb"}
    more = {"generate": {"step_seconds", "share_of_copy"}}
    assert list(results["stages"]) == list(bench.STAGES)
    for stage, figures in results["stages"].items():
        assert set(figures) == usual | more.get(stage, set())
    table = capsys.readouterr().out.splitlines()[4:]
    assert all(line.startswith(stage) for stage, line in zip(bench.STAGES, table, strict=False))


def test_rates_and_shares(monkeypatch):
    """By a clock that ticks once a look: every step takes a second, and what is needed is known."""
    ticks = iter(range(10**6))
    monkeypatch.setattr(bench.time, "perf_counter", lambda: float(next(ticks)))
    config, ceilings = bench.Config(**SHORT, memory=False), {"matmul_gflops": 2.0}
    s = bench.measure(NET, config, "sft", ceilings)
    batches = bench.make_start(NET, config, "sft").batches[bench.WARM_UP :]  # two
    texts = [[(len(e.prompt), len(e.completion)) for e in batch] for batch in batches]
    assert s["seconds"] == 1.0
    assert s["tokens"] == s["tokens_per_s"] == sum(p + c for t in texts for p, c in t) / 2
    assert s["share_of_matmul"] == pytest.approx(sum(bench.needed_flops("sft", t, NET) for t in texts) / 2 / 2e9)


# Networks that a stage's own --compile reaches: the reward models of ppo.py stay as they are.
COMPILED = {"sft": "policy", "reward_model": "scorer", "dpo": "policy reference", "ppo": "policy reference"}
COMPILED |= {"generate": "policy"}


@pytest.mark.parametrize("stage", bench.STAGES)
def test_compile_reaches_what_it_reaches_in_the_stage(monkeypatch, stage):
    """A reference or a value model that runs uncompiled beside a compiled policy: slower than the stage is."""
    compiled: set[Block] = set()
    monkeypatch.setattr(Block, "compile", lambda self, **_: compiled.add(self))
    with watching() as watch:
        _, start, _ = first_step(stage, compile=True)
    wanted = {block for name in COMPILED[stage].split() for block in blocks_of(getattr(start, name))}
    assert wanted <= compiled
    ran = {block for block, _ in watch.block_runs}
    assert ran - compiled == (blocks_of(start.scorer) if stage == "ppo" else set())


def blocks_of(model) -> set[Block]:
    return {module for module in model.modules() if isinstance(module, Block)}


@pytest.mark.parametrize("stage", bench.STAGES)
def test_a_step_is_the_stage_s(stage):
    """Twice as many texts, one minibatch where a stage takes four, an iteration that ends at its first update, float32
    where bfloat16 is asked for."""
    with watching() as watch:
        *_, texts = first_step(stage, dtype="bfloat16")
    assert len(texts) == 8
    assert len(watch.steps) == {"ppo": bench.PPO_EPOCHS * 4, "generate": 0}.get(stage, 1)
    assert {rate for step in watch.steps for rate in step.rates} <= {0.0}
    assert watch.products[True] == ({torch.bfloat16} if watch.steps else set())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_the_machine_can_do_by_hand(monkeypatch, dtype):
    """Half of the operations, a copy's bytes that are read and not written, the slowest of several tries, another dtype
    than is asked for: all shares would be off by that. The first try takes 4 seconds, the others 2."""
    made, tries = [], []

    def timed(f, device):
        tries.append(f())
        return (4.0 if len(tries) == 1 else 2.0), None

    monkeypatch.setattr(bench, "timed", timed)
    randn, ones = torch.randn, torch.ones
    monkeypatch.setattr(torch, "randn", lambda *size, **k: made.append(randn(64, 64, **k)) or made[-1])
    monkeypatch.setattr(torch, "ones", lambda *size, **k: made.append(ones(512, **k)) or made[-1])
    config, cpu = bench.Config(**SHORT, dtype=dtype), torch.device("cpu")
    assert bench.matmul_speed(config, cpu) == pytest.approx(2 * 1024**3 / 2.0 / 1e9)
    assert {x.dtype for x in made} == {tries[0].dtype} == {getattr(torch, dtype)}
    tries.clear()
    assert bench.copy_speed(cpu) == pytest.approx((2048 + 2048) / 2.0 / 1e9)  # 2,048 bytes read, and 2,048 written


def test_a_decode_step_is_what_the_prompts_leave(monkeypatch):
    """The prompts' time in it, or one step too many: by a clock on which every token that a network reads takes a
    second. Seven new tokens of eight rows are a pass over the prompts, of six tokens each, and six steps."""
    config, ceilings = bench.Config(**SHORT, memory=False), {"matmul_gflops": 2.0, "copy_gb": 3.0}
    with watching() as watch:
        monkeypatch.setattr(bench.time, "perf_counter", lambda: float(sum(p.tokens.numel() for p in watch.passes)))
        s = bench.measure(NET, config, "generate", ceilings)
    assert (s["seconds"], s["tokens"], s["step_seconds"]) == (8 * 6 + 6 * 8, 8 * 7, 8.0)
    assert s["tokens_per_s"] == pytest.approx(56 / 96)
    needed = bench.decode_bytes(bench.make_start(NET, config, "generate").policy, config)
    assert s["share_of_copy"] == pytest.approx(needed / 8 / 3e9)
    assert "compile_seconds" not in s


def test_the_table_has_each_figure_under_its_title(capsys):
    """Milliseconds for seconds, one share under the other's title, or a figure that was not measured as 0."""
    config = bench.Config(**SHORT, compile=True)
    whole = {"tokens": 56.4, "seconds": 0.0123, "tokens_per_s": 4567.8, "share_of_matmul": 0.314, "peak_mb": 12.6}
    told = {**whole, "share_of_copy": 0.27, "step_seconds": 0.00204}
    bench.print_table({"sft": {**whole, "peak_mb": None}, "generate": told}, config)
    head, sft, generate, _, last = capsys.readouterr().out.splitlines()
    assert re.split(r"  +", head) == ["stage", "tokens", "ms", "tokens/s", "of matmul", "of copy", "peak MB"]
    assert sft.split() == ["sft", "56", "12.3", "4,568", "31%", "-", "-"]
    assert generate.split() == ["generate", "56", "12.3", "4,568", "31%", "27%", "13"]
    assert last == "generate: 2.04 ms a step of 8 rows"


@pytest.mark.slow
def test_memory_is_measured_in_a_process_of_its_own():
    """The whole script, with one stage: what the network takes shows, and the libraries don't."""
    flags = "--stages sft --batch_size 8 --repeats 1 --device cpu"
    done = subprocess.run(
        [sys.executable, "-m", "tools.bench", *flags.split()], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    peak = done.stdout.splitlines()[4].split()[-1]
    state = 4 * 4 * 3 * 12 * 128**2 / 2**20  # weights of the blocks, gradients, two moments: 9 MB
    assert peak == "-" or state < float(peak) < 10 * state


def test_the_peak_is_that_of_the_stage_s_network_in_mb(monkeypatch):
    """Kilobytes by the thousand, another network's or another stage's memory, one that is measured although it is not
    wanted."""
    monkeypatch.setattr(bench.Path, "exists", lambda _: True)
    monkeypatch.setattr(bench.Path, "read_text", lambda _: "VmPeak:\t  9999 kB\nVmHWM:\t  3072 kB\nVmRSS:\t  1024 kB\n")
    assert bench.resident_peak() == 3.0
    asked = []

    class Fresh:
        """ProcessPoolExecutor, without a process."""

        def __init__(self, *_):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def submit(self, function, *arguments):
            asked.append((function, *arguments))
            return SimpleNamespace(result=lambda: 5.0)

    monkeypatch.setattr(bench, "ProcessPoolExecutor", Fresh)
    for memory, peak in ((True, 5.0), (False, None)):
        config = bench.Config(**SHORT, memory=memory)
        assert bench.measure(NET, config, "sft", {"matmul_gflops": 1.0})["peak_mb"] == peak
    assert asked == [(bench.peak_memory, NET, bench.Config(**SHORT, memory=True), "sft")]


def test_micro_batch_is_the_scripts():
    assert bench.flags_of(bench.Config(**SHORT, micro_batch=3))["micro_batch"] == 3
    assert "micro_batch" not in bench.flags_of(bench.Config(**SHORT))


def test_lengths_that_are_not_given_are_those_of_the_size():
    tiny, gpt2 = bench.Config(), bench.Config(size="gpt2", batch_size=4)
    assert (tiny.batch_size, tiny.prompt, tiny.completion_low, tiny.completion_high) == (64, 20, 4, 24)
    assert (gpt2.batch_size, gpt2.prompt, gpt2.completion_low, gpt2.new_tokens) == (4, 128, 128, 128)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"completion_low": 10}, "--completion_low 10 is above --completion_high 9"),
        ({"batch_size": 1}, "--batch_size and --new_tokens must be at least 2"),
        ({"stages": []}, "--stages needs one or several of"),
        ({"stages": ["grpo"]}, "--stages must be one of"),
    ],
)
def test_flags_that_make_no_sense(flags, message):
    with pytest.raises(UserError, match=message):
        bench.run(bench.Config(**(SHORT | flags)))
