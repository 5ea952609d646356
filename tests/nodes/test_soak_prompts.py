"""Two minutes of ``make prompts``, and that it would notice what it is there for."""

from __future__ import annotations

import itertools
import os
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import pytest
import soak_prompts as soak
from headless.client import Client

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="it reads /proc, which only Linux has")

COUNT, EVERY = 60, 5
"""The same prompts in every run: about two minutes of two cores. Four looks in each third; pools in the last two."""


def test_mixed_prompts_leave_nothing_behind(make_server: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """In a server and a temporary folder of its own: what others leave in shared ones would count as this one's."""
    with tempfile.TemporaryDirectory(prefix="soak-") as temporary:  # a short name: sockets of pools lie in it
        monkeypatch.setenv("TMPDIR", temporary)
        run_a_slice(make_server("soak"))
        left = [name for name in os.listdir(temporary) if not name.startswith("torchinductor_")]  # PyTorch's own
        assert left == [], "the server or its pools left files"


def run_a_slice(starting: Any) -> None:
    with starting as server:
        looks = soak.soak(Client(server.url), server.pid, server.url, soak.TASKS, COUNT, EVERY, print)
    assert len(looks) == COUNT // EVERY
    assert soak.findings(looks) == []


def test_the_slice_has_every_kind_of_prompt_and_end() -> None:
    prompts = list(itertools.islice(soak.mixed(soak.TASKS), COUNT))
    assert {wanted for wanted, _ in prompts} == {"done", "cancelled", "failed", "killed"}
    nodes = [node for _, prompt in prompts for node in prompt.values()]
    assert {node["class_type"] for node in nodes} >= {*soak.SAMPLERS.values(), "WanFP8MultiGPU", "WanFP8Doctor"}
    layouts = {
        (node["inputs"]["topology"], node["inputs"]["weights"]) for node in nodes if "topology" in node["inputs"]
    }
    assert layouts == set(soak.TOPOLOGIES)
    for settings in soak.SETTINGS:
        assert all(
            any(n["class_type"] == kind and n["inputs"].items() >= inputs.items() for n in nodes)
            for kind, inputs in settings
        )
    ends = [wanted for wanted, prompt in prompts if "WanFP8MultiGPU" in {n["class_type"] for n in prompt.values()}]
    assert {"done", "cancelled", "killed"} <= set(ends)


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
        soak.run_one(Fake(), "failed", {}, 0)
