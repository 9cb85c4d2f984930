"""Run steps through a cut module: torch's pipeline schedules for training, a plain chain of stages for everything else.

The stage module which torch's schedule sees calls the user's step, whole and unmodified, once per microbatch (see ``cut``).
A training step is:

1. all stages: for a batch shape seen for the first time, one forward pass without gradients through the chain; every stage
   keeps the shapes that cross its boundaries (`probe`). From then on shapes are static and nothing but activations travels.
2. all stages: torch's schedule runs forwards and backwards; receive buffers are allocated per microbatch, so that microbatches
   may differ in size.
3. last stage: each microbatch's loss is what the caller's ``step`` returned; it is differentiated as it is.
"""

from __future__ import annotations

import contextlib
import functools
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining import schedules as torch_schedules

from kenotron.parallel._torch import RecvInfo
from kenotron.parallel.cut import BoundaryMeta, Cut, Flight, has_nan

#: schedule name -> (torch's class, takes several stages per rank, experimental)
SCHEDULES: dict[str, tuple[Any, bool, bool]] = {
    "afab": (torch_schedules.ScheduleGPipe, False, False),
    "1f1b": (torch_schedules.Schedule1F1B, False, False),
    "interleaved_1f1b": (torch_schedules.ScheduleInterleaved1F1B, True, False),
    "interleaved_zero_bubble": (torch_schedules.ScheduleInterleavedZeroBubble, True, True),
    "zbv": (torch_schedules.ScheduleZBVZeroBubble, True, True),
}
SPLITS_BACKWARD = ("interleaved_zero_bubble", "zbv")

#: Called with stage, what it is about to do and microbatch; what it returns is entered meanwhile. "forward"; "backward" as a
#: whole, or where a schedule splits it "backward-input" and "backward-weight".
Observer = Callable[[int, str, int], AbstractContextManager[Any]]
_UNOBSERVED: AbstractContextManager[Any] = contextlib.nullcontext()

#: Each cached schedule holds receive buffers for all its microbatches.
_MAX_SCHEDULES = 4


def check_schedule(schedule: str, virtual_stages: int, pp: int) -> None:
    """Raise ``ValueError`` for a schedule that does not exist or does not go with ``virtual_stages``."""
    if schedule not in SCHEDULES:
        stable = [name for name, (_, _, experimental) in SCHEDULES.items() if not experimental]
        rest = [name for name in SCHEDULES if name not in stable]
        raise ValueError(
            f"schedule={schedule!r} is unknown. Set schedule to one of {', '.join(map(repr, stable))} "
            f"(experimental: {', '.join(map(repr, rest))})."
        )
    if pp == 1:
        return
    several = SCHEDULES[schedule][1]
    if schedule == "zbv" and virtual_stages != 2:
        raise ValueError(f"schedule='zbv' runs exactly two stages on every rank, not virtual_stages={virtual_stages}. Set 2.")
    if several and virtual_stages < 2:
        raise ValueError(f"schedule={schedule!r} interleaves several stages per rank: set virtual_stages to 2 or more.")
    if not several and virtual_stages != 1:
        raise ValueError(
            f"schedule={schedule!r} has one stage per rank, not virtual_stages={virtual_stages}. "
            "Set virtual_stages=1, or schedule='interleaved_1f1b'."
        )


def check_microbatches(schedule: str, microbatches: int, pp: int) -> None:
    """Raise ``ValueError`` for a number of microbatches that ``schedule`` can't run."""
    if schedule in ("interleaved_1f1b", "interleaved_zero_bubble"):
        rounds = max(1, microbatches // pp)
        if microbatches % rounds:
            raise ValueError(
                f"microbatches={microbatches} does not go with schedule={schedule!r} on pp={pp}: set a multiple of {pp}, or at "
                f"most {pp}."
            )
    if schedule == "zbv" and microbatches < 2 * pp:
        raise ValueError(f"schedule='zbv' needs at least 2 × pp = {2 * pp} microbatches, not {microbatches}.")


def local_stages(schedule: str, pp: int, virtual_stages: int, pp_rank: int) -> tuple[int, ...]:
    """Return the stages of one pipeline rank: every ``pp``-th one, or (``zbv``) one down the V and one up."""
    if schedule == "zbv":
        return (pp_rank, 2 * pp - 1 - pp_rank)
    return tuple(range(pp_rank, pp * virtual_stages, pp))


def rank_of_stage(schedule: str, pp: int, stage: int) -> int:
    """Return the pipeline rank that has ``stage``."""
    if schedule == "zbv" and stage >= pp:
        return 2 * pp - 1 - stage
    return stage % pp


@dataclass(frozen=True)
class StageMeta:
    """What crosses the boundaries of one stage for one microbatch shape."""

    received: BoundaryMeta | None
    sent: BoundaryMeta | None


class Pipeline:
    """Runs steps of a cut module over the ranks of one pipeline group.

    Args:
        cut: the cut module. schedule: a key of ``SCHEDULES``.
        group: the pipeline group. device: where activations live.
        enclose: runs a callable inside the root's own forward hooks (FSDP2's), if it has any.
        before_backward: called before each backward pass that computes gradients of weights, with its stage and whether it is
            this rank's last one of a step.
        before_graph: called with what each backward pass starts from.
        on_enter: called in every flight before the first own unit runs.
    """

    def __init__(
        self,
        cut: Cut,
        schedule: str,
        group: dist.ProcessGroup,
        device: torch.device,
        *,
        enclose: Callable[[Callable[[], Any]], Any] = lambda call: call(),
        before_backward: Callable[[int, bool], None] = lambda stage, last: None,
        before_graph: Callable[[Iterable[Any]], None] = lambda outputs: None,
        on_enter: Callable[[], None] | None = None,
    ) -> None:
        self.cut = cut
        self.schedule = schedule
        self.group = group
        self.device = device
        self.pp = dist.get_world_size(group)
        self.enclose = enclose
        self.before_backward = before_backward
        self.before_graph = before_graph
        self.on_enter = on_enter
        self.observer: Observer | None = None
        self.is_last = cut.num_stages - 1 in cut.local_stages
        self.last_rank = dist.get_global_rank(group, rank_of_stage(schedule, self.pp, cut.num_stages - 1))
        self._metas: dict[Hashable, dict[int, StageMeta]] = {}
        self._schedules: OrderedDict[Hashable, Any] = OrderedDict()
        self._step: Callable[[int], Tensor] | None = None
        self._backwards_left = 0
        self._new: set[int] = set()  # the first microbatch of each shape that this step is the first to have

    # ------------------------------------------------------------------------------------------------------ training

    def train_step(
        self,
        keys: Sequence[Hashable],
        step: Callable[[int], Tensor],
        probe: Callable[[int], Any],
        batch: Callable[[int], list[Tensor]],
    ) -> None:
        """Run forward and backward of all microbatches.

        Args:
            keys: the shape of each microbatch, the same on all stages: equal keys mean equal shapes everywhere.
            step: runs the user's step on microbatch ``i``; on the last stage it returns the scalar to differentiate.
            probe: runs the user's step on microbatch ``i`` with no trace: no logs, no gradients.
            batch: returns the tensors of microbatch ``i``.
        """
        self._new = set()
        for i, key in enumerate(keys):
            if key not in self._metas:
                self._new.add(i)
                self._metas[key] = self._probe(functools.partial(probe, i), tries=not has_nan(batch(i)))
        schedule = self._schedule(tuple(keys))
        indices = torch.arange(len(keys))
        self._step, self._backwards_left = step, len(keys) * len(self.cut.local_stages)
        try:
            schedule.step(mb=indices, target=indices, return_outputs=False)
        finally:
            self._step = None

    def _run_microbatch(self, stage: int, index: int, received: tuple[Tensor, ...]) -> Any:
        """One forward of one stage, as torch's schedule asks for it."""
        meta = self._current_metas[index][stage]
        step = self._step
        assert step is not None

        def run() -> Any:
            value = None if meta.received is None else meta.received.rebuild(received)
            flight = Flight(
                stage=stage, received=value, on_enter=self.on_enter,
                is_traced=index in self._new and stage == self.cut.num_stages - 1,
            )  # fmt: skip
            left, result = self.cut.fly(flight, lambda: step(index))
            if not left:
                return result
            assert meta.sent is not None
            if (found := BoundaryMeta.of(result)).tensors != meta.sent.tensors:
                raise _changed_shape(stage, found, meta.sent)
            return meta.sent.tensors_of(result)

        return self.enclose(run)

    def _schedule(self, keys: tuple[Hashable, ...]) -> Any:
        if keys in self._schedules:
            self._schedules.move_to_end(keys)
        else:
            while len(self._schedules) >= _MAX_SCHEDULES:
                self._schedules.popitem(last=False)
            self._schedules[keys] = self._build_schedule(keys)
        self._current_metas = [self._metas[key] for key in keys]
        return self._schedules[keys]

    def _build_schedule(self, keys: tuple[Hashable, ...]) -> Any:
        metas = [self._metas[key] for key in keys]
        stages = [_Stage(self, stage, [meta[stage] for meta in metas]) for stage in self.cut.local_stages]
        kind, several, _ = SCHEDULES[self.schedule]
        if self.schedule == "1f1b" and len(keys) < self.cut.num_stages:  # a last batch too small for it: any number goes here
            kind, several, _ = SCHEDULES["afab"]
        # scale_grads would divide gradients that earlier batches accumulated, too.
        return kind(stages if several else stages[0], len(keys), loss_fn=_loss_as_is, scale_grads=False)

    def _observed(self, stage: int, action: str, index: int) -> AbstractContextManager[Any]:
        return _UNOBSERVED if self.observer is None else self.observer(stage, action, index)

    def _announce_backward(self, stage: int) -> None:
        self._backwards_left -= 1
        self.before_backward(stage, self._backwards_left == 0)

    # ------------------------------------------------------------------------------------- forward only, and the probe

    def forward(self, key: Hashable, step: Callable[[], Any]) -> Any:
        """Run one step through all stages, forward only, the whole batch at once.

        Returns:
            What ``step`` returned on the last stage's rank, ``None`` on the others.
        """
        return self._chain(step, self._metas.setdefault(("forward", key), {}), finish=True)

    def _probe(self, step: Callable[[], Any], *, tries: bool) -> dict[int, StageMeta]:
        """Learn what crosses the boundaries, and that nothing else would have to (``tries``)."""
        metas: dict[int, StageMeta] = {}
        with torch.no_grad():
            self._chain(step, metas, finish=False, tries=tries)
        return metas

    def _chain(self, step: Callable[[], Any], metas: dict[int, StageMeta], *, finish: bool, tries: bool = False) -> Any:
        """Run ``step`` stage by stage. Shapes unknown to ``metas`` are sent ahead of the tensors and kept.

        Args:
            finish: go to the end of the last stage. tries: see ``Flight.is_trial``.
        """
        known, result, local = bool(metas), None, None
        for stage in self.cut.local_stages:
            is_last = stage == self.cut.num_stages - 1
            received = None
            meta = metas[stage] if known else StageMeta(None, None)
            if stage > 0:
                received, boundary = self._receive(stage, meta.received, local)
                meta = StageMeta(boundary, meta.sent)
            is_trial = tries and not has_nan(received)
            if not is_last or finish or is_trial:
                flight = Flight(stage=stage, received=received, on_enter=self.on_enter, is_trial=is_trial)
                left, value = self.enclose(functools.partial(self.cut.fly, flight, step))
                if left and not is_last:
                    boundary = BoundaryMeta.of(value)
                    if known and meta.sent != boundary:
                        raise _changed_shape(stage, boundary, meta.sent)
                    self._send(stage, value, boundary, known)
                    meta, local = StageMeta(meta.received, boundary), value
                else:
                    result = value
            metas[stage] = meta
        return result

    def _send(self, stage: int, value: Any, meta: BoundaryMeta, known: bool) -> None:
        target = self._global_rank(stage + 1)
        if target == dist.get_rank():
            return
        if not known:
            dist.send_object_list([meta], target, group=self.group)
        for tensor in meta.tensors_of(value):
            dist.send(tensor.detach(), target, group=self.group)

    def _receive(self, stage: int, known: BoundaryMeta | None, local: Any) -> tuple[Any, BoundaryMeta]:
        source = self._global_rank(stage - 1)
        if source == dist.get_rank():
            return local, BoundaryMeta.of(local)
        meta = known
        if meta is None:
            box: list[Any] = [None]
            dist.recv_object_list(box, source, group=self.group)
            meta = box[0]
            assert isinstance(meta, BoundaryMeta)
        tensors = [torch.empty(shape, dtype=dtype, device=self.device) for shape, dtype in meta.tensors]
        for tensor in tensors:
            dist.recv(tensor, source, group=self.group)
        return meta.rebuild(tensors), meta

    def _global_rank(self, stage: int) -> int:
        return dist.get_global_rank(self.group, rank_of_stage(self.schedule, self.pp, stage))


def _changed_shape(stage: int, found: BoundaryMeta, before: BoundaryMeta | None) -> ValueError:
    return ValueError(
        f"the hidden state after stage {stage} is {found.tensors}, but batches of this shape gave "
        f"{before.tensors if before else before} before: a pipeline needs hidden states that depend on the batch's shape alone."
    )


def _loss_as_is(loss: Tensor, target: Tensor) -> Tensor:
    return loss


class _StageModule(nn.Module):
    """What torch's schedule calls. It holds no submodule: torch resets the gradients of those on its own terms."""

    def __init__(self, pipeline: Pipeline, stage: int) -> None:
        super().__init__()
        self._run = lambda index, received: pipeline._run_microbatch(stage, index, received)
        self._root = lambda: pipeline.cut
        self._stage = stage

    def forward(self, *received: Tensor, mb: Tensor) -> Any:
        return self._run(int(mb), received)

    def parameters(self, recurse: bool = True) -> Any:
        """The stage's parameters: schedules that split the backward pass ask for them."""
        cut = self._root()
        for name in cut.units_of(self._stage):
            yield from cut.root.get_submodule(name).parameters(recurse)


class _Stage(PipelineStage):
    """torch's stage with static shapes, one set of receive buffers per microbatch, and a word before each backward pass."""

    def __init__(self, pipeline: Pipeline, stage: int, metas: Sequence[StageMeta]) -> None:
        first = metas[0]
        super().__init__(
            _StageModule(pipeline, stage),
            stage,
            pipeline.cut.num_stages,
            pipeline.device,
            input_args=_meta_tensors(first.received) if first.received else (torch.empty(1, device="meta"),),
            output_args=_meta_tensors(first.sent) if first.sent else (torch.empty((), device="meta", requires_grad=True),),
            group=pipeline.group,
        )
        self._pipeline = pipeline
        self._metas = metas

    def _setup_forward_recv_info(self, num_microbatches: int, has_backward: bool) -> None:
        super()._setup_forward_recv_info(num_microbatches, has_backward)
        if not self.is_first:
            self._fit_buffers(self.args_recv_info, [meta.received for meta in self._metas])

    def _setup_backward_recv_info(self, num_microbatches: int) -> None:
        super()._setup_backward_recv_info(num_microbatches)
        if not self.is_last:
            self._fit_buffers(self.grad_recv_info, [meta.sent for meta in self._metas])

    def _fit_buffers(self, infos: dict[int, tuple[Any, ...]], metas: Sequence[BoundaryMeta | None]) -> None:
        for index, meta in enumerate(metas):
            assert meta is not None
            infos[index] = tuple(
                self._fitted(info, shape, dtype) for info, (shape, dtype) in zip(infos[index], meta.tensors, strict=True)
            )

    def _fitted(self, info: Any, shape: tuple[int, ...], dtype: torch.dtype) -> Any:
        if info.buffer is None or info.buffer.shape == shape:
            return info
        buffer = torch.empty(shape, dtype=dtype, device=self.device)
        return RecvInfo(info.input_name, info.source, buffer, info.tensor_meta)

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        with self._pipeline._observed(self.stage_index, "forward", fwd_chunk_id):
            return super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)

    def backward_one_chunk(
        self, bwd_chunk_id: int, loss: Any = None, full_backward: bool = True, last_backward: bool = False
    ) -> None:
        outputs, _ = self.fwd_cache[bwd_chunk_id]
        self._pipeline.before_graph([loss] if self.is_last else outputs)
        if full_backward:
            self._pipeline._announce_backward(self.stage_index)
        action = "backward" if full_backward else "backward-input"
        with self._pipeline._observed(self.stage_index, action, bwd_chunk_id):
            super().backward_one_chunk(bwd_chunk_id, loss, full_backward, last_backward)

    def backward_weight_one_chunk(self, bwd_chunk_id: int, last_backward: bool = False) -> None:
        self._pipeline._announce_backward(self.stage_index)
        with self._pipeline._observed(self.stage_index, "backward-weight", bwd_chunk_id):
            super().backward_weight_one_chunk(bwd_chunk_id, last_backward)


def _meta_tensors(meta: BoundaryMeta) -> tuple[Tensor, ...]:
    return tuple(
        torch.empty(shape, dtype=dtype, device="meta", requires_grad=dtype.is_floating_point) for shape, dtype in meta.tensors
    )
