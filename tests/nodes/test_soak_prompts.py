"""A short slice of ``make prompts``, and that it would notice what it is there for."""

from __future__ import annotations

import sys
import time
from typing import Any

import pytest
import soak_prompts as soak
from headless.client import Client

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="it reads /proc, which only Linux has")

COUNT, EVERY = 12, 2


def test_mixed_prompts_leave_nothing_behind(client: Client, server: Any) -> None:
    began = time.monotonic()
    looks = soak.soak(client, server.pid, server.url, soak.TASKS, COUNT, EVERY, print)
    assert len(looks) == COUNT // EVERY
    assert soak.findings(looks) == []
    assert time.monotonic() - began < 120


def looked(values: list[tuple[float, int, int, int, int]]) -> list[soak.Look]:
    return [soak.Look(10 * i, *value) for i, value in enumerate(values)]


def test_growth_is_found() -> None:
    flat = [(600.0, 40, 20, 0, 5)] * 9
    assert soak.findings(looked(flat)) == []
    leak = [(600.0 + 30 * i, 40, 20, 0, 5) for i in range(9)]
    assert "memory grew by 90 MiB" in soak.findings(looked(leak))[0]
    said = "{}: at least {} in the second third, at least {} in the last"
    for changed, name, before, after in (
        ((600.0, 41, 20, 0, 5), "files", 40, 41),
        ((600.0, 40, 24, 0, 5), "threads", 20, 24),
        ((600.0, 40, 20, 1, 5), "children", 0, 1),
        ((600.0, 40, 20, 0, 14), "sockets", 5, 14),
    ):
        assert soak.findings(looked([*flat[:6], *[changed] * 3])) == [said.format(name, before, after)]
    assert soak.findings(looked([*flat[:8], (600.0, 99, 99, 9, 99)])) == [], "it comes and goes"
    assert soak.findings(looked([*flat[:6], *[(600.0, 40, 23, 0, 13)] * 3])) == []
    warming = [(300.0, 30, 10, 0, 1)] * 3 + flat[3:]
    assert soak.findings(looked(warming)) == []
    assert "say nothing" in soak.findings(looked(flat[:2]))[0]


def test_a_prompt_that_ends_otherwise_is_an_error() -> None:
    class Fake:
        def run(self, prompt: Any, on_event: Any) -> None:
            del prompt, on_event

    with pytest.raises(AssertionError, match="was to be failed was done"):
        soak.run_one(Fake(), "failed", {})
