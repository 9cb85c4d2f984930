"""The Lightning strategy: it shards the user's module, runs its steps, and keeps Lightning's loops in step on all ranks.

``Trainer.fit`` calls, in this order: ``setup_environment`` (processes, mesh), the user's ``configure_model``, ``setup``
(`parallel.apply`, then optimizers), ``load_checkpoint``, and for each batch ``optimizer_step`` (or a closure alone, while
gradients accumulate) → ``training_step`` → ``backward``. With ``pp > 1`` forward and backward both happen inside
``training_step``.
"""

from __future__ import annotations

import contextlib
import functools
import os
import uuid
import warnings
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchmetrics import Metric

from kenotron.checkpoint import Checkpointer, FolderClaim, Nodes, check_sharing, recover, remove_leftovers
from kenotron.layout import ParallelLayout, ZeroStage
from kenotron.optim.offload import HostState
from kenotron.optim.zero import ShardedUpdate
from kenotron.parallel import pipeline as pipelines
from kenotron.parallel._torch import default_store, flatten
from kenotron.parallel.apply import Parallelized, Request, parallelize
from kenotron.parallel.context import ContextKind, check_kind
from kenotron.parallel.float8 import Float8
from kenotron.parallel.grads import local
from kenotron.parallel.init import deferring
from kenotron.parallel.plan import ParallelPlan, transformers_models
from kenotron.parallel.random import OwnStream, RandomStreams
from kenotron.parallel.recompute import Recompute, RecomputeMode
from kenotron.ranks import RankMonitor
from kenotron.strategies import _lightning
from kenotron.strategies.auto import choose, take_apart
from kenotron.strategies.callback_paths import reserve_names
from kenotron.strategies.checkpointing import check_path, check_writable, share_random_state
from kenotron.strategies.checks import check_callbacks, check_compiled, check_pipelined, with_known_names
from kenotron.strategies.collectives import Collectives
from kenotron.strategies.guard import Guard, StepGuard
from kenotron.strategies.hooks import HookRelay, hide_example_input
from kenotron.strategies.kept import Beliefs
from kenotron.strategies.logs import LogRelay
from kenotron.strategies.loss import TokenCount
from kenotron.strategies.microbatches import Splitter
from kenotron.strategies.optimizers import OptimizerSetup
from kenotron.strategies.persistence import Persistence
from kenotron.strategies.precision import check_gather, check_precision, share_overflow
from kenotron.strategies.settings import AutoSettings, CheckpointSettings, ProcessGroupSettings
from kenotron.strategies.state import CheckpointState
from kenotron.strategies.steps import PipelineSteps
from kenotron.strategies.training import Training

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class KenotronStrategyBase(Training, Persistence, OptimizerSetup, Collectives):
    """Train any LightningModule on data × tensor × pipeline × expert × context parallelism.

    Args:
        tp: tensor-parallel ranks. pp: pipeline ranks. cp: context-parallel ranks.
        ep: expert-parallel ranks, borrowed from ``dp_shard × cp``.
        dp: data-parallel ranks; ``"auto"`` takes what the world leaves. dp_replicate: copies of the sharded state (HSDP).
        zero_stage: 0 replicates; 1 shards the optimizer's state, 2 also gradients, and both leave parameters whole and plain;
            3 shards parameters as well (FSDP2), which are gathered for their use.
        sequence_parallel: cut hidden states along the sequence between tensor-parallel regions.
        schedule: ``"1f1b"``, ``"afab"``, ``"interleaved_1f1b"``; experimental: ``"interleaved_zero_bubble"``, ``"zbv"``.
        microbatches: into how many parts a batch is split under pp.
        virtual_stages: stages per pipeline rank.
        blocks: name of the module's list of like layers, where it can't be found.
        context: how attention reaches over cp ranks: ``"ring"`` passes keys and values around, ``"ulysses"`` exchanges parts of
            the sequence for heads.
        capacity_factor: an expert takes so many times its even share of a rank's tokens, and drops the rest; ``None``: all.
        recompute: what blocks keep for the backward pass: ``"none"`` (everything), ``"full"`` (their inputs), ``"selective"``
            (matrix products and attention), or a ``Recompute`` with every n-th block, operators, a budget, offloading.
        float8: products of the blocks' linear layers run in float8, by torchao; ``Float8`` says which and how they are scaled.
        compile: let torch compile each block.
        async_tp: in compiled blocks under sequence parallelism, transfers travel behind the products beside them, on GPUs that
            can read each other's memory.
        gather_bf16: under ``precision="bf16-mixed"`` weights that ZeRO 3 shards are gathered, and used, as bfloat16: half
            the traffic, and autocast makes no copies. Weights stay float32, and so do the sums of gradients.
        plan: what becomes of each module, as a ``ParallelPlan`` or a mapping of name patterns to styles.
        auto: what the planner is told. It chooses whatever of ``tp``, ``pp``, ``cp``, ``ep``, ``dp_replicate``, ``zero_stage``,
            ``sequence_parallel`` and ``recompute`` is ``"auto"``.
        offload_optimizer: optimizer state lies in host memory and comes to the device a part at a time, during the update.
        guard: which steps are skipped because their loss or gradients are not finite, or jump; ``None``: none.
        process_group, checkpoint: further settings.
        accelerator, parallel_devices, cluster_environment, checkpoint_io, precision_plugin: as in Lightning's strategies.

    Raises:
        ValueError: settings that can't go together, here; sizes that do not fit the world or the module, at set-up.
    """

    @with_known_names
    def __init__(
        self,
        tp: int | Literal["auto"] = 1,
        pp: int | Literal["auto"] = 1,
        cp: int | Literal["auto"] = 1,
        ep: int | Literal["auto"] = 1,
        dp: int | Literal["auto"] = "auto",
        dp_replicate: int | Literal["auto"] = 1,
        zero_stage: ZeroStage | Literal["auto"] = 1,
        sequence_parallel: bool | Literal["auto"] = False,
        schedule: str = "1f1b",
        microbatches: int | Literal["auto"] = "auto",
        virtual_stages: int = 1,
        blocks: str | None = None,
        context: ContextKind = "ring",
        capacity_factor: float | None = None,
        recompute: RecomputeMode | Recompute | Literal["auto"] = "none",
        float8: bool | Float8 = False,
        compile: bool = False,
        async_tp: bool = False,
        gather_bf16: bool = False,
        plan: ParallelPlan | Mapping[str, str] | None = None,
        *,
        auto: AutoSettings | None = None,
        offload_optimizer: bool = False,
        guard: Guard | None = None,
        process_group: ProcessGroupSettings | None = None,
        checkpoint: CheckpointSettings | None = None,
        accelerator: Any = None,
        parallel_devices: list[torch.device] | None = None,
        cluster_environment: Any = None,
        checkpoint_io: Any = None,
        precision_plugin: Any = None,
    ) -> None:
        given: dict[str, Any] = {
            "tp": tp, "pp": pp, "cp": cp, "ep": ep, "dp_replicate": dp_replicate, "zero_stage": zero_stage,
            "sequence_parallel": sequence_parallel, "recompute": recompute,
        }  # fmt: skip
        self._given, self._auto = take_apart(given)
        self._auto_settings = auto or AutoSettings()
        axes = {name: self._given[name] for name in ("tp", "pp", "cp", "ep", "dp_replicate", "zero_stage")}
        self._wanted = wanted = ParallelLayout(dp=dp, **axes)
        check_kind(context)
        if capacity_factor is not None and ((wanted.ep == 1 and "ep" not in self._auto) or capacity_factor <= 0):
            raise ValueError(
                f"capacity_factor={capacity_factor}, ep={ep}: it is a positive number, for ep > 1. Set it to None."
            )
        if "pp" not in self._auto:
            _check_microbatches(microbatches, wanted.pp)
            pipelines.check_schedule(schedule, virtual_stages, wanted.pp)
        if wanted.pp > 1 and microbatches != "auto":
            pipelines.check_microbatches(schedule, microbatches, wanted.pp)
        if self._given["sequence_parallel"] and wanted.tp == 1 and "tp" not in self._auto:
            raise ValueError("sequence_parallel=True cuts sequences over the tp ranks, but tp=1. Set tp > 1, or False.")
        if async_tp and not (compile and (self._given["sequence_parallel"] or "sequence_parallel" in self._auto)):
            raise ValueError(
                f"async_tp=True with compile={compile}, sequence_parallel={self._given['sequence_parallel']}: the compiler "
                "joins transfers of sequence parallelism with products. Set both to True, or async_tp=False."
            )
        self._async_tp = async_tp
        self._schedule, self._virtual_stages, self._microbatches = schedule, virtual_stages, microbatches
        self._sequence_parallel = bool(self._given["sequence_parallel"])
        self._blocks, self._plan = blocks, ParallelPlan.of(plan)
        self._context, self._capacity_factor = context, capacity_factor
        self._gather_bf16, self._offload_optimizer = gather_bf16, offload_optimizer
        self._float8 = Float8() if float8 is True else float8 or None
        self._recompute, self._compile, self._guard = Recompute.of(self._given["recompute"]), compile, guard
        self._group_settings = process_group or ProcessGroupSettings()
        self._checkpoint_settings = checkpoint or CheckpointSettings()
        self._held_checkpointer: Checkpointer | None = None
        self._beliefs = Beliefs()
        self._restores_late: bool | None = None
        self._nodes: Nodes | None = None
        self._claims: list[FolderClaim] = []
        super().__init__(
            accelerator=accelerator,
            parallel_devices=parallel_devices,
            cluster_environment=cluster_environment,
            checkpoint_io=checkpoint_io,
            precision_plugin=precision_plugin,
        )
        self.num_nodes = 1
        self._layout: ParallelLayout | None = None
        self._mesh: DeviceMesh | None = None
        self._expert_mesh: DeviceMesh | None = None
        self._monitor: RankMonitor | None = None
        self._last_monitor: RankMonitor | None = None
        self._announcements: dist.Store | None = None
        self._done: Parallelized | None = None
        self._steps: PipelineSteps | None = None
        self._hooks: HookRelay | None = None
        self._example_input: Any = None
        self._state: CheckpointState | None = None
        self._tokens: TokenCount | None = None
        self._sync, self._is_finished = True, False
        self._guards: dict[int, StepGuard] = {}
        self._offloaded: list[HostState] = []
        self._updates: list[ShardedUpdate] = []
        self._sum_to_differentiate: Tensor | None = None
        self._streams: RandomStreams | None = None
        self._seed, self._run_id, self._num_saves = 0, uuid.uuid4().hex[:12], 0
        self.last_grad_norm: Tensor | None = None

    # ------------------------------------------------------------------------------------------------ environment

    def setup_environment(self) -> None:
        super().setup_environment()
        self._restores_late = None
        if self.num_nodes * self.num_processes > 1:  # ranks start alike; one process goes on where its generators are
            self.names.reset_seed()
        self.set_world_ranks()
        if not self._auto:
            self._layout = self._wanted.resolve(self.world_size)
        self._seed = torch.initial_seed() % 2**31
        settings = self._group_settings
        if self.world_size > 1:
            self._meet_ranks(settings)
        if self._auto:
            self._ask_planner()
        if self.world_size == 1:
            return
        assert self._layout is not None
        if self._mesh is None:
            self._mesh = self._layout.device_mesh(self.root_device.type, settings.timeout)
            if self._layout.ep > 1:
                self._expert_mesh = self._layout.expert_mesh(self.root_device.type, settings.timeout)
            self._dp_group = flatten(self._mesh, "dp_replicate", "dp_shard", name="dp").get_group()
            self._host_pp_group = self._host_group()
            self._peers = self._group_of_peers()
        self._nodes = self._find_nodes(default_store())
        _lightning.set_device_mesh(self._user_module, self._mesh)
        self._agree_on_seed()

    def _ask_planner(self) -> None:
        """Let rank 0 choose what is "auto", for all ranks."""
        if self._layout is not None:  # a second call of the trainer
            return
        module = self._user_module
        answer: list[Any] = [None]
        if self.global_rank == 0:
            fixed = {"schedule": self._schedule, "virtual_stages": self._virtual_stages, "dp": self._wanted.dp}
            try:
                answer[0] = choose(
                    module, self._auto, {**self._given, **fixed}, world_size=self.world_size,
                    precision=str(self.precision_plugin.precision), device=self.root_device,
                    accumulate=module.trainer.accumulate_grad_batches, settings=self._auto_settings, user_plan=self._plan,
                    blocks=self._blocks,
                )  # fmt: skip
            except ValueError as error:  # every rank is to raise it
                answer[0] = error
        if self.world_size > 1:
            dist.broadcast_object_list(answer, 0)
        if isinstance(answer[0], ValueError):
            raise answer[0]
        choice = answer[0].choice
        self._layout = self._wanted = choice.layout
        self._sequence_parallel, self._recompute = choice.sequence_parallel, choice.recompute
        if choice.layout.pp > 1 and self._microbatches == "auto":
            self._microbatches = choice.num_microbatches
        memory, time = answer[0].memory.total / 1e9, answer[0].time.step
        text = f"planned: {choice}: {memory:.2f} GB on the fullest rank, {time:.3f} s a step by the planner's count"
        _lightning.say(self.names, text)

    def _find_nodes(self, store: dist.Store) -> Nodes | None:
        """Return how nodes agree on checkpoints, where each has a file system of its own."""
        if not self._checkpoint_settings.node_local or self.num_nodes == 1:
            return None
        first = self.global_rank - self.local_rank
        ranks = tuple(range(first, first + self.num_processes))
        clone: dist.Store = store.clone()  # type: ignore[attr-defined]  # the engine's worker asks it
        return Nodes(store=clone, index=self.node_rank, count=self.num_nodes, ranks=ranks)

    def _host_group(self) -> dist.ProcessGroup:
        """Return this pipeline's group for data on the host."""
        assert self._mesh is not None
        group: dist.ProcessGroup = self._mesh["pp"].get_group()
        if self.root_device.type == "cpu" or self.layout.pp == 1:
            return group
        columns = self._mesh.mesh.reshape(self.layout.pp, -1).T.tolist()
        made = dist.new_subgroups_by_enumeration(columns, backend="gloo")
        own: dist.ProcessGroup = made[0]
        return own

    def _group_of_peers(self) -> dist.ProcessGroup:
        """Return the group, for data on the host, of the ranks that share this one's samples."""
        assert self._mesh is not None
        by_samples = self._mesh.mesh.permute(1, 2, 0, 3, 4).reshape(self._dp_size, -1).tolist()
        own: dist.ProcessGroup = dist.new_subgroups_by_enumeration(by_samples, backend="gloo")[0]
        return own

    def _agree_on_seed(self) -> None:
        """Where the user set no seed, take rank 0's: ranks that share samples must shuffle alike."""
        seed, self._run_id = self.broadcast((torch.initial_seed(), self._run_id))
        if "PL_GLOBAL_SEED" not in os.environ and self.layout.pp * self.layout.tp * self.layout.cp > 1:
            torch.manual_seed(seed)
        self._seed = seed % 2**31
        if self.world_size > self._dp_size:
            share_random_state(self._peers)

    @contextlib.contextmanager
    def tensor_init_context(self, empty_init: bool | None = None) -> Generator[None, None, None]:
        """Let ``configure_model`` build for real in one process; on several its weights are made after everything is cut.

        Both begin where rank 0's random numbers are, and draw the same ones.
        """
        if self.num_nodes * self.num_processes == 1:
            with torch.device("cpu"), self.precision_plugin.tensor_init_context():
                yield
            return
        own = torch.get_rng_state()
        common = self.broadcast(own) if self._is_connected else own
        torch.set_rng_state(common)
        with deferring(), self.precision_plugin.tensor_init_context():
            yield
        if not torch.equal(own, common):
            torch.set_rng_state(own)

    # ------------------------------------------------------------------------------------------------------ set-up

    def setup(self, trainer: Any) -> None:
        assert self.accelerator is not None
        self.accelerator.setup(trainer)
        module = self._user_module
        self._check(module)
        check_precision(self.precision_plugin, self.layout)
        if self._gather_bf16:
            check_gather(self.precision_plugin, self.layout)
        self.model = self.precision_plugin.convert_module(module)
        self._done = self._parallelize(module)
        self._own_stream = OwnStream(self.layout.dp_rank(self.global_rank), self.root_device)
        self._tokens = TokenCount(
            replicas=self.layout.tp,
            data_parallel=self.layout.dp_size * self.layout.cp,
            distributed=self.world_size > 1,
            device=self.root_device,
        )
        fitting = trainer.state.fn == self.names.TrainerFn.FITTING
        if fitting:
            check_callbacks(trainer.callbacks, self._done)
            self._check_checkpoint_paths(trainer)
            self._prepare_checkpoints(trainer)
            self.setup_optimizers(trainer)
        sharing = None if self._nodes is None else self._nodes.ranks
        self._state = CheckpointState(
            self._done, self.optimizers, self.layout, self.global_rank, sharing, self._offloaded, self._updates
        )
        self.setup_precision_plugin()
        if fitting:
            self.names.optimizers_to_device(self.optimizers, self.root_device)
        if self.world_size > 1:
            self._connect_ranks(trainer, module)
        if self._done.cut is not None:
            self._connect_pipeline(trainer, module)
        self._example_input = hide_example_input(
            module, trainer, self.names, is_cut=self._done.cut is not None, is_whole=self._done.is_whole
        )
        if fitting and self.world_size > 1:
            self._say_who_does_what()
        self.barrier()

    def _say_who_does_what(self) -> None:
        assert self._done is not None
        own = sum(local(p).numel() for p in self._done.named_parameters().values())
        _lightning.say(
            self.names,
            f"{self.layout.table(device=self.root_device.type)}\n"
            f"{self._done.num_parameters:,} parameters in all, {own:,} of them on rank 0",
        )

    def _check_checkpoint_paths(self, trainer: Any) -> None:
        """Refuse here what would otherwise be refused at the end of the first epoch."""
        if self._uses_foreign_io:
            return
        for callback in trainer.checkpoint_callbacks:
            check_path(getattr(callback, "dirpath", None))

    def _prepare_checkpoints(self, trainer: Any) -> None:
        """Put a fence before each optimizer step, and clear away what a run that died has left."""
        if self._uses_foreign_io:
            return
        assert self._done is not None
        self.checkpointer.guard_optimizers().watch_others(self._done.named_parameters().values())
        reserve_names(trainer.checkpoint_callbacks, self.checkpointer)
        check_writable(self._checkpoint_folders(trainer), self._exchange, leads=self.leads_checkpoints)
        for folder in self._checkpoint_folders(trainer):
            if self.num_nodes > 1:
                leader = self.global_rank - self.local_rank
                check_sharing(folder, self._exchange, leader=leader, rank=self.global_rank, node_local=self._nodes is not None)
            for restored in recover(folder, self._exchange, leads=self.leads_checkpoints) if self._nodes else ():
                _lightning.warn(self.names, f"Published {restored}, as on the other nodes: the run before died over it.")
            if not self.leads_checkpoints:
                continue
            self._claim(folder)
            for leftover in remove_leftovers(folder):
                _lightning.warn(self.names, f"Removed {leftover}: a save that died before it was published.")

    def _checkpoint_folders(self, trainer: Any) -> list[Path]:
        """Return where callbacks will save."""
        folders = dict.fromkeys(getattr(callback, "dirpath", None) for callback in trainer.checkpoint_callbacks)
        return [Path(folder) for folder in folders if folder]

    def _check(self, module: Any) -> None:
        if self._uses_foreign_io and self.world_size > 1:
            raise ValueError(
                f"{type(self._checkpoint_io).__name__} gets whole state dicts on one rank, but the state is spread over "
                f"{self.world_size} ranks. Leave the plugin out: KenotronStrategy writes sharded checkpoints itself."
            )
        check_compiled(module, self.layout, _lightning.is_compiled(module))
        if self.layout.pp > 1:
            check_pipelined(module, self.layout.pp, overrides_backward=self.names.is_overridden("backward", module))

    def _parallelize(self, module: Any) -> Parallelized:
        done: Parallelized | None = module.__dict__.get("_kenotron")
        if done is not None and (done.layout == self.layout or not done.is_plain):
            if done.layout != self.layout:
                raise ValueError(
                    f"{type(module).__name__} was sharded before, as {done.layout.table(max_rows=0)}. Build a new one for "
                    "another layout and load a checkpoint into it."
                )
            return done
        request = Request(
            layout=self.layout,
            device=self.root_device,
            seed=self._seed,
            plan=self._plan,
            blocks=self._blocks,
            schedule=self._schedule,
            virtual_stages=self._virtual_stages,
            sequence_parallel=self._sequence_parallel,
            context=self._context,
            capacity_factor=self._capacity_factor,
            float8=self._float8,
            recompute=self._recompute,
            compile=self._compile,
            async_tp=self._async_tp and self.layout.tp > 1,
            gather_bf16=self._gather_bf16,
            manual_optimization=not module.automatic_optimization,
        )
        if self._layer_sync is not None and self.is_distributed:
            nn.SyncBatchNorm.convert_sync_batchnorm(module, self._dp_group)
        done = parallelize(module, self._mesh, request, self._expert_mesh)
        module.__dict__["_kenotron"] = done
        return done

    def _connect_ranks(self, trainer: Any, module: Any) -> None:
        """Let Lightning's loops, metrics and precision plugin see all ranks."""
        assert self._monitor is not None
        if self._done is not None and self._done.sharded is not None:
            self._done.sharded.gathered.has_failed = self._monitor.has_failed
            self._monitor.who_parted = self._done.sharded.gathered.names.who_parted
        _lightning.disable_inference_mode(trainer)
        if not self.is_distributed:  # Lightning then drops sync_dist=True, and advises to set it
            warnings.filterwarnings("ignore", message="It is recommended to use `self.log")
        stop = self.names.SIGTERMException
        _lightning.replace_sigterm_polling(trainer, self._monitor.request_stop, self._monitor.boundary, stop)
        for metric in module.modules():
            if isinstance(metric, Metric) and metric.process_group is None and self._dp_size < self.world_size:
                metric.process_group = self._dp_group
        share_overflow(self.precision_plugin)
        # On the instance: it holds for every precision plugin.
        plugin: Any = self.precision_plugin
        plugin.clip_grad_by_norm, plugin.clip_grad_by_value = self._clip_by_norm, self._clip_by_value

    def _connect_pipeline(self, trainer: Any, module: Any) -> None:
        assert self._mesh is not None and self._done is not None and self._done.cut is not None
        done, where = self._done, self.layout.coordinates(self.global_rank)
        if pipelines.SCHEDULES[self._schedule][2]:
            _lightning.warn(self.names, f"schedule={self._schedule!r} is experimental, here and in torch.")
        for _, model in transformers_models(module):
            if getattr(model.config, "output_router_logits", False):
                _lightning.warn(
                    self.names,
                    f"{type(model).__name__} computes its balancing loss from the layers of the last pipeline stage alone. Set "
                    "output_router_logits=False and use kenotron.models.MoE, whose layers attach their own, or pp=1.",
                )
        stream = self.layout.rank_at(where.pp, where.dp_replicate, where.dp_shard, where.cp, 0)
        self._streams = RandomStreams(self._seed, stream, self.root_device)
        pipeline = pipelines.Pipeline(
            self._done.cut,
            self._schedule,
            self._mesh["pp"].get_group(),
            self.root_device,
            enclose=done.enclose,
            before_backward=lambda stage, last: done.before_backward(last_microbatch=last, sync=self._sync, stage=stage),
            before_graph=done.look_for_shares,
            on_enter=self._streams.enter_model,
        )
        relay = LogRelay(module, pipeline.group, self._host_pp_group, pipeline.last_rank, self.root_device)
        assert self._tokens is not None
        splitter = Splitter(self._microbatches, self._schedule, self.layout.pp)
        self._steps = PipelineSteps(module, pipeline, splitter, relay, self._streams, self._tokens, done.experts)
        if trainer.state.fn == self.names.TrainerFn.FITTING:
            _lightning.skip_backward(trainer)
        self._hooks = HookRelay(self.names, self._steps)
        self._hooks.apply(module, trainer.callbacks)

    def model_to_device(self) -> None:
        """Nothing: parameters are moved when they have been cut."""


def _check_microbatches(microbatches: int | str, pp: int) -> None:
    is_number = isinstance(microbatches, int) and not isinstance(microbatches, bool)
    if microbatches != "auto" and not (is_number and int(microbatches) >= 1):
        raise ValueError(f"microbatches={microbatches!r} is no number of microbatches. Set 'auto' or an integer of 1 or more.")
    if pp == 1 and microbatches not in ("auto", 1):
        raise ValueError(
            f"microbatches={microbatches} splits batches for a pipeline, but pp=1. Set microbatches='auto', or use "
            "Trainer(accumulate_grad_batches=...) with smaller batches."
        )


@functools.cache
def strategy_class(package: str = "lightning.pytorch") -> type[KenotronStrategyBase]:
    """Return the strategy for one of Lightning's two packages: ``"lightning.pytorch"`` or ``"pytorch_lightning"``."""
    names = _lightning.Names(package)
    bases = (KenotronStrategyBase, names.ParallelStrategy)
    namespace = {"names": names, "__module__": "kenotron", "__doc__": KenotronStrategyBase.__doc__}
    made = type("KenotronStrategy", bases, namespace)
    _lightning.allow_compiled_modules(package, made)
    return made
