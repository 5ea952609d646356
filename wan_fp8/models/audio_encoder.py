"""Sound to the features that S2V-14B hears: any waveform to 16 kHz, through wav2vec2, onto the frames of the video.

C channels, N samples, T audio frames. Everything is fp32, as in the official code, which resamples by librosa.
Source: Wan-Video/Wan2.2 ``wan/modules/s2v/audio_encoder.py``; transformers ``Wav2Vec2Model``, whose module this fills;
the resampling filter is torchaudio's ``resample`` (a sinc of six zero crossings under a Hann window).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import BackendUnavailableError, CheckpointError, InputError
from .audio import AUDIO_LAYERS

SAMPLE_RATE = 16_000
FEATURE_RATE = 50
"""wav2vec2's frames a second."""
AUDIO_RATE = 30
"""Frames a second that the features are brought to before video frames are picked."""
VIDEO_RATE = 16
HOP, FIELD = 320, 400
"""Samples from one of wav2vec2's frames to the next, and samples that one sees."""
SHORTEST = FIELD + HOP
"""Samples of two frames, below which there is nothing to interpolate: shorter sounds are filled up with silence."""
FRAMES_AT_ONCE = 1500
"""Frames (30 s) whose convolutions run together: they see no further than their own samples."""
ZEROS, ROLLOFF = 6, 0.99
SAMPLES_AT_ONCE = 1 << 19


def check_sound(waveform: Tensor, sample_rate: float) -> Tensor:
    """A sound as one channel [N], whatever its rate.

    Args:
        waveform: [C, N] or [1, C, N], one or two channels.
    Raises:
        InputError: no samples, more than two channels, several sounds, or values that are no numbers.
    """
    shape = list(waveform.shape)
    if waveform.ndim == 3 and shape[0] == 1:
        waveform = waveform[0]
    if waveform.ndim != 2:
        raise InputError(f"audio is one sound, [1, channels, samples]; got {shape}: take one of the batch")
    if waveform.shape[1] == 0 or waveform.shape[0] == 0:
        raise InputError("the audio is empty: connect a sound of some length, or trim it less")
    if waveform.shape[0] > 2:
        raise InputError(f"audio has one or two channels; got {waveform.shape[0]}: mix it down to stereo or mono")
    if not (math.isfinite(sample_rate) and sample_rate > 0):
        raise InputError(f"audio has a sample rate above 0; got {sample_rate}: export the sound again")
    sound = waveform.to("cpu", torch.float32).mean(0)
    if not bool(sound.isfinite().all()):
        raise InputError("the audio holds samples that are no finite numbers (NaN or infinite): export it again")
    return sound


def resampled(sound_N: Tensor, source_rate: float, target_rate: float = SAMPLE_RATE) -> Tensor:
    """The sound at another rate, [ceil(N * target / source)]; band-limited where samples get fewer."""
    if source_rate == target_rate:
        return sound_N
    ratio = source_rate / target_rate
    count = math.ceil(sound_N.shape[0] * target_rate / source_rate - 1e-9)
    cutoff = ROLLOFF * min(1.0, 1 / ratio)
    """Cycles a sample of the source that pass, twice over."""
    reach = math.ceil(ZEROS / cutoff)
    padded = F.pad(sound_N, (reach, reach + 1))
    offsets = torch.arange(-reach, reach + 1)
    made = []
    for start in range(0, count, SAMPLES_AT_ONCE):
        place = torch.arange(start, min(start + SAMPLES_AT_ONCE, count), dtype=torch.float64) * ratio
        whole = place.floor().long()
        distance = ((place - whole)[:, None] - offsets).float().mul_(cutoff).clamp_(-ZEROS, ZEROS)
        weights = torch.cos(distance * (math.pi / ZEROS / 2)).square_().mul_(torch.sinc(distance)).mul_(cutoff)
        found = padded.unfold(0, 2 * reach + 1, 1)[whole.clamp_max(sound_N.shape[0])]
        made.append((found * weights).sum(-1))
    return torch.cat(made)


class AudioEncoder:
    """wav2vec2 as S2V-14B uses it: all of its layers.

    Args:
        model: transformers' ``Wav2Vec2Model``, filled, of the kind with stable layer norm.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @torch.no_grad()
    def encode(self, sound_N: Tensor, device: torch.device | str = "cpu") -> tuple[Tensor, ...]:
        """The input of every layer and the normed output of the last: 25 tensors [1, T, 1024] on the CPU.

        Args:
            sound_N: at 16 kHz.
            device: where the model is.
        """
        model: Any = self.model
        sound = F.pad(sound_N.float(), (0, max(0, SHORTEST - sound_N.shape[0])))
        sound = (sound - sound.mean()) / (sound.var(correction=0) + 1e-7).sqrt()
        frames = (sound.shape[0] - FIELD) // HOP + 1
        parts = []
        for start in range(0, frames, FRAMES_AT_ONCE):
            stop = min(start + FRAMES_AT_ONCE, frames)
            samples = sound[HOP * start : HOP * (stop - 1) + FIELD].to(device)
            parts.append(model.feature_extractor(samples[None]).transpose(1, 2))
        x, _ = model.feature_projection(torch.cat(parts, dim=1))
        x = x + model.encoder.pos_conv_embed(x)
        layers = []
        for layer in model.encoder.layers:
            layers.append(x.cpu())
            made = layer(x)
            x = made[0] if isinstance(made, tuple) else made
        layers.append(model.encoder.layer_norm(x).cpu())
        return tuple(layers)


def load_audio_encoder(source: str | Path | Mapping[str, Tensor]) -> AudioEncoder:
    """Build wav2vec2 from its weights, in fp32 on the CPU.

    Args:
        source: a Hugging Face folder, one file, or a state dict under transformers' names.
    Raises:
        CheckpointError: not the large wav2vec2 that S2V-14B was trained with.
        BackendUnavailableError: transformers cannot be imported.
    """
    if isinstance(source, Mapping):
        state = dict(source)
    else:
        from ..checkpoint.senses import load_audio_encoder_state_dict

        state = load_audio_encoder_state_dict(source)
    try:
        from transformers import Wav2Vec2Config, Wav2Vec2Model
    except Exception as error:  # one of another torch raises what it likes
        raise BackendUnavailableError(
            f"the audio encoder needs the transformers package, which does not import here: {error}; run 'pip install "
            "transformers'"
        ) from error
    config = Wav2Vec2Config(**_sizes(state))
    config._attn_implementation = "sdpa"
    with torch.device("meta"):
        model = cast(nn.Module, Wav2Vec2Model(config))
    wanted = model.state_dict()
    missing = sorted(wanted.keys() - state.keys() - {"masked_spec_embed"})
    wrong = [name for name in wanted if name in state and state[name].shape != wanted[name].shape]
    if missing or wrong:
        what = f"lacks {missing[0]}" if missing else f"has {wrong[0]} of shape {list(state[wrong[0]].shape)}"
        raise CheckpointError(
            f"the audio encoder {what}: S2V-14B takes wav2vec2-large-xlsr-53-english; download it again"
        )
    kept = {name: state[name] if name in state else torch.zeros(wanted[name].shape) for name in wanted}
    model.load_state_dict(kept, strict=True, assign=True)
    return AudioEncoder(model.eval().requires_grad_(False))


def _sizes(state: Mapping[str, Tensor]) -> dict[str, Any]:
    layers = {name.split(".")[2] for name in state if name.startswith("encoder.layers.")}
    if len(layers) + 1 != AUDIO_LAYERS:
        raise CheckpointError(
            f"this audio encoder has {len(layers)} layers; S2V-14B hears {AUDIO_LAYERS - 1} of them: use "
            "wav2vec2-large-xlsr-53-english"
        )
    width = state["encoder.layer_norm.bias"].shape[0]
    hidden = state["encoder.layers.0.feed_forward.intermediate_dense.bias"].shape[0]
    return {
        "hidden_size": width,
        "num_hidden_layers": len(layers),
        "num_attention_heads": width // 64,
        "intermediate_size": hidden,
        "conv_dim": (state["feature_extractor.conv_layers.0.conv.weight"].shape[0],) * 7,
        "conv_bias": True,
        "feat_extract_norm": "layer",
        "do_stable_layer_norm": True,
        "layer_norm_eps": 1e-5,
    }


# ---- onto the video's frames ---------------------------------------------------------------------------------------


def audio_frames(features: int) -> int:
    """Frames at 30 a second of so many of wav2vec2's."""
    return int(features / float(FEATURE_RATE) * AUDIO_RATE)


def clip_count(features: int, frames: int = 80) -> int:
    """Clips of ``frames`` video frames that a sound of so many wav2vec2 frames fills. As published, a sound that ends
    with a clip begins another one."""
    return int(audio_frames(features) / (frames * (AUDIO_RATE / VIDEO_RATE))) + 1


def on_video_frames(layers: tuple[Tensor, ...], frames: int = 80, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """wav2vec2's layers on the frames of the video: [1, 25, 1024, clips * frames]; zeros beyond the sound's end.

    The features are interpolated to 30 frames a second, and the nearest one is taken for each video frame.

    Args:
        layers: 25 of [1, T, 1024].
        frames: video frames of a clip.
    Raises:
        InputError: features of another audio encoder.
    """
    shapes = {tuple(layer.shape) for layer in layers}
    shape = next(iter(shapes), ())
    if len(layers) != AUDIO_LAYERS or len(shapes) != 1 or len(shape) != 3 or shape[0] != 1 or shape[2] != 1024:
        raise InputError(
            f"S2V hears {AUDIO_LAYERS} layers [1, frames, 1024] of wav2vec2-large; got {len(layers)} of "
            f"{list(shape)}: encode one sound with the audio encoder of this checkpoint"
        )
    length = audio_frames(shape[1])
    if length < 1:
        raise InputError(
            f"S2V hears 30 frames of features a second, and these are too short for one: {shape[1]} of 50 a second; "
            "encode a longer sound"
        )
    count = clip_count(shape[1], frames) * frames
    # numpy.round and torch.round both take the even neighbour of a half
    picked = (torch.arange(count, dtype=torch.float64) / VIDEO_RATE * AUDIO_RATE).round().long()
    heard = picked[picked < length]
    made = torch.zeros(AUDIO_LAYERS, 1024, count, dtype=dtype)
    for index, layer in enumerate(layers):
        at_rate = F.interpolate(layer.float().transpose(1, 2), size=length, mode="linear", align_corners=True)
        made[index, :, : len(heard)] = at_rate[0][:, heard].to(dtype)
    return made[None]
