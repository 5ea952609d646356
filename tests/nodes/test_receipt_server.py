"""The quality receipt in a running ComfyUI: shown on the node, and in the metadata of what core saves after it."""

from __future__ import annotations

import io
import json
import urllib.parse
import urllib.request
from typing import Any

import av
import pytest
from headless.client import Client
from PIL import Image
from test_settings_server import graph as attention_graph
from test_settings_server import run

WINDOW = {"skip_first_steps": 0, "skip_last_steps": 0, "bound": 0.0}


def graph(prefix: str) -> dict[str, Any]:
    """The tiny T2V checkpoint with FP8 attention, both runs, everything saved."""
    prompt = attention_graph(prefix, backend="reference-fp8", **WINDOW)
    links = {"positive": ["2", 0], "negative": ["2", 1], "latent": ["7", 0], "vae": ["1", 3]}
    boxes = {"seed": 3, "steps": 4, "shift": 0.0, "guidance": 0.0, "guidance_low": 0.0, "boundary": -1.0}
    boxes |= {"solver": "unipc", "scheduler": "official", "noise": "cpu", "reference_precision": "as loaded"}
    models = {"model": ["4", 0], "model_low": ["4", 1]}
    size = {"width": 32, "height": 32, "length": 5, "batch_size": 1}
    saved = {"filename_prefix": prefix, "format": "auto", "codec": "auto"}
    return {
        **{number: prompt[number] for number in ("1", "2", "3", "4")},
        "7": {"class_type": "EmptyHunyuanLatentVideo", "inputs": size},
        "5": {"class_type": "WanFP8QualityReceipt", "inputs": {**links, **models, **boxes}},
        "8": {"class_type": "VAEDecode", "inputs": {"samples": ["5", 0], "vae": ["1", 3]}},
        "9": {"class_type": "CreateVideo", "inputs": {"images": ["8", 0], "fps": 16.0}},
        "10": {"class_type": "SaveVideo", "inputs": {"video": ["9", 0], **saved}},
        "11": {"class_type": "SaveImage", "inputs": {"images": ["5", 2], "filename_prefix": f"{prefix}_plot"}},
        "12": {"class_type": "SaveImage", "inputs": {"images": ["5", 3], "filename_prefix": f"{prefix}_strip"}},
        "13": {"class_type": "PreviewAny", "inputs": {"source": ["5", 4]}},
    }


class WithPngInfo(Client):
    """Queues prompts as the browser does, with the metadata that it sends along."""

    def request(self, path: str, body: Any = None, *rest: Any, **more: Any) -> bytes:
        if path == "/prompt":
            body = {**body, "extra_data": {**body.get("extra_data", {}), "extra_pnginfo": {"workflow": {"id": 1}}}}
        return super().request(path, body, *rest, **more)


@pytest.fixture(scope="module")
def done(server: Any) -> tuple[Client, dict[str, list[str]], dict[str, Any]]:
    client = WithPngInfo(server.url)
    return client, *run(client, graph("receipt/a"))


def fetched(client: Client, entry: dict[str, str]) -> io.BytesIO:
    query = urllib.parse.urlencode({key: entry[key] for key in ("filename", "subfolder", "type")})
    with urllib.request.urlopen(f"{client.url}/view?{query}") as answer:
        return io.BytesIO(answer.read())


def test_it_is_shown_and_returned(done: Any) -> None:
    _, texts, outputs = done
    facts = json.loads(outputs["13"]["text"][0])
    assert facts["format"] == "wan_fp8.receipt" and facts["task"] == "t2v" and len(facts["steps"]) == 4
    assert [step["step"] for step in facts["steps"]] == [1, 2, 3, 4] and facts["steps"][-1]["relative_error"] > 0
    said = facts["setting"]["said"]
    assert any("attention reference-fp8: used for" in line for line in said) and facts["reference"]["said"] == []
    shown = outputs["5"]["text"][0]
    assert "latents: PSNR" in shown and "frames: PSNR" in shown and "no extra_pnginfo" not in shown
    assert any("latents: PSNR" in text for text in texts["5"])
    assert f"{facts['video']['psnr_db']:.2f} dB" in shown


def test_pictures_carry_the_receipt(done: Any) -> None:
    client, _, outputs = done
    wanted = json.loads(outputs["13"]["text"][0])
    for node in ("11", "12"):
        picture = Image.open(fetched(client, outputs[node]["images"][0]))
        assert json.loads(picture.text["wan_fp8_receipt"]) == wanted
        assert json.loads(picture.text["workflow"]) == {"id": 1}


def test_the_video_carries_the_receipt(done: Any) -> None:
    client, _, outputs = done
    with av.open(fetched(client, outputs["10"]["images"][0])) as video:
        assert json.loads(video.metadata["wan_fp8_receipt"]) == json.loads(outputs["13"]["text"][0])


def test_without_metadata_of_a_prompt_the_node_says_so(client: Client) -> None:
    prompt = graph("receipt/b")
    del prompt["9"], prompt["10"]
    prompt["5"]["inputs"]["seed"] = 4
    _, outputs = run(client, prompt)
    assert "the receipt is in no file's metadata" in outputs["5"]["text"][0]
    picture = Image.open(fetched(client, outputs["11"]["images"][0]))
    assert "wan_fp8_receipt" not in picture.text
