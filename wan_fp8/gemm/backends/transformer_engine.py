"""Transformer Engine's casts and GEMMs on plain tensors, without a copy and without its modules.

Its storage classes are plain objects that wrap a uint8 view of our weight and our fp32 scale. Given the same bytes and
scales the result is bit-equal to ``te.Linear``. None of its global state is used: under inference mode its own
DelayedScaling would never update a scale. These names are internals of Transformer Engine: only versions on which the
GPU tests have passed are taken, and a name that is gone is a reason to refuse.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import importlib.util
import os
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import InputError
from ...hardware import has_module
from ...kernels.quantize import Cast, Granularity, QuantizedActivation
from ...libraries import hint
from ..capabilities import why_not
from ..core import GEMM, GemmRequest, GemmRunner, padded_block_scale

VERSIONS = ((2, 20), (2, 21))
"""From the first, below the second."""
_NAMES = {
    "transformer_engine_torch": ("DType", "gelu"),
    "transformer_engine.pytorch": ("Float8BlockQuantizer", "Float8CurrentScalingQuantizer", "Float8Quantizer"),
    "transformer_engine.pytorch.cpp_extensions": ("general_gemm",),
    "transformer_engine.pytorch.tensor.storage.float8_tensor_storage": ("Float8TensorStorage",),
    "transformer_engine.pytorch.tensor.storage.float8_blockwise_tensor_storage": ("Float8BlockwiseQTensorStorage",),
}
_MULTIPLES = ((Granularity.TENSOR, 16), (Granularity.BLOCK, 128))


@dataclass(frozen=True, slots=True)
class _Library:
    """What we use of Transformer Engine, by its own names."""

    DType: Any
    gelu: Any
    Float8BlockQuantizer: Any
    Float8CurrentScalingQuantizer: Any
    Float8Quantizer: Any
    general_gemm: Any
    Float8TensorStorage: Any
    Float8BlockwiseQTensorStorage: Any

    @property
    def e4m3(self) -> Any:
        return self.DType.kFloat8E4M3


@functools.cache
def probe() -> tuple[_Library | None, str]:
    """The library, or the exact reason why it cannot be used. Imports it at the first call."""
    how = f"python install.py --with transformer-engine ({hint('transformer-engine', torch.version.cuda)})"
    if not has_module("transformer_engine"):
        return None, f"Transformer Engine is not installed; install it with: {how}"
    try:
        version = metadata.version("transformer_engine")
    except metadata.PackageNotFoundError:
        return None, f"Transformer Engine has no package metadata, so that its version is unknown; reinstall it: {how}"
    low, high = VERSIONS
    if not low <= tuple(int(part) for part in version.split("+")[0].split(".")[:2]) < high:
        wanted = f"{low[0]}.{low[1]} up to, not including, {high[0]}.{high[1]}"
        return None, f"Transformer Engine {version} has not been tested with this pack (it takes {wanted}): {how}"
    # In its own order: the extension module loads its libraries through the package.
    found: dict[str, Any] = {}
    try:
        with _torch_s_cudnn():
            importlib.import_module("transformer_engine.pytorch")
        for module_name, names in _NAMES.items():
            module = importlib.import_module(module_name)
            for name in names:
                if not hasattr(module, name):
                    return (
                        None,
                        f"Transformer Engine {version} has no {module_name}.{name}; reinstall it with: {how}",
                    )
                found[name] = getattr(module, name)
    except Exception as error:  # FileNotFoundError: its compiled part is missing; RuntimeError: another CUDA
        return None, f"Transformer Engine {version} does not load ({error}); reinstall it with: {how}"
    return _Library(**found), version


@contextlib.contextmanager
def _torch_s_cudnn() -> Iterator[None]:
    """Let Transformer Engine load the cuDNN that torch came with.

    It looks in the system's folders first. With a cuDNN of another version there, whichever of the two libraries comes
    second fails: torch's convolutions ("version incompatibility"), or Transformer Engine's import.
    """
    spec = importlib.util.find_spec("nvidia.cudnn") if importlib.util.find_spec("nvidia") else None
    folders = [] if spec is None else list(spec.submodule_search_locations or [])
    if not folders or not torch.version.cuda or {"CUDNN_HOME", "CUDNN_PATH"} & os.environ.keys():
        yield
        return
    for path in sorted(Path(folders[0]).glob("lib/libcudnn*.so.*")):  # all of it: the parts ask for each other by name
        ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    os.environ["CUDNN_HOME"] = folders[0]
    try:
        yield
    finally:
        del os.environ["CUDNN_HOME"]


def _refuse(request: GemmRequest) -> str | None:
    reason = why_not("transformer_engine", request)
    if reason is not None:
        return reason
    library, reason = probe()
    return reason if library is None else None


def _library() -> _Library:
    library, reason = probe()
    assert library is not None, reason
    return library


def quantize(x: Tensor, cast: Cast, gelu: bool) -> QuantizedActivation:
    """Transformer Engine's cast of [..., K], its GELU in front where asked; the result's tensors are plain."""
    te, flat = _library(), x.contiguous().flatten(0, -2)
    assert cast.granularity is not None
    _check_rows(flat.shape[0], cast.granularity)
    if cast.granularity is Granularity.BLOCK:
        quantizer = te.Float8BlockQuantizer(
            te.e4m3, rowwise=True, columnwise=False, force_pow_2_scales=cast.power_of_2, block_scaling_dim=1
        )
    elif cast.multiplier is not None:
        # it always collects a maximum; where nobody wants it, into a cell of its own
        amax = torch.zeros_like(cast.multiplier) if cast.amax is None else cast.amax
        quantizer = te.Float8Quantizer(cast.multiplier, amax, te.e4m3, rowwise=True, columnwise=False)
    else:
        quantizer = te.Float8CurrentScalingQuantizer(te.e4m3, device=x.device, rowwise=True, columnwise=False)
    quantizer.internal = True
    stored = te.gelu(flat, quantizer) if gelu else quantizer(flat)
    if cast.granularity is Granularity.BLOCK:
        qdata, scale = stored._rowwise_data, stored._rowwise_scale_inv
    else:
        qdata, scale = stored._data, stored._scale_inv
    return QuantizedActivation(qdata.view(torch.float8_e4m3fn).view(x.shape), scale, cast.granularity, x.dtype)


def multiply(x: QuantizedActivation, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """``general_gemm`` on storage objects around the given tensors."""
    te = _library()
    qdata, stored = x.qdata.flatten(0, -2).view(torch.uint8), weight.view(torch.uint8)
    _check_rows(qdata.shape[0], x.granularity)
    if x.granularity is Granularity.BLOCK:
        left, right = (
            te.Float8BlockwiseQTensorStorage(
                data,
                scale,
                None,
                None,
                te.e4m3,
                te.Float8BlockQuantizer(te.e4m3, rowwise=True, columnwise=False, block_scaling_dim=1 + is_weight),
                bool(is_weight),
                fake_dtype=x.dtype,
            )
            for data, scale, is_weight in ((stored, padded_block_scale(weight_scale), 1), (qdata, x.scale, 0))
        )
    else:
        left, right = (
            te.Float8TensorStorage(
                data=data, fp8_scale_inv=scale.reshape(1), fp8_dtype=te.e4m3, fake_dtype=x.dtype, quantizer=None
            )
            for data, scale in ((stored, weight_scale), (qdata, x.scale))
        )
    split = x.granularity is Granularity.BLOCK
    y = te.general_gemm(left, right, out_dtype=x.dtype, bias=bias, use_split_accumulator=split)[0]
    return y.view(*x.shape[:-1], weight.shape[0])


def _check_rows(rows: int, granularity: Granularity) -> None:
    multiple = dict(_MULTIPLES)[granularity]
    if rows % multiple:
        raise InputError(
            f"Transformer Engine multiplies a number of rows divisible by {multiple}; got {rows}: pad the rows, or use "
            "backend torch"
        )


GEMM.register("transformer_engine", priority=10, refuse=_refuse)(
    GemmRunner(multiply, quantize=quantize, multiples=_MULTIPLES)
)
