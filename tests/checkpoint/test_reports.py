"""What ranks report, and the manifest that is made of it: the same text whether a layout is new or was seen before."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from checkpoint_helpers import SaveOnRanks, rows, whole

from kenotron.checkpoint import CoverageError, load_state_dict, read_manifest, reports, verify


def test_a_layout_that_was_seen_before_gets_its_own_checksums(
    tmp_path: Path, save_on_ranks: SaveOnRanks, small_chunks: int
) -> None:
    saved = [torch.randn(14, 5) for _ in range(3)]
    for index, full in enumerate(saved):
        assert save_on_ranks(tmp_path / str(index), [[part] for part in rows("model/w", full, 2)]) == [None, None]
    assert reports.merge.cache_info().hits == 2
    for index, full in enumerate(saved):
        assert verify(tmp_path / str(index)).is_whole
        torch.testing.assert_close(load_state_dict(tmp_path / str(index))["w"], full, rtol=0, atol=0)


def test_a_layout_that_changes_is_checked_again(tmp_path: Path, save_on_ranks: SaveOnRanks) -> None:
    full = torch.randn(6, 4)
    good = [[part] for part in rows("model/w", full, 2)]
    assert save_on_ranks(tmp_path / "good", good) == [None, None]
    for attempt in range(2):  # what failed once is no success the next time
        raised = save_on_ranks(tmp_path / f"bad{attempt}", [good[0], []])
        assert all(isinstance(error, CoverageError) for error in raised)
    longer = [[part] for part in rows("model/w", torch.cat([full, full]), 2)]
    assert save_on_ranks(tmp_path / "good", longer) == [None, None]
    assert load_state_dict(tmp_path / "good")["w"].shape == (12, 4)


@pytest.mark.parametrize("name", ['a"crc32c":[]b', "\\", '","crc32c":[]', '":[],"crc32c":[]', "Ké\n", "{}", "[]"])
def test_any_name_comes_back(tmp_path: Path, save_on_ranks: SaveOnRanks, name: str) -> None:
    full = torch.randn(4, 2)
    assert save_on_ranks(tmp_path / "a", [[part] for part in rows(f"model/{name}", full, 2)]) == [None, None]
    torch.testing.assert_close(load_state_dict(tmp_path / "a")[name], full, rtol=0, atol=0)


def test_the_text_is_what_the_manifest_itself_would_write(tmp_path: Path, save_on_ranks: SaveOnRanks) -> None:
    tensors = [[part] for part in rows("w", torch.randn(6, 4), 2)]
    tensors[0] += [whole("empty", torch.zeros(0, 3)), whole("number", torch.tensor(1.5))]
    assert save_on_ranks(tmp_path / "a", tensors) == [None, None]
    text = (tmp_path / "a" / "manifest.json").read_bytes()
    assert read_manifest(tmp_path / "a").to_bytes() == text
    assert list(json.loads(text)["tensors"]) == ["w", "empty", "number"]
