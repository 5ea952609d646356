"""One Wan transformer block, and the state of a forward that every block reads.

B batch, S video tokens (padding included), L text tokens, D model width, N heads, E head width, R timestep rows.
Parameter names are the official ones. Source: Wan-Video/Wan2.2 ``wan/modules/model.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, overload

import torch
from torch import Tensor, nn

from ..attention import Attention as AttentionSetting
from ..attention import AttentionCore, Step
from ..attention.sparse import TokenOrder
from ..compile import Compile, Run, run_plainly
from ..kernels import residual_norm, rms_rope
from ..kernels.parts import cut
from ..kernels.quantize import Cast, QuantizedActivation
from ..kernels.residual_norm import NormTable
from .functional import RopeOptions
from .layers import InputQuantizer, Linear, NormWeight
from .low_rank import LiveLora
from .passes import RunPosition
from .specs import ModelSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class ForwardOptions:
    """What a caller may ask of one forward besides its tensors."""

    text_key: Hashable | None = None
    """Names the prompt(s) of this batch, and their images where the model reads CLIP features: keys and values are kept
    under it. None: the identity of ``context`` and ``clip_fea`` (torch
    does not count writes to a tensor made under inference mode: after writing over such a one,
    ``clear_text_cache``)."""
    inputs_key: Hashable | None = None
    """Names the faces or sounds of this batch: what is made of them is kept under it. None: the identity of the
    tensor."""
    cache_text: bool = True
    """False while weights of text, image, face or audio may change between two forwards."""
    attention: AttentionSetting | None = None
    """Attention setting of this forward; None: the model's own."""
    step: Step | None = None
    """Where this forward stands in its run; settings that hold for some steps only need it."""
    position: RunPosition | None = None
    """The same for a cache of steps, with noise levels and conditionings."""
    attention_override: Callable | None = None
    """``f(func, q, k, v, heads, mask=None, transformer_options=...)`` with q, k, v as [B, S, N*E]; the host's own
    contract."""
    block_replace: Mapping[int, Callable] = field(default_factory=dict)
    """By block index: ``f({"img", "txt", "vec", "pe", "transformer_options"}, {"original_block": g})`` -> ``{"img":
    tokens}``."""
    rope: RopeOptions | None = None
    compile: Compile | None = None
    """How the blocks of this forward are compiled; None: the model's own setting."""
    announce: Callable[[str], None] | None = None
    """Told in a sentence when something outside the forward's own work takes long: compilation."""
    stream_dtype: torch.dtype | None = None
    """Type of the residual stream between sums; None: the model's own."""
    lora: LiveLora | None = None
    """LoRAs beside the weights in this forward; None: the model's own."""
    tf32: bool | None = None
    """Whether fp32 matrix products of this forward may be computed in TF32; None: as the process has it."""
    host_options: Any = None
    """Handed through untouched to the two callables above."""

    @property
    def attention_step(self) -> Step | None:
        """``step``, with the conditionings of the batch where ``position`` names them."""
        if self.step is None or self.position is None:
            return self.step
        return replace(self.step, conditionings=tuple(part.key for part in self.position.conditionings))


@dataclass(slots=True)
class Modulation:
    """Shift, scale and gate vectors, stored once a sample, or once a latent frame where frames differ."""

    rows: Tensor
    """[R, 6, D]: shift, scale, gate of self-attention, then of the FFN."""
    row_of_token: Tensor | None
    """[B, S] row index of each token; None when sample b uses row b throughout."""


class HeadExchange(Protocol):
    """Where a parallel layout sends queries, keys and values, each as soon as it is made."""

    ranks: int
    """P: how many ranks share the heads; n = N / P of them each."""

    def heads_of(self, core: nn.Module) -> Tensor | None:
        """[N] int64: the heads of this attention in the order in which they go to the ranks; None: as they are."""

    def send(self, x_BPSnE: Tensor) -> Tensor:
        """[B, P, S, n, E] of this rank's tokens begin to move; the result [B, P * S, n, E], of this rank's heads, may
        be read by nobody but ``inner_attention``, which waits for it."""


@dataclass(slots=True)
class ForwardState:
    """Everything the blocks of one forward share."""

    modulation: Modulation
    rope: tuple[Tensor, Tensor]
    """cosine and sine, [S, E/2]."""
    num_tokens: int
    """Tokens before padding: keys and values beyond it take no part in self-attention."""
    context: TextContext
    compute_dtype: torch.dtype
    """Type of GEMM and attention operands."""
    fused: bool
    """True: the Triton kernels; False: their eager references."""
    options: ForwardOptions
    run: Run = run_plainly
    """Calls the parts of a block: as they are, or compiled."""
    task: dict[str, Any] = field(default_factory=dict)
    """What a task's ``embed`` keeps for its ``after_block``."""
    first_token: int = 0
    """Which of all tokens the first one here is, where a parallel layout gives this rank a part of them."""
    exchange: HeadExchange | None = None
    """Set by a parallel layout whose ranks trade tokens for heads while the projections still run."""
    owned: bool = True
    """Nobody needs the tokens before the first block as they are: sums may be written over them."""
    order: TokenOrder | None = None
    """How the tokens stand; None: in the frame order."""


class KeptText:
    """Keys and values that every block makes of one prompt, in memory that is taken before the forward's activations.

    Each is small, and made between activations of hundreds of MiB. Kept one by one they would come to lie in what such
    activations left behind, where no activation would fit again: 0.9 GiB of a 16 GB card at 832x480, 81 frames
    (``tests/unit/test_memory_walk.py`` follows the allocator).
    """

    def __init__(self, room: list[Tensor]) -> None:
        """``room``: [blocks, B, L, N, E] for each kind that a block makes, in its order."""
        self._room = room
        self._blocks: dict[int, tuple[Tensor, ...]] = {}

    def of_block(self, index: int, compute: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """Those of block ``index``, made by ``compute`` the first time."""
        if index not in self._blocks:
            self._blocks[index] = self._settled(index, compute())
        return self._blocks[index]

    def _settled(self, index: int, made: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Anything that the room was not made for stays as it is."""
        fits = [(room.shape[1:], room.dtype) for room in self._room] == [(t.shape, t.dtype) for t in made]
        fits = fits and index < len(self._room[0]) and not any(t.requires_grad for t in made)
        if not fits or (self._room[0].is_inference() and not torch.is_inference_mode_enabled()):
            return made
        return tuple(room[index].copy_(tensor) for room, tensor in zip(self._room, made, strict=True))


class TextContext:
    """The prompt as every block's cross-attention sees it: projected once, keys and values kept across steps.

    A block calls ``keys_values(block_index, compute)``; the first forward of a prompt computes, later ones look up.
    """

    def __init__(self, project: Callable[[], Tensor], store: KeptText | None, image_tokens: int = 0) -> None:
        self._project = project
        self._store = store
        self._tokens: Tensor | None = None
        self.image_tokens = image_tokens
        """How many of the first tokens are an image's."""

    @property
    def tokens_BLD(self) -> Tensor:
        """The projected context; computed at first use, so never when all keys and values are known."""
        if self._tokens is None:
            self._tokens = self._project()
        return self._tokens

    def keys_values(self, index: int, compute: Callable[[Tensor], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """Keys and values [B, L, N, E] of block ``index``; of text and image in turn where there is one."""
        if self._store is None:
            return compute(self.tokens_BLD)
        return self._store.of_block(index, lambda: compute(self.tokens_BLD))


class ResidualStream:
    """The residual stream with its last branch not yet added: whoever norms it next adds the branch in the same
    pass."""

    def __init__(self, x_BSD: Tensor, state: ForwardState, eps: float, *, owned: bool = False) -> None:
        """``owned``: nobody else needs ``x_BSD`` as it is, so that sums may be written over it."""
        self._x, self._state, self._eps, self._owned = x_BSD, state, eps, owned
        self._branch: Tensor | None = None
        self._gate: Tensor | None = None

    def token_axes(self) -> Iterator[tuple[Tensor, int]]:
        """Every tensor with a token axis that a part of a block reads, and which axis that is."""
        yield self._x, 1
        for tensor in (self._branch, self._state.modulation.row_of_token):
            if tensor is not None:
                yield tensor, 1
        for tensor in self._state.rope:
            yield tensor, 0

    def add(self, branch_BSD: Tensor, gate_RD: Tensor | None) -> None:
        """Queue ``x += gate * branch`` (``gate`` 1 where it is None)."""
        assert self._branch is None, "one branch at a time"
        self._branch, self._gate = branch_BSD, gate_RD

    @overload
    def normed(self, table: NormTable, out_dtype: torch.dtype) -> Tensor: ...
    @overload
    def normed(
        self, table: NormTable, out_dtype: torch.dtype, wanted: InputQuantizer | None
    ) -> Tensor | QuantizedActivation: ...
    def normed(
        self, table: NormTable, out_dtype: torch.dtype, wanted: InputQuantizer | None = None
    ) -> Tensor | QuantizedActivation:
        """Add what is queued, then LayerNorm, scale and shift: [B, S, D] in ``out_dtype``, or cast as the linears
        that read it want it."""
        cast = None if wanted is None else wanted.cast(self._x.device, out_dtype)
        out = self._settle(table, out_dtype, cast)
        assert out is not None
        return out if wanted is None or cast is None else wanted.finish(out, cast)

    def normed_by(self, table: NormTable, row_of_token: Tensor, out_dtype: torch.dtype, eps: float) -> Tensor:
        """LayerNorm of the stream with rows of the caller's own in place of the timestep's: [B, S, D]."""
        run = residual_norm.fused if self._state.fused else residual_norm.eager
        x = self.settled()
        _, out = run(x, None, None, table, row_of_token, eps=eps, out_dtype=out_dtype, in_place=False)
        assert isinstance(out, Tensor)
        return out

    def settled(self) -> Tensor:
        """The stream [B, S, D] with everything added."""
        if self._branch is not None:
            self._settle(None, self._x.dtype)
        return self._x

    def _settle(
        self, table: NormTable | None, out_dtype: torch.dtype, cast: Cast | None = None
    ) -> Tensor | QuantizedActivation | None:
        run = residual_norm.fused if self._state.fused else residual_norm.eager
        added = self._branch is not None
        self._x, out = run(
            self._x,
            self._branch,
            self._gate,
            table,
            self._state.modulation.row_of_token,
            eps=self._eps,
            out_dtype=out_dtype,
            in_place=self._owned,
            cast=cast,
        )
        self._branch = self._gate = None
        self._owned = self._owned or added
        return out


def normed_heads(
    norm: NormWeight,
    x_BSD: Tensor,
    rope: tuple[Tensor, Tensor] | None,
    state: ForwardState,
    head_dim: int,
    eps: float,
    parts: int = 1,
    heads: Tensor | None = None,
) -> Tensor:
    """Full-width RMSNorm with the module's gain and, with ``rope``, the rotary turn: [B, S, D] -> [B, S, N, E], or with
    ``parts`` P [B, P, S, N / P, E], in the order of ``heads``. May overwrite ``x``."""
    weight, bias, handle = norm.fetch(x_BSD)
    run = rms_rope.fused_ if state.fused else rms_rope.eager
    y = run(x_BSD, weight, rope, head_dim=head_dim, eps=eps, parts=parts, heads=heads)
    norm.release(weight, bias, handle)
    return y.unflatten(-1, (-1, head_dim))


class Attention(nn.Module):
    """The four projections and two full-width norms that self- and cross-attention share."""

    def __init__(self, spec: ModelSpec, core: AttentionCore) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.eps = spec.num_heads, spec.head_dim, spec.eps
        self.q = Linear(spec.dim, spec.dim)
        self.k = Linear(spec.dim, spec.dim)
        self.v = Linear(spec.dim, spec.dim)
        self.o = Linear(spec.dim, spec.dim)
        self.norm_q = NormWeight(spec.dim)
        self.norm_k = NormWeight(spec.dim)
        self.inner_attention = core

    def heads(self, x_BSD: Tensor) -> Tensor:
        """[B, S, D] -> [B, S, N, E], a view."""
        return x_BSD.unflatten(-1, (self.num_heads, self.head_dim))

    def attend(self, q_BSNE: Tensor, k_BLNE: Tensor, v_BLNE: Tensor, options: ForwardOptions) -> Tensor:
        """Attention through the host's override if there is one: [B, S, N, E] -> [B, S, D]."""
        if options.attention_override is None:
            return self.inner_attention(q_BSNE, k_BLNE, v_BLNE, options.attention, options.attention_step).flatten(2)

        def own(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None, **kwargs: Any) -> Tensor:
            if mask is not None or kwargs.get("skip_reshape") or kwargs.get("skip_output_reshape"):
                raise NotImplementedError(
                    "the attention of this model takes no mask and [batch, tokens, heads * width] tensors only"
                )
            split = (t.unflatten(-1, (heads, -1)) for t in (q, k, v))
            return self.inner_attention(*split, options.attention, options.attention_step).flatten(2)

        return options.attention_override(
            own,
            q_BSNE.flatten(2),
            k_BLNE.flatten(2),
            v_BLNE.flatten(2),
            heads=self.num_heads,
            transformer_options=options.host_options,
        )


class SelfAttention(Attention):
    """Attention among video tokens, with rotary positions. Padding tokens are never attended to."""

    @property
    def input_quantizer(self) -> InputQuantizer | None:
        """How q, k and v want their input; None where they do not agree, and each casts for itself."""
        wanted = self.q.input_quantizer
        return wanted if wanted is self.k.input_quantizer and wanted is self.v.input_quantizer else None

    def project(self, x_BSD: Tensor | QuantizedActivation, state: ForwardState) -> tuple[Tensor, Tensor, Tensor]:
        """Normed and turned queries and keys, plain values: each [B, S, N, E], padding included; with an exchange those
        of this rank's heads, on their way. Values go first: they need no norm, and what follows hides them."""
        if state.exchange is not None:
            return self._project_and_send(x_BSD, state, state.exchange)
        q = normed_heads(self.norm_q, self.q(x_BSD), state.rope, state, self.head_dim, self.eps)
        k = normed_heads(self.norm_k, self.k(x_BSD), state.rope, state, self.head_dim, self.eps)
        return q, k, self.heads(self.v(x_BSD))

    def _project_and_send(
        self, x_BSD: Tensor | QuantizedActivation, state: ForwardState, exchange: HeadExchange
    ) -> tuple[Tensor, Tensor, Tensor]:
        parts, heads = exchange.ranks, exchange.heads_of(self.inner_attention)
        v = cut(self.v(x_BSD), parts, heads, head_dim=self.head_dim, fused=state.fused)
        v = exchange.send(v.unflatten(-1, (-1, self.head_dim)))
        k = normed_heads(self.norm_k, self.k(x_BSD), state.rope, state, self.head_dim, self.eps, parts, heads)
        k = exchange.send(k)
        q = normed_heads(self.norm_q, self.q(x_BSD), state.rope, state, self.head_dim, self.eps, parts, heads)
        return exchange.send(q), k, v


class CrossAttention(Attention):
    """Attention from video tokens to all text tokens, padding rows of the prompt included (the official behaviour)."""

    def queries(self, x_BSD: Tensor | QuantizedActivation, state: ForwardState) -> Tensor:
        """Normed queries [B, S, N, E] of the video."""
        return normed_heads(self.norm_q, self.q(x_BSD), None, state, self.head_dim, self.eps)

    def keys_values(self, context_BLD: Tensor, state: ForwardState) -> tuple[Tensor, ...]:
        """Normed keys and values [B, L, N, E] of the text."""
        k = normed_heads(self.norm_k, self.k(context_BLD), None, state, self.head_dim, self.eps)
        return k, self.heads(self.v(context_BLD))

    def attend_context(self, q_BSNE: Tensor, state: ForwardState, index: int) -> Tensor:
        """What the video reads in its prompt: [B, S, N, E] -> [B, S, D]. Keys and values come from the cache after a
        prompt's first forward."""
        k, v = state.context.keys_values(index, lambda context: self.keys_values(context, state))
        return self.attend(q_BSNE, k, v, state.options)


class GELULinear(nn.Sequential):
    """Linear, GELU (tanh), Linear, at the official positions 0, 1 and 2: the FFN and the text projection."""

    def __init__(self, in_features: int, hidden_features: int, out_features: int) -> None:
        super().__init__(Linear(in_features, hidden_features), nn.Identity(), Linear(hidden_features, out_features))

    @property
    def input_quantizer(self) -> InputQuantizer | None:
        """How the first linear wants its input."""
        return self[0].input_quantizer  # type: ignore[return-value]

    def expand(self, x: Tensor | QuantizedActivation) -> Tensor:
        """The hidden layer; activated already where that costs no pass of its own."""
        return self[0](x, gelu=self[2].input_quantizer is None)

    def activated(self, expanded: Tensor) -> Tensor | QuantizedActivation:
        """The activated hidden layer, as the second linear wants it."""
        wanted: InputQuantizer | None = self[2].input_quantizer  # type: ignore[assignment]
        return expanded if wanted is None else wanted(expanded, gelu=True)

    def forward(self, x: Tensor) -> Tensor:
        return self[2](self.activated(self.expand(x)))


SELF_SHIFT, SELF_SCALE, SELF_GATE, FFN_SHIFT, FFN_SCALE, FFN_GATE = range(6)
"""Rows of a block's modulation table."""


class WanBlock(nn.Module):
    """Self-attention, cross-attention and FFN around a residual stream; one modulation table added to the timestep's
    rows."""

    cross_attention_class: type[CrossAttention] = CrossAttention

    def __init__(self, spec: ModelSpec, index: int) -> None:
        super().__init__()
        self.index = index
        self.modulation = nn.Parameter(torch.empty(1, 6, spec.dim), requires_grad=False)
        self.self_attn = SelfAttention(spec, AttentionCore(index, spec.num_layers))
        self.norm3 = NormWeight(spec.dim, bias=True)
        self.cross_attn = self.cross_attention_class(spec, AttentionCore(index, spec.num_layers, always_exact=True))
        self.ffn = GELULinear(spec.dim, spec.ffn_dim, spec.dim)

    def forward(self, stream: ResidualStream, state: ForwardState) -> ResidualStream:
        """One block; the FFN's branch stays queued for whoever reads the stream next.

        What lies between the two attentions runs through ``state.run``, which may compile it; attention, its output
        projections and the text's keys and values stay outside, where backends, guard and caches decide on the host.
        Every ``del`` frees one activation before the next is made: at most q, k, v and the attention's output live
        beside the stream.
        """
        rows = state.modulation.rows
        table = rows + self.modulation.to(device=rows.device, dtype=rows.dtype)

        q, k, v = state.run(self.self_attention_operands, stream, table, state)
        if state.exchange is None and state.num_tokens != k.shape[1]:
            k, v = k[:, : state.num_tokens], v[:, : state.num_tokens]
        y = self.self_attn.attend(q, k, v, state.options)
        del q, k, v
        stream.add(self.self_attn.o(y), table[:, SELF_GATE])
        del y

        q = state.run(self.cross_attention_queries, stream, table, state)
        y = self.cross_attn.attend_context(q, state, self.index)
        del q
        stream.add(self.cross_attn.o(y), None)
        del y

        branch = state.run(self.feed_forward, stream, table, state)
        stream.add(branch, table[:, FFN_GATE])
        return stream

    def self_attention_operands(
        self, stream: ResidualStream, table_R6D: Tensor, state: ForwardState
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Modulated norm of the stream, then q, k and v [B, S, N, E]."""
        table = NormTable(table_R6D[:, SELF_SCALE], table_R6D[:, SELF_SHIFT], modulated=True)
        x = stream.normed(table, state.compute_dtype, self.self_attn.input_quantizer)
        return self.self_attn.project(x, state)

    def cross_attention_queries(self, stream: ResidualStream, table_R6D: Tensor, state: ForwardState) -> Tensor:
        """Learned norm of the stream, then q [B, S, N, E]."""
        weight, bias, handle = self.norm3.fetch(table_R6D)
        assert bias is not None
        table = NormTable(weight[None], bias[None], modulated=False)
        x = stream.normed(table, state.compute_dtype, self.cross_attn.q.input_quantizer)
        self.norm3.release(weight, bias, handle)
        return self.cross_attn.queries(x, state)

    def feed_forward(self, stream: ResidualStream, table_R6D: Tensor, state: ForwardState) -> Tensor:
        """Modulated norm of the stream, then the FFN [B, S, D]."""
        table = NormTable(table_R6D[:, FFN_SCALE], table_R6D[:, FFN_SHIFT], modulated=True)
        x = stream.normed(table, state.compute_dtype, self.ffn.input_quantizer)
        expanded = self.ffn.expand(x)
        del x
        hidden = self.ffn.activated(expanded)
        del expanded
        return self.ffn[2](hidden)
