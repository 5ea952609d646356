"""ComfyUI's editor in a headless Chromium, driven as a person would: open it, drop a workflow on it, press Run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from headless.client import Client
from playwright.sync_api import Browser, ConsoleMessage, Page

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
HARMLESS = ("user.css", "userdata", "templates", "Content Security Policy", "favicon", "Jobs", "api/jobs", "api/assets")
"""Parts of complaints in the browser's console that the bare editor has as well."""

NODES = "(window.app?.graph?._nodes ?? window.app?.graph?.nodes)"
LOAD = """async (workflow) => {
    await app.loadGraphData(workflow);
    await app.extensionManager.command.execute('Comfy.Canvas.FitView');
}"""
PROBLEMS = """() => {
    const graphs = [app.graph, ...(app.graph.subgraphs?.values() ?? [])];
    const nodes = graphs.flatMap((graph) => graph._nodes ?? graph.nodes);
    const known = (node) => node.type in LiteGraph.registered_node_types;
    const problems = nodes.filter((node) => !known(node)).map((node) => `missing: ${node.type}`);
    return problems.concat(nodes.filter((node) => node.has_errors).map((node) => `red: ${node.type} #${node.id}`));
}"""
SET_WIDGETS = """(values) => {
    const found = new Set();
    for (const node of app.graph._nodes ?? app.graph.nodes)
        for (const widget of node.widgets ?? [])
            if (widget.name in values) { widget.value = values[widget.name]; found.add(widget.name); }
    return [...found];
}"""


def find_chromium() -> str | None:
    """Path of a Chromium or Chrome that the system has."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Editor:
    """One open page. ``complaints`` collects what the page and its console report as errors."""

    def __init__(self, browser: Browser, url: str, version: str) -> None:
        self.client = Client(url)
        self.complaints: list[str] = []
        settings = {
            "Comfy.TutorialCompleted": True,  # without these two a dialog covers the graph
            "Comfy.InstalledVersion": version,
            "Comfy.Workflow.ShowMissingModelsWarning": False,
            "LiteGraph.Canvas.MinFontSizeForLOD": 0,  # text in the screenshot, however far the graph is zoomed out
        }
        self.client.request("/settings", settings)
        self.page: Page = browser.new_page(viewport={"width": 1920, "height": 1080})
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("console", self._console)
        self.page.goto(url)
        self.page.wait_for_function("() => !!window.LiteGraph?.registered_node_types?.SaveVideo", timeout=120_000)
        self.page.wait_for_function(f"() => {NODES}?.length > 0", timeout=60_000)  # the default workflow comes later
        self.page.wait_for_timeout(1000)

    def _console(self, message: ConsoleMessage) -> None:
        text = f"{message.text} {message.location.get('url', '')}"
        if message.type == "error" and not any(part in text for part in HARMLESS):
            self.complaints.append(text)

    def load(self, workflow: dict[str, Any]) -> list[str]:
        """Open a workflow; returns what is wrong with it as it is shown: node types missing, nodes drawn red."""
        self.page.evaluate(LOAD, workflow)
        self.page.wait_for_timeout(300)
        shown = self.page.evaluate(f"() => {NODES}.length")
        lost = [] if shown == len(workflow["nodes"]) else [f"{shown} of {len(workflow['nodes'])} nodes are shown"]
        return lost + list(self.page.evaluate(PROBLEMS))

    def node_types(self) -> list[str]:
        """Ids of the registered node types."""
        return list(self.page.evaluate("() => Object.keys(LiteGraph.registered_node_types)"))

    def prompt(self) -> dict[str, Any]:
        """What the editor would send to the server, in API format."""
        return dict(self.page.evaluate("async () => (await app.graphToPrompt()).output"))

    def set_widgets(self, **values: Any) -> None:
        """Set every widget of these names."""
        found = self.page.evaluate(SET_WIDGETS, values)
        assert set(found) == set(values), f"no widget {set(values) - set(found)}"

    def run(self, timeout_s: float = 120.0) -> dict[str, Any]:
        """Press Run and wait for the end; returns the prompt's entry of the history."""
        before = set(self.client.get("/history"))
        self.page.evaluate("async () => { await app.queuePrompt(0, 1); }")
        for _ in range(int(timeout_s / 0.2)):
            history = self.client.get("/history")
            if new := set(history) - before:
                return dict(history[new.pop()])
            problems = self.page.evaluate("() => app.lastNodeErrors && JSON.stringify(app.lastNodeErrors)")
            assert not problems or problems == "{}", f"the server refused the prompt: {json.dumps(problems)[:2000]}"
            self.page.wait_for_timeout(200)
        raise AssertionError(f"did not finish within {timeout_s:.0f} s")

    def screenshot(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.page.wait_for_timeout(900)  # the view glides to where it fits
        self.page.screenshot(path=str(path))
