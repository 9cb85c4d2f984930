"""Found by name without an import, in both of Lightning's packages, however processes are started; and how runs end."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = """
import os, sys, time, warnings
warnings.filterwarnings("ignore")
import {package} as L
import torch
from torch.utils.data import DataLoader
{imports}

class Net(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh()) for _ in range(4))
    def training_step(self, batch, batch_idx):
        for layer in self.layers:
            batch = layer(batch)
        {in_step}
        loss = batch.square().mean()
        self.log("loss", loss)
        return loss
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

if __name__ == "__main__":
    L.seed_everything(1, verbose=False)
    trainer = L.Trainer(strategy={strategy}, accelerator="cpu", devices={devices}, max_epochs={epochs}, logger=False,
                        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    trainer.fit(Net(), DataLoader(torch.randn(64, 8), batch_size=4))
    print(f"rank {{trainer.global_rank}} of {{trainer.world_size}}: {{type(trainer.strategy).__name__}} "
          f"{{trainer.strategy.layout.sizes}} step {{trainer.global_step}} {{trainer.received_sigterm}}", flush=True)
"""


def write(folder: Path, **changes: object) -> Path:
    settings = {
        "package": "lightning.pytorch", "imports": "", "in_step": "", "strategy": "'kenotron'", "devices": 2, "epochs": 1,
        **changes,
    }  # fmt: skip
    path = folder / "train.py"
    path.write_text(SCRIPT.format(**settings))
    return path


def environment(**changes: str) -> dict[str, str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "TORCHELASTIC", "PL_")) and k != "LOCAL_RANK"}
    return {**clean, "OMP_NUM_THREADS": "1", **changes}


def run(command: list[str], timeout: float = 90, **changes: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False, env=environment(**changes))
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.parametrize("package", ["lightning.pytorch", "pytorch_lightning"])
def test_a_script_finds_it_by_name_without_import(package: str, tmp_path: Path) -> None:
    out = run([sys.executable, str(write(tmp_path, package=package))])
    assert "rank 0 of 2: KenotronStrategy (1, 1, 2, 1, 1)" in out
    assert "rank 1 of 2" in out


def test_one_device_needs_no_processes(tmp_path: Path) -> None:
    out = run([sys.executable, str(write(tmp_path, devices=1, strategy="'kenotron_zero3'"))])
    assert "rank 0 of 1: KenotronStrategy (1, 1, 1, 1, 1) step 16" in out


def test_an_import_registers_it_where_autoload_is_off(tmp_path: Path) -> None:
    off = {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    assert "rank 0 of 1" in run([sys.executable, str(write(tmp_path, imports="import kenotron", devices=1))], **off)
    script = str(write(tmp_path, devices=1))
    done = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, timeout=60, check=False, env=environment(**off)
    )
    assert "invalid strategy name" in done.stderr


def test_torchrun_starts_it(tmp_path: Path) -> None:
    script = write(tmp_path, imports="import kenotron", strategy="kenotron.KenotronStrategy(pp=2)")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port", str(free_port())]
    out = run([*torchrun, str(script)])
    assert "rank 1 of 2: KenotronStrategy (2, 1, 1, 1, 1)" in out


def test_slurm_starts_it(tmp_path: Path) -> None:
    script, port = write(tmp_path), free_port()
    slurm = {
        "SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SLURM_JOB_NAME": "train", "SLURM_NODEID": "0", "SLURM_NODELIST": "127.0.0.1",
        "SLURM_NTASKS_PER_NODE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env=environment(**slurm, SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank)),
        )
        for rank in range(2)
    ]  # fmt: skip
    outputs = [rank.communicate(timeout=90)[0] for rank in ranks]
    for number, (rank, output) in enumerate(zip(ranks, outputs, strict=True)):
        assert rank.returncode == 0, output
        assert f"rank {number} of 2" in output


def test_a_rank_that_fails_takes_the_others_down_with_its_message(tmp_path: Path) -> None:
    script = write(tmp_path, in_step="if self.global_rank == 1 and batch_idx == 3: raise KeyError('no such sample')")
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=60, check=False, env=environment()
    )
    assert done.returncode != 0
    assert "KeyError: 'no such sample'" in done.stderr
    # Lightning ends the processes that it started as soon as one of them has gone, if rank 0 has not told by then.
    assert "rank 0 ends: rank 1 failed: KeyError: 'no such sample'" in done.stderr or "Forcefully" in done.stderr
    assert done.stderr.count("Traceback") == 1
    assert time.monotonic() - start < 50


def test_ranks_that_run_other_layers_after_many_steps_end_and_say_which(tmp_path: Path) -> None:
    """Each then waits in a collective of its own, of which the other knows nothing."""
    path = write(
        tmp_path,
        imports="from kenotron import KenotronStrategy",
        strategy="KenotronStrategy(zero_stage=3)",
        in_step="batch = self.layers[0](batch) if self.global_step >= 5 and self.global_rank else batch",
    )
    done = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, timeout=120, env=environment())
    told = done.stdout + done.stderr
    assert done.returncode != 0
    assert "'layers.0'" in told and "every rank must run the same layers" in told, told


def test_sigterm_stops_all_ranks_at_the_same_step(tmp_path: Path) -> None:
    script = write(tmp_path, epochs=100000, in_step="if batch_idx == 0: print('epoch', flush=True)\n        time.sleep(0.002)")
    caught = "    except BaseException as error:\n        print(type(error).__name__, error.code, flush=True)\n"
    text = script.read_text().replace("    trainer.fit(", "    try:\n        trainer.fit(")
    script.write_text(text.replace('    print(f"rank', caught + '    print(f"rank'))
    process = subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment()
    )
    assert process.stdout is not None
    assert "epoch" in process.stdout.readline()
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    out = process.communicate(timeout=60)[0]
    steps = [line.split("step ")[1].split()[0] for line in out.splitlines() if line.startswith("rank")]
    assert len(steps) == 2, out
    assert len(set(steps)) == 1, out
    assert out.count("SIGTERMException 143") == 2


def test_a_rank_that_is_killed_while_ranks_set_up_leaves_nobody_waiting(tmp_path: Path) -> None:
    script = write(tmp_path, strategy="'kenotron_zero3'")
    killed = "    def configure_model(self):\n        if self.global_rank == 1: os.kill(os.getpid(), 9)\n"
    script.write_text(script.read_text().replace("    def configure_optimizers", killed + "    def configure_optimizers"))
    environ = environment(
        WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", GROUP_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()),
        TORCHELASTIC_RUN_ID="x",
    )  # fmt: skip
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script)], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
            env={**environ, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]  # fmt: skip
    assert ranks[1].wait(timeout=120) == -signal.SIGKILL
    start = time.monotonic()
    told = ranks[0].communicate(timeout=60)[1]
    assert ranks[0].returncode == 1
    assert "rank 1 is gone: its process has ended" in told
    assert time.monotonic() - start < 45
