"""Stage 3b: the loss at known points, the sums under it, the frozen reference, and that `train` takes exactly the steps
of the definition."""

from __future__ import annotations

import copy
import itertools
import math
import re

import pytest
import torch
from helpers import (
    CUT_GROUPS,
    CUT_RANKINGS,
    EOS,
    GROUPS,
    ITEMS,
    MIXED_RANKS,
    RANKINGS,
    TOY,
    assert_same_weights,
    completion_logprobs,
    descend,
    finite_difference_gradient,
    frame_batch,
    gradient_of,
    log_sigmoid,
    make_gpt,
    plain_sgd,
)
from stages import on_task, run, steady_policy
from torch import Tensor

import dpo
from lib.cli import UserError
from data.batches import RankedExamples, ranked_batch
from dpo import (
    dpo_loss,
    ranking_logprobs,
    ranking_pairs,
    sequence_logprobs,
)
from frame import completion_mask

CPU = torch.device("cpu")
LN2 = math.log(2)


def numbers(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# ------------------------------------------------------------------------------------------------ the loss


@pytest.mark.parametrize("beta", [0.05, 0.1, 2.0])
@pytest.mark.parametrize("eps", [0.0, 0.1])
def test_the_loss_starts_at_ln_2_with_a_gradient(beta, eps):
    """Policy equal to the reference: ln 2 exactly, rewards 0, and a gradient of -+ (1/2 - eps) beta. A loss stuck there
    has beta 0 or no unmasked token; no gradient there would be a policy that is detached."""
    chosen, rejected = numbers(-12.0, -3.0), numbers(-40.0, -1.0)
    losses, chosen_rewards, rejected_rewards = dpo_loss(chosen, rejected, chosen, rejected, beta, eps)
    assert losses.tolist() == pytest.approx([LN2, LN2], abs=1e-12)
    assert chosen_rewards.tolist() == rejected_rewards.tolist() == [0.0, 0.0]
    up = gradient_of(lambda x: dpo_loss(x, rejected, chosen, rejected, beta, eps)[0].sum(), chosen)
    down = gradient_of(lambda x: dpo_loss(chosen, x, chosen, rejected, beta, eps)[0].sum(), rejected)
    assert up.tolist() == pytest.approx([-beta * (0.5 - eps)] * 2, rel=1e-9)
    assert down.tolist() == pytest.approx([beta * (0.5 - eps)] * 2, rel=1e-9)


def test_two_pairs_by_hand():
    """The formula with its signs: h = log-ratio of the chosen minus log-ratio of the rejected."""
    policy_chosen, policy_rejected = numbers(-10.0, -20.0), numbers(-15.0, -12.0)
    ref_chosen, ref_rejected = numbers(-12.0, -18.0), numbers(-14.0, -15.0)
    # h = (2) - (-1) = 3 and (-2) - (3) = -5; at beta 0.1: -log sigmoid(0.3) = 0.554355, -log sigmoid(-0.5) = 0.974077
    losses, chosen_rewards, rejected_rewards = dpo_loss(policy_chosen, policy_rejected, ref_chosen, ref_rejected, 0.1)
    assert losses.tolist() == pytest.approx([0.554355, 0.974077], abs=1e-6)
    assert chosen_rewards.tolist() == pytest.approx([0.2, -0.2])
    assert rejected_rewards.tolist() == pytest.approx([-0.1, 0.3])
    # label smoothing 0.2: 0.8 * 0.554355 + 0.2 * 0.854355, and 0.8 * 0.974077 + 0.2 * 0.474077
    losses, *_ = dpo_loss(policy_chosen, policy_rejected, ref_chosen, ref_rejected, 0.1, label_smoothing=0.2)
    assert losses.tolist() == pytest.approx([0.614355, 0.874077], abs=1e-6)
    # ipo: (3 - 5)^2 and (-5 - 5)^2
    losses, *_ = dpo_loss(policy_chosen, policy_rejected, ref_chosen, ref_rejected, 0.1, kind="ipo")
    assert losses.tolist() == pytest.approx([4.0, 100.0])


@pytest.mark.parametrize(("kind", "eps"), [("sigmoid", 0.0), ("sigmoid", 0.2), ("ipo", 0.0)])
@pytest.mark.parametrize("which", range(2))
def test_gradient_equals_finite_differences(kind, eps, which):
    """Gradient with respect to the policy's log-probs, for every kind of loss."""
    x = [torch.randn(5, generator=torch.Generator().manual_seed(s), dtype=torch.float64) * 4 - 20 for s in range(4)]

    def loss(y: Tensor) -> Tensor:
        return dpo_loss(*(y if i == which else x[i] for i in range(4)), 0.3, eps, kind)[0].sum()

    expected = finite_difference_gradient(loss, x[which])
    torch.testing.assert_close(gradient_of(loss, x[which]), expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("eps", [0.05, 0.2, 0.4])
def test_label_smoothing_stops_where_the_labels_are_that_sure(eps):
    """eps and 1 - eps exchanged: the gradient must vanish where sigmoid(beta h) = 1 - eps, and pull back beyond."""
    beta, h = 0.25, math.log((1 - eps) / eps) / 0.25
    zero = numbers(0.0)

    def slope(x: float) -> float:
        return gradient_of(lambda y: dpo_loss(y, zero, zero, zero, beta, eps)[0].sum(), numbers(x)).item()

    assert slope(h) == pytest.approx(0, abs=1e-12)
    assert slope(h - 1) < 0 < slope(h + 1)


@pytest.mark.parametrize("beta", [0.05, 0.5])
def test_ipo_at_the_start_and_at_its_target(beta):
    """IPO: 1 / (4 beta^2) with gradient -1 / beta where policy and reference agree;
    nothing left to gain at h = 1 / (2 beta)."""
    zero = numbers(0.0)

    def loss(h: Tensor) -> Tensor:
        return dpo_loss(h, zero, zero, zero, beta, kind="ipo")[0].sum()

    assert loss(zero).item() == pytest.approx(1 / (4 * beta**2))
    assert gradient_of(loss, zero).item() == pytest.approx(-1 / beta)
    assert loss(numbers(1 / (2 * beta))).item() == pytest.approx(0, abs=1e-12)


def test_swapping_chosen_and_rejected_turns_the_margin_round():
    """An asymmetry between the two sides: swapped, the losses must be those of -h, and the rewards change places."""
    x = [torch.randn(6, generator=torch.Generator().manual_seed(s), dtype=torch.float64) for s in range(4)]
    h = (x[0] - x[2]) - (x[1] - x[3])
    for beta in (0.1, 1.0):
        losses, chosen, rejected = dpo_loss(*x, beta)
        swapped, swapped_chosen, swapped_rejected = dpo_loss(x[1], x[0], x[3], x[2], beta)
        assert losses.tolist() == pytest.approx([-log_sigmoid(beta * v) for v in h.tolist()], rel=1e-9)
        assert swapped.tolist() == pytest.approx([-log_sigmoid(-beta * v) for v in h.tolist()], rel=1e-9)
        assert torch.equal(chosen, swapped_rejected)
        assert torch.equal(rejected, swapped_chosen)


def test_implicit_rewards_are_for_logging():
    """Rewards logged without beta, without the reference, or with a gradient that adds to the loss's."""
    policy_chosen, policy_rejected = numbers(-3.0, -4.0).requires_grad_(), numbers(-5.0, -6.0).requires_grad_()
    _, chosen, rejected = dpo_loss(policy_chosen, policy_rejected, numbers(-2.0, -6.0), numbers(-4.0, -9.0), 0.5)
    assert not chosen.requires_grad
    assert not rejected.requires_grad
    assert chosen.tolist() == [-0.5, 1.0]
    assert rejected.tolist() == [-0.5, 1.5]


@pytest.mark.parametrize("kind", ["sigmoid", "ipo"])
def test_extreme_values_stay_finite(kind):
    """log(sigmoid(x)) underflows at long texts: loss and gradient must stay finite."""
    zero = torch.zeros(3)
    far = torch.tensor([-1e4, 1e4, -3e4])
    for eps in (0.0, 0.1) if kind == "sigmoid" else (0.0,):
        assert dpo_loss(far, zero, zero, zero, 1.0, eps, kind)[0].isfinite().all()
        gradient = gradient_of(lambda x, e=eps: dpo_loss(x, zero, zero, zero, 1.0, e, kind)[0].sum(), far)
        assert gradient.isfinite().all()
    losses, *_ = dpo_loss(far, zero, zero, zero, 1.0)
    assert losses.tolist() == pytest.approx([1e4, 0.0, 3e4])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"beta": 0.0}, "beta"),
        ({"beta": -0.1}, "beta"),
        ({"label_smoothing": 0.5}, "label_smoothing"),
        ({"label_smoothing": -0.1}, "label_smoothing"),
        ({"kind": "hinge"}, "kind"),
        ({"kind": "ipo", "label_smoothing": 0.1}, "label_smoothing"),
    ],
    ids=str,
)
def test_wrong_arguments_raise(changes, message):
    """beta 0 makes the loss a constant ln 2; a label smoothing that a kind
    silently ignores; a kind that doesn't exist."""
    with pytest.raises(ValueError, match=message):
        dpo_loss(*(torch.zeros(2) for _ in range(4)), **{"beta": 0.1, **changes})


# ------------------------------------------------------------------------------------------------ sequence log-probs


def mock_model(tokens: Tensor) -> Tensor:
    """Next-token probabilities that are known: half on id 1, 3/10 on id 2, 2/10 on EOS = 0, whatever came before."""
    return torch.tensor([0.2, 0.5, 0.3]).log().expand(*tokens.shape, 3)


def test_a_completion_is_the_sum_of_its_known_tokens(float64):
    """EOS left out of the sum, a mean over tokens, or prompt tokens in it: values known by hand."""
    tokens = torch.tensor([[2, 2, 1, 0, 0], [1, 2, 1, 1, 0]])  # prompts of two; "1 EOS" and filler, "1 1 EOS"
    mask = completion_mask(torch.tensor([2, 2]), torch.tensor([4, 5]), 5)
    expected = [math.log(0.5) + math.log(0.2), 2 * math.log(0.5) + math.log(0.2)]
    assert sequence_logprobs(mock_model, tokens, mask).tolist() == pytest.approx(expected, abs=1e-12)


def test_sequence_logprobs_equal_the_obvious_way(float64):
    """Frame off by one, filler in the sum, another temperature than 1: against one float64 row at a time."""
    for rope_base in (0.0, 100.0):
        model, frame = make_gpt(1, rope_base=rope_base), frame_batch(B=6, extra=3, seed=1)
        found = sequence_logprobs(model, frame.tokens, frame.completion_mask)
        for i in range(6):
            ids, P = frame.row(i)[0].tolist(), int(frame.prompt_lens[i])
            expected = completion_logprobs(model, ids[:P], ids[P:]).sum().item()
            assert found[i].item() == pytest.approx(expected, abs=1e-10)


def test_gradient_is_on_the_completion_alone(float64):
    """Pad id equal to EOS: the EOS decision must have a gradient, prompt and filler none."""
    tokens = torch.tensor([[3, EOS, 4, 5, EOS, EOS, EOS], [7, 8, 9, 10, 11, 12, EOS]])
    mask = completion_mask(torch.tensor([3, 1]), torch.tensor([5, 7]), 7)
    logits = torch.randn(2, 7, 23, generator=torch.Generator().manual_seed(2))
    gradient = gradient_of(lambda x: sequence_logprobs(lambda _: x, tokens, mask).sum(), logits)
    assert [[t for t in range(7) if gradient[b, t].abs().max() > 0] for b in range(2)] == [[2, 3], [0, 1, 2, 3, 4, 5]]
    assert gradient[0, 3, EOS].item() == pytest.approx(1 - logits[0, 3].softmax(-1)[EOS].item(), abs=1e-11)


@pytest.mark.parametrize("filler", [0, EOS])
def test_padding_changes_neither_loss_nor_gradients(float64, filler):
    """7 more columns and other filler: a mean over the padded length, or a mask made from ids."""
    model, reference = make_gpt(2), make_gpt(3)
    narrow = frame_batch(B=4, seed=3)
    tokens = torch.full((4, narrow.tokens.size(1) + 7), filler)
    for i in range(4):
        tokens[i, : narrow.lens[i]] = narrow.row(i)[0]
    results = []
    for x in (narrow.tokens, tokens):
        mask = completion_mask(narrow.prompt_lens, narrow.lens, x.size(1))
        logprobs, ref = sequence_logprobs(model, x, mask), sequence_logprobs(reference, x, mask).detach()
        loss = dpo_loss(logprobs[:2], logprobs[2:], ref[:2], ref[2:], 0.1)[0].sum()
        results.append([loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


@pytest.mark.parametrize("value", [math.nan, math.inf, -1e30])
def test_masked_logits_may_be_anything(float64, value):
    """A product with the mask: a nan at a filler position makes the whole log-prob nan."""
    frame = frame_batch(B=4, extra=2, seed=4)
    logits = torch.randn(*frame.tokens.shape, 23, generator=torch.Generator().manual_seed(5))
    used = torch.cat([frame.action_mask, torch.zeros(4, 1, dtype=torch.bool)], 1)
    spoilt = torch.where(used[..., None], logits, value)
    expected = sequence_logprobs(lambda _: logits, frame.tokens, frame.completion_mask)
    assert torch.equal(sequence_logprobs(lambda _: spoilt, frame.tokens, frame.completion_mask), expected)

    def loss(x: Tensor) -> Tensor:
        return sequence_logprobs(lambda _: x, frame.tokens, frame.completion_mask).sum()

    torch.testing.assert_close(gradient_of(loss, spoilt), gradient_of(loss, logits), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "mask", [[[0, 0, 1, 1], [0, 0, 0, 0]], [[0, 0, 1, 1], [1, 0, 0, 0]]], ids=["empty", "first token only"]
)
def test_a_row_without_completion_raises(mask):
    """Log-probs that are all 0.0: nothing is unmasked, and the loss stays at ln 2. The first
    token of a row has no prediction either."""
    with pytest.raises(ValueError, match="completion"):
        sequence_logprobs(make_gpt(4), torch.tensor([[1, 2, 3, 4], [1, 2, 3, 4]]), torch.tensor(mask, dtype=torch.bool))


# ---------------------------------------------------------------------------------------------- pairs and the reference


def test_rankings_expand_to_all_strict_pairs():
    """A tie compared with itself, an absent completion compared at all, or K -
    1 pairs in the place of K (K - 1) / 2."""
    all_ranks = torch.cat([MIXED_RANKS, torch.tensor([[-1, 0, 1, -1]])])
    logprobs = torch.arange(24.0).view(6, 4)
    expected = []
    for row, ranks in zip(logprobs.tolist(), all_ranks.tolist(), strict=True):
        for i, j in itertools.combinations(range(4), 2):
            if ranks[i] >= 0 and ranks[j] >= 0 and ranks[i] != ranks[j]:
                expected.append((row[i], row[j]) if ranks[i] < ranks[j] else (row[j], row[i]))
    chosen, rejected = ranking_pairs(logprobs, all_ranks)
    assert sorted(zip(chosen.tolist(), rejected.tolist(), strict=True)) == sorted(expected)
    for ranks in MIXED_RANKS.tolist():
        item = RankedExamples([], [r for r in ranks if r >= 0])
        assert item.n_strict_pairs == sum(a != b for a, b in itertools.combinations(item.ranks, 2))
        assert item.n_pairs == math.comb(len(item.ranks), 2)


@pytest.mark.parametrize("rope_base", [0.0, 100.0])
def test_the_shared_prompt_changes_no_logprob(float64, rope_base):
    """Completions that share a prompt must not see each other: each has the log-probs, and the gradients, that it has
    in a row of its own."""
    model = make_gpt(8, rope_base=rope_base)
    shared = ranking_logprobs(model, ranked_batch(ITEMS, CPU))
    weights = torch.randn(*shared.shape, generator=torch.Generator().manual_seed(3))
    sum_of = (shared * weights).sum()
    alone = 0.0
    for n, item in enumerate(ITEMS):
        assert (shared[n, len(item.examples) :] == 0).all()
        for k, e in enumerate(item.examples):
            mask = torch.tensor([[False] * len(e.prompt) + [True] * len(e.completion)])
            logprob = sequence_logprobs(model, torch.tensor([e.ids]), mask)[0]
            torch.testing.assert_close(shared[n, k], logprob, rtol=0, atol=1e-11)
            alone = alone + weights[n, k] * logprob
    found, expected = (torch.autograd.grad(x, [*model.parameters()]) for x in (sum_of, alone))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_only_the_tokens_before_a_completion_s_are_predicted_from():
    """The last block, and the logits, of prompts and filler too: most of a step's time and memory, thrown away."""
    model, batch, rows = make_gpt(5), ranked_batch(ITEMS, CPU), []
    model.h[-1].mlp.register_forward_hook(lambda _, inputs, __: rows.append(inputs[0].shape[:-1]))
    ranking_logprobs(model, batch)
    assert rows == [(int(batch.lens.sum()),)]


# ------------------------------------------------------------------------------------------------ the script


def slow_ratios(policy, reference=None, cut: bool = False) -> list[tuple[Tensor, Tensor]]:
    """log pi/pi_ref (log pi without a reference) of the better and of the worse text, for every strict pair of GROUPS
    or CUT_GROUPS, text by text in float64."""
    pairs = []
    for prompt, groups in CUT_GROUPS if cut else GROUPS:
        ratios = []
        for rank, texts in enumerate(groups):
            for text in texts:
                end = [EOS] if text.endswith(".") or not cut else []
                ids = TOY.encode(prompt), [*TOY.encode(text.removesuffix(".")), *end]
                old = completion_logprobs(reference, *ids).sum().detach() if reference else 0.0
                ratios.append((rank, completion_logprobs(policy, *ids).sum() - old))
        pairs += [(a, b) for (better, a), (worse, b) in itertools.combinations(ratios, 2) if better != worse]
    return pairs


def slow_loss(policy, reference, beta: float, eps: float = 0.0, kind: str = "sigmoid", cut: bool = False) -> Tensor:
    """The mean over those pairs, by the formula."""
    losses = []
    for a, b in slow_ratios(policy, reference, cut):
        p = torch.sigmoid(beta * (a - b))
        sigmoid = -(1 - eps) * p.log() - eps * (1 - p).log()
        losses.append(sigmoid if kind == "sigmoid" else (a - b - 1 / (2 * beta)) ** 2)
    return torch.stack(losses).mean()


@pytest.mark.parametrize(("kind", "eps", "micro_batch"), [("sigmoid", 0.0, 0), ("sigmoid", 0.1, 2), ("ipo", 0.0, 4)])
def test_training_steps_are_the_gradient_of_all_pairs(tmp_path, monkeypatch, float64, kind, eps, micro_batch):
    """Two steps of the script against float64 descent on the definition: a mean of micro-batch means, EOS or prompt in
    the sum, ties as pairs, a reference that learns along or whose log-probs are matched with other rankings, eps on the
    wrong side. The order of the rows, which the seed decides, changes nothing."""
    plain_sgd(monkeypatch)
    before = make_gpt(8, block_size=24)
    reference, expected, losses = copy.deepcopy(before), copy.deepcopy(before), []
    lr = 0.02 if kind == "sigmoid" else 1e-4
    for factor in (1.0, 0.5):  # linear decay over two steps
        loss = slow_loss(expected, reference, 0.2, eps, kind)
        losses.append(loss.item())
        descend(expected, loss, lr * factor)
    changes = {"epochs": 2, "beta": 0.2, "label_smoothing": eps, "kind": kind, "lr": lr, "micro_batch": micro_batch}
    for seed in (1, 2):
        _, after, log = run("dpo", tmp_path, before, seed=seed, **changes)
        assert_same_weights(after, expected, before)
        assert [row["loss"] for row in log] == pytest.approx(losses, abs=1e-6)  # the log rounds to six digits
    assert losses[1] < losses[0]


def test_cut_texts_have_no_eos_to_learn_from(tmp_path, monkeypatch, float64):
    """An EOS behind each text that --max_new_tokens cut: DPO learns to stop in mid-sentence. A step on rankings with
    "ended", against the definition."""
    plain_sgd(monkeypatch)
    before = make_gpt(8, block_size=24)
    expected = copy.deepcopy(before)
    descend(expected, slow_loss(expected, before, 0.1, cut=True), 0.02)
    _, after, log = run("dpo", tmp_path, before, CUT_RANKINGS, micro_batch=1)
    assert_same_weights(after, expected, before)
    assert log[0]["loss"] == pytest.approx(LN2, abs=1e-6)


@pytest.mark.parametrize(("kind", "eps"), [("sigmoid", 0.1), ("ipo", 0.0)])
def test_figures_equal_a_loop(tmp_path, float64, kind, eps):
    """Logged and held-out figures: a mean of batch means, dropout in evaluation, a margin of the wrong things, rewards
    or log-probs exchanged, an equal pair that counts as wrong (accuracy 0 at the start)."""
    before = make_gpt(6, block_size=24, dropout=0.5)
    settings = {"beta": 0.2, "label_smoothing": eps, "kind": kind, "micro_batch": 2, "epochs": 2}
    settings["lr"] = 0.01 if kind == "sigmoid" else 1e-4
    results, after, _ = run("dpo", tmp_path, before, held_out=RANKINGS, **settings)
    ratios = slow_ratios(after, before)
    margins = [0.2 * (a - b).item() for a, b in ratios]
    assert results["loss"] == pytest.approx(slow_loss(after, before, 0.2, eps, kind).item(), rel=1e-9)
    assert results["margin"] == pytest.approx(sum(margins) / len(margins), abs=1e-9)
    assert results["accuracy"] == pytest.approx(sum(m > 0 for m in margins) / len(margins), abs=1e-9)
    # the figures that a step logs are those of the policy before it
    first, second = run("dpo", tmp_path, before, **settings).log
    middle = run("dpo", tmp_path, before, **settings | {"epochs": 1}).model
    assert first["accuracy"] == 0.5 and first["margin"] == 0
    ratios, logprobs = slow_ratios(middle, before), slow_ratios(middle)
    chosen, rejected = (sum(pair[i].item() for pair in ratios) / len(ratios) for i in (0, 1))
    assert second["chosen_reward"] == pytest.approx(0.2 * chosen, abs=1e-6)
    assert second["rejected_reward"] == pytest.approx(0.2 * rejected, abs=1e-6)
    chosen, rejected = (sum(pair[i].item() for pair in logprobs) / len(logprobs) for i in (0, 1))
    assert second["chosen_logprob"] == pytest.approx(chosen, abs=1e-6)
    assert second["rejected_logprob"] == pytest.approx(rejected, abs=1e-6)


def test_the_first_logged_step_is_ln_2_and_the_loss_falls(tmp_path):
    """Stuck at 0.6931 with rewards of exactly 0: the first step must be ln 2 with a
    gradient, and the later ones below it."""
    policy = make_gpt(10, block_size=24, dropout=0.3)
    results, _, log = run("dpo", tmp_path, policy, held_out=RANKINGS, epochs=20, lr=4e-3, grad_clip=1.0)
    assert log[0]["loss"] == pytest.approx(LN2, abs=1e-5)
    assert (log[0]["chosen_reward"], log[0]["rejected_reward"]) == pytest.approx((0, 0), abs=1e-4)
    assert log[0]["grad_norm"] > 0.01
    assert log[1]["loss"] < LN2 - 1e-3
    assert results["loss"] < 0.3
    assert results["accuracy"] == 1.0


def test_in_bfloat16_policy_and_reference_still_agree_at_the_start(tmp_path):
    """The policy's log-probs in bfloat16 against the reference's in float32: rewards that are
    rounding noise from the first step on."""
    log = run("dpo", tmp_path, make_gpt(11, block_size=24), dtype="bfloat16", beta=1.0, lr=0.0).log
    assert log[0]["loss"] == pytest.approx(LN2, abs=1e-3)
    assert abs(log[0]["chosen_reward"]) < 1e-2


# ------------------------------------------------------------------------------------------------ did it work?


def test_a_collapse_shows_without_held_out_data(tmp_path, capsys):
    """EOS rate 0.6 and a KL of 70 nats stood in results.json alone: both are printed, held-out data or not, with a
    warning where they say that the policy is gone, and none where it has not moved."""
    policy = make_gpt(10, block_size=24)
    for lr, collapsed in ((0.0, False), (0.3, True)):
        results = run("dpo", tmp_path, policy, epochs=5, lr=lr, max_new_tokens=18).results
        said = capsys.readouterr().out
        assert results["kl"] > 25 if collapsed else results["kl"] == pytest.approx(0, abs=1e-4)
        if not collapsed:
            assert results["eos_rate"] == results["ref_eos_rate"]
        assert f"EOS rate {results['eos_rate']:.2f}" in said
        assert f"KL to the reference {results['kl']:.1f} nats" in said
        assert ("WARNING: the policy has collapsed" in said) == collapsed


def test_samples_are_as_long_as_asked(tmp_path, capsys):
    """--max_new_tokens that is ignored: of a policy that never stops every sample is cut there."""
    for n in (9, 60):
        policy = steady_policy([0.0] * 22 + [-30.0], block_size=96)
        results = run("dpo", tmp_path, policy, lr=0.0, max_new_tokens=n).results
        samples = re.findall(r"^  '\w*' -> '(\w*)'$", capsys.readouterr().out, re.M)
        assert [len(text) for text in samples] == [n, n, n] and results["eos_rate"] == 0


def test_knowing_the_pairs_by_heart_is_said(capsys):
    """Accuracy 1 on the training pairs and chance on others looks like a success in the progress bar."""
    for train_accuracy, accuracy, warned in ((1.0, 0.6, True), (0.7, 0.6, False), (1.0, 0.9, False), (0.9, 0.6, False)):
        results = {"accuracy": accuracy, "loss": 0.5, "margin": 0.1, "eos_rate": 1.0}
        logged = [{"loss": LN2, "accuracy": a} for a in (*[1.7 - train_accuracy] * 20, *[train_accuracy] * 10)]
        dpo.report(results, logged, "")  # by the last ten steps, whatever the first ones were
        assert ("by heart" in capsys.readouterr().out) == warned


@pytest.mark.parametrize("start", [LN2, 25.0])  # of sigmoid, and of ipo with beta 0.1
def test_each_gate_can_fail(start):
    """A blown-up run passed by its accuracy alone, with a loss of 4e10: loss and EOS rate have gates too. The loss
    counts as a share of what it is before training."""
    good = {"accuracy": 0.75, "loss": 0.8 * start, "margin": 1.0, "eos_rate": 1.0}
    for changes, failed in (
        ({}, None),
        ({"loss": 4e10}, "DPO held-out loss, share of the start's"),
        ({"loss": start}, "DPO held-out loss, share of the start's"),
        ({"accuracy": 0.5}, "DPO held-out accuracy"),
        ({"eos_rate": 0.6}, "DPO EOS rate"),
    ):
        logged = [{"loss": start, "accuracy": 0.7}, {"loss": 0.8 * start, "accuracy": 0.7}]
        gates = dpo.report(good | changes, logged, "tiny")
        assert [g["name"] for g in gates if not g["ok"]] == ([failed] if failed else [])


def test_a_learning_rate_of_a_million_does_not_pass(tmp_path):
    """With Adam the weights stay finite and the accuracy can be anything: a gate fails, or no model is saved."""
    try:
        changes = on_task("dpo", tmp_path, own=False, vocabulary="tiny") | {"lr": 1e6, "batch_size": 1}
        results = run("dpo", tmp_path, **changes).results
    except UserError as error:
        assert "--lr" in str(error) and not (tmp_path / "out" / "model.pt").exists()
    else:
        assert not all(g["ok"] for g in results["gates"])


def test_held_out_figures_are_without_dropout():
    """A caller that trains with dropout, and forgets to turn it off: other figures each time."""
    policy, reference = make_gpt(1, dropout=0.5), make_gpt(2)
    config = dpo.Config(device="cpu")
    expected = dpo.evaluate(policy.eval(), reference, ITEMS, config)
    assert dpo.evaluate(policy.train(), reference, ITEMS, config) == expected
