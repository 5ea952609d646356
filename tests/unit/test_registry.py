"""The pack as ComfyUI's registry sees it: its own checker, and the rules for its metadata."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import environments

PACK = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((PACK / "pyproject.toml").read_text())


def test_the_registrys_checker_is_content() -> None:
    done = environments.comfy_cli("node", "validate")
    assert done.returncode == 0 and "All validation checks passed" in done.stdout + done.stderr


def test_metadata_follows_the_registrys_rules() -> None:
    project, comfy = PROJECT["project"], PROJECT["tool"]["comfy"]
    assert re.fullmatch(r"[a-z][a-z0-9._-]{0,98}", project["name"]) and "comfyui" not in project["name"].lower()
    assert re.fullmatch(r"\d+\.\d+\.\d+", project["version"])
    assert (PACK / project["license"]["file"]).read_text().lstrip().startswith("Apache License")
    assert comfy["PublisherId"] and comfy["DisplayName"] and comfy["requires-comfyui"]
    assert "web" not in comfy, "WEB_DIRECTORY is set: a second declaration would register it twice"


def test_the_version_is_said_once_in_two_places() -> None:
    engine = (PACK / "wan_fp8" / "__init__.py").read_text()
    assert f'__version__ = "{PROJECT["project"]["version"]}"' in engine


def test_the_archive_leaves_out_what_users_do_not_run() -> None:
    ignored = (PACK / ".comfyignore").read_text().split()
    assert {"tests/", "benchmarks/"} <= set(ignored)
    for needed in ("nodes/", "wan_fp8/", "workflows/", "web/", "LICENSE", "requirements.txt", "__init__.py"):
        assert needed not in ignored and (PACK / needed).exists()
