"""Every shipped workflow: offered by ComfyUI as a template, valid by an independent checker, and run to a video."""

from __future__ import annotations

import json
import subprocess
import urllib.parse
from pathlib import Path
from typing import Any

import av
import pytest
from comfy_fixtures import LORAS, PACK, TASKS
from headless.client import Client
from headless.convert import BYPASSED, MUTED, to_prompt
from headless.settings import apply, settings, unique_names
from safetensors.torch import load_file

WORKFLOWS = sorted((PACK / "workflows").glob("*.json"))
CORE_TEMPLATE = PACK / "workflows" / "core_template_with_wan_fp8.json"
TASK_OF = {"t2v_a14b": "t2v", "i2v_a14b": "i2v", "ti2v_5b": "ti2v", "i2v_a14b_4steps": "i2v"}
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
    import environments

    known = tmp_path / "object_info.json"
    known.write_text(json.dumps(object_info))

    def check(workflow: Path) -> subprocess.CompletedProcess[str]:
        return environments.comfy_cli("workflow", "validate", "--workflow", workflow, "--input", known)

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


def test_the_demo_shows_what_its_prompt_says(server: Any, client: Client, tmp_path: Path) -> None:
    """``make demo``'s graph, settings and checkpoint; colour and motion are measured from the file's pixels."""
    import demo
    import torch
    from tiny_wan.classify import classify

    (server.base / "models" / "wan" / demo.CHECKPOINT).symlink_to(demo.SOURCE, target_is_directory=True)
    info = dict(client.object_info())
    prompt = to_prompt(load(demo.WORKFLOW), info)
    apply(prompt, info, list(demo.SETTINGS), client.upload)
    (made,) = client.run(prompt.nodes)
    with av.open(str(client.download(made, tmp_path))) as file:
        frames = [torch.from_numpy(frame.to_ndarray(format="rgb24")) for frame in file.decode(video=0)]
    video = torch.stack(frames).permute(3, 0, 1, 2)[None] / 127.5 - 1
    (seen,) = classify(video)
    assert (seen.colour, seen.motion) == ("red", "right"), seen


def test_the_distilled_pair_is_applied_whole(
    client: Client, object_info: dict[str, Any], single_files: dict[str, Path], tmp_path: Path
) -> None:
    """Every parameter of both files, modulation included; without them the graph makes another video of one seed."""
    workflow = load(PACK / "workflows" / "i2v_a14b_4steps.json")
    (sampler,) = (node for node in workflow["nodes"] if node["type"] == "WanFP8SampleI2V")
    assert sampler["widgets_values"][6:12] == [4, 5, 1, 1, 0.9, "euler"], "what distilled LoRAs ask for"
    picture, videos = tmp_path / "start.png", []
    save_picture(picture, 64, 64)
    for strength in (0.9, 0):  # another than in the file, or the node is not run again
        prompt = to_prompt(workflow, object_info)
        changes = [*SMALL[:3], f"checkpoint={TASKS['i2v']}", f"image={picture}", "size=width x height"]
        apply(prompt, object_info, changes, client.upload)
        (key,) = (key for key, node in prompt.nodes.items() if node["class_type"] == "WanFP8LoadLora")
        prompt.nodes[key]["inputs"] |= {"strength": strength, "strength_low": strength}
        (made,) = client.run(prompt.nodes)
        (tmp_path / str(strength)).mkdir()
        videos.append(client.download(made, tmp_path / str(strength)).read_bytes())
        if strength:
            (text,) = list(client.get("/history").values())[-1]["outputs"][key]["text"]
    assert videos[0] != videos[1]
    changed = {name.rsplit(".lora_")[0] for name in load_file(single_files[LORAS[0]])}
    assert text.count(f"changes {len(changed)} parameters at strength 0.9") == 2 and len(text.splitlines()) == 2, text
    assert {name.rpartition(".")[2] for name in changed} >= {"diff_m", "diff_b", "diff"}


def save_video(path: Path, frames: int, width: int, height: int, fps: int = 30) -> str:
    """A video of grey noise; its path."""
    import numpy as np

    with av.open(str(path), mode="w") as container:
        stream = container.add_stream("mpeg4", rate=fps)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        generator = np.random.default_rng(frames)
        for _ in range(frames):
            pixels = generator.integers(0, 255, (height, width, 3), dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
    return str(path)


@pytest.mark.parametrize("stem", ["animate_14b", "animate_replace_14b"])
def test_animate_makes_a_video_from_files(
    stem: str, client: Client, object_info: dict[str, Any], tmp_path: Path
) -> None:
    """One frame, with a real face: a frame through the motion encoder takes seconds on a CPU."""
    prompt = to_prompt(load(PACK / "workflows" / f"{stem}.json"), object_info)
    picture = tmp_path / "character.png"
    save_picture(picture, 96, 64)
    changes = [f"checkpoint={TASKS['animate']}", f"image={picture}", "segment=1", "steps=2", "seed=7"]
    sizes = {"pose": (64, 64), "face": (512, 512)}
    if "replace" in stem:
        sizes |= {"background": (64, 64), "mask": (64, 64)}
    changes += [f"{name}={save_video(tmp_path / f'{name}.mp4', 1, *size)}" for name, size in sizes.items()]
    apply(prompt, object_info, changes, client.upload)
    (made,) = client.run(prompt.nodes)
    assert frames_of(client.download(made, tmp_path)) == (1, 64, 64, 30)


def test_s2v_makes_a_video_with_its_sound(client: Client, object_info: dict[str, Any], tmp_path: Path) -> None:
    import wave

    prompt = to_prompt(load(PACK / "workflows" / "s2v_14b.json"), object_info)
    picture, speech = tmp_path / "who.png", tmp_path / "speech.wav"
    save_picture(picture, 96, 96)
    with wave.open(str(speech), "wb") as file:
        file.setnchannels(2)
        file.setsampwidth(2)
        file.setframerate(44_100)
        file.writeframes(bytes(range(256)) * 138)  # 0.2 s
    changes = [f"checkpoint={TASKS['s2v']}", f"image={picture}", f"audio={speech}", "prompt=a fox", "negative=blur"]
    small = ["size=width x height", "width=64", "height=64", "clip_frames=8", "steps=2"]
    apply(prompt, object_info, [*changes, *small], client.upload)
    (made,) = client.run(prompt.nodes)
    path = client.download(made, tmp_path)
    assert frames_of(path) == (4, 64, 64, 16)
    with av.open(str(path)) as video:
        (stream,) = video.streams.audio
        assert stream.duration * stream.time_base == pytest.approx(0.2, abs=0.1)


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


def small_core_template(info: dict[str, Any], *, ours: bool) -> dict[str, Any]:
    """The core template as a prompt for tiny models that keeps its latents; without ``ours``, our node is bypassed.

    Core's text encoder has no small size, so this pack's stands in for it.
    """
    workflow = load(CORE_TEMPLATE)
    (node,) = (node for node in workflow["nodes"] if node["type"].startswith("WanFP8"))
    node["mode"] = 0 if ours else BYPASSED
    prompt = to_prompt(workflow, info)
    apply(prompt, info, ["width=64", "height=64", "frames=5", "seed=7"], no_upload)
    nodes = prompt.nodes
    ids = {node["_meta"]["title"]: key for key, node in nodes.items()}
    nodes["900"] = {"class_type": "WanFP8LoadCheckpoint", "inputs": defaults(info, "WanFP8LoadCheckpoint")}
    nodes["900"]["inputs"]["checkpoint"] = TASKS["t2v"]
    text = {"text_encoder": ["900", 2], "prompt": "a fox", "negative": "blur"}
    nodes["901"] = {"class_type": "WanFP8TextEncode", "inputs": text}
    encoded = {ids["prompt"]: ["901", 0], ids["negative"]: ["901", 1]}
    for key in (*encoded, ids["Text encoder"]):
        del nodes[key]
    for node in nodes.values():
        node["inputs"] = {k: encoded.get(v[0], v) if isinstance(v, list) else v for k, v in node["inputs"].items()}
    prefix = f"compare/{'ours' if ours else 'core'}"
    inputs = {"samples": [ids["KSampler, low noise"], 0], "filename_prefix": prefix}
    nodes["902"] = {"class_type": "SaveLatent", "inputs": inputs}
    return nodes


def test_the_core_template_gives_the_same_with_our_node_bypassed(client: Client, server: Any, tmp_path: Path) -> None:
    """Both compute in float32 on a CPU. A switch between the experts that is one step off moves the latents by 3e-2."""
    info, latents = client.object_info(), {}
    for ours in (True, False):
        made = client.run(small_core_template(info, ours=ours))
        (video,) = (client.download(one, tmp_path) for one in made if one.filename.endswith(".mp4"))
        assert frames_of(video) == (5, 64, 64, 16)
        (saved,) = (server.output / "compare").glob(f"{'ours' if ours else 'core'}*.latent")
        latents[ours] = load_file(saved)["latent_tensor"]
    error = float((latents[True] - latents[False]).norm() / latents[False].norm())
    assert 0 < error < 1e-4, f"{error}; exactly 0 would mean that the same transformer ran twice"


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
