"""UMT5 against transformers and against the official mathematics written out; tokens; cleaning; bad files."""

from __future__ import annotations

import json
import logging
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from wan_fp8.errors import CheckpointError, InputError
from wan_fp8.models.text_encoder import TextEncoder, load_text_encoder
from wan_fp8.models.tokenizer import clean_prompt, cut_ids, find_tokenizer, load_tokenizer
from wan_fp8.models.umt5 import build_umt5, normalized_names, quantize_rows, spec_of

PACK = Path(__file__).resolve().parents[2]
VOCAB, WIDTH, HEADS, HEAD_DIM, FFN, LAYERS = 60, 48, 3, 8, 40, 3
LINEARS = ("attn.q", "attn.k", "attn.v", "attn.o", "ffn.gate.0", "ffn.fc1", "ffn.fc2")


def official_state_dict(dtype: torch.dtype = torch.float32, scale: float = 1.0) -> dict[str, Tensor]:
    """A random encoder under official names, as large in spirit as the real one is in fact."""
    generator = torch.Generator().manual_seed(0)

    def rand(*shape: int, std: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator) * std * scale).to(dtype)

    inner = HEADS * HEAD_DIM
    shapes = {
        "attn.q": (inner, WIDTH),
        "attn.k": (inner, WIDTH),
        "attn.v": (inner, WIDTH),
        "attn.o": (WIDTH, inner),
        "ffn.gate.0": (FFN, WIDTH),
        "ffn.fc1": (FFN, WIDTH),
        "ffn.fc2": (WIDTH, FFN),
    }
    sd = {"token_embedding.weight": rand(VOCAB, WIDTH), "norm.weight": 1 + rand(WIDTH, std=0.1)}
    for i in range(LAYERS):
        for name, (rows, columns) in shapes.items():
            # As T5 is initialised: the queries carry the 1/sqrt(E) that its attention leaves out.
            std = (columns * HEAD_DIM) ** -0.5 if name == "attn.q" else columns**-0.5
            sd[f"blocks.{i}.{name}.weight"] = rand(rows, columns, std=std)
        sd[f"blocks.{i}.pos_embedding.embedding.weight"] = rand(32, HEADS)
        sd[f"blocks.{i}.norm1.weight"] = 1 + rand(WIDTH, std=0.1)
        sd[f"blocks.{i}.norm2.weight"] = 1 + rand(WIDTH, std=0.1)
    return sd


def official_forward(sd: dict[str, Tensor], ids: Tensor, mask: Tensor) -> Tensor:
    """The encoder's mathematics in plain tensor operations, one layer after the other."""

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return weight * (x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)).type_as(weight)

    def buckets(length: int) -> Tensor:
        distance = torch.arange(length)[None, :] - torch.arange(length)[:, None]
        far = 8 + (distance.abs().float().div(8).log() / math.log(128 / 8) * 8).long()
        near_or_far = torch.where(distance.abs() < 8, distance.abs(), far.clamp(max=15))
        return near_or_far + 16 * (distance > 0)

    x = sd["token_embedding.weight"][ids]
    batch, length, _ = x.shape
    for i in range(LAYERS):
        w = {k.removeprefix(f"blocks.{i}."): v for k, v in sd.items() if k.startswith(f"blocks.{i}.")}
        h = norm(x, w["norm1.weight"])
        q, k, v = (
            F.linear(h, w[f"attn.{n}.weight"]).view(batch, length, HEADS, HEAD_DIM).transpose(1, 2) for n in "qkv"
        )
        bias = w["pos_embedding.embedding.weight"][buckets(length)].permute(2, 0, 1)[None].expand(batch, -1, -1, -1)
        bias = bias.masked_fill(mask[:, None, None, :] == 0, torch.finfo(x.dtype).min)
        weights = torch.softmax((q @ k.transpose(-1, -2) + bias).float(), dim=-1).type_as(x)
        x = x + F.linear((weights @ v).transpose(1, 2).flatten(2), w["attn.o.weight"])
        h = norm(x, w["norm2.weight"])
        gate = F.linear(h, w["ffn.gate.0.weight"])
        gate = 0.5 * gate * (1 + torch.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)))
        x = x + F.linear(F.linear(h, w["ffn.fc1.weight"]) * gate, w["ffn.fc2.weight"])
    return norm(x, sd["norm.weight"])


def transformers_model(sd: dict[str, Tensor]) -> Any:
    from transformers import UMT5Config, UMT5EncoderModel

    config = UMT5Config(
        vocab_size=VOCAB, d_model=WIDTH, d_kv=HEAD_DIM, d_ff=FFN, num_layers=LAYERS, num_heads=HEADS, dropout_rate=0.0
    )
    model = UMT5EncoderModel(config).eval()
    model.load_state_dict(transformers_state_dict(sd), strict=True)
    return model


def transformers_state_dict(sd: dict[str, Tensor]) -> dict[str, Tensor]:
    names = {
        "attn.q": "0.SelfAttention.q",
        "attn.k": "0.SelfAttention.k",
        "attn.v": "0.SelfAttention.v",
        "attn.o": "0.SelfAttention.o",
        "pos_embedding.embedding": "0.SelfAttention.relative_attention_bias",
        "norm1": "0.layer_norm",
        "ffn.gate.0": "1.DenseReluDense.wi_0",
        "ffn.fc1": "1.DenseReluDense.wi_1",
        "ffn.fc2": "1.DenseReluDense.wo",
        "norm2": "1.layer_norm",
    }
    result = {
        "shared.weight": sd["token_embedding.weight"],
        "encoder.embed_tokens.weight": sd["token_embedding.weight"],
        "encoder.final_layer_norm.weight": sd["norm.weight"],
    }
    for i in range(LAYERS):
        for ours, theirs in names.items():
            result[f"encoder.block.{i}.layer.{theirs}.weight"] = sd[f"blocks.{i}.{ours}.weight"]
    return result


def ids_and_mask() -> tuple[Tensor, Tensor]:
    ids = torch.randint(1, VOCAB, (2, 150), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    ids[1, 37:] = 0
    mask[1, 37:] = 0
    return ids, mask


def rel(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def cosine(a: Tensor, b: Tensor) -> float:
    """Over all rows together; no single row may be far off either."""
    assert F.cosine_similarity(a.double(), b.double(), dim=-1).min() > 0.98
    return F.cosine_similarity(a.double().flatten(), b.double().flatten(), dim=0).item()


class WordTokenizer:
    """One id per word, so that lengths are obvious; 1 ends a text."""

    def ids(self, text: str) -> list[int]:
        return [2 + len(word) for word in text.split()] + [1]


@pytest.fixture
def encoder() -> TextEncoder:
    return load_text_encoder(official_state_dict(), dtype=torch.float32, tokenizer=WordTokenizer())


def test_fp32_is_the_official_mathematics(encoder: TextEncoder) -> None:
    ids, mask = ids_and_mask()
    expected = official_forward(official_state_dict(), ids, mask)
    result = encoder.encode_ids(ids, mask)
    assert result.shape == (2, 150, WIDTH) and result.dtype == torch.float32
    assert rel(result[0], expected[0]) < 1e-5
    assert rel(result[1, :37], expected[1, :37]) < 1e-5


def test_float64_is_an_oracle() -> None:
    ids, mask = ids_and_mask()
    sd = official_state_dict(torch.float64)
    result = load_text_encoder(sd, dtype=torch.float64).encode_ids(ids, mask)
    assert rel(result[0], official_forward(sd, ids, mask)[0]) < 1e-6  # both take norms and softmax in fp32


@pytest.mark.parametrize("naming", ["official", "transformers"])
def test_fp32_is_transformers(naming: str) -> None:
    ids, mask = ids_and_mask()
    sd = official_state_dict()
    reference = transformers_model(sd)
    with torch.no_grad():
        expected = reference(input_ids=ids, attention_mask=mask).last_hidden_state
    source = sd if naming == "official" else transformers_state_dict(sd)
    result = load_text_encoder(source, dtype=torch.float32).encode_ids(ids, mask)
    assert rel(result, expected) < 1e-6


@pytest.mark.parametrize("prefix", ["", "text_encoder.", "text_encoders.umt5xxl.transformer."])
def test_prefixes_and_bystanders_are_recognised(prefix: str) -> None:
    ids, _ = ids_and_mask()
    sd = transformers_state_dict(official_state_dict())
    expected = load_text_encoder(sd, dtype=torch.float32).encode_ids(ids)
    del sd["encoder.embed_tokens.weight"]
    wrapped = {prefix + key: value for key, value in sd.items()}
    wrapped[prefix + "decoder.block.0.layer.0.layer_norm.weight"] = torch.ones(3)
    wrapped[prefix + "lm_head.weight"] = torch.ones(3)
    assert torch.equal(load_text_encoder(wrapped, dtype=torch.float32).encode_ids(ids), expected)


def test_a_padded_prompt_has_the_rows_of_the_unpadded_one(encoder: TextEncoder) -> None:
    ids, mask = ids_and_mask()
    assert rel(encoder.encode_ids(ids[1:, :37]), encoder.encode_ids(ids, mask)[1:, :37]) < 1e-6


@pytest.mark.parametrize(("dtype", "limit"), [(torch.bfloat16, 0.9999), (torch.float16, 0.99999)])
def test_half_precision_rows_point_the_same_way(encoder: TextEncoder, dtype: torch.dtype, limit: float) -> None:
    ids, _ = ids_and_mask()
    half = load_text_encoder(official_state_dict(), dtype=dtype)
    assert half.compute_dtype == half.storage_dtype == dtype
    assert cosine(half.encode_ids(ids), encoder.encode_ids(ids)) > limit


def test_bf16_is_the_official_mathematics_in_bf16() -> None:
    ids, mask = ids_and_mask()
    sd = official_state_dict(torch.bfloat16)
    result = load_text_encoder(sd).encode_ids(ids, mask)
    assert result.dtype == torch.bfloat16
    assert cosine(result[0], official_forward(sd, ids, mask)[0]) > 0.9999


def test_fp16_overflow_is_clamped() -> None:
    """The published guard: infinities of an fp16 residual become the largest value less 1000."""
    sd = official_state_dict()
    for i in range(LAYERS):
        sd[f"blocks.{i}.ffn.fc2.weight"] = sd[f"blocks.{i}.ffn.fc2.weight"].sign() * 60000
    rows = load_text_encoder(sd, dtype=torch.float16).encode_ids(ids_and_mask()[0])
    assert rows.isfinite().all()


def test_fp8_storage(encoder: TextEncoder) -> None:
    ids, _ = ids_and_mask()
    fp8 = load_text_encoder(official_state_dict(), dtype=torch.float8_e4m3fn)
    assert fp8.compute_dtype == torch.bfloat16 and fp8.storage_dtype == torch.float8_e4m3fn
    linear = fp8.model.get_submodule("encoder.block.0.layer.1.DenseReluDense.wo")
    assert linear.qdata.dtype == torch.float8_e4m3fn and linear.scale.shape == (WIDTH, 1)
    linears = sum(v.numel() for k, v in official_state_dict().items() if any(f".{n}." in k for n in LINEARS))
    others = sum(v.numel() for v in official_state_dict().values()) - linears
    rows = LAYERS * (3 * HEADS * HEAD_DIM + WIDTH + 2 * FFN + WIDTH)
    assert fp8.num_bytes == linears + 2 * others + 4 * rows
    result = fp8.encode_ids(ids)
    assert result.dtype == torch.bfloat16
    assert cosine(result, encoder.encode_ids(ids)) > 0.99
    assert rel(result, encoder.encode_ids(ids)) < 0.1


def test_fp8_output_is_that_of_the_dequantised_weights() -> None:
    """Storage in FP8 changes the weights once and nothing else."""
    ids, _ = ids_and_mask()
    sd = official_state_dict()
    rounded = dict(sd)
    for key, value in sd.items():
        if any(f".{n}." in key for n in LINEARS):
            qdata, scale = quantize_rows(value, None)
            rounded[key] = qdata.float() * scale
    expected = load_text_encoder(rounded, dtype=torch.float32).encode_ids(ids)
    assert cosine(load_text_encoder(sd, dtype=torch.float8_e4m3fn).encode_ids(ids), expected) > 0.9999


def scaled_fp8(sd: dict[str, Tensor], suffix: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A ComfyUI-style file with one scale per tensor, and the same weights in fp32."""
    stored, plain = transformers_state_dict(sd), transformers_state_dict(sd)
    stored["scaled_fp8"] = torch.empty(0, dtype=torch.float8_e4m3fn)
    for key in [k for k in stored if "SelfAttention." in k or "DenseReluDense" in k]:
        if "relative" in key:
            continue
        scale = stored[key].abs().max() / 448
        stored[key] = (stored[key] / scale).to(torch.float8_e4m3fn)
        stored[key.removesuffix("weight") + suffix] = scale
        plain[key] = stored[key].float() * scale
    return stored, plain


@pytest.mark.parametrize("suffix", ["scale_weight", "weight_scale"])
def test_scaled_fp8_files(suffix: str) -> None:
    ids, _ = ids_and_mask()
    stored, plain = scaled_fp8(official_state_dict(), suffix)
    expected = load_text_encoder(plain, dtype=torch.float32).encode_ids(ids)
    assert rel(load_text_encoder(stored, dtype=torch.float32).encode_ids(ids), expected) < 1e-6
    kept = load_text_encoder(stored, dtype=torch.float8_e4m3fn)
    name = "encoder.block.1.layer.0.SelfAttention.q"
    assert torch.equal(
        kept.model.get_submodule(name).qdata.view(torch.uint8), stored[f"{name}.weight"].view(torch.uint8)
    )
    assert cosine(kept.encode_ids(ids), expected) > 0.9999


def test_quantised_rows_reach_the_largest_value_and_keep_zero_rows() -> None:
    weight = torch.randn(5, 64)
    weight[2] = 0
    qdata, scale = quantize_rows(weight, None)
    values = qdata.float() * scale
    assert torch.equal(values[2], torch.zeros(64))
    assert qdata.float().abs().amax(1)[[0, 1, 3, 4]].tolist() == [448.0] * 4
    # e4m3 keeps three bits after the leading one: half a step is 1/16 of the value, or of its smallest normal.
    assert ((values - weight).abs() <= weight.abs() / 16 + scale * 2**-10).all()


def test_the_source_is_not_changed() -> None:
    sd = official_state_dict()
    before = {key: value.clone() for key, value in sd.items()}
    load_text_encoder(sd, dtype=torch.float8_e4m3fn).encode_ids(ids_and_mask()[0])
    assert sd.keys() == before.keys()
    assert all(torch.equal(sd[key], before[key]) for key in sd)


def test_weights_are_given_back_while_they_are_converted() -> None:
    """Loading in another type never holds all weights twice: each stored tensor goes once its converted copy exists."""
    tensors = normalized_names(official_state_dict())
    build_umt5(tensors, spec_of(tensors), storage_dtype=torch.bfloat16, compute_dtype=torch.bfloat16, device="cpu")
    assert tensors == {}


def test_the_embedding_table_exists_once(encoder: TextEncoder) -> None:
    assert encoder.width == WIDTH
    encoder.to("meta")
    assert encoder.device.type == "meta"
    assert encoder.model.encoder.embed_tokens.weight is encoder.model.shared.weight
    assert encoder.num_bytes == 4 * sum(v.numel() for v in official_state_dict().values())


@pytest.mark.parametrize(
    ("raw", "cleaned"),
    [
        ("  a\t cat\n\n on  a mat ", "a cat on a mat"),
        ("caf\u00c3\u00a9", "caf\u00e9"),
        ("\u201csmart\u201d \u2018quotes\u2019", "\"smart\" 'quotes'"),
        ("salt &amp;amp; pepper", "salt & pepper"),
        ("&lt;b&gt;bold&lt;/b&gt;", "<b>bold</b>"),
        ("\uff21\uff22\uff23\uff0c\u732b", "ABC,\u732b"),
        ("A  Cat\u00a0\u3000Runs", "A Cat Runs"),
        ("&nbsp;", ""),
        ("", ""),
    ],
)
def test_cleaning(raw: str, cleaned: str) -> None:
    assert clean_prompt(raw) == cleaned


def test_cutting_keeps_the_end_of_sequence() -> None:
    assert cut_ids([5, 6, 1], 3) == ([5, 6, 1], 0)
    assert cut_ids([5, 6, 7, 8, 1], 3) == ([5, 6, 1], 2)


def test_encode_pads_with_zeros(encoder: TextEncoder) -> None:
    rows = encoder.encode(["a bb  ccc", "dddd"])
    assert rows.shape == (2, 512, WIDTH)
    expected = encoder.encode_ids(torch.tensor([[3, 4, 5, 1]]))[0]
    assert torch.equal(rows[0, :4], expected)
    assert not rows[0, 4:].any() and rows[1, :2].any() and not rows[1, 2:].any()
    assert torch.equal(encoder.encode("a bb ccc"), rows[:1])
    assert torch.equal(encoder.encode_prompt("a bb ccc"), expected)


def test_a_long_prompt_is_cut_and_says_so(encoder: TextEncoder, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        tokens = encoder.tokenize("word " * 600)
    assert (len(tokens.ids), tokens.lost_tokens, tokens.ids[-2:]) == (512, 89, (6, 1))
    assert "The prompt has 601 tokens; the model reads 512, so the last 89 were cut off" in caplog.text
    caplog.clear()
    assert encoder.tokenize("word " * 511).lost_tokens == 0
    assert not caplog.text
    assert encoder.encode("word " * 600)[0, 511].any()


def test_rows_are_kept_by_prompt(encoder: TextEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    original = encoder.model.forward
    monkeypatch.setattr(encoder.model, "forward", lambda **kw: (calls.append(1), original(**kw))[1])
    first = encoder.encode_prompt("a cat")
    first.zero_()  # what a caller does to its rows must not reach the kept ones
    again = encoder.encode_prompt("  a   cat ")
    assert len(calls) == 1 and again.any()
    for count in range(9):
        encoder.encode_prompt("x" * (count + 5))
    encoder.encode_prompt("a cat")
    assert len(calls) == 11


def test_ids_are_checked(encoder: TextEncoder) -> None:
    with pytest.raises(InputError, match=rf"lie in 0\.\.{VOCAB - 1}; got 1 to {VOCAB}.*does not belong"):
        encoder.encode_ids(torch.tensor([[1, VOCAB]]))
    with pytest.raises(InputError, match=r"lie in"):
        encoder.encode_ids(torch.tensor([[-1]]))
    with pytest.raises(InputError, match=r"\[prompts, tokens\]; got \(3,\)"):
        encoder.encode_ids(torch.tensor([1, 2, 3]))
    with pytest.raises(InputError, match=r"attention_mask must have the shape"):
        encoder.encode_ids(torch.tensor([[1, 2]]), torch.ones(1, 3))


def test_no_tokenizer_is_an_error_of_encode_only() -> None:
    encoder = load_text_encoder(official_state_dict(), dtype=torch.float32)
    assert encoder.encode_ids(torch.tensor([[3, 1]])).shape == (1, 2, WIDTH)
    with pytest.raises(
        CheckpointError, match=r"no tokenizer .*put the google/umt5-xxl folder .*, or use a umt5_xxl \.safetensors"
    ):
        encoder.encode("a cat")


def test_bad_sources_are_refused() -> None:
    sd = official_state_dict()
    with pytest.raises(CheckpointError, match=r"no UMT5 text encoder \(it holds blocks.0.self_attn.q.weight"):
        load_text_encoder({"blocks.0.self_attn.q.weight": torch.ones(1)})
    with pytest.raises(CheckpointError, match=r"it holds nothing"):
        load_text_encoder({})
    with pytest.raises(
        CheckpointError, match=r"lacks encoder.block.2.layer.1.layer_norm.weight; the file is incomplete"
    ):
        load_text_encoder({k: v for k, v in sd.items() if k != "blocks.2.norm2.weight"})
    with pytest.raises(CheckpointError, match=r"incomplete: encoder.block.0.layer.0.SelfAttention.q.weight is missing"):
        load_text_encoder({k: v for k, v in sd.items() if k != "blocks.0.attn.q.weight"})
    with pytest.raises(CheckpointError, match=r"tensors that UMT5 does not have: surprise.weight"):
        load_text_encoder({**sd, "surprise.weight": torch.ones(1)})
    with pytest.raises(CheckpointError, match=r"another shape: encoder.final_layer_norm.weight \(7,\) for \(48,\)"):
        load_text_encoder({**sd, "norm.weight": torch.ones(7)})
    t5 = {k: v for k, v in transformers_state_dict(sd).items() if "relative" not in k or "block.0" in k}
    with pytest.raises(CheckpointError, match=r"this is a T5 text encoder"):
        load_text_encoder(t5)
    with pytest.raises(InputError, match=r"dtype must be one of bfloat16, .*; got int8"):
        load_text_encoder(sd, dtype=torch.int8)


def train_tokenizer(folder: Path) -> Path:
    """A SentencePiece model with UMT5's special ids, which falls back to bytes."""
    import sentencepiece

    folder.mkdir(parents=True, exist_ok=True)
    text = ["a cat walks on the mat in the rain", "the cat and the dog play", "一只猫在雨中行走", "静态，细节模糊不清"]  # noqa: RUF001
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(text * 5),
        model_prefix=str(folder / "spiece"),
        vocab_size=340,
        hard_vocab_limit=False,
        model_type="unigram",
        byte_fallback=True,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    return folder / "spiece.model"


def test_sentencepiece_tokenizer(tmp_path: Path) -> None:
    import sentencepiece

    path = train_tokenizer(tmp_path / "google" / "umt5-xxl")
    reference = sentencepiece.SentencePieceProcessor(model_file=str(path), add_eos=True)
    for source in (path, path.parent, str(path), path.read_bytes()):
        tokenizer = load_tokenizer(source)
        for text in ("a cat walks", "一只猫", "emoji 🐈 and Ω", ""):
            assert tokenizer.ids(text) == reference.encode(text)
            assert tokenizer.ids(text)[-1] == 1
    embedded = {
        **official_state_dict(),
        "spiece_model": torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8),
    }
    encoder = load_text_encoder(embedded, dtype=torch.float32)
    assert encoder.tokenizer is not None and encoder.tokenizer.ids("a cat") == reference.encode("a cat")


def test_json_tokenizer_is_run_as_it_stands(tmp_path: Path) -> None:
    """Padding and truncation stored in the file are switched off; a missing end of sequence is added."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -5.0), ("▁a", -1.0), ("▁cat", -1.0)]
    tokenizer = Tokenizer(models.Unigram(vocab, unk_id=2, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=20)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).ids("a cat a cat") == [4, 5, 4, 5, 1]


def test_transformers_tokenizer_objects_are_taken(tmp_path: Path) -> None:
    def tokenizer(text: str, add_special_tokens: bool, verbose: bool) -> dict[str, list[int]]:
        assert add_special_tokens and not verbose
        return {"input_ids": [len(text), 1]}

    assert load_tokenizer(tokenizer).ids("abc") == [3, 1]


def test_bad_tokenizers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds neither tokenizer.json nor spiece.model"):
        load_tokenizer(tmp_path)
    with pytest.raises(CheckpointError, match=r"there is no tokenizer at"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"is not a readable SentencePiece model"):
        load_tokenizer(b"not a model")
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"is not a readable tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(CheckpointError, match=r"notes.txt is not a tokenizer"):
        load_tokenizer(tmp_path / "notes.txt")
    with pytest.raises(InputError, match=r"got int"):
        load_tokenizer(3)


def test_tokenizers_are_found_beside_the_weights(tmp_path: Path) -> None:
    assert find_tokenizer(tmp_path / "official" / "models_t5.pth") is None
    for layout, weights, folder in [
        ("official", "models_t5.pth", "google/umt5-xxl"),
        ("diffusers", "text_encoder", "tokenizer"),
        ("same", "", "."),
    ]:
        base = tmp_path / layout
        (base / folder).mkdir(parents=True)
        (base / folder / "spiece.model").write_bytes(b"")
        if weights == "text_encoder":
            (base / weights).mkdir()
        found = find_tokenizer(base / weights)
        assert found is not None and found.resolve() == (base / folder).resolve()


def test_import_brings_no_optional_library() -> None:
    """The module costs nothing until a text encoder is loaded."""
    code = (
        "import json, sys\n"
        f"sys.path.insert(0, {str(PACK)!r})\n"
        "import wan_fp8.models.text_encoder, wan_fp8.sampling\n"
        "print(json.dumps([m for m in ('transformers', 'ftfy', 'tokenizers', 'sentencepiece', 'PIL', 'comfy')"
        " if m in sys.modules]))\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(result.stdout) == []
