"""Importing this package registers every attention backend. Optional libraries are looked for, not imported, until
used.

Transformer Engine's FP8 attention is not offered: with DelayedScaling its update drives the softmax scale far past
what the kernel can hold (error
0.11 to 0.54 at 16,384 keys), with current scaling it finds no backend on Hopper, and FlashAttention 3 in FP8 is faster
than either.
"""

from . import flash2, flash3, flash4, fp8_reference, reference, sage, sdpa

__all__ = ["flash2", "flash3", "flash4", "fp8_reference", "reference", "sage", "sdpa"]
