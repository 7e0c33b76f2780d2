"""Published weights, in and out: Hugging Face folders of GPT-2 and Llama-like models, and GGUF files (only in).

    python -m lib.weights export out/ppo FOLDER             # a policy, for AutoModelForCausalLM of transformers
    python -m lib.weights export out/reward_model FOLDER    # a reward model, for AutoModelForSequenceClassification

FOLDER gets the weights, config.json, and the tokenizer with its chat template, for AutoTokenizer. Nothing has to be
done for the way in: wherever a policy is named (sft.py --init, --policy, --policies) it may be a folder, a .gguf file
or hf: and a name on the hub. In Python the two ways are load_pretrained and save_pretrained.

Tensors get other names, and three differences of layout are resolved:
- GPT-2 stores its dense layers as (in, out), nn.Linear as (out, in);
- Llama-like models store queries, keys and values in three tensors, gate and hidden layer in two; here each group is
  one tensor;
- rotary positions turn pairs of channels. Here, as in Llama's original code and in GGUF, a pair is two neighbours.
  Hugging Face pairs channel j with channel j + D/2, so the rows of its query and key weights are in another order.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from data.files import read_json, replacing
from data.tokenizer import Tokenizer, load_tokenizer
from lib.cli import Flags, UserError, check, flag, one_line, run_main
from lib.vocabulary import PAD, open_gguf, tokenizer_files
from model import GPT, LLAMA, GPTConfig, ScalarModel

GPT2_NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
LLAMA_TYPES = ("llama", "qwen2")  # model_type in config.json; SmolLM2 is a llama
# GPT-2's layers that are stored as (in, out)
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
# Fields of config.json. One that is neither used nor in these lists is refused: it may change the computation. First
# those that don't: names, training, sampling, and ways of transformers to compute the same.
HARMLESS = set(
    """_name_or_path _commit_hash architectures model_type transformers_version transformers.js_config is_llama_config
    torch_dtype dtype use_bfloat16 torchscript tf_legacy_loss unsloth_fixed unsloth_version tokenizer_class prefix
    task_specific_params finetuning_task problem_type num_labels _num_labels id2label label2id classifier_dropout
    bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id n_ctx n_special predict_special_tokens
    max_sequence_length initializer_range attn_pdrop embd_pdrop resid_pdrop attention_dropout hidden_dropout
    summary_activation summary_first_dropout summary_proj_to_labels summary_type summary_use_proj is_decoder
    use_cache gradient_checkpointing chunk_size_feed_forward reorder_and_upcast_attn pretraining_tp max_window_layers
    attn_implementation _attn_implementation _attn_implementation_autoset output_attentions output_hidden_states
    output_past return_dict use_return_dict max_length do_sample temperature top_k top_p repetition_penalty""".split()
)
# Then those that have the only values that model.py knows, the usual one first.
FIXED = {"is_encoder_decoder": (False,), "tie_encoder_decoder": (False,), "pruned_heads": ({}, None)}
FIXED_GPT2 = {"activation_function": ("gelu_new",), "layer_norm_epsilon": (1e-5,), "tie_word_embeddings": (True,)}
FIXED_GPT2 |= {"scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,)}
FIXED_GPT2 |= {"add_cross_attention": (False,), "cross_attention_hidden_size": (None,)}
FIXED_LLAMA = {"hidden_act": ("silu",), "sliding_window": (None,), "partial_rotary_factor": (1.0, None)}
OFF = ("mlp_bias", "attention_bias", "use_sliding_window", "use_mrope", "rope_interleaved")
FIXED_LLAMA |= dict.fromkeys(OFF, (False, None))
PLAIN_ROPE = {"rope_type": ("default",), "type": ("default",), "partial_rotary_factor": (1.0, None)}
# GPTConfig's fields and their names in a published file: of a GPT-2; of a Llama, in config.json and in GGUF's metadata.
GPT2_FIELDS = {"vocab_size": "vocab_size", "block_size": "n_positions"}
GPT2_FIELDS |= {field: field for field in ("n_layer", "n_head", "n_embd")}
LLAMA_FIELDS = {
    "n_head": ("num_attention_heads", "attention.head_count"),
    "block_size": ("max_position_embeddings", "context_length"),
    "n_layer": ("num_hidden_layers", "block_count"),
    "n_kv_head": ("num_key_value_heads", "attention.head_count_kv"),
    "n_embd": ("hidden_size", "embedding_length"),
    "n_inner": ("intermediate_size", "feed_forward_length"),
    "norm_eps": ("rms_norm_eps", "attention.layer_norm_rms_epsilon"),
    "rope_base": ("rope_theta", "rope.freq_base"),
}
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
    wanted.append("chat_template.jinja")
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
        config, weights = config_of(read_json(path / "config.json"), path / "config.json"), folder_weights(path)
        state = from_llama(weights, config) if config.rope_base else from_gpt2(weights)
    if block_size > config.block_size:
        raise ValueError(f"block_size {block_size}: {name} has {config.block_size} positions")
    config.block_size, config.dropout = block_size or config.block_size, dropout
    if "wpe.weight" in state:
        state["wpe.weight"] = state["wpe.weight"][: config.block_size]
    model = GPT(config)
    for key in misfits(model, state)[:1]:
        here, there = (tuple(p[key].shape) if key in p else "missing" for p in (state, model.state_dict()))
        raise ValueError(f"{path}: {key} is {here} in the file and {there} in the network that its fields tell of")
    model.load_state_dict(state)
    return model


def misfits(model: GPT, state: dict[str, Tensor]) -> list[str]:
    """The names of all tensors that either lacks, or that have another shape."""
    wanted = {name: value.shape for name, value in model.state_dict().items()}
    found = {name: value.shape for name, value in state.items()}
    return sorted(name for name in wanted | found if wanted.get(name) != found.get(name))


def folder_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a Hugging Face folder, in float32. UserError names a file that is missing or damaged."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        files = sorted(set(read_json(index)["weight_map"].values()))
    else:
        files = ["model.safetensors" if (folder / "model.safetensors").exists() else "pytorch_model.bin"]
    weights = {}
    for file in (folder / name for name in files):
        check(file.exists(), f"{file}: no such file")
        try:
            old = file.suffix == ".bin"
            part = torch.load(file, map_location="cpu", weights_only=True) if old else load_file(file)
            part = {name: value.float() for name, value in part.items()}
        except Exception as error:  # of many kinds, from two packages
            raise UserError(f"{file}: can't be read ({one_line(error)})") from None
        check_finite(part, file)
        weights |= part
    return weights


def check_finite(weights: dict[str, Tensor], file: Path) -> None:
    """UserError names a tensor that holds nan or inf: all that is computed with it would be nan."""
    for name, value in weights.items():
        check(bool(value.isfinite().all()), f"{file}: {name} holds values that are not finite (nan or inf)")


def check_fields(shape: dict, used: set[str], fixed: dict[str, tuple], path: Path | str) -> None:
    """UserError names a field that has another value than the fixed ones, or that is not known."""
    for key, value in shape.items():
        if key in fixed:
            check(value in fixed[key], f"{path}: {key} is {value!r}; this model has {fixed[key][0]!r}")
        elif key not in used | HARMLESS:
            raise UserError(f"{path}: {key} is not known here, so it may change the computation (its value: {value!r})")


def config_of(shape: dict, path: Path) -> GPTConfig:
    """The network that a config.json tells of. UserError if it is not known here."""
    kind = shape.get("model_type", "gpt2")
    known = ("gpt2", *LLAMA_TYPES)
    check(kind in known, f"{path}: model_type is {kind!r}; known are {', '.join(known)}")
    return gpt2_config(shape, path) if kind == "gpt2" else llama_config(shape, path)


# -------------------------------------------------------------------------------- GPT-2


def gpt2_config(shape: dict, path: Path) -> GPTConfig:
    fixed = FIXED | FIXED_GPT2 | {"n_inner": (None, 4 * shape["n_embd"])}
    check_fields(shape, set(GPT2_FIELDS.values()), fixed, path)
    return GPTConfig(**{own: shape[there] for own, there in GPT2_FIELDS.items()})


def gpt2_json(c: GPTConfig) -> dict:
    config = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_inner": None, "n_ctx": c.block_size}
    config |= {key: values[0] for key, values in FIXED_GPT2.items()}
    config |= {there: getattr(c, own) for own, there in GPT2_FIELDS.items()}
    return config | {"resid_pdrop": c.dropout, "embd_pdrop": c.dropout, "attn_pdrop": c.dropout}


def from_gpt2(weights: dict[str, Tensor]) -> dict[str, Tensor]:
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
    C, H, qwen = shape["hidden_size"], shape["num_attention_heads"], shape["model_type"] == "qwen2"
    layers = ["full_attention"] * shape["num_hidden_layers"]
    fixed = FIXED | FIXED_LLAMA | {"head_dim": (C // H, None), "layer_types": (layers, None)}
    names = {own: there for own, (there, _) in LLAMA_FIELDS.items()}
    used = {"vocab_size", "tie_word_embeddings", "rope_parameters", "rope_scaling", *names.values()}
    if qwen:  # it has its biases whatever is said of them, and no window unless use_sliding_window
        used |= {"attention_bias", "sliding_window"}
    check_fields(shape, used, {k: v for k, v in fixed.items() if k not in used}, path)
    shape = shape | {"rope_theta": plain_rope_base(shape, path)}
    shape["num_key_value_heads"] = shape.get("num_key_value_heads") or H
    return GPTConfig(
        shape["vocab_size"],
        **LLAMA | {"bias": "qkv" if qwen else "none"},
        **{own: shape[there] for own, there in names.items()},
        tied=shape.get("tie_word_embeddings", False),
    )


def plain_rope_base(shape: dict, path: Path) -> float:
    """The base of plain rotary positions, which may stand in several places of config.json. UserError if any of them
    says that the positions are not plain, or if two differ."""
    bases = [shape.get("rope_theta")]
    for place in ("rope_parameters", "rope_scaling"):  # since transformers 5, and before it
        rope = shape.get(place) or {}
        check_fields(rope, {"rope_theta"}, PLAIN_ROPE, f"{path}: {place}")
        bases.append(rope.get("rope_theta"))
    found = {float(base) for base in bases if base is not None}
    check(len(found) < 2, f"{path}: rope_theta is {' and '.join(map(str, sorted(found)))}, in two places")
    return found.pop() if found else 10000.0


def llama_json(c: GPTConfig) -> dict:
    kind = "qwen2" if c.bias == "qkv" else "llama"
    config = {"model_type": kind, "architectures": [f"{kind.capitalize()}ForCausalLM"], "hidden_act": "silu"}
    config |= {there: getattr(c, own) for own, (there, _) in LLAMA_FIELDS.items()}
    config |= {"rope_parameters": {"rope_type": "default", "rope_theta": c.rope_base}, "tie_word_embeddings": c.tied}
    return config | {"vocab_size": c.vocab_size, "attention_dropout": c.dropout}


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
    """Published tensors -> ours. paired: in them the channels that are turned together are D/2 apart. What is missing
    or left over stays so."""
    state = {name: value for name, value in weights.items() if not name.endswith("rotary_emb.inv_freq")}
    if config.tied:  # old files hold the output layer once more
        state.pop("output.weight" if gguf else "lm_head.weight", None)
    for own, parts in llama_names(config, gguf).items():
        if state.keys() >= set(parts):
            values = [state.pop(part) for part in parts]
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
    reader = open_gguf(path)
    from gguf.quants import dequantize

    kind = reader.get_field("general.architecture").contents()
    check(kind in LLAMA_TYPES, f"{path}: general.architecture is {kind!r}; known are {', '.join(LLAMA_TYPES)}")
    told = {k.removeprefix(f"{kind}."): v.contents() for k, v in reader.fields.items() if k.startswith(f"{kind}.")}
    names = {here: there for there, here in LLAMA_FIELDS.values()}
    D = told["embedding_length"] // told["attention.head_count"]
    fixed = {"rope.dimension_count": (D,), "attention.key_length": (D,), "attention.value_length": (D,)}
    fixed |= {"rope.scaling.type": ("none",), "expert_count": (0,), "expert_used_count": (0,)}
    check_fields(told, {*names, "vocab_size", "tensor_data_layout", "rope.scaling.finetuned"}, fixed, path)

    weights = {}
    for tensor in reader.tensors:
        weights[tensor.name] = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy()).float()
    check_finite(weights, path)
    stretched = weights.pop("rope_freqs.weight", torch.ones(1))  # Llama 3.1's, by which the angles are divided
    check(bool((stretched == 1).all()), f"{path}: rope_freqs.weight is not 1; this model has plain rotary positions")
    shape = {names[key]: value for key, value in told.items() if key in names}  # as config.json has it
    shape["rms_norm_eps"] = float(f"{shape['rms_norm_eps']:.6g}")  # kept in float32: 1e-5 is 9.99999975e-06
    shape |= {"model_type": kind, "vocab_size": len(weights["token_embd.weight"])}
    config = config_of(shape | {"tie_word_embeddings": "output.weight" not in weights}, path)
    # in GGUF's llama files neighbours are turned together, as here; in its qwen2 files channels that are D/2 apart
    return config, from_llama(weights, config, gguf=True, paired=kind == "qwen2")


# -------------------------------------------------------------------------------- out


def save_pretrained(model: GPT | ScalarModel, folder: str | Path, tokenizer: Tokenizer | None = None) -> float:
    """Write config.json and model.safetensors in Hugging Face's layout of GPT-2, Llama or Qwen2; with a tokenizer also
    its files, and in config.json which tokens begin, end and pad a text.

    A reward model becomes ...ForSequenceClassification with one label. Its head there has no bias. GPT-2's final norm
    has one, which takes the constant. Llama's has none, so there the scores differ from ours by a constant, which no
    ranking determines: config.json keeps it as "reward_shift", to be added. It is returned (0 if there is none).

    UserError for a network that none of these layouts can hold."""
    scalar = isinstance(model, ScalarModel)
    gpt, folder, shift = model.gpt if scalar else model, Path(folder), 0.0
    c = replace(gpt.config, vocab_size=gpt.config.real_vocab or gpt.config.vocab_size)
    state = {name: value.detach().cpu().float() for name, value in gpt.state_dict().items()}
    for name in {"wte.weight", "unembedding.weight"} & state.keys():  # rows that are no tokens are left out
        state[name] = state[name][: c.vocab_size]  # (V, C)
    llama = c.rope_base > 0  # the layout that may hold it; else GPT-2's
    config = llama_json(c) if llama else gpt2_json(c)
    check_exportable(model, state, config_of(config, folder))
    if tokenizer is not None:
        # A policy's batches may be padded with EOS: what stands behind it is not read. A reward model is read at the
        # last token that is no padding, which is an EOS as often as not. So its padding is a token of its own.
        special = tokenizer.description()["special"]
        pad = special.get(PAD, c.vocab_size) if scalar else tokenizer.eos_id
        bos = special[tokenizer.first[0]] if tokenizer.first else None
        config |= {"bos_token_id": bos, "eos_token_id": tokenizer.eos_id, "pad_token_id": pad}
        if pad == c.vocab_size:
            state["wte.weight"] = F.pad(state["wte.weight"], (0, 0, 0, 1))  # (V + 1, C)
            config["vocab_size"] += 1
    if scalar:
        head = (model.head.weight / model.std).detach().cpu().float()  # (1, C)
        shift = ((model.head.bias - model.mean) / model.std).item()
        if not llama:
            state["ln_f.bias"], shift = state["ln_f.bias"] + shift * head[0] / head.square().sum(), 0.0
        name = config["architectures"][0].replace("ForCausalLM", "").replace("LMHeadModel", "")
        config |= {"architectures": [f"{name}ForSequenceClassification"], "num_labels": 1, "id2label": {"0": "reward"}}
        config |= {"reward_shift": shift} if llama else {}
    weights = to_llama(state, c) if llama else to_gpt2(state)
    if scalar:
        weights.pop("lm_head.weight", None)
        weights["score.weight"] = head
    files = {"config.json": config}
    if tokenizer is not None:
        files |= tokenizer_files(tokenizer, c.block_size, pad, "right" if scalar else "left")
        if not scalar:
            files["generation_config.json"] = {k: v for k, v in config.items() if k.endswith("_token_id")}
    for name, content in files.items():
        with replacing(folder / name) as temporary:
            temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    with replacing(folder / "model.safetensors") as temporary:
        save_file({name: value.contiguous().clone() for name, value in weights.items()}, temporary, {"format": "pt"})
    return shift


def check_exportable(model: GPT | ScalarModel, state: dict[str, Tensor], told: GPTConfig) -> None:
    """UserError unless the network that config.json tells of has these parameters and this epsilon."""
    with torch.device("meta"):
        changed = misfits(GPT(told), state)
    if isinstance(model, ScalarModel):  # between the GPT and the head there must be nothing
        changed += [name for name in model.state_dict() if not name.startswith(("gpt.", "head.", "mean", "std"))]
    changed += ["norm_eps"] if told.norm_eps != model.config.norm_eps else []
    possible = "those of `sft.py --rope_base 0` (GPT-2's block, learned positions) or `sft.py --block llama` can be"
    possible += ", and the reward models of `reward_model.py --expectation no`"
    check(not changed, f"can't be exported, no published layout has its {', '.join(changed[:3])}; {possible}")


# -------------------------------------------------------------------------------- the command

EXPORTED = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}


@dataclass
class Config(Flags):
    words: list[str] = flag([], "export, a checkpoint, and the folder to write", positional=True)


def run(config: Config) -> dict:
    from lib.checkpoint import load_model  # it imports this file

    usage = "say `python -m lib.weights export CHECKPOINT FOLDER`; --help tells more"
    check(len(config.words) == 3 and config.words[0] == "export", usage)
    _, source, folder = config.words
    others = sorted({path.name for path in Path(folder).glob("*")} - EXPORTED)
    check(not others, f"{folder}: holds other files too ({', '.join(others[:3])}); name a folder of its own")
    model, vocabulary, _ = load_model(source, torch.device("cpu"), kind="any")
    tokenizer = load_tokenizer(vocabulary)
    shift = save_pretrained(model, folder, tokenizer)
    name = "SequenceClassification" if isinstance(model, ScalarModel) else "CausalLM"
    print(f"wrote {folder}: for AutoModelFor{name} and AutoTokenizer; prompts by tokenizer.apply_chat_template")
    if shift:
        print(f"NOTE: add {shift:.6f} to its scores: this layout has no place for it (reward_shift in config.json)")
    return {}


if __name__ == "__main__":
    run_main(run, Config, __doc__)
