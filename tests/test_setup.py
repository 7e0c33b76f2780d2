"""lib/setup.py: what the stages start from."""

from __future__ import annotations

import math
import random

import torch
from helpers import TOY, checkpoint, make_gpt, make_scalar, write_lines
from stages import settings

import ppo
from data import tiny
from dpo import Config
from lib.setup import load_policy, load_preferences, set_up


def test_preferences_come_with_their_held_out_twin(tmp_path):
    """mine.jsonl is judged by mine_held_out.jsonl beside it, and belongs to the task whose prompts it holds."""
    policy = checkpoint(tmp_path / "policy", make_gpt())
    pair = {"chosen": "a", "rejected": "b"}
    mine = write_lines(tmp_path / "mine.jsonl", [{"prompt": "p", **pair}])
    write_lines(tmp_path / "rankings_held_out.jsonl", [{"prompt": "not these", **pair}])

    def load(**flags):
        config = Config(policy=policy, data=mine, device="cpu", **flags)
        return load_preferences(config, load_policy(config))

    found = load()
    assert (len(found.items), found.held_out, found.task) == (1, [], "")
    twin = write_lines(tmp_path / "mine_held_out.jsonl", [{"prompt": "q", **pair}] * 2)
    assert [item.examples[0].prompt for item in load().held_out] == [[16], [16]]  # q is letter 16
    tiny_prompt = tiny.sample_prompt(random.Random(1), "train")
    write_lines(tmp_path / "mine.jsonl", [{"prompt": tiny_prompt, **pair}])
    found = load(held_out_data="")
    assert (found.held_out, found.task, found.bayes_accuracy, found.contrasts) == ([], "tiny", None, {})
    assert len(load(held_out_data=twin).held_out) == 2
    noisy = {"prompt": "q", "completions": ["a", "b"], "gold": [1.0, 0.0], "annotator_temperature": 0.5}
    write_lines(tmp_path / "mine_held_out.jsonl", [noisy])
    assert load().bayes_accuracy == 1 / (1 + math.exp(-1 / 0.5))


def test_a_judge_is_judged_on_held_out_prompts(tmp_path):
    """Contrasts of the prompts that the reward model has learned from: it knows their answers by heart."""
    policy = checkpoint(tmp_path / "policy", make_gpt(block_size=300))
    learned, asked = (tiny.distinct_prompts(6, random.Random(1), split) for split in ("train", "dev"))
    files = [
        write_lines(tmp_path / f"rankings{suffix}.jsonl", [{"prompt": p, "chosen": "a", "rejected": "b"} for p in some])
        for suffix, some in (("", learned), ("_held_out", asked))
    ]
    config = Config(policy=policy, data=files[0], device="cpu")
    found = load_preferences(config, load_policy(config))
    used = {tuple(item.examples[0].prompt) for items in found.contrasts.values() for item in items}
    assert used == {tuple(TOY.encode(p)) for p in asked}
    assert {tuple(item.examples[0].prompt) for item in found.items} == {tuple(TOY.encode(p)) for p in learned}


def test_reward_models_share_the_frozen_blocks(tmp_path):
    """With --train_layers a reward model from the policy's start would be in memory a second time, frozen blocks and
    all; one of another start keeps its own, and its scores."""
    policy = make_gpt(3, n_layer=3, block_size=24)
    scorers = [make_scalar(seed, n_layer=3, block_size=24) for seed in (3, 4)]
    rewards = [checkpoint(tmp_path / f"scorer{n}", scorer) for n, scorer in enumerate(scorers)]
    start = set_up(ppo.Config(**settings("ppo", tmp_path, policy, reward=rewards, train_layers=1)))
    frozen = {p.data_ptr() for p in start.policy.parameters() if not p.requires_grad}
    shared = [{p.data_ptr() for p in model.parameters()} & frozen for model in start.reward_models]
    assert shared == [frozen, set()]
    for model, scorer in zip(start.reward_models, scorers, strict=True):
        for (name, p), own in zip(model.named_parameters(), scorer.parameters(), strict=True):
            assert torch.equal(p, own), name
