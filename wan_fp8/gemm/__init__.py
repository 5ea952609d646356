"""FP8 matrix products behind one registry, chosen per device and kind of scales."""

from __future__ import annotations

from .core import GEMM, GemmRequest, GemmRunner, register_backends, token_multiple

__all__ = ["GEMM", "GemmRequest", "GemmRunner", "register_backends", "token_multiple"]
