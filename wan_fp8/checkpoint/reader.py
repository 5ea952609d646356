"""Opening weight files: one .safetensors, a sharded folder, or a PyTorch archive, always headers first.

``open_source`` is the one door. Nothing is read or allocated for a file whose header does not hold.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from .header import Header, open_binary, read_header, refuse_format, sniff
from .tensors import DictSource, TensorInfo, TensorSource, convert
from .transfer import FileBytes, Workers, stream

MAX_INDEX_BYTES = 32 << 20
_SHARD = re.compile(r"^(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<rest>\..*)?\.safetensors$")
_STEMS = ("diffusion_pytorch_model", "model")
"""First name that matches wins: transformers and VAEs, then text encoders."""


class SafetensorsSource(TensorSource):
    """One safetensors file, or the shards of one model."""

    def __init__(self, paths: Sequence[Path], label: str, *, map_files: bool = True) -> None:
        """Check every header; no tensor is read.

        Args:
            paths: the file, or the shards in order.
            label: how messages call it.
            map_files: hand out views of the mapped file for tensors that keep their type; False copies them (network
                drives that fail while a run goes on, files that will be overwritten).
        """
        self.label, self.map_files = label, map_files
        headers = [read_header(path) for path in paths]
        self.tensors, self.metadata = _merged(label, paths, headers)
        self.paths = tuple(paths)
        self._places = {
            name: (index, header.offsets[name]) for index, header in enumerate(headers) for name in header.tensors
        }
        self._files: dict[int, FileBytes] = {}
        self._workers = Workers()

    def read(
        self,
        name: str,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        scale: Tensor | None = None,
    ) -> Tensor:
        info = self.info(name)
        if info.dtype is None:
            raise CheckpointError(
                f"{self.label} stores {name} as {info.stored}, which PyTorch {torch.__version__} lacks: update torch, "
                "or use a file in bf16"
            )
        device = torch.device(device)
        wanted = dtype or (info.dtype if scale is None else torch.float32)
        if device.type == "meta":
            return torch.empty(info.shape, dtype=wanted, device=device)
        index, offset = self._places[name]
        file = self._file(index)
        direct = wanted == info.dtype and scale is None
        if device.type == "cpu" and not direct:
            return stream(file, offset, info.shape, info.dtype, wanted, scale, self._workers)
        # A device converts faster than a CPU: the bytes travel as they are stored.
        if self.map_files and info.nbytes and offset % info.dtype.itemsize == 0:
            value = file.view(offset, info.nbytes).view(info.dtype).view(info.shape)
        else:
            value = stream(file, offset, info.shape, info.dtype, info.dtype, None, self._workers)
        return convert(value, wanted, device, scale)

    def _file(self, index: int) -> FileBytes:
        if index not in self._files:
            self._files[index] = FileBytes(self.paths[index])
        return self._files[index]

    def close(self) -> None:
        self._workers.close()
        for file in self._files.values():
            file.close()
        self._files.clear()


def _merged(
    label: str, paths: Sequence[Path], headers: Sequence[Header]
) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    tensors: dict[str, TensorInfo] = {}
    owner: dict[str, Path] = {}
    metadata: dict[str, str] = {}
    for path, header in zip(paths, headers, strict=True):
        metadata.update(header.metadata)
        for name, info in header.tensors.items():
            if name in tensors:
                raise CheckpointError(
                    f"{label} holds {name} twice, in {owner[name].name} and {path.name}; "
                    "remove the shards of the other download"
                )
            tensors[name], owner[name] = info, path
    return tensors, metadata


def open_source(source: str | Path | Mapping[str, Tensor] | TensorSource, *, map_files: bool = True) -> TensorSource:
    """Open a weight file, a folder of shards, or a state dict, without reading a weight.

    Raises:
        CheckpointError: missing, truncated, empty or mislabelled file; missing shard; pickled code.
    """
    if isinstance(source, TensorSource):
        return source
    if isinstance(source, Mapping):
        return DictSource(source)
    path = Path(source)
    if path.is_dir():
        return _open_folder(path, map_files)
    return open_file(path, map_files=map_files)


def open_file(path: Path, *, map_files: bool = True) -> TensorSource:
    """Open one file by its content: safetensors or a PyTorch archive, whatever its name says."""
    if not path.exists():
        raise CheckpointError(f"there is no file {path}; check the name and the folder")
    form = sniff(path)
    if form in ("zip", "pickle"):
        if path.suffix == ".safetensors":
            raise refuse_format(path, form)
        from .pickled import open_archive

        return open_archive(path, form)
    if form == "safetensors" or path.suffix == ".safetensors":
        return SafetensorsSource([path], path.name, map_files=map_files)
    raise refuse_format(path, form)


def _open_folder(folder: Path, map_files: bool) -> TensorSource:
    return SafetensorsSource(shards_of(folder), f"{folder.parent.name}/{folder.name}", map_files=map_files)


def shards_of(folder: Path) -> list[Path]:
    """The weight files of the model in ``folder``: by its index, else by name.

    Raises:
        CheckpointError: no weights, a shard missing, or an index that points elsewhere or disagrees with the shards.
    """
    for stem in _STEMS:
        index = folder / f"{stem}.safetensors.index.json"
        if index.is_file():
            return _indexed(folder, index)
    for stem in _STEMS:
        files = sorted(folder.glob(f"{stem}*.safetensors"))
        if files:
            return _complete(folder, files)
    raise CheckpointError(
        f"{folder.name} holds no weights: a model folder has diffusion_pytorch_model*.safetensors "
        "or model*.safetensors in it"
    )


def _indexed(folder: Path, index: Path) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index.name} in {folder.name} has no weight_map; download it again")
    names = set()
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or name in ("", ".", "..") or re.search(r"[/\\:\0]", name):
            raise CheckpointError(
                f"{index.name} in {folder.name} places {tensor} in {name!r}: an index names files of its own folder "
                "only; download it again"
            )
        names.add(name)
    missing = sorted(name for name in names if not (folder / name).is_file())
    if missing:
        raise _missing_shards(folder, missing, len(names))
    paths = [folder / name for name in sorted(names)]
    for path in paths:
        held = read_header(path).tensors
        lost = [tensor for tensor, name in weight_map.items() if name == path.name and tensor not in held]
        if lost:
            raise CheckpointError(
                f"{path.name} in {folder.name} lacks {lost[0]} ({len(lost)} tensors) that the index places there; "
                "download the shard again"
            )
    return paths


def _complete(folder: Path, files: list[Path]) -> list[Path]:
    """Without an index: shards numbered 1..n of n must all be there, and nothing may compete with them."""
    groups: dict[tuple[str, str, int], dict[int, Path]] = {}
    whole = []
    for path in files:
        match = _SHARD.match(path.name)
        if match is None:
            whole.append(path)
        else:
            key = (match["stem"], match["rest"] or "", int(match["count"]))
            groups.setdefault(key, {})[int(match["number"])] = path
    if len(whole) == 1 and not groups:
        return whole
    if len(groups) == 1 and not whole:
        (stem, rest, count), found = next(iter(groups.items()))
        wanted = range(1, count + 1)
        missing = [f"{stem}-{n:05d}-of-{count:05d}{rest}.safetensors" for n in wanted if n not in found]
        if missing:
            raise _missing_shards(folder, missing, count)
        return [found[n] for n in wanted]
    exact = [path for path in whole if path.stem in _STEMS]
    if len(exact) == 1:
        return exact
    names = ", ".join(path.name for path in files[:4])
    raise CheckpointError(
        f"{folder.name} holds more than one set of weights and no index ({names}); keep one, or give a file"
    )


def _missing_shards(folder: Path, missing: list[str], count: int) -> CheckpointError:
    more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
    return CheckpointError(
        f"{folder.name} is incomplete: {missing[0]}{more} of {count} shards is missing; download the folder again"
    )


def read_json(path: Path) -> dict[str, Any]:
    """A small JSON object from a checkpoint folder; CheckpointError when it is anything else."""
    with open_binary(path) as file:
        raw = file.read(MAX_INDEX_BYTES + 1)
    if len(raw) > MAX_INDEX_BYTES:
        raise CheckpointError(
            f"{path.name} is larger than {MAX_INDEX_BYTES >> 20} MiB, which is no index or config; download it again"
        )
    try:
        value = json.loads(raw.decode("utf-8"))
    except (UnicodeDecodeError, ValueError, RecursionError):
        raise CheckpointError(f"{path.name} in {path.parent.name} is not JSON; download it again") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path.name} in {path.parent.name} is not a JSON object; download it again")
    return value
