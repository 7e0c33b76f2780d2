"""From texts to token ids to right-padded batches."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lib.cli import check
from data.files import Ranking, read_demonstrations, read_rankings, sibling
from data.tiny import contrasts
from data.tokenizer import Tokenizer


@dataclass
class Example:
    """One prompt and one completion as token ids."""

    prompt: list[int]
    completion: list[int]  # EOS included, unless the completion was cut
    prompt_cut: bool = False  # lost its beginning to block_size
    completion_cut: bool = False  # lost its end to block_size

    @property
    def ids(self) -> list[int]:
        return self.prompt + self.completion

    def __len__(self) -> int:
        return len(self.prompt) + len(self.completion)


def encode_example(
    tokenizer: Tokenizer, prompt: str, completion: str, block_size: int, ended: bool = True, allow_empty: bool = False
) -> Example | None:
    """Encode prompt and completion separately (so no token spans the boundary), add EOS if the completion ended by
    itself, and make both fit block_size. None if the completion is empty: nothing to imitate. With allow_empty an empty
    one is EOS alone: in a ranking, silence is an answer like any other, usually a bad one."""
    if not tokenizer.encode(completion) and not (allow_empty and ended):
        return None
    example = encode_group(tokenizer, prompt, [completion], [ended], block_size)[0]
    return example if example.completion else None


def encode_group(
    tokenizer: Tokenizer, prompt: str, completions: list[str], ended: list[bool], block_size: int
) -> list[Example]:
    """Completions of one prompt. Where the longest of them doesn't fit behind it, the prompt loses tokens from its left
    (its end, the question, matters most), the same ones for all, but keeps half of block_size, or all of itself if it
    is shorter. A completion that is too long even then is cut on its right, and loses its EOS: the model must not learn
    to stop where a text did not end."""
    ids = [tokenizer.encode(c) + [tokenizer.eos_id] * e for c, e in zip(completions, ended, strict=True)]
    prompt_ids = tokenizer.encode_prompt(prompt)
    kept = prompt_ids[-max(block_size - max(map(len, ids)), (block_size + 1) // 2) :]
    room = block_size - len(kept)
    return [Example(kept, c[:room], len(kept) < len(prompt_ids), len(c) > room) for c in ids]


def encode_prompts(
    prompts: list[str], tokenizer: Tokenizer, block_size: int, max_new_tokens: int, what: str
) -> list[list[int]]:
    """Prompts as ids, of each as many of the last tokens (its end, the question, matters most) as leave max_new_tokens
    of block_size for the answer. what: the file they are from, printed with their number and with how many were cut."""
    room = block_size - max_new_tokens
    check(room > 0, f"--max_new_tokens {max_new_tokens} leaves no room for a prompt in block_size {block_size}")
    ids = [tokenizer.encode_prompt(p) for p in prompts]
    if what:
        print(f"{what}: {len(ids):,} prompts")
    cut = sum(len(p) > room for p in ids)
    advice = "raise --block_size of sft.py or lower --max_new_tokens"
    note_cut(what or "prompt", cut, len(ids), f"prompts cut to their last {room} tokens", advice)
    return [p[-room:] for p in ids]


def note_cut(what: str, cut: int, total: int, how: str, advice: str) -> None:
    if cut:
        print(f"{what}: {cut:,} of {total:,} {how}; {advice}")


def note_cuts(path: str, groups: list[list[Example]], block_size: int) -> None:
    """Say how many prompts and how many answers of a file don't fit. groups: the examples of each prompt."""
    answers, limit = [e for group in groups for e in group], f"of {block_size} tokens for both"
    cut = [e for e in answers if e.completion_cut]
    advice = "raise --block_size of sft.py"
    note_cut(path, sum(g[0].prompt_cut for g in groups), len(groups), f"prompts lost their beginning, {limit}", advice)
    note_cut(path, len(cut), len(answers), f"answers lost their end, {limit}", advice)


def pad(rows: list[list[int]], device: torch.device, filler: int = 0, block_size: int | None = None) -> Tensor:
    """Right-pad to the longest row: (B, T), still on the CPU. What the filler is does not matter. For a GPU the width
    is rounded up to a multiple of 32, within block_size: fewer shapes to compile for, and aligned memory."""
    T = max(map(len, rows))
    if torch.device(device).type == "cuda":
        T = max(T, min(-(-T // 32) * 32, block_size or T + 31))
    tokens = torch.full((len(rows), T), filler, dtype=torch.long)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = torch.tensor(row, dtype=torch.long)
    return tokens


def make_batch(
    examples: list[Example], device: torch.device, block_size: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """tokens (B, T), prompt_lens (B,), lens (B,): all that the masks are made of (frame.completion_mask). block_size:
    the longest text that the network reads, if no filler may make a row longer. Every copy to a GPU makes the CPU wait
    for it, so what can be goes together."""
    lens = torch.tensor([[len(e.prompt) for e in examples], [len(e) for e in examples]])  # (2, B)
    tokens = pad([e.ids for e in examples], device, block_size=block_size)  # (B, T)
    return tokens.to(device), *lens.to(device)


def load_examples(path: str, tokenizer: Tokenizer, block_size: int, made_by: str = "") -> list[Example]:
    """Demonstrations, encoded; what is empty, or was cut, is counted. No path: none."""
    if not path:
        return []
    rows = read_demonstrations(path, made_by)
    examples = [encode_example(tokenizer, p, c, block_size) for p, c in rows]
    kept = [e for e in examples if e is not None]
    check(bool(kept), f"{path}: no row has completion tokens")
    dropped = len(rows) - len(kept)
    print(
        f"{path}: {len(kept):,} demonstrations" + (f", dropped {dropped} without completion tokens" if dropped else "")
    )
    note_cuts(path, [[e] for e in kept], block_size)
    return kept


def demonstrations_beside(prompts: str, path: str, tokenizer: Tokenizer, block_size: int) -> list[Example]:
    """Demonstrations in the file `path`; "auto": demonstrations.jsonl beside the prompts."""
    path = sibling(prompts, "demonstrations.jsonl") if path == "auto" else path
    check(bool(path), f"--ptx_coef needs --ptx_data; none is beside {prompts}")
    return load_examples(path, tokenizer, block_size)


# -------------------------------------------------------------------------------- the order of training


def epoch_batches(items: list, config) -> list[list]:
    """The items of every optimiser step of all epochs: config.epochs passes, each in a random order of its own that
    (seed, epoch) alone decides, so that a resumed run finds its place by the step number. The last batch of a pass may
    be smaller.

    Random, not sorted by length: a batch of short texts has few tokens, so each of them would weigh more in its
    step."""
    batches = []
    for epoch in range(config.epochs):
        order = list(items)
        random.Random(f"{config.seed} {epoch}").shuffle(order)
        batches += [order[i : i + config.batch_size] for i in range(0, len(order), config.batch_size)]
    return batches


def micro_batches(items: list, size: int, length: Callable = len) -> list[list]:
    """The items of an optimiser step in parts of `size` (0: all at once) that go through the network one after the
    other. Sorted by length first: parts of similar length need little filler, and the gradient of the whole is the
    same."""
    size = size or len(items)
    items = sorted(items, key=length)
    return [items[i : i + size] for i in range(0, len(items), size)]


def minibatches(n: int, size: int, epochs: int, generator: torch.Generator) -> Iterator[list[int]]:
    """`epochs` passes over rows 0..n-1, each in a fresh order, `size` rows at a time (the last may be fewer)."""
    for _ in range(epochs):
        for rows in torch.randperm(n, generator=generator, device=generator.device).split(size):
            yield rows.tolist()


def by_length(items: list, batch_size: int) -> list[list[int]]:
    """Indices in batches from short to long: for scoring, where the order doesn't matter."""
    return micro_batches(list(range(len(items))), batch_size, length=lambda i: len(items[i]))


# -------------------------------------------------------------------------------- rankings


@dataclass
class RankedExamples:
    """The completions of one prompt, best first; equal ranks are ties."""

    examples: list[Example]
    ranks: list[int]

    def __post_init__(self):
        if any(e.prompt != self.examples[0].prompt for e in self.examples):
            raise ValueError("the completions of a ranking must have one prompt")

    def __len__(self) -> int:  # of the row in a batch: the prompt once, and all completions
        return len(self.examples[0].prompt) + sum(len(e.completion) for e in self.examples)

    @property
    def n_pairs(self) -> int:
        """All comparisons, ties included."""
        return len(self.ranks) * (len(self.ranks) - 1) // 2

    @property
    def n_strict_pairs(self) -> int:
        """The comparisons that are no ties."""
        return sum(a < b for n, a in enumerate(self.ranks) for b in self.ranks[n + 1 :])


@dataclass
class RankedBatch:
    """N rankings of at most K completions, a row each: the prompt, its completions one behind the other, filler."""

    tokens: Tensor  # (N, T)
    positions: Tensor  # (N, T) of each token in its own text; where they go back another completion starts (model.py)
    owner: Tensor  # (N, T) number of the completion that a token belongs to, 0 the best; K on the prompt and on filler
    ends: Tensor  # (N, K) flat position of the last token of each completion (0 where a ranking has fewer)
    lens: Tensor  # (N, K) tokens of each completion
    ranks: Tensor  # (N, K) ascending, equal for ties, -1 where absent


def encode_rankings(rankings: list[Ranking], tokenizer: Tokenizer, block_size: int) -> list[RankedExamples]:
    """Those that compare something. A text that stands in several places of its ranking (written twice, or made equal
    by truncation) contradicts itself: it takes the mean of its places. A ranking that is left without two different
    ranks is dropped."""
    kept = []
    for r in rankings:
        places: dict[tuple, list[int]] = {}
        examples = encode_group(tokenizer, r.prompt, r.completions, r.ended, block_size)
        for example, rank in zip(examples, r.ranks, strict=True):
            if example.completion:  # an empty text that was cut has nothing to read
                places.setdefault(tuple(example.completion), []).append(rank)
        means = {c: sum(ranks) / len(ranks) for c, ranks in places.items()}
        order = sorted(set(means.values()))
        if len(order) > 1:
            best_first = sorted(means, key=means.get)
            prompt, prompt_cut = examples[0].prompt, examples[0].prompt_cut
            cut = {tuple(e.completion) for e in examples if e.completion_cut}
            texts = [Example(prompt, list(c), prompt_cut, c in cut) for c in best_first]
            kept.append(RankedExamples(texts, [order.index(means[c]) for c in best_first]))
    return kept


def contrast_rankings(prompts: list[str], tokenizer: Tokenizer, block_size: int) -> dict[str, list[RankedExamples]]:
    """tiny.contrasts of these prompts, each pair as a ranking."""
    named = contrasts(prompts, seed=1)
    pairs = {name: [Ranking(p, [b, w], [0, 1], [True, True]) for p, b, w in rows] for name, rows in named.items()}
    return {name: encode_rankings(rankings, tokenizer, block_size) for name, rankings in pairs.items()}


def load_rankings(path: str, tokenizer: Tokenizer, block_size: int, made_by: str = "") -> list[RankedExamples]:
    """Rankings or pairs, encoded; what compares nothing, or was cut, is counted. No path: none."""
    if not path:
        return []
    rankings = read_rankings(path, made_by)
    items = encode_rankings(rankings, tokenizer, block_size)
    check(bool(items), f"{path}: no ranking compares two different completions")
    dropped = len(rankings) - len(items)
    note = f", dropped {dropped} that compare nothing (ties or equal texts only)" if dropped else ""
    print(f"{path}: {len(items):,} rankings{note}")
    note_cuts(path, [item.examples for item in items], block_size)
    return items


def ranked_batch(items: list[RankedExamples], device: torch.device) -> RankedBatch:
    """Rankings as one batch. The completions of a prompt share it, so that it goes through the model once."""
    K = max(len(item.examples) for item in items)
    rows = []  # of each ranking: tokens, owner, positions
    lens, ends, ranks = (torch.zeros(len(items), K, dtype=torch.long) for _ in range(3))
    for n, item in enumerate(items):
        prompt = item.examples[0].prompt
        P = len(prompt)
        tokens, owner, positions = list(prompt), [K] * P, list(range(P))
        for k, example in enumerate(item.examples):
            L = len(example.completion)
            tokens += example.completion
            owner += [k] * L
            positions += range(P, P + L)
            lens[n, k], ends[n, k], ranks[n, k] = L, len(tokens) - 1, item.ranks[k]
        rows.append((tokens, owner, positions))
    padded = [pad([row[i] for row in rows], device, filler) for i, filler in enumerate((0, K, 0))]  # (N, T) each
    ranks = ranks.masked_fill(lens == 0, -1)
    ends = torch.where(lens > 0, ends + padded[0].size(1) * torch.arange(len(items))[:, None], 0)
    tokens, owner, positions = torch.stack(padded).to(device)  # two copies to a GPU, not six: each makes the CPU wait
    return RankedBatch(tokens, positions, owner, *torch.stack([ends, lens, ranks]).to(device))


def pair_accuracy(scores: Tensor, ranks: Tensor) -> tuple[Tensor, Tensor]:
    """scores, ranks (N, K) -> correct (N, P): 1, or 1/2 for equal scores, 0; gap in rank (N, P), 0 where there is no
    strict pair."""
    i, j = torch.triu_indices(scores.size(1), scores.size(1), offset=1, device=scores.device)
    gap = torch.where((ranks[:, i] >= 0) & (ranks[:, j] >= 0), ranks[:, j] - ranks[:, i], 0)
    return 0.5 + 0.5 * torch.sign(scores[:, i] - scores[:, j]), gap
