"""The sampler of Animate-14B: a picture moved by a pose video and a face video, segment after segment."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from comfy_api.latest import io
from torch import Tensor

from ..wan_fp8 import sampling
from ..wan_fp8.errors import InputError
from ..wan_fp8.models.specs import Task
from ..wan_fp8.sampling.framing import inner_size
from . import bridge, conditions
from .choices import check_choice
from .long_video import Frames, SegmentSampler, check_video, decoded, picked
from .missing import require
from .notices import extended, node_id, notice
from .sampler_inputs import MAX_FRAMES, model_inputs, pixel_inputs, schedule_inputs, segment_vae_input
from .samplers import NODE_OF_TASK, Settings
from .schema import SAMPLING, node_schema

ANIMATE = "animate"
REPLACE = "replace"
AS_DRIVEN = "pose video"
SIZES = (AS_DRIVEN, conditions.AREA_720P, conditions.AREA_480P, conditions.AS_GIVEN)
SAME_ASPECT = 0.02
"""Relative difference of two aspects that comes from rounding sizes."""


class WanFP8SampleAnimate(io.ComfyNode):
    """A character that moves like the one in a driving video, or takes its place."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        defaults = sampling.DEFAULTS[Task.ANIMATE]
        return node_schema(
            node_id="WanFP8SampleAnimate",
            display_name=NODE_OF_TASK[Task.ANIMATE],
            category=SAMPLING,
            description="Makes the character of a picture move as a pose video and a face video say (animate), or puts "
            "it in the place of the one in the driving video (replace), with Wan2.2 Animate-14B: a video of any length "
            "in segments that continue each other, decoded as they are made. docs/animate_inputs.md says where pose, "
            "face, background and mask come from.",
            search_aliases=["wan2.2 animate", "character animation", "character replacement", "pose", "wan sampler"],
            inputs=[
                *model_inputs(Task.ANIMATE),
                segment_vae_input(),
                io.ClipVision.Input(
                    "clip_vision",
                    tooltip="CLIP ViT-H, the one of this checkpoint, or clip_vision_h.safetensors from core's Load "
                    "CLIP Vision. Reads the reference image once.",
                ),
                io.Image.Input(
                    "reference_image",
                    tooltip="The character, one picture. Letter-boxed with black to the size of the video; "
                    "transparency is dropped.",
                ),
                io.Image.Input(
                    "pose_video",
                    tooltip="Skeletons drawn on black, one a frame. Its length is the video's, and in mode replace its "
                    "size should be the background's.",
                ),
                io.Combo.Input(
                    "mode",
                    options=[ANIMATE, REPLACE],
                    default=ANIMATE,
                    tooltip="Default animate: the character moves in front of its own background. replace: it takes "
                    "the place of the one in the driving video, which needs background_video and character_mask, and "
                    "the relighting LoRA on the model, as published.",
                ),
                io.Combo.Input(
                    "size",
                    options=list(SIZES),
                    default=AS_DRIVEN,
                    tooltip="How large the video is. Default pose video: as large as that, as published "
                    "(wan/animate.py). 720p area and 480p area keep its aspect within 1280 x 720 or 832 x 480 pixels "
                    "in total, by the rule of the published preprocessing. 'width x height' takes the two numbers "
                    "below. Driving videos of another size are scaled and letter-boxed.",
                ),
                *pixel_inputs(Task.ANIMATE, when=f"Only for size '{conditions.AS_GIVEN}'. "),
                io.Int.Input(
                    "length",
                    default=0,
                    min=0,
                    max=MAX_FRAMES * 64,
                    tooltip="Frames of the video. Default 0: as long as pose_video, as published. Of a longer one the "
                    "driving videos run back and forth. Time is proportional to the segments; host memory grows by 11 "
                    "MB a frame at 720p, GPU memory does not.",
                ),
                io.Int.Input(
                    "segment",
                    default=defaults.frames,
                    min=1,
                    max=MAX_FRAMES,
                    step=4,
                    tooltip=f"Frames that one run makes, 4n + 1. Default {defaults.frames}: the published one "
                    "(wan/configs/wan_animate_14B.py). Fewer take less GPU memory, and more of them are needed.",
                ),
                io.Int.Input(
                    "overlap",
                    default=1,
                    min=1,
                    max=5,
                    step=4,
                    tooltip="Frames that a segment takes over from the one before it: 1 or 5 (--refert_num of "
                    "generate.py). Default 1: the published examples'. 5 joins more smoothly and makes 4 frames fewer "
                    "a segment.",
                ),
                *schedule_inputs(Task.ANIMATE),
                io.Image.Input(
                    "face_video",
                    optional=True,
                    tooltip="The driving face, cropped, one a frame, as many as pose_video has; 512 x 512 or scaled to "
                    "it. Black where there is no face. Without it the face is not driven.",
                ),
                io.Image.Input(
                    "background_video",
                    optional=True,
                    tooltip="For mode replace: the driving video with its character cut out (black), as many frames as "
                    "pose_video.",
                ),
                io.Mask.Input(
                    "character_mask",
                    optional=True,
                    tooltip="For mode replace: 1 where the character was, as many frames as pose_video; of any size "
                    "and the background's aspect.",
                ),
                io.Float.Input(
                    "fps",
                    default=float(defaults.fps),
                    min=1.0,
                    max=240.0,
                    step=0.001,
                    round=0.001,
                    tooltip=f"Only for the file that a cancelled run leaves. Default {defaults.fps}: the published one "
                    "(wan/configs/wan_animate_14B.py). Free.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="images", tooltip="The frames of the video."),
                io.Latent.Output(
                    display_name="latent", tooltip="Latents of the last segment, without those of the reference."
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        positive: Any,
        negative: Any,
        vae: Any,
        clip_vision: Any,
        reference_image: Tensor,
        pose_video: Tensor,
        mode: str,
        size: str,
        width: int,
        height: int,
        length: int,
        segment: int,
        overlap: int,
        face_video: Tensor | None = None,
        background_video: Tensor | None = None,
        character_mask: Tensor | None = None,
        fps: float = 30.0,
        **settings: Any,
    ) -> io.NodeOutput:
        chosen = Settings(**settings)
        reference = conditions.one_image(reference_image, "reference_image")
        driving = Driving(pose=pose_video, face=face_video, mode=mode, background=background_video, mask=character_mask)
        width, height = driving.video_size(size, width, height)
        count = length or driving.frames
        conditions.check_vae(vae, Task.ANIMATE)
        frames = Frames(count, width, height, working_frames=4 * segment)
        segments = sampling.animate_segments(count, segment, overlap)
        sampler = SegmentSampler(Task.ANIMATE, model, positive, negative, chosen)
        lines = [f"video of {width}x{height} pixels, {count} frames, {len(segments)} segment(s)"]
        warnings = driving.warnings(width, height)
        shown = notice(node_id(cls), [*lines, *warnings], level=logging.WARNING if warnings else logging.INFO)
        with frames.kept_if_cut_short("animate", fps):
            run = _Run(sampler, vae, require(clip_vision), driving, segment, (width, height))
            latent = run.make(reference, segments, frames)
        return io.NodeOutput(frames.images, {"samples": latent}, ui=extended(shown, bridge.kept_words()))


@dataclass(frozen=True, kw_only=True)
class Driving:
    """The videos that say how the character moves.

    Raises:
        InputError: they do not belong together, or one is missing.
    """

    pose: Tensor
    face: Tensor | None
    mode: str
    background: Tensor | None
    mask: Tensor | None

    def __post_init__(self) -> None:
        check_choice("mode", self.mode, [ANIMATE, REPLACE])
        check_video(self.pose, "pose_video")
        if self.face is not None:
            check_video(self.face, "face_video", frames=self.frames, of="pose_video")
        if self.mode == ANIMATE:
            return
        if self.background is None or self.mask is None:
            missing = "background_video" if self.background is None else "character_mask"
            raise InputError(
                f"mode 'replace' needs background_video and character_mask, and {missing} is not connected: connect "
                "it, or set mode to 'animate'"
            )
        check_video(self.background, "background_video", frames=self.frames, of="pose_video")
        if self.mask.ndim != 3 or 0 in self.mask.shape or self.mask.shape[0] not in (1, self.frames):
            raise InputError(
                f"character_mask takes one mask, or {self.frames} as pose_video has frames, [frames, height, width]; "
                f"got {list(self.mask.shape)}: make it from the same driving video"
            )
        for name, shape in (("pose_video", self.pose.shape[1:3]), ("character_mask", self.mask.shape[1:])):
            theirs, ours = shape[1] / shape[0], self.background.shape[2] / self.background.shape[1]
            if abs(theirs / ours - 1) > SAME_ASPECT:
                raise InputError(
                    f"{name} is {shape[1]}x{shape[0]} and background_video {self.background.shape[2]}x"
                    f"{self.background.shape[1]}, which is another aspect: make both from the same driving video"
                )

    @property
    def frames(self) -> int:
        """Of each driving video."""
        return self.pose.shape[0]

    def video_size(self, size: str, width: int, height: int) -> tuple[int, int]:
        """Width and height of the video in pixels. InputError for an unknown rule or a size that is not allowed."""
        check_choice("size", size, SIZES)
        rows, columns = self.pose.shape[1:3]
        if size == AS_DRIVEN:
            multiple = sampling.LAYOUTS[Task.ANIMATE].multiple
            if rows % multiple or columns % multiple:
                raise InputError(
                    f"pose_video is {columns}x{rows} pixels, and a video has multiples of {multiple}: set size to "
                    f"'{conditions.AREA_720P}' or '{conditions.AREA_480P}', or to '{conditions.AS_GIVEN}'"
                )
            return columns, rows
        if size != conditions.AS_GIVEN:
            return sampling.animate_size(columns, rows, conditions.AREAS[size])
        sampling.check_size(Task.ANIMATE, width, height)
        return width, height

    def warnings(self, width: int, height: int) -> list[str]:
        """What the user may not have meant."""
        found = []
        rows, columns = self.pose.shape[1:3]
        if inner_size(columns, rows, width, height) != (width, height):
            found.append(f"pose_video of {columns}x{rows} is letter-boxed to {width}x{height}")
        if self.frames == 1:
            found.append("pose_video has one frame: the character stands still")
        if self.face is not None and self.face.shape[1] != self.face.shape[2]:
            found.append(f"face_video of {self.face.shape[2]}x{self.face.shape[1]} is cropped to its middle square")
        if self.mode == ANIMATE and (self.background is not None or self.mask is not None):
            found.append("background_video and character_mask are for mode 'replace': not used")
        return found


@dataclass(frozen=True)
class _Run:
    """Everything that the segments of one video share."""

    sampler: SegmentSampler
    vae: Any
    clip_vision: Any
    driving: Driving
    length: int
    """Frames of a segment."""
    size: tuple[int, int]
    """Width and height of the video."""

    def make(self, reference: Tensor, segments: list[sampling.Segment], frames: Frames) -> Tensor:
        """Run every segment and store what it makes; returns the last one's latents.

        Args:
            reference: [3, h, w], 0..1.
        """
        picture = sampling.letterbox(reference[None], *self.size, mode="bilinear")[0] * 2 - 1
        rows = bridge.image_rows(self.clip_vision, picture)
        first = conditions.encode(self.vae, picture[:, None])
        shape = (1, first.shape[1], 1 + sampling.latent_frames(self.length), *first.shape[3:])
        images = latent = torch.empty(0)
        for segment in segments:
            bridge.stop_if_cancelled()
            known = images[-segment.known :] if segment.known else images[:0]
            values: dict[str, Any] = {**self.conditioning(segment, known, first), "clip_vision_output": rows}
            negative: dict[str, Any] = {}
            if "face_video_pixels" in values and self.sampler.guided:
                negative["face_video_pixels"] = torch.full_like(values["face_video_pixels"], -1)
            latent = self.sampler.run(shape, values, negative, segment.index, len(segments), hidden=1)[:, :, 1:]
            images = decoded(self.vae, latent)
            frames.add(images[segment.kept])
        return latent

    def conditioning(self, segment: sampling.Segment, known: Tensor, first: Tensor) -> dict[str, Tensor]:
        """What a segment is told, in the form that core's Animate model takes.

        Args:
            known: [overlap, H, W, 3] of the segment before, 0..1; none for the first one.
            first: Latents of the reference.
        """
        driving, count = self.driving, known.shape[0]
        place = [sampling.reflected(segment.start + k, driving.frames) for k in range(self.length)]
        given, background = torch.zeros(self.length, 3, *reversed(self.size)), None
        if driving.mode == REPLACE:
            assert driving.background is not None
            given = sampling.letterbox(picked(driving.background, place), *self.size) * 2 - 1
            background = self.background_mask(place)
        given[:count] = known.reshape(count, *reversed(self.size), 3).movedim(-1, 1) * 2 - 1
        mask = sampling.animate_mask(self.length, count, first.shape[3], first.shape[4], background)
        pose = sampling.letterbox(picked(driving.pose, place), *self.size) * 2 - 1
        values = {
            "concat_latent_image": torch.cat([first, conditions.encode(self.vae, given.transpose(0, 1))], dim=2),
            "concat_mask": 1 - mask[None],
            "pose_video_latent": conditions.encode(self.vae, pose.transpose(0, 1)),
        }
        if driving.face is not None:
            faces = sampling.face_crops(picked(driving.face, place)).transpose(0, 1)[None]
            values["face_video_pixels"] = bridge.where_it_computes(self.sampler.model, faces)
        return values

    def background_mask(self, place: list[int]) -> Tensor:
        """[frames, h, w], 1 where the background is seen: around the character, and beside a letter-boxed video."""
        mask = self.driving.mask
        assert mask is not None
        character = mask[place if mask.shape[0] > 1 else [0] * len(place)][:, None].to(torch.float32)
        return 1 - sampling.letterbox(character, *_same_frame(mask, self.size), mode="nearest")[:, 0]


def _same_frame(mask: Tensor, size: tuple[int, int]) -> tuple[int, int]:
    """Width and height of the frame around a mask of its own size that has the video's aspect: where the video is
    letter-boxed, so is its mask."""
    rows, columns = mask.shape[1:]
    width, height = size
    if columns * height >= width * rows:
        return columns, round(columns * height / width)
    return round(rows * width / height), rows
