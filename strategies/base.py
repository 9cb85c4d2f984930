"""What all parts of the strategy stand on: who this process is, and the state that they share."""

from __future__ import annotations

import contextlib
import itertools
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from kenotron.checkpoint import Checkpointer, FolderClaim, Nodes
from kenotron.layout import ParallelLayout
from kenotron.optim.zero import ShardedUpdate
from kenotron.parallel.apply import Parallelized
from kenotron.parallel.random import OwnStream, RandomStreams
from kenotron.ranks import RankMonitor
from kenotron.strategies import _lightning
from kenotron.strategies.environments import find_mpi
from kenotron.strategies.guard import StepGuard
from kenotron.strategies.hooks import HookRelay
from kenotron.strategies.kept import Beliefs
from kenotron.strategies.launching import launcher_class
from kenotron.strategies.loss import TokenCount
from kenotron.strategies.settings import CheckpointSettings, ProcessGroupSettings
from kenotron.strategies.state import CheckpointState
from kenotron.strategies.steps import PipelineSteps

if TYPE_CHECKING:
    from lightning.pytorch.strategies import ParallelStrategy as _LightningStrategy
    from torch.distributed.device_mesh import DeviceMesh
else:  # mixed in by `strategy_class`, from either of Lightning's packages
    _LightningStrategy = object


class StrategyBase(_LightningStrategy):
    """The strategy's state; `strategy.KenotronStrategyBase` sets it up."""

    names: _lightning.Names
    num_nodes: int
    last_grad_norm: torch.Tensor | None
    _wanted: ParallelLayout
    _layout: ParallelLayout | None
    _checkpoint_settings: CheckpointSettings
    _held_checkpointer: Checkpointer | None
    _nodes: Nodes | None
    _claims: list[FolderClaim]
    _mesh: DeviceMesh | None
    _dp_group: dist.ProcessGroup
    _host_pp_group: dist.ProcessGroup
    _peers: dist.ProcessGroup  # the ranks that share this one's samples
    _hooks: HookRelay | None
    _example_input: Any
    _monitor: RankMonitor | None
    _last_monitor: RankMonitor | None
    _announcements: dist.Store | None
    _done: Parallelized | None
    _steps: PipelineSteps | None
    _state: CheckpointState | None
    _tokens: TokenCount | None
    _streams: RandomStreams | None
    _own_stream: OwnStream
    _sync: bool
    _is_finished: bool
    _guards: dict[int, StepGuard]
    _updates: list[ShardedUpdate]
    _sum_to_differentiate: torch.Tensor | None
    _run_id: str
    _num_saves: int
    _beliefs: Beliefs
    _restores_late: bool | None
    _group_settings: ProcessGroupSettings

    @property
    def _user_module(self) -> Any:
        assert self.lightning_module is not None
        return self.lightning_module

    @property
    def _trainer(self) -> Any:
        """The module's trainer; ``None`` where the module has not been given to one."""
        return getattr(self._lightning_module, "_trainer", None)

    @property
    def _is_fitting(self) -> bool:
        return self._trainer is not None and self._trainer.state.fn == self.names.TrainerFn.FITTING

    @property
    def cluster_environment(self) -> Any:
        """Who started the processes, and who this one is."""
        return self._cluster_environment

    @cluster_environment.setter
    def cluster_environment(self, environment: Any) -> None:
        # Lightning knows mpirun by mpi4py alone; in SLURM's jobs each process would take itself for the script's rank 0.
        is_guess = type(environment).__name__ in ("LightningEnvironment", "SLURMEnvironment")
        self._cluster_environment = (find_mpi() or environment) if is_guess else environment

    @property
    def layout(self) -> ParallelLayout:
        """The layout; its sizes are numbers as soon as the number of processes is known."""
        if self._layout is None and (self.parallel_devices is not None or self._wanted.dp != "auto"):
            with contextlib.suppress(ValueError):  # reported where processes start
                return self._wanted.resolve(self.num_nodes * self.num_processes)
        return self._layout or self._wanted

    @property
    def root_device(self) -> torch.device:
        return self.parallel_devices[self.local_rank] if self.parallel_devices else torch.device("cpu")

    @property
    def num_processes(self) -> int:
        return len(self.parallel_devices) if self.parallel_devices else 1

    @property
    def is_distributed(self) -> bool:
        """Whether samples are split over ranks: then Lightning brings in its sampler and lets ``sync_dist`` reduce."""
        return self._dp_size > 1

    @property
    def _dp_size(self) -> int:
        layout = self.layout
        return 1 if layout.dp == "auto" else layout.dp_size

    @property
    def distributed_sampler_kwargs(self) -> dict[str, int]:
        return {"num_replicas": self._dp_size, "rank": self.layout.dp_rank(self.global_rank)}

    def process_dataloader(self, dataloader: Any) -> Any:
        """Seed loader workers by data-parallel rank: ranks that share samples must draw the same random numbers."""
        self.names.add_worker_init_fn(dataloader, self.layout.dp_rank(self.global_rank))
        return dataloader

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """Whether weights can't be loaded before set-up: they go straight into what this rank holds then.

        Where each rank has plain, whole weights already, hooks run in the order that they have in one process.
        """
        if self._restores_late is None:  # from ``configure_model`` on, until the trainer is called again
            module = self._lightning_module
            if module is None:  # somebody looks into a checkpoint without having it restored
                return False
            is_made = not any(tensor.is_meta for tensor in itertools.chain(module.parameters(), module.buffers()))
            keeps_dtype = type(self.precision_plugin).convert_module is self.names.Precision.convert_module
            self._restores_late = not (self.layout.keeps_whole_parameters and is_made and keeps_dtype)
        return self._restores_late

    @property
    def lightning_restore_optimizer(self) -> bool:
        return not self.restore_checkpoint_after_setup

    @property
    def _is_alone(self) -> bool:
        """Whether there is one process, as soon as that is known: nothing is asked of the environment that started it."""
        return bool(self.parallel_devices) and self.num_processes * self.num_nodes == 1

    @property
    def global_rank(self) -> int:
        return 0 if self._is_alone else int(super().global_rank)

    @property
    def local_rank(self) -> int:
        return 0 if self._is_alone else int(super().local_rank)

    @property
    def node_rank(self) -> int:
        return 0 if self._is_alone else int(super().node_rank)

    @property
    def world_size(self) -> int:
        return 1 if self._is_alone else int(super().world_size)

    def set_world_ranks(self) -> None:
        if self.cluster_environment is not None and self.parallel_devices and not self._is_alone:
            self.cluster_environment.set_global_rank(self.node_rank * self.num_processes + self.local_rank)
            self.cluster_environment.set_world_size(self.num_nodes * self.num_processes)
        _lightning.set_rank(self.names, self.global_rank)

    def _configure_launcher(self) -> None:
        if self.num_processes * self.num_nodes == 1:
            if self.cluster_environment is not None and self.cluster_environment.creates_processes_externally:
                self.cluster_environment.validate_settings(num_devices=1, num_nodes=1)
            return
        method = self._group_settings.start_method
        if method != "popen" and not self.cluster_environment.creates_processes_externally:
            self._launcher = launcher_class(self.names.package)(self, start_method=method)
            return
        # Also where processes exist already (torchrun, SLURM): it checks that their number is devices × num_nodes.
        self._launcher = self.names.SubprocessScriptLauncher(self.cluster_environment, self.num_processes, self.num_nodes)

    @property
    def _is_connected(self) -> bool:
        return self._mesh is not None and dist.is_initialized()

    @property
    def _is_failing(self) -> bool:
        return self._trainer is not None and self._trainer.state.status == "interrupted"

    def _ended_ranks(self) -> set[int]:
        """Return the ranks whose processes are gone, as far as this one knows."""
        monitor = self._monitor or self._last_monitor
        return set() if monitor is None else monitor.ended()

    @property
    def _uses_foreign_io(self) -> bool:
        """Whether the user's own CheckpointIO plugin reads and writes (one process: it takes whole tensors)."""
        is_own = self._checkpoint_io is None or type(self._checkpoint_io).__name__ == "TorchCheckpointIO"
        return not is_own and not isinstance(getattr(self._checkpoint_io, "checkpointer", None), Checkpointer)

    @property
    def checkpointer(self) -> Checkpointer:
        """What saves: that of an ``AsyncCheckpointIO`` plugin, or the strategy's own."""
        if self._held_checkpointer is None:
            given = getattr(self._checkpoint_io, "checkpointer", None)
            settings = self._checkpoint_settings
            self._held_checkpointer = given or Checkpointer(settings.engine, on_error=settings.on_error)
        return self._held_checkpointer
