"""Rewards: reward models, functions of text, and mixtures of them."""

from __future__ import annotations

import importlib.util
import inspect
import math
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from lib.checkpoint import Checkpoint, load_scorer
from lib.cli import UserError, check, one_line
from lib.train import autocast
from model import ScalarModel
from sampling import Rollout


COMBINES = ("sum", "mean", "min", "mean-std")  # one reward from several


def check_task(scorer: Checkpoint, path: str, task: str) -> None:
    """Refuse the demo's reward model on prompts of one's own: its numbers are plausible and mean nothing."""
    foreign = scorer.task == "tiny" and task != "tiny"
    check(not foreign, f"--reward {path} was trained on the embedded task, and the prompts are not of it; name another")


def load_function(spec: str):
    """The function that `file.py:function` names."""
    file, _, name = spec.rpartition(":")
    root = Path(__file__).parent.parent  # data/tiny.py is found from any folder
    path = Path(file) if Path(file).exists() else root / file
    if not file.endswith(".py") or not path.exists():
        raise UserError(f"{spec!r}: expected file.py:function, and the file to exist")
    # under a name of its own, so that a user's evaluate.py doesn't become this project's
    module_spec = importlib.util.spec_from_file_location(f"loaded_{path.stem}", path)
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_spec.name] = module  # dataclasses look their module up by name
    try:
        module_spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise UserError(f"{spec!r}: importing {file} failed with {one_line(error)}") from error
    if not callable(getattr(module, name, None)):
        raise UserError(f"{spec!r}: {file} has no function {name}")
    return getattr(module, name)


def call_reward(
    function: Callable,
    prompts: list[str],
    completions: list[str],
    ended: list[bool] | None = None,
    name: str = "the reward function",
) -> list[float]:
    """Call the function on some samples, and check what comes back: one finite number for each completion. UserError
    names the sample on which it fails, be it by an exception, by sys.exit, or by what it returns.

    The function gets `prompts`, `completions` and `ended` (which completions ended by themselves, None: all; the others
    were cut) by these names where it has parameters of these names, or **kwargs; parameters of other names get the
    prompts and the completions in this order. It gets copies, so that it may change its lists."""
    ended = [True] * len(completions) if ended is None else ended
    samples = list(zip(prompts, completions, ended, strict=True))
    try:
        returned = call_by_name(function, samples)
        row = hasattr(returned, "__iter__") and not isinstance(returned, (str, bytes, dict, set))
        returned = list(returned) if row else returned
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        traceback.print_exc()
        failing = smallest_failing(function, samples)
        raise UserError(f"{name} failed {failing} ({one_line(error)})") from None
    n = len(samples)
    check(not inspect.iscoroutine(returned), f"{name} is async; name a function that waits for it (asyncio.run)")
    check(isinstance(returned, list), f"{name} must return one number for each completion, not {shown(returned)}")
    check(len(returned) == n, f"{name} returned {len(returned)} rewards for {n} completions")
    rewards = []
    for sample, reward in zip(samples, returned, strict=True):
        try:
            rewards.append(float(reward))
        except (TypeError, ValueError, OverflowError):
            rewards.append(math.nan)
        if not math.isfinite(rewards[-1]):
            raise UserError(f"{name} returned {shown(reward)}, which is no finite number, {described(sample)}")
    return rewards


def call_by_name(function: Callable, samples: list[tuple[str, str, bool]]):
    """function(prompts, completions, ended), whatever it calls them and wherever it has them. UserError if none of its
    parameters would get the completions."""
    prompts, completions, ended = map(list, zip(*samples, strict=True)) if samples else ([], [], [])
    given = {"prompts": prompts, "completions": completions, "ended": ended}
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # one that is not written in Python
        return function(prompts, completions)
    kinds = {p.kind for p in parameters}
    plain = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    names = [p.name if p.name in given else p.name + "s" for p in plain]  # "prompt" asks for the prompts, too
    order = [name for name in ("prompts", "completions") if name not in names]
    if given.keys().isdisjoint(names) and inspect.Parameter.VAR_POSITIONAL in kinds:
        return function(prompts, completions)  # most likely somebody else's function inside
    by_place, by_name, passed = [], {}, []
    for p, name in zip(plain, names, strict=True):
        if name not in given:  # the next in order, unless the completions have gone before or it needs none
            if not order or "completions" in passed or p.default is not p.empty or p.kind is p.KEYWORD_ONLY:
                continue
            name = order.pop(0)
        passed.append(name)
        if p.kind is p.POSITIONAL_ONLY:
            by_place.append(given[name])
        else:
            by_name[p.name] = given[name]
    if inspect.Parameter.VAR_KEYWORD in kinds:
        by_name |= {name: value for name, value in given.items() if name not in passed}
    elif "completions" not in passed:
        raise UserError("a reward function needs a parameter for the completions: def f(prompts, completions)")
    return function(*by_place, **by_name)


def described(sample: tuple[str, str, bool]) -> str:
    """A sample for an error: its texts, cut."""
    return f"for the completion {shown(sample[1])} of the prompt {shown(sample[0])}"


def shown(value) -> str:
    """What it is, in one line, cut."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else text[:77] + "..."


def smallest_failing(function: Callable, samples: list[tuple[str, str, bool]]) -> str:
    """Which sample is it that a function fails on? Of the samples the first half, or else the second, as long as one
    of them fails by itself: of 192 samples at most 16 calls."""
    while len(samples) > 1:
        half = len(samples) // 2
        failing = next((part for part in (samples[:half], samples[half:]) if fails(function, part)), None)
        if failing is None:
            return f"on {len(samples)} samples, and on neither half of them"
        samples = failing
    return described(samples[0])


def fails(function: Callable, samples: list[tuple[str, str, bool]]) -> bool:
    try:
        list(call_by_name(function, samples))
    except (Exception, SystemExit):
        return True
    return False


def check_size(rewards: list[float], weight: float, name: str) -> None:
    """Refuse rewards that are inf in float32, or whose squares (losses, variances) would be."""
    largest = max(rewards, key=abs)
    fits = abs(largest) < 1e38 and abs(weight * largest) < 1e15
    advice = "divide its rewards, or lower its --reward_weights, so that they are of the order of 1"
    check(fits, f"{name} returned a reward of {largest:g}, too large to train on: {advice}")


@torch.no_grad()
def score_rollout(model: ScalarModel, rollout: Rollout, rows: int = 64) -> Tensor:
    """The reward model's score of each completion, (B,), `rows` of similar length at a time, cut to the longest."""
    scores = torch.zeros(len(rollout.lens), device=rollout.lens.device)
    for part in rollout.lens.argsort().split(rows):
        lens = rollout.lens[part]
        scores[part] = model.score(rollout.tokens[part, : int(lens.max())], lens)
    return scores


def load_reward(
    specs: list[str],
    policy: Checkpoint,
    task: str,
    device: torch.device,
    weights: list[float] | None = None,
    combine: str = "sum",
    dtype: str = "float32",
) -> tuple[Callable[[Rollout, list[str], list[str]], Tensor], list[ScalarModel]]:
    """Checkpoints of reward models and file.py:function, one or several -> (score, the reward models among them).

    score(rollout, prompts, completions) -> (B,): the weighted "sum" of all, their "mean" (divided by the sum of the
    weights), their "min", or "mean-std", the mean less the standard deviation: these two doubt what an ensemble doesn't
    agree on (Coste et al. 2023, arXiv:2310.02743). Weights are 1 if not given. A reward model reads the very ids that
    the policy wrote; a function reads text. task: what the prompts belong to ("tiny": the embedded task)."""
    weights = weights or [1.0] * len(specs)
    check(bool(specs), "--reward needs a reward model's checkpoint or file.py:function")
    check(len(weights) == len(specs), f"--reward_weights has {len(weights)} values for {len(specs)} rewards")
    check(combine != "mean" or sum(weights) > 0, "--reward_combine mean needs --reward_weights with a sum above 0")
    check(combine != "mean-std" or len(set(weights)) == 1, "--reward_combine mean-std takes no --reward_weights")
    loaded: list[tuple[str, Callable | ScalarModel]] = []
    for spec in specs:
        if ":" in spec and ".py" in spec:
            loaded.append((spec, load_function(spec)))
            continue
        scorer = load_scorer(spec, policy, device)
        check_task(scorer, spec, task)
        loaded.append((spec, scorer.model))

    def score(rollout: Rollout, prompts: list[str], completions: list[str]) -> Tensor:
        rewards = []  # (B,) of each part
        for (spec, part), weight in zip(loaded, weights, strict=True):
            if isinstance(part, ScalarModel):
                with autocast(device, dtype):
                    rewards.append(weight * score_rollout(part, rollout))
            else:
                found = call_reward(part, prompts, completions, rollout.ended.tolist(), spec)
                check_size(found, weight, spec)
                rewards.append(weight * torch.tensor(found, device=device))
        parts = torch.stack(rewards)  # (parts, B)
        if combine == "min":
            return parts.amin(0)
        if combine == "mean-std":
            return parts.mean(0) - parts.std(0, correction=0)
        return parts.sum(0) / (sum(weights) if combine == "mean" else 1.0)

    return score, [part for _, part in loaded if isinstance(part, ScalarModel)]


def gold_function(spec: str, task: str) -> Callable | None:
    """The true reward, where it is known: (prompts, completions[, ended]) -> list of floats, checked by call_reward.
    spec "auto": the embedded task's on its prompts, None on others."""
    if spec == "auto":
        spec = "data/tiny.py:gold_reward" if task == "tiny" else ""
    return partial(call_reward, load_function(spec), name="the gold reward") if spec else None
