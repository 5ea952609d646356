"""A pool of worker processes on this machine: one for each GPU, ended with this process or before."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

from ..errors import InputError, PoolError
from .client import Connection
from .lifeline import MODULE, PIDS
from .links import LAST_LINES, LEFT
from .wire import Channel, Json, paired

ROOT = Path(__file__).resolve().parents[2]
"""The folder that ``wan_fp8`` is imported from, whatever name this module goes by here."""
START_SECONDS = 180.0
NOT_INHERITED = (
    "PYTORCH_CUDA_ALLOC_CONF",
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_HIP_ALLOC_CONF",
    "PYTHONSAFEPATH",
    "PYTHONHOME",
)
"""ComfyUI may ask for an allocator whose memory NCCL cannot register; its Python settings are its own, too."""


class _Worker:
    """One process and the last lines that it wrote."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process
        self.lines: deque[str] = deque(maxlen=LAST_LINES)
        self._reader = threading.Thread(target=self._read, daemon=True, name="wan-fp8-worker-output")
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.decode(errors="replace").rstrip())

    def last_lines(self) -> list[str]:
        """The last of what it wrote."""
        if self.process.poll() is not None:
            self._reader.join(0.5)
        return list(self.lines)

    def end(self) -> None:
        """Kill it, and wait for its end. May be called again."""
        self.process.kill()
        self.process.wait()
        self._reader.join(2.0)
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                stream.close()


class LocalWorkers:
    """The processes of one pool, and the connection to it."""

    def __init__(
        self,
        devices: Sequence[str],
        *,
        watchdog: float,
        idle: Callable[[], None] = lambda: None,
        poll: Callable[[], None] = lambda: None,
    ) -> None:
        """Start them and wait until they have found each other.

        Args:
            devices: ``cuda:N`` as this process counts GPUs, each once; or ``cpu``, as often as there shall be workers.
            poll: See ``Connection.request``.
        Raises:
            InputError: there are no such devices.
            PoolError: a worker did not come up.
        """
        check_devices(devices)
        self.devices = list(devices)
        self.names = [
            name.replace("cuda:", "GPU ") if name != "cpu" else f"CPU process {n}" for n, name in enumerate(devices)
        ]
        self.folder = tempfile.mkdtemp(prefix="wan_fp8_pool_")
        self._workers: list[_Worker] = []
        self._ended = threading.Lock()
        self._explained: PoolError | None = None
        self._explaining = threading.Lock()
        try:
            caller = self._start(watchdog)
            self.connection = Connection(Channel(caller), watchdog, explain=self.explain, idle=idle)
            self.connection.wait_until_ready(START_SECONDS, poll)
        except BaseException:
            self.end()
            raise

    @property
    def pids(self) -> list[int]:
        """Of the workers, in the order of their ranks."""
        return [worker.process.pid for worker in self._workers]

    def end(self) -> None:
        """Kill every worker and wait for its end; nothing of the pool is left."""
        with self._ended:
            for worker in self._workers:
                worker.process.kill()  # all at once: each would wait for the next
            for worker in self._workers:
                worker.end()
            shutil.rmtree(self.folder, ignore_errors=True)

    def _start(self, watchdog: float) -> socket.socket:
        world = len(self.devices)
        caller, theirs = paired()
        pairs = [paired() for _ in range(1, world)]  # (the hub's end, the rank's end)
        visible, local = _visible(self.devices)
        common = {
            "parent": os.getpid(),
            "folder": self.folder,
            "world": world,
            "watchdog": watchdog,
            "names": self.names,
        }
        try:
            for rank in range(world):
                ends = [theirs, *(hub for hub, _ in pairs)] if rank == 0 else [pairs[rank - 1][1]]
                config = {**common, "rank": rank, "device": local[rank]}
                if rank == 0:
                    config |= {"caller": theirs.fileno(), "peers": [hub.fileno() for hub, _ in pairs]}
                else:
                    config["hub"] = pairs[rank - 1][1].fileno()
                process = subprocess.Popen(
                    [sys.executable, "-m", MODULE],
                    cwd=ROOT,
                    env=environment(visible),
                    pass_fds=[end.fileno() for end in ends],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # Ctrl-C is for ComfyUI, which then ends the workers
                )
                self._workers.append(_Worker(process))
                assert process.stdin is not None
                process.stdin.write(json.dumps(config).encode() + b"\n")
                process.stdin.flush()
                with open(Path(self.folder) / PIDS, "a") as file:
                    file.write(f"{process.pid}\n")
        finally:
            for end in (theirs, *(end for pair in pairs for end in pair)):
                end.close()
        return caller

    def explain(self, said: Json | None) -> PoolError:
        """What became of the pool, by the first process that ended by itself, or by what the pool said last; what is
        left of it is ended."""
        with self._explaining:
            if self._explained is None:
                self._explained = self._explain(said)
                self.end()
            return self._explained

    def _explain(self, said: Json | None) -> PoolError:
        deadline = time.monotonic() + 1.0
        while time.monotonic() < deadline and not (culprits := self._culprits()):
            time.sleep(0.05)
        culprits = self._culprits()
        if culprits:
            rank, status = culprits[0]
            lines = self._workers[rank].last_lines()
            place, what = self._place(rank, said), f"ended with {_status(status)}"
        elif said is not None and said.get("place"):
            rank = said["place"]["rank"]
            place, what, lines = (
                self._place(rank, said),
                said["what"],
                list(said["lines"]) or self._workers[rank].last_lines(),
            )
        else:
            place, what, lines = "the pool", (said or {}).get("what", "was stopped"), []
        words = "".join(f"\n    {line}" for line in lines)
        return PoolError(
            f"{place} {what}: the pool is ended, and the next prompt starts another"
            + (f". Its last lines:{words}" if words else "")
        )

    def _culprits(self) -> list[tuple[int, int]]:
        ended = [(rank, worker.process.poll()) for rank, worker in enumerate(self._workers)]
        return [(rank, status) for rank, status in ended if status not in (None, 0, LEFT)]

    def _place(self, rank: int, said: Json | None) -> str:
        connection: Connection | None = getattr(self, "connection", None)
        ranks = [] if connection is None else connection.ranks
        stage = next((entry["stage"] for entry in ranks if entry["rank"] == rank), "starting")
        if said is not None and said.get("place") and said["place"]["rank"] == rank:
            stage = said["place"]["stage"]
        asked = "" if connection is None or connection.busy_with is None else f" in a request to {connection.busy_with}"
        return f"rank {rank} ({self.names[rank]}, {stage}){asked}"


def check_devices(devices: Sequence[str]) -> None:
    """
    Raises:
        InputError: there are no such devices here.
    """
    if not sys.platform.startswith("linux"):
        raise InputError("a pool of worker processes needs Linux: sample this MODEL without Wan2.2 Multi-GPU")
    if not devices:
        raise InputError("a pool has at least one GPU: name one, or 'all'")
    if set(devices) == {"cpu"}:
        return
    import torch

    count = torch.cuda.device_count()
    wrong = [name for name in devices if not name.startswith("cuda:") or int(name[5:]) >= count]
    if wrong or len(set(devices)) < len(devices):
        there = f"this machine has {count} (0 to {count - 1})" if count else "this machine has none"
        raise InputError(
            f"GPUs {', '.join(name.removeprefix('cuda:') for name in devices)} were asked for, and {there}"
        )


def environment(visible: str | None) -> dict[str, str]:
    """What workers inherit."""
    kept = {name: value for name, value in os.environ.items() if name not in NOT_INHERITED}
    paths = [str(ROOT), *([kept["PYTHONPATH"]] if kept.get("PYTHONPATH") else [])]
    kept |= {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
    kept.setdefault("GLOO_SOCKET_IFNAME", "lo")
    kept.setdefault("NCCL_SOCKET_IFNAME", "lo")
    if visible is not None:
        kept["CUDA_VISIBLE_DEVICES"] = visible
    else:
        kept["OMP_NUM_THREADS"] = "1"
    return kept


def _visible(devices: Sequence[str]) -> tuple[str | None, list[str]]:
    """``CUDA_VISIBLE_DEVICES`` for the workers, and what each then calls its own device."""
    if devices[0] == "cpu":
        return None, ["cpu"] * len(devices)
    mine = [part.strip() for part in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if part.strip()]
    wanted = [int(name[5:]) for name in devices]
    names = [mine[index] if mine else str(index) for index in wanted]
    return ",".join(names), [f"cuda:{rank}" for rank in range(len(devices))]


def _status(status: int) -> str:
    if status >= 0:
        return f"exit status {status}"
    try:
        return signal.Signals(-status).name
    except ValueError:
        return f"signal {-status}"
