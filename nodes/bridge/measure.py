"""What a run costs, and the MODEL that a faster one is held against."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import comfy.model_management
import torch

from ...wan_fp8.quant import Recipe
from .fork import hosted
from .recipe import with_recipe
from .settings import with_settings


@dataclass(slots=True)
class Measured:
    """Filled in when the block ends."""

    seconds: float = 0.0
    peak_gib: float | None = None
    """Most GPU memory that torch had allocated, weights included; None without an NVIDIA GPU."""


@contextmanager
def measured(device: torch.device) -> Iterator[Measured]:
    """Time and memory of what happens inside; it begins with nothing on the GPU, so that no earlier model counts."""
    management = comfy.model_management
    management.unload_all_models()
    management.soft_empty_cache()
    cuda = device.type == "cuda" and torch.version.cuda is not None
    if cuda:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    result = Measured()
    began = time.perf_counter()
    yield result
    if cuda:
        torch.cuda.synchronize(device)
        result.peak_gib = torch.cuda.max_memory_allocated(device) / 2**30
    result.seconds = time.perf_counter() - began


def plain(patcher: Any) -> Any:
    """This MODEL without what our settings nodes did to it: no recipe, exact attention, no cache, nothing compiled,
    the residual stream in float32. LoRAs and everything of core's stay.

    Raises:
        InputError: the weights from before the recipe are gone.
    """
    without, _ = with_recipe(hosted(patcher), Recipe("none"))
    choices = dict.fromkeys(("attention", "compile", "tf32", "stream_dtype", "cache", "recording"))
    return with_settings(without, **choices)


def in_float32(patcher: Any) -> Any:
    """This MODEL computing in float32, without TF32; its weights are cast as they are used and stay what they are."""
    exact = with_settings(patcher, tf32=False)
    exact.set_model_compute_dtype(torch.float32)
    return exact
