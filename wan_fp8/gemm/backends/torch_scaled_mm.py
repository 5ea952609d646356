"""``torch._scaled_mm`` and ``F.scaled_mm``: cuBLAS (or CUTLASS) on plain tensors, any number of tokens.

Fast accumulation for one scale and for row scales: 1.5e-3 relative error at K = 5120, 4-17 % faster. Block scaled
products accumulate in fp32 by themselves.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels.quantize import Granularity, QuantizedActivation, cublas_tiles
from ..capabilities import why_not
from ..core import GEMM, GemmRequest, GemmRunner, padded_block_scale


def _refuse(request: GemmRequest) -> str | None:
    return why_not("torch", request)


def multiply(x: QuantizedActivation, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """[..., K] -> [..., N]; ``weight`` [N, K] row-major is the column-major operand that cuBLAS asks for.

    cuBLAS reads a weight's block scales in fours along K; Wan's widths are multiples of 512, others are padded here.
    """
    qdata = x.qdata.flatten(0, -2)
    if x.granularity is Granularity.MX:
        y = F.scaled_mm(
            qdata,
            weight.t(),
            cublas_tiles(x.scale),
            F.ScalingType.BlockWise1x32,
            cublas_tiles(weight_scale),
            F.ScalingType.BlockWise1x32,
            swizzle_a=F.SwizzleType.SWIZZLE_32_4_4,
            swizzle_b=F.SwizzleType.SWIZZLE_32_4_4,
            bias=bias,
            output_dtype=x.dtype,
        )
    elif x.granularity is Granularity.BLOCK:
        y = F.scaled_mm(
            qdata,
            weight.t(),
            x.scale.t(),
            F.ScalingType.BlockWise1x128,
            padded_block_scale(weight_scale).t(),
            F.ScalingType.BlockWise128x128,
            bias=bias,
            output_dtype=x.dtype,
        )
    else:
        y = torch._scaled_mm(
            qdata,
            weight.t(),
            scale_a=x.scale,
            scale_b=weight_scale.t() if x.granularity is Granularity.ROW else weight_scale,
            bias=bias,
            out_dtype=x.dtype,
            use_fast_accum=x.qdata.is_cuda,
        )
    return y.unflatten(0, x.shape[:-1])


GEMM.register("torch", priority=20, refuse=_refuse)(GemmRunner(multiply, multiples=((Granularity.BLOCK, 4),)))
"""Block scales lie token by token, and their rows begin at multiples of 16 bytes."""
