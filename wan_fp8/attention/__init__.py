"""Attention backends behind one registry, chosen per device, dtype and shape; low-precision ones windowed and
guarded."""

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
from .report import AttentionReport, attention_report

__all__ = [
    "ATTENTION",
    "Attention",
    "AttentionCore",
    "AttentionReport",
    "AttentionRequest",
    "Step",
    "attention_cores",
    "attention_report",
    "reset_guard",
    "set_attention",
]
