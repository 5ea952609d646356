"""What the transformers of Animate-14B and S2V-14B have beside the common ones: names and shapes.

Source: Wan-Video/Wan2.2 ``wan/modules/animate/{model_animate,face_blocks,motion_encoder}.py``,
``wan/modules/s2v/{model_s2v,audio_utils,motioner}.py``.
"""

from __future__ import annotations

import itertools

from .transformer import HEAD_DIM, TransformerSize

Shapes = dict[str, tuple[int, ...]]

CLASSES = {"animate": "WanAnimateModel", "s2v": "WanModel_S2V"}
"""As ``config.json`` names them."""
INJECTED = (0, 4, 8, 12, 16, 20, 24, 27, 30, 33, 36, 39)
MOTION_CHANNELS = (32, 64, 128, 256, 512, 512, 512, 512)


def extras(task: str, size: TransformerSize) -> Shapes:
    """The further tensors of a task's transformer; none for tasks without."""
    return {"animate": _animate, "s2v": _s2v}[task](size) if task in CLASSES else {}


def _linear(out: Shapes, name: str, out_features: int, in_features: int, *kernel: int) -> None:
    out[f"{name}.weight"] = (out_features, in_features, *kernel)
    out[f"{name}.bias"] = (out_features,)


def _animate(size: TransformerSize) -> Shapes:
    d = size.dim
    out: Shapes = {}
    for i in range(size.num_layers):
        attention = f"blocks.{i}.cross_attn"
        _linear(out, f"{attention}.k_img", d, d)
        _linear(out, f"{attention}.v_img", d, d)
        out[f"{attention}.norm_k_img.weight"] = (d,)
    _linear(out, "pose_patch_embedding", d, 16, 1, 2, 2)
    for index, shape in ((0, (1280,)), (1, (1280, 1280)), (3, (d, 1280)), (4, (d,))):
        out[f"img_emb.proj.{index}.weight"] = shape
        out[f"img_emb.proj.{index}.bias"] = shape[:1]
    convs = "motion_encoder.enc.net_app.convs"
    out[f"{convs}.0.0.weight"] = (32, 3, 1, 1)
    out[f"{convs}.0.1.bias"] = (1, 32, 1, 1)
    for i, (a, b) in enumerate(itertools.pairwise(MOTION_CHANNELS), start=1):
        out[f"{convs}.{i}.conv1.0.weight"] = (a, a, 3, 3)
        out[f"{convs}.{i}.conv1.1.bias"] = (1, a, 1, 1)
        out[f"{convs}.{i}.conv2.1.weight"] = (b, a, 3, 3)
        out[f"{convs}.{i}.conv2.2.bias"] = (1, b, 1, 1)
        out[f"{convs}.{i}.skip.1.weight"] = (b, a, 1, 1)
    out[f"{convs}.8.weight"] = (512, 512, 4, 4)
    for i in range(5):
        _linear(out, f"motion_encoder.enc.fc.{i}", 512 if i < 4 else 20, 512)
    out["motion_encoder.dec.direction.weight"] = (512, 20)
    for i in range(size.num_layers // 5):
        fuser = f"face_adapter.fuser_blocks.{i}"
        _linear(out, f"{fuser}.linear1_kv", 2 * d, d)
        _linear(out, f"{fuser}.linear1_q", d, d)
        _linear(out, f"{fuser}.linear2", d, d)
        out[f"{fuser}.q_norm.weight"] = out[f"{fuser}.k_norm.weight"] = (HEAD_DIM,)
    out["face_encoder.padding_tokens"] = (1, 1, 1, d)
    _linear(out, "face_encoder.conv1_local.conv", 4096, 512, 3)
    _linear(out, "face_encoder.conv2.conv", 1024, 1024, 3)
    _linear(out, "face_encoder.conv3.conv", 1024, 1024, 3)
    _linear(out, "face_encoder.out_proj", d, 1024)
    return out


def _s2v(size: TransformerSize) -> Shapes:
    d = size.dim
    out: Shapes = {}
    _linear(out, "cond_encoder", d, 16, 1, 2, 2)
    audio = "casual_audio_encoder"
    out[f"{audio}.weights"] = (1, 25, 1, 1)
    out[f"{audio}.encoder.padding_tokens"] = (1, 1, 1, d)
    _linear(out, f"{audio}.encoder.conv1_local.conv", d, 1024, 3)
    _linear(out, f"{audio}.encoder.conv1_global.conv", d // 4, 1024, 3)
    _linear(out, f"{audio}.encoder.conv2.conv", d // 2, d // 4, 3)
    _linear(out, f"{audio}.encoder.conv3.conv", d, d // 2, 3)
    _linear(out, f"{audio}.encoder.final_linear", d, d)
    for j in range(sum(block < size.num_layers for block in INJECTED)):
        for name in "qkvo":
            _linear(out, f"audio_injector.injector.{j}.{name}", d, d)
        out[f"audio_injector.injector.{j}.norm_q.weight"] = (d,)
        out[f"audio_injector.injector.{j}.norm_k.weight"] = (d,)
        _linear(out, f"audio_injector.injector_adain_layers.{j}.linear", 2 * d, d)
    out["trainable_cond_mask.weight"] = (3, d)
    for name, step in (("proj", 1), ("proj_2x", 2), ("proj_4x", 4)):
        _linear(out, f"frame_packer.{name}", d, 16, step, 2 * step, 2 * step)
    return out
