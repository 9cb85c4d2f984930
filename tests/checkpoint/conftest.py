"""What the checkpoint tests share: ranks that are threads, since a save has no state outside its arguments."""

from __future__ import annotations

import sys
import threading
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from checkpoint_helpers import SaveOnRanks

from kenotron.checkpoint import LocalTensor, load, manifest, reports, save, writer


@pytest.fixture
def save_on_ranks() -> SaveOnRanks:
    """``save`` on as many ranks as there are lists of tensors; returns what each raised."""

    def save_all(
        path: Path, tensors: Sequence[Sequence[LocalTensor]], state: dict[str, Any] | None = None, **options: Any
    ) -> list[BaseException | None]:
        raised: list[BaseException | None] = [None] * len(tensors)
        options.setdefault("save_id", uuid.uuid4().hex)
        per_rank = options.pop("per_rank", {})

        def work(rank: int) -> None:
            own = options | per_rank.get(rank, {})
            try:
                save(path, tensors[rank], state or {}, rank=rank, world_size=len(tensors), **own)
            except BaseException as error:
                raised[rank] = error

        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(len(tensors))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return raised

    return save_all


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Checksums for every 64 bytes and a staging buffer of 256, so that small tensors take every path; gives 64."""
    verify = sys.modules["kenotron.checkpoint.verify"]  # as an attribute of the package it is the function
    for module in (load, manifest, reports, verify, writer):
        monkeypatch.setattr(module, "CHUNK_BYTES", 64)
    monkeypatch.setattr(load, "_STAGING_BYTES", 256)
    reports.merge.cache_clear()
    yield 64
    reports.merge.cache_clear()
