"""Importing this package registers every attention backend. Optional libraries are looked for, not imported, until
used.

Transformer Engine's FP8 attention is not offered: with DelayedScaling its update drives the softmax scale far past
what the kernel can hold, and with current scaling it finds no backend on Hopper.
"""

from . import flash2, flash3, flash4, fp8_reference, reference, sage, sdpa

__all__ = ["flash2", "flash3", "flash4", "fp8_reference", "reference", "sage", "sdpa"]
