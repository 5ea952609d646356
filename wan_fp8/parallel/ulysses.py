"""Sequence parallelism: each rank runs the blocks on its part of the tokens.

Norms, linears, cross-attention and FFN need no other token. Self-attention trades tokens for heads with one all-to-all
for each of q, k and v and one back (Ulysses, arXiv:2309.14509), and where ranks are left over gathers keys and values
along the ring (``ring``). The token axis is padded once, by the model; the padding lies at the end of the global order
and enters no softmax.
"""

from __future__ import annotations

import dataclasses

from torch import Tensor, nn

from ..attention import Attention, Step
from ..errors import InputError
from ..models.blocks import ForwardState, Modulation
from ..models.wan import StackFunction, WanModel
from ..quant.linear import Quantization
from .dims import Groups
from .exchange import HeadsForTokens, Traffic, gather, tokens_for_heads
from .ring import whole_keys

NAME = "sequence_parallel"
"""Of the wrapper in ``WanModel.stack_wrappers``."""


class SequenceParallel:
    """Splits the tokens before the first block and gathers them after the last: caches around it see all of them, and
    decide on every rank as they would on one."""

    keeps_input = False
    innermost = True

    def __init__(self, model: WanModel, groups: Groups, traffic: Traffic) -> None:
        self.model, self.groups, self.traffic = model, groups, traffic
        self.num_tokens = 0
        """Tokens of all ranks in the forward that is running, without padding."""

    def __call__(self, tokens_BSD: Tensor, state: ForwardState, inner: StackFunction) -> Tensor:
        """[B, S, D] -> [B, S, D], padding included."""
        _refuse(state)
        share = tokens_BSD.shape[1] // self.groups.dims.sequence
        assert share * self.groups.dims.sequence == tokens_BSD.shape[1], "the model pads to equal parts"
        first = self.groups.sequence_rank * share
        mine = slice(first, first + share)
        self.num_tokens = state.num_tokens
        quantization = self.model.quantization
        if isinstance(quantization, Quantization):
            quantization.padded(share, min(max(state.num_tokens - first, 0), share))
        out, sent = gather(inner(tokens_BSD[:, mine].contiguous(), _part(state, mine)), self.groups.sequence, 1)
        self.traffic.stream += sent
        return out


class ParallelCore(nn.Module):
    """Self-attention of a block over all ranks' tokens; the wrapped core attends, with its own backend and guard."""

    def __init__(self, core: nn.Module, split: SequenceParallel) -> None:
        super().__init__()
        self.core = core
        self.split = split

    def forward(
        self, q_BCNE: Tensor, k_BCNE: Tensor, v_BCNE: Tensor, setting: Attention | None = None, step: Step | None = None
    ) -> Tensor:
        """[B, C, N, E] of this rank's tokens, as the unwrapped core would answer for them."""
        groups, traffic = self.split.groups, self.split.traffic
        q, k, v = q_BCNE, k_BCNE, v_BCNE
        if groups.dims.ulysses > 1:
            under_way = [HeadsForTokens(x, groups.ulysses) for x in (k, v, q)]
            traffic.heads += sum(exchange.sent for exchange in under_way)
            k, v, q = (exchange.wait() for exchange in under_way)
        if groups.dims.ring > 1:
            k, v, sent = whole_keys(k, v, groups.ring)
            traffic.keys += sent
        count = self.split.num_tokens
        out = self.core(q, k[:, :count], v[:, :count], setting, step)
        if groups.dims.ulysses > 1:
            out, sent = tokens_for_heads(out, groups.ulysses)
            traffic.heads += sent
        return out


def _part(state: ForwardState, mine: slice) -> ForwardState:
    """The state of a forward for the tokens of one rank; none of them is padding as far as a block can see."""
    cos, sin = state.rope
    rows = state.modulation.row_of_token
    return dataclasses.replace(
        state,
        rope=(cos[mine], sin[mine]),
        num_tokens=mine.stop - mine.start,
        first_token=mine.start,
        modulation=Modulation(state.modulation.rows, None if rows is None else rows[:, mine].contiguous()),
    )


def _refuse(state: ForwardState) -> None:
    if state.options.block_replace or state.options.attention_override is not None:
        raise InputError(
            "another node replaces blocks or the attention of this model, which needs every token: remove it, or use "
            "cfg alone, without ulysses and ring"
        )
