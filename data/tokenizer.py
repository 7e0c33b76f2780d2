"""Text to token ids and back, and the one prompt template that all stages share.

`tiny` is the embedded task's own byte-pair vocabulary (data/tiny.tiktoken, made by data/make_vocab.py): no network,
ever. `gpt2` is GPT-2's, which tiktoken downloads once, or finds in the folder that TIKTOKEN_CACHE_DIR names.
"""

from __future__ import annotations

import base64
from functools import lru_cache
from pathlib import Path

import tiktoken

from cli import UserError

TINY_RANKS = Path(__file__).with_name("tiny.tiktoken")
# How tiny text is cut before merging: a word or a number of up to two digits with its leading space, or one other
# character.
TINY_PATTERN = r" ?[A-Za-z]+| ?[0-9]{1,2}|\n|[^A-Za-z0-9\n]"
EOS_TEXT = "<|endoftext|>"
NAMES = ("tiny", "gpt2")


def format_prompt(prompt: str) -> str:
    """The template around an instruction: used by every stage, so that all of them see the same text. It ends in a
    newline, so a completion starts without a space and `decode(completion ids)` is the completion."""
    return f"User: {prompt}\nAssistant:\n"


class Tokenizer:
    """name, n_vocab, eos_id; encode and decode."""

    def __init__(self, name: str, encoding: tiktoken.Encoding):
        self.name = name
        self._encoding = encoding
        self.n_vocab: int = encoding.n_vocab
        self.eos_id: int = encoding.eot_token

    def encode(self, text: str) -> list[int]:
        """Ordinary text only: "<|endoftext|>" typed by a user becomes several ordinary tokens, never the EOS token."""
        return self._encoding.encode_ordinary(text)

    def decode(self, ids: list[int]) -> str:
        """Bytes that are no valid UTF-8 (a character cut in half) become U+FFFD."""
        return self._encoding.decode(ids, errors="replace")

    def encode_prompt(self, prompt: str) -> list[int]:
        return self.encode(format_prompt(prompt))


@lru_cache
def load_tokenizer(name: str) -> Tokenizer:
    if name == "tiny":
        try:
            # by hand: tiktoken.load would keep a copy in the temporary folder and go on using it after the file has
            # changed
            lines = [line.split() for line in TINY_RANKS.read_bytes().splitlines()]
            ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
        except (OSError, ValueError) as error:
            raise UserError(
                f"{TINY_RANKS}: can't be read ({error}); make it again with `python -m data.make_vocab`"
            ) from None
        special = {EOS_TEXT: len(ranks)}
        return Tokenizer(
            name, tiktoken.Encoding("tiny", pat_str=TINY_PATTERN, mergeable_ranks=ranks, special_tokens=special)
        )
    if name == "gpt2":
        try:
            return Tokenizer(name, tiktoken.get_encoding("gpt2"))
        except Exception as error:  # requests raises many kinds; importing it to name them would be one more dependency
            raise UserError(
                f"the gpt2 vocabulary is not on this machine and can't be downloaded ({type(error).__name__}). Set"
                " TIKTOKEN_CACHE_DIR to a folder that holds GPT-2's vocab.bpe and encoder.json under tiktoken's names"
                " 6d1cbeee0f20b3d9449abfede4726ed8212e3aee and 6c7ea1a7e38e3a7f062df639a5b80947f075ffe6,"
                " or use --tokenizer tiny"
            ) from None
    raise UserError(f"unknown tokenizer {name!r}; choose from {', '.join(NAMES)}")
