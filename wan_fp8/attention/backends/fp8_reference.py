"""FP8 attention written out: real e4m3 operands with means removed, exact arithmetic after the cast. Runs everywhere;
for tests and checks."""

from __future__ import annotations

from torch import Tensor

from ...kernels import attention_cast
from ..core import ATTENTION, AttentionRequest
from .reference import reference


def _refuse(request: AttentionRequest) -> str | None:
    del request
    return None


@ATTENTION.register("reference-fp8", priority=-20, refuse=_refuse, exact=False)
def reference_fp8(q_BSNE: Tensor, k_BLNE: Tensor, v_BLNE: Tensor) -> Tensor:
    """The error of the casts alone: what an FP8 kernel with perfect accumulation would give."""
    return attend(attention_cast.eager(q_BSNE, k_BLNE, v_BLNE)).to(q_BSNE.dtype)


def attend(cast: attention_cast.CastQKV) -> Tensor:
    """fp32 attention on dequantised operands, the mean of V added back."""
    pairs = ((cast.q, cast.q_scale), (cast.k, cast.k_scale), (cast.v, cast.v_scale))
    q, k, v = (data.float() * scale[:, None, :, None] for data, scale in pairs)
    return reference(q, k, v) + cast.v_mean_BNE[:, None]
