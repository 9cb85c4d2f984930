"""What a trace counts against the real model: parameters to the last one, operations as torch counts them, memory that
lives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from planning_helpers import LLAMA, SIZES, make, spec
from torch.utils.flop_counter import FlopCounterMode

from kenotron.parallel.recompute import Recompute
from kenotron.planning.meter import Meter
from kenotron.planning.model import ModelSpec, name_of
from kenotron.planning.trace import Cut, compute_loss, trace

MODELS: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "tied": {**LLAMA, "tie_word_embeddings": True},
    "gpt_neox": {"model_type": "gpt_neox", **SIZES, "max_position_embeddings": 256},
    "qwen3_moe": {
        "model_type": "qwen3_moe", **SIZES, "num_key_value_heads": 2, "head_dim": 16, "num_experts": 4,
        "num_experts_per_tok": 2, "moe_intermediate_size": 64, "mlp_only_layers": [0],
    },
    "mamba2": {
        "model_type": "mamba2", "hidden_size": 64, "num_hidden_layers": 4, "vocab_size": 256, "state_size": 8, "num_heads": 8,
        "head_dim": 16, "n_groups": 2, "chunk_size": 8,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_parts_have_the_parameters_of_the_real_model(name: str) -> None:
    model = spec(MODELS[name])
    found = trace(model, Cut(seq=64))
    blocks = sum(found.kinds[kind].elements + found.kinds[kind].expert_elements for kind in model.kinds)
    around = found.before.elements + found.after.elements
    real = sum(p.numel() for p in make(MODELS[name]).parameters())
    assert blocks + around == real == model.num_parameters


class Late(torch.nn.Module):
    """As a LightningModule that makes its model late."""

    def configure_model(self) -> None:
        self.model = make(LLAMA)


def test_a_module_by_its_import_path_is_built_by_itself() -> None:
    found = ModelSpec.load("test_plan_traces:Late")
    assert found.num_parameters == spec().num_parameters
    assert all(param.is_meta for param in found.prototype.parameters())


def test_like_blocks_are_traced_once() -> None:
    assert spec(LLAMA).kinds == (0, 0, 0, 0)
    assert spec(MODELS["qwen3_moe"]).kinds == (0, 1, 1, 1)  # a dense layer, then experts


def test_operations_are_those_that_torch_counts() -> None:
    model, ids = make(LLAMA, "transformers"), torch.zeros(1, 64, dtype=torch.long)
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        compute_loss(model, ids).backward()
    found = trace(spec(LLAMA, "transformers"), Cut(seq=64))
    parts = [found.before, *found.kinds * 4, found.after]
    products = sum(p.forward.gemm_flops.at(1) + p.backward.gemm_flops.at(1) for p in parts)
    # Attention's backward pass computes its scores again; torch's plain one kept them.
    attention = sum(p.forward.attention_flops.at(1) for p in parts) * 3
    assert products + attention == counter.get_total_flops()


def test_tensor_parallel_parts_are_cut_as_in_training() -> None:
    whole, half = trace(spec(), Cut(seq=64)), trace(spec(), Cut(seq=64, tp=2))
    norms = 2 * SIZES["hidden_size"]
    assert half.kinds[0].elements - norms == (whole.kinds[0].elements - norms) / 2
    assert half.kinds[0].forward.gemm_flops.at(1) == whole.kinds[0].forward.gemm_flops.at(1) / 2
    sent = half.kinds[0].forward.sent["all_reduce"].at(1)
    assert sent == 2 * 64 * SIZES["hidden_size"] * 4  # after attention and after the MLP


def test_recompute_keeps_less_and_computes_more() -> None:
    none, full, selective = (trace(spec(), Cut(seq=64, recompute=Recompute(mode=m))) for m in ("none", "full", "selective"))  # type: ignore[arg-type]
    kept = [found.kinds[0].kept.at(1) for found in (full, selective, none)]
    assert kept[0] == 64 * SIZES["hidden_size"] * 4  # the block's output, which is the next one's input
    assert kept[0] < kept[1] < kept[2]
    again = full.kinds[0].backward.gemm_flops.at(1) - none.kinds[0].backward.gemm_flops.at(1)
    # All but the last product, whose result no backward pass needs.
    assert 0.7 * none.kinds[0].forward.gemm_flops.at(1) < again < none.kinds[0].forward.gemm_flops.at(1)


def test_experts_are_spread() -> None:
    whole, spread = (trace(spec(MODELS["qwen3_moe"]), Cut(seq=64, ep=ep)) for ep in (1, 2))
    assert spread.kinds[1].expert_elements * 2 == whole.kinds[1].expert_elements > 0
    assert spread.kinds[1].elements == whole.kinds[1].elements


def test_a_model_that_tp_does_not_divide_says_so() -> None:
    with pytest.raises(ValueError, match="tp=3 does not divide"):
        trace(spec(), Cut(seq=64, tp=3))


def test_meter_counts_what_lives() -> None:
    meter = Meter(["0"])
    with meter:
        one = torch.ones(1000)
        two = one + 1
        del one
        three = two.view(10, 100)
        meter.enter("0")
    assert meter.parts["before"].kept == 4000
    assert meter.parts["before"].in_forward == 8000
    assert three.shape == (10, 100)


def test_a_model_is_called_after_its_folder_or_file_dots_included(tmp_path: Path) -> None:
    folder = tmp_path / "llama-3.1-405b"
    folder.mkdir()
    for name in ("config.json", "llama-3.1-8b.json"):
        (folder / name).touch()
    places = [folder, f"{folder}/", folder / "config.json", folder / "llama-3.1-8b.json", "package.module:name"]
    assert list(map(name_of, places)) == ["llama-3.1-405b"] * 3 + ["llama-3.1-8b", "package.module:name"]
