"""What people and other programs may put into boxes and workflow files: names stay inside the model folders, and
whatever is refused is refused in our words. As many cases as ``tests/unit/test_fuzz.py`` says."""

from __future__ import annotations

import contextlib
import copy
import json
import os
from pathlib import Path
from typing import Any

import nodes_kit
import pytest
from comfy_fixtures import PACK
from fuzz_kit import cases
from headless.convert import to_prompt
from headless.errors import WorkflowError
from hypothesis import given
from hypothesis import strategies as st

pytestmark = pytest.mark.usefixtures("comfy_core")

NAMES = st.lists(
    st.sampled_from(
        ["..", ".", "/", "\\", "a", "wan", " ", "\0", "C:", "~", "a" * 300, ".safetensors", "é", "\n", "%2e"]
    ),
    max_size=6,
).map("".join) | st.text(max_size=40)


@pytest.fixture(scope="module")
def roots(comfy_core: Path, tmp_path_factory: pytest.TempPathFactory):
    """ComfyUI's model folders in a place of their own; a secret lies beside them."""
    import folder_paths

    nodes_kit.load_pack()
    base = tmp_path_factory.mktemp("fuzz")
    (base / "secret.safetensors").write_bytes(b"")
    before = dict(folder_paths.folder_names_and_paths)
    for kind in ("wan", "diffusion_models", "wan_fp8_scales", "wan_magcache", "loras"):
        (base / kind).mkdir()
        folder_paths.folder_names_and_paths[kind] = ([str(base / kind)], {".safetensors", ".json"})
    yield base
    folder_paths.folder_names_and_paths.update(before)


def refused() -> tuple[type[BaseException], ...]:
    return (nodes_kit.module("wan_fp8.errors").WanFP8Error,)


@cases(200)
@given(
    name=NAMES,
    ending=st.sampled_from(["", "_high_noise"]),
    kind=st.sampled_from(["diffusion_models", "wan_fp8_scales"]),
)
def test_files_are_written_into_their_folder_only(roots: Path, name: str, ending: str, kind: str) -> None:
    target_path = nodes_kit.module("nodes.targets").target_path
    with contextlib.suppress(refused()):
        path = target_path(kind, name, ending)
        assert Path(os.path.abspath(path)).is_relative_to(roots / kind) and path.suffix == ".safetensors"


@cases(200)
@given(name=NAMES)
def test_curves_are_written_into_their_folder_only(roots: Path, name: str) -> None:
    curves = nodes_kit.module("nodes.curves")
    with contextlib.suppress(refused()):
        path = curves.new_path(name)
        assert Path(os.path.abspath(path)).parent == roots / "wan_magcache" and path.suffix == ".json"


@cases(200)
@given(name=NAMES)
def test_files_are_read_from_their_folder_only(roots: Path, name: str) -> None:
    readers = (
        (nodes_kit.module("nodes.sources").checkpoint_path, ("wan", "diffusion_models")),
        (nodes_kit.module("nodes.curves").curve_path, ("wan_magcache",)),
        (nodes_kit.module("nodes.lora")._path, ("loras",)),
    )
    for read, kinds in readers:
        with contextlib.suppress(refused()):
            path = Path(os.path.abspath(read(name)))
            assert any(path.is_relative_to(roots / kind) for kind in kinds), f"{name!r} led to {path}"


WORKFLOW = json.loads((PACK / "workflows" / "i2v_a14b_4steps.json").read_text(encoding="utf-8"))
VALUES = st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.text(max_size=8) | st.just([]) | st.just({})


@cases(120)
@given(data=st.data())
def test_broken_workflow_files_are_refused(object_info: dict[str, Any], data: Any) -> None:
    """A few places of a good file hold something else; it converts, or the runner says what is wrong."""
    workflow = copy.deepcopy(WORKFLOW)
    for _ in range(data.draw(st.integers(1, 3))):
        place: Any = workflow
        for _ in range(data.draw(st.integers(0, 4))):
            inner = list(place.values()) if isinstance(place, dict) else list(place)
            deeper = [value for value in inner if isinstance(value, dict | list) and value]
            if not deeper:
                break
            place = data.draw(st.sampled_from(deeper))
        key = data.draw(st.sampled_from(list(place) if isinstance(place, dict) else range(len(place))))
        place[key] = data.draw(VALUES)
    with contextlib.suppress(WorkflowError):
        to_prompt(workflow, object_info)
