"""FlashAttention 3 (Hopper), from whichever package is installed: ``fa3_fwd_interface`` or ``flash_attn_interface``."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from ...hardware import load_entry
from ...kernels import attention_cast, refusal
from ..core import ATTENTION, AttentionRequest

_MODULES = ("fa3_fwd_interface", "flash_attn_interface")


@functools.cache
def _load() -> tuple[Callable | None, str]:
    """The kernel's entry, or why there is none. A broken installation keeps its own words."""
    reasons = []
    for name in _MODULES:
        function, reason = load_entry(name, "flash_attn_func")
        if function is not None:
            return function, name
        reasons.append(reason)
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


def _call(q: Tensor, k: Tensor, v: Tensor, **descales: Tensor) -> Tensor:
    function, _ = _load()
    assert function is not None
    out = function(q, k, v, **descales)
    return out[0] if isinstance(out, tuple) else out


@ATTENTION.register("fa3", priority=30, refuse=_refuse)
def fa3(q_BSNE: Tensor, k_BLNE: Tensor, v_BLNE: Tensor) -> Tensor:
    """FlashAttention 3 in bf16: 682 TFLOP/s on an H200 at 75,600 tokens (``benchmarks/results/kernels_h200.json``)."""
    return _call(q_BSNE, k_BLNE, v_BLNE)


def _refuse_fp8(request: AttentionRequest) -> str | None:
    return _refuse(request) or refusal(request.caps.device, request.dtype)


@ATTENTION.register("fa3-fp8", priority=0, refuse=_refuse_fp8, exact=False)
def fa3_fp8(q_BSNE: Tensor, k_BLNE: Tensor, v_BLNE: Tensor) -> Tensor:
    """FlashAttention 3 on e4m3 operands; means of K and V are always taken out first. 916 TFLOP/s on an H200 at 75,600
    tokens, casts included (``benchmarks/results/kernels_h200.json``)."""
    cast = attention_cast.fused(q_BSNE, k_BLNE, v_BLNE)
    out = _call(cast.q, cast.k, cast.v, q_descale=cast.q_scale, k_descale=cast.k_scale, v_descale=cast.v_scale)
    return attention_cast.add_mean_(out, cast.v_mean_BNE, use_triton=True)
