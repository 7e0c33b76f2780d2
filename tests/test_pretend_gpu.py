"""Every stage on a GPU that is only pretended (pretend_gpu.py): nothing is on the wrong device, the results are those
of the CPU, and the host waits no more than it must."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from helpers import EOS, RANKINGS, checkpoint, make_gpt, make_told, read_lines, write_lines
from pretend_gpu import CPU, GPU, PretendGPU
from stages import DEMONSTRATIONS, PROMPT_ROWS, STAGES, demonstrations, same_figures, settings, toy_policy
from torch import Tensor

import collect
import dpo
import evaluate
import sample
from lib.checkpoint import load_model
from lib.train import generator_for
from sampling import generate


@pytest.fixture(autouse=True)
def usual_precision():
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


# ------------------------------------------------------------------------------------------------ the pretended GPU


def on_gpu(*shape: int) -> Tensor:
    return torch.arange(math.prod(shape), dtype=torch.float32, device="cuda").view(shape)


def test_results_are_where_the_operands_are():
    with PretendGPU():
        x, here = on_gpu(2, 3), torch.ones(2, 3)
        assert x.device == GPU and here.device == CPU and x.is_cuda and not here.is_cuda
        weight = torch.nn.Parameter(here.to("cuda"))
        (x.view(3, 2) @ weight).sum().backward()
        derived = [x[0], x.T + 1, x.new_zeros(3), torch.zeros_like(x), x > 1, x.max(0).values, weight.grad, x.double()]
        derived += [torch.tensor([1.0], device=x.device), torch.nn.functional.one_hot(x[0].long(), 4)]
        assert all(y.device == GPU for y in derived)
        assert x.cpu().device == CPU and x.device == GPU and x.to("cuda:0") is x
        assert x.cpu().tolist() == [[0, 1, 2], [3, 4, 5]] and here.to(x.device).tolist() == [[1] * 3] * 2
        network = torch.nn.Linear(3, 1).to("cuda")
        assert network(x).device == network.bias.device == GPU
        for _ in range(50):  # the memory of what has gone is taken again
            torch.ones(3).to("cuda")
            assert torch.ones(3).device == CPU


REFUSED = {
    "operands": lambda x, y: x + y,
    "a product": lambda x, y: x @ y.T,
    "where": lambda x, y: torch.where(x > 1, x, y),
    "a mask of another tensor": lambda x, y: x.masked_fill(y > 0, 0.0),
    "a list": lambda x, y: torch.cat([x, y]),
    "numbers in a list": lambda x, y: torch.stack([x.sum(), y.sum()]),
    "in place": lambda x, y: x.add_(y),
    "an index there for a tensor here": lambda x, y: y[x[0].long().clamp(max=1)],
    "values put at indices": lambda x, y: x.index_put_((torch.zeros(2, dtype=torch.long),), y),
    "gather": lambda x, y: x.gather(1, y.long()),
    "the backward pass": lambda x, y: torch.nn.functional.cross_entropy(x.requires_grad_(), y[:, 0].long()).backward(),
    "a generator here": lambda x, y: x.uniform_(generator=torch.Generator()),
    "a generator there": lambda x, y: torch.randperm(3, generator=torch.Generator("cuda")),
    "numpy": lambda x, y: x.numpy(),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_a_gpu_refuses(what):
    with PretendGPU(), pytest.raises((RuntimeError, TypeError), match=r"same device|generator|numpy"):
        REFUSED[what](on_gpu(2, 3), torch.ones(2, 3))


MASK = "torch.tensor([True, False])"
WAITS = {
    "x.sum().item()": 1,
    "int(x.sum())": 1,
    "bool((x > 1).any())": 1,
    "x.tolist()": 1,
    "(x > 1).nonzero()": 1,
    "x[x > 1]": 1,
    "x[[0, 1]]": 1,
    f"x[{MASK}]": 1,
    "x.cpu()": 1,
    "torch.ones(2).to('cuda')": 1,
    "torch.tensor([1, 2], device='cuda')": 1,
    "x.copy_(torch.ones(2, 3))": 1,
    "x[torch.tensor([0, 1])]": 1,
    "x.masked_select(x > 1)": 1,
    "f'{x.sum():.2f}'": 1,
    "x.unique()": 1,
    "x + 1": 0,
    "x * torch.tensor(2.0)": 0,  # a number is part of the call
    "torch.where(x > 1, x, 0.0)": 0,
    "x.masked_fill(x > 1, 0.0)": 0,
    "x.__setitem__(x > 1, 0.0)": 0,  # this is masked_fill
    "x.to('cuda')": 0,
    "x.view(6)[2:].argsort()": 0,
    "x[x[0].long().clamp(max=1)]": 0,
    "torch.zeros(3, device=x.device)": 0,
    "torch.nn.functional.one_hot(x.long(), 6)": 0,
    "torch.rand(3, generator=torch.Generator('cuda'), device='cuda')": 0,
    f"torch.ones(2)[{MASK}]": 0,
    "torch.ones(2).tolist()": 0,
}


@pytest.mark.parametrize("what", WAITS)
def test_where_the_host_waits(what):
    with PretendGPU() as gpu:
        x = on_gpu(2, 3)
        eval(what, {"torch": torch, "x": x})
    assert gpu.waits.total() == WAITS[what]


def test_generators_draw_the_cpu_s_numbers_on_the_device_they_were_made_for():
    with PretendGPU() as gpu:
        there, here = generator_for("cuda", 3, 1), generator_for("cpu", 3, 1)
        assert there.device.type == "cuda" and here.device == CPU
        drawn = torch.zeros(4, device="cuda").uniform_(generator=there)
        assert drawn.device == GPU and torch.equal(drawn.cpu(), torch.rand(4, generator=here))
    assert gpu.waits.total() == 1  # of the comparison


# ------------------------------------------------------------------------------------------------ the stages


def own_parts(folder: Path) -> dict:
    """A reward model of the policy's own start, which shares its frozen blocks, and demonstrations."""
    folder.mkdir(parents=True, exist_ok=True)
    scorer = make_told(3, block_size=24)
    scorer.gpt.load_state_dict(toy_policy().state_dict())
    demos = write_lines(folder / "demonstrations.jsonl", demonstrations(DEMONSTRATIONS))
    return {"reward": checkpoint(folder / "rm", scorer), "ptx_data": demos}


SHORT = {"iterations": 1, "rollouts": 8, "minibatch": 6, "micro_batch": 4}
RUNS = {
    "sft": ("sft", {"micro_batch": 3, "held_out": demonstrations(DEMONSTRATIONS[:3])}),
    "sft --train_layers": ("sft", {"train_layers": 1}),
    "reward_model": ("reward_model", {"micro_batch": 3, "held_out": RANKINGS[:3]}),
    "reward_model --expectation no": ("reward_model", {"expectation": "no", "train_layers": 1}),
    "ppo": ("ppo", {**SHORT, "stop_kl": 0.5, "trace": True}),
    "ppo with all": ("ppo", {**SHORT, "kl": "exact", "train_layers": 1, "ptx_coef": 0.5, "recompute": True}),
    "grpo": ("grpo", SHORT),
    "rloo": ("grpo", {**SHORT, "kind": "rloo", "train_layers": 1}),
    "dpo --train_layers": ("dpo", {"train_layers": 1, "micro_batch": 2}),
    **{f"dpo --kind {kind}": ("dpo", {"kind": kind, "micro_batch": 3, "held_out": RANKINGS[:3]}) for kind in dpo.KINDS},
}


def run(name: str, folder: Path, device: str, **changes):
    """-> results, weights, log of the stage, and the pretended GPU that it ran on."""
    made = settings(name, folder, device=device, save_every=0, **changes)
    module = STAGES[name].module
    with PretendGPU() as gpu:
        results = module.train(module.Config(**made))
    out = Path(made["out_dir"])
    weights = load_model(out, CPU, STAGES[name].kind).model.state_dict()
    return results, weights, read_lines(out / "metrics.jsonl"), gpu


def assert_equal_figures(found, expected) -> None:
    """Numbers to six digits, all else as it is."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        found, expected = [found[key] for key in expected], list(expected.values())
    if isinstance(expected, list):
        assert len(found) == len(expected)
        for a, b in zip(found, expected, strict=True):
            assert_equal_figures(a, b)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-5, abs=2e-6)
    else:
        assert found == expected


def test_every_stage_runs_on_it():
    assert {stage for stage, _ in RUNS.values()} == set(STAGES) == set(MICRO_BATCH_WAITS)


@pytest.mark.parametrize("name", RUNS)
def test_a_stage_on_a_gpu_equals_the_stage_on_the_cpu(name, tmp_path, float64):
    """A mask or a table made on the CPU, a generator of the other device, rows wider than the network reads. Some rows
    are as long as block_size, which is no multiple of 32. (In float64: a GPU's rows are padded to another width, so
    float32 would round otherwise.)"""
    stage, changes = RUNS[name]
    changes = {**changes, **(own_parts(tmp_path) if name == "ppo with all" else {})}
    results, weights, log, gpu = run(stage, tmp_path / "gpu", "cuda", **changes)
    expected, expected_weights, expected_log, untouched = run(stage, tmp_path / "cpu", "cpu", **changes)
    assert gpu.waits and not untouched.waits
    for key, weight in expected_weights.items():
        torch.testing.assert_close(weights[key], weight, rtol=1e-6, atol=1e-6, msg=key)
    assert_equal_figures(same_figures(log), same_figures(expected_log))
    assert_equal_figures(*same_figures([results, expected]))


@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_a_resumed_run_on_a_gpu_equals_the_one_on_the_cpu(stage, tmp_path, float64):
    """Adam's moments and the networks go from the state's file to the GPU."""
    changes, longer = (SHORT, {"iterations": 2}) if stage == "ppo" else ({}, {"epochs": 2})
    found = {}
    for device in ("cuda", "cpu"):
        run(stage, tmp_path / device, device, **changes)
        found[device] = run(stage, tmp_path / device, device, **{**changes, **longer}, resume=True)[1]
    for key, weight in found["cpu"].items():
        torch.testing.assert_close(found["cuda"][key], weight, rtol=1e-6, atol=1e-6, msg=key)


@pytest.mark.parametrize("stage", ["ppo", "grpo"])
def test_in_bfloat16_a_stage_runs_on_a_gpu(stage, tmp_path):
    log = run(stage, tmp_path, "cuda", **SHORT, dtype="bfloat16")[2]
    assert len(log) == 1


def policies(folder: Path) -> list[str]:
    return [checkpoint(folder / f"policy{n}", toy_policy(n)) for n in (1, 2)]


def small_evaluate(folder: Path, device: str) -> dict:
    """The comparison with all its parts."""
    (folder / "reward.py").write_text("def a(prompts, completions):\n    return [float(len(c)) for c in completions]\n")
    prompts = write_lines(folder / "prompts.jsonl", PROMPT_ROWS)
    files = {"rankings": write_lines(folder / "rankings.jsonl", RANKINGS), "out_dir": str(folder / "evaluate")}
    files["loss_data"] = write_lines(folder / "demonstrations.jsonl", demonstrations(DEMONSTRATIONS))
    files |= {"gold": f"{folder}/reward.py:a", "reward": checkpoint(folder / "rm", make_told(3, block_size=24))}
    options = {"best_of": [1, 2], "show": 1, "max_new_tokens": 7, "device": device, **files}
    return evaluate.run(evaluate.Config(policies(folder), prompts=prompts, **options))


def small_collect(folder: Path, device: str) -> list[dict]:
    (folder / "reward.py").write_text("def a(prompts, completions):\n    return [float(len(c)) for c in completions]\n")
    prompts = write_lines(folder / "prompts.jsonl", PROMPT_ROWS)
    options = {"gold": f"{folder}/reward.py:a", "out": str(folder / "rankings.jsonl"), "device": device}
    collect.run(collect.Config(policies(folder), prompts=prompts, max_new_tokens=7, temperatures=[0.7, 1.0], **options))
    return read_lines(folder / "rankings.jsonl")


def small_sample(folder: Path, device: str) -> dict:
    options = {"samples": 3, "top_k": 9, "top_p": 0.9, "max_new_tokens": 7, "gold": "", "device": device}
    scorer = checkpoint(folder / "rm", make_told(3, block_size=24))
    return sample.run(sample.Config(compare=policies(folder), prompt="abc", reward=scorer, **options))


@pytest.mark.parametrize("script", ["evaluate", "collect", "sample"])
def test_a_script_on_a_gpu_equals_the_script_on_the_cpu(script, tmp_path, float64, capsys):
    start, found = {"evaluate": small_evaluate, "collect": small_collect, "sample": small_sample}[script], {}
    for device in ("cuda", "cpu"):
        (tmp_path / device).mkdir()
        with PretendGPU() as gpu:
            found[device] = start(tmp_path / device, device)
        found[device] = found[device] or [x for x in capsys.readouterr().out.splitlines() if " > " in x]  # of sample.py
        assert bool(gpu.waits) == (device == "cuda")
    assert_equal_figures(found["cuda"], found["cpu"])
    assert found["cpu"]


# ------------------------------------------------------------------------------------------------ where the host waits
#
# PyTorch runs ahead of a GPU: it hands over one operation after the other and waits for none. Where it must wait, the
# GPU has nothing to do until the next operation arrives. So waits are counted, for one more micro-batch and for one
# more step of sampling. A copy of a batch to the GPU is one; to find the places of a mask is one, since their number is
# the shape of what comes next.

MICRO_BATCH_WAITS = {
    "sft": 4,  # tokens; lengths; the places of the completions; their tokens
    "reward_model": 2,  # tokens, owners and positions; ends, lengths and ranks
    "ppo": 4,  # measured: the rows' numbers, the places of the actions; updated: the same two again
    "grpo": 4,  # the same
    "dpo": 6,  # the batch, as in reward_model.py; policy and reference: the places of the completions; the strict pairs
}
EQUAL = [{"prompt": p, "completions": ["c", "de", "fgh"]} for p in ("ab", "b", "cde", "wf", "g", "hi", "k", "l")]


def total_waits(stage: str, folder: Path, **changes) -> int:
    rows = EQUAL if stage in ("dpo", "reward_model") else None
    return run(stage, folder, "cuda", rows=rows, **changes)[3].waits.total()


@pytest.mark.parametrize("stage", STAGES)
def test_waits_of_a_micro_batch(stage, tmp_path):
    """8 rows in four micro-batches, and in two. An .item() in the inner loop shows here."""
    changes = {"epochs": 1} if not STAGES[stage].rollouts else {"iterations": 1, "rollouts": 8, "ppo_epochs": 1}
    changes |= {"minibatch": 8} if STAGES[stage].rollouts else {"batch_size": 8}
    two, four = (total_waits(stage, tmp_path / str(size), micro_batch=size, **changes) for size in (4, 2))
    assert four - two <= 2 * MICRO_BATCH_WAITS[stage]


@pytest.mark.parametrize("stage", ["ppo", "grpo"])
def test_waits_of_an_optimiser_step(stage, tmp_path):
    """Four steps of one micro-batch, and two of two: the rows' numbers, and in PPO the KL at which it would stop."""
    changes = {"iterations": 1, "rollouts": 8, "ppo_epochs": 1, "micro_batch": 2}
    changes |= {"stop_kl": 1e9} if stage == "ppo" else {}
    two, four = (total_waits(stage, tmp_path / str(size), minibatch=size, **changes) for size in (4, 2))
    assert four - two <= 2 * {"ppo": 2, "grpo": 1}[stage]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_waits_of_sampling(temperature):
    """While texts are sampled the host looks at every 8th step whether all have ended."""
    waits = []
    for steps in (8, 32):
        with PretendGPU() as gpu:
            policy = make_gpt(block_size=48, real_vocab=EOS).to("cuda")  # it can't say EOS
            options = {"temperature": temperature, "generator": generator_for("cuda", 1)}
            gpu.waits.clear()
            rollout = generate(policy, [[1, 2], [3]], steps, eos_id=EOS, **options)
        assert rollout.tokens.shape == (2, 2 + steps)
        waits.append(gpu.waits.total())
    assert waits[1] - waits[0] <= (32 - 8) / 8 and waits[0] <= 8
