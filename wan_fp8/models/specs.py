"""What a Wan2.2 transformer looks like, as data. ``checkpoint.detect`` fills a ModelSpec from tensor shapes.

Source: Wan-Video/Wan2.2 ``wan/configs/*.py``; shapes in the order that the official classes use.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from ..errors import InputError


class Task(StrEnum):
    """What a transformer was trained for. Values are the ``--model`` names of scripts and benchmarks."""

    T2V = "t2v"
    I2V = "i2v"
    TI2V = "ti2v"
    ANIMATE = "animate"
    S2V = "s2v"

    @property
    def two_experts(self) -> bool:
        """Whether one transformer works at high noise and another one at low noise."""
        return self in (Task.T2V, Task.I2V)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSpec:
    """Architecture of one transformer (one expert). Nothing has a default that could hide a wrong checkpoint."""

    task: Task
    dim: int
    """Model width D."""
    ffn_dim: int
    num_heads: int
    num_layers: int
    in_dim: int
    """Channels of the patch embedding's input, conditioning channels included."""
    out_dim: int
    """Latent channels of the returned velocity."""
    text_dim: int = 4096
    """Width of the text encoder's rows (UMT5-XXL)."""
    freq_dim: int = 256
    """Length of the sinusoidal timestep embedding."""
    patch_size: tuple[int, int, int] = (1, 2, 2)
    """Latent frames, rows and columns per token."""
    eps: float = 1e-6

    def __post_init__(self) -> None:
        if self.dim % self.num_heads:
            raise InputError(f"dim must be a multiple of num_heads; got dim {self.dim}, num_heads {self.num_heads}")
        if self.head_dim % 2:
            raise InputError(f"rotary embedding needs an even head width; got {self.head_dim}")

    @property
    def head_dim(self) -> int:
        """Channels per attention head E (128 in every released model)."""
        return self.dim // self.num_heads


T2V_A14B = ModelSpec(task=Task.T2V, dim=5120, ffn_dim=13824, num_heads=40, num_layers=40, in_dim=16, out_dim=16)
I2V_A14B = ModelSpec(task=Task.I2V, dim=5120, ffn_dim=13824, num_heads=40, num_layers=40, in_dim=36, out_dim=16)
TI2V_5B = ModelSpec(task=Task.TI2V, dim=3072, ffn_dim=14336, num_heads=24, num_layers=30, in_dim=48, out_dim=48)
ANIMATE_14B = ModelSpec(task=Task.ANIMATE, dim=5120, ffn_dim=13824, num_heads=40, num_layers=40, in_dim=36, out_dim=16)
S2V_14B = ModelSpec(task=Task.S2V, dim=5120, ffn_dim=13824, num_heads=40, num_layers=40, in_dim=16, out_dim=16)

SPECS: dict[str, ModelSpec] = {
    "t2v-A14B": T2V_A14B,
    "i2v-A14B": I2V_A14B,
    "ti2v-5B": TI2V_5B,
    "animate-14B": ANIMATE_14B,
    "s2v-14B": S2V_14B,
}
"""Released models by the names that the official command line uses."""
