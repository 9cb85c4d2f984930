"""The layout: how many ranks each axis has, who does what, and the torch ``DeviceMesh`` that follows from it.

World = ``pp × dp × cp × tp`` with ``dp = dp_replicate × dp_shard``; tp is innermost (its ranks are neighbours), pp outermost.
``ep`` borrows ranks from ``dp_shard × cp`` and costs none of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

ZeroStage = Literal[0, 1, 2, 3]

#: Mesh axes from the outermost to the innermost.
AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")


@dataclass(frozen=True, kw_only=True)
class Coordinates:
    """Where one rank stands on each axis."""

    pp: int
    dp_replicate: int
    dp_shard: int
    cp: int
    tp: int


@dataclass(frozen=True, kw_only=True)
class ParallelLayout:
    """The sizes of the five axes and their arithmetic.

    Args:
        dp: data-parallel ranks; ``"auto"`` takes what the world leaves after the other axes.
        tp: tensor-parallel ranks. pp: pipeline ranks. cp: context-parallel ranks.
        ep: expert-parallel ranks, borrowed from ``dp_shard × cp``.
        dp_replicate: how many copies of the sharded state exist (HSDP); divides ``dp``.
        zero_stage: 0 replicates everything over dp; 1 shards the optimizer state; 2 also gradients, which are
            reduce-scattered every microbatch; 3 also parameters, which are freed after use.

    Raises:
        ValueError: a size below 1, or a combination that cannot be.
    """

    dp: int | Literal["auto"] = "auto"
    tp: int = 1
    pp: int = 1
    cp: int = 1
    ep: int = 1
    dp_replicate: int = 1
    zero_stage: ZeroStage = 1

    def __post_init__(self) -> None:
        for name in ("tp", "pp", "cp", "ep", "dp_replicate"):
            _check_size(name, getattr(self, name))
        if self.dp != "auto":
            _check_size("dp", self.dp)
            if self.dp % self.dp_replicate:
                raise ValueError(
                    f"dp_replicate={self.dp_replicate} does not divide dp={self.dp}: dp = dp_replicate × dp_shard. "
                    f"Set dp_replicate to one of {divisors(self.dp)}."
                )
        if self.zero_stage not in (0, 1, 2, 3) or isinstance(self.zero_stage, bool):
            raise ValueError(f"zero_stage={self.zero_stage!r} is not a ZeRO stage. Set zero_stage to 0, 1, 2 or 3.")

    def resolve(self, world_size: int) -> ParallelLayout:
        """Return the same layout with ``dp`` as a number.

        Raises:
            ValueError: the sizes do not multiply to ``world_size``.
        """
        model = self.pp * self.cp * self.tp
        if self.dp == "auto":
            if world_size % model:
                raise ValueError(
                    f"pp={self.pp} × cp={self.cp} × tp={self.tp} = {model} does not divide the world of {world_size} "
                    f"processes. Start a multiple of {model} processes (devices × num_nodes), or make the axes smaller."
                )
            dp = world_size // model
        else:
            dp = self.dp
            if model * dp != world_size:
                raise ValueError(
                    f"pp={self.pp} × dp={dp} × cp={self.cp} × tp={self.tp} = {model * dp}, but {world_size} processes run "
                    f"(devices × num_nodes). Start {model * dp} processes, or leave dp='auto'."
                )
        if dp % self.dp_replicate:
            raise ValueError(
                f"dp_replicate={self.dp_replicate} does not divide dp={dp} (world of {world_size} processes). "
                f"Set dp_replicate to one of {divisors(dp)}."
            )
        if (dp // self.dp_replicate * self.cp) % self.ep:
            raise ValueError(
                f"ep={self.ep} does not divide dp_shard × cp = {dp // self.dp_replicate} × {self.cp}: experts borrow those "
                f"ranks. Set ep to one of {divisors(dp // self.dp_replicate * self.cp)}."
            )
        return ParallelLayout(
            dp=dp, tp=self.tp, pp=self.pp, cp=self.cp, ep=self.ep,
            dp_replicate=self.dp_replicate, zero_stage=self.zero_stage,
        )  # fmt: skip

    @property
    def dp_size(self) -> int:
        """Data-parallel ranks; the layout must be resolved."""
        if self.dp == "auto":
            raise ValueError("dp='auto' has no size before the number of processes is known: call layout.resolve(world_size).")
        return self.dp

    @property
    def dp_shard(self) -> int:
        return self.dp_size // self.dp_replicate

    @property
    def world_size(self) -> int:
        return self.pp * self.dp_size * self.cp * self.tp

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """Sizes in the order of ``AXES``."""
        return (self.pp, self.dp_replicate, self.dp_shard, self.cp, self.tp)

    @property
    def keeps_whole_parameters(self) -> bool:
        """Whether every rank has all of the module in plain parameters."""
        is_sharded = self.zero_stage == 3 and self.dp_shard > 1
        return self.tp == self.pp == self.cp == self.ep == 1 and not is_sharded

    def coordinates(self, rank: int) -> Coordinates:
        """Return where ``rank`` stands on each axis."""
        where: dict[str, int] = {}
        for axis, size in zip(reversed(AXES), reversed(self.sizes), strict=True):
            rank, where[axis] = divmod(rank, size)
        return Coordinates(**where)

    def rank_of(self, where: Coordinates) -> int:
        """Return the global rank at ``where``."""
        rank = 0
        for axis, size in zip(AXES, self.sizes, strict=True):
            rank = rank * size + getattr(where, axis)
        return rank

    def rank_at(self, *where: int) -> int:
        """Return the global rank at coordinates in the order of ``AXES``."""
        return self.rank_of(Coordinates(**dict(zip(AXES, where, strict=True))))

    def dp_rank(self, rank: int) -> int:
        """Return the data-parallel coordinate of ``rank``: ranks with the same one load the same samples."""
        where = self.coordinates(rank)
        return where.dp_replicate * self.dp_shard + where.dp_shard

    def device_mesh(self, device_type: str, timeout: timedelta | None = None) -> DeviceMesh:
        """Return the five-dimensional mesh; its dimensions are ``AXES``. Needs the default process group.

        Axes of size 1 are kept: one path for every layout.
        """
        return _mesh(device_type, self.sizes, AXES, timeout)

    def expert_mesh(self, device_type: str, timeout: timedelta | None = None) -> DeviceMesh:
        """Return the mesh in which experts live: ``dp_shard × cp`` becomes ``expert_shard × ep``.

        Ranks that are neighbours on ``ep`` have different experts; those of one ``expert_shard`` column have the same.
        """
        sizes = (self.pp, self.dp_replicate, self.dp_shard * self.cp // self.ep, self.ep, self.tp)
        return _mesh(device_type, sizes, ("pp", "dp_replicate", "expert_shard", "ep", "tp"), timeout)

    def ep_rank(self, dp_shard: int, cp: int) -> int:
        """Return the expert-parallel coordinate of the ranks at ``dp_shard`` and ``cp``."""
        return (dp_shard * self.cp + cp) % self.ep

    def __str__(self) -> str:
        return self.table()

    def table(self, device: str = "", max_rows: int = 16) -> str:
        """Return who does what, one line a rank (the first ``max_rows`` of them)."""
        head = " × ".join(f"{name} {size}" for name, size in self._named_sizes() if size > 1) or "one process"
        lines = [f"{head}   ZeRO {self.zero_stage}   world {self.world_size}"]
        columns = [axis for axis, size in zip(AXES, self.sizes, strict=True) if size > 1]
        if columns:
            heads = [*columns, *(["ep"] if self.ep > 1 else [])]
            lines.append("rank  " + "  ".join(f"{axis:>12}" for axis in heads) + "  loads batches of")
        for rank in range(min(self.world_size, max_rows) if columns else 0):
            where = self.coordinates(rank)
            numbers = [getattr(where, axis) for axis in columns]
            numbers += [self.ep_rank(where.dp_shard, where.cp)] if self.ep > 1 else []
            cells = "  ".join(f"{number:>12}" for number in numbers)
            lines.append(f"{rank:>4}  {cells}  dp rank {self.dp_rank(rank)}")
        if columns and self.world_size > max_rows:
            lines.append(f" ...  ({self.world_size - max_rows} more ranks)")
        if device:
            lines[0] += f"   on {device}"
        return "\n".join(lines)

    def _named_sizes(self) -> list[tuple[str, int]]:
        return [("pp", self.pp), ("dp", self.dp_size), ("cp", self.cp), ("tp", self.tp), ("ep", self.ep)]


def _mesh(device_type: str, sizes: tuple[int, ...], axes: tuple[str, ...], timeout: timedelta | None) -> DeviceMesh:
    from torch.distributed.device_mesh import init_device_mesh

    from kenotron.parallel._torch import group_options

    # A group made by a mesh does not inherit the time-out that init_process_group was given.
    overrides: Any = None if timeout is None else {axis: (None, group_options(device_type, timeout)) for axis in axes}
    return init_device_mesh(device_type, sizes, mesh_dim_names=axes, backend_override=overrides)


def _check_size(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}={value!r} is not a number of ranks. Set {name} to an integer of 1 or more.")


def divisors(number: int, limit: int | None = None) -> list[int]:
    """Return what divides ``number``, up to ``limit``."""
    return [d for d in range(1, min(number, limit or number) + 1) if number % d == 0]
