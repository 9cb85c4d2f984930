"""Lightning callbacks and plugins, one class to a file. None is needed for correct training."""

from kenotron.callbacks.checkpoint_io import AsyncCheckpointIO
from kenotron.callbacks.consumption import Consumption
from kenotron.callbacks.hf_export import HFExport
from kenotron.callbacks.perplexity import Perplexity
from kenotron.callbacks.sample_text import SampleText

__all__ = ["AsyncCheckpointIO", "Consumption", "HFExport", "Perplexity", "SampleText"]
