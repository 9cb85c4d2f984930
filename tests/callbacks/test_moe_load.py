"""Loads of experts in the loggers."""

from __future__ import annotations

import lightning as L
import pytest
from recorder_helpers import Model, loader, quiet, run

import kenotron
from kenotron.callbacks import MoELoad

pytestmark = pytest.mark.timeout(300)


@pytest.mark.parametrize("layout", ["one", "tp2-ep2"])
def test_loads_of_each_layer_are_logged(layout: str) -> None:
    _, events = run("moe", layout)
    _, one = run("moe", "one")
    imbalances = [values for name, values in events.items() if name.startswith("moe/lm.") and name.endswith("/imbalance")]
    assert len(imbalances) == 4
    for index, (step, worst) in enumerate(events["moe/max_imbalance"]):
        assert worst == max(values[index][1] for values in imbalances) >= 1.0
        assert (step, worst) == (
            one["moe/max_imbalance"][index][0],
            pytest.approx(one["moe/max_imbalance"][index][1], abs=0.02),
        )


def test_experts_and_routers_count_their_flops_once() -> None:
    one, spread = (run("moe", layout)[0] for layout in ("one", "tp2-ep2"))
    assert {rank["flops"] for rank in spread} == {one[0]["flops"]}


def test_bad_input_is_told() -> None:
    quiet()
    settings = {"accelerator": "cpu", "max_steps": 1, "logger": False, "enable_progress_bar": False, "callbacks": [MoELoad()]}
    with pytest.raises(ValueError, match=r"SingleDeviceStrategy.*strategy='kenotron'"):
        L.Trainer(**settings).fit(Model(), loader(8))
    with pytest.raises(ValueError, match="the model has no experts"):
        L.Trainer(**settings, strategy=kenotron.KenotronStrategy(), devices=1).fit(Model(), loader(8))
