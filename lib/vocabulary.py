"""The vocabulary of a published model, in and out. In between it is a description in plain JSON, which a checkpoint can
keep and `build` in data/tokenizer.py takes.

It comes from a folder with Hugging Face's tokenizer.json, or from the metadata of a .gguf file, and goes out as such a
folder's files. Only byte-level BPE is read.
"""

from __future__ import annotations

import base64
import json
import re
from itertools import pairwise, takewhile
from pathlib import Path

from lib.cli import UserError, check

ONLY = "only byte-level BPE is read, as GPT-2, SmolLM2, Llama 3 and Qwen2 have it"


def parse_ranks(text: str) -> dict[bytes, int]:
    """A .tiktoken file: each line holds a token's bytes in base64 and its rank, which is its id too."""
    lines = [line.split() for line in text.splitlines()]
    return {base64.b64decode(token): int(rank) for token, rank in lines}


def keeping_the_rest(pattern: str) -> str:
    """The pattern, and the text between two matches as a piece of its own. (tiktoken drops text that doesn't match.)"""
    return rf"{pattern}|(?:(?!{pattern})[\s\S])+"


# How text is cut before merging. The names are those in .gguf files.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Each digit is cut out first. GPT-2's pattern then cuts the text between: white space before a digit is at its end.
SMOLLM = GPT2.replace(r" ?\p{N}+", r"\p{N}").replace(r"(?!\S)", r"(?![^\s\p{N}])")
LLAMA3 = keeping_the_rest(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PATTERNS = {"gpt-2": GPT2, "smollm": SMOLLM, "llama-bpe": LLAMA3, "qwen2": LLAMA3.replace("{1,3}", "")}

# GPT-2's published vocabulary writes bytes as characters: a printable byte is itself, the others follow from 256
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
CHAR_OF = {b: chr(b) for b in PRINTABLE}
CHAR_OF |= {b: chr(256 + n) for n, b in enumerate(b for b in range(256) if b not in PRINTABLE)}

# -------------------------------------------------------------------------------- in


def read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def read_folder(folder: Path) -> dict:
    """The vocabulary in a folder with Hugging Face's tokenizer.json. tokenizer_config.json or config.json, if they are
    there, name the token that ends a text; chat_template.jinja may hold the template. UserError if it can't be read."""
    file = folder / "tokenizer.json"
    other = " (its tokenizer.model is SentencePiece's)" if (folder / "tokenizer.model").exists() else ""
    check(file.exists(), f"{folder}: no tokenizer.json in it{other}; name a vocabulary with --tokenizer; {ONLY}")
    whole, config = read_json(file), read_json(folder / "tokenizer_config.json")
    bpe, normalizer = whole["model"], whole.get("normalizer")
    kind = bpe.get("type") or ("BPE" if "merges" in bpe else "a model without a name")  # GPT-2's own file has no type
    if bpe.get("byte_fallback") or bpe.get("continuing_subword_prefix") or bpe.get("end_of_word_suffix"):
        kind += " of characters (SentencePiece's, or older)"
    check(kind == "BPE", f"{file}: holds {kind}; {ONLY}")
    check(normalizer in (None, {"type": "NFC"}), f"{file}: changes text first, by {normalizer}; {ONLY}")

    special = {token["content"]: token["id"] for token in whole.get("added_tokens", [])}
    eos = config.get("eos_token") or read_json(folder / "config.json").get("eos_token_id")  # a text or an id
    eos = eos["content"] if isinstance(eos, dict) else eos[0] if isinstance(eos, list) else eos
    named = [token for token, i in special.items() if eos in (token, i)] or ["<|endoftext|>"]
    check(eos is None or eos in (named[0], special.get(named[0])), f"{folder}: {eos!r}, its EOS, is no added token")
    jinja, chat = folder / "chat_template.jinja", config.get("chat_template") or ""
    chat = jinja.read_text(encoding="utf-8") if jinja.exists() else chat

    merges = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in bpe["merges"]]
    ids = {token: i for token, i in bpe["vocab"].items() if token not in special}
    ranks = ranks_of(ids, merges, bool(bpe.get("ignore_merges")), str(file))
    pattern = pattern_of(whole.get("pre_tokenizer") or {"type": "nothing"}, str(file))
    first = first_tokens(whole.get("post_processor") or {"type": "nothing"}, str(file))
    bos = config.get("bos_token") or ""
    bos = bos["content"] if isinstance(bos, dict) else bos
    return describe(ranks, special, pattern, normalizer is not None, named[0], first, bos, chat, str(folder))


def first_tokens(processor: dict, file: str) -> list[str]:
    """The special tokens, usually one or none, that a tokenizer.json's post_processor puts before every text. (What it
    puts behind a text is left out: a completion follows there.)"""
    kind = processor["type"]
    if kind == "Sequence":
        return [token for step in processor["processors"] for token in first_tokens(step, file)]
    check(kind in ("TemplateProcessing", "ByteLevel", "nothing"), f"{file}: its post_processor is {kind}; {ONLY}")
    before = takewhile(lambda part: "SpecialToken" in part, processor.get("single", []))
    names = [part["SpecialToken"]["id"] for part in before]
    return [token for name in names for token in processor["special_tokens"][name]["tokens"]]


def pattern_of(cut: dict, file: str) -> str:
    """The pre_tokenizer of tokenizer.json as one regular expression. UserError if it is not known here."""
    steps = cut["pretokenizers"] if cut["type"] == "Sequence" else [cut]
    kinds, last = [step["type"] for step in steps], steps[-1]
    if last["type"] == "ByteLevel" and not last.get("add_prefix_space"):
        own = last.get("use_regex", True)
        if kinds == ["ByteLevel"] and own:
            return GPT2
        if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits") and own:
            return SMOLLM
        if kinds == ["Split", "ByteLevel"] and not own and "Regex" in steps[0]["pattern"]:
            pattern, kept = steps[0]["pattern"]["Regex"], (steps[0]["behavior"], steps[0].get("invert", False))
            if kept == ("Isolated", False):
                return keeping_the_rest(pattern)
            if kept == ("Removed", True):  # all text between the matches
                return pattern
    raise UserError(f"{file}: cuts text in a way that is not known here ({', '.join(kinds)}); {ONLY}")


def open_gguf(path: str | Path):
    """The reader of a .gguf file. UserError where its package is missing."""
    try:
        from gguf import GGUFReader
    except ImportError:
        raise UserError(f"{path}: reading it needs the package gguf; run `pip install gguf`") from None
    return GGUFReader(path)


def read_gguf(path: str) -> dict:
    """The vocabulary in the metadata of a .gguf file. UserError if it can't be read."""
    fields = open_gguf(path).fields
    found = {k.removeprefix("tokenizer.ggml."): v.contents() for k, v in fields.items() if k.startswith("tokenizer.")}
    kind, pre, tokens = found.get("model"), found.get("pre"), found.get("tokens", [])
    check(kind == "gpt2", f"{path}: its vocabulary is {kind}'s; {ONLY}")
    check(pre in PATTERNS, f"{path}: cuts text as {pre!r}, which is not known here; {ONLY}")
    types = found["token_type"]  # 1 ordinary, 3 control, 4 added by the user, 5 unused
    ids = {token: i for i, (token, t) in enumerate(zip(tokens, types, strict=True)) if t == 1}
    special = {token: i for i, (token, t) in enumerate(zip(tokens, types, strict=True)) if t in (2, 3, 4)}
    ranks = ranks_of(ids, [tuple(merge.split(" ")) for merge in found["merges"]], pre == "llama-bpe", path)
    eos, chat = tokens[found["eos_token_id"]], found.get("tokenizer.chat_template", "")
    bos = tokens[found["bos_token_id"]] if "bos_token_id" in found else ""
    first = [bos] if bos and found.get("add_bos_token", pre == "llama-bpe") else []
    return describe(ranks, special, PATTERNS[pre], pre == "qwen2", eos, first, bos, chat, path)


def ranks_of(ids: dict[str, int], merges: list[tuple[str, str]], whole_first: bool, where: str) -> dict[bytes, int]:
    """{bytes of a token: its id}. UserError unless tiktoken merges all texts as the list of merges does.

    The list merges the pairs that are in it, the earliest first. tiktoken merges any two pieces that make a token, the
    lowest id first. The two agree on all texts under two conditions: the list merges every token's own characters to
    that token, and the ids grow in the order of the merges that do so. whole_first: a piece of text that is a token is
    not merged at all (tiktoken always does so). Then merging need not reach a token, if all pairs that make the token
    are in the list."""
    byte_of = {c: b for b, c in CHAR_OF.items()}
    strange = [token for token in ids if not byte_of.keys() >= set(token)]
    check(not strange, f"{where}: the token {''.join(strange[:1])!r} is not spelt in bytes; {ONLY}")
    lost = [a + b for a, b in merges if a + b not in ids]
    check(not lost, f"{where}: its merges make {''.join(lost[:1])!r}, which is no token of it")
    rank = {pair: i for i, pair in enumerate(merges)}
    order = []  # (number of a merge, id of the token that it makes)
    for token, i in ids.items():
        parts, last = list(token), None
        while len(parts) > 1:
            last, at = min((rank.get(pair, len(rank)), at) for at, pair in enumerate(pairwise(parts)))
            if last == len(rank):
                break
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        if len(parts) == 1:
            order += [(last, i)] if last is not None else []
            continue
        pairs = [(token[:n], token[n:]) for n in range(1, len(token))]
        pairs = [pair for pair in pairs if pair[0] in ids and pair[1] in ids]
        reached = whole_first and all(pair in rank for pair in pairs)
        check(reached, f"{where}: its merges never make the token {token!r}, so tiktoken would cut text otherwise")
        order += [(rank[pair], i) for pair in pairs]
    order.sort()
    grows = all(a <= b for (_, a), (_, b) in pairwise(order))
    check(grows, f"{where}: the ids of its tokens don't grow in the order of its merges, which tiktoken needs")
    return {bytes(byte_of[c] for c in token): i for token, i in ids.items()}


def describe(
    ranks: dict, special: dict, pattern: str, nfc: bool, eos: str, first: list, bos: str, chat: str, where: str
) -> dict:
    """The description that `build` takes. The model's own chat template, or else its special tokens, name the
    template. first: the tokens at the start of every text. chat: the text of that chat template, if any, and bos: what
    it calls bos_token."""
    blank = [token for token in special if not token.strip()]
    check(not blank, f"{where}: adds the token {''.join(blank[:1])!r}, white space that any text may hold; {ONLY}")
    evidence = chat or " ".join(special)
    template = "chatml" if "<|im_start|>" in evidence else "llama3" if "<|start_header_id|>" in evidence else "plain"
    if chat and template == "plain" and not chat.endswith(JINJA["plain"]):
        print(f"NOTE: {where} has a chat template that is neither chatml nor Llama 3's; prompts get the plain one")
    system = re.search(r"<\|im_start\|>system(?:\\n|\n)([^'\"{}<]+)<\|im_end\|>", chat)
    lines = [f"{base64.b64encode(token).decode()} {i}" for token, i in sorted(ranks.items(), key=lambda item: item[1])]
    # a chat template writes the start of a conversation itself, by the name bos_token or spelt out
    opening = [bos] if bos and "bos_token" in chat else [token for token in first if token in chat or not chat]
    unknown = [token for token in (*first, *opening) if token not in special]
    check(not unknown, f"{where}: {''.join(unknown[:1])!r}, which it puts first, is no added token")
    found = {
        "ranks": "\n".join(lines),
        "special": special,
        "pattern": pattern,
        "nfc": nfc,
        "eos": eos,
        "template": template,
        "system": system[1].replace("\\n", "\n") if system else "",
    }
    # only where there are any: checkpoints of before have none
    return found | ({"bos": {"plain": first, "chatml": opening}} if first or opening else {})


# -------------------------------------------------------------------------------- out

PAD = "<|pad|>"  # pads the batches that a reward model reads
# The templates of data/tokenizer.py as Hugging Face's chat templates. BOS and SYSTEM are put in below.
JINJA = {
    "plain": """{% for message in messages %}{% if message['role'] == 'assistant' %}Assistant:
{{ message['content'] }}
{% else %}{{ message['role'] | capitalize }}: {{ message['content'] }}
{% endif %}{% endfor %}{% if add_generation_prompt %}Assistant:
{% endif %}""",
    "chatml": """SYSTEM{% for message in messages %}<|im_start|>{{ message['role'] }}
{{ message['content'] }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}""",
    "llama3": """{% for message in messages %}<|start_header_id|>{{ message['role'] }}<|end_header_id|>

{{ message['content'] | trim }}<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>\
assistant<|end_header_id|>

{% endif %}""",
}


def merges_of(ranks: dict[bytes, int]) -> tuple[list[list[bytes]], bool]:
    """{bytes of a token: its id} -> the list of merges by which `tokenizers` merges all texts as tiktoken does, and
    whether a piece that is a token must be taken whole. The inverse of ranks_of, where the conditions are."""
    merges, whole_first = [], False
    for token, i in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [token[n : n + 1] for n in range(len(token))]
        while len(parts) > 2:
            rank, at = min((ranks.get(a + b, i), at) for at, (a, b) in enumerate(pairwise(parts)))
            if rank >= i:  # no earlier token
                break
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        if len(parts) == 2:
            merges.append(parts)
        elif len(parts) > 2:  # merging doesn't reach it
            splits = [[token[:n], token[n:]] for n in range(1, len(token))]
            merges += [split for split in splits if ranks.keys() >= set(split)]
            whole_first = True
    return merges, whole_first


def tokenizer_files(tokenizer, longest: int, pad_id: int, padding_side: str) -> dict[str, dict]:
    """tokenizer.json and tokenizer_config.json of a Tokenizer of data/tokenizer.py. longest: of the model's texts.
    pad_id: that of a special token; one that there isn't yet is PAD.

    In a prompt of the plain template there are no special tokens, so those that a text spells out stay text, as here
    (split_special_tokens). The other templates need them, and there other tools also find them in the user's text."""
    d, template = tokenizer.description(), tokenizer.template
    special = {PAD: pad_id} | d["special"] if pad_id not in d["special"].values() else d["special"]
    token_of = {i: token for token, i in special.items()}
    ranks = parse_ranks(d["ranks"])
    spelt = {token: "".join(CHAR_OF[b] for b in token) for token in ranks}
    merges, whole_first = merges_of(ranks)
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    cut = {"type": "Split", "pattern": {"Regex": d["pattern"]}, "behavior": "Removed", "invert": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    vocab = {spelt[token]: i for token, i in ranks.items()} | special
    pairs = [[spelt[a], spelt[b]] for a, b in merges]
    first = d.get("bos", {}).get("plain", [])  # before every text; what is before a conversation is in its template
    single = [{"SpecialToken": {"id": token, "type_id": 0}} for token in first]
    single.append({"Sequence": {"id": "A", "type_id": 0}})
    known = {token: {"id": token, "ids": [special[token]], "tokens": [token]} for token in first}
    before = {"type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": known}
    whole = {
        "version": "1.0",
        "added_tokens": [{"id": i, "content": token, **flags} for i, token in sorted(token_of.items())],
        "normalizer": {"type": "NFC"} if d["nfc"] else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [cut, byte_level]},
        "post_processor": before if first else None,
        "decoder": byte_level,
        "model": {"type": "BPE", "ignore_merges": whole_first, "vocab": vocab, "merges": pairs},
    }
    system = f"<|im_start|>system\n{d['system']}<|im_end|>\n"
    system = f"{{% if messages[0]['role'] != 'system' %}}{system}{{% endif %}}" if d["system"] else ""
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": longest,
        "eos_token": token_of[tokenizer.eos_id],
        "pad_token": token_of[pad_id],
        "padding_side": padding_side,
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": template == "plain" and not first,
        "chat_template": "".join(tokenizer.first) + JINJA[template].replace("SYSTEM", system),
    }
    config |= {"bos_token": tokenizer.first[0]} if tokenizer.first else {}
    return {"tokenizer.json": whole, "tokenizer_config.json": config}
