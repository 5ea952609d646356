"""Smaller things built beside the host when somebody asks for them: each in a folder of ``.host/``, made once.

Standard library only, like ``host``.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

from host import HOST_DIR, PACK, lock, make_venv, read_stamp, run, say

FRONTEND = "comfyui-frontend-package==1.58.1"
CLIENT_PACKAGES = ("typer", "rich", "websocket-client")
TOOLS_PACKAGES = ("comfy-cli==1.23.0",)
GUARD_PACKAGES = ("comfy-import-guard==1.3.0",)


def client_python() -> Path:
    """An interpreter with what ``run_workflow.py`` needs: the pinned host's, else a small environment made for it."""
    host = HOST_DIR / "venv" / "bin" / "python"
    if host.exists() and read_stamp(HOST_DIR / "stamp.json") is not None:
        return host
    return _small_venv("client", CLIENT_PACKAGES)


def tools_python() -> Path:
    """An interpreter with the workflow checker (comfy-cli), whose requirements clash with the host's."""
    return _small_venv("tools", TOOLS_PACKAGES)


def guard_python() -> Path:
    """An interpreter with the checker of what a pack calls in ComfyUI (comfy-import-guard)."""
    return _small_venv("guard", GUARD_PACKAGES)


def comfy_cli(*arguments: str | Path, pack: Path = PACK) -> subprocess.CompletedProcess[str]:
    """Run comfy-cli on this pack (or on ``pack``, a copy of it), its settings in our own folder and not the user's
    home, no usage reports."""
    python = tools_python()
    home = python.parent.parent / "home"
    environment = {**os.environ, "HOME": str(home), "XDG_CONFIG_HOME": str(home / ".config"), "DO_NOT_TRACK": "1"}
    program = [str(python.parent / "comfy"), "--skip-prompt"]
    if not home.exists():
        (home / ".config").mkdir(parents=True)
        subprocess.run([*program, "tracking", "disable"], env=environment, capture_output=True, check=True)
    command = [*program, *map(str, arguments)]
    return subprocess.run(command, cwd=pack, env=environment, capture_output=True, text=True, timeout=120, check=False)


def newer_frontend() -> Path:
    """The folder of a much newer editor, for ``--front-end-root``: most users' ComfyUI is newer than the pinned one."""
    target = HOST_DIR / FRONTEND.replace("==", "-")
    root = target / "comfyui_frontend_package" / "static"
    with lock("frontend"):
        if not (root / "index.html").is_file():
            say(f"installing {FRONTEND} into {target} ...")
            python = HOST_DIR / "venv" / "bin" / "python"
            run(
                python, "-m", "pip", "--disable-pip-version-check", "install", "--no-deps", "--target", target, FRONTEND
            )
    return root


def _small_venv(name: str, packages: tuple[str, ...]) -> Path:
    python, stamp = HOST_DIR / name / "bin" / "python", HOST_DIR / name / "stamp.json"
    with lock(name):
        if not python.exists() or read_stamp(stamp) != " ".join(packages):
            say(f"installing {', '.join(packages)} into {python.parent.parent} ...")
            make_venv(HOST_DIR / name)
            run(python, "-m", "pip", "--disable-pip-version-check", "install", *packages)
            stamp.write_text(json.dumps({"inputs": " ".join(packages)}) + "\n", encoding="utf-8")
    return python
