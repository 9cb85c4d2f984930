"""The table at the end of ``fit``: once, on rank 0, with a row for each name; and what CSV has besides TensorBoard."""

from __future__ import annotations

import pytest
from recorder_helpers import run

pytestmark = pytest.mark.timeout(300)


def test_one_rank_prints_one_table() -> None:
    results, _ = run("llama", "tp2-pp2")
    printed = [result["printed"] for result in results]
    assert printed[0].count("6 steps") == 1 and printed[1:] == ["", "", ""]
    for name in ("throughput/tokens_per_second", "memory/host_peak_gib", "gradient_norm/total", "learning_rate/AdamW/matrices",
                 "garbage/collect_seconds"):  # fmt: skip
        assert printed[0].count(f"{name} ") == 1
    assert "/layer/" not in printed[0]
