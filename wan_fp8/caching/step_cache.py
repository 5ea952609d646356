"""How a pass is skipped: the residual of all blocks is kept, and added in their place.

One ``StepCache`` wraps the blocks of one model (``WanModel.stack_wrappers``). A skipped pass runs no block and reads no
weight of one; patch and time embedding and the head run with the current step. What is kept of a conditioning is one
activation in the compute type: a copy of the blocks' input becomes, in place, their residual. It is used only while it
is of the last step that the policy had computed, so a conditioning that comes, goes or changes shape is computed.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..errors import InputError
from ..models.blocks import ForwardState, Modulation, TextContext
from ..models.passes import RunPosition
from ..models.specs import ModelSpec
from ..models.wan import StackFunction, WanModel
from .policy import Decision, Policy, RunPlan, Tracker
from .report import CacheReport

NAME = "step_cache"
"""Of the wrapper in ``WanModel.stack_wrappers``."""

Model = TypeVar("Model", bound=WanModel)


@dataclass(slots=True)
class _Kept:
    """Residuals of one conditioning, the latest first."""

    kind: int
    steps: list[int]
    sigmas: list[float]
    residuals: list[Tensor]


@dataclass(frozen=True, slots=True)
class _Part:
    """One conditioning of the forward that is running."""

    key: Hashable
    kind: int
    rows: slice


class StepCache:
    """Skips passes as a policy says. One for each model; ``begin_run`` between videos."""

    keeps_input = False
    """The blocks may write over their input."""

    def __init__(self, policy: Policy, spec: ModelSpec) -> None:
        self.policy, self.spec = policy, spec
        self.begin_run()

    def begin_run(self) -> None:
        """Forget the last run: residuals, decisions and counts."""
        self.report = CacheReport(self.policy)
        self._plan: RunPlan | None = None
        self._tracker: Tracker | None = None
        self._step = -1
        self._kinds: frozenset[int] = frozenset()
        self._forget_residuals()
        self._clock = _Stopwatch(self.report)

    def for_model(self, model: WanModel) -> StepCache:
        """A fresh one with the same policy, for another model."""
        return StepCache(self.policy, model.spec)

    def release(self) -> None:
        """Free the residuals: this model's part of the run is over, and another one's goes on. The report stays."""
        self._forget_residuals()

    def finish(self) -> CacheReport:
        """What became of the run so far, times included."""
        self._clock.read()
        return self.report

    @property
    def expert(self) -> str | None:
        """Which expert ran, as far as the caller or the policy's curve can tell."""
        if self._plan is None or self._tracker is None:
            return None
        return self._plan.expert or self._tracker.expert

    def bytes(self) -> int:
        """Memory of the residuals that are kept now."""
        storages = {
            r.untyped_storage().data_ptr(): r.untyped_storage().nbytes()
            for kept in self._kept.values()
            for r in kept.residuals
        }
        return sum(storages.values())

    def __call__(self, tokens_BSD: Tensor, state: ForwardState, inner: StackFunction) -> Tensor:
        """The residual stream after the last block, or what stands in for it."""
        position = state.options.position
        if position is None:
            raise InputError(
                f"{self.policy.name} needs to know the step and the conditionings of a forward: pass "
                "ForwardOptions(position=RunPosition(...)), or remove the cache"
            )
        self._enter(position, state)
        parts = self._parts(tokens_BSD, state, position)
        decisions = [self._decide(part, tokens_BSD[part.rows]) for part in parts]
        skip = [decision.skip for decision in decisions]
        if any(skip) and not all(skip) and not _separable(state):
            decisions = [Decision(False, refused=d.skip or d.refused, outside=d.outside) for d in decisions]
            skip = [False] * len(parts)
        for part, decision in zip(parts, decisions, strict=True):
            self.report.add(self._step, part.kind, decision)
        if not any(skip):
            return self._compute(tokens_BSD, state, inner, parts, position.sigma)
        out = tokens_BSD if state.owned else tokens_BSD.clone()
        if not all(skip):
            self._compute_some(out, state, inner, [p for p, s in zip(parts, skip, strict=True) if not s], position)
        for part, decision, skipped in zip(parts, decisions, skip, strict=True):
            if skipped:
                self._reuse(out[part.rows, : state.num_tokens], self._kept[part.key], decision, position.sigma)
        self.report.most_bytes = max(self.report.most_bytes, self.bytes())
        return out

    # ---- where we are ------------------------------------------------------------------------------------------------

    def _enter(self, position: RunPosition, state: ForwardState) -> None:
        """A new run, a solver that goes back, or simply the next step."""
        first, end = position.share or (0, len(position.schedule) - 1)
        plan = RunPlan(
            spec=self.spec,
            schedule=position.schedule,
            first=first,
            end=end,
            expert=position.expert,
            per_frame=state.modulation.row_of_token is not None,
        )
        step = position.step
        if plan != self._plan:
            reason = self.policy.refusal(plan)
            if reason is not None:
                raise InputError(reason)
            self.begin_run()
            self._plan, self._tracker = plan, self.policy.start(plan)
        elif step < self._step:
            self._forget_residuals()
            self._tracker = self.policy.start(plan)
        self._step = step

    def _forget_residuals(self) -> None:
        self._kept: dict[Hashable, _Kept] = {}
        self._computed: dict[int, list[int]] = {}
        """By kind: the last steps that the policy had computed, the latest first."""

    def _parts(self, tokens_BSD: Tensor, state: ForwardState, position: RunPosition) -> list[_Part]:
        batch, count = tokens_BSD.shape[0], len(position.conditionings)
        if count == 0 or batch % count:
            raise InputError(f"a batch of {batch} cannot be shared by {count} conditionings in equal parts")
        each = batch // count
        options = state.options
        # what else makes two passes of one step differ: their size, and blocks that a host replaces in one of them
        others = (each, state.num_tokens, tuple(sorted(options.block_replace)), options.attention_override is not None)
        parts = [
            _Part((conditioning.key, *others), conditioning.kind, slice(index * each, (index + 1) * each))
            for index, conditioning in enumerate(position.conditionings)
        ]
        if len({part.key for part in parts}) < count:
            raise InputError(f"the {count} conditionings of one batch need {count} different keys")
        self._kinds |= {min(kind, 1) for kind in (*(part.kind for part in parts), *position.elsewhere)}
        return parts

    # ---- decisions ---------------------------------------------------------------------------------------------------

    def _decide(self, part: _Part, tokens_BSD: Tensor) -> Decision:
        assert self._tracker is not None
        decision = self._tracker.decide(self._step, min(part.kind, 1), part.key, tokens_BSD, self._kinds)
        steps = self._computed.setdefault(part.kind, [])
        if not decision.skip:
            if not steps or steps[0] != self._step:
                self._computed[part.kind] = steps = [self._step, *steps[: self.policy.depth - 1]]
            self._drop(part.kind, steps[-1])
            return decision
        kept = self._kept.get(part.key)
        if kept is not None and steps and kept.steps[0] >= steps[0]:
            return decision
        return Decision(False, refused=True)

    def _drop(self, kind: int, oldest: int) -> None:
        """Free the residuals that no later step can use, before the next ones are made."""
        depth = self.policy.depth
        for key, kept in list(self._kept.items()):
            if kept.kind == kind and kept.steps[0] < (self._step if depth == 1 else oldest):
                del self._kept[key]

    # ---- arithmetic --------------------------------------------------------------------------------------------------

    def _compute(
        self, tokens_BSD: Tensor, state: ForwardState, inner: StackFunction, parts: Sequence[_Part], sigma: float
    ) -> Tensor:
        count = state.num_tokens
        for part in parts:
            self._make_room(part)
        before = tokens_BSD[:, :count].to(state.compute_dtype, copy=True)
        with self._clock(tokens_BSD.device, len(parts)):
            out = inner(tokens_BSD, state)
        after = out[:, :count]
        assert self._tracker is not None
        for part in parts:
            self._tracker.computed(self._step, min(part.kind, 1), part.key, before[part.rows], after[part.rows])
        torch.sub(after, before, out=before)
        for part in parts:
            self._keep(part, before[part.rows], sigma)
        self.report.most_bytes = max(self.report.most_bytes, self.bytes())
        return out

    def _compute_some(
        self,
        out_BSD: Tensor,
        state: ForwardState,
        inner: StackFunction,
        parts: Sequence[_Part],
        position: RunPosition,
    ) -> None:
        """Run the blocks for these parts of the batch only, and write what comes out over ``out``."""
        for part in parts:
            alone = _Part(part.key, part.kind, slice(None))
            its_own = position.conditionings[part.rows.start // (part.rows.stop - part.rows.start)]
            narrowed = _narrowed(state, part.rows, dataclasses.replace(position, conditionings=(its_own,)))
            fresh = self._compute(out_BSD[part.rows].clone(), narrowed, inner, [alone], position.sigma)
            out_BSD[part.rows] = fresh

    def _make_room(self, part: _Part) -> None:
        """Of what is kept, free the one that the residual of this pass takes the place of, before it is made: the
        oldest, or that of an earlier evaluation of the same step."""
        kept = self._kept.get(part.key)
        if kept is None:
            return
        stay = slice(1, None) if kept.steps[0] == self._step else slice(0, self.policy.depth - 1)
        kept.steps, kept.sigmas, kept.residuals = kept.steps[stay], kept.sigmas[stay], kept.residuals[stay]
        if not kept.steps:
            del self._kept[part.key]

    def _keep(self, part: _Part, residual: Tensor, sigma: float) -> None:
        kept = self._kept.setdefault(part.key, _Kept(part.kind, [], [], []))
        kept.steps.insert(0, self._step)
        kept.sigmas.insert(0, sigma)
        kept.residuals.insert(0, residual)

    def _reuse(self, tokens_BSD: Tensor, kept: _Kept, decision: Decision, sigma: float) -> None:
        """Add what stands in for the blocks, in place."""
        latest = kept.residuals[0]
        if self.policy.reuse == "linear" and len(kept.residuals) == 2 and kept.sigmas[0] != kept.sigmas[1]:
            ahead = (sigma - kept.sigmas[0]) / (kept.sigmas[0] - kept.sigmas[1])
            tokens_BSD.add_(latest, alpha=1 + ahead).sub_(kept.residuals[1], alpha=ahead)
        else:
            tokens_BSD.add_(latest, alpha=decision.scale if self.policy.reuse == "scale" else 1.0)


class _Stopwatch:
    """Seconds of computed passes, without making the host wait for a GPU."""

    def __init__(self, report: CacheReport) -> None:
        self._report = report
        self._events: list[tuple[int, Any, Any]] = []

    @contextmanager
    def __call__(self, device: torch.device, passes: int) -> Iterator[None]:
        """Around the blocks of ``passes`` passes in one batch."""
        if device.type != "cuda":
            began = time.perf_counter()
            yield
            self._add(passes, time.perf_counter() - began)
            return
        began_at, ended_at = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began_at.record()
        yield
        ended_at.record()
        self._events.append((passes, began_at, ended_at))

    def read(self) -> None:
        """Enter what the GPU has measured; waits for it."""
        for passes, began, ended in self._events:
            ended.synchronize()
            self._add(passes, began.elapsed_time(ended) / 1000)
        self._events.clear()

    def _add(self, passes: int, seconds: float) -> None:
        self._report.times += [seconds / passes] * passes


def _separable(state: ForwardState) -> bool:
    """Whether part of a batch can run by itself: not where a host or a task holds things for the whole batch."""
    options = state.options
    return not (state.task or options.block_replace or options.attention_override is not None)


def _narrowed(state: ForwardState, rows: slice, position: RunPosition) -> ForwardState:
    """The state of a forward for some of its samples, whose conditionings ``position`` names."""
    given = state.modulation
    if given.row_of_token is None:
        modulation = Modulation(given.rows[rows], None)
    else:
        modulation = Modulation(given.rows, given.row_of_token[rows])
    return dataclasses.replace(
        state,
        modulation=modulation,
        context=_PartOfText(state.context, rows),
        options=dataclasses.replace(state.options, position=position),
        owned=True,
    )


class _PartOfText(TextContext):
    """The prompts of some samples; keys and values come from what is kept for the whole batch."""

    def __init__(self, whole: TextContext, rows: slice) -> None:
        self._whole, self._rows, self.image_tokens = whole, rows, whole.image_tokens

    @property
    def tokens_BLD(self) -> Tensor:
        return self._whole.tokens_BLD[self._rows]

    def keys_values(self, index: int, compute: Callable[[Tensor], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        kept = self._whole.keys_values(index, compute)
        return tuple(tensor[self._rows] for tensor in kept)


# ---- on a model ------------------------------------------------------------------------------------------------------


def apply_cache(model: Model, policy: Policy | None) -> Model:
    """Skip passes as ``policy`` says; None removes the cache. Returns the model.

    Forwards must then say where they are: ``ForwardOptions(position=RunPosition(...))``. Call ``model.begin_run()``
    between videos.
    """
    model.stack_wrappers.pop(NAME, None)
    if policy is not None:
        model.stack_wrappers[NAME] = StepCache(policy, model.spec)
    return model


def cache_of(model: WanModel) -> StepCache | None:
    """The cache at work in ``model``."""
    found = model.stack_wrappers.get(NAME)
    return found if isinstance(found, StepCache) else None
