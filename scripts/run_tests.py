#!/usr/bin/env python3
"""The whole test suite in two processes side by side, which on two cores takes little more than half the time.

    python scripts/run_tests.py             what 'make test' runs
    python scripts/run_tests.py -x -k name  any options of pytest

Each half keeps its own order, server and browser, as in one process. What the first half prints is shown as it comes,
that of the second after it; the last line adds both up. Standard library only.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import IO

PACK = Path(__file__).resolve().parent.parent
HALVES = (("unit",), ("nodes", "distributed", "ui", "gpu"))
"""Folders of ``tests``, about as long one as the other. A folder that is in neither goes into the second."""
COUNTED = re.compile(r"(\d+) (failed|passed|skipped|deselected|xfailed|xpassed|errors?|warnings?|rerun)")
NO_TESTS = 5
"""pytest's exit code where it collected nothing: with -k one half may be empty."""


def folders() -> tuple[list[str], list[str]]:
    """Those of both halves, as paths from the pack's root."""
    first = [f"tests/{name}" for name in HALVES[0]]
    known = [f"tests/{name}" for name in HALVES[1] if (PACK / "tests" / name).is_dir()]
    found = {f"tests/{path.parent.name}" for path in (PACK / "tests").glob("*/test_*.py")}
    return first, known + sorted(found - {*first, *known})


def command(half: int, chosen: Sequence[str], options: Sequence[str]) -> list[str]:
    """One half's pytest, with a cache of its own."""
    cache = PACK / ".out" / f"pytest-{half}"
    base = [sys.executable, "-P", "-m", "pytest", "-c", "tests/pytest.ini", "--rootdir", "tests"]
    return [*base, "-o", f"cache_dir={cache}", *options, *chosen]


def total(outputs: Sequence[str], seconds: float) -> str:
    """The closing lines of all, added up, in pytest's own words."""
    counts: Counter[str] = Counter()
    for output in outputs:
        lines = [line for line in output.splitlines() if re.search(r" in [\d.]+s", line)]
        for number, what in COUNTED.findall(lines[-1] if lines else ""):
            counts[what.removesuffix("s") if what in ("errors", "warnings") else what] += int(number)
    order = ("failed", "passed", "skipped", "deselected", "xfailed", "xpassed", "error", "warning", "rerun")
    parts = [f"{counts[what]} {what}{'s' * (what in ('error', 'warning') and counts[what] != 1)}" for what in order]
    shown = ", ".join(part for part, what in zip(parts, order, strict=True) if counts[what]) or "no tests ran"
    text = f" {shown} in {seconds:.2f}s "
    return text.center(120, "=")


def exit_code(codes: Sequence[int]) -> int:
    """The worst of both; a half without tests counts only where both have none."""
    ran = [code for code in codes if code != NO_TESTS]
    return max((abs(code) for code in ran), default=NO_TESTS)


def copied(source: IO[str], show: bool) -> str:
    """Everything that a process prints, shown as it comes where asked."""
    lines = []
    for line in source:
        lines.append(line)
        if show:
            print(line, end="", flush=True)
    return "".join(lines)


def main(options: Sequence[str]) -> int:
    began = time.monotonic()
    (PACK / ".out").mkdir(exist_ok=True)
    halves = folders()
    with tempfile.TemporaryFile("w+", encoding="utf-8") as later:
        commands = [command(half, chosen, options) for half, chosen in enumerate(halves)]
        running = [
            subprocess.Popen(commands[0], cwd=PACK, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True),
            subprocess.Popen(commands[1], cwd=PACK, stdout=later, stderr=subprocess.STDOUT, text=True),
        ]
        try:
            assert running[0].stdout is not None
            outputs = [copied(running[0].stdout, show=True)]
            codes = [process.wait() for process in running]
        except KeyboardInterrupt:
            for process in running:  # each has had the terminal's Ctrl-C already; whoever did not, gets it now
                process.send_signal(signal.SIGINT)
                process.wait()
            return 130
        later.seek(0)
        outputs.append(copied(later, show=True))
    print(total(outputs, time.monotonic() - began))
    return exit_code(codes)


if __name__ == "__main__":
    os.chdir(PACK)
    sys.exit(main(sys.argv[1:]))
