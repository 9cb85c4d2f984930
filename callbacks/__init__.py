"""Lightning callbacks and plugins, one class to a file. None is needed for correct training."""

from kenotron.callbacks.checkpoint_io import AsyncCheckpointIO
from kenotron.callbacks.consumption import Consumption
from kenotron.callbacks.doremi import DoReMi
from kenotron.callbacks.garbage_collection import GarbageCollection
from kenotron.callbacks.gradient_norms import GradientNorms
from kenotron.callbacks.hf_export import HFExport
from kenotron.callbacks.learning_rate import LearningRate
from kenotron.callbacks.memory import Memory
from kenotron.callbacks.moe_load import MoELoad
from kenotron.callbacks.perplexity import Perplexity
from kenotron.callbacks.pipeline_trace import PipelineTrace
from kenotron.callbacks.preemption import Preempted, Preemption
from kenotron.callbacks.profiler import Profiler
from kenotron.callbacks.samples import Samples
from kenotron.callbacks.step_bar import StepBar
from kenotron.callbacks.step_lines import StepLines
from kenotron.callbacks.straggler import StragglerDetector
from kenotron.callbacks.throughput import Throughput
from kenotron.callbacks.upload import Upload
from kenotron.callbacks.weight_checksums import ReplicasDifferError, WeightChecksums

__all__ = [
    "AsyncCheckpointIO",
    "Consumption",
    "DoReMi",
    "GarbageCollection",
    "GradientNorms",
    "HFExport",
    "LearningRate",
    "Memory",
    "MoELoad",
    "Perplexity",
    "PipelineTrace",
    "Preempted",
    "Preemption",
    "Profiler",
    "ReplicasDifferError",
    "Samples",
    "StepBar",
    "StepLines",
    "StragglerDetector",
    "Throughput",
    "Upload",
    "WeightChecksums",
]
