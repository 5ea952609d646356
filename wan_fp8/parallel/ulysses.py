"""Sequence parallelism: each rank runs the blocks on its part of the tokens.

Norms, linears, cross-attention and FFN need no other token. Self-attention trades tokens for heads with one all-to-all
for each of q, k and v and one back (Ulysses, arXiv:2309.14509), and where ranks are left over gathers keys and values
along the ring (``ring``). Values travel while keys are projected, keys while queries are; compiled blocks are one graph
up to there, and send all three at once. The token axis is padded once, by the model; the padding lies at the end of the
global order and enters no softmax.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..attention import Attention, AttentionCore, Step
from ..attention.partial import part_of
from ..attention.sparse.share import HeadShare, index_on
from ..compile import run_plainly
from ..errors import InputError
from ..kernels.parts import cut
from ..models.blocks import ForwardOptions, ForwardState, Modulation
from ..models.wan import StackFunction, WanModel
from ..quant.linear import Quantization
from .balance import HeadBalance
from .dims import Groups
from .exchange import HeadExchange, Traffic, gather
from .ring import attend_around, whole_keys

NAME = "sequence_parallel"
"""Of the wrapper in ``WanModel.stack_wrappers``."""


class SequenceParallel:
    """Splits the tokens before the first block and gathers them after the last: caches around it see all of them, and
    decide on every rank as they would on one."""

    keeps_input = False
    innermost = True

    def __init__(self, model: WanModel, groups: Groups, traffic: Traffic) -> None:
        self.model, self.groups, self.traffic = model, groups, traffic
        self.exchange = HeadExchange(groups.ulysses, traffic)
        self.sent_ahead = False
        """Whether the forward that is running does so."""
        self.fused = False
        """Whether its blocks run the Triton kernels."""
        self.overlap = True
        """Send each of q, k and v as soon as it is made."""
        self.balance = HeadBalance(self._cores, groups.ulysses)
        self.num_tokens = 0
        """Tokens of all ranks in the forward that is running, without padding."""

    def begin_run(self) -> None:
        """A sampling run starts with the next forward."""
        self.balance.reset()

    def _cores(self) -> list[ParallelCore]:
        found = (block.get_submodule("self_attn.inner_attention") for block in self.model.blocks)
        return [core for core in found if isinstance(core, ParallelCore) and isinstance(core.core, AttentionCore)]

    def __call__(self, tokens_BSD: Tensor, state: ForwardState, inner: StackFunction) -> Tensor:
        """[B, S, D] -> [B, S, D], padding included."""
        _refuse(state)
        share = tokens_BSD.shape[1] // self.groups.dims.sequence
        assert share * self.groups.dims.sequence == tokens_BSD.shape[1], "the model pads to equal parts"
        first = self.groups.sequence_rank * share
        mine = slice(first, first + share)
        self.num_tokens = state.num_tokens
        if state.order is not None and self.groups.dims.ulysses > 1:
            self._balance(state.options)
        quantization = self.model.quantization
        if isinstance(quantization, Quantization):
            quantization.padded(share, min(max(state.num_tokens - first, 0), share))
        part = _part(state, mine)
        if self.groups.dims.ulysses > 1 and self.overlap and state.run is run_plainly:
            part.exchange = self.exchange
        self.sent_ahead = part.exchange is not None
        self.fused = state.fused
        out, sent = gather(inner(tokens_BSD[:, mine].contiguous(), part), self.groups.sequence, 1)
        self.traffic.stream += sent
        return out

    def _balance(self, options: ForwardOptions) -> None:
        cores, step = self._cores(), options.attention_step
        setting = options.attention or (cores[0].attention.setting if cores else None)
        if setting is not None and setting.sparsity is not None:
            self.balance.update(setting.sparsity, 0 if step is None else step.index)


class ParallelCore(nn.Module):
    """Self-attention of a block over all ranks' tokens; the wrapped core attends, with its own backend and guard."""

    def __init__(self, core: nn.Module, split: SequenceParallel) -> None:
        super().__init__()
        self.core = core
        self.split = split
        self.arrange(None)

    @property
    def attention(self) -> AttentionCore:
        """The wrapped core, where it is this engine's own."""
        assert isinstance(self.core, AttentionCore)
        return self.core

    def arrange(self, order: Sequence[int] | None, device: torch.device | None = None) -> None:
        """Have equal parts of ``order`` (all heads, by number) on the ranks; None: as they are."""
        ranks, rank = self.split.groups.dims.ulysses, self.split.groups.ulysses.rank()
        self.order = tuple(range(self.split.model.spec.num_heads) if order is None else order)
        self.share = HeadShare.part(self.order, rank, ranks)
        self.heads: Tensor | None = None
        """[N] int64 ``order``."""
        if order is not None:
            assert device is not None
            self.heads = index_on(self.order, device)
        if isinstance(self.core, AttentionCore):
            self.core.share = self.share

    def forward(
        self, q_BCNE: Tensor, k_BCNE: Tensor, v_BCNE: Tensor, setting: Attention | None = None, step: Step | None = None
    ) -> Tensor:
        """[B, C, N, E] of this rank's tokens, as the unwrapped core would answer for them."""
        groups, traffic = self.split.groups, self.split.traffic
        q, k, v = q_BCNE, k_BCNE, v_BCNE
        if groups.dims.ulysses > 1:
            exchange, width = self.split.exchange, q.shape[-1]
            fused = self.split.fused
            if not self.split.sent_ahead:
                v, k, q = (
                    exchange.send(x.unflatten(-1, (-1, width)))
                    for x in (
                        cut(y.flatten(2), exchange.ranks, self.heads, head_dim=width, fused=fused) for y in (v, k, q)
                    )
                )
            exchange.wait()
        count = self.split.num_tokens
        if groups.dims.merge:
            assert isinstance(self.core, AttentionCore)
            part = part_of(self.core, q, k, setting)
            out, sent = attend_around(functools.partial(part, q), k, v, count, groups.ring)
            traffic.keys += sent
        else:
            if groups.dims.ring > 1:
                k, v, sent = whole_keys(k, v, groups.ring)
                traffic.keys += sent
            out = self.core(q, k[:, :count], v[:, :count], setting, step)
        if groups.dims.ulysses > 1:
            out = self.split.exchange.back(out, self.heads, fused=self.split.fused)
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
