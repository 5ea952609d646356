"""PyTorch archives: plain tensors are read, pickled code is refused by name and never runs."""

from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch

from wan_fp8.checkpoint.reader import open_source
from wan_fp8.errors import CheckpointError

STATE = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(2, dtype=torch.bfloat16)}


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("name", ["m.pth", "m.pt", "m.ckpt", "m.bin"])
def test_a_plain_state_dict_is_read(tmp_path: Path, name: str, legacy: bool) -> None:
    torch.save(STATE, tmp_path / name, _use_new_zipfile_serialization=not legacy)
    with open_source(tmp_path / name) as source:
        assert source.label == name
        assert list(source) == ["a", "b"]
        assert source.info("a").shape == (2, 3)
        assert torch.equal(source.read("a"), STATE["a"])
        assert torch.equal(source.read("b", torch.float32), torch.ones(2))


@pytest.mark.parametrize("wrapper", ["state_dict", "model", "module", "generator"])
def test_what_training_code_wraps_is_unwrapped(tmp_path: Path, wrapper: str) -> None:
    torch.save({wrapper: STATE, "step": 3, "optimizer": {"lr": 0.1}}, tmp_path / "m.pth")
    with open_source(tmp_path / "m.pth") as source:
        assert list(source) == ["a", "b"]


def test_tensors_of_an_archive_are_mapped(tmp_path: Path) -> None:
    """A large archive is opened without reading it: the values change with the file under the (shared, clean) pages."""
    torch.save({"a": torch.zeros(1 << 20)}, tmp_path / "m.pth")
    with open_source(tmp_path / "m.pth") as source:
        value = source.read("a")
        content = (tmp_path / "m.pth").read_bytes()
        offset = content.find(bytes(1 << 12)) + (1 << 21)
        with open(tmp_path / "m.pth", "r+b") as file:
            file.seek(offset - offset % 4096)
            file.write(b"\x01" * 4096)
        assert value.count_nonzero() >= 1000


@pytest.mark.parametrize("legacy", [False, True])
def test_pickled_code_is_refused_and_does_not_run(tmp_path: Path, legacy: bool) -> None:
    target = tmp_path / "was_run"
    torch.save({**STATE, "x": Bomb(target)}, tmp_path / "m.pth", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(
        CheckpointError, match=r"^m.pth holds pickled code \((posix|nt).mkdir\), which was not run"
    ) as error:
        open_source(tmp_path / "m.pth")
    assert "\n" not in str(error.value)
    assert not target.exists()
    torch.load(tmp_path / "m.pth", weights_only=False)  # and it would have run
    assert target.exists()


def test_a_bare_pickle_with_code_is_refused_too(tmp_path: Path) -> None:
    (tmp_path / "m.ckpt").write_bytes(pickle.dumps({"x": Bomb(tmp_path / "was_run")}))
    with pytest.raises(CheckpointError, match=r"^m.ckpt "):
        open_source(tmp_path / "m.ckpt")
    assert not (tmp_path / "was_run").exists()


@pytest.mark.parametrize("keep", [0.3, 0.9, 0.99])
def test_a_truncated_archive_is_named_as_such(tmp_path: Path, keep: float) -> None:
    torch.save({"a": torch.randn(5000)}, tmp_path / "m.pth")
    content = (tmp_path / "m.pth").read_bytes()
    (tmp_path / "m.pth").write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(CheckpointError, match=r"m.pth is truncated"):
        open_source(tmp_path / "m.pth")


def test_a_truncated_legacy_archive_is_named_as_such(tmp_path: Path) -> None:
    torch.save({"a": torch.randn(5000)}, tmp_path / "m.pth", _use_new_zipfile_serialization=False)
    (tmp_path / "m.pth").write_bytes((tmp_path / "m.pth").read_bytes()[:3000])
    with pytest.raises(CheckpointError, match=r"m.pth is damaged or cut off"):
        open_source(tmp_path / "m.pth")


def test_other_archives_are_named_as_what_they_are(tmp_path: Path) -> None:
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "script.pth")
    with zipfile.ZipFile(tmp_path / "zip.pth", "w") as archive:
        archive.writestr("a/readme.txt", "hello")
    with zipfile.ZipFile(tmp_path / "packed.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", b"0" * 1000)
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({"lr": 0.1}, tmp_path / "none.pth")
    (tmp_path / "empty.pth").write_bytes(b"")
    for name, words in {
        "script": "is a TorchScript program",
        "zip": "is a zip file, but not a PyTorch archive",
        "packed": "is a compressed zip file",
        "list": "holds a list, not a table",
        "none": "holds no named tensors",
        "empty": "is empty",
    }.items():
        with pytest.raises(CheckpointError, match=f"^{name}.pth {words}"):
            open_source(tmp_path / f"{name}.pth")


def test_an_archive_called_safetensors_is_told_apart(tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    for path in (tmp_path / "m.safetensors", tmp_path / "shards" / "model.safetensors"):
        for zipped in (True, False):
            torch.save(STATE, path, _use_new_zipfile_serialization=zipped)
            with pytest.raises(
                CheckpointError, match=r"is a PyTorch pickle under a wrong name.*only if.*plain tensors"
            ):
                open_source(path if path.parent == tmp_path else path.parent)
