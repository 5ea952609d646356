"""S2V-14B's transformer against core's where that follows the official code, else against closed forms.

Core (``comfy.ldm.wan.model.WanModel_S2V``) has other audio alignment (no lead-in before the clip) and other rotary
positions of the motion tokens. Its encoder and its packer are run here with both put right from the outside: what is
compared is everything else. The two that it has wrong are tested as written in Wan-Video/Wan2.2
``wan/modules/s2v/model_s2v.py`` and ``s2v_utils.py``.
"""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from test_model_parity import TOLERANCE, random_state, relative
from torch import Tensor

from wan_fp8.attention import Attention, AttentionCore, set_attention
from wan_fp8.errors import InputError
from wan_fp8.models.audio import AudioEncoder
from wan_fp8.models.blocks import ForwardOptions
from wan_fp8.models.functional import RopeOptions
from wan_fp8.models.s2v import S2VModel, token_positions
from wan_fp8.models.specs import SPECS, ModelSpec, Task
from wan_fp8.models.wan import build_model
from wan_fp8.quant import Recipe, apply_recipe

SPEC = ModelSpec(task=Task.S2V, dim=256, ffn_dim=384, num_heads=2, num_layers=5, in_dim=16, out_dim=16, text_dim=64)
FRAMES, ROWS, COLUMNS = 2, 16, 8
TIMESTEP = torch.tensor([900, 412])


@pytest.fixture(autouse=True)
def _inference():
    with torch.inference_mode():
        yield


def tiny(spec: ModelSpec = SPEC, dtype: torch.dtype = torch.float32) -> S2VModel:
    with torch.device("meta"):
        model = build_model(spec)
    state = random_state(model)
    state["casual_audio_encoder.weights"] = state["casual_audio_encoder.weights"].abs() + 0.1
    model.load_state_dict({name: value.to(dtype) for name, value in state.items()}, assign=True)
    assert isinstance(model, S2VModel)
    return model


@pytest.fixture(scope="module")
def model() -> S2VModel:
    return tiny()


def inputs(batch: int = 1, motion: int = 19, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)

    def randn(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, generator=generator).to(dtype)

    given = {
        "x": randn(16, FRAMES, ROWS, COLUMNS),
        "timestep": TIMESTEP[:batch],
        "context": randn(12, SPEC.text_dim),
        "audio_embed": randn(25, 1024, 4 * FRAMES),
        "reference_latent": randn(16, 1, ROWS, COLUMNS),
        "control_video": randn(16, FRAMES, ROWS, COLUMNS),
    }
    return given | ({"reference_motion": randn(16, motion, ROWS, COLUMNS)} if motion else {})


# ---- values ---------------------------------------------------------------------------------------------------------


def core_twin(ours: S2VModel):
    """Core's model with the lead-in of the audio and the positions of the motion tokens put right."""
    import comfy.ldm.wan.model
    import comfy.ops

    theirs = comfy.ldm.wan.model.WanModel_S2V(
        in_dim=16, dim=256, ffn_dim=SPEC.ffn_dim, num_heads=2, num_layers=SPEC.num_layers, text_dim=SPEC.text_dim,
        audio_inject_layers=[0, 4], operations=comfy.ops.disable_weight_init, dtype=torch.float32,
    )  # fmt: skip
    theirs.load_state_dict(ours.state_dict(), strict=True)
    encode, pack = theirs.casual_audio_encoder.forward, theirs.frame_packer.forward

    def with_lead_in(audio: Tensor) -> tuple[Tensor, Tensor]:
        whole, parts = encode(torch.cat([audio[..., :1]] * 73 + [audio], dim=-1))
        return whole[:, 19:], parts[:, 19:]

    def with_official_positions(motion: Tensor, rope_embedder) -> tuple[Tensor, Tensor]:
        tokens, freqs = pack(motion, rope_embedder)
        ids = torch.tensor(MOTION_POSITIONS, dtype=torch.float32)[None].expand(motion.shape[0], -1, -1)
        right = theirs.rope_embedder(ids).movedim(1, 2)
        assert right.shape[1:] == freqs.shape[1:]
        return tokens, right[: freqs.shape[0]]

    theirs.casual_audio_encoder.forward = with_lead_in
    theirs.frame_packer.forward = with_official_positions
    return theirs


MOTION_POSITIONS = [
    *((-1, row, column) for row in range(8) for column in range(4)),
    *((-3, row, column) for row in (0, 2, 4, 7) for column in (0, 3)),
    *((time, row, 0) for time in (-19, -14, -9, -4) for row in (0, 7)),
]
"""Of 16 x 8 latents (8 x 4 tokens), written out."""


@pytest.mark.parametrize("motion", [0, 19, 5])
@pytest.mark.parametrize("batch", [1, 2])
def test_core_agrees(comfy_core, model: S2VModel, batch: int, motion: int) -> None:
    values = inputs(batch, motion)
    assert relative(model(**values), core_twin(model)(**values)) < TOLERANCE


def test_core_agrees_without_reference_and_audio(comfy_core, model: S2VModel) -> None:
    values = {name: inputs()[name] for name in ("x", "timestep", "context", "control_video")}
    assert relative(model(**values), core_twin(model)(**values)) < TOLERANCE


def test_each_input_matters(model: S2VModel) -> None:
    values = inputs()
    full = model(**values)
    for name in ("audio_embed", "reference_latent", "reference_motion", "control_video"):
        without = {key: value for key, value in values.items() if key != name}
        assert relative(model(**without), full) > 1e-3, name


def test_no_pose_is_a_pose_of_zeros(model: S2VModel) -> None:
    values = inputs()
    zeros = model(**values | {"control_video": torch.zeros_like(values["control_video"])})
    del values["control_video"]
    assert torch.equal(model(**values), zeros)


def test_token_positions_are_the_official_ones() -> None:
    """Times 0.. for the video, 30 for the reference, and the motion's as written out above."""
    found = token_positions((2, 8, 4), (16, 8), 1, True, None)
    video = [(time, row, column) for time in (0, 1) for row in range(8) for column in range(4)]
    reference = [(30, row, column) for row in range(8) for column in range(4)]
    assert found.tolist() == [list(map(float, place)) for place in (*video, *reference, *MOTION_POSITIONS)]
    first_clip = token_positions((20, 44, 80), (88, 160), 1, False, None)
    later_clip = token_positions((20, 44, 80), (88, 160), 1, True, None)
    assert (len(first_clip), len(later_clip)) == (73_920, 79_200)
    assert len(token_positions((20, 28, 52), (56, 104), 1, True, None)) == 32_760
    moved = token_positions((2, 8, 4), (16, 8), 1, True, RopeOptions(shift_t=3.0))
    assert torch.equal(moved[64:], found[64:]) and torch.equal(moved[:64, 0], found[:64, 0] + 3)


def cropped(rows: int, columns: int) -> dict[str, Tensor]:
    return {k: v[..., :rows, :columns] if v.ndim == 5 else v for k, v in inputs().items()}


def test_latents_that_do_not_fill_a_coarse_patch(model: S2VModel) -> None:
    """14 rows are three patches of four and one of eight: official convolutions and grids round down."""
    lengths: list[int] = []
    hook = model.blocks[0].ffn[0].register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    assert model(**cropped(14, 8)).shape == (1, 16, FRAMES, 14, 8)
    hook.remove()
    assert lengths == [(FRAMES + 1) * 28 + 28 + 3 * 2 + 4 * 1 * 1]
    with pytest.raises(InputError, match="reference_motion needs latents of 8 rows and columns or more; got 14 x 6"):
        model(**cropped(14, 6))


def test_a_latent_frame_hears_its_four_video_frames_and_all_before() -> None:
    """Output j depends on audio frames up to 4 j + 3, and on none later."""
    with torch.device("meta"):
        encoder = AudioEncoder(128)
    encoder.load_state_dict(random_state(encoder), assign=True)
    encoder.weights.data.abs_().add_(0.1)
    audio = torch.randn(1, 25, 1024, 12, generator=torch.Generator().manual_seed(0))
    whole, parts = encoder(audio)
    assert whole.shape == (1, 3, 128) and parts.shape == (1, 3, 5, 128)
    heard = []
    for frame in range(12):
        changed = audio.clone()
        changed[..., frame] += 1
        other = encoder(changed)[1]
        heard.append([bool((other[:, j] != parts[:, j]).any()) for j in range(3)])
    first_heard_by = [row.index(True) for row in heard]
    assert first_heard_by == [frame // 4 for frame in range(12)]
    assert torch.equal(parts[:, :, 4], encoder.encoder.padding_tokens[0].expand(1, 3, -1))


def test_only_the_video_is_at_the_timestep(model: S2VModel) -> None:
    """Reference and motion tokens are modulated by timestep 0, whatever the video's is."""
    seen: list[tuple[Tensor, Tensor]] = []
    values = inputs(2)

    def look(tokens, state, stack):
        seen.append((state.modulation.rows, state.modulation.row_of_token))
        return stack(tokens, state)

    model.stack_wrappers["look"] = look
    model(**values)
    model(**values | {"timestep": torch.tensor([0, 0])})
    del model.stack_wrappers["look"]
    (rows, row_of_token), (zero, _) = seen
    video, rest = FRAMES * 32, 32 + 32 + 8 + 8
    assert row_of_token.tolist() == [[0] * video + [2] * rest, [1] * video + [2] * rest]
    assert relative(rows[2:], zero[:1]) < 1e-6 and relative(rows[:1], zero[:1]) > 1e-2


# ---- promises -------------------------------------------------------------------------------------------------------


def test_audio_is_encoded_once_for_all_steps(model: S2VModel) -> None:
    seen: list[int] = []
    hook = model.casual_audio_encoder.register_forward_pre_hook(lambda *_: seen.append(1))
    values = inputs()
    model.begin_run()
    first = model(**values)
    assert torch.equal(model(**values), first)
    model(**values | {"timestep": torch.tensor([100])})
    assert len(seen) == 1
    model(**values | {"audio_embed": values["audio_embed"] * 0})
    assert len(seen) == 2
    model.begin_run()
    model(**values)
    assert len(seen) == 3
    model(**values, options=ForwardOptions(cache_text=False))
    model(**values, options=ForwardOptions(cache_text=False))
    assert len(seen) == 5
    hook.remove()


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("motion", [0, 19])
def test_padding_changes_nothing(batch: int, motion: int) -> None:
    model = tiny(dtype=torch.float64)
    values = inputs(batch, motion, torch.float64)
    plain, lengths = model(**values), []
    model.blocks[4].ffn[0].register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    model.token_multiple = 128
    assert relative(model(**values), plain) < 1e-12
    assert lengths == [256 if motion else 128] and plain.shape == (batch, 16, FRAMES, ROWS, COLUMNS)


def test_every_attention_follows_the_setting(model: S2VModel) -> None:
    cores = [module for module in model.modules() if isinstance(module, AttentionCore)]
    assert len(cores) == 5 + 5 + 2
    values, used = inputs(), []
    plain = model(**values)
    set_attention(model, Attention("reference"))
    hooks = [core.register_forward_hook(lambda core, args, out: used.append(core)) for core in cores]
    assert relative(model(**values), plain) < 1e-5
    assert set(used) == set(cores) and len(used) == 12
    for hook in hooks:
        hook.remove()
    set_attention(model, None)


def test_bf16_is_near_and_not_exact() -> None:
    """Two-sided: an error below bf16 rounding would mean that another type was computed in."""
    model, given = tiny(), inputs()
    half = copy.deepcopy(model).bfloat16()
    exact = copy.deepcopy(half).float()
    ours = half(**given)
    assert ours.dtype == torch.float32
    assert 1e-3 < relative(ours, exact(**given)) < 5e-2


@pytest.mark.parametrize("name", ["rowwise", "Float8CurrentScaling"])
def test_recipes_convert_the_ten_linears_of_a_block(name: str) -> None:
    model, values = tiny(), inputs()
    plain = model(**values)
    apply_recipe(model, Recipe(name, backend="reference"))
    fp8 = [name for name, value in model.state_dict().items() if value.dtype == torch.float8_e4m3fn]
    assert len(fp8) == 5 * 10 and all(name.startswith("blocks.") for name in fp8)
    assert 1e-3 < relative(model(**values), plain) < 0.2


def test_every_parameter_is_read_through_the_door() -> None:
    model = tiny()
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
    model(**inputs())
    assert asked == returned == set(leaves)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"audio_embed": (1, 25, 1024, 7)}, r"audio_embed must be \[1, 25, 1024, 8\]"),
        ({"audio_embed": (1, 24, 1024, 8)}, "audio_embed must be"),
        ({"reference_latent": (1, 16, 1, 8, 8)}, "reference_latent must be .* as large as the video's latents"),
        ({"reference_motion": (1, 48, 19, 16, 8)}, "reference_motion must be"),
        ({"control_video": (1, 16, 3, 16, 8)}, r"control_video must be \[1, 16, 2, 16, 8\]"),
        ({"clip_fea": (1, 257, 1280)}, "take no CLIP vision features"),
        ({"pose_latents": (1, 16, 2, 16, 8)}, "s2v models take no input named pose_latents"),
    ],
)
def test_wrong_inputs_get_a_sentence(model: S2VModel, change: dict, words: str) -> None:
    with pytest.raises(InputError, match=words):
        model(**inputs() | {name: torch.zeros(shape) for name, shape in change.items()})


def test_the_released_size() -> None:
    with torch.device("meta"):
        model = build_model(SPECS["s2v-14B"])
    assert len(model.state_dict()) == 1260
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(16.296, abs=1e-3)
    assert len(model.audio_injector.injector) == 12
    with torch.device("meta"):
        assert len(build_model(dataclasses.replace(SPEC, num_layers=3)).audio_injector.injector) == 1
