"""Saving nodes in a running ComfyUI: scales that a first prompt saves and later ones begin with, a checkpoint that is
saved and loaded, and refusals when a prompt is queued."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from comfy_fixtures import TASKS
from headless.client import Client
from headless.errors import RunError, ServerUnreachable
from safetensors.torch import load_file

FP8 = {"backend": "reference", "amax_history_len": 16, "amax_compute_algo": "max", "margin": 0, "keep": ""}


def graph(prefix: str, *, seed: int = 1, scales: str = "none", save: str | None = None) -> dict[str, Any]:
    """Both experts of the tiny T2V checkpoint with DelayedScaling, in 4 steps; scales saved after the sampler."""
    checkpoint = {"checkpoint": TASKS["t2v"], "low_noise": "auto", "text_encoder": "from checkpoint"}
    types = {"vae": "from checkpoint", "weight_dtype": "auto", "text_encoder_dtype": "bf16", "vae_dtype": "auto"}
    size = {"width": 32, "height": 32, "length": 5, "steps": 4, "shift": 5.0, "seed": seed, "noise": "cpu"}
    run = {"guidance": 3.0, "guidance_low": 3.0, "boundary": 0.875, "solver": "unipc", "scheduler": "official"}
    experts = {"model": ["3", 0], "model_low": ["3", 1]}
    links = {**experts, "positive": ["2", 0], "negative": ["2", 1]}
    fp8 = {"model": ["1", 0], "model_low": ["1", 1], "recipe": "DelayedScaling", "scales": scales, **FP8}
    prompt = {
        "1": {"class_type": "WanFP8LoadCheckpoint", "inputs": {**checkpoint, **types}},
        "2": {"class_type": "WanFP8TextEncode", "inputs": {"text_encoder": ["1", 2], "prompt": "a", "negative": ""}},
        "3": {"class_type": "WanFP8Recipe", "inputs": fp8},
        "4": {"class_type": "WanFP8SampleT2V", "inputs": {**links, **size, **run}},
        "6": {"class_type": "SaveLatent", "inputs": {"samples": ["4", 0], "filename_prefix": prefix}},
    }
    if save is not None:
        more = {"latent": ["4", 0], **experts, "filename": save, "overwrite": False}
        prompt["5"] = {"class_type": "WanFP8SaveScales", "inputs": more}
        prompt["6"]["inputs"]["samples"] = ["5", 0]
    return prompt


def latent(client: Client, server: Any, prompt: dict[str, Any]) -> torch.Tensor:
    """Run from nothing: no cached node, no MODEL of an earlier prompt."""
    client.request("/free", {"unload_models": True, "free_memory": True})
    for attempt in range(10):  # the server collects garbage now, and answers when it is through
        try:
            client.run(prompt)
            break
        except ServerUnreachable:
            if attempt == 9:
                raise
    files = sorted(Path(server.output).glob(f"{prompt['6']['inputs']['filename_prefix']}*.latent"))
    return load_file(files[-1])["latent_tensor"]


def test_a_first_run_saves_and_later_runs_repeat(client: Client, server: Any) -> None:
    first = latent(client, server, graph("scales-first", save="server_t2v"))
    folder = Path(server.base) / "models" / "wan_fp8_scales"
    assert sorted(path.name for path in folder.iterdir()) == [
        "server_t2v.high_noise.safetensors",
        "server_t2v.low_noise.safetensors",
    ]
    once = latent(client, server, graph("scales-a", scales="server_t2v"))
    client.run(graph("scales-other", seed=5, scales="server_t2v"))
    again = latent(client, server, graph("scales-b", scales="server_t2v"))
    assert torch.equal(once, again), "a fresh MODEL, the same bits"
    assert not torch.equal(once, first) and (once - first).norm() < 0.2 * first.norm()
    with pytest.raises(RunError, match=r"server_t2v.*exists already"):
        client.run(graph("scales-late", save="server_t2v"))


def test_a_checkpoint_is_saved_and_loaded(client: Client, server: Any) -> None:
    prompt = graph("saved-first")
    prompt["3"]["inputs"]["recipe"] = "rowwise"
    prompt["5"] = {
        "class_type": "WanFP8SaveCheckpoint",
        "inputs": {"model": ["3", 0], "model_low": ["3", 1], "filename": "server/t2v", "overwrite": False},
    }
    first = latent(client, server, prompt)
    names = [f"server/t2v_{expert}_noise.safetensors" for expert in ("high", "low")]
    folder = Path(server.base) / "models" / "diffusion_models"
    assert all((folder / name).is_file() for name in names) and len(list((folder / "server").iterdir())) == 2

    del prompt["5"]
    prompt["7"] = {**prompt["1"], "inputs": {**prompt["1"]["inputs"], "checkpoint": names[0]}}
    prompt["3"]["inputs"] |= {"model": ["7", 0], "model_low": ["7", 1]}
    prompt["6"]["inputs"]["filename_prefix"] = "saved-again"
    assert torch.equal(latent(client, server, prompt), first)
