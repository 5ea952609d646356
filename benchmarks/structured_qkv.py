"""Queries, keys and values whose attention has a known structure, for checks of block-sparse attention.

Positions enter through random Fourier features of a Gaussian kernel: q k / sqrt(E) is ``PEAK`` times the kernel of the
two tokens' distance, plus noise. A head is one of

    local     neighbours in space and time
    strided   the same place in every frame
    sink      the first 64 tokens of the sequence, and a little of everything
    diffuse   everything, nearly alike

B batch, S tokens, N heads, E head width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

KINDS = ("local", "strided", "sink", "diffuse")
PEAK = {"local": 14.0, "strided": 14.0, "sink": 9.0, "diffuse": 0.5}
REACH = {"local": (1.5, 2.5, 2.5), "strided": (1e6, 1.5, 1.5)}
"""Standard deviation of the kernel in frames, rows and columns."""
SINK = 64


def structured_qkv(
    places_S3: Tensor,
    kinds: Sequence[str],
    width: int,
    *,
    batch: int = 1,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    mean: float = 0.3,
) -> tuple[Tensor, Tensor, Tensor]:
    """[B, S, N, E] each, on the device of ``places_S3``: frame, row and column of each token in sequence order; a head
    for each of ``kinds``. All keys share a mean of ``mean``, as real ones do."""
    device, tokens = places_S3.device, places_S3.shape[0]
    generator = torch.Generator(device).manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, generator=generator)

    shape = (batch, tokens, len(kinds), width)
    q, k, v = (torch.empty(shape, dtype=dtype, device=device) for _ in range(3))
    for head, kind in enumerate(kinds):
        if kind in REACH:
            reach = torch.tensor(REACH[kind], device=device)
            angles = places_S3.float() @ (randn(width // 2, 3) / reach).T
            features = torch.cat([angles.cos(), angles.sin()], dim=1) / math.sqrt(width // 2)
        else:
            features = randn(tokens, width) / math.sqrt(width)
            if kind == "sink":
                towards = torch.nn.functional.normalize(randn(width), dim=0)
                features -= (features @ towards)[:, None] * towards
                sink = torch.arange(tokens, device=device) < SINK
                features = torch.where(sink[:, None], towards, features)
        strength = math.sqrt(PEAK[kind] * math.sqrt(width))
        for sample in range(batch):
            noise = randn(2, tokens, width) * 0.05 / math.sqrt(width)
            asked = towards.expand(tokens, -1) if kind == "sink" else features
            q[sample, :, head] = ((asked + noise[0]) * strength).to(dtype)
            k[sample, :, head] = ((features + noise[1]) * strength + mean).to(dtype)
            smooth = (places_S3.float() @ (randn(3, width) / 15)).sin()
            v[sample, :, head] = (smooth + 0.5 * randn(tokens, width)).to(dtype)
    return q, k, v
