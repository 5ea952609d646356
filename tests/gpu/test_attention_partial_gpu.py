"""Parts of the keys, merged, with the kernels of a GPU."""

from __future__ import annotations

import partial_cases
import pytest
import torch

from wan_fp8.attention import ATTENTION, AttentionCore
from wan_fp8.attention.core import register_backends


@pytest.mark.parametrize("backend", ["fa3", "cudnn", "sdpa"])
def test_parts_make_the_whole(backend: str) -> None:
    register_backends()
    q = torch.empty(1, 37, 1, 64, device="cuda", dtype=torch.bfloat16)
    reason = ATTENTION.backend(backend).refuse(AttentionCore.request(q, q))
    if reason is not None:
        pytest.skip(reason)
    partial_cases.parts_make_the_whole(backend, "cuda", torch.bfloat16, 1e-2)
