"""Translations: complete where they exist, true to the defaults, and served by the host.

English comes from the schemas themselves. The host shows in English what has no Chinese entry; none is missing.
"""

from __future__ import annotations

import json
import re
from typing import Any

import nodes_kit
import pytest
from nodes_kit import PACK

pytestmark = pytest.mark.usefixtures("comfy_core")

LANGUAGES = sorted(path.parent.name for path in (PACK / "locales").glob("*/nodeDefs.json"))
TEXTS = {
    language: json.loads((PACK / "locales" / language / "nodeDefs.json").read_text("utf-8")) for language in LANGUAGES
}
ENTRIES = [(language, name) for language, entries in TEXTS.items() for name in entries]
CHINESE = re.compile(r"[\u4e00-\u9fff]")


@pytest.fixture(scope="module")
def schemas(comfy_core) -> dict[str, Any]:
    return {name: cls.GET_SCHEMA() for name, cls in nodes_kit.load_pack().items()}


def test_there_is_chinese() -> None:
    assert "zh" in LANGUAGES and len(TEXTS["zh"]) >= 19


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_node_input_and_output_is_translated(language: str, schemas: dict[str, Any]) -> None:
    assert set(TEXTS[language]) <= set(schemas), "a translation of no node"
    missing = sorted(set(schemas) - set(TEXTS[language]))
    for name in set(TEXTS[language]) & set(schemas):
        missing += [f"{name}.{box.id}" for box in schemas[name].inputs if box.id not in TEXTS[language][name]["inputs"]]
        count = len(schemas[name].outputs)
        missing += [
            f"{name} output {index}" for index in range(count) if str(index) not in TEXTS[language][name]["outputs"]
        ]
    assert not missing, f"locales/{language}/nodeDefs.json has no entry for {', '.join(missing)}"


@pytest.mark.parametrize(("language", "name"), ENTRIES)
def test_a_translation_belongs_to_its_node(language: str, name: str, schemas: dict[str, Any]) -> None:
    entry, schema = TEXTS[language][name], schemas[name]
    assert set(entry) == {"display_name", "description", "inputs", "outputs"}
    assert set(entry["inputs"]) <= {box.id for box in schema.inputs}, f"{name} has no such input"
    assert list(entry["outputs"]) == [str(index) for index in range(len(entry["outputs"]))]
    assert len(entry["outputs"]) <= len(schema.outputs), f"{name} has no such output"
    for given, output in zip(entry["outputs"].values(), schema.outputs, strict=False):
        assert given["name"] == output.display_name and given["tooltip"]
    said = [entry["description"], *(box["tooltip"] for box in entry["inputs"].values())]
    assert all(CHINESE.search(text) for text in said) if language == "zh" else all(said)


@pytest.mark.parametrize(("language", "name"), ENTRIES)
def test_a_translation_names_the_default_that_the_node_has(language: str, name: str, schemas: dict[str, Any]) -> None:
    for box in schemas[name].inputs:
        default = getattr(box, "default", None)
        entry = TEXTS[language][name]["inputs"].get(box.id)
        if entry is None or default in (None, "") or box.id in ("prompt", "negative", "checkpoint"):
            continue
        shown = f"{default:g}" if isinstance(default, float) else str(default)
        assert shown in entry["tooltip"], f"{name}.{box.id} has the default {shown}"


def test_the_host_serves_them(client: Any) -> None:
    served = client.get("/i18n")
    assert {name for name in served["zh"]["nodeDefs"] if name.startswith("WanFP8")} == set(TEXTS["zh"])
    assert served["zh"]["nodeCategories"]["inspect"] == "检查" and "Wan FP8" in served["en"]["nodeCategories"]
