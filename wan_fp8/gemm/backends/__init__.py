"""Importing this package registers every FP8 GEMM backend; Transformer Engine is imported at its first use."""

from . import reference, torch_scaled_mm, transformer_engine, weight_only

__all__ = ["reference", "torch_scaled_mm", "transformer_engine", "weight_only"]
