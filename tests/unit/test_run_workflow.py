"""The headless runner without a server: conversion of the editor's files, names and checks of settings."""

from __future__ import annotations

import copy
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
from graphs import INFO, Graph
from headless.convert import Prompt, expand_dynamic, to_prompt
from headless.errors import Cancelled, ExecutionFailed, ServerUnreachable, WorkflowError
from headless.settings import apply, settings, shortest_name, unique_names

PACK = Path(__file__).resolve().parents[2]


def basic() -> Graph:
    graph = Graph().add(1, "Loader", values=["b.safetensors", False])
    graph.add(2, "Sample", {"model": ("MODEL", 1, 0)}, [7, "randomize", 30, 2.5, "euler", 5.0], title="High noise")
    return graph.add(3, "Save", {"samples": ("LATENT", 2, 0)}, ["video"])


def no_upload(path: Path) -> str:
    raise AssertionError(f"{path} must not be uploaded")


def convert(graph: Graph, **more: object) -> dict[str, dict]:
    return to_prompt(graph.json(**more), INFO).nodes


# -------------------------------------------------------------------------------------------------------- conversion


def test_values_go_to_inputs_by_position_past_the_editors_own_values() -> None:
    assert convert(basic()) == {
        "1": {
            "class_type": "Loader",
            "inputs": {"name": "b.safetensors", "strict": False},
            "_meta": {"title": "Loader"},
        },
        "2": {
            "class_type": "Sample",
            "inputs": {"model": ["1", 0], "seed": 7, "steps": 30, "cfg": 2.5, "solver": "euler", "shift": 5.0},
            "_meta": {"title": "High noise"},
        },
        "3": {"class_type": "Save", "inputs": {"samples": ["2", 0], "prefix": "video"}, "_meta": {"title": "Save"}},
    }


def test_values_missing_from_an_older_file_take_their_defaults() -> None:
    inputs = convert(Graph().add(1, "Sample", values=[7, "fixed", 30]))["1"]["inputs"]
    assert inputs == {"seed": 7, "steps": 30, "cfg": 3.5, "solver": "unipc", "shift": 8.0}
    assert convert(Graph().add(1, "Loader"))["1"]["inputs"] == {"name": "a.safetensors", "strict": True}


def test_values_by_name() -> None:
    graph = Graph().add(1, "Sample", values={"steps": 3, "seed": 4, "not an input": 5})
    assert convert(graph)["1"]["inputs"] == {"seed": 4, "steps": 3}


def test_upload_button_and_choice_control_take_places_of_their_own() -> None:
    graph = Graph().add(1, "Picture", values=["cat.png", "image", True]).add(2, "Pick", values=["y", "fixed", "", 9])
    nodes = convert(graph)
    assert nodes["1"]["inputs"] == {"image": "cat.png", "alpha": True}
    assert nodes["2"]["inputs"] == {"choice": "y", "last": 9}


def test_an_input_that_must_be_connected_has_no_value() -> None:
    assert convert(Graph().add(1, "Forced", values=["name"]))["1"]["inputs"] == {"label": "name"}


def test_a_link_wins_over_the_value_kept_beside_it() -> None:
    graph = (
        Graph().add(1, "Loader").add(2, "Sample", {"steps": ("INT", 1, 0, True)}, [0, "fixed", 30, 1.0, "euler", 1.0])
    )
    assert convert(graph)["2"]["inputs"]["steps"] == ["1", 0]


def test_notes_reroutes_and_loose_decoration_leave_no_trace() -> None:
    graph = Graph().add(1, "Loader").add(2, "Reroute", {"": ("*", 1, 0)}).add(3, "Reroute", {"": ("*", 2, 0)})
    graph.add(4, "Lora", {"model": ("MODEL", 3, 0)}).add(5, "Note", values=["hello"]).add(6, "SomePacksLabel")
    nodes = convert(graph)
    assert set(nodes) == {"1", "4"}
    assert nodes["4"]["inputs"]["model"] == ["1", 0]


@pytest.mark.parametrize(
    ("mode", "model"), [(0, ["2", 0]), (4, ["1", 0]), (2, None)], ids=["active", "bypassed", "muted"]
)
def test_bypassed_nodes_let_their_input_through_and_muted_ones_cut_it(mode: int, model: list | None) -> None:
    graph = Graph().add(1, "Loader").add(2, "Lora", {"model": ("MODEL", 1, 0)}, [1.0], mode=mode)
    nodes = convert(graph.add(3, "Sample", {"model": ("MODEL", 2, 0)}))
    assert nodes["3"]["inputs"].get("model") == model
    assert ("2" in nodes) == (mode == 0)


def test_bypass_passes_the_first_input_of_the_wanted_type() -> None:
    graph = Graph().add(1, "Loader").add(2, "Loader")
    graph.add(3, "Lora", {"clip": ("CLIP", 1, 1), "model": ("MODEL", 2, 0)}, mode=4)
    assert convert(graph.add(4, "Sample", {"model": ("MODEL", 3, 0)}))["4"]["inputs"]["model"] == ["2", 0]


def primitive() -> Graph:
    graph = Graph().add(1, "PrimitiveNode", values=[12, "fixed"], title="Both steps")
    for node_id, steps in ((2, 1), (3, 2)):
        graph.add(node_id, "Sample", {"steps": ("INT", 1, 0, True)}, [0, "fixed", steps, 1.0, "euler", 1.0])
    return graph


def test_a_primitive_sets_every_input_it_is_connected_to() -> None:
    prompt = to_prompt(primitive().json(), INFO)
    assert [prompt.nodes[n]["inputs"]["steps"] for n in ("2", "3")] == [12, 12]
    assert prompt.shared == (("Both steps", (("2", "steps"), ("3", "steps"))),)
    assert "1" not in prompt.nodes


def with_subgraph(promoted: list | None, values: list, model: tuple) -> dict:
    """A subgraph node 9 around a Lora and a sampler, as old (promoted by inputs) and new editors save it."""
    inner = Graph().add(4, "Lora", {"model": ("MODEL", -10, 0)}, [0.5])
    widgets = {"model": ("MODEL", 4, 0), "steps": ("INT", -10, 1, True)}
    inner.add(5, "Sample", widgets, [1, "fixed", 11, 1.0, "euler", 1.0])
    definition = inner.subgraph("inner", [("model", "MODEL"), ("steps", "INT")], [("LATENT", "LATENT")], [(5, 0)])
    properties = {} if promoted is None else {"proxyWidgets": promoted}
    graph = Graph().add(1, "Loader").add(9, "uuid-inner", {"model": model}, values, properties=properties)
    graph.add(3, "Save", {"samples": ("LATENT", 9, 0)}, ["x"])
    return graph.json(definitions={"subgraphs": [definition]})


@pytest.mark.parametrize(
    ("promoted", "values", "steps", "strength"),
    [
        ([["-1", "steps"]], [25], 25, 0.5),
        (None, [26], 26, 0.5),
        ([["4", "strength"], ["-1", "steps"]], [0.75, 27], 27, 0.75),
        ([], [], 11, 0.5),
    ],
    ids=["promoted", "promoted by order", "inner widget", "inner value"],
)
def test_a_subgraph_is_replaced_by_its_nodes(promoted: list | None, values: list, steps: int, strength: float) -> None:
    workflow = with_subgraph(promoted, values, ("MODEL", 1, 0))
    before = copy.deepcopy(workflow)
    nodes = to_prompt(workflow, INFO).nodes
    assert set(nodes) == {"1", "9:4", "9:5", "3"}
    assert nodes["9:4"]["inputs"] == {"model": ["1", 0], "strength": strength}
    assert nodes["9:5"]["inputs"]["model"] == ["9:4", 0]
    assert nodes["9:5"]["inputs"]["steps"] == steps
    assert nodes["3"]["inputs"]["samples"] == ["9:5", 0]
    assert workflow == before, "the workflow itself must not change"


def test_a_bypassed_subgraph_lets_its_input_through() -> None:
    workflow = with_subgraph(None, [], ("MODEL", 1, 0))
    instance = next(node for node in workflow["nodes"] if node["id"] == 9)
    instance["mode"] = 4
    nodes = to_prompt(workflow, INFO).nodes
    assert set(nodes) == {"1", "3"}
    assert "samples" not in nodes["3"]["inputs"], "no input of that type: the link ends there, as in the editor"


def test_a_subgraph_inside_itself_is_refused() -> None:
    inner = Graph().add(4, "uuid-inner", {"model": ("MODEL", -10, 0)})
    definition = inner.subgraph("inner", [("model", "MODEL")], [("MODEL", "MODEL")], [(4, 0)])
    graph = Graph().add(1, "Loader").add(9, "uuid-inner", {"model": ("MODEL", 1, 0)})
    with pytest.raises(WorkflowError, match="contains itself"):
        convert(graph.add(2, "Sample", {"model": ("MODEL", 9, 0)}), definitions={"subgraphs": [definition]})


def test_api_format_is_taken_as_it_is() -> None:
    api = {"5": {"class_type": "Save", "inputs": {"samples": ["2", 0]}}}
    assert to_prompt(api, INFO).nodes == api


@pytest.mark.parametrize("content", [[], {}, {"a": 1}, {"nodes": 3}, "text", None])
def test_something_else_is_refused(content: object) -> None:
    with pytest.raises(WorkflowError, match="not a ComfyUI workflow"):
        to_prompt(content, INFO)


def test_nodes_the_server_lacks_are_named() -> None:
    with pytest.raises(WorkflowError, match="does not know Elsewhere:"):
        convert(Graph().add(1, "Loader").add(2, "Elsewhere", {"model": ("MODEL", 1, 0)}))
    with pytest.raises(WorkflowError, match="does not know Elsewhere:"):
        to_prompt({"1": {"class_type": "Elsewhere", "inputs": {}}}, INFO)


def test_an_input_only_the_editor_understands_is_refused_by_name() -> None:
    info = {"Dynamic": {"input": {"required": {"kind": ["COMFY_DYNAMICCOMBO_V3", {"options": []}]}}}}
    with pytest.raises(WorkflowError, match=r"'kind' of Dynamic .*'Export .API.'"):
        to_prompt(Graph().add(1, "Dynamic", values=["a"]).json(), info)


@pytest.mark.parametrize(
    ("text", "results"),
    [
        ("a {red|blue} cat", {"a red cat", "a blue cat"}),
        ("{a|{b|c}}", {"a", "b", "c"}),
        (r"\{a|b\}", {"{a|b}"}),
        ("one // two\nthree /* four\nfive */ six", {"one \nthree  six"}),
        ("{", {"{"}),
    ],
)
def test_dynamic_prompts(text: str, results: set[str]) -> None:
    assert {expand_dynamic(text, random.Random(seed)) for seed in range(50)} == results


# ---------------------------------------------------------------------------------------------------------- settings


def names_of(prompt: Prompt) -> set[str]:
    available = settings(prompt, INFO)
    names = unique_names(available)
    return {shortest_name(setting, names) for setting in available}


def test_names_are_as_short_as_they_can_be() -> None:
    assert names_of(to_prompt(basic().json(), INFO)) == {
        *("name", "strict", "seed", "steps", "cfg", "solver", "shift", "prefix")
    }
    prompts = Graph().add(1, "Encode", values=["a"], title="Positive").add(2, "Encode", values=["b"], title="Negative")
    assert names_of(to_prompt(prompts.json(), INFO)) == {"Positive", "Negative"}
    untitled = Graph().add(1, "Encode", values=["a"]).add(2, "Encode", values=["b"])
    assert names_of(to_prompt(untitled.json(), INFO)) == {"#1.text", "#2.text"}
    assert "steps" in names_of(to_prompt(primitive().json(), INFO))


def changed(graph: Graph, *assignments: str) -> dict[str, dict]:
    prompt = to_prompt(graph.json(), INFO)
    apply(prompt, INFO, assignments, no_upload)
    return prompt.nodes


def test_setting_values_of_every_kind() -> None:
    nodes = changed(basic(), "name=a.safetensors", "strict=Yes", "steps=5", "cfg=1", "solver=unipc", "prefix=a=b c")
    assert nodes["1"]["inputs"] == {"name": "a.safetensors", "strict": True}
    assert nodes["2"]["inputs"] | {"model": 0} == {
        "model": 0, "seed": 7, "steps": 5, "cfg": 1.0, "solver": "unipc", "shift": 5.0
    }  # fmt: skip
    assert nodes["3"]["inputs"]["prefix"] == "a=b c"


@pytest.mark.parametrize("name", ["steps", "High noise.steps", "Sample.steps", "#2.steps"])
def test_every_way_to_name_a_setting(name: str) -> None:
    assert changed(basic(), f"{name}=9")["2"]["inputs"]["steps"] == 9


def test_a_shared_value_is_set_everywhere() -> None:
    for name in ("steps", "Both steps"):
        nodes = changed(primitive(), f"{name}=8")
        assert [nodes[n]["inputs"]["steps"] for n in ("2", "3")] == [8, 8]


def test_a_random_seed() -> None:
    seeds = {changed(basic(), "seed=random")["2"]["inputs"]["seed"] for _ in range(3)}
    assert len(seeds) == 3 and all(0 <= seed < 2**53 for seed in seeds)


@pytest.mark.parametrize(
    ("assignment", "sentence"),
    [
        ("steps", "NAME=VALUE; got 'steps'"),
        ("stepps=3", "no setting 'stepps'; did you mean 'steps'"),
        ("zzz=3", "no setting 'zzz'; it has name, strict"),
        ("steps=0", "steps takes 1 to 100; got '0'"),
        ("steps=3.5", "steps takes 1 to 100; got '3.5'"),
        ("steps=", "steps takes 1 to 100; got ''"),
        ("cfg=nan", "cfg takes 0 to 10; got 'nan'"),
        ("seed=-1", "or random; got '-1'"),
        ("solver=eular", "solver takes unipc | euler; got 'eular'. Did you mean 'euler'?"),
        ("strict=maybe", "strict takes true | false; got 'maybe'"),
        ("model=x", "no setting 'model'"),
    ],
)
def test_bad_settings_are_one_sentence(assignment: str, sentence: str) -> None:
    with pytest.raises(WorkflowError) as error:
        changed(basic(), assignment)
    assert sentence in str(error.value) and "\n" not in str(error.value)


def test_an_ambiguous_name_lists_the_ones_it_could_be() -> None:
    graph = Graph().add(1, "Encode", values=["a"], title="Positive").add(2, "Encode", values=["b"], title="Negative")
    with pytest.raises(WorkflowError, match="'text' could be any of 2 inputs: say which, as 'Positive', 'Negative'"):
        changed(graph, "text=c")


def test_local_files_are_uploaded_after_everything_is_checked(tmp_path: Path) -> None:
    picture = tmp_path / "cat.png"
    picture.write_bytes(b"png")
    prompt = to_prompt(Graph().add(1, "Picture", values=["old.png"]).json(), INFO)
    uploaded: list[Path] = []

    def upload(path: Path) -> str:
        uploaded.append(path)
        return "cat (1).png"

    with pytest.raises(WorkflowError):
        apply(prompt, INFO, [f"image={picture}", "alpha=maybe"], upload)
    assert uploaded == [] and prompt.nodes["1"]["inputs"]["image"] == "old.png"
    apply(prompt, INFO, [f"image={picture}"], upload)
    assert uploaded == [picture] and prompt.nodes["1"]["inputs"]["image"] == "cat (1).png"
    apply(prompt, INFO, ["image=old.png"], upload)
    assert len(uploaded) == 1 and prompt.nodes["1"]["inputs"]["image"] == "old.png"
    with pytest.raises(WorkflowError, match=r"image takes a local file, or one .* there is no file 'gone.png'"):
        apply(prompt, INFO, ["image=gone.png"], upload)


# ------------------------------------------------------------------------------------------------------ command line


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    script = PACK / "scripts" / "run_workflow.py"
    return subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True, timeout=60, check=False)


def test_exit_codes_are_those_documented(tmp_path: Path) -> None:
    codes = [kind.exit_code for kind in (ExecutionFailed, WorkflowError, ServerUnreachable, Cancelled)]
    assert codes == [1, 2, 3, 130]
    broken, fine = tmp_path / "broken.json", tmp_path / "fine.json"
    broken.write_text("{")
    fine.write_text(json.dumps(basic().json()))
    assert command("--help").returncode == 0
    assert command().returncode == 2
    assert command("--no-such-option").returncode == 2
    assert command(str(broken)).returncode == 2
    assert command(str(tmp_path / "gone.json")).returncode == 2
    assert command(str(fine), "--server", "x", "--comfyui", "y").returncode == 2
    assert command(str(fine), "--comfyui", str(tmp_path)).returncode == 3
    unreachable = command(str(fine), "--server", "127.0.0.1:1")  # port 1 is never ours
    assert unreachable.returncode == 3 and "No ComfyUI answers at http://127.0.0.1:1" in unreachable.stderr
    assert "Traceback" not in unreachable.stderr
