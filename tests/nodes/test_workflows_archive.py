"""Workflows that earlier versions of the pack saved: each still becomes the prompt that it was when it was saved.

``tests/workflows_archive/<version>_<name>.json`` is never changed; beside it lies what its nodes of ours were sent as.
New inputs may have come since. To archive: copy the workflow, convert it with that version, keep both.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from comfy_fixtures import PACK
from headless.convert import to_prompt

FOLDER = PACK / "tests" / "workflows_archive"
SAVED = sorted(path for path in FOLDER.glob("*.json") if not path.name.endswith(".prompt.json"))


def test_every_node_is_archived(object_info: dict[str, Any]) -> None:
    kinds = {node["type"] for path in SAVED for node in json.loads(path.read_text("utf-8"))["nodes"]}
    ours = {kind for kind in object_info if kind.startswith("WanFP8")}
    assert len(SAVED) >= 6 and ours and ours <= kinds, f"in no archived workflow: {', '.join(sorted(ours - kinds))}"


@pytest.mark.parametrize("path", SAVED, ids=lambda path: path.stem)
def test_it_opens_and_means_the_same(path: Path, object_info: dict[str, Any]) -> None:
    prompt = to_prompt(json.loads(path.read_text(encoding="utf-8")), object_info).nodes
    wanted = json.loads(path.with_name(f"{path.stem}.prompt.json").read_text(encoding="utf-8"))
    assert wanted
    for key, node in wanted.items():
        now = prompt[key]
        assert now["class_type"] == node["class_type"]
        assert now["inputs"].items() >= node["inputs"].items(), f"{node['class_type']} reads this file in another way"
        known = {name for group in object_info[node["class_type"]]["input"].values() for name in group}
        assert set(node["inputs"]) <= known
