"""What the benchmarks on several GPUs share: topologies by name, times that all ranks agree on, and how much of
them is communication.

Started by ``torchrun``, a script holds one GPU a rank; started by ``python``, it is alone. Without a GPU ranks are
processes on the CPU (gloo), which rehearses a command and measures nothing.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import common
import torch
import torch.distributed as dist

from wan_fp8.models.specs import ModelSpec
from wan_fp8.parallel import ParallelDims, exchange

_PART = re.compile(r"(cfg|ulysses|ring|merge|fsdp)(\d*)")


def start(device: str = "") -> str:
    """Join the ranks that torchrun started, if it did; this rank's device."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if "RANK" not in os.environ:
        return device
    if device.startswith("cuda"):
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", timeout=timedelta(minutes=4), device_id=torch.device(device))
    else:
        dist.init_process_group("gloo", timeout=timedelta(minutes=4))
    return device


def stop() -> None:
    """Leave the ranks."""
    if dist.is_initialized():
        dist.destroy_process_group()


def world() -> int:
    """Ranks in all."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_first() -> bool:
    """Whether this rank prints and writes."""
    return not dist.is_initialized() or dist.get_rank() == 0


def barrier() -> None:
    """Wait for the others, with nothing left in this rank's queue."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    if dist.is_initialized():
        dist.barrier()


def slowest(values: list[float], device: str) -> list[float]:
    """Each value as it was on the rank where it was largest: all ranks have waited for that one."""
    if world() == 1:
        return values
    shared = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(shared, dist.ReduceOp.MAX)
    return shared.tolist()


def milliseconds(function: Callable[[], Any], device: str, *, repeats: int = 5, warmup: int = 2) -> list[float]:
    """``common.milliseconds`` of a function that every rank runs: begun together, as long as the slowest takes."""
    for _ in range(warmup):
        function()
    times = []
    for _ in range(repeats):
        barrier()
        times += common.milliseconds(function, device, repeats=1, warmup=0)
    return slowest(times, device)


# ---- topologies ------------------------------------------------------------------------------------------------------


def topology(name: str) -> ParallelDims:
    """``cfg2+ulysses4+ring2+fsdp``, any of the parts; ``ring2+merge`` passes keys around; ``fsdp8`` shards inside
    groups of 8; ``one``: a single GPU.

    Raises:
        ValueError: another name.
    """
    if name == "one":
        return ParallelDims()
    given: dict[str, int] = {}
    for part in name.split("+"):
        match = _PART.fullmatch(part)
        if match is None or (match[1] not in ("fsdp", "merge") and not match[2]) or match[1] in given:
            raise ValueError(f"a topology is made of cfg2, ulysses4, ring2 and fsdp, joined by +; got {name!r}")
        given[match[1]] = int(match[2] or 0)
    shard, merge = given.pop("fsdp", None), "merge" in given
    given.pop("merge", None)
    dims = ParallelDims(**given, merge=merge)
    return dims if shard is None else dataclasses.replace(dims, shard=shard or dims.world)


def name_of(dims: ParallelDims) -> str | None:
    """The name that ``topology`` reads; None for a single GPU."""
    parts = [f"{part}{count}" for part in ("cfg", "ulysses", "ring") if (count := getattr(dims, part)) > 1]
    if dims.merge:
        parts.append("merge")
    if dims.shard > 1:
        parts.append("fsdp" if dims.shard == dims.world else f"fsdp{dims.shard}")
    return "+".join(parts) or None


def chosen(names: str, ulysses: int, ring: int, cfg: bool, fsdp: bool) -> list[ParallelDims]:
    """Layouts of a command line, a single GPU first: those of ``names``, or the one that the other options say."""
    if names:
        layouts = [topology(name) for name in names.split(",")]
    else:
        dims = ParallelDims(cfg=2 if cfg else 1, ulysses=ulysses, ring=ring)
        layouts = [ParallelDims(), dataclasses.replace(dims, shard=dims.world) if fsdp else dims]
    return list(dict.fromkeys(layouts))


# ---- communication ---------------------------------------------------------------------------------------------------


@contextmanager
def silent() -> Iterator[None]:
    """Exchanges of tokens, heads and keys that move nothing: what is left is what a block would take if they were free.
    The copies around them stay. Every rank gets its own values back, so that the kernels work on numbers like the real
    ones (a GPU at its power limit is faster on zeros)."""
    kept = exchange.all_to_all, exchange.all_gather, exchange.ring_step
    exchange.all_to_all = lambda send, group: (send, [])
    exchange.all_gather = lambda send, group: send.expand(group.size(), *send.shape)
    exchange.ring_step = lambda send, group: (send, [])
    try:
        yield
    finally:
        exchange.all_to_all, exchange.all_gather, exchange.ring_step = kept


def exchange_alone(
    spec: ModelSpec, dims: ParallelDims, tokens: int, batch: int, dtype: torch.dtype, device: str
) -> dict[str, float]:
    """Milliseconds of the collectives of one block (or of one forward, where the name says so) by themselves, in
    their own shapes, the fastest of ten runs; and bus GB/s of this rank, which sends and receives that much at once."""
    from wan_fp8.parallel.dims import build_groups

    groups = build_groups(dims, torch.device(device).type)
    share = tokens // dims.sequence
    found: dict[str, float] = {}

    def timed(name: str, calls: int, sent: int, function: Callable[[], Any]) -> None:
        best = min(milliseconds(function, device, repeats=10))
        found[f"{name}_ms"] = round(calls * best, 3)
        found[f"{name}_gbs"] = round(sent / best / 1e6, 1)

    def values(*shape: int, kind: torch.dtype = dtype) -> torch.Tensor:
        return torch.zeros(*shape, device=device, dtype=kind)

    def all_to_all(send: torch.Tensor) -> None:
        for work in exchange.all_to_all(send, groups.ulysses)[1]:
            work.wait()

    def size(part: torch.Tensor, others: int) -> int:
        return part.numel() * part.element_size() * others

    heads = spec.num_heads // dims.ulysses
    if dims.ulysses > 1:
        send = values(batch, dims.ulysses, share, heads, spec.head_dim)
        timed("all_to_all", 4, size(send[:, 0], dims.ulysses - 1), lambda: all_to_all(send))
    if dims.ring > 1:
        keys = values(batch, share * dims.ulysses, heads, spec.head_dim)
        timed("keys_gather", 2, size(keys, dims.ring - 1), lambda: exchange.all_gather(keys, groups.ring))
    if dims.sequence > 1:
        stream = values(batch, share, spec.dim, kind=torch.float32)
        sent = size(stream, dims.sequence - 1)
        timed("stream_gather_per_forward", 1, sent, lambda: exchange.all_gather(stream, groups.sequence))
    if dims.shard > 1:
        parameters = 8 * spec.dim**2 + 2 * spec.dim * spec.ffn_dim
        group, weights = groups.weights.get_group("shard"), values(parameters // dims.shard, kind=torch.uint8)
        timed("weights_gather_fp8", 1, size(weights, dims.shard - 1), lambda: exchange.all_gather(weights, group))
    return found


def nccl_ms(kernels: dict[str, float]) -> float:
    """Milliseconds in collectives, waiting for other ranks included, of a profile by kernel name."""
    return sum(value for name, value in kernels.items() if "nccl" in name.lower())
