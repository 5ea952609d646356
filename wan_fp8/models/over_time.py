"""What the face encoder and the audio encoder share: convolutions over time that see no later frame.

B batch, T frames, C channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import accumulate_dtype
from .layers import Leaf


class CausalConv1d(Leaf):
    """A convolution over time that sees no later frame: [B, T, C] -> [B, ceil(T / stride), C_out]. What is missing
    before the first frame repeats it."""

    def __init__(self, in_dim: int, out_dim: int, kernel: int = 3, stride: int = 1) -> None:
        super().__init__()
        self.kernel, self.stride = kernel, stride
        self.weight = nn.Parameter(torch.empty(out_dim, in_dim, kernel), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(out_dim), requires_grad=False)

    def forward(self, x_BTC: Tensor) -> Tensor:
        x = F.pad(x_BTC.transpose(1, 2), (self.kernel - 1, 0), mode="replicate")
        weight, bias, handle = self.fetch(x)
        y = F.conv1d(x, weight, bias, self.stride)
        self.release(weight, bias, handle)
        return y.transpose(1, 2)


class ConvBox(nn.Module):
    """A causal convolution under its official name."""

    def __init__(self, in_dim: int, out_dim: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = CausalConv1d(in_dim, out_dim, stride=stride)

    def forward(self, x_BTC: Tensor) -> Tensor:
        return self.conv(x_BTC)


def normed_silu(x: Tensor) -> Tensor:
    """LayerNorm without parameters, then SiLU; in the accumulation type, rounded once."""
    value = x.to(accumulate_dtype(x))
    return F.silu(F.layer_norm(value, value.shape[-1:], eps=1e-6)).to(x.dtype)
