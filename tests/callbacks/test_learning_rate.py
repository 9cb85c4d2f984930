"""Learning rates that updates used, read back from TensorBoard's files."""

from __future__ import annotations

import pytest
from recorder_helpers import STEPS, run

from kenotron.optim import Schedule

pytestmark = pytest.mark.timeout(300)


@pytest.mark.parametrize("layout", ["one", "tp2-pp2"])
def test_rates_are_those_of_the_schedule_at_each_update(layout: str) -> None:
    _, events = run("llama", layout)
    factor = Schedule(total_steps=STEPS, warmup_steps=2, decay="cosine")
    for group, base in (("matrices", 1e-3), ("group_1", 5e-4)):
        expected = [(step, pytest.approx(base * factor(step), abs=1e-9)) for step in range(1, STEPS + 1)]
        assert events[f"learning_rate/AdamW/{group}"] == expected
        assert events[f"momentum/AdamW/{group}"] == [(step, pytest.approx(0.9)) for step in range(1, STEPS + 1)]
