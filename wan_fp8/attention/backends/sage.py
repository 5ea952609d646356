"""SageAttention (INT8 queries and keys; 2.x: FP8 values, 1.x: fp16 values), where its package is installed."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from ...hardware import load_entry
from ..core import ATTENTION, AttentionRequest


@functools.cache
def _load() -> tuple[Callable | None, str]:
    return load_entry("sageattention", "sageattn")


def _refuse(request: AttentionRequest) -> str | None:
    if not request.caps.is_cuda or (request.caps.capability or (0, 0)) < (8, 0):
        return f"it needs an NVIDIA GPU of compute capability 8.0 or later; this is {request.caps.name}"
    function, note = _load()
    if function is None:
        return note
    if request.dtype not in (torch.bfloat16, torch.float16):
        return f"it takes bf16 or fp16, not {request.dtype}"
    if request.head_dim not in (64, 128):
        return f"it takes a head width of 64 or 128, not {request.head_dim}"
    return None


@ATTENTION.register("sage", priority=0, refuse=_refuse, exact=False)
def sage(q_BSNE: Tensor, k_BLNE: Tensor, v_BLNE: Tensor) -> Tensor:
    """SageAttention takes the mean of K out itself; the mean of V is ours to take out and add back."""
    function, _ = _load()
    assert function is not None
    v_mean = v_BLNE.float().mean(1, keepdim=True)
    centred = (v_BLNE.float() - v_mean).to(v_BLNE.dtype)
    out = function(
        q_BSNE.contiguous(), k_BLNE.contiguous(), centred, tensor_layout="NHD", is_causal=False, smooth_k=True
    )
    return (out.float() + v_mean).to(q_BSNE.dtype)
