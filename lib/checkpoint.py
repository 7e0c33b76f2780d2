"""Checkpoints: model.pt of a stage, and published weights in its place."""

from __future__ import annotations

import dataclasses
import errno
from pathlib import Path
from typing import NamedTuple

import torch

from data.files import replacing
from data.tokenizer import Tokenizer, fingerprint, load_tokenizer, vocabulary_name
from lib.cli import UserError, check, one_line
from lib.weights import GPT2_NAMES, check_finite, load_pretrained, local_path
from model import GPT, GPTConfig, ScalarModel


def atomic_save(obj, path: Path) -> None:
    """torch.save, the whole file or none of it."""
    with replacing(path) as temporary:
        try:
            torch.save(obj, temporary)
        except RuntimeError as error:  # torch's word for a full disk
            raise OSError(errno.ENOSPC, f"is the disk full? {one_line(error)}") from None


def load_file(path: str | Path, map_location="cpu") -> dict:
    """torch.load that unpickles tensors and plain Python only (weights_only=True), with one-line errors."""
    try:
        return torch.load(path, map_location=map_location, weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except Exception as error:  # torch raises many kinds for a damaged file
        raise UserError(f"{path}: not a checkpoint that can be loaded ({one_line(error)})") from None


def save_model(
    folder: str | Path, model: GPT | ScalarModel, tokenizer: str, script: str, config, task: str = ""
) -> None:
    """out/<stage>/model.pt: weights, shape, tokenizer and how it was made; tensors and plain Python only.

    tokenizer: Tokenizer.saved. task: "tiny" if it was trained on the embedded task, else "". Weights that are not
    finite are refused."""
    weights = model.state_dict()
    all_finite = all(bool(w.isfinite().all()) for w in weights.values())
    check(all_finite, f"the trained weights are not finite, so {folder} gets no model; lower --lr")
    content = {
        "kind": "scalar" if isinstance(model, ScalarModel) else "gpt",
        "config": dataclasses.asdict(model.config),
        "tokenizer": tokenizer,
        "made": {"script": script, "config": dataclasses.asdict(config), "task": task},
        "weights": weights,
    }
    mark = fingerprint(tokenizer)
    atomic_save(content | ({"fingerprint": mark} if mark else {}), Path(folder) / "model.pt")


class Checkpoint(NamedTuple):
    """What a stage left behind."""

    model: GPT | ScalarModel  # in eval mode
    vocabulary: str  # what load_tokenizer takes, Tokenizer.saved
    task: str  # "tiny" if it was trained on the embedded task, "" on anything else

    @property
    def tokenizer(self) -> Tokenizer:
        return load_tokenizer(self.vocabulary)


def model_file(path: str | Path, made_by: str = "") -> Path:
    """A stage's folder, or its model.pt -> model.pt."""
    path = Path(path)
    file = path if path.suffix == ".pt" else path / "model.pt"
    check(file.exists(), f"{file}: no such checkpoint" + (f"; run `{made_by}` first" if made_by else ""))
    return file


KINDS = {"gpt": "a policy (sft.py, ppo.py, dpo.py)", "scalar": "a reward model (reward_model.py)"}
CONTENT = {"kind": str, "config": dict, "tokenizer": str, "made": dict, "weights": dict}  # of model.pt


def load_model(path: str | Path, device: torch.device, kind: str = "gpt", made_by: str = "") -> Checkpoint:
    """A stage's folder, or its model.pt; as a policy also published weights. kind: "gpt" (a policy), "scalar" (a
    reward model) or "any". Prints what it has read."""
    if kind != "scalar" and is_published(path):
        tokenizer = load_tokenizer(start_vocabulary(path))
        return Checkpoint(load_published(path, tokenizer.n_vocab).to(device).eval(), tokenizer.saved, "")
    file = model_file(path, made_by)
    content = load_file(file)
    check(isinstance(content, dict), f"{file}: not a checkpoint of this project ({type(content).__name__})")
    for key, expected in CONTENT.items():
        kind_of = type(content.get(key)).__name__
        check(isinstance(content.get(key), expected), f"{file}: not a checkpoint of this project ({key}: {kind_of})")
    found, tokenizer, made = content["kind"], content["tokenizer"], content["made"]
    kind = found if kind == "any" and found in KINDS else kind
    check(found == kind, f"{file}: holds {KINDS.get(found, found)}; here {KINDS.get(kind, 'a model')} is needed")
    try:
        fields = {k: v for k, v in content["config"].items() if k != "expectation"}  # earlier versions kept it there
        config, expectation = GPTConfig(**fields), "direction" in content["weights"]
        model = GPT(config) if kind == "gpt" else ScalarModel(config, expectation)
        model.load_state_dict(content["weights"])
        source = made["config"].get("data")
        told = f"{file}: made by {made['script']}" + (f" from {source}" if source is not None else "")
    except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError, RuntimeError) as error:
        raise UserError(f"{file}: not a checkpoint of this project ({one_line(error)})") from None
    check_finite(model.state_dict(), file)
    mark = content.get("fingerprint") or ""  # earlier versions had none
    now = f"data/{tokenizer}.tiktoken is now; train it again"
    check(mark in ("", fingerprint(tokenizer)), f"{file}: made with another {tokenizer} vocabulary than {now}")
    print(told)
    return Checkpoint(model.to(device).eval(), tokenizer, made.get("task") or "")


def is_published(source: str | Path) -> bool:
    """Are these published weights: a Hugging Face folder, a .gguf file, gpt2 (-medium, ...), or hf: and a name on the
    hub? Else they are a checkpoint's."""
    path = Path(source)
    if path.is_dir():
        return any(path.glob("*.safetensors")) or (path / "pytorch_model.bin").exists()
    on_the_hub = str(source) in GPT2_NAMES or str(source).startswith("hf:")
    return path.suffix == ".gguf" or (not path.exists() and on_the_hub)


def find_published(source: str | Path) -> Path:
    """The folder of weights on the hub, downloaded."""
    try:
        return local_path(source)
    except ValueError as error:
        raise UserError(str(error)) from None


def load_published(source: str | Path, n_vocab: int, block_size: int = 0) -> GPT:
    """Published weights, for a vocabulary of n_vocab tokens."""
    try:
        model = load_pretrained(source, block_size=block_size)
    except UserError as error:  # it names the file
        raise UserError(f"{source}: can't be loaded ({error})") from None
    except (OSError, LookupError, TypeError, ValueError, ArithmeticError, AttributeError, RuntimeError) as error:
        raise UserError(f"{source}: can't be loaded ({one_line(error)})") from None
    rows = model.config.vocab_size
    print(f"{source}: published weights, {rows:,} token ids, block size {model.config.block_size}")
    check(rows >= n_vocab, f"{source}: {rows} token ids, but the vocabulary has {n_vocab}")
    if rows > n_vocab:  # a padded table: its extra rows are no tokens
        model.config.real_vocab = n_vocab
    return model


def start_vocabulary(source: str) -> str:
    """What load_tokenizer takes, for the weights that a run starts from: none ("", from scratch), published ones, or a
    checkpoint's. If it is no checkpoint, load_model says so."""
    if str(source).startswith("hf:"):
        return str(find_published(source))
    if is_published(source):
        return "gpt2" if str(source) in GPT2_NAMES and not Path(source).exists() else str(source)
    try:
        content = load_file(model_file(source)) if source else {}
    except UserError:
        content = {}
    saved = content.get("tokenizer") if isinstance(content, dict) else None
    return saved if isinstance(saved, str) else "tiny"


def load_scorer(path: str | Path, policy: Checkpoint, device: torch.device) -> Checkpoint:
    """A reward model that can read what the policy writes: the same vocabulary, and texts as long."""
    scorer = load_model(path, device, "scalar", "python reward_model.py")
    check_scorer(scorer, path, policy)
    return scorer


def check_scorer(scorer: Checkpoint, path: str | Path, policy: Checkpoint) -> None:
    same = scorer.vocabulary == policy.vocabulary
    reads, writes = vocabulary_name(scorer.vocabulary), vocabulary_name(policy.vocabulary)
    check(same, f"{path} reads {reads} tokens, the policy writes {writes} tokens")
    longest, needed = scorer.model.config.block_size, policy.model.config.block_size
    check(longest >= needed, f"{path} reads texts of {longest} tokens at most, the policy's have up to {needed}")


def note_task(policy: Checkpoint, task: str, path: str) -> None:
    """Say so where data of one's own meets the demo's policy: it is rarely meant."""
    if policy.task == "tiny" and task != "tiny":
        print(f"NOTE: the policy was trained on the embedded task, but {path} holds other prompts")
