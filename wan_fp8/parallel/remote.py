"""A model whose forward runs in a pool: called like any other, with the same tensors and options.

It has the modules and names of the real one and no weights. What it is asked for goes over the wire as plain data; what
cannot (functions of a host) is refused by name. Where the pool's workers read the weights is the caller's to say.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import statistics
import time
import uuid
import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..attention.core import Attention, attention_cores
from ..attention.guard import Verdict
from ..caching import Recording, StepCache
from ..checkpoint.lora import Entry
from ..errors import InputError, UnsupportedPatchError
from ..models.blocks import ForwardOptions
from ..models.low_rank import LiveLora
from ..models.specs import ModelSpec, Task
from ..models.wan import WanModel, class_of
from ..quant import Recipe
from . import changes, plain, pools
from .dims import ParallelDims
from .needs import TextNeeds, VAENeeds
from .parts import MAX_PART, PART_BYTES, hand_over
from .plan import (
    Machine,
    Plan,
    TextPlace,
    Workload,
    activation_bytes,
    fitting,
    lacking_bytes,
    least_sent,
    measured_tflops,
    place_text,
    plan,
    weight_bytes,
)
from .source import HandedSource, ModelSource
from .wire import Json

log = logging.getLogger("wan_fp8")

USUAL_TOKENS = 75_600
USUAL_FRAMES = 21
"""1280x720, 81 frames, and latent ones: what a layout is chosen for before a run is known."""
NVLINK_FROM = 60.0
"""GB/s between GPUs above which their link is no PCIe."""
MAX_NAMES = 4096
"""Names of prompts and conditionings of one run."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Topology:
    """How a forward is laid out over the ranks, as far as the user chose; None is for the planner."""

    cfg: int | None = None
    ulysses: int | None = None
    ring: int | None = None
    weights: str = "auto"
    """``auto``, ``replicate``, ``shard``."""
    experts: int = 1
    """Models that stay in the pool together."""
    text: TextNeeds | None = None
    """The text encoder that shares the pool with them."""
    vae: VAENeeds | None = None

    def plan(
        self, spec: ModelSpec, machine: Machine, tokens: int, *, fp8: bool, guidance: bool, frames: int = USUAL_FRAMES
    ) -> tuple[ParallelDims, Plan | None]:
        """The layout, and the plan that it came from where nothing was chosen.

        Raises:
            InputError: what was chosen is no layout, or something cannot fit the GPUs.
        """
        work = Workload(
            spec=spec,
            tokens=tokens,
            experts=self.experts,
            fp8=fp8,
            guidance=guidance,
            frames=frames,
            text=self.text,
            vae=self.vae,
        )
        inside = machine.gpus_per_host or machine.gpus  # over hosts, weights are whole in each
        given = (self.cfg, self.ulysses, self.ring)
        if given == (None, None, None):
            if self.weights == "auto":
                made = plan(machine, work)
                return made.dims, made
            dims = least_sent(machine, work)
            return self._with_shard(dims, work, machine, 1 if self.weights == "replicate" else inside), None
        dims = ParallelDims(cfg=self.cfg or 1, ulysses=self.ulysses or 1, ring=self.ring or 1)
        if dims.world != machine.gpus:
            raise InputError(
                f"cfg {dims.cfg} x ulysses {dims.ulysses} x ring {dims.ring} takes {dims.world} GPUs and the pool has "
                f"{machine.gpus}: choose numbers whose product is {machine.gpus}, or 'auto'"
            )
        dims.check(spec)
        if self.weights == "auto":
            return dataclasses.replace(dims, shard=fitting(dims, work, machine)[0]), None
        return self._with_shard(dims, work, machine, 1 if self.weights == "replicate" else inside), None

    def _with_shard(self, dims: ParallelDims, work: Workload, machine: Machine, shard: int) -> ParallelDims:
        """What was asked for, unless one model by itself does not fit with it: of several, one may wait outside."""
        dims = dataclasses.replace(dims, shard=shard)
        one = dataclasses.replace(work, experts=1, text=None, vae=None)
        lacking = lacking_bytes(dims, one, machine)
        if lacking > 0:
            raise InputError(
                f"weights '{self.weights}' with {dims} lacks {lacking / 2**30:.1f} GiB on each GPU of "
                f"{machine.memory_gib:g} GiB for one {work.spec.task} model and this video: choose weights "
                + ("'auto' or 'shard'" if shard == 1 else "'auto'")
                + ", an FP8 recipe, more GPUs, or a smaller video"
            )
        return dims

    def text_place(self, spec: ModelSpec, machine: Machine, dims: ParallelDims, *, fp8: bool) -> TextPlace | None:
        """Where the text encoder lies in a layout; None without one."""
        work = Workload(spec=spec, tokens=USUAL_TOKENS, experts=self.experts, fp8=fp8, text=self.text, vae=self.vae)
        return place_text(dims, work, machine)


@dataclass(slots=True)
class Names:
    """Small numbers for hashable names, the same for equal ones."""

    _known: dict[Hashable, int] = field(default_factory=dict)
    _next: int = 0

    def of(self, name: Hashable) -> int:
        if name not in self._known:
            if len(self._known) >= MAX_NAMES:
                self._known.clear()  # numbers are never used again: what was kept under the old ones is not found
            self._known[name] = self._next = self._next + 1
        return self._known[name]


@dataclass(frozen=True, slots=True)
class ToldReport:
    """What a worker reported of a run, in its own words."""

    told: Json
    said: list[str]
    as_asked: bool

    def facts(self) -> Json:
        """For a receipt, as JSON has it."""
        return self.told

    def lines(self) -> list[str]:
        """The same in sentences."""
        return self.said


class Remote:
    """One model in a pool: where it comes from, what it is made into, and whether it is there already."""

    def __init__(
        self,
        spec: ModelSpec,
        source: ModelSource | HandedSource,
        pool: pools.PoolSpec,
        topology: Topology,
        recipe: Recipe | None = None,
        scales: str | None = None,
        state: Callable[[], Mapping[str, Tensor]] | None = None,
    ) -> None:
        """
        Args:
            scales: File of activation scales for the recipe.
            state: The weights of a ``HandedSource`` under official names, before any recipe.
        """
        self.scales, self.state = scales, state
        self.spec, self.source, self.pool_spec, self.topology = spec, source, pool, topology
        self.recipe = recipe or Recipe("none")
        self.name = uuid.uuid4().hex
        self.poll: Callable[[], None] = _nothing
        self.say: Callable[[str], None] = log.info
        self.changes: changes.Changes = {}
        self.merged = ""
        """Name of ``changes``: others have another one."""
        self.swaps = False
        """Whether ``changes`` are others in the middle of a run (LoRAs on one prompt, or scheduled ones)."""
        self.dims: ParallelDims | None = None
        self._names = Names()
        self._dirty = False
        self._sent: set[int] = set()
        """Names of task inputs that the pool keeps."""
        self._seconds: list[float] = []
        self._memory: list[int] = []
        self._pool: pools.Pool | None = None

    def with_recipe(self, recipe: Recipe, scales: str | None = None) -> Remote:
        """The same checkpoint under another recipe: another model of the pool."""
        return Remote(self.spec, self.source, self.pool_spec, self.topology, recipe, scales, self.state)

    def pool(self) -> pools.Pool:
        """The pool, started if need be."""
        pool = pools.ensure(self.pool_spec, user=self, poll=self.poll)
        if pool is not self._pool:
            self._pool = pool
            self._sent.clear()
            weakref.finalize(self, pool.garbage.append, self.name)
        return pool

    def machine(self, pool: pools.Pool) -> Machine:
        """What the planner knows of the pool."""
        ready = pool.connection.ready or {}
        memory, link = ready.get("memory") or 0, ready.get("link_gbs")
        fp8 = not self.recipe.is_none and self.recipe.backend != "weight-only"
        return Machine(
            gpus=pool.world,
            memory_gib=memory / 2**30 if memory else 1024.0,  # a CPU's is not planned with
            link="nvlink" if link is None or link > NVLINK_FROM else "pcie",
            link_gbs=link,
            gpus_per_host=ready.get("per_host"),
            tflops=measured_tflops(ready.get("gpu", ""), fp8=fp8),
        )

    def layout(
        self, pool: pools.Pool, tokens: int = USUAL_TOKENS, guidance: bool = True, frames: int = USUAL_FRAMES
    ) -> tuple[ParallelDims, Plan | None]:
        """How this model is laid out there.

        Raises:
            InputError: what was chosen is no layout, or something cannot fit the GPUs.
        """
        fp8 = not self.recipe.is_none
        return self.topology.plan(self.spec, self.machine(pool), tokens, fp8=fp8, guidance=guidance, frames=frames)

    def text_place(self, pool: pools.Pool, dims: ParallelDims) -> TextPlace | None:
        """Where the text encoder of ``topology`` lies in a layout; None without one."""
        return self.topology.text_place(self.spec, self.machine(pool), dims, fp8=not self.recipe.is_none)

    # ---- requests ----------------------------------------------------------------------------------------------------

    def forward(
        self,
        tensors: dict[str, Tensor],
        task: dict[str, Tensor],
        options: ForwardOptions,
        *,
        compute: torch.dtype,
        policy: Any,
        tokens: int,
        record: bool = False,
    ) -> tuple[list[Json], Tensor]:
        """Run one forward in the pool, which gets everything first that it has not got yet.

        Args:
            task: Faces, sounds, poses: sent once in a run where ``options.inputs_key`` names them.
            record: Measure the magnitudes of this run; what every rank measured is in its ``recorded``.
        """
        pool = self.pool()
        pool.connection.notice = self.say
        sparse = options.attention is not None and options.attention.sparsity is not None
        guidance, frames = tensors["x"].shape[0] % 2 == 0, tensors["x"].shape[2]
        self._load(pool, tokens, guidance=guidance, frames=frames, sparse=sparse)
        lora = None if options.lora is None else self._lora(pool, options.lora)
        position = options.position
        if position is not None:
            parts = tuple(dataclasses.replace(p, key=self._names.of(p.key)) for p in position.conditionings)
            options = dataclasses.replace(options, position=dataclasses.replace(position, conditionings=parts))
        inputs = None if options.inputs_key is None else self._names.of(options.inputs_key)
        keep = inputs is not None and (inputs in self._sent or len(self._sent) < MAX_INPUTS)
        fields = {
            "model": self.name,
            "options": plain.option_fields(options),
            "text_key": None if options.text_key is None else self._names.of(options.text_key),
            "inputs_key": inputs,
            "keep": keep,
            "lora": lora,
            "cache": plain.to_plain(policy),
            "record": record,
            "compute": plain.to_plain(compute),
            "room": self._room(tokens, guidance=guidance),
        }
        self._dirty = True
        began = time.perf_counter()
        sent = tensors if inputs in self._sent else tensors | task
        found, out = pool.connection.request("forward", fields, sent, poll=self.poll)
        if keep and inputs is not None and task:
            self._sent.add(inputs)
        self._seconds.append(time.perf_counter() - began)
        self._memory = [entry["memory"] for entry in found]
        return found, out["velocity"]

    def begin_run(self) -> None:
        """The pool forgets what belongs to one run; it is not waited for."""
        self._sent.clear()
        self._seconds.clear()
        if self._dirty and self._pool is not None and self._pool.alive:
            self._dirty = False
            recent = [number for _, number in list(self._pool.loras.values())[-MAX_LORAS:]]
            kept = [(key, entry) for key, entry in self._pool.loras.items() if entry[1] in recent]
            self._pool.loras = OrderedDict(kept)
            self._pool.connection.post("begin_run", {"models": [self.name], "loras": recent})

    def sparse_reports(self) -> list[ToldReport]:
        """What sparse attention did in the run that ends, on the heads of all ranks."""
        pool = self._pool
        if not self._dirty or pool is None or not pool.alive or self.name not in pool.loaded:
            return []
        found, _ = pool.connection.request("sparse", {"model": self.name}, poll=self.poll)
        return [ToldReport(entry["facts"], entry["lines"], entry["as_asked"]) for entry in found[0]["reports"]]

    def status_line(self) -> str | None:
        """How the pool did since the run began: layout, memory of every rank, seconds of a forward; None if it did
        nothing."""
        if not self._seconds or self._pool is None:
            return None
        places = [entry["device"] for entry in self._pool.connection.ranks] or ["?"] * len(self._memory)
        memory = ", ".join(
            place + (f" {count / 2**30:.1f} GiB" if count else "")
            for place, count in zip(places, self._memory, strict=False)
        )
        middle = statistics.median(self._seconds)
        return f"pool: {self.dims}; {memory}; {middle:.3g} s a forward ({len(self._seconds)} of them)"

    @property
    def ranks(self) -> int | None:
        """GPUs of the pool, or its processes on a CPU; None before it was needed."""
        return None if self._pool is None else self._pool.world

    @property
    def memory_used(self) -> int:
        """Bytes on the fullest GPU of the pool after the last forward; 0: not known, as on a CPU."""
        return max(self._memory, default=0)

    def drop(self) -> None:
        """The pool frees this model's memory; the next forward loads it again."""
        if self._pool is not None and self._pool.alive and self._pool.loaded.pop(self.name, None) is not None:
            self._pool.connection.post("drop", {"models": [self.name]})

    def _load(self, pool: pools.Pool, tokens: int, *, guidance: bool, frames: int, sparse: bool) -> None:
        there = pool.loaded.get(self.name)
        if there is not None:
            self._check_swaps()
            if not self._dirty and self.dims is not None and self.dims.shard == 1:
                # between runs only: a cache would lose what it keeps
                self._lay_out(pool, tokens, guidance=guidance, frames=frames)
        if there == self.merged:
            self._check_sparse(sparse)
            return
        if there is None or self.dims is None or self.dims.shard > 1:
            self._sent.clear()
            if there is not None:
                pool.connection.request("drop", {"models": [self.name]}, poll=self.poll)
                pool.loaded.pop(self.name, None)
            self.dims, made = self.layout(pool, tokens, guidance, frames)
            self._check_sparse(sparse)  # before minutes of reading
            self._check_swaps()
            self.say(f"{self.source.label}: {self.dims}" if made is None else f"{self.source.label}: {made}")
            work = Workload(spec=self.spec, tokens=tokens, fp8=not self.recipe.is_none)
            listed, tensors = self._first_changes()
            fields: Json = {
                "model": self.name,
                "changes": listed,
                "merged": self.merged if listed or not self.changes else "",
                "source": plain.to_plain(self.source),
                "recipe": plain.to_plain(self.recipe),
                "scales": self.scales,
                "dims": plain.to_plain(self.dims),
                "bytes": weight_bytes(work, self.dims.shard),
            }
            if self.state is not None:
                hand_over(pool, self.state(), self.source.label, self.say, self.poll)
            pool.connection.request("load", fields, tensors, poll=self.poll)
            there = fields["merged"]
            pool.loaded[self.name] = there
        if there != self.merged:
            self._merge(pool)
        pool.loaded[self.name] = self.merged

    def _merge(self, pool: pools.Pool) -> None:
        """Merge ``changes`` in place of what is merged there, some parameters at a time."""
        pool.loaded[self.name] = HALF_MERGED
        part: dict[str, list[tuple[Entry, float]]] = {}
        more, waiting = False, list(self.changes.items())
        while waiting or not more:
            part.clear()
            size = 0
            while waiting and size < PART_BYTES and len(part) < MAX_PART:
                name, entries = waiting.pop()
                part[name] = entries
                size += sum(changes.entry_bytes(entry) for entry, _ in entries)
            listed, tensors = changes.to_plain(part)
            fields: Json = {"model": self.name, "changes": listed, "merged": self.merged, "more": more}
            fields["mid_run"] = self.swaps and self._dirty
            pool.connection.request("merge", fields, tensors, poll=self.poll)
            more = True

    def _first_changes(self) -> tuple[Json, dict[str, Tensor]]:
        """What goes along with a model that is loaded: all changes where its weights are sharded, which take none
        later, or where they are small.

        Raises:
            InputError: too much for sharded weights.
        """
        assert self.dims is not None
        size = sum(changes.entry_bytes(entry) for entries in self.changes.values() for entry, _ in entries)
        if self.dims.shard > 1 and size > MOST_AT_ONCE:
            raise InputError(
                f"the changes of this MODEL's weights take {size / 2**30:.1f} GiB, and sharded weights take "
                f"{MOST_AT_ONCE / 2**30:g} GiB at most: save the MODEL with them merged, or choose weights 'replicate'"
            )
        return changes.to_plain(self.changes) if self.dims.shard > 1 or size <= PART_BYTES else ({}, {})

    def _check_swaps(self) -> None:
        """
        Raises:
            InputError: sharded weights cannot be changed in the middle of a run.
        """
        if self.swaps and self.dims is not None and self.dims.shard > 1:
            raise InputError(
                f"LoRA hooks (scheduled, or on one conditioning) swap weights in the middle of a run, and these are "
                f"sharded over {self.dims.shard} GPUs: choose weights 'replicate' in Wan2.2 Multi-GPU, or load the "
                "LoRA the ordinary way"
            )

    def _check_sparse(self, sparse: bool) -> None:
        reason = self.dims.sparse_refusal if sparse and self.dims is not None else None
        if reason is not None:
            raise InputError(reason)

    def _room(self, tokens: int, *, guidance: bool) -> int:
        """What a forward needs beside the weights."""
        assert self.dims is not None
        return activation_bytes(self.dims, Workload(spec=self.spec, tokens=tokens, guidance=guidance))

    def _lay_out(self, pool: pools.Pool, tokens: int, *, guidance: bool, frames: int) -> None:
        """Weights that are whole everywhere serve any layout."""
        dims, made = self.layout(pool, tokens, guidance, frames)
        if dims == self.dims or dims.shard > 1:
            return
        pool.connection.request("layout", {"model": self.name, "dims": plain.to_plain(dims)}, poll=self.poll)
        self.dims = dims
        self.say(f"{self.source.label}: {dims if made is None else made}")

    def _lora(self, pool: pools.Pool, lora: LiveLora) -> int:
        known = pool.loras.get(id(lora))
        if known is not None:
            pool.loras.move_to_end(id(lora))
            return known[1]
        number = 1 + max((number for _, number in pool.loras.values()), default=0)
        terms: list[Json] = []
        tensors: dict[str, Tensor] = {}
        for index, term in enumerate(lora.terms):
            pairs = {}
            for name, pair in term.pairs.items():
                pairs[name] = changes.pair_to_plain(f"{index}.{name}", pair, tensors)
            terms.append({"label": term.label, "strength": term.strength, "pairs": pairs})
        pool.connection.request("lora", {"lora": number, "terms": terms}, tensors, poll=self.poll)
        pool.loras[id(lora)] = (lora, number)
        return number


HALF_MERGED = "?"
"""In place of the name of changes, while only some are merged; no changes have it."""
MOST_AT_ONCE = 4 * 2**30
"""Bytes of changes that each GPU takes at once, beside the weights that it reads."""
MAX_INPUTS = 4
"""Faces, sounds and poses by name that a pool keeps in a run: cond and uncond, twice."""
MAX_LORAS = 4
"""Live LoRAs that a pool keeps between runs."""


class RemoteWanModel(WanModel):
    """A model in a pool; of T2V, I2V and TI2V as it is, of other tasks with their modules (``remote_class``). Built on
    torch's ``meta`` device; ``remote`` is set by whoever builds it."""

    remote: Remote

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RemoteWanModel:
        """There are no weights to move or cast."""
        return self

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        context: Tensor,
        clip_fea: Tensor | None = None,
        options: ForwardOptions | None = None,
        **task_inputs: Any,
    ) -> Tensor:
        """As ``WanModel.forward``.

        Raises:
            PoolError: the pool could not start, or was lost.
            UnsupportedPatchError: an option that is a function of this process.
        """
        options = options or ForwardOptions()
        self._check(x, timestep, context)
        _refuse(options)
        policy = self._policy()
        compute = self.compute_dtype_override or self.compute_dtype
        tensors = {"x": x, "timestep": timestep, "context": context}
        if clip_fea is not None:
            tensors["clip_fea"] = clip_fea
        task = {f"task.{name}": value for name, value in task_inputs.items()}
        tokens = x[0, 0].numel() // math.prod(self.spec.patch_size)
        found, velocity = self.remote.forward(
            tensors, task, options, compute=compute, policy=policy, tokens=tokens, record=bool(self._recordings())
        )
        self._report(found, options)
        return velocity.to(x.device)

    def begin_run(self) -> None:
        super().begin_run()
        if hasattr(self, "remote"):
            self.remote.begin_run()

    # ---- pieces ------------------------------------------------------------------------------------------------------

    def _cache(self) -> StepCache | None:
        known = (StepCache, Recording)
        others = [name for name, wrapper in self.stack_wrappers.items() if not isinstance(wrapper, known)]
        if others:
            raise UnsupportedPatchError(
                f"{', '.join(map(repr, others))} around the blocks of this MODEL cannot run in the pool's processes: "
                "remove what put it there, or Wan2.2 Multi-GPU"
            )
        caches = [wrapper for wrapper in self.stack_wrappers.values() if isinstance(wrapper, StepCache)]
        return caches[0] if caches else None

    def _recordings(self) -> list[Recording]:
        return [wrapper for wrapper in self.stack_wrappers.values() if isinstance(wrapper, Recording)]

    def _policy(self) -> Any:
        cache = self._cache()
        return None if cache is None else cache.policy

    def _report(self, found: list[Json], options: ForwardOptions) -> None:
        """Enter here what caches and attention did there, so that whoever reports of a run finds it."""
        cache, dims = self._cache(), self.remote.dims
        assert dims is not None
        each = found[:: dims.sequence]  # one rank for each half of guidance
        if cache is not None:
            _enter_cache(cache, [entry["cache"] for entry in each])
        for recording in self._recordings():
            for entry in each:
                recording.enter((sigma, kind, ratio) for sigma, kind, ratio in entry["recorded"])
        setting = options.attention
        if setting is not None and "attention" in found[0]:
            _enter_attention(self, setting, [entry["attention"] for entry in found])


_CLASSES: dict[tuple[type[RemoteWanModel], type[WanModel]], type[RemoteWanModel]] = {}


def remote_class(task: Task, face: type[RemoteWanModel] = RemoteWanModel) -> type[RemoteWanModel]:
    """``face`` with the modules, names and inputs of the task's own definition."""
    definition = class_of(task)
    if definition is WanModel:
        return face
    if (face, definition) not in _CLASSES:
        members = {"__doc__": definition.__doc__}
        _CLASSES[face, definition] = type(f"{face.__name__}Of{definition.__name__}", (face, definition), members)
    return _CLASSES[face, definition]


def _refuse(options: ForwardOptions) -> None:
    if options.block_replace or options.attention_override is not None:
        raise UnsupportedPatchError(
            "another node replaces blocks or the attention of this MODEL with code of its own, which cannot run in the "
            "pool's processes: remove that node, or Wan2.2 Multi-GPU"
        )


def _enter_cache(cache: StepCache, found: list[Json]) -> None:
    """Both halves count where guidance is split; they tell of different passes."""
    report = cache.report
    for name in ("computed", "skipped", "refused"):
        setattr(report, name, sum(entry[name] for entry in found))
    for name in ("steps", "skipped_passes", "computed_passes", "outside"):
        setattr(report, name, {step for entry in found for step in entry[name]})
    for name in ("worst_error", "most_bytes"):
        setattr(report, name, max(plain.from_plain(entry[name]) for entry in found))
    report.total_error = sum(plain.from_plain(entry["total_error"]) for entry in found)
    report.times = [seconds for entry in found for seconds in plain.from_plain(entry["times"])]


def _enter_attention(model: nn.Module, setting: Attention, found: list[Json]) -> None:
    cores = {core.block: core for core in attention_cores(model) if not core.always_exact}
    if not cores:
        return
    next(iter(cores.values())).answered[setting] = Counter(found[0]["answered"])
    worst: dict[int, float] = {}
    for entry in found:
        for block, error in entry["errors"]:
            worst[block] = max(worst.get(block, 0.0), plain.from_plain(error))
    for block, error in worst.items():
        cores[block].answered.setdefault(setting, Counter())
        cores[block].verdicts[setting] = Verdict(error, setting.bound or math.inf)


def _nothing() -> None:
    pass
