"""What a layout needs and how fast it runs, before a job is queued: memory, bubble, traffic, time of a step.

A thin model (one block of each kind) runs forward and backward on tensors without data, through the same code that cuts it
when it is trained (`trace`). What it kept, computed and sent is put together for every rank of a layout (`memory`, `time`),
and layouts are searched (`planner`).
"""

from __future__ import annotations

from kenotron.planning.model import ModelSpec
from kenotron.planning.planner import Job, Plan, Planned, plan

__all__ = ["Job", "ModelSpec", "Plan", "Planned", "plan"]
