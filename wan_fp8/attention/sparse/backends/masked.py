"""Block-sparse attention as dense attention under a mask: runs everywhere, builds the whole score matrix, and is what
the kernels are tested against."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..order import BLOCK
from ..registry import SPARSE, Answer, Selection, SparseRequest

LARGEST = 2**28
"""Scores of one head that a GPU may be asked to hold in fp32: 1 GiB."""


def _refuse(request: SparseRequest) -> str | None:
    if request.caps.is_cuda and request.num_queries * request.num_keys > LARGEST:
        return f"it builds the scores of {request.num_queries:,} queries with {request.num_keys:,} keys"
    return None


@SPARSE.register("masked", priority=5, refuse=_refuse)
def masked(q_BSNE: Tensor, k_BLNE: Tensor, v_BLNE: Tensor, selection: Selection, sums: bool = False) -> Answer:
    """The oracle: fp32 (fp64 for fp64 inputs) scores and softmax, head by head."""
    dtype = torch.float64 if q_BSNE.dtype == torch.float64 else torch.float32
    out = torch.empty_like(q_BSNE)
    lse = q_BSNE.new_empty(q_BSNE.shape[0], q_BSNE.shape[2], q_BSNE.shape[1], dtype=torch.float32)
    blocks = selection.mask()
    tokens, keys = q_BSNE.shape[1], k_BLNE.shape[1]
    for head in range(q_BSNE.shape[2]):
        q, k, v = (t[:, :, head].to(dtype) for t in (q_BSNE, k_BLNE, v_BLNE))
        kept = blocks[:, head].repeat_interleave(selection.query_rows, 1)[:, :tokens]
        kept = kept.repeat_interleave(BLOCK, 2)[:, :, :keys]
        scores = (q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])).masked_fill(~kept, -math.inf)
        out[:, :, head] = (torch.softmax(scores, dim=-1).nan_to_num(0.0) @ v).to(out.dtype)
        if sums:
            lse[:, head] = torch.logsumexp(scores, dim=-1).float()
    return (out, lse) if sums else out
