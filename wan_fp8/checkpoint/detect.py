"""What a weight file is, from its names, shapes and its own name; no weight is read.

Wan2.2 transformers are told apart by channels: 16 in and 16 out is T2V, 36 in (16 noisy + 4 mask + 16 image) without
an image embedder is I2V, 48 and 48 is TI2V; Animate and S2V have modules of their own. Two things tensors cannot tell:
the high-noise from the low-noise expert, and T2V-A14B from Wan2.1 T2V-14B. For those the name counts, and without a
name the answer is None, never a guess.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path

from torch import Tensor

from ..errors import CheckpointError
from ..models.specs import SPECS, ModelSpec, Task
from . import signatures
from .header import sniff
from .key_maps import DIT
from .naming import expert_from_name, version_from_name
from .quantized import RECIPE_KEY, Quantization, Storage, read_quantization
from .reader import open_source
from .signatures import Kind
from .tensors import TensorSource

HEAD_WIDTH = 128
"""Channels per attention head in every Wan model."""
ACCEPTED = "Wan2.2 T2V-A14B, I2V-A14B, TI2V-5B, Animate-14B and S2V-14B transformers"

_CHANNELS = {(16, 16): Task.T2V, (36, 16): Task.I2V, (48, 48): Task.TI2V}
_EXTENDED_CHANNELS = {Task.ANIMATE: (36, 16), Task.S2V: (16, 16)}
BLUR_KERNEL = re.compile(r"motion_encoder\..*\.kernel")
"""Blur kernels that official files carry beside Animate's weights: the same in every one."""
_LORA = re.compile(
    r"\.(lora_(up|down|mid|A|B)|lora\.(up|down)|lora_linear_layer|diff|diff_b|diff_m|lokr_w[12]|hada_w[12]|oft_blocks)"
    r"($|[._])|^lora_(unet|te|transformer)|^lycoris_"
)
_ADVICE = {
    Kind.LORA: "put it on top of a checkpoint with a LoRA loader",
    Kind.TEXT_ENCODER: "choose it as the text encoder instead",
    Kind.VAE: "choose it as the VAE instead",
    Kind.CLIP_VISION: "choose it as the CLIP vision model instead",
    Kind.AUDIO_ENCODER: "choose it as the audio encoder instead",
    Kind.GGUF: "use the .safetensors of the same model, or a GGUF loader node",
}


class Layout(StrEnum):
    """Whose names the tensors have."""

    OFFICIAL = "official"
    DIFFUSERS = "diffusers"
    HF = "hf"


@dataclass(frozen=True, slots=True)
class Detected:
    """What a file or folder of weights is."""

    kind: Kind
    label: str
    """With its article: "a Flux transformer"."""
    task: Task | None = None
    """Set for the transformers that this package runs."""
    layout: Layout | None = None
    spec: ModelSpec | None = None
    """Architecture, from shapes; None for everything but the transformers that this package runs."""
    expert: str | None = None
    """``high_noise`` or ``low_noise`` where the name says so; None does not mean that there is only one."""
    storage: Storage | None = None
    version: str | None = None
    """``2.1`` or ``2.2`` of a VAE."""
    details: tuple[str, ...] = ()
    prefix: str = ""
    """What stands before the model's own names."""
    quantization: Quantization | None = field(default=None, repr=False)

    @property
    def supported(self) -> bool:
        """Whether ``load_transformer`` takes it."""
        return self.spec is not None

    def require_transformer(self, label: str) -> ModelSpec:
        """The spec, or a CheckpointError saying what ``label`` is instead and where it belongs."""
        if self.spec is not None:
            return self.spec
        advice = _ADVICE.get(self.kind, "use the loader node made for it, such as ComfyUI's Load Diffusion Model")
        raise CheckpointError(f"{label} is {self.label}; this loader takes {ACCEPTED}: {advice}")


def inspect(source: str | Path | Mapping[str, Tensor] | TensorSource) -> Detected:
    """Say what a file, a folder of shards or a state dict is.

    Raises:
        CheckpointError: it is damaged, missing, or no weights at all (a GGUF file is an answer, not an error).
    """
    if isinstance(source, TensorSource):
        return detect(source)
    path = Path(source) if isinstance(source, str | Path) else None
    if path is not None and path.is_file() and sniff(path) == "gguf":
        return Detected(Kind.GGUF, "a GGUF file", expert=expert_from_name(path))
    with open_source(source) as opened:
        return detect(opened, path)


def detect(source: TensorSource, path: str | Path | None = None) -> Detected:
    """Like ``inspect``, for a source that is open. ``path`` lends its name to what tensors cannot tell."""
    names = source.tensors.keys()
    if any(_LORA.search(name) for name in names):
        return Detected(Kind.LORA, "a LoRA", expert=expert_from_name(path, source.metadata))
    for prefix in signatures.PREFIXES:
        if prefix + "head.modulation" in names:
            return _transformer(source, path, prefix, Layout.OFFICIAL)
        if prefix + "condition_embedder.time_proj.weight" in names:
            return _transformer(source, path, prefix, Layout.DIFFUSERS)
    return _text_encoder(source) or _vae(source) or _something_else(names)


def official_names(source: TensorSource, detected: Detected) -> dict[str, str]:
    """Official name -> stored name of every tensor of a transformer, in file order; scales and markers are left out.

    A stored name that has no official counterpart stands for itself, so that it shows up as unexpected.
    """
    extras = detected.quantization.extras if detected.quantization is not None else frozenset()
    found = {}
    for name in source:
        if not name.startswith(detected.prefix) or name in extras:
            continue
        bare = name.removeprefix(detected.prefix)
        if detected.task is Task.ANIMATE and BLUR_KERNEL.fullmatch(bare):
            continue
        official = DIT.to_official(bare) if detected.layout is Layout.DIFFUSERS else bare
        found[official or bare] = name
    return found


# ---- the Wan transformers ------------------------------------------------------------------------------------------


def _transformer(source: TensorSource, path: str | Path | None, prefix: str, layout: Layout) -> Detected:
    names = source.tensors.keys()
    expert = expert_from_name(path, source.metadata)
    quantization = read_quantization(source, [name for name in names if name.startswith(prefix)], prefix)
    relative = signatures.first_match(signatures.WAN_RELATIVES, names, (prefix,))
    label = None if relative is None else relative.label
    found = Detected(
        Kind.TRANSFORMER,
        label or "",
        layout=layout,
        expert=expert,
        storage=quantization.storage,
        prefix=prefix,
        quantization=quantization,
    )
    if label is not None:
        return found
    shapes = _Shapes(source, prefix, layout)
    task = next((task for task, shown in signatures.WAN_EXTENDED if shown.matches(names, prefix)), None)
    label = _other_wan(shapes, path) if task is None else _other_extended(shapes, task)
    if label is not None:
        return replace(found, label=label)
    spec = shapes.spec(task or _CHANNELS[shapes.in_dim, shapes.out_dim])
    details = _details(spec, expert, path, source, prefix)
    return replace(found, label=_label(spec, expert), task=spec.task, spec=spec, details=details)


class _Shapes:
    """The dimensions of a Wan transformer, read off tensor shapes under either naming scheme."""

    def __init__(self, source: TensorSource, prefix: str, layout: Layout) -> None:
        self._source, self._prefix, self._layout = source, prefix, layout
        patch = self._shape("patch_embedding.weight", 5)
        self.dim, self.in_dim, self.patch = patch[0], patch[1], patch[2:]
        rows = self._shape("head.head.weight", 2)[0]
        per_token = self.patch[0] * self.patch[1] * self.patch[2]
        self.out_dim = rows // per_token if per_token else 0

    def _stored(self, official: str) -> str:
        name = DIT.from_official(official) if self._layout is Layout.DIFFUSERS else official
        assert name is not None, official
        return self._prefix + name

    def has(self, official: str) -> bool:
        return self._stored(official) in self._source

    def _shape(self, official: str, rank: int) -> tuple[int, ...]:
        stored = self._stored(official)
        if stored not in self._source:
            raise CheckpointError(
                f"{self._source.label} is incomplete: it has no tensor named {stored}; this loader takes complete "
                f"{ACCEPTED}: download the file again"
            )
        info = self._source.info(stored)
        if len(info.shape) != rank or 0 in info.shape:
            raise CheckpointError(
                f"{self._source.label} is no Wan checkpoint that can be loaded: {stored} has shape "
                f"{list(info.shape)}, {rank} dimensions are needed; download the file again"
            )
        return info.shape

    def layers(self) -> int:
        pattern = re.compile(re.escape(self._prefix) + r"blocks\.(\d{1,6})\.")
        found = {int(match[1]) for name in self._source if (match := pattern.match(name))}
        missing = sorted(set(range(max(found, default=0) + 1)) - found)
        if missing:
            raise CheckpointError(
                f"{self._source.label} is incomplete: block {missing[0]} is missing; download it again"
            )
        return len(found)

    def spec(self, task: Task) -> ModelSpec:
        if self.dim % HEAD_WIDTH:
            raise CheckpointError(
                f"{self._source.label} has width {self.dim}; Wan2.2 transformers have a multiple of {HEAD_WIDTH} "
                "(one attention head): choose one of those"
            )
        return ModelSpec(
            task=task,
            dim=self.dim,
            ffn_dim=self._shape("blocks.0.ffn.0.weight", 2)[0],
            num_heads=self.dim // HEAD_WIDTH,
            num_layers=self.layers(),
            in_dim=self.in_dim,
            out_dim=self.out_dim,
            text_dim=self._shape("text_embedding.0.weight", 2)[1],
            freq_dim=self._shape("time_embedding.0.weight", 2)[1],
            patch_size=(self.patch[0], self.patch[1], self.patch[2]),
        )


def _other_wan(shapes: _Shapes, path: str | Path | None) -> str | None:
    """The label of a Wan transformer that is not one of Wan2.2's three; None for those."""
    channels = f"(its patch embedding takes {shapes.in_dim} channels)"
    if shapes.dim == 1536:
        return "a Wan2.1 1.3B transformer"
    if shapes.has("img_emb.proj.0.bias") or shapes.has("blocks.0.cross_attn.k_img.weight"):
        if shapes.in_dim == 36:
            return "a Wan2.1 I2V-14B transformer (it has a CLIP image embedder)"
        return f"a Wan2.1 Fun transformer {channels}"
    task = _CHANNELS.get((shapes.in_dim, shapes.out_dim))
    if task is None:
        if shapes.out_dim in (16, 48):
            return f"a Wan Fun control transformer {channels}"
        return f"a Wan transformer with {shapes.in_dim} input and {shapes.out_dim} output channels"
    if task is Task.T2V and version_from_name(path) == "2.1":
        return (
            "a Wan2.1 T2V-14B transformer by its name (its tensors are like those of Wan2.2: rename it if it is one of "
            "Wan2.2's experts)"
        )
    return None


def _other_extended(shapes: _Shapes, task: Task) -> str | None:
    """The label of an Animate or S2V transformer that is not Wan2.2's; None for that one."""
    channels = (shapes.in_dim, shapes.out_dim)
    if channels == _EXTENDED_CHANNELS[task] and not (task is Task.ANIMATE and shapes.layers() % 5):
        return None
    return (
        f"another model than Wan2.2's {task.upper()}-14B transformer (it has {channels[0]} input and {channels[1]} "
        f"output channels and {shapes.layers()} blocks)"
    )


def _label(spec: ModelSpec, expert: str | None) -> str:
    released = next((name for name, known in SPECS.items() if known == spec), None)
    what = (
        f"a Wan2.2 {released.upper()} transformer"
        if released
        else f"a Wan2.2 {spec.task.upper()} transformer ({spec.num_layers} layers of width {spec.dim})"
    )
    return what + (f", {expert.replace('_', '-')} expert" if expert else "")


def _details(
    spec: ModelSpec, expert: str | None, path: str | Path | None, source: TensorSource, prefix: str
) -> tuple[str, ...]:
    notes = []
    if spec.task.two_experts and expert is None:
        notes.append("tensors do not tell the high-noise from the low-noise expert, and the name says neither")
    if spec.task is Task.T2V and version_from_name(path) != "2.2":
        notes.append("tensors do not tell Wan2.2 T2V-A14B from Wan2.1 T2V-14B, and the name does not say 2.2")
    if RECIPE_KEY in source.metadata:
        notes.append(f"saved by this pack with the recipe {source.metadata[RECIPE_KEY][:200]}")
    outside = sum(not name.startswith(prefix) for name in source)
    if outside:
        notes.append(f"{outside} tensors outside {prefix}* belong to other models and are left out")
    return tuple(notes)


def require_expert_pair(high: Detected, low: Detected | None, label: str) -> None:
    """CheckpointError unless ``high`` and ``low`` are the two experts of one model, as T2V-A14B and I2V-A14B need.

    Args:
        high: what was chosen as high-noise expert.
        low: what was chosen as low-noise expert; None when nothing was. One-expert models need none.
        label: the name of the first file.
    """
    spec = high.require_transformer(label)
    if not spec.task.two_experts:
        if low is not None:
            raise CheckpointError(f"{label} is {high.label}, which has one expert; leave the low-noise file empty")
        return
    model = f"{spec.task.upper()}-A14B"
    if low is None:
        other = "high-noise" if high.expert == "low_noise" else "low-noise"
        raise CheckpointError(
            f"{label} is {high.label}, but {model} needs both experts; choose the {other} file as well"
        )
    if high.expert == "low_noise" and low.expert == "high_noise":
        raise CheckpointError(
            f"the experts of {model} are swapped: {label} is the low-noise one; exchange the two files"
        )
    if low.require_transformer("the low-noise file") != spec:
        raise CheckpointError(
            f"the experts do not belong together: {label} is {high.label}, the other is {low.label}; choose the "
            "high-noise and the low-noise file of one model"
        )
    if high.expert is not None and high.expert == low.expert:
        raise CheckpointError(
            f"both files are the {high.expert.replace('_', '-')} expert of {model}; choose one high-noise and one "
            "low-noise file"
        )


# ---- everything else -----------------------------------------------------------------------------------------------


def _text_encoder(source: TensorSource) -> Detected | None:
    names = source.tensors.keys()
    if "token_embedding.weight" in names and "blocks.0.attn.q.weight" in names:
        layout = Layout.OFFICIAL
    elif _is_umt5(names):
        layout = Layout.HF
    else:
        return None
    quantization = read_quantization(source, names)
    return Detected(
        Kind.TEXT_ENCODER,
        "a UMT5 text encoder",
        layout=layout,
        storage=quantization.storage,
        details=("its SentencePiece model is inside",) if "spiece_model" in names else (),
        quantization=quantization,
    )


def _is_umt5(names: Collection[str]) -> bool:
    """UMT5 has a relative position table in every layer, T5 in the first only."""
    table = "encoder.block.{}.layer.0.SelfAttention.relative_attention_bias.weight"
    if table.format(0) not in names or "encoder.block.0.layer.1.DenseReluDense.wi_1.weight" not in names:
        return False
    return table.format(1) in names or not any(name.startswith("encoder.block.1.") for name in names)


VAE_PREFIXES = ("", "model.", "vae.", "first_stage_model.")


def _vae(source: TensorSource) -> Detected | None:
    names = source.tensors.keys()
    for prefix in VAE_PREFIXES:
        if prefix + "decoder.middle.0.residual.0.gamma" in names:
            layout, nested = Layout.OFFICIAL, "decoder.upsamples.0.upsamples.0.residual.2.weight"
        elif prefix + "decoder.mid_block.resnets.0.norm1.gamma" in names:
            layout, nested = Layout.DIFFUSERS, "encoder.down_blocks.0.resnets.0.conv1.weight"
        else:
            continue
        version = "2.2" if prefix + nested in names else "2.1"
        quantization = read_quantization(source, [name for name in names if name.startswith(prefix)], prefix)
        return Detected(
            Kind.VAE,
            f"the Wan{version} VAE",
            layout=layout,
            storage=quantization.storage,
            version=version,
            prefix=prefix,
            quantization=quantization,
        )
    return None


def _something_else(names: Collection[str]) -> Detected:
    found = signatures.first_match((*signatures.PARTS, *signatures.FOREIGN), names)
    if found is not None:
        return Detected(found.kind, found.label)
    if not names:
        return Detected(Kind.OTHER, "a file without tensors")
    return Detected(Kind.OTHER, f"an unknown model ({len(names)} tensors, {next(iter(names))} for one)")
