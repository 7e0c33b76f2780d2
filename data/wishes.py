"""The rule of one annotator: what he wants of an answer. So the truth is known for a real language model, too.

A small chat model rambles: it explains itself, makes lists, and often hasn't ended when its tokens run out. Somebody
who asks short questions wants answers of another kind:

    finished   +1     the answer ends by itself, with a full stop or the like
    brief      +1     30 words at most; from there to 60 words it falls to 0
    plain      +0.5   one paragraph: no line breaks, lists or headings
    friendly   +0.5   it speaks to the person: "you", "your", or a friendly word

Used by `collect.py --gold data/wishes.py:wishes` (noisy annotators who want this) and `evaluate.py --gold ...`.
"""

from __future__ import annotations

import re

FRIENDLY = re.compile(
    r"\b(you|your|yours|glad|happy|sure|of course|certainly|welcome|please|thanks?|hope|great|good question|enjoy)\b",
    re.I,
)
PARTS = ("finished", "brief", "plain", "friendly")


def wish_parts(completion: str, ended: bool) -> dict[str, float]:
    """{part: its share of the reward}. An empty answer has none."""
    text = completion.strip()
    words = len(text.split())
    if not words:
        return dict.fromkeys(PARTS, 0.0)
    return {
        "finished": 1.0 if ended and text[-1] in ".!?\"')" else 0.0,
        "brief": min(1.0, max(0.0, (60 - words) / 30)),
        "plain": 0.5 if "\n" not in text else 0.0,
        "friendly": 0.5 if FRIENDLY.search(text) else 0.0,
    }


def wishes(prompts: list[str], completions: list[str], ended: list[bool]) -> list[float]:
    """The reward of each completion: the sum of its parts, 0 to 3. The prompt doesn't matter, because this annotator
    can't tell whether an answer is right."""
    return [sum(wish_parts(c, e).values()) for c, e in zip(completions, ended, strict=True)]
