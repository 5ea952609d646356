#!/usr/bin/env python3
"""Write a small random Wan2.2 checkpoint: the real key names, shapes' rules and folder layouts in about 40 MB.

    python scripts/make_tiny_checkpoint.py models/wan/tiny --task t2v --layout official

It loads wherever a real one does (this pack, core ComfyUI, Diffusers) and samples in seconds on a CPU; the video is
coloured noise. The same arguments write the same tensors.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

sys.path.insert(0, str(Path(__file__).resolve().parent))

from tiny_checkpoint.extended import CLASSES
from tiny_checkpoint.layouts import LAYOUTS, Checkpoint
from tiny_checkpoint.transformer import FP8_FORMATS, SIZES

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
RECEIPT = "tiny.json"
"""Says what the folder holds, so that asking for the same thing again costs nothing."""
VERSION = 1
"""Raised when the same arguments would write other tensors."""


def make_tiny_checkpoint(
    out_dir: str | Path,
    task: str = "t2v",
    layout: str = "official",
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    fp8: str | None = None,
) -> Path:
    """Write a checkpoint, complete or not at all.

    Args:
        out_dir: A folder that is not there yet, is empty, or was written by this function.
        task: "t2v", "i2v" (two experts each), "ti2v", "animate" or "s2v" (one transformer).
        layout: "official", "diffusers" (the first three tasks) or "comfy".
        seed: Of the weights, 0 or more.
        dtype: Of the transformers; text encoder and VAE keep the published types.
        fp8: Storage of the transformers in the comfy layout: "scaled_fp8", "comfy_quant", "metadata" or None.
    Returns:
        The folder.
    Raises:
        ValueError: an argument is not one of these, or the folder holds something else.
    """
    out_dir = Path(out_dir)
    _check(task, layout, seed, dtype, fp8)
    wanted = {"version": VERSION, "task": task, "layout": layout, "seed": seed, "dtype": str(dtype), "fp8": fp8}
    found = _read_receipt(out_dir)
    if foreign := _foreign_files(out_dir, found):
        raise ValueError(f"{out_dir} holds {foreign[0]}, which this script did not write; give a new or empty folder")
    if found is not None and found["made"] == wanted and found["files"] == _file_sizes(out_dir):
        return out_dir
    partial = out_dir.with_name(f"{out_dir.name}.{os.getpid()}.partial")
    partial.mkdir(parents=True)
    try:
        LAYOUTS[layout](partial, Checkpoint(task=task, seed=seed, dtype=dtype, fp8=fp8))
        receipt = {"made": wanted, "files": _file_sizes(partial)}
        (partial / RECEIPT).write_text(json.dumps(receipt, indent=2) + "\n")
        if out_dir.exists():
            shutil.rmtree(out_dir)
        partial.rename(out_dir)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out_dir


def _check(task: str, layout: str, seed: int, dtype: torch.dtype, fp8: str | None) -> None:
    if task not in SIZES:
        raise ValueError(f"task must be one of {', '.join(SIZES)}; got {task!r}")
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}; got {layout!r}")
    if layout == "diffusers" and task in CLASSES:
        raise ValueError(f"the diffusers layout is written for the other tasks only; got {task!r}")
    if seed < 0:
        raise ValueError(f"seed must be 0 or more; got {seed}")
    if dtype not in DTYPES.values():
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}; got {dtype}")
    if fp8 is not None and fp8 not in FP8_FORMATS:
        raise ValueError(f"fp8 must be one of {', '.join(FP8_FORMATS)}; got {fp8!r}")
    if fp8 is not None and layout != "comfy":
        raise ValueError(f"fp8 files exist in the comfy layout only; got the {layout} layout")


def _file_sizes(folder: Path) -> dict[str, int]:
    """Bytes of every file below, but for the receipt."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.stat().st_size for path in files if path != folder / RECEIPT}


def _foreign_files(folder: Path, receipt: dict[str, Any] | None) -> list[str]:
    """Files that rewriting the folder would destroy."""
    if folder.is_file():
        return ["a file's content"]
    written = receipt["files"] if receipt else {}
    return [name for name in _file_sizes(folder) if name not in written]


def _read_receipt(folder: Path) -> dict[str, Any] | None:
    path = folder / RECEIPT
    if not path.is_file():
        return None
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def main(
    out_dir: Annotated[Path, typer.Argument(help="Folder to write; must be new, empty or written by this script.")],
    task: Annotated[str, typer.Option(help=f"One of {', '.join(SIZES)}.")] = "t2v",
    layout: Annotated[str, typer.Option(help=f"One of {', '.join(LAYOUTS)}.")] = "official",
    seed: Annotated[int, typer.Option(min=0, help="Seed of the weights.")] = 0,
    dtype: Annotated[str, typer.Option(help=f"Type of the transformers: {', '.join(DTYPES)}.")] = "bfloat16",
    fp8: Annotated[str | None, typer.Option(help=f"Comfy layout only: {', '.join(FP8_FORMATS)}.")] = None,
) -> None:
    """Write a small random Wan2.2 checkpoint with the real names and layout."""
    if dtype not in DTYPES:
        raise typer.BadParameter(f"dtype must be one of {', '.join(DTYPES)}; got {dtype!r}")
    try:
        folder = make_tiny_checkpoint(out_dir, task, layout, seed, DTYPES[dtype], fp8)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in files:
        typer.echo(f"{path.stat().st_size / 2**20:8.2f} MiB  {path.relative_to(folder)}")
    typer.echo(f"{sum(path.stat().st_size for path in files) / 2**20:8.2f} MiB  in {folder}")


if __name__ == "__main__":
    typer.run(main)
