"""End to end, at a small size: the stages fit together, are reproducible, can be resumed, and need no network; and real
text goes through all of them."""

from __future__ import annotations

import dataclasses
import json
import shutil
import socket
import sys
from pathlib import Path

import pytest
import torch
from helpers import ROOT, make_gpt
from kill_and_resume import contents, function_of

from lib import cli
import collect
import tools.prepare
import data.tiny
import dpo
import evaluate
import grpo
import ppo
import reward_model
import sft
from lib.setup import initial_model
from lib.cli import UserError
from lib.checkpoint import load_file
from lib.run import RunFolder
from data.tokenizer import load_tokenizer
from lib.weights import save_pretrained

REAL = ROOT.parent / "shared" / "real"
TIMING = {"seconds", "share_rollout", "share_score", "share_update", "tokens_per_s"}


def configs(out: Path, **changed) -> dict:
    """Small configurations of every stage; `changed` maps a stage to fields that differ."""
    d = out / "data"
    made = {
        "tiny": data.tiny.Config(
            out_dir=str(d),
            demonstrations=240,
            held_out_demonstrations=40,
            prompts=120,
            held_out_prompts=24,
        ),
        "sft": sft.Config(
            data=str(d / "demonstrations.jsonl"),  # held-out demonstrations are found beside it
            out_dir=str(out / "sft"),
            n_layer=2,
            n_head=2,
            n_embd=32,
            epochs=1,
            warmup=5,
            dropout=0.1,  # so that resuming must restore torch's generator too
            device="cpu",
        ),
        "collect": collect.Config(
            policies=[str(out / "sft")],
            prompts=str(d / "prompts.jsonl"),
            n_prompts=48,
            out=str(d / "rankings.jsonl"),
            max_new_tokens=16,
            device="cpu",
        ),
        "collect_held_out": collect.Config(
            policies=[str(out / "sft")],
            prompts=str(d / "prompts_held_out.jsonl"),
            n_prompts=16,
            out=str(d / "rankings_held_out.jsonl"),
            max_new_tokens=16,
            device="cpu",
        ),
        "reward_model": reward_model.Config(
            policy=str(out / "sft"),
            data=str(d / "rankings.jsonl"),
            out_dir=str(out / "reward_model"),
            warmup=2,
            normalise_samples=32,
            max_new_tokens=16,
            log_every=1,
            device="cpu",
        ),
        "ppo": ppo.Config(
            policy=str(out / "sft"),
            reward=[str(out / "reward_model")],
            prompts=str(d / "prompts.jsonl"),
            out_dir=str(out / "ppo"),
            iterations=4,
            rollouts=16,
            minibatch=8,
            micro_batch=4,
            max_new_tokens=16,
            kl_target=3.0,
            device="cpu",
        ),
        "grpo": grpo.Config(
            policy=str(out / "sft"),
            reward=[str(out / "reward_model")],
            prompts=str(d / "prompts.jsonl"),
            out_dir=str(out / "grpo"),
            iterations=4,
            rollouts=16,
            minibatch=8,
            micro_batch=4,
            max_new_tokens=16,
            device="cpu",
        ),
        "dpo": dpo.Config(
            policy=str(out / "sft"),
            data=str(d / "rankings.jsonl"),
            out_dir=str(out / "dpo"),
            warmup=2,
            max_new_tokens=16,
            log_every=1,
            device="cpu",
        ),
        "evaluate": evaluate.Config(
            policies=[str(out / p) for p in ("sft", "ppo", "grpo", "dpo")],
            reward=str(out / "reward_model"),
            prompts=str(d / "prompts_held_out.jsonl"),
            max_new_tokens=16,
            best_of=[1, 2],
            out_dir=str(out / "evaluate"),
            device="cpu",
        ),
    }
    return {k: dataclasses.replace(v, **changed.get(k, {})) for k, v in made.items()}


STAGES = {
    "tiny": data.tiny,
    "sft": sft,
    "collect": collect,
    "collect_held_out": collect,
    "reward_model": reward_model,
    "ppo": ppo,
    "grpo": grpo,
    "dpo": dpo,
    "evaluate": evaluate,
}

TRAINED = ("sft", "reward_model", "ppo", "grpo", "dpo")


def run(names, made: dict) -> dict:
    return {name: function_of(STAGES[name])(made[name]) for name in names}


def metrics(folder: Path) -> list[dict]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{k: v for k, v in row.items() if k not in TIMING} for row in rows]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """The whole pipeline once, with every connection refused: need R10, nothing is downloaded."""
    out = tmp_path_factory.mktemp("pipeline")
    patch = pytest.MonkeyPatch()

    def refuse(*args, **kwargs):
        raise OSError("no network in this test")

    patch.setattr(socket.socket, "connect", refuse)
    patch.setattr(socket, "getaddrinfo", refuse)
    patch.setattr(socket, "create_connection", refuse)
    made = configs(out)
    results = run(STAGES, made)
    patch.undo()
    return out, made, results


def test_every_stage_writes_what_the_next_one_reads(pipeline):
    """Each training stage leaves model, state, metrics, config and results; tensors and
    plain Python only (weights_only=True)."""
    out, _, _ = pipeline
    for stage in TRAINED:
        found = sorted(p.name for p in (out / stage).iterdir())  # and no .tmp file
        assert found == ["config.json", "metrics.jsonl", "model.pt", "results.json", "state.pt"], stage
        checkpoint = load_file(out / stage / "model.pt")
        assert set(checkpoint) == {"kind", "config", "tokenizer", "made", "weights"}
        assert checkpoint["tokenizer"] == "tiny"
        assert checkpoint["kind"] == ("scalar" if stage == "reward_model" else "gpt")
        assert all("step" in row for row in metrics(out / stage))


def test_evaluation_has_the_promised_figures(pipeline):
    """The contract of out/evaluate/results.json, and figures that must hold whatever was learned."""
    out, _, _ = pipeline
    results = json.loads((out / "evaluate" / "results.json").read_text(encoding="utf-8"))
    assert results["ceiling"] == pytest.approx(data.tiny.CEILING)
    assert {"accuracy", "bayes_accuracy", "longer_wins", "length_alone"} <= set(results["reward_model"])
    assert list(results["policies"]) == ["sft", "ppo", "grpo", "dpo"] and set(results["best_of_n"]) == {"1", "2"}
    for name, figures in results["policies"].items():
        assert {"gold", "gold_se", "rm", "kl", "win_rate", "win_low", "win_high"} <= set(figures)
        assert {"eos_rate", "length", "distinct", "headroom_closed"} <= set(figures)
        assert figures["gold"] == pytest.approx(sum(figures["parts"].values()))
        if name == "sft":
            assert figures["kl"] == 0 and figures["win_rate"] is None and figures["headroom_closed"] == 0
        else:
            assert figures["kl"] > 0 and figures["win_low"] < figures["win_rate"] < figures["win_high"]
    assert results["best_of_n"]["2"]["rm"] >= results["best_of_n"]["1"]["rm"]
    for figures in results["best_of_n"].values():
        assert {"gold", "gold_se", "rm", "kl_bound"} == set(figures)
    assert results["best_of_n"]["1"]["kl_bound"] == 0


def test_the_same_seed_gives_the_same_run(pipeline, tmp_path):
    """Need R24: two runs of each script write identical metrics, and a third with another seed does not."""
    out, _, _ = pipeline
    shutil.copytree(out / "data", tmp_path / "data")
    (tmp_path / "data" / "rankings.jsonl").unlink()
    made = configs(tmp_path)
    run(["sft", "collect", "reward_model", "ppo", "grpo", "dpo"], made)
    assert (tmp_path / "data" / "rankings.jsonl").read_bytes() == (out / "data" / "rankings.jsonl").read_bytes()
    for stage in TRAINED:
        assert metrics(tmp_path / stage) == metrics(out / stage), stage
    other = dataclasses.replace(made["dpo"], seed=2, out_dir=str(tmp_path / "other"))
    dpo.train(other)
    assert metrics(tmp_path / "other") != metrics(out / "dpo")


@pytest.mark.parametrize("stage", TRAINED)
def test_a_resumed_run_equals_the_unbroken_one(pipeline, tmp_path, monkeypatch, stage):
    """Need R24: stopped after its first saved state and resumed, a run ends with
    bit-identical weights and the same log."""
    out, made, _ = pipeline
    config = dataclasses.replace(made[stage], out_dir=str(tmp_path / stage), save_every=2)
    save = RunFolder.save_state

    def save_and_die(self, step, **parts):
        save(self, step, **parts)
        raise KeyboardInterrupt

    monkeypatch.setattr(RunFolder, "save_state", save_and_die)
    with pytest.raises(KeyboardInterrupt):
        STAGES[stage].train(config)
    monkeypatch.setattr(RunFolder, "save_state", save)
    assert load_file(tmp_path / stage / "state.pt")["step"] == 2
    with open(tmp_path / stage / "metrics.jsonl", "a", encoding="utf-8") as f:
        f.write('{"step": 3, "loss"')  # a line that the crash cut short
    torch.manual_seed(12345)  # a resumed process starts with another generator state
    STAGES[stage].train(dataclasses.replace(config, resume=True))

    unbroken = load_file(out / stage / "model.pt")["weights"]
    resumed = load_file(tmp_path / stage / "model.pt")["weights"]
    assert all(torch.equal(resumed[k], unbroken[k]) for k in unbroken)
    assert metrics(tmp_path / stage) == metrics(out / stage)


OPENED: list[str] | None = None  # while it is a list, the files that were opened for reading are noted there


def note_opened(event: str, arguments: tuple) -> None:
    if OPENED is not None and event == "open" and str(arguments[1]).startswith("r"):
        OPENED.append(str(arguments[0]))


sys.addaudithook(note_opened)  # Python calls it for every file, whoever opens it; it can't be taken off again


@pytest.mark.parametrize("stage", STAGES)
def test_every_file_that_is_read_is_named(pipeline, tmp_path, monkeypatch, capsys, stage):
    """Data or a checkpoint that was found by itself must show, or the demo's goes unnoticed among one's own. The truth:
    what Python says that was opened, apart from what the stage itself has written."""
    _, made, _ = pipeline
    where = "out" if stage.startswith("collect") else "out_dir"
    config = dataclasses.replace(made[stage], **{where: str(tmp_path / "here")})
    if stage in ("ppo", "grpo"):
        config.ptx_coef, config.ptx_data = 0.1, made["sft"].data
    capsys.readouterr()
    monkeypatch.setattr(sys.modules[__name__], "OPENED", opened := [])
    function_of(STAGES[stage])(config)
    monkeypatch.setattr(sys.modules[__name__], "OPENED", None)
    shown = capsys.readouterr().out
    read = {path for path in opened if path.startswith(str(tmp_path.parent)) and str(tmp_path / "here") not in path}
    # policy, data, held-out data, and what a stage needs besides
    assert len(read) == {"tiny": 0, "sft": 2, "reward_model": 4, "ppo": 4, "grpo": 3, "dpo": 3, "evaluate": 8}.get(
        stage, 2
    )
    assert not {path for path in read if path not in shown}


def test_weights_that_are_imported_are_named(tmp_path, capsys):
    """--init FOLDER: with their block size, for it limits all that follows."""
    n_vocab = load_tokenizer("tiny").n_vocab
    save_pretrained(make_gpt(vocab=n_vocab, block_size=40), tmp_path / "weights")
    initial_model(sft.Config(init=str(tmp_path / "weights")), n_vocab, "cpu")
    assert f"{tmp_path / 'weights'}: " in (shown := capsys.readouterr().out) and "block size 40" in shown


def arguments_of(config) -> list[str]:
    """The command line that gives this configuration."""
    found = []
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        default = f.default if f.default is not dataclasses.MISSING else f.default_factory()
        if isinstance(value, bool) and value != default:
            found.append(f"--{f.name}" if value else f"--no-{f.name}")
        elif value != default:
            found += [f"--{f.name}", *map(str, value if isinstance(value, list) else [value])]
    return found


@pytest.mark.parametrize("stage", TRAINED)
def test_a_finished_run_is_resumed_without_changing_a_byte(pipeline, tmp_path, monkeypatch, capsys, stage):
    """It returns the stored results, gates included: so --strict fails on a failed gate as it did the first time."""
    out, made, results = pipeline
    shutil.copytree(out / stage, tmp_path / stage)
    before = contents(tmp_path / stage)
    config = dataclasses.replace(made[stage], out_dir=str(tmp_path / stage), resume=True, strict=True)
    stored = json.loads((tmp_path / stage / "results.json").read_text(encoding="utf-8"))
    assert STAGES[stage].train(config) == stored and contents(tmp_path / stage) == before
    failed = [g["name"] for g in results[stage]["gates"] if not g["ok"]]
    assert failed, "at this size a gate fails, or the rest of this test says nothing"
    monkeypatch.setattr(sys, "argv", [f"{stage}.py", *arguments_of(config)])
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        cli.run_main(STAGES[stage].train, STAGES[stage].Config, "")
    assert stop.value.code == 1 and contents(tmp_path / stage) == before
    assert capsys.readouterr().err == f"{stage}.py: error: gate failed: {', '.join(failed)}\n"


@pytest.mark.parametrize("stage", TRAINED)
def test_a_state_belongs_to_its_configuration(pipeline, tmp_path, stage):
    """Another learning rate, seed, policy or data: refused, the flag named, no byte changed. A run that has been
    started anew in the meantime has no state until it saves its first."""
    out, made, _ = pipeline
    shutil.copytree(out / stage, tmp_path / stage)
    before = contents(tmp_path / stage)
    config = dataclasses.replace(made[stage], out_dir=str(tmp_path / stage), resume=True)
    what = "prompts" if stage in ("ppo", "grpo") else "data"
    other = shutil.copy(getattr(config, what), tmp_path / "other.jsonl")
    changed = {"lr": config.lr / 2, "seed": 2, "warmup": 1, "grad_clip": 0.5, what: str(other)}
    changed |= {} if stage == "sft" else {"policy": str(out / "dpo")}
    for name, value in changed.items():
        with pytest.raises(UserError, match=rf"state\.pt was saved with --{name} "):
            STAGES[stage].train(dataclasses.replace(config, **{name: value}))
        assert contents(tmp_path / stage) == before

    class Died(Exception):
        pass

    def die(*arguments, **figures):
        raise Died

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Died):
        patch.setattr(RunFolder, "log", die)
        STAGES[stage].train(dataclasses.replace(config, resume=False, seed=2))
    with pytest.raises(UserError, match=r"state\.pt: no such file"):
        STAGES[stage].train(dataclasses.replace(config, seed=2))


@pytest.mark.parametrize("stage", TRAINED)
def test_a_finished_run_goes_on_for_longer(pipeline, tmp_path, stage):
    """More epochs or iterations: what was logged stays as it was, the new steps follow, and the results are those of
    the whole run: SFT's loss before training is still the one before training."""
    out, made, results = pipeline
    shutil.copytree(out / stage, tmp_path / stage)
    more = {"iterations": 6} if stage in ("ppo", "grpo") else {"epochs": 2}
    config = dataclasses.replace(made[stage], out_dir=str(tmp_path / stage), resume=True, **more)
    longer = STAGES[stage].train(config)
    before, after = metrics(out / stage), metrics(tmp_path / stage)
    assert after[: len(before)] == before
    assert after[-1]["step"] == before[-1]["step"] * (1.5 if stage in ("ppo", "grpo") else 2)
    assert [row["step"] for row in after] == sorted(row["step"] for row in after)
    assert load_file(tmp_path / stage / "state.pt")["step"] == after[-1]["step"]
    if stage == "sft":
        assert longer["first_loss"] == results["sft"]["first_loss"] > longer["held_out_loss"]
    if stage in ("ppo", "grpo"):
        assert longer["score"] == pytest.approx(after[-1]["score"], abs=1e-6)  # the last quarter of six


def test_ppo_variants_run_on_a_plain_function(pipeline, tmp_path):
    """A reward from file.py:function, exact KL, PTX and the last block alone: the frozen
    part stays bit-identical, the rest moves."""
    out, made, _ = pipeline
    source = "def short(prompts, completions):\n    return [-len(c) / 20 for c in completions]\n"
    (tmp_path / "my_reward.py").write_text(source, encoding="utf-8")
    config = dataclasses.replace(
        made["ppo"],
        reward=[f"{tmp_path / 'my_reward.py'}:short"],
        out_dir=str(tmp_path / "ppo"),
        kl="exact",
        kl_target=0.0,
        train_layers=1,
        ptx_coef=0.1,
        ptx_data=str(out / "data" / "demonstrations.jsonl"),
        trace=True,
    )
    ppo.train(config)
    before, after = load_file(out / "sft" / "model.pt")["weights"], load_file(tmp_path / "ppo" / "model.pt")["weights"]
    moved = {k for k in before if not torch.equal(before[k], after[k])}
    assert moved and all(k.startswith(("h.1.", "ln_f.")) for k in moved)
    assert metrics(tmp_path / "ppo")[0]["kl"] == pytest.approx(0.0, abs=1e-5)


def test_mistakes_are_reported_before_anything_is_overwritten(pipeline):
    """A typo in a flag must not cost the checkpoint that stands there."""
    out, made, _ = pipeline
    before = (out / "ppo" / "model.pt").read_bytes()
    for wrong in (
        {"reward": [str(out / "sft")]},
        {"policy": str(out / "reward_model")},
        {"max_new_tokens": 96},
        {"minibatch": 99},
        {"train_layers": 9},
        {"warmup": 5},
        {"seed": 2**64},
        {"reward_weights": [1.0, 2.0]},
    ):
        with pytest.raises(UserError) as error:
            ppo.train(dataclasses.replace(made["ppo"], **wrong))
        assert "\n" not in str(error.value)
    assert (out / "ppo" / "model.pt").read_bytes() == before
    assert (out / "ppo" / "results.json").exists()


@pytest.mark.slow
@pytest.mark.skipif(not REAL.exists(), reason="the folder with real data is absent")
def test_real_text_goes_through_all_stages(tmp_path, monkeypatch):
    """Public instruction data (Alpaca-style, with preferences), GPT-2's
    vocabulary, a small model: every stage learns."""
    shutil.copytree(REAL / "gpt2_bpe", tmp_path / "bpe")  # a copy: tiktoken deletes a cached file whose hash is off
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "bpe"))
    d = tmp_path / "data"
    counts = tools.prepare.prepare(REAL / "instruction-data-with-preference.json", d, held_out=0.05, seed=1)
    assert counts["demonstrations"] + counts["demonstrations_held_out"] == 1100
    assert counts["pairs"] + counts["pairs_held_out"] == 1094  # six pairs have equal texts
    # enough to learn from in seconds
    few = {"demonstrations": 160, "pairs": 32, "demonstrations_held_out": 24, "pairs_held_out": 8}
    for name, n in few.items():
        lines = (d / f"{name}.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        (d / f"{name}.jsonl").write_text("".join(lines[:n]), encoding="utf-8")

    common = {"device": "cpu", "log_every": 1}
    result = sft.train(
        sft.Config(
            data=str(d / "demonstrations.jsonl"),
            out_dir=str(tmp_path / "sft"),
            tokenizer="gpt2",
            n_layer=2,
            n_head=2,
            n_embd=32,
            block_size=128,
            batch_size=8,
            micro_batch=2,  # 50,257 logits a token: small parts are faster than large ones
            warmup=4,
            lr=8e-3,
            **common,
        )
    )
    assert result["held_out_loss"] < result["first_loss"] - 1.5  # from about ln 50257 = 10.8
    pairs = {
        "data": str(d / "pairs.jsonl"),
        "policy": str(tmp_path / "sft"),
        "batch_size": 8,
        "epochs": 3,
        "warmup": 4,
        "lr": 2e-3,
    }
    reward_model.train(
        reward_model.Config(
            out_dir=str(tmp_path / "reward_model"),
            normalise_samples=16,
            max_new_tokens=16,
            **pairs,
            **common,
        )
    )
    dpo.train(dpo.Config(out_dir=str(tmp_path / "dpo"), micro_batch=1, max_new_tokens=16, **pairs, **common))
    for stage in ("reward_model", "dpo"):
        losses = [row["loss"] for row in metrics(tmp_path / stage) if "loss" in row]
        epoch = len(losses) // 3  # the last epoch against the first
        assert sum(losses[-epoch:]) < sum(losses[:epoch]), f"{stage}: {losses}"
    result = ppo.train(
        ppo.Config(
            policy=str(tmp_path / "sft"),
            reward=[str(tmp_path / "reward_model")],
            prompts=str(d / "prompts.jsonl"),
            out_dir=str(tmp_path / "ppo"),
            iterations=3,
            rollouts=16,
            minibatch=8,
            micro_batch=2,
            max_new_tokens=24,
            lr=5e-4,
            device="cpu",
        )
    )
    rows = metrics(tmp_path / "ppo")
    assert len(rows) == 3
    assert rows[0]["kl"] == pytest.approx(0.0, abs=1e-4)
    assert rows[0]["first_ratio"] == pytest.approx(1.0, abs=1e-4)
    assert 0 < result["kl"] < 50
