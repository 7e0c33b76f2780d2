"""The network all stages share: a GPT-2 in plain PyTorch, the scalar head of reward and value models, cached sampling,
token log-probabilities, and import / export of GPT-2 weights.

The frame. Every sequence is `prompt + completion (+ EOS) + filler`, padded on the right:

    index          0     1     2     3     4     5     6
    tokens        p0    p1    p2    a0    a1   EOS   fill      (B, T)
    logprobs[t] = log pi(tokens[t+1] | tokens[:t+1])            (B, T-1)
    action_mask    0     0     1     1     1     0              (B, T-1)   1 where tokens[t+1] was sampled, EOS included

Real tokens stand at positions 0..len-1 and attention is causal, so no real token ever sees filler: no attention mask, no
position trick, and what the filler ids are makes no difference.

Shapes: B rows, T tokens, C channels (n_embd), H heads, D = C / H, V vocabulary, S cache slots.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn import functional as F

# ------------------------------------------------------------------------------------------------ the network


@dataclass
class GPTConfig:
    vocab_size: int
    block_size: int  # the longest sequence, in tokens
    n_layer: int
    n_head: int
    n_embd: int
    dropout: float = 0.0
    # Rows of the embedding that belong to real token ids, where a table has more (imported weights padded to a round
    # number). Logits beyond it are cut off inside the model, so no such id can be sampled or be given probability.
    real_vocab: int | None = None

    def __post_init__(self):
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} is not a multiple of n_head {self.n_head}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), not {self.dropout}")


class KVCache:
    """Keys and values of one layer for a batch of rows: (B, H, S, D) each, allocated once."""

    def __init__(self, batch: int, slots: int, config: GPTConfig, like: Tensor):
        shape = (batch, config.n_head, slots, config.n_embd // config.n_head)
        self.k = torch.zeros(shape, device=like.device, dtype=like.dtype)
        self.v = torch.zeros(shape, device=like.device, dtype=like.dtype)

    def prefill(self, k: Tensor, v: Tensor) -> None:
        """Write the keys and values of positions 0..T-1 of every row."""
        self.k[:, :, : k.size(2)] = k
        self.v[:, :, : v.size(2)] = v

    def append(self, k: Tensor, v: Tensor, positions: Tensor) -> None:
        """Write one position per row, k, v (B, H, 1, D), each at that row's own place, positions (B,)."""
        rows = torch.arange(k.size(0), device=k.device)
        self.k[rows, :, positions] = k[:, :, 0].to(self.k.dtype)
        self.v[rows, :, positions] = v[:, :, 0].to(self.v.dtype)


class Attention(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x: Tensor, cache: KVCache | None = None, positions: Tensor | None = None, visible: Tensor | None = None) -> Tensor:
        B, T, C = x.shape
        q, k, v = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)  # 3 x (B, H, T, D)
        if positions is None:  # whole sequences: training, scoring, and the prefill of a cache
            if cache is not None:
                cache.prefill(k, v)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=self.dropout if self.training else 0.0)
        else:  # one new token a row, against the cache; visible (B, 1, 1, S') is True on slots 0..position
            cache.append(k, v, positions)
            span = visible.size(-1)
            y = F.scaled_dot_product_attention(q, cache.k[:, :, :span].to(q.dtype), cache.v[:, :, :span].to(q.dtype), attn_mask=visible)
        y = self.c_proj(y.transpose(1, 2).reshape(B, T, C))  # (B, T, C)
        return F.dropout(y, self.dropout, self.training)


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.dropout = config.dropout
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        y = self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))
        return F.dropout(y, self.dropout, self.training)


class Block(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cache: KVCache | None = None, positions: Tensor | None = None, visible: Tensor | None = None) -> Tensor:
        x = x + self.attn(self.ln_1(x), cache, positions, visible)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """GPT-2 (Radford et al. 2019): learned positions, pre-norm blocks, output tied to the token embedding. The parameters
    have GPT-2's own names (wte, wpe, h.0.ln_1, ...), so its weights import one to one."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                # GPT-2's N(0, 0.02) is made for its 768 channels; scaled so that activations have the same size at any width.
                # Less where a residual branch ends, so that depth adds no variance.
                std = 0.02 * math.sqrt(768 / config.n_embd)
                nn.init.normal_(p, std=std / math.sqrt(2 * config.n_layer) if name.endswith("c_proj.weight") else std)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    @property
    def device(self) -> torch.device:
        return self.wte.weight.device

    def hidden(self, tokens: Tensor, caches: list[KVCache] | None = None, positions: Tensor | None = None, visible: Tensor | None = None) -> Tensor:
        """tokens (B, T) -> (B, T, C) after the final LayerNorm. The other arguments serve `generate`: with `caches` alone the
        whole sequence fills them; with positions (B,) too, tokens (B, 1) stand at those positions."""
        T = tokens.size(1)
        if T > self.config.block_size:
            raise ValueError(f"sequence of {T} tokens is longer than block_size {self.config.block_size}")
        where = torch.arange(T, device=tokens.device) if positions is None else positions[:, None]  # (T,) or (B, 1)
        x = self.wte(tokens) + self.wpe(where)  # (B, T, C)
        x = F.dropout(x, self.config.dropout, self.training)
        for i, block in enumerate(self.h):
            x = block(x, caches[i] if caches else None, positions, visible)
        return self.ln_f(x)

    def lm_head(self, hidden: Tensor) -> Tensor:
        """hidden (..., C) -> logits (..., V), by the transposed token embedding."""
        return F.linear(hidden, self.wte.weight[: self.config.real_vocab])

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (B, T) -> logits (B, T, V) of the next token at every position."""
        return self.lm_head(self.hidden(tokens))

    # -------------------------------------------------------------------------------------------- GPT-2 weights

    @classmethod
    def from_pretrained(cls, name: str, dropout: float = 0.0) -> GPT:
        """Names: "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl" (downloaded once by torch.hub) or a directory in Hugging Face's layout:
        config.json with model.safetensors or pytorch_model.bin."""
        folder = Path(name)
        if folder.is_dir():
            shape = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            sizes = [shape[k] for k in ("vocab_size", "n_positions", "n_layer", "n_head", "n_embd")]
            fixed = {"activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "n_inner": None, "tie_word_embeddings": True}
            for key, value in fixed.items():  # what this file takes for granted
                if shape.get(key, value) not in (value, 4 * shape["n_embd"]):
                    raise ValueError(f"{folder / 'config.json'}: {key} is {shape[key]!r}; this model has {value!r}")
            if (folder / "model.safetensors").exists():
                weights = read_safetensors(folder / "model.safetensors")
            else:
                weights = torch.load(folder / "pytorch_model.bin", map_location="cpu", weights_only=True)
        elif name in GPT2_SIZES:
            sizes = [50257, 1024, *GPT2_SIZES[name]]
            url = f"https://huggingface.co/openai-community/{name}/resolve/main/pytorch_model.bin"
            weights = torch.hub.load_state_dict_from_url(url, map_location="cpu", weights_only=True, file_name=f"{name}.bin")
        else:
            raise ValueError(f"{name!r} is neither a directory nor one of {', '.join(GPT2_SIZES)}")
        model = cls(GPTConfig(*sizes, dropout=dropout))
        state = {}
        for key, value in weights.items():
            key = key.removeprefix("transformer.")
            if key == "lm_head.weight" or key.endswith((".attn.bias", ".attn.masked_bias")):  # tied; causal masks kept as buffers
                continue
            # GPT-2 stores its dense layers as (in, out), nn.Linear as (out, in)
            state[key] = value.float().t().contiguous() if key.endswith(CONV1D) else value.float()
        model.load_state_dict(state)
        return model

    def save_pretrained(self, directory: str | Path) -> None:
        """Write config.json and model.safetensors in Hugging Face's GPT-2 layout."""
        folder, c = Path(directory), self.config
        vocab_size = c.real_vocab or c.vocab_size  # rows that are no tokens are left behind
        folder.mkdir(parents=True, exist_ok=True)
        config = {
            **{"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5},
            **{"vocab_size": vocab_size, "n_positions": c.block_size, "n_ctx": c.block_size, "n_layer": c.n_layer, "n_head": c.n_head},
            **{"n_embd": c.n_embd, "resid_pdrop": c.dropout, "embd_pdrop": c.dropout, "attn_pdrop": c.dropout, "tie_word_embeddings": True},
        }
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        state = {f"transformer.{k}": v.t() if k.endswith(CONV1D) else v for k, v in self.state_dict().items()}
        state["transformer.wte.weight"] = state["transformer.wte.weight"][:vocab_size]
        write_safetensors(folder / "model.safetensors", state)


GPT2_SIZES = {"gpt2": (12, 12, 768), "gpt2-medium": (24, 16, 1024), "gpt2-large": (36, 20, 1280), "gpt2-xl": (48, 25, 1600)}
CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
SAFE_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "U8": torch.uint8, "BOOL": torch.bool}


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The format: 8 bytes of header length, a JSON header {name: dtype, shape, data_offsets}, then the bytes."""
    data = bytearray(path.read_bytes())
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    body = memoryview(data)[8 + size :]
    tensors = {}
    for name, entry in header.items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            tensors[name] = torch.frombuffer(body[begin:end], dtype=SAFE_DTYPES[entry["dtype"]]).view(entry["shape"])
    return tensors


def write_safetensors(path: Path, tensors: dict[str, Tensor]) -> None:
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    arrays = {name: t.detach().cpu().float().contiguous().numpy() for name, t in tensors.items()}
    for name, a in arrays.items():
        header[name] = {"dtype": "F32", "shape": list(a.shape), "data_offsets": [offset, offset + a.nbytes]}
        offset += a.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the tensors start at a multiple of 8 bytes
    tmp = path.with_name(path.name + ".tmp")
    with open(tmp, "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for a in arrays.values():
            f.write(a.tobytes())
    tmp.replace(path)


class ScalarModel(nn.Module):
    """A GPT whose output is one number a position: the reward model (read at the last real token) and the value model (read
    before every action). `mean` and `std` are the reward model's normalisation; they are buffers, so they are saved with it
    and hold wherever it scores, and a value model made from it starts in the same units."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.gpt = GPT(config)
        self.head = nn.Linear(config.n_embd, 1)
        # std 1/sqrt(d+1): outputs of order one from a LayerNormed d-vector (Stiennon et al. 2020, arXiv:2009.01325, appendix)
        nn.init.normal_(self.head.weight, std=1 / math.sqrt(config.n_embd + 1))
        nn.init.zeros_(self.head.bias)
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("std", torch.ones(()))

    @classmethod
    def from_gpt(cls, gpt: GPT) -> ScalarModel:
        """The GPT's body, copied, under a new head."""
        model = cls(gpt.config).to(gpt.device)
        model.gpt.load_state_dict(gpt.state_dict())
        return model

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (B, T) -> (B, T), at least float32."""
        raw = self.head(self.gpt.hidden(tokens)).squeeze(-1)  # (B, T)
        raw = raw.to(torch.promote_types(raw.dtype, torch.float32))
        return (raw - self.mean) / self.std

    def score(self, tokens: Tensor, lens: Tensor) -> Tensor:
        """tokens (B, T), lens (B,) -> (B,): the output at each row's last real token."""
        return self(tokens).gather(1, lens[:, None] - 1).squeeze(1)


# ------------------------------------------------------------------------------------------------ log-probabilities


def select_logprobs(logits: Tensor, ids: Tensor, temperature: float = 1.0) -> Tensor:
    """log softmax(logits / temperature)[ids]: logits (..., V), ids (...) -> (...), at least float32.

    As logit minus log-sum-exp, so the full log-softmax is never stored beside the logits."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    return logits.gather(-1, ids[..., None]).squeeze(-1) - logits.logsumexp(-1)


def token_logprobs(model: nn.Module, tokens: Tensor, temperature: float = 1.0) -> Tensor:
    """log pi(tokens[t+1] | tokens[:t+1]): tokens (B, T) -> (B, T-1), at least float32, at the sampling temperature.

    The one function for policy, old policy and reference. Without gradients it works through the rows in slices, so that
    no more than about 64 million logits (256 MB in float32) exist at a time."""
    rows = tokens.size(0)
    if not torch.is_grad_enabled():
        vocab = getattr(getattr(model, "config", None), "vocab_size", 1)
        rows = max(1, 2**26 // max(1, tokens.size(1) * vocab))
    return torch.cat([select_logprobs(model(part)[:, :-1], part[:, 1:], temperature) for part in tokens.split(rows)])


# ------------------------------------------------------------------------------------------------ masked statistics


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of x where mask is 1. `where`, not a product: a masked inf or nan must not leak (0 * inf is nan)."""
    mask = mask.bool()
    return torch.where(mask, x, 0.0).sum() / mask.sum().clamp(min=1)


def whiten(x: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """Scale the masked entries to variance 1 (biased variance) and, unless shift_mean is False, mean 0; 0 where masked out."""
    mean = masked_mean(x, mask)
    variance = masked_mean((x - mean) ** 2, mask)
    white = (x - mean) * torch.rsqrt(variance + 1e-8)
    return torch.where(mask.bool(), white if shift_mean else white + mean, 0.0)


def completion_mask(prompt_lens: Tensor, lens: Tensor, T: int) -> Tensor:
    """(B, T) bool, True on completion tokens (EOS included): positions prompt_len .. len-1. Built from lengths, never from
    ids: the filler may be the EOS id, and a mask that hides EOS never teaches a model to stop. The action mask of the frame
    is this mask shifted by one: completion_mask(...)[:, 1:]."""
    where = torch.arange(T, device=lens.device)
    return (where >= prompt_lens[:, None]) & (where < lens[:, None])


# ------------------------------------------------------------------------------------------------ sampling


@dataclass
class Rollout:
    tokens: Tensor  # (B, S) prompt, completion, then eos_id as filler; S is the longest row's length
    prompt_lens: Tensor  # (B,)
    lens: Tensor  # (B,) prompt and completion, EOS included where it was sampled
    ended: Tensor  # (B,) bool: EOS was sampled; False is a completion that was cut

    @property
    def action_mask(self) -> Tensor:
        """(B, S-1) bool, True where tokens[t+1] was sampled."""
        return completion_mask(self.prompt_lens, self.lens, self.tokens.size(1))[:, 1:]

    def completions(self) -> list[list[int]]:
        """Ids of each completion without its EOS."""
        rows = zip(self.tokens.tolist(), self.prompt_lens.tolist(), self.lens.tolist(), self.ended.tolist(), strict=True)
        return [tokens[start : end - stop] for tokens, start, end, stop in rows]


def sample_token(logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator | None) -> Tensor:
    """logits (B, V) -> ids (B,). Temperature 0 takes the most likely token."""
    logits = logits.float()
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits / temperature
    if top_k is not None:
        best = logits.topk(min(top_k, logits.size(-1)))  # by place, not by value: a tie must not let a k+1st token in
        logits = torch.full_like(logits, -math.inf).scatter(-1, best.indices, best.values)
    probs = logits.softmax(-1)  # (B, V)
    if top_p is not None:  # keep the smallest set of tokens whose probability reaches top_p
        ranked, order = probs.sort(-1, descending=True)
        ranked[ranked.cumsum(-1) - ranked >= top_p] = 0.0  # the probability of all better tokens already reaches it
        probs = torch.zeros_like(probs).scatter(-1, order, ranked)
    return torch.multinomial(probs, 1, generator=generator).squeeze(1)


@torch.no_grad()
def generate(
    model: nn.Module,
    prompts: list[list[int]],
    max_new_tokens: int,
    *,
    eos_id: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
    use_cache: bool = True,
) -> Rollout:
    """Sample a completion of every prompt, the whole batch at once; a row stops at EOS, the loop when all rows have.

    Prompts of unequal length need no left padding: they stand on the left, each row's new tokens are written right behind its
    own prompt, and the cache slot of a token is its position. One pass over the prompts fills the cache, then every step
    feeds one token a row. With use_cache=False every step runs the whole sequence: slow and obvious, for checking; any
    `model(tokens) -> logits` works there, as does one without `hidden`.

    Raises ValueError if a prompt is empty or has no room for max_new_tokens within block_size.
    """
    if not prompts or not all(prompts):
        raise ValueError("generate needs at least one prompt, and no prompt may be empty")
    if max_new_tokens < 1 or temperature < 0 or (top_k is not None and top_k < 1) or (top_p is not None and not 0 < top_p <= 1):
        raise ValueError("generate needs max_new_tokens >= 1, temperature >= 0, top_k >= 1, 0 < top_p <= 1")
    use_cache = use_cache and isinstance(model, GPT)
    training = getattr(model, "training", False)
    device = next((p.device for p in model.parameters()), torch.device("cpu")) if isinstance(model, nn.Module) else torch.device("cpu")
    B, longest = len(prompts), max(map(len, prompts))
    S = longest + max_new_tokens
    limit = getattr(getattr(model, "config", None), "block_size", S)
    if S > limit:
        raise ValueError(f"a prompt of {longest} tokens and {max_new_tokens} new ones don't fit block_size {limit}")

    tokens = torch.full((B, S), eos_id, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = torch.tensor(prompt)
    tokens = tokens.to(device)
    prompt_lens = torch.tensor([len(p) for p in prompts], device=device)  # (B,)
    lens = prompt_lens.clone()  # (B,) grows by one a step for the rows that go on
    ended = torch.zeros(B, dtype=torch.bool, device=device)
    rows = torch.arange(B, device=device)  # (b,) the rows still computed; all of them at first
    slots = torch.arange(S, device=device)
    if isinstance(model, nn.Module):
        model.eval()  # dropout off
    try:
        for step in range(max_new_tokens):
            if not use_cache:
                logits = model(tokens[rows, : longest + step])[torch.arange(len(rows)), lens[rows] - 1]  # (b, V)
            elif step == 0:
                caches = [KVCache(B, S, model.config, model.wte.weight) for _ in model.h]
                hidden = model.hidden(tokens[:, :longest], caches)  # filler's keys land in slots that are overwritten before they are seen
                logits = model.lm_head(hidden[rows, lens - 1])  # (b, V) at each row's last prompt token
            else:
                positions = lens[rows] - 1  # (b,) of the token sampled last; a row that has ended rewrites its last slot
                span = S if device.type == "cuda" else longest + step  # a GPU wants constant shapes, a CPU less work
                visible = (slots[:span] <= positions[:, None])[:, None, None, :]  # (b, 1, 1, span)
                hidden = model.hidden(tokens[rows, positions][:, None], caches, positions, visible)  # (b, 1, C)
                logits = model.lm_head(hidden[:, 0])  # (b, V)
            new = sample_token(logits, temperature, top_k, top_p, generator)  # (b,)
            going = ~ended[rows]
            # lens is where the next token goes; a row that has ended writes what stands there already
            places = lens[rows].clamp(max=S - 1)
            tokens[rows, places] = torch.where(going, new, tokens[rows, places])
            lens[rows] += going.long()
            ended[rows] |= new == eos_id
            # To look at `ended` makes the CPU wait for the GPU, so there only every 8th step.
            if device.type != "cuda" or step % 8 == 7:
                going = ~ended[rows]
                alive = int(going.sum())
                if alive == 0:
                    break
                if device.type != "cuda" and alive <= len(rows) // 2:  # leave the rows that have ended behind
                    rows = rows[going]
                    for cache in caches if use_cache else []:
                        cache.k, cache.v = cache.k[going], cache.v[going]
    finally:
        if isinstance(model, nn.Module):
            model.train(training)
    longest_row = int(lens.max())
    return Rollout(tokens[:, :longest_row], prompt_lens, lens, ended)
