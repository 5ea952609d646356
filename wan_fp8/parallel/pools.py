"""The pools of this process: started when first needed, shared by whoever needs the same, ended when nobody does."""

from __future__ import annotations

import atexit
import logging
import threading
import time
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ..errors import PoolError
from ..models.low_rank import LiveLora
from .client import Connection
from .launcher import START_SECONDS, LocalWorkers
from .outside import connect
from .wire import Json

log = logging.getLogger("wan_fp8")

WATCHDOG_SECONDS = 30.0
IDLE_SECONDS = 10.0
"""How long a pool stays that no MODEL of a graph uses any more."""

STOPPED = "the pool was stopped: queue again, and another one starts"
DISPLACED = (
    "the pool was ended for another one that needs its devices: queue again, and leave one of the two settings out"
)
UNUSED = "the pool was ended, no MODEL used it any more: queue again, and another one starts"


@dataclass(frozen=True, kw_only=True, slots=True)
class PoolSpec:
    """Which pool."""

    devices: tuple[str, ...] = ()
    """``cuda:N`` or ``cpu``, one for each rank; empty for a pool that runs elsewhere."""
    address: str | None = None
    """``host:port`` of such a one."""
    token: str | None = field(default=None, repr=False)
    watchdog: float = WATCHDOG_SECONDS
    """Seconds without a sign of life after which a worker counts as hung."""

    def overlaps(self, other: PoolSpec) -> bool:
        """Whether two pools want one device."""
        return bool(set(self.devices) & set(other.devices)) or (
            self.address is not None and self.address == other.address
        )


class Pool:
    """A running pool and what it holds for this process."""

    def __init__(self, spec: PoolSpec, poll: Callable[[], None]) -> None:
        self.spec = spec
        self.loaded: dict[str, str] = {}
        """Models that the pool holds, and the name of what is merged into each."""
        self.loras: OrderedDict[int, tuple[LiveLora, int]] = OrderedDict()
        """Live LoRAs that the pool holds: by identity, the object itself and its number."""
        self.users: weakref.WeakSet[Any] = weakref.WeakSet()
        self.garbage: deque[str] = deque()
        """Models that nobody needs any more; a finalizer may only leave a note here."""
        self._unused_since: float | None = None
        self._workers: LocalWorkers | None = None
        if spec.address is None:
            self._workers = LocalWorkers(spec.devices, watchdog=spec.watchdog, idle=self._tidy, poll=poll)
            self.connection = self._workers.connection
        else:
            channel = connect(spec.address, spec.token or "")
            self.connection = Connection(channel, spec.watchdog, explain=self._explain, idle=self._tidy)
            self.connection.wait_until_ready(START_SECONDS, poll)
        self.connection.evicted = self._evicted
        assert self.connection.ready is not None
        self.world = int(self.connection.ready["world"])

    @property
    def alive(self) -> bool:
        """Whether it still answers."""
        return self.connection.failure is None

    @property
    def pids(self) -> list[int]:
        """Of its processes on this machine."""
        return [] if self._workers is None else self._workers.pids

    @property
    def folder(self) -> str | None:
        """Where its workers meet, if they are this process's."""
        return None if self._workers is None else self._workers.folder

    def stop(self, why: str = STOPPED) -> None:
        """End it, and free its GPUs."""
        self.connection.close(PoolError(why))
        if self._workers is not None:
            self._workers.end()

    def status(self) -> Json:
        """What there is to show of it, as of its last heartbeat."""
        return {
            "devices": list(self.spec.devices) or [self.spec.address],
            "alive": self.alive,
            "failure": None if self.connection.failure is None else str(self.connection.failure),
            "ranks": self.connection.ranks,
            "models": len(self.loaded),
        }

    def _explain(self, said: Json | None) -> PoolError:
        """What became of a pool that runs elsewhere."""
        what = (said or {}).get("what") or "closed the connection, or cannot be reached any more"
        place = (said or {}).get("place")
        who = "" if not place else f"rank {place['rank']} ({place['device']} of {place['host']}, {place['stage']}) "
        words = "".join(f"\n    {line}" for line in (said or {}).get("lines", []))
        return PoolError(
            f"the pool at {self.spec.address}: {who}{what}" + (f". Its last lines:{words}" if words else "")
        )

    def _evicted(self, names: list[str]) -> None:
        for name in names:
            self.loaded.pop(name, None)

    def _tidy(self) -> None:
        while self.garbage:
            name = self.garbage.popleft()
            if self.loaded.pop(name, None) is not None:
                self.connection.post("drop", {"models": [name]})
        if len(self.users):
            self._unused_since = None
        elif self._unused_since is None:
            self._unused_since = time.monotonic()
        elif time.monotonic() - self._unused_since > IDLE_SECONDS:
            threading.Thread(target=_stop_unused, args=(self,), daemon=True).start()


_pools: dict[PoolSpec, Pool] = {}
_lock = threading.RLock()


def ensure(spec: PoolSpec, *, user: Any = None, poll: Callable[[], None] = lambda: None) -> Pool:
    """The pool of this kind, started if there is none that lives. Others that hold one of its devices are ended.

    Args:
        user: As long as it lives, so does the pool.
        poll: Called while it starts; what it raises ends that.
    Raises:
        InputError, PoolError: see ``LocalWorkers``.
    """
    with _lock:
        pool = _pools.get(spec)
        if pool is not None and pool.alive:
            if user is not None:
                pool.users.add(user)
            return pool
        for other, running in list(_pools.items()):
            if other == spec or other.overlaps(spec):
                if running.alive:
                    log.info("a pool of %d is ended: another one needs its devices", running.world)
                _pools.pop(other).stop(DISPLACED)
        pool = _started(spec, poll, None if pool is None else pool.connection.failure)
        _pools[spec] = pool
        if user is not None:
            pool.users.add(user)
        return pool


def _started(spec: PoolSpec, poll: Callable[[], None], lost: PoolError | None) -> Pool:
    """A new pool; if there was one before that was lost, the reason is not forgotten."""
    if lost is None:
        return Pool(spec, poll)
    log.warning("%s", lost)
    try:
        return Pool(spec, poll)
    except PoolError as error:
        raise PoolError(f"{error}; the one before it was lost: {lost}") from None


def live_pools() -> list[Json]:
    """Every pool of this process that was not stopped, as plain data."""
    with _lock:
        return [pool.status() for pool in _pools.values()]


def stop_pools() -> int:
    """End every pool; how many there were."""
    with _lock:
        count = sum(pool.alive for pool in _pools.values())
        while _pools:
            _pools.popitem()[1].stop()
        return count


def _stop_unused(pool: Pool) -> None:
    with _lock:
        if _pools.get(pool.spec) is pool and not len(pool.users):
            log.info("a pool of %d is ended: no MODEL uses it any more", pool.world)
            _pools.pop(pool.spec).stop(UNUSED)


atexit.register(stop_pools)
