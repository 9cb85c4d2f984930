"""What user code holds on to from before the module is cut is what is trained, on every layout, or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from strategy_helpers import Block, Classifier, Task, fit, fit_like_one_process
from torch import Tensor, nn

from kenotron.parallel.shards import ReplacedParameter, set_part, take_over
from kenotron.testing import RankPool

LAYOUTS = {
    "tp2": (2, {"tp": 2}),
    # A hook that changes what was accumulated runs once for each microbatch.
    "pp2": (2, {"pp": 2, "microbatches": 1, "schedule": "afab"}),
    "zero3": (2, {"zero_stage": 3}),
    "tp2-zero3": (4, {"tp": 2, "zero_stage": 3}),
}
ALL = pytest.mark.parametrize("layout", LAYOUTS)


class Marked(Classifier):
    """Its parameters have attributes and gradient hooks, and its optimizer is made in __init__."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []
        for layer in self.layers:
            assert isinstance(layer, Block)
            layer.up.weight.__dict__["_rate"] = 0.1
            layer.down.weight.register_hook(lambda grad: 0.5 * grad)
            layer.up.bias.register_post_accumulate_grad_hook(_halve)
        self.early = torch.optim.SGD(self.groups(), lr=0.05)
        self.kept = list(self.parameters())

    def groups(self) -> list[dict[str, Any]]:
        marked = [p for p in self.parameters() if hasattr(p, "_rate")]
        return [{"params": marked, "lr": 0.2}, {"params": [p for p in self.parameters() if not hasattr(p, "_rate")]}]

    def configure_optimizers(self) -> Any:
        self.seen = [len(group["params"]) for group in self.groups()]
        return self.early


def _halve(param: Tensor) -> None:
    assert param.grad is not None
    param.grad.mul_(0.5)


@ALL
def test_attributes_hooks_and_an_early_optimizer_stay_with_the_parameters(pool: RankPool, layout: str, tmp_path: Path) -> None:
    results = fit_like_one_process(pool, Marked, LAYOUTS[layout], tmp_path, rows=16, val_rows=0)
    assert all(result["seen"] == results[0]["seen"] for result in results)


class Penalised(Classifier):
    """Computes with parameters that it put into a list before they were cut."""

    def __init__(self) -> None:
        super().__init__()
        self.kept = [layer.norm.weight for layer in self.layers if isinstance(layer, Block)]

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch, batch_idx) + 0.1 * sum(weight.square().sum() for weight in self.kept)


def fails(task: Task) -> str:
    try:
        fit(task)
    except ValueError as error:
        return str(error)
    return "trained"


def test_parameters_kept_in_a_list_are_those_that_are_trained(pool: RankPool, tmp_path: Path) -> None:
    fit_like_one_process(pool, Penalised, (2, {"tp": 2}), tmp_path, rows=16, val_rows=0)


@pytest.mark.parametrize("layout", ["pp2", "zero3"])
def test_parameters_kept_in_a_list_that_are_elsewhere_are_refused(pool: RankPool, layout: str) -> None:
    ranks, strategy = LAYOUTS[layout]
    for text in pool.run(fails, ranks, Task(Penalised, strategy, rows=16, val_rows=0)):
        assert "computes with" in text or "is used that was taken from the module before" in text


class Foreign(Classifier):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([*self.parameters(), nn.Parameter(torch.zeros(3))], lr=0.1)


def test_an_optimizer_over_parameters_of_nobody_is_refused(pool: RankPool) -> None:
    for text in pool.run(fails, 2, Task(Foreign, {"zero_stage": 0}, rows=16, val_rows=0)):
        assert "none of the LightningModule's (shapes (3,))" in text


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_part_may_be_set_while_a_graph_holds_the_accumulator(dtype: torch.dtype) -> None:
    param = nn.Parameter(torch.arange(8.0, dtype=dtype))
    graph = param * 2
    graph.sum().backward(retain_graph=True)  # type: ignore[no-untyped-call]
    set_part(param, param.detach()[:2].clone())
    (param * 3).sum().backward()  # type: ignore[no-untyped-call]
    assert param.grad is not None and param.grad.tolist() == [3.0, 3.0]


def test_a_handle_removes_a_hook_from_what_took_over() -> None:
    old, new = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    handle = old.register_hook(lambda grad: 5 * grad)
    take_over(old, new)
    new.sum().backward()  # type: ignore[no-untyped-call]
    assert new.grad is not None and new.grad.tolist() == [5.0, 5.0]
    handle.remove()
    new.grad = None
    new.sum().backward()  # type: ignore[no-untyped-call]
    assert new.grad is not None and new.grad.tolist() == [1.0, 1.0]


def test_what_was_replaced_can_be_looked_at_but_not_used() -> None:
    old = nn.Parameter(torch.ones(4, 2))
    take_over(old, nn.Parameter(torch.ones(2, 2)))
    assert isinstance(old, ReplacedParameter) and old.requires_grad and old.grad is None
    for use in (lambda: old.norm(), lambda: F.linear(torch.ones(1, 2), old), lambda: old.mul_(2), old.clone):
        with pytest.raises(ValueError, match=r"a parameter of shape \(4, 2\) is used"):
            use()
