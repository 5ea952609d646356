"""Our transformer under core's real memory management: partial load with asynchronous transfers, forks, estimates.

Run in a process of its own: core decides at import whether there is a GPU.
"""

from __future__ import annotations

import dataclasses
import gc
import importlib
import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "nodes"))

import bridge_kit as kit

COMFYUI = Path(os.environ.get("COMFYUI_DIR") or kit.PACK / ".host" / "comfyui")
CUDA = torch.device("cuda", 0)


@pytest.fixture(scope="module", autouse=True)
def core():
    if not (COMFYUI / "comfy" / "options.py").is_file():
        pytest.fail(f"no ComfyUI at {COMFYUI}: run 'python scripts/host.py' or set COMFYUI_DIR")
    if str(COMFYUI) not in sys.path:
        sys.path.insert(0, str(COMFYUI))
    import comfy.cli_args

    if comfy.cli_args.args.cpu:
        pytest.skip("core is already imported for the CPU in this process: run tests/gpu by itself")
    comfy.cli_args.args.use_pytorch_cross_attention = True
    import comfy.model_management

    assert comfy.model_management.get_torch_device().type == "cuda"


@pytest.fixture(autouse=True)
def inference():
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    with torch.inference_mode():
        yield
    kit.unload_everything()


def forward(model, size=16, seed=3):
    """One forward outside of a run."""
    generator = torch.Generator().manual_seed(seed)
    net = model.model.diffusion_model
    dtype = model.model.manual_cast_dtype or net.dtype
    x = torch.randn(1, net.in_dim, 3, size, size, generator=generator).to(CUDA, dtype)
    rows = torch.randn(1, 64, kit.TEXT_DIM, generator=generator).to(CUDA, dtype)
    return net(x, torch.tensor([500.0], device=CUDA), rows, transformer_options={})


def loaded(model, budget):
    """``forward`` after a load with so many bytes of room; 0 for all of it."""
    model.patch_model(CUDA, lowvram_model_memory=budget)
    try:
        return forward(model)
    finally:
        model.unpatch_model(torch.device("cpu"))


def test_the_host_never_waits_in_a_forward():
    """From the second forward of a run on, in an ordinary graph; timesteps per frame and a window of steps too."""
    model = own()
    hosted_model = importlib.import_module(f"{kit.PACKAGE}.nodes.bridge.hosted_model")
    model.patch_model(CUDA)
    model.model.current_patcher = model
    net = model.model.diffusion_model
    x = torch.randn(1, net.in_dim, 3, 16, 16, device=CUDA, dtype=torch.bfloat16)
    rows = torch.randn(1, 64, kit.TEXT_DIM, device=CUDA, dtype=torch.bfloat16)
    options = {"uuids": ["one"], hosted_model.STEP: hosted_model.Step(3, 10), "sigmas": torch.ones(1, device=CUDA)}
    timesteps = [torch.full((1, 3), t, device=CUDA) for t in (500.0, 400.0)]
    try:
        net(x, timesteps[0], rows, transformer_options=dict(options))
        torch.cuda.set_sync_debug_mode("error")
        net(x, timesteps[1], rows.clone(), transformer_options=dict(options))
    finally:
        torch.cuda.set_sync_debug_mode("default")
        model.unpatch_model(torch.device("cpu"))


def own(kind="t2v", dtype=torch.bfloat16, **kw):
    return kit.own_model(kind, dtype=dtype, **kw)


def fp8():
    weights, scales = kit.to_fp8(kit.core_weights(layers=4), rows=True)
    net = kit.own_net(dtype=torch.bfloat16, layers=4)
    for layer, scale in scales.items():
        leaf = net.get_submodule(layer)
        leaf.weight = torch.nn.Parameter(weights[f"{layer}.weight"], requires_grad=False)
        leaf.weight_scale = torch.nn.Parameter(scale, requires_grad=False)
    return kit.bridge().build_model_patcher(net)


def test_fork_gives_cores_latents_within_bf16_noise():
    exact = kit.ksample(kit.core_model(model_options={"dtype": torch.float32}))
    core = kit.core_model(model_options={"dtype": torch.bfloat16})
    theirs, ours = kit.ksample(core), kit.ksample(kit.bridge().fork(core))
    assert kit.distance(ours, theirs) < 3e-2
    assert kit.distance(ours, exact) < 1.2 * kit.distance(theirs, exact)
    single = kit.bridge().fork(kit.core_model(model_options={"dtype": torch.float32}))
    assert kit.distance(kit.ksample(single), exact) < 1e-4


@pytest.mark.parametrize("make", [own, fp8])
@pytest.mark.parametrize("with_lora", [False, True])
def test_partial_load(make, with_lora):
    model = make()
    if with_lora:
        pairs = kit.lora_pairs({k: v for k, v in model.model.diffusion_model.state_dict().items()})
        file = {**kit.core_lora(pairs), "diffusion_model.blocks.0.modulation.diff": 0.1 * torch.ones(1, 6, 128)}
        model = kit.with_core_lora(model, file)
    before, full = kit.state_bytes(model), loaded(model, 0)
    for budget in (1, model.model_size() // 2):
        for _ in range(3):  # transfers on other streams: a race would not show every time
            error = kit.distance(loaded(model, budget), full)
            # Merged on the fly FP8 weights are not rounded again, bf16 ones are merged in bf16.
            assert error < (0.08 if make is fp8 else 2e-2) if with_lora else error == 0
    assert kit.same_bytes(before, kit.state_bytes(model))


def test_weights_return_and_so_does_memory():
    def settled():
        kit.unload_everything()
        gc.collect()
        torch.cuda.empty_cache()
        return torch.cuda.memory_allocated()

    baseline, model = settled(), own()
    before = kit.state_bytes(model)
    first = kit.ksample(model)
    ours = kit.bridge().fork(model)
    assert model.loaded_size() == 0, "a fork shares host memory, not the GPU's"
    assert all(p.device.type == "cpu" for p in ours.model.diffusion_model.parameters())
    assert torch.equal(kit.ksample(ours), first)
    assert torch.equal(kit.ksample(model), first)
    assert abs(settled() - baseline) < 2**20
    assert kit.same_bytes(before, kit.state_bytes(model))


def test_two_experts_in_one_run():
    bridge, sampling = kit.bridge(), kit.engine("sampling")
    high, low = own(seed=0), own(seed=1)
    sigmas, timesteps = sampling.sigmas(6, 5.0, "unipc"), sampling.timesteps(6, 5.0, "unipc")

    def run(stages, sampler):
        return bridge.run_stages(
            stages,
            positive=kit.prompt(1),
            negative=kit.prompt(2),
            latent=kit.empty_latent(),
            sigmas=sigmas,
            timesteps=timesteps,
            sampler=bridge.make_sampler(sampler),
            seed=7,
        )[0]["samples"]

    for sampler in ("unipc", "dpmpp_2m", "dpmpp_2m_sde"):
        one = run([bridge.Stage(model=high, cfg=3.5)], sampler)
        same = [bridge.Stage(model=high, cfg=3.5), bridge.Stage(model=high.clone(), cfg=3.5, first_step=3)]
        assert torch.equal(run(same, sampler), one)
        other = [bridge.Stage(model=high, cfg=3.5), bridge.Stage(model=low, cfg=3.5, first_step=3)]
        assert kit.distance(run(other, sampler), one) > 1e-2


def test_memory_estimate_against_the_peak():
    """Real widths, two blocks, 832x480x81: what one forward takes beyond the weights, against what core is told."""
    specs, wan = kit.engine("models.specs"), kit.engine("models.wan")
    memory = kit.engine("models.memory")
    spec = dataclasses.replace(specs.T2V_A14B, num_layers=2)
    with torch.device("meta"):
        net = wan.build_model(spec)
    filled = {k: torch.randn(v.shape, dtype=torch.bfloat16) * 0.02 for k, v in net.state_dict().items()}
    net.load_state_dict(filled, assign=True)
    model = kit.bridge().build_model_patcher(net)
    model.patch_model(CUDA)
    shape = [1, 16, 21, 60, 104]
    x = torch.randn(shape, device=CUDA, dtype=torch.bfloat16)
    rows = torch.randn(1, 512, kit.TEXT_DIM, device=CUDA, dtype=torch.bfloat16)
    t = torch.tensor([500.0], device=CUDA)
    net(x, t, rows, transformer_options={})
    gc.collect()
    torch.cuda.empty_cache()
    resting = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    net(x, t, rows, transformer_options={})
    peak = torch.cuda.max_memory_allocated() - resting
    told = memory.forward_needs(spec, shape, torch.bfloat16).total
    print(f"peak {peak / 2**30:.2f} GiB, estimate {told / 2**30:.2f} GiB")
    model.unpatch_model(torch.device("cpu"))
    assert peak <= told <= 1.4 * peak
