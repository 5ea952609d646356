"""The nodes through the server: whole graphs, what a user sees when something is wrong, and that the next one runs."""

from __future__ import annotations

import resource
import shutil
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import websocket
from comfy_fixtures import TASKS
from headless.client import Client
from headless.errors import Cancelled, ExecutionFailed
from PIL import Image
from safetensors.torch import save_file

SMALL = {"width": 32, "height": 32, "length": 5, "steps": 3}
BOXES = {
    "low_noise": "auto",
    "text_encoder": "from checkpoint",
    "vae": "from checkpoint",
    "weight_dtype": "fp32",
    "text_encoder_dtype": "fp32",
    "vae_dtype": "fp32",
}
NEGATIVE = "blurred"


@pytest.fixture(scope="module")
def defaults(object_info: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Each node's widgets at their defaults, as the server describes them."""
    found: dict[str, dict[str, Any]] = {}
    for node, info in object_info.items():
        if node.startswith("WanFP8"):
            boxes = {**info["input"]["required"], **info["input"].get("optional", {})}
            found[node] = {
                name: spec[1]["default"] for name, spec in boxes.items() if len(spec) > 1 and "default" in spec[1]
            }
    return found


class Graphs:
    """API prompts of the usual shape: load, encode, sample, decode, save."""

    def __init__(self, defaults: dict[str, dict[str, Any]]) -> None:
        self.defaults = defaults

    def video(self, task: str, prefix: str, *, loader: Any = None, text: Any = None, **sampler: Any) -> dict[str, Any]:
        node = f"WanFP8Sample{task.upper()}"
        models = {"model": ["1", 0], **({} if task == "ti2v" else {"model_low": ["1", 1]})}
        text = {"text_encoder": ["1", 2], "prompt": "a cat", "negative": NEGATIVE, **(text or {})}
        prompt = {
            "1": ("WanFP8LoadCheckpoint", {"checkpoint": TASKS[task], **BOXES, **(loader or {})}),
            "2": ("WanFP8TextEncode", text),
            "3": (node, {**models, "positive": ["2", 0], "negative": ["2", 1], **SMALL, **sampler}),
            "4": ("VAEDecode", {"samples": ["3", 0], "vae": ["1", 3]}),
            "5": ("CreateVideo", {"images": ["4", 0], "fps": 16.0}),
            "6": ("SaveVideo", {"video": ["5", 0], "filename_prefix": prefix, "format": "mp4", "codec": "h264"}),
        }
        return {
            key: {"class_type": kind, "inputs": {**self.defaults.get(kind, {}), **inputs}}
            for key, (kind, inputs) in prompt.items()
        }

    def with_image(self, task: str, prefix: str, image: str, **sampler: Any) -> dict[str, Any]:
        inputs = {"start_image": ["7", 0], "vae": ["1", 3], "size": "width x height", **sampler}
        prompt = self.video(task, prefix, **inputs)
        prompt["7"] = {"class_type": "LoadImage", "inputs": {"image": image}}
        return prompt


@pytest.fixture(scope="module")
def graphs(defaults: dict[str, dict[str, Any]]) -> Graphs:
    return Graphs(defaults)


@pytest.fixture
def image(client: Client, tmp_path: Path) -> str:
    path = tmp_path / "picture.png"
    Image.linear_gradient("L").convert("RGB").resize((48, 32)).save(path)
    return client.upload(path)


def frames(path: Path) -> list[Any]:
    import av

    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def finished(server: Any, outputs: list[Any]) -> Path:
    (made,) = outputs
    return Path(server.output) / made.subfolder / made.filename


# ---- what works ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["t2v", "i2v", "ti2v"])
def test_a_video_file_for_each_task(client: Client, server: Any, graphs: Graphs, image: str, task: str) -> None:
    prompt = graphs.video(task, f"nodes/{task}") if task == "t2v" else graphs.with_image(task, f"nodes/{task}", image)
    events: list[dict[str, Any]] = []
    pictures = frames(finished(server, client.run(prompt, events.append)))
    assert len(pictures) == 5 and pictures[0].shape == (32, 32, 3)
    steps = [e["data"]["value"] for e in events if e["type"] == "progress" and e["data"]["node"] == "3"]
    assert [value for value in steps if value <= SMALL["steps"]][-SMALL["steps"] :] == [1, 2, 3]


def test_text_alone_makes_a_video_with_the_5b_model(client: Client, server: Any, graphs: Graphs) -> None:
    assert len(frames(finished(server, client.run(graphs.video("ti2v", "nodes/text"))))) == 5


def test_only_what_changed_runs_again(client: Client, graphs: Graphs) -> None:
    prompt = graphs.video("t2v", "nodes/again", seed=101)
    client.run(prompt)
    events: list[dict[str, Any]] = []
    prompt["3"]["inputs"]["seed"] = 102
    client.run(prompt, events.append)
    cached = next(e["data"]["nodes"] for e in events if e["type"] == "execution_cached")
    assert {"1", "2"} <= set(cached) and not {"3", "4", "6"} & set(cached)


def test_previews_and_lines_reach_the_page(server: Any, graphs: Graphs) -> None:
    """Binary frames: 1 and 4 are previews, 3 is text under a node."""
    client = Client(server.url)
    connection = websocket.create_connection(f"ws{server.url.removeprefix('http')}/ws?clientId={client.id}", timeout=60)
    prompt = graphs.video("t2v", "nodes/preview", seed=103, text={"prompt": "a cat and a dog " * 400})
    prompt["1"]["inputs"]["vae_dtype"] = "auto"  # so that no node of another test's prompt is taken from the cache
    prompt_id = client.queue(prompt)
    previews, texts = 0, {}
    while True:
        message = connection.recv()
        if isinstance(message, bytes):
            kind, rest = struct.unpack(">I", message[:4])[0], message[4:]
            previews += kind in (1, 4)
            if kind == 3:
                length = struct.unpack(">I", rest[:4])[0]
                texts[rest[4 : 4 + length].decode()] = rest[4 + length :].decode()
        elif "execution_success" in message and prompt_id in message:
            break
        assert isinstance(message, bytes) or "execution_error" not in message, message
    connection.close()
    assert previews == SMALL["steps"]
    assert "tokens lost; the model reads 512" in texts["2"] and "T2V" in texts["1"]
    outputs = client.entry(prompt_id)["outputs"]
    assert "tokens lost" in outputs["2"]["text"][0]


def test_the_pages_help_is_served(client: Client, defaults: dict[str, Any]) -> None:
    import host

    for node in defaults:
        page = client.request(f"/extensions/{host.PACK_NAME}/docs/{node}.md").decode()
        assert page.startswith("# ")


# ---- what does not -------------------------------------------------------------------------------------------------


def lora(path: Path) -> None:
    save_file({"diffusion_model.blocks.0.self_attn.q.lora_A.weight": torch.zeros(4, 4)}, path)


def flux(path: Path) -> None:
    save_file(
        {"double_blocks.0.img_attn.norm.key_norm.scale": torch.zeros(4), "img_in.weight": torch.zeros(4, 4)}, path
    )


BAD_FILES = {
    "lora.safetensors": (lora, "is a LoRA"),
    "flux.safetensors": (flux, "is a Flux transformer"),
    "empty.safetensors": (lambda path: path.touch(), "is empty"),
    "gguf.safetensors": (lambda path: path.write_bytes(b"GGUF" + bytes(64)), "is a GGUF file"),
    "cut.safetensors": (lambda path: path.write_bytes((10**6).to_bytes(8, "little") + b"{"), "header"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_named_and_the_server_goes_on(client: Client, server: Any, graphs: Graphs, name: str) -> None:
    make, words = BAD_FILES[name]
    folder = Path(server.base) / "models" / "diffusion_models"
    folder.mkdir(exist_ok=True)
    make(folder / name)
    try:
        with pytest.raises(ExecutionFailed) as caught:
            client.run(graphs.video("t2v", "nodes/bad", loader={"checkpoint": name}))
        assert name in str(caught.value) and words in str(caught.value) and "#1" in str(caught.value)
    finally:
        (folder / name).unlink()
    assert client.run(graphs.video("t2v", f"nodes/after-{Path(name).stem}")) != []


@pytest.mark.parametrize(
    "task, changes, words",
    [
        ("t2v", {"boundary": 0.875, "model_low": None}, "'model_low' is not connected"),
        ("i2v", {"end_image": ["7", 0], "length": 1}, "5 frames or more"),
        ("ti2v", {"vae": ["9", 3]}, "Wan 2.1 VAE"),
    ],
)
def test_bad_inputs_are_named_and_the_server_goes_on(
    client: Client, graphs: Graphs, image: str, task: str, changes: dict[str, Any], words: str
) -> None:
    prompt = graphs.video(task, "nodes/bad") if task == "t2v" else graphs.with_image(task, "nodes/bad", image)
    prompt["9"] = {"class_type": "WanFP8LoadCheckpoint", "inputs": {**BOXES, "checkpoint": TASKS["t2v"]}}
    prompt["3"]["inputs"].update(changes)
    prompt["3"]["inputs"] = {key: value for key, value in prompt["3"]["inputs"].items() if value is not None}
    with pytest.raises(ExecutionFailed) as caught:
        client.run(prompt)
    assert words in str(caught.value) and "#3" in str(caught.value)
    assert client.run(graphs.video("t2v", "nodes/after-input")) != []


def test_sizes_and_frames_that_do_not_fit(client: Client, graphs: Graphs) -> None:
    for change, words in (({"length": 6}, "4n + 1"), ({"width": 40}, "multiple of 16")):
        with pytest.raises(ExecutionFailed, match=words.replace("+", r"\+")):
            client.run(graphs.video("t2v", "nodes/bad", **change))
    assert client.run(graphs.video("t2v", "nodes/after-size")) != []


def test_cancel_stops_within_a_step_and_the_next_prompt_runs(client: Client, graphs: Graphs) -> None:
    prompt = graphs.video("t2v", "nodes/cancel", seed=104, width=128, height=128, steps=200)
    asked: list[float] = []

    def cancel(event: dict[str, Any]) -> None:
        if event["type"] == "progress" and event["data"]["node"] == "3" and event["data"]["value"] == 2 and not asked:
            asked.append(time.monotonic())
            client.request("/interrupt", {"prompt_id": event["data"]["prompt_id"]})

    with pytest.raises(Cancelled):
        client.run(prompt, cancel)
    assert time.monotonic() - asked[0] < 5
    assert client.run(graphs.video("t2v", "nodes/after-cancel", seed=105)) != []


@pytest.mark.skipif(sys.platform != "linux", reason="limits another process's file size, which Linux alone can")
def test_a_disk_that_cannot_take_the_video(client: Client, server: Any, graphs: Graphs) -> None:
    """Core's Save Video writes; nothing of ours does. A file size limit stands in for the full disk: write() fails."""
    prompt = graphs.video("t2v", "full/video", seed=106)
    client.run(graphs.video("t2v", "nodes/warm", seed=106))
    pid = real_pid(server)
    soft, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (1, hard))
    try:
        with pytest.raises(ExecutionFailed) as caught:
            client.run(prompt)
    finally:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (soft, hard))
    assert "#6" in str(caught.value)
    shutil.rmtree(Path(server.output) / "full", ignore_errors=True)
    assert len(frames(finished(server, client.run(graphs.video("t2v", "nodes/after-full", seed=106))))) == 5


def real_pid(server: Any) -> int:
    """The server's process; the fixture's starter replaces itself by it, so the two are the same."""
    command = subprocess.run(["ps", "-o", "args=", "-p", str(server.pid)], capture_output=True, text=True, check=True)
    assert "main.py" in command.stdout
    return int(server.pid)
