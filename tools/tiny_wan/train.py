#!/usr/bin/env python3
"""Train a tiny Wan2.2 on a drawn world: VAE, T2V and I2V experts, measured at the end. Minutes on one H100.

    python tools/tiny_wan/train.py all --minutes 7 --out build/tiny_wan
    python tools/tiny_wan/train.py assemble build/tiny_wan models/wan/Wan2.2-T2V-A14B-tiny --task t2v

``all`` runs the stages in order; each can be run alone (``text``, ``vae``, ``joint``, ``experts``, ``evaluate``)
on what the earlier ones left in ``--out``. A stage that was stopped (SIGTERM) goes on with ``--resume``.
``--start-from`` takes the weights of an earlier training as a start.
"""

from __future__ import annotations

import datetime
import platform
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tiny_wan  # noqa: F401  (puts the engine within reach)
from tiny_wan import package
from tiny_wan.autoencoder import VAEOptions, measure_vae, train_vae
from tiny_wan.data import LatentPool, encode_pool, make_pool
from tiny_wan.evaluate import SampleOptions, choose_scenes, contact_sheet, evaluate_i2v, evaluate_t2v
from tiny_wan.loop import Budget, Log, stop_on_signal, stopping
from tiny_wan.text import make_encoder, open_encoder
from tiny_wan.transformer import Stage, TransformerSize, train_transformer, without_image
from tiny_wan.world import WorldSize
from wan_fp8 import Attention, load_transformer, set_attention
from wan_fp8.models.specs import Task
from wan_fp8.models.text_encoder import TextEncoder
from wan_fp8.models.vae import WanVAE, load_vae

SHARES = {
    "vae": 0.25,
    "joint": 0.35,
    "t2v_high_noise": 0.09,
    "t2v_low_noise": 0.14,
    "i2v_high_noise": 0.06,
    "i2v_low_noise": 0.11,
}
"""Of the minutes that ``all`` is given."""
INTERVALS = {
    "t2v_high_noise": (0.855, 1.0),
    "t2v_low_noise": (0.0, 0.895),
    "i2v_high_noise": (0.88, 1.0),
    "i2v_low_noise": (0.0, 0.92),
}
"""Noise levels of each expert: its side of the published boundary (0.875, 0.9), and 0.02 beyond."""
EXPERT_RATE = 4e-4

app = typer.Typer(add_completion=False, no_args_is_help=True)


@dataclass
class Run:
    """What every stage shares."""

    out: Path
    work: Path
    device: torch.device
    seed: int
    size: WorldSize
    model: TransformerSize
    clips: int
    batch: int
    vae_batch: int
    log_every: int
    resume: bool
    start_from: Path | None
    card: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        self.card = package.read_card(self.out)
        self.card.setdefault("stages", {})
        self.card |= {
            "license": "Apache-2.0",
            "data": (
                f"{self.clips} clips of {self.size.width}x{self.size.height}, {self.size.frames} frames, drawn by "
                "tools/tiny_wan/world.py; a fifth of the combinations of colour, shape and motion held out"
            ),
            "seed": self.seed,
            "model": {"dim": self.model.dim, "ffn_dim": self.model.ffn_dim, "layers": self.model.num_layers},
            "hardware": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else platform.machine(),
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "date": datetime.date.today().isoformat(),
            "command": " ".join(sys.argv[1:]),
            "started_from": None if self.start_from is None else str(self.start_from),
        }

    def state(self, stage: str) -> Path:
        """Where a stage keeps what it needs to go on. Without ``--resume`` an old one is removed."""
        path = self.work / f"{stage}.pt"
        if not self.resume:
            path.unlink(missing_ok=True)
        return path

    def start(self, name: str) -> dict[str, torch.Tensor] | None:
        """Weights that ``--start-from`` offers."""
        path = None if self.start_from is None else self.start_from / name
        return package.read_weights(path) if path is not None and path.is_file() else None

    def note(self, stage: str, log: Log, began: float, **facts: Any) -> None:
        """Put a stage on the card, and the card on disk."""
        last = log.losses[-1][2] if log.losses else None
        self.card["stages"][stage] = {
            "steps": log.steps,
            "seconds": round(log.seconds, 1),
            "seconds_in_all": round(time.perf_counter() - began, 1),
            "loss": last,
            **facts,
            "losses": _thinned(log.losses),
        }
        package.write_card(self.out, self.card)

    def vae(self) -> WanVAE:
        return load_vae(package.read_weights(self.out / package.VAE_FILE), torch.float32, self.device)

    def encoder(self) -> TextEncoder:
        return open_encoder(package.read_weights(self.out / package.TEXT_FILE), self.device)

    def latents(self) -> LatentPool:
        began = time.perf_counter()
        pool = make_pool(self.clips, self.size, seed=self.seed, held_out=False, device=self.device)
        latents = encode_pool(pool, self.size, self.vae(), self.encoder())
        print(
            f"{len(latents)} clips encoded in {time.perf_counter() - began:.1f} s, "
            f"latents {tuple(latents.latents_NCFHW.shape)}, caption rows {tuple(latents.table.rows_NLD.shape)}",
            flush=True,
        )
        return latents


def _thinned(losses: list[list[float]], most: int = 120) -> list[list[float]]:
    """Enough points for a curve."""
    every = max(1, -(-len(losses) // most))
    return losses[::every] + (losses[-1:] if losses and (len(losses) - 1) % every else [])


def run_text(run: Run) -> None:
    """The text encoder: random, with a tokenizer of the world's words."""
    package.write_weights(run.out / package.TEXT_FILE, run.start(package.TEXT_FILE) or make_encoder(run.seed))


def run_vae(run: Run, budget: Budget) -> None:
    """The VAE."""
    began = time.perf_counter()
    pool = make_pool(run.clips, run.size, seed=run.seed, held_out=False, device=run.device)
    options = VAEOptions(budget=budget, batch=run.vae_batch, log_every=run.log_every)
    start = run.start(package.VAE_FILE)
    weights, log = train_vae(pool.clips, run.size, options, seed=run.seed, start=start, state=run.state("vae"))
    package.write_weights(run.out / package.VAE_FILE, weights)
    unseen = make_pool(min(256, run.clips), run.size, seed=run.seed + 1, held_out=True, device=run.device)
    quality = measure_vae(run.vae(), unseen.clips, run.size)
    print(f"vae on held-out clips: {quality}", flush=True)
    run.note("vae", log, began, batch=run.vae_batch, held_out=quality)


def run_joint(run: Run, budget: Budget, pool: LatentPool) -> None:
    """One transformer for every noise level, with and without an image."""
    began = time.perf_counter()
    stage = Stage(
        name="joint", task=Task.I2V, budget=budget, low=0.0, high=1.0, image=0.35,
        batch=run.batch, log_every=run.log_every,
    )  # fmt: skip
    start = run.start(package.expert_file("i2v", "low_noise"))
    weights, log = train_transformer(stage, run.model, pool, seed=run.seed, start=start, state=run.state("joint"))
    run.work.mkdir(parents=True, exist_ok=True)
    package.save_file({name: value.cpu() for name, value in weights.items()}, run.work / JOINT)
    run.note("joint", log, began, batch=run.batch, rate=stage.rate)


JOINT = "joint.safetensors"
"""In float32, in the work folder: no file of its own is shipped."""


def run_expert(run: Run, task: str, expert: str, budget: Budget, pool: LatentPool) -> None:
    """One expert, from the joint model (or, with ``--start-from``, from the earlier expert)."""
    began = time.perf_counter()
    name = f"{task}_{expert}"
    low, high = INTERVALS[name]
    stage = Stage(
        name=name, task=Task(task), budget=budget, low=low, high=high, image=1.0, rate=EXPERT_RATE,
        batch=run.batch, log_every=run.log_every,
    )  # fmt: skip
    file = package.expert_file(task, expert)
    start = run.start(file)
    if start is None:
        joint = package.read_weights(run.work / JOINT)
        start = without_image(joint) if task == "t2v" else joint
    weights, log = train_transformer(stage, run.model, pool, seed=run.seed, start=start, state=run.state(name))
    package.write_weights(run.out / file, weights)
    run.note(name, log, began, batch=run.batch, rate=stage.rate, noise_levels=[low, high])


def run_evaluate(run: Run, count: int, options: SampleOptions, fused_kernels: str) -> None:
    """Score both tasks on captions of training's scenes and of held-out ones; write the sheet."""
    began = time.perf_counter()
    vae, encoder = run.vae(), run.encoder()
    dtype = torch.bfloat16 if run.device.type == "cuda" else torch.float32
    results: dict[str, Any] = {"steps": options.steps, "solver": "unipc", "seed": options.seed}
    shown = []
    for task in package.TASKS:
        files = {expert: run.out / package.expert_file(task, expert) for expert in package.EXPERTS}
        if not all(path.is_file() for path in files.values()):
            print(f"{task}: not trained yet, not evaluated", flush=True)
            continue
        experts = {name: load_transformer(path, name, dtype, run.device) for name, path in files.items()}
        for model in experts.values():
            model.fused_kernels = fused_kernels
            set_attention(model, Attention("sdpa"))
        for label, held_out, used in (
            ("trained", False, options),
            ("held_out", True, options),
            ("trained_without_guidance", False, replace(options, guidance=(1.0, 1.0))),
        ):
            chosen = choose_scenes(count, held_out=held_out, seed=options.seed)
            if task == "t2v":
                evaluation, frames = evaluate_t2v(experts, vae, encoder, run.size, used, chosen), {}
            else:
                evaluation, frames = evaluate_i2v(experts, vae, encoder, run.size, used, chosen)
            scores = {**evaluation.scores(), **frames}
            results[f"{task}_{label}"] = scores
            if used is options:
                shown.append(evaluation)
            print(f"{task} {label}: {scores}", flush=True)
    results["seconds"] = round(time.perf_counter() - began, 1)
    run.card["evaluation"] = results
    if shown:
        contact_sheet(shown, run.out / package.SHEET_FILE)
    package.write_card(run.out, run.card)


# ---- command line ----------------------------------------------------------------------------------------------------

Out = Annotated[Path, typer.Option(help="Folder for what training leaves: at most 8 files.")]
Work = Annotated[Path | None, typer.Option(help="Folder for what resuming needs. Default: OUT with .work behind it.")]
Device = Annotated[str, typer.Option(help="Where to train, for example cuda or cpu.")]
Seed = Annotated[int, typer.Option(min=0)]
Minutes = Annotated[float, typer.Option(min=0.0, help="Training time of the stage (of all stages, for all).")]
Steps = Annotated[int | None, typer.Option(min=1, help="Ends a stage after so many steps, if minutes do not before.")]
Width = Annotated[int, typer.Option(min=16)]
Height = Annotated[int, typer.Option(min=16)]
Frames = Annotated[int, typer.Option(min=1, help="4n + 1.")]
Clips_ = Annotated[int, typer.Option("--clips", min=1, help="Clips that are drawn and encoded.")]
Batch = Annotated[int, typer.Option(min=1, help="Clips per step of the transformer.")]
VaeBatch = Annotated[int, typer.Option(min=1, help="Clips per step of the VAE.")]
Dim = Annotated[int, typer.Option(help="Width of the transformer, a multiple of 128.")]
FfnDim = Annotated[int, typer.Option()]
Layers = Annotated[int, typer.Option()]
LogEvery = Annotated[int, typer.Option(min=1, help="Steps between two lines.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on where a stopped stage was.")]
StartFrom = Annotated[Path | None, typer.Option(help="Folder of an earlier training whose weights to begin with.")]
Captions = Annotated[int, typer.Option(min=1, help="Captions per score.")]
SampleSteps = Annotated[int, typer.Option(min=1, help="Steps of the sampler.")]
Fused = Annotated[str, typer.Option(help="Kernels that sampling uses: eager, auto or triton.")]


STAGES = {
    "all": "Every stage in order.",
    "text": "Draw the text encoder and make its tokenizer.",
    "vae": "Train the VAE.",
    "joint": "Train one transformer for every noise level, with and without an image.",
    "experts": "Train the two experts of T2V and the two of I2V, from the joint transformer.",
    "evaluate": "Sample, score, and draw the sheet.",
}


def train(
    context: typer.Context,
    out: Out,
    work: Work = None,
    device: Device = "cuda",
    seed: Seed = 0,
    minutes: Minutes = 7.0,
    steps: Steps = None,
    width: Width = 96,
    height: Height = 64,
    frames: Frames = 17,
    clips: Clips_ = 40960,
    batch: Batch = 256,
    vae_batch: VaeBatch = 24,
    dim: Dim = 256,
    ffn_dim: FfnDim = 576,
    layers: Layers = 4,
    log_every: LogEvery = 100,
    resume: Resume = False,
    start_from: StartFrom = None,
    captions: Captions = 100,
    sample_steps: SampleSteps = 40,
    sample_seed: Seed = 0,
    fused_kernels: Fused = "eager",
) -> None:
    stage = context.info_name or "all"
    stop_on_signal()
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    run = Run(
        out=out,
        work=work or out.with_name(out.name + ".work"),
        device=torch.device(device),
        seed=seed,
        size=WorldSize(width=width, height=height, frames=frames),
        model=TransformerSize(dim=dim, ffn_dim=ffn_dim, num_layers=layers),
        clips=clips,
        batch=batch,
        vae_batch=vae_batch,
        log_every=log_every,
        resume=resume,
        start_from=start_from,
    )

    def budget(name: str, among: Iterable[str]) -> Budget:
        among = list(SHARES) if stage == "all" else list(among)
        return Budget(minutes=minutes * SHARES[name] / sum(SHARES[each] for each in among), steps=steps)

    whole = stage == "all"
    if whole or stage == "text":
        run_text(run)
    if whole or stage == "vae":
        run_vae(run, budget("vae", ["vae"]))
    pool = run.latents() if whole or stage in ("joint", "experts") else None
    if pool is not None and stage != "experts":
        run_joint(run, budget("joint", ["joint"]), pool)
    if pool is not None and stage != "joint":
        for task in package.TASKS:
            for expert in package.EXPERTS:
                run_expert(run, task, expert, budget(f"{task}_{expert}", INTERVALS), pool)
    del pool
    if (whole or stage == "evaluate") and not stopping():
        run_evaluate(run, captions, SampleOptions(steps=sample_steps, seed=sample_seed), fused_kernels)


for _name, _help in STAGES.items():
    app.command(_name, help=_help)(train)


@app.command()
def assemble(
    trained: Annotated[Path, typer.Argument(help="Folder that training wrote.")],
    target: Annotated[Path, typer.Argument(help="Checkpoint folder to make.")],
    task: Annotated[str, typer.Option(help="t2v or i2v")] = "t2v",
) -> None:
    """Make a checkpoint folder in the official layout."""
    size = TransformerSize(**{_FIELDS[key]: value for key, value in package.read_card(trained)["model"].items()})
    package.assemble(trained, target, task, size)


_FIELDS = {"dim": "dim", "ffn_dim": "ffn_dim", "layers": "num_layers"}

if __name__ == "__main__":
    app()
