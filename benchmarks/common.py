"""What every benchmark shares: where results go and what they say about the machine, and how GPU time is measured."""

from __future__ import annotations

import datetime
import json
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
if str(ROOT) not in sys.path:  # scripts run from a clone; the pack is not an installed package
    sys.path.insert(0, str(ROOT))

BEGAN = time.perf_counter()
_ARGUMENTS = sys.argv[1:]  # as given: a script may have to hide them from a library that parses the command line

_PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "safetensors",
    "diffusers",
    "transformer_engine",
    "fa3-fwd",
    "flash-attn-4",
    "comfy-kitchen",
)


def versions() -> dict[str, str]:
    """Python and the packages that decide speed, those that are installed."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    if "torch" in sys.modules:
        import torch

        found["torch"] = torch.__version__
        if torch.version.cuda:
            found["cuda"] = torch.version.cuda
            found["cudnn"] = str(torch.backends.cudnn.version())
    return found


def device_name(device: str = "cpu") -> str:
    """The GPU's own name, or the processor's."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.get_device_name(device)
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def write_results(path: str | Path, rows: list[dict[str, Any]], device: str = "cpu") -> None:
    """Write ``{"device", "versions", "date", "command", "rows"}``; the command is this script's own line."""
    arguments = [Path(a).name if Path(a).is_absolute() else a for a in _ARGUMENTS]  # no path of one machine
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    command = " ".join(
        [
            f"torchrun --nproc-per-node {ranks}" if ranks > 1 else "python",
            Path(sys.argv[0]).resolve().relative_to(ROOT).as_posix(),
            *map(shlex.quote, arguments),
        ]
    )
    result = {
        "device": device_name(device),
        "versions": versions(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": command,
        "rows": rows,
    }
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.part")
    unfinished.write_text(json.dumps(result, indent=1) + "\n")
    unfinished.replace(path)  # a script that is stopped leaves the rows that it had


class Phases:
    """What a benchmark is doing, on stderr as it begins, and at the end of a row how long each of it took. A row that
    does not come in time has then said where the time went. Silent on ranks that print nothing."""

    def __init__(self, *, silent: bool = False) -> None:
        self.silent = silent
        self._seconds: dict[str, float] = {}
        self._now: tuple[str, float] | None = None

    def __call__(self, short: str, what: str = "") -> None:
        """Begin a phase, of the name ``short``; ``what`` says more of it."""
        self._end()
        self._now = short, time.perf_counter()
        self._say(what or short)

    def done(self, what: str = "row complete") -> None:
        """End a row: seconds by phase."""
        self._end()
        self._say("; ".join([what, *(f"{name} {seconds:.1f} s" for name, seconds in self._seconds.items())]))
        self._seconds.clear()

    def _end(self) -> None:
        if "torch" in sys.modules:
            import torch

            if torch.cuda.is_initialized():  # what a phase queued is its own
                torch.cuda.synchronize()
        if self._now is not None:
            name, began = self._now
            self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - began
            self._now = None

    def _say(self, what: str) -> None:
        if not self.silent:
            print(f"[{time.perf_counter() - BEGAN:6.1f} s] {what}", file=sys.stderr, flush=True)


BEHIND_CYCLES = 30_000_000
"""Some 15 ms of a GPU's clock: longer than the host takes to launch a hundred kernels."""


def milliseconds(
    function: Callable[[], Any], device: str, *, repeats: int = 5, warmup: int = 2, behind: bool = False
) -> list[float]:
    """Time of each run in ms: CUDA events on a GPU, the wall clock elsewhere.

    Args:
        behind: on a GPU that is busy until everything is launched, as inside a forward, where the host runs ahead:
            many small kernels take what they take, not what launching them takes.
    """
    for _ in range(warmup):
        function()
    times = []
    if device.startswith("cuda"):
        import torch

        for _ in range(repeats):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda.synchronize()
            if behind:
                torch.cuda._sleep(BEHIND_CYCLES)
            start.record()
            function()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end))
        return times
    for _ in range(repeats):
        begin = time.perf_counter()
        function()
        times.append(1000 * (time.perf_counter() - begin))
    return times


def median_ms(function: Callable[[], Any], device: str, **kwargs: int) -> float:
    """Median of ``milliseconds``."""
    return statistics.median(milliseconds(function, device, **kwargs))
