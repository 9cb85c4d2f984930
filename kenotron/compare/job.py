"""What is trained in a comparison, as every process of it reads it."""

from __future__ import annotations

import importlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kenotron.compare.strategies import parse_spec

#: Of a configuration's trainer, what belongs to the training; all else is the comparison's to choose.
KEPT = (
    "accelerator", "precision", "accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm", "deterministic",
    "benchmark", "sync_batchnorm",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Job:
    """One training, whatever its strategy.

    Args:
        folder: of all that the comparison writes.
        config: a YAML whose callbacks, loggers and strategy are left out; or ``None``, and then
        model, data: import paths with settings, as ``package.Module:depth=4``; without data the module has its own.
        devices: processes. steps: optimizer steps. seed: of all processes.
        trainer: further arguments of the trainer.

    Raises:
        ValueError: numbers out of range, or neither a configuration nor a model.
    """

    folder: str
    config: str | None = None
    model: str | None = None
    data: str | None = None
    devices: int = 1
    steps: int = 20
    seed: int = 1
    trainer: dict[str, Any]

    def __post_init__(self) -> None:
        if (self.config is None) == (self.model is None):
            raise ValueError("give either --config, or --model with --data: what should be trained?")
        for path in (self.model, self.data):
            if path is not None and "." not in parse_spec(path).name:
                raise ValueError(
                    f"{path!r} is no import path. Write it as package.module.Class, with settings as in :depth=4,lr=0.1."
                )
        if self.devices < 1:
            raise ValueError(f"devices={self.devices}: set it to 1 or more.")
        if self.steps < 4:
            raise ValueError(
                f"steps={self.steps}: set it to 4 or more; the first warm up and the last one follows a checkpoint."
            )

    @property
    def weights(self) -> Path:
        """Initial weights, for modules that are built in ``configure_model``."""
        return Path(self.folder) / "weights.pt"

    @property
    def warmup(self) -> int:
        """Steps that are not timed."""
        return min(3, (self.steps - 1) // 2)

    def write(self) -> Path:
        """Write it where processes find it."""
        path = Path(self.folder) / "job.json"
        path.write_text(json.dumps(asdict(self)))
        return path

    @staticmethod
    def read(path: str | Path) -> Job:
        """Return what was written."""
        return Job(**json.loads(Path(path).read_text()))

    def build(self) -> tuple[Any, Any]:
        """Return a new module and its data module, ``None`` where there is none; the same ones in every process."""
        import lightning as L

        L.seed_everything(self.seed, workers=True, verbose=False)
        if self.config is not None:
            fit = importlib.import_module("kenotron.cli.fit")
            found: tuple[Any, Any] = fit.parts_of(self.config)
            return found
        assert self.model is not None
        return _make(self.model), None if self.data is None else _make(self.data)


def _make(text: str) -> Any:
    """Return an object of the class that an import path with settings names."""
    spec = parse_spec(text)
    module, _, name = spec.name.rpartition(".")
    try:
        kind = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"{spec.name} can't be imported: {error}. Import paths begin in this folder, or in PYTHONPATH."
        ) from error
    try:
        return kind(**spec.settings)
    except TypeError as error:
        raise ValueError(f"{text!r}: {error}. Settings follow a colon: {spec.name}:name=value,name=value.") from error
