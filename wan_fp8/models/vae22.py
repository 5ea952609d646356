"""The Wan2.2 VAE at any width, a whole clip at once: TI2V-5B's, 48 latent channels of 16x16 pixels and four frames.

As ``vae.py``, out of the same layers. What is its own: pixels enter and leave as 2x2 patches, and around each level
stands a shortcut without weights, which averages blocks on the way in and repeats them on the way out.

B clips, T frames, H/W rows and columns, C channels; activations are [B, T, H, W, C]. Parameter names are the official
ones. Source: Wan-Video/Wan2.2 ``wan/modules/vae2_2.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .vae import (
    DIM_MULT,
    RES_BLOCKS,
    TIME_DOWN,
    AutoEncoder,
    Conv,
    Down,
    Residual,
    Up,
    WanVAE,
    fill_vae,
    head,
    load_vae,
    middle,
    read_vae,
)

LATENT_CHANNELS_22 = 48
PATCH = 2
"""Rows, and columns, of pixels that are folded into channels."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VAE22Spec:
    """Sizes of one VAE, read from tensor shapes."""

    encoder_dim: int
    """Channels at half resolution: 160 in the published one."""
    decoder_dim: int
    """The decoder's: 256."""


def fold_patches(x_BTHWC: Tensor) -> Tensor:
    """2x2 pixels to channels: column offset before row offset, as published. [B, T, H, W, C] -> [..., H/2, W/2, 4C]"""
    x = x_BTHWC.unflatten(3, (-1, PATCH)).unflatten(2, (-1, PATCH))
    return x.permute(0, 1, 2, 4, 6, 5, 3).flatten(-3)


def unfold_patches(x_BTHWC: Tensor) -> Tensor:
    """The reverse of ``fold_patches``."""
    x = x_BTHWC.unflatten(-1, (-1, PATCH, PATCH))
    return x.permute(0, 1, 2, 6, 3, 5, 4).flatten(4, 5).flatten(2, 3)


def average_blocks(x_BTHWC: Tensor, out_channels: int, time: int, space: int) -> Tensor:
    """The shortcut of the encoder's levels: blocks of ``time`` frames and ``space`` x ``space`` pixels go to channels,
    ordered (channel, frame, row, column), and neighbours among these are averaged until ``out_channels`` are left.

    Frames are padded with zeros before the first one.
    """
    x = F.pad(x_BTHWC, (0, 0, 0, 0, 0, 0, -x_BTHWC.shape[1] % time, 0))
    x = x.unflatten(3, (-1, space)).unflatten(2, (-1, space)).unflatten(1, (-1, time))
    x = x.permute(0, 1, 3, 5, 7, 2, 4, 6).flatten(4)
    return x.unflatten(-1, (out_channels, -1)).mean(-1)


def repeat_blocks(x_BTHWC: Tensor, out_channels: int, time: int, space: int, *, first: bool = True) -> Tensor:
    """The shortcut of the decoder's levels, ``average_blocks`` backwards: channels are repeated to fill the blocks.

    Of the ``time`` frames of a clip's ``first`` frame the last one stays.
    """
    block = time * space * space
    x = x_BTHWC.repeat_interleave(out_channels * block // x_BTHWC.shape[-1], dim=-1)
    x = x.unflatten(-1, (out_channels, time, space, space)).permute(0, 1, 5, 2, 6, 3, 7, 4)
    return x.flatten(5, 6).flatten(3, 4).flatten(1, 2)[:, time - 1 if first else 0 :]


class DownLevel(nn.Module):
    """Residual blocks and, but for the last level, a halving of rows and columns (with ``time``, of frames too)."""

    def __init__(self, in_channels: int, out_channels: int, *, time: bool, last: bool) -> None:
        super().__init__()
        self.out_channels, self.time, self.space = out_channels, 2 if time else 1, 1 if last else 2
        self.downsamples = nn.Sequential()
        for index in range(RES_BLOCKS):
            self.downsamples.append(Residual(out_channels if index else in_channels, out_channels))
        if not last:
            self.downsamples.append(Down(out_channels, time))

    def forward(self, x: Tensor) -> Tensor:
        return self.downsamples(x) + average_blocks(x, self.out_channels, self.time, self.space)


class UpLevel(nn.Module):
    """Residual blocks and, but for the last level, a doubling; the last level has no shortcut."""

    def __init__(self, in_channels: int, out_channels: int, *, time: bool, last: bool) -> None:
        super().__init__()
        self.out_channels, self.time, self.last = out_channels, 2 if time else 1, last
        self.upsamples = nn.Sequential()
        for index in range(RES_BLOCKS + 1):
            self.upsamples.append(Residual(out_channels if index else in_channels, out_channels))
        if not last:
            self.upsamples.append(Up(out_channels, out_channels, time))

    def forward(self, x: Tensor) -> Tensor:
        y = self.upsamples(x)
        return y if self.last else y + repeat_blocks(x, self.out_channels, self.time, 2)


class Encoder22(nn.Module):
    """Pixels to twice the latent channels: time / 4, rows and columns / 16."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        widths = [dim * m for m in (1, *DIM_MULT)]
        self.conv1 = Conv(3 * PATCH * PATCH, widths[0], (3, 3, 3))
        self.downsamples = nn.Sequential()
        for level, time in enumerate((*TIME_DOWN, False)):
            last = level == len(TIME_DOWN)
            self.downsamples.append(DownLevel(widths[level], widths[level + 1], time=time, last=last))
        self.middle = middle(widths[-1])
        self.head = head(widths[-1], 2 * LATENT_CHANNELS_22)

    def forward(self, x: Tensor) -> Tensor:
        x = self.middle(self.downsamples(self.conv1(fold_patches(x))))
        return self.head["2"](F.silu(self.head["0"](x)))


class Decoder22(nn.Module):
    """Latents to pixels, not clamped."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        widths = [dim * m for m in (DIM_MULT[-1], *reversed(DIM_MULT))]
        self.conv1 = Conv(LATENT_CHANNELS_22, widths[0], (3, 3, 3))
        self.middle = middle(widths[0])
        self.upsamples = nn.Sequential()
        for level, time in enumerate((*reversed(TIME_DOWN), False)):
            last = level == len(TIME_DOWN)
            self.upsamples.append(UpLevel(widths[level], widths[level + 1], time=time, last=last))
        self.head = head(widths[-1], 3 * PATCH * PATCH)

    def forward(self, z: Tensor) -> Tensor:
        x = self.upsamples(self.middle(self.conv1(z)))
        return unfold_patches(self.head["2"](F.silu(self.head["0"](x))))


class Wan22VAE(AutoEncoder):
    """48 latent channels, 16x16 pixels."""

    version, channels, stride, patch = "2.2", LATENT_CHANNELS_22, 16, PATCH
    encoder: Encoder22
    decoder: Decoder22

    @property
    def widest(self) -> int:
        """Where the decoder's last level begins, at half resolution: what comes in has twice its channels."""
        return -(-3 * max(self.spec.encoder_dim, 2 * self.spec.decoder_dim) // PATCH**2)

    def __init__(self, spec: VAE22Spec) -> None:
        super().__init__(Encoder22(spec.encoder_dim), Decoder22(spec.decoder_dim))
        self.spec = spec


def load_vae22(
    source: str | Path | Mapping[str, Tensor],
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Wan22VAE:
    """As ``load_vae``, of the Wan2.2 VAE.

    Raises:
        CheckpointError: damaged, incomplete, or another VAE.
    """
    state = read_vae(source, "2.2", dtype, device)
    widths = VAE22Spec(
        encoder_dim=state["encoder.conv1.bias"].shape[0], decoder_dim=state["decoder.head.0.gamma"].shape[0]
    )
    with torch.device("meta"):
        vae = Wan22VAE(widths)
    fill_vae(vae, state, "2.2")
    return vae


AnyVAE = WanVAE | Wan22VAE
DESIGNS: dict[str, type[AnyVAE]] = {"2.1": WanVAE, "2.2": Wan22VAE}
LOADERS: dict[str, Callable[..., AnyVAE]] = {"2.1": load_vae, "2.2": load_vae22}
"""Both by version."""
