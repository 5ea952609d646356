"""Our own block-sparse forward in Triton, for every NVIDIA GPU from Ampere on; where FlashAttention 4 is missing."""

from __future__ import annotations

import torch
from torch import Tensor

from ....kernels import refusal
from ..registry import SPARSE, Answer, Selection, SparseRequest


def _refuse(request: SparseRequest) -> str | None:
    if request.head_dim not in (16, 32, 64, 128):
        return f"it takes a head width of 16, 32, 64 or 128, not {request.head_dim}"
    if request.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"it takes bf16, fp16 and fp32, not {request.dtype}"
    if request.caps.is_cuda and request.caps.capability is not None and request.caps.capability < (8, 0):
        return f"it needs compute capability 8.0; {request.caps.name} has {request.caps.capability}"
    return refusal(request.caps.device, request.dtype)


@SPARSE.register("triton", priority=20, refuse=_refuse)
def triton(q_BSNE: Tensor, k_BLNE: Tensor, v_BLNE: Tensor, selection: Selection, sums: bool = False) -> Answer:
    """fp32 sums and softmax, operands in their own type."""
    from .._forward_triton import forward

    return forward(q_BSNE, k_BLNE, v_BLNE, selection, sums)
