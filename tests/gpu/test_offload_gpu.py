"""FP8 MODELs under core's real memory management: 50 alternations, weights that go home, partial loads of every recipe.

Run in a process of its own: core decides at import whether there is a GPU.
"""

from __future__ import annotations

import dataclasses
import gc
import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "nodes"))

import bridge_kit as kit

COMFYUI = Path(os.environ.get("COMFYUI_DIR") or kit.PACK / ".host" / "comfyui")
CUDA = torch.device("cuda", 0)
TURNS = 50
NAMES = ["DelayedScaling", "Float8CurrentScaling", "Float8BlockScaling", "rowwise"]


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
def inference(caplog):
    """And every weight that stays in host memory is pinned: nothing was refused."""
    caplog.set_level("DEBUG", "wan_fp8")
    with torch.inference_mode():
        yield
    kit.unload_everything()
    refused = [record.getMessage() for record in caplog.records if "not pinned" in record.getMessage()]
    assert not refused, (len(refused), refused[:8])


def own(seed: int = 0):
    return kit.own_model("t2v", dtype=torch.bfloat16, seed=seed)


def fp8(model, name: str = "rowwise"):
    """With a recipe, multiplied by ``auto`` where that can, else by the reference."""
    errors, recipe = kit.engine("errors"), kit.engine("quant").Recipe
    try:
        return kit.bridge().with_recipe(model, recipe(name))[0]
    except errors.BackendUnavailableError:
        return kit.bridge().with_recipe(model, recipe(name, backend="reference"))[0]


def settled() -> int:
    """Bytes of GPU memory in use when core has let go of every model."""
    kit.unload_everything()
    gc.collect()
    torch._C._cuda_clearCublasWorkspaces()  # 32 MiB that PyTorch keeps after the first matrix product
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated()


def pointers(model) -> dict[str, int]:
    leaf = kit.engine("models.layers").Leaf
    net = model.model.diffusion_model
    return {
        f"{path}.{name}": parameter.data_ptr()
        for path, module in net.named_modules()
        if isinstance(module, leaf)
        for name, parameter in module.named_parameters(recurse=False)
    }


def partly(model, share: float):
    """A clone that core loads with room for a share of its weights."""
    clone = model.clone()
    load = type(clone).load

    def limited(device, lowvram_model_memory=0, force_patch_weights=False, full_load=False):
        del lowvram_model_memory, full_load
        load(
            clone,
            device,
            lowvram_model_memory=1 + int(share * model.model_size()),
            force_patch_weights=force_patch_weights,
        )

    clone.load = limited
    return clone


@pytest.mark.parametrize("name", [None, *NAMES])
def test_weights_go_home(name):
    """To the GPU and back: the host's own tensors again, not copies of them."""
    model = own() if name is None else fp8(own(), name)
    before, values = pointers(model), kit.state_bytes(model)
    model.patch_model(CUDA)
    assert all(p.device.type == "cuda" for p in model.model.diffusion_model.parameters())
    model.unpatch_model(torch.device("cpu"))
    assert pointers(model) == before and kit.same_bytes(values, kit.state_bytes(model))
    model.patch_model(CUDA, lowvram_model_memory=model.model_size() // 2)
    model.unpatch_model(torch.device("cpu"))
    model.patch_model(CUDA)
    assert model.partially_unload(torch.device("cpu"), model.model_size() // 2) > 0
    model.detach()
    assert pointers(model) == before and kit.same_bytes(values, kit.state_bytes(model))


@pytest.mark.parametrize("name", NAMES)
def test_partial_loads_give_the_same_latents(name):
    model = fp8(own(), name)
    whole = kit.ksample(model)
    kit.unload_everything()
    for share in (0.0, 0.5):
        for _ in range(3):  # transfers on other streams: a race would not show every time
            assert torch.equal(kit.ksample(partly(model, share)), whole), share
            kit.unload_everything()


@pytest.mark.parametrize("share", [None, 0.0, 0.5])
def test_two_workflows_in_turn(share):
    """50 times: an FP8 MODEL, and one with DelayedScaling and a LoRA; the GPU ends as it began."""
    high, low = fp8(own(0)), fp8(own(1), "DelayedScaling")
    patched = kit.with_core_lora(low, kit.core_lora(kit.lora_pairs(kit.core_weights())))
    make = (lambda model: model) if share is None else (lambda model: partly(model, share))
    states, homes = [kit.state_bytes(m) for m in (high, low)], [pointers(m) for m in (high, low)]
    first = [kit.ksample(make(model), steps=1) for model in (high, patched)]
    baseline = settled()
    for index in range(TURNS):
        again = [kit.ksample(make(model), steps=1) for model in (high, patched)]
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True)), index
        if index % 10 == 9:
            assert settled() <= baseline + 2**20, index
    assert settled() <= baseline + 2**20
    assert all(kit.same_bytes(s, kit.state_bytes(m)) for s, m in zip(states, (high, low), strict=True))
    assert all(home == pointers(m) for home, m in zip(homes, (high, low), strict=True))
    import comfy.model_management as management

    assert not getattr(management, "PINNED_MEMORY", {}), "nothing stays pinned"


@pytest.mark.parametrize("share", [None, 0.5])
def test_one_model_with_and_without_a_recipe(share):
    make = (lambda model: model) if share is None else (lambda model: partly(model, share))
    model = own()
    with_fp8 = fp8(model)
    plain, quantised = kit.ksample(make(model), steps=1), kit.ksample(make(with_fp8), steps=1)
    baseline = settled()
    for _ in range(TURNS):
        assert torch.equal(kit.ksample(make(with_fp8), steps=1), quantised)
        assert torch.equal(kit.ksample(make(model), steps=1), plain)
    assert settled() <= baseline + 2**20
    del with_fp8
    assert settled() <= baseline + 2**20


def test_a_saved_expert_comes_from_the_gpu_bit_for_bit(tmp_path):
    """The MODEL is loaded for its LoRA to be merged; the file holds what the GPU had."""
    model = fp8(own())
    merged = kit.with_core_lora(model, kit.core_lora(kit.lora_pairs(kit.core_weights())))
    before = settled()
    path = kit.bridge().save_model(merged, tmp_path / "wan2.2_t2v_high_noise.safetensors")
    held = {k: v.cpu() for k, v in merged.model.diffusion_model.state_dict().items()}
    again = kit.engine("checkpoint.load").load_transformer(path, dtype=None).state_dict()
    for name, value in held.items():
        assert torch.equal(again[name].view(-1).view(torch.uint8), value.reshape(-1).view(torch.uint8)), name
    assert settled() <= before + 2**20


@pytest.mark.parametrize(
    ("shape", "prompts"),
    [([1, 16, 21, 60, 104], 2), ([2, 16, 9, 60, 104], 1), ([1, 16, 5, 60, 104], 2), ([1, 16, 1, 32, 32], 2)],
)
def test_a_forward_fits_into_what_core_is_told(shape, prompts):
    """At the width of A14B, four blocks in FP8: the peak, and then a GPU that has no more than that beside the weights
    and half of core's reserve, where the allocator's pieces count as well."""
    import comfy.model_management as management

    specs, wan = kit.engine("models.specs"), kit.engine("models.wan")
    spec = dataclasses.replace(specs.T2V_A14B, num_layers=4)
    with torch.device("meta"):
        net = wan.build_model(spec)
    filled = {k: torch.randn(v.shape, dtype=torch.bfloat16) * 0.02 for k, v in net.state_dict().items()}
    net.load_state_dict(filled, assign=True)
    model = fp8(kit.bridge().build_model_patcher(net))
    hosted = model.model.diffusion_model
    settled()
    model.patch_model(CUDA)
    x = torch.randn(shape, device=CUDA, dtype=torch.bfloat16)
    t = torch.full(shape[:1], 500.0, device=CUDA)
    rows = [torch.randn(shape[0], 512, kit.TEXT_DIM, device=CUDA, dtype=torch.bfloat16) for _ in range(prompts)]

    def run():
        hosted.forget_run()
        for _ in range(2):
            for row in rows:
                hosted(x, t, row, transformer_options={})

    run()  # kernels are compiled, and the GEMM library has its workspace
    hosted.forget_run()
    gc.collect()
    torch.cuda.empty_cache()
    told, resting, held = (
        model.model.memory_required(shape),
        torch.cuda.memory_allocated(),
        torch.cuda.memory_reserved(),
    )
    torch.cuda.reset_peak_memory_stats()
    run()
    peak = torch.cuda.max_memory_allocated() - resting
    segments = torch.cuda.max_memory_reserved() - held
    print(f"peak {peak / 2**30:.2f} GiB, in segments {segments / 2**30:.2f}, told {told / 2**30:.2f}")
    assert peak <= told <= 1.6 * peak + 2**26
    hosted.forget_run()
    torch.cuda.empty_cache()
    room = held + told + management.extra_reserved_memory() // 2
    torch.cuda.set_per_process_memory_fraction(room / torch.cuda.mem_get_info()[1])
    try:
        run()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        hosted.forget_run()
        model.unpatch_model(torch.device("cpu"))
