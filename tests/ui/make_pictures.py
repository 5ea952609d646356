"""The pictures of the help pages: every node of the pack as the editor draws it.

    python tests/ui/make_pictures.py          needs Chromium; writes web/docs/<NodeId>.jpg, docs/images/status.jpg

Run with the pinned host's interpreter (``.host/venv/bin/python``).
"""

from __future__ import annotations

import contextlib
import io
import sys
import tempfile
from pathlib import Path
from typing import Any

PACK = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(PACK / "scripts"), str(Path(__file__).resolve().parent)]

import environments  # noqa: E402
import host  # noqa: E402
from comfy_server import start_server  # noqa: E402
from editor import FLAGS, Editor, find_chromium  # noqa: E402
from PIL import Image  # noqa: E402
from playwright.sync_api import sync_playwright  # noqa: E402

MARGIN, LEFT, TOP = 14, 140, 140
DRAW = """(kind) => {
    app.graph.clear();
    const node = LiteGraph.createNode(kind);
    node.pos = [0, 0];
    app.graph.add(node);
    const [width, height] = node.computeSize();
    node.setSize([Math.max(360, width), height]);
    app.canvas.ds.scale = 1;
    app.canvas.ds.offset = [%d, %d];
    app.canvas.setDirty(true, true);
    return [node.size[0], node.size[1]];
}""" % (LEFT, TOP)  # noqa: UP031 - braces all over

STATUS = {"step": 12, "steps": 40, "seconds_per_step": 17.4, "expert": "high noise", "skipped": 4, "memory_gib": 31.2}
SHOW = """async (status) => {
    const { api } = await import('/scripts/api.js');
    const node = String(app.graph._nodes[0].id);
    api.dispatchEvent(new CustomEvent('wan_fp8.status', { detail: { ...status, node } }));
}"""
TITLE = 52
"""Height of a node's title and of the badge above it."""


def picture(editor: Editor, kind: str, status: dict[str, Any] | None, target: Path) -> None:
    """Draw one node, with a status on it if there is one, and save what is seen."""
    width, height = editor.page.evaluate(DRAW, kind)
    if status is not None:
        editor.page.evaluate(SHOW, status)
    editor.page.wait_for_timeout(700)
    x, y = LEFT - MARGIN, TOP - TITLE - MARGIN
    clip = {"x": x, "y": y, "width": width + 2 * MARGIN, "height": height + TITLE + 2 * MARGIN}
    seen = Image.open(io.BytesIO(editor.page.screenshot(clip=clip))).convert("RGB")
    seen.save(target, quality=72, optimize=True)
    print(f"{target.relative_to(PACK)} {seen.size}")


def main() -> int:
    with contextlib.ExitStack() as stack:
        base = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="wan-fp8-pictures-")))
        front = ("--front-end-root", str(environments.newer_frontend()))
        server = stack.enter_context(start_server(host.build(), base=base, extra=front))
        chromium = stack.enter_context(sync_playwright()).chromium.launch(executable_path=find_chromium(), args=FLAGS)
        editor = Editor(chromium, server.url, environments.FRONTEND.partition("==")[2])
        for kind in sorted(name for name in editor.client.object_info() if name.startswith("WanFP8")):
            picture(editor, kind, None, PACK / "web" / "docs" / f"{kind}.jpg")
        picture(editor, "WanFP8SampleT2V", STATUS, PACK / "docs" / "images" / "status.jpg")
        chromium.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
