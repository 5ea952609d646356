"""Every shipped workflow: offered by ComfyUI as a template, valid by an independent checker, and run to a video."""

from __future__ import annotations

import json
import subprocess
import urllib.parse
from pathlib import Path
from typing import Any

import av
import pytest
import torch
from comfy_fixtures import PACK, TASKS
from headless.client import Client
from headless.convert import MUTED, to_prompt
from headless.settings import apply, settings, unique_names
from safetensors.torch import load_file

WORKFLOWS = sorted((PACK / "workflows").glob("*.json"))
CORE_TEMPLATE = PACK / "workflows" / "core_template_with_wan_fp8.json"
TASK_OF = {"t2v_a14b": "t2v", "i2v_a14b": "i2v", "ti2v_5b": "ti2v"}
FPS = {"t2v": 16, "i2v": 16, "ti2v": 24}
SMALL = ("width=64", "height=64", "length=5", "steps=3")
MAX_THUMBNAIL_BYTES = 60_000

shipped = pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)


def load(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8")))


def no_upload(path: Path) -> str:
    raise AssertionError(f"{path} should not be uploaded")


def frames_of(path: Path) -> tuple[int, int, int, float]:
    """Frames, width, height and frames per second of a video file."""
    with av.open(str(path)) as video:
        stream = video.streams.video[0]
        count = sum(1 for _ in video.decode(stream))
        assert stream.average_rate is not None
        return count, stream.width, stream.height, float(stream.average_rate)


@shipped
def test_it_is_offered_as_a_template_with_a_picture(path: Path, server: Any, client: Client) -> None:
    templates = client.get("/workflow_templates")
    (pack,) = (name for name, names in templates.items() if path.stem in names)
    address = f"/api/workflow_templates/{urllib.parse.quote(pack)}/{path.stem}"
    assert json.loads(client.request(f"{address}.json")) == load(path)
    picture = client.request(f"{address}.jpg")
    assert picture.startswith(b"\xff\xd8") and len(picture) < MAX_THUMBNAIL_BYTES


@shipped
def test_it_says_where_files_go_and_what_it_costs(path: Path) -> None:
    notes = "\n".join(n["widgets_values"][0] for n in load(path)["nodes"] if n["type"] == "MarkdownNote")
    for heading in ("### Files", "### Memory", "### Time"):
        assert heading in notes


@shipped
def test_an_independent_checker_finds_nothing(path: Path, object_info: dict[str, Any], tmp_path: Path) -> None:
    import host

    known = tmp_path / "object_info.json"
    known.write_text(json.dumps(object_info))

    def check(workflow: Path) -> subprocess.CompletedProcess[str]:
        return host.comfy_cli("workflow", "validate", "--workflow", workflow, "--input", known)

    good = check(path)
    assert good.returncode == 0, good.stdout + good.stderr
    broken = load(path)
    broken["nodes"][0]["type"] = "NoSuchNode"
    (tmp_path / "broken.json").write_text(json.dumps(broken))
    assert check(tmp_path / "broken.json").returncode != 0


@pytest.mark.parametrize("stem", TASK_OF)
def test_it_makes_a_video(stem: str, server: Any, client: Client, object_info: dict[str, Any], tmp_path: Path) -> None:
    task = TASK_OF[stem]
    prompt = to_prompt(load(PACK / "workflows" / f"{stem}.json"), object_info)
    changes = [*SMALL, f"checkpoint={TASKS[task]}", "prompt=a fox", "negative=blur", "seed=7"]
    if task != "t2v":
        picture = tmp_path / "start.png"
        save_picture(picture, 96, 64)
        changes += [f"image={picture}", "size=width x height"]
    apply(prompt, object_info, changes, client.upload)
    (made,) = client.run(prompt.nodes)
    assert frames_of(client.download(made, tmp_path)) == (5, 64, 64, FPS[task])


def test_the_5b_graph_makes_a_video_from_text_when_its_image_is_muted(
    client: Client, object_info: dict[str, Any], tmp_path: Path
) -> None:
    workflow = load(PACK / "workflows" / "ti2v_5b.json")
    (image,) = (node for node in workflow["nodes"] if node["type"] == "LoadImage")
    image["mode"] = MUTED
    prompt = to_prompt(workflow, object_info)
    apply(prompt, object_info, [*SMALL, "width=96"], no_upload)
    (made,) = client.run(prompt.nodes)
    assert frames_of(client.download(made, tmp_path)) == (5, 96, 64, 24)


def save_picture(path: Path, width: int, height: int) -> None:
    from PIL import Image

    Image.effect_noise((width, height), 80).convert("RGB").save(path)


def test_the_core_template_gives_what_core_gives(client: Client, server: Any, tmp_path: Path) -> None:
    """Core's half unmuted: both halves sample the same models, and the latents agree within float32's rounding,
    which is what both compute in on a CPU (a switch between the experts one step off moves them by 3e-2). Core's
    text encoder has no small size, so this pack's stands in for it."""
    workflow, info = load(CORE_TEMPLATE), client.object_info()
    for node in workflow["nodes"]:
        node["mode"] = 0 if node["mode"] == MUTED else node["mode"]
    prompt = to_prompt(workflow, info)
    nodes = prompt.nodes
    ids = {node["_meta"]["title"]: key for key, node in nodes.items()}
    nodes |= {
        "900": {"class_type": "WanFP8LoadCheckpoint", "inputs": {**defaults(info, "WanFP8LoadCheckpoint")}},
        "901": {"class_type": "WanFP8TextEncode", "inputs": {"prompt": "a fox", "negative": "blur"}},
    }
    nodes["900"]["inputs"]["checkpoint"] = TASKS["t2v"]
    nodes["901"]["inputs"]["text_encoder"] = ["900", 2]
    encoders = {ids["prompt"]: ["901", 0], ids["negative"]: ["901", 1]}
    for key in (*encoders, ids["Text encoder"]):
        del nodes[key]
    for node in nodes.values():
        small = {"width": 64, "height": 64, "length": 5}
        node["inputs"] = {
            name: encoders.get(value[0], value) if isinstance(value, list) else small.get(name, value)
            for name, value in node["inputs"].items()
        }
    sampled = {"ours": ids["Sample Wan2.2 Text to Video"], "core": ids["KSampler, low noise"]}
    for number, (name, key) in enumerate(sampled.items()):
        inputs = {"samples": [key, 0], "filename_prefix": f"compare/{name}"}
        nodes[str(910 + number)] = {"class_type": "SaveLatent", "inputs": inputs}
    made = client.run(nodes)
    videos = [client.download(one, tmp_path) for one in made if one.filename.endswith(".mp4")]
    assert [frames_of(video) for video in videos] == [(5, 64, 64, 16)] * 2
    latents = {
        name: load_file(next((server.output / "compare").glob(f"{name}*.latent")))["latent_tensor"] for name in sampled
    }
    error = (latents["ours"] - latents["core"]).norm() / latents["core"].norm()
    assert torch.isfinite(error) and float(error) < 1e-4, float(error)


def defaults(info: dict[str, Any], kind: str) -> dict[str, Any]:
    """A node's inputs as the editor would fill them in."""
    return {name: spec[1].get("default") for name, spec in info[kind]["input"]["required"].items() if len(spec) > 1}


@shipped
def test_the_names_in_the_documentation_can_be_set(path: Path, object_info: dict[str, Any]) -> None:
    page = (PACK / "docs" / "workflows.md").read_text(encoding="utf-8")
    _, _, section = page.partition(f"## {path.name}\n")
    section = section.split("\n## ")[0]
    (row,) = (line for line in section.splitlines() if line.startswith("Settable:"))
    prompt = to_prompt(load(path), object_info)
    known = unique_names(settings(prompt, object_info))
    named = [part for part in row.split("`")[1::2]]
    assert named and [name for name in named if name not in known] == []
