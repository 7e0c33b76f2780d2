"""What the stages start from: networks, data, rewards.

`start_network` is sft.py's, `load_policy` and `load_preferences` are those of the stages that learn from rankings, and
`set_up` is all that a stage needs that samples and scores: ppo.py, grpo.py, and any other that learns from a reward.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from data.batches import Example, RankedExamples, contrast_rankings, encode_prompts, load_examples, load_rankings
from data.files import held_out_twin, prompts_beside, read_prompts
from data.tiny import annotators_bayes_accuracy, task_of
from data.tokenizer import Tokenizer, load_tokenizer, vocabulary_name
from frozen import choose_trainable, make_reference, share_frozen
from lib.checkpoint import Checkpoint, is_published, load_model, load_published, note_task, start_vocabulary
from lib.cli import TrainConfig, UserError, check, flag
from lib.reward import COMBINES, gold_function, load_reward
from lib.train import pick_device, prepare_blocks
from model import GPT, LLAMA, GPTConfig, ScalarModel
from sampling import Rollout

# -------------------------------------------------------------------------------- demonstrations: sft.py


def start_network(config) -> tuple[GPT, Tokenizer]:
    """The network that sft.py trains, and the vocabulary of its texts. config: sft.Config."""
    device = pick_device(config.device)
    vocabulary = start_vocabulary(config.init) if config.tokenizer == "auto" else config.tokenizer
    tokenizer = load_tokenizer(vocabulary, config.template)
    torch.manual_seed(config.seed)  # weights and dropout
    return initial_model(config, tokenizer.n_vocab, device), tokenizer


def initial_model(config, n_vocab: int, device: torch.device) -> GPT:
    """From scratch, from published weights, or from a checkpoint; every start has the tokenizer's vocabulary."""
    if not config.init:
        sizes = (n_vocab, config.block_size or 96, config.n_layer, config.n_head, config.n_embd)
        llama = {**LLAMA, "n_inner": 8 * round(config.n_embd / 3)} if config.block == "llama" else {}
        try:
            return GPT(GPTConfig(*sizes, config.dropout, rope_base=config.rope_base, **llama)).to(device)
        except ValueError as error:
            raise UserError(str(error)) from None
    for name in ("n_layer", "n_head", "n_embd", "block", "rope_base"):
        own = getattr(config, name) != getattr(type(config), name)
        check(not own, f"--{name} is for a model from scratch; {config.init} has its own")
    if is_published(config.init):
        model = load_published(config.init, n_vocab, config.block_size)
    else:
        model, vocabulary, _ = load_model(config.init, device)
        same = config.tokenizer in ("auto", vocabulary)
        check(same, f"--init {config.init} was trained with --tokenizer {vocabulary_name(vocabulary)}")
        own = model.config.block_size
        fits = config.block_size in (0, own)
        check(fits, f"--block_size {config.block_size}: {config.init} has a block size of {own}")
    for part in [model.config, *(m for m in model.modules() if hasattr(m, "dropout"))]:
        part.dropout = config.dropout
    return model.to(device)


class Demonstrations(NamedTuple):
    items: list[Example]
    held_out: list[Example]
    task: str  # "tiny": they are the embedded task's; "": they are not


def load_demonstrations(config, tokenizer: Tokenizer, block_size: int) -> Demonstrations:
    """The demonstrations of config.data, and those that are held out."""
    files = (config.data, held_out_twin(config.data, config.held_out_data))
    items, held_out = (load_examples(file, tokenizer, block_size, "python -m data.tiny") for file in files)
    return Demonstrations(items, held_out, task_of(config.data))


# -------------------------------------------------------------------------------- rankings: reward_model.py, dpo.py


def load_policy(config) -> Checkpoint:
    """The policy of config.policy, trainable as --train_layers says, on the device, and torch's generators seeded."""
    device = pick_device(config.device)
    torch.manual_seed(config.seed)
    start = load_model(config.policy, device, made_by="python sft.py")
    choose_trainable(start.model, config)
    return start


@dataclass
class Preferences:
    items: list[RankedExamples]
    held_out: list[RankedExamples]
    task: str  # "tiny": they are the embedded task's; "": they are not
    held_out_file: str
    start: Checkpoint

    # Only the reward model is judged by these two, so they are made when it asks.

    @cached_property
    def bayes_accuracy(self) -> float | None:
        """The best possible accuracy on the held-out rankings, where the annotators' noise is known."""
        return annotators_bayes_accuracy(self.held_out_file) if self.held_out else None

    @cached_property
    def contrasts(self) -> dict[str, list[RankedExamples]]:
        """Pairs that differ in one respect, for held-out prompts of the embedded task; {} for others."""
        if self.held_out and self.task == task_of(self.held_out_file) == "tiny":
            prompts = read_prompts(self.held_out_file)[:400]
            return contrast_rankings(prompts, self.start.tokenizer, self.start.model.config.block_size)
        return {}


def load_preferences(config, start: Checkpoint) -> Preferences:
    """The rankings of config.data, and those that are held out."""
    made_by, block_size = "python collect.py", start.model.config.block_size
    items = load_rankings(config.data, start.tokenizer, block_size, made_by)
    path, task = held_out_twin(config.data, config.held_out_data), task_of(config.data)
    held_out = load_rankings(path, start.tokenizer, block_size, made_by)
    note_task(start, task, config.data)
    return Preferences(items, held_out, task, path, start)


def sampling_prompts(config, start: Checkpoint, max_new_tokens: int) -> list[list[int]]:
    """Prompts for the config.normalise_samples samples that set a reward model's normalisation, some of them several
    times where there are too few. Of answers to prompts that it has learned from it is too sure, so it gets others,
    where there are others."""
    path, learned = prompts_beside(config.data, config.prompts), set(read_prompts(config.data))
    found = read_prompts(path)
    texts = [p for p in found if p not in learned] or found
    block_size = start.model.config.block_size
    n = config.normalise_samples
    ids = encode_prompts(texts[-n:], start.tokenizer, block_size, max_new_tokens, path)
    return (ids * n)[:n]


# -------------------------------------------------------------------------------- rewards: ppo.py, grpo.py


@dataclass
class RewardConfig(TrainConfig):
    """The flags that stages with a reward share."""

    prompts: str = flag("out/data/prompts.jsonl", "prompts to practise on")
    policy: str = flag("out/sft", "checkpoint to start from; its frozen copy is the reference")
    reward: list[str] = flag(["out/reward_model"], "reward models' checkpoints or file.py:function, one or several")
    reward_weights: list[float] = flag([], "factor of each reward (none: 1 each)")
    reward_combine: str = flag("sum", "one reward from several, after weighting", choices=COMBINES)
    rollouts: int = flag(192, "completions sampled each iteration", low=1)
    max_new_tokens: int = flag(48, "longest completion, tokens", low=1)
    temperature: float = flag(1.0, "of sampling; the log-probs of policy and reference are taken at it too", above=0)
    minibatch: int = flag(48, "rollouts an optimiser step", low=1)
    micro_batch: int = flag(24, "rollouts a forward pass; changes memory and nothing else (0: the minibatch)", low=0)
    eos_penalty: float = flag(1.0, "subtracted from the score of a completion that was cut before EOS", low=0)
    gold: str = flag("auto", "true reward to log, file.py:function (auto: the embedded task's; empty: none)")
    log_every: int = flag(10, "iterations between printed samples", low=1)

    def __post_init__(self):
        self.reward = [self.reward] if isinstance(self.reward, str) else self.reward
        super().__post_init__()

    def may_trim(self, device: torch.device) -> bool:
        """May rows be trimmed to the longest of their micro-batch? Not on a GPU, whose compiled kernels want equal
        shapes; nor in bfloat16, where attention over another width rounds differently: up to 0.01 of a log-prob."""
        return device.type != "cuda" and self.dtype == "float32"

    def exact_products(self, device: torch.device) -> bool:
        """Are matrix products right to float32? A GPU takes TensorFloat-32, which keeps three digits (pick_device)."""
        tf32 = device.type == "cuda" and torch.get_float32_matmul_precision() != "highest"
        return self.dtype == "float32" and not tf32


class Start(NamedTuple):
    policy: GPT  # to be trained
    reference: GPT  # the policy as it is now, never to change
    tokenizer: Tokenizer
    task: str  # "tiny": the prompts are the embedded task's; "": they are not
    texts: list[str]  # the prompts
    prompts: list[list[int]]  # the same as ids, each with room for max_new_tokens behind it
    score: Callable[[Rollout, list[str], list[str]], Tensor]  # (rollout, prompts, completions) -> (B,)
    reward_models: list[ScalarModel]  # those among the rewards
    gold: Callable | None  # the true reward, where it is known
    usual: bool  # a single reward model judges the embedded task: gates hold


def set_up(config: RewardConfig) -> Start:
    check(config.minibatch <= config.rollouts, f"--minibatch must be at most --rollouts ({config.rollouts})")
    loaded = load_policy(config)
    policy, tokenizer = loaded.model, loaded.tokenizer
    reference = make_reference(policy)
    texts, task = read_prompts(config.prompts, "python -m data.tiny"), task_of(config.prompts)
    note_task(loaded, task, config.prompts)
    mix = {"weights": config.reward_weights, "combine": config.reward_combine, "dtype": config.dtype}
    score, reward_models = load_reward(config.reward, loaded, task, policy.device, **mix)
    for model in reward_models:
        share_frozen(model.gpt, policy)
    gold = gold_function(config.gold, task)
    prompts = encode_prompts(texts, tokenizer, policy.config.block_size, config.max_new_tokens, config.prompts)
    prepare_blocks(config, policy, reference)
    usual = task == "tiny" and len(reward_models) == len(config.reward) == 1 and not config.reward_weights
    return Start(policy, reference, tokenizer, task, texts, prompts, score, reward_models, gold, usual)
