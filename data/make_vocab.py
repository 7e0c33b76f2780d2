"""Makes data/tiny.tiktoken, the byte-pair vocabulary of the embedded task, from the task's own text.

    python -m data.make_vocab

Byte-pair encoding (Sennrich et al. 2016, arXiv:1508.07909) starts from the 256 bytes and repeats one step: merge the
most frequent pair of adjacent tokens into a new token. tiktoken repeats the merges in the order of their ranks.
"""

from __future__ import annotations

import base64
import random
from collections import Counter
from itertools import pairwise

import regex  # comes with tiktoken, which cuts text by the same pattern

from data.tiny import NOUNS, demonstrate, sample_prompt
from data.tokenizer import TINY_PATTERN, TINY_RANKS, format_prompt

MAX_TOKENS = 1023  # 1,024 with EOS


def world_text(n: int = 40_000) -> list[str]:
    """Prompts with their demonstrations, so many that every word occurs."""
    rng = random.Random(0)
    prompts = [sample_prompt(rng, "train") for _ in range(n)]
    return [format_prompt(p) + demonstrate(p, rng) for p in prompts] + NOUNS


def train_bpe(texts: list[str], max_tokens: int) -> dict[bytes, int]:
    """{bytes of a token: its rank}. It stops early when no pair occurs more than 20 times, because a rare token would
    hardly be trained."""
    pieces = Counter(piece for text in texts for piece in regex.findall(TINY_PATTERN, text))
    words = [([bytes([b]) for b in piece.encode()], count) for piece, count in sorted(pieces.items())]
    ranks = {bytes([b]): b for b in range(256)}
    while len(ranks) < max_tokens:
        pairs: Counter = Counter()
        for tokens, count in words:
            for pair in pairwise(tokens):
                pairs[pair] += count
        # the bytes decide between equal counts, so the file is the same on every machine
        best = max(pairs, key=lambda pair: (pairs[pair], pair), default=None)
        if pairs[best] <= 20:
            break
        merged = best[0] + best[1]
        ranks[merged] = len(ranks)
        for tokens, _ in words:
            i = 0
            while i < len(tokens) - 1:
                if tokens[i] == best[0] and tokens[i + 1] == best[1]:
                    tokens[i : i + 2] = [merged]
                i += 1
    return ranks


def rank_file(ranks: dict[bytes, int]) -> bytes:
    """The content of a .tiktoken file: a line is a token in base64, a space, its rank."""
    return b"".join(base64.b64encode(token) + b" " + str(rank).encode() + b"\n" for token, rank in ranks.items())


if __name__ == "__main__":
    ranks = train_bpe(world_text(), MAX_TOKENS)
    TINY_RANKS.write_bytes(rank_file(ranks))
    print(f"wrote {len(ranks)} tokens to {TINY_RANKS}")
