"""From texts to token ids to right-padded batches."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cli import check
from data.files import Ranking, read_demonstrations, read_rankings
from data.tokenizer import Tokenizer


@dataclass
class Example:
    """One prompt and one completion as token ids."""

    prompt: list[int]
    completion: list[int]  # EOS included, unless the completion was cut

    @property
    def ids(self) -> list[int]:
        return self.prompt + self.completion

    def __len__(self) -> int:
        return len(self.prompt) + len(self.completion)


def encode_example(
    tokenizer: Tokenizer, prompt: str, completion: str, block_size: int, allow_empty: bool = False
) -> Example | None:
    """Encode prompt and completion separately (so no token spans the boundary), add EOS, and make both fit block_size.

    The completion is kept before the prompt: the prompt loses tokens from its left (its end, the question, matters
    most), down to one. Only a completion that is too long even then is cut on its right, and a cut one gets no EOS: the
    model must not learn to stop where a text did not end. None if no completion token is left, or if the completion is
    empty: nothing to imitate. With allow_empty an empty completion is EOS alone: in a ranking, silence is an answer
    like any other, usually a bad one.
    """
    prompt_ids = tokenizer.encode_prompt(prompt)
    completion_ids = tokenizer.encode(completion)
    if not completion_ids and not allow_empty:
        return None
    completion_ids.append(tokenizer.eos_id)
    room = max(1, block_size - len(completion_ids))
    prompt_ids = prompt_ids[-room:]
    completion_ids = completion_ids[: block_size - len(prompt_ids)]  # cuts the EOS first
    return Example(prompt_ids, completion_ids) if completion_ids else None


def truncate_prompt(ids: list[int], room: int) -> list[int]:
    """The last `room` tokens of a prompt: its end, the question, matters most."""
    return ids[-room:]


def pad(rows: list[list[int]], device: torch.device, filler: int = 0) -> tuple[Tensor, Tensor]:
    """Right-pad to the longest row: tokens (B, T), lens (B,). What the filler is does not matter. On a GPU the width is
    rounded up to a multiple of 32: fewer shapes to compile for, and aligned memory."""
    longest = max(map(len, rows))
    multiple = 32 if torch.device(device).type == "cuda" else 1
    T = -(-longest // multiple) * multiple
    tokens = torch.full((len(rows), T), filler, dtype=torch.long)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = torch.tensor(row, dtype=torch.long)
    return tokens.to(device), torch.tensor([len(row) for row in rows], device=device)


def make_batch(examples: list[Example], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """tokens (B, T), prompt_lens (B,), lens (B,): all that the masks are made of (model.completion_mask)."""
    tokens, lens = pad([e.ids for e in examples], device)
    return tokens, torch.tensor([len(e.prompt) for e in examples], device=device), lens


def load_examples(path: str, tokenizer: Tokenizer, block_size: int, made_by: str = "") -> list[Example]:
    """Demonstrations, encoded."""
    rows = read_demonstrations(path, made_by)
    examples = [encode_example(tokenizer, p, c, block_size) for p, c in rows]
    kept = [e for e in examples if e is not None]
    if len(kept) < len(rows):
        print(f"{path}: dropped {len(rows) - len(kept)} of {len(rows)} rows without completion tokens")
    check(bool(kept), f"{path}: no row has completion tokens")
    return kept


# ------------------------------------------------------------------------------------------------ the order of training


def length_batches(lengths: list[int], batch_size: int, generator: torch.Generator) -> list[list[int]]:
    """Indices 0..n-1 once each, in random batches of rows of similar length, so that little filler is computed.

    Shuffle; sort within pools of 32 batches by length; cut into batches; shuffle the batches. The last may be
    smaller."""
    order = torch.randperm(len(lengths), generator=generator).tolist()
    pool = 32 * batch_size
    batches = []
    for start in range(0, len(order), pool):
        ranked = sorted(order[start : start + pool], key=lambda i: lengths[i])
        batches += [ranked[i : i + batch_size] for i in range(0, len(ranked), batch_size)]
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


def epoch_batches(items: list, config) -> list[list]:
    """The items of every optimiser step of all epochs: config.epochs passes in config.batch_size, each pass in an order
    of its own that (seed, epoch) alone decides, so a resumed run finds its place by the step number."""
    lengths = [len(item) for item in items]
    batches = []
    for epoch in range(config.epochs):
        seed = (((config.seed + 1) * 1_000_003) + epoch + 1) % (2**63 - 1)
        for rows in length_batches(lengths, config.batch_size, torch.Generator().manual_seed(seed)):
            batches.append([items[i] for i in rows])
    return batches


def micro_batches(items: list, size: int) -> list[list]:
    """The items of an optimiser step in parts of `size` (0: all at once), which go through the network one at a
    time."""
    size = size or len(items)
    return [items[i : i + size] for i in range(0, len(items), size)]


def by_length(items: list, batch_size: int) -> list[list[int]]:
    """Indices in batches from short to long: for scoring, where the order doesn't matter."""
    order = sorted(range(len(items)), key=lambda i: len(items[i]))
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


# ------------------------------------------------------------------------------------------------ rankings


@dataclass
class RankedExamples:
    """The completions of one prompt, best first; equal ranks are ties."""

    examples: list[Example]
    ranks: list[int]
    ref_logprobs: Tensor | None = (
        None  # (k,) the completions' log-probs under DPO's reference, once dpo.py has asked for them
    )

    def __len__(self) -> int:  # of the longest completion: what a batch is padded to
        return max(map(len, self.examples))

    @property
    def n_pairs(self) -> int:
        """All comparisons, ties included."""
        return len(self.ranks) * (len(self.ranks) - 1) // 2


@dataclass
class RankedBatch:
    tokens: Tensor  # (M, T) the completions of all rankings, one row each: every text goes through the model once
    prompt_lens: Tensor  # (M,)
    lens: Tensor  # (M,)
    index: Tensor  # (N, K) row of the k-th best completion of ranking n (0 where that ranking has fewer)
    ranks: Tensor  # (N, K) its rank: ascending, equal for ties, -1 where absent


def encode_rankings(rankings: list[Ranking], tokenizer: Tokenizer, block_size: int) -> tuple[list[RankedExamples], int]:
    """(kept, dropped). A completion that became equal to another of its ranking by truncation says nothing about their
    order, so it is dropped, and so is a ranking that is left with fewer than two different ranks."""
    kept = []
    for ranking in rankings:
        found: dict[tuple, int] = {}
        for completion, rank in zip(ranking.completions, ranking.ranks, strict=True):
            example = encode_example(tokenizer, ranking.prompt, completion, block_size, allow_empty=True)
            if example is not None:
                found.setdefault((tuple(example.prompt), tuple(example.completion)), rank)
        if len(set(found.values())) > 1:
            kept.append(RankedExamples([Example(list(p), list(c)) for p, c in found], list(found.values())))
    return kept, len(rankings) - len(kept)


def load_rankings(path: str, tokenizer: Tokenizer, block_size: int, made_by: str = "") -> list[RankedExamples]:
    """Rankings or pairs, encoded; what compares nothing is counted and left out."""
    items, dropped = encode_rankings(read_rankings(path, made_by), tokenizer, block_size)
    check(bool(items), f"{path}: no ranking compares two different completions")
    note = f", dropped {dropped} that compare nothing (ties or equal texts only)" if dropped else ""
    print(f"{path}: {len(items):,} rankings{note}")
    return items


def ranked_batch(items: list[RankedExamples], device: torch.device) -> RankedBatch:
    """All completions of all rankings as one batch, with the table of who is ranked where."""
    tokens, prompt_lens, lens = make_batch([e for item in items for e in item.examples], device)
    K = max(len(item.examples) for item in items)
    index = torch.zeros(len(items), K, dtype=torch.long)
    ranks = torch.full((len(items), K), -1, dtype=torch.long)
    row = 0
    for n, item in enumerate(items):
        k = len(item.examples)
        index[n, :k] = torch.arange(row, row + k)
        ranks[n, :k] = torch.tensor(item.ranks)
        row += k
    return RankedBatch(tokens, prompt_lens, lens, index.to(device), ranks.to(device))
