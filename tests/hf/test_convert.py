"""Conversions: Hugging Face directories, checkpoints, and Nanotron's layout, which is built here byte by byte."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

import kenotron
from kenotron.cli import main
from kenotron.hf import hf_to_kenotron, kenotron_to_nanotron, nanotron_to_kenotron

HIDDEN, INNER, LAYERS, HEADS, KV_HEADS, VOCABULARY = 16, 24, 2, 4, 2, 40
HEAD = HIDDEN // HEADS


def save_hf(path: Path, model_type: str = "llama", **settings: Any) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": LAYERS, "vocab_size": VOCABULARY}
    heads = {"num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "max_position_embeddings": 64}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **sizes, **heads, **settings))
    for param in model.parameters():
        param.data.normal_(std=0.2)
    model.save_pretrained(path)
    return model


def write_file(path: Path, data: torch.Tensor, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file without any library: length, header, bytes."""
    payload = bytes(data.contiguous().view(torch.uint8).flatten().tolist())
    header: dict[str, Any] = {"data": {"dtype": "F32", "shape": list(data.shape), "data_offsets": [0, len(payload)]}}
    if metadata is not None:
        header["__metadata__"] = metadata
    text = json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack("<Q", len(text)) + text + payload)


def write_nanotron(root: Path, model: Any, *, interleaved: bool, tied: bool = False, **config: Any) -> Path:
    """Write a transformers Llama or Qwen2 as Nanotron does at pp 2 and tp 2, from the description of its format."""
    state = model.state_dict()
    step = root / "20"

    def turned(x: torch.Tensor, heads: int) -> torch.Tensor:
        """The rows of each head: 0, D/2, 1, D/2 + 1, … where pairs are neighbours."""
        order = [h * HEAD + half * HEAD // 2 + i for h in range(heads) for i in range(HEAD // 2) for half in (0, 1)]
        return x[order] if interleaved else x

    def sharded(module: str, key: str, whole: torch.Tensor, dim: int, parts: list[int], pp: int) -> None:
        for rank in (0, 1):
            pieces, pairs, begin, start = [], [], 0, 0
            for part in parts:
                length, at = part // 2, start + rank * (part // 2)
                pieces.append(whole.narrow(dim, at, length))
                texts = []
                for first in (begin, at):
                    cuts = ["None,None,None"] * whole.ndim
                    cuts[dim] = f"{first},{first + length},None"
                    texts.append("|".join(cuts))
                pairs.append("#".join(texts))
                begin, start = begin + length, start + part
            metadata = {
                "version": "1.4",
                "local_global_slices_pairs": ";".join(pairs),
                "unsharded_shape": str(tuple(whole.shape)),
            }
            name = f"model_{key}_pp-rank-{pp}-of-2_tp-rank-{rank}-of-2.safetensors"
            write_file(step / "model" / module.replace(".", "/") / name, torch.cat(pieces, dim), metadata)

    def plain(module: str, key: str, whole: torch.Tensor) -> None:
        write_file(step / "model" / module.replace(".", "/") / f"model_{key}.safetensors", whole)

    embedding = state["model.embed_tokens.weight"]
    sharded("model.token_position_embeddings.pp_block.token_embedding", "weight", embedding, 0, [VOCABULARY], 0)
    for layer in range(LAYERS):
        theirs, ours = f"model.layers.{layer}", f"model.decoder.{layer}.pp_block"
        for key in ("weight", "bias"):
            if f"{theirs}.self_attn.q_proj.{key}" not in state:
                continue
            q, k, v = (state[f"{theirs}.self_attn.{part}_proj.{key}"] for part in "qkv")
            qkv = torch.cat([turned(q, HEADS), turned(k, KV_HEADS), v])
            sharded(f"{ours}.attn.qkv_proj", key, qkv, 0, [HIDDEN, HEAD * KV_HEADS, HEAD * KV_HEADS], layer)
        sharded(f"{ours}.attn.o_proj", "weight", state[f"{theirs}.self_attn.o_proj.weight"], 1, [HIDDEN], layer)
        gate_up = torch.cat([state[f"{theirs}.mlp.gate_proj.weight"], state[f"{theirs}.mlp.up_proj.weight"]])
        sharded(f"{ours}.mlp.gate_up_proj", "weight", gate_up, 0, [INNER, INNER], layer)
        sharded(f"{ours}.mlp.down_proj", "weight", state[f"{theirs}.mlp.down_proj.weight"], 1, [INNER], layer)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            plain(f"{ours}.{norm}", "weight", state[f"{theirs}.{norm}.weight"])
    plain("model.final_layer_norm.pp_block", "weight", state["model.norm.weight"])
    if not tied:
        sharded("model.lm_head.pp_block", "weight", state["lm_head.weight"], 0, [VOCABULARY], 1)
    given = {
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None, "hidden_act": "silu", "hidden_size": HIDDEN,
        "initializer_range": 0.02, "intermediate_size": INNER, "max_position_embeddings": 64, "num_attention_heads": HEADS,
        "num_hidden_layers": LAYERS, "num_key_value_heads": KV_HEADS, "rms_norm_eps": 1e-6, "rope_scaling": None,
        "rope_theta": 10000.0, "rope_interleaved": interleaved, "tie_word_embeddings": tied, "use_cache": True,
        "vocab_size": VOCABULARY, "pretraining_tp": 1, "is_llama_config": True, **config,
    }  # fmt: skip
    (step / "model_config.json").write_text(json.dumps(given))
    (step / "checkpoint_metadata.json").write_text(json.dumps({"version": "1.4", "tp": 2, "dp": 1}))
    (root / "latest.txt").write_text("20")
    return root


def logits(model: Any) -> torch.Tensor:
    ids = torch.arange(24).view(2, 12) % VOCABULARY
    with torch.no_grad():
        return model.eval()(ids).logits


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    ("model_type", "settings"),
    [("llama", {}), ("qwen2", {}), ("llama", {"tie_word_embeddings": True}),
     ("llama", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0,
                                    "high_freq_factor": 4.0, "original_max_position_embeddings": 16}})],
)  # fmt: skip
def test_nanotron_at_pp_2_and_tp_2_becomes_a_checkpoint(tmp_path, model_type, settings, interleaved):
    theirs = save_hf(tmp_path / "hf", model_type, **settings)
    scaling = dict(settings.get("rope_parameters", {}))
    scaling.pop("rope_theta", None)
    tied = settings.get("tie_word_embeddings", False)
    write_nanotron(tmp_path / "n", theirs, interleaved=interleaved, tied=tied, rope_scaling=scaling or None)
    nanotron_to_kenotron(tmp_path / "n", tmp_path / "ckpt")
    restored = kenotron.from_checkpoint(tmp_path / "ckpt")
    assert restored.config.model_type == model_type
    assert (logits(restored) - logits(theirs)).abs().max() <= 1e-5
    assert main(["convert", "kenotron-to-hf", str(tmp_path / "ckpt"), str(tmp_path / "out")]) == 0
    found = {name: tensor for name, tensor in theirs.state_dict().items() if not (tied and name == "lm_head.weight")}
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(found)
        for name, tensor in found.items():
            assert torch.equal(file.get_tensor(name), tensor), name


@pytest.mark.parametrize(("tp", "interleaved"), [(1, False), (2, True)])
@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_what_is_written_for_nanotron_is_what_nanotron_would_write(tmp_path, model_type, tp, interleaved):
    theirs = save_hf(tmp_path / "hf", model_type)
    hf_to_kenotron(tmp_path / "hf", tmp_path / "ckpt", name="lm")
    kenotron_to_nanotron(tmp_path / "ckpt", tmp_path / "n" / "20", tp=tp, rope_interleaved=interleaved)
    nanotron_to_kenotron(tmp_path / "n" / "20", tmp_path / "back", name="lm")
    before, after = kenotron.load_state_dict(tmp_path / "ckpt"), kenotron.load_state_dict(tmp_path / "back")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name
    if tp == 2:  # file by file as the fixture has them, which is of two stages
        write_nanotron(tmp_path / "expected", theirs, interleaved=interleaved)
        for file in (tmp_path / "expected" / "20" / "model").rglob("*.safetensors"):
            place = str(file.relative_to(tmp_path / "expected" / "20")).replace("pp-rank-1-of-2", "pp-rank-0-of-2")
            with (
                safe_open(file, "pt") as a,
                safe_open(tmp_path / "n" / "20" / place.replace("0-of-2_tp", "0-of-1_tp"), "pt") as b,
            ):
                assert a.metadata() == b.metadata(), place
                assert torch.equal(a.get_tensor("data"), b.get_tensor("data")), place


@pytest.mark.parametrize("model_type", ["llama", "mixtral", "starcoder2", "olmo2", "mamba"])
def test_a_converted_directory_is_a_checkpoint_to_begin_with(tmp_path, model_type, capsys):
    theirs = save_hf(tmp_path / "hf", model_type, tie_word_embeddings=model_type == "starcoder2")
    assert main(["convert", "hf-to-kenotron", str(tmp_path / "hf"), str(tmp_path / "ckpt"), "--name", "lm"]) == 0
    assert "GB in" in capsys.readouterr().out
    assert (logits(kenotron.from_checkpoint(tmp_path / "ckpt")) - logits(theirs)).abs().max() <= 1e-5
    assert main(["checkpoint", "verify", str(tmp_path / "ckpt")]) == 0


def test_bad_input_is_told(tmp_path, capsys):
    theirs = save_hf(tmp_path / "hf")
    write_nanotron(tmp_path / "n", theirs, interleaved=False)
    step = tmp_path / "n" / "20"

    def refused(*arguments: str) -> str:
        assert main(["convert", *arguments]) == 1
        return capsys.readouterr().err

    assert "is no Nanotron checkpoint" in refused("nanotron-to-kenotron", str(tmp_path), str(tmp_path / "x"))
    victim = step / "model/model/decoder/1/pp_block/mlp/down_proj/model_weight_pp-rank-1-of-2_tp-rank-1-of-2.safetensors"
    kept = victim.read_bytes()
    victim.unlink()
    assert "model.decoder.1.pp_block.mlp.down_proj.weight: element (0, 12) of [16, 24] is in 0 of 1 files" in refused(
        "nanotron-to-kenotron", str(step), str(tmp_path / "x")
    )
    victim.write_bytes(kept[:-8])
    assert "model.decoder.1.pp_block.mlp.down_proj.weight" in refused("nanotron-to-kenotron", str(step), str(tmp_path / "x"))
    victim.write_bytes(kept)
    config = json.loads((step / "model_config.json").read_text())
    (step / "model_config.json").write_text(json.dumps({**config, "intermediate_size": 32}))
    assert "gate_up_proj.weight has shape [48, 16], the configuration wants [64, 16]" in refused(
        "nanotron-to-kenotron", str(step), str(tmp_path / "x")
    )
    (step / "model_config.json").write_text(json.dumps(config))
    nanotron_to_kenotron(step, tmp_path / "ckpt")
    assert "exists" in refused("nanotron-to-kenotron", str(step), str(tmp_path / "ckpt"))
    assert "which tp=3 does not divide" in refused(
        "kenotron-to-nanotron", str(tmp_path / "ckpt"), str(tmp_path / "y"), "--tp=3"
    )
    assert not list(tmp_path.glob(".y*"))
    assert not (tmp_path / "y").exists()
    hf_to_kenotron(save_hf(tmp_path / "olmo", "olmo2") and tmp_path / "olmo", tmp_path / "olmo_ckpt")
    assert "written for llama" in refused("kenotron-to-nanotron", str(tmp_path / "olmo_ckpt"), str(tmp_path / "y"))
