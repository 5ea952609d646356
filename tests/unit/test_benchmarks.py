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
