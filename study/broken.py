"""Break it on purpose: run a script with one of these mistakes in it, each of them somebody's real one.

    python -m study.broken score_late ppo.py --out_dir out/broken     # any script, any of its flags
    python -m study.broken                                            # the mistakes, as diffs

The mistake goes into a copy of the code that is gone afterwards; the diff is printed first.
"""

from __future__ import annotations

import difflib
import runpy
import shutil
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent


class Mistake(NamedTuple):
    file: str
    right: str  # stands in the file once
    wrong: str
    what: str


BROKEN = {
    "score_late": Mistake(
        "frame.py",
        "    return F.one_hot(last, action_mask.size(1)) * scores[:, None]",
        "    late = (last + 1).clamp(max=action_mask.size(1) - 1)\n"
        "    return F.one_hot(late, action_mask.size(1)) * scores[:, None]",
        "the score lands one slot late, on filler, where only the longest row of the batch notices it",
    ),
    "raw_reward": Mistake(
        "lib/reward.py",
        "        loaded.append((spec, scorer.model))",
        "        loaded.append((spec, scorer.model))\n        scorer.model.mean.zero_(), scorer.model.std.fill_(1.0)",
        "the reward model's raw output, whose mean and scale are accidents of its training",
    ),
    "other_temperature": Mistake(
        "ppo.py",
        '        options = {"eos_id": tokenizer.eos_id, "temperature": config.temperature, "generator": rng}',
        '        options = {"eos_id": tokenizer.eos_id, "temperature": 0.7 * config.temperature, "generator": rng}',
        "tokens are sampled at another temperature than their log-probs are taken at",
    ),
    "dpo_mean": Mistake(
        "dpo.py",
        "    return logprobs.new_zeros(len(owner), K + 1).scatter_add(1, owner, logprobs)[:, :K]",
        "    sums = logprobs.new_zeros(len(owner), K + 1).scatter_add(1, owner, logprobs)\n"
        "    counts = torch.zeros_like(sums).scatter_add(1, owner, torch.ones_like(logprobs))\n"
        "    return (sums / counts.clamp(min=1))[:, :K]",
        "log-probs are averaged over the completion's tokens, not summed",
    ),
    "length_buckets": Mistake(
        "data/batches.py",
        "        batches += [order[i : i + config.batch_size] for i in range(0, len(order), config.batch_size)]",
        "        order.sort(key=len)\n"
        "        buckets = [order[i : i + config.batch_size] for i in range(0, len(order), config.batch_size)]\n"
        '        random.Random(f"{config.seed} {epoch}").shuffle(buckets)\n'
        "        batches += buckets",
        "optimiser steps of texts of one length: a step of short texts has few tokens, and each weighs more",
    ),
    "prompt_loss": Mistake(
        "sft.py",
        "    mask = completion_mask(prompt_lens, lens, tokens.size(1))  # (b, T)",
        "    mask = completion_mask(prompt_lens * 0 + 1, lens, tokens.size(1))  # (b, T)",
        "the loss is taken over the prompt too",
    ),
}


def diff(mistake: Mistake, before: str) -> str:
    after = before.replace(mistake.right, mistake.wrong)
    lines = difflib.unified_diff(before.splitlines(), after.splitlines(), mistake.file, mistake.file, "", "", 0, "")
    return "\n".join(list(lines)[2:])


def main() -> None:
    if len(sys.argv) < 3 or sys.argv[1] not in BROKEN or not (ROOT / sys.argv[2]).is_file():
        for name, mistake in BROKEN.items():
            before = (ROOT / mistake.file).read_text(encoding="utf-8")
            print(f"{name}: {mistake.what} ({mistake.file})\n{diff(mistake, before)}\n")
        if len(sys.argv) > 1:
            sys.exit("broken.py: error: name one of these mistakes and a script, e.g. score_late ppo.py")
        return
    mistake, script = BROKEN[sys.argv[1]], sys.argv[2]
    with tempfile.TemporaryDirectory() as folder:
        for source in [path for folder in ("", "data/", "lib/", "tools/") for path in ROOT.glob(f"{folder}*")]:
            if source.is_file():
                (copy := Path(folder) / source.relative_to(ROOT)).parent.mkdir(exist_ok=True)
                shutil.copy(source, copy)
        broken = Path(folder) / mistake.file
        before = broken.read_text(encoding="utf-8")
        broken.write_text(before.replace(mistake.right, mistake.wrong), encoding="utf-8")
        print(f"{mistake.file}: {mistake.what}\n{diff(mistake, before)}", flush=True)
        sys.argv = sys.argv[2:]
        sys.path[0] = folder  # imports come from the copy
        runpy.run_path(str(Path(folder) / script), run_name="__main__")


if __name__ == "__main__":
    main()
