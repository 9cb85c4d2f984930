"""One batch through a pipeline: split, run the user's step per microbatch, merge what it logged and returned.

All ranks of a pipeline have the same batch, and the same random numbers around the model (see ``parallel.random``).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kenotron.parallel.expert import ExpertParallel
from kenotron.parallel.pipeline import Pipeline
from kenotron.parallel.random import RandomStreams
from kenotron.strategies.logs import Call, LogRelay, merge, recording
from kenotron.strategies.loss import StepLoss, TokenCount
from kenotron.strategies.microbatches import NUM_SAMPLES, Splitter, count_samples, leaves, shape_key, shares, split, tensors


class PipelineSteps:
    """Runs the steps of a LightningModule over a pipeline.

    Args:
        module: the LightningModule. pipeline: over its cut. splitter: batch size -> microbatches.
        relay: of log calls. streams: random streams. tokens: counts tokens where the loss is a sum.
        experts: the ep axis, if there is one.
    """

    def __init__(
        self,
        module: Any,
        pipeline: Pipeline,
        splitter: Splitter,
        relay: LogRelay,
        streams: RandomStreams,
        tokens: TokenCount,
        experts: ExpertParallel | None = None,
    ) -> None:
        self._module = module
        self.pipeline = pipeline
        self._splitter = splitter
        self._relay = relay
        self._streams = streams
        self._tokens = tokens
        self._experts = experts
        self._knows_form = False

    # ------------------------------------------------------------------------------------------------------ training

    def train(
        self,
        step: Callable[..., Any],
        batch: Any,
        rest: tuple[Any, ...],
        context: Callable[[], Any],
        scale: Callable[[Tensor], Tensor],
        accumulate: int,
        weigh: Callable[[float], None],
        *,
        is_last_batch: bool,
    ) -> Any:
        """Run forward and backward of one batch.

        Args:
            step: the user's ``training_step``. rest: its arguments after the batch. context: of precision.
            scale: of the loss (fp16). accumulate: batches per update.
            weigh: told the share of each microbatch in the update before it runs.
            is_last_batch: of the epoch; it may have fewer samples.

        Returns:
            The mean loss of this data-parallel rank's batch, the same on every stage (0-dim, detached). On the last stage,
            where the step returned a dictionary: with what else is in that, of the whole batch.
        """
        counts = self._count_samples(batch, is_last_batch) if self._splitter.splits else 1
        number = self._splitter.number(leaves(counts))
        microbatches, weights = split(batch, counts, number), [1 / number] * number
        if isinstance(counts, int):
            weights = [size / counts for size in shares(counts, number)]
        calls: list[Sequence[Call]] = [()] * number
        losses: list[StepLoss | None] = [None] * number
        outputs: list[Any] = [None] * number

        def run(index: int) -> Tensor:
            weigh(weights[index] / accumulate)
            with self._microbatch(context) as recorded:
                output = step(microbatches[index], *rest)
            calls[index], outputs[index] = recorded, output
            loss = losses[index] = StepLoss.of(output, of_microbatch=True)
            return scale(self._tokens.to_differentiate(loss, weights[index] / accumulate))

        def probe(index: int) -> Any:
            with self._no_trace(), self._microbatch(context):
                return step(microbatches[index], *rest)

        keys = [("train", shape_key(microbatch)) for microbatch in microbatches]
        self.pipeline.train_step(keys, run, probe, lambda index: list(tensors(microbatches[index])))
        mean = merged = None
        if self.pipeline.is_last:
            mean = self._tokens.mean([loss for loss in losses if loss is not None], weights)
            merged = merge(calls, weights)
        mean, merged = self._relay.send(merged, mean)
        self._relay.replay(merged)
        if not self._knows_form:  # stages that do not reach the loss learn its form from the first batch
            self._tokens.uses_sums, self._knows_form = self.share(self._tokens.uses_sums), True
        return {"loss": mean, **merge_outputs(outputs, weights)} if isinstance(outputs[-1], Mapping) else mean

    def _count_samples(self, batch: Any, is_last_batch: bool) -> Any:
        own = getattr(self._module, NUM_SAMPLES, None)
        if callable(own):
            return int(own(batch))
        return count_samples(batch, self._module.trainer.train_dataloader, may_be_short=is_last_batch)

    @contextlib.contextmanager
    def _microbatch(self, context: Callable[[], Any]) -> Iterator[list[Call]]:
        """Precision around the forward pass alone, log calls recorded, the model's random numbers kept apart."""
        try:
            with context(), recording(self._module) as calls:
                yield calls
        finally:
            self._streams.leave_model()

    @contextlib.contextmanager
    def _no_trace(self) -> Iterator[None]:
        """Put back the buffers and random numbers that a probe moves, and ask nothing of ranks that need no probe."""
        buffers = [(buffer, buffer.clone()) for buffer in self._module.buffers()]
        silent = contextlib.nullcontext() if self._experts is None else self._experts.silent()
        try:
            with self._streams.untouched(), silent:
                yield
        finally:
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)

    # ---------------------------------------------------------------------------------------------------- evaluation

    def evaluate(self, step: Callable[..., Any], batch: Any, rest: tuple[Any, ...], context: Callable[[], Any]) -> Any:
        """Run one batch forward. Returns the step's output on the last stage, ``None`` elsewhere."""
        calls: list[Call] = []

        def run() -> Any:
            with self._microbatch(context) as recorded:
                try:
                    return step(batch, *rest)
                finally:
                    calls[:] = recorded

        key = (getattr(step, "__name__", ""), shape_key(batch))
        output = self.pipeline.forward(key, run)
        _, merged = self._relay.send(calls)
        self._relay.replay(merged)
        return output

    def share(self, output: Any) -> Any:
        """Return the last stage's ``output`` on every rank of the pipeline."""
        box = [_to_cpu(output)]
        dist.broadcast_object_list(box, self.pipeline.last_rank, group=self.pipeline.group)
        return box[0]

    # --------------------------------------------------------------------------------------------------------- hooks

    def run_hook(self, hook: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a module hook that may use what its steps collected, which only the last stage has.

        Other stages run it too (it may change the module), but only what the last stage does not log counts there (a rank may
        log for itself alone), and an error there is one of missing results.
        """
        result, calls = None, None
        with recording(self._module) as recorded:
            if self.pipeline.is_last:
                result, calls = hook(*args, **kwargs), recorded
            else:
                with contextlib.suppress(Exception):
                    result = hook(*args, **kwargs)
        _, merged = self._relay.send(calls)
        shared = {call.name for call in merged}
        self._relay.replay([*merged, *(call for call in recorded if call.name not in shared)])
        return result


def merge_outputs(outputs: Sequence[Any], weights: Sequence[float]) -> dict[str, Any]:
    """Return what the steps of microbatches returned beside the loss, of the whole batch.

    Rows are put together, numbers averaged by the size of microbatches; of anything else it is that of the last one.
    """
    merged: dict[str, Any] = {}
    for key in outputs[-1]:
        values = [output[key].detach() if isinstance(output[key], Tensor) else output[key] for output in outputs]
        if key == "loss":
            continue
        if len(values) == 1 or not all(isinstance(value, Tensor) for value in values):
            merged[key] = values[-1]
        elif key == "num_tokens":
            merged[key] = torch.stack(values).sum()
        elif values[0].ndim:
            merged[key] = torch.cat(values)
        elif values[0].is_floating_point():
            merged[key] = sum(weight * value for weight, value in zip(weights, values, strict=True))
        else:
            merged[key] = values[-1]
    return merged


def _to_cpu(value: Any) -> Any:
    return torch.utils._pytree.tree_map(lambda leaf: leaf.detach().cpu() if isinstance(leaf, Tensor) else leaf, value)
