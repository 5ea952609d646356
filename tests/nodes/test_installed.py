"""The pack as a user gets it, in a host that has never seen it: the registry's zip, and a clone of the repository."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import environments
import pytest
from comfy_fixtures import PACK, TASKS
from headless.client import Client
from headless.convert import to_prompt
from headless.settings import apply

NAME = "wan-fp8-as-installed"
LOADING = """
import sys
sys.path.insert(0, {core!r})
import comfy.cli_args
comfy.cli_args.args.cpu = True
import asyncio, json, nodes
before = set(nodes.NODE_CLASS_MAPPINGS)
assert asyncio.run(nodes.load_custom_node({pack!r}))
print(json.dumps(sorted(set(nodes.NODE_CLASS_MAPPINGS) - before)))
"""


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ``git clone`` gives: the last commit, nothing that git ignores."""
    target = tmp_path_factory.mktemp("clone") / "wan-fp8"
    if not (PACK / ".git").exists():
        pytest.skip("this copy of the pack is no git repository, and 'comfy node pack' lists what git tracks")
    subprocess.run(["git", "clone", "--quiet", "--no-hardlinks", PACK, target], check=True, timeout=60)
    return target


@pytest.fixture(scope="module")
def archive(clone: Path) -> Path:
    """What ``comfy node pack`` makes of it."""
    done = environments.comfy_cli("node", "pack", pack=clone)
    made = clone / "node.zip"
    assert done.returncode == 0 and made.is_file(), done.stdout + done.stderr
    return made


def tree(folder: Path) -> set[str]:
    """Everything below a folder, folders themselves and byte code left out."""
    found = (path for path in folder.rglob("*") if not path.is_dir() and "__pycache__" not in path.parts)
    return {str(path.relative_to(folder)) for path in found}


def test_the_archive_holds_what_runs_and_nothing_else(archive: Path) -> None:
    with zipfile.ZipFile(archive) as zipped:
        names, size = set(zipped.namelist()), sum(entry.file_size for entry in zipped.infolist())
    assert {"__init__.py", "nodes/__init__.py", "wan_fp8/__init__.py", "install.py", "requirements.txt"} <= names
    assert {"LICENSE", "README.md", "workflows/t2v_a14b.json", "web/docs/WanFP8Recipe.md"} <= names
    assert not [name for name in names if name.split("/")[0] in ("tests", "benchmarks", "tools", ".ci")]
    assert size < 8e6, f"{size / 1e6:.1f} MB"


def test_a_clone_loads_every_node(clone: Path, comfy_core: Path, object_info: dict[str, Any]) -> None:
    code = LOADING.format(core=str(comfy_core), pack=str(clone))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    loaded = json.loads(done.stdout.splitlines()[-1])
    assert loaded == sorted(name for name in object_info if name.startswith("WanFP8"))


def test_the_zip_in_a_clean_host_makes_a_video_and_leaves_nothing_behind(
    archive: Path, make_server: Callable[..., Any], object_info: dict[str, Any], tmp_path: Path
) -> None:
    from comfy_fixtures import SLOW_NODES

    context = make_server("installed", "--whitelist-custom-nodes", NAME, SLOW_NODES.name)
    base = Path(context.kwds["base"])
    folder = base / "custom_nodes" / NAME
    with zipfile.ZipFile(archive) as zipped:
        zipped.extractall(folder)
    unpacked, models = tree(folder), tree(base / "models")
    with context as server:
        client = Client(server.url)
        info = client.object_info()
        ours = {name for name in object_info if name.startswith("WanFP8")}
        assert {name for name in info if name.startswith("WanFP8")} == ours
        assert {info[name]["python_module"] for name in ours} == {f"custom_nodes.{NAME}"}
        prompt = to_prompt(json.loads((folder / "workflows" / "t2v_a14b.json").read_text()), info)
        changes = ["width=64", "height=64", "frames=5", "steps=2", f"checkpoint={TASKS['t2v']}"]
        apply(prompt, info, changes, lambda path: pytest.fail(f"nothing to upload, and {path} was"))
        (made,) = client.run(prompt.nodes)
        assert client.download(made, tmp_path).stat().st_size > 0
        assert "WanFP8" not in "\n".join(
            line for line in server.log.read_text().splitlines() if "IMPORT FAILED" in line
        )
    assert tree(folder) == unpacked, "it writes into its own folder, where an update would remove it"
    assert tree(base / "models") == models, "a run left files among the user's models"
