"""What this machine has, what of it the pack can use and why not the rest, whether it computes correctly, and what to
choose: one table.

    python -m wan_fp8.doctor              the table
    python -m wan_fp8.doctor --json       the same for a bug report; neither holds a path of this machine

Every section is a function that returns rows; ``SECTIONS`` names them. Nothing is installed, changed or downloaded.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import math
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from . import __version__, compile, kernels, measured, presets
from .attention import ATTENTION, AttentionRequest
from .attention.core import register_backends as register_attention
from .attention.guard import measure_error
from .checkpoint.detect import inspect
from .checkpoint.folder import resolve_folder
from .checkpoint.listing import find_checkpoints
from .errors import BackendUnavailableError, InputError, WanFP8Error
from .gemm import GEMM, GemmRequest, GemmRunner, token_multiple
from .gemm import register_backends as register_gemm
from .gemm.backends.transformer_engine import probe as engine_probe
from .hardware import DeviceCaps, device_caps, driver_version, free_memory_bytes, gpu_devices, has_module
from .kernels.quantize import Cast, Granularity, quantize, quantize_weight
from .libraries import LIBRARIES, Package, pick, this_machine
from .models.memory import forward_needs, weight_bytes
from .models.specs import SPECS, ModelSpec
from .parallel.plan import Machine, Workload, plan
from .quant.recipe import GRANULARITIES, Recipe
from .registry import Backend
from .sampling import DEFAULTS

FORMAT, VERSION = "wan_fp8.doctor", 1
GIB = 2**30
MOST_FILES = 200
"""Weight files that are looked into; each costs the reading of its header."""
WEIGHTS = (".safetensors", ".pth", ".gguf")
LINEAR_BOUND, EXACT_BOUND, FP8_ATTENTION_BOUND = 0.06, 0.02, 0.08
"""Relative errors of the self-test on Gaussian data. FP8 products measure 0.038 (``benchmarks/results``), bf16
attention 0.003; the last one is the guard's own bound."""
SIZES = {"i2v-A14B": ("832x480", "1280x720"), "ti2v-5B": ("1280x704",)}
"""Models and sizes that expectations are given for; T2V-A14B is I2V-A14B with 20 channels less."""
FAILED = "FAILED: do not trust videos of this machine, and report it with this table"
GEMM_BACKEND = {"torch": "torch", "transformer_engine": "transformer_engine"}


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table."""

    what: str
    found: str
    note: str = ""
    """What it means, or what to do."""


@dataclass(frozen=True, slots=True)
class Patient:
    """What is examined."""

    caps: DeviceCaps
    """Of the device that models run on."""
    folders: Mapping[str, Sequence[Path]]
    """Roots by kind: ``wan``, ``diffusion_models``, ``text_encoders``, ``vae``, ``loras``."""
    self_test: bool = True

    @property
    def dtype(self) -> torch.dtype:
        """What models compute in there."""
        return torch.float32 if self.caps.device.type == "cpu" else torch.bfloat16


@dataclass(frozen=True, slots=True)
class Report:
    """The findings, by section."""

    sections: dict[str, list[Row]]
    seconds: float = field(compare=False, default=0.0)

    def text(self) -> str:
        """An aligned table."""
        rows = [row for found in self.sections.values() for row in found]
        first = max((len(row.what) for row in rows), default=0)
        second = min(60, max((len(row.found) for row in rows), default=0))
        lines = []
        for name, found in self.sections.items():
            lines += ["", name]
            lines += [f"  {row.what:<{first}}  {row.found:<{second}}  {row.note}".rstrip() for row in found]
        return "\n".join(lines[1:])

    def json(self) -> str:
        """The same for a bug report."""
        sections = {name: [dataclasses.asdict(row) for row in found] for name, found in self.sections.items()}
        return json.dumps({"format": FORMAT, "version": VERSION, "sections": sections}, indent=1, ensure_ascii=False)


def examine(
    device: torch.device | str | None = None,
    *,
    folders: Mapping[str, Sequence[str | Path]] | None = None,
    self_test: bool = True,
) -> Report:
    """Look at everything.

    Args:
        device: That models run on; None: the first GPU, else the CPU.
        folders: Roots of model folders by kind; none: files are left out.
        self_test: Also compute on the device, for at most a few seconds.
    """
    began = time.perf_counter()
    devices = gpu_devices()
    chosen = torch.device(device) if device is not None else (devices[0] if devices else torch.device("cpu"))
    roots = {kind: [Path(root) for root in given] for kind, given in (folders or {}).items()}
    patient = Patient(device_caps(chosen), roots, self_test)
    private = _private(roots)
    sections = {}
    for name, look in SECTIONS.items():
        try:
            rows = look(patient)
        except Exception as error:  # one thing that is broken hides no other: it is for broken machines that this is
            rows = [Row(name, f"not found out: {type(error).__name__}: {error}", "report this with the table")]
        if rows:
            sections[name] = [
                Row(*(_without_paths(getattr(row, f.name), private) for f in dataclasses.fields(row))) for row in rows
            ]
    return Report(sections, time.perf_counter() - began)


def _private(roots: Mapping[str, Sequence[Path]]) -> list[tuple[str, str]]:
    """Paths of this machine, as errors may spell them, and what stands in the table instead."""
    named = [(path, kind) for kind, given in roots.items() for path in given]
    with contextlib.suppress(RuntimeError):  # a user without a home, as in some containers: there is none to hide
        named.append((Path.home(), "~"))
    spelled = [(spelt, name) for path, name in named for spelt in (path, path.resolve()) if spelt != Path(spelt.anchor)]
    return [(text, name) for path, name in spelled for text in {str(path), path.as_posix(), repr(str(path))[1:-1]}]


def _without_paths(text: str, private: Sequence[tuple[str, str]]) -> str:
    for path, name in sorted(private, key=lambda pair: -len(pair[0])):
        text = text.replace(path, name)
    return text


# ---- the machine ---------------------------------------------------------------------------------------------------


def machine(patient: Patient) -> list[Row]:
    """Versions and devices."""
    caps = patient.caps
    rows = [
        Row("Wan FP8", __version__),
        Row("Python", f"{platform.python_version()}, {platform.system()} {platform.machine()}"),
        Row("PyTorch", torch.__version__, _build_of_torch()),
    ]
    driver = driver_version()
    if driver is not None:
        rows.append(Row("NVIDIA driver", driver))
    for device in gpu_devices():
        found = device_caps(device)
        what = (
            f"{device}, models run here" if device.type == caps.device.type and device == caps.device else str(device)
        )
        rows.append(Row(what, _described(found), _free(found)))
    if caps.device.type == "cpu":
        rows.append(Row("cpu, models run here", platform.processor() or platform.machine(), "for tests: tiny models"))
    return rows


def _build_of_torch() -> str:
    hip = getattr(torch.version, "hip", None)
    if torch.version.cuda:
        return f"built for CUDA {torch.version.cuda}"
    return f"built for ROCm {hip}" if hip else "built for the CPU (and MPS on a Mac)"


def _described(caps: DeviceCaps) -> str:
    parts = [caps.name]
    if caps.is_cuda and caps.capability is not None:
        parts.append("compute capability {}.{}".format(*caps.capability))
    if caps.total_memory_bytes is not None:
        parts.append(f"{caps.total_memory_bytes / GIB:.1f} GiB")
    return ", ".join(parts)


def _free(caps: DeviceCaps) -> str:
    free = free_memory_bytes(caps.device)
    return "" if free is None else f"{free / GIB:.1f} GiB free now"


# ---- kernels -------------------------------------------------------------------------------------------------------


def attention_kernels(patient: Patient) -> list[Row]:
    """Each attention backend: whether it runs there, else why not."""
    register_attention()
    rows, request = [], _attention_request(patient)
    chosen = ATTENTION.resolve("auto", request).backend.name
    for name in ATTENTION.names[1:]:
        reason = ATTENTION.backend(name).refuse(request)
        provider = ATTENTION.backend(name).provider
        found = ("runs" if provider is None else f"runs, {provider()}") if reason is None else f"no: {reason}"
        notes = ["what auto takes"] if name == chosen else []
        if not ATTENTION.backend(name).exact:
            notes.append("inexact: by name only, in a window, under a guard")
        rows.append(Row(name, found, "; ".join([*notes, *_block_time(patient.caps, attention=name, recipe="none")])))
    return rows


def products(patient: Patient) -> list[Row]:
    """Each recipe: who multiplies there, else why nobody does."""
    register_gemm()
    rows = []
    for recipe, granularity in GRANULARITIES.items():
        request = GemmRequest(patient.caps, granularity, torch.bfloat16)
        try:
            resolution = GEMM.resolve("auto", request)
            found, note = f"multiplied by {resolution.backend.name}", ""
        except BackendUnavailableError:
            why = {name: GEMM.backend(name).refuse(request) for name in GEMM_BACKEND}
            found, note = f"no: {why['torch']}", ""
            weight_only = GEMM.backend("weight-only").refuse(request)
            note = "backend weight-only runs: FP8 as storage" if weight_only is None else f"weight-only: {weight_only}"
        rows.append(Row(recipe, found, "; ".join([note, *_block_time(patient.caps, recipe=recipe)]).strip("; ")))
    return rows


def other_kernels(patient: Patient) -> list[Row]:
    """Fused kernels and torch.compile."""
    device = patient.caps.device
    fused = kernels.refusal(device, patient.dtype)
    compiled = compile.refusal(device)
    return [
        Row("fused kernels", "run" if fused is None else f"no: {fused}", "" if fused is None else "eager ones instead"),
        Row("torch.compile", "runs" if compiled is None else f"no: {compiled}", "off unless you ask for it"),
    ]


def _attention_request(patient: Patient) -> AttentionRequest:
    return AttentionRequest(patient.caps, patient.dtype, 128, 32_760, 32_760)


def _block_time(caps: DeviceCaps, **wanted: str) -> list[str]:
    """What one block of I2V-A14B at 720p took with it on this very GPU, where that was measured."""
    rows = measured.find(device=caps.name, model="i2v-A14B", size="1280x720", **wanted)
    if "attention" not in wanted:
        rows = [row for row in rows if row.attention == "fa3"]
    best = min(rows, key=lambda row: row.layer_ms, default=None)
    return [] if best is None else [f"{best.layer_ms:.0f} ms a block of I2V-A14B at 720p, measured"]


# ---- libraries -----------------------------------------------------------------------------------------------------


def libraries(patient: Patient) -> list[Row]:
    """Optional libraries: present, else what they would bring here and how to get them."""
    caps = patient.caps
    capabilities = (caps.capability,) if caps.is_cuda and caps.capability is not None else ()
    here = this_machine(torch.__version__, caps.cuda_version, capabilities)
    rows = []
    for name, library in LIBRARIES.items():
        versions = [found for found in map(_version, library.distributions) if found is not None]
        present = bool(versions) or any(has_module(module) for module in library.modules)
        if present:
            found, fault = versions[0] if versions else "present", _fault(name, patient)
            rows.append(Row(library.title, found + (", not usable" if fault else ""), fault or library.brings))
        elif library.advised.has_one_of(capabilities):
            package = pick(name, here)
            advice = f"python install.py --with {name}" if isinstance(package, Package) else package
            rows.append(Row(library.title, "not installed", f"would bring {library.brings}: {advice}"))
        else:
            little = (
                "would run here and is not advised" if library.runs.has_one_of(capabilities) else "brings nothing here"
            )
            rows.append(Row(library.title, "not installed", f"{little} (for {library.advised})"))
    ftfy = _version("ftfy")
    rows.append(Row("ftfy", ftfy or "not installed", "" if ftfy else "pip install -r requirements.txt"))
    return rows


def _fault(name: str, patient: Patient) -> str:
    """Why a library that is there cannot be used, in the words of the backend that loads it, and what to do; empty
    where it loads, and where the backend has reasons of its own not to load it."""
    if name == "transformer-engine":
        reason = engine_probe()[1] if patient.caps.is_cuda and engine_probe()[0] is None else None
    elif name == "triton":
        reason = kernels.refusal(patient.caps.device, patient.dtype)
    else:
        register_attention()
        reason = ATTENTION.backend(name).refuse(_attention_request(patient))
    if reason is None or not ("does not load" in reason or name == "transformer-engine"):
        return ""
    return reason if "install" in reason else f"{reason}; reinstall it with: python install.py --with {name}"


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


# ---- files ---------------------------------------------------------------------------------------------------------


def model_files(patient: Patient) -> list[Row]:
    """Every checkpoint folder and weight file, as it was recognised from its header."""
    rows: list[Row] = []
    for kind, roots in patient.folders.items():
        for root in roots:
            for checkpoint in find_checkpoints(root) if kind == "wan" else ():
                rows.append(Row(f"{kind}/{checkpoint.name}", *_folder(checkpoint.path, checkpoint.kind)))
            files = () if kind == "wan" else _files(root)
            for path in files:
                name = f"{kind}/{path.relative_to(root).as_posix()}"
                if len(rows) >= MOST_FILES:
                    rows.append(Row("and more", f"only the first {MOST_FILES} are looked into"))
                    return rows
                rows.append(Row(name, *_file(path)))
    if patient.folders and not rows:
        rows.append(Row("none", "no checkpoint or weight file", "put a Wan2.2 folder into models/wan"))
    return rows


def _files(root: Path) -> list[Path]:
    return (
        sorted(path for path in root.rglob("*") if path.suffix in WEIGHTS and path.is_file()) if root.is_dir() else []
    )


def _folder(path: Path, kind: str) -> tuple[str, str]:
    try:
        folder = resolve_folder(path)
        labels = [inspect(part).label for part in folder.transformers.values()]
    except (WanFP8Error, OSError) as error:
        return "not usable", str(error)
    return f"{kind} folder: {', '.join(dict.fromkeys(labels))}", ""


def _file(path: Path) -> tuple[str, str]:
    try:
        found = inspect(path)
    except (WanFP8Error, OSError) as error:
        return "not usable", str(error)
    size = f"{path.stat().st_size / GIB:.2f} GiB"
    return f"{found.label}, {size}", "" if found.supported else ", ".join(found.details)


# ---- worker pools --------------------------------------------------------------------------------------------------


def pools(patient: Patient) -> list[Row]:
    """Several GPUs: what is running, and what this platform allows."""
    del patient
    from .parallel.pools import live_pools

    rows = []
    for index, status in enumerate(live_pools(), 1):
        found = (
            f"{len(status['devices'])} processes: {', '.join(map(str, status['devices']))}; {status['models']} models"
        )
        note = "alive" if status["alive"] else f"ended: {status['failure'] or 'stopped'}"
        rows.append(Row(f"pool {index}", found, note))
    if not rows:
        linux = sys.platform == "linux"
        rows = [Row("worker pools", "none running", "" if linux else "pools of several GPUs run on Linux only")]
    return rows


# ---- self-test -----------------------------------------------------------------------------------------------------


def self_test(patient: Patient) -> list[Row]:
    """The linear and the attention that would be chosen, computed here and held against float32."""
    if not patient.self_test:
        return []
    with torch.inference_mode():
        return [*_tested("FP8 linear", _linear_test, patient), *_attention_tests(patient)]


def _tested(what: str, test: Callable[..., Row], *args: Any) -> list[Row]:
    """The verdict; a kernel that raises, as one that was not built for this GPU does, has failed like one that errs."""
    try:
        return [test(*args)]
    except torch.OutOfMemoryError:
        return [Row(what, "not run: the memory is full", "close what holds GPU memory, and ask again")]
    except Exception as error:
        return [Row(what, f"{type(error).__name__}: {error}".splitlines()[0], FAILED)]


def _linear_test(patient: Patient) -> Row:
    device, small = patient.caps.device, patient.caps.device.type == "cpu"
    tokens, width = (64, 512) if small else (4096, 5120)
    register_gemm()
    request = GemmRequest(patient.caps, Granularity.ROW, torch.bfloat16)
    try:
        backend = GEMM.resolve("auto", request).backend
    except BackendUnavailableError:
        backend = GEMM.backend("reference")
    reason = backend.refuse(request)
    if reason is not None:
        return Row("FP8 linear", "not run", reason)
    run = backend.run
    assert isinstance(run, GemmRunner)
    tokens += -tokens % token_multiple(run, Granularity.ROW)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, tokens, width, generator=generator).to(device, torch.bfloat16)
    weight = (0.02 * torch.randn(width, width, generator=generator)).to(device, torch.bfloat16)
    qweight, scale = quantize_weight(weight, Granularity.ROW)

    def product() -> torch.Tensor:
        return run(quantize(x, Cast(Granularity.ROW)), qweight, scale, None)

    made, seconds = _timed(product, device)
    error = _relative(made, F.linear(x.float(), weight.float()))
    return _verdict(f"FP8 linear rowwise, {backend.name}", error, LINEAR_BOUND, seconds)


def _attention_tests(patient: Patient) -> list[Row]:
    register_attention()
    device, request = patient.caps.device, _attention_request(patient)
    tokens, heads = (128, 2) if device.type == "cpu" else (8192, 8)
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(1, tokens, heads, 128, generator=generator).to(device, patient.dtype) for _ in range(3))

    def test(backend: Backend) -> Row:
        made, seconds = _timed(functools.partial(backend.run, q, k, v), device)
        bound = EXACT_BOUND if backend.exact else FP8_ATTENTION_BOUND
        return _verdict(f"attention {backend.name}", measure_error(made, q, k, v), bound, seconds)

    rows: list[Row] = []
    for name in ("auto", *presets.LOW_PRECISION):
        if name != "auto" and ATTENTION.backend(name).refuse(request) is not None:
            continue
        backend = ATTENTION.resolve(name, request).backend
        rows += _tested(f"attention {backend.name}", test, backend)
    return rows


def _timed(call: Callable[[], torch.Tensor], device: torch.device) -> tuple[torch.Tensor, float]:
    call()  # compiles, allocates
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    made = call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return made, time.perf_counter() - began


def _relative(made: torch.Tensor, exact: torch.Tensor) -> float:
    error = float((made.float() - exact).norm() / exact.norm())
    return math.inf if math.isnan(error) else error


def _verdict(what: str, error: float, bound: float, seconds: float) -> Row:
    found = f"relative error {error:.4f} of {bound:g} allowed, {1000 * seconds:.2f} ms"
    if error <= bound:
        return Row(what, found, "passed")
    return Row(what, found, FAILED)


# ---- recommendation ------------------------------------------------------------------------------------------------


def recommendation(patient: Patient) -> list[Row]:
    """The preset to begin with, and what it is expected to take."""
    spec = SPECS["i2v-A14B"]
    setting = presets.choose("balanced", patient.caps, torch.bfloat16, spec)
    rows = [Row("Wan2.2 Preset", "balanced", "; ".join(setting.reasons) or "FP8 weights and products, exact attention")]
    rows += [Row("which is", line) for line in setting.lines()[:3]]
    rows.append(Row("topology", *_topology(spec, setting.recipe)))
    for model, sizes in SIZES.items():
        chosen = presets.choose("balanced", patient.caps, torch.bfloat16, SPECS[model])
        for size in sizes:
            rows.append(Row(f"{model}, {size}", *_expected(patient, model, size, chosen.recipe)))
    return rows


def _topology(spec: ModelSpec, recipe: Recipe) -> tuple[str, str]:
    """What several GPUs would do together for a video of 720p, by the planner."""
    gpus = [device_caps(device) for device in gpu_devices() if device.type == "cuda"]
    if len(gpus) < 2:
        return "one GPU" if gpu_devices() else "no GPU", ""
    if len({gpu.name for gpu in gpus}) > 1:
        return "one GPU", f"the {len(gpus)} GPUs are of different kinds, and would wait for the slowest one"
    memory = min(gpu.total_memory_bytes or 0 for gpu in gpus) / GIB
    shape = presets.latent_shape(spec)
    tokens = math.prod(n // p for n, p in zip(shape[2:], spec.patch_size, strict=True))
    try:
        made = plan(
            Machine(gpus=len(gpus), memory_gib=memory),
            Workload(spec=spec, tokens=tokens, experts=1 + spec.task.two_experts, fp8=not recipe.is_none),
        )
    except InputError as error:
        return "one GPU", str(error)
    return str(made.dims), f"{made.reason} Estimated, not measured; docs/parallel.md"


def _expected(patient: Patient, model: str, size: str, recipe: Recipe) -> tuple[str, str]:
    """Seconds of a published run and memory, in words: measured on this GPU, or said to be unmeasured."""
    spec, caps = SPECS[model], patient.caps
    weights = weight_bytes(spec, 2 if recipe.is_none else 1)
    working = forward_needs(spec, _latents(spec, size, DEFAULTS[spec.task].frames), torch.bfloat16).total
    need = (weights + working) / GIB
    memory = f"{weights / GIB:.1f} GiB of weights and {working / GIB:.1f} GiB to work"
    if caps.total_memory_bytes is not None and need > caps.total_memory_bytes / GIB:
        memory += f"; {caps.total_memory_bytes / GIB:.0f} GiB are there, so weights are streamed from host memory"
    return _expected_time(patient, model, size, recipe), memory


def _expected_time(patient: Patient, model: str, size: str, recipe: Recipe) -> str:
    """What was measured with these settings on this GPU; else what comes nearest, and in what it differs."""
    caps, steps = patient.caps, DEFAULTS[SPECS[model].task].steps
    register_attention()
    attention = ATTENTION.resolve("auto", _attention_request(patient)).backend.name
    multiplied = not recipe.is_none and recipe.backend != "weight-only"

    def same(row: measured.Measurement) -> tuple[bool, bool, bool]:
        """In what a row is this run: GPU, recipe, attention."""
        alike = row.recipe == recipe.name and (recipe.is_none or (row.backend != "weight-only") == multiplied)
        return row.device == caps.name, alike, row.attention == attention

    rows = [row for row in measured.find(model=model, size=size) if ATTENTION.backend(row.attention).exact]
    # FP8 as storage takes longer than 16 bits, and products in FP8 do not: other recipes say nothing of it
    rows = [row for row in rows if same(row)[1] or (row.recipe == "none" and multiplied)]
    if not caps.is_cuda:
        return "time not measured on such a device"
    if not rows:
        return "time not measured on this GPU with these settings"
    best = min(rows, key=lambda row: (*(not part for part in same(row)), row.forward_s))
    device, alike, with_attention = same(best)
    time, run = _duration(2 * steps * best.forward_s), f"for {steps} steps with guidance, transformer alone"
    if not device:
        return f"not measured on this GPU; about {time} on {best.device} with {_settings(best)} {run}"
    if alike and with_attention:
        return f"about {time} {run}"
    return f"about {time} with {_settings(best)}, the nearest measured on this GPU, {run}"


def _settings(row: measured.Measurement) -> str:
    return f"recipe {row.recipe} and attention {row.attention}"


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} seconds" if seconds < 180 else f"{seconds / 60:.0f} minutes"


def _latents(spec: ModelSpec, size: str, frames: int) -> tuple[int, int, int, int, int]:
    width, height = map(int, size.split("x"))
    stride = 16 if spec.out_dim == 48 else 8
    return (1, spec.out_dim, (frames - 1) // 4 + 1, height // stride, width // stride)


SECTIONS: dict[str, Callable[[Patient], list[Row]]] = {
    "machine": machine,
    "attention": attention_kernels,
    "FP8 recipes": products,
    "other kernels": other_kernels,
    "optional libraries": libraries,
    "models": model_files,
    "several GPUs": pools,
    "self-test": self_test,
    "recommended": recommendation,
}


# ---- command line --------------------------------------------------------------------------------------------------

KINDS = ("wan", "diffusion_models", "text_encoders", "vae", "loras", "clip_vision", "audio_encoders")


def default_folders(models: Path | None) -> dict[str, list[Path]]:
    """Model folders of the ComfyUI that this pack lies in, or of the one named."""
    pack = Path(__file__).resolve().parent.parent
    root = models if models is not None else pack.parent.parent / "models"
    if models is None and pack.parent.name != "custom_nodes":
        return {}
    return {kind: [root / kind] for kind in KINDS if (root / kind).is_dir()}


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; 1 when the self-test failed."""
    parser = argparse.ArgumentParser(prog="python -m wan_fp8.doctor", description="What Wan FP8 finds on this machine.")
    parser.add_argument("--json", action="store_true", help="for a bug report; no private paths")
    parser.add_argument(
        "--models", type=Path, metavar="DIR", help="ComfyUI's models folder, when the pack is elsewhere"
    )
    parser.add_argument("--device", help="such as cuda:1 or cpu; default: the first GPU")
    parser.add_argument("--no-self-test", action="store_true", help="look only, compute nothing")
    asked: Any = parser.parse_args(arguments)
    if asked.models is not None and not asked.models.is_dir():
        parser.error(f"--models takes a folder laid out like ComfyUI's models/, and {asked.models} is none")
    try:
        device = None if asked.device is None else device_caps(asked.device).device
    except Exception as error:  # torch has a kind of its own for each
        parser.error(f"--device takes a device that torch has here, such as cuda:0 or cpu; {asked.device}: {error}")
    report = examine(device, folders=default_folders(asked.models), self_test=not asked.no_self_test)
    print(report.json() if asked.json else report.text())
    return int(any(row.note.startswith("FAILED") for row in report.sections.get("self-test", [])))


if __name__ == "__main__":
    sys.exit(main())
