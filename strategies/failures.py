"""When a rank fails: its error becomes every rank's, soon."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from kenotron.strategies import _lightning
from kenotron.strategies.base import StrategyBase


class Failures(StrategyBase):
    """Tells other ranks of an error, and takes theirs for a lost connection."""

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
        try:
            self._finish_saving()
        finally:
            self._let_go()

    def _let_go(self) -> None:
        if self._hooks is not None:
            self._hooks.undo()
        if self._example_input is not None and self._lightning_module is not None:
            self._lightning_module.example_input_array, self._example_input = self._example_input, None
        if self._monitor is not None:
            self._monitor.close()
            self._monitor = None
        if self.cluster_environment is not None:
            self.cluster_environment.teardown()
        self.precision_plugin.teardown()
        if self.accelerator is not None:
            self.accelerator.teardown()
        self.checkpoint_io.teardown()

    def _finish_saving(self) -> None:
        """Wait for checkpoints that are being written. While an exception is handled, none of theirs may take its place."""
        if self._held_checkpointer is None:
            return
        if not self._is_failing:
            self._held_checkpointer.close()
            return
        try:
            self._held_checkpointer.close(others_timeout_s=self._checkpoint_settings.exception_timeout_s)
        except Exception as error:
            _lightning.warn(self.names, f"A checkpoint that was being written is lost: {error}")

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = dict(super().__getstate__())
        for name in _NOT_PICKLED:
            state[name] = None
        return state


_NOT_PICKLED = (
    "_mesh", "_dp_group", "_host_pp_group", "_monitor", "_done", "_steps", "_state", "_tokens", "_streams",
    "_held_checkpointer", "_nodes", "_hooks", "_peers",
)  # fmt: skip


def _is_lost_connection(error: BaseException) -> bool:
    """Whether a collective failed because another rank went away."""
    text = str(error).lower()
    kinds = (dist.DistBackendError, dist.DistNetworkError, dist.DistStoreError, RuntimeError)
    return isinstance(error, kinds) and any(
        sign in text for sign in ("connection", "gloo", "nccl", "timed out", "timeout", "broken pipe", "socket")
    )
