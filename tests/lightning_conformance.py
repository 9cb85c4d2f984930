"""A pytest plugin that runs Lightning's own tests with Kénotron where they would train with a strategy of Lightning's on CPUs.

With a checkout of pytorch-lightning of about the installed version::

    cd pytorch-lightning/tests
    PYTHONPATH=.:<kenotron>/tests python -m pytest -p lightning_conformance tests_pytorch/models/test_hooks.py

Wherever the Trainer would choose ``SingleDeviceStrategy``, it gets ``KenotronStrategy()`` instead; wherever it would choose
``DDPStrategy`` for two or more processes of this machine, it gets ours, whose processes are forked. Tests that make a strategy
object themselves keep it. Without ``-p lightning_conformance`` the same command gives the baseline. What is expected, and what
differs and why, is in ``tests/conformance``; ``docs/lightning-conformance.md`` says how to compare.

``KENOTRON_CONFORMANCE`` may hold the strategy's arguments as JSON, for instance ``{"zero_stage": 0}``. To the file that
``KENOTRON_OUTCOMES`` names a line is added for each test: its outcome, the most processes of ours that it had, its id.
"""

from __future__ import annotations

import json
import os
from typing import Any

import pytest
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.trainer.connectors.accelerator_connector import _AcceleratorConnector

import kenotron
from kenotron.strategies import ProcessGroupSettings

_choose, _init = _AcceleratorConnector._choose_strategy, _AcceleratorConnector._init_strategy
#: Tests that ask which strategy the Trainer chooses are left alone.
_ASKS = ("connectors/test_accelerator_connector.py", "::test_trainer_config_strategy")
#: Names of strategies that are exchanged, where there are two or more processes.
_DDP = tuple(
    f"{name}{end}"
    for name in ("ddp", "ddp_spawn", "ddp_fork", "ddp_notebook")
    for end in ("", "_find_unused_parameters_true", "_find_unused_parameters_false")
)
_processes: dict[str, int] = {}
_outcomes: dict[str, str] = {}


def _choose_kenotron(connector: Any) -> Any:
    """Exchange what the Trainer chooses by itself for one process."""
    chosen = _choose(connector)
    # No subclass (XLA's single device), and no MPS.
    is_meant = type(chosen) is SingleDeviceStrategy and chosen.root_device.type in ("cpu", "cuda")
    return _ours(1) if is_meant and not _asks() else chosen


def _init_kenotron(connector: Any) -> None:
    """Exchange DDP, named or chosen, for several processes on the CPUs of this machine."""
    devices, flag = connector._parallel_devices or [], connector._strategy_flag
    is_here = len(devices) > 1 and devices[0].type == "cpu" and connector._num_nodes_flag == 1
    if is_here and isinstance(flag, str) and flag in _DDP and not _asks():
        connector._strategy_flag = _ours(len(devices), process_group=ProcessGroupSettings(start_method="fork"))
    _init(connector)


def _ours(count: int, **settings: Any) -> kenotron.KenotronStrategy:
    _processes[_test()] = max(_processes.get(_test(), 0), count)
    return kenotron.KenotronStrategy(**settings, **json.loads(os.environ.get("KENOTRON_CONFORMANCE", "{}")))


def _test() -> str:
    return os.environ.get("PYTEST_CURRENT_TEST", "").rpartition(" ")[0]


def _asks() -> bool:
    return any(part in _test() for part in _ASKS)


def pytest_configure() -> None:
    _AcceleratorConnector._choose_strategy = _choose_kenotron
    _AcceleratorConnector._init_strategy = _init_kenotron


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "setup" or (report.outcome != "passed" and _outcomes.get(report.nodeid) != "failed"):
        _outcomes[report.nodeid] = report.outcome
    path = os.environ.get("KENOTRON_OUTCOMES")
    if path and report.when == "teardown":
        with open(path, "a") as file:
            count = _processes.get(report.nodeid, 0)
            file.write(f"{_outcomes.get(report.nodeid, report.outcome)} {count} {report.nodeid}\n")


def pytest_terminal_summary(terminalreporter: Any) -> None:
    single, several = (sum((count > 1) == is_several for count in _processes.values()) for is_several in (False, True))
    terminalreporter.write_line(f"Tests that used Kénotron: {single} on one process, {several} on several")
