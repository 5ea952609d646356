"""Random values that keep a network's signals near unit size, so that samples stay finite and videos are not
constant."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping

import torch
from torch import Tensor

from . import text

BIAS_STD = 0.02


def random_weights(
    shapes: Mapping[str, tuple[int, ...]], *, seed: int, part: str, dtype: torch.dtype
) -> dict[str, Tensor]:
    """A tensor per shape: gains of norms 1, biases small, the rest normal with variance 1 / fan-in.

    Args:
        shapes: By name; the name decides what a tensor is.
        seed: Of the checkpoint.
        part: Names the component, so that experts differ; every tensor has a stream of its own and does not depend on
        the others.
        dtype: Of the result; values are drawn in float32.
    """
    return {name: _draw(name, shape, seed, part).to(dtype) for name, shape in shapes.items()}


def _draw(name: str, shape: tuple[int, ...], seed: int, part: str) -> Tensor:
    if name.endswith(("gamma", "weight_g", "audio_encoder.weights")) or (len(shape) == 1 and name.endswith("weight")):
        return torch.ones(shape)
    # The generator uses 32 bits of its seed, so everything that tells streams apart goes through a hash of that size.
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{part}/{name}".encode()))
    return torch.randn(shape, generator=generator) * _std(name, shape)


def _std(name: str, shape: tuple[int, ...]) -> float:
    if name.endswith("bias"):
        return BIAS_STD
    if name.endswith("modulation"):
        return shape[-1] ** -0.5
    if name.endswith("embedding.weight") and len(shape) == 2:  # tables of rows, not matrices
        return 1.0
    if name.startswith("motion_encoder."):  # scaled in the forward
        return 1.0
    fan_in = math.prod(shape[1:])
    if name.endswith("attn.q.weight") and len(shape) == 2 and shape[0] == text.HEADS * text.HEAD_DIM:
        return (fan_in * text.HEAD_DIM) ** -0.5  # UMT5's attention has no 1/sqrt(E) of its own
    return fan_in**-0.5
