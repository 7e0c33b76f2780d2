"""Plumbing that every script shares, and nothing about RLHF: device, seed, checkpoints, run folders, rewards, samples,
gates."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from cli import UserError, check, first_line
from data.tokenizer import Tokenizer
from model import GPT, GPTConfig, Rollout, ScalarModel, generate

# ------------------------------------------------------------------------------------------------ device, dtype, seed


def pick_device(name: str) -> torch.device:
    """auto" takes the GPU where there is one, then Apple's, then the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name} can't be used here: {first_line(error)}") from None
    torch.set_float32_matmul_precision("high")  # TensorFloat-32 where the GPU has it; no effect on a CPU
    return torch.device(name)


def autocast(device: torch.device, dtype: str):
    """Context for the forward pass: weights stay float32, matrix products run in `dtype`."""
    if dtype == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


def generator_for(device: torch.device, *key: int) -> torch.Generator:
    """A random generator for one purpose, e.g. (seed, epoch): independent of what else was drawn before."""
    seed = 0
    for k in key:
        seed = (seed * 1_000_003 + k + 1) % (2**63 - 1)
    return torch.Generator(device=device).manual_seed(seed)


# ------------------------------------------------------------------------------------------------ files


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


def write_json(obj, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(path.name + ".tmp")
    tmp.write_text(json.dumps(finite(obj), indent=2) + "\n", encoding="utf-8")
    os.replace(tmp, path)


def load_file(path: str | Path, map_location="cpu") -> dict:
    """torch.load that unpickles tensors and plain Python only (weights_only=True), with one-line errors."""
    try:
        return torch.load(path, map_location=map_location, weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except Exception as error:  # torch raises many kinds for a damaged file
        raise UserError(f"{path}: not a checkpoint that can be loaded ({first_line(error)})") from None


def save_model(folder: str | Path, model: GPT | ScalarModel, tokenizer_name: str, script: str, config) -> None:
    """out/<stage>/model.pt: weights, shape, tokenizer and how it was made; tensors and plain Python only."""
    kind = "scalar" if isinstance(model, ScalarModel) else "gpt"
    made = {"script": script, "config": dataclasses.asdict(config)}
    content = {
        "kind": kind,
        "config": dataclasses.asdict(model.config),
        "tokenizer": tokenizer_name,
        "made": made,
        "weights": model.state_dict(),
    }
    atomic_save(content, Path(folder) / "model.pt")


def load_model(
    path: str | Path, device: torch.device, kind: str = "gpt", made_by: str = ""
) -> tuple[GPT | ScalarModel, str]:
    """A stage's folder, or its model.pt -> (model in eval mode, name of its tokenizer). kind: "gpt" or "scalar"."""
    path = Path(path)
    file = path if path.suffix == ".pt" else path / "model.pt"
    if not file.exists():
        raise UserError(f"{file}: no such checkpoint" + (f"; run `{made_by}` first" if made_by else ""))
    content = load_file(file)
    try:
        content = dict(content)
        found, tokenizer, config = content["kind"], content["tokenizer"], GPTConfig(**content["config"])
        if found == kind:
            model = GPT(config) if kind == "gpt" else ScalarModel(config)
            model.load_state_dict(content["weights"])
    except (KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{file}: not a checkpoint of this project ({first_line(error)})") from None
    if found != kind:
        names = {"gpt": "a policy (sft.py, ppo.py, dpo.py)", "scalar": "a reward model (reward_model.py)"}
        raise UserError(f"{file}: holds {names.get(found, found)}; here {names[kind]} is needed")
    return model.to(device).eval(), tokenizer


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


def call_reward(function, prompts: list[str], completions: list[str], name: str = "the reward function") -> list[float]:
    """Call reward(prompts, completions) -> list of floats, and check what came back."""
    returned = function(prompts, completions)  # an error in there is a bug of the function's: its traceback says where
    try:
        rewards = [float(r) for r in returned]
    except (TypeError, ValueError) as error:
        raise UserError(f"{name} must return one number for each completion ({error})") from error
    n = len(rewards)
    check(n == len(completions), f"{name} returned {n} rewards for {len(completions)} completions")
    check(all(map(math.isfinite, rewards)), f"{name} returned a reward that is not a finite number")
    return rewards


def load_reward(
    spec: str, tokenizer: Tokenizer, device
) -> tuple[Callable[[Rollout, list[str], list[str]], Tensor], ScalarModel | None]:
    """A checkpoint or file.py:function -> (score(rollout, prompts, completions) -> (B,), the reward model if it is
    one). A reward model reads the very ids that the policy wrote; a function reads text."""
    if ":" in spec and ".py" in spec:
        function = load_function(spec)
        return lambda rollout, prompts, completions: torch.tensor(
            call_reward(function, prompts, completions, spec), device=device
        ), None
    model, name = load_model(spec, device, "scalar", "python reward_model.py")
    check(name == tokenizer.name, f"--reward {spec} reads {name} tokens, the policy writes {tokenizer.name} tokens")
    return lambda rollout, prompts, completions: score_rollout(model, rollout), model


@torch.no_grad()
def score_rollout(model: ScalarModel, rollout: Rollout, rows: int = 64) -> Tensor:
    """The reward model's score of each completion, (B,), `rows` at a time, each slice cut to its longest row."""
    parts = zip(rollout.tokens.split(rows), rollout.lens.split(rows), strict=True)
    return torch.cat([model.score(tokens[:, : int(lens.max())], lens) for tokens, lens in parts])


def gold_function(spec: str, tokenizer_name: str):
    """The task's true reward to report beside the trained one. "auto": the embedded task's where its vocabulary is
    used."""
    if spec == "auto":
        spec = "data/tiny.py:gold_reward" if tokenizer_name == "tiny" else ""
    return load_function(spec) if spec else None


# ------------------------------------------------------------------------------------------------ run folder


class RunFolder:
    """out/<stage>/: config.json at the start, metrics.jsonl as the run goes, state.pt to resume from, results.json at
    the end."""

    def __init__(self, config):
        self.config = config
        self.path = Path(config.out_dir)
        self.path.mkdir(parents=True, exist_ok=True)
        write_json(dataclasses.asdict(config), self.path / "config.json")
        self.metrics = self.path / "metrics.jsonl"
        self.start = time.perf_counter()
        if not config.resume:
            self.metrics.write_text("", encoding="utf-8")
            (self.path / "results.json").unlink(missing_ok=True)

    def log(self, **figures) -> None:
        """Append one JSON object; the file is whole after every line."""
        figures = {k: round(v, 6) if isinstance(v, float) else v for k, v in figures.items()}
        with open(self.metrics, "a", encoding="utf-8") as f:
            f.write(json.dumps(finite(figures)) + "\n")

    def save_state(self, step: int, **parts) -> None:
        """`parts` are models and optimisers, whose state dicts are kept, and plain values. The random streams derive
        from (seed, step), so the step number is the whole data position; torch's own generator is kept for dropout."""
        parts = {k: v.state_dict() if hasattr(v, "state_dict") else v for k, v in parts.items()}
        atomic_save({"step": step, "rng": torch.get_rng_state(), **parts}, self.path / "state.pt")

    def resume(self, device, **parts) -> dict:
        """With --resume: load the saved state into `parts`, cut the log back to it -> {"step": steps done, plain
        values}. Without: {"step": 0}."""
        if not self.config.resume:
            return {"step": 0}
        state = load_file(self.path / "state.pt", map_location=device)
        for name, part in parts.items():
            part.load_state_dict(state.pop(name))
        torch.set_rng_state(state.pop("rng").cpu())
        lines = self.metrics.read_text(encoding="utf-8").splitlines() if self.metrics.exists() else []
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= state["step"]]
        self.metrics.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        return state

    def finish(self, results: dict) -> dict:
        results["seconds"] = round(time.perf_counter() - self.start, 2)
        write_json(results, self.path / "results.json")
        return results


# ------------------------------------------------------------------------------------------------ training odds and
# ends


def train_last_layers(model: GPT | ScalarModel, n: int) -> None:
    """Freeze all but the last n blocks, the final LayerNorm and a scalar head (--train_layers; 0: train everything).
    The token embedding is the output layer too (tied), so it stays."""
    gpt = model.gpt if isinstance(model, ScalarModel) else model
    check(n <= len(gpt.h), f"--train_layers {n}: the model has {len(gpt.h)} blocks")
    if n:
        gpt.requires_grad_(False)
        for module in [*gpt.h[-n:], gpt.ln_f]:
            module.requires_grad_(True)


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


def compile_blocks(*models: nn.Module) -> None:
    """torch.compile for each block: one compiled graph serves them all, and parameter names stay as they are."""
    for model in models:
        for block in getattr(model, "gpt", model).h:
            block.compile()


def show_samples(policy: GPT, prompts: list[list[int]], tokenizer: Tokenizer, max_new_tokens: int, seed: int) -> float:
    """Answer the prompts at temperature 1, print three answers -> share that ended in EOS."""
    block_size = policy.config.block_size
    max_new_tokens = min(max_new_tokens, block_size - 1)
    prompts = [p[-(block_size - max_new_tokens) :] for p in prompts]
    rollout = generate(
        policy, prompts, max_new_tokens, eos_id=tokenizer.eos_id, generator=generator_for(policy.device, seed)
    )
    for prompt, completion in list(zip(prompts, rollout.completions(), strict=True))[:3]:
        tqdm.write(f"  {tokenizer.decode(prompt)!r} -> {tokenizer.decode(completion)!r}")
    return rollout.ended.float().mean().item()


def gate(name: str, value: float, low: float, high: float, note: str = "") -> dict:
    """Did this stage work? Print the figure beside its expected range."""
    ok = low <= value <= high
    if math.isfinite(low) and math.isfinite(high):
        expected = f"expected {low:g}-{high:g}"
    else:
        expected = f"expected at least {low:g}" if math.isfinite(low) else f"expected at most {high:g}"
    print(f"GATE {name} {value:.3f} ({expected}{'; ' + note if note else ''})  {'OK' if ok else 'FAILED'}", flush=True)
    return {"name": name, "value": round(value, 4), "low": finite(low), "high": finite(high), "ok": ok}
