"""The optional libraries that carry speed, and which package of each fits which Python, torch, CUDA and GPU: as data.

Read by ``install.py`` and by backends that say what to install; a test holds the tables of ``docs/libraries.md``
against it. Standard library only. From the packages' own metadata and symbol tables.
"""

from __future__ import annotations

import platform
import sys
from dataclasses import dataclass

Version = tuple[int, int]

LINUX = ("linux-x86_64",)
LINUX_ARM = ("linux-x86_64", "linux-aarch64")


@dataclass(frozen=True, kw_only=True)
class Package:
    """What pip is asked for, and where that works."""

    requirements: tuple[str, ...]
    options: tuple[str, ...] = ()
    python: Version = (3, 9)
    """From here on."""
    torch: tuple[Version, Version | None]
    """From the first up to and including the second (None: no end known)."""
    cuda: tuple[int, ...]
    """Major versions of the CUDA that torch was built with."""
    platforms: tuple[str, ...] = LINUX
    environment: tuple[tuple[str, str], ...] = ()
    compiles: bool = False
    """Its extension is compiled here, against this torch."""
    seen: str = ""
    """Where it has run, as the results in ``benchmarks/results`` say; empty: its metadata is all we know."""

    def command(self) -> str:
        """The command line for somebody who types it."""
        quoted = (f'"{word}"' if set(word) & set("[<>=*") else word for word in self.requirements)
        return " ".join(("pip install", *self.options, *quoted))

    def is_installed(self, versions: dict[str, str]) -> bool:
        """Whether ``versions`` (by normalised name) have the distribution that is asked for first, in its version."""
        name, _, wanted = self.requirements[0].partition("==")
        found = versions.get(name.partition("[")[0].replace("_", "-"))
        if found is None:
            return False
        return found.startswith(wanted[:-1]) if wanted.endswith("*") else found.split("+")[0] == wanted

    def needs(self) -> str:
        """``torch 2.9 to 2.12, CUDA 13``."""
        first, last = self.torch
        torch = "torch {}.{}".format(*first) + (" to {}.{}".format(*last) if last and last != first else "")
        return f"{torch}, CUDA {' or '.join(map(str, self.cuda))}"


@dataclass(frozen=True)
class Capabilities:
    """A range of compute capabilities, both ends included."""

    first: Version
    last: Version | None = None

    def has_one_of(self, given: tuple[Version, ...]) -> bool:
        """Whether any GPU is in the range."""
        return any(self.first <= one and (self.last is None or one <= self.last) for one in given)

    def __str__(self) -> str:
        first = "{}.{}".format(*self.first)
        if self.last is None:
            return f"{first} or later"
        return first if self.last == self.first else f"{first} to " + "{}.{}".format(*self.last)


@dataclass(frozen=True, kw_only=True)
class Library:
    """Something that is used when it is there."""

    title: str
    modules: tuple[str, ...]
    """One of these has to import."""
    loader: str = ""
    """Module of ours whose ``probe()`` loads it in a way of its own, where a plain import may fail."""
    distributions: tuple[str, ...]
    """Names under which it may be installed."""
    runs: Capabilities
    advised: Capabilities
    """Where it brings something that is not there without it."""
    brings: str
    packages: tuple[Package, ...]


_FA4 = ("flash-attn-4{}==4.0.0b36", "nvidia-cutlass-dsl{}==4.8.1", "nvidia-cutlass-dsl-libs-core==4.8.1")


def _transformer_engine(cuda: int, seen: str) -> Package:
    return Package(
        requirements=(f"transformer_engine[pytorch,core_cu{cuda}]==2.20.2",),
        options=("--no-build-isolation",),
        python=(3, 10),
        torch=((2, 1), None),
        cuda=(cuda,),
        platforms=LINUX_ARM,
        environment=(("NVTE_WITH_NCCL_EP", "0"),),
        compiles=True,
        seen=seen,
    )


LIBRARIES: dict[str, Library] = {
    "transformer-engine": Library(
        title="Transformer Engine",
        modules=("transformer_engine.pytorch",),
        loader="wan_fp8.gemm.backends.transformer_engine",
        distributions=("transformer-engine",),
        runs=Capabilities((8, 9)),
        advised=Capabilities((8, 9)),
        brings="its own casts and products for the FP8 recipes, bit-equal to its layers",
        packages=(_transformer_engine(13, "H200, torch 2.11, CUDA 13.0"), _transformer_engine(12, "")),
    ),
    "fa3": Library(
        title="FlashAttention 3",
        modules=("fa3_fwd_interface", "flash_attn_interface"),
        distributions=("fa3-fwd", "tokenspeed-fa3", "flash-attn-3"),
        runs=Capabilities((9, 0), (9, 0)),
        advised=Capabilities((9, 0), (9, 0)),
        brings="the fastest exact attention of Hopper, and attention in FP8",
        packages=(
            Package(
                requirements=("fa3-fwd==0.0.3",),
                options=("--no-deps",),
                torch=((2, 11), None),
                cuda=(13,),
                seen="H200, torch 2.11, CUDA 13.0",
            ),
            Package(
                requirements=("tokenspeed-fa3==3.0.0.post20260810",),
                options=("--no-deps",),
                torch=((2, 9), (2, 12)),
                cuda=(13,),
            ),
        ),
    ),
    "fa4": Library(
        title="FlashAttention 4",
        modules=("flash_attn.cute",),
        distributions=("flash-attn-4",),
        runs=Capabilities((9, 0), (11, 0)),
        advised=Capabilities((10, 0), (11, 0)),
        brings="exact attention for B200 and B300, block-sparse attention there and on Hopper; compiles at first use",
        packages=(
            Package(
                requirements=tuple(name.format("[cu13]") for name in _FA4),
                python=(3, 10),
                torch=((2, 9), None),
                cuda=(13,),
            ),
            Package(
                requirements=tuple(name.format("") for name in _FA4), python=(3, 10), torch=((2, 9), None), cuda=(12,)
            ),
        ),
    ),
    "sage": Library(
        title="SageAttention",
        modules=("sageattention",),
        distributions=("sageattention",),
        runs=Capabilities((8, 0)),
        advised=Capabilities((8, 0), (8, 9)),
        brings="attention in INT8, inexact, for Ampere and Ada (slower than cuDNN on Hopper)",
        packages=(
            Package(
                requirements=("sageattention==1.0.6",),
                options=("--no-deps",),
                torch=((2, 3), None),
                cuda=(12, 13),
                platforms=LINUX_ARM,
            ),
        ),
    ),
    "triton": Library(
        title="Triton",
        modules=("triton",),
        distributions=("triton", "triton-windows"),
        runs=Capabilities((7, 5)),
        advised=Capabilities((7, 5)),
        brings="fused kernels; without it every pass is a separate operation of torch",
        packages=tuple(
            Package(
                requirements=(f"triton=={version}.*",),
                options=("--no-deps",),
                torch=(first, last),
                cuda=(12, 13),
                platforms=LINUX_ARM,
                seen=seen,
            )
            for version, first, last, seen in (
                ("3.5", (2, 9), (2, 9), ""),
                ("3.6", (2, 10), (2, 11), "H200, torch 2.11, CUDA 13.0"),
                ("3.7", (2, 12), (2, 12), ""),
            )
        ),
    ),
}
"""By the name that ``install.py --with`` takes."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What decides which package fits."""

    python: Version
    platform: str
    """``linux-x86_64``, ``win32-AMD64``, ..."""
    torch: str | None
    cuda: str | None
    """CUDA that torch was built with; None for ROCm, MPS and CPU builds."""
    capabilities: tuple[Version, ...] = ()
    """Of the GPUs that torch sees."""


def this_machine(torch: str | None, cuda: str | None, capabilities: tuple[Version, ...]) -> Machine:
    """This Python on this system."""
    return Machine(
        python=(sys.version_info[0], sys.version_info[1]),
        platform=f"{sys.platform}-{platform.machine()}",
        torch=torch,
        cuda=cuda,
        capabilities=capabilities,
    )


def pick(name: str, machine: Machine) -> Package | str:
    """The first package of a library that fits, or why none does."""
    library = LIBRARIES[name]
    if machine.torch is None:
        return "PyTorch is not installed in this Python: run it with the Python that runs ComfyUI"
    if machine.cuda is None:
        return f"{library.title} needs a PyTorch built for CUDA; this one is {machine.torch}"
    if machine.capabilities and not library.runs.has_one_of(machine.capabilities):
        have = ", ".join("{}.{}".format(*capability) for capability in machine.capabilities)
        return f"{library.title} is for GPUs of compute capability {library.runs}; this machine has {have}"
    for package in library.packages:
        if _fits(package, machine):
            return package
    offered = "; ".join(f"{package.requirements[0]}: {package.needs()}" for package in library.packages)
    python, platforms = library.packages[0].python, sorted({p for x in library.packages for p in x.platforms})
    return (
        f"no package of {library.title} fits Python {machine.python[0]}.{machine.python[1]}, torch {machine.torch} "
        f"with CUDA {machine.cuda} on {machine.platform} ({offered}; Python {python[0]}.{python[1]} or later, "
        f"{', '.join(platforms)})"
    )


def hint(name: str, cuda: str | None) -> str:
    """What to type to install a library beside a torch of this CUDA."""
    packages = LIBRARIES[name].packages
    major = int((cuda or "0").split(".")[0])
    return next((package for package in packages if major in package.cuda), packages[0]).command()


def _fits(package: Package, machine: Machine) -> bool:
    assert machine.torch is not None and machine.cuda is not None
    torch, (first, last) = release(machine.torch), package.torch
    return (
        machine.python >= package.python
        and machine.platform in package.platforms
        and first <= torch
        and (last is None or torch <= last)
        and int(machine.cuda.split(".")[0]) in package.cuda
    )


def release(version: str) -> Version:
    """``2.11.0+cu130`` -> (2, 11)."""
    parts = version.split("+")[0].split(".")
    return int(parts[0]), int(parts[1])
