"""Attention over some of the keys, and the logarithm of its softmax's denominator, so that parts can be merged.

A backend can serve if its kernel hands that logarithm out; the ones that do are below. Logarithms are natural, of
``exp(q k^T / sqrt(E))``, and fp32 (fp64 for fp64 inputs).

B batch, S queries, L keys, N heads, E head width.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import InputError
from .core import Attention, AttentionCore

Part = tuple[Tensor, Tensor]
"""The output [B, S, N, E] over these keys alone, and the logarithm [B, N, S]."""


def part_of(
    core: AttentionCore, q_BSNE: Tensor, k_BLNE: Tensor, setting: Attention | None = None
) -> Callable[[Tensor, Tensor, Tensor], Part]:
    """What answers for queries and some of their keys as ``core`` would if those were all; tensors like ``q`` and
    ``k``.

    Raises:
        InputError: its backend has no such kernel, or is a low-precision one, which casts whole sequences.
    """
    setting = setting or core.setting
    name = setting.backend if setting.is_exact else ""
    if name:
        name = core.resolve(q_BSNE, k_BLNE, name).backend.name
    if name not in PARTS:
        raise InputError(
            f"attention {name or setting.backend!r} cannot be merged from parts of the keys: choose "
            f"{', '.join(PARTS)}, or ring without merge"
        )
    return PARTS[name]


def merge_(out_BSNE: Tensor, log_BNS: Tensor, part: Part) -> Tensor:
    """Add another part of the keys to ``out`` (fp32 or fp64), in place; returns the logarithm of both."""
    theirs, log = part
    weight = torch.sigmoid(log - log_BNS).transpose(1, 2)[..., None]
    out_BSNE.lerp_(theirs.to(out_BSNE.dtype), weight.to(out_BSNE.dtype))
    return torch.logaddexp(log_BNS, log)


def _reference(q_BSNE: Tensor, k_BLNE: Tensor, v_BLNE: Tensor) -> Part:
    dtype = torch.float64 if q_BSNE.dtype == torch.float64 else torch.float32
    q, k, v = (t.to(dtype).transpose(1, 2) for t in (q_BSNE, k_BLNE, v_BLNE))
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    log = torch.logsumexp(scores, dim=-1)
    out = torch.exp(scores - log[..., None]) @ v
    return out.transpose(1, 2).to(q_BSNE.dtype), log


def _sdpa(q_BSNE: Tensor, k_BLNE: Tensor, v_BLNE: Tensor) -> Part:
    """torch's kernel for the CPU, or its flash kernel on a GPU; in fp64 on a GPU, where there is none, written out."""
    if q_BSNE.device.type == "cpu":
        q, k, v = (t.transpose(1, 2) for t in (q_BSNE, k_BLNE, v_BLNE))
        out, log = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
        return out.transpose(1, 2), log
    half = q_BSNE.dtype in (torch.bfloat16, torch.float16)
    return (_flash if half else _reference)(q_BSNE, k_BLNE, v_BLNE)


def _flash(q_BSNE: Tensor, k_BLNE: Tensor, v_BLNE: Tensor) -> Part:
    q, k, v = (t.transpose(1, 2) for t in (q_BSNE, k_BLNE, v_BLNE))
    out, log = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[:2]
    return out.transpose(1, 2), log


def _cudnn(q_BSNE: Tensor, k_BLNE: Tensor, v_BLNE: Tensor) -> Part:
    q, k, v = (t.transpose(1, 2) for t in (q_BSNE, k_BLNE, v_BLNE))
    out, log = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True)[:2]
    return out.transpose(1, 2), log.reshape(q.shape[:3])


@functools.cache
def _flash3_asks() -> dict[str, bool]:
    """Some releases always return the logarithm, others where asked."""
    from .backends import flash3

    function, note = flash3._load()
    assert function is not None, note
    known = inspect.signature(function).parameters
    return {name: True for name in ("return_attn_probs", "return_softmax_lse") if name in known}


def _flash3(q_BSNE: Tensor, k_BLNE: Tensor, v_BLNE: Tensor) -> Part:
    from .backends import flash3

    function, _ = flash3._load()
    assert function is not None
    out, log = function(q_BSNE, k_BLNE, v_BLNE, **_flash3_asks())[:2]
    return out, log


PARTS: dict[str, Callable[[Tensor, Tensor, Tensor], Part]] = {
    "fa3": _flash3,
    "cudnn": _cudnn,
    "sdpa": _sdpa,
    "reference": _reference,
}
"""By the name of the backend whose kernel it is."""
