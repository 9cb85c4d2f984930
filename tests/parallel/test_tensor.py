"""What becomes of modules under tensor and sequence parallelism that needs no ranks to be seen."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from kenotron import Float8
from kenotron.parallel import sequence, tensor
from kenotron.parallel.plan import ParallelPlan, find_plan
from kenotron.parallel.region import Region
from kenotron.parallel.shards import Shards
from kenotron.parallel.shares import ShareCheck, gradients_met
from kenotron.parallel.tensor import TensorParallel


def _axis(size: int = 2) -> TensorParallel:
    group: Any = None  # nobody to talk to
    return TensorParallel(group=group, rank=0, size=size, shards=Shards(tp=size), device=torch.device("cpu"))


class Experts(nn.Module):
    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.is_transposed = transposed
        up, down = ((2, 6, 16), (2, 8, 6)) if transposed else ((2, 16, 6), (2, 6, 8))
        self.gate_up_proj, self.down_proj = nn.Parameter(torch.rand(up)), nn.Parameter(torch.rand(down))


@pytest.mark.parametrize(
    ("transposed", "up", "down"),
    [(False, "packed_colwise", "rowwise"), (True, "packed_colwise", "rowwise"), (True, "packed_rowwise", "colwise")],
)
def test_experts_are_cut_along_what_lies_between_their_matrices(transposed: bool, up: str, down: str) -> None:
    root = nn.ModuleDict({"experts": Experts(transposed)})
    _axis().apply(root, {"experts.gate_up_proj": up, "experts.down_proj": down})
    shapes = [tuple(param.shape) for param in root.parameters()]
    assert shapes == ([(2, 6, 8), (2, 4, 6)] if transposed else [(2, 8, 6), (2, 6, 4)])


def test_experts_are_not_cut_along_the_hidden_size() -> None:
    root = nn.ModuleDict({"experts": Experts(False)})
    with pytest.raises(ValueError, match=r"'experts.down_proj'\] = 'colwise' would split the hidden size"):
        _axis().apply(root, {"experts.down_proj": "colwise"})


def test_float8_leaves_the_sum_over_tp_before_the_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for torchao, whose products are twice what they should be."""
    monkeypatch.setattr(tensor, "reduce_from", lambda x, group: x + 100)
    monkeypatch.setitem(sys.modules, "torchao", ModuleType("torchao"))
    monkeypatch.setitem(sys.modules, "torchao.float8", _twice())
    block = nn.ModuleDict({"down": nn.Linear(16, 16), "plain": nn.Linear(16, 16)})
    down, plain = block["down"], block["plain"]
    x = torch.rand(2, 16)
    _axis(1).apply(block, {"down": "rowwise"})
    torch.testing.assert_close(down(x), F.linear(x, down.weight) + 100 + down.bias)
    assert Float8(emulate=True).apply([block]) == 2
    torch.testing.assert_close(down(x), 2 * F.linear(x, down.weight) + 100 + down.bias)
    torch.testing.assert_close(plain(x), 2 * F.linear(x, plain.weight) + plain.bias)


def _twice() -> Any:
    class Twice(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            product = 2 * F.linear(input, self.weight)
            return product if self.bias is None else product + self.bias

    def convert(layer: nn.Linear, config: Any) -> nn.Module:
        return Twice(layer.in_features, layer.out_features, layer.bias is not None, device="meta")

    module: Any = ModuleType("torchao.float8")
    module.Float8LinearConfig = SimpleNamespace(from_recipe_name=lambda name: _Config())
    module.convert_to_float8_training = convert
    return module


def _Config() -> Any:
    import dataclasses

    return dataclasses.make_dataclass("Config", [("emulate", bool, False)])()


# ---- Plans -------------------------------------------------------------------------------------------------------------


def _llama() -> Any:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 64}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **sizes))


def test_styles_that_are_not_known_matter_under_tp_alone() -> None:
    model = _llama()
    model.config.base_model_tp_plan = {"layers.*.self_attn": "local_params"}
    found = find_plan(nn.ModuleDict({"model": model}), ParallelPlan(blocks="layers"))
    assert found is not None and not found.tensor and found.blocks == "layers"
    assert "LlamaForCausalLM uses local_params, which tensor parallelism here does not know" in found.unreadable


def test_plans_see_through_compiled_modules() -> None:
    whole, parts = nn.ModuleDict({"model": _llama()}), nn.ModuleDict({"model": _llama()})
    plain = find_plan(whole, None)
    inner: Any = parts["model"]
    inner.model.layers[0] = torch.compile(inner.model.layers[0], backend="eager")
    inner.model.layers[1].mlp.up_proj = torch.compile(inner.model.layers[1].mlp.up_proj, backend="eager")
    parts["model"] = torch.compile(inner, backend="eager")  # type: ignore[assignment]
    found = find_plan(parts, None)
    assert plain is not None and found is not None and found.tensor == plain.tensor
    names = set(found.resolve(parts))
    assert len(names) == len(plain.resolve(whole))
    assert "model._orig_mod.model.layers.1.mlp.up_proj._orig_mod" in names


# ---- Gradients ---------------------------------------------------------------------------------------------------------


def test_leaves_without_collectives_have_whole_gradients() -> None:
    a, b = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    group: Any = None
    assert gradients_met([(a * b.detach()).sum(), torch.zeros(())], group) == {a: {0}}


def test_parameters_beside_split_linears_want_a_first_step_without_compiling() -> None:
    group: Any = None
    shards = Shards(tp=2)
    cut = TensorParallel(group=group, rank=0, size=2, shards=shards, device=torch.device("cpu"))
    root = nn.ModuleDict({"mlp": nn.ModuleDict({"down": nn.Linear(8, 8, bias=False)})})
    cut.apply(root, {"mlp.down": "rowwise"})
    for further, expected in ((["mlp.down.weight", "norm.weight"], False), (["mlp.act.alpha"], True)):
        assert ShareCheck(group, shards, {"mlp"}, further).needs_graph is expected


# ---- Sequences ---------------------------------------------------------------------------------------------------------


def test_regions_know_where_the_sequence_is() -> None:
    region = Region()
    x = torch.arange(24.0).view(2, 4, 3)
    assert region.enter(x) is x
    half = x[:, :2]
    assert torch.equal(region.leave(x, lambda y: y[:, :2]), half)
    assert torch.equal(region.leave(x.flatten(0, 1), lambda y: y[:, :2]), half.flatten(0, 1))
    for wrong in (x.transpose(0, 1), x[:, 0], x.flatten()):
        with pytest.raises(ValueError, match=r"sequences \[2, 4, …\] enter a part of a block"):
            region.leave(wrong, lambda y: y)


class OverTokensNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x / x.norm(dim=1, keepdim=True)


class EachTokenNorm(OverTokensNorm):
    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x / x.norm(dim=-1, keepdim=True)


class MeanLayerNorm(nn.LayerNorm):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) - input.mean(1, keepdim=True)


def test_norms_that_look_at_other_tokens_get_whole_sequences() -> None:
    norms = [OverTokensNorm(), EachTokenNorm(), nn.LayerNorm(8), MeanLayerNorm(8), nn.LayerNorm((4, 8)), nn.RMSNorm(8)]
    block = nn.ModuleDict({str(index): norm for index, norm in enumerate(norms)})
    found = sequence.regions_of(block, "b", {})
    assert found.slices == ("b.1", "b.2", "b.5") and found.whole == ("b.0", "b.3", "b.4")
