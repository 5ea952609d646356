"""Importing this package registers every block-sparse backend. Optional libraries are looked for, not imported."""

from . import flash4, masked, triton

__all__ = ["flash4", "masked", "triton"]
