"""Parts of the keys, merged, are attention over all of them."""

from __future__ import annotations

import partial_cases
import pytest
import torch

from wan_fp8.attention import Attention, AttentionCore
from wan_fp8.attention.partial import part_of
from wan_fp8.errors import InputError


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)]
)
def test_parts_make_the_whole(backend: str, dtype: torch.dtype, tolerance: float) -> None:
    partial_cases.parts_make_the_whole(backend, "cpu", dtype, tolerance)


def test_a_backend_without_the_logarithm_is_refused() -> None:
    q = torch.zeros(1, 4, 2, 64, dtype=torch.bfloat16)
    with pytest.raises(InputError, match="'reference-fp8' cannot be merged from parts of the keys: choose fa3"):
        part_of(AttentionCore(), q, q, Attention("reference-fp8"))
