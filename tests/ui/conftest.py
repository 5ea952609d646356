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
    """Empty files under the names that loaders have in the workflows: newer editors paint a loader red whose file is
    missing, as it should be on a machine without it."""
    made = []
    for workflow in (PACK / "workflows").glob("*.json"):
        for node in json.loads(workflow.read_text())["nodes"]:
            path = models / FOLDERS.get(node["type"], "") / str((node.get("widgets_values") or [""])[0])
            if node["type"] in FOLDERS and not path.exists():
                path.parent.mkdir(exist_ok=True)
                path.touch()
                made.append(path)
    yield
    for path in made:
        if path.stat().st_size == 0:  # other tests may have put a real one there
            path.unlink()


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
