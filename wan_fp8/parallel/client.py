"""The caller's end of a pool: requests and their answers over one channel, with a watch on the other side.

A thread reads all the time, so that nothing piles up in a pool that nobody asks anything, and so that its death is
seen at once. A request that the user cancels is given up, not taken back: the pool finishes it, and its answer is
dropped when it comes.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from .. import errors
from .wire import Channel, Json, Message, WireError

log = logging.getLogger("wan_fp8")

POLL_SECONDS = 0.05
"""Between two looks at whether the user has cancelled."""


class Connection:
    """Requests to one pool. Thread-safe."""

    def __init__(
        self,
        channel: Channel,
        watchdog: float,
        *,
        explain: Callable[[Json | None], errors.PoolError],
        idle: Callable[[], None],
    ) -> None:
        """
        Args:
            watchdog: Seconds without a sign of life after which the pool counts as hung.
            explain: Makes an error of what the pool said last, or of its silence.
            idle: Called by the reading thread at every heartbeat.
        """
        self._channel, self.watchdog, self._explain, self._idle = channel, watchdog, explain, idle
        self._lock = threading.Condition()
        self._answers: dict[int, Message | None] = {}
        """By request; None while it is awaited."""
        self._number = 0
        self._heard = time.monotonic()
        self._failure: errors.PoolError | None = None
        self.ready: Json | None = None
        """What the pool said of itself when it was complete."""
        self.ranks: list[Json] = []
        """Place, stage and memory of every rank, as of the last heartbeat."""
        self.notice: Callable[[str], None] = log.info
        self.evicted: Callable[[list[str]], None] = _nothing
        """Told by the reading thread which models had to leave the pool for what was asked, answered or given up."""
        self.busy_with: str | None = None
        """Kind of the request that is waited for."""
        for body in (self._read, self._watch):
            threading.Thread(target=body, daemon=True, name=f"wan-fp8-pool{body.__name__}").start()

    @property
    def failure(self) -> errors.PoolError | None:
        """Why the pool is no more; None while it lives."""
        return self._failure

    def close(self, reason: errors.PoolError) -> None:
        """End it; whoever waits gets ``reason``."""
        with self._lock:
            self._failure = self._failure or reason
            self._lock.notify_all()
        self._channel.close()

    def wait_until_ready(self, seconds: float, poll: Callable[[], None]) -> Json:
        """Until every rank has joined.

        Raises:
            PoolError: it did not come to that.
        """
        deadline = time.monotonic() + seconds
        while True:
            with self._lock:
                self._lock.wait_for(lambda: self._failure is not None or self.ready is not None, POLL_SECONDS)
                if self._failure is not None:
                    raise self._failure
                if self.ready is not None:
                    return self.ready
            poll()
            if time.monotonic() > deadline:
                raise self._lost(f"the pool was not complete after {seconds:.0f} s")

    def post(self, kind: str, fields: Mapping[str, Any]) -> None:
        """Send a request whose answer nobody needs; nothing happens if the pool is gone."""
        if self._failure is None:
            try:
                self._send(kind, fields, {}, awaited=False)
            except errors.PoolError as error:
                log.debug("%s", error)

    def request(
        self,
        kind: str,
        fields: Mapping[str, Any],
        tensors: Mapping[str, Tensor] | None = None,
        *,
        poll: Callable[[], None],
    ) -> tuple[list[Json], dict[str, Tensor]]:
        """Send a request and wait.

        Args:
            poll: Called at first and some twenty times a second; what it raises gives the request up.
        Returns:
            What every rank found, in their order, and the tensors of rank 0.
        Raises:
            WanFP8Error: what the workers raised; the pool goes on.
            PoolError: the pool is gone.
        """
        poll()
        number = self._send(kind, fields, tensors or {}, awaited=True)
        self.busy_with = kind
        try:
            while True:
                with self._lock:
                    self._lock.wait_for(
                        lambda: self._failure is not None or self._answers[number] is not None, POLL_SECONDS
                    )
                    answer = self._answers[number]
                    if answer is None and self._failure is not None:
                        raise self._failure
                if answer is not None:
                    return _result(answer)
                poll()
        finally:
            with self._lock:
                del self._answers[number]
                self.busy_with = None

    def _watch(self) -> None:
        """A pool that is silent is ended, whatever anybody waits for: a send to it would never return."""
        before = time.monotonic()
        while self._failure is None:
            time.sleep(min(1.0, self.watchdog / 4))
            now = time.monotonic()
            if now - before > self.watchdog / 2:
                self._heard = now  # this process itself stood still
            before = now
            if self.ranks and now - self._heard > self.watchdog:
                self._lost(f"has not answered for {now - self._heard:.0f} s")

    def _lost(self, what: str) -> errors.PoolError:
        failure = self._explain({"place": self.ranks[0] if self.ranks else None, "what": what, "lines": []})
        self.close(failure)
        return failure

    def _send(self, kind: str, fields: Mapping[str, Any], tensors: Mapping[str, Tensor], *, awaited: bool) -> int:
        with self._lock:
            if self._failure is not None:
                raise self._failure
            self._number += 1
            number = self._number
            if awaited:
                self._answers[number] = None
        try:
            self._channel.send(kind, {**fields, "id": number}, tensors)
        except WireError:
            with self._lock:
                self._lock.wait_for(lambda: self._failure is not None, 5.0)  # the reader finds out why
                self._answers.pop(number, None)
                raise self._failure or errors.PoolError(
                    "the connection to the pool was lost: queue again, and another one is asked for"
                ) from None
        return number

    def _read(self) -> None:
        last: Json | None = None
        try:
            while True:
                message = self._channel.receive()
                self._heard = time.monotonic()
                match message.kind:
                    case "beat":
                        self.ranks = message.fields["ranks"]
                        self._idle()
                    case "notice":
                        self.notice(str(message.fields["text"]))
                    case "broken":
                        last = message.fields
                    case "refused":
                        last = {"place": None, "what": str(message.fields["why"]), "lines": []}
                    case "ready":
                        with self._lock:
                            self.ready = message.fields
                            self._lock.notify_all()
                    case "answer" | "error":
                        self._enter(message)
        except WireError:
            failure = self._explain(last)
            with self._lock:
                self._failure = self._failure or failure
                self._lock.notify_all()

    def _enter(self, message: Message) -> None:
        number = message.fields["id"]
        if message.kind == "answer" and message.fields["found"]:
            self.evicted(message.fields["found"][0].get("evicted", []))
        with self._lock:
            if number in self._answers:
                self._answers[number] = message
                self._lock.notify_all()
            elif message.kind == "error":
                log.warning("the pool: %s", message.fields["message"])


def _result(answer: Message) -> tuple[list[Json], dict[str, Tensor]]:
    if answer.kind == "error":
        kind = getattr(errors, answer.fields["type"], errors.WanFP8Error)
        raise kind(answer.fields["message"])
    return answer.fields["found"], answer.tensors


def _nothing(names: list[str]) -> None:
    pass
