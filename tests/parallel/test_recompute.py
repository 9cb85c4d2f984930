"""What blocks keep for the backward pass: which blocks, how much, and that nothing else changes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from kenotron import Recompute


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.dropout = nn.Linear(16, 64), nn.Linear(64, 16), nn.Dropout(0.5)

    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        return x + self.dropout(self.down(torch.nn.functional.gelu(self.up(x)))) * scale


def run(setting: Recompute) -> tuple[Tensor, list[Tensor], int]:
    """Return the output of four blocks, all gradients, and the bytes that were kept outside of parameters."""
    torch.manual_seed(0)
    blocks = nn.ModuleList([Block() for _ in range(4)])
    setting.apply(list(blocks))
    parameters = {p.data_ptr() for p in blocks.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in parameters:
            kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    x = torch.randn(8, 16, requires_grad=True)
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        out = x
        for block in blocks:
            out = block(out, scale=0.5)
    sizes = sum(kept.values())
    out.square().sum().backward()
    return out.detach(), [x.grad, *(p.grad for p in blocks.parameters())], sizes  # type: ignore[list-item]


@pytest.mark.parametrize(
    "setting",
    [
        Recompute(mode="full"),
        Recompute(mode="full", every=2),
        Recompute(mode="selective"),
        Recompute(mode="selective", operators=["aten.gelu"]),
        Recompute(mode="full", offload=True),
        Recompute(offload=True),
    ],
)
def test_outputs_and_gradients_stay_the_same_to_the_bit_dropout_included(setting: Recompute) -> None:
    expected, found = run(Recompute()), run(setting)
    assert torch.equal(found[0], expected[0])
    for one, other in zip(found[1], expected[1], strict=True):
        assert torch.equal(one, other)


def test_full_keeps_inputs_alone_and_every_second_block_half_of_the_rest() -> None:
    everything, inputs = run(Recompute())[2], run(Recompute(mode="full"))[2]
    assert inputs == 4 * 8 * 16 * 4
    assert run(Recompute(mode="full", every=2))[2] == pytest.approx((everything + inputs) / 2, rel=0.02)
    assert run(Recompute(mode="full", budget=0.5))[2] == pytest.approx((everything + inputs) / 2, rel=0.02)


def test_a_budget_spreads_the_blocks_that_are_computed_again_evenly() -> None:
    def chosen(count: int, **settings: float) -> str:
        return "".join("-x"[again] for again in Recompute(mode="full", **settings).chosen(count))  # type: ignore[arg-type]

    assert chosen(8, budget=1) == "--------"
    assert chosen(8, budget=0) == "xxxxxxxx"
    assert chosen(8, budget=0.75) == "---x---x"
    assert chosen(10, budget=0.6) == "--x-x--x-x"
    assert chosen(7, every=3) == "x--x--x"


def test_nothing_is_kept_where_no_gradient_is_asked_for() -> None:
    block = Block()
    Recompute(mode="full").apply([block])
    with torch.no_grad():
        assert not block(torch.ones(2, 16)).requires_grad


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"mode": "all"}, r"recompute='all' is unknown\. Set it to one of 'none', 'full', 'selective'"),
        ({"mode": "full", "every": 0}, "every=0: set it to 1"),
        ({"mode": "full", "budget": 1.5}, "budget=1.5: set the share"),
        ({"mode": "full", "budget": 0.5, "every": 2}, "both say which blocks"),
        ({"mode": "selective", "operators": ["mm"]}, "torch has no 'mm'. Name them as its dispatcher does"),
        ({"mode": "selective", "operators": ["aten.matrix"]}, "torch has no 'aten.matrix'"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, object], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        Recompute(**settings)  # type: ignore[arg-type]
