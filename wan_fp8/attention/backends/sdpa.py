"""torch's own scaled_dot_product_attention: torch's choice of kernel (``sdpa``), or one of its kernels by name.

Tensors arrive as [B, S, N, E]; torch takes [B, N, S, E], which is a transposed view for each of its kernels: nothing
is copied.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..core import ATTENTION, AttentionRequest

_HALF = (torch.bfloat16, torch.float16)


def attend(q_BSNE: Tensor, k_BLNE: Tensor, v_BLNE: Tensor) -> Tensor:
    """torch's call on our layout: [B, S, N, E] in and out."""
    out = F.scaled_dot_product_attention(q_BSNE.transpose(1, 2), k_BLNE.transpose(1, 2), v_BLNE.transpose(1, 2))
    return out.transpose(1, 2)


def _refuse_never(request: AttentionRequest) -> str | None:
    del request
    return None


@ATTENTION.register("sdpa", priority=10, refuse=_refuse_never)
def sdpa(q_BSNE: Tensor, k_BLNE: Tensor, v_BLNE: Tensor) -> Tensor:
    """Whatever kernel torch prefers for the tensors."""
    return attend(q_BSNE, k_BLNE, v_BLNE)


def torch_choice(request: AttentionRequest) -> str:
    """Which of its kernels torch takes for ``sdpa``, in torch's own word: cudnn, flash, efficient or math."""
    length = min(request.num_keys, 1024)  # the choice goes by type, width and device
    q = torch.empty(1, 1, length, request.head_dim, dtype=request.dtype, device=request.caps.device)
    choice = SDPBackend(torch._fused_sdp_choice(q, q, q))
    return choice.name.removesuffix("_ATTENTION").lower()


def refuse_half_cuda(request: AttentionRequest) -> str | None:
    """Why a half-precision flash kernel cannot take the request."""
    if not request.caps.is_cuda:
        return f"it needs an NVIDIA GPU; the tensors are on {request.caps.device.type}"
    if request.caps.capability is not None and request.caps.capability < (8, 0):
        return f"it needs compute capability 8.0; {request.caps.name} has {request.caps.capability}"
    if request.dtype not in _HALF:
        return f"it takes bf16 or fp16, not {request.dtype}"
    if request.head_dim > 128 or request.head_dim % 8:
        return f"it takes a head width up to 128 in steps of 8, not {request.head_dim}"
    return None


def _refuse_cudnn(request: AttentionRequest) -> str | None:
    if not torch.backends.cuda.cudnn_sdp_enabled():
        return "torch.backends.cuda.enable_cudnn_sdp(False) is in force"
    if request.caps.is_cuda and not torch.backends.cudnn.is_available():
        return "this build of torch has no cuDNN"
    if request.num_keys == 1:
        return "cuDNN takes two keys or more"
    return refuse_half_cuda(request)


@ATTENTION.register("cudnn", priority=20, refuse=_refuse_cudnn)
def cudnn(q_BSNE: Tensor, k_BLNE: Tensor, v_BLNE: Tensor) -> Tensor:
    """cuDNN's fused kernel: torch's fastest on Hopper: 573 TFLOP/s on an H200 at 75,600 tokens
    (``benchmarks/results/kernels_h200.json``)."""
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return attend(q_BSNE, k_BLNE, v_BLNE)
