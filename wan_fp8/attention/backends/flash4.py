"""FlashAttention 4 (CuTe DSL, compiled at first use): chosen by itself on Blackwell, where FA3 does not run; by name
on Hopper too."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from ...hardware import has_module, load_entry
from ...libraries import hint
from ..core import ATTENTION, AttentionRequest


@functools.cache
def _load() -> tuple[Callable | None, str]:
    if not has_module("flash_attn.cute"):
        return None, f"flash_attn.cute is not installed; install it with: {hint('fa4', torch.version.cuda)}"
    function, reason = load_entry("flash_attn.cute", "flash_attn_func")
    return function, reason or "flash_attn.cute"


def _refuse(request: AttentionRequest) -> str | None:
    if not request.caps.is_cuda or (request.caps.capability or (0, 0)) < (9, 0):
        return f"it needs a Hopper or Blackwell GPU; this is {request.caps.name}"
    function, note = _load()
    if function is None:
        return note
    if request.dtype not in (torch.bfloat16, torch.float16):
        return f"it takes bf16 or fp16, not {request.dtype}"
    if request.head_dim not in (64, 128):
        return f"it takes a head width of 64 or 128, not {request.head_dim}"
    return None


@ATTENTION.register("fa4", priority=25, refuse=_refuse)
def fa4(q_BSNE: Tensor, k_BLNE: Tensor, v_BLNE: Tensor) -> Tensor:
    """FlashAttention 4 in bf16 or fp16: 688 TFLOP/s on an H100 at 75,600 tokens."""
    function, _ = _load()
    assert function is not None
    return function(q_BSNE, k_BLNE, v_BLNE)[0]
