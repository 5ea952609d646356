"""What one rank of a pool does when it is asked: read a model, lay it out over the ranks, run forwards.

Every rank gets the same requests in the same order. What a rank may fail at by itself (a file that it cannot read, no
memory for the weights) is agreed on before anybody enters a collective, so that the pool stays in step and goes on.
"""

from __future__ import annotations

import gc
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..attention import Attention, attention_report
from ..attention.report import sparsity_report
from ..caching import Recording, apply_cache, cache_of
from ..checkpoint.live_lora import merge_changes
from ..checkpoint.load import load_transformer
from ..errors import InputError, WanFP8Error
from ..models.blocks import ForwardOptions
from ..models.low_rank import LiveLora, LiveTerm
from ..models.wan import WanModel, build_model
from ..quant import Recipe, apply_recipe, load_scales
from . import changes, plain
from .dims import ParallelDims
from .parallelize import parallelize
from .serving_parts import Parts
from .source import HandedSource, ModelSource
from .wire import Json

log = logging.getLogger("wan_fp8")

RECORDING = "recording"
"""Of the wrapper in ``WanModel.stack_wrappers``."""
ROOM = 1.15
"""Free memory wanted for weights, as a multiple of them."""

Answer = tuple[Json, dict[str, Tensor]]


class ElsewhereError(WanFP8Error):
    """Another rank failed at what this one did; its message is the one to show."""


@dataclass(slots=True)
class Held:
    """One model that this rank serves."""

    model: WanModel
    source: ModelSource | HandedSource
    recipe: Recipe
    dims: ParallelDims
    merged: str = ""
    """Name of the changes that are merged into its weights."""
    inputs: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    """Faces, sounds and poses of this run, by the caller's names."""


class Serving:
    """The models of one rank. Not thread-safe: one request at a time."""

    def __init__(
        self,
        device: torch.device,
        control: dist.ProcessGroup,
        *,
        stage: Callable[[str], None] = lambda text: None,
        announce: Callable[[str], None] = log.info,
    ) -> None:
        self.device, self.control = device, control
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.models: OrderedDict[str, Held] = OrderedDict()
        """By the caller's names, the one used last at the end."""
        self.loras: dict[int, LiveLora] = {}
        self.handed: dict[str, Tensor] = {}
        """Weights that the caller has sent for the model that it will ask for next."""
        self.stage, self._announce = stage, announce
        self.parts = Parts(self)

    def run(self, kind: str, fields: Json, tensors: dict[str, Tensor]) -> Answer:
        """Do what is asked.

        Raises:
            WanFP8Error: it cannot be done; every rank raises, and the pool goes on.
            Exception: this rank broke in the middle; the others may wait for it.
        """
        action = getattr(self, f"_do_{kind}", None)
        if action is None:
            raise InputError(
                f"a pool does not know the request {kind!r}: run one version of the pack on all hosts, and start the "
                "pool again"
            )
        return action(fields, tensors)

    # ---- requests ----------------------------------------------------------------------------------------------------

    def _do_load(self, fields: Json, tensors: dict[str, Tensor]) -> Answer:
        """Read a model under a name; one that has the name already stays where it is the same."""
        name, source = fields["model"], plain.from_plain(fields["source"])
        recipe, dims = plain.from_plain(fields["recipe"]), plain.from_plain(fields["dims"])
        merges, merged = changes.from_plain(fields["changes"], tensors), fields["merged"]
        evicted: list[str] = []
        known = self.models.get(name)
        if known is not None and (known.merged, known.dims) != (merged, dims):  # its caller did not wait for it
            del self.models[name], known
            self.free()
        if name not in self.models:
            evicted = self.make_room(fields["bytes"])
            with self.agreed(f"read {source.label}"):
                self.stage(f"reading {source.label}")
                held = Held(self._read(source, recipe, dims), source, recipe, dims)
                if fields["scales"] is not None:
                    load_scales(held.model, fields["scales"])
                if merges:
                    merge_changes(held.model, merges)
                held.merged = merged
            self.stage(f"laying out {source.label}")
            parallelize(held.model, dims, device_type=self.device.type)
            self._settle(held.model)
            self.models[name] = held
        self.models.move_to_end(name)
        return {"evicted": evicted, "memory": self.memory()}, {}

    def _do_weights(self, fields: Json, tensors: dict[str, Tensor]) -> Answer:
        """Take weights that no file has; the first part of a model takes the place of all before."""
        evicted: list[str] = []
        if fields["first"]:
            self.handed = {}
            evicted = self.make_room(fields["bytes"])
        self.stage("taking weights")
        self.handed |= tensors
        return {"evicted": evicted}, {}

    def _do_merge(self, fields: Json, tensors: dict[str, Tensor]) -> Answer:
        """Merge changes into a model's weights, in place of those that were there before; ``more``: beside them.
        ``mid_run``: what a run keeps (caches of steps, maxima) stays."""
        held = self._held(fields)
        with self.agreed("merge LoRAs"):
            self.stage("merging LoRAs")
            if held.dims.shard > 1:
                raise InputError("sharded weights take no merge: load the model again with the changes")
            merge_changes(held.model, changes.from_plain(fields["changes"], tensors), more=fields["more"])
            held.merged = fields["merged"]
        if not fields["mid_run"]:
            held.model.begin_run()
        return {}, {}

    def _do_layout(self, fields: Json, tensors: dict[str, Tensor]) -> Answer:
        """Lay a model out in another way."""
        held = self._held(fields)
        dims = plain.from_plain(fields["dims"])
        parallelize(held.model, dims, device_type=self.device.type)
        held.dims = dims
        return {}, {}

    def _do_lora(self, fields: Json, tensors: dict[str, Tensor]) -> Answer:
        """Keep LoRAs for forwards to name."""
        terms = [
            LiveTerm(
                term["label"],
                term["strength"],
                {n: changes.pair_from_plain(p, tensors) for n, p in term["pairs"].items()},
            )
            for term in fields["terms"]
        ]
        self.loras[fields["lora"]] = LiveLora(tuple(terms))
        return {}, {}

    def _do_forward(self, fields: Json, tensors: dict[str, Tensor]) -> Answer:
        held = self._held(fields)
        model = held.model
        self.parts.yield_to(fields["room"])
        self.stage(f"running {held.source.label}")
        asked = {name: plain.from_plain(fields["options"][name]) for name in plain.OPTIONS if name in fields["options"]}
        lora = fields["lora"]
        options = ForwardOptions(
            **asked,
            text_key=fields["text_key"],
            inputs_key=fields["inputs_key"],
            announce=self._announce,
            lora=None if lora is None else self.loras[lora],
        )
        model.compute_dtype_override = plain.from_plain(fields["compute"])
        policy = plain.from_plain(fields["cache"])
        cache = cache_of(model)
        if (None if cache is None else cache.policy) != policy:
            apply_cache(model, policy)
        recording = _recording(model, fields["record"])
        task = {name.removeprefix("task."): value for name, value in tensors.items() if name.startswith("task.")}
        named = fields["inputs_key"]
        if not task and named is not None:
            task = held.inputs.get(named, {})  # sent before in this run
        elif fields["keep"]:
            held.inputs[named] = task
        velocity = model(
            tensors["x"], tensors["timestep"], tensors["context"], tensors.get("clip_fea"), options, **task
        )
        found: Json = {"memory": self.memory()}
        cache = cache_of(model)
        if cache is not None:
            found["cache"] = _cache_report(cache.finish())
        if recording is not None:
            found["recorded"] = [list(one) for one in recording.take()]
        if isinstance(options.attention, Attention) and not options.attention.is_exact:
            found["attention"] = _attention_found(model, options.attention)
        return found, {"velocity": velocity} if self.rank == 0 else {}

    def _do_vae(self, fields: Json, tensors: dict[str, Tensor]) -> Answer:
        return self.parts.run_vae(fields, tensors)

    def _do_holds(self, fields: Json, tensors: dict[str, Tensor]) -> Answer:
        return self.parts.holds(fields)

    def _do_text(self, fields: Json, tensors: dict[str, Tensor]) -> Answer:
        return self.parts.run_text(fields)

    def _do_sparse(self, fields: Json, tensors: dict[str, Tensor]) -> Answer:
        """What sparse attention did in this run, on the heads of all ranks."""
        reports = sparsity_report(self._held(fields).model)
        told = [{"facts": r.facts(), "lines": r.lines(), "as_asked": r.as_asked} for r in reports]
        return {"reports": told}, {}

    def _do_echo(self, fields: Json, tensors: dict[str, Tensor]) -> Answer:
        """Nothing but messages: as much as a velocity of so many channels comes back."""
        return {}, {"x": tensors["x"][:, : fields["channels"]]} if self.rank == 0 else {}

    def _do_begin_run(self, fields: Json, tensors: dict[str, Tensor]) -> Answer:
        for name in fields["models"]:
            if name in self.models:
                self.models[name].model.begin_run()
                self.models[name].inputs.clear()
                _recording(self.models[name].model, wanted=False)
        self.loras = {number: lora for number, lora in self.loras.items() if number in fields["loras"]}
        return {}, {}

    def _do_drop(self, fields: Json, tensors: dict[str, Tensor]) -> Answer:
        """Forget models, and the text encoder with the last one; ``models`` None: everything."""
        names = list(self.models) if fields["models"] is None else fields["models"]
        for name in names:
            self.models.pop(name, None)
        if fields["models"] is None:
            self.loras.clear()
        if not self.models:
            self.parts.drop(vae=fields["models"] is None)
        self.free()
        return {"memory": self.memory()}, {}

    def _do_status(self, fields: Json, tensors: dict[str, Tensor]) -> Answer:
        labels = [held.source.label for held in self.models.values()]
        return {"memory": self.memory(), "models": labels + self.parts.labels()}, {}

    # ---- pieces ------------------------------------------------------------------------------------------------------

    def _held(self, fields: Json) -> Held:
        name = fields["model"]
        if name not in self.models:
            raise InputError(f"the pool holds no model named {name!r}, it was dropped for another one: queue again")
        self.models.move_to_end(name)
        return self.models[name]

    def _read(self, source: ModelSource | HandedSource, recipe: Recipe, dims: ParallelDims) -> WanModel:
        if isinstance(source, HandedSource):
            state, self.handed = self.handed, {}
            return apply_recipe(_assigned(source, state), recipe, device=self.device, move=True).to(self.device)
        straight = dims.shard == 1 or not recipe.is_none or self.free_bytes() > ROOM * _bytes_of(source)
        return load_transformer(
            source.path,
            source.expert,
            dtype=source.dtype,
            device=self.device if straight else "cpu",
            keep_fp8=source.keep_fp8,
            recipe=recipe,
        )

    def _settle(self, model: WanModel) -> None:
        """What sharding left in host memory goes to the device."""
        for module in model.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                if parameter.device.type != self.device.type:
                    module._parameters[name] = torch.nn.Parameter(
                        parameter.detach().to(self.device), requires_grad=False
                    )

    def make_room(self, wanted: int) -> list[str]:
        """Drop the text encoder, then the models that were used longest ago, until ``wanted`` bytes are free on the
        fullest rank."""
        evicted = []
        self.parts.yield_to(int(ROOM * wanted))
        while self.models and self.device.type == "cuda":
            room = torch.tensor([float(self.free_bytes())])
            dist.all_reduce(room, dist.ReduceOp.MIN, group=self.control)
            if room.item() >= ROOM * wanted:
                break
            name, held = self.models.popitem(last=False)
            log.info("%s leaves the GPUs for another model", held.source.label)
            del held
            self.free()
            evicted.append(name)
        return evicted

    def free_bytes(self) -> int:
        """On this rank's GPU; on a CPU, more than anybody wants."""
        if self.device.type != "cuda":
            return 2**62
        reserved = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return torch.cuda.mem_get_info(self.device)[0] + reserved

    def free(self) -> None:
        """Give back what nobody holds any more."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def memory(self) -> int:
        """Bytes that this rank has allocated on its GPU; 0 on a CPU."""
        return torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else 0

    @contextmanager
    def agreed(self, what: str) -> Iterator[None]:
        """Run something without collectives; if it fails on any rank, it fails on all, with a ``WanFP8Error``."""
        failure: BaseException | None = None
        try:
            yield
        except (Exception, MemoryError) as error:
            failure = error
        failed = torch.tensor([float(failure is not None)])
        dist.all_reduce(failed, dist.ReduceOp.MAX, group=self.control)
        if failure is not None:
            self.free()
            if isinstance(failure, WanFP8Error):
                raise failure
            if isinstance(failure, torch.OutOfMemoryError | MemoryError):
                raise InputError(
                    f"rank {self.rank} has no memory left to {what}: choose weights 'shard', an FP8 recipe, or more "
                    "GPUs "
                    f"({failure})"
                ) from failure
            raise InputError(f"rank {self.rank} could not {what}: {type(failure).__name__}: {failure}") from failure
        if failed.item():
            raise ElsewhereError(f"another rank could not {what}")


def _assigned(source: HandedSource, state: dict[str, Tensor]) -> WanModel:
    """A model on these very tensors; FP8 weights have their scales beside them."""
    with torch.device("meta"):
        model = build_model(source.spec)
    for name in [name for name in state if name.endswith(".weight_scale")]:
        owner = model.get_submodule(name.removesuffix(".weight_scale"))
        owner.register_parameter("weight_scale", torch.nn.Parameter(state[name], requires_grad=False))
    model.load_state_dict(state, strict=True, assign=True)
    return model.requires_grad_(False).eval()


def _bytes_of(source: ModelSource) -> int:
    return sum(size for _, size, _ in source.stamp)


def _recording(model: WanModel, wanted: bool) -> Recording | None:
    """What measures a curve around the blocks; it lives as long as a run."""
    if not wanted:
        model.stack_wrappers.pop(RECORDING, None)
        return None
    return model.stack_wrappers.setdefault(RECORDING, Recording())  # type: ignore[return-value]


def _cache_report(report: Any) -> Json:
    names = ("computed", "skipped", "refused", "worst_error", "total_error", "times", "most_bytes")
    counted = {name: plain.to_plain(getattr(report, name)) for name in names}
    return counted | {name: sorted(getattr(report, name)) for name in ("steps", "skipped_passes", "outside")}


def _attention_found(model: WanModel, setting: Attention) -> Json:
    """What a low-precision attention did since the run began, on this rank."""
    for report in attention_report(model):
        if report.setting == setting:
            errors = [[block, plain.to_plain(verdict.error)] for block, verdict in report.verdicts.items()]
            return {"answered": dict(report.answered), "errors": errors}
    return {"answered": {}, "errors": []}
