#!/usr/bin/env python3
"""``make demo``: from nothing to a video. Sets up a ComfyUI, makes a tiny Wan2.2 checkpoint, runs the shipped workflow.

The checkpoint has the real layout and key names and random weights, so the video shows noise; everything that happens
on the way is what happens with the real one. With ``COMFYUI_DIR`` the demo runs that ComfyUI's code and interpreter,
with folders of its own for models and settings, and adds nothing there but the link to the pack.

Standard library only: this runs before anything is installed.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import environments
import host

BASE = host.HOST_DIR / "demo"
CHECKPOINT = "Wan2.2-T2V-A14B-tiny"
WORKFLOW = host.PACK / "workflows" / "t2v_a14b.json"
SETTINGS = (f"checkpoint={CHECKPOINT}", "width=160", "height=96", "length=17", "steps=4")
"""Small enough for two CPU cores."""


def make_checkpoint(chosen: host.Host, client: Path) -> None:
    """Write the tiny checkpoint where the demo's ComfyUI looks for it, unless it is there and newer than its script."""
    target = BASE / "models" / "wan" / CHECKPOINT
    script = host.PACK / "scripts" / "make_tiny_checkpoint.py"
    receipt = target / "tiny.json"  # the script writes it last, and the whole folder or nothing
    sources = [script, *script.with_name("tiny_checkpoint").glob("*.py")]
    if receipt.is_file() and all(path.stat().st_mtime < receipt.stat().st_mtime for path in sources):
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    environment = dict(os.environ)
    if not chosen.pinned:  # its interpreter has torch; the command line's libraries, pure Python, come from our own
        environment["PYTHONPATH"] = host.site_packages(client)
        environment["PYTHONDONTWRITEBYTECODE"] = "1"  # not even a cache file appears in somebody's own installation
    command = [str(chosen.python), str(script), str(target), "--task", "t2v"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise host.HostError(f"The tiny checkpoint could not be made:\n{done.stdout}{done.stderr}")


def run_to_its_end(command: list[str]) -> int:
    """The exit code of a command that is told of whatever would end us, and waited for while it cleans up."""
    # In a session of its own Ctrl-C reaches us alone: the command hears of it once, however it was sent.
    runner = subprocess.Popen(command, start_new_session=True)
    stopped: list[int] = []

    def forward(number: int, _: object) -> None:
        stopped.append(number)
        runner.terminate()

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
            signal.signal(number, forward)
    code = runner.wait()
    return 130 if stopped and code < 0 else code  # it was stopped before it could say so itself


def main() -> int:
    try:
        chosen = host.ensure()
        client = environments.client_python()
        make_checkpoint(chosen, client)
    except host.HostError as error:
        host.say(str(error))
        return 1
    except KeyboardInterrupt:
        return 130
    runner = [str(client), str(host.PACK / "scripts" / "run_workflow.py"), str(WORKFLOW)]
    folders = ["--base-directory", str(BASE), "--output", str(host.PACK / "output")]
    return run_to_its_end([*runner, *folders, *(word for s in SETTINGS for word in ("--set", s))])


if __name__ == "__main__":
    sys.exit(main())
