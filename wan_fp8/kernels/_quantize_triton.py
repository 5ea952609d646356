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
NARROWEST = 128
"""Values that a part of a row holds at least: block scales are made of 128."""

_MAX = tl.constexpr(448.0)
_TINY = tl.constexpr(1e-12)
_GROUP = tl.constexpr(128)


@triton.jit
def to_e4m3(scaled):
    """Clamped first: a cast does not saturate everywhere. NaN stays NaN, so that it is seen."""
    return tl.clamp(scaled, -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL).to(tl.float8e4nv)


@triton.jit
def largest_of(values, out_ptr, MODE: tl.constexpr):
    """Largest magnitude of fp32 ``values`` (zero outside), as they will be stored where they stay in high precision."""
    if MODE == 0:
        values = values.to(out_ptr.dtype.element_ty).to(tl.float32)
    return tl.max(tl.abs(values), axis=0)


@triton.jit
def row_multiplier(largest, token, scale_ptr, multiplier_ptr, amax_ptr, MODE: tl.constexpr, COLLECT: tl.constexpr):
    """What the values of one row are multiplied by before a cast; stores the row's scale and its maximum."""
    multiplier = 1.0
    if COLLECT:
        tl.store(amax_ptr + token, largest)
    if MODE == 1:
        largest = tl.maximum(largest, _TINY)
        tl.store(scale_ptr + token, largest / _MAX)
        multiplier = _MAX / largest
    if MODE == 2:
        multiplier = tl.load(multiplier_ptr)
    return multiplier


@triton.jit
def store_part(
    values, multiplier, inside, offset, token, rows, first, dim, out_ptr, scale_ptr,
    MODE: tl.constexpr, POWER_OF_2: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Store ``WIDTH`` neighbouring values of a row, from column ``first`` on, as ``MODE`` says."""
    if MODE == 0:
        tl.store(out_ptr + offset, values.to(out_ptr.dtype.element_ty), mask=inside)
    if MODE == 1 or MODE == 2:
        tl.store(out_ptr + offset, to_e4m3(values * multiplier), mask=inside)
    if MODE == 3:
        groups = tl.reshape(values, (WIDTH // _GROUP, _GROUP))
        of_group = _MAX / tl.maximum(tl.max(tl.abs(groups), axis=1), _TINY)
        if POWER_OF_2:  # keep the exponent, drop the mantissa
            of_group = (of_group.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
        group = first // _GROUP + tl.arange(0, WIDTH // _GROUP)
        tl.store(scale_ptr + group.to(tl.int64) * rows + token, 1.0 / of_group, mask=group * _GROUP < dim)
        scaled = tl.reshape(groups * of_group[:, None], (WIDTH,))
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
    largest = largest_of(x, out_ptr, MODE) if COLLECT or MODE == 1 else 0.0
    multiplier = row_multiplier(largest, token, scale_ptr, multiplier_ptr, amax_ptr, MODE, COLLECT)
    store_part(
        x, multiplier, inside, offset, token, rows, 0, dim, out_ptr, scale_ptr, MODE, POWER_OF_2, WIDTH
    )  # fmt: skip


def outputs(x: Tensor, cast: Cast | None, dtype: torch.dtype) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Room for what a row's stores write for tensors shaped like ``x``: values, scales, maxima of rows."""
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
    """Put together what they wrote."""
    if cast is None:
        return out
    if row_amax is not None:
        assert cast.amax is not None
        counted = reference.counted(row_amax, cast.padding, out.shape[-2])
        torch.maximum(cast.amax, reference.largest(counted), out=cast.amax)
    if cast.granularity is None:
        return out
    scale = cast.dequant if scale is None else scale
    assert scale is not None
    return QuantizedActivation(out, scale, cast.granularity, dtype)


def launch_shape(dim: int) -> dict[str, int]:
    """Width of a program and its warps: the fastest on an H100 at widths of 5,120 (4 warps) and 13,824 (16)."""
    width = 1
    while width < dim:  # by comparison: torch.compile may hold ``dim`` as a symbol, and a launch takes numbers
        width *= 2
    return {"WIDTH": width, "num_warps": 16 if width > 8192 else max(1, width // 2048)}


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
    return reference.largest(reference.counted(row_amax, padding, x.shape[-2]))
