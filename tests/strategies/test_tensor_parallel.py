"""Tensor parallelism of modules that are not quite what a plan expects: one process's numbers, or an error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from strategy_helpers import CLASSES, WIDTH, Classifier, Task, close, fit
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from kenotron.parallel.shards import canonical
from kenotron.testing import RankPool

BINS = 32


class ScaledEmbedding(nn.Embedding):
    """As Gemma's: it looks at its weight, and scales what it looked up."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * torch.tensor(3.0).to(self.weight.dtype)


class OwnLookup(nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        return F.embedding(input % self.num_embeddings, self.weight)


EMBEDDINGS: dict[str, Any] = {kind.__name__: kind for kind in (nn.Embedding, ScaledEmbedding, OwnLookup)}


class Block(nn.Module):
    """Linears are called by keyword, with a parameter between them, and a hook changes what the second one returns."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(0.7))
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH, bias=False)
        self.down.register_forward_hook(lambda m, args, out: out.tanh())
        self.up.register_forward_hook(lambda m, args, out: None)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = x + self.down(input=torch.tanh(self.slope * self.up(input=x)))
        return hidden


class Odd(Classifier):
    """Features are binned and looked up; blocks are those of above, one of them with a compiled linear."""

    def __init__(self, embedding: str = "ScaledEmbedding", compiles: bool = True, fused: bool = False, **lookup: Any) -> None:
        super().__init__(depth=0)
        self.embed = EMBEDDINGS[embedding](BINS, WIDTH, **lookup)  # type: ignore[assignment]
        self.fused = fused
        self.layers = nn.ModuleList(Block() for _ in range(2))
        if compiles:
            self.layers[0].up = torch.compile(self.layers[0].up, backend="eager")  # type: ignore[assignment]
        self.head = nn.Linear(WIDTH, CLASSES + 1)
        self.sharpness = nn.Parameter(torch.tensor(1.5))  # of logits that are split

    def parallel_plan(self) -> dict[str, str]:
        cuts = {"layers.*.up": "colwise", "layers.*.down": "rowwise"}
        return {**cuts, "embed": "vocab_embedding", "head": "vocab_head"}

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.embed((x.sigmoid() * BINS).long()).sum(1)
        for layer in self.layers:
            hidden = layer(hidden)
        if self.fused:  # outside of the head, as fused losses do
            assert self.head.weight.shape[0] == CLASSES + 1
            return self.sharpness * F.linear(hidden, self.head.weight, self.head.bias)
        logits: Tensor = self.sharpness * self.head(input=hidden)
        return logits


@pytest.mark.parametrize(
    "settings",
    [{}, {"embedding": "Embedding", "compiles": False, "fused": True, "padding_idx": 17, "scale_grad_by_freq": True}],
    ids=["scaled embedding", "embedding by frequency, fused head"],
)
def test_odd_modules_train_like_one_process(settings: dict[str, Any], pool: RankPool, tmp_path: Path) -> None:
    task = {"settings": settings, "trainer": {"max_epochs": 1}, "val_rows": 0}
    expected = pool.run(fit, 1, Task(Odd, None, **task))[0]  # type: ignore[arg-type]
    for found in pool.run(fit, 2, Task(Odd, {"tp": 2}, folder=str(tmp_path), **task)):  # type: ignore[arg-type]
        close(found["losses"], expected["losses"])
        close(found["weights"], {canonical(name): weight for name, weight in expected["weights"].items()}, 1e-4)


class Parametrised(Classifier):
    def __init__(self) -> None:
        super().__init__(depth=1)
        self.layers[0].up = parametrizations.weight_norm(nn.Linear(WIDTH, 2 * WIDTH, bias=False))


class Gated(nn.Module):
    """What is between the linears is multiplied by something that came around the first."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = x + self.down(torch.tanh(self.up(x)) * x.mean(-1, keepdim=True))
        return hidden


class Leaking(Classifier):
    def __init__(self) -> None:
        super().__init__(depth=1)
        self.layers[0] = Gated()


class OwnProduct(Odd):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) @ (self.head.weight @ self.head.weight.T)


@pytest.mark.parametrize(
    ("module", "settings", "words"),
    [
        (Parametrised, {}, r"plan\['layers.0.up'\].*no parameter of it"),
        (
            Odd,
            {"embedding": "OwnLookup", "compiles": False},
            r"OwnLookup does more than super\(\).forward\(ids\)",
        ),
    ],
)
def test_what_can_not_be_cut_is_refused(
    module: Any, settings: dict[str, Any], words: str, pool: RankPool, tmp_path: Path
) -> None:
    with pytest.raises(RuntimeError, match=words) as failure:
        pool.run(fit, 2, Task(module, {"tp": 2}, settings=settings, folder=str(tmp_path)))
    assert "ValueError" in str(failure.value)
