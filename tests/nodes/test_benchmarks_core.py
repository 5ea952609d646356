"""Core's own classes as ``benchmarks/dit.py --comfyui`` times them: that they run in bf16, as they would in core."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.usefixtures("comfy_core")

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.mark.parametrize(("task", "frames"), [("animate", 5), ("s2v", 8)])
def test_core_runs_in_bf16(task: str, frames: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its patch embedding stays in fp32, whatever the rest is in."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import dit_extended

    finite = []

    def once(run, *args: object, **options: object) -> float:
        finite.append(bool(torch.isfinite(run()).all()))
        return 1.0

    monkeypatch.setattr(dit_extended.common, "median_ms", once)
    with torch.inference_mode():
        row = dit_extended.core_row(f"tiny-{task}", "64x64", frames, "sdpa", torch.bfloat16, "cpu")
    assert finite == [True, True] and row["attention"] == "native"
