"""Who computes block-sparse attention: one file a backend, behind the same kind of registry as dense attention."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...hardware import DeviceCaps
from ...registry import KernelRegistry
from .order import BLOCK


@dataclass(frozen=True, slots=True)
class SparseRequest:
    """What a backend is asked to do."""

    caps: DeviceCaps
    dtype: torch.dtype
    head_dim: int
    num_queries: int
    num_keys: int


@dataclass(frozen=True, slots=True)
class Selection:
    """The key blocks that each block of queries keeps."""

    counts: Tensor
    """[B, N, Mq] int32: how many."""
    blocks: Tensor
    """[B, N, Mq, Mk] int32: which, in rising order; what stands behind the first ``counts`` means nothing."""
    num_queries: int
    num_keys: int
    query_rows: int = BLOCK
    """Tokens of a block of queries."""

    @property
    def key_blocks(self) -> int:
        """Mk."""
        return self.blocks.shape[3]

    def mask(self) -> Tensor:
        """[B, N, Mq, Mk] bool."""
        places = torch.arange(self.key_blocks, device=self.blocks.device)
        valid = places < self.counts[..., None]
        index = torch.where(valid, self.blocks.long(), self.key_blocks)
        out = torch.zeros(*self.blocks.shape[:3], self.key_blocks + 1, dtype=torch.bool, device=index.device)
        return out.scatter_(3, index, True)[..., : self.key_blocks]

    def density(self) -> Tensor:
        """[N] share of the key blocks that a head keeps, over samples and blocks of queries."""
        return self.counts.float().mean(dim=(0, 2)) / self.key_blocks

    @classmethod
    def of_mask(cls, mask_BNMM: Tensor, num_queries: int, num_keys: int, query_rows: int = BLOCK) -> Selection:
        """From [B, N, Mq, Mk] bool."""
        counts = mask_BNMM.sum(3, dtype=torch.int32)
        blocks = (~mask_BNMM).to(torch.int8).argsort(dim=3, stable=True).to(torch.int32)
        return cls(counts, blocks, num_queries, num_keys, query_rows)


SPARSE: KernelRegistry[SparseRequest] = KernelRegistry("block-sparse attention")
"""``run(q_BSNE, k_BLNE, v_BLNE, selection, sums=False) -> [B, S, N, E]``; a query whose block keeps nothing gets zeros.
With ``sums`` also [B, N, S] fp32: the logarithm of the sum of its exponentials, -inf where nothing is kept."""

Answer = Tensor | tuple[Tensor, Tensor]


def query_rows(backend: str, caps: DeviceCaps) -> int:
    """Tokens that share one choice of key blocks: FlashAttention 4 takes two tiles of queries together on Blackwell."""
    return 2 * BLOCK if backend == "fa4" and caps.capability is not None and caps.capability[0] in (10, 11) else BLOCK


def register_backends() -> None:
    """Import every backend file; done at first use."""
    from . import backends

    assert backends.__all__
