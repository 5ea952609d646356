"""From a prompt to UMT5 token ids: cleaning, and tokenizers from the files that checkpoints bring.

``tokenizer.json`` is run as it stands by the ``tokenizers`` library and ``spiece.model`` by ``sentencepiece``, rather
than through a transformers tokenizer class: those rebuild the pipeline differently from one version to the next (T5's
drops byte fallback).

Source: Wan-Video/Wan2.2 ``wan/modules/tokenizers.py`` (``clean="whitespace"``).
"""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any, Protocol

from ..errors import BackendUnavailableError, CheckpointError, InputError

MAX_TOKENS = 512
"""Rows of text that the transformers were trained with; longer prompts are cut."""

EOS = "</s>"


class PromptTokenizer(Protocol):
    """Text in, ids out."""

    def ids(self, text: str) -> list[int]:
        """Ids of the whole text, however long, ending in the end-of-sequence id."""


def clean_prompt(text: str) -> str:
    """Clean a prompt as the published code does; nothing is lower-cased.

    Mojibake is repaired and typographic quotes and full-width forms are straightened (ftfy), HTML entities are
    resolved twice, runs of white space become one space, and the ends are trimmed.

    Raises:
        BackendUnavailableError: the ftfy package is not installed.
    """
    try:
        import ftfy
    except ImportError as error:
        raise BackendUnavailableError(
            "cleaning a prompt needs the ftfy package, which is not installed; "
            "run 'pip install ftfy' in ComfyUI's environment"
        ) from error
    text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
    return re.sub(r"\s+", " ", text).strip()


def cut_ids(ids: list[int], limit: int = MAX_TOKENS) -> tuple[list[int], int]:
    """The first ``limit`` ids with the end-of-sequence id kept as the last one, and how many were lost."""
    lost = max(0, len(ids) - limit)
    return (ids[: limit - 1] + ids[-1:] if lost else ids), lost


class JsonTokenizer:
    """A Hugging Face ``tokenizer.json``, exactly as the file describes it.

    A prompt that spells out a special token (``</s>``) gets that token, as in the published code.
    """

    def __init__(self, path: Path) -> None:
        from tokenizers import Tokenizer

        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise CheckpointError(f"{path} is not a readable tokenizer: {error}. Download the file again") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        eos = self._tokenizer.token_to_id(EOS)
        if eos is None:
            raise CheckpointError(f"{path} has no {EOS} token, so it is not UMT5's; use the google/umt5-xxl tokenizer")
        self._eos: int = eos

    def ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text).ids
        return ids if ids[-1:] == [self._eos] else [*ids, self._eos]


class SentencePieceTokenizer:
    """A SentencePiece model: a ``spiece.model`` file, or the bytes that ComfyUI embeds in text encoder files."""

    def __init__(self, model: Path | bytes) -> None:
        import sentencepiece

        name = model if isinstance(model, Path) else "the embedded spiece_model"
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(model.read_bytes() if isinstance(model, Path) else model)
        except (RuntimeError, OSError) as error:
            raise CheckpointError(
                f"{name} is not a readable SentencePiece model: {error}. Download the file again"
            ) from error
        self._eos = self._processor.eos_id()
        if self._eos < 0:
            raise CheckpointError(f"{name} has no {EOS} token, so it is not UMT5's; use the google/umt5-xxl tokenizer")

    def ids(self, text: str) -> list[int]:
        return [*self._processor.EncodeAsIds(text), self._eos]


class TransformersTokenizer:
    """Any tokenizer object of transformers that ends sequences by itself."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def ids(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=True, verbose=False)["input_ids"])


def load_tokenizer(source: Any) -> PromptTokenizer:
    """A tokenizer from whatever holds one.

    Args:
        source: A folder with ``tokenizer.json`` or ``spiece.model``, one of those files, the bytes of a SentencePiece
            model, a tokenizer object of transformers, or an object with an ``ids`` method.
    Raises:
        CheckpointError: the folder or file holds no tokenizer that we can read.
        InputError: the object is none of these.
    """
    if isinstance(source, (str, Path)):
        return _tokenizer_from_path(Path(source))
    if isinstance(source, bytes):
        return SentencePieceTokenizer(source)
    if callable(getattr(source, "ids", None)):
        tokenizer: PromptTokenizer = source
        return tokenizer
    if callable(source):
        return TransformersTokenizer(source)
    raise InputError(f"a tokenizer is a path, SentencePiece bytes or a tokenizer object; got {type(source).__name__}")


def _tokenizer_from_path(path: Path) -> PromptTokenizer:
    if path.is_dir():
        for name in ("tokenizer.json", "spiece.model"):
            if (path / name).is_file():
                return _tokenizer_from_path(path / name)
        raise CheckpointError(f"{path} holds neither tokenizer.json nor spiece.model; give the google/umt5-xxl folder")
    if not path.is_file():
        raise CheckpointError(f"there is no tokenizer at {path}; give the google/umt5-xxl folder")
    if path.suffix == ".json":
        return JsonTokenizer(path)
    if path.suffix == ".model":
        return SentencePieceTokenizer(path)
    raise CheckpointError(f"{path.name} is not a tokenizer; give a tokenizer.json, a spiece.model or their folder")


TOKENIZER_FOLDERS = ("google/umt5-xxl", "tokenizer", "umt5-xxl")
"""Where official and Diffusers folders keep the tokenizer."""


def find_tokenizer(weights: Path) -> Path | None:
    """The tokenizer folder that belongs to a text encoder file or folder, or None.

    Looked for beside the weights and one folder above them: ``google/umt5-xxl/`` (official), ``tokenizer/``
    (Diffusers), and the folder of the weights itself.
    """
    folder = weights if weights.is_dir() else weights.parent
    candidates = [base / name for base in (folder, folder.parent) for name in TOKENIZER_FOLDERS]
    if weights.is_dir():
        candidates.append(folder)
    for candidate in candidates:
        if any((candidate / name).is_file() for name in ("tokenizer.json", "spiece.model")):
            return candidate
    return None
