"""Attention backends behind one registry, chosen per device, dtype and shape."""

from __future__ import annotations

from .core import ATTENTION, Attention, AttentionCore, AttentionRequest, set_attention

__all__ = ["ATTENTION", "Attention", "AttentionCore", "AttentionRequest", "set_attention"]
