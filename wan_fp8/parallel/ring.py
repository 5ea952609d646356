"""What is left of the ranks when the heads are used up: every rank keeps its queries and gathers all keys and values.

The result is attention over the whole sequence in one call, so that it is exact with every backend, the FP8 ones and
their guard included, and no partial softmax has to be merged. It sends what a ring of partial softmaxes would send, and
holds the keys and values of this rank's heads for all tokens; nothing of it is hidden behind the attention.
"""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from .exchange import gather


def whole_keys(k_BLNE: Tensor, v_BLNE: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor, int]:
    """Keys and values of the ranks of ``group``, in token order, and the bytes sent."""
    k, sent_k = gather(k_BLNE, group, 1)
    v, sent_v = gather(v_BLNE, group, 1)
    return k, v, sent_k + sent_v
