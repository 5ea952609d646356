"""What importing the engine brings along, seen in a process of its own, and which way imports point."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

PACK = Path(__file__).resolve().parents[2]
HOST_MODULES = ("comfy", "comfy_api", "comfy_execution", "comfy_extras", "folder_paths", "nodes", "execution", "server")
OPTIONAL = (
    "diffusers",
    "fa3_fwd_interface",
    "flash_attn",
    "flash_attn_interface",
    "ftfy",
    "sageattention",
    "tokenizers",
    "transformer_engine",
    "transformers",
    "xformers",
)
ENGINE = sorted((PACK / "wan_fp8").rglob("*.py"))
MODULES = [
    ".".join(path.relative_to(PACK).with_suffix("").parts).removesuffix(".__init__")
    for path in ENGINE
    if not path.name.startswith("_") or path.name == "__init__.py"  # files named _x need what they were split off for
]
PROBE = """
import importlib, json, sys
sys.path.insert(0, sys.argv[1])
for name in json.loads(sys.argv[2]):
    importlib.import_module(name)
import torch
print(json.dumps([sorted({name.partition(".")[0] for name in sys.modules}), torch.cuda.is_initialized()]))
"""


@pytest.mark.parametrize("modules", [["wan_fp8"], MODULES], ids=["package", "every module"])
def test_importing_the_engine_brings_neither_the_host_nor_an_optional_library(modules: list[str]) -> None:
    command = [sys.executable, "-c", PROBE, str(PACK), json.dumps(modules)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    loaded, cuda = json.loads(done.stdout)
    assert {"torch", "wan_fp8"} <= set(loaded)
    assert not set(loaded) & {*HOST_MODULES, *OPTIONAL}
    assert cuda is False


def imported_names(path: Path) -> set[str]:
    """Top-level names of the absolute imports anywhere in a file, those inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(str(node.module).partition(".")[0])
    return found


@pytest.mark.parametrize("path", ENGINE, ids=lambda path: str(path.relative_to(PACK)))
def test_the_engine_never_imports_the_host(path: Path) -> None:
    assert not imported_names(path) & set(HOST_MODULES)


def test_the_pack_imports_itself_relatively() -> None:
    """ComfyUI loads the pack under a name of its own: 'import wan_fp8' in it would be a second copy."""
    files = [PACK / "__init__.py", *ENGINE, *sorted((PACK / "nodes").rglob("*.py"))]
    assert len(files) > 20
    assert [str(path) for path in files if "wan_fp8" in imported_names(path)] == []


def test_the_root_runs_outside_a_package() -> None:
    """Tools that execute the file by itself must not fail on it."""
    done = subprocess.run([sys.executable, PACK / "__init__.py"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
