"""weights.py: GPT-2's published layout, read and written: against the format itself, parsed here by hand."""

from __future__ import annotations

import json
import struct
from itertools import pairwise

import pytest
import torch
from helpers import make_gpt
from safetensors.torch import load_file, save_file
from torch import nn

from model import GPT, GPTConfig
from weights import load_pretrained, save_pretrained

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
    with pytest.raises(ValueError, match="not GPT-2's") as error:
        save_pretrained(model, tmp_path / "hf")
    assert any(name in str(error.value) for name in unchanged ^ set(model.state_dict()))
    assert not (tmp_path / "hf").exists()


def test_save_pretrained_refuses_rotary_positions(tmp_path):
    """What sft.py trains from scratch has rotary positions, which GPT-2's layout can't hold: written as a GPT-2, it
    would be one without positions."""
    model = GPT(GPTConfig(V, 48, 1, 2, 8, rope_base=100.0))
    with pytest.raises(ValueError, match=r"not GPT-2's .*wpe\.weight"):
        save_pretrained(model, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()
