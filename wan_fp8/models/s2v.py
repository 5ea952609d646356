"""Wan2.2 S2V-14B: a reference image that speaks an audio track, clip after clip.

What it has beyond the common transformer: tokens of the reference image and of the clips before, behind those of the
video and at timestep 0; a pose video added to the video's tokens; and after twelve of the blocks an attention of each
latent frame's tokens to the five audio tokens of that frame. Only the video hears audio and reaches the head.

B batch, F latent frames of the video, S tokens, D model width, N heads, E head width.
Source: Wan-Video/Wan2.2 ``wan/modules/s2v/{model_s2v,audio_utils,motioner,s2v_utils}.py``.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attention import AttentionCore
from ..errors import InputError
from ..kernels.residual_norm import NormTable
from . import functional as wan
from .audio import AUDIO_LAYERS, AUDIO_WIDTH, AudioEncoder
from .blocks import Attention, ForwardOptions, ForwardState, Modulation, ResidualStream, normed_heads
from .functional import RopeOptions
from .layers import Leaf, Linear, PatchEmbedding
from .over_frames import FramesHere, frames_here
from .specs import ModelSpec
from .wan import Embedded, WanModel

INJECTED = (0, 4, 8, 12, 16, 20, 24, 27, 30, 33, 36, 39)
"""Blocks after which audio is heard."""
MOTION_LATENTS = 19
"""Latent frames before the clip that are looked back at: 16 coarsely, 2 less so, the last one in full."""
MOTION_SPLIT = (16, 2, 1)
REFERENCE_TIME = 30
MOTION_TIMES = ((-1,), (-3,), (-19, -14, -9, -4))
"""Rotary time of the motion tokens' frames: full, 2x and 4x. Officially integers between -19 and -4, evenly spaced."""
ADAIN_EPS = 1e-5
INPUTS = ("audio_embed", "reference_latent", "reference_motion", "control_video")


class Rows(Leaf):
    """A small table of vectors."""

    def __init__(self, count: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(count, dim), requires_grad=False)
        self.bias = None

    def forward(self, like: Tensor) -> tuple[Tensor, ...]:
        """Every row [D], in the type and on the device of ``like``."""
        weight, bias, handle = self.fetch(like)
        rows = weight.clone().unbind(0)
        self.release(weight, bias, handle)
        return rows


class FramePacker(nn.Module):
    """Latents before the clip [B, 16, 19, H, W] -> few tokens [B, S, D]: the newest frame as the video's, the two
    before it 2x coarser in all directions, the oldest sixteen 4x. What does not fill a patch is left out."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        pt, ph, pw = spec.patch_size
        self.proj = PatchEmbedding(spec.out_dim, spec.dim, (pt, ph, pw))
        self.proj_2x = PatchEmbedding(spec.out_dim, spec.dim, (2 * pt, 2 * ph, 2 * pw))
        self.proj_4x = PatchEmbedding(spec.out_dim, spec.dim, (4 * pt, 4 * ph, 4 * pw))

    def forward(self, motion_BCFHW: Tensor) -> Tensor:
        missing = MOTION_LATENTS - motion_BCFHW.shape[2]
        whole = F.pad(motion_BCFHW, (0, 0, 0, 0, missing, 0))  # cuts where it is negative
        oldest, older, newest = whole.split(MOTION_SPLIT, dim=2)
        pairs = ((self.proj, newest), (self.proj_2x, older), (self.proj_4x, oldest))
        return torch.cat([proj(_filling(part, proj.patch_size)) for proj, part in pairs], dim=1)


def _filling(x_BCFHW: Tensor, patch: tuple[int, int, int]) -> Tensor:
    rows, columns = (size - size % step for size, step in zip(x_BCFHW.shape[3:], patch[1:], strict=True))
    return x_BCFHW[..., :rows, :columns]


class AdaIN(nn.Module):
    """Shift and scale of the injectors' norm, from a frame's global audio token."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear = Linear(dim, 2 * dim)

    def forward(self, whole_BFD: Tensor, compute_dtype: torch.dtype, high_dtype: torch.dtype) -> NormTable:
        """A row for each latent frame of each sample. Shift comes first."""
        shift, scale = self.linear(F.silu(whole_BFD).to(compute_dtype)).flatten(0, 1).to(high_dtype).chunk(2, dim=1)
        return NormTable(scale, shift, modulated=True)


class Injector(Attention):
    """Attention of every latent frame to its own five audio tokens."""

    def hear(self, x_BSD: Tensor, audio_BFKD: Tensor, here: FramesHere, state: ForwardState) -> Tensor:
        """Normed tokens of the video -> what they hear, [B, S, D]."""
        audio = audio_BFKD[:, here.first : here.last].flatten(0, 1)
        q = normed_heads(self.norm_q, self.q(x_BSD), None, state, self.head_dim, self.eps)
        k = normed_heads(self.norm_k, self.k(audio), None, state, self.head_dim, self.eps)
        v = self.heads(self.v(audio))
        y = self.inner_attention(here.grouped(q), k, v, state.options.attention, state.options.step)
        return self.o(here.cut(y.flatten(2)))


class AudioInjector(nn.Module):
    """The injectors and their norms under their official names, one for each block of ``INJECTED`` that exists."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        blocks = injected_blocks(spec)
        self.injector = nn.ModuleList(
            Injector(spec, AttentionCore(index, spec.num_layers, always_exact=True)) for index in blocks
        )
        self.injector_adain_layers = nn.ModuleList(AdaIN(spec.dim) for _ in blocks)


def injected_blocks(spec: ModelSpec) -> tuple[int, ...]:
    """The blocks of a model of this size after which audio is heard."""
    return tuple(index for index in INJECTED if index < spec.num_layers)


@functools.lru_cache(maxsize=8)
def token_positions(
    grid: tuple[int, int, int], latent: tuple[int, int], references: int, motion: bool, rope: RopeOptions | None
) -> Tensor:
    """Rotary positions [S, 3] fp64 of all tokens: video, reference, motion.

    Coarse tokens stand at whole positions of the full grid, spread evenly from its first to its last and truncated.

    Args:
        grid: frames, rows and columns of the video's tokens.
        latent: rows and columns of the latents.
        references: reference frames.
        motion: whether motion tokens follow.
        rope: stretch and shift of the video's positions.
    """
    _, rows, columns = grid
    parts = [wan.grid_positions(grid, rope)]
    if references:
        parts.append(_at([REFERENCE_TIME + k for k in range(references)], range(rows), range(columns)))
    for times, coarse in zip(MOTION_TIMES, (1, 2, 4), strict=True) if motion else ():
        step = 2 * coarse
        parts.append(_at(times, _spread(rows, latent[0] // step), _spread(columns, latent[1] // step)))
    return torch.cat(parts)


def _spread(length: int, count: int) -> list[int]:
    return torch.linspace(0, length - 1, count, dtype=torch.float64).long().tolist()


def _at(*axes: Any) -> Tensor:
    values = (torch.tensor(list(axis), dtype=torch.float64) for axis in axes)
    return torch.stack(torch.meshgrid(*values, indexing="ij"), dim=-1).reshape(-1, 3)


class S2VModel(WanModel):
    """S2V-14B.

    Task inputs:
        audio_embed: [B, 25, 1024, 4 F] or longer, wav2vec2's layers at one frame a video frame, without the 73 frames
            of lead-in, which are made here. For guidance without audio pass zeros; None: nothing is heard, as in core.
        reference_latent: [B, 16, 1, H, W]. None: no reference tokens, as in core.
        reference_motion: [B, 16, up to 19, H, W] latents of what was shown before; None in the first clip.
        control_video: [B, 16, F, H, W] latents of the pose video; None is a pose of zeros, as officially.
    """

    task_inputs = frozenset(INPUTS)

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__(spec)
        self.cond_encoder = PatchEmbedding(spec.out_dim, spec.dim, spec.patch_size)
        self.casual_audio_encoder = AudioEncoder(spec.dim)
        self.audio_injector = AudioInjector(spec)
        self.trainable_cond_mask = Rows(3, spec.dim)
        self.frame_packer = FramePacker(spec)
        self._injector_after = {block: number for number, block in enumerate(injected_blocks(spec))}

    def embed(self, x: Tensor, task_inputs: dict[str, Any], options: ForwardOptions) -> Embedded:
        audio, reference, motion, pose = (task_inputs.get(name) for name in INPUTS)
        rest = {name: value for name, value in task_inputs.items() if name not in INPUTS}
        tokens, grid, _, task = super().embed(x, rest, options)
        batch, dtype = x.shape[0], self.compute_dtype
        if pose is None:
            pose = x.new_zeros(1, *x.shape[1:])
        self._check_latents("control_video", pose, x, x.shape[2])
        of_video, of_reference, of_motion = self.trainable_cond_mask(tokens)
        parts = [tokens + self.cond_encoder(pose.to(dtype)) + of_video]
        references = 0
        if reference is not None:
            self._check_latents("reference_latent", reference, x)
            references = reference.shape[2]
            parts.append(self.patch_embedding(reference.to(dtype)) + of_reference)
        if motion is not None:
            self._check_latents("reference_motion", motion, x)
            smallest = self.frame_packer.proj_4x.patch_size[1]
            if min(x.shape[3:]) < smallest:
                raise InputError(
                    f"reference_motion needs latents of {smallest} rows and columns or more; got {x.shape[3]} x "
                    f"{x.shape[4]}"
                )
            parts.append(self.frame_packer(motion.to(dtype)) + of_motion)
        if audio is not None:
            self._check_audio(audio, x)
            task["audio"] = self.once(audio, options, lambda: self._audio_tokens(audio, grid[0]), also=grid[0])
            task["frame_of_token"] = torch.arange(batch * grid[0], device=x.device).view(batch, -1)
        positions = token_positions(grid, (x.shape[3], x.shape[4]), references, motion is not None, options.rope)
        task["video_tokens"] = math.prod(grid)
        return torch.cat([part.expand(batch, -1, -1) for part in parts], dim=1), grid, positions, task

    def after_block(self, index: int, stream: ResidualStream, state: ForwardState) -> ResidualStream:
        """The injector that stands after block ``index``, where one does and there is audio."""
        number, audio = self._injector_after.get(index), state.task.get("audio")
        if number is None or audio is None:
            return stream
        tokens, first = stream.settled().shape[1], state.first_token
        frame_of_token = state.task["frame_of_token"]
        frames = frame_of_token.shape[1]
        here = frames_here(first, tokens, frames, state.task["video_tokens"] // frames, state.order)
        if not here.count:  # this rank has none of the video
            return stream
        whole, parts = audio
        injector = self.audio_injector.injector[number]
        assert isinstance(injector, Injector)
        table = self.audio_injector.injector_adain_layers[number](whole, state.compute_dtype, self.high_dtype)
        row = F.pad(here.row_of_token(frame_of_token), (0, tokens - here.count))
        normed = stream.normed_by(table, row, state.compute_dtype, ADAIN_EPS)
        heard = injector.hear(normed[:, : here.count].contiguous(), parts, here, state)
        stream.add(F.pad(heard, (0, 0, 0, tokens - here.count)), None)
        return stream

    def _time_rows(
        self, timestep: Tensor, batch_tokens: torch.Size, grid: tuple[int, int, int]
    ) -> tuple[Tensor, Modulation]:
        """One row more than the video's: that of timestep 0, in which all tokens behind the video are."""
        batch, tokens = batch_tokens
        video = math.prod(grid)
        embedding, given = super()._time_rows(timestep, torch.Size((batch, video)), grid)
        zero, still = super()._time_rows(timestep.new_zeros(1), torch.Size((1, video)), grid)
        row = given.row_of_token
        if row is None:
            row = torch.arange(batch, device=timestep.device)[:, None].expand(batch, video)
        row = F.pad(row, (0, tokens - video), value=embedding.shape[0])
        return torch.cat([embedding, zero]), Modulation(torch.cat([given.rows, still.rows]), row)

    def _audio_tokens(self, audio: Tensor, frames: int) -> tuple[Tensor, Tensor]:
        """Global and local tokens of every latent frame; the encoder runs in ``high_dtype``, as officially."""
        whole, parts = self.casual_audio_encoder(audio[..., : 4 * frames].to(self.high_dtype))
        return whole, parts.to(self.compute_dtype)

    def _check_latents(self, name: str, latents: Tensor, x: Tensor, frames: int | None = None) -> None:
        counted = "frames" if frames is None else frames
        fits = latents.ndim == 5 and (latents.shape[1], *latents.shape[3:]) == (self.spec.out_dim, *x.shape[3:])
        if not fits or latents.shape[0] not in (1, x.shape[0]) or frames not in (None, latents.shape[2]):
            raise InputError(
                f"{name} must be [{x.shape[0]}, {self.spec.out_dim}, {counted}, {x.shape[3]}, {x.shape[4]}], as large "
                f"as the video's latents; got {list(latents.shape)}"
            )

    @staticmethod
    def _check_audio(audio: Tensor, x: Tensor) -> None:
        batch, frames = x.shape[0], 4 * x.shape[2]
        if audio.ndim != 4 or audio.shape[:3] != (batch, AUDIO_LAYERS, AUDIO_WIDTH) or audio.shape[3] < frames:
            raise InputError(
                f"audio_embed must be [{batch}, {AUDIO_LAYERS}, {AUDIO_WIDTH}, {frames}], four frames of wav2vec2's "
                f"layers for a latent frame; got {list(audio.shape)}"
            )
