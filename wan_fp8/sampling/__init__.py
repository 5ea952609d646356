"""Schedules, solvers, experts, sizes and defaults: everything about sampling that needs no model."""

from __future__ import annotations

from .conditioning import (
    cover_crop_image,
    frame_mask,
    i2v_condition,
    i2v_mask,
    i2v_video,
    impose_first_frame,
    stretch_image,
    ti2v_mask,
    ti2v_timesteps,
)
from .defaults import DEFAULTS, NEGATIVE_PROMPT, TaskDefaults
from .experts import Expert, PlannedStep, high_noise_steps, plan_steps
from .schedules import SOLVER_NAMES, TRAIN_TIMESTEPS, SolverName, shift_sigmas, sigmas, timesteps
from .sizes import (
    LAYOUTS,
    LatentLayout,
    check_frames,
    check_size,
    i2v_size,
    latent_frames,
    latent_shape,
    ti2v_size,
    token_count,
)
from .solvers import SOLVERS, DPMpp, Euler, Solver, UniPC, make_solver

__all__ = [
    "DEFAULTS",
    "LAYOUTS",
    "NEGATIVE_PROMPT",
    "SOLVERS",
    "SOLVER_NAMES",
    "TRAIN_TIMESTEPS",
    "DPMpp",
    "Euler",
    "Expert",
    "LatentLayout",
    "PlannedStep",
    "Solver",
    "SolverName",
    "TaskDefaults",
    "UniPC",
    "check_frames",
    "check_size",
    "cover_crop_image",
    "frame_mask",
    "high_noise_steps",
    "i2v_condition",
    "i2v_mask",
    "i2v_size",
    "i2v_video",
    "impose_first_frame",
    "latent_frames",
    "latent_shape",
    "make_solver",
    "plan_steps",
    "shift_sigmas",
    "sigmas",
    "stretch_image",
    "ti2v_mask",
    "ti2v_size",
    "ti2v_timesteps",
    "timesteps",
    "token_count",
]
