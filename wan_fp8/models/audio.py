"""From wav2vec2's layers to the tokens that S2V's injectors read.

B batch, T video frames, F latent frames (four video frames each), D model width. Parameter names are the official ones,
"casual" included. Source: Wan-Video/Wan2.2 ``wan/modules/s2v/{audio_utils,auxi_blocks}.py``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import Linear
from .over_time import ConvBox, normed_silu

AUDIO_LAYERS = 25
AUDIO_WIDTH = 1024
AUDIO_HEADS = 4
LEAD_IN = 73
"""Video frames before a clip; the audio has none for them, its first one stands in."""
LEAD_IN_LATENTS = 19
"""What becomes of them, and is cut off: (73 + 4 F) frames give 19 + F outputs."""


class TimeEncoder(nn.Module):
    """[B, T, 1024] -> global tokens [B, F, D] and local tokens [B, F, 5, D]; both branches share all but their first
    convolution."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv1_local = ConvBox(AUDIO_WIDTH, dim // 4 * AUDIO_HEADS)
        self.conv1_global = ConvBox(AUDIO_WIDTH, dim // 4)
        self.conv2 = ConvBox(dim // 4, dim // 2, stride=2)
        self.conv3 = ConvBox(dim // 2, dim, stride=2)
        self.final_linear = Linear(dim, dim)
        self.padding_tokens = nn.Parameter(torch.empty(1, 1, 1, dim), requires_grad=False)

    def forward(self, x_BTC: Tensor) -> tuple[Tensor, Tensor]:
        heads = self.conv1_local(x_BTC).unflatten(-1, (AUDIO_HEADS, -1)).transpose(1, 2).flatten(0, 1)
        local = self._later(heads).unflatten(0, (-1, AUDIO_HEADS)).transpose(1, 2)
        padding = self.padding_tokens.to(local).expand(*local.shape[:2], 1, -1)
        return self.final_linear(self._later(self.conv1_global(x_BTC))), torch.cat([local, padding], dim=2)

    def _later(self, x_BTC: Tensor) -> Tensor:
        return normed_silu(self.conv3(normed_silu(self.conv2(normed_silu(x_BTC)))))


class AudioEncoder(nn.Module):
    """One clip's audio [B, 25, 1024, 4 F] -> global tokens [B, F, D] and local tokens [B, F, 5, D].

    Latent frame j hears the clip's video frames up to 4 j + 3, and none later.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.encoder = TimeEncoder(dim)
        self.weights = nn.Parameter(torch.empty(1, AUDIO_LAYERS, 1, 1), requires_grad=False)

    def forward(self, audio_BLCT: Tensor) -> tuple[Tensor, Tensor]:
        shares = F.silu(self.weights.to(audio_BLCT))
        mixed = (audio_BLCT * shares / shares.sum(dim=1, keepdim=True)).sum(dim=1).transpose(1, 2)
        mixed = torch.cat([mixed[:, :1].expand(-1, LEAD_IN, -1), mixed], dim=1)
        whole, parts = self.encoder(mixed)
        return whole[:, LEAD_IN_LATENTS:], parts[:, LEAD_IN_LATENTS:]
