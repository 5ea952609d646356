"""Machines that are not here: what Windows or macOS lacks is taken away, and torch says that it was built for something
else and sees no GPU.

In a process of its own that loads the pack as ComfyUI does, imports the whole engine and asks the Doctor.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from wan_fp8 import doctor

PACK = Path(__file__).resolve().parents[2]
PROBE = """
import asyncio, importlib, importlib.abc, json, sys
core, pack, modules, lacks = sys.argv[1], sys.argv[2], *map(json.loads, sys.argv[3:])
sys.path.insert(0, core)
import comfy.cli_args
comfy.cli_args.args.cpu = True
import multiprocessing, torch, nodes  # the host and torch have code of their own for each system

class NotHere(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in lacks["modules"]:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, NotHere())
for name in lacks["modules"]:
    sys.modules.pop(name, None)
import os, signal, socket
sys.platform = lacks["platform"]
for module, names in ((os, lacks["os"]), (signal, lacks["signal"]), (socket, lacks["socket"])):
    for name in names:
        delattr(module, name)
torch.backends.mps.is_available = lambda: False
torch.version.cuda = None
before = set(nodes.NODE_CLASS_MAPPINGS)
assert asyncio.run(nodes.load_custom_node(pack))
ours = sorted(set(nodes.NODE_CLASS_MAPPINGS) - before)
for name in ours:
    nodes.NODE_CLASS_MAPPINGS[name].GET_SCHEMA()
loaded = pack.replace(".", "_x_")
for name in modules:
    importlib.import_module(f"{loaded}.{name}")
doctor = importlib.import_module(f"{loaded}.wan_fp8.doctor")
print(json.dumps([ours, json.loads(doctor.examine("cpu").json())["sections"]]))
"""
WINDOWS = {
    "platform": "win32",
    "modules": ["fcntl", "grp", "pwd", "resource", "termios", "posix_ipc", "_posixshmem"],
    "os": ["fork", "getuid", "setsid", "killpg", "sched_getaffinity"],
    "signal": ["SIGKILL", "SIGHUP", "pthread_sigmask"],
    "socket": [],
}
MACOS = {
    "platform": "darwin",
    "modules": ["posix_ipc"],
    "os": [
        *("sched_getaffinity", "sched_setaffinity", "pidfd_open", "memfd_create", "eventfd", "posix_fadvise"),
        *("getrandom", "copy_file_range", "splice", "setresuid"),
    ],
    "signal": ["SIGRTMIN", "SIGPWR", "SIGSTKFLT", "sigtimedwait", "sigwaitinfo"],
    "socket": ["SOCK_CLOEXEC", "SOCK_NONBLOCK", "SO_PEERCRED", "AF_NETLINK", "AF_PACKET", "AF_VSOCK"],
}
"""What CPython documents as not available there, of what this system has: names of modules and of their attributes."""
MODULES = [
    ".".join(path.relative_to(PACK).with_suffix("").parts).removesuffix(".__init__")
    for path in sorted((PACK / "wan_fp8").rglob("*.py"))
    if not path.name.startswith("_") or path.name == "__init__.py"
]


@pytest.mark.parametrize("lacks", [WINDOWS, MACOS], ids=["windows", "macos"])
def test_the_pack_loads_without_what_another_system_lacks(comfy_core: Path, lacks: dict[str, Any]) -> None:
    command = [sys.executable, "-c", PROBE, str(comfy_core), str(PACK), json.dumps(MODULES), json.dumps(lacks)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    ours, sections = json.loads(done.stdout.splitlines()[-1])
    assert len(ours) >= 19 and all(name.startswith("WanFP8") for name in ours)
    said = {row["what"]: row for rows in sections.values() for row in rows}
    assert said["PyTorch"]["note"] == "built for the CPU (and MPS on a Mac)"
    assert said["fused kernels"]["note"] == "eager ones instead"
    assert "Linux only" in said["worker pools"]["note"]
    assert all(row["note"] == "passed" for row in sections["self-test"])


def test_a_rocm_build_of_torch_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", "6.4", raising=False)
    assert {row.what: row.note for row in doctor.machine(doctor.Patient(doctor.device_caps("cpu"), {}))}["PyTorch"] == (
        "built for ROCm 6.4"
    )
