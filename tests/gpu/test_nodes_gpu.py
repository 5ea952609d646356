"""The nodes under core's real memory management: text encoder and VAE on the GPU and off it, whole runs, GPU noise.

Run in a process of its own: core decides at import whether there is a GPU.
"""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "nodes"))

import bridge_kit as kit
import nodes_kit
from nodes_kit import call, latents

COMFYUI = Path(os.environ.get("COMFYUI_DIR") or kit.PACK / ".host" / "comfyui")
SIZE = {"width": 64, "height": 48, "length": 9, "seed": 7}


@pytest.fixture(scope="module", autouse=True)
def core(checkpoints):
    if not (COMFYUI / "comfy" / "options.py").is_file():
        pytest.fail(f"no ComfyUI at {COMFYUI}: run 'python scripts/host.py' or set COMFYUI_DIR")
    if str(COMFYUI) not in sys.path:
        sys.path.insert(0, str(COMFYUI))
    import comfy.cli_args

    if comfy.cli_args.args.cpu:
        pytest.skip("core is already imported for the CPU in this process: run tests/gpu by itself")
    comfy.cli_args.args.use_pytorch_cross_attention = True
    import folder_paths

    nodes_kit.load_pack()
    root = next(iter(checkpoints.values())).parent
    folder_paths.folder_names_and_paths["wan"] = ([str(root)], set())


@pytest.fixture(autouse=True)
def inference():
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    with torch.inference_mode():
        yield
    unload()


def unload() -> int:
    """Bytes of GPU memory that stay in use when core has let go of every model."""
    import comfy.model_management

    comfy.model_management.unload_all_models()
    gc.collect()
    torch._C._cuda_clearCublasWorkspaces()  # 32 MiB that PyTorch keeps for good after the first matrix product
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated()


def load(checkpoints, task, dtype="fp32"):
    boxes = {"weight_dtype": dtype, "text_encoder_dtype": dtype, "vae_dtype": dtype}
    return call("WanFP8LoadCheckpoint", checkpoint=checkpoints[task].name, **boxes).args[:4]


def plain_loop(checkpoints, text, *, steps, noise=None):
    """The published T2V loop on the CPU, over the engine alone."""
    sampling, loader = nodes_kit.module("wan_fp8.sampling"), nodes_kit.module("wan_fp8.checkpoint.load")
    nets = [
        loader.load_transformer(checkpoints["t2v"], expert, torch.float32) for expert in ("high_noise", "low_noise")
    ]
    run = sampling.make_solver("unipc", sampling.sigmas(steps, 12.0).float())
    x = torch.randn(1, 16, 3, 6, 8, generator=torch.Generator().manual_seed(7)) if noise is None else noise
    for index, t in enumerate(sampling.timesteps(steps, 12.0).tolist()):
        net, scale = (nets[0], 4.0) if t >= 875 else (nets[1], 3.0)
        cond, uncond = (net(x, torch.tensor([float(t)]), rows) for rows in text)
        x = run.step(uncond + scale * (cond - uncond), index, x)
    return x


def test_a_run_is_the_plain_loop_and_leaves_no_memory_behind(checkpoints):
    before = unload()
    high, low, encoder, vae = load(checkpoints, "t2v")
    positive, negative = call("WanFP8TextEncode", text_encoder=encoder, prompt="a cat").args
    common = dict(model=high, model_low=low, positive=positive, negative=negative, **SIZE, steps=5)
    raw = nodes_kit.module("nodes.bridge").raw_latents
    text = [positive[0][0], negative[0][0]]
    got = latents(call("WanFP8SampleT2V", **common))
    assert kit.distance(got, raw(high, plain_loop(checkpoints, text, steps=5))) < 1e-3
    assert torch.equal(got, latents(call("WanFP8SampleT2V", **common)))

    noise = torch.randn(16, 3, 6, 8, device="cuda", generator=torch.Generator("cuda").manual_seed(7)).cpu()[None]
    got = latents(call("WanFP8SampleT2V", **common, noise="cuda (published code)"))
    assert kit.distance(got, raw(high, plain_loop(checkpoints, text, steps=5, noise=noise))) < 1e-3

    pictures = vae.decode(got)
    assert pictures.shape == (1, 9, 48, 64, 3) and pictures.isfinite().all()
    del high, low, encoder, vae, pictures
    assert unload() <= before + 2**20


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp8"])
def test_the_text_encoder_runs_on_the_gpu_and_makes_room(checkpoints, dtype):
    boxes = {"text_encoder_dtype": dtype}
    handle = call("WanFP8LoadCheckpoint", checkpoint=checkpoints["t2v"].name, **boxes).args[2]
    nodes_kit.module("nodes.encoder").CACHE.clear()
    rows = handle.encode("a cat on a roof").rows
    encoder = handle._encoder
    assert rows.device.type == "cpu" and encoder.device.type == "cuda"
    unload()
    assert encoder.device.type == "cpu"
    on_cpu = encoder.encode("a cat on a roof").float()
    assert kit.distance(rows, on_cpu) < (1e-4 if dtype == "fp32" else 3e-2)
    assert handle.encode("another prompt").rows.isfinite().all() and encoder.device.type == "cuda"


@pytest.mark.parametrize("task", ["i2v", "ti2v"])
def test_an_image_becomes_a_video(checkpoints, task):
    high, low, encoder, vae = load(checkpoints, task, "bf16")
    positive, negative = call("WanFP8TextEncode", text_encoder=encoder, prompt="a cat").args
    common = dict(model=high, positive=positive, negative=negative, vae=vae, **{**SIZE, "height": 64}, steps=4)
    if task == "i2v":
        common["model_low"] = low
    image = nodes_kit.picture(80, 60)
    got = latents(call(f"WanFP8Sample{task.upper()}", **common, start_image=image, size="width x height"))
    assert got.isfinite().all() and got.std() > 0
    assert vae.decode(got).shape == (1, 9, 64, 64, 3)
