"""``install.py --with``: what is run, what is held, and that a failure leaves everything as it was.

A stand-in for pip writes and removes packages in a real environment without pip; one test does it all with pip itself,
from wheels on disk.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import install_libraries
import pytest
from install_libraries import DONE, FAILED, NOT_RESTORED, REFUSED, Environment, build_needs, install

from wan_fp8.libraries import LIBRARIES, Machine

HOPPER = Machine(python=(3, 12), platform="linux-x86_64", torch="2.11.0+cu130", cuda="13.0", capabilities=((9, 0),))
PIP = """
import json, os, pathlib, shutil, sys
plan = json.loads(pathlib.Path({plan!r}).read_text())
site = pathlib.Path({site!r})
with open({log!r}, "a") as log:
    pins = [pathlib.Path(b).read_text().split() for a, b in zip(sys.argv, sys.argv[1:]) if a == "--constraint"]
    log.write(json.dumps([sys.argv[1:], pins, os.environ.get("NVTE_WITH_NCCL_EP")]) + "\\n")
def remove(name):
    for path in list(site.glob(name.replace("-", "_") + "-*.dist-info")):
        shutil.rmtree(path)
def put(name, version, files=()):
    remove(name)
    info = site / f"{{name.replace('-', '_')}}-{{version}}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\\nName: {{name}}\\nVersion: {{version}}\\n")
    for file, text in files:
        (site / file).parent.mkdir(parents=True, exist_ok=True)
        (site / file).write_text(text)
if sys.argv[1] == "--version":
    sys.exit(plan.get("no pip", 0))
if sys.argv[1] == "uninstall":
    for name in sys.argv[4:]:
        if name not in plan.get("stuck", []):
            remove(name)
elif plan["done"]:  # the second time: what it is asked for
    for requirement in sys.argv[sys.argv.index("--no-deps") + 1:]:
        put(*requirement.split("=="))
else:
    for name, version, files in plan["installs"]:
        put(name, version, files)
    plan["done"] = True
    pathlib.Path({plan!r}).write_text(json.dumps(plan))
    sys.exit(plan.get("fails", 0))
"""


class Fake:
    """An environment with a torch of three lines, and a pip that does what it is told."""

    def __init__(self, folder: Path, **plan) -> None:
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
        self.python = folder / "venv" / "bin" / "python"
        (self.site,) = (folder / "venv" / "lib").glob("python*/site-packages")
        for name, version in (("torch", "2.11.0+cu130"), ("numpy", "2.1.0"), ("einops", "0.8.0"), ("pydantic", "2.0")):
            info = self.site / f"{name}-{version}.dist-info"
            info.mkdir()
            (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        (self.site / "torch.py").write_text("")
        self.log, self.said = folder / "log", []
        self.plan(folder, **plan)
        script = folder / "pip.py"
        script.write_text(PIP.format(plan=str(folder / "plan.json"), site=str(self.site), log=str(self.log)))
        self.environment = Environment((str(self.python),), (sys.executable, str(script)), say=self.said.append)
        self.before = self.environment.versions()

    @staticmethod
    def plan(folder: Path, **plan) -> None:
        (folder / "plan.json").write_text(json.dumps({"done": False, "installs": [], **plan}))

    def run(self, *names: str, machine: Machine = HOPPER, dry_run: bool = False) -> int:
        return install(names, machine, self.environment, dry_run=dry_run)

    @property
    def calls(self) -> list:
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return [call for call in map(json.loads, lines) if call[0] != ["--version"]]

    @property
    def words(self) -> str:
        return "\n".join(self.said)


WORKS = [["fa3-fwd", "0.0.3", [["fa3_fwd_interface.py", ""]]]]
BREAKS = [
    ["fa3-fwd", "0.0.3", [["fa3_fwd_interface.py", "raise ImportError('undefined symbol: _ZN')"]]],
    ["ninja", "1.11", []],
    ["pydantic", "2.9", []],
]


def test_success(tmp_path: Path) -> None:
    fake = Fake(tmp_path, installs=WORKS)
    assert fake.run("fa3") == DONE
    ((arguments, (pins,), _),) = fake.calls
    assert arguments[0] == "install" and arguments[-2:] == ["--no-deps", "fa3-fwd==0.0.3"]
    assert pins == ["torch==2.11.0+cu130", "numpy==2.1.0"], "what is there, in the version that is there"
    assert "fa3-fwd new -> 0.0.3" in fake.words and fake.environment.versions()["fa3-fwd"] == "0.0.3"
    shown = next(index for index, line in enumerate(fake.said) if "--constraint" in line)
    assert shown < len(fake.said) - 1 and "fa3-fwd==0.0.3" in fake.said[shown], "shown before it is run"
    assert fake.run("fa3") == DONE and len(fake.calls) == 1 and "here already" in fake.said[-1]


def test_another_version_is_replaced_and_comes_back_on_failure(tmp_path: Path) -> None:
    fake = Fake(tmp_path, installs=[["fa3-fwd", "0.0.3", [["fa3_fwd_interface.py", "import nothing_of_that_name"]]]])
    info = fake.site / "fa3_fwd-0.0.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: fa3_fwd\nVersion: 0.0.2\n")
    (fake.site / "fa3_fwd_interface.py").write_text("")
    before = fake.environment.versions()
    assert before["fa3-fwd"] == "0.0.2" and fake.run("fa3") == FAILED
    assert fake.environment.versions() == before and fake.calls[-1][0][-2:] == ["--no-deps", "fa3-fwd==0.0.2"]


def test_a_build_of_ones_own_is_left_alone(tmp_path: Path) -> None:
    fake = Fake(tmp_path, installs=WORKS)
    info = fake.site / "flash_attn_3-3.0.0b1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: flash_attn_3\nVersion: 3.0.0b1\n")
    (fake.site / "flash_attn_interface.py").write_text("")
    assert fake.run("fa3") == DONE and fake.calls == [] and "here already" in fake.said[-1]


def test_a_failing_import_is_rolled_back(tmp_path: Path) -> None:
    fake = Fake(tmp_path, installs=BREAKS)
    assert fake.run("fa3") == FAILED
    assert fake.environment.versions() == fake.before, "new ones gone, the changed one back"
    assert fake.calls[1][0] == ["uninstall", "--yes", "--disable-pip-version-check", "fa3-fwd", "ninja"]
    assert fake.calls[2][0][-2:] == ["--no-deps", "pydantic==2.0"]
    assert "undefined symbol: _ZN" in fake.words and "as it was before" in fake.said[-1]


def test_a_failing_pip_is_rolled_back(tmp_path: Path) -> None:
    fake = Fake(tmp_path, installs=WORKS, fails=1)
    assert fake.run("fa3") == FAILED and fake.environment.versions() == fake.before
    assert "pip failed" in fake.words


def test_a_torch_that_moved_is_put_back(tmp_path: Path) -> None:
    """pip holds what is pinned; an installer of a package's own may not."""
    fake = Fake(tmp_path, installs=[*WORKS, ["numpy", "2.2.0", []]])
    assert fake.run("fa3") == FAILED and fake.environment.versions() == fake.before
    assert "numpy changed from 2.1.0 to 2.2.0" in fake.words


def test_what_cannot_be_put_back_is_said(tmp_path: Path) -> None:
    fake = Fake(tmp_path, installs=BREAKS, stuck=["ninja"])
    assert fake.run("fa3") == NOT_RESTORED
    assert "not everything could be put back (ninja new -> 1.11)" in fake.said[-1]


def test_an_interrupt_is_rolled_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Fake(tmp_path, installs=WORKS)
    run_pip = Environment.run_pip

    def interrupted(self, arguments, environment):
        result = run_pip(self, arguments, environment)
        if arguments[0] == "install":
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(Environment, "run_pip", interrupted)
    assert fake.run("fa3") == FAILED and fake.environment.versions() == fake.before


def test_a_second_library_is_not_tried_after_a_failure(tmp_path: Path) -> None:
    fake = Fake(tmp_path, installs=BREAKS)
    assert fake.run("fa3", "sage") == FAILED
    assert not any("sageattention" in " ".join(call[0]) for call in fake.calls)


@pytest.mark.parametrize(
    "names, machine, words",
    [
        (("fa5",), HOPPER, r"unknown library 'fa5': choose from transformer-engine, fa3"),
        (("fa3", "torch"), HOPPER, r"unknown library 'torch'"),
        (("fa3",), Machine(python=(3, 12), platform="win32-AMD64", torch="2.11.0", cuda="13.0"), "on win32-AMD64"),
        (("fa3",), Machine(python=(3, 12), platform="linux-x86_64", torch="2.11.0", cuda=None), "built for CUDA"),
        (
            ("fa3",),
            Machine(python=(3, 12), platform="linux-x86_64", torch="2.11.0", cuda="13.0", capabilities=((8, 9),)),
            r"compute capability 9\.0; this machine has 8\.9",
        ),
    ],
)
def test_nothing_is_tried_that_cannot_work(tmp_path: Path, names, machine: Machine, words: str) -> None:
    fake = Fake(tmp_path, installs=WORKS)
    assert fake.run(*names, machine=machine) == REFUSED and fake.calls == []
    assert len(fake.said) == 1 and "\n" not in fake.said[0] and re.search(words, fake.said[0])


def test_a_python_without_pip(tmp_path: Path) -> None:
    fake = Fake(tmp_path, **{"no pip": 1})
    assert fake.run("fa3") == REFUSED and "has no pip: run" in fake.said[0] and "ensurepip" in fake.said[0]


def test_a_dry_run_shows_and_does_nothing(tmp_path: Path) -> None:
    fake = Fake(tmp_path, installs=WORKS)
    assert fake.run("fa3", "sage", dry_run=True) == DONE and fake.calls == []
    assert "fa3-fwd==0.0.3" in fake.words and "sageattention==1.0.6" in fake.words
    assert "torch==2.11.0+cu130, numpy==2.1.0" in fake.words


# ---- compilation ---------------------------------------------------------------------------------------------------


def cuda_headers(folder: Path) -> Path:
    for header in install_libraries.HEADERS:
        (folder / header).parent.mkdir(parents=True, exist_ok=True)
        (folder / header).touch()
    return folder


def test_what_a_compilation_lacks_is_said_before_it_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CPATH", "")
    monkeypatch.setattr(install_libraries.shutil, "which", lambda name: None)
    monkeypatch.setattr(install_libraries, "_header_folders", lambda environment: list(environment.include))
    fake = Fake(tmp_path, installs=[])
    assert fake.run("transformer-engine") == REFUSED and fake.calls == []
    for words in (
        "setuptools, wheel, ninja, packaging",
        "a C++ compiler",
        '"nvidia-cuda-crt==13.0.*"',
        "nvidia-nccl-cu13",
    ):
        assert words in fake.said[0], words
    old = Machine(python=(3, 12), platform="linux-x86_64", torch="2.8.0", cuda="12.8")
    assert '"nvidia-cuda-nvcc-cu12==12.8.*"' in str(build_needs({}, old, fake.environment))
    headers = cuda_headers(tmp_path / "include")
    ready = dict.fromkeys(install_libraries.BUILD_PACKAGES, "1")
    monkeypatch.setattr(install_libraries.shutil, "which", lambda name: "/usr/bin/c++")
    assert build_needs(ready, HOPPER, Environment(include=[headers])) == []
    (headers / "nccl.h").unlink()
    assert build_needs(ready, HOPPER, Environment(include=[headers])) == [
        "headers of CUDA (pip install --no-deps nvidia-nccl-cu13)"
    ]


def test_a_compilation_finds_the_headers_that_pip_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(install_libraries, "build_needs", lambda *_: [])
    monkeypatch.setenv("CPATH", "/mine")
    files = [["transformer_engine/__init__.py", ""], ["transformer_engine/pytorch.py", ""]]
    fake = Fake(tmp_path, installs=[["transformer-engine", "2.20.2", files]])
    environment = Environment(
        fake.environment.python, fake.environment.pip, [tmp_path / "include"], [tmp_path / "lib"], fake.said.append
    )
    assert install(["transformer-engine"], HOPPER, environment) == DONE
    ((arguments, (pins,), variable),) = fake.calls
    assert "--no-build-isolation" in arguments and variable == "0" and pins[0] == "torch==2.11.0+cu130"
    assert f"CPATH={tmp_path / 'include'}{os.pathsep}/mine" in fake.words
    assert f"LIBRARY_PATH={tmp_path / 'lib'}" in fake.words


def test_a_library_is_tried_as_the_pack_loads_it() -> None:
    """Transformer Engine may need torch's own cuDNN to be loaded first; here it is not installed at all."""
    words = Environment().import_failure(LIBRARIES["transformer-engine"])
    assert words is not None and "No module named 'transformer_engine'" in words
    assert "; Transformer Engine is not installed; install it with" in words


# ---- pip itself ----------------------------------------------------------------------------------------------------


def wheel(folder: Path, name: str, version: str, files: dict[str, str]) -> None:
    """A wheel of these files."""
    module, info = name.replace("-", "_"), f"{name.replace('-', '_')}-{version}.dist-info"
    content = {
        **files,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = []
    for path, text in content.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
        record.append(f"{path},sha256={digest},{len(text)}")
    with zipfile.ZipFile(folder / f"{module}-{version}-py3-none-any.whl", "w") as archive:
        for path, text in content.items():
            archive.writestr(path, text)
        archive.writestr(f"{info}/RECORD", "\n".join([*record, f"{info}/RECORD,,"]) + "\n")


def test_with_pip_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Success, a failing import and its rollback, and a pin that pip refuses to break, without a network."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    wheel(wheels, "torch", "2.11.0", {"torch.py": ""})
    wheel(wheels, "torch", "2.12.0", {"torch.py": ""})
    wheel(wheels, "fa3-fwd", "0.0.3", {"fa3_fwd_interface.py": "import torch"})
    wheel(wheels, "sageattention", "1.0.6", {"sageattention.py": "raise OSError('libcudart.so.13: cannot open')"})
    for name, value in (("PIP_NO_INDEX", "1"), ("PIP_FIND_LINKS", str(wheels)), ("PIP_CONFIG_FILE", os.devnull)):
        monkeypatch.setenv(name, value)
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = str(tmp_path / "venv" / "bin" / "python")
    said: list[str] = []
    environment = Environment((python,), (python, "-m", "pip"), say=said.append)
    assert environment.run_pip(["install", "--quiet", "torch==2.11.0"], {})
    bare = environment.versions()
    machine = Machine(python=(3, 12), platform="linux-x86_64", torch="2.11.0", cuda="13.0")
    assert install(["fa3"], machine, environment) == DONE
    with_fa3 = environment.versions()
    assert with_fa3 == {**bare, "fa3-fwd": "0.0.3"}
    assert install(["sage"], machine, environment) == FAILED
    assert environment.versions() == with_fa3 and "libcudart.so.13: cannot open" in "\n".join(said)
    constraints = tmp_path / "constraints.txt"
    constraints.write_text("torch==2.11.0\n")
    assert not environment.run_pip(["install", "--quiet", "--constraint", str(constraints), "torch==2.12.0"], {})
