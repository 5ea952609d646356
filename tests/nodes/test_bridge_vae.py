"""Core's VAE object for small and published widths of both Wan VAEs; incomplete and foreign files are named."""

from __future__ import annotations

import bridge_kit as kit
import pytest
import torch

pytestmark = pytest.mark.usefixtures("comfy_core")


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield
    kit.unload_everything()


def vae_weights(version, seed=0, **sizes):
    """Random weights under the official names."""
    import comfy.ldm.wan.vae
    import comfy.ldm.wan.vae2_2

    common = dict(dim_mult=[1, 2, 4, 4], num_res_blocks=2, temperal_downsample=[False, True, True])
    if version == "2.1":
        net = comfy.ldm.wan.vae.WanVAE(z_dim=16, **{"dim": 8, **sizes}, **common)
    else:
        net = comfy.ldm.wan.vae2_2.WanVAE(z_dim=48, **{"dim": 16, "dec_dim": 24, **sizes}, **common)
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.ones_like(value)
        if name.endswith("gamma")
        else torch.randn(value.shape, generator=generator) * 0.5 / max(1, value[0].numel()) ** 0.5
        for name, value in net.state_dict().items()
    }


@pytest.mark.parametrize(("version", "stride", "channels"), [("2.1", 8, 16), ("2.2", 16, 48)])
def test_encode_and_decode(version, stride, channels):
    weights = vae_weights(version)
    vae = kit.bridge().load_vae(weights)
    assert vae.latent_channels == channels
    saved = vae.get_sd()
    assert saved.keys() == weights.keys() and all(torch.equal(saved[k].float(), weights[k]) for k in weights)
    pixels = torch.rand(5, 2 * stride, 4 * stride, 3, generator=torch.Generator().manual_seed(1))
    latents = vae.encode(pixels)
    assert latents.shape == (1, channels, 2, 2, 4)
    assert vae.decode(latents).shape == (1, 5, 2 * stride, 4 * stride, 3)


def test_small_22_equals_cores_class():
    import comfy.ldm.wan.vae2_2 as module

    original, weights = module.WanVAE, vae_weights("2.2")
    net = module.WanVAE(
        dim=16, dec_dim=24, z_dim=48, dim_mult=[1, 2, 4, 4], num_res_blocks=2, temperal_downsample=[False, True, True]
    )
    net.load_state_dict(weights)
    vae = kit.bridge().load_vae(weights)
    assert module.WanVAE is original, "core must be left as it was"
    latents = torch.randn(1, 48, 2, 2, 2, generator=torch.Generator().manual_seed(2))
    expected = (net.decode(latents) / 2 + 0.5).clamp(0, 1).movedim(1, -1)
    assert kit.distance(vae.decode(latents), expected) < (1e-5 if vae.vae_dtype == torch.float32 else 5e-2)


def test_core_is_left_as_it_was_when_loading_fails():
    import comfy.ldm.wan.vae2_2 as module

    original, weights = module.WanVAE, vae_weights("2.2")
    weights["decoder.conv1.weight"] = torch.zeros(1)
    with pytest.raises(RuntimeError, match=r"decoder\.conv1\.weight"):
        kit.bridge().load_vae(weights)
    assert module.WanVAE is original


def test_published_22_widths_go_to_core_as_they_are(monkeypatch):
    import comfy.sd

    seen = {}

    class Stop(Exception):
        pass

    def vae(sd, dtype=None):
        seen["class"] = comfy.ldm.wan.vae2_2.WanVAE
        raise Stop

    original = comfy.ldm.wan.vae2_2.WanVAE
    monkeypatch.setattr(comfy.sd, "VAE", vae)
    marks = {
        "decoder.middle.0.residual.0.gamma": torch.ones(1),
        "decoder.upsamples.0.upsamples.0.residual.2.weight": torch.ones(1),
        "encoder.conv1.weight": torch.ones(160, 1),
        "decoder.head.0.gamma": torch.ones(256, 1),
    }
    with pytest.raises(Stop):
        kit.bridge().load_vae(marks)
    assert seen["class"] is original


def test_incomplete_and_foreign_files_are_refused():
    bridge, errors = kit.bridge(), kit.engine("errors")
    weights = vae_weights("2.1")
    del weights["decoder.conv1.bias"]
    with pytest.raises(errors.CheckpointError, match=r"incomplete: 1 weights are missing, 'decoder\.conv1\.bias'"):
        bridge.load_vae(weights)
    with pytest.raises(errors.CheckpointError, match="no Wan VAE"):
        bridge.load_vae(kit.core_weights())
