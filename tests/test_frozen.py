"""What --train_layers leaves as it is: computed once for policy, reference and value model, in memory once, and the
same figures and gradients as if everybody computed it. And sampling in bfloat16, whose casts it must not multiply."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import EOS, ITEMS, make_gpt, make_scalar, make_told, random_prompts, rng, spread
from torch.profiler import ProfilerActivity, profile

import frozen
import ppo
from frozen import cast_once, choose_trainable, make_reference, share_frozen, train_like, trunk
from lib.cli import TrainConfig
from lib.train import autocast
from data.batches import ranked_batch
from model import GPT, KVCache
from sampling import generate

LLAMA = {"norm": "rms", "n_kv_head": 2, "mlp": "swiglu", "n_inner": 40, "bias": "none", "tied": False}
KINDS = [{}, {"rope_base": 100.0}, {"rope_base": 100.0, **LLAMA}]


LAST = [TrainConfig(train_layers=n) for n in range(3)]  # what config says of --train_layers


def frozen_gpt(n: int = 1, **sizes) -> GPT:
    """Three blocks in float64, of which the last n are to be trained."""
    model = make_gpt(n_layer=3, dtype=torch.float64, **sizes)
    choose_trainable(model, LAST[n])
    return model


def changed(model, seed: int = 5):
    """The same with other values of what is trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in frozen.trainable(model):
            p += 0.05 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    return model


def storages(model) -> set[int]:
    return {p.data_ptr() for p in model.parameters()}


# ------------------------------------------------------------------------------------------------ the trunk


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_what_stands_on_the_trunk_equals_the_whole(kind, n):
    """A trunk that ends a block too early or too late, forgets positions, or whose last block cuts to other places."""
    model = frozen_gpt(n, **kind)
    tokens = torch.randint(0, 23, (4, 11), generator=rng())
    where = torch.rand(4, 10, generator=rng(1)) < 0.5
    below = trunk(model, tokens)
    assert below.shape == (4, 11, 32) and not below.requires_grad
    for options in ({}, {"where": where}):
        torch.testing.assert_close(model(tokens, **options, below=below), model(tokens, **options), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_the_trunk_of_rankings_equals_the_whole(kind):
    """Completions that share a prompt: their own positions, and none sees another, in the frozen blocks too."""
    model = frozen_gpt(1, **kind)
    batch = ranked_batch(ITEMS, torch.device("cpu"))
    below = trunk(model, batch.tokens, batch.positions)
    found = model(batch.tokens, positions=batch.positions, below=below)
    torch.testing.assert_close(found, model(batch.tokens, positions=batch.positions), rtol=0, atol=1e-12)


@pytest.mark.parametrize("make", [make_scalar, make_told])
def test_a_scalar_model_stands_on_the_trunk_too(make):
    scalar = make(n_layer=3, dtype=torch.float64)
    choose_trainable(scalar, LAST[1])
    tokens = torch.randint(0, 23, (4, 11), generator=rng())
    below = trunk(scalar.gpt, tokens)
    torch.testing.assert_close(scalar(tokens, below=below), scalar(tokens), rtol=0, atol=1e-12)


def test_a_model_without_frozen_blocks_does_not_look_at_the_trunk():
    """A value model that shares nothing is handed the policy's trunk all the same."""
    tokens, model = torch.randint(0, 23, (2, 6), generator=rng()), make_gpt(n_layer=3)
    assert model.frozen == 0
    assert torch.equal(model(tokens, below=torch.full((2, 6, 32), torch.nan)), model(tokens))


# ------------------------------------------------------------------------------------------------ what is in common


@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_has_what_is_frozen_in_common_and_nothing_else(kind):
    """A reference that learns along with the trained blocks; or one that takes memory for the frozen ones."""
    policy = frozen_gpt(1, **kind)
    reference = make_reference(policy)
    own = {name for name, p in reference.named_parameters() if p.data_ptr() not in storages(policy)}
    assert own == {name for name, p in policy.named_parameters() if p.requires_grad}
    assert own and all(name.startswith(("h.2.", "ln_f.")) for name in own)
    assert reference.frozen == policy.frozen == 2
    assert not any(p.requires_grad for p in reference.parameters())
    tokens = torch.randint(0, 23, (2, 6), generator=rng())
    before = reference(tokens)
    changed(policy)
    assert torch.equal(reference(tokens), before)
    assert not torch.allclose(policy(tokens), before)


def test_without_train_layers_the_reference_has_nothing_in_common():
    policy = make_gpt(n_layer=3)
    assert not storages(make_reference(policy)) & storages(policy)


@pytest.mark.parametrize("make", [make_scalar, make_told])
def test_a_value_model_from_the_same_start_shares_the_policy_s_blocks(make):
    """One that was trained with --train_layers from the policy's start has the same frozen numbers: one set is enough.
    Its own parts stay its own, and its values stay what they were."""
    value_model = make(n_layer=3, dtype=torch.float64)
    policy = copy.deepcopy(value_model.gpt)
    choose_trainable(policy, LAST[1])
    choose_trainable(value_model, LAST[1])
    changed(value_model)  # its training
    tokens = torch.randint(0, 23, (2, 6), generator=rng())
    before = value_model(tokens)
    assert not storages(value_model) & storages(policy)
    share_frozen(value_model.gpt, policy)
    assert value_model.gpt.frozen == 2
    frozen = {p.data_ptr() for p in policy.parameters() if not p.requires_grad}
    assert storages(value_model) & storages(policy) == frozen
    assert torch.equal(value_model(tokens), before)
    torch.testing.assert_close(value_model(tokens, below=trunk(policy, tokens)), before, rtol=0, atol=1e-12)
    names = {name for name, p in value_model.named_parameters() if p.requires_grad}
    assert names and all(n.startswith(("gpt.h.2.", "gpt.ln_f.", "head.", "block.", "ln.", "direction")) for n in names)


def test_a_value_model_that_differs_in_one_number_shares_nothing():
    """Half a trunk in common is none: its values would be those of another network."""
    policy = frozen_gpt()
    value_model = make_scalar(n_layer=3, dtype=torch.float64)
    value_model.gpt.load_state_dict(policy.state_dict())
    with torch.no_grad():
        value_model.gpt.h[1].mlp.c_proj.bias[3] += 1e-9
    tokens = torch.randint(0, 23, (2, 6), generator=rng())
    before = value_model(tokens)
    train_like(value_model, policy, LAST[1])
    assert value_model.gpt.frozen == 0 and not storages(value_model) & storages(policy)
    assert torch.equal(value_model(tokens, below=trunk(policy, tokens)), before)


@pytest.mark.parametrize("n_layer", [1, 4])
def test_a_value_model_of_another_depth_shares_nothing(n_layer):
    policy, value_model = frozen_gpt(2), make_scalar(n_layer=n_layer, dtype=torch.float64)
    share_frozen(value_model.gpt, policy)
    assert value_model.gpt.frozen == 0 and not storages(value_model) & storages(policy)


# ------------------------------------------------------------------------------------------------ PPO on it


def world():
    """policy, reference, value model and a rollout, of one start."""
    policy = frozen_gpt(1, seed=3)
    value_model = make_told(n_layer=3, dtype=torch.float64, seed=7)
    value_model.gpt.load_state_dict(policy.state_dict())
    spread(value_model.gpt.h[2], 11, scale=0.05)
    reference = make_reference(policy)
    changed(policy)
    train_like(value_model, policy, LAST[1])
    assert value_model.gpt.frozen == 2
    prompts = random_prompts([1, 5, 9, 2, 3, 7, 4], 23, seed=1)
    rollout = generate(policy, prompts, 8, eos_id=EOS, temperature=0.7, generator=rng(1))
    return policy, reference, value_model, rollout


def ppo_config(**changes) -> ppo.Config:
    settings = {"temperature": 0.7, "micro_batch": 3, "minibatch": 4, "ppo_epochs": 2, "device": "cpu", "lr": 1e-2}
    return ppo.Config(**{**settings, "value_lr": 1e-2, **changes})


def test_frozen_blocks_run_once_for_three_networks_and_never_in_the_update(monkeypatch):
    """The whole point: what is known is not computed again."""
    policy, reference, value_model, rollout = world()
    runs: list[int] = []
    for model in (policy, reference, value_model.gpt):
        for i, block in enumerate(model.h):
            block.register_forward_hook(lambda *_, i=i: runs.append(i))
    config = ppo_config(micro_batch=4)  # 7 rows: two micro-batches
    experience = ppo.make_experience(
        policy, reference, value_model, rollout, torch.ones(7, dtype=torch.float64), 0.1, config
    )
    assert sorted(runs) == [0] * 2 + [1] * 2 + [2] * 6
    runs.clear()
    ppo.update(policy, value_model, ppo.make_optimizer(policy, value_model, config), experience, config, rng())
    assert set(runs) == {2}


# ------------------------------------------------------------------------------------------------ sampling in bfloat16


def test_the_cache_holds_what_autocast_computes():
    like, config = torch.zeros(1), make_gpt().config
    with autocast(torch.device("cpu"), "bfloat16"):
        assert KVCache(1, 1, config, like).kv[0].dtype == torch.bfloat16
    assert KVCache(1, 1, config, like.double()).kv[0].dtype == torch.float64


@pytest.mark.parametrize("kind", KINDS)
def test_sampling_in_bfloat16_samples_from_the_same_model(kind):
    """The likeliest tokens are, up to bfloat16's rounding, the likeliest in float32: a cache that loses keys, or logits
    in bfloat16, would take others."""
    model = make_gpt(n_layer=3, seed=2, **kind)
    prompts = random_prompts([1, 5, 9, 2], 23, seed=1)
    with autocast(model.device, "bfloat16"):
        rollout = generate(model, prompts, 12, eos_id=EOS, temperature=0)
    with torch.no_grad():
        logits = model(rollout.tokens)[:, :-1]
    chosen = logits.gather(2, rollout.tokens[:, 1:, None]).squeeze(2)
    behind = (logits.amax(-1) - chosen)[rollout.action_mask]
    spread_of_logits = logits.std(-1)[rollout.action_mask]
    assert (behind <= 0.05 * spread_of_logits).all()


def test_sampling_leaves_the_weights_as_frozen_as_they_were():
    model = frozen_gpt()
    before = [p.requires_grad for p in model.parameters()]
    with pytest.raises(KeyboardInterrupt), cast_once(model):
        assert all(p.requires_grad for p in model.parameters())
        raise KeyboardInterrupt
    assert [p.requires_grad for p in model.parameters()] == before


def test_weights_are_cast_once_however_many_steps_there_are():
    """Autocast casts a weight that asks for no gradient anew in every step: three times the memory traffic."""
    casts = []
    for n in (4, 12):
        model = make_gpt(n_layer=3)
        choose_trainable(model, LAST[1])
        with (
            profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler,
            autocast(model.device, "bfloat16"),
        ):
            generate(model, [[1, 2, 3]], n, eos_id=99, generator=rng())
        shape = list(model.h[0].mlp.c_fc.weight.shape)
        shaped = [e for e in profiler.events() if e.name == "aten::_to_copy" and e.input_shapes[:1] == [shape]]
        casts.append(len(shaped))
    assert casts == [3, 3]  # once for each of three blocks
