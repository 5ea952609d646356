"""The attention call as a module of its own: the one place where a backend is chosen, replaced or wrapped.

B batch, S queries, L keys, N heads, E head width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..hardware import DeviceCaps, device_caps
from ..registry import KernelRegistry, Resolution


@dataclass(frozen=True, slots=True)
class AttentionRequest:
    """What a backend is asked to do; refusals are decided from this alone."""

    caps: DeviceCaps
    dtype: torch.dtype
    head_dim: int
    num_queries: int
    num_keys: int


ATTENTION: KernelRegistry[AttentionRequest] = KernelRegistry("attention")
"""``run(q_BSNE, k_BLNE, v_BLNE) -> [B, S, N, E]``: softmax(q k^T / sqrt(E)) v over all keys given, no mask."""


@dataclass(frozen=True, slots=True)
class Attention:
    """Which attention kernel to use."""

    backend: str = "auto"
    """A registered name, or ``auto``: the fastest exact backend that this device, dtype and shape allow."""

    def __post_init__(self) -> None:
        register_backends()
        ATTENTION.check_name(self.backend)


def register_backends() -> None:
    """Import every backend file; done at first use, so that importing the models stays light."""
    from . import backends

    assert backends.__all__


class AttentionCore(nn.Module):
    """Scaled dot-product attention on [B, S, N, E] tensors. It has no parameters, so that others can wrap or replace
    it."""

    def __init__(self) -> None:
        super().__init__()
        self.setting = "auto"
        self._resolved: dict[AttentionRequest, Resolution[AttentionRequest]] = {}

    def forward(self, q_BSNE: Tensor, k_BLNE: Tensor, v_BLNE: Tensor) -> Tensor:
        """Attend to every key given; the caller cuts padding off k and v before the call."""
        return self.resolve(q_BSNE, k_BLNE).backend.run(q_BSNE, k_BLNE, v_BLNE)

    @staticmethod
    def request(q_BSNE: Tensor, k_BLNE: Tensor) -> AttentionRequest:
        """What a backend is asked to do for tensors like these."""
        caps = device_caps(q_BSNE.device)
        return AttentionRequest(caps, q_BSNE.dtype, q_BSNE.shape[-1], q_BSNE.shape[1], k_BLNE.shape[1])

    def resolve(self, q_BSNE: Tensor, k_BLNE: Tensor) -> Resolution[AttentionRequest]:
        """The backend for tensors like these, with the reasons why others were refused."""
        request = self.request(q_BSNE, k_BLNE)
        if request not in self._resolved:
            register_backends()
            self._resolved[request] = ATTENTION.resolve(self.setting, request)
        return self._resolved[request]


def set_attention(model: nn.Module, attention: Attention | None) -> nn.Module:
    """Choose the attention backend of every attention in ``model``; None goes back to ``auto``. Returns the model."""
    name = "auto" if attention is None else attention.backend
    for module in model.modules():
        if isinstance(module, AttentionCore):
            module.setting = name
            module._resolved.clear()
    return model
