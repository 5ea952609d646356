"""Text encoder and VAE in a pool, seen from the caller: what ``serving_parts`` answers.

The VAE runs on all ranks, each with some rows of every frame; the text encoder on rank 0, or sharded over all. Workers
read both from their files. Latents, pixels and rows cross once, through the memory that both ends map where they are on
one host.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ..errors import InputError
from ..models.vae22 import DESIGNS
from . import plain, pools
from .source import TextSource, VAESource
from .vae import TIME_STRIDE

log = logging.getLogger("wan_fp8")

PART_BYTES = 2**29
MAX_PART = 500
"""Weights that are handed over in one message."""
MAX_CHARACTERS = 2**20
"""Of a prompt; the model reads 512 tokens of it."""


class _Part:
    """Something beside the transformer that lives in a pool."""

    def __init__(self, pool: pools.PoolSpec) -> None:
        self.pool_spec = pool
        self.poll: Callable[[], None] = _nothing
        self.say: Callable[[str], None] = log.info

    def pool(self) -> pools.Pool:
        """The pool, started if need be."""
        pool = pools.ensure(self.pool_spec, user=self, poll=self.poll)
        pool.connection.notice = self.say
        return pool


class RemoteVAE(_Part):
    """``AutoEncoder.encode`` and ``decode`` by the ranks of a pool, one clip at a time."""

    def __init__(
        self, source: VAESource, pool: pools.PoolSpec, state: Callable[[], Mapping[str, Tensor]] | None = None
    ) -> None:
        """``state``: the weights of a source without a file, under official names."""
        super().__init__(pool)
        self.design = DESIGNS[source.version]
        self.source = replace(source, handed=uuid.uuid4().hex) if state is not None else source
        self.state = state

    def encode(self, video_BCTHW: Tensor) -> Tensor:
        """[B, 3, T, H, W] in -1..1 -> the latents' mean [B, C, F, H/S, W/S], H and W multiples of S, which is 8, and 16
        in the Wan2.2 VAE; frames after the last 4n + 1 are not read, as in published code.

        Raises:
            InputError: another shape.
            PoolError: the pool could not start, or was lost.
        """
        shape, stride = tuple(video_BCTHW.shape), self.design.stride
        if len(shape) != 5 or shape[1] != 3 or 0 in shape or shape[3] % stride or shape[4] % stride:
            raise InputError(
                f"the Wan{self.design.version} VAE encodes [clips, 3, frames, rows, columns], both multiples of "
                f"{stride}; got {shape}"
            )
        return self._each("encode", video_BCTHW[:, :, : (shape[2] - 1) // TIME_STRIDE * TIME_STRIDE + 1])

    def decode(self, latents_BCFHW: Tensor) -> Tensor:
        """Latents that are not normalised, [B, C, F, H, W] -> [B, 3, T, SH, SW], not clamped.

        Raises:
            InputError: another shape.
            PoolError: the pool could not start, or was lost.
        """
        shape = tuple(latents_BCFHW.shape)
        if len(shape) != 5 or shape[1] != self.design.channels or 0 in shape:
            raise InputError(
                f"the Wan{self.design.version} VAE decodes [clips, {self.design.channels}, frames, rows, columns]; got "
                f"{shape}: latents of TI2V-5B (48 channels) take the Wan2.2 VAE, others (16) the Wan2.1 VAE"
            )
        return self._each("decode", latents_BCFHW)

    def _each(self, what: str, clips: Tensor) -> Tensor:
        """Clip by clip: memory does not grow with their number, and a cancelled prompt ends between two."""
        pool = self.pool()
        if self.state is not None:
            self._hand_over(pool, self.state)
        fields = {"source": plain.to_plain(self.source), "do": what}
        made = [pool.connection.request("vae", fields, {"x": clip[None]}, poll=self.poll)[1]["y"] for clip in clips]
        return made[0] if len(made) == 1 else torch.cat(made)

    def _hand_over(self, pool: pools.Pool, state: Callable[[], Mapping[str, Tensor]]) -> None:
        """Send weights that no file has, unless the pool has them."""
        found, _ = pool.connection.request("holds", {"source": plain.to_plain(self.source)}, poll=self.poll)
        if not found[0]["holds"]:
            hand_over(pool, state(), self.source.label, self.say, self.poll)


class RemoteTextEncoder(_Part):
    """``TextEncoder.encode_prompt`` on rank 0 of a pool, or on all of its ranks."""

    def __init__(self, source: TextSource, pool: pools.PoolSpec, *, sharded: bool = False) -> None:
        """``sharded``: every rank holds a part of each block's weights, and gathers a block's while it runs; otherwise
        rank 0 has them all."""
        super().__init__(pool)
        self.source, self.sharded = source, sharded

    def encode_prompt(self, text: str) -> tuple[Tensor, int]:
        """Rows of one prompt's tokens, [n, width] on the CPU, and how many tokens were cut off.

        Raises:
            InputError: a prompt of more than a million characters.
            CheckpointError: a rank cannot read the encoder, or it came without a tokenizer.
            PoolError: the pool could not start, or was lost.
        """
        if len(text) > MAX_CHARACTERS:
            raise InputError(
                f"the prompt has {len(text)} characters, and {MAX_CHARACTERS} may go to a pool: the model reads 512 "
                "tokens, shorten it"
            )
        fields = {"source": plain.to_plain(self.source), "text": text, "sharded": self.sharded}
        found, out = self.pool().connection.request("text", fields, poll=self.poll)
        return out["rows"], int(found[0]["lost"])


def hand_over(
    pool: pools.Pool,
    state: Mapping[str, Tensor],
    label: str,
    say: Callable[[str], None],
    poll: Callable[[], None],
) -> None:
    """Send weights that no file has, some at a time; the next request takes them."""
    total = sum(value.numel() * value.element_size() for value in state.values())
    say(f"{label}: its {total / 2**30:.1f} GiB go to the pool, once")
    first, part, size = True, {}, 0
    for name, value in state.items():
        part[name] = value
        size += value.numel() * value.element_size()
        if size >= PART_BYTES or len(part) == MAX_PART:
            pool.connection.request("weights", {"first": first, "bytes": total}, part, poll=poll)
            first, part, size = False, {}, 0
    pool.connection.request("weights", {"first": first, "bytes": total}, part, poll=poll)


def _nothing() -> None:
    pass
