"""The Wan2.2 diffusion transformer: embed, a stack of blocks, head. One plain definition for every task.

A task that needs more (extra tokens, injections after some blocks) overrides ``embed``, ``project_context`` or
``after_block``; recipes, caches
and parallel layouts replace leaves, set ``token_multiple``, or wrap the stack through ``stack_wrappers``.

B batch, C channels, F latent frames, H/W latent rows and columns, S video tokens, L text tokens, D model width, R
timestep rows.
Precision follows the official code: fp32 residual stream, modulation, gates, time MLP and head; fp64 sinusoid and
rotary angles; GEMMs and
attention in ``compute_dtype``. Source: Wan-Video/Wan2.2 ``wan/modules/model.py``.
"""

from __future__ import annotations

import logging
import math
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .. import kernels
from ..attention import AttentionCore, reset_guard
from ..attention.sparse import TokenOrder, token_order
from ..compile import Compile, CompiledParts, Run, run_plainly
from ..errors import InputError
from ..kernels.residual_norm import NormTable
from ..precision import fp32_products
from . import functional as wan
from . import low_rank
from .blocks import (
    ForwardOptions,
    ForwardState,
    GELULinear,
    KeptText,
    Modulation,
    ResidualStream,
    TextContext,
    WanBlock,
)
from .by_tensor import ByTensor
from .functional import RopeOptions
from .layers import HIGH_PRECISION, Linear, PatchEmbedding
from .specs import ModelSpec, Task

log = logging.getLogger("wan_fp8")


class ForwardQuantization(Protocol):
    """What an FP8 recipe does around a forward."""

    def compile_refusal(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why blocks with this recipe cannot be compiled; None where they can."""

    def reduce_with(self, reduction: AmaxReduction | None) -> None:
        """Agree on maxima with other ranks; None: there are none."""

    def begin_run(self) -> None:
        """A sampling run starts with the next forward."""

    def begin(self, device: torch.device, dtype: torch.dtype, fused: bool) -> int:
        """Before a forward; returns what the number of tokens must be a multiple of."""

    def padded(self, tokens: int, num_tokens: int) -> None:
        """The forward that began has ``num_tokens`` tokens, padded to ``tokens``."""

    def end(self, timestep: Tensor) -> None:
        """After a forward."""


class AmaxReduction(Protocol):
    """How ranks that share one forward agree on the maxima that FP8 scales are made of; both change fp32 ``amax`` in
    place."""

    def over_sequence(self, amax: Tensor) -> None:
        """The largest over the ranks that hold parts of the same sequences."""

    def over_all(self, amax: Tensor) -> None:
        """The largest over all ranks, those with other conditionings included."""


Embedded = tuple[Tensor, tuple[int, int, int], Tensor | None, dict[str, Any]]
"""What ``embed`` returns."""
StackFunction = Callable[[Tensor, ForwardState], Tensor]
"""Residual stream before the first block -> after the last, [B, S, D]."""
StackWrapper = Callable[[Tensor, ForwardState, StackFunction], Tensor]
"""Called with the stack it wraps. Attributes, both optional: ``keeps_input`` False says that it needs its input no more
once the stack runs; ``innermost`` True puts it inside all others, whenever it was added; ``begin_run()`` is called
between runs."""

MAX_CACHED_PROMPTS = 4
"""Prompts (batches of prompts) whose text keys and values are kept: cond and uncond, twice. 0.4 GiB each at 14B in
bf16."""
MAX_CACHED_CONDITIONS = 4
"""Encoded faces or sounds that are kept: cond and uncond, twice. A few MB each."""
MAX_CACHED_ROPE_TABLES = 4
GIVEN_FIRST_FRAME = (Task.I2V, Task.TI2V, Task.ANIMATE)
"""Tasks whose first latent frame is, or may be, a given picture: sparse attention keeps it for every query."""


class Head(nn.Module):
    """Modulated LayerNorm and the projection to patches, in fp32. Uses the time embedding before its projection."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        pt, ph, pw = spec.patch_size
        self.modulation = nn.Parameter(torch.empty(1, 2, spec.dim), requires_grad=False)
        self.head = Linear(spec.dim, spec.out_dim * pt * ph * pw)

    def forward(self, stream: ResidualStream, embedding_RD: Tensor) -> Tensor:
        """[B, S, D] -> [B, S, p_t * p_h * p_w * C_out], C fastest."""
        table = embedding_RD[:, None] + self.modulation.to(device=embedding_RD.device, dtype=embedding_RD.dtype)
        shift, scale = table.unbind(1)
        return self.head(stream.normed(NormTable(scale, shift, modulated=True), embedding_RD.dtype))


class WanModel(nn.Module):
    """Wan2.2 transformer (T2V, I2V, TI2V). Returns the flow velocity."""

    block_class: type[WanBlock] = WanBlock
    task_inputs: frozenset[str] = frozenset()
    """Inputs beside latents, timestep and text that the task's forward takes, by name."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        dim = spec.dim
        self.patch_embedding = PatchEmbedding(spec.in_dim, dim, spec.patch_size)
        self.text_embedding = GELULinear(spec.text_dim, dim, dim)
        self.time_embedding = nn.Sequential(Linear(spec.freq_dim, dim), nn.SiLU(), Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(self.block_class(spec, index) for index in range(spec.num_layers))
        self.head = Head(spec)

        self.compute_dtype_override: torch.dtype | None = None
        """Set to compute in another type than the weights are stored in."""
        self.stream_dtype_override: torch.dtype | None = None
        """bf16 halves the traffic of the residual stream and rounds it after each of its three sums; None keeps
        fp32."""
        self.compile_setting: Compile | None = None
        """Set by ``compile_blocks``."""
        self.compiled_parts: dict[Compile, CompiledParts] = {}
        """What was compiled for this model, by setting."""
        self.fused_kernels = "auto"
        """``auto``, ``triton`` or ``eager``: who runs norms, modulation and rotary turns."""
        self.token_multiple = 1
        """The token axis is padded once per forward, so that it falls into this many equal parts (a parallel layout's
        need), each of a length that the recipe takes."""
        self.quantization: ForwardQuantization | None = None
        """Set by ``apply_recipe``."""
        self.amax_reduction: AmaxReduction | None = None
        """Set by ``parallelize``: how maxima are agreed on; whoever sets ``quantization`` hands it on."""
        self.gather_findings: Callable[[Tensor], list[list[Tensor]]] | None = None
        """Set by ``parallelize``: every rank's row of bytes, by half of guidance; all ranks must call it."""
        self.layout: object | None = None
        """Set by ``parallelize``: what it attached."""
        self.fixed_weights: str | None = None
        """Why no recipe can make other weights of these (they are sharded); None where one can."""
        self.lora: low_rank.LiveLora | None = None
        """Set by ``set_lora``: LoRAs that run beside the weights."""
        self.merged_by_lora: dict[str, tuple[nn.Parameter, nn.Parameter]] = {}
        """Set by ``set_lora``, by name: a parameter that a change was merged into, as it was, and as it became."""
        self._branches: low_rank.Placed | None = None
        self.stack_wrappers: OrderedDict[str, StackWrapper] = OrderedDict()
        """Named, ordered, removable: the first one added is the outermost."""
        self._text_cache: ByTensor[KeptText] = ByTensor(MAX_CACHED_PROMPTS)
        self._conditions: ByTensor[Tensor | tuple[Tensor, ...]] = ByTensor(MAX_CACHED_CONDITIONS)
        """What a task makes of its inputs once for all steps."""
        self._rope_cache: OrderedDict[Hashable, tuple[Tensor, Tensor, Tensor | None]] = OrderedDict()
        """Cosine and sine; and the positions that a task gave, which nobody else then takes the identity of."""

    @property
    def compute_dtype(self) -> torch.dtype:
        """Type of GEMM and attention operands: that of the stored weights, or bf16 where those are FP8."""
        if self.compute_dtype_override is not None:
            return self.compute_dtype_override
        first = self.text_embedding[0]
        assert isinstance(first, Linear)
        stored = first.weight.dtype
        return stored if stored in HIGH_PRECISION else torch.bfloat16

    @property
    def high_dtype(self) -> torch.dtype:
        """Type of modulation, time MLP, head and velocity: fp32, or fp64 for a float64 model."""
        return torch.float64 if self.compute_dtype == torch.float64 else torch.float32

    @property
    def stream_dtype(self) -> torch.dtype:
        """Type in which the residual stream is stored between blocks; sums are fp32 in any case."""
        return self.stream_dtype_override or self.high_dtype

    # ---- forward -------------------------------------------------------------------------------------------------

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        context: Tensor,
        clip_fea: Tensor | None = None,
        options: ForwardOptions | None = None,
        **task_inputs: Any,
    ) -> Tensor:
        """Velocity of the flow at ``x``.

        Args:
            x: [B, C_in, F, H, W] latents, conditioning channels concatenated after the noisy ones. H and W even.
            timestep: [B], [B, F] or [B, S], 0..1000; integers for the official solvers.
            context: [B, L, text_dim] text rows, zero-padded to 512 by whoever made them; padding takes part in
            cross-attention.
            clip_fea: image rows, for tasks that take them.
            options: See ForwardOptions.
            **task_inputs: what the task's ``embed`` takes; none for T2V, I2V and TI2V.
        Returns:
            [B, C_out, F, H, W] in ``high_dtype``.
        Raises:
            InputError: a shape that the model cannot take, or an input that it does not know.
        """
        options = options or ForwardOptions()
        self._check(x, timestep, context)
        with fp32_products(options.tf32):
            return self._velocity(x, timestep, context, clip_fea, options, task_inputs)

    def _velocity(
        self,
        x: Tensor,
        timestep: Tensor,
        context: Tensor,
        clip_fea: Tensor | None,
        options: ForwardOptions,
        task_inputs: dict[str, Any],
    ) -> Tensor:
        fused = kernels.select(self.fused_kernels, x.device, self.compute_dtype)
        self._place_lora(options.lora or self.lora, x.device, fused)
        text = self._text_context(context, clip_fea, options)  # before the activations: it stays when they are gone
        tokens, grid, positions, task = self.embed(x, task_inputs, options)
        tokens = tokens.to(options.stream_dtype or self.stream_dtype)
        embedding, modulation = self._time_rows(timestep, tokens.shape[:2], grid)
        state = ForwardState(
            modulation=modulation,
            rope=self._rope(positions, grid, options.rope, tokens.device),
            num_tokens=tokens.shape[1],
            context=text,
            compute_dtype=self.compute_dtype,
            fused=fused,
            options=options,
            run=self._runner(options, x.device),
            task=task,
            owned=not any(getattr(wrapper, "keeps_input", True) for wrapper in self.stack_wrappers.values()),
        )
        video = math.prod(grid)  # what a task put behind the video ends here
        state.order = self._order(options, grid, tokens.shape[1] - video, tokens.device)
        if state.order is not None:
            tokens = self._ordered(tokens, state, state.order)
        multiple = self.token_multiple
        if self.quantization is not None:
            multiple *= self.quantization.begin(tokens.device, state.compute_dtype, state.fused)
        tokens = self._padded(tokens, state, multiple)
        if self.quantization is not None:
            self.quantization.padded(tokens.shape[1], state.num_tokens)
        order = state.order
        tokens = self._stack()(tokens, state)
        tokens = tokens[:, :video].contiguous() if order is None else order.video_in_frames(tokens)
        if self.quantization is not None:
            self.quantization.end(timestep)
        row = state.modulation.row_of_token
        if row is not None:
            state.modulation.row_of_token = row[:, :video].contiguous() if order is None else order.video_in_frames(row)
        return self.unpatchify(self.head(ResidualStream(tokens, state, self.spec.eps), embedding), grid)

    def embed(self, x: Tensor, task_inputs: dict[str, Any], options: ForwardOptions) -> Embedded:
        """Latents -> tokens.

        Returns:
            The tokens [B, S, D], in any floating type, those of the video first; the token grid (T, H, W) of the
            video, which is what the head reads;
            token positions [S, 3] fp64, or None for the plain grid; and what ``after_block`` will need.
        """
        del options
        if task_inputs:
            raise InputError(f"{self.spec.task} models take no input named {', '.join(sorted(task_inputs))}")
        tokens = self.patch_embedding(x.to(self.compute_dtype))
        pt, ph, pw = self.spec.patch_size
        return tokens, (x.shape[2] // pt, x.shape[3] // ph, x.shape[4] // pw), None, {}

    def project_context(self, context: Tensor, clip_fea: Tensor | None) -> Tensor:
        """Text rows [B, L, text_dim] -> [B, L, D]."""
        if clip_fea is not None:
            raise InputError(f"{self.spec.task} models of Wan2.2 take no CLIP vision features: disconnect them")
        return self.text_embedding(context.to(self.compute_dtype))

    def after_block(self, index: int, stream: ResidualStream, state: ForwardState) -> ResidualStream:
        """What a task adds to the stream after block ``index``; nothing here."""
        del index, state
        return stream

    def run_blocks(self, tokens_BSD: Tensor, state: ForwardState) -> Tensor:
        """Every block in order, each one through the host's replacement where there is one.

        Writes over ``tokens_BSD``, unless a stack wrapper may still want it.
        """
        stream = ResidualStream(tokens_BSD, state, self.spec.eps, owned=state.owned)
        for index, block in enumerate(self.blocks):
            replace = state.options.block_replace.get(index)
            stream = block(stream, state) if replace is None else self._replaced(block, replace, stream, state)
            stream = self.after_block(index, stream, state)
        return stream.settled()

    def unpatchify(self, patches: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """[B, S, p_t * p_h * p_w * C] in (p_t, p_h, p_w, C) order -> [B, C, F, H, W]."""
        pt, ph, pw = self.spec.patch_size
        t, h, w = grid
        value = patches.reshape(patches.shape[0], t, h, w, pt, ph, pw, self.spec.out_dim)
        return value.permute(0, 7, 1, 4, 2, 5, 3, 6).reshape(
            patches.shape[0], self.spec.out_dim, t * pt, h * ph, w * pw
        )

    # ---- caches --------------------------------------------------------------------------------------------------

    def clear_text_cache(self) -> None:
        """Forget the text keys and values of every prompt, and what a task made of its inputs; call it when a run ends
        or the weights of such encoders change."""
        self._text_cache.clear()
        self._conditions.clear()

    def begin_run(self) -> None:
        """Forget what belongs to one sampling run: text keys and values, what the attention guard found, what a cache
        of steps kept, the matrices of live LoRAs on the device, and the maxima that a recipe's scales follow."""
        self.clear_text_cache()
        self.take_lora_away()
        reset_guard(self)
        for wrapper in self.stack_wrappers.values():
            getattr(wrapper, "begin_run", _nothing)()
        if self.quantization is not None:
            self.quantization.begin_run()

    def take_lora_away(self) -> None:
        """Free the matrices of live LoRAs; the next forward that wants them places them again."""
        if self._branches is not None:
            self._branches.remove()
            self._branches = None

    def _place_lora(self, wanted: low_rank.LiveLora | None, device: torch.device, fused: bool) -> None:
        """Have the branches of ``wanted`` on the linears, and no others."""
        key = None if wanted is None else (wanted, device, self.compute_dtype, fused)
        if key == (None if self._branches is None else self._branches.key):
            return
        self.take_lora_away()
        self.clear_text_cache()  # made by the text linears without it, or with another
        if wanted is not None:
            self._branches = low_rank.place(self, wanted, device, self.compute_dtype, self.high_dtype, fused)

    def _text_context(self, context: Tensor, clip_fea: Tensor | None, options: ForwardOptions) -> TextContext:
        def project() -> Tensor:
            return self.project_context(context, clip_fea)

        image_tokens = 0 if clip_fea is None else clip_fea.shape[1]
        if not options.cache_text:
            return TextContext(project, None, image_tokens)
        owners = (context,) if clip_fea is None else (context, clip_fea)

        def room() -> KeptText:
            rows = [context.shape[1]] * 2 + [image_tokens] * (2 if image_tokens else 0)
            shapes = [
                (len(self.blocks), len(context), count, self.spec.num_heads, self.spec.head_dim) for count in rows
            ]
            return KeptText([torch.empty(s, dtype=self.compute_dtype, device=context.device) for s in shapes])

        blocks = self._text_cache.get(owners, room, also=(options.tf32,), name=options.text_key)
        return TextContext(project, blocks, image_tokens)

    def once(
        self,
        source: Tensor,
        options: ForwardOptions,
        make: Callable[[], Tensor | tuple[Tensor, ...]],
        *,
        also: Hashable = None,
    ) -> Tensor | tuple[Tensor, ...]:
        """What ``make`` makes of ``source``, in the first of the forwards that are given this very tensor (or another
        one of the name that the caller gives it).

        Args:
            also: what else the result depends on.
        """
        if not options.cache_text:
            return make()
        key = (options.tf32, self.compute_dtype, also)
        return self._conditions.get((source,), make, also=key, name=options.inputs_key)

    def _rope(
        self, positions: Tensor | None, grid: tuple[int, int, int], options: RopeOptions | None, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        dtype = self.high_dtype
        build_on = device if device.type == "cuda" else torch.device("cpu")  # fp64 is not to be had everywhere
        key = (grid, options, device, dtype) if positions is None else (id(positions), device, dtype)
        if key not in self._rope_cache:
            places = wan.grid_positions(grid, options) if positions is None else positions
            cos, sin = wan.rope_table(places.to(build_on), self.spec.head_dim, dtype)
            self._rope_cache[key] = (cos.to(device), sin.to(device), positions)
            while len(self._rope_cache) > MAX_CACHED_ROPE_TABLES:
                self._rope_cache.popitem(last=False)
        cos, sin, _ = self._rope_cache[key]
        return cos, sin

    # ---- pieces of the forward -------------------------------------------------------------------------------------

    def _check(self, x: Tensor, timestep: Tensor, context: Tensor) -> None:
        spec = self.spec
        if x.ndim != 5 or x.shape[1] != spec.in_dim:
            raise InputError(
                f"the model takes latents [batch, {spec.in_dim}, frames, rows, columns]; got {list(x.shape)}: "
                f"{spec.in_dim} channels include the conditioning that {spec.task} needs"
            )
        if any(size % patch for size, patch in zip(x.shape[2:], spec.patch_size, strict=True)):
            raise InputError(
                f"latent frames, rows and columns must be multiples of {spec.patch_size}; got {list(x.shape[2:])}: pad "
                "them, and cut the result"
            )
        if context.ndim != 3 or context.shape[2] != spec.text_dim:
            raise InputError(
                f"the model takes text rows [batch, tokens, {spec.text_dim}]; got {list(context.shape)}: "
                "use the text encoder of Wan2.2 (UMT5-XXL)"
            )
        if context.shape[0] != x.shape[0]:
            raise InputError(f"latents and text disagree on the batch size: {x.shape[0]} and {context.shape[0]}")
        tokens = x[0, 0].numel() // (spec.patch_size[0] * spec.patch_size[1] * spec.patch_size[2])
        allowed = ((x.shape[0],), (x.shape[0], x.shape[2]), (x.shape[0], tokens))
        if tuple(timestep.shape) not in allowed:
            raise InputError(
                f"timestep takes one of the shapes {[list(s) for s in allowed]}; got {list(timestep.shape)}"
            )

    def _runner(self, options: ForwardOptions, device: torch.device) -> Run:
        """Who calls the parts of the blocks in this forward."""
        setting = options.compile or self.compile_setting
        if setting is None:
            return run_plainly
        if self.quantization is not None:
            reason = self.quantization.compile_refusal(device, self.compute_dtype)
            if reason is not None:
                raise InputError(f"torch.compile cannot be used here: {reason}")
        if setting not in self.compiled_parts:
            self.compiled_parts[setting] = CompiledParts(setting)
        compiled = self.compiled_parts[setting]
        compiled.announce = options.announce or log.info
        return compiled

    def _time_rows(
        self, timestep: Tensor, batch_tokens: torch.Size, grid: tuple[int, int, int]
    ) -> tuple[Tensor, Modulation]:
        """Run the time MLP on distinct timesteps only: [R, D] embeddings and the modulation [R, 6, D].

        On a GPU equal timesteps of frames are not merged: to find them the host would have to wait, which costs more
        than 31 rows of a small MLP.
        """
        row_of_token = None
        if timestep.ndim == 2:
            if timestep.is_cuda and timestep.shape[1] == grid[0]:
                row = torch.arange(timestep.numel(), device=timestep.device).view(timestep.shape)
                timestep = timestep.flatten()
            else:
                timestep, row = torch.unique(timestep, return_inverse=True)
            repeats = (grid[0] * grid[1] * grid[2]) // row.shape[1]
            row_of_token = row[..., None].expand(*row.shape, repeats).flatten(1)
            assert row_of_token.shape == batch_tokens, (row_of_token.shape, batch_tokens)
        embedding = self.time_embedding(wan.sinusoidal_embedding(timestep, self.spec.freq_dim).to(self.high_dtype))
        rows = self.time_projection(embedding).unflatten(1, (6, self.spec.dim))
        return embedding, Modulation(rows, row_of_token)

    def _order(
        self, options: ForwardOptions, grid: tuple[int, int, int], behind: int, device: torch.device
    ) -> TokenOrder | None:
        """The order in which tokens stand where attention is sparse in any step of the run: a cache of steps keeps
        residuals in it, so that it must not change. The attentions are told where the tokens lie."""
        cores = [_core_of(block) for block in self.blocks]
        setting = options.attention or cores[0].setting
        if setting.sparsity is None:
            return None
        if cores[0].sparse_refusal is not None:
            raise InputError(cores[0].sparse_refusal)
        if options.attention_override is not None:
            raise InputError(
                "another node replaces the attention of this model, which would then not be sparse: remove it, or turn "
                "sparsity off"
            )
        order = token_order(grid, behind, self.spec.task in GIVEN_FIRST_FRAME, device)
        for core in cores:
            core.layout = order.layout
        return order

    def _ordered(self, tokens: Tensor, state: ForwardState, order: TokenOrder) -> Tensor:
        """Put the tokens into ``order``; rotary angles and row indices follow."""
        cos, sin = state.rope
        state.rope = (order.apply(cos, 0), order.apply(sin, 0))
        if state.modulation.row_of_token is not None:
            state.modulation.row_of_token = order.apply(state.modulation.row_of_token)
        return order.apply(tokens)

    def _padded(self, tokens: Tensor, state: ForwardState, multiple: int) -> Tensor:
        """Pad the token axis once, to ``multiple``; rotary angles and row indices follow."""
        extra = -tokens.shape[1] % multiple
        if extra == 0:
            return tokens
        cos, sin = state.rope
        state.rope = (nn.functional.pad(cos, (0, 0, 0, extra), value=1.0), nn.functional.pad(sin, (0, 0, 0, extra)))
        if state.modulation.row_of_token is not None:
            state.modulation.row_of_token = nn.functional.pad(state.modulation.row_of_token, (0, extra))
        return nn.functional.pad(tokens, (0, 0, 0, extra))

    def _stack(self) -> StackFunction:
        function: StackFunction = self.run_blocks
        in_order = sorted(self.stack_wrappers.values(), key=lambda wrapper: getattr(wrapper, "innermost", False))
        for wrapper in reversed(in_order):
            function = _wrapped(wrapper, function)
        return function

    def _replaced(
        self, block: nn.Module, replace: Callable, stream: ResidualStream, state: ForwardState
    ) -> ResidualStream:
        """A host's replacement of one block sees and returns plain tokens, in the frame order."""

        order = state.order

        def original(args: dict[str, Any]) -> dict[str, Any]:
            tokens = args["img"] if order is None else order.apply(args["img"])
            tokens = block(ResidualStream(tokens, state, self.spec.eps), state).settled()
            return {"img": tokens if order is None else order.undo(tokens)}

        tokens, rope = stream.settled(), state.rope
        if order is not None:
            tokens, rope = order.undo(tokens), (order.undo(rope[0], 0), order.undo(rope[1], 0))
        args = {
            "img": tokens,
            "txt": state.context.tokens_BLD,
            "vec": state.modulation.rows,
            "pe": rope,
            "transformer_options": state.options.host_options,
        }
        tokens = replace(args, {"original_block": original})["img"]
        return ResidualStream(tokens if order is None else order.apply(tokens), state, self.spec.eps)


def _nothing() -> None:
    pass


def _core_of(block: nn.Module) -> AttentionCore:
    """The self-attention of a block, which a parallel layout may have wrapped."""
    inner = block.get_submodule("self_attn.inner_attention")
    core = inner if isinstance(inner, AttentionCore) else inner.get_submodule("core")
    assert isinstance(core, AttentionCore)
    return core


def _wrapped(wrapper: StackWrapper, inner: StackFunction) -> StackFunction:
    return lambda tokens, state: wrapper(tokens, state, inner)


def build_model(spec: ModelSpec, *, model_class: type[WanModel] | None = None) -> WanModel:
    """An uninitialised model in eval mode on torch's current default device (use ``torch.device("meta")`` to fill it
    by assignment)."""
    return (model_class or class_of(spec.task))(spec).eval()


def class_of(task: Task) -> type[WanModel]:
    """The definition of a task; those with more than the common one are imported when first used."""
    if task is Task.ANIMATE:
        from .animate import AnimateModel

        return AnimateModel
    if task is Task.S2V:
        from .s2v import S2VModel

        return S2VModel
    return WanModel
