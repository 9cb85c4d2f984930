from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from kenotron.checkpoint import LocalTensor, read_manifest, save
from kenotron.checkpoint.format import unpublished
from kenotron.cli import main
from kenotron.cli.checkpoint import _age, _size

SHARD = "shard-00001-of-00001.safetensors"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A checkpoint like one of the strategy's, of one rank at step 30."""
    tensors = [
        LocalTensor.whole("model/layers.0.weight", torch.zeros(300, 40)),
        LocalTensor.whole("model/[bold]scale", torch.tensor(1.0, dtype=torch.bfloat16)),
    ]
    state = {"lightning": {"epoch": 1, "global_step": 30}}
    aliases = {"model/head": "model/layers.0.weight"}
    save(tmp_path / "step-30", tensors, state, rank=0, world_size=1, save_id="one", aliases=aliases)
    return tmp_path / "step-30"


def flip(file: Path, position: int) -> None:
    data = bytearray(file.read_bytes())
    data[position] ^= 1
    file.write_bytes(data)


# ---- verify ---------------------------------------------------------------------------------------------------------


def test_verify_of_a_whole_checkpoint_prints_its_files_and_exits_with_0(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "verify", str(path)]) == 0
    manifest, shard, verdict = capsys.readouterr().out.splitlines()
    assert manifest.split()[0] == "manifest.json"
    assert shard.split() == [SHARD, "48.0", "kB", "ok"]
    assert verdict.startswith(f"{path} is whole: 2 files, ")


def test_verify_of_a_damaged_checkpoint_lists_the_damages_and_exits_with_1(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (piece,) = read_manifest(path).tensors["model/layers.0.weight"].pieces
    flip(path / SHARD, piece.begin)
    flip(path / SHARD, (path / SHARD).stat().st_size - 1)
    assert main(["checkpoint", "verify", str(path)]) == 1
    _, shard, *damages, verdict = capsys.readouterr().out.splitlines()
    assert shard.endswith("2 damages")
    assert [damage.split(": ")[0].strip() for damage in damages] == [
        f"{SHARD}, tensor model/layers.0.weight, bytes {piece.begin} to {piece.end}",
        f"{SHARD}, tensor model/[bold]scale, bytes {piece.end} to {piece.end + 2}",
    ]
    assert verdict == f"{path} is damaged: 2 damages; load another checkpoint"


def test_verify_of_a_damaged_manifest_exits_with_1(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flip(path / "manifest.json", 100)
    assert main(["checkpoint", "verify", str(path)]) == 1
    assert "its checksum does not match" in capsys.readouterr().out


@pytest.mark.parametrize("action", ["ls", "verify"])
def test_what_is_no_checkpoint_is_told_in_a_line_with_exit_code_2(
    path: Path, tmp_path: Path, action: str, capsys: pytest.CaptureFixture[str]
) -> None:
    partial = unpublished(path, "x")
    path.rename(partial)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    for other in ("nothing", "empty", "file", path.name, partial.name):
        assert main(["checkpoint", action, str(tmp_path / other)]) == 2
        out, err = capsys.readouterr()
        assert not out
        assert len(err.splitlines()) == 1
        assert str(tmp_path / other) in err


# ---- ls -------------------------------------------------------------------------------------------------------------


def test_ls_lists_the_tensors_of_a_checkpoint(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "ls", str(path)]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[:4] == [
        ["tensor", "dtype", "shape", "pieces", "size"],
        ["model/layers.0.weight", "float32", "300", "×", "40", "1", "48.0", "kB"],
        ["model/[bold]scale", "bfloat16", "scalar", "1", "2", "B"],
        ["model/head", "is", "model/layers.0.weight"],
    ]
    assert " ".join(lines[4]).startswith("2 tensors in 2 pieces, 48.0 kB; 1 file, ")
    assert " ".join(lines[5]).startswith("step 30, saved by 1 rank ")


def test_ls_prints_json(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "ls", "--json", str(path)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["tensors"]["model/layers.0.weight"] == {
        "dtype": "float32",
        "shape": [300, 40],
        "num_pieces": 1,
        "num_bytes": 48_000,
    }
    assert (found["step"], found["world_size"], found["save_id"]) == (30, 1, "one")
    assert main(["checkpoint", "ls", "--json", str(tmp_path)]) == 0
    folder = json.loads(capsys.readouterr().out)
    assert [summary["step"] for summary in folder["checkpoints"]] == [30]
    assert folder["unpublished"] == []


def test_ls_lists_the_checkpoints_of_a_folder_and_marks_what_is_not_published(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path / "other", [], {}, rank=0, world_size=1, save_id="two")
    save(tmp_path / "broken", [], {}, rank=0, world_size=1, save_id="three")
    flip(tmp_path / "broken" / "manifest.json", 100)
    save(tmp_path / "step-40", [], {}, rank=0, world_size=1, save_id="four")
    (tmp_path / "step-40").rename(unpublished(tmp_path / "step-40", "four"))
    (tmp_path / "notes.txt").touch()
    os.utime(path / "manifest.json", (0, time.time() - 3 * 3600))
    assert main(["checkpoint", "ls", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    lines = {line.split()[0]: line.split()[1:] for line in out.splitlines()}
    assert lines["step-30"][0] == "30"
    assert lines["step-30"][-3:] == ["1", "3", "h"]
    assert lines["other"][-3:] == ["1", "0", "s"]
    assert lines["broken"][0] == "damaged"
    assert lines[".step-40.four.partial"][0] == "unpublished"
    assert "notes.txt" not in out
    assert "is never loaded" in out


def test_ls_of_a_checkpoint_that_lacks_a_file_tells_it(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (path / SHARD).unlink()
    assert main(["checkpoint", "ls", str(path)]) == 1
    assert "is missing" in capsys.readouterr().err


def test_long_names_are_never_shortened_in_a_pipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "model/" + "layers." * 40 + "weight"
    save(tmp_path / "a", [LocalTensor.whole(name, torch.zeros(1))], {}, rank=0, world_size=1, save_id="x")
    main(["checkpoint", "ls", str(tmp_path / "a")])
    assert name in capsys.readouterr().out


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (999_999_600, "1.0 GB"), (1_550_000, "1.6 MB"), (5 * 10**15, "5000.0 TB")],
)
def test_sizes_are_short(num_bytes: int, text: str) -> None:
    assert _size(num_bytes) == text


def test_ages_are_in_the_largest_unit_that_there_are_two_of() -> None:
    now = time.time()
    assert [_age(now - age) for age in (-5, 119, 121, 7199, 7201, 200_000)] == [
        "0 s",
        "119 s",
        "2 min",
        "120 min",
        "2 h",
        "2 d",
    ]


# ---- The program ----------------------------------------------------------------------------------------------------


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_it_runs_as_a_program_and_as_a_module(path: Path) -> None:
    done = run(str(Path(sys.executable).with_name("kenotron")), "checkpoint", "verify", str(path))
    assert done.returncode == 0, done.stderr
    done = run(sys.executable, "-m", "kenotron.cli", "checkpoint", "ls", "nowhere")
    assert done.returncode == 2
    assert done.stderr == "nowhere is not a checkpoint: there is no such file or folder\n"


def test_help_imports_nothing_heavy() -> None:
    code = "import sys, kenotron.cli; print([m for m in ('torch', 'rich', 'numpy') if m in sys.modules])"
    assert run(sys.executable, "-c", code).stdout.strip() == "[]"
