"""The order in which tokens stand while attention is block-sparse: every 128 neighbours in the sequence are neighbours
in space and time.

A grid (frames, rows, columns) is halved across its longest side, again and again, always at a multiple of 128 tokens:
the leaves are boxes of exactly 128 tokens with at most one ragged face in each direction, and only the last block of
the sequence is short. Fixed tiles would pad (45 rows to 48), and the blocks that a Hilbert curve makes of a grid that
is no power of two spread further: at 21 x 45 x 80 a token's mean squared distance from the middle of its block is 6.9
here, 9.4 along a Hilbert curve cut to the grid, 529 in the frame order that the model is trained in
(``tests/unit/test_sparse.py``).

Attention does not know the order of its keys, so that a dense model answers the same in any order, up to the order of
its sums; norms, linears and cross-attention see one token at a time.

B batch, S tokens, M blocks.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 128
"""Tokens of a block of keys, and of a block of queries on Hopper."""


@dataclass(frozen=True, eq=False, slots=True)
class BlockLayout:
    """What selection needs to know of where the tokens of a sequence lie."""

    num_tokens: int
    kept: tuple[tuple[int, int], ...] = ()
    """Ranges [first, end) of key blocks that every query keeps: a given first frame, reference and motion tokens."""
    places: Tensor | None = None
    """[S, 3] fp32 frame, row and column of each token; NaN for tokens behind the video; None: not known."""

    @property
    def key_blocks(self) -> int:
        """Blocks that hold the tokens."""
        return -(-self.num_tokens // BLOCK)


@dataclass(frozen=True, eq=False, slots=True)
class TokenOrder:
    """A permutation of the video's tokens; what stands behind them stays where it is."""

    video: int
    """Tokens of the video, which come first."""
    there: Tensor
    """[S] int64: which token of the frame order stands at each place."""
    back: Tensor
    """[S] int64: the inverse."""
    layout: BlockLayout

    def apply(self, x: Tensor, axis: int = 1) -> Tensor:
        """From the frame order; rows beyond the tokens (padding) stay at the end."""
        return _taken(x, self.there, axis)

    def undo(self, x: Tensor, axis: int = 1) -> Tensor:
        """Back to the frame order."""
        return _taken(x, self.back, axis)

    def video_in_frames(self, x: Tensor, axis: int = 1) -> Tensor:
        """The video's tokens alone, in the frame order."""
        return x.index_select(axis, self.back[: self.video])


def _taken(x: Tensor, index: Tensor, axis: int) -> Tensor:
    extra = x.shape[axis] - index.shape[0]
    assert extra >= 0, (x.shape, index.shape)
    if extra:
        index = torch.cat([index, torch.arange(index.shape[0], x.shape[axis], device=index.device)])
    return x.index_select(axis, index)


@functools.lru_cache(maxsize=8)
def token_order(
    grid: tuple[int, int, int], behind: int = 0, keep_first_frame: bool = False, device: torch.device | None = None
) -> TokenOrder:
    """The order for a video of this grid.

    Args:
        grid: Frames, rows and columns of the video's tokens.
        behind: Tokens behind the video (reference, motion): not moved, and kept by every query.
        keep_first_frame: The first frame is a given picture: it stands first, in blocks of its own but for the last,
            and every query keeps them.
    """
    frames, rows, columns = grid
    places = torch.cartesian_prod(*(torch.arange(n) for n in grid)).view(-1, 3)
    first = rows * columns if keep_first_frame and frames > 1 else 0
    parts = [
        _halved(places[:first], torch.arange(first), 0),
        _halved(places[first:], torch.arange(first, len(places)), first),
    ]
    video = frames * rows * columns
    there = torch.cat([*parts, torch.arange(video, video + behind)])
    back = torch.empty_like(there)
    back[there] = torch.arange(len(there))
    kept = []
    if first:
        kept.append((0, -(-first // BLOCK)))
    if behind:
        kept.append((video // BLOCK, -(-(video + behind) // BLOCK)))
    where = torch.cat([places.float()[there[:video]], torch.full((behind, 3), math.nan)])
    layout = BlockLayout(video + behind, tuple(kept), where.to(device))
    return TokenOrder(video, there.to(device), back.to(device), layout)


def _halved(places: Tensor, index: Tensor, start: int) -> Tensor:
    """``index`` in an order in which each block lies close together; the first one stands at ``start`` in the
    sequence."""
    first, end = start // BLOCK, -(-(start + len(index)) // BLOCK)
    if end - first <= 1:
        return index
    sides = places.amax(0) - places.amin(0)
    by_axis = places[:, int(sides.argmax())].argsort(stable=True)
    cut = (first + end) // 2 * BLOCK - start
    low, high = by_axis[:cut], by_axis[cut:]
    return torch.cat([_halved(places[low], index[low], start), _halved(places[high], index[high], start + cut)])
