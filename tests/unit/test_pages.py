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


def test_what_is_said_of_two_gpus_is_in_the_results(pages) -> None:
    """The words between the numbers."""
    said = pages.two_gpus()
    assert "0 where guidance is not split" in said and "no process and no GPU memory was left" in said
    errors: dict[bool, list[float]] = {True: [], False: []}
    for row in pages.load("pool_2x_h200.json")["rows"]:
        errors[row["topology"].startswith("cfg 2")].append(row["error"])
    assert max(errors[False]) == 0 < min(errors[True])
    faults = (PACK / "benchmarks" / "results" / "pool_faults_2x_h200.txt").read_text()
    deaths = faults.count("ok   SIGKILL of rank")
    assert deaths == faults.count("ok   no process is left") == faults.count("GPU memory left behind: [0, 0] MiB") == 2
    assert "WRONG" not in faults


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
