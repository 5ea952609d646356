"""Animate-14B's transformer against diffusers' and core's, and what it promises besides its values.

Diffusers follows the official code (Wan-Video/Wan2.2 ``wan/modules/animate``) throughout. Core differs in one place:
before it orthogonalises the directions of motion it adds 1e-8 to the diagonal, officially to every entry. At 1e-5 that
does not show on random weights, so that both are asked for the same agreement.
"""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from test_model_parity import TOLERANCE, random_state, relative
from torch import Tensor

from wan_fp8 import Lora, remove_lora, set_lora
from wan_fp8.attention import Attention, AttentionCore, set_attention
from wan_fp8.checkpoint.load import load_transformer
from wan_fp8.errors import InputError
from wan_fp8.models.animate import AnimateModel
from wan_fp8.models.blocks import ForwardOptions
from wan_fp8.models.specs import SPECS, ModelSpec, Task
from wan_fp8.models.wan import build_model
from wan_fp8.quant import Recipe, apply_recipe

SPEC = ModelSpec(
    task=Task.ANIMATE, dim=256, ffn_dim=384, num_heads=2, num_layers=10, in_dim=36, out_dim=16, text_dim=64
)
TIMESTEP = torch.tensor([900, 412])


@pytest.fixture(autouse=True)
def _inference():
    with torch.inference_mode():
        yield


def random_weights(model: torch.nn.Module) -> dict[str, Tensor]:
    """Weights under which every part matters: those that are scaled by their fan-in in the forward have variance 1."""
    state = random_state(model)
    for name, value in state.items():
        if name.startswith("motion_encoder.") and name.endswith("weight"):
            state[name] = value / value.std()
        if name.endswith(("q_norm.weight", "k_norm.weight", "proj.0.weight", "proj.4.weight", "norm_k_img.weight")):
            state[name] = 1 + 0.2 * value
    return state


def tiny(spec: ModelSpec = SPEC) -> AnimateModel:
    with torch.device("meta"):
        model = build_model(spec)
    model.load_state_dict(random_weights(model), assign=True)
    assert isinstance(model, AnimateModel)
    return model


class MeanColour(torch.nn.Module):
    """In place of the motion encoder, which takes minutes in bf16 on a CPU."""

    def forward(self, faces: Tensor) -> Tensor:
        return faces.transpose(1, 2).flatten(3).std(3).repeat(1, 1, 171)[..., :512] - 0.5


@pytest.fixture(scope="module")
def model() -> AnimateModel:
    return tiny()


def inputs(batch: int = 1, frames: int = 2, faces: int = 1, text: int = 12) -> dict[str, Tensor]:
    """Latents of one reference and ``frames - 1`` video frames."""
    generator = torch.Generator().manual_seed(1)

    def randn(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, generator=generator)

    return {
        "x": randn(36, frames, 6, 8),
        "timestep": TIMESTEP[:batch],
        "context": randn(text, SPEC.text_dim),
        "clip_fea": randn(257, 1280),
        "pose_latents": randn(16, frames - 1, 6, 8),
        "face_pixel_values": randn(3, faces, 512, 512).clamp(-1, 1),
    }


@pytest.fixture(scope="module")
def given() -> dict[str, Tensor]:
    """The same tensors in every test: their faces are encoded once."""
    return inputs()


# ---- values ---------------------------------------------------------------------------------------------------------


def test_diffusers_agrees_and_its_names_load() -> None:
    """The face encoder by itself as well, over more frames than the motion encoder makes in a short time."""
    from diffusers.models.transformers.transformer_wan_animate import WanAnimateTransformer3DModel

    theirs = WanAnimateTransformer3DModel(
        num_attention_heads=2, attention_head_dim=128, text_dim=SPEC.text_dim, ffn_dim=SPEC.ffn_dim, num_layers=10,
        added_kv_proj_dim=256,
    ).eval()  # fmt: skip
    theirs.load_state_dict(random_weights(theirs))
    ours = load_transformer(theirs.state_dict(), dtype=torch.float32)
    assert isinstance(ours, AnimateModel) and ours.spec == SPEC
    values = inputs(text=512)
    expected = theirs(
        values["x"], values["timestep"], values["context"], values["clip_fea"], values["pose_latents"],
        values["face_pixel_values"], return_dict=False,
    )[0]  # fmt: skip
    assert relative(ours(**values), expected) < TOLERANCE
    motion = torch.randn(2, 9, 512, generator=torch.Generator().manual_seed(3))
    assert ours.face_encoder(motion).shape == (2, 3, 5, 256)
    assert relative(ours.face_encoder(motion), theirs.face_encoder(motion)) < TOLERANCE
    for name in ("pose_latents", "face_pixel_values"):
        without = {key: value for key, value in values.items() if key != name}
        assert relative(ours(**without), expected) > 1e-2, f"{name} matters"


def test_core_agrees(comfy_core, model: AnimateModel) -> None:
    import comfy.ldm.wan.model_animate
    import comfy.ops

    theirs = comfy.ldm.wan.model_animate.AnimateWanModel(
        in_dim=36, dim=256, ffn_dim=SPEC.ffn_dim, num_heads=2, num_layers=10, text_dim=SPEC.text_dim,
        operations=comfy.ops.disable_weight_init, dtype=torch.float32,
    )  # fmt: skip
    missing = theirs.load_state_dict(model.state_dict(), strict=False)
    assert not missing.unexpected_keys and len(missing.missing_keys) == 14
    assert all(name.endswith(".kernel") for name in missing.missing_keys)
    for name, buffer in theirs.named_buffers():
        if name.endswith(".kernel"):
            buffer.copy_(torch.tensor([1.0, 3.0, 3.0, 1.0]).outer(torch.tensor([1.0, 3.0, 3.0, 1.0])) / 64)
    values = inputs(batch=2)
    assert relative(model(**values), theirs(**values)) < TOLERANCE
    assert load_transformer(theirs.state_dict(), dtype=torch.float32).spec == SPEC, "blur kernels are left out"


def test_faces_that_end_early_count_as_none(comfy_core, model: AnimateModel) -> None:
    """As in core: the official code takes exactly as many as the video has."""
    import comfy.ldm.wan.model_animate
    import comfy.ops

    theirs = comfy.ldm.wan.model_animate.AnimateWanModel(
        in_dim=36, dim=256, ffn_dim=SPEC.ffn_dim, num_heads=2, num_layers=10, text_dim=SPEC.text_dim,
        operations=comfy.ops.disable_weight_init, dtype=torch.float32,
    )  # fmt: skip
    theirs.load_state_dict(model.state_dict(), strict=False)
    values = inputs(frames=4)
    values["pose_latents"] = values["pose_latents"][:, :, :2]
    assert relative(model(**values), theirs(**values)) < TOLERANCE
    del values["pose_latents"], values["face_pixel_values"]
    assert relative(model(**values), theirs(**values)) < TOLERANCE


# ---- promises -------------------------------------------------------------------------------------------------------


def test_faces_are_encoded_once_for_all_steps(model: AnimateModel, given: dict[str, Tensor]) -> None:
    seen: list[int] = []
    hooks = [
        model.motion_encoder.register_forward_pre_hook(lambda *_: seen.append(1)),
        model.img_emb.register_forward_pre_hook(lambda *_: seen.append(10)),
    ]
    model.begin_run()
    first = model(**given)
    assert torch.equal(model(**given | {"timestep": torch.tensor([900])}), first)
    assert relative(model(**given | {"timestep": torch.tensor([100])}), first) > 1e-3
    assert sorted(seen) == [1, 10]
    model(**given | {"clip_fea": given["clip_fea"] * 0.5})
    assert sorted(seen) == [1, 10, 10], "another image is another prompt"
    model.begin_run()
    model(**given)
    assert sorted(seen) == [1, 1, 10, 10, 10]
    model(**given, options=ForwardOptions(cache_text=False))
    model(**given, options=ForwardOptions(cache_text=False))
    assert sorted(seen) == [1] * 4 + [10] * 5
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("batch", [1, 2])
def test_padding_changes_nothing(model: AnimateModel, given: dict[str, Tensor], batch: int) -> None:
    values = {
        name: value if name == "face_pixel_values" else torch.cat([value, value.flip(-1)] * batch)[:batch]
        for name, value in given.items()
    }
    values["timestep"] = TIMESTEP[:batch]
    plain, lengths = model(**values), []
    hook = model.blocks[9].ffn[0].register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    model.token_multiple = 16
    assert relative(model(**values), plain) < 1e-6
    model.token_multiple = 1
    hook.remove()
    assert lengths == [32] and plain.shape == (batch, 16, 2, 6, 8)


def test_every_attention_follows_the_setting(model: AnimateModel, given: dict[str, Tensor]) -> None:
    cores = [module for module in model.modules() if isinstance(module, AttentionCore)]
    assert len(cores) == 10 + 10 + 2
    plain, used = model(**given), []
    set_attention(model, Attention("reference"))
    hooks = [core.register_forward_hook(lambda core, args, out: used.append(core)) for core in cores]
    assert relative(model(**given), plain) < 1e-5
    assert set(used) == set(cores) and len(used) == 10 + 2 * 10 + 2
    for hook in hooks:
        hook.remove()
    set_attention(model, None)


def test_bf16_is_near_and_not_exact(given: dict[str, Tensor]) -> None:
    """Two-sided: an error below bf16 rounding would mean that another type was computed in."""
    model = tiny(dataclasses.replace(SPEC, num_layers=5))
    model.motion_encoder = MeanColour()
    half = copy.deepcopy(model).bfloat16()
    exact = copy.deepcopy(half).float()
    ours = half(**given)
    assert ours.dtype == torch.float32
    assert 1e-3 < relative(ours, exact(**given)) < 5e-2


def test_a_live_lora_reaches_the_linears_outside_the_blocks(given: dict[str, Tensor]) -> None:
    """Beside the weights as merged into them; every linear has its branch in the type that it computes in."""
    model = tiny(dataclasses.replace(SPEC, num_layers=5))
    model.motion_encoder = MeanColour()
    generator, file = torch.Generator().manual_seed(5), {}
    for name in (
        "blocks.0.cross_attn.k_img",
        "img_emb.proj.1",
        "face_encoder.out_proj",
        "face_adapter.fuser_blocks.0.linear1_q",
    ):
        linear = model.get_submodule(name)
        file[f"diffusion_model.{name}.lora_A.weight"] = torch.randn(4, linear.in_features, generator=generator) / 16
        file[f"diffusion_model.{name}.lora_B.weight"] = torch.randn(linear.out_features, 4, generator=generator) / 4
    plain = model(**given)
    live = set_lora(model, Lora(file))(**given)
    half = copy.deepcopy(model).bfloat16()
    assert relative(half(**given), live) < 0.1
    remove_lora(model)
    for name in {key.split(".lora_")[0] for key in file}:
        weight = model.get_parameter(f"{name.removeprefix('diffusion_model.')}.weight")
        weight.add_(file[f"{name}.lora_B.weight"] @ file[f"{name}.lora_A.weight"])
    model.clear_text_cache()
    assert relative(live, model(**given)) < 1e-5 < 1e-3 < relative(live, plain)


@pytest.mark.parametrize("name", ["rowwise", "Float8CurrentScaling"])
def test_recipes_convert_the_ten_linears_of_a_block(given: dict[str, Tensor], name: str) -> None:
    model = tiny(dataclasses.replace(SPEC, num_layers=5))
    plain = model(**given)
    apply_recipe(model, Recipe(name, backend="reference"))
    fp8 = [name for name, value in model.state_dict().items() if value.dtype == torch.float8_e4m3fn]
    assert len(fp8) == 5 * 10 and not any("img" in name or "face" in name for name in fp8)
    assert 1e-3 < relative(model(**given), plain) < 0.2


def test_every_parameter_is_read_through_the_door(given: dict[str, Tensor]) -> None:
    model = tiny(dataclasses.replace(SPEC, num_layers=5))
    asked, returned = set(), set()

    class Recording:
        def fetch(self, module, like):
            asked.add(module)
            return module.weight.to(like.dtype), None if module.bias is None else module.bias.to(like.dtype), "ticket"

        def release(self, module, weight, bias, handle):
            assert handle == "ticket"
            returned.add(module)

    leaves = [m for m in model.modules() if "weight" in m._parameters]
    for leaf in leaves:
        leaf.weight_source = Recording()
    model(**given)
    assert asked == returned == set(leaves)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"clip_fea": None}, "connect CLIP vision"),
        ({"clip_fea": (1, 257, 1024)}, r"CLIP ViT-H rows \[1, 257, 1280\]"),
        ({"pose_latents": (1, 16, 1, 6, 10)}, "as large as the video's latents"),
        ({"face_pixel_values": (1, 3, 1, 256, 256)}, r"face_pixel_values must be \[1, 3, frames, 512, 512\]"),
        ({"audio_embed": (1, 25, 1024, 4)}, "animate models take no input named audio_embed"),
    ],
)
def test_wrong_inputs_get_a_sentence(model: AnimateModel, given: dict[str, Tensor], change: dict, words: str) -> None:
    changed = {name: shape if shape is None else torch.zeros(shape) for name, shape in change.items()}
    with pytest.raises(InputError, match=words):
        model(**given | changed)


def test_the_released_size() -> None:
    with torch.device("meta"):
        model = build_model(SPECS["animate-14B"])
        assert len(model.state_dict()) == 1441 - 14
        assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(17.275, abs=1e-3)
        with pytest.raises(InputError, match="a multiple of 5 blocks"):
            build_model(dataclasses.replace(SPEC, num_layers=6))
