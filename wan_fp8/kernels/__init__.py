"""Fused elementwise kernels: one Triton file each, its eager reference beside it.

``select(setting, tensor)`` says which of the two runs for a device and type, and why; nothing falls back by itself.
Importing this package does not import Triton.
"""

from __future__ import annotations

import functools
import os

import torch
from torch import Tensor

from ..errors import BackendUnavailableError, InputError
from ..hardware import has_module, load_entry

SETTINGS = ("auto", "triton", "eager")
_TYPES = (torch.bfloat16, torch.float16, torch.float32)


def refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the Triton kernels cannot run on tensors like these; None when they can."""
    if not has_module("triton"):
        return "Triton is not installed (it comes with torch for CUDA on Linux)"
    if device.type != "cuda" and not _interpreted():
        return f"Triton kernels need a GPU; the tensors are on {device.type}"
    if _triton_fault() is not None:
        return _triton_fault()
    if dtype not in _TYPES:
        return f"the fused kernels take bf16, fp16 and fp32, not {dtype}"
    return None


@functools.cache
def _triton_fault() -> str | None:
    """What importing Triton, which a GPU is about to do anyway, ends in; None: well."""
    return load_entry("triton", "jit")[1] or None


@functools.cache
def _interpreted() -> bool:
    """True under Triton's own CPU interpreter, in which the tests run the kernels."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def select(setting: str, device: torch.device, dtype: torch.dtype) -> bool:
    """True if the Triton kernels are to run.

    Raises:
        InputError: unknown setting.
        BackendUnavailableError: ``triton`` was asked for and cannot run.
    """
    if setting not in SETTINGS:
        raise InputError(f"fused kernels: {setting!r} is not one of {', '.join(SETTINGS)}")
    if setting == "eager":
        return False
    reason = refusal(device, dtype)
    if reason is not None and setting == "triton":
        raise BackendUnavailableError(f"fused kernels cannot run here: {reason}")
    return reason is None


def accumulate_dtype(x: Tensor) -> torch.dtype:
    """fp32 for every storage type up to fp32; fp64 stays fp64, so that a float64 model is an oracle."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
