"""The Lightning strategy: it shards the user's module, runs its steps, and keeps Lightning's loops in step on all ranks.

``Trainer.fit`` calls, in this order: ``setup_environment`` (processes, mesh), the user's ``configure_model``, ``setup``
(`parallel.apply`, then optimizers), ``load_checkpoint``, and for each batch ``optimizer_step`` (or a closure alone, while
gradients accumulate) → ``training_step`` → ``backward``. With ``pp > 1`` forward and backward both happen inside
``training_step``.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import os
import uuid
import warnings
from collections.abc import Callable, Generator, Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torchmetrics import Metric

from kenotron import checkpoint as checkpoints
from kenotron.layout import ParallelLayout, ZeroStage
from kenotron.parallel import pipeline as pipelines
from kenotron.parallel._torch import default_store, flatten
from kenotron.parallel.apply import Parallelized, Request, parallelize
from kenotron.parallel.grads import clip_by_norm, clip_by_value, local
from kenotron.parallel.plan import ParallelPlan
from kenotron.parallel.random import RandomStreams
from kenotron.ranks import RankMonitor
from kenotron.strategies import _lightning
from kenotron.strategies.checkpointing import (
    LOADED_IN_PLACE,
    load_training,
    random_state,
    save_training,
    set_random_state,
)
from kenotron.strategies.logs import LogRelay
from kenotron.strategies.loss import StepLoss, TokenCount
from kenotron.strategies.microbatches import Splitter, check_same_batch
from kenotron.strategies.precision import check_precision, share_overflow
from kenotron.strategies.settings import CheckpointSettings, ProcessGroupSettings
from kenotron.strategies.state import CheckpointState
from kenotron.strategies.steps import PipelineSteps

if TYPE_CHECKING:
    from lightning.pytorch.strategies import ParallelStrategy as _LightningStrategy
    from torch.distributed.device_mesh import DeviceMesh
else:  # mixed in by `strategy_class`, from either of Lightning's packages
    _LightningStrategy = object

_monitors = itertools.count()

#: Hooks that may use what steps collected, and so have it on the last pipeline stage alone.
_HOOKS_WITH_RESULTS = tuple(
    f"on_{stage}_{event}_end" for stage in ("train", "validation", "test") for event in ("batch", "epoch")
)


class KenotronStrategyBase(_LightningStrategy):
    """Train any LightningModule on data × tensor × pipeline parallelism.

    Args:
        tp: tensor-parallel ranks. pp: pipeline ranks. cp, ep: context and expert parallelism, 1 for now.
        dp: data-parallel ranks; ``"auto"`` takes what the world leaves. dp_replicate: copies of the sharded state (HSDP).
        zero_stage: 0 replicates, 1 shards the optimizer state, 2 also gradients, 3 also parameters.
        sequence_parallel: cut hidden states along the sequence between tensor-parallel regions.
        schedule: ``"1f1b"``, ``"afab"``, ``"interleaved_1f1b"``; experimental: ``"interleaved_zero_bubble"``, ``"zbv"``.
        microbatches: into how many parts a batch is split under pp.
        virtual_stages: stages per pipeline rank.
        blocks: name of the module's list of like layers, where it can't be found.
        plan: what becomes of each module, as a ``ParallelPlan`` or a mapping of name patterns to styles.
        process_group, checkpoint: further settings.
        accelerator, parallel_devices, cluster_environment, checkpoint_io, precision_plugin: as in Lightning's strategies.

    Raises:
        ValueError: settings that can't go together, here; sizes that do not fit the world or the module, at set-up.
    """

    names: _lightning.Names

    def __init__(
        self,
        tp: int = 1,
        pp: int = 1,
        cp: int = 1,
        ep: int = 1,
        dp: int | Literal["auto"] = "auto",
        dp_replicate: int = 1,
        zero_stage: ZeroStage = 1,
        sequence_parallel: bool = False,
        schedule: str = "1f1b",
        microbatches: int | Literal["auto"] = "auto",
        virtual_stages: int = 1,
        blocks: str | None = None,
        plan: ParallelPlan | Mapping[str, str] | None = None,
        *,
        process_group: ProcessGroupSettings | None = None,
        checkpoint: CheckpointSettings | None = None,
        accelerator: Any = None,
        parallel_devices: list[torch.device] | None = None,
        cluster_environment: Any = None,
        checkpoint_io: Any = None,
        precision_plugin: Any = None,
    ) -> None:
        self._wanted = ParallelLayout(
            dp=dp, tp=tp, pp=pp, cp=cp, ep=ep, dp_replicate=dp_replicate, zero_stage=zero_stage
        )
        for axis, name in ((cp, "cp"), (ep, "ep")):
            if axis > 1:
                raise ValueError(f"{name}={axis} is not available yet. Set {name}=1.")
        _check_microbatches(microbatches, pp)
        pipelines.check_schedule(schedule, virtual_stages, pp)
        if pp > 1 and microbatches != "auto":
            pipelines.check_microbatches(schedule, microbatches, pp)
        if sequence_parallel and tp == 1:
            raise ValueError("sequence_parallel=True cuts sequences over the tp ranks, but tp=1. Set tp > 1, or False.")
        self._schedule, self._virtual_stages, self._microbatches = schedule, virtual_stages, microbatches
        self._sequence_parallel, self._blocks, self._plan = sequence_parallel, blocks, ParallelPlan.of(plan)
        self._group_settings = process_group or ProcessGroupSettings()
        self._checkpoint_settings = checkpoint or CheckpointSettings()
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
        self._monitor: RankMonitor | None = None
        self._done: Parallelized | None = None
        self._steps: PipelineSteps | None = None
        self._state: CheckpointState | None = None
        self._tokens: TokenCount | None = None
        self._sync = True
        self._sum_to_differentiate: Tensor | None = None
        self._streams: RandomStreams | None = None
        self._seed, self._run_id, self._num_saves = 0, uuid.uuid4().hex[:12], 0
        self.last_grad_norm: Tensor | None = None

    # ----------------------------------------------------------------------------------------------- who and where

    @property
    def _user_module(self) -> Any:
        assert self.lightning_module is not None
        return self.lightning_module

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

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        return True

    @property
    def lightning_restore_optimizer(self) -> bool:
        return False

    def set_world_ranks(self) -> None:
        if self.cluster_environment is not None and self.parallel_devices:
            self.cluster_environment.set_global_rank(self.node_rank * self.num_processes + self.local_rank)
            self.cluster_environment.set_world_size(self.num_nodes * self.num_processes)
        _lightning.set_rank(self.names, self.global_rank)

    def _configure_launcher(self) -> None:
        if self.num_processes * self.num_nodes == 1:
            return
        # Also where processes exist already (torchrun, SLURM): it checks that their number is devices × num_nodes.
        self._launcher = self.names.SubprocessScriptLauncher(
            self.cluster_environment, self.num_processes, self.num_nodes
        )

    # ------------------------------------------------------------------------------------------------ environment

    def setup_environment(self) -> None:
        super().setup_environment()
        self.names.reset_seed()
        self.set_world_ranks()
        self._layout = self._wanted.resolve(self.world_size)
        self._seed = torch.initial_seed() % 2**31
        if self.world_size == 1:
            return
        settings = self._group_settings
        backend = settings.backend or self.names.backend_for_device(self.root_device)
        self.names.init_dist_connection(self.cluster_environment, backend, timeout=settings.timeout)
        if self._mesh is None:
            self._mesh = self._layout.device_mesh(self.root_device.type, settings.timeout)
            self._dp_group = flatten(self._mesh, "dp_replicate", "dp_shard", name="dp").get_group()
            self._host_pp_group = self._host_group()
        store = default_store()
        self._monitor = RankMonitor(store, self.global_rank, self.world_size, name=str(next(_monitors)))
        _lightning.set_device_mesh(self._user_module, self._mesh)
        self._agree_on_seed()

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

    def _agree_on_seed(self) -> None:
        """Where the user set no seed, take rank 0's: ranks that share samples must shuffle alike."""
        seed, self._run_id = self.broadcast((torch.initial_seed(), self._run_id))
        if "PL_GLOBAL_SEED" not in os.environ and self.layout.pp * self.layout.tp * self.layout.cp > 1:
            torch.manual_seed(seed)
        self._seed = seed % 2**31

    @contextlib.contextmanager
    def tensor_init_context(self, empty_init: bool | None = None) -> Generator[None, None, None]:
        """``configure_model`` builds on the meta device: weights are made after everything is cut, part by part."""
        with torch.device("meta"), self.precision_plugin.tensor_init_context():
            yield

    # ------------------------------------------------------------------------------------------------------ set-up

    def setup(self, trainer: Any) -> None:
        assert self.accelerator is not None
        self.accelerator.setup(trainer)
        module = self._user_module
        self._check(module)
        check_precision(self.precision_plugin, self.layout)
        self.model = self.precision_plugin.convert_module(module)
        self._done = self._parallelize(module)
        self._tokens = TokenCount(
            counts=self._done.cut is None or self._done.cut.num_stages - 1 in self._done.cut.local_stages,
            replicas=self.layout.tp,
            data_parallel=self.layout.dp_size * self.layout.cp,
            distributed=self.world_size > 1,
            device=self.root_device,
        )
        fitting = trainer.state.fn == self.names.TrainerFn.FITTING
        if fitting:
            self.setup_optimizers(trainer)
        self._state = CheckpointState(self._done, self.optimizers, self.layout, self.global_rank)
        self.setup_precision_plugin()
        if fitting:
            self.names.optimizers_to_device(self.optimizers, self.root_device)
        if self.world_size > 1:
            self._connect_ranks(trainer, module)
        if self._done.cut is not None:
            self._connect_pipeline(trainer, module)
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

    def setup_optimizers(self, trainer: Any) -> None:
        super().setup_optimizers(trainer)
        for optimizer in self.optimizers:
            mixed = {isinstance(p, DTensor) for group in optimizer.param_groups for p in group["params"] if p.numel()}
            if len(mixed) > 1:  # scalars are not sharded: no single multi-tensor kernel takes both kinds
                for group in optimizer.param_groups:
                    group["foreach"] = False

    def _check(self, module: Any) -> None:
        if self._uses_foreign_io and self.world_size > 1:
            raise ValueError(
                f"{type(self._checkpoint_io).__name__} gets whole state dicts on one rank, but the state is spread over "
                f"{self.world_size} ranks. Leave the plugin out: KenotronStrategy writes sharded checkpoints itself."
            )
        if self.layout.pp == 1:
            return
        if not module.automatic_optimization:
            raise ValueError(
                f"pp={self.layout.pp} with manual optimization: forward and backward of a pipeline are interleaved, so they "
                "can't be called by hand. Set automatic_optimization = True, or pp=1."
            )
        if self.names.is_overridden("backward", module):
            raise ValueError(
                f"pp={self.layout.pp} runs backward inside of the pipeline and would bypass {type(module).__name__}.backward. "
                "Remove the override, or set pp=1."
            )
        if "dataloader_iter" in inspect.signature(module.training_step).parameters:
            raise ValueError(f"pp={self.layout.pp} splits batches; training_step(dataloader_iter) has none. Take a batch.")

    def _parallelize(self, module: Any) -> Parallelized:
        done: Parallelized | None = module.__dict__.get("_kenotron")
        if done is not None:
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
            manual_optimization=not module.automatic_optimization,
        )
        if self._layer_sync is not None and self.is_distributed:
            nn.SyncBatchNorm.convert_sync_batchnorm(module, self._dp_group)
        done = parallelize(module, self._mesh, request)
        module.__dict__["_kenotron"] = done
        return done

    def _connect_ranks(self, trainer: Any, module: Any) -> None:
        """Let Lightning's loops, metrics and precision plugin see all ranks."""
        assert self._monitor is not None
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
        stream = self.layout.rank_at(where.pp, where.dp_replicate, where.dp_shard, where.cp, 0)
        self._streams = RandomStreams(self._seed, stream, self.root_device)
        pipeline = pipelines.Pipeline(
            self._done.cut,
            self._schedule,
            self._mesh["pp"].get_group(),
            self.root_device,
            enclose=done.enclose,
            before_backward=lambda last: done.before_backward(last_microbatch=last, sync=self._sync),
            on_enter=self._streams.enter_model,
        )
        relay = LogRelay(
            module, pipeline.group, self._host_pp_group, pipeline.last_rank, self._dp_group, self.root_device
        )
        assert self._tokens is not None
        splitter = Splitter(self._microbatches, self._schedule, self.layout.pp)
        self._steps = PipelineSteps(module, pipeline, splitter, relay, self._streams, self._tokens)
        if trainer.state.fn == self.names.TrainerFn.FITTING:
            _lightning.skip_backward(trainer)
        for name in _HOOKS_WITH_RESULTS:
            self._relay_hook(module, name)

    def _relay_hook(self, module: Any, name: str) -> None:
        hook = getattr(module, name)
        hook = getattr(hook, "_kenotron_original", hook)
        if not self.names.is_overridden(name, module):
            return
        steps = self._steps
        assert steps is not None

        @functools.wraps(hook)
        def relayed(*args: Any, **kwargs: Any) -> Any:
            return steps.run_hook(hook, args, kwargs)

        relayed._kenotron_original = hook  # type: ignore[attr-defined]
        module.__dict__[name] = relayed

    def model_to_device(self) -> None:
        """Nothing: parameters are moved when they have been cut."""

    # ------------------------------------------------------------------------------------------------------- steps

    @contextlib.contextmanager
    def block_backward_sync(self) -> Generator[None, None, None]:
        """Let gradients accumulate without reducing them."""
        self._sync = False
        try:
            yield
        finally:
            self._sync = True

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """At the start of an epoch: ranks that share samples must have loaded the same ones."""
        if batch_idx == 0 and self.world_size > self._dp_size:
            check_same_batch(batch, self.layout.dp_rank(self.global_rank))

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        assert self._done is not None
        try:
            if self._done.buffers is not None:
                self._done.buffers.share()
            if self._steps is not None:
                return self._pipelined_training_step(*args, *kwargs.values())
            return self._plain_training_step(*args, **kwargs)
        except Exception as error:
            raise self._explain(error) from error.__cause__

    def _plain_training_step(self, *args: Any, **kwargs: Any) -> Any:
        module, done = self._user_module, self._done
        assert done is not None and self._tokens is not None
        with self.precision_plugin.train_step_context(), self._shown_values_are_means(module):
            output = done.enclose(lambda: module.training_step(*args, **kwargs))
        if module.automatic_optimization and isinstance(output, dict) and "num_tokens" in output:
            loss = StepLoss.of(output)
            self._sum_to_differentiate = self._tokens.to_differentiate(loss, 1.0)
            output = {**output, "loss": self._tokens.mean([loss], [1.0])}
        elif module.automatic_optimization and output is not None:
            StepLoss.of(output)
        return output

    @contextlib.contextmanager
    def _shown_values_are_means(self, module: Any) -> Generator[None, None, None]:
        """What the progress bar shows of a training step is the mean over data-parallel ranks."""
        if not self.is_distributed or "log" in module.__dict__:
            yield
            return
        log = module.log

        def log_mean(name: str, value: Any, prog_bar: bool = False, *args: Any, **options: Any) -> None:
            if prog_bar and not isinstance(value, Metric) and not args:
                options["sync_dist"] = True
            log(name, value, prog_bar, *args, **options)

        module.__dict__["log"] = log_mean
        try:
            yield
        finally:
            del module.__dict__["log"]

    def _pipelined_training_step(self, batch: Any, *rest: Any) -> Tensor:
        module, package = self._user_module, self.names.package
        trainer = module.trainer
        assert self._steps is not None
        batch_idx, accumulate = _lightning.current_batch_idx(trainer), trainer.accumulate_grad_batches
        if batch_idx % accumulate == 0:
            _lightning.zero_grad(trainer, batch_idx, self.optimizers[0])
        scaler = getattr(self.precision_plugin, "scaler", None)
        loss = self._steps.train(
            module.training_step,
            batch,
            rest,
            self.precision_plugin.train_step_context,
            scale=scaler.scale if scaler is not None else lambda tensor: tensor,
            accumulate=accumulate,
        )
        _lightning.call_hook(trainer, package, "on_before_backward", loss)
        if self._sync:
            self._finish_gradients()
        _lightning.call_hook(trainer, package, "on_after_backward")
        return loss

    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        done, module = self._done, self._user_module
        assert done is not None
        if self._sum_to_differentiate is not None:
            closure_loss, self._sum_to_differentiate = self._sum_to_differentiate, None
        owed = contextlib.nullcontext() if module.automatic_optimization else done.kept_apart()
        self.pre_backward(closure_loss)
        closure_loss = self.precision_plugin.pre_backward(closure_loss, module)
        with owed:
            done.before_backward(last_microbatch=True, sync=self._sync)
            self.precision_plugin.backward(closure_loss, module, optimizer, *args, **kwargs)
            if self._sync:
                self._finish_gradients()
        closure_loss = self.precision_plugin.post_backward(closure_loss, module)
        self.post_backward(closure_loss)
        return closure_loss

    def _finish_gradients(self) -> None:
        assert self._done is not None and self._tokens is not None
        self._done.finish_gradients()
        if self._tokens.uses_sums:
            self._tokens.normalise(self._done.named_parameters().values())

    def _gradients_of(self, optimizer: Optimizer) -> dict[str, nn.Parameter]:
        """Return the parameters of one optimizer by name: through its groups, since the module may show gathered ones."""
        assert self._done is not None
        names = {id(param): name for name, param in self._done.named_parameters().items()}
        params = (param for group in optimizer.param_groups for param in group["params"])
        return {names[id(param)]: param for param in params if id(param) in names}

    def _clip_by_norm(self, optimizer: Optimizer, clip_val: float) -> None:
        assert self._done is not None
        params = self._gradients_of(optimizer)
        self.last_grad_norm = self._done.norm(params)
        clip_by_norm(params, self.last_grad_norm, clip_val)

    def _clip_by_value(self, optimizer: Optimizer, clip_val: float) -> None:
        clip_by_value(self._gradients_of(optimizer).values(), clip_val)

    def grad_norm(self, optimizer: Optimizer | None = None, norm_type: float = 2.0) -> Tensor:
        """Return the norm of the whole gradient, every element counted once (0-dim float32). All ranks call it."""
        assert self._done is not None
        return self._done.norm(self._gradients_of(optimizer or self.optimizers[0]), norm_type)

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        return self._evaluate("validation_step", self.precision_plugin.val_step_context, args, kwargs)

    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        return self._evaluate("test_step", self.precision_plugin.test_step_context, args, kwargs)

    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        output = self._evaluate("predict_step", self.precision_plugin.predict_step_context, args, kwargs)
        return output if self._steps is None else self._steps.share(output)

    def _evaluate(self, name: str, context: Callable[[], Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        assert self._done is not None
        step = getattr(self._user_module, name)
        try:
            if self._steps is not None:
                batch, *rest = (*args, *kwargs.values())
                return self._steps.evaluate(step, batch, tuple(rest), context)
            with context():
                return self._done.enclose(lambda: step(*args, **kwargs))
        except Exception as error:
            raise self._explain(error) from error.__cause__

    def on_validation_end(self) -> None:
        self._reshard()

    def on_test_end(self) -> None:
        self._reshard()

    def on_predict_end(self) -> None:
        self._reshard()

    def _reshard(self) -> None:
        if self._done is not None and self._done.sharded is not None:
            self._done.sharded.reshard()

    # -------------------------------------------------------------------------------------------------- collectives

    def barrier(self, name: str | None = None) -> None:
        if self._is_connected and not self._is_failing:
            device_ids = [self.root_device.index] if self.root_device.type == "cuda" else None
            dist.barrier(device_ids=device_ids)

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        if not self._is_connected:
            return obj
        box = [obj]
        dist.broadcast_object_list(box, src)
        return box[0]

    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """Reduce over the data-parallel ranks: user code sees that world alone, not copies of one sample."""
        if not isinstance(tensor, Tensor) or not self._is_connected:
            return tensor
        group = self._dp_group if group is None else group
        size = dist.get_world_size(group)
        if size == 1:
            return tensor
        name = reduce_op.lower() if isinstance(reduce_op, str) else None
        if name in ("mean", "avg", None) and (name or reduce_op in (None, dist.ReduceOp.AVG)):
            total = tensor.clone()
            dist.all_reduce(total, group=group)
            # Counters are integers; they have no place for a fraction.
            return total / size if total.is_floating_point() else total // size
        operation = getattr(dist.ReduceOp, name.upper()) if name else reduce_op
        result = tensor.clone()
        dist.all_reduce(result, op=operation, group=group)
        return result

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        if not self._is_connected:
            return decision
        votes = torch.tensor(int(decision), device=self.root_device)
        dist.all_reduce(votes)
        return bool(votes == self.world_size) if all else bool(votes > 0)

    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        """Gather over the data-parallel ranks."""
        if not self._is_connected:
            return tensor
        if group is None or group is dist.group.WORLD:
            group = self._dp_group
        gathered: Tensor = self.names.all_gather_if_available(tensor, group=group, sync_grads=sync_grads)
        return gathered

    @property
    def _is_connected(self) -> bool:
        return self._mesh is not None and dist.is_initialized()

    # -------------------------------------------------------------------------------------------------- checkpoints

    def lightning_module_state_dict(self) -> dict[str, Any]:
        if self._state is None:
            state: dict[str, Any] = super().lightning_module_state_dict()
            return state
        return self._state.state_dict()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Nothing: what this rank has of it goes to the checkpoint straight from the optimizer."""
        if self._state is None or self._uses_foreign_io:
            state: dict[str, Any] = super().optimizer_state(optimizer)
            return state
        return {}

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        if self._uses_foreign_io or self._state is None:
            super().save_checkpoint(checkpoint, filepath, storage_options)
            return
        if storage_options is not None:
            raise ValueError("storage_options belong to a CheckpointIO plugin; KenotronStrategy writes to a file system itself.")
        save_training(
            checkpoint,
            filepath,
            self._state,
            rank=self.global_rank,
            world_size=self.world_size,
            save_id=self._next_save_id(),
            settings=self._checkpoint_settings,
            handling_exception=self._is_failing,
            rank_state={"random": random_state(self.root_device), "streams": self._streams_state()},
        )

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        if self._uses_foreign_io or not checkpoints.is_checkpoint(checkpoint_path):
            loaded: dict[str, Any] = super().load_checkpoint(checkpoint_path, weights_only)
            if loaded.get("optimizer_states") and self._user_module.trainer.state.fn == self.names.TrainerFn.FITTING:
                _lightning.warn(
                    self.names,
                    f"{checkpoint_path} was not written by Kénotron: its weights, loops and schedulers are restored, its "
                    "optimizer state is not.",
                )
            return loaded
        module = self._user_module
        assert self._state is not None
        restored = load_training(
            checkpoint_path,
            self._state,
            strict=module.strict_loading,
            with_optimizers=module.trainer.state.fn == self.names.TrainerFn.FITTING,
            rank=self.global_rank,
            world_size=self.world_size,
            allow_pickle=self._checkpoint_settings.allow_pickle,
        )
        if restored.rank_state is not None and module.trainer.state.fn == self.names.TrainerFn.FITTING:
            set_random_state(restored.rank_state["random"], self.root_device)
            if self._streams is not None and restored.rank_state["streams"] is not None:
                self._streams.load_state_dict(restored.rank_state["streams"])
        return restored.checkpoint

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load a whole state dict, as another strategy saved it; a sharded checkpoint is in place already."""
        if not checkpoint.get(LOADED_IN_PLACE):
            assert self._state is not None
            self._state.load_whole(checkpoint["state_dict"], strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Nothing: they are loaded with the checkpoint."""

    @property
    def _uses_foreign_io(self) -> bool:
        """Whether the user's own CheckpointIO plugin reads and writes (one process: it takes whole tensors)."""
        return self._checkpoint_io is not None and type(self._checkpoint_io).__name__ != "TorchCheckpointIO"

    def _streams_state(self) -> Any:
        return None if self._streams is None else self._streams.state_dict()

    def _next_save_id(self) -> str:
        """Return the same new name on all ranks, without asking them."""
        self._num_saves += 1
        return f"{self._run_id}-{self._num_saves}"

    # ------------------------------------------------------------------------------------------------ when it fails

    @property
    def _is_failing(self) -> bool:
        module = self._lightning_module
        trainer = getattr(module, "_trainer", None) if module is not None else None
        return trainer is not None and trainer.state.status == "interrupted"

    def _explain(self, error: Exception) -> Exception:
        """Return what to raise: the user's own error, or that of the rank which failed first."""
        if isinstance(error.__cause__, Exception) and "failed to run forward" in str(error):
            error = error.__cause__  # torch's pipeline wraps what a stage raises
        if self._monitor is None:
            return error
        if _is_lost_connection(error):
            failure = self._monitor.failure_elsewhere()
            if failure is not None:
                return ValueError(str(failure)) if failure.kind == "ValueError" else RuntimeError(str(failure))
        else:
            self._monitor.report_failure(error)
        return error

    def on_exception(self, exception: BaseException) -> None:
        if self._monitor is None:
            return
        if _is_lost_connection(exception):
            failure = self._monitor.failure_elsewhere()
            if failure is not None:
                exception.add_note(str(failure))
        elif isinstance(exception, Exception):
            self._monitor.report_failure(exception)
            if self.is_global_zero:
                self._monitor.linger()  # the store lives in this process: let the others read it

    def teardown(self) -> None:
        """Leave weights and optimizers where they are: moving shards of a large model off the device helps nobody."""
        if self._monitor is not None:
            self._monitor.close()
            self._monitor = None
        if self.cluster_environment is not None:
            self.cluster_environment.teardown()
        self.precision_plugin.teardown()
        if self.accelerator is not None:
            self.accelerator.teardown()
        self.checkpoint_io.teardown()

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = dict(super().__getstate__())
        for name in _NOT_PICKLED:
            state[name] = None
        return state


_NOT_PICKLED = (
    "_mesh", "_dp_group", "_host_pp_group", "_monitor", "_done", "_steps", "_state", "_tokens", "_streams",
)  # fmt: skip


def _is_lost_connection(error: BaseException) -> bool:
    """Whether a collective failed because another rank went away."""
    text = str(error).lower()
    kinds = (dist.DistBackendError, dist.DistNetworkError, dist.DistStoreError, RuntimeError)
    return isinstance(error, kinds) and any(
        sign in text for sign in ("connection", "gloo", "nccl", "timed out", "timeout", "broken pipe", "socket")
    )


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
    return type("KenotronStrategy", bases, {"names": names, "__module__": "kenotron", "__doc__": KenotronStrategyBase.__doc__})
