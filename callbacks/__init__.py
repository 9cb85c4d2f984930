"""Lightning callbacks and plugins, one class to a file. None is needed for correct training."""

from kenotron.callbacks.checkpoint_io import AsyncCheckpointIO

__all__ = ["AsyncCheckpointIO"]
