"""Animate and S2V in a pool: the nodes' own loops give the videos that one process gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nodes_kit
import pytest
import torch
from nodes_kit import call, picture
from torch import Tensor

pytestmark = [pytest.mark.usefixtures("comfy_core", "inference", "pools_end"), pytest.mark.timeout(180)]
TOLERANCE = 1e-3
"""Of 0..1: fp32 over a few steps, sums in another order, then the VAE."""


def loaded(kind: str, checkpoints: dict[str, Path], folder: Path) -> dict[str, Any]:
    """What the loader returns for a tiny checkpoint, with text, and its MODEL in a pool."""
    import folder_paths

    (folder / f"pool_{kind}").symlink_to(checkpoints[kind], target_is_directory=True)
    nodes_kit.load_pack()
    folder_paths.add_model_folder_path("wan", str(folder))
    with torch.inference_mode():
        output = call("WanFP8LoadCheckpoint", checkpoint=f"pool_{kind}", weight_dtype="fp32", vae_dtype="fp32")
        model, _, encoder, vae, clip_vision, audio_encoder = output.args
        positive, negative = call("WanFP8TextEncode", text_encoder=encoder, prompt="a fox").args
        many, _, _, there = call("WanFP8MultiGPU", model=model, vae=vae, gpus="cpu:2", topology="1x2x1").args
    parts = {"model": model, "many": many, "positive": positive, "negative": negative, "vae": vae, "vae_there": there}
    return parts | ({"clip_vision": clip_vision} if kind == "animate" else {"audio_encoder": audio_encoder})


@pytest.fixture(scope="module")
def animate(comfy_core: Path, checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return loaded("animate", checkpoints, tmp_path_factory.mktemp("animate"))


@pytest.fixture(scope="module")
def s2v(comfy_core: Path, checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return loaded("s2v", checkpoints, tmp_path_factory.mktemp("s2v"))


def given_to(model: Any, parts: dict[str, Any]) -> dict[str, Any]:
    """Everything but the MODEL; one in a pool gets the VAE of the pool as well."""
    rest = {name: value for name, value in parts.items() if name not in ("model", "many", "vae", "vae_there")}
    return rest | {"vae": parts["vae_there" if model is parts["many"] else "vae"]}


def run_animate(parts: dict[str, Any], model: Any, width: int = 48, height: int = 32, **more: Any) -> Tensor:
    rest = given_to(model, parts)
    generator = torch.Generator().manual_seed(5)
    face = torch.rand(5, 512, 512, 3, generator=generator)
    poses = torch.rand(5, height, width, 3, generator=generator)
    given = {"reference_image": picture(width, height), "pose_video": poses}
    given |= {"face_video": face, "segment": 5, "overlap": 1, "steps": 2}
    return call("WanFP8SampleAnimate", model=model, **rest, **given, **more)[0]


def features(frames: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    layers = [torch.randn(1, frames, 1024, generator=generator) for _ in range(25)]
    return {"encoded_audio_all_layers": layers, "audio_samples": 320 * frames + 80}


def run_s2v(parts: dict[str, Any], model: Any, **more: Any) -> Tensor:
    rest = given_to(model, parts)
    given = {"size": "width x height", "width": 64, "height": 64, "clip_frames": 8, "steps": 2}
    given |= {"reference_image": picture(64, 64), "audio_features": features(40)}
    return call("WanFP8SampleS2V", model=model, **rest, **given, **more)[0]


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[set[str]]:
    """Names of the task's inputs that each forward sends."""
    connection, found = nodes_kit.module("wan_fp8.parallel.client").Connection, []
    original = connection.request

    def request(self: Any, kind: str, fields: Any, tensors: Any = None, **more: Any) -> Any:
        if kind == "forward":
            found.append({name for name in tensors if name.startswith("task.")})
        return original(self, kind, fields, tensors, **more)

    monkeypatch.setattr(connection, "request", request)
    return found


def test_animate_is_that_of_one_process(animate: dict[str, Any], sent: list[set[str]]) -> None:
    alone = run_animate(animate, animate["model"])
    many = run_animate(animate, animate["many"])
    assert sent == [{"task.pose_latents", "task.face_pixel_values"}, set()]
    assert many.shape == alone.shape and float((many - alone).abs().max()) < TOLERANCE


def test_s2v_is_that_of_one_process(s2v: dict[str, Any], sent: list[set[str]]) -> None:
    alone = run_s2v(s2v, s2v["model"])
    many = run_s2v(s2v, s2v["many"])
    assert all("task.audio_embed" in names for names in sent[::2]) and not any(sent[1::2])  # two steps a clip
    assert len(sent) == 4
    assert many.shape == alone.shape and float((many - alone).abs().max()) < TOLERANCE


def test_animate_with_sparse_attention(animate: dict[str, Any]) -> None:
    """Without guidance two GPUs split the tokens."""
    pools, bridge = nodes_kit.module("wan_fp8.parallel.pools"), nodes_kit.module("nodes.bridge")
    topology = nodes_kit.module("wan_fp8.parallel.remote").Topology
    attention = nodes_kit.module("wan_fp8.attention")
    sparsity = nodes_kit.module("wan_fp8.attention.sparse.setting").Sparsity(
        coverage=0.5, bound=None, skip_first=0.0, skip_last=0.0, skip_first_blocks=0, skip_last_blocks=0
    )
    sparse = bridge.with_settings(animate["model"], attention=attention.Attention(sparsity=sparsity))
    two = pools.PoolSpec(devices=("cpu", "cpu"))
    facts, made = [], []
    for model in (sparse, bridge.in_pool(sparse, two, topology())):
        made.append(run_animate(animate, model, 176, 144))
        facts += model.model.diffusion_model.sparse_facts
    assert float((made[1] - made[0]).abs().max()) < TOLERANCE
    assert [found["ranks"] for found in facts] == [1, 2] and facts[0]["density"] < 1
    for name in ("heads", "heads_dense", "density_by_step", "density_by_block"):
        assert facts[0][name] == facts[1][name], "the report is about the heads of all ranks"


def test_lora_keys_and_saving_know_the_tasks_modules(animate: dict[str, Any], s2v: dict[str, Any]) -> None:
    for parts, name in (
        (animate, "face_adapter.fuser_blocks.0.linear2.weight"),
        (s2v, "audio_injector.injector.0.o.weight"),
    ):
        ours, theirs = (parts[kind].model.state_dict().keys() for kind in ("many", "model"))
        assert ours == theirs and f"diffusion_model.{name}" in ours


def test_a_model_without_a_file_and_a_cancelled_run(s2v: dict[str, Any]) -> None:
    """Weights that no file has go to the pool by all their names; a run that is cancelled leaves the pool usable."""
    import comfy.model_management as management

    pools, bridge = nodes_kit.module("wan_fp8.parallel.pools"), nodes_kit.module("nodes.bridge")
    topology = nodes_kit.module("wan_fp8.parallel.remote").Topology
    handed = s2v["model"].clone()
    handed.set_attachments(nodes_kit.module("nodes.bridge.remote").SOURCE, None)
    many = bridge.in_pool(handed, pools.PoolSpec(devices=("cpu", "cpu")), topology())
    calls: list[int] = []

    def cancel(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            management.interrupt_current_processing()

    hook = many.model.diffusion_model.register_forward_pre_hook(cancel)
    with pytest.raises(management.InterruptProcessingException):
        run_s2v(s2v, many)
    hook.remove()
    assert float((run_s2v(s2v, many) - run_s2v(s2v, s2v["model"])).abs().max()) < TOLERANCE
