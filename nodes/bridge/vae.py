"""Core's VAE object for the VAEs of Wan2.1 (T2V, I2V) and Wan2.2 (TI2V)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.ldm.wan.vae2_2
import comfy.sd
import torch
from torch import Tensor

from ...wan_fp8.errors import CheckpointError

_MARK_21 = "decoder.middle.0.residual.0.gamma"
_MARK_22 = "decoder.upsamples.0.upsamples.0.residual.2.weight"
PUBLISHED_22 = (160, 256)
"""Channels of the encoder and the decoder of the Wan2.2 VAE."""


def load_vae(weights: Mapping[str, Tensor], *, dtype: torch.dtype | None = None) -> Any:
    """A core VAE from weights under the official names; 2.1 or 2.2 is seen from the names, every width from the shapes.

    Args:
        dtype: Computation type; None lets core choose (bf16 on most GPUs; the official code computes in fp32).
    Raises:
        CheckpointError: not the weights of a Wan VAE.
    """
    if _MARK_21 not in weights:
        raise CheckpointError(
            "this file holds no Wan VAE: give the Wan2.1 VAE for T2V and I2V, the Wan2.2 VAE for TI2V"
        )
    with widths_22(weights):
        vae = comfy.sd.VAE(sd=dict(weights), dtype=dtype)
    missing = sorted(vae.first_stage_model.state_dict().keys() - weights.keys())
    if missing:  # core's loader only logs them
        raise CheckpointError(
            f"the VAE file is incomplete: {len(missing)} weights are missing, {missing[0]!r} for one; download it again"
        )
    return vae


@dataclass(frozen=True, slots=True)
class Declared:
    """What is known of a VAE without reading it."""

    path: Path
    version: str
    """``2.1`` or ``2.2``."""
    dtype: torch.dtype | None
    """Computation type; None: core's choice."""


def lazy_vae(
    read: Callable[[], Mapping[str, Tensor]],
    *,
    dtype: torch.dtype | None = None,
    path: Path | None = None,
    version: str = "",
) -> Any:
    """A core VAE whose weights are read when something first asks it for anything.

    Args:
        read: Gives the weights under the official names; called once.
        dtype: As for ``load_vae``.
        path: The file that ``read`` reads, so that others can read it for themselves; ``version`` is then its.
    """
    return _LazyVAE(read, dtype, None if path is None else Declared(path, version, dtype))


def declared(vae: Any) -> Declared | None:
    """What our loader said of a VAE; asking loads nothing. None: another loader's."""
    return vae.__dict__.get("_declared") if isinstance(vae, _LazyVAE) else None


class _LazyVAE(comfy.sd.VAE):
    """Has no attribute of its own until the first one is asked for; then it is what ``load_vae`` makes."""

    def __init__(
        self, read: Callable[[], Mapping[str, Tensor]], dtype: torch.dtype | None, known: Declared | None
    ) -> None:
        self.__dict__["_pending"], self.__dict__["_declared"] = (read, dtype), known

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "_pending" not in self.__dict__:
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        read, dtype = self.__dict__["_pending"]
        loaded = load_vae(read(), dtype=dtype)
        self.__dict__.update(loaded.__dict__)
        del self.__dict__["_pending"]
        return getattr(self, name)

    def get_ram_usage(self) -> int:
        """Asked by core of everything that it caches, which is no reason to load."""
        return 0 if "_pending" in self.__dict__ else super().get_ram_usage()


@contextlib.contextmanager
def widths_22(weights: Mapping[str, Tensor]) -> Iterator[None]:
    """While active, core's VAE loader builds its Wan2.2 VAE with the widths of ``weights``: by itself it knows the
    published ones only. Those, and weights of another VAE, change nothing."""
    names = ("encoder.conv1.weight", "decoder.head.0.gamma")
    encoder, decoder = (int(weights[name].shape[0]) if _MARK_22 in weights else 0 for name in names)
    if (encoder, decoder) in ((0, 0), PUBLISHED_22):
        yield
        return
    module = comfy.ldm.wan.vae2_2
    original = module.WanVAE

    def build(**config: Any) -> Any:
        return original(**{**config, "dim": encoder, "dec_dim": decoder})

    module.WanVAE = build
    try:
        yield
    finally:
        module.WanVAE = original
