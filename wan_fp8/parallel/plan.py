"""Which layout to use, from numbers alone; the answer says why.

The arithmetic is the same in every layout, so the choice goes by what has to be sent and by what has to fit. All of it
is an estimate for choosing, not a measurement.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import StrEnum

from ..errors import InputError
from ..models.memory import task_weights
from ..models.specs import ModelSpec
from .dims import ParallelDims
from .needs import TextNeeds, VAENeeds

GIB = 2**30
LINKS = {"nvlink": 250.0, "pcie": 20.0}
"""GB/s that one GPU sends to others while all of them do, where nobody measured."""
MEASURED_TFLOPS = {"H100": {True: 762.0, False: 684.0}, "H200": {True: 735.0, False: 648.0}}
"""By GPU, and whether the linears are FP8: operations of a block at 75,600 tokens over its time, with FlashAttention 3
(``benchmarks/results/dit_i2v-a14b_1280x720_h100.json``, ``_h200.json`` and, in FP8, ``_2x_h200.json``)."""
USABLE = 0.92
"""Share of a GPU's memory that may be planned with: the rest is the CUDA context, NCCL and fragments."""
COMPUTE_BYTES = 2
"""bf16 activations."""
STREAM_BYTES = 4
"""fp32 residual stream."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """What there is."""

    gpus: int
    memory_gib: float
    """Of the smallest GPU."""
    link: str = "nvlink"
    """``nvlink`` or ``pcie``: how the GPUs of a host reach each other."""
    link_gbs: float | None = None
    """Measured GB/s that one GPU sends while all do; None: what is usual for ``link``."""
    gpus_per_host: int | None = None
    """None: all on one host. Weights are sharded inside a host."""
    tflops: float | None = None
    """That one GPU sustains on this work (``measured_tflops``); None: a step's time is not estimated."""

    def __post_init__(self) -> None:
        if self.link not in LINKS:
            raise InputError(f"link is one of {', '.join(LINKS)}; got {self.link!r}")
        if self.gpus < 1 or self.memory_gib <= 0 or (self.link_gbs is not None and self.link_gbs <= 0):
            raise InputError("a machine has at least one GPU, and memory and a link of more than nothing")
        if self.tflops is not None and not self.tflops > 0:
            raise InputError(f"tflops are more than nothing, or None where nobody knows; got {self.tflops}")
        if self.gpus_per_host is not None and (self.gpus_per_host < 1 or self.gpus % self.gpus_per_host):
            raise InputError(f"gpus_per_host must divide the {self.gpus} GPUs; got {self.gpus_per_host}")

    @property
    def gbs(self) -> float:
        """GB/s of the link."""
        return LINKS[self.link] if self.link_gbs is None else self.link_gbs


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """What is to run."""

    spec: ModelSpec
    tokens: int
    """Of one video: latent frames x rows x columns / patch."""
    guidance: bool = True
    """Conditional and unconditional passes in every step."""
    experts: int = 1
    """Models that are resident together: 2 for A14B."""
    fp8: bool = True
    """Block weights of one byte; False: two."""
    frames: int = 21
    """Latent frames of the video."""
    text: TextNeeds | None = None
    """A text encoder that shares the GPUs with the models; None: it runs elsewhere."""
    vae: VAENeeds | None = None
    """The same of a VAE."""

    def __post_init__(self) -> None:
        if self.tokens < 1 or self.experts < 1 or self.frames < 1:
            raise InputError("a workload has at least one token, one expert and one latent frame")


class TextPlace(StrEnum):
    """Where a pool's text encoder lies."""

    FIRST = "first"
    """On the first GPU, beside the models."""
    SHARED = "shared"
    """A part of it on every GPU, beside the models."""
    IN_TURN = "in turn"
    """On the first GPU; it and the models make room for each other."""
    IN_TURN_SHARED = "in turn, shared"
    """A part of it on every GPU, which even alone does not fit one; it and the models make room for each other."""

    @property
    def in_turn(self) -> bool:
        """Whether it does not fit beside the models."""
        return self in (TextPlace.IN_TURN, TextPlace.IN_TURN_SHARED)

    @property
    def shared(self) -> bool:
        """Whether every GPU has a part of it."""
        return self in (TextPlace.SHARED, TextPlace.IN_TURN_SHARED)


@dataclass(frozen=True, slots=True)
class Plan:
    """A choice and its reason."""

    dims: ParallelDims
    reason: str
    weights_gib: float
    """Of each GPU, at rest."""
    activations_gib: float
    sent_gib: float
    """By each GPU in one step, both conditionings included."""
    exchange_seconds: float
    """The same at the link's rate, none of it hidden behind compute."""
    step_seconds: float | None = None
    """A step, all of the exchange added; None where the rate of the GPUs is not known."""
    text: TextPlace | None = None
    """None: there is no text encoder."""

    def __str__(self) -> str:
        step = "" if self.step_seconds is None else f" of {self.step_seconds:.1f} s"
        return (
            f"{self.dims}: {self.reason} Weights {self.weights_gib:.1f} GiB and activations about "
            f"{self.activations_gib:.1f} GiB a GPU; about {self.exchange_seconds:.2f} s of exchange a step{step}."
        )


def plan(machine: Machine, work: Workload) -> Plan:
    """The layout with the least to send; weights replicated where they fit, else sharded over as few ranks as fit. A
    text encoder and a VAE count: weights are sharded sooner than that these and the models make room for each other
    in every prompt, and a text encoder is shared by all GPUs sooner than that.

    Raises:
        InputError: the models do not fit, however they are split; or a part does not even by itself.
    """
    dims = least_sent(machine, work)
    shard, text = fitting(dims, work, machine)
    dims, activations = replace(dims, shard=shard), activation_bytes(dims, work) / GIB
    sent = sent_bytes(dims, work)
    exchange = sent / (machine.gbs * 1e9)
    passes = (2 if work.guidance else 1) / dims.cfg
    return Plan(
        dims=dims,
        reason=" ".join(
            [
                _topology_reason(dims, work),
                _weights_reason(dims, work, machine, activations),
                *parts_reasons(dims, work, machine, text),
            ]
        ),
        weights_gib=weight_bytes(work, dims.shard) / GIB,
        activations_gib=activations,
        sent_gib=sent / GIB,
        exchange_seconds=exchange,
        step_seconds=None
        if machine.tflops is None
        else passes * forward_flops(work) / dims.sequence / (machine.tflops * 1e12) + exchange,
        text=text,
    )


def least_sent(machine: Machine, work: Workload) -> ParallelDims:
    """The layout with the least to send, its weights replicated."""
    return min(_layouts(machine.gpus, work), key=lambda dims: (sent_bytes(dims, work), -dims.ulysses))


def fitting(dims: ParallelDims, work: Workload, machine: Machine) -> tuple[int, TextPlace | None]:
    """Over how few GPUs weights can be sharded in a layout, and where the text encoder goes then.

    Raises:
        InputError: the models do not fit, however they are split; or a part does not even by itself.
    """
    layouts = [replace(dims, shard=number) for number in _shards(machine)]
    for each in layouts:
        place = place_text(each, work, machine)
        beside = place is None or not place.in_turn
        if beside and lacking_bytes(each, work, machine) <= 0:
            return each.shard, place
    alone = replace(work, text=None, vae=None)  # the parts and the models make room for each other
    for each in layouts:
        if lacking_bytes(each, alone, machine) <= 0:
            return each.shard, place_text(each, work, machine)
    least, room = min(weight_bytes(work, each.shard) for each in layouts) / GIB, machine.memory_gib * USABLE
    raise InputError(
        f"{work.experts} x {work.spec.task} needs {least + activation_bytes(dims, work) / GIB:.1f} GiB a GPU when its "
        f"weights are shared by {layouts[-1].shard} GPUs, and {room:.1f} of {machine.memory_gib:g} GiB can be used: "
        "take more GPUs, FP8 weights, or a smaller video"
    )


def place_text(dims: ParallelDims, work: Workload, machine: Machine) -> TextPlace | None:
    """Where the text encoder goes in a layout; None without one.

    Raises:
        InputError: it, or the VAE, does not fit even by itself.
    """
    room, world = machine.memory_gib * USABLE * GIB, dims.world
    if work.vae is not None and work.vae.weights + vae_working(work, world) > room:
        raise InputError(
            f"the VAE needs {(work.vae.weights + vae_working(work, world)) / GIB:.1f} GiB a GPU for this video, one "
            f"latent frame at a time over {world} GPUs, and {room / GIB:.1f} of {machine.memory_gib:g} GiB can be "
            "used: set vae_dtype to bf16, take more GPUs or a smaller video, or leave 'vae' unconnected"
        )
    if work.text is None:
        return None
    for place, ranks in ((TextPlace.FIRST, 1), (TextPlace.SHARED, world)):
        resting, working = work.text.resting(ranks), work.text.working(ranks)
        if lacking_bytes(dims, work, machine, working) + resting <= 0:
            return place
    for place, ranks in ((TextPlace.IN_TURN, 1), (TextPlace.IN_TURN_SHARED, world)):
        if work.text.resting(ranks) + work.text.working(ranks) <= room:
            return place
    needed = (work.text.resting(world) + work.text.working(world)) / GIB
    raise InputError(
        f"the text encoder needs {needed:.1f} GiB a GPU when {world} GPUs share its weights, and {room / GIB:.1f} of "
        f"{machine.memory_gib:g} GiB can be used: load it in fp8, take more GPUs, or leave 'text_encoder' unconnected"
    )


def vae_working(work: Workload, ranks: int) -> int:
    """Bytes that the VAE needs on each rank beside its weights; 0 without one."""
    if work.vae is None:
        return 0
    area = work.tokens * math.prod(work.spec.patch_size) // work.frames
    rows = max(1, math.isqrt(area * 9 // 16))  # 16:9; other shapes of the same area need about as much
    return work.vae.working(work.frames, rows, -(-area // rows), ranks)


def lacking_bytes(dims: ParallelDims, work: Workload, machine: Machine, text_working: int = 0) -> float:
    """What a GPU lacks for the models, the VAE and whatever runs of them; negative: what it has left. Forwards, prompts
    and clips run one at a time."""
    running = max(activation_bytes(dims, work), vae_working(work, dims.world), text_working)
    resting = weight_bytes(work, dims.shard) + (0 if work.vae is None else work.vae.weights)
    return resting + running - machine.memory_gib * USABLE * GIB


def forward_flops(work: Workload) -> float:
    """Operations of the blocks in one forward of one sample: attention among its tokens, linears on them. The text's
    and what is outside the blocks are less than a percent."""
    spec, tokens = work.spec, work.tokens
    linears = 2 * tokens * (6 * spec.dim**2 + 2 * spec.dim * spec.ffn_dim)
    return spec.num_layers * (4 * tokens**2 * spec.dim + linears)


def measured_tflops(gpu_name: str, *, fp8: bool) -> float | None:
    """What a GPU of this name sustains; None where it was not measured. FP8 linears without a figure of their own count
    as 16-bit ones."""
    for name, rates in MEASURED_TFLOPS.items():
        if name in gpu_name:
            return rates.get(fp8, rates[False])
    return None


def sent_bytes(dims: ParallelDims, work: Workload) -> int:
    """What each rank sends in one step, but for gathers of sharded weights."""
    spec, dims_u, dims_r = work.spec, dims.ulysses, dims.ring
    share = _padded(work.tokens, dims.sequence) // dims.sequence
    row = share * spec.dim * COMPUTE_BYTES
    heads = 4 * row * (dims_u - 1) // dims_u
    keys = 2 * row * (dims_r - 1)  # a rank holds the keys of its heads for as many tokens as its Ulysses group has
    stream = share * spec.dim * STREAM_BYTES * (dims.sequence - 1)
    passes = (2 if work.guidance else 1) // dims.cfg
    return passes * (spec.num_layers * (heads + keys) + stream)


def weight_bytes(work: Workload, shard: int) -> int:
    """Weights of each rank at rest, and the two blocks that are gathered at a time where they are sharded."""
    spec = work.spec
    block = (8 * spec.dim**2 + 2 * spec.dim * spec.ffn_dim) * (1 if work.fp8 else 2)
    time = spec.freq_dim * spec.dim + spec.dim**2 + 6 * spec.dim**2
    text = spec.text_dim * spec.dim + spec.dim**2
    inside, outside = task_weights(spec)
    rest = 2 * (time + text + outside)
    blocks = spec.num_layers * block + 2 * inside
    gathered = 2 * blocks // spec.num_layers if shard > 1 else 0
    return work.experts * (-(-blocks // shard) + rest) + gathered


def activation_bytes(dims: ParallelDims, work: Workload) -> int:
    """About what a forward needs beside the weights: the stream of every token before and after the blocks, and on each
    rank's own q, k, v and output with their copies for the exchange, or the FFN's hidden layer."""
    spec = work.spec
    samples = 2 // dims.cfg if work.guidance else 1
    share = -(-work.tokens // dims.sequence)
    stream = 2 * work.tokens * spec.dim * STREAM_BYTES
    inside = share * COMPUTE_BYTES * max(8 * spec.dim, 2 * spec.dim + 2 * spec.ffn_dim)
    gathered = 2 * share * dims.ring * spec.dim * COMPUTE_BYTES if dims.ring > 1 else 0
    return samples * (stream + inside + gathered)


def parts_reasons(dims: ParallelDims, work: Workload, machine: Machine, text: TextPlace | None) -> Iterator[str]:
    """One sentence for each part that shares the GPUs with the models."""
    if work.text is not None and text is not None:
        size = work.text.weights / GIB
        share = work.text.resting(dims.world) / GIB
        words = {
            TextPlace.FIRST: "fits the first GPU beside them",
            TextPlace.SHARED: f"does not fit the first GPU beside them: each GPU holds {share:.1f} GiB of it",
            TextPlace.IN_TURN: "does not fit beside them: for a new prompt it and a model change places",
            TextPlace.IN_TURN_SHARED: f"does not fit beside them: each GPU holds {share:.1f} GiB of it, for a new "
            "prompt in the place of a model",
        }
        yield f"The text encoder of {size:.1f} GiB {words[text]}."
    if work.vae is not None:
        working = vae_working(work, dims.world)
        fits = lacking_bytes(dims, work, machine) <= 0
        yield (
            f"The VAE takes {work.vae.weights / GIB:.1f} GiB on each GPU, and {working / GIB:.1f} GiB or more while it "
            + ("runs." if fits else "runs, for which a model leaves.")
        )


def _layouts(gpus: int, work: Workload) -> Iterator[ParallelDims]:
    for cfg in (1, 2) if work.guidance and gpus % 2 == 0 else (1,):
        ranks = gpus // cfg
        for ulysses in range(1, ranks + 1):
            if ranks % ulysses == 0 and work.spec.num_heads % ulysses == 0:
                yield ParallelDims(cfg=cfg, ulysses=ulysses, ring=ranks // ulysses)


def _shards(machine: Machine) -> list[int]:
    host = machine.gpus_per_host or machine.gpus
    inside = [n for n in range(1, host + 1) if host % n == 0]
    return inside if host == machine.gpus else [*inside, machine.gpus]


def _padded(tokens: int, multiple: int) -> int:
    return tokens + -tokens % multiple


def _topology_reason(dims: ParallelDims, work: Workload) -> str:
    if dims.world == 1:
        return "There is one GPU."
    parts = []
    if dims.cfg == 2:
        parts.append("the two halves of guidance share nothing until the end")
    elif not work.guidance:
        parts.append("without guidance there are no halves to split")
    else:
        parts.append(f"{dims.world} GPUs do not fall into two halves")
    if dims.ulysses > 1:
        parts.append(f"{dims.ulysses} divides the {work.spec.num_heads} heads")
    if dims.ring > 1:
        parts.append(
            f"{dims.sequence} does not divide the {work.spec.num_heads} heads, so that {dims.ring} groups gather keys "
            "and values"
        )
    sentence = ", ".join(parts)
    return f"{sentence[0].upper()}{sentence[1:]}."


def _weights_reason(dims: ParallelDims, work: Workload, machine: Machine, activations: float) -> str:
    kind = "FP8" if work.fp8 else "16-bit"
    models = "one model" if work.experts == 1 else f"{work.experts} experts"
    whole = weight_bytes(work, 1) / GIB
    fits = f"{models} in {kind} take {whole:.1f} GiB beside {activations:.1f} GiB of activations"
    if dims.shard == 1:
        return f"{fits} and fit the {machine.memory_gib:g} GiB of a GPU: weights are replicated."
    alone = replace(work, text=None, vae=None)
    if lacking_bytes(replace(dims, shard=1), alone, machine) <= 0:
        parts = " and ".join(["the text encoder"] * (work.text is not None) + ["the VAE"] * (work.vae is not None))
        return (
            f"{fits} and do not fit the {machine.memory_gib:g} GiB of a GPU together with {parts}: weights are sharded "
            f"over {dims.shard}."
        )
    return f"{fits} and do not fit the {machine.memory_gib:g} GiB of a GPU: weights are sharded over {dims.shard}."
