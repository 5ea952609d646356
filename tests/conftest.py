"""Shared set-up. The pack's root stays off ``sys.path``: its ``nodes/`` would shadow ComfyUI's own ``nodes`` module."""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
from pathlib import Path

import pytest

pytest_plugins = ["comfy_fixtures"]

PACK = Path(__file__).resolve().parent.parent
HOST_DIR = Path(os.environ.get("WAN_FP8_HOST_DIR") or PACK / ".host")
COMFYUI = Path(os.environ.get("COMFYUI_DIR") or HOST_DIR / "comfyui")
sys.path.append(str(PACK / "scripts"))  # the scripts import each other by name
sys.path.append(str(PACK / "tools"))


def _expose_engine() -> None:
    """Make ``import wan_fp8`` work without putting the pack's root on the path."""
    if "wan_fp8" in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(
        "wan_fp8", PACK / "wan_fp8" / "__init__.py", submodule_search_locations=[str(PACK / "wan_fp8")]
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["wan_fp8"] = module
    spec.loader.exec_module(module)


_expose_engine()

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    # a shell starts background jobs with Ctrl-C ignored, and children inherit that; the tests of cancelling need it
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def comfy_core() -> Path:
    """Core ComfyUI importable in this process (CPU); the folder of the host. Built by ``python scripts/host.py``."""
    if not (COMFYUI / "comfy" / "options.py").is_file():
        pytest.fail(f"no ComfyUI at {COMFYUI}: run 'python scripts/host.py' or set COMFYUI_DIR")
    if str(COMFYUI) not in sys.path:
        sys.path.insert(0, str(COMFYUI))
    import comfy.cli_args  # comfy's own argument parser must not see pytest's arguments

    comfy.cli_args.args.cpu = True
    comfy.cli_args.args.use_pytorch_cross_attention = True
    return COMFYUI
