"""How the ranks of a pool hear requests and know of each other: rank 0 is the hub between the caller and the others.

Requests come to the hub, which hands their headers on (tensors go by ``torch.distributed``); every rank says when it is
done. All links carry a heartbeat from threads of their own, so that a process that is stopped is told from one that
works. If a rank is lost, hangs, or fails where the others may be waiting for it, the hub tells the caller which and
why, and the whole pool ends: there is no way to take a rank out of a collective.
"""

from __future__ import annotations

import logging
import os
import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from ..errors import WanFP8Error
from .serving import ElsewhereError
from .wire import Channel, Json, Message, WireError

log = logging.getLogger("wan_fp8")

LEFT = 77
"""Exit status of a process that ends because another one did."""
GRACE_SECONDS = 3.0
"""After one rank has failed, how long the others may take to say that they did as well."""
LAST_LINES = 12


@dataclass(slots=True)
class Place:
    """A rank as messages name it."""

    rank: int
    device: str
    host: str
    stage: str = "starting"
    memory: int = 0

    def __str__(self) -> str:
        return f"rank {self.rank} ({self.device} of {self.host})"

    def plain(self) -> Json:
        return {name: getattr(self, name) for name in ("rank", "device", "host", "stage", "memory")}


@dataclass(slots=True)
class Outcome:
    """What one rank says about one request."""

    error: Json | None
    """None; or ``type``, ``message``, ``lines`` and whether it was ``expected``."""
    found: Json = field(default_factory=dict)
    place: Place | None = None
    """Of another rank: what it was at when it said so; it goes on while the others may wait for it."""


def failure_of(error: BaseException) -> Json:
    """An exception as plain data."""
    lines = "".join(traceback.format_exception(error)).splitlines()[-LAST_LINES:]
    return {
        "type": type(error).__name__,
        "message": str(error) or type(error).__name__,
        "lines": lines,
        "expected": isinstance(error, WanFP8Error),
        "elsewhere": isinstance(error, ElsewhereError),
    }


class Links:
    """What both kinds of rank have: a queue of requests, a stage, a heartbeat."""

    def __init__(self, place: Place, watchdog: float) -> None:
        self.place, self.watchdog = place, watchdog
        self.memory: Callable[[], int] = _none
        """Bytes that this rank has allocated on its GPU."""
        self.requests: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        self.beat_seconds = min(1.0, watchdog / 4)
        self._news = threading.Event()

    def next(self) -> Message | None:
        """The next request; None when there will be no more."""
        return self.requests.get()

    def stage(self, text: str) -> None:
        """What this rank does from now on."""
        self.place.stage = text
        self._news.set()

    def _wait(self) -> None:
        """Until the next heartbeat is due, or there is something to say."""
        self._news.wait(self.beat_seconds)
        self._news.clear()

    def _thread(self, target: Callable[..., None], *args: Any) -> None:
        threading.Thread(target=target, args=args, daemon=True, name=f"wan-fp8-{target.__name__}").start()

    def _refresh(self) -> None:
        self.place.memory = self.memory()


class Member(Links):
    """A rank other than 0."""

    def __init__(self, place: Place, watchdog: float, hub: Channel) -> None:
        super().__init__(place, watchdog)
        self._hub = hub
        self._heard = time.monotonic()
        self._thread(self._listen)
        self._thread(self._beat)

    def finish(self, identity: int, outcome: Outcome) -> None:
        """Say that a request is done, or how it failed."""
        self._hub.send("done", {"id": identity, "error": outcome.error, "found": outcome.found, **self.place.plain()})

    def _listen(self) -> None:
        try:
            while True:
                message = self._hub.receive()
                self._heard = time.monotonic()
                if message.kind != "beat":
                    self.requests.put(message)
        except WireError:
            os._exit(LEFT)

    def _beat(self) -> None:
        before = time.monotonic()
        while True:
            self._wait()
            self._refresh()
            try:
                self._hub.send("beat", self.place.plain())
            except WireError:
                os._exit(LEFT)
            now = time.monotonic()
            if now - before > 2 * self.beat_seconds + 1:
                self._heard = now  # this process itself stood still
            before = now
            if now - self._heard > self.watchdog + GRACE_SECONDS:
                print(f"rank 0 has not been heard of for {now - self._heard:.0f} s", file=sys.stderr, flush=True)
                os._exit(LEFT)


@dataclass(slots=True)
class _Peer:
    place: Place
    channel: Channel
    heard: float
    outcomes: dict[int, Outcome] = field(default_factory=dict)


class Hub(Links):
    """Rank 0."""

    def __init__(self, place: Place, watchdog: float, world: int) -> None:
        super().__init__(place, watchdog)
        self.world = world
        self._peers: dict[int, _Peer] = {}
        self._caller: Channel | None = None
        self._lock = threading.Condition()
        self._failed_at: float | None = None
        self._broken = False
        self._ready: Json | None = None
        self._thread(self._beat)

    def add_peer(self, place: Place, channel: Channel) -> None:
        """A rank has come."""
        peer = _Peer(place, channel, time.monotonic())
        with self._lock:
            self._peers[place.rank] = peer
            self._lock.notify_all()
        self._thread(self._listen_to_peer, peer)

    def wait_for_peers(self, seconds: float) -> list[int]:
        """Until all ranks are there; those that are not."""
        with self._lock:
            self._lock.wait_for(lambda: len(self._peers) == self.world - 1, seconds)
            return sorted(set(range(1, self.world)) - self._peers.keys())

    # ---- the caller --------------------------------------------------------------------------------------------------

    def complete(self, ready: Json) -> None:
        """All ranks have joined: say so to the caller, and to each that comes."""
        with self._lock:
            self._ready = ready
        self.tell("ready", ready)

    @property
    def busy(self) -> bool:
        """Whether somebody is being served."""
        return self._caller is not None

    def serve(self, caller: Channel, *, gone: Callable[[], None]) -> None:
        """Take requests from this caller from now on; ``gone`` is called when it leaves."""
        self._caller = caller
        if self._ready is not None:
            self.tell("ready", self._ready)
        self._thread(self._listen_to_caller, caller, gone)

    def _listen_to_caller(self, caller: Channel, gone: Callable[[], None]) -> None:
        try:
            while True:
                message = caller.receive()
                if message.kind != "beat":
                    message.origin = caller
                    self.requests.put(message)
        except WireError as error:
            log.info("the caller's connection ends: %s", error)
            caller.close()
            if self._caller is caller:
                self._caller = None
            gone()

    def tell(
        self, kind: str, fields: Json, tensors: dict[str, Any] | None = None, *, to: Channel | None = None
    ) -> None:
        """Send something to the caller, if it is still there; ``to``: and is still this one."""
        caller = self._caller
        if caller is None or to not in (None, caller):
            return
        try:
            caller.send(kind, fields, tensors)
        except WireError as error:
            log.info("the caller did not get a message of kind %s: %s", kind, error)

    def announce(self, text: str) -> None:
        """Have the caller tell its user something."""
        self.tell("notice", {"text": text})

    # ---- requests ----------------------------------------------------------------------------------------------------

    def hand_on(self, message: Message, listed: list[Json]) -> None:
        """Give a request's header to every other rank."""
        for peer in self._peers.values():
            peer.channel.send(message.kind, message.fields | {"listed": listed})

    def finish(self, identity: int, own: Outcome) -> tuple[Json | None, list[Outcome]]:
        """Wait for the other ranks. The error that they agree on, and every rank's outcome in order.

        Does not return where only some of them failed: then the pool ends.
        """
        if own.error is not None:
            self._note_failure()
        with self._lock:
            self._lock.wait_for(lambda: all(identity in peer.outcomes for peer in self._peers.values()))
            others = [(peer.place, peer.outcomes.pop(identity)) for _, peer in sorted(self._peers.items())]
            self._failed_at = None
        everyone = [(self.place, own), *others]
        failed = [(outcome.place or place, outcome.error) for place, outcome in everyone if outcome.error is not None]
        if not failed:
            return None, [outcome for _, outcome in everyone]
        surprises = [(place, error) for place, error in failed if not error["expected"]]
        if surprises or len(failed) < len(everyone):
            place, error = (surprises or failed)[0]
            self.end(place, f"{error['type']}: {error['message']}", error["lines"])
        first = next((error for _, error in failed if not error["elsewhere"]), failed[0][1])
        return first, [outcome for _, outcome in everyone]

    def _note_failure(self) -> None:
        with self._lock:
            if self._failed_at is None:
                self._failed_at = time.monotonic()

    def end(self, place: Place, what: str, lines: list[str] | None = None) -> None:
        """Tell the caller what became of a rank, and end this process; the others follow."""
        with self._lock:
            if self._broken:
                time.sleep(3600)  # another thread is about to end the process
            self._broken = True
        print(f"{place} {what}", file=sys.stderr, flush=True)
        self.tell("broken", {"place": place.plain(), "what": what, "lines": lines or []})
        os._exit(LEFT if place.rank else 1)

    # ---- threads -----------------------------------------------------------------------------------------------------

    def _listen_to_peer(self, peer: _Peer) -> None:
        try:
            while True:
                message = peer.channel.receive()
                peer.heard = time.monotonic()
                if message.fields["stage"] != peer.place.stage:
                    self._news.set()
                peer.place.stage, peer.place.memory = message.fields["stage"], message.fields["memory"]
                if message.kind == "done":
                    outcome = Outcome(message.fields["error"], message.fields["found"], replace(peer.place))
                    with self._lock:
                        peer.outcomes[message.fields["id"]] = outcome
                        if outcome.error is not None and self._failed_at is None:
                            self._failed_at = time.monotonic()
                        self._lock.notify_all()
        except WireError:
            self.end(peer.place, f"ended while {peer.place.stage}")

    def _beat(self) -> None:
        before = time.monotonic()
        while True:
            self._wait()
            self._refresh()
            now = time.monotonic()
            stood_still = now - before > 2 * self.beat_seconds + 1
            before = now
            self.tell(
                "beat", {"ranks": [self.place.plain(), *(p.place.plain() for _, p in sorted(self._peers.items()))]}
            )
            for peer in list(self._peers.values()):
                if stood_still:
                    peer.heard = now
                try:
                    peer.channel.send("beat")
                except WireError:
                    continue  # its reader says so
                if now - peer.heard > self.watchdog:
                    self.end(peer.place, f"has not answered for {now - peer.heard:.0f} s while {peer.place.stage}")
            if self._failed_at is not None and now - self._failed_at > GRACE_SECONDS:
                self._end_for_failure()

    def _end_for_failure(self) -> None:
        with self._lock:
            failed = [
                (outcome.place or peer.place, outcome.error)
                for peer in self._peers.values()
                for outcome in peer.outcomes.values()
                if outcome.error is not None
            ]
        if failed:
            place, error = next(((p, e) for p, e in failed if not e["expected"]), failed[0])
            self.end(place, f"{error['type']}: {error['message']} while {place.stage}", error["lines"])
        self.end(self.place, f"failed while {self.place.stage}, and the others wait for it")


def _none() -> int:
    return 0
