"""sample.py: a chat, its options, several checkpoints side by side, and what stands behind the answers."""

from __future__ import annotations

import random
import re

import pytest
import torch
from helpers import EOS, TOY, checkpoint, make_gpt, make_scalar, slow_generate
from stages import on_task, reward_file, steady_policy

import sample
from data import tiny
from lib.cli import UserError


def answers(capsys, name: str = "policy") -> list[str]:
    """What a checkpoint has said since the last look."""
    return re.findall(rf"^ *{name} > (.*)$", capsys.readouterr().out, re.M)


def chat(folder, model, **changes) -> None:
    settings = {"policy": checkpoint(folder / "policy", model), "max_new_tokens": 8, "device": "cpu"}
    sample.run(sample.Config(**settings | changes))


def test_a_chat_has_new_luck_at_every_turn_and_repeats_with_its_seed(tmp_path, capsys, person):
    """The same answer to the same question each time, or another chat with the same seed. An empty line ends it, and
    so does ctrl-D."""
    steady, said = steady_policy([0.0] * 22 + [-30.0]), []
    for seed, lines in ((1, ("abc", "abc", " abc ", "", "abc")), (1, ("abc",) * 3), (5, ("abc",) * 3)):
        person(*lines)
        chat(tmp_path, steady, seed=seed, samples=2)
        said.append([text.removesuffix("   [cut]") for text in answers(capsys)])
    assert all(len(turns) == 6 and {len(text) for text in turns} == {8} for turns in said)
    assert said[0] == said[1] and len(set(said[0] + said[2])) == 12


@pytest.mark.parametrize(
    "option", [{"temperature": 0.0}, {"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-4}], ids=str
)
def test_options_hold_at_every_turn(tmp_path, capsys, person, option):
    """--temperature, --top_k or --top_p that are ignored: each of these settings leaves the likeliest token alone."""
    policy = make_gpt(10, block_size=24)
    person("abc", "kl")
    chat(tmp_path, policy, samples=3, **option)
    expected = []
    for prompt in ("abc", "kl"):
        rollout = slow_generate(policy, [TOY.encode(prompt)], 8, eos_id=EOS, temperature=0)
        expected += [TOY.decode(rollout.completions()[0]) + ("" if rollout.ended[0] else "   [cut]")] * 3
    assert answers(capsys) == expected
    chat(tmp_path, policy, prompt="abc", samples=40)
    assert len(set(answers(capsys))) > 10  # without any of them


def test_some_of_the_likeliest_tokens(tmp_path, capsys):
    """--top_k and --top_p as other numbers than 1."""
    steady = steady_policy([2.0, 1.0, 0.9, 0.8, *[-1.0] * 18, -30.0])
    for option, letters in (({"top_k": 3}, "abc"), ({"top_p": 0.4}, "ab"), ({"top_k": 1000}, "abcdefghijklmnopqrstuv")):
        chat(tmp_path, steady, prompt="abc", samples=200, **option)
        assert set("".join(answers(capsys)).replace("   [cut]", "")) == set(letters)


def test_each_checkpoint_answers_for_itself(tmp_path, capsys):
    """Of several side by side, in the order in which they are named and under their names: what each of them says at
    temperature 0. --policy is not asked then."""
    models = {name: make_gpt(seed, block_size=24) for seed, name in ((10, "sft"), (11, "longer"), (12, "ppo"))}
    paths = [checkpoint(tmp_path / name, model) for name, model in models.items()]
    settings = {"compare": paths, "policy": "nowhere", "prompt": "abc", "temperature": 0.0, "max_new_tokens": 8}
    sample.run(sample.Config(**settings, device="cpu"))
    lines = []
    for name, model in models.items():
        rollout = slow_generate(model, [[0, 1, 2]], 8, eos_id=EOS, temperature=0)
        lines.append(f"{name:>6} > {TOY.decode(rollout.completions()[0])}" + ("" if rollout.ended[0] else "   [cut]"))
    assert capsys.readouterr().out.splitlines()[-3:] == lines and len({line[9:] for line in lines}) == 3


def test_the_true_reward_stands_behind_what_it_knows(tmp_path, capsys):
    """A true reward of one's own is told which texts ended; the embedded task's is there without being asked for, but
    not for a prompt that isn't the task's: that is said, and no traceback."""
    policy = make_gpt(10, block_size=24)
    policy.ln_f.bias.data += 0.5 * policy.wte.weight.data[EOS]  # towards EOS
    chat(tmp_path, policy, prompt="abc", samples=12, gold=f"{reward_file(tmp_path)}:variety")
    found = [re.fullmatch(r"(\w*)   \[gold ([+\d.]+)(, cut)?\]", text).groups() for text in answers(capsys)]
    assert len(found) == 12 and 0 < sum(cut is None for _, _, cut in found) < 12
    assert all(float(gold) == len(set(text)) + 0.5 * (cut is None) for text, gold, cut in found)
    start = on_task("dpo", tmp_path, own=False, vocabulary="tiny")["policy"]
    question = tiny.distinct_prompts(1, random.Random(3), "test")[0]
    for prompt, shown in ((question, r"gold [+-]\d\.\d\d"), ("Tell me a joke.", "gold unknown for this prompt")):
        sample.run(sample.Config(policy=start, prompt=prompt, max_new_tokens=4, device="cpu"))
        (text,) = answers(capsys)
        assert re.search(rf"   \[{shown}(, cut)?\]$", text)
    sample.run(sample.Config(policy=start, prompt=question, max_new_tokens=4, gold="", device="cpu"))
    assert "gold" not in answers(capsys)[0]


def test_a_reward_model_must_read_what_every_policy_writes(tmp_path):
    """Of several that are put side by side, checked for the first one alone."""
    policies = [checkpoint(tmp_path / name, make_gpt(22, block_size=n)) for name, n in (("a", 24), ("b", 30))]
    settings = {"reward": checkpoint(tmp_path / "rm", make_scalar(16, block_size=24)), "prompt": "abc"}
    settings |= {"max_new_tokens": 4, "device": "cpu"}
    sample.run(sample.Config(**settings, compare=policies[:1]))
    with pytest.raises(UserError, match="reads texts of 24 tokens"):
        sample.run(sample.Config(**settings, compare=policies))


def test_sample_shows_the_reward_model_s_score(tmp_path, capsys, float64):
    """The score beside a text is that of this text alone, EOS included where it ended, and a cut one is marked."""
    scorer = make_scalar(16, block_size=24)
    policy = make_gpt(10, block_size=24)
    policy.ln_f.bias.data += 0.5 * policy.wte.weight.data[EOS]  # towards EOS
    settings = {"policy": checkpoint(tmp_path / "policy", policy), "prompt": "abc", "samples": 12}
    settings |= {"reward": checkpoint(tmp_path / "good", scorer), "max_new_tokens": 5, "device": "cpu"}
    sample.run(sample.Config(**settings))
    found = re.findall(r"^policy > (\w*)   \[reward ([+-][\d.]+)(, cut)?\]$", capsys.readouterr().out, re.M)
    assert len(found) == 12 and 0 < sum(cut == "" for _, _, cut in found) < 12
    for text, score, cut in found:
        ids = torch.tensor([TOY.encode("abc" + text) + ([] if cut else [EOS])])
        with torch.no_grad():
            assert float(score) == pytest.approx(scorer(ids)[0, -1].item(), abs=0.00501)
