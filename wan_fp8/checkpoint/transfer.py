"""Moving tensor bytes from a file to memory in the wanted type, once, without a second copy of the tensor.

A tensor that keeps its type is a private view of the mapped file: no read, no memory until it is touched, and pages
that the system may drop again. A tensor that changes type is streamed: worker threads read pieces of it into small
buffers that stay in the CPU's cache, convert them, and write them where they belong, so that beside the result only
some kilobytes per worker are in use.
"""

from __future__ import annotations

import mmap
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from ..errors import CheckpointError
from .header import open_binary

PIECE = 32768
"""Elements converted at a time by torch. Not more: torch splits larger operations over its own threads, and workers
that each wait for those are up to 30 times slower than workers that do the work themselves (measured on two shared
cores)."""
TABLE_PIECE = 65536
"""Elements looked up at a time; bytes, indices and results stay in the second-level cache."""
BLOCK_BYTES = 4 << 20
"""What one worker takes at a time. Tensors below this are read by the caller's thread."""
MAX_WORKERS = 8

_MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)

Fill = Callable[[int, int], None]
"""Reads and converts elements [first, last) of the tensor."""


class FileBytes:
    """One open file: reads at any place, from any thread, and maps itself on demand."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: BinaryIO = open_binary(path)
        self._lock = threading.Lock()
        self._map: mmap.mmap | None = None

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill ``buffer`` from ``offset``; CheckpointError if the file ends before."""
        done = 0
        while done < len(buffer):
            count = self._read_some(buffer[done:], offset + done)
            if not count:
                raise CheckpointError(f"{self.path.name} became shorter while it was read; load it again")
            done += count

    def _read_some(self, buffer: memoryview, offset: int) -> int:
        try:
            if hasattr(os, "preadv"):
                return os.preadv(self._file.fileno(), [buffer], offset)
            with self._lock:  # Windows has no positioned read
                self._file.seek(offset)
                return self._file.readinto(buffer) or 0  # type: ignore[attr-defined]
        except OSError as error:
            raise CheckpointError(
                f"{self.path.name} cannot be read ({error.strerror or error}): check the disk, or download it again"
            ) from error

    def view(self, offset: int, nbytes: int) -> Tensor:
        """uint8 view [nbytes] of the mapped file; private: writing to it copies the page and leaves the file alone."""
        with self._lock:
            if self._map is None:
                self._map = self._mapped()
        return torch.frombuffer(self._map, dtype=torch.uint8, count=nbytes, offset=offset)

    def _mapped(self) -> mmap.mmap:
        try:
            if sys.platform == "linux":
                # Without NORESERVE the kernel refuses a private mapping larger than its memory, though none is taken.
                flags, access = mmap.MAP_PRIVATE | _MAP_NORESERVE, mmap.PROT_READ | mmap.PROT_WRITE
                return mmap.mmap(self._file.fileno(), 0, flags=flags, prot=access)
            return mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_COPY)
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{self.path.name} cannot be mapped into memory ({error}); load it with map_files=False"
            ) from error

    def close(self) -> None:
        """Close the handle. Views that were handed out keep the mapping alive."""
        self._file.close()
        self._map = None


class Workers:
    """Threads that fill tensors, started at the first large one and shared by the shards of a checkpoint."""

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None

    def run(self, fill: Fill, count: int, step: int) -> None:
        """Call ``fill`` for every block of ``step`` elements of ``count``; the first error of a block is raised."""
        if count <= step:
            fill(0, count)
            return
        if self._pool is None:
            threads = min(MAX_WORKERS, max(2, os.cpu_count() or 2))
            self._pool = ThreadPoolExecutor(threads, thread_name_prefix="wan-fp8-read")
        inference = (
            torch.is_inference_mode_enabled()
        )  # each thread has its own, and a tensor made in one is shut to others

        def block(first: int) -> None:
            with torch.inference_mode(inference):
                fill(first, min(first + step, count))

        futures = [self._pool.submit(block, first) for first in range(0, count, step)]
        try:
            for future in futures:
                future.result()
        finally:
            for future in futures:
                future.cancel()

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None


def stream(
    file: FileBytes,
    offset: int,
    shape: tuple[int, ...],
    stored: torch.dtype,
    dtype: torch.dtype,
    scale: Tensor | None,
    workers: Workers,
) -> Tensor:
    """Read a tensor at ``offset`` into fresh CPU memory as ``dtype``, times ``scale`` (see TensorSource.read)."""
    out = torch.empty(shape, dtype=dtype)
    count = out.numel()
    if count == 0:
        return out
    row = count // shape[0] if shape else 1
    flat = out.view(-1)
    if stored == dtype and scale is None:
        fill: Fill = _raw_fill(file, offset, flat)
    elif stored.itemsize == 1 and dtype.itemsize in (2, 4) and not stored.is_complex and stored != torch.bool:
        fill = _table_fill(file, offset, flat, stored, scale, row)
    else:
        fill = _cast_fill(file, offset, flat, stored, scale, row)
    step = max(1, BLOCK_BYTES // (stored.itemsize * row)) * row if scale is not None and scale.numel() > 1 else 0
    workers.run(fill, count, step or BLOCK_BYTES // stored.itemsize)
    return out


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.view(torch.uint8).numpy().data


def _raw_fill(file: FileBytes, offset: int, flat: Tensor) -> Fill:
    target, size = _bytes(flat), flat.element_size()

    def fill(first: int, last: int) -> None:
        file.read_into(target[first * size : last * size], offset + first * size)

    return fill


def _pieces(first: int, last: int, row: int, piece: int = PIECE) -> range:
    """Starts of the pieces of a block: ``piece`` elements, or as many whole rows as fit (one at least)."""
    return range(first, last, piece if row == 1 else max(1, piece // row) * row)


def _cast_fill(file: FileBytes, offset: int, flat: Tensor, stored: torch.dtype, scale: Tensor | None, row: int) -> Fill:
    """Through torch's own casts, a piece at a time."""
    factor, row = _scale_rows(scale, row)

    def fill(first: int, last: int) -> None:
        pieces = _pieces(first, last, row)
        staging = torch.empty(min(pieces.step, last - first), dtype=stored)
        buffer, size = _bytes(staging), stored.itemsize
        for start in pieces:
            count = min(pieces.step, last - start)
            file.read_into(buffer[: count * size], offset + start * size)
            value, target = staging[:count], flat[start : start + count]
            if factor is None:
                target.copy_(value)
            else:
                rows = factor[start // row : -(-(start + count) // row)] if factor.ndim else factor
                target.view(-1, row).copy_(value.to(torch.float32).view(-1, row) * rows)

    return fill


def _scale_rows(scale: Tensor | None, row: int) -> tuple[Tensor | None, int]:
    """The scale as fp32 scalar or [rows, 1], and the length of the rows that it needs (1: any piece will do)."""
    if scale is None:
        return None, 1
    factor = scale.detach().to("cpu", torch.float32)
    return (factor.reshape(()), 1) if factor.numel() == 1 else (factor.reshape(-1, 1), row)


def _table_fill(
    file: FileBytes, offset: int, flat: Tensor, stored: torch.dtype, scale: Tensor | None, row: int
) -> Fill:
    """One-byte types have 256 values: convert (and scale) those exactly, then look up two bytes at a time.

    Torch's casts from FP8 run at 0.1 GB/s on a CPU; the table runs at 1.5 GB/s per thread and gives the same bits.
    """
    factor, row = _scale_rows(scale, row)
    per_row = factor is not None and factor.ndim > 0
    values = torch.arange(256, dtype=torch.int16).to(torch.uint8).view(stored).to(torch.float32)
    if factor is not None and not per_row:
        values = values * factor
    table_dtype = torch.float32 if per_row else flat.dtype
    table = _pair_table(values.to(table_dtype))
    target = _bytes(flat)
    size = table_dtype.itemsize

    def fill(first: int, last: int) -> None:
        pieces = _pieces(first, last, row, PIECE if per_row else TABLE_PIECE)
        staging = np.empty(min(pieces.step, last - first) + 1, np.uint8)
        buffer = staging.data
        real = torch.empty(len(staging) + 1, dtype=torch.float32) if per_row else None
        for start in pieces:
            count = min(pieces.step, last - start)
            file.read_into(buffer[:count], offset + start)
            into = target[start * size : (start + count) * size] if real is None else _bytes(real)[: count * size]
            _look_up(table, staging, count, np.frombuffer(into, np.uint8), size)
            if real is not None and factor is not None:
                rows = factor[start // row : (start + count) // row]
                flat[start : start + count].view(-1, row).copy_(real[:count].view(-1, row) * rows)

    return fill


def _pair_table(values: Tensor) -> np.ndarray:
    """[65536] integers twice as wide as ``values`` [256]: entry ``low + 256 * high`` holds both results, low first."""
    bits = values.view(torch.uint8).numpy().view(f"u{values.element_size()}")
    wide = bits.astype(f"u{2 * values.element_size()}")
    return ((wide[:, None] << np.array(8 * values.element_size(), wide.dtype)) | wide[None, :]).reshape(-1)


def _look_up(table: np.ndarray, staging: np.ndarray, count: int, target: np.ndarray, size: int) -> None:
    even = count & ~1
    if even:
        np.take(table, staging[:even].view(np.uint16), out=target[: even * size].view(table.dtype), mode="clip")
    if count != even:
        target[even * size :] = table[staging[count - 1 : count].astype(np.intp)].view(np.uint8)[:size]
