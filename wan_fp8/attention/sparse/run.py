"""Block-sparse attention of one transformer block in one sampling run: when, with which blocks, and what came of it."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...errors import InputError
from ...hardware import device_caps
from ...registry import Backend
from .guarantee import TRIALS, HeadControl, Measured, Sample, measure, sample
from .order import BLOCK, BlockLayout
from .policies import Asked, policy
from .registry import SPARSE, Selection, SparseRequest, query_rows, register_backends
from .remainder import Remainder, add_
from .selection import BlockStatistics, choose, use_fused
from .setting import Sparsity
from .share import HeadShare


@dataclass(slots=True)
class Call:
    """One sparse attention; the tensors stay on the device until they are reported."""

    step: int
    share: HeadShare
    density: Tensor
    """[N] of its heads."""
    at: Sample
    found: Measured | None
    """None: it was the turn of other ranks' heads."""


@dataclass(slots=True)
class Times:
    """Seconds of attentions, without making the host wait for a GPU."""

    seconds: dict[str, list[float]] = field(default_factory=lambda: {"dense": [], "sparse": []})
    _events: list[tuple[str, Any, Any]] = field(default_factory=list)

    def start(self, device: torch.device) -> Any:
        """Before the work is queued."""
        if device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def stop(self, kind: str, began: Any) -> None:
        """After it is queued."""
        if isinstance(began, float):
            self.seconds[kind].append(time.perf_counter() - began)
            return
        ended = torch.cuda.Event(enable_timing=True)
        ended.record()
        self._events.append((kind, began, ended))

    def read(self) -> dict[str, list[float]]:
        """All of them; waits for the GPU."""
        for kind, began, ended in self._events:
            ended.synchronize()
            self.seconds[kind].append(began.elapsed_time(ended) / 1000)
        self._events.clear()
        return self.seconds


class SparseRun:
    """State of one transformer block under one setting, from ``reset_guard`` to the next."""

    def __init__(self, sparsity: Sparsity, block: int, num_blocks: int) -> None:
        register_backends()
        self.sparsity, self.block, self.num_blocks = sparsity, block, num_blocks
        self.calls: list[Call] = []
        self.times = Times()
        self.answered: Counter[str] = Counter()
        """Calls by the backend that answered them; ``dense`` outside the window."""
        self.control: HeadControl | None = None
        self._kept: dict[tuple[Hashable, tuple[int, ...]], tuple[int, Selection]] = {}
        """Choices that serve several steps: by conditionings and shape; where the caller names no conditionings, by
        place of the call in its step."""
        self._place = (-1, 0)
        self._looks = 0

    def wants(self, step: Any) -> bool:
        """Whether this forward's attention is sparse.

        Raises:
            InputError: there is a window of steps, and the caller did not say which step this is.
        """
        sparsity = self.sparsity
        if not sparsity.allows_block(self.block, self.num_blocks):
            return False
        if step is None:
            if sparsity.needs_step:
                raise InputError(
                    "sparsity is limited to a window of steps, and this forward does not say its step: pass "
                    "ForwardOptions(step=Step(index, total)), or set skip_first and skip_last to 0"
                )
            return True
        return step.index in sparsity.steps(step.total)

    def dense(self, attend: Callable[[], Tensor], device: torch.device) -> Tensor:
        """An attention outside the window, timed: what the sparse ones are compared with."""
        began = self.times.start(device)
        out = attend()
        self.times.stop("dense", began)
        self.answered["dense"] += 1
        return out

    def sparse(
        self,
        q_BSNE: Tensor,
        k_BLNE: Tensor,
        v_BLNE: Tensor,
        step: Any,
        layout: BlockLayout | None,
        share: HeadShare | None = None,
    ) -> Tensor:
        """Choose blocks, attend, look at samples.

        Args:
            layout: Where the tokens lie; None: nothing is known, and each block keeps its own only.
            share: Which of the transformer block's heads these are; None: all of them.
        """
        began = self.times.start(q_BSNE.device)
        share = share or HeadShare.whole(q_BSNE.shape[2])
        backend, selection = self.selected(q_BSNE, k_BLNE, v_BLNE, step, layout, share)
        if self.sparsity.remainder:
            out, lse = backend.run(q_BSNE, k_BLNE, v_BLNE, selection, sums=True)
            fused = use_fused(q_BSNE)
            out = add_(out, lse, q_BSNE, Remainder.of(k_BLNE, v_BLNE, fused), selection, fused)
        else:
            out = backend.run(q_BSNE, k_BLNE, v_BLNE, selection)
        at, found = self._look(share, selection, q_BSNE.device), None
        if at.heads.numel():
            assert self.control is not None
            found = measure(q_BSNE, k_BLNE, v_BLNE, out, selection, at, use_fused(q_BSNE))
            self.control.learn(at, found)
        self.calls.append(Call(0 if step is None else step.index, share, selection.density(), at, found))
        self.times.stop("sparse", began)
        self.answered[backend.name] += 1
        return out

    def selected(
        self,
        q_BSNE: Tensor,
        k_BLNE: Tensor,
        v_BLNE: Tensor,
        step: Any,
        layout: BlockLayout | None,
        share: HeadShare | None = None,
    ) -> tuple[Backend[SparseRequest], Selection]:
        """Who will attend, and to which blocks; as ``sparse``.

        Raises:
            InputError: some of the tokens are missing.
        """
        layout = layout or BlockLayout(k_BLNE.shape[1])
        if layout.num_tokens != k_BLNE.shape[1] or q_BSNE.shape[1] < k_BLNE.shape[1]:
            raise InputError(
                f"sparsity needs all {layout.num_tokens} tokens as queries and as keys; got {q_BSNE.shape[1]} and "
                f"{k_BLNE.shape[1]}: split heads (ulysses), not tokens (ring)"
            )
        backend = self.backend(q_BSNE, k_BLNE)
        share = share or HeadShare.whole(q_BSNE.shape[2])
        index, total, conditionings = (0, 1, ()) if step is None else (step.index, step.total, step.conditionings)
        if self.control is None:
            self.control = HeadControl(q_BSNE.shape[2], self.sparsity.bound, self.sparsity.least, q_BSNE.device)
        selection = self._selection(q_BSNE, k_BLNE, v_BLNE, backend.name, index, total, conditionings, layout, share)
        return backend, selection

    def backend(self, q_BSNE: Tensor, k_BLNE: Tensor) -> Backend[SparseRequest]:
        """Who computes tensors like these."""
        request = SparseRequest(
            device_caps(q_BSNE.device), q_BSNE.dtype, q_BSNE.shape[3], q_BSNE.shape[1], k_BLNE.shape[1]
        )
        return SPARSE.resolve(self.sparsity.backend, request).backend

    def known(self) -> Tensor:
        """[5, N] fp32 of the heads here: the share of the blocks that each kept of late, and the state of its
        control."""
        share = self.calls[-1].share
        late = [call.density for call in self.calls[-2:] if call.share == share]  # both halves of guidance, if apart
        assert self.control is not None
        return torch.cat([torch.stack(late).mean(0, keepdim=True), self.control.table()])

    def learnt_elsewhere(self, known_5N: Tensor) -> None:
        """Go on with other heads, of which this is ``known``."""
        assert self.control is not None
        self.control.replace(known_5N[1:])

    def keeps(self, step: int) -> bool:
        """Whether a choice of an earlier forward still serves this step: the heads must be the same then."""
        return any(0 <= step - chosen < self.sparsity.reuse for chosen, _ in self._kept.values())

    def _look(
        self, share: HeadShare, selection: Selection, device: torch.device, *, every_head: bool = False
    ) -> Sample:
        self._looks += 1
        blocks = -(-selection.num_keys // selection.query_rows)  # not those of padding
        return sample(self._looks, share, blocks, device, every_head=every_head)

    def _selection(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        backend: str,
        step: int,
        total: int,
        conditionings: tuple[Hashable, ...],
        layout: BlockLayout,
        share: HeadShare,
    ) -> Selection:
        """The blocks of this call: chosen now, or in one of the last steps."""
        fused = use_fused(q)
        self._place = (step, self._place[1] + 1 if self._place[0] == step else 0)
        key = (conditionings or self._place[1], tuple(q.shape))
        self._kept = {k: kept for k, kept in self._kept.items() if 0 <= step - kept[0] < self.sparsity.reuse}
        if key in self._kept:
            return self._kept[key][1]
        chooser = Chooser(self, q, k, backend, step, total, layout, share, fused)
        selection = chooser()
        assert self.control is not None
        if not self.calls and self.sparsity.bound is not None:
            rest = Remainder.of(k, v, fused) if self.sparsity.remainder else None
            for _ in range(TRIALS):
                at = self._look(share, selection, q.device, every_head=True)
                self.control.learn(at, measure(q, k, v, None, selection, at, fused, rest))
                selection = chooser()
            self.control.forgive()  # trials move a head; only what was used can make it dense
        if self.sparsity.reuse > 1:
            self._kept[key] = (step, selection)
        return selection


class Chooser:
    """One call's scores, from which blocks are chosen once or, on trial, several times."""

    def __init__(
        self,
        run: SparseRun,
        q: Tensor,
        k: Tensor,
        backend: str,
        step: int,
        total: int,
        layout: BlockLayout,
        share: HeadShare,
        fused: bool,
    ) -> None:
        self.run, self.layout, self.fused = run, layout, fused
        self.num_queries, self.batch = q.shape[1], q.shape[0]
        self.rows = query_rows(backend, device_caps(q.device))
        rows, tokens = self.rows, layout.num_tokens

        def statistics() -> tuple[BlockStatistics, BlockStatistics]:
            return BlockStatistics.of(q, tokens, rows, fused), BlockStatistics.of(k, tokens, BLOCK, fused)

        asked = Asked(
            sparsity=run.sparsity,
            layout=layout,
            statistics=statistics,
            heads=share.heads,
            num_heads=share.total,
            block=run.block,
            step=step,
            total=total,
            query_rows=rows,
            query_blocks=-(-q.shape[1] // rows),
            device=q.device,
        )
        self.choice = policy(run.sparsity.policy)(asked)

    def __call__(self) -> Selection:
        control = self.run.control
        assert control is not None
        scores = self.choice.scores.expand(self.batch, -1, -1, -1)
        amount = control.amount(self.choice.amount)
        return choose(
            scores, amount, control.dense, self.choice.rule, self.layout, self.num_queries, self.rows, self.fused
        )
