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


def test_memory_keeps_the_rows_of_cards_before_and_after_one_that_fails(benchmarks, monkeypatch, tmp_path: Path):
    import contextlib

    import hosted
    import memory
    import torch
    import typer

    from wan_fp8 import attention, quant
    from wan_fp8.models import specs

    out, seen = tmp_path / "memory.json", []
    modules = {"wan_fp8.quant": quant, "wan_fp8.models.specs": specs, "wan_fp8.attention": attention}
    expert = type("Expert", (), {"model": type("Shell", (), {"diffusion_model": torch.nn.Linear(2, 2)})})()
    bridge = type("Bridge", (), {"with_settings": staticmethod(lambda model, attention: model)})
    run = memory.Run(
        load_s=1.0,
        steps_s=[1.0] * 4,
        switch_step=2,
        pauses_ms=[1.0],
        switch_ms=2.0,
        peak_gib=None,
        reserved_gib=None,
        left={},
    )

    def sample(*args):
        if seen[-1:] == [23.5]:
            raise RuntimeError("no memory")
        return run

    @contextlib.contextmanager
    def card(gib, *args):
        seen.append(gib)
        assert len(rows_of(out)) == 1 + len(seen), "the rows so far are in the file"
        yield

    monkeypatch.setattr(hosted, "import_core", lambda device: None)
    monkeypatch.setattr(hosted, "module", lambda name: modules.get(name, bridge))
    monkeypatch.setattr(hosted, "random_expert", lambda *args: expert)
    monkeypatch.setattr(hosted, "Traffic", lambda models: type("Traffic", (), {"loaded": 0, "copied_back": 0})())
    monkeypatch.setattr(hosted, "card", card)
    monkeypatch.setattr(memory, "sample", sample)
    monkeypatch.setattr(memory, "unload", lambda device: None)
    with pytest.raises(typer.Exit) as status:
        memory.main(
            parts="weights,switch,cards", attention="auto", recipe="rowwise", device="cpu", load_gb=1.0, folder=None,
            tiny=True, json_path=out, measure=None, source=None,
        )  # fmt: skip
    rows = rows_of(out)
    assert status.value.exit_code == 1 and [row["part"] for row in rows] == ["weights", "switch", "cards", "cards"]
    assert rows[2]["failed"] == "RuntimeError: no memory" and not rows[2]["within"] and rows[2]["card"] == "24 GB"
    assert rows[3]["card"] == "16 GB" and rows[3]["within"]
    assert [path.name for path in tmp_path.iterdir()] == ["memory.json"]
