"""lib/setup.py: what the stages start from."""

from __future__ import annotations

import random

from helpers import checkpoint, make_gpt, write_lines

from data import tiny
from dpo import Config
from lib.setup import load_policy, load_preferences


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
