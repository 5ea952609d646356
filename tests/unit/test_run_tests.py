"""Two halves of the suite as one: every folder is in one of them, and the last line adds them up."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import run_tests

PACK = Path(__file__).resolve().parents[2]


def test_every_folder_with_tests_is_in_one_half() -> None:
    first, second = run_tests.folders()
    assert not set(first) & set(second)
    assert {f"tests/{path.parent.name}" for path in (PACK / "tests").glob("*/test_*.py")} <= {*first, *second}
    assert all((PACK / folder).is_dir() for folder in (*first, *second))


def test_counts_are_added_up() -> None:
    first = "...\n===== 1 failed, 300 passed, 2 skipped, 1 warning in 12.30s ====="
    second = "FAILED a - in 3.0s\n== 20 passed, 5 skipped, 1 error, 3 warnings in 100.11s (0:01:40) =="
    line = run_tests.total([first, second], 100.5)
    assert line.strip("= ") == "1 failed, 320 passed, 7 skipped, 1 error, 4 warnings in 100.50s"
    assert run_tests.total(["", "crashed"], 1.0).strip("= ") == "no tests ran in 1.00s"


@pytest.mark.parametrize(
    ("codes", "code"), [([0, 0], 0), ([0, 1], 1), ([1, 0], 1), ([5, 0], 0), ([5, 5], 5), ([0, -9], 9)]
)
def test_the_worst_exit_code_counts(codes: list[int], code: int) -> None:
    assert run_tests.exit_code(codes) == code


def test_both_halves_run_and_are_shown(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    def command(half: int, chosen: list[str], options: list[str]) -> list[str]:
        del chosen, options
        return [sys.executable, "-c", f"print('== {half + 1} passed in 0.1s =='); raise SystemExit({half})"]

    monkeypatch.setattr(run_tests, "command", command)
    assert run_tests.main([]) == 1
    shown = capfd.readouterr().out
    assert shown.index("1 passed") < shown.index("2 passed") and " 3 passed in " in shown.splitlines()[-1]
