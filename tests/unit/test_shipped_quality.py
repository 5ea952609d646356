"""A slice of the committed table of quality, run again on the shipped checkpoint; and mistakes that it must find."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_quality_table import bench  # noqa: F401 - a fixture

PACK = Path(__file__).resolve().parents[2]
CHECKPOINT = PACK / "checkpoints" / "Wan2.2-T2V-A14B-tiny"
TABLE = PACK / "benchmarks" / "results" / "quality_t2v-tiny_cpu.json"
PROMPT, SEEDS = "a red ball rolls to the right on a white background", range(2)
FACTOR = 32
MISTAKES = {"scale": "rowwise:reference", "cache": "E012K2R20"}
"""Missing mean removal costs this checkpoint 0.4 dB, less than its seeds differ: its values have hardly a mean. It is
found on one whose values have (``test_quality_table.py``)."""


@pytest.fixture(scope="module")
def table():
    return json.loads(TABLE.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def in_other_units(tmp_path_factory):
    """The shipped checkpoint, the same function of its inputs, with weights that need a scale.

    As it comes they need none: they lie within e4m3's own range. Queries and keys are normalised, so that their size is
    free; what values are divided by, the output projection takes back. Powers of two change no digit.
    """
    folder = tmp_path_factory.mktemp("quality") / CHECKPOINT.name
    shutil.copytree(CHECKPOINT, folder)
    for path in folder.glob("*_noise_model/*.safetensors"):
        weights = load_file(path)
        for name in [name for name in weights if name.endswith("_attn.o.weight")]:
            layer = name.removesuffix("o.weight")
            weights[name] *= FACTOR
            for part in "qkv":
                weights[f"{layer}{part}.weight"] /= FACTOR
                weights[f"{layer}{part}.bias"] /= FACTOR
        save_file(weights, path, metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def run(bench, table, in_other_units):  # noqa: F811
    """Rows of the same prompt, size and steps as the table's."""
    assert f"--prompt '{PROMPT}'" in table["command"]
    row = table["rows"][0]

    def measure(names, mistake=""):
        chosen = [bench[0].parse_setting(name) for name in names]
        with torch.inference_mode():
            return bench[0].measured_rows(
                str(in_other_units), [PROMPT], SEEDS, chosen, row["size"], row["frames"], row["steps"], "", "float32",
                "cpu", mistake,
            )  # fmt: skip

    return measure


def test_nothing_got_worse(bench, run, table):  # noqa: F811
    found = run([*MISTAKES.values(), "reference-fp8/0-0-0-0"])
    assert bench[1].worse(found, table["rows"]) == []
    assert found[1]["passes_computed"] < found[1]["passes"]


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_found(bench, run, table, mistake):  # noqa: F811
    name = MISTAKES[mistake]
    found = bench[1].worse(run([name], mistake), table["rows"])
    assert any(sentence.startswith(f"{name}: latent_psnr_db fell by") for sentence in found), found
