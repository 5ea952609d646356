"""Messages of a pool: a JSON header and raw tensor bytes, over a connected stream socket. Nothing is ever pickled.

A frame is a fixed prefix (magic, version, length of the header, number of the frame), a MAC, the header, and the bytes
of the tensors that the header lists, in order; large ones go through memory that both ends map, where the connection is
a pair on one host. Everything is checked before memory is taken: lengths, names, types,
shapes, and that the numbers of a connection's frames rise by one, so that a frame that is sent twice ends the
connection. A connection that is not between two ends of a pair that one process made (``paired``) begins with a
challenge: both sides prove that they know the token, which itself never crosses the wire, and each frame's prefix and
header are signed with a key that holds for this connection only. Tensor bytes are neither signed nor encrypted: use a
network that you trust.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import hmac
import json
import logging
import math
import mmap
import os
import secrets
import socket
import struct
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import WanFP8Error

log = logging.getLogger("wan_fp8")

MAGIC, VERSION = b"WFP8", 1
PREFIX = struct.Struct(">4sB3xIQ")
MAC_BYTES = 32
MAX_HEADER = 8 * 2**20
MAX_PAYLOAD = 64 * 2**30
MAX_DIMS = 8
HELLO_LIMIT = 4096
SHARED_FROM = 2**18
"""Bytes from which tensors go through shared memory, where both ends are on one host."""
PINNED_UP_TO = 2**28
"""Bytes of one message for which pinned pages are worth it, which stay: latents and texts, not weights."""
ARENA_HEAD = 64
WORD = struct.Struct("<Q")
HANDSHAKE_SECONDS = 5.0

DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
        torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
    )
}  # fmt: skip
"""Types that may cross, by name."""

Json = dict[str, Any]


class WireError(WanFP8Error, ConnectionError):
    """What came over a connection is no message of ours; the connection is closed, and nothing else."""


class Closed(WireError):
    """The other side has gone."""


@dataclass(slots=True)
class Message:
    """One frame, read and checked."""

    kind: str
    fields: Json
    tensors: dict[str, Tensor] = field(default_factory=dict)
    origin: Channel | None = None
    """The connection that it came by, where several may take turns."""


class Channel:
    """One connection. ``send`` may be called from several threads, ``receive`` from one."""

    def __init__(self, connection: socket.socket, key: bytes | None = None, *, sends_first: bool = True) -> None:
        """``key``: of this connection, from ``prove`` or ``challenge``; None for a pair that nobody else can reach."""
        connection.setblocking(True)
        self._socket, self._key = connection, key
        self._out, self._in = (b">", b"<") if sends_first else (b"<", b">")
        self._sent = self._received = 0
        self._lock = threading.Lock()
        self._shares = connection.family == socket.AF_UNIX and hasattr(os, "memfd_create")
        self._mine: Arena | None = None
        self._theirs: Arena | None = None

    def send(
        self, kind: str, fields: Mapping[str, Any] | None = None, tensors: Mapping[str, Tensor] | None = None
    ) -> None:
        """Send one message; tensors go as they are, in the order of the mapping.

        Raises:
            Closed: the other side has gone.
        """
        given = {name: value.detach() for name, value in (tensors or {}).items()}
        listed = [{"name": name, "dtype": _dtype_name(t), "shape": list(t.shape)} for name, t in given.items()]
        content: Json = {"kind": kind, "fields": dict(fields or {}), "tensors": listed}
        shared = self._shares and sum(map(_nbytes, given.values())) >= SHARED_FROM
        with self._lock:
            descriptors: list[int] = []
            if shared:
                size = ARENA_HEAD + sum(_aligned(_nbytes(value)) for value in given.values())
                if self._mine is None or not self._mine.serves(size):
                    self._mine = Arena(os.memfd_create("wan_fp8"), size)
                    descriptors.append(self._mine.descriptor)
                self._mine.write(self._sent, given.values())
                content["arena"] = self._mine.size
            header = json.dumps(content, allow_nan=False).encode()
            if len(header) > MAX_HEADER:
                raise WireError(f"a header of {len(header)} bytes is too long; {MAX_HEADER} are allowed")
            prefix = PREFIX.pack(MAGIC, VERSION, len(header), self._sent)
            try:
                self._send_first(prefix + self._mac(self._out, prefix, header), descriptors)
                self._socket.sendall(header)
                for value in () if shared else given.values():
                    if value.numel():
                        self._socket.sendall(_bytes_of(on_host(value).contiguous()))
            except OSError as error:
                raise Closed(f"the other side of the connection has gone ({error})") from None
            finally:
                if descriptors and self._mine is not None:
                    self._mine.forget_descriptor()
            self._sent += 1

    def _send_first(self, first: bytes, descriptors: list[int]) -> None:
        """The beginning of a frame, with an arena's descriptor where it is a new one."""
        if descriptors:
            count = socket.send_fds(self._socket, [first], descriptors)
            first = first[count:]
        self._socket.sendall(first)

    def receive(self) -> Message:
        """The next message.

        Raises:
            Closed: the other side has gone.
            WireError: what came is no message; the connection is closed.
        """
        try:
            return self._receive()
        except Closed:
            raise
        except (WireError, ValueError, TypeError, KeyError, RecursionError) as error:
            self.close()
            raise error if isinstance(error, WireError) else WireError(f"a malformed message: {error}") from None

    def _receive(self) -> Message:
        prefix, descriptors = self._receive_first()
        magic, version, length, number = PREFIX.unpack(prefix)
        if magic != MAGIC or version != VERSION:
            raise WireError(f"the other side does not speak version {VERSION} of the pool's messages")
        if length > MAX_HEADER:
            raise WireError(f"a header of {length} bytes came, and {MAX_HEADER} are allowed")
        mac = bytes(self._read(bytearray(MAC_BYTES)))
        header = bytes(self._read(bytearray(length)))
        if not hmac.compare_digest(mac, self._mac(self._in, prefix, header)):
            raise WireError("a message came with the wrong signature")
        if number != self._received:
            raise WireError(f"message {self._received} was due and {number} came: sent twice, or lost")
        self._received += 1
        kind, fields, listed, arena = _parsed(header)
        if arena is not None:
            if not self._shares:
                raise WireError("shared memory is announced on a connection that cannot carry it")
            if descriptors:
                self._theirs = Arena(descriptors[0], arena)
                self._theirs.forget_descriptor()
            if self._theirs is None or self._theirs.size != arena:
                raise WireError("shared memory is announced that did not come")
            return Message(kind, fields, self._theirs.read(number, listed))
        tensors: dict[str, Tensor] = {}
        pin = _worth_pinning(listed)
        for name, dtype, shape in listed:
            value = _empty(shape, dtype, pin)
            if value.numel():
                self._read(_bytes_of(value))
            tensors[name] = value
        return Message(kind, fields, tensors)

    def _receive_first(self) -> tuple[bytes, list[int]]:
        """The prefix of a frame, and the descriptors that came with it."""
        if not self._shares:
            return bytes(self._read(bytearray(PREFIX.size))), []
        try:
            first, descriptors, _, _ = socket.recv_fds(self._socket, PREFIX.size, 1)
        except OSError as error:
            raise Closed(f"the other side of the connection has gone ({error})") from None
        if not first:
            raise Closed("the other side of the connection has gone")
        return first + bytes(self._read(bytearray(PREFIX.size - len(first)))), descriptors

    def close(self) -> None:
        """End the connection; a ``receive`` that waits in another thread raises ``Closed``."""
        with contextlib.suppress(OSError):  # it was not connected any more
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _mac(self, direction: bytes, prefix: bytes, header: bytes) -> bytes:
        if self._key is None:
            return bytes(MAC_BYTES)
        return hmac.new(self._key, direction + prefix + header, hashlib.sha256).digest()

    def _read(self, into: bytearray | memoryview) -> bytearray | memoryview:
        _fill(self._socket, into)
        return into


class Arena:
    """Memory that both ends of a pair see: the tensors of one message at a time, after a word that says which message
    was read last. It has no name, so that nothing is left of it when its processes end, however they do."""

    def __init__(self, descriptor: int, size: int) -> None:
        """Maps ``descriptor``; a fresh one gets the size."""
        self.descriptor, self.size, self._written = descriptor, size, -1
        there = os.fstat(descriptor).st_size
        if there == 0:
            os.ftruncate(descriptor, size)
        elif there < size:
            os.close(descriptor)
            raise WireError(f"shared memory of {there} bytes came, and {size} were announced")
        self._memory = mmap.mmap(descriptor, size)
        self._bytes = torch.frombuffer(self._memory, dtype=torch.uint8)

    def forget_descriptor(self) -> None:
        """Close it; the memory stays mapped."""
        os.close(self.descriptor)

    def serves(self, size: int) -> bool:
        """Whether it is large enough, and the other side is done with what was in it."""
        done = self._written < 0 or WORD.unpack_from(self._memory)[0] == self._written + 1
        return done and size <= self.size

    def write(self, number: int, tensors: Iterable[Tensor]) -> None:
        """Put the tensors of message ``number`` in, from whatever device."""
        self._written, first = number, ARENA_HEAD
        for value in tensors:
            count = _nbytes(value)
            self._bytes[first : first + count].copy_(on_host(value).contiguous().reshape(-1).view(torch.uint8))
            first += _aligned(count)

    def read(self, number: int, listed: list[tuple[str, torch.dtype, list[int]]]) -> dict[str, Tensor]:
        """Take the tensors of message ``number`` out.

        Raises:
            WireError: more is announced than it holds.
        """
        found, first, pin = {}, ARENA_HEAD, _worth_pinning(listed)
        for name, dtype, shape in listed:
            value = _empty(shape, dtype, pin)
            count = _nbytes(value)
            if first + count > self.size:
                raise WireError("tensors are announced that the shared memory does not hold")
            value.view(-1).view(torch.uint8).copy_(self._bytes[first : first + count])
            found[name] = value
            first += _aligned(count)
        WORD.pack_into(self._memory, 0, number + 1)
        return found


def on_host(value: Tensor) -> Tensor:
    """A tensor in host memory; waited for."""
    pin = value.device.type == "cuda" and 0 < _nbytes(value) <= PINNED_UP_TO
    if not pin:
        return value.to("cpu")
    found = _empty(value.shape, value.dtype, pin)
    found.copy_(value, non_blocking=found.is_pinned())
    torch.cuda.current_stream(value.device).synchronize()
    return found


def _empty(shape: Iterable[int], dtype: torch.dtype, pin: bool) -> Tensor:
    """Host memory for a tensor; pageable, and said once, where the system pins no more."""
    shape = tuple(shape)
    if pin:
        try:
            return torch.empty(shape, dtype=dtype, pin_memory=True)
        except RuntimeError as error:
            _say_once(f"host memory could not be pinned, messages to and from GPUs are slower: {error}")
    return torch.empty(shape, dtype=dtype)


@functools.cache
def _say_once(text: str) -> None:
    log.warning("%s", text)


def _worth_pinning(listed: list[tuple[str, torch.dtype, list[int]]]) -> bool:
    """Whether what comes goes to a GPU of this process, ten times as fast from pinned memory."""
    total = sum(math.prod(shape) * dtype.itemsize for _, dtype, shape in listed)
    return torch.cuda.is_initialized() and total <= PINNED_UP_TO


def _nbytes(value: Tensor) -> int:
    return value.numel() * value.element_size()


def _aligned(count: int) -> int:
    return count + -count % ARENA_HEAD


def paired() -> tuple[socket.socket, socket.socket]:
    """Two connected ends that only this process, and those to whom it hands one, can reach."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)


# ---- who is there ----------------------------------------------------------------------------------------------------


def prove(connection: socket.socket, token: str, hello: Mapping[str, Any]) -> Channel:
    """The calling side of a connection: answer the other side's challenge and check its answer to ours.

    Args:
        hello: who calls, as plain data.
    Raises:
        Closed, WireError: the token is another one, or nobody of ours answers there.
    """
    connection.settimeout(HANDSHAKE_SECONDS)
    try:
        theirs, mine = _exact(connection, 32), secrets.token_bytes(32)
        said = json.dumps(dict(hello)).encode()
        proof = _digest(token, b"caller", theirs, mine, said)
        connection.sendall(mine + proof + struct.pack(">I", len(said)) + said)
        if not hmac.compare_digest(_exact(connection, 32), _digest(token, b"pool", theirs, mine, said)):
            raise WireError("the pool's answer does not fit the token: check the token")
    except TimeoutError:
        raise Closed("nothing that speaks the pool's messages answers at this address") from None
    except Closed:
        raise Closed(
            "the pool closed the connection: check that the token is the one that it was started with"
        ) from None
    return Channel(connection, _digest(token, b"key", theirs, mine), sends_first=True)


def challenge(connection: socket.socket, token: str) -> tuple[Channel, Json]:
    """The called side: let in whoever proves to know the token; its channel and what it said of itself.

    Raises:
        WireError: it does not know the token, or is too slow or too talkative.
    """
    connection.settimeout(HANDSHAKE_SECONDS)
    try:
        mine = secrets.token_bytes(32)
        connection.sendall(mine)
        theirs, proof = _exact(connection, 32), _exact(connection, 32)
        (length,) = struct.unpack(">I", _exact(connection, 4))
        if length > HELLO_LIMIT:
            raise WireError(f"a greeting of {length} bytes came, and {HELLO_LIMIT} are allowed")
        said = _exact(connection, length)
        if not hmac.compare_digest(proof, _digest(token, b"caller", mine, theirs, said)):
            raise WireError("somebody called with another token")
        hello = json.loads(said)
        if not isinstance(hello, dict):
            raise WireError("a greeting that is no object")
        connection.sendall(_digest(token, b"pool", mine, theirs, said))
    except (TimeoutError, ValueError, OSError) as error:
        raise error if isinstance(error, WireError) else WireError(f"no greeting of ours: {error}") from None
    return Channel(connection, _digest(token, b"key", mine, theirs), sends_first=False), hello


def _digest(token: str, *parts: bytes) -> bytes:
    value = hmac.new(token.encode(), digestmod=hashlib.sha256)
    for part in parts:
        value.update(len(part).to_bytes(4, "big") + part)
    return value.digest()


# ---- pieces ----------------------------------------------------------------------------------------------------------


def _exact(connection: socket.socket, count: int) -> bytes:
    value = bytearray(count)
    _fill(connection, value)
    return bytes(value)


def _fill(connection: socket.socket, into: bytearray | memoryview) -> None:
    view = memoryview(into)
    while len(view):
        try:
            count = connection.recv_into(view)
        except TimeoutError:
            raise
        except OSError as error:
            raise Closed(f"the other side of the connection has gone ({error})") from None
        if count == 0:
            raise Closed("the other side of the connection has gone")
        view = view[count:]


def _bytes_of(value: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    array: Any = value.view(-1).view(torch.uint8).numpy()
    return memoryview(array)


def _dtype_name(value: Tensor) -> str:
    name = str(value.dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise WireError(f"tensors of type {name} do not cross to a pool; {', '.join(DTYPES)} do")
    return name


def _parsed(header: bytes) -> tuple[str, Json, list[tuple[str, torch.dtype, list[int]]], int | None]:
    """Kind, fields, the tensors to come, and the size of the shared memory that they come in.

    Raises:
        WireError, ValueError: not what a header looks like, or more than is allowed.
    """
    given = json.loads(header, parse_constant=_no_constant)
    arena = given.pop("arena", None) if isinstance(given, dict) else None
    if not isinstance(given, dict) or given.keys() != {"kind", "fields", "tensors"}:
        raise WireError("a header has kind, fields and tensors")
    kind, fields, listed = given["kind"], given["fields"], given["tensors"]
    if not isinstance(kind, str) or not isinstance(fields, dict) or not isinstance(listed, list):
        raise WireError("a header's kind is a string, its fields an object and its tensors a list")
    found: dict[str, tuple[str, torch.dtype, list[int]]] = {}
    total = 0
    for entry in listed:
        name, dtype, shape = entry["name"], DTYPES.get(entry["dtype"]), entry["shape"]
        counts = isinstance(shape, list) and all(type(size) is int and 0 <= size <= 2**48 for size in shape)
        if not isinstance(name, str) or name in found or dtype is None or not counts or len(shape) > MAX_DIMS:
            raise WireError(f"a tensor is announced as {str(entry)[:200]}, which is none")
        total += math.prod(shape) * dtype.itemsize
        if total > MAX_PAYLOAD:
            raise WireError(f"tensors of more than {MAX_PAYLOAD} bytes are announced")
        found[name] = (name, dtype, shape)
    if arena is not None and not (type(arena) is int and 0 < arena <= MAX_PAYLOAD):
        raise WireError(f"shared memory of {str(arena)[:50]} bytes is announced")
    return kind, fields, list(found.values()), arena


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")
