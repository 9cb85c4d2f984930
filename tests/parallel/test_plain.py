"""What tensor parallelism takes for granted of a module is looked at, and everything else refused by its full name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from kenotron.models.head import Head
from kenotron.models.layers import FusedLinear, RMSNorm
from kenotron.parallel.plain import check_embedding, check_linear, check_norm, check_rows, class_name, enclosing, watch_hooks


class Scaled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


class Adapted(nn.Linear):
    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.down = nn.Linear(8, 2)


class Quantised(nn.Parameter):
    pass


def _old_weight_norm(module: nn.Linear) -> nn.Module:
    return torch.nn.utils.weight_norm(module)


def _pruned(module: nn.Linear) -> nn.Module:
    return prune.l1_unstructured(module, "weight", 0.5)  # type: ignore[no-untyped-call, no-any-return]


def _replaced(module: nn.Linear) -> nn.Module:
    module.forward = lambda x: x  # type: ignore[method-assign]
    return module


def _quantised(module: nn.Linear) -> nn.Module:
    module.weight = Quantised(module.weight.detach())
    return module


def _normed_bias(module: nn.Linear) -> nn.Module:
    return parametrizations.weight_norm(module, "bias")


MADE = {
    "weight norm": (lambda: parametrizations.weight_norm(nn.Linear(8, 8, bias=False)), "weight of .*Linear is no param"),
    "spectral norm": (lambda: parametrizations.spectral_norm(nn.Linear(8, 8)), "weight of .* is no parameter of it"),
    "weight norm of old": (lambda: _old_weight_norm(nn.Linear(8, 8)), r"weight of torch.nn.modules.linear.Linear is no param"),
    "pruned": (lambda: _pruned(nn.Linear(8, 8)), "weight of .* is no parameter of it"),
    "bias alone": (lambda: _normed_bias(nn.Linear(8, 8)), "bias of .* is no parameter of it"),
    "own forward": (lambda: Scaled(8, 8), r"test_plain\.Scaled has a forward of its own"),
    "replaced forward": (lambda: _replaced(nn.Linear(8, 8)), "forward of this .* has been replaced"),
    "adapter": (lambda: Adapted(8, 8), r"Adapted has further parameters \(down.weight, down.bias\)"),
    "quantised": (lambda: _quantised(nn.Linear(8, 8)), r"weight of .* is a .*test_plain\.Quantised"),
    "no linear": (lambda: nn.Bilinear(8, 8, 8), "applies to nn.Linear, but the module is a .*\\.linear\\.Bilinear"),
    "head in the plan as a linear": (lambda: Head(8, 8), "Head has a forward of its own"),
}  # fmt: skip


@pytest.mark.parametrize("style", ["colwise", "rowwise"])
@pytest.mark.parametrize("what", MADE)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_linears_that_are_no_plain_ones_are_refused(what: str, style: str) -> None:
    make, words = MADE[what]
    with pytest.raises(ValueError, match=words):
        check_linear(make(), "up", style)


def test_plain_linears_are_taken() -> None:
    class Named(nn.Linear):
        """Only a name."""

    for module in (nn.Linear(8, 8), nn.Linear(8, 8, bias=False), Named(8, 8), FusedLinear(8, (4, 4))):
        check_linear(module, "up", "colwise")
    check_linear(Head(8, 8), "head", "vocab_head")
    check_linear(nn.Linear(8, 8), "head", "vocab_head")


def test_norms_rows_and_embeddings_are_looked_at() -> None:
    class Twice(RMSNorm):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    check_norm(RMSNorm(8, 1e-6), "norm")
    with pytest.raises(ValueError, match="Twice has a forward of its own"):
        check_norm(Twice(8, 1e-6), "norm")
    with pytest.raises(ValueError, match=r"kenotron's norms, not to torch\.nn\.modules\.normalization\.LayerNorm"):
        check_norm(nn.LayerNorm(8), "norm")
    check_rows(nn.Conv1d(8, 8, 3), "conv")
    with pytest.raises(ValueError, match="further parameters"):
        check_rows(nn.Sequential(nn.Conv1d(8, 8, 3)), "conv")
    check_embedding(nn.Embedding(8, 8, padding_idx=0, sparse=True), "embed")
    with pytest.raises(ValueError, match=r"max_norm=1.0.*Set max_norm=None"):
        check_embedding(nn.Embedding(8, 8, max_norm=1.0), "embed")
    with pytest.raises(ValueError, match=r"weight of .*ParametrizedEmbedding is no parameter"):
        check_embedding(parametrizations.weight_norm(nn.Embedding(8, 8)), "embed")


def test_hooks_on_parts_may_look_and_not_change() -> None:
    seen: list[Any] = []
    module = nn.Linear(8, 8)
    module.register_forward_hook(lambda m, args, out: seen.append(out))
    watch_hooks(module._forward_hooks, "up", "the output")
    module(torch.zeros(1, 8))
    assert len(seen) == 1
    module.register_forward_hook(lambda m, args, out: 2 * out)
    watch_hooks(module._forward_hooks, "up", "the output")
    with pytest.raises(ValueError, match="a hook on 'up' changes the output"):
        module(torch.zeros(1, 8))


def test_wrappers_are_no_parents() -> None:
    assert enclosing("layers.0._orig_mod.attn.q_proj._orig_mod") == "layers.0._orig_mod.attn"
    assert enclosing("up") == "" and class_name(nn.Linear(1, 1)) == "torch.nn.modules.linear.Linear"
