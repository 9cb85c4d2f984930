"""When a rank fails: its error becomes every rank's, soon."""

from __future__ import annotations

import itertools
import os
import signal
import sys
from types import TracebackType
from typing import Any, NoReturn

import torch.distributed as dist

from kenotron.parallel._torch import default_store
from kenotron.ranks import RankMonitor
from kenotron.rendezvous import address_towards, open_store, wait_for_all
from kenotron.strategies import _lightning
from kenotron.strategies.base import StrategyBase
from kenotron.strategies.settings import ProcessGroupSettings

_monitors = itertools.count()
#: How long a process that waits for a dead one lives on for a checkpoint that can still be published.
_FINISH_S = 60.0


class Failures(StrategyBase):
    """Tells other ranks of an error, and takes theirs for a lost connection."""

    def _meet_ranks(self, settings: ProcessGroupSettings) -> None:
        """Connect the processes. From the first moment on each learns when another ends."""
        environment, rank, size = self.cluster_environment, self.global_rank, self.world_size
        assert environment is not None
        options: dict[str, Any] = {"timeout": settings.timeout}
        address, port = environment.main_address, environment.main_port
        if dist.is_initialized():
            store = default_store()
        else:
            agents = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
            try:
                store = open_store(address, port, rank=rank, timeout=settings.timeout, is_agents=agents)
            except Exception:
                if isinstance(self.launcher, self.names.SubprocessScriptLauncher):
                    self.launcher.kill(signal.SIGKILL)  # the processes that it has started would look for this one
                raise
            options["store"] = store
        host = address_towards(address, port)
        self._monitor = RankMonitor(store, rank, size, str(next(_monitors)), host, before_exit=self._finish_publishing)
        self._announcements = dist.PrefixStore("kenotron/announced", store)
        if "store" in options:
            limit_s = settings.timeout.total_seconds()
            wait_for_all(store, size, limit_s, self._monitor.raise_failure, lambda text: _lightning.warn(self.names, text))
        backend = settings.backend or self.names.backend_for_device(self.root_device)
        self.names.init_dist_connection(environment, backend, **options)

    def _raise_explained(self, error: Exception) -> NoReturn:
        """Raise what `_explain` finds, with that error's own cause: never an error from itself."""
        told = self._explain(error)
        if told is error:
            raise error
        if told is error.__cause__:
            error.__cause__ = None  # it becomes the context of its own cause
        raise told from told.__cause__

    def _explain(self, error: Exception) -> Exception:
        """Return what to raise: the user's own error, or that of the rank which failed first."""
        if isinstance(error.__cause__, Exception) and "failed to run forward" in str(error):
            error = error.__cause__  # torch's pipeline wraps what a stage raises
        if self._monitor is None:
            return error
        if _is_lost_connection(error):
            failure = self._monitor.failure_elsewhere()
            if failure is not None:
                kind = ValueError if failure.kind == "ValueError" else RuntimeError
                told = kind(str(failure))
                told.__cause__, told.__suppress_context__ = error.__cause__, True  # of the connection there is nothing to say
                return told
        else:
            self._monitor.report_failure(error)
        return error

    def _finish_publishing(self) -> None:
        """Let a checkpoint come to its end to which the dead have contributed all that they had to."""
        if self._held_checkpointer is not None:
            self._held_checkpointer.finish_within(_FINISH_S)

    def on_exception(self, exception: BaseException) -> None:
        super().on_exception(exception)
        if isinstance(exception, self.names.SIGTERMException) and exception.code is None:
            exception.code = 128 + signal.SIGTERM  # as of a process that the signal ends
            step = self._user_module.trainer.global_step
            _lightning.warn(self.names, f"SIGTERM: training ends after step {step}, with exit code {exception.code}.")
        if self._monitor is None:
            return
        self._monitor.begin_end()
        if _is_lost_connection(exception):
            failure = self._monitor.failure_elsewhere()
            if failure is not None:
                exception.add_note(str(failure))
                tell_in_a_line(exception, self.global_rank, str(failure))
        elif isinstance(exception, Exception):
            first = self._monitor.report_failure(exception)
            if first is not None:
                tell_in_a_line(exception, self.global_rank, str(first))
            if self.is_global_zero:
                self._monitor.linger()  # the store lives in this process: let the others read it

    def teardown(self) -> None:
        """Leave weights and optimizers where they are: moving shards of a large model off the device helps nobody."""
        try:
            self._finish_saving()
        finally:
            self._let_go()

    def _let_go(self) -> None:
        for update in self._updates or ():  # a copy of a strategy has none
            update.remove()
        if self._hooks is not None:
            self._hooks.undo()
        if self._example_input is not None and self._lightning_module is not None:
            self._lightning_module.example_input_array, self._example_input = self._example_input, None
        if self._monitor is not None:
            self._monitor.close()
            self._last_monitor, self._monitor = self._monitor, None  # a save after fit still asks it who lives
        for claim in self._claims:
            claim.release()
        self._claims = []
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
        try:
            if not self._is_failing:
                self._held_checkpointer.close()
                return
            try:
                self._held_checkpointer.close(others_timeout_s=self._checkpoint_settings.exception_timeout_s)
            except Exception as error:
                _lightning.warn(self.names, f"A checkpoint that was being written is lost: {error}")
        finally:
            trainer = getattr(self._lightning_module, "_trainer", None)
            if trainer is not None:
                self._beliefs.mend(trainer.checkpoint_callbacks, self._held_checkpointer)

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = dict(super().__getstate__())
        for name in _NOT_PICKLED:
            state[name] = None
        state["_claims"] = []
        return state


def tell_in_a_line(error: BaseException, rank: int, failure: str) -> None:
    """Where an error ends this process, print one line in place of its traceback: another rank prints its own in full."""
    usual = sys.excepthook

    def hook(kind: type[BaseException], value: BaseException, trace: TracebackType | None) -> None:
        if value is not error:
            usual(kind, value, trace)
            return
        own = "" if failure.endswith(f"{kind.__name__}: {value}") or str(value) == failure else f" ({kind.__name__}: {value})"
        print(f"rank {rank} ends: {failure}{own}", file=sys.stderr, flush=True)

    sys.excepthook = hook


_NOT_PICKLED = (
    "_mesh", "_dp_group", "_host_pp_group", "_monitor", "_last_monitor", "_announcements", "_done", "_steps", "_state",
    "_tokens", "_streams", "_held_checkpointer", "_nodes", "_updates", "_hooks", "_peers",
)  # fmt: skip


def _is_lost_connection(error: BaseException) -> bool:
    """Whether a collective failed because another rank went away."""
    text = str(error).lower()
    kinds = (dist.DistBackendError, dist.DistNetworkError, dist.DistStoreError, RuntimeError)
    return isinstance(error, kinds) and any(
        sign in text for sign in ("connection", "gloo", "nccl", "timed out", "timeout", "broken pipe", "socket")
    )
