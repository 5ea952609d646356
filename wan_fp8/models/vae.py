"""The Wan2.1 VAE at any width, a whole clip at once: what trains and measures small checkpoints.

Published code streams a clip through caches, frame group by frame group. All its convolutions are causal, so the same
arithmetic on the whole clip is one padded convolution each; that is what stands here, differentiable and in any
floating type. (ComfyUI's graphs decode with core's VAE, which streams and takes less memory.)

B clips, T frames, H/W rows and columns, C channels; activations are [B, T, H, W, C], channels fastest, which is what
convolutions like best on a GPU. Parameter names are the official ones.
Source: Wan-Video/Wan2.2 ``wan/modules/vae2_1.py``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import CheckpointError

LATENT_CHANNELS = 16
DIM_MULT = (1, 2, 4, 4)
RES_BLOCKS = 2
"""Residual blocks a level of the encoder; the decoder has one more."""
TIME_DOWN = (False, True, True)
"""Whether the encoder's first three levels halve time; the decoder doubles it in the reverse order."""

LATENTS_MEAN = (
    *(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508),
    *(0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
)
LATENTS_STD = (
    *(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743),
    *(3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160),
)
"""Published statistics of each latent channel: the transformer works on ``(mu - mean) / std``."""
LATENTS_MEAN_22 = (
    *(-0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557),
    *(-0.1382, 0.0542, 0.2813, 0.0891, 0.157, -0.0098, 0.0375, -0.1825),
    *(-0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502),
    *(-0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.123),
    *(-0.0313, -0.1649, 0.0117, 0.0723, -0.2839, -0.2083, -0.052, 0.3748),
    *(0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667),
)
LATENTS_STD_22 = (
    *(0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.499, 0.4818, 0.5013),
    *(0.8158, 1.0344, 0.5894, 1.0901, 0.6885, 0.6165, 0.8454, 0.4978),
    *(0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659),
    *(0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093),
    *(0.5709, 0.6065, 0.6415, 0.4944, 0.5726, 1.2042, 0.5458, 1.6887),
    *(0.3971, 1.06, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744),
)
"""The same of the 48 channels of the Wan2.2 VAE (``vae22.py``)."""
STATISTICS = {len(mean): (mean, std) for mean, std in ((LATENTS_MEAN, LATENTS_STD), (LATENTS_MEAN_22, LATENTS_STD_22))}
"""Mean and deviation by the number of latent channels."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VAESpec:
    """Sizes of one VAE, read from tensor shapes."""

    dim: int
    """Channels at full resolution: 96 in the published one."""


class Conv(nn.Module):
    """Convolution with kernel [k_t, k, k], causal in time: frames before the first are zeros."""

    def __init__(self, in_channels: int, out_channels: int, kernel: tuple[int, ...], stride: int = 1) -> None:
        """``kernel``: (k_t, k, k), or (k, k) where the official weight has no time axis. ``stride``: in space."""
        super().__init__()
        self.kernel, self.stride = kernel, stride
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, *kernel), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(out_channels), requires_grad=False)

    def forward(self, x_BTHWC: Tensor) -> Tensor:
        """The frames before the first one of the clip count as zeros."""
        taps = self.kernel[0] if len(self.kernel) == 3 else 1
        return self.over_taps([x_BTHWC]) if taps == 1 else self.over_taps(_shifted(x_BTHWC, taps))

    def over_taps(self, taps: list[Tensor]) -> Tensor:
        """One two-dimensional convolution over the frames that each output frame sees, oldest first, as channels."""
        x = taps[0] if len(taps) == 1 else torch.cat(taps, dim=-1)
        batch, frames = x.shape[:2]
        weight = self.weight.to(x.dtype)
        if weight.ndim == 5:
            weight = weight.transpose(1, 2).flatten(1, 2)
        weight = weight.contiguous(memory_format=torch.channels_last)
        x = x.flatten(0, 1).permute(0, 3, 1, 2)
        padding = self.kernel[-1] // 2
        if self.stride == 2:  # the published padding is one row below and one column to the right
            x, padding = F.pad(x, (0, 1, 0, 1)), 0
        y = F.conv2d(x, weight, self.bias.to(x.dtype), stride=self.stride, padding=padding)
        return y.permute(0, 2, 3, 1).unflatten(0, (batch, frames))


def _shifted(x_BTHWC: Tensor, taps: int) -> list[Tensor]:
    frames = x_BTHWC.shape[1]
    padded = F.pad(x_BTHWC, (0, 0, 0, 0, 0, 0, taps - 1, 0))
    return [padded[:, i : i + frames] for i in range(taps)]


class Norm(nn.Module):
    """Every pixel's channels scaled to root mean square ``gamma``."""

    def __init__(self, channels: int, axes: int) -> None:
        """``axes``: length of gamma's shape [channels, 1, ...]."""
        super().__init__()
        self.gamma = nn.Parameter(torch.empty(channels, *(1,) * (axes - 1)), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        high = torch.promote_types(x.dtype, torch.float32)
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=high).clamp_min(1e-12)
        return x * (math.sqrt(x.shape[-1]) / length).to(x.dtype) * self.gamma.flatten().to(x.dtype)


class Residual(nn.Module):
    """Twice norm, SiLU and convolution, around a shortcut."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.residual = nn.ModuleDict(
            {
                "0": Norm(in_channels, 4),
                "2": Conv(in_channels, out_channels, (3, 3, 3)),
                "3": Norm(out_channels, 4),
                "6": Conv(out_channels, out_channels, (3, 3, 3)),
            }
        )
        self.shortcut = Conv(in_channels, out_channels, (1, 1, 1)) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        parts = self.residual
        y = parts["2"](F.silu(parts["0"](x)))
        return self.shortcut(x) + parts["6"](F.silu(parts["3"](y)))


class FrameAttention(nn.Module):
    """Single-head attention among the pixels of each frame."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = Norm(channels, 3)
        self.to_qkv = Conv(channels, 3 * channels, (1, 1))
        self.proj = Conv(channels, channels, (1, 1))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.to_qkv(self.norm(x)).flatten(0, 1).flatten(1, 2).unsqueeze(1).chunk(3, dim=-1)
        y = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj(y.reshape(x.shape))


class Down(nn.Module):
    """Halves rows and columns, then, with ``time``, every frame but the first meets its neighbour."""

    def __init__(self, channels: int, time: bool) -> None:
        super().__init__()
        self.resample = nn.ModuleDict({"1": Conv(channels, channels, (3, 3), stride=2)})
        self.time_conv = Conv(channels, channels, (3, 1, 1)) if time else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.resample["1"](x)
        if self.time_conv is None or x.shape[1] == 1:
            return x
        later = self.time_conv.over_taps([x[:, 0:-2:2], x[:, 1:-1:2], x[:, 2::2]])
        return torch.cat([x[:, :1], later], dim=1)  # the first frame passes as it is


class Up(nn.Module):
    """With ``time``, doubles every frame but the first; then doubles rows and columns."""

    def __init__(self, channels: int, out_channels: int, time: bool) -> None:
        super().__init__()
        self.resample = nn.ModuleDict({"1": Conv(channels, out_channels, (3, 3))})
        self.time_conv = Conv(channels, 2 * channels, (3, 1, 1)) if time else None

    def forward(self, x: Tensor) -> Tensor:
        if self.time_conv is not None and x.shape[1] > 1:
            pairs = self.time_conv(x[:, 1:]).unflatten(-1, (2, -1))  # the first frame is no history here
            later = pairs.permute(0, 1, 4, 2, 3, 5).flatten(1, 2)
            x = torch.cat([x[:, :1], later], dim=1)
        batch, frames, rows, columns, channels = x.shape
        x = x[:, :, :, None, :, None].expand(-1, -1, -1, 2, -1, 2, -1)
        return self.resample["1"](x.reshape(batch, frames, 2 * rows, 2 * columns, channels))


def middle(channels: int) -> nn.Sequential:
    """What stands between the levels and the latents in either half."""
    return nn.Sequential(Residual(channels, channels), FrameAttention(channels), Residual(channels, channels))


def head(in_channels: int, out_channels: int) -> nn.ModuleDict:
    """How either half ends; a SiLU stands between the two."""
    return nn.ModuleDict({"0": Norm(in_channels, 4), "2": Conv(in_channels, out_channels, (3, 3, 3))})


class Encoder(nn.Module):
    """Pixels to twice the latent channels: time / 4, rows and columns / 8."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        widths = [dim * m for m in (1, *DIM_MULT)]
        self.conv1 = Conv(3, widths[0], (3, 3, 3))
        self.downsamples = nn.Sequential()
        for level, width in enumerate(widths[1:]):
            for index in range(RES_BLOCKS):
                self.downsamples.append(Residual(widths[level] if index == 0 else width, width))
            if level < len(TIME_DOWN):
                self.downsamples.append(Down(width, TIME_DOWN[level]))
        self.middle = middle(widths[-1])
        self.head = head(widths[-1], 2 * LATENT_CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        x = self.middle(self.downsamples(self.conv1(x)))
        return self.head["2"](F.silu(self.head["0"](x)))


class Decoder(nn.Module):
    """Latents to pixels, not clamped."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        widths = [dim * m for m in (DIM_MULT[-1], *reversed(DIM_MULT))]
        self.conv1 = Conv(LATENT_CHANNELS, widths[0], (3, 3, 3))
        self.middle = middle(widths[0])
        self.upsamples = nn.Sequential()
        for level, width in enumerate(widths[1:]):
            incoming = widths[level] // 2 if level else widths[level]
            for index in range(RES_BLOCKS + 1):
                self.upsamples.append(Residual(incoming if index == 0 else width, width))
            if level < len(TIME_DOWN):
                self.upsamples.append(Up(width, width // 2, TIME_DOWN[::-1][level]))
        self.head = head(widths[-1], 3)

    def forward(self, z: Tensor) -> Tensor:
        x = self.upsamples(self.middle(self.conv1(z)))
        return self.head["2"](F.silu(self.head["0"](x)))


class AutoEncoder(nn.Module):
    """Encoder and decoder of either design; computes in the type of its input."""

    version: str
    """``2.1`` or ``2.2``."""
    channels: int
    """Of the latents; the encoder returns twice as many."""
    stride: int
    """Pixel rows, and columns, to a latent one."""
    patch: int
    """Rows, and columns, of pixels that the encoder folds into channels before anything else."""

    @property
    def widest(self) -> int:
        """Values of the widest activation to a pixel of a frame: what its convolution reads, three frames of it."""
        raise NotImplementedError

    def __init__(self, encoder: nn.Module, decoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.conv1 = Conv(2 * self.channels, 2 * self.channels, (1, 1, 1))
        self.conv2 = Conv(self.channels, self.channels, (1, 1, 1))
        self.decoder = decoder

    def moments(self, video_BCTHW: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance of the latents, each [B, C, F, H/S, W/S]; S is 8, and 16 in the Wan2.2 VAE.

        Args:
            video_BCTHW: [B, 3, T, H, W] in -1..1; T is 4n + 1, H and W are multiples of S.
        """
        x = video_BCTHW.permute(0, 2, 3, 4, 1).contiguous()
        mean, log_variance = self.conv1(self.encoder(x)).permute(0, 4, 1, 2, 3).chunk(2, dim=1)
        return mean, log_variance

    def encode(self, video_BCTHW: Tensor) -> Tensor:
        """The latents' mean, as published code uses it, not normalised: [B, 3, T, H, W] -> [B, C, F, H/S, W/S]."""
        return self.moments(video_BCTHW)[0]

    def decode(self, latents_BCFHW: Tensor) -> Tensor:
        """Latents that are not normalised -> [B, 3, T, H, W], about -1..1 (callers clamp)."""
        z = latents_BCFHW.permute(0, 2, 3, 4, 1).contiguous()
        video: Tensor = self.decoder(self.conv2(z)).permute(0, 4, 1, 2, 3)
        return video


class WanVAE(AutoEncoder):
    """16 latent channels, 8x8 pixels."""

    version, channels, stride, patch = "2.1", LATENT_CHANNELS, 8, 1
    encoder: Encoder
    decoder: Decoder

    @property
    def widest(self) -> int:
        """Of the last level, at full resolution."""
        return 3 * self.spec.dim

    def __init__(self, spec: VAESpec) -> None:
        super().__init__(Encoder(spec.dim), Decoder(spec.dim))
        self.spec = spec


def normalize_latents(latents_BCFHW: Tensor) -> Tensor:
    """``(mu - mean) / std`` by the published statistics: what the transformer works on."""
    mean, std = _statistics(latents_BCFHW)
    return (latents_BCFHW - mean) / std


def denormalize_latents(latents_BCFHW: Tensor) -> Tensor:
    """What the decoder takes, from what the transformer made."""
    mean, std = _statistics(latents_BCFHW)
    return latents_BCFHW * std + mean


def _statistics(like: Tensor) -> tuple[Tensor, Tensor]:
    mean, std = (like.new_tensor(values).view(1, -1, 1, 1, 1) for values in STATISTICS[like.shape[1]])
    return mean, std


def load_vae(
    source: str | Path | Mapping[str, Tensor],
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> WanVAE:
    """The Wan2.1 VAE from a file, a checkpoint folder, or tensors under official names; in eval mode.

    Raises:
        CheckpointError: damaged, incomplete, or another VAE.
    """
    state = read_vae(source, "2.1", dtype, device)
    with torch.device("meta"):
        vae = WanVAE(VAESpec(dim=state["decoder.head.0.gamma"].shape[0]))
    fill_vae(vae, state, "2.1")
    return vae


def read_vae(
    source: str | Path | Mapping[str, Tensor], version: str, dtype: torch.dtype, device: torch.device | str
) -> dict[str, Tensor]:
    """Tensors under official names, the two that tell the widths among them."""
    if isinstance(source, Mapping):
        state = {name: tensor.to(device, dtype) for name, tensor in source.items()}
    else:
        from ..checkpoint.encoders import load_vae_state_dict

        state = load_vae_state_dict(source, dtype, device, expected=version).state_dict
    for name in ("decoder.head.0.gamma", "encoder.conv1.bias"):
        if name not in state:
            raise CheckpointError(f"this is no Wan{version} VAE: {name} is missing; use Wan{version}_VAE.pth")
    return state


def fill_vae(vae: nn.Module, state: Mapping[str, Tensor], version: str) -> None:
    """Give ``vae``, made on no device, the tensors of ``state``, all of which it must need."""
    wanted = {name: tuple(value.shape) for name, value in vae.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in state.items()}
    if wanted != found:
        odd = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
        raise CheckpointError(
            f"this VAE is not complete or not a Wan{version} VAE ({', '.join(odd[:3])}, …); "
            f"download Wan{version}_VAE.pth again"
        )
    vae.load_state_dict(state, assign=True)
    vae.requires_grad_(False).eval()
