"""Nodes that change how a MODEL computes and none of its weights: attention, torch.compile, precision.

Each takes a MODEL of ours or of core's and returns a copy; the MODEL that came in stays as it was.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from typing import Any

import torch
from comfy_api.latest import io

from ..wan_fp8.attention import ATTENTION, Attention, AttentionRequest
from ..wan_fp8.attention.backends.sdpa import torch_choice
from ..wan_fp8.attention.sparse import SPARSE, SparseRequest, Sparsity, presets
from ..wan_fp8.compile import MODES, Compile, refusal
from ..wan_fp8.errors import BackendUnavailableError
from . import bridge
from .choices import check_choice
from .missing import Missing, require
from .notices import node_id, notice
from .schema import SETTINGS, node_schema

DEFAULT = Attention()
EXACT_BACKENDS = ("auto", "sdpa", "cudnn", "fa2", "fa3", "fa4", "reference")
BACKENDS = ("auto", "sdpa", "cudnn", "fa2", "fa3", "fa4", "fa3-fp8", "sage", "reference", "reference-fp8")
"""Saved in workflows: the order stays, new ones go last. A test holds both lists against the registry."""

OFF = "off"
SPARSITIES = (OFF, "safe", "balanced", "fast")
"""Saved in workflows as well."""
STREAM_TYPES = {"float32": None, "bfloat16": torch.bfloat16}
"""None: the model's own, which is float32."""


class WanFP8Attention(io.ComfyNode):
    """Which attention kernel a MODEL uses, and where a low-precision one may stand in."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            node_id="WanFP8Attention",
            display_name="Wan2.2 Attention",
            category=SETTINGS,
            description="Chooses the attention kernel of a Wan2.2 MODEL, ours or core's, and checks at once that it "
            "runs on this machine. FP8 and INT8 attention is used inside a window of steps and blocks only, and a "
            "guard compares it with the exact result on the run's own data before it is trusted. Self-attention can "
            "be block-sparse, with its error measured while it runs. Without this node the fastest exact kernel is "
            "used, over all keys.",
            search_aliases=["flash attention", "sage attention", "fp8 attention", "fa3", "sdpa", "sparse attention"],
            inputs=[
                model_input("Two-expert checkpoints: the high-noise expert here, the other at 'model_low'."),
                io.Combo.Input(
                    "backend",
                    options=list(BACKENDS),
                    default=DEFAULT.backend,
                    tooltip="Default auto: the fastest exact kernel that runs here; the node shows which it took and "
                    "why it passed over others. sdpa is torch's own choice, cudnn and fa2 two of its kernels; fa3 "
                    "(Hopper) and fa4 (Hopper, B200) need their package. fa3-fp8 and sage are faster and inexact, "
                    "see the inputs below. reference and reference-fp8 are slow, for comparisons. Time and error of "
                    "each: docs/attention.md.",
                ),
                io.Combo.Input(
                    "exact",
                    options=list(EXACT_BACKENDS),
                    default=DEFAULT.exact,
                    tooltip="The exact kernel beside fa3-fp8 or sage: outside their window, where the guard refuses "
                    "them, and in cross-attention. Default auto: the fastest one. Not used with an exact backend.",
                ),
                _count_input(
                    "skip_first_steps",
                    DEFAULT.skip_first_steps,
                    "Steps at the start that stay exact with fa3-fp8 or sage: they lay down the composition.",
                    "Counted over the whole run, both experts together.",
                ),
                _count_input(
                    "skip_last_steps",
                    DEFAULT.skip_last_steps,
                    "Steps at the end that stay exact: they draw the detail.",
                    "A 4-step run needs 0 or 1 here and at the start, or nothing is left.",
                ),
                _count_input(
                    "skip_first_blocks",
                    DEFAULT.skip_first_blocks,
                    "Transformer blocks at the front that stay exact with fa3-fp8 or sage.",
                    "A14B has 40 blocks, 5B has 30.",
                ),
                _count_input(
                    "skip_last_blocks",
                    DEFAULT.skip_last_blocks,
                    "Transformer blocks at the end that stay exact.",
                    "A14B has 40 blocks, 5B has 30.",
                ),
                io.Float.Input(
                    "bound",
                    default=DEFAULT.bound,
                    min=0.0,
                    max=1.0,
                    step=0.005,
                    round=0.001,
                    tooltip="The guard's limit for fa3-fp8 or sage: relative error of a block's attention, measured on "
                    "the run's own data at the block's first use; above it the exact kernel takes over in that block "
                    "and the node says so at the end of the run. Default 0.08: between FP8's rounding of Gaussian data "
                    "(0.058) and its known failure (0.114); sage has 0.103 on Gaussian data of 75,600 tokens, which "
                    "would be refused: your own data decides. Costs 0.05 % of the products of each block's attention "
                    "at 720p, in one step of the run. 0 turns the guard off.",
                ),
                low_input(),
                io.Combo.Input(
                    "sparsity",
                    options=list(SPARSITIES),
                    default=OFF,
                    optional=True,
                    tooltip="Block-sparse self-attention: each head computes the blocks of keys that hold most of its "
                    "attention, and samples of what was left out are measured in every step. Default off: all keys. "
                    "safe, balanced and fast allow an error of 2, 5 and 10 % of a head's output and leave the first "
                    "25, 20 and 15 % of the steps dense; a head that cannot keep the bound is computed densely. The "
                    "node that samples shows what was kept, lost and saved. Choosing and measuring cost about 2 % of "
                    "a dense attention at 720p (docs/sparse.md).",
                ),
                io.Float.Input(
                    "sparsity_bound",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.005,
                    round=0.001,
                    optional=True,
                    tooltip="With sparsity: the relative error of a head's attention output that is allowed, in place "
                    "of the preset's own (safe 0.02, balanced 0.05, fast 0.1). Default 0: the preset's. Smaller keeps "
                    "more blocks and saves less time.",
                ),
            ],
            outputs=outputs("with this attention"),
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        backend: str,
        exact: str,
        skip_first_steps: int,
        skip_last_steps: int,
        skip_first_blocks: int,
        skip_last_blocks: int,
        bound: float,
        model_low: Any = None,
        sparsity: str = OFF,
        sparsity_bound: float = 0.0,
    ) -> io.NodeOutput:
        check_choice("sparsity", sparsity, SPARSITIES)
        attention = Attention(
            backend=backend,
            exact=exact,
            skip_first_steps=skip_first_steps,
            skip_last_steps=skip_last_steps,
            skip_first_blocks=skip_first_blocks,
            skip_last_blocks=skip_last_blocks,
            bound=bound or None,
            sparsity=_sparsity(sparsity, sparsity_bound),
        )
        requests = [bridge.attention_request(require(given)) for given in (model, model_low) if given is not None]
        lines = list(dict.fromkeys(line for request in requests for line in _choices(attention, request)))
        outputs = changed(cls, model, model_low, lambda given: bridge.with_settings(given, attention=attention))
        return io.NodeOutput(*outputs, ui=notice(node_id(cls), lines))


def _choices(attention: Attention, request: AttentionRequest) -> list[str]:
    """Which backends will run, in words.

    Raises:
        BackendUnavailableError: one that was asked for by name cannot run on this MODEL's device and types.
    """
    names = [attention.backend] if attention.is_exact else [attention.backend, attention.exact]
    lines = []
    for name in names:
        resolution = ATTENTION.resolve(name, request)
        chosen = resolution.backend.label
        kernel = f" ({torch_choice(request)} kernel)" if chosen == "sdpa" else ""
        dtype = str(request.dtype).removeprefix("torch.")
        lines.append(f"attention {name}: {chosen}{kernel} on {request.caps.name}, {dtype}")
        lines += [f"passed over {other}: {reason}" for other, reason in resolution.refused.items()]
    if not attention.is_exact and attention.bound is None:
        lines.append(f"the guard is off: nothing will notice if {attention.backend} fails on this video")
    if attention.sparsity is not None:
        lines += _sparse_choice(attention.sparsity, request)
    return lines


def _sparsity(name: str, bound: float) -> Sparsity | None:
    """The preset, with the user's own bound where there is one."""
    if name == OFF:
        return None
    preset = presets()[name]
    return dataclasses.replace(preset, bound=bound) if bound else preset


def _sparse_choice(sparsity: Sparsity, request: AttentionRequest) -> list[str]:
    """Which block-sparse kernel will run, in words."""
    asked = SparseRequest(request.caps, request.dtype, request.head_dim, request.num_queries, request.num_keys)
    resolution = SPARSE.resolve(sparsity.backend, asked)
    lines = [
        f"sparse attention: {resolution.backend.name}, between the first {sparsity.skip_first:.0%} and the last "
        f"{sparsity.skip_last:.0%} of the steps, error of a head at most {sparsity.bound:g}"
    ]
    if resolution.backend.name == "masked":
        lines.append("it builds the whole score matrix here: for tests on small videos, slower than dense attention")
    return lines + [f"passed over {other} for sparse: {reason}" for other, reason in resolution.refused.items()]


class WanFP8Compile(io.ComfyNode):
    """torch.compile per block, TF32, and the type of the residual stream."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            node_id="WanFP8Compile",
            display_name="Wan2.2 Compile and Precision",
            category=SETTINGS,
            # a block of I2V-A14B takes 246.2 ms with and without (results/dit_i2v-a14b_1280x720_compile_h200.json)
            is_experimental=True,
            description="Compiles the transformer blocks of a Wan2.2 MODEL, ours or core's, with torch.compile, and "
            "sets how two things outside the large products are computed. Everything is off by default: this pack's "
            "own fused kernels need no compiler. A new prompt, seed, step count or LoRA strength compiles nothing "
            "again.",
            search_aliases=["torch compile", "inductor", "tf32", "torchcompilemodel"],
            inputs=[
                model_input("Two-expert checkpoints: the high-noise expert here, the other at 'model_low'."),
                io.Combo.Input(
                    "mode",
                    options=[OFF, *MODES],
                    default=OFF,
                    tooltip="Default off: the fused kernels are as fast without (docs/attention.md has the figures). "
                    "default compiles in the first step, seconds to a minute for each expert; "
                    "max-autotune-no-cudagraphs also tries several kernels for every product, which takes minutes. The "
                    "node that samples shows when it compiles.",
                ),
                io.Boolean.Input(
                    "dynamic",
                    default=True,
                    tooltip="Default on: one compilation serves every resolution and length. Off: each number of "
                    "tokens is compiled by itself, which may give slightly faster code. Used with a mode other than "
                    "off.",
                ),
                io.Boolean.Input(
                    "tf32",
                    default=False,
                    tooltip="Lets float32 products run in TF32 during this MODEL's steps, and only then. Default off: "
                    "as the published code. It touches the time embedding and the head, which are float32: a few "
                    "milliseconds of a step of many seconds; weights loaded as fp32 gain much more. NVIDIA GPUs from "
                    "Ampere on.",
                ),
                io.Combo.Input(
                    "residual_stream",
                    options=list(STREAM_TYPES),
                    default="float32",
                    tooltip="Type in which the sum that runs through all blocks is kept. Default float32: as the "
                    "published code. bfloat16 rounds it three times a block: it saves one activation of memory and "
                    "under 1 % of the time, and more than doubles the error of bf16 latents (docs/attention.md).",
                ),
                low_input(),
            ],
            outputs=outputs("with these settings"),
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls, model: Any, mode: str, dynamic: bool, tf32: bool, residual_stream: str, model_low: Any = None
    ) -> io.NodeOutput:
        compile_ = None if mode == OFF else Compile(mode=mode, dynamic=dynamic)
        caps = bridge.device_of(require(model))
        reason = None if compile_ is None else refusal(caps.device)
        if reason is not None:
            raise BackendUnavailableError(f"torch.compile cannot run on {caps.name}: {reason}; set mode to '{OFF}'")
        lines = []
        if tf32 and not (caps.is_cuda and (caps.capability or (0, 0)) >= (8, 0)):
            lines.append(f"tf32 has no effect on {caps.name}: it needs an NVIDIA GPU of Ampere or later")
        changes = {"compile": compile_, "tf32": tf32, "stream_dtype": STREAM_TYPES[residual_stream]}
        outputs = changed(cls, model, model_low, lambda given: bridge.with_settings(given, **changes))
        return io.NodeOutput(*outputs, ui=notice(node_id(cls), lines, level=logging.WARNING))


# ---- what both share -----------------------------------------------------------------------------------------------


def model_input(more: str) -> io.Input:
    return io.Model.Input(
        "model",
        tooltip="A Wan2.2 MODEL from Load Wan2.2 Checkpoint or from core's Load Diffusion Model; "
        f"LoRA, shift and other settings may come before or after. {more}",
    )


def low_input() -> io.Input:
    return io.Model.Input("model_low", optional=True, tooltip="The low-noise expert, to get the same settings.")


def _count_input(name: str, default: int, what: str, more: str) -> io.Input:
    return io.Int.Input(
        name,
        default=default,
        min=0,
        max=1000,
        tooltip=f"{what} Default {default}: this pack's preset, on the careful side. Each one costs what the faster "
        f"kernel would have saved there. {more}",
    )


def outputs(how: str) -> list[io.Output]:
    return [
        io.Model.Output(display_name="model", tooltip=f"'model' {how}; the one that came in is unchanged."),
        io.Model.Output(display_name="model_low", tooltip=f"'model_low' {how}."),
    ]


def changed(cls: type[io.ComfyNode], model: Any, model_low: Any, change: Callable[[Any], Any]) -> tuple[Any, Any]:
    """Changed copies of one or both MODELs; a MODEL that is given twice (TI2V) stays one."""
    first = change(require(model))
    if model_low is None:
        title = cls.define_schema().display_name  # GET_SCHEMA would write to the class, which is locked while it runs
        return first, Missing(
            f"{title} returns 'model_low' only when 'model_low' is connected to it: connect the low-noise expert there"
        )
    return first, first if model_low is model else change(require(model_low))
