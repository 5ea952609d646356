"""What a text encoder and a VAE need of the memory of a pool's GPUs, beside the models that they share it with: the
planner counts with it before anything is read, a rank makes as much room before it begins."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..checkpoint.encoders import load_text_encoder_state_dict
from ..models.umt5 import E4M3, is_linear, normalized_names
from ..models.vae22 import LOADERS
from .source import TextSource, VAESource
from .vae import GROUP_COPIES, TIME_STRIDE, values_of_a_frame

RESULT_COPIES = 4
"""Of a VAE's whole result on each GPU while the ranks' rows are put together."""
PROMPT_BYTES = 2**29
"""Activations of one prompt of 512 tokens through UMT5-XXL."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TextNeeds:
    """Of a text encoder, in bytes."""

    weights: int
    """On one rank, or shared by all of them."""
    gathered: int
    """Of the weights that lie whole on every rank while a prompt runs, where they are shared: the token table and two
    blocks."""

    @classmethod
    def of(cls, source: TextSource) -> TextNeeds:
        """By the header of its file, nothing else is read.

        Raises:
            CheckpointError: no usable text encoder.
        """
        stored = load_text_encoder_state_dict(source.path, torch.bfloat16, "meta").state_dict
        sizes = {}
        for name, value in normalized_names(stored).items():
            fp8 = source.dtype == E4M3 and is_linear(name.removesuffix(".weight"))
            sizes[name] = value.numel() * (1 if fp8 else 2 if source.dtype == E4M3 else source.dtype.itemsize)
        blocks = [name for name in sizes if name.startswith("encoder.block.")]
        count = len({name.split(".")[2] for name in blocks}) or 1
        table = sum(sizes.values()) - sum(sizes[name] for name in blocks)
        return cls(weights=sum(sizes.values()), gathered=table + 2 * sum(sizes[name] for name in blocks) // count)

    def resting(self, ranks: int) -> int:
        """Of each rank where ``ranks`` share the weights; of the one that has them all where it is 1."""
        return -(-self.weights // ranks)

    def working(self, ranks: int) -> int:
        """While a prompt runs, beside what is at rest."""
        return PROMPT_BYTES + (self.gathered if ranks > 1 else 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class VAENeeds:
    """Of a VAE, on every rank."""

    weights: int
    """Bytes."""
    widest: int
    """Values of the widest activation to a pixel of a frame, ``AutoEncoder.widest``."""
    stride: int
    """Pixels to a latent row or column."""
    itemsize: int
    """Bytes of a value."""

    @classmethod
    def of(cls, source: VAESource, state: Callable[[], Mapping[str, Tensor]] | None = None) -> VAENeeds:
        """By the header of its file, or of ``state`` where it has none; nothing else is read.

        Raises:
            CheckpointError: no Wan VAE of this design.
        """
        vae = LOADERS[source.version](source.path if state is None else state(), source.dtype, "meta")
        count = sum(parameter.numel() for parameter in vae.parameters())
        size = source.dtype.itemsize
        return cls(weights=count * size, widest=vae.widest, stride=vae.stride, itemsize=size)

    def working(self, frames: int, rows: int, columns: int, ranks: int) -> int:
        """While a clip of so many latent frames, rows and columns runs over ``ranks``, beside the weights: the least,
        with one latent frame at a time; more room makes it faster."""
        pixels = rows * columns * self.stride**2
        mine = self.stride * (-(-rows // ranks) if rows >= ranks else rows)
        group = values_of_a_frame(self.widest, 1, mine, self.stride * columns)
        result = 3 * (TIME_STRIDE * (frames - 1) + 1) * pixels
        return (GROUP_COPIES * group + RESULT_COPIES * result) * self.itemsize
