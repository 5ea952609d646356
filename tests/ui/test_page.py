"""What a person meets on the page besides the graph: help, errors, saved values, live status, their own language."""

from __future__ import annotations

import json
from typing import Any

import pytest
from comfy_fixtures import ARTEFACTS, PACK, TASKS
from editor import NODES, Editor

SCREENSHOTS = ARTEFACTS / "screenshots"
STATUS = {
    "prompt_id": "p",
    "step": 7,
    "steps": 40,
    "seconds_per_step": 17.4,
    "expert": "high noise",
    "skipped": 4,
    "memory_gib": 31.25,
    "gpus": None,
}
LINE = "7/40 · 17 s/it · 10 min left · high noise · 4 passes skipped · 31.3 GiB"
SHOW_STATUS = """async (status) => {
    const { api } = await import('/scripts/api.js');
    api.dispatchEvent(new CustomEvent('wan_fp8.status', { detail: status }));
}"""
CREATE_ALL = """async (kinds) => {
    app.graph.clear();
    for (const [index, kind] of kinds.entries()) {
        const node = LiteGraph.createNode(kind);
        node.pos = [(index % 6) * 480, Math.floor(index / 6) * 700];
        app.graph.add(node);
    }
}"""
CHANGE_ALL = """() => {
    const values = {};
    for (const node of app.graph._nodes ?? app.graph.nodes) {
        for (const widget of node.widgets ?? []) {
            const options = widget.options?.values;
            if (Array.isArray(options)) widget.value = options[options.length - 1];
            else if (typeof widget.value === 'boolean') widget.value = !widget.value;
            else if (typeof widget.value === 'number')
                widget.value = Math.min(widget.value + 1, widget.options?.max ?? 1e9);
            else if (typeof widget.value === 'string' && widget.name !== 'upload') widget.value += ' changed';
        }
    }
}"""
VALUES = """() => Object.fromEntries((app.graph._nodes ?? app.graph.nodes).map((node) =>
    [node.type, Object.fromEntries((node.widgets ?? []).map((widget) => [widget.name, widget.value]))]))"""

pytestmark = pytest.mark.ui


def workflow(name: str) -> dict[str, Any]:
    return dict(json.loads((PACK / "workflows" / f"{name}.json").read_text(encoding="utf-8")))


def node_id(page: Editor, kind: str) -> str:
    return str(page.page.evaluate(f"(kind) => {NODES}.find((node) => node.type === kind).id", kind))


def test_widgets_of_every_node_keep_their_values(editor: tuple[str, Editor], object_info: dict[str, Any]) -> None:
    """Saved and opened again, by position as files store them: no widget slides into its neighbour's place."""
    _, page = editor
    kinds = sorted(name for name in object_info if name.startswith("WanFP8"))
    page.page.evaluate(CREATE_ALL, kinds)
    before = page.page.evaluate(VALUES)
    page.page.evaluate(CHANGE_ALL)
    changed = page.page.evaluate(VALUES)
    assert set(changed) == set(kinds) and all(changed[kind] != before[kind] for kind in kinds if before[kind])
    saved = page.page.evaluate("() => JSON.parse(JSON.stringify(app.graph.serialize()))")
    assert page.load(saved) == []
    assert page.page.evaluate(VALUES) == changed


def test_the_help_panel_shows_our_page(editor: tuple[str, Editor]) -> None:
    which, page = editor
    page.load(workflow("i2v_a14b_4steps"))
    page.page.evaluate(
        f"() => {{ const node = {NODES}.find((n) => n.type === 'WanFP8Preset');"
        " app.canvas.deselectAll?.(); app.canvas.selectNode ? app.canvas.selectNode(node) : app.canvas.select(node); }"
    )
    button = page.page.locator("[data-testid='info-button']").first
    button.wait_for(state="visible", timeout=10_000)
    button.click()
    text = page.page.get_by_text("for models and LoRAs that were distilled to 4 or 8 steps")
    text.first.wait_for(state="visible", timeout=15_000)
    picture = page.page.locator("img[src*='WanFP8Preset.jpg']").first
    picture.scroll_into_view_if_needed(timeout=10_000)
    page.page.wait_for_timeout(500)
    assert picture.evaluate("(image) => image.naturalWidth") > 100, "the page's picture is not found"
    page.screenshot(SCREENSHOTS / f"help-{which}.png")


def test_the_error_box_shows_our_sentence(editor: tuple[str, Editor]) -> None:
    which, page = editor
    graph = workflow("t2v_a14b")
    page.load(graph)
    page.set_widgets(checkpoint=TASKS["t2v"], width=64, height=64, length=5, steps=3, solver="unipc")
    page.page.evaluate(
        f"() => {{ const node = LiteGraph.createNode('WanFP8Attention'); app.graph.add(node);"
        f" const all = {NODES}, load = all.find((n) => n.type === 'WanFP8LoadCheckpoint');"
        " const sampler = all.find((n) => n.type === 'WanFP8SampleT2V');"
        " node.widgets.find((w) => w.name === 'backend').value = 'fa3';"
        " load.connect(0, node, 'model'); node.connect(0, sampler, 'model'); }"
    )
    entry = page.run()
    assert entry["status"]["status_str"] == "error"
    if which == "newer":  # says first that the node failed, and why on request
        page.page.get_by_text("View details").first.click(timeout=15_000)
    sentence = "attention backend 'fa3' cannot run here: it needs a Hopper GPU"
    page.page.get_by_text(sentence).first.wait_for(state="visible", timeout=15_000)
    page.screenshot(SCREENSHOTS / f"error-{which}.png")
    page.page.keyboard.press("Escape")


@pytest.mark.parametrize("vue", [False, True], ids=["classic", "vue"])
def test_live_status_is_drawn_on_the_node(editor: tuple[str, Editor], vue: bool) -> None:
    which, page = editor
    page.page.evaluate("(on) => app.extensionManager.setting.set('Comfy.VueNodes.Enabled', on)", vue)
    page.page.wait_for_timeout(1500)
    page.complaints.clear()
    try:
        page.load(workflow("t2v_a14b"))
        node = node_id(page, "WanFP8SampleT2V")
        page.page.evaluate(SHOW_STATUS, {**STATUS, "node": node})
        page.page.wait_for_timeout(500)
        module = "async () => (await import('/extensions/wan-fp8/status.js')).board"
        lines = page.page.evaluate(f"async () => Object.fromEntries((await ({module})()).lines)")
        assert lines == {node: LINE}
        drawn = page.page.locator(".wan-fp8-status")
        assert drawn.count() == (1 if vue else 0)
        if vue:
            assert drawn.inner_text() == LINE
        page.screenshot(SCREENSHOTS / f"status-{'vue' if vue else 'classic'}-{which}.png")
        page.page.evaluate(
            "async () => { const { api } = await import('/scripts/api.js');"
            " api.dispatchEvent(new CustomEvent('execution_success', { detail: {} })); }"
        )
        assert page.page.evaluate(f"async () => (await ({module})()).lines.size") == 0 and drawn.count() == 0
        assert page.complaints == []
    finally:
        page.page.evaluate("() => app.extensionManager.setting.set('Comfy.VueNodes.Enabled', false)")
        page.page.wait_for_timeout(500)


def test_a_page_without_the_interface_is_left_alone(editor: tuple[str, Editor]) -> None:
    """The file by itself, on a page that has no ComfyUI: no error, no status."""
    _, page = editor
    source = (PACK / "web" / "status.js").read_text(encoding="utf-8")
    result = page.page.evaluate(
        """async (source) => {
            const address = URL.createObjectURL(new Blob([source], { type: 'text/javascript' }));
            const module = await import(address);
            return [typeof module.board, module.statusLine({ step: 1, steps: 4 })];
        }""",
        source,
    )
    assert result == ["undefined", "1/4"]


def test_a_run_sends_status_to_the_page(editor: tuple[str, Editor]) -> None:
    _, page = editor
    page.load(workflow("t2v_a14b"))
    page.set_widgets(checkpoint=TASKS["t2v"], width=64, height=64, length=5, steps=4, seed=99)
    page.page.evaluate(
        "async () => { window.seen = []; const { api } = await import('/scripts/api.js');"
        " api.addEventListener('wan_fp8.status', (event) => window.seen.push(event.detail.step)); }"
    )
    assert page.run()["status"]["status_str"] == "success"
    assert page.page.evaluate("() => window.seen") == [1, 2, 3, 4]


def test_cancelling_answers_at_once_and_stops_the_run(editor: tuple[str, Editor]) -> None:
    """The command of the extension: the line on the node changes before the server has heard of it, and stays so."""
    _, page = editor
    page.load(workflow("t2v_a14b"))
    page.set_widgets(checkpoint=TASKS["t2v"], width=128, height=128, length=17, steps=400, seed=98)
    page.page.evaluate(
        "async () => { const { board } = await import('/extensions/wan-fp8/status.js');"
        " const { api } = await import('/scripts/api.js'); window.shown = []; window.steps = 0;"
        " const show = board.show;"
        " board.show = function (node, text) { window.shown.push(text); show.call(this, node, text); };"
        " api.addEventListener('wan_fp8.status', async (event) => { if (++window.steps !== 2) return;"
        " const answer = app.extensionManager.command.execute('WanFP8.Cancel');"
        # the step that was under way ends a little later
        " api.dispatchEvent(new CustomEvent('wan_fp8.status', { detail: event.detail }));"
        " window.answer = [...board.lines.values()]; await answer; });"
        " api.addEventListener('execution_interrupted', () => { delete board.show; }, { once: true }); }"
    )
    entry = page.run()
    assert [kind for kind, _ in entry["status"]["messages"]][-1] == "execution_interrupted"
    assert page.page.evaluate("() => window.answer") == ["stopping …"]
    shown = page.page.evaluate("() => window.shown")
    assert shown[-1] == "stopping …" and 2 <= len(shown) < 100, "400 steps were asked for"
    page.page.wait_for_function("async () => (await import('/extensions/wan-fp8/status.js')).board.lines.size === 0")


def test_nodes_speak_chinese_to_those_who_do(editor: tuple[str, Editor]) -> None:
    which, page = editor
    if which == "pinned":
        pytest.skip("this editor reads its own Chinese texts after those of packs, and forgets the packs'")
    page.client.request("/settings", {"Comfy.Locale": "zh"})
    try:
        page.page.reload()
        page.page.wait_for_function("() => !!window.LiteGraph?.registered_node_types?.SaveVideo", timeout=60_000)
        page.page.wait_for_function(f"() => {NODES}?.length > 0", timeout=60_000)
        page.page.wait_for_timeout(1000)
        titles = json.loads((PACK / "locales" / "zh" / "nodeDefs.json").read_text(encoding="utf-8"))
        shown = page.page.evaluate("() => LiteGraph.createNode('WanFP8Recipe').title")
        assert shown == titles["WanFP8Recipe"]["display_name"]
        page.load(workflow("i2v_a14b_4steps"))
        page.screenshot(SCREENSHOTS / f"chinese-{which}.png")
    finally:
        page.client.request("/settings", {"Comfy.Locale": "en"})
        page.page.reload()
        page.page.wait_for_function(f"() => {NODES}?.length > 0", timeout=60_000)
        page.page.wait_for_timeout(1000)
