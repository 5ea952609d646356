"""Pools that somebody else starts: ``torchrun`` on one host or many, and callers by address and token.

Rank 0 listens. The other ranks and the caller come to the same address and prove that they know the token. A caller
that goes leaves an empty pool for the next one; a rank that is lost ends all of them, and ``torchrun`` starts them
again where it was told to (``--max-restarts``).
"""

from __future__ import annotations

import argparse
import ipaddress
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ..errors import InputError, PoolError
from .links import Hub, Member, Place
from .wire import Message, WireError, challenge, prove

log = logging.getLogger("wan_fp8")

TOKEN_VARIABLE = "WAN_FP8_POOL_TOKEN"
MIN_TOKEN = 16
WAITING = 8
"""Connections that may be in their greeting at a time."""
JOIN_SECONDS = 120.0


def parse_address(text: str) -> tuple[str, int]:
    """``host:port``.

    Raises:
        InputError: it is none.
    """
    host, colon, port = text.strip().rpartition(":")
    if not (host and colon and port.isdigit() and 0 < int(port) < 2**16):
        raise InputError(f"an address is host:port, such as 10.0.0.1:7421; got {text!r}")
    return host.strip("[]"), int(port)


def is_loopback(host: str) -> bool:
    """Whether only this host reaches ``host``."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def main(run: Callable[[Hub | Member, torch.device], None]) -> None:
    """One rank under ``torchrun``."""
    given = _arguments()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        _serve(given, run)
    except (InputError, PoolError) as error:
        sys.exit(str(error))


def _arguments() -> Any:
    parser = argparse.ArgumentParser(prog="python -m wan_fp8.parallel.worker", description=__doc__)
    parser.add_argument("--listen", required=True, help="host:port at which rank 0 answers; port 7421 is usual")
    parser.add_argument(
        "--token-file", type=Path, help=f"file with the token; without it, the variable {TOKEN_VARIABLE}"
    )
    parser.add_argument("--watchdog", type=float, default=30.0, help="seconds of silence after which a rank is hung")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: gloo, to try it")
    return parser.parse_args()


def _token(given: Any, host: str) -> str:
    """
    Raises:
        InputError: an address that others reach, and no token or a short one.
    """
    try:
        token = given.token_file.read_text().strip() if given.token_file else os.environ.get(TOKEN_VARIABLE, "")
    except OSError as error:
        raise InputError(
            f"{given.token_file} cannot be read ({error.strerror}): it shall hold the pool's token"
        ) from None
    if not token and is_loopback(host):
        return ""
    if len(token) < MIN_TOKEN:
        raise InputError(
            f"--listen {given.listen} can be reached by others, and the token has {len(token)} characters: give one of "
            f"{MIN_TOKEN} or more by --token-file or {TOKEN_VARIABLE}"
        )
    return token


def _serve(given: Any, run: Callable[[Hub | Member, torch.device], None]) -> None:
    host, port = parse_address(given.listen)
    token = _token(given, host)
    rank, world, local = (int(os.environ.get(name, "0")) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    device = torch.device("cpu") if given.device == "cpu" else torch.device("cuda", local)
    place = Place(rank, f"CPU process {rank}" if device.type == "cpu" else f"GPU {local}", socket.gethostname())
    links: Hub | Member
    if rank == 0:
        listener = _listener(host, port)
        links = hub = Hub(place, given.watchdog, max(world, 1))
        threading.Thread(target=_accept, args=(listener, token, hub), daemon=True, name="wan-fp8-accept").start()
        if missing := hub.wait_for_peers(JOIN_SECONDS):
            raise PoolError(
                f"the ranks {missing} did not come to {given.listen} within {JOIN_SECONDS:.0f} s: check that they run, "
                "and that their hosts reach this one"
            )
    else:
        if host in ("0.0.0.0", "::"):
            host = os.environ["MASTER_ADDR"]
        channel = prove(_connected(host, port, JOIN_SECONDS), token, {"role": "rank", "rank": rank, **place.plain()})
        links = Member(place, given.watchdog, channel)
    links.stage("joining the process group")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo", device_id=device if device.type == "cuda" else None
    )
    if rank == 0:
        log.info("a pool of %d answers at %s", world, given.listen)
    run(links, device)


def _listener(host: str, port: int) -> socket.socket:
    """
    Raises:
        PoolError: somebody else has the port, or the address is not of this host.
    """
    try:
        return socket.create_server((host, port), backlog=WAITING)
    except OSError as error:
        raise PoolError(
            f"rank 0 cannot listen at {host}:{port} ({error.strerror}): give an address of this host and a port that "
            "is free"
        ) from None


def _connected(host: str, port: int, seconds: float) -> socket.socket:
    deadline = time.monotonic() + seconds
    while True:
        try:
            return socket.create_connection((host, port), timeout=5.0)
        except OSError as error:
            if time.monotonic() > deadline:
                raise PoolError(f"nobody answers at {host}:{port} ({error}): check that rank 0 runs") from None
            time.sleep(0.2)


def _accept(listener: socket.socket, token: str, hub: Hub) -> None:
    """Let in who knows the token, each greeting in a thread of its own."""
    places = threading.Semaphore(WAITING)
    while True:
        connection, (address, *_) = listener.accept()
        if not places.acquire(blocking=False):
            connection.close()
            continue
        threading.Thread(target=_greet, args=(connection, address, token, hub, places), daemon=True).start()


def _greet(connection: socket.socket, address: str, token: str, hub: Hub, places: threading.Semaphore) -> None:
    try:
        channel, hello = challenge(connection, token)
        if hello.get("role") == "rank":
            known = {name: hello[name] for name in ("rank", "device", "host")}
            hub.add_peer(Place(int(known["rank"]), str(known["device"]), str(known["host"])), channel)
        elif hub.busy:
            channel.send("refused", {"why": "the pool serves another ComfyUI"})
            channel.close()
        else:
            log.info("a caller at %s", address)
            hub.serve(channel, gone=lambda: hub.requests.put(Message("drop", {"id": 0, "models": None})))
    except (WireError, KeyError, ValueError, TypeError) as error:
        log.warning("a connection from %s was closed: %s", address, error)
        connection.close()
    finally:
        places.release()


def connect(address: str, token: str) -> Any:
    """The caller's channel to a pool.

    Raises:
        InputError: no address.
        PoolError: nobody answers there, or not with this token.
    """
    host, port = parse_address(address)
    try:
        return prove(socket.create_connection((host, port), timeout=5.0), token, {"role": "caller"})
    except OSError as error:
        why = error if isinstance(error, WireError) else error.strerror or error
        raise PoolError(f"no pool at {address}: {why}; check that it runs, and its token") from None
