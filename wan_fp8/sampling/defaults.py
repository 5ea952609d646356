"""Sampling defaults of the published command line, per task.

Source: Wan-Video/Wan2.2 ``wan/configs/{shared_config,wan_t2v_A14B,wan_i2v_A14B,wan_ti2v_5B,wan_animate_14B,
wan_s2v_14B}.py``, ``SUPPORTED_SIZES`` in ``wan/configs/__init__.py``, and ``--infer_frames`` of ``generate.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from ..models.specs import Task
from .schedules import SolverName

NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，"  # noqa: RUF001
    "最差质量，低质量，JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，"  # noqa: RUF001
    "画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，"  # noqa: RUF001
    "三条腿，背景人很多，倒着走"  # noqa: RUF001
)
"""The negative prompt that the models were tuned with (``sample_neg_prompt``). The published code also uses it when
given an empty one, so an empty negative prompt cannot be asked for there."""
S2V_NEGATIVE_PROMPT = (
    "画面模糊，最差质量，画面模糊，细节模糊不清，情绪激动剧烈，手快速抖动，字幕，丑陋的，残缺的，"  # noqa: RUF001
    "多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，"  # noqa: RUF001
    "静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"  # noqa: RUF001
)
"""The same for S2V-14B."""
ANIMATE_PROMPT = "视频中的人在做动作"
"""Animate-14B's prompt ("the person in the video makes movements"); the published code advises against others."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskDefaults:
    """What the published command line uses when nothing is given."""

    sizes: tuple[tuple[int, int], ...]
    """Published (width, height) in pixels, the default first. For tasks with an image they are areas: the image's
    aspect is kept."""
    frames: int
    """Of the video; of one segment for Animate, of one clip for S2V."""
    fps: int
    solver: SolverName
    steps: int
    shift: float
    guidance: tuple[float, float]
    """(low noise, high noise), the order of the published configs; the same twice for a model with one transformer."""
    boundary: float | None
    """Noise level, as a fraction of 1000, from which the high-noise expert runs; None for a model with one
    transformer."""
    negative_prompt: str = NEGATIVE_PROMPT

    @property
    def max_area(self) -> int:
        """Pixels of the default size."""
        width, height = self.sizes[0]
        return width * height


_A14B_SIZES = ((1280, 720), (720, 1280), (832, 480), (480, 832))

DEFAULTS: Mapping[Task, TaskDefaults] = MappingProxyType(
    {
        Task.T2V: TaskDefaults(
            sizes=_A14B_SIZES,
            frames=81,
            fps=16,
            solver="unipc",
            steps=40,
            shift=12.0,
            guidance=(3.0, 4.0),
            boundary=0.875,
        ),
        # The published code advises shift 3 for 480p; its own default stays 5.
        Task.I2V: TaskDefaults(
            sizes=_A14B_SIZES,
            frames=81,
            fps=16,
            solver="unipc",
            steps=40,
            shift=5.0,
            guidance=(3.5, 3.5),
            boundary=0.9,
        ),
        Task.TI2V: TaskDefaults(
            sizes=((1280, 704), (704, 1280)),
            frames=121,
            fps=24,
            solver="unipc",
            steps=50,
            shift=5.0,
            guidance=(5.0, 5.0),
            boundary=None,
        ),
        Task.ANIMATE: TaskDefaults(
            sizes=((1280, 720), (720, 1280)),
            frames=77,
            fps=30,
            solver="unipc",
            steps=20,
            shift=5.0,
            guidance=(1.0, 1.0),
            boundary=None,
        ),
        Task.S2V: TaskDefaults(
            sizes=((1280, 720), (720, 1280), (1280, 704), (704, 1280), (1024, 704), (704, 1024), *_A14B_SIZES[2:]),
            frames=80,
            fps=16,
            solver="unipc",
            steps=40,
            shift=3.0,
            guidance=(4.5, 4.5),
            boundary=None,
            negative_prompt=S2V_NEGATIVE_PROMPT,
        ),
    }
)
