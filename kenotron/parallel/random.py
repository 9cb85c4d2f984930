"""Two random streams in a pipeline: one for the code around the model, one for the model.

The code before the model (augmentation, mixup, sampling of noise) runs on every stage of a pipeline and must draw the same
numbers on all of them; dropout inside the stages must not move that stream, nor be the same on each stage. So the global
generators hold the *data* stream, equal on all stages and tp ranks, and the *model* stream is swapped in while own units run.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor


class RandomStreams:
    """Swaps the model stream in and out of torch's global generators.

    Args:
        seed: of the run. stream: a number that differs between ranks whose dropout must differ (dp and pp, not tp).
    """

    def __init__(self, seed: int, stream: int, device: torch.device) -> None:
        self._device = device
        with torch.random.fork_rng(devices=self._devices):
            torch.manual_seed((seed * 0x9E3779B1 + stream + 1) % 2**63)
            self._model = self._get()
        self._data: list[Tensor] | None = None

    @property
    def _devices(self) -> list[torch.device]:
        return [self._device] if self._device.type == "cuda" else []

    def _get(self) -> list[Tensor]:
        return [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in self._devices)]

    def _set(self, states: list[Tensor]) -> None:
        torch.set_rng_state(states[0])
        for device, state in zip(self._devices, states[1:], strict=True):
            torch.cuda.set_rng_state(state, device)

    def enter_model(self) -> None:
        """The first own unit of a microbatch is about to run."""
        if self._data is None:
            self._data = self._get()
            self._set(self._model)

    def leave_model(self) -> None:
        """The step of a microbatch is over."""
        if self._data is not None:
            self._model = self._get()
            self._set(self._data)
            self._data = None

    @contextlib.contextmanager
    def untouched(self) -> Iterator[None]:
        """Let nothing that runs inside move either stream."""
        model = self._model
        try:
            with torch.random.fork_rng(devices=self._devices):
                yield
        finally:  # a step that stops at its stage's boundary leaves by an exception
            self._data, self._model = None, model

    def state_dict(self) -> dict[str, list[Tensor]]:
        """Return the model stream; the data stream is torch's global state."""
        return {"model": [state.clone() for state in self._model]}

    def load_state_dict(self, state: dict[str, list[Tensor]]) -> None:
        self._model = [part.clone() for part in state["model"]]
