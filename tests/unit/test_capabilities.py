"""The capability table: every cell against a list written by hand, its versions on both sides, and who uses it."""

from __future__ import annotations

import itertools
import re

import pytest
import torch

from wan_fp8.gemm import GEMM, GemmRequest, register_backends
from wan_fp8.gemm.backends import transformer_engine
from wan_fp8.gemm.capabilities import CAPABILITIES, Hardware, Needs, hardware_of, why_not
from wan_fp8.hardware import DeviceCaps
from wan_fp8.kernels.quantize import Granularity

register_backends()
DEVICES: dict[str, tuple[str, tuple[int, int] | None, str | None]] = {
    "7.5": ("cuda", (7, 5), "13.0"),
    "8.0": ("cuda", (8, 0), "13.0"),
    "8.6": ("cuda", (8, 6), "13.0"),
    "8.9": ("cuda", (8, 9), "13.0"),
    "9.0": ("cuda", (9, 0), "13.0"),
    "10.0": ("cuda", (10, 0), "13.0"),
    "10.3": ("cuda", (10, 3), "13.0"),
    "12.0": ("cuda", (12, 0), "13.0"),
    "rocm": ("cuda", (9, 4), None),
    "mps": ("mps", None, None),
    "cpu": ("cpu", None, None),
    "xpu": ("xpu", None, None),
}
EVERYWHERE = set(DEVICES) - {"mps"}
RUNS = {
    ("torch", "tensor"): {"8.9", "9.0", "10.0", "10.3", "12.0"},
    ("torch", "row"): {"8.9", "9.0", "10.0", "10.3", "12.0"},
    ("torch", "block"): {"9.0"},
    ("torch", "mx"): {"10.0", "10.3"},
    ("transformer_engine", "tensor"): {"8.9", "9.0", "10.0", "10.3", "12.0"},
    ("transformer_engine", "row"): set(),
    ("transformer_engine", "block"): {"9.0"},
    ("transformer_engine", "mx"): set(),
    **{("weight-only", kind): EVERYWHERE for kind in ("tensor", "row", "block", "mx")},
    **{("reference", kind): EVERYWHERE for kind in ("tensor", "row", "block", "mx")},
}


def caps(name: str, torch_version: str = "2.14.0+cu130", cuda: str | None = None) -> DeviceCaps:
    kind, capability, default = DEVICES[name]
    return DeviceCaps(
        device=torch.device(kind),
        name=f"a {name}",
        capability=capability,
        total_memory_bytes=None,
        torch_version=torch_version,
        cuda_version=cuda or default,
    )


def request(name: str, kind: str, dtype: torch.dtype = torch.bfloat16, **versions: str) -> GemmRequest:
    return GemmRequest(caps(name, **versions), Granularity(kind), dtype)


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformer_engine, "probe", lambda: (object(), "2.20.2"))


def test_every_backend_and_kind_of_scales_has_a_row() -> None:
    assert set(CAPABILITIES) == set(itertools.product(set(GEMM.names) - {"auto"}, Granularity)) == set(RUNS)
    assert all(set(row) == set(Hardware) for row in CAPABILITIES.values())


@pytest.mark.parametrize("backend, kind", RUNS)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.usefixtures("engine")
def test_cells(backend: str, kind: str, device: str) -> None:
    reason = why_not(backend, request(device, kind))
    assert (reason is None) is (device in RUNS[backend, kind]), reason
    assert GEMM.backend(backend).refuse(request(device, kind)) == reason, "the backend says the same"
    if reason is not None:
        assert "{" not in reason and "()" not in reason and len(reason) < 200, reason


NVIDIA = [
    (backend, kind, device)
    for (backend, kind), runs in RUNS.items()
    if backend in ("torch", "transformer_engine")
    for device in sorted(runs)
]


@pytest.mark.parametrize("backend, kind, device", NVIDIA)
def test_versions(backend: str, kind: str, device: str) -> None:
    cell = CAPABILITIES[backend, Granularity(kind)][hardware_of(caps(device))]
    assert isinstance(cell, Needs) and cell.least_torch is not None
    assert cell.least_cuda is not None
    enough = {"torch_version": "{}.{}.0".format(*cell.least_torch), "cuda": "{}.{}".format(*cell.least_cuda)}
    assert why_not(backend, request(device, kind, **enough)) is None
    for what, (major, minor), key in (("torch", cell.least_torch, "torch_version"), ("CUDA", cell.least_cuda, "cuda")):
        reason = why_not(backend, request(device, kind, **{**enough, key: f"{major}.{minor - 1}"}))
        assert reason is not None and f"{what} {major}.{minor}" in reason and f"{major}.{minor - 1}" in reason


def test_types() -> None:
    """CUTLASS, which multiplies row scales where cuBLAS does not, gave bf16 only for long."""
    half = torch.float16
    assert why_not("torch", request("9.0", "row", half)) is None
    assert "bf16 there" in str(why_not("torch", request("9.0", "row", half, cuda="12.8")))
    assert "bf16 there" in str(why_not("torch", request("8.9", "row", half)))
    assert why_not("torch", request("8.9", "tensor", half)) is None
    assert "bf16 and fp16" in str(why_not("torch", request("9.0", "row", torch.float32)))
    assert "bf16 there" in str(why_not("transformer_engine", request("9.0", "tensor", half)))
    for backend in ("weight-only", "reference"):
        for dtype in (half, torch.float32, torch.float64):
            assert why_not(backend, request("cpu", "row", dtype)) is None


@pytest.mark.parametrize(
    "backend, kind, device, words",
    [
        ("torch", "row", "8.6", r"compute capability 8\.9; a 8\.6 has 8\.6: backend weight-only"),
        ("torch", "row", "rocm", "a rocm is an AMD GPU"),
        ("torch", "row", "cpu", "NVIDIA GPU; the tensors are on cpu"),
        ("torch", "block", "10.0", "MXFP8BlockScaling on 10.x"),
        ("torch", "mx", "9.0", r"10\.0 or 10\.3; a 9\.0 has 9\.0: use recipe rowwise"),
        ("transformer_engine", "block", "12.0", "powers of two only.*rowwise elsewhere"),
        ("transformer_engine", "mx", "10.0", "use backend torch"),
        ("weight-only", "row", "mps", "no FP8 type on MPS: load an fp16 or bf16"),
    ],
)
def test_sentences(backend: str, kind: str, device: str, words: str) -> None:
    assert re.search(words, str(why_not(backend, request(device, kind))))


def test_what_a_cell_says() -> None:
    assert str(Needs((2, 10), (12, 9))) == "torch 2.10, CUDA 12.9" and str(Needs(dtypes=None)) == "yes"
