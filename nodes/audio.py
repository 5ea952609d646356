"""What travels on an AUDIO_ENCODER link of our loader: wav2vec2 with the face of core's audio encoders, read from disk
when the first sound needs it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..wan_fp8.models.audio_encoder import AudioEncoder, check_sound, load_audio_encoder, resampled
from . import bridge

logger = logging.getLogger("wan_fp8")

WORKING_BYTES = 2**30
"""Of the convolutions, 30 s at once: 512 channels at 3,200 a second, a few times over."""
BYTES_A_FRAME = 100_000
"""Of a layer, for a frame of 20 ms: its rows and the FFN's, a few times over."""


class AudioEncoderHandle:
    """An audio encoder that is not loaded until it is used; core's AudioEncoderEncode takes it as well.

    Args:
        path: file or folder of wav2vec2-large-xlsr-53-english.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._encoder: AudioEncoder | None = None
        self._patcher: Any = None

    @property
    def loaded(self) -> bool:
        """Whether the weights have been read from disk."""
        return self._encoder is not None

    def encode_audio(self, audio: Tensor, sample_rate: float) -> dict[str, Any]:
        """A core AUDIO_ENCODER_OUTPUT: ``encoded_audio_all_layers``, 25 of [1, T, 1024] at 50 a second, and the number
        of samples at 16 kHz.

        Args:
            audio: [1, C, N].
        Raises:
            InputError: a sound that cannot be heard.
        """
        sound = resampled(check_sound(audio, sample_rate), sample_rate)
        if self._encoder is None:
            logger.info("loading audio encoder %s", self._path.name)
            encoder = load_audio_encoder(self._path)
            self._patcher = bridge.manage(encoder.model, 0)
            self._encoder = encoder
        bridge.make_resident(self._patcher, WORKING_BYTES + BYTES_A_FRAME * (sound.shape[0] // 320))
        layers = self._encoder.encode(sound, torch.device(self._patcher.load_device))
        return {
            "encoded_audio": layers[-1],
            "encoded_audio_all_layers": layers,
            "audio_samples": sound.shape[0],
        }
