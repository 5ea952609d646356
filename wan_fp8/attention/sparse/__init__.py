"""Block-sparse self-attention with a run-time guarantee.

``order`` puts tokens where 128 neighbours in the sequence are neighbours in space and time; ``policies`` score key
blocks for each block of queries; ``selection`` keeps some of them, on the device; ``backends`` attend; ``guarantee``
measures on samples what was lost and moves what each head keeps; ``report`` says what came of a run.
"""

from __future__ import annotations

from .calibration import Calibration
from .order import BLOCK, BlockLayout, TokenOrder, token_order
from .registry import SPARSE, Selection, SparseRequest
from .setting import POLICIES, Sparsity, presets

__all__ = [
    "BLOCK",
    "POLICIES",
    "SPARSE",
    "BlockLayout",
    "Calibration",
    "Selection",
    "SparseRequest",
    "Sparsity",
    "TokenOrder",
    "presets",
    "token_order",
]
