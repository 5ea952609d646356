"""A small UMT5 encoder and the tokenizer that belongs to it.

The tokenizer is trained here on a page of captions. It has UMT5's special ids (pad 0, end of sequence 1, unknown 2)
and falls back to bytes, so that any text has tokens.
"""

from __future__ import annotations

import functools
import io
import json
from pathlib import Path
from typing import Any

from .transformer import TEXT_DIM

LAYERS, HEADS, HEAD_DIM, FFN_DIM, BUCKETS = 2, 2, 32, 64, 32
VOCAB_LIMIT = 700

CAPTIONS = """
Two anthropomorphic cats in comfy boxing gear and bright gloves fight intensely on a spotlighted stage.
A white cat wearing sunglasses sits on a surfboard at a summer beach and looks at the camera with a relaxed face.
A red fox runs through fresh snow between tall pine trees while the camera follows it from the side.
An old fisherman mends a net on a wooden pier at sunrise, with soft golden light and gentle waves behind him.
A close-up of rain falling on a green leaf, with shallow depth of field and a slow zoom in.
Aerial view of a river that winds through an autumn forest, with mist above the water, cinematic and calm.
A woman in a yellow coat walks along a busy street at night; neon signs are mirrored in the wet ground.
A small robot waters the plants on a balcony, and the city skyline glows in the evening light.
Time-lapse of clouds moving over a mountain lake, from blue morning to orange sunset.
The dancer turns slowly on an empty stage, her dress follows the movement, dust floats in the light.
A steam train crosses a stone bridge in the hills, smoke drifting to the left, the camera stays still.
Children fly kites on a grassy hill under a wide sky with white clouds.
A bowl of noodles steams on the table, chopsticks lift the noodles, hands and a face in soft focus behind.
Waves break on black rocks in slow motion, with drops of water that sparkle in the sun.
A paper boat floats down a stream past flowers and stones, seen from very close.
Bright colours, overexposed, static, blurred details, subtitles, style, artwork, painting, picture, still.
Worst quality, low quality, JPEG artefacts, ugly, mutilated, extra fingers, badly drawn hands and faces.
Deformed limbs, fused fingers, a still picture, a cluttered background, three legs, many people, walking backwards.
一只戴着墨镜的白猫坐在冲浪板上，看着镜头，背景是夏天的海滩。
两只拟人化的猫穿着舒适的拳击装备，戴着鲜艳的手套，在聚光灯照射的舞台上激烈对战。
一只红色的狐狸在雪地里奔跑，镜头从侧面跟随，背景是高高的松树。
清晨的湖面上有薄雾，远处的山在阳光下变成金色，画面安静而柔和。
一位穿黄色外套的女人走在夜晚的街道上，霓虹灯的倒影在湿润的地面上闪烁。
孩子们在草地上放风筝，天空很蓝，白云慢慢移动。
视频中的人在做动作
色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量
丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合
静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走
"""  # noqa: RUF001


@functools.cache
def train_sentencepiece() -> bytes:
    """A SentencePiece model of a few hundred pieces; the same bytes every time."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(CAPTIONS.strip().splitlines()),
        model_writer=model,
        model_type="unigram",
        vocab_size=VOCAB_LIMIT,
        hard_vocab_limit=False,
        character_coverage=1.0,
        byte_fallback=True,
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


def vocab_rows(model: bytes) -> int:
    """Rows of the embedding table: the pieces, rounded up to a multiple of 64."""
    import sentencepiece

    pieces: int = sentencepiece.SentencePieceProcessor(model_proto=model).GetPieceSize()
    return -(-pieces // 64) * 64


def write_tokenizer(folder: Path, model: bytes) -> None:
    """``spiece.model`` and the same thing as ``tokenizer.json``, in the files that transformers looks for."""
    folder.mkdir(parents=True)
    (folder / "spiece.model").write_bytes(model)
    _json_tokenizer(model).save(str(folder / "tokenizer.json"))
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    config = {
        **special,
        "tokenizer_class": "PreTrainedTokenizerFast",  # runs tokenizer.json as it stands, byte fallback included
        "model_max_length": 512,
        "clean_up_tokenization_spaces": False,
        "extra_ids": 0,
        "additional_special_tokens": [],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n")


def _json_tokenizer(model: bytes) -> Any:
    import sentencepiece
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    pieces = [(processor.IdToPiece(i), processor.GetScore(i)) for i in range(processor.GetPieceSize())]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(replacement="▁", prepend_scheme="always")]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in ("<pad>", "</s>", "<unk>")])
    return tokenizer


def shapes(rows: int) -> dict[str, tuple[int, ...]]:
    """Every tensor of the encoder under its official name."""
    inner = HEADS * HEAD_DIM
    result: dict[str, tuple[int, ...]] = {"token_embedding.weight": (rows, TEXT_DIM), "norm.weight": (TEXT_DIM,)}
    for i in range(LAYERS):
        block = f"blocks.{i}"
        for name in "qkv":
            result[f"{block}.attn.{name}.weight"] = (inner, TEXT_DIM)
        result[f"{block}.attn.o.weight"] = (TEXT_DIM, inner)
        result[f"{block}.pos_embedding.embedding.weight"] = (BUCKETS, HEADS)
        result[f"{block}.ffn.gate.0.weight"] = (FFN_DIM, TEXT_DIM)
        result[f"{block}.ffn.fc1.weight"] = (FFN_DIM, TEXT_DIM)
        result[f"{block}.ffn.fc2.weight"] = (TEXT_DIM, FFN_DIM)
        result[f"{block}.norm1.weight"] = (TEXT_DIM,)
        result[f"{block}.norm2.weight"] = (TEXT_DIM,)
    return result


_TRANSFORMERS_NAMES = {
    "attn.q": "layer.0.SelfAttention.q",
    "attn.k": "layer.0.SelfAttention.k",
    "attn.v": "layer.0.SelfAttention.v",
    "attn.o": "layer.0.SelfAttention.o",
    "pos_embedding.embedding": "layer.0.SelfAttention.relative_attention_bias",
    "norm1": "layer.0.layer_norm",
    "ffn.gate.0": "layer.1.DenseReluDense.wi_0",
    "ffn.fc1": "layer.1.DenseReluDense.wi_1",
    "ffn.fc2": "layer.1.DenseReluDense.wo",
    "norm2": "layer.1.layer_norm",
}


def transformers_name(name: str) -> str:
    """The name in transformers' ``UMT5EncoderModel``, which ComfyUI's files use too."""
    if name == "token_embedding.weight":
        return "shared.weight"
    if name == "norm.weight":
        return "encoder.final_layer_norm.weight"
    _, index, rest = name.split(".", 2)
    return f"encoder.block.{index}.{_TRANSFORMERS_NAMES[rest.removesuffix('.weight')]}.weight"


def transformers_config(rows: int) -> dict[str, Any]:
    """``text_encoder/config.json`` of a Diffusers folder."""
    return {
        "architectures": ["UMT5EncoderModel"],
        "model_type": "umt5",
        "vocab_size": rows,
        "d_model": TEXT_DIM,
        "d_kv": HEAD_DIM,
        "d_ff": FFN_DIM,
        "num_layers": LAYERS,
        "num_heads": HEADS,
        "relative_attention_num_buckets": BUCKETS,
        "relative_attention_max_distance": 128,
        "dropout_rate": 0.1,
        "layer_norm_epsilon": 1e-06,
        "feed_forward_proj": "gated-gelu",
        "dense_act_fn": "gelu_new",
        "is_gated_act": True,
        "is_encoder_decoder": True,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "decoder_start_token_id": 0,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }
