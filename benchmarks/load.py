"""Seconds and peak memory to load a checkpoint, against reading its files once. Target: 1.3 times that, and no more
memory than the loaded model and one shard.

    python benchmarks/load.py --size-gb 5 --json benchmarks/results/load.json

It writes a checkpoint of the 14B model's width, with as many layers as the size allows and random values, in each
layout, and runs every measurement in a process of its own, in turns, so that a busy machine disturbs all alike. Medians
are reported.

``read``: every weight file front to back through one buffer of 1 MiB, as ``cat FILES > /dev/null`` does. ``read into
memory``: the same into fresh memory as large as the files, which a loader that keeps weights cannot go below without
mapping; the target is judged against this. ``load``: ``load_transformer``. ``first use``: one pass over every byte of
the loaded weights; for mapped weights this is when the file is read, so load and first use are judged together.
``warm``: the files are in the page cache; ``cold``: they were dropped from it before each run.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import common
import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

from wan_fp8.checkpoint.header import DTYPES
from wan_fp8.checkpoint.key_maps import DIT
from wan_fp8.checkpoint.load import load_transformer
from wan_fp8.models.specs import T2V_A14B, ModelSpec
from wan_fp8.models.wan import build_model

LIMIT_RATIO = 1.3
GB = 1e9
SHARD_BYTES = 1 << 30
EXPERT = "high_noise"
STORED_NAMES = {dtype: name for name, dtype in DTYPES.items()}
DTYPE_NAMES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One way of loading one checkpoint."""

    layout: str
    """``official``, ``diffusers`` or ``comfy``."""
    stored: str
    """Type of the block matrices; the rest of an FP8 file is bf16."""
    loaded: str | None
    """``bf16``, or None for as stored."""
    map_files: bool = True


CASES = (
    Case(layout="official", stored="fp32", loaded="bf16"),
    Case(layout="diffusers", stored="bf16", loaded="bf16"),
    Case(layout="diffusers", stored="bf16", loaded="bf16", map_files=False),
    Case(layout="comfy", stored="bf16", loaded="bf16"),
    Case(layout="comfy", stored="fp8", loaded=None),
    Case(layout="comfy", stored="fp8", loaded="bf16"),
)


# ---- the checkpoints -------------------------------------------------------------------------------------------------


def plan(case: Case, size_bytes: float) -> tuple[ModelSpec, dict[str, tuple[torch.dtype, tuple[int, ...]]]]:
    """The model whose file comes closest to ``size_bytes``, and its tensors as stored."""

    def tensors(layers: int) -> tuple[ModelSpec, dict[str, tuple[torch.dtype, tuple[int, ...]]]]:
        spec = replace(T2V_A14B, num_layers=layers)
        with torch.device("meta"):
            state = build_model(spec).state_dict()
        return spec, dict(_stored(case, {name: tuple(value.shape) for name, value in state.items()}))

    def nbytes(layers: int) -> int:
        return sum(dtype.itemsize * math.prod(shape) for dtype, shape in tensors(layers)[1].values())

    one, two = nbytes(1), nbytes(2)
    return tensors(max(1, round((size_bytes - one) / (two - one)) + 1))


def _stored(
    case: Case, shapes: dict[str, tuple[int, ...]]
) -> Iterator[tuple[str, tuple[torch.dtype, tuple[int, ...]]]]:
    high = torch.bfloat16 if case.stored == "fp8" else DTYPE_NAMES[case.stored]
    for name, shape in shapes.items():
        matrix = name.startswith("blocks.") and len(shape) == 2
        stored_name = str(DIT.from_official(name)) if case.layout == "diffusers" else name
        yield stored_name, (torch.float8_e4m3fn if matrix and case.stored == "fp8" else high, shape)
        if matrix and case.stored == "fp8":
            yield f"{name.removesuffix('.weight')}.scale_weight", (torch.float32, ())
    if case.stored == "fp8":
        yield "scaled_fp8", (torch.float8_e4m3fn, (2,))


def write_checkpoint(case: Case, root: Path, size_bytes: float) -> Path:
    """Write the checkpoint, tensor by tensor; returns what ``load_transformer`` is given.

    The second expert of a folder is a link to the first: it has to be there, and is not read.
    """
    _, tensors = plan(case, size_bytes)
    if case.layout == "comfy":
        path = root / "wan2.2_t2v_high_noise_14B.safetensors"
        _write_file(path, tensors)
        return path
    first, second = (
        ("high_noise_model", "low_noise_model") if case.layout == "official" else ("transformer", "transformer_2")
    )
    (root / first).mkdir()
    (root / second).symlink_to(root / first, target_is_directory=True)
    _write_shards(root / first, tensors)
    if case.layout == "diffusers":
        component = ["diffusers", "WanTransformer3DModel"]
        index = {
            "_class_name": "WanPipeline",
            "boundary_ratio": 0.875,
            "transformer": component,
            "transformer_2": component,
        }
        (root / "model_index.json").write_text(json.dumps(index))
    return root


def _write_shards(folder: Path, tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
    shards: list[dict[str, tuple[torch.dtype, tuple[int, ...]]]] = [{}]
    filled = 0
    for name, (dtype, shape) in tensors.items():
        nbytes = dtype.itemsize * math.prod(shape)
        if filled + nbytes > SHARD_BYTES and shards[-1]:
            shards.append({})
            filled = 0
        shards[-1][name] = (dtype, shape)
        filled += nbytes
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"diffusion_pytorch_model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_file(folder / file, shard)
        weight_map |= dict.fromkeys(shard, file)
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))


def _write_file(path: Path, tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
    """A safetensors file without ever holding more than one buffer of it."""
    header, end = {}, 0
    for name, (dtype, shape) in tensors.items():
        first, end = end, end + dtype.itemsize * math.prod(shape)
        header[name] = {"dtype": STORED_NAMES[dtype], "shape": shape, "data_offsets": [first, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    random = torch.randn(1 << 24, generator=torch.Generator().manual_seed(0)) * 0.02
    buffers = {dtype: random.to(dtype).view(torch.uint8).numpy() for dtype in {dtype for dtype, _ in tensors.values()}}
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for dtype, shape in tensors.values():
            left = dtype.itemsize * math.prod(shape)
            while left:
                left -= file.write(buffers[dtype][: min(left, buffers[dtype].size)].data)
        file.flush()
        os.fsync(file.fileno())


# ---- what each process measures -------------------------------------------------------------------------------------


def weight_files(source: Path) -> list[Path]:
    """The files that a load reads."""
    if source.is_file():
        return [source]
    return sorted(next(source.glob("*/diffusion_pytorch_model-00001-*")).parent.glob("*.safetensors"))


def peak_rss() -> int:
    """Most memory that this process had, in bytes: its own and the mapped pages that it touched."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("the peak of a process's memory is read from /proc/self/status, which this system has not")


def read_once(files: list[Path]) -> dict[str, float]:
    """Front to back through one buffer."""
    buffer = bytearray(1 << 20)
    begin = time.perf_counter()
    for path in files:
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return {"seconds": time.perf_counter() - begin}


def read_into_memory(files: list[Path]) -> dict[str, float]:
    """Into one fresh buffer for each file, all of them kept."""
    begin = time.perf_counter()
    kept = []
    for path in files:
        buffer = np.empty(path.stat().st_size, np.uint8)
        view, done = buffer.data, 0
        with open(path, "rb", buffering=0) as file:
            while count := file.readinto(view[done:]):
                done += count
        kept.append(buffer)
    return {"seconds": time.perf_counter() - begin}


def load_once(source: Path, case: Case) -> dict[str, float]:
    """Load, then pass over every byte."""
    before = peak_rss()
    dtype = None if case.loaded is None else DTYPE_NAMES[case.loaded]
    begin = time.perf_counter()
    model = load_transformer(source, None if source.is_file() else EXPERT, dtype=dtype, map_files=case.map_files)
    loaded = time.perf_counter()
    peak = peak_rss()
    for parameter in model.parameters():
        flat = parameter.detach().flatten().view(torch.uint8).numpy()
        np.bitwise_xor.reduce(flat[: flat.size // 8 * 8].view(np.uint64))
    used = time.perf_counter()
    nbytes = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    return {
        "seconds": loaded - begin,
        "first_use_s": used - loaded,
        "result_gb": nbytes / GB,
        "peak_rss_gb": (peak - before) / GB,
        "peak_rss_used_gb": (peak_rss() - before) / GB,
    }


def in_process(measure: str, source: Path, case: Case, cold: bool) -> dict[str, float]:
    """One measurement in a fresh process."""
    if cold:
        for path in weight_files(source):
            with open(path, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    arguments = [
        sys.executable,
        __file__,
        "--measure",
        measure,
        "--source",
        str(source),
        "--case",
        str(CASES.index(case)),
    ]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"a measurement failed:\n{done.stderr}")
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


# ---- the table ------------------------------------------------------------------------------------------------------


def measured(cases: list[Case], source: Path, runs: int, cold: bool) -> list[dict[str, Any]]:
    """A row for each way of loading one checkpoint, warm or cold; all are compared with the same readings."""
    if not cold:
        read_once(weight_files(source))
    reads, memories = [], []
    loads: dict[Case, list[dict[str, float]]] = {case: [] for case in cases}
    for _ in range(runs):
        reads.append(in_process("read", source, cases[0], cold)["seconds"])
        memories.append(in_process("memory", source, cases[0], cold)["seconds"])
        for case, results in loads.items():
            results.append(in_process("load", source, case, cold))
    read_s, memory_s = (round(statistics.median(seconds), 3) for seconds in (reads, memories))
    return [row(case, weight_files(source), results, read_s, memory_s, cold) for case, results in loads.items()]


def row(
    case: Case, files: list[Path], loads: list[dict[str, float]], read_s: float, memory_s: float, cold: bool
) -> dict[str, Any]:
    """The result of several loads; times are medians."""

    def median(key: str) -> float:
        return round(statistics.median(load[key] for load in loads), 3)

    load_s = median("seconds")
    size_gb = sum(path.stat().st_size for path in files) / GB
    limit_gb = median("result_gb") + max(path.stat().st_size for path in files) / GB
    ratio = round((load_s + median("first_use_s")) / memory_s, 2)
    # A file that doubles in memory cannot be loaded in the time of reading it.
    judged = median("result_gb") <= 1.01 * size_gb
    return {
        "model": "t2v-A14B",
        "layers": plan(case, size_gb * GB)[0].num_layers,
        "layout": case.layout,
        "stored": case.stored,
        "loaded": case.loaded or "as stored",
        "mapped": case.map_files and case.loaded in (None, case.stored),
        "page_cache": "cold" if cold else "warm",
        "runs": len(loads),
        "checkpoint_gb": round(size_gb, 3),
        "read_s": read_s,
        "read_into_memory_s": memory_s,
        "load_s": load_s,
        "load_spread_s": [round(f(load["seconds"] for load in loads), 3) for f in (min, max)],
        "first_use_s": median("first_use_s"),
        "ratio_to_read": round(load_s / read_s, 2),
        "ratio_to_read_into_memory": round(load_s / memory_s, 2),
        "ratio_with_first_use": ratio,
        "limit_ratio": LIMIT_RATIO if judged else None,
        "result_gb": median("result_gb"),
        "peak_rss_gb": median("peak_rss_gb"),
        "peak_rss_used_gb": median("peak_rss_used_gb"),
        "limit_rss_gb": round(limit_gb, 3),
        "within": (not judged or ratio <= LIMIT_RATIO) and median("peak_rss_used_gb") <= limit_gb,
    }


def show(rows: list[dict[str, Any]], console: Console) -> bool:
    """Print the table; whether every row is within both limits."""
    table = Table(
        "layout", "stored", "loaded", "cache", "GB", "read s", "into memory s", "load s", "ratio", "first use s"
    )
    table.add_column("with use")
    table.add_column("peak GB (limit)")
    good = True
    for r in rows:
        good = good and r["within"]
        table.add_row(
            r["layout"],
            r["stored"],
            r["loaded"] + (" (mapped)" if r["mapped"] else ""),
            r["page_cache"],
            f"{r['checkpoint_gb']:.2f}",
            *(f"{r[key]:.2f}" for key in ("read_s", "read_into_memory_s", "load_s", "ratio_to_read_into_memory")),
            f"{r['first_use_s']:.2f}",
            f"{r['ratio_with_first_use']:.2f}",
            f"{r['peak_rss_used_gb']:.2f} ({r['limit_rss_gb']:.2f})",
            style="" if r["within"] else "red",
        )
    console.print(table)
    return good


def check_room(folder: Path, size_gb: float, console: Console) -> None:
    """Stop when the disk or the memory cannot take what is asked for."""
    free = shutil.disk_usage(folder).free / GB
    if free < 1.2 * size_gb + 1:
        raise SystemExit(
            f"{folder} has {free:.1f} GB free and {1.2 * size_gb + 1:.1f} are needed; use --folder or --size-gb"
        )
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GB
    if memory < 3.2 * size_gb:
        console.print(
            f"[yellow]{memory:.1f} GB of memory for {3.2 * size_gb:.1f}: warm rows may not stay in the page cache"
        )


def main(
    size_gb: Annotated[float, typer.Option(min=0.01, help="Size of each checkpoint.")] = 5.0,
    runs: Annotated[int, typer.Option(min=1, help="Fresh processes per measurement; the median counts.")] = 3,
    cold: Annotated[bool, typer.Option(help="Also with the files dropped from the page cache (Linux).")] = True,
    only: Annotated[str | None, typer.Option(help="One layout: official, diffusers or comfy.")] = None,
    folder: Annotated[Path | None, typer.Option(help="Where the checkpoints are written, one at a time.")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the results file.")] = None,
    measure: Annotated[str | None, typer.Option(hidden=True)] = None,
    source: Annotated[Path | None, typer.Option(hidden=True)] = None,
    case: Annotated[int, typer.Option(hidden=True)] = 0,
) -> None:
    """Measure loading in every layout; exit 1 if a row misses its target."""
    if measure is not None and source is not None:
        files = weight_files(source)
        result = {"read": read_once, "memory": read_into_memory}[measure](files) if measure != "load" else None
        print(json.dumps(result or load_once(source, CASES[case])))
        return
    console = Console(width=None if sys.stdout.isatty() else 160)
    rows = []
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        check_room(Path(scratch), size_gb, console)
        for key in dict.fromkeys((case.layout, case.stored) for case in CASES if only in (None, case.layout)):
            cases = [case for case in CASES if (case.layout, case.stored) == key]
            console.print(f"writing {size_gb:g} GB: {key[0]}, {key[1]}")
            root = Path(tempfile.mkdtemp(dir=scratch))
            given = write_checkpoint(cases[0], root, size_gb * GB)
            for is_cold in (False, True) if cold else (False,):
                found = measured(cases, given, runs, is_cold)
                rows += found
                for done in found:
                    seconds = f"{done['load_s']} s, reading into memory {done['read_into_memory_s']} s"
                    console.print(f"  {done['page_cache']}, {done['loaded']}: {seconds}")
            shutil.rmtree(root)
    good = show(rows, console)
    if json_path is not None:
        common.write_results(json_path, rows)
    if not good:
        console.print(f"[red]missed: {LIMIT_RATIO} times reading into memory, and memory for the model and one shard")
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
