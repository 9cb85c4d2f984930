"""Random programs of saves, steps and changes of every kind, against synchronous saves.

After each program: a checkpoint holds to the byte what was there at its call, or it was not published and the error names a
tensor that had changed. Programs whose changes are announced by a fence, as hooks are, publish every checkpoint.
"""

from __future__ import annotations

import random
import uuid
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from kenotron.checkpoint import Checkpointer, EngineSettings, LocalTensor, is_checkpoint, load_state_dict, read_manifest


class Program:
    """A model in training, and what a random program does to it."""

    def __init__(self, seed: int, folder: Path) -> None:
        self.random, self.folder = random.Random(seed), folder
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(16, 256), nn.BatchNorm1d(256), nn.Tanh(), nn.Linear(256, 16))
        self.frozen = nn.Parameter(torch.randn(64, 64), requires_grad=False)
        kind = self.random.choice([torch.optim.AdamW, torch.optim.SGD])
        self.optimizer = kind(self.model.parameters(), lr=0.01, foreach=self.random.random() < 0.5)
        slots = self.random.choice([4, 64])
        share = self.random.choice([1 / 64, 1.0])
        rate = self.random.choice([1e6, 1e7, None])
        settings = EngineSettings(pool_bytes=slots << 12, slot_bytes=1 << 12, max_bytes_per_s=rate, checked_share=share)
        self.checkpointer = Checkpointer(settings, on_error="warn")
        self.checkpointer.guard_optimizers().watch_others([self.frozen])
        self.saves: list[tuple[Any, dict[str, torch.Tensor]]] = []
        self.is_announced = self.random.random() < 0.5
        self.kept = {name: param.detach().clone() for name, param in self.model.named_parameters()}

    def tensors(self) -> dict[str, torch.Tensor]:
        state = {f"optimizer/{i}/{key}": value for i, each in enumerate(self.optimizer.state.values())
                 for key, value in each.items() if isinstance(value, torch.Tensor)}  # fmt: skip
        return {**self.model.state_dict(), "frozen": self.frozen.detach(), **state}

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.model(torch.randn(8, 16)).square().mean().backward()
        self.optimizer.step()

    def save(self) -> None:
        is_lazy = self.checkpointer.lazy_tensors()
        held = self.tensors()
        tensors = [LocalTensor.whole(name, value, lazy=is_lazy(value)) for name, value in held.items()]
        expected = {name: value.clone() for name, value in held.items()}
        options: dict[str, Any] = {"rank": 0, "world_size": 1, "save_id": uuid.uuid4().hex}
        pending = self.checkpointer.save(self.folder / f"save-{len(self.saves)}", tensors, {}, **options)
        self.saves.append((pending, expected))

    def change(self) -> None:
        if self.is_announced:
            self.checkpointer.fence()
        name, param = self.random.choice([*self.model.named_parameters(), ("frozen", self.frozen)])
        with torch.no_grad():
            match self.random.randrange(8):
                case 0:
                    param.data.mul_(1.5)
                case 1:
                    param.clamp_(-0.01, 0.01)
                case 2:
                    torch._foreach_add_([param.detach()], 1.0)
                case 3:
                    param.detach().numpy()[...] += 1.0
                case 4:
                    param.data = torch.randn_like(param)
                case 5:
                    self.model.load_state_dict(self.kept, strict=False)
                case 6:
                    param.view(-1)[self.random.randrange(param.numel())] = 5.0
                case 7:  # swapped with the optimizer's memory behind them, and back
                    former = param.detach().clone()
                    param.data.fill_(7.0)
                    self.save()
                    if self.is_announced:
                        self.checkpointer.fence()
                    param.data.copy_(former)
        del name

    def run(self) -> None:
        for _ in range(self.random.randrange(4)):
            self.step()
        for _ in range(self.random.randint(4, 14)):
            self.random.choice([self.step, self.save, self.save, self.change, self.change])()
        self.save()
        self.checkpointer.close()


def check(program: Program) -> int:
    """Return how many checkpoints were published."""
    published = 0
    for pending, expected in program.saves:
        if pending.error is not None:
            assert not is_checkpoint(pending.path)
            text = str(pending.error)
            assert "changed between the call and the copy" in text or "which was not saved" in text, text
            assert any(name in text for name in expected) or "which was not saved" in text, text
            assert not program.is_announced, text
            continue
        published += 1
        found = load_state_dict(pending.path, "")
        assert found.keys() == expected.keys()
        wrong = [name for name, value in expected.items() if found[name].numpy().tobytes() != value.numpy().tobytes()]
        assert wrong == [], (pending.path.name, read_manifest(pending.path).origins)
    return published


def run(seeds: range, folder: Path) -> None:
    published = 0
    for seed in seeds:
        program = Program(seed, folder / str(seed))
        program.folder.mkdir()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program.run()
        published += check(program)
    assert published > 2 * len(seeds)


def test_random_programs_publish_what_was_there_at_the_call_or_nothing(tmp_path: Path) -> None:
    run(range(8), tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_300_random_programs_publish_what_was_there_at_the_call_or_nothing(tmp_path: Path) -> None:
    run(range(100, 400), tmp_path)
