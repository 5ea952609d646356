"""A VAE that runs in a pool of worker processes: core's VAE object around a proxy without weights, which takes no
memory of a GPU here. Everything that core's object does before and after its model (crops, ranges, tiles) stays."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import comfy.ldm.wan.vae
import comfy.ldm.wan.vae2_2
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import torch
from torch import Tensor, nn

from ...wan_fp8.checkpoint.encoders import load_vae_state_dict
from ...wan_fp8.models.vae import VAESpec, WanVAE
from ...wan_fp8.models.vae22 import VAE22Spec, Wan22VAE
from ...wan_fp8.parallel.needs import VAENeeds
from ...wan_fp8.parallel.parts import RemoteVAE
from ...wan_fp8.parallel.pools import PoolSpec
from ...wan_fp8.parallel.source import VAESource
from .vae import declared, widths_22
from .voice import say, stop_if_cancelled


class _Proxy(nn.Module):
    """The two methods that core calls."""

    def __init__(self, remote: RemoteVAE) -> None:
        super().__init__()
        self.remote = remote

    def encode(self, video_BCTHW: Tensor) -> Tensor:
        return self.remote.encode(video_BCTHW)

    def decode(self, latents_BCFHW: Tensor) -> Tensor:
        return self.remote.decode(latents_BCFHW)


class PoolVAE(comfy.sd.VAE):
    """Core's VAE of either Wan design whose model is elsewhere."""

    def __init__(self, remote: RemoteVAE, dtype: torch.dtype | None) -> None:
        """``dtype``: of the computation; None lets core choose, as for any VAE."""
        with torch.device("cpu"):
            if remote.source.version == "2.2":
                smallest = Wan22VAE(VAE22Spec(encoder_dim=1, decoder_dim=1)).state_dict()
            else:
                smallest = WanVAE(VAESpec(dim=1)).state_dict()
        with widths_22(smallest):
            super().__init__(sd=smallest, dtype=dtype)
        remote.source = replace(remote.source, dtype=self.vae_dtype)
        self.remote = remote
        self.first_stage_model = _Proxy(remote)
        self.device = torch.device("cpu")  # what goes to the pool goes from there
        self.patcher = comfy.model_patcher.ModelPatcher(self.first_stage_model, self.device, self.device)
        self.size = 0
        self.memory_used_encode = self.memory_used_decode = lambda shape, dtype: 1  # core divides by it

    def get_sd(self) -> dict[str, Tensor]:
        """The weights, for who saves them: they are not here."""
        if self.remote.state is not None:
            return dict(self.remote.state())
        return load_vae_state_dict(self.remote.source.path, self.vae_dtype).state_dict


def vae_in_pool(vae: Any, pool: PoolSpec) -> tuple[Any, str | None]:
    """A VAE like this one that runs in ``pool``. Workers read the file of our loader's; of core's, the weights are sent
    once and stay in memory here.

    Returns:
        The VAE, or the one that came in, and in that case why.
    """
    if isinstance(vae, PoolVAE):
        remote = RemoteVAE(vae.remote.source, pool, vae.remote.state)
        return _around(remote, vae.vae_dtype), None
    known = declared(vae)
    if known is not None:
        return _around(RemoteVAE(VAESource.of(known.path, version=known.version), pool), known.dtype), None
    model = getattr(vae, "first_stage_model", None)
    designs = {comfy.ldm.wan.vae.WanVAE: "2.1", comfy.ldm.wan.vae2_2.WanVAE: "2.2"}
    version = next((version for kind, version in designs.items() if isinstance(model, kind)), None)
    if version is None:
        return vae, "the VAE stays on ComfyUI's GPU: it is no Wan VAE, and a pool splits those only"
    return _around(RemoteVAE(VAESource(version=version), pool, vae.get_sd), vae.vae_dtype), None


def vae_needs(vae: Any) -> VAENeeds | None:
    """What a VAE of ``vae_in_pool`` needs of the pool's GPUs; None where it stays here."""
    return VAENeeds.of(vae.remote.source, vae.remote.state) if isinstance(vae, PoolVAE) else None


def _around(remote: RemoteVAE, dtype: torch.dtype | None) -> PoolVAE:
    remote.poll, remote.say = stop_if_cancelled, functools.partial(say, keep=True)
    return PoolVAE(remote, dtype)
