"""One rank of a pool: ``python -m wan_fp8.parallel.worker``, started by the pool's launcher, or under ``torchrun``.

By the launcher: one line of JSON on standard input says who this is, and open file descriptors link it to the caller
and to the other ranks. Under ``torchrun``, on one host or many::

    torchrun --nproc-per-node 8 -m wan_fp8.parallel.worker --listen 10.0.0.1:7421 --token-file pool.token
"""

from __future__ import annotations

import hashlib
import json
import socket
import sys
import time
from collections import Counter
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import WanFP8Error
from . import lifeline, outside
from .links import Hub, Links, Member, Outcome, Place, failure_of
from .serving import Serving
from .wire import DTYPES, Channel, Json, Message, on_host

COLLECTIVE_TIMEOUT = timedelta(minutes=30)
LINK_BYTES = 2**27
"""Of the all-to-all that measures the link."""
ALIGN = 64
"""Tensors lie at multiples of this in the buffer that goes to all ranks."""


def main() -> None:
    """Be one rank until the caller goes, or for as long as ``torchrun`` wants."""
    if len(sys.argv) > 1:
        return outside.main(run)
    config = json.loads(sys.stdin.buffer.readline())
    lifeline.hold(config["parent"], config["folder"])
    place = Place(config["rank"], config["names"][config["rank"]], socket.gethostname())
    links: Hub | Member
    if config["rank"] == 0:
        links = hub = Hub(place, config["watchdog"], config["world"])
        for rank, number in enumerate(config["peers"], 1):
            hub.add_peer(Place(rank, config["names"][rank], place.host), _opened(number))
        hub.serve(_opened(config["caller"]), gone=lambda: lifeline.leave(Path(config["folder"])))
    else:
        links = Member(place, config["watchdog"], _opened(config["hub"]))
    device = torch.device(config["device"])
    join(device, f"file://{config['folder']}/meeting", config["rank"], config["world"], links)
    run(links, device)


def join(device: torch.device, meeting: str, rank: int, world: int, links: Links) -> None:
    """Join the process group."""
    links.stage("joining the process group")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.zeros(1, device=device)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        init_method=meeting,
        rank=rank,
        world_size=world,
        timeout=COLLECTIVE_TIMEOUT,
        device_id=device if device.type == "cuda" else None,
    )


def _opened(number: int) -> Channel:
    return Channel(socket.socket(fileno=number))


def _facts(device: torch.device, control: dist.ProcessGroup) -> Json:
    """What a planner wants to know: ranks, bytes of the smallest GPU, GB/s that each sends while all do, how many
    ranks there are on a host (None where hosts differ), and the GPU of rank 0 by name."""
    world = dist.get_world_size()
    total = torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else 0
    smallest = torch.tensor([total], dtype=torch.int64)
    dist.all_reduce(smallest, dist.ReduceOp.MIN, group=control)
    name = int.from_bytes(hashlib.sha256(socket.gethostname().encode()).digest()[:7], "big")
    names = [torch.zeros(1, dtype=torch.int64) for _ in range(world)]
    dist.all_gather(names, torch.tensor([name], dtype=torch.int64), group=control)
    counts = Counter(int(value) for value in names)
    per_host = world // len(counts) if len(set(counts.values())) == 1 else None
    link = _link_gbs(device, world) if device.type == "cuda" and world > 1 else None
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return {"world": world, "memory": int(smallest), "per_host": per_host, "link_gbs": link, "gpu": gpu}


def _link_gbs(device: torch.device, world: int) -> float:
    """Of an all-to-all; the first rounds set the connections up."""
    send = torch.zeros(LINK_BYTES // world * world, dtype=torch.uint8, device=device)
    receive = torch.empty_like(send)
    began = 0.0
    for number in range(6):
        if number == 3:
            torch.cuda.synchronize(device)
            began = time.perf_counter()
        dist.all_to_all_single(receive, send)
    torch.cuda.synchronize(device)
    return 3 * send.numel() * (world - 1) / world / (time.perf_counter() - began) / 1e9


def run(links: Hub | Member, device: torch.device) -> None:
    """Serve requests in the process group."""
    control = dist.new_group(backend="gloo") if device.type == "cuda" else dist.group.WORLD
    assert control is not None
    announce = links.announce if isinstance(links, Hub) else (lambda text: None)
    serving = Serving(device, control, stage=links.stage, announce=announce)
    links.memory = serving.memory
    links.stage("measuring the link")
    facts = _facts(device, control)
    links.stage("idle")
    if isinstance(links, Hub):
        links.complete(facts)
    while (message := links.next()) is not None:
        _one(links, serving, message)
        links.stage("idle")


def _one(links: Hub | Member, serving: Serving, message: Message) -> None:
    identity = message.fields["id"]
    found: Json = {}
    out: dict[str, Tensor] = {}
    error: Json | None = None
    links.stage(f"taking a request to {message.kind}")
    try:
        if isinstance(links, Hub):
            listed = [_listed(name, value) for name, value in message.tensors.items()]
            links.hand_on(message, listed)
        else:
            listed = message.fields["listed"]
        with torch.inference_mode(message.kind not in ("load", "merge", "weights")):
            tensors = spread(listed, message.tensors, serving.device)
            found, out = serving.run(message.kind, message.fields, tensors)
            out = {name: on_host(value) for name, value in out.items()}
    except Exception as raised:
        error = failure_of(raised)
        if not isinstance(raised, WanFP8Error):
            print("\n".join(error["lines"]), file=sys.stderr, flush=True)
    outcome = Outcome(error, found)
    if isinstance(links, Member):
        links.finish(identity, outcome)
        return
    agreed, outcomes = links.finish(identity, outcome)
    if agreed is not None:
        links.tell("error", {"id": identity, **agreed}, to=message.origin)
    else:
        links.tell("answer", {"id": identity, "found": [each.found for each in outcomes]}, out, to=message.origin)


def _listed(name: str, value: Tensor) -> Json:
    return {"name": name, "dtype": str(value.dtype).removeprefix("torch."), "shape": list(value.shape)}


def spread(listed: list[Json], tensors: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Rank 0's tensors on every rank and its device, in one broadcast of bytes."""
    if not listed:
        return {}
    ends, total = [], 0
    for entry in listed:
        size = torch.Size(entry["shape"]).numel() * DTYPES[entry["dtype"]].itemsize
        ends.append((total, size))
        total += size + -size % ALIGN
    whole = torch.empty(total, dtype=torch.uint8, device=device)
    for (first, size), entry in zip(ends, listed, strict=True):
        if entry["name"] in tensors:
            whole[first : first + size].copy_(tensors[entry["name"]].reshape(-1).view(torch.uint8), non_blocking=True)
    if dist.get_world_size() > 1:
        dist.broadcast(whole, 0)
    return {
        entry["name"]: whole[first : first + size].view(DTYPES[entry["dtype"]]).view(entry["shape"])
        for (first, size), entry in zip(ends, listed, strict=True)
    }


if __name__ == "__main__":
    main()
