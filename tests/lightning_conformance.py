"""A pytest plugin that runs Lightning's own tests with Kénotron where they would train on one CPU.

With a checkout of pytorch-lightning of the installed version (``git clone --branch 2.6.6``)::

    cd pytorch-lightning/tests
    PYTHONPATH=.:<kenotron>/tests python -m pytest -p lightning_conformance tests_pytorch/models/test_hooks.py

Wherever the Trainer would choose ``SingleDeviceStrategy``, it gets ``KenotronStrategy()`` instead. Tests that name a strategy
themselves keep it. Without ``-p lightning_conformance`` the same command gives the baseline. What differs, and why, is in
``docs/lightning-conformance.md``.

``KENOTRON_CONFORMANCE`` may hold the strategy's arguments as JSON, for instance ``{"zero_stage": 0}``.
"""

from __future__ import annotations

import json
import os
from typing import Any

from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.trainer.connectors.accelerator_connector import _AcceleratorConnector

import kenotron

_choose = _AcceleratorConnector._choose_strategy
_replaced = 0


def _choose_kenotron(self: Any) -> Any:
    global _replaced
    chosen = _choose(self)
    # No subclass (XLA's single device), and no MPS.
    if type(chosen) is not SingleDeviceStrategy or chosen.root_device.type not in ("cpu", "cuda"):
        return chosen
    _replaced += 1
    return kenotron.KenotronStrategy(**json.loads(os.environ.get("KENOTRON_CONFORMANCE", "{}")))


def pytest_configure() -> None:
    _AcceleratorConnector._choose_strategy = _choose_kenotron


def pytest_terminal_summary(terminalreporter: Any) -> None:
    terminalreporter.write_line(f"Trainers that used Kénotron instead of SingleDeviceStrategy: {_replaced}")
