"""Where the VAE's training begins: colours pass straight through, everything else is random.

From random weights an autoencoder this narrow learns grey blobs first and needs thousands of steps to find its first
colour. Here the mean colour of each block of pixels goes through both halves from the start: a few channels carry
``+rgb``, ``-rgb`` and a constant 1 through every shortcut and every change of size, the heads put the pairs together
again (``silu(a) - silu(-a) = a``; the constant keeps the norm before it from losing how bright a pixel is), and what
training has left to learn is what stands inside a block.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from tiny_checkpoint.weights import random_weights
from torch import Tensor, nn

from wan_fp8.models.vae import LATENT_CHANNELS, Conv, Down, FrameAttention, Residual, Up, WanVAE

CARRIED = 7
"""Channels of the straight path: +rgb, -rgb, 1."""
BESIDE = 0.5
"""Of random weights that stand beside it, where they would widen the spread of what is carried."""
BRANCH, BRANCH_CARRIED, ATTENTION = 0.3, 0.03, 0.1
"""Of the weights that end a residual branch, of those among them that add to the path, and of attention's."""
FIRST_LOG_VARIANCE = -4.0
"""Of untrained latents: little noise, so that there is something to decode from the start."""


@torch.no_grad()
def straight_weights(vae: WanVAE, seed: int) -> dict[str, Tensor]:
    """float32 tensors under official names; ``vae`` is left with them."""
    shapes = {name: tuple(value.shape) for name, value in vae.state_dict().items()}
    vae.load_state_dict(random_weights(shapes, seed=seed, part="vae", dtype=torch.float32))
    for module in vae.modules():
        if isinstance(module, Residual):
            _through_residual(module)
        elif isinstance(module, Down):
            _average(module)
        elif isinstance(module, Up):
            _repeat(module)
        elif isinstance(module, FrameAttention):
            module.proj.weight *= ATTENTION
    for half in (vae.encoder, vae.decoder):
        _fan_out(half.conv1)
        _put_together(half.head["2"])
    for conv in (vae.conv1, vae.conv2):
        nn.init.eye_(conv.weight.view(conv.weight.shape[:2]))
        conv.bias.zero_()
    vae.conv1.bias[LATENT_CHANNELS:] = FIRST_LOG_VARIANCE
    return {name: value.detach().clone() for name, value in vae.state_dict().items()}


def _carry(conv: Conv, taps: Mapping[tuple[int, ...], float], first: int = 0) -> None:
    """The path's channels, from ``first`` on, become ``taps`` of the same channels of the input, and nothing else."""
    for channel in range(CARRIED):
        conv.weight[first + channel] = 0
        conv.bias[first + channel] = 0
        for tap, weight in taps.items():
            conv.weight[(first + channel, channel, *tap)] = weight


def _through_residual(module: Residual) -> None:
    last = module.residual["6"]
    last.weight *= BRANCH
    last.weight[:CARRIED] *= BRANCH_CARRIED / BRANCH
    last.bias.zero_()
    if isinstance(module.shortcut, Conv):
        module.shortcut.weight *= BESIDE
        module.shortcut.bias.zero_()
        _carry(module.shortcut, {(0, 0, 0): 1.0})


def _average(module: Down) -> None:
    _carry(module.resample["1"], {(row, column): 0.25 for row in (0, 1) for column in (0, 1)})
    if module.time_conv is not None:
        _carry(module.time_conv, {(1, 0, 0): 0.5, (2, 0, 0): 0.5})


def _repeat(module: Up) -> None:
    _carry(module.resample["1"], {(1, 1): 1.0})
    if module.time_conv is not None:
        for first in (0, module.time_conv.weight.shape[1]):
            _carry(module.time_conv, {(2, 0, 0): 1.0}, first)


def _fan_out(conv: Conv) -> None:
    """+rgb, -rgb and 1 of the first three channels, at the newest frame's middle tap."""
    conv.bias.zero_()
    conv.weight[:CARRIED] = 0
    for channel in range(3):
        conv.weight[channel, channel, 2, 1, 1] = 1
        conv.weight[3 + channel, channel, 2, 1, 1] = -1
    conv.bias[6] = 1


def _put_together(conv: Conv) -> None:
    """The reverse, behind a norm and a SiLU."""
    conv.weight *= BESIDE
    conv.bias.zero_()
    conv.weight[:3, :CARRIED] = 0
    for channel in range(3):
        conv.weight[channel, channel, 2, 1, 1] = 1
        conv.weight[channel, 3 + channel, 2, 1, 1] = -1
