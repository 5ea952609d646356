"""Every layout equals one process: what ``layouts`` says, on 2, 3 and 4 ranks."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

import layouts
import world

WORLDS = (2, 3, 4)
_results: dict[int, dict[str, str]] = {}


@pytest.mark.timeout(world.TIMEOUT + 30)
@pytest.mark.parametrize(("ranks", "case"), [(ranks, case) for ranks in WORLDS for case in layouts.cases(ranks)])
def test_every_layout_equals_one_process(ranks: int, case: str) -> None:
    if ranks not in _results:
        _results[ranks] = {world.WORLD: "it failed to start: see the first test of this world"}
        _results[ranks] = world.run("layouts", ranks)
    results = _results[ranks]
    assert case in results, results.get(world.WORLD, "the case did not run")
    assert results[case] == "", results[case]
