"""What goes wrong with the processes of a pool: it is named within seconds, nothing is left, and the next run works."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pool_kit
import pytest
import torch

from wan_fp8.errors import CheckpointError, InputError, PoolError, WanFP8Error
from wan_fp8.parallel import pools
from wan_fp8.parallel.remote import RemoteWanModel, Topology

pytestmark = pytest.mark.timeout(120)
SECONDS = 20.0
"""Within which a fault must be over."""


@pytest.fixture(scope="module")
def model(checkpoints: dict[str, Path]) -> Iterator[RemoteWanModel]:
    yield pool_kit.in_pool(checkpoints["t2v"], "high_noise")
    pools.stop_pools()


@pytest.fixture(scope="module")
def inputs(model: RemoteWanModel) -> pool_kit.Inputs:
    return pool_kit.Inputs(model.spec)


@pytest.fixture
def expected(model: RemoteWanModel, inputs: pool_kit.Inputs) -> Iterator[torch.Tensor]:
    """What a forward answers; it does so before a fault and after it, and what the fault left is nothing."""
    right = inputs.into(model)
    began = time.monotonic()
    yield right
    assert time.monotonic() - began < SECONDS
    assert torch.equal(inputs.into(model), right)


def pids_of(model: RemoteWanModel) -> list[int]:
    return model.remote.pool().pids


def failing(action: Callable[[], object]) -> str:
    """The message of the pool's error, and that the pool is gone when it comes."""
    began = time.monotonic()
    with pytest.raises(PoolError) as raised:
        action()
    assert time.monotonic() - began < SECONDS
    return str(raised.value)


def in_thread(action: Callable[[], object]) -> tuple[threading.Thread, list[BaseException]]:
    raised: list[BaseException] = []

    def body() -> None:
        try:
            action()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=body)
    thread.start()
    return thread, raised


@pytest.mark.parametrize("rank", [0, 1])
def test_killed_between_two_forwards(model, inputs, expected, rank: int) -> None:
    pool = model.remote.pool()
    pool_kit.eventually(lambda: pool.connection.ranks[rank]["stage"] == "idle", "no heartbeat")
    os.kill(pool.pids[rank], signal.SIGKILL)
    pool_kit.nothing_left(pool)
    pool_kit.eventually(lambda: not any(found["alive"] for found in pools.live_pools()), "nobody took note of it")
    assert f"rank {rank} (CPU process {rank}, idle) ended with SIGKILL" in pools.live_pools()[0]["failure"]


@pytest.mark.parametrize(("rank", "stage"), [(1, "forward"), (0, "load")])
def test_killed_in_the_middle(model, inputs, expected, checkpoints, rank: int, stage: str) -> None:
    pool = model.remote.pool()
    os.kill(pool.pids[1], signal.SIGSTOP)  # so that the others wait for it
    other = pool_kit.in_pool(checkpoints["t2v"], "low_noise") if stage == "load" else model
    thread, raised = in_thread(lambda: inputs.into(other))
    pool_kit.eventually(lambda: model.remote.pool().connection.busy_with == stage, "the request did not begin")
    time.sleep(0.2)
    os.kill(pool.pids[rank], signal.SIGKILL)
    thread.join(SECONDS)
    assert f"rank {rank} (CPU process {rank}" in str(raised[0])
    assert f"in a request to {stage} ended with SIGKILL" in str(raised[0])
    pool_kit.nothing_left(pool)


@pytest.mark.parametrize("rank", [0, 1])
def test_hung_past_the_watchdog(model, inputs, expected, rank: int) -> None:
    pool = model.remote.pool()
    os.kill(pool.pids[rank], signal.SIGSTOP)
    message = failing(lambda: inputs.into(model))
    assert f"rank {rank} (CPU process {rank}" in message and "has not answered for" in message
    pool_kit.nothing_left(pool)


def test_out_of_host_memory_on_one_rank(model, inputs, expected) -> None:
    pool = model.remote.pool()
    used = int(Path(f"/proc/{pool.pids[1]}/statm").read_text().split()[0]) * resource.getpagesize()
    resource.prlimit(pool.pids[1], resource.RLIMIT_AS, (used + 2**20, used + 2**20))
    large = pool_kit.Inputs(model.spec, frames=9, size=32)
    message = failing(lambda: large.into(model))
    assert "rank 1 (CPU process 1, taking a request to forward)" in message or "(CPU process 1, running" in message
    assert "memory" in message and "allocate memory" in message.split("Its last lines:")[1]
    pool_kit.nothing_left(pool)


def test_a_cancelled_forward_leaves_the_pool_as_it_was(model, inputs, expected) -> None:
    pids = pids_of(model)
    large = pool_kit.Inputs(model.spec, frames=9, size=48)

    def cancel() -> None:
        if model.remote.pool().connection.busy_with == "forward":
            raise KeyboardInterrupt

    model.remote.poll, before = cancel, model.remote.poll
    began = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            large.into(model)
    finally:
        model.remote.poll = before
    assert time.monotonic() - began < 1.0, "a cancelled run waits for the pool"
    model.begin_run()
    assert torch.equal(inputs.into(model), expected) and pids_of(model) == pids


def test_a_refusal_leaves_the_pool_as_it_was(model, inputs, expected, checkpoints, tmp_path: Path) -> None:
    pids = pids_of(model)
    gone = pool_kit.in_pool(checkpoints["t2v"], "low_noise")
    source = gone.remote.source
    gone.remote.source = type(source).of(tmp_path / "gone.safetensors")
    with pytest.raises(CheckpointError, match=r"gone\.safetensors"):
        inputs.into(gone)
    with pytest.raises(InputError, match="takes 3 GPUs and the pool has 2"):
        inputs.into(pool_kit.in_pool(checkpoints["t2v"], "low_noise", topology=Topology(ring=3)))
    with pytest.raises(InputError, match="does not know the request 'dance'"):
        model.remote.pool().connection.request("dance", {}, poll=lambda: None)
    assert pids_of(model) == pids


def test_one_rank_cannot_read_what_the_others_can(model, inputs, expected, checkpoints) -> None:
    """They agree on it before anybody waits for anybody: the pool goes on."""
    pool = model.remote.pool()
    other = pool_kit.in_pool(checkpoints["t2v"], "low_noise")
    limits = resource.prlimit(pool.pids[1], resource.RLIMIT_NOFILE)
    resource.prlimit(pool.pids[1], resource.RLIMIT_NOFILE, (4, limits[1]))
    with pytest.raises(WanFP8Error) as raised:
        inputs.into(other)
    assert not isinstance(raised.value, PoolError) and "open files" in str(raised.value), raised.value
    resource.prlimit(pool.pids[1], resource.RLIMIT_NOFILE, limits)
    assert model.remote.pool() is pool and torch.equal(inputs.into(model), expected)
    assert inputs.into(other).isfinite().all()


def test_fewer_gpus_than_asked(model) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has GPUs")
    with pytest.raises(InputError, match=r"GPUs 0, 1 were asked for, and this machine has none"):
        pools.ensure(pools.PoolSpec(devices=("cuda:0", "cuda:1")))
    assert any(pool["alive"] for pool in pools.live_pools()), "the pool that was there was ended for nothing"


CALLER = """
import sys, time
sys.path[:0] = sys.argv[1:]
from wan_fp8.parallel import pools
pool = pools.ensure(pools.PoolSpec(devices=("cpu", "cpu")))
print(*pool.pids, flush=True)
time.sleep(600)
"""


def test_the_caller_is_killed(model, inputs, expected, tmp_path: Path) -> None:
    """Also one worker that is stopped, and cannot see it. The pool of another process on this machine (this one) takes
    no notice of a second one beside it, nor of its end."""
    mine = pids_of(model)
    root = str(Path(__file__).resolve().parents[2])
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    caller = subprocess.Popen(
        [sys.executable, "-P", "-c", CALLER, root], stdout=subprocess.PIPE, text=True, env=environment
    )
    try:
        assert caller.stdout is not None
        pids = [int(word) for word in caller.stdout.readline().split()]
        assert len(pids) == 2 and all(pool_kit.alive(pid) for pid in pids) and list(tmp_path.iterdir())
        os.kill(pids[1], signal.SIGSTOP)
        caller.kill()
        # In 1 s as a rule. A machine that is full has its pauses, and what is claimed is less than 20 s.
        pool_kit.eventually(
            lambda: not any(pool_kit.alive(pid) for pid in pids), "workers outlive their caller", 18.0, pids
        )
        pool_kit.eventually(lambda: not list(tmp_path.iterdir()), "a meeting place is left")
        assert pids_of(model) == mine and not set(mine) & set(pids)
    finally:
        caller.kill()
        caller.wait()
        if caller.stdout is not None:
            caller.stdout.close()


def test_a_pool_that_nobody_uses_ends(checkpoints, inputs, monkeypatch) -> None:
    """Its workers had none of this process's allocator settings, which NCCL's memory cannot live with."""
    monkeypatch.setattr(pools, "IDLE_SECONDS", 0.5)
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "backend:cudaMallocAsync")
    monkeypatch.setenv("OF_NO_CONCERN", "1")
    pools.stop_pools()
    model = pool_kit.in_pool(checkpoints["t2v"], "high_noise")
    inputs.into(model)
    pool = model.remote.pool()
    for pid in pool.pids:
        names = {entry.split(b"=")[0] for entry in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")}
        assert b"OF_NO_CONCERN" in names and not any(b"ALLOC_CONF" in name for name in names)
    del model
    pool_kit.nothing_left(pool)
    assert pools.live_pools() == []
