"""Start a ComfyUI server for one purpose, wait until it answers, and stop it again: nothing else on the machine is
touched.

Standard library only. Used by the demo, by ``run_workflow.py`` and by the tests.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from host import HOST_DIR, Host, HostError, link_pack

FLAGS = ("--disable-api-nodes", "--use-pytorch-cross-attention", "--preview-method", "latent2rgb")
"""For every server we start: no partner nodes and no outside calls from the page, one attention on CPU and GPU,
previews."""

LOGS_KEPT = 8
"""Logs of earlier servers left in a folder; a newer one replaces the oldest."""

# Started through this, the server dies with the process that started it, even when that is killed without warning
# (Linux).
_DIE_WITH_PARENT = (
    "import ctypes, os, signal, sys\n"
    "prctl = getattr(ctypes.CDLL(None), 'prctl', None)\n"
    "prctl and prctl(1, signal.SIGTERM)\n"
    "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])\n"
)


@dataclass(frozen=True)
class Server:
    """A running ComfyUI. ``output`` is where its files appear; ``base`` is None when it uses the host's own folders."""

    url: str
    host: Host
    pid: int
    log: Path
    output: Path
    base: Path | None


@contextlib.contextmanager
def start_server(
    host: Host,
    *,
    base: Path | None,
    output: Path | None = None,
    models: Path | None = None,
    extra: Sequence[str] = (),
    timeout_s: float = 240.0,
    waiting: Callable[[], None] | None = None,
) -> Iterator[Server]:
    """Run ComfyUI on a free port of this machine for as long as the ``with`` block lasts.

    Args:
        host: From ``host.ensure()``.
        base: A folder of its own for models, inputs, outputs, settings and custom nodes (this pack alone); made if it
            is missing. None uses the folders and the custom nodes of ``host`` itself.
        output: Where outputs go, when not to the folder that belongs to ``base`` or ``host``.
        models: Another folder laid out like ComfyUI's ``models/``, searched as well.
        extra: More command-line flags.
        timeout_s: How long it may take to answer.
        waiting: Called about five times a second until it does.
    Raises:
        HostError: It ended or did not answer in time; the last lines of its log are in the text.
    """
    port = _free_port()
    home = base or HOST_DIR / "logs"
    home.mkdir(parents=True, exist_ok=True)
    for old in sorted(home.glob("comfyui-*.log"), key=lambda path: path.stat().st_mtime)[:-LOGS_KEPT]:
        old.unlink(missing_ok=True)
    log = home / f"comfyui-{port}.log"
    command = [*_command(host, base, output, models, home), "--port", str(port), *extra]
    with log.open("wb") as sink:
        process = subprocess.Popen(
            command,
            cwd=host.comfyui,
            env=_environment(host),
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that Ctrl-C reaches us alone, and we can cancel the prompt before we stop it
        )
    url = f"http://127.0.0.1:{port}"
    try:
        _wait_until_ready(url, process, log, timeout_s, waiting)
        yield Server(url, host, process.pid, log, output or (base or host.comfyui) / "output", base)
    finally:
        _stop(process)


def _command(host: Host, base: Path | None, output: Path | None, models: Path | None, home: Path) -> list[str]:
    command = [str(host.python), "-c", _DIE_WITH_PARENT, "main.py", "--listen", "127.0.0.1", *FLAGS]
    if not has_accelerator(host.python):
        command.append("--cpu")
    if base is not None:
        pack = link_pack(base / "custom_nodes")
        for folder in ("models", "input", "output", "temp", "user"):
            (base / folder).mkdir(exist_ok=True)
        command += ["--base-directory", str(base), "--database-url", f"sqlite:///{base / 'user' / 'comfyui.db'}"]
        command += ["--disable-all-custom-nodes", "--whitelist-custom-nodes", pack.name]
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        command += ["--output-directory", str(output)]
    if models is not None:
        command += ["--extra-model-paths-config", str(_model_paths(models, home))]
    return command


def _model_paths(models: Path, home: Path) -> Path:
    """A file telling ComfyUI to search every kind of model below ``models`` too. It is YAML, of which JSON is a
    part."""
    if not models.is_dir():
        raise HostError(f"{models} is not a folder: name one laid out like ComfyUI's models/.")
    kinds = {entry.name: entry.name for entry in sorted(models.iterdir()) if entry.is_dir()}
    path = home / "extra_model_paths.yaml"
    path.write_text(json.dumps({"models": {"base_path": str(models.resolve()), **kinds}}), encoding="utf-8")
    return path


def _environment(host: Host) -> dict[str, str]:
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    environment["PYTHONUNBUFFERED"] = "1"
    if host.pinned:
        environment.pop("PYTHONDONTWRITEBYTECODE", None)  # installed without byte code: the first start leaves it
    else:
        environment["PYTHONDONTWRITEBYTECODE"] = "1"  # not even a cache file appears in somebody's own installation
    return environment


def has_accelerator(python: Path) -> bool:
    """Whether ComfyUI finds a device other than the CPU. Asked of torch only where a device file makes it possible."""
    if not any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd", "/dev/dri")):
        return False
    code = "import torch; print(torch.cuda.is_available() or getattr(torch, 'xpu', torch.cuda).is_available())"
    command = [str(python), "-B", "-c", code]  # no cache files in somebody's own installation
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == "True"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_until_ready(
    url: str, process: subprocess.Popen[bytes], log: Path, timeout_s: float, waiting: Callable[[], None] | None
) -> None:
    deadline = time.monotonic() + timeout_s
    while True:
        if process.poll() is not None:
            raise HostError(f"ComfyUI ended with exit code {process.returncode} before it answered. {log_tail(log)}")
        try:
            with urllib.request.urlopen(f"{url}/system_stats", timeout=5) as answer:
                if answer.status == 200:
                    return
        except (urllib.error.URLError, TimeoutError, ConnectionError):
            if time.monotonic() > deadline:
                raise HostError(f"ComfyUI did not answer within {timeout_s:.0f} s. {log_tail(log)}") from None
        if waiting is not None:
            waiting()
        time.sleep(0.2)


def log_tail(log: Path, lines: int = 25) -> str:
    """The end of a server's log, introduced by where the whole of it is."""
    text = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return f"The end of its log ({log}):\n" + "\n".join(text[-lines:])


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the server: first as Ctrl-C would, so that it removes its temporary files; then for good, with its
    children."""
    for send, patience_s in ((signal.SIGINT, 8.0), (signal.SIGKILL, 8.0)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, send)  # start_new_session made it the leader of a group of its own
        try:
            process.wait(patience_s)
            return
        except subprocess.TimeoutExpired:
            continue
