"""A worker ends with the process that started it, however that one ends, and takes the pool's other workers along."""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import sys
import threading
from pathlib import Path

PIDS = "pids"
"""File in a pool's folder with the process ids of its workers, one a line."""
MODULE = "wan_fp8.parallel.worker"


def hold(parent: int, folder: str) -> None:
    """Watch the parent from now on: by the pipe on standard input, which closes with it, and by the number of this
    process's parent, should somebody else have inherited the pipe.

    Args:
        parent: its process id.
        folder: of the pool; removed at the end.
    """
    threading.Thread(target=_watch, args=(parent, Path(folder)), daemon=True, name="wan-fp8-lifeline").start()


def _watch(parent: int, folder: Path) -> None:
    while os.getppid() == parent:
        readable, _, _ = select.select([sys.stdin], [], [], 1.0)
        if readable and not os.read(sys.stdin.fileno(), 4096):
            break
    leave(folder)


def leave(folder: Path) -> None:
    """Kill the other workers, which may be stopped or stuck, remove what the pool has on disk, and end."""
    try:
        pids = [int(line) for line in (folder / PIDS).read_text().split()]
    except OSError:
        pids = []  # another one was here first
    for pid in pids:
        with contextlib.suppress(OSError):  # it has ended
            if pid != os.getpid() and MODULE.encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
                os.kill(pid, signal.SIGKILL)
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(0)
