"""Opening weight files: headers are checked before memory is taken, bytes arrive exactly, files that lie are named."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from checkpoint_kit import E4M3, named_like, raw_safetensors, write_shards
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from wan_fp8.checkpoint.header import read_header, sniff
from wan_fp8.checkpoint.reader import open_source, shards_of
from wan_fp8.errors import CheckpointError

FLOAT_ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
EIGHT = bytes(8)


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


# ---- headers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"abc", "truncated: 3 bytes"),
        (raw_safetensors({"a": FLOAT_ENTRY}, EIGHT)[:20], "truncated: its header alone promises"),
        (raw_safetensors({"a": FLOAT_ENTRY}, EIGHT[:5]), "truncated: its header promises"),
        (raw_safetensors({"a": FLOAT_ENTRY}, EIGHT + b"x"), "1 bytes follow its last tensor"),
        (raw_safetensors(b'{"a": [,]}'), "not JSON"),
        (raw_safetensors(b"{" * 2000), "not JSON"),
        (raw_safetensors(b'{"a":{"dtype":"F32","shape":[],"data_offsets":[0,4]},"a":1}', EIGHT), "names 'a' twice"),
        (raw_safetensors({"a": 3}), "no valid place"),
        (raw_safetensors({"a": {**FLOAT_ENTRY, "data_offsets": [4, 2]}}, EIGHT), "no valid place"),
        (raw_safetensors({"a": {**FLOAT_ENTRY, "data_offsets": [0, True]}}, EIGHT), "no valid place"),
        (raw_safetensors({"a": {**FLOAT_ENTRY, "shape": [-2]}}, EIGHT), "no valid shape"),
        (raw_safetensors({"a": {**FLOAT_ENTRY, "shape": [2**62]}}, EIGHT), "no valid shape"),
        (raw_safetensors({"a": {**FLOAT_ENTRY, "shape": [3]}}, EIGHT), "12 bytes, but has 8"),
        (raw_safetensors({"a": FLOAT_ENTRY, "b": FLOAT_ENTRY}, EIGHT), "do not follow those before"),
        (raw_safetensors({"a": {**FLOAT_ENTRY, "data_offsets": [8, 16]}}, EIGHT * 2), "do not follow those before"),
        (raw_safetensors({"__metadata__": {"format": 3}}), "metadata is not a table of strings"),
        (b"GGUF" + bytes(60), "is a GGUF file"),
        (b"<!DOCTYPE html><html></html>", "is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n", "Git LFS pointer"),
        (b'{"error": "not found"}', "is a JSON text"),
        (b"PK\x03\x04" + b"\xff" * 60, "is a PyTorch pickle under a wrong name"),
        (b"\x00\x01" * 40, "is no tensor file"),
    ],
)
def test_a_file_that_is_no_safetensors_is_named_as_what_it_is(tmp_path: Path, content: bytes, words: str) -> None:
    path = write(tmp_path / "model.safetensors", content)
    with pytest.raises(CheckpointError, match=r"^model\.safetensors ") as error:
        open_source(path)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_a_header_whose_length_starts_like_a_pickle_is_still_a_header(tmp_path: Path) -> None:
    """0x80 is both the first byte of a pickle and a likely low byte of a length."""
    content = raw_safetensors(json.dumps({"a": FLOAT_ENTRY}).ljust(0x180).encode(), EIGHT)
    assert content[0] == 0x80
    path = write(tmp_path / "a.safetensors", content)
    assert sniff(path) == "safetensors"
    assert open_source(path).read("a").tolist() == [0.0, 0.0]


def test_a_missing_file_and_a_missing_folder_are_errors_of_their_own(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no file"):
        open_source(tmp_path / "nothing.safetensors")
    (tmp_path / "folder").mkdir()
    with pytest.raises(CheckpointError, match="folder holds no weights"):
        open_source(tmp_path / "folder")


def test_a_type_that_torch_lacks_can_be_listed_but_not_read(tmp_path: Path) -> None:
    entry = {"dtype": "F6_E2M3", "shape": [4], "data_offsets": [0, 3]}
    path = write(tmp_path / "a.safetensors", raw_safetensors({"a": entry}, bytes(3)))
    with open_source(path) as source:
        assert source.info("a").stored == "F6_E2M3"
        assert source.info("a").dtype is None
        with pytest.raises(CheckpointError, match="stores a as F6_E2M3"):
            source.read("a")
        with pytest.raises(CheckpointError, match=r"has no tensor named b: .*download it again"):
            source.read("b")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_bytes_give_a_header_or_a_checkpoint_error(tmp_path: Path, data: st.DataObject) -> None:
    good = raw_safetensors(
        {
            "__metadata__": {"a": "b"},
            "a": FLOAT_ENTRY,
            "b": {"dtype": "BF16", "shape": [2, 2], "data_offsets": [8, 16]},
        },
        bytes(16),
    )
    content = bytearray(data.draw(st.one_of(st.just(good), st.binary(max_size=64))))
    for _ in range(data.draw(st.integers(0, 3))):
        if content:
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content
    path = write(tmp_path / "fuzz.safetensors", bytes(content))
    try:
        header = read_header(path)
    except CheckpointError as error:
        assert str(error).startswith("fuzz.safetensors ")
        return
    assert header.file_bytes == len(content)
    with open_source(path) as source:
        for name, info in header.tensors.items():
            if info.dtype is not None:
                assert tuple(source.read(name).shape) == info.shape


ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=2),
    max_leaves=3,
)
HEADER_ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "U8", "F4", "", 3]),
        "shape": st.lists(st.integers(-1, 4), max_size=3) | ANY_JSON,
        "data_offsets": st.lists(st.integers(-1, 20), min_size=2, max_size=2) | ANY_JSON,
    }
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    header=st.dictionaries(st.sampled_from(["a", "b", "__metadata__"]), HEADER_ENTRY | ANY_JSON),
    size=st.integers(0, 24),
)
def test_any_json_header_gives_tensors_or_a_checkpoint_error(tmp_path: Path, header: dict, size: int) -> None:
    path = write(tmp_path / "fuzz.safetensors", raw_safetensors(header, bytes(size)))
    try:
        checked = read_header(path)
    except CheckpointError:
        return
    assert sum(info.nbytes for info in checked.tensors.values()) == size


# ---- values ---------------------------------------------------------------------------------------------------------


def equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Same type, shape and bits (any NaN equals any NaN)."""
    same_nan = torch.equal(a.float().isnan(), b.float().isnan())
    return a.dtype == b.dtype and same_nan and torch.equal(a.float().nan_to_num(), b.float().nan_to_num())


def every_byte(shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    count = shape[0] * shape[1]
    return (torch.arange(count) % 256).to(torch.uint8)[torch.randperm(count)].view(dtype).view(shape)


@pytest.fixture(scope="module")
def values(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, torch.Tensor]]]:
    """Sizes around the pieces and (here smaller) blocks in which tensors are converted, odd ones among them."""
    torch.manual_seed(0)
    state = {
        "wide": torch.randn(301, 577),
        "tall": torch.randn(50001, 3),
        "small": torch.randn(5, 7, 3),
        "scalar": torch.tensor(2.5),
        "none": torch.zeros(0, 4),
        "half": torch.randn(33, 1001).half(),
        "brain": torch.randn(33, 1001).bfloat16(),
        "extremes": torch.tensor([float("inf"), -float("inf"), float("nan"), 3.4e38, 1e-45, -0.0]),
        "e4m3": every_byte((401, 1031), E4M3),
        "e5m2": every_byte((401, 333), torch.float8_e5m2),
        "int8": every_byte((401, 333), torch.int8),
        "odd": every_byte((1, 65537), E4M3),
    }
    path = tmp_path_factory.mktemp("values") / "values.safetensors"
    save_file(state, path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("wan_fp8.checkpoint.transfer.BLOCK_BYTES", 1 << 17)
        yield path, state


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_large_tensors_arrive_in_inference_mode_too(
    values: tuple[Path, dict[str, torch.Tensor]], dtype: torch.dtype
) -> None:
    """ComfyUI runs nodes in inference mode, which belongs to a thread: those that read must be in it as well."""
    path, state = values
    with torch.inference_mode(), open_source(path) as source:
        for name, expected in state.items():
            if expected.ndim != 2:
                continue
            scale = torch.full((expected.shape[0], 1), 2.0)
            assert equal(source.read(name, dtype, scale=scale), (expected.float() * 2).to(dtype)), name
            assert equal(source.read(name, dtype), expected.to(dtype)), name


@pytest.mark.parametrize("map_files", [True, False])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_every_type_arrives_as_torch_would_convert_it(
    values: tuple[Path, dict[str, torch.Tensor]], dtype: torch.dtype | None, map_files: bool
) -> None:
    path, state = values
    with open_source(path, map_files=map_files) as source:
        assert list(source) == list(read_header(path).tensors)
        for name, expected in state.items():
            assert equal(source.read(name, dtype), expected if dtype is None else expected.to(dtype)), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["e4m3", "e5m2", "int8", "wide", "odd"])
def test_scales_multiply_in_fp32_before_the_one_rounding(
    values: tuple[Path, dict[str, torch.Tensor]], name: str, dtype: torch.dtype
) -> None:
    path, state = values
    stored = state[name]
    with open_source(path) as source:
        for scale in (torch.tensor(0.0371), torch.tensor([1.7]), torch.rand(stored.shape[0], 1) + 0.1):
            factor = scale if scale.numel() > 1 else scale.reshape(())
            assert equal(source.read(name, dtype, scale=scale), (stored.float() * factor).to(dtype))


def test_a_mapped_tensor_may_be_written_to_and_the_file_stays(values: tuple[Path, dict[str, torch.Tensor]]) -> None:
    path, state = values
    before = path.read_bytes()
    with open_source(path) as source:
        first, second = source.read("wide"), source.read("wide")
    first.fill_(7.0)
    assert path.read_bytes() == before
    with open_source(path) as source:
        assert torch.equal(source.read("wide"), state["wide"])
    assert first[0, 0] == 7.0 and second is not first


def test_without_mapping_a_tensor_outlives_the_file(tmp_path: Path) -> None:
    save_file({"a": torch.arange(5000.0)}, tmp_path / "a.safetensors")
    with open_source(tmp_path / "a.safetensors", map_files=False) as source:
        kept = source.read("a")
    (tmp_path / "a.safetensors").write_bytes(b"")
    assert torch.equal(kept, torch.arange(5000.0))


def test_a_file_that_shrinks_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.arange(5000.0)}, path)
    with open_source(path) as source:
        path.write_bytes(path.read_bytes()[:9000])
        with pytest.raises(CheckpointError, match="became shorter while it was read"):
            source.read("a", torch.bfloat16)


def test_an_unaligned_tensor_is_read_exactly(tmp_path: Path) -> None:
    """The format allows any offset; a view of unaligned floats would not do."""
    value = torch.arange(6.0)
    header = {
        "j": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
        "a": {"dtype": "F32", "shape": [6], "data_offsets": [3, 27]},
    }
    path = write(tmp_path / "a.safetensors", raw_safetensors(header, b"abc" + struct.pack("<6f", *value.tolist())))
    with open_source(path) as source:
        assert torch.equal(source.read("a"), value)
        assert source.read("a").data_ptr() % 4 == 0


@pytest.mark.skipif(sys.platform != "linux", reason="reads the process's peak from /proc")
def test_converting_takes_no_more_memory_than_the_result_and_a_little(tmp_path: Path) -> None:
    """128 MiB of fp32 becomes 64 MiB of bf16: the peak rises by the result plus staging buffers, not by the file."""
    mib = 1 << 20
    save_file({f"w{i}": torch.ones(2048, 4096) for i in range(4)}, tmp_path / "a.safetensors")
    code = """
        import sys, pathlib, importlib.util, torch
        spec = importlib.util.spec_from_file_location("wan_fp8", sys.argv[1], submodule_search_locations=[sys.argv[2]])
        sys.modules["wan_fp8"] = package = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(package)
        from wan_fp8.checkpoint.reader import open_source
        def peak():
            lines = pathlib.Path("/proc/self/status").read_text().splitlines()
            return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024
        with open_source(sys.argv[3]) as source:
            source.read("w0", torch.bfloat16)
            before = peak()
            kept = [source.read(name, torch.bfloat16) for name in source]
        print(peak() - before)
    """
    package = Path(sys.modules["wan_fp8"].__file__ or "")
    arguments = [str(package), str(package.parent), str(tmp_path / "a.safetensors")]
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *arguments],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert 32 * mib < int(run.stdout) < (64 + 24) * mib


# ---- folders --------------------------------------------------------------------------------------------------------

STATE = {f"layer.{i}": torch.full((4, 4), float(i)) for i in range(6)}


@pytest.mark.parametrize("index", [True, False])
@pytest.mark.parametrize("count", [1, 3])
def test_shards_are_one_model_with_or_without_an_index(tmp_path: Path, index: bool, count: int) -> None:
    folder = write_shards(tmp_path / "m", STATE, count=count, index=index)
    with open_source(folder) as source:
        assert set(source) == set(STATE)
        assert source.nbytes == 6 * 64
        assert all(torch.equal(source.read(name), value) for name, value in STATE.items())


@pytest.mark.parametrize("index", [True, False])
def test_a_missing_shard_is_named(tmp_path: Path, index: bool) -> None:
    folder = write_shards(tmp_path / "m", STATE, count=3, index=index)
    (folder / "diffusion_pytorch_model-00002-of-00003.safetensors").unlink()
    with pytest.raises(
        CheckpointError, match=r"m is incomplete: diffusion_pytorch_model-00002-of-00003\.safetensors of 3"
    ):
        open_source(folder)


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "/etc/outside.safetensors", "sub/a.safetensors", "..", "", 3]
)
def test_an_index_cannot_point_outside_its_folder(tmp_path: Path, name: object) -> None:
    save_file(STATE, tmp_path / "outside.safetensors")
    folder = write_shards(tmp_path / "m", STATE)
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"layer.0": name}})
    )
    with pytest.raises(CheckpointError, match="names files of its own folder only"):
        open_source(folder)


def test_linked_shards_are_fine(tmp_path: Path) -> None:
    """Download caches keep the bytes elsewhere and link to them."""
    folder = write_shards(tmp_path / "m", STATE)
    (tmp_path / "blobs").mkdir()
    for number, shard in enumerate(sorted(folder.glob("*.safetensors"))):
        shard.rename(tmp_path / "blobs" / str(number))
        shard.symlink_to(tmp_path / "blobs" / str(number))
    with open_source(folder) as source:
        assert set(source) == set(STATE)


def test_a_shard_without_what_the_index_places_there_is_refused(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "m", STATE)
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["layer.9"] = "diffusion_pytorch_model-00001-of-00002.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"lacks layer\.9 \(1 tensors\) that the index places there"):
        open_source(folder)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "m", STATE)
    save_file(STATE, folder / "diffusion_pytorch_model-00001-of-00002.safetensors")
    with pytest.raises(CheckpointError, match=r"holds layer\.\d twice, in .*00001.* and .*00002"):
        open_source(folder)


def test_two_sets_of_weights_without_an_index_are_ambiguous(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "m", STATE, index=False)
    write_shards(folder, STATE, count=3, index=False)
    with pytest.raises(CheckpointError, match="more than one set of weights"):
        shards_of(folder)


def test_the_plain_name_wins_over_variants(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "diffusion_pytorch_model.safetensors")
    save_file({"other": torch.zeros(1)}, tmp_path / "diffusion_pytorch_model.fp16.safetensors")
    assert [path.name for path in shards_of(tmp_path)] == ["diffusion_pytorch_model.safetensors"]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    index=st.one_of(
        st.binary(max_size=30),
        ANY_JSON.map(lambda value: json.dumps({"weight_map": value}).encode()),
        st.dictionaries(
            st.text(max_size=4), st.sampled_from(["a.safetensors", "../a.safetensors", "b.safetensors", 1])
        ).map(lambda value: json.dumps({"weight_map": value}).encode()),
    )
)
def test_any_index_gives_a_source_or_a_checkpoint_error(tmp_path: Path, index: bytes) -> None:
    save_file(named_like(["x"]), tmp_path / "a.safetensors")
    (tmp_path / "model.safetensors.index.json").write_bytes(index)
    try:
        with open_source(tmp_path) as source:
            assert set(source) == {"x"}
    except CheckpointError:
        pass
