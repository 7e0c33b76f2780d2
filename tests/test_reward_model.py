"""Stage 2: the ranking loss against explicit pairs, the score's place, the normalisation, the held-out figures, and the
step that `train` takes."""

from __future__ import annotations

import copy
import itertools
import math
import random
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
    descend,
    finite_difference_gradient,
    frame_batch,
    gradient_of,
    log_sigmoid,
    make_gpt,
    make_scalar,
    make_told,
    own_pairs,
    plain_sgd,
    ranked,
    score_rankings,
    slow_hidden,
    write_lines,
)
from stages import eos_lover, on_task, run, steady_policy, watching
from torch import Tensor

import reward_model
from lib.cli import UserError
from lib.checkpoint import load_model
from data import tiny
from data.batches import contrast_rankings, ranked_batch
from data.tokenizer import load_tokenizer
from model import ScalarModel
from data.batches import pair_accuracy
from data.tiny import annotators_bayes_accuracy
from reward_model import accuracy_by_part, evaluate
from reward_model import ranking_loss

CPU = torch.device("cpu")
NAMES = ("right_vs_wrong", "right_vs_evasive", "polite_vs_plain", "plain_vs_rude", "short_vs_rambling")
NAMES += ("once_vs_repeated", "finished_vs_cut")  # of the contrasts
SCALARS = pytest.mark.parametrize("make", [make_scalar, make_told])


def loop_loss(scores: list[list[float]], ranks: list[list[int]]) -> float:
    """The definition, pair by pair: -log sigmoid(better - worse), for a tie the cross-entropy
    against one half; mean over all pairs."""
    losses = []
    for row, rank in zip(scores, ranks, strict=True):
        present = [(s, r) for s, r in zip(row, rank, strict=True) if r >= 0]
        for (a, rank_a), (b, rank_b) in itertools.combinations(present, 2):
            if rank_a == rank_b:
                losses.append(-0.5 * log_sigmoid(a - b) - 0.5 * log_sigmoid(b - a))
            else:
                losses.append(-log_sigmoid(a - b if rank_a < rank_b else b - a))
    return sum(losses) / len(losses)


def random_scores(n: int, k: int, seed: int = 0) -> Tensor:
    return 2 * torch.randn(n, k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ------------------------------------------------------------------------------------------------ the loss


def test_two_completions_are_bradley_terry():
    """K = 2 must be the pairwise loss, with its gradient -sigmoid(-gap) / N on the better one; the
    sign turned round teaches the reverse."""
    scores = random_scores(7, 2, seed=1)
    gaps = (scores[:, 0] - scores[:, 1]).tolist()
    assert ranking_loss(scores).item() == pytest.approx(sum(math.log(1 + math.exp(-g)) for g in gaps) / 7, rel=1e-12)
    slopes = [1 / (1 + math.exp(g)) / 7 for g in gaps]
    expected = torch.tensor([[-s, s] for s in slopes], dtype=torch.float64)
    torch.testing.assert_close(gradient_of(ranking_loss, scores), expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize("k", [2, 3, 4, 6])
def test_k_completions_are_the_mean_over_all_pairs(k):
    """Dividing by K(K-1)/2 twice (a known bug: six times too small at K = 4), or leaving pairs out."""
    scores = random_scores(5, k, seed=k)
    expected = loop_loss(scores.tolist(), [list(range(k))] * 5)
    assert ranking_loss(scores).item() == pytest.approx(expected, rel=1e-12)
    assert ranking_loss(scores, torch.arange(k).expand(5, k)).item() == pytest.approx(expected, rel=1e-12)


def test_ties_and_absent_completions_equal_the_loop():
    """Ties counted as wins of whichever stands first, absent completions counted as pairs, or
    the mean over a wrong number of pairs."""
    scores = random_scores(5, 4, seed=2)
    expected = loop_loss(scores.tolist(), MIXED_RANKS.tolist())
    assert ranking_loss(scores, MIXED_RANKS).item() == pytest.approx(expected, rel=1e-12)


def test_gradient_equals_finite_differences():
    """Gradient with ties and absent completions against central differences."""
    scores = random_scores(5, 4, seed=3)
    found = gradient_of(lambda s: ranking_loss(s, MIXED_RANKS), scores)
    expected = finite_difference_gradient(lambda s: ranking_loss(s, MIXED_RANKS), scores)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-8)
    assert (found[MIXED_RANKS < 0] == 0).all()


def test_a_tie_asks_for_equal_scores(float64):
    """The target of a tie is half / half: ln 2 and no gradient at equal scores, 0.813262
    at a gap of 1, and it pulls together."""
    tie, one_apart = torch.tensor([[0, 0]]), math.log1p(math.e) - 0.5  # 0.813262
    assert ranking_loss(torch.tensor([[3.0, 3.0]]), tie).item() == pytest.approx(math.log(2), abs=1e-12)
    assert ranking_loss(torch.tensor([[1.0, 0.0]]), tie).item() == pytest.approx(one_apart, abs=1e-12)
    assert ranking_loss(torch.tensor([[0.0, 1.0]]), tie).item() == pytest.approx(one_apart, abs=1e-12)
    assert gradient_of(lambda s: ranking_loss(s, tie), torch.tensor([[3.0, 3.0]])).tolist() == [[0.0, 0.0]]
    pull = gradient_of(lambda s: ranking_loss(s, tie), torch.tensor([[1.0, 0.0]]))
    assert pull[0, 0].item() == pytest.approx(0.5 * math.tanh(0.5), abs=1e-12)  # sigmoid(1) - 1/2


@pytest.mark.parametrize("value", [0.0, 1e30, math.inf, -math.inf])
def test_absent_completions_are_ignored(float64, value):
    """What stands in the place of an absent completion (the score of another row) leaks into loss or gradient."""
    scores = torch.tensor([[1.0, 0.5, value], [0.2, -0.3, 0.1]])
    ranks = torch.tensor([[0, 1, -1], [0, 1, 2]])
    pairs = [[1.0, 0.5], [0.2, -0.3], [0.2, 0.1], [-0.3, 0.1]]
    expected = -sum(log_sigmoid(a - b) for a, b in pairs) / 4
    assert ranking_loss(scores, ranks).item() == pytest.approx(expected, abs=1e-12)
    gradient = gradient_of(lambda s: ranking_loss(s, ranks), scores)
    assert gradient[0, 2] == 0
    assert gradient[0, 0].item() == pytest.approx(-1 / (1 + math.exp(0.5)) / 4, abs=1e-12)


def test_extreme_gaps_stay_finite():
    """log(sigmoid(x)) is infinite at a gap of -120 and log(1 + exp(x)) overflows: the loss must be linear there."""
    for gap, loss, slope in ((1e4, 0.0, 0.0), (-1e4, 1e4, -1.0), (-120.0, 120.0, -1.0), (120.0, 0.0, 0.0)):
        scores = torch.tensor([[gap, 0.0]])
        tie = torch.tensor([[0, 0]]), abs(gap) / 2, math.copysign(0.5, gap)
        for ranks, expected, expected_slope in ((None, loss, slope), tie):
            gradient = gradient_of(lambda s, r=ranks: ranking_loss(s, r), scores)
            assert ranking_loss(scores, ranks).item() == pytest.approx(expected, abs=1e-6)
            assert gradient[0, 0].item() == pytest.approx(expected_slope, abs=1e-6)


def test_only_differences_within_a_prompt_count():
    """The reward is known up to a constant of each prompt; a loss that sees the constant compares across prompts."""
    scores = random_scores(5, 4, seed=4)
    shifted = scores + torch.tensor([[3.0], [-7.0], [0.5], [100.0], [-2.0]], dtype=torch.float64)
    expected = ranking_loss(scores, MIXED_RANKS).item()
    assert ranking_loss(shifted, MIXED_RANKS).item() == pytest.approx(expected, rel=1e-12)


def test_parts_of_a_step_divide_by_the_pairs_of_the_whole_step():
    """A mean for each micro-batch: a ranking of two would weigh as much as one of four."""
    scores = random_scores(5, 4, seed=5)
    whole = ranking_loss(scores, MIXED_RANKS)
    n_pairs = sum(math.comb(sum(r >= 0 for r in row), 2) for row in MIXED_RANKS.tolist())
    for size in (1, 2, 3):
        parts = [ranking_loss(scores[i : i + size], MIXED_RANKS[i : i + size], n_pairs) for i in range(0, 5, size)]
        assert sum(parts).item() == pytest.approx(whole.item(), rel=1e-12)


@pytest.mark.parametrize("shape", [(4,), (4, 1), (2, 3, 4)])
def test_wrong_shapes_raise(shape):
    """A flat vector of scores would be compared silently in some broadcast way."""
    with pytest.raises(ValueError, match=r"\(N, K\)"):
        ranking_loss(torch.zeros(shape))


def test_equal_scores_at_the_start_give_ln_2():
    """A model that can't tell two completions apart must start at ln 2 and at an accuracy of one half, not 0."""
    model = make_scalar(1)
    torch.nn.init.zeros_(model.head.weight)  # equal to the last bit; the same text twice is that on some CPUs only
    scores = model.score(torch.tensor([[1, 2, 3, EOS], [1, 4, 5, EOS]]), torch.tensor([4, 4])).view(1, 2)
    assert ranking_loss(scores).item() == pytest.approx(math.log(2), abs=1e-6)
    assert pair_accuracy(scores, torch.tensor([[0, 1]]))[0].item() == 0.5


def test_pair_accuracy_by_hand():
    """`chosen > rejected` counts equal scores as wrong; ties and absent completions must make no comparison."""
    scores = torch.tensor([[2.0, 1.0, 3.0], [1.0, 1.0, 0.0]])
    correct, gap = pair_accuracy(scores, torch.tensor([[0, 1, 2], [0, 1, 1]]))
    assert correct.tolist() == [[1.0, 0.0, 0.0], [0.5, 1.0, 1.0]]  # pairs (0, 1), (0, 2), (1, 2)
    assert gap.tolist() == [[1, 2, 1], [1, 1, 0]]
    _, gap = pair_accuracy(scores, torch.tensor([[0, 1, -1], [0, 0, -1]]))
    assert gap.tolist() == [[1, 0, 0], [0, 0, 0]]


# ------------------------------------------------------------------------------------------------ the score


@SCALARS
def test_score_is_the_output_at_the_last_real_token(float64, make):
    """The score read one token early (before EOS), at the last column (filler), or averaged over the row."""
    model, frame = make(2), frame_batch(B=6, extra=4, seed=3)
    scores = model.score(frame.tokens, frame.lens)
    for i in range(6):
        row = frame.row(i)
        expected = model.head(slow_hidden(model, row[0].tolist()))[-1, 0]
        assert scores[i].item() == pytest.approx(expected.item(), abs=1e-11)


@SCALARS
@pytest.mark.parametrize("filler", [0, EOS])
def test_score_depends_on_neither_filler_nor_batch_mates(float64, filler, make):
    """The same text scored differently in another batch or under longer padding; reading
    at the wrong place when pad equals EOS."""
    model, frame = make(3), frame_batch(B=6, seed=4)
    reference = model.score(frame.tokens, frame.lens)
    wide = torch.full((6, frame.tokens.size(1) + 7), filler)
    for i in range(6):
        wide[i, : frame.lens[i]] = frame.row(i)[0]
    torch.testing.assert_close(model.score(wide, frame.lens), reference, rtol=0, atol=1e-11)
    for i in range(6):
        alone = model.score(frame.row(i), frame.lens[i : i + 1])
        torch.testing.assert_close(alone, reference[i : i + 1], rtol=0, atol=1e-11)


@SCALARS
def test_padding_changes_no_gradient(float64, make):
    """Filler or other texts' lengths leaking into the reward model's gradients."""
    model = make(4)
    narrow, wide = frame_batch(B=4, seed=5, filler=EOS), frame_batch(B=4, seed=5, filler=EOS, extra=7)
    wide.tokens = torch.cat([narrow.tokens, torch.zeros(4, 7, dtype=torch.long)], 1)
    results = []
    for frame in (narrow, wide):
        loss = ranking_loss(model.score(frame.tokens, frame.lens).view(2, 2))
        results.append([loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


@pytest.mark.parametrize("expectation", [False, True])
@pytest.mark.parametrize("rope_base", [0.0, 100.0])
def test_a_score_is_that_of_the_text_alone(float64, rope_base, expectation):
    """Completions that share a prompt must not see each other: each scores what it scores in a row of its own."""
    model = make_scalar(9, rope_base=rope_base, expectation=expectation).eval()
    batch = ranked_batch(ITEMS, CPU)
    scores = score_rankings(model, batch)
    for n, item in enumerate(ITEMS):
        for k, example in enumerate(item.examples):
            alone = model(torch.tensor([example.ids]))[0, -1]
            torch.testing.assert_close(scores[n, k], alone, rtol=0, atol=1e-11)
    model.gpt.wte.weight.grad = None
    scores[0, 1].backward()  # the second completion's score pulls at its own tokens and its prompt's, at nobody else's
    touched = set(model.gpt.wte.weight.grad.abs().sum(1).nonzero().flatten().tolist())
    assert touched == set(ITEMS[0].examples[1].ids)


# ------------------------------------------------------------------------------------------------ held-out figures


def test_evaluate_equals_a_loop_over_pairs(float64):
    """Wrong denominators: ties counted as comparisons, a mean of batch means, gaps
    mixed up, lengths with the prompt in them."""
    model = make_scalar(7)
    losses, by_gap, longer, per_prompt = [], {}, [], []
    for item in ITEMS:
        scores = [model.score(torch.tensor([e.ids]), torch.tensor([len(e)])).item() for e in item.examples]
        hits = []
        for i, j in itertools.combinations(range(len(scores)), 2):
            if item.ranks[i] == item.ranks[j]:
                losses.append(-0.5 * log_sigmoid(scores[i] - scores[j]) - 0.5 * log_sigmoid(scores[j] - scores[i]))
                continue
            losses.append(-log_sigmoid(scores[i] - scores[j]))
            hits.append(float(scores[i] > scores[j]))
            by_gap.setdefault(item.ranks[j] - item.ranks[i], []).append(hits[-1])
            a, b = len(item.examples[i].completion), len(item.examples[j].completion)
            longer.append(1.0 if a > b else 0.5 if a == b else 0.0)
        per_prompt.append(sum(hits) / len(hits))
    every = [h for hits in by_gap.values() for h in hits]
    error = torch.tensor(per_prompt).std().item() / math.sqrt(len(ITEMS))
    accuracies = {f"accuracy_gap_{gap}": sum(hits) / len(hits) for gap, hits in by_gap.items()}
    for batch_size in (1, 2, 64):
        found = evaluate(model, ITEMS, CPU, batch_size)
        assert found["loss"] == pytest.approx(sum(losses) / len(losses), abs=1e-10)
        assert found["accuracy"] == pytest.approx(sum(every) / len(every), abs=1e-10)
        assert found["longer_wins"] == pytest.approx(sum(longer) / len(longer), abs=1e-10)
        assert found["length_alone"] == pytest.approx(max(sum(longer), len(longer) - sum(longer)) / len(longer))
        assert found["accuracy_se"] == pytest.approx(error, abs=1e-10)
        assert {k: found[k] for k in accuracies} == pytest.approx(accuracies, abs=1e-10)


def test_a_ranking_that_is_one_tie_is_no_prompt_that_it_gets_wrong():
    """It would count as an accuracy of 0 in the standard error, which is of the prompts that compare something."""
    model, tied = make_scalar(7), ranked([1, 2], [[3], [4, 5, 6]], [0, 0])
    error = evaluate(model, ITEMS, CPU)["accuracy_se"]
    assert evaluate(model, [*ITEMS, tied, tied], CPU)["accuracy_se"] == pytest.approx(error)


def test_a_longer_run_goes_on_with_raw_scores(tmp_path):
    """The state of a finished run holds the normalisation. Scores that are divided by it while they learn have other
    losses; at a learning rate of 0, where every epoch is one step on the same rankings, all losses are the same."""
    once = {"lr": 0.0, "batch_size": len(RANKINGS)}
    first = run("reward_model", tmp_path, epochs=1, **once).results
    longer = run("reward_model", tmp_path, epochs=3, resume=True, **once)
    assert abs(first["mean"]) > 0.1 or abs(first["std"] - 1) > 0.1
    assert [row["loss"] for row in longer.log] == pytest.approx([longer.log[0]["loss"]] * 3, abs=2e-6)
    assert [longer.results[k] for k in ("mean", "std")] == pytest.approx([first[k] for k in ("mean", "std")], abs=1e-5)


def test_the_held_out_loss_is_the_objective_whatever_the_normalisation(float64):
    """results.json had the loss of scores divided by std: not what was minimised, nor what the log calls loss."""
    model = make_scalar(7)
    before = evaluate(model, ITEMS, CPU)
    model.mean.fill_(3.0)
    model.std.fill_(0.2)
    assert evaluate(model, ITEMS, CPU) == pytest.approx(before, abs=1e-10)


def test_evaluate_switches_dropout_off(float64):
    """Evaluation in training mode: a stochastic reward and an accuracy that depends on chance."""
    noisy, clean = make_told(8, dropout=0.5), make_told(8)
    noisy.train()
    assert evaluate(noisy, ITEMS, CPU) == pytest.approx(evaluate(clean, ITEMS, CPU), abs=1e-10)


def test_accuracy_of_a_single_ranking_has_a_finite_error():
    """The standard deviation of one number is nan, which results.json can't hold."""
    assert all(math.isfinite(v) for v in evaluate(make_scalar(9), ITEMS[:1], CPU).values())


def test_the_length_baseline_may_prefer_the_shorter(capsys):
    """ "Longer wins in 0.25" is a judge by length who is right in 0.75: against 0.25 any reward model looks good."""
    shorter = [
        ranked([1], [[2], [3, 4]], [0, 1]),
        ranked([2], [[5, 6], [7, 8, 9]], [0, 1]),
        ranked([3], [[1], [1, 2]], [0, 1]),
    ]
    longer = [ranked([4], [[2, 3, 4], [5]], [0, 1])]
    model = make_scalar(7)
    for items, wins, alone in ((shorter + longer, 0.25, 0.75), (longer * 3 + shorter[:1], 0.75, 0.75), (shorter, 0, 1)):
        found = evaluate(model, items, CPU)
        assert (found["longer_wins"], found["length_alone"]) == (wins, alone)
    results = {"mean": 0.0, "std": 1.0, "accuracy": 0.7, "accuracy_se": 0.01, "bayes_accuracy": 0.75}
    results |= {"longer_wins": 0.25, "length_alone": 0.75, "by_part": {"right_vs_wrong": 0.8}}
    for unknown in ("by_part", "nothing"):  # of data of one's own, and of the embedded task's
        reward_model.report({name: figure for name, figure in results.items() if name != unknown})
        assert "length alone 0.75" in capsys.readouterr().out


def test_bayes_accuracy_by_hand(tmp_path):
    """The best any model can expect on noisy labels: sigmoid(gap / temperature) on
    strict pairs; ties are no comparison."""
    once = {"prompt": "a", "completions": ["x", "y"], "gold": [1.0, 0.0]}  # sigmoid(2)
    twice = {"prompt": "b", "completions": [["x", "y"], "z"], "gold": [0.0, 0.0, 1.0]}  # twice sigmoid(1)
    rows = [{**once, "annotator_temperature": 0.5}, {**twice, "annotator_temperature": 1.0}]
    expected = (1 / (1 + math.exp(-2)) + 2 / (1 + math.exp(-1))) / 3
    assert annotators_bayes_accuracy(write_lines(tmp_path / "r.jsonl", rows)) == pytest.approx(expected, abs=1e-12)
    human = write_lines(tmp_path / "h.jsonl", [{"prompt": "a", "completions": ["x", "y"]}])
    assert annotators_bayes_accuracy(human) is None


def test_accuracy_part_by_part():
    """A share of other pairs, or of a judge by length: of each contrast, how often the better text scores higher."""
    tokenizer = load_tokenizer("tiny")
    prompts = tiny.distinct_prompts(12, random.Random(3), "dev")
    model = make_told(15, vocab=tokenizer.n_vocab, block_size=96, n_embd=16, n_layer=1)
    found = accuracy_by_part(model, contrast_rankings(prompts, tokenizer, 96), CPU)
    contrasts = contrast_rankings(prompts, tokenizer, 96)
    assert list(found) == list(contrasts) and len(set(found.values())) > 2
    for name, items in contrasts.items():
        wins = []
        for item in items:
            better, worse = (model(torch.tensor([e.ids]))[0, -1].item() for e in item.examples)
            wins.append(better > worse)
        assert found[name] == pytest.approx(sum(wins) / len(wins), abs=1e-6), name


def test_every_gate_can_fail(capsys):
    """At the figures of a good run all are passed; each fails by its own figure alone, and says so."""
    good = {"mean": 0.1, "std": 1.2, "accuracy": 0.76, "accuracy_se": 0.01, "bayes_accuracy": 0.8, "length_alone": 0.6}
    good["by_part"] = {"right_vs_wrong": 0.85, "polite_vs_plain": 1.0}
    assert [g["ok"] for g in reward_model.report(good)] == [True] * 3
    said = capsys.readouterr().out
    assert "right_vs_wrong 0.85" in said and "polite_vs_plain 1.00" in said and said.count("OK") == 3
    for changes, gate in (
        ({"accuracy": 0.55, "bayes_accuracy": 0.57}, "RM held-out accuracy"),
        ({"accuracy": 0.97, "bayes_accuracy": 1.0}, "RM held-out accuracy"),  # too good to be true
        ({"bayes_accuracy": 0.99}, "RM share of Bayes accuracy"),
        ({"bayes_accuracy": 0.6}, "RM share of Bayes accuracy"),  # better than one who knows
        ({"by_part": {"right_vs_wrong": 0.5}}, "RM right against wrong, manners equal"),
    ):
        assert [g["name"] for g in reward_model.report(good | changes) if not g["ok"]] == [gate]
        assert "FAILED" in capsys.readouterr().out
    assert reward_model.report(good | {"bayes_accuracy": None}) == []


# ------------------------------------------------------------------------------------------------ the script


def start_of(folder: Path, policy, **changes) -> ScalarModel:
    """What the script starts from: a run that learns nothing, without the normalisation at its end."""
    model = run("reward_model", folder, policy, lr=0.0, **changes).model
    model.mean.fill_(0.0)
    model.std.fill_(1.0)
    return model


def slow_loss(model: ScalarModel, cut: bool = False) -> Tensor:
    """The mean over all pairs of GROUPS, or of CUT_GROUPS, text by text."""
    losses = []
    for prompt, groups in CUT_GROUPS if cut else GROUPS:
        scores = []
        for rank, texts in enumerate(groups):
            for text in texts:
                end = [EOS] if text.endswith(".") or not cut else []
                ids = [*TOY.encode(prompt), *TOY.encode(text.removesuffix(".")), *end]
                scores.append((rank, model.head(slow_hidden(model, ids))[-1, 0]))
        for (rank_a, a), (rank_b, b) in itertools.combinations(scores, 2):
            better = -torch.log(torch.sigmoid(a - b))
            losses.append(better if rank_a != rank_b else 0.5 * better - 0.5 * torch.log(torch.sigmoid(b - a)))
    return torch.stack(losses).mean()


@pytest.mark.parametrize("expectation", ["yes", "no"])
def test_training_steps_are_the_gradient_of_all_pairs(tmp_path, monkeypatch, float64, expectation):
    """A mean of micro-batch means, ties as wins, a score beside the last token, equal texts compared, completions of
    other prompts compared, gradients that pile up: two steps of the script against float64 descent on the definition,
    whatever the order of the rows, which the seed decides."""
    plain_sgd(monkeypatch)
    policy = make_gpt(10, block_size=24)
    for seed in (1, 2):
        settings = {"micro_batch": 2, "expectation": expectation, "seed": seed}
        before = start_of(tmp_path, policy, **settings)
        expected, losses = copy.deepcopy(before), []
        for lr in (0.02, 0.01):  # linear decay over two steps
            loss = slow_loss(expected)
            losses.append(loss.item())
            descend(expected, loss, lr)
        _, after, log = run("reward_model", tmp_path, policy, epochs=2, **settings)
        assert_same_weights(after, expected, before)
        assert [row["loss"] for row in log] == pytest.approx(losses, abs=1e-6)  # the log rounds to six digits


@pytest.mark.parametrize(
    ("expectation", "n_layer", "told"),
    [("auto", 1, True), ("auto", 3, True), ("auto", 4, False), ("yes", 4, True), ("no", 1, False)],
)
def test_shallow_networks_are_told_what_was_expected(tmp_path, expectation, n_layer, told):
    """auto: below four blocks; yes and no are obeyed. The checkpoint says it, and the policy's body is what it starts
    from."""
    policy = make_gpt(10, block_size=24, n_layer=n_layer, n_embd=8)
    after = run("reward_model", tmp_path, policy, expectation=expectation, lr=0.0).model
    assert all(torch.equal(p, after.gpt.state_dict()[name]) for name, p in policy.state_dict().items())
    assert {name.split(".")[0] for name, _ in after.named_parameters()} == (
        {"gpt", "head", "block", "ln", "direction"} if told else {"gpt", "head"}
    )


def test_cut_texts_are_read_without_eos(tmp_path, monkeypatch, float64):
    """PPO scores cut texts at their last token, where no EOS stands: a reward model that has seen each of them with one
    has never seen what it scores. A step on rankings with "ended", against the definition."""
    plain_sgd(monkeypatch)
    policy = make_gpt(10, block_size=24)
    before = start_of(tmp_path, policy)
    expected = copy.deepcopy(before)
    loss = slow_loss(expected, cut=True)
    descend(expected, loss, 0.02)
    _, after, log = run("reward_model", tmp_path, policy, CUT_RANKINGS, micro_batch=1)
    assert_same_weights(after, expected, before)
    assert log[0]["loss"] == pytest.approx(loss.item(), abs=1e-6)


def test_twenty_pairs_can_be_learned_by_heart(tmp_path):
    """An accuracy that is stuck near one half: wrong position, wrong sign or
    detached scores can't reach 100% on 20 pairs."""
    generator, rows = torch.Generator().manual_seed(0), []
    for _ in range(20):
        prompt, a, b = (TOY.decode(torch.randint(0, 22, (n,), generator=generator).tolist()) for n in (3, 4, 4))
        rows.append({"prompt": prompt, "chosen": a, "rejected": b})
    changes = {"epochs": 30, "lr": 3e-3, "batch_size": 10, "grad_clip": 1.0}
    policy = make_gpt(13, n_layer=1, block_size=16)
    results, _, log = run("reward_model", tmp_path, policy, rows, held_out=rows, **changes)
    assert results["accuracy"] == 1.0
    assert results["loss"] < 0.2 < log[0]["loss"]


def test_the_policy_s_samples_have_standard_scores(tmp_path, float64):
    """A normalisation that is not saved, of other texts than the policy's, at the wrong position, or with the variance
    in the place of the deviation: PPO's coefficients would mean something else. The policy's logits are so large that
    its samples are known."""
    policy = make_gpt(14, block_size=24)
    with torch.no_grad():
        policy.ln_f.weight *= 300
        policy.ln_f.bias *= 300
    results, model, _ = run("reward_model", tmp_path, policy)
    scores = []
    for prompt in "acdefhac":  # of a..h those that no ranking asks, the first ones again for 8 samples
        ids = TOY.encode(prompt)
        while len(ids) < 1 + 6 and EOS not in ids[1:]:
            ids.append(int(policy(torch.tensor([ids]))[0, -1].argmax()))
        scores.append(model(torch.tensor([ids]))[0, -1].item())
    assert torch.tensor(scores).mean().item() == pytest.approx(0, abs=1e-9)
    assert torch.tensor(scores).std().item() == pytest.approx(1, abs=1e-9)
    assert (results["mean"], results["std"]) == (model.mean.item(), model.std.item())


def test_a_model_that_scores_all_samples_alike_is_refused(tmp_path):
    """Division by a standard deviation of 0: every later score would be nan."""
    with pytest.raises(UserError, match="same score"):
        run("reward_model", tmp_path, eos_lover(), prompts=write_lines(tmp_path / "one.jsonl", [{"prompt": "a"}] * 4))


@pytest.mark.parametrize("n", [1, 2])
def test_few_prompts_are_sampled_from_repeatedly(tmp_path, capsys, n):
    """One ranking: the standard deviation of one sample is nan, and the model was said to have learned nothing."""
    rows = [{"prompt": p, "chosen": "ab", "rejected": "cde"} for p in "kl"[:n]]
    prompts = write_lines(tmp_path / "few.jsonl", [{"prompt": p} for p in "ab"[:n]])
    with watching() as watch:
        results, model, _ = run("reward_model", tmp_path, rows=rows, prompts=prompts, normalise_samples=9)
    scored = [t[0] for p in watch.passes if not p.training and isinstance(p.network, ScalarModel) for t in p.texts()]
    assert sorted(scored) == sorted(("ab"[:n] * 9)[:9])
    assert results["std"] == model.std.item() > 0
    assert f"few.jsonl: {n} prompts" in capsys.readouterr().out


def test_it_is_normalised_on_prompts_that_it_has_not_learned_from(tmp_path):
    """On the texts that it has learned from the reward model is too sure: their scores spread wider than those of PPO's
    samples, and every coefficient of PPO is off. It must not matter where in the prompts file the ranked ones stand."""
    prompts = [TOY.decode([i, 20 - i, 3]) for i in range(20)]
    rankings = [{"prompt": p, "chosen": "ab", "rejected": "cde"} for p in prompts[::2]]
    path = write_lines(tmp_path / "all.jsonl", [{"prompt": p} for p in prompts])
    with watching() as watch:
        run("reward_model", tmp_path, make_gpt(14, block_size=24), rankings, prompts=path, normalise_samples=8)
    scored = [t[:3] for p in watch.passes if not p.training and isinstance(p.network, ScalarModel) for t in p.texts()]
    assert len(scored) == 8
    assert not set(scored) & {row["prompt"] for row in rankings}


@pytest.mark.parametrize("own", ["data", "held_out"])
def test_parts_of_the_task_need_both_files_to_be_of_it(tmp_path, own):
    """The task's rankings judged on held-out data of one's own ended in a traceback after the training, when the parts
    of the task's reward were looked for in prompts that are not of it; and the other way round they would say nothing.
    Neither has the task's parts or gates."""
    changes = on_task("reward_model", tmp_path, own=False, vocabulary="tiny")
    changes["rows" if own == "data" else own] = own_pairs(4, gold=True)
    results = run("reward_model", tmp_path, **changes).results
    assert results["gates"] == [] and "by_part" not in results and 0 <= results["accuracy"] <= 1
    assert load_model(tmp_path / "out", CPU, "scalar").task == ("" if own == "data" else "tiny")


def test_the_normalisation_is_of_all_samples_at_the_temperature_of_ppo(tmp_path):
    """Of more prompts than go through the network at a time: some of them again and again, every batch with the same
    luck, or the last batch alone setting mean and scale. Samples that are cut early, or of another temperature than
    PPO's. The policy says every letter with a known probability, whatever was written before, and never stops."""
    logits = [0.0, 0.8, *[-1.0] * 20, -30.0]
    prompts = [TOY.decode([i // 20, i % 20] + [1] * (i % 5)) for i in range(300)]
    path = write_lines(tmp_path / "many.jsonl", [{"prompt": p} for p in prompts])
    changes = {"prompts": path, "normalise_samples": 280, "max_new_tokens": 8, "lr": 0.0}
    with watching() as watch:
        _, model, _ = run("reward_model", tmp_path, steady_policy(logits), [RANKINGS[0]], **changes)
    read = [p for p in watch.passes if not p.training and isinstance(p.network, ScalarModel)]
    texts = sorted(text for p in read for text in p.texts())
    assert len({text[:-8] for text in texts}) == 280 and {text[:-8] for text in texts} == set(prompts[-280:])
    written = [text[-8:] for text in texts]
    assert len(set(written)) == 280  # 22^8 are possible
    for letter, p in zip("abc", torch.tensor(logits).softmax(0).tolist(), strict=False):
        share = "".join(written).count(letter) / (8 * 280)
        assert abs(share - p) < 4.5 * math.sqrt(p * (1 - p) / (8 * 280)), letter
    with torch.no_grad():
        scores = torch.stack([model(torch.tensor([TOY.encode(text)]))[0, -1] for text in texts])
    assert (scores.mean().item(), scores.std().item()) == pytest.approx((0, 1), abs=1e-4)


def test_long_prompts_leave_room_for_the_samples(tmp_path):
    """Cut for one token of an answer, the samples have no room: a traceback after the training."""
    prompts = [TOY.decode([i] * 20 + [3, i]) for i in range(4)]
    path = write_lines(tmp_path / "long.jsonl", [{"prompt": p} for p in prompts])
    with watching() as watch:
        run("reward_model", tmp_path, steady_policy([0.0] * 22 + [-30.0]), [RANKINGS[0]], prompts=path)
    read = [p for p in watch.passes if not p.training and isinstance(p.network, ScalarModel)]
    assert {text[:-6] for p in read for text in p.texts()} == {p[-18:] for p in prompts}


def test_the_normalisation_is_that_of_the_raw_scores(float64):
    """A mean and a scale that it has already, or dropout, change it: normalised twice, a reward model would be another
    one."""
    policy, prompts = make_gpt(14, block_size=24), [[i, 3] for i in range(12)]
    found = []
    for dropout, mean, std in ((0.0, 0.0, 1.0), (0.5, 0.3, 2.0)):
        model = make_told(3, block_size=24, dropout=dropout).train()
        model.mean.fill_(mean), model.std.fill_(std)
        reward_model.normalise(model, policy, prompts, 6, EOS, seed=1)
        found.append((model.mean.item(), model.std.item()))
    assert found[0] == pytest.approx(found[1], abs=1e-12)


def test_members_of_an_ensemble_start_from_other_heads(tmp_path):
    """One start for all seeds: the members of an ensemble agree where they shouldn't, and doubt nothing."""
    heads = [run("reward_model", tmp_path, lr=0.0, seed=seed).model.head.weight for seed in (1, 1, 2)]
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])
