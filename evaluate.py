"""Did it work? Compare checkpoints on held-out prompts.

    python evaluate.py                                                   # out/sft, out/ppo and out/dpo
    python evaluate.py --policies out/sft out/ppo out/ppo_no_kl          # any number of them; the first named is the
    baseline

For every policy: the true ("gold") reward and its parts where the task has one, the reward model's score, the exact KL
to the baseline, length, EOS rate, distinct share, and the win rate against the baseline with a 95% interval. And
best-of-n: the baseline's n samples, the one that the reward model likes best. It needs no training, so it is what PPO
has to beat.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from cli import UserError, check, check_ranges, flag, run_main
from common import (
    call_reward,
    gate,
    generator_for,
    gold_function,
    load_function,
    load_model,
    pick_device,
    write_json,
)
from data.batches import by_length, load_rankings, truncate_prompt
from data.files import read_demonstrations, read_prompts
from data.tiny import annotators_bayes_accuracy
from data.tokenizer import Tokenizer, load_tokenizer
from model import GPT, ScalarModel, generate
from ppo import exact_kl
from reward_model import evaluate as evaluate_reward_model


@dataclass
class Config:
    policies: list[str] = flag(
        ["out/sft", "out/ppo", "out/dpo"],
        "checkpoints to compare; the first is the baseline of win rate, KL and headroom",
    )
    reward: str = flag("out/reward_model", "reward model that scores them and picks the best of n; empty: none")
    prompts: str = flag("out/data/prompts_held_out.jsonl", "held-out prompts")
    n_prompts: int = flag(512, "prompts to use (0: all)", low=0)
    rankings: str = flag(
        "out/data/rankings_held_out.jsonl", "held-out rankings, for the reward model's accuracy; empty: none"
    )
    demonstrations: str = flag(
        "out/data/demonstrations_held_out.jsonl", "demonstrations whose mean gold reward is shown beside; empty: none"
    )
    gold: str = flag("auto", "true reward, file.py:function (auto: the embedded task's; empty: none)")
    max_new_tokens: int = flag(48, "longest completion, tokens", low=1)
    temperature: float = flag(1.0, "sampling temperature, also of the KL", above=0)
    best_of: list[int] = flag([1, 2, 4, 8, 16], "values of n for best-of-n", low=1)
    best_of_prompts: int = flag(128, "prompts for best-of-n", low=1)
    out_dir: str = flag("out/evaluate", "folder for results.json")
    strict: bool = flag(False, "exit with status 1 if a gate fails")
    seed: int = flag(1, "seed of the samples", low=0)
    device: str = flag("auto", "auto, cpu, cuda or mps")


def wilson_interval(share: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """95% interval of a share of n independent trials (Wilson 1927): unlike mean +- 1.96 errors, right also near 0 and
    1. With ties counted as half, the trials vary less than yes-or-no ones, so the interval is, if anything, too
    wide."""
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return centre - half, centre + half


def win_rate(rewards: list[float], baseline: list[float]) -> tuple[float, float, float]:
    """(rate, low, high): how often a completion's reward is above the baseline's for the same prompt; a tie is half a
    win."""
    wins = sum(1.0 if a > b else 0.5 if a == b else 0.0 for a, b in zip(rewards, baseline, strict=True))
    return (wins / len(rewards), *wilson_interval(wins / len(rewards), len(rewards)))


@torch.no_grad()
def sample_policy(
    policy: GPT,
    reference: GPT,
    reward_model: ScalarModel | None,
    ids: list[list[int]],
    tokenizer: Tokenizer,
    config: Config,
    seed: int,
) -> dict[str, list]:
    """One completion of every prompt -> lists in the order of the prompts: completion, kl (nats a sequence), rm, ended,
    length."""
    found: dict[str, list] = {k: [None] * len(ids) for k in ("completion", "kl", "rm", "ended", "length")}
    for number, rows in enumerate(by_length(ids, 128)):
        generator = generator_for(policy.device, seed, number)
        rollout = generate(
            policy,
            [ids[i] for i in rows],
            config.max_new_tokens,
            eos_id=tokenizer.eos_id,
            temperature=config.temperature,
            generator=generator,
        )
        kl = []
        for tokens in rollout.tokens.split(32):
            same = policy is reference
            kl.append(
                torch.zeros(len(tokens), tokens.size(1) - 1)
                if same
                else exact_kl(policy(tokens) / config.temperature, reference(tokens) / config.temperature).cpu()
            )
        kl_sum = torch.where(rollout.action_mask.cpu(), torch.cat(kl), 0.0).sum(1)  # (b,)
        scores = reward_model.score(rollout.tokens, rollout.lens) if reward_model else torch.zeros(len(rows))
        batch = {
            "completion": [tokenizer.decode(c) for c in rollout.completions()],
            "kl": kl_sum.tolist(),
            "rm": scores.tolist(),
            "ended": rollout.ended.tolist(),
            "length": (rollout.lens - rollout.prompt_lens).tolist(),
        }
        for key, column in batch.items():
            for i, value in zip(rows, column, strict=True):
                found[key][i] = value
    return found


@torch.no_grad()
def best_of_n(
    policy: GPT,
    reward_model: ScalarModel,
    prompts: list[str],
    ids: list[list[int]],
    gold,
    tokenizer: Tokenizer,
    config: Config,
) -> dict[str, dict]:
    """For each n: the gold reward and the reward model's score of the completion it likes best among the first n
    samples."""
    most = max(config.best_of)
    completions: list[list[str]] = [[] for _ in ids]
    scores: list[list[float]] = [[] for _ in ids]
    for number, rows in enumerate(by_length(ids, max(1, 256 // most))):
        repeated = [ids[i] for i in rows for _ in range(most)]
        generator = generator_for(policy.device, config.seed, 1000, number)
        rollout = generate(
            policy,
            repeated,
            config.max_new_tokens,
            eos_id=tokenizer.eos_id,
            temperature=config.temperature,
            generator=generator,
        )
        score = reward_model.score(rollout.tokens, rollout.lens).tolist()
        for k, (completion, value) in enumerate(zip(rollout.completions(), score, strict=True)):
            completions[rows[k // most]].append(tokenizer.decode(completion))
            scores[rows[k // most]].append(value)
    results = {}
    for n in config.best_of:
        picks = [max(range(n), key=lambda i, s=s: s[i]) for s in scores]
        results[str(n)] = {"rm": mean([s[i] for s, i in zip(scores, picks, strict=True)])}
        # the KL of best-of-n to the policy it samples from, at most (Stiennon et al. 2020, appendix G.3)
        results[str(n)]["kl_bound"] = math.log(n) - (n - 1) / n
        if gold:
            results[str(n)]["gold"] = mean(
                call_reward(gold, prompts, [c[i] for c, i in zip(completions, picks, strict=True)])
            )
    return results


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def standard_error(values: list[float]) -> float:
    return torch.tensor(values).std().item() / math.sqrt(len(values)) if len(values) > 1 else 0.0


def task_ceiling(config: Config, tokenizer_name: str, gold, prompts: list[str]) -> float | None:
    """Gold reward of the best completions there are, where the task can write them."""
    if config.gold == "auto" and tokenizer_name == "tiny":
        best = load_function("data/tiny.py:best_completion")
        return mean(call_reward(gold, prompts, [best(p) for p in prompts]))
    return None


def print_table(results: dict) -> None:
    columns = {
        "gold": "{:.3f}",
        "gold_se": "{:.3f}",
        "rm": "{:.2f}",
        "kl": "{:.2f}",
        "win_rate": "{:.3f}",
        "eos_rate": "{:.3f}",
        "length": "{:.1f}",
        "distinct": "{:.2f}",
        "headroom_closed": "{:.0%}",
    }
    shown = {k: f for k, f in columns.items() if any(p.get(k) is not None for p in results["policies"].values())}
    titles = {
        "gold_se": "+-",
        "win_rate": "win rate [95% interval]",
        "headroom_closed": "headroom closed",
        "rm": "RM score",
        "kl": "KL",
        "eos_rate": "EOS",
    }
    rows = [["policy", *(titles.get(k, k) for k in shown)]]
    for name, figures in results["policies"].items():
        row = [name]
        for key, template in shown.items():
            value = figures.get(key)
            text = "-" if value is None else template.format(value)
            row.append(
                f"{text} [{figures['win_low']:.3f}, {figures['win_high']:.3f}]"
                if key == "win_rate" and value is not None
                else text
            )
        rows.append(row)
    for n, figures in results["best_of_n"].items():
        cells = {"gold": figures.get("gold"), "rm": figures["rm"], "kl": figures["kl_bound"]}
        rows.append([f"best of {n}", *(columns[k].format(cells[k]) if cells.get(k) is not None else "" for k in shown)])
    widths = [max(len(r[c]) for r in rows) for c in range(len(rows[0]))]
    for row in rows:
        print(
            "  ".join(
                cell.ljust(w) if c == 0 else cell.rjust(w) for c, (cell, w) in enumerate(zip(row, widths, strict=True))
            )
        )


def run(config: Config) -> dict:
    check_ranges(config)
    check(bool(config.policies), "--policies needs at least one checkpoint")
    device = pick_device(config.device)
    made_by = {"sft": "python sft.py", "ppo": "python ppo.py", "dpo": "python dpo.py"}
    names = [Path(p).name for p in config.policies]
    names = (
        names if len(set(names)) == len(names) else config.policies
    )  # out/a/ppo and out/b/ppo need their whole paths
    reference, tokenizer_name = load_model(
        config.policies[0], device, made_by=made_by.get(Path(config.policies[0]).name, "")
    )
    tokenizer = load_tokenizer(tokenizer_name)
    reward_model = load_model(config.reward, device, "scalar", "python reward_model.py")[0] if config.reward else None
    gold = gold_function(config.gold, tokenizer_name)
    if gold is None and reward_model is None:
        raise UserError("nothing to judge by: give --gold file.py:function or --reward CHECKPOINT")
    room = reference.config.block_size - config.max_new_tokens
    check(room > 0, f"--max_new_tokens {config.max_new_tokens} leaves no room for a prompt")
    prompts = read_prompts(config.prompts, "python -m data.tiny")[: config.n_prompts or None]
    ids = [truncate_prompt(tokenizer.encode_prompt(p), room) for p in prompts]

    ceiling = task_ceiling(config, tokenizer_name, gold, prompts)
    results: dict = {
        "ceiling": ceiling,
        "demonstrations": None,
        "reward_model": {},
        "policies": {},
        "best_of_n": {},
        "gates": [],
    }
    if gold and config.demonstrations:
        rows = read_demonstrations(config.demonstrations, "python -m data.tiny")
        results["demonstrations"] = mean(call_reward(gold, [p for p, _ in rows], [c for _, c in rows]))
    if reward_model and config.rankings:
        items = load_rankings(config.rankings, tokenizer, reference.config.block_size, "python collect.py")
        results["reward_model"] = evaluate_reward_model(reward_model, items, device)
        results["reward_model"]["bayes_accuracy"] = annotators_bayes_accuracy(config.rankings)

    baseline: list[float] = []
    for number, (name, path) in enumerate(zip(names, config.policies, strict=True)):
        policy, found = (
            (reference, tokenizer_name) if number == 0 else load_model(path, device, made_by=made_by.get(name, ""))
        )
        check(
            policy.config.block_size >= reference.config.block_size,
            f"{path}: its block_size is smaller than that of {config.policies[0]}",
        )
        check(found == tokenizer_name, f"{path} has the {found} vocabulary, {config.policies[0]} has {tokenizer_name}")
        samples = sample_policy(policy, reference, reward_model, ids, tokenizer, config, config.seed * 100 + number)
        golds = call_reward(gold, prompts, samples["completion"]) if gold else None
        judged = golds if golds is not None else samples["rm"]  # by the truth where it is known
        if number == 0:
            baseline = judged
        rate, low, high = win_rate(judged, baseline) if number else (None, None, None)
        figures = {
            "gold": mean(golds) if golds else None,
            "gold_se": standard_error(golds) if golds else None,
            "rm": mean(samples["rm"]) if reward_model else None,
            "kl": mean(samples["kl"]),
            **{"win_rate": rate, "win_low": low, "win_high": high},
            "eos_rate": mean([float(e) for e in samples["ended"]]),
            "length": mean(samples["length"]),
            "distinct": len(set(samples["completion"])) / len(prompts),
            "headroom_closed": (mean(golds) - mean(baseline)) / (ceiling - mean(baseline))
            if ceiling is not None
            else None,
        }
        if ceiling is not None:
            parts = load_function("data/tiny.py:gold_parts")
            each = [parts(p, c) for p, c in zip(prompts, samples["completion"], strict=True)]
            figures["parts"] = {k: mean([e[k] for e in each]) for k in each[0]}
        results["policies"][name] = figures
    if reward_model and config.best_of:
        n = min(config.best_of_prompts, len(prompts))
        results["best_of_n"] = best_of_n(reference, reward_model, prompts[:n], ids[:n], gold, tokenizer, config)

    print_table(results)
    if ceiling is not None:
        print("gold reward, part by part:")
        for name, figures in results["policies"].items():
            print(f"  {name:12} " + "  ".join(f"{k} {v:+.2f}" for k, v in figures["parts"].items()))
        print(
            f"ceiling {ceiling:.2f}; demonstrations {results['demonstrations'] or 0:.2f}; win rates by the gold reward against {names[0]}"
        )
        results["gates"] = gates(results, names[0])
    write_json(results, Path(config.out_dir) / "results.json")
    return results


def gates(results: dict, baseline: str) -> list[dict]:
    """What the embedded task must show."""
    found = []
    if results["demonstrations"] is not None:
        left = (results["ceiling"] - results["policies"][baseline]["gold"]) / (
            results["ceiling"] - results["demonstrations"]
        )
        found.append(
            gate(f"{baseline}: share of the way from demonstrations to ceiling still open", left, 0.4, math.inf)
        )
    if results["reward_model"].get("bayes_accuracy"):
        share = results["reward_model"]["accuracy"] / results["reward_model"]["bayes_accuracy"]
        found.append(gate("reward model: share of the annotators' Bayes accuracy", share, 0.93, 1.03))
    for name, closed in (("ppo", 0.55), ("dpo", 0.40)):
        if name in results["policies"]:
            figures = results["policies"][name]
            found.append(gate(f"{name}: headroom closed", figures["headroom_closed"], closed, 1.0))
            found.append(
                gate(f"{name}: win rate over {baseline}, low end of the interval", figures["win_low"], 0.5, 1.0)
            )
            found.append(gate(f"{name}: exact KL, nats a sequence", figures["kl"], 0.1, 15.0))
            found.append(gate(f"{name}: EOS rate", figures["eos_rate"], 0.98, 1.0))
    return found


def main() -> None:
    run_main(run, Config, __doc__)


if __name__ == "__main__":
    main()
