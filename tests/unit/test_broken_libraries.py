"""Optional libraries that are there and broken: wheels for another torch, stand-ins that another pack left behind."""

from __future__ import annotations

import dataclasses
import importlib
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from wan_fp8 import doctor, hardware, kernels
from wan_fp8.attention import ATTENTION, Attention, AttentionCore, AttentionRequest, set_attention
from wan_fp8.attention.backends import flash2, flash3, flash4, sage
from wan_fp8.attention.core import register_backends
from wan_fp8.gemm.backends import transformer_engine
from wan_fp8.hardware import DeviceCaps
from wan_fp8.libraries import LIBRARIES
from wan_fp8.quality import kernels_used

NAMES = ("fa3_fwd_interface", "flash_attn_interface", "flash_attn", "sageattention", "transformer_engine", "triton")
CACHED = (hardware.has_module, flash2._package, flash3._load, flash4._load, sage._load, transformer_engine.probe)
H100 = DeviceCaps(
    device=torch.device("cuda", 0),
    name="NVIDIA H100 80GB HBM3",
    capability=(9, 0),
    total_memory_bytes=80 * 2**30,
    torch_version="2.11.0",
    cuda_version="13.0",
)
REQUEST = AttentionRequest(H100, torch.bfloat16, 128, 1000, 1000)


@pytest.fixture
def forgotten(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing of these libraries is remembered, before and after."""
    register_backends()
    for name in [name for name in sys.modules if name.partition(".")[0] in NAMES]:
        monkeypatch.delitem(sys.modules, name)
    for cached in (*CACHED, kernels._triton_fault):
        cached.cache_clear()
    yield
    for cached in (*CACHED, kernels._triton_fault):
        cached.cache_clear()
    for name in [name for name in sys.modules if name.partition(".")[0] in NAMES]:
        del sys.modules[name]


@pytest.mark.parametrize("error", ["ImportError", "RuntimeError", "AssertionError"])
@pytest.mark.usefixtures("forgotten")
def test_a_broken_one_is_a_reason_in_its_own_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: str) -> None:
    for name in NAMES:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(f"raise {error}('undefined symbol in {name}')")
    (tmp_path / "flash_attn" / "cute").mkdir()
    (tmp_path / "flash_attn" / "cute" / "__init__.py").write_text("flash_attn_func = print")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    for backend, library in (("fa3", "flash_attn_interface"), ("fa4", "flash_attn"), ("sage", "sageattention")):
        reason = ATTENTION.backend(backend).refuse(REQUEST)
        assert reason is not None and f"does not load ({error}: undefined symbol in {library})" in reason
    assert ATTENTION.resolve("auto", REQUEST).backend.name in ("cudnn", "fa2"), "auto goes on to what runs"
    label = ATTENTION.backend("fa2").label
    assert label == f"fa2 (torch's own kernel: flash_attn does not load ({error}: undefined symbol in flash_attn))"
    monkeypatch.setattr(transformer_engine.metadata, "version", lambda _: "2.20.2")
    assert "does not load (undefined symbol in transformer_engine)" in transformer_engine.probe()[1]
    fused = kernels.refusal(torch.device("cuda"), torch.bfloat16)
    assert fused is not None and f"triton does not load ({error}: undefined symbol in triton)" in fused


@pytest.mark.usefixtures("forgotten")
def test_flash_attention_2_is_not_taken_for_4(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both install a package of that name; it is looked into without importing it."""
    (tmp_path / "flash_attn").mkdir()
    (tmp_path / "flash_attn" / "__init__.py").write_text("raise ImportError('undefined symbol')")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    assert hardware.has_module("flash_attn") and not hardware.has_module("flash_attn.cute")
    assert "flash_attn.cute is not installed" in (ATTENTION.backend("fa4").refuse(REQUEST) or "")
    assert "flash_attn" not in sys.modules


@pytest.mark.usefixtures("forgotten")
@pytest.mark.parametrize(
    ("package", "whose"),
    [
        ("flash_attn_func = lambda q, k, v: q + 7", "flash-attn"),
        (
            "raise ImportError('undefined symbol')",
            "torch's own kernel: flash_attn does not load (ImportError: undefined",
        ),
        (None, "torch's own kernel: flash_attn is not installed"),
    ],
    ids=["working", "broken", "absent"],
)
def test_flash_attention_2_says_whose_kernel_it_is(
    tmp_path: Path, monkeypatch, package: str | None, whose: str
) -> None:
    """In node and log, receipt, guard and doctor; and that one is the one that runs."""
    if package is not None:
        (tmp_path / "flash_attn").mkdir()
        (tmp_path / "flash_attn" / "__init__.py").write_text(package)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    real = ATTENTION.backend("fa2")
    monkeypatch.setattr(flash2, "attend", lambda q, k, v: q + 3)
    q = torch.zeros(1, 4, 1, 64)
    assert float(real.run(q, q, q)[0, 0, 0, 0]) == (7 if whose == "flash-attn" else 3)
    assert real.label.startswith(f"fa2 ({whose}")
    (row,) = (row for row in doctor.attention_kernels(doctor.Patient(H100, {})) if row.what == "fa2")
    assert row.found.startswith(f"runs, {whose}")
    monkeypatch.setitem(ATTENTION._backends, "fa2", dataclasses.replace(real, refuse=lambda _: None))
    for setting in (Attention("fa2"), Attention("reference-fp8", "fa2", 0, 0, 0, 0, bound=1e-9)):
        core = set_attention(AttentionCore(), setting)
        core(q, q, q)
        (used,) = kernels_used(core)["attention"]
        assert used == real.label, setting


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (10, 0), (10, 3), (11, 0), (12, 0), (12, 1), (13, 0)])
def test_where_auto_takes_flash_attention_4(capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """With the package there and FA3 not. What it does for 12.x is not known for certain: refused, with the reason."""
    register_backends()
    monkeypatch.setattr(flash3, "_load", lambda: (None, "not installed"))
    monkeypatch.setattr(flash4, "_load", lambda: (lambda q, k, v: (q, None), "flash_attn.cute"))
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    gpu = dataclasses.replace(H100, capability=capability, name="a GPU")
    resolution = ATTENTION.resolve("auto", dataclasses.replace(REQUEST, caps=gpu))
    taken = capability[0] in (9, 10, 11)
    assert resolution.backend.name == ("fa4" if taken else "cudnn")
    words = (
        "it needs a Hopper or Blackwell GPU" if capability < (9, 0) else "its kernel for others is not known to work"
    )
    assert taken or words in resolution.refused["fa4"]
    assert taken == LIBRARIES["fa4"].runs.has_one_of((capability,))


@pytest.mark.usefixtures("forgotten")
def test_a_stand_in_without_a_spec_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    assert not any(map(hardware.has_module, (*NAMES, "flash_attn.cute", "transformer_engine.pytorch")))
    assert all("not installed" in (ATTENTION.backend(name).refuse(REQUEST) or "") for name in ("fa3", "fa4", "sage"))
    assert "not installed" in (kernels.refusal(torch.device("cuda"), torch.bfloat16) or "")
