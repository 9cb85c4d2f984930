"""Retention removes checkpoints of this run's folders, and nothing else, whatever name it is given."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from kenotron.checkpoint import Checkpointer, FolderClaim, LocalTensor, is_checkpoint, save
from kenotron.checkpoint.removal import NotRemovedError, check_place, remove_checkpoint


def checkpoint(path: Path) -> Path:
    save(path, [LocalTensor.whole("w", torch.ones(3))], {}, rank=0, world_size=1, save_id=path.name)
    return path


def test_only_checkpoints_are_removed(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter").write_text("years of work")
    (tmp_path / "data.ckpt").write_text("no checkpoint")
    (tmp_path / "paper.docx").write_bytes(b"PK\x03\x04")
    (tmp_path / "link").symlink_to("thesis")
    os.mkfifo(tmp_path / "fifo.ckpt")
    before = sorted(os.listdir(tmp_path))
    for name in before:
        with pytest.raises(NotRemovedError, match="is left alone"):
            remove_checkpoint(tmp_path / name)
    assert sorted(os.listdir(tmp_path)) == before

    checkpoint(tmp_path / "a")
    (tmp_path / "last").symlink_to("a")
    torch.save({}, tmp_path / "plain.ckpt")
    for name in ("last", "a", "plain.ckpt", "not there"):
        remove_checkpoint(tmp_path / name)
    assert sorted(os.listdir(tmp_path)) == before


def test_a_place_is_where_it_leads_to(tmp_path: Path) -> None:
    (tmp_path / "run" / "inner").mkdir(parents=True)
    (tmp_path / "link").symlink_to("run")
    own = {(tmp_path / "run").resolve()}
    for inside in ("run/a", "link/a", "run/inner/../a"):
        check_place(Path(os.path.abspath(tmp_path / inside)), own)
    for outside in ("a", "run/../a", "run/inner/a"):
        with pytest.raises(NotRemovedError, match="has saved nothing in"):
            check_place(Path(os.path.abspath(tmp_path / outside)), own)


def test_a_checkpoint_of_another_folder_is_left_alone_and_told(tmp_path: Path) -> None:
    other, own = checkpoint(tmp_path / "other" / "a"), tmp_path / "own"
    checkpointer = Checkpointer()
    for name in ("a", "b"):
        checkpointer.save(own / name, [], {}, rank=0, world_size=1, save_id=name)
    checkpointer.remove(own / ".." / "other" / "a")
    checkpointer.remove(own / "a")
    with pytest.warns(UserWarning, match="other/a is left alone: this run has saved nothing in"):
        checkpointer.close()
    assert is_checkpoint(other)
    assert os.listdir(own) == ["b"]


def test_a_folder_that_another_run_writes_to_is_known(tmp_path: Path) -> None:
    first, second = FolderClaim(tmp_path / "run"), FolderClaim(tmp_path / "run")
    assert (first.is_shared, second.is_shared) == (False, True)
    first.release()
    second.release()
    assert not FolderClaim(tmp_path / "run").is_shared
    assert os.listdir(tmp_path / "run") == []
