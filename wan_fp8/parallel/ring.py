"""What is left of the ranks when the heads are used up: every rank keeps its queries and sees all keys and values.

Gathered (``whole_keys``), they are attended to in one call: exact with every backend, the FP8 ones and their guard
included, nothing merged; it holds the keys and values of this rank's heads for all tokens, and nothing of the gather is
hidden behind the attention. Passed on (``attend_around``), each rank's keys go round the ring while the ones before are
attended to, and softmaxes over parts of the keys are merged: the same bytes, hidden, for a pass over the output more a
rank. That pays where the link is slow (between hosts). It takes a backend that hands out its softmax's denominator.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from ..attention.partial import Part, merge_
from .exchange import gather, pass_on


def whole_keys(k_BLNE: Tensor, v_BLNE: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor, int]:
    """Keys and values of the ranks of ``group``, in token order, and the bytes sent."""
    k, sent_k = gather(k_BLNE, group, 1)
    v, sent_v = gather(v_BLNE, group, 1)
    return k, v, sent_k + sent_v


def attend_around(
    attend: Callable[[Tensor, Tensor], Part], k_BLNE: Tensor, v_BLNE: Tensor, num_keys: int, group: dist.ProcessGroup
) -> tuple[Tensor, int]:
    """Attention of this rank's queries over the keys of all of ``group``, and the bytes sent.

    Args:
        attend: this rank's queries over some keys and values.
        k_BLNE, v_BLNE: this rank's, equally many on each; they lie one behind the other in rank order.
        num_keys: how many of all of them are no padding.
    """
    ranks, rank, length = group.size(), group.rank(), k_BLNE.shape[1]
    held = torch.stack([k_BLNE, v_BLNE])
    out: Tensor | None = None
    log: Tensor | None = None
    dtype, sent = k_BLNE.dtype, 0
    for turn in range(ranks):
        coming = pass_on(held, group) if turn < ranks - 1 else None
        owner = (rank - turn) % ranks
        real = min(max(num_keys - owner * length, 0), length)
        if real:
            part = attend(held[0][:, :real], held[1][:, :real])
            if out is None or log is None:
                out, log = part[0].to(torch.promote_types(dtype, torch.float32), copy=True), part[1]
            else:
                log = merge_(out, log, part)
            del part
        if coming is not None:
            held = coming()
            sent += held.numel() * held.element_size()
    assert out is not None, "the first token of a sequence is no padding"
    return out.to(dtype), sent
