"""A headless Chromium for these tests; without one they are skipped by name."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from comfy_fixtures import PACK
from editor import FLAGS, Editor, find_chromium


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    path = find_chromium()
    if path is None:
        pytest.skip("no Chromium on this machine: 'apt-get install chromium'")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield chromium
        chromium.close()


FOLDERS = {
    "UNETLoader": "diffusion_models",
    "CLIPLoader": "text_encoders",
    "VAELoader": "vae",
    "LoraLoaderModelOnly": "loras",
    "LoadVideo": "../input",
    "LoadAudio": "../input",
}


@contextlib.contextmanager
def files_named_in_workflows(models: Path) -> Iterator[None]:
    """Files under the names that loaders have in the workflows: newer editors paint a loader red whose file is
    missing, as it should be on a machine without it."""
    made = []
    for workflow in (PACK / "workflows").glob("*.json"):
        for node in json.loads(workflow.read_text())["nodes"]:
            path = models / FOLDERS.get(node["type"], "") / str((node.get("widgets_values") or [""])[0])
            if node["type"] in FOLDERS and not path.exists():
                path.parent.mkdir(exist_ok=True)
                _placeholder(path)
                made.append((path, path.stat().st_size))
    yield
    for path, size in made:
        if path.stat().st_size == size:  # other tests may have put a real one there
            path.unlink()


def _placeholder(path: Path) -> None:
    """Nothing in a file of weights; a sound or a video that the page can play, where it shows one."""
    if path.suffix not in (".mp4", ".mp3"):
        path.touch()
        return
    import av
    import numpy as np

    with av.open(str(path), mode="w") as container:
        if path.suffix == ".mp4":
            stream = container.add_stream("h264", rate=30)
            stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
            frame = av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format="rgb24")
        else:
            stream = container.add_stream("mp3", rate=44_100)
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 44_100), np.float32), format="flt", layout="mono")
            frame.sample_rate = 44_100
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


@pytest.fixture(scope="session", params=["pinned", "newer"])
def editor(
    request: pytest.FixtureRequest, browser: Any, make_server: Callable[..., Any]
) -> Iterator[tuple[str, Editor]]:
    """(which, editor): the editor that the pinned ComfyUI brings, and one a year newer on the same server code."""
    import environments

    with contextlib.ExitStack() as stack:
        if request.param == "pinned":
            server, version = request.getfixturevalue("server"), "1.32.9"
        else:
            server = stack.enter_context(make_server("newer", "--front-end-root", str(environments.newer_frontend())))
            version = environments.FRONTEND.partition("==")[2]
        stack.enter_context(files_named_in_workflows(server.base / "models"))
        editor = Editor(browser, server.url, version)
        yield request.param, editor
        editor.page.close()
