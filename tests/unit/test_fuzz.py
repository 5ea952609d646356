"""Damaged and hostile files: every loader answers or refuses in its own words, soon, in little memory, in its folder.

A fixed number of generated cases, the same in every run. ``WAN_FP8_FUZZ=100`` makes a hundred times as many, others in
every run.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import struct
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzz_kit import JSON, cases, mutated
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save

from wan_fp8.caching.curves import Curve, load_curve, save_curve
from wan_fp8.checkpoint.detect import inspect
from wan_fp8.checkpoint.folder import config_task, resolve_folder
from wan_fp8.checkpoint.lora import fit, read_lora
from wan_fp8.checkpoint.reader import open_source, read_json, shards_of
from wan_fp8.errors import CheckpointError, InputError

GROWTH_MIB = 300


def resident_mib() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


@pytest.fixture(scope="module", autouse=True)
def _little_memory() -> Iterator[None]:
    if not sys.platform.startswith("linux"):
        yield
        return
    before = resident_mib()
    yield
    assert resident_mib() - before < GROWTH_MIB


def read_all(path: Path) -> None:
    """What loading does with a file: says what it is, and reads every tensor."""
    inspect(path)
    with open_source(path) as source:
        for name in source.tensors:
            source.read(name)


# ---- safetensors ---------------------------------------------------------------------------------------------------

GOOD = save({"blocks.0.a": torch.arange(12.0).reshape(3, 4), "head.head.weight": torch.ones(2, dtype=torch.bfloat16)})
NAMES = st.sampled_from(
    [
        "blocks.0.self_attn.q.weight",
        "head.modulation",
        "patch_embedding.weight",
        "../x",
        "",
        "a" * 300,
        "\0",
        "__metadata__",
    ]
) | st.text(max_size=30)
SIZES = st.sampled_from([0, 1, 2, 16, 2**31, 2**48 - 1, 2**63, -1]) | st.integers(0, 64)
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "F8_E4M3", "I64", "BOOL", "F4", "", "Q4_K"]),
        "shape": st.lists(SIZES, max_size=6),
        "data_offsets": st.lists(SIZES, max_size=3),
    }
)


def with_header(header: Any, body: bytes, length: int | None = None) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length % 2**64) + text + body


@cases(150)
@given(data=mutated(GOOD))
def test_damaged_safetensors(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    try:
        read_all(path)
    except CheckpointError as error:
        assert "\n" not in str(error).strip()


@cases(150)
@given(
    header=st.dictionaries(NAMES, ENTRIES | JSON, max_size=4) | JSON,
    body=st.binary(max_size=64),
    length=st.none() | SIZES,
)
def test_invented_headers(tmp_path: Path, header: Any, body: bytes, length: int | None) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(with_header(header, body, length))
    with contextlib.suppress(CheckpointError):
        read_all(path)


@cases(60)
@given(deep=st.integers(100, 100_000), opening=st.sampled_from(["[", '{"a":']))
def test_deep_headers(tmp_path: Path, deep: int, opening: str) -> None:
    text = ('{"a":' + opening * deep).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    with pytest.raises(CheckpointError):
        read_all(path)


# ---- folders -------------------------------------------------------------------------------------------------------

FILES = st.sampled_from(
    [
        "diffusion_pytorch_model-00001-of-00001.safetensors",
        "../secret.safetensors",
        "/etc/passwd",
        "..",
        "a\0b",
        "C:x",
        "",
    ]
)


@cases(120)
@given(index=st.fixed_dictionaries({"weight_map": st.dictionaries(NAMES, FILES | JSON, max_size=4)}) | JSON)
def test_an_index_never_leads_out_of_its_folder(tmp_path: Path, index: Any) -> None:
    folder = tmp_path / "model"
    folder.mkdir(exist_ok=True)
    (tmp_path / "secret.safetensors").write_bytes(GOOD)
    (folder / "diffusion_pytorch_model-00001-of-00001.safetensors").write_bytes(GOOD)
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    try:
        found = shards_of(folder)
    except CheckpointError:
        return
    assert all(path.resolve().parent == folder.resolve() for path in found)


CONFIGS = st.dictionaries(
    st.sampled_from(
        ["_class_name", "model_type", "in_dim", "in_channels", "out_dim", "dim", "boundary_ratio", "transformer"]
    ),
    JSON | st.sampled_from(["WanModel", "t2v", "i2v", "ti2v", "WanTransformer3DModel"]),
    max_size=6,
)


@cases(120)
@given(config=CONFIGS | JSON, index=CONFIGS | JSON, raw=st.none() | st.binary(max_size=40))
def test_configurations_of_folders(tmp_path: Path, config: Any, index: Any, raw: bytes | None) -> None:
    folder = tmp_path / "checkpoint"
    (folder / "high_noise_model").mkdir(parents=True, exist_ok=True)
    (folder / "transformer").mkdir(exist_ok=True)
    text = json.dumps(config).encode() if raw is None else raw
    for place in (folder, folder / "high_noise_model", folder / "transformer"):
        (place / "config.json").write_bytes(text)
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    for attempt in (lambda: config_task(read_json(folder / "config.json")), lambda: resolve_folder(folder)):
        with contextlib.suppress(CheckpointError):
            attempt()


# ---- names and shapes ----------------------------------------------------------------------------------------------

WORDS = """model diffusion_model transformer transformer_2 base_model blocks 0 1 39 -1 self_attn cross_attn q k norm_q
ffn 2 weight bias modulation scale_weight comfy_quant lora_A lora_B lora_up lora_down diff diff_b diff_m alpha
dora_scale head patch_embedding text_embedding condition_embedder time_proj shared encoder block layer default
lora_unet"""
PARTS = st.sampled_from(WORDS.split())
KEYS = st.lists(PARTS, min_size=1, max_size=7).map(".".join) | st.lists(PARTS, max_size=6).map("_".join) | NAMES
SHAPES = st.lists(st.sampled_from([0, 1, 2, 4, 6, 16, 36, 48, 64, 128]), max_size=5)


@st.composite
def state_dicts(draw: Any) -> dict[str, torch.Tensor]:
    """Tensors of no size that matters under names that look like something."""
    found = {}
    for key in draw(st.lists(KEYS, max_size=8)):
        shape = draw(SHAPES)
        dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.uint8, torch.int64]))
        found[key] = torch.zeros((), dtype=dtype).expand(shape) if shape else torch.zeros((), dtype=dtype)
    return found


@cases(200)
@given(weights=state_dicts())
def test_state_dicts_are_recognised_or_refused(weights: dict[str, torch.Tensor]) -> None:
    with contextlib.suppress(CheckpointError):
        inspect(weights)


SHAPES_OF_MODEL = {
    "blocks.0.self_attn.q.weight": (64, 64),
    "blocks.0.modulation": (1, 6, 64),
    "head.modulation": (1, 2, 64),
}


@cases(200)
@given(weights=state_dicts(), expert=st.sampled_from([None, "high_noise", "low_noise"]))
def test_lora_files(weights: dict[str, torch.Tensor], expert: str | None) -> None:
    with contextlib.suppress(CheckpointError, InputError):
        fit(read_lora(weights), SHAPES_OF_MODEL, expert)


# ---- curves and pickles --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def curve(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("curve") / "good.json"
    levels = (1.0, 0.8, 0.5, 0.2)
    save_curve(
        Curve(name="good", task="t2v", sigmas=levels, cond=(1.0,) * 4, uncond=(1.0,) * 4, switch=None, source="a test"),
        path,
    )
    return dict(json.loads(path.read_text()))


@cases(150)
@given(data=st.data())
def test_curves(tmp_path: Path, curve: dict[str, Any], data: Any) -> None:
    changed = dict(curve)
    for name in data.draw(st.lists(st.sampled_from(sorted(curve)), max_size=3)):
        if data.draw(st.booleans()):
            changed.pop(name, None)
        else:
            changed[name] = data.draw(JSON | st.lists(st.floats() | st.integers(), max_size=6))
    text = json.dumps(changed).encode()
    path = tmp_path / "curve.json"
    path.write_bytes(data.draw(mutated(text)) if data.draw(st.booleans()) else text)
    try:
        load_curve(path)
    except InputError as error:
        assert re.search(r"\w", str(error))


PICKLED = io.BytesIO()
torch.save({"blocks.0.a": torch.arange(4.0), "head.modulation": torch.ones(1, 2, 8)}, PICKLED)


@cases(150)
@given(data=mutated(PICKLED.getvalue()))
def test_damaged_pickles(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "model.pth"
    path.write_bytes(data)
    with contextlib.suppress(CheckpointError):
        read_all(path)


@cases(60)
@given(
    program=st.binary(max_size=60) | mutated(zipfile.ZipFile(io.BytesIO(PICKLED.getvalue())).read("archive/data.pkl"))
)
def test_pickles_that_are_programs(tmp_path: Path, program: bytes) -> None:
    """The archive is whole; its pickle is something else."""
    path = tmp_path / "model.pth"
    with zipfile.ZipFile(io.BytesIO(PICKLED.getvalue())) as good, zipfile.ZipFile(path, "w") as bad:
        for name in good.namelist():
            bad.writestr(name, program if name.endswith("data.pkl") else good.read(name))
    with contextlib.suppress(CheckpointError):
        read_all(path)
    assert not (tmp_path / "pwned").exists()
