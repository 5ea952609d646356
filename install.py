#!/usr/bin/env python3
"""Shows what this machine has for Wan FP8 and what would make it faster. By itself it installs and changes nothing.

    python install.py                                  the table
    python install.py --with transformer-engine,fa3    install these; torch stays, and a failure is undone
    python install.py --with fa3 --dry-run             only show the commands

ComfyUI Manager runs it after installing the pack, without arguments; run it by hand, with ComfyUI's own Python,
whenever you like. Standard library only; PyTorch is asked when it is there.
"""

from __future__ import annotations

import sys

# Before anything that an older Python cannot read.
if sys.version_info < (3, 11):  # noqa: UP036
    sys.exit(f"Wan FP8 needs Python 3.11 or later; this is {sys.version.split()[0]}: run it with ComfyUI's own Python")

import argparse
import importlib.util
import platform
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

PACK = Path(__file__).resolve().parent
sys.path.append(str(PACK / "scripts"))
if __name__ == "__main__" and str(PACK) not in sys.path:
    sys.path.insert(0, str(PACK))  # portable builds of Python do not add the script's folder

from install_libraries import install, this_environment  # noqa: E402

from wan_fp8.libraries import LIBRARIES, Machine, Package, pick, this_machine  # noqa: E402

ADA = (8, 9)

Row = tuple[str, str, str]
"""What, what was found, and what to do about it (empty: nothing)."""


def version(package: str) -> str | None:
    """Version of an installed distribution, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def machine_rows() -> tuple[list[Row], Machine]:
    """Python, PyTorch and the GPUs; and what of them decides which packages fit."""
    advice = "" if sys.version_info >= (3, 11) else "the pack needs Python 3.11 or later"
    rows: list[Row] = [("Python", platform.python_version(), advice)]
    if importlib.util.find_spec("torch") is None:
        return [*rows, ("PyTorch", "not found", "run this with the Python that runs ComfyUI")], this_machine(
            None, None, ()
        )
    import torch

    cuda = torch.version.cuda
    rows.append(("PyTorch", f"{torch.__version__}, CUDA {cuda}" if cuda else f"{torch.__version__}, no CUDA", ""))
    if not cuda or not torch.cuda.is_available():
        rows.append(("GPU", "none that PyTorch can use", "without one, only tiny models finish"))
        return rows, this_machine(torch.__version__, cuda, ())
    capabilities = []
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        capabilities.append((gpu.major, gpu.minor))
        note = "" if capabilities[-1] >= ADA else "no FP8 arithmetic: it computes in bf16"
        rows.append(
            (f"GPU {index}", f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, sm_{gpu.major}{gpu.minor}", note)
        )
    return rows, this_machine(torch.__version__, cuda, tuple(capabilities))


def library_rows(machine: Machine) -> list[Row]:
    """The optional libraries, with the command for those that would help on these GPUs, or why no package fits."""
    rows: list[Row] = []
    for name, library in LIBRARIES.items():
        found = next((text for text in map(version, library.distributions) if text is not None), None)
        advice = ""
        if found is None and library.advised.has_one_of(machine.capabilities):
            package = pick(name, machine)
            advice = package.command() if isinstance(package, Package) else package
        rows.append((f"{library.title} ({name})", found or "not installed", advice))
    ftfy = version("ftfy")
    return [*rows, ("ftfy", ftfy or "not installed", "" if ftfy else "pip install -r requirements.txt")]


def table(rows: list[Row]) -> str:
    """The rows in aligned columns."""
    rows = [("", "found", "what would help"), *rows]
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    return "\n".join(f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c}".rstrip() for a, b, c in rows)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="What this machine has for Wan FP8, and what would make it faster.")
    parser.add_argument("--with", dest="names", metavar="NAME,...", help=f"install: {', '.join(LIBRARIES)}")
    parser.add_argument("--dry-run", action="store_true", help="with --with: show the commands, run none")
    asked = parser.parse_args(arguments)
    if asked.dry_run and asked.names is None:
        parser.error("--dry-run shows what --with would do: name libraries")
    rows, machine = machine_rows()
    if asked.names is not None:
        names = [name.strip() for name in asked.names.split(",") if name.strip()]
        if not names:
            parser.error(f"--with takes one or more of {', '.join(LIBRARIES)}")
        return install(names, machine, this_environment(), dry_run=asked.dry_run)
    libraries = library_rows(machine)
    print("Wan FP8 on this machine (nothing is installed or changed by this)")
    print(table([*rows, *libraries]))
    if any(row[2].startswith("pip install") and "(" in row[0] for row in libraries):
        print("'python install.py --with NAME,...' runs these commands, holds torch as it is, and undoes what fails.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
