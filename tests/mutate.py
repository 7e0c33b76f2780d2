"""Do the tests notice? Put one small, realistic bug at a time into a copy of the project: does a test turn red?

    python tests/mutate.py                 # all mutations, two at a time; exit status 1 if one survives
    python tests/mutate.py kl eos          # only those whose file, code or effect mentions kl or eos
    python tests/mutate.py 12 40-45        # only those with these numbers
    python tests/mutate.py --list          # what they are

Each mutation is a line of code that somebody has really written, or could have, and one line on what it would do to a
training run. Most of these runs would not crash: the loss goes down, the curves look plausible, and the model is wrong.
That is why the tests compare with closed forms and slow loops.

First the same tests run on an untouched copy. If one is red there, nothing is started (exit status 2): every mutation
would count as killed by it. A mutation is killed if a test fails, or if the tests take far longer than they did on the
untouched copy (a bug may loop for ever). One whose line is no longer there, or stands there several times, or that
can't even be imported, proves nothing: the campaign ends with exit status 1, so that this list keeps up with the code.

Only the standard library is used here; the tests run in child processes. Importing torch takes longer than most of the
tests, so where the system can fork (multiprocessing's "forkserver"), one server imports torch and pytest once, and
every child starts as a copy of it; elsewhere each child imports them anew, which gives the same verdicts more slowly.
The project itself is never imported before the fork: a child finds it in its own scratch copy.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import math
import multiprocessing
import multiprocessing.connection
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# What the tests import, the project excepted; torch._dynamo because making an optimiser imports it.
PRELOAD = ["torch", "torch._dynamo", "pytest", "tiktoken", "tqdm"]
LEFT_OUT = (".git", ".venv", "out", "__pycache__", ".*_cache")  # of the scratch copies

MODEL, SFT, RM, PPO, DPO, EVALUATE, DATA, COMMON, OPTIMUM, PIPELINE = (
    f"tests/test_{name}.py" for name in "model sft reward_model ppo dpo evaluate data common optimum pipeline".split()
)


@dataclass
class Mutation:
    file: str
    right: str  # the code as it is; it must stand in the file once, or `which` says which one is meant
    wrong: str  # the bug
    effect: str  # what it would do to a training run
    tests: str  # what should notice: pytest's arguments, run in this order until one fails
    which: int = 0  # 1: the first of several places
    slow: bool = False  # run the tests marked slow too


MUTATIONS = [
    # ------------------------------------------------------------ model.py
    Mutation(
        "model.py",
        right="slots[:span] <= positions[:, None]",
        wrong="slots[:span] < positions[:, None]",
        effect="a token can't see itself while sampling: samples come from another policy than the one trained",
        tests=MODEL,
    ),
    Mutation(
        "model.py",
        right="self.k[rows, :, positions] = k[:, :, 0]",
        wrong="self.k[rows, :, positions.max()] = k[:, :, 0]",
        effect="all rows write to the longest row's slot: short prompts read stale keys",
        tests=MODEL,
    ),
    Mutation(
        "model.py",
        right="logits = model.lm_head(hidden[rows, lens - 1])",
        wrong="logits = model.lm_head(hidden[:, -1])",
        effect="the first token of short prompts is predicted from filler",
        tests=MODEL,
    ),
    Mutation(
        "model.py",
        right="logits = logits / temperature\n    if top_k",
        wrong="if top_k",
        effect=(
            "sampling ignores the temperature that the log-probs are divided by: the ratio is not 1 and KL "
            "comes out negative"
        ),
        tests=MODEL,
    ),
    Mutation(
        "model.py",
        right="logits = logits.float() / temperature",
        wrong="logits = logits.float()",
        effect="log-probs ignore the temperature the tokens were sampled at",
        tests=f"{MODEL} {PPO}",
    ),
    Mutation(
        "model.py",
        right="select_logprobs(model(part)[:, :-1], part[:, 1:], temperature)",
        wrong="select_logprobs(model(part)[:, 1:], part[:, 1:], temperature)",
        effect="log-probs of a token given itself: off by one",
        tests=MODEL,
    ),
    Mutation(
        "model.py",
        right="ranked[ranked.cumsum(-1) - ranked >= top_p]",
        wrong="ranked[ranked.cumsum(-1) >= top_p]",
        effect="top-p drops the token that crosses the threshold: a confident model is left with nothing",
        tests=MODEL,
    ),
    Mutation(
        "model.py",
        right="ended[rows] |= new == eos_id",
        wrong="ended[rows] = new == eos_id",
        effect="a row that has stopped starts again",
        tests=MODEL,
    ),
    Mutation(
        "model.py",
        right="lens[rows] += going.long()",
        wrong="lens[rows] += 1",
        effect="filler after EOS counts as sampled tokens",
        tests=MODEL,
    ),
    Mutation(
        "model.py",
        right="return (where >= prompt_lens[:, None]) & (where < lens[:, None])",
        wrong="return (where >= prompt_lens[:, None]) & (where < lens[:, None] - 1)",
        effect="EOS is masked out: the model never learns to stop",
        tests=f"{SFT} {PPO} {DPO}",
    ),
    Mutation(
        "model.py",
        right="return (where >= prompt_lens[:, None]) & (where < lens[:, None])",
        wrong="return where < lens[:, None]",
        effect="the prompt's tokens count as actions",
        tests=f"{SFT} {PPO} {DPO}",
    ),
    Mutation(
        "model.py",
        right="gather(1, lens[:, None] - 1)",
        wrong="gather(1, (lens[:, None] - 2).clamp(min=0))",
        effect="the reward is read one token early, before EOS: finished and cut texts score the same",
        tests=f"{MODEL} {RM}",
    ),
    Mutation(
        "model.py",
        right="return self(tokens).gather(1, lens[:, None] - 1).squeeze(1)",
        wrong="return self(tokens)[:, -1]",
        effect="the reward is read at filler: a text's score depends on its batch mates",
        tests=f"{MODEL} {RM}",
    ),
    Mutation(
        "model.py",
        right="return (raw - self.mean) / self.std",
        wrong="return raw - self.mean",
        effect="rewards are not normalised: the KL coefficient means something else for every reward model",
        tests=f"{RM} {MODEL}",
    ),
    Mutation(
        "model.py",
        right="mean = masked_mean(x, mask)\n",
        wrong="mean = x.mean()\n",
        effect="whitening counts the filler: advantages shift with the amount of padding",
        tests=f"{MODEL} {PPO}",
    ),
    Mutation(
        "model.py",
        right="is_causal=True",
        wrong="is_causal=False",
        effect="the model sees the future: training loss near 0, samples are noise",
        tests=MODEL,
    ),
    Mutation(
        "model.py",
        right='approximate="tanh"',
        wrong='approximate="none"',
        effect="not GPT-2's GELU: imported weights give slightly wrong logits",
        tests=MODEL,
    ),
    # ------------------------------------------------------------ data
    Mutation(
        "data/batches.py",
        right="prompt_ids = prompt_ids[-room:]",
        wrong="prompt_ids = prompt_ids[:room]",
        effect="long prompts lose their end, which is where the question is",
        tests=DATA,
    ),
    Mutation(
        "data/batches.py",
        right="completion_ids.append(tokenizer.eos_id)",
        wrong="pass",
        effect="no EOS in the training data: the model never stops",
        tests=f"{DATA} {SFT}",
    ),
    Mutation(
        "data/tokenizer.py",
        right="self._encoding.encode_ordinary(text)",
        wrong='self._encoding.encode(text, allowed_special="all")',
        effect="a user who types <|endoftext|> ends the prompt",
        tests=DATA,
    ),
    Mutation(
        "data/tiny.py",
        right="math.log(-math.log(rng.random() or 1e-300))",
        wrong="math.log(rng.random() or 1e-300)",
        effect=(
            "annotators' noise is not Gumbel: rankings are no longer Plackett-Luce and Bayes accuracy is a wrong number"
        ),
        tests=DATA,
    ),
    # ------------------------------------------------------------ sft.py
    Mutation(
        "sft.py",
        right="target_mask = completion_mask[:, 1:].bool()",
        wrong="target_mask = completion_mask[:, :-1].bool()",
        effect="mask off by one: the last prompt token is learned and EOS is not",
        tests=SFT,
    ),
    Mutation(
        "sft.py",
        right="target_mask = completion_mask[:, 1:].bool()",
        wrong="target_mask = torch.ones_like(completion_mask[:, 1:]).bool()",
        effect="the loss counts prompts and filler: capacity goes into predicting questions",
        tests=SFT,
    ),
    Mutation(
        "sft.py",
        right="logits[:, :-1][target_mask].float(), tokens[:, 1:][target_mask]",
        wrong="logits[:, 1:][target_mask].float(), tokens[:, 1:][target_mask]",
        effect="labels not shifted: the model learns to copy its input",
        tests=SFT,
    ),
    Mutation(
        "sft.py",
        right="part = sft_loss(logits, tokens, mask, n_tokens)",
        wrong="part = sft_loss(logits, tokens, mask) / -(-len(rows) // size)",
        effect="mean per micro-batch: short completions weigh more, and --micro_batch changes the result",
        tests=SFT,
    ),
    # ------------------------------------------------------------ reward_model.py
    Mutation(
        "reward_model.py",
        right="losses = F.softplus(-gap)",
        wrong="losses = F.softplus(gap)",
        effect="the reward model learns to prefer the worse completion",
        tests=RM,
    ),
    Mutation(
        "reward_model.py",
        right="losses = F.softplus(-gap)",
        wrong="losses = -torch.log(torch.sigmoid(gap))",
        effect="overflows to inf for a large gap, and the next step is nan",
        tests=RM,
    ),
    Mutation(
        "reward_model.py",
        right="0.5 * (losses + F.softplus(gap))",
        wrong="losses + F.softplus(gap)",
        effect="ties count twice as much as comparisons",
        tests=RM,
    ),
    Mutation(
        "reward_model.py",
        right="present = (ranks[:, i] >= 0) & (ranks[:, j] >= 0)",
        wrong="present = ranks[:, i] >= 0",
        effect="absent completions of shorter rankings are compared: the reward of row 0 leaks into them",
        tests=RM,
    ),
    Mutation(
        "reward_model.py",
        right="present.sum().clamp(min=1) if n_pairs is None else n_pairs",
        wrong="present.numel() if n_pairs is None else n_pairs",
        effect="the mean is over absent pairs too: the loss shrinks with ragged rankings",
        tests=RM,
    ),
    Mutation(
        "reward_model.py",
        right="model.std.copy_(scores.std())",
        wrong="model.std.copy_(scores.var())",
        effect="normalised by the variance: rewards are off by a factor",
        tests=RM,
    ),
    Mutation(
        "reward_model.py",
        right="part = ranking_loss(scores, batch.ranks, n_pairs)",
        wrong="part = ranking_loss(scores, batch.ranks)",
        effect="micro-batches are not normalised by the whole step: gradients grow with their number",
        tests=RM,
    ),
    # ------------------------------------------------------------ ppo.py
    Mutation(
        "ppo.py",
        right="d = logprobs - ref_logprobs\n",
        wrong="d = ref_logprobs - logprobs\n",
        effect="the sign of the KL: the policy is paid for leaving the reference",
        tests=PPO,
    ),
    Mutation(
        "ppo.py",
        right="return 0.5 * d * d",
        wrong="return d * d",
        effect="k2 twice too large",
        tests=PPO,
    ),
    Mutation(
        "ppo.py",
        right="torch.expm1((-d).clamp(max=60.0)) + d)",
        wrong="torch.expm1(d.clamp(max=60.0)) - d)",
        effect="k3 with the roles exchanged: estimates another divergence",
        tests=PPO,
    ),
    Mutation(
        "ppo.py",
        right="(logp.exp() * (logp - ref_logp)).sum(-1)\n\n\ndef shaped",
        wrong="(ref_logp.exp() * (ref_logp - logp)).sum(-1)\n\n\ndef shaped",
        effect="the reverse divergence, KL(reference || policy)",
        tests=PPO,
    ),
    Mutation(
        "ppo.py",
        right="rewards = torch.where(mask, -kl_coef * kl, 0.0)",
        wrong="rewards = -kl_coef * kl",
        effect="filler and prompt are penalised too: returns depend on padding",
        tests=PPO,
    ),
    Mutation(
        "ppo.py",
        right="last = torch.where(mask, slots, -1).amax(1)  # (B,)",
        wrong="last = torch.where(mask, slots, -1).amax(1).add(1).clamp(max=mask.size(1) - 1)",
        effect=(
            "the score lands one slot late, after EOS: with lambda < 1 it depends on padding, and often it is "
            "masked out"
        ),
        tests=PPO,
    ),
    Mutation(
        "ppo.py",
        right="last = torch.where(mask, slots, -1).amax(1)  # (B,)",
        wrong="last = torch.full_like(mask[:, 0].long(), mask.size(1) - 1)",
        effect="the score lands at the end of the batch's longest row",
        tests=PPO,
    ),
    Mutation(
        "ppo.py",
        right="values = torch.where(mask, values, 0.0)\n",
        wrong="pass\n",
        effect="the value after EOS is whatever the value model says about filler",
        tests=PPO,
    ),
    Mutation(
        "ppo.py",
        right="deltas = torch.where(mask, rewards + gamma * next_values - values, 0.0)",
        wrong="deltas = rewards + gamma * next_values - values",
        effect="filler's deltas flow back into the advantages",
        tests=PPO,
    ),
    Mutation(
        "ppo.py",
        right="advantages = torch.where(mask, (deltas.to(wide) @ discount).to(deltas.dtype), 0.0)",
        wrong="advantages = (deltas.to(wide) @ discount).to(deltas.dtype)",
        effect="advantages are not 0 on the prompt",
        tests=PPO,
    ),
    Mutation(
        "ppo.py",
        right="** ahead.clamp(min=0), 0.0)",
        wrong="** ahead.clamp(min=0), 1.0)",
        effect="advantages count the past as well as the future",
        tests=PPO,
    ),
    Mutation(
        "ppo.py",
        right="return advantages, advantages + values",
        wrong="return advantages, advantages",
        effect="returns are advantages: the value model learns to predict 0",
        tests=PPO,
    ),
    Mutation(
        "ppo.py",
        right="advantages = whiten(advantages, mask)",
        wrong="advantages = whiten(advantages, mask)\n        returns = advantages + column['values']",
        effect="returns from whitened advantages: the value model learns a rescaled reward",
        tests=PPO,
    ),
    Mutation(
        "ppo.py",
        right="torch.maximum(unclipped, clipped)",
        wrong="torch.minimum(unclipped, clipped)",
        effect="optimistic clipping: the policy is rewarded for leaving the trust region",
        tests=PPO,
    ),
    Mutation(
        "ppo.py",
        right="loss = torch.where(mask, torch.maximum(unclipped, clipped), 0.0).sum() / n",
        wrong="loss = torch.maximum(unclipped, clipped).mean()",
        effect="the mean counts filler: long batches learn slower",
        tests=PPO,
    ),
    Mutation(
        "ppo.py",
        right="torch.maximum(error, clipped_error)",
        wrong="torch.minimum(error, clipped_error)",
        effect="value clipping as min: the value model stops where it should be pulled back",
        tests=PPO,
    ),
    Mutation(
        "ppo.py",
        right="old_values + (values - old_values).clamp(-clip, clip) - returns",
        wrong="returns + (values - old_values).clamp(-clip, clip) - returns",
        effect="clipped around the return instead of the old value",
        tests=PPO,
    ),
    Mutation(
        "ppo.py",
        right="self.coef *= 1 + error * n / self.horizon",
        wrong="self.coef *= 1 - error * n / self.horizon",
        effect="the controller lowers the penalty when the KL is too high: it runs away",
        tests=PPO,
    ),
    Mutation(
        "ppo.py",
        right="error = min(max(kl / self.target - 1, -0.2), 0.2)",
        wrong="error = kl / self.target - 1",
        effect="the controller's error is not clipped: one bad batch throws the coefficient off",
        tests=PPO,
    ),
    Mutation(
        "ppo.py",
        right="ref_logprobs = select_logprobs(ref_logits[:, :-1], tokens[:, 1:], config.temperature)",
        wrong="ref_logprobs = select_logprobs(ref_logits[:, :-1], tokens[:, 1:])",
        effect="the reference is not divided by the temperature: KL is not 0 at the start",
        tests=PPO,
    ),
    Mutation(
        "ppo.py",
        right="logprobs = token_logprobs(policy, tokens, config.temperature)  # (b, T-1)",
        wrong="logprobs = token_logprobs(policy, tokens)  # (b, T-1)",
        effect="the update forgets the temperature: the ratio is not 1",
        tests=PPO,
    ),
    Mutation(
        "ppo.py",
        right="    policy.eval()\n    value_model.eval()\n    trained",
        wrong="    policy.train()\n    value_model.train()\n    trained",
        effect="dropout in the update: the ratio is not 1 before anything is learned",
        tests=PPO,
    ),
    Mutation(
        "ppo.py",
        right="n_tokens = experience.action_mask[rows].sum()  # of the whole step",
        wrong="n_tokens = None",
        effect="mean per micro-batch: --micro_batch changes what is learned",
        tests=PPO,
    ),
    Mutation(
        "ppo.py",
        right="for module in [*policy.h[-n:], policy.ln_f]:",
        wrong="for module in [*policy.h[:n], policy.ln_f]:",
        effect="trains the first blocks instead of the last",
        tests=PPO,
    ),
    Mutation(
        "ppo.py",
        right="scores = raw_scores - config.eos_penalty * (~rollout.ended)",
        wrong="scores = raw_scores - config.eos_penalty * rollout.ended",
        effect="stopping is punished: completions grow until they are cut",
        tests=f"{PPO} {PIPELINE}",
    ),
    Mutation(
        "ppo.py",
        right="advantages = advantages - kl_coef * own",
        wrong="advantages = advantages",
        effect="with --kl exact no token feels its own divergence: the penalty's gradient is wrong",
        tests=OPTIMUM,
    ),
    # ------------------------------------------------------------ dpo.py
    Mutation(
        "dpo.py",
        right="torch.where(completion_mask[:, 1:].bool(), token_logprobs(model, tokens), 0.0).sum(1)",
        wrong="torch.where(completion_mask[:, :-1].bool(), token_logprobs(model, tokens), 0.0).sum(1)",
        effect="the mask is off by one: EOS is left out of the sum, the last prompt token is in it",
        tests=DPO,
    ),
    Mutation(
        "dpo.py",
        right="torch.where(completion_mask[:, 1:].bool(), token_logprobs(model, tokens), 0.0).sum(1)",
        wrong="token_logprobs(model, tokens).sum(1)",
        effect="prompt and filler count: the loss depends on padding",
        tests=DPO,
    ),
    Mutation(
        "dpo.py",
        right="torch.where(completion_mask[:, 1:].bool(), token_logprobs(model, tokens), 0.0).sum(1)",
        wrong=(
            "torch.where(completion_mask[:, 1:].bool(), token_logprobs(model, tokens), 0.0).sum(1) / "
            "completion_mask.sum(1)"
        ),
        effect="a mean instead of a sum: another loss, known to collapse",
        tests=DPO,
    ),
    Mutation(
        "dpo.py",
        right="h = chosen_ratio - rejected_ratio",
        wrong="h = policy_chosen - policy_rejected",
        effect="no reference: nothing holds the policy",
        tests=DPO,
    ),
    Mutation(
        "dpo.py",
        right="-(1 - label_smoothing) * F.logsigmoid(beta * h) - label_smoothing * F.logsigmoid(-beta * h)",
        wrong="-label_smoothing * F.logsigmoid(beta * h) - (1 - label_smoothing) * F.logsigmoid(-beta * h)",
        effect="1 - eps and eps exchanged: learns to prefer the rejected completion",
        tests=DPO,
    ),
    Mutation(
        "dpo.py",
        right="losses = (h - 1 / (2 * beta)) ** 2",
        wrong="losses = (beta * h - 1 / 2) ** 2",
        effect="IPO on the scaled margin: beta no longer means what the paper says",
        tests=DPO,
    ),
    Mutation(
        "dpo.py",
        right="beta * chosen_ratio.detach()",
        wrong="chosen_ratio.detach()",
        effect="implicit rewards logged without beta: figures can't be compared between runs",
        tests=DPO,
    ),
    Mutation(
        "dpo.py",
        right="strict = (ranks[:, i] >= 0) & (ranks[:, i] < ranks[:, j])",
        wrong="strict = (ranks[:, i] >= 0) & (ranks[:, i] <= ranks[:, j])",
        effect="ties are trained as preferences",
        tests=DPO,
    ),
    Mutation(
        "dpo.py",
        right="(losses.sum() / n_pairs).backward()",
        wrong="losses.mean().backward()",
        effect="mean per micro-batch: --micro_batch changes the size of the step",
        tests=DPO,
    ),
    # ------------------------------------------------------------ evaluate.py, common.py
    Mutation(
        "evaluate.py",
        right="1.0 if a > b else 0.5 if a == b else 0.0",
        wrong="1.0 if a >= b else 0.0",
        effect="ties count as wins: a policy that changed nothing wins",
        tests=EVALUATE,
    ),
    Mutation(
        "evaluate.py",
        right="picks = [max(range(n), key=lambda i, s=s: s[i]) for s in scores]",
        wrong="picks = [max(range(len(s)), key=lambda i, s=s: s[i]) for s in scores]",
        effect="best of n picks from all samples: every n looks as good as the largest",
        tests=EVALUATE,
    ),
    Mutation(
        "common.py",
        right="return (step + 1) / warmup",
        wrong="return step / warmup",
        effect="the first step has learning rate 0",
        tests=COMMON,
    ),
]


# ------------------------------------------------------------------------------------------------ running


@dataclass
class Task:
    """One run of pytest in a scratch copy of its own."""

    name: object
    tests: list[str]
    slow: bool
    limit: float  # seconds after which it is killed
    changed: dict[str, str] = field(default_factory=dict)  # file -> its text in the copy


@dataclass
class Run:
    """What came of a task."""

    task: Task
    status: int | None  # pytest's exit status; None: killed because its time was up
    output: str
    seconds: float

    @property
    def red(self) -> list[str]:
        """The tests that failed, such as `test_ppo.py::test_gae`."""
        lines = [line for line in self.output.splitlines() if line.startswith(("FAILED ", "ERROR "))]
        return [line.split(" ", 1)[1].split(" - ")[0].removeprefix("tests/") for line in lines]


def run_pytest(copy: str, root: str, arguments: list[str], output: str, limit: float) -> None:
    """The child process: pytest in the scratch copy. It prints to the file `output`; its status is the exit status."""
    if hasattr(os, "setsid"):
        os.setsid()  # a process group of its own: whoever kills it also kills what the tests have started
    if hasattr(signal, "alarm"):
        signal.alarm(
            math.ceil(limit) + 10
        )  # should the parent be killed, nobody else would end a loop that runs for ever
    with open(output, "w", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(copy)
    # The copy's modules, and never those beside this script.
    sys.path[:] = [copy, *(p for p in sys.path if p and Path(p) not in (Path(root), Path(root) / "tests"))]
    sys.dont_write_bytecode = True
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"  # for the scripts that the tests start
    import pytest

    sys.exit(int(pytest.main(arguments)))


def kill(process) -> None:
    """End the child and what its tests have started."""
    if hasattr(os, "killpg"):
        with contextlib.suppress(OSError):  # it may have ended, or not yet have its group
            os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.join()


def run_all(tasks: list[Task], root: Path, jobs: int, first_failure_only: bool = False) -> Iterator[Run]:
    """Run the tasks, `jobs` at a time, and yield each as it ends."""
    can_fork = "forkserver" in multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if can_fork else "spawn")
    if can_fork:
        context.set_forkserver_preload(PRELOAD)
    waiting, running = collections.deque(tasks), {}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                task = waiting.popleft()
                scratch = tempfile.TemporaryDirectory(prefix="mutate_", ignore_cleanup_errors=True)
                copy, output = Path(scratch.name) / "project", Path(scratch.name) / "output"
                shutil.copytree(root, copy, ignore=shutil.ignore_patterns(*LEFT_OUT))
                for file, text in task.changed.items():
                    (copy / file).write_text(text, encoding="utf-8")
                options = (
                    f"-q --no-header --tb=no -rfE -p no:cacheprovider --basetemp={scratch.name}/tmp --rootdir={copy}"
                )
                arguments = [*options.split(), *(["-x"] if first_failure_only else [])]
                arguments += ["-m", "slow or not slow" if task.slow else "not slow", *task.tests]
                process = context.Process(
                    target=run_pytest, args=(str(copy), str(root), arguments, str(output), task.limit)
                )
                process.start()
                running[process.sentinel] = (process, task, scratch, output, time.monotonic())
            next_deadline = min(start + task.limit for _, task, _, _, start in running.values())
            multiprocessing.connection.wait(list(running), timeout=max(0.0, next_deadline - time.monotonic()))
            for sentinel, (process, task, scratch, output, start) in list(running.items()):
                seconds = time.monotonic() - start
                timed_out = seconds >= task.limit and process.is_alive()
                if not timed_out and process.is_alive():
                    continue
                kill(process) if timed_out else process.join()
                del running[sentinel]
                printed = output.read_text(encoding="utf-8", errors="replace") if output.exists() else ""
                scratch.cleanup()
                yield Run(task, None if timed_out else process.exitcode, printed, seconds)
    finally:
        for process, _, scratch, _, _ in running.values():  # interrupted
            kill(process)
            scratch.cleanup()


def baseline(mutations: list[Mutation], root: Path, jobs: int) -> dict[tuple[str, bool], Run]:
    """Run all tests that the mutations name on untouched copies, with the options of the mutations."""
    wanted = sorted({(test, m.slow) for m in mutations for test in m.tests.split()})
    # a single test is run with its file if that is wanted too
    wanted = [(test, slow) for test, slow in wanted if "::" not in test or (test.split("::")[0], slow) not in wanted]
    tasks = [Task((test, slow), [test], slow, limit=1800.0) for test, slow in wanted]
    return {run.task.name: run for run in run_all(tasks, root, jobs)}


def broken_source(mutation: Mutation, root: Path) -> str:
    """The file's text with the bug in it. ValueError says why there is none."""
    path = root / mutation.file
    if not path.exists():
        raise ValueError("STALE: the file it changes is no longer there")
    parts = path.read_text(encoding="utf-8").split(mutation.right)
    places, which = len(parts) - 1, mutation.which
    if not places:
        raise ValueError("STALE: the line it changes is no longer there")
    if not which and places > 1:
        raise ValueError(
            f"STALE: the code it changes stands there {places} times, and it doesn't say which one it means"
        )
    if which > places:
        raise ValueError(f"STALE: the code it changes stands there {places} times, and it means number {which}")
    which = which or 1
    text = mutation.right.join(parts[:which]) + mutation.wrong + mutation.right.join(parts[which:])
    if path.suffix == ".py":
        try:
            compile(text, mutation.file, "exec", dont_inherit=True)
        except SyntaxError as error:
            raise ValueError(f"BROKEN: it doesn't compile ({error})") from None
    return text


def verdict(run: Run) -> str:
    if run.status is None:
        return f"killed by time: no end after {run.seconds:.0f} s"
    if run.status == 0:
        return "SURVIVED"
    if run.status == 1 and run.red:  # 1: tests were run and some failed; anything else proves nothing
        return f"killed by {run.red[0]}"
    return f"BROKEN: pytest ended with {run.status}: {run.output.strip()[-300:]}"


# ------------------------------------------------------------------------------------------------ command line


def choose(words: list[str], mutations: list[Mutation]) -> list[int]:
    """`12`, `40-45` and words -> indices, in the order of the list. ValueError if one of them means nothing."""
    chosen: set[int] = set()
    for word in words:
        numbers = re.fullmatch(r"(\d+)(?:-(\d+))?", word)
        if numbers:
            low, high = int(numbers[1]), int(numbers[2] or numbers[1])
            if not 1 <= low <= high <= len(mutations):
                raise ValueError(f"{word}: the mutations have the numbers 1-{len(mutations)}")
            found = set(range(low - 1, high))
        else:
            texts = [f"{m.file}\n{m.right}\n{m.wrong}\n{m.effect}".lower() for m in mutations]
            found = {i for i, text in enumerate(texts) if word.lower() in text}
            if not found:
                raise ValueError(f"no mutation mentions {word!r}")
        chosen |= found
    return sorted(chosen) if words else list(range(len(mutations)))


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("choice", nargs="*", help="numbers (12), ranges (40-45) or words; default: all mutations")
    parser.add_argument("--list", action="store_true", help="print the mutations and run nothing")
    parser.add_argument("--jobs", type=int, default=2, help="mutations at a time, at most the cores (default: 2)")
    parser.add_argument(
        "--limit",
        type=float,
        help="seconds a mutation may take (default: 60, and 5 times what its tests took unharmed)",
    )
    args = parser.parse_intermixed_args(argv)
    if args.jobs < 1:
        parser.error("--jobs must be at least 1")
    if args.limit is not None and args.limit <= 0:
        parser.error("--limit must be above 0")
    args.jobs = min(args.jobs, os.cpu_count() or 1)
    args.fail = parser.error  # prints one line and exits with status 2
    return args


def main(argv: list[str] | None = None, root: Path = ROOT, mutations: list[Mutation] = MUTATIONS) -> int:
    args = parse(argv)
    try:
        chosen = choose(args.choice, mutations)
    except ValueError as error:
        args.fail(str(error))
    if args.list:
        for i in chosen:
            print(f"{i + 1:3} {mutations[i].file:16} {mutations[i].effect}")
        return 0

    os.environ.setdefault("OMP_NUM_THREADS", "1")  # inherited by the children; must be set before torch is imported
    start = time.monotonic()
    texts, verdicts = {}, {}
    for i in chosen:
        try:
            texts[i] = broken_source(mutations[i], root)
        except ValueError as error:
            verdicts[i] = str(error)
            print(f"{i + 1:3} {mutations[i].file:16} {mutations[i].effect}\n    {verdicts[i]}", flush=True)

    print(f"the tests of {len(texts)} mutations on an untouched copy:", flush=True)
    unharmed = baseline([mutations[i] for i in texts], root, args.jobs)
    bad = [run for run in unharmed.values() if run.status != 0]
    for run in bad:
        late = f"no end after {run.seconds:.0f} s" if run.status is None else ""
        print(f"RED: {run.task.name[0]}: {', '.join(run.red) or late or run.output.strip()[-300:]}")
    if bad:
        print("Not started: the tests must be green before a mutation can turn one red.")
        return 2
    print(f"green ({time.monotonic() - start:.0f} s)", flush=True)

    tasks = []
    for i, text in texts.items():
        m = mutations[i]
        runs = [unharmed.get((t, m.slow)) or unharmed[t.split("::")[0], m.slow] for t in m.tests.split()]
        limit = args.limit or 60 + 5 * sum(run.seconds for run in runs)
        tasks.append(Task(i, m.tests.split(), m.slow, limit, {m.file: text}))
    begin = time.monotonic()
    for n, run in enumerate(run_all(tasks, root, args.jobs, first_failure_only=True), start=1):
        i = run.task.name
        verdicts[i] = verdict(run)
        left = (time.monotonic() - begin) / n * (len(tasks) - n)
        print(f"{i + 1:3} {mutations[i].file:16} {mutations[i].effect}")
        print(
            f"    {verdicts[i]} ({run.seconds:.0f} s); {n} of {len(tasks)} done, about {left / 60:.1f} min left",
            flush=True,
        )

    alive = [i for i in chosen if not verdicts[i].startswith("killed")]
    print(f"{len(chosen) - len(alive)} of {len(chosen)} mutations killed in {time.monotonic() - start:.0f} s")
    for i in alive:
        m = mutations[i]
        print(f"NOT KILLED: {i + 1} {m.file}: {m.right!r} -> {m.wrong!r}: {verdicts[i].split(': ')[0]}")
    return 1 if alive else 0


if __name__ == "__main__":
    sys.exit(main())
