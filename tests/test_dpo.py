"""Stage 3b: the loss at known points, the sums under it, the frozen reference, and that `train` takes exactly the steps
of the definition."""

from __future__ import annotations

import copy
import itertools
import math
from pathlib import Path

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
    assert_steps_hold_all_lengths,
    beside_a_demo,
    checkpoint,
    completion_logprobs,
    descend,
    distance,
    finite_difference_gradient,
    frame_batch,
    gradient_of,
    log_sigmoid,
    make_gpt,
    own_pairs,
    plain_sgd,
    rankings_of_all_lengths,
    read_lines,
    record_steps,
    strict_json,
    task_rankings,
    write_lines,
)
from torch import Tensor

import dpo
import frame
import sft
from lib.cli import UserError
from lib.checkpoint import load_model, save_model
from data.batches import RankedExamples, encode_rankings, ranked_batch
from data.files import Ranking
from data.tokenizer import load_tokenizer
from dpo import (
    Config,
    add_reference_logprobs,
    dpo_loss,
    figures_of,
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


def test_reference_logprobs_do_not_depend_on_the_batches(float64):
    """Cached log-probs that belong to another ranking, or change with who was scored
    beside whom; then h is not 0 at the start."""
    reference = make_gpt(5)
    for repeats in (1, 40):  # one batch; several of them, in another order than the rankings
        items = [copy.copy(item) for _ in range(repeats) for item in ITEMS]
        add_reference_logprobs(reference, items, Config())
        for item in items:
            expected = [completion_logprobs(reference, e.prompt, e.completion).sum().item() for e in item.examples]
            assert item.ref_logprobs.tolist() == pytest.approx(expected, abs=1e-10)
            assert not item.ref_logprobs.requires_grad
    items = items[: len(ITEMS)]
    logprobs = ranking_logprobs(reference, ranked_batch(items, CPU), "float32")
    for row, item in zip(logprobs, items, strict=True):
        k = len(item.ranks)
        torch.testing.assert_close(row[:k].detach(), item.ref_logprobs, rtol=0, atol=1e-10)
        assert (row[k:] == 0).all()


@pytest.mark.parametrize("rope_base", [0.0, 100.0])
def test_the_shared_prompt_changes_no_logprob(float64, rope_base):
    """Completions that share a prompt must not see each other: each has the log-probs, and the gradients, that it has
    in a row of its own."""
    model = make_gpt(8, rope_base=rope_base)
    shared = ranking_logprobs(model, ranked_batch(ITEMS, CPU), "float32")
    weights = torch.randn(*shared.shape, generator=torch.Generator().manual_seed(3))
    sum_of = (shared * weights).sum()
    alone = 0.0
    for n, item in enumerate(ITEMS):
        for k, e in enumerate(item.examples):
            mask = torch.tensor([[False] * len(e.prompt) + [True] * len(e.completion)])
            logprob = sequence_logprobs(model, torch.tensor([e.ids]), mask)[0]
            torch.testing.assert_close(shared[n, k], logprob, rtol=0, atol=1e-11)
            alone = alone + weights[n, k] * logprob
    found, expected = (torch.autograd.grad(x, [*model.parameters()]) for x in (sum_of, alone))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_the_reference_pass_may_go_in_slices(float64, monkeypatch):
    """Without gradients a few rankings go through the model at a time: each with its own positions and its own mask."""
    reference = make_gpt(5)
    whole = ranking_logprobs(reference, ranked_batch(ITEMS, CPU), "float32").detach()
    assert len(ITEMS) > 2
    monkeypatch.setattr(frame, "rows_at_a_time", lambda tokens, model: 2)
    with torch.no_grad():
        sliced = ranking_logprobs(reference, ranked_batch(ITEMS, CPU), "float32")
    torch.testing.assert_close(sliced, whole, rtol=0, atol=1e-10)


def test_figures_by_hand():
    """Equal rewards counted as wrong (accuracy 0 at the start), or the margin of the wrong things."""
    losses, chosen, rejected = numbers(0.5, 0.7, 0.9), numbers(1.0, 0.0, -1.0), numbers(0.0, 0.0, 1.0)
    logprobs = numbers(-1.0, -2.0, -3.0), numbers(-4.0, -5.0, -9.0)
    figures = figures_of(torch.stack([losses, chosen, rejected, *logprobs]))
    expected = {"loss": 0.7, "accuracy": 0.5, "margin": -1 / 3, "chosen_reward": 0.0, "rejected_reward": 1 / 3}
    assert figures == pytest.approx({**expected, "chosen_logprob": -2.0, "rejected_logprob": -6.0})


@pytest.mark.parametrize(("kind", "eps"), [("sigmoid", 0.1), ("ipo", 0.0)])
def test_held_out_figures_equal_a_loop(float64, kind, eps):
    """A mean of batch means, dropout in evaluation, or the reference's log-probs of other rankings."""
    policy, reference = make_gpt(6, dropout=0.5), make_gpt(7)
    policy.train()
    config = Config(beta=0.2, label_smoothing=eps, kind=kind)
    items = [copy.copy(item) for item in ITEMS]
    add_reference_logprobs(reference, items, config)
    found = dpo.evaluate(policy, items, config)
    many = [copy.copy(item) for _ in range(30) for item in items]  # several batches, whose pairs are of unequal number
    assert dpo.evaluate(policy, many, config) == pytest.approx(found, rel=1e-10)
    policy.eval()
    losses, hits, margins = [], [], []
    for item in ITEMS:
        new = [completion_logprobs(policy, e.prompt, e.completion).sum().item() for e in item.examples]
        old = [completion_logprobs(reference, e.prompt, e.completion).sum().item() for e in item.examples]
        for i, j in itertools.combinations(range(len(new)), 2):
            if item.ranks[i] != item.ranks[j]:
                h = (new[i] - old[i]) - (new[j] - old[j])
                sigmoid = -(1 - eps) * log_sigmoid(0.2 * h) - eps * log_sigmoid(-0.2 * h)
                losses.append(sigmoid if kind == "sigmoid" else (h - 2.5) ** 2)
                margins.append(0.2 * h)
                hits.append(float(h > 0))
    assert found["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-10)
    assert found["margin"] == pytest.approx(sum(margins) / len(margins), abs=1e-10)
    assert found["accuracy"] == pytest.approx(sum(hits) / len(hits), abs=1e-10)


# ------------------------------------------------------------------------------------------------ the script


def run_dpo(tmp_path: Path, policy, rankings=RANKINGS, held_out=None, **changes) -> tuple[dict, object, list[dict]]:
    """dpo.train on toy rankings; -> results, the trained policy, the log."""
    out = Path(changes.get("out_dir", tmp_path / "out"))
    settings = {
        "data": write_lines(tmp_path / "r.jsonl", rankings),
        "held_out_data": write_lines(tmp_path / "h.jsonl", held_out) if held_out else "",
        "policy": checkpoint(tmp_path / "policy", policy),
        **{"out_dir": str(out), "batch_size": 8, "warmup": 0, "grad_clip": 1e9},
        **{"lr": 0.02, "log_every": 1, "max_new_tokens": 6, "device": "cpu"},
        **{"beta": 0.1, "kind": "sigmoid", "label_smoothing": 0.0, "epochs": 1},
    }
    results = dpo.train(Config(**{**settings, **changes}))
    return results, load_model(out, CPU).model, read_lines(out / "metrics.jsonl")


def slow_loss(policy, reference, beta: float, eps: float = 0.0, kind: str = "sigmoid", cut: bool = False) -> Tensor:
    """The mean over all strict pairs of GROUPS, or of CUT_GROUPS, text by text in float64."""
    losses = []
    for prompt, groups in CUT_GROUPS if cut else GROUPS:
        ratios = []
        for rank, texts in enumerate(groups):
            for text in texts:
                end = [EOS] if text.endswith(".") or not cut else []
                ids = TOY.encode(prompt), [*TOY.encode(text.removesuffix(".")), *end]
                new, old = (completion_logprobs(model, *ids).sum() for model in (policy, reference))
                ratios.append((rank, new - old.detach()))
        for (rank_a, a), (rank_b, b) in itertools.combinations(ratios, 2):
            if rank_a != rank_b:
                p = torch.sigmoid(beta * (a - b))
                sigmoid = -(1 - eps) * p.log() - eps * (1 - p).log()
                losses.append(sigmoid if kind == "sigmoid" else (a - b - 1 / (2 * beta)) ** 2)
    return torch.stack(losses).mean()


@pytest.mark.parametrize(
    ("kind", "eps", "micro_batch"), [("sigmoid", 0.0, 0), ("sigmoid", 0.1, 1), ("sigmoid", 0.1, 4), ("ipo", 0.0, 2)]
)
def test_training_steps_are_the_gradient_of_all_pairs(tmp_path, monkeypatch, float64, kind, eps, micro_batch):
    """Two steps of the script against float64 descent on the definition, whatever the
    micro-batch: a mean of micro-batch means, EOS or prompt in the sum, ties as pairs, the
    reference that learns along, eps on the wrong side."""
    plain_sgd(monkeypatch)
    before = make_gpt(8, block_size=24)
    reference, expected, losses = copy.deepcopy(before), copy.deepcopy(before), []
    lr = 0.02 if kind == "sigmoid" else 1e-4
    for factor in (1.0, 0.5):  # linear decay over two steps
        loss = slow_loss(expected, reference, 0.2, eps, kind)
        losses.append(loss.item())
        descend(expected, loss, lr * factor)
    changes = {"epochs": 2, "beta": 0.2, "label_smoothing": eps, "kind": kind, "lr": lr}
    _, after, log = run_dpo(tmp_path, before, micro_batch=micro_batch, **changes)
    assert_same_weights(after, expected, before)
    assert [row["loss"] for row in log] == pytest.approx(losses, abs=1e-6)  # the log rounds to six digits
    assert losses[1] < losses[0]


@pytest.mark.parametrize("micro_batch", [0, 1])
def test_cut_texts_have_no_eos_to_learn_from(tmp_path, monkeypatch, float64, micro_batch):
    """An EOS behind each text that --max_new_tokens cut: DPO learns to stop in mid-sentence. A step on rankings with
    "ended", against the definition."""
    plain_sgd(monkeypatch)
    before = make_gpt(8, block_size=24)
    expected = copy.deepcopy(before)
    loss = slow_loss(expected, before, 0.1, cut=True)
    descend(expected, loss, 0.02)
    _, after, log = run_dpo(tmp_path, before, CUT_RANKINGS, micro_batch=micro_batch)
    assert_same_weights(after, expected, before)
    assert log[0]["loss"] == pytest.approx(LN2, abs=1e-6)


def test_a_step_holds_rankings_of_all_lengths(tmp_path, monkeypatch):
    """Steps of similar lengths: the learning rate's decay, and each step's clipping, would fall on one length alone."""
    steps = []
    record_steps(steps, monkeypatch, dpo)
    policy = make_gpt(10, block_size=32, n_layer=1)
    run_dpo(tmp_path, policy, rankings_of_all_lengths(96), epochs=2, batch_size=8, lr=1e-4)
    assert_steps_hold_all_lengths(steps, 96, 2)


def test_only_the_last_layers_are_trained(tmp_path, monkeypatch, float64):
    """--train_layers that is ignored, or that freezes the reference alone: last block and final LayerNorm move as the
    definition says, everything before them not at all."""
    plain_sgd(monkeypatch)
    before = make_gpt(8, block_size=24)
    expected = copy.deepcopy(before)
    for name, p in expected.named_parameters():
        p.requires_grad_(name.startswith(("h.1.", "ln_f.")))
    descend(expected, slow_loss(expected, before, 0.1), 0.02)
    _, after, _ = run_dpo(tmp_path, before, train_layers=1)
    assert_same_weights(after, expected, before)
    for (name, p), start in zip(after.named_parameters(), before.parameters(), strict=True):
        assert torch.equal(p, start) or name.startswith(("h.1.", "ln_f.")), name


def test_order_of_the_rows_does_not_matter(tmp_path, monkeypatch, float64):
    """Log-probs of the reference that are matched with the wrong rankings once the rows are shuffled."""
    plain_sgd(monkeypatch)
    policy = make_gpt(9, block_size=24)
    trained = [run_dpo(tmp_path, policy, seed=seed, micro_batch=2, epochs=2)[1] for seed in (1, 2, 3)]
    for other in trained[1:]:
        assert_same_weights(other, trained[0], policy)


def test_the_first_logged_step_is_ln_2_and_the_loss_falls(tmp_path):
    """Stuck at 0.6931 with rewards of exactly 0: the first step must be ln 2 with a
    gradient, and the later ones below it."""
    policy = make_gpt(10, block_size=24, dropout=0.3)
    results, _, log = run_dpo(tmp_path, policy, held_out=RANKINGS, epochs=20, lr=4e-3, grad_clip=1.0)
    assert log[0]["loss"] == pytest.approx(LN2, abs=1e-5)
    assert (log[0]["chosen_reward"], log[0]["rejected_reward"]) == pytest.approx((0, 0), abs=1e-4)
    assert log[0]["grad_norm"] > 0.01
    assert log[1]["loss"] < LN2 - 1e-3
    assert results["loss"] < 0.3
    assert results["accuracy"] == 1.0
    assert {"chosen_logprob", "rejected_logprob", "margin", "accuracy"} <= log[0].keys()
    strict_json(tmp_path / "out" / "results.json")


def test_in_bfloat16_policy_and_reference_still_agree_at_the_start(tmp_path):
    """The policy's log-probs in bfloat16 against the reference's in float32: rewards that are
    rounding noise from the first step on."""
    _, _, log = run_dpo(tmp_path, make_gpt(11, block_size=24), dtype="bfloat16", beta=1.0, lr=0.0)
    assert log[0]["loss"] == pytest.approx(LN2, abs=1e-3)
    assert abs(log[0]["chosen_reward"]) < 1e-2
    _, _, exact = run_dpo(tmp_path, make_gpt(11, block_size=24), beta=1.0, lr=0.0)
    assert log[0]["chosen_logprob"] != exact[0]["chosen_logprob"]  # --dtype is not ignored
    assert log[0]["chosen_logprob"] == pytest.approx(exact[0]["chosen_logprob"], rel=0.05)


def test_the_reference_stays_frozen(tmp_path, monkeypatch):
    """A reference that shares storage with the policy, or learns along: the log-ratios stay 0 and nothing is held."""
    seen = []
    original = add_reference_logprobs

    def record(reference, *args):
        seen.append(reference)
        return original(reference, *args)

    monkeypatch.setattr(dpo, "add_reference_logprobs", record)
    policies = []
    evaluate = dpo.evaluate
    monkeypatch.setattr(dpo, "evaluate", lambda policy, *args: policies.append(policy) or evaluate(policy, *args))
    start = make_gpt(12, block_size=24)
    _, policy, _ = run_dpo(tmp_path, start, held_out=RANKINGS, epochs=2)
    storages = {p.data_ptr() for p in policies[0].parameters()}
    assert len(seen) == 2  # for the training and for the held-out rankings
    for reference in seen:
        for p, original_p in zip(reference.parameters(), start.parameters(), strict=True):
            assert torch.equal(p, original_p)
            assert not p.requires_grad
            assert p.grad is None
            assert p.data_ptr() not in storages
    assert not torch.equal(policy.wte.weight, start.wte.weight)


def test_gradient_is_clipped_after_it_is_there(tmp_path, monkeypatch, float64):
    """Clipping before backward clips nothing: the length of the step tells."""
    plain_sgd(monkeypatch)
    before = make_gpt(13, block_size=24)
    _, after, log = run_dpo(tmp_path, before, micro_batch=4, grad_clip=1e-3, lr=1.0, beta=1.0)
    assert distance(after, before) == pytest.approx(1e-3, rel=1e-2)
    assert log[0]["grad_norm"] > 0.1


def test_a_gradient_clip_of_0_clips_nothing(tmp_path, monkeypatch, float64):
    """As a largest norm, 0 trained nothing: every gradient was scaled down to it."""
    plain_sgd(monkeypatch)
    before = make_gpt(13, block_size=24)
    _, after, log = run_dpo(tmp_path, before, grad_clip=0.0, lr=1.0, beta=2.0)
    assert log[0]["grad_norm"] > 1.1  # 1 would be the default limit
    assert distance(after, before) == pytest.approx(log[0]["grad_norm"], rel=1e-5)


def test_a_text_cut_by_the_block_size_is_not_compared_with_an_invented_eos(float64):
    """Truncation after EOS was appended drops it silently; a completion that was cut must end
    without EOS, and count its own tokens only."""
    items = encode_rankings([Ranking("a", ["bcdefgh", "c"], [0, 1], [True, True])], TOY, block_size=5)
    long, short = items[0].examples
    assert long.completion == [1, 2, 3, 4]
    assert short.completion == [2, EOS]
    model = make_gpt(14)
    expected = [completion_logprobs(model, e.prompt, e.completion).sum().item() for e in (long, short)]
    assert ranking_logprobs(model, ranked_batch(items, CPU), "float32")[0].tolist() == pytest.approx(
        expected, abs=1e-11
    )


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"beta": 0.0}, "--beta"),
        ({"label_smoothing": 0.5}, "--label_smoothing"),
        ({"kind": "ipo", "label_smoothing": 0.1}, "--label_smoothing"),
        ({"kind": "hinge"}, "--kind"),
        ({"micro_batch": -1}, "--micro_batch"),
        ({"grad_clip": -1.0}, "--grad_clip"),  # would climb
        ({"lr": math.nan}, "--lr"),
        ({"beta": math.inf}, "--beta"),
        ({"seed": 2**64}, "--seed"),
        ({"train_layers": 3}, "--train_layers"),
        ({"warmup": 2}, "--warmup"),
    ],
    ids=str,
)
def test_impossible_settings_are_refused(tmp_path, changes, says):
    """A setting that can't work, or would be ignored, stops at once with one line that names the flag."""
    with pytest.raises(UserError, match=says):
        run_dpo(tmp_path, make_gpt(16, block_size=24), **changes)


# ------------------------------------------------------------------------------------------------ did it work?


def test_a_collapse_shows_without_held_out_data(tmp_path, capsys):
    """EOS rate 0.6 and a KL of 70 nats stood in results.json alone: both are printed, held-out data or not, with a
    warning where they say that the policy is gone, and none where it has not moved."""
    policy = make_gpt(10, block_size=24)
    for lr, collapsed in ((0.0, False), (0.3, True)):
        results, _, _ = run_dpo(tmp_path, policy, epochs=5, lr=lr, max_new_tokens=18)
        said = capsys.readouterr().out
        assert results["kl"] > 25 if collapsed else results["kl"] == pytest.approx(0, abs=1e-4)
        if not collapsed:
            assert results["eos_rate"] == results["ref_eos_rate"]
        assert f"EOS rate {results['eos_rate']:.2f}" in said
        assert f"KL to the reference {results['kl']:.1f} nats" in said
        assert ("WARNING: the policy has collapsed" in said) == collapsed


def test_knowing_the_pairs_by_heart_is_said(capsys):
    """Accuracy 1 on the training pairs and chance on others looks like a success in the progress bar."""
    results = {"accuracy": 0.6, "loss": 0.5, "margin": 0.1, "eos_rate": 1.0}
    for train_accuracy, warned in ((1.0, True), (0.7, False)):
        dpo.report(results, train_accuracy, Config(), "")
        assert ("by heart" in capsys.readouterr().out) == warned


@pytest.mark.parametrize(("kind", "start"), [("sigmoid", LN2), ("ipo", 25.0)])
def test_each_gate_can_fail(kind, start):
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
        gates = dpo.report(good | changes, 0.7, Config(kind=kind, beta=0.1), "tiny")
        assert [g["name"] for g in gates if not g["ok"]] == ([failed] if failed else [])


def run_on_task(tmp_path, vocabulary: str, own: bool, **changes) -> dict:
    """dpo.train from a policy of the embedded task, on data of the task or of one's own."""
    tokenizer = load_tokenizer(vocabulary)
    policy = make_gpt(14, vocab=tokenizer.n_vocab, block_size=192, n_layer=1, n_embd=16)
    save_model(tmp_path / "policy", policy, vocabulary, "sft.py", sft.Config(), "tiny")
    rows, held_out = (
        (own_pairs(4, gold=True), own_pairs(2, 4, gold=True)) if own else (task_rankings(4), task_rankings(2))
    )
    settings = {"data": write_lines(tmp_path / "r.jsonl", rows), "policy": str(tmp_path / "policy"), "device": "cpu"}
    settings |= {"held_out_data": write_lines(tmp_path / "h.jsonl", held_out), "out_dir": str(tmp_path / "dpo")}
    return dpo.train(Config(**{**settings, "warmup": 0, "max_new_tokens": 4, **changes}))


def test_a_learning_rate_of_a_million_does_not_pass(tmp_path):
    """With Adam the weights stay finite and the accuracy can be anything: a gate fails, or no model is saved."""
    try:
        results = run_on_task(tmp_path, "tiny", False, lr=1e6, batch_size=1)
    except UserError as error:
        assert "--lr" in str(error) and not (tmp_path / "dpo" / "model.pt").exists()
    else:
        assert not all(g["ok"] for g in results["gates"])


# ------------------------------------------------------------------------------------------------ data of one's own


def test_own_data_reads_no_file_of_the_demo(tmp_path, monkeypatch, capsys):
    """With --data alone it reported a held-out accuracy on the demo's rankings, in silence. The twin beside the data is
    taken, where it is there, and every file that is read is named."""
    own, opened = beside_a_demo(tmp_path, monkeypatch)
    policy = checkpoint(own / "sft", make_gpt(14, block_size=24))
    data = write_lines(own / "mine.jsonl", own_pairs(8))
    settings = {"data": data, "policy": policy, "out_dir": str(own / "dpo"), "warmup": 0, "device": "cpu"}
    results = dpo.train(Config(**settings, max_new_tokens=4))
    said = capsys.readouterr().out
    assert "accuracy" not in results and results["gates"] == []
    assert "mine_held_out.jsonl" in said and data in said and policy in said

    twin = write_lines(own / "mine_held_out.jsonl", own_pairs(3, start=8))
    results = dpo.train(Config(**settings, max_new_tokens=4))
    assert f"{twin}: 3 rankings" in capsys.readouterr().out
    trained = load_model(own / "dpo", CPU)
    assert trained.task == ""
    hits = []
    with torch.no_grad():
        for row in own_pairs(3, start=8):
            ids, ratios = TOY.encode(row["prompt"]), []
            for text in row["completions"]:
                new, old = (
                    completion_logprobs(model, ids, [*TOY.encode(text), EOS]).sum().item()
                    for model in (trained.model, load_model(policy, CPU).model)
                )
                ratios.append(new - old)
            hits.append(float(ratios[0] > ratios[1]))
    assert results["accuracy"] == pytest.approx(sum(hits) / 3)
    assert opened == []


@pytest.mark.parametrize(
    ("vocabulary", "own", "gates"), [("tiny", True, 0), ("tiny", False, 3), ("bytes", True, 0), ("bytes", False, 3)]
)
def test_the_task_is_known_by_its_data_not_by_the_vocabulary(tmp_path, capsys, vocabulary, own, gates):
    """Own data in the tiny vocabulary got the embedded task's gates, the task's data in another one lost them. A policy
    of the embedded task on own data is noted."""
    results = run_on_task(tmp_path, vocabulary, own)
    said = capsys.readouterr().out
    assert len(results["gates"]) == said.count("GATE") == gates
    assert ("NOTE" in said) == own
    assert load_model(tmp_path / "dpo", CPU).task == ("" if own else "tiny")
