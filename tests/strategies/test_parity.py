"""Every layout of ``bench/parity.py`` trains like one process: those of up to four ranks here, larger ones marked slow."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kenotron.testing import RankPool

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))
import parity

#: Rows that differ little from others here.
ALIKE = (
    "pp 2, afab", "pp 2, accumulate 2, clip", "tp 2, made in configure_model", "dp 2, zero 0, made in configure_model",
    "tp 4 over 2 KV heads", "dp 2 × tp 2, zero 1", "dp 2 × pp 2, zero 0", "ep 2, zero 0", "ep 2 in dp 4, zero 1, accumulate 2",
    "cp 2, ulysses, zero 0, clip", "decoder: tp 2, SP, olmo2", "dp 2, zero 3, full recompute", "mamba: tp 2, SP",
    "mamba2: tp 4 over 2 groups", "llama-bias: tp 2 × pp 2, SP", "qwen3: tp 2 × pp 2, SP", "phi3: tp 2 × pp 2, SP",
    "olmo2: tp 2 × pp 2, SP", "mixtral: tp 2 × pp 2, SP", "gemma3_text: tp 2 × pp 2, SP",
)  # fmt: skip
CASES = [
    pytest.param(c, id=c.name, marks=[pytest.mark.slow] if c.slow or c.ranks > 4 or c.name in ALIKE else [])
    for c in parity.CASES
]
assert {*ALIKE} <= {c.name for c in parity.CASES}


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return {}


@pytest.fixture(scope="module")
def large_pool() -> Iterator[RankPool]:
    with RankPool(16) as processes:
        yield processes


@pytest.mark.parametrize("case", CASES)
def test_layout_trains_like_one_process(
    case: parity.Case,
    pool: RankPool,
    large_pool: RankPool,
    references: dict[str, Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("parity")
    found = parity.run_case(pool if case.ranks <= 4 else large_pool, case, folder, references)
    assert found["loss"] <= parity.LOSS_BAR
    assert found["norm"] <= parity.LOSS_BAR
    assert found["weight"] <= parity.WEIGHT_BAR
