"""Messages of a pool: what arrives is what was sent, and what is no message of ours closes its own connection only."""

from __future__ import annotations

import json
import math
import os
import socket
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from wan_fp8.attention import Attention, Step
from wan_fp8.caching import Conditioning, MagCache, RunPosition, published
from wan_fp8.checkpoint.lora import Diff, LowRank
from wan_fp8.checkpoint.products import Hadamard, Kronecker
from wan_fp8.errors import InputError
from wan_fp8.models.blocks import ForwardOptions
from wan_fp8.models.functional import RopeOptions
from wan_fp8.parallel import ParallelDims, changes, outside, plain, wire
from wan_fp8.parallel.wire import Channel, Closed, WireError
from wan_fp8.quant import Recipe

WRITE = wire.Arena.write
TOKEN = "a token of some length"
pytestmark = pytest.mark.timeout(60)


def both(key: bytes | None = None) -> tuple[Channel, Channel, socket.socket]:
    """Both ends, and the sending end as a bare socket."""
    one, other = wire.paired()
    return Channel(one, key), Channel(other, key, sends_first=False), one


def test_tensors_arrive_bit_for_bit() -> None:
    generator = torch.Generator().manual_seed(0)
    sent = {
        f"{name}{list(shape)}": (10 * torch.randn(shape, generator=generator)).to(dtype)
        for name, dtype in wire.DTYPES.items()
        for shape in ((), (0, 3), (2, 3, 5))
    }
    sent["turned"] = torch.arange(6.0).view(2, 3).t()
    with torch.inference_mode():
        sent["made in inference mode"] = torch.ones(3)
    ours, theirs, _ = both(b"key")
    for number in range(2):
        ours.send("forward", {"number": number, "text": "ä\n"}, sent)
        message = theirs.receive()
        assert (message.kind, message.fields) == ("forward", {"number": number, "text": "ä\n"})
        assert list(message.tensors) == list(sent)
        for name, value in sent.items():
            got = message.tensors[name]
            assert got.dtype == value.dtype and got.shape == value.shape
            assert torch.equal(got.reshape(-1).view(torch.uint8), value.reshape(-1).contiguous().view(torch.uint8))


def test_large_tensors_go_through_shared_memory_and_never_mix(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the order of sending and reading: memory that was not read yet is not written to again."""
    ours, theirs, bare = both()
    sizes = (300_000, 300_000, 100_000, 3_000_000, 5, 300_000, 300_000)
    sent = [torch.full((size // 4 + 1,), float(number)) for number, size in enumerate(sizes)]
    through = []
    monkeypatch.setattr(wire.Arena, "write", lambda arena, *given: through.append(id(arena)) or WRITE(arena, *given))
    for value in sent[:4]:
        ours.send("x", {}, {"empty": torch.empty(0), "a": value, "b": value.half()})
    for number in range(4):
        got = theirs.receive().tensors
        assert torch.equal(got["a"], sent[number]) and torch.equal(got["b"], sent[number].half())
    for value in sent[4:]:
        ours.send("x", {}, {"a": value})
        assert torch.equal(theirs.receive().tensors["a"], value)
    assert len(through) == 5 and len(set(through[-3:])) == 1, "an arena that is free is used again"
    assert bare.fileno() >= 0
    assert sum("memfd:wan_fp8" in line for line in Path("/proc/self/maps").read_text().splitlines()) <= 4


@pytest.mark.parametrize("announced", [0, -1, True, "big", 2**60])
def test_shared_memory_that_does_not_come(announced: Any) -> None:
    _, theirs, bare = both()
    bare.sendall(frame(header(arena=announced)))
    with pytest.raises(WireError, match=r"shared memory|malformed"):
        theirs.receive()


def test_memory_that_cannot_be_pinned_is_pageable_and_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plain = torch.empty

    def refuse(*shape: Any, pin_memory: bool = False, **more: Any) -> torch.Tensor:
        if pin_memory:
            raise RuntimeError("CUDA error: out of memory")
        return plain(*shape, **more)

    monkeypatch.setattr(torch, "empty", refuse)
    wire._say_once.cache_clear()
    for _ in range(2):
        assert wire._empty([2, 3], torch.int16, True).shape == (2, 3)
    assert caplog.text.count("host memory could not be pinned") == 1


def test_shared_memory_that_is_too_small() -> None:
    _, theirs, bare = both()
    descriptor = os.memfd_create("test")
    os.ftruncate(descriptor, 100)
    socket.send_fds(bare, [frame(header(arena=4096, tensors=[tensor(shape=[200])]))], [descriptor])
    with pytest.raises(WireError, match="100 bytes came, and 4096 were announced"):
        theirs.receive()
    _, theirs, bare = both()
    os.ftruncate(descriptor, 4096)
    socket.send_fds(bare, [frame(header(arena=4096, tensors=[tensor(shape=[2000])]))], [descriptor])
    with pytest.raises(WireError, match="that the shared memory does not hold"):
        theirs.receive()
    os.close(descriptor)


def header(**changes: Any) -> bytes:
    return json.dumps({"kind": "x", "fields": {}, "tensors": []} | changes).encode()


def frame(
    content: bytes, *, number: int = 0, magic: bytes = b"WFP8", version: int = 1, length: int | None = None
) -> bytes:
    return wire.PREFIX.pack(magic, version, len(content) if length is None else length, number) + bytes(32) + content


def tensor(**changes: Any) -> dict[str, Any]:
    return {"name": "a", "dtype": "float32", "shape": [2]} | changes


BAD = {
    "not ours": b"GET / HTTP/1.1\r\nHost: somewhere.example\r\nAccept: */*\r\n\r\n".ljust(200, b" "),
    "another version": frame(header(), version=2),
    "a header without end": frame(b"", length=wire.MAX_HEADER + 1),
    "no JSON": frame(b"{" * 50),
    "deep JSON": frame(b"[" * 100_000),
    "not UTF-8": frame(b"\xff\xfe\xfd"),
    "no object": frame(b"[]"),
    "another key": frame(header(more=1)),
    "infinity": frame(b'{"kind": "x", "fields": {"a": Infinity}, "tensors": []}'),
    "an unknown type": frame(header(tensors=[tensor(dtype="object")])),
    "a negative size": frame(header(tensors=[tensor(shape=[-1])])),
    "a size that is none": frame(header(tensors=[tensor(shape=[True])])),
    "more than memory": frame(header(tensors=[tensor(shape=[2**40, 2**20])])),
    "too many axes": frame(header(tensors=[tensor(shape=[1] * 9)])),
    "the same name twice": frame(header(tensors=[tensor(), tensor()])),
    "no name": frame(header(tensors=[{"dtype": "int8", "shape": []}])),
    "a number out of turn": frame(header(), number=3),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_message_closes_the_connection(case: str) -> None:
    _, theirs, bare = both()
    bare.sendall(BAD[case])
    with pytest.raises(WireError) as raised:
        theirs.receive()
    assert not isinstance(raised.value, Closed), raised.value
    with pytest.raises(OSError):  # closed at this end, so that nothing more comes of it
        for _ in range(3):
            bare.sendall(b"x" * 2**20)


def test_a_frame_that_is_sent_twice_closes_the_connection() -> None:
    recorded = frame(header())
    _, theirs, bare = both()
    bare.sendall(recorded + recorded)
    theirs.receive()
    with pytest.raises(WireError, match="message 1 was due and 0 came"):
        theirs.receive()


def test_a_frame_of_another_connection_or_direction_is_refused() -> None:
    one, other = wire.paired()
    ours, theirs = Channel(one, b"key"), Channel(other, b"another key", sends_first=False)
    ours.send("x")
    with pytest.raises(WireError, match="wrong signature"):
        theirs.receive()
    one, other = wire.paired()
    reflected = Channel(other, b"key", sends_first=True)  # as if our own frame came back
    Channel(one, b"key").send("x")
    with pytest.raises(WireError, match="wrong signature"):
        reflected.receive()


@pytest.mark.parametrize("cut", [0, 5, 60, -3])
def test_a_message_that_stops_in_the_middle(cut: int) -> None:
    whole = frame(header(tensors=[tensor()])) + bytes(8)
    _, theirs, bare = both()
    bare.sendall(whole[:cut])
    bare.close()
    with pytest.raises(Closed):
        theirs.receive()


def test_nothing_that_is_not_plain_is_sent() -> None:
    ours, _, _ = both()
    with pytest.raises(WireError, match="complex64 do not cross"):
        ours.send("x", {}, {"a": torch.zeros(1, dtype=torch.complex64)})
    with pytest.raises((TypeError, ValueError)):
        ours.send("x", {"a": object()})


# ---- who is there ----------------------------------------------------------------------------------------------------


def greet(caller: Callable[[socket.socket], Any], token: str = TOKEN) -> tuple[Any, Any]:
    """What ``challenge`` and ``caller`` return or raise."""
    one, other = wire.paired()
    found: list[Any] = [None, None]

    def run(index: int, body: Callable[[], Any]) -> None:
        try:
            found[index] = body()
        except Exception as error:
            found[index] = error
            (one, other)[1 - index].close()

    thread = threading.Thread(target=run, args=(0, lambda: wire.challenge(other, token)))
    thread.start()
    run(1, lambda: caller(one))
    thread.join()
    return found[0], found[1]


def test_both_sides_prove_that_they_know_the_token() -> None:
    (theirs, hello), ours = greet(lambda end: wire.prove(end, TOKEN, {"role": "caller"}))
    assert hello == {"role": "caller"}
    ours.send("a")
    assert theirs.receive().kind == "a"
    theirs.send("b")
    assert ours.receive().kind == "b"


def test_another_token_is_refused_on_both_sides() -> None:
    theirs, ours = greet(lambda end: wire.prove(end, "another token of some length", {}))
    assert isinstance(theirs, WireError) and "another token" in str(theirs)
    assert isinstance(ours, WireError) and "check" in str(ours) and "token" in str(ours)


def test_a_recorded_greeting_is_of_no_use() -> None:
    recorded = bytearray()

    def record(end: socket.socket) -> Channel:
        inner, outer = wire.paired()
        thread = threading.Thread(target=lambda: wire.prove(inner, TOKEN, {}))
        thread.start()
        outer.sendall(end.recv(32, socket.MSG_WAITALL))
        recorded.extend(outer.recv(4096))
        end.sendall(recorded)
        outer.sendall(end.recv(32, socket.MSG_WAITALL))
        thread.join()
        return Channel(end)

    first, _ = greet(record)
    assert isinstance(first, tuple)
    again, _ = greet(lambda end: end.sendall(recorded))
    assert isinstance(again, WireError) and "another token" in str(again)


@pytest.mark.parametrize("said", [b"", b"GET / HTTP/1.1\r\n" * 10, bytes(64) + struct.pack(">I", 2**31)])
def test_a_caller_that_is_none_of_ours(said: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "HANDSHAKE_SECONDS", 0.3)
    theirs, _ = greet(lambda end: end.sendall(said))
    assert isinstance(theirs, WireError)


def test_the_address_of_a_pool_and_its_token(tmp_path: Any) -> None:
    assert outside.parse_address(" 10.0.0.1:7421 ") == ("10.0.0.1", 7421)
    for wrong in ("10.0.0.1", ":7421", "host:port", "host:0", "host:70000"):
        with pytest.raises(InputError, match="host:port"):
            outside.parse_address(wrong)

    class Given:
        listen, token_file = "0.0.0.0:7421", None

    with pytest.raises(InputError, match="can be reached by others, and the token has 0 characters"):
        outside._token(Given, "0.0.0.0")
    assert outside._token(Given, "127.0.0.1") == ""
    Given.token_file = tmp_path / "token"
    with pytest.raises(InputError, match="cannot be read"):
        outside._token(Given, "127.0.0.1")
    Given.token_file.write_text("short\n")
    with pytest.raises(InputError, match="16 or more"):
        outside._token(Given, "10.0.0.1")
    Given.token_file.write_text(TOKEN + "\n")
    assert outside._token(Given, "0.0.0.0") == TOKEN


# ---- settings --------------------------------------------------------------------------------------------------------

SETTINGS = (
    Attention("reference-fp8", skip_first_steps=3, bound=None),
    Step(3, 40),
    Recipe("DelayedScaling", keep=("blocks.0.",), margin=2),
    MagCache(0.1, 2, 0.2, phase="published"),
    ParallelDims(cfg=2, ulysses=2, ring=3, shard=4),
    RopeOptions(scale_x=0.5),
    RunPosition(sigma=0.5, schedule=(1.0, 0.5, 0.0), conditionings=(Conditioning(7, 1),), elsewhere=frozenset({1})),
    torch.float8_e4m3fn,
    math.inf,
    (1, (2.5, None), [True, "text"]),
)


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda value: type(value).__name__)
def test_settings_come_back_as_they_were(setting: Any) -> None:
    through = json.loads(json.dumps(plain.to_plain(setting), allow_nan=False))
    assert plain.from_plain(through) == setting


def test_a_curve_of_the_users_own_travels() -> None:
    curve = published()["t2v-A14B"]
    setting = MagCache(0.1, 2, 0.2, curve=curve)
    assert plain.from_plain(json.loads(json.dumps(plain.to_plain(setting)))) == setting


def test_options_travel_where_they_differ() -> None:
    assert plain.option_fields(ForwardOptions()) == {}
    assert plain.option_fields(ForwardOptions(tf32=True, text_key="x")) == {"tf32": True}


@pytest.mark.parametrize(
    "given",
    [
        {"type": "Popen", "fields": {"args": "ls"}},
        {"type": "Recipe", "fields": {"name": "rowwise", "more": 1}},
        {"dtype": "object"},
        {"float": "1e999"},
        {"anything": 1},
    ],
)
def test_what_is_no_setting_is_refused(given: Any) -> None:
    with pytest.raises(WireError, match="no setting of ours"):
        plain.from_plain(given)
    with pytest.raises(WireError, match="no setting that crosses"):
        plain.to_plain(object())


def test_a_setting_checks_its_values_when_it_is_made_again() -> None:
    listed = plain.to_plain(ParallelDims(cfg=2))
    listed["fields"]["cfg"] = 3
    with pytest.raises(InputError, match="cfg is 1 or 2"):
        plain.from_plain(listed)


def test_changes_of_every_kind_come_back_as_they_were() -> None:
    small = torch.ones(2, 2)
    listed = [
        (LowRank(small, small, 2.0, dora_scale=small, like_core=True), 0.5),
        (Diff(small), -1.0),
        (Hadamard(small, small, small, small, None, small, small), 1.0),
        (Kronecker(first=small, up2=small, down2=small, alpha=3.0), 1.0),
    ]
    found, tensors = changes.to_plain({"a.weight": listed, "b.bias": listed[:1]})
    back = changes.from_plain(json.loads(json.dumps(found)), tensors)
    assert back == {"a.weight": listed, "b.bias": listed[:1]}, "tensors are the same objects"
    found["b.bias"][0]["kind"] = "type"
    with pytest.raises(InputError, match="does not know changes of the kind 'type'"):
        changes.from_plain(found, tensors)
