"""Every name that our nodes take from ComfyUI, and every call with its arguments, held against the pinned host's tree
by a checker that is not ours. What a later host changed is tested with fakes, in ``test_bridge_newer_core.py``."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import environments
import pytest
from comfy_fixtures import PACK

NAME = "wan-fp8"
PARTS = ("comfy", "comfy_api", "comfy_execution", "comfy_extras", "utils", "app", "comfyui_version.py", "execution.py")
PARTS += ("folder_paths.py", "latent_preview.py", "node_helpers.py", "nodes.py", "server.py")


@pytest.fixture(scope="module")
def tree(comfy_core: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The host's sources as one commit, as the checker wants them; the folder that holds ``ComfyUI``."""
    cache = tmp_path_factory.mktemp("host")
    for part in PARTS:
        source, target = comfy_core / part, cache / "ComfyUI" / part
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", "*.json", "*.txt", "*.model"))
        else:
            shutil.copy(source, target)
    author = ("-c", "user.name=tests", "-c", "user.email=tests@localhost", "-c", "gc.auto=0")
    for command in (("init", "--quiet"), ("add", "--all"), (*author, "commit", "--quiet", "-m", "pinned")):
        subprocess.run(["git", *command], cwd=cache / "ComfyUI", check=True, capture_output=True)
    return cache


def verdict(tree: Path, custom_nodes: Path) -> dict[str, Any]:
    python = environments.guard_python()
    command = [python.parent / "comfy-import-guard", "--offline", "--cache-dir", tree, "--json", "--quiet"]
    command += ["check", "--comfy-dir", custom_nodes.parent, "--target", "HEAD", "--no-update", "--pack", NAME]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=120, check=False)
    (pack,) = json.loads(done.stdout)["packs"]
    return dict(pack)


def copied(folder: Path) -> Path:
    """The node code in a ``custom_nodes`` of its own."""
    custom_nodes = folder / "custom_nodes"
    shutil.copytree(PACK / "nodes", custom_nodes / NAME / "nodes", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(PACK / "__init__.py", custom_nodes / NAME)
    return custom_nodes


def test_the_pinned_host_has_every_name_and_takes_every_call(tree: Path, tmp_path: Path) -> None:
    found = verdict(tree, copied(tmp_path))
    assert found["python_files"] >= 40 and found["references"] >= 60, "it looked at something else"
    findings = {key: found[key] for key in ("breaking", "soft", "unresolvable", "signature_drift", "unparseable")}
    assert not any(findings.values()) and found["verdict"] == "SAFE", json.dumps(findings, indent=1)


def test_a_name_that_is_gone_and_a_call_that_does_not_fit_are_found(tree: Path, tmp_path: Path) -> None:
    custom_nodes = copied(tmp_path)
    broken = "import comfy.model_management\nfrom comfy.samplers import no_such_sampler\n"
    broken += "comfy.model_management.get_torch_device(1, 2, 3)\n"
    (custom_nodes / NAME / "nodes" / "bridge" / "broken.py").write_text(broken)
    found = verdict(tree, custom_nodes)
    said = json.dumps([found["breaking"], found["signature_drift"]])
    assert found["verdict"] != "SAFE" and "no_such_sampler" in said and "get_torch_device" in said, said
