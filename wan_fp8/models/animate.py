"""Wan2.2 Animate-14B: a reference image moved by a pose video and a face video.

What it has beyond the common transformer: pose latents added to the video's tokens, image tokens beside the text in
cross-attention, and after every fifth block an attention of each latent frame's tokens to the five face tokens of that
frame. Latent frame 0 is the reference image: it has no pose, and face tokens of zero.

B batch, F latent frames, S tokens, D model width, N heads, E head width.
Source: Wan-Video/Wan2.2 ``wan/modules/animate/model_animate.py``.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attention import AttentionCore
from ..errors import InputError
from ..kernels.residual_norm import NormTable, layer_norm_affine
from .blocks import CrossAttention, ForwardOptions, ForwardState, ResidualStream, WanBlock, normed_heads
from .face import FACE_SIZE, FaceEncoder, MotionEncoder
from .layers import Linear, NormWeight, PatchEmbedding
from .over_frames import frames_here
from .specs import ModelSpec
from .wan import Embedded, WanModel

CLIP_WIDTH = 1280
"""Channels of CLIP ViT-H's rows."""
FUSER_EVERY = 5
"""A fuser stands after blocks 0, 5, 10, ..."""
INPUTS = ("pose_latents", "face_pixel_values")


class ImageProjection(nn.Module):
    """CLIP rows [B, 257, 1280] -> [B, 257, D]. Its GELU is the exact one, its norms' eps 1e-5."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = nn.Sequential(
            NormWeight(CLIP_WIDTH, bias=True),
            Linear(CLIP_WIDTH, CLIP_WIDTH),
            nn.Identity(),
            Linear(CLIP_WIDTH, dim),
            NormWeight(dim, bias=True),
        )

    def forward(self, x_BLC: Tensor) -> Tensor:
        first, linear, _, out, last = self.proj
        return _affine(last, out(F.gelu(linear(_affine(first, x_BLC)))))  # type: ignore[arg-type]


def _affine(norm: NormWeight, x: Tensor) -> Tensor:
    weight, bias, handle = norm.fetch(x)
    y = layer_norm_affine(x, weight, bias, eps=1e-5).to(x.dtype)
    norm.release(weight, bias, handle)
    return y


class ImageCrossAttention(CrossAttention):
    """Cross-attention to text and image with one query: two attentions, summed before the output projection."""

    def __init__(self, spec: ModelSpec, core: AttentionCore) -> None:
        super().__init__(spec, core)
        self.k_img = Linear(spec.dim, spec.dim)
        self.v_img = Linear(spec.dim, spec.dim)
        self.norm_k_img = NormWeight(spec.dim)

    def keys_values(self, context_BLD: Tensor, state: ForwardState) -> tuple[Tensor, ...]:
        """Those of the text, then those of the image, which stands before it."""
        image = context_BLD[:, : state.context.image_tokens].contiguous()
        text = context_BLD[:, state.context.image_tokens :].contiguous()
        k = normed_heads(self.norm_k_img, self.k_img(image), None, state, self.head_dim, self.eps)
        return *super().keys_values(text, state), k, self.heads(self.v_img(image))

    def attend_context(self, q_BSNE: Tensor, state: ForwardState, index: int) -> Tensor:
        k, v, k_image, v_image = state.context.keys_values(index, lambda context: self.keys_values(context, state))
        y = self.attend(q_BSNE, k, v, state.options)
        return y + self.attend(q_BSNE, k_image, v_image, state.options)


class AnimateBlock(WanBlock):
    """A block that reads the image as well."""

    cross_attention_class = ImageCrossAttention


class FaceFuser(nn.Module):
    """Attention of every latent frame to its own five face tokens. Queries and keys are normed head by head."""

    def __init__(self, spec: ModelSpec, index: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.eps = spec.num_heads, spec.head_dim, spec.eps
        self.linear1_kv = Linear(spec.dim, 2 * spec.dim)
        self.linear1_q = Linear(spec.dim, spec.dim)
        self.linear2 = Linear(spec.dim, spec.dim)
        self.q_norm = NormWeight(spec.head_dim)
        self.k_norm = NormWeight(spec.head_dim)
        self.inner_attention = AttentionCore(index, spec.num_layers, always_exact=True)

    def forward(self, x_BSD: Tensor, face_BFKD: Tensor, state: ForwardState) -> Tensor:
        """Normed video tokens (those of this rank, padding included) and normed face tokens -> what is added to the
        video, [B, S, D]."""
        tokens = x_BSD.shape[1]
        here = frames_here(state.first_token, tokens, face_BFKD.shape[1], state.task["tokens_per_frame"], state.order)
        if not here.count:
            return torch.zeros_like(x_BSD)
        q = self._normed(self.q_norm, self.linear1_q(x_BSD), state)
        q = here.grouped(q[:, : here.count])
        k, v = self.linear1_kv(face_BFKD[:, here.first : here.last]).chunk(2, dim=-1)
        k = self._normed(self.k_norm, k.flatten(0, 1).contiguous(), state)
        v = v.flatten(0, 1).unflatten(-1, (self.num_heads, self.head_dim))
        y = self.inner_attention(q, k, v, state.options.attention, state.options.step)
        y = here.cut(y.flatten(2))
        return self.linear2(F.pad(y, (0, 0, 0, tokens - here.count)) if tokens > here.count else y)

    def _normed(self, norm: NormWeight, x_BSD: Tensor, state: ForwardState) -> Tensor:
        """[B, S, D] -> [B, S, N, E], RMSNorm over E."""
        rows = x_BSD.unflatten(-1, (self.num_heads, self.head_dim)).flatten(1, 2)
        return normed_heads(norm, rows, None, state, self.head_dim, self.eps).reshape(
            *x_BSD.shape[:2], self.num_heads, self.head_dim
        )


class FaceAdapter(nn.Module):
    """The fusers under their official name."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.fuser_blocks = nn.ModuleList(FaceFuser(spec, index) for index in range(0, spec.num_layers, FUSER_EVERY))


class AnimateModel(WanModel):
    """Animate-14B. ``clip_fea`` is needed; without ``pose_latents`` or ``face_pixel_values`` nothing is added for them.

    Task inputs:
        pose_latents: [B, 16, up to F - 1, H, W] latents of the pose video, for latent frames 1, 2, ...
        face_pixel_values: [B, 3, T, 512, 512] in -1..1, four frames (the first time one) for a latent frame. Frames
            that are missing at the end count as no face; those beyond the video are not used.
    """

    block_class = AnimateBlock
    task_inputs = frozenset({"clip_fea", *INPUTS})

    def __init__(self, spec: ModelSpec) -> None:
        if spec.num_layers % FUSER_EVERY:
            raise InputError(
                f"an Animate transformer has a multiple of {FUSER_EVERY} blocks, one face fuser for {FUSER_EVERY}; "
                f"got {spec.num_layers}"
            )
        super().__init__(spec)
        self.pose_patch_embedding = PatchEmbedding(spec.out_dim, spec.dim, spec.patch_size)
        self.img_emb = ImageProjection(spec.dim)
        self.motion_encoder = MotionEncoder()
        self.face_adapter = FaceAdapter(spec)
        self.face_encoder = FaceEncoder(spec.dim)

    def embed(self, x: Tensor, task_inputs: dict[str, Any], options: ForwardOptions) -> Embedded:
        pose, faces = (task_inputs.get(name) for name in INPUTS)
        rest = {name: value for name, value in task_inputs.items() if name not in INPUTS}
        tokens, grid, positions, task = super().embed(x, rest, options)
        per_frame = grid[1] * grid[2]
        if pose is not None:
            self._check_pose(pose, x)
            added = self.pose_patch_embedding(pose[:, :, : grid[0] - 1].to(self.compute_dtype))
            tokens[:, per_frame : per_frame + added.shape[1]] += added
        if faces is not None:
            self._check_faces(faces, x)
            made = self.once(faces, options, lambda: self._face_tokens(faces, grid[0]), also=grid[0])
            assert isinstance(made, Tensor)
            task["face"] = made.expand(x.shape[0], -1, -1, -1)
            task["tokens_per_frame"] = per_frame
        return tokens, grid, positions, task

    def project_context(self, context: Tensor, clip_fea: Tensor | None) -> Tensor:
        """Image rows and text rows -> [B, 257 + L, D], the image first."""
        if clip_fea is None:
            raise InputError("an Animate model reads its reference image through CLIP as well: connect CLIP vision")
        if clip_fea.ndim != 3 or clip_fea.shape[2] != CLIP_WIDTH or clip_fea.shape[0] not in (1, context.shape[0]):
            raise InputError(
                f"an Animate model takes CLIP ViT-H rows [{context.shape[0]}, 257, {CLIP_WIDTH}], those before the "
                f"last layer; got {list(clip_fea.shape)}"
            )
        text = super().project_context(context, None)
        image = self.img_emb(clip_fea.to(self.compute_dtype))
        return torch.cat([image.expand(text.shape[0], -1, -1), text], dim=1)

    def after_block(self, index: int, stream: ResidualStream, state: ForwardState) -> ResidualStream:
        """The face fuser that stands after block ``index``, where one does and there is a face."""
        face = state.task.get("face")
        if face is None or index % FUSER_EVERY:
            return stream
        rows = state.modulation.rows
        plain = NormTable(rows.new_ones(1, self.spec.dim), rows.new_zeros(1, self.spec.dim), modulated=False)
        x = stream.normed(plain, state.compute_dtype)
        stream.add(self.face_adapter.fuser_blocks[index // FUSER_EVERY](x, face, state), None)
        return stream

    def _face_tokens(self, faces: Tensor, frames: int) -> Tensor:
        """Normed face tokens of every latent frame, the reference's zeros first: [B, F, 5, D]. Every fuser norms them
        alike, so they are normed here."""
        motion = self.motion_encoder(faces.to(self.compute_dtype))
        tokens = self.face_encoder(motion.to(self.compute_dtype))[:, : frames - 1]
        tokens = F.pad(tokens, (0, 0, 0, 0, 1, frames - 1 - tokens.shape[1])).to(self.high_dtype)
        return F.layer_norm(tokens, tokens.shape[-1:], eps=self.spec.eps).to(self.compute_dtype)

    def _check_pose(self, pose: Tensor, x: Tensor) -> None:
        wanted = (self.spec.out_dim, *x.shape[3:])
        if pose.ndim != 5 or (pose.shape[1], *pose.shape[3:]) != wanted or pose.shape[0] not in (1, x.shape[0]):
            raise InputError(
                f"pose_latents must be [{x.shape[0]}, {self.spec.out_dim}, frames, {x.shape[3]}, {x.shape[4]}], as "
                f"large as the video's latents; got {list(pose.shape)}"
            )

    @staticmethod
    def _check_faces(faces: Tensor, x: Tensor) -> None:
        size = (3, FACE_SIZE, FACE_SIZE)
        if faces.ndim != 5 or (faces.shape[1], *faces.shape[3:]) != size or faces.shape[0] not in (1, x.shape[0]):
            raise InputError(
                f"face_pixel_values must be [{x.shape[0]}, 3, frames, {FACE_SIZE}, {FACE_SIZE}] in -1..1; got "
                f"{list(faces.shape)}"
            )
