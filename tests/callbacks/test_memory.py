"""Memory: the shards of the fullest rank."""

from __future__ import annotations

import pytest
from recorder_helpers import Model, run

from kenotron.callbacks.memory import num_bytes

pytestmark = pytest.mark.timeout(300)


def test_parts_are_what_a_rank_keeps() -> None:
    whole = num_bytes(Model().parameters())
    _, one = run("llama", "one")
    _, split = run("llama", "tp2-pp2")
    for _, value in one["memory/parameters_gib"] + one["memory/gradients_gib"]:
        assert value * 2**30 == pytest.approx(whole, rel=1e-6)
    # Two moments each, and a count of steps for each parameter.
    assert all(2 <= value * 2**30 / whole < 2.01 for _, value in one["memory/optimizer_gib"])
    for name in ("parameters", "gradients", "optimizer"):
        assert 0.2 < split[f"memory/{name}_gib"][0][1] / one[f"memory/{name}_gib"][0][1] < 0.5
    assert all(value > 0.05 for _, value in one["memory/host_peak_gib"])
