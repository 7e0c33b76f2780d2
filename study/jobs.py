"""The experiments of the study, as command lines. Every point of every figure is one of them.

    python -m study.run --commands        # print all of them, in order

A job writes one file or folder, which is the last word of its command (--out_dir or --out). It needs the earlier jobs
whose files its command names. Nothing else decides the order, so every command can be run by hand.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from typing import NamedTuple


class Job(NamedTuple):
    command: list[str]  # the words after `python`, perhaps with NAME=value before them
    makes: str  # the file or folder that it writes


class Size(NamedTuple):
    """How large the study is."""

    seeds: tuple[int, ...]
    more_seeds: tuple[int, ...]  # more seeds for the run that over-optimises, because its seeds differ much
    data: str  # flags of data.tiny
    sft: str  # flags of sft.py
    rankings: int  # number of rankings, as in the demo
    few: int  # number of rankings for a weak reward model
    numbers: tuple[int, ...]  # numbers of rankings, for "how much feedback?"
    tests: int  # test prompts (0: all)
    ppo: str  # flags that ppo.py and grpo.py share
    iterations: int  # iterations of an ordinary run
    long: int  # iterations of a run that is to go too far
    ensemble: int  # number of reward models in an ensemble
    breaks: tuple[str, ...]  # mistakes, out of PPO_FLAGS, PPO_BROKEN and SFT_BROKEN
    kl_coefs: tuple[float, ...]
    betas: tuple[float, ...]  # of DPO
    ipo_betas: tuple[float, ...]
    noises: tuple[float, ...]  # annotators' temperatures besides the usual 0.5
    best_of_prompts: int
    best_of: tuple[int, ...]


# {mistake: flags of ppo.py}; the run without it is ppo_0.1
PPO_FLAGS = {
    "no_kl": "--kl_coef 0",
    "kl_k2": "--kl k2",
    "kl_k3": "--kl k3",
    "kl_exact": "--kl exact",
    "no_value_clip": "--value_clip 0",
    "no_whitening": "--no-whiten_advantages",
    "no_eos_penalty": "--eos_penalty 0",
    "train_layers_1": "--train_layers 1",
    "train_layers_2": "--train_layers 2",
    "ptx": "--ptx_coef 0.5",
}
# mistakes in study/broken.py, by script
PPO_BROKEN = ("score_late", "raw_reward", "other_temperature")
SFT_BROKEN = ("length_buckets", "prompt_loss")


FULL = Size(
    seeds=(1, 2, 3),
    more_seeds=(4, 5, 6),
    data="",
    sft="",
    rankings=5000,
    few=300,
    numbers=(300, 1200, 5000),
    tests=0,
    ppo="--rollouts 128 --minibatch 32 --lr 4e-4",
    iterations=24,
    long=40,
    ensemble=4,
    breaks=(*PPO_FLAGS, *PPO_BROKEN, *SFT_BROKEN),
    kl_coefs=(0.8, 0.4, 0.2, 0.1, 0.05, 0.02),
    betas=(1.6, 0.8, 0.4, 0.2, 0.1, 0.05),
    ipo_betas=(0.4, 0.1, 0.025),
    noises=(1.0, 2.0),
    best_of_prompts=64,
    best_of=(1, 2, 4, 8, 16, 32, 64, 128, 256),
)
QUICK = Size(  # nothing is learned: do the commands fit together?
    seeds=(1,),
    more_seeds=(),
    data="--demonstrations 600 --held_out_demonstrations 60 --prompts 300 --held_out_prompts 32",
    sft="--n_layer 2 --n_embd 32 --warmup 5",
    rankings=96,
    few=32,
    numbers=(32, 96),
    tests=16,
    ppo="--rollouts 16 --minibatch 16 --warmup 0 --max_new_tokens 12",
    iterations=1,
    long=1,
    ensemble=2,
    breaks=("ptx", *PPO_BROKEN, *SFT_BROKEN),
    kl_coefs=(0.4, 0.1),
    betas=(0.2,),
    ipo_betas=(0.1,),
    noises=(1.0,),
    best_of_prompts=4,
    best_of=(1, 2, 4),
)


def jobs(size: Size, out: str, only: list[str] | None = None) -> list[Job]:
    """The jobs of all experiments, or of those named in `only`: one experiment after the other, with all its seeds."""
    parts = [part for part in PARTS if not only or part.__name__ in only]
    seeds = {part: size.seeds + size.more_seeds * (part in (base, overoptimisation)) for part in parts}
    return [job for part in parts for seed in seeds[part] for job in part(size, f"{out}/{seed}", seed)]


def needed(job: Job, earlier: list[Job]) -> list[Job]:
    """The earlier jobs that this one needs: its command names their file, or a file in their folder."""
    words = [word.rpartition("=")[2] for word in job.command]
    names = {word for word in words if word != job.makes}
    return [e for e in earlier if any(word == e.makes or word.startswith(e.makes + "/") for word in names)]


def make(command: str, out: str) -> Job:
    """A job that writes `out`. The last word of the command is --out_dir or --out."""
    return Job([*shlex.split(command), out], out)


def base(size: Size, o: str, seed: int) -> Iterator[Job]:
    """The demo's pipeline up to the reward model. Each seed has its own data, SFT policy and annotators. A seed of
    more_seeds needs only the policy and held-out rankings."""
    yield make(f"-m data.tiny --seed {seed} {size.data} --out_dir", f"{o}/data")
    sft = f"sft.py --data {o}/data/demonstrations.jsonl --seed {seed} {size.sft} --out_dir"
    yield make(sft, f"{o}/sft")
    held_out = f"--prompts {o}/data/prompts_held_out.jsonl --n_prompts 400"
    yield make(f"collect.py --policies {o}/sft {held_out} --seed {seed} --out", f"{o}/rankings_held_out.jsonl")
    if seed in size.more_seeds:
        return
    yield rank(o, seed, "rankings", f"--n_prompts {size.rankings}")
    yield reward_model(o, seed, "reward_model", "rankings")


def rank(o: str, seed: int, name: str, flags: str, policy: str = "sft") -> Job:
    """Rankings of a policy's samples. o: the folder of the seed, as in all of these functions."""
    command = f"collect.py --policies {o}/{policy} --prompts {o}/data/prompts.jsonl {flags} --seed {seed} --out"
    return make(command, f"{o}/{name}.jsonl")


def reward_model(o: str, seed: int, name: str, rankings: str, flags: str = "") -> Job:
    data = f"--data {o}/{rankings}.jsonl --held_out_data {o}/rankings_held_out.jsonl --prompts {o}/data/prompts.jsonl"
    command = f"reward_model.py --policy {o}/sft {data} --warmup 2 {flags} --seed {seed} --out_dir"
    return make(command, f"{o}/{name}")


def ppo(size: Size, o: str, seed: int, name: str, flags="", reward="", script="ppo.py", long=False) -> Job:
    """A run of PPO, or of the script, against a reward ("": the demo's reward model). kl_coef is 0.1 unless the flags
    say otherwise."""
    iterations = size.long if long else size.iterations
    value_lr = "" if "grpo.py" in script else "--value_lr 1e-3 "
    files = f"--policy {o}/sft --prompts {o}/data/prompts.jsonl --reward {reward or f'{o}/reward_model'}"
    command = f"{script} {files} {size.ppo} {value_lr}--iterations {iterations} {flags} --seed {seed} --out_dir"
    return make(command, f"{o}/{name}")


def dpo(o: str, seed: int, name: str, flags="", rankings="rankings", script="dpo.py") -> Job:
    data = f"--data {o}/{rankings}.jsonl --held_out_data {o}/rankings_held_out.jsonl"
    return make(f"{script} --policy {o}/sft {data} --warmup 2 {flags} --seed {seed} --out_dir", f"{o}/{name}")


def measure(size: Size, o: str, seed: int, name: str, policies: list[Job], also: str = "") -> Job:
    """The evaluation of some policies on the test prompts: gold reward, reward-model score, exact KL, and the
    others."""
    paths = " ".join([f"{o}/sft", *(job.makes for job in policies)])
    what = f"--reward {o}/reward_model --prompts {o}/data/prompts_test.jsonl --n_prompts {size.tests} --best_of"
    flags = f"{what} --rankings= --demonstrations= {also} --seed {seed}"
    return make(f"evaluate.py --policies {paths} {flags} --out_dir", f"{o}/{name}")


# -------------------------------------------------------------------------------- the experiments


def overoptimisation(size: Size, o: str, seed: int) -> Iterator[Job]:
    """1. Gao et al. 2022: a weak and a strong reward model, each with and without the KL penalty; ensembles of weak
    ones; best of n. A weak reward model has few rankings and a plain scalar head, as in the papers."""
    yield rank(o, seed, "rankings_weak", f"--n_prompts {size.few}")
    weak = []
    for number in range(1 if seed in size.more_seeds else size.ensemble):
        weak.append(f"{o}/weak_{number}")  # the same rankings in another order, and a head with another start
        yield reward_model(o, 10 * seed + number, f"weak_{number}", "rankings_weak", "--expectation no")
    if seed in size.more_seeds:
        yield ppo(size, o, seed, "over_weak_0", "--kl_coef 0", weak[0], long=True)
        return
    for name, reward in (("weak", weak[0]), ("strong", "")):
        for kl_coef in (0, 0.1):
            yield ppo(size, o, seed, f"over_{name}_{kl_coef}", f"--kl_coef {kl_coef}", reward, long=True)
    for combine in ("min", "mean-std"):
        flags = f"--reward_combine {combine} --kl_coef 0"
        yield ppo(size, o, seed, f"over_{combine}_0", flags, " ".join(weak), long=True)
    n = " ".join(map(str, size.best_of))
    models = f"--reward_models {o}/reward_model {' '.join(weak)} --n_prompts {size.best_of_prompts} --best_of {n}"
    command = f"-m study.best_of_n --policy {o}/sft --prompts {o}/data/prompts_test.jsonl {models} --seed {seed} --out"
    yield make(command, f"{o}/best_of_n.json")


def frontier(size: Size, o: str, seed: int) -> Iterator[Job]:
    """2. Reward against KL, as in Rafailov et al. 2023, figure 2."""
    runs = [ppo(size, o, seed, f"ppo_{c}", f"--kl_coef {c}") for c in size.kl_coefs]
    for kind in ("grpo", "rloo"):
        coefs = size.kl_coefs if kind == "grpo" else size.kl_coefs[::3]
        runs += [ppo(size, o, seed, f"{kind}_{c}", f"--kind {kind} --kl_coef {c}", script="grpo.py") for c in coefs]
    runs += [dpo(o, seed, f"dpo_{b}", f"--beta {b}") for b in size.betas]
    runs += [dpo(o, seed, f"ipo_{b}", f"--kind ipo --beta {b}") for b in size.ipo_betas]
    best = make(f"-m study.rankings --rankings {o}/rankings.jsonl --best --out", f"{o}/best_ranked.jsonl")
    flags = f"--init {o}/sft --data {o}/best_ranked.jsonl --lr 5e-4 --warmup 2 --epochs 1 --seed {seed}"
    sft = make(f"sft.py {flags} --out_dir", f"{o}/sft_best")
    yield from (*runs, best, sft, measure(size, o, seed, "evaluate_frontier", [*runs, sft]))


def feedback(size: Size, o: str, seed: int) -> Iterator[Job]:
    """3. How many rankings does a policy need, and how good must they be?"""
    runs = []
    sets = [(f"n{n}", f"--n_prompts {n}") for n in size.numbers if n != size.rankings]
    sets += [(f"noise{t}", f"--n_prompts {size.rankings} --annotator_temperature {t}") for t in size.noises]
    for name, flags in sets:
        yield rank(o, seed, f"rankings_{name}", flags)
        yield reward_model(o, seed, f"rm_{name}", f"rankings_{name}")
        runs.append(ppo(size, o, seed, f"ppo_{name}", reward=f"{o}/rm_{name}"))
        runs.append(dpo(o, seed, f"dpo_{name}", rankings=f"rankings_{name}"))
        yield from runs[-2:]
    yield measure(size, o, seed, "evaluate_feedback", runs)


def iterated(size: Size, o: str, seed: int) -> Iterator[Job]:
    """4. A second round: half of the rankings are of SFT's samples, half are of the samples of the policy that the
    first half gives. Compared with as many rankings of SFT's samples only. With the demo's reward model ("told": its
    head is told expectations) and with a plain scalar head."""
    runs = []
    heads = (("plain", size.rankings, "--expectation no"), ("told", size.numbers[-2], "--expectation yes"))
    for name, number, flags in heads:
        once, half = f"{name}_once", number // 2
        yield rank(o, seed, f"rankings_{once}", f"--n_prompts {number}")
        yield reward_model(o, seed, f"rm_{once}", f"rankings_{once}", flags)
        yield rank(o, seed, f"rankings_{name}_1", f"--n_prompts {half}")
        yield reward_model(o, seed, f"rm_{name}_1", f"rankings_{name}_1", flags)
        first = ppo(size, o, seed, f"ppo_{name}_1", reward=f"{o}/rm_{name}_1")
        yield first
        new = f"--skip {half} --n_prompts {number - half}"
        yield rank(o, seed, f"rankings_{name}_new", new, policy=f"ppo_{name}_1")
        both = f"-m study.rankings --rankings {o}/rankings_{name}_1.jsonl {o}/rankings_{name}_new.jsonl --out"
        yield make(both, f"{o}/rankings_{name}_2.jsonl")
        yield reward_model(o, seed, f"rm_{name}_2", f"rankings_{name}_2", flags)
        last = [ppo(size, o, seed, f"ppo_{name}_{k}", reward=f"{o}/rm_{name}_{k}") for k in ("2", "once")]
        yield from last
        runs += [first, *last]
    yield measure(size, o, seed, "evaluate_iterated", runs)


def secret(size: Size, o: str, seed: int) -> Iterator[Job]:
    """5. DPO's implicit reward, a scalar head and the demo's reward model, all from the same rankings: how well each of
    them judges, and what PPO makes of it without a penalty. The true reward, too, is maximised, for comparison."""
    judge = f"-m study.implicit --dpo {o}/dpo_0.2 --prompts {o}/data/prompts_held_out.jsonl --out"
    yield make(judge, f"{o}/implicit.json")
    rewards = {"plain": f"{o}/rm_plain_once", "gold": "data/tiny.py:gold_reward"}
    for name, reward in rewards.items():
        yield ppo(size, o, seed, f"secret_{name}", "--kl_coef 0", reward, long=True)
    implicit = ppo(size, o, seed, "secret_implicit", "--kl_coef 0", "study/implicit.py:reward", long=True)
    yield implicit._replace(command=[f"IMPLICIT={o}/dpo_0.2", *implicit.command])


def breaks(size: Size, o: str, seed: int) -> Iterator[Job]:
    """6. One mistake at a time, made by a flag or by a small diff (study/broken.py)."""
    chosen = {name: flags for name, flags in PPO_FLAGS.items() if name in size.breaks}
    runs = [ppo(size, o, seed, f"break_{name}", flags) for name, flags in chosen.items()]
    runs += [ppo(size, o, seed, f"break_{name}", script=f"-m study.broken {name} ppo.py") for name in PPO_BROKEN]
    runs.append(dpo(o, seed, "break_dpo_mean", script="-m study.broken dpo_mean dpo.py"))
    flags = f"--data {o}/data/demonstrations.jsonl --epochs 1 --seed {seed} {size.sft} --out_dir"
    runs.append(make(f"sft.py {flags}", f"{o}/break_sft_as_it_is"))
    runs += [make(f"-m study.broken {name} sft.py {flags}", f"{o}/break_{name}") for name in SFT_BROKEN]
    loss = f"--loss_data {o}/data/demonstrations_held_out.jsonl"
    yield from (*runs, measure(size, o, seed, "evaluate_breaks", runs, loss))


PARTS = (base, overoptimisation, feedback, iterated, breaks, frontier, secret)
