"""The settings nodes in a running ComfyUI: what users see on nodes and in the history, and refusals before sampling."""

from __future__ import annotations

import json
import struct
from typing import Any

import pytest
import websocket
from comfy_fixtures import TASKS
from headless.client import Client
from headless.errors import ExecutionFailed

TEXT_EVENT = 3
"""Core's BinaryEventTypes.TEXT: the length of a node's id, the id, the text."""


def graph(prefix: str, **attention: Any) -> dict[str, Any]:
    """One expert of the tiny T2V checkpoint through both settings nodes, in 4 steps."""
    window = {"skip_first_steps": 1, "skip_last_steps": 1, "skip_first_blocks": 0, "skip_last_blocks": 0}
    chosen = {"backend": "auto", "exact": "auto", **window, "bound": 0.08, **attention}
    checkpoint = {"checkpoint": TASKS["t2v"], "low_noise": "auto", "text_encoder": "from checkpoint"}
    types = {"vae": "from checkpoint", "weight_dtype": "auto", "text_encoder_dtype": "bf16", "vae_dtype": "auto"}
    size = {"width": 32, "height": 32, "length": 5, "steps": 4, "shift": 5.0, "seed": 1, "noise": "cpu"}
    run = {"guidance": 1.0, "guidance_low": 1.0, "boundary": 0.0, "solver": "unipc", "scheduler": "official"}
    precision = {"mode": "off", "dynamic": True, "tf32": False, "residual_stream": "bfloat16"}
    links = {"model": ["4", 0], "positive": ["2", 0], "negative": ["2", 1]}
    return {
        "1": {"class_type": "WanFP8LoadCheckpoint", "inputs": {**checkpoint, **types}},
        "2": {"class_type": "WanFP8TextEncode", "inputs": {"text_encoder": ["1", 2], "prompt": "a", "negative": ""}},
        "3": {"class_type": "WanFP8Attention", "inputs": {"model": ["1", 0], "model_low": ["1", 1], **chosen}},
        "4": {"class_type": "WanFP8Compile", "inputs": {"model": ["3", 0], "model_low": ["3", 1], **precision}},
        "5": {"class_type": "WanFP8SampleT2V", "inputs": {**links, **size, **run}},
        "6": {"class_type": "SaveLatent", "inputs": {"samples": ["5", 0], "filename_prefix": prefix}},
    }


def run(client: Client, prompt: dict[str, Any]) -> tuple[dict[str, list[str]], dict[str, Any]]:
    """Texts put on each node while the prompt runs, and the outputs in its history."""
    address = f"ws{client.url.removeprefix('http')}/ws?clientId={client.id}"
    connection = websocket.create_connection(address, timeout=120)
    texts: dict[str, list[str]] = {}
    try:
        prompt_id = client.queue(prompt)
        while True:
            message = connection.recv()
            if isinstance(message, bytes):
                kind, length = struct.unpack(">II", message[:8])
                if kind == TEXT_EVENT:
                    node = message[8 : 8 + length].decode()
                    texts.setdefault(node, []).append(message[8 + length :].decode())
                continue
            event = json.loads(message)
            if event["type"] in ("execution_success", "execution_error"):
                break
    finally:
        connection.close()
    client.outcome(prompt_id, prompt)
    return texts, client.entry(prompt_id)["outputs"]


def test_choices_and_summary_are_on_the_nodes_and_in_the_history(client: Client) -> None:
    texts, outputs = run(client, graph("settings/a", backend="reference-fp8"))
    for shown in (texts["3"][-1], outputs["3"]["text"][0]):
        assert "attention reference-fp8: reference-fp8 on cpu" in shown
        assert "passed over fa3: it needs a Hopper GPU" in shown
    for shown in (texts["5"][-1], outputs["5"]["text"][0]):
        assert "attention reference-fp8: used for" in shown and "guard: worst relative error" in shown


def test_a_refused_backend_fails_its_own_node(client: Client) -> None:
    with pytest.raises(
        ExecutionFailed, match=r"attention backend 'fa3' cannot run here: it needs a Hopper GPU"
    ) as raised:
        client.run(graph("settings/b", backend="fa3"))
    assert "WanFP8Attention" in str(raised.value) or "Wan2.2 Attention" in str(raised.value)
