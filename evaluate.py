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
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from data.batches import by_length, contrast_rankings, encode_prompts, load_examples, load_rankings
from data.files import read_demonstrations, read_prompts, sibling
from data.tiny import PARTS, annotators_bayes_accuracy, best_completion, gold_parts, gold_reward, task_of
from data.tokenizer import Tokenizer, vocabulary_name
from frame import put_back, rows_at_a_time
from lib.checkpoint import Checkpoint, load_model, load_scorer, note_task
from lib.cli import DTYPES, Flags, UserError, check, flag, run_main
from lib.reward import check_task, gold_function, score_rollout
from lib.run import gate, write_json
from lib.train import autocast, generator_for, pick_device
from model import GPT, ScalarModel
from ppo import distribution_kl
from reward_model import accuracy_by_part
from reward_model import evaluate as evaluate_reward_model
from sampling import Rollout, generate
from sft import Config as LossConfig
from sft import held_out_loss


@dataclass
class Config(Flags):
    policies: list[str] = flag(["out/sft", "out/ppo", "out/dpo"], "checkpoints to compare; the first is the baseline")
    reward: str = flag("out/reward_model", "reward model that scores them and picks the best of n; empty: none")
    prompts: str = flag("out/data/prompts_held_out.jsonl", "held-out prompts")
    n_prompts: int = flag(512, "prompts to use (0: all)", low=0)
    rankings: str = flag("auto", "held-out rankings for the reward model's accuracy (auto: those beside the prompts)")
    demonstrations: str = flag(
        "auto", "demonstrations to show beside, by the true reward (auto: those beside the prompts)"
    )
    gold: str = flag("auto", "true reward, file.py:function (auto: the embedded task's; empty: none)")
    max_new_tokens: int = flag(48, "longest completion, tokens", low=1)
    temperature: float = flag(1.0, "sampling temperature, also of the KL", above=0)
    best_of: list[int] = flag([1, 2, 4, 8, 16], "values of n for best-of-n; none: leave it out", low=1)
    loss_data: str = flag("", "demonstrations whose loss to measure: what alignment has cost elsewhere (empty: none)")
    show: int = flag(0, "prompts to print with every policy's answer at temperature 0", low=0)
    out_dir: str = flag("out/evaluate", "folder for results.json")
    strict: bool = flag(False, "exit with status 1 if a gate fails")
    seed: int = flag(1, "seed of the samples", low=0, high=2**63 - 1)
    device: str = flag("auto", "auto, cpu, cuda or mps")
    dtype: str = flag("float32", "of the products in sampling and scoring; KL and losses: float32", choices=DTYPES)


def wilson_interval(share: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """95% interval of a share of n independent trials (Wilson 1927): unlike mean +- 1.96 errors, right also near 0 and
    1. With ties counted as half, the trials vary less than yes-or-no ones, so the interval is, if anything, too
    wide."""
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


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
    temperature: float | None = None,
) -> dict[str, list]:
    """One completion of every prompt -> lists in the order of the prompts: completion, kl (nats a sequence), rm (None
    without a reward model), ended, length. temperature: config.temperature unless given."""
    temperature = config.temperature if temperature is None else temperature
    found: dict[str, list] = {k: [None] * len(ids) for k in ("completion", "kl", "rm", "ended", "length")}
    options = {"eos_id": tokenizer.eos_id, "temperature": temperature}
    for number, rows in enumerate(by_length(ids, 128)):
        rng = generator_for(policy.device, seed, number)
        with autocast(policy.device, config.dtype):
            rollout = generate(policy, [ids[i] for i in rows], config.max_new_tokens, generator=rng, **options)
            scores = score_rollout(reward_model, rollout).tolist() if reward_model else [None] * len(rows)
        kl = torch.zeros(rollout.action_mask.shape, device=policy.device)  # (b, T-1)
        if policy is not reference:
            kl = token_kl(policy, reference, rollout, temperature)
        batch = {
            "completion": [tokenizer.decode(c) for c in rollout.completions()],
            "kl": kl.sum(1).tolist(),
            "rm": scores,
            "ended": rollout.ended.tolist(),
            "length": (rollout.lens - rollout.prompt_lens).tolist(),
        }
        for key, column in batch.items():
            for i, value in zip(rows, column, strict=True):
                found[key][i] = value
    return found


def token_kl(policy: GPT, reference: GPT, rollout: Rollout, temperature: float) -> Tensor:
    """distribution_kl of the two at each sampled token, 0 elsewhere, (B, T-1). A few rows at a time: about eight
    tensors of their logits' size exist at once."""
    mask, rows = rollout.action_mask, max(1, rows_at_a_time(rollout.tokens, policy) // 4)
    found = []  # (n,) each
    for tokens, wanted in zip(rollout.tokens.split(rows), mask.split(rows), strict=True):
        found.append(distribution_kl(policy(tokens, wanted) / temperature, reference(tokens, wanted) / temperature))
    return put_back(torch.cat(found), mask)


@torch.no_grad()
def best_of_n(
    policy: GPT,
    reward_model: ScalarModel,
    prompts: list[str],
    ids: list[list[int]],
    gold: Callable | None,
    tokenizer: Tokenizer,
    config: Config,
) -> dict[str, dict]:
    """For each n: gold reward and reward-model score of the completion that the reward model likes best among n
    samples, in expectation over all choices of n of the N samples of each prompt (N is the largest n)."""
    most = max(config.best_of)
    options = {"eos_id": tokenizer.eos_id, "temperature": config.temperature}
    scores, golds = torch.zeros(len(ids), most), torch.zeros(len(ids), most)  # (P, N)
    for number, rows in enumerate(by_length(ids, max(1, 256 // most))):
        repeated = [ids[i] for i in rows for _ in range(most)]
        rng = generator_for(policy.device, config.seed, 1000, number)
        with autocast(policy.device, config.dtype):
            rollout = generate(policy, repeated, config.max_new_tokens, generator=rng, **options)
            scores[rows] = score_rollout(reward_model, rollout).cpu().view(-1, most)
        if gold:
            asked = [prompts[i] for i in rows for _ in range(most)]
            completions = [tokenizer.decode(c) for c in rollout.completions()]
            golds[rows] = torch.tensor(gold(asked, completions, rollout.ended.tolist())).view(-1, most)
    results = {}
    for n in config.best_of:
        rm = expected_best(scores, scores, n)  # (P,)
        results[str(n)] = {"rm": rm.mean().item()}
        # the KL of best-of-n to the policy it samples from is at most this (Stiennon et al. 2020, appendix G.3)
        results[str(n)]["kl_bound"] = math.log(n) - (n - 1) / n
        if gold:
            best = expected_best(scores, golds, n).tolist()
            results[str(n)] |= {"gold": mean(best), "gold_se": standard_error(best)}
    return results


def expected_best(scores: Tensor, values: Tensor, n: int) -> Tensor:
    """The value of the best-scored of n samples, averaged over all subsets of n of the N samples: scores, values (P, N)
    -> (P,).

    Sorted by score, sample i (from 0) is the best of a subset if the other n - 1 come from the i below it: C(i, n-1) of
    the C(N, n) subsets (as in Nakano et al. 2021, arXiv:2112.09332, appendix I)."""
    N = scores.size(1)
    weights = torch.tensor([math.comb(i, n - 1) / math.comb(N, n) for i in range(N)], dtype=torch.float64)  # (N,)
    ranked = values.double().gather(1, scores.argsort(dim=1, stable=True))  # (P, N), from the worst score to the best
    return ranked @ weights


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def standard_error(values: list[float]) -> float:
    return torch.tensor(values).std().item() / math.sqrt(len(values)) if len(values) > 1 else 0.0


# column, title, format
COLUMNS = (
    ("gold", "gold", "{:.3f}"),
    ("gold_se", "+-", "{:.3f}"),
    ("rm", "RM score", "{:.2f}"),
    ("kl", "KL", "{:.2f}"),
    ("win_rate", "win rate [95% interval]", "{:.3f}"),
    ("rm_win_rate", "by the reward model", "{:.3f}"),
    ("eos_rate", "EOS", "{:.3f}"),
    ("length", "length", "{:.1f}"),
    ("distinct", "distinct", "{:.2f}"),
    ("headroom_closed", "headroom closed", "{:.0%}"),
    ("correct", "correct", "{:.2f}"),
    ("correct_greedy", "at temperature 0", "{:.2f}"),
    ("loss", "held-out loss", "{:.3f}"),
)


def print_table(results: dict) -> None:
    shown = [c for c in COLUMNS if any(p[c[0]] is not None for p in results["policies"].values())]
    rows = [["policy", *(title for _, title, _ in shown)]]
    for name, figures in results["policies"].items():
        cells = {key: template.format(figures[key]) for key, _, template in shown if figures[key] is not None}
        for key in ("win", "rm_win"):
            if f"{key}_rate" in cells:
                cells[f"{key}_rate"] += f" [{figures[f'{key}_low']:.3f}, {figures[f'{key}_high']:.3f}]"
        rows.append([name, *(cells.get(key, "-") for key, _, _ in shown)])
    for n, figures in results["best_of_n"].items():
        cells = {key: template.format(figures[key]) for key, _, template in shown if key in figures}
        cells["kl"] = f"<={figures['kl_bound']:.2f}"
        rows.append([f"best of {n}", *(cells.get(key, "") for key, _, _ in shown)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        first, *rest = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join([first.strip().ljust(widths[0]), *rest]).rstrip())


def unique_names(paths: list[str]) -> list[str]:
    """The folders' names; whole paths where two are the same; numbered where even these are."""
    names = [Path(p).name for p in paths]
    names = names if len(set(names)) == len(names) else paths
    return [name if names.index(name) == i else f"{name} ({i + 1})" for i, name in enumerate(names)]


def load_policies(config: Config, device: torch.device) -> list[Checkpoint]:
    """The checkpoints to compare, which must have one vocabulary; the first is the baseline."""
    made_by = {"sft": "python sft.py", "ppo": "python ppo.py", "grpo": "python grpo.py", "dpo": "python dpo.py"}
    loaded = [load_model(p, device, made_by=made_by.get(Path(p).name, "")) for p in config.policies]
    first, baseline = config.policies[0], loaded[0]
    for path, found in zip(config.policies, loaded, strict=True):
        smaller = found.model.config.block_size < baseline.model.config.block_size
        check(not smaller, f"{path}: its block_size is smaller than that of {first}")
        theirs, ours = vocabulary_name(found.vocabulary), vocabulary_name(baseline.vocabulary)
        same = found.vocabulary == baseline.vocabulary
        check(same, f"{path} has the {theirs} vocabulary, {first} has {ours}")
    return loaded


def judge_reward_model(model: ScalarModel, prompts: list[str], tokenizer: Tokenizer, task: str, config: Config) -> dict:
    """The reward model's accuracy on rankings beside the prompts, if there are any; part by part on the embedded task's
    prompts."""
    path = beside(config.prompts, config.rankings, "rankings")
    if not path:
        return {}
    block_size, device = model.config.block_size, model.gpt.device
    items = load_rankings(path, tokenizer, block_size, "python collect.py")
    results = evaluate_reward_model(model, items, device) | {"bayes_accuracy": annotators_bayes_accuracy(path)}
    if task == "tiny":
        results |= accuracy_by_part(model, contrast_rankings(prompts, tokenizer, block_size), device)
    return results


def figures_of(samples: dict, baseline: dict) -> dict:
    """A policy's row of the table: means over the prompts, and how often it wins over the baseline by the truth and by
    the reward model ("rm_win"). Where only one of the two judges, its verdict is the win rate. None: not known."""
    figures = dict.fromkeys([*(key for key, _, _ in COLUMNS), "win_low", "win_high", "rm_win_low", "rm_win_high"])
    figures |= {
        "kl": mean(samples["kl"]),
        "eos_rate": mean([float(e) for e in samples["ended"]]),
        "length": mean(samples["length"]),
        "distinct": len(set(samples["completion"])) / len(samples["completion"]),
    }
    judges = [judge for judge in ("gold", "rm") if samples[judge][0] is not None]
    for name, judge in zip(("win", "rm_win"), judges, strict=False):
        figures[judge] = mean(samples[judge])
        if samples is not baseline:
            wins = win_rate(samples[judge], baseline[judge])
            figures |= {f"{name}_{key}": x for key, x in zip(("rate", "low", "high"), wins, strict=True)}
    if "gold" in judges:
        figures["gold_se"] = standard_error(samples["gold"])
    return figures


def task_figures(prompts: list[str], samples: dict, greedy: dict, baseline: dict, ceiling: float) -> dict:
    """What only the embedded task can tell of a policy: how much of the way to the ceiling it went, each part of its
    gold reward, and how many answers are right, sampled and at temperature 0."""
    start = mean(baseline["gold"])
    each = [gold_parts(p, c) for p, c in zip(prompts, samples["completion"], strict=True)]
    greedy["right"] = [gold_parts(p, c)["correct"] > 0 for p, c in zip(prompts, greedy["completion"], strict=True)]
    return {
        "headroom_closed": (mean(samples["gold"]) - start) / ((ceiling - start) or math.inf),
        "correct": mean([float(e["correct"] > 0) for e in each]),
        "correct_greedy": mean([float(right) for right in greedy["right"]]),
        "parts": {k: mean([e[k] for e in each]) for k in PARTS},
    }


def run(config: Config) -> dict:
    check(bool(config.policies), "--policies needs at least one checkpoint")
    check(not Path(config.out_dir).is_file(), f"--out_dir {config.out_dir} is a file; name a folder")
    device = pick_device(config.device)
    loaded = load_policies(config, device)
    reference, tokenizer = loaded[0].model, loaded[0].tokenizer
    prompts = read_prompts(config.prompts, "python -m data.tiny")[: config.n_prompts or None]
    task = task_of(config.prompts)
    note_task(loaded[0], task, config.prompts)
    reward_model, gold = None, gold_function(config.gold, task)
    if config.reward:
        scorer = load_scorer(config.reward, loaded[0], device)
        check_task(scorer, config.reward, task)
        reward_model = scorer.model
    if gold is None and reward_model is None:
        raise UserError("nothing to judge by: give --gold file.py:function or --reward CHECKPOINT")
    ids = encode_prompts(prompts, tokenizer, reference.config.block_size, config.max_new_tokens, config.prompts)

    ceiling = None
    if config.gold == "auto" and task == "tiny":
        ceiling = mean(gold_reward(prompts, [best_completion(p) for p in prompts]))
    results: dict = {"ceiling": ceiling, "demonstrations": None, "reward_model": {}, "policies": {}, "best_of_n": {}}
    if gold and (path := beside(config.prompts, config.demonstrations, "demonstrations")):
        rows = read_demonstrations(path, "python -m data.tiny")
        results["demonstrations"] = mean(gold([p for p, _ in rows], [c for _, c in rows]))
        print(f"{path}: {len(rows):,} demonstrations")
    if reward_model:
        results["reward_model"] = judge_reward_model(reward_model, prompts, tokenizer, task, config)

    examples = load_examples(config.loss_data, tokenizer, reference.config.block_size)
    greedy: dict[str, dict[str, list]] = {}  # policy -> what it says at temperature 0
    baseline: dict[str, list] = {}  # the first policy's samples
    for number, (name, found) in enumerate(zip(unique_names(config.policies), loaded, strict=True)):
        seed = config.seed * 100 + number
        samples = sample_policy(found.model, reference, reward_model, ids, tokenizer, config, seed)
        samples["gold"] = gold(prompts, samples["completion"], samples["ended"]) if gold else [None]
        baseline = baseline or samples
        figures = figures_of(samples, baseline)
        if examples:
            figures["loss"] = held_out_loss(found.model, examples, LossConfig())
        if ceiling is not None or config.show:
            needed = ids if ceiling is not None else ids[: config.show]
            greedy[name] = sample_policy(found.model, found.model, None, needed, tokenizer, config, 0, 0.0)
        if ceiling is not None:
            figures |= task_figures(prompts, samples, greedy[name], baseline, ceiling)
        results["policies"][name] = figures
    if reward_model and config.best_of:
        results["best_of_n"] = best_of_n(reference, reward_model, prompts, ids, gold, tokenizer, config)

    print_table(results)
    judge = "the gold reward (+-: its standard error)" if gold else f"the reward model {config.reward}"
    print(f"{len(prompts)} prompts; win rates against {config.policies[0]}, judged by {judge}")
    for i in range(min(config.show, len(prompts))):
        print(f"\n{prompts[i]}")
        for name, answers in greedy.items():
            print(f"  {name:12} {answers['completion'][i]!r}" + ("" if answers["ended"][i] else " [cut]"))
    results["gates"] = []
    if ceiling is not None:
        results["gates"] = report_task(results)
        show_answers(prompts, greedy)
    write_json(results, Path(config.out_dir) / "results.json")
    return results


def beside(prompts: str, path: str, kind: str) -> str:
    """ "auto": prompts_test.jsonl -> rankings_test.jsonl in the same folder, if it is there."""
    name = Path(prompts).name
    if path != "auto":
        return path
    return sibling(prompts, name.replace("prompts", kind)) if "prompts" in name else ""


def show_answers(prompts: list[str], greedy: dict[str, dict[str, list]]) -> None:
    """What every policy says at temperature 0: four prompts that all get right, and up to two that each gets wrong."""
    everyone = [i for i in range(len(prompts)) if all(answers["right"][i] for answers in greedy.values())]
    shown = everyone[:4]
    for answers in greedy.values():
        shown += [i for i in range(len(prompts)) if not answers["right"][i] and i not in shown][:2]
    print("\nanswers at temperature 0, right ones and wrong ones:")
    for i in shown:
        print(f"  {prompts[i]}")
        for name, answers in greedy.items():
            print(f"    {name:10} {'right' if answers['right'][i] else 'WRONG'}  {answers['completion'][i]}")


def report_task(results: dict) -> list[dict]:
    """What the embedded task shows beyond the table -> its gates."""
    policies, found = results["policies"], []
    baseline = next(iter(policies))
    print("gold reward, part by part:")
    for name, figures in policies.items():
        print(f"  {name:12} " + "  ".join(f"{k} {v:+.2f}" for k, v in figures["parts"].items()))
    shown = "" if results["demonstrations"] is None else f"; demonstrations {results['demonstrations']:.2f}"
    print(f"ceiling {results['ceiling']:.2f}{shown}")
    if results["demonstrations"] not in (None, results["ceiling"]):
        left = (results["ceiling"] - policies[baseline]["gold"]) / (results["ceiling"] - results["demonstrations"])
        name = f"{baseline}: share of the way from demonstrations to ceiling still open"
        found.append(gate(name, left, 0.4, math.inf))
    if results["reward_model"].get("bayes_accuracy"):
        share = results["reward_model"]["accuracy"] / results["reward_model"]["bayes_accuracy"]
        found.append(gate("reward model: share of the annotators' Bayes accuracy", share, 0.89, 1.03))
    if "right_vs_wrong" in results["reward_model"]:
        parts = {k: v for k, v in results["reward_model"].items() if "_vs_" in k}
        print("reward model, part by part: " + ", ".join(f"{k} {v:.2f}" for k, v in parts.items()))
        found.append(gate("reward model: right against wrong, manners equal", parts["right_vs_wrong"], 0.75, 1.0))
    start = policies[baseline]
    found.append(gate(f"{baseline}: correct at temperature 1", start["correct"], 0.0, 0.5))
    # at least: headroom closed; right answers above the baseline's, sampled and at temperature 0
    least = {"ppo": (0.55, 0.15, -0.05), "grpo": (0.45, 0.10, -0.08), "dpo": (0.50, 0.15, -0.05)}
    for name, (closed, gained, kept) in least.items():
        if name in policies and name != baseline:
            figures = policies[name]
            found.append(gate(f"{name}: headroom closed", figures["headroom_closed"], closed, 1.0))
            found.append(gate(f"{name}: win rate over {baseline}, low end", figures["win_low"], 0.5, 1.0))
            found.append(gate(f"{name}: exact KL, nats a sequence", figures["kl"], 0.1, 20.0))
            gain, lost = (figures[k] - start[k] for k in ("correct", "correct_greedy"))
            found.append(gate(f"{name}: correct at temperature 1, above {baseline}", gain, gained, 1.0))
            found.append(gate(f"{name}: correct at temperature 0, above {baseline}", lost, kept, 1.0))
            found.append(gate(f"{name}: EOS rate", figures["eos_rate"], 0.98, 1.0))
    return found


def main() -> None:
    run_main(run, Config, __doc__)


if __name__ == "__main__":
    main()
