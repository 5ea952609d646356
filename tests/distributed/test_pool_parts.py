"""Text encoder and VAE in a pool: the VAE and the encoder of this process, and what goes wrong."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pool_kit
import pytest
import torch

from wan_fp8.errors import CheckpointError, InputError, PoolError, WanFP8Error
from wan_fp8.models.text_encoder import load_text_encoder
from wan_fp8.models.vae import WanVAE, load_vae
from wan_fp8.models.vae22 import load_vae22
from wan_fp8.parallel import plain, pools
from wan_fp8.parallel.fsdp import shard_encoder
from wan_fp8.parallel.needs import TextNeeds, VAENeeds
from wan_fp8.parallel.parts import RemoteTextEncoder, RemoteVAE
from wan_fp8.parallel.serving_parts import Parts
from wan_fp8.parallel.source import TextSource, VAESource
from wan_fp8.parallel.vae import SplitVAE, values_of_a_frame
from wan_fp8.parallel.wire import Message

pytestmark = pytest.mark.timeout(120)
TWO = pools.PoolSpec(devices=("cpu",) * 2)
TOLERANCE = 1e-5
"""fp32, sums in another order."""


@pytest.fixture(scope="module", autouse=True)
def pool() -> Iterator[None]:
    yield
    pools.stop_pools()


@pytest.fixture(scope="module")
def one(checkpoints: dict[str, Path]) -> WanVAE:
    return load_vae(checkpoints["t2v"])


def test_the_wan22_vae(checkpoints: dict[str, Path]) -> None:
    """Rows that do not divide, and a picture with fewer rows than ranks."""
    here = load_vae22(checkpoints["ti2v"])
    there = RemoteVAE(VAESource.of(checkpoints["ti2v"], version="2.2"), TWO)
    for frames, rows in ((3, 5), (2, 1)):
        latents, video = clips(48, frames, rows, 2), clips(3, 4 * frames - 3, 16 * rows, 32)
        assert pool_kit.relative(there.decode(latents), here.decode(latents)) < TOLERANCE
        assert pool_kit.relative(there.encode(video), here.encode(video)) < TOLERANCE
    with pytest.raises(InputError, match="both multiples of 16"):
        there.encode(clips(3, 1, 24, 32))


@pytest.fixture(scope="module")
def many(checkpoints: dict[str, Path]) -> RemoteVAE:
    return RemoteVAE(VAESource.of(checkpoints["t2v"]), TWO)


def clips(channels: int, frames: int, rows: int, columns: int, count: int = 1) -> torch.Tensor:
    return torch.randn(count, channels, frames, rows, columns, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(("frames", "rows", "count"), [(3, 5, 1), (1, 2, 2), (2, 1, 1)])
def test_decode_and_encode(one: WanVAE, many: RemoteVAE, frames: int, rows: int, count: int) -> None:
    """Rows that do not divide, several clips, and fewer rows than ranks, which rank 0 takes alone."""
    latents = clips(16, frames, rows, 3, count)
    assert pool_kit.relative(many.decode(latents), one.decode(latents)) < TOLERANCE
    video = clips(3, 4 * frames - 3, 8 * rows, 24, count)
    assert pool_kit.relative(many.encode(video), one.encode(video)) < TOLERANCE
    longer = torch.cat([video, video[:, :, :2]], dim=2)
    assert torch.equal(many.encode(longer), many.encode(video)), "frames after the last 4n + 1 were read"


def test_its_type_is_what_it_is_kept_and_computed_in(checkpoints: dict[str, Path], one: WanVAE) -> None:
    half = RemoteVAE(VAESource.of(checkpoints["t2v"], torch.bfloat16), TWO)
    latents = clips(16, 2, 4, 3)
    there = half.decode(latents.bfloat16())
    assert there.dtype == torch.bfloat16
    here = load_vae(checkpoints["t2v"], torch.bfloat16).decode(latents.bfloat16())
    assert pool_kit.relative(there, here) < 2e-2
    assert pool_kit.relative(there.float(), one.decode(latents)) > 1e-3, "computed in fp32"


def test_a_vae_without_a_file_is_handed_over_once(one: WanVAE, many: RemoteVAE) -> None:
    read: list[int] = []

    def state() -> dict[str, torch.Tensor]:
        read.append(1)
        return dict(one.state_dict())

    handed, latents = RemoteVAE(VAESource(), TWO, state), clips(16, 2, 4, 3)
    expected = many.decode(latents)
    for _ in range(2):
        assert torch.equal(handed.decode(latents), expected)
    assert len(read) == 1
    assert torch.equal(many.decode(latents), expected) and torch.equal(handed.decode(latents), expected)
    assert len(read) == 2, "one VAE is kept"


def test_a_large_result_goes_through_shared_memory_in_one_piece(one: WanVAE, many: RemoteVAE) -> None:
    latents = clips(16, 2, 16, 32)
    there = many.decode(latents)
    assert there.numel() * 4 > 2**20 and pool_kit.relative(there, one.decode(latents)) < TOLERANCE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.float32])
def test_text_rows_are_the_same_bits(checkpoints: dict[str, Path], dtype: torch.dtype) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as a worker on a CPU
    try:
        here = load_text_encoder(checkpoints["t2v"], dtype)
        there = RemoteTextEncoder(TextSource.of(checkpoints["t2v"], dtype), TWO)
        for text in ("a cat & a dog", "", "word " * 600):
            rows, lost = there.encode_prompt(text)
            assert torch.equal(rows, here.encode_prompt(text)) and lost == here.tokenize(text).lost_tokens
        assert lost > 0
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_a_sharded_encoder_gives_the_same_bits_and_each_rank_holds_a_part(
    checkpoints: dict[str, Path], dtype: torch.dtype, many: RemoteVAE
) -> None:
    source = TextSource.of(checkpoints["t2v"], dtype)
    placed, sharded = RemoteTextEncoder(source, TWO), RemoteTextEncoder(source, TWO, sharded=True)
    connection = many.pool().connection
    for text in ("a cat & a dog", "", "word " * 600):
        there = sharded.encode_prompt(text)
        held = [entry["models"] for entry in connection.request("status", {}, poll=lambda: None)[0]]
        assert all(checkpoints["t2v"].name in names for names in held)
        here = placed.encode_prompt(text)  # takes its place, on rank 0
        assert torch.equal(there[0], here[0]) and there[1] == here[1] and there[0].abs().sum() > 0
    with pytest.raises(WanFP8Error, match=r"gone\.safetensors"):
        RemoteTextEncoder(TextSource.of(Path("gone.safetensors")), TWO, sharded=True).encode_prompt("a")
    assert torch.equal(sharded.encode_prompt("a")[0], placed.encode_prompt("a")[0])


def test_no_rank_holds_more_of_a_sharded_encoder_than_its_part(checkpoints: dict[str, Path]) -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    encoder = load_text_encoder(checkpoints["t2v"], torch.float8_e4m3fn)
    whole = encoder.num_bytes
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=4)
    try:
        shard_encoder(encoder.model, init_device_mesh("cpu", (1, 4), mesh_dim_names=("r", "s")), torch.device("cpu"))
        mine = sum(p.to_local().numel() * p.element_size() for p in encoder.model.parameters())  # type: ignore[attr-defined]
    finally:
        dist.destroy_process_group()
    assert whole / 4 <= mine < 1.05 * whole / 4


def test_what_is_counted_is_what_is_read(checkpoints: dict[str, Path], one: WanVAE) -> None:
    for dtype in (torch.bfloat16, torch.float32, torch.float8_e4m3fn):
        encoder = load_text_encoder(checkpoints["t2v"], dtype)
        scales = sum(p.numel() * 4 for name, p in encoder.model.named_parameters() if name.endswith(".scale"))
        needs = TextNeeds.of(TextSource.of(checkpoints["t2v"], dtype))
        assert needs.weights == encoder.num_bytes - scales and 0 < needs.gathered <= needs.weights
        assert needs.resting(3) == -(-needs.weights // 3) and needs.working(3) - needs.working(1) == needs.gathered
    with pytest.raises(CheckpointError, match=r"Wan2\.2 VAE"):
        VAENeeds.of(VAESource.of(checkpoints["ti2v"]))
    for source, state in ((VAESource.of(checkpoints["t2v"]), None), (VAESource(), one.state_dict)):
        vae = VAENeeds.of(source, state)
        assert vae.weights == 4 * sum(p.numel() for p in one.parameters()) and vae.stride == 8


def test_the_encoder_lies_on_rank_0_and_goes_with_the_last_model(checkpoints: dict[str, Path], many: RemoteVAE) -> None:
    encoder = RemoteTextEncoder(TextSource.of(checkpoints["t2v"]), TWO)
    first, _ = encoder.encode_prompt("a")
    many.decode(clips(16, 1, 2, 2))
    connection = many.pool().connection

    def held() -> list[list[str]]:
        return [entry["models"] for entry in connection.request("status", {}, poll=lambda: None)[0]]

    name = checkpoints["t2v"].name
    assert held() == [[name, name], [name]]
    connection.request("drop", {"models": ["one that is not there"]}, poll=lambda: None)
    assert held() == [[name], [name]]
    assert torch.equal(encoder.encode_prompt("a")[0], first)
    connection.request("drop", {"models": None}, poll=lambda: None)
    assert held() == [[], []]


def test_refusals_leave_the_pool_as_it_was(checkpoints: dict[str, Path], many: RemoteVAE, tmp_path: Path) -> None:
    latents = clips(16, 1, 2, 2)
    right, pids = many.decode(latents), many.pool().pids
    with pytest.raises(InputError, match=r"decodes \[clips, 16"):
        many.decode(clips(48, 1, 2, 2))
    with pytest.raises(InputError, match=r"encodes \[clips, 3"):
        many.encode(clips(3, 1, 12, 8))
    with pytest.raises(CheckpointError, match=r"Wan2\.2 VAE"):
        RemoteVAE(VAESource.of(checkpoints["ti2v"]), TWO).decode(latents)
    with pytest.raises(WanFP8Error, match=r"gone\.safetensors"):
        RemoteTextEncoder(TextSource.of(tmp_path / "gone.safetensors"), TWO).encode_prompt("a")
    with pytest.raises(InputError, match="1048577 characters"):
        RemoteTextEncoder(TextSource.of(checkpoints["t2v"]), TWO).encode_prompt("a" * (2**20 + 1))
    connection = many.pool().connection
    for fields in ({"do": "dance"}, {"do": "decode"}, {"do": "encode"}):
        with pytest.raises(InputError, match=r"a pool's Wan2\.1 VAE takes one clip"):
            given = {"source": {"type": "VAESource", "fields": {}}, **fields}
            connection.request("vae", given, {"x": torch.zeros(1, 5, 1, 8, 8)}, poll=lambda: None)
    with pytest.raises(InputError, match=r"one of 2\.1, 2\.2; got '3'"):
        given = {"source": {"type": "VAESource", "fields": {"version": "3"}}, "do": "decode"}
        connection.request("vae", given, {"x": latents}, poll=lambda: None)
    for kind in ("vae", "text"):
        given = {"source": {"type": "Recipe", "fields": {}}, "do": "decode", "text": "a", "sharded": False}
        with pytest.raises(InputError, match="Source; got Recipe"):
            connection.request(kind, given, {"x": latents}, poll=lambda: None)
    assert torch.equal(many.decode(latents), right) and many.pool().pids == pids


class OneRank:
    """A rank by itself, with as much memory as a test says."""

    device, control, rank, world = torch.device("cpu"), None, 0, 1

    def __init__(self) -> None:
        self.handed: dict[str, torch.Tensor] = {}
        self.left, self.asked = 2**40, []

    def stage(self, text: str) -> None:
        pass

    def agreed(self, what: str) -> contextlib.nullcontext[None]:
        return contextlib.nullcontext()

    def make_room(self, wanted: int) -> list[str]:
        self.asked.append(wanted)
        return ["a model"]

    def free_bytes(self) -> int:
        return self.left

    def free(self) -> None:
        pass


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> Parts:
    monkeypatch.setattr("torch.distributed.all_reduce", lambda *_, **__: None)
    return Parts(OneRank())


def test_the_text_encoder_leaves_for_a_model_that_needs_the_room(checkpoints: dict[str, Path], parts: Parts) -> None:
    source = plain.to_plain(TextSource.of(checkpoints["t2v"]))
    found, out = parts.run_text({"source": source, "text": "a", "sharded": False})
    assert found["evicted"] == ["a model"] and parts._rank.asked[0] > 2**29
    parts.yield_to(2**39)
    assert (
        parts.run_text({"source": source, "text": "a", "sharded": False})[0]["evicted"] == []
        and len(parts.labels()) == 1
    )
    parts._rank.left = 2**20
    parts.yield_to(2**30)
    assert parts.labels() == []
    assert torch.equal(parts.run_text({"source": source, "text": "a", "sharded": False})[1]["rows"], out["rows"])


def test_groups_of_frames_are_as_large_as_memory_allows(
    checkpoints: dict[str, Path], one: WanVAE, parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = {"source": plain.to_plain(VAESource.of(checkpoints["t2v"])), "do": "decode"}
    latents, seen = clips(16, 5, 4, 4), []
    run = SplitVAE._group_length
    monkeypatch.setattr(SplitVAE, "_group_length", lambda self, *given: seen.append(run(self, *given)) or seen[-1])
    least = values_of_a_frame(one.widest, 1, 32, 32) * 4 * 4  # four of them in fp32
    for left in (2**40, 3 * least / 0.7 + 2**20, 0):
        parts._rank.left = int(left)
        y = parts.run_vae(fields, {"x": latents})[1]["y"]
        assert pool_kit.relative(y, one.decode(latents)) < TOLERANCE
    assert seen[0] > 4 and seen[1:] == [2, 1] and parts._rank.asked[-1] > least


def test_what_left_the_pool_is_known_even_if_nobody_waits_for_the_answer(many: RemoteVAE) -> None:
    pool = many.pool()
    pool.loaded |= {"left": "", "stays": ""}
    pool.connection._enter(Message("answer", {"id": 10**9, "found": [{"evicted": ["left"]}, {}]}))
    assert pool.loaded.pop("stays") == "" and "left" not in pool.loaded


def large() -> torch.Tensor:
    """Enough for seconds."""
    return clips(16, 9, 48, 48)


def test_a_worker_killed_in_a_decode_is_named_and_the_next_one_works(many: RemoteVAE) -> None:
    latents = clips(16, 1, 2, 2)
    right, pool = many.decode(latents), many.pool()
    raised: list[BaseException] = []

    def body() -> None:
        try:
            many.decode(large())
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=body)
    thread.start()
    pool_kit.eventually(lambda: "(9, 48, 48)" in pool.connection.ranks[1]["stage"], "the decode did not begin")
    os.kill(pool.pids[1], signal.SIGKILL)
    thread.join(20)
    assert isinstance(raised[0], PoolError), raised
    assert "rank 1 (CPU process 1, decoding a video of (9, 48, 48) over 2 ranks)" in str(raised[0])
    assert "in a request to vae ended with SIGKILL" in str(raised[0])
    pool_kit.nothing_left(pool)
    assert torch.equal(many.decode(latents), right)


def test_a_cancelled_decode_leaves_the_pool_as_it_was(many: RemoteVAE) -> None:
    latents = clips(16, 1, 2, 2)
    right, pool = many.decode(latents), many.pool()

    def cancel() -> None:
        if pool.connection.busy_with == "vae":
            raise KeyboardInterrupt

    many.poll, before = cancel, many.poll
    began = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            many.decode(clips(16, 3, 24, 24))
    finally:
        many.poll = before
    assert time.monotonic() - began < 1.0, "a cancelled decode waits for the pool"
    assert torch.equal(many.decode(latents), right) and many.pool() is pool
