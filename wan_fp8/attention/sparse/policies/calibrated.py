"""A share of the key blocks for each step, transformer block and head, as a run under the bound settled them."""

from __future__ import annotations

import torch

from ....errors import InputError
from . import Asked, Choice


def choice(asked: Asked) -> Choice:
    """By number; a transformer block that the table does not hold stays dense."""
    table = asked.sparsity.calibration
    assert table is not None
    if table.heads != asked.num_heads:
        raise InputError(
            f"the table of densities is for {table.heads} heads, and this model has {asked.num_heads}: save one from a "
            "run of this model"
        )
    shares = table.shares(asked.step, asked.total, asked.block)
    if shares is None:
        return Choice(asked.estimated(), "count", 1.0)
    amount = torch.tensor([shares[head] for head in asked.heads])
    if asked.device.type == "cuda":  # from pinned memory, so that the host does not wait for the GPU
        amount = amount.pin_memory().to(asked.device, non_blocking=True)
    return Choice(asked.estimated(), "count", amount)
