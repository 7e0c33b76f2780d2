"""How to start every stage small, in the toy language of helpers.py, and what can be seen of a run from outside: the
steps of its optimisers, the passes of its networks, what its reward function was asked, and its files."""

from __future__ import annotations

import copy
import os
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
import torch
from helpers import EOS, RANKINGS, TOY, checkpoint, make_gpt, own_pairs, read_lines, task_rankings, write_lines
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_pre_hook

import dpo
import grpo
import ppo
import reward_model
import sft
from data.tokenizer import load_tokenizer
from lib.checkpoint import load_file, load_model, save_model
from model import GPT, Block, ScalarModel
from sampling import Rollout

CPU = torch.device("cpu")

LEAN = 0.5  # of the policy towards EOS
PROMPTS = ["a", "bcd", "efghi", "jw", "wkl", "mnopqrs", "t", "uv"]  # w is the EOS id
DEMONSTRATIONS = [("ab", "c"), ("b", "cdefghij"), ("cde", "ab"), ("wf", "gh")]
DEMONSTRATIONS += [("g", "hijk"), ("abcdef", "g"), ("hi", "jklmno"), ("k", "a")]


def demonstrations(pairs: list[tuple[str, str]]) -> list[dict]:
    return [{"prompt": p, "completion": c} for p, c in pairs]


# A file of reward functions. Every one of them writes down what it was asked: see `asked`.
REWARDS = '''
import json
from pathlib import Path

import torch


def note(name, prompts, completions, ended):
    row = {"function": name, "prompts": prompts, "completions": completions, "ended": ended}
    row["autocast"] = torch.is_autocast_enabled("cpu")
    with open(Path(__file__).with_name("asked.jsonl"), "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\\n")


def letters(prompts, completions, ended):
    """0.1 a letter of the prompt, 1 for every "a" of the completion."""
    note("letters", prompts, completions, ended)
    return [c.count("a") + 0.1 * len(p) for p, c in zip(prompts, completions)]


def variety(prompts, completions, ended):
    """Different letters of the completion, and 0.5 for its end."""
    note("variety", prompts, completions, ended)
    return [len(set(c)) + 0.5 * e for c, e in zip(completions, ended)]


def stops(prompts, completions, ended):
    note("stops", prompts, completions, ended)
    return ended


def same(prompts, completions, ended):
    note("same", prompts, completions, ended)
    return [1.0] * len(completions)
'''


def reward_file(folder: Path) -> str:
    path = folder / "toy_rewards.py"
    path.write_text(REWARDS, encoding="utf-8")
    return str(path)


class Asked(NamedTuple):
    """One call of a reward function."""

    function: str
    prompts: list[str]
    completions: list[str]
    ended: list[bool]
    autocast: bool  # was it called within autocast?

    def rollout(self) -> Rollout:
        """The texts as ids, with EOS behind what has ended."""
        prompts = [TOY.encode(p) for p in self.prompts]
        rows = zip(prompts, map(TOY.encode, self.completions), self.ended, strict=True)
        texts = [prompt + completion + [EOS] * ended for prompt, completion, ended in rows]
        lens = [len(text) for text in texts]
        tokens = torch.tensor([text + [EOS] * (max(lens) - len(text)) for text in texts])
        return Rollout(tokens, torch.tensor([len(p) for p in prompts]), torch.tensor(lens), torch.tensor(self.ended))


def asked(folder: Path, function: str = "letters") -> list[Asked]:
    """What the reward functions of this folder were asked, call after call: one call an iteration."""
    rows = read_lines(folder / "asked.jsonl")
    return [Asked(**row) for row in rows if row["function"] == function]


# ------------------------------------------------------------------------------------------------ the table


@dataclass
class Stage:
    """How to start a training stage small, and what is different in it."""

    module: ModuleType
    settings: dict  # of a run that takes less than a second
    optimiser: tuple  # its class, betas and eps, and each group's decay under --weight_decay 0.3, if it has that flag
    rows: list[dict]  # what it learns from
    gates: int = 3  # how many it has on the embedded task
    kind: str = "gpt"  # what it trains: a policy, or a "scalar" model
    start: str = "policy"  # the flag of the checkpoint that it starts from
    rates: tuple[str, ...] = ("lr",)  # the flags of its learning rates, one for each network
    decay: str = "linear"  # of these, after the warm-up
    dropout: bool = False  # does it train with dropout?
    reference: bool = False  # has it a frozen copy of its start?
    rollouts: bool = False  # does it learn from its own samples, by --prompts, --iterations, --minibatch, --ppo_epochs?

    @property
    def data(self) -> str:
        """The flag of the file that it learns from."""
        return "prompts" if self.rollouts else "data"

    @property
    def longer(self) -> str:
        """The flag that makes a run longer."""
        return "iterations" if self.rollouts else "epochs"


SAMPLING = {"reward": "FOLDER/toy_rewards.py:letters", "iterations": 3, "rollouts": 12, "max_new_tokens": 7}
SAMPLING |= {"temperature": 0.7, "minibatch": 5, "micro_batch": 2, "lr": 3e-3, "eos_penalty": 1.5, "kl_coef": 0.2}
PROMPT_ROWS = [{"prompt": p} for p in PROMPTS]
STAGES = {
    "sft": Stage(
        sft,
        {"batch_size": 8, "weight_decay": 0.0, "lr": 0.1, "epochs": 1, "tokenizer": "toy"},
        ("AdamW", (0.9, 0.99), 1e-8, [0.3, 0.0]),  # matrices alone decay
        demonstrations(DEMONSTRATIONS),
        gates=2,
        start="init",
        decay="cosine",
        dropout=True,
    ),
    "reward_model": Stage(
        reward_model,
        {"batch_size": 8, "weight_decay": 0.0, "lr": 0.02, "max_new_tokens": 6, "normalise_samples": 8},
        ("AdamW", (0.9, 0.99), 1e-8, [0.3]),
        RANKINGS,
        kind="scalar",
        dropout=True,
    ),
    "ppo": Stage(
        ppo,
        {**SAMPLING, "ppo_epochs": 2, "value_lr": 3e-3, "lam": 0.95, "value_clip": 0.5, "stop_kl": 0.0},
        ("Adam", (0.9, 0.999), 1e-5, [0.0, 0.0]),  # policy and value model
        PROMPT_ROWS,
        rates=("lr", "value_lr"),
        reference=True,
        rollouts=True,
    ),
    "grpo": Stage(
        grpo,
        {**SAMPLING, "ppo_epochs": 2, "group": 4},
        ("Adam", (0.9, 0.999), 1e-5, [0.0]),
        PROMPT_ROWS,
        reference=True,
        rollouts=True,
    ),
    "dpo": Stage(
        dpo,
        {"batch_size": 8, "lr": 0.02, "max_new_tokens": 6, "beta": 0.1},
        ("AdamW", (0.9, 0.99), 1e-8, [0.0]),
        RANKINGS,
        reference=True,
    ),
}


def toy_policy(seed: int = 1, **sizes) -> GPT:
    """What the stages start from unless told otherwise. It leans towards EOS: some of its texts end, some are cut."""
    policy = make_gpt(seed, **{"block_size": 24, **sizes})
    with torch.no_grad():
        policy.ln_f.bias += LEAN * policy.wte.weight[EOS]
    return policy


def steady_policy(logits: list[float], block_size: int = 24) -> GPT:
    """A policy whose next token has these logits, whatever was written before."""
    policy = make_gpt(0, block_size=block_size)
    with torch.no_grad():
        policy.ln_f.weight.zero_()
        direction = policy.ln_f.bias / policy.ln_f.bias.norm() ** 2
        policy.wte.weight.copy_(torch.tensor(logits)[:, None] * direction)
    return policy


def eos_lover(seed: int = 0, **sizes) -> GPT:
    """A policy that ends every text at once."""
    policy = make_gpt(seed, **{"block_size": 24, **sizes})
    with torch.no_grad():
        policy.ln_f.weight.zero_()
        policy.wte.weight[EOS] = 100 * policy.ln_f.bias / policy.ln_f.bias.norm() ** 2
    return policy


def settings(name: str, folder: Path, model=None, rows=None, held_out=None, **changes) -> dict:
    """The fields of the stage's Config for a small run in this folder, whose files are written. model: what it starts
    from; rows, held_out: what it learns from and what is held out (none unless given)."""
    stage = STAGES[name]
    folder.mkdir(parents=True, exist_ok=True)
    reward_file(folder)
    rows = stage.rows if rows is None else rows
    made = {k: v.replace("FOLDER", str(folder)) if isinstance(v, str) else v for k, v in stage.settings.items()}
    made |= {stage.data: write_lines(folder / f"{stage.data}.jsonl", rows), "out_dir": str(folder / "out")}
    made |= {"warmup": 0, "grad_clip": 0.0, "log_every": 1, "device": "cpu"}
    if stage.start not in changes:
        made[stage.start] = checkpoint(folder / "start", model if model is not None else toy_policy())
    if not stage.rollouts:
        made["held_out_data"] = write_lines(folder / "held_out.jsonl", held_out) if held_out else ""
    if name == "reward_model":
        made["prompts"] = write_lines(folder / "prompts.jsonl", [{"prompt": p} for p in "abcdefgh"])
    return {**made, **changes}


TIMING = {"seconds", "share_rollout", "share_score", "share_update", "tokens_per_s"}


def same_figures(rows: list[dict]) -> list[dict]:
    """Rows of a log, or results, without what the clock says."""
    return [{k: v for k, v in row.items() if k not in TIMING} for row in rows]


class Ran(NamedTuple):
    results: dict
    model: GPT | ScalarModel  # what was trained, as it was saved
    log: list[dict]


def run(name: str, folder: Path, model=None, rows=None, held_out=None, **changes) -> Ran:
    """A small run of the stage -> what it left."""
    made = settings(name, folder, model, rows, held_out, **changes)
    module = STAGES[name].module
    results = module.train(module.Config(**made))
    out = Path(made["out_dir"])
    return Ran(results, load_model(out, CPU, STAGES[name].kind).model, read_lines(out / "metrics.jsonl"))


def on_task(stage: str, folder: Path, own: bool, vocabulary: str) -> dict:
    """The arguments of `run` for data of the embedded task, or of one's own, in this vocabulary, from a policy that was
    trained on the embedded task."""
    policy = make_gpt(14, vocab=load_tokenizer(vocabulary).n_vocab, block_size=192, n_layer=1, n_embd=16)
    save_model(folder / "policy", policy, vocabulary, "sft.py", sft.Config(), "tiny")
    rows, held_out = (
        (own_pairs(4, gold=True), own_pairs(2, 4, gold=True)) if own else (task_rankings(4), task_rankings(2, 2))
    )
    changes = {STAGES[stage].start: str(folder / "policy"), "lr": 0.0}
    if stage == "sft":
        changes["tokenizer"] = "auto"
        texts = [[(row["prompt"], row["completions"][0]) for row in some] for some in (rows, held_out)]
        rows, held_out = map(demonstrations, texts)
    if STAGES[stage].rollouts:
        rows, held_out = [{"prompt": row["prompt"]} for row in rows], None
        changes |= {"iterations": 1, "reward": str(folder / "rm")}
        scorer = ScalarModel.from_gpt(policy)
        save_model(folder / "rm", scorer, vocabulary, "reward_model.py", sft.Config(), "" if own else "tiny")
    if stage == "reward_model":
        changes["normalise_samples"] = 2
    return {"rows": rows, "held_out": held_out, **changes}


class Killed(Exception):
    pass


def die_after_state(stage: str, folder, step: int, **changes) -> None:
    """A run that is killed as soon as the state after this step is saved."""
    replace = os.replace

    def replace_and_die(source, target):
        replace(source, target)
        if str(target).endswith("state.pt") and load_file(target)["step"] == step:
            raise Killed

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(os, "replace", replace_and_die)
        run(stage, folder, **changes)


# ------------------------------------------------------------------------------------------------ what can be seen


@dataclass
class Step:
    """What an optimiser has in its hands at the moment of a step."""

    optimizer: torch.optim.Optimizer
    rates: list[float]  # of its groups
    norms: list[float]  # of the gradients of each group
    weights: list[list[Tensor]]  # copies, of each group
    passes: int  # of networks, until now

    @property
    def norm(self) -> float:
        """Of all gradients together."""
        return sum(n * n for n in self.norms) ** 0.5


@dataclass
class Pass:
    """A forward pass of a whole network."""

    network: nn.Module  # a GPT or a ScalarModel
    tokens: Tensor  # (B, T)
    training: bool  # with gradients
    dropout: bool  # in training mode

    def texts(self) -> list[str]:
        """The rows, without the EOS at their end and behind it."""
        rows = []
        for row in self.tokens.tolist():
            while row and row[-1] == EOS:
                row.pop()
            rows.append(TOY.decode(row))
        return rows


class Watch:
    """The steps and passes of all that runs while `watching` lasts."""

    def __init__(self):
        self.steps: list[Step] = []
        self.passes: list[Pass] = []
        self.products: dict[bool, set] = {True: set(), False: set()}  # dtypes in blocks, with gradients and without
        self.block_runs: list[tuple[Block, bool]] = []  # every forward pass of a block; with gradients?

    def training(self, kind: type = nn.Module) -> list[Pass]:
        return [p for p in self.passes if p.training and isinstance(p.network, kind)]

    def at(self, number: int, kind: type = GPT) -> nn.Module:
        """The network of this kind that is trained, as it was before this step."""
        network = next(p.network for p in self.training(kind))
        step, names = self.steps[number], {id(p): name for name, p in network.named_parameters()}
        before = copy.deepcopy(network)
        groups = zip(step.optimizer.param_groups, step.weights, strict=True)
        for p, weights in (pair for group, kept in groups for pair in zip(group["params"], kept, strict=True)):
            if id(p) in names:
                before.get_parameter(names[id(p)]).data.copy_(weights)
        return before.requires_grad_(False)

    def of_step(self, number: int, kind: type = nn.Module) -> list[Pass]:
        """The passes with gradients since the step before."""
        first = self.steps[number - 1].passes if number else 0
        there = self.passes[first : self.steps[number].passes]
        return [p for p in there if p.training and isinstance(p.network, kind)]


def square_sum(tensors: list[Tensor]) -> float:
    return sum(t.double().pow(2).sum().item() for t in tensors)


@contextmanager
def watching():
    """Watch what torch is asked to do. The hooks are torch's own and see everything that runs, whoever calls it."""
    watch = Watch()

    def before_step(optimizer, args, kwargs):
        groups = [group["params"] for group in optimizer.param_groups]
        watch.steps.append(
            Step(
                optimizer,
                [group["lr"] for group in optimizer.param_groups],
                [square_sum([p.grad for p in group if p.grad is not None]) ** 0.5 for group in groups],
                [[p.detach().clone() for p in group] for group in groups],
                len(watch.passes),
            )
        )

    def before_pass(module, args):
        if isinstance(module, Block):
            watch.block_runs.append((module, torch.is_grad_enabled()))

    def after_pass(module, args, output):
        if isinstance(module, GPT | ScalarModel):
            dropout = any(m.training for m in module.modules())
            watch.passes.append(Pass(module, args[0].clone(), torch.is_grad_enabled(), dropout))
        elif isinstance(module, nn.Linear) and module.out_features > 1:
            watch.products[torch.is_grad_enabled()].add(output.dtype)

    handles = [register_optimizer_step_pre_hook(before_step), register_module_forward_pre_hook(before_pass)]
    handles.append(register_module_forward_hook(after_pass))
    try:
        yield watch
    finally:
        for handle in handles:
            handle.remove()
