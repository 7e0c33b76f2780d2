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
from helpers import ROOT, make_gpt

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


def start(module, config) -> dict:
    """What a script does: train(config), or run(config) where nothing is trained."""
    return (getattr(module, "train", None) or module.run)(config)


def run(names, made: dict) -> dict:
    return {name: start(STAGES[name], made[name]) for name in names}


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
    start(STAGES[stage], config)
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
