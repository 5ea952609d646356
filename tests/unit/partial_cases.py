"""Attention over parts of the keys: what ``test_attention_partial`` runs on the CPU and ``tests/gpu`` on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from wan_fp8.attention import Attention, AttentionCore
from wan_fp8.attention.partial import merge_, part_of


def exact(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax attention and the logarithm of its denominator, in fp64."""
    q, k, v = (t.double().transpose(1, 2) for t in (q, k, v))
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    return (scores.softmax(-1) @ v).transpose(1, 2), scores.logsumexp(-1)


def parts_make_the_whole(backend: str, device: str, dtype: torch.dtype, tolerance: float) -> None:
    """Three unequal parts of the keys, the first with scores far above the others'; batch of two."""
    generator = torch.Generator(device).manual_seed(0)
    q, k, v = (torch.randn(2, 37, 3, 64, device=device, generator=generator).to(dtype) for _ in range(3))
    k[:, :9] *= 6
    core, setting = AttentionCore(), Attention(backend)
    part = part_of(core, q, k, setting)
    out = log = None
    for keys in (slice(0, 9), slice(9, 36), slice(36, 37)) if backend != "cudnn" else (slice(0, 9), slice(9, 37)):
        ours, ours_log = part(q, k[:, keys], v[:, keys])
        theirs, theirs_log = exact(q, k[:, keys], v[:, keys])
        assert ours.shape == q.shape and ours.dtype == dtype and ours_log.shape == (2, 3, 37)
        assert float((ours.double() - theirs).norm() / theirs.norm()) < tolerance
        torch.testing.assert_close(ours_log.double(), theirs_log, rtol=max(tolerance, 1e-6), atol=1e-3)
        if out is None or log is None:
            out, log = ours.to(torch.promote_types(dtype, torch.float32)), ours_log
        else:
            log = merge_(out, log, (ours, ours_log))
    assert out is not None and log is not None
    theirs, theirs_log = exact(q, k, v)
    assert float((out.double() - theirs).norm() / theirs.norm()) < tolerance
    torch.testing.assert_close(log.double(), theirs_log, rtol=max(tolerance, 1e-6), atol=1e-3)
