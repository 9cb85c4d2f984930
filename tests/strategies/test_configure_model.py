"""What ``configure_model`` computes is what is trained, on every layout, as in one process of plain Lightning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from strategy_helpers import PP2, SLOW, WIDTH, Classifier, fit_like_one_process
from torch import Tensor, nn

from kenotron.testing import RankPool

PRETRAINED = {"weight": torch.arange(2.0 * WIDTH * WIDTH).view(2 * WIDTH, WIDTH) / 1e3, "bias": torch.ones(2 * WIDTH)}


class Positions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        steps = torch.arange(8)[:, None] / 10000 ** (torch.arange(WIDTH) / WIDTH)
        self.register_buffer("table", torch.sin(steps))
        self.scale = torch.ones(1) * 0.5  # no buffer

    def forward(self, x: Tensor) -> Tensor:
        moved: Tensor = x + self.table[1] * self.scale
        return moved


class Late(Classifier):
    """Built in ``configure_model``, with weights of its own, of others, and of a file."""

    def __init__(self) -> None:
        super().__init__()
        del self.layers, self.head, self.embed
        self.layers: Any = None

    def configure_model(self) -> None:
        if self.layers is not None:
            return
        torch.manual_seed(5)  # like Lightning's DDP, and unlike "auto", the strategy starts from seed_everything's seed again
        early = Classifier()
        self.embed, self.layers, self.head = nn.Sequential(early.embed, Positions()), early.layers, early.head
        self.layers[0].up.load_state_dict(PRETRAINED)
        nn.init.zeros_(self.head.weight)
        for layer in self.layers:
            nn.init.trunc_normal_(layer.down.weight, std=0.1)
        self.layers[1].down.weight.data.mul_(2)
        self.layers[2].up.weight.data.copy_(self.layers[1].down.weight.data.t())
        self.layers[3].up.weight.no_decay = True

    def on_fit_start(self) -> None:
        self.seen = getattr(self.layers[3].up.weight, "no_decay", False)


@pytest.mark.parametrize(
    "layout",
    [(1, {}), (2, {"zero_stage": 3}), (2, {"tp": 2}), pytest.param(PP2, marks=SLOW)],
    ids=["one", "zero3", "tp", "pp"],
)
def test_weights_of_configure_model_are_those_of_one_process(
    pool: RankPool, tmp_path: Path, layout: tuple[int, dict[str, Any]]
) -> None:
    fit_like_one_process(pool, Late, layout, tmp_path, trainer={"max_epochs": 1})


class Unused(Classifier):
    """A loose parameter that no rank uses: weight decay must leave it alone."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.ones(WIDTH))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.02, eps=1e-6, weight_decay=0.5)


def test_a_weight_without_a_gradient_is_left_alone_under_a_pipeline(pool: RankPool, tmp_path: Path) -> None:
    for result in fit_like_one_process(pool, Unused, PP2, tmp_path, trainer={"max_epochs": 1}):
        assert (result["weights"]["unused"] == 1).all()
