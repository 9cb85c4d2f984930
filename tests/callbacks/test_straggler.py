"""The rank that the others wait for is named, whatever keeps it; those that wait are not."""

from __future__ import annotations

import re
import socket
import time
import warnings
from collections.abc import Iterator
from typing import Any

import lightning as L
import pytest
import torch
from operations_helpers import KeepLogger, Net, data, make_trainer

from kenotron.callbacks import StragglerDetector
from kenotron.callbacks.straggler import find_slow
from kenotron.testing import RankPool

SLOW_S = 0.15  # a step of ZeRO takes 0.04 by itself


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    with RankPool(2) as processes:
        yield processes


def sleep() -> None:
    time.sleep(SLOW_S)


def compute() -> None:
    end = time.thread_time() + SLOW_S
    while time.thread_time() < end:
        torch.randn(64, 64) @ torch.randn(64, 64)


class SlowRows(torch.utils.data.Dataset[Any]):
    """A disk that takes its time on one rank."""

    def __init__(self, is_slow: bool) -> None:
        self.is_slow, self.rows = is_slow, data().dataset

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> Any:
        if self.is_slow and index % 8 == 0:
            time.sleep(SLOW_S)
        return self.rows[index]


def fit(strategy: Any, how: str | None, where: int = 1) -> tuple[list[str], list[dict[str, float]]]:
    def on_step(module: L.LightningModule) -> None:
        if module.global_rank == where and how in ("sleep", "compute"):
            {"sleep": sleep, "compute": compute}[how]()

    logger = KeepLogger()
    trainer = make_trainer(strategy, StragglerDetector(8, factor=2.0), max_steps=24, logger=logger)
    rank = trainer.global_rank
    rows = torch.utils.data.DataLoader(SlowRows(how == "data" and rank == where), batch_size=8)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        trainer.fit(Net(on_step=on_step), rows)
    return [str(each.message) for each in told if "own work" in str(each.message)], [
        values for _, values in logger.seen if "straggler/skew_percent" in values
    ]


@pytest.mark.parametrize(
    ("strategy", "how"),
    [("ddp", "sleep"), ("ddp", "compute"), ({"tp": 2}, "sleep"), ({"zero_stage": 3}, "compute"), ({"zero_stage": 1}, "data")],
    ids=["ddp sleep", "ddp compute", "tp sleep", "zero3 compute", "zero1 data"],
)
def test_the_slow_rank_is_named_and_the_one_that_waits_is_not(pool: RankPool, strategy: Any, how: str) -> None:
    where = 0 if how == "compute" else 1
    (told, values), (other, _) = pool.run(fit, 2, strategy, how, where)
    assert not other  # rank 0 speaks
    assert told, values
    for text in told:
        assert re.search(rf"rank {where} on {re.escape(socket.gethostname())} takes .* times the median", text), text
        assert f"rank {1 - where} on" not in text
    assert len(values) == 3
    assert max(each["straggler/slowest_seconds"] for each in values) > 0.7 * SLOW_S
    assert all(each["straggler/median_seconds"] < 0.7 * each["straggler/slowest_seconds"] for each in values[1:])


def test_equal_ranks_are_left_in_peace() -> None:
    assert find_slow([0.1, 0.11, 0.1, 0.12], [[0, 1, 2, 3]], 1.3) == []
    assert find_slow([0.0001, 0.0005], [[0, 1]], 1.3) == []


def test_ranks_are_compared_with_those_of_their_stage() -> None:
    assert find_slow([0.1, 0.1, 0.2, 0.2], [[0, 1], [2, 3]], 1.3) == []
    assert find_slow([0.1, 0.3, 0.2, 0.9], [[0, 1], [2, 3]], 1.3) == [(3, pytest.approx(4.5)), (1, pytest.approx(3.0))]


def test_one_rank_has_nobody_to_wait_for() -> None:
    told, values = fit("auto", "sleep", where=0)
    assert not told
    assert [each["straggler/skew_percent"] for each in values] == [0.0] * 3


def test_bad_input_is_told() -> None:
    with pytest.raises(ValueError, match="every_n_train_steps=0"):
        StragglerDetector(0)
    with pytest.raises(ValueError, match=r"factor=1\.0.*Set 1\.3"):
        StragglerDetector(factor=1.0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the device's own time")
def test_the_devices_time_is_that_of_the_leaves() -> None:
    from kenotron.own_work import DeviceTime

    module = torch.nn.Sequential(torch.nn.Linear(4096, 4096), torch.nn.ReLU(), torch.nn.Linear(4096, 4096)).cuda()
    x = torch.randn(8192, 4096, device="cuda")
    module(x)
    torch.cuda.synchronize()
    timed = DeviceTime(module, torch.device("cuda"))
    module(x)
    timed.stop()
    begin = time.perf_counter()
    module(x)
    torch.cuda.synchronize()
    wall = time.perf_counter() - begin
    found = timed.seconds()
    assert found is not None
    assert 0.3 * wall < found < 1.5 * wall
