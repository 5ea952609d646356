"""What ``python install.py --with NAME,...`` does: install optional libraries beside a torch that stays as it is.

Each library is one transaction: pip runs with the user's torch, numpy, transformers and triton pinned, the import is
tried in a process of its own, and if either fails everything that changed is put back. Standard library only.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from wan_fp8.libraries import LIBRARIES, Library, Machine, Package, pick

PACK = Path(__file__).resolve().parent.parent
DONE, FAILED, REFUSED, NOT_RESTORED = 0, 1, 2, 3
"""Exit codes: installed, or there already; failed, and everything as before; nothing tried; failed and not put back."""

PINNED = ("torch", "torchvision", "torchaudio", "numpy", "transformers", "triton")
BUILD_PACKAGES = ("setuptools", "wheel", "ninja", "packaging")
HEADERS = {
    "cuda_runtime.h": ("nvidia-cuda-runtime", "nvidia-cuda-runtime-cu12"),
    "crt/host_config.h": ("nvidia-cuda-crt", "nvidia-cuda-nvcc-cu12"),
    "nv/target": ("nvidia-cuda-cccl", "nvidia-cuda-cccl-cu12"),
    "cublas_v2.h": ("nvidia-cublas", "nvidia-cublas-cu12"),
    "cudnn.h": ("nvidia-cudnn-cu13", "nvidia-cudnn-cu12"),
    "nccl.h": ("nvidia-nccl-cu13", "nvidia-nccl-cu12"),
}
"""What the compilation of an extension includes, and the packages that bring it for CUDA 13 and for CUDA 12."""
_OF_CUDA = ("runtime", "crt", "nvcc", "cccl")
"""Those packages have the version of CUDA itself."""

_VERSIONS = """
import importlib.metadata as m, json
print(json.dumps({d.metadata["Name"]: d.version for d in m.distributions() if d.metadata["Name"]}))
"""


def say_at_once(text: str) -> None:
    """Before what a child process prints next."""
    print(text, flush=True)


_PROBE = """
import sys; sys.path.append({pack!r})
from {loader} import probe
found, words = probe()
sys.exit(None if found else words)
"""


@dataclass(frozen=True)
class Environment:
    """The Python that libraries go into, and its pip."""

    python: Sequence[str] = (sys.executable,)
    pip: Sequence[str] = (sys.executable, "-m", "pip")
    include: Sequence[Path] = field(default_factory=list)
    """Where headers are looked for besides CPATH and the usual places."""
    library: Sequence[Path] = field(default_factory=list)
    say: Callable[[str], None] = say_at_once

    def versions(self) -> dict[str, str]:
        """Every installed distribution, by its normalised name."""
        found: dict[str, str] = json.loads(self._run([*self.python, "-c", _VERSIONS]).stdout)
        return {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in found.items()}

    def import_failure(self, library: Library) -> str | None:
        """The last words of the processes that import torch and then the library; None if one of them ends well."""
        tries = {module: f"import torch, {module}" for module in library.modules}
        if library.loader:
            tries[library.loader] = _PROBE.format(pack=str(PACK), loader=library.loader)
        words = []
        for module, code in tries.items():
            done = self._run([*self.python, "-c", code], check=False)
            if done.returncode == 0:
                return None
            lines = [line for line in done.stderr.splitlines() if line.strip()]
            words.append(lines[-1] if lines else f"importing {module} ended with {done.returncode}")
        return "; ".join(words)

    def run_pip(self, arguments: Sequence[str], environment: dict[str, str]) -> bool:
        """Whether pip succeeded; its output goes where ours goes."""
        self.say(self.shown(arguments, environment))
        command = [*self.pip, *arguments]
        return subprocess.run(command, env={**os.environ, **environment}, check=False).returncode == 0

    def shown(self, arguments: Sequence[str], environment: dict[str, str]) -> str:
        """The command line of ``run_pip``."""
        added = [f"{name}={shlex.quote(value)}" for name, value in environment.items()]
        return "  " + " ".join((*added, shlex.join([*self.pip, *arguments])))

    def has_pip(self) -> bool:
        """Whether there is a pip to run."""
        return self._run([*self.pip, "--version"], check=False).returncode == 0

    @staticmethod
    def _run(command: Sequence[str], check: bool = True) -> subprocess.CompletedProcess[str]:
        # not from here: the current folder is on the path of ``python -c``
        with tempfile.TemporaryDirectory() as folder:
            return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=check)


def this_environment() -> Environment:
    """The Python that runs this, and the headers and libraries of CUDA that pip installed into it."""
    roots = [Path(folder) / "nvidia" for folder in sys.path if folder and (Path(folder) / "nvidia").is_dir()]
    return Environment(
        include=[path for root in roots for path in sorted(root.glob("*/include"))],
        library=[path for root in roots for path in sorted(root.glob("*/lib"))],
    )


def install(names: Sequence[str], machine: Machine, environment: Environment, *, dry_run: bool = False) -> int:
    """Install the libraries of these names, one after the other; returns an exit code. Stops at the first failure."""
    say = environment.say
    plan: list[tuple[str, Package]] = []
    for name in dict.fromkeys(names):
        package = pick(name, machine) if name in LIBRARIES else f"choose from {', '.join(LIBRARIES)}"
        if isinstance(package, str):
            say(f"{name}: {package}" if name in LIBRARIES else f"unknown library {name!r}: {package}")
            return REFUSED
        plan.append((name, package))
    if not environment.has_pip():
        say(f"this Python has no pip: run '{shlex.join([*environment.python, '-m', 'ensurepip'])}' first")
        return REFUSED
    before = environment.versions()
    missing = [part for _, package in plan if package.compiles for part in build_needs(before, machine, environment)]
    if missing:
        say(f"Transformer Engine is compiled here, and this is missing: {'; '.join(missing)}")
        return REFUSED
    for name, package in plan:
        code = _install_one(name, package, environment, dry_run)
        if code != DONE:
            return code
    return DONE


def build_needs(versions: dict[str, str], machine: Machine, environment: Environment) -> list[str]:
    """What a compilation against this torch would miss, with what brings it; empty when nothing."""
    missing = []
    packages = [name for name in BUILD_PACKAGES if name not in versions]
    if packages:
        missing.append(f"the Python packages {', '.join(packages)} (pip install {' '.join(packages)})")
    compiler = os.environ.get("CXX") or "c++"
    if shutil.which(compiler) is None and shutil.which("g++") is None:
        missing.append(f"a C++ compiler ({compiler}; on Debian and Ubuntu: apt-get install g++)")
    cuda = machine.cuda or "0.0"
    wanted = [
        f'"{name}=={cuda}.*"' if any(f"cuda-{part}" in name for part in _OF_CUDA) else name
        for header, names in HEADERS.items()
        if not any((folder / header).is_file() for folder in _header_folders(environment))
        for name in [names[0] if cuda.startswith("13.") else names[1]]
    ]
    if wanted:
        missing.append(f"headers of CUDA (pip install --no-deps {' '.join(wanted)})")
    return missing


def _header_folders(environment: Environment) -> list[Path]:
    named = [Path(part) for part in os.environ.get("CPATH", "").split(os.pathsep) if part]
    homes = [Path(os.environ[name]) / "include" for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    return [*environment.include, *named, *homes, Path("/usr/local/cuda/include"), Path("/usr/include")]


def _build_environment(package: Package, environment: Environment) -> dict[str, str]:
    added = dict(package.environment)
    if package.compiles:
        for name, folders in (("CPATH", environment.include), ("LIBRARY_PATH", environment.library)):
            parts = [*map(str, folders), *filter(None, [os.environ.get(name)])]
            if parts:
                added[name] = os.pathsep.join(parts)
    return added


def _install_one(name: str, package: Package, environment: Environment, dry_run: bool) -> int:
    library, say = LIBRARIES[name], environment.say
    before = environment.versions()
    # from an index in this version, or from somewhere else under a name that no package here has
    ours = {re.split(r"[\[=]", other.requirements[0])[0].replace("_", "-") for other in library.packages}
    foreign = any(known in before for known in set(library.distributions) - ours)
    if (package.is_installed(before) or foreign) and environment.import_failure(library) is None:
        say(f"{library.title} is here already and imports")
        return DONE
    with tempfile.TemporaryDirectory() as folder:
        constraints = Path(folder) / "constraints.txt"
        pins = [f"{pinned}=={before[pinned]}" for pinned in PINNED if pinned in before]
        constraints.write_text("\n".join(pins) + "\n", encoding="utf-8")
        say(f"{library.title}, with these held by constraints.txt: {', '.join(pins) or 'none'}")
        flags = ("install", "--disable-pip-version-check", "--constraint", str(constraints))
        arguments = [*flags, *package.options, *package.requirements]
        added = _build_environment(package, environment)
        if dry_run:
            say(environment.shown(arguments, added))
            return DONE
        try:
            failure = None if environment.run_pip(arguments, added) else "pip failed, see above"
            failure = failure or environment.import_failure(library)
        except (KeyboardInterrupt, OSError) as error:
            failure = f"{type(error).__name__} {error}".strip()
    after = environment.versions()
    failure = failure or _moved(before, after)
    if failure is None:
        say(f"{library.title} is installed and imports: {_differences(before, after) or 'nothing changed'}")
        return DONE
    say(f"{library.title} does not work here ({failure})")
    return _roll_back(before, after, environment)


def _moved(before: dict[str, str], after: dict[str, str]) -> str | None:
    """What was to be held and was not; a package's own installer may do such a thing."""
    moved = [name for name in PINNED if name in before and after.get(name) != before[name]]
    return f"{moved[0]} changed from {before[moved[0]]} to {after.get(moved[0], 'nothing')}" if moved else None


def _differences(before: dict[str, str], after: dict[str, str]) -> str:
    return ", ".join(
        f"{name} {before.get(name, 'new')} -> {after.get(name, 'gone')}"
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name)
    )


def _roll_back(before: dict[str, str], after: dict[str, str], environment: Environment) -> int:
    """Uninstall exactly what is new, bring back what changed or went; says whether all is as before."""
    new = sorted(after.keys() - before.keys())
    changed = [f"{name}=={version}" for name, version in sorted(before.items()) if after.get(name) != version]
    if new or changed:
        environment.say("putting everything back:")
    if new:
        environment.run_pip(["uninstall", "--yes", "--disable-pip-version-check", *new], {})
    if changed:
        environment.run_pip(["install", "--disable-pip-version-check", "--no-deps", *changed], {})
    left = _differences(before, environment.versions())
    if left:
        environment.say(f"not everything could be put back ({left}): run the commands above again by hand")
        return NOT_RESTORED
    environment.say("everything is as it was before")
    return FAILED
