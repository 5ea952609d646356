"""What the pack adds to ComfyUI's start: seconds, and which libraries. Target: below 0.3 s, none of the heavy ones.

    python benchmarks/import_time.py --json benchmarks/results/import_time.json

Each run is a process of its own that imports what ComfyUI's ``main.py`` imports and registers core's own nodes, then
loads the pack by core's loader and times that alone. Both the median of the runs, with the pack's byte code in place as
after any first start, and one run without it are reported.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import common
import typer
from rich.console import Console
from rich.table import Table

sys.path.append(str(common.ROOT / "scripts"))

import comfy_server
import host

LIMIT_S = 0.3
HEAVY = ("transformer_engine", "transformers", "diffusers", "flash_attn", "flash_attn_interface", "fa3_fwd_interface")
"""Libraries that the pack may use and must not import at ComfyUI's start."""

PROBE = """
import asyncio, json, logging, sys, time
logging.disable(logging.WARNING)
comfyui, pack, cpu, heavy = json.loads(sys.argv.pop())
sys.path[0] = comfyui
started = time.perf_counter()
import comfy.cli_args
comfy.cli_args.args.cpu = cpu
import utils.extra_config, comfy.utils, execution, server, nodes, comfy.model_management  # in the order of main.py
asyncio.run(nodes.init_builtin_extra_nodes())
import torch
core_s, before, cuda = time.perf_counter() - started, set(sys.modules), torch.cuda.is_initialized()
started = time.perf_counter()
loaded = asyncio.run(nodes.load_custom_node(pack))
seconds = time.perf_counter() - started
new = {name.partition(".")[0] for name in set(sys.modules) - before if not name.startswith("/")}
print(json.dumps({
    "loaded": loaded, "seconds": seconds, "core_s": core_s,
    "nodes": sorted(name for name in nodes.NODE_CLASS_MAPPINGS if name.startswith("WanFP8")),
    "libraries_added": sorted(new), "heavy_added": sorted(new & set(heavy)),
    "cuda_initialised_by_pack": torch.cuda.is_initialized() and not cuda,
}))
"""


def measure(chosen: host.Host, cache: Path) -> dict[str, Any]:
    """Load the pack once in a fresh process; byte code of the pack goes to, and comes from, ``cache``."""
    cpu = not comfy_server.has_accelerator(chosen.python)
    arguments = json.dumps([str(chosen.comfyui), str(common.ROOT), cpu, HEAVY])
    environment = {
        key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONDONTWRITEBYTECODE")
    }
    environment["PYTHONPYCACHEPREFIX"] = str(cache)
    command = [chosen.python, "-c", PROBE, arguments]
    done = subprocess.run(command, env=environment, cwd=chosen.comfyui, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"the pack could not be loaded:\n{done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def row(name: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The result of several runs; times are medians."""
    seconds = [run["seconds"] for run in runs]
    return {
        "model": name,
        "seconds": round(statistics.median(seconds), 4),
        "spread_s": [round(min(seconds), 4), round(max(seconds), 4)],
        "runs": len(runs),
        "limit_s": LIMIT_S,
        "core_start_s": round(statistics.median(run["core_s"] for run in runs), 2),
        "nodes": len(runs[0]["nodes"]),
        "libraries_added": runs[0]["libraries_added"],
        "heavy_added": sorted({name for run in runs for name in run["heavy_added"]}),
        "cuda_initialised_by_pack": any(run["cuda_initialised_by_pack"] for run in runs),
    }


def main(
    runs: Annotated[int, typer.Option(min=1, help="Fresh processes to take the median of.")] = 5,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the results file.")] = None,
) -> None:
    """Time what the pack adds to ComfyUI's start; exit 1 if it misses the target or imports what it must not."""
    chosen = host.ensure()
    with tempfile.TemporaryDirectory() as cache:
        first = measure(chosen, Path(cache))
        rows = [row("later starts", [measure(chosen, Path(cache)) for _ in range(runs)]), row("first start", [first])]
    table = Table("start", "pack s", "least", "most", "core s", "libraries added", "CUDA touched")
    for r in rows:
        added, touched = ", ".join(r["libraries_added"]) or "none", str(r["cuda_initialised_by_pack"])
        table.add_row(
            r["model"], *(f"{s:.3f}" for s in (r["seconds"], *r["spread_s"])), str(r["core_start_s"]), added, touched
        )
    Console().print(table)
    if json_path is not None:
        common.write_results(json_path, rows)
    late = rows[0]["seconds"] > LIMIT_S
    if not first["loaded"] or late or any(r["heavy_added"] or r["cuda_initialised_by_pack"] for r in rows):
        Console().print(f"[red]missed: at most {LIMIT_S} s, none of {', '.join(HEAVY)}, CUDA left alone")
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
