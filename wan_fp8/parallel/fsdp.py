"""Weights of the blocks sharded over ranks (FSDP2): each holds a part and gathers a block's while the one before runs.

FP8 weights are plain tensors and travel as such, one byte a parameter. Embeddings, time MLP and head stay whole
everywhere: they are 2 % of the bytes and run once a forward.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from ..models.wan import WanModel
from ..quant.linear import FP8Linear


def shard_blocks(model: WanModel, weights: DeviceMesh) -> None:
    """Shard every block of ``model`` over the mesh (replicate, shard), in place and for good.

    The original weights that a recipe keeps in reach are let go: whole, they would be what sharding is there to avoid.
    """
    for module in model.modules():
        if isinstance(module, FP8Linear):
            module.original = module.source = None
    mine: set[nn.Parameter] = set()
    for block in model.blocks:
        parameters = set(block.parameters())
        mine |= parameters
        scalars = {parameter for parameter in parameters if parameter.ndim == 0}  # one scale for a whole weight
        fully_shard(block, mesh=weights, reshard_after_forward=True, ignored_params=scalars)
    # the root holds no weights of its own; it is what lets a block's gather run beside the block before it
    fully_shard(model, mesh=weights, ignored_params=set(model.parameters()) - mine)
    for block, following in pairwise(model.blocks):
        assert isinstance(block, FSDPModule) and isinstance(following, FSDPModule)
        block.set_modules_to_forward_prefetch([following])
    model.fixed_weights = "its weights are sharded, no rank has them all; load the model again"


def shard_encoder(model: nn.Module, weights: DeviceMesh, device: torch.device) -> None:
    """Shard transformers' ``UMT5EncoderModel`` over the mesh (replicate, shard), in place and for good: block by block,
    then the token table with what is left. Each goes to ``device`` when its turn comes.

    The table is gathered for the whole of a forward, a block's weights while it runs.
    """
    for block in model.encoder.block:  # type: ignore[union-attr]
        fully_shard(block.to(device), mesh=weights, reshard_after_forward=True)
    fully_shard(model.to(device), mesh=weights, reshard_after_forward=True)
