"""Stage 3a, one iteration: make_experience and update against slow float64 ones, row by row without filler."""

from __future__ import annotations

import collections
import copy
import math
from dataclasses import fields, replace

import pytest
import torch
from helpers import (
    EOS,
    assert_same_weights,
    completion_logprobs,
    descend,
    distance,
    gae_by_definition,
    make_gpt,
    make_scalar,
    randn,
    random_prompts,
    rng,
    slow_hidden,
    spoil,
    spread,
)
from torch import Tensor

import ppo
from frozen import train_last_layers
from lib.cli import UserError
from data.batches import Example
from frame import whiten
from model import GPT, GPTConfig
from sampling import Rollout, generate
from ppo import Config, Experience, make_experience, policy_loss, ptx_losses, update

# ------------------------------------------------------------------------------------------------ experience


def tiny_config(**changes) -> Config:
    settings = {"temperature": 0.7, "micro_batch": 3, "minibatch": 4, "ppo_epochs": 2, "gamma": 0.98, "lam": 0.95}
    settings |= {"clip": 0.2, "value_clip": 0.5, "kl": "k1", "whiten_advantages": False, "device": "cpu"}
    return Config(**{**settings, **changes})


def tiny_world(
    seed: int = 0,
    B: int = 7,
    temperature: float = 0.7,
    dtype: torch.dtype = torch.float64,
    rope_base: float = 0.0,
    told: bool = True,
):
    """policy, reference, value model, and a rollout of prompts of unequal length, some of its
    completions cut. Dropout is configured. In float64: another batch shape or padding moves a float32
    figure by an amount that differs between CPUs. told: the value model is told how expected each token was."""
    policy = make_gpt(seed, dropout=0.1, dtype=dtype, rope_base=rope_base)
    reference = copy.deepcopy(policy).requires_grad_(False)
    spread(reference, seed + 5, scale=0.05)
    value_model = make_scalar(seed + 7, told, dropout=0.1, dtype=dtype, rope_base=rope_base)
    value_model.mean.fill_(0.3)
    value_model.std.fill_(2.0)
    prompts = random_prompts([1, 5, 9, 2, 3, 7, 4, 6][:B], 23, seed=seed)  # EOS, id 22, may stand in a prompt
    rollout = generate(policy, prompts, 8, eos_id=EOS, temperature=temperature, generator=rng(seed + 1))
    return policy, reference, value_model, rollout


def slow_rows(
    policy, reference, value_model, rollout: Rollout, scores: Tensor, kl_coef: float, config: Config
) -> list[dict[str, Tensor]]:
    """The same figures, row by row without filler, in float64, by enumeration over the
    vocabulary and by the definition of GAE."""
    policy, reference, value_model = (copy.deepcopy(m).eval() for m in (policy, reference, value_model))
    rows = []
    for i, (P, n) in enumerate(zip(rollout.prompt_lens.tolist(), rollout.lens.tolist(), strict=True)):
        ids = rollout.tokens[i, :n].tolist()
        row: dict[str, list] = {k: [] for k in ("logprobs", "ref_logprobs", "kl", "entropy", "values")}
        logits, ref_logits = (m(torch.tensor([ids]))[0] / config.temperature for m in (policy, reference))
        raw = value_model.head(slow_hidden(value_model, ids))[:, 0]
        for t in range(P, n):  # token t was sampled from the distribution at t - 1
            p, q = (x[t - 1].exp() / x[t - 1].exp().sum() for x in (logits, ref_logits))
            row["logprobs"].append(p[ids[t]].log())
            row["ref_logprobs"].append(q[ids[t]].log())
            row["entropy"].append(-sum(x * x.log() for x in p))
            exact = sum(a * (a / b).log() for a, b in zip(p, q, strict=True))
            d = p[ids[t]].log() - q[ids[t]].log()
            row["kl"].append({"k1": d, "k2": d * d / 2, "k3": (-d).exp() - 1 + d, "exact": exact}[config.kl])
            row["values"].append((raw[t - 1] - value_model.mean) / value_model.std)
        found = {k: torch.stack(v).detach() for k, v in row.items()}
        found["rewards"] = -kl_coef * found["kl"]
        found["rewards"][-1] += scores[i]
        rewards, values = found["rewards"].tolist(), found["values"].tolist()
        advantages = gae_by_definition(rewards, values, config.gamma, config.lam)
        found["advantages"] = torch.tensor(advantages, dtype=torch.float64)
        found["returns"] = found["advantages"] + found["values"]
        if config.kl == "exact":  # the token's own share: without it the penalty's gradient is wrong (test_optimum.py)
            own = found["logprobs"] - found["ref_logprobs"] - found["kl"]
            found["advantages"] = found["advantages"] - kl_coef * own
        rows.append(found)
    return rows


@pytest.mark.parametrize(("rope_base", "told"), [(0.0, False), (100.0, True)])
@pytest.mark.parametrize("kl", ["k1", "k2", "k3", "exact"])
def test_experience_equals_the_slow_one(kl, rope_base, told):
    """Every figure of an iteration, at temperature 0.7 with dropout configured: a missing
    temperature in one of the log-probs, values taken after the action, KL to the wrong model, filler
    in a sum. Everything is 0 outside the actions."""
    world = tiny_world(rope_base=rope_base, told=told)
    rollout = world[3]
    assert 0 < rollout.ended.sum() < 7, "the rollout must hold ended and cut completions"
    config, scores = tiny_config(kl=kl), randn(7, seed=41)
    world[0].train()  # make_experience must switch dropout off itself
    experience = make_experience(*world, scores, 0.3, config)
    for i, row in enumerate(slow_rows(*world, scores, 0.3, config)):
        for name, expected in row.items():
            found, mask = getattr(experience, name)[i], experience.action_mask[i]
            torch.testing.assert_close(found[mask], expected, rtol=0, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")
            assert (found[~mask] == 0).all()


def test_returns_are_formed_before_whitening():
    """Returns rebuilt from whitened advantages break the critic silently; whitening over filler shifts every action."""
    world, scores = tiny_world(), randn(7, seed=42)
    plain, white = (make_experience(*world, scores, 0.3, tiny_config(whiten_advantages=w)) for w in (False, True))
    mask = plain.action_mask
    assert torch.equal(plain.returns, white.returns)
    expected = torch.where(mask, plain.advantages + plain.values, 0.0)
    torch.testing.assert_close(plain.returns, expected, rtol=0, atol=1e-12)
    values = white.advantages[mask]
    assert values.mean().item() == pytest.approx(0, abs=1e-12)
    assert values.var(correction=0).item() == pytest.approx(1, abs=1e-6)  # whiten adds 1e-8 to the variance
    assert (white.advantages[~mask] == 0).all()
    assert torch.equal(white.advantages[mask].argsort(), plain.advantages[mask].argsort())
    wide_mask = torch.cat([mask, torch.zeros(7, 9, dtype=torch.bool)], 1)
    wide = whiten(torch.cat([plain.advantages, torch.full((7, 9), 1e6)], 1), wide_mask)
    torch.testing.assert_close(wide[:, : mask.size(1)], white.advantages, rtol=0, atol=1e-11)


def columns(experience: Experience) -> dict[str, Tensor]:
    others = ("tokens", "lens", "ended", "action_mask", "below")
    return {f.name: getattr(experience, f.name) for f in fields(Experience) if f.name not in others}


@pytest.mark.parametrize("filler", [0, EOS])
def test_experience_does_not_depend_on_padding(filler):
    """7 more filler columns, of the EOS id too, change no figure of any action: pad id equal to
    EOS, or padding in KL, values, rewards."""
    *models, rollout = tiny_world()
    scores = randn(7, seed=43)
    wide = torch.full((7, rollout.tokens.size(1) + 7), filler)
    for i, n in enumerate(rollout.lens.tolist()):
        wide[i, :n] = rollout.tokens[i, :n]
    for config in (tiny_config(), tiny_config(whiten_advantages=True, kl="exact")):
        narrow = columns(make_experience(*models, rollout, scores, 0.3, config))
        found = columns(make_experience(*models, replace(rollout, tokens=wide), scores, 0.3, config))
        for name, x in narrow.items():
            real, filler_columns = found[name][:, : x.size(1)], found[name][:, x.size(1) :]
            torch.testing.assert_close(real, x, rtol=0, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")
            assert (filler_columns == 0).all()


def test_experience_does_not_depend_on_batch_mates_or_micro_batches():
    """A reward or an advantage that changes with who is in the batch, or with the size of a forward pass."""
    *models, rollout = tiny_world()
    scores = randn(7, seed=44)
    whole = columns(make_experience(*models, rollout, scores, 0.3, tiny_config()))
    for size in (0, 1, 2):
        for name, x in columns(make_experience(*models, rollout, scores, 0.3, tiny_config(micro_batch=size))).items():
            torch.testing.assert_close(x, whole[name], rtol=0, atol=1e-10)
    for i in range(7):
        n = int(rollout.lens[i])
        row = slice(i, i + 1)
        alone = Rollout(rollout.tokens[row, :n], rollout.prompt_lens[row], rollout.lens[row], rollout.ended[row])
        for name, x in columns(make_experience(*models, alone, scores[row], 0.3, tiny_config())).items():
            torch.testing.assert_close(x[0], whole[name][i, : n - 1], rtol=0, atol=1e-10)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("micro_batch", [0, 2, 3])
def test_networks_read_rows_of_similar_length_and_answer_at_the_actions_alone(micro_batch, dtype):
    """Logits of prompts and filler cost more than anything else, and so do slices as wide as the longest row of all.
    While a rollout is measured, and in an update, no other slices have less filler, and every network is asked for
    what stands before the sampled tokens and for nothing else. In bfloat16 the width stays."""
    policy, reference, value_model, rollout = tiny_world(dtype=torch.float32)
    config = tiny_config(micro_batch=micro_batch, dtype=dtype, minibatch=7, ppo_epochs=1)
    lens, T = sorted(rollout.lens.tolist()), rollout.tokens.size(1)
    slices = [lens[i : i + (micro_batch or 7)] for i in range(0, 7, micro_batch or 7)]
    shapes = [(len(part), max(part) if dtype == "float32" else T) for part in slices]
    assert lens != rollout.lens.tolist() and lens[0] < lens[-1]
    passes: dict[str, list] = {}
    asked: dict[str, int] = collections.Counter()
    for name, model in (("policy", policy), ("reference", reference), ("value_model", value_model)):

        def note(_, inputs, output, name=name):
            tokens, where = inputs
            passes.setdefault(name, []).append(tuple(tokens.shape))
            asked[name] += len(output)
            assert len(output) == int(where.sum())

        model.register_forward_hook(note)
    experience = make_experience(policy, reference, value_model, rollout, randn(7, seed=47).float(), 0.3, config)
    update(policy, value_model, sgd(policy, value_model, 0.0), experience, config, rng())
    assert passes == {"policy": shapes * 2, "reference": shapes, "value_model": shapes * 2}
    actions = int(rollout.action_mask.sum())
    assert asked == {"policy": actions * 2, "reference": actions, "value_model": actions * 2}


@pytest.mark.parametrize("kl", ["k1", "k2", "k3", "exact"])
def test_policy_equal_to_reference_has_no_kl(kl):
    """KL that is not 0 at the start: other code, dropout or temperature for one
    of the two; then reward is not score."""
    policy, _, value_model, rollout = tiny_world()
    scores = randn(7, seed=45)
    experience = make_experience(policy, copy.deepcopy(policy), value_model, rollout, scores, 0.3, tiny_config(kl=kl))
    assert experience.kl.abs().max() <= 1e-12
    torch.testing.assert_close(experience.rewards.sum(1), scores, rtol=0, atol=1e-12)


def eos_lover(seed: int = 0):
    """A policy that ends every text at once."""
    policy = make_gpt(seed)
    with torch.no_grad():
        policy.ln_f.weight.zero_()
        policy.wte.weight[EOS] = 100 * policy.ln_f.bias / policy.ln_f.bias.norm() ** 2
    return policy


def test_eos_as_first_action():
    """A completion that is EOS alone has one action, not an empty mask with the score on the prompt."""
    policy, value_model = eos_lover(), make_scalar(3)
    rollout = generate(policy, [[1], [2, 3, 4], [EOS, 5]], 6, eos_id=EOS, generator=rng())
    assert rollout.action_mask.int().tolist() == [[1, 0, 0], [0, 0, 1], [0, 1, 0]]
    scores, expected = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([[1.0, 0, 0], [0, 0, 2.0], [0, 3.0, 0]])
    experience = make_experience(policy, policy, value_model, rollout, scores, 0.3, tiny_config())
    torch.testing.assert_close(experience.rewards, expected, rtol=0, atol=1e-6)


def test_eos_in_the_prompt_ends_nothing():
    """Looking for EOS in the whole text instead of in the completion: a cut completion would count as ended."""
    policy = make_gpt(4)
    with torch.no_grad():  # a policy that never says EOS
        policy.ln_f.weight.zero_()
        policy.wte.weight[EOS] = -100 * policy.ln_f.bias / policy.ln_f.bias.norm() ** 2
    rollout = generate(policy, [[EOS, 1], [1, EOS], [EOS]], 5, eos_id=EOS, generator=rng())
    assert rollout.ended.tolist() == [False] * 3
    assert (rollout.lens - rollout.prompt_lens).tolist() == [5] * 3
    assert rollout.action_mask.sum(1).tolist() == [5] * 3


# ------------------------------------------------------------------------------------------------ the update


def sgd(policy, value_model, lr: float) -> torch.optim.SGD:
    return torch.optim.SGD([p for m in (policy, value_model) for p in m.parameters() if p.requires_grad], lr=lr)


def prepared(seed: int = 0, B: int = 7, told: bool = True, **changes):
    """policy, value model, experience, config."""
    config = tiny_config(**{"whiten_advantages": True, "grad_clip": 1e9, "stop_kl": 0.0, "minibatch": B, **changes})
    *models, rollout = tiny_world(seed, B, config.temperature, told=told)
    experience = make_experience(*models, rollout, randn(B, seed=46), 0.3, config)
    return models[0], models[2], experience, config


def slow_update(
    policy, value_model, experience: Experience, config: Config, lr: float
) -> tuple[object, object, dict[str, float]]:
    """PPO as one would write it down: row by row without filler, float64, whole batch, plain gradient
    descent. -> new models, mean figures."""
    policy, value_model = copy.deepcopy(policy), copy.deepcopy(value_model)
    N = int(experience.action_mask.sum())
    steps: list[list[float]] = []
    for _ in range(config.ppo_epochs):
        p_loss, v_loss, clipped, v_clipped, approx_kl = (torch.zeros((), dtype=torch.float64) for _ in range(5))
        for i, n in enumerate(experience.lens.tolist()):
            ids, mask = experience.tokens[i, :n].tolist(), experience.action_mask[i]
            P = n - int(mask.sum())
            old, A = experience.logprobs[i][mask], experience.advantages[i][mask]
            old_v, R = experience.values[i][mask], experience.returns[i][mask]
            new = completion_logprobs(policy, ids[:P], ids[P:], config.temperature)
            raw = value_model.head(slow_hidden(value_model, ids))[P - 1 : n - 1, 0]
            v = (raw - value_model.mean) / value_model.std
            for t in range(n - P):
                ratio = (new[t] - old[t]).exp()
                gain, held = A[t] * ratio, A[t] * ratio.clamp(1 - config.clip, 1 + config.clip)
                p_loss, clipped = p_loss - min(gain, held), clipped + (held < gain).double()
                held_v = old_v[t] + (v[t] - old_v[t]).clamp(-config.value_clip, config.value_clip)
                free, near = v[t] - R[t], held_v - R[t]
                v_loss, v_clipped = v_loss + max(free**2, near**2) / 2, v_clipped + (near**2 > free**2).double()
                approx_kl = approx_kl + ratio - 1 - ratio.log()
        steps.append([x.item() / N for x in (p_loss, v_loss, clipped, v_clipped, approx_kl)])
        descend(policy, p_loss / N, lr)
        descend(value_model, v_loss / N, lr)
    names = ("policy_loss", "value_loss", "clip_fraction", "value_clip_fraction", "approx_kl")
    return policy, value_model, {k: sum(s[i] for s in steps) / len(steps) for i, k in enumerate(names)}


@pytest.mark.parametrize(("micro_batch", "told"), [(0, False), (1, True), (2, True), (3, False)])
def test_an_update_equals_the_slow_one_for_any_micro_batch(float64, micro_batch, told):
    """Three whole steps, two of them away from ratio 1, with clipping at work: a mean for each micro-batch, a mask or a
    frame that is off, a missing temperature, value clipping with min, losses that flow into the wrong network."""
    settings = {"micro_batch": micro_batch, "ppo_epochs": 3, "value_clip": 0.05}
    policy, value_model, experience, config = prepared(told=told, **settings)
    before = copy.deepcopy(policy), copy.deepcopy(value_model)
    expected_policy, expected_value, figures = slow_update(policy, value_model, experience, config, lr=0.05)
    for name in ("clip_fraction", "value_clip_fraction", "approx_kl"):
        assert figures[name] > 0.005, "clipping must be at work"
    stats = update(policy, value_model, sgd(policy, value_model, 0.05), experience, config, rng())
    assert_same_weights(policy, expected_policy, before[0])
    assert_same_weights(value_model, expected_value, before[1])
    assert {k: stats[k] for k in figures} == pytest.approx(figures, rel=1e-9)
    assert stats["updates"] == 3


def test_the_order_of_the_rows_does_not_matter():
    """An experience in another order, with another permutation, takes the same step."""
    policy, value_model, experience, config = prepared(micro_batch=2, ppo_epochs=2)
    before, trained = copy.deepcopy(policy), []
    for seed, order in enumerate(([0, 1, 2, 3, 4, 5, 6], [6, 2, 0, 5, 1, 4, 3])):
        p, v = copy.deepcopy(policy), copy.deepcopy(value_model)
        shuffled = Experience(*(getattr(experience, f.name)[order] for f in fields(Experience)[:-1]))
        update(p, v, sgd(p, v, 0.05), shuffled, config, rng(seed))
        trained.append(p)
    assert_same_weights(trained[1], trained[0], before)


def test_garbage_at_masked_places_does_not_reach_the_weights(float64):
    """Ids, old log-probs, advantages, values and returns of prompt and filler positions,
    and 7 more columns, change no weight."""
    policy, value_model, experience, config = prepared(micro_batch=2, ppo_epochs=2)
    before, trained = copy.deepcopy(policy), []
    mask = experience.action_mask
    spoilt = {k: torch.cat([spoil(x, mask, 1e6), torch.full((7, 7), 1e6)], 1) for k, x in columns(experience).items()}
    tokens = torch.where(torch.arange(experience.tokens.size(1)) < experience.lens[:, None], experience.tokens, 3)
    wide_tokens, wide_mask = torch.cat([tokens, torch.full((7, 7), 5)], 1), torch.cat([mask, mask.new_zeros(7, 7)], 1)
    wide = Experience(wide_tokens, experience.lens, experience.ended, wide_mask, **spoilt)
    values = []
    for source in (experience, wide):
        p, v = copy.deepcopy(policy), copy.deepcopy(value_model)
        stats = update(p, v, sgd(p, v, 0.05), source, config, rng())
        trained.append((p, v))
        values.append({k: x for k, x in stats.items() if k != "first_ratio"})
    assert_same_weights(trained[1][0], trained[0][0], before)
    assert_same_weights(trained[1][1], trained[0][1], value_model)
    assert values[1] == pytest.approx(values[0], rel=1e-9)


@pytest.mark.parametrize("temperature", [0.7, 1.0])
@pytest.mark.parametrize("micro_batch", [1, 3, 0])
def test_the_first_ratio_is_1(float64, temperature, micro_batch):
    """Rollout and update computing different log-probs: unequal prompts, dropout configured,
    minibatch other than the rollout batch."""
    policy, value_model, experience, config = prepared(temperature=temperature, minibatch=3, micro_batch=micro_batch)
    policy.train()  # update must switch dropout off itself
    value_model.train()
    stats = update(policy, value_model, sgd(policy, value_model, 1e-3), experience, config, rng())
    assert abs(stats["first_ratio"] - 1) <= 1e-10


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("offset", [0.01, -0.01, math.nan])
def test_a_ratio_that_starts_off_1_stops_the_run(offset, dtype):
    """Old log-probs of another function, dtype or temperature must be noticed, not trained on; a nan too. In bfloat16
    no less: a limit of 1.2 there let everything pass."""
    policy, value_model, experience, config = prepared(micro_batch=2, dtype=dtype)
    # one row, of the first micro-batch: the others are right
    spoilt = experience.action_mask & (torch.arange(7)[:, None] == experience.lens.argmin())
    wrong = replace(experience, logprobs=torch.where(spoilt, experience.logprobs + offset, experience.logprobs))
    before = copy.deepcopy(policy)
    with pytest.raises(RuntimeError, match="ratio"):
        update(policy, value_model, sgd(policy, value_model, 0.1), wrong, config, rng())
    for a, b in zip(policy.parameters(), before.parameters(), strict=True):
        assert torch.equal(a, b)


def test_another_temperature_in_the_update_stops_the_run():
    """A rollout at one temperature and an update at another: a biased ratio."""
    policy, value_model, experience, config = prepared(temperature=0.7)
    with pytest.raises(RuntimeError, match="ratio"):
        update(policy, value_model, sgd(policy, value_model, 0.1), experience, replace(config, temperature=1.0), rng())


def test_without_learning_the_log_ratio_stays_0(float64):
    """lr = 0: whatever moves the log-ratio in later epochs (dropout, batch composition) is a bug."""
    policy, value_model, experience, config = prepared(minibatch=3, micro_batch=2, ppo_epochs=4)
    policy.train()
    value_model.train()
    stats = update(policy, value_model, sgd(policy, value_model, 0.0), experience, config, rng())
    assert abs(stats["approx_kl"]) < 1e-18
    assert stats["clip_fraction"] == 0
    assert stats["updates"] == 4 * 3


def test_every_rollout_is_used_once_an_epoch_in_a_fresh_order(monkeypatch):
    """A remainder that is dropped when the minibatch doesn't divide the rollouts, or one permutation for all epochs."""
    policy, value_model, experience, config = prepared(minibatch=3, micro_batch=1, ppo_epochs=3, lr=0.0)
    seen: list[int] = []
    rows = [experience.logprobs[i][experience.action_mask[i]].tolist() for i in range(7)]

    def watch(logprobs, old_logprobs, advantages, action_mask, *rest):
        seen.append(rows.index(old_logprobs[0][action_mask[0]].tolist()))
        return policy_loss(logprobs, old_logprobs, advantages, action_mask, *rest)

    monkeypatch.setattr(ppo, "policy_loss", watch)
    stats = update(policy, value_model, sgd(policy, value_model, 0.0), experience, config, rng())
    assert stats["updates"] == 9
    epochs = [seen[i : i + 7] for i in (0, 7, 14)]
    assert [sorted(e) for e in epochs] == [list(range(7))] * 3
    minibatches = {tuple(sorted(e[:3])) for e in epochs}
    assert len(minibatches) > 1


BFLOAT16 = {"dtype": "bfloat16", "temperature": 1.0, "minibatch": 5, "micro_batch": 3, "ppo_epochs": 1}


def gpt2_like(shift: float) -> GPT:
    """GPT-2's width and vocabulary, one block, and logits that stand at `shift`, as GPT-2's own do at about -100."""
    torch.manual_seed(0)
    policy = GPT(GPTConfig(50257, 48, n_layer=1, n_head=12, n_embd=768)).eval()
    with torch.no_grad():
        far = torch.nn.functional.normalize(torch.randn(768), dim=0)
        policy.ln_f.bias += 100 * far
        policy.wte.weight += shift / 100 * far
    return policy


def test_bfloat16_keeps_the_ratios_of_a_network_of_gpt2_s_size():
    """Logits that leave the head in bfloat16 are 0.5 apart at -100: 6.7% of the tokens lay outside the clip after a
    step that moved nothing, or the run stopped because the first ratio was not 1. Prompts of unequal length, a
    minibatch and micro-batches that divide nothing, and a step of 1e-6."""
    policy = gpt2_like(shift=-100.0)
    with torch.no_grad():
        assert policy(torch.tensor([[1, 2, 3]])).mean().item() == pytest.approx(-100, abs=15)
    prompts = random_prompts([1, 17, 9, 2, 12, 5, 20], 50257, seed=1)
    rollout = generate(policy, prompts, 22, eos_id=50256, generator=rng(2))
    config = tiny_config(**BFLOAT16, lr=1e-6)
    experience = make_experience(policy, policy, None, rollout, randn(7, seed=50).float(), 0.3, config)
    stats = update(policy, None, ppo.make_optimizer(policy, None, config), experience, config, rng())
    assert stats["updates"] == 2
    assert abs(stats["first_ratio"] - 1) < 1e-3
    after = ppo.measure(policy, policy, None, rollout, config)["logprobs"]
    mask = experience.action_mask
    assert mask.sum() > 150
    ratio = (after - experience.logprobs)[mask].exp()
    assert ((ratio - 1).abs() > config.clip).float().mean().item() < 1e-3
    assert stats["clip_fraction"] < 1e-3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_dtype_holds_for_the_products_of_every_forward_pass(dtype):
    """--dtype that is ignored in the update, in a network or in the PTX term: memory and time as without it. The
    blocks' products are in that dtype; logits and values, and all weights, stay in float32."""
    config = tiny_config(dtype=dtype, ptx_coef=0.5)
    policy, reference, value_model, rollout = tiny_world(dtype=torch.float32)
    wanted = getattr(torch, dtype)
    products: dict[str, set] = {}

    def watch(name: str, model) -> None:
        seen = products.setdefault(name, set())
        for module in model.modules():
            if isinstance(module, torch.nn.Linear) and module is not getattr(model, "head", None):
                module.register_forward_hook(lambda _, __, output: seen.add(output.dtype))
        model.register_forward_hook(lambda _, __, output: products.setdefault("output", set()).add(output.dtype))

    for name, model in (("policy", policy), ("reference", reference), ("value_model", value_model)):
        watch(name, model)
    experience = make_experience(policy, reference, value_model, rollout, randn(7, seed=51).float(), 0.3, config)
    assert products == {k: {wanted} for k in ("policy", "reference", "value_model")} | {"output": {torch.float32}}
    for seen in products.values():
        seen.clear()
    update(policy, value_model, sgd(policy, value_model, 0.0), experience, config, rng())
    assert products == {"policy": {wanted}, "reference": set(), "value_model": {wanted}, "output": {torch.float32}}
    for seen in products.values():
        seen.clear()
    list(ptx_losses(policy, [Example([1, 2], [3, 4, 5, EOS])], config, 0)())
    assert products["policy"] == {wanted}
    assert {p.dtype for p in policy.parameters()} == {torch.float32}


def test_adam_divides_by_a_small_eps(float64):
    """Adam's first step is lr * g / (|g| + eps) in every coordinate: an eps of 1e-2 makes it plain SGD for gradients
    of this size, one of 1e-8 makes the first steps huge. Each network at its own learning rate."""
    policy, value_model = make_gpt(0), make_scalar(3)
    optimizer = ppo.make_optimizer(policy, value_model, tiny_config(lr=3e-3, value_lr=7e-3))
    for model, lr in ((policy, 3e-3), (value_model, 7e-3)):
        before = copy.deepcopy(model)
        for p in model.parameters():
            p.grad = torch.full_like(p, -2e-5)
        optimizer.step()
        optimizer.zero_grad()
        for p, start in zip(model.parameters(), before.parameters(), strict=True):
            expected = torch.full_like(p, lr * 2e-5 / (2e-5 + 1e-5))
            torch.testing.assert_close(p - start, expected, rtol=1e-6, atol=0)


def test_rows_are_cut_to_the_longest_of_them_or_left_as_wide():
    """Rows that keep another row's columns, or lose their own."""
    _, _, experience, _ = prepared()
    shortest = experience.lens.argsort()[:3].tolist()
    T, longest = experience.tokens.size(1), int(experience.lens[shortest].max())
    assert longest < T
    for cut, width in ((True, longest), (False, T)):
        part = experience.rows(shortest, cut)
        assert part.tokens.shape == (3, width)
        assert torch.equal(part.lens, experience.lens[shortest]) and torch.equal(part.ended, experience.ended[shortest])
        for n, i in enumerate(shortest):
            length = int(experience.lens[i])
            assert torch.equal(part.tokens[n, :length], experience.tokens[i, :length])
        for name, column in columns(experience).items():
            assert getattr(part, name).shape == (3, width - 1)
            assert torch.equal(getattr(part, name), column[shortest, : width - 1]), name
        assert torch.equal(part.action_mask.sum(1), experience.action_mask[shortest].sum(1))


def test_without_a_value_model_the_policy_learns_the_same(float64):
    """The value model's place may be empty: values are 0, and the policy takes the step that it takes beside one."""
    policy, value_model, experience, config = prepared(micro_batch=2, ppo_epochs=2)
    before, expected = copy.deepcopy(policy), copy.deepcopy(policy)
    update(expected, value_model, sgd(expected, value_model, 0.05), experience, config, rng())
    stats = update(policy, None, torch.optim.SGD(policy.parameters(), lr=0.05), experience, config, rng())
    assert_same_weights(policy, expected, before)
    assert stats["updates"] == 2
    *models, rollout = tiny_world()
    told = ppo.measure(models[0], models[1], None, rollout, config)
    beside = ppo.measure(*models, rollout, config)
    assert (told.pop("values") == 0).all()
    assert set(told) == set(beside) - {"values"}
    for name, column in told.items():
        torch.testing.assert_close(column, beside[name], rtol=0, atol=1e-12)


def test_early_stop_leaves_the_weights_unmoved():
    """A policy that has moved too far is not moved further: only the first of five epochs takes a step."""
    policy, value_model, experience, config = prepared(ppo_epochs=5, stop_kl=1e-3, micro_batch=2)
    once = copy.deepcopy(policy), copy.deepcopy(value_model)
    stats = update(policy, value_model, sgd(policy, value_model, 0.3), experience, config, rng())
    update(*once, sgd(*once, 0.3), experience, replace(config, ppo_epochs=1), rng())
    assert (stats["stopped_early"], stats["updates"]) == (True, 1)
    for model, expected in zip((policy, value_model), once, strict=True):
        for a, b in zip(model.parameters(), expected.parameters(), strict=True):
            assert torch.equal(a, b)


def test_early_stop_can_be_off_and_stays_out_of_the_way():
    """stop_kl 0 means never, not always; a large one stops nothing."""
    for target in (0.0, 1e6):
        policy, value_model, experience, config = prepared(ppo_epochs=3, stop_kl=target)
        stats = update(policy, value_model, sgd(policy, value_model, 0.3), experience, config, rng())
        assert (stats["stopped_early"], stats["updates"]) == (False, 3)


def test_policy_and_value_are_trained_apart():
    """A shared trunk, or losses that flow into the other network: no advantage moves no
    policy, no value error moves no critic."""
    policy, value_model, experience, config = prepared(value_clip=0.0)
    still = copy.deepcopy(policy), copy.deepcopy(value_model)
    calm = replace(experience, advantages=torch.zeros_like(experience.advantages))
    update(policy, value_model, sgd(policy, value_model, 0.1), calm, config, rng())
    assert all(torch.equal(a, b) for a, b in zip(policy.parameters(), still[0].parameters(), strict=True))
    assert not torch.equal(value_model.head.weight, still[1].head.weight)

    policy, value_model = copy.deepcopy(still[0]), copy.deepcopy(still[1])
    with torch.no_grad():
        values = value_model(experience.tokens)[:, :-1]
    right = replace(experience, returns=torch.where(experience.action_mask, values, 0.0))
    update(policy, value_model, sgd(policy, value_model, 0.1), right, replace(config, ppo_epochs=1), rng())
    assert distance(value_model, still[1]) < 1e-12
    assert not torch.equal(policy.wte.weight, still[0].wte.weight)


def test_gradients_are_clipped_separately_after_they_are_there():
    """Clipping before backward, or one norm for both networks: the length of each network's step tells."""
    policy, value_model, experience, config = prepared(grad_clip=1e-3, ppo_epochs=1, micro_batch=2)
    before = copy.deepcopy(policy), copy.deepcopy(value_model)
    stats = update(policy, value_model, sgd(policy, value_model, 1.0), experience, config, rng())
    for model, start in zip((policy, value_model), before, strict=True):
        assert distance(model, start) == pytest.approx(1e-3, rel=1e-2)
    assert stats["grad_norm"] > 1e-2


def test_a_gradient_norm_of_0_is_no_limit():
    """--grad_clip 0 trained nothing: every gradient was scaled to length 0. It is the step of a limit out of reach."""
    steps = []
    for limit in (0.0, 1e9):
        policy, value_model, experience, config = prepared(grad_clip=limit, micro_batch=2)
        before = copy.deepcopy(policy)
        stats = update(policy, value_model, sgd(policy, value_model, 0.1), experience, config, rng())
        steps.append((distance(policy, before), stats["grad_norm"]))
    assert steps[0] == steps[1]
    assert steps[0][0] > 1e-3


def test_frozen_layers_stay_as_they_are():
    """Training the last block only: everything else, the tied embedding above
    all, has no gradient and doesn't change."""
    policy, value_model, experience, config = prepared(ppo_epochs=2)
    train_last_layers(policy, 1)
    before = copy.deepcopy(policy.state_dict())
    optimizer = ppo.make_optimizer(policy, value_model, config)
    update(policy, value_model, optimizer, experience, config, rng())
    for name, p in policy.named_parameters():
        trained = name.startswith(("h.1.", "ln_f."))
        assert (p.grad is not None) == trained, name
        assert torch.equal(p, before[name]) != trained, name
    with pytest.raises(UserError, match="--train_layers 3: the model has 2 blocks"):
        train_last_layers(policy, 3)
    whole = make_gpt(0)
    train_last_layers(whole, 0)
    assert all(p.requires_grad for p in whole.parameters())
    train_last_layers(value_model, 1)
    names = {name for name, p in value_model.named_parameters() if p.requires_grad}
    above = ("gpt.h.1.", "gpt.ln_f.", "direction", "block.", "ln.", "head.")
    assert names == {n for n, _ in value_model.named_parameters() if n.startswith(above)}


@pytest.mark.parametrize("micro_batch", [0, 1, 3])
def test_the_pretraining_term_counts_once_a_step(micro_batch):
    """PPO-ptx: coefficient times the SFT loss of a batch of demonstrations, once
    a step however the rollouts are split."""
    policy, value_model, experience, config = prepared(micro_batch=micro_batch, ppo_epochs=1, ptx_coef=0.5)
    demonstrations = [Example([1, 2], [3, 4, 5, EOS])]  # a single one, so every batch of it has the same loss
    before, expected = copy.deepcopy(policy), copy.deepcopy(policy)
    descend(expected, -0.5 * completion_logprobs(expected, [1, 2], [3, 4, 5, EOS]).mean(), 0.1)
    calm = replace(experience, advantages=torch.zeros_like(experience.advantages))
    extra = ptx_losses(policy, demonstrations, config, iteration=0)
    update(policy, value_model, sgd(policy, value_model, 0.1), calm, config, rng(), extra)
    assert_same_weights(policy, expected, before)


DEMONSTRATIONS = [
    Example([1, 2], [3, 4, 5, EOS]),
    Example([7], [8, EOS]),
    Example([2, 3, 4, 5, 6], [9]),  # cut
    Example([1], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, EOS]),
]


@pytest.mark.parametrize("micro_batch", [0, 1, 2, 3, 16])
def test_the_pretraining_term_goes_in_micro_batches(monkeypatch, micro_batch):
    """--micro_batch must hold for the demonstrations too, whose texts may be longer than the rollouts: no forward pass
    with more rows, and the same gradient for any size, that of the mean over all tokens of the drawn batch."""
    policy, config = make_gpt(0, dtype=torch.float64), tiny_config(ptx_coef=0.5, minibatch=7, micro_batch=micro_batch)
    drawn: list[int] = []
    original = torch.randint

    def record(*args, **options):
        drawn.extend(original(*args, **options).tolist())
        return torch.tensor(drawn)

    monkeypatch.setattr(torch, "randint", record)
    widths: list[tuple[int, ...]] = []
    policy.register_forward_pre_hook(lambda _, inputs: widths.append(tuple(inputs[0].shape)))
    losses = list(ptx_losses(policy, DEMONSTRATIONS, config, iteration=3)())
    assert sum(rows for rows, _ in widths) == 7 == len(drawn)
    assert max(rows for rows, _ in widths) == (min(micro_batch, 7) or 7)
    sum(losses).backward()
    slow = make_gpt(0, dtype=torch.float64)
    batch = [DEMONSTRATIONS[i] for i in drawn]
    total = sum(completion_logprobs(slow, e.prompt, e.completion).sum() for e in batch)
    (-0.5 * total / sum(len(e.completion) for e in batch)).backward()
    for (name, p), expected in zip(policy.named_parameters(), slow.parameters(), strict=True):
        torch.testing.assert_close(p.grad, expected.grad, rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


def test_the_pretraining_term_draws_anew_in_every_step():
    """The same demonstrations in every step of a run would be learned by heart; a resumed iteration draws the same."""
    policy, config = make_gpt(0, dtype=torch.float64), tiny_config(ptx_coef=0.5, minibatch=16, micro_batch=0)

    def totals(iteration: int) -> list[float]:
        losses = ptx_losses(policy, DEMONSTRATIONS, config, iteration)
        return [sum(losses()).item() for _ in range(3)]

    first, second = totals(0), totals(1)
    assert len({round(x, 9) for x in first + second}) == 6
    assert totals(1) == second
