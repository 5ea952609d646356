"""The small messages that the page draws on a sampler's node, and how soon a cancelled sampler stops."""

from __future__ import annotations

import time
from typing import Any

import pytest
from headless.client import Client
from headless.errors import Cancelled
from test_caching_server import graph


def status_of(client: Client, prompt: dict[str, Any]) -> list[dict[str, Any]]:
    seen: list[dict[str, Any]] = []
    client.run(prompt, lambda event: seen.append(event["data"]) if event["type"] == "wan_fp8.status" else None)
    return seen


def test_every_step_says_where_the_run_is(client: Client) -> None:
    steps = 12
    seen = status_of(client, graph("status/a", steps=steps, curve="published", threshold=0.13, preset="custom"))
    assert [status["step"] for status in seen] == list(range(1, steps + 1))
    assert {(status["node"], status["steps"]) for status in seen} == {("5", steps)}
    experts = [status["expert"] for status in seen]
    first_low = experts.index("low noise")
    assert first_low > 0 and set(experts[:first_low]) == {"high noise"} and set(experts[first_low:]) == {"low noise"}
    skipped = [status["skipped"] for status in seen]
    assert skipped == sorted(skipped) and skipped[0] == 0 and skipped[-1] > 0
    assert seen[0]["seconds_per_step"] is None and all(s["seconds_per_step"] > 0 for s in seen[1:])
    assert {status["memory_gib"] for status in seen} == {None}, "no GPU here"


def test_without_a_cache_nothing_is_said_of_skipping(client: Client) -> None:
    prompt = graph("status/b", steps=3)
    prompt["5"]["inputs"] |= {"model": ["1", 0], "model_low": ["1", 1]}
    del prompt["4"]
    assert {status["skipped"] for status in status_of(client, prompt)} == {None}


def test_a_cancelled_sampler_stops_within_a_step(client: Client) -> None:
    prompt, stopped = graph("status/c", steps=400, policy="easycache"), []
    prompt["5"]["inputs"] |= {"width": 128, "height": 128, "length": 17}

    def cancel(event: dict[str, Any]) -> None:
        if event["type"] == "wan_fp8.status" and event["data"]["step"] == 3:
            stopped.append(time.monotonic())
            raise KeyboardInterrupt

    with pytest.raises(Cancelled):
        client.run(prompt, cancel)
    assert time.monotonic() - stopped[0] < 2.0, "400 steps would have taken longer"
