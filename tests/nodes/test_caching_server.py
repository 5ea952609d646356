"""Step caching in a running ComfyUI: what users see on the nodes, a curve measured and found again, refusals."""

from __future__ import annotations

from typing import Any

import pytest
from headless.client import Client
from headless.errors import ExecutionFailed
from test_settings_server import graph as attention_graph
from test_settings_server import run

CHOICES = {"preset": "E012K2R20", "threshold": 0.12, "max_skips": 2, "retention": 0.2}
CHOICES |= {"curve": "published", "phase": "in_phase", "policy": "magcache", "reuse": "keep"}


def graph(prefix: str, steps: int = 12, **choices: Any) -> dict[str, Any]:
    """Both experts of the tiny T2V checkpoint through Wan2.2 MagCache."""
    prompt = attention_graph(prefix)
    prompt["4"] = {
        "class_type": "WanFP8MagCache",
        "inputs": {"model": ["1", 0], "model_low": ["1", 1], **CHOICES, **choices},
    }
    del prompt["3"]
    prompt["5"]["inputs"] |= {"model_low": ["4", 1], "steps": steps, "shift": 12.0, "boundary": 0.875}
    prompt["5"]["inputs"] |= {"guidance": 3.0, "guidance_low": 3.0}
    return prompt


def test_what_was_chosen_and_what_became_of_it_is_shown(client: Client) -> None:
    texts, outputs = run(client, graph("caching/a"))
    for shown in (texts["4"][-1], outputs["4"]["text"][0]):
        assert "MagCache: threshold 0.12, at most 2 skipped steps in a row" in shown
        assert "curve: published t2v-A14B, although the curve" in shown
    for shown in (texts["5"][-1], outputs["5"]["text"][0]):
        assert "MagCache (high-noise expert): " in shown and "MagCache (low-noise expert): " in shown
        assert "passes computed" in shown and "error estimate at most" in shown


def test_a_curve_is_measured_saved_and_found(client: Client) -> None:
    prompt = graph("caching/b")
    prompt["4"] = {"class_type": "WanFP8MagCacheCalibrate", "inputs": {"model": ["1", 0], "model_low": ["1", 1]}}
    links = {"model": ["4", 0], "model_low": ["4", 1], "latent": ["5", 0]}
    prompt["7"] = {"class_type": "WanFP8MagCacheSave", "inputs": {**links, "name": "server"}}
    prompt["8"] = {"class_type": "SaveImage", "inputs": {"images": ["7", 1], "filename_prefix": "caching/curve"}}
    prompt["6"]["inputs"]["samples"] = ["7", 0]
    texts, outputs = run(client, prompt)
    assert "curve of 12 steps written to models/wan/magcache/server.json" in texts["7"][-1]
    assert outputs["8"]["images"]
    texts, _ = run(client, graph("caching/c", curve="auto", preset="custom", threshold=2.0))
    assert "curve: server, measured on this model" in texts["4"][-1]
    assert "passes computed" in texts["5"][-1]
    assert (
        "server.json"
        in client.get("/object_info/WanFP8MagCache")["WanFP8MagCache"]["input"]["required"]["curve"][1]["options"]
    )


def test_few_steps_fail_at_the_sampler(client: Client) -> None:
    with pytest.raises(ExecutionFailed, match=r"MagCache cannot skip in a run of 4 steps"):
        client.run(graph("caching/d", steps=4))
