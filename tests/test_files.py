"""Only regular files are opened: what stands in the place of one is an error at once, in every reader."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from kenotron.callbacks_native import PieceToRead, read_pieces
from kenotron.checkpoint import CheckpointError, LocalTensor, is_checkpoint, load_state_dict, save, verify
from kenotron.cli import main
from kenotron.data.corpus import CORPUS_FILE, read_record
from kenotron.data.mapped import MappedArray
from kenotron.files import NotAFileError, check_folder, is_url, local_path, open_regular, read_regular
from kenotron.hf import HFDirectory


def a_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(os.path.relpath(path))


def a_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


IMPOSTORS: list[Callable[[Path], None]] = [os.mkfifo, os.mkdir, a_socket, a_device]


@pytest.fixture(params=IMPOSTORS, ids=lambda make: make.__name__)
def impostor(request: pytest.FixtureRequest) -> Callable[[Path], None]:
    made: Callable[[Path], None] = request.param
    return made


def replace(path: Path, impostor: Callable[[Path], None]) -> None:
    path.unlink()
    impostor(path)


def test_what_is_no_file_is_not_opened(impostor: Callable[[Path], None], tmp_path: Path) -> None:
    impostor(tmp_path / "x")
    with pytest.raises(NotAFileError, match="is no regular file"):
        open_regular(tmp_path / "x")


def test_files_and_links_to_files_are(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    (tmp_path / "link").symlink_to("x")
    (tmp_path / "dangling").symlink_to("y")
    assert read_regular(tmp_path / "link") == b"abc"
    assert read_regular(tmp_path / "x", 2) == b"ab"
    check_folder(tmp_path)
    with pytest.raises(FileNotFoundError):
        open_regular(tmp_path / "y")


def test_a_folder_that_a_library_is_to_read_holds_files_alone(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "tokenizer.json")
    with pytest.raises(NotAFileError, match=r"tokenizer\.json"):
        check_folder(tmp_path)


def test_a_checkpoint_with_something_else_in_the_place_of_a_file(impostor: Callable[[Path], None], tmp_path: Path) -> None:
    for name in ("a", "b"):
        save(tmp_path / name, [LocalTensor.whole("model/w", torch.ones(9))], {}, rank=0, world_size=1, save_id=name)
    (shard,) = (tmp_path / "a").glob("shard-*")
    size = shard.stat().st_size
    replace(shard, impostor)
    replace(tmp_path / "b" / "manifest.json", impostor)
    assert [damage.file for damage in verify(tmp_path / "a").damages] == [shard.name]
    with pytest.raises(CheckpointError, match="is no file"):
        load_state_dict(tmp_path / "a")
    assert not is_checkpoint(tmp_path / "b")
    with pytest.raises(CheckpointError, match="is not a checkpoint"):
        load_state_dict(tmp_path / "b")
    with pytest.raises(ValueError, match="exists and is not a checkpoint"):
        save(tmp_path / "b", [], {}, rank=0, world_size=1, save_id="c")
    assert main(["checkpoint", "ls", str(tmp_path)]) == 0
    piece = PieceToRead(file=0, begin=0, num_bytes=size, checksums=[0], item_bytes=1, shape=(size,), shared=False)
    (error,) = read_pieces([shard], [piece], chunk_bytes=1 << 20, stop_at_first_error=False).errors
    assert error.kind == "io"


def test_corpora_and_directories_of_models(impostor: Callable[[Path], None], tmp_path: Path) -> None:
    impostor(tmp_path / CORPUS_FILE)
    with pytest.raises(OSError, match="is no regular file"):
        read_record(tmp_path)
    impostor(tmp_path / "tokens.ds")
    with pytest.raises(OSError, match="is no regular file"):
        MappedArray(tmp_path / "tokens.ds", torch.zeros(0).numpy().dtype, 4).read(0, 1)
    impostor(tmp_path / "model.safetensors")
    with pytest.raises(Exception, match=r"model\.safetensors|no regular file|no weights"):
        HFDirectory(tmp_path)


def test_a_url_is_no_path_of_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="out 's3://bucket/x' is a URL"):
        local_path("s3://bucket/x", "out")
    assert not is_url("a/b") and not is_url("C:/x") and is_url("gs://x")
    with pytest.raises(ValueError, match="is a URL"):
        save("s3://bucket/x", [], {}, rank=0, world_size=1, save_id="c")
    with pytest.raises(SystemExit):
        main(["tokenize", "in.txt", "s3://bucket/tok", "--train-tokenizer", "300"])
    assert "s3://bucket/tok is a URL" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
