"""What the face fusers and the audio injectors share: attention of every latent frame's tokens to that frame's own few.

A parallel layout may give a rank tokens that begin and end inside a frame: those frames are filled up, and cut again.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, slots=True)
class FramesHere:
    """The latent frames whose tokens are among ``tokens`` consecutive ones."""

    first: int
    """Frame of the first token."""
    last: int
    """Frame after that of the last token; ``first`` where there is none."""
    lead: int
    """Tokens of the first frame that stand before them."""
    count: int
    """Tokens of the video among them."""
    per_frame: int

    def grouped(self, x_BSNE: Tensor) -> Tensor:
        """[B, count, N, E] in the frame order -> [B * frames, per_frame, N, E]."""
        frames = self.last - self.first
        behind = frames * self.per_frame - self.lead - self.count
        x = F.pad(x_BSNE, (0, 0, 0, 0, self.lead, behind)) if self.lead or behind else x_BSNE
        return x.unflatten(1, (frames, self.per_frame)).flatten(0, 1)

    def back(self, x_GPD: Tensor) -> Tensor:
        """[B * frames, per_frame, D] -> [B, count, D]."""
        x = x_GPD.unflatten(0, (-1, self.last - self.first)).flatten(1, 2)
        return x[:, self.lead : self.lead + self.count]


def frames_here(first_token: int, tokens: int, frames: int, per_frame: int) -> FramesHere:
    """Of ``tokens`` tokens from ``first_token`` on, in a video of ``frames`` frames."""
    count = min(max(frames * per_frame - first_token, 0), tokens)
    first = first_token // per_frame
    last = first if count == 0 else (first_token + count - 1) // per_frame + 1
    return FramesHere(first, last, first_token % per_frame, count, per_frame)
