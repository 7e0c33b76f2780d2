"""Makes data/tiny.tiktoken, the byte-pair vocabulary of the embedded task, from the task's own text.

    python -m data.make_vocab

Byte-pair encoding (Sennrich et al. 2016, arXiv:1508.07909): start from the 256 bytes; again and again merge the most
frequent adjacent pair of tokens into a new token. tiktoken replays the merges in the order of their ranks.
"""

from __future__ import annotations

import base64
import random
from collections import Counter
from itertools import pairwise

import regex  # comes with tiktoken, which cuts text by the same pattern

from data.tiny import NOUNS, demonstrate, sample_prompt
from data.tokenizer import TINY_PATTERN, TINY_RANKS, format_prompt

MAX_TOKENS = 1023  # plus EOS: 1,024


def world_text(n: int = 40_000) -> list[str]:
    """Prompts and demonstrations of the world: enough of them that every word occurs."""
    rng = random.Random(0)
    prompts = [sample_prompt(rng, "train") for _ in range(n)]
    return [format_prompt(p) + demonstrate(p, rng) for p in prompts] + NOUNS


def train_bpe(texts: list[str], max_tokens: int) -> dict[bytes, int]:
    """{token bytes: rank}. Stops early where no pair occurs more than 20 times: rarer merges would hardly be
    trained."""
    pieces = Counter(piece for text in texts for piece in regex.findall(TINY_PATTERN, text))
    words = [([bytes([b]) for b in piece.encode()], count) for piece, count in sorted(pieces.items())]
    ranks = {bytes([b]): b for b in range(256)}
    while len(ranks) < max_tokens:
        pairs: Counter = Counter()
        for tokens, count in words:
            for pair in pairwise(tokens):
                pairs[pair] += count
        if not pairs:
            break
        # ties broken by the bytes: the same file on every machine
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
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
    """tiktoken's format: base64 of the token, a space, its rank."""
    return b"".join(base64.b64encode(token) + b" " + str(rank).encode() + b"\n" for token, rank in ranks.items())


if __name__ == "__main__":
    ranks = train_bpe(world_text(), MAX_TOKENS)
    TINY_RANKS.write_bytes(rank_file(ranks))
    print(f"wrote {len(ranks)} tokens to {TINY_RANKS}")
