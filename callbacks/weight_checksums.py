"""Whether replicas are still replicas."""

from __future__ import annotations

import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from kenotron.callbacks.summary import EveryNSteps
from kenotron.checkpoint import LocalTensor
from kenotron.checkpoint.boxes import Box
from kenotron.checkpoint.format import box_of
from kenotron.devices import to_host
from kenotron.fingerprint import fingerprint
from kenotron.strategies.persistence import Persistence

_MOST_NAMED = 8


class ReplicasDifferError(RuntimeError):
    """Ranks that should hold the same weights hold different ones."""


class WeightChecksums(L.Callback):
    """Compare what several ranks hold of the parameters, bit for bit, every so many optimizer steps.

    That is all that is there more than once: data-parallel replicas (``zero_stage`` 0 to 2, ``dp_replicate``), parameters
    that tensor and context parallelism leave whole, KV heads that ranks share, weights that pipeline stages tie. With
    ``zero_stage=3`` data-parallel ranks hold parts, each of which is there once.

    Each rank hashes on its device what it holds, joins the hashes of what it shares with the same ranks to one number, and one
    all-gather brings these together: a few dozen bytes a rank. Only where they differ the parameters are looked for. On CUDA
    the host reads the numbers after the next step, when they are there.

    Works under ``KenotronStrategy`` and ``ddp``. Logs ``checksums/different_parameters``.

    Args:
        every_n_train_steps: optimizer steps between comparisons.
        on_difference: ``"raise"`` on all ranks, or ``"warn"`` on rank 0.

    Raises:
        ValueError: settings out of range; at set-up a strategy whose replicas are not known.
        ReplicasDifferError: with the names of parameters and the ranks.
    """

    def __init__(self, every_n_train_steps: int = 1000, on_difference: Literal["raise", "warn"] = "raise") -> None:
        if on_difference not in ("raise", "warn"):
            raise ValueError(f"on_difference={on_difference!r}: set 'raise' or 'warn'.")
        self._turn, self._on_difference = EveryNSteps(every_n_train_steps), on_difference
        self._num_groups: int | None = None
        self._begun: _Comparison | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse strategies that shard in their own way."""
        if stage == "fit" and not isinstance(trainer.strategy, (Persistence, DDPStrategy, SingleDeviceStrategy)):
            raise ValueError(
                f"WeightChecksums knows the replicas of KenotronStrategy and of ddp, not of {type(trainer.strategy).__name__}. "
                "Use one of these, or leave it out."
            )

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Remember where this ``fit`` begins."""
        self._turn.begin(trainer)
        self._num_groups, self._begun = None, None

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        """Judge what was begun a step ago, and begin after every n-th step."""
        self._judge(trainer)
        if trainer.world_size == 1 or not self._turn.is_due(trainer):
            return
        self._begun = self._begin(trainer, pl_module)
        if trainer.strategy.root_device.type != "cuda":
            self._judge(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Judge the last comparison."""
        self._judge(trainer)

    def _begin(self, trainer: L.Trainer, pl_module: L.LightningModule) -> _Comparison:
        device = trainer.strategy.root_device
        hashes: defaultdict[tuple[int, ...], list[tuple[str, Tensor]]] = defaultdict(list)
        for name, owners, part in sorted(_shared_parts(trainer, pl_module), key=lambda each: each[:2]):
            hashes[owners].append((name, fingerprint(part).to(device)))
        groups = {_number_of(owners): found for owners, found in hashes.items()}
        if self._num_groups is None:  # the longest list of any rank: all must gather as much
            longest = torch.tensor(len(groups), device=device)
            dist.all_reduce(longest, op=dist.ReduceOp.MAX)
            self._num_groups = int(longest)
        own = torch.zeros(self._num_groups, 2, dtype=torch.int64, device=device)
        for row, (number, found) in enumerate(groups.items()):
            own[row, 0] = number
            own[row, 1] = fingerprint(torch.stack([value for _, value in found]))
        gathered = [torch.empty_like(own) for _ in range(trainer.world_size)]
        dist.all_gather(gathered, own)
        return _Comparison(trainer.global_step, groups, *to_host(torch.stack(gathered)))

    def _judge(self, trainer: L.Trainer) -> None:
        begun, self._begun = self._begun, None
        if begun is None:
            return
        if begun.ready is not None:
            begun.ready.synchronize()
        by_group: defaultdict[int, dict[int, int]] = defaultdict(dict)
        for rank, rows in enumerate(begun.gathered.tolist()):
            for number, value in rows:
                by_group[number][rank] = value
        by_group.pop(0, None)  # rows that a rank does not use
        wrong = {number for number, values in by_group.items() if len(set(values.values())) > 1}
        problems = _find(wrong, begun.groups) if wrong else []
        for logger in trainer.loggers:
            logger.log_metrics({"checksums/different_parameters": float(len(problems))}, step=begun.step)
        if problems:
            self._tell(begun.step, problems)

    def _tell(self, step: int, problems: Sequence[str]) -> None:
        rest = len(problems) - _MOST_NAMED
        named = [*problems[:_MOST_NAMED], *([f"and {rest} more"] if rest > 0 else [])]
        text = "\n".join([f"After step {step} replicas differ in {len(problems)} parameters:", *named])
        if self._on_difference == "raise":
            raise ReplicasDifferError(f"{text}\nResume from a checkpoint, without the host that is in the minority.")
        rank_zero_warn(text)


class _Comparison(NamedTuple):
    """What was begun: this rank's hashes by group, and the joint ones of all ranks, on the host as soon as ``ready``."""

    step: int
    groups: Mapping[int, list[tuple[str, Tensor]]]
    gathered: Tensor
    ready: torch.cuda.Event | None


def _shared_parts(trainer: L.Trainer, pl_module: L.LightningModule) -> Iterable[tuple[str, tuple[int, ...], Tensor]]:
    """Yield name, holders and value of each part of a parameter that other ranks hold as well."""
    if not isinstance(trainer.strategy, Persistence):
        everybody = tuple(range(trainer.world_size))
        for name, param in pl_module.named_parameters():
            yield name, everybody, param.detach()
        return
    for tensor in trainer.strategy.held_parameters():
        for piece in tensor.pieces:
            owners = tensor.owners if piece.owners is None else piece.owners
            if len(owners) > 1:
                yield _label(tensor, piece.offset), owners, box_of(tensor.tensor, Box(piece.local, piece.shape))


def _label(tensor: LocalTensor, offset: tuple[int, ...]) -> str:
    return tensor.name if tuple(tensor.tensor.shape) == tensor.global_shape else f"{tensor.name} at {list(offset)}"


def _number_of(owners: tuple[int, ...]) -> int:
    """Return a number by which ranks know who shares with whom; not 0."""
    text = ",".join(map(str, owners)).encode()
    return (zlib.crc32(text) << 31 | zlib.adler32(text) >> 1) + 1


def _find(wrong: set[int], groups: Mapping[int, list[tuple[str, Tensor]]]) -> list[str]:
    """Return what differs, as a line for each parameter; all ranks call it."""
    own = {
        (number, name): int(value) for number, found in groups.items() if number in wrong for name, value in found
    }  # by now the host may wait: training is about to end, or somebody is warned
    everybody: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everybody, own)
    values: defaultdict[tuple[int, str], dict[int, int]] = defaultdict(dict)
    for rank, told in enumerate(everybody):
        for key, value in told.items():
            values[key][rank] = value
    return [f"{name}: {_sides(by_rank)}" for (_, name), by_rank in sorted(values.items()) if len(set(by_rank.values())) > 1]


def _sides(by_rank: Mapping[int, int]) -> str:
    """Tell which ranks agree with each other; the most come first."""
    sides = [
        f"ranks {[rank for rank, value in by_rank.items() if value == common]} hold {common & 0xFFFFFFFFFFFFFFFF:016x}"
        for common, _ in Counter(by_rank.values()).most_common()
    ]
    return ", ".join(sides)
