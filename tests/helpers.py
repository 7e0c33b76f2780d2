"""What the tests share: tiny networks, random frames, finite differences, and a toy language for the scripts."""

from __future__ import annotations

import json
import math
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import torch
from torch import Tensor

import sft
from lib.checkpoint import save_model
from data import tiny
from data.batches import Example, RankedExamples
from data.tokenizer import NAMED
from frame import completion_mask
from model import GPT, GPTConfig, ScalarModel
from sampling import Rollout

ROOT = Path(__file__).resolve().parent.parent
REAL = ROOT.parent / "shared" / "real"  # real data; the tests that need it skip where it is absent
GPT2_BPE = REAL / "gpt2_bpe"


def spread(module: torch.nn.Module, seed: int, scale: float = 0.3) -> None:
    """Add N(0, scale) noise to every parameter, biases and LayerNorm gains too: with
    them at 0 and 1 a test can't see them."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p += scale * torch.randn(p.shape, generator=generator).to(p)


def make_gpt(
    seed: int = 0,
    vocab: int = 23,
    block_size: int = 48,
    n_layer: int = 2,
    n_head: int = 4,
    n_embd: int = 32,
    dropout: float = 0.0,
    real_vocab: int | None = None,
    dtype: torch.dtype | None = None,
    rope_base: float = 0.0,
    **others,
) -> GPT:
    """A tiny random GPT in eval mode, with spread-out logits and no parameter at its trivial
    value. Torch's global generator is left as it was. dtype: torch's default (float32, or float64
    under the fixture `float64`) unless given. others: fields of GPTConfig."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = GPT(GPTConfig(vocab, block_size, n_layer, n_head, n_embd, dropout, real_vocab, rope_base, **others))
    spread(model, seed + 1)
    return model.to(dtype or torch.get_default_dtype()).eval()


def make_scalar(seed: int = 0, expectation: bool = False, **sizes) -> ScalarModel:
    """A ScalarModel around make_gpt(seed, **sizes), in eval mode."""
    gpt = make_gpt(seed, **sizes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + 2)
        model = ScalarModel.from_gpt(gpt, expectation)
    if expectation:
        spread(model.block, seed + 3)
        spread(model.ln, seed + 4)
    return model.to(gpt.wte.weight.dtype).eval()


def make_told(seed: int = 0, **sizes) -> ScalarModel:
    """make_scalar's, with expectation: it reads how expected each token was."""
    return make_scalar(seed, expectation=True, **sizes)


def slow_hidden(model: ScalarModel, ids: list[int]) -> Tensor:
    """What the head reads in one text, the obvious way: (T, C). With expectation the logit of each token, from
    the position before it, is written along `direction`, and one more block and LayerNorm follow."""
    x = model.gpt.hidden(torch.tensor([ids]))[0]  # (T, C)
    if not model.expectation:
        return x
    written = [x[0]]  # nothing has foretold the first token
    for t in range(1, len(ids)):
        written.append(x[t] + torch.dot(x[t - 1], model.gpt.wte.weight[ids[t]]) * model.direction)
    return model.ln(model.block(torch.stack(written)[None], model.gpt.view(torch.tensor([ids]))))[0]


def random_prompts(lengths: list[int], vocab: int, seed: int = 0, low: int = 0) -> list[list[int]]:
    """Random ids in low..vocab-1, one prompt for each length."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(low, vocab, (n,), generator=generator).tolist() for n in lengths]


@dataclass
class Frame:
    """A right-padded batch of `prompt + completion + filler`, and the lengths that its masks come from."""

    tokens: Tensor  # (B, T)
    prompt_lens: Tensor  # (B,)
    lens: Tensor  # (B,)

    @property
    def completion_mask(self) -> Tensor:  # (B, T) bool
        return completion_mask(self.prompt_lens, self.lens, self.tokens.size(1))

    @property
    def action_mask(self) -> Tensor:  # (B, T-1) bool
        return self.completion_mask[:, 1:]

    def row(self, i: int) -> Tensor:
        """(1, len) the i-th row alone, without filler."""
        return self.tokens[i : i + 1, : int(self.lens[i])]


def frame_batch(
    B: int = 5,
    vocab: int = 23,
    max_prompt: int = 6,
    max_completion: int = 8,
    extra: int = 0,
    filler: int | None = None,
    seed: int = 0,
) -> Frame:
    """A Frame of B rows of unequal prompt and completion lengths (each at least 1), `extra` columns wider than its
    longest row. Filler is random unless given: what it is must not matter."""
    generator = torch.Generator().manual_seed(seed)
    prompt_lens = torch.randint(1, max_prompt + 1, (B,), generator=generator)
    lens = prompt_lens + torch.randint(1, max_completion + 1, (B,), generator=generator)
    tokens = torch.randint(0, vocab, (B, int(lens.max()) + extra), generator=generator)
    if filler is not None:
        tokens[torch.arange(tokens.size(1)) >= lens[:, None]] = filler
    return Frame(tokens, prompt_lens, lens)


def random_mask(shape: tuple[int, ...], seed: int = 0, share: float = 0.6) -> Tensor:
    """A random bool mask with at least one True."""
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share
    mask.view(-1)[0] = True
    return mask


def finite_difference_gradient(f: Callable[[Tensor], Tensor], x: Tensor, step: float = 1e-6) -> Tensor:
    """Central differences of the scalar function f at x, in float64: an independent truth
    for autograd. Error about step squared."""
    x = x.detach().double()
    gradient = torch.zeros_like(x)
    for i in range(x.numel()):
        up, down = x.clone(), x.clone()
        up.view(-1)[i] += step
        down.view(-1)[i] -= step
        gradient.view(-1)[i] = (float(f(up)) - float(f(down))) / (2 * step)
    return gradient


def gradient_of(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Autograd's gradient of the scalar function f at x."""
    x = x.detach().clone().requires_grad_()
    f(x).backward()
    return x.grad


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, generator=rng(seed), dtype=torch.float64)


def spoil(x: Tensor, mask: Tensor, value: float) -> Tensor:
    """x with `value` wherever the mask is 0."""
    return torch.where(mask.bool(), x, torch.full_like(x, value))


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x)) if x > 0 else x - math.log1p(math.exp(x))


def gae_by_definition(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    """A_t = sum over l of (gamma lam)^l delta_{t+l}, on one sequence without filler; the value after its end is 0."""
    n = len(rewards)
    deltas = [rewards[t] + gamma * (values[t + 1] if t + 1 < n else 0.0) - values[t] for t in range(n)]
    return [sum((gamma * lam) ** k * deltas[t + k] for k in range(n - t)) for t in range(n)]


# ------------------------------------------------------------------------------------------------ the toy language


class ToyTokenizer:
    """One letter is one token, so texts, ids and networks stay tiny. a..v are the tokens 0..21. EOS is 22, which a
    prompt can hold too, as "w": only a sampled EOS may end a text."""

    name, n_vocab, eos_id = "toy", 23, 22
    saved = name

    def encode(self, text: str) -> list[int]:
        return [ord(c) - ord("a") for c in text]

    encode_prompt = encode

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(ord("a") + i) for i in ids)


EOS = ToyTokenizer.eos_id


class ByteTokenizer:
    """One byte is one token: a vocabulary for any text that is neither tiny nor GPT-2's."""

    name, n_vocab, eos_id = "bytes", 257, 256
    saved = name

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    encode_prompt = encode

    def decode(self, ids: list[int]) -> str:
        return bytes(i for i in ids if i < 256).decode(errors="replace")


TOY = ToyTokenizer()
# every stage finds the two by name, as it finds tiny: in a checkpoint, or as --tokenizer toy
NAMED.update(toy=lambda template: TOY, bytes=lambda template: ByteTokenizer())


def plain_sgd(monkeypatch) -> None:
    """Put plain SGD in the place of Adam: then the weights before minus after a step are the gradient itself, times the
    learning rate. A weight decay acts as in the optimiser that it stands for, AdamW's own 0.01 too if none is given; an
    argument that neither knows is an error. Betas and eps mean nothing to it: test_stages.py looks at those."""
    for name, own_decay in (("AdamW", 0.01), ("Adam", 0.0)):

        def stand_in(params, lr=1e-3, betas=None, eps=None, weight_decay=own_decay, fused=None):
            return torch.optim.SGD(params, lr=lr, weight_decay=weight_decay)

        monkeypatch.setattr(torch.optim, name, stand_in)


def write_lines(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def read_lines(path: str | Path) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


# What a GGUFWriter's add_... functions write: the keys of the format as it is published. ARCH: the architecture.
GGUF_KEYS = {
    "context_length": "ARCH.context_length",
    "block_count": "ARCH.block_count",
    "embedding_length": "ARCH.embedding_length",
    "feed_forward_length": "ARCH.feed_forward_length",
    "head_count": "ARCH.attention.head_count",
    "head_count_kv": "ARCH.attention.head_count_kv",
    "layer_norm_rms_eps": "ARCH.attention.layer_norm_rms_epsilon",
    "rope_freq_base": "ARCH.rope.freq_base",
    "tokenizer_model": "tokenizer.ggml.model",
    "tokenizer_pre": "tokenizer.ggml.pre",
    "token_list": "tokenizer.ggml.tokens",
    "token_types": "tokenizer.ggml.token_type",
    "token_merges": "tokenizer.ggml.merges",
    "eos_token_id": "tokenizer.ggml.eos_token_id",
    "chat_template": "tokenizer.chat_template",
}


def gguf_package(monkeypatch):
    """The package gguf; where it is not installed a stand-in for as much of it as the tests need: what one writes is
    kept under its key, and read again."""
    try:
        import gguf
    except ImportError:
        gguf, quants, files = ModuleType("gguf"), ModuleType("gguf.quants"), {}
    else:
        return gguf

    class GGUFWriter:
        def __init__(self, path, kind: str):
            self.path, self.kind, self.tensors = Path(path), kind, []
            self.fields = {"general.architecture": kind}

        def __getattr__(self, name: str):
            key = GGUF_KEYS[name.removeprefix("add_")].replace("ARCH", self.kind)
            return lambda value: self.fields.__setitem__(key, value)

        def add_string(self, key: str, value: str) -> None:
            self.fields[key] = value

        def add_tensor(self, name: str, value) -> None:
            self.tensors.append(SimpleNamespace(name=name, data=value, tensor_type=0))

        def write_header_to_file(self) -> None: ...

        def write_kv_data_to_file(self) -> None: ...

        def write_tensors_to_file(self) -> None: ...

        def close(self) -> None:
            self.path.write_bytes(b"GGUF")
            files[self.path] = self

    class GGUFReader:
        def __init__(self, path):
            if Path(path) not in files:
                raise ValueError("GGUF magic invalid")
            self.tensors, self.fields = files[Path(path)].tensors, {}
            for key, value in files[Path(path)].fields.items():
                value = float(np.float32(value)) if isinstance(value, float) else value  # so it is in the file
                self.fields[key] = SimpleNamespace(contents=lambda value=value: value)

        def get_field(self, key: str):
            return self.fields.get(key)

    gguf.GGUFWriter, gguf.GGUFReader, quants.dequantize = GGUFWriter, GGUFReader, lambda data, kind: data
    monkeypatch.setitem(sys.modules, "gguf", gguf)
    monkeypatch.setitem(sys.modules, "gguf.quants", quants)
    return gguf


def checkpoint(folder: Path, model) -> str:
    """Save a model as a stage does; -> its folder."""
    save_model(folder, model, "toy", "test", sft.Config())
    return str(folder)


def slow_draw(logits: list[float], uniform: float, temperature: float = 1.0) -> int:
    """The obvious draw: add up the probabilities of ids 0, 1, 2, ... until their sum exceeds uniform. Temperature 0
    takes the most likely."""
    if temperature == 0:
        return max(range(len(logits)), key=logits.__getitem__)
    top = max(logits)
    weights = [math.exp((x - top) / temperature) for x in logits]
    passed, total = 0.0, sum(weights)
    for token, weight in enumerate(weights):
        passed += weight / total
        if passed > uniform:
            return token
    raise AssertionError("a sum of probabilities below 1, by rounding: give the test another seed")


@torch.no_grad()
def slow_generate(
    model, prompts: list[list[int]], max_new_tokens: int, *, eos_id: int, temperature=1.0, generator=None
) -> Rollout:
    """The obvious sampler: no cache, no padding, no prompt read once for several, and no row left behind: every row's
    whole text through the model again for each token. It draws from the same numbers as `generate`, one a row and
    step."""
    texts, ended = [list(p) for p in prompts], [False] * len(prompts)
    uniforms = torch.rand(max_new_tokens, len(prompts), generator=generator).tolist()
    for step in range(max_new_tokens):
        for i, text in enumerate(texts):
            if not ended[i]:
                logits = model(torch.tensor([text]))[0, -1].tolist()
                text.append(slow_draw(logits, uniforms[step][i], temperature))
                ended[i] = text[-1] == eos_id
    lens = [len(text) for text in texts]
    tokens = torch.tensor([text + [eos_id] * (max(lens) - len(text)) for text in texts])
    prompt_lens = torch.tensor([len(p) for p in prompts])
    return Rollout(tokens, prompt_lens, torch.tensor(lens), torch.tensor(ended))


def completion_logprobs(model, prompt: list[int], completion: list[int], temperature: float = 1.0) -> Tensor:
    """The obvious way: one row without filler, float64 log-softmax, token after token -> (len(completion),)."""
    ids = prompt + completion
    logp = (model(torch.tensor([ids]))[0].double() / temperature).log_softmax(-1)
    return torch.stack([logp[t - 1, ids[t]] for t in range(len(prompt), len(ids))])


def descend(model, loss: Tensor, lr: float) -> None:
    """One step of plain gradient descent, in place."""
    params = [p for p in model.parameters() if p.requires_grad]
    for p, g in zip(params, torch.autograd.grad(loss, params, allow_unused=True), strict=True):
        if g is not None:
            p.data -= lr * g


def assert_same_weights(model, expected, before, tolerance: float = 1e-9) -> None:
    """model and expected, of float64 throughout, have taken the same step from `before`: they agree
    to `tolerance` of the step's own size."""
    step = max((e - b).abs().max().item() for e, b in zip(expected.parameters(), before.parameters(), strict=True))
    assert step > 1e-4, "the expected step must be large enough to be compared"
    for (name, a), e in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert a.dtype == torch.float64, f"{name} has been trained in {a.dtype}"
        error = (a - e).abs().max().item()
        assert error <= tolerance * step, f"{name} is off by {error:.2e} where the step is {step:.2e}"


def distance(model, other) -> float:
    """The length of the step between the two."""
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    return math.sqrt(sum((a - b).pow(2).sum().item() for a, b in pairs))


def strict_json(path: Path) -> dict:
    """Read JSON as the standard has it: NaN and Infinity are not part of it, and other readers stop there."""

    def refuse(constant: str):
        raise AssertionError(f"{constant} in {path.name}")

    return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)


def bigram(logits: Tensor) -> GPT:
    """A policy whose next token has logits[the last token], (23, 23), and looks at nothing else."""
    C = 24
    model = make_gpt(0, n_embd=C, n_layer=1, block_size=24, tied=False, rope_base=100.0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "c_proj" in name:  # the block adds nothing
                p.zero_()
        model.wte.weight.copy_(torch.eye(23, C))
        model.ln_f.weight.fill_(math.sqrt((1 - 1 / C) / C + 1e-5))  # undoes the LayerNorm of a one-hot vector
        model.ln_f.bias.fill_(1 / C)
        model.unembedding.weight.copy_(torch.nn.functional.pad(logits.mT, (0, 1)))
    return model


# ------------------------------------------------------------------------------------------------ rankings in it


def ranked(prompt: list[int], completions: list[list[int]], ranks: list[int]) -> RankedExamples:
    return RankedExamples([Example(prompt, [*c, EOS]) for c in completions], ranks)


ITEMS = [
    ranked([1, 2], [[3], [4, 5, 6], [7, 8]], [0, 1, 2]),
    ranked([3], [[1, 1], [2, 2, 2], [3], [4, 4, 4, 4]], [0, 0, 1, 2]),
    ranked([5, 6, 7, 8], [[9], [10, 11]], [0, 1]),
    ranked([2, 2], [[9, 9], [8, 8]], [0, 1]),  # equally long
    ranked([4, EOS], [[1], [], [4, 5], [6]], [0, 1, 2, 3]),  # silence; EOS within the prompt
]

MIXED_RANKS = torch.tensor([[0, 1, 2, 3], [0, 0, 1, 2], [0, 1, -1, -1], [0, 0, 0, 1], [0, 1, 1, -1]])

RANKINGS = [
    {"prompt": "ab", "completions": ["c", "de", "fgh"]},
    {"prompt": "b", "completions": [["cdefgh", "d"], "e"]},  # a tie
    {"prompt": "cde", "chosen": "a", "rejected": "bbbbbbbb"},  # a pair
    {"prompt": "wf", "completions": ["gh", ["i", "jkl"], "m"]},  # EOS within the prompt
    {"prompt": "g", "completions": ["hijk", "a", "", "cc"]},  # silence is an answer
    {"prompt": "hi", "completions": [["a", "a"], "b"]},  # equal texts: one of them stays
]
# the same by hand: prompt, groups of equal rank, best first
GROUPS = [
    ("ab", [["c"], ["de"], ["fgh"]]),
    ("b", [["cdefgh", "d"], ["e"]]),
    ("cde", [["a"], ["bbbbbbbb"]]),
    ("wf", [["gh"], ["i", "jkl"], ["m"]]),
    ("g", [["hijk"], ["a"], [""], ["cc"]]),
    ("hi", [["a"], ["b"]]),
]

# completions that --max_new_tokens cut: no EOS belongs behind them
CUT_RANKINGS = [
    {"prompt": "ab", "completions": ["c", "de", "fgh"], "ended": [True, False, True]},
    {"prompt": "b", "completions": [["cd", "d"], "e"], "ended": [False, True, False]},
    {"prompt": "cde", "chosen": "a", "rejected": "bbbb", "ended": [False, False]},
    {"prompt": "g", "completions": ["h", "h", ""], "ended": [True, False, True]},  # h: two answers
]
# the same by hand: as GROUPS, with "." where a text ended
CUT_GROUPS = [
    ("ab", [["c."], ["de"], ["fgh."]]),
    ("b", [["cd", "d."], ["e"]]),
    ("cde", [["a"], ["bbbb"]]),
    ("g", [["h."], ["h"], ["."]]),
]


def score_rankings(model: ScalarModel, batch) -> Tensor:
    """The scores of a RankedBatch, (N, K): at the last token of each completion."""
    return model(batch.tokens, batch.ends, batch.positions)


def text_before(tokens: torch.Tensor, positions: torch.Tensor, place: int) -> list[int]:
    """The text that ends at a flat place of a batch of rankings, found by going back from token to token: the one
    before has the position below, and is the nearest with it."""
    row, column = divmod(place, tokens.size(1))
    ids = [int(tokens[row, column])]
    for left in range(int(positions[row, column]) - 1, -1, -1):
        column = max(c for c in range(column) if positions[row, c] == left and (left or c == 0))
        ids.append(int(tokens[row, column]))
    return ids[::-1]


def task_rankings(n: int, seed: int = 1) -> list[dict]:
    """Pairs of the embedded task, as simulated annotators rank them."""
    rng, rows = random.Random(seed), []
    for _ in range(n):
        prompt = tiny.sample_prompt(rng, "train")
        texts = [tiny.best_completion(prompt), "I do not know."]
        gold = tiny.gold_reward([prompt] * 2, texts)
        rows.append({"prompt": prompt, "completions": texts, "gold": gold, "annotator_temperature": 0.8})
    return rows


# ------------------------------------------------------------------------------------------------ data of one's own


def own_pairs(n: int, start: int = 0, gold: bool = False) -> list[dict]:
    """Pairs that are not of the embedded task, in ordinary letters; gold: ranked by simulated annotators."""
    told = {"gold": [1.0, 0.0], "annotator_temperature": 0.8} if gold else {}
    return [{"prompt": chr(97 + i % 20) * 3, "completions": ["ab", "cde"], **told} for i in range(start, start + n)]


def beside_a_demo(folder: Path, monkeypatch) -> tuple[Path, list[str]]:
    """Step into a folder where the demo seems to have run (every file has its name, none can be read) -> a folder for
    data of one's own, and the list of the demo's files that are opened from now on."""
    kinds, suffixes = ("demonstrations", "prompts", "rankings"), ("", "_held_out", "_test")
    names = [f"data/{kind}{suffix}.jsonl" for kind in kinds for suffix in suffixes]
    names += [f"{stage}/model.pt" for stage in ("sft", "reward_model", "ppo", "dpo")]
    demo, own, opened = folder.resolve() / "out", folder.resolve() / "own", []
    for name in names:
        (demo / name).parent.mkdir(parents=True, exist_ok=True)
        (demo / name).write_text("the demo's\n", encoding="utf-8")
    own.mkdir()
    monkeypatch.chdir(folder)
    plain_open = open

    def watching(file, *args, **kwargs):
        if isinstance(file, (str, Path)) and demo in Path(file).resolve().parents:
            opened.append(str(file))
        return plain_open(file, *args, **kwargs)

    for name in ("builtins.open", "io.open"):  # pathlib uses the second
        monkeypatch.setattr(name, watching)
    return own, opened
