"""What this machine can do, asked in one place. Importing this module touches neither CUDA nor an optional library."""

from __future__ import annotations

import functools
import importlib.util
from dataclasses import dataclass
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceCaps:
    """Facts about one device that decide which kernels may run on it."""

    device: torch.device
    name: str
    capability: tuple[int, int] | None
    """CUDA compute capability, for example (9, 0); None on other devices."""
    total_memory_bytes: int | None
    torch_version: str
    cuda_version: str | None

    @property
    def is_cuda(self) -> bool:
        """True for an NVIDIA GPU (ROCm devices report no CUDA version)."""
        return self.device.type == "cuda" and self.cuda_version is not None

    @property
    def is_hopper(self) -> bool:
        """H100, H200: compute capability 9.0."""
        return self.is_cuda and self.capability == (9, 0)


@functools.cache
def _device_caps(device_type: str, index: int | None) -> DeviceCaps:
    device = torch.device(device_type) if index is None else torch.device(device_type, index)
    if device_type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return DeviceCaps(
            device=device,
            name=properties.name,
            capability=(properties.major, properties.minor),
            total_memory_bytes=properties.total_memory,
            torch_version=torch.__version__,
            cuda_version=torch.version.cuda,
        )
    return DeviceCaps(
        device=device,
        name=device_type,
        capability=None,
        total_memory_bytes=None,
        torch_version=torch.__version__,
        cuda_version=torch.version.cuda,
    )


def device_caps(device: torch.device | str) -> DeviceCaps:
    """Facts about ``device``; each device index is probed once, at its first use."""
    device = torch.device(device)
    index = device.index
    if device.type == "cuda" and index is None:
        index = torch.cuda.current_device()
    return _device_caps(device.type, index)


@functools.cache
def has_module(name: str) -> bool:
    """True if a Python module can be found, without importing it or the package that it lies in, which may be broken.

    False for a stand-in that another pack put into ``sys.modules``: it has no spec, and nothing in it to call.
    """
    package = name.rpartition(".")[0]
    try:
        if not package:
            return importlib.util.find_spec(name) is not None
        around = importlib.util.find_spec(package)  # packages of two levels are not asked for
    except ValueError:
        return False
    places = None if around is None else around.submodule_search_locations
    return places is not None and PathFinder.find_spec(name, list(places)) is not None


def load_entry(module: str, name: str) -> tuple[Any, str]:
    """What an optional library calls ``name``, and ""; or None, and why it cannot be had.

    Only in here is every exception taken: a wheel for another torch or GPU, and a stand-in of another pack, raise what
    they like at their import. The reason keeps their words, and whoever asked for the library refuses with it.
    """
    if not has_module(module):
        return None, f"{module} is not installed"
    try:
        return getattr(importlib.import_module(module), name), ""
    except Exception as error:
        return None, f"{module} does not load ({type(error).__name__}: {error})"


def gpu_devices() -> list[torch.device]:
    """Every GPU that torch sees, of whichever maker; [] on a machine with a CPU alone."""
    if torch.cuda.is_available():
        return [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    xpu = getattr(torch, "xpu", None)
    if xpu is not None and xpu.is_available():
        return [torch.device("xpu", index) for index in range(xpu.device_count())]
    return [torch.device("mps")] if torch.backends.mps.is_available() else []


def free_memory_bytes(device: torch.device) -> int | None:
    """What nobody holds on an NVIDIA or AMD GPU; None elsewhere."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None


def driver_version() -> str | None:
    """Of the NVIDIA driver, where Linux tells it."""
    try:
        words = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8").split()
    except OSError:
        return None
    return next((word for word in words if word.count(".") >= 1 and word.replace(".", "").isdigit()), None)
