"""Softmax attention written out: runs everywhere, allocates the whole score matrix, and is what the others are tested
against."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..core import ATTENTION, AttentionRequest


def _refuse(request: AttentionRequest) -> str | None:
    del request
    return None


@ATTENTION.register("reference", priority=-10, refuse=_refuse)
def reference(q_BSNE: Tensor, k_BLNE: Tensor, v_BLNE: Tensor) -> Tensor:
    """The oracle: fp32 (fp64 for fp64 inputs) scores and softmax."""
    dtype = torch.float64 if q_BSNE.dtype == torch.float64 else torch.float32
    q, k, v = (t.to(dtype).transpose(1, 2) for t in (q_BSNE, k_BLNE, v_BLNE))
    weights = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]), dim=-1)
    return (weights @ v).transpose(1, 2).to(q_BSNE.dtype)
