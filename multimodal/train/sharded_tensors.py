"""Sharded tensors on disk, without pickle: every process writes its rows, and any number of processes may read them.

pieces/index.json          shape and type of each tensor; of a sharded one also the axis and the number of rows in each process
pieces/00000.safetensors   the rows of process 0, by the tensors' names, and all tensors that are not sharded
"""

import json
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from multimodal.checkpoint import NAMES_OF_KINDS, Header, local, write_tensors
from multimodal.files import check_fields, read_json
from multimodal.shapes import CheckpointError
from multimodal.texts import short_repr
from multimodal.train.processes import Processes

FORMAT = 1
INDEX = "index.json"


def write_sharded(folder: Path, tensors: Mapping[str, Tensor], processes: Processes) -> None:
    """Write `tensors`, some of which are sharded along one axis over all processes. All processes must call this.

    Raises:
        OSError: in every process, if one of them could not write.
    """
    shards, own = _shards_of(tensors, processes), {}
    for name, tensor in tensors.items():
        if name in shards or processes.rank == 0:
            own[name] = local(tensor).detach().cpu().clone().contiguous()
    failed = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_tensors(own, folder / _file(processes.rank))
        if processes.rank == 0:
            entries = {
                name: {"shape": list(t.shape), "dtype": NAMES_OF_KINDS[t.dtype], **shards.get(name, {})}
                for name, t in tensors.items()
            }
            index = {"format": FORMAT, "processes": processes.count, "tensors": entries}
            (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        failed = str(error)
    if problems := [problem for problem in processes.all_gather(failed) if problem]:
        raise OSError("; ".join(problems))


class ShardedTensors:
    """Reads what `write_sharded` wrote. `header`: {name: (shape, type)} of every tensor.

    Raises:
        CheckpointError: missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        index = read_json(folder / INDEX, CheckpointError)
        check_fields(folder / INDEX, index, {"format": int, "processes": int, "tensors": dict}, CheckpointError)
        if index["format"] != FORMAT:
            raise CheckpointError(
                f"{folder / INDEX}: format {index['format']}, but this version reads {FORMAT}; update multimodal-stream"
            )
        self.header: Header = {}
        self._shards: dict[str, tuple[int, list[int]]] = {}
        for name, entry in index["tensors"].items():
            where = f"{folder / INDEX}: {short_repr(name)}"
            check_fields(where, entry, {"shape": list, "dtype": str}, CheckpointError)
            if not _are_counts(entry["shape"]):
                raise CheckpointError(f"{where}: 'shape' is {short_repr(entry['shape'])}, wanted whole numbers")
            self.header[name] = tuple(entry["shape"]), entry["dtype"]
            if "rows" in entry:
                check_fields(where, entry, {"axis": int, "rows": list}, CheckpointError)
                axis, rows = entry["axis"], entry["rows"]
                fits = 0 <= axis < len(entry["shape"]) and _are_counts(rows) and len(rows) == index["processes"]
                if not fits or sum(rows) != entry["shape"][axis]:
                    raise CheckpointError(
                        f"{where}: rows {short_repr(rows)} of axis {axis} do not make the shape {short_repr(entry['shape'])}"
                    )
                self._shards[name] = axis, rows

    def read(self, like: Mapping[str, Tensor], processes: Processes) -> dict[str, Tensor]:
        """New tensors, sharded like those in `like`. All processes must call this.

        Raises:
            CheckpointError: a file is missing or damaged, or holds tensors of another shape.
        """
        shards, found = _shards_of(like, processes), {}
        # a file has rows of many tensors, so it stays open
        with ExitStack() as stack:
            files: dict[int, Any] = {}
            for name, wanted in like.items():
                shard = shards.get(name)
                start = sum(shard["rows"][: processes.rank]) if shard else 0
                shape = local(wanted).shape
                axis = shard["axis"] if shard else 0
                rows = shape[axis] if shape else 1
                fresh = torch.empty_like(wanted)
                part = self._rows(name, axis, start, start + rows, files, stack)
                if part.shape != shape:
                    raise CheckpointError(
                        f"{self.folder}: {short_repr(name)} is {tuple(part.shape)} in the files, wanted {tuple(shape)}"
                    )
                with torch.no_grad():
                    local(fresh).copy_(part)
                found[name] = fresh
        return found

    def _rows(self, name: str, axis: int, start: int, stop: int, files: dict[int, Any], stack: ExitStack) -> Tensor:
        """Rows start .. stop - 1 of a tensor along an axis, from the files that hold some of them."""
        file_axis, sizes = self._shards.get(name, (axis, [self.header[name][0][axis]] if self.header[name][0] else [1]))
        # a file that is sharded along another axis has some of every row
        parts, at = [], 0
        for number, size in enumerate(sizes):
            first, last = (max(start, at), min(stop, at + size)) if file_axis == axis else (at, at + size)
            if first < last:
                parts.append(self._part(name, number, file_axis, first - at, last - at, size, files, stack))
            at += size
        if not parts:
            shape = list(self.header[name][0])
            shape[axis] = 0
            return torch.empty(shape)
        whole = torch.cat(parts, file_axis) if parts[0].dim() else parts[0]
        return whole if file_axis == axis else whole.narrow(axis, start, stop - start)

    def _part(
        self,
        name: str,
        number: int,
        axis: int,
        first: int,
        last: int,
        size: int,
        files: dict[int, Any],
        stack: ExitStack,
    ) -> Tensor:
        path = self.folder / _file(number)
        try:
            if number not in files:
                files[number] = stack.enter_context(safe_open(path, framework="pt"))
            part = files[number].get_slice(name)
            shape, whole = list(self.header[name][0]), part.get_shape()
            if shape:
                shape[axis] = size
            if list(whole) != shape or part.get_dtype() != self.header[name][1]:
                raise CheckpointError(
                    f"{path}: {short_repr(name)} is {part.get_dtype()} {tuple(whole)}, and {INDEX} promises "
                    f"{self.header[name][1]} {tuple(shape)}"
                )
            return part[(*[slice(None)] * axis, slice(first, last))] if shape else files[number].get_tensor(name)
        except (OSError, SafetensorError, ValueError, KeyError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"{path}: missing, damaged or cut short: {error}") from error


def _shards_of(tensors: Mapping[str, Tensor], processes: Processes) -> dict[str, dict[str, Any]]:
    """{name: {"axis": .., "rows": [of each process]}} of the sharded tensors."""
    sharded = [name for name, t in tensors.items() if hasattr(t, "full_tensor")]
    if not sharded:
        return {}
    axes = {}
    for name in sharded:
        (placement,) = tensors[name].placements  # type: ignore[attr-defined]  `shard` uses one mesh axis
        if placement.is_shard():
            axes[name] = placement.dim
    own = [local(tensors[name]).shape[axis] for name, axis in axes.items()]
    rows = zip(*processes.all_gather(own), strict=True)
    return {name: {"axis": axis, "rows": list(sizes)} for (name, axis), sizes in zip(axes.items(), rows, strict=True)}


def _are_counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(n) is int and n >= 0 for n in values)


def _file(process: int) -> str:
    return f"{process:05d}.safetensors"
