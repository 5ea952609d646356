"""The documentation against the tree: quoted sentences, links, commands and node ids exist."""

from __future__ import annotations

import ast
import json
import re
from functools import cache
from pathlib import Path

import pytest

PACK = Path(__file__).resolve().parents[2]
PAGES = sorted([*PACK.glob("*.md"), *(PACK / "docs").glob("*.md"), *(PACK / "web" / "docs").glob("*.md")])
CODE = [PACK / "nodes", PACK / "wan_fp8", PACK / "scripts"]
HOLE = "\0"


def _sentences() -> list[str]:
    page = (PACK / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    return re.findall(r"^> (.+)$", page, re.MULTILINE)


@cache
def _texts() -> tuple[str, ...]:
    """Every string of the code as a user may read it, with a hole for each value put into it."""
    found: set[str] = set()
    for path in (path for folder in CODE for path in folder.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else HOLE for part in node.values]
                found.add("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(re.sub(r"%[sdr]|%\.\df", HOLE, node.value))  # log messages have holes of their own
    return tuple(found)


@pytest.mark.parametrize("sentence", _sentences())
def test_a_quoted_sentence_is_one_that_the_code_says(sentence: str) -> None:
    fixed = [re.escape(part.strip()) for part in sentence.split("…") if part.strip(" .:;,")]
    pattern = re.compile(r"[\s\S]*".join(fixed).replace(r"\ ", r"[ \0]+"))
    longest = max(re.findall(r"\w+", sentence), key=len)  # most texts lack it, and a search costs more
    assert any(longest in text and pattern.search(text) for text in _texts()), (
        f"no message in the code reads like {sentence!r}"
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(PACK)))
def test_links_lead_to_files(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    targets = [t.split("#")[0] for t in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in t]
    missing = [target for target in targets if target and not (page.parent / target).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(PACK)))
def test_paths_that_are_named_exist(page: Path) -> None:
    """Only names in code marks that begin with one of the pack's own folders, and no placeholders."""
    roots = "|".join(("benchmarks", "docs", "nodes", "scripts", "tests", "wan_fp8", "web", "workflows"))
    named = re.findall(
        rf"(?<![\w/])((?:{roots})/[\w./-]*[\w/])", "\n".join(re.findall(r"`([^`]+)`", page.read_text("utf-8")))
    )
    missing = sorted(name for name in set(named) if not (PACK / name).exists())
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(PACK)))
def test_make_targets_that_are_named_exist(page: Path) -> None:
    targets = set(re.findall(r"^(\w+):", (PACK / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = set(re.findall(r"`make (\w+)|^ *make (\w+)", page.read_text(encoding="utf-8"), re.MULTILINE))
    assert {a or b for a, b in named} <= targets


def test_times_in_the_readme_were_measured() -> None:
    """Every "... ms" of the README is a row of ``benchmarks/results``, rounded."""
    rows = [
        row
        for path in (PACK / "benchmarks" / "results").glob("*.json")
        for row in json.loads(path.read_text(encoding="utf-8"))["rows"]
    ]
    measured = {str(round(row["layer_ms"])) for row in rows if "layer_ms" in row}
    named = re.findall(r"([\d.]+) ms", (PACK / "README.md").read_text(encoding="utf-8"))
    assert named and [time for time in named if time not in measured] == []


def test_pages_that_tooltips_name_exist() -> None:
    named = {name for text in _texts() for name in re.findall(r"\bdocs/[\w-]+\.md\b", text)}
    assert sorted(name for name in named if not (PACK / name).is_file()) == []


def test_every_node_has_a_help_page_and_nothing_else_has() -> None:
    ids = {text for text in _texts() if re.fullmatch(r"WanFP8[A-Z]\w+", text)} - {"WanFP8Error", "WanFP8Extension"}
    assert {path.stem for path in (PACK / "web" / "docs").glob("*.md")} == ids


def test_every_help_page_shows_its_picture() -> None:
    folder = PACK / "web" / "docs"
    bare = sorted(path.stem for path in folder.glob("*.md") if f"({path.stem}.jpg)" not in path.read_text("utf-8"))
    assert not bare, f"no picture: {', '.join(bare)}; run tests/ui/make_pictures.py and show it there"
    assert {path.stem for path in folder.glob("*.jpg")} == {path.stem for path in folder.glob("*.md")}


def test_help_pages_link_to_nothing_outside_their_folder() -> None:
    """ComfyUI serves ``web/`` alone: a link that leads out of it is dead in the help panel."""
    out = {
        page.name for page in (PACK / "web" / "docs").glob("*.md") if re.search(r"\]\(\.\./", page.read_text("utf-8"))
    }
    assert out == set()
