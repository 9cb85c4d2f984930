"""A batch through the module: training and evaluation steps, backward, gradients over all ranks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Generator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from kenotron.models.moe import set_loss_weight, update_expert_bias
from kenotron.parallel.apply import data_group
from kenotron.parallel.expert_load import ExpertLoad
from kenotron.parallel.grads import clip_by_norm, clip_by_value
from kenotron.parallel.pipeline import Pipeline
from kenotron.strategies import _lightning
from kenotron.strategies.failures import Failures
from kenotron.strategies.guard import StepGuard, mean_over_ranks
from kenotron.strategies.loss import StepLoss
from kenotron.strategies.microbatches import check_same_batch


class Training(Failures):
    """Runs steps plainly, or through the pipeline where there is one."""

    @contextlib.contextmanager
    def block_backward_sync(self) -> Generator[None, None, None]:
        """Let gradients accumulate without reducing them."""
        self._sync = False
        try:
            yield
        finally:
            self._sync = True

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Ranks that share samples must have loaded the same ones."""
        if self._held_checkpointer is not None:
            self._beliefs.mend(self._user_module.trainer.checkpoint_callbacks, self._held_checkpointer)
        self._check_same_batch(batch, batch_idx)

    def _check_same_batch(self, batch: Any, batch_idx: Any) -> None:
        if self.world_size > self._dp_size and isinstance(batch_idx, int):
            check_same_batch(batch, self._peers, batch_idx)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        assert self._done is not None
        try:
            self._share_buffers()
            if self._steps is not None:
                return self._pipelined_training_step(*args, *kwargs.values())
            return self._plain_training_step(*args, **kwargs)
        except Exception as error:
            self._raise_explained(error)

    def _plain_training_step(self, *args: Any, **kwargs: Any) -> Any:
        module, done = self._user_module, self._done
        assert done is not None and self._tokens is not None
        accumulate = module.trainer.accumulate_grad_batches if module.automatic_optimization else 1
        self._weight_auxiliary_losses(1.0 / accumulate)
        # Other samples, other masks; ranks that share samples draw alike.
        own = self._own_stream.entered() if self.is_distributed else contextlib.nullcontext()
        with self.precision_plugin.train_step_context(), own:
            output = done.enclose(lambda: module.training_step(*args, **kwargs))
        if module.automatic_optimization and isinstance(output, Mapping) and "num_tokens" in output:
            loss = StepLoss.of(output)
            self._sum_to_differentiate = self._tokens.to_differentiate(loss, 1.0)
            output = {**output, "loss": self._tokens.mean([loss], [1.0])}
        elif module.automatic_optimization and not self.names.is_overridden("backward", module):
            self._check_loss(output)
        if output is None:  # no backward pass lets go of what was gathered, or takes part in what other ranks reduce
            self._reshard()
            if module.automatic_optimization and not self._sync:
                done.before_backward(last_microbatch=True, sync=False)
                done.end_backward()
        return output

    @staticmethod
    def _check_loss(output: Any) -> None:
        """Refuse a loss that can't be differentiated. What is no loss at all is Lightning's to tell."""
        if isinstance(output.get("loss") if isinstance(output, Mapping) else output, Tensor):
            StepLoss.of(output)

    def _pipelined_training_step(self, batch: Any, *rest: Any) -> Any:
        module, package = self._user_module, self.names.package
        trainer = module.trainer
        assert self._steps is not None
        batch_idx, accumulate = _lightning.current_batch_idx(trainer), trainer.accumulate_grad_batches
        if batch_idx % accumulate == 0:
            _lightning.zero_grad(trainer, batch_idx, self.optimizers[0])
        scaler = getattr(self.precision_plugin, "scaler", None)
        output = self._steps.train(
            module.training_step,
            batch,
            rest,
            self.precision_plugin.train_step_context,
            scale=scaler.scale if scaler is not None else lambda tensor: tensor,
            accumulate=accumulate,
            weigh=self._weight_auxiliary_losses,
            is_last_batch=trainer.is_last_batch,
        )
        loss = output["loss"] if isinstance(output, Mapping) else output
        _lightning.call_hook(trainer, package, "on_before_backward", loss)
        self._end_backward()
        _lightning.call_hook(trainer, package, "on_after_backward")
        return output

    def _weight_auxiliary_losses(self, weight: float) -> None:
        """Let losses that layers attach count beside one that is ``weight`` of the update's mean, or a sum over tokens."""
        assert self._done is not None and self._tokens is not None
        if self._done.loads is None:  # no experts, so no layers that attach any
            return
        is_sum = bool(self._tokens.uses_sums)
        # A sum is that of all cp ranks, and its gradients are averaged over them; a layer sees the tokens of one.
        factor: Any = float(self.layout.cp) if is_sum else weight
        scaler = getattr(self.precision_plugin, "scaler", None)
        if scaler is not None:
            factor = scaler.scale(torch.tensor(factor, device=self.root_device))
        set_loss_weight(self._user_module, factor, is_sum=is_sum)

    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any], model: Any = None, **kwargs: Any) -> Any:
        guard = self._guards.get(id(optimizer))
        if self._user_module.automatic_optimization:
            closure = self._finished(closure)
        if guard is not None:
            closure = self._guarded(guard, optimizer, closure)
        try:
            output = super().optimizer_step(optimizer, closure, model, **kwargs)
            self._restore_parameters()  # a gradient scaler may have left the update out
        except BaseException as error:
            self._restore_parameters()
            if isinstance(error, Exception):  # a collective may have failed, of the gradients or of the update
                self._raise_explained(error)
            raise
        if self._done is not None and self._done.loads is not None:
            update_expert_bias(self._user_module, self._sum_over_data)
        return output

    def _restore_parameters(self) -> None:
        for update in self._updates:
            update.restore()

    def _finished(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        """Finish gradients where the step had nothing to differentiate here: other ranks may have, or earlier batches."""

        def finished() -> Any:
            self._is_finished = False
            result = closure()
            if not self._is_finished:
                self._finish_gradients()
            return result

        return finished

    def _guarded(self, guard: StepGuard, optimizer: Optimizer, closure: Callable[[], Any]) -> Callable[[], Any]:
        """Judge what the closure computed before it is clipped and applied."""

        def judged() -> Any:
            loss = closure()
            self._say(guard.report())  # of the step before, on CUDA
            guard.apply(guard.judge(self.grad_norm(optimizer), mean_over_ranks(loss)))
            self._say(guard.report())
            return loss

        return judged

    def _say(self, text: str | None) -> None:
        if text is not None and self.is_global_zero:
            _lightning.warn(self.names, text)

    def skipped_steps(self) -> Tensor:
        """Return how many steps the guard has skipped (0-dim int64, on the device)."""
        counts = [guard.num_skipped for guard in self._guards.values()]
        return torch.stack(counts).sum() if counts else torch.zeros((), dtype=torch.int64)

    def _sum_over_data(self, counts: Tensor) -> None:
        if self._mesh is not None:
            dist.all_reduce(counts, group=data_group(self._mesh))

    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        done, module = self._done, self._user_module
        assert done is not None
        if self._sum_to_differentiate is not None:
            closure_loss, self._sum_to_differentiate = self._sum_to_differentiate, None
        done.look_for_shares([closure_loss])
        owed = contextlib.nullcontext() if module.automatic_optimization else done.kept_apart()
        self.pre_backward(closure_loss)
        closure_loss = self.precision_plugin.pre_backward(closure_loss, module)
        with owed:
            done.before_backward(last_microbatch=True, sync=self._sync)
            self.precision_plugin.backward(closure_loss, module, optimizer, *args, **kwargs)
            self._end_backward()
        closure_loss = self.precision_plugin.post_backward(closure_loss, module)
        self.post_backward(closure_loss)
        return closure_loss

    def _end_backward(self) -> None:
        assert self._done is not None
        if self._sync:
            self._finish_gradients()
        else:
            self._done.end_backward()

    def _finish_gradients(self) -> None:
        assert self._done is not None and self._tokens is not None
        self._is_finished = True
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

    def parameter_names(self, optimizer: Optimizer) -> list[list[str]]:
        """Return the names of the parameters in each group of an optimizer, alike on all ranks: also of other stages'."""
        assert self._done is not None
        names = self._done.names()
        found = [[names[id(param)] for param in group["params"] if id(param) in names] for group in optimizer.param_groups]
        return [list(dict.fromkeys(group)) for group in found]  # a tied weight once

    def grad_norms(self, sets: Mapping[str, Collection[str]]) -> dict[str, Tensor]:
        """Return the norm of the gradient of each set of parameters (0-dim float64), every element counted once.

        In one collective. All ranks call it with the same names, as :meth:`parameter_names` gives them.
        """
        assert self._done is not None
        norms = self._done.norm.of_sets(self._done.named_parameters(), sets, self.root_device)
        return dict(zip(sets, norms.unbind(), strict=True))

    def grad_histograms(self, sets: Mapping[str, Collection[str]], edges: Tensor) -> tuple[Tensor, Tensor]:
        """Return counts of gradients between edges and what they span, see :meth:`GradientNorm.histograms`."""
        assert self._done is not None
        return self._done.norm.histograms(self._done.named_parameters(), sets, edges)

    def expert_loads(self) -> dict[str, ExpertLoad]:
        """Return what the experts of each layer got in training since the last call, by name. All ranks call it."""
        assert self._done is not None
        return {} if self._done.loads is None else self._done.loads.report()

    @property
    def pipeline(self) -> Pipeline | None:
        """What runs this rank's pipeline stages; ``None`` before set-up, and where ``pp`` is 1."""
        return None if self._steps is None else self._steps.pipeline

    def evaluate(self, call: Callable[[], Any]) -> Any:
        """Return ``call()``, which uses the module between steps: with its parameters at hand, in validation's precision.

        Without gradients. All ranks call it, and run the module equally often.

        Raises:
            ValueError: the module is split into pipeline stages.
        """
        if self.layout.pp > 1:
            raise ValueError(
                f"pp={self.layout.pp}: a model that is split into stages runs in steps alone. Set pp=1, or use a checkpoint: "
                "kenotron.from_checkpoint(path)."
            )
        assert self._done is not None
        try:
            with torch.no_grad(), self.precision_plugin.val_step_context():
                return self._done.enclose(call)
        finally:
            self._reshard()

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
        batch, *rest = (*args, *kwargs.values())
        try:
            self._check_same_batch(batch, rest[0] if rest else 0)
            if self._steps is not None:
                return self._steps.evaluate(step, batch, tuple(rest), context)
            with context():
                return self._done.enclose(lambda: step(*args, **kwargs))
        except Exception as error:
            self._raise_explained(error)
        finally:
            self._reshard()

    def _share_buffers(self) -> None:
        """Give the first replica's running statistics to all: what it saves is what all train and validate with."""
        if self._done is not None and self._done.buffers is not None:
            self._done.buffers.share()

    def on_train_end(self) -> None:
        self._share_buffers()

    def on_validation_start(self) -> None:
        self._share_buffers()

    def on_test_start(self) -> None:
        self._share_buffers()

    def on_predict_start(self) -> None:
        self._share_buffers()

    def _reshard(self) -> None:
        """Free gathered parameters, so that hooks find shards, and write to those."""
        if self._done is not None and self._done.sharded is not None:
            self._done.sharded.reshard()
