"""install.py, which ComfyUI Manager runs on users' machines: what it says, and that by itself it only looks."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import install_libraries
import pytest

from wan_fp8.libraries import LIBRARIES, Machine, Version

PACK = Path(__file__).resolve().parents[2]
SCRIPT = PACK / "install.py"
SOURCES = [SCRIPT, PACK / "scripts" / "install_libraries.py", PACK / "wan_fp8" / "libraries.py"]


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
    for part in ("PyTorch", "nothing is installed", *(f"{library.title} ({n})" for n, library in LIBRARIES.items())):
        assert part in done.stdout


@pytest.mark.parametrize("arguments, code", [([], 0), (["--with", "fa3"], 2), (["--with", "fa3", "--dry-run"], 2)])
def test_it_works_without_pytorch(tmp_path: Path, arguments: list[str], code: int) -> None:
    """-I: as in portable builds of Python, which do not add the script's folder to the path."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "bare"], check=True)
    command = [tmp_path / "bare" / "bin" / "python", "-I", SCRIPT, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == code and "the Python that runs ComfyUI" in done.stdout, done.stderr


def advice(install: ModuleType, *capabilities: Version, torch: str = "2.11.0+cu130", cuda: str = "13.0") -> dict:
    machine = Machine(python=(3, 12), platform="linux-x86_64", torch=torch, cuda=cuda, capabilities=tuple(capabilities))
    return {row[0].partition(" (")[0]: row[2] for row in install.library_rows(machine)}


def test_advice_depends_on_the_gpu(install: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(install, "version", lambda package: None)
    assert advice(install, (9, 0))["FlashAttention 3"] == 'pip install --no-deps "fa3-fwd==0.0.3"'
    assert advice(install, (8, 9))["FlashAttention 3"] == "", "FlashAttention 3 runs on Hopper alone"
    assert "transformer_engine" in advice(install, (8, 9))["Transformer Engine"]
    assert advice(install, (8, 6))["Transformer Engine"] == "", "no FP8 arithmetic there"
    assert advice(install)["Transformer Engine"] == ""
    assert "flash-attn-4[cu13]" in advice(install, (10, 0))["FlashAttention 4"]
    assert advice(install, (9, 0))["FlashAttention 4"] == "" == advice(install, (9, 0))["SageAttention"]
    assert "core_cu12" in advice(install, (8, 6), (8, 9), torch="2.8.0", cuda="12.8")["Transformer Engine"], (
        "either GPU"
    )
    monkeypatch.setattr(install, "version", lambda package: "1.2.3")
    assert set(advice(install, (9, 0)).values()) == {""}


def test_it_says_why_no_package_fits(install: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(install, "version", lambda package: None)
    words = advice(install, (9, 0), torch="2.8.0+cu128", cuda="12.8")["FlashAttention 3"]
    assert words.startswith("no package of FlashAttention 3 fits Python 3.12, torch 2.8.0+cu128 with CUDA 12.8")
    assert "torch 2.9 to 2.12, CUDA 13" in words


def test_by_itself_it_starts_no_process(install: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """As ComfyUI Manager calls it: no arguments."""

    def refuse(*_, **__):
        raise AssertionError("a process was started")

    for name in ("run", "Popen", "check_call", "check_output"):
        monkeypatch.setattr(subprocess, name, refuse)
    monkeypatch.setattr(install, "install", refuse)
    assert install.main([]) == 0 and "nothing is installed" in capsys.readouterr().out
    with pytest.raises(AssertionError, match="a process was started"):
        install.main(["--with", "fa3"])


def test_names_are_those_after_with(install: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list = []
    monkeypatch.setattr(install, "install", lambda names, *_, dry_run: calls.append((names, dry_run)) or 0)
    assert install.main(["--with", "transformer-engine, fa3,", "--dry-run"]) == 0
    assert calls == [(["transformer-engine", "fa3"], True)]
    for wrong in (["--with", ","], ["--dry-run"], ["fa3"]):
        with pytest.raises(SystemExit) as ended:
            install.main(wrong)
        assert ended.value.code == install_libraries.REFUSED


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_only_the_standard_library(path: Path) -> None:
    ours = {"torch", "install_libraries", "wan_fp8"}  # torch is asked when it is there
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "run by its path, it has no package"
            names.add(str(node.module).partition(".")[0])
    assert names - ours <= sys.stdlib_module_names
    assert "://" not in path.read_text(encoding="utf-8"), "packages come from wherever the user's pip takes them"


def test_exit_codes_differ() -> None:
    codes = ("DONE", "FAILED", "REFUSED", "NOT_RESTORED")
    assert [getattr(install_libraries, name) for name in codes] == [0, 1, 2, 3]
