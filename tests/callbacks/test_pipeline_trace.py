"""What stages did when, as it is traced: against what the schedule says, and against the formula of its bubble."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from operations_helpers import KeepLogger, KeepLosses, Net, data, make_trainer

from kenotron.callbacks import PipelineTrace
from kenotron.parallel.timeline import BACKWARD, BACKWARD_INPUT, BACKWARD_WEIGHT, FORWARD, Span, bubble, ideal_bubble, waits
from kenotron.testing import RankPool


def fit(folder: str, strategy: dict[str, Any], trace: dict[str, Any], **settings: Any) -> tuple[list[Any], list[float]]:
    L.seed_everything(1, verbose=False)
    logger = KeepLogger()
    kept = KeepLosses()
    callbacks = [kept, *([PipelineTrace(**trace)] if trace else [])]
    trainer = make_trainer(
        {"pp": 2, **strategy}, *callbacks, **{"max_steps": 5, "logger": logger, "default_root_dir": folder, **settings}
    )
    trainer.fit(Net(), data())
    assert trainer.strategy.pipeline.observer is None
    return logger.seen, kept.losses


def stages(events: list[Any], category: str) -> list[tuple[int, int, int]]:
    found = [e for e in events if e.get("cat") == category]
    return [(e["tid"], e["args"]["stage"], e["args"]["microbatch"]) for e in sorted(found, key=lambda e: e["ts"])]


def test_it_traces_each_action_once_in_an_order_that_can_be(tmp_path: Path) -> None:
    with RankPool(2) as pool:
        (seen, losses), _ = pool.run(fit, 2, str(tmp_path), {"microbatches": 4}, {"start_step": 2, "num_steps": 2})
        _, without = pool.run(fit, 2, str(tmp_path / "none"), {"microbatches": 4}, {})[0]
        split = {"schedule": "interleaved_zero_bubble", "virtual_stages": 2, "microbatches": 4}
        pool.run(fit, 2, str(tmp_path / "split"), split, {"start_step": 1, "picture": False}, accumulate_grad_batches=2)
    assert losses == without
    assert sorted(path.name for path in tmp_path.glob("*.*")) == ["pipeline-step=3.json", "pipeline-step=3.png"]
    ((step, values),) = [(step, v) for step, v in seen if "pipeline/bubble_percent" in v]
    assert step == 4
    assert values["pipeline/bubble_in_theory_percent"] == pytest.approx(100 / (4 + 1), abs=0.01)
    assert values["pipeline/bubble_in_theory_percent"] - 1 < values["pipeline/bubble_percent"] < 100
    events = json.loads((tmp_path / "pipeline-step=3.json").read_text())["traceEvents"]
    for category in (FORWARD, BACKWARD):
        both = [(rank, rank, microbatch) for rank in range(2) for microbatch in range(4)]
        assert sorted(stages(events, category)) == sorted(2 * both)  # in two steps
    assert {e["args"]["step"] for e in events if e.get("cat") == FORWARD} == {2, 3}
    assert sum(e.get("cat") == "optimizer" for e in events) == 2 * 2
    assert sum(e.get("cat") == "wait" for e in events) >= 2
    _nothing_arrives_before_it_was_sent(events)
    image = (tmp_path / "pipeline-step=3.png").read_bytes()
    assert image[:8] == b"\x89PNG\r\n\x1a\n"
    assert min(struct.unpack(">II", image[16:24])) > 300

    events = json.loads((tmp_path / "split" / "pipeline-step=1.json").read_text())["traceEvents"]
    two_batches = sorted(2 * [(stage % 2, stage, microbatch) for stage in range(4) for microbatch in range(4)])
    assert sorted(stages(events, FORWARD)) == two_batches
    weights = stages(events, BACKWARD_WEIGHT)
    assert weights
    assert len(stages(events, BACKWARD_INPUT)) == len(weights)
    assert sorted(stages(events, BACKWARD) + weights) == two_batches
    assert not (tmp_path / "split" / "pipeline-step=1.png").exists()


def _nothing_arrives_before_it_was_sent(events: list[Any]) -> None:
    """Clocks of ranks agree so far that no stage begins before the one before has ended."""
    spans = {
        (e["cat"], e["args"]["step"], e["args"]["stage"], e["args"]["microbatch"]): e
        for e in events
        if e["ph"] == "X" and "args" in e
    }
    for step in (2, 3):
        for microbatch in range(4):
            sent, received = (spans[FORWARD, step, stage, microbatch] for stage in (0, 1))
            assert received["ts"] > sent["ts"] + sent["dur"] - 100, "µs"
            sent, received = (spans[BACKWARD, step, stage, microbatch] for stage in (1, 0))
            assert received["ts"] > sent["ts"] + sent["dur"] - 100, "µs"


def one_f_one_b(pp: int, microbatches: int) -> list[Span]:
    """Return a 1F1B run in the right order on each rank, at times that mean nothing but that order and how long each takes."""
    run = []
    for rank in range(pp):
        warm = min(pp - rank - 1, microbatches)
        order = [(FORWARD, m) for m in range(warm)]
        for m in range(microbatches - warm):
            order += [(FORWARD, warm + m), (BACKWARD, m)]
        order += [(BACKWARD, m) for m in range(microbatches - warm, microbatches)]
        clock = 0.0
        for action, microbatch in order:
            run.append(Span(0, 0, rank, rank, action, microbatch, clock, clock := clock + (1.0 if action == FORWARD else 2.0)))
    return run


@pytest.mark.parametrize(("pp", "microbatches"), [(2, 4), (4, 8), (8, 8), (4, 2)])
def test_theory_is_the_formula_for_1f1b(pp: int, microbatches: int) -> None:
    assert ideal_bubble(one_f_one_b(pp, microbatches)) == pytest.approx((pp - 1) / (microbatches + pp - 1))


def test_the_bubble_is_what_no_stage_works_in() -> None:
    run = [
        Span(0, 0, 0, 0, FORWARD, 0, 0.0, 1.0),
        Span(0, 0, 1, 1, FORWARD, 0, 1.5, 2.0),
        Span(0, 0, 0, 0, BACKWARD, 0, 3.0, 4.0),
    ]
    assert bubble(run) == pytest.approx(1 - 2.5 / 8)
    assert list(waits(run)) == [(0, 1.0, 3.0), (1, 0.0, 1.5), (1, 2.0, 4.0)]


def test_bad_input_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="start_step=-1"):
        PipelineTrace(start_step=-1)
    with pytest.raises(ValueError, match=r"none \(pp=1\).*pp=2"):
        make_trainer({}, PipelineTrace(tmp_path)).fit(Net(), data())
    with pytest.raises(ValueError, match=r"none .SingleDeviceStrategy"):
        make_trainer("auto", PipelineTrace(tmp_path)).fit(Net(), data())
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install matplotlib, or set picture=False"):
        PipelineTrace(tmp_path)
    PipelineTrace(tmp_path, picture=False)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a clock of events")
def test_events_tell_the_time(tmp_path: Path) -> None:
    from kenotron.callbacks.pipeline_trace import _Recorder

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        recorder = _Recorder(torch.device("cuda"), [])
        recorder.next_run(7)
        matrix = torch.randn(4096, 4096, device="cuda")
        for index in range(2):
            with recorder(0, FORWARD, index):
                for _ in range(20):
                    matrix = matrix @ matrix / 64
        first, second = recorder.spans(0)
        assert 0 < first.end - first.begin < 10
        assert second.begin >= first.end - 1e-4
    finally:
        torch.distributed.destroy_process_group()
