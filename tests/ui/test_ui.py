"""Every shipped workflow opened in the real editor, one of them run there. Screenshots go to ``.out/screenshots``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from comfy_fixtures import ARTEFACTS, TASKS
from editor import Editor
from headless.convert import input_specs, to_prompt

WORKFLOWS = sorted((Path(__file__).resolve().parents[2] / "workflows").glob("*.json"))
ARCHIVE = Path(__file__).resolve().parents[1] / "workflows_archive"
SAVED = sorted(path for path in ARCHIVE.glob("*.json") if not path.name.endswith(".prompt.json"))
SCREENSHOTS = ARTEFACTS / "screenshots"

pytestmark = pytest.mark.ui


def known_inputs(nodes: dict[str, Any], info: dict[str, Any]) -> dict[str, Any]:
    """A prompt with what concerns the server alone: the editor also sends values of its own buttons."""
    specs = {
        kind: {name for name, _, _ in input_specs(info[kind])} for kind in {n["class_type"] for n in nodes.values()}
    }
    return {
        key: (node["class_type"], {k: v for k, v in node["inputs"].items() if k in specs[node["class_type"]]})
        for key, node in nodes.items()
    }


def test_there_are_workflows() -> None:
    assert WORKFLOWS, "workflows/ is empty"


def test_the_editor_knows_our_nodes(editor: tuple[str, Editor], object_info: dict[str, Any]) -> None:
    ours = {name for name in object_info if name.startswith("WanFP8")}
    assert ours and ours <= set(editor[1].node_types())


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_opens_without_a_missing_or_red_node(
    path: Path, editor: tuple[str, Editor], object_info: dict[str, Any]
) -> None:
    which, page = editor
    workflow = json.loads(path.read_text())
    page.complaints.clear()
    problems = page.load(workflow)
    page.screenshot(SCREENSHOTS / f"{path.stem}-{which}.png")
    assert (problems, page.complaints) == ([], [])
    assert known_inputs(page.prompt(), object_info) == known_inputs(
        to_prompt(workflow, object_info).nodes, object_info
    ), "the headless runner must send what the editor sends"


def test_workflows_of_earlier_versions_open(editor: tuple[str, Editor]) -> None:
    """No node is missing, and each of ours has the values that it was saved with."""
    _, page = editor
    for path in SAVED:
        problems = page.load(json.loads(path.read_text(encoding="utf-8")))
        assert [problem for problem in problems if not problem.startswith("red")] == [], path.name  # files may be gone
        wanted = json.loads(path.with_name(f"{path.stem}.prompt.json").read_text(encoding="utf-8"))
        sent = page.prompt()
        for key, node in wanted.items():
            values = {name: value for name, value in node["inputs"].items() if not isinstance(value, list)}
            assert sent[key]["inputs"].items() >= values.items(), f"{path.name}: {node['class_type']}"


def test_a_workflow_runs_to_its_end(editor: tuple[str, Editor]) -> None:
    which, page = editor
    page.load(json.loads((WORKFLOWS[0].parent / "t2v_a14b.json").read_text()))
    page.set_widgets(checkpoint=TASKS["t2v"], width=64, height=64, length=5, steps=3)
    entry = page.run()
    assert entry["status"]["status_str"] == "success", entry["status"]
    made = [file for kinds in entry["outputs"].values() for file in kinds.get("images", [])]
    assert [file["filename"].endswith(".mp4") for file in made] == [True]
    assert page.load(json.loads((WORKFLOWS[0].parent / "t2v_a14b.json").read_text())) == []
    page.screenshot(SCREENSHOTS / f"finished-{which}.png")


def test_the_headless_runner_converts_as_the_editor_does(
    editor: tuple[str, Editor], object_info: dict[str, Any]
) -> None:
    """Everything the editor resolves by itself, in one file it saved: a primitive, a reroute, a bypassed and a muted
    node, a subgraph with an input and a widget of its own, a note, and a seed with its control."""
    workflow = json.loads((Path(__file__).parent / "every_kind_of_link.json").read_text())
    _, page = editor
    assert page.load(workflow) == []
    converted = known_inputs(to_prompt(workflow, object_info).nodes, object_info)
    assert known_inputs(page.prompt(), object_info) == converted
    assert set(converted) == {"11", "9:4", "9:5", "15", "16", "18"}
    assert converted["11"][1]["width"] == converted["11"][1]["height"] == 40
    assert converted["9:4"][1]["image"] == ["11", 0] and converted["9:5"][1]["width"] == 24
    assert "images" not in converted["16"][1]
