"""A real ComfyUI server with this pack, for the tests that talk to one: one process for the whole test session."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

PACK = Path(__file__).resolve().parent.parent
ARTEFACTS = PACK / ".out"
"""Ignored by git; CI keeps what tests leave here."""
SLOW_NODES = Path(__file__).resolve().parent / "slow_nodes"
TASKS = {
    "t2v": "Wan2.2-T2V-A14B",
    "i2v": "Wan2.2-I2V-A14B",
    "ti2v": "Wan2.2-TI2V-5B",
    "animate": "Wan2.2-Animate-14B",
    "s2v": "Wan2.2-S2V-14B",
}
"""Tasks, and the official folder name of each, under which ``models/wan`` holds a tiny checkpoint."""


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny random checkpoints in the official layout, by task; they are not to be changed."""
    from make_tiny_checkpoint import make_tiny_checkpoint

    folder = tmp_path_factory.mktemp("checkpoints")
    return {task: make_tiny_checkpoint(folder / name, task) for task, name in TASKS.items()}


SINGLE_FILES = {
    "diffusion_models/wan2.2_t2v_high_noise_14B_fp8_scaled.safetensors": "wan2.2_t2v_high_noise_14B_tiny.safetensors",
    "diffusion_models/wan2.2_t2v_low_noise_14B_fp8_scaled.safetensors": "wan2.2_t2v_low_noise_14B_tiny.safetensors",
    "text_encoders/umt5_xxl_fp8_e4m3fn_scaled.safetensors": "umt5_xxl_tiny.safetensors",
    "vae/wan_2.1_vae.safetensors": "wan_2.1_vae.safetensors",
}
"""The files that core's Wan2.2 template asks for, and the tiny ones that stand there in the tests."""


LORAS = tuple(f"loras/wan2.2_i2v_lightx2v_4steps_lora_v1_{expert}_noise.safetensors" for expert in ("high", "low"))
"""The distilled pair that ``workflows/i2v_a14b_4steps.json`` asks for."""


@pytest.fixture(scope="session")
def single_files(tmp_path_factory: pytest.TempPathFactory, checkpoints: dict[str, Path]) -> dict[str, Path]:
    """Tiny random single files for core's model folders, by where they go below ``models``."""
    from make_tiny_checkpoint import make_tiny_checkpoint

    folder = tmp_path_factory.mktemp("single")
    made = make_tiny_checkpoint(folder / "t2v", "t2v", layout="comfy", fp8="scaled_fp8")
    files = {place: made / Path(place).parent / name for place, name in SINGLE_FILES.items()}
    for place in LORAS:
        files[place] = folder / Path(place).name
        _save_distilled_lora(files[place], checkpoints["i2v"] / "high_noise_model")
    return files


def _save_distilled_lora(path: Path, expert: Path) -> None:
    """Every kind of change that such files hold: low rank, a bias, a norm, and the modulation of blocks and head."""
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    shapes = {}
    for shard in expert.glob("*.safetensors"):
        with safe_open(shard, "pt") as opened:
            shapes |= {name: opened.get_slice(name).get_shape() for name in opened.keys()}  # noqa: SIM118
    generator = torch.Generator().manual_seed(5)

    def small(*shape: int) -> torch.Tensor:
        return 0.02 * torch.randn(*shape, generator=generator)

    file = {}
    for name, shape in shapes.items():
        stem = f"diffusion_model.{name.rpartition('.')[0]}"
        if name.endswith("modulation"):
            file[f"{stem}.diff_m"] = small(*shape)
        elif ".self_attn." in name and name.endswith((".q.weight", ".o.weight")):
            file[f"{stem}.lora_down.weight"], file[f"{stem}.lora_up.weight"] = small(4, shape[1]), small(shape[0], 4)
        elif ".ffn.0.bias" in name:
            file[f"{stem}.diff_b"] = small(*shape)
        elif "norm_q" in name:
            file[f"{stem}.diff"] = small(*shape)
    save_file(file, path)


def save_relighting_lora(path: Path, width: int = 256, rank: int = 4) -> None:
    """A LoRA as Animate's official folder brings it: PEFT's names in a checkpoint of a trainer."""
    import torch

    generator = torch.Generator().manual_seed(0)
    state = {}
    for layer in ("self_attn.q", "cross_attn.k_img", "ffn.2"):
        width_in = 2 * width if layer == "ffn.2" else width
        down = torch.randn(rank, width_in, generator=generator) / width_in**0.5
        state[f"blocks.0.{layer}.lora_A.weight"] = down
        state[f"blocks.0.{layer}.lora_B.weight"] = torch.randn(width, rank, generator=generator)
    torch.save({"state_dict": state}, path)


@pytest.fixture(scope="session")
def make_server(
    tmp_path_factory: pytest.TempPathFactory, checkpoints: dict[str, Path], single_files: dict[str, Path]
) -> Callable[..., Any]:
    """A function that starts a server with folders of its own; extra command-line flags are its arguments."""
    import host
    from comfy_server import start_server

    def make(name: str, *flags: str) -> Any:
        base = tmp_path_factory.mktemp(name)
        (base / "models" / "wan").mkdir(parents=True)
        for path in checkpoints.values():
            (base / "models" / "wan" / path.name).symlink_to(path, target_is_directory=True)
        for place, path in single_files.items():
            (base / "models" / place).parent.mkdir(exist_ok=True)
            (base / "models" / place).symlink_to(path)
        (base / "models" / "loras").mkdir(exist_ok=True)
        save_relighting_lora(base / "models" / "loras" / "relighting_lora.ckpt")
        (base / "custom_nodes").mkdir()
        (base / "custom_nodes" / SLOW_NODES.name).symlink_to(SLOW_NODES, target_is_directory=True)
        pinned = {key: value for key, value in os.environ.items() if key != "COMFYUI_DIR"}
        assert pinned == dict(os.environ), "the tests run on the pinned host: unset COMFYUI_DIR"
        chosen = host.build()
        (base / "input").mkdir()
        shutil.copy(chosen.comfyui / "input" / "example.png", base / "input")  # every ComfyUI comes with this picture
        allowed = ("--whitelist-custom-nodes", host.PACK_NAME, SLOW_NODES.name)
        return start_server(chosen, base=base, extra=(*allowed, *flags))

    return make


@pytest.fixture(scope="session")
def server(make_server: Callable[..., Any]) -> Iterator[Any]:
    """The running server (``comfy_server.Server``). Its log is kept in ``.out/comfyui.log``."""
    with make_server("comfyui") as running:
        yield running
        ARTEFACTS.mkdir(exist_ok=True)
        shutil.copy(running.log, ARTEFACTS / "comfyui.log")


@pytest.fixture(scope="session")
def object_info(server: Any) -> dict[str, Any]:
    """What the server says about every node."""
    from headless.client import Client

    return dict(Client(server.url).object_info())


@pytest.fixture
def client(server: Any) -> Iterator[Any]:
    """A client of the server (``headless.client.Client``). A prompt that a test leaves behind is cancelled."""
    from headless.client import Client

    one = Client(server.url)
    yield one
    for prompt_id in one.waiting():
        one.cancel(prompt_id)
