"""Benchmarks run from beginning to end on a CPU, at sizes that say nothing of speed: what they call is still there."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def benchmarks(monkeypatch):
    """Benchmarks import each other by their plain names."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(sys, "argv", [str(BENCHMARKS / "sparse.py")])


def rows_of(path: Path) -> list[dict]:
    return json.loads(path.read_text())["rows"]


def test_sparse(benchmarks, monkeypatch, tmp_path: Path, capsys) -> None:
    import sparse

    monkeypatch.setattr(sparse, "SETTLED_AFTER", 8)
    out = tmp_path / "sparse.json"
    sparse.main(grid="3x8x16", heads=2, width=32, parts="time,cost,heads", repeats=1, device="cpu", json=str(out))
    rows = rows_of(out)
    assert {row["what"] for row in rows} == {"dense", "sparse", "linear", "cost", "head"}
    assert sum(row["what"] == "sparse" for row in rows) == len(sparse.SHARES)
    assert max(row["measured_off"] for row in rows if row["what"] == "head") < 1e-6
    assert "masked: time is linear in the kept blocks within 5%" in " ".join(capsys.readouterr().out.split())

    def fail(*args):
        yield {"what": "head", "head": "one"}
        raise RuntimeError("no memory")

    monkeypatch.setattr(sparse, "head_rows", fail)
    with pytest.raises(RuntimeError, match="no memory"):
        sparse.main(grid="3x8x16", heads=2, width=32, parts="bound,heads", repeats=1, device="cpu", json=str(out))
    kept = rows_of(out)
    assert {row["what"] for row in kept} == {"bound", "head"} and kept[-1] == {"what": "head", "head": "one"}


@pytest.mark.parametrize(("task", "frames"), [("animate", 5), ("s2v", 8)])
def test_dit_extended(benchmarks, tmp_path: Path, task: str, frames: int, monkeypatch, capsys) -> None:
    """The time of a block is in the file before anything else of its row is measured."""
    import dit
    import dit_extended

    unfinished = []
    encoders = dit_extended.encoders
    out = tmp_path / "dit.json"
    monkeypatch.setattr(dit_extended, "encoders", lambda *args: unfinished.extend(rows_of(out)) or encoders(*args))
    sizes = {"size": "64x64", "frames": frames, "dtype": "float32", "device": "cpu"}
    recipes = dit.recipes("none", "auto", "cpu", "float32")
    dit_extended.run(f"tiny-{task}", **sizes, attention="sdpa", recipes=recipes, comfyui="", json=str(out))
    assert [row["layer_ms"] for row in rows_of(out)] == [row["layer_ms"] for row in unfinished]
    (row,) = rows_of(out)
    assert row["error"] < 1e-5 and row["floor_ms"] > 0 and row["segment_s"] > 0 and row["encoders_ms"]
    assert "error" not in unfinished[0] and "encoders_ms" not in unfinished[0]
    said = capsys.readouterr().err.splitlines()
    assert len(said) > 5 and all(line.startswith("[") and " s] " in line for line in said)


def test_dit_says_where_its_time_goes(benchmarks, tmp_path: Path, capsys) -> None:
    """Each phase as it begins; at the end of a row the seconds of all of them, which add up to what the clock said."""
    import dit

    out = tmp_path / "dit.json"
    sizes = {"size": "64x64", "frames": 5, "layers": "1,2", "dtype": "float32", "device": "cpu"}
    dit.main(model="tiny-i2v", **sizes, attention="sdpa", recipe="none,rowwise", backend="reference", json=str(out))
    assert [row["recipe"] for row in rows_of(out)] == ["none", "rowwise"]
    said = [line.removeprefix("[").split(" s] ") for line in capsys.readouterr().err.splitlines()]
    texts = [text for _, text in said]
    ends = [index for index, text in enumerate(texts) if text.startswith("row complete; ")]
    assert len(ends) == 2 and ends[1] == len(texts) - 1
    names = [part.rsplit(" ", 2)[0] for part in texts[ends[1]].split("; ")[1:]]
    assert names == ["weights", "copy", "recipe", "first forward", "rounds", "profile", "floor", "error"]
    spent = sum(float(part.split()[-2]) for part in texts[ends[1]].split("; ")[1:])
    clock = float(said[ends[1]][0]) - float(said[ends[0] + 1][0])
    assert spent == pytest.approx(clock, abs=0.06 * len(names))
    assert "rowwise on reference, sdpa, one GPU" in texts[ends[0] + 1]
