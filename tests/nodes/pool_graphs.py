"""What the tests of pools share: graphs, and what may be left on the machine afterwards."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Any

from test_settings_server import graph as settings_graph


def graph(prefix: str, gpus: str = "cpu:2", topology: str = "auto", **more: Any) -> dict[str, Any]:
    """The high-noise expert of the tiny T2V checkpoint in 4 steps through Wan2.2 Multi-GPU."""
    prompt = settings_graph(prefix)
    choices = {"gpus": gpus, "topology": topology, "weights": "auto", "address": "", **more}
    prompt["9"] = {"class_type": "WanFP8MultiGPU", "inputs": {"model": ["1", 0], "model_low": ["1", 1], **choices}}
    for node in prompt.values():
        if node["class_type"] == "WanFP8Attention":
            node["inputs"] |= {"model": ["9", 0], "model_low": ["9", 1]}
    prompt["4"]["inputs"]["residual_stream"] = "float32"  # bf16 sums in another order are other sums
    prompt["5"]["inputs"] |= {"guidance": 3.0}
    return prompt


def graph_with_parts(prefix: str, pooled: bool) -> dict[str, Any]:
    """The same with an image at its end; ``pooled``: text encoder and VAE go through the node as well."""
    prompt = graph(prefix)
    prompt["2"]["inputs"]["prompt"] = "a prompt that no other test encodes"
    prompt["7"] = {"class_type": "VAEDecode", "inputs": {"samples": ["5", 0], "vae": ["1", 3]}}
    prompt["8"] = {"class_type": "SaveImage", "inputs": {"images": ["7", 0], "filename_prefix": prefix}}
    if pooled:
        prompt["9"]["inputs"] |= {"text_encoder": ["1", 2], "vae": ["1", 3]}
        prompt["2"]["inputs"]["text_encoder"], prompt["7"]["inputs"]["vae"] = ["9", 2], ["9", 3]
    return prompt


def workers(parent: int) -> list[int]:
    """Process ids of the workers below ``parent``."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                status, line = (folder / "status").read_text(), (folder / "cmdline").read_bytes()
            except OSError:
                continue
            if f"PPid:\t{parent}\n" in status and b"wan_fp8.parallel.worker" in line:
                found.append(int(folder.name))
    return sorted(found)


def alive(pid: int) -> bool:
    """Whether a process runs; one that waits for its parent to take note of its end does not."""
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def folders(pids: list[int]) -> list[Path]:
    """Meeting places on the disk of the pool with these workers; others' are not looked at."""
    found = []
    for folder in Path(tempfile.gettempdir()).glob("wan_fp8_pool_*"):
        try:
            theirs = {int(word) for word in re.findall(r"\d+", (folder / "pids").read_text())}
        except OSError:  # one that begins or ends at this moment
            continue
        if theirs & set(pids):
            found.append(folder)
    return found
