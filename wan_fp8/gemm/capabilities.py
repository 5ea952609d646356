"""Which backend multiplies which kind of scales on which hardware, and what of torch and CUDA it needs there: as data.

The backends' refusals and the table in ``docs/fp8.md`` are made of it. Sources: Transformer Engine 2.20 (its support
checks), PyTorch's ``aten/src/ATen/native/cuda/ScaledBlas.cpp`` and ``RowwiseScaledMM.cu``. Of the NVIDIA columns only
9.0 has been in front of us.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import torch

from ..hardware import DeviceCaps
from ..kernels.quantize import Granularity
from .core import GemmRequest

Version = tuple[int, int]


class Hardware(StrEnum):
    """Devices that differ in what they multiply."""

    OLDER = "before 8.9"
    """NVIDIA GPUs without FP8 arithmetic: Ampere (8.0, 8.6) and before."""
    ADA = "8.9"
    HOPPER = "9.0"
    BLACKWELL = "10.0, 10.3"
    """B200, B300 and their relatives."""
    BLACKWELL_12 = "12.0"
    """GeForce RTX 50, RTX PRO, and what comes after 10.x."""
    ROCM = "ROCm"
    MPS = "MPS"
    CPU = "CPU"
    OTHER = "other"


def hardware_of(caps: DeviceCaps) -> Hardware:
    """The column of the table that a device stands in."""
    if caps.is_cuda and caps.capability is not None:
        if caps.capability < (8, 9):
            return Hardware.OLDER
        exact = {(8, 9): Hardware.ADA, (9, 0): Hardware.HOPPER}.get(caps.capability)
        return exact or (Hardware.BLACKWELL if caps.capability < (11, 0) else Hardware.BLACKWELL_12)
    if caps.device.type == "cuda":
        return Hardware.ROCM  # AMD GPUs answer to that name, without a CUDA version
    return {"cpu": Hardware.CPU, "mps": Hardware.MPS}.get(caps.device.type, Hardware.OTHER)


@dataclass(frozen=True, slots=True)
class Needs:
    """It runs there, with at least these."""

    least_torch: Version | None = None
    least_cuda: Version | None = None
    dtypes: tuple[torch.dtype, ...] | None = (torch.bfloat16, torch.float16)
    """Types of the result; None: every floating type."""

    def __str__(self) -> str:
        parts = [
            f"{what} {v[0]}.{v[1]}"
            for what, v in (("torch", self.least_torch), ("CUDA", self.least_cuda))
            if v is not None
        ]
        return ", ".join(parts) or "yes"


Cell = Needs | str
"""What it needs, or why it cannot (``{name}``, ``{have}`` and ``{device}`` are the GPU's name, its compute capability
and where the tensors are)."""
Row = dict[Hardware, Cell]

_BF16 = (torch.bfloat16,)
_NO_FP8 = "FP8 needs compute capability 8.9; {name} has {have}: backend weight-only keeps the memory of FP8"
_NO_NVIDIA = "it needs an NVIDIA GPU; the tensors are on {device}"
_NO_ROCM = "it needs an NVIDIA GPU; {name} is an AMD GPU"


def _nvidia(ada: Cell, hopper: Cell, blackwell: Cell, blackwell_12: Cell) -> Row:
    return {
        Hardware.OLDER: _NO_FP8,
        Hardware.ADA: ada,
        Hardware.HOPPER: hopper,
        Hardware.BLACKWELL: blackwell,
        Hardware.BLACKWELL_12: blackwell_12,
        Hardware.ROCM: _NO_ROCM,
        **dict.fromkeys((Hardware.MPS, Hardware.CPU, Hardware.OTHER), _NO_NVIDIA),
    }


def _everywhere(cell: Cell) -> Row:
    return dict.fromkeys(Hardware, cell)


_ANYWHERE: Row = {
    **_everywhere(Needs(dtypes=None)),
    Hardware.MPS: "torch has no FP8 type on MPS: load an fp16 or bf16 checkpoint without a recipe",
}
_HOPPER_BLOCKS = (
    "block scales need compute capability 9.0; this is {have}: use recipe MXFP8BlockScaling on 10.x, rowwise elsewhere"
)
_EMULATED = (
    "Transformer Engine emulates block scales in MXFP8 there, which takes powers of two only: use recipe "
    "MXFP8BlockScaling on 10.x, rowwise elsewhere"
)
_MX_ONLY = "MXFP8 needs compute capability 10.0 or 10.3; {name} has {have}: use recipe rowwise"

CAPABILITIES: dict[tuple[str, Granularity], Row] = {
    ("torch", Granularity.TENSOR): _nvidia(
        ada=Needs((2, 5), (12, 1)),
        hopper=Needs((2, 5), (12, 1)),
        blackwell=Needs((2, 7), (12, 8)),
        blackwell_12=Needs((2, 7), (12, 8)),
    ),
    # cuBLAS takes row scales on 9.0 alone, from CUDA 12.9; else CUTLASS, which long gave bf16 only
    ("torch", Granularity.ROW): _nvidia(
        ada=Needs((2, 7), (12, 4), _BF16),
        hopper=Needs((2, 6), (12, 4)),
        blackwell=Needs((2, 9), (12, 8), _BF16),
        blackwell_12=Needs((2, 9), (12, 8), _BF16),
    ),
    ("torch", Granularity.BLOCK): _nvidia(
        ada=_HOPPER_BLOCKS, hopper=Needs((2, 10), (12, 9)), blackwell=_HOPPER_BLOCKS, blackwell_12=_HOPPER_BLOCKS
    ),
    ("torch", Granularity.MX): _nvidia(
        ada=_MX_ONLY, hopper=_MX_ONLY, blackwell=Needs((2, 10), (12, 8)), blackwell_12=_MX_ONLY
    ),
    ("transformer_engine", Granularity.TENSOR): _nvidia(
        ada=Needs((2, 1), (12, 1), _BF16),
        hopper=Needs((2, 1), (12, 1), _BF16),
        blackwell=Needs((2, 7), (12, 8), _BF16),
        blackwell_12=Needs((2, 7), (12, 8), _BF16),
    ),
    ("transformer_engine", Granularity.ROW): _everywhere("Transformer Engine has no row scales; use backend torch"),
    ("transformer_engine", Granularity.BLOCK): _nvidia(
        ada="its block scales need compute capability 9.0; {name} has {have}",
        hopper=Needs((2, 1), (12, 9), _BF16),
        blackwell=_EMULATED,
        blackwell_12=_EMULATED,
    ),
    ("transformer_engine", Granularity.MX): _everywhere(
        "Transformer Engine is not called for MXFP8 in this version; use backend torch"
    ),
    **{(backend, kind): _ANYWHERE for backend in ("weight-only", "reference") for kind in Granularity},
}


def why_not(backend: str, request: GemmRequest) -> str | None:
    """Why ``backend`` cannot serve ``request`` on this hardware, torch and CUDA; None when it can."""
    caps = request.caps
    cell = CAPABILITIES[backend, request.granularity][hardware_of(caps)]
    if isinstance(cell, str):
        have = ".".join(map(str, caps.capability or ()))
        return cell.format(name=caps.name, have=have, device=caps.device.type)
    for what, found, least in (
        ("torch", caps.torch_version, cell.least_torch),
        ("CUDA", caps.cuda_version, cell.least_cuda),
    ):
        if least is not None and _version(found) < least:
            return f"{request.granularity} scales need {what} {least[0]}.{least[1]} there; this is {found}"
    dtypes = cell.dtypes
    if backend == "torch" and request.granularity is Granularity.ROW and _version(caps.cuda_version) < (12, 9):
        dtypes = _BF16  # CUTLASS on every GPU
    if dtypes is not None and request.dtype not in dtypes:
        names = " and ".join({torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype] for dtype in dtypes)
        return f"it computes {names} there, not {request.dtype}"
    return None


def _version(text: str | None) -> Version:
    parts = (text or "0.0").split("+")[0].split(".")
    return int(parts[0]), int(parts[1])
