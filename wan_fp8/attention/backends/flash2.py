"""FlashAttention 2: the ``flash-attn`` package where a user has it, else the kernel of the same design that torch
carries."""

from __future__ import annotations

import functools
from collections.abc import Callable

from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ...hardware import load_entry
from ..core import ATTENTION
from .sdpa import attend, refuse_half_cuda


@functools.cache
def _package() -> tuple[Callable | None, str]:
    """flash-attn 2.x's entry and ""; or None, and why torch's kernel is used instead. FA4 installs below the same name
    and has no such entry."""
    return load_entry("flash_attn", "flash_attn_func")


def _provider() -> str:
    function, reason = _package()
    return "flash-attn" if function is not None else f"torch's own kernel: {reason}"


@ATTENTION.register("fa2", priority=15, refuse=refuse_half_cuda, provider=_provider)
def fa2(q_BSNE: Tensor, k_BLNE: Tensor, v_BLNE: Tensor) -> Tensor:
    """FlashAttention 2, from the package or from torch; node, log, receipt and doctor say from which, and why."""
    function, _ = _package()
    if function is not None:
        return function(q_BSNE, k_BLNE, v_BLNE)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return attend(q_BSNE, k_BLNE, v_BLNE)
