"""Do the tests notice? Put one small, realistic bug at a time into a copy of the project and see whether a test turns red.

    python tests/mutate.py               # all mutations, two at a time; exit status 1 if one survives
    python tests/mutate.py kl gae        # only those whose line mentions kl or gae
    python tests/mutate.py --list        # what they are

Each mutation is a line of code that somebody has really written, or could have, and one line on what it would do to a training
run. Most of these runs would not crash: the loss goes down, the curves look plausible, and the model is wrong. That is why the
tests compare with closed forms and slow loops. Only the standard library is used here.
"""

from __future__ import annotations

import concurrent.futures
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MODEL, SFT, RM, PPO, DPO, EVALUATE = (f"tests/test_{name}.py" for name in ("model", "sft", "reward_model", "ppo", "dpo", "evaluate"))
DATA, COMMON = "tests/test_data.py", "tests/test_common.py"

# (file, the right code, the bug, what it would do, the tests that should notice)
MUTATIONS = [
    # ---------------------------------------------------------------- model.py
    (
        "model.py",
        "slots[:span] <= positions[:, None]",
        "slots[:span] < positions[:, None]",
        "a token can't see itself while sampling: samples come from another policy than the one trained",
        MODEL,
    ),
    (
        "model.py",
        "self.k[rows, :, positions] = k[:, :, 0]",
        "self.k[rows, :, positions.max()] = k[:, :, 0]",
        "all rows write to the longest row's slot: short prompts read stale keys",
        MODEL,
    ),
    (
        "model.py",
        "logits = model.lm_head(hidden[rows, lens - 1])",
        "logits = model.lm_head(hidden[:, -1])",
        "the first token of short prompts is predicted from filler",
        MODEL,
    ),
    (
        "model.py",
        "logits = logits / temperature\n    if top_k",
        "if top_k",
        "sampling ignores the temperature that the log-probs are divided by: the ratio is not 1 and KL comes out negative",
        MODEL,
    ),
    (
        "model.py",
        "logits = logits.float() / temperature",
        "logits = logits.float()",
        "log-probs ignore the temperature the tokens were sampled at",
        f"{MODEL} {PPO}",
    ),
    (
        "model.py",
        "select_logprobs(model(part)[:, :-1], part[:, 1:], temperature)",
        "select_logprobs(model(part)[:, 1:], part[:, 1:], temperature)",
        "log-probs of a token given itself: off by one",
        MODEL,
    ),
    (
        "model.py",
        "ranked[ranked.cumsum(-1) - ranked >= top_p]",
        "ranked[ranked.cumsum(-1) >= top_p]",
        "top-p drops the token that crosses the threshold: a confident model is left with nothing",
        MODEL,
    ),
    ("model.py", "ended[rows] |= new == eos_id", "ended[rows] = new == eos_id", "a row that has stopped starts again", MODEL),
    ("model.py", "lens[rows] += going.long()", "lens[rows] += 1", "filler after EOS counts as sampled tokens", MODEL),
    (
        "model.py",
        "return (where >= prompt_lens[:, None]) & (where < lens[:, None])",
        "return (where >= prompt_lens[:, None]) & (where < lens[:, None] - 1)",
        "EOS is masked out: the model never learns to stop",
        f"{SFT} {PPO} {DPO}",
    ),
    (
        "model.py",
        "return (where >= prompt_lens[:, None]) & (where < lens[:, None])",
        "return where < lens[:, None]",
        "the prompt's tokens count as actions",
        f"{SFT} {PPO} {DPO}",
    ),
    (
        "model.py",
        "gather(1, lens[:, None] - 1)",
        "gather(1, (lens[:, None] - 2).clamp(min=0))",
        "the reward is read one token early, before EOS: finished and cut texts score the same",
        f"{MODEL} {RM}",
    ),
    (
        "model.py",
        "return self(tokens).gather(1, lens[:, None] - 1).squeeze(1)",
        "return self(tokens)[:, -1]",
        "the reward is read at filler: a text's score depends on its batch mates",
        f"{MODEL} {RM}",
    ),
    (
        "model.py",
        "return (raw - self.mean) / self.std",
        "return raw - self.mean",
        "rewards are not normalised: the KL coefficient means something else for every reward model",
        f"{RM} {MODEL}",
    ),
    (
        "model.py",
        "mean = masked_mean(x, mask)\n",
        "mean = x.mean()\n",
        "whitening counts the filler: advantages shift with the amount of padding",
        f"{MODEL} {PPO}",
    ),
    ("model.py", "is_causal=True", "is_causal=False", "the model sees the future: training loss near 0, samples are noise", MODEL),
    ("model.py", 'approximate="tanh"', 'approximate="none"', "not GPT-2's GELU: imported weights give slightly wrong logits", MODEL),
    # ---------------------------------------------------------------- data
    (
        "data/batches.py",
        "prompt_ids = prompt_ids[-room:]",
        "prompt_ids = prompt_ids[:room]",
        "long prompts lose their end, which is where the question is",
        DATA,
    ),
    ("data/batches.py", "completion_ids.append(tokenizer.eos_id)", "pass", "no EOS in the training data: the model never stops", f"{DATA} {SFT}"),
    (
        "data/tokenizer.py",
        "self._encoding.encode_ordinary(text)",
        'self._encoding.encode(text, allowed_special="all")',
        "a user who types <|endoftext|> ends the prompt",
        DATA,
    ),
    (
        "data/tiny.py",
        "math.log(-math.log(rng.random() or 1e-300))",
        "math.log(rng.random() or 1e-300)",
        "annotators' noise is not Gumbel: rankings are no longer Plackett-Luce and Bayes accuracy is a wrong number",
        DATA,
    ),
    # ---------------------------------------------------------------- sft.py
    (
        "sft.py",
        "target_mask = completion_mask[:, 1:].bool()",
        "target_mask = completion_mask[:, :-1].bool()",
        "mask off by one: the last prompt token is learned and EOS is not",
        SFT,
    ),
    (
        "sft.py",
        "target_mask = completion_mask[:, 1:].bool()",
        "target_mask = torch.ones_like(completion_mask[:, 1:]).bool()",
        "the loss counts prompts and filler: capacity goes into predicting questions",
        SFT,
    ),
    (
        "sft.py",
        "logits[:, :-1][target_mask].float(), tokens[:, 1:][target_mask]",
        "logits[:, 1:][target_mask].float(), tokens[:, 1:][target_mask]",
        "labels not shifted: the model learns to copy its input",
        SFT,
    ),
    (
        "sft.py",
        "part = sft_loss(logits, tokens, mask, n_tokens)",
        "part = sft_loss(logits, tokens, mask) / -(-len(rows) // size)",
        "mean per micro-batch: short completions weigh more, and --micro_batch changes the result",
        SFT,
    ),
    # ---------------------------------------------------------------- reward_model.py
    ("reward_model.py", "losses = F.softplus(-gap)", "losses = F.softplus(gap)", "the reward model learns to prefer the worse completion", RM),
    (
        "reward_model.py",
        "losses = F.softplus(-gap)",
        "losses = -torch.log(torch.sigmoid(gap))",
        "overflows to inf for a large gap, and the next step is nan",
        RM,
    ),
    ("reward_model.py", "0.5 * (losses + F.softplus(gap))", "losses + F.softplus(gap)", "ties count twice as much as comparisons", RM),
    (
        "reward_model.py",
        "present = (ranks[:, i] >= 0) & (ranks[:, j] >= 0)",
        "present = ranks[:, i] >= 0",
        "absent completions of shorter rankings are compared: the reward of row 0 leaks into them",
        RM,
    ),
    (
        "reward_model.py",
        "present.sum().clamp(min=1) if n_pairs is None else n_pairs",
        "present.numel() if n_pairs is None else n_pairs",
        "the mean is over absent pairs too: the loss shrinks with ragged rankings",
        RM,
    ),
    (
        "reward_model.py",
        "model.std.copy_(scores.std())",
        "model.std.copy_(scores.var())",
        "normalised by the variance: rewards are off by a factor",
        RM,
    ),
    (
        "reward_model.py",
        "part = ranking_loss(scores, batch.ranks, n_pairs)",
        "part = ranking_loss(scores, batch.ranks)",
        "micro-batches are not normalised by the whole step: gradients grow with their number",
        RM,
    ),
    # ---------------------------------------------------------------- ppo.py
    (
        "ppo.py",
        "d = logprobs - ref_logprobs\n",
        "d = ref_logprobs - logprobs\n",
        "the sign of the KL: the policy is paid for leaving the reference",
        PPO,
    ),
    ("ppo.py", "return 0.5 * d * d", "return d * d", "k2 twice too large", PPO),
    (
        "ppo.py",
        "torch.expm1((-d).clamp(max=60.0)) + d)",
        "torch.expm1(d.clamp(max=60.0)) - d)",
        "k3 with the roles exchanged: estimates another divergence",
        PPO,
    ),
    (
        "ppo.py",
        "(logp.exp() * (logp - ref_logp)).sum(-1)\n\n\ndef shaped",
        "(ref_logp.exp() * (ref_logp - logp)).sum(-1)\n\n\ndef shaped",
        "the reverse divergence, KL(reference || policy)",
        PPO,
    ),
    (
        "ppo.py",
        "rewards = torch.where(mask, -kl_coef * kl, 0.0)",
        "rewards = -kl_coef * kl",
        "filler and prompt are penalised too: returns depend on padding",
        PPO,
    ),
    (
        "ppo.py",
        "last = torch.where(mask, slots, -1).amax(1)  # (B,)",
        "last = torch.where(mask, slots, -1).amax(1).add(1).clamp(max=mask.size(1) - 1)",
        "the score lands one slot late, after EOS: with lambda < 1 it depends on padding, and often it is masked out",
        PPO,
    ),
    (
        "ppo.py",
        "last = torch.where(mask, slots, -1).amax(1)  # (B,)",
        "last = torch.full_like(mask[:, 0].long(), mask.size(1) - 1)",
        "the score lands at the end of the batch's longest row",
        PPO,
    ),
    ("ppo.py", "values = torch.where(mask, values, 0.0)\n", "pass\n", "the value after EOS is whatever the value model says about filler", PPO),
    (
        "ppo.py",
        "deltas = torch.where(mask, rewards + gamma * next_values - values, 0.0)",
        "deltas = rewards + gamma * next_values - values",
        "filler's deltas flow back into the advantages",
        PPO,
    ),
    (
        "ppo.py",
        "advantages = torch.where(mask, (deltas.to(wide) @ discount).to(deltas.dtype), 0.0)",
        "advantages = (deltas.to(wide) @ discount).to(deltas.dtype)",
        "advantages are not 0 on the prompt",
        PPO,
    ),
    ("ppo.py", "** ahead.clamp(min=0), 0.0)", "** ahead.clamp(min=0), 1.0)", "advantages count the past as well as the future", PPO),
    (
        "ppo.py",
        "return advantages, advantages + values",
        "return advantages, advantages",
        "returns are advantages: the value model learns to predict 0",
        PPO,
    ),
    (
        "ppo.py",
        "advantages = whiten(advantages, mask)",
        "advantages = whiten(advantages, mask)\n        returns = advantages + column['values']",
        "returns from whitened advantages: the value model learns a rescaled reward",
        PPO,
    ),
    (
        "ppo.py",
        "torch.maximum(unclipped, clipped)",
        "torch.minimum(unclipped, clipped)",
        "optimistic clipping: the policy is rewarded for leaving the trust region",
        PPO,
    ),
    (
        "ppo.py",
        "loss = torch.where(mask, torch.maximum(unclipped, clipped), 0.0).sum() / n",
        "loss = torch.maximum(unclipped, clipped).mean()",
        "the mean counts filler: long batches learn slower",
        PPO,
    ),
    (
        "ppo.py",
        "torch.maximum(error, clipped_error)",
        "torch.minimum(error, clipped_error)",
        "value clipping as min: the value model stops where it should be pulled back",
        PPO,
    ),
    (
        "ppo.py",
        "old_values + (values - old_values).clamp(-clip, clip) - returns",
        "returns + (values - old_values).clamp(-clip, clip) - returns",
        "clipped around the return instead of the old value",
        PPO,
    ),
    (
        "ppo.py",
        "self.coef *= 1 + error * n / self.horizon",
        "self.coef *= 1 - error * n / self.horizon",
        "the controller lowers the penalty when the KL is too high: it runs away",
        PPO,
    ),
    (
        "ppo.py",
        "error = min(max(kl / self.target - 1, -0.2), 0.2)",
        "error = kl / self.target - 1",
        "the controller's error is not clipped: one bad batch throws the coefficient off",
        PPO,
    ),
    (
        "ppo.py",
        "ref_logprobs = select_logprobs(ref_logits[:, :-1], tokens[:, 1:], config.temperature)",
        "ref_logprobs = select_logprobs(ref_logits[:, :-1], tokens[:, 1:])",
        "the reference is not divided by the temperature: KL is not 0 at the start",
        PPO,
    ),
    (
        "ppo.py",
        "logprobs = token_logprobs(policy, tokens, config.temperature)  # (b, T-1)",
        "logprobs = token_logprobs(policy, tokens)  # (b, T-1)",
        "the update forgets the temperature: the ratio is not 1",
        PPO,
    ),
    (
        "ppo.py",
        "    policy.eval()\n    value_model.eval()\n    trained",
        "    policy.train()\n    value_model.train()\n    trained",
        "dropout in the update: the ratio is not 1 before anything is learned",
        PPO,
    ),
    (
        "ppo.py",
        "n_tokens = experience.action_mask[rows].sum()  # of the whole step",
        "n_tokens = None",
        "mean per micro-batch: --micro_batch changes what is learned",
        PPO,
    ),
    (
        "ppo.py",
        "for module in [*policy.h[-n:], policy.ln_f]:",
        "for module in [*policy.h[:n], policy.ln_f]:",
        "trains the first blocks instead of the last",
        PPO,
    ),
    (
        "ppo.py",
        "scores = raw_scores - config.eos_penalty * (~rollout.ended)",
        "scores = raw_scores - config.eos_penalty * rollout.ended",
        "stopping is punished: completions grow until they are cut",
        f"{PPO} tests/test_pipeline.py",
    ),
    (
        "ppo.py",
        "advantages = advantages - kl_coef * own",
        "advantages = advantages",
        "with --kl exact no token feels its own divergence: the penalty's gradient is wrong",
        "tests/test_optimum.py",
    ),
    # ---------------------------------------------------------------- dpo.py
    (
        "dpo.py",
        "torch.where(completion_mask[:, 1:].bool(), token_logprobs(model, tokens), 0.0).sum(1)",
        "torch.where(completion_mask[:, :-1].bool(), token_logprobs(model, tokens), 0.0).sum(1)",
        "the mask is off by one: EOS is left out of the sum, the last prompt token is in it",
        DPO,
    ),
    (
        "dpo.py",
        "torch.where(completion_mask[:, 1:].bool(), token_logprobs(model, tokens), 0.0).sum(1)",
        "token_logprobs(model, tokens).sum(1)",
        "prompt and filler count: the loss depends on padding",
        DPO,
    ),
    (
        "dpo.py",
        "torch.where(completion_mask[:, 1:].bool(), token_logprobs(model, tokens), 0.0).sum(1)",
        "torch.where(completion_mask[:, 1:].bool(), token_logprobs(model, tokens), 0.0).sum(1) / completion_mask.sum(1)",
        "a mean instead of a sum: another loss, known to collapse",
        DPO,
    ),
    ("dpo.py", "h = chosen_ratio - rejected_ratio", "h = policy_chosen - policy_rejected", "no reference: nothing holds the policy", DPO),
    (
        "dpo.py",
        "-(1 - label_smoothing) * F.logsigmoid(beta * h) - label_smoothing * F.logsigmoid(-beta * h)",
        "-label_smoothing * F.logsigmoid(beta * h) - (1 - label_smoothing) * F.logsigmoid(-beta * h)",
        "1 - eps and eps exchanged: learns to prefer the rejected completion",
        DPO,
    ),
    (
        "dpo.py",
        "losses = (h - 1 / (2 * beta)) ** 2",
        "losses = (beta * h - 1 / 2) ** 2",
        "IPO on the scaled margin: beta no longer means what the paper says",
        DPO,
    ),
    (
        "dpo.py",
        "beta * chosen_ratio.detach()",
        "chosen_ratio.detach()",
        "implicit rewards logged without beta: figures can't be compared between runs",
        DPO,
    ),
    (
        "dpo.py",
        "strict = (ranks[:, i] >= 0) & (ranks[:, i] < ranks[:, j])",
        "strict = (ranks[:, i] >= 0) & (ranks[:, i] <= ranks[:, j])",
        "ties are trained as preferences",
        DPO,
    ),
    (
        "dpo.py",
        "(losses.sum() / n_pairs).backward()",
        "losses.mean().backward()",
        "mean per micro-batch: --micro_batch changes the size of the step",
        DPO,
    ),
    # ---------------------------------------------------------------- evaluate.py, common.py
    (
        "evaluate.py",
        "1.0 if a > b else 0.5 if a == b else 0.0",
        "1.0 if a >= b else 0.0",
        "ties count as wins: a policy that changed nothing wins",
        EVALUATE,
    ),
    (
        "evaluate.py",
        "picks = [max(range(n), key=lambda i, s=s: s[i]) for s in scores]",
        "picks = [max(range(len(s)), key=lambda i, s=s: s[i]) for s in scores]",
        "best of n picks from all samples: every n looks as good as the largest",
        EVALUATE,
    ),
    ("common.py", "return (step + 1) / warmup", "return step / warmup", "the first step has learning rate 0", COMMON),
]


def run_mutation(number: int) -> tuple[int, str, float]:
    """Apply mutation `number` in a scratch copy -> (number, "killed by ..." | "SURVIVED" | "STALE", seconds)."""
    file, right, wrong, _, tests = MUTATIONS[number]
    start = time.time()
    source = (ROOT / file).read_text(encoding="utf-8")
    if source.count(right) < 1:
        return number, "STALE: the line it changes is no longer there", 0.0
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / "project"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", ".venv", "out", "__pycache__", ".*_cache"))
        (copy / file).write_text(source.replace(right, wrong, 1), encoding="utf-8")
        command = [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "--tb=no", "-p", "no:cacheprovider", "-m", "not slow", *tests.split()]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, timeout=300)
    red = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    if done.returncode == 0:
        return number, "SURVIVED", time.time() - start
    if done.returncode != 1 or not red:  # 1: tests were run and some failed; anything else proves nothing
        return number, f"BROKEN: pytest ended with {done.returncode}: {done.stdout[-300:]}", time.time() - start
    return number, "killed by " + red[0].split(" ", 1)[1].split(" - ")[0].removeprefix("tests/"), time.time() - start


def main() -> int:
    words = [w for w in sys.argv[1:] if not w.startswith("-")]
    chosen = [n for n, m in enumerate(MUTATIONS) if not words or any(w.lower() in " ".join(m).lower() for w in words)]
    if "--list" in sys.argv:
        for n in chosen:
            print(f"{n + 1:3} {MUTATIONS[n][0]:16} {MUTATIONS[n][3]}")
        return 0
    start, bad = time.time(), []
    with concurrent.futures.ThreadPoolExecutor(max_workers=min(2, os.cpu_count() or 1)) as pool:
        for number, verdict, seconds in pool.map(run_mutation, chosen):
            print(f"{number + 1:3} {MUTATIONS[number][0]:16} {MUTATIONS[number][3]}\n    {verdict} ({seconds:.0f} s)", flush=True)
            if not verdict.startswith("killed"):
                bad.append(number)
    print(f"{len(chosen) - len(bad)} of {len(chosen)} mutations killed in {time.time() - start:.0f} s")
    for number in bad:
        print(f"NOT KILLED: {number + 1} {MUTATIONS[number][0]}: {MUTATIONS[number][1]!r} -> {MUTATIONS[number][2]!r}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
