#!/usr/bin/env python3
"""``make demo``: from nothing to a video. Sets up a ComfyUI, runs the shipped workflow on the shipped checkpoint.

The checkpoint in ``checkpoints/`` is a Wan2.2 in miniature, trained on a drawn world (``tools/tiny_wan``): it paints
what its prompt says, and everything that happens on the way is what happens with the real one. With ``COMFYUI_DIR``
the demo runs that ComfyUI's code and interpreter, with folders of its own for models and settings, and adds nothing
there but the link to the pack.

Standard library only: this runs before anything is installed.
"""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import environments
import host

BASE = host.HOST_DIR / "demo"
CHECKPOINT = "Wan2.2-T2V-A14B-tiny"
WORKFLOW = host.PACK / "workflows" / "t2v_a14b.json"
SOURCE = host.PACK / "checkpoints" / CHECKPOINT
PROMPT = "a red ball rolls to the right"
SETTINGS = (f"checkpoint={CHECKPOINT}", f"prompt={PROMPT}", "width=144", "height=96", "length=17")
"""The size that the checkpoint was trained at. Steps, guidance and solver are the workflow's: the published ones."""


def put_checkpoint() -> None:
    """Copy the shipped checkpoint to where the demo's ComfyUI looks for it, unless it is there."""
    if not SOURCE.is_dir():
        raise host.HostError(
            f"{SOURCE} is missing: the demo runs in a clone of the repository, not in an installed pack."
        )
    target = BASE / "models" / "wan" / CHECKPOINT
    if _files(target) == _files(SOURCE):
        return
    partial = target.with_name(f"{CHECKPOINT}.partial")
    for leftover in (partial, target):
        shutil.rmtree(leftover, ignore_errors=True)
    shutil.copytree(SOURCE, partial)
    partial.rename(target)


def _files(folder: Path) -> dict[Path, tuple[int, int]]:
    """Size and time of every file below, by relative path."""
    found = ((path.relative_to(folder), path.stat()) for path in sorted(folder.rglob("*")) if path.is_file())
    return {name: (facts.st_size, facts.st_mtime_ns) for name, facts in found}


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
        host.ensure()
        client = environments.client_python()
        put_checkpoint()
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
