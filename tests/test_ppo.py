"""Stage 3a, the script: what `train` does with rewards, penalty and both networks, iteration by iteration, against slow
float64 ones. test_ppo_update.py holds them."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import (
    EOS,
    TOY,
    assert_same_weights,
    checkpoint,
    completion_logprobs,
    descend,
    frame_batch,
    make_gpt,
    make_scalar,
    make_told,
    plain_sgd,
    write_lines,
)
from stages import CPU, PROMPTS, asked, demonstrations, reward_file, run, toy_policy, watching
from test_ppo_update import slow_rows, slow_update, tiny_config

from lib.checkpoint import load_model
from model import GPT, GPTConfig, ScalarModel

SCALARS = pytest.mark.parametrize("make", [make_scalar, make_told])


def scored(call, penalty: float) -> tuple[list[float], torch.Tensor]:
    """What the reward `letters` of stages.py says, by hand -> raw, and with the penalty of cut completions."""
    raw = [c.count("a") + 0.1 * len(p) for p, c in zip(call.prompts, call.completions, strict=True)]
    return raw, torch.tensor([r - penalty * (not end) for r, end in zip(raw, call.ended, strict=True)])


@pytest.mark.parametrize("kl", ["k1", "exact"])
def test_an_iteration_is_that_of_the_definition(tmp_path, monkeypatch, float64, kl):
    """The whole script, two iterations with plain SGD: in the second the policy has left its reference. Its texts are
    the truth's; from them on everything is worked out again, row by row: the score with the penalty of cut completions,
    KL penalty and coefficient, values, advantages, their whitening, and the step of both networks. And every logged
    figure: a KL that is not the one trained on, entropy or KL averaged over pads, EOS looked for in the prompt, a score
    shown with the penalty in it."""
    plain_sgd(monkeypatch)
    start = toy_policy()
    changes = {"minibatch": 12, "ppo_epochs": 1, "lr": 0.02, "value_lr": 0.01, "kl": kl, "lam": 0.9, "gamma": 0.97}
    with watching() as watch:
        results, policy, log = run("ppo", tmp_path, start, iterations=2, **changes)
    call = asked(tmp_path)[1]
    rollout, (raw, scores) = call.rollout(), scored(call, penalty=1.5)
    assert 0 < sum(call.ended) < 12, "some completions must be cut and some ended"
    before, value_model = watch.at(1), watch.at(1, ScalarModel)
    config = tiny_config(temperature=0.7, kl=kl, lam=0.9, gamma=0.97, ppo_epochs=1)
    rows = slow_rows(before, start, value_model, rollout, scores, 0.2, config)
    every = torch.cat([row["advantages"] for row in rows])
    for i, row in enumerate(rows):
        n = int(rollout.lens[i])
        row["advantages"] = (row["advantages"] - every.mean()) / (every.var(correction=0) + 1e-8).sqrt()
        row |= {"tokens": rollout.tokens[i, :n].tolist(), "prompt_len": int(rollout.prompt_lens[i])}
    # the rate has halved: linear decay over two iterations
    expected, _, figures = slow_update(before, value_model, rows, config, 0.01, 0.005)
    assert_same_weights(policy, expected, before, tolerance=1e-7)

    assert (log[0]["kl"], log[0]["k3"]) == (0.0, 0.0)  # the policy starts as the reference
    ratios = [row["logprobs"] - row["ref_logprobs"] for row in rows]
    values, returns = (torch.cat([row[name] for row in rows]) for name in ("values", "returns"))
    entropies = torch.cat([row["entropy"] for row in rows])
    divergence = sum(row["kl"].sum().item() for row in rows) / 12
    figures |= {
        "score": sum(raw) / 12,
        "kl": divergence,
        "k3": sum(((-d).exp() - 1 + d).sum().item() for d in ratios) / 12,
        "objective": scores.mean().item() - 0.2 * divergence,
        "entropy": entropies.mean().item(),
        "eos_rate": sum(call.ended) / 12,
        "length": len(entropies) / 12,
        "distinct": len(set(call.completions)) / 12,
        "explained_variance": 1 - ((returns - values).var(correction=0) / returns.var(correction=0)).item(),
        "kl_coef": 0.2,
        "first_ratio": 1.0,
    }
    assert {k: log[1][k] for k in figures} == pytest.approx(figures, abs=1e-6)  # the log rounds to six digits
    assert results["score"] == pytest.approx(log[1]["score"], abs=1e-6)  # the last quarter of two iterations


@SCALARS
def test_the_value_model_starts_as_the_reward_model(tmp_path, float64, make):
    """A critic from other weights, without the normalisation or what the reward model is told, or sharing storage with
    the reward model, which then drifts as it learns."""
    scorer = make(2, block_size=24)
    scorer.mean.fill_(-0.4)
    scorer.std.fill_(1.7)
    reward = checkpoint(tmp_path / "scorer", scorer)
    # --gold writes the texts down
    changes = {"reward": reward, "gold": f"{reward_file(tmp_path)}:letters", "value_lr": 1e-2}
    with watching() as watch:
        log = run("ppo", tmp_path, toy_policy(3), **changes).log
    (value_model,) = {p.network for p in watch.training(ScalarModel)}
    (judge,) = {p.network for p in watch.passes if isinstance(p.network, ScalarModel)} - {value_model}
    for model in (watch.at(0, ScalarModel), judge):
        for name, tensor in scorer.state_dict().items():
            assert torch.equal(model.state_dict()[name], tensor), name
    for (name, p), start in zip(value_model.named_parameters(), scorer.parameters(), strict=True):
        assert not torch.equal(p, start), f"{name} does not learn"
    for call, row in zip(asked(tmp_path), log, strict=True):
        rollout = call.rollout()
        assert row["score"] == pytest.approx(scorer.score(rollout.tokens, rollout.lens).mean().item(), abs=1e-6)


@pytest.mark.parametrize("rewards", [["letters"], ["scorer", "letters"], ["letters", "scorer"]], ids=str)
def test_with_a_function_in_the_reward_values_start_at_0(tmp_path, rewards):
    """A random critic, or one in the units of the reward model alone where a function of unknown size has a part in the
    reward: the first advantages are worse than without a critic (explained variance -1.8 was seen). At 0 it is 0. Its
    body is the reward model's, where there is one: that knows what a good text looks like."""
    scorer, start = make_told(2, block_size=24), toy_policy(4)
    named = {"scorer": checkpoint(tmp_path / "scorer", scorer), "letters": f"{reward_file(tmp_path)}:letters"}
    with watching() as watch:
        log = run("ppo", tmp_path, start, iterations=1, reward=[named[name] for name in rewards]).log
    value_model = watch.at(0, ScalarModel)
    assert (value_model(torch.arange(20).view(2, 10)) == 0).all()
    assert log[0]["explained_variance"] == pytest.approx(0, abs=1e-6)
    body = scorer.gpt if "scorer" in rewards else start
    assert all(torch.equal(value_model.gpt.state_dict()[k], v) for k, v in body.state_dict().items())


@pytest.mark.parametrize(
    ("combine", "weights", "factor"),
    [
        ("sum", [], 1.0),
        ("sum", [2.5], 2.5),
        ("sum", [-0.5], -0.5),
        ("sum", [0.5, 1.5], 2.0),
        ("mean", [0.5, 1.5], 1.0),
        ("mean", [3.0], 1.0),
        ("mean-std", [], 1.0),
        ("min", [3.0], 3.0),
        ("min", [2.0, 5.0], 2.0),  # it starts as the first of them
        ("min", [5.0, 2.0], 5.0),
        ("sum", [1.0, -1.0], 0.0),
    ],
    ids=str,
)
def test_the_value_model_starts_in_the_units_of_the_reward(tmp_path, float64, combine, weights, factor):
    """A reward with a weight of 2.5 is 2.5 times as large, and so is what the critic has to predict."""
    scorer, frame = make_told(2, block_size=24), frame_batch(B=6, seed=49)
    scorer.mean.fill_(-0.4)
    scorer.std.fill_(1.7)
    others = [checkpoint(tmp_path / f"other{i}", make_told(3 + i, block_size=24)) for i in range(1, len(weights))]
    reward = [checkpoint(tmp_path / "scorer", scorer), *others]
    with watching() as watch:
        changes = {"reward": reward, "reward_weights": weights, "reward_combine": combine}
        run("ppo", tmp_path, iterations=1, ppo_epochs=1, **changes)
    found = watch.at(0, ScalarModel)(frame.tokens)
    torch.testing.assert_close(found, factor * scorer(frame.tokens), rtol=0, atol=1e-12)


def test_learning_rates_belong_to_their_networks(tmp_path):
    """lr 0 leaves the policy as it was, to the bit, for a whole run, while the
    critic learns; and the other way round."""
    for still, learns, rates in ((GPT, ScalarModel, (0.0, 1e-2)), (ScalarModel, GPT, (1e-2, 0.0))):
        with watching() as watch:
            log = run("ppo", tmp_path, toy_policy(5), lr=rates[0], value_lr=rates[1]).log
        for kind, same in ((still, True), (learns, False)):
            pairs = zip(watch.at(0, kind).parameters(), watch.at(-1, kind).parameters(), strict=True)
            assert all(torch.equal(a, b) for a, b in pairs) is same
        if still is GPT:
            assert all(row["approx_kl"] == 0 and row["clip_fraction"] == 0 and row["kl"] == 0 for row in log)


def test_the_adaptive_coefficient_follows_the_logged_kl(tmp_path, float64):
    """A controller fed with another KL (of one rank, of prompt tokens) or a penalty that
    goes on with the initial coefficient."""
    changes = {"iterations": 5, "lr": 2e-3, "kl_target": 1.5, "kl_horizon": 20.0, "stop_kl": 0.1}
    log = run("ppo", tmp_path, make_gpt(3, block_size=24), **changes).log
    coef = 0.2
    for row in log:
        assert row["kl_coef"] == pytest.approx(coef, abs=1e-5)
        coef *= 1 + min(max(row["kl"] / 1.5 - 1, -0.2), 0.2) * 12 / 20
    errors = [(row["kl"] / 1.5 - 1, row["k3"] / 1.5 - 1) for row in log]
    assert any(abs(kl) < 0.2 and abs(kl - k3) > 0.1 for kl, k3 in errors[:-1]), "which KL it is must make a difference"


def test_the_penalty_is_taken_with_the_coefficient_of_its_iteration(tmp_path, float64):
    """A coefficient that moves and is logged, while the penalty goes on with the first one: after the first iteration
    the run with a target is then that without."""
    changes = {"iterations": 2, "lr": 2e-2, "kl_horizon": 1.0}
    fixed = run("ppo", tmp_path / "fixed", make_gpt(3, block_size=24), **changes).log
    moved = run("ppo", tmp_path / "moved", make_gpt(3, block_size=24), kl_target=1e-3, **changes).log
    assert fixed[0]["policy_loss"] == moved[0]["policy_loss"] and fixed[1]["score"] == moved[1]["score"]
    assert moved[1]["kl_coef"] != fixed[1]["kl_coef"]
    assert (fixed[1]["policy_loss"], fixed[1]["value_loss"]) != (moved[1]["policy_loss"], moved[1]["value_loss"])


def test_training_raises_the_reward(tmp_path):
    """The toy must work: a reward for one letter makes the policy write it."""
    torch.manual_seed(0)
    even = GPT(GPTConfig(23, 24, n_layer=1, n_head=2, n_embd=32))  # every letter about equally likely
    changes = {"iterations": 10, "rollouts": 32, "minibatch": 16, "micro_batch": 0}
    log = run("ppo", tmp_path, even, **changes, lr=1e-2, kl_coef=0.01, temperature=1.0, stop_kl=0.1).log
    assert log[-1]["score"] > log[0]["score"] + 2


@pytest.mark.parametrize("stage", ["ppo", "grpo"])
def test_the_true_reward_is_told_which_completions_ended(tmp_path, stage):
    """--gold with a function that asks for `ended`: its mean is then the share of completions that ended."""
    stops = f"{reward_file(tmp_path)}:stops"
    log = run(stage, tmp_path, gold=stops, reward=stops, temperature=2.0).log
    for row in log:
        assert row["gold"] == pytest.approx(row["eos_rate"], abs=1e-6)
        assert row["score"] == pytest.approx(row["eos_rate"], abs=1e-6)
    assert any(0 < row["gold"] < 1 for row in log)


@pytest.mark.parametrize("stage", ["ppo", "grpo"])
def test_the_weights_reach_the_training(tmp_path, stage):
    """--reward_weights and --reward_combine that are checked and then forgotten."""
    letters = f"{reward_file(tmp_path)}:letters"
    mix = {"reward": [letters, letters], "reward_weights": [5.0, 3.0], "reward_combine": "min"}
    log = run(stage, tmp_path, iterations=1, **mix).log
    raw, _ = scored(asked(tmp_path)[0], 0.0)
    assert log[0]["score"] == pytest.approx(3 * sum(raw) / 12, abs=1e-5)  # neither their sum nor their mean


@pytest.mark.parametrize("named", [True, False])
def test_the_pretraining_term_reaches_the_training(tmp_path, monkeypatch, float64, named):
    """--ptx_coef that is read and then forgotten, or takes other demonstrations than those that are named, or else than
    those beside the prompts; a mean for each micro-batch, a term that counts more than once a step, the same
    demonstrations in every step, a micro-batch that is larger than asked for. The reward is the same for all, so PPO
    itself has no gradient, and a step of plain SGD is that of the SFT loss of what was drawn."""
    plain_sgd(monkeypatch)
    start = toy_policy(9)
    right = demonstrations([("ab", "cd"), ("h", "i"), ("bcde", "jklmnopq"), ("b", "abcdefg")])
    other = demonstrations([("kl", "mno")])
    mine = write_lines(tmp_path / "mine.jsonl", right if named else other)
    write_lines(tmp_path / "demonstrations.jsonl", other if named else right)
    calm = {"reward": f"{reward_file(tmp_path)}:same", "eos_penalty": 0.0, "kl_coef": 0.0, "lam": 1.0}
    once = {
        "iterations": 3,
        "ppo_epochs": 1,
        "minibatch": 12,
        "micro_batch": 5,
        "lr": 0.1,
        "value_lr": 0.0,
        "ptx_coef": 0.5,
    }
    with watching() as watch:
        policy = run("ppo", tmp_path, start, **calm, **once, **({"ptx_data": mine} if named else {})).model
    texts = {row["prompt"] + row["completion"]: row for row in right}
    expected, drawn = copy.deepcopy(start), []
    for step in range(3):
        passes = [p.texts() for p in watch.of_step(step, GPT)][3:]  # the first three are of the 12 rollouts
        assert sorted(map(len, passes)) == [2, 5, 5]
        drawn.append(sorted(text.partition("w")[0] for part in passes for text in part))  # w: EOS
        batch = [texts[text] for text in drawn[-1]]
        nats = torch.cat(
            [completion_logprobs(expected, TOY.encode(r["prompt"]), [*TOY.encode(r["completion"]), EOS]) for r in batch]
        )
        descend(expected, -0.5 * nats.mean(), 0.1 * (1 - step / 3))
    assert_same_weights(policy, expected, start)
    assert drawn[0] != drawn[1] and drawn[1] != drawn[2]


def test_the_pretraining_term_draws_from_all_demonstrations(tmp_path):
    """The first --minibatch of them alone, or the same ones whatever the seed is."""
    rows = demonstrations([(TOY.decode([i, 1]), "v" * 9) for i in range(20)])
    texts = {row["prompt"] + row["completion"] for row in rows}
    mine, drawn = write_lines(tmp_path / "mine.jsonl", rows), []
    for seed in (1, 2):
        with watching() as watch:
            few = {"iterations": 16, "ppo_epochs": 2, "rollouts": 4, "minibatch": 4, "max_new_tokens": 2, "lr": 0.0}
            run("ppo", tmp_path, toy_policy(9), ptx_coef=0.5, ptx_data=mine, seed=seed, **few)
        drawn.append([text for p in watch.training(GPT) for text in p.texts() if text in texts])
    assert len(drawn[0]) == len(drawn[1]) == 16 * 2 * 4 and set(drawn[0]) == texts and drawn[0] != drawn[1]


def test_prompts_that_are_cut_are_counted(tmp_path, capsys):
    """A long --max_new_tokens leaves little room: prompts were cut to one token in silence. Their end stays."""
    with watching() as watch:
        run("ppo", tmp_path, max_new_tokens=20, iterations=1, rollouts=30)
    said = f"{tmp_path / 'prompts.jsonl'}: 2 of 8 prompts cut to their last 4 tokens; "
    advice = [line for line in capsys.readouterr().out.splitlines() if line.startswith(said)]
    assert len(advice) == 1 and "--block_size" in advice[0] and "--max_new_tokens" in advice[0]
    seen = {text for p in watch.training(GPT) for text in p.texts()}
    assert all(text.startswith(tuple(p[-4:] for p in PROMPTS)) for text in seen)
    assert any(text.startswith(("fghi", "pqrs")) for text in seen)
    run("ppo", tmp_path, iterations=1)
    assert "prompts cut" not in capsys.readouterr().out


@pytest.mark.parametrize(("n_layer", "trained"), [(1, "0"), (2, "01"), (3, "12")])
def test_a_value_model_of_fewer_blocks_is_trained_as_far_as_it_goes(tmp_path, n_layer, trained):
    """--train_layers 2 with a small reward model: not the user's mistake. And what is frozen in it doesn't move."""
    reward = checkpoint(tmp_path / "scorer", make_scalar(3, n_layer=n_layer, block_size=24))
    with watching() as watch:
        run("ppo", tmp_path, toy_policy(5, n_layer=3), train_layers=2, reward=reward, iterations=1, value_lr=1e-2)
    after, before = watch.at(-1, ScalarModel), load_model(reward, CPU, "scalar").model
    moved = {name for name, p in after.named_parameters() if not torch.equal(p, before.get_parameter(name))}
    assert {name.split(".")[2] for name in moved if ".h." in name} == set(trained)
    assert not any("wte" in name for name in moved)
