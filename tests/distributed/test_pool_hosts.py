"""Pools under torchrun: by address and token on one host, and over two hosts made of network namespaces."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pool_kit
import pytest
import torch

from wan_fp8.errors import PoolError
from wan_fp8.parallel import pools, wire
from wan_fp8.parallel.pools import PoolSpec
from wan_fp8.parallel.remote import Topology

pytestmark = pytest.mark.timeout(180)
ROOT = Path(__file__).resolve().parents[2]
TOKEN = "a token of sixteen characters or more"


class Host:
    """One torchrun of two CPU ranks, in this network namespace or another."""

    def __init__(
        self, folder: Path, listen: str, *, namespace: str | None = None, arguments: tuple[str, ...] = ()
    ) -> None:
        self.log = folder / f"log_{namespace or 'here'}_{time.monotonic_ns()}"
        token = folder / "token"
        token.write_text(TOKEN)
        inside = () if namespace is None else ("ip", "netns", "exec", namespace)
        worker = ("-m", "wan_fp8.parallel.worker", "--listen", listen, "--token-file", str(token))
        command = (*inside, sys.executable, "-m", "torch.distributed.run", *arguments, *worker)
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        environment["GLOO_SOCKET_IFNAME"] = "lo" if namespace is None else f"{namespace}i"
        with self.log.open("wb") as sink:
            self.process = subprocess.Popen(
                (*command, "--device", "cpu", "--watchdog", "3"),
                cwd=ROOT, env=environment, stdout=sink, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def kill(self) -> None:
        """As if the power went: the whole of it at once."""
        for pid in _below(self.process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()

    def says(self, words: str) -> bool:
        assert self.process.poll() is None or words in self.log.read_text(), self.log.read_text()[-3000:]
        return words in self.log.read_text()


def _below(pid: int) -> list[int]:
    found = [pid]
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):
                if f"PPid:\t{pid}\n" in (folder / "status").read_text():
                    found += _below(int(folder.name))
    return found


@pytest.fixture(autouse=True)
def _end() -> Iterator[None]:
    yield
    pools.stop_pools()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def refused(action: Callable[[], object]) -> str:
    with pytest.raises(PoolError) as raised:
        action()
    return str(raised.value)


def test_by_address_and_token(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    address = f"127.0.0.1:{free_port()}"
    host = Host(tmp_path, address, arguments=("--standalone", "--nproc-per-node", "2"))
    try:
        pool_kit.eventually(lambda: host.says("a pool of 2 answers"), "the pool did not come up", 60)
        spec = PoolSpec(address=address, token=TOKEN, watchdog=3.0)
        model = pool_kit.in_pool(checkpoints["t2v"], "high_noise", spec, Topology(ulysses=2))
        one = pool_kit.here(checkpoints["t2v"], "high_noise")
        inputs = pool_kit.Inputs(one.spec)
        right = inputs.into(model)
        assert pool_kit.relative(right, inputs.into(one)) < 1e-5

        wrong = PoolSpec(address=address, token="another token of some length")
        assert "token" in refused(lambda: pools.Pool(wrong, lambda: None))
        assert "serves another ComfyUI" in refused(lambda: pools.Pool(spec, lambda: None))
        for said in (b"GET / HTTP/1.1\r\n\r\n" * 20, os.urandom(500)):  # neither of them disturbs the pool
            with socket.create_connection(("127.0.0.1", int(address.split(":")[1]))) as stranger:
                stranger.sendall(said)
        assert torch.equal(inputs.into(model), right)

        taken = Host(tmp_path, address, arguments=("--standalone", "--nproc-per-node", "1"))
        pool_kit.eventually(lambda: "cannot listen at" in taken.log.read_text(), "a taken port was not named", 60)
        taken.kill()

        pools.stop_pools()  # the caller goes, the pool stays for the next one
        assert torch.equal(inputs.into(model), right)
        connection = model.remote.pool().connection
        connection._channel._socket.sendall(
            wire.PREFIX.pack(b"WFP8", 1, 5, 0) + bytes(37)
        )  # sent twice, and not signed
        pool_kit.eventually(lambda: connection.failure is not None, "a forged message did not end the connection")
        assert torch.equal(inputs.into(model), right) and model.remote.pool().connection is not connection

        host.kill()
        message = refused(lambda: [inputs.into(model) for _ in range(100)])
        assert f"the pool at {address}" in message
        assert "nobody" in refused(lambda: inputs.into(model)) or "no pool at" in refused(lambda: inputs.into(model))
    finally:
        host.kill()


# ---- two hosts -------------------------------------------------------------------------------------------------------


def _ip(*arguments: str) -> None:
    subprocess.run(("ip", *arguments), check=True, capture_output=True)


@pytest.fixture
def hosts() -> Iterator[dict[str, str]]:
    """Two network namespaces on a bridge: their names and addresses."""
    if os.getuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and iproute2")
    mark = f"w{os.getpid() % 100000}"
    bridge, names = f"{mark}b", {f"{mark}{letter}": f"10.123.77.{number}" for number, letter in ((1, "x"), (2, "y"))}
    try:
        _ip("link", "add", bridge, "type", "bridge")
        _ip("addr", "add", "10.123.77.254/24", "dev", bridge)
        _ip("link", "set", bridge, "up")
        for name, address in names.items():
            _ip("netns", "add", name)
            _ip("link", "add", f"{name}o", "type", "veth", "peer", "name", f"{name}i", "netns", name)
            _ip("link", "set", f"{name}o", "master", bridge, "up")
            _ip("-n", name, "addr", "add", f"{address}/24", "dev", f"{name}i")
            for device in ("lo", f"{name}i"):
                _ip("-n", name, "link", "set", device, "up")
    except subprocess.CalledProcessError as error:
        _take_down(bridge, names)
        pytest.skip(f"no network namespaces here: {error.stderr.decode().strip()}")
    yield names
    _take_down(bridge, names)


def _take_down(bridge: str, names: dict[str, str]) -> None:
    for arguments in (*(("netns", "del", name) for name in names), ("link", "del", bridge)):
        subprocess.run(("ip", *arguments), check=False, capture_output=True)


def test_two_hosts(checkpoints: dict[str, Path], tmp_path: Path, hosts: dict[str, str]) -> None:
    """Run; kill a host; a clear error; start again; run."""
    (first, address), (second, _) = hosts.items()
    listen = f"{address}:7421"
    one = pool_kit.here(checkpoints["t2v"], "high_noise")
    inputs = pool_kit.Inputs(one.spec)
    spec = PoolSpec(address=listen, token=TOKEN, watchdog=5.0)
    model = pool_kit.in_pool(checkpoints["t2v"], "high_noise", spec, Topology(cfg=2))
    common = ("--nnodes", "2", "--nproc-per-node", "1", "--master-addr", address, "--master-port", "29500")
    for _ in range(2):
        running = [
            Host(tmp_path, listen, namespace=name, arguments=(*common, "--node-rank", str(rank)))
            for rank, name in enumerate((first, second))
        ]
        try:
            pool_kit.eventually(lambda: running[0].says("a pool of 2 answers"), "the pool did not come up", 60)  # noqa: B023
            assert pool_kit.relative(inputs.into(model), inputs.into(one)) < 1e-5
            running[1].kill()
            began = time.monotonic()
            message = refused(lambda: [inputs.into(model) for _ in range(10_000)])
            assert time.monotonic() - began < 20
            assert f"the pool at {listen}: rank 1 (CPU process 1 of" in message, message
        finally:
            for host in running:
                host.kill()
