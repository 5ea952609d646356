"""Dequantise and multiply in fp32: runs everywhere, as slow as fp32, and is what the others are tested against."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels.quantize import QuantizedActivation, spread_scale
from ..capabilities import why_not
from ..core import GEMM, GemmRequest, GemmRunner


def _refuse(request: GemmRequest) -> str | None:
    return why_not("reference", request)


def multiply(x: QuantizedActivation, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """The oracle: fp32 (fp64 for fp64 outputs) products of the values that the bytes stand for, rounded once."""
    exact = torch.float64 if x.dtype == torch.float64 else torch.float32
    value = weight.to(exact) * spread_scale(weight_scale, weight.shape).to(exact)
    return F.linear(x.dequantized(exact), value, None if bias is None else bias.to(exact)).to(x.dtype)


GEMM.register("reference", priority=-10, refuse=_refuse)(GemmRunner(multiply))
