#!/usr/bin/env python3
"""Shows what this machine has for Wan FP8 and what would make it faster. It installs nothing and changes nothing.

ComfyUI Manager runs it after installing the pack; run it by hand, with ComfyUI's own Python, whenever you like.
Standard library only; PyTorch is asked when it is there.
"""

from __future__ import annotations

import importlib.util
import platform
import sys
from importlib import metadata

HOPPER = (9, 0)
ADA = (8, 9)

Row = tuple[str, str, str]
"""What, what was found, and what to do about it (empty: nothing)."""


def version(package: str) -> str | None:
    """Version of an installed distribution, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def machine_rows() -> tuple[list[Row], tuple[int, int] | None]:
    """Python, PyTorch and the GPUs; and the lowest compute capability of those GPUs, None without an NVIDIA GPU."""
    advice = "" if sys.version_info >= (3, 11) else "the pack needs Python 3.11 or later"
    rows: list[Row] = [("Python", platform.python_version(), advice)]
    if importlib.util.find_spec("torch") is None:
        return [*rows, ("PyTorch", "not found", "run this with the Python that runs ComfyUI")], None
    import torch

    cuda = torch.version.cuda
    rows.append(("PyTorch", f"{torch.__version__}, CUDA {cuda}" if cuda else f"{torch.__version__}, no CUDA", ""))
    if not cuda or not torch.cuda.is_available():
        return [*rows, ("GPU", "none that PyTorch can use", "without one, only tiny models finish")], None
    lowest = None
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        capability = (gpu.major, gpu.minor)
        note = "" if capability >= ADA else "no FP8 arithmetic: it computes in bf16"
        rows.append(
            (f"GPU {index}", f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, sm_{gpu.major}{gpu.minor}", note)
        )
        lowest = capability if lowest is None else min(lowest, capability)
    return rows, lowest


def library_rows(capability: tuple[int, int] | None) -> list[Row]:
    """The optional libraries that carry speed, with the command for those that would help on this GPU."""
    fa3 = version("fa3-fwd") or version("flash-attn-3")
    engine = version("transformer-engine")
    triton = version("triton")
    fa3_advice = "pip install --no-deps fa3-fwd" if capability == HOPPER and not fa3 else ""
    engine_advice = ""
    if capability is not None and capability >= ADA and not engine:
        engine_advice = "pip install --no-build-isolation transformer-engine[pytorch]"
    triton_advice = "comes with PyTorch for CUDA on Linux" if capability is not None and not triton else ""
    return [
        ("FlashAttention 3", fa3 or "not installed", fa3_advice),
        ("Transformer Engine", engine or "not installed", engine_advice),
        ("Triton", triton or "not installed", triton_advice),
        ("ftfy", version("ftfy") or "not installed", "" if version("ftfy") else "pip install -r requirements.txt"),
    ]


def table(rows: list[Row]) -> str:
    """The rows in aligned columns."""
    rows = [("", "found", "what would help"), *rows]
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    return "\n".join(f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c}".rstrip() for a, b, c in rows)


def main() -> None:
    rows, capability = machine_rows()
    print("Wan FP8 on this machine (nothing is installed or changed by this)")
    print(table([*rows, *library_rows(capability)]))


if __name__ == "__main__":
    main()
