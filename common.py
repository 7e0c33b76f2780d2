"""Plumbing that every script shares, and nothing about RLHF: device, seed, checkpoints, run folders, rewards, samples,
gates."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import importlib.util
import inspect
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from blocks import Block
from cli import UserError, check, one_line
from data.batches import RankedExamples, micro_batches, ranked_batch
from data.tokenizer import Tokenizer, load_tokenizer, vocabulary_name
from model import GPT, GPTConfig, Rollout, ScalarModel, generate, masked_mean, token_logprobs
from weights import GPT2_NAMES, load_pretrained, local_path

# -------------------------------------------------------------------------------- device, dtype, seed


def pick_device(name: str) -> torch.device:
    """ "auto" takes the GPU where there is one, then Apple's, then the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name} can't be used here: {one_line(error)}") from None
    torch.set_float32_matmul_precision("high")  # TensorFloat-32 where the GPU has it; no effect on a CPU
    return torch.device(name)


def autocast(device: torch.device, dtype: str):
    """Context for the forward pass: weights stay float32, matrix products run in `dtype`."""
    if dtype == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


@contextlib.contextmanager
def sampling(model: GPT, dtype: str) -> Iterator[None]:
    """autocast for `generate`. It keeps its bfloat16 copy of a weight from one step to the next only if the weight asks
    for a gradient, and would cast what --train_layers has frozen at every step: so while this lasts all weights ask."""
    frozen = [p for p in model.parameters() if not p.requires_grad] if dtype != "float32" else []
    try:
        for p in frozen:
            p.requires_grad_(True)
        with autocast(model.device, dtype):
            yield
    finally:
        for p in frozen:
            p.requires_grad_(False)


def generator_for(device: torch.device, *key: int) -> torch.Generator:
    """A random generator for one purpose, e.g. (seed, epoch): independent of what else was drawn before."""
    seed = 0
    for k in key:
        seed = (seed * 1_000_003 + k + 1) % (2**63 - 1)
    return torch.Generator(device=device).manual_seed(seed)


# -------------------------------------------------------------------------------- files


def atomic_save(obj, path: Path) -> None:
    """torch.save to a temporary name, then rename: a crash leaves the old file or the new one, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(path.name + ".tmp")
    torch.save(obj, tmp)
    os.replace(tmp, path)


def finite(obj):
    """nan and inf are no JSON: None instead."""
    if isinstance(obj, dict):
        return {k: finite(v) for k, v in obj.items()}
    if isinstance(obj, (list, tuple)):
        return [finite(v) for v in obj]
    return None if isinstance(obj, float) and not math.isfinite(obj) else obj


def write_text(text: str, path: Path) -> None:
    """The whole file, or the old one stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(path.name + ".tmp")
    tmp.write_text(text, encoding="utf-8", newline="\n")
    os.replace(tmp, path)


def write_json(obj, path: Path) -> None:
    write_text(json.dumps(finite(obj), indent=2) + "\n", path)


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
    atomic_save(content, Path(folder) / "model.pt")


class Checkpoint(NamedTuple):
    """What a stage left behind."""

    model: GPT | ScalarModel  # in eval mode
    tokenizer: str  # Tokenizer.saved of its vocabulary: what load_tokenizer takes
    task: str  # "tiny" if it was trained on the embedded task, "" on anything else


def model_file(path: str | Path, made_by: str = "") -> Path:
    """A stage's folder, or its model.pt -> model.pt."""
    path = Path(path)
    file = path if path.suffix == ".pt" else path / "model.pt"
    check(file.exists(), f"{file}: no such checkpoint" + (f"; run `{made_by}` first" if made_by else ""))
    return file


def load_model(path: str | Path, device: torch.device, kind: str = "gpt", made_by: str = "") -> Checkpoint:
    """A stage's folder, or its model.pt; as a policy also published weights. kind: "gpt" (a policy) or "scalar" (a
    reward model). Prints what it has read."""
    if kind == "gpt" and is_published(path):
        tokenizer = load_tokenizer(start_vocabulary(path))
        return Checkpoint(load_published(path, tokenizer.n_vocab).to(device).eval(), tokenizer.saved, "")
    file = model_file(path, made_by)
    content = load_file(file)
    try:
        content = dict(content)
        found, tokenizer, config = content["kind"], content["tokenizer"], GPTConfig(**content["config"])
        made = content["made"]
        if found == kind:
            model = GPT(config) if kind == "gpt" else ScalarModel(config)
            model.load_state_dict(content["weights"])
    except (KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{file}: not a checkpoint of this project ({one_line(error)})") from None
    names = {"gpt": "a policy (sft.py, ppo.py, dpo.py)", "scalar": "a reward model (reward_model.py)"}
    check(found == kind, f"{file}: holds {names.get(found, found)}; here {names[kind]} is needed")
    print(f"{file}: made by {made['script']}" + (f" from {made['config']['data']}" if "data" in made["config"] else ""))
    return Checkpoint(model.to(device).eval(), tokenizer, made.get("task", ""))


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
    except (OSError, KeyError, ValueError, RuntimeError) as error:
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
        return load_file(model_file(source))["tokenizer"] if source else "tiny"
    except (UserError, LookupError, TypeError):
        return "tiny"


def load_scorer(path: str | Path, policy: Checkpoint, device: torch.device) -> Checkpoint:
    """A reward model that can read what the policy writes: the same vocabulary, and texts as long."""
    scorer = load_model(path, device, "scalar", "python reward_model.py")
    check_scorer(scorer, path, policy)
    return scorer


def check_scorer(scorer: Checkpoint, path: str | Path, policy: Checkpoint) -> None:
    same = scorer.tokenizer == policy.tokenizer
    reads, writes = vocabulary_name(scorer.tokenizer), vocabulary_name(policy.tokenizer)
    check(same, f"{path} reads {reads} tokens, the policy writes {writes} tokens")
    longest, needed = scorer.model.config.block_size, policy.model.config.block_size
    check(longest >= needed, f"{path} reads texts of {longest} tokens at most, the policy's have up to {needed}")


def check_task(scorer: Checkpoint, path: str, task: str) -> None:
    """The demo's reward model on prompts of one's own gives plausible numbers that mean nothing."""
    foreign = scorer.task == "tiny" and task != "tiny"
    check(not foreign, f"--reward {path} was trained on the embedded task, and the prompts are not of it; name another")


def note_task(policy: Checkpoint, task: str, path: str) -> None:
    """Data of one's own with the demo's policy is rarely meant: say so."""
    if policy.task == "tiny" and task != "tiny":
        print(f"NOTE: the policy was trained on the embedded task, but {path} holds other prompts")


def load_function(spec: str):
    """The function that `file.py:function` names."""
    file, _, name = spec.rpartition(":")
    path = Path(file) if Path(file).exists() else Path(__file__).parent / file  # data/tiny.py is found from any folder
    if not file.endswith(".py") or not path.exists():
        raise UserError(f"{spec!r}: expected file.py:function, and the file to exist")
    # under a name of its own, so that a user's evaluate.py doesn't become this project's
    module_spec = importlib.util.spec_from_file_location(f"loaded_{path.stem}", path)
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_spec.name] = module  # dataclasses look their module up by name
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"{spec!r}: importing {file} failed with {type(error).__name__}: {error}") from error
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
    """Call reward(prompts, completions) -> one number for each completion, and check what came back. A function with a
    parameter `ended` is also told which completions ended by themselves (None: all) and which were cut."""
    told = {}
    if "ended" in inspect.signature(function).parameters:
        told["ended"] = [True] * len(completions) if ended is None else ended
    returned = function(prompts, completions, **told)  # an error in there is the function's: its traceback says where
    try:
        rewards = [float(r) for r in returned]
    except (TypeError, ValueError) as error:
        raise UserError(f"{name} must return one number for each completion ({error})") from error
    n = len(rewards)
    check(n == len(completions), f"{name} returned {n} rewards for {len(completions)} completions")
    check(all(map(math.isfinite, rewards)), f"{name} returned a reward that is not a finite number")
    return rewards


@torch.no_grad()
def score_rollout(model: ScalarModel, rollout: Rollout, rows: int = 64) -> Tensor:
    """The reward model's score of each completion, (B,), `rows` of similar length at a time, cut to the longest."""
    scores = torch.zeros(len(rollout.lens), device=rollout.lens.device)
    for part in rollout.lens.argsort().split(rows):
        lens = rollout.lens[part]
        scores[part] = model.score(rollout.tokens[part, : int(lens.max())], lens)
    return scores


COMBINES = ("sum", "mean", "min", "mean-std")  # one reward from several


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
                rewards.append(weight * torch.tensor(found, device=device))
        parts = torch.stack(rewards)  # (parts, B)
        if combine == "min":
            return parts.amin(0)
        if combine == "mean-std":
            return parts.mean(0) - parts.std(0, correction=0)
        return parts.sum(0) / (sum(weights) if combine == "mean" else 1.0)

    return score, [part for _, part in loaded if isinstance(part, ScalarModel)]


def gold_function(spec: str, task: str) -> Callable | None:
    """The true reward to report beside the trained one, where it is known. "auto": the embedded task's on its
    prompts."""
    if spec == "auto":
        spec = "data/tiny.py:gold_reward" if task == "tiny" else ""
    return load_function(spec) if spec else None


# -------------------------------------------------------------------------------- run folder


# What may differ when a run is resumed: nothing that changes what is learned. More epochs or iterations go on.
MAY_DIFFER = ("out_dir", "resume", "strict", "trace", "device", "log_every", "save_every")
MAY_GROW = ("epochs", "iterations")


class RunFolder:
    """out/<stage>/: config.json, metrics.jsonl as the run goes, state.pt to resume from, model.pt and results.json at
    last.

    A fresh start removes the state and the results of an earlier run; its model.pt stays until there is a new one. With
    --resume the state is read first, and refused if it belongs to another configuration, before anything is written.
    total: the steps of the whole run."""

    def __init__(self, config, total: int):
        warmup = config.warmup
        check(warmup <= total, f"--warmup {warmup} is longer than the whole run, which has {total} steps; lower it")
        self.path = Path(config.out_dir)
        self.config, self.state = config, None
        self.done: dict | None = None  # the results, if the run that is to be resumed has ended already
        self.metrics, self.results = self.path / "metrics.jsonl", self.path / "results.json"
        self.start = time.perf_counter()
        if config.resume:
            file = self.path / "state.pt"
            self.state = load_file(file)
            refuse_another_config(self.state, config, file)
            check(self.metrics.exists(), f"{self.metrics}: gone, and with it the log of the run; start afresh")
            print(f"{file}: {self.state['step']} of {total} steps are done")
            if self.state["step"] >= total and self.results.exists():
                self.done = json.loads(self.results.read_text(encoding="utf-8"))
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--out_dir {self.path}: can't be made a folder ({error.strerror})") from None
        for old in (self.path / "state.pt", self.results):
            old.unlink(missing_ok=True)
        self.metrics.write_text("", encoding="utf-8")
        write_json(dataclasses.asdict(config), self.path / "config.json")

    def log(self, **figures) -> None:
        """Append one JSON object; the file is whole after every line. A loss that is not finite ends the run."""
        for name in ("loss", "policy_loss", "value_loss"):
            loss, step = figures.get(name, 0.0), figures["step"]
            check(math.isfinite(loss), f"the {name} is {loss} at step {step}; lower --lr, or look at {self.metrics}")
        figures = {k: round(v, 6) if isinstance(v, float) else v for k, v in figures.items()}
        with open(self.metrics, "a", encoding="utf-8", newline="\n") as f:
            f.write(json.dumps(finite(figures)) + "\n")

    def history(self, key: str = "step") -> list[dict]:
        """What was logged with this key, by this process and by those that it resumes."""
        rows = [json.loads(line) for line in self.metrics.read_text(encoding="utf-8").splitlines()]
        return [row for row in rows if key in row]

    def save_state(self, step: int, **parts) -> None:
        """All that resuming needs. `parts` are models and optimisers, whose state dicts are kept, and plain values. The
        random streams derive from (seed, step), so the step number is the whole data position; torch's own generators
        are kept for dropout."""
        state = {k: v.state_dict() if hasattr(v, "state_dict") else v for k, v in parts.items()}
        state |= {"step": step, "config": dataclasses.asdict(self.config), "logged": self.metrics.stat().st_size}
        state["rng"] = [torch.get_rng_state()] + ([torch.cuda.get_rng_state()] if torch.cuda.is_available() else [])
        atomic_save(state, self.path / "state.pt")

    def resume(self, **parts) -> dict:
        """With --resume: load the saved state into `parts` and cut the log back to it -> {"step": steps that are done,
        and the plain values}. Without: {"step": 0}."""
        if self.state is None:
            return {"step": 0}
        for name, part in parts.items():
            part.load_state_dict(self.state[name])
        torch.set_rng_state(self.state["rng"][0])
        if torch.cuda.is_available() and len(self.state["rng"]) > 1:
            torch.cuda.set_rng_state(self.state["rng"][1])
        if self.metrics.exists() and self.metrics.stat().st_size > self.state["logged"]:
            os.truncate(self.metrics, self.state["logged"])  # what was logged after the state was saved comes again
        self.results.unlink(missing_ok=True)  # of the shorter run that this one makes longer
        write_json(dataclasses.asdict(self.config), self.path / "config.json")
        return self.state

    def finish(self, results: dict) -> dict:
        results["seconds"] = round(time.perf_counter() - self.start, 2)
        write_json(results, self.results)
        return results


def refuse_another_config(state: dict, config, file: Path) -> None:
    """A state belongs to the run that saved it: under another seed or learning rate the result would be neither
    run's."""
    saved = state.get("config", {}) if isinstance(state, dict) else {}
    for name, value in dataclasses.asdict(config).items():
        if name in MAY_DIFFER or (name in saved and saved[name] == value):
            continue
        if name in MAY_GROW and name in saved and value > saved[name]:
            continue
        raise UserError(
            f"{file} was saved with --{name} {saved.get(name)}, not {value}: resume with that, or start afresh"
        )


# -------------------------------------------------------------------------------- training


def train_last_layers(model: GPT | ScalarModel, n: int) -> None:
    """Freeze all but the last n blocks, the final LayerNorm and a scalar model's own parts: head and, with expectation,
    its block (--train_layers; 0: train everything). The token embedding is the output layer too (tied), so it stays."""
    gpt = model.gpt if isinstance(model, ScalarModel) else model
    check(n <= len(gpt.h), f"--train_layers {n}: the model has {len(gpt.h)} blocks")
    if n:
        gpt.requires_grad_(False)
        for module in [*gpt.h[-n:], gpt.ln_f]:
            module.requires_grad_(True)
        gpt.frozen = len(gpt.h) - n


def share_frozen(model: GPT, policy: GPT) -> None:
    """Let the model have the policy's frozen parameters in the place of its own, if all of them are equal, as in a
    reward model that was trained with the same --train_layers from the same start: less memory, one `trunk` for both.
    Else it has a trunk of its own, of which nobody else knows."""
    own = dict(model.named_parameters())
    frozen = {name: p for name, p in policy.named_parameters() if not p.requires_grad}
    common = all(name in own and torch.equal(own[name], p) for name, p in frozen.items())
    for name, p in frozen.items() if common else ():
        module, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(module), leaf, p)
    model.frozen = policy.frozen if common else 0


def make_reference(policy: GPT) -> GPT:
    """The policy as it is now, never to change: a copy of what will be trained; the rest (--train_layers) is the
    policy's own."""
    return copy.deepcopy(policy, {id(p): p for p in policy.parameters() if not p.requires_grad}).requires_grad_(False)


KEPT_NUMBERS = 2**29  # that keep_trunk may keep: 2 GiB in float32


@torch.no_grad()
def keep_trunk(policy: GPT, items: list[RankedExamples], config) -> None:
    """With --train_layers: what the frozen blocks make of every ranking, once for reference and policy and all epochs.
    Left out if it would take too much memory."""
    if policy.frozen and sum(map(len, items)) * policy.config.n_embd <= KEPT_NUMBERS:
        for part in micro_batches(items, config.micro_batch or 64):
            batch = ranked_batch(part, policy.device)
            with autocast(policy.device, config.dtype):
                below = policy.trunk(batch.tokens, batch.branches)  # (N, T, C)
            for item, kept in zip(part, below, strict=True):
                item.below = kept[: len(item)].clone()


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that --train_layers leaves to the optimiser."""
    return [p for p in model.parameters() if p.requires_grad]


def clip_gradients(model: nn.Module, max_norm: float) -> Tensor:
    """Scale the gradients down to this norm, all together; 0: leave them -> their norm before."""
    return nn.utils.clip_grad_norm_(trainable(model), max_norm or math.inf)


def lr_at(step: int, total: int, warmup: int, kind: str = "cosine", floor: float = 0.0) -> float:
    """Factor on the peak learning rate at step 0..total-1: linear warm-up, then cosine or linear decay to `floor`, or
    constant."""
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, total - warmup)
    if kind == "cosine":
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))
    return floor + (1 - floor) * (1 - done) if kind == "linear" else 1.0


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def due(step: int, every: int, total: int) -> bool:
    """Is something that happens every `every` steps, and at the end, to be done after step 0..total-1? every 0: at the
    end."""
    return step + 1 == total or (every > 0 and (step + 1) % every == 0)


def progress(start: int, total: int, name: str) -> tqdm:
    """The progress bar over the steps that are left."""
    return tqdm(range(start, total), initial=start, total=total, desc=name, mininterval=1)


def prepare_blocks(config, *models: nn.Module) -> None:
    """--recompute and --compile, for all blocks of these models."""
    for block in (module for model in models for module in model.modules() if isinstance(module, Block)):
        block.recompute = config.recompute
    if config.compile:
        compile_blocks(*models)


def compile_blocks(*models: nn.Module) -> None:
    """torch.compile for each block: what is compiled serves them all, and parameter names stay as they are.

    dynamic: every micro-batch has another length, and code made for each would cost more than it saves. So the number
    of graphs doesn't depend on the lengths but on how a block is called: with gradients or without, trained or frozen,
    whole or at chosen positions, filling a cache or reading it; each once more where something has size 1. That is 9 in
    a usual run of ppo.py and at most about 40: more than the 8 at which torch would give up and go on uncompiled.

    On a GPU the decode step could also be one CUDA graph (mode="reduce-overhead"), but that needs a cache that stays at
    one address from one `generate` to the next; ours belongs to the call, and would be recorded anew each time."""
    torch._dynamo.config.cache_size_limit = 64  # the name of recompile_limit that torch 2.6 knows too
    for model in models:
        for module in model.modules():
            if isinstance(module, Block):
                module.compile(dynamic=True)


def sample_prompts(
    policy: GPT, prompts: list[list[int]], tokenizer: Tokenizer, max_new_tokens: int, seed: int
) -> Rollout:
    """Answer the prompts at temperature 1; the end of each that leaves room for an answer."""
    max_new_tokens = min(max_new_tokens, policy.config.block_size - 1)
    prompts = [p[-(policy.config.block_size - max_new_tokens) :] for p in prompts]
    rng = generator_for(policy.device, seed)
    return generate(policy, prompts, max_new_tokens, eos_id=tokenizer.eos_id, generator=rng)


def show_samples(rollout: Rollout, tokenizer: Tokenizer, scores: Tensor | None = None) -> None:
    """Print three prompts with their completions, and scores if there are any."""
    for row, completion in enumerate(rollout.completions()[:3]):
        prompt = rollout.tokens[row, : int(rollout.prompt_lens[row])].tolist()
        score = "" if scores is None else f"[{scores[row].item():+.2f}] "
        tqdm.write(f"  {score}{tokenizer.decode(prompt)!r} -> {tokenizer.decode(completion)!r}")


@torch.no_grad()
def compare_samples(
    policy: GPT, reference: GPT, prompts: list[list[int]], tokenizer: Tokenizer, max_new_tokens: int, seed: int
) -> dict[str, float]:
    """Sample policy and reference: does the policy still stop as often, and how far has it gone? Prints three samples
    and a warning of collapse. KL in nats a sequence, as the mean of log pi/pi_ref over the policy's own samples."""
    rollout, before = (sample_prompts(m, prompts, tokenizer, max_new_tokens, seed) for m in (policy, reference))
    show_samples(rollout, tokenizer)
    sampled = rollout.action_mask  # (B, T-1)
    logprobs, ref_logprobs = (token_logprobs(m, rollout.tokens, mask=sampled) for m in (policy, reference))  # (B, T-1)
    kl = (logprobs - ref_logprobs).sum(1).mean().item()
    eos_rate, ref_eos_rate = (r.ended.float().mean().item() for r in (rollout, before))
    print(
        f"samples: EOS rate {eos_rate:.2f} (reference {ref_eos_rate:.2f}), KL to the reference {kl:.1f} nats a sequence"
    )
    if eos_rate < 0.8 * ref_eos_rate or kl > 25:
        print("WARNING: the policy has collapsed, or is about to; lower --lr, take fewer --epochs, or hold it closer")
    return {"eos_rate": eos_rate, "ref_eos_rate": ref_eos_rate, "kl": kl}


def gate(name: str, value: float, low: float, high: float, note: str = "") -> dict:
    """Did this stage work? Print the figure beside the range that it has at default settings."""
    ok = low <= value <= high
    bounds = f"{low:g} to {high:g}"
    if not math.isfinite(low) or not math.isfinite(high):
        bounds = f"at least {low:g}" if math.isfinite(low) else f"at most {high:g}"
    note = f"; {note}" if note else ""
    print(
        f"GATE {name} {value:.3f} (expected at default settings: {bounds}{note})  {'OK' if ok else 'FAILED'}",
        flush=True,
    )
    return {"name": name, "value": round(value, 4), "low": finite(low), "high": finite(high), "ok": ok}


# -------------------------------------------------------------------------------- what is shown of rollouts


def shares(clock: list[float], names: tuple[str, ...]) -> dict[str, float]:
    """The seconds between the first and the last time of a clock, and each part's share of them."""
    seconds = [b - a for a, b in pairwise(clock)]
    return {"seconds": sum(seconds)} | {f"share_{k}": t / sum(seconds) for k, t in zip(names, seconds, strict=True)}


def rollout_figures(
    experience, completions: list[str], raw_scores: Tensor, scores: Tensor, kl_coef: float
) -> dict[str, float]:
    """The figures of an iteration, of its ppo.Experience; README.md says how to read them. scores (B,): with the
    penalty of cut ones."""
    e, mask = experience, experience.action_mask
    kl = e.kl.sum(1).mean().item()  # the very tensor that went into the reward, nats a sequence
    residual, returns = (e.returns - e.values)[mask], e.returns[mask]
    variance = returns.var(correction=0)
    return {
        "score": raw_scores.mean().item(),
        "kl": kl,
        "k3": e.k3.sum(1).mean().item(),
        "kl_coef": kl_coef,
        "objective": scores.mean().item() - kl_coef * kl,
        "entropy": masked_mean(e.entropy, mask).item(),
        "explained_variance": (1 - residual.var(correction=0) / variance).item() if variance > 0 else 0.0,
        "length": mask.sum(1).float().mean().item(),
        "eos_rate": e.ended.float().mean().item(),
        "distinct": len(set(completions)) / len(completions),
    }


def print_trace(experience, tokenizer: Tokenizer, row: int = 0) -> None:
    """One rollout of a ppo.Experience, token by token."""
    columns = {"logprobs": 8, "ref_logprobs": 12, "kl": 7, "rewards": 7, "values": 7, "advantages": 10, "returns": 7}
    tqdm.write(f"{'token':>14} " + " ".join(f"{name:>{width}}" for name, width in columns.items()))
    for t in experience.action_mask[row].nonzero().squeeze(1).tolist():
        figures = [f"{getattr(experience, name)[row, t].item():{width}.3f}" for name, width in columns.items()]
        token = tokenizer.decode([int(experience.tokens[row, t + 1])])
        tqdm.write(f"{token!r:>14} " + " ".join(figures))


def last_quarter(history: list[dict], expected: tuple) -> dict:
    """Means over the last quarter of a run, and gates: expected holds (figure, name, from, to)."""
    tail = history[-max(1, len(history) // 4) :]
    shown = [k for k in ("score", "kl", "k3", "eos_rate", "distinct", "length", "gold") if k in tail[0]]
    results = {k: sum(row[k] for row in tail) / len(tail) for k in shown}
    print("last quarter (first iteration): " + ", ".join(f"{k} {results[k]:.2f} ({history[0][k]:.2f})" for k in shown))
    return {**results, "gates": [gate(name, results[key], low, high) for key, name, low, high in expected]}
