"""lib/train.py: device, dtype, independent random streams, the learning rate's way, clipping."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import (
    make_gpt,
)

import lib.train
from lib.cli import UserError
from lib.train import clip_gradients, generator_for, lr_at, set_lr

CPU = torch.device("cpu")


def test_pick_device():
    """auto takes what is there; what isn't there is a one-line message with the flag."""
    precision = torch.get_float32_matmul_precision()
    try:
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = True
        assert lib.train.pick_device("cpu") == CPU
        assert torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction is False  # sums in float32
        best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        assert lib.train.pick_device("auto").type == best
        for name in ["quantum", "cpu:x", ""] + ([] if torch.cuda.is_available() else ["cuda"]):
            with pytest.raises(UserError, match="--device") as error:
                lib.train.pick_device(name)
            assert "\n" not in str(error.value)
    finally:
        torch.set_float32_matmul_precision(precision)


def test_autocast():
    """float32 leaves everything alone; bfloat16 makes matrix products of half precision from float32 weights."""
    layer = torch.nn.Linear(4, 4)
    with lib.train.autocast(CPU, "float32"):
        assert layer(torch.ones(1, 4)).dtype == torch.float32
    with lib.train.autocast(CPU, "bfloat16"):
        assert layer(torch.ones(1, 4)).dtype == torch.bfloat16
    assert layer.weight.dtype == torch.float32


def test_generators_are_independent_streams():
    """The same key gives the same numbers whatever was drawn before; every other key gives
    others (order of the key matters too)."""
    keys = [(), (0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (1, 1), (0, 0, 0), (7, 3, 1), (7, 1, 3), (3, 7, 1)]
    draws = {}
    for key in keys:
        draws[key] = torch.rand(4, generator=generator_for(CPU, *key))
        torch.rand(3)
    assert len({tuple(d.tolist()) for d in draws.values()}) == len(keys)
    for key in reversed(keys):
        assert torch.equal(torch.rand(4, generator=generator_for(CPU, *key)), draws[key])
    state = torch.get_rng_state()
    torch.rand(4, generator=generator_for(CPU, 5))
    assert torch.equal(torch.get_rng_state(), state)
    # neighbouring steps: no pattern
    many = torch.stack([torch.rand(2, generator=generator_for(CPU, 1, step)) for step in range(400)])
    assert abs(float(many.mean()) - 0.5) < 0.05 and abs(float(torch.corrcoef(many.T)[0, 1])) < 0.2
    assert abs(float(torch.corrcoef(torch.stack([many[:-1, 0], many[1:, 0]]))[0, 1])) < 0.2


@pytest.mark.parametrize(
    ("kind", "factors"),
    [
        ("cosine", {0: 0.25, 3: 1.0, 4: 1.0, 8: 0.5, 11: 0.5 * (1 + math.cos(math.pi * 7 / 8))}),
        ("linear", {0: 0.25, 3: 1.0, 4: 1.0, 8: 0.5, 11: 0.125}),
    ],
)
def test_lr_at_by_hand(kind, factors):
    """12 steps, 4 of warm-up: the first step already learns, the peak is reached at the
    end of warm-up, no step is beyond it."""
    for step, factor in factors.items():
        assert lr_at(step, 12, 4, kind) == pytest.approx(factor, abs=1e-12), step
    curve = [lr_at(s, 12, 4, kind) for s in range(12)]
    assert max(curve) == 1.0 and min(curve) > 0 and curve[4:] == sorted(curve[4:], reverse=True)


def test_lr_at_edges():
    """No warm-up, or more warm-up than steps, or one step: no division by zero, never above the peak."""
    assert lr_at(0, 10, 0, "cosine") == 1.0 and lr_at(0, 1, 0, "linear") == 1.0
    assert [lr_at(s, 3, 4, "cosine") for s in range(3)] == [0.25, 0.5, 0.75]
    assert lr_at(4, 4, 4, "linear") == 1.0


def test_every_group_has_its_own_peak():
    """PPO's policy and value model: a factor that is applied to what it was applied to before, or to one group's peak
    in the place of another's; also in an optimiser that comes from a saved state."""
    optimizer = torch.optim.SGD([{"params": [torch.zeros(1)], "lr": peak} for peak in (1.0, 8.0)])
    for step, factor in enumerate((0.5, 1.0, 1.0, 0.5)):
        assert set_lr(optimizer, step, 4, 2, "linear") == factor
        assert [group["lr"] for group in optimizer.param_groups] == [factor, 8 * factor]
    resumed = torch.optim.SGD([{"params": [torch.zeros(1)], "lr": peak} for peak in (1.0, 8.0)])
    resumed.load_state_dict(optimizer.state_dict())
    assert set_lr(resumed, 1, 4, 2, "linear") == 1.0 and resumed.param_groups[1]["lr"] == 8.0


def model_with_gradients(seed: int, dtype=torch.float64):
    """A GPT whose gradients are known -> the model, and its gradients as one vector."""
    model = make_gpt(seed, n_embd=8, dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator, dtype=dtype)
    return model, gradients(model)


def gradients(model) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def test_gradients_are_clipped_by_their_common_norm():
    """Scaled down all together to the given length, their direction kept; shorter ones are left alone. What comes back
    is their norm before."""
    for share in (0.1, 0.999):
        model, before = model_with_gradients(1)
        norm = before.norm().item()
        assert clip_gradients(model, share * norm).item() == pytest.approx(norm, rel=1e-9)
        assert torch.allclose(gradients(model), share * before, rtol=1e-6, atol=0)  # torch adds 1e-6 to the norm
    model, before = model_with_gradients(1)
    assert clip_gradients(model, 1.001 * norm).item() == pytest.approx(norm, rel=1e-9)
    assert torch.equal(gradients(model), before)


def test_a_limit_of_0_leaves_the_gradients_alone():
    """--grad_clip 0 is off. Taken for a limit it would train nothing: every gradient becomes 0."""
    model, before = model_with_gradients(2)
    assert clip_gradients(model, 0.0).item() == pytest.approx(before.norm().item(), rel=1e-9)
    assert torch.equal(gradients(model), before) and before.norm() > 1


def test_frozen_parameters_do_not_count_when_clipping():
    """A left-over gradient of a frozen layer would shrink those that are trained."""
    model, _ = model_with_gradients(3)
    model.wte.requires_grad_(False)
    expected = torch.cat([p.grad.flatten() for name, p in model.named_parameters() if name != "wte.weight"]).norm()
    assert clip_gradients(model, 1.0).item() == pytest.approx(expected.item(), rel=1e-9)
