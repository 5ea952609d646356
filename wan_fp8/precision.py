"""TF32 for the matrix products of one forward, and for nothing else in the process."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def fp32_products(tf32: bool | None) -> Iterator[None]:
    """While inside, fp32 matrix products on NVIDIA GPUs run in TF32 (True), in fp32 (False), or as before (None).

    TF32 keeps 10 bits of each operand's mantissa and sums in fp32. bf16 products are not affected. torch has two
    interfaces for this, and reading the older one fails while they disagree: both are set, and both are put back.
    """
    if tf32 is None:
        yield
        return
    matmul = torch.backends.cuda.matmul
    newer = getattr(matmul, "fp32_precision", None)
    try:
        older = torch.get_float32_matmul_precision()
    except RuntimeError:  # somebody set the newer one alone: the older one holds the opposite
        older = "highest" if newer == "tf32" else "high"
    matmul.allow_tf32 = tf32
    try:
        yield
    finally:
        matmul.allow_tf32 = older != "highest"
        if older == "medium":
            torch.set_float32_matmul_precision(older)
        if newer is not None:
            matmul.fp32_precision = newer
