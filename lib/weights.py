"""Loads and saves published weights: Hugging Face folders of GPT-2 and Llama-like models, and GGUF files (only loaded).

from lib.weights import load_pretrained, save_pretrained
model = load_pretrained("SmolLM2-135M.gguf")   # or a folder with config.json and *.safetensors, or a name on the hub
save_pretrained(model, "out/exported")         # for other tools

Tensors get other names, and three differences of layout are resolved:
- GPT-2 stores its dense layers as (in, out), nn.Linear as (out, in);
- Llama-like models store queries, keys and values in three tensors, gate and hidden layer in two; here each group is
  one tensor;
- rotary positions turn pairs of channels. Here, as in Llama's original code and in GGUF, a pair is two neighbours.
  Hugging Face pairs channel j with channel j + D/2, so the rows of its query and key weights are in another order.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from data.files import replacing
from model import GPT, GPTConfig, ScalarModel

GPT2_NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
LLAMA_TYPES = ("llama", "qwen2")  # model_type in config.json; SmolLM2 is a llama
# GPT-2's layers that are stored as (in, out)
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
# The only values that model.py has for these entries of Hugging Face's config.json. An n_inner of null is 4 * n_embd.
FIXED = {"activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "n_inner": None, "tie_word_embeddings": True}
FIXED_LLAMA = {"hidden_act": "silu", "mlp_bias": False, "use_sliding_window": False, "partial_rotary_factor": 1.0}
# The parts of a Llama-like model: {our name: (Hugging Face's name, GGUF's name)}, outside of the blocks and inside. Of
# several names the tensors are joined here, row after row.
OUTSIDE = {
    "wte": ("model.embed_tokens", "token_embd"),
    "ln_f": ("model.norm", "output_norm"),
    "unembedding": ("lm_head", "output"),
}
INSIDE = {
    "ln_1": (["input_layernorm"], ["attn_norm"]),
    "attn.c_attn": (["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["attn_q", "attn_k", "attn_v"]),
    "attn.c_proj": (["self_attn.o_proj"], ["attn_output"]),
    "ln_2": (["post_attention_layernorm"], ["ffn_norm"]),
    "mlp.c_fc": (["mlp.gate_proj", "mlp.up_proj"], ["ffn_gate", "ffn_up"]),
    "mlp.c_proj": (["mlp.down_proj"], ["ffn_down"]),
}


def local_path(name: str | Path) -> Path:
    """The path of a folder, of a file, or of a download from the Hugging Face hub: any other name, with or without
    "hf:" before it. The package huggingface_hub downloads a model once, checks it and keeps it. ValueError if it
    can't."""
    name = str(name).removeprefix("hf:")
    path = Path(name)
    if path.exists():
        return path
    known = f"{name!r} is no folder, no .gguf file and none of {', '.join(GPT2_NAMES)} or another hub name"
    if path.suffix or len(path.parts) > 2 or not (name in GPT2_NAMES or len(path.parts) == 2):
        raise ValueError(known)
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ValueError(f"{known} (those need `pip install huggingface_hub`)") from None
    wanted = ["config.json", "*.safetensors", "*.safetensors.index.json", "tokenizer*", "vocab.json", "merges.txt"]
    repository = f"openai-community/{name}" if name in GPT2_NAMES else name
    try:
        return Path(snapshot_download(repository, allow_patterns=wanted))
    except Exception as error:  # many kinds, from several packages: no network, no such model, no access
        raise ValueError(f"{known} ({type(error).__name__} while downloading {repository})") from None


def load_pretrained(name: str | Path, dropout: float = 0.0, block_size: int = 0) -> GPT:
    """A GPT with published weights, in float32. name: a folder in Hugging Face's layout (config.json with safetensors,
    in one file or several, or pytorch_model.bin) of a GPT-2, Llama (SmolLM2, ...) or Qwen2; a .gguf file of a Llama or
    Qwen2; or a name on the hub. block_size: fewer positions than the model has (0: all).

    Raises ValueError for an unknown name, for a network that this project doesn't have, and for weights that don't fit
    (with the name of the tensor); OSError for a missing file."""
    path = local_path(name)
    if path.suffix == ".gguf":
        config, state = from_gguf(path)
    else:
        shape = json.loads((path / "config.json").read_text(encoding="utf-8"))
        kind = shape.get("model_type", "gpt2")
        if kind != "gpt2" and kind not in LLAMA_TYPES:
            raise ValueError(f"{path}/config.json: model_type is {kind!r}; known are gpt2, {', '.join(LLAMA_TYPES)}")
        read = (gpt2_config, from_gpt2) if kind == "gpt2" else (llama_config, from_llama)
        config = read[0](shape, path / "config.json")
        state = read[1](folder_weights(path), config)
    if block_size > config.block_size:
        raise ValueError(f"block_size {block_size}: {name} has {config.block_size} positions")
    config.block_size, config.dropout = block_size or config.block_size, dropout
    if "wpe.weight" in state:
        state["wpe.weight"] = state["wpe.weight"][: config.block_size]
    model = GPT(config)
    fill(model, state, path)
    return model


def fill(model: GPT, state: dict[str, Tensor], path: Path) -> None:
    """Load the weights. ValueError names a tensor that is missing, left over, or of another shape."""
    wanted = {name: tuple(p.shape) for name, p in model.state_dict().items()}
    found = {name: tuple(p.shape) for name, p in state.items()}
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            here, there = found.get(name, "missing"), wanted.get(name, "not a part of this network")
            raise ValueError(f"{path}: {name} is {here} in the file; config.json says {there}")
    model.load_state_dict(state)


def folder_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a Hugging Face folder, in float32."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        parts = [load_file(folder / file) for file in files]
    elif (folder / "model.safetensors").exists():
        parts = [load_file(folder / "model.safetensors")]
    else:
        parts = [torch.load(folder / "pytorch_model.bin", map_location="cpu", weights_only=True)]
    return {name: value.float() for part in parts for name, value in part.items()}


def check_fixed(shape: dict, fixed: dict, path: Path, n_inner: int) -> None:
    """ValueError if config.json has another value than one of the fixed ones."""
    for key, value in fixed.items():
        found = shape.get(key, value)
        if found != value and not (key == "n_inner" and found == n_inner):
            raise ValueError(f"{path}: {key} is {found!r}; this model has {value!r}")


# -------------------------------------------------------------------------------- GPT-2


def gpt2_config(shape: dict, path: Path) -> GPTConfig:
    """The shape of a GPT-2, from its config.json."""
    check_fixed(shape, FIXED, path, 4 * shape["n_embd"])
    return GPTConfig(*(shape[k] for k in ("vocab_size", "n_positions", "n_layer", "n_head", "n_embd")))


def from_gpt2(weights: dict[str, Tensor], config: GPTConfig) -> dict[str, Tensor]:
    state = {}
    for key, value in weights.items():
        key = key.removeprefix("transformer.")
        if key == "lm_head.weight" or key.endswith((".attn.bias", ".attn.masked_bias")):
            continue  # the output layer is wte; old files also hold the causal masks
        state[key] = value.t().contiguous() if key.endswith(TRANSPOSED) else value
    return state


def to_gpt2(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"transformer.{key}": value.t() if key.endswith(TRANSPOSED) else value for key, value in state.items()}


# -------------------------------------------------------------------------------- Llama and its like


def llama_config(shape: dict, path: Path) -> GPTConfig:
    """The shape of a Llama or Qwen2, from its config.json."""
    C, H, qwen = shape["hidden_size"], shape["num_attention_heads"], shape["model_type"] == "qwen2"
    rope = shape.get("rope_parameters") or shape.get("rope_scaling") or {}  # since transformers 5, and before it
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise ValueError(f"{path}: rotary positions of type {kind!r}; this model has the plain ones")
    head_dim = {"head_dim": C // H}
    check_fixed(shape, FIXED_LLAMA | ({} if shape.get("head_dim") is None else head_dim), path, 0)
    if not qwen and shape.get("attention_bias"):
        raise ValueError(f"{path}: attention_bias is True; this model has such biases in Qwen2's places only")
    return GPTConfig(
        *(shape[k] for k in ("vocab_size", "max_position_embeddings", "num_hidden_layers")),
        n_head=H,
        n_embd=C,
        rope_base=float(rope.get("rope_theta", shape.get("rope_theta", 10000.0))),
        norm="rms",
        norm_eps=shape["rms_norm_eps"],
        n_kv_head=shape.get("num_key_value_heads") or H,
        mlp="swiglu",
        n_inner=shape["intermediate_size"],
        bias="qkv" if qwen else "none",
        tied=shape.get("tie_word_embeddings", False),
    )


def neighbours(rows: Tensor, n_head: int) -> Tensor:
    """Query or key weights (or biases), from Hugging Face's order of rows to ours, (n_head * D, ...): the rows j and
    j + D/2 of each head, which are turned together, become neighbours."""
    return rows.unflatten(0, (n_head, 2, -1)).transpose(1, 2).flatten(0, 2)


def halves(rows: Tensor, n_head: int) -> Tensor:
    """The inverse of `neighbours`."""
    return rows.unflatten(0, (n_head, -1, 2)).transpose(1, 2).flatten(0, 2)


def llama_names(config: GPTConfig, gguf: bool) -> dict[str, list[str]]:
    """{our name of a tensor: the published names of its parts}"""
    names = {f"{own}.weight": [f"{there[gguf]}.weight"] for own, there in OUTSIDE.items()}
    if config.tied:
        del names["unembedding.weight"]
    for i in range(config.n_layer):
        prefix = f"blk.{i}" if gguf else f"model.layers.{i}"
        for own, there in INSIDE.items():
            for kind in ("weight", "bias") if own == "attn.c_attn" and config.bias == "qkv" else ("weight",):
                names[f"h.{i}.{own}.{kind}"] = [f"{prefix}.{part}.{kind}" for part in there[gguf]]
    return names


def from_llama(weights: dict[str, Tensor], config: GPTConfig, gguf: bool = False, paired: bool = True) -> dict:
    """Published tensors -> ours. paired: in them the channels that are turned together are D/2 apart."""
    names, state = llama_names(config, gguf), {}
    known = {part for parts in names.values() for part in parts}
    known |= {"lm_head.weight", "output.weight"}  # written out although tied
    left = {
        key for key in weights if key not in known and not key.endswith(("rotary_emb.inv_freq", "rope_freqs.weight"))
    }
    if left:
        raise ValueError(f"{min(left)} is not a part of a Llama-like network as this project has it")
    for own, parts in names.items():
        missing = [part for part in parts if part not in weights]
        if missing:
            raise ValueError(f"{missing[0]} is missing")
        values = [weights[part] for part in parts]
        if "c_attn" in own and paired:
            values[:2] = neighbours(values[0], config.n_head), neighbours(values[1], config.n_kv_head)
        state[own] = torch.cat(values) if len(values) > 1 else values[0]
    return state


def to_llama(state: dict[str, Tensor], config: GPTConfig) -> dict[str, Tensor]:
    D, weights = config.n_embd // config.n_head, {}
    widths = {"c_attn": [config.n_head * D, config.n_kv_head * D, config.n_kv_head * D], "c_fc": [config.n_inner] * 2}
    for own, parts in llama_names(config, gguf=False).items():
        layer = own.split(".")[-2]
        values = list(state[own].split(widths[layer])) if len(parts) > 1 else [state[own]]
        if layer == "c_attn":
            values[:2] = halves(values[0], config.n_head), halves(values[1], config.n_kv_head)
        weights |= dict(zip(parts, values, strict=True))
    return weights


def from_gguf(path: Path) -> tuple[GPTConfig, dict[str, Tensor]]:
    """The configuration and the weights, in float32, of a .gguf file of a Llama or Qwen2, quantised or not."""
    try:
        from gguf import GGUFReader
        from gguf.quants import dequantize
    except ImportError:
        raise ValueError(f"{path}: reading GGUF files needs `pip install gguf`") from None
    reader = GGUFReader(path)
    kind = reader.get_field("general.architecture").contents()
    if kind not in LLAMA_TYPES:
        raise ValueError(f"{path}: general.architecture is {kind!r}; known are {', '.join(LLAMA_TYPES)}")

    def entry(key: str, default=None):
        """A field of the file's metadata."""
        field = reader.get_field(f"{kind}.{key}")
        if field is None and default is None:
            raise ValueError(f"{path}: no {kind}.{key}")
        return default if field is None else field.contents()

    if entry("rope.scaling.type", "none") != "none":
        raise ValueError(f"{path}: {kind}.rope.scaling.type is {entry('rope.scaling.type')!r}; this model has none")
    weights = {}
    for tensor in reader.tensors:
        weights[tensor.name] = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy()).float()
    H, C = entry("attention.head_count"), entry("embedding_length")
    config = GPTConfig(
        len(weights["token_embd.weight"]),
        entry("context_length"),
        entry("block_count"),
        n_head=H,
        n_embd=C,
        rope_base=float(entry("rope.freq_base", 10000.0)),
        norm="rms",
        norm_eps=float(f"{entry('attention.layer_norm_rms_epsilon'):.6g}"),  # kept in float32: 1e-5 is 9.99999975e-06
        n_kv_head=entry("attention.head_count_kv", H),
        mlp="swiglu",
        n_inner=entry("feed_forward_length"),
        bias="qkv" if kind == "qwen2" else "none",
        tied="output.weight" not in weights,
    )
    # in GGUF's llama files neighbours are turned together, as here; in its qwen2 files channels that are D/2 apart
    return config, from_llama(weights, config, gguf=True, paired=kind == "qwen2")


# -------------------------------------------------------------------------------- out


def save_pretrained(model: GPT | ScalarModel, folder: str | Path) -> None:
    """Write config.json and model.safetensors in Hugging Face's layout of GPT-2, Llama or Qwen2.

    A reward model becomes ...ForSequenceClassification with one label. Its head there has no bias, so the scores differ
    from ours by a constant, which no ranking determines; config.json keeps it as "reward_shift", to be added.

    Raises ValueError for a network that none of these layouts can hold."""
    gpt = model.gpt if isinstance(model, ScalarModel) else model
    folder, c, state = Path(folder), gpt.config, dict(gpt.state_dict())
    if getattr(model, "expectation", False):
        raise ValueError("a reward model with --expectation has no published layout")
    llama = c.norm == "rms" and c.mlp == "swiglu" and bool(c.rope_base) and c.bias != "all"
    if not llama:
        state = check_gpt2(state, c)
    vocab_size = c.real_vocab or c.vocab_size  # rows that are no tokens are left out
    for name in ("wte.weight", "unembedding.weight"):
        if name in state:
            state[name] = state[name][:vocab_size]
    weights = to_llama(state, c) if llama else to_gpt2(state)
    config = (llama_json if llama else gpt2_json)(c, vocab_size)
    if isinstance(model, ScalarModel):
        weights.pop("lm_head.weight", None)
        weights["score.weight"] = model.head.weight / model.std
        name = config["architectures"][0].replace("ForCausalLM", "").replace("LMHeadModel", "")
        config |= {"architectures": [f"{name}ForSequenceClassification"], "num_labels": 1, "id2label": {"0": "reward"}}
        config["reward_shift"] = ((model.head.bias - model.mean) / model.std).item()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    plain = {name: value.detach().cpu().float().contiguous().clone() for name, value in weights.items()}
    with replacing(folder / "model.safetensors") as temporary:
        save_file(plain, temporary, metadata={"format": "pt"})


def check_gpt2(state: dict[str, Tensor], c: GPTConfig) -> dict[str, Tensor]:
    """The weights, if the network is GPT-2's. ValueError if somebody has changed it."""
    block = ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
    layers = [f"h.{i}.{name}" for i in range(c.n_layer) for name in block] + ["ln_f"]
    gpt2 = {"wte.weight", "wpe.weight", *(f"{name}.{kind}" for name in layers for kind in ("weight", "bias"))}
    if set(state) != gpt2 or c.n_kv_head != c.n_head or c.n_inner != 4 * c.n_embd or c.norm_eps != 1e-5:
        changed = ", ".join(sorted(gpt2 ^ set(state))[:3]) or "their sizes or norm_eps"
        raise ValueError(f"this network's parameters are not GPT-2's ({changed}, ...), so its layout can't hold them")
    return state


def gpt2_json(c: GPTConfig, vocab_size: int) -> dict:
    sizes = {"vocab_size": vocab_size, "n_positions": c.block_size, "n_ctx": c.block_size}
    sizes |= {"n_layer": c.n_layer, "n_head": c.n_head, "n_embd": c.n_embd}
    dropout = {"resid_pdrop": c.dropout, "embd_pdrop": c.dropout, "attn_pdrop": c.dropout}
    return {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], **FIXED, **sizes, **dropout}


def llama_json(c: GPTConfig, vocab_size: int) -> dict:
    kind = "qwen2" if c.bias == "qkv" else "llama"
    return {
        "model_type": kind,
        "architectures": [f"{kind.capitalize()}ForCausalLM"],
        "hidden_act": "silu",
        "vocab_size": vocab_size,
        "max_position_embeddings": c.block_size,
        "num_hidden_layers": c.n_layer,
        "num_attention_heads": c.n_head,
        "num_key_value_heads": c.n_kv_head,
        "hidden_size": c.n_embd,
        "intermediate_size": c.n_inner,
        "rms_norm_eps": c.norm_eps,
        "rope_theta": c.rope_base,
        "rope_parameters": {"rope_type": "default", "rope_theta": c.rope_base},
        "attention_dropout": c.dropout,
        "tie_word_embeddings": c.tied,
    }
