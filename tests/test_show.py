"""lib/show.py: samples, comparisons and traces as they are printed."""

from __future__ import annotations

from types import SimpleNamespace

import math

import pytest
import torch
from helpers import (
    bigram,
    TOY,
    completion_logprobs,
    make_gpt,
    random_prompts,
    spread,
)

import lib.show
from model import GPT
from sampling import Rollout

CPU = torch.device("cpu")


def test_sample_prompts_leaves_room_for_an_answer():
    """The end of each prompt, where the question is; and at least one token of it, whatever --max_new_tokens says."""
    policy = bigram(12 * torch.eye(23))  # repeats the last letter for ever
    for max_new_tokens, rows in (
        (6, [list(range(2, 20)) + [19] * 6, [1, 2, 3] + [3] * 6]),
        (99, [[19] * 24, [3] * 24]),
    ):
        rollout = lib.show.sample_prompts(policy, [list(range(20)), [1, 2, 3]], TOY, max_new_tokens, seed=1)
        assert [row[:n] for row, n in zip(rollout.tokens.tolist(), rollout.lens, strict=True)] == rows
        assert not rollout.ended.any()


def test_show_samples(capsys):
    """Three prompts with what was made of them, without EOS, and scores if there are any."""
    tokens = torch.tensor([[0, 1, 2, TOY.eos_id], [3, 4, 5, 6], [7, 8, TOY.eos_id, 0], [1, 1, 1, 1]])
    rollout = Rollout(tokens, torch.tensor([2, 1, 1, 1]), torch.tensor([4, 4, 3, 4]), torch.tensor([1, 0, 1, 0]).bool())
    lib.show.show_samples(rollout, TOY, torch.tensor([1.0, -0.256, 0.0, 9.0]))
    lib.show.show_samples(rollout, TOY)
    with_scores = ["  [+1.00] 'ab' -> 'c'", "  [-0.26] 'd' -> 'efg'", "  [+0.00] 'h' -> 'i'"]
    without = ["  'ab' -> 'c'", "  'd' -> 'efg'", "  'h' -> 'i'"]
    assert capsys.readouterr().out.splitlines() == [*with_scores, *without]


def test_compare_samples_equals_a_loop(float64, capsys):
    """EOS rates of both, and the mean over the policy's own samples of log pi/pi_ref, token after token; the same
    whether or not the two have been compared before."""
    policy, reference = make_gpt(1), make_gpt(1)
    spread(policy, 5, 0.05)
    prompts = random_prompts([3, 1, 4, 2, 5, 2, 3, 3], 22)
    found = lib.show.compare_samples(policy, reference, prompts, TOY, 8, seed=3)
    rollout, before = (lib.show.sample_prompts(m, prompts, TOY, 8, seed=3) for m in (policy, reference))
    ratios = []
    for row, prompt in enumerate(prompts):
        completion = rollout.tokens[row, len(prompt) : int(rollout.lens[row])].tolist()
        both = [completion_logprobs(m, prompt, completion).sum().item() for m in (policy, reference)]
        ratios.append(both[0] - both[1])
    assert found["kl"] == pytest.approx(sum(ratios) / len(ratios), abs=1e-9) and abs(found["kl"]) > 0.01
    assert found["eos_rate"] == rollout.ended.double().mean() and found["ref_eos_rate"] == before.ended.double().mean()
    assert f"EOS rate {found['eos_rate']:.2f} (reference {found['ref_eos_rate']:.2f})" in capsys.readouterr().out


X = 20  # a letter that is followed by itself


def walker(ends: int, per_token: float = 0.0) -> GPT:
    """A policy that ends at once after the first `ends` letters, and else says X for ever, each time with log-prob
    -per_token."""
    logits = torch.zeros(23, 23)
    for letter in range(22):
        logits[letter, TOY.eos_id if letter < ends else X] = 15.0
    if per_token:
        logits[X] = math.log((1 - math.exp(-per_token)) / 21)
        logits[X, X], logits[X, TOY.eos_id] = -per_token, -50.0
    return bigram(logits)


@pytest.mark.parametrize(
    ("ended", "ref_ended", "kl", "warned"),
    [
        (10, 10, 0.0, False),
        (8, 10, 0.2 * 15, False),
        (7, 10, 0.3 * 15, True),
        (5, 6, 0.1 * 15, False),
        (0, 0, 24.0, False),
        (0, 0, 26.0, True),
        (0, 0, 0.0, False),  # neither has learned to stop
    ],
)
def test_a_collapse_is_said_aloud(capsys, ended, ref_ended, kl, warned):
    """A policy that no longer stops, or that is far from where it began: without held-out data, nothing else shows
    it. Of ten prompts, each a letter."""
    far = kl / 9 if ended == ref_ended == 0 else 0.0  # the first of ten tokens is the same for both
    policy, reference = walker(ended), walker(ref_ended, far)
    found = lib.show.compare_samples(policy, reference, [[letter] for letter in range(10)], TOY, 10, 1)
    assert found == {
        "eos_rate": pytest.approx(ended / 10),
        "ref_eos_rate": pytest.approx(ref_ended / 10),
        "kl": pytest.approx(kl, abs=1e-3),
    }
    assert ("WARNING" in capsys.readouterr().out) is warned


def test_a_trace_shows_one_rollout_token_by_token(capsys):
    """Every action with its figures, and no other position: the shift by one between a token and its log-prob is where
    a reader looks first."""
    names = ("logprobs", "ref_logprobs", "kl", "rewards", "values", "advantages", "returns")
    columns = {name: torch.arange(8.0).view(2, 4) + 10 * n for n, name in enumerate(names)}
    mask = torch.tensor([[0, 1, 1, 0], [0, 0, 1, 1]]).bool()
    tokens = torch.tensor([[0, 1, 2, TOY.eos_id, 0], [3, 4, 5, 6, 7]])
    lib.show.print_trace(SimpleNamespace(tokens=tokens, action_mask=mask, **columns), TOY, row=0)
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split() == ["token", *names]
    assert [line.split() for line in lines] == [
        [repr("c"), *(f"{1 + 10 * n}.000" for n in range(7))],
        [repr("w"), *(f"{2 + 10 * n}.000" for n in range(7))],
    ]
