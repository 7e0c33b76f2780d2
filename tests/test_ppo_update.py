"""Stage 3a, one iteration: make_experience and update against slow float64 ones, row by row without filler."""

from __future__ import annotations

import collections
import copy
import math
from dataclasses import replace

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
    spread,
)
from stages import eos_lover
from torch import Tensor

import ppo
from frame import check_first_ratio, whiten
from model import GPT, GPTConfig
from sampling import Rollout, generate
from ppo import Config, Experience, make_experience, update

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
    return {name: getattr(experience, name) for name in FIGURES}


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
            passes.setdefault(name, []).append(tuple(inputs[0].shape))
            asked[name] += len(output)

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


FIGURES = ("logprobs", "ref_logprobs", "kl", "k3", "entropy", "values", "rewards", "advantages", "returns")


def rows_of(experience) -> list[dict[str, Tensor]]:
    """Its figures at the actions of every row, as slow_rows gives them; and "tokens", "prompt_len" of the row."""
    rows = []
    for i, n in enumerate(experience.lens.tolist()):
        mask = experience.action_mask[i]
        row = {name: getattr(experience, name)[i][mask] for name in FIGURES}
        rows.append(row | {"tokens": experience.tokens[i, :n].tolist(), "prompt_len": n - int(mask.sum())})
    return rows


def slow_update(policy, value_model, rows: list[dict], config: Config, lr: float, value_lr: float | None = None):
    """PPO as one would write it down: row by row without filler, float64, whole batch, plain gradient
    descent. -> new models, mean figures."""
    policy, value_model = (copy.deepcopy(model).requires_grad_() for model in (policy, value_model))
    N = sum(len(row["logprobs"]) for row in rows)
    steps: list[list[float]] = []
    for _ in range(config.ppo_epochs):
        p_loss, v_loss, clipped, v_clipped, approx_kl = (torch.zeros((), dtype=torch.float64) for _ in range(5))
        for row in rows:
            ids, P, n = row["tokens"], row["prompt_len"], len(row["tokens"])
            old, A, old_v, R = (row[name] for name in ("logprobs", "advantages", "values", "returns"))
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
        descend(value_model, v_loss / N, lr if value_lr is None else value_lr)
    names = ("policy_loss", "value_loss", "clip_fraction", "value_clip_fraction", "approx_kl")
    return policy, value_model, {k: sum(s[i] for s in steps) / len(steps) for i, k in enumerate(names)}


@pytest.mark.parametrize(("micro_batch", "told"), [(0, False), (1, True), (2, True), (3, False)])
def test_an_update_equals_the_slow_one_for_any_micro_batch(float64, micro_batch, told):
    """Three whole steps, two of them away from ratio 1, with clipping at work: a mean for each micro-batch, a mask or a
    frame that is off, a missing temperature, value clipping with min, losses that flow into the wrong network."""
    settings = {"micro_batch": micro_batch, "ppo_epochs": 3, "value_clip": 0.05}
    policy, value_model, experience, config = prepared(told=told, **settings)
    before = copy.deepcopy(policy), copy.deepcopy(value_model)
    expected_policy, expected_value, figures = slow_update(policy, value_model, rows_of(experience), config, lr=0.05)
    for name in ("clip_fraction", "value_clip_fraction", "approx_kl"):
        assert figures[name] > 0.005, "clipping must be at work"
    stats = update(policy, value_model, sgd(policy, value_model, 0.05), experience, config, rng())
    assert_same_weights(policy, expected_policy, before[0])
    assert_same_weights(value_model, expected_value, before[1])
    assert {k: stats[k] for k in figures} == pytest.approx(figures, rel=1e-9)
    assert stats["updates"] == 3


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


@pytest.mark.parametrize(
    ("offset", "dtype"),
    [
        *((0.01, "float32"), (-0.01, "float32"), (math.nan, "float32")),
        *((0.03, "bfloat16"), (-0.03, "bfloat16"), (math.nan, "bfloat16")),
    ],
)
def test_a_ratio_that_starts_off_1_stops_the_run(offset, dtype):
    """Old log-probs of another function, dtype or temperature must be noticed, not trained on; a nan too. In bfloat16,
    where single ratios say little, their mean must be noticed: a limit of 1.2 there let everything pass."""
    policy, value_model, experience, config = prepared(micro_batch=2, dtype=dtype)
    spoilt = experience.action_mask
    if dtype == "float32" or math.isnan(offset):  # one row, of the first micro-batch: the others are right
        spoilt = spoilt & (torch.arange(7)[:, None] == experience.lens.argmin())
    wrong = replace(experience, logprobs=torch.where(spoilt, experience.logprobs + offset, experience.logprobs))
    before = copy.deepcopy(policy)
    with pytest.raises(RuntimeError, match="ratio"):
        update(policy, value_model, sgd(policy, value_model, 0.1), wrong, config, rng())
    for a, b in zip(policy.parameters(), before.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("exact", "largest", "stops"),
    [(True, 0.0009, False), (True, 0.0011, True), (False, 0.05, False), (False, 0.5, True), (False, math.nan, True)],
)
def test_how_far_the_first_ratio_may_be_off(exact, largest, stops):
    """Where products are rounded (bfloat16, TensorFloat-32) a few ratios out of 8 actions here are off by 0.05 in
    every run, and all is well; where they are not, 0.001 is too much."""
    off = [torch.tensor([[0.0, largest], [0.0, 0.0]]), torch.zeros(1, 2)]
    if stops:
        with pytest.raises(RuntimeError, match="first probability ratio"):
            check_first_ratio(off, torch.tensor(8), exact)
    else:
        assert check_first_ratio(off, torch.tensor(8), exact) == pytest.approx(1 + largest, abs=1e-7)


def test_which_products_are_exact(monkeypatch):
    """A GPU's float32 products are TensorFloat-32 unless the precision is "highest"; pick_device makes it "high"."""
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    for precision, on_gpu in (("highest", True), ("high", False)):
        monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda precision=precision: precision)
        assert tiny_config().exact_products(gpu) == on_gpu and tiny_config().exact_products(cpu)
        assert not any(tiny_config(dtype="bfloat16").exact_products(device) for device in (cpu, gpu))


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


BFLOAT16 = {"dtype": "bfloat16", "temperature": 1.0, "minibatch": 5, "micro_batch": 3, "ppo_epochs": 1}


def gpt2_like(shift: float) -> GPT:
    """A large vocabulary, one block, and logits that stand at `shift`, as GPT-2's own do at about -100."""
    torch.manual_seed(0)
    policy = GPT(GPTConfig(8000, 48, n_layer=1, n_head=4, n_embd=256)).eval()
    with torch.no_grad():
        far = torch.nn.functional.normalize(torch.randn(256), dim=0)
        policy.ln_f.bias += 100 * far
        policy.wte.weight += shift / 100 * far
    return policy


def test_bfloat16_keeps_the_ratios_of_a_network_whose_logits_are_far_from_0():
    """Logits that leave the head in bfloat16 are 0.5 apart at -100: 6.7% of the tokens lay outside the clip after a
    step that moved nothing, or the run stopped because the first ratio was not 1. Prompts of unequal length, a
    minibatch and micro-batches that divide nothing, and a step of 1e-6."""
    policy = gpt2_like(shift=-100.0)
    with torch.no_grad():
        assert policy(torch.tensor([[1, 2, 3]])).mean().item() == pytest.approx(-100, abs=15)
    prompts = random_prompts([1, 17, 9, 2, 12, 5, 20], 8000, seed=1)
    rollout = generate(policy, prompts, 22, eos_id=7999, generator=rng(2))
    config = tiny_config(**BFLOAT16, lr=1e-6)
    experience = make_experience(policy, policy, None, rollout, randn(7, seed=50).float(), 0.3, config)
    stats = update(policy, None, ppo.make_optimizer(policy, None, config), experience, config, rng())
    assert stats["updates"] == 2
    assert abs(stats["first_ratio"] - 1) < 1e-3
    after = make_experience(policy, policy, None, rollout, randn(7, seed=50).float(), 0.3, config).logprobs
    mask = experience.action_mask
    assert mask.sum() > 150
    ratio = (after - experience.logprobs)[mask].exp()
    assert ((ratio - 1).abs() > config.clip).float().mean().item() < 1e-3
    assert stats["clip_fraction"] < 1e-3


def test_without_a_value_model_the_policy_learns_the_same(float64):
    """The value model's place may be empty: values are 0, and the policy takes the step that it takes beside one."""
    policy, value_model, experience, config = prepared(micro_batch=2, ppo_epochs=2)
    before, expected = copy.deepcopy(policy), copy.deepcopy(policy)
    update(expected, value_model, sgd(expected, value_model, 0.05), experience, config, rng())
    stats = update(policy, None, torch.optim.SGD(policy.parameters(), lr=0.05), experience, config, rng())
    assert_same_weights(policy, expected, before)
    assert stats["updates"] == 2
    *models, rollout = tiny_world()
    beside, alone = (make_experience(*models[:2], m, rollout, randn(7, seed=1), 0.3, config) for m in (models[2], None))
    assert (alone.values == 0).all()
    for name in ("logprobs", "ref_logprobs", "kl", "k3", "entropy", "rewards"):
        torch.testing.assert_close(getattr(alone, name), getattr(beside, name), rtol=0, atol=1e-12)


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


def test_early_stop_is_in_nats_a_token():
    """Read in nats a sequence, or as another estimate, it stops at once or never: just above what the second step
    logs it stops nothing, just below it does."""
    for factor, stops in ((1.02, False), (0.98, True)):
        first = prepared(ppo_epochs=2, micro_batch=2)
        moved = 2 * update(*first[:2], sgd(*first[:2], 0.3), *first[2:], rng())["approx_kl"]  # the first step's is 0
        policy, value_model, experience, config = prepared(ppo_epochs=2, micro_batch=2, stop_kl=factor * moved)
        stats = update(policy, value_model, sgd(policy, value_model, 0.3), experience, config, rng())
        assert moved > 1e-3 and (stats["stopped_early"], stats["updates"]) == (stops, 2 - stops)


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
