"""The checkpoint that is shipped: its size, its card, and whether its videos show what their captions say."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_wan import package
from tiny_wan.evaluate import SampleOptions, choose_scenes, evaluate_t2v
from tiny_wan.world import WorldSize

from wan_fp8 import load_text_encoder, load_transformer
from wan_fp8.models.vae import load_vae

SHIPPED = Path(__file__).resolve().parents[2] / "checkpoints" / "Wan2.2-T2V-A14B-tiny"
LARGEST_FILE, LARGEST = 15e6, 24e6
"""Bytes of a file and of all of them."""
WANTED = 0.85
"""Share of 100 captions whose colour and motion are seen: 0.89 was measured. 0.9 is the aim of the next training."""


def test_size_and_card() -> None:
    files = [path for path in SHIPPED.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= LARGEST
    assert max(path.stat().st_size for path in files) <= LARGEST_FILE
    card = (SHIPPED / "README.md").read_text()
    for facts in package.file_facts(SHIPPED).values():
        assert facts["sha256"] in card
    for path in SHIPPED.rglob("*.safetensors"):
        tensors = package.read_weights(path)
        assert all(value.dtype == torch.bfloat16 for value in tensors.values() if value.is_floating_point())


@pytest.mark.parametrize("held_out", [False, True], ids=["scenes of training", "held-out scenes"])
def test_videos_show_what_their_captions_say(held_out: bool) -> None:
    """Sampled as the published model is, in half of its steps; colour and motion are measured from pixels."""
    experts = {name: load_transformer(SHIPPED, name, torch.float32) for name in package.EXPERTS}
    options = SampleOptions(steps=20, at_once=25)
    with torch.inference_mode():
        found = evaluate_t2v(
            experts,
            load_vae(SHIPPED, torch.float32),
            load_text_encoder(SHIPPED),
            WorldSize(),
            options,
            choose_scenes(50, held_out=held_out, seed=0),
        )
    scores = found.scores()
    assert scores["colour"] >= 0.95, scores
    assert scores["colour_and_motion"] >= WANTED, scores
