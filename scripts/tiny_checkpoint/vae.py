"""Names and shapes of the two Wan VAEs at any width, and the Diffusers names of the same tensors.

Source: Wan-Video/Wan2.2 ``wan/modules/vae2_1.py`` and ``vae2_2.py``; huggingface/diffusers
``scripts/convert_wan_to_diffusers.py``.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from typing import Any

Shapes = dict[str, tuple[int, ...]]

DIM_MULT = (1, 2, 4, 4)
RES_BLOCKS = 2
"""In the encoder; the decoder has one more a level."""
TIME_DOWN = (False, True, True)
"""Whether the encoder's levels halve time; the decoder doubles it in the reverse order."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VaeSize:
    """Published: 2.1 has 96 and 96 channels and 16 of latents, 2.2 has 160, 256 and 48."""

    version: str
    encoder_dim: int
    decoder_dim: int
    latent_channels: int
    image_channels: int
    """3; in 2.2 twelve, since 2x2 pixels are folded into channels."""


VAE_21 = VaeSize(version="2.1", encoder_dim=8, decoder_dim=8, latent_channels=16, image_channels=3)
VAE_22 = VaeSize(version="2.2", encoder_dim=8, decoder_dim=12, latent_channels=48, image_channels=12)


def shapes(size: VaeSize) -> Shapes:
    """Every tensor under its official name."""
    z = size.latent_channels
    result: Shapes = {}
    _encoder(result, size)
    _conv(result, "conv1", 2 * z, 2 * z, (1, 1, 1))
    _conv(result, "conv2", z, z, (1, 1, 1))
    _decoder(result, size)
    return result


def _conv(out: Shapes, name: str, out_channels: int, in_channels: int, kernel: tuple[int, ...]) -> None:
    out[f"{name}.weight"] = (out_channels, in_channels, *kernel)
    out[f"{name}.bias"] = (out_channels,)


def _residual(out: Shapes, name: str, in_channels: int, out_channels: int) -> None:
    out[f"{name}.residual.0.gamma"] = (in_channels, 1, 1, 1)
    _conv(out, f"{name}.residual.2", out_channels, in_channels, (3, 3, 3))
    out[f"{name}.residual.3.gamma"] = (out_channels, 1, 1, 1)
    _conv(out, f"{name}.residual.6", out_channels, out_channels, (3, 3, 3))
    if in_channels != out_channels:
        _conv(out, f"{name}.shortcut", out_channels, in_channels, (1, 1, 1))


def _middle(out: Shapes, name: str, channels: int) -> None:
    _residual(out, f"{name}.0", channels, channels)
    out[f"{name}.1.norm.gamma"] = (channels, 1, 1)
    _conv(out, f"{name}.1.to_qkv", 3 * channels, channels, (1, 1))
    _conv(out, f"{name}.1.proj", channels, channels, (1, 1))
    _residual(out, f"{name}.2", channels, channels)


def _head(out: Shapes, name: str, in_channels: int, out_channels: int) -> None:
    out[f"{name}.0.gamma"] = (in_channels, 1, 1, 1)
    _conv(out, f"{name}.2", out_channels, in_channels, (3, 3, 3))


def _encoder(out: Shapes, size: VaeSize) -> None:
    widths = [size.encoder_dim * m for m in (1, *DIM_MULT)]
    _conv(out, "encoder.conv1", widths[0], size.image_channels, (3, 3, 3))
    flat = 0
    for level, (before, width) in enumerate(itertools.pairwise(widths)):
        for index in range(RES_BLOCKS + (level < len(DIM_MULT) - 1)):
            nested = f"encoder.downsamples.{level}.downsamples.{index}"
            name = nested if size.version == "2.2" else f"encoder.downsamples.{flat}"
            flat += 1
            if index < RES_BLOCKS:
                _residual(out, name, before if index == 0 else width, width)
                continue
            _conv(out, f"{name}.resample.1", width, width, (3, 3))
            if TIME_DOWN[level]:
                _conv(out, f"{name}.time_conv", width, width, (3, 1, 1))
    _middle(out, "encoder.middle", widths[-1])
    _head(out, "encoder.head", widths[-1], 2 * size.latent_channels)


def _decoder(out: Shapes, size: VaeSize) -> None:
    widths = [size.decoder_dim * m for m in (DIM_MULT[-1], *reversed(DIM_MULT))]
    _conv(out, "decoder.conv1", widths[0], size.latent_channels, (3, 3, 3))
    _middle(out, "decoder.middle", widths[0])
    flat = 0
    for level, (before, width) in enumerate(itertools.pairwise(widths)):
        # 2.1's upsampling halves the channels on the way out; 2.2 keeps them.
        incoming = before // 2 if size.version == "2.1" and level else before
        for index in range(RES_BLOCKS + 1 + (level < len(DIM_MULT) - 1)):
            nested = f"decoder.upsamples.{level}.upsamples.{index}"
            name = nested if size.version == "2.2" else f"decoder.upsamples.{flat}"
            flat += 1
            if index <= RES_BLOCKS:
                _residual(out, name, incoming if index == 0 else width, width)
                continue
            _conv(out, f"{name}.resample.1", width // 2 if size.version == "2.1" else width, width, (3, 3))
            if TIME_DOWN[::-1][level]:
                _conv(out, f"{name}.time_conv", 2 * width, width, (3, 1, 1))
    _head(out, "decoder.head", widths[-1], size.image_channels)


_RESIDUAL_NAMES = {
    "residual.0.gamma": "norm1.gamma",
    "residual.2.": "conv1.",
    "residual.3.gamma": "norm2.gamma",
    "residual.6.": "conv2.",
    "shortcut.": "conv_shortcut.",
}
_MIDDLE_NAMES = {"0": "resnets.0", "1": "attentions.0", "2": "resnets.1"}


def diffusers_name(name: str, size: VaeSize) -> str:
    """The Diffusers name of an official one."""
    for ours, theirs in (("conv1.", "quant_conv."), ("conv2.", "post_quant_conv.")):
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    half, _, rest = name.partition(".")
    for ours, theirs in (("conv1.", "conv_in."), ("head.0.", "norm_out."), ("head.2.", "conv_out.")):
        if rest.startswith(ours):
            return f"{half}.{theirs}{rest.removeprefix(ours)}"
    if match := re.match(r"middle\.(\d)\.", rest):
        rest = f"mid_block.{_MIDDLE_NAMES[match[1]]}.{rest[match.end() :]}"
    elif size.version == "2.2":
        rest = _nested_name(rest)
    else:
        rest = _flat_name(rest)
    for ours, theirs in _RESIDUAL_NAMES.items():
        rest = rest.replace(ours, theirs)
    return f"{half}.{rest}"


def _nested_name(rest: str) -> str:
    match = re.match(r"(down|up)samples\.(\d)\.(?:down|up)samples\.(\d)\.(.*)", rest)
    assert match is not None, rest
    way, level, index, tail = match.groups()
    member = f"{way}sampler" if tail.startswith(("resample", "time_conv")) else f"resnets.{index}"
    return f"{way}_blocks.{level}.{member}.{tail}"


def _flat_name(rest: str) -> str:
    match = re.match(r"(down|up)samples\.(\d+)\.(.*)", rest)
    assert match is not None, rest
    way, index, tail = match[1], int(match[2]), match[3]
    if way == "down":
        return f"down_blocks.{index}.{tail}"
    level, member = divmod(index, RES_BLOCKS + 2)
    place = f"resnets.{member}" if member <= RES_BLOCKS else "upsamplers.0"
    return f"up_blocks.{level}.{place}.{tail}"


_MEAN_21 = (
    *(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508),
    *(0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
)
_STD_21 = (
    *(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743),
    *(3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160),
)
_MEAN_22 = (
    *(-0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557),
    *(-0.1382, 0.0542, 0.2813, 0.0891, 0.157, -0.0098, 0.0375, -0.1825),
    *(-0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502),
    *(-0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.123),
    *(-0.0313, -0.1649, 0.0117, 0.0723, -0.2839, -0.2083, -0.052, 0.3748),
    *(0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667),
)
_STD_22 = (
    *(0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.499, 0.4818, 0.5013),
    *(0.8158, 1.0344, 0.5894, 1.0901, 0.6885, 0.6165, 0.8454, 0.4978),
    *(0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659),
    *(0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093),
    *(0.5709, 0.6065, 0.6415, 0.4944, 0.5726, 1.2042, 0.5458, 1.6887),
    *(0.3971, 1.06, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744),
)


def diffusers_config(size: VaeSize) -> dict[str, Any]:
    """``vae/config.json`` of a Diffusers folder, with the published statistics of the latents."""
    common: dict[str, Any] = {
        "_class_name": "AutoencoderKLWan",
        "_diffusers_version": "0.35.0",
        "base_dim": size.encoder_dim,
        "z_dim": size.latent_channels,
        "dim_mult": list(DIM_MULT),
        "num_res_blocks": RES_BLOCKS,
        "attn_scales": [],
        "temperal_downsample": list(TIME_DOWN),
        "dropout": 0.0,
    }
    if size.version == "2.1":
        return common | {"latents_mean": list(_MEAN_21), "latents_std": list(_STD_21)}
    return common | {
        "decoder_base_dim": size.decoder_dim,
        "is_residual": True,
        "in_channels": size.image_channels,
        "out_channels": size.image_channels,
        "patch_size": 2,
        "scale_factor_spatial": 16,
        "scale_factor_temporal": 4,
        "latents_mean": list(_MEAN_22),
        "latents_std": list(_STD_22),
    }
