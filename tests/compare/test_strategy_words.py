"""Strategies as words: names, settings, import paths."""

from __future__ import annotations

import pytest
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

import kenotron
from kenotron.compare.measure import sizes
from kenotron.compare.strategies import Spec, make_strategy, parse_spec


def test_settings_are_yaml() -> None:
    found = parse_spec("kenotron:tp=2, plan={a: colwise, b: rowwise},sequence_parallel=true,blocks=layers")
    settings = {"tp": 2, "plan": {"a": "colwise", "b": "rowwise"}, "sequence_parallel": True, "blocks": "layers"}
    assert found == Spec(name="kenotron", settings=settings)


def test_names_and_import_paths_make_strategies() -> None:
    made = make_strategy("kenotron_zero1:tp=2,zero_stage=3")
    assert isinstance(made, kenotron.KenotronStrategy)
    assert isinstance(make_strategy("model_parallel"), ModelParallelStrategy)
    assert isinstance(make_strategy("lightning.pytorch.strategies.DDPStrategy:bucket_cap_mb=1"), DDPStrategy)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("kenotrn", "'kenotrn' is no strategy. The nearest is 'kenotron'"),
        ("kenotron:tp", "'tp' is no setting"),
        ("kenotron:tq=2", "kenotron:tq=2.*tq"),
        ("kenotron:tp=0", "Set tp to an integer of 1 or more"),
        ("nowhere.at.All", "nowhere.at.All can't be imported"),
        ("kenotron:tp=[2", "can't be read"),
    ],
)
def test_bad_words_are_told(text: str, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        make_strategy(text)


def test_tokens_are_the_first_integers_with_two_dimensions() -> None:
    import torch

    ids = torch.zeros(4, 16, dtype=torch.long)
    assert sizes({"input_ids": ids, "mask": torch.ones(4, 16)}) == (4, 64)
    assert sizes((torch.zeros(4, 8), torch.zeros(4, dtype=torch.long))) == (4, 4)
    assert sizes([]) == (1, 1)
