"""``torch._scaled_mm`` and ``F.scaled_mm``: cuBLAS (or CUTLASS) on plain tensors, any number of tokens.

Fast accumulation for one scale and for row scales: 1.5e-3 relative error at K = 5120, 4-17 % faster. Block scaled
products accumulate in fp32 by themselves.

torch.compile traces ``torch._scaled_mm``. Of ``F.scaled_mm`` torch 2.11 breaks the graph, and later versions lower it
without the swizzle of MXFP8, so that a compiled block calls it as an operator of ours, whose inside nothing looks at.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels.quantize import E8M0, Granularity, QuantizedActivation, cublas_tiles
from ..capabilities import why_not
from ..core import GEMM, GemmRequest, GemmRunner, padded_block_scale


def _refuse(request: GemmRequest) -> str | None:
    return why_not("torch", request)


def multiply(x: QuantizedActivation, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """[..., K] -> [..., N]; ``weight`` [N, K] row-major is the column-major operand that cuBLAS asks for.

    cuBLAS reads a weight's block scales in fours along K; Wan's widths are multiples of 512, others are padded here.
    """
    qdata = x.qdata.flatten(0, -2)
    if x.granularity in (Granularity.BLOCK, Granularity.MX):
        run = torch.ops.wan_fp8.grouped_mm if torch.compiler.is_compiling() else grouped_mm
        y = run(qdata, weight, x.scale, weight_scale, bias, x.dtype)
    elif x.granularity is Granularity.ROW:
        y = _mm(qdata, weight, x.scale, weight_scale.t(), bias, x.dtype)
    else:  # [1] and (), or as a file has them; inductor asks that both have as many dimensions
        y = _mm(qdata, weight, x.scale.reshape(()), weight_scale.reshape(()), bias, x.dtype)
    return y.unflatten(0, x.shape[:-1])


def _mm(
    qdata: Tensor, weight: Tensor, scale: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    return torch._scaled_mm(
        qdata,
        weight.t(),
        scale_a=scale,
        scale_b=weight_scale,
        bias=bias,
        out_dtype=dtype,
        use_fast_accum=qdata.is_cuda,
    )


def grouped_mm(
    qdata: Tensor, weight: Tensor, scale: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """[tokens, K] x [N, K] -> [tokens, N] where groups along K share a scale: blocks of 128, or MXFP8's 32 with scales
    in E8M0. Every operand is contiguous."""
    if scale.dtype == E8M0:
        return F.scaled_mm(
            qdata,
            weight.t(),
            cublas_tiles(scale),
            F.ScalingType.BlockWise1x32,
            cublas_tiles(weight_scale),
            F.ScalingType.BlockWise1x32,
            swizzle_a=F.SwizzleType.SWIZZLE_32_4_4,
            swizzle_b=F.SwizzleType.SWIZZLE_32_4_4,
            bias=bias,
            output_dtype=dtype,
        )
    return F.scaled_mm(
        qdata,
        weight.t(),
        scale.t(),
        F.ScalingType.BlockWise1x128,
        padded_block_scale(weight_scale).t(),
        F.ScalingType.BlockWise128x128,
        bias=bias,
        output_dtype=dtype,
    )


def _grouped_mm_shape(
    qdata: Tensor, weight: Tensor, scale: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """What tracing knows of ``grouped_mm``."""
    return qdata.new_empty((qdata.shape[0], weight.shape[0]), dtype=dtype)


def _define_operator() -> torch.library.Library | None:
    """Make ``torch.ops.wan_fp8.grouped_mm``; None where another copy of this package, under another name in the same
    process, has made it: the two are alike."""
    if hasattr(torch.ops.wan_fp8, "grouped_mm"):
        return None
    library = torch.library.Library("wan_fp8", "FRAGMENT")
    library.define(
        "grouped_mm(Tensor qdata, Tensor weight, Tensor scale, Tensor weight_scale, Tensor? bias, ScalarType dtype) "
        "-> Tensor",
        tags=(torch.Tag.needs_fixed_stride_order, torch.Tag.pt2_compliant_tag),
    )
    library.impl("grouped_mm", grouped_mm, "CUDA")
    torch.library.register_fake("wan_fp8::grouped_mm", _grouped_mm_shape, lib=library)
    return library


_LIBRARY = _define_operator()
"""Kept: what it defined goes with it."""

GEMM.register("torch", priority=20, refuse=_refuse)(GemmRunner(multiply, multiples=((Granularity.BLOCK, 4),)))
"""Block scales lie token by token, and their rows begin at multiples of 16 bytes."""
