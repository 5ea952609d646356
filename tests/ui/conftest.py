"""A headless Chromium for these tests; without one they are skipped by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
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


@pytest.fixture(scope="module", params=["pinned", "newer"])
def editor(
    request: pytest.FixtureRequest, browser: Any, make_server: Callable[..., Any]
) -> Iterator[tuple[str, Editor]]:
    """(which, editor): the editor that the pinned ComfyUI brings, and one a year newer on the same server code."""
    import host

    if request.param == "pinned":
        server = request.getfixturevalue("server")
        editor = Editor(browser, server.url, "1.32.9")
        yield request.param, editor
        editor.page.close()
        return
    with make_server("newer-editor", "--front-end-root", str(host.newer_frontend())) as server:
        editor = Editor(browser, server.url, host.FRONTEND.partition("==")[2])
        yield request.param, editor
        editor.page.close()
