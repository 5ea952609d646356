"""Pages and plots that are made of results are those that today's results make."""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

PACK = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def pages():
    sys.path.insert(0, str(PACK / "benchmarks"))
    try:
        import pages

        yield pages
    finally:
        sys.path.remove(str(PACK / "benchmarks"))
        sys.modules.pop("pages", None)


def test_they_are_up_to_date(pages) -> None:
    for path, text in pages.pages().items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name}: run 'python benchmarks/pages.py'"


def test_plots_are_pictures_that_show_every_row(pages) -> None:
    for name, text in pages.plots().items():
        root = ElementTree.fromstring(text)
        bars = [shape for shape in root.iter("{http://www.w3.org/2000/svg}rect") if shape.get("height") == "20"]
        assert len(bars) >= 8 and max(float(bar.get("width", 0)) for bar in bars) == 420, name
        assert "prefers-color-scheme:dark" in text


def test_a_place_that_is_gone_is_an_error(pages) -> None:
    assert pages.filled("<!-- begin a -->\nold\n<!-- end a -->", {"a": "new\n"}) == (
        "<!-- begin a -->\nnew\n<!-- end a -->"
    )
    with pytest.raises(ValueError, match="0 places for b"):
        pages.filled("text", {"b": ""})
