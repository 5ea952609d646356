"""FlashAttention 3 (Hopper), from whichever package is installed: ``fa3_fwd_interface`` or ``flash_attn_interface``."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable

import torch
from torch import Tensor

from ...hardware import has_module
from ..core import ATTENTION, AttentionRequest

_MODULES = ("fa3_fwd_interface", "flash_attn_interface")


@functools.cache
def _load() -> tuple[Callable | None, str]:
    """The kernel's entry, or why there is none. A broken installation keeps its own words."""
    reasons = []
    for name in _MODULES:
        if not has_module(name):
            reasons.append(f"{name} is not installed")
            continue
        try:
            return importlib.import_module(name).flash_attn_func, name
        except (ImportError, OSError, AttributeError) as error:
            reasons.append(f"{name} does not load ({error})")
    return None, "; ".join(reasons)


def _refuse(request: AttentionRequest) -> str | None:
    if not request.caps.is_hopper:
        return f"it needs a Hopper GPU (compute capability 9.0); this is {request.caps.name}"
    function, note = _load()
    if function is None:
        return f"{note}; install one with: pip install --no-deps fa3-fwd"
    if request.dtype != torch.bfloat16:
        return f"it takes bf16, not {request.dtype}"
    if request.head_dim not in (64, 128, 256):
        return f"it takes a head width of 64, 128 or 256, not {request.head_dim}"
    return None


@ATTENTION.register("fa3", priority=30, refuse=_refuse)
def fa3(q_BSNE: Tensor, k_BLNE: Tensor, v_BLNE: Tensor) -> Tensor:
    """FlashAttention 3 in bf16: 666-713 TFLOP/s on an H100 at 75,600 tokens."""
    function, _ = _load()
    assert function is not None
    out = function(q_BSNE, k_BLNE, v_BLNE)
    return out[0] if isinstance(out, tuple) else out
