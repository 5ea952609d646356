"""What the dropped blocks really held, measured while the run goes on, and how that moves what a head keeps.

In every sparse call a quarter of the heads, by turns, is looked at on 64 queries of one block, by turns as well: over
all keys, in fp32 sums. That is 0.02 % of the products of a dense attention. It gives two numbers: the true softmax mass
of the dropped blocks, and how far the output of the sparse kernel is from the exact one. Before a transformer block is
sparse for the first time in a run, every head is looked at, so that the first sparse step is not a blind one.

Everything stays on the device: the host reads when it reports.

B batch, N heads, n sampled heads, R sampled queries, E head width, M blocks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .order import BLOCK
from .registry import Selection
from .remainder import Remainder, merged
from .share import HeadShare

ROWS = 64
"""Queries looked at in a block of queries: every second one of 128."""
HEADS_EACH = 4
"""One head in so many is looked at in a call."""
TRIALS = 2
"""Rounds of measuring and choosing again before the first use."""
GOLDEN = 0.6180339887498949
"""Steps of this fraction of the sequence visit its blocks evenly."""
AIM = 0.7
"""A head above the bound is sent to this share of it."""
ROOM = 0.5
"""A head whose errors of late all lie below this share of the bound may keep less."""
EASE = 1.1
FADE = 0.9
"""What is left of an error at the head's next look: blocks differ, and one easy block says little."""
STRIKES = 3
"""Measurements above the bound, one after the other, after which a head goes dense for the rest of the run."""


@dataclass(frozen=True, slots=True)
class Sample:
    """Which queries are looked at; all on the device."""

    heads: Tensor
    """[n] int64 places among the heads that are here."""
    query_block: Tensor
    """[n] int64."""


@dataclass(frozen=True, slots=True)
class Measured:
    """What the samples showed, [B, n] fp32 each."""

    dropped: Tensor
    """Softmax mass of the dropped blocks, mean over the queries."""
    worst: Tensor
    """The same of the worst query."""
    error: Tensor
    """Relative L2 distance of the output from the exact one."""


def sample(call: int, share: HeadShare, query_blocks: int, device: torch.device, *, every_head: bool = False) -> Sample:
    """The samples of the ``call``-th look: heads and blocks by turns, whichever rank holds them. A rank that holds none
    of the heads whose turn it is has no samples. The host does not wait."""
    total = share.total
    count = total if every_head else -(-total // HEADS_EACH)
    steps = -(-total // count)
    turn = [min(number * steps + call % steps, total - 1) for number in range(count)]
    heads, numbers = share.among(turn, device)
    place = torch.frac((numbers + 1 + call * total) * GOLDEN)
    return Sample(heads, (place * query_blocks).long().clamp_max_(query_blocks - 1))


def measure(
    q_BSNE: Tensor,
    k_BLNE: Tensor,
    v_BLNE: Tensor,
    out_BSNE: Tensor | None,
    selection: Selection,
    at: Sample,
    fused: bool,
    rest: Remainder | None = None,
) -> Measured:
    """Look at the samples. Without an output the one that an exact kernel would make of the selection is judged, with
    ``rest`` added to it."""
    rows = query_rows_of(at, selection)
    index = at.heads[:, None].expand_as(rows)
    q = q_BSNE[:, rows, index]  # [B, n, R, E]
    kept = kept_blocks(selection, at)
    if fused:
        from ._guarantee_triton import attend

        exact, chosen, dropped, lse = attend(q, k_BLNE, v_BLNE, kept, at.heads)
    else:
        exact, chosen, dropped, lse = _attend(q, k_BLNE, v_BLNE, kept, at.heads)
    if out_BSNE is not None:
        ours = out_BSNE[:, rows, index].to(exact.dtype)
    elif rest is not None:
        some = rest.of_heads(at.heads)
        ours = merged(chosen, lse, q, some.key, some.value, some.log_size, kept[:, :, None])
    else:
        ours = chosen
    error = (ours - exact).flatten(2).norm(dim=2) / exact.flatten(2).norm(dim=2).clamp_min(1e-20)
    error = torch.nan_to_num(error, nan=math.inf, posinf=math.inf)
    return Measured(dropped.mean(2).float(), dropped.amax(2).float(), error.float())


def query_rows_of(at: Sample, selection: Selection) -> Tensor:
    """[n, R] places of the sampled queries; the last block repeats its last query instead of reading padding."""
    step = max(1, selection.query_rows // ROWS)
    rows = at.query_block[:, None] * selection.query_rows + torch.arange(ROWS, device=at.heads.device) * step
    return rows.clamp_max_(min(selection.num_queries, selection.num_keys) - 1)


def kept_blocks(selection: Selection, at: Sample) -> Tensor:
    """[B, n, Mk] bool."""
    every = selection.key_blocks
    counts = selection.counts[:, at.heads, at.query_block]
    blocks = selection.blocks[:, at.heads, at.query_block].long()
    index = torch.where(torch.arange(every, device=blocks.device) < counts[..., None], blocks, every)
    out = torch.zeros(*index.shape[:2], every + 1, dtype=torch.bool, device=index.device)
    return out.scatter_(2, index, True)[..., :every].contiguous()


def _attend(
    q_BnRE: Tensor, k_BLNE: Tensor, v_BLNE: Tensor, kept_BnM: Tensor, heads_n: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Exact output, output over the kept blocks (both [B, n, R, E]), the mass of the others, and the logarithm of the
    sum over the kept ones (both [B, n, R])."""
    dtype = torch.float64 if q_BnRE.dtype == torch.float64 else torch.float32
    k, v = (t[:, :, heads_n].to(dtype).transpose(1, 2) for t in (k_BLNE, v_BLNE))
    scores = q_BnRE.to(dtype) @ k.transpose(2, 3) / math.sqrt(k.shape[-1])
    weights = torch.softmax(scores, dim=-1)
    of_key = kept_BnM.repeat_interleave(BLOCK, 2)[:, :, None, : k.shape[2]]
    kept = weights * of_key
    mass = kept.sum(-1, keepdim=True)
    chosen = torch.where(mass > 0, kept @ v / mass.clamp_min(1e-30), 0.0)
    lse = torch.logsumexp(scores.masked_fill(~of_key, -math.inf), dim=-1)
    return weights @ v, chosen, (weights * ~of_key).sum(-1), lse


class HeadControl:
    """How much each head keeps, and which heads went dense. State of one transformer block in one run."""

    def __init__(self, num_heads: int, bound: float | None, least: float, device: torch.device) -> None:
        self.bound, self.least = bound, least
        self.slack = torch.ones(num_heads, device=device)
        """What a head leaves out is this many times what the policy would leave out."""
        self.level = torch.zeros(num_heads, device=device)
        """Largest error of late."""
        self.strikes = torch.zeros(num_heads, device=device)
        self.dense = torch.zeros(num_heads, dtype=torch.int32, device=device)
        """1: every block is kept for the rest of the run."""

    def amount(self, asked: float | Tensor) -> Tensor:
        """[N] shares that are kept, from the policy's own."""
        if isinstance(asked, float) and asked == 1.0:
            return torch.ones_like(self.slack)
        return (1 - (1 - asked) * self.slack).clamp(min(self.least, 1.0), 1.0)

    def learn(self, at: Sample, found: Measured) -> None:
        """Move the sampled heads; the worst sample of a batch counts."""
        if self.bound is None:
            return
        error = found.error.amax(0)
        level = torch.maximum(error, FADE * self.level[at.heads]).clamp_max_(1e3)
        over = error > self.bound
        aim = (AIM * self.bound / error.clamp_min(1e-9)).clamp(0.2, 1.0)
        # where nothing was dropped, that nothing is wrong does not say that something could be
        ease = (level < ROOM * self.bound) & (found.dropped.amax(0) > 0)
        factor = torch.where(over, aim, torch.where(ease, EASE, 1.0))
        self.level.index_copy_(0, at.heads, level)
        strikes = torch.where(over, self.strikes[at.heads] + 1, 0.0)
        self.slack.index_copy_(0, at.heads, (self.slack[at.heads] * factor).clamp_max_(10.0))
        self.strikes.index_copy_(0, at.heads, strikes)
        dense = torch.maximum(self.dense[at.heads], (strikes >= STRIKES).int())
        self.dense.index_copy_(0, at.heads, dense)

    def table(self) -> Tensor:
        """[4, N] fp32: all that is known of each head."""
        return torch.stack([self.slack, self.level, self.strikes, self.dense.float()])

    def replace(self, table_4N: Tensor) -> None:
        """Go on with other heads, of which this is known (see ``table``)."""
        self.slack, self.level, self.strikes = table_4N[:3].clone().unbind(0)
        self.dense = table_4N[3].to(torch.int32)

    def forgive(self) -> None:
        """Forget what was found of choices that were never used."""
        for state in (self.level, self.strikes, self.dense):
            state.zero_()
