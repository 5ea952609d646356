"""The transformers' stages: one model learns text and image to video together, then each expert its own noise levels.

The joint model has I2V's 36 input channels. Where no image is given, its 20 conditioning channels are zero, so that a
T2V model is the same one without those columns of the patch embedding. TI2V's one model stands apart: 48 channels,
and a timestep for each latent frame, so that a given first frame is told from noise by its timestep of 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from wan_fp8.models.blocks import ForwardOptions
from wan_fp8.models.specs import ModelSpec, Task
from wan_fp8.models.wan import WanModel, build_model
from wan_fp8.sampling import impose_first_frame, shift_sigmas

from .data import LatentPool
from .loop import Budget, Log, Trainer, batches

DROPPED = 0.1
"""Share of captions replaced by an unconditional text."""
BIASED_KERNELS = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
PLAIN_KERNELS = [SDPBackend.FLASH_ATTENTION, *BIASED_KERNELS]
PATCH = "patch_embedding.weight"
I2V_CHANNELS, CONDITION_CHANNELS = 36, 20


@dataclass(frozen=True, kw_only=True, slots=True)
class TransformerSize:
    """Width and depth of each expert."""

    dim: int = 256
    ffn_dim: int = 512
    num_layers: int = 4

    def spec(self, task: Task) -> ModelSpec:
        """As ``checkpoint.detect`` will find it."""
        return ModelSpec(
            task=task,
            dim=self.dim,
            ffn_dim=self.ffn_dim,
            num_heads=self.dim // 128,
            num_layers=self.num_layers,
            in_dim={Task.I2V: I2V_CHANNELS, Task.TI2V: 48}.get(task, 16),
            out_dim=48 if task is Task.TI2V else 16,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """One training of one transformer."""

    name: str
    task: Task
    budget: Budget
    low: float
    """Noise levels (sigma) that it learns: from here ..."""
    high: float
    """... to here."""
    image: float
    """Share of clips whose first frame is given."""
    rate: float = 1e-3
    warmup: int = 200
    """Steps over which the rate rises."""
    batch: int = 256
    shift: float = 4.0
    """Training's own: noise levels are drawn as an even grid warped by it."""
    log_every: int = 100
    graphs: bool = True
    compile: bool = False
    dtype: torch.dtype = torch.float32
    """What it computes in; weights are float32."""


def initial_weights(spec: ModelSpec, seed: int) -> dict[str, Tensor]:
    """As the published code initialises: Xavier matrices, zero biases, a head that answers zero."""
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in build_model(spec).state_dict().items()}
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in shapes.items():
        if name.endswith("modulation"):
            value = torch.randn(shape, generator=generator) * spec.dim**-0.5
        elif name.endswith("bias") or name == "head.head.weight":
            value = torch.zeros(shape)
        elif len(shape) == 1:
            value = torch.ones(shape)
        elif name.startswith(("text_embedding", "time_embedding")):
            value = torch.randn(shape, generator=generator) * 0.02
        else:
            bound = (6 / (shape[0] + shape[1:].numel())) ** 0.5
            value = (2 * torch.rand(shape, generator=generator) - 1) * bound
        weights[name] = value
    return weights


def without_image(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The T2V model in a joint one."""
    return {**weights, PATCH: weights[PATCH][:, :-CONDITION_CHANNELS].clone()}


def with_image(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A T2V model as one that could read an image and ignores it; an I2V model as it is."""
    patch = weights[PATCH]
    missing = I2V_CHANNELS - patch.shape[1]
    return {**weights, PATCH: F.pad(patch, (0, 0, 0, 0, 0, 0, 0, missing))}


def trainable(
    spec: ModelSpec, weights: Mapping[str, Tensor], device: torch.device, dtype: torch.dtype = torch.float32
) -> WanModel:
    """A model with float32 weights that computes in ``dtype``, through operations that have derivatives."""
    model = build_model(spec)
    model.load_state_dict({name: value.float() for name, value in weights.items()})
    model.to(device)
    model.fused_kernels = "eager"
    model.compute_dtype_override = dtype
    return model


def padded_attention(bias_B11L: Tensor) -> Callable[..., Tensor]:
    """An attention override for training: cross-attention, whose keys are fewer than the queries, gets the caption
    table's bias. Kernels are named, since not every one of torch's has a derivative under a bias."""

    def attend(own: Any, q: Tensor, k: Tensor, v: Tensor, heads: int, **kwargs: Any) -> Tensor:
        del own, kwargs
        split = [t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v)]
        mask, kernels = (None, PLAIN_KERNELS) if k.shape[1] == q.shape[1] else (bias_B11L, BIASED_KERNELS)
        with sdpa_kernel(kernels):
            return F.scaled_dot_product_attention(*split, attn_mask=mask).transpose(1, 2).flatten(2)

    return attend


def velocity(model: WanModel, pool: LatentPool, x: Tensor, sigma: Tensor, caption_B: Tensor) -> Tensor:
    """One forward as in sampling, on the caption table's short rows. ``sigma``: [B], or [B, F] per latent frame."""
    bias = pool.table.bias(caption_B, model.compute_dtype)
    tokens = x.shape[2] * x.shape[3] * x.shape[4] // 4
    assert bias.shape[-1] != tokens, "text rows and video tokens must differ in number to be told apart"
    options = ForwardOptions(cache_text=False, attention_override=padded_attention(bias))
    return model(x, 1000 * sigma, context=pool.table.rows_NLD[caption_B], options=options)


def with_first_frame(x: Tensor, sigma_B: Tensor, clean: Tensor, given_B: Tensor) -> tuple[Tensor, Tensor]:
    """TI2V's input and noise levels [B, F]: where ``given``, latent frame 0 is clean and has level 0.

    As ``wan_fp8.sampling`` does it at every step (``impose_first_frame``, ``ti2v_timesteps``); there, all clips of a
    batch are given their frame or none.
    """
    imposed = impose_first_frame(x, clean[:, :, :1])
    sigma_BF = sigma_B[:, None].repeat(1, x.shape[2])
    sigma_BF[:, 0] *= ~given_B
    return torch.where(given_B.view(-1, 1, 1, 1, 1), imposed, x), sigma_BF


def draw_sigmas(count: int, stage: Stage, generator: torch.Generator) -> Tensor:
    """Noise levels within the stage's interval."""
    ends = torch.tensor([stage.low, stage.high], dtype=torch.float64)
    low, high = (ends / (stage.shift - (stage.shift - 1) * ends)).tolist()  # the warp's inverse
    even = low + (high - low) * torch.rand(count, generator=generator, device=generator.device)
    return shift_sigmas(even, stage.shift)


def train_transformer(
    stage: Stage,
    size: TransformerSize,
    pool: LatentPool,
    *,
    seed: int,
    start: Mapping[str, Tensor] | None = None,
    state: Path | None = None,
) -> tuple[dict[str, Tensor], Log]:
    """Flow matching: the model learns ``noise - clean`` at ``(1 - sigma) clean + sigma noise``.

    Args:
        start: Weights to begin with instead of random ones.
        state: Where an interrupted training lies; it goes on there, and is left there.
    Returns:
        The averaged weights under official names in float32, and the losses.
    """
    device = pool.latents_NCFHW.device
    spec = size.spec(stage.task)
    model = trainable(spec, start or initial_weights(spec, seed), device, stage.dtype)
    trainer = Trainer(
        model,
        stage=stage.name,
        budget=stage.budget,
        rate=stage.rate,
        warmup=stage.warmup,
        log_every=stage.log_every,
        graphs=stage.graphs,
    )
    if state is not None and state.is_file():
        trainer.restore(state)
    generator = torch.Generator(device).manual_seed(seed)
    order = iter(batches(len(pool), min(stage.batch, len(pool)), seed, device))

    def loss_of(x: Tensor, sigma: Tensor, caption: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(velocity(model, pool, x, sigma, caption).float(), target)

    def loss_of_frames(x: Tensor, sigma_BF: Tensor, caption: Tensor, target: Tensor) -> Tensor:
        error = (velocity(model, pool, x, sigma_BF, caption).float() - target).square().mean((1, 3, 4))
        learned = (sigma_BF > 0).float()
        return (error * learned).sum() / learned.sum()

    loss = loss_of_frames if stage.task is Task.TI2V else loss_of
    compute = torch.compile(loss, dynamic=False) if stage.compile else loss
    for step, used in trainer.steps():
        index = next(order)
        clean = pool.latents_NCFHW[index].float()
        noise = torch.randn(clean.shape, generator=generator, device=device)
        sigma = draw_sigmas(len(index), stage, generator)
        at = sigma.view(-1, 1, 1, 1, 1)
        x = torch.lerp(clean, noise, at)
        if stage.task is Task.I2V:
            given = torch.rand(len(index), generator=generator, device=device) < stage.image
            x = torch.cat([x, pool.condition(index, given)], dim=1)
        elif stage.task is Task.TI2V:
            given = torch.rand(len(index), generator=generator, device=device) < stage.image
            x, sigma = with_first_frame(x, sigma, clean, given)
        caption = pool.captions(index, DROPPED, generator)
        trainer.learn(compute, (x, sigma, caption, noise - clean), step, used)
    if state is not None:
        trainer.save(state)
    return trainer.averaged(), trainer.log
