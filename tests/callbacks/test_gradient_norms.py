"""Norms of gradients per group and layer: those of one process on any layout, and histograms that count each element once."""

from __future__ import annotations

import pytest
from recorder_helpers import Model, run

from kenotron.callbacks.gradient_norms import layer_of

pytestmark = pytest.mark.timeout(300)


@pytest.mark.parametrize("layout", ["tp2-pp2", "ddp", pytest.param("dp2-zero3-full", marks=pytest.mark.slow)])
def test_norms_are_those_of_one_process(layout: str) -> None:
    _, one = run("llama", "one")
    _, found = run("llama", layout)
    names = [name for name in one if name.startswith("gradient_norm/")]
    assert {"gradient_norm/total", "gradient_norm/group/matrices", "gradient_norm/layer/lm.model.layers.3"} <= set(names)
    for name in names:
        assert [step for step, _ in found[name]] == [1, 2, 3, 4, 5, 6]
        assert [v for _, v in found[name]] == pytest.approx([v for _, v in one[name]], rel=1e-5), name


def test_norms_of_layers_make_up_the_total() -> None:
    _, one = run("llama", "one")
    layers = [values for name, values in one.items() if name.startswith("gradient_norm/layer/")]
    for index, (_, whole) in enumerate(one["gradient_norm/total"]):
        assert sum(values[index][1] ** 2 for values in layers) ** 0.5 == pytest.approx(whole, rel=1e-5)


def test_histograms_have_every_element_once() -> None:
    sizes: dict[str, int] = {}
    for name, param in Model().named_parameters():
        sizes[layer_of(name)] = sizes.get(layer_of(name), 0) + param.numel()
    for layout in ("one", "tp2-pp2"):
        _, events = run("llama", layout)
        for layer, size in sizes.items():
            assert {num for _, num in events[f"histogram:gradient/layer/{layer}"]} == {size}


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("model.layers.3.mlp.up.weight", "model.layers.3"), ("lm_head.weight", "lm_head"), ("shift", "shift"),
        ("h.0.1.weight", "h.0"),
    ],
)  # fmt: skip
def test_a_layer_is_what_comes_up_to_the_first_number(name: str, layer: str) -> None:
    assert layer_of(name) == layer
