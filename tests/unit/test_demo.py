"""``make demo``: what it leaves alone, and how it ends when it is told to."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import demo
import host
import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


def test_the_checkpoint_is_put_once_and_put_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "BASE", tmp_path / "demo")
    demo.put_checkpoint()
    put = tmp_path / "demo" / "models" / "wan" / demo.CHECKPOINT
    weights = put / "low_noise_model" / "diffusion_pytorch_model.safetensors"
    first = weights.stat()
    demo.put_checkpoint()
    assert weights.stat().st_ino == first.st_ino, "there already"
    weights.write_bytes(b"half a copy")
    (put / "left.over").touch()
    demo.put_checkpoint()
    assert demo._files(put) == demo._files(demo.SOURCE)
    assert [path.name for path in put.parent.iterdir()] == [demo.CHECKPOINT]


def test_an_installed_pack_has_no_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "SOURCE", tmp_path / "checkpoints")
    monkeypatch.setattr(demo, "BASE", tmp_path / "demo")
    with pytest.raises(host.HostError, match="is missing: the demo runs in a clone"):
        demo.put_checkpoint()
    assert not list(tmp_path.iterdir())


RUNNER = """
import pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[1])
heard = []
signal.signal(signal.SIGINT, lambda *_: heard.append("SIGINT"))
signal.signal(signal.SIGTERM, lambda *_: heard.append("SIGTERM"))
(folder / "ready").touch()
while not heard:
    time.sleep(0.01)
time.sleep(1.0)  # what cancelling takes; more than an impatient parent waits
(folder / "cleaned").write_text(" ".join(heard))
sys.exit(130)
"""


@pytest.mark.parametrize("group", [True, False], ids=["ctrl-c", "one process"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_demo_waits_until_its_run_is_cancelled(number: signal.Signals, group: bool, tmp_path: Path) -> None:
    command = [sys.executable, "-c", RUNNER, str(tmp_path)]
    code = f"import sys; sys.path.insert(0, {str(SCRIPTS)!r}); import demo; sys.exit(demo.run_to_its_end({command!r}))"
    process = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    deadline = time.monotonic() + 20
    while not (tmp_path / "ready").exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    (os.killpg if group else os.kill)(process.pid, number)
    assert process.wait(20) == 130
    assert (tmp_path / "cleaned").read_text() == "SIGTERM", "told once, and left to finish"
