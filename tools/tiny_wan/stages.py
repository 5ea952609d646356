"""The stages of a training, what they share, and what each leaves behind."""

from __future__ import annotations

import datetime
import hashlib
import itertools
import platform
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from wan_fp8 import Attention, load_transformer, set_attention
from wan_fp8.models.specs import Task
from wan_fp8.models.text_encoder import TextEncoder
from wan_fp8.models.vae import load_vae
from wan_fp8.models.vae22 import load_vae22

from . import package
from .autoencoder import STAGES, AnyVAE, VAEOptions, measure_vae, train_vae
from .data import LatentPool, encode_pool, keep_latents, make_pool, read_latents
from .evaluate import SampleOptions, choose_scenes, contact_sheet, evaluate_i2v, evaluate_t2v, evaluate_ti2v
from .loop import Budget, Log
from .package import TEXT_FILE, TI2V, VAE_FILE, VAE_FILE_22
from .text import make_encoder, open_encoder
from .transformer import Stage, TransformerSize, train_transformer, with_image, without_image
from .world import WorldSize

SHARES = {
    "vae": 0.30,
    "joint": 0.42,
    "high_noise": 0.10,
    "low_noise": 0.18,
    "vae22": 0.45,
    "ti2v": 0.40,
}
"""Of the minutes that ``all`` is given, in proportion among what it trains."""
INTERVALS = {"high_noise": (0.855, 1.0), "low_noise": (0.0, 0.92)}
"""Noise levels of each expert: its side of the published boundaries (T2V 0.875, I2V 0.9), and 0.02 beyond."""
EXPERT_RATE = 4e-4
JOINT_IMAGE, TI2V_IMAGE = 0.35, 0.4
"""Share of the clips whose first frame is given, where a model learns both; experts take half."""


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
    graphs: bool
    compile: bool
    dtype: torch.dtype
    """What training computes in."""
    tasks: tuple[str, ...]
    card: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        self.card = package.read_card(self.out)
        self.card.setdefault("stages", {})
        self.card |= {
            "license": "Apache-2.0",
            "data": (
                "drawn by tools/tiny_wan/world.py; a fifth of the combinations of colour, shape and motion held out"
            ),
            "seed": self.seed,
            "model": {"dim": self.model.dim, "ffn_dim": self.model.ffn_dim, "layers": self.model.num_layers},
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "date": datetime.date.today().isoformat(),
        }
        if self.start_from is not None:
            earlier = package.read_card(self.start_from)
            stages = earlier.get("stages", {})
            self.card["stages"] = {k: v for k, v in stages.items() if k in STAGES.values()} | self.card["stages"]
            self.card["earlier"] = [*earlier.get("earlier", []), {"date": earlier.get("date"), "stages": stages}]

    @property
    def pair(self) -> tuple[str, ...]:
        """Which of T2V and I2V are trained, in this order."""
        return tuple(task for task in package.TASKS if task in self.tasks)

    @property
    def manner(self) -> dict[str, Any]:
        """How every stage is run, whatever it trains."""
        return {"log_every": self.log_every, "graphs": self.graphs, "compile": self.compile, "dtype": self.dtype}

    @property
    def hardware(self) -> str:
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        return f"{torch.get_num_threads()} CPU cores ({platform.machine()})"

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
            "command": _command(sys.argv[1:]),
            "hardware": self.hardware,
            "data": f"{self.clips} clips of {self.size_of(stage).shown}",
            "steps": log.steps,
            "seconds": round(log.seconds, 1),
            "seconds_in_all": round(time.perf_counter() - began, 1),
            "loss": last,
            **facts,
            "losses": _thinned(log.losses),
        }
        package.write_card(self.out, self.card)

    def size_of(self, task: str) -> WorldSize:
        """TI2V's world, and its VAE's, is drawn twice as large, so that its latents, of 16x16 pixels, are as many."""
        if task not in (TI2V, STAGES["2.2"]):
            return self.size
        return WorldSize(width=2 * self.size.width, height=2 * self.size.height, frames=self.size.frames)

    def vae(self, task: str = "t2v") -> AnyVAE:
        load = load_vae22 if task == TI2V else load_vae
        return load(package.read_weights(self.out / package.vae_file(task)), torch.float32, self.device)

    def encoder(self) -> TextEncoder:
        return open_encoder(package.read_weights(self.out / TEXT_FILE), self.device)

    def latents(self, task: str = "t2v") -> LatentPool:
        """Every clip encoded, once for all stages that run with the same ``--work``; TI2V's apart from the others'."""
        began = time.perf_counter()
        images, size = task != TI2V and "i2v" in self.tasks, self.size_of(task)
        names = (package.vae_file(task), TEXT_FILE)
        files = [hashlib.sha256((self.out / name).read_bytes()).hexdigest() for name in names]
        key = repr((files, self.clips, self.seed, size, self.dtype, images))
        path = self.work / ("latents_ti2v.pt" if task == TI2V else "latents.pt")
        if (found := read_latents(path, key, self.device)) is not None:
            print(f"{len(found)} clips from {path}", flush=True)
            return found
        pool = make_pool(self.clips, size, seed=self.seed, held_out=False, device=self.device)
        at_once = 64 if task == TI2V else 256  # by pixels, the same
        latents = encode_pool(
            pool, size, self.vae(task), self.encoder(), dtype=self.dtype, images=images, at_once=at_once
        )
        keep_latents(path, key, latents)
        print(
            f"{len(latents)} clips encoded in {time.perf_counter() - began:.1f} s, "
            f"latents {tuple(latents.latents_NCFHW.shape)}, caption rows {tuple(latents.table.rows_NLD.shape)}",
            flush=True,
        )
        return latents


def _command(words: Sequence[str]) -> str:
    """What was asked for, without the places of the machine that did it: ``--start-from`` keeps its folder's name."""
    kept, before = [], ""
    for word in itertools.chain.from_iterable(w.split("=", 1) if w.startswith("--") else [w] for w in words):
        if before not in FOLDERS and word not in FOLDERS:
            kept.append(Path(word).name if before == START else word)
        before = word
    return " ".join(kept)


FOLDERS, START = ("--out", "--work"), "--start-from"


def _thinned(losses: list[list[float]], most: int = 120) -> list[list[float]]:
    """Enough points for a curve."""
    every = max(1, -(-len(losses) // most))
    return losses[::every] + (losses[-1:] if losses and (len(losses) - 1) % every else [])


def run_text(run: Run) -> None:
    """The text encoder: random, with a tokenizer of the world's words."""
    kept = None if run.start_from is None else package.read_encoder(run.start_from)
    package.write_weights(run.out / TEXT_FILE, kept or make_encoder(run.seed))


def run_vae(run: Run, budget: Budget, design: str = "2.1") -> None:
    """The VAE of a design."""
    began = time.perf_counter()
    name, task = STAGES[design], TI2V if design == "2.2" else "t2v"
    file, size = package.vae_file(task), run.size_of(task)
    pool = make_pool(run.clips, size, seed=run.seed, held_out=False, device=run.device)
    options = VAEOptions(budget=budget, batch=run.vae_batch, **run.manner)
    weights, log = train_vae(
        pool.clips, size, options, seed=run.seed, design=design, start=run.start(file), state=run.state(name)
    )
    package.write_weights(run.out / file, weights)
    unseen = make_pool(min(256, run.clips), size, seed=run.seed + 1, held_out=True, device=run.device)
    quality = measure_vae(run.vae(task), unseen.clips, size, run.dtype, at_once=64 if design == "2.1" else 16)
    print(f"{name} on held-out clips: {quality}", flush=True)
    run.note(name, log, began, batch=run.vae_batch, held_out=quality)


def run_joint(run: Run, budget: Budget, pool: LatentPool) -> None:
    """One transformer for every noise level, with and without an image."""
    began = time.perf_counter()
    stage = Stage(
        name="joint", task=Task.I2V, budget=budget, low=0.0, high=1.0,
        image=JOINT_IMAGE if "i2v" in run.tasks else 0.0,
        batch=run.batch, **run.manner,
    )  # fmt: skip
    weights, log = train_transformer(stage, run.model, pool, seed=run.seed, state=run.state("joint"))
    run.work.mkdir(parents=True, exist_ok=True)
    package.save_file({name: value.cpu() for name, value in weights.items()}, run.work / JOINT)
    run.note("joint", log, began, batch=run.batch, rate=stage.rate)


JOINT = "joint.safetensors"
"""In float32, in the work folder: no file of its own is shipped."""


def run_expert(run: Run, name: str, budget: Budget, pool: LatentPool) -> None:
    """One expert, from the joint model (or, with ``--start-from``, from the earlier expert).

    T2V and I2V are one training: I2V's model with nothing given is T2V's, without the columns that read the image.
    """
    began = time.perf_counter()
    low, high = INTERVALS[name]
    image = {("t2v",): 0.0, ("i2v",): 1.0}.get(run.pair, 0.5)
    stage = Stage(
        name=name, task=Task.I2V, budget=budget, low=low, high=high, image=image, rate=EXPERT_RATE,
        batch=run.batch, **run.manner,
    )  # fmt: skip
    start = next(filter(None, (run.start(package.expert_file(task, name)) for task in ("i2v", "t2v"))), None)
    weights, log = train_transformer(
        stage, run.model, pool, seed=run.seed,
        start=with_image(package.read_weights(run.work / JOINT) if start is None else start),
        state=run.state(name),
    )  # fmt: skip
    for task in run.pair:
        package.write_weights(
            run.out / package.expert_file(task, name), without_image(weights) if task == "t2v" else weights
        )
    run.note(name, log, began, batch=run.batch, rate=stage.rate, noise_levels=[low, high], image=image)


def run_ti2v(run: Run, budget: Budget, pool: LatentPool) -> None:
    """TI2V's one transformer, for every noise level, with and without a first frame."""
    began = time.perf_counter()
    stage = Stage(
        name=TI2V, task=Task.TI2V, budget=budget, low=0.0, high=1.0, image=TI2V_IMAGE,
        batch=run.batch, **run.manner,
    )  # fmt: skip
    file = package.expert_file(TI2V)
    start = run.start(file)
    weights, log = train_transformer(stage, run.model, pool, seed=run.seed, start=start, state=run.state(TI2V))
    package.write_weights(run.out / file, weights)
    run.note(TI2V, log, began, batch=run.batch, rate=stage.rate, image=stage.image)


def run_evaluate(run: Run, count: int, options: SampleOptions, fused_kernels: str) -> None:
    """Score every task on captions of training's scenes and of held-out ones; write the sheet."""
    began = time.perf_counter()
    encoder = run.encoder()
    dtype = run.dtype
    options = replace(options, dtype=dtype)
    results: dict[str, Any] = {"steps": options.steps, "solver": "unipc", "seed": options.seed}
    shown = []
    for task in package.TASKS:
        files = {expert: run.out / package.expert_file(task, expert) for expert in package.EXPERTS}
        if not all(path.is_file() for path in files.values()):
            print(f"{task}: not trained yet, not evaluated", flush=True)
            continue
        vae = run.vae(task)
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
    path = run.out / package.expert_file(TI2V)
    if path.is_file():
        vae, model = run.vae(TI2V), load_transformer(path, None, dtype, run.device)
        model.fused_kernels = fused_kernels
        set_attention(model, Attention("sdpa"))
        for label, held_out, image, used in (
            ("trained", False, False, options),
            ("held_out", True, False, options),
            ("trained_without_guidance", False, False, replace(options, guidance=(1.0, 1.0))),
            ("image_trained", False, True, options),
            ("image_held_out", True, True, options),
        ):
            chosen = choose_scenes(count, held_out=held_out, seed=options.seed)
            evaluation, frames = evaluate_ti2v(
                model, vae, encoder, run.size_of(TI2V), replace(used, at_once=32), chosen, image=image
            )
            results[f"{TI2V}_{label}"] = {**evaluation.scores(), **frames}
            if used is options:
                shown.append(evaluation)
            print(f"{TI2V} {label}: {results[f'{TI2V}_{label}']}", flush=True)
    elif TI2V in run.tasks:
        print(f"{TI2V}: not trained yet, not evaluated", flush=True)
    results["seconds"] = round(time.perf_counter() - began, 1)
    run.card["evaluation"] = results
    if shown:
        contact_sheet(shown, run.out / package.SHEET_FILE)
    package.write_card(run.out, run.card)


def plan(stage: str, run: Run, tasks: Sequence[str]) -> list[str]:
    """The trainings of a command, in order. What ``--start-from`` makes unnecessary is copied from there."""
    if unknown := set(tasks) - {*package.TASKS, TI2V}:
        raise ValueError(f"tasks are {', '.join((*package.TASKS, TI2V))}; got {', '.join(sorted(unknown))}")
    two, alone = [task for task in package.TASKS if task in tasks], [TI2V] if TI2V in tasks else []
    experts = list(INTERVALS) if two else []
    if stage == "all" and run.start_from is not None:
        kept = [file for task in package.TASKS if task not in two for file in package.files_of(task)]
        kept += [VAE_FILE, VAE_FILE_22, *([] if alone else package.files_of(TI2V))]
        for file in kept:
            if (run.start_from / file).is_file():
                shutil.copy(run.start_from / file, run.out / file)
        there = all((run.start_from / file).is_file() for task in two for file in package.files_of(task))
        if two and not (run.start_from / VAE_FILE).is_file():
            experts = ["vae", "joint", *experts]
        elif two and not there:
            experts = ["joint", *experts]
        if alone and not (run.start_from / VAE_FILE_22).is_file():
            alone = ["vae22", TI2V]
        return [*experts, *alone]
    vaes = [*(["vae"] if two else []), *(["vae22"] if alone else [])]
    joint = ["joint"] if two else []
    return {
        "all": [*vaes, *joint, *experts, *alone],
        "vae": vaes,
        "joint": joint,
        "experts": [*experts, *alone],
    }.get(stage, [])
