"""Small files are written whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from wan_fp8.errors import InputError
from wan_fp8.files import write_whole


def test_written_and_replaced(tmp_path) -> None:
    path = tmp_path / "a.json"
    for content in (b"one", b"two"):
        write_whole(path, content)
        assert path.read_bytes() == content
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch) -> None:
    path = tmp_path / "a.json"
    write_whole(path, b"one")
    original = Path.write_bytes

    def full(self, content):
        original(self, content[:1])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(InputError, match=r"a\.json could not be written to .* \(No space left on device\)"):
        write_whole(path, b"two")
    assert path.read_bytes() == b"one" and [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_folder_that_is_not_there(tmp_path) -> None:
    with pytest.raises(InputError, match="choose another place"):
        write_whole(tmp_path / "missing" / "a.json", b"one")
