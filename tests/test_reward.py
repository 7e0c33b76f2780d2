"""lib/reward.py: the user's own functions, several rewards as one, and the truth where it is known."""

from __future__ import annotations

import functools
import importlib
import math
import sys
from dataclasses import dataclass

import pytest
import torch
from helpers import (
    checkpoint,
    frame_batch,
    make_gpt,
    make_scalar,
)

from stages import watching

import lib.reward
from lib.cli import UserError
from lib.checkpoint import load_model, save_model
from lib.reward import call_reward, load_function
from model import ScalarModel
from sampling import Rollout

CPU = torch.device("cpu")


@dataclass
class Made:
    by: str = "a test"


def test_load_function(tmp_path, monkeypatch):
    """file.py:function, from any folder; the project's own data/tiny.py from
    everywhere; files of one name don't mix."""
    monkeypatch.chdir(tmp_path)
    source = "from __future__ import annotations\nfrom dataclasses import dataclass\n\n"
    source += "@dataclass\nclass A:\n    x: int = {0}\n\ndef f(p, c):\n    return [A().x] * len(c)\n"
    for folder, value in (("one", 1), ("two", 2)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "my_reward.py").write_text(source.format(value), encoding="utf-8")
    one, two = load_function("one/my_reward.py:f"), load_function(str(tmp_path / "two" / "my_reward.py") + ":f")
    assert one(["p"], ["c"]) == [1] and two(["p"], ["c", "d"]) == [2, 2]
    assert load_function("data/tiny.py:gold_reward")(["Anna: Add 2 and 3."], ["Sure! It is 5."]) == [3.0]


def test_a_user_s_file_may_have_any_name(tmp_path, monkeypatch):
    """One that is named like a module of the project or of Python, imported already or later, takes nobody's place."""
    import colorsys

    import evaluate

    for module in (colorsys, evaluate):  # as if they had not been imported yet
        monkeypatch.delitem(sys.modules, module.__name__)
    for name in ("model", "ppo", "json", "evaluate", "colorsys"):
        (tmp_path / f"{name}.py").write_text("def f(p, c):\n    return [3.0]\n", encoding="utf-8")
        assert load_function(f"{tmp_path / name}.py:f")(["p"], ["c"]) == [3.0]
        assert not hasattr(importlib.import_module(name), "f"), name


NO_FUNCTIONS = ["", "rewards", "rewards.py", "rewards.py:", "rewards.py:missing", "rewards.py:number"]
NO_FUNCTIONS += ["nowhere.py:f", "bad.py:f", "program.py:f", ":f"]


@pytest.mark.parametrize("spec", NO_FUNCTIONS)
def test_load_function_errors(tmp_path, monkeypatch, spec):
    """Each mistake in `--reward` or `--gold` is a UserError that shows what was given."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rewards.py").write_text("number = 3\ndef f(p, c):\n    return [0.0]\n", encoding="utf-8")
    (tmp_path / "bad.py").write_text("def f(p, c)\n", encoding="utf-8")
    (tmp_path / "program.py").write_text("import sys\nsys.exit(0)\n", encoding="utf-8")  # a script's end, unguarded
    with pytest.raises(UserError) as error:
        load_function(spec)
    assert repr(spec) in str(error.value)


@pytest.mark.parametrize(
    ("returned", "says"),
    [
        ([1.0], "1 rewards for 2"),
        ([1.0, 2.0, 3.0], "3 rewards for 2"),
        ([1.0, None], "returned None, which is no finite number, for the completion 'b' of the prompt 'q'"),
        ([1.0, "good"], "returned 'good', which is no finite number"),
        (None, "one number"),
        (3.0, "one number"),
        ([1.0, float("nan")], "finite"),
        ([1.0, float("inf")], "finite"),
        ([1.0, 10**400], "finite"),
        ([1.0, torch.ones(9, 9)], r"^[^\n]{1,300}$"),
        ("12", "one number for each completion, not '12'"),
        (b"12", "one number"),
        ({0: 0.5, 1: 0.7}, "one number"),
        ({0.5, 0.7}, "one number"),
    ],
)
def test_call_reward_checks_what_comes_back(returned, says):
    """A reward function that returns anything but one finite number a completion is told so at once (need R8)."""
    with pytest.raises(UserError, match=says):
        call_reward(lambda prompts, completions: returned, ["p", "q"], ["a", "b"])


def test_call_reward_takes_all_kinds_of_numbers():
    """Ints, bools, tensors, generators; order kept; a UserError of the function's own passes through."""
    for returned in ([1, 2], [True, 2.0], torch.tensor([1.0, 2.0]), (float(x) for x in (1, 2))):
        rewards = call_reward(lambda p, c, r=returned: r, ["p", "q"], ["a", "b"])
        assert rewards == [1.0, 2.0] and all(type(r) is float for r in rewards)

    def refuses(prompts, completions):
        raise UserError("not my prompt")

    with pytest.raises(UserError, match=r"^not my prompt$"):
        call_reward(refuses, ["p"], ["c"])


def test_a_reward_function_is_told_what_was_cut_if_it_asks():
    """A function with a parameter `ended` learns which texts ended by themselves (nobody says: all); one without is
    called as before."""
    told = []

    def asks(prompts, completions, ended):
        told.append(ended)
        return [float(e) for e in ended]

    def asks_with_a_default(prompts, completions, *, ended=None):
        return asks(prompts, completions, ended)

    for function in (asks, asks_with_a_default):
        assert call_reward(function, ["p", "q"], ["a", "b"], [True, False]) == [1.0, 0.0]
        assert call_reward(function, ["p", "q"], ["a", "b"]) == [1.0, 1.0]
    assert told == [[True, False], [True, True]] * 2
    assert call_reward(lambda prompts, completions: [2.0, 3.0], ["p", "q"], ["a", "b"], [True, False]) == [2.0, 3.0]


def test_a_reward_function_may_change_its_arguments():
    """One that strips its list in place changed what the next one saw, and the log."""

    def strips(prompts, completions, ended):
        prompts.clear(), ended.clear()
        completions[:] = [c.strip() for c in completions]
        return [float(len(c)) for c in completions]

    prompts, completions, ended = ["p", "q"], [" a ", "bc "], [True, False]
    assert call_reward(strips, prompts, completions, ended) == [1.0, 2.0]
    assert (prompts, completions, ended) == (["p", "q"], [" a ", "bc "], [True, False])


def lengths(texts) -> list[float]:
    return [float(len(text)) for text in texts]


def of_the_usual_names(completions, min_length=5, **columns):
    return lengths(completions) if min_length == 5 and columns["prompts"] == ["p", "q"] else []


def with_more_places(completions, *rest, **columns):
    return lengths(completions) if rest == () else []


def of_one_of_each(completion, prompt):
    return lengths(completion) if prompt == ["p", "q"] else []


def with_a_default_first(scale=1.0, *, completions):
    return lengths(completions) if scale == 1.0 else []


def of_other_names(question, answer, scale=1.0, *, bias=0.0):
    return lengths(answer) if (question, scale, bias) == (["p", "q"], 1.0, 0.0) else []


def with_the_first_by_place(question, completions):
    return lengths(completions) if question == ["p", "q"] else []


def by_place_alone(prompts, completions, /):
    return lengths(completions)


@pytest.mark.parametrize(
    "function",
    [
        of_the_usual_names,
        with_more_places,
        of_one_of_each,
        with_a_default_first,
        of_other_names,
        with_the_first_by_place,
        by_place_alone,
    ],
)
def test_a_reward_function_s_parameters_get_what_their_names_say(function):
    """A parameter with a default keeps it: `min_length=5` got the prompts. And `completions` are these, wherever they
    stand and whatever stands beside them."""
    assert call_reward(function, ["p", "q"], ["abc", "d"]) == [3.0, 1.0]


def test_a_reward_function_that_would_not_get_the_completions_is_refused():
    """`def f(texts)` scored the prompts, without a word. A column of a data set that isn't there is missed by name."""
    for function in (lambda texts: lengths(texts), lambda prompts: lengths(prompts), lambda: [1.0, 2.0]):
        with pytest.raises(UserError, match=r"parameter for the completions: def f\(prompts, completions\)"):
            call_reward(function, ["p", "q"], ["abc", "d"])
    with pytest.raises(UserError, match=r"missing 1 required .*'solution'"):
        call_reward(lambda completions, solution: [float(c in solution) for c in completions], ["p", "q"], ["p", "d"])


@pytest.mark.filterwarnings("ignore:coroutine")
def test_an_async_reward_function_is_refused():
    async def judge(prompts, completions):
        return [1.0, 2.0]

    with pytest.raises(UserError, match="is async"):
        call_reward(judge, ["p", "q"], ["abc", "d"])


P, C, E = ["p", "q"], ["a", "b"], [True, False]
SIGNATURES = {
    "lambda p, c: (p, c)": (P, C),
    "lambda completions, prompts: (prompts, completions)": (P, C),
    "lambda completions, **more: (completions, more)": (C, {"prompts": P, "ended": E}),
    "lambda prompts, completions, **more: (prompts, completions, more)": (P, C, {"ended": E}),
    "lambda questions, answers, ended: (questions, answers, ended)": (P, C, E),
    "lambda ended, questions, answers: (questions, answers, ended)": (P, C, E),
    "lambda questions, completions: (questions, completions)": (P, C),
    "lambda p, c, threshold=3: (p, c, threshold)": (P, C, 3),
    "lambda p, c, *, scale=2: (p, c, scale)": (P, C, 2),
    "lambda completions, *, scale=2: (completions, scale)": (C, 2),
    "lambda prompts, *, completions, ended: (prompts, completions, ended)": (P, C, E),
    "lambda p, c, /: (p, c)": (P, C),
    "lambda p, c, ended, /: (p, c, ended)": (P, C, E),
    "lambda *all: all": (P, C),
    "lambda completions: completions": C,
}


@pytest.mark.parametrize("function", SIGNATURES)
def test_a_function_gets_what_its_parameters_are_called(function):
    """Prompts scored as completions, a keyword of the user's own that is overwritten."""
    found = []
    call_reward(lambda_that_notes(eval(function), found), P, C, E)
    assert found == [SIGNATURES[function]]


def lambda_that_notes(function, found: list):
    @functools.wraps(function)  # its signature, too
    def noting(*args, **kwargs):
        found.append(function(*args, **kwargs))
        return [0.0, 0.0]

    return noting


@pytest.mark.parametrize("n", [1, 2, 3, 5, 8, 11])
@pytest.mark.parametrize("error", [KeyError, SystemExit])
def test_the_sample_on_which_a_function_fails_is_named(capsys, n, error):
    """Another sample's texts, be it the first or the middle one, or the prompt as the completion."""
    prompts, completions = [f"question {i}" for i in range(n)], [f"answer {i}" for i in range(n)]
    for bad in range(n):

        def fails(prompts, completions, bad=bad):
            if f"answer {bad}" in completions:
                raise error
            return [0.0] * len(completions)

        with pytest.raises(UserError) as told:
            call_reward(fails, prompts, completions)
        assert "in fails" in capsys.readouterr().err  # where in the user's file it was
        assert f"for the completion 'answer {bad}' of the prompt 'question {bad}' ({error.__name__}" in str(told.value)


def test_a_function_that_fails_on_samples_together_blames_none_of_them(capsys):
    """Each half alone goes well: the last sample that was tried has nothing to do with it."""

    def fails(prompts, completions):
        return [1 / (3 - len(completions))] * len(completions)

    with pytest.raises(UserError, match="failed on 3 samples, and on neither half of them"):
        call_reward(fails, list("pqr"), list("abc"))


def test_long_texts_are_cut_in_an_error():
    with pytest.raises(UserError) as told:
        call_reward(lambda p, c: [math.nan], ["q" * 78], ["x" * 81])
    assert f"for the completion '{'x' * 76}... of the prompt '{'q' * 78}'" in str(told.value)


def test_a_file_of_one_s_own_comes_before_the_project_s(tmp_path, monkeypatch):
    """Somebody's own data/tiny.py, in the folder where she works, would be the demo's."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "tiny.py").write_text("def gold_reward(p, c):\n    return [7.0]\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert load_function("data/tiny.py:gold_reward")(["p"], ["c"]) == [7.0]


def test_a_wrong_reward_names_the_function():
    """With several rewards it has to be clear whose it is."""
    with pytest.raises(UserError, match=r"^mine\.py:f returned 1 rewards for 2 completions$"):
        call_reward(lambda p, c: [0.0], ["p", "q"], ["a", "b"], name="mine.py:f")


def test_a_bug_in_a_reward_function_is_not_blamed_on_its_result():
    """A TypeError inside the user's function is no wrong return value: the user needs to see where it was raised."""

    def buggy(prompts, completions):
        return [len(c) + "1" for c in completions]

    with pytest.raises((TypeError, UserError)) as error:
        call_reward(buggy, ["p"], ["c"])
    assert "must return one number" not in str(error.value)


def test_gold_function(tmp_path):
    """auto: the embedded task's truth on the embedded task's prompts, none otherwise; empty: none; a name: that."""
    assert lib.reward.gold_function("auto", "tiny")(["Anna: Add 2 and 3."], ["It is 5."]) == [2.0]
    assert lib.reward.gold_function("auto", "") is None and lib.reward.gold_function("", "tiny") is None
    (tmp_path / "mine.py").write_text("def f(p, c):\n    return [7.0]\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"^the gold reward returned 1 rewards for 2"):  # not --reward's
        lib.reward.gold_function(f"{tmp_path / 'mine.py'}:f", "")(["p", "q"], ["c", "d"])
    for task in ("", "tiny"):
        assert lib.reward.gold_function(f"{tmp_path / 'mine.py'}:f", task)(["p"], ["c"]) == [7.0]


def a_rollout(seed: int = 0, B: int = 5) -> Rollout:
    frame = frame_batch(B, seed=seed)
    return Rollout(frame.tokens, frame.prompt_lens, frame.lens, torch.arange(B) % 2 == 0)


def test_score_rollout_equals_each_row_alone(float64):
    """In slices of any size, each cut to its longest row: a row's score is that of its text without filler."""
    model, rollout = make_scalar(4), a_rollout(3, B=7)
    alone = [model(rollout.tokens[i : i + 1, : int(n)])[0, -1].item() for i, n in enumerate(rollout.lens)]
    for rows in (1, 2, 3, 7, 64):
        assert lib.reward.score_rollout(model, rollout, rows).tolist() == pytest.approx(alone, abs=1e-9)


def test_rollouts_are_scored_with_little_filler():
    """In the order of their prompts' lengths, or in that of the rollout, most of what a slice holds is filler."""
    lens, prompt_lens = torch.tensor([9, 3, 12, 4, 10, 2]), torch.tensor([1, 2, 2, 3, 8, 1])
    rollout = Rollout(torch.ones(6, 12, dtype=torch.long), prompt_lens, lens, torch.zeros(6, dtype=torch.bool))
    with watching() as watch:
        lib.reward.score_rollout(make_scalar(4), rollout, 2)
    read = [p.tokens.numel() for p in watch.passes if isinstance(p.network, ScalarModel)]
    assert sorted(read) == [2 * 3, 2 * 9, 2 * 12]


@pytest.mark.parametrize(
    ("weights", "combine", "expected"),
    [
        (None, "sum", lambda a, b, c: a + b + c),
        ([0.5, 2.0, -1.0], "sum", lambda a, b, c: 0.5 * a + 2 * b - c),
        (None, "mean", lambda a, b, c: (a + b + c) / 3),
        ([1.0, 2.0, 5.0], "mean", lambda a, b, c: (a + 2 * b + 5 * c) / 8),
        (None, "min", min),
        ([1.0, 2.0, -1.0], "min", lambda a, b, c: min(a, 2 * b, -c)),
        (None, "mean-std", lambda *x: sum(x) / 3 - (sum(v * v for v in x) / 3 - (sum(x) / 3) ** 2) ** 0.5),
    ],
)
def test_rewards_are_combined_as_the_flags_say(tmp_path, float64, weights, combine, expected):
    """A reward model and two functions, one of which asks which texts were cut: weighted first, then combined, row by
    row; and the reward models among them are handed on."""
    model, rollout = make_scalar(4), a_rollout(3)
    save_model(tmp_path / "rm", model, "toy", "reward_model.py", Made())
    source = "def length(prompts, completions):\n    return [float(len(c)) for c in completions]\n"
    source += "def whole(prompts, completions, ended):\n    return [3.0 * e for e in ended]\n"
    (tmp_path / "mine.py").write_text(source, encoding="utf-8")
    mine = f"{tmp_path / 'mine.py'}"
    policy = load_model(checkpoint(tmp_path / "policy", make_gpt()), CPU)
    specs = [f"{mine}:length", str(tmp_path / "rm"), f"{mine}:whole"]
    score, models = lib.reward.load_reward(specs, policy, "", CPU, weights, combine)
    completions = ["a" * n for n in range(5)]
    found = score(rollout, ["p"] * 5, completions).tolist()
    scores = model.score(rollout.tokens, rollout.lens).tolist()
    parts = zip((0, 1, 2, 3, 4), scores, (3.0, 0.0, 3.0, 0.0, 3.0), strict=True)
    assert found == pytest.approx([expected(*p) for p in parts], abs=1e-9)
    assert len(models) == 1 and torch.equal(models[0].head.weight, model.head.weight)


@pytest.mark.parametrize(
    ("reward", "weight", "fits"),
    [
        (1e20, 1.0, False),
        (-1e20, 1.0, False),
        (1e20, 1e-20, True),
        (1e39, 1e-39, False),
        (1e12, 1e6, False),
        (1e9, 1.0, True),
    ],
)
def test_rewards_too_large_to_square_are_named(tmp_path, reward, weight, fits):
    """ "value_loss is inf; lower --lr", said a run whose rewards were 1e20. It is their scale, and that is said; what
    --reward_weights brings to the order of 1 may be as large as it likes."""
    (tmp_path / "mine.py").write_text(f"def huge(prompts, completions):\n    return [0.0] * 4 + [{reward}]\n")
    policy, spec = load_model(checkpoint(tmp_path / "policy", make_gpt()), CPU), f"{tmp_path / 'mine.py'}:huge"
    score, _ = lib.reward.load_reward([spec], policy, "", CPU, [weight])
    if fits:
        assert score(a_rollout(3), ["p"] * 5, ["a"] * 5).isfinite().all()
    else:
        with pytest.raises(UserError, match=r"mine.py:huge returned a reward of -?1e\+\d\d.*--reward_weights"):
            score(a_rollout(3), ["p"] * 5, ["a"] * 5)


def test_rewards_that_do_not_fit_are_refused(tmp_path):
    """No reward; weights for another number of rewards; a mean that divides by nothing; the demo's reward model on
    prompts that are not of its task, which is plausible and wrong."""
    save_model(tmp_path, make_scalar(), "tiny", "reward_model.py", Made(), "tiny")
    save_model(tmp_path / "policy", make_gpt(), "tiny", "sft.py", Made(), "tiny")
    policy, rm = load_model(tmp_path / "policy", CPU), str(tmp_path)
    for arguments, says in (
        (([], policy, "tiny", CPU), "--reward needs"),
        (([rm], policy, "tiny", CPU, [1.0, 2.0]), "--reward_weights has 2 values for 1"),
        (([rm, rm], policy, "tiny", CPU, [1.0, -1.0], "mean"), "--reward_combine mean needs"),
        (([rm, rm], policy, "tiny", CPU, [1.0, -3.0], "mean"), "--reward_combine mean needs"),
        (([rm, rm], policy, "tiny", CPU, [1.0, 2.0], "mean-std"), "--reward_combine mean-std takes no"),
        (([rm], policy, "", CPU), "embedded task"),
    ):
        with pytest.raises(UserError, match=says):
            lib.reward.load_reward(*arguments)
    assert len(lib.reward.load_reward([rm], policy, "tiny", CPU)[1]) == 1
    save_model(tmp_path / "own", make_scalar(), "tiny", "reward_model.py", Made(), "")
    for task in ("tiny", ""):  # one's own reward model may judge any prompts
        assert len(lib.reward.load_reward([str(tmp_path / "own")], policy, task, CPU)[1]) == 1
