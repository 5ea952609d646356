"""From a face video to the tokens that Animate's fusers read: how the face moves, frame by frame, then over time.

N video frames of all samples together, T frames of one, C channels, D model width. Parameter names are the official
ones; the official files carry the constant blur kernels as well, which are left out here.
Source: Wan-Video/Wan2.2 ``wan/modules/animate/{motion_encoder,face_blocks}.py``.
"""

from __future__ import annotations

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import accumulate_dtype
from .layers import Leaf, Linear
from .over_time import ConvBox, normed_silu

FACE_SIZE = 512
"""Rows and columns of the face video."""
CHANNELS = (32, 64, 128, 256, 512, 512, 512, 512)
"""Of the motion encoder, from 512 pixels down to 4."""
STYLE_DIM = 512
MOTION_DIM = 20
LINEARS = 5
FACE_HEADS = 4
FACE_WIDTH = 1024
FRAMES_AT_ONCE = 8
"""Face frames that the motion encoder takes together, as in the official code: 0.5 GB of activations in bf16."""
BLUR = (1.0, 3.0, 3.0, 1.0)


class EqualConv2d(Leaf):
    """A convolution whose stored weight is scaled by one over the root of its fan-in."""

    def __init__(self, in_dim: int, out_dim: int, kernel: int, stride: int = 1, padding: int = 0) -> None:
        super().__init__()
        self.stride, self.padding = stride, padding
        self.factor = 1 / math.sqrt(in_dim * kernel**2)
        self.weight = nn.Parameter(torch.empty(out_dim, in_dim, kernel, kernel), requires_grad=False)
        self.bias = None

    def forward(self, x_NCHW: Tensor) -> Tensor:
        weight, bias, handle = self.fetch(x_NCHW)
        y = F.conv2d(x_NCHW, weight * self.factor, None, self.stride, self.padding)
        self.release(weight, bias, handle)
        return y


class EqualLinear(Leaf):
    """The same for a linear."""

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.factor = 1 / math.sqrt(in_dim)
        self.weight = nn.Parameter(torch.empty(out_dim, in_dim), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(out_dim), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        weight, bias, handle = self.fetch(x)
        y = F.linear(x, weight * self.factor, bias)
        self.release(weight, bias, handle)
        return y


class BiasedLeaky(nn.Module):
    """``sqrt(2) * leaky_relu(x + bias, 0.2)``."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.empty(1, dim, 1, 1), requires_grad=False)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return F.leaky_relu(x_NCHW + self.bias.to(x_NCHW), 0.2) * math.sqrt(2)


class Blur(nn.Module):
    """A fixed low-pass filter before every second pixel is taken: (1, 3, 3, 1) in both directions, sum one."""

    def __init__(self, padding: int, stride: int = 1) -> None:
        super().__init__()
        self.padding, self.stride = padding, stride

    def forward(self, x_NCHW: Tensor) -> Tensor:
        line = torch.tensor(BLUR, dtype=x_NCHW.dtype, device=x_NCHW.device)
        kernel = line[:, None] * line / 64  # exact in bf16
        channels = x_NCHW.shape[1]
        return F.conv2d(
            x_NCHW, kernel.expand(channels, 1, -1, -1), stride=self.stride, padding=self.padding, groups=channels
        )


class MotionBlock(nn.Module):
    """Two convolutions beside a short cut; halves rows and columns."""

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(EqualConv2d(in_dim, in_dim, 3, padding=1), BiasedLeaky(in_dim))
        self.conv2 = nn.Sequential(Blur(2), EqualConv2d(in_dim, out_dim, 3, stride=2), BiasedLeaky(out_dim))
        # Officially the convolution has the stride. It reads one pixel, so the blur need not make the others.
        self.skip = nn.Sequential(Blur(1, stride=2), EqualConv2d(in_dim, out_dim, 1))

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return (self.conv2(self.conv1(x_NCHW)) + self.skip(x_NCHW)) / math.sqrt(2)


class Appearance(nn.Module):
    """[N, 3, 512, 512] -> [N, 512]."""

    def __init__(self) -> None:
        super().__init__()
        first = nn.Sequential(EqualConv2d(3, CHANNELS[0], 1), BiasedLeaky(CHANNELS[0]))
        blocks = (MotionBlock(a, b) for a, b in itertools.pairwise(CHANNELS))
        self.convs = nn.ModuleList([first, *blocks, EqualConv2d(CHANNELS[-1], STYLE_DIM, 4)])

    def forward(self, x_NCHW: Tensor) -> Tensor:
        for conv in self.convs:
            x_NCHW = conv(x_NCHW)
        return x_NCHW.flatten(1)


class Coefficients(nn.Module):
    """[N, 3, 512, 512] -> the 20 numbers that say how the face moves. No activation between the linears."""

    def __init__(self) -> None:
        super().__init__()
        self.net_app = Appearance()
        widths = (*(STYLE_DIM,) * LINEARS, MOTION_DIM)
        self.fc = nn.Sequential(*(EqualLinear(a, b) for a, b in itertools.pairwise(widths)))

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return self.fc(self.net_app(x_NCHW))


class Directions(Leaf):
    """Orthonormal directions of motion: [N, 20] coefficients -> [N, 512]."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(STYLE_DIM, MOTION_DIM), requires_grad=False)
        self.bias = None

    def forward(self, coefficients: Tensor) -> Tensor:
        weight, bias, handle = self.fetch(coefficients)
        acc = accumulate_dtype(weight)
        directions = torch.linalg.qr((weight + 1e-8).to(acc)).Q.to(weight.dtype)
        self.release(weight, bias, handle)
        return coefficients.to(acc) @ directions.to(acc).T


class MotionEncoder(nn.Module):
    """A face video, frame by frame: [B, 3, T, 512, 512] in -1..1 -> [B, T, 512]."""

    def __init__(self) -> None:
        super().__init__()
        self.enc = Coefficients()
        self.dec = nn.ModuleDict({"direction": Directions()})

    def forward(self, faces_BCTHW: Tensor) -> Tensor:
        frames = faces_BCTHW.transpose(1, 2).flatten(0, 1)
        found = [self.dec["direction"](self.enc(some)) for some in frames.split(FRAMES_AT_ONCE)]
        return torch.cat(found).unflatten(0, (faces_BCTHW.shape[0], -1))


class FaceEncoder(nn.Module):
    """Motion over time: [B, T, 512] -> [B, ceil(T / 4), 5, D], four heads and a learned token for a latent frame."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv1_local = ConvBox(STYLE_DIM, FACE_WIDTH * FACE_HEADS)
        self.conv2 = ConvBox(FACE_WIDTH, FACE_WIDTH, stride=2)
        self.conv3 = ConvBox(FACE_WIDTH, FACE_WIDTH, stride=2)
        self.out_proj = Linear(FACE_WIDTH, dim)
        self.padding_tokens = nn.Parameter(torch.empty(1, 1, 1, dim), requires_grad=False)

    def forward(self, motion_BTC: Tensor) -> Tensor:
        batch = motion_BTC.shape[0]
        x = self.conv1_local(motion_BTC).unflatten(-1, (FACE_HEADS, -1)).transpose(1, 2).flatten(0, 1)
        x = normed_silu(self.conv2(normed_silu(x)))
        x = self.out_proj(normed_silu(self.conv3(x)))
        x = x.unflatten(0, (batch, FACE_HEADS)).transpose(1, 2)
        return torch.cat([x, self.padding_tokens.to(x).expand(*x.shape[:2], 1, -1)], dim=2)
