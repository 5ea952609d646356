"""FlashAttention 4 (CuTe DSL, compiled at first use): chosen by itself on Blackwell (B200, B300), and on Hopper where
FA3 is not there: 175.3 ms against cuDNN's 205.8 and FA3's 172.9, one H200, 75,600 tokens
(``benchmarks/results/sparse_h200.json``)."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from ...hardware import has_module, load_entry
from ...libraries import hint
from ..core import ATTENTION, AttentionRequest

MAJORS = (9, 10, 11)
"""Of compute capability. The kernel that 4.0.0b36 has for 12 (RTX 50, RTX PRO) borrows Ampere's; the last report about
it is that it does not compile (Dao-AILab/flash-attention#2453, and #2634, which would mend it, is open). To be taken up
when somebody has run it."""


@functools.cache
def _load() -> tuple[Callable | None, str]:
    if not has_module("flash_attn.cute"):
        return None, f"flash_attn.cute is not installed; install it with: {hint('fa4', torch.version.cuda)}"
    function, reason = load_entry("flash_attn.cute", "flash_attn_func")
    return function, reason or "flash_attn.cute"


def _refuse(request: AttentionRequest) -> str | None:
    major = (request.caps.capability or (0, 0))[0]
    if not request.caps.is_cuda or major < MAJORS[0]:
        return f"it needs a Hopper or Blackwell GPU; this is {request.caps.name}"
    if major not in MAJORS:
        return (
            f"it is for compute capability 9, 10 and 11 (H100, B200), and its kernel for others is not known to work; "
            f"{request.caps.name} has {request.caps.capability}"
        )
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
    """FlashAttention 4 in bf16 or fp16."""
    function, _ = _load()
    assert function is not None
    return function(q_BSNE, k_BLNE, v_BLNE)[0]
