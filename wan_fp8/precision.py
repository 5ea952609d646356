"""TF32 for the matrix products of one forward, and for nothing else in the process."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch

Value = TypeVar("Value")


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
    older = _read(lambda: matmul.allow_tf32, newer != "tf32")  # if reading fails it is the opposite of the newer one
    medium = _read(torch.get_float32_matmul_precision, "") == "medium"  # the same as allow_tf32, but for the CPU
    matmul.allow_tf32 = tf32
    try:
        yield
    finally:
        matmul.allow_tf32 = older
        if medium:
            torch.set_float32_matmul_precision("medium")
        if newer is not None:
            matmul.fp32_precision = newer


def _read(read: Callable[[], Value], disagreeing: Value) -> Value:
    """One of the older interface's values, or ``disagreeing`` where it contradicts the newer one's."""
    try:
        return read()
    except RuntimeError:
        return disagreeing
