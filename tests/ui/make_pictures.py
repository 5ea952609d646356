"""The pictures of the help pages: every node of the pack as the editor draws it.

    python tests/ui/make_pictures.py          needs Chromium; writes web/docs/<NodeId>.jpg

Run with the pinned host's interpreter (``.host/venv/bin/python``).
"""

from __future__ import annotations

import contextlib
import io
import sys
import tempfile
from pathlib import Path

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


def main() -> int:
    with contextlib.ExitStack() as stack:
        base = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="wan-fp8-pictures-")))
        front = ("--front-end-root", str(environments.newer_frontend()))
        server = stack.enter_context(start_server(host.build(), base=base, extra=front))
        chromium = stack.enter_context(sync_playwright()).chromium.launch(executable_path=find_chromium(), args=FLAGS)
        editor = Editor(chromium, server.url, environments.FRONTEND.partition("==")[2])
        title = 30
        for kind in sorted(name for name in editor.client.object_info() if name.startswith("WanFP8")):
            width, height = editor.page.evaluate(DRAW, kind)
            editor.page.wait_for_timeout(700)
            x, y = LEFT - MARGIN, TOP - title - 22 - MARGIN
            clip = {"x": x, "y": y, "width": width + 2 * MARGIN, "height": height + title + 22 + 2 * MARGIN}
            picture = Image.open(io.BytesIO(editor.page.screenshot(clip=clip))).convert("RGB")
            picture.save(PACK / "web" / "docs" / f"{kind}.jpg", quality=72, optimize=True)
            print(f"web/docs/{kind}.jpg {picture.size}")
        chromium.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
