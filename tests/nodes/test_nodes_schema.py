"""What users read before they run anything: every node, input and output explains itself, and ids never change."""

from __future__ import annotations

import ast
import re
import subprocess
import sys

import nodes_kit
import pytest
from nodes_kit import PACK

pytestmark = pytest.mark.usefixtures("comfy_core")

CONTRACT = {
    "WanFP8LoadCheckpoint": (
        "checkpoint low_noise text_encoder vae weight_dtype text_encoder_dtype vae_dtype",
        "model model_low text_encoder vae clip_vision audio_encoder",
    ),
    "WanFP8LoadLora": ("model lora strength model_low lora_low strength_low mode", "model model_low"),
    "WanFP8TextEncode": ("text_encoder prompt negative", "positive negative"),
    "WanFP8SampleT2V": (
        "model positive negative width height length seed steps shift guidance guidance_low boundary solver scheduler "
        "noise model_low",
        "latent",
    ),
    "WanFP8SampleI2V": (
        "model positive negative vae start_image size width height length seed steps shift guidance guidance_low "
        "boundary solver scheduler noise model_low end_image",
        "latent",
    ),
    "WanFP8SampleTI2V": (
        "model positive negative size width height length seed steps shift guidance solver scheduler noise vae "
        "start_image",
        "latent",
    ),
    "WanFP8SampleAnimate": (
        "model positive negative vae clip_vision reference_image pose_video mode size width height length segment "
        "overlap seed steps shift guidance solver scheduler noise face_video background_video character_mask fps",
        "images latent",
    ),
    "WanFP8SampleS2V": (
        "model positive negative vae reference_image size width height clips clip_frames seed steps shift guidance "
        "solver scheduler noise audio audio_encoder audio_features pose_video pose_fps start_from_reference",
        "images latent",
    ),
    "WanFP8Sigmas": (
        "steps shift solver boundary model model_low",
        "sigmas sigmas_high sigmas_low model model_low",
    ),
    "WanFP8Solver": ("solver", "sampler"),
    "WanFP8Attention": (
        "model backend exact skip_first_steps skip_last_steps skip_first_blocks skip_last_blocks bound model_low "
        "sparsity sparsity_bound",
        "model model_low",
    ),
    "WanFP8Recipe": (
        "model recipe backend amax_history_len amax_compute_algo margin keep model_low scales",
        "model model_low",
    ),
    "WanFP8SaveCheckpoint": ("model filename overwrite model_low", "path path_low"),
    "WanFP8SaveScales": ("latent model filename overwrite model_low", "latent"),
    "WanFP8MagCache": (
        "model preset threshold max_skips retention curve phase policy reuse model_low",
        "model model_low",
    ),
    "WanFP8MagCacheCalibrate": ("model model_low", "model model_low"),
    "WanFP8MagCacheSave": ("model latent name model_low", "latent image file"),
    "WanFP8QualityReceipt": (
        "model positive negative latent seed steps shift guidance guidance_low boundary solver scheduler noise "
        "reference_precision vae model_low reference reference_low",
        "latent latent_reference plot strip receipt",
    ),
    "WanFP8Doctor": ("self_test", "table json"),
    "WanFP8Preset": ("model preset model_low", "model model_low"),
    "WanFP8MultiGPU": (
        "model gpus topology weights address model_low text_encoder vae",
        "model model_low text_encoder vae",
    ),
    "WanFP8StopPool": ("latent", "latent"),
    "WanFP8Compile": ("model mode dynamic tf32 residual_stream model_low", "model model_low"),
}
"""Saved in users' workflows, inputs by position: only ever append."""

NODES = sorted(CONTRACT)


HEAVY = "transformers transformer_engine diffusers triton flash_attn sentencepiece tokenizers ftfy"
IMPORTS = """
import sys
sys.path.insert(0, {core!r})
import comfy.cli_args
comfy.cli_args.args.cpu = True
import asyncio, time, torch, nodes
before = set(sys.modules)
began = time.process_time()  # what the import takes, not what a busy machine makes of it
assert asyncio.run(nodes.load_custom_node({pack!r}))
seconds = time.process_time() - began
new = {{name.split(".")[0] for name in set(sys.modules) - before}}
print(torch.cuda.is_initialized(), round(seconds, 3), *sorted(new))
"""


@pytest.fixture(scope="module")
def schemas(comfy_core):
    return {name: cls.GET_SCHEMA() for name, cls in nodes_kit.load_pack().items()}


@pytest.mark.parametrize("name", NODES)
def test_ids_inputs_and_outputs_stay(schemas, name):
    inputs, outputs = (words.split() for words in CONTRACT[name])
    assert [i.id for i in schemas[name].inputs][: len(inputs)] == inputs
    assert [o.display_name for o in schemas[name].outputs][: len(outputs)] == outputs


def test_every_node_is_under_contract(schemas):
    assert sorted(schemas) == NODES


def test_the_managers_scanner_finds_every_node():
    """ComfyUI Manager maps nodes to packs by reading source: a class that names ComfyNode as its base is a node, and
    its name the id where no ``io.Schema`` in the class says it. "Install missing nodes" hangs on it."""
    found = set()
    for path in (PACK / "nodes").rglob("*.py"):
        for item in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(item, ast.ClassDef) and any(ast.unparse(base) == "io.ComfyNode" for base in item.bases):
                found.add(item.name)
    assert sorted(found) == NODES


@pytest.mark.parametrize("name", NODES)
def test_everything_is_explained(schemas, name):
    schema = schemas[name]
    assert schema.category.startswith("Wan FP8/") and schema.display_name and len(schema.description) > 60
    for output in schema.outputs:
        assert output.tooltip and output.tooltip.endswith("."), output.display_name
    for box in schema.inputs:
        assert box.tooltip and box.tooltip.endswith("."), box.id
        if getattr(box, "default", None) is not None and box.id not in ("prompt", "width", "height"):
            assert "Default" in box.tooltip, f"{name}.{box.id} does not say where its default comes from"


@pytest.mark.parametrize("name", NODES)
def test_every_node_has_its_help_page(schemas, name):
    page = (PACK / "web" / "docs" / f"{name}.md").read_text(encoding="utf-8")
    assert page.startswith(f"# {schemas[name].display_name}\n")
    inputs, outputs = page.partition("## Inputs")[2].split("## Outputs")
    rows = {match[1]: match[0] for match in re.finditer(r"^\| `(\w+)` \|.*$", inputs, re.MULTILINE)}
    for box in schemas[name].inputs:
        assert box.id in rows, f"{name}.md does not describe {box.id}"
        default = getattr(box, "default", None)
        if default is not None and box.id not in ("prompt", "negative"):
            shown = f"{default:g}" if isinstance(default, float) else str(default)
            assert f"| {shown} |" in rows[box.id], f"{name}.md: {box.id} has the default {shown}"
    for output in schemas[name].outputs:
        assert f"| `{output.display_name}` | {output.tooltip} |" in outputs


def test_defaults_are_the_published_ones(schemas):
    sampling = nodes_kit.module("wan_fp8.sampling")
    nodes = {name: f"WanFP8Sample{name.title() if name == 'animate' else name.upper()}" for name in sampling.DEFAULTS}
    assert set(nodes.values()) == {name for name in schemas if name.startswith("WanFP8Sample")}
    frames = {"animate": "segment", "s2v": "clip_frames"}
    for name in sampling.DEFAULTS:
        defaults = sampling.DEFAULTS[name]
        node = schemas[nodes[name]]
        boxes = {i.id: getattr(i, "default", None) for i in node.inputs}
        low, high = defaults.guidance
        assert (boxes["width"], boxes["height"]) == defaults.sizes[0]
        assert boxes[frames.get(name, "length")] == defaults.frames and boxes["steps"] == defaults.steps
        assert boxes["shift"] == defaults.shift and boxes["solver"] == defaults.solver
        assert boxes["guidance"] == high and boxes.get("guidance_low", low) == low
        assert boxes.get("boundary") == defaults.boundary


def test_every_node_has_other_words_to_be_found_by():
    """By the source: the pinned host takes no ``search_aliases``, newer ones do."""
    calls = [
        ast.unparse(call)
        for path in (PACK / "nodes").rglob("*.py")
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "node_schema"
    ]
    with_aliases = [re.search(r"node_id='(\w+)'", call)[1] for call in calls if "search_aliases=[" in call]
    assert sorted(with_aliases) == NODES


def test_keywords_that_the_host_lacks_are_left_out(monkeypatch):
    schema = nodes_kit.module("nodes.schema")
    taken = {}

    class Newer:
        def __init__(self, node_id, search_aliases=None):
            taken.update(node_id=node_id, search_aliases=search_aliases)

    class Older:
        def __init__(self, node_id):
            taken.update(node_id=node_id)

    fake = type("io", (), {"Schema": Newer})
    monkeypatch.setattr(schema, "io", fake)
    schema.node_schema(node_id="a", search_aliases=["x"])
    assert taken == {"node_id": "a", "search_aliases": ["x"]}
    fake.Schema = Older
    taken.clear()
    schema.node_schema(node_id="b", search_aliases=["x"])
    assert taken == {"node_id": "b"}
    with pytest.raises(TypeError):
        schema.node_schema(node_id="b", tooltp="a typing mistake")


def test_loading_the_pack_imports_nothing_heavy(comfy_core):
    """In a process of its own: what core imports by itself does not count."""
    code = IMPORTS.format(core=str(comfy_core), pack=str(PACK))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    initialised, seconds, *new = done.stdout.splitlines()[-1].split()
    assert initialised == "False" and not set(new) & set(HEAVY.split()), new
    assert float(seconds) < 1.5, "the target that benchmarks/import_time.py measures is 0.3 s"
