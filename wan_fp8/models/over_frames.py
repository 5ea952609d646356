"""What the face fusers and the audio injectors share: attention of every latent frame's tokens to that frame's own few.

A parallel layout may give a rank tokens that begin and end inside a frame, and sparse attention puts tokens of many
frames side by side: the tokens of each frame are gathered, filled up to the same number, and cut again.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attention.sparse import TokenOrder


@dataclass(frozen=True, eq=False, slots=True)
class FramesHere:
    """The latent frames whose tokens are among ``tokens`` consecutive ones."""

    first: int
    """The first frame that has a token here."""
    last: int
    """Frame after the last one; ``first`` where there is none."""
    lead: int
    """In the frame order, tokens of the first frame that stand before those here; else 0."""
    count: int
    """Tokens of the video among them."""
    width: int
    """Tokens of the fullest frame; in the frame order of any frame."""
    there: Tensor | None = None
    """[frames * width] int64: which token here stands at each place, frame by frame; a frame that has fewer is filled
    up with any. None: the tokens lie in the frame order."""
    back: Tensor | None = None
    """[count] int64: the place of each token."""

    def grouped(self, x_BSNE: Tensor) -> Tensor:
        """[B, count, N, E] as the tokens lie -> [B * frames, width, N, E]."""
        frames = self.last - self.first
        if self.there is not None:
            x = x_BSNE.index_select(1, self.there)
        else:
            behind = frames * self.width - self.lead - self.count
            x = F.pad(x_BSNE, (0, 0, 0, 0, self.lead, behind)) if self.lead or behind else x_BSNE
        return x.unflatten(1, (frames, self.width)).flatten(0, 1)

    def cut(self, x_GPD: Tensor) -> Tensor:
        """[B * frames, width, D] -> [B, count, D] as the tokens lie."""
        x = x_GPD.unflatten(0, (-1, self.last - self.first)).flatten(1, 2)
        return x[:, self.lead : self.lead + self.count] if self.back is None else x.index_select(1, self.back)

    def row_of_token(self, row_of_frame_BF: Tensor) -> Tensor:
        """[B, F] of all frames -> [B, count] of the tokens here."""
        here = row_of_frame_BF[:, self.first : self.last]
        return self.cut(here.reshape(-1, 1, 1).expand(-1, self.width, 1))[..., 0]


def frames_here(first_token: int, tokens: int, frames: int, per_frame: int, order: TokenOrder | None) -> FramesHere:
    """Of ``tokens`` tokens from ``first_token`` on, in a video of ``frames`` frames whose tokens stand in ``order``
    (None: in the frame order)."""
    count = min(max(frames * per_frame - first_token, 0), tokens)
    if order is not None and count:
        return _scattered(order, first_token, count, per_frame)
    first = first_token // per_frame
    last = first if count == 0 else (first_token + count - 1) // per_frame + 1
    return FramesHere(first, last, first_token % per_frame, count, per_frame)


@functools.lru_cache(maxsize=32)
def _scattered(order: TokenOrder, first_token: int, count: int, per_frame: int) -> FramesHere:
    """Looks at the order on the host, once for a video and rank."""
    device = order.there.device
    frame = order.there[first_token : first_token + count].cpu() // per_frame
    first, last = int(frame.min()), int(frame.max()) + 1
    sizes = torch.bincount(frame - first, minlength=last - first)
    width = int(sizes.max())
    sorted_ = frame.argsort(stable=True)  # which token, frame by frame
    start = sizes.cumsum(0) - sizes
    inside = torch.arange(count) - start[frame[sorted_] - first]  # its number in the frame
    place = (frame[sorted_] - first) * width + inside
    there = torch.zeros((last - first) * width, dtype=torch.int64)
    there[place] = sorted_
    back = torch.empty(count, dtype=torch.int64)
    back[sorted_] = place
    return FramesHere(first, last, 0, count, width, there.to(device), back.to(device))
