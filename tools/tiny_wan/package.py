"""The files that training leaves: weights in bf16, a card in JSON, a sheet of samples; and official folders of them."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tiny_checkpoint import text as tiny_text
from tiny_checkpoint import transformer as tiny_transformer
from torch import Tensor

from .text import SPIECE
from .transformer import PATCH, TransformerSize, without_image

EXPERTS = ("high_noise", "low_noise")
TASKS = ("t2v", "i2v")
"""Those with two experts."""
TI2V = "ti2v"
"""One transformer for every noise level, on the latents of the Wan2.2 VAE."""
VAE_FILE, VAE_FILE_22 = "Wan2.1_VAE.safetensors", "Wan2.2_VAE.safetensors"
TEXT_FILE = "models_t5_umt5-xxl-enc-bf16.safetensors"
COLUMNS_FILE = "image_columns.safetensors"
WEIGHTS = "diffusion_pytorch_model.safetensors"
TOKENIZER = Path("google", "umt5-xxl")
CARD_FILE, SHEET_FILE = "card.json", "samples.png"
IN_CHANNELS = {"t2v": 16, "i2v": 36}
"""Of the tasks with two experts."""


def expert_file(task: str, expert: str = "") -> str:
    """Name of one transformer's file; TI2V's has no expert."""
    return f"wan2.2_{task}_{expert}_tiny.safetensors" if expert else f"wan2.2_{task}_tiny.safetensors"


def files_of(task: str) -> list[str]:
    """Files of a task's transformers."""
    return [expert_file(task, expert) for expert in (EXPERTS if task in TASKS else ("",))]


def vae_file(task: str) -> str:
    """Name of the file of the VAE that a task works with."""
    return VAE_FILE_22 if task == TI2V else VAE_FILE


def write_weights(path: Path, weights: Mapping[str, Tensor]) -> None:
    """Floating tensors as bf16, others as they are; complete or not at all."""
    tensors = {
        name: (value.to(torch.bfloat16) if value.is_floating_point() else value).cpu().contiguous()
        for name, value in weights.items()
    }
    partial = path.with_suffix(".partial")
    save_file(tensors, partial, metadata={"format": "pt"})
    partial.chmod(0o644)  # safetensors makes files that only their owner reads
    partial.rename(path)


def read_weights(path: Path) -> dict[str, Tensor]:
    """What ``write_weights`` wrote."""
    return load_file(path)


def read_encoder(folder: Path) -> dict[str, Tensor] | None:
    """The text encoder of an earlier training or of an assembled checkpoint, its tokenizer among the tensors."""
    if not (folder / TEXT_FILE).is_file():
        return None
    tensors = read_weights(folder / TEXT_FILE)
    if SPIECE not in tensors:
        model = (folder / TOKENIZER / "spiece.model").read_bytes()
        tensors[SPIECE] = torch.frombuffer(bytearray(model), dtype=torch.uint8).clone()
    return tensors


def file_facts(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of every weight file, by its path in ``folder``."""
    return {
        str(path.relative_to(folder)): {
            "bytes": path.stat().st_size,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        for path in sorted(folder.rglob("*.safetensors"))
    }


def write_card(folder: Path, card: Mapping[str, Any]) -> None:
    """The facts of a training, with its files' hashes."""
    content = {**card, "files": file_facts(folder)}
    (folder / CARD_FILE).write_text(json.dumps(content, indent=1) + "\n")


def read_card(folder: Path) -> dict[str, Any]:
    """The card in ``folder``, or an empty one."""
    path = folder / CARD_FILE
    card: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    return card


def assemble(trained: Path, target: Path, task: str, size: TransformerSize) -> Path:
    """A folder in the official layout from the files of a training: what loaders of Wan2.2 checkpoints take.

    Args:
        trained: Where ``train.py`` wrote.
        target: A folder that is not there yet.
        task: "t2v", "i2v" or "ti2v".
        size: Of the transformers.
    """
    if task not in (*TASKS, TI2V):
        raise ValueError(f"tasks are {', '.join((*TASKS, TI2V))}; got {task}")
    partial = target.with_name(target.name + ".partial")
    partial.mkdir(parents=True)
    in_dim, out_dim = (48, 48) if task == TI2V else (IN_CHANNELS[task], 16)
    shape = tiny_transformer.TransformerSize(
        in_dim=in_dim, out_dim=out_dim, dim=size.dim, ffn_dim=size.ffn_dim, num_layers=size.num_layers
    )
    config = json.dumps(tiny_transformer.config(shape, task), indent=2) + "\n"
    for expert in ("",) if task == TI2V else EXPERTS:
        folder = partial / f"{expert}_model" if expert else partial
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(config)
        source = trained / expert_file(task, expert)
        (folder / WEIGHTS).write_bytes(source.read_bytes())
    if task == "t2v" and (columns := image_columns(trained)):
        write_weights(partial / COLUMNS_FILE, columns)
    encoder = read_weights(trained / TEXT_FILE)
    tiny_text.write_tokenizer(partial / TOKENIZER, bytes(encoder.pop(SPIECE).tolist()))
    write_weights(partial / TEXT_FILE, encoder)
    (partial / vae_file(task)).write_bytes((trained / vae_file(task)).read_bytes())
    card = read_card(trained)
    write_model_card(partial, card, task)
    write_card(partial, card)
    partial.rename(target)
    return target


def image_columns(trained: Path) -> dict[str, Tensor]:
    """By expert, the columns of the patch embedding that read the image, if nothing else tells I2V from T2V."""
    columns = {}
    for expert in EXPERTS:
        paths = [trained / expert_file(task, expert) for task in TASKS]
        if not all(path.is_file() for path in paths):
            return {}
        text, image = map(read_weights, paths)
        channels = text[PATCH].shape[1]
        if any(not torch.equal(value, text[name]) for name, value in without_image(image).items()):
            return {}
        columns[f"{expert}.{PATCH}"] = image[PATCH][:, channels:]
    return columns


def make_i2v(folder: Path, target: Path) -> Path:
    """The I2V checkpoint that was trained together with a T2V one.

    Args:
        folder: An assembled T2V checkpoint that has the image's columns.
        target: A folder that is not there yet.
    """
    if not (folder / COLUMNS_FILE).is_file():
        raise ValueError(f"{folder} has no {COLUMNS_FILE}: train i2v and assemble it")
    columns = read_weights(folder / COLUMNS_FILE)
    partial = target.with_name(target.name + ".partial")
    shutil.copytree(folder, partial, ignore=shutil.ignore_patterns(COLUMNS_FILE, "README.md", CARD_FILE))
    for expert in EXPERTS:
        path = partial / f"{expert}_model"
        weights = read_weights(path / WEIGHTS)
        weights[PATCH] = torch.cat([weights[PATCH], columns[f"{expert}.{PATCH}"]], dim=1)
        write_weights(path / WEIGHTS, weights)
        config = json.loads((path / "config.json").read_text())
        config |= {"model_type": "i2v", "in_dim": IN_CHANNELS["i2v"]}
        (path / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    card = read_card(folder)
    write_model_card(partial, card, "i2v")
    write_card(partial, card)
    partial.rename(target)
    return target


def write_model_card(folder: Path, card: Mapping[str, Any], task: str) -> None:
    """README.md of a checkpoint folder: what it is, how it was made, how good it is, and its files' hashes."""
    parts = ("vae22", TI2V) if task == TI2V else ("vae", "joint", *EXPERTS)
    used = {name: card["stages"][name] for name in parts if name in card["stages"]}
    lines = [
        f"# {folder.name.removesuffix('.partial')}",
        "",
        "A Wan2.2 in miniature: architecture, key names and folder layout of the published checkpoint, trained on a",
        "drawn world of coloured shapes. It makes small videos of what such captions say, and nothing else.",
        "",
        f"- License: {card['license']}",
        f"- Data: {card['data']}",
        f"- Transformers: {_listed(card['model'])}",
        f"- Made on {card['date']} with {_listed(card['versions'])}, seed {card['seed']}",
        "",
        "| stage | command | on | data | steps | seconds | loss at the end |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        *(
            f"| {name} | `train.py {facts['command']}` | {facts['hardware']} "
            f"| {facts.get('data', '')} | {facts['steps']} | {facts['seconds']} | {facts['loss']} |"
            for name, facts in used.items()
        ),
        "",
    ]
    if quality := used.get(parts[0], {}).get("held_out"):
        lines += [f"VAE on clips that it was not trained on: {quality['psnr_db']} dB.", ""]
    for name, scores in card.get("evaluation", {}).items():
        if name.startswith(f"{task}_"):
            lines.append(
                f"- {name}: of {scores['captions']} captions {scores['colour_and_motion']:.0%} have their colour and "
                f"motion, {scores['shape']:.0%} their shape"
                + (f"; first frame {scores['first_frame_psnr_db']} dB" if "first_frame_psnr_db" in scores else "")
            )
    lines += ["", "| file | bytes | SHA-256 |", "| --- | --- | --- |"]
    for name, facts in file_facts(folder).items():
        lines.append(f"| {name} | {facts['bytes']} | `{facts['sha256']}` |")
    (folder / "README.md").write_text("\n".join(lines) + "\n")


def _listed(facts: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in facts.items())
