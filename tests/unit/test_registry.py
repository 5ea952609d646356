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
    said = done.stdout + done.stderr
    assert done.returncode == 0 and "All validation checks passed" in said
    assert "warning" not in said.lower(), said


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


def test_icon_and_banner_are_there_and_named_once_there_is_an_address() -> None:
    """The registry takes addresses; they begin with that of the repository, which the publisher fills in."""
    for name, ratio in (("icon", 1.0), ("banner", 21 / 9)):
        drawing = (PACK / "docs" / "images" / f"{name}.svg").read_text(encoding="utf-8")
        box = re.search(r'viewBox="0 0 (\d+) (\d+)"', drawing)
        assert box is not None and abs(int(box[1]) / int(box[2]) - ratio) < 0.01
        assert "<image" not in drawing and "href=" not in drawing, "a drawing that fetches nothing"
        given = PROJECT["tool"]["comfy"][name.capitalize()]
        repository = PROJECT["project"].get("urls", {}).get("Repository", "")
        assert given == "" if not repository else given.startswith("https://") and given.endswith(f"images/{name}.svg")


def test_installing_upgrades_nothing_of_the_hosts() -> None:
    """Neither list names torch, numpy, transformers or anything else that ComfyUI brings, and both are the same."""
    lines = [line for line in (PACK / "requirements.txt").read_text().splitlines() if line and line[0] != "#"]
    assert lines == PROJECT["project"]["dependencies"] == ["ftfy>=6.1"]


def test_the_archive_leaves_out_what_users_do_not_run() -> None:
    ignored = (PACK / ".comfyignore").read_text().split()
    assert {"tests/", "benchmarks/"} <= set(ignored)
    for needed in ("nodes/", "wan_fp8/", "workflows/", "web/", "LICENSE", "requirements.txt", "__init__.py"):
        assert needed not in ignored and (PACK / needed).exists()
