"""Attention backends behind one registry, chosen per device, dtype and shape; low-precision ones windowed and
guarded; block-sparse attention (``sparse``) around them."""

from __future__ import annotations

from .core import (
    ATTENTION,
    Attention,
    AttentionCore,
    AttentionRequest,
    Step,
    attention_cores,
    reset_guard,
    set_attention,
)
from .report import AttentionReport, attention_report, sparsity_report
from .sparse import Sparsity

__all__ = [
    "ATTENTION",
    "Attention",
    "AttentionCore",
    "AttentionReport",
    "AttentionRequest",
    "Sparsity",
    "Step",
    "attention_cores",
    "attention_report",
    "reset_guard",
    "set_attention",
    "sparsity_report",
]
