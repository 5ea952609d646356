"""Prompts to text rows: the UMT5 encoder of every Wan2.2 model.

B prompts, L tokens. The transformer reads 512 rows a prompt: those of its tokens, then zeros.

Source: Wan-Video/Wan2.2 ``wan/modules/t5.py`` (``T5EncoderModel``).
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, InputError
from .tokenizer import MAX_TOKENS, PromptTokenizer, clean_prompt, cut_ids, find_tokenizer, load_tokenizer
from .umt5 import E4M3, build_umt5, normalized_names, spec_of

logger = logging.getLogger(__name__)

STORAGE_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64, E4M3)

Source = str | Path | Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizedPrompt:
    """A prompt as the encoder reads it."""

    text: str
    """Cleaned."""
    ids: tuple[int, ...]
    """At most 512, the last one the end-of-sequence id."""
    lost_tokens: int
    """Tokens cut off; 0 unless the prompt is too long."""


class TextEncoder:
    """UMT5 with its tokenizer. Holds the weights, and the rows of the last few prompts.

    Args:
        model: transformers' ``UMT5EncoderModel``, filled.
        tokenizer: None if the checkpoint brought none; ``encode_ids`` works without.
        storage_dtype: Type of the linears; FP8 ones are computed in bf16.
        searched: Where a tokenizer was looked for, for the message of a later error.
        cache_size: Number of prompts whose rows are kept (4 MiB each at most); 0 keeps none.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PromptTokenizer | None = None,
        *,
        storage_dtype: torch.dtype,
        searched: str = "",
        cache_size: int = 8,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.storage_dtype = storage_dtype
        self._searched = searched
        self._cache_size = cache_size
        self._rows: OrderedDict[tuple[int, ...], Tensor] = OrderedDict()

    @property
    def _table(self) -> nn.Parameter:
        return self.model.shared.weight  # type: ignore[union-attr,return-value]

    @property
    def width(self) -> int:
        """Channels of a row (4096 for UMT5-XXL); the transformer's ``text_dim`` must equal it."""
        return self._table.shape[1]

    @property
    def compute_dtype(self) -> torch.dtype:
        """Type of the activations and of the returned rows."""
        return self._table.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self._table.device

    @property
    def num_bytes(self) -> int:
        """Size of the weights."""
        return sum(p.numel() * p.element_size() for p in self.model.parameters())

    def to(self, device: torch.device | str) -> TextEncoder:
        """Move the weights; kept rows move when they are next asked for. Returns itself."""
        self.model.to(device)
        return self

    @torch.no_grad()
    def encode_ids(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Run the encoder on token ids.

        Args:
            input_ids: [B, L] integers.
            attention_mask: [B, L], 0 where a token is padding and must not be attended to; None: no padding.
        Returns:
            [B, L, width] in ``compute_dtype`` on ``device``. Rows of padding tokens are not zeroed.
        Raises:
            InputError: shapes differ, or an id is outside the vocabulary.
        """
        if input_ids.ndim != 2 or 0 in input_ids.shape:
            raise InputError(f"input_ids must be [prompts, tokens]; got {tuple(input_ids.shape)}")
        if attention_mask is not None and attention_mask.shape != input_ids.shape:
            raise InputError(
                f"attention_mask must have the shape of input_ids, {tuple(input_ids.shape)}; "
                f"got {tuple(attention_mask.shape)}"
            )
        low, high, rows = int(input_ids.min()), int(input_ids.max()), self._table.shape[0]
        if low < 0 or high >= rows:
            raise InputError(
                f"token ids must lie in 0..{rows - 1}; got {low} to {high}. "
                "The tokenizer does not belong to this text encoder"
            )
        mask = None if attention_mask is None else attention_mask.to(self.device)
        output = self.model(input_ids=input_ids.to(self.device), attention_mask=mask)
        hidden: Tensor = output.last_hidden_state
        return hidden

    def tokenize(self, text: str) -> TokenizedPrompt:
        """Clean a prompt and cut it to 512 tokens; a cut is logged as a warning that says how many were lost.

        Raises:
            CheckpointError: the text encoder came without a tokenizer.
        """
        if self.tokenizer is None:
            raise CheckpointError(
                f"the text encoder has no tokenizer{self._searched}; put the google/umt5-xxl folder of the official "
                "checkpoint beside it, or use a umt5_xxl .safetensors file that has its tokenizer inside"
            )
        cleaned = clean_prompt(text)
        ids, lost = cut_ids(self.tokenizer.ids(cleaned))
        if lost:
            logger.warning(
                "The prompt has %d tokens; the model reads %d, so the last %d were cut off (it begins %r).",
                len(ids) + lost,
                MAX_TOKENS,
                lost,
                cleaned[:40],
            )
        return TokenizedPrompt(text=cleaned, ids=tuple(ids), lost_tokens=lost)

    def encode_prompt(self, prompt: str | TokenizedPrompt) -> Tensor:
        """Rows of one prompt's tokens, [n_tokens, width], n_tokens at most 512, the end-of-sequence row included.

        The prompt runs without padding: masked padding changes no other row, so the rows are those of the published
        code, which pads to 512 and drops the rest.
        """
        tokens = self.tokenize(prompt) if isinstance(prompt, str) else prompt
        rows = self._rows.pop(tokens.ids, None)
        if rows is None:
            rows = self.encode_ids(torch.tensor([tokens.ids]))[0]
        if self._cache_size:
            self._rows[tokens.ids] = rows
            while len(self._rows) > self._cache_size:
                self._rows.popitem(last=False)
        return rows.to(self.device, copy=True)

    def encode(self, texts: str | Sequence[str]) -> Tensor:
        """Text rows as the transformer takes them.

        Args:
            texts: One prompt or several; each is cleaned, and cut at 512 tokens with a warning.
        Returns:
            [B, 512, width]: the rows of each prompt's tokens, then zeros. (A list of unpadded rows: ``encode_prompt``
            for each.)
        """
        prompts = [texts] if isinstance(texts, str) else list(texts)
        padded = torch.zeros(len(prompts), MAX_TOKENS, self.width, dtype=self.compute_dtype, device=self.device)
        for index, prompt in enumerate(prompts):
            rows = self.encode_prompt(prompt)
            padded[index, : rows.shape[0]] = rows
        return padded


def load_text_encoder(
    source: Source,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    tokenizer: Any = None,
) -> TextEncoder:
    """Load UMT5 from any file that holds it.

    Args:
        source: An official folder or its ``models_t5_umt5-xxl-enc-bf16.pth``, a Diffusers folder or its
            ``text_encoder``, a ``.safetensors`` file (bf16, fp16, scaled FP8), or a state dict; official or
            transformers' names, any size.
        dtype: Storage of the weights: bfloat16 (as published, 11.4 GB), float16, float32, or float8_e4m3fn (6.7 GB;
            computed in bf16 from FP8 linears with one scale per row).
        device: Where the weights go.
        tokenizer: Folder, file or object (``tokenizer.load_tokenizer``); None: the one inside the
            file, or else beside it.
    Raises:
        CheckpointError: the source is missing, damaged or no UMT5.
        InputError: dtype is not one of these.
    """
    if dtype not in STORAGE_DTYPES:
        names = ", ".join(str(d).removeprefix("torch.") for d in STORAGE_DTYPES)
        raise InputError(f"the text encoder's dtype must be one of {names}; got {str(dtype).removeprefix('torch.')}")
    state_dict, spiece = _read(source, dtype, device)
    tokens, searched = _choose_tokenizer(source, spiece, tokenizer)
    tensors = normalized_names(state_dict)
    del state_dict  # so that each tensor of a file goes as soon as it has been converted
    compute_dtype = torch.bfloat16 if dtype == E4M3 else dtype
    model = build_umt5(tensors, spec_of(tensors), storage_dtype=dtype, compute_dtype=compute_dtype, device=device)
    return TextEncoder(model, tokens, storage_dtype=dtype, searched=searched)


def _read(source: Source, dtype: torch.dtype, device: torch.device | str) -> tuple[Mapping[str, Tensor], bytes | None]:
    """Weights, and the SentencePiece model that came with them."""
    if isinstance(source, Mapping):
        embedded = next((value for key, value in source.items() if key.endswith("spiece_model")), None)
        return source, None if embedded is None else bytes(embedded.flatten().tolist())
    from ..checkpoint.encoders import load_text_encoder_state_dict

    if dtype == E4M3:  # as stored and on the CPU: only the quantised weights ever reach the device
        return load_text_encoder_state_dict(source, dtype=None)
    return load_text_encoder_state_dict(source, dtype=dtype, device=device)


def _choose_tokenizer(source: Source, spiece: bytes | None, tokenizer: Any) -> tuple[PromptTokenizer | None, str]:
    """The tokenizer and, if there is none, words for where it was looked for."""
    if tokenizer is not None:
        return load_tokenizer(tokenizer), ""
    if spiece is not None:
        return load_tokenizer(spiece), ""
    if isinstance(source, Mapping):
        return None, " (a state dict was given)"
    found = find_tokenizer(Path(source))
    if found is None:
        return None, f" (looked beside {source} for google/umt5-xxl and tokenizer)"
    return load_tokenizer(found), ""
