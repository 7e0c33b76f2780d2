"""study/report.py: the page shows the run's own figures, leaves out what isn't there, and runs no text."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from helpers import EOS, ROOT, TOY, checkpoint, completion_logprobs, gae_by_definition, make_gpt, make_scalar
from helpers import slow_generate, write_lines

import lib.checkpoint
import lib.run
import lib.train
import dpo
import evaluate
import ppo
import sft
from data import tiny
from lib.cli import UserError
from study import metrics, report

HOSTILE = "</script><script>alert(1)</script><!-- <b>&amp;\u2028 {{data}}"
PROMPTS = [{"prompt": p} for p in ("ab", "cwd", "fgh", "klmno")]


def write_stage(folder: Path, config, rows: list[dict], results: dict) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    lib.run.write_json(dataclasses.asdict(config), folder / "config.json")
    write_lines(folder / "metrics.jsonl", rows)
    lib.run.write_json(results, folder / "results.json")


def toy_run(folder: Path, **changed) -> ppo.Config:
    """A PPO run as ppo.py leaves it, of random networks in float64: what is asked for may be changed."""
    start, reward, value = make_gpt(0), make_scalar(3), make_scalar(5)
    checkpoint(folder / "sft", start)
    checkpoint(folder / "reward_model", reward)
    checkpoint(folder / "ppo", make_gpt(1))
    (folder / "data").mkdir()
    prompts = write_lines(folder / "data" / "prompts.jsonl", PROMPTS)
    settings = {"iterations": 3, "max_new_tokens": 6, "kl_coef": 0.3, "temperature": 0.8, "lam": 0.9, "gamma": 0.97}
    files = {"policy": str(folder / "sft"), "reward": [str(folder / "reward_model")], "prompts": prompts}
    config = ppo.Config(**{**settings, **files, **changed})
    logged = [
        {"step": i + 1, "score": 0.1 * i, "kl": 0.5 * i, "kl_coef": 0.3, "stopped_early": False} for i in range(3)
    ]
    gates = [{"name": "PPO KL", "value": 1.0, "low": 0.5, "high": None, "ok": True}]
    write_stage(folder / "ppo", config, logged, {"gates": gates, "seconds": 1.0})
    lib.checkpoint.atomic_save({"step": 3, "value_model": value.state_dict()}, folder / "ppo" / "state.pt")
    return config


def make_report(folder: Path, **options) -> tuple[str, dict, dict]:
    """-> the page, its data, and what run() returns."""
    found = report.run(report.Config(run=str(folder), device="cpu", **options))
    page = Path(found["out"]).read_text(encoding="utf-8")
    return page, data_of(page), found


class Reader(HTMLParser):
    """What a browser would find: tags, attributes, the text of scripts."""

    def __init__(self, page: str):
        super().__init__()
        self.tags, self.attributes, self.scripts, self.text = [], [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data):
        if self.tags[-1:] == ["script"]:
            self.scripts[-1] += data
        else:
            self.text.append(data)


def data_of(page: str) -> dict:
    """The data block, as a browser cuts it out: up to the first </script>."""
    return json.loads(page.split('id="data">')[1].split("</script>")[0])


# ------------------------------------------------------------------------------------------------ the token table


@pytest.mark.parametrize("kl", ["k1", "k2", "exact"])
def test_token_figures_equal_a_slow_computation(tmp_path, float64, kl):
    """A figure of the neighbouring token, log-probs at another temperature, the reference in the policy's place,
    whitened advantages, or the wrong value model: all would look plausible on the page."""
    config = toy_run(tmp_path, kl=kl)
    _, data, found = make_report(tmp_path, rollouts=4)
    assert [note for note in found["notes"] if "values" in note] == []
    start, last, reward = make_gpt(0), make_gpt(1), make_scalar(3)
    values = {"before": make_scalar(3), "after": make_scalar(5)}
    encode = TOY.encode
    for prompt, pair in zip(data["samples"]["prompts"], data["tokens"]["rows"], strict=True):
        for when, policy, row in (("before", start, pair[0]), ("after", last, pair[1])):
            given = encode(prompt["text"])
            actions = [EOS if t == "EOS" else encode(t)[0] for t in row["tokens"][:-1]]
            actions += [EOS] if row["eos"] else encode(row["tokens"][-1])
            assert row["eos"] or len(actions) == config.max_new_tokens
            n, ids = len(actions), torch.tensor([given + actions])
            own = completion_logprobs(policy, given, actions, config.temperature)  # (n,)
            ref = completion_logprobs(start, given, actions, config.temperature)
            logits = [m(ids)[0, len(given) - 1 : -1] / config.temperature for m in (policy, start)]  # (n, V) each
            full, ref_full = (x.log_softmax(-1) for x in logits)
            exact = (full.exp() * (full - ref_full)).sum(-1)
            penalty = {"k1": own - ref, "k2": (own - ref) ** 2 / 2, "exact": exact}[kl]
            score = reward(ids)[0, -1].item() - (0.0 if row["eos"] else config.eos_penalty)
            rewards = [-config.kl_coef * x for x in penalty.tolist()]
            rewards[-1] += score
            value = values[when](ids)[0, len(given) - 1 : -1].tolist()
            advantages = gae_by_definition(rewards, value, config.gamma, config.lam)
            returns = [a + v for a, v in zip(advantages, value, strict=True)]
            if kl == "exact":  # a token's own share of the exact penalty
                share = (own - ref - exact).tolist()
                advantages = [a - config.kl_coef * x for a, x in zip(advantages, share, strict=True)]
            expected = {
                "logprobs": own.tolist(),
                "ref_logprobs": ref.tolist(),
                "kl": penalty.tolist(),
                "entropy": (-(full.exp() * full).sum(-1)).tolist(),
                "rewards": rewards,
                "values": value,
                "advantages": advantages,
                "returns": returns,
            }
            assert row["score"] == pytest.approx(score, abs=1e-4)
            assert set(row["figures"]) == set(expected)
            for name, column in expected.items():
                assert len(row["figures"][name]) == n
                assert row["figures"][name] == pytest.approx(column, abs=1.01e-4), name
    assert any(row["eos"] for pair in data["tokens"]["rows"] for row in pair)
    assert not all(row["eos"] for pair in data["tokens"]["rows"] for row in pair)


def test_the_penalty_is_that_of_the_time(tmp_path, float64):
    """With an adaptive coefficient the rewards of the last iteration are not those of the first: each pass is measured
    with its own, and their sum is score - kl_coef * KL."""
    toy_run(tmp_path)
    log = tmp_path / "ppo" / "metrics.jsonl"
    log.write_text(log.read_text(encoding="utf-8") + '{"step": 4, "score": 0.4, "kl": 1.0, "kl_coef": 0.7}\n')
    _, data, _ = make_report(tmp_path)
    assert data["tokens"]["kl_coef"] == 0.7
    for before, after in data["tokens"]["rows"]:
        assert sum(before["figures"]["rewards"]) == pytest.approx(before["score"], abs=1e-3)
        assert set(before["figures"]["kl"]) == {0.0}
        total = after["score"] - 0.7 * sum(after["figures"]["kl"])
        assert sum(after["figures"]["rewards"]) == pytest.approx(total, abs=2e-3)
        assert any(after["figures"]["kl"])


def test_samples_are_the_policies_own_answers(tmp_path, float64):
    """Answers under another policy's name, or scores of the sample beside the likeliest answer."""
    toy_run(tmp_path)
    _, data, _ = make_report(tmp_path)
    samples, reward, encode = data["samples"], make_scalar(3), TOY.encode
    assert samples["policies"] == ["sft", "ppo"]
    for name, policy in (("sft", make_gpt(0)), ("ppo", make_gpt(1))):
        for i, prompt in enumerate(samples["prompts"]):
            ids = encode(prompt["text"])
            n = len(ids)
            while len(ids) < n + 6 and (len(ids) == n or ids[-1] != EOS):
                ids.append(int(policy(torch.tensor([ids]))[0, -1].argmax()))
            said, ended = ids[n:], ids[-1] == EOS
            judged = samples["greedy"][name]
            assert judged["text"][i] == TOY.decode(said[:-1] if ended else said)
            assert judged["ended"][i] == ended
            assert judged["score"][i] == pytest.approx(reward(torch.tensor([ids]))[0, -1].item())
            assert judged["gold"] is None and judged["right"] is None
        ids = [encode(prompt["text"]) for prompt in samples["prompts"]]
        rng = lib.train.generator_for(torch.device("cpu"), 1)
        drawn = slow_generate(policy, ids, 6, eos_id=EOS, temperature=0.8, generator=rng)
        assert samples["sampled"][name]["text"] == [TOY.decode(c) for c in drawn.completions()]
    pairs = zip(samples["sampled"]["ppo"]["text"], data["tokens"]["rows"], strict=True)
    assert all(text == "".join(row["tokens"][: -1 if row["eos"] else None]) for text, (_, row) in pairs)


def test_prompts_are_those_that_nothing_was_trained_on(tmp_path):
    """Answers to questions that the policies know by heart, although others lie beside them; always the same ones,
    whatever --seed is; more tokens than --max_new_tokens allows."""
    toy_run(tmp_path)
    for left, name in (("abcdefgh", "prompts_held_out.jsonl"), ("jklmnopq", "prompts_test.jsonl")):
        write_lines(tmp_path / "data" / name, [{"prompt": letter * 2} for letter in left])
        chosen = [
            [p["text"] for p in make_report(tmp_path, rollouts=3, seed=seed)[1]["samples"]["prompts"]]
            for seed in (1, 2)
        ]
        assert {text[0] for texts in chosen for text in texts} <= set(left) and chosen[0] != chosen[1]
    answers = make_report(tmp_path, max_new_tokens=2)[1]["samples"]["greedy"]["ppo"]["text"]
    assert max(map(len, answers)) <= 2


def test_stages_stand_in_the_order_of_the_pipeline(tmp_path):
    """A variant before what it is a variant of: it would be the run whose rollouts are shown; and each gate beside the
    folder's name, not its kind's."""
    config = toy_run(tmp_path)
    gates = [{"name": "a gate", "value": 1.0, "low": 0.5, "high": None, "ok": True}]
    for name, made in (("a_ppo", config), ("an_sft", sft.Config()), ("dpo", dpo.Config()), ("ppo_no_kl", config)):
        write_stage(tmp_path / name, made, [], {"gates": gates})
    stages = report.find_stages(tmp_path, [])
    assert [s.name for s in stages] == ["an_sft", "ppo", "a_ppo", "ppo_no_kl", "dpo"]
    assert [name for name, _ in report.find_gates(stages, {"gates": gates})] == [*(s.name for s in stages), "evaluate"]


def test_each_policy_has_its_own_parts_of_the_true_reward():
    """One policy's parts beside another's name, or a part under another's title."""
    parts = {"sft": {"correct": 0.5, "to_the_point": -0.25}, "ppo": {"correct": 1.5, "to_the_point": 0.0}}
    page = report.comparison({"policies": {name: {"kl": 0.0, "parts": p} for name, p in parts.items()}})
    table = rows_of(re.findall(r"<table>.*?</table>", page, re.S)[1])
    assert table == [["policy", "correct", "to the point"], ["sft", "+0.50", "-0.25"], ["ppo", "+1.50", "+0.00"]]


# ------------------------------------------------------------------------------------------------ what is not there


def test_without_the_value_model_there_are_no_values(tmp_path):
    """Zeros in the place of values would pass for figures."""
    toy_run(tmp_path)
    (tmp_path / "ppo" / "state.pt").unlink()
    _, data, found = make_report(tmp_path)
    names = set(data["tokens"]["quantities"])
    assert names == {"rewards", "kl", "logprobs", "entropy", "ref_logprobs"}
    assert all(set(row["figures"]) == names for pair in data["tokens"]["rows"] for row in pair)
    assert any("state.pt" in note for note in found["notes"])


def test_a_value_model_of_the_middle_of_a_run_is_not_shown(tmp_path):
    """A run that was killed leaves a newer state beside an older model: their figures don't belong together."""
    toy_run(tmp_path)
    state = lib.checkpoint.load_file(tmp_path / "ppo" / "state.pt") | {"step": 2}
    lib.checkpoint.atomic_save(state, tmp_path / "ppo" / "state.pt")
    _, data, found = make_report(tmp_path)
    assert "values" not in data["tokens"]["quantities"]
    assert any("not that of the finished run" in note for note in found["notes"])


def test_a_damaged_value_model_is_named_and_left_out(tmp_path):
    """Half a file, as a full disk leaves it: a note, and the page without values; no traceback."""
    toy_run(tmp_path)
    state = tmp_path / "ppo" / "state.pt"
    state.write_bytes(state.read_bytes()[:200])
    _, data, found = make_report(tmp_path)
    assert "values" not in data["tokens"]["quantities"] and data["tokens"]["rows"]
    (note,) = [note for note in found["notes"] if "state.pt" in note]
    assert "not a checkpoint that can be loaded (" in note and "\n" not in note


def test_a_reward_that_is_gone_is_named(tmp_path):
    """No scores and no rollouts token by token then, but the answers; and it is said why."""
    toy_run(tmp_path, reward=[f"{tmp_path}/mine.py:reward"])
    _, data, found = make_report(tmp_path)
    assert data["tokens"] == {} and data["samples"]["policies"] == ["sft", "ppo"]
    assert any("mine.py" in note for note in found["notes"])
    assert any("they need the reference, the trained policy and the reward" in note for note in found["notes"])


def test_rewards_are_weighted_as_in_the_run(tmp_path):
    """--reward_weights or --reward_combine of the run that are forgotten: the scores on the page are not its own."""
    mine = tmp_path / "mine.py"
    mine.write_text("def n(prompts, completions):\n    return [float(len(c)) for c in completions]\n", encoding="utf-8")
    spec = f"{mine}:n"
    toy_run(tmp_path, reward=[spec, spec], reward_weights=[5.0, 3.0], reward_combine="min")
    samples = make_report(tmp_path)[1]["samples"]
    for answers in samples["greedy"].values():
        assert answers["score"] == [3.0 * len(text) for text in answers["text"]]


def test_a_run_without_ppo_says_so(tmp_path):
    toy_run(tmp_path)
    shutil.rmtree(tmp_path / "ppo")
    config = dpo.Config(policy=str(tmp_path / "sft"), data=str(tmp_path / "data" / "prompts.jsonl"))
    write_stage(tmp_path / "dpo", config, [{"step": 1, "loss": 0.7}], {"gates": [], "seconds": 1.0})
    checkpoint(tmp_path / "dpo", make_gpt(1))
    _, data, found = make_report(tmp_path)
    assert data["tokens"] == {} and "no rollouts token by token: there is no run of ppo.py" in found["notes"]


def test_a_run_that_was_moved_finds_its_parts(tmp_path):
    """The paths in config.json are those of another folder, perhaps another machine."""
    toy_run(tmp_path / "here")
    (tmp_path / "here").rename(tmp_path / "there")
    _, data, _ = make_report(tmp_path / "there")
    assert data["samples"]["policies"] == ["sft", "ppo"] and data["tokens"]["rows"]


def test_what_is_missing_is_left_out_and_named(tmp_path):
    """Curves alone, of a run whose models are gone: still a page."""
    toy_run(tmp_path)
    for name in ("sft", "reward_model", "ppo"):
        (tmp_path / name / "model.pt").unlink()
    (tmp_path / "sft").rmdir()
    _, data, found = make_report(tmp_path)
    assert data["samples"] == {} and data["tokens"] == {}
    assert [g["group"] for g in data["curves"]] == ["PPO"]
    assert any("sft is gone" in note for note in found["notes"])
    page, data, _ = make_report(tmp_path, rollouts=0)
    assert data["samples"] == {} and "evaluate.py has not been run" in page


def test_one_s_own_reward_function_and_gold(tmp_path):
    """User data has no embedded truth: the run's own reward and gold functions judge, told which answers ended."""
    functions = tmp_path / "mine.py"
    functions.write_text(
        "def short(prompts, completions):\n    return [-float(len(c)) for c in completions]\n"
        "def gold(prompts, completions, ended):\n    return [float(e) for e in ended]\n"
    )
    toy_run(tmp_path, reward=[f"{functions}:short"], gold=f"{functions}:gold")
    value = make_scalar(5)
    lib.checkpoint.atomic_save({"step": 3, "value_model": value.state_dict()}, tmp_path / "ppo" / "state.pt")
    _, data, _ = make_report(tmp_path)
    for judged in data["samples"]["sampled"].values():
        assert judged["score"] == [-len(text) for text in judged["text"]]
        assert judged["gold"] == [float(e) for e in judged["ended"]]
    assert data["tokens"]["from_reward_model"] is False
    # a head of zeros is what training began with, where no reward model knows the units
    assert {v for before, _ in data["tokens"]["rows"] for v in before["figures"]["values"]} == {0.0}


def test_dpo_alone_has_answers_and_no_rollouts(tmp_path):
    """A run without PPO has no rollouts and perhaps no reward, and its answers are shown all the same."""
    checkpoint(tmp_path / "sft", make_gpt(0))
    checkpoint(tmp_path / "dpo", make_gpt(2))
    config = dpo.Config(policy=str(tmp_path / "sft"), max_new_tokens=5)
    write_stage(tmp_path / "dpo", config, [{"step": 1, "loss": 0.69, "accuracy": 0.5}], {"gates": []})
    prompts = write_lines(tmp_path / "p.jsonl", PROMPTS)
    page, data, found = make_report(tmp_path, prompts=prompts, rollouts=2)
    assert data["samples"]["policies"] == ["sft", "dpo"] and len(data["samples"]["prompts"]) == 2
    assert data["samples"]["sampled"]["dpo"]["score"] is None
    assert data["tokens"] == {} and any("no run of ppo.py" in note for note in found["notes"])
    assert "No stage has gates" in page


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"run": "nowhere"}, ["nowhere", "make demo"]),
        ({"run": "."}, ["make demo"]),
        ({"run": "run", "stages": ["grpo"]}, ["--stages grpo"]),
        ({"run": "run", "out": "run"}, ["--out run"]),
        ({"run": "run", "out": "run/ppo/config.json/page.html"}, ["config.json", "can't be made a folder"]),
        ({"run": "run", "prompts": "none.jsonl"}, ["none.jsonl"]),
    ],
)
def test_mistakes_get_one_line(tmp_path, monkeypatch, options, words):
    """A traceback, or a page of nothing."""
    toy_run(tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        report.run(report.Config(**options, device="cpu"))
    assert "\n" not in str(error.value) and all(word in str(error.value) for word in words)
    assert not list(tmp_path.rglob("*.tmp"))


def test_too_many_stages_are_to_be_chosen_from(tmp_path):
    """A folder of a study holds dozens of runs: a page of all would take minutes and show nothing."""
    config = toy_run(tmp_path)
    for i in range(report.MOST_STAGES):
        write_stage(tmp_path / f"ppo_{i}", config, [], {})
    with pytest.raises(UserError, match="--stages"):
        make_report(tmp_path)
    _, data, _ = make_report(tmp_path, stages=["ppo"])
    assert data["curves"][0]["runs"] == ["ppo"]


def test_a_mistake_is_one_line():
    command = [sys.executable, "-m", "study.report", "--run", "nowhere"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 2 and run.stderr == f"report.py: error: {run.stderr.split('error: ')[1]}"
    assert run.stderr.count("\n") == 1 and "make demo" in run.stderr


# ------------------------------------------------------------------------------------------------ the page


def test_hostile_text_is_data(tmp_path):
    """A prompt, a stage's name or a setting that ends the script, opens a comment, is a tag or a place of the template
    must come out as it went in, and nothing of it may run."""
    content = {"text": HOSTILE, HOSTILE: [HOSTILE]}
    block = report.as_json(content)
    assert json.loads(block) == content and not set("<>&\u2028") & set(block)

    toy_run(tmp_path, kl_horizon=1.0, ptx_data=HOSTILE)
    plain = Reader(make_report(tmp_path, rollouts=0)[0])
    log = tmp_path / "ppo" / "metrics.jsonl"
    log.write_text(json.dumps({"step": 1, "score": 1.0, HOSTILE: 2.0}) + "\n", encoding="utf-8")
    results = {"gates": [{"name": HOSTILE, "value": 1.0, "low": None, "high": 2.0, "ok": False}]}
    lib.run.write_json(results, tmp_path / "ppo" / "results.json")
    figures = {"gold": 1.0, "kl": 0.5, "parts": {HOSTILE: 1.0}}
    evaluation = {"policies": {HOSTILE: figures, "b": {**figures, "win_rate": 0.5, "win_low": 0.4, "win_high": 0.6}}}
    lib.run.write_json(evaluation, tmp_path / "evaluate" / "results.json")
    page, data, _ = make_report(tmp_path, rollouts=0)
    found = Reader(page)
    assert HOSTILE in {chart["name"] for chart in data["curves"][0]["charts"]}
    assert len(found.scripts) == len(plain.scripts) == 2 and found.scripts[1] == plain.scripts[1]
    assert found.tags.count("b") == 0
    shown = "".join(found.text)
    assert shown.count(HOSTILE) >= 4  # the setting, the gate, the policy, the part (with _ as it is)


def test_the_page_loads_nothing(tmp_path):
    """An address of elsewhere in a src, an href, a style or the script: the page would ask for it when it is opened."""
    toy_run(tmp_path)
    page, _, _ = make_report(tmp_path)
    found = Reader(page)
    assert not re.search(r"https?:|//\w|url\(|@import|fetch\(|XMLHttpRequest", page.replace("// ", ""))
    links = [(tag, value) for tag, name, value in found.attributes if name in ("src", "href", "srcset", "action")]
    assert links and all(tag == "a" and value.startswith("#") for tag, value in links)
    assert not {"link", "img", "iframe", "object", "embed", "base", "form"} & set(found.tags)
    places = {value for tag, name, value in found.attributes if name == "id"}
    assert all(value[1:] in places for _, value in links)
    assert "innerHTML" not in page and "outerHTML" not in page and "document.write" not in page
    assert len(page) < 1_000_000 and "{{" not in page


def test_tables_show_the_results(tmp_path):
    """A figure in another column or row than its own; an interval or a bound that is lost; a failed gate as OK."""
    toy_run(tmp_path)
    first = {"gold": 0.5, "gold_se": 0.04, "rm": 0.03, "kl": 0.0, "win_rate": None, "eos_rate": 0.97, "loss": None}
    second = {**first, "gold": 2.25, "kl": 1.55, "win_rate": 0.812, "win_low": 0.784, "win_high": 0.838}
    evaluation = {
        "ceiling": 3.0,
        "policies": {"sft": first, "ppo": second},
        "best_of_n": {"4": {"rm": 0.98, "kl_bound": 0.636, "gold": 1.75, "gold_se": 0.02}},
        "gates": [{"name": "headroom", "value": 0.2, "low": 0.55, "high": 1.0, "ok": False}],
    }
    lib.run.write_json(evaluation, tmp_path / "evaluate" / "results.json")
    page, _, _ = make_report(tmp_path, rollouts=0)
    tables = [rows_of(t) for t in re.findall(r"<table>.*?</table>", page, re.S)]
    head, *rows = tables[1]
    assert head == ["policy", "gold", "+-", "RM score", "KL", "win rate [95% interval]", "EOS"]
    assert rows == [
        ["sft", "0.500", "0.040", "0.03", "0.00", "–", "0.970"],
        ["ppo", "2.250", "0.040", "0.03", "1.55", "0.812\n[0.784,\xa00.838]", "0.970"],
        ["best of 4", "1.750", "0.020", "0.98", "≤ 0.64", "–", "–"],
    ]
    assert tables[2][1:] == [
        ["ppo", "PPO KL", "1.000", "at least 0.5", "OK"],
        ["evaluate", "headroom", "0.200", "0.55 to 1", "FAILED"],
    ]


def test_the_stages_stand_with_their_data_seed_and_steps(tmp_path):
    """Lines of the log under the name of steps, another stage's seed or seconds, prompts that are called data."""
    toy_run(tmp_path)
    rows = [{"step": 20, "loss": 0.7}, {"step": 1250, "loss": 0.6}]
    config = dpo.Config(policy=str(tmp_path / "sft"), data="mine.jsonl", seed=7)
    write_stage(tmp_path / "dpo", config, rows, {"gates": [], "seconds": 62.4})
    page, _, _ = make_report(tmp_path, rollouts=0)
    head, *stages = rows_of(re.search(r"<table>.*?</table>", page, re.S)[0])
    assert head == ["stage", "script", "learned from", "seed", "steps", "time"]
    prompts = str(tmp_path / "data" / "prompts.jsonl")
    assert stages == [
        ["ppo", "ppo.py", prompts, "1", "3", "1 s"],
        ["dpo", "dpo.py", "mine.jsonl", "7", "1,250", "62 s"],
    ]


def test_the_reward_model_s_shares_stand_under_their_names():
    """The standard error as if it were a share, or the annotators' limit under the name of the accuracy."""
    found = {"accuracy": 0.76, "accuracy_se": 0.012, "accuracy_gap_1": 0.7, "bayes_accuracy": 0.81}
    found |= {"length_alone": 0.6, "longer_wins": 0.41, "right_vs_wrong": 0.88, "loss": 0.5}
    page = report.comparison({"policies": {"sft": {"kl": 0.0}}, "reward_model": found})
    reader = Reader(page[page.index("How good the reward model is") :])
    cells = [text.strip() for text in reader.text if text.strip()]
    rows = dict(zip(cells[3::2], cells[4::2], strict=True))
    assert rows == {
        "accuracy": "0.76",
        "accuracy gap 1": "0.70",
        "the most that the annotators' noise allows": "0.81",
        "by length alone": "0.60",
        "right vs wrong": "0.88",
    }
    assert "How good" not in report.comparison({"policies": {"sft": {"kl": 0.0}}, "reward_model": {}})


def test_failed_gates_are_named_last_and_end_strict_runs_alone(tmp_path, monkeypatch, capsys):
    """A newcomer's demo that misses a range by a hair: no report, and status 1 without a word on what it means. Of
    two runs of a stage it is said whose gate it was."""
    config = toy_run(tmp_path)
    make_report(tmp_path, rollouts=0)
    assert "all 1 gates OK" in capsys.readouterr().out.splitlines()[-1]
    gates = [
        {"name": "PPO KL", "value": 0.2, "low": 0.55, "high": 1.0, "ok": False},
        {"name": "KL", "value": None, "low": None, "high": 2.0, "ok": False},  # it was nan
    ]
    lib.run.write_json({"gates": gates[1:]}, tmp_path / "evaluate" / "results.json")
    write_stage(tmp_path / "ppo_b", config, [{"step": 1, "score": 0.0}], {"gates": gates[:1]})
    argv = ["report.py", "--run", str(tmp_path), "--rollouts", "0"]
    for strict in ([], ["--strict"]):
        monkeypatch.setattr(sys, "argv", argv + strict)
        if strict:
            with pytest.raises(SystemExit) as end:
                report.main()
            assert end.value.code == 1
        else:
            report.main()
        assert (tmp_path / "report.html").exists()
        lines = capsys.readouterr().out.splitlines()
        assert lines[1:4] == [
            "2 of 3 gates FAILED:",
            "  ppo_b: PPO KL 0.200, usually 0.55 to 1",
            "  evaluate: KL nan, usually at most 2",
        ]
        assert "A gate compares" in lines[4]


def rows_of(table: str) -> list[list[str]]:
    """The texts of a table's cells."""
    rows = re.findall(r"<tr>(.*?)</tr>", table, re.S)
    return [[re.sub(r"<.*?>", "", cell) for cell in re.findall(r"<t[hd].*?>(.*?)</t[hd]>", row, re.S)] for row in rows]


def test_curves_are_the_log_s(tmp_path):
    """Points of another metric or run, a missing value drawn as 0, a band that is not that of study/metrics.py."""
    config = toy_run(tmp_path)
    other = [{"step": 1, "score": 1.0, "kl": None, "kind": "a word"}, {"step": 2, "score": 2.0, "kl": 3.0}]
    write_stage(tmp_path / "ppo_b", config, other, {"gates": []})
    lib.run.write_json({"group": 8}, tmp_path / "grpo" / "config.json")
    write_lines(tmp_path / "grpo" / "metrics.jsonl", [{"step": 1, "entropy": 0.5, "explained_variance": 0.0}])
    long = [{"step": s, "loss": float(s)} for s in range(1, 1001)]
    write_stage(tmp_path / "dpo", dpo.Config(), long, {"gates": []})
    _, data, _ = make_report(tmp_path, rollouts=0)
    groups = {g["group"]: {c["name"]: c for c in g["charts"]} for g in data["curves"]}
    assert groups["PPO"]["score"]["series"] == [
        {"run": "ppo", "points": [[1, 0.0], [2, 0.1], [3, 0.2]]},
        {"run": "ppo_b", "points": [[1, 1.0], [2, 2.0]]},
    ]
    assert "kind" not in groups["PPO"] and "explained_variance" not in groups["PPO"]  # GRPO has no value model
    assert groups["PPO"]["entropy"]["series"] == [{"run": "grpo", "points": [[1, 0.5]]}]
    assert groups["PPO"]["kl"]["series"][1]["points"] == [[2, 3.0]]
    assert groups["PPO"]["stopped_early"]["series"][0]["points"] == [[1, 0.0], [2, 0.0], [3, 0.0]]
    kl = metrics.METRICS["kl"]
    assert (groups["PPO"]["kl"]["low"], groups["PPO"]["kl"]["high"]) == (kl.low, kl.high)
    points = groups["DPO"]["loss"]["series"][0]["points"]
    assert len(points) == report.MOST_POINTS and points[0] == [1, 1.0] and points[-1] == [1000, 1000.0]
    assert all(step == value for step, value in points)
    steps = [b[0] - a[0] for a, b in itertools.pairwise(points)]
    assert max(steps) - min(steps) <= 1


def test_every_logged_figure_is_explained():
    """A metric that a stage logs and metrics.py doesn't know would be drawn without title, unit and band."""
    sources = [(ROOT / f"{name}.py").read_text(encoding="utf-8") for name in ("sft", "reward_model")]
    logged = {name for source in sources for call in re.findall(r"run\.log\((.*)\)\n", source) for name in call.split()}
    logged = {re.match(r"(\w+)=", word).group(1) for word in logged if re.match(r"\w+=", word)} - {"step"}
    logged |= {*dpo.PAIR_FIGURES, "margin", "accuracy", *ppo.STATISTICS, "first_ratio", "updates", "stopped_early"}
    assert {"held_out_loss", "tokens_per_s", "grad_norm"} <= logged
    assert logged <= set(metrics.METRICS)
    assert {name for _, main in report.GROUPS.values() for name in main} <= set(metrics.METRICS)


def test_the_page_explains_its_columns_and_quantities():
    """A column of evaluate.py, a part of the true reward or a token's figure that the page has no words for."""
    page = report.PAGE.read_text(encoding="utf-8")
    titles = [title for _, title, _ in evaluate.COLUMNS] + [part.replace("_", " ") for part in tiny.PARTS]
    for name in [*titles, *report.QUANTITIES]:
        assert re.search(rf'^  "?{re.escape(name)}"?: ["{{]', page, re.MULTILINE), name


def test_stages_are_known_by_their_flags():
    """A stage under any name is drawn among its own kind; a flag that two scripts get would mix them up."""
    import reward_model

    for kind, script in {"sft": sft, "reward_model": reward_model, "ppo": ppo, "dpo": dpo}.items():
        names = {f.name for f in dataclasses.fields(script.Config)}
        assert [k for k, flag in report.KINDS.items() if flag in names] == [kind]
