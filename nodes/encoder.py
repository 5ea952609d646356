"""What travels on a WAN_TEXT_ENCODER link: a text encoder that is read from disk when the first prompt needs it.

Its weights are under ComfyUI's memory management: brought to the GPU to encode, evicted when something else needs the
room. Rows are kept by prompt for as long as the process lives, so that going back to an earlier prompt neither loads
nor runs the encoder.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..wan_fp8.errors import CheckpointError, InputError
from ..wan_fp8.models.text_encoder import TextEncoder
from ..wan_fp8.parallel.parts import RemoteTextEncoder
from ..wan_fp8.parallel.pools import PoolSpec
from ..wan_fp8.parallel.source import TextSource
from . import bridge

logger = logging.getLogger("wan_fp8")

MAX_KEPT_PROMPTS = 64
"""Prompts kept, 32-bit rows of their own tokens only: 1 MiB for 64 tokens, 8 MiB at most each."""


WORKING_BYTES = 512 * 1024**2
"""Activations of one prompt of 512 tokens through UMT5-XXL: attention logits and bias 2 x 64 MiB, the FFN's 3 x 10 MiB,
with room to spare."""


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    """One prompt's rows."""

    rows: Tensor
    """[1, 512, width] float32 on the CPU: the rows of the prompt's tokens, then zeros."""
    lost_tokens: int
    """Tokens beyond the 512 that the model reads, which were cut off."""


class PromptCache:
    """The rows of the prompts used last, by encoder and text; bounded, and shared by every node of the process."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._kept: OrderedDict[Hashable, tuple[Tensor, int]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable) -> tuple[Tensor, int] | None:
        """Rows [tokens, width] and lost tokens, or None."""
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
            return self._kept.get(key)

    def put(self, key: Hashable, rows: Tensor, lost_tokens: int) -> None:
        """Keep a prompt, and forget the one unused for longest if there are too many."""
        with self._lock:
            self._kept[key] = (rows, lost_tokens)
            self._kept.move_to_end(key)
            while len(self._kept) > self._size:
                self._kept.popitem(last=False)

    def clear(self) -> None:
        """Forget every prompt."""
        with self._lock:
            self._kept.clear()

    def __len__(self) -> int:
        return len(self._kept)


CACHE = PromptCache(MAX_KEPT_PROMPTS)


class TextEncoderHandle:
    """A text encoder that is not loaded until it is used.

    Args:
        load: Reads it from disk, to the CPU.
        identity: What the rows depend on besides the prompt: files of weights and tokenizer, their sizes and times,
            storage type.
        name: For messages.
        source: The same as data, for the processes of a pool.
    """

    def __init__(
        self, load: Callable[[], TextEncoder], identity: Hashable, name: str, source: TextSource | None = None
    ) -> None:
        self._load, self._identity, self._name, self.source = load, identity, name, source
        self._encoder: TextEncoder | None = None
        self._patcher: Any = None

    @property
    def loaded(self) -> bool:
        """Whether the weights have been read from disk."""
        return self._encoder is not None

    def encode(self, text: str) -> EncodedPrompt:
        """Rows of one prompt, from the cache or by running the encoder.

        Raises:
            CheckpointError: the file holds no usable text encoder, or came without a tokenizer.
        """
        kept = CACHE.get((self._identity, text))
        if kept is None:
            kept = self._run(text)
            CACHE.put((self._identity, text), *kept)
        rows, lost = kept
        padded = torch.zeros(1, 512, rows.shape[1])
        padded[0, : len(rows)] = rows
        return EncodedPrompt(padded, lost)

    def in_pool(self, pool: PoolSpec, *, sharded: bool = False) -> TextEncoderHandle:
        """The same encoder in a pool, on its first rank or shared by all; rows that are kept here serve it too, for
        they are the same bits.

        Raises:
            InputError: nobody said where its file lies.
        """
        if self.source is None:
            raise InputError(
                f"the text encoder {self._name} has no file that a pool's processes could read: connect that of Load "
                "Wan2.2 Checkpoint to Wan2.2 Multi-GPU"
            )
        return PooledTextEncoder(self, RemoteTextEncoder(self.source, pool, sharded=sharded))

    def _run(self, text: str) -> tuple[Tensor, int]:
        encoder = self._loaded_encoder()
        prompt = encoder.tokenize(text)
        bridge.make_resident(self._patcher, WORKING_BYTES)
        return encoder.encode_prompt(prompt).to("cpu", torch.float32), prompt.lost_tokens

    def _loaded_encoder(self) -> TextEncoder:
        if self._encoder is None:
            logger.info("loading text encoder %s", self._name)
            encoder = self._load()
            self._patcher = bridge.manage(encoder.model, WORKING_BYTES)
            self._encoder = encoder
        return self._encoder


class PooledTextEncoder(TextEncoderHandle):
    """A text encoder in a pool; nothing of it is loaded here."""

    def __init__(self, handle: TextEncoderHandle, remote: RemoteTextEncoder) -> None:
        super().__init__(handle._load, handle._identity, handle._name, handle.source)
        self.remote = remote
        remote.poll, remote.say = bridge.stop_if_cancelled, functools.partial(bridge.say, keep=True)

    def _run(self, text: str) -> tuple[Tensor, int]:
        rows, lost = self.remote.encode_prompt(text)
        return rows.to(torch.float32), lost


def check_text_encoder(value: object) -> TextEncoderHandle:
    """Raise CheckpointError unless ``value`` came from our loader."""
    if not isinstance(value, TextEncoderHandle):
        raise CheckpointError(
            f"text_encoder takes the WAN_TEXT_ENCODER of Load Wan2.2 Checkpoint; got {type(value).__name__}: for a "
            "CLIP from core's loader use core's CLIP Text Encode"
        )
    return value
