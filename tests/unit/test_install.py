"""install.py, which ComfyUI Manager runs on users' machines: what it says, and that it only looks."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "install.py"


@pytest.fixture
def install() -> ModuleType:
    spec = importlib.util.spec_from_file_location("wan_install", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_prints_a_table_and_ends_well() -> None:
    done = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    for part in ("PyTorch", "FlashAttention 3", "Transformer Engine", "nothing is installed"):
        assert part in done.stdout


def test_it_works_without_pytorch(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "bare"], check=True)
    done = subprocess.run([tmp_path / "bare" / "bin" / "python", SCRIPT], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "run this with the Python that runs ComfyUI" in done.stdout


def advice(install: ModuleType, capability: tuple[int, int] | None) -> dict[str, str]:
    return {row[0]: row[2] for row in install.library_rows(capability)}


def test_advice_depends_on_the_gpu(install: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(install, "version", lambda package: None)
    assert advice(install, (9, 0))["FlashAttention 3"] == "pip install --no-deps fa3-fwd"
    assert advice(install, (8, 9))["FlashAttention 3"] == "", "FlashAttention 3 runs on Hopper alone"
    assert "transformer-engine" in advice(install, (8, 9))["Transformer Engine"]
    assert advice(install, (8, 6))["Transformer Engine"] == "", "no FP8 arithmetic there"
    assert advice(install, None)["Transformer Engine"] == ""
    monkeypatch.setattr(install, "version", lambda package: "1.2.3")
    assert set(advice(install, (9, 0)).values()) == {""}


def test_it_starts_no_process() -> None:
    imports = {
        alias.name
        for node in ast.walk(ast.parse(SCRIPT.read_text()))
        if isinstance(node, ast.Import)
        for alias in node.names
    }
    assert imports <= {"importlib.util", "platform", "sys", "torch"}
