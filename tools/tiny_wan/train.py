#!/usr/bin/env python3
"""Train a tiny Wan2.2 on a drawn world: VAE, T2V and I2V experts, measured at the end. Minutes on one H100.

    python tools/tiny_wan/train.py all --minutes 7 --out build/tiny_wan
    python tools/tiny_wan/train.py all --minutes 4 --out build/tiny_wan --start-from checkpoints/Wan2.2-T2V-A14B-tiny
    python tools/tiny_wan/train.py all --tasks ti2v --minutes 10 --out build/tiny_wan_ti2v
    python tools/tiny_wan/train.py assemble build/tiny_wan models/wan/Wan2.2-T2V-A14B-tiny --task t2v
    python tools/tiny_wan/train.py draw frame.png --colour green --shape star --motion rise
    python tools/tiny_wan/train.py i2v models/wan/Wan2.2-T2V-A14B-tiny models/wan/Wan2.2-I2V-A14B-tiny

Tasks are ``t2v`` and ``i2v`` unless ``--tasks`` says otherwise. Those two are one training: I2V's experts with no image
given are T2V's, and the checkpoints differ in the columns that read it. ``ti2v`` trains the Wan2.2 VAE (on clips drawn
twice as wide and high) and one transformer with a timestep for each latent frame.

``all`` runs the stages in order; each can be run alone (``text``, ``vae``, ``joint``, ``experts``, ``evaluate``)
on what the earlier ones left in ``--out``. A stage that was stopped (SIGTERM) goes on with ``--resume``.
``all --start-from FOLDER`` keeps VAE and text encoder of an earlier training or of a checkpoint, and trains its experts
further (of an earlier training only), or new ones. On a CPU add ``--device cpu --dtype bf16 --compile
--clips 6144 --vae-batch 6 --batch 64``: a quarter of an hour for a VAE on two cores, hours for transformers.

On a GPU ``--compile`` nearly triples a transformer's steps a second (H200), after a minute of compiling at first and
half of one at each further stage, which ``--minutes`` do not count.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import torch
import typer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tiny_wan  # noqa: F401  (puts the engine within reach)
from tiny_wan import package
from tiny_wan.autoencoder import STAGES as VAE_STAGES
from tiny_wan.captions import BACKGROUNDS, COLOURS, MOTIONS, SHAPES, Scene
from tiny_wan.evaluate import SampleOptions, write_first_frame
from tiny_wan.loop import Budget, stop_on_signal, stopping
from tiny_wan.stages import SHARES, TI2V, Run, plan, run_evaluate, run_expert, run_joint, run_text, run_ti2v, run_vae
from tiny_wan.transformer import TransformerSize
from tiny_wan.world import WorldSize

app = typer.Typer(add_completion=False, no_args_is_help=True)

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
StartFrom = Annotated[Path | None, typer.Option(help="Folder of an earlier training to go on from.")]
Captions = Annotated[int, typer.Option(min=1, help="Captions per score.")]
SampleSteps = Annotated[int, typer.Option(min=1, help="Steps of the sampler.")]
Graphs = Annotated[bool, typer.Option(help="On a GPU: record a step and replay it.")]
Compile = Annotated[bool, typer.Option("--compile", help="Fuse what lies between matrix products (torch.compile).")]
Dtype = Annotated[str, typer.Option(help="What to compute in: bf16, fp32, or auto: bf16 on a GPU, fp32 elsewhere.")]
Tasks = Annotated[str, typer.Option(help="What to train: any of t2v, i2v and ti2v, with commas.")]
Fused = Annotated[str, typer.Option(help="Kernels that sampling uses: eager, auto or triton.")]


DTYPES = {"auto": None, "bf16": torch.bfloat16, "fp32": torch.float32}
STAGES = {
    "all": "Every stage in order.",
    "text": "Draw the text encoder and make its tokenizer.",
    "vae": "Train the VAE (of the Wan2.2 design for ti2v).",
    "joint": "Train one transformer for every noise level, with and without an image.",
    "experts": "Train the two experts, of T2V and I2V at once, from the joint transformer; and TI2V's one.",
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
    width: Width = 144,
    height: Height = 96,
    frames: Frames = 17,
    clips: Clips_ = 32768,
    batch: Batch = 160,
    vae_batch: VaeBatch = 12,
    dim: Dim = 256,
    ffn_dim: FfnDim = 512,
    layers: Layers = 4,
    log_every: LogEvery = 100,
    resume: Resume = False,
    start_from: StartFrom = None,
    captions: Captions = 100,
    sample_steps: SampleSteps = 40,
    sample_seed: Seed = 0,
    fused_kernels: Fused = "eager",
    tasks: Tasks = "t2v,i2v",
    graphs: Graphs = True,
    compile: Compile = False,
    dtype: Dtype = "auto",
) -> None:
    stage = context.info_name or "all"
    stop_on_signal()
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    if dtype not in DTYPES:
        raise typer.BadParameter(f"--dtype is {', '.join(DTYPES)}; got {dtype}")
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
        graphs=graphs,
        compile=compile,
        dtype=DTYPES[dtype] or (torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32),
        tasks=tuple(tasks.split(",")),
    )

    try:
        chosen = plan(stage, run, run.tasks)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    whole = sum(SHARES[name] for name in chosen)

    def budget(name: str) -> Budget:
        return Budget(minutes=minutes * SHARES[name] / whole, steps=steps)

    if stage in ("all", "text"):
        run_text(run)
    for design, name in VAE_STAGES.items():
        if name in chosen:
            run_vae(run, budget(name), design)
    two = [name for name in chosen if name not in (*VAE_STAGES.values(), TI2V)]
    pool = run.latents() if two else None
    for name in two:
        if name == "joint":
            run_joint(run, budget(name), pool)
        else:
            run_expert(run, name, budget(name), pool)
    del pool
    if TI2V in chosen:
        run_ti2v(run, budget(TI2V), run.latents(TI2V))
    if stage in ("all", "evaluate") and not stopping():
        run_evaluate(run, captions, SampleOptions(steps=sample_steps, seed=sample_seed), fused_kernels)


for _name, _help in STAGES.items():
    app.command(_name, help=_help)(train)


@app.command()
def assemble(
    trained: Annotated[Path, typer.Argument(help="Folder that training wrote.")],
    target: Annotated[Path, typer.Argument(help="Checkpoint folder to make.")],
    task: Annotated[str, typer.Option(help="t2v, i2v or ti2v")] = "t2v",
) -> None:
    """Make a checkpoint folder in the official layout."""
    size = TransformerSize(**{_FIELDS[key]: value for key, value in package.read_card(trained)["model"].items()})
    package.assemble(trained, target, task, size)


@app.command()
def draw(
    picture: Annotated[Path, typer.Argument(help="The PNG to write.")],
    colour: Annotated[str, typer.Option(help=", ".join(COLOURS))] = "red",
    shape: Annotated[str, typer.Option(help=", ".join(SHAPES))] = "ball",
    motion: Annotated[str, typer.Option(help=", ".join(MOTIONS))] = "right",
    background: Annotated[str, typer.Option(help=", ".join(BACKGROUNDS))] = "white",
    width: Width = 144,
    height: Height = 96,
    seed: Seed = 0,
) -> None:
    """Draw the first frame of a clip: something to begin an I2V video with."""
    words = {"colour": (colour, COLOURS), "shape": (shape, SHAPES), "motion": (motion, MOTIONS)}
    for name, (word, known) in {**words, "background": (background, BACKGROUNDS)}.items():
        if word not in known:
            raise typer.BadParameter(f"--{name} is one of {', '.join(known)}; got {word}")
    scene = Scene(**{name: list(known).index(word) for name, (word, known) in words.items()})
    write_first_frame(picture, scene, list(BACKGROUNDS).index(background), WorldSize(width=width, height=height), seed)


@app.command("i2v")
def make_i2v(
    checkpoint: Annotated[Path, typer.Argument(help="A T2V checkpoint folder that was trained together with I2V.")],
    target: Annotated[Path, typer.Argument(help="Checkpoint folder to make.")],
) -> None:
    """Make the I2V checkpoint that goes with a T2V one."""
    try:
        package.make_i2v(checkpoint, target)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


_FIELDS = {"dim": "dim", "ffn_dim": "ffn_dim", "layers": "num_layers"}

if __name__ == "__main__":
    app()
