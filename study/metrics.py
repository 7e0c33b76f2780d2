"""The metrics that the stages log in metrics.jsonl, as the table "Reading the metrics" of docs/tuning.md has them:
unit, healthy range, how to read it. report.py and figures.py show what stands there.

A metric has a range only if the range holds for any task and any reward; the score's, for one, depends on both. It is
the range at the end of a run: `kl`, for one, starts at 0.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

TABLE = Path(__file__).parent.parent / "docs" / "tuning.md"
TITLES = {  # of metrics whose name with blanks is no title
    "kl": "KL",
    "k3": "KL, never negative",
    "eos_rate": "EOS rate",
    "approx_kl": "step KL",
    "kl_coef": "KL coefficient",
    "loss": "training loss",
    "held_out_loss": "held-out loss",
    "chosen_logprob": "chosen log-prob",
    "rejected_logprob": "rejected log-prob",
    "grad_norm": "gradient norm",
    "lr": "learning rate",
    "tokens_per_s": "speed",
    "seconds": "time",
    "share_rollout": "sampling",
    "share_score": "scoring",
    "share_update": "updating",
}


class Metric(NamedTuple):
    title: str
    unit: str = ""
    explanation: str = ""
    low: float | None = None  # the healthy range; None: it has none
    high: float | None = None


def read_metrics(text: str) -> dict[str, Metric]:
    """The rows `| name | unit | low to high | explanation |` of the table, where - is nothing."""
    section = text.split("## Reading the metrics")[1].split("\n## ")[0]
    metrics = {}
    for name, unit, healthy, explanation in re.findall(r"^\| `(\w+)` \| (.+?) \| (.+?) \| (.+) \|$", section, re.M):
        low, high = (None, None) if healthy == "-" else map(float, healthy.split(" to "))
        title = TITLES.get(name, name.replace("_", " "))
        metrics[name] = Metric(title, "" if unit == "-" else unit, explanation, low, high)
    return metrics


METRICS = read_metrics(TABLE.read_text(encoding="utf-8"))
