"""Every LoRA format on our MODEL, by core's loader and by ours, against a float64 merge done by hand."""

from __future__ import annotations

import re

import bridge_kit as kit
import pytest
import torch

pytestmark = pytest.mark.usefixtures("comfy_core")

STRENGTH = 0.7


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield
    kit.unload_everything()


def to_diffusers(layer):
    key_maps = kit.engine("checkpoint.key_maps")
    return key_maps.DIT.from_official(f"{layer}.weight").removesuffix(".weight")


def flat(layer):
    return layer.replace(".", "_")


def half_flat(layer):
    """``blocks_0.self_attn.q``: the block's dot flattened, the others left."""
    return re.sub(r"^blocks\.(\d+)\.", r"blocks_\1.", layer)


ALPHA = 2.0  # with rank 4: factor 0.5

FORMATS = {
    "official": lambda n, d, u: {f"diffusion_model.{n}.lora_down.weight": d, f"diffusion_model.{n}.lora_up.weight": u},
    "peft": lambda n, d, u: {f"diffusion_model.{n}.lora_A.weight": d, f"diffusion_model.{n}.lora_B.weight": u},
    "bare": lambda n, d, u: {f"{n}.lora_A.weight": d, f"{n}.lora_B.weight": u},
    "adapter name": lambda n, d, u: {f"{n}.lora_A.default.weight": d, f"{n}.lora_B.default.weight": u},
    "kohya": lambda n, d, u: {
        f"lora_unet_{flat(n)}.lora_down.weight": d,
        f"lora_unet_{flat(n)}.lora_up.weight": u,
        f"lora_unet_{flat(n)}.alpha": torch.tensor(ALPHA),
    },
    "wan-fun kohya": lambda n, d, u: {
        f"lora_unet__{flat(n)}.lora_down.weight": d,
        f"lora_unet__{flat(n)}.lora_up.weight": u,
        f"lora_unet__{flat(n)}.alpha": torch.tensor(ALPHA),
    },
    "half-converted": lambda n, d, u: {
        f"lora_unet_{half_flat(n)}.lora_down.weight": d,
        f"lora_unet_{half_flat(n)}.lora_up.weight": u,
    },
    "diffusers": lambda n, d, u: {
        f"transformer.{to_diffusers(n)}.lora_A.weight": d,
        f"transformer.{to_diffusers(n)}.lora_B.weight": u,
    },
    "diffusers peft": lambda n, d, u: {
        f"base_model.model.{to_diffusers(n)}.lora_A.weight": d,
        f"base_model.model.{to_diffusers(n)}.lora_B.weight": u,
    },
}
CORES = ("official", "peft", "kohya")
"""What core's own loader understands."""


def file_of(form, pairs):
    file = {}
    for layer, (down, up) in pairs.items():
        file |= FORMATS[form](layer, down, up)
    return file


def merged_by_hand(pairs, factor, diffs=None, seed=0):
    """A plain MODEL whose weights were merged in float64 before it was built."""
    weights = {k: v.double() for k, v in kit.core_weights(seed=seed).items()}
    for layer, (down, up) in pairs.items():
        weights[f"{layer}.weight"] += factor * up.double() @ down.double()
    for name, value in (diffs or {}).items():
        weights[name] += STRENGTH * value.double()
    net = kit.own_net(seed=seed)
    net.load_state_dict({k: v.float() for k, v in weights.items()}, assign=True)
    return kit.bridge().build_model_patcher(net)


def lowvram(model):
    """The MODEL with every weight cast, and patched, for each forward."""
    clone = model.clone()
    load = type(clone).load
    clone.load = lambda device, **kw: load(clone, device, lowvram_model_memory=1)
    return clone


@pytest.mark.parametrize("form", FORMATS)
def test_our_loader_reads_every_format(form):
    bridge, model = kit.bridge(), kit.own_model()
    pairs = kit.lora_pairs(kit.core_weights())
    factor = STRENGTH * (ALPHA / 4 if "kohya" in form else 1)
    expected = kit.ksample(merged_by_hand(pairs, factor))
    plain, before = kit.ksample(model), kit.state_bytes(model)
    assert kit.distance(expected, plain) > 0.05
    result = bridge.load_lora(model, file_of(form, pairs), STRENGTH)
    assert result.changed == len(pairs) == 20 and result.notes == ()
    assert kit.distance(kit.ksample(result.model), expected) < 1e-5
    assert kit.distance(kit.ksample(lowvram(result.model)), expected) < 1e-5
    assert torch.equal(kit.ksample(model), plain)
    kit.unload_everything()
    assert kit.same_bytes(before, kit.state_bytes(model))


@pytest.mark.parametrize("form", CORES)
@pytest.mark.parametrize("seed", [0, 1], ids=["high", "low"])
def test_cores_loader_on_both_experts(form, seed, tmp_path):
    """Through the node itself, from a file."""
    import folder_paths
    from safetensors.torch import save_file

    import nodes

    model = kit.own_model(seed=seed)
    pairs = kit.lora_pairs(kit.core_weights(seed=seed), seed=5 + seed)
    save_file(file_of(form, pairs), str(tmp_path / f"{form}_{seed}.safetensors"))
    folder_paths.add_model_folder_path("loras", str(tmp_path))
    with_lora = nodes.LoraLoaderModelOnly().load_lora_model_only(model, f"{form}_{seed}.safetensors", STRENGTH)[0]
    expected = kit.ksample(merged_by_hand(pairs, STRENGTH * (ALPHA / 4 if form == "kohya" else 1), seed=seed))
    assert kit.distance(kit.ksample(with_lora), expected) < 1e-5
    assert kit.distance(kit.ksample(lowvram(with_lora)), expected) < 1e-5
    again = nodes.LoraLoaderModelOnly().load_lora_model_only(model, f"{form}_{seed}.safetensors", 0.2)[0]
    assert kit.distance(kit.ksample(again), kit.ksample(with_lora)) > 1e-2, "strength is live"


def adapters():
    """One file for each kind of adapter that core reads beside LoRA."""
    generator = torch.Generator().manual_seed(8)

    def r(*shape):
        return torch.randn(*shape, generator=generator) * 0.2

    q, name = "diffusion_model.blocks.0.self_attn.q", "diffusion_model.blocks.1.ffn.0"
    return {
        "dora": {f"{q}.lora_A.weight": r(4, 128), f"{q}.lora_B.weight": r(128, 4), f"{q}.dora_scale": 1 + r(128, 1)},
        "loha": {f"{name}.hada_w{i}_{s}": r(*((256, 4) if s == "a" else (4, 128))) for i in (1, 2) for s in "ab"},
        "lokr": {f"{name}.lokr_w1": r(16, 8), f"{name}.lokr_w2": r(16, 16)},
        "set_weight": {f"{q}.set_weight": r(128, 128)},
        "diff": {f"{q}.diff": r(128, 128), f"{q}.diff_b": r(128), "diffusion_model.head.head.diff": r(64, 128)},
    }


@pytest.mark.parametrize("kind", ["dora", "loha", "lokr", "set_weight", "diff"])
def test_every_adapter_of_core_does_what_it_does_to_cores_model(kind):
    file = adapters()[kind]
    core, ours = kit.core_model(), kit.own_model()
    expected = kit.ksample(kit.with_core_lora(core, file))
    assert kit.distance(expected, kit.ksample(core)) > 1e-3
    with_it = kit.with_core_lora(ours, file)
    assert kit.distance(kit.ksample(with_it), expected) < 1e-5
    assert kit.distance(kit.ksample(lowvram(with_it)), expected) < 1e-5


def full_rank_extras():
    """What distilled LoRAs carry beside their pairs."""
    generator = torch.Generator().manual_seed(9)
    shapes = {name: value.shape for name, value in kit.core_weights().items()}
    names = [
        "blocks.0.modulation",
        "blocks.1.modulation",
        "head.modulation",
        "head.head.weight",
        "head.head.bias",
        "patch_embedding.weight",
        "blocks.0.norm3.weight",
        "blocks.0.norm3.bias",
        "blocks.1.self_attn.norm_q.weight",
        "time_projection.1.bias",
        "text_embedding.0.weight",
    ]
    return {name: 0.05 * torch.randn(shapes[name], generator=generator) for name in names}


def as_keys(diffs):
    keys = {}
    for name, value in diffs.items():
        stem, _, kind = name.rpartition(".")
        keys["diffusion_model." + stem + {"weight": ".diff", "bias": ".diff_b", "modulation": ".diff_m"}[kind]] = value
    return keys


@pytest.mark.parametrize("name", ["all", "modulation"])
def test_full_rank_extras(name):
    bridge, model = kit.bridge(), kit.own_model()
    diffs = full_rank_extras()
    if name == "modulation":
        diffs = {k: v for k, v in diffs.items() if "modulation" in k}
    plain, before = kit.ksample(model), kit.state_bytes(model)
    expected = kit.ksample(merged_by_hand({}, 0, diffs))
    assert kit.distance(expected, plain) > 1e-2
    result = bridge.load_lora(model, as_keys(diffs), STRENGTH)
    assert result.changed == len(diffs)
    assert kit.distance(kit.ksample(result.model), expected) < 1e-5
    assert kit.distance(kit.ksample(lowvram(result.model)), expected) < 1e-5
    kit.unload_everything()
    assert kit.same_bytes(before, kit.state_bytes(model))


def test_pairs_extras_and_a_second_lora_add_up():
    bridge, model = kit.bridge(), kit.own_model()
    weights = kit.core_weights()
    pairs, more, diffs = kit.lora_pairs(weights, seed=5), kit.lora_pairs(weights, seed=6), full_rank_extras()
    first = bridge.load_lora(model, {**file_of("diffusers", pairs), **as_keys(diffs)}, STRENGTH).model
    both = bridge.load_lora(first, file_of("kohya", more), 1.0).model
    by_hand = merged_by_hand(pairs, STRENGTH, diffs)
    net = by_hand.model.diffusion_model
    for layer, (down, up) in more.items():
        weight = net.get_parameter(f"{layer}.weight")
        weight.data = (weight.double() + 0.5 * up.double() @ down.double()).float()
    expected = kit.ksample(by_hand)
    assert kit.distance(kit.ksample(both), expected) < 1e-5
    assert kit.distance(kit.ksample(first), expected) > 1e-2
    taken_back = bridge.load_lora(both, file_of("kohya", more), -1.0).model
    assert kit.distance(kit.ksample(taken_back), kit.ksample(first)) < 1e-5


@pytest.mark.parametrize("form", ["scaled_fp8", "fp8", "mixed"])
def test_on_fp8(form):
    bridge, core = kit.bridge(), kit.quantised_core_model(form)
    model = bridge.fork(core)
    before, plain = kit.state_bytes(model), kit.ksample(model)
    pairs, diffs = kit.lora_pairs(kit.core_weights()), full_rank_extras()
    exact = kit.ksample(merged_by_hand(pairs, STRENGTH, diffs))
    with_lora = bridge.load_lora(model, {**file_of("bare", pairs), **as_keys(diffs)}, STRENGTH).model
    full, on_the_fly = kit.ksample(with_lora), kit.ksample(lowvram(with_lora))
    assert kit.distance(full, exact) < 0.12 and kit.distance(on_the_fly, exact) < 0.12
    assert kit.distance(plain, exact) > 0.15
    assert torch.equal(kit.ksample(model), plain)
    assert torch.equal(kit.ksample(with_lora), full)
    kit.unload_everything()
    assert kit.same_bytes(before, kit.state_bytes(model))


def test_merge_error_of_one_fp8_weight():
    """One rounding of the exact merge, from the FP8 values; and from a high-precision source where there is one."""
    layers = kit.engine("models.layers")
    generator = torch.Generator().manual_seed(0)
    exact, change = (torch.randn(96, 128, generator=generator) for _ in range(2))
    change *= 0.2
    scale = exact.abs().amax(1, keepdim=True) / 448
    linear = layers.Linear(128, 96)
    linear.weight = torch.nn.Parameter((exact / scale).to(torch.float8_e4m3fn), requires_grad=False)
    linear.weight_scale = torch.nn.Parameter(scale, requires_grad=False)
    stored = linear.weight

    def merge():
        linear.set_weight(linear.convert_weight(linear.weight.float(), inplace=True) + change)
        return kit.distance(linear.dequantized(linear.weight, torch.float32), exact + change)

    assert merge() < 0.04
    saved = linear.state_dict()
    real = saved["weight"].float() * saved["weight_scale"]
    assert torch.equal(real, linear.dequantized(linear.weight, torch.float32)), "a saved merge carries its own scale"
    linear.weight = stored  # what core's backup does
    assert kit.distance(linear.dequantized(linear.weight, torch.float32), exact) < 0.03
    linear.source = exact
    assert merge() < 0.028
    linear.weight = stored
    linear.set_weight(exact + change, inplace_update=True)
    assert linear.weight is stored and linear.current_scale() is linear.weight_scale
    assert kit.distance(linear.dequantized(linear.weight, torch.float32), exact + change) < 0.05


def test_two_experts_in_one_diffusers_file():
    bridge, errors = kit.bridge(), kit.engine("errors")
    high, low = (kit.lora_pairs(kit.core_weights(), seed=s) for s in (5, 6))
    file = file_of("diffusers", high)
    file |= {k.replace("transformer.", "transformer_2."): v for k, v in file_of("diffusers", low).items()}
    model = kit.own_model()
    for pairs, expert in ((high, "high_noise"), (low, "low_noise")):
        with_lora = bridge.load_lora(model, file, STRENGTH, expert=expert).model
        assert kit.distance(kit.ksample(with_lora), kit.ksample(merged_by_hand(pairs, STRENGTH))) < 1e-5
    with pytest.raises(errors.InputError, match="both experts"):
        bridge.load_lora(model, file, STRENGTH)


def test_cores_model_is_forked_and_what_does_not_fit_is_said(caplog):
    bridge, core = kit.bridge(), kit.core_model()
    plain = kit.ksample(core)
    pairs = kit.lora_pairs(kit.core_weights())
    file = {
        **file_of("official", pairs),
        "diffusion_model.blocks.0.cross_attn.k_img.lora_down.weight": torch.zeros(4, 128),
        "diffusion_model.blocks.0.cross_attn.k_img.lora_up.weight": torch.zeros(128, 4),
        "diffusion_model.patch_embedding.diff": torch.zeros(128, 36, 1, 2, 2),
        "diffusion_model.blocks.0.modulation.diff": torch.full((1, 6, 128), 0.1),
    }
    result = bridge.load_lora(core, file, 1.0)
    assert bridge.is_hosted(result.model) and not bridge.is_hosted(core)
    assert len(result.notes) == 2 and all(note in caplog.text for note in result.notes)
    assert "image branch" in result.notes[0] and "patch embedding" in result.notes[1]
    core_result = kit.ksample(kit.with_core_lora(core, file))  # core passes over the modulation
    assert kit.distance(kit.ksample(result.model), core_result) > 1e-3
    assert torch.equal(kit.ksample(core), plain)


def test_strength_zero_changes_nothing():
    model = kit.own_model()
    result = kit.bridge().load_lora(model, file_of("bare", kit.lora_pairs(kit.core_weights())), 0.0)
    assert result.changed == 0 and result.model.patches == {}


def test_loras_of_other_models_are_refused():
    bridge, errors, model = kit.bridge(), kit.engine("errors"), kit.own_model()
    wrong = {
        "blocks.0.self_attn.q.lora_A.weight": torch.zeros(4, 64),
        "blocks.0.self_attn.q.lora_B.weight": torch.zeros(64, 4),
    }
    with pytest.raises(errors.CheckpointError, match="another model"):
        bridge.load_lora(model, wrong)
    with pytest.raises(errors.CheckpointError, match="no LoRA of a Wan transformer"):
        bridge.load_lora(model, kit.core_weights())
