"""A fixed neighbourhood in space and time, the same for every head and step: what a policy that looks at the attention
must beat."""

from __future__ import annotations

import torch
from torch import Tensor

from ....errors import InputError
from ..order import BLOCK, BlockLayout
from . import Asked, Choice

FAR = 1e3


def choice(asked: Asked) -> Choice:
    """The nearest blocks, by number."""
    scores = -distances(asked.layout, asked.query_blocks, asked.query_rows)
    return Choice(scores[None, None], "count", asked.sparsity.density)


def distances(layout: BlockLayout, query_blocks: int, query_rows: int) -> Tensor:
    """[Mq, Mk] between the middles of blocks, in tokens; blocks without a token of the video are ``FAR`` (and are kept
    for what they hold)."""
    if layout.places is None:
        raise InputError(
            "sparsity 'window' needs to know where tokens lie: it runs inside a model, not on bare q and k"
        )
    keys = _middles(layout.places, BLOCK, layout.key_blocks)
    queries = _middles(layout.places, query_rows, query_blocks)
    return torch.cdist(queries, keys).nan_to_num(nan=FAR)


def _middles(places_S3: Tensor, rows: int, blocks: int) -> Tensor:
    places = places_S3[: rows * blocks]
    extra = rows * blocks - len(places)
    return torch.nn.functional.pad(places, (0, 0, 0, extra), value=torch.nan).unflatten(0, (blocks, rows)).nanmean(1)
