"""What a forward needs besides the weights, so that core evicts no more than it must.

Core's own estimate scales with the number of latent pixels times a constant tuned to its own blocks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from .specs import ModelSpec, Task

OVERHEAD = 1.3
"""Rotary tables, workspaces of the GEMM library, and what PyTorch's allocator holds in pieces that fit nothing: on a
card that is full nearly all of it, since a block's activations have five sizes, and the pieces that one leaves are too
small for the next. tests/unit/test_memory_walk.py follows the allocator."""
SEGMENT, SHARED_SEGMENT = 2 << 20, 10 << 20
"""PyTorch's allocator asks CUDA for multiples of the first for every tensor above the second, and gives a remainder of
1 MiB or less to nobody else."""

IMAGE_ROWS = 257
"""Of CLIP, which Animate reads beside the text."""
FACE_WEIGHTS, AUDIO_WEIGHTS = 41 * 10**6, 95 * 10**6
"""Parameters of Animate's motion and face encoders, and of S2V's audio encoder, at the released width."""
FACE_BYTES = 10**9
"""Animate's face video of 77 frames in bf16, and what its motion encoder holds for eight of them."""


def extra_tokens(spec: ModelSpec, cond_shapes: Mapping[str, Sequence[Sequence[int]]] | None) -> int:
    """Tokens behind the video's, by the shapes of core's conditioning: the reference's latent frame, and one and a half
    of it for the motion before the clip (the last frame in full, and twice a quarter)."""
    if spec.task is not Task.S2V or not cond_shapes:
        return 0
    per_frame, found = 0, 0.0
    for shape in cond_shapes.get("reference_latent", ()):
        per_frame = math.prod(shape[2:]) // math.prod(spec.patch_size)
        found = max(found, per_frame)
    for shape in cond_shapes.get("reference_motion", ()):
        found = max(found, per_frame + 1.5 * math.prod(shape[-2:]) / math.prod(spec.patch_size))
    return math.ceil(found)


@dataclass(frozen=True, slots=True)
class ForwardNeeds:
    """Bytes beside the weights, by what they are for."""

    blocks: int
    """The residual stream and the activations of a block, or the stream and both ends' patches, times ``OVERHEAD``."""
    time: int
    """Before the blocks: the stream, and the time projection's weight in fp32 (0.6 GiB in A14B), times ``OVERHEAD``."""
    faces: int
    """Before the blocks: Animate's face video and encoder."""
    text: int
    """Keys and values of every block for the prompts of a run: they stay."""
    residuals: int
    """Of a cache of steps: they stay."""

    @property
    def total(self) -> int:
        """What stays, and the largest of what comes and goes."""
        return max(self.blocks, self.time, self.faces) + self.text + self.residuals


def forward_needs(
    spec: ModelSpec,
    input_shape: Sequence[int],
    dtype: torch.dtype,
    *,
    fused: bool = True,
    low_precision_attention: bool = False,
    kept_residuals: int = 0,
    extra_tokens: int = 0,
    quantized: bool = False,
) -> ForwardNeeds:
    """What a forward for latents [B, C, F, H, W] needs, conditioning channels not counted.

    At the peak of a block four tensors of the model's width stand in ``dtype`` (q, k, v and the attention's output) or
    the FFN's input and hidden layer, beside the float32 residual stream. Measured at 832x480x81 and the widths of
    A14B: 1.88 GiB, of which this formula without its overhead gives 1.87; at 1280x720x81 4.49 and 4.44 GiB, with
    attention in FP8 5.57 and 5.52 GiB (six blocks and one prompt: benchmarks/results/dit_i2v-a14b_*_h200.json).

    Args:
        fused: False where the eager references run: each norm or rotary turn then holds float32 copies of its operand.
        low_precision_attention: q, k and v are held in one byte as well while attention runs.
        extra_tokens: What S2V puts behind the video's tokens, for each sample: reference and motion.
        kept_residuals: Activations that a cache of steps keeps of each conditioning, cond and uncond.
        quantized: A recipe casts what linears read: the FFN's hidden layer stands beside its copy in one byte.
    """
    batch = input_shape[0]
    frames, rows, columns = (
        math.ceil(size / patch) for size, patch in zip(input_shape[-3:], spec.patch_size, strict=True)
    )
    tokens = batch * (frames * rows * columns + extra_tokens)
    width = dtype.itemsize
    stream = 4 * spec.dim
    attention = 4 * spec.dim * width + (3 * spec.dim if low_precision_attention else 0)
    ffn = max((spec.dim + spec.ffn_dim) * width, spec.ffn_dim * (width + 1) if quantized else 0)
    block = max(attention, ffn) + (0 if fused else 3 * 4 * spec.dim)
    ends = 4 * (spec.in_dim + 2 * spec.out_dim) * math.prod(spec.patch_size) + 4 * spec.dim
    # Keys and values of the text stay for the whole run: two prompts, in one batch or one after the other.
    rows_read = 512 + (IMAGE_ROWS if spec.task is Task.ANIMATE else 0)
    return ForwardNeeds(
        blocks=int(OVERHEAD * tokens * (stream + max(block, ends))),
        time=int(OVERHEAD * (tokens * stream + 4 * 6 * spec.dim**2)),
        faces=FACE_BYTES if spec.task is Task.ANIMATE else 0,
        text=max(2, batch) * spec.num_layers * 2 * rows_read * spec.dim * width,
        residuals=kept_residuals * max(2, batch) * (tokens // batch) * spec.dim * width,
    )


def rounding_bytes(sizes: Iterable[int]) -> int:
    """Bytes that tensors of these sizes take from PyTorch's allocator beyond their own: 2.4 % of A14B's weights in FP8,
    of which a linear [5120, 5120] is 25 MiB and takes 26. Core counts weights by their sizes alone."""
    return sum(-size % SEGMENT for size in sizes if size > SHARED_SEGMENT)


def task_weights(spec: ModelSpec) -> tuple[int, int]:
    """Parameters that a task has beyond the common transformer, inside its blocks and outside of them; no recipe
    converts them, so that each takes two bytes. Animate's 3.0 billion: keys and values of the image in every block,
    face fusers, encoders. S2V's 2.0 billion: audio injectors with their norms, the audio encoder, motion tokens."""
    if spec.task is Task.ANIMATE:
        from .animate import CLIP_WIDTH, FUSER_EVERY

        fusers = spec.num_layers // FUSER_EVERY * 4 * spec.dim**2
        return spec.num_layers * 2 * spec.dim**2, fusers + CLIP_WIDTH * (CLIP_WIDTH + spec.dim) + FACE_WEIGHTS
    if spec.task is Task.S2V:
        from .s2v import injected_blocks

        packers = (1 + 8 + 64) * spec.out_dim * math.prod(spec.patch_size) * spec.dim
        return 0, len(injected_blocks(spec)) * 6 * spec.dim**2 + packers + AUDIO_WEIGHTS
    return 0, 0


def weight_bytes(spec: ModelSpec, width: int) -> int:
    """Bytes of one transformer at rest, with ``width`` bytes for each weight of a block's linears and two for the rest.

    A14B in bf16 with six blocks: 4.35 GiB, of which ``benchmarks/dit.py`` measures 4.36.
    """
    block = 8 * spec.dim**2 + 2 * spec.dim * spec.ffn_dim
    time = (spec.freq_dim + 7 * spec.dim) * spec.dim
    text = (spec.text_dim + spec.dim) * spec.dim
    ends = (spec.in_dim + spec.out_dim) * math.prod(spec.patch_size) * spec.dim
    return spec.num_layers * block * width + 2 * (time + text + ends + sum(task_weights(spec)))
