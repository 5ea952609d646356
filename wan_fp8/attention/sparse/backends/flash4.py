"""FlashAttention 4's block-sparse forward (CuTe DSL, compiled at its first call in a process).

What 4.0.0b36 takes: int32 counts [B, N, Mq] and lists [B, N, Mq, up to Mk] of partly masked and of full key blocks;
``block_size`` (queries, keys), a multiple of its tiles: (128, 128) on Hopper, (256, 128) on Blackwell, where a program
has two tiles of queries. It walks a list from its end, and leaves out keys behind the sequence in the first block that
it comes to alone: a last block that is short must stand last in its list, as ``Selection`` has it. A block of queries
without keys gets zeros. Nothing in its host code waits for the GPU, and tensors that are strided by multiples of 16
bytes are not copied.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from typing import Any

import torch
from torch import Tensor

from ...backends import flash4 as dense
from ...core import AttentionRequest
from ..order import BLOCK
from ..registry import SPARSE, Answer, Selection, SparseRequest

SUMS = "return_lse"
FIELDS = {"mask_block_cnt", "mask_block_idx", "full_block_cnt", "full_block_idx", "block_size"}


@functools.cache
def _load() -> tuple[Any, str]:
    """The type that carries the blocks, or why there is none."""
    try:  # flash_attn.cute itself has been imported by now
        carrier = importlib.import_module("flash_attn.cute.block_sparsity").BlockSparseTensorsTorch
    except Exception as error:  # whatever it raises at its import, in its words
        return None, f"flash_attn.cute has no block-sparse forward ({error}); it is there in 4.0.0b36"
    function, _ = dense._load()
    assert function is not None
    lacking = FIELDS - set(carrier._fields) | {"block_sparse_tensors", SUMS} - set(
        inspect.signature(function).parameters
    )
    if lacking:
        return None, f"flash_attn.cute knows no {', '.join(sorted(lacking))} of a block-sparse forward; 4.0.0b36 does"
    return carrier, ""


def _refuse(request: SparseRequest) -> str | None:
    reason = dense._refuse(AttentionRequest(request.caps, request.dtype, request.head_dim, 1, 1))
    if reason is not None:
        return reason
    return _load()[1] or None


_nothing: dict[tuple[torch.device, tuple[int, ...]], tuple[Tensor, Tensor]] = {}
"""The list of partly masked blocks, which is empty: [B, N, Mq] counts and [B, N, Mq, 1] blocks of zeros."""


def _partly(selection: Selection) -> tuple[Tensor, Tensor]:
    key = (selection.counts.device, tuple(selection.counts.shape))
    if key not in _nothing:
        if len(_nothing) >= 4:
            _nothing.clear()
        counts = torch.zeros_like(selection.counts)
        _nothing[key] = counts, counts[..., None]
    return _nothing[key]


@SPARSE.register("fa4", priority=30, refuse=_refuse)
def fa4(q_BSNE: Tensor, k_BLNE: Tensor, v_BLNE: Tensor, selection: Selection, sums: bool = False) -> Answer:
    """90 ms at half of the blocks and 46 ms at a quarter, one H200, 75,600 tokens, 40 heads, bf16
    (``benchmarks/results/sparse_h200.json``)."""
    function, _ = dense._load()
    tensors, _ = _load()
    assert function is not None and tensors is not None
    counts, blocks = _partly(selection)
    given = tensors(
        mask_block_cnt=counts,
        mask_block_idx=blocks,
        full_block_cnt=selection.counts,
        full_block_idx=selection.blocks,
        block_size=(selection.query_rows, BLOCK),
    )
    if not sums:
        return function(q_BSNE, k_BLNE, v_BLNE, block_sparse_tensors=given)[0]
    out, lse = function(q_BSNE, k_BLNE, v_BLNE, block_sparse_tensors=given, return_lse=True)[:2]
    return out, lse
