"""``torch._scaled_mm`` and ``F.scaled_mm``: cuBLAS (or CUTLASS) on plain tensors, any number of tokens.

Fast accumulation for one scale and for row scales: 1.5e-3 relative error at K = 5120, 4-17 % faster. Block scaled
products accumulate in fp32 by themselves.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels.quantize import Granularity, QuantizedActivation
from ..core import GEMM, GemmRequest, GemmRunner, padded_block_scale

_Version = tuple[int, int]


@dataclass(frozen=True, slots=True)
class _Needs:
    """What one kind of scales needs."""

    capability: _Version
    torch: _Version
    cuda: _Version
    only: _Version | None = None
    """The one compute capability that it runs on, where it is one."""


CAPABILITIES = {
    Granularity.TENSOR: _Needs((8, 9), (2, 5), (12, 1)),
    Granularity.ROW: _Needs((8, 9), (2, 6), (12, 4)),
    Granularity.BLOCK: _Needs((9, 0), (2, 10), (12, 9), only=(9, 0)),
}
"""By kind of scales. Block scales on Blackwell are emulated by Transformer Engine, and refused by cuBLAS."""


def _version(text: str | None) -> _Version:
    parts = (text or "0.0").split("+")[0].split(".")
    return int(parts[0]), int(parts[1])


def _refuse(request: GemmRequest) -> str | None:
    caps, needs = request.caps, CAPABILITIES[request.granularity]
    if not caps.is_cuda or caps.capability is None:
        return f"it needs an NVIDIA GPU; the tensors are on {caps.device.type}"
    have = ".".join(map(str, caps.capability))
    if needs.only is not None and caps.capability != needs.only:
        return f"{request.granularity} scales need compute capability {needs.only[0]}.{needs.only[1]}; this is {have}"
    if caps.capability < needs.capability:
        return f"FP8 needs compute capability {needs.capability[0]}.{needs.capability[1]}; {caps.name} has {have}"
    for what, version, least in (("torch", caps.torch_version, needs.torch), ("CUDA", caps.cuda_version, needs.cuda)):
        if _version(version) < least:
            return f"{request.granularity} scales need {what} {least[0]}.{least[1]}; this is {version}"
    if request.dtype not in (torch.bfloat16, torch.float16):
        return f"it computes bf16 and fp16, not {request.dtype}"
    return None


def multiply(x: QuantizedActivation, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """[..., K] -> [..., N]; ``weight`` [N, K] row-major is the column-major operand that cuBLAS asks for.

    cuBLAS reads a weight's block scales in fours along K; Wan's widths are multiples of 512, others are padded here.
    """
    qdata = x.qdata.flatten(0, -2)
    if x.granularity is Granularity.BLOCK:
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
