"""What one rank of a pool does for a text encoder and a VAE: one of each is kept, until others need the room."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ..errors import InputError
from ..models.text_encoder import TextEncoder, load_text_encoder
from ..models.vae22 import DESIGNS, LOADERS, AnyVAE
from . import plain
from .dims import ParallelDims, build_groups
from .fsdp import shard_encoder
from .needs import RESULT_COPIES, TextNeeds
from .source import TextSource, VAESource
from .vae import GROUP_COPIES, MOST_VALUES, TIME_STRIDE, SplitVAE, values_of_a_frame
from .wire import Json

log = logging.getLogger("wan_fp8")

SAFE_SHARE = 0.7
"""Of the free memory, that groups of frames may fill: what a kernel takes for itself is not known."""

Answer = tuple[Json, dict[str, Tensor]]
Kind = TypeVar("Kind", TextSource, VAESource)


class Rank(Protocol):
    """What this needs of ``serving.Serving``."""

    device: torch.device
    control: dist.ProcessGroup
    rank: int
    world: int
    handed: dict[str, Tensor]
    stage: Callable[[str], None]

    def agreed(self, what: str) -> AbstractContextManager[None]: ...

    def make_room(self, wanted: int) -> list[str]: ...

    def free_bytes(self) -> int: ...

    def free(self) -> None: ...


class Parts:
    """Text encoder and VAE of one rank."""

    def __init__(self, rank: Rank) -> None:
        self._rank = rank
        self._vae: tuple[VAESource, AnyVAE] | None = None
        self._encoder: tuple[tuple[TextSource, bool], TextEncoder] | None = None
        """And whether it is sharded; if not, it is on rank 0 only."""

    def labels(self) -> list[str]:
        """What is held, by name."""
        sources = [held[0][0] for held in [self._encoder] if held] + [held[0] for held in [self._vae] if held]
        return [source.label for source in sources]

    def drop(self, *, vae: bool) -> None:
        """Forget the text encoder, which is large; ``vae``: the other one too."""
        self._encoder = None
        if vae:
            self._vae = None

    def yield_to(self, wanted: int) -> None:
        """Let the text encoder go where ``wanted`` bytes would not fit beside it; it is read again for the next
        prompt that is new."""
        if self._encoder is not None and self._rank.free_bytes() < wanted:
            log.info("%s leaves the GPU for a model", self._encoder[0][0].label)
            self._encoder = None
            self._rank.free()

    # ---- requests ----------------------------------------------------------------------------------------------------

    def holds(self, fields: Json) -> Answer:
        """Whether a VAE is here."""
        return {"holds": self._vae is not None and self._vae[0] == plain.from_plain(fields["source"])}, {}

    def run_vae(self, fields: Json, tensors: dict[str, Tensor]) -> Answer:
        """Encode or decode one clip over all ranks, or on rank 0 where it has fewer latent rows than there are ranks.

        Raises:
            InputError: no clip.
            CheckpointError: the file is no Wan VAE, or the one of the other design.
        """
        source, what, x, me = _source(fields, VAESource), fields["do"], tensors["x"], self._rank
        rows, columns, values = _checked(source, what, x)
        evicted = [] if self._has(source) else self._read_vae(source)
        assert self._vae is not None
        vae = self._vae[1]
        shared = rows >= me.world
        mine = vae.stride * (-(-rows // me.world) if shared else rows)
        one = values_of_a_frame(vae.widest, 1, mine, vae.stride * columns)
        size, whole = x.element_size(), RESULT_COPIES * values * x.element_size()
        self._give_back()  # what forwards left, in pieces of other sizes
        evicted += me.make_room(GROUP_COPIES * one * size + whole)
        if not shared and me.rank:
            return {"evicted": evicted}, {}
        me.stage(f"{what[:-1]}ing a video of {tuple(x.shape[2:])}" + (f" over {me.world} ranks" if shared else ""))
        room = (int(SAFE_SHARE * self._least_free(shared)) - whole) // (GROUP_COPIES * size)
        group = dist.group.WORLD if shared and me.world > 1 else None
        split = SplitVAE(vae, group, max(one, min(room, MOST_VALUES)))
        y = split.encode(x) if what == "encode" else split.decode(x)
        found = {"y": y.contiguous()} if me.rank == 0 else {}
        del y, split
        self._give_back()  # gigabytes that others may want
        return {"evicted": evicted}, found

    def run_text(self, fields: Json) -> Answer:
        """Encode one prompt on rank 0, or on all ranks where its weights are sharded over them.

        Raises:
            CheckpointError: the file holds no usable text encoder, or came without a tokenizer.
        """
        source, me = _source(fields, TextSource), self._rank
        sharded = bool(fields["sharded"]) and me.world > 1
        mine, evicted = sharded or me.rank == 0, []
        if self._somebody(mine and (self._encoder is None or self._encoder[0] != (source, sharded))):
            self._encoder = None
            me.free()
            needs, ranks = TextNeeds.of(source), me.world if sharded else 1
            evicted = me.make_room(needs.resting(ranks) + needs.working(ranks))
            weights = None
            if sharded:
                with torch.inference_mode(False):  # models with this layout share the groups, and are read outside it
                    weights = build_groups(ParallelDims(ring=me.world, shard=me.world), me.device.type).weights
            with me.agreed(f"read {source.label}"):
                if mine:
                    self._read_encoder(source, weights)
        rows, lost = None, 0
        with me.agreed("encode a prompt"):
            if mine:
                assert self._encoder is not None
                encoder = self._encoder[1]
                me.stage("encoding a prompt")
                prompt = encoder.tokenize(fields["text"])
                if not sharded:
                    rows, lost = encoder.encode_prompt(prompt), prompt.lost_tokens
        if sharded:  # collectives are inside: not while ranks may still part
            rows, lost = encoder.encode_prompt(prompt), prompt.lost_tokens
        return {"evicted": evicted, "lost": lost}, {"rows": rows} if rows is not None and me.rank == 0 else {}

    # ---- pieces ------------------------------------------------------------------------------------------------------

    def _has(self, source: VAESource) -> bool:
        return self._vae is not None and self._vae[0] == source

    def _read_vae(self, source: VAESource) -> list[str]:
        me = self._rank
        self._vae = None
        evicted = me.make_room(sum(size for _, size, _ in source.stamp))
        with me.agreed(f"read {source.label}"):
            me.stage(f"reading {source.label}")
            if source.handed:
                state, me.handed = me.handed, {}
                vae = LOADERS[source.version](state, source.dtype, me.device)
            else:
                vae = LOADERS[source.version](source.path, source.dtype, me.device)
        self._vae = source, vae  # now that every rank has read it
        return evicted

    def _read_encoder(self, source: TextSource, weights: DeviceMesh | None) -> None:
        """With ``weights``, through host memory: no GPU ever holds more of it than its part and one block."""
        me = self._rank
        me.stage(f"reading {source.label}")
        place = me.device if weights is None else "cpu"
        with torch.inference_mode(weights is None):  # FSDP keeps views that no inference tensor may have
            encoder = load_text_encoder(source.path, source.dtype, place, source.tokenizer)
            if weights is not None:
                shard_encoder(encoder.model, weights, me.device)
        self._encoder = (source, weights is not None), encoder

    def _give_back(self) -> None:
        """Of the GPU's memory, what no tensor is in."""
        if self._rank.device.type == "cuda":
            torch.cuda.empty_cache()

    def _somebody(self, mine: bool) -> bool:
        """Whether it is so on any rank."""
        value = torch.tensor([float(mine)])
        dist.all_reduce(value, dist.ReduceOp.MAX, group=self._rank.control)
        return bool(value.item())

    def _least_free(self, shared: bool) -> int:
        """Bytes on the fullest of the ranks that take part."""
        room = torch.tensor([self._rank.free_bytes()])
        if shared:
            dist.all_reduce(room, dist.ReduceOp.MIN, group=self._rank.control)
        return int(room)


def _source(fields: Json, kind: type[Kind]) -> Kind:
    """
    Raises:
        InputError: another kind of source.
    """
    source = plain.from_plain(fields["source"])
    if not isinstance(source, kind):
        raise InputError(f"a pool reads this from a {kind.__name__}; got {type(source).__name__}")
    return source


def _checked(source: VAESource, what: str, x: Tensor) -> tuple[int, int, int]:
    """Latent rows and columns, and the values of the whole result or input, whichever has more.

    Raises:
        InputError: no design of that name, or no clip of its.
    """
    design, shape = DESIGNS.get(source.version), tuple(x.shape)
    if design is None:
        raise InputError(f"the design of a VAE is one of {', '.join(DESIGNS)}; got {source.version!r}")
    stride = design.stride
    fits = len(shape) == 5 and shape[0] == 1 and 0 not in shape and x.is_floating_point()
    if what == "decode" and fits and shape[1] == design.channels:
        _, _, frames, rows, columns = shape
        return rows, columns, 3 * (TIME_STRIDE * (frames - 1) + 1) * rows * columns * stride**2
    whole = fits and shape[1] == 3 and (shape[2] - 1) % TIME_STRIDE == shape[3] % stride == shape[4] % stride == 0
    if what == "encode" and whole:
        return shape[3] // stride, shape[4] // stride, x.numel()
    raise InputError(
        f"a pool's Wan{source.version} VAE takes one clip, {design.channels} x F x H x W to decode or 3 x (4n + 1) x "
        f"{stride}H x {stride}W to encode; asked to {str(what)[:20]} {shape} of {x.dtype}"
    )
