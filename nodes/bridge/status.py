"""Live status of a run for the page: one small message a step, which ``web/status.js`` shows on the node."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from comfy_execution.utils import get_executing_context

from .fork import expert_of
from .remote import is_remote, remote_of

EVENT = "wan_fp8.status"
"""Carries node, prompt_id, step, steps, seconds_per_step, expert, skipped, memory_gib and gpus; null: not known.
Of a pool: the memory of its fullest GPU, and the number of its GPUs, or of its processes on the CPU."""
RECENT = 5
"""Steps whose median is the time of a step: what compiled or loaded first must not count for long."""
NAMES = {"high_noise": "high noise", "low_noise": "low noise"}


class RunStatus:
    """Told of each step of one sampler run. Nothing waits for a GPU: times are those at which the host arrives."""

    def __init__(self, models: Sequence[Any], first_steps: Sequence[int], steps: int, done: int = 0) -> None:
        """``models`` and the step at which each begins; ``steps`` of all runs of a node, ``done`` of them before."""
        self._models, self._first_steps, self._steps = list(models), list(first_steps), steps
        self._done = done
        self._context = get_executing_context()
        self._marks = [time.perf_counter()]
        self._skipped: dict[int, list[int]] = {}

    def step(self, index: int) -> None:
        """Step ``index``, counted from 0, is done."""
        self._marks.append(time.perf_counter())
        send = _sender()
        if self._context is None or send is None:
            return
        stage = max(i for i, first in enumerate(self._first_steps) if first <= index)
        model = self._models[stage]
        pool = remote_of(model) if is_remote(model) else None
        memory = pool.memory_used if pool is not None else _memory_used(torch.device(model.load_device))
        gaps = [b - a for a, b in zip(self._marks[1:], self._marks[2:], strict=False)][-RECENT:]
        send(
            EVENT,
            {
                "node": self._context.node_id,
                "prompt_id": self._context.prompt_id,
                "step": self._done + index + 1,
                "steps": self._steps,
                "seconds_per_step": round(statistics.median(gaps), 3) if gaps else None,
                "expert": NAMES.get(expert_of(model) or "") if len(self._models) > 1 else None,
                "skipped": self._count_skipped(),
                "memory_gib": round(memory / 2**30, 2) if memory else None,
                "gpus": pool.ranks if pool is not None else None,
            },
        )

    def _count_skipped(self) -> int | None:
        """Passes that caches have skipped so far; None without a cache. An expert's cache is gone when its part ends:
        of each model the counts are kept, a new one whenever the number falls."""
        for net in {id(model): model.model.diffusion_model for model in self._models}.values():
            for cache in getattr(net, "caches", {}).values():
                counts = self._skipped.setdefault(id(net), [0])
                if cache.report.skipped < counts[-1]:
                    counts.append(0)
                counts[-1] = cache.report.skipped
        return sum(map(sum, self._skipped.values())) if self._skipped else None


def _sender() -> Any:
    """``send(event, data)`` to the page that queued the prompt; None without a server."""
    server = getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)
    if server is None:
        return None
    return lambda event, data: server.send_sync(event, data, getattr(server, "client_id", None))


def _memory_used(device: torch.device) -> int:
    """Bytes that torch has allocated on an NVIDIA or AMD GPU now; 0 elsewhere."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
