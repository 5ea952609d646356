"""FP8 weights, dequantised for each product; activations stay as they are: half the memory of bf16, none of the speed.

For GPUs without FP8 arithmetic and for the CPU, by name only. The weight's rounding is the only error.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ...kernels.quantize import dequantized_weight
from ..capabilities import why_not
from ..core import GEMM, GemmRequest, GemmRunner

WEIGHT_ONLY = "weight-only"


def _refuse(request: GemmRequest) -> str | None:
    return why_not(WEIGHT_ONLY, request)


def multiply(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """[..., K] in any floating type -> [..., N] in the same; one dequantised weight [N, K] lives at a time."""
    return F.linear(x, dequantized_weight(weight, weight_scale, x.dtype), bias)


GEMM.register(WEIGHT_ONLY, priority=-5, refuse=_refuse)(GemmRunner(multiply, takes_values=True))
