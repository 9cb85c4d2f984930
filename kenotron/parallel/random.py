"""Random streams: which ranks draw the same numbers, and which must not.

**Two in a pipeline**: one for the code around the model, one for the model. The code before the model (augmentation, mixup,
sampling of noise) runs on every stage and must draw the same numbers on all of them; dropout inside the stages must not move
that stream, nor be the same on each stage. So the global generators hold the *data* stream, equal on all stages and tp ranks,
and the *model* stream is swapped in while own units run.

**One's own, for a while** (``OwnStream``): where a rank works on its part of something (its samples in a step without a
pipeline, its part of a sequence, its heads), it draws from a stream that is seeded by a number of the common one and its place.
The common one is put back afterwards, where it is on all ranks. So nothing need be saved, and a recomputed forward pass draws
alike.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn


def _get(device: torch.device) -> list[Tensor]:
    """Return the states of torch's global generators."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def _set(states: list[Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    for state in states[1:]:
        torch.cuda.set_rng_state(state, device)


class OwnStream:
    """This rank's own random numbers, between ``enter`` and ``leave``.

    Args:
        rank: of this process among those that draw apart.
    """

    def __init__(self, rank: int, device: torch.device) -> None:
        self._rank, self._device = rank, device
        self._common: list[Tensor] | None = None

    @torch.compiler.disable
    def enter(self) -> None:
        """Leave the common stream, which all ranks draw one number from. Nothing, where that has been done."""
        if self._common is not None:
            return
        with torch.device("cpu"):
            seed = int(torch.randint(2**62, ()))  # on the host, where nothing waits for it
        self._common = _get(self._device)
        torch.manual_seed((seed + 0x9E3779B97F4A7C15 * (self._rank + 1)) % 2**63)

    @torch.compiler.disable
    def leave(self) -> None:
        """Go back to the common stream, as it was when it was left."""
        if self._common is not None:
            _set(self._common, self._device)
            self._common = None

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Run what is inside on numbers of one's own."""
        self.enter()
        try:
            yield
        finally:
            self.leave()


_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


def draws_masks(module: nn.Module) -> bool:
    """Return whether there is dropout in a module: by layers, or by a rate that it keeps (``attention_dropout``)."""
    for child in module.modules():
        rates = {name: value for name, value in vars(child).items() if "drop" in name and isinstance(value, float)}
        if isinstance(child, _DROPOUTS):
            rates["p"] = child.p
        if any(rate > 0 for rate in rates.values()):
            return True
    return False


class RandomStreams:
    """Swaps the model stream in and out of torch's global generators.

    Args:
        seed: of the run. stream: a number that differs between ranks whose dropout must differ (dp and pp, not tp).
    """

    def __init__(self, seed: int, stream: int, device: torch.device) -> None:
        self._device = device
        with torch.random.fork_rng(devices=self._devices):
            torch.manual_seed((seed * 0x9E3779B1 + stream + 1) % 2**63)
            self._model = _get(device)
        self._data: list[Tensor] | None = None

    @property
    def _devices(self) -> list[torch.device]:
        return [self._device] if self._device.type == "cuda" else []

    def enter_model(self) -> None:
        """The first own unit of a microbatch is about to run."""
        if self._data is None:
            self._data = _get(self._device)
            _set(self._model, self._device)

    def leave_model(self) -> None:
        """The step of a microbatch is over."""
        if self._data is not None:
            self._model = _get(self._device)
            _set(self._data, self._device)
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
