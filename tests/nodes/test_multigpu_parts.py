"""Text encoder and VAE through Wan2.2 Multi-GPU: core's VAE nodes and the rows of one process, and no memory here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nodes_kit
import pytest
import torch
from nodes_kit import call
from torch import Tensor

pytestmark = [pytest.mark.usefixtures("comfy_core", "inference", "pools_end"), pytest.mark.timeout(120)]
TOLERANCE = 1e-4
"""Of 0..1, or of latents of about 1: fp32 through thirty layers, sums in another order."""


def load(folder: Path, checkpoint: Path) -> Any:
    """What the loader returns for a tiny checkpoint."""
    import folder_paths

    name = f"parts_{checkpoint.name}"
    if not (folder / name).exists():
        (folder / name).symlink_to(checkpoint, target_is_directory=True)
    nodes_kit.load_pack()
    folder_paths.add_model_folder_path("wan", str(folder))
    with torch.inference_mode():
        return call("WanFP8LoadCheckpoint", checkpoint=name, vae_dtype="fp32").args


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("parts")


@pytest.fixture(scope="module")
def t2v(comfy_core: Path, folder: Path, checkpoints: dict[str, Path]) -> Any:
    return load(folder, checkpoints["t2v"])


def in_pool(loaded: Any, **more: Any) -> Any:
    """The node's output."""
    given = {"model": loaded[0], "model_low": loaded[1], "text_encoder": loaded[2], "vae": loaded[3], **more}
    with torch.inference_mode():
        return call(
            "WanFP8MultiGPU", gpus="cpu:2", **{name: value for name, value in given.items() if value is not None}
        )


@pytest.fixture(scope="module")
def many(t2v: Any) -> Any:
    return in_pool(t2v).args


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2))


def close(ours: Tensor, theirs: Tensor) -> None:
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    assert float((ours - theirs).abs().max()) < TOLERANCE and float(theirs.std()) > 1e-2


def test_cores_vae_nodes_take_it(t2v: Any, many: Any) -> None:
    import nodes

    ours, theirs = many[3], t2v[3]
    assert "_pending" in theirs.__dict__, "the VAE was read in this process"
    latents, images = {"samples": noise(1, 16, 3, 5, 4)}, noise(6, 37, 24, 3).sigmoid()
    close(*(nodes.VAEDecode().decode(vae, latents)[0] for vae in (ours, theirs)))
    close(*(nodes.VAEEncode().encode(vae, images)[0]["samples"] for vae in (ours, theirs)))
    close(*(nodes.VAEDecode().decode(vae, {"samples": noise(2, 16, 1, 4, 4)})[0] for vae in (ours, theirs)))
    large, tiles = {"samples": noise(1, 16, 2, 12, 9)}, (64, 16, 8, 4)
    close(*(nodes.VAEDecodeTiled().decode(vae, large, *tiles)[0] for vae in (ours, theirs)))
    close(
        *(
            nodes.VAEEncodeTiled().encode(vae, noise(5, 80, 64, 3).sigmoid(), 64, 16, 8)[0]["samples"]
            for vae in (ours, theirs)
        )
    )
    assert ours.vae_dtype == theirs.vae_dtype == torch.float32
    for name in (
        "latent_channels",
        "upscale_index_formula",
        "downscale_index_formula",
        "output_channels",
        "latent_dim",
    ):
        assert getattr(ours, name) == getattr(theirs, name)
    saved, wanted = ours.get_sd(), theirs.get_sd()
    assert saved.keys() == wanted.keys() and all(torch.equal(saved[name], wanted[name]) for name in wanted)


def test_it_takes_no_memory_and_moves_nobody_here(many: Any) -> None:
    import comfy.model_management as management

    vae = many[3]
    vae.decode(noise(1, 16, 1, 2, 2))
    assert vae.model_size() == vae.get_ram_usage() == vae.patcher.model_size() == vae.patcher.loaded_size() == 0
    assert vae.memory_used_decode([1, 16, 21, 90, 160], torch.bfloat16) == 1 and str(vae.device) == "cpu"
    assert not list(vae.first_stage_model.parameters())
    management.unload_all_models()
    assert vae.decode(noise(1, 16, 1, 2, 2)).isfinite().all()


def test_text_rows_are_the_same_bits_and_kept_here(t2v: Any, many: Any) -> None:
    encoder, cache = many[2], nodes_kit.module("nodes.encoder").CACHE
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as a worker on a CPU
    try:
        rows = []
        for given in (encoder, t2v[2]):
            cache.clear()
            rows.append(call("WanFP8TextEncode", text_encoder=given, prompt="a fox", negative="rain " * 600).args)
        for ours, theirs in zip(*rows, strict=True):
            assert torch.equal(ours[0][0], theirs[0][0]) and ours[0][0].abs().sum() > 0
    finally:
        torch.set_num_threads(threads)
    assert not encoder.loaded, "the encoder was read in this process"
    encoder.remote, before = None, encoder.remote
    try:
        assert torch.equal(encoder.encode("a fox").rows, rows[0][0][0][0]), "a prompt that is kept was encoded again"
    finally:
        encoder.remote = before


def test_a_text_encoder_that_does_not_fit_one_gpu_is_shared(
    t2v: Any, many: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = nodes_kit.module("wan_fp8.parallel.plan")
    remote, cache = nodes_kit.module("wan_fp8.parallel.remote").Remote, nodes_kit.module("nodes.encoder").CACHE
    monkeypatch.setattr(remote, "text_place", lambda self, pool, dims: plan.TextPlace.SHARED)
    output = in_pool(t2v)
    assert "text encoder: shared by 2 ranks" in output.ui.value.splitlines()
    cache.clear()
    there = output.args[2].encode("a fox")
    cache.clear()
    assert torch.equal(there.rows, many[2].encode("a fox").rows)


def test_a_vae_of_cores_loader_hands_its_weights_over(t2v: Any, many: Any, checkpoints: dict[str, Path]) -> None:
    import comfy.sd

    weights = nodes_kit.module("wan_fp8.checkpoint.encoders").load_vae_state_dict(checkpoints["t2v"]).state_dict
    theirs = comfy.sd.VAE(sd=dict(weights))
    ours = in_pool(t2v, vae=theirs).args[3]
    latents = noise(1, 16, 2, 4, 4)
    close(ours.decode(latents), theirs.decode(latents))
    again = in_pool(t2v, vae=ours).args[3]
    assert again is not ours and torch.equal(again.decode(latents), ours.decode(latents))
    assert ours.get_sd().keys() == weights.keys()


@pytest.fixture(scope="module")
def five(comfy_core: Path, folder: Path, checkpoints: dict[str, Path]) -> Any:
    return load(folder, checkpoints["ti2v"])


def test_the_wan22_vae_is_split_too(t2v: Any, five: Any) -> None:
    """Five latent rows over two ranks, one frame alone, tiles; of our loader's file and of weights handed over."""
    import nodes

    output, theirs = in_pool(five, model_low=None), five[3]
    ours = output.args[3]
    assert output.ui.value.splitlines()[-1] == "VAE: rows of every frame over 2 ranks, float32"
    assert "_pending" in theirs.__dict__, "the VAE was read in this process"
    latents, images = {"samples": noise(1, 48, 3, 5, 2)}, noise(6, 85, 48, 3).sigmoid()
    close(*(nodes.VAEDecode().decode(vae, latents)[0] for vae in (ours, theirs)))
    close(*(nodes.VAEEncode().encode(vae, images)[0]["samples"] for vae in (ours, theirs)))
    large, tiles = {"samples": noise(1, 48, 2, 6, 5)}, (64, 16, 8, 4)
    close(*(nodes.VAEDecodeTiled().decode(vae, large, *tiles)[0] for vae in (ours, theirs)))
    handed = in_pool(t2v, vae=nodes_kit.module("nodes.bridge").load_vae(theirs.get_sd(), dtype=torch.float32)).args[3]
    close(handed.decode(noise(1, 48, 2, 3, 2)), theirs.decode(noise(1, 48, 2, 3, 2)))
    for name in ("latent_channels", "upscale_index_formula", "downscale_index_formula", "latent_dim", "vae_dtype"):
        assert getattr(ours, name) == getattr(theirs, name)
    with pytest.raises(nodes_kit.module("wan_fp8.errors").InputError, match=r"Wan2\.2 VAE decodes \[clips, 48"):
        ours.decode(noise(1, 16, 1, 2, 2))


def test_what_a_pool_does_not_split_goes_through_and_the_node_says_so(t2v: Any) -> None:
    other = object()
    output = in_pool(t2v, vae=other)
    said = output.ui.value.splitlines()
    assert "text encoder: on CPU process 0" in said
    assert output.args[3] is other
    assert said[-1] == "the VAE stays on ComfyUI's GPU: it is no Wan VAE, and a pool splits those only"


def test_what_is_not_connected_or_not_there_says_why_when_it_is_used(t2v: Any) -> None:
    missing, errors = nodes_kit.module("nodes.missing"), nodes_kit.module("wan_fp8.errors")
    _, _, encoder, vae = in_pool(t2v, text_encoder=None, vae=None).args
    with pytest.raises(missing.MissingPartError, match="only when 'text_encoder' is connected"):
        call("WanFP8TextEncode", text_encoder=encoder, prompt="a")
    with pytest.raises(missing.MissingPartError, match="only when 'vae' is connected"):
        vae.decode(noise(1, 16, 1, 2, 2))
    gone = missing.Missing("no such file")
    _, _, encoder, vae = in_pool(t2v, text_encoder=gone, vae=gone).args
    assert encoder is gone and vae is gone
    with pytest.raises(errors.CheckpointError, match="takes the WAN_TEXT_ENCODER of Load"):
        in_pool(t2v, text_encoder=object())
    handle = nodes_kit.module("nodes.encoder").TextEncoderHandle(lambda: None, "x", "tiny")
    with pytest.raises(errors.InputError, match="tiny has no file that a pool's processes could read"):
        in_pool(t2v, text_encoder=handle)


def test_cancelled_in_a_decode(many: Any) -> None:
    import comfy.model_management as management

    vae = many[3]
    right = vae.decode(noise(1, 16, 1, 2, 2))
    management.interrupt_current_processing()
    with pytest.raises(management.InterruptProcessingException):
        vae.decode(noise(1, 16, 1, 2, 2))
    assert torch.equal(vae.decode(noise(1, 16, 1, 2, 2)), right)
