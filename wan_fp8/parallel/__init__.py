"""One forward over several ranks of ``torch.distributed``: tokens, conditionings and weights split, numbers kept; and
pools of worker processes that run it for a process that is no rank itself (``pools``, ``remote``)."""

from __future__ import annotations

from .dims import ParallelDims
from .exchange import Traffic
from .parallelize import Layout, layout_of, parallelize, remove_parallel
from .plan import Machine, Plan, Workload, plan

__all__ = [
    "Layout",
    "Machine",
    "ParallelDims",
    "Plan",
    "Traffic",
    "Workload",
    "layout_of",
    "parallelize",
    "plan",
    "remove_parallel",
]
