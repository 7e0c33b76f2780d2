"""Text to token ids and back, and the templates around prompts that all stages share.

What load_tokenizer takes:

    tiny            the embedded task's own byte-pair vocabulary (data/tiny.tiktoken, made by data/make_vocab.py)
    gpt2            GPT-2's, which tiktoken downloads once, or finds in the folder that TIKTOKEN_CACHE_DIR names
    a folder        a published model's, with Hugging Face's tokenizer.json
    a .gguf file    a published model's, from the file's metadata (needs the package gguf)
    a description   what a checkpoint keeps of the last two, one JSON text: no path leads back to where it came from

All are byte-level BPE, cut and merged by tiktoken. A special token, such as <|endoftext|>, is never made from text: the
templates put it in, by its id, and in a user's text it is spelt in ordinary tokens.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import regex  # comes with tiktoken
import tiktoken

from lib.cli import UserError, check, one_line
from data.files import turns_of
from lib.vocabulary import GPT2, describe, parse_ranks, read_folder, read_gguf

TINY_RANKS = Path(__file__).with_name("tiny.tiktoken")
# How tiny text is cut before merging: a word or a number of up to two digits with its leading space, or one other
# character.
TINY_PATTERN = r" ?[A-Za-z]+| ?[0-9]{1,2}|\n|[^A-Za-z0-9\n]"
EOS_TEXT = "<|endoftext|>"

# -------------------------------------------------------------------------------- templates

Piece = tuple[str, str]  # a special token ("": none), and the text that follows it

# The special tokens that a template needs; the last ends a turn, so it is the EOS. plain needs none and has the EOS of
# the vocabulary.
TEMPLATES = {
    "plain": (),
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "llama3": ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
}


def format_prompt(prompt: str) -> str:
    """The plain template: used by every stage, so that all of them see the same text. It ends in a newline, so a
    completion starts without a space and `decode(completion ids)` is the completion."""
    said = {"system": "System: {}\n", "user": "User: {}\n", "assistant": "Assistant:\n{}\n"}
    return "".join(said[role].format(text) for role, text in turns_of(prompt)) + "Assistant:\n"


def chatml(prompt: str, system: str = "") -> list[Piece]:
    """SmolLM2's and Qwen's. system: what the model's own template says where a conversation has no system turn."""
    turns = turns_of(prompt)
    if system and turns[0][0] != "system":
        turns = (("system", system), *turns)
    pieces = []
    for role, text in turns:
        pieces += [("<|im_start|>", f"{role}\n{text}"), ("<|im_end|>", "\n")]
    return [*pieces, ("<|im_start|>", "assistant\n")]


def llama3(prompt: str) -> list[Piece]:
    """Llama 3's, which takes away the white space around a text."""
    pieces = []
    for role, text in (*turns_of(prompt), ("assistant", "")):
        pieces += [("<|start_header_id|>", role), ("<|end_header_id|>", f"\n\n{text.strip()}"), ("<|eot_id|>", "")]
    return pieces[:-1]  # the assistant's turn is open


class Tokenizer:
    """name, n_vocab, eos_id (it ends a completion), template, first (the special tokens at the start of a prompt);
    encode and decode. `saved` is what a checkpoint keeps, and load_tokenizer takes: two vocabularies are the same,
    template included, if it is the same text."""

    def __init__(
        self,
        saved: str,
        encoding: tiktoken.Encoding,
        eos: str = EOS_TEXT,
        template: str = "plain",
        system: str = "",
        nfc: bool = False,
        n_vocab: int | None = None,
        bos: dict[str, list[str]] | None = None,
        where: str = "",
    ):
        where = where or encoding.name
        missing = [mark for mark in TEMPLATES[template] if mark not in encoding.special_tokens_set]
        check(not missing, f"template {template}: {where} has no special token {', '.join(missing)}")
        eos = (TEMPLATES[template] or (eos,))[-1]
        known = eos in encoding.special_tokens_set
        check(known, f"{where}: no token that ends a text; name it as eos_token in tokenizer_config.json")
        self.first: list[str] = TEMPLATES[template][:1] if template == "llama3" else (bos or {}).get(template, [])
        self.saved, self.name, self.template = saved, encoding.name, template
        self._encoding, self._system, self._nfc = encoding, system, nfc
        self.n_vocab: int = n_vocab or encoding.n_vocab
        self.eos_id: int = encoding.encode_single_token(eos)

    def encode(self, text: str) -> list[int]:
        """Ordinary text only: "<|endoftext|>" typed by a user becomes several ordinary tokens, never the EOS token.
        A byte that a published vocabulary lacks is left out before merging, as its own tokenizer does."""
        text = unicodedata.normalize("NFC", text) if self._nfc else text
        ids = self._encoding.encode_ordinary(text)
        if max(ids, default=0) < self.n_vocab:
            return ids
        known = {b for b in range(256) if self._encoding.encode_single_token(bytes([b])) < self.n_vocab}
        pieces = (piece.group().encode() for piece in regex.finditer(self._encoding._pat_str, text))
        pieces = (bytes(b for b in piece if b in known) for piece in pieces)
        return [i for piece in pieces if piece for i in self._encoding._encode_single_piece(piece)]

    def decode(self, ids: list[int]) -> str:
        """Bytes that are no valid UTF-8 (a character cut in half) become U+FFFD. Special tokens are shown: completions
        come without the EOS that ended them, so any that is left was sampled by mistake and is to be seen."""
        return self._encoding.decode(ids, errors="replace")

    def pieces(self, prompt: str) -> list[Piece]:
        """A prompt, a string or a files.Prompt, in its template, open for the completion."""
        first = [(token, "") for token in self.first]
        if self.template == "plain":
            return [*first, ("", format_prompt(prompt))]
        return first + (chatml(prompt, self._system) if self.template == "chatml" else llama3(prompt))

    def encode_prompt(self, prompt: str) -> list[int]:
        ids = []
        for mark, text in self.pieces(prompt):
            ids += [self._encoding.encode_single_token(mark)] if mark else []
            ids += self.encode(text)
        return ids

    def description(self) -> dict:
        """What `build` takes, of a vocabulary that has a name, too."""
        if self.saved.startswith("{"):
            return json.loads(self.saved)
        ids = (i for i in range(self.n_vocab) if i != self.eos_id)
        ranks = {self._encoding.decode_single_token_bytes(i): i for i in ids}
        pattern = {"tiny": TINY_PATTERN, "gpt2": GPT2}[self.saved]
        return describe(ranks, {EOS_TEXT: self.eos_id}, pattern, False, EOS_TEXT, [], "", "", self.saved)


def fingerprint(saved: str) -> str:
    """What a checkpoint keeps of a vocabulary that has only a name there, and can be made anew: a hash of it. "" for
    all others: a checkpoint holds a published vocabulary as it is, and GPT-2's never changes."""
    if saved != "tiny":
        return ""
    d = load_tokenizer(saved).description()
    return hashlib.sha256(json.dumps([d[key] for key in ("ranks", "special", "pattern")]).encode()).hexdigest()[:12]


# -------------------------------------------------------------------------------- loading


@lru_cache(maxsize=8)
def load_tokenizer(source: str, template: str = "auto") -> Tokenizer:
    """source: see the top of this file. template: one of TEMPLATES; "auto" is that of a published vocabulary, plain for
    the others. Raises UserError for what is no vocabulary, or none of a kind that can be read."""
    check(template in ("auto", *TEMPLATES), f"unknown template {template!r}; choose from {', '.join(TEMPLATES)}")
    if source in NAMED:
        return NAMED[source]("plain" if template == "auto" else template)
    described = source.startswith("{")
    where = "the checkpoint's vocabulary" if described else source
    try:
        if described:
            description = json.loads(source)
        elif source.endswith(".gguf"):
            check(Path(source).exists(), f"{source}: no such file")
            description = read_gguf(source)
        elif Path(source).is_dir():
            description = read_folder(Path(source))
        else:
            raise UserError(f"unknown tokenizer {source!r}; choose from {', '.join(NAMED)}, a folder, or a .gguf file")
        return build(description, template, where)
    except UserError:
        raise
    except (OSError, LookupError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{where}: can't be read as a vocabulary ({one_line(error)})") from None


# The vocabularies that have a name: template -> Tokenizer.
NAMED: dict[str, Callable[[str], Tokenizer]] = {
    "tiny": lambda template: Tokenizer("tiny", tiny_encoding(), template=template),
    "gpt2": lambda template: Tokenizer("gpt2", gpt2_encoding(), template=template),
}


def tiny_encoding() -> tiktoken.Encoding:
    try:
        # by hand: tiktoken.load would keep a copy in the temporary folder and go on using it after the file has changed
        ranks = parse_ranks(TINY_RANKS.read_text(encoding="ascii"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{TINY_RANKS}: can't be read ({error}); make it again with `python -m data.make_vocab`"
        ) from None
    special = {EOS_TEXT: len(ranks)}
    return tiktoken.Encoding("tiny", pat_str=TINY_PATTERN, mergeable_ranks=ranks, special_tokens=special)


def gpt2_encoding() -> tiktoken.Encoding:
    try:
        return tiktoken.get_encoding("gpt2")
    except Exception as error:  # requests raises many kinds; importing it to name them would be one more dependency
        raise UserError(
            f"the gpt2 vocabulary is not on this machine and can't be downloaded ({type(error).__name__}). Set"
            " TIKTOKEN_CACHE_DIR to a folder that holds GPT-2's vocab.bpe and encoder.json under tiktoken's names"
            " 6d1cbeee0f20b3d9449abfede4726ed8212e3aee and 6c7ea1a7e38e3a7f062df639a5b80947f075ffe6,"
            " or use --tokenizer tiny"
        ) from None


def build(d: dict, template: str, where: str) -> Tokenizer:
    """The vocabulary of a description, which is plain JSON: "ranks", as in a .tiktoken file; "special" {token: id};
    "pattern", how text is cut before merging; "nfc", whether it is normalised before; "eos"; "template", and its
    "system" turn for a conversation that has none; perhaps "bos" {template: tokens at the start of a prompt}; "name",
    made here, for messages."""
    d = {k: v for k, v in d.items() if k != "name"} | ({} if template == "auto" else {"template": template})
    check(d["template"] in TEMPLATES, f"{where}: its template {d['template']!r} is unknown here")
    ranks, special = parse_ranks(d["ranks"]), dict(d["special"])
    used = {*ranks.values(), *special.values()}
    check(len(used) == len(ranks) + len(special), f"{where}: two of its tokens have one id")
    n_vocab = max(used) + 1
    d["name"] = f"bpe{n_vocab}-{d['template']}-{hashlib.sha256(json.dumps(d, sort_keys=True).encode()).hexdigest()[:8]}"
    # tiktoken must know every byte: one that the vocabulary lacks gets an id beyond it, which encode leaves out. And
    # every id, as a model can sample it: one that is no token's gets a name for decode to show.
    lacking = [bytes([b]) for b in range(256) if bytes([b]) not in ranks]
    ranks |= {byte: n_vocab + i for i, byte in enumerate(lacking)}
    special |= {f"<|unused {i}|>": i for i in range(n_vocab) if i not in used}
    encoding = tiktoken.Encoding(d["name"], pat_str=d["pattern"], mergeable_ranks=ranks, special_tokens=special)
    saved = json.dumps(d, sort_keys=True)
    return Tokenizer(
        saved, encoding, d["eos"], d["template"], d["system"], d["nfc"], n_vocab, bos=d.get("bos"), where=where
    )


def vocabulary_name(saved: str) -> str:
    """What to call a vocabulary in a message."""
    return json.loads(saved)["name"] if saved.startswith("{") else saved
