#!/usr/bin/env python3
"""Many mixed prompts in one server, and what they leave behind: memory, open files, threads. Linux.

    python scripts/soak_prompts.py                 200 prompts on tiny checkpoints; 'make prompts' does this
    python scripts/soak_prompts.py --count 1000

Every kind of sampler, recipe, attention and cache, alone and through a pool of two processes whose layout changes, with
prompts that are cancelled, prompts that fail and workers that are killed in between. Now and then ComfyUI is asked to
free its memory and the process is looked at. The same prompts in every run. Exit code 1: something grew.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import statistics
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent))

Prompt = dict[str, Any]
EVERY = 10
"""Prompts between two looks."""
GROWTH_MIB = 64.0
"""What the resident memory of the last third may be above that of the second: the allocator's fragments."""
SLACK = {"files": 0, "threads": 3, "children": 0, "sockets": 8}
"""What the last third may have more of: threads of pools that fill up slowly, connections that close slowly."""
TASKS = {"t2v": "Wan2.2-T2V-A14B", "i2v": "Wan2.2-I2V-A14B", "ti2v": "Wan2.2-TI2V-5B"}

SAMPLERS = {"t2v": "WanFP8SampleT2V", "i2v": "WanFP8SampleI2V", "ti2v": "WanFP8SampleTI2V"}


# ---- prompts -------------------------------------------------------------------------------------------------------


def video(
    task: str, seed: int, checkpoint: str, settings: Sequence[tuple[str, dict[str, Any]]] = (), **more: Any
) -> Prompt:
    """One small video with settings nodes in a row."""
    prompt: Prompt = {
        "load": {
            "class_type": "WanFP8LoadCheckpoint",
            "inputs": {
                "checkpoint": checkpoint,
                "low_noise": "auto",
                "text_encoder": "from checkpoint",
                "vae": "from checkpoint",
                "weight_dtype": "auto",
                "text_encoder_dtype": "bf16",
                "vae_dtype": "auto",
            },
        },
        "text": {
            "class_type": "WanFP8TextEncode",
            "inputs": {"text_encoder": ["load", 2], "prompt": f"a fox {seed % 7}", "negative": "blur"},
        },
    }
    pair = task != "ti2v"
    links: dict[str, Any] = {"model": ["load", 0]} | ({"model_low": ["load", 1]} if pair else {})
    for index, (kind, inputs) in enumerate(settings):
        prompt[f"set{index}"] = {"class_type": kind, "inputs": {**links, **inputs}}
        links = {"model": [f"set{index}", 0]} | ({"model_low": [f"set{index}", 1]} if pair else {})
    caching = any(kind == "WanFP8MagCache" for kind, _ in settings)
    inputs = {
        **links,
        "positive": ["text", 0],
        "negative": ["text", 1],
        "width": 64,
        "height": 64,
        "length": 5,
        "seed": seed,
        "steps": 9 if caching else 3,  # fewer than nine are refused by caches
        "shift": 5.0,
        "guidance": 3.0,
        "solver": ("unipc", "dpm++", "euler")[seed % 3],
        "scheduler": "official",
        "noise": "cpu",
        **({"guidance_low": 3.0, "boundary": 0.9} if pair else {}),
        **more,
    }
    if task == "i2v":
        prompt["picture"] = {"class_type": "LoadImage", "inputs": {"image": "example.png"}}
        inputs |= {"vae": ["load", 3], "start_image": ["picture", 0], "size": "width x height"}
    if task == "ti2v":
        inputs |= {"size": "width x height"}
    prompt["sample"] = {"class_type": SAMPLERS[task], "inputs": inputs}
    prompt["decode"] = {"class_type": "VAEDecode", "inputs": {"samples": ["sample", 0], "vae": ["load", 3]}}
    prompt["show"] = {"class_type": "PreviewImage", "inputs": {"images": ["decode", 0]}}
    return prompt


RECIPE = {"amax_history_len": 16, "amax_compute_algo": "max", "margin": 0, "keep": ""}
WINDOW = {"exact": "auto", "skip_first_blocks": 0, "skip_last_blocks": 0, "bound": 0.08}
CACHE = {"preset": "custom", "threshold": 0.5, "max_skips": 2, "retention": 0.2, "curve": "auto", "phase": "in_phase"}
SETTINGS: list[list[tuple[str, dict[str, Any]]]] = [
    [],
    [("WanFP8Recipe", {"recipe": "rowwise", "backend": "reference", **RECIPE})],
    [("WanFP8Recipe", {"recipe": "DelayedScaling", "backend": "reference", **RECIPE})],
    [("WanFP8Recipe", {"recipe": "rowwise", "backend": "weight-only", **RECIPE})],
    [("WanFP8Attention", {"backend": "reference-fp8", "skip_first_steps": 1, "skip_last_steps": 0, **WINDOW})],
    [("WanFP8MagCache", {**CACHE, "policy": "easycache", "reuse": "keep"})],
    [("WanFP8Preset", {"preset": "balanced"})],
    [
        ("WanFP8Preset", {"preset": "fast"}),
        ("WanFP8Attention", {"backend": "auto", "skip_first_steps": 1, "skip_last_steps": 0, **WINDOW}),
    ],
]
TOPOLOGIES = (("1x2x1", "replicate"), ("2x1x1", "replicate"), ("1x1x2", "replicate"), ("1x2x1", "shard"))
"""``cfg x ulysses x ring`` of the two processes, and where the weights lie."""
POOL_FIRST, POOL_AGAIN = 10, 20
"""The first prompt of four in a row that run in a pool, and after how many prompts the next four do."""
FAILING = [("WanFP8Attention", {"backend": "fa3", "skip_first_steps": 0, "skip_last_steps": 0, **WINDOW})]


def pooled(index: int) -> list[tuple[str, dict[str, Any]]]:
    """Settings that send a prompt to a pool, on the CPU; [] for most prompts."""
    turn = (index - POOL_FIRST) % POOL_AGAIN
    if index < POOL_FIRST or turn >= len(TOPOLOGIES):
        return []
    topology, weights = TOPOLOGIES[turn]
    return [("WanFP8MultiGPU", {"gpus": "cpu:2", "topology": topology, "weights": weights, "address": ""})]


def mixed(checkpoints: dict[str, str]) -> Iterator[tuple[str, Prompt]]:
    """Endless prompts and what is to become of each: ``done``, ``cancelled``, ``failed``; ``killed``: a worker is."""
    index = 0
    while True:
        task = list(checkpoints)[index % len(checkpoints)]
        settings = pooled(index) or SETTINGS[index % len(SETTINGS)]
        if pooled(index) and not pooled(index + 1):
            yield "killed", video(task, index, checkpoints[task], settings, steps=300)
        elif index % 9 == 7:
            yield "failed", video(task, index, checkpoints[task], FAILING)
        elif index % 9 == 4:
            yield "cancelled", video(task, index, checkpoints[task], settings, steps=300)
        elif index % 9 == 8:
            yield "done", {"1": {"class_type": "WanFP8Doctor", "inputs": {"self_test": bool(index % 2)}}}
        else:
            yield "done", video(task, index, checkpoints[task], settings)
        index += 1


def workers(parent: int) -> list[int]:
    """Process ids of a server's workers."""
    found = []
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError):  # it ended meanwhile
            child = folder.name.isdigit() and f"PPid:\t{parent}\n" in (folder / "status").read_text()
            if child and b"wan_fp8.parallel.worker" in (folder / "cmdline").read_bytes():
                found.append(int(folder.name))
    return sorted(found)


def run_one(client: Any, wanted: str, prompt: Prompt, pid: int) -> None:
    """Run a prompt to the end that it is to have.

    Raises:
        AssertionError: it ended in another way.
    """
    from headless.errors import Cancelled, ExecutionFailed

    def on_event(event: dict[str, Any]) -> None:
        if event["type"] != "wan_fp8.status" or event["data"]["step"] != 2:
            return
        if wanted == "cancelled":
            raise KeyboardInterrupt
        if wanted == "killed":
            for worker in workers(pid)[-1:]:
                os.kill(worker, signal.SIGKILL)

    outcome, reason = "done", ""
    try:
        client.run(prompt, on_event)
    except Cancelled:
        outcome = "cancelled"
    except ExecutionFailed as error:
        outcome, reason = "killed" if "ended with SIGKILL" in str(error) else "failed", f": {error}"
    assert outcome == wanted, f"a prompt that was to be {wanted} was {outcome}{reason}"


# ---- the process ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Look:
    """One process at one moment."""

    prompts: int
    resident_mib: float
    files: int
    """Open ones and pipes; sockets apart, which close a while after their client."""
    threads: int
    children: int
    sockets: int


def look(pid: int, prompts: int) -> Look:
    """Read from ``/proc``."""
    home = Path(f"/proc/{pid}")
    pages = int((home / "statm").read_text().split()[1])
    children = sum(len((task / "children").read_text().split()) for task in (home / "task").iterdir())
    mib = pages * os.sysconf("SC_PAGE_SIZE") / 2**20
    opened = []
    for entry in (home / "fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            opened.append(os.readlink(entry))
    sockets = sum(target.startswith("socket:") for target in opened)
    return Look(prompts, mib, len(opened) - sockets, len(os.listdir(home / "task")), children, sockets)


def free_memory(url: str) -> None:
    """Let ComfyUI unload every model and drop what it kept of earlier prompts, and wait until it has."""
    body = json.dumps({"unload_models": True, "free_memory": True}).encode()
    request = urllib.request.Request(f"{url}/free", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30):
        time.sleep(0.8)


def findings(looks: Sequence[Look]) -> list[str]:
    """What grew, in sentences: the last third against the second; the first one is for warming up."""
    third = len(looks) // 3
    if third < 1:
        return [f"{len(looks)} looks say nothing: run at least {3 * EVERY} prompts"]
    middle, last = looks[third : 2 * third], looks[-third:]
    found = []
    grown = statistics.median(x.resident_mib for x in last) - statistics.median(x.resident_mib for x in middle)
    if grown > GROWTH_MIB:
        found.append(f"memory grew by {grown:.0f} MiB between prompts {middle[0].prompts} and {last[-1].prompts}")
    for name, slack in SLACK.items():
        # the least of each third is what stays: files of models come and go
        before, after = (min(getattr(x, name) for x in part) for part in (middle, last))
        if after > before + slack:
            found.append(f"{name}: at least {before} in the second third, at least {after} in the last")
    return found


def soak(
    client: Any,
    pid: int,
    url: str,
    checkpoints: dict[str, str],
    count: int,
    every: int = EVERY,
    tell: Callable[[str], None] = print,
) -> list[Look]:
    """Run prompts, and look at the process after every few."""
    looks = []
    for index, (wanted, prompt) in zip(range(1, count + 1), mixed(checkpoints), strict=False):
        run_one(client, wanted, prompt, pid)
        if index % every == 0:
            free_memory(url)
            looks.append(look(pid, index))
            now = looks[-1]
            counts = f"{now.files} files, {now.threads} threads, {now.sockets} sockets"
            tell(f"{index:5d} prompts: {now.resident_mib:.0f} MiB, {counts}")
    return looks


# ---- command line --------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Mixed prompts in one server on tiny checkpoints: what they leave.")
    parser.add_argument("--count", type=int, default=200, help="how many prompts; default 200")
    asked = parser.parse_args(arguments)
    if not sys.platform.startswith("linux"):
        parser.error("it reads /proc, which only Linux has")
    import host
    from comfy_server import start_server
    from headless.client import Client
    from make_tiny_checkpoint import make_tiny_checkpoint

    with contextlib.ExitStack() as stack:
        base = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="wan-fp8-soak-")))
        for task, name in TASKS.items():
            make_tiny_checkpoint(base / "models" / "wan" / name, task)
        chosen = host.build()
        (base / "input").mkdir()
        (base / "input" / "example.png").write_bytes((chosen.comfyui / "input" / "example.png").read_bytes())
        server = stack.enter_context(start_server(chosen, base=base))
        looks = soak(Client(server.url), server.pid, server.url, TASKS, asked.count)
    found = findings(looks)
    print("\n".join(found) or f"{asked.count} prompts: nothing grew")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
