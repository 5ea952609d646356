"""The text side: a tokenizer of the world's words, a small random UMT5, and captions as rows for training.

UMT5 stays as it is drawn: every word has a row of its own, and the transformer learns what the rows mean. Rows are
4096 wide, since no part of Wan2.2 takes another width; one narrow layer mixes in what stands around a word.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tiny_checkpoint.weights import random_weights
from torch import Tensor

from wan_fp8.models.text_encoder import TextEncoder, load_text_encoder
from wan_fp8.models.tokenizer import MAX_TOKENS, SentencePieceTokenizer
from wan_fp8.sampling import NEGATIVE_PROMPT

from .captions import vocabulary

WIDTH, HEADS, HEAD_DIM, FFN_DIM, BUCKETS = 4096, 2, 8, 16, 32
VOCAB_LIMIT = 160
SPIECE = "spiece_model"


def train_tokenizer() -> bytes:
    """A SentencePiece model with a piece for every word of the captions; UMT5's special ids; the rest is unknown."""
    import sentencepiece

    captions, model = vocabulary(), io.BytesIO()
    words = sorted({word for text in captions for word in re.findall(r"\w+", text)})
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(captions),
        model_writer=model,
        model_type="unigram",
        vocab_size=VOCAB_LIMIT,
        user_defined_symbols=[f"▁{word}" for word in words],
        hard_vocab_limit=False,
        character_coverage=1.0,
        normalization_rule_name="identity",
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        num_threads=1,
        shuffle_input_sentence=False,
        minloglevel=2,
    )
    return model.getvalue()


def shapes(rows: int) -> dict[str, tuple[int, ...]]:
    """Every tensor of the encoder under its official name."""
    inner = HEADS * HEAD_DIM
    return {
        "token_embedding.weight": (rows, WIDTH),
        "norm.weight": (WIDTH,),
        **{f"blocks.0.attn.{name}.weight": (inner, WIDTH) for name in "qkv"},
        "blocks.0.attn.o.weight": (WIDTH, inner),
        "blocks.0.pos_embedding.embedding.weight": (BUCKETS, HEADS),
        "blocks.0.ffn.gate.0.weight": (FFN_DIM, WIDTH),
        "blocks.0.ffn.fc1.weight": (FFN_DIM, WIDTH),
        "blocks.0.ffn.fc2.weight": (WIDTH, FFN_DIM),
        "blocks.0.norm1.weight": (WIDTH,),
        "blocks.0.norm2.weight": (WIDTH,),
    }


def make_encoder(seed: int) -> dict[str, Tensor]:
    """The encoder's tensors in bf16, and its tokenizer among them, as ComfyUI's files keep it."""
    import sentencepiece

    model = train_tokenizer()
    rows = sentencepiece.SentencePieceProcessor(model_proto=model).GetPieceSize()
    weights = random_weights(shapes(-(-rows // 8) * 8), seed=seed, part="umt5", dtype=torch.float32)
    for name in ("blocks.0.attn.o.weight", "blocks.0.ffn.fc2.weight"):
        weights[name] *= 0.5  # what stands around a word must not drown it
    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in weights.items()}
    tensors[SPIECE] = torch.frombuffer(bytearray(model), dtype=torch.uint8).clone()
    return tensors


def open_encoder(tensors: dict[str, Tensor], device: torch.device | str) -> TextEncoder:
    """The engine's text encoder from ``make_encoder``'s tensors."""
    weights = {name: tensor for name, tensor in tensors.items() if name != SPIECE}
    model = bytes(tensors[SPIECE].tolist())
    return load_text_encoder(weights, torch.bfloat16, device, tokenizer=SentencePieceTokenizer(model))


@dataclass(frozen=True, slots=True)
class CaptionTable:
    """Captions as the transformer reads them, cut to a few rows.

    The transformer attends to 512 rows, of which all behind the prompt are zeros and therefore equal to each other.
    Training keeps ``L`` of them and counts each remaining zero row as often as it stands for: the same attention.
    """

    rows_NLD: Tensor
    """bf16; zeros behind each caption's end."""
    lengths_N: Tensor

    def bias(self, index_B: Tensor, dtype: torch.dtype) -> Tensor:
        """What to add to the attention's logits: [B, 1, 1, L]."""
        rows, lengths = self.rows_NLD.shape[1], self.lengths_N[index_B]
        times = (MAX_TOKENS - lengths).float() / (rows - lengths)
        padding = torch.arange(rows, device=lengths.device) >= lengths[:, None]
        return torch.where(padding, times.log()[:, None], 0.0).to(dtype)[:, None, None]


def make_table(encoder: TextEncoder, captions: Sequence[str], at_once: int = 512) -> CaptionTable:
    """Encode captions in batches; the table lies on the encoder's device.

    Captions of the world need no cleaning; going to the tokenizer directly keeps ftfy out of training.
    """
    assert encoder.tokenizer is not None
    ids = [encoder.tokenizer.ids(text) for text in captions]
    lengths = torch.tensor([len(each) for each in ids])
    longest = int(lengths.max())
    rows = math.ceil((longest + 1) / 8) * 8
    padded = torch.zeros(len(ids), rows, dtype=torch.int64)
    for line, each in zip(padded, ids, strict=True):
        line[: len(each)] = torch.tensor(each)
    mask = torch.arange(rows) < lengths[:, None]
    table = torch.empty(len(ids), rows, encoder.width, dtype=torch.bfloat16, device=encoder.device)
    for i in range(0, len(ids), at_once):
        part = slice(i, i + at_once)
        hidden = encoder.encode_ids(padded[part], mask[part].long())
        table[part] = hidden * mask[part, :, None].to(hidden)
    return CaptionTable(table, lengths.to(encoder.device))


def full_rows(encoder: TextEncoder, captions: Sequence[str]) -> Tensor:
    """Captions as any sampler gives them to the transformer: [B, 512, 4096], zeros behind the end."""
    table = make_table(encoder, captions)
    rows = table.rows_NLD
    return torch.nn.functional.pad(rows, (0, 0, 0, MAX_TOKENS - rows.shape[1]))


UNCONDITIONAL = ("", NEGATIVE_PROMPT)
"""What training puts in a caption's place to learn guidance: nothing, and what the nodes offer as negative prompt."""
