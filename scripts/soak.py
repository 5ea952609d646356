#!/usr/bin/env python3
"""Many prompts in a row through a pool in a real ComfyUI, with layouts changed, runs cancelled and workers killed.

    python scripts/soak.py --prompts 100
    python scripts/soak.py --seconds 120 --gpus 0,1

Every video is compared with that of one process. At the end nothing may have grown: memory, open files and processes of
the server and its workers are those of an early prompt, give or take; and when the server is killed, nothing is left.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Annotated, Any

import typer

sys.path.insert(0, str(Path(__file__).resolve().parent))

import host
from comfy_server import Server, start_server
from headless.client import Client
from headless.errors import Cancelled, ExecutionFailed
from make_tiny_checkpoint import make_tiny_checkpoint

CHECKPOINT = "Wan2.2-T2V-A14B"
TOPOLOGIES = (
    ("auto", "auto"),
    ("1x2x1", "replicate"),
    ("1x1x2", "replicate"),
    ("2x1x1", "replicate"),
    ("1x2x1", "shard"),
)
TOLERANCE = 1e-4
"""fp32 over a few steps, sums in another order."""
GROWTH_MIB = 60.0
"""That a process may be larger at the end than after the first prompts."""
WARM = 8
"""Prompts after which nothing shall grow."""


def graph(number: int, seed: int, gpus: str | None, topology: str = "auto", weights: str = "auto") -> dict[str, Any]:
    """Both experts of the tiny checkpoint in 6 steps, with guidance in every other prompt."""
    checkpoint = {"checkpoint": CHECKPOINT, "low_noise": "auto", "text_encoder": "from checkpoint"}
    types = {"vae": "from checkpoint", "weight_dtype": "auto", "text_encoder_dtype": "bf16", "vae_dtype": "auto"}
    size = {"width": 32, "height": 32, "length": 5, "steps": 6, "shift": 12.0, "seed": seed, "noise": "cpu"}
    guidance = 3.0 if seed % 2 else 1.0
    run = {
        "guidance": guidance,
        "guidance_low": guidance,
        "boundary": 0.875,
        "solver": "unipc",
        "scheduler": "official",
    }
    models = "1" if gpus is None else "9"
    links = {"model": [models, 0], "model_low": [models, 1], "positive": ["2", 0], "negative": ["2", 1]}
    nodes: dict[str, Any] = {
        "1": {"class_type": "WanFP8LoadCheckpoint", "inputs": {**checkpoint, **types}},
        "2": {"class_type": "WanFP8TextEncode", "inputs": {"text_encoder": ["1", 2], "prompt": "a", "negative": ""}},
        "5": {"class_type": "WanFP8SampleT2V", "inputs": {**links, **size, **run}},
        "6": {"class_type": "SaveLatent", "inputs": {"samples": ["5", 0], "filename_prefix": f"soak/{number}"}},
    }
    if gpus is not None:
        choices = {"gpus": gpus, "topology": topology, "weights": weights, "address": ""}
        nodes["9"] = {"class_type": "WanFP8MultiGPU", "inputs": {"model": ["1", 0], "model_low": ["1", 1], **choices}}
    return nodes


def workers(parent: int) -> list[int]:
    """Process ids of a server's workers."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            child = folder.name.isdigit() and f"PPid:\t{parent}\n" in (folder / "status").read_text()
            if child and b"wan_fp8.parallel.worker" in (folder / "cmdline").read_bytes():
                found.append(int(folder.name))
        except OSError:
            continue
    return found


def footprint(pid: int) -> tuple[float, int]:
    """MiB that a process has to itself, and its open files."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    mib = sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1024
    return mib, len(os.listdir(f"/proc/{pid}/fd"))


def latent(client: Client, server: Server, prompt: dict[str, Any]) -> Any:
    from safetensors.torch import load_file

    made = next(output for output in client.run(prompt) if output.filename.endswith(".latent"))
    path = server.output / made.subfolder / made.filename
    value = load_file(path)["latent_tensor"]
    path.unlink()
    return value


class Soak:
    """One server and what is checked of it."""

    def __init__(self, server: Server, gpus: str, chance: random.Random) -> None:
        self.server, self.gpus, self.chance = server, gpus, chance
        self.client = Client(server.url)
        self.right = {seed: latent(self.client, server, graph(-seed, seed, None)) for seed in (1, 2)}
        self.count = {"run": 0, "cancelled": 0, "worker killed": 0}
        self.wrong: list[str] = []
        self.early: tuple[float, int] | None = None

    def one(self, number: int) -> None:
        """One prompt: mostly left alone, now and then cancelled or robbed of a worker."""
        topology, weights = TOPOLOGIES[number % len(TOPOLOGIES)]
        seed = 1 + number // len(TOPOLOGIES) % 2
        prompt = graph(number, seed, self.gpus, topology, weights)
        what = self.chance.choices(("run", "cancelled", "worker killed"), (8, 1, 1))[0] if number >= WARM else "run"
        if what != "run":
            prompt["5"]["inputs"]["seed"] = 1000 + number  # so that it samples, and is in nobody's cache
            timer = threading.Timer(0.1 + self.chance.random(), self.disturb, (what,))
            timer.start()
        try:
            value = latent(self.client, self.server, prompt)
            if what == "run":
                error = float((value - self.right[seed]).norm() / self.right[seed].norm())
                if not error < TOLERANCE:
                    self.wrong.append(f"prompt {number} ({topology}, {weights}): relative error {error:.2e}")
        except Cancelled:
            if what != "cancelled":
                self.wrong.append(f"prompt {number} was cancelled by nobody")
        except ExecutionFailed as error:
            if what != "worker killed" or "ended with SIGKILL" not in str(error):
                self.wrong.append(f"prompt {number} ({what}): {error}")
        if what != "run":  # it may have come too late for this prompt: it is not meant for the next one
            timer.cancel()
            timer.join()
            time.sleep(1.0)
        self.count[what] += 1
        if number == WARM:
            self.early = footprint(self.server.pid)

    def disturb(self, what: str) -> None:
        """Cancel what runs, or kill one of the workers."""
        if what == "cancelled":
            for prompt_id in self.client.waiting():
                self.client.withdraw(prompt_id)
        elif there := workers(self.server.pid):
            os.kill(self.chance.choice(there), signal.SIGKILL)

    def end(self) -> None:
        """Nothing has grown; and a killed server leaves nothing."""
        mib, files = footprint(self.server.pid)
        if self.early is not None:
            if mib > self.early[0] + GROWTH_MIB or files > self.early[1] + 16:
                self.wrong.append(f"the server grew from {self.early} to {(mib, files)} (MiB, open files)")
            print(f"server: {self.early[0]:.0f} MiB and {self.early[1]} files early, {mib:.0f} and {files} at the end")
        there = workers(self.server.pid)
        os.kill(self.server.pid, signal.SIGKILL)
        deadline = time.monotonic() + 15
        while any(Path(f"/proc/{pid}").exists() for pid in there) and time.monotonic() < deadline:
            time.sleep(0.1)
        if any(Path(f"/proc/{pid}").exists() for pid in there):
            self.wrong.append("workers outlive the server")
        left = [name for name in os.listdir(tempfile.gettempdir()) if name.startswith("wan_fp8_pool_")]
        if left:
            self.wrong.append(f"left in the temporary folder: {left}")


def main(
    prompts: Annotated[int, typer.Option(help="How many; with --seconds, at most.")] = 100,
    seconds: Annotated[float, typer.Option(help="Stop after so long; 0: after the prompts.")] = 0.0,
    gpus: Annotated[str, typer.Option(help="As in the node: two of them.")] = "cpu:2",
    seed: int = 0,
) -> None:
    """Run the prompts and say what was wrong."""
    with tempfile.TemporaryDirectory(prefix="wan_fp8_soak_") as folder:
        base = Path(folder) / "comfyui"
        (base / "models" / "wan").mkdir(parents=True)
        os.environ["TMPDIR"] = tempfile.tempdir = str(Path(folder) / "tmp")
        Path(tempfile.tempdir).mkdir()
        make_tiny_checkpoint(base / "models" / "wan" / CHECKPOINT, "t2v")
        with start_server(host.ensure(), base=base) as server:
            soak, began = Soak(server, gpus, random.Random(seed)), time.monotonic()
            for number in range(prompts):
                if seconds and time.monotonic() - began > seconds:
                    break
                soak.one(number)
            print(f"{soak.count} in {time.monotonic() - began:.0f} s")
            soak.end()
    for line in soak.wrong:
        print(line, file=sys.stderr)
    sys.exit(bool(soak.wrong))


if __name__ == "__main__":
    typer.run(main)
