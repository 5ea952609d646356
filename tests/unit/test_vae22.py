"""The engine's Wan2.2 VAE, whole clips at once, against core's streaming class; its loader."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from wan_fp8.errors import CheckpointError
from wan_fp8.models.vae import LATENTS_MEAN_22, LATENTS_STD_22, denormalize_latents, normalize_latents
from wan_fp8.models.vae22 import VAE22Spec, Wan22VAE, load_vae22


@pytest.fixture(scope="module")
def core(comfy_core: Path) -> Any:
    """Core's class with random weights."""
    import comfy.ldm.wan.vae2_2

    net = comfy.ldm.wan.vae2_2.WanVAE(
        dim=8, dec_dim=12, z_dim=48, dim_mult=[1, 2, 4, 4], num_res_blocks=2, temperal_downsample=[False, True, True]
    )
    generator = torch.Generator().manual_seed(0)
    net.load_state_dict(
        {
            name: torch.rand(value.shape, generator=generator) + 0.5
            if name.endswith("gamma")
            else torch.randn(value.shape, generator=generator) / max(1, value[0].numel()) ** 0.5
            for name, value in net.state_dict().items()
        }
    )
    return net.eval()


@pytest.mark.parametrize(("frames", "height", "width"), [(1, 32, 48), (5, 48, 32), (9, 32, 64)])
def test_equals_core(core: Any, frames: int, height: int, width: int) -> None:
    ours = load_vae22(core.state_dict())
    video = 2 * torch.rand(2, 3, frames, height, width, generator=torch.Generator().manual_seed(1)) - 1
    with torch.no_grad():
        wanted = core.encode(video)
        latents = ours.encode(video)
        torch.testing.assert_close(latents, wanted, rtol=0, atol=1e-4)
        torch.testing.assert_close(ours.decode(wanted), core.decode(wanted), rtol=0, atol=1e-4)
    assert latents.shape == (2, 48, (frames - 1) // 4 + 1, height // 16, width // 16)


def test_every_weight_learns() -> None:
    torch.manual_seed(0)
    vae = Wan22VAE(VAE22Spec(encoder_dim=8, decoder_dim=8))
    for parameter in vae.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
        parameter.requires_grad_(True)
    video = torch.rand(1, 3, 5, 32, 32)
    mean, log_variance = vae.moments(video)
    ((vae.decode(mean) - video).square().mean() + log_variance.square().mean()).backward()
    without = [name for name, p in vae.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not without


def test_statistics_are_cores(comfy_core: Path) -> None:
    import comfy.latent_formats

    theirs = comfy.latent_formats.Wan22()
    assert theirs.latents_mean.flatten().tolist() == pytest.approx(LATENTS_MEAN_22)
    assert theirs.latents_std.flatten().tolist() == pytest.approx(LATENTS_STD_22)
    latents = torch.randn(1, 48, 2, 4, 4)
    torch.testing.assert_close(normalize_latents(latents), theirs.process_in(latents))
    torch.testing.assert_close(denormalize_latents(latents), theirs.process_out(latents))


def test_loads_a_checkpoint_folder(checkpoints: dict[str, Path]) -> None:
    vae = load_vae22(checkpoints["ti2v"])
    stored = torch.load(checkpoints["ti2v"] / "Wan2.2_VAE.pth", weights_only=True)
    assert {name: tuple(p.shape) for name, p in vae.named_parameters()} == {
        name: tuple(tensor.shape) for name, tensor in stored.items()
    }
    assert not vae.training and not any(p.requires_grad for p in vae.parameters())


def test_refusals(core: Any, checkpoints: dict[str, Path]) -> None:
    with pytest.raises(CheckpointError, match=r"Wan2\.1 VAE"):
        load_vae22(checkpoints["t2v"])
    with pytest.raises(CheckpointError, match=r"decoder\.head\.0\.gamma is missing; use Wan2\.2_VAE"):
        load_vae22({})
    partial = core.state_dict()
    del partial["encoder.downsamples.0.downsamples.2.resample.1.bias"]
    with pytest.raises(CheckpointError, match=r"not a Wan2\.2 VAE \(encoder\.downsamples\.0"):
        load_vae22(partial)
