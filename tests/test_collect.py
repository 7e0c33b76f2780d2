"""Collecting preferences: who is ranked where, which texts were cut, going on after a stop. How people are asked:
test_annotate.py."""

from __future__ import annotations

import json
import random
import re
from dataclasses import dataclass, replace

import pytest
import torch
from helpers import (
    EOS,
    TOY,
    beside_a_demo,
    checkpoint,
    make_gpt,
    random_prompts,
    slow_generate,
    spread,
    write_lines,
)

from stages import asked, reward_file, steady_policy, watching

import collect
from lib.cli import UserError
from lib.checkpoint import load_model, save_model
from data import tiny
from data.batches import load_rankings
from data.files import read_jsonl, read_prompts, read_rankings, write_jsonl
from data.tokenizer import load_tokenizer

TINY = load_tokenizer("tiny")


def test_equal_texts_tie():
    """A text can't be better than itself (trap 36); the others keep distinct ranks."""
    for seed in range(20):
        ranks = collect.rank_simulated(["a", "b", "a", "c", "a"], [0.0, 1.0, 0.0, 0.5, 0.0], 1.0, random.Random(seed))
        assert ranks[0] == ranks[2] == ranks[4] and len(set(ranks)) == 3 and set(ranks) == {0, 1, 2}


def test_low_noise_annotators_rank_by_the_truth():
    """Best first, and the rank belongs to the completion it stands beside."""
    for seed in range(20):
        ranks = collect.rank_simulated(["x", "y", "z", "w"], [0.1, 2.0, -1.0, 1.0], 1e-3, random.Random(seed))
        assert ranks == [2, 0, 3, 1]


@dataclass
class Made:
    by: str = "a test"


@pytest.fixture(scope="module")
def random_policy(tmp_path_factory):
    """Two checkpoints of small random GPTs with the tiny vocabulary that stop now and then, and a prompts file."""
    folder = tmp_path_factory.mktemp("policy")
    for seed in (1, 2):
        policy = make_gpt(seed, vocab=TINY.n_vocab, block_size=64, n_embd=16)
        with torch.no_grad():  # towards EOS
            policy.ln_f.bias += 4 * policy.wte.weight[TINY.eos_id]
        save_model(folder / f"p{seed}", policy, "tiny", "test", Made())
    write_jsonl(folder / "prompts.jsonl", [{"prompt": p} for p in tiny.distinct_prompts(11, random.Random(1), "train")])
    return folder


def collecting(folder, out, **changes) -> collect.Config:
    settings = {"policies": [str(folder / "p1")], "prompts": str(folder / "prompts.jsonl"), "out": str(out)}
    settings |= {"n_prompts": 0, "batch_size": 4, "max_new_tokens": 6, "completions": 3, "device": "cpu"}
    return collect.Config(**{**settings, **changes})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_samples_are_in_the_dtype(random_policy, tmp_path, dtype):
    with watching() as watch:
        collect.run(collecting(random_policy, tmp_path / "r.jsonl", dtype=dtype))
    assert watch.products == {True: set(), False: {getattr(torch, dtype)}}


def test_collected_rankings(random_policy, tmp_path, capsys):
    """One line a prompt, in order; K completions each, sampled not copied; the truth that the simulated annotators knew
    stands in the order of the texts it belongs to (here a made-up truth that differs for every text)."""
    truth = "[len(set(c)) + len(c) / 100 for c in completions]"
    (tmp_path / "truth.py").write_text(
        f"def f(prompts, completions):\n    return {truth}\n"
        f"def g(prompts, completions, ended):\n    return [x + 50 * e for x, e in zip({truth}, ended)]\n",
        encoding="utf-8",
    )
    policies = [str(random_policy / "p1"), str(random_policy / "p2")]
    gold = f"{tmp_path / 'truth.py'}:f"
    out = tmp_path / "r.jsonl"
    settings = {"policies": policies, "temperatures": [0.7, 1.0], "completions": 5, "annotator_temperature": 2.0}
    collect.run(collecting(random_policy, out, **settings, gold=gold))
    agreement = tiny.annotators_agreement(str(out))
    assert 0.5 < agreement < 1 and f"annotators agree on {agreement:.0%} of the pairs" in capsys.readouterr().out
    rankings = read_rankings(out)
    assert [r.prompt for r in rankings] == read_prompts(random_policy / "prompts.jsonl")
    assert all(len(r.completions) == 5 for r in rankings)
    words = [c for r in rankings for c in r.completions if len(c) > 3]  # silence may well come twice
    assert len(set(words)) == len(words) > 30
    mixed = 0
    for (_, row), ranking in zip(read_jsonl(out), rankings, strict=True):
        assert row["gold"] == pytest.approx([len(set(c)) + len(c) / 100 for c in ranking.completions], abs=1e-4)
        mixed += row["gold"] != sorted(row["gold"], reverse=True)
    assert mixed > 3  # noisy annotators: not always the order of the truth
    told = collecting(random_policy, tmp_path / "told.jsonl", policies=policies, gold=f"{tmp_path / 'truth.py'}:g")
    collect.run(told)
    ended = []
    for _, row in read_jsonl(told.out):  # a truth that asks which texts ended by themselves
        assert row["ended"] == [g >= 50 for g in row["gold"]]
        ended += row["ended"]
    assert 0 < sum(ended) < len(ended), "some must end and some be cut"
    collect.run(collecting(random_policy, tmp_path / "sharp.jsonl", gold=gold, annotator_temperature=1e-3))
    for _, row in read_jsonl(tmp_path / "sharp.jsonl"):  # without noise: best first
        assert row["gold"] == sorted(row["gold"], reverse=True)


def greedy_answers(paths: list[str], prompt: str, max_new_tokens: int) -> list[tuple[str, bool]]:
    """Of each policy, worked out for this prompt alone: text, and whether EOS ended it."""
    answers = []
    for path in paths:
        model = load_model(path, torch.device("cpu")).model
        ids = TINY.encode_prompt(prompt)
        start = len(ids)
        while len(ids) < start + max_new_tokens and TINY.eos_id not in ids[start:]:
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
        answers.append((TINY.decode([i for i in ids[start:] if i != TINY.eos_id]), TINY.eos_id in ids[start:]))
    return answers


def test_each_completion_belongs_to_its_prompt(random_policy, tmp_path, float64):
    """At a temperature of nearly 0 each policy's completion is its greedy one,
    worked out here for each prompt alone; "ended" stands beside the text that it is about."""
    policies = [str(random_policy / "p1"), str(random_policy / "p2")]
    collect.run(collecting(random_policy, tmp_path / "r.jsonl", policies=policies, temperatures=[1e-5]))
    texts, all_ended = set(), []
    for ranking in read_rankings(tmp_path / "r.jsonl"):
        greedy = greedy_answers(policies, ranking.prompt, 6)
        expected = [greedy[0], greedy[1], greedy[0]]  # completion k comes from policy k mod 2
        assert sorted(zip(ranking.completions, ranking.ended, strict=True)) == sorted(expected)
        texts.update(greedy)
        all_ended += ranking.ended
    assert len(texts) > 10  # so a completion beside the wrong prompt would be seen
    assert 3 < sum(all_ended) < len(all_ended) - 3


def test_texts_cut_by_max_new_tokens_keep_that(random_policy, tmp_path):
    """Without it every cut text is read as one that stopped there: with 3 new tokens, 32 of 32 got an EOS. From the
    rollout, as the true reward is told of it, to the ids that the stages learn from."""
    out, gold = tmp_path / "r.jsonl", f"{reward_file(tmp_path)}:variety"
    collect.run(collecting(random_policy, out, max_new_tokens=3, completions=4, gold=gold))
    rankings, sampled = read_rankings(out), asked(tmp_path, "variety")
    ended = [end for call in sampled for end in call.ended]
    assert 0 < sum(ended) < len(ended), "some must end and some be cut"
    assert all(isinstance(row["ended"], list) and len(row["ended"]) == 4 for _, row in read_jsonl(out))
    for ranking, call in zip(rankings, sampled, strict=True):
        drawn = zip(call.completions, call.ended, strict=True)
        assert sorted(zip(ranking.completions, ranking.ended, strict=True)) == sorted(drawn)
    learned = [e.completion for item in load_rankings(str(out), TINY, 64) for e in item.examples]
    texts = {(TINY.decode(ids[:-1]), True) if ids[-1] == TINY.eos_id else (TINY.decode(ids), False) for ids in learned}
    assert texts == {(t, e) for r in rankings for t, e in zip(r.completions, r.ended, strict=True)}


def toy_policies(folder, n_prompts: int) -> dict:
    """Two policies whose greedy answers differ, and prompts; as settings of a collection that nobody has to judge."""
    policies = []
    for seed in (3, 4):
        policy = make_gpt(seed, block_size=24, n_layer=1)
        spread(policy, seed, scale=0.5)
        policies.append(checkpoint(folder / f"p{seed}", policy))
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(0, EOS, (n_prompts, 4), generator=generator).tolist()
    (folder / "none.py").write_text("def f(prompts, completions):\n    return [0.0] * len(prompts)\n", encoding="utf-8")
    return {
        "policies": policies,
        "prompts": write_lines(folder / "p.jsonl", [{"prompt": TOY.decode(p)} for p in prompts]),
        "gold": f"{folder / 'none.py'}:f",
        **{"temperatures": [1e-5], "completions": 2, "n_prompts": 0, "max_new_tokens": 4, "device": "cpu"},
    }


def first_policy_of(settings: dict, folder) -> dict[str, tuple[str, str]]:
    """{prompt: (the first policy's answer, the second's)}, where they differ; each by itself."""
    alone = []
    for number, path in enumerate(settings["policies"]):
        out = folder / f"alone{number}.jsonl"
        collect.run(collect.Config(**{**settings, "policies": [path], "out": str(out)}))
        alone.append({r.prompt: r.completions[0] for r in read_rankings(out)})
    return {p: (alone[0][p], alone[1][p]) for p in alone[0] if alone[0][p] != alone[1][p]}


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_the_prompts_that_are_used(tmp_path, batch_size):
    """--n_prompts counts from the first prompt that --skip leaves: a slice that ends at the N-th of the file has fewer,
    or none. A second collection behind the first asks what the first has left."""
    settings = toy_policies(tmp_path, 11) | {"batch_size": batch_size}
    prompts = read_prompts(settings["prompts"])
    for skip, n, used in ((0, 4, prompts[:4]), (3, 4, prompts[3:7]), (6, 0, prompts[6:]), (9, 5, prompts[9:])):
        out = tmp_path / f"{skip}.jsonl"
        written = collect.run(collect.Config(**settings | {"n_prompts": n}, skip=skip, out=str(out)))
        assert [r.prompt for r in read_rankings(out)] == used and written == {"written": len(used)}
    rows = [{"prompt": p} for p in (prompts[0], prompts[1], prompts[0], prompts[2])]  # one of them twice
    twice = {"prompts": write_lines(tmp_path / "twice.jsonl", rows), "out": str(tmp_path / "once.jsonl")}
    assert collect.run(collect.Config(**settings | twice)) == {"written": 3}
    assert [r.prompt for r in read_rankings(tmp_path / "once.jsonl")] == prompts[:3]
    for skip in (0, 4, 2):  # what stands there already is not asked again
        collect.run(collect.Config(**settings | {"n_prompts": 4}, skip=skip, out=str(tmp_path / "all.jsonl")))
    assert [r.prompt for r in read_rankings(tmp_path / "all.jsonl")] == prompts[:8]


def test_prompts_fit_the_policy_with_the_shortest_context(tmp_path):
    """Cut to another policy's block size they don't fit, or one policy is asked more than the other. Whichever is named
    first."""
    models = [make_gpt(3, block_size=24), make_gpt(4, block_size=12)]
    policies = [checkpoint(tmp_path / f"block{m.config.block_size}", m) for m in models]
    ids = random_prompts([3, 11, 17, 8, 7, 5], EOS, seed=2)
    settings = toy_policies(tmp_path, 1) | {"max_new_tokens": 5, "policies": policies}
    settings["prompts"] = write_lines(tmp_path / "long.jsonl", [{"prompt": TOY.decode(p)} for p in ids])
    for order in (1, -1):
        out = tmp_path / f"{order}.jsonl"
        collect.run(collect.Config(**settings | {"policies": policies[::order]}, out=str(out)))
        for prompt, ranking in zip(ids, read_rankings(out), strict=True):
            rollouts = [slow_generate(model, [prompt[-7:]], 5, eos_id=EOS, temperature=0) for model in models]
            said = [(TOY.decode(r.completions()[0]), bool(r.ended[0])) for r in rollouts]
            assert sorted(zip(ranking.completions, ranking.ended, strict=True)) == sorted(said)


def test_every_policy_and_temperature_has_its_turn(tmp_path):
    """Completion k comes from source k mod their number, of which each policy has one for every temperature. A source
    that is left out, or one that has all the places."""
    calm, wild = 1e-5, 1e5
    first, second = (steady_policy([float(i == n) for i in range(23)]) for n in (0, 1))
    policies = [checkpoint(tmp_path / name, model) for name, model in (("a", first), ("b", second))]
    settings = toy_policies(tmp_path, 6) | {"policies": policies, "temperatures": [calm, wild], "max_new_tokens": 8}
    for K, of_first, of_second in ((4, 1, 1), (5, 2, 1), (7, 2, 2)):
        out = tmp_path / f"{K}.jsonl"
        collect.run(collect.Config(**settings | {"completions": K}, out=str(out)))
        for ranking in read_rankings(out):
            counts = [ranking.completions.count(letter * 8) for letter in "ab"]
            assert (len(ranking.completions), *counts) == (K, of_first, of_second)
    few = settings | {"completions": 3, "out": str(tmp_path / "few.jsonl")}  # whose turn would never come
    with pytest.raises(UserError, match="--completions 3 is less than the 4 pairs of --policies and --temperatures"):
        collect.run(collect.Config(**few))
    assert not (tmp_path / "few.jsonl").exists()


def test_the_annotators_noise_is_new_for_every_chunk(tmp_path):
    """A stream that starts again with each chunk gives its k-th prompt the same noise every time: with one prompt a
    chunk, the same policy would win always. Here neither is better, so each wins about half of the prompts."""
    settings = toy_policies(tmp_path, 100)
    answers = first_policy_of(settings, tmp_path)
    assert len(answers) > 50
    collect.run(collect.Config(**settings, out=str(tmp_path / "r.jsonl"), batch_size=1))
    wins = [
        r.completions[0] == answers[r.prompt][0] for r in read_rankings(tmp_path / "r.jsonl") if r.prompt in answers
    ]
    assert abs(sum(wins) / len(wins) - 0.5) < 4 * 0.5 / len(wins) ** 0.5


def test_samples_have_a_stream_of_their_own_for_every_chunk(tmp_path):
    """The same random numbers for each chunk or policy: prompts of different chunks get the same completions in
    disguise. Two policies that are one and don't look at the prompt differ by their random numbers alone."""
    settings = toy_policies(tmp_path, 12) | {"gold": f"{reward_file(tmp_path)}:variety", "temperatures": [1.0]}
    policy = checkpoint(tmp_path / "steady", steady_policy([0.0] * 22 + [-9.0]))
    collect.run(collect.Config(**settings | {"policies": [policy] * 2}, out=str(tmp_path / "r.jsonl"), batch_size=3))
    written = [text for call in asked(tmp_path, "variety") for text in call.completions]
    assert len(written) == len(set(written)) == 12 * 2


def seen_first(settings: dict, folder, shown: dict[str, list[str]]) -> tuple[int, int]:
    """In how many cases the first policy's answer is shown first, and of how many prompts with different answers."""
    answers = first_policy_of(settings, folder)
    assert all(sorted(shown[p]) == sorted(pair) for p, pair in answers.items())
    return sum(shown[p][0] == pair[0] for p, pair in answers.items()), len(answers)


def test_the_place_on_the_screen_says_nothing_about_the_policy(tmp_path, person, capsys):
    """Always in the policies' order, an annotator who likes to type "1 2" would prefer the first policy."""
    settings = toy_policies(tmp_path, 100)
    person(*["1 2"] * 100)
    collect.run(collect.Config(**settings, out=str(tmp_path / "r.jsonl"), annotator="human", batch_size=8))
    texts = [t.removesuffix("   [cut]") for t in re.findall(r"^  \d: (.*)$", capsys.readouterr().out, re.M)]
    shown = dict(zip(read_prompts(settings["prompts"]), zip(texts[::2], texts[1::2], strict=True), strict=True))
    first, n = seen_first(settings, tmp_path, shown)
    assert abs(first / n - 0.5) < 4 * 0.5 / n**0.5


def test_where_simulated_annotators_look_first_says_nothing_about_the_policy(tmp_path):
    """Their samples are shuffled by the same stream."""
    settings = toy_policies(tmp_path, 100)
    gold = f"{reward_file(tmp_path)}:same"
    collect.run(collect.Config(**settings | {"gold": gold}, out=str(tmp_path / "r.jsonl"), batch_size=8))
    shown = {call.prompts[0]: call.completions for call in asked(tmp_path, "same")}
    first, n = seen_first(settings, tmp_path, shown)
    assert abs(first / n - 0.5) < 4 * 0.5 / n**0.5


def test_a_resumed_collection_equals_an_unbroken_one(random_policy, tmp_path):
    """Stopped anywhere, even within a line, and run again: the same file (need R24)."""
    whole = tmp_path / "whole.jsonl"
    collect.run(collecting(random_policy, whole))
    data = whole.read_bytes()
    ends = [m.end() for m in re.finditer(b"\n", data)]
    assert len(ends) == 11
    for i, cut in enumerate([0, ends[3], ends[5], ends[5] + 1, ends[6] + 30, len(data) - 1, len(data)]):
        part = tmp_path / f"part{i}.jsonl"
        part.write_bytes(data[:cut])
        collect.run(collecting(random_policy, part))
        assert part.read_bytes() == data, f"cut at byte {cut}"
    collect.run(collecting(random_policy, tmp_path / "seed2.jsonl", seed=2))
    assert (tmp_path / "seed2.jsonl").read_bytes() != data


def test_a_full_disk_is_one_line_and_costs_nothing(random_policy, tmp_path):
    """Here a limit on the size of files. With room again the same command goes on, from the line that was cut."""
    resource = pytest.importorskip("resource")  # not on Windows
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    collect.run(collecting(random_policy, whole))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (whole.stat().st_size // 2, hard))
    try:
        with pytest.raises(UserError, match=r"cut\.jsonl: can't be written"):
            collect.run(collecting(random_policy, cut))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert cut.read_bytes() == whole.read_bytes()[: whole.stat().st_size // 2]
    collect.run(collecting(random_policy, cut))
    assert cut.read_bytes() == whole.read_bytes()


def test_a_line_torn_within_a_character_is_taken_off(tmp_path):
    """A crash can cut a line anywhere, also between the bytes of one letter."""
    path = tmp_path / "r.jsonl"
    whole = json.dumps({"prompt": "é", "completions": ["a", "b"]}, ensure_ascii=False).encode() + b"\n"
    path.write_bytes(whole + '{"prompt": "é'.encode()[:-1])
    assert collect.already_ranked(path) == {"é"} and path.read_bytes() == whole
    path.write_bytes(b'{"pro')  # nothing whole
    assert collect.already_ranked(path) == set() and path.read_bytes() == b""
    assert collect.already_ranked(tmp_path / "none") == set()


def asking(folder, **changes) -> collect.Config:
    """Three completions of each of eleven prompts, in letters, for a person to rank."""
    settings = toy_policies(folder, 11) | {"temperatures": [1.0], "completions": 3, "batch_size": 4, "seed": 4}
    return collect.Config(**settings, out=str(folder / "r.jsonl"), annotator="human", **changes)


def test_human_collection_writes_as_it_goes(tmp_path, person, capsys):
    """Ranked, skipped, ranked, quit: two lines stand in the file, best first, without any simulated truth; run again,
    the same samples are shown, the skipped one not among them."""
    config = asking(tmp_path, annotator_name="anna")
    person("3 2 1", "s", "1=2 3", "q")
    assert collect.run(config) == {"written": 2}
    said = capsys.readouterr().out
    assert "wrote 2 rankings" in said and "2 ranked, 1 skipped" in said and "item 4 of 11" in said
    texts = re.findall(r"^  (\d): (.*)$", said, re.M)
    assert [n for n, _ in texts] == list("123" * 4)
    texts = [[t for _, t in texts[i : i + 3]] for i in range(0, 12, 3)]
    assert all(len(set(three)) == 3 for three in texts)
    rows = [row for _, row in read_jsonl(config.out)]
    prompts = read_prompts(config.prompts)
    assert [row["prompt"] for row in rows] == [prompts[0], prompts[2]]
    assert all(list(row) == ["prompt", "completions", "ended", "shown", "annotator", "answer"] for row in rows)
    assert rows[0]["completions"] == [t.removesuffix("   [cut]") for t in texts[0][::-1]]
    assert rows[0]["ended"] == [not t.endswith("   [cut]") for t in texts[0][::-1]]
    assert [len(group) for group in rows[1]["completions"][:-1]] == [2]  # the tie is a nested list
    person("1 2 3")
    assert collect.run(config) == {"written": 1}
    said = capsys.readouterr().out
    assert "(2 stood there already)" in said and "item 4 of 11" in said
    assert [t for _, t in re.findall(r"^  (\d): (.*)$", said, re.M)][:3] == texts[3]
    assert [row["prompt"] for _, row in read_jsonl(config.out)] == [prompts[0], prompts[2], prompts[3]]


@pytest.mark.parametrize("annotator", ["human", "web"])
def test_people_are_asked_as_the_flags_say(tmp_path, monkeypatch, annotator):
    """--repeat, --port or --annotator_name that stop at the door: no self-agreement, another port than was asked for,
    two people in one file."""
    seen = {}

    def ask(session, items, port=None):
        seen.update(repeat=session.repeat, name=session.annotator, port=port, path=str(session.path))

    monkeypatch.setattr(collect, {"human": "in_terminal", "web": "in_browser"}[annotator], ask)
    config = asking(tmp_path, annotator_name="anna", repeat=0.3, port=4321)
    collect.run(replace(config, annotator=annotator))
    port = 4321 if annotator == "web" else None
    assert seen == {"repeat": 0.3, "name": "anna", "port": port, "path": config.out}


def test_finished_chunks_are_not_sampled_again(tmp_path, person):
    """Also where some of their prompts were skipped."""
    config = asking(tmp_path)
    person("1 2 3", "s", "1 2 3", "s", "q")
    collect.run(config)
    person("q")
    with watching() as watch:
        collect.run(config)
    read = {text[:4] for p in watch.passes if p.tokens.size(1) > 1 for text in p.texts()}
    assert read == set(read_prompts(config.prompts)[4:8])  # the second chunk


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"completions": 1}, "--completions"),
        ({"policies": []}, "--policies"),
        ({"temperatures": [1.0, 0.0]}, "--temperatures"),
        ({"temperatures": [1.0, float("inf")]}, "--temperatures"),
        ({"annotator_temperature": 0.0}, "--annotator_temperature"),
        ({"annotator_temperature": float("nan")}, "--annotator_temperature"),
        ({"max_new_tokens": 64}, "--max_new_tokens"),
        ({"skip": 99}, "--skip"),
        ({"gold": ""}, "--gold"),
        ({"repeat": 1.5}, "--repeat"),
        ({"port": 80}, "--port"),
        ({"annotator_name": "a/b"}, "--annotator_name"),
        ({"prompts": "nowhere.jsonl"}, "data.tiny"),
        ({"policies": ["nowhere"]}, "sft.py"),
    ],
)
def test_collection_refuses_senseless_settings(random_policy, tmp_path, changes, says):
    """A message that names the flag, or the script that makes the missing file, and no output file begun."""
    with pytest.raises(UserError, match=re.escape(says)):
        collect.run(collecting(random_policy, tmp_path / "r.jsonl", **changes))
    assert not (tmp_path / "r.jsonl").exists()


def test_an_output_that_can_not_be_a_file_is_reported(random_policy, tmp_path):
    """A folder in its place, or a file where its folder should be: one line, before anything is sampled."""
    (tmp_path / "file").write_text("", encoding="utf-8")
    for out in (tmp_path, tmp_path / "file" / "r.jsonl"):
        with pytest.raises(UserError, match="--out"):
            collect.run(collecting(random_policy, out))


def test_seeds_beyond_64_bits_are_seeds(random_policy, tmp_path):
    """torch refuses them with a traceback; they must count, down to the last bit."""
    written = []
    for number, seed in enumerate((2**64, 2**64 + 1, 2**64)):
        out = tmp_path / f"{number}.jsonl"
        collect.run(collecting(random_policy, out, seed=seed, n_prompts=3))
        written.append(out.read_bytes())
    assert written[0] == written[2] != written[1]


def test_rankings_lie_beside_their_prompts(tmp_path, monkeypatch, capsys):
    """With a fixed default, rankings of one's own prompts were appended to the demo's; and no file of the demo is read
    for them."""
    own, opened = beside_a_demo(tmp_path, monkeypatch)
    settings = toy_policies(own, 2)
    for name, rankings in (
        ("prompts.jsonl", "rankings.jsonl"),
        ("prompts_test.jsonl", "rankings_test.jsonl"),
        ("mine.jsonl", "mine_rankings.jsonl"),
    ):
        prompts = write_lines(own / name, [{"prompt": "abc"}, {"prompt": "bcd"}])
        collect.run(collect.Config(**{**settings, "prompts": prompts}))
        assert [r.prompt for r in read_rankings(own / rankings)] == ["abc", "bcd"]
        said = capsys.readouterr().out
        assert prompts in said and str(own / rankings) in said and settings["policies"][0] in said
    assert opened == []
    named = collect.Config(prompts=str(own / "prompts_test.jsonl"), annotator_name="anna")
    assert collect.rankings_file(named) == own / "rankings_test_anna.jsonl"  # everybody a file of one's own


def test_own_prompts_have_no_truth_unless_it_is_given(random_policy, tmp_path):
    """By the tiny vocabulary own prompts got the embedded task's truth, and an error that named no flag."""
    own = write_lines(tmp_path / "prompts.jsonl", [{"prompt": "Tell me a joke."}])
    with pytest.raises(UserError, match="--gold"):
        collect.run(collecting(random_policy, tmp_path / "r.jsonl", prompts=own))
    assert not (tmp_path / "r.jsonl").exists()


def test_own_prompts_for_the_demo_s_policy_are_noted(random_policy, tmp_path, capsys, person):
    """Rarely meant: said, and done."""
    save_model(tmp_path / "p", load_model(random_policy / "p1", torch.device("cpu")).model, "tiny", "t", Made(), "tiny")
    own = write_lines(tmp_path / "own.jsonl", [{"prompt": "Tell me a joke."}])
    changes = {"policies": [str(tmp_path / "p")], "annotator": "human", "n_prompts": 1}
    for prompts, noted in ((own, True), (str(random_policy / "prompts.jsonl"), False)):
        person("1 2 3")
        collect.run(collecting(random_policy, tmp_path / "r.jsonl", prompts=prompts, **changes))
        assert ("NOTE" in capsys.readouterr().out) == noted
