"""The sampler of S2V-14B: a picture that speaks or sings a sound, clip after clip."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Any

import torch
from comfy_api.latest import io
from torch import Tensor

from ..wan_fp8 import sampling
from ..wan_fp8.errors import InputError
from ..wan_fp8.models.audio_encoder import (
    FEATURE_RATE,
    SAMPLE_RATE,
    VIDEO_RATE,
    check_sound,
    clip_count,
    on_video_frames,
)
from ..wan_fp8.models.specs import Task
from . import bridge, conditions
from .choices import check_choice
from .long_video import Frames, SegmentSampler, check_video, decoded, picked
from .missing import require
from .notices import extended, node_id, notice
from .sampler_inputs import model_inputs, pixel_inputs, schedule_inputs, segment_vae_input
from .samplers import NODE_OF_TASK, Settings
from .schema import SAMPLING, node_schema

AREA_1024 = "1024 x 704 area"
AREAS = {**conditions.AREAS, AREA_1024: 1024 * 704}
SIZES = (conditions.AREA_720P, AREA_1024, conditions.AREA_480P, conditions.AS_GIVEN)
SMALLEST = 64
"""Pixels a side: the coarsest tokens of the frames before a clip are that large."""
MAX_CLIPS = 10_000


class WanFP8SampleS2V(io.ComfyNode):
    """A picture and a sound to a video that belongs to both."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        defaults = sampling.DEFAULTS[Task.S2V]
        return node_schema(
            node_id="WanFP8SampleS2V",
            display_name=NODE_OF_TASK[Task.S2V],
            category=SAMPLING,
            description="Makes the person or animal of a picture speak, sing or play a sound with Wan2.2 S2V-14B: clip "
            "after clip until the sound ends, each one looking back at the last, decoded as they are made. A pose "
            "video may say how the body moves.",
            search_aliases=[
                "wan2.2 s2v",
                "speech to video",
                "sound to video",
                "lip sync",
                "talking head",
                "wan sampler",
            ],
            inputs=[
                *model_inputs(Task.S2V),
                segment_vae_input(),
                io.Image.Input(
                    "reference_image",
                    tooltip="Who is seen, one picture; transparency is dropped. Scaled and cropped around its centre, "
                    "with black bars where its aspect leaves some, as published.",
                ),
                io.Combo.Input(
                    "size",
                    options=list(SIZES),
                    default=conditions.AREA_720P,
                    tooltip="How large the video is. Default 720p area: the published rule (wan/speech2video.py), "
                    "which keeps the picture's aspect in multiples of 64 within 1280 x 720 pixels in total, and never "
                    "enlarges; 1024 x 704 and 480p area likewise, the last one about four times as fast. 'width x "
                    "height' takes the two numbers below.",
                ),
                *pixel_inputs(Task.S2V, when=f"Only for size '{conditions.AS_GIVEN}'. "),
                io.Int.Input(
                    "clips",
                    default=0,
                    min=0,
                    max=MAX_CLIPS,
                    tooltip="Clips that are made at most. Default 0: until the sound ends, as published (--num_clip of "
                    "generate.py). Time is proportional; host memory grows by 11 MB a frame at 720p, GPU memory does "
                    "not.",
                ),
                io.Int.Input(
                    "clip_frames",
                    default=defaults.frames,
                    min=4,
                    max=4096,
                    step=4,
                    tooltip=f"Frames of a clip, a multiple of 4. Default {defaults.frames}: the published one "
                    "(--infer_frames of generate.py), 5 s; the first clip loses 3 of them. Fewer take less GPU memory, "
                    "and more clips are needed.",
                ),
                *schedule_inputs(Task.S2V),
                io.Audio.Input(
                    "audio",
                    optional=True,
                    tooltip="What is heard: any sample rate, one or two channels, from core's Load Audio. The video "
                    "ends with it.",
                ),
                io.AudioEncoder.Input(
                    "audio_encoder",
                    optional=True,
                    tooltip="wav2vec2-large-xlsr-53-english, the one of this checkpoint; or core's AudioEncoderLoader. "
                    "Hears 'audio' once.",
                ),
                io.AudioEncoderOutput.Input(
                    "audio_features",
                    optional=True,
                    tooltip="In place of 'audio' and 'audio_encoder': what core's AudioEncoderEncode made of a sound.",
                ),
                io.Image.Input(
                    "pose_video",
                    optional=True,
                    tooltip="How the body moves: skeletons drawn on black. Without it the model decides, as published. "
                    "Where it ends before the sound, no pose follows.",
                ),
                io.Float.Input(
                    "pose_fps",
                    default=float(defaults.fps),
                    min=1.0,
                    max=240.0,
                    step=0.001,
                    round=0.001,
                    tooltip=f"Frames a second of pose_video; they are picked to the video's {defaults.fps}. Default "
                    f"{defaults.fps}: the video's own. Free.",
                ),
                io.Boolean.Input(
                    "start_from_reference",
                    default=False,
                    tooltip="Whether the video begins with the picture itself (--start_from_ref of generate.py). "
                    "Default off: as published, the picture says who is seen, and the first clip loses its first 3 "
                    "frames.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="images", tooltip=f"The frames of the video, {defaults.fps} a second."),
                io.Latent.Output(display_name="latent", tooltip="Latents of the last clip."),
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
        reference_image: Tensor,
        size: str,
        width: int,
        height: int,
        clips: int,
        clip_frames: int,
        audio: Any = None,
        audio_encoder: Any = None,
        audio_features: Any = None,
        pose_video: Tensor | None = None,
        pose_fps: float = 16.0,
        start_from_reference: bool = False,
        **settings: Any,
    ) -> io.NodeOutput:
        chosen = Settings(**settings)
        reference = conditions.one_image(reference_image, "reference_image")
        width, height = _video_size(reference, size, width, height)
        sampling.check_clip(clip_frames)
        conditions.check_vae(vae, Task.S2V)
        if pose_video is not None:
            check_video(pose_video, "pose_video")
        sampler = SegmentSampler(Task.S2V, model, positive, negative, chosen, torch.bfloat16)
        features, seconds = _expected(audio, audio_encoder, audio_features)
        count = clip_count(features, clip_frames)
        segments = sampling.s2v_segments(
            min(clips, count) if clips else count,
            clip_frames,
            length=max(1, math.ceil(seconds * VIDEO_RATE - 1e-6)),
            drop=not start_from_reference,
        )
        total = sum(segment.frames for segment in segments)
        frames = Frames(total, width, height, working_frames=2 * (clip_frames + sampling.MOTION_FRAMES))
        lines = [
            f"video of {width}x{height} pixels, {total} frames for {seconds:.2f} s of sound, {len(segments)} clip(s)"
        ]
        warnings = [] if seconds * VIDEO_RATE <= total or not clips else [f"the sound goes on after {clips} clip(s)"]
        shown = notice(node_id(cls), [*lines, *warnings], level=logging.WARNING if warnings else logging.INFO)
        heard = on_video_frames(_layers(audio, audio_encoder, audio_features), clip_frames)
        poses = None
        if pose_video is not None:
            poses = list(sampling.pose_frames(clip_frames * len(segments), pose_fps, pose_video.shape[0]))
        run = _Run(sampler, vae, clip_frames, (width, height), heard, pose_video, poses, start_from_reference)
        with frames.kept_if_cut_short("s2v", VIDEO_RATE, audio):
            latent = run.make(sampling.s2v_reference(reference, width, height), segments, frames)
        return io.NodeOutput(frames.images, {"samples": latent}, ui=extended(shown, bridge.kept_words()))


def _video_size(reference: Tensor, size: str, width: int, height: int) -> tuple[int, int]:
    check_choice("size", size, SIZES)
    if size == conditions.AS_GIVEN:
        sampling.check_size(Task.S2V, width, height)
    else:
        width, height = sampling.s2v_size(reference.shape[2], reference.shape[1], AREAS[size])
    if min(width, height) < SMALLEST:
        raise InputError(
            f"an S2V video has {SMALLEST} pixels a side or more; got {width}x{height}: use a larger picture or size"
        )
    return width, height


def _expected(audio: Any, audio_encoder: Any, audio_features: Any) -> tuple[int, float]:
    """How many frames of features a sound has or will have, and its seconds; nothing is encoded.

    Raises:
        InputError: no sound, or one that cannot be heard.
    """
    if audio_features is not None:
        if audio is not None and audio_encoder is not None:
            raise InputError("two sounds are connected, 'audio' and 'audio_features': disconnect one of them")
        layers = _layers(None, None, audio_features)
        features = int(layers[0].shape[-2]) if layers else 0
        samples = audio_features.get("audio_samples")
        return features, samples / SAMPLE_RATE if samples else features / FEATURE_RATE
    if audio is None or audio_encoder is None:
        missing = "'audio' and 'audio_encoder' are" if audio is None and audio_encoder is None else "'audio' is"
        missing = "'audio_encoder' is" if audio is not None else missing
        raise InputError(
            f"S2V needs a sound, and {missing} not connected: connect core's Load Audio and the audio_encoder of the "
            "checkpoint, or 'audio_features'"
        )
    require(audio_encoder)
    if not hasattr(audio_encoder, "encode_audio"):
        raise InputError(
            f"audio_encoder takes an AUDIO_ENCODER, from Load Wan2.2 Checkpoint or core's AudioEncoderLoader; got "
            f"{type(audio_encoder).__name__}"
        )
    sound = check_sound(audio["waveform"], audio["sample_rate"])
    seconds = sound.shape[0] / audio["sample_rate"]
    return max(2, (math.ceil(seconds * SAMPLE_RATE) - 400) // 320 + 1), seconds


def _layers(audio: Any, audio_encoder: Any, audio_features: Any) -> tuple[Tensor, ...]:
    """The layers of wav2vec2, run now unless they were given."""
    if audio_features is None:
        audio_features = audio_encoder.encode_audio(audio["waveform"], audio["sample_rate"])
    layers = audio_features.get("encoded_audio_all_layers") if isinstance(audio_features, dict) else None
    if not isinstance(layers, (list, tuple)) or not all(isinstance(layer, Tensor) for layer in layers):
        raise InputError(
            "audio_features takes what core's AudioEncoderEncode returns, with all layers of wav2vec2; got "
            f"{type(audio_features).__name__}: connect 'audio' and 'audio_encoder' instead"
        )
    return tuple(layers)


@dataclass(frozen=True)
class _Run:
    """Everything that the clips of one video share."""

    sampler: SegmentSampler
    vae: Any
    length: int
    """Frames of a clip."""
    size: tuple[int, int]
    """Width and height of the video."""
    heard: Tensor
    """[1, 25, 1024, clips * length]."""
    pose: Tensor | None
    poses: list[int] | None
    """Frame of ``pose`` for each frame of the clips, as far as it goes."""
    starts_with_reference: bool

    def make(self, reference: Tensor, segments: list[sampling.Segment], frames: Frames) -> Tensor:
        """Make every clip and store it; returns the last one's latents.

        Args:
            reference: [3, H, W], -1..1.
        """
        width, height = self.size
        picture = conditions.encode(self.vae, reference[:, None])
        before = torch.full((sampling.MOTION_FRAMES, height, width, 3), 0.5)
        motion = None
        if self.starts_with_reference:
            before[-sampling.REFERENCE_FRAMES :] = reference.movedim(0, -1) / 2 + 0.5
            motion = self.encode(before)
        shape = (1, picture.shape[1], self.length // 4, *picture.shape[3:])
        latent = torch.empty(0)
        for segment in segments:
            bridge.stop_if_cancelled()
            heard = self.heard[..., segment.start : segment.start + self.length]
            values: dict[str, Any] = {"audio_embed": heard, "reference_latents": [picture]}
            if motion is not None:
                values["reference_motion"] = motion
            if self.pose is not None:
                values["control_video"] = self.pose_latents(segment)
            self.sampler.reseed(self.sampler.settings.seed + segment.index)
            negative = {"audio_embed": torch.zeros_like(heard)} if self.sampler.guided else {}
            latent = self.sampler.run(shape, values, negative, segment.index, len(segments))
            context = picture if motion is None else motion
            images = decoded(self.vae, torch.cat([context.to(latent), latent], dim=2))[-self.length :]
            frames.add(images[segment.kept])
            if segment is not segments[-1]:
                before = sampling.last_frames(before, images[segment.kept])
                motion = self.encode(before)
        return latent

    def encode(self, images_NHWC: Tensor) -> Tensor:
        """Frames in 0..1 to raw VAE latents."""
        return conditions.encode(self.vae, images_NHWC.movedim(-1, 0) * 2 - 1)

    def pose_latents(self, segment: sampling.Segment) -> Tensor:
        """A clip's pose, a copy of its first frame before it, so that every latent frame stands for four; black where
        there is none."""
        assert self.pose is not None and self.poses is not None
        shown = self.poses[segment.start : segment.start + self.length]
        width, height = self.size
        video = torch.full((self.length, 3, height, width), -1.0)
        if shown:
            video[: len(shown)] = sampling.s2v_pose(picked(self.pose, shown), width, height)
        return conditions.encode(self.vae, torch.cat([video[:1], video]).transpose(0, 1))[:, :, 1:]
