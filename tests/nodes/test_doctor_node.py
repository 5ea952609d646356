"""The Doctor in a running ComfyUI."""

from __future__ import annotations

import json
from typing import Any

from comfy_fixtures import TASKS
from headless.client import Client


def test_it_runs_alone_sees_the_models_and_runs_again(client: Client, server: Any) -> None:
    prompt = {"1": {"class_type": "WanFP8Doctor", "inputs": {"self_test": True}}}
    prompt["2"] = {"class_type": "PreviewAny", "inputs": {"source": ["1", 1]}}
    for _ in range(2):
        client.run(prompt)
        entry = list(client.get("/history").values())[-1]
        (table,) = entry["outputs"]["1"]["text"]
        assert "self-test" in table and "FAILED" not in table and "passed" in table
        assert f"wan/{TASKS['ti2v']}" in table and "Wan2.2 Preset" in table
        ran = [data for kind, data in entry["status"]["messages"] if kind == "execution_cached"]
        assert all("1" not in data["nodes"] for data in ran), "an old answer"
    (text,) = entry["outputs"]["2"]["text"]
    assert json.loads(text)["format"] == "wan_fp8.doctor" and str(server.base) not in text
