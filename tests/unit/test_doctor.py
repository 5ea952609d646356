"""The Doctor on this machine, and on machines that are not here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from wan_fp8 import doctor, measured
from wan_fp8.hardware import DeviceCaps
from wan_fp8.registry import Backend

PACK = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like ComfyUI's ``models``: a checkpoint folder, single files, a broken one."""
    from make_tiny_checkpoint import make_tiny_checkpoint

    root = tmp_path_factory.mktemp("private-place") / "models"
    made = make_tiny_checkpoint(root / "t2v", "t2v", layout="comfy")
    for kind in ("diffusion_models", "text_encoders", "vae"):
        (made / kind).rename(root / kind)
    make_tiny_checkpoint(root / "wan" / "Wan2.2-TI2V-5B", "ti2v")
    (root / "diffusion_models" / "broken.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    (root / "loras").mkdir()
    return root


@pytest.fixture(scope="module")
def report(models: Path) -> doctor.Report:
    return doctor.examine("cpu", folders={kind: [models / kind] for kind in doctor.KINDS})


def row(report: doctor.Report, section: str, what: str) -> doctor.Row:
    (found,) = (line for line in report.sections[section] if what in line.what)
    return found


def test_files_are_what_they_were_recognised_as(report: doctor.Report) -> None:
    assert "Wan2.2 TI2V" in row(report, "models", "wan/Wan2.2-TI2V-5B").found
    assert "Wan2.2 T2V transformer" in row(report, "models", "t2v_high_noise").found
    assert "text encoder" in row(report, "models", "text_encoders/").found
    assert "VAE" in row(report, "models", "vae/").found
    broken = row(report, "models", "broken.safetensors")
    assert broken.found == "not usable" and "download" in broken.note


def test_nothing_private_is_in_it(report: doctor.Report, models: Path) -> None:
    for text in (report.json(), report.text()):
        assert str(models) not in text and "private-place" not in text and str(Path.home()) + "/" not in text
    data = json.loads(report.json())
    assert (data["format"], data["version"]) == ("wan_fp8.doctor", 1) and list(data["sections"]) == list(
        doctor.SECTIONS
    )


def test_it_takes_less_than_ten_seconds_here(report: doctor.Report) -> None:
    assert report.seconds < 10


def test_the_self_test_passes_here_and_notices_a_wrong_kernel(
    report: doctor.Report, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert {line.note for line in report.sections["self-test"]} == {"passed"}
    sdpa = doctor.ATTENTION.backend("sdpa")
    wrong = Backend("sdpa", lambda q, k, v: 1.05 * sdpa.run(q, k, v), sdpa.refuse, True, sdpa.priority)
    monkeypatch.setitem(doctor.ATTENTION._backends, "sdpa", wrong)
    linear = doctor.GEMM.backend("reference")
    broken = doctor.GemmRunner(lambda x, w, s, b: linear.run.multiply(x, w, 1.1 * s, b))
    monkeypatch.setitem(doctor.GEMM._backends, "reference", Backend("reference", broken, linear.refuse, True, 0))
    found = doctor.examine("cpu").sections["self-test"]
    assert len(found) == 2 and all(line.note.startswith("FAILED") for line in found)


def test_a_kernel_that_raises_is_a_row_and_hides_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    def raises(error: Exception):
        def run(*_: torch.Tensor) -> torch.Tensor:
            raise error

        return run

    sdpa = doctor.ATTENTION.backend("sdpa")
    for error, found, note in (
        (
            RuntimeError("no kernel image is available\nmore"),
            "RuntimeError: no kernel image is available",
            doctor.FAILED,
        ),
        (torch.OutOfMemoryError("CUDA out of memory"), "not run: the memory is full", "close what"),
    ):
        broken = Backend("sdpa", raises(error), sdpa.refuse, True, sdpa.priority)
        monkeypatch.setitem(doctor.ATTENTION._backends, "sdpa", broken)
        linear, attention = doctor.examine("cpu").sections["self-test"]
        assert linear.note == "passed" and attention.found == found and attention.note.startswith(note)
    monkeypatch.setitem(doctor.SECTIONS, "attention", raises(TypeError("odd library")))
    sections = doctor.examine("cpu", self_test=False).sections
    assert sections["attention"][0].found == "not found out: TypeError: odd library" and "recommended" in sections


def test_paths_are_hidden_however_an_error_spells_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "models").symlink_to(tmp_path / "real")
    private = doctor._private({"vae": [tmp_path / "models"]})
    for spelt in (tmp_path / "models" / "a", tmp_path / "real" / "a"):
        assert doctor._without_paths(f"cannot read {spelt}", private) == "cannot read vae/a"
    monkeypatch.setattr(Path, "home", lambda: Path("/"))
    assert doctor._without_paths("docs/memory.md", doctor._private({})) == "docs/memory.md"

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    assert doctor._private({}) == []


def test_a_device_that_is_not_there_gets_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        doctor.main(["--device", "banana"])
    assert "--device takes a device that torch has here, such as cuda:0 or cpu; banana" in capsys.readouterr().err


def on(name: str, capability: tuple[int, int] | None, gib: float, cuda: str | None = "13.0") -> doctor.Patient:
    device = torch.device("cuda", 0) if capability else torch.device(name)
    caps = DeviceCaps(
        device=device,
        name=name,
        capability=capability,
        total_memory_bytes=int(gib * 2**30),
        torch_version="2.11.0",
        cuda_version=cuda,
    )
    return doctor.Patient(caps, {}, self_test=False)


def text(rows: list[doctor.Row]) -> str:
    return "\n".join(f"{r.what} | {r.found} | {r.note}" for r in rows)


def test_a_measured_gpu_gets_times_and_another_one_none(monkeypatch: pytest.MonkeyPatch) -> None:
    doctor.register_attention()
    fa3 = doctor.ATTENTION.backend("fa3")
    monkeypatch.setitem(doctor.ATTENTION._backends, "fa3", Backend("fa3", fa3.run, lambda _: None, True, 100))
    h100 = on("NVIDIA H100 80GB HBM3", (9, 0), 79.1)
    (best,) = measured.find(
        device=h100.caps.name, model="i2v-A14B", size="1280x720", recipe="rowwise", attention="fa3", backend="torch"
    )
    said = text(doctor.recommendation(h100))
    assert f"about {80 * best.forward_s / 60:.0f} minutes for 40 steps with guidance" in said
    assert f"{best.layer_ms:.0f} ms a block" in text(doctor.products(h100))
    other = on("NVIDIA H100 PCIe", (9, 0), 79.1)
    said = text(doctor.recommendation(other))
    assert "i2v-A14B, 1280x720 | not measured on this GPU; about 12 minutes on NVIDIA H" in said
    assert "ms a block" not in text(doctor.products(other))


def test_every_measured_gpu_gets_a_time_for_what_is_recommended(monkeypatch: pytest.MonkeyPatch) -> None:
    """With these settings where they were measured, else with the nearest ones of that GPU, and no other GPU's."""
    doctor.register_attention()
    fa3 = doctor.ATTENTION.backend("fa3")
    monkeypatch.setitem(doctor.ATTENTION._backends, "fa3", Backend("fa3", fa3.run, lambda _: None, True, 100))
    for name in sorted({row.device for row in measured.measurements()}):
        expected = doctor.recommendation(on(name, (9, 0), 139.8))[-3:]
        assert [row.what for row in expected] == ["i2v-A14B, 832x480", "i2v-A14B, 1280x720", "ti2v-5B, 1280x704"]
        assert all(row.found.startswith("about ") for row in expected), f"{name}: {text(expected)}"
        assert expected[1].found == "about 12 minutes for 40 steps with guidance, transformer alone", name
    assert name == "NVIDIA H200", "the last one"
    for row, (model, size) in zip(expected, (line.what.split(", ") for line in expected), strict=True):
        steps = doctor.DEFAULTS[doctor.SPECS[model].task].steps
        (own,) = measured.find(device=name, model=model, size=size, recipe="rowwise", attention="fa3", backend="torch")
        seconds = 2 * steps * own.forward_s  # short ones are not rounded to minutes
        time = f"{seconds:.0f} seconds" if seconds < 180 else f"{seconds / 60:.0f} minutes"
        assert row.found == f"about {time} for {steps} steps with guidance, transformer alone"
    times = [row.found.split(" for")[0] for row in expected]
    assert times == ["about 164 seconds", "about 12 minutes", "about 65 seconds"]
    (h100,) = doctor.recommendation(on("NVIDIA H100 80GB HBM3", (9, 0), 79.1))[-1:]
    assert "with recipe none and attention fa3, the nearest measured on this GPU" in h100.found


def test_times_of_products_say_nothing_of_fp8_as_storage() -> None:
    ampere = on("NVIDIA GeForce RTX 3090", (8, 6), 23.7)
    expected = doctor.recommendation(ampere)
    assert "weight-only" in text(expected[:4])
    assert expected[-2].found == "time not measured on this GPU with these settings"
    assert "on NVIDIA H" in expected[-1].found and "recipe none" in expected[-1].found, "16 bits of TI2V fit it"


def test_a_library_that_does_not_load_is_not_called_present(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlashAttention 4 without its DSL; Transformer Engine in a version that was never tried; FA3 that loads."""
    doctor.register_attention()
    monkeypatch.setattr(doctor, "_version", lambda name: "4.0.0b36" if name != "ftfy" else "6.3.1")
    why = "flash_attn.cute does not load (ModuleNotFoundError: No module named 'cutlass')"
    for name, refusal in (("fa4", why), ("fa3", None), ("sage", "it takes bf16 or fp16, not torch.float32")):
        found = doctor.ATTENTION.backend(name)
        fake = Backend(name, found.run, lambda _, refusal=refusal: refusal, found.exact, found.priority)
        monkeypatch.setitem(doctor.ATTENTION._backends, name, fake)
    engine = (None, "Transformer Engine 4.0.0 has not been tested with this pack: python install.py")
    monkeypatch.setattr(doctor, "engine_probe", lambda: engine)
    monkeypatch.setattr(doctor.kernels, "refusal", lambda *_: None)
    rows = {row.what: row for row in doctor.libraries(on("NVIDIA H200", (9, 0), 139.8))}
    fa4 = rows["FlashAttention 4"]
    assert fa4.found == "4.0.0b36, not usable"
    assert fa4.note == f"{why}; reinstall it with: python install.py --with fa4"
    assert rows["Transformer Engine"] == doctor.Row("Transformer Engine", "4.0.0b36, not usable", engine[1])
    for name in ("FlashAttention 3", "SageAttention", "Triton"):
        assert rows[name].found == "4.0.0b36" and "does not load" not in rows[name].note, name


def test_several_gpus_get_a_topology(monkeypatch: pytest.MonkeyPatch) -> None:
    fakes = {torch.device("cuda", index): on("NVIDIA H200", (9, 0), 140).caps for index in range(4)}
    monkeypatch.setattr(doctor, "gpu_devices", lambda: list(fakes))
    monkeypatch.setattr(doctor, "device_caps", lambda device: fakes[device])
    spec = doctor.SPECS["i2v-A14B"]
    found, why = doctor._topology(spec, doctor.Recipe("rowwise"))
    assert found.startswith("cfg 2 x ulysses 2") and "guidance share nothing" in why and "Estimated" in why
    fakes[torch.device("cuda", 3)] = on("NVIDIA A100", (8, 0), 80).caps
    assert "different kinds" in doctor._topology(spec, doctor.Recipe("rowwise"))[1]
    for device in fakes:
        fakes[device] = on("NVIDIA RTX A400", (8, 6), 4).caps
    assert "needs" in doctor._topology(spec, doctor.Recipe("none"))[1], "it does not fit, however it is split"


def test_memory_that_does_not_fit_is_said() -> None:
    small = text(doctor.recommendation(on("NVIDIA GeForce RTX 4070", (8, 9), 11.7)))
    assert "weights are streamed from host memory" in small
    assert "streamed" not in text(doctor.recommendation(on("NVIDIA H200", (9, 0), 140)))


@pytest.mark.parametrize(
    ("patient", "said"),
    [
        (on("NVIDIA GeForce RTX 3090", (8, 6), 23.7), "FP8 needs compute capability 8.9"),
        (on("AMD Radeon RX 7900 XTX", (11, 0), 24, cuda=None), "is an AMD GPU"),
        (on("mps", None, 64, cuda=None), "torch has no FP8 type on MPS"),
    ],
    ids=["ampere", "rocm", "mps"],
)
def test_other_machines_say_what_is_off_and_why(
    patient: doctor.Patient, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor.compile, "device_caps", lambda device: patient.caps)
    assert said in text(doctor.products(patient))
    kernels = text(doctor.attention_kernels(patient))
    assert "sdpa | runs" in kernels and "fa3 | no: " in kernels
    assert doctor.other_kernels(patient) and doctor.libraries(patient) and doctor.recommendation(patient)


def test_pools_that_run_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from wan_fp8.parallel import pools

    patient = on("NVIDIA H200", (9, 0), 140)
    monkeypatch.setattr(pools, "live_pools", list)
    assert "none running" in text(doctor.pools(patient))
    alive = {"devices": ["cuda:0", "cuda:1"], "alive": True, "failure": None, "ranks": [], "models": 2}
    dead = {"devices": ["10.0.0.2:29500"], "alive": False, "failure": "rank 1 ended", "ranks": [], "models": 0}
    monkeypatch.setattr(pools, "live_pools", lambda: [alive, dead])
    said = text(doctor.pools(patient))
    assert "pool 1 | 2 processes: cuda:0, cuda:1; 2 models | alive" in said and "ended: rank 1 ended" in said
    monkeypatch.setattr(pools, "live_pools", list)
    monkeypatch.setattr(sys, "platform", "win32")
    assert "Linux only" in text(doctor.pools(patient))


def test_the_command_prints_json(models: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "wan_fp8.doctor",
        "--json",
        "--no-self-test",
        "--device",
        "cpu",
        "--models",
        models,
    ]
    done = subprocess.run(list(map(str, command)), cwd=PACK, capture_output=True, text=True, timeout=60, check=True)
    sections = json.loads(done.stdout)["sections"]
    assert "self-test" not in sections and any("TI2V" in r["found"] for r in sections["models"])


def test_what_the_pack_says_about_speed_is_what_was_measured() -> None:
    sys.path.insert(0, str(PACK / "benchmarks"))
    try:
        import summary
    finally:
        sys.path.pop(0)
    wanted = summary.text()
    assert measured.FILE.read_text(encoding="utf-8") == wanted, "new results: run 'python benchmarks/summary.py'"
    assert len(measured.measurements()) >= 18
