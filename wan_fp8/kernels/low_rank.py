"""A change of low rank beside a linear, ``y += (x A^T) B^T``: two thin products, each bound by one pass over memory.

The first reads an input that is cast to FP8 already as it is (one byte a value, scales applied to the sums): neither a
second copy of it in high precision is made nor ``A`` rounded to FP8. The second adds to ``y`` in place, so that the
output is read and written once. Both matrices stay in the type of ``y``; sums are fp32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import refusal
from .quantize import Granularity, QuantizedActivation

RANK_MULTIPLE = 16
"""What a rank is padded to with zeros: the smallest side of a tensor core's product."""
FUSED = (Granularity.TENSOR, Granularity.ROW, Granularity.BLOCK)
"""Scalings of the input that the kernel reads; an input with another one is dequantised first."""


def project(x: Tensor | QuantizedActivation, down_RD: Tensor, *, fused: bool | None = None) -> Tensor:
    """``x A^T``: [..., D] -> [tokens, R], in the type of ``down_RD``.

    Args:
        fused: the Triton kernel or the eager reference; None takes Triton wherever it runs. An input in high precision
            is a plain matrix product in either case.
    """
    if isinstance(x, Tensor):
        return F.linear(x.flatten(0, -2), down_RD)
    if x.granularity not in FUSED or not _use_triton(down_RD, fused):
        return F.linear(x.dequantized(down_RD.dtype).flatten(0, -2), down_RD)
    from ._low_rank_triton import launch_project

    return launch_project(x, down_RD)


def add_(y: Tensor, hidden_MR: Tensor, up_NR: Tensor, *, fused: bool | None = None) -> Tensor:
    """``y += hidden B^T`` in place: y [..., N] contiguous, ``hidden_MR`` one row for each of its tokens; returns y."""
    if not _use_triton(y, fused):
        y.view(-1, y.shape[-1]).addmm_(hidden_MR, up_NR.t())
        return y
    from ._low_rank_triton import launch_add

    launch_add(y, hidden_MR, up_NR)
    return y


def _use_triton(tensor: Tensor, fused: bool | None) -> bool:
    """Tensor cores take bf16 and fp16; fp32 and fp64 products stay with the library."""
    if tensor.dtype not in (torch.bfloat16, torch.float16):
        return False
    return refusal(tensor.device, tensor.dtype) is None if fused is None else fused
