"""Published weights in and out: Hugging Face's layout of GPT-2, on the safetensors package.

from weights import load_pretrained, save_pretrained
model = load_pretrained("gpt2")            # or "gpt2-medium", ..., or a folder with config.json and model.safetensors
save_pretrained(model, "out/exported")     # what other tools read
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from model import GPT, GPTConfig

# layers, heads, channels
GPT2_SIZES = {
    "gpt2": (12, 12, 768),
    "gpt2-medium": (24, 16, 1024),
    "gpt2-large": (36, 20, 1280),
    "gpt2-xl": (48, 25, 1600),
}
GPT2_URL = "https://huggingface.co/openai-community/{}/resolve/main/pytorch_model.bin"
# GPT-2 stores its dense layers as (in, out), nn.Linear as (out, in)
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
# What model.py takes for granted, under the names of Hugging Face's config.json. An n_inner of null means 4 * n_embd.
FIXED = {"activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "n_inner": None, "tie_word_embeddings": True}


def load_pretrained(name: str | Path, dropout: float = 0.0, block_size: int = 0) -> GPT:
    """A GPT with the weights of `name`: "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl" (downloaded once by torch.hub),
    or a folder in Hugging Face's layout, config.json with model.safetensors or pytorch_model.bin.

    Raises ValueError for a name or a configuration that this project's network doesn't have, OSError for a missing
    file."""
    folder = Path(name)
    if folder.is_dir():
        config = read_config(folder / "config.json", dropout)
        if (folder / "model.safetensors").exists():
            weights = load_file(folder / "model.safetensors")
        else:
            weights = torch.load(folder / "pytorch_model.bin", map_location="cpu", weights_only=True)
    elif name in GPT2_SIZES:
        config = GPTConfig(50257, 1024, *GPT2_SIZES[name], dropout=dropout)
        weights = torch.hub.load_state_dict_from_url(
            GPT2_URL.format(name), map_location="cpu", weights_only=True, file_name=f"{name}.bin"
        )
    else:
        raise ValueError(f"{name!r} is neither a directory nor one of {', '.join(GPT2_SIZES)}")
    if block_size > config.block_size:
        raise ValueError(f"block_size {block_size}: {name} has {config.block_size} positions")
    config.block_size = block_size or config.block_size
    model = GPT(config)
    state = {}
    for key, value in weights.items():
        key = key.removeprefix("transformer.")
        if key == "lm_head.weight" or key.endswith((".attn.bias", ".attn.masked_bias")):
            continue  # the output layer is tied to wte; causal masks were kept as buffers
        state[key] = value.float().t().contiguous() if key.endswith(TRANSPOSED) else value.float()
    state["wpe.weight"] = state["wpe.weight"][: config.block_size]
    model.load_state_dict(state)
    return model


def read_config(path: Path, dropout: float) -> GPTConfig:
    """Hugging Face's config.json of a GPT-2 -> GPTConfig."""
    shape = json.loads(path.read_text(encoding="utf-8"))
    for key, value in FIXED.items():
        found = shape.get(key, value)
        if found != value and not (key == "n_inner" and found == 4 * shape["n_embd"]):
            raise ValueError(f"{path}: {key} is {found!r}; this model has {value!r}")
    sizes = [shape[k] for k in ("vocab_size", "n_positions", "n_layer", "n_head", "n_embd")]
    return GPTConfig(*sizes, dropout=dropout)


def save_pretrained(model: GPT, folder: str | Path) -> None:
    """Write config.json and model.safetensors in Hugging Face's GPT-2 layout."""
    folder, c = Path(folder), model.config
    block = ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
    layers = [f"h.{i}.{name}" for i in range(c.n_layer) for name in block] + ["ln_f"]
    gpt2 = {"wte.weight", "wpe.weight", *(f"{name}.{kind}" for name in layers for kind in ("weight", "bias"))}
    if set(model.state_dict()) != gpt2:  # a network that somebody has changed must not be passed off as GPT-2
        changed = ", ".join(sorted(gpt2 ^ set(model.state_dict()))[:3])
        raise ValueError(f"this network's parameters are not GPT-2's ({changed}, ...), so its layout can't hold them")
    folder.mkdir(parents=True, exist_ok=True)
    vocab_size = c.real_vocab or c.vocab_size  # rows that are no tokens are left behind
    config = {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        **FIXED,
        "vocab_size": vocab_size,
        "n_positions": c.block_size,
        "n_ctx": c.block_size,
        "n_layer": c.n_layer,
        "n_head": c.n_head,
        "n_embd": c.n_embd,
        "resid_pdrop": c.dropout,
        "embd_pdrop": c.dropout,
        "attn_pdrop": c.dropout,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    weights = {}
    for key, value in model.state_dict().items():
        value = value.t() if key.endswith(TRANSPOSED) else value
        value = value[:vocab_size] if key == "wte.weight" else value
        weights[f"transformer.{key}"] = value.detach().cpu().float().contiguous()
    temporary = folder / "model.safetensors.tmp"
    save_file(weights, temporary, metadata={"format": "pt"})
    os.replace(temporary, folder / "model.safetensors")
