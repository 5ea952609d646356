"""The cases of ``layouts`` with the kernels and collectives that videos are made with: heads of 128, an odd number of
tokens, bf16, FP8 GEMMs of the GPU, NCCL. Without a GPU they run as a rehearsal on the CPU, on a smaller clip.

fp64 says that the layout is right, to 1e-7; bf16 that its kernels are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from unittest import mock

import layouts
import torch
import torch.distributed as dist

from wan_fp8.attention.backends import flash3
from wan_fp8.attention.core import AttentionCore
from wan_fp8.models.specs import Task
from wan_fp8.parallel import ParallelDims


def topologies(ranks: int) -> dict[str, ParallelDims]:
    """Every kind of split that the ranks allow."""
    found = {f"ulysses {ranks}": ParallelDims(ulysses=ranks), f"ring {ranks}": ParallelDims(ring=ranks)}
    found[f"ring {ranks}, passed around"] = ParallelDims(ring=ranks, merge=True)
    if ranks % 2 == 0:
        found["cfg 2" + (f" x ulysses {ranks // 2}" if ranks > 2 else "")] = ParallelDims(cfg=2, ulysses=ranks // 2)
    if ranks % 4 == 0:
        found[f"cfg 2 x ulysses 2 x ring {ranks // 4}"] = ParallelDims(cfg=2, ulysses=2, ring=ranks // 4)
    return found


def cases(ranks: int) -> dict[str, Callable[[], None]]:
    layouts.HEADS, layouts.WIDTH = ranks, 128 * ranks
    if torch.cuda.is_available():
        layouts.DEVICE, layouts.BACKEND, layouts.GRID = f"cuda:{dist.get_rank()}", "auto", (5, 30, 26)
    return dict(_cases(ranks))


def _cases(ranks: int) -> Iterator[tuple[str, Callable[[], None]]]:
    fp8_attention, dtype = _fp8_attention()
    for name, dims in topologies(ranks).items():
        sharded = dataclasses.replace(dims, shard=ranks)
        for recipe, task in (("none", Task.T2V), ("DelayedScaling", Task.TI2V)):
            yield f"{name}: {task} {recipe} fp64", partial(layouts.check, dims, task, recipe, torch.float64, 2)
        for recipe, task in (
            ("none", Task.I2V),
            ("rowwise", Task.T2V),
            ("DelayedScaling", Task.I2V),
            ("Float8CurrentScaling", Task.TI2V),
        ):
            yield f"{name}: {task} {recipe} bf16", partial(layouts.check, dims, task, recipe, torch.bfloat16, 2)
        cache = partial(layouts.check_cache, dims, "DelayedScaling", "in_phase", torch.bfloat16)
        yield f"{name}: MagCache DelayedScaling bf16", cache
        yield f"{name}: live LoRA", partial(layouts.check_lora, dims)
        if dims.ulysses == ranks:
            for kind in (torch.float64, torch.bfloat16):
                yield f"{name}: sparse {kind}", partial(_sparse, dims, kind)
        if dims.sequence > 1 and not dims.merge:
            yield f"{name}: FP8 attention", partial(layouts.check_fp8_attention, dims, fp8_attention, dtype)
        for recipe in ("none", "rowwise", "DelayedScaling"):
            yield (
                f"{name}: sharded, {recipe} bf16: the same bits",
                partial(layouts.check_sharding_is_exact, sharded, recipe, torch.bfloat16),
            )

    for design in ("2.1", "2.2"):
        yield f"VAE {design}", partial(layouts.check_vae, ranks, design, 13)


def _sparse(dims: ParallelDims, dtype: torch.dtype) -> None:
    """Four heads a rank, so that they can change ranks; in bf16 with the GPU's own block-sparse kernel."""
    with mock.patch.multiple(layouts, HEADS=4 * dims.world, WIDTH=512 * dims.world):
        layouts.check_sparse_attention(dims, *layouts.SPARSE[0], dtype)


def _fp8_attention() -> tuple[str, torch.dtype]:
    """FlashAttention 3 where this GPU has it."""
    q = torch.empty(1, 1, 1, 128, device=layouts.DEVICE, dtype=torch.bfloat16)
    usable = flash3._refuse_fp8(AttentionCore.request(q, q)) is None
    return ("fa3-fp8", torch.bfloat16) if usable else ("reference-fp8", torch.float64)
