"""Damaged and hostile data of the pack's own making: scales, tables of densities, settings and frames of a pool,
tokenizers. Each is taken or refused in our own words. As many cases as ``test_fuzz.py`` says."""

from __future__ import annotations

import contextlib
import json
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fuzz_kit import JSON, TIMES, cases, mutated
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save

from wan_fp8.attention import Attention
from wan_fp8.attention.sparse.calibration import Calibration
from wan_fp8.caching import MagCache
from wan_fp8.checkpoint.key_maps import NameMap
from wan_fp8.errors import CheckpointError, InputError
from wan_fp8.models.tokenizer import load_tokenizer
from wan_fp8.parallel import plain, wire
from wan_fp8.parallel.wire import Channel, WireError
from wan_fp8.quant import Recipe, load_scales, save_scales
from wan_fp8.quant.calibrate import DelayedScales

pytestmark = pytest.mark.timeout(120 * TIMES)

# ---- scales of an earlier run --------------------------------------------------------------------------------------

SITES = ("blocks.0.ffn.0", "blocks.0.ffn.2")


def model_with_scales() -> Any:
    """What ``load_scales`` asks of a model: its scales."""
    scales = DelayedScales(SITES, history_len=3, algorithm="max", margin=0)
    for site in scales.entries:
        site.calibrated = True
    return SimpleNamespace(quantization=SimpleNamespace(scales=scales))


@pytest.fixture(scope="module")
def scales_file(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("scales") / "good.safetensors"
    save_scales(model_with_scales(), path)
    return path.read_bytes()


def load_or_refuse(path: Path) -> None:
    model = model_with_scales()
    try:
        load_scales(model, path)
    except CheckpointError as error:
        assert "\n" not in str(error)
        return
    scales = model.quantization.scales
    assert scales.multiplier.isfinite().all() and (scales.multiplier > 0).all() and scales.history.isfinite().all()


@cases(120)
@given(data=st.data())
def test_damaged_files_of_scales(tmp_path: Path, scales_file: bytes, data: Any) -> None:
    path = tmp_path / "scales.safetensors"
    path.write_bytes(data.draw(mutated(scales_file)))
    load_or_refuse(path)


METADATA = st.fixed_dictionaries(
    {},
    optional={
        "format": st.just("wan_fp8_delayed_scales") | st.text(max_size=8),
        "version": st.sampled_from(["1", "2"]),
        "settings": st.sampled_from(
            ['{"amax_history_len": 3, "amax_compute_algo": "max", "margin": 0}', "{", "[" * 9999]
        )
        | JSON.map(json.dumps),
        "sites": st.sampled_from(["\n".join(SITES), ""]) | st.text(max_size=20),
    },
)
SHAPES = st.sampled_from([(), (0,), (2,), (3,), (3, 2), (2, 3), (1, 3, 2)])
DTYPES = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool, torch.float8_e4m3fn])


@cases(120)
@given(metadata=METADATA, shapes=st.tuples(SHAPES, SHAPES), dtypes=st.tuples(DTYPES, DTYPES), value=st.floats(width=32))
def test_invented_files_of_scales(tmp_path: Path, metadata: Any, shapes: Any, dtypes: Any, value: float) -> None:
    from wan_fp8.quant import calibrate

    said = {"format": calibrate.FORMAT, "version": calibrate.VERSION} | metadata
    tensors = {
        name: torch.full(shape, value).nan_to_num(0.5).to(dtype)
        for name, shape, dtype in zip(("history", "multiplier"), shapes, dtypes, strict=True)
    }
    path = tmp_path / "scales.safetensors"
    path.write_bytes(save(tensors, metadata=said))
    load_or_refuse(path)


# ---- tables of densities -------------------------------------------------------------------------------------------

TABLE = Calibration(4, ((1, 0, (0.5, 1.0)), (1, 1, (0.25, 0.5)), (2, 0, (0.5, 0.75)))).to_json()


@cases(120)
@given(data=st.data())
def test_tables_of_densities(tmp_path: Path, data: Any) -> None:
    changed = json.loads(TABLE)
    for name in data.draw(st.lists(st.sampled_from(sorted(changed)), max_size=2)):
        changed[name] = data.draw(JSON)
    if data.draw(st.booleans()) and isinstance(changed.get("densities"), list) and changed["densities"]:
        changed["densities"][0] = data.draw(JSON | st.fixed_dictionaries({"step": JSON, "block": JSON, "heads": JSON}))
    text = json.dumps(changed).encode()
    path = tmp_path / "densities.json"
    path.write_bytes(data.draw(mutated(text)) if data.draw(st.booleans()) else text)
    with contextlib.suppress(InputError):
        table = Calibration.load(path)
        assert Calibration.from_json(table.to_json()) == table and table.heads > 0


@pytest.mark.parametrize(
    "data", [b"\xff\xfe\x00", b"[" * 100_000, b'{"format": ' * 5_000], ids=["bytes", "deep", "cut"]
)
def test_what_is_no_table_at_all(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "densities.json"
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"densities\.json is not a table of densities"):
        Calibration.load(path)
    with pytest.raises(InputError, match=r"missing\.json"):
        Calibration.load(tmp_path / "missing.json")


# ---- what crosses to a pool ----------------------------------------------------------------------------------------


def frame() -> bytes:
    """One message as it lies on the wire, from a connection that cannot share memory."""
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with one, other:
        channel = Channel(one, None)
        channel._shares = False
        channel.send("forward", {"step": 1}, {"x": torch.arange(6.0).reshape(2, 3), "t": torch.ones(1)})
        return other.recv(2**16)


FRAME = frame()


@cases(150)
@given(data=mutated(FRAME))
def test_damaged_frames_close_their_connection_only(data: bytes) -> None:
    """Without a key, so that the parser behind the signature is what meets them."""
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with one, other:
        channel = Channel(other, None, sends_first=False)
        one.sendall(data)
        one.shutdown(socket.SHUT_WR)
        try:
            message = channel.receive()
        except WireError as error:
            assert str(error)
            return
        assert all(value.numel() <= 6 for value in message.tensors.values())


@cases(150)
@given(header=JSON | st.fixed_dictionaries({"kind": JSON, "fields": JSON, "tensors": st.lists(JSON, max_size=3)}))
def test_invented_headers_of_frames(header: Any) -> None:
    try:
        kind, fields, listed, arena = wire._parsed(json.dumps(header).encode())
    except (WireError, ValueError, TypeError, KeyError):  # all of them close the connection
        return
    assert isinstance(kind, str) and isinstance(fields, dict) and arena is None and isinstance(listed, list)


KINDS = st.sampled_from([*plain.TYPES, "Path", "object"])
FIELDS = st.sampled_from(["name", "backend", "threshold", "margin", "keep", "path", "ulysses", "total", "densities"])
PLAIN = st.recursive(
    JSON | st.just({"dtype": "bfloat16"}) | st.just({"float": "nan"}),
    lambda inner: (
        st.fixed_dictionaries({"type": KINDS, "fields": st.dictionaries(FIELDS, inner, max_size=3) | inner})
        | st.builds(lambda part: {"tuple": part}, inner | st.lists(inner, max_size=3))
        | st.builds(lambda part: {"set": part}, st.lists(inner, max_size=3))
    ),
    max_leaves=6,
)


@cases(250)
@given(value=PLAIN)
def test_settings_that_nobody_made(value: Any) -> None:
    with contextlib.suppress(WireError, InputError):
        plain.from_plain(value)


GOOD_SETTINGS = [Attention("sdpa"), Recipe("rowwise", keep=("blocks.0.",)), MagCache(threshold=0.1)]


@cases(150)
@given(data=st.data())
def test_settings_with_one_value_exchanged(data: Any) -> None:
    given_ = plain.to_plain(data.draw(st.sampled_from(GOOD_SETTINGS)))
    name = data.draw(st.sampled_from(sorted(given_["fields"])))
    given_["fields"][name] = data.draw(PLAIN)
    with contextlib.suppress(WireError, InputError):
        plain.from_plain(given_)


# ---- names and tokenizers ------------------------------------------------------------------------------------------

WORDS = """blocks 0 39 99999999999 self_attn attn1 to_q to_out ffn net proj weight bias patch_embedding down mid
encoder decoder shared block layer"""


@cases(150)
@given(name=st.lists(st.sampled_from(WORDS.split()), max_size=8).map(".".join) | st.text(max_size=200))
def test_name_maps_answer_for_every_name(name: str) -> None:
    from wan_fp8.checkpoint import key_maps

    maps = [value for value in vars(key_maps).values() if isinstance(value, NameMap)]
    assert maps
    for one in maps:
        for translate in (one.to_official, one.from_official):
            found = translate(name)
            assert found is None or isinstance(found, str)


TOKENIZER = json.dumps(
    {
        "version": "1.0",
        "added_tokens": [],
        "model": {"type": "WordLevel", "vocab": {"</s>": 0, "a": 1}, "unk_token": "a"},
    }
).encode()


@cases(60)
@given(
    data=mutated(TOKENIZER) | JSON.map(lambda value: json.dumps(value).encode()),
    name=st.sampled_from(["json", "model"]),
)
def test_damaged_tokenizers(tmp_path: Path, data: bytes, name: str) -> None:
    path = tmp_path / ("tokenizer.json" if name == "json" else "spiece.model")
    path.write_bytes(data)
    with contextlib.suppress(CheckpointError):
        assert isinstance(load_tokenizer(path).ids("a b"), list)
