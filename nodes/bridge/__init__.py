"""The only part of the pack that touches ComfyUI's internals: patchers, base models, samplers, LoRA patches.

It detects what the running ComfyUI offers and never compares versions.
"""

from __future__ import annotations

from .sampling import (
    Stage,
    core_sigmas,
    make_sampler,
    run_stages,
    sampler_names,
    scheduler_names,
    set_shift,
    with_timesteps,
)

__all__ = [
    "Stage",
    "core_sigmas",
    "make_sampler",
    "run_stages",
    "sampler_names",
    "scheduler_names",
    "set_shift",
    "with_timesteps",
]
