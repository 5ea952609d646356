"""The experts of ``headline.py --pool``: random weights in two files, which a pool of worker processes reads."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from dit import random_model

from wan_fp8 import Recipe, apply_recipe, save_checkpoint
from wan_fp8.models.specs import ModelSpec
from wan_fp8.models.wan import WanModel, build_model
from wan_fp8.parallel import ParallelDims


def pooled_experts(
    spec: ModelSpec, layers: int, recipe: Recipe, dims: ParallelDims, gpus: int, folder: Path, device: str
) -> list[WanModel]:
    """High and low noise as models whose forward runs in a pool of ``gpus`` workers; it starts with the first one.

    Args:
        folder: takes one file an expert, 14.5 GB in FP8; files that are there already are taken.
    """
    from wan_fp8.parallel.pools import PoolSpec
    from wan_fp8.parallel.remote import Remote, RemoteWanModel, Topology
    from wan_fp8.parallel.source import ModelSource

    kind = torch.device(device).type
    pool = PoolSpec(devices=tuple(f"cuda:{rank}" if kind == "cuda" else kind for rank in range(gpus)))
    topology = Topology(
        cfg=dims.cfg,
        ulysses=dims.ulysses,
        ring=dims.ring,
        weights="replicate" if dims.shard == 1 else "shard",
        experts=2,
    )
    found: list[WanModel] = []
    spec = dataclasses.replace(spec, num_layers=layers)
    for seed, expert in enumerate(("high_noise", "low_noise")):
        path = folder / f"{expert}_{layers}_{'bf16' if recipe.is_none else recipe.name}.safetensors"
        if not path.exists():
            model = random_model(spec, layers, device, torch.bfloat16, seed)
            save_checkpoint(model if recipe.is_none else apply_recipe(model, recipe), path, expert=expert)
            del model
        with torch.device("meta"):
            remote = build_model(spec, model_class=RemoteWanModel)
        remote.remote = Remote(spec, ModelSource.of(path), pool, topology, recipe)
        found.append(remote)
    if kind == "cuda":
        torch.cuda.empty_cache()
    return found
