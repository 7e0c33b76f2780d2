"""lib/weights.py: GPT-2's and Llama's published layouts, read and written: against the format itself, parsed by hand,
against Llama by loops, and against transformers where it is installed."""

from __future__ import annotations

import json
import math
import struct
import sys
import types
from itertools import pairwise

import pytest
import torch
from helpers import gguf_package, make_gpt
from safetensors.torch import load_file, save_file
from torch import nn

import lib.checkpoint
from lib import weights
from lib.cli import UserError
from model import GPT, GPTConfig, KVCache, ScalarModel
from sampling import decode_one_token, generate, prefill
from lib.weights import load_pretrained, save_pretrained

V = 23  # make_gpt's vocabulary


def random_tokens(B: int = 3, T: int = 20) -> torch.Tensor:
    return torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(0))


def read_safetensors_by_hand(path) -> tuple[dict, dict[str, torch.Tensor]]:
    """The published format, parsed here by itself: u64 header length, JSON header, raw little-endian data."""
    data = path.read_bytes()
    (n,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + n])
    spans = sorted(e["data_offsets"] for name, e in header.items() if name != "__metadata__")
    assert spans[0][0] == 0 and spans[-1][1] == len(data) - 8 - n
    assert all(a[1] == b[0] for a, b in pairwise(spans)), "the format allows no holes"
    tensors = {}
    for name, e in header.items():
        if name != "__metadata__":
            assert e["dtype"] == "F32"
            raw = data[8 + n + e["data_offsets"][0] : 8 + n + e["data_offsets"][1]]
            tensors[name] = torch.tensor(struct.unpack(f"<{len(raw) // 4}f", raw)).view(e["shape"])
    return header, tensors


def test_save_pretrained_writes_hugging_faces_layout(tmp_path):
    """config.json's keys, "transformer." names, dense weights transposed to (in, out),
    padded header: read without our own reader."""
    model = make_gpt(seed=7, n_embd=20, dropout=0.25)
    save_pretrained(model, tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text(encoding="utf-8"))
    expected = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "tie_word_embeddings": True}
    expected |= {"vocab_size": V, "n_positions": 48, "n_layer": 2, "n_head": 4, "n_embd": 20}
    expected |= {"activation_function": "gelu_new", "layer_norm_epsilon": 1e-5}
    expected |= {"resid_pdrop": 0.25, "embd_pdrop": 0.25, "attn_pdrop": 0.25}
    assert expected.items() <= config.items()
    header, tensors = read_safetensors_by_hand(tmp_path / "hf" / "model.safetensors")
    assert header["__metadata__"] == {"format": "pt"}
    state = model.state_dict()
    assert set(tensors) == {f"transformer.{name}" for name in state}
    for name, value in state.items():
        dense = name.split(".")[-2] in ("c_attn", "c_proj", "c_fc") and name.endswith("weight")
        assert torch.equal(tensors[f"transformer.{name}"], value.T if dense else value), name
    assert tensors["transformer.h.0.attn.c_attn.weight"].shape == (20, 60)
    assert tensors["transformer.h.1.mlp.c_proj.weight"].shape == (80, 20)
    assert sorted(p.name for p in (tmp_path / "hf").iterdir()) == ["config.json", "model.safetensors"]


def test_save_pretrained_round_trip(tmp_path):
    """save_pretrained -> load_pretrained gives bit-identical logits."""
    model = make_gpt(seed=7)
    save_pretrained(model, tmp_path)
    again = load_pretrained(str(tmp_path)).eval()
    tokens = random_tokens()
    assert torch.equal(again(tokens), model(tokens))
    assert load_pretrained(str(tmp_path), dropout=0.3).config.dropout == 0.3


def test_save_pretrained_keeps_the_real_vocabulary(tmp_path):
    """A padded table saved and loaded again must not let its padding rows back into the softmax (trap 4)."""
    model = make_gpt(seed=7, vocab=32, real_vocab=V)
    save_pretrained(model, tmp_path)
    tokens = random_tokens()
    assert torch.equal(load_pretrained(str(tmp_path)).eval()(tokens), model(tokens))


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_load_pretrained_reads_pytorch_model_bin(tmp_path, prefix):
    """GPT-2's own file: names with or without "transformer.", causal masks as buffers, an
    explicit tied lm_head, half precision."""
    model = make_gpt(seed=8, block_size=16)
    save_pretrained(model, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    weights = {}
    for name, value in model.state_dict().items():
        dense = name.split(".")[-2] in ("c_attn", "c_proj", "c_fc") and name.endswith("weight")
        weights[prefix + name] = (value.T.contiguous() if dense else value.clone()).half()
    for i in range(2):
        weights[f"{prefix}h.{i}.attn.bias"] = torch.ones(16, 16).tril().view(1, 1, 16, 16).to(torch.uint8)
        weights[f"{prefix}h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    if prefix:
        weights["lm_head.weight"] = weights["transformer.wte.weight"]
    torch.save(weights, tmp_path / "pytorch_model.bin")
    loaded = load_pretrained(str(tmp_path))
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value.half().float()), name


def test_load_pretrained_names_what_it_can_load():
    """A wrong name is an error that lists the right ones, before any download."""
    with pytest.raises(ValueError, match="gpt2-medium"):
        load_pretrained("gpt3")


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_load_pretrained_reads_half_precision(tmp_path, half):
    """Published in 16 bits: trained and sampled in float32 all the same."""
    model = make_gpt(seed=8)
    save_pretrained(model, tmp_path)
    file = tmp_path / "model.safetensors"
    save_file({k: v.to(half) for k, v in load_file(file).items()}, file, metadata={"format": "pt"})
    loaded = load_pretrained(str(tmp_path))
    for name, value in model.state_dict().items():
        assert loaded.state_dict()[name].dtype == torch.float32, name
        assert torch.equal(loaded.state_dict()[name], value.to(half).float()), name


def test_load_pretrained_cuts_the_positions(tmp_path):
    """block_size ignored: a rollout's cache and a value model for 1,024 positions where 48 were asked for. The
    positions that stay are the first ones, untouched."""
    model = make_gpt(seed=7)
    save_pretrained(model, tmp_path)
    short = load_pretrained(str(tmp_path), block_size=16).eval()
    assert short.config.block_size == 16 and short.wpe.weight.shape == (16, 32)
    tokens = random_tokens(T=16)
    assert torch.equal(short(tokens), model(tokens))
    with pytest.raises(ValueError, match="block_size"):
        short(random_tokens(T=17))
    assert load_pretrained(str(tmp_path), block_size=48).config.block_size == 48
    assert load_pretrained(str(tmp_path)).config.block_size == 48
    with pytest.raises(ValueError, match=r"block_size 49: .* has 48 positions"):
        load_pretrained(str(tmp_path), block_size=49)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("activation_function", "gelu"),
        ("layer_norm_epsilon", 1e-6),
        ("n_inner", 100),
        ("tie_word_embeddings", False),
    ],
)
def test_load_pretrained_refuses_another_network(tmp_path, key, value):
    """A relative of GPT-2's, loaded as if it were one: plausible and wrong."""
    save_pretrained(make_gpt(seed=7), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps({**config, key: value}), encoding="utf-8")
    with pytest.raises(ValueError, match=f"{key} is {value!r}"):
        load_pretrained(str(tmp_path))
    del config[key]  # absent: GPT-2's own
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    load_pretrained(str(tmp_path))


def test_load_pretrained_takes_an_inner_size_that_is_spelt_out(tmp_path):
    """n_inner of null means 4 * n_embd; the same as a number is the same network."""
    save_pretrained(make_gpt(seed=7), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps({**config, "n_inner": 128}), encoding="utf-8")
    assert torch.equal(load_pretrained(str(tmp_path)).wte.weight, make_gpt(seed=7).wte.weight)


GPT2_SHAPE = {"model_type": "gpt2", "vocab_size": V, "n_positions": 48, "n_layer": 2, "n_head": 4, "n_embd": 32}
# What published GPT-2s say besides: gpt2, distilgpt2, gpt2-xl, and what transformers 4 and 5 write
GPT2_BESIDES = {
    "architectures": ["GPT2LMHeadModel"],
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "n_inner": None,
    "n_ctx": 1024,
    "attn_pdrop": 0.1,
    "embd_pdrop": 0.1,
    "resid_pdrop": 0.1,
    "bos_token_id": 50256,
    "eos_token_id": [50256],
    "pad_token_id": None,
    "initializer_range": 0.02,
    "output_past": True,
    "summary_activation": None,
    "summary_first_dropout": 0.1,
    "summary_proj_to_labels": True,
    "summary_type": "cls_index",
    "summary_use_proj": True,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    "_num_labels": 1,
    "id2label": {"0": "LABEL_0"},
    "label2id": {"LABEL_0": 0},
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "reorder_and_upcast_attn": True,
    "add_cross_attention": False,
    "torch_dtype": "float32",
    "dtype": "float32",
    "transformers_version": "4.57.0",
    "use_cache": True,
    "gradient_checkpointing": False,
    "_name_or_path": "gpt2",
    "is_encoder_decoder": False,
    "return_dict": True,
    "output_attentions": False,
    "output_hidden_states": False,
    "chunk_size_feed_forward": 0,
    "problem_type": None,
    "tie_word_embeddings": True,
}


def with_fields(folder, **fields):
    """A folder with GPT-2's weights, whose config.json says this too."""
    save_pretrained(make_gpt(seed=7), folder)
    (folder / "config.json").write_text(json.dumps(GPT2_SHAPE | fields), encoding="utf-8")
    return folder


def test_what_published_gpt2s_say_besides_is_no_harm(tmp_path):
    plain, whole = with_fields(tmp_path / "a"), with_fields(tmp_path / "b", **GPT2_BESIDES)
    tokens = random_tokens()
    assert torch.equal(load_pretrained(plain).eval()(tokens), load_pretrained(whole).eval()(tokens))


@pytest.mark.parametrize(
    "field",
    [
        {"scale_attn_by_inverse_layer_idx": True},
        {"scale_attn_weights": False},
        {"add_cross_attention": True},
        {"is_encoder_decoder": True},
        {"pruned_heads": {"0": [1]}},
        {"rope_theta": 10000.0},
        {"rotary_dim": 64},
        {"parallel_attn": True},
        {"attention_layers": ["global", "local"]},
        {"logit_scale": 0.5},
        {"quantization_config": {"bits": 4}},
        {"auto_map": {"AutoModelForCausalLM": "modeling.Mine"}},
        {"something_of_next_year": 1},
    ],
    ids=str,
)
def test_a_gpt2_that_computes_something_else_is_refused(tmp_path, field):
    """By what is understood, not by what is known to be foreign: any other field may change every logit."""
    folder = with_fields(tmp_path / "hf", **GPT2_BESIDES | field)
    with pytest.raises(UserError, match=rf"config\.json: {next(iter(field))} is ") as error:
        lib.checkpoint.load_published(folder, V)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kind", ["model.safetensors", "pytorch_model.bin", "sharded"])
def test_published_weights_that_are_not_finite_are_refused(tmp_path, kind, value):
    """By the file and the tensor. A run that starts from them would compute nan, and only say so at its end."""
    folder = with_fields(tmp_path / "hf")
    weights = load_file(folder / "model.safetensors")
    weights["transformer.h.1.mlp.c_fc.bias"][5] = value
    file = {"sharded": "model-00002-of-00002.safetensors"}.get(kind, kind)
    (folder / "model.safetensors").unlink()
    if kind == "sharded":
        first = {name: weights.pop(name) for name in list(weights)[:3]}
        save_file(first, folder / "model-00001-of-00002.safetensors")
        places = dict.fromkeys(first, "model-00001-of-00002.safetensors") | dict.fromkeys(weights, file)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}), encoding="utf-8")
    (torch.save if kind == "pytorch_model.bin" else save_file)(weights, folder / file)
    with pytest.raises(UserError, match=rf"{file}: transformer.h.1.mlp.c_fc.bias holds .* not finite"):
        lib.checkpoint.load_published(folder, V)


@pytest.mark.parametrize(
    "kind", ["model.safetensors", "pytorch_model.bin", "config.json", "missing shard", "no weights"]
)
@pytest.mark.parametrize("part", [0, 7, 0.5, -1])
def test_a_damaged_folder_is_one_line_that_names_the_file(tmp_path, kind, part):
    """A download that broke off, at its start, in the header, in the middle, or one byte too early."""
    folder = with_fields(tmp_path / "hf")
    file = folder / kind
    if kind == "pytorch_model.bin":
        torch.save(load_file(folder / "model.safetensors"), file)
        (folder / "model.safetensors").unlink()
    if kind == "no weights":
        (folder / "model.safetensors").unlink()
        file = folder / "pytorch_model.bin"
    elif kind == "missing shard":
        file = folder / "model-00001-of-00001.safetensors"
        index = json.dumps({"weight_map": {"transformer.wte.weight": file.name}})
        (folder / "model.safetensors.index.json").write_text(index, encoding="utf-8")
    else:
        content = file.read_bytes()
        cut = {0.5: len(content) // 2, -1: len(content) - (1 if kind != "config.json" else 2)}.get(part, part)
        file.write_bytes(content[:cut])
    with pytest.raises(UserError) as error:
        lib.checkpoint.load_published(folder, V)
    assert str(file) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "field", [{"n_layer": "2"}, {"n_head": 0}, {"n_embd": None}, {"n_positions": -1}, {"n_head": 5}], ids=str
)
def test_a_shape_that_is_none_is_one_line(tmp_path, field):
    with pytest.raises(UserError, match="can't be loaded"):
        lib.checkpoint.load_published(with_fields(tmp_path / "hf", **field), V)


def with_rms_norm(model: GPT) -> None:
    model.ln_f = nn.RMSNorm(32)


def without_biases(model: GPT) -> None:
    model.h[1].mlp.c_fc = nn.Linear(32, 128, bias=False)


def with_an_output_layer(model: GPT) -> None:
    model.output = nn.Linear(32, V, bias=False)


def with_one_block_less(model: GPT) -> None:
    del model.h[1]


@pytest.mark.parametrize("change", [with_rms_norm, without_biases, with_an_output_layer, with_one_block_less])
def test_save_pretrained_refuses_a_network_that_is_no_longer_gpt2(tmp_path, change):
    """Somebody tries an RMSNorm, and the export writes a file that other tools read as a GPT-2, with fresh random
    biases where none were: refused, before anything is written, and by the name of what has changed."""
    model = make_gpt(seed=7)
    unchanged = set(model.state_dict())
    change(model)
    with pytest.raises(ValueError, match="no published layout has its") as error:
        save_pretrained(model, tmp_path / "hf")
    assert any(name in str(error.value) for name in unchanged ^ set(model.state_dict()))
    assert not (tmp_path / "hf").exists()


def test_save_pretrained_refuses_rotary_positions(tmp_path):
    """What sft.py trains from scratch has rotary positions, which GPT-2's layout can't hold: written as a GPT-2, it
    would be one without positions."""
    model = GPT(GPTConfig(V, 48, 1, 2, 8, rope_base=100.0))
    with pytest.raises(ValueError, match=r"no published layout has its h\.0\.attn\.c_attn\.bias"):
        save_pretrained(model, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize(
    ("changes", "name"),
    [({"n_inner": 100}, "h.0.mlp.c_fc.bias"), ({"norm_eps": 1e-6}, "norm_eps"), ({"n_kv_head": 2}, "h.0.attn.c_attn")],
    ids=str,
)
def test_save_pretrained_refuses_sizes_that_config_json_would_not_tell(tmp_path, changes, name):
    """Under GPT-2's own names, and read elsewhere with GPT-2's own sizes and epsilon."""
    with pytest.raises(ValueError, match=f"no published layout has its {name}"):
        save_pretrained(make_gpt(seed=7, **changes), tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


# ------------------------------------------------------------------------------------------------ Llama and its like

# 6 heads of 8 channels, which share 2 keys and values
SHAPE = {"model_type": "llama", "hidden_act": "silu", "vocab_size": V, "max_position_embeddings": 48}
SHAPE |= {"num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 2, "hidden_size": 48}
SHAPE |= {"intermediate_size": 40, "rms_norm_eps": 1e-4, "rope_theta": 50.0, "tie_word_embeddings": True}


def llama_tensors(shape: dict) -> dict[str, torch.Tensor]:
    """Random weights in Hugging Face's layout."""
    C, D, inner = shape["hidden_size"], shape["hidden_size"] // shape["num_attention_heads"], shape["intermediate_size"]
    of_k = shape["num_key_value_heads"] * D
    sizes = {"model.embed_tokens.weight": (V, C), "model.norm.weight": (C,)}
    if not shape["tie_word_embeddings"]:
        sizes["lm_head.weight"] = (V, C)
    for i in range(shape["num_hidden_layers"]):
        inside = {"self_attn.q_proj": (C, C), "self_attn.k_proj": (of_k, C), "self_attn.v_proj": (of_k, C)}
        inside |= {"self_attn.o_proj": (C, C), "mlp.gate_proj": (inner, C), "mlp.up_proj": (inner, C)}
        inside |= {"mlp.down_proj": (C, inner), "input_layernorm": (C,), "post_attention_layernorm": (C,)}
        sizes |= {f"model.layers.{i}.{name}.weight": size for name, size in inside.items()}
        if shape["model_type"] == "qwen2":
            sizes |= {f"model.layers.{i}.self_attn.{x}_proj.bias": inside[f"self_attn.{x}_proj"][:1] for x in "qkv"}
    g = torch.Generator().manual_seed(3)
    values = {name: 0.3 * torch.randn(*size, generator=g) + (len(size) == 1) for name, size in sizes.items()}
    return {name: value.float() for name, value in values.items()}


def write_folder(folder, shape: dict, tensors: dict[str, torch.Tensor], shards: int = 1):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(shape), encoding="utf-8")
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    names = sorted(tensors)
    files = {name: f"model-{i % shards}.safetensors" for i, name in enumerate(names)}
    for file in set(files.values()):
        save_file({n: tensors[n] for n in names if files[n] == file}, folder / file)
    index = {"metadata": {}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x / (x.pow(2).mean() + eps).sqrt() * weight


def slow_llama(shape: dict, tensors: dict[str, torch.Tensor], tokens: list[int]) -> torch.Tensor:
    """Llama by the papers, token by token and head by head, in float64, on Hugging Face's tensors: (T, V). Channel j of
    a head is turned with channel j + D/2."""
    w = {name: value.double() for name, value in tensors.items()}
    H, G, C = shape["num_attention_heads"], shape["num_key_value_heads"], shape["hidden_size"]
    D, eps, stream, past = C // H, shape["rms_norm_eps"], [], [[] for _ in range(shape["num_hidden_layers"])]

    def turned(x: torch.Tensor, position: int) -> torch.Tensor:
        y = x.clone()
        for j in range(D // 2):
            angle = position * shape["rope_theta"] ** (-2 * j / D)
            a, b = x[j], x[j + D // 2]
            y[j], y[j + D // 2] = (
                a * math.cos(angle) - b * math.sin(angle),
                a * math.sin(angle) + b * math.cos(angle),
            )
        return y

    for position, token in enumerate(tokens):
        x = w["model.embed_tokens.weight"][token]
        for i in range(shape["num_hidden_layers"]):
            p = f"model.layers.{i}."

            def dense(name: str, x: torch.Tensor, p: str = p) -> torch.Tensor:
                return w[f"{p}{name}.weight"] @ x + w.get(f"{p}{name}.bias", torch.zeros(()))

            n = rms_norm(x, w[p + "input_layernorm.weight"], eps)
            q, k, v = (dense(f"self_attn.{part}_proj", n).view(-1, D) for part in "qkv")
            past[i].append((torch.stack([turned(head, position) for head in k]), v))
            heads = []
            for h in range(H):
                mine = turned(q[h], position)
                scores = torch.stack([mine @ keys[h * G // H] / math.sqrt(D) for keys, _ in past[i]])
                shares = scores.exp() / scores.exp().sum()
                heads.append(sum(s * values[h * G // H] for s, (_, values) in zip(shares, past[i], strict=True)))
            x = x + dense("self_attn.o_proj", torch.cat(heads))
            n = rms_norm(x, w[p + "post_attention_layernorm.weight"], eps)
            gate = dense("mlp.gate_proj", n)
            x = x + dense("mlp.down_proj", gate / (1 + (-gate).exp()) * dense("mlp.up_proj", n))
        output = w.get("lm_head.weight", w["model.embed_tokens.weight"])
        stream.append(output @ rms_norm(x, w["model.norm.weight"], eps))
    return torch.stack(stream)


KINDS = pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": False},
        {"model_type": "qwen2", "rope_theta": 300.0},
        {"num_key_value_heads": 6},
        {"num_key_value_heads": 1, "rope_parameters": {"rope_type": "default", "rope_theta": 50.0}},
    ],
    ids=["llama", "untied", "qwen2", "all heads", "one key and value"],
)


@KINDS
def test_a_llama_folder_is_llama_by_loops(tmp_path, changes, float64):
    """Rows of queries and keys in the wrong order, gate and hidden layer exchanged, a key shared by the wrong queries,
    an epsilon or a base of another model: plausible text, a little worse."""
    shape = SHAPE | changes
    tensors = llama_tensors(shape)
    model = load_pretrained(write_folder(tmp_path / "hf", shape, tensors, shards=1 + 2 * bool(changes))).double().eval()
    tokens = random_tokens(2, 11)
    for row, logits in zip(tokens, model(tokens), strict=True):
        torch.testing.assert_close(logits, slow_llama(shape, tensors, row.tolist()), rtol=0, atol=1e-9)
    # sampling with a cache goes the same way
    cache = KVCache(2, 11, model.config, model.wte.weight)
    found = prefill(model, tokens[:, :4], torch.tensor([4, 4]), cache)
    for t in range(4, 11):
        torch.testing.assert_close(found, model(tokens)[:, t - 1], rtol=0, atol=1e-9)
        found = decode_one_token(model, tokens[:, t], torch.full((2,), t), cache)
    drawn = generate(model, [[1, 2, 3], [4]], 8, eos_id=0, temperature=0.0)
    for row, start, end in zip(drawn.tokens, drawn.prompt_lens.tolist(), drawn.lens.tolist(), strict=True):
        best = slow_llama(shape, tensors, row[:end].tolist()).argmax(-1)
        assert row[start:end].tolist() == best[start - 1 : end - 1].tolist()


@KINDS
def test_a_llama_goes_out_as_it_came_in(tmp_path, changes):
    """Every published tensor bit for bit, and every field of the configuration that says what the network is."""
    shape = SHAPE | changes
    tensors = llama_tensors(shape)
    model = load_pretrained(write_folder(tmp_path / "in", shape, tensors))
    save_pretrained(model, tmp_path / "out")
    _, written = read_safetensors_by_hand(tmp_path / "out" / "model.safetensors")
    assert written.keys() == tensors.keys()
    assert all(torch.equal(written[name], tensors[name]) for name in tensors)
    config = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    told = {k: v for k, v in shape.items() if k != "rope_parameters"}
    assert told.items() <= config.items() and config["rope_parameters"]["rope_theta"] == shape["rope_theta"]
    again = load_pretrained(tmp_path / "out")
    assert again.config == model.config
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values(), strict=True))


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_theta": 300.0},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 300.0}},
        {"rope_scaling": None, "rope_theta": 300.0, "head_dim": None},
    ],
    ids=["transformers 4", "transformers 5", "nulls"],
)
def test_the_base_of_the_rotary_positions_is_found_where_it_stands(tmp_path, changes, float64):
    """Another base than the one trained with: near tokens are all right, far ones are not."""
    shape = {k: v for k, v in SHAPE.items() if k != "rope_theta"} | changes
    model = load_pretrained(write_folder(tmp_path / "hf", shape, llama_tensors(shape))).double().eval()
    tokens = random_tokens(1, 11)
    truth = slow_llama(shape | {"rope_theta": 300.0}, llama_tensors(shape), tokens[0].tolist())
    torch.testing.assert_close(model(tokens)[0], truth, rtol=0, atol=1e-9)


def test_what_config_json_leaves_out_is_what_transformers_takes(tmp_path, float64):
    """Its defaults for a llama: an output layer of its own, keys and values for every head, a base of 10,000."""
    whole = SHAPE | {"tie_word_embeddings": False, "num_key_value_heads": 6, "rope_theta": 10000.0}
    tensors, tokens = llama_tensors(whole), random_tokens(1, 11)
    told = {k: v for k, v in whole.items() if k not in ("tie_word_embeddings", "num_key_value_heads", "rope_theta")}
    model = load_pretrained(write_folder(tmp_path / "hf", told, tensors)).double().eval()
    truth = slow_llama(whole, tensors, tokens[0].tolist())
    torch.testing.assert_close(model(tokens)[0], truth, rtol=0, atol=1e-9)


def test_what_old_files_hold_besides_is_left_aside(tmp_path):
    """The frequencies of the positions, and the tied output layer once more."""
    tensors = llama_tensors(SHAPE)
    more = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(2)}
    more["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    one, two = (
        load_pretrained(write_folder(tmp_path / n, SHAPE, t)) for n, t in (("a", tensors), ("b", tensors | more))
    )
    assert one.config == two.config
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))


@pytest.mark.parametrize("tied", [True, False])
def test_a_padded_llama_goes_out_without_its_padding(tmp_path, tied):
    """Neither table may keep rows that are no tokens: config.json tells one size for both."""
    shape = SHAPE | {"tie_word_embeddings": tied}
    model = load_pretrained(write_folder(tmp_path / "in", shape, llama_tensors(shape)))
    model.config.real_vocab = V - 3
    save_pretrained(model, tmp_path / "out")
    again, tokens = load_pretrained(tmp_path / "out"), random_tokens() % (V - 3)
    assert again.config.vocab_size == V - 3 and again.config.real_vocab is None
    assert torch.equal(again.eval()(tokens), model.eval()(tokens))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "untied"])
def test_a_reward_model_goes_out_as_a_classifier(tmp_path, kind):
    """The head under its published name, in the units of the normalised reward, but for a constant that is told; the
    output layer has no place in it."""
    gpt = make_gpt(seed=7)
    if kind != "gpt2":
        shape = SHAPE | {"tie_word_embeddings": kind == "llama"}
        gpt = load_pretrained(write_folder(tmp_path / "in", shape, llama_tensors(shape)))
    model = ScalarModel.from_gpt(gpt).eval()
    model.mean, model.std = torch.tensor(0.7), torch.tensor(2.5)
    model.head.bias.data.fill_(0.2)
    save_pretrained(model, tmp_path / "out")
    _, tensors = read_safetensors_by_hand(tmp_path / "out" / "model.safetensors")
    config = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == [f"{'GPT2' if kind == 'gpt2' else 'Llama'}ForSequenceClassification"]
    assert config["num_labels"] == 1 and "lm_head.weight" not in tensors
    tokens = random_tokens()
    if kind == "gpt2":  # the constant is in the final norm's bias
        assert "reward_shift" not in config
        gpt.ln_f.bias.data = tensors["transformer.ln_f.bias"]
    found = gpt.hidden(tokens)[:, -1] @ tensors["score.weight"][0] + config.get("reward_shift", 0.0)
    torch.testing.assert_close(found, model(tokens)[:, -1])
    with pytest.raises(UserError, match=r"reward_model\.py --expectation no"):
        save_pretrained(ScalarModel.from_gpt(gpt, expectation=True), tmp_path / "no")
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model_type": "mamba"}, "model_type is 'mamba'"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"head_dim": 16}, "head_dim is 16"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "'llama3'"),
        ({"model_type": "qwen2", "use_sliding_window": True}, "use_sliding_window is True"),
        ({"intermediate_size": 44}, r"h\.0\.mlp\.c_fc\.weight is \(80, 48\) in the file and \(88, 48\) in"),
        ({"num_hidden_layers": 3}, r"h\.2\.attn\.c_attn\.weight is missing in the file"),
        ({"num_hidden_layers": 1}, r"model\.layers\.1\.\S* is \(48,\) in the file and missing in"),
    ],
    ids=str,
)
def test_another_network_than_llama_is_refused(tmp_path, changes, says):
    """What model.py doesn't have, or what doesn't fit together, by the name of the field or the tensor."""
    folder = write_folder(tmp_path / "hf", SHAPE | changes, llama_tensors(SHAPE))
    with pytest.raises(ValueError, match=says):
        load_pretrained(folder)


# What published Llamas and Qwen2s say besides: SmolLM2, TinyLlama, Qwen2.5, and what transformers 4 and 5 write
LLAMA_BESIDES = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
    "head_dim": 8,
    "initializer_range": 0.041666666666666664,
    "is_llama_config": True,
    "mlp_bias": False,
    "pretraining_tp": 2,
    "rope_interleaved": False,
    "rope_scaling": None,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.42.3",
    "transformers.js_config": {"dtype": "q4"},
    "use_cache": True,
    "partial_rotary_factor": 1.0,
    "layer_types": ["full_attention", "full_attention"],
}
QWEN_BESIDES = {"max_window_layers": 21, "sliding_window": 32768, "use_sliding_window": False, "use_mrope": False}


@pytest.mark.parametrize("qwen", [False, True])
def test_what_published_llamas_say_besides_is_no_harm(tmp_path, qwen):
    shape = SHAPE | ({"model_type": "qwen2"} if qwen else {})
    tensors, more = llama_tensors(shape), LLAMA_BESIDES | (QWEN_BESIDES if qwen else {})
    one, two = (load_pretrained(write_folder(tmp_path / n, shape | m, tensors)) for n, m in (("a", {}), ("b", more)))
    assert one.config == two.config and torch.equal(one.eval()(random_tokens()), two.eval()(random_tokens()))


@pytest.mark.parametrize(
    "field",
    [
        {"attention_multiplier": 0.0078125},
        {"logits_scaling": 8.0},
        {"embedding_multiplier": 12.0},
        {"residual_multiplier": 0.22},
        {"final_logit_softcapping": 30.0},
        {"partial_rotary_factor": 0.5},
        {"sliding_window": 4096},
        {"rope_interleaved": True},
        {"layer_types": ["sliding_attention", "full_attention"]},
        {"no_rope_layers": [1, 0]},
        {"num_local_experts": 8},
        {"quantization_config": {"quant_method": "gptq"}},
        {"use_qk_norm": True},
        {"something_of_next_year": 1},
        {"model_type": "qwen2", "use_mrope": True},
        {"model_type": "qwen2", "layer_types": ["full_attention", "sliding_attention"], "sliding_window": 8},
    ],
    ids=str,
)
def test_a_llama_that_computes_something_else_is_refused(tmp_path, field):
    shape = SHAPE | LLAMA_BESIDES | field
    name = next(key for key in field if key != "model_type")
    with pytest.raises(UserError, match=rf"config\.json: {name} is "):
        load_pretrained(write_folder(tmp_path / "hf", shape, llama_tensors(SHAPE | field)))


PLAIN = {"rope_type": "default", "rope_theta": 50.0}


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        (
            {"rope_parameters": PLAIN, "rope_scaling": {"type": "linear", "factor": 2.0}},
            "rope_scaling: type is 'linear'",
        ),
        (
            {"rope_scaling": PLAIN, "rope_parameters": {"rope_type": "yarn", "factor": 2.0}},
            "rope_parameters: rope_type",
        ),
        ({"rope_scaling": {"rope_type": "default", "type": "dynamic"}}, "rope_scaling: type is 'dynamic'"),
        ({"rope_parameters": {"type": "default", "rope_type": "linear"}}, "rope_parameters: rope_type is 'linear'"),
        ({"rope_parameters": PLAIN | {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5"),
        ({"rope_parameters": PLAIN | {"factor": 2.0}}, "rope_parameters: factor is not known"),
        ({"rope_scaling": {"factor": 2.0}}, "rope_scaling: factor is not known"),
        ({"rope_parameters": {"full_attention": PLAIN}}, "rope_parameters: full_attention is not known"),
        ({"rope_parameters": PLAIN | {"rope_theta": 300.0}}, "rope_theta is 50.0 and 300.0, in two places"),
        ({"rope_parameters": PLAIN, "rope_scaling": PLAIN | {"rope_theta": 9.0}}, "rope_theta is 9.0 and 50.0"),
        ({"rope_parameters": PLAIN, "rope_scaling": None}, ""),
        ({"rope_parameters": PLAIN, "rope_scaling": {"type": "default"}}, ""),
        ({"rope_parameters": PLAIN | {"partial_rotary_factor": 1.0}, "rope_scaling": {}}, ""),
    ],
    ids=str,
)
def test_two_rotary_settings_in_one_configuration(tmp_path, fields, says):
    """Where both are plain and agree, they are one; where either is not plain, or says another base, none is chosen."""
    tensors = llama_tensors(SHAPE)
    folder = write_folder(tmp_path / "two", SHAPE | fields, tensors)
    if says:
        with pytest.raises(UserError, match=says):
            load_pretrained(folder)
    else:
        assert load_pretrained(folder).config == load_pretrained(write_folder(tmp_path / "one", SHAPE, tensors)).config


def test_a_name_on_the_hub_without_the_package(monkeypatch):
    """No download of our own, and a line that says what to do."""
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match="pip install huggingface_hub"):
        weights.local_path("gpt2")
    with pytest.raises(ValueError, match="no folder"):
        weights.local_path("some/where/else")


def test_a_name_on_the_hub_is_a_folder_once_it_is_there(tmp_path, monkeypatch):
    """hf:NAME goes to the package huggingface_hub, and what it brings is loaded like any folder; nothing else is asked
    for, and no name that may be a path of one's own."""
    folder, asked = write_folder(tmp_path / "cache", SHAPE, llama_tensors(SHAPE)), []

    def snapshot_download(repository, allow_patterns):
        asked.append(repository)
        assert "config.json" in allow_patterns and "*.safetensors" in allow_patterns
        return str(folder)

    hub = types.SimpleNamespace(snapshot_download=snapshot_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    same = load_pretrained(folder).state_dict()
    for name in ("hf:some/model", "some/model"):
        assert all(
            torch.equal(a, b) for a, b in zip(load_pretrained(name).state_dict().values(), same.values(), strict=True)
        )
    assert weights.local_path("gpt2") == folder
    assert asked == ["some/model", "some/model", "openai-community/gpt2"]
    assert lib.checkpoint.is_published("hf:some/model") and not lib.checkpoint.is_published("some/model")
    assert (
        lib.checkpoint.start_vocabulary("hf:some/model") == str(folder)
        and lib.checkpoint.start_vocabulary("gpt2") == "gpt2"
    )

    def no_network(*_, **__):
        raise OSError("no network")

    hub.snapshot_download = no_network
    with pytest.raises(UserError, match="OSError while downloading some/model"):
        lib.checkpoint.start_vocabulary("hf:some/model")


@KINDS
def test_transformers_agrees(tmp_path, changes):
    """The published implementation itself, on our files and on its own, to 1e-4 and better."""
    transformers = pytest.importorskip("transformers")
    shape = SHAPE | changes
    folder = write_folder(tmp_path / "in", shape, llama_tensors(shape))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model, tokens = load_pretrained(folder).eval(), random_tokens()
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), theirs(input_ids=tokens).logits, rtol=1e-5, atol=1e-4)
    theirs.save_pretrained(tmp_path / "their", max_shard_size="20KB")
    assert len(list((tmp_path / "their").glob("*.safetensors"))) > 1
    again = load_pretrained(tmp_path / "their")
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values(), strict=True))


@pytest.mark.parametrize(
    ("kind", "strings", "says"),
    [
        ("gemma", {}, "general.architecture is 'gemma'; known are llama, qwen2"),
        ("llama", {"llama.rope.scaling.type": "yarn"}, "rope.scaling.type is 'yarn'"),
        ("llama", {"llama.logit_scale": "0.5"}, "logit_scale is not known here"),
        ("qwen2", {"qwen2.attention.sliding_window": "8"}, "attention.sliding_window is not known here"),
        ("llama", {"llama.rope.dimension_count": "4"}, "rope.dimension_count is '4'"),
    ],
)
def test_a_gguf_file_of_another_network_is_refused(tmp_path, monkeypatch, kind, strings, says):
    """By the name of the field, as config.json's are."""
    writer = gguf_package(monkeypatch).GGUFWriter(tmp_path / "m.gguf", kind)
    writer.add_embedding_length(32)
    writer.add_head_count(4)
    for key, value in strings.items():
        writer.add_string(key, value)
    writer.add_tensor("token_embd.weight", torch.zeros(V, 32).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match=f"m.gguf: {says}"):
        load_pretrained(tmp_path / "m.gguf")


@pytest.mark.parametrize(
    "more", [{}, {"rope_freqs.weight": 1.0}, {"rope_freqs.weight": 8.0}, {"output_norm.weight": math.nan}], ids=str
)
@pytest.mark.parametrize(("kind", "tied"), [("llama", True), ("llama", False), ("qwen2", True)])
def test_a_gguf_file_is_the_folder_it_was_made_from(tmp_path, monkeypatch, kind, tied, more):
    """GGUF keeps a llama's query and key rows as neighbours, a qwen2's as halves; norms and names are its own, and an
    output layer of its own is there or not. Llama 3.1's stretched positions stand in a tensor, rope_freqs."""
    gguf = gguf_package(monkeypatch)
    shape = SHAPE | {"model_type": kind, "intermediate_size": 64, "hidden_size": 96, "tie_word_embeddings": tied}
    tensors = llama_tensors(shape)
    folder = load_pretrained(write_folder(tmp_path / "hf", shape, tensors))
    H, G = shape["num_attention_heads"], shape["num_key_value_heads"]
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", kind)
    writer.add_context_length(48)
    writer.add_block_count(2)
    writer.add_embedding_length(96)
    writer.add_feed_forward_length(64)
    writer.add_head_count(H)
    writer.add_head_count_kv(G)
    writer.add_layer_norm_rms_eps(1e-4)
    writer.add_rope_freq_base(50.0)
    names = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v"}
    names |= {"self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up"}
    names |= {"mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    names |= {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "model.layers": "blk"}
    names["lm_head"] = "output"
    for name, value in tensors.items():
        heads = {"q_proj": H, "k_proj": G}.get(name.split(".")[-2])
        if kind == "llama" and heads:  # row j of each head, then row j + D/2
            rows = [r for h in value.chunk(heads) for pair in zip(*h.chunk(2), strict=True) for r in pair]
            value = torch.stack(rows)
        for there, here in names.items():
            name = name.replace(there, here)
        if name not in more:
            writer.add_tensor(name, value.numpy())
    for name, number in more.items():
        writer.add_tensor(name, torch.full((4 if "rope" in name else 96,), number).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    wrong = {"rope_freqs.weight": "is not 1", "output_norm.weight": "holds .* not finite"}
    for name, number in more.items():
        if number != 1:
            with pytest.raises(UserError, match=rf"m\.gguf: {name} {wrong[name]}"):
                load_pretrained(tmp_path / "m.gguf")
            return
    model = load_pretrained(tmp_path / "m.gguf")
    assert model.config == folder.config
    for name, value in folder.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
