"""What a forward needs besides the weights, so that core evicts no more than it must.

Core's own estimate scales with the number of latent pixels times a constant tuned to its own blocks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ...wan_fp8.models.specs import ModelSpec

OVERHEAD = 1.1
"""Fragmentation, rotary tables, workspaces of the GEMM library."""


def activation_bytes(spec: ModelSpec, input_shape: Sequence[int], dtype: torch.dtype) -> int:
    """Peak bytes of one forward for latents [B, C, F, H, W], conditioning channels not counted.

    At the peak of a block the float32 stream and, in the GEMMs' type, either the attention's operands (the normed
    stream, q, k, v and the output) or the FFN's (input, hidden and output) are alive; a rotary turn or a norm holds
    one float32 copy of its operand. The text keys and values of two prompts (cond and uncond) stay for the whole run.
    """
    batch = input_shape[0]
    frames, rows, columns = (
        math.ceil(size / patch) for size, patch in zip(input_shape[-3:], spec.patch_size, strict=True)
    )
    tokens = batch * frames * rows * columns
    width = torch.empty((), dtype=dtype).element_size() if dtype.is_floating_point else 2
    stream = 4 * spec.dim
    attention = 5 * spec.dim * width + 4 * spec.dim
    feed_forward = (2 * spec.dim + 2 * spec.ffn_dim) * width
    ends = 4 * (spec.in_dim + 2 * spec.out_dim) * math.prod(spec.patch_size) + 4 * spec.dim
    text = 2 * batch * spec.num_layers * 2 * 512 * spec.dim * width
    return int(OVERHEAD * tokens * (stream + max(attention, feed_forward, ends)) + text)
