"""The Triton side of ``quantize``, and the end that other fused kernels share with it; imported only when it runs."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import quantize as reference
from .quantize import Cast, Granularity, QuantizedActivation

MODES = {None: 0, Granularity.ROW: 1, Granularity.TENSOR: 2, Granularity.BLOCK: 3}
"""Store in high precision; cast with a scale a row, one for the tensor, one for 128 channels."""
NO_STORE = 4

_MAX = tl.constexpr(448.0)
_TINY = tl.constexpr(1e-12)
_GROUP = tl.constexpr(128)


@triton.jit
def to_e4m3(scaled):
    """Clamped first: a cast does not saturate everywhere. NaN stays NaN, so that it is seen."""
    return tl.clamp(scaled, -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL).to(tl.float8e4nv)


@triton.jit
def store_row(
    values, inside, offset, token, rows, dim, out_ptr, scale_ptr, multiplier_ptr, amax_ptr,
    MODE: tl.constexpr, POWER_OF_2: tl.constexpr, COLLECT: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Store one row of fp32 ``values`` (zero outside) as ``MODE`` says, and its largest magnitude where asked."""
    if MODE == 0:
        stored = values.to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + offset, stored, mask=inside)
        values = stored.to(tl.float32)
    if COLLECT or MODE == 1:
        largest = tl.max(tl.abs(values), axis=0)
        if COLLECT:
            tl.store(amax_ptr + token, largest)
        if MODE == 1:
            largest = tl.maximum(largest, _TINY)
            tl.store(scale_ptr + token, largest / _MAX)
            tl.store(out_ptr + offset, to_e4m3(values * (_MAX / largest)), mask=inside)
    if MODE == 2:
        tl.store(out_ptr + offset, to_e4m3(values * tl.load(multiplier_ptr)), mask=inside)
    if MODE == 3:
        groups = tl.reshape(values, (WIDTH // _GROUP, _GROUP))
        multiplier = _MAX / tl.maximum(tl.max(tl.abs(groups), axis=1), _TINY)
        if POWER_OF_2:  # keep the exponent, drop the mantissa
            multiplier = (multiplier.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
        group = tl.arange(0, WIDTH // _GROUP)
        place = scale_ptr + group.to(tl.int64) * rows + token
        tl.store(place, 1.0 / multiplier, mask=group * _GROUP < dim)
        scaled = tl.reshape(groups * multiplier[:, None], (WIDTH,))
        tl.store(out_ptr + offset, to_e4m3(scaled), mask=inside)


@triton.jit
def gelu_tanh(x):
    """0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))), written with a sigmoid."""
    return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))


@triton.jit
def quantize_kernel(
    x_ptr, out_ptr, scale_ptr, multiplier_ptr, amax_ptr, rows, dim,
    GELU: tl.constexpr, MODE: tl.constexpr, POWER_OF_2: tl.constexpr, COLLECT: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """One row per program."""
    token = tl.program_id(0)
    columns = tl.arange(0, WIDTH)
    inside = columns < dim
    offset = token.to(tl.int64) * dim + columns
    x = tl.load(x_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    if GELU:
        x = gelu_tanh(x)
    store_row(
        x, inside, offset, token, rows, dim, out_ptr, scale_ptr, multiplier_ptr, amax_ptr,
        MODE, POWER_OF_2, COLLECT, WIDTH,
    )  # fmt: skip


def outputs(x: Tensor, cast: Cast | None, dtype: torch.dtype) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Room for what ``store_row`` writes for tensors shaped like ``x``: values, scales, maxima of rows."""
    rows, dim = x.numel() // x.shape[-1], x.shape[-1]
    granularity = None if cast is None else cast.granularity
    out = torch.empty(x.shape, dtype=dtype if granularity is None else reference.E4M3, device=x.device)
    shape = {Granularity.ROW: (rows, 1), Granularity.BLOCK: (dim // reference.BLOCK, rows)}.get(granularity)  # type: ignore[arg-type]
    scale = None if shape is None else torch.empty(shape, dtype=torch.float32, device=x.device)
    collect = cast is not None and cast.amax is not None
    return out, scale, torch.empty(rows, dtype=torch.float32, device=x.device) if collect else None


def finish(
    out: Tensor, scale: Tensor | None, row_amax: Tensor | None, cast: Cast | None, dtype: torch.dtype
) -> Tensor | QuantizedActivation:
    """Put together what ``store_row`` wrote."""
    if cast is None:
        return out
    if row_amax is not None:
        assert cast.amax is not None
        largest = reference.counted(row_amax, cast.padding, out.shape[-2]).amax().reshape(1)
        torch.maximum(cast.amax, largest, out=cast.amax)
    if cast.granularity is None:
        return out
    scale = cast.dequant if scale is None else scale
    assert scale is not None
    return QuantizedActivation(out, scale, cast.granularity, dtype)


def launch_shape(dim: int) -> dict[str, int]:
    """Width of a program and its warps."""
    width = triton.next_power_of_2(dim)
    return {"WIDTH": width, "num_warps": min(16, max(1, width // 1024))}


def launch_quantize(x: Tensor, cast: Cast, gelu: bool) -> QuantizedActivation:
    """See ``quantize.quantize``."""
    x = x.contiguous()
    out, scale, row_amax = outputs(x, cast, x.dtype)
    rows, dim = x.numel() // x.shape[-1], x.shape[-1]
    quantize_kernel[(rows,)](
        x, out, scale, cast.multiplier, row_amax, rows, dim,
        GELU=gelu, MODE=MODES[cast.granularity], POWER_OF_2=cast.power_of_2, COLLECT=row_amax is not None,
        **launch_shape(dim),
    )  # fmt: skip
    result = finish(out, scale, row_amax, cast, x.dtype)
    assert isinstance(result, QuantizedActivation)
    return result


def launch_amax(x: Tensor, gelu: bool, padding: tuple[int, int] | None) -> Tensor:
    """See ``quantize.collect_amax``."""
    x = x.contiguous()
    rows, dim = x.numel() // x.shape[-1], x.shape[-1]
    row_amax = torch.empty(rows, dtype=torch.float32, device=x.device)
    quantize_kernel[(rows,)](
        x, None, None, None, row_amax, rows, dim,
        GELU=gelu, MODE=NO_STORE, POWER_OF_2=False, COLLECT=True, **launch_shape(dim),
    )  # fmt: skip
    return reference.counted(row_amax, padding, x.shape[-2]).amax().reshape(1)
