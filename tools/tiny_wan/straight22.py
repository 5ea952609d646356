"""Where the Wan2.2 VAE's training begins: as ``straight.py``, through patches and shortcuts without weights.

On the way in, the encoder's own shortcuts average pixels and, at the levels that halve time, put the frames of a pair
beside each other, so that ``+rgb``, ``-rgb`` and 1 of each of the four frames of a latent arrive apart. On the way out
the decoder's shortcuts repeat: every frame would show the last of its four. The layers that double time therefore add
to the earlier frame of a pair what it differs by. The first frame of a clip, which stands alone, passes by these
layers, and is shown as it is.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from tiny_checkpoint.weights import random_weights
from torch import Tensor, nn

from wan_fp8.models.vae import Conv, Down, FrameAttention, Residual, Up
from wan_fp8.models.vae22 import LATENT_CHANNELS_22, Wan22VAE

from .straight import ATTENTION, BESIDE, BRANCH, BRANCH_CARRIED, CARRIED, FIRST_LOG_VARIANCE

NEWEST = (2, 1, 1)
"""Tap of a 3x3x3 kernel that is the same pixel of the same frame."""
IN_LATENT = 4 * CARRIED
"""Channels of the path where the encoder ends: four frames of each of the seven."""

# The decoder's channels down to its third level, which puts channel 2n into even rows of channel n and 2n + 1 into odd
# ones: what is shown has two channels per colour.
SHOWN, ONE, EARLIER, OLDEST, OLDER = range(0, 6), range(6, 8), range(8, 11), range(11, 14), range(14, 17)
"""The last of the four frames (rgb twice), 1 (twice), and the third, the first and the second frame."""
SHOWN_CHANGE, EARLIER_CHANGE = range(17, 23), range(23, 26)
"""Empty but for what a layer that doubles time puts there for the convolution behind it."""
IN_DECODER = 26


@torch.no_grad()
def straight_weights_22(vae: Wan22VAE, seed: int) -> dict[str, Tensor]:
    """float32 tensors under official names; ``vae`` is left with them. Either half is at least 8 wide."""
    shapes = {name: tuple(value.shape) for name, value in vae.state_dict().items()}
    vae.load_state_dict(random_weights(shapes, seed=seed, part="vae", dtype=torch.float32))
    encoder, decoder = vae.encoder, vae.decoder
    for module in vae.modules():
        if isinstance(module, FrameAttention):
            module.proj.weight *= ATTENTION
        elif isinstance(module, Residual):
            _quiet(module, 0)
    for part, carried in (
        (encoder.downsamples[0], CARRIED), (encoder.downsamples[3], IN_LATENT), (encoder.middle, IN_LATENT),
        (decoder.middle, IN_DECODER), (decoder.upsamples[0], IN_DECODER), (decoder.upsamples[1], IN_DECODER),
        (decoder.upsamples[3], CARRIED),
    ):  # fmt: skip
        for module in part.modules():
            if isinstance(module, Residual):
                _quiet(module, carried)
    for level in range(3):
        _leave_to_shortcut(encoder.downsamples[level].downsamples[-1], CARRIED << level)
        _leave_to_shortcut(decoder.upsamples[level].upsamples[-1], IN_DECODER if level < 2 else 4)
    first, second = (decoder.upsamples[level].upsamples[-1] for level in (0, 1))
    _tell_frames_apart(first, zip(SHOWN, SHOWN_CHANGE, _twice(OLDER), strict=True))
    _tell_frames_apart(first, zip(EARLIER, EARLIER_CHANGE, OLDEST, strict=True))
    _tell_frames_apart(second, zip(SHOWN, SHOWN_CHANGE, _twice(EARLIER), strict=True))
    _into_encoder(encoder.conv1)
    _into_latents(encoder.head["2"])
    _out_of_latents(decoder.conv1)
    _into_pairs(decoder.upsamples[3].upsamples[0])
    _into_patches(decoder.head["2"])
    for conv in (vae.conv1, vae.conv2):
        nn.init.eye_(conv.weight.view(conv.weight.shape[:2]))
        conv.bias.zero_()
    vae.conv1.bias[LATENT_CHANNELS_22:] = FIRST_LOG_VARIANCE
    return {name: value.detach().clone() for name, value in vae.state_dict().items()}


def _twice(channels: range) -> list[int]:
    return [channel for channel in channels for _ in range(2)]


def _quiet(module: Residual, carried: int) -> None:
    """Branches that say little (``carried`` 0, once for every one), and next to nothing into the path (then)."""
    last = module.residual["6"]
    if carried:
        last.weight[:carried] *= BRANCH_CARRIED / BRANCH
    else:
        last.weight *= BRANCH
        last.bias.zero_()


def _leave_to_shortcut(module: nn.Module, carried: int) -> None:
    """What goes through a level's layers adds nothing to the path."""
    assert isinstance(module, Down | Up), type(module)
    doubled = 1 if isinstance(module, Down) else 2
    for conv, times in ((module.resample["1"], 1), (module.time_conv, doubled)):
        for half in range(times if conv is not None else 0):
            first = half * conv.weight.shape[0] // times
            conv.weight[first : first + carried] = 0
            conv.bias[first : first + carried] = 0


def _tell_frames_apart(module: Up, channels: Iterable[tuple[int, int, int]]) -> None:
    """Into the earlier frame of each pair: for (shown, change, wanted), ``wanted - shown`` is added to ``shown``."""
    for shown, change, wanted in channels:
        module.time_conv.weight[change, wanted, 2] = 1
        module.time_conv.weight[change, shown, 2] = -1
        module.resample["1"].weight[shown, change, 1, 1] = 1


def _into_encoder(conv: Conv) -> None:
    """+rgb, -rgb and 1; a colour is the mean of its patch's four channels."""
    conv.bias.zero_()
    conv.weight[:CARRIED] = 0
    for colour in range(3):
        conv.weight[(colour, slice(4 * colour, 4 * colour + 4), *NEWEST)] = 0.25
        conv.weight[(3 + colour, slice(4 * colour, 4 * colour + 4), *NEWEST)] = -0.25
    conv.bias[6] = 1


def _place(frame: int) -> int:
    """Where the encoder's shortcuts put a frame: by its place in the pair, then by the pair."""
    return 2 * (frame % 2) + frame // 2


def _into_latents(conv: Conv) -> None:
    """Latent channel 3 f + c is colour c of frame f."""
    conv.weight *= BESIDE
    conv.bias.zero_()
    conv.weight[:12, :IN_LATENT] = 0
    for frame in range(4):
        for colour in range(3):
            conv.weight[(3 * frame + colour, 4 * colour + _place(frame), *NEWEST)] = 1
            conv.weight[(3 * frame + colour, 4 * (3 + colour) + _place(frame), *NEWEST)] = -1


def _out_of_latents(conv: Conv) -> None:
    conv.bias.zero_()
    conv.weight[:IN_DECODER] = 0
    for channels, frame in ((SHOWN, 3), (EARLIER, 2), (OLDER, 1), (OLDEST, 0)):
        for index, channel in enumerate(channels):
            colour = index // 2 if channels is SHOWN else index
            conv.weight[(channel, 3 * frame + colour, *NEWEST)] = 1
    conv.bias[list(ONE)] = 1


def _into_pairs(module: Residual) -> None:
    """+rgb, -rgb and 1 again, for the head."""
    conv = module.shortcut
    conv.weight *= BESIDE
    conv.bias.zero_()
    conv.weight[:CARRIED] = 0
    for channel in range(4):
        conv.weight[6 if channel == 3 else channel, channel] = 1
    for colour in range(3):
        conv.weight[3 + colour, colour] = -1


def _into_patches(conv: Conv) -> None:
    """The same colour in each of a patch's four pixels."""
    conv.weight *= BESIDE
    conv.bias.zero_()
    conv.weight[:, :CARRIED] = 0
    for colour in range(3):
        conv.weight[(slice(4 * colour, 4 * colour + 4), colour, *NEWEST)] = 1
        conv.weight[(slice(4 * colour, 4 * colour + 4), 3 + colour, *NEWEST)] = -1
