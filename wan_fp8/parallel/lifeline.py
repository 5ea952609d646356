"""A worker ends with the process that started it, however that one ends."""

from __future__ import annotations

import ctypes
import os
import select
import shutil
import signal
import sys
import threading

PR_SET_PDEATHSIG = 1


def hold(parent: int, folder: str | None = None) -> None:
    """Watch the parent from now on: by the pipe on standard input, which closes with it; by the number of this
    process's parent, should somebody else have inherited the pipe; and by a signal of the kernel, which reaches a
    process that is stopped. The thread that starts workers must live as long as they shall.

    Args:
        parent: its process id.
        folder: removed at the end, if it is still there.
    """
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL if folder is None else signal.SIGTERM)
    if folder is not None:
        signal.signal(signal.SIGTERM, lambda *_: _leave(folder))
    threading.Thread(target=_watch, args=(parent, folder), daemon=True, name="wan-fp8-lifeline").start()


def _watch(parent: int, folder: str | None) -> None:
    while os.getppid() == parent:
        readable, _, _ = select.select([sys.stdin], [], [], 1.0)
        if readable and not os.read(sys.stdin.fileno(), 4096):
            break
    _leave(folder)


def _leave(folder: str | None) -> None:
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)
    os._exit(0)
