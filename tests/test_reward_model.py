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
    assert_steps_hold_all_lengths,
    beside_a_demo,
    checkpoint,
    descend,
    distance,
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
    rankings_of_all_lengths,
    read_lines,
    record_dtypes,
    record_steps,
    text_before,
    slow_hidden,
    strict_json,
    task_rankings,
    write_lines,
)
from torch import Tensor

import reward_model
import sft
from lib.cli import UserError
from lib.checkpoint import load_model, save_model
from lib.train import generator_for
from data import tiny
from data.batches import encode_rankings, ranked_batch
from data.files import Ranking
from data.tokenizer import format_prompt, load_tokenizer
from model import GPTConfig, ScalarModel
from sampling import generate
from reward_model import Config, accuracy_by_part, annotators_bayes_accuracy, evaluate, normalise, pair_accuracy
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


# ------------------------------------------------------------------------------------------------ normalisation


def samples_of(policy, prompts, seed):
    """The samples that `normalise` draws: one batch, in the order of length."""
    return generate(policy, sorted(prompts, key=len), 10, eos_id=EOS, generator=generator_for(CPU, seed))


def test_normalise_gives_the_policys_samples_mean_0_and_std_1(float64):
    """A normalisation computed on other texts than the policy's, at the wrong position, or
    on scores that were normalised before."""
    policy, model = make_gpt(5), make_scalar(6)
    prompts = [[i % 20, (3 * i) % 20][: 1 + i % 2] for i in range(60)]
    rollout = samples_of(policy, prompts, seed=7)
    raw = model.score(rollout.tokens, rollout.lens).detach()
    model.mean.fill_(5.0)  # an earlier normalisation must not matter
    model.std.fill_(0.1)
    for _ in range(2):
        normalise(model, policy, prompts, 10, EOS, seed=7)
        scores = model.score(rollout.tokens, rollout.lens).detach()
        assert scores.mean().item() == pytest.approx(0, abs=1e-10)
        assert scores.std().item() == pytest.approx(1, abs=1e-10)
        assert model.mean.item() == pytest.approx(raw.mean().item(), abs=1e-10)
    assert torch.equal(scores.argsort(), raw.argsort())  # what is better stays better
    torch.testing.assert_close(scores, (raw - raw.mean()) / raw.std(), rtol=0, atol=1e-10)


def test_normalise_refuses_a_constant_model():
    """Division by a standard deviation of 0: every later score would be nan."""
    policy, model = make_gpt(5), make_scalar(6)
    torch.nn.init.zeros_(model.head.weight)
    with pytest.raises(UserError, match="same score"):
        normalise(model, policy, [[1], [2], [3]], 4, EOS, seed=1)


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


class Judge:
    """A reward model that knows one part of the embedded task's truth, and nothing else."""

    def __init__(self, *parts: str, block_size: int = 96):
        self.parts, self.tokenizer = parts, load_tokenizer("tiny")
        self.config = GPTConfig(self.tokenizer.n_vocab, block_size, 1, 1, 8)

    def eval(self) -> None:
        pass

    def __call__(self, tokens: Tensor, where: Tensor, branches) -> Tensor:
        start, end = format_prompt("\0").split("\0")
        scores = []
        for place in where.flatten().tolist():
            ids = text_before(tokens, branches, place)
            assert ids[-1] == self.tokenizer.eos_id
            prompt, completion = self.tokenizer.decode(ids[:-1]).removeprefix(start).split(end)
            parts = tiny.gold_parts(prompt, completion)
            scores.append(sum((parts[name] for name in self.parts), 0.0))
        return torch.tensor(scores).view(where.shape)


@pytest.mark.parametrize(
    ("knows", "better"),
    [
        (["correct"], ["right_vs_wrong", "right_vs_evasive", "finished_vs_cut"]),  # cut before its answer
        (["polite"], ["polite_vs_plain", "plain_vs_rude"]),
        (["to_the_point"], ["short_vs_rambling", "once_vs_repeated"]),
        (["ended"], ["finished_vs_cut"]),
        (["not_repeated"], ["once_vs_repeated"]),
        ([], []),
        (tiny.PARTS, NAMES),
    ],
    ids=str,
)
def test_accuracy_part_by_part(knows, better):
    """Who knows a single part is right where that part differs, in every pair, and has no preference elsewhere: equal
    scores are one half. What a single accuracy hides, this shows: manners without facts."""
    prompts = [p for p in tiny.distinct_prompts(150, random.Random(3), "dev") if tiny.parse_prompt(p)[0] != "story"]
    found = accuracy_by_part(Judge(*knows), prompts, load_tokenizer("tiny"), CPU)
    assert found == {name: 1.0 if name in better else 0.5 for name in NAMES}


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


def run_reward_model(
    tmp_path: Path, policy, rankings=RANKINGS, held_out=None, **changes
) -> tuple[dict, ScalarModel, list[dict]]:
    """reward_model.train on toy rankings; -> results, the trained model, the log."""
    out = Path(changes.get("out_dir", tmp_path / "out"))
    settings = {
        "data": write_lines(tmp_path / "r.jsonl", rankings),
        "held_out_data": write_lines(tmp_path / "h.jsonl", held_out) if held_out else "",
        "prompts": write_lines(tmp_path / "p.jsonl", [{"prompt": p} for p in "abcdefgh"]),
        "policy": checkpoint(tmp_path / "policy", policy),
        **{"out_dir": str(out), "batch_size": 8, "warmup": 0, "weight_decay": 0.0},
        **{"grad_clip": 1e9, "lr": 0.02, "log_every": 1},
        **{"max_new_tokens": 6, "normalise_samples": 8, "device": "cpu"},
    }
    results = reward_model.train(Config(**{**settings, **changes}))
    return results, load_model(out, CPU, "scalar").model, read_lines(out / "metrics.jsonl")


def fresh_reward_model(policy, seed: int = 1, expectation: bool = True) -> ScalarModel:
    """What the script starts from: policies of less than 4 blocks need to be told what was expected."""
    torch.manual_seed(seed)
    return ScalarModel.from_gpt(policy, expectation)


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


@pytest.mark.parametrize(("micro_batch", "expectation"), [(0, "auto"), (1, "auto"), (2, "yes"), (4, "yes"), (2, "no")])
def test_training_steps_are_the_gradient_of_all_pairs(tmp_path, monkeypatch, float64, micro_batch, expectation):
    """A mean of micro-batch means, ties as wins, a score beside the last token, equal texts compared, gradients that
    pile up: two steps of the script against float64 descent on the definition, whatever the micro-batch."""
    plain_sgd(monkeypatch)
    policy = make_gpt(10, block_size=24)
    before = fresh_reward_model(policy, expectation=expectation != "no")
    expected, losses = copy.deepcopy(before), []
    for lr in (0.02, 0.01):  # linear decay over two steps
        loss = slow_loss(expected)
        losses.append(loss.item())
        descend(expected, loss, lr)
    settings = {"micro_batch": micro_batch, "expectation": expectation, "epochs": 2}
    _, after, log = run_reward_model(tmp_path, policy, **settings)
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
    _, after, _ = run_reward_model(tmp_path, policy, expectation=expectation, lr=0.0)
    assert after.config.expectation is told and policy.config.expectation is False
    assert all(torch.equal(p, after.gpt.state_dict()[name]) for name, p in policy.state_dict().items())
    assert {name.split(".")[0] for name, _ in after.named_parameters()} == (
        {"gpt", "head", "block", "ln", "direction"} if told else {"gpt", "head"}
    )


@pytest.mark.parametrize("micro_batch", [0, 1])
def test_cut_texts_are_read_without_eos(tmp_path, monkeypatch, float64, micro_batch):
    """PPO scores cut texts at their last token, where no EOS stands: a reward model that has seen each of them with one
    has never seen what it scores. A step on rankings with "ended", against the definition."""
    plain_sgd(monkeypatch)
    policy = make_gpt(10, block_size=24)
    before = fresh_reward_model(policy)
    expected = copy.deepcopy(before)
    loss = slow_loss(expected, cut=True)
    descend(expected, loss, 0.02)
    _, after, log = run_reward_model(tmp_path, policy, CUT_RANKINGS, micro_batch=micro_batch)
    assert_same_weights(after, expected, before)
    assert log[0]["loss"] == pytest.approx(loss.item(), abs=1e-6)


def test_a_step_holds_rankings_of_all_lengths(tmp_path, monkeypatch):
    """Steps of similar lengths: the learning rate's decay, and each step's clipping, would fall on one length alone."""
    steps = []
    record_steps(steps, monkeypatch, reward_model)
    policy = make_gpt(10, block_size=32, n_layer=1)
    run_reward_model(tmp_path, policy, rankings_of_all_lengths(96), epochs=2, batch_size=8, lr=1e-3)
    assert_steps_hold_all_lengths(steps, 96, 2)


def test_only_the_last_layers_are_trained(tmp_path, monkeypatch, float64):
    """--train_layers that is ignored, or that freezes the head or what stands before it alone: last block, final
    LayerNorm, what is told, its block and the head move as the definition says, everything before them not at all."""
    plain_sgd(monkeypatch)
    policy = make_gpt(10, block_size=24)
    before = fresh_reward_model(policy)
    expected = copy.deepcopy(before)
    trained = ("gpt.h.1.", "gpt.ln_f.", "direction", "block.", "ln.", "head.")
    for name, p in expected.named_parameters():
        p.requires_grad_(name.startswith(trained))
    descend(expected, slow_loss(expected), 0.02)
    _, after, _ = run_reward_model(tmp_path, policy, train_layers=1)
    assert_same_weights(after, expected, before)
    for (name, p), start in zip(after.named_parameters(), before.parameters(), strict=True):
        assert torch.equal(p, start) is not name.startswith(trained), name


def test_order_of_the_rows_does_not_matter(tmp_path, monkeypatch, float64):
    """A loss that pairs completions of different prompts depends on who stands next to whom."""
    plain_sgd(monkeypatch)
    policy = make_gpt(11, block_size=24)
    original = torch.manual_seed
    monkeypatch.setattr(torch, "manual_seed", lambda seed: original(1))  # the same head; the seed sets the order alone
    trained = [run_reward_model(tmp_path, policy, seed=seed, micro_batch=2)[1] for seed in (1, 2, 3)]
    for model in trained[1:]:
        assert_same_weights(model, trained[0], fresh_reward_model(policy))


def test_gradient_is_clipped_after_it_is_there(tmp_path, monkeypatch, float64):
    """Clipping before backward clips nothing: the length of the step tells."""
    plain_sgd(monkeypatch)
    policy = make_gpt(12, block_size=24)
    _, after, log = run_reward_model(tmp_path, policy, micro_batch=4, grad_clip=0.01, lr=1.0)
    before = fresh_reward_model(policy)
    assert distance(after, before) == pytest.approx(0.01, rel=1e-3)
    assert log[0]["grad_norm"] > 0.1


def test_a_gradient_clip_of_0_clips_nothing(tmp_path, monkeypatch, float64):
    """As a largest norm, 0 trained nothing: every gradient was scaled down to it."""
    plain_sgd(monkeypatch)
    policy = make_gpt(12, block_size=24)
    _, after, log = run_reward_model(tmp_path, policy, grad_clip=0.0, lr=1.0)
    assert log[0]["grad_norm"] > 1.1  # 1 would be the default limit
    assert distance(after, fresh_reward_model(policy)) == pytest.approx(log[0]["grad_norm"], rel=1e-5)


def test_bfloat16_reaches_the_scores(tmp_path):
    """A --dtype that is ignored gives the same run to the last digit; rounding gives one that is a little off."""
    policy = make_gpt(12, block_size=24)
    losses = {}
    for dtype in ("float32", "bfloat16"):
        _, _, log = run_reward_model(tmp_path, policy, dtype=dtype)
        losses[dtype] = log[0]["loss"], log[0]["grad_norm"]
    assert losses["bfloat16"] != losses["float32"]
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.05)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_samples_of_the_normalisation_are_in_the_dtype_too(tmp_path, monkeypatch, dtype):
    """The scale is that of the samples and scores that PPO will see, --dtype included."""
    seen = record_dtypes(monkeypatch, reward_model, "generate", "score_rollout")
    run_reward_model(tmp_path, make_gpt(12, block_size=24), dtype=dtype)
    assert seen == {"generate": {dtype}, "score_rollout": {dtype}}


def test_twenty_pairs_can_be_learned_by_heart(tmp_path):
    """An accuracy that is stuck near one half: wrong position, wrong sign or
    detached scores can't reach 100% on 20 pairs."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for _ in range(20):
        prompt, a, b = (TOY.decode(torch.randint(0, 22, (n,), generator=generator).tolist()) for n in (3, 4, 4))
        rows.append({"prompt": prompt, "chosen": a, "rejected": b})
    changes = {"epochs": 30, "lr": 3e-3, "batch_size": 10, "grad_clip": 1.0}
    policy = make_gpt(13, n_layer=1, block_size=16)
    results, _, log = run_reward_model(tmp_path, policy, rows, held_out=rows, **changes)
    assert results["accuracy"] == 1.0
    assert results["loss"] < 0.2 < log[0]["loss"]


def test_the_saved_model_scores_the_policys_samples_in_standard_units(tmp_path, float64):
    """A normalisation that is not saved, or that another stage doesn't see."""
    policy = make_gpt(14, block_size=24)
    results, model, _ = run_reward_model(tmp_path, policy)
    prompts = [TOY.encode(p) for p in "acdefh"]  # of a..h those that no ranking asks
    rollout = generate(policy, prompts, 6, eos_id=EOS, generator=generator_for(CPU, 1))
    scores = model.score(rollout.tokens, rollout.lens)
    assert scores.mean().item() == pytest.approx(0, abs=1e-10)
    assert scores.std().item() == pytest.approx(1, abs=1e-10)
    assert (results["mean"], results["std"]) == (model.mean.item(), model.std.item())
    strict_json(tmp_path / "out" / "results.json")


def test_texts_that_became_equal_are_no_comparison():
    """Pairs that truncation made identical teach nothing (loss ln 2 for ever) and must be dropped."""
    rankings = [
        Ranking("a", ["bcdefgh", "bcdefgi"], [0, 1], [True, True]),
        Ranking("a", ["b", "c"], [0, 1], [True, True]),
        Ranking("a", ["b", "b"], [0, 1], [True, True]),
        Ranking("a", ["b", "c"], [0, 0], [True, True]),
    ]
    kept = encode_rankings(rankings, TOY, block_size=6)
    assert [[e.completion for e in item.examples] for item in kept] == [[[1, EOS], [2, EOS]]]


def test_a_batch_holds_every_prompt_and_every_completion_once():
    """The K - 1 comparisons of a text in one forward pass, its prompt in one for all K: `ends`, `ranks` find them."""
    batch = ranked_batch(ITEMS, CPU)
    for n, item in enumerate(ITEMS):
        whole = item.examples[0].prompt + [i for e in item.examples for i in e.completion]
        assert batch.tokens[n].tolist() == whole + [0] * (batch.tokens.size(1) - len(whole)) and len(whole) == len(item)
        for k, example in enumerate(item.examples):
            assert text_before(batch.tokens, batch.branches, int(batch.ends[n, k])) == example.ids
            assert batch.ranks[n, k] == item.ranks[k] and batch.lens[n, k] == len(example.completion)
        assert (batch.ranks[n, len(item.ranks) :] == -1).all()


@pytest.mark.parametrize("expectation", [False, True])
@pytest.mark.parametrize("rope_base", [0.0, 100.0])
def test_a_score_is_that_of_the_text_alone(float64, rope_base, expectation):
    """Completions that share a prompt must not see each other: each scores what it scores in a row of its own."""
    model = make_scalar(9, rope_base=rope_base, expectation=expectation).eval()
    batch = ranked_batch(ITEMS, CPU)
    scores = model(batch.tokens, batch.ends, batch.branches)
    for n, item in enumerate(ITEMS):
        for k, example in enumerate(item.examples):
            alone = model(torch.tensor([example.ids]))[0, -1]
            torch.testing.assert_close(scores[n, k], alone, rtol=0, atol=1e-11)
    model.gpt.wte.weight.grad = None
    scores[0, 1].backward()  # the second completion's score pulls at its own tokens and its prompt's, at nobody else's
    touched = set(model.gpt.wte.weight.grad.abs().sum(1).nonzero().flatten().tolist())
    assert touched == set(ITEMS[0].examples[1].ids)


def test_it_is_normalised_on_prompts_that_it_has_not_learned_from(tmp_path, monkeypatch):
    """On the texts that it has learned from the reward model is too sure: their scores spread wider than those of PPO's
    samples, and every coefficient of PPO is off. It must not matter where in the prompts file the ranked ones stand."""
    asked = []

    def record(policy, prompts, *args, **kwargs):
        asked.extend(prompts)
        return generate(policy, prompts, *args, **kwargs)

    monkeypatch.setattr(reward_model, "generate", record)
    prompts = [TOY.decode([i, 20 - i, 3]) for i in range(20)]
    rankings = [{"prompt": p, "chosen": "ab", "rejected": "cde"} for p in prompts[::2]]
    path = write_lines(tmp_path / "all.jsonl", [{"prompt": p} for p in prompts])
    run_reward_model(tmp_path, make_gpt(14, block_size=24), rankings, prompts=path, normalise_samples=8)
    assert len(asked) == 8
    assert not {TOY.decode(p) for p in asked} & {row["prompt"] for row in rankings}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"micro_batch": -1}, "--micro_batch"),  # range(0, n, -1) is empty: it would go through and learn nothing
        ({"grad_clip": -1.0}, "--grad_clip"),  # would climb
        ({"grad_clip": math.nan}, "--grad_clip"),
        ({"lr": math.inf}, "--lr"),
        ({"epochs": 0}, "--epochs"),
        ({"normalise_samples": 1}, "--normalise_samples"),
        ({"seed": 2**64}, "--seed"),
        ({"seed": -1}, "--seed"),
        ({"train_layers": 3}, "--train_layers"),
        ({"warmup": 2}, "--warmup"),
    ],
    ids=str,
)
def test_impossible_settings_are_refused(tmp_path, changes, says):
    """A setting that can't work, or would be ignored, stops at once with one line that names the flag."""
    with pytest.raises(UserError, match=says):
        run_reward_model(tmp_path, make_gpt(15, block_size=24), **changes)


# ------------------------------------------------------------------------------------------------ data of one's own


def test_own_data_reads_no_file_of_the_demo(tmp_path, monkeypatch, capsys):
    """With --data alone it was judged on the demo's rankings and normalised on the demo's prompts, in silence. What
    lies beside the data is taken, where it is there, and every file that is read is named."""
    own, opened = beside_a_demo(tmp_path, monkeypatch)
    policy = checkpoint(own / "sft", make_gpt(14, block_size=24))
    data = write_lines(own / "mine.jsonl", own_pairs(8))
    settings = {"data": data, "policy": policy, "out_dir": str(own / "rm"), "warmup": 0, "device": "cpu"}
    settings |= {"max_new_tokens": 4, "normalise_samples": 8}
    results = reward_model.train(Config(**settings))
    said = capsys.readouterr().out
    assert "accuracy" not in results and results["gates"] == []
    assert "mine_held_out.jsonl" in said and data in said and policy in said

    twin = write_lines(own / "mine_held_out.jsonl", own_pairs(3, start=8))
    prompts = write_lines(own / "prompts.jsonl", [{"prompt": "ttt"}, {"prompt": "sss"}])
    results = reward_model.train(Config(**settings))
    said = capsys.readouterr().out
    assert f"{twin}: 3 rankings" in said and f"{prompts}: 2 prompts" in said
    held_out = encode_rankings(
        [Ranking(r["prompt"], r["completions"], [0, 1], [True] * 2) for r in own_pairs(3, 8)], TOY, 24
    )
    trained = load_model(own / "rm", CPU, "scalar")
    assert trained.task == ""
    assert results["accuracy"] == evaluate(trained.model, held_out, CPU)["accuracy"]
    assert opened == []


@pytest.mark.parametrize(
    ("vocabulary", "own", "gates"), [("tiny", True, 0), ("tiny", False, 3), ("bytes", True, 0), ("bytes", False, 3)]
)
def test_the_task_is_known_by_its_data_not_by_the_vocabulary(tmp_path, capsys, vocabulary, own, gates):
    """Own data in the tiny vocabulary got the embedded task's gates, the task's data in another one lost them; also
    where own simulated annotators tell their truth. A policy of the embedded task on own data is noted."""
    tokenizer = load_tokenizer(vocabulary)
    policy = make_gpt(14, vocab=tokenizer.n_vocab, block_size=192, n_layer=1, n_embd=16)
    save_model(tmp_path / "policy", policy, vocabulary, "sft.py", sft.Config(), "tiny")
    rows, held_out = (
        (own_pairs(4, gold=True), own_pairs(2, 4, gold=True)) if own else (task_rankings(4), task_rankings(2, 2))
    )
    settings = {"data": write_lines(tmp_path / "r.jsonl", rows), "policy": str(tmp_path / "policy"), "device": "cpu"}
    settings |= {"held_out_data": write_lines(tmp_path / "h.jsonl", held_out), "out_dir": str(tmp_path / "rm")}
    results = reward_model.train(Config(**settings, warmup=0, max_new_tokens=4))
    assert len(results["gates"]) == gates
    assert ("by_part" in results) is not own
    if not own:  # of the held-out prompts
        trained = load_model(tmp_path / "rm", CPU, "scalar").model
        assert results["by_part"] == accuracy_by_part(trained, [r["prompt"] for r in held_out], tokenizer, CPU)
    assert results["bayes_accuracy"] is not None
    said = capsys.readouterr().out
    assert ("NOTE" in said) == own
    assert said.count("GATE") == gates
    assert load_model(tmp_path / "rm", CPU, "scalar").task == ("" if own else "tiny")


@pytest.mark.parametrize("own", ["data", "held_out_data"])
def test_parts_of_the_task_need_both_files_to_be_of_it(tmp_path, own):
    """The task's rankings judged on held-out data of one's own ended in a traceback after the training, when the parts
    of the task's reward were looked for in prompts that are not of it; and the other way round they would say nothing.
    Neither has the task's parts or gates."""
    tokenizer = load_tokenizer("tiny")
    policy = make_gpt(14, vocab=tokenizer.n_vocab, block_size=192, n_layer=1, n_embd=16)
    save_model(tmp_path / "policy", policy, "tiny", "sft.py", sft.Config(), "tiny")
    rows = {"data": task_rankings(4), "held_out_data": task_rankings(2, 2)} | {own: own_pairs(4, gold=True)}
    settings = {name: write_lines(tmp_path / f"{name}.jsonl", column) for name, column in rows.items()}
    settings |= {"policy": str(tmp_path / "policy"), "out_dir": str(tmp_path / "rm"), "device": "cpu"}
    results = reward_model.train(Config(**settings, warmup=0, max_new_tokens=4))
    assert results["gates"] == [] and "by_part" not in results and 0 <= results["accuracy"] <= 1
    assert load_model(tmp_path / "rm", CPU, "scalar").task == ("" if own == "data" else "tiny")
