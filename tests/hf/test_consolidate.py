"""One plain file of a checkpoint's weights, from any layout, with the memory of one tensor."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from kenotron.checkpoint import LocalTensor, Piece, save
from kenotron.cli import main
from kenotron.hf import consolidate


def half(name: str, whole: torch.Tensor, rank: int) -> LocalTensor:
    """Return what one of two ranks has of a tensor that is cut by rows."""
    rows = len(whole) // 2
    piece = Piece(offset=(rows * rank, 0), shape=(rows, whole.shape[1]), local=(0, 0))
    return LocalTensor(
        name=name,
        tensor=whole[rows * rank : rows * (rank + 1)].clone(),
        global_shape=tuple(whole.shape),
        pieces=(piece,),
        owners=(rank,),
    )


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """A checkpoint of two ranks, with a tied weight and the state of an optimizer; and what it holds."""
    import threading

    torch.manual_seed(1)
    whole = {
        "model/embed.weight": torch.randn(600, 512),  # larger than what is laid out in memory
        "model/scale": torch.tensor(2.0, dtype=torch.bfloat16),
        "model/none": torch.zeros(0, 3),
        "optimizer.0/embed.weight/exp_avg": torch.randn(600, 512),
        "optimizer.0/embed.weight/step": torch.tensor(7.0),
    }
    cut = [name for name, tensor in whole.items() if tensor.numel() > 1]
    state = {"optimizers": [[{"lr": 0.1, "betas": (0.9, 0.95)}]]}

    def rank(index: int) -> None:
        tensors = [half(name, whole[name], index) for name in cut]
        if index == 0:
            tensors += [LocalTensor.whole(name, tensor) for name, tensor in whole.items() if name not in cut]
        aliases = {"model/head.weight": "model/embed.weight"}
        save(tmp_path / "c", tensors, state, rank=index, world_size=2, save_id="one", aliases=aliases)

    threads = [threading.Thread(target=rank, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return tmp_path / "c", whole


def model_of(whole: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    found = {name.removeprefix("model/"): tensor for name, tensor in whole.items() if name.startswith("model/")}
    return found | {"head.weight": found["embed.weight"]}


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_weights_are_those_of_the_checkpoint(saved: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path, suffix: str) -> None:
    path, whole = saved
    out = tmp_path / f"out{suffix}"
    assert main(["checkpoint", "consolidate", str(path), str(out)]) == 0
    found = load_file(out) if suffix == ".safetensors" else torch.load(out, weights_only=True)
    expected = model_of(whole)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype, name
    assert sorted(each.name for each in tmp_path.iterdir()) == ["c", out.name]


def test_optimizers_come_with_their_groups(saved: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path) -> None:
    path, whole = saved
    found: dict[str, Any] = torch.load(consolidate(path, tmp_path / "out.pt", optimizer=True), weights_only=True)
    (optimizer,) = found["optimizers"]
    assert optimizer["param_groups"] == [{"lr": 0.1, "betas": (0.9, 0.95)}]
    state = optimizer["state"]["embed.weight"]
    assert torch.equal(state["exp_avg"], whole["optimizer.0/embed.weight/exp_avg"]) and state["step"] == 7
    assert torch.equal(found["state_dict"]["head.weight"], whole["model/embed.weight"])
    names = load_file(consolidate(path, tmp_path / "out.safetensors", optimizer=True))
    assert torch.equal(names["optimizer.0/embed.weight/exp_avg"], whole["optimizer.0/embed.weight/exp_avg"])


def test_bad_input_is_told(saved: tuple[Path, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, _ = saved
    (tmp_path / "there.pt").touch()
    save(tmp_path / "weights", [LocalTensor.whole("model/w", torch.ones(2))], {}, rank=0, world_size=1, save_id="x")
    for arguments, told in (
        ((str(path), "out.txt"), "its suffix says what is made"),
        ((str(path), str(tmp_path / "there.pt")), "there.pt exists"),
        ((str(tmp_path / "nowhere"), "out.pt"), "is not a checkpoint"),
        ((str(tmp_path / "weights"), "out.pt", "--optimizer"), "holds no optimizer state"),
    ):
        assert main(["checkpoint", "consolidate", *arguments]) == 1
        assert told in capsys.readouterr().err


_MEASURE = """
import sys, threading, time
from pathlib import Path
from kenotron.hf import consolidate

def anonymous_kb():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

def watch():
    while True:
        seen.append(anonymous_kb())
        time.sleep(0.002)

before, seen = anonymous_kb(), []
threading.Thread(target=watch, daemon=True).start()
consolidate(sys.argv[1], sys.argv[2])
print(max(seen) - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_memory_does_not_grow_with_the_number_of_tensors(tmp_path: Path, suffix: str) -> None:
    tensors = [LocalTensor.whole(f"model/{index}", torch.full((1 << 21,), float(index))) for index in range(24)]  # 8 MiB each
    save(tmp_path / "c", tensors, {}, rank=0, world_size=1, save_id="x")
    command = [sys.executable, "-c", _MEASURE, str(tmp_path / "c"), str(tmp_path / f"out{suffix}")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 64 * 1024, done.stdout  # of 192 MiB; threads and buffers of the reader included
