"""Our transformer with the face that core expects of a ``diffusion_model``.

``WanModel.forward`` takes tensors and ``ForwardOptions``; core calls with ``transformer_options``, a dict that any
node may have written to. Here the one becomes the other. What cannot be honoured raises ``UnsupportedPatchError`` with
its name: core's own blocks would call it, and a patch that is silently never called is a wrong video.
"""

from __future__ import annotations

import functools
import logging
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, fields
from typing import Any, cast

import comfy.ldm.common_dit
import comfy.patcher_extension
import torch
from torch import Tensor, nn

from ...wan_fp8.attention import Attention, Step, sparsity_report
from ...wan_fp8.caching import Policy, Recording, StepCache
from ...wan_fp8.compile import Compile
from ...wan_fp8.errors import InputError, UnsupportedPatchError
from ...wan_fp8.models.functional import RopeOptions
from ...wan_fp8.models.layers import HIGH_PRECISION
from ...wan_fp8.models.low_rank import LiveLora
from ...wan_fp8.models.passes import Conditioning, RunPosition, step_at
from ...wan_fp8.models.wan import MAX_CACHED_PROMPTS, ForwardOptions, WanModel
from .voice import say
from .weights import attach_weight_source, keep_transfers_out_of_graphs

SETTINGS = "wan_fp8"
"""Our key in ``transformer_options``: a ``HostSettings``."""
SCHEDULE = "wan_fp8_schedule"
"""Our key for the sigmas of the whole run (floats), where a MODEL samples only some of its steps; core tells it about
those only."""
SHARE = "wan_fp8_share"
"""Our key for the steps (first, end) of that schedule that a MODEL samples."""
STEP = "wan_fp8_step"
"""Our key for the ``Step`` that a model call belongs to, where our solver makes the call."""
CACHE = "wan_fp8_cache"
RECORDING = "wan_fp8_recording"
"""Names of what is put around the blocks for one forward."""

logger = logging.getLogger("wan_fp8")


@dataclass(frozen=True, kw_only=True, slots=True)
class HostSettings:
    """Choices that touch no weight. They travel in ``transformer_options``, so one loaded model serves graphs that
    choose differently."""

    attention: Attention | None = None
    """Backend, precision and window of steps and blocks; None: automatic and exact."""
    compile: Compile | None = None
    """torch.compile for the parts of the blocks; None: they run as they are."""
    tf32: bool | None = None
    """Whether fp32 matrix products may run in TF32 during our forward; None: as the process has it."""
    stream_dtype: torch.dtype | None = None
    """Type of the residual stream between sums; None: fp32."""
    lora: LiveLora | None = None
    """LoRAs that run beside the weights; None: no such."""
    cache: Policy | None = None
    """Which passes are skipped; None: none is."""
    recording: Recording | None = None
    """Where the magnitude curve of a run is written; None: nowhere."""


def settings_of(patcher: Any) -> HostSettings:
    """The settings that this MODEL carries."""
    return patcher.model_options.get("transformer_options", {}).get(SETTINGS) or HostSettings()


class HostedModel(WanModel):
    """Mixed in before the engine's class by ``hosted_class``; adds no parameters and no state that is saved."""

    is_remote: bool = False
    """Whether the forward runs in other processes, so that there are no weights here."""

    settings_of_run: HostSettings = HostSettings()
    """Of the MODEL that is being sampled, or was loaded last: the forward's memory is estimated before any forward,
    and a file is saved without one."""

    expert_of_run: str | None = None
    """Which of two experts that MODEL holds, where its loader said."""
    caches: dict[Policy, StepCache]
    """Of the run, by setting."""

    lacked: int = 0
    """Bytes that its runs leave free beyond the estimate, since memory ran out in one."""

    sparse_facts: tuple[dict[str, Any], ...] = ()
    """What sparse attention did in the last run that ended, for a receipt."""

    _shell: weakref.ref[nn.Module] | None = None
    _prompts: OrderedDict[Hashable, Tensor]

    # ---- attributes that core and other nodes read ---------------------------------------------------------------

    dtype: torch.dtype
    """Storage type as core reports it; what we compute in follows ``x``, which BaseModel casts."""

    @property
    def patch_size(self) -> tuple[int, int, int]:
        """Latent frames, rows and columns per token."""
        return self.spec.patch_size

    @property
    def in_dim(self) -> int:
        """Channels of x, conditioning included."""
        return self.spec.in_dim

    @property
    def out_dim(self) -> int:
        """Channels of the velocity."""
        return self.spec.out_dim

    @property
    def dim(self) -> int:
        """Model width."""
        return self.spec.dim

    @property
    def num_heads(self) -> int:
        """Attention heads."""
        return self.spec.num_heads

    @property
    def num_layers(self) -> int:
        """Blocks."""
        return self.spec.num_layers

    # ---- forward -------------------------------------------------------------------------------------------------

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        timestep: Tensor,
        context: Tensor,
        clip_fea: Tensor | None = None,
        time_dim_concat: Tensor | None = None,
        transformer_options: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Core's signature. Latent rows and columns may be odd; ``time_dim_concat`` frames are appended for attention
        and cut off again.

        Returns:
            [B, C_out, F, H, W] velocity in float32.
        Raises:
            UnsupportedPatchError: another node attached something that this forward cannot honour.
        """
        options: dict[str, Any] = {} if transformer_options is None else transformer_options
        wrappers = comfy.patcher_extension.get_all_wrappers(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, options)
        executor = comfy.patcher_extension.WrapperExecutor.new_class_executor(self._run, self, wrappers)
        return executor.execute(x, timestep, context, clip_fea, time_dim_concat, options, **kwargs)

    def _run(
        self,
        x: Tensor,
        timestep: Tensor,
        context: Tensor,
        clip_fea: Tensor | None = None,
        time_dim_concat: Tensor | None = None,
        transformer_options: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        options: dict[str, Any] = {} if transformer_options is None else transformer_options
        patcher = self._patcher()
        if patcher is not None:
            refuse_foreign_patches(patcher)
        task_inputs = self._accepted_inputs(kwargs)
        clip_fea = self._accepted_clip(clip_fea)
        settings: HostSettings = options.get(SETTINGS) or HostSettings()
        if settings.compile is not None:
            keep_transfers_out_of_graphs()
        if x.dtype in HIGH_PRECISION:
            self.compute_dtype_override = x.dtype

        position = None
        if settings.cache is not None or settings.recording is not None:
            position = position_of_run(options, self.expert_of_run)
        self._surround_blocks(settings, position)

        frames, rows, columns = x.shape[2:]
        x = comfy.ldm.common_dit.pad_to_patch_size(x, self.patch_size)
        if time_dim_concat is not None:
            extra = comfy.ldm.common_dit.pad_to_patch_size(time_dim_concat, self.patch_size)
            x = torch.cat([x, extra.to(x)], dim=2)
        compare = may_change_text(patcher, options)
        text_key = (
            None
            if patcher is not None and weights_change_mid_run(patcher)
            else self._prompt_key(context, options, compare=compare)
        )
        velocity = super().forward(
            x,
            timestep,
            context,
            clip_fea,
            ForwardOptions(
                text_key=text_key,
                inputs_key=None if compare else text_key,
                cache_text=text_key is not None,
                attention=settings.attention,
                step=step_of_run(options) if settings.attention is not None and settings.attention.needs_step else None,
                position=position,
                attention_override=options.get("optimized_attention_override"),
                block_replace=block_replacements(options, self.num_layers),
                rope=rope_options(options),
                compile=settings.compile,
                announce=say,
                tf32=settings.tf32,
                stream_dtype=settings.stream_dtype,
                lora=settings.lora,
                host_options=options,
            ),
            **task_inputs,
        )
        return velocity[:, :, :frames, :rows, :columns]

    def sparse_reports(self) -> list[Any]:
        """What sparse attention did in the run that ends."""
        return list(sparsity_report(self))

    def forget_run(self) -> None:
        """Drop what belongs to one run (text keys and values, rotary tables, findings of the attention guard, live
        LoRAs on the device, residuals of a cache): at its start and its end, and whenever weights move or change."""
        self._surround_blocks(HostSettings(), None)
        self.caches.clear()
        self._prompts.clear()
        self._rope_cache.clear()
        self.begin_run()

    # ---- pieces --------------------------------------------------------------------------------------------------

    def _surround_blocks(self, settings: HostSettings, position: RunPosition | None) -> None:
        """What this forward's settings put around the blocks; outside of a sampling run there is no step to skip."""
        for name in (CACHE, RECORDING):
            self.stack_wrappers.pop(name, None)
        if position is None:
            return
        if settings.recording is not None:
            self.stack_wrappers[RECORDING] = settings.recording
        if settings.cache is not None:
            if settings.cache not in self.caches:
                self.caches[settings.cache] = StepCache(settings.cache, self.spec)
            self.stack_wrappers[CACHE] = self.caches[settings.cache]

    def _patcher(self) -> Any:
        shell = self._shell() if self._shell is not None else None
        return getattr(shell, "current_patcher", None)

    def _accepted_inputs(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        given = {name: value for name, value in kwargs.items() if value is not None}
        given.pop("denoise_mask", None)  # BaseModel has made per-frame timesteps of it
        if given.pop("reference_latent", None) is not None and "reference_latent" not in self.task_inputs:
            _warn_once(
                f"{self.spec.task} models have no reference image: 'reference_latent' has no effect, here as in core"
            )
        unknown = sorted(given.keys() - self.task_inputs)
        if unknown:
            raise UnsupportedPatchError(
                f"this MODEL was given {', '.join(map(repr, unknown))}, which a Wan2.2 {self.spec.task} transformer "
                "has no use for: disconnect the node that adds it, or load the model that it was made for"
            )
        return given

    def _accepted_clip(self, clip_fea: Tensor | None) -> Tensor | None:
        if clip_fea is not None and "clip_fea" not in self.task_inputs:
            _warn_once(
                f"{self.spec.task} models of Wan2.2 have no image branch: CLIP vision has no effect, here as in core"
            )
            return None
        return clip_fea

    def _prompt_key(self, context: Tensor, options: Mapping[str, Any], *, compare: bool) -> Hashable | None:
        """A name for the prompts of this batch that means the same text as it did last time; None where core gives
        none.

        Core's uuids are made once per run. With ``compare`` a node may have changed the rows since: a copy is kept and
        compared, for which the host waits, and if it differs everything kept is dropped.
        """
        uuids = options.get("uuids")
        if not uuids:
            return None
        key = (*uuids, tuple(context.shape), context.dtype)
        if not compare:
            return key
        kept = self._prompts.get(key)
        if kept is not None and not (kept.device == context.device and torch.equal(kept, context)):
            self._prompts.clear()
            self.clear_text_cache()
            kept = None
        if kept is None:
            self._prompts[key] = context.clone()
        self._prompts.move_to_end(key)
        while len(self._prompts) > MAX_CACHED_PROMPTS:
            self._prompts.popitem(last=False)
        return key


_HOSTED: dict[type[WanModel], type[HostedModel]] = {}


def hosted_class(engine_class: type[WanModel]) -> type[HostedModel]:
    """The engine's class with core's face; one for each engine class."""
    if issubclass(engine_class, HostedModel):
        return engine_class
    if engine_class not in _HOSTED:
        bases, members = (HostedModel, engine_class), {"__doc__": engine_class.__doc__}
        _HOSTED[engine_class] = type(f"Hosted{engine_class.__name__}", bases, members)
    return _HOSTED[engine_class]


def adopt(net: WanModel) -> HostedModel:
    """Turn a loaded engine model into one that core can host, in place; its parameters stay what they are."""
    if not isinstance(net, HostedModel):
        net.__class__ = hosted_class(type(net))
    model = cast(HostedModel, net)
    model._shell = None
    model._prompts = OrderedDict()
    model.caches = {}
    model.dtype = cast(torch.dtype, model.text_embedding[0].weight.dtype)
    attach_weight_source(model)
    return model


def bind(net: HostedModel, shell: nn.Module) -> None:
    """Let the model find the BaseModel that it sits in, to ask which patcher runs it. A weak reference: the two form
    no cycle."""
    net._shell = weakref.ref(shell)


# ---- translation ---------------------------------------------------------------------------------------------------


def block_replacements(options: Mapping[str, Any], num_layers: int) -> dict[int, Callable]:
    """Core's ``patches_replace["dit"]["double_block", i]`` by block index.

    Raises:
        UnsupportedPatchError: a replacement of something that this transformer does not have, or another kind of patch.
    """
    for kind, functions in options.get("patches", {}).items():
        if functions:
            raise UnsupportedPatchError(
                f"a node attached a patch of kind {kind!r}, which Wan FP8's transformer does not call: remove that "
                "node, or sample with core's own loader and without our nodes"
            )
    blocks: dict[int, Callable] = {}
    for group, entries in options.get("patches_replace", {}).items():
        for key, function in entries.items():
            known = group == "dit" and isinstance(key, tuple) and len(key) == 2 and key[0] == "double_block"
            if not known:
                raise UnsupportedPatchError(
                    f"a node replaces {key!r} of {group!r}, which a Wan transformer does not have (it has "
                    f"'double_block' 0 to {num_layers - 1}): empty that field of the node (skip-layer guidance: "
                    "single_layers), or remove the node"
                )
            if not (isinstance(key[1], int) and 0 <= key[1] < num_layers):
                raise UnsupportedPatchError(
                    f"a node replaces block {key[1]}, but this model has blocks 0 to {num_layers - 1}: change the "
                    "node's list of layers"
                )
            blocks[key[1]] = function
    return blocks


def rope_options(options: Mapping[str, Any]) -> RopeOptions | None:
    """Core's ``rope_options``: stretch and shift of token positions."""
    given = options.get("rope_options")
    if not given:
        return None
    known = {field.name for field in fields(RopeOptions)}
    unknown = sorted(given.keys() - known)
    if unknown:
        raise UnsupportedPatchError(
            f"a node sets the rope options {', '.join(map(repr, unknown))}, which Wan FP8's transformer does not know "
            f"(it knows {', '.join(sorted(known))}): remove that node"
        )
    return RopeOptions(**given)


def step_of_run(options: Mapping[str, Any]) -> Step | None:
    """Which step of the run this forward belongs to, by its sigma; None outside of a sampling run.

    Over two ``KSamplerAdvanced`` core knows no more than each one's own steps; our samplers say what the whole
    schedule is, and our solvers which step it is, so that the host need not wait for the sigma.
    """
    if isinstance(options.get(STEP), Step):
        return options[STEP]
    now, schedule = options.get("sigmas"), schedule_of_run(options)
    if now is None or schedule is None:
        return None
    return Step(step_at(float(now.flatten()[0]), schedule), len(schedule) - 1)


def schedule_of_run(options: Mapping[str, Any]) -> tuple[float, ...] | None:
    """Noise levels of the run, as much of it as is known; None outside of a sampling run."""
    schedule = options.get(SCHEDULE)
    if schedule is None and options.get("sample_sigmas") is not None:
        schedule = options["sample_sigmas"].flatten().tolist()
    return None if schedule is None or len(schedule) < 2 else tuple(schedule)


def position_of_run(options: Mapping[str, Any], expert: str | None) -> RunPosition | None:
    """Where this forward stands, and which conditionings are in its batch, by core's own names for them; None outside
    of a sampling run.

    Raises:
        UnsupportedPatchError: whoever samples names no conditionings, or a node's context windows name no frames.
    """
    now, schedule = options.get("sigmas"), schedule_of_run(options)
    if now is None or schedule is None:
        return None
    uuids, kinds = options.get("uuids"), options.get("cond_or_uncond")
    if not uuids or not kinds or len(uuids) != len(kinds):
        raise UnsupportedPatchError(
            "this sampler does not say which conditionings it evaluates, so a cache of steps cannot keep them apart: "
            "remove Wan2.2 MagCache, or sample with core's samplers or this pack's"
        )
    window = options.get("context_window")
    frames = None if window is None else getattr(window, "index_list", None)
    if window is not None and frames is None:
        raise UnsupportedPatchError(
            f"context windows of the kind {type(window).__name__} do not say which frames they hold, so a cache of "
            "steps cannot keep them apart: remove Wan2.2 MagCache, or use core's context windows"
        )
    place = None if frames is None else tuple(frames)
    step = options.get(STEP)
    if isinstance(step, Step) and step.total == len(schedule) - 1:
        sigma = schedule[step.index]
    else:
        sigma = float(now.flatten()[0])  # the host waits for the GPU
    return RunPosition(
        sigma=sigma,
        schedule=schedule,
        conditionings=tuple(Conditioning((uuid, place), kind) for uuid, kind in zip(uuids, kinds, strict=True)),
        share=options.get(SHARE),
        expert=expert,
    )


def refuse_foreign_patches(patcher: Any) -> None:
    """Raise for what other nodes did to the model's modules by path or by injection, and for whole copies of the model.

    Such a patch (NAG on ``diffusion_model.blocks.0.cross_attn.forward``, a compiled block) was written for core's
    modules, whose arguments ours don't have. Core's MultiGPU CFG Split keeps a copy of the MODEL for each other GPU,
    loaded from the file again: half of guidance would be core's transformer, without recipe, attention and cache.
    """
    if getattr(patcher, "additional_models", {}).get("multigpu"):
        raise UnsupportedPatchError(
            "core's MultiGPU CFG Split gave this MODEL copies for other GPUs, which would compute without Wan FP8's "
            "transformer and settings: take that node out, or put Wan2.2 Multi-GPU in its place"
        )
    foreign = sorted(k for k in patcher.object_patches if k == "diffusion_model" or k.startswith("diffusion_model."))
    if foreign:
        more = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
        raise UnsupportedPatchError(
            f"a node replaces {foreign[0]!r}{more}, which is code for core's own Wan modules and cannot run in Wan "
            "FP8's transformer: remove that node, or sample this MODEL without our nodes"
        )
    injections = sorted(name for name, entries in getattr(patcher, "injections", {}).items() if entries)
    if injections:
        raise UnsupportedPatchError(
            f"a node injects {', '.join(map(repr, injections))} into the model's layers while it samples, which Wan "
            "FP8's transformer cannot take: remove that node (a LoRA loaded in bypass mode: load it the ordinary way)"
        )


def refuse_context_windows(patcher: Any) -> None:
    """Raise where core's context windows are on a MODEL whose video is made in segments: they cut latents along time,
    and not the face, pose and sound that belong to them."""
    if patcher.model_options.get("context_handler") is not None:
        raise UnsupportedPatchError(
            "this MODEL carries context windows, and this sampler makes long videos in segments of its own: remove the "
            "node that adds context windows"
        )


_SEE_TEXT = ("CALC_COND_BATCH", "PREDICT_NOISE", "APPLY_MODEL", "DIFFUSION_MODEL")
"""Kinds of wrappers that text rows, faces and sounds pass through on their way from core's conditioning to our
forward."""


def may_change_text(patcher: Any, options: Mapping[str, Any]) -> bool:
    """Whether another node's code stands between core's conditioning and this forward, so that the rows behind one of
    core's uuids may differ from step to step."""
    if patcher is None:
        return True
    kinds = comfy.patcher_extension.WrappersMP
    functions = ("model_function_wrapper", "sampler_calc_cond_batch_function", "context_handler")
    return any(patcher.model_options.get(name) is not None for name in functions) or any(
        comfy.patcher_extension.get_all_wrappers(getattr(kinds, kind), options) for kind in _SEE_TEXT
    )


def refuse_live_lora(*loras: LiveLora | None) -> None:
    """Raise InputError where a file is to be made of weights beside which LoRAs run: ``settings_of(patcher).lora``,
    and the model's own ``lora``."""
    if any(lora is not None for lora in loras):
        raise InputError(
            "this MODEL has live LoRAs, which run beside its weights and would be missing in the file: set 'mode' of "
            "Load Wan2.2 LoRA to 'merged' to save them, or take the node out"
        )


def weights_change_mid_run(patcher: Any) -> bool:
    """Whether LoRA hooks (scheduled, or on one conditioning) swap weights between forwards of one run."""
    return bool(getattr(patcher, "hook_patches", None))


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning("Wan FP8: %s", message)
