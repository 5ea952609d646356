"""Wan2.2 Multi-GPU in a running ComfyUI, on two processes of the CPU."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pool_graphs
import torch
from headless.client import Client
from test_settings_server import run


def latent(client: Client, server: Any, prompt: dict[str, Any], gpus: int | None) -> torch.Tensor:
    """What was saved; ``gpus`` is what the live status says at every step."""
    from safetensors.torch import load_file

    seen: list[dict[str, Any]] = []
    made = client.run(prompt, lambda event: seen.append(event["data"]) if event["type"] == "wan_fp8.status" else None)
    assert seen and {(status["gpus"], status["memory_gib"]) for status in seen} == {(gpus, None)}, (
        "no memory of a GPU here"
    )
    path = next(output for output in made if output.filename.endswith(".latent"))
    return load_file(Path(server.output) / path.subfolder / path.filename)["latent_tensor"]


def test_a_graph_in_a_pool_is_the_same_graph(client: Client, server: Any) -> None:
    one = pool_graphs.graph("pool/one")
    one["3"]["inputs"] |= {"model": ["1", 0], "model_low": ["1", 1]}
    del one["9"]
    theirs = latent(client, server, one, gpus=None)
    ours = latent(client, server, pool_graphs.graph("pool/two"), gpus=2)
    assert float((ours - theirs).norm() / theirs.norm()) < 1e-4
    first = pool_graphs.workers(server.pid)
    assert len(first) == 2 and len(pool_graphs.folders(first)) == 1
    again = pool_graphs.graph("pool/three")
    again["5"]["inputs"]["seed"] = 2
    texts, _ = run(client, again)
    assert pool_graphs.workers(server.pid) == first, "the pool was not used again"
    stop = {"1": {"class_type": "WanFP8StopPool", "inputs": {}}}
    texts, _ = run(client, stop)
    assert texts["1"][-1] == "1 pool ended"
    assert not pool_graphs.workers(server.pid) and not pool_graphs.folders(first)
    began = time.monotonic()
    again["5"]["inputs"]["seed"] = 1
    again["6"]["inputs"]["filename_prefix"] = "pool/four"
    assert torch.equal(latent(client, server, again, gpus=2), ours)
    assert time.monotonic() - began < 20
    run(client, stop)


def test_text_encoder_and_vae_in_a_pool(client: Client, server: Any) -> None:
    """The node says where they run, and decoded frames are those of ComfyUI's own VAE, to a level of a PNG."""
    import numpy
    from PIL import Image

    found = []
    for prefix, pooled in (("parts_pooled", True), ("parts_alone", False)):
        texts, _ = run(client, pool_graphs.graph_with_parts(prefix, pooled))
        assert ("VAE: rows of every frame over 2 ranks" in texts["9"][-1]) is pooled
        assert ("text encoder: on CPU process 0" in texts["9"][-1]) is pooled
        paths = sorted(Path(server.output).glob(f"{prefix}*.png"))
        found.append(numpy.stack([numpy.asarray(Image.open(path)).astype(int) for path in paths]))
    assert found[0].shape == found[1].shape == (5, 32, 32, 3) and found[0].std() > 1
    assert abs(found[0] - found[1]).max() <= 1
    run(client, {"1": {"class_type": "WanFP8StopPool", "inputs": {}}})
