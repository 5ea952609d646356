"""What the tests of the nodes share: the pack as ComfyUI's own loader loads it, and calls of its nodes as the executor
makes them."""

from __future__ import annotations

import asyncio
import functools
import importlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PACK = Path(__file__).resolve().parent.parent.parent
MODULE = str(PACK).replace(".", "_x_")
"""The name that ComfyUI's loader gives the pack's module."""


def load_pack() -> dict[str, Any]:
    """Node classes by id, loaded once by core's ``load_custom_node``."""
    import nodes

    if "WanFP8LoadCheckpoint" not in nodes.NODE_CLASS_MAPPINGS:
        assert asyncio.run(nodes.load_custom_node(str(PACK))), "ComfyUI's loader refused the pack; see the log"
    return {name: value for name, value in nodes.NODE_CLASS_MAPPINGS.items() if name.startswith("WanFP8")}


def module(name: str) -> Any:
    """A module of the loaded pack, such as ``nodes.samplers`` or ``wan_fp8.sampling``."""
    load_pack()
    return importlib.import_module(f"{MODULE}.{name}")


def call(node: str, **inputs: Any) -> Any:
    """Run a node as the executor does: on a locked clone of its class, with defaults for widgets that are not given.

    Returns:
        The NodeOutput.
    """
    cls = load_pack()[node]
    schema = cls.GET_SCHEMA()
    defaults = {i.id: i.default for i in schema.inputs if getattr(i, "default", None) is not None}
    known = {i.id for i in schema.inputs}
    assert inputs.keys() <= known, inputs.keys() - known
    from comfy_api.internal import lock_class

    return cls.execute.__func__(lock_class(cls.PREPARE_CLASS_CLONE({})), **{**defaults, **inputs})


def latents(output: Any) -> Tensor:
    """The samples of a sampler node's output."""
    return output.args[0]["samples"]


def picture(width: int, height: int, seed: int = 0) -> Tensor:
    """An IMAGE [1, height, width, 3] of smooth random colours."""
    coarse = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    fine = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bilinear")
    return fine.movedim(1, -1).contiguous()


@functools.cache
def vae_weights(version: str) -> dict[str, Tensor]:
    """Random weights of a tiny Wan VAE ("2.1" or "2.2") under the official names."""
    import comfy.ldm.wan.vae
    import comfy.ldm.wan.vae2_2

    common = dict(
        dim_mult=[1, 2, 4, 4], num_res_blocks=2, attn_scales=[], temperal_downsample=[False, True, True], dropout=0.0
    )
    if version == "2.1":
        net = comfy.ldm.wan.vae.WanVAE(dim=8, z_dim=16, **common)
    else:
        net = comfy.ldm.wan.vae2_2.WanVAE(dim=8, dec_dim=8, z_dim=48, **common)
    generator = torch.Generator().manual_seed(3)
    weights = {}
    for name, value in net.state_dict().items():
        if name.endswith("gamma"):
            weights[name] = torch.ones_like(value)
        elif value.ndim < 2:
            weights[name] = 0.05 * torch.randn(value.shape, generator=generator)
        else:
            weights[name] = torch.randn(value.shape, generator=generator) / value[0].numel() ** 0.5
    return weights


def vae(version: str) -> Any:
    """A core VAE with those weights, in float32."""
    return module("nodes.bridge").load_vae(vae_weights(version), dtype=torch.float32)
