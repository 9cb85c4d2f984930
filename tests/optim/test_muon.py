"""Muon trains on every layout as on one process, where it is torch's; state goes to any other layout."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from optim_helpers import SIZES, Run, decoder, experts, token_rows, train
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import kenotron
from kenotron.optim import Muon, Rule, muon_groups
from kenotron.optim.muon import orthogonalise
from kenotron.testing import RankPool

DOUBLE = {"precision": "64-true"}


def muon(module: nn.Module) -> Muon:
    return Muon(muon_groups(module, lr=0.02, adamw_lr=0.01, weight_decay=0.05))


def precise(module: nn.Module) -> Muon:
    """In float64: in bfloat16 the last digit of a gradient, which differs between layouts, moves an update by up to 1e-2."""
    return Muon(muon_groups(module, lr=0.02, adamw_lr=0.01, weight_decay=0.05), ns_dtype=torch.float64)


def llama() -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, "tie_word_embeddings": False}))


def plain_loop(model: nn.Module, optimizers: list[torch.optim.Optimizer], steps: int) -> list[float]:
    losses = []
    for batch in token_rows(steps):
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def whole(path: str) -> dict[str, Tensor]:
    return {name.removeprefix("model."): value for name, value in kenotron.load_state_dict(path).items()}


def furthest(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert found.keys() == expected.keys()
    return max(float((found[name] - expected[name]).abs().max()) for name in expected)


def torch_muon(start: dict[str, Tensor], steps: int) -> tuple[list[float], dict[str, Tensor]]:
    """Train a Llama with torch's Muon and AdamW in this process, in float64 throughout."""
    model = llama().double()
    model.load_state_dict(start)
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n and "lm_head" not in n]
    embeddings = [p for n, p in model.named_parameters() if "embed" in n]
    heads, norms = [model.lm_head.weight], [p for p in model.parameters() if p.ndim == 1]
    adamw: dict[str, Any] = {"lr": 0.01, "betas": (0.9, 0.95)}
    optimizers = [
        torch.optim.Muon(matrices, lr=0.02, weight_decay=0.05),
        torch.optim.AdamW(heads, weight_decay=0.05, **adamw),
        torch.optim.AdamW(embeddings + norms, weight_decay=0.0, **adamw),
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "bfloat16", Tensor.clone)
        losses = plain_loop(model, optimizers, steps)
    return losses, {name: value.detach() for name, value in model.state_dict().items()}


@pytest.fixture(scope="module")
def torch_reference(optim_pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[float], dict[str, Tensor]]:
    path = str(tmp_path_factory.mktemp("muon") / "start")
    optim_pool.run(train, 1, Run(llama, precise, {}, steps=0, path=path, trainer=DOUBLE))
    return torch_muon(whole(path), 4)


LAYOUTS: list[tuple[int, dict[str, Any]]] = [
    (1, {}),
    (2, {"tp": 2}),
    (2, {"zero_stage": 0}),
    (2, {"zero_stage": 1}),
    (2, {"zero_stage": 2}),
    (2, {"zero_stage": 3}),
    (4, {"tp": 2, "zero_stage": 3}),
    (4, {"tp": 4}),
    (2, {"pp": 2}),
    (4, {"dp_replicate": 2, "zero_stage": 3}),
    (4, {"tp": 2, "pp": 2}),
    (2, {"cp": 2}),
]


@pytest.mark.parametrize(("ranks", "layout"), LAYOUTS)
def test_muon_on_every_layout_is_torchs_on_one_process(
    optim_pool: RankPool,
    tmp_path: Path,
    torch_reference: tuple[list[float], dict[str, Tensor]],
    ranks: int,
    layout: dict[str, Any],
) -> None:
    path = str(tmp_path / "end")
    for losses in optim_pool.run(train, ranks, Run(llama, precise, layout, path=path, trainer=DOUBLE)):
        assert losses == pytest.approx(torch_reference[0], rel=1e-6)  # loggers keep float32
    assert furthest(whole(path), torch_reference[1]) < 1e-6
