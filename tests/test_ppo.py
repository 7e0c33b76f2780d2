"""Stage 3a: every formula against its definition, one whole update against a slow float64 one, and what `train` does with them."""

from __future__ import annotations

import copy
import itertools
import math
from dataclasses import fields, replace
from decimal import Decimal, localcontext
from pathlib import Path

import pytest
import torch
from helpers import finite_difference_gradient, frame_batch, gradient_of, make_gpt, make_scalar, random_prompts, spread
from test_sft import (
    EOS,
    ToyTokenizer,
    assert_same_weights,
    checkpoint,
    completion_logprobs,
    descend,
    plain_sgd,
    read_lines,
    speak_toy,
    strict_json,
    write_lines,
)
from torch import Tensor

import ppo
from common import UserError, load_file, load_model
from data.batches import Example
from model import GPT, GPTConfig, Rollout, completion_mask, generate, whiten
from ppo import (
    AdaptiveKL,
    Config,
    Experience,
    exact_kl,
    freeze_all_but_last,
    gae,
    kl_penalty,
    load_reward,
    make_experience,
    policy_loss,
    ptx_loss,
    shaped_rewards,
    update,
    value_loss,
)

CPU = torch.device("cpu")


def randn(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def spoil(x: Tensor, mask: Tensor, value: float) -> Tensor:
    """x with `value` wherever the mask is 0."""
    return torch.where(mask.bool(), x, torch.full_like(x, value))


# ------------------------------------------------------------------------------------------------ KL


def test_kl_estimators_by_hand():
    """The sign of k1 (paying for divergence) and the direction of k3 (e^d - 1 - d is another quantity) are inverted in known code bases."""
    logprobs, ref = torch.log(torch.tensor([[0.5, 0.2]])), torch.log(torch.tensor([[0.25, 0.4]]))
    ln2 = math.log(2)
    for kind, expected in (("k1", [ln2, -ln2]), ("k2", [ln2**2 / 2, ln2**2 / 2]), ("k3", [0.5 - 1 + ln2, 2 - 1 - ln2])):
        assert kl_penalty(logprobs, ref, kind)[0].tolist() == pytest.approx(expected, abs=1e-6)
    with pytest.raises(ValueError, match="k1, k2 or k3"):
        kl_penalty(logprobs, ref, "k4")


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_kl_gradient_equals_finite_differences(kind):
    """A gradient that stops at the switch between the two formulas of k3, or a detached term."""
    d = torch.tensor([-2.0, -0.5, -2e-3, -1e-4, 1e-4, 2e-3, 0.5, 2.0], dtype=torch.float64)
    found = gradient_of(lambda x: kl_penalty(x, torch.zeros_like(x), kind).sum(), d)
    expected = finite_difference_gradient(lambda x: kl_penalty(x, torch.zeros_like(x), kind).sum(), d)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-8)


def test_k3_is_exact_and_never_negative_near_zero():
    """e^-d - 1 + d cancels in float32: negative or zero KL for small d, where the truth is d^2 / 2."""
    sizes = [10.0**-e for e in range(9)] + [9e-4, 9.99e-4, 1.001e-3, 2e-3, 5e-3, 0.3, 5.0, 20.0]
    for size, sign in itertools.product(sizes, (1, -1)):
        d = torch.tensor([sign * size], dtype=torch.float32)
        with localcontext() as context:
            context.prec = 60
            exact = Decimal(d.item())
            truth = float((-exact).exp() - 1 + exact)
        value = kl_penalty(d, torch.zeros(1), "k3").item()
        assert value >= 0
        assert value == pytest.approx(truth, rel=3e-4), size


def test_extreme_log_ratios_stay_finite():
    """A token the reference finds impossible: e^100 is infinite in float32."""
    d = torch.tensor([-1e4, -100.0, 100.0, 1e4])
    for kind in ("k1", "k2", "k3"):
        assert kl_penalty(d, torch.zeros(4), kind).isfinite().all()
        assert gradient_of(lambda x, k=kind: kl_penalty(x, torch.zeros(4), k).sum(), d).isfinite().all()


def loop_exact_kl(logits: Tensor, ref_logits: Tensor) -> Tensor:
    """The definition: for every position but the last, sum over the vocabulary of p log(p / q), in float64."""
    B, T, V = logits.shape
    rows = []
    for b, t in itertools.product(range(B), range(T - 1)):
        p, q = (x[b, t].double().exp() / x[b, t].double().exp().sum() for x in (logits, ref_logits))
        rows.append(sum(p[v] * (p[v] / q[v]).log() for v in range(V)))
    return torch.stack(rows).view(B, T - 1)


def test_exact_kl_by_hand_and_by_loop():
    """KL of the wrong direction, or one slot off: the distribution at t draws token t + 1."""
    p, q = torch.log(torch.tensor([[[0.5, 0.5], [0.9, 0.1]]])), torch.log(torch.tensor([[[0.25, 0.75], [0.5, 0.5]]]))
    assert exact_kl(p, q).tolist()[0] == pytest.approx([0.5 * math.log(2) + 0.5 * math.log(2 / 3)], abs=1e-6)
    assert exact_kl(q, p).tolist()[0] == pytest.approx([0.25 * math.log(0.5) + 0.75 * math.log(1.5)], abs=1e-6)
    logits, ref_logits = randn(2, 4, 5, seed=1), randn(2, 4, 5, seed=2)
    torch.testing.assert_close(exact_kl(logits, ref_logits).double(), loop_exact_kl(logits, ref_logits), rtol=0, atol=1e-6)
    torch.testing.assert_close(exact_kl(logits + 7, ref_logits - 3).double(), loop_exact_kl(logits, ref_logits), rtol=0, atol=1e-6)


def test_exact_kl_gradient_equals_finite_differences():
    """A detached probability in p log(p / q) leaves the value right and the gradient wrong."""
    logits, ref_logits = randn(1, 3, 4, seed=3), randn(1, 3, 4, seed=4)
    found = gradient_of(lambda x: exact_kl(x, ref_logits.float()).sum(), logits.float())
    expected = finite_difference_gradient(lambda x: loop_exact_kl(x, ref_logits).sum(), logits)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-6)


# ------------------------------------------------------------------------------------------------ rewards


def test_the_score_lands_on_the_last_action_only():
    """The score one slot late, behind the EOS action, or at the last column: advantages would depend on the padding."""
    #                prompt 2, a EOS     prompt 1, cut after 3     prompt 3, EOS at once
    prompt_lens, lens = torch.tensor([2, 1, 3]), torch.tensor([4, 4, 4])
    mask = completion_mask(prompt_lens, lens, 6)[:, 1:]
    kl = torch.arange(1.0, 16.0).view(3, 5)
    rewards = shaped_rewards(torch.tensor([10.0, 20.0, 30.0]), kl, mask, 0.1)
    expected = [[0, -0.2, 10 - 0.3, 0, 0], [-0.6, -0.7, 20 - 0.8, 0, 0], [0, 0, 30 - 1.3, 0, 0]]
    torch.testing.assert_close(rewards, torch.tensor(expected), rtol=0, atol=1e-5)


def test_a_row_without_action_has_no_place_for_its_score():
    """An empty mask: the score of such a row lands at slot 0 in a known code base."""
    with pytest.raises(ValueError, match="no action"):
        shaped_rewards(torch.ones(2), torch.zeros(2, 3), torch.tensor([[0, 1, 1], [0, 0, 0]]), 0.1)


@pytest.mark.parametrize("value", [1e30, math.inf, math.nan])
def test_kl_of_filler_does_not_reach_the_rewards(value):
    """KL at prompt and filler positions leaks into the reward, from there into returns and the adaptive controller."""
    frame = frame_batch(B=5, extra=3, seed=5)
    mask, kl, scores = frame.action_mask, randn(*frame.action_mask.shape, seed=6), randn(5, seed=7)
    rewards = shaped_rewards(scores, spoil(kl, mask, value), mask, 0.3)
    assert torch.equal(rewards, shaped_rewards(scores, kl, mask, 0.3))
    assert (rewards[~mask] == 0).all()
    # the whole sequence gets score - coef * (sum of KL): a mean over tokens would make the penalty independent of length
    for i in range(5):
        assert rewards[i].sum().item() == pytest.approx(scores[i].item() - 0.3 * kl[i][mask[i]].sum().item(), rel=1e-9)


def test_no_divergence_means_reward_is_score():
    """Policy equal to the reference: KL 0, so the reward of a completion is its score, exactly."""
    frame = frame_batch(B=4, seed=8)
    logprobs = randn(*frame.action_mask.shape, seed=9).float()
    scores = torch.tensor([1.0, -2.0, 0.5, 3.0])
    for kind in ("k1", "k2", "k3"):
        rewards = shaped_rewards(scores, kl_penalty(logprobs, logprobs, kind), frame.action_mask, 0.5)
        assert torch.equal(rewards.sum(1), scores)
        assert ((rewards != 0).sum(1) == 1).all()


# ------------------------------------------------------------------------------------------------ advantages


def gae_by_definition(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    """A_t = sum over l of (gamma lam)^l delta_{t+l}, on one sequence without filler; the value after its end is 0."""
    n = len(rewards)
    deltas = [rewards[t] + gamma * (values[t + 1] if t + 1 < n else 0.0) - values[t] for t in range(n)]
    return [sum((gamma * lam) ** k * deltas[t + k] for k in range(n - t)) for t in range(n)]


def gae_by_recursion(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    """A_t = delta_t + gamma lam A_{t+1}, from the end."""
    advantages, ahead, next_value = [], 0.0, 0.0
    for r, v in zip(reversed(rewards), reversed(values), strict=True):
        ahead = r + gamma * next_value - v + gamma * lam * ahead
        next_value = v
        advantages.append(ahead)
    return advantages[::-1]


@pytest.mark.parametrize("gamma", [1.0, 0.9])
@pytest.mark.parametrize("lam", [0.0, 0.95, 1.0])
@pytest.mark.parametrize("garbage", [0.0, 1e12])
def test_gae_equals_two_slow_forms(gamma, lam, garbage):
    """Against the double sum and the backward recursion, sequence by sequence without filler. Garbage values at filler: bootstrapping
    from the value after EOS is the classic leak. Advantages are 0 at masked places, returns = advantages + values."""
    frame = frame_batch(B=6, extra=2, seed=10)
    mask = frame.action_mask
    rewards, values = (spoil(randn(*mask.shape, seed=s), mask, garbage) for s in (11, 12))
    advantages, returns = gae(rewards, values, mask, gamma, lam)
    for i in range(6):
        row_rewards, row_values = rewards[i][mask[i]].tolist(), values[i][mask[i]].tolist()
        for slow in (gae_by_definition, gae_by_recursion):
            expected = slow(row_rewards, row_values, gamma, lam)
            assert advantages[i][mask[i]].tolist() == pytest.approx(expected, abs=1e-10)
            assert returns[i][mask[i]].tolist() == pytest.approx([a + v for a, v in zip(expected, row_values, strict=True)], abs=1e-10)
    assert (advantages[~mask] == 0).all()
    assert (returns[~mask] == 0).all()


def test_lambda_1_returns_are_the_rewards_to_go():
    """With lambda = gamma = 1 the critic drops out of the returns: they are sums of the rewards that are still to come."""
    frame = frame_batch(B=4, seed=13)
    mask = frame.action_mask
    rewards, values = torch.where(mask, randn(*mask.shape, seed=14), 0.0), randn(*mask.shape, seed=15, scale=100)
    _, returns = gae(rewards, values, mask, 1.0, 1.0)
    for i in range(4):
        row = rewards[i][mask[i]].tolist()
        assert returns[i][mask[i]].tolist() == pytest.approx([sum(row[t:]) for t in range(len(row))], abs=1e-9)


@pytest.mark.parametrize("lam", [0.0, 0.95, 1.0])
def test_advantages_do_not_depend_on_free_slots_behind_eos(lam):
    """The score at e + 1 gives the same response another advantage when a slot is free behind its EOS: T against T + k."""
    mask = torch.tensor([[0, 1, 1, 1, 1]])
    rewards, values = randn(1, 5, seed=16), randn(1, 5, seed=17)
    reference = gae(rewards, values, mask, 0.97, lam)
    for k in (1, 3, 7):
        wide = [torch.cat([x, torch.full((1, k), 1e9, dtype=x.dtype)], 1) for x in (rewards, values)]
        found = gae(*wide, torch.cat([mask, torch.zeros(1, k, dtype=mask.dtype)], 1), 0.97, lam)
        for a, b in zip(found, reference, strict=True):
            torch.testing.assert_close(a[:, :5], b, rtol=0, atol=1e-12)
            assert (a[:, 5:] == 0).all()


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_gae_ignores_non_finite_filler(value):
    """A product with the mask instead of a selection: 0 * inf is nan, and one nan spoils the whole row."""
    frame = frame_batch(B=4, extra=2, seed=18)
    mask = frame.action_mask
    rewards, values = randn(*mask.shape, seed=19), randn(*mask.shape, seed=20)
    expected = gae(rewards, values, mask, 1.0, 0.95)
    found = gae(spoil(rewards, mask, value), spoil(values, mask, value), mask, 1.0, 0.95)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


# ------------------------------------------------------------------------------------------------ losses


def test_policy_loss_of_all_four_cases_by_hand():
    """min taken for max, or the clip on the wrong side: gains are cut off, losses never are."""
    ratio = torch.tensor([[1.5, 1.5, 0.5, 0.5]], dtype=torch.float64)
    advantages = torch.tensor([[1.0, -1.0, 1.0, -1.0]], dtype=torch.float64)
    mask = torch.ones(1, 4)
    loss, clipped = policy_loss(ratio.log(), torch.zeros(1, 4, dtype=torch.float64), advantages, mask, 0.2)
    assert loss.item() == pytest.approx((-1.2 + 1.5 - 0.5 + 0.8) / 4, rel=1e-9)
    assert clipped.item() == 0.5  # the first and the last
    gradient = gradient_of(lambda x: policy_loss(x, torch.zeros(1, 4), advantages, mask, 0.2)[0], ratio.log())
    assert gradient[0].tolist() == pytest.approx([0.0, 1.5 / 4, -0.5 / 4, 0.0], abs=1e-12)  # -A * ratio / n where not clipped


def test_policy_loss_at_ratio_1_is_minus_the_mean_advantage():
    """The first step is plain policy gradient: loss -mean(A), gradient -A / n, nothing clipped; the sign turned round would unlearn."""
    frame = frame_batch(B=4, seed=21)
    mask = frame.action_mask
    logprobs, advantages = randn(*mask.shape, seed=22), randn(*mask.shape, seed=23)
    loss, clipped = policy_loss(logprobs, logprobs.clone(), advantages, mask, 0.2)
    assert loss.item() == pytest.approx(-advantages[mask].mean().item(), rel=1e-9)
    assert clipped.item() == 0
    gradient = gradient_of(lambda x: policy_loss(x, logprobs, advantages, mask, 0.2)[0], logprobs)
    torch.testing.assert_close(gradient, torch.where(mask, -advantages / mask.sum(), 0.0), rtol=1e-9, atol=0)


def test_policy_loss_gradient_equals_finite_differences():
    """Gradient on both sides of the clip range, under a mask."""
    frame = frame_batch(B=3, max_completion=5, seed=24)
    mask = frame.action_mask
    old, advantages = randn(*mask.shape, seed=25), randn(*mask.shape, seed=26)
    new = old + randn(*mask.shape, seed=27, scale=0.4)

    def loss(x: Tensor) -> Tensor:
        return policy_loss(x, old, advantages, mask, 0.2)[0]

    assert policy_loss(new, old, advantages, mask, 0.2)[1] > 0.1
    torch.testing.assert_close(gradient_of(loss, new), finite_difference_gradient(loss, new), rtol=1e-6, atol=1e-8)


def test_value_loss_by_hand():
    """min in the place of max lets the critic run away; the factor one half; clip 0 means off, not a range of 0."""
    values, old, returns = (torch.tensor([x], dtype=torch.float64) for x in ([2.0, 2.0, 0.1, -2.0], [0.0, 0.0, 0.0, 0.0], [3.0, 1.0, 0.5, 1.0]))
    mask = torch.ones(1, 4)
    # clipped values 0.5, 0.5, 0.1, -0.5: squared errors max(1, 6.25), max(1, 0.25), 0.16, max(9, 2.25)
    loss, clipped = value_loss(values, old, returns, mask, 0.5)
    assert loss.item() == pytest.approx(0.5 * (6.25 + 1 + 0.16 + 9) / 4, rel=1e-9)
    assert clipped.item() == 0.25
    loss, clipped = value_loss(values, old, returns, mask, 0.0)
    assert loss.item() == pytest.approx(0.5 * (1 + 1 + 0.16 + 9) / 4, rel=1e-9)
    assert clipped.item() == 0


@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_value_loss_gradient_equals_finite_differences(clip):
    """Gradient under a mask, with values inside and outside the clip range; none where the clipped error counts."""
    frame = frame_batch(B=3, max_completion=5, seed=28)
    mask = frame.action_mask
    old, returns = randn(*mask.shape, seed=29), randn(*mask.shape, seed=30)
    values = old + randn(*mask.shape, seed=31, scale=0.8)

    def loss(x: Tensor) -> Tensor:
        return value_loss(x, old, returns, mask, clip)[0]

    torch.testing.assert_close(gradient_of(loss, values), finite_difference_gradient(loss, values), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("value", [1e30, math.inf, math.nan])
@pytest.mark.parametrize("which", ["policy", "value"])
def test_masked_entries_change_neither_loss_nor_gradients(which, value):
    """What stands at prompt and filler positions, in any of the tensors, changes loss and gradients by nothing; nor do 7 more columns."""
    frame = frame_batch(B=4, extra=2, seed=32)
    mask = frame.action_mask
    x, old, target = randn(*mask.shape, seed=33), randn(*mask.shape, seed=34), randn(*mask.shape, seed=35)
    function = policy_loss if which == "policy" else value_loss
    clean = function(x, old, target, mask, 0.2)
    gradient = gradient_of(lambda x: function(x, old, target, mask, 0.2)[0], x)
    wide_mask = torch.cat([mask, torch.zeros(4, 7, dtype=torch.bool)], 1)
    wide = [torch.cat([spoil(y, mask, value), torch.full((4, 7), value, dtype=y.dtype)], 1) for y in (x, old, target)]
    spoilt = function(*wide, wide_mask, 0.2)
    assert [a.item() for a in spoilt] == pytest.approx([a.item() for a in clean], rel=1e-12)
    found = gradient_of(lambda x: function(x, *wide[1:], wide_mask, 0.2)[0], wide[0])
    torch.testing.assert_close(found[:, : mask.size(1)], gradient, rtol=1e-12, atol=0)
    assert (found[~wide_mask] == 0).all()


@pytest.mark.parametrize("which", ["policy", "value"])
def test_parts_of_a_step_divide_by_the_actions_of_the_whole_step(which):
    """A mean for each micro-batch: a reply of 3 tokens would weigh as much as one of 53. Also the order of the rows must not matter."""
    frame = frame_batch(B=8, max_completion=12, seed=36)
    mask = frame.action_mask
    tensors = [randn(*mask.shape, seed=s) for s in (37, 38, 39)]
    function = policy_loss if which == "policy" else value_loss
    whole = function(*tensors, mask, 0.2)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(40))
    for size in (1, 2, 8):
        parts = [function(*(x[rows] for x in tensors), mask[rows], 0.2, n_tokens=mask.sum()) for rows in order.split(size)]
        loss, fraction = (sum(p).item() for p in zip(*parts, strict=True))
        assert loss == pytest.approx(whole[0].item(), rel=1e-12)
        assert fraction == pytest.approx(whole[1].item(), rel=1e-6)  # a float32


def test_extreme_ratios_stay_finite():
    """A log-ratio of 90 overflows float32, and one such token makes the whole step nan."""
    logprobs, old = torch.tensor([[0.0, 0.0, -200.0, -200.0]]), torch.tensor([[-200.0, -200.0, 0.0, 0.0]])
    advantages = torch.tensor([[1.0, -1.0, 1.0, -1.0]])
    loss, _ = policy_loss(logprobs, old, advantages, torch.ones(1, 4), 0.2)
    assert loss.isfinite()
    assert gradient_of(lambda x: policy_loss(x, old, advantages, torch.ones(1, 4), 0.2)[0], logprobs).isfinite().all()


def test_adaptive_kl_by_hand():
    """The error's sign or clip wrong, or the number of sequences forgotten: the coefficient runs away."""
    controller = AdaptiveKL(0.1, target=6.0, horizon=1000.0)
    controller.update(12.0, 100)  # far too high: error 1, clipped to 0.2
    assert controller.coef == pytest.approx(0.1 * 1.02)
    controller.update(0.0, 100)  # far too low: error -1, clipped to -0.2
    assert controller.coef == pytest.approx(0.1 * 1.02 * 0.98)
    controller.update(6.6, 50)  # 10% too high
    assert controller.coef == pytest.approx(0.1 * 1.02 * 0.98 * 1.005)
    controller.update(6.0, 500)
    assert controller.coef == pytest.approx(0.1 * 1.02 * 0.98 * 1.005)
    for target, horizon in ((0.0, 1.0), (1.0, 0.0)):
        with pytest.raises(ValueError):
            AdaptiveKL(0.1, target, horizon)


# ------------------------------------------------------------------------------------------------ experience


def tiny_config(**changes) -> Config:
    settings = {"temperature": 0.7, "micro_batch": 3, "minibatch": 4, "ppo_epochs": 2, "gamma": 0.98, "lam": 0.95, "clip": 0.2, "value_clip": 0.5}
    return Config(**{**settings, "kl": "k1", "whiten_advantages": False, "device": "cpu", **changes})


def tiny_world(seed: int = 0, B: int = 7, temperature: float = 0.7):
    """policy, reference, value model, and a rollout of prompts of unequal length, some of its completions cut. Dropout is configured."""
    policy = make_gpt(seed, dropout=0.1)
    reference = copy.deepcopy(policy).requires_grad_(False)
    spread(reference, seed + 5, scale=0.05)
    value_model = make_scalar(seed + 7, dropout=0.1)
    value_model.mean.fill_(0.3)
    value_model.std.fill_(2.0)
    prompts = random_prompts([1, 5, 9, 2, 3, 7, 4, 6][:B], 23, seed=seed)  # EOS, id 22, may stand in a prompt
    rollout = generate(policy, prompts, 8, eos_id=EOS, temperature=temperature, generator=torch.Generator().manual_seed(seed + 1))
    return policy, reference, value_model, rollout


def slow_rows(policy, reference, value_model, rollout: Rollout, scores: Tensor, kl_coef: float, config: Config) -> list[dict[str, Tensor]]:
    """The same figures, row by row without filler, in float64, by enumeration over the vocabulary and by the definition of GAE."""
    policy, reference, value_model = (copy.deepcopy(m).double().eval() for m in (policy, reference, value_model))
    rows = []
    for i, (P, n) in enumerate(zip(rollout.prompt_lens.tolist(), rollout.lens.tolist(), strict=True)):
        ids = rollout.tokens[i, :n].tolist()
        row: dict[str, list] = {k: [] for k in ("logprobs", "ref_logprobs", "kl", "entropy", "values")}
        logits, ref_logits = (m(torch.tensor([ids]))[0] / config.temperature for m in (policy, reference))
        raw = value_model.head(value_model.gpt.hidden(torch.tensor([ids])))[0, :, 0]
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
        found["advantages"] = torch.tensor(
            gae_by_definition(found["rewards"].tolist(), found["values"].tolist(), config.gamma, config.lam), dtype=torch.float64
        )
        found["returns"] = found["advantages"] + found["values"]
        if config.kl == "exact":  # the token's own share, without which the penalty's gradient is wrong (test_optimum.py)
            found["advantages"] = found["advantages"] - kl_coef * (found["logprobs"] - found["ref_logprobs"] - found["kl"])
        rows.append(found)
    return rows


@pytest.mark.parametrize("kl", ["k1", "k2", "k3", "exact"])
def test_experience_equals_the_slow_one(kl):
    """Every figure of an iteration, at temperature 0.7 with dropout configured: a missing temperature in one of the log-probs, values
    taken after the action, KL to the wrong model, filler in a sum. Everything is 0 outside the actions."""
    world = tiny_world()
    rollout = world[3]
    assert 0 < rollout.ended.sum() < 7, "the rollout must hold ended and cut completions"
    config, scores = tiny_config(kl=kl), randn(7, seed=41).float()
    world[0].train()  # make_experience must switch dropout off itself
    experience = make_experience(*world, scores, 0.3, config)
    for i, row in enumerate(slow_rows(*world, scores, 0.3, config)):
        for name, expected in row.items():
            found = getattr(experience, name)
            torch.testing.assert_close(
                found[i][experience.action_mask[i]].double(), expected, rtol=1e-5, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}"
            )
            assert (found[i][~experience.action_mask[i]] == 0).all()


def test_returns_are_formed_before_whitening():
    """Returns rebuilt from whitened advantages break the critic silently; whitening over filler shifts every action."""
    world, scores = tiny_world(), randn(7, seed=42).float()
    plain, white = (make_experience(*world, scores, 0.3, tiny_config(whiten_advantages=w)) for w in (False, True))
    mask = plain.action_mask
    assert torch.equal(plain.returns, white.returns)
    torch.testing.assert_close(plain.returns, torch.where(mask, plain.advantages + plain.values, 0.0), rtol=0, atol=1e-6)
    values = white.advantages[mask].double()
    assert values.mean().item() == pytest.approx(0, abs=1e-6)
    assert values.var(correction=0).item() == pytest.approx(1, abs=1e-4)
    assert (white.advantages[~mask] == 0).all()
    assert torch.equal(white.advantages[mask].argsort(), plain.advantages[mask].argsort())
    wide_mask = torch.cat([mask, torch.zeros(7, 9, dtype=torch.bool)], 1)
    wide = whiten(torch.cat([plain.advantages, torch.full((7, 9), 1e6)], 1), wide_mask)
    torch.testing.assert_close(wide[:, : mask.size(1)], white.advantages, rtol=0, atol=1e-5)


def columns(experience: Experience) -> dict[str, Tensor]:
    return {f.name: getattr(experience, f.name) for f in fields(Experience) if f.name not in ("tokens", "lens", "action_mask")}


@pytest.mark.parametrize("filler", [0, EOS])
def test_experience_does_not_depend_on_padding(filler):
    """7 more filler columns, of the EOS id too, change no figure of any action: pad id equal to EOS, or padding in KL, values, rewards."""
    *models, rollout = tiny_world()
    scores = randn(7, seed=43).float()
    wide = torch.full((7, rollout.tokens.size(1) + 7), filler)
    for i, n in enumerate(rollout.lens.tolist()):
        wide[i, :n] = rollout.tokens[i, :n]
    for config in (tiny_config(), tiny_config(whiten_advantages=True, kl="exact")):
        narrow = columns(make_experience(*models, rollout, scores, 0.3, config))
        found = columns(make_experience(*models, replace(rollout, tokens=wide), scores, 0.3, config))
        for name, x in narrow.items():
            torch.testing.assert_close(found[name][:, : x.size(1)], x, rtol=1e-5, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")
            assert (found[name][:, x.size(1) :] == 0).all()


def test_experience_does_not_depend_on_batch_mates_or_micro_batches():
    """A reward or an advantage that changes with who is in the batch, or with the size of a forward pass."""
    *models, rollout = tiny_world()
    scores = randn(7, seed=44).float()
    whole = columns(make_experience(*models, rollout, scores, 0.3, tiny_config()))
    for size in (0, 1, 2):
        for name, x in columns(make_experience(*models, rollout, scores, 0.3, tiny_config(micro_batch=size))).items():
            torch.testing.assert_close(x, whole[name], rtol=1e-5, atol=2e-5)
    for i in range(7):
        n = int(rollout.lens[i])
        alone = Rollout(rollout.tokens[i : i + 1, :n], rollout.prompt_lens[i : i + 1], rollout.lens[i : i + 1], rollout.ended[i : i + 1])
        for name, x in columns(make_experience(*models, alone, scores[i : i + 1], 0.3, tiny_config())).items():
            torch.testing.assert_close(x[0], whole[name][i, : n - 1], rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("kl", ["k1", "k2", "k3", "exact"])
def test_policy_equal_to_reference_has_no_kl(kl):
    """KL that is not 0 at the start: other code, dropout or temperature for one of the two; then reward is not score."""
    policy, _, value_model, rollout = tiny_world()
    scores = randn(7, seed=45).float()
    experience = make_experience(policy, copy.deepcopy(policy), value_model, rollout, scores, 0.3, tiny_config(kl=kl))
    assert experience.kl.abs().max() <= 1e-6
    torch.testing.assert_close(experience.rewards.sum(1), scores, rtol=0, atol=1e-5)


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
    rollout = generate(policy, [[1], [2, 3, 4], [EOS, 5]], 6, eos_id=EOS, generator=torch.Generator().manual_seed(0))
    assert rollout.action_mask.int().tolist() == [[1, 0, 0], [0, 0, 1], [0, 1, 0]]
    experience = make_experience(policy, policy, value_model, rollout, torch.tensor([1.0, 2.0, 3.0]), 0.3, tiny_config())
    torch.testing.assert_close(experience.rewards, torch.tensor([[1.0, 0, 0], [0, 0, 2.0], [0, 3.0, 0]]), rtol=0, atol=1e-6)


def test_eos_in_the_prompt_ends_nothing():
    """Looking for EOS in the whole text instead of in the completion: a cut completion would count as ended."""
    policy = make_gpt(4)
    with torch.no_grad():  # a policy that never says EOS
        policy.ln_f.weight.zero_()
        policy.wte.weight[EOS] = -100 * policy.ln_f.bias / policy.ln_f.bias.norm() ** 2
    rollout = generate(policy, [[EOS, 1], [1, EOS], [EOS]], 5, eos_id=EOS, generator=torch.Generator().manual_seed(0))
    assert rollout.ended.tolist() == [False] * 3
    assert (rollout.lens - rollout.prompt_lens).tolist() == [5] * 3
    assert rollout.action_mask.sum(1).tolist() == [5] * 3


# ------------------------------------------------------------------------------------------------ the update


def sgd(policy, value_model, lr: float) -> torch.optim.SGD:
    return torch.optim.SGD([p for m in (policy, value_model) for p in m.parameters() if p.requires_grad], lr=lr)


def prepared(seed: int = 0, B: int = 7, **changes):
    """policy, value model, experience, config."""
    config = tiny_config(**{"whiten_advantages": True, "grad_clip": 1e9, "target_kl": 0.0, "minibatch": B, **changes})
    *models, rollout = tiny_world(seed, B, config.temperature)
    experience = make_experience(*models, rollout, randn(B, seed=46).float(), 0.3, config)
    return models[0], models[2], experience, config


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def slow_update(policy, value_model, experience: Experience, config: Config, lr: float) -> tuple[object, object, dict[str, float]]:
    """PPO as one would write it down: row by row without filler, float64, whole batch, plain gradient descent. -> new models, mean figures."""
    policy, value_model = copy.deepcopy(policy).double(), copy.deepcopy(value_model).double()
    N = int(experience.action_mask.sum())
    steps: list[list[float]] = []
    for _ in range(config.ppo_epochs):
        p_loss, v_loss, clipped, v_clipped, approx_kl = (torch.zeros((), dtype=torch.float64) for _ in range(5))
        for i, n in enumerate(experience.lens.tolist()):
            ids, mask = experience.tokens[i, :n].tolist(), experience.action_mask[i]
            P = n - int(mask.sum())
            old, A, old_v, R = (x[i][mask].double() for x in (experience.logprobs, experience.advantages, experience.values, experience.returns))
            new = completion_logprobs(policy, ids[:P], ids[P:], config.temperature)
            raw = value_model.head(value_model.gpt.hidden(torch.tensor([ids])))[0, P - 1 : n - 1, 0]
            v = (raw - value_model.mean) / value_model.std
            for t in range(n - P):
                ratio = (new[t] - old[t]).exp()
                gain, held = A[t] * ratio, A[t] * ratio.clamp(1 - config.clip, 1 + config.clip)
                p_loss, clipped = p_loss - min(gain, held), clipped + (held < gain).double()
                free, near = v[t] - R[t], old_v[t] + (v[t] - old_v[t]).clamp(-config.value_clip, config.value_clip) - R[t]
                v_loss, v_clipped = v_loss + max(free**2, near**2) / 2, v_clipped + (near**2 > free**2).double()
                approx_kl = approx_kl + ratio - 1 - ratio.log()
        steps.append([x.item() / N for x in (p_loss, v_loss, clipped, v_clipped, approx_kl)])
        descend(policy, p_loss / N, lr)
        descend(value_model, v_loss / N, lr)
    names = ("policy_loss", "value_loss", "clip_fraction", "value_clip_fraction", "approx_kl")
    return policy, value_model, {k: sum(s[i] for s in steps) / len(steps) for i, k in enumerate(names)}


@pytest.mark.parametrize("micro_batch", [0, 1, 2, 3])
def test_an_update_equals_the_slow_one_for_any_micro_batch(micro_batch):
    """Three whole steps, two of them away from ratio 1, with clipping at work: a mean for each micro-batch, a mask or a frame that is off,
    a missing temperature, value clipping with min, losses that flow into the wrong network."""
    policy, value_model, experience, config = prepared(micro_batch=micro_batch, ppo_epochs=3, value_clip=0.05)
    before = copy.deepcopy(policy), copy.deepcopy(value_model)
    expected_policy, expected_value, figures = slow_update(policy, value_model, experience, config, lr=0.05)
    assert min(figures["clip_fraction"], figures["value_clip_fraction"], figures["approx_kl"]) > 0.005, "clipping must be at work"
    stats = update(policy, value_model, sgd(policy, value_model, 0.05), experience, config, rng())
    assert_same_weights(policy, expected_policy, before[0], tolerance=1e-4)
    assert_same_weights(value_model, expected_value, before[1], tolerance=1e-4)
    assert {k: stats[k] for k in figures} == pytest.approx(figures, rel=1e-3, abs=1e-6)
    assert stats["updates"] == 3


def test_the_order_of_the_rows_does_not_matter():
    """An experience in another order, with another permutation, takes the same step."""
    policy, value_model, experience, config = prepared(micro_batch=2, ppo_epochs=2)
    before, trained = copy.deepcopy(policy), []
    for seed, order in enumerate(([0, 1, 2, 3, 4, 5, 6], [6, 2, 0, 5, 1, 4, 3])):
        p, v = copy.deepcopy(policy), copy.deepcopy(value_model)
        shuffled = Experience(*(getattr(experience, f.name)[order] for f in fields(Experience)))
        update(p, v, sgd(p, v, 0.05), shuffled, config, rng(seed))
        trained.append(p)
    assert_same_weights(trained[1], trained[0], before, tolerance=1e-4)


def test_garbage_at_masked_places_does_not_reach_the_weights():
    """Ids, old log-probs, advantages, values and returns of prompt and filler positions, and 7 more columns, change no weight."""
    policy, value_model, experience, config = prepared(micro_batch=2, ppo_epochs=2)
    before, trained = copy.deepcopy(policy), []
    mask = experience.action_mask
    spoilt = {k: torch.cat([spoil(x, mask, 1e6), torch.full((7, 7), 1e6)], 1) for k, x in columns(experience).items()}
    tokens = torch.where(torch.arange(experience.tokens.size(1)) < experience.lens[:, None], experience.tokens, 3)
    wide = Experience(
        torch.cat([tokens, torch.full((7, 7), 5)], 1), experience.lens, torch.cat([mask, torch.zeros(7, 7, dtype=torch.bool)], 1), **spoilt
    )
    values = []
    for source in (experience, wide):
        p, v = copy.deepcopy(policy), copy.deepcopy(value_model)
        stats = update(p, v, sgd(p, v, 0.05), source, config, rng())
        trained.append((p, v))
        values.append({k: x for k, x in stats.items() if k != "first_ratio"})
    assert_same_weights(trained[1][0], trained[0][0], before)
    assert_same_weights(trained[1][1], trained[0][1], value_model)
    assert values[1] == pytest.approx(values[0], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("temperature", [0.7, 1.0])
@pytest.mark.parametrize("micro_batch", [1, 3, 0])
def test_the_first_ratio_is_1(temperature, micro_batch):
    """Rollout and update computing different log-probs: unequal prompts, dropout configured, minibatch other than the rollout batch."""
    policy, value_model, experience, config = prepared(temperature=temperature, minibatch=3, micro_batch=micro_batch)
    policy.train()  # update must switch dropout off itself
    value_model.train()
    stats = update(policy, value_model, sgd(policy, value_model, 1e-3), experience, config, rng())
    assert abs(stats["first_ratio"] - 1) <= 1e-4


@pytest.mark.parametrize("offset", [0.01, -0.01, math.nan])
def test_a_ratio_that_starts_off_1_stops_the_run(offset):
    """Old log-probs of another function, dtype or temperature must be noticed, not trained on; a nan too."""
    policy, value_model, experience, config = prepared(micro_batch=2)
    row = torch.arange(7)[:, None] == experience.lens.argmin()  # one row, of the first micro-batch: the others are right
    wrong = replace(experience, logprobs=torch.where(experience.action_mask & row, experience.logprobs + offset, experience.logprobs))
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


def test_without_learning_the_log_ratio_stays_0():
    """lr = 0: whatever moves the log-ratio in later epochs (dropout, batch composition) is a bug."""
    policy, value_model, experience, config = prepared(minibatch=3, micro_batch=2, ppo_epochs=4)
    policy.train()
    value_model.train()
    stats = update(policy, value_model, sgd(policy, value_model, 0.0), experience, config, rng())
    assert abs(stats["approx_kl"]) < 1e-9
    assert stats["clip_fraction"] == 0
    assert stats["updates"] == 4 * 3


def test_every_rollout_is_used_once_an_epoch_in_a_fresh_order(monkeypatch):
    """A remainder that is dropped when the minibatch doesn't divide the rollouts, or one permutation for all epochs."""
    policy, value_model, experience, config = prepared(minibatch=3, micro_batch=1, ppo_epochs=3, lr=0.0)
    seen: list[int] = []

    def watch(logprobs, old_logprobs, advantages, action_mask, *rest):
        seen.append(next(i for i in range(7) if torch.equal(old_logprobs[0][action_mask[0]], experience.logprobs[i][experience.action_mask[i]])))
        return policy_loss(logprobs, old_logprobs, advantages, action_mask, *rest)

    monkeypatch.setattr(ppo, "policy_loss", watch)
    stats = update(policy, value_model, sgd(policy, value_model, 0.0), experience, config, rng())
    assert stats["updates"] == 9
    epochs = [seen[i : i + 7] for i in (0, 7, 14)]
    assert [sorted(e) for e in epochs] == [list(range(7))] * 3
    minibatches = {tuple(sorted(e[:3])) for e in epochs}
    assert len(minibatches) > 1


def test_early_stop_leaves_the_weights_unmoved():
    """A policy that has moved too far is not moved further: only the first of five epochs takes a step."""
    policy, value_model, experience, config = prepared(ppo_epochs=5, target_kl=1e-3, micro_batch=2)
    once = copy.deepcopy(policy), copy.deepcopy(value_model)
    stats = update(policy, value_model, sgd(policy, value_model, 0.3), experience, config, rng())
    update(*once, sgd(*once, 0.3), experience, replace(config, ppo_epochs=1), rng())
    assert (stats["stopped_early"], stats["updates"]) == (True, 1)
    for model, expected in zip((policy, value_model), once, strict=True):
        for a, b in zip(model.parameters(), expected.parameters(), strict=True):
            assert torch.equal(a, b)


def test_early_stop_can_be_off_and_stays_out_of_the_way():
    """target_kl 0 means never, not always; a large one stops nothing."""
    for target in (0.0, 1e6):
        policy, value_model, experience, config = prepared(ppo_epochs=3, target_kl=target)
        stats = update(policy, value_model, sgd(policy, value_model, 0.3), experience, config, rng())
        assert (stats["stopped_early"], stats["updates"]) == (False, 3)


def test_policy_and_value_are_trained_apart():
    """A shared trunk, or losses that flow into the other network: no advantage moves no policy, no value error moves no critic."""
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
    assert max((a - b).abs().max().item() for a, b in zip(value_model.parameters(), still[1].parameters(), strict=True)) < 1e-6
    assert not torch.equal(policy.wte.weight, still[0].wte.weight)


def test_gradients_are_clipped_separately_after_they_are_there():
    """Clipping before backward, or one norm for both networks: the length of each network's step tells."""
    policy, value_model, experience, config = prepared(grad_clip=1e-3, ppo_epochs=1, micro_batch=2)
    before = copy.deepcopy(policy), copy.deepcopy(value_model)
    stats = update(policy, value_model, sgd(policy, value_model, 1.0), experience, config, rng())
    for model, start in zip((policy, value_model), before, strict=True):
        moved = math.sqrt(sum((a - b).double().pow(2).sum().item() for a, b in zip(model.parameters(), start.parameters(), strict=True)))
        assert moved == pytest.approx(1e-3, rel=1e-2)
    assert stats["grad_norm"] > 1e-2


def test_frozen_layers_stay_as_they_are():
    """Training the last block only: everything else, the tied embedding above all, has no gradient and doesn't change."""
    policy, value_model, experience, config = prepared(ppo_epochs=2)
    freeze_all_but_last(policy, 1)
    before = copy.deepcopy(policy.state_dict())
    optimizer = ppo.make_optimizer(policy, value_model, config)
    update(policy, value_model, optimizer, experience, config, rng())
    for name, p in policy.named_parameters():
        trained = name.startswith(("h.1.", "ln_f."))
        assert (p.grad is not None) == trained, name
        assert torch.equal(p, before[name]) != trained, name
    for n in (0, 3, -1):
        with pytest.raises(UserError, match="train_layers"):
            freeze_all_but_last(policy, n)


@pytest.mark.parametrize("micro_batch", [0, 1, 3])
def test_the_pretraining_term_counts_once_a_step(micro_batch):
    """PPO-ptx: coefficient times the SFT loss of a batch of demonstrations, once a step however the rollouts are split."""
    policy, value_model, experience, config = prepared(micro_batch=micro_batch, ppo_epochs=1, ptx_coef=0.5)
    demonstrations = [Example([1, 2], [3, 4, 5, EOS])]  # a single one, so every batch of it has the same loss
    before, expected = copy.deepcopy(policy), copy.deepcopy(policy).double()
    descend(expected, -0.5 * completion_logprobs(expected, [1, 2], [3, 4, 5, EOS]).mean(), 0.1)
    calm = replace(experience, advantages=torch.zeros_like(experience.advantages))
    extra = ptx_loss(policy, demonstrations, ToyTokenizer(), config, iteration=0)
    update(policy, value_model, sgd(policy, value_model, 0.1), calm, config, rng(), extra)
    assert_same_weights(policy, expected, before, tolerance=1e-4)


# ------------------------------------------------------------------------------------------------ rewards from outside

REWARDS = """
def letters(prompts, completions):
    return [c.count("a") + 0.1 * len(p) for p, c in zip(prompts, completions)]

def nothing(prompts, completions):
    return [0.0] * len(completions)

def too_few(prompts, completions):
    return [1.0]

def not_finite(prompts, completions):
    return [float("nan")] * len(completions)

def words(prompts, completions):
    return ["good"] * len(completions)

def none(prompts, completions):
    return None

number = 3
"""


def reward_file(folder: Path) -> str:
    path = folder / "toy_rewards.py"
    path.write_text(REWARDS, encoding="utf-8")
    return str(path)


def test_reward_from_a_file(tmp_path):
    """A user's own function: the right texts in the right order, numbers of any kind back as a tensor."""
    score, model = load_reward(f"{reward_file(tmp_path)}:letters", ToyTokenizer(), CPU)
    assert model is None
    assert score(None, ["bb", "b"], ["aab", "c"]).tolist() == pytest.approx([2.2, 0.1])


@pytest.mark.parametrize(
    ("name", "message"), [("too_few", "1 rewards for 2"), ("not_finite", "not a finite number"), ("words", "one number"), ("none", "one number")]
)
def test_wrong_rewards_are_reported(tmp_path, name, message):
    """A reward function that returns too few, nan or text: a message with its name, not a crash later or silent training on nonsense."""
    score, _ = load_reward(f"{reward_file(tmp_path)}:{name}", ToyTokenizer(), CPU)
    with pytest.raises(UserError, match=message) as error:
        score(None, ["b", "b"], ["c", "d"])
    assert f"toy_rewards.py:{name}" in str(error.value)


@pytest.mark.parametrize("name", ["number", "missing"])
def test_a_reward_that_is_no_function_is_reported(tmp_path, name):
    """A misspelt function name."""
    with pytest.raises(UserError, match=f"no function {name}"):
        load_reward(f"{reward_file(tmp_path)}:{name}", ToyTokenizer(), CPU)


def test_a_reward_that_can_not_be_loaded_is_reported(tmp_path):
    """A missing file, a file that doesn't import, a policy in the place of a reward model, another vocabulary."""
    broken = tmp_path / "broken_rewards.py"
    broken.write_text("import no_such_module_anywhere\n", encoding="utf-8")
    policy, scorer = checkpoint(tmp_path / "policy", make_gpt(0)), checkpoint(tmp_path / "scorer", make_scalar(0))
    other = ToyTokenizer()
    other.name = "other"
    for spec, tokenizer, message in (
        (f"{tmp_path}/absent.py:f", ToyTokenizer(), "file to exist"),
        (f"{broken}:f", ToyTokenizer(), "no_such_module_anywhere"),
        (str(tmp_path / "absent"), ToyTokenizer(), "reward_model.py"),
        (policy, ToyTokenizer(), "reward model"),
        (scorer, other, "toy tokens"),
    ):
        with pytest.raises(UserError, match=message):
            load_reward(spec, tokenizer, CPU)


def test_a_checkpoint_scores_every_rollout_as_if_it_were_alone(tmp_path):
    """Rewards that depend on batch mates, on slices of the batch, or on filler; the normalisation must be in them."""
    scorer = make_scalar(1)
    scorer.mean.fill_(0.7)
    scorer.std.fill_(3.0)
    score, _ = load_reward(checkpoint(tmp_path / "scorer", scorer), ToyTokenizer(), CPU)
    frame = frame_batch(B=70, extra=3, seed=47)
    found = score(Rollout(frame.tokens, frame.prompt_lens, frame.lens, torch.ones(70, dtype=torch.bool)), [], [])
    assert found.shape == (70,)
    assert not found.requires_grad
    for i in range(0, 70, 3):
        raw = scorer.head(scorer.gpt.hidden(frame.row(i)))[0, -1, 0].item()
        assert found[i].item() == pytest.approx((raw - 0.7) / 3, abs=1e-5)


# ------------------------------------------------------------------------------------------------ the script

PROMPTS = ["a", "bcd", "efghi", "jw", "wkl", "mnopqrs", "t", "uv"]  # w is the EOS id


def run_ppo(tmp_path: Path, monkeypatch, policy, reward: str, **changes):
    """ppo.train on toy prompts; -> results, trained policy, log, what every make_experience was given and gave."""
    speak_toy(monkeypatch, ppo)
    calls: list[dict] = []
    original = make_experience

    def record(policy, reference, value_model, rollout, scores, kl_coef, config):
        call = {"value_start": copy.deepcopy(value_model.state_dict()), "reference": reference, "policy": policy, "value_model": value_model}
        call |= {"rollout": rollout, "scores": scores, "kl_coef": kl_coef}
        call["experience"] = original(policy, reference, value_model, rollout, scores, kl_coef, config)
        calls.append(call)
        return call["experience"]

    monkeypatch.setattr(ppo, "make_experience", record)
    out = tmp_path / "out"
    settings = {
        "prompts": write_lines(tmp_path / "p.jsonl", [{"prompt": p} for p in PROMPTS]),
        "policy": checkpoint(tmp_path / "policy", policy),
        "reward": reward,
        **{"out_dir": str(out), "iterations": 3, "rollouts": 12, "max_new_tokens": 7, "temperature": 0.7, "minibatch": 5, "micro_batch": 2},
        **{"lr": 3e-3, "value_lr": 3e-3, "warmup": 0, "eos_penalty": 1.5, "kl_coef": 0.2, "device": "cpu"},
        **{"ppo_epochs": 2, "gamma": 1.0, "lam": 0.95, "clip": 0.2, "value_clip": 0.5, "target_kl": 0.1, "kl": "k1", "kl_target": 0.0},
    }
    results = ppo.train(Config(**{**settings, **changes}))
    return results, load_model(out, CPU)[0], read_lines(out / "metrics.jsonl"), calls


def test_what_is_logged_is_what_was_used(tmp_path, monkeypatch):
    """Logged KL that is not the KL trained on, entropy or KL averaged over pads, a cut completion that keeps its score, EOS looked for in
    the prompt, a score shown with the penalty in it: every logged figure against the rollout and the tensors of the update."""
    results, _, log, calls = run_ppo(tmp_path, monkeypatch, make_gpt(0, block_size=24), f"{reward_file(tmp_path)}:letters", kl="k1")
    assert len(log) == len(calls) == 3
    cut_rows = 0
    for row, call in zip(log, calls, strict=True):
        rollout, e = call["rollout"], call["experience"]
        totals, raw, kls, k3s, entropies, stops = [], [], [], [], [], []
        for i, (P, n) in enumerate(zip(rollout.prompt_lens.tolist(), rollout.lens.tolist(), strict=True)):
            prompt, completion = rollout.tokens[i, :P].tolist(), rollout.tokens[i, P:n].tolist()
            stops.append(EOS in completion)
            raw.append(sum(c == 0 for c in completion) + 0.1 * len(prompt))
            d = [(e.logprobs[i, t] - e.ref_logprobs[i, t]).item() for t in range(P - 1, n - 1)]
            kls.append(sum(d))
            k3s.append(sum(math.exp(-x) - 1 + x for x in d))
            entropies += [e.entropy[i, t].item() for t in range(P - 1, n - 1)]
            totals.append(raw[-1] - 1.5 * (not stops[-1]) - 0.2 * kls[-1])
            assert e.rewards[i].sum().item() == pytest.approx(totals[-1], abs=1e-4)
            assert e.rewards[i, n - 2].item() == pytest.approx(raw[-1] - 1.5 * (not stops[-1]) - 0.2 * d[-1], abs=1e-4)
        cut_rows += stops.count(False)
        mask = e.action_mask
        residual, returns = (e.returns - e.values)[mask].double(), e.returns[mask].double()
        expected = {
            "score": sum(raw) / 12,
            "kl": sum(kls) / 12,
            "k3": sum(k3s) / 12,
            "objective": sum(totals) / 12,
            "entropy": sum(entropies) / len(entropies),
            "eos_rate": sum(stops) / 12,
            "length": len(entropies) / 12,
            "distinct": len({tuple(c) for c in rollout.completions()}) / 12,
            "explained_variance": 1 - (residual.var(correction=0) / returns.var(correction=0)).item(),
            "kl_coef": 0.2,
        }
        assert {k: row[k] for k in expected} == pytest.approx(expected, abs=1e-4)
        assert abs(row["first_ratio"] - 1) <= 1e-4
    assert 0 < cut_rows < 36, "some completions must be cut and some ended"
    assert (log[0]["kl"], log[0]["k3"]) == (0.0, 0.0)  # the policy starts as the reference
    assert log[2]["k3"] > 0
    assert results["score"] == pytest.approx(log[2]["score"], abs=1e-5)  # the last quarter of three iterations
    strict_json(tmp_path / "out" / "results.json")


def test_the_reference_stays_frozen(tmp_path, monkeypatch):
    """A reference that shares storage with the policy, or learns: the KL penalty would hold nothing."""
    start = make_gpt(1, block_size=24)
    _, policy, _, calls = run_ppo(tmp_path, monkeypatch, start, f"{reward_file(tmp_path)}:letters", lr=1e-2)
    reference = calls[-1]["reference"]
    storages = {p.data_ptr() for m in (calls[-1]["policy"], calls[-1]["value_model"]) for p in m.parameters()}
    for (name, p), original in zip(reference.named_parameters(), start.parameters(), strict=True):
        assert torch.equal(p, original), name
        assert not p.requires_grad
        assert p.grad is None
        assert p.data_ptr() not in storages
    assert not torch.equal(policy.wte.weight, start.wte.weight)


def test_the_value_model_starts_as_the_reward_model(tmp_path, monkeypatch):
    """A critic from other weights, without the normalisation, or sharing storage with the reward model, which then drifts as it learns."""
    scorer = make_scalar(2, block_size=24)
    scorer.mean.fill_(-0.4)
    scorer.std.fill_(1.7)
    loaded = []
    original = load_reward

    def record(*args):
        loaded.append(original(*args))
        return loaded[-1]

    monkeypatch.setattr(ppo, "load_reward", record)
    _, _, _, calls = run_ppo(tmp_path, monkeypatch, make_gpt(3, block_size=24), checkpoint(tmp_path / "scorer", scorer), value_lr=1e-2)
    first = calls[0]
    for name, tensor in scorer.state_dict().items():
        assert torch.equal(first["value_start"][name], tensor), name
        assert torch.equal(loaded[0][1].state_dict()[name], tensor), f"the reward model's {name} has changed"
    rollout = first["rollout"]
    expected = scorer.score(rollout.tokens, rollout.lens) - 1.5 * (~rollout.ended)
    torch.testing.assert_close(first["scores"], expected.detach(), rtol=0, atol=1e-5)
    assert not torch.equal(calls[-1]["value_model"].head.weight, scorer.head.weight)


def test_without_a_reward_model_values_start_at_0(tmp_path, monkeypatch):
    """A random critic makes the first advantages noise."""
    _, _, _, calls = run_ppo(tmp_path, monkeypatch, make_gpt(4, block_size=24), f"{reward_file(tmp_path)}:letters", iterations=1)
    assert (calls[0]["experience"].values == 0).all()


def test_learning_rates_belong_to_their_networks(tmp_path, monkeypatch):
    """lr 0 leaves the policy as it was, to the bit, for a whole run, while the critic learns; and the other way round."""
    start = make_gpt(5, block_size=24)
    _, policy, log, calls = run_ppo(tmp_path, monkeypatch, start, f"{reward_file(tmp_path)}:letters", lr=0.0, value_lr=1e-2)
    assert all(torch.equal(a, b) for a, b in zip(policy.parameters(), start.parameters(), strict=True))
    assert all(abs(row["approx_kl"]) < 1e-6 and row["clip_fraction"] == 0 and row["kl"] == 0 for row in log)
    state = load_file(tmp_path / "out" / "state.pt")["value_model"]
    assert any(not torch.equal(state[k], v) for k, v in calls[0]["value_start"].items())

    _, policy, _, calls = run_ppo(tmp_path, monkeypatch, start, f"{reward_file(tmp_path)}:letters", lr=1e-2, value_lr=0.0)
    state = load_file(tmp_path / "out" / "state.pt")["value_model"]
    assert all(torch.equal(state[k], v) for k, v in calls[0]["value_start"].items())
    assert not torch.equal(policy.wte.weight, start.wte.weight)


def test_the_adaptive_coefficient_follows_the_logged_kl(tmp_path, monkeypatch):
    """A controller fed with another KL (of one rank, of prompt tokens) or a penalty that goes on with the initial coefficient."""
    _, _, log, calls = run_ppo(
        tmp_path, monkeypatch, make_gpt(6, block_size=24), f"{reward_file(tmp_path)}:letters", iterations=4, lr=1e-2, kl_target=0.5, kl_horizon=100.0
    )
    coef = 0.2
    for row, call in zip(log, calls, strict=True):
        assert row["kl_coef"] == pytest.approx(coef, abs=1e-5)
        assert call["kl_coef"] == pytest.approx(coef, abs=1e-5)
        coef *= 1 + min(max(row["kl"] / 0.5 - 1, -0.2), 0.2) * 12 / 100


def test_rollouts_use_temperature_only(tmp_path, monkeypatch):
    """top-k, top-p or a minimum length in rollouts: the policy sampled from is not the policy that is scored, and KL turns negative."""
    seen = []
    original = generate

    def record(*args, **kwargs):
        seen.append(kwargs)
        return original(*args, **kwargs)

    monkeypatch.setattr(ppo, "generate", record)
    run_ppo(tmp_path, monkeypatch, make_gpt(7, block_size=24), f"{reward_file(tmp_path)}:nothing", iterations=1)
    assert seen[0]["temperature"] == 0.7
    assert not {"top_k", "top_p"} & seen[0].keys()
    assert not {"top_k", "top_p", "min_len", "min_length", "min_new_tokens"} & {f.name for f in fields(Config)}


def test_training_raises_the_reward(tmp_path, monkeypatch):
    """The toy must work: a reward for one letter makes the policy write it."""
    torch.manual_seed(0)
    even = GPT(GPTConfig(23, 24, n_layer=1, n_head=2, n_embd=32))  # every letter about equally likely
    spec = f"{reward_file(tmp_path)}:letters"
    _, _, log, _ = run_ppo(
        tmp_path, monkeypatch, even, spec, iterations=10, rollouts=32, minibatch=16, micro_batch=0, lr=1e-2, kl_coef=0.01, temperature=1.0
    )
    assert log[-1]["score"] > log[0]["score"] + 2


def test_gradients_are_those_of_the_script_s_optimiser(tmp_path, monkeypatch):
    """The whole script with plain SGD: the micro-batch changes memory and nothing else, over several iterations."""
    plain_sgd(monkeypatch)
    start, trained = make_gpt(9, block_size=24), []
    for size in (1, 2, 0):
        trained.append(run_ppo(tmp_path, monkeypatch, start, f"{reward_file(tmp_path)}:letters", iterations=2, micro_batch=size, lr=0.02)[1])
    for model in trained[1:]:
        assert_same_weights(model, trained[0], start, tolerance=1e-3)


@pytest.mark.parametrize(
    "changes",
    [
        {"temperature": 0.0},
        {"minibatch": 13},
        {"minibatch": 0},
        {"lam": 1.1},
        {"gamma": -0.1},
        {"clip": 0.0},
        {"kl_coef": -0.1},
        {"rollouts": 0},
        {"max_new_tokens": 24},
        {"train_layers": 3},
        {"micro_batch": -1},
        {"iterations": 0},
    ],
    ids=str,
)
def test_impossible_settings_are_refused(tmp_path, monkeypatch, changes):
    """A setting that can't work stops at once with one line, not as a crash or as silent nonsense after the first rollout."""
    with pytest.raises(UserError):
        run_ppo(tmp_path, monkeypatch, make_gpt(10, block_size=24), f"{reward_file(tmp_path)}:nothing", **changes)
