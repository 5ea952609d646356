"""A VAE of either design over several ranks: each has some rows of every frame, all together the same numbers as one.

A convolution reads one row beyond a rank's own; neighbours hand each other that row, and nothing else is sent but the
keys and values of the one attention in the middle and, at the end, the result. Frames go through in groups, with the
last two that each causal convolution has seen kept for the next group (as published code does), so that memory does not
grow with the length of a clip; on one rank that is all there is to it.

B clips, T frames, H/W rows and columns of this rank, C channels; activations are [B, T, H, W, C].
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import InputError
from ..models.vae import Conv, Down, FrameAttention, Residual, Up
from ..models.vae22 import AnyVAE, DownLevel, UpLevel, average_blocks, fold_patches, repeat_blocks, unfold_patches
from .exchange import gather

TIME_STRIDE = 4
MOST_VALUES = 2**31
"""Of one activation: convolution kernels count in 32 bits."""
GROUP_COPIES = 4
"""Memory that a group of frames takes, as a multiple of its widest activation: that one, its input with the frames
before, output, shortcut, and a kernel's own."""


class SplitVAE:
    """Encodes and decodes with the weights of ``vae``, which every rank has."""

    def __init__(self, vae: AnyVAE, group: dist.ProcessGroup | None = None, most_values: int | None = None) -> None:
        """
        Args:
            group: The ranks that share the rows; None: this one alone.
            most_values: Of the widest activation, where memory is short; the same on every rank. None: ``MOST_VALUES``.
        """
        self.vae, self.group, self.most_values = vae, group, most_values
        self.ranks = 1 if group is None else group.size()
        self.rank = 0 if group is None else group.rank()
        self._history: dict[nn.Module, Tensor] = {}
        """By convolution: the last frames of its input, edges included."""
        self._total = 0
        """Latent rows of all ranks."""
        self._first = True
        """Whether the group of frames that is running is the clip's first."""

    def encode(self, video_BCTHW: Tensor) -> Tensor:
        """``AutoEncoder.encode`` of the whole clip, given to and returned on every rank.

        Raises:
            InputError: fewer latent rows than ranks.
        """
        stride = self.vae.stride
        mine = self._rows(video_BCTHW.shape[3] // stride, stride)
        x = video_BCTHW[:, :, :, mine].permute(0, 2, 3, 4, 1)
        encoder = self.vae.encoder

        def run(frames: Tensor) -> Tensor:
            y = self._run(encoder.downsamples, self._folded(frames), encoder.conv1)
            return self._conv(self.vae.conv1, self._head(encoder.head, self._run(encoder.middle, y)))

        moments = self._in_groups(x, TIME_STRIDE * self._group_length(x, 1), run)
        return self._whole(moments, video_BCTHW.shape[3] // stride, 1).permute(0, 4, 1, 2, 3).chunk(2, dim=1)[0]

    def decode(self, latents_BCFHW: Tensor) -> Tensor:
        """``AutoEncoder.decode`` of the whole clip, given to and returned on every rank.

        Raises:
            InputError: fewer latent rows than ranks.
        """
        mine = self._rows(latents_BCFHW.shape[3], 1)
        z = latents_BCFHW[:, :, :, mine].permute(0, 2, 3, 4, 1)
        decoder = self.vae.decoder

        def run(frames: Tensor) -> Tensor:
            x = self._run(decoder.middle, self._conv(self.vae.conv2, frames), decoder.conv1)
            y = self._head(decoder.head, self._run(decoder.upsamples, x))
            return y if self.vae.patch == 1 else unfold_patches(y)

        pixels = self._in_groups(z, self._group_length(z, self.vae.stride), run)
        return self._whole(pixels, latents_BCFHW.shape[3], self.vae.stride).permute(0, 4, 1, 2, 3)

    # ---- frames ------------------------------------------------------------------------------------------------------

    def _in_groups(self, x: Tensor, length: int, run: Callable[[Tensor], Tensor]) -> Tensor:
        """The first frame by itself, then groups of ``length``."""
        self._history.clear()
        ends = [0, *range(1, x.shape[1], length), x.shape[1]]
        parts = []
        for begin, end in pairwise(ends):
            self._first = begin == 0
            parts.append(run(x[:, begin:end].contiguous()))
        self._history.clear()
        return torch.cat(parts, dim=1)

    def _group_length(self, x: Tensor, scale: int) -> int:
        """Latent frames that go through together: as many as the rank with most rows can take, for all must take the
        same."""
        batch, _, _, columns, _ = x.shape
        rows = self.vae.stride * max(self._counts(self._total))
        one = values_of_a_frame(self.vae.widest, batch, rows, columns * scale)
        return max(1, min(MOST_VALUES, self.most_values or MOST_VALUES) // one)

    # ---- modules -----------------------------------------------------------------------------------------------------

    def _run(self, module: nn.Module, x: Tensor, before: Conv | None = None) -> Tensor:
        if before is not None:
            x = self._conv(before, x)
        if isinstance(module, nn.Sequential):
            for child in module:
                x = self._run(child, x)
            return x
        if isinstance(module, Residual):
            return self._residual(module, x)
        if isinstance(module, FrameAttention):
            return self._attention(module, x)
        if isinstance(module, Down):
            return self._down(module, x)
        if isinstance(module, DownLevel):
            return self._run(module.downsamples, x) + average_blocks(x, module.out_channels, module.time, module.space)
        if isinstance(module, UpLevel):
            y = self._run(module.upsamples, x)
            return y if module.last else y + repeat_blocks(x, module.out_channels, module.time, 2, first=self._first)
        assert isinstance(module, Up), type(module)
        return self._up(module, x)

    def _folded(self, frames: Tensor) -> Tensor:
        return frames if self.vae.patch == 1 else fold_patches(frames)

    def _residual(self, module: Residual, x: Tensor) -> Tensor:
        parts, shortcut = module.residual, module.shortcut
        y = self._conv(parts["2"], F.silu(parts["0"](x)))
        y = self._conv(parts["6"], F.silu(parts["3"](y)))
        return y + (self._conv(shortcut, x) if isinstance(shortcut, Conv) else x)

    def _head(self, head: nn.ModuleDict, x: Tensor) -> Tensor:
        return self._conv(head["2"], F.silu(head["0"](x)))

    def _attention(self, module: FrameAttention, x: Tensor) -> Tensor:
        q, k, v = self._conv(module.to_qkv, module.norm(x)).chunk(3, dim=-1)
        if self.ranks > 1:
            k, v = self._whole(torch.cat([k, v], dim=-1), self._total, 1).chunk(2, dim=-1)
        q, k, v = (value.flatten(0, 1).flatten(1, 2).unsqueeze(1) for value in (q, k, v))
        return x + self._conv(module.proj, F.scaled_dot_product_attention(q, k, v).reshape(x.shape))

    def _down(self, module: Down, x: Tensor) -> Tensor:
        x = self._conv(module.resample["1"], x)
        time = module.time_conv
        if time is None:
            return x
        if self._first:
            self._history[time] = x[:, -1:].clone()
            return x
        x = torch.cat([self._history[time], x], dim=1)
        self._history[time] = x[:, -1:].clone()
        return _convolve(time, [x[:, 0:-2:2], x[:, 1:-1:2], x[:, 2::2]])

    def _up(self, module: Up, x: Tensor) -> Tensor:
        if module.time_conv is not None and not self._first:
            pairs = self._conv(module.time_conv, x).unflatten(-1, (2, -1))
            x = pairs.permute(0, 1, 4, 2, 3, 5).flatten(1, 2)
        batch, frames, rows, columns, channels = x.shape
        x = x[:, :, :, None, :, None].expand(-1, -1, -1, 2, -1, 2, -1)
        return self._conv(module.resample["1"], x.reshape(batch, frames, 2 * rows, 2 * columns, channels))

    def _conv(self, conv: nn.Module, x: Tensor) -> Tensor:
        """One convolution over this rank's rows, its neighbours' edges and the frames before."""
        assert isinstance(conv, Conv)
        if conv.kernel[-1] == 3:
            x = self._with_edges(x, above=conv.stride == 1)
        if len(conv.kernel) == 2 or conv.kernel[0] == 1:
            return _convolve(conv, [x])
        past = self._history.get(conv)
        if past is None:
            past = x.new_zeros(x.shape[0], 2, *x.shape[2:])
        x = torch.cat([past, x], dim=1)
        self._history[conv] = x[:, -2:].clone()
        frames = x.shape[1] - 2
        return _convolve(conv, [x[:, tap : tap + frames] for tap in range(3)])

    # ---- rows --------------------------------------------------------------------------------------------------------

    def _rows(self, latent_rows: int, scale: int) -> slice:
        """This rank's rows of ``scale`` times as many."""
        if latent_rows < self.ranks:
            raise InputError(
                f"{latent_rows} latent rows cannot be shared by {self.ranks} ranks: take fewer ranks or a larger video"
            )
        self._total = latent_rows
        begin = sum(self._counts(latent_rows)[: self.rank])
        return slice(scale * begin, scale * (begin + self._counts(latent_rows)[self.rank]))

    def _counts(self, total: int) -> list[int]:
        return [total // self.ranks + (rank < total % self.ranks) for rank in range(self.ranks)]

    def _whole(self, x: Tensor, latent_rows: int, scale: int) -> Tensor:
        """Every rank's rows, one below the other."""
        if self.group is None or self.ranks == 1:
            return x
        counts = [scale * count for count in self._counts(latent_rows)]
        padded = F.pad(x, (0, 0, 0, 0, 0, max(counts) - x.shape[2]))
        parts = gather(padded[None], self.group, 0)[0]
        return torch.cat([part[:, :, :count] for part, count in zip(parts, counts, strict=True)], dim=2)

    def _with_edges(self, x: Tensor, *, above: bool) -> Tensor:
        """One row more below, and ``above``: those of the neighbours, zeros at the edges of the picture."""
        batch, frames, _, columns, channels = x.shape
        row = x.new_zeros(batch, frames, 1, columns, channels)
        top, bottom = row, row
        if self.group is not None and self.ranks > 1:
            up, down = self.rank > 0, self.rank < self.ranks - 1
            sent = [x[:, :, :1]] * up + [x[:, :, -1:]] * (above and down)
            send = torch.cat([part.flatten() for part in sent]) if sent else x.new_empty(0)
            size = row.numel()
            to, of = [0] * self.ranks, [0] * self.ranks
            if up:
                to[self.rank - 1], of[self.rank - 1] = size, size * above
            if down:
                to[self.rank + 1], of[self.rank + 1] = size * above, size
            received = x.new_empty(sum(of))
            dist.all_to_all_single(received, send, of, to, group=self.group)
            if up and above:
                top = received[:size].view(row.shape)
            if down:
                bottom = received[-size:].view(row.shape)
        return torch.cat([top, x, bottom] if above else [x, bottom], dim=2)


def values_of_a_frame(widest: int, batch: int, rows: int, columns: int) -> int:
    """Of one latent frame's widest activation, on its four pixel frames.

    Args:
        widest: ``AutoEncoder.widest``.
        rows, columns: Pixels that one rank has.
    """
    return batch * TIME_STRIDE * rows * columns * widest


def _convolve(conv: Conv, taps: list[Tensor]) -> Tensor:
    """``Conv.over_taps`` of an input whose rows have their edges already."""
    x = taps[0] if len(taps) == 1 else torch.cat(taps, dim=-1)
    batch, frames = x.shape[:2]
    weight = conv.weight.to(x.dtype)
    if weight.ndim == 5:
        weight = weight.transpose(1, 2).flatten(1, 2)
    weight = weight.contiguous(memory_format=torch.channels_last)
    x = x.flatten(0, 1).permute(0, 3, 1, 2)
    padding = conv.kernel[-1] // 2
    if conv.stride == 2:  # the published padding is one column to the right
        x, padding = F.pad(x, (0, 1)), 0
    y = F.conv2d(x, weight, conv.bias.to(x.dtype), stride=conv.stride, padding=(0, padding))
    return y.permute(0, 2, 3, 1).unflatten(0, (batch, frames))
