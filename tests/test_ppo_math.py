"""Stage 3a, the formulas: KL, shaped rewards, advantages, the two losses and the controller, each against its
definition."""

from __future__ import annotations

import itertools
import math
from decimal import Decimal, localcontext

import pytest
import torch
from helpers import finite_difference_gradient, frame_batch, gae_by_definition, gradient_of, randn, spoil
from torch import Tensor

from frame import completion_mask
from ppo import AdaptiveKL, Config, exact_kl, gae, kl_penalty, policy_loss, shaped_rewards, value_loss

# ------------------------------------------------------------------------------------------------ KL


def test_kl_estimators_by_hand(float64):
    """The sign of k1 (paying for divergence) and the direction of k3 (e^d - 1 - d is another
    quantity) are inverted in known code bases."""
    logprobs, ref = torch.log(torch.tensor([[0.5, 0.2]])), torch.log(torch.tensor([[0.25, 0.4]]))
    ln2 = math.log(2)
    for kind, expected in (("k1", [ln2, -ln2]), ("k2", [ln2**2 / 2, ln2**2 / 2]), ("k3", [0.5 - 1 + ln2, 2 - 1 - ln2])):
        assert kl_penalty(logprobs, ref, kind)[0].tolist() == pytest.approx(expected, abs=1e-12)
    with pytest.raises(ValueError, match="k1, k2, k3"):
        kl_penalty(logprobs, ref, "k4")


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_kl_gradient_equals_finite_differences(kind):
    """A gradient that stops at the switch between the two formulas of k3, or a detached term."""
    d = torch.tensor([-2.0, -0.5, -2e-3, -1e-4, 1e-4, 2e-3, 0.5, 2.0], dtype=torch.float64)
    found = gradient_of(lambda x: kl_penalty(x, torch.zeros_like(x), kind).sum(), d)
    expected = finite_difference_gradient(lambda x: kl_penalty(x, torch.zeros_like(x), kind).sum(), d)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-8)


def test_k3_is_exact_and_never_negative_near_zero():
    """e^-d - 1 + d cancels in float32: negative or zero KL for small d, where the truth is d^2
    / 2. (It would be off by 10% at 1e-3.)"""
    sizes = [10.0**-e for e in range(9)] + [9e-4, 9.99e-4, 1.001e-3, 2e-3, 5e-3, 0.3, 5.0, 20.0]
    for size, sign, (dtype, rel) in itertools.product(sizes, (1, -1), ((torch.float32, 2e-3), (torch.float64, 1e-6))):
        d = torch.tensor([sign * size], dtype=dtype)
        with localcontext() as context:
            context.prec = 60
            exact = Decimal(d.item())
            truth = float((-exact).exp() - 1 + exact)
        value = kl_penalty(d, torch.zeros_like(d), "k3").item()
        assert value >= 0
        assert value == pytest.approx(truth, rel=rel), size


def test_extreme_log_ratios_stay_finite():
    """A token the reference finds impossible: e^100 is infinite in float32."""
    d = torch.tensor([-1e4, -100.0, 100.0, 1e4])
    for kind in ("k1", "k2", "k3"):
        assert kl_penalty(d, torch.zeros(4), kind).isfinite().all()
        assert gradient_of(lambda x, k=kind: kl_penalty(x, torch.zeros(4), k).sum(), d).isfinite().all()


def loop_exact_kl(logits: Tensor, ref_logits: Tensor) -> Tensor:
    """The definition: for every position but the last, sum over the vocabulary of p log(p / q)."""
    B, T, V = logits.shape
    rows = []
    for b, t in itertools.product(range(B), range(T - 1)):
        p, q = (x[b, t].exp() / x[b, t].exp().sum() for x in (logits, ref_logits))
        rows.append(sum(p[v] * (p[v] / q[v]).log() for v in range(V)))
    return torch.stack(rows).view(B, T - 1)


def test_exact_kl_by_hand_and_by_loop(float64):
    """KL of the wrong direction, or one slot off: the distribution at t draws token t + 1."""
    p, q = torch.log(torch.tensor([[[0.5, 0.5], [0.9, 0.1]]])), torch.log(torch.tensor([[[0.25, 0.75], [0.5, 0.5]]]))
    assert exact_kl(p, q).tolist()[0] == pytest.approx([0.5 * math.log(2) + 0.5 * math.log(2 / 3)], abs=1e-12)
    assert exact_kl(q, p).tolist()[0] == pytest.approx([0.25 * math.log(0.5) + 0.75 * math.log(1.5)], abs=1e-12)
    logits, ref_logits = randn(2, 4, 5, seed=1), randn(2, 4, 5, seed=2)
    expected = loop_exact_kl(logits, ref_logits)
    torch.testing.assert_close(exact_kl(logits, ref_logits), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(exact_kl(logits + 7, ref_logits - 3), expected, rtol=0, atol=1e-12)


def test_exact_kl_gradient_equals_finite_differences():
    """A detached probability in p log(p / q) leaves the value right and the gradient wrong."""
    logits, ref_logits = randn(1, 3, 4, seed=3), randn(1, 3, 4, seed=4)
    found = gradient_of(lambda x: exact_kl(x, ref_logits).sum(), logits)
    expected = finite_difference_gradient(lambda x: loop_exact_kl(x, ref_logits).sum(), logits)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-8)


# ------------------------------------------------------------------------------------------------ rewards


def test_the_score_lands_on_the_last_action_only(float64):
    """The score one slot late, behind the EOS action, or at the last column: advantages would depend on the padding."""
    #                prompt 2, a EOS     prompt 1, cut after 3     prompt 3, EOS at once
    prompt_lens, lens = torch.tensor([2, 1, 3]), torch.tensor([4, 4, 4])
    mask = completion_mask(prompt_lens, lens, 6)[:, 1:]
    kl = torch.arange(1.0, 16.0).view(3, 5)
    rewards = shaped_rewards(torch.tensor([10.0, 20.0, 30.0]), kl, mask, 0.1)
    expected = [[0, -0.2, 10 - 0.3, 0, 0], [-0.6, -0.7, 20 - 0.8, 0, 0], [0, 0, 30 - 1.3, 0, 0]]
    torch.testing.assert_close(rewards, torch.tensor(expected), rtol=0, atol=1e-12)


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
    # the whole sequence gets score - coef * (sum of KL): with a mean the penalty would not depend on the length
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
    """Against the double sum and the backward recursion, sequence by sequence without filler. Garbage
    values at filler: bootstrapping from the value after EOS is the classic leak. Advantages are 0 at masked
    places, returns = advantages + values."""
    frame = frame_batch(B=6, extra=2, seed=10)
    mask = frame.action_mask
    rewards, values = (spoil(randn(*mask.shape, seed=s), mask, garbage) for s in (11, 12))
    advantages, returns = gae(rewards, values, mask, gamma, lam)
    for i in range(6):
        row_rewards, row_values = rewards[i][mask[i]].tolist(), values[i][mask[i]].tolist()
        for slow in (gae_by_definition, gae_by_recursion):
            expected = slow(row_rewards, row_values, gamma, lam)
            assert advantages[i][mask[i]].tolist() == pytest.approx(expected, abs=1e-10)
            sums = [a + v for a, v in zip(expected, row_values, strict=True)]
            assert returns[i][mask[i]].tolist() == pytest.approx(sums, abs=1e-10)
    assert (advantages[~mask] == 0).all()
    assert (returns[~mask] == 0).all()


def test_lambda_1_returns_are_the_rewards_to_go():
    """With lambda = gamma = 1 the critic drops out of the returns: they are sums
    of the rewards that are still to come."""
    frame = frame_batch(B=4, seed=13)
    mask = frame.action_mask
    rewards, values = torch.where(mask, randn(*mask.shape, seed=14), 0.0), randn(*mask.shape, seed=15, scale=100)
    _, returns = gae(rewards, values, mask, 1.0, 1.0)
    for i in range(4):
        row = rewards[i][mask[i]].tolist()
        assert returns[i][mask[i]].tolist() == pytest.approx([sum(row[t:]) for t in range(len(row))], abs=1e-9)


@pytest.mark.parametrize("lam", [0.0, 0.95, 1.0])
def test_advantages_do_not_depend_on_free_slots_behind_eos(lam):
    """The score at e + 1 gives the same response another advantage when a slot is
    free behind its EOS: T against T + k."""
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
    expected = [0.0, 1.5 / 4, -0.5 / 4, 0.0]  # -A * ratio / n where not clipped
    assert gradient[0].tolist() == pytest.approx(expected, abs=1e-12)


def test_policy_loss_at_ratio_1_is_minus_the_mean_advantage():
    """The first step is plain policy gradient: loss -mean(A), gradient -A / n, nothing
    clipped; the sign turned round would unlearn."""
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


def test_values_within_the_clip_are_not_counted():
    """In float32 old + (new - old) is not new: 0.114 was logged where 0.101 was true. The true count is taken in
    float64."""
    generator = torch.Generator().manual_seed(1)
    values, old, returns = (torch.randn(40, 50, generator=generator) for _ in range(3))
    mask = torch.rand(40, 50, generator=generator) < 0.8
    assert value_loss(values, old, returns, mask, 100.0)[1] == 0
    wide, start, target = values.double(), old.double(), returns.double()
    assert ((wide - start).abs() - 0.5).abs().min() > 1e-5, "none may stand at the edge of the clip"
    held = start + (wide - start).clamp(-0.5, 0.5)
    counted = ((wide - start).abs() > 0.5) & ((held - target) ** 2 > (wide - target) ** 2) & mask
    share = value_loss(values, old, returns, mask, 0.5)[1].item()
    assert share > 0.1 and share == pytest.approx((counted.sum() / mask.sum()).item(), abs=1e-6)


def test_value_loss_by_hand(float64):
    """min in the place of max lets the critic run away; the factor one half; clip 0 means off, not a range of 0."""
    values, returns = torch.tensor([[2.0, 2.0, 0.1, -2.0]]), torch.tensor([[3.0, 1.0, 0.5, 1.0]])
    old, mask = torch.zeros(1, 4), torch.ones(1, 4)
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

    expected = finite_difference_gradient(loss, values)
    torch.testing.assert_close(gradient_of(loss, values), expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("value", [1e30, math.inf, math.nan])
@pytest.mark.parametrize("which", ["policy", "value"])
def test_masked_entries_change_neither_loss_nor_gradients(which, value):
    """What stands at prompt and filler positions, in any of the tensors, changes loss and
    gradients by nothing; nor do 7 more columns."""
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
def test_parts_of_a_step_divide_by_the_actions_of_the_whole_step(float64, which):
    """A mean for each micro-batch: a reply of 3 tokens would weigh as much as one of 53. Also
    the order of the rows must not matter."""
    frame = frame_batch(B=8, max_completion=12, seed=36)
    mask = frame.action_mask
    tensors = [randn(*mask.shape, seed=s) for s in (37, 38, 39)]
    function = policy_loss if which == "policy" else value_loss
    whole = function(*tensors, mask, 0.2)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(40))
    for size in (1, 2, 8):
        batches = [[x[rows] for x in (*tensors, mask)] for rows in order.split(size)]
        parts = [function(*batch, 0.2, n_tokens=mask.sum()) for batch in batches]
        loss, fraction = (sum(p).item() for p in zip(*parts, strict=True))
        assert loss == pytest.approx(whole[0].item(), rel=1e-12)
        assert fraction == pytest.approx(whole[1].item(), rel=1e-12)


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


def test_the_adaptive_coefficient_stays_above_0_and_moves_by_a_fifth_at_most():
    """A horizon shorter than one batch made the coefficient negative, a bonus for divergence, or threw it about."""
    for horizon, n, kl in itertools.product((1e-3, 1.0, 100.0, 1e9), (1, 8, 192, 10**6), (-5.0, 0.0, 1.0, 1e9)):
        controller = AdaptiveKL(0.1, target=4.0, horizon=horizon)
        for _ in range(50):
            before = controller.coef
            controller.update(kl, n)
            assert controller.coef > 0
            assert 0.8 - 1e-12 <= controller.coef / before <= 1.2 + 1e-12
            assert (controller.coef > before) == (kl > 4) or n / horizon < 1e-6  # the change is below one digit there


def test_the_default_horizon_works_within_a_default_run():
    """A horizon of 10,000 rollouts moves the coefficient by 1.4x at most in the 18 iterations of a default run: no
    target could be held."""
    defaults = Config()
    for kl, factor in ((1e9, 3.0), (0.0, 1 / 3.0)):
        controller = AdaptiveKL(defaults.kl_coef, 4.0, defaults.kl_horizon)
        for _ in range(defaults.iterations):
            controller.update(kl, defaults.rollouts)
        moved = controller.coef / defaults.kl_coef
        assert moved > factor if factor > 1 else moved < factor


def test_the_default_horizon_holds_a_simulated_kl():
    """A policy that comes to KL 0.8 / coefficient, half the way in each iteration (as the closed-form optimum goes, KL
    falls with the coefficient): from 0.1 the target 4 needs 0.2, and a default run must find it."""
    defaults = Config()
    controller, kl = AdaptiveKL(0.1, 4.0, defaults.kl_horizon), 0.0
    for _ in range(defaults.iterations):
        kl += 0.5 * (0.8 / controller.coef - kl)
        controller.update(kl, defaults.rollouts)
    assert kl == pytest.approx(4.0, rel=0.1)
    assert controller.coef == pytest.approx(0.2, rel=0.1)


@pytest.mark.parametrize(("coef", "target", "horizon"), [(0.1, 4, 0), (0.1, 4, -1), (0.1, -1, 1), (0, 4, 1)])
def test_a_controller_that_can_not_work_is_refused(coef, target, horizon):
    """A division by 0; a coefficient of 0 that stays 0 for ever, whatever the KL is."""
    with pytest.raises(ValueError, match="AdaptiveKL needs"):
        AdaptiveKL(coef, target, horizon)


def test_without_a_target_the_coefficient_is_fixed():
    """Target 0 means off, not a division by 0 and not a target of 0 nats; a coefficient of 0 is then fine."""
    for coef in (0.0, 0.1):
        controller = AdaptiveKL(coef, target=0.0, horizon=500.0)
        controller.update(30.0, 192)
        assert controller.coef == coef
